"""Masked (absorbing-state) discrete diffusion: how much is masked, where, and what it costs to fill in.

At time u in [0, 1] a share of a sequence's tokens is masked, all of it at 0 and nothing at 1. Training
draws u and masks so many places at random; decoding walks from 0 to 1 in rounds.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MaskSchedule = Literal["cosine", "linear", "square", "cubic"]


def mask_share(schedule: MaskSchedule, time: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Share of the tokens that is masked at a time in [0, 1]; it falls from 1 to 0.

    cos(pi u / 2), 1 - u, 1 - u^2, 1 - u^3.

    Source: Chang et al. 2022 (MaskGIT, arXiv 2202.04200), sec. 3.3.
    """
    if schedule == "cosine":
        return (time * (math.pi / 2)).cos().clamp(min=0)
    return 1 - time ** {"linear": 1, "square": 2, "cubic": 3}[schedule]


def mask_counts(
    schedule: MaskSchedule, time: Float[Tensor, "b"], length: int | Int[Tensor, "b"]
) -> Int[Tensor, "b"]:
    """How many of `length` tokens to mask for training: the nearest whole number, at least 1."""
    return (mask_share(schedule, time) * length).round().long().clamp(min=1).clamp(max=length)


def mask_budgets(
    schedule: MaskSchedule, lengths: Int[Tensor, "*b"], rounds: int
) -> Int[Tensor, "*b t"]:
    """How many of so many tokens are still masked after each round of decoding, floor(length x share);
    0 after the last.

    Source: MaskGIT, sec. 3.2; Discrete Diffusion VLA (arXiv 2508.20072), its decoder.
    Raises: ValueError unless rounds >= 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    time = torch.arange(1, rounds + 1, dtype=torch.float64, device=lengths.device) / rounds
    # Products that are whole must not be lost to rounding; cos(pi / 2) is a little above 0.
    return (mask_share(schedule, time) * lengths.unsqueeze(-1) + 1e-9).floor().long()


def places_of_least(score: Float[Tensor, "b l"], counts: Int[Tensor, "b"]) -> Bool[Tensor, "b l"]:
    """Where the `counts` least scores of a row stand; of uniform noise, places without replacement."""
    rank = score.argsort(-1).argsort(-1)
    return rank < counts.unsqueeze(-1)


def masked_cross_entropy(
    logits: Float[Tensor, "b l k"],
    tokens: Int[Tensor, "b l"],
    mask: Bool[Tensor, "b l"],
    count: Float[Tensor, ""] | int | None = None,
) -> Float[Tensor, ""]:
    """-sum over masked places of log p(token) / count, nats.

    Args:
        count: of masked places of the whole batch, where this is a part of it; None: of this one.
            Sequences of which more is masked so weigh more.

    Source: Discrete Diffusion VLA, the training loss; there is no weight by the time.
    Gradient: to logits of masked places.
    """
    terms = torch.nn.functional.cross_entropy(logits[mask], tokens[mask], reduction="sum")
    return terms / (mask.sum() if count is None else count)
