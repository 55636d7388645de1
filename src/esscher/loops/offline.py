"""Learn: the loop of every method that has logged data and nothing else."""

from collections.abc import Iterator
from typing import Any

from esscher.loops.online import LoopState, Progress
from esscher.method import Learning
from esscher.runtime.rng import Phase, seed_phase


def offline(
    method: Learning, experience: Any, state: LoopState, *, seed: int, steps: int
) -> Iterator[Progress]:
    """Run until `steps` steps, one update each; calling again with the same state goes on.

    Random numbers depend on (seed, step) alone.
    """
    while state.step < steps:
        state.step += 1
        seed_phase(seed, state.step, Phase.UPDATE)
        metrics = []
        for batch in experience.batches(state.step):
            metrics.append(method.update(batch, state.num_updates))
            state.num_updates += 1
        yield Progress(state.step, metrics, [])
