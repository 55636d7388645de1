"""Examples of what samples in the plane should be like, and a reward of single samples by examples,
for proofs and for trying things out.

Use them like your own: `--reward esscher.image_rewards:Frechet --image.reward-kwargs exemplars
esscher.exemplars:three_of_eight`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.adapters.imports import made
from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.functional.sets import moments

RADIUS, STD = 3.0, 0.4
"""Of the ring of Gaussians, and of each of them."""


def ring(components: Sequence[int] = range(8)) -> GaussianMixture:
    """Some of eight Gaussians on a circle, as `esscher.images:mixture` has them."""
    angle = torch.tensor(list(components)) * (torch.pi / 4)
    return GaussianMixture(RADIUS * torch.stack([angle.cos(), angle.sin()], -1), STD)


def three_of_eight() -> Float[Tensor, "n d"]:
    """3,000 points, always the same, equally many of each of the first three Gaussians."""
    draw = torch.Generator().manual_seed(0)
    means = ring(range(3)).means.repeat(1_000, 1)
    return means + STD * torch.randn(means.shape, generator=draw)


class Mahalanobis:
    """Minus the squared distance of a sample to the mean of exemplars, in their covariance.

    Args:
        exemplars: module:function that returns samples as the model shows them.
    """

    def __init__(self, exemplars: str):
        mean, covariance = moments(made(exemplars, "exemplars").flatten(1))
        self._mean, self._inverse = mean.float(), torch.linalg.inv(covariance).float()

    def __call__(
        self, images: Float[Tensor, "b *s"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b"]:
        away = images.flatten(1) - self._mean.to(images)
        return -((away @ self._inverse.to(images)) * away).sum(-1)
