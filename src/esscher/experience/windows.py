"""Windows of consecutive steps of logged episodes, with goals that were reached later.

episode      o_0 a_0  o_1 a_1  ...  o_T-1 a_T-1
window       `length` steps in a row; up to `before` of them before the first one, up to `after`
beyond the last one, where the nearest step of the episode stands in, and `mask` is False
goal         `goal_length` observations in a row, drawn from those of the same episode that lie
strictly after the window: uniformly, or sooner ones more often
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from esscher.errors import UserError, require
from esscher.experience.offline import Dataset
from esscher.runtime.state import Stateful
from esscher.types import Record, record


@record
class WindowBatch(Record):
    """Windows, with all entries of their observations."""

    obs: Float[Tensor, "b w o"]
    action: Float[Tensor, "b w a"]
    mask: Bool[Tensor, "b w"]
    """Which steps are of the episode itself."""
    goal: Float[Tensor, "b g k"]
    """Later observations, of the entries that goals are about; 0 where there is none."""
    has_goal: Bool[Tensor, "b"]
    """Whether enough of the episode comes after the window."""


class Windows(Stateful):
    """Uniform batches, with replacement, of all windows of a data set: one at every step.

    The rows are not part of the state; their digest is, so that a run is never resumed on other data.

    Args:
        data: episodes of continuous actions.
        length: w, steps in a window.
        batch_size: windows a batch.
        before: steps of a window that may lie before the episode, < length.
        after: steps of a window that may lie beyond it, < length.
        goal_length: g, observations of a goal.
        about: entries of an observation that goals hold; none: no goals.
        goal_discount: how much less often a goal one step later is drawn, in (0, 1]; 1: uniformly.
        what: a name for messages.
        device: where the rows live.

    Raises:
        UserError: an episode is shorter than the window (but for the steps that may lie outside of
            it), or a number is out of range.
    """

    def __init__(
        self,
        data: Dataset,
        length: int,
        batch_size: int,
        *,
        before: int = 0,
        after: int = 0,
        goal_length: int = 1,
        about: tuple[int, ...] = (),
        goal_discount: float = 1.0,
        what: str = "window",
        device: torch.device | str = "cpu",
    ):
        require("before", before, 0 <= before < length, f"in [0, {length})")
        require("after", after, 0 <= after < length, f"in [0, {length})")
        require("goal_length", goal_length, goal_length >= 1, ">= 1")
        require("goal_discount", goal_discount, 0 < goal_discount <= 1, "in (0, 1]")
        ends = data.ends()
        lengths = torch.diff(ends, prepend=ends.new_tensor([-1]))
        shortest = int(lengths.min())
        if length - before - after > shortest:
            outside = f" with up to {before + after} steps outside of it" if before + after else ""
            raise UserError(
                f"a {what} of {length} steps{outside} does not fit into the shortest episode of "
                f"{data.name}, which has {shortest}: shorten the {what}, or leave such episodes out"
            )
        count = lengths + before + after - length + 1
        total = int(count.sum())
        if not 1 <= batch_size <= total:
            raise UserError(
                f"batch_size must be in [1, {total}], the windows of {data.name}, got {batch_size}"
            )
        rows = data.transitions
        self._obs, self._action = rows.obs.to(device), rows.action.to(device)
        self._end = ends.repeat_interleave(count).to(device)
        """Of each window: the last row of its episode."""
        self._begin = (ends - lengths + 1).repeat_interleave(count).to(device)
        first_of_episode = (count.cumsum(0) - count).repeat_interleave(count)
        self._first = self._begin + (torch.arange(total) - first_of_episode - before).to(device)
        """Row of its first step, which may lie outside of the episode."""
        self._steps = torch.arange(length, device=device)
        self._goal_steps = torch.arange(goal_length, device=device)
        self._about = torch.tensor(about, dtype=torch.long, device=device)
        self._discount, self._batch_size, self._name = goal_discount, batch_size, data.name
        self.digest = data.digest()

    def __len__(self) -> int:
        return len(self._first)

    def batches(self, step: int) -> Iterator[WindowBatch]:
        """The one batch of this step."""
        yield self.sample(self._batch_size)

    def sample(self, size: int) -> WindowBatch:
        """Windows drawn uniformly with replacement by torch's default generator, and their goals."""
        index = torch.randint(len(self), (size,), device=self._first.device)
        return self.at(index, torch.rand(size, device=self._first.device))

    def at(self, index: Int[Tensor, "b"], uniform: Float[Tensor, "b"]) -> WindowBatch:
        """The windows with these numbers; `uniform`, in [0, 1), chooses among their goals."""
        begin, end, first = self._begin[index], self._end[index], self._first[index]
        row = first.unsqueeze(-1) + self._steps
        inside = row.clamp(begin.unsqueeze(-1), end.unsqueeze(-1))
        earliest = first + len(self._steps)
        choices = end - (len(self._goal_steps) - 1) - earliest + 1
        has_goal = choices > 0
        chosen = later(uniform, choices, self._discount).clamp(min=0)
        # Rounding may reach the number of choices itself.
        place = earliest + torch.minimum(chosen, (choices - 1).clamp(min=0))
        goal_row = (place.unsqueeze(-1) + self._goal_steps).clamp(max=end.unsqueeze(-1))
        goal = self._obs[goal_row][..., self._about]
        return WindowBatch(
            obs=self._obs[inside],
            action=self._action[inside],
            mask=inside == row,
            goal=torch.where(has_goal.view(-1, 1, 1), goal, 0.0),
            has_goal=has_goal,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data are those of the saved run.

        Raises:
            UserError: they are not.
        """
        if state["digest"] != self.digest:
            raise UserError(
                f"{self._name} has changed since the run was saved: restore it, or start a new run"
            )


def later(
    uniform: Float[Tensor, "b"], choices: Int[Tensor, "b"], discount: float
) -> Int[Tensor, "b"]:
    """Numbers from 0 below `choices`, k with a probability in proportion to discount^k.

    Args:
        uniform: in [0, 1), of which this is the inverse distribution function.
        choices: how many there are; where there are none, the number means nothing.
        discount: in (0, 1]; 1: all are equally likely.
    """
    if discount == 1:
        return (uniform * choices).long()
    mass = 1 - discount ** choices.clamp(min=0).to(uniform.dtype)
    return (torch.log1p(-uniform * mass) / math.log(discount)).long()
