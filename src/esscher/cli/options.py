"""From flags to settings: what the verbs share. tyro makes flags and help of dataclasses."""

import dataclasses
import sys
from dataclasses import field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from esscher.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from esscher.experiment import Experiment


NOT_REPRODUCED, FAILED_RUNS, INTERRUPTED = 3, 4, 130


DATA_HELP = {
    "control": "Logged steps to learn from: minari:NAME, FILE.hdf5 (D4RL), FOLDER of .npz, or "
    "module:function.",
    "language": "Rows of text: FILE.jsonl, FILE.parquet, a FOLDER saved by datasets, a Hugging Face "
    "name, or module:function.",
    "diffusion": "Rows with a prompt or label each to draw: FILE.jsonl, FILE.parquet, a FOLDER saved "
    "by datasets, a Hugging Face name or module:function; real samples, where a method learns from "
    "those: besides, a FOLDER of images or FILE.npz.",
    "sets": "Samples of populations, a row each, with a column set_id: FILE.parquet, FILE.csv, "
    "FILE.npz, a FOLDER saved by datasets or of images, or module:function (see docs/data.md).",
    "robots": "Demonstrations with images: a FOLDER in LeRobot's layout, or module:function.",
}


STEPS_HELP = {
    "control": "Environment steps, counted over all parallel copies.",
    "language": "Updates, or iterations of writing and learning.",
    "diffusion": "Updates, or iterations of drawing and learning.",
    "sets": "Updates.",
    "robots": "Updates.",
}


def world_of(slug: str) -> str:
    from esscher.registry import load_method

    return load_method(slug).world


def experiment_options(
    target: str, arguments: list[str], program: str, extras: type
) -> tuple["Experiment", Any]:
    """Flags for every field of an experiment, with the recipe's values as defaults."""
    from esscher.experiment import Experiment, Stage
    from esscher.registry import STAGE_PARTS, load_method, load_module, recipes

    slug, _, recipe = target.partition(":")
    module = load_module(slug)
    if recipe:
        known = recipes(slug)
        if recipe not in known:
            raise UserError(f"{slug} has no recipe {recipe!r}: {nearest(recipe, known)}")
        default = known[recipe]()
    else:
        default = Experiment.of(module.Config())
    stage = default.stages[-1]
    world = load_method(slug).world
    parts = STAGE_PARTS[world]
    values = {
        **{part: (type(getattr(stage, part)), getattr(stage, part)) for part in parts},
        "data": (str | None, stage.data),
        "steps": (int, stage.steps),
        "seed": (int, default.seed),
        "method": (module.Config, default.method),
        **{
            name: (type(getattr(default, name)), getattr(default, name))
            for name in ("evaluation", "checkpoint", "runtime", "log")
        },
        "label": (str | None, default.label),
    }
    arguments = in_full(arguments, values)
    for part in parts:
        kind, value = values[part]
        values[part] = (kind, _without_kwargs_of_another(part, value, arguments))
    arguments, added = _pairs_apart(arguments, {part: values[part][1] for part in parts})
    helps = {
        "data": DATA_HELP[world],
        "steps": STEPS_HELP[world],
        "seed": "Decides every random number of the run.",
        "label": "Name in reports, for telling variants apart.",
    }
    import tyro

    fields = [
        (
            name,
            Annotated[kind, tyro.conf.arg(help=helps[name])] if name in helps else kind,
            field(default_factory=lambda value=value: value),
        )
        for name, (kind, value) in values.items()
    ]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(extras,), kw_only=True)
    options_type.__doc__ = module.PAPER.title + ". " + module.PAPER.purpose
    options = parse(options_type, arguments, program)
    given = {part: getattr(options, part) for part in parts}
    for (part, name), pairs in added.items():
        merged = getattr(given[part], name) | pairs
        given[part] = dataclasses.replace(given[part], **{name: merged})
    experiment = Experiment(
        method=options.method,
        stages=(
            *default.stages[:-1],
            Stage(**given, data=options.data, steps=options.steps),
        ),
        seed=options.seed,
        evaluation=options.evaluation,
        checkpoint=options.checkpoint,
        runtime=options.runtime,
        log=options.log,
        label=options.label,
    )
    return experiment, options


def in_full(arguments: list[str], values: dict[str, Any]) -> list[str]:
    """Short options as long ones: --model X is --model.source X, --beta is --method.beta."""
    groups = {
        name: {f.name for f in dataclasses.fields(values[name][0])}
        for name in ("method", "text", "image", "sets", "robot", "model")
        if name in values
    }
    full = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        owners = [group for group, names in groups.items() if name in names]
        if flag == "--model" and "model" in groups:
            flag = "--model.source"
        elif (
            flag.startswith("--")
            and name not in values
            and name != "directory"
            and len(owners) == 1
        ):
            flag = f"--{owners[0]}.{flag[2:]}"
        full.append(flag + equals + value)
    return full


MADE_WITH = {
    ("model", "source"): "kwargs",
    ("env", "id"): "kwargs",
    ("image", "reward"): "reward_kwargs",
    ("image", "judge"): "judge_kwargs",
    ("text", "game"): "game_kwargs",
}
"""Settings that name something, and those that it is made with."""


def _without_kwargs_of_another(part: str, value: Any, arguments: list[str]) -> Any:
    """Settings of a recipe, without what the thing is made with in whose place another is named."""
    for (owner, name), kwargs in MADE_WITH.items():
        flag = f"--{owner}.{name}"
        given = [
            argument[len(flag) + 1 :] for argument in arguments if argument.startswith(f"{flag}=")
        ]
        given += [there for here, there in pairwise(arguments) if here == flag]
        if owner == part and given and given[-1] != getattr(value, name):
            value = dataclasses.replace(value, **{kwargs: {}})
    return value


def _pairs_apart(
    arguments: list[str], parts: dict[str, Any]
) -> tuple[list[str], dict[tuple[str, str], dict[str, Any]]]:
    """Arguments without pairs `--model.kwargs NAME VALUE ...` of a recipe that has some already, which
    tyro has a flag for each of, and these pairs.

    Raises:
        UserError: a name without a value.
    """
    left: list[str] = []
    found: dict[tuple[str, str], dict[str, Any]] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        part, _, name = flag.removeprefix("--").replace("-", "_").partition(".")
        default = getattr(parts.get(part), name, None)
        if not (isinstance(default, dict) and default):
            left.append(flag)
            continue
        words = leading(rest)
        if not words or len(words) % 2:
            raise UserError(f"{flag} takes names, each with its value, got {' '.join(words)!r}")
        pairs = zip(words[::2], words[1::2], strict=True)
        found.setdefault((part, name), {}).update({k: _value_of(v) for k, v in pairs})
    return left, found


def _value_of(word: str) -> int | float | bool | str:
    """As tyro reads a value that may be a number, a truth or a word."""
    if word in ("True", "False"):
        return word == "True"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def parse(options: Any, arguments: list[str], program: str) -> Any:
    """An instance of a dataclass from flags; --help and what is wrong end the process."""
    import tyro

    return tyro.cli(options, args=arguments, prog=program)


def positional(arguments: list[str], usage: str, name: str) -> str:
    """The word before the first option, taken away.

    Raises:
        UserError: it is missing.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments.pop(0)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n(options depend on {name}: give it before --help)")
        sys.exit(0)
    raise UserError(f"{name} is missing: {usage}")


def leading(arguments: list[str]) -> list[str]:
    """The words before the first option, taken away; a negative number is no option."""
    words = []
    while arguments and (
        not arguments[0].startswith("-") or isinstance(_value_of(arguments[0]), int | float)
    ):
        words.append(arguments.pop(0))
    return words


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def terminal() -> "Console":
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Its own way ends the process with status 1.

    return Plain()
