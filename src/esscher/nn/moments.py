"""Running moments of a stream, for normalising inputs."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of everything seen, by the parallel form of Welford's recursion.

    Args:
        shape: of one element.
        clip: normalised values are clipped to +-clip.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0):
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))
        self.register_buffer("count", torch.tensor(1e-4))

    @torch.no_grad()
    def observe(self, batch: Float[Tensor, "b ..."]) -> None:
        """Take a batch into the moments."""
        size = batch.shape[0]
        mean, variance = batch.mean(0), batch.var(0, correction=0)
        total = self.count + size
        delta = mean - self.mean
        spread = self.variance * self.count + variance * size
        self.variance.copy_((spread + delta.square() * self.count * size / total) / total)
        self.mean += delta * size / total
        self.count.copy_(total)

    def forward(self, x: Float[Tensor, "... "]) -> Float[Tensor, "... "]:
        """(x - mean) / standard deviation, clipped."""
        return ((x - self.mean) / (self.variance + 1e-8).sqrt()).clamp(-self.clip, self.clip)
