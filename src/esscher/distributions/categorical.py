"""A choice among a finite number of actions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Categorical:
    """Probabilities proportional to exp(logits).

    Args:
        logits: `b k`, in nats up to a constant a row.
    """

    def __init__(self, logits: Float[Tensor, "b k"]):
        self.logits = torch.log_softmax(logits, -1)

    def mode(self) -> Int[Tensor, "b"]:
        return self.logits.argmax(-1)

    def sample(self) -> Int[Tensor, "b"]:
        with torch.no_grad():
            # The Gumbel maximum: one exponential draw an entry, no host synchronisation.
            noise = torch.empty_like(self.logits).exponential_().log_()
            return (self.logits - noise).argmax(-1)

    def log_prob(self, x: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
        return self.logits.gather(-1, x.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Float[Tensor, "b"]:
        # Finite logits, because 0 * -inf has no value and no gradient.
        finite = self.logits.clamp_min(torch.finfo(self.logits.dtype).min)
        return -(self.logits.exp() * finite).sum(-1)
