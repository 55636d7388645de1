"""Steps a second of a task that is slow to step: copies in turn, in processes, as Ray's actors.

The task is Pendulum with a wait of 20 ms a step, as a simulator behind a socket has it; 8 copies. All
in one run, in turn, after ten steps that are not counted; the median over repetitions.

    python benchmarks/slow_environments.py          writes benchmarks/slow_environments.json
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium
import ray
import torch

from esscher import __version__
from esscher.adapters.gymnasium import Environments
from esscher.experiment import EnvConfig

HERE = Path(__file__).parent
COPIES, WAIT = 8, 0.02


class Slow(gymnasium.Wrapper[Any, Any, Any, Any]):
    def step(self, action: Any) -> Any:
        time.sleep(WAIT)
        return self.env.step(action)


def slow_pendulum() -> Any:
    return Slow(gymnasium.make("Pendulum-v1"))


WAYS: dict[str, dict[str, Any]] = {
    "one after another": {},
    "processes": {"parallel": True},
    "ray": {"ray": "local"},
}


def steps_a_second(envs: Environments, steps: int) -> float:
    envs.reset(0)
    action = torch.zeros(COPIES, 1)
    for step in range(10):
        envs.step(action, step)
    began = time.perf_counter()
    for step in range(steps):
        envs.step(action, step)
    return COPIES * steps / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "slow_environments.json")
    options = parser.parse_args()
    task = "slow_environments:slow_pendulum"
    made = {
        name: Environments(EnvConfig(id=task, num=COPIES, **way), 0) for name, way in WAYS.items()
    }
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.repetitions):
        for name, envs in made.items():
            found[name].append(steps_a_second(envs, options.steps))
    for envs in made.values():
        envs.close()
    plain = found["one after another"]
    record = {
        "what": f"environment steps a second, {COPIES} copies that wait {1000 * WAIT:g} ms a step",
        "steps_a_second": found,
        "median_times_faster": {
            name: statistics.median(a / b for a, b in zip(rates, plain, strict=True))
            for name, rates in found.items()
        },
        "versions": {"esscher": __version__, "ray": ray.__version__},
        "machine": platform.processor() or platform.machine(),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["median_times_faster"], indent=1))


if __name__ == "__main__":
    main()
