"""What a method is: one flat class in one file, known to the loops by three small protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from esscher.distributions.remembering import Player
from esscher.errors import UserError
from esscher.runtime.device import Runtime
from esscher.runtime.state import Stateful
from esscher.types import (
    Action,
    Asked,
    Candidates,
    Completions,
    Drawn,
    Episodes,
    Metrics,
    Prompts,
    Scored,
    Spec,
)

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

    world: ClassVar[Literal["control", "language", "diffusion", "sets", "robots"]] = "control"
    """What it is about: a controller of environments, a language model, a diffusion model,
    populations that are known by sets of samples, or robots that see and are told what to do."""
    loop: ClassVar[Literal["online", "offline", "evolve", "generate", "converse", "draw"]] = (
        "online"
    )
    """offline: nothing but logged data, and the task serves only to judge the policy; evolve: a
    population, judged by whole episodes; generate: completions of prompts, judged by a reward;
    converse: whole dialogues with a game; draw: samples of a diffusion model, judged by a reward."""
    rows: ClassVar[Literal["pairs", "demonstrations", "prompts"]] = "demonstrations"
    """Of a language method: what each row of its text holds."""
    rewarded: ClassVar[bool] = False
    """Of a diffusion method: whether it needs a reward."""
    sets: ClassVar[bool] = False
    """Of a diffusion method: whether that may be one of whole sets of samples."""
    trains: ClassVar[bool] = True
    """Whether the model is changed; else only how it is drawn from."""
    data: ClassVar[Literal["none", "optional", "required"]] = "none"
    """Whether logged steps are read; then `experience` takes them (None where they are optional)."""
    headline: ClassVar[str] = "return"
    """The training metric that the live display shows."""
    games: ClassVar[bool] = False
    """Whether several agents can be trained, each with choices of its own."""
    shares: ClassVar[bool] = False
    """Whether several processes can train it together, each on its share of every batch."""
    shards: ClassVar[bool] = False
    """Whether each of them may hold its share of the weights alone."""

    def __init__(self, cfg: Any, spec: Any, runtime: Runtime):
        if spec.num_agents > 1 and not self.games:
            raise UserError(
                f"{type(self).__name__} trains one agent, and this task has {spec.num_agents}: use "
                "mamql, or a task of one agent"
            )
        self.cfg, self.spec, self.runtime = cfg, spec, runtime

    @classmethod
    def task(cls, cfg: Any, env: Any) -> Any:
        """The task (an EnvConfig) as this method acts in it, with what it wraps around it."""
        return env


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


class Learning(Learner[Any], Protocol):
    """A method that the offline loop can train."""

    cfg: Any
    spec: Spec

    @property
    def policy(self) -> nn.Module:
        """What is deployed: maps observations to a distribution with `mode` and `sample`."""
        ...

    def experience(self, *data: Any) -> Any:
        """What this method learns from: an empty store of steps, or one around the data given."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Evolver(Learning, Protocol):
    """A method that the evolve loop can train: it proposes, and is told what came of it."""

    num_updates: int
    """Of its networks, so far."""

    def ask(self, experience: Any) -> Candidates:
        """Whom to judge next."""
        ...

    def play(self, candidates: Candidates, obs: Float[Tensor, "n o"]) -> Float[Tensor, "n a"]:
        """What each of them does, in [-1, 1]."""
        ...

    def tell(self, candidates: Candidates, episodes: Episodes, experience: Any) -> list[Metrics]:
        """Take in an episode of each, and learn; what there is to report."""
        ...


class Proposer(Learning, Protocol):
    """A method that the generate loop can train: it writes, and learns from what came of it."""

    def propose(self, prompts: Prompts, step: int) -> Completions:
        """Completions to be judged, equally many of each prompt."""
        ...

    def update(self, batch: Scored, step: int) -> Metrics: ...


class Judge(Protocol):
    """A reward of what a diffusion model draws."""

    of_sets: bool
    """Whether it judges a whole set and not one sample."""

    def __call__(
        self, x: Float[Tensor, "b *d"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b"]:
        """Of each sample, not yet decoded, and its row of the data."""
        ...

    def embed(
        self, x: Float[Tensor, "b *d"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b e"]:
        """What `of_set` looks at of each sample."""
        ...

    def of_set(self, embedding: Float[Tensor, "n e"]) -> float:
        """Of a set of samples, by their embeddings."""
        ...


class Drawer(Protocol):
    """A method that the draw loop can drive: it draws from a diffusion model, and may train it."""

    cfg: Any

    def improve(
        self, asked: Asked, reward: Judge | None, step: int
    ) -> tuple[Metrics, Float[Tensor, "n"]]:
        """A part of the work for these conditions: what to report, and the rewards of all that was
        drawn (empty where there is no reward).

        Args:
            asked: what to draw.
            reward: what samples are worth; None: nothing says.
            step: counted from 1.
        """
        ...

    def draw(self, asked: Asked, seeds: Sequence[int]) -> Drawn:
        """Samples by what was found so far, each by its own seed."""
        ...


class Converser(Learning, Protocol):
    """A method that the converse loop can train: it talks with a game for several turns."""

    decoding: Any
    """How it writes; its `max_new_tokens` is the longest utterance."""

    @property
    def num_episodes(self) -> int:
        """Played in each iteration; 0: none, it learns from what it was given."""
        ...

    def propose(self, prompts: Prompts, step: int) -> Completions:
        """An utterance for each prompt."""
        ...

    def update(self, batch: Any, step: int) -> Metrics:
        """Learn from the experience, to which the new episodes have been added."""
        ...


class Control(Learning, Actor, Protocol):
    """A method that the online loop can train; its `experience` is an `Experience`."""


def act_by(
    policy: nn.Module, obs: Float[Tensor, "n *o"], *, explore: bool
) -> Shaped[Tensor, "n *a"]:
    """A sample of the policy's distribution, or its mode; with a memory, the first of an episode."""
    return Player(policy, explore=explore)(obs)


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
