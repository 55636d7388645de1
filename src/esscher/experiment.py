"""Everything that defines a run, as plain typed data with a strict JSON round trip."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field, replace
from functools import cache
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
    """A Gymnasium id; ogbench:MAZE or gymnasium_robotics:MAZE, such as ogbench:pointmaze-medium-v0;
    or module:factory for your own (a callable that returns a gymnasium.Env)."""
    num: int = 1
    """Environments stepped together; each step of all of them counts `num` environment steps."""
    parallel: bool = False
    """Step them in processes of their own: pays where one step takes more than about 0.5 ms."""
    ray: str | None = None
    """Step them as actors of Ray instead, on the cluster of this address, or local: pays where one step
    takes more than a few milliseconds, or more processors than this machine has."""
    max_episode_steps: int | None = None
    """Truncate episodes at this length; None keeps the task's own limit."""
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to the environment: --env.kwargs ctrl_cost_weight 0.05."""

    def __post_init__(self) -> None:
        require("env.num", self.num, self.num >= 1, ">= 1")
        if self.parallel and self.ray is not None:
            raise UserError(
                "env.parallel and env.ray exclude each other: processes, or Ray's actors"
            )
        limit = self.max_episode_steps
        require("env.max_episode_steps", limit, limit is None or limit >= 1, "None or >= 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which language or diffusion model, and what of it is trained."""

    source: str | None = None
    """A folder of the transformers or diffusers library (an earlier run's RUN/model, say), a Hugging
    Face name, or module:function for your own (returns a causal model and its tokenizer, or a
    diffusion model: see esscher/images.py)."""
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to a module:function: --model.kwargs layers 4."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights that stay frozen; trained ones are held in float32, and so are those of a reference
    beside them, but where runtime.precision is bfloat16."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank (peft's LoRA) on every linear layer of a language model, on
    the attention of a diffusion model; 0: all weights."""
    lora_alpha: float = 32.0
    """Adapters are scaled by this over their rank, > 0."""
    gradient_checkpointing: bool = False
    """Recompute activations for the gradient: about a third slower, a fraction of their memory."""

    def __post_init__(self) -> None:
        require("model.lora_rank", self.lora_rank, self.lora_rank >= 0, ">= 0")
        require("model.lora_alpha", self.lora_alpha, self.lora_alpha > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How rows of text are read, cut and judged."""

    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns where the data have others: --text.columns prompt question chosen best."""
    split: str = "train"
    """Of a Hugging Face data set."""
    max_length: int = 512
    """Most tokens of a prompt and its completion together."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to rows above max_length; nothing is ever cut off."""
    held_out: str | None = None
    """Rows to judge the model on; None: held_out_share of the data."""
    held_out_share: float = 0.1
    """Share of the rows that is kept out of training, in [0, 0.9]; 0: the model is judged on the
    rows that it learns from."""
    task: str | None = None
    """Prompts that are made, with their verifier: reasoning_gym:NAME."""
    task_size: int = 1_000
    """How many prompts such a task makes, >= 2."""
    reward: str | None = None
    """module:function that scores completions: see docs/rewards.md."""
    reward_seconds: float = 10.0
    """Time for the reward of one completion, > 0; one that takes longer counts as failed."""
    game: str | None = None
    """What is talked with for several turns: textworld:FILE, textarena:NAME, or module:function for
    your own (returns an object with reset and step, see esscher/adapters/text_envs.py)."""
    game_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to the game: --text.game-kwargs doors 4."""
    history: Literal["transcript", "chat", "observation"] = "transcript"
    """What the model is shown at each turn of a game: the dialogue so far, as lines or as messages
    for the tokenizer's chat template, or the last observation alone. What is too long loses its
    beginning."""
    max_turns: int = 20
    """A game is cut after this many turns, >= 1."""

    def __post_init__(self) -> None:
        require("text.max_length", self.max_length, self.max_length >= 2, ">= 2")
        share = self.held_out_share
        require("text.held_out_share", share, 0 <= share <= 0.9, "in [0, 0.9]")
        require("text.task_size", self.task_size, self.task_size >= 2, ">= 2")
        require("text.reward_seconds", self.reward_seconds, self.reward_seconds > 0, "> 0")
        require("text.max_turns", self.max_turns, self.max_turns >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a diffusion model is asked to draw, and how that is judged."""

    labels: tuple[int, ...] = ()
    """Classes to draw, in turn, where no data say what to draw."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns where the data have others: --image.columns prompt caption."""
    split: str = "train"
    """Of a Hugging Face data set."""
    reward: str | None = None
    """module:function that scores what was drawn: called with (images, rows), it returns one number an
    image; or one of esscher.image_rewards. See docs/rewards.md."""
    reward_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Of a reward that is made first: --image.reward-kwargs target 3."""
    judge: str | None = None
    """Another reward, which is only reported: whether what was gained is more than the reward's own
    mistakes."""
    judge_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Of a judge that is made first."""
    at_once: int = 64
    """Samples drawn at once where the model is judged, >= 1."""

    def __post_init__(self) -> None:
        require("image.labels", self.labels, all(n >= 0 for n in self.labels), ">= 0 each")
        require("image.at_once", self.at_once, self.at_once >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """What populations are, and what sets are drawn of them."""

    size: int = 100
    """Samples drawn of a population for an update, >= 2; smaller ones are taken whole."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns where the data have others: --sets.columns set_id donor label age."""
    features: tuple[str, ...] = ()
    """Columns that are the components of a sample; empty: all but set_id and label."""
    split: str = "train"
    """Of a Hugging Face data set."""
    bandwidth: float = 0.0
    """> 0: populations are neighbourhoods of the values of a continuous label, with Gaussian weights of
    this standard deviation, in the label's units; 0: the rows of each set_id."""
    mixed: int = 0
    """> 0: a set is a mixture of so many populations, drawn anew for every update; 0: of one."""
    concentration: float = 1.0
    """Of the Dirichlet distribution of a mixture's weights, > 0; 1 is uniform, less favours few."""
    held_out_share: float = 0.1
    """Share of the populations (of mixtures, of their rows) that is kept out of training, in [0, 0.9];
    0: what is learned from also judges."""
    standardise: bool = True
    """Bring each component to mean 0 and deviation 1 over the training data; distances are then in
    these units."""

    def __post_init__(self) -> None:
        require("sets.size", self.size, self.size >= 2, ">= 2")
        require("sets.bandwidth", self.bandwidth, self.bandwidth >= 0, ">= 0")
        require("sets.mixed", self.mixed, self.mixed >= 0, ">= 0")
        require("sets.concentration", self.concentration, self.concentration > 0, "> 0")
        share = self.held_out_share
        require("sets.held_out_share", share, 0 <= share <= 0.9, "in [0, 0.9]")


@dataclass(frozen=True, kw_only=True)
class RobotConfig:
    """What a robot that sees learns from, and where it is judged."""

    cameras: tuple[str, ...] = ()
    """Of the data's, in this order; empty: all of them."""
    tasks: tuple[str, ...] = ()
    """Where the policy is judged, such as metaworld:reach-v3, or module:factory for your own (see
    esscher/adapters/robots.py); empty: where the data say they were made."""
    task_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to every task: --robot.task-kwargs camera corner."""
    held_out_share: float = 0.1
    """Share of the episodes of each instruction that is kept out of training, in [0, 0.9]; 0: actions
    are judged on what is learned from."""

    def __post_init__(self) -> None:
        share = self.held_out_share
        require("robot.held_out_share", share, 0 <= share <= 0.9, "in [0, 0.9]")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One phase of training: a loop, what it runs on, and how long."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """The task of a controller; one that learns from data alone is only judged in it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model of a language or diffusion method, or what a robot sees with."""
    text: TextConfig = field(default_factory=TextConfig)
    """The task of a language method."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """The task of a diffusion method."""
    sets: SetConfig = field(default_factory=SetConfig)
    """The populations of a method that embeds sets."""
    robot: RobotConfig = field(default_factory=RobotConfig)
    """Where a robot that sees is judged."""
    data: str | None = None
    """Logged steps to learn from: minari:NAME, FILE.hdf5 (D4RL), FOLDER of .npz, or module:function
    for your own (returns arrays, or an esscher.experience.Dataset). Of a language method, rows of
    text: FILE.jsonl, FILE.parquet, a FOLDER saved by datasets, a Hugging Face name, or
    module:function; of a diffusion method, rows with a prompt or label each to draw; of
    a method that embeds sets, a long table of samples; of a robot that sees, a LeRobot FOLDER of
    demonstrations, or module:function (returns an esscher.experience.scenes.SceneData)."""
    steps: int = 100_000
    """Environment steps, counted over all parallel copies; updates, where a method learns from data
    alone; iterations, where a model writes or draws and is judged."""

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how the policy is judged. Evaluating more often never changes training."""

    every: int = 5_000
    """Steps between evaluations; 0: only at the end. A language model is judged before training too."""
    episodes: int = 10
    """Episodes an evaluation, each from its own fixed seed; of a language model, rows held out that
    it is judged on (and as many completions)."""
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


DEFAULT_STEPS = {
    "control": 100_000,
    "language": 1_000,
    "diffusion": 100,
    "sets": 10_000,
    "robots": 10_000,
}

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
        kinds = {**_hints(type(self)), "method": type(self.method)}
        for name, value in vars(self).items():
            _decode(kinds[name], _encode(value), name)

    @classmethod
    def of(
        cls,
        method: Any,
        *,
        env: EnvConfig | str | None = None,
        model: ModelConfig | str | None = None,
        text: TextConfig | None = None,
        image: ImageConfig | None = None,
        sets: SetConfig | None = None,
        robot: RobotConfig | None = None,
        data: str | None = None,
        steps: int | None = None,
        **options: Any,
    ) -> "Experiment":
        """An experiment of one stage.

        Args:
            method: a slug ("sac") or a method's Config.
            env: an environment id or a whole EnvConfig.
            model: the source of a language model or a whole ModelConfig.
            text: how a language method's rows are read and judged.
            image: what a diffusion method draws, and how that is judged.
            sets: what populations are, of a method that embeds sets.
            robot: where a robot that sees is judged.
            data: what to learn from; see Stage.
            steps: environment steps, updates from data alone, or iterations; by default 100,000, of
                language methods 1,000, of diffusion methods 100, of sets and robots 10,000.
            options: further fields (seed, evaluation, checkpoint, runtime, log, label).
        """
        if isinstance(method, str):
            method = load_method(method).Config()
        world = load_method(slug_of(method)).world
        if not isinstance(env, EnvConfig):
            env = EnvConfig() if env is None else EnvConfig(id=env)
        if not isinstance(model, ModelConfig):
            model = ModelConfig(source=model)
        stage = Stage(
            env=env,
            model=model,
            text=text or TextConfig(),
            image=image or ImageConfig(),
            sets=sets or SetConfig(),
            robot=robot or RobotConfig(),
            data=data,
            steps=steps or DEFAULT_STEPS[world],
        )
        if world != "control":  # A step is seconds, where an environment's is a fraction of one.
            often = DEFAULT_STEPS[world] // 10
            options = {
                "evaluation": EvaluationConfig(every=often, episodes=32),
                "checkpoint": CheckpointConfig(every=often),
                "log": LogConfig(every=max(1, often // 10)),
            } | options
        return cls(method=method, stages=(stage,), **options)

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

    @property
    def subject(self) -> str:
        """What the last stage is about, for titles: the environment, or the data of a model."""
        stage, world = self.stages[-1], load_method(self.slug).world
        if world == "control":
            return stage.env.id
        if world == "diffusion":
            source = stage.data or stage.model.source or "images"
        elif world in ("sets", "robots"):
            source = stage.data or world
        else:
            source = stage.text.game or stage.text.task or stage.data or "text"
        return Path(source).name if Path(source).is_absolute() else source

    def resolved(self) -> "Experiment":
        """With every automatic choice of the runtime made for this machine, and data files and models
        named by their whole path, so that a run can be resumed from another working folder.

        Raises:
            UserError: the device is not there, warm-up leaves no step to learn in, or data or a model
                are given to a method that reads none, or missing for one that needs them.
        """
        kind, stage = load_method(self.slug), self.stages[-1]
        control = kind.world == "control"
        _check_language(self.slug, kind, stage)
        _check_diffusion(self.slug, kind, stage)
        if kind.world == "sets" and stage.data is None:
            raise UserError(
                f"{self.slug} learns from sets of samples: give --data FILE.parquet with a column "
                "set_id, FILE.csv, FILE.npz, a FOLDER or module:function"
            )
        if kind.world == "robots":
            _check_robots(self.slug, stage)
        if kind.data == "none" and stage.data is not None and control:
            raise UserError(f"{self.slug} learns from its own steps only: leave out --data")
        if kind.data == "required" and stage.data is None and control:
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
        widths = (*getattr(self.method, "hidden", ()), getattr(self.method, "width", 0))
        width = max(widths) if kind.world in ("control", "sets") else 1024
        stages = tuple(_with_whole_paths(stage) for stage in self.stages)
        # A method may have settings of its own that name files.
        method = self.method.resolved() if hasattr(self.method, "resolved") else self.method
        runtime = self.runtime.resolve(steps, width)
        runtime = replace(runtime, accelerate=whole_path(runtime.accelerate))
        return replace(self, method=method, stages=stages, runtime=runtime)

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


def _check_language(slug: str, kind: Any, stage: Stage) -> None:
    """Of a language method, that it has a model and text; of another, that it has none."""
    if kind.world == "control" and stage.model.source is not None:
        raise UserError(f"{slug} trains a controller, not a language model: leave out --model")
    if kind.world != "language":
        return
    if stage.model.source is None:
        raise UserError(
            f"{slug} needs a language model: give --model FOLDER, a Hugging Face name or "
            "module:function (esscher.models:tiny_llama makes a small one)"
        )
    if kind.loop == "converse" and stage.text.game is None:
        raise UserError(
            f"{slug} talks with a game: give --text.game textworld:FILE, textarena:NAME or "
            "module:function (esscher.text_envs:Doors is a small one)"
        )
    if kind.loop != "converse" and stage.text.game is not None:
        raise UserError(f"{slug} writes one completion of each prompt: leave out --text.game")
    if kind.loop == "converse":
        return
    if stage.data is not None and stage.text.task is not None:
        raise UserError("--data and --task exclude each other: both say what the prompts are")
    if stage.data is None and stage.text.task is None:
        what = {"pairs": "prompt, chosen, rejected", "demonstrations": "prompt, completion"}
        columns = what.get(kind.rows, "prompt")
        task = ", or --task reasoning_gym:NAME" if kind.rows == "prompts" else ""
        raise UserError(
            f"{slug} learns from rows of text (columns {columns}): give --data FILE.jsonl, "
            f"FILE.parquet, a FOLDER or module:function{task}"
        )


def _check_diffusion(slug: str, kind: Any, stage: Stage) -> None:
    """Of a diffusion method, that it has a model, one source of what to draw, and a reward."""
    if kind.world != "diffusion":
        return
    if stage.model.source is None:
        raise UserError(
            f"{slug} needs a diffusion model: give --model FOLDER of a diffusers pipeline, a Hugging "
            "Face name or module:function (esscher.images:mixture makes a small one)"
        )
    if stage.data is not None and stage.image.labels:
        raise UserError("--data and --image.labels exclude each other: both say what to draw")
    if kind.loop == "offline" and stage.data is None:
        raise UserError(
            f"{slug} learns from real samples: give --data FOLDER of images, FILE.npz, a Hugging Face "
            "name or module:function"
        )
    if kind.rewarded and stage.image.reward is None:
        raise UserError(
            f"{slug} needs a reward: give --reward module:function, called with (images, rows)"
        )


def _check_robots(slug: str, stage: Stage) -> None:
    """That there is a model to see with, and something to learn from."""
    if stage.model.source is None:
        raise UserError(
            f"{slug} needs a vision-language model: give --model FOLDER of the transformers library, "
            "a Hugging Face name or module:function (esscher.models:tiny_llava makes a small one)"
        )
    if stage.data is None:
        raise UserError(
            f"{slug} learns from demonstrations with images: give --data FOLDER in LeRobot's layout, "
            "or module:function (esscher data collect metaworld:reach-v3 --images 64 makes some)"
        )


def _with_whole_paths(stage: Stage) -> Stage:
    return replace(
        stage,
        data=whole_path(stage.data),
        model=replace(stage.model, source=whole_path(stage.model.source)),
        text=replace(
            stage.text, held_out=whole_path(stage.text.held_out), game=_whole_game(stage.text.game)
        ),
    )


def _whole_game(game: str | None) -> str | None:
    kind, _, path = (game or "").partition(":")
    return f"{kind}:{whole_path(path)}" if kind == "textworld" else game


def whole_path(data: str | None) -> str | None:
    """That of a file or folder that is there; any other name as it is."""
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
        if not math.isfinite(value):
            raise UserError(f"{path} must be finite, got {value}")
        return float(value)
    elif kind is types.NoneType and value is None:
        return None
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise UserError(f"{path} must be {_name(kind)}, got {value!r}")


def _decode_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{path} must be a table of settings, got {value!r}")
    hints = _hints(kind)
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for key in value:
        if key not in known:
            raise UserError(f"{path} has no setting {key!r}: {nearest(key, known)}")
    return kind(**{k: _decode(hints[k], v, f"{path}.{k}") for k, v in value.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return getattr(kind, "__name__", str(kind).replace("typing.", ""))
