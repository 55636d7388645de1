"""Draw, and learn nothing: the loop of every method that only steers a diffusion model."""

from collections.abc import Callable, Iterator
from typing import Any

from esscher.loops.online import LoopState, Progress
from esscher.method import Drawer
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Asked

RewardOf = Callable[[Asked], Any]
"""What was asked for -> the reward of samples of it, or None."""


def sample(
    method: Drawer,
    experience: Any,
    reward_of: RewardOf,
    state: LoopState,
    *,
    seed: int,
    steps: int,
) -> Iterator[Progress]:
    """Run until `steps` steps, a batch of conditions each; calling again with the state goes on.

    Random numbers depend on (seed, step) alone.
    """
    while state.step < steps:
        state.step += 1
        metrics, episodes = [], []
        for asked in experience.batches(state.step):
            seed_phase(seed, state.step, Phase.ACT)
            told, reward = method.search(asked, reward_of(asked), state.step)
            metrics.append(told)
            state.num_updates += 1
            episodes += [(value, 1) for value in reward.tolist()]
        yield Progress(state.step, metrics, episodes)
