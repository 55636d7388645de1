"""DCG-MAP-Elites on the point mass: a population as one network against a loop over individuals,
and against QDax (JAX), as ratios.

Three figures a second: evaluations (whole episodes of 256 policies), critic updates (with the
actor's), and steps of offspring by gradients. Sizes are the paper's: policies 2 x 128, actor and
critics 2 x 256, batches of 100. Same sizes on all sides, one thread each, in turn.

    python benchmarks/dcg_speed.py                  writes benchmarks/dcg_speed.json
    python benchmarks/dcg_speed.py --qdax PYTHON    ... with QDax, by a Python that has qdax
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from esscher.adapters.episodes import EpisodeRunner
from esscher.experiment import EnvConfig
from esscher.methods.diversity.dcg_map_elites import Config, DCGMAPElites
from esscher.runtime.device import Runtime, RuntimeConfig

HERE = Path(__file__).parent
PEOPLE, OFFSPRING, GRADIENT_STEPS, UPDATES = 256, 128, 10, 300
LOOPED_OFFSPRING = 16


class Bench:
    """A learner with a replay of one generation's steps, and the same work done one by one."""

    def __init__(self, graph: Literal["eager", "compile"]):
        torch.manual_seed(0)
        self.judge = EpisodeRunner(EnvConfig(id="esscher.envs:PointMass"), 0)
        cfg = Config(
            cells=(1024,), num_variation=PEOPLE - OFFSPRING, num_gradient=OFFSPRING,
            updates_per_iteration=1, gradient_steps=GRADIENT_STEPS, buffer_size=100_000,
        )  # fmt: skip
        self.method = DCGMAPElites(
            cfg, self.judge.spec, Runtime(RuntimeConfig(device="cpu", threads=1, graph=graph))
        )
        self.experience = self.method.experience()
        self.people = self.method.ask(self.experience)
        self.method.tell(self.people, self.evaluate(), self.experience)
        self.parents = self.people.genotype[:OFFSPRING]
        self.wanted = torch.rand(OFFSPRING, 2) * 2 - 1
        self.networks = [self._network(genotype) for genotype in self.people.genotype]

    def evaluate(self) -> Any:
        return self.judge(lambda obs: self.method.play(self.people, obs), PEOPLE, 0)

    def evaluate_one_by_one(self) -> Any:
        def act(obs: torch.Tensor) -> torch.Tensor:
            return torch.stack([net(o) for net, o in zip(self.networks, obs, strict=True)])

        with torch.no_grad():
            return self.judge(act, PEOPLE, 0)

    def learn(self) -> None:
        for step in range(UPDATES):
            self.method.update(self.experience.sample(100), step)

    def climb(self) -> None:
        self.method.climbed(self.parents, self.wanted, self.experience)

    def climb_one_by_one(self) -> None:
        for k in range(LOOPED_OFFSPRING):
            network = self._network(self.parents[k])
            adam = torch.optim.Adam(network.parameters(), lr=5e-3)
            wanted = self.wanted[k].expand(100, -1)
            for _ in range(GRADIENT_STEPS):
                obs = self.experience.sample_obs(100)
                seen = torch.cat([obs, wanted], 1)
                loss = -self.method.critic.first(seen, network(obs)).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()

    def _network(self, genotype: torch.Tensor) -> nn.Sequential:
        layers: list[nn.Module] = []
        for weight, bias in self.method._network.split(genotype[None]):
            layer = nn.Linear(weight.shape[2], weight.shape[1])
            layer.weight.data.copy_(weight[0])
            layer.bias.data.copy_(bias[0, 0])
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1], nn.Tanh())


def rate(work: Callable[[], Any], amount: int, repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return amount / statistics.median(times)


def same_answers(bench: Bench) -> None:
    """Both ways play the same episodes."""
    one, other = bench.evaluate(), bench.evaluate_one_by_one()
    torch.testing.assert_close(one.fitness, other.fitness, rtol=1e-4, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "dcg_speed.json")
    parser.add_argument("--qdax", type=Path, metavar="PYTHON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    eager, compiled = Bench("eager"), Bench("compile")
    same_answers(eager)
    steps = OFFSPRING * GRADIENT_STEPS
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "evaluations": (compiled.evaluate, PEOPLE),
        "evaluations, one by one": (eager.evaluate_one_by_one, PEOPLE),
        "critic_updates": (compiled.learn, UPDATES),
        "critic_updates, eager": (eager.learn, UPDATES),
        "gradient_steps": (compiled.climb, steps),
        "gradient_steps, one by one": (eager.climb_one_by_one, LOOPED_OFFSPRING * GRADIENT_STEPS),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(options.repetitions + 1):
        for name, (work, amount) in works.items():
            found = rate(work, amount, 20 if name == "evaluations" else 1)
            if repetition:  # The first round compiles.
                rates[name].append(found)
        if options.qdax and repetition:
            for name, found in qdax(options.qdax).items():
                rates.setdefault(f"{name}, QDax", []).append(found)
        print(repetition, {name: round(r[-1]) for name, r in rates.items() if r}, flush=True)
    ratios = {
        name: statistics.median(
            mine / theirs for mine, theirs in zip(rates[name.split(",")[0]], found, strict=True)
        )
        for name, found in rates.items()
        if "," in name
    }
    record = {
        "what": "DCG-MAP-Elites on the point mass, policies 2 x 128, critics 2 x 256, batch 100",
        "a_second": rates,
        "median_times_faster_than": ratios,
        "threads": 1,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": "python benchmarks/dcg_speed.py" + (" --qdax PYTHON" if options.qdax else ""),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(ratios, indent=1))


def qdax(python: Path) -> dict[str, float]:
    """The same figures of QDax, one thread."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    }
    command = [str(python), str(HERE / "qdax_speed.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
