"""Surrogate policy objectives built from probability ratios."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from esscher.functional.reductions import masked_mean


def clipped_ratio_terms(
    log_ratio: Float[Tensor, "*s"],
    advantage: Float[Tensor, "*#s"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    dual_clip: float | None = None,
) -> Float[Tensor, "*s"]:
    """PPO's pessimistic clipped surrogate, to be minimised.

    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(log_ratio),
    log_ratio = logp - old_logp in nats. Widths may differ (clip-higher: clip_high > clip_low).
    With dual_clip = c, where A < 0: -max(min(...), c A), so that one term costs at most c |A|.
    Ratios are held at the square root of the largest float (float32: 2e19), so none is infinite.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric: DAPO (arXiv 2503.14476);
        dual: Ye et al. 2020 (arXiv 1912.09729); c = 3 in verl, 1 + 2 * 0.2 in ROLL.
    Gradient: to log_ratio, zero where a ratio past its bound would still improve the term, where
        A < 0 and ratio > dual_clip, and past that square root.
    Raises: ValueError if clip_low is outside [0, 1], clip_high is negative, or dual_clip is not
        above 1 (it would stop the gradient of every A < 0 on policy).
    """
    _check_bounds(clip_low, clip_high, dual_clip)
    # An infinite ratio would be NaN times A = 0, and in the gradient of any clipped term.
    log_ratio = log_ratio.clamp(max=0.5 * math.log(torch.finfo(log_ratio.dtype).max))
    ratio, advantage = log_ratio.exp(), advantage.detach()
    if dual_clip is not None:
        ratio = torch.where(advantage < 0, ratio.clamp(max=dual_clip), ratio)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def sequence_log_ratio(
    log_ratio: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """Log-ratio of a whole response per token, the same for each of its tokens.

    (1 / n_b) sum_t log_ratio over the n_b unmasked tokens; 0 in all-masked rows. In place of the
    log_ratio of `clipped_ratio_terms` it makes the ratio, and the clipping, the sequence's own.

    Source: Zheng et al. 2025, GSPO (arXiv 2507.18071), sec. 4; clip widths there are 3e-4, 4e-4.
    Gradient: to log_ratio where the mask is True.
    """
    return masked_mean(log_ratio, mask, dim=1).unsqueeze(1).expand_as(log_ratio)


@torch.no_grad()
def clip_fraction(
    log_ratio: Float[Tensor, "*s"],
    advantage: Float[Tensor, "*#s"],
    mask: Bool[Tensor, "*s"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    dual_clip: float | None = None,
    denominator: Num[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """Share of the unmasked terms of `clipped_ratio_terms` that a bound deprives of gradient.

    (A > 0 and ratio > 1 + clip_high) or (A < 0 and (ratio < 1 - clip_low or ratio > dual_clip)).
    Ratios outside the bounds on the other side are not counted, nor is A = 0. `denominator` is
    that of `masked_mean`, by default the count of the mask.

    Gradient: none.
    Raises: ValueError as `clipped_ratio_terms` does.
    """
    _check_bounds(clip_low, clip_high, dual_clip)
    ratio, ceiling = log_ratio.exp(), float("inf") if dual_clip is None else dual_clip
    too_low = (advantage < 0) & ((ratio < 1 - clip_low) | (ratio > ceiling))
    too_high = (advantage > 0) & (ratio > 1 + clip_high)
    return masked_mean((too_low | too_high).to(log_ratio.dtype), mask, denominator=denominator)


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
