"""Everything that defines a run, as plain typed data with a strict JSON round trip."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from esscher import __version__
from esscher.errors import UserError, nearest, require
from esscher.registry import load_method, slug_of
from esscher.runtime.device import RuntimeConfig


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Which task, and how many copies of it at once."""

    id: str = "HalfCheetah-v5"
    """A Gymnasium id, or module:factory for your own (a callable that returns a gymnasium.Env)."""
    num: int = 1
    """Environments stepped together; each step of all of them counts `num` environment steps."""
    parallel: bool = False
    """Step them in processes of their own: pays where one step takes more than about 0.5 ms."""
    max_episode_steps: int | None = None
    """Truncate episodes at this length; None keeps the task's own limit."""
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to the environment: --env.kwargs ctrl_cost_weight 0.05."""

    def __post_init__(self) -> None:
        require("env.num", self.num, self.num >= 1, ">= 1")
        limit = self.max_episode_steps
        require("env.max_episode_steps", limit, limit is None or limit >= 1, "None or >= 1")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One phase of training: a loop, what it runs on, and how long."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """The task; one that learns from data alone is only judged in it."""
    data: str | None = None
    """Logged steps to learn from: minari:NAME, FILE.hdf5 (D4RL), FOLDER of .npz, or module:function
    for your own (returns arrays, or an esscher.experience.Dataset)."""
    steps: int = 100_000
    """Environment steps, counted over all parallel copies; updates, where a method learns from data
    alone."""

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how the policy is judged. Evaluating more often never changes training."""

    every: int = 5_000
    """Environment steps between evaluations; 0: only at the end."""
    episodes: int = 10
    """Episodes an evaluation, each from its own fixed seed."""
    deterministic: bool = True
    """Take the mode of the policy instead of a sample."""
    step_limit: int = 10_000
    """Steps after which an evaluation episode is cut in a task that has no limit of its own."""

    def __post_init__(self) -> None:
        require("evaluation.every", self.every, self.every >= 0, ">= 0")
        require("evaluation.episodes", self.episodes, self.episodes >= 1, ">= 1")
        require("evaluation.step_limit", self.step_limit, self.step_limit >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves itself, and what it keeps."""

    every: int = 10_000
    """Environment steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Complete checkpoints kept."""
    barrier: bool = False
    """Reset the environments at each checkpoint. Set by itself where an environment's state cannot
    be saved, so that the interrupted and the uninterrupted run still agree."""

    def __post_init__(self) -> None:
        require("checkpoint.every", self.every, self.every >= 0, ">= 0")
        require("checkpoint.keep", self.keep, self.keep >= 1, ">= 1")


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go; metrics.jsonl is always written."""

    every: int = 1_000
    """Environment steps between rows of training metrics."""
    to: tuple[Tracker, ...] = ("tensorboard",)
    """Trackers to feed as well, each only if it is installed."""

    def __post_init__(self) -> None:
        require("log.every", self.every, self.every >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A complete run: `esscher.run(experiment)` needs nothing else."""

    method: Any
    """The method's Config, which also says which method it is."""
    stages: tuple[Stage, ...] = (Stage(),)
    seed: int = 0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    label: str | None = None
    """Name in reports, for telling variants of one method apart."""

    def __post_init__(self) -> None:
        require("seed", self.seed, 0 <= self.seed < 2**63, "in [0, 2**63)")
        require("stages", self.stages, len(self.stages) >= 1, "at least one stage")
        kinds = {**typing.get_type_hints(type(self)), "method": type(self.method)}
        for name, value in vars(self).items():
            _decode(kinds[name], _encode(value), name)

    @classmethod
    def of(
        cls,
        method: Any,
        *,
        env: EnvConfig | str | None = None,
        data: str | None = None,
        steps: int = 100_000,
        **options: Any,
    ) -> "Experiment":
        """An experiment of one stage.

        Args:
            method: a slug ("sac") or a method's Config.
            env: an environment id or a whole EnvConfig.
            data: logged steps to learn from; see Stage.
            steps: environment steps, or updates from data alone.
            options: further fields (seed, evaluation, checkpoint, runtime, log, label).
        """
        if isinstance(method, str):
            method = load_method(method).Config()
        if not isinstance(env, EnvConfig):
            env = EnvConfig() if env is None else EnvConfig(id=env)
        return cls(method=method, stages=(Stage(env=env, data=data, steps=steps),), **options)

    @property
    def slug(self) -> str:
        return slug_of(self.method)

    @property
    def name(self) -> str:
        return self.label or self.slug

    @property
    def task(self) -> EnvConfig:
        """The last stage's task as the method acts in it, with what the method wraps around it."""
        return load_method(self.slug).task(self.method, self.stages[-1].env)

    def resolved(self) -> "Experiment":
        """With every automatic choice of the runtime made for this machine, and data files named by
        their whole path, so that a run can be resumed from another working folder.

        Raises:
            UserError: the device is not there, warm-up leaves no step to learn in, or data are given
                to a method that reads none, or missing for one that needs them.
        """
        kind = load_method(self.slug)
        if kind.data == "none" and self.stages[-1].data is not None:
            raise UserError(f"{self.slug} learns from its own steps only: leave out --data")
        if kind.data == "required" and self.stages[-1].data is None:
            raise UserError(
                f"{self.slug} learns from logged steps: give --data minari:NAME, FILE.hdf5, a FOLDER "
                "of .npz files or module:function (esscher data collect makes some)"
            )
        steps, warmup = self.stages[-1].steps, getattr(self.method, "warmup", 0)
        if warmup >= steps:
            raise UserError(
                f"method.warmup {warmup} leaves nothing to learn in {steps} steps: lower "
                "--method.warmup, or raise --steps"
            )
        width = max(getattr(self.method, "hidden", ()), default=0)
        stages = tuple(replace(stage, data=_whole_path(stage.data)) for stage in self.stages)
        return replace(self, stages=stages, runtime=self.runtime.resolve(steps, width))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the slug and the version that can read it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"esscher_version": __version__, "slug": self.slug, **_encode(values)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Experiment":
        """The inverse of `to_json`.

        Raises:
            UserError: an unknown key, a missing key, or a value of the wrong type.
        """
        data = {key: value for key, value in data.items() if key != "esscher_version"}
        if "slug" not in data or "method" not in data:
            raise UserError("an experiment needs the keys slug and method")
        config = load_method(data.pop("slug")).Config
        method = _decode(config, data.pop("method"), "method")
        return replace(_decode(cls, {**data, "method": None}, "experiment"), method=method)


def _whole_path(data: str | None) -> str | None:
    path = None if data is None else Path(data).expanduser()
    return str(path.absolute()) if path is not None and path.exists() else data


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return value


def _decode(kind: Any, value: Any, path: str) -> Any:
    """Strict: nothing is coerced but whole numbers to float and lists to tuples."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, path)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _decode(option, value, path)
            except UserError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, path) for item in value)
        if len(value) == len(arguments):
            pairs = zip(arguments, value, strict=True)
            return tuple(_decode(option, item, path) for option, item in pairs)
    elif origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif kind is types.NoneType and value is None:
        return None
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise UserError(f"{path} must be {_name(kind)}, got {value!r}")


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a table of settings, got {value!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for key in value:
        if key not in known:
            raise UserError(f"{path} has no setting {key!r}: {nearest(key, known)}")
    return kind(**{k: _decode(hints[k], v, f"{path}.{k}") for k, v in value.items()})


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))
