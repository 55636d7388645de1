"""Play whole episodes, keep them, learn: the loop of every method that talks for several turns."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from esscher.experience.turns import Played
from esscher.loops.online import LoopState, Progress
from esscher.method import Converser
from esscher.runtime.rng import Phase, mix, seed_phase
from esscher.types import Completions, Prompts

Play = Callable[[Callable[[Prompts], Completions], Sequence[int], int], Played]
"""How to write, seeds of the episodes, room for an utterance -> the episodes (see
adapters/text_envs.py)."""


def converse(
    method: Converser, play: Play, experience: Any, state: LoopState, *, seed: int, steps: int
) -> Iterator[Progress]:
    """Run until `steps` iterations; calling again with the same state goes on.

    Each plays new episodes to their ends, so that nothing is carried from one to the next but what
    is learned and what is kept. Random numbers, and the games' seeds, depend on (seed, step) alone.
    """
    while state.step < steps:
        state.step += 1
        episodes: list[tuple[float, int]] = []
        metrics = []
        if method.num_episodes:
            seed_phase(seed, state.step, Phase.ACT)
            seeds = [mix(seed, state.step, Phase.RESET, k) for k in range(method.num_episodes)]
            write = partial(method.propose, step=state.step)
            played = play(write, seeds, method.decoding.max_new_tokens)
            experience.add(played.turns)
            episodes = list(zip(played.returns, played.lengths, strict=True))
            metrics.append({"shortened_prompts": played.turns.reward.new_tensor(played.shortened)})
        seed_phase(seed, state.step, Phase.UPDATE)
        metrics.append(method.update(experience, state.num_updates))
        state.num_updates += 1
        yield Progress(state.step, metrics, episodes)
