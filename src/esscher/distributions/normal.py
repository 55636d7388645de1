"""Diagonal Gaussians: plain, and squashed by tanh into (-1, 1)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Normal:
    """Independent Gaussian components.

    Args:
        mean: `b d`.
        log_std: `b d` or broadcastable.
    """

    def __init__(self, mean: Float[Tensor, "b d"], log_std: Float[Tensor, "*b d"]):
        self.mean, self.log_std = mean, log_std.expand_as(mean)

    def mode(self) -> Float[Tensor, "b d"]:
        return self.mean

    def sample(self) -> Float[Tensor, "b d"]:
        with torch.no_grad():
            return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def log_prob(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
        standardised = (x - self.mean) * (-self.log_std).exp()
        return (-0.5 * standardised.square() - self.log_std - HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> Float[Tensor, "b"]:
        return (0.5 + HALF_LOG_TWO_PI + self.log_std).sum(-1)


class TanhNormal:
    """a = tanh(u) with u Gaussian: a density on the open box (-1, 1)^d.

    log pi(a) = sum_k [ log N(u_k) - log(1 - tanh(u_k)^2) ], with the correction in the form
    2 (log 2 - u - softplus(-2u)), which is exact for any u (adding 1e-6 inside the logarithm, as is
    often done, biases it from |u| = 7 on).

    Args:
        mean: of u, `b d`.
        log_std: of u, `b d`.
    """

    def __init__(self, mean: Float[Tensor, "b d"], log_std: Float[Tensor, "b d"]):
        self.mean, self.log_std = mean, log_std

    def mode(self) -> Float[Tensor, "b d"]:
        """Tanh of the mean: the median, taken as the deterministic action."""
        return torch.tanh(self.mean)

    def sample(self) -> Float[Tensor, "b d"]:
        with torch.no_grad():
            return torch.tanh(self.mean + self.log_std.exp() * torch.randn_like(self.mean))

    def rsample_with_log_prob(self) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b"]]:
        """Gradient: into mean and log_std, through the sample and through its log-probability."""
        noise = torch.randn_like(self.mean)
        u = self.mean + self.log_std.exp() * noise
        gaussian = -0.5 * noise.square() - self.log_std - HALF_LOG_TWO_PI
        return torch.tanh(u), (gaussian - _log_tanh_derivative(u)).sum(-1)

    def log_prob(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
        """Of a given action; the open box is entered by half a float32 step at its faces."""
        u = torch.atanh(x.clamp(-1 + 6e-8, 1 - 6e-8))
        standardised = (u - self.mean) * (-self.log_std).exp()
        gaussian = -0.5 * standardised.square() - self.log_std - HALF_LOG_TWO_PI
        return (gaussian - _log_tanh_derivative(u)).sum(-1)


def _log_tanh_derivative(u: Tensor) -> Tensor:
    return 2 * (math.log(2) - u - softplus(-2 * u))
