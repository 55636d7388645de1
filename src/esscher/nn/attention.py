"""Attention whose heads have few channels, as small U-Nets have it, on CPUs: in a third of the time of
torch's own, which multiplies matrices that are too thin for it to pay. For compiled networks.
"""

import ctypes
import functools
from importlib.resources import files
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHANNELS = (4, 8, 16)
"""Of a head, where it pays: from 32 on matrix products are faster."""
TYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _kernel() -> Any:
    """attention.cpp, compiled as the compiler of networks compiles its own, and kept with that."""
    from torch._inductor.codecache import CppCodeCache

    source = files("esscher.nn").joinpath("attention.cpp").read_text()
    return CppCodeCache.load(source, "cpu", extra_flags=("-ffp-contract=fast",)).attention


@torch.library.custom_op("esscher::thin_attention", mutates_args=(), device_types="cpu")
def thin_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v in float32 or bfloat16, sums in float32, for any strides.

    Args:
        query: "b h n d", d one of `CHANNELS`.
        key, value: "b h m d", of the same type.
    Returns: "b h n d"; in memory "b n h d", as torch's own.
    Raises: ValueError for another number of channels or another type.
    """
    if query.shape[-1] not in CHANNELS:
        raise ValueError(f"channels a head must be one of {CHANNELS}, got {query.shape[-1]}")
    if query.dtype not in TYPES:
        raise ValueError(f"the type must be one of {TYPES}, got {query.dtype}")
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
    tensors.append(_like(query))
    batch, heads, queries, channels = query.shape
    sizes = (ctypes.c_int64 * 5)(batch, heads, queries, key.shape[2], channels)
    strides = (ctypes.c_int64 * 12)(*(s for t in tensors for s in t.stride()[:3]))
    _kernel()(
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
        sizes,
        strides,
        ctypes.c_float(scale),
        torch.get_num_threads(),
        int(query.dtype == torch.bfloat16),
    )
    return tensors[-1]


@thin_attention.register_fake
def _like(
    query: Tensor, key: Tensor | None = None, value: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    batch, heads, queries, channels = query.shape
    return query.new_empty(batch, queries, heads, channels).transpose(1, 2)


def attention(
    query: Float[Tensor, "*b h n d"],
    key: Float[Tensor, "*b k m d"],
    value: Float[Tensor, "*b k m e"],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Float[Tensor, "*b h n e"]:
    """`scaled_dot_product_attention` as torch has it.

    Where it can be it is thin, and no gradient flows through it.
    """
    channels = query.shape[-1]
    plain = attn_mask is None and not dropout_p and not is_causal and not any(options.values())
    same = (
        query.dim() == 4
        and query.dtype == key.dtype == value.dtype
        and query.shape[:2] == key.shape[:2]
        and key.shape == value.shape
        and key.shape[-2] > 0
    )
    known = query.dtype in TYPES and channels in CHANNELS
    if not (plain and same and known and query.device.type == "cpu"):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options
        )
    return thin_attention(query, key, value, channels**-0.5 if scale is None else scale)
