"""Draw, have it judged, perhaps learn from it: the loop of methods that sample a diffusion model."""

from collections.abc import Iterator
from typing import Any

from esscher.loops.online import LoopState, Progress
from esscher.method import Drawer
from esscher.runtime.rng import Phase, seed_phase


def draw(
    method: Drawer, experience: Any, reward: Any, state: LoopState, *, seed: int, steps: int
) -> Iterator[Progress]:
    """Run until `steps` steps, a batch of conditions each; calling again with the same state goes on.

    Random numbers depend on (seed, step) alone.

    Args:
        reward: (samples, rows) -> what each is worth; None: nothing says.
    """
    while state.step < steps:
        state.step += 1
        metrics, episodes = [], []
        for asked in experience.batches(state.step):
            seed_phase(seed, state.step, Phase.ACT)
            told, rewards = method.improve(asked, reward, state.step)
            metrics.append(told)
            state.num_updates += 1
            episodes += [(value, 1) for value in rewards.tolist()]
        yield Progress(state.step, metrics, episodes)
