"""Write, judge, learn: the loop of every method that improves on its own completions."""

from collections.abc import Callable, Iterator
from typing import Any

from esscher.loops.online import LoopState, Progress
from esscher.method import Proposer
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Completions, Prompts, Scored

Judge = Callable[[Completions, Prompts], Scored]
"""Completions and the prompts that they answer -> their rewards (see adapters/rewards.py)."""


def generate(
    method: Proposer, experience: Any, judge: Judge, state: LoopState, *, seed: int, steps: int
) -> Iterator[Progress]:
    """Run until `steps` iterations, a batch of prompts each; calling again with the state goes on.

    Random numbers depend on (seed, step) alone.
    """
    while state.step < steps:
        state.step += 1
        metrics, episodes = [], []
        for prompts in experience.batches(state.step):
            seed_phase(seed, state.step, Phase.ACT)
            completions = method.propose(prompts, state.step)
            scored = judge(completions, prompts)
            seed_phase(seed, state.step, Phase.UPDATE)
            metrics.append(method.update(scored, state.num_updates))
            state.num_updates += 1
            length = completions.completion_mask.sum(-1).tolist()
            judged = zip(scored.reward.tolist(), length, scored.valid.tolist(), strict=True)
            episodes += [(reward, steps) for reward, steps, valid in judged if valid]
        yield Progress(state.step, metrics, episodes)
