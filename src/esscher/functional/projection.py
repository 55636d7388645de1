"""Gradients as one long vector each, kept as lists of tensors: dot products and projections.

Nothing is flattened or copied together: a dot product is the sum of the tensors' own.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Dot product <a, b> over all entries of all tensors.

    Args:
        left, right: equally many tensors of any shapes, pair by pair equal ones.

    Gradient: to both.
    Raises: ValueError if the lists are empty or differ in length or in a shape.
    """
    shapes = [tensor.shape for tensor in left]
    if not shapes or shapes != [tensor.shape for tensor in right]:
        raise ValueError(
            f"need two lists of tensors of equal shapes, got {list(map(tuple, shapes))} and "
            f"{[tuple(tensor.shape) for tensor in right]}"
        )
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def cosine(
    left: Sequence[Tensor], right: Sequence[Tensor], epsilon: float = 1e-10
) -> Float[Tensor, ""]:
    """<a, b> / (|a| |b|), where a squared length below `epsilon` counts as epsilon.

    Gradient: to both.
    Raises: ValueError as `inner` does.
    """
    # One root each: the product of both squares may leave the range of floats.
    lengths = [inner(side, side).clamp(min=epsilon).rsqrt() for side in (left, right)]
    return inner(left, right) * lengths[0] * lengths[1]


def orthogonal_part(
    vector: Sequence[Tensor], along: Sequence[Tensor], epsilon: float = 1e-10
) -> list[Tensor]:
    """What is left of a vector when its component along another one is taken out.

    b - (<a, b> / max(<a, a>, epsilon)) a with a = `along` and b = `vector`: one coefficient for
    all tensors. Where a is zero b is returned as it is. The result is orthogonal to a if
    <a, a> >= epsilon.

    Source: Mao et al. 2024, ODICE (arXiv 2402.00348), the orthogonal-gradient update.
    Gradient: to both arguments.
    Raises: ValueError as `inner` does.
    """
    coefficient = inner(along, vector) / inner(along, along).clamp(min=epsilon)
    return [b - coefficient * a for a, b in zip(along, vector, strict=True)]
