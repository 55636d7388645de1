"""Policies: networks that map observations to distributions over actions."""

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.categorical import Categorical
from esscher.distributions.normal import Normal, TanhNormal
from esscher.nn.mlp import MLP, Activation


class TanhNormalPolicy(nn.Module):
    """A tanh-Gaussian whose mean and log standard deviation both come from the observation.

    Args:
        obs_dim: width of an observation.
        action_dim: number of action components.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        log_std_range: log_std is clamped to this, in nats.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
        log_std_range: tuple[float, float] = (-20.0, 2.0),
    ):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, 2 * action_dim), activation)
        self.log_std_range = log_std_range

    def forward(self, obs: Float[Tensor, "b o"]) -> TanhNormal:
        mean, log_std = self.net(obs).float().chunk(2, -1)
        return TanhNormal(mean, log_std.clamp(*self.log_std_range))


class NormalPolicy(nn.Module):
    """A Gaussian with a mean from the observation and one log standard deviation an action."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "tanh",
        initial_log_std: float = 0.0,
    ):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, action_dim), activation, orthogonal_gain=0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), initial_log_std))

    def forward(self, obs: Float[Tensor, "b o"]) -> Normal:
        return Normal(self.net(obs).float(), self.log_std)


class CategoricalPolicy(nn.Module):
    """Logits from the observation."""

    def __init__(
        self,
        obs_dim: int,
        num_actions: int,
        hidden: Sequence[int],
        activation: Activation = "tanh",
    ):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, num_actions), activation, orthogonal_gain=0.01)

    def forward(self, obs: Float[Tensor, "b o"]) -> Categorical:
        return Categorical(self.net(obs).float())


def device_of(policy: nn.Module) -> torch.device:
    """Where a policy computes, whether it has parameters or not."""
    return next(chain(policy.parameters(), policy.buffers())).device


class Deterministic:
    """A point mass: the distribution of a policy that does not explore by itself."""

    def __init__(self, value: Float[Tensor, "b d"]):
        self.value = value

    def mode(self) -> Float[Tensor, "b d"]:
        return self.value

    def sample(self) -> Float[Tensor, "b d"]:
        return self.value.detach()


class DeterministicPolicy(nn.Module):
    """tanh of a network: one action for each observation."""

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        activation: Activation = "relu",
    ):
        super().__init__()
        self.net = MLP((obs_dim, *hidden, action_dim), activation)

    def forward(self, obs: Float[Tensor, "b o"]) -> Deterministic:
        return Deterministic(torch.tanh(self.net(obs).float()))
