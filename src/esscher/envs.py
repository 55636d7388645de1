"""Small environments with known answers, for proofs and tests.

Use them like any other: `--env.id esscher.envs:QuadraticBandit`.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

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
