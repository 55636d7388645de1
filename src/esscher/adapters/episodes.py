"""Whole episodes of a population, one an individual, played side by side."""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from esscher.adapters.gymnasium import make, spec_from, to_native
from esscher.errors import UserError
from esscher.experiment import EnvConfig
from esscher.runtime.device import available_processors
from esscher.runtime.rng import Phase, mix
from esscher.types import Episodes, Transitions

Act = Callable[[Float[Tensor, "n o"]], Float[Tensor, "n a"]]
"""Observations of all individuals to their actions, in [-1, 1]."""


class _Copies(Protocol):
    """As many copies of a task as are asked for."""

    observation_space: Any
    action_space: Any
    descriptor_space: Any

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        """Start that many copies."""
        ...

    def step(self, action: NDArray[Any], running: NDArray[np.int64]) -> tuple[Any, ...]:
        """Act in the copies named: obs, reward, terminated, truncated, descriptor or None, each
        with one row for each of them.
        """
        ...

    def close(self) -> None: ...


class EpisodeRunner:
    """Plays a population.

    Args:
        config: which task; if it has a descriptor_space, it says what its episodes were (see
            adapters/descriptors.py). With `parallel`, threads share the copies: it pays for
            MuJoCo, which works outside Python.
        seed: of the run; each episode's own seed follows from it.
        step_limit: steps after which an episode is truncated in a task without a limit of its own.

    Raises:
        UserError: unknown task, or unsupported spaces.
    """

    def __init__(self, config: EnvConfig, seed: int, step_limit: int = 10_000):
        self.config, self._seed, self._limit = config, seed, step_limit
        vector = _vector_entry_point(config)
        self._copies: _Copies = _Vector(vector, config) if vector else _Separate(config)
        space, bounds = self._copies.descriptor_space, ((), ())
        if isinstance(space, spaces.Box) and len(space.shape) == 1:
            bounds = tuple(tuple(map(float, bound)) for bound in (space.low, space.high))
        self.spec = spec_from(
            config.id,
            self._copies.observation_space,
            self._copies.action_space,
            descriptor_low=bounds[0],
            descriptor_high=bounds[1],
        )

    def __call__(self, act: Act, count: int, iteration: int) -> Episodes:
        """One episode of each of `count` individuals.

        Args:
            act: what all of them do; those whose episode has ended are asked too, and not heard.
            count: individuals.
            iteration: counter that the episodes' seeds follow from, with the run's seed.

        Raises:
            UserError: a reward, observation or action that is not finite, or an episode that ended
                without a descriptor.
        """
        seeds = [mix(self._seed, iteration, Phase.RESET, k) % 2**31 for k in range(count)]
        obs = self._copies.reset(seeds)
        _check_finite(self.config.id, "a first observation", obs, np.arange(count), 0)
        running = np.arange(count)
        descriptor = np.full((count, len(self.spec.descriptor_low)), np.nan, np.float32)
        columns: list[tuple[NDArray[Any], ...]] = []
        for time in range(self._limit):
            action = act(torch.from_numpy(obs)).cpu()
            if not action.isfinite().all():
                raise UserError(
                    f"an individual's action is not finite at step {time} of an episode"
                )
            native = to_native(action, self.spec, self._copies.action_space)
            outcome = self._copies.step(native[running], running)
            next_obs, reward, terminated, truncated, described = outcome
            truncated = truncated | (time == self._limit - 1)
            _check_finite(self.config.id, "a reward", reward, running, time)
            _check_finite(self.config.id, "an observation", next_obs, running, time)
            moved = action.numpy()[running]
            columns.append((obs[running], moved, reward, next_obs, terminated, truncated, running))
            obs[running] = next_obs
            ended = terminated | truncated
            if ended.any() and self.spec.descriptor_low:
                descriptor[running[ended]] = self._descriptors(described, ended, time)
            running = running[~ended]
            if not len(running):
                break
        return _episodes(columns, descriptor)

    def _descriptors(self, described: Any, ended: NDArray[Any], time: int) -> NDArray[np.float32]:
        wanted = (len(self.spec.descriptor_low),)
        chosen = [described[k] for k in np.flatnonzero(ended)]
        if any(value is None or np.shape(value) != wanted for value in chosen):
            raise UserError(
                f'{self.config.id} ended an episode at step {time} without info["descriptor"] of '
                f"{wanted[0]} numbers"
            )
        return np.stack(chosen).astype(np.float32)

    def close(self) -> None:
        """Release the copies."""
        self._copies.close()


class _Separate:
    """Copies that are environments of their own, shared out among threads if `parallel`."""

    def __init__(self, config: EnvConfig):
        self._config = config
        self._envs = [make(config)]
        self.observation_space = self._envs[0].observation_space
        self.action_space = self._envs[0].action_space
        self.descriptor_space = _attribute(self._envs[0], "descriptor_space")
        workers = available_processors() if config.parallel else 1
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._workers = workers

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        while len(self._envs) < len(seeds):
            self._envs.append(make(self._config))
        pairs = zip(self._envs, seeds, strict=False)
        return np.stack([env.reset(seed=seed)[0] for env, seed in pairs]).astype(np.float32)

    def step(self, action: NDArray[Any], running: NDArray[np.int64]) -> tuple[Any, ...]:
        def some(part: NDArray[np.int64]) -> list[tuple[Any, ...]]:
            return [self._envs[running[k]].step(action[k]) for k in part]

        parts = np.array_split(np.arange(len(running)), self._workers)
        played = self._pool.map(some, parts) if self._pool else map(some, parts)
        outcomes = [outcome for part in played for outcome in part]
        obs, reward, terminated, truncated, info = zip(*outcomes, strict=True)
        return (
            np.stack(obs).astype(np.float32),
            np.array(reward, np.float32),
            np.array(terminated, bool),
            np.array(truncated, bool),
            [one.get("descriptor") for one in info],
        )

    def close(self) -> None:
        for env in self._envs:
            env.close()
        if self._pool:
            self._pool.shutdown()


class _Vector:
    """Copies that the task itself steps as one: a gymnasium.vector.VectorEnv of any size.

    The task must not restart by itself, or not say so: what comes after an end is not read.
    """

    def __init__(self, entry_point: Callable[..., VectorEnv[Any, Any, Any]], config: EnvConfig):
        self._make = lambda count: entry_point(num_envs=count, **config.kwargs)
        self._envs = self._make(1)
        mode = self._envs.metadata.get("autoreset_mode")
        if mode is AutoresetMode.SAME_STEP:
            raise UserError(f"{config.id} hides how episodes end: it restarts in the same step")
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self.descriptor_space = getattr(self._envs, "descriptor_space", None)

    def reset(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        if self._envs.num_envs != len(seeds):
            self._envs.close()
            self._envs = self._make(len(seeds))
        envs: Any = self._envs  # Declared for one seed, and documented for a list of them.
        obs, _ = envs.reset(seed=list(seeds))
        return np.array(obs, np.float32)

    def step(self, action: NDArray[Any], running: NDArray[np.int64]) -> tuple[Any, ...]:
        whole = np.zeros((self._envs.num_envs, *action.shape[1:]), action.dtype)
        whole[running] = action
        obs, reward, terminated, truncated, info = self._envs.step(whole)
        described = info.get("descriptor")
        return (
            obs[running].astype(np.float32),
            reward[running].astype(np.float32),
            terminated[running],
            truncated[running],
            [None] * len(running) if described is None else described[running],
        )

    def close(self) -> None:
        self._envs.close()


def _vector_entry_point(config: EnvConfig) -> Callable[..., VectorEnv[Any, Any, Any]] | None:
    """A factory `module:factory` may name a vectorised form of itself as `vector_entry_point`."""
    if ":" not in config.id or config.max_episode_steps is not None:
        return None
    module_name, _, factory_name = config.id.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError):
        return None  # `make` explains it.
    return getattr(factory, "vector_entry_point", None)


def _attribute(env: gymnasium.Env[Any, Any], name: str) -> Any:
    try:
        return env.get_wrapper_attr(name)
    except AttributeError:
        return None


def _check_finite(
    task: str, what: str, values: NDArray[Any], copies: NDArray[np.int64], step: int
) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise UserError(
            f"{task} returned {what} that is not finite at step {step} of the episode of individual "
            f"{copies[row]}: {values[row]}"
        )


def _episodes(columns: list[tuple[NDArray[Any], ...]], descriptor: NDArray[np.float32]) -> Episodes:
    """Rows of each individual one after another."""
    *rows, individual = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(individual, kind="stable")
    obs, action, reward, next_obs, terminated, truncated = (
        torch.from_numpy(row[order]) for row in rows
    )
    count = len(descriptor)
    return Episodes(
        transitions=Transitions(
            obs=obs,
            action=action,
            reward=reward,
            next_obs=next_obs,
            terminated=terminated,
            truncated=truncated,
        ),
        individual=torch.from_numpy(individual[order]),
        fitness=torch.from_numpy(np.bincount(individual, rows[2], count).astype(np.float32)),
        length=torch.from_numpy(np.bincount(individual, minlength=count)),
        descriptor=torch.from_numpy(descriptor),
    )
