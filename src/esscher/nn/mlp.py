"""Multi-layer perceptrons, one or many at once."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import UserError

Activation = Literal["relu", "gelu", "tanh", "elu", "silu", "selu"]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
    "selu": nn.functional.selu,
}


class MLP(nn.Module):
    """A perceptron, or an ensemble of them as one batched matrix product a layer.

    Weights are drawn uniformly from +-1/sqrt(fan_in), biases too (torch's own convention for
    linear layers), with a leading ensemble axis when `ensemble` is given, so members differ.

    Args:
        sizes: width of the input, of each hidden layer, and of the output.
        activation: after every layer but the last.
        ensemble: number of members; None for a single network without the leading axis.
        orthogonal_gain: draw weights orthogonally with gain sqrt(2), the last layer with this
            gain, and zero biases instead (the usual choice of on-policy methods).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation = "relu",
        *,
        ensemble: int | None = None,
        orthogonal_gain: float | None = None,
    ):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UserError(
                f"hidden: MLP sizes must be two or more positive widths, got {list(sizes)}"
            )
        self.ensemble = ensemble
        self.activation = ACTIVATIONS[activation]
        lead = () if ensemble is None else (ensemble,)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for index, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            weight = torch.empty(*lead, fan_in, fan_out)
            bias = torch.zeros(*lead, *((1,) if lead else ()), fan_out)
            if orthogonal_gain is None:
                bound = 1 / math.sqrt(fan_in)
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)
            else:
                last = index == len(sizes) - 2
                for member in weight if lead else (weight,):
                    nn.init.orthogonal_(member, orthogonal_gain if last else math.sqrt(2))
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... j"]:
        """`b i -> b j`; an ensemble maps `b i` or `e b i` to `e b j`."""
        if self.ensemble is not None and x.ndim == 2:
            x = x.expand(self.ensemble, *x.shape)
        return self._through(x, list(self.weights), list(self.biases))

    def first(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... j"]:
        """The first member of an ensemble alone."""
        return self._through(x, [w[0] for w in self.weights], [b[0] for b in self.biases])

    def _through(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        last = len(weights) - 1
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            # Not addmm: a separate addition fuses with the activation when compiled.
            x = torch.matmul(x, weight) + bias
            if index < last:
                x = self.activation(x)
        return x
