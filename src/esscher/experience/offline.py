"""A fixed data set of transitions, and the batches that it gives."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.errors import UserError, require
from esscher.runtime.state import Stateful
from esscher.types import NStepTransitions, Transitions


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Logged steps, episode after episode, each in the order of time.

    The last row of an episode is marked terminated or truncated; a data set that ends in the middle
    of an episode has that row marked truncated, so that nobody bootstraps over the seam.
    """

    transitions: Transitions
    """Actions in [-1, 1], or choices from 0."""
    step: Int[Tensor, "b"]
    """Steps since the episode began."""
    name: str
    """Where it came from, for messages and reports."""
    reference: tuple[float, float] | None = None
    """Returns that count as 0 and as 100 in normalised scores, where the data set states them."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Whatever else the data set says of itself."""

    def __len__(self) -> int:
        return len(self.transitions)

    def ends(self) -> Int[Tensor, "e"]:
        """Row numbers of the episodes' last steps."""
        return (self.transitions.terminated | self.transitions.truncated).nonzero().squeeze(1)

    def returns(self) -> Float[Tensor, "e"]:
        """Undiscounted return of each episode."""
        total = self.transitions.reward.double().cumsum(0)[self.ends()]
        return torch.diff(total, prepend=total.new_zeros(1)).float()

    def obs_moments(self) -> tuple[Float[Tensor, "o"], Float[Tensor, "o"]]:
        """Mean and standard deviation of each observation component."""
        obs = self.transitions.obs
        return obs.mean(0), obs.std(0, correction=0)

    def n_step(self, num_steps: int, discount: float) -> NStepTransitions:
        """Each row as the first of up to `num_steps` rows of its episode, taken as one.

        reward = sum_{k<m} discount^k r_{t+k}; next_obs, terminated and truncated are those of row
        t + m - 1; and `discount` is discount^m, for the value there. m is `num_steps`, or what is
        left of the episode, whichever is smaller: nothing crosses an end, and an episode that was
        only cut off is bootstrapped from its last observation.

        Source: Sutton and Barto, Reinforcement Learning (2nd ed.), sec. 7.1.

        Raises:
            UserError: num_steps < 1, or discount outside [0, 1].
        """
        require("num_steps", num_steps, num_steps >= 1, ">= 1")
        require("discount", discount, 0 <= discount <= 1, "in [0, 1]")
        rows, here = self.transitions, torch.arange(len(self))
        ends = self.ends()
        end = ends[torch.searchsorted(ends, here)]
        last = torch.minimum(here + num_steps - 1, end)
        reward = torch.zeros_like(rows.reward)
        for k in range(num_steps):
            inside = here + k <= last
            reward += discount**k * rows.reward[(here + k).clamp(max=len(self) - 1)] * inside
        return NStepTransitions(
            obs=rows.obs,
            action=rows.action,
            reward=reward,
            next_obs=rows.next_obs[last],
            terminated=rows.terminated[last],
            truncated=rows.truncated[last],
            discount=torch.as_tensor(discount, dtype=reward.dtype) ** (last - here + 1),
        )

    def digest(self) -> str:
        """SHA-256 of every column: two data sets with one digest are the same."""
        total = hashlib.sha256()
        for column in (*self.transitions.fields().values(), self.step):
            total.update(np.ascontiguousarray(column.cpu().numpy()).data)
        return total.hexdigest()

    def score(self, returns: float) -> float | None:
        """100 (return - low) / (high - low), or None where the data set states no references."""
        if self.reference is None:
            return None
        low, high = self.reference
        return 100 * (returns - low) / (high - low)


class OfflineReplay(Stateful):
    """Uniform batches, with replacement, from a data set: one at every step of the offline loop.

    The rows are not part of the state; their digest is, so that a run is never resumed on other
    data.

    Args:
        data: what to sample from.
        batch_size: transitions a batch.
        device: where the rows live.
    """

    def __init__(self, data: Dataset, batch_size: int, *, device: torch.device | str = "cpu"):
        if not 1 <= batch_size <= len(data):
            raise UserError(
                f"batch_size must be in [1, {len(data)}], the size of {data.name}, got {batch_size}"
            )
        self._rows, self._batch_size = data.transitions.to(device), batch_size
        self._name = data.name
        self.digest = data.digest()

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, step: int) -> Iterator[Transitions]:
        """The one batch of this step."""
        yield self.sample(self._batch_size)

    def sample(self, size: int) -> Transitions:
        """Rows drawn uniformly with replacement by torch's default generator."""
        index = torch.randint(len(self), (size,), device=self._rows.reward.device)
        return Transitions(**{n: c.index_select(0, index) for n, c in self._rows.fields().items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data are those of the saved run.

        Raises:
            UserError: they are not.
        """
        if state["digest"] != self.digest:
            raise UserError(
                f"{self._name} has changed since the run was saved: restore it, or start a new run"
            )
