"""Demonstrations of robots that see: images, states, actions, and an instruction an episode.

A window is a scene and the `horizon` actions from it on. Those beyond the end of the episode repeat the
last one, and their mask is False.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from esscher.errors import UserError, require
from esscher.runtime.state import Stateful
from esscher.types import RobotSpec, SceneChunks, Scenes


@dataclass(frozen=True, kw_only=True)
class SceneData:
    """Logged episodes, one after another, each in the order of time."""

    images: UInt8[Tensor, "b c h w 3"]
    state: Float[Tensor, "b s"]
    action: Float[Tensor, "b a"]
    """In [-1, 1]."""
    episode: Int[Tensor, "b"]
    """Which episode each row is of, 0, 1, ... in order."""
    task: Int[Tensor, "e"]
    """Of each episode: which of the specification's instructions it follows."""
    spec: RobotSpec
    name: str
    """Where it came from, for messages and reports."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Whatever else the data say of themselves."""

    def __len__(self) -> int:
        return len(self.state)

    @property
    def num_episodes(self) -> int:
        return len(self.task)

    def lengths(self) -> Int[Tensor, "e"]:
        """Rows of each episode."""
        return torch.bincount(self.episode, minlength=self.num_episodes)

    def of_episodes(self, numbers: Sequence[int]) -> "SceneData":
        """These episodes alone, in this order."""
        lengths = self.lengths()
        first = lengths.cumsum(0) - lengths
        ranges = [torch.arange(int(first[k]), int(first[k] + lengths[k])) for k in numbers]
        rows = torch.cat(ranges)
        kept = torch.as_tensor(list(numbers))
        return replace(
            self,
            images=self.images[rows],
            state=self.state[rows],
            action=self.action[rows],
            episode=torch.arange(len(kept)).repeat_interleave(lengths[kept]),
            task=self.task[kept],
        )

    def digest(self) -> str:
        """SHA-256 of every column: two data sets with one digest are the same."""
        total = hashlib.sha256(repr(self.spec).encode())
        for column in (self.images, self.state, self.action, self.episode, self.task):
            total.update(column.contiguous().cpu().numpy().data)
        return total.hexdigest()


class SceneWindows(Stateful):
    """Uniform batches, with replacement, of scenes with what was done from there on.

    The rows are not part of the state; their digest is, so that a run is never resumed on other data.

    Args:
        data: demonstrations.
        horizon: h, actions of a window, >= 1.
        batch_size: windows a batch, >= 1.
        instruction: tokens of each of the specification's instructions, padded on the right, and what
            of them is no padding.
        device: where batches are wanted; the rows stay where they are.

    Raises:
        UserError: a chunk is longer than the shortest episode, or batch_size is out of range.
    """

    def __init__(
        self,
        data: SceneData,
        horizon: int,
        batch_size: int,
        instruction: tuple[Int[Tensor, "i l"], Tensor],
        *,
        device: torch.device | str = "cpu",
    ):
        require("horizon", horizon, horizon >= 1, ">= 1")
        require("batch_size", batch_size, 1 <= batch_size <= len(data), f"in [1, {len(data)}]")
        lengths = data.lengths()
        if horizon > int(lengths.min()):
            raise UserError(
                f"a chunk of {horizon} actions is longer than the shortest episode of {data.name}, "
                f"which has {int(lengths.min())}: shorten the chunk, or leave such episodes out"
            )
        self._data, self._batch_size, self._device = data, batch_size, device
        self._tokens, self._token_mask = instruction
        self._end = (lengths.cumsum(0) - 1)[data.episode]
        """Last row of the episode of each row."""
        self._steps = torch.arange(horizon)
        self.digest = data.digest()

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, step: int) -> Iterator[SceneChunks]:
        """The one batch of this step."""
        yield self.sample(self._batch_size)

    def sample(self, size: int) -> SceneChunks:
        """Windows drawn uniformly with replacement by torch's default generator."""
        return self.at(torch.randint(len(self), (size,)))

    def at(self, index: Int[Tensor, "b"] | Sequence[int]) -> SceneChunks:
        """The windows that begin with these rows."""
        data, index = self._data, torch.as_tensor(index)
        row = index.unsqueeze(-1) + self._steps
        inside = torch.minimum(row, self._end[index].unsqueeze(-1))
        task = data.task[data.episode[index]]
        scenes = Scenes(
            images=data.images[index],
            state=data.state[index],
            instruction=self._tokens[task],
            instruction_mask=self._token_mask[task],
        )
        chunks = SceneChunks(scenes=scenes, action=data.action[inside], mask=inside == row)
        return chunks.to(self._device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the data are those of the saved run.

        Raises:
            UserError: they are not.
        """
        if state["digest"] != self.digest:
            raise UserError(
                f"{self._data.name} has changed since the run was saved: restore it, or start a new "
                "run"
            )
