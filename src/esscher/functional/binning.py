"""Continuous values as tokens: equal bins between two quantiles of the data, each dimension its own."""

from jaxtyping import Float, Int
from torch import Tensor


def bin_of(
    values: Float[Tensor, "*b d"],
    low: Float[Tensor, "d"],
    high: Float[Tensor, "d"],
    bins: int,
) -> Int[Tensor, "*b d"]:
    """Which of `bins` equal parts of [low, high] each value lies in, 0 to bins - 1; what lies outside
    goes to the first or the last.

    Source: Discrete Diffusion VLA (arXiv 2508.20072), tokenisation, with quantiles of 1 and 99 %.
    Raises: ValueError unless bins >= 2 and low < high in every dimension, or for a NaN.
    """
    _check(low, high, bins)
    place = ((values - low) / (high - low) * bins).floor()
    if bool(place.isnan().any()):
        raise ValueError("a value that is not a number lies in no bin")
    return place.clamp(0, bins - 1).long()  # In this order: no whole number is as large as 1e30.


def centre_of(
    tokens: Int[Tensor, "*b d"], low: Float[Tensor, "d"], high: Float[Tensor, "d"], bins: int
) -> Float[Tensor, "*b d"]:
    """The middle of each bin: at most half a bin, (high - low) / (2 bins), from what went in.

    Raises: ValueError unless bins >= 2 and low < high in every dimension.
    """
    _check(low, high, bins)
    return low + (tokens + 0.5) / bins * (high - low)


def _check(low: Tensor, high: Tensor, bins: int) -> None:
    if bins < 2:
        raise ValueError(f"bins must be >= 2, got {bins}")
    if not bool((low < high).all()):
        place = int((~(low < high)).nonzero()[0])
        raise ValueError(
            f"dimension {place} has no range: low {float(low[place]):g}, high {float(high[place]):g}"
        )
