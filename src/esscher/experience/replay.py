"""A ring of transitions, sampled uniformly with replacement."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.errors import UserError
from esscher.runtime.state import Stateful
from esscher.types import Action, Spec, Transitions


class Replay(Stateful):
    """Keeps the last `capacity` transitions in contiguous arrays, allocated once.

    Batches are owed by counters: after `warmup` steps, `updates_per_step` batches a step. The rows
    themselves are not part of `state_dict`: a checkpoint writes only the rows that are new since
    the one before (see `rows`, `put_rows`), so that saving neither copies nor rewrites the ring.

    Args:
        spec: shapes of the task.
        capacity: transitions kept.
        batch_size: transitions a batch.
        warmup: environment steps before the first batch.
        updates_per_step: batches per environment step; below 1, one batch every so many steps.
        kind: record of a row, `Transitions` or one with further columns.
        extra: widths of those further columns (float32).
        device: where the arrays live.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        batch_size: int,
        *,
        warmup: int = 0,
        updates_per_step: float = 1.0,
        kind: type[Transitions] = Transitions,
        extra: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ):
        if not 1 <= batch_size <= capacity:
            raise UserError(
                f"batch_size must be in [1, buffer_size], got {batch_size} with buffer_size "
                f"{capacity}: lower the one or raise the other"
            )
        if not updates_per_step > 0:
            raise UserError(f"updates_per_step must be > 0, got {updates_per_step}")
        action_dtype = torch.float32 if spec.num_actions is None else torch.int64
        self._capacity, self._batch_size = capacity, batch_size
        self._warmup, self._updates_per_step = warmup, updates_per_step
        widths = extra or {}
        self._rows = kind(
            obs=torch.empty(capacity, *spec.obs_shape, device=device),
            action=torch.empty(capacity, *spec.action_shape, dtype=action_dtype, device=device),
            reward=torch.empty(capacity, device=device),
            next_obs=torch.empty(capacity, *spec.obs_shape, device=device),
            terminated=torch.empty(capacity, dtype=torch.bool, device=device),
            truncated=torch.empty(capacity, dtype=torch.bool, device=device),
            **{name: torch.empty(capacity, width, device=device) for name, width in widths.items()},
        )
        self._columns: dict[str, Tensor] = self._rows.fields()
        self.num_added = 0
        self.num_batches = 0

    def __len__(self) -> int:
        return min(self.num_added, self._capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    def warming_up(self, step: int) -> bool:
        """Whether actions should still be drawn uniformly at random."""
        return step < self._warmup

    def add(self, transitions: Transitions, action: Action | None = None) -> None:
        """Append a row an environment, over the oldest ones once full."""
        self.put_rows(self.num_added, transitions.fields())
        self.num_added += len(transitions)

    def batches(self, step: int) -> Iterator[Transitions]:
        """The batches that `step` environment steps owe and that were not yet given."""
        due = math.floor(max(0, step - self._warmup) * self._updates_per_step)
        while self.num_batches < due:
            self.num_batches += 1
            yield self.sample(self._batch_size)

    def sample(self, size: int) -> Any:
        """Rows, of the kind given, drawn uniformly with replacement by torch's default generator."""
        index = self._draw(size)
        columns = {name: column.index_select(0, index) for name, column in self._columns.items()}
        return type(self._rows)(**columns)

    def sample_obs(self, size: int) -> Float[Tensor, "b *o"]:
        """Observations alone, drawn likewise."""
        return self._columns["obs"].index_select(0, self._draw(size))

    def _draw(self, size: int) -> Tensor:
        return torch.randint(len(self), (size,), device=self._columns["obs"].device)

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]:
        """Rows number start to stop (counted from the first ever added), as views, in pieces."""
        oldest = self.num_added - len(self)
        if not oldest <= start <= stop <= self.num_added:
            raise ValueError(f"rows {start}..{stop} are not all held ({oldest}..{self.num_added})")
        while start < stop:
            begin = start % self._capacity
            length = min(stop - start, self._capacity - begin)
            yield {n: c[begin : begin + length] for n, c in self._columns.items()}
            start += length

    def put_rows(self, start: int, columns: Mapping[str, Tensor]) -> None:
        """Write rows number start, start + 1, ... into the ring."""
        begin, count = start % self._capacity, len(columns["reward"])
        if count > self._capacity:
            raise ValueError(f"{count} rows at once do not fit buffer_size {self._capacity}")
        head = min(count, self._capacity - begin)
        for name, column in self._columns.items():
            values = columns[name]
            column.narrow(0, begin, head).copy_(values if head == count else values[:head])
            if head < count:
                column[: count - head] = values[head:]
