"""A diffusion model as its user wants it: rows in, images out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import require
from esscher.experience.conditions import Wanted
from esscher.runtime.rng import mix
from esscher.types import Asked, Drawn


class Painter:
    """A diffusion model that draws as a method has it draw.

    Args:
        model: the model.
        wanted: the rows that the run drew.
        draw: what is asked for, and a seed for each -> samples.
        at_once: most samples in the making at one time, >= 1.
    """

    def __init__(
        self,
        model: DiffusionModel,
        wanted: Wanted,
        draw: Callable[[Asked, Sequence[int]], Drawn],
        *,
        at_once: int = 64,
    ):
        self.model, self._wanted, self._draw, self._at_once = model, wanted, draw, at_once
        self.told: dict[str, Float[Tensor, "b"]] = {}
        """What the method said of each image of the last drawing, such as its evaluations."""

    def compiled(self) -> "Painter":
        """This, with its network compiled while it first draws, which pays where many are drawn."""
        self.model.compiled(final=True)
        return self

    @torch.no_grad()
    def draw(
        self, rows: Sequence[Mapping[str, Any]] | int, *, seed: int = 0
    ) -> Float[Tensor, "b *s"]:
        """Images "b c h w" in [0, 1] (or whatever the model draws), one a row, on the CPU.

        Args:
            rows: each with what the model draws by, a label or a prompt, and so perhaps one of the
                run's own; or how many of these, in turn.
            seed: an image depends on it, on its own row and its place.
        Raises: UserError: there is nothing to draw.
        """
        own, count = self._wanted, rows if isinstance(rows, int) else len(rows)
        require("rows", count, count >= 1, "at least one row, or a number >= 1")
        known: dict[str, int] = {}
        if not isinstance(rows, int):
            for number, row in enumerate(own.rows):
                known.setdefault(self.model.key(row), number)
        shown: list[Tensor] = []
        told: list[dict[str, Tensor]] = []
        size = math.ceil(count / math.ceil(count / self._at_once))
        for start in range(0, count, size):
            # All batches are of one size, with the last sample again: another would be compiled anew.
            places = [min(place, count - 1) for place in range(start, start + size)]
            if isinstance(rows, int):
                asked = own.asked([place % len(own.rows) for place in places])
            else:
                part = [rows[place] for place in places]
                # Those of the run's own rows that the model is told the same by; -1: there is none.
                numbers = [known.get(self.model.key(row), -1) for row in part]
                asked = Asked(row=numbers, rows=part, condition=own.encode(part))
            drawn = self._draw(asked, [mix(seed, place) for place in places])
            shown.append(self.model.decode(drawn.x)[: count - start].float().cpu())
            told.append({name: said[: count - start].cpu() for name, said in drawn.told.items()})
        self.told = {name: torch.cat([part[name] for part in told]) for name in told[0]}
        return torch.cat(shown)
