"""Updates of DPO: this library's f_dpo against TRL's DPOTrainer, and against DPO written plainly.

Same Llama read from the same folder (4 layers of width 256, vocabulary 32,000), 4 pairs an update of
64 tokens of prompt and 128 of either answer, the same rows, reverse KL, reference computed at every
update, AdamW, float32, same threads. Each measurement is a process of its own, in turn: seconds from
the end of one update to the end of the next, with the data's way, after the first ones; memory is the
process's largest resident size (ru_maxrss) less its resident size right after the policy was loaded,
so that reference, moments, gradients and activations count, and interpreter and libraries do not.

Plainly: all logits at once, log_softmax and gather, torch.optim.AdamW. TRL is measured without
gradient checkpointing, as the others; its default is with it, of which memory is noted as well. Its
output head has a kernel for GPUs, and falls back to plain operations on a CPU.

    python benchmarks/dpo_speed.py                  writes benchmarks/dpo_speed.json
"""

import argparse
import copy
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS, PROMPT, ANSWER, VOCABULARY = 4, 64, 128, 32_000
BETA, LEARNING_RATE, MAX_NORM = 0.1, 1e-6, 10.0
SETTLE = 2
HERE = Path(__file__).parent
MEGABYTE = 2**20


def make(folder: Path) -> None:
    """A model with random weights, a tokenizer of words, and rows."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    words = [f"w{k}" for k in range(VOCABULARY - 3)]
    ids = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=ids, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    rows = [  # An end token follows each answer.
        {"prompt": text(PROMPT) + " ", "chosen": text(ANSWER - 1), "rejected": text(ANSWER - 1)}
        for _ in range(16 * PAIRS)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


class Clock:
    """Times of the ends of updates, and memory."""

    def __init__(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.loaded = pages * os.sysconf("SC_PAGE_SIZE")
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    def told(self, tokens: int) -> dict[str, Any]:
        largest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = len(self.times) - SETTLE
        return {
            "seconds": (self.times[-1] - self.times[SETTLE - 1]) / max(count, 1),
            "megabytes": (largest - self.loaded) / MEGABYTE,
            "tokens": tokens,
        }


def esscher(folder: Path, threads: int, updates: int) -> dict[str, Any]:
    import torch

    from esscher.adapters.models import load_model
    from esscher.adapters.text import read_text
    from esscher.distributions.autoregressive import TextSpec
    from esscher.experience.text import Text
    from esscher.experiment import ModelConfig
    from esscher.loops.offline import offline
    from esscher.loops.online import LoopState
    from esscher.methods.language.f_dpo import FDPO, Config
    from esscher.runtime.device import Runtime, RuntimeConfig

    torch.set_num_threads(threads)
    runtime = Runtime(RuntimeConfig(device="cpu", threads=threads, graph="eager"))
    model, tokenizer = load_model(ModelConfig(source=str(folder)), runtime.device)
    clock = Clock()
    rows = json.loads((folder / "rows.json").read_text())
    items, _ = read_text("pairs", rows, tokenizer, name="rows", columns={}, max_length=512)
    cfg = Config(batch_size=PAIRS, beta=BETA, learning_rate=LEARNING_RATE, max_grad_norm=MAX_NORM)
    method = FDPO(cfg, TextSpec(model=model, tokenizer=tokenizer, max_length=512), runtime)
    text = Text(name="rows", train=items, held_out=(), pad_token=model.pad_token)
    experience = method.experience(text)
    state = LoopState(torch.zeros(0))
    for _ in offline(method, experience, state, seed=0, steps=SETTLE + updates):
        clock.tick()
    return clock.told(int(experience.batch(1).token_mask.sum()))


def trl(folder: Path, threads: int, updates: int, checkpointing: bool = False) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=PAIRS,
            max_steps=SETTLE + updates,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_NORM,
            max_length=None,
            bf16=False,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            logging_steps=1_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            # Without one, TRL reads the model's folder again, and in its own precision.
            ref_model=copy.deepcopy(model),
            args=config,
            train_dataset=datasets.Dataset.from_list(
                json.loads((folder / "rows.json").read_text())
            ),
            processing_class=tokenizer,
            callbacks=[Callback()],
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
    return clock.told(int(batch["attention_mask"].sum()))


def plain(folder: Path, threads: int, updates: int) -> dict[str, Any]:
    import torch
    import transformers
    from torch.nn.functional import logsigmoid

    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    clock = Clock()
    reference = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    rows = json.loads((folder / "rows.json").read_text())

    def logp(which: Any, tokens: torch.Tensor) -> torch.Tensor:
        found = which(input_ids=tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        return found.gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :].sum(-1)

    tokens = torch.zeros(0)
    for update in range(SETTLE + updates):
        part = [rows[(update * PAIRS + k) % len(rows)] for k in range(PAIRS)]
        texts = [r["prompt"] + r[name] for name in ("chosen", "rejected") for r in part]
        tokens = torch.tensor([[*x, 2] for x in tokenizer(texts)["input_ids"]])
        with torch.no_grad():
            ref_logp = logp(reference, tokens)
        chosen, rejected = (logp(model, tokens) - ref_logp).chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        clock.tick()
    return clock.told(tokens.numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "dpo_speed.json")
    parser.add_argument("--only", choices=("esscher", "trl", "trl_default", "plain"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.only:
        measures: dict[str, Callable[..., dict[str, Any]]] = {
            "esscher": esscher,
            "plain": plain,
            "trl": trl,
            "trl_default": lambda *args: trl(*args, checkpointing=True),
        }
        found = measures[options.only](options.folder, options.threads, options.updates)
        print(json.dumps(found))
        return
    from importlib.metadata import version

    import torch

    found: dict[str, list[dict[str, Any]]] = {"trl": [], "plain": [], "esscher": []}

    def measure(name: str, updates: int) -> dict[str, Any]:
        sizes = ["--updates", str(updates), "--threads", str(options.threads)]
        command = [sys.executable, __file__, "--only", name, "--folder", folder, *sizes]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        one = json.loads(output.strip().splitlines()[-1])
        assert one["tokens"] == 2 * PAIRS * (PROMPT + ANSWER), one
        print(f"{name}: {one['seconds']:.2f} s an update, {one['megabytes']:.0f} MB", flush=True)
        return one

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for _ in range(options.repetitions):
            for name, list_of in found.items():
                list_of.append(measure(name, options.updates))
        default = measure("trl_default", 1)
    seconds = {name: [one["seconds"] for one in list_of] for name, list_of in found.items()}
    memory = {name: [one["megabytes"] for one in list_of] for name, list_of in found.items()}

    def ratios(of: dict[str, list[float]], over: str, under: str) -> list[float]:
        return [a / b for a, b in zip(of[over], of[under], strict=True)]

    faster = {name: ratios(seconds, name, "esscher") for name in ("trl", "plain")}
    smaller = {name: ratios(memory, "esscher", name) for name in ("trl", "plain")}
    record = {
        "what": f"one update of DPO, {PAIRS} pairs of {PROMPT} + {ANSWER} tokens, Llama of 4 layers, "
        f"width 256, vocabulary {VOCABULARY:,}, float32",
        "seconds_an_update": seconds,
        "megabytes_above_the_loaded_model": memory,
        "times_faster": faster,
        "median_times_faster": {name: statistics.median(x) for name, x in faster.items()},
        "share_of_memory": smaller,
        "median_share_of_memory": {name: statistics.median(x) for name, x in smaller.items()},
        "megabytes_of_trl_with_its_default_checkpointing": default["megabytes"],
        "threads": options.threads,
        "updates": options.updates,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "machine": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "command": f"python benchmarks/dpo_speed.py --updates {options.updates} "
        f"--threads {options.threads}",
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    told = {key: record[key] for key in ("median_times_faster", "median_share_of_memory")}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
