"""An update of f-DPO on a model of seven billion weights on one GPU, against the calculation.

    python benchmarks/language_7b.py            writes language_7b.json

The weights are random (Llama's shape), in bfloat16 and frozen; adapters of rank 16 are trained, with
gradient checkpointing, on 4 pairs of 1,024 tokens. The same path as any model's: the source is a
module:function, and the update is the method's own. Peak memory is torch's, of allocated tensors.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from esscher.adapters.models import load_model
from esscher.distributions.autoregressive import TextSpec
from esscher.experiment import ModelConfig
from esscher.methods.language.f_dpo import FDPO, Config
from esscher.models import byte_tokenizer
from esscher.report.memory import GIB, LLAMA_7B, need
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.samplers.decoding import Decoding
from esscher.types import Pairs

PAIRS, TOKENS, PROMPT = 4, 1_024, 256
UPDATES = 5


def random_7b() -> tuple[Any, Any]:
    """Llama's shape with random weights, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LLAMA_7B
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4_096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config), byte_tokenizer()
    finally:
        torch.set_default_dtype(before)


def pairs(device: torch.device) -> Pairs:
    """Random tokens of full length."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 259, (PAIRS, 2, TOKENS), generator=draw).to(device)
    tokens[:, 1, :PROMPT] = tokens[:, 0, :PROMPT]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    completion = mask.clone()
    completion[:, :, :PROMPT] = False
    return Pairs(
        tokens=tokens,
        token_mask=mask,
        completion_mask=completion,
        row=torch.arange(PAIRS, device=device),
    )


def main() -> None:
    """Measure and write."""
    sys.path.insert(0, str(Path(__file__).parent))
    config = ModelConfig(
        source="language_7b:random_7b",
        dtype="bfloat16",
        lora_rank=16,
        gradient_checkpointing=True,
    )
    runtime = Runtime(RuntimeConfig(device="cuda", precision="bfloat16", graph="eager"))
    model, tokenizer = load_model(config, runtime.device)
    loaded = torch.cuda.memory_allocated() / GIB
    method = FDPO(
        Config(batch_size=PAIRS, learning_rate=1e-4, warmup_updates=0),
        TextSpec(model=model, tokenizer=tokenizer, max_length=TOKENS),
        runtime,
    )
    batch, found = pairs(runtime.device), {}
    for micro in (0, 1):
        method.cfg = Config(
            batch_size=PAIRS, learning_rate=1e-4, warmup_updates=0, micro_batch_size=micro
        )
        torch.cuda.reset_peak_memory_stats()
        times, losses = [], []
        for step in range(UPDATES):
            torch.cuda.synchronize()
            began = time.perf_counter()
            losses.append(method.update(batch, step)["loss"].item())
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        rows = 2 * (micro or PAIRS)
        told = need(LLAMA_7B, lora_rank=16, rows=rows, tokens=TOKENS)
        found[f"{rows} sequences at once"] = {
            "seconds": statistics.median(times[1:]),
            "losses": losses,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "calculated_gib": told.total / GIB,
        }
    prompts = batch.tokens[:, 0, :PROMPT]
    decoding = Decoding(max_new_tokens=128)
    everything = torch.ones_like(prompts, dtype=torch.bool)
    torch.cuda.synchronize()
    began = time.perf_counter()
    written = model.generate(prompts, everything, list(range(16 * PAIRS)), decoding)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "weights": LLAMA_7B.weights,
        "loaded_gib": loaded,
        "updates": found,
        "generation": {
            "sequences": 16 * PAIRS,
            "tokens_per_second": int(written.completion_mask.sum()) / seconds,
        },
    }
    print(json.dumps(result, indent=1))
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".json"))
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
