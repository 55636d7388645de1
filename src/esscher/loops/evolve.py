"""Propose, judge, take in: the loop of every method that improves a population."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch

from esscher.loops.online import LoopState, Progress
from esscher.method import Evolver
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Episodes, Spec


class Judge(Protocol):
    """What the loop asks of a task (see adapters/episodes.py)."""

    spec: Spec

    def __call__(
        self, act: Callable[[torch.Tensor], torch.Tensor], count: int, iteration: int
    ) -> Episodes: ...


def evolve(
    method: Evolver, judge: Judge, experience: Any, state: LoopState, *, seed: int, steps: int
) -> Iterator[Progress]:
    """Run whole iterations until `steps` environment steps; calling again with the same state goes on.

    Random numbers and first states depend on (seed, step) alone.
    """
    while state.step < steps:
        seed_phase(seed, state.step, Phase.ACT)
        candidates = method.ask(experience)
        episodes = judge(partial(method.play, candidates), len(candidates), state.step)
        state.step += len(episodes.transitions)
        seed_phase(seed, state.step, Phase.UPDATE)
        metrics = method.tell(candidates, episodes, experience)
        state.num_updates = method.num_updates
        pairs = zip(episodes.fitness.tolist(), episodes.length.tolist(), strict=True)
        yield Progress(state.step, metrics, list(pairs))
