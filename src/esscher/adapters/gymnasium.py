"""Gymnasium environments as the online loop wants them: vectorised, normalised, snapshotted.

Actions come in as [-1, 1] (or choices) and are rescaled to the environment's box. Environments
restart by themselves; `next_obs` of a step is always the observation that the action led to, never
the first one of the next episode.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from esscher.adapters.imports import users_own
from esscher.adapters.mazes import Maze, is_maze, simulator_of
from esscher.adapters.snapshot import SnapshotWrapper
from esscher.errors import UserError, nearest
from esscher.experiment import EnvConfig
from esscher.runtime.rng import Phase, mix
from esscher.types import Spec


@dataclass(frozen=True)
class Outcome:
    """What one step of all environments led to."""

    reward: NDArray[np.float32]
    next_obs: NDArray[np.float32]
    """The true successor, also at the end of an episode."""
    obs: NDArray[np.float32]
    """Where the next action is taken: equal to next_obs unless an episode ended."""
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    episodes: list[tuple[float, int]]
    """Return and length of the episodes that ended at this step."""
    success: NDArray[np.bool_] | None = None
    """Whether each task is solved now, where tasks say so in info["success"]."""


class Environments:
    """`num` copies of a task, stepped together.

    Args:
        config: which task.
        seed: of the run; the copies' own seeds follow from it.
        phase: which stream of seeds (training or evaluation).

    Raises:
        UserError: unknown task, unbounded or unsupported action space, observations whose type is
            not what the task declares.
    """

    def __init__(self, config: EnvConfig, seed: int, phase: Phase = Phase.RESET):
        self.config, self._seed, self._phase = config, seed, phase
        self._envs = _vectorise(config)
        self.spec = spec_from(
            config.id,
            self._envs.single_observation_space,
            self._envs.single_action_space,
            num_agents=self._envs.metadata.get("num_agents", 1),
            num_envs=config.num,
            goal=self._envs.metadata.get("goal", ()),
            achieved=self._envs.metadata.get("achieved", ()),
        )
        self._action_space = self._envs.single_action_space
        self._inexact_because = self.inexact_because()
        self._made = self._envs.get_attr("snapshot")
        self._used = False
        self._returns = np.zeros(config.num)
        self._lengths = np.zeros(config.num, np.int64)

    def reset(self, iteration: int, options: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Start every copy as if just made, from seeds that follow from (run seed, iteration, copy).

        What an environment carries over its own resets (a curriculum, running statistics) is undone
        too, or the result would depend on how often, and in which sitting, this was called.
        `options` are Gymnasium's, and hold for the episodes that begin here.
        """
        if self._used and self._inexact_because:
            self._envs.close()
            self._envs = _vectorise(self.config)
        elif self._used:
            self._envs.set_attr("snapshot", self._made)
        self._used = True
        seeds = [mix(self._seed, iteration, self._phase, k) % 2**31 for k in range(self.config.num)]
        obs, _ = self._envs.reset(seed=seeds, options=options)
        self._check_obs(obs)
        self._returns[:], self._lengths[:] = 0.0, 0
        obs = _float32(obs)
        self._check_finite(obs, "a first observation", iteration)
        return obs

    def random_actions(self) -> torch.Tensor:
        """Uniform in [-1, 1], or uniform choices, by torch's default generator."""
        if self.spec.num_actions is None:
            return torch.rand(self.config.num, self.spec.action_dim) * 2 - 1
        return torch.randint(self.spec.num_actions, (self.config.num, *self.spec.action_shape))

    def step(self, action: torch.Tensor, step: int) -> Outcome:
        """Act in every copy; `step` (environment steps so far) only names the place in errors."""
        native = self.to_native(action)
        if not _all_finite(native):
            raise UserError(
                f"the policy's action at step {step} is not finite: training has diverged. Lower the "
                "learning rate, or look at the last rows of metrics.jsonl"
            )
        obs, reward, terminated, truncated, info = self._envs.step(native)
        self._check_finite(reward, "a reward", step)
        obs = next_obs = _float32(obs)
        self._returns += reward
        self._lengths += 1
        episodes: list[tuple[float, int]] = []
        ended = terminated | truncated
        over = ended.nonzero()[0]
        if len(over):
            next_obs = obs.copy()
            for copy in over:
                next_obs[copy] = info["final_obs"][copy]
            self._check_finite(obs, "a first observation", step)
            episodes = [(float(self._returns[k]), int(self._lengths[k])) for k in over]
            self._returns[over], self._lengths[over] = 0.0, 0
        self._check_finite(next_obs, "an observation", step)
        return Outcome(
            reward=reward.astype(np.float32),
            next_obs=next_obs,
            obs=obs,
            terminated=terminated,
            truncated=truncated,
            episodes=episodes,
            success=_success(info, ended) if info else None,
        )

    def to_native(self, action: torch.Tensor) -> NDArray[Any]:
        """See the function of that name."""
        return to_native(action, self.spec, self._action_space)

    def inexact_because(self) -> str | None:
        """Why the state of these environments cannot be saved exactly; None if it can."""
        reasons = self._envs.get_attr("unsupported_reason")
        return next((reason for reason in reasons if reason), None)

    def state_dict(self) -> dict[str, Any]:
        """Every copy's full state as plain data, with the running episode returns."""
        state: dict[str, Any] = {
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
        }
        for copy, snapshot in enumerate(self._envs.get_attr("snapshot")):
            state.update({f"copy.{copy}.{name}": value for name, value in snapshot.items()})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put every copy back where it was."""
        self._returns[:] = state["returns"].numpy()
        self._lengths[:] = state["lengths"].numpy()
        snapshots = []
        for copy in range(self.config.num):
            prefix = f"copy.{copy}."
            found = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            snapshots.append(found)
        # A reset first, so that layers which insist on one are content.
        self._envs.reset(seed=[0] * self.config.num)
        self._envs.set_attr("snapshot", snapshots)

    def close(self) -> None:
        """Release the environments and their processes."""
        self._envs.close()

    def _check_finite(self, values: NDArray[Any], what: str, step: int) -> None:
        if not _all_finite(values):
            copy = int(np.argwhere(~np.isfinite(values))[0][0])
            raise UserError(
                f"{self.config.id} returned {what} that is not finite at step {step} in environment "
                f"{copy}: {values[copy]}"
            )

    def _check_obs(self, obs: NDArray[Any]) -> None:
        if not isinstance(obs, np.ndarray) or obs.dtype.kind not in "fiub":
            raise UserError(
                f"{self.config.id} returns observations of type {getattr(obs, 'dtype', type(obs))}: "
                "they must be numbers"
            )


def make(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    """One environment, with its observations as a flat vector.

    Raises:
        UserError: no such id or factory, or the factory did not return an environment.
    """
    if config.id.startswith("pettingzoo:"):
        env = _with_limit(_game_adapter(config.id).from_module(config.id, config.kwargs), config)
    elif is_maze(config.id):
        env = _maze(config)
    elif ":" in config.id and not config.id.split(":")[0].startswith("ale_py"):
        env = _from_factory(config)
    else:
        limit = {"max_episode_steps": config.max_episode_steps}
        _keep_mujoco_quiet(config.id)
        options = {**config.kwargs, **({} if config.max_episode_steps is None else limit)}
        try:
            env = gymnasium.make(config.id, **options)
        except gymnasium.error.NameNotFound:
            ids = [name for name in gymnasium.registry if "/" not in name]
            raise UserError(
                f"unknown environment {config.id!r}: {nearest(config.id, ids[:400])} "
                "(your own: module:factory)"
            ) from None
        except (gymnasium.error.Error, TypeError) as error:
            raise UserError(f"environment {config.id!r} cannot be made: {error}") from error
    space = env.observation_space
    if isinstance(space, spaces.Box):
        _check_declared_dtype(config.id, env, space)
    if not (isinstance(space, spaces.Box) and len(space.shape) == 1):
        env = gymnasium.wrappers.FlattenObservation(env)
    return env


def _keep_mujoco_quiet(name: str) -> None:
    """Send MuJoCo's warnings to logging, instead of a MUJOCO_LOG.TXT in the working folder."""
    if "mujoco" in str(getattr(gymnasium.registry.get(name), "entry_point", "")):
        import mujoco as library

        mujoco: Any = library
        if hasattr(mujoco, "set_mju_user_warning"):
            mujoco.set_mju_user_warning(logging.getLogger("esscher.mujoco").info)


def _from_factory(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    factory = users_own(config.id, "environment")
    try:
        env = factory(**config.kwargs)
    except TypeError as error:
        raise UserError(f"environment {config.id!r} cannot be made: {error}") from error
    if not isinstance(env, gymnasium.Env) and hasattr(env, "possible_agents"):
        adapter = _game_adapter(config.id)
        env = adapter.JointEnv(env, config.id) if adapter.is_game(env) else env
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"{config.id!r} returned a {type(env).__name__}, not a gymnasium.Env")
    return _with_limit(env, config)


def _maze(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    if config.kwargs:
        raise UserError(f"{config.id} takes no env.kwargs, got {', '.join(config.kwargs)}")
    simulator = simulator_of(config.id)
    limit = config.max_episode_steps or simulator.max_steps
    return gymnasium.wrappers.TimeLimit(Maze(simulator), limit)


def _with_limit(env: gymnasium.Env[Any, Any], config: EnvConfig) -> gymnasium.Env[Any, Any]:
    if config.max_episode_steps is None:
        return env
    return gymnasium.wrappers.TimeLimit(env, config.max_episode_steps)


def _game_adapter(name: str) -> Any:
    """The module for games of several agents, whose library not everyone has."""
    if importlib.util.find_spec("pettingzoo") is None:
        raise UserError(f'{name} needs pettingzoo: pip install "esscher[control]"')
    return importlib.import_module("esscher.adapters.pettingzoo")


def _vectorise(config: EnvConfig) -> Any:
    if config.ray is not None:
        from esscher.adapters.ray_environments import RayEnvironments

        return RayEnvironments([_maker(config)] * config.num, config.ray)
    kind = AsyncVectorEnv if config.parallel else SyncVectorEnv
    # No copies of observations: `_float32` makes one.
    makers, mode = [_maker(config)] * config.num, AutoresetMode.SAME_STEP
    return kind(makers, copy=False, autoreset_mode=mode)


def _maker(config: EnvConfig) -> Callable[[], gymnasium.Env[Any, Any]]:
    return lambda: SnapshotWrapper(make(config))


def _check_declared_dtype(name: str, env: gymnasium.Env[Any, Any], space: spaces.Box) -> None:
    obs, _ = env.reset(seed=0)
    found = getattr(obs, "dtype", None)
    if found != space.dtype or getattr(obs, "shape", None) != space.shape:
        raise UserError(
            f"{name} declares observations {space.dtype}{list(space.shape)} but returns "
            f"{found or type(obs).__name__}{list(getattr(obs, 'shape', []))}: mend its "
            "observation_space, or cast in reset and step"
        )


def to_native(action: torch.Tensor, spec: Spec, box: Any) -> NDArray[Any]:
    """From [-1, 1] (clipped) to the environment's box, or to its labels."""
    value = action.detach().cpu().numpy()
    if spec.num_actions is not None:
        return value + spec.action_start
    value = _clipped(value, -1, 1).reshape(len(value), *box.shape)
    native = box.low + (value + 1) * 0.5 * (box.high - box.low)
    # Clipped again, because the sum may round to just outside.
    return _clipped(native, box.low, box.high).astype(box.dtype, copy=False)


def spec_from(
    name: str, obs_space: Any, action_space: Any, *, num_agents: int = 1, **further: Any
) -> Spec:
    """What a controller has to know of a task with these spaces.

    Args:
        name: of the task, for messages.
        obs_space: flat.
        action_space: Box or Discrete, or MultiDiscrete with several agents.
        num_agents: who act in it at the same moment.
        further: fields of the specification.

    Raises:
        UserError: an action space that no method acts in.
    """
    common = {"obs_shape": obs_space.shape, **further}
    if isinstance(action_space, spaces.Discrete):
        return Spec(
            action_shape=(),
            num_actions=int(action_space.n),
            action_start=int(action_space.start),
            **common,
        )
    if num_agents > 1:  # A game's adapter has seen to it that all choose among the same labels.
        return Spec(
            action_shape=(num_agents,),
            num_actions=int(action_space.nvec[0]),
            action_start=int(action_space.start[0]),
            num_agents=num_agents,
            **common,
        )
    if not isinstance(action_space, spaces.Box):
        raise UserError(
            f"{name} has the action space {action_space}: only Box and Discrete are supported"
        )
    low, high = action_space.low.ravel(), action_space.high.ravel()
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise UserError(
            f"{name} has an unbounded action box {action_space}: wrap it in "
            "gymnasium.wrappers.RescaleAction or give the box finite bounds"
        )
    return Spec(
        action_shape=(int(low.size),),
        action_low=tuple(map(float, low)),
        action_high=tuple(map(float, high)),
        **common,
    )


def _success(info: dict[str, Any], ended: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """What tasks said before they restarted, which those did whose episode has ended."""
    parts = (info, ~ended), (info.get("final_info", {}), ended)
    told = [
        (part["success"], part.get("_success", True) & where)
        for part, where in parts
        if "success" in part
    ]
    if not told:
        return None
    return np.any([where & (np.asarray(value, float) > 0) for value, where in told], axis=0)


def _clipped(values: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """As np.clip, whose layers of Python take longer than the rest of a small environment's step."""
    return np.minimum(np.maximum(values, low), high)


def _all_finite(values: NDArray[Any]) -> bool:
    """For the same reason without np.all."""
    return bool(np.logical_and.reduce(np.isfinite(values), axis=None))


def _float32(obs: NDArray[Any]) -> NDArray[np.float32]:
    return obs.astype(np.float32)
