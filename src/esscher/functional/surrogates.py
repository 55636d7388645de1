"""Surrogate policy objectives built from probability ratios."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_ratio_terms(
    log_ratio: Float[Tensor, "*s"],
    advantage: Float[Tensor, "*#s"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "*s"]:
    """PPO's pessimistic clipped surrogate, to be minimised.

    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(log_ratio),
    log_ratio = logp - old_logp in nats. Widths may differ (clip-higher: clip_high > clip_low).

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; asymmetric: DAPO (arXiv 2503.14476).
    Gradient: to log_ratio, zero where a ratio past its bound would still improve the term.
    Raises: ValueError if clip_low is outside [0, 1] or clip_high is negative.
    """
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high}")
    ratio, advantage = log_ratio.exp(), advantage.detach()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)
