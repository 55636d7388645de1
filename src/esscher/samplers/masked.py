"""Decoding of masked tokens in a few rounds: the surest first, the doubtful again later.

A round asks the model once for all places, draws a token for each that is masked, and masks the least
sure of them again, fewer in each round. Places that are kept condition the next round, so that what is
drawn has the dependencies that one round for all misses. With re-masking, a token that looks doubtful
in the light of later ones returns to the mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from esscher.errors import require
from esscher.functional.masking import MaskSchedule, mask_budgets, places_of_least

Predict = Callable[[Int[Tensor, "b l"]], Float[Tensor, "b l k"]]
"""Tokens with the mask's number where they are masked -> logits of the k tokens at every place."""
Critic = Callable[[Int[Tensor, "b l"]], Float[Tensor, "b l"]]
"""Whole sequences -> how sure each token is, in (0, 1]."""
Edit = Callable[[int, Int[Tensor, "b l"]], Int[Tensor, "b l"]]
"""Round, counted from 0, and tokens before it -> the tokens that it begins with."""


@dataclass(frozen=True, kw_only=True)
class MaskedDecoding:
    """How masked tokens are filled in; defaults of the Discrete Diffusion VLA's code."""

    rounds: int = 12
    """Evaluations of the model, >= 1; 1: all places at once, as if they were independent."""
    schedule: MaskSchedule = "cosine"
    """Of the share that stays masked."""
    temperature: float = 1.0
    """Logits are divided by this when a token is drawn, >= 0; 0: the likeliest."""
    annealed: bool = False
    """Let that temperature fall to 0 in a straight line, so that the last round takes the likeliest
    (the paper)."""
    score: Literal["drawn", "likeliest", "gap"] = "drawn"
    """Of a place: the probability of the token that was drawn, of the likeliest one, or how far that
    is ahead of the second."""
    choice_temperature: float = 1.0
    """Of the Gumbel noise on the logarithm of the score, >= 0, falling to 0 in a straight line."""
    remask: Literal["none", "scale", "threshold", "drop"] = "none"
    """What may return to the mask. scale: tokens compete with scores times what is left of the rounds
    (the code); threshold: those whose score is below eta (the paper); drop: those that have lost more
    than eta since they were drawn."""
    eta: float = 0.3
    """Of threshold, which rises to it from 0 in a straight line, and of drop, in [0, 1] (a choice)."""

    def __post_init__(self) -> None:
        require("rounds", self.rounds, self.rounds >= 1, ">= 1")
        for name in ("temperature", "choice_temperature"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("eta", self.eta, 0 <= self.eta <= 1, "in [0, 1]")


def decode_masked(
    predict: Predict,
    start: Int[Tensor, "b l"],
    mask_token: int,
    decoding: MaskedDecoding,
    *,
    critic: Critic | None = None,
    edit: Edit | None = None,
) -> Int[Tensor, "b l"]:
    """Fill in what is masked; torch's own generator decides.

    Args:
        predict: the model.
        start: the mask's number where a token is to be found. What else is there stays.
        mask_token: that number, >= k.
        decoding: how.
        critic: says how sure tokens are, in place of the model.
        edit: changes tokens between rounds, to see what is made of that.

    Source: Discrete Diffusion VLA (arXiv 2508.20072), decoding; MaskGIT, sec. 3.2.
    """
    tokens, rounds, wanted = start, decoding.rounds, start == mask_token
    at_drawing = torch.zeros(start.shape, device=start.device)
    left = mask_budgets(decoding.schedule, wanted.sum(-1), rounds)
    for turn in range(rounds):
        tokens = tokens if edit is None else edit(turn, tokens)
        masked, remaining = tokens == mask_token, 1 - (turn + 1) / rounds
        probability = predict(tokens).float().softmax(-1)
        temperature = decoding.temperature * (remaining if decoding.annealed else 1)
        drawn = torch.where(masked, _drawn(probability, temperature), tokens)
        if turn == rounds - 1:
            tokens = drawn
            break
        sure = _score(probability, drawn, decoding.score) if critic is None else critic(drawn)
        at_drawing = torch.where(masked, sure, at_drawing)
        compete = wanted if decoding.remask == "scale" else masked
        rank = torch.where(masked, sure, sure * remaining).log()
        gumbel = -torch.empty_like(rank).exponential_().log()
        rank = rank + decoding.choice_temperature * remaining * gumbel
        out = places_of_least(rank.masked_fill(~compete, torch.inf), left[:, turn])
        out |= _doubtful(sure, at_drawing, turn, decoding)
        tokens = drawn.masked_fill(out & wanted, mask_token)
    return tokens


def _drawn(probability: Float[Tensor, "b l k"], temperature: float) -> Int[Tensor, "b l"]:
    """A token for each place, by the Gumbel-max rule."""
    if temperature == 0:
        return probability.argmax(-1)
    gumbel = -torch.empty_like(probability).exponential_().log()
    return (probability.log() / temperature + gumbel).argmax(-1)


def _score(
    probability: Float[Tensor, "b l k"], tokens: Int[Tensor, "b l"], kind: str
) -> Float[Tensor, "b l"]:
    if kind == "drawn":
        return probability.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    first, second = probability.topk(2, -1).values.unbind(-1)
    return first if kind == "likeliest" else first - second


def _doubtful(
    sure: Float[Tensor, "b l"],
    at_drawing: Float[Tensor, "b l"],
    turn: int,
    decoding: MaskedDecoding,
) -> Bool[Tensor, "b l"]:
    if decoding.remask == "threshold":
        return sure < decoding.eta * (turn + 1) / decoding.rounds
    if decoding.remask == "drop":
        return at_drawing - sure > decoding.eta
    return torch.zeros_like(sure, dtype=torch.bool)
