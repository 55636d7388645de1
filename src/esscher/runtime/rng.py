"""Seeds as functions of counters: nothing random is ever carried, so nothing random is saved.

At each iteration and phase the runner reseeds torch's default generators with
`mix(seed, rank, iteration, phase)`. Methods may then use plain `torch.randn`, and a run resumed at
iteration i draws what the uninterrupted run drew there. Phases are separate, so that evaluating
more often never changes training.
"""

from enum import IntEnum

import numpy as np
import torch

MASK = (1 << 64) - 1


class Phase(IntEnum):
    """What the random numbers are for."""

    INITIALISE = 0
    RESET = 1
    ACT = 2
    UPDATE = 3
    EVALUATE = 4
    ORDER = 5


def mix(*counters: int) -> int:
    """A 63-bit hash of integers: neighbouring counters give unrelated seeds."""
    state = 0x9E3779B97F4A7C15
    for counter in counters:
        state = (state ^ (counter & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ (state >> 30)) * 0x94D049BB133111EB & MASK
        state = (state ^ (state >> 31)) + 0x9E3779B97F4A7C15 & MASK
    return state >> 1


def seed_phase(seed: int, iteration: int, phase: Phase, rank: int = 0) -> None:
    """Reseed torch's default generators directly (torch.manual_seed costs 100 times more)."""
    value = mix(seed, rank, iteration, phase)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(value)


def numpy_generator(seed: int, iteration: int, phase: Phase, rank: int = 0) -> np.random.Generator:
    """A generator for code outside torch, seeded by the same counters."""
    return np.random.default_rng(mix(seed, rank, iteration, phase))
