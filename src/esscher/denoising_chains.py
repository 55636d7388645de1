"""A diffusion model whose policy gradient is known, and its reward: for proofs and tests.

The state v of a chain of T steps begins at 0 and goes v <- v + delta_k + 0.3 n_k, with a learned delta
a step; what a sample is worth, u - (v - target)^2, hangs mostly on luck u that was drawn at the start
and that no step can change. So E[-(v - target)^2] = -(sum delta - target)^2 - 0.09 T, exactly.

Use them like any other: `--model esscher.denoising_chains:chain --reward
esscher.denoising_chains:LuckAndSkill`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import require
from esscher.functional.diffusion import over
from esscher.samplers.denoisers import Condition

ETA = 0.1
"""Share of the ancestral noise at which the model is this chain; with all of it the levels would lie so
close together that single precision could not tell them apart."""
NOISE = 0.3
"""Standard deviation of a step."""
WIDTH, LOWEST = 16.0, -6.0
"""Of a cell of the line, and where it begins below its centre: luck is which cell, v the place in it,
and 0.3 sqrt(20) = 1.3 does not lead out of it."""
CELLS = 3.0
"""To a standard deviation of luck."""


def chain(*, steps: int = 20) -> DiffusionModel:
    """See the module; draw it with `steps` steps, eta 0.1 and no guidance.

    A sample is one number, x = 16 cell + v, and begins as N(0, 48^2). The first step leads to the
    middle of the nearest cell, where v is 0; the noise levels are those between which a step's own
    noise has standard deviation 0.3, and the last of them is not 0, so that each step is a draw.
    Decoded are luck, standard normal in thirds, and v.

    Args:
        steps: T, >= 1.
    """
    require("steps", steps, steps >= 1, ">= 1")
    levels = levels_of_equal_noise(steps)
    return DiffusionModel(Deltas(levels), [1], levels, decode=luck_and_state)


def levels_of_equal_noise(steps: int) -> Float[Tensor, "k"]:
    """Noise levels between which each step of the reverse kernel has the same noise.

    From std = eta next sqrt(1 - next^2 / sigma^2): next^2 = sigma^2 (1 + sqrt(1 - 4 c / sigma^2)) / 2
    with c = (std / eta)^2.
    """
    square, noise = [(CELLS * WIDTH) ** 2], (NOISE / ETA) ** 2
    for _ in range(steps):
        square.append(square[-1] * (1 + math.sqrt(1 - 4 * noise / square[-1])) / 2)
    return torch.tensor(square, dtype=torch.float64).sqrt()


class Deltas(nn.Module):
    """The denoiser of which the reverse kernel's mean is x + delta_k, and at the first step the middle
    of the nearest cell + delta_0.

    Args:
        levels: of all steps, and the last one below them.
    """

    def __init__(self, levels: Float[Tensor, "k"]):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(len(levels) - 1))
        # The mean is denoised + share (x - denoised).
        share = (levels[1:].square() - NOISE**2).sqrt() / levels[:-1]
        self.register_buffer("levels", levels[:-1].float(), persistent=False)
        self.register_buffer("gap", (1 - share).float(), persistent=False)

    levels: Tensor
    gap: Tensor

    def forward(
        self, x: Float[Tensor, "b d"], sigma: Float[Tensor, "b"], condition: Condition = None
    ) -> Float[Tensor, "b d"]:
        step = (sigma.unsqueeze(-1) - self.levels).abs().argmin(-1)
        start = torch.where(over(step == 0, x), WIDTH * (x / WIDTH).round(), x)
        mean = start + over(self.delta[step], x)
        return x + (mean - x) / over(self.gap[step], x)


def luck_and_state(x: Float[Tensor, "b 1"]) -> Float[Tensor, "b 2"]:
    """Luck, in standard deviations, and v."""
    cell = ((x - LOWEST) / WIDTH).floor()
    return torch.cat([cell / CELLS, x - WIDTH * cell], -1)


class LuckAndSkill:
    """Reward u - (v - target)^2 with u = luck times a standard normal number.

    Args:
        luck: standard deviation of u.
        target: where v should be.
    """

    def __init__(self, luck: float = 0.0, target: float = 2.0):
        self.luck, self.target = luck, target

    def __call__(
        self, images: Float[Tensor, "b 2"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b"]:
        luck, state = images.unbind(-1)
        return self.luck * luck - (state - self.target).square()
