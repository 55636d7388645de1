"""Robots small enough to know everything of: a point that is driven to a place."""

from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

from esscher.adapters.robots import Outcome
from esscher.experience.scenes import SceneData


class Point:
    """Drive to a place; images are noise that the state decides, and are counted."""

    cameras = ("front", "hand")
    image_size = (6, 8)
    state_dim = 2
    action_low = (-2.0, -1.0)
    action_high = (2.0, 3.0)
    fps = 20

    def __init__(self, name: str = "drive", max_steps: int = 40, lazy: bool = False):
        self.name, self.instruction = f"toy_robots:{name}", name
        self.max_steps, self.lazy = max_steps, lazy
        self.looked = 0

    def reset(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.place = generator.uniform(-1, 1, 2)
        self.goal = generator.uniform(-1, 1, 2) + 2
        # Every other episode cannot be solved by the lazy one.
        self.stuck = self.lazy and seed % 2 == 1
        self.steps = 0

    def images(self) -> np.ndarray:
        self.looked += 1
        pixels = np.random.default_rng(int(1e6 * abs(self.place[0])))
        return pixels.integers(0, 256, (2, 6, 8, 3), np.uint8)

    def state(self) -> np.ndarray:
        return self.place.astype(np.float32)

    def step(self, action: np.ndarray) -> Outcome:
        assert (action >= self.action_low).all() and (action <= self.action_high).all()
        self.steps += 1
        if not self.stuck:
            self.place = self.place + 0.1 * action
        solved = bool(np.abs(self.place - self.goal).max() < 0.3)
        return Outcome(float(-self.steps), solved, False, self.steps >= self.max_steps)

    def expert(self) -> np.ndarray:
        return np.clip(self.goal - self.place, self.action_low, self.action_high)

    def close(self) -> None:
        pass


def drive(**kwargs: Any) -> Point:
    return Point(**kwargs)


def lazy() -> Point:
    return Point(max_steps=25, lazy=True)


def stop() -> Point:
    return Point("stop")


def wide() -> Point:
    made = Point("wide")
    made.state_dim = 3
    return made


def unfinished() -> object:
    class Half:
        name = "half"

    return Half()


class Room(gymnasium.Env):
    """As a user would write it: a dictionary of images and a state."""

    instruction = "go right"
    max_steps = 9
    metadata: ClassVar[dict[str, Any]] = {"render_fps": 5}

    def __init__(self, told: bool = True, kind: Any = np.uint8):
        self.told = told
        high = 255 if kind == np.uint8 else 1
        self.observation_space = spaces.Dict(
            {
                "image_left": spaces.Box(0, high, (4, 4, 3), kind),
                "image_right": spaces.Box(0, high, (4, 4, 3), kind),
                "state": spaces.Box(-9, 9, (1,), np.float32),
            }
        )
        self.action_space = spaces.Box(-0.5, 0.5, (1,), np.float32)

    def _obs(self) -> dict[str, np.ndarray]:
        left, right = (np.full((4, 4, 3), k + int(self.x * 10), np.uint8) for k in (10, 100))
        return {"image_left": left, "image_right": right, "state": np.array([self.x], np.float32)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = 0.0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> Any:
        self.x += float(action[0])
        info = {"success": self.x > 1.9} if self.told else {}
        return self._obs(), 1.0, False, False, info

    def expert(self) -> np.ndarray:
        return np.array([0.5])


def room(**kwargs: Any) -> Room:
    return Room(**kwargs)


def floats() -> Room:
    return Room(kind=np.float32)


def flat() -> gymnasium.Env:
    return gymnasium.make("Pendulum-v1")


def nothing() -> dict[str, int]:
    return {}


_SCENES: SceneData | None = None


def scenes() -> SceneData:
    assert _SCENES is not None
    return _SCENES
