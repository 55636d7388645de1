"""Stocks: what has been earned so far, as part of the observation.

A stock starts at a chosen c_0 and moves by c' = (c + r) / discount. Appended to an observation are
three numbers, in this order: the stock, the one that the episode began with, and the number of
steps since then. A policy needs the first; the others let a learner reckon what the stock would be
had the episode begun with another one.
"""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters.gymnasium import make
from esscher.errors import UserError
from esscher.experiment import EnvConfig
from esscher.runtime.rng import Phase, mix

NUM_COLUMNS = 3
LARGEST = 1e30


class StockAugmented(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Appends stock, first stock and time to the flat observations of a task.

    `reset(options={"stock": -4.0})` starts an episode from that stock, whatever the range is.

    Args:
        env: with one-dimensional Box observations.
        discount: in (0, 1].
        start: range that the first stock of an episode is drawn from.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        discount: float,
        start: tuple[float, float] = (0.0, 0.0),
    ):
        super().__init__(env)
        space = env.observation_space
        if not (isinstance(space, spaces.Box) and len(space.shape) == 1):
            raise UserError(f"stocks need flat Box observations, got {space}: flatten them first")
        if not 0 < discount <= 1:
            raise UserError(f"the discount of stocks must be in (0, 1], got {discount}")
        if not start[0] <= start[1]:
            raise UserError(f"the range of first stocks must be increasing, got {start}")
        low, high = np.array([-np.inf, -np.inf, 0]), np.full(NUM_COLUMNS, np.inf)
        self.observation_space = spaces.Box(
            np.concatenate([space.low, low]).astype(np.float32),
            np.concatenate([space.high, high]).astype(np.float32),
            dtype=np.float32,
        )
        self.discount, self.start = discount, start
        self.generator = np.random.default_rng()
        self.first = self.stock = 0.0
        self.time = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        if seed is not None:
            # Not the task's own stream, or first stocks would go with its first chances.
            self.generator = np.random.default_rng(mix(seed, Phase.RESET))
        options = dict(options or {})
        chosen = options.pop("stock", None)
        obs, info = self.env.reset(seed=seed, options=options or None)
        self.first = float(self.generator.uniform(*self.start) if chosen is None else chosen)
        self.stock, self.time = self.first, 0
        return self._with_stock(obs), info

    def step(self, action: Any) -> tuple[NDArray[np.float32], Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.stock = (self.stock + float(reward)) / self.discount
        self.time += 1
        if abs(self.stock) > LARGEST:
            raise UserError(
                f"the stock grows like discount^-t and has left the range of numbers at step "
                f"{self.time} of an episode: set --env.max-episode-steps below that, or raise "
                f"--method.discount, which is {self.discount}"
            )
        return self._with_stock(obs), reward, terminated, truncated, info

    def _with_stock(self, obs: NDArray[Any]) -> NDArray[np.float32]:
        return np.concatenate([obs, [self.stock, self.first, self.time]]).astype(np.float32)


def with_stock(env: EnvConfig, discount: float, start: tuple[float, float]) -> EnvConfig:
    """The same task behind `StockAugmented`, as plain data."""
    stock: dict[str, Any] = {
        "stock_task": env.id,
        "stock_discount": discount,
        "stock_low": start[0],
        "stock_high": start[1],
        "stock_max_episode_steps": env.max_episode_steps or 0,
    }
    return replace(
        env,
        id=f"{__name__}:augmented",
        max_episode_steps=None,
        kwargs={**env.kwargs, **stock},
    )


def augmented(
    stock_task: str,
    stock_discount: float,
    stock_low: float,
    stock_high: float,
    stock_max_episode_steps: int = 0,
    **kwargs: Any,
) -> StockAugmented:
    """The factory behind `with_stock`; `kwargs` go to the task."""
    limit = stock_max_episode_steps or None
    env = make(EnvConfig(id=stock_task, max_episode_steps=limit, kwargs=kwargs))
    return StockAugmented(env, stock_discount, (stock_low, stock_high))
