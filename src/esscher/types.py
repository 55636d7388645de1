"""Batch records that travel between environments, experience and methods, and their vocabulary.

Named axes: b batch, n parallel environments, t time, e ensemble, o observation, a action.
A missing field is an attribute error with a type checker behind it, never a string key.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor

Metrics = dict[str, Tensor]
"""What an update reports: name -> 0-d detached tensor, never a number (that would synchronise)."""


class Record:
    """Tensors that share their leading axis."""

    __slots__ = ()

    _names: ClassVar[tuple[str, ...]] = ()
    """Of the fields, noted once: dataclasses.fields takes longer than a step of a small environment."""

    def __post_init__(self) -> None:
        lengths = {n: v.shape[0] for n, v in self.fields().items() if isinstance(v, Tensor)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{type(self).__name__}: leading axes differ: {lengths}")

    def fields(self) -> dict[str, Any]:
        """Name -> value, in declaration order."""
        return {name: getattr(self, name) for name in self._names}

    def to(self, device: torch.device | str) -> Self:
        """The same record on another device."""
        return self._map(lambda value: value.to(device))

    def index(self, index: Any) -> Self:
        """Rows of every field; `index` is whatever a tensor accepts on its leading axis."""
        return self._map(lambda value: value[index])

    def split(self, size: int) -> list[Self]:
        """Pieces of at most `size` rows, in order; 0: one piece."""
        size = size or len(self)
        return [self.index(slice(k, k + size)) for k in range(0, len(self), size)]

    @classmethod
    def cat(cls, records: Sequence[Self]) -> Self:
        """Concatenate records of tensors along the leading axis."""
        names = records[0].fields()
        return cls(**{name: torch.cat([getattr(r, name) for r in records]) for name in names})

    def __len__(self) -> int:
        return len(next(iter(self.fields().values())))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        def apply(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, Mapping):
                return {name: function(item) for name, item in value.items()}
            if isinstance(value, Record):
                return value._map(function)
            return function(value)

        return type(self)(**{name: apply(value) for name, value in self.fields().items()})


RecordType = TypeVar("RecordType", bound=type)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: RecordType) -> RecordType:
    """Frozen, slotted, keyword-only dataclass."""
    made: Any = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)
    made._names = tuple(field.name for field in dataclasses.fields(made))
    return made


@record
class Transitions(Record):
    """Steps of an environment, in any order.

    `terminated` ends the task and stops bootstrapping; `truncated` (a time limit, a reset boundary)
    only ends the recording, and `next_obs` is then still the observation that the action led to.
    """

    obs: Float[Tensor, "b *o"]
    action: Shaped[Tensor, "b *a"]
    reward: Float[Tensor, "b"]
    next_obs: Float[Tensor, "b *o"]
    terminated: Bool[Tensor, "b"]
    truncated: Bool[Tensor, "b"]


@record
class NStepTransitions(Transitions):
    """Several steps as one: `next_obs` lies up to n steps ahead."""

    discount: Float[Tensor, "b"]
    """Weight of the value of `next_obs`: the discount to the power of the steps up to there."""


@record
class DescribedTransitions(Transitions):
    """Steps that know how the episode around them turned out, and how it was meant to."""

    achieved: Float[Tensor, "b c"]
    """Descriptor of the whole episode."""
    requested: Float[Tensor, "b c"]
    """Descriptor that the actor was asked for; equal to `achieved` where nothing was asked."""


@record
class Rollout(Record):
    """Consecutive steps of n environments; `extras` holds what the actor said at acting time."""

    obs: Float[Tensor, "t n *o"]
    action: Shaped[Tensor, "t n *a"]
    reward: Float[Tensor, "t n"]
    next_obs: Float[Tensor, "t n *o"]
    terminated: Bool[Tensor, "t n"]
    truncated: Bool[Tensor, "t n"]
    extras: dict[str, Float[Tensor, "t n"]]


@record
class Action(Record):
    """What an actor does, and what it wants remembered (log-probability, value) with it."""

    value: Shaped[Tensor, "n *a"]
    extras: dict[str, Float[Tensor, "n"]] = dataclasses.field(default_factory=dict)


@record
class Population(Record):
    """Individuals that have been judged."""

    genotype: Float[Tensor, "p g"]
    fitness: Float[Tensor, "p"]
    descriptor: Float[Tensor, "p c"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A prompt and one completion of it."""

    prompt: list[int]
    completion: list[int]
    """With its end token."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@record
class Demonstrations(Record):
    """Prompts with completions to imitate, padded on the right."""

    tokens: Int[Tensor, "b t"]
    token_mask: Bool[Tensor, "b t"]
    """What is no padding."""
    completion_mask: Bool[Tensor, "b t"]
    row: Int[Tensor, "b"]
    """Which row of the data each one is."""


@record
class Pairs(Record):
    """Two completions of each prompt, the chosen and then the rejected, padded on the right."""

    tokens: Int[Tensor, "b 2 t"]
    token_mask: Bool[Tensor, "b 2 t"]
    """What is no padding."""
    completion_mask: Bool[Tensor, "b 2 t"]
    row: Int[Tensor, "b"]
    """Which row of the data each one is."""


@record
class Prompts(Record):
    """What a language model is to go on from, padded on the left."""

    tokens: Int[Tensor, "p t"]
    mask: Bool[Tensor, "p t"]
    """What is no padding."""
    row: Int[Tensor, "p"]
    """Which row of the data each one is."""


@record
class Completions(Record):
    """Prompts, padded on the left, and what a language model wrote after them."""

    tokens: Int[Tensor, "b t"]
    prompt_mask: Bool[Tensor, "b t"]
    completion_mask: Bool[Tensor, "b t"]
    """The tokens that were drawn, an end token included."""
    logp: Float[Tensor, "b t"]
    """Log-probability of each drawn token, in nats, under the distribution that it was drawn from
    (temperature and truncation included); elsewhere 0."""
    group: Int[Tensor, "b"]
    """Which prompt a row answers."""
    finished: Bool[Tensor, "b"]
    """Whether an end token was drawn, rather than the limit of length reached."""

    @property
    def token_mask(self) -> Bool[Tensor, "b t"]:
        """What is no padding."""
        return self.prompt_mask | self.completion_mask


@record
class Scored(Record):
    """Completions that have been judged."""

    completions: Completions
    reward: Float[Tensor, "b"]
    """0 where judging failed."""
    valid: Bool[Tensor, "b"]
    """False where the reward raised, took too long or was not finite: such a row is no evidence."""
    parts: dict[str, Float[Tensor, "b"]]
    """What the reward consists of, by name; NaN where judging failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a diffusion model is to draw, a sample each."""

    row: list[int]
    """Which row of the data each one is."""
    rows: list[Mapping[str, Any]]
    """Those rows."""
    condition: Any
    """What the denoiser is told of each (see samplers/denoisers.py); None: nothing."""

    def __len__(self) -> int:
        return len(self.row)


@record
class Drawn(Record):
    """Samples of a diffusion model, not yet decoded."""

    x: Float[Tensor, "b *d"]
    told: dict[str, Float[Tensor, "b"]]
    """Of each sample, what there is to say about how it was drawn."""


@record
class Samples(Record):
    """Real samples, as a diffusion model has them."""

    x: Float[Tensor, "b *d"]
    condition: Any
    """What the denoiser is told of each; None: nothing."""


@record
class Sets(Record):
    """Sets of samples, each drawn from a distribution of its own, standardised."""

    x: Float[Tensor, "b m d"]
    """Padded with 0 where a set has fewer."""
    mask: Bool[Tensor, "b m"] | None
    """Which samples are there; None: all."""
    number: Int[Tensor, "b"]
    """Which population of the data each one is."""
    label: Int[Tensor, "b"] | None = None
    """Class of each population, -1 where it is not known; None: there are no classes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSpec:
    """What a method has to know of the samples in its sets. Methods see them flat and standardised."""

    shape: tuple[int, ...]
    """Of one sample."""
    mean: tuple[float, ...]
    """Of each component over the data, in the data's units."""
    std: tuple[float, ...]
    """Likewise; 1 where a component never changes."""
    columns: tuple[str, ...] = ()
    """Names of the components, where the data have them."""
    classes: tuple[str, ...] = ()
    """Of populations, where the data have labels of them."""
    num_agents: int = 1

    @property
    def dim(self) -> int:
        return len(self.mean)

    def standardised(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """From the data's units: (x - mean) / std."""
        return (x - x.new_tensor(self.mean)) / x.new_tensor(self.std)

    def restored(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Back to the data's units."""
        return x * x.new_tensor(self.std) + x.new_tensor(self.mean)


@record
class Scenes(Record):
    """What robots see and are told to do, one row each."""

    images: UInt8[Tensor, "n c h w 3"]
    """Of c cameras, in the order of the specification's."""
    state: Float[Tensor, "n s"]
    """Of the robot itself (joints, gripper), in the task's units."""
    instruction: Int[Tensor, "n l"]
    """Tokens, padded on the right."""
    instruction_mask: Bool[Tensor, "n l"]
    """What is no padding."""


@record
class SceneChunks(Record):
    """Scenes, and what a demonstrator did from there on."""

    scenes: Scenes
    action: Float[Tensor, "b h a"]
    """In [-1, 1]; beyond the end of the episode its last action."""
    mask: Bool[Tensor, "b h"]
    """Which actions are of the episode itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotSpec:
    """What a method has to know of robots that see: actions are [-1, 1], as those of controllers."""

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    """Rows and columns."""
    state_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    instructions: tuple[str, ...]
    """Of the tasks that the data show."""
    tasks: tuple[str, ...]
    """Where each of them is played, such as metaworld:reach-v3; "" where the data do not say."""
    num_actions: None = None
    num_agents: int = 1

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    def native(self, action: NDArray[Any]) -> NDArray[np.float32]:
        """From [-1, 1] (clipped) to the task's own box."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        return (low + (np.clip(action, -1, 1) + 1) * 0.5 * (high - low)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Samples on their way from noise, in coordinates x = x0 + sigma eps."""

    x: Float[Tensor, "levels b *d"]
    sigma: Float[Tensor, "levels"]
    logp: Float[Tensor, "steps b"]
    """Log-probability of each step, in nats; 0 where it was no draw."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """Individuals to be judged, an episode each: first networks of their own, then one network
    that is asked for descriptors.
    """

    genotype: Float[Tensor, "p g"]
    intended: Float[Tensor, "p c"]
    """Descriptor that each of these was made for, in [-1, 1]; NaN where nothing was intended."""
    requested: Float[Tensor, "q c"]
    """Descriptors that the one network is asked for, about [-1, 1]."""

    def __len__(self) -> int:
        return len(self.genotype) + len(self.requested)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episodes:
    """One whole episode of each of n individuals."""

    transitions: Transitions
    """All steps, in the order of time; those of an individual end with its episode."""
    individual: Int[Tensor, "b"]
    """Which individual made each step, in [0, n)."""
    fitness: Float[Tensor, "n"]
    """Undiscounted returns."""
    length: Int[Tensor, "n"]
    """Steps."""
    descriptor: Float[Tensor, "n c"]
    """What each episode turned out to be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a controller has to know of its task.

    Continuous actions are normalised: methods act in [-1, 1] and the adapter rescales to the
    environment's box, so that entropies and noise levels mean the same on every task.
    """

    obs_shape: tuple[int, ...]
    action_shape: tuple[int, ...]
    num_actions: int | None = None
    """Number of choices of a discrete action space; None for a box."""
    action_low: tuple[float, ...] = ()
    action_high: tuple[float, ...] = ()
    action_start: int = 0
    """First label of a discrete action space."""
    num_envs: int = 1
    num_agents: int = 1
    """Above 1, observations are as many of one length, end to end, and an action is as many choices."""
    descriptor_low: tuple[float, ...] = ()
    """Smallest descriptor of an episode, where the task describes its episodes; else empty."""
    descriptor_high: tuple[float, ...] = ()
    goal: tuple[int, ...] = ()
    """Entries of a flat observation that hold the goal which is wanted, where the task says so."""
    achieved: tuple[int, ...] = ()
    """Entries that such a goal is about."""

    @property
    def obs_dim(self) -> int:
        return self.obs_shape[0]

    @property
    def action_dim(self) -> int:
        """Number of action components; raises for a discrete space."""
        if self.num_actions is not None:
            raise ValueError("a discrete action space has no action dimension")
        return self.action_shape[0]
