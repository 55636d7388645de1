"""Tasks of robots that see: images and a state come out, actions in the task's own box go in.

Images are made only when somebody asks for them, since rendering takes far longer than a step: a policy
that executes chunks of actions looks once a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters.imports import users_own
from esscher.errors import UserError, nearest


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


def robot_task(
    name: str,
    *,
    cameras: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> RobotTask:
    """A task by its name.

    Args:
        name: metaworld:TASK, ogbench:MAZE, gymnasium_robotics:MAZE, or module:factory, which returns
            a `RobotTask`, or a gymnasium.Env as `GymnasiumTask` takes it.
        cameras: which, in this order; by default the task's own.
        size: of an image, rows and columns; by default the task's own.
        kwargs: for `MetaWorldTask` or `MazeTask`, or for the factory.

    Raises:
        UserError: there is no such task, it cannot be made with these arguments, or it has other
            cameras or images than asked for.
    """
    kwargs = dict(kwargs or {})
    kind, _, rest = name.partition(":")
    if not rest:
        raise UserError(
            f"no task {name!r}: give metaworld:TASK, ogbench:MAZE, gymnasium_robotics:MAZE, or "
            "module:factory for your own"
        )
    try:
        if kind == "metaworld":
            from esscher.adapters.metaworld import MetaWorldTask

            return MetaWorldTask(rest, cameras=cameras, size=size, **kwargs)
        if kind in ("ogbench", "gymnasium_robotics"):
            return _maze_task(name, bool(cameras) or size is not None, kwargs)
        made = users_own(name, "task")(**kwargs)
    except TypeError as error:
        raise UserError(f"task {name!r} cannot be made: {error}") from error
    task = GymnasiumTask(made, name, cameras) if isinstance(made, gymnasium.Env) else made
    missing = [part for part in (*RobotTask.__annotations__, "reset") if not hasattr(task, part)]
    if missing:
        raise UserError(
            f"{name!r} returned a {type(made).__name__} without {', '.join(missing)}: return an "
            "esscher.adapters.robots.RobotTask or a gymnasium.Env"
        )
    if cameras and tuple(task.cameras) != tuple(cameras):
        raise UserError(
            f"{name} sees by {', '.join(task.cameras)}, not by {', '.join(cameras)}: leave the cameras "
            "out, or have the factory make those"
        )
    if size is not None and tuple(task.image_size) != tuple(size):
        rows, columns = task.image_size
        raise UserError(
            f"{name} has images of {rows} x {columns}, not {size[0]} x {size[1]}: ask for its own "
            "size, or have the factory make the other"
        )
    return task


def _maze_task(name: str, seen: bool, kwargs: Mapping[str, Any]) -> RobotTask:
    from esscher.adapters.mazes import MazeTask, simulator_of

    if seen:
        raise UserError(f"{name} has no images: leave out --images and --cameras")
    return MazeTask(simulator_of(name), **kwargs)


class GymnasiumTask:
    """An environment whose observations are a dictionary of images and a state.

    It has uint8 boxes (h w 3) whose names begin with image (image_front is the camera front; image
    alone is the camera image), a box named state of one axis, bounded actions, and
    info["success"] at each step. Beside that it has the attributes `instruction`; `max_steps`, if it
    was not made with a limit; and `expert`, a function without arguments, if it has one.

    Args:
        env: the environment.
        name: of the task, for messages and data.
        cameras: which of its images, in this order; all by default.

    Raises:
        UserError: one of these is missing or has another type.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], name: str, cameras: Sequence[str] = ()):
        self.name, self._env = name, env
        parts = _boxes(env.observation_space, name)
        keys = {key.removeprefix("image").strip("_.") or "image": key for key in parts}
        keys = {camera: key for camera, key in keys.items() if key.startswith("image")}
        for camera in cameras:
            if camera not in keys:
                raise UserError(f"{name} has no camera {camera!r}: {nearest(camera, keys)}")
        self.cameras = tuple(cameras) or tuple(keys)
        self._keys = [keys[camera] for camera in self.cameras]
        sizes = {parts[key].shape[:2] for key in self._keys}
        if len(sizes) != 1:
            shown = ", ".join(f"{key} {list(parts[key].shape)}" for key in self._keys)
            raise UserError(f"{name} must have images, all of one size: it has {shown or 'none'}")
        rows, columns = sizes.pop()
        self.image_size = (int(rows), int(columns))
        self.state_dim = int(parts["state"].shape[0])
        box = env.action_space
        bounded = isinstance(box, spaces.Box) and len(box.shape) == 1 and box.is_bounded()
        if not bounded:
            raise UserError(f"{name} must act in a bounded box of one axis, not in {box}")
        self.action_low = tuple(map(float, box.low))  # type: ignore[attr-defined]
        self.action_high = tuple(map(float, box.high))  # type: ignore[attr-defined]
        self.instruction = str(self._attribute("instruction", "what the robot is told to do"))
        limit = env.spec and env.spec.max_episode_steps
        self.max_steps = int(limit or self._attribute("max_steps", "when an episode is cut"))
        self.fps = int(env.metadata.get("render_fps", 10))
        self._obs: Any = None
        self._steps = 0

    def reset(self, seed: int) -> None:
        self._obs, self._steps = self._env.reset(seed=seed)[0], 0

    def images(self) -> NDArray[np.uint8]:
        return np.stack([np.asarray(self._obs[key], np.uint8) for key in self._keys])

    def state(self) -> NDArray[np.float32]:
        return np.asarray(self._obs["state"], np.float32).copy()

    def step(self, action: NDArray[Any]) -> Outcome:
        action = np.clip(action, self.action_low, self.action_high)
        native = action.astype(self._env.action_space.dtype)
        self._obs, reward, terminated, truncated, info = self._env.step(native)
        self._steps += 1
        if "success" not in info:
            raise UserError(f'{self.name} does not say info["success"] at each step: add it')
        return Outcome(
            reward=float(reward),
            success=bool(info["success"]),
            terminated=bool(terminated),
            truncated=bool(truncated) or self._steps >= self.max_steps,
        )

    def expert(self) -> NDArray[np.float32]:
        if not self._env.has_wrapper_attr("expert"):
            raise UserError(f"{self.name} has no scripted expert: give it a function `expert`")
        return np.asarray(self._env.get_wrapper_attr("expert")(), np.float32)

    def close(self) -> None:
        self._env.close()

    def _attribute(self, attribute: str, what: str) -> Any:
        if not self._env.has_wrapper_attr(attribute):
            raise UserError(f"{self.name} does not say {what}: give it the attribute {attribute}")
        return self._env.get_wrapper_attr(attribute)


def _boxes(space: Any, name: str) -> dict[str, spaces.Box]:
    """The images and the state of an observation."""
    parts: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {}
    state = parts.get("state")
    if not isinstance(state, spaces.Box) or len(state.shape) != 1:
        raise UserError(
            f"{name} must observe a dictionary with images and a box `state` of one axis, not {space}"
        )
    for key, part in parts.items():
        if key.startswith("image") and not (
            isinstance(part, spaces.Box)
            and part.dtype == np.uint8
            and len(part.shape) == 3
            and part.shape[2] == 3
        ):
            raise UserError(f"{name} must have uint8 images (h, w, 3), but {key} is {part}")
    return {key: part for key, part in parts.items() if key == "state" or key.startswith("image")}
