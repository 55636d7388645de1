"""Policies that remember the episode that they are in: what they saw, what they are about to do.

A memory is a value with one row an environment: `act` is handed one and gives the next, and the policy
itself keeps no position. So one policy serves any number of environments, and an episode that begins is
a row replaced.

Such policies draw their actions. All draws of an episode follow from its seed and the time in it, so an
episode does not depend on those that are played beside it.
"""

import functools
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from esscher.types import Record, record


@record
class Memory(Record):
    """What every memory holds of an episode; policies add what they need."""

    seed: Int[Tensor, "n"]
    """What the draws of the episode follow from."""
    time: Int[Tensor, "n"]
    """Actions since the episode began."""
    evaluations: Int[Tensor, "n"]
    """How often a network was asked about this episode."""


Kept = TypeVar("Kept", bound=Memory)


class Remembering(Protocol):
    """A policy with a memory."""

    def begin(self, seed: Int[Tensor, "n"]) -> Memory:
        """Of episodes that nothing was seen of yet."""
        ...

    def act(self, obs: Float[Tensor, "n o"], memory: Memory) -> tuple[Float[Tensor, "n a"], Memory]:
        """Actions in [-1, 1], and what is remembered from now on."""
        ...


def remembers(policy: Any) -> TypeGuard[Remembering]:
    """Whether a policy has a memory."""
    return _has_memory(type(policy))


@functools.cache
def _has_memory(kind: type) -> bool:
    return hasattr(kind, "begin") and hasattr(kind, "act")


class Player:
    """Plays episodes side by side with any policy, and carries what it remembers of them.

    Args:
        policy: one with a memory, or a module from observations to a distribution.
        explore: sample. Else the mode; a policy with a memory draws then too, but what it draws
            follows from the number of the episode alone.
        memory: of the steps before; None: all episodes begin now.
    """

    def __init__(self, policy: nn.Module, *, explore: bool, memory: Memory | None = None):
        self.policy, self.explore, self.memory = policy, explore, memory

    @torch.no_grad()
    def __call__(
        self, obs: Float[Tensor, "n *o"], started: Bool[Tensor, "n"] | None = None
    ) -> Shaped[Tensor, "n *a"]:
        """What to do; `started` says in which environments an episode begins with this step."""
        policy = self.policy
        if not remembers(policy):
            distribution = policy(obs)
            return distribution.sample() if self.explore else distribution.mode()
        if self.memory is None:
            self.memory = policy.begin(self._seeds(len(obs), obs.device))
        elif started is not None and bool(started.any()):
            fresh = policy.begin(self._seeds(len(obs), obs.device))
            self.memory = renewed(self.memory, fresh, started.to(obs.device))
        action, self.memory = policy.act(obs, self.memory)
        return action

    def _seeds(self, count: int, device: torch.device) -> Int[Tensor, "n"]:
        if self.explore:
            return torch.randint(2**62, (count,), device=device)
        if self.memory is None:
            return torch.arange(count, device=device)
        return self.memory.seed + count


def renewed(memory: Kept, fresh: Kept, started: Bool[Tensor, "n"]) -> Kept:
    """The memory with the rows of those that have started replaced by fresh ones."""

    def chosen(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(started.view(-1, *[1] * (old.dim() - 1)), new, old)

    held, begun = memory.fields(), fresh.fields()
    return type(memory)(**{name: chosen(held[name], begun[name]) for name in held})
