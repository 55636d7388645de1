"""Small environments with known answers, for proofs and tests.

Use them like any other: `--env.id esscher.envs:QuadraticBandit`.
"""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.errors import UserError, require

Observation = NDArray[np.float32]


class _OneState(gymnasium.Env[Observation, Any]):
    """One state, one action component in [-1, 1]."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}


class QuadraticBandit(_OneState):
    """One step with the reward -curvature a^2.

    With temperature alpha the best entropy-regularised policy is a Gaussian of variance
    alpha / (2 curvature), cut at the box.
    """

    def __init__(self, curvature: float = 10.0):
        super().__init__()
        self.curvature = curvature

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward = -self.curvature * float(action[0]) ** 2
        return np.zeros(1, np.float32), reward, True, False, {}


class GaussianReward(_OneState):
    """Rewards of N(mean, std^2) whatever one does; it never ends by itself.

    The return with discount g is Gaussian with mean m / (1 - g) and variance s^2 / (1 - g^2).
    """

    def __init__(self, mean: float = 0.5, std: float = 1.0):
        super().__init__()
        self.mean, self.std = mean, std

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward = float(self.np_random.normal(self.mean, self.std))
        return np.zeros(1, np.float32), reward, False, False, {}


class ZeroReward(GaussianReward):
    """Nothing to gain: what remains is entropy."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.0)


class Chain(gymnasium.Env[Observation, Any]):
    """States 0, 1, ..., each leading to the next whatever one does; the last one ends the task.

    Observations are one-hot, and zero after the end. With one reward a state, the discounted
    return of state k is rewards[k] + discount rewards[k + 1] + ..., for every policy.
    """

    rewards = (1.0, -0.5, 2.0, 0.25, -1.0)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (len(self.rewards),), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward = self.rewards[self.state]
        self.state += 1
        return self._observe(), reward, self.state == len(self.rewards), False, {}

    def _observe(self) -> Observation:
        return (np.arange(len(self.rewards)) == self.state).astype(np.float32)


class Corridor(gymnasium.Env[Observation, Any]):
    """Walk along an L in [-1, 1]^2, from (-0.8, -0.8) by (0.8, -0.8) to (0.8, 0.8).

    An action moves by up to 0.04 along the leg that one is on, and not across; positions are seen
    with noise. Each step costs 1, the one that reaches the end nothing, so every discounted return
    lies in [-1 / (1 - discount), 0].
    """

    leg, stride = 1.6, 0.04

    def __init__(self, noise: float = 0.03):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.noise, self.walked = noise, 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.walked = 0.0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        forward = float(np.clip(action[self.direction], -1, 1))
        self.walked = max(self.walked + self.stride * forward, 0.0)
        # Sums of strides miss the end by rounding.
        ended = self.walked >= 2 * self.leg - 1e-6
        return self._observe(), 0.0 if ended else -1.0, ended, False, {}

    @property
    def direction(self) -> int:
        """Component of the action that leads forward."""
        return int(self.walked >= self.leg - 1e-6)

    def _observe(self) -> Observation:
        place = np.clip([self.walked, self.walked - self.leg], 0.0, self.leg) - 0.8
        return (place + self.np_random.normal(0.0, self.noise, 2)).astype(np.float32)


class PointMassVector(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Many `PointMass` in step, as arrays."""

    def __init__(self, num_envs: int = 1):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.descriptor_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.place, self.time = np.zeros((num_envs, 2), np.float32), 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.place, self.time = np.zeros((self.num_envs, 2), np.float32), 0
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        actions = np.clip(np.asarray(actions, np.float32), -1, 1)
        self.place = np.clip(self.place + PointMass.stride * actions, -1, 1)
        self.time += 1
        reward = 1 - 0.5 * np.square(actions).sum(-1)
        over = np.full(self.num_envs, self.time == PointMass.horizon)
        return self._observe(), reward, over, np.zeros_like(over), {"descriptor": self.place}

    def _observe(self) -> Observation:
        time = np.full((self.num_envs, 1), self.time / PointMass.horizon, np.float32)
        return np.concatenate([self.place, time], 1)


class PointMass(gymnasium.Env[Observation, Any]):
    """Go somewhere in [-1, 1]^2 within 25 steps, each of up to 0.045 along both axes.

    A step pays 1 - |a|^2 / 2, so standing still pays best wherever one should have gone. An episode
    is described by its last position p, and worth 25 - |p|^2 / (2 x 25 x 0.045^2) at best.
    """

    horizon, stride = 25, 0.045
    vector_entry_point = PointMassVector

    def __init__(self) -> None:
        self._vector = PointMassVector(1)
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space
        self.descriptor_space = self._vector.descriptor_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        return self._vector.reset()[0][0], {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        obs, reward, over, _, info = self._vector.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(over[0]), False, {"descriptor": info["descriptor"][0]}


class CombinationLock(gymnasium.Env[Observation, Any]):
    """`horizon` right choices among ten open it: reward 1. One wrong choice and it is dead.

    There are two good states and a dead one. At each step one latent action is right in each good
    state, and leads to either good state with probability 1/2; any other leads to the dead one, for
    good. A right action at the last step pays 1; a fall pays a decoy of 0.1 with probability 1/2.
    So the best return is 1, and whoever falls has 0.05 on average.

    The latent action is drawn from softmax(action / 0.1) over ten components. The paper's actions
    are unbounded; here each component lies in [-5, 5], because a box must be finite: a Gaussian of
    deviation 1 around 0, as the paper's policies start, leaves it once in 1.7 million draws, and
    within it a choice can be made with any certainty (one component 5 above the others: 1 - 2e-21).

    An observation is the one-hot state beside the one-hot time, with noise of deviation 0.1 on each
    number, padded with zeros and multiplied by a Hadamard matrix; last comes the time itself.

    Args:
        horizon: length of every episode.
        decoy: on_fall pays it at the fall, as in the paper; last_step at the end of every episode
            that failed, as in the authors' code.
        combination: seed of the right choices.
        noise: deviation of the observation's noise.
    """

    num_latent_actions, temperature, reward_of_decoy = 10, 0.1, 0.1
    dead = 2

    def __init__(
        self, horizon: int = 5, decoy: str = "on_fall", combination: int = 0, noise: float = 0.1
    ):
        require("horizon", horizon, horizon >= 1, ">= 1")
        require("decoy", decoy, decoy in ("on_fall", "last_step"), "on_fall or last_step")
        self.horizon, self.decoy, self.noise = horizon, decoy, noise
        shape = (horizon, self.dead)
        draw = np.random.default_rng(combination)
        self.right = draw.integers(self.num_latent_actions, size=shape)
        size = 2 ** math.ceil(math.log2(horizon + 4))
        index = np.arange(size)
        self.mixing = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
        self.observation_space = spaces.Box(-np.inf, np.inf, (size + 1,), np.float32)
        self.action_space = spaces.Box(-5.0, 5.0, (self.num_latent_actions,), np.float32)
        self.state, self.time = 0, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.time = int(self.np_random.integers(2)), 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        choice = self._choose(np.asarray(action, np.float64))
        tempted = self.np_random.random() < 0.5
        following = int(self.np_random.integers(2))
        alive = self.state != self.dead
        opened = alive and choice == self.right[self.time, self.state]
        last = self.time == self.horizon - 1
        fell = alive and not opened
        reward = 1.0 if opened and last else 0.0
        if tempted and (fell if self.decoy == "on_fall" else last and not opened):
            reward = self.reward_of_decoy
        self.state = following if opened else self.dead
        self.time += 1
        return self._observe(), reward, last, False, {}

    def _choose(self, action: NDArray[np.float64]) -> int:
        weight = np.exp((action - action.max()) / self.temperature).cumsum()
        chosen = np.searchsorted(weight, self.np_random.random() * weight[-1], side="right")
        return min(int(chosen), self.num_latent_actions - 1)

    def _observe(self) -> Observation:
        plain = np.zeros(len(self.mixing))
        plain[: self.horizon + 4] = self.np_random.normal(0.0, self.noise, self.horizon + 4)
        plain[self.state] += 1
        plain[3 + self.time] += 1
        return np.append(self.mixing @ plain, self.time).astype(np.float32)


class FiniteHorizon(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Any task with a box of observations, for methods that have one policy a time step.

    Every episode takes exactly `horizon` steps, and the time is the last component of an
    observation. A task that ends earlier stays where it ended, and pays nothing, until then.

    Args:
        id: of a Gymnasium task.
        horizon: length of every episode.
        settings: of the task.
    """

    def __init__(self, id: str, horizon: int, **settings: Any):  # noqa: A002
        require("horizon", horizon, horizon >= 1, ">= 1")
        super().__init__(gymnasium.make(id, max_episode_steps=horizon, **settings))
        space = self.env.observation_space
        if not isinstance(space, spaces.Box):
            raise UserError(f"FiniteHorizon needs observations in a box, and {id} has {space}")
        size = int(np.prod(space.shape)) + 1
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.horizon, self.time, self.ended = horizon, 0, False
        self.last = np.zeros(size, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self.time, self.ended = 0, False
        return self._observe(obs), info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, info = 0.0, {}
        obs = self.last[:-1]
        self.time += 1
        if not self.ended:
            obs, reward, self.ended, _, info = self.env.step(action)
        return self._observe(obs), float(reward), self.time == self.horizon, False, info

    def _observe(self, obs: Any) -> Observation:
        self.last = np.append(np.ravel(obs), self.time).astype(np.float32)
        return self.last.copy()


class _TwoRewards(gymnasium.Env[Observation, Any]):
    """A first reward by chance, then one by choice: what was earned first is not observed.

    `outcomes[state][action]` lists (probability, reward); both actions do the same at first.
    """

    outcomes: tuple[tuple[tuple[tuple[float, float], ...], ...], ...]

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        outcomes = self.outcomes[self.state][int(action)]
        chances, rewards = zip(*outcomes, strict=True)
        reward = float(self.np_random.choice(rewards, p=chances))
        self.state += 1
        return self._observe(), reward, self.state == 2, False, {}

    def _observe(self) -> Observation:
        return (np.arange(2) == self.state).astype(np.float32)


class GambleAfterLuck(_TwoRewards):
    """-4 or +4 by chance; then nothing (action 0), or a gamble of +3 (0.75) and -5 (0.25).

    The worst 60 percent of returns are best, -11/6 on average, if one gambles after -4 alone.
    """

    outcomes = (
        (((0.5, -4.0), (0.5, 4.0)),) * 2,
        (((1.0, 0.0),), ((0.75, 3.0), (0.25, -5.0))),
    )


class AddToTen(_TwoRewards):
    """0 or 10 by chance; then 0 (action 0) or 10 (action 1). A return of exactly 10 is possible
    for whoever knows what came first.
    """

    outcomes = ((((0.5, 0.0), (0.5, 10.0)),) * 2, (((1.0, 0.0),), ((1.0, 10.0),)))


class TwoGaps(gymnasium.Env[Observation, Any]):
    """A point goes from the left through one of two gaps in a wall to the goal that is wanted.

    It starts at x = -0.8 and |y| < 0.1; the wall stands at x = 0, its gaps lie at y = +-0.5 and are 0.3
    wide. Whoever touches the wall is out. At x = 0.8 the episode ends, and is worth 1 within 0.15 of
    the wanted goal, one of four. Either gap leads to all of them, so play through both has two modes.
    An observation is the place and the goal, an action a velocity; an episode is described by where it
    passed the wall (0: not at all).
    """

    stride, gap, half_gap, finish, reach = 0.08, 0.5, 0.15, 0.8, 0.15
    goals = (-0.6, -0.2, 0.2, 0.6)
    goal_columns, place_columns = (2, 3), (0, 1)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.descriptor_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.place, self.goal, self.passed = np.zeros(2), 0.0, 0.0
        self.time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = np.array([-self.finish, self.np_random.uniform(-0.1, 0.1)])
        self.goal, self.passed, self.time = float(self.np_random.choice(self.goals)), 0.0, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        before = self.place
        moved = before + self.stride * np.clip(np.asarray(action, np.float64), -1, 1)
        self.place, self.time = np.clip(moved, -1, 1), self.time + 1
        hit = False
        if (before[0] < 0) != (self.place[0] < 0):
            share = before[0] / (before[0] - self.place[0])
            height = float(before[1] + share * (self.place[1] - before[1]))
            hit = abs(abs(height) - self.gap) > self.half_gap
            self.passed = 0.0 if hit else height
        arrived = not hit and self.place[0] >= self.finish
        reward = float(arrived and abs(self.place[1] - self.goal) < self.reach)
        described = {"descriptor": np.array([self.passed], np.float32)}
        return self._observe(), reward, bool(hit or arrived), self.time == 60, described

    def _observe(self) -> Observation:
        return np.array([*self.place, self.finish, self.goal], np.float32)


class Dodge(gymnasium.Env[Observation, Any]):
    """A point moves on by 0.05 a step, and steers to either side of what stands in its way.

    From x = 0, y = 0 (or where the reset's options say: `steps`, `height`); the action is the velocity
    along y, and y += 0.05 u with noise of deviation
    0.005. Touching what stands at 0.9 < x < 1.1, |y| < 0.35 ends the episode with 0; being past it is
    worth 1. With a gripper there is a second number, which should be below 0 up to x = 0.5 and above 0
    from there on. An episode is described by its last y, and with a gripper by the steps that it was
    late (whoever was never late enough to close has all steps from x = 0.5 on).
    """

    stride, noise, target, drift = 0.05, 0.005, 0.6, 4.0
    near, far, half_width, closing = 0.9, 1.1, 0.35, 0.5

    def __init__(self, gripper: bool = False):
        size = 2 if gripper else 1
        self.gripper = gripper
        self.observation_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (size,), np.float32)
        self.descriptor_space = spaces.Box(-2.0, 30.0, (size,), np.float32)
        self.steps, self.height, self.late, self.closed, self.fresh = 0, 0.0, 0, False, True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        start = options or {}
        self.steps, self.height = int(start.get("steps", 0)), float(start.get("height", 0.0))
        self.late, self.closed, self.fresh = 0, False, True
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = np.clip(np.asarray(action, np.float64), -1, 1)
        if self.gripper and self._x >= self.closing - 1e-6:
            self.closed = self.closed or bool(action[1] > 0)
            self.late += not self.closed
        self.steps, self.fresh = self.steps + 1, False
        drawn = float(self.np_random.normal(0.0, self.noise))
        self.height += self.stride * float(action[0]) + drawn
        inside = self.near < self._x < self.far - 1e-6
        hit = inside and abs(self.height) < self.half_width
        past = self._x >= self.far - 1e-6
        told = [self.height, self.late] if self.gripper else [self.height]
        described = {"descriptor": np.array(told, np.float32)}
        return self._observe(), float(past and not hit), bool(hit or past), False, described

    @property
    def _x(self) -> float:
        return self.stride * self.steps

    def _observe(self) -> Observation:
        return np.array([self._x, self.height], np.float32)
