"""Environments made to catch one mistake each; use them as toys:Countdown and so on."""

from enum import Enum
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

UNIT = spaces.Box(-1.0, 1.0, (1,), np.float32)


class Toy(gymnasium.Env[Any, Any]):
    """Observations tell episode, time and copy; rewards tell the time."""

    def __init__(self, obs_space: spaces.Space | None = None, action_space: Any = UNIT):
        self.observation_space = obs_space or spaces.Box(-1e6, 1e6, (3,), np.float32)
        self.action_space = action_space
        self.episode, self.time, self.length = 0, 0, 5

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return self.observe(), float(self.time), self.time >= self.length, False, {}

    def observe(self) -> Any:
        return np.array([self.episode, self.time, self.length], np.float32)


class Countdown(Toy):
    """Episodes of random lengths that end in turn by termination, truncation, and both."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.episode = 0
        gymnasium.Env.reset(self, seed=seed)
        self.length = int(self.np_random.integers(1, 7))
        return Toy.reset(self)

    def step(self, action: Any) -> Any:
        obs, _, ended, _, info = super().step(action)
        reward = self.time + float(np.sum(action)) + float(self.np_random.normal())
        turn = self.episode % 3
        return obs, reward, ended and turn != 1, ended and turn != 0, info


class Echo(Toy):
    """Shows the action that it got, after checking that it lies in its space."""

    def __init__(self, low: Any, high: Any, dtype: str = "float32"):
        box = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=np.dtype(dtype).type)
        size = box.low.size
        super().__init__(spaces.Box(-1e9, 1e9, (size,), np.float64), box)
        self.last = np.zeros(size)

    def step(self, action: Any) -> Any:
        assert action.dtype == self.action_space.dtype and action.shape == self.action_space.shape
        assert self.action_space.contains(action), action
        self.last = np.asarray(action, np.float64).ravel()
        return super().step(action)

    def observe(self) -> Any:
        return self.last.copy()


class Choices(Toy):
    """Discrete actions whose labels start at -1."""

    def __init__(self) -> None:
        super().__init__(action_space=spaces.Discrete(3, start=-1))
        self.last = 0

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.last = int(action)
        return super().step(action)

    def observe(self) -> Any:
        return np.array([self.last, self.time, 0], np.float32)


class NotFinite(Toy):
    """Gives a reward or an observation that is not a number at the third step."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.steps = what, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == 3 and self.what == "reward":
            reward = float("nan")
        if self.steps == 3 and self.what == "obs":
            obs[1] = np.inf
        return obs, reward, terminated, truncated, info


class NotFiniteStart(Toy):
    """The first observation after eight steps is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        return super().step(action)

    def observe(self) -> Any:
        obs = super().observe()
        if self.steps > 8 and self.time == 0:
            obs[0] = np.nan
        return obs


class WrongType(Toy):
    """Declares float32 and returns float64."""

    def observe(self) -> Any:
        return np.zeros(3)


class Unbounded(Toy):
    def __init__(self) -> None:
        super().__init__(action_space=spaces.Box(-np.inf, np.inf, (1,), np.float32))


class Several(Toy):
    """A kind of action that is not supported."""

    def __init__(self) -> None:
        super().__init__(action_space=spaces.MultiDiscrete([2, 3]))


class Mixed(Toy):
    """Dictionary observations: a box and a choice."""

    def __init__(self) -> None:
        parts = {"goal": spaces.Discrete(3), "place": spaces.Box(-9, 9, (2, 2), np.float32)}
        super().__init__(spaces.Dict(parts))

    def observe(self) -> Any:
        place = np.arange(4, dtype=np.float32).reshape(2, 2)
        return {"goal": self.time % 3, "place": place + self.time - 4}


def not_an_environment() -> str:
    return "an environment"


# ---- for saving and restoring


class Dice:
    """A source of randomness that plain data cannot hold."""

    def __init__(self) -> None:
        self.rolls = 0

    def roll(self) -> float:
        self.rolls += 1
        return (self.rolls * 7919 % 101) / 101


class Opaque(Toy):
    """Its reward depends on an object that cannot be saved, and that resets do not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.dice = 30, Dice()

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        reward = self.dice.roll() + float(action[0]) + float(self.np_random.normal())
        return obs, reward, *rest


class OpaqueLater(Toy):
    """Like Opaque, but the object only appears with the first step."""

    def step(self, action: Any) -> Any:
        self.dice = getattr(self, "dice", Dice())
        obs, _, *rest = super().step(action)
        return obs, self.dice.roll(), *rest


class Growing(Toy):
    """Remembers, over resets, how often it was reset."""

    def __init__(self) -> None:
        super().__init__()
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.resets += 1
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, self.resets + float(action[0]), *rest


class Phase(Enum):
    DAY = "day"
    NIGHT = "night"


class Tricky(Toy):
    """Attributes that a careless copy would get wrong: names for one object, views, an enum."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 20
        self.phase = Phase.DAY
        self.table = {(0, 1): np.float32(0.1), 2: [1.5, None, (True, "x")]}
        self.place = np.zeros(2)
        self.same_place = self.place

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed)
        self.generator = self.np_random
        return result

    def step(self, action: Any) -> Any:
        self.place += self.generator.normal(size=2) + self.np_random.normal()
        self.phase = Phase.NIGHT if self.place[0] > 0 else Phase.DAY
        self.table[(0, 1)] = np.float32(self.table[(0, 1)] * 1.1)
        obs, _, *rest = super().step(action)
        reward = self.same_place.sum() + self.table[(0, 1)] + (self.phase is Phase.NIGHT)
        return obs, float(reward), *rest


class View(Toy):
    """One attribute is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = np.zeros(4)
        self.part = self.whole[:2]

    def step(self, action: Any) -> Any:
        self.part += 1
        obs, _, *rest = super().step(action)
        return obs, float(self.whole.sum()), *rest


class OwnState(Toy):
    """Brings its own get_state and set_state."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = Dice()

    def get_state(self) -> Any:
        return {"rolls": self.dice.rolls, "time": self.time, "episode": self.episode}

    def set_state(self, state: Any) -> None:
        self.dice.rolls, self.time, self.episode = state["rolls"], state["time"], state["episode"]

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step(action)
        return obs, self.dice.roll(), *rest


class Clocked(Toy):
    """Calls parts of its state by names that renderers have elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.screen = 0.0, np.zeros(3)

    def step(self, action: Any) -> Any:
        self.clock += 0.5
        self.screen += self.clock
        obs, _, *rest = super().step(action)
        return obs, float(self.clock + self.screen.sum()), *rest


class Randomised(gymnasium.Wrapper):
    """Draws the strength of gravity at each reset."""

    def __new__(cls) -> Any:
        from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv

        class Randomised(HalfCheetahEnv):
            def reset_model(self) -> Any:
                self.model.opt.gravity[2] = -9.81 * self.np_random.uniform(0.5, 1.5)
                return super().reset_model()

        return Randomised()


class OldGenerator(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.RandomState(0)


def randomised_by_name() -> Any:
    return OldGenerator()
