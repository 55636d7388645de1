"""What a diffusion model is asked to draw, and real samples of it, in batches; there is nothing to save
but the step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.errors import UserError, require
from esscher.experience.order import Epochs
from esscher.samplers.denoisers import Condition
from esscher.types import Asked, Samples

MOST = 100_000
"""Rows a batch: what is drawn of them is held in memory."""


@dataclass(frozen=True)
class Wanted:
    """Rows of data to draw."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    encode: Callable[[Sequence[Mapping[str, Any]]], Condition]
    """Rows -> the condition that the denoiser is told."""
    seed: int = 0

    def asked(self, numbers: Sequence[int]) -> Asked:
        """Rows by their number; one may come several times."""
        rows = [self.rows[number] for number in numbers]
        return Asked(row=list(numbers), rows=rows, condition=self.encode(rows))


@dataclass(frozen=True)
class RealSamples:
    """Samples to learn from, and the rows that they come with."""

    x: Float[Tensor, "n *d"]
    """As the denoiser has them."""
    wanted: Wanted
    """A row of each."""


class Turns:
    """Batches of rows to draw, every row once an epoch.

    Args:
        wanted: where the rows come from.
        batch_size: rows a batch, in [1, MOST]; more than there are repeats them.
    """

    def __init__(self, wanted: Wanted, batch_size: int):
        require("batch_size", batch_size, 1 <= batch_size <= MOST, f"in [1, {MOST:,}]")
        self.wanted, self.batch_size = wanted, batch_size
        self._order = Epochs(len(wanted.rows), wanted.seed)

    def batches(self, step: int) -> Iterator[Asked]:
        """The batch of a step, counted from 1."""
        start = (step - 1) * self.batch_size
        places = range(start, start + self.batch_size)
        yield self.wanted.asked([self._order.row(place) for place in places])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class SampleBatches:
    """Batches of real samples, every sample once an epoch.

    Args:
        real: where they come from.
        batch_size: samples a batch, in [1, all].

    Raises:
        UserError: a batch would hold a sample twice.
    """

    def __init__(self, real: RealSamples, batch_size: int):
        count = len(real.x)
        if not 1 <= batch_size <= count:
            raise UserError(
                f"batch_size must be in [1, {count}], the samples of {real.wanted.name}, got "
                f"{batch_size}: change --method.batch-size"
            )
        self.real, self.batch_size = real, batch_size
        self._order = Epochs(count, real.wanted.seed)

    def batches(self, step: int) -> Iterator[Samples]:
        """The batch of a step, counted from 1."""
        yield self.batch(step)

    def batch(self, step: int) -> Samples:
        """The batch of a step, counted from 1."""
        start = (step - 1) * self.batch_size
        rows = [self._order.row(place) for place in range(start, start + self.batch_size)]
        condition = self.real.wanted.asked(rows).condition
        return Samples(x=self.real.x[torch.tensor(rows)], condition=condition)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
