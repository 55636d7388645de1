"""A diffusion model as its user wants it: rows in, images out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel
from esscher.experience.conditions import Wanted
from esscher.runtime.rng import mix
from esscher.types import Asked, Drawn


class Painter:
    """A diffusion model that draws as a method has it draw.

    Args:
        model: the model.
        wanted: the rows that the run drew.
        draw: what is asked for, and a seed for each -> samples.
    """

    def __init__(
        self, model: DiffusionModel, wanted: Wanted, draw: Callable[[Asked, Sequence[int]], Drawn]
    ):
        self.model, self._wanted, self._draw = model, wanted, draw

    @torch.no_grad()
    def draw(
        self, rows: Sequence[Mapping[str, Any]] | int, *, seed: int = 0
    ) -> Float[Tensor, "b *s"]:
        """Images "b c h w" in [0, 1] (or whatever the model draws), one a row, on the CPU.

        Args:
            rows: each with what the model draws by, a label or a prompt; or how many of the run's own
                rows, in turn.
            seed: an image depends on it, on its own row and its place.
        """
        own = self._wanted
        if isinstance(rows, int):
            asked = own.asked([number % len(own.rows) for number in range(rows)])
        else:
            asked = Asked(row=[-1] * len(rows), rows=list(rows), condition=own.encode(rows))
        seeds = [mix(seed, number) for number in range(len(asked))]
        return self.model.decode(self._draw(asked, seeds).x).float().cpu()
