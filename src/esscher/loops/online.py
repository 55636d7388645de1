"""Act, observe, learn: the loop of every method that improves while it interacts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from esscher.method import Control, Experience
from esscher.runtime.rng import Phase, seed_phase
from esscher.runtime.state import Stateful
from esscher.types import Action, Metrics, Spec, Transitions


class Environments(Protocol):
    """What the loop asks of a set of environments (see adapters/gymnasium.py)."""

    spec: Spec

    def reset(self, iteration: int) -> Any: ...

    def random_actions(self) -> torch.Tensor: ...

    def step(self, action: torch.Tensor, step: int) -> Any: ...


class LoopState(Stateful):
    """Where the loop is: counters, and the observations that await an action."""

    def __init__(self, obs: torch.Tensor):
        self.step = 0
        self.num_updates = 0
        self.obs = obs


@dataclass(frozen=True)
class Progress:
    """What one iteration did."""

    step: int
    """Environment steps so far."""
    metrics: list[Metrics]
    """One entry an update."""
    episodes: list[tuple[float, int]]
    """Return and length of the training episodes that ended."""


def online(
    method: Control,
    envs: Environments,
    experience: Experience,
    state: LoopState,
    *,
    seed: int,
    steps: int,
    barrier_every: int = 0,
) -> Iterator[Progress]:
    """Run until `steps` environment steps; stopping and calling again with the same state goes on.

    Each iteration steps every environment once, stores the transitions and makes the updates that
    the experience owes. Random numbers depend on (seed, step) alone.

    Args:
        barrier_every: treat each multiple of this many steps as a reset boundary, 0 for none.
    """
    num_envs, device = envs.spec.num_envs, state.obs.device
    while state.step < steps:
        seed_phase(seed, state.step, Phase.ACT)
        if experience.warming_up(state.step):
            action = Action(value=envs.random_actions().to(device))
        else:
            action = method.act(state.obs, explore=True)
        outcome = envs.step(action.value, state.step)
        truncated = torch.from_numpy(outcome.truncated).to(device)
        barrier = crossed(state.step + num_envs, num_envs, barrier_every)
        experience.add(
            Transitions(
                obs=state.obs,
                action=action.value,
                reward=torch.from_numpy(outcome.reward).to(device),
                next_obs=torch.from_numpy(outcome.next_obs).to(device),
                terminated=torch.from_numpy(outcome.terminated).to(device),
                truncated=torch.ones_like(truncated) if barrier else truncated,
            ),
            action,
        )
        state.step += num_envs
        obs = envs.reset(state.step) if barrier else outcome.obs
        state.obs = torch.from_numpy(obs).to(device)
        seed_phase(seed, state.step, Phase.UPDATE)
        metrics = []
        for batch in experience.batches(state.step):
            metrics.append(method.update(batch, state.num_updates))
            state.num_updates += 1
        yield Progress(state.step, metrics, outcome.episodes)


def crossed(step: int, advance: int, every: int) -> bool:
    """Whether the last `advance` steps reached or passed a multiple of `every` (0: never)."""
    return every > 0 and step // every > (step - advance) // every
