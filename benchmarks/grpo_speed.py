"""GRPO iterations (write, judge, learn) end to end: this library against TRL's GRPOTrainer, as a ratio.

Same untrained Llama with the same tokenizer, same prompts, reward, completions a prompt and longest
completion, one optimiser step an iteration on all completions, same loss (group mean, batch deviation,
mean over tokens, no reference), float32, same threads. Each repetition is a fresh process of either, in
turn, timed by itself after the first iterations. Two models:

    words   4 layers of width 256, 32,000 tokens, as in dpo_speed.py: what real tokenizers come near
    bytes   4 layers of width 128, 259 tokens: all that is left is the layers, which both share

    python benchmarks/grpo_speed.py                 writes benchmarks/grpo_speed.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GROUP, LENGTH, SETTLE = 8, 64, 2
PROMPTS = {"words": 4, "bytes": 16}
HERE = Path(__file__).parent


def digits(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """The reward: the share of digits."""
    return sum(letter.isdigit() for letter in completion) / max(len(completion), 1)


def model_of(kind: str) -> tuple[Any, Any]:
    """A Llama and its tokenizer: bytes, or bytes and so many words that none will be asked for."""
    from esscher.models import tiny_llama

    if kind == "bytes":
        return tiny_llama(layers=4, width=128, context=256)
    model, tokenizer = tiny_llama(layers=4, width=256, context=256)
    tokenizer.add_tokens([f"word{number} " for number in range(32_000 - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def esscher(kind: str, threads: int, steps: int) -> float:
    """Milliseconds an iteration, from the run's own metrics."""
    import esscher
    from esscher.experiment import ModelConfig, TextConfig
    from esscher.methods.language.lite_ppo import Config

    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{path}"  # Where the judge's process finds this.
    experiment = esscher.Experiment.of(
        Config(
            batch_size=PROMPTS[kind],
            group_size=GROUP,
            num_minibatches=1,
            max_new_tokens=LENGTH,
            learning_rate=1e-4,
        ),
        model=ModelConfig(source="grpo_speed:model_of", kwargs={"kind": kind}),
        data="esscher.datasets:sums_asked",
        text=TextConfig(reward="grpo_speed:digits"),
        steps=SETTLE + steps,
        runtime=esscher.RuntimeConfig(device="cpu", threads=threads),
        evaluation=esscher.EvaluationConfig(every=0, episodes=1),
        checkpoint=esscher.CheckpointConfig(every=0),
        log=esscher.LogConfig(every=1, to=()),
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        esscher.run(experiment, directory=run, display=False)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {row["step"]: row["seconds"] for row in rows if row["phase"] == "train"}
    return (seconds[SETTLE + steps] - seconds[SETTLE]) / steps * 1e3


def trl(kind: str, threads: int, steps: int) -> float:
    """Milliseconds an iteration, by a callback at the same two iterations."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from esscher.datasets import sums_asked

    torch.set_num_threads(threads)
    torch.manual_seed(0)

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SETTLE:
                self.began = time.perf_counter()
            if state.global_step == SETTLE + steps:
                self.ended = time.perf_counter()

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [digits(p, c, {}) for p, c in zip(prompts, completions, strict=True)]

    model, tokenizer = model_of(kind)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS[kind] * GROUP,
            num_generations=GROUP,
            max_completion_length=LENGTH,
            max_steps=SETTLE + steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            loss_type="dapo",
            scale_rewards="batch",
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(sums_asked()),
            callbacks=[clock],
        )
        trainer.train()
    return (clock.ended - clock.began) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "grpo_speed.json")
    parser.add_argument("--only", nargs=2, metavar=("PROGRAM", "MODEL"))
    options = parser.parse_args()
    if options.only:
        measure = {"esscher": esscher, "trl": trl}[options.only[0]]
        print(json.dumps(measure(options.only[1], options.threads, options.steps)))
        return
    from importlib.metadata import version

    import torch

    sizes = ["--steps", str(options.steps), "--threads", str(options.threads)]
    times: dict[str, dict[str, list[float]]] = {
        kind: {"trl": [], "esscher": []} for kind in PROMPTS
    }
    for repetition in range(options.repetitions):
        for kind, of_kind in times.items():
            for name, measured in of_kind.items():
                command = [sys.executable, __file__, "--only", name, kind, *sizes]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                measured.append(json.loads(output.strip().splitlines()[-1]))
                told = f"{measured[-1]:.0f} ms an iteration"
                print(f"{repetition} {kind} {name}: {told}", flush=True)
    ratios = {
        kind: [other / mine for other, mine in zip(found["trl"], found["esscher"], strict=True)]
        for kind, found in times.items()
    }
    record = {
        "what": f"one iteration of GRPO, {GROUP} completions of at most {LENGTH} tokens of each of "
        f"{PROMPTS['words']} prompts (words) or {PROMPTS['bytes']} (bytes)",
        "milliseconds_an_iteration": times,
        "times_faster_than_trl": ratios,
        "median_times_faster": {kind: statistics.median(x) for kind, x in ratios.items()},
        "threads": options.threads,
        "steps": options.steps,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": f"python benchmarks/grpo_speed.py {' '.join(sizes)}",
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["median_times_faster"]))


if __name__ == "__main__":
    main()
