"""Many small perceptrons at once, each with weights of its own, written as rows of numbers."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.errors import UserError
from esscher.nn.mlp import ACTIVATIONS, MLP, Activation

InitialWeights = Literal["lecun", "uniform"]
"""lecun: uniform with variance 1 / inputs, and biases zero; uniform: all within plus or minus
1 / sqrt(inputs), torch's own convention."""


class PopulationMLP:
    """The shape that all networks of a population share; their genotypes are `p g`.

    A genotype holds, layer after layer, the weight (outputs by inputs, as torch's linear layers) and
    then the bias: one observation a network is then a product with rows that lie in memory as they
    are read, three times as fast as the other way round.

    Args:
        sizes: width of the input, of each hidden layer, and of the output.
        activation: after every layer but the last.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation = "relu"):
        if len(sizes) < 2 or min(sizes) < 1:
            raise UserError(
                f"policy_hidden: sizes must be two or more positive widths, got {list(sizes)}"
            )
        self.layers = list(pairwise(sizes))
        self.size = sum(i * j + j for i, j in self.layers)
        self._activation = ACTIVATIONS[activation]

    def random(self, count: int, how: InitialWeights = "lecun") -> Float[Tensor, "p g"]:
        """Genotypes drawn at random; see `InitialWeights`."""
        genotype = torch.zeros(count, self.size)
        for weight, bias in self.split(genotype):
            _draw(weight, bias, weight.shape[-1], how)
        return genotype

    def split(
        self, genotype: Float[Tensor, "p g"]
    ) -> list[tuple[Float[Tensor, "p j i"], Float[Tensor, "p 1 j"]]]:
        """Views: weight and bias of each layer."""
        # One split, whose gradient is one concatenation; slices would each fill a whole genotype.
        pieces = iter(genotype.split([n for i, j in self.layers for n in (i * j, j)], 1))
        return [
            (weight.unflatten(1, (j, i)), bias.unsqueeze(1))
            for (i, j), weight, bias in zip(self.layers, pieces, pieces, strict=True)
        ]

    def join(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "p g"]:
        """The inverse of `split`."""
        return torch.cat([x.flatten(1) for part in parts for x in part], 1)

    def genotype_of(self, network: MLP) -> Float[Tensor, "1 g"]:
        """Of one network of this shape."""
        parts = zip(network.weights, network.biases, strict=True)
        return self.join([(w.detach().T[None], b.detach()[None, None]) for w, b in parts])

    @torch.no_grad()
    def load_into(self, network: MLP, genotype: Float[Tensor, "1 g"]) -> None:
        """Give one network of this shape the weights of a genotype."""
        parts = zip(network.weights, network.biases, self.split(genotype), strict=True)
        for weight, bias, (new_weight, new_bias) in parts:
            weight.copy_(new_weight[0].T)
            bias.copy_(new_bias[0, 0])

    def __call__(
        self, genotype: Float[Tensor, "p g"], x: Float[Tensor, "p b i"]
    ) -> Float[Tensor, "p b j"]:
        """Each network on inputs of its own: one batched matrix product a layer."""
        last = len(self.layers) - 1
        for index, (weight, bias) in enumerate(self.split(genotype)):
            if x.shape[1] == 1:
                x = torch.baddbmm(bias.mT, weight, x.mT).mT
            else:
                x = torch.baddbmm(bias, x, weight.mT)
            if index < last:
                x = self._activation(x)
        return x


@torch.no_grad()
def draw_weights_(network: MLP, how: InitialWeights) -> MLP:
    """Draw all weights of one network anew."""
    for weight, bias in zip(network.weights, network.biases, strict=True):
        _draw(weight, bias, weight.shape[-2], how)
    return network


def _draw(weight: Tensor, bias: Tensor, inputs: int, how: InitialWeights) -> None:
    bound = 1 / math.sqrt(inputs)
    if how == "lecun":
        weight.uniform_(-math.sqrt(3) * bound, math.sqrt(3) * bound)
        bias.zero_()
    else:
        weight.uniform_(-bound, bound)
        bias.uniform_(-bound, bound)
