"""Tasks of robots that see: images and a state come out, actions in the task's own box go in.

Images are made only when somebody asks for them, since rendering takes far longer than a step: a policy
that executes chunks of actions looks once a chunk.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outcome:
    """Of one step."""

    reward: float
    success: bool
    """Whether the task is solved now."""
    terminated: bool
    truncated: bool


class RobotTask(Protocol):
    """One copy of a task."""

    name: str
    """Such as metaworld:reach-v3."""
    instruction: str
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """Rows and columns."""
    state_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_steps: int
    """After which an episode is truncated."""

    def reset(self, seed: int) -> None:
        """Begin the episode that follows from the seed."""
        ...

    def images(self) -> NDArray[np.uint8]:
        """What the cameras see now: c h w 3."""
        ...

    def state(self) -> NDArray[np.float32]:
        """Of the robot now: s."""
        ...

    def step(self, action: NDArray[Any]) -> Outcome:
        """Act, in the task's own units."""
        ...

    def expert(self) -> NDArray[np.float32]:
        """What a scripted expert would do now.

        Raises:
            UserError: the task has none.
        """
        ...

    def close(self) -> None: ...
