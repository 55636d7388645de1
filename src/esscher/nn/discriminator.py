"""Heads that tell real samples from made ones: one logit a sample, 0 before any training."""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from esscher.nn.mlp import MLP

LABEL_WIDTH = 16


class FeatureHead(nn.Module):
    """A logit of features that another network has computed: images "b c h w" or tokens "b n c".

    Images: a 3 x 3 convolution between group norms, SiLU, and a linear layer over all places. Tokens:
    layer norm, a linear layer for each of them, SiLU, and a linear layer over their mean.

    Args:
        shape: of one sample's features, (c, h, w) or (n, c).
        width: between the two layers.
    """

    def __init__(self, shape: tuple[int, ...], width: int):
        super().__init__()
        if len(shape) == 3:
            channels, height, across = shape
            self.layers = nn.Sequential(
                nn.GroupNorm(_groups(channels), channels),
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(_groups(width), width),
                nn.SiLU(),
                nn.Flatten(),
            )
            last = nn.Linear(width * height * across, 1)
        else:
            self.layers = nn.Sequential(
                nn.LayerNorm(shape[-1]), nn.Linear(shape[-1], width), nn.SiLU(), MeanOfTokens()
            )
            last = nn.Linear(width, 1)
        self.last = _zero(last)

    def forward(self, features: Float[Tensor, "b *f"]) -> Float[Tensor, "b 1"]:
        # torch 2.13's group norm crashes in the backward pass of channels-last features on a CPU
        # where these themselves need no gradient.
        return self.last(self.layers(features.contiguous()))


class MeanOfTokens(nn.Module):
    """The mean over the tokens of each sample."""

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return tokens.mean(1)


class NoisySampleHead(nn.Module):
    """A logit of a noisy sample itself, for samples that are vectors: x / sqrt(1 + sigma^2), log sigma
    and the condition go through a perceptron of SiLU layers.

    Args:
        dim: of a sample.
        hidden: widths of the hidden layers.
        like: conditions of the kind that will be told; None: there are none. Whole numbers are
            classes, and become sines and cosines, so that it need not be known how many there are.
    """

    def __init__(self, dim: int, hidden: tuple[int, ...], like: Shaped[Tensor, "b *c"] | None):
        super().__init__()
        told = 0 if like is None else _told(like).shape[-1]
        self.network = MLP([dim + 1 + told, *hidden, 1], "silu")
        with torch.no_grad():
            self.network.weights[-1].zero_()
            self.network.biases[-1].zero_()

    def forward(
        self,
        x: Float[Tensor, "b d"],
        sigma: Float[Tensor, "b"],
        condition: Shaped[Tensor, "b *c"] | None = None,
    ) -> Float[Tensor, "b 1"]:
        scaled = x * (1 + sigma.square()).rsqrt().unsqueeze(-1)
        parts = [scaled, sigma.log().unsqueeze(-1)]
        if condition is not None:
            parts.append(_told(condition).to(x))
        return self.network(torch.cat(parts, -1))


def _told(condition: Tensor) -> Float[Tensor, "b t"]:
    if condition.is_floating_point():
        return condition.flatten(1)
    octaves = torch.arange(LABEL_WIDTH // 2, device=condition.device)
    angle = condition.view(len(condition), -1, 1) * math.pi * 2.0**-octaves
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(1)


def _groups(channels: int) -> int:
    """Of a norm: at most 32, with four channels or more each where there are as many."""
    return math.gcd(channels, min(32, max(1, channels // 4)))


def _zero(layer: nn.Linear) -> nn.Linear:
    """So that the ratio of densities begins at 1."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
