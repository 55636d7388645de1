"""Masked sums, means and whitening, with the denominator of every mean in plain sight.

A mask is boolean and True marks what counts. Masked entries are replaced before any arithmetic,
so a NaN in padding reaches neither the result nor the gradient. `dim=None` reduces over all axes.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

Dim = int | tuple[int, ...] | None
Aggregation = Literal[
    "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant_length"
]
"""How the terms of a batch's tokens become one loss."""


def masked_sum(
    values: Float[Tensor, "*s"], mask: Bool[Tensor, "*s"], dim: Dim = None
) -> Float[Tensor, "..."]:
    """Sum of the values whose mask is True.

    sum_i mask_i values_i; an all-masked row gives 0.

    Gradient: to `values` where the mask is True.
    """
    return values.masked_fill(~mask, 0.0).sum(dim)


def masked_mean(
    values: Float[Tensor, "*s"],
    mask: Bool[Tensor, "*s"],
    dim: Dim = None,
    denominator: Num[Tensor, "..."] | float | None = None,
) -> Float[Tensor, "..."]:
    """Sum of the unmasked values over an explicit denominator, by default their count.

    (sum_i mask_i values_i) / denominator. With the default an all-masked row gives 0 with zero
    gradient. Pass one global denominator to every micro-batch, and the sum of the micro-batch
    results is the full-batch result. A tensor denominator is not inspected (that would wait for
    the device): a zero in it gives inf or nan.

    Gradient: to `values` where the mask is True, and to a tensor denominator.
    Raises: ValueError if a number is passed as denominator and is not positive.
    """
    if isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    if denominator is None:
        denominator = mask.sum(dim).clamp(min=1)
    return masked_sum(values, mask, dim) / denominator


def masked_whiten(
    values: Float[Tensor, "*s"],
    mask: Bool[Tensor, "*s"],
    dim: Dim = None,
    epsilon: float = 1e-8,
    correction: int = 0,
) -> Float[Tensor, "*s"]:
    """Unmasked values shifted to mean 0 and scaled to standard deviation 1; masked entries are 0.

    (x - mean) / (std + epsilon), std^2 = sum (x - mean)^2 / (count - correction). Values that are
    all equal, a row with one unmasked value and an all-masked row give exactly 0.

    Gradient: to `values` where the mask is True, through mean and std.
    Raises: ValueError if epsilon is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    axes = tuple(range(values.dim())) if dim is None else dim
    count = mask.sum(axes, keepdim=True)
    # Shifting by an element first makes equal values exactly 0; else rounding noise is whitened.
    shift = values.detach().masked_fill(~mask, -float("inf")).amax(axes, keepdim=True)
    shifted = (values - shift).masked_fill(~mask, 0.0)
    mean = shifted.sum(axes, keepdim=True) / count.clamp(min=1)
    centred = (shifted - mean).masked_fill(~mask, 0.0)
    squares = centred.double().square()  # Of 1e20 they would be infinite, and all results 0.
    variance = squares.sum(axes, keepdim=True) / (count - correction).clamp(min=1)
    # The floor keeps the gradient of the square root finite at zero variance.
    std = variance.clamp(min=1e-30).sqrt().to(values.dtype)
    return (centred / (std + epsilon)).masked_fill(~mask, 0.0)  # Even beside NaN.


def aggregate(
    terms: Float[Tensor, "b t"],
    mask: Bool[Tensor, "b t"],
    how: Aggregation,
    denominator: Num[Tensor, ""] | int | float,
) -> Float[Tensor, ""]:
    """One loss from per-token terms, over the denominator of the whole batch.

    With n_b unmasked tokens in row b of B, and the denominators of `aggregation_denominator`:

      token_mean                sum_bt terms / sum_b n_b            DAPO, Lite PPO
      sequence_mean_token_mean  sum_b (sum_t terms / n_b) / B       GRPO
      sequence_mean_token_sum   sum_bt terms / B                    REINFORCE
      constant_length           sum_bt terms / (B max_length)       Dr. GRPO

    Pass one global denominator to every micro-batch, and the results add up to the full batch's;
    the mean of micro-batch means is another number. An all-masked row adds 0, and a tensor
    denominator of 0 gives 0.

    Source: Tricks or Traps (arXiv 2508.08221), sec. 4; Dr. GRPO (arXiv 2503.20783), sec. 3.
    Gradient: to `terms` where the mask is True, and to a tensor denominator.
    Raises: ValueError if `how` is unknown or a number as denominator is not positive.
    """
    _check_aggregation(how)
    if isinstance(denominator, Tensor):
        denominator = denominator.masked_fill(denominator == 0, 1)
    elif not denominator > 0:
        raise ValueError(f"denominator must be positive, got {denominator}")
    if how == "sequence_mean_token_mean":
        return masked_mean(terms, mask, dim=1).sum() / denominator
    return masked_sum(terms, mask) / denominator


def aggregation_denominator(
    mask: Bool[Tensor, "b t"], how: Aggregation, max_length: int | None = None
) -> Num[Tensor, ""]:
    """What `aggregate` divides by: tokens, rows, or rows times the longest length there can be.

    Adds up over the micro-batches and processes that share a step. All-masked rows count as rows,
    as in TRL; ROLL leaves them out (pass mask.any(1).sum() for that).

    Raises: ValueError if `how` is unknown, or "constant_length" without a positive max_length.
    """
    _check_aggregation(how)
    if how == "token_mean":
        return mask.sum()
    rows = mask.shape[0]
    if how == "constant_length":
        if max_length is None or max_length < 1:
            raise ValueError(f"constant_length needs a positive max_length, got {max_length}")
        rows *= max_length
    return torch.full((), rows, device=mask.device)


def _check_aggregation(how: str) -> None:
    if how not in get_args(Aggregation):
        raise ValueError(f"how must be one of {', '.join(get_args(Aggregation))}, got {how!r}")
