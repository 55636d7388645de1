"""SAC end to end on HalfCheetah-v5: this library against Stable-Baselines3, as a ratio.

Same network (2 x 256), batch (256), one update a step, warm-up, threads; each repetition is a fresh
process of either, in turn, timed by itself over the same steps after the first 500 learning ones.

    python benchmarks/sac_speed.py                  writes benchmarks/sac_speed.json
    python benchmarks/sac_speed.py --sbx PYTHON     ... with SBX (JAX), by a Python that has sbx-rl

bf16 compute is timed where the processor has instructions for it.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARMUP, SETTLE = 500, 500
HERE = Path(__file__).parent


def esscher(threads: int, steps: int, precision: str) -> float:
    """Milliseconds a step, from the run's own metrics."""
    import esscher
    from esscher.methods.control.sac import Config

    until = WARMUP + SETTLE + steps
    experiment = esscher.Experiment.of(
        Config(warmup=WARMUP),
        env="HalfCheetah-v5",
        steps=until,
        runtime=esscher.RuntimeConfig(
            device="cpu", threads=threads, precision=precision, graph="compile"
        ),
        evaluation=esscher.EvaluationConfig(every=0, episodes=1),
        checkpoint=esscher.CheckpointConfig(every=0),
        log=esscher.LogConfig(every=100, to=()),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        esscher.run(experiment, directory=run, display=False)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["seconds"] for row in rows if row["phase"] == "train"}
    return (seconds[until] - seconds[WARMUP + SETTLE]) / steps * 1e3


def stable_baselines3(threads: int, steps: int) -> float:
    """Milliseconds a step, by a callback at the same two steps."""
    import gymnasium
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == WARMUP + SETTLE:
                self.began = time.perf_counter()
            if self.num_timesteps == WARMUP + SETTLE + steps:
                self.ended = time.perf_counter()
            return True

    torch.set_num_threads(threads)
    env = gymnasium.make("HalfCheetah-v5")
    model = SAC("MlpPolicy", env, learning_starts=WARMUP, device="cpu", seed=0)
    clock = Clock()
    model.learn(WARMUP + SETTLE + steps, callback=clock)
    return (clock.ended - clock.began) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "sac_speed.json")
    parser.add_argument("--sbx", type=Path, metavar="PYTHON")
    parser.add_argument("--only", choices=("float32", "bfloat16", "sb3"))
    options = parser.parse_args()
    if options.only == "sb3":
        print(json.dumps(stable_baselines3(options.threads, options.steps)))
        return
    if options.only:
        print(json.dumps(esscher(options.threads, options.steps, options.only)))
        return
    import torch

    commands = {}
    for name in ("sb3", "float32", "bfloat16"):
        commands[name] = [sys.executable, __file__, "--only", name]
        commands[name] += ["--steps", str(options.steps), "--threads", str(options.threads)]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        del commands["bfloat16"]
    if options.sbx:
        commands["sbx"] = [str(options.sbx), str(HERE / "sbx_speed.py"), str(options.steps)]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for repetition in range(options.repetitions + 1):
        for name, command in commands.items():
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            milliseconds = json.loads(output.strip().splitlines()[-1])
            if repetition:  # The first round fills the compiler's cache.
                times[name].append(milliseconds)
            print(f"{repetition} {name}: {milliseconds:.2f} ms a step", flush=True)
    ratios = {
        name: [other / mine for other, mine in zip(times["sb3"], times[name], strict=True)]
        for name in commands
        if name != "sb3"
    }
    record = {
        "what": "SAC on HalfCheetah-v5, 2 x 256, batch 256, one update a step, end to end",
        "milliseconds_a_step": times,
        "times_faster_than_sb3": ratios,
        "median_times_faster": {name: statistics.median(values) for name, values in ratios.items()},
        "threads": options.threads,
        "steps": options.steps,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": f"python benchmarks/sac_speed.py --steps {options.steps}",
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median_times_faster"]))


if __name__ == "__main__":
    main()
