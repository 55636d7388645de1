"""Random numbers as functions of counters, for many streams at once.

A policy that draws its actions needs noise that belongs to one episode, whatever other episodes are
played beside it. Every number here is a hash of (seed, time, draw, component), computed for all rows
together.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def counted_normal(
    seed: Int[Tensor, "n"], time: Int[Tensor, "n"], draw: int, shape: tuple[int, ...]
) -> Float[Tensor, "n *d"]:
    """Standard normal numbers; a row's depend on its seed, its time and `draw` alone.

    Args:
        seed: of each row's stream.
        time: counter of each row.
        draw: which of several draws at that time, >= 0; each has numbers of its own.
        shape: of one row.

    Source: Steele et al. 2014, the mixing function of SplitMix64; the inverse of the normal
    distribution.
    """
    size = math.prod(shape)
    stream = _mixed(_mixed(seed + GOLDEN) + time * GOLDEN)
    place = torch.arange(1, size + 1, device=seed.device) + draw * size
    bits = _mixed(stream.unsqueeze(-1) + place * GOLDEN)
    uniform = ((_shifted(bits, 11)).double() + 0.5) * 2.0**-53
    return torch.special.ndtri(uniform).float().view(len(seed), *shape)


def _mixed(x: Int[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*s"], places: int) -> Int[Tensor, "*s"]:
    """To the right, with zeros coming in (torch's own shift repeats the sign)."""
    return (x >> places) & ((1 << (64 - places)) - 1)
