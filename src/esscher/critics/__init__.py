"""Value networks: ensembles with a leading axis e, and what may be asked of their estimates."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from esscher.nn.mlp import MLP, Activation

Aggregate = Literal["min", "mean", "first"]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Values:
    """Estimates of e critics for b inputs."""

    mean: Float[Tensor, "e b"]
    std: Float[Tensor, "e b"] | None = None
    quantiles: Float[Tensor, "e b q"] | None = None

    def lower(self, how: Aggregate = "min") -> Float[Tensor, "b"]:
        """One value a row: the smallest mean, the mean of means, or the first critic's mean."""
        if how == "min":
            return self.mean.amin(0)
        if how == "mean":
            return self.mean.mean(0)
        if how == "first":
            return self.mean[0]
        raise ValueError(f"aggregate must be min, mean or first, got {how!r}")

    def smallest(self) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Mean and standard deviation of whichever critic has the smaller mean, row by row."""
        if self.std is None:
            raise ValueError("these critics predict no standard deviation")
        index = self.mean.argmin(0, keepdim=True)
        return self.mean.gather(0, index).squeeze(0), self.std.gather(0, index).squeeze(0)


class ScalarCritic(nn.Module):
    """e networks on [obs, action] (or obs alone, with `action_dim` 0), each giving one value."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        *,
        ensemble: int = 2,
        orthogonal_gain: float | None = None,
    ):
        super().__init__()
        sizes = (obs_dim + action_dim, *hidden, 1)
        self.net = MLP(sizes, activation, ensemble=ensemble, orthogonal_gain=orthogonal_gain)

    def forward(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"] | None = None
    ) -> Values:
        return Values(mean=self.net(_join(obs, action)).float().squeeze(-1))

    def first(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"] | None = None
    ) -> Float[Tensor, "b"]:
        """What `forward(...).lower("first")` gives, without work for the other networks."""
        return self.net.first(_join(obs, action)).float().squeeze(-1)


class GaussianCritic(nn.Module):
    """e networks, each giving the mean and the standard deviation (softplus) of a return."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "gelu",
        *,
        ensemble: int = 2,
    ):
        super().__init__()
        self.net = MLP((obs_dim + action_dim, *hidden, 2), activation, ensemble=ensemble)

    def forward(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Values:
        mean, raw_std = self.net(_join(obs, action)).float().unbind(-1)
        return Values(mean=mean, std=softplus(raw_std))


class QuantileCritic(nn.Module):
    """e networks, each giving q quantiles at the levels (2i + 1) / 2q."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        num_quantiles: int,
        activation: Activation = "relu",
        *,
        ensemble: int = 2,
    ):
        super().__init__()
        sizes = (obs_dim + action_dim, *hidden, num_quantiles)
        self.net = MLP(sizes, activation, ensemble=ensemble)

    def forward(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Values:
        quantiles = self.net(_join(obs, action)).float()
        return Values(mean=quantiles.mean(-1), quantiles=quantiles)


def target_of(module: Module) -> Module:
    """A copy that no optimiser moves; `polyak` does."""
    return copy.deepcopy(module).requires_grad_(False)


def _join(obs: Tensor, action: Tensor | None) -> Tensor:
    return obs if action is None else torch.cat([obs, action], -1)
