"""What a diffusion model is asked to draw, in batches; there is nothing to save but the step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esscher.errors import require
from esscher.types import Asked


@dataclass(frozen=True)
class Wanted:
    """Rows of data to draw."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    encode: Callable[[Sequence[Mapping[str, Any]]], Any]
    """Rows -> the condition that the denoiser is told."""
    seed: int = 0

    def asked(self, numbers: Sequence[int]) -> Asked:
        """Rows by their number; one may come several times."""
        rows = [self.rows[number] for number in numbers]
        return Asked(row=list(numbers), rows=rows, condition=self.encode(rows))


class Turns:
    """Batches of rows in their order, beginning again after the last.

    Args:
        wanted: where the rows come from.
        batch_size: rows a batch, >= 1; more than there are repeats them.
    """

    def __init__(self, wanted: Wanted, batch_size: int):
        require("batch_size", batch_size, batch_size >= 1, ">= 1")
        self.wanted, self.batch_size = wanted, batch_size

    def batches(self, step: int) -> Iterator[Asked]:
        """The batch of a step, counted from 1."""
        start = (step - 1) * self.batch_size
        yield self.wanted.asked(
            [number % len(self.wanted.rows) for number in range(start, start + self.batch_size)]
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
