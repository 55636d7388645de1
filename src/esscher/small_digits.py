"""Handwritten digits of 8 x 8 in seconds: a diffusion model of them that trains itself when it is made,
a classifier, and a reward of digits that can be read and are thick.

Always the same weights, whatever the seed of a run. Use them like any other: `--model
esscher.small_digits:model --reward esscher.small_digits:ReadableAndThick --image.labels 0 1 2`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.datasets import digits
from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import require
from esscher.functional.diffusion import denoising_terms, edm_scalings, karras_sigmas, over
from esscher.runtime.optim import Optim

CLASSES, NO_CLASS = 10, 10
LOW, HIGH = 0.02, 20.0
"""Noise levels; those of training are spread over them evenly in their logarithm."""
SPREAD = 0.75
"""Standard deviation of the pixels, which lie in [-1, 1]."""
BATCH = 128


def model(*, updates: int = 1_000, width: int = 128) -> DiffusionModel:
    """Draws digits by the column label.

    Args:
        updates: of training, a few milliseconds each, >= 1.
        width: of the network's three hidden layers.
    """
    require("updates", updates, updates >= 1, ">= 1")
    denoiser = Denoiser(width)
    denoiser.load_state_dict(_trained(updates, width))
    return DiffusionModel(
        denoiser,
        [1, 8, 8],
        levels,
        null=torch.tensor([NO_CLASS]),
        encode=denoiser.encode,
        decode=lambda x0: ((x0 + 1) / 2).clamp(0, 1),
        invert=lambda shown: 2 * shown - 1,
        columns=["label"],
    )


def levels(steps: int) -> Float[Tensor, "k"]:
    """Noise levels of as many steps, and 0."""
    require("steps", steps, steps >= 2, ">= 2")
    falling = karras_sigmas(steps, LOW, HIGH)
    return torch.cat([falling, falling.new_zeros(1)])


class Denoiser(nn.Module):
    """D(x, sigma, label) with scalings as in EDM around a network of three hidden layers.

    Args:
        width: of them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.network = _network([64 + 1 + CLASSES + 1, width, width, width, 64])

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> Int[Tensor, "b"]:
        """Class of each row."""
        labels: list[Any] = [row.get("label") for row in rows]
        for label in labels:
            whole = isinstance(label, int) and not isinstance(label, bool)
            require("label", label, whole and 0 <= label < CLASSES, "a digit from 0 to 9")
        return torch.tensor(labels)

    def forward(
        self,
        x: Float[Tensor, "b 1 8 8"],
        sigma: Float[Tensor, "b"],
        condition: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b 1 8 8"]:
        if condition is None:
            condition = torch.full((len(x),), NO_CLASS, device=x.device)
        skip, out, scale, noise = edm_scalings(sigma, SPREAD)
        label = nn.functional.one_hot(condition, CLASSES + 1).to(x.dtype)
        features = torch.cat([(over(scale, x) * x).flatten(1), noise.unsqueeze(-1), label], -1)
        return over(skip, x) * x + over(out, x) * self.network(features).view_as(x)


@cache
def _trained(updates: int, width: int) -> dict[str, Tensor]:
    """State of a denoiser after so many updates on all digits."""
    generator = torch.Generator().manual_seed(0)
    x0, label = _data()
    denoiser = Denoiser(width)
    _initialise(denoiser, generator)
    opt = Optim(denoiser.parameters(), 2e-3)
    span = math.log(LOW), math.log(HIGH)
    for update in range(updates):
        row = torch.randint(len(x0), (BATCH,), generator=generator)
        sigma = torch.empty(BATCH).uniform_(*span, generator=generator).exp()
        noise = torch.randn(x0[row].shape, generator=generator)
        told = label[row].masked_fill(torch.rand(BATCH, generator=generator) < 0.1, NO_CLASS)
        denoised = denoiser(x0[row] + over(sigma, noise) * noise, sigma, told)
        # EDM's weight makes the network's own error the same at every noise level.
        weight = (sigma.square() + SPREAD**2) / (sigma * SPREAD).square()
        opt.learning_rate = 2e-3 * (1 - update / updates)
        opt.minimize((weight * denoising_terms(denoised, x0[row], sigma, "sample")).mean())
    return denoiser.state_dict()


def _data() -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, "n"]]:
    found = digits()
    image = torch.as_tensor(found["image"])
    return 2 * image.view(-1, 1, 8, 8) - 1, torch.as_tensor(found["label"])


@cache
def classifier() -> nn.Sequential:
    """Images in [0, 1], end to end -> logits of their class; what comes before its last layer are the
    features. Trained on all digits, and frozen.
    """
    generator = torch.Generator().manual_seed(1)
    x0, label = _data()
    network = _network([64, 64, 32, CLASSES])
    _initialise(network, generator)
    opt = Optim(network.parameters(), 3e-3, weight_decay=1e-2)
    with torch.enable_grad():  # It may first be asked for while something else is drawn.
        for _ in range(1_000):
            row = torch.randint(len(x0), (BATCH,), generator=generator)
            # Blurred by noise, so that it is not sure of what it has never seen.
            noise = 0.2 * torch.randn(BATCH, 64, generator=generator)
            shown = (x0[row].flatten(1) + 1) / 2 + noise
            opt.minimize(nn.functional.cross_entropy(network(shown), label[row]))
    return network.requires_grad_(False)


def features(images: Float[Tensor, "b 1 8 8"]) -> Float[Tensor, "b e"]:
    """What the classifier's last layer looks at."""
    return classifier()[:-1](images.flatten(1))


class ReadableAndThick:
    """log p(label | image), nats, by the classifier, and a bonus for ink.

    Args:
        bonus: reward of an image that is all ink, >= 0.
    """

    def __init__(self, bonus: float = 10.0):
        require("bonus", bonus, bonus >= 0, ">= 0")
        self.bonus = bonus

    def __call__(
        self, images: Float[Tensor, "b 1 8 8"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b"]:
        label = torch.tensor([row["label"] for row in rows])
        flat = images.flatten(1).cpu()
        logp = classifier()(flat).log_softmax(-1).gather(1, label.unsqueeze(1)).squeeze(1)
        return logp + self.bonus * flat.mean(-1)


def _network(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of linear layers as torch draws them, but from a generator of their own."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
