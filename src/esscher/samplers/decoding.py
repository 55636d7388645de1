"""Drawing the next token: the distribution that is really sampled from, and a draw from it.

Draws invert the cumulative distribution at one uniform number a token. So a sequence depends on its
own seed and on nothing else: not on its neighbours in the batch, nor on when they end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.errors import require


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are drawn."""

    max_new_tokens: int = 128
    """Longest completion, tokens; one that reaches it without an end token is unfinished."""
    temperature: float = 1.0
    """Logits are divided by this, >= 0; 0 takes the likeliest token. 1 samples the model itself."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that hold this much probability, in (0, 1]."""

    def __post_init__(self) -> None:
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1")
        require("temperature", self.temperature, self.temperature >= 0, ">= 0")
        require("top_k", self.top_k, self.top_k >= 0, ">= 0")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")


def decoding_log_probs(logits: Float[Tensor, "b v"], decoding: Decoding) -> Float[Tensor, "b v"]:
    """Log-probabilities of the distribution that is sampled from, in nats; -inf where it is cut.

    Temperature first, then top-k, then top-p on what is left, then normalised, as in transformers.
    The likeliest token is never cut; ties at the edge of top-k are kept.
    """
    logits = logits.float()
    if decoding.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        smallest = logits.topk(decoding.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if decoding.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        cut = torch.empty_like(before, dtype=torch.bool)
        cut.scatter_(-1, order, before >= decoding.top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return logits.log_softmax(-1)


def draw(logp: Float[Tensor, "b v"], uniform: Float[Tensor, "b"]) -> Int[Tensor, "b"]:
    """The token at which the cumulative probability first exceeds `uniform`, in [0, 1).

    Never one of probability 0.
    """
    cumulative = logp.exp().cumsum(-1)
    total = cumulative[:, -1]
    level = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level.unsqueeze(-1), right=True).squeeze(-1)


def uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "b t"]:
    """Uniform numbers in [0, 1), a row from each seed alone."""
    generator = torch.Generator()
    return torch.stack([torch.rand(length, generator=generator.manual_seed(s)) for s in seeds])
