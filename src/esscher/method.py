"""What a method is: one flat class in one file, known to the loops by three small protocols."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from esscher.errors import UserError
from esscher.runtime.device import Runtime
from esscher.runtime.state import Stateful
from esscher.types import Action, Metrics, Spec

Batch = TypeVar("Batch", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the catalogue says of a method. Written as literals: it is read without importing."""

    title: str
    year: int
    arxiv: str
    purpose: str
    """What it is for, in one sentence of a user's words."""
    claim: str
    """The paper's central claim, as the proof tests it."""
    sections: str = ""
    """Where in the paper the implemented equations stand."""
    baseline: bool = False
    """A method that papers compare with, not one that this library sets out to prove."""


class Method(Stateful):
    """Base of every method: its state is collected by attribute name. There are no hooks.

    A subclass names its `Config` and takes `(cfg, spec, runtime)`; nothing inherits from a method.
    """

    def __init__(self, cfg: Any, spec: Spec, runtime: Runtime):
        self.cfg, self.spec, self.runtime = cfg, spec, runtime


class Learner(Protocol[Batch]):
    """Improves on batches."""

    def update(self, batch: Batch, step: int) -> Metrics:
        """One update; `step` counts updates from 0. Mutates the learner, reports 0-d tensors."""
        ...


class Actor(Protocol):
    """Acts in environments."""

    def act(self, obs: Float[Tensor, "n *o"], *, explore: bool) -> Action:
        """Actions in [-1, 1] or choices, with what the learner wants remembered."""
        ...


class Experience(Protocol):
    """What the online loop asks of a store of steps."""

    def warming_up(self, step: int) -> bool: ...

    def add(self, transitions: Any, action: Action) -> None: ...

    def batches(self, step: int) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Control(Learner[Any], Actor, Protocol):
    """A method that the online loop can train."""

    cfg: Any
    spec: Spec

    @property
    def policy(self) -> nn.Module:
        """What is deployed: maps observations to a distribution with `mode` and `sample`."""
        ...

    def experience(self) -> Experience:
        """An empty store of the kind that this method learns from."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def act_by(
    policy: nn.Module, obs: Float[Tensor, "n *o"], *, explore: bool
) -> Shaped[Tensor, "n *a"]:
    """A sample of the policy's distribution, or its mode."""
    with torch.no_grad():
        distribution = policy(obs)
        return distribution.sample() if explore else distribution.mode()


def continuous_only(spec: Spec, slug: str) -> None:
    """Refuse a discrete action space.

    Raises:
        UserError: naming the method, the space and what to use instead.
    """
    if spec.num_actions is not None:
        raise UserError(
            f"{slug} needs a continuous (Box) action space, and this one is "
            f"Discrete({spec.num_actions}): use ppo"
        )
