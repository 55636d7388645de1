"""What an episode turned out to be, as a few numbers: descriptors for methods that seek diversity.

A task describes its episodes by itself if it has a `descriptor_space` (a bounded Box) and puts
`info["descriptor"]` into the last step of each; or one of these wrappers does it for MuJoCo tasks.
"""

from dataclasses import replace
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters.gymnasium import make
from esscher.errors import UserError
from esscher.experiment import EnvConfig

Descriptor = Literal["own", "feet_contact", "final_position"]

FEET = {
    "ant": ("left_ankle_geom", "right_ankle_geom", "third_ankle_geom", "fourth_ankle_geom"),
    "half_cheetah": ("bfoot", "ffoot"),
    "walker2d": ("foot_geom", "foot_left_geom"),
    "hopper": ("foot_geom",),
}
"""Geometries of Gymnasium's models that are feet."""


class _Described(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds `info["descriptor"]` to every step of a MuJoCo task."""

    def __init__(self, env: gymnasium.Env[Any, Any], low: list[float], high: list[float]):
        super().__init__(env)
        if not hasattr(env.unwrapped, "model"):
            raise UserError(
                "descriptors feet_contact and final_position read MuJoCo's state, and this task is "
                "not MuJoCo's: let it describe itself (method.descriptor own)"
            )
        self.descriptor_space = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "descriptor": self.describe()}

    def describe(self) -> NDArray[np.float32]:
        raise AssertionError


class FeetContact(_Described):
    """The share of steps at whose end each foot touches the floor, in [0, 1]."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        model: Any = getattr(env.unwrapped, "model", None)
        names = {model.geom(k).name: k for k in range(model.ngeom)} if model is not None else {}
        feet = next((feet for feet in FEET.values() if set(feet) <= names.keys()), ())
        super().__init__(env, [0.0] * len(feet), [1.0] * len(feet))
        if not feet or "floor" not in names:
            raise UserError(
                f"feet_contact knows the feet of {', '.join(FEET)}, and none of them is here: let "
                "the task describe itself (method.descriptor own)"
            )
        self.floor, self.feet = names["floor"], [names[foot] for foot in feet]
        self.touched, self.steps = np.zeros(len(feet)), 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self.touched[:], self.steps = 0, 0
        return self.env.reset(**options)

    def describe(self) -> NDArray[np.float32]:
        unwrapped: Any = self.env.unwrapped
        pairs = unwrapped.data.contact.geom
        touching = pairs[(pairs == self.floor).any(1)]
        self.touched += [bool((touching == foot).any()) for foot in self.feet]
        self.steps += 1
        return (self.touched / self.steps).astype(np.float32)


class FinalPosition(_Described):
    """Where the body stands at the end, metres: the first two coordinates of MuJoCo's state."""

    def __init__(self, env: gymnasium.Env[Any, Any], bound: float):
        super().__init__(env, [-bound] * 2, [bound] * 2)

    def describe(self) -> NDArray[np.float32]:
        unwrapped: Any = self.env.unwrapped
        return unwrapped.data.qpos[:2].astype(np.float32)


def with_descriptor(env: EnvConfig, descriptor: Descriptor, bound: float) -> EnvConfig:
    """The same task behind a wrapper that describes its episodes, as plain data.

    Args:
        env: the task.
        descriptor: own leaves it as it is.
        bound: of final_position, metres.
    """
    if descriptor == "own":
        return env
    told: dict[str, Any] = {
        "described_task": env.id,
        "described_by": descriptor,
        "described_bound": bound,
        "described_max_episode_steps": env.max_episode_steps or 0,
    }
    return replace(
        env, id=f"{__name__}:described", max_episode_steps=None, kwargs={**env.kwargs, **told}
    )


def described(
    described_task: str,
    described_by: Descriptor,
    described_bound: float,
    described_max_episode_steps: int = 0,
    **kwargs: Any,
) -> _Described:
    """The factory behind `with_descriptor`; `kwargs` go to the task."""
    limit = described_max_episode_steps or None
    env = make(EnvConfig(id=described_task, max_episode_steps=limit, kwargs=kwargs))
    return (
        FeetContact(env) if described_by == "feet_contact" else FinalPosition(env, described_bound)
    )
