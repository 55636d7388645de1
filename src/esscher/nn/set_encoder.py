"""Networks from a set of samples to one vector.

An encoder that stands for the distribution behind a set may depend on it through the empirical measure
alone: neither the order of the samples changes the vector, nor repeating each of them k times. Means,
medians and softmax attention over the set have this property, sums do not; maxima have it, but are not
smooth enough for the limit of large sets. A mask says which samples of a padded set are there; means
divide by their number.

| kind | before pooling | pools |
|---|---|---|
| mean | x | once; a fixed random projection of the sample mean |
| kernel_mean | cos and sin of x W / g: random Fourier features of a Gaussian kernel | once |
| mean_pooled | h <- MLP([h; mean h]), from MLP(x) | by the mean in every block and at the end |
| median_pooled | h <- MLP([h; median h]) | by the median in every block, by the mean at the end |
| residual | h <- LN(MLP([h; mean h]) + h + W x), from LN(MLP(x) + W x) | by the mean, likewise |
| sum_pooled | as residual | by the sum everywhere: a control that is not invariant |
| attention | h <- LN(h + attention(h)), from SELU(W x) | by attention, and the mean at the end |

Source: Generative Distribution Embeddings (arXiv 2505.18150), sec. 3 and appendix A.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from esscher.functional.reductions import masked_mean, masked_sum
from esscher.nn.mlp import MLP

SetEncoderKind = Literal[
    "residual",
    "mean_pooled",
    "median_pooled",
    "attention",
    "kernel_mean",
    "mean",
    "sum_pooled",
]
Mask = Bool[Tensor, "b m"] | None


class SetEncoder(nn.Module):
    """Sets "b m d" to vectors "b l"; see the module.

    Args:
        kind: which.
        dim: of a sample.
        latent: of the vector; even for kernel_mean.
        width: of the layers before pooling.
        blocks: after the first layers.
        layers: hidden layers of each perceptron.
        heads: of attention; they divide the width.
        bandwidth: g of kernel_mean at the beginning, in the samples' units.

    Raises: ValueError if latent is odd for kernel_mean, or heads do not divide the width.
    """

    def __init__(
        self,
        kind: SetEncoderKind,
        dim: int,
        latent: int,
        *,
        width: int = 128,
        blocks: int = 2,
        layers: int = 2,
        heads: int = 4,
        bandwidth: float = 0.1,
    ):
        super().__init__()
        self.kind = kind
        self.body: nn.Module
        if kind == "mean":
            self.body = Projection(dim, latent)
        elif kind == "kernel_mean":
            self.body = FourierFeatures(dim, latent, bandwidth)
        elif kind == "attention":
            self.body = AttentionBody(dim, width, blocks, heads)
        elif kind in ("mean_pooled", "median_pooled"):
            self.body = PooledBody(dim, width, blocks, layers, median=kind == "median_pooled")
        else:
            self.body = ResidualBody(dim, width, blocks, layers, summed=kind == "sum_pooled")
        self.head = nn.Identity() if self.pools_once else nn.Linear(width, latent)

    @property
    def pools_once(self) -> bool:
        """Whether the vector of a large set is the mean of those of its parts."""
        return self.kind in ("mean", "kernel_mean")

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask = None) -> Float[Tensor, "b l"]:
        if mask is not None:
            # What stands where nothing is must not matter, not even if it is not finite.
            x = torch.where(mask.unsqueeze(-1), x, 0)
        pool = sum_over if self.kind == "sum_pooled" else mean_over
        return self.head(pool(self.body(x, mask), mask))

    def in_chunks(self, x: Float[Tensor, "m d"], size: int) -> Float[Tensor, "l"]:
        """The vector of one set of any size, `size` samples at a time.

        Raises: ValueError if this encoder pools more than once, so that the mean of the vectors of the
            parts is another vector.
        """
        if not self.pools_once:
            raise ValueError(
                f"an encoder of kind {self.kind} pools in every block, so that the mean over chunks is "
                "another vector: embed the whole set at once"
            )
        parts = [self(part.unsqueeze(0))[0] * len(part) for part in x.split(size)]
        return torch.stack(parts).sum(0) / len(x)


class Projection(nn.Module):
    """A fixed random linear map that keeps lengths on average."""

    weight: Tensor

    def __init__(self, dim: int, latent: int):
        super().__init__()
        self.register_buffer("weight", torch.randn(dim, latent) / math.sqrt(latent))

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask) -> Float[Tensor, "b m l"]:
        return x @ self.weight


class FourierFeatures(nn.Module):
    """[cos(x W / g), sin(x W / g)], W fixed and standard normal, g trained as it is: by its logarithm
    it would hardly leave 0.1, where samples of unit scale all seem equally far apart.

    Times sqrt(2 / l), inner products of two samples' features estimate exp(-|x - y|^2 / (2 g^2)); it is
    left out, as the authors do.

    Source: Rahimi and Recht 2007.
    """

    weight: Tensor

    def __init__(self, dim: int, latent: int, bandwidth: float):
        super().__init__()
        if latent % 2:
            raise ValueError(f"kernel_mean needs an even latent size, got {latent}")
        self.register_buffer("weight", torch.randn(dim, latent // 2))
        self.bandwidth = nn.Parameter(torch.tensor(bandwidth))

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask) -> Float[Tensor, "b m l"]:
        angle = x @ self.weight / self.bandwidth.clamp(min=1e-3)
        return torch.cat([angle.cos(), angle.sin()], -1)


class PooledBody(nn.Module):
    """h <- MLP([h; pooled h]) after MLP(x)."""

    def __init__(self, dim: int, width: int, blocks: int, layers: int, *, median: bool):
        super().__init__()
        self.pool = median_over if median else mean_over
        self.first = _perceptron(dim, width, layers)
        self.blocks = nn.ModuleList(_perceptron(2 * width, width, layers) for _ in range(blocks))

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask) -> Float[Tensor, "b m h"]:
        h = self.first(x)
        for block in self.blocks:
            h = block(_beside(h, self.pool(h, mask)))
        return h


class ResidualBody(nn.Module):
    """h <- LN(MLP([h; pooled h]) + h + W x) after LN(MLP(x) + W x)."""

    def __init__(self, dim: int, width: int, blocks: int, layers: int, *, summed: bool):
        super().__init__()
        self.pool = sum_over if summed else mean_over
        self.first = _perceptron(dim, width, layers)
        self.blocks = nn.ModuleList(_perceptron(2 * width, width, layers) for _ in range(blocks))
        self.skips = nn.ModuleList(
            nn.Linear(dim, width, bias=False) for _ in range(blocks + 1)
        )  # The norms' own biases follow.
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks + 1))

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask) -> Float[Tensor, "b m h"]:
        h = self.norms[0](self.first(x) + self.skips[0](x))
        for block, skip, norm in zip(self.blocks, self.skips[1:], self.norms[1:], strict=True):
            h = norm(block(_beside(h, self.pool(h, mask))) + h + skip(x))
        return h


class AttentionBody(nn.Module):
    """h <- LN(h + attention(h)) after SELU(W x)."""

    def __init__(self, dim: int, width: int, blocks: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.first = nn.Linear(dim, width)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))

    def forward(self, x: Float[Tensor, "b m d"], mask: Mask) -> Float[Tensor, "b m h"]:
        h = nn.functional.selu(self.first(x))
        out = None if mask is None else ~mask
        for attention, norm in zip(self.attention, self.norms, strict=True):
            h = norm(h + attention(h, h, h, key_padding_mask=out, need_weights=False)[0])
        return h


def mean_over(h: Float[Tensor, "b m h"], mask: Mask) -> Float[Tensor, "b h"]:
    """Over the samples that are there."""
    return h.mean(1) if mask is None else masked_mean(h, _of_each(mask, h), dim=1)


def sum_over(h: Float[Tensor, "b m h"], mask: Mask) -> Float[Tensor, "b h"]:
    """Over the samples that are there."""
    return h.sum(1) if mask is None else masked_sum(h, _of_each(mask, h), dim=1)


def median_over(h: Float[Tensor, "b m h"], mask: Mask) -> Float[Tensor, "b h"]:
    """The lower median of each component over the samples that are there: like every quantile of the
    empirical measure it stays where it is when each sample is repeated.
    """
    if mask is None:
        return h.median(1).values
    return h.masked_fill(~mask.unsqueeze(-1), torch.nan).nanmedian(1).values


def _of_each(mask: Bool[Tensor, "b m"], h: Float[Tensor, "b m h"]) -> Bool[Tensor, "b m h"]:
    return mask.unsqueeze(-1).expand_as(h)


def _beside(h: Float[Tensor, "b m h"], pooled: Float[Tensor, "b h"]) -> Float[Tensor, "b m g"]:
    return torch.cat([h, pooled.unsqueeze(1).expand_as(h)], -1)


def _perceptron(dim: int, width: int, layers: int) -> MLP:
    return MLP([dim, *[width] * layers, width], "selu")
