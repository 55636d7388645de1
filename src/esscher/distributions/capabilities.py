"""What a method may ask of a distribution; each method names the capabilities it needs."""

from typing import Protocol

from jaxtyping import Float, Shaped
from torch import Tensor


class Samples(Protocol):
    """Can be drawn from."""

    def sample(self) -> Shaped[Tensor, "b *d"]:
        """One draw a row; no gradient promised."""
        ...


class Density(Protocol):
    """Can score a given event."""

    def log_prob(self, x: Shaped[Tensor, "b *d"]) -> Float[Tensor, "b"]:
        """Nats, summed over the event."""
        ...


class Reparam(Protocol):
    """Can be differentiated through its samples."""

    def rsample_with_log_prob(self) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b"]]:
        """A draw and its log-probability in nats, both with gradient."""
        ...


class HasMode(Protocol):
    """Has a deterministic representative."""

    def mode(self) -> Shaped[Tensor, "b *d"]:
        """The event to take when no randomness is wanted."""
        ...


class HasEntropy(Protocol):
    """Knows its entropy in closed form."""

    def entropy(self) -> Float[Tensor, "b"]:
        """Nats."""
        ...
