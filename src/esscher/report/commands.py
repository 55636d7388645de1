"""What to type next: whole commands, which repeat the settings of the runs that the page is about."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esscher.errors import UserError
from esscher.registry import STAGE_PARTS

from .ranking import Group
from .runs import RunRecord

if TYPE_CHECKING:
    from esscher.experiment import Experiment

SEEDS = 10

FOOTING = {
    "control": {"hidden": (256, 256), "updates_per_step": 1.0},
    "language": {"batch_size": 32},
    "diffusion": {"batch_size": 32},
}
"""What `esscher compare` makes equal in methods of each world, and to what by itself."""

OF_THE_MACHINE = ("runtime.device", "runtime.threads", "runtime.graph")
"""A run records what its machine had; another one chooses for itself."""

Settings = dict[str, Any]


def commands(runs: Sequence[RunRecord], groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Each with its purpose."""
    unfinished = [
        (f"Go on with {run.name}, seed {run.seed}, on {run.env}", f"esscher resume {_path(run)}")
        for run in runs
        if not run.finished
    ]
    return unfinished + [command for group in groups for command in _commands_of(group)]


def _commands_of(group: Group) -> list[tuple[str, str]]:
    scored = [ranking.scored[0] for ranking in group.every if ranking.scored]
    best = max(scored[0].counted, key=lambda run: run.returns[-1]) if scored else group.runs[0]
    word = "Evaluate" if group.world == "control" else "Judge"
    again = (f"{word} {best.name}, seed {best.seed}, again", f"esscher eval {_path(best)}")
    further = {
        "control": [("Take its policy to another tool", f"esscher export {_path(best)} --to onnx")],
        "sets": [
            ("Draw its populations again", f"esscher sample {_path(best)}"),
            ("Read the vectors of its populations", f"head {_path(best)}/embeddings.csv"),
        ],
        "language": [
            ("Let it write", f"esscher sample {_path(best)} --prompt TEXT"),
            ("Take its model to another tool", f"esscher export {_path(best)} --to transformers"),
        ],
        "diffusion": [
            ("Let it draw", f"esscher sample {_path(best)}"),
            ("Take its model to another tool", f"esscher export {_path(best)} --to diffusers"),
        ],
    }
    task = next(ranking for ranking in group.rankings if best in ranking.runs)
    # The lowest seed of each method stands for the others, which have the same settings.
    more = more_seeds([entry.runs[0] for entry in task.entries])
    seeds = [("Learn more with more seeds", more)] if more else []
    return [again, *further.get(group.world, []), *seeds]


def more_seeds(runs: Sequence[RunRecord]) -> str:
    """Runs of one task, each with more seeds: one comparison where that gives every method the settings
    that it had, else a sweep of each, a line each. Empty if this version cannot read the settings.
    """
    from esscher.experiment import Experiment

    try:
        experiments = [Experiment.from_json(run.config) for run in runs]
    except UserError:
        return ""
    return _comparison(experiments) or "\n".join(filter(None, map(_sweep, experiments)))


def _sweep(experiment: "Experiment") -> str:
    """By the name of a recipe where that has the same settings, else with all that the method does not
    choose itself; empty where an earlier stage cannot be said so.
    """
    from esscher.experiment import Experiment
    from esscher.registry import load_module, recipes

    slug, wanted = experiment.slug, _settings(experiment)
    begun = {slug: Experiment.of(load_module(slug).Config())}
    begun |= {f"{slug}:{name}": recipe() for name, recipe in recipes(slug).items()}
    begun = {target: e for target, e in begun.items() if e.stages[:-1] == experiment.stages[:-1]}
    exact = [target for target, start in begun.items() if _settings(start) == wanted]
    if not exact and slug not in begun:
        return ""
    said = [] if exact else _options(wanted, _settings(begun[slug]))
    # Ray, which a sweep takes by itself, need not be installed.
    end = ["--seeds", str(SEEDS), "--engine", "processes"]
    return " ".join(["esscher sweep", exact[0] if exact else slug, *said, *end])


def _comparison(experiments: Sequence["Experiment"]) -> str:
    """Empty unless it gives every method the settings that it had."""
    from esscher.experiment import CheckpointConfig, Experiment
    from esscher.registry import load_method
    from esscher.runtime.sweep import comparison

    experiments = sorted(experiments, key=lambda e: e.slug)
    first, slugs = experiments[0], [e.slug for e in experiments]
    world = load_method(first.slug).world
    if len(experiments) < 2 or len(set(slugs)) < len(slugs) or world not in FOOTING:
        return ""
    stages = [e.stages[-1] for e in experiments]
    stage = next((stage for stage in stages if stage.data is not None), stages[0])
    for footing in (_shared(experiments, FOOTING[world]), {}):
        try:
            made = comparison(
                slugs,
                stage=stage,
                seeds=[0],
                **footing,
                evaluation=first.evaluation,
                runtime=first.runtime,
                log=first.log,
            )
        except UserError:
            continue
        if all(
            _settings(m) == _settings(_seldom(e)) for m, e in zip(made, experiments, strict=True)
        ):
            break
    else:
        return ""
    wanted = _settings(dataclasses.replace(first, stages=(stage,), checkpoint=CheckpointConfig()))
    said = _options(wanted, _settings(Experiment.of(load_method(first.slug).Config())))
    said = [o for o in said if not o.startswith(("--method.", "--checkpoint."))]
    said += _options(footing, FOOTING[world]) if footing else ["--as-published"]
    return " ".join(["esscher compare", *slugs, *said, f"--seeds {SEEDS}"])


def _shared(experiments: Sequence["Experiment"], usual: Settings) -> Settings:
    """What the methods have alike of what a comparison makes equal; as usual what none of them has."""
    methods = [experiment.method for experiment in experiments]
    had = {name: [getattr(m, name) for m in methods if hasattr(m, name)] for name in usual}
    return {name: had[name][0] if had[name] else value for name, value in usual.items()}


def _seldom(experiment: "Experiment") -> "Experiment":
    """With the checkpoints of a comparison, which change no number but where they reset a task."""
    from esscher.experiment import CheckpointConfig

    checkpoint = experiment.checkpoint
    return (
        experiment
        if checkpoint.barrier
        else dataclasses.replace(experiment, checkpoint=CheckpointConfig())
    )


def _settings(experiment: "Experiment") -> Settings:
    """{name of an option: value} of all that the world of a method has, but its seed."""
    from esscher.registry import load_method

    stage = experiment.stages[-1]
    parts = (*STAGE_PARTS[load_method(experiment.slug).world], "data", "steps")
    found = {part: getattr(stage, part) for part in parts}
    for part in ("method", "evaluation", "checkpoint", "runtime", "log"):
        found[part] = getattr(experiment, part)
    # A sweep labels its runs, if only with the slug.
    found["label"] = None if experiment.name == experiment.slug else experiment.label
    leaves = dict(leaf for part, value in found.items() for leaf in _leaves(value, part))
    return {name: value for name, value in leaves.items() if name not in OF_THE_MACHINE}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not dataclasses.is_dataclass(value):
        yield name, value
        return
    for field in dataclasses.fields(value):
        yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")


def _options(wanted: Settings, usual: Mapping[str, Any]) -> list[str]:
    """Of those settings that are not as usual."""
    return [_option(name, value) for name, value in wanted.items() if usual.get(name) != value]


def _option(name: str, value: Any) -> str:
    owner, _, last = name.replace("_", "-").rpartition(".")
    start = f"--{owner}." if owner else "--"
    if isinstance(value, bool):
        return f"{start}{'' if value else 'no-'}{last}"
    words = [value]
    if isinstance(value, Mapping):
        words = [word for pair in value.items() for word in pair]
    elif isinstance(value, list | tuple):
        words = list(value)
    flag = "--model" if name == "model.source" else start + last
    return " ".join([flag, *(shlex.quote(str(word)) for word in words)])


def _path(run: RunRecord) -> str:
    return shlex.quote(str(run.folder))
