"""Does the fast SAC learn the same? Returns at 20,000 steps of HalfCheetah-v5, over seeds.

Stable-Baselines3, this library in float32 and, where the processor has instructions for it, with
bf16 compute; equal settings and warm-up; ten deterministic evaluation episodes at the end of each run.

    python benchmarks/sac_learning.py               writes benchmarks/sac_learning.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WARMUP = 1_000
HERE = Path(__file__).parent


def esscher(seed: int, steps: int, precision: str) -> float:
    import esscher
    from esscher.methods.control.sac import Config

    experiment = esscher.Experiment.of(
        Config(warmup=WARMUP),
        env="HalfCheetah-v5",
        steps=steps,
        seed=seed,
        runtime=esscher.RuntimeConfig(
            device="cpu", threads=1, precision=precision, graph="compile"
        ),
        evaluation=esscher.EvaluationConfig(every=0, episodes=10),
        checkpoint=esscher.CheckpointConfig(every=0),
    )
    with tempfile.TemporaryDirectory() as folder:
        return esscher.run(experiment, directory=Path(folder) / "r", display=False).evaluation.mean


def stable_baselines3(seed: int, steps: int) -> float:
    import gymnasium
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(1)
    env = gymnasium.make("HalfCheetah-v5")
    model = SAC("MlpPolicy", env, learning_starts=WARMUP, device="cpu", seed=seed)
    model.learn(steps)
    judge = Monitor(gymnasium.make("HalfCheetah-v5"))
    mean, _ = evaluate_policy(model, judge, n_eval_episodes=10, deterministic=True)
    return float(mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "sac_learning.json")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "SEED"))
    options = parser.parse_args()
    if options.only:
        name, seed = options.only[0], int(options.only[1])
        train = stable_baselines3 if name == "sb3" else lambda s, n: esscher(s, n, name)
        print(json.dumps(train(seed, options.steps)))
        return
    import torch

    names = ["sb3", "float32"]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        names.append("bfloat16")

    def work(job: tuple[str, int]) -> float:
        command = [sys.executable, __file__, "--only", job[0], str(job[1])]
        command += ["--steps", str(options.steps)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        value = json.loads(output.strip().splitlines()[-1])
        print(f"{job[0]} seed {job[1]}: {value:.1f}", flush=True)
        return value

    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    with ThreadPoolExecutor(options.workers) as pool:
        values = dict(zip(jobs, pool.map(work, jobs), strict=True))
    returns = {name: [values[name, seed] for seed in range(options.seeds)] for name in names}
    record = {
        "what": f"return of SAC after {options.steps:,} steps of HalfCheetah-v5, one value a seed",
        "returns": returns,
        "mean": {name: statistics.mean(r) for name, r in returns.items()},
        "std": {name: statistics.stdev(r) for name, r in returns.items()},
        "command": "python benchmarks/sac_learning.py",
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
