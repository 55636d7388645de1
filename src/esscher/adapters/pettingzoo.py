"""A PettingZoo game as one Gymnasium environment with a joint observation and a joint action.

So the runner, the evaluator, stores, checkpoints and reports need to know nothing of agents. What is
observed is laid end to end, agent after agent in the order of `possible_agents`, each filled up with
zeros to the length of the longest; an action is one choice an agent.
"""

import importlib
import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from pettingzoo import AECEnv, ParallelEnv
from pettingzoo.utils.conversions import aec_to_parallel

from esscher.errors import UserError

Observation = NDArray[np.float32]
PREFIX = "pettingzoo:"


class JointEnv(gymnasium.Env[Observation, NDArray[np.int64]]):
    """All agents of a game, acting at the same moment.

    The reward is the mean over the agents, and `info["agent_rewards"]` has every one. An episode is
    terminated when the game is over for all of them, and truncated when it stops for all of them
    otherwise.

    A game with `get_state()` and `set_state(state)` on plain data resumes exactly.

    Args:
        game: a ParallelEnv, or an AECEnv in which all agents act on what they saw before anyone did.
        name: for messages.

    Raises:
        UserError: agents act one after another, have actions that are not Discrete, different
            numbers of actions, or masks of permitted ones.
    """

    def __init__(self, game: Any, name: str):
        self.game, self.name = _simultaneous(game, name), name
        self.order = list(self.game.possible_agents)
        self.num_agents = len(self.order)
        # The one way from here to the task's specification through vectors of environments.
        self.metadata = {"render_modes": [], "num_agents": self.num_agents}
        self._seen = [_observed(self.game.observation_space(agent), name) for agent in self.order]
        self.width = max(spaces.flatdim(space) for space in self._seen)
        counts, starts = zip(*(self._choices(agent) for agent in self.order), strict=True)
        if len(set(counts)) > 1 or len(set(starts)) > 1:
            raise UserError(
                f"{name} gives its agents different actions, {list(counts)} of them from "
                f"{list(starts)}: make them equal, with actions that do nothing"
            )
        self.action_space = spaces.MultiDiscrete(list(counts), start=list(starts))
        shape = (self.num_agents * self.width,)
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        unwrapped = self.game.unwrapped
        if hasattr(unwrapped, "get_state") and hasattr(unwrapped, "set_state"):
            self.get_state, self.set_state = unwrapped.get_state, unwrapped.set_state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        observations, _ = self.game.reset(seed=seed, options=options)
        return self._joint(observations), {}

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        chosen = {agent: int(choice) for agent, choice in zip(self.order, action, strict=True)}
        observations, rewards, terminations, truncations, _ = self.game.step(chosen)
        ended = [terminations[agent] or truncations[agent] for agent in rewards]
        if len(ended) < self.num_agents or any(ended) != all(ended):
            raise UserError(
                f"an agent of {self.name} left while others stayed: only games that all agents play "
                "to the same end are supported"
            )
        agent_rewards = np.array([rewards[agent] for agent in self.order], np.float32)
        terminated = all(terminations.values())
        truncated = all(ended) and not terminated
        info = {"agent_rewards": agent_rewards}
        return self._joint(observations), float(agent_rewards.mean()), terminated, truncated, info

    def close(self) -> None:
        self.game.close()

    def _choices(self, agent: str) -> tuple[int, int]:
        space = self.game.action_space(agent)
        if not isinstance(space, spaces.Discrete):
            raise UserError(
                f"{self.name} gives {agent} the action space {space}: only Discrete is supported in "
                "games of several agents"
            )
        return int(space.n), int(space.start)

    def _joint(self, observations: dict[str, Any]) -> Observation:
        joint = np.zeros((self.num_agents, self.width), np.float32)
        for row, agent, space in zip(joint, self.order, self._seen, strict=True):
            if agent not in observations:
                raise UserError(f"{self.name} gave {agent} no observation: every agent needs one")
            flat = np.asarray(spaces.flatten(space, observations[agent]), np.float32)
            row[: len(flat)] = flat
        return joint.ravel()


def from_module(name: str, kwargs: dict[str, Any]) -> JointEnv:
    """The game of "pettingzoo:MODULE", by the module's `parallel_env`, or else its `env`.

    Raises:
        UserError: no such module, or neither is in it.
    """
    module_name = name.removeprefix(PREFIX)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"environment {name!r} cannot be imported: {error}. Write pettingzoo:MODULE, like "
            "pettingzoo:mpe2.simple_spread_v3 (pip install mpe2)"
        ) from error
    make = getattr(module, "parallel_env", None) or getattr(module, "env", None)
    if make is None:
        raise UserError(f"{module_name} has neither parallel_env nor env: it is no PettingZoo game")
    try:
        return JointEnv(make(**kwargs), name)
    except TypeError as error:
        raise UserError(f"environment {name!r} cannot be made: {error}") from error


def is_game(env: Any) -> bool:
    """Whether this is something that `JointEnv` may take."""
    return isinstance(env, ParallelEnv | AECEnv)


def _simultaneous(game: Any, name: str) -> Any:
    if isinstance(game, AECEnv):
        if not game.metadata.get("is_parallelizable", False):
            raise UserError(
                f"the agents of {name} act one after another: only games in which all act at the "
                "same moment are supported"
            )
        game = aec_to_parallel(game)
    if len(getattr(game, "possible_agents", ())) < 2:
        raise UserError(
            f"{name} lists fewer than two agents in possible_agents: for a single one make it a "
            "gymnasium.Env"
        )
    return game


def _observed(space: Any, name: str) -> spaces.Space[Any]:
    if isinstance(space, spaces.Dict) and "action_mask" in space.spaces:
        raise UserError(
            f"{name} permits only some actions at a time (action_mask), which is not supported: give "
            "the others no effect instead"
        )
    if not isinstance(spaces.flatten_space(space), spaces.Box):
        raise UserError(f"{name} has observations of {space}, which are not so many numbers")
    return space
