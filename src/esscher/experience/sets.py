"""Populations of samples, and sets drawn from them anew for every update; nothing to save but the step.

Where the populations come from:

- `Groups`: each has rows of its own (a column that says to which a row belongs);
- `Kernels`: each is a neighbourhood of a value y* of a continuous label; row k is drawn with
  probability proportional to exp(-(y_k - y*)^2 / (2 bandwidth^2));
- `Mixtures`: each is a mixture of a few groups with weights from a Dirichlet distribution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from esscher.errors import require
from esscher.experience.order import Epochs
from esscher.runtime.rng import Phase, mix, numpy_generator
from esscher.types import Sets

MOST = 100_000
"""Sets a batch."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Populations with rows of their own. A set is drawn without putting rows back, so one that is
    larger than its population is the whole of it.
    """

    names: Sequence[str]
    rows: Sequence[Rows]
    """Of each, two or more."""
    labels: Sequence[int] = ()
    """Class of each, -1 where it is not known; empty: there are no classes."""

    @property
    def count(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return self.names[number]

    def draw(self, number: int, size: int, generator: np.random.Generator) -> Rows:
        own = self.rows[number]
        return generator.choice(own, min(size, len(own)), replace=False)


@dataclass(frozen=True)
class Kernels:
    """Neighbourhoods of values of a continuous label; rows are drawn with putting back."""

    centres: NDArray[np.float64]
    label: NDArray[np.float64]
    """Of each of `rows`."""
    rows: Rows
    bandwidth: float

    @property
    def count(self) -> int:
        return len(self.centres)

    def name(self, number: int) -> str:
        return f"{self.centres[number]:g}"

    def weights(self, number: int) -> NDArray[np.float64]:
        """Of each row; they add up to 1."""
        distance = (self.label - self.centres[number]) / self.bandwidth
        # Relative to the nearest row, so that not all of them underflow.
        weight = np.exp((np.square(distance).min() - np.square(distance)) / 2)
        return weight / weight.sum()

    def draw(self, number: int, size: int, generator: np.random.Generator) -> Rows:
        return generator.choice(self.rows, size, p=self.weights(number))


@dataclass(frozen=True)
class Mixtures:
    """Mixtures of `sources` different groups with Dirichlet(concentration) weights, as many as are
    asked for: which one a number stands for is a function of (seed, number). Rows are drawn with
    putting back.
    """

    groups: Groups
    sources: int
    concentration: float
    seed: int

    @property
    def count(self) -> None:
        return None

    def name(self, number: int) -> str:
        chosen, share = self.recipe(number)
        shares = sorted(zip(chosen.tolist(), share.tolist(), strict=True))
        return " + ".join(f"{share:.2f} {self.groups.name(source)}" for source, share in shares)

    def recipe(self, number: int) -> tuple[Rows, NDArray[np.float64]]:
        """Its groups and their weights."""
        generator = np.random.default_rng(mix(self.seed, number))
        chosen = generator.choice(self.groups.count, self.sources, replace=False)
        return chosen, generator.dirichlet(np.full(self.sources, self.concentration))

    def draw(self, number: int, size: int, generator: np.random.Generator) -> Rows:
        chosen, share = self.recipe(number)
        counts = generator.multinomial(size, share)
        parts = [
            generator.choice(self.groups.rows[source], count)
            for source, count in zip(chosen, counts, strict=True)
        ]
        return generator.permutation(np.concatenate(parts))


Populations = Groups | Kernels | Mixtures
"""Each has `count` (None: as many as are asked for), `name(number)`, and `draw(number, size,
generator)`, which returns at most `size` rows.
"""


@dataclass(frozen=True)
class SetData:
    """Samples, the populations to learn from, and those that are held out to judge by."""

    name: str
    x: Float[Tensor, "n d"]
    """Standardised."""
    training: Populations
    held_out: Populations
    size: int
    """Samples of a set, >= 2."""
    seed: int

    def sets(
        self,
        populations: Populations,
        numbers: Sequence[int],
        size: int,
        generator: np.random.Generator,
    ) -> Sets:
        """A set of at most `size` samples of each of these populations, padded to the longest."""
        drawn = [populations.draw(number, size, generator) for number in numbers]
        lengths = [len(rows) for rows in drawn]
        longest = max(lengths)
        index = np.zeros((len(drawn), longest), dtype=np.int64)
        for place, rows in enumerate(drawn):
            index[place, : len(rows)] = rows
        x = self.x[torch.from_numpy(index)]
        mask = None
        if min(lengths) < longest:
            mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(-1)
            x = torch.where(mask.unsqueeze(-1), x, 0)
        label = None
        if isinstance(populations, Groups) and populations.labels:
            label = torch.tensor([populations.labels[number] for number in numbers])
        return Sets(x=x, mask=mask, number=torch.tensor(list(numbers)), label=label)


class SetBatches:
    """Batches of sets to learn from: every population once an epoch, its samples drawn anew each time.

    What a batch holds is a function of (seed, step) alone.

    Args:
        data: where they come from.
        batch_size: sets a batch, in [1, MOST]; more than there are populations repeats them.
        times: a set has this many times `data.size` samples, where its population has as many.
        device: where to put them.
    """

    def __init__(self, data: SetData, batch_size: int, *, times: int, device: torch.device):
        require("batch_size", batch_size, 1 <= batch_size <= MOST, f"in [1, {MOST:,}]")
        self.data, self.batch_size, self.times, self._device = data, batch_size, times, device
        count = data.training.count
        self._order = None if count is None else Epochs(count, data.seed)

    def batches(self, step: int) -> Iterator[Sets]:
        """The batch of a step, counted from 1."""
        data, start = self.data, (step - 1) * self.batch_size
        places = range(start, start + self.batch_size)
        order = self._order
        numbers = list(places) if order is None else [order.row(place) for place in places]
        generator = numpy_generator(data.seed, step, Phase.ORDER, rank=1)  # 0 orders the epochs.
        sets = data.sets(data.training, numbers, self.times * data.size, generator)
        yield sets.to(self._device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
