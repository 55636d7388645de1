"""Milliseconds of attention whose heads have few channels: this library's kernel and what torch has.

As small U-Nets ask for it: 16 images, 8 heads, 16 x 16 places, rows of all heads' channels in memory,
one thread. Beside the kernel and torch's own stand flex attention, matrix products in blocks of a few
megabytes of scores, and one formula that the compiler fuses into loops. The median of 20.

    python benchmarks/attention_speed.py            writes benchmarks/attention_speed.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from esscher.nn.attention import CHANNELS, attention

IMAGES, HEADS, PLACES, BLOCK = 16, 8, 256, 4
UNREALISED = {
    f"realize_{of}_threshold": 100_000 for of in ("reads", "opcount", "acc_reads")
}  # Scores are computed again and not stored.


def blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = zip(*(t.split(BLOCK) for t in (query, key, value)), strict=True)
    scale = query.shape[-1] ** -0.5
    return torch.cat([((scale * q) @ k.mT).softmax(-1) @ v for q, k, v in parts])


def loops(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of tensors "b h d n", places last, which is what the compiler can vectorise."""
    channels = query.shape[2]

    def scores() -> Tensor:
        each = (query[:, :, d, :, None] * key[:, :, d, None, :] for d in range(channels))
        return sum(each) * channels**-0.5 * 1.4426950408889634  # type: ignore[return-value]

    weight = torch.exp2(scores() - scores().amax(-1, keepdim=True))
    total = weight.sum(-1)
    means = [(weight * value[:, :, d, None, :]).sum(-1) / total for d in range(channels)]
    return torch.stack(means, 2)


def milliseconds(work: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    taken = []
    for _ in range(23):
        start = time.perf_counter()
        work(*tensors)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[3:])


@torch.no_grad()
def measured(channels: int, dtype: torch.dtype) -> dict[str, float]:
    torch._dynamo.reset()
    flat = [torch.randn(IMAGES, PLACES, HEADS * channels).to(dtype) for _ in range(3)]
    rows = [t.unflatten(-1, (HEADS, channels)).transpose(1, 2) for t in flat]
    ways: dict[str, Any] = {"torch": scaled_dot_product_attention, "blocks": blocks}
    if channels in CHANNELS:
        ways["kernel"] = attention
    if channels >= 8:  # Fewer it refuses in bfloat16.
        ways["flex attention"] = torch.compile(flex_attention)
    found = {name: milliseconds(work, rows) for name, work in ways.items()}
    if channels == 8:
        fused: Any = torch.compile(loops, options=UNREALISED)
        apart = [t.mT.contiguous() for t in rows]
        torch.testing.assert_close(
            fused(*apart).mT.to(dtype), attention(*rows), rtol=0.02, atol=0.02
        )
        found["loops of the compiler"] = milliseconds(fused, apart)
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record: dict[str, Any] = {"milliseconds": {}}
    for channels in (4, 8, 16, 32):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{channels} channels, {str(dtype).removeprefix('torch.')}"
            record["milliseconds"][name] = found = measured(channels, dtype)
            print(name, {way: round(value, 2) for way, value in found.items()}, flush=True)
    record |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    path = Path(__file__).parent / "attention_speed.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
