"""Mixtures of Gaussians, with exact densities and denoisers at every noise level."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.errors import UserError
from esscher.functional.diffusion import over


class GaussianMixture:
    """sum_k weight_k N(mean_k, std_k^2 I), and its classes where components have labels.

    As a denoiser D(x, sigma, condition) the condition is a label a sample; -1 is no condition. It is
    exact: E[x0 | x0 + sigma eps = x].

    Args:
        means: one row a component.
        std: of each component, > 0.
        weights: of each component; made to add up to 1.
        labels: the class of each component, from 0; None: no classes.

    Raises:
        UserError: shapes that do not agree, a std or weight that is not positive.
    """

    def __init__(
        self,
        means: Float[Tensor, "k d"],
        std: Float[Tensor, "k"] | float,
        weights: Float[Tensor, "k"] | None = None,
        labels: Int[Tensor, "k"] | None = None,
    ):
        count = len(means)
        self.means = means
        self.std = torch.as_tensor(std, dtype=means.dtype, device=means.device).expand(count)
        weights = means.new_ones(count) if weights is None else weights.to(means)
        if weights.shape != (count,) or not bool((weights > 0).all() and (self.std > 0).all()):
            raise UserError(
                f"a mixture of {count} components needs as many positive weights and stds"
            )
        self.log_weight = (weights / weights.sum()).log()
        self.labels = labels
        if labels is not None and labels.shape != (count,):
            raise UserError(f"{count} components need as many labels, got {tuple(labels.shape)}")

    def __call__(
        self,
        x: Float[Tensor, "b d"],
        sigma: Float[Tensor, "b"],
        condition: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """The exact denoised estimate, within the class that is asked for."""
        share = self._joint(x, sigma, condition).softmax(-1)
        clean = self.std.square()
        noisy = sigma.square().unsqueeze(-1)
        pull = share * clean / (clean + noisy)
        towards = (share * noisy / (clean + noisy)) @ self.means
        return pull.sum(-1, keepdim=True) * x + towards

    def log_prob(
        self,
        x: Float[Tensor, "b d"],
        sigma: Float[Tensor, "b"] | float = 0.0,
        condition: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b"]:
        """Log-density, in nats, of samples with noise of standard deviation `sigma` on them."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self._joint(x, level, condition).logsumexp(-1)

    def responsibilities(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Probability of each component given a clean sample."""
        return self._joint(x, x.new_zeros(len(x)), None).softmax(-1)

    def sample(self, count: int, condition: Int[Tensor, "b"] | None = None) -> Float[Tensor, "b d"]:
        """Clean samples; of the classes asked for, one each, where `condition` is given."""
        logits = self._log_weights(count, condition)
        component = torch.multinomial(logits.exp(), 1).squeeze(-1)
        noise = torch.randn_like(self.means[component])
        return self.means[component] + over(self.std[component], noise) * noise

    def _joint(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        """Log weight_k + log N(x; mean_k, std_k^2 + sigma^2), "b k"."""
        variance = self.std.square() + sigma.square().unsqueeze(-1)
        distance = (x.unsqueeze(1) - self.means).square().sum(-1)
        dimensions = self.means.shape[-1]
        log_normal = -0.5 * (distance / variance + dimensions * (2 * math.pi * variance).log())
        return self._log_weights(len(x), condition) + log_normal

    def _log_weights(self, count: int, condition: Tensor | None) -> Tensor:
        weight = self.log_weight.expand(count, -1)
        if condition is None:
            return weight
        if self.labels is None:
            raise UserError("this mixture has no classes to ask for: leave the condition out")
        asked = condition.unsqueeze(-1)
        weight = weight.masked_fill((self.labels != asked) & (asked >= 0), -torch.inf)
        return weight.log_softmax(-1)
