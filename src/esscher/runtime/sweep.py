"""Sweeps and comparisons: lists of experiments, run together under one folder."""

import dataclasses
import itertools
import json
import typing
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from esscher.errors import UserError, nearest
from esscher.experiment import (
    EvaluationConfig,
    Experiment,
    LogConfig,
    Stage,
)
from esscher.registry import STAGE_PARTS, load_method
from esscher.runtime.device import RuntimeConfig
from esscher.runtime.jobs import Engine, Outcome, run_all
from esscher.runtime.run import read_experiment, write_config


def sweep(
    experiments: Sequence[Experiment],
    root: Path,
    *,
    workers: int,
    engine: Engine = "processes",
    address: str | None = None,
    retries: int = 1,
    display: bool = True,
) -> list[Outcome]:
    """Run experiments under `root`, each in NAME/seed_K; what is there already is resumed.

    Raises:
        UserError: a folder under root holds a run with other settings.
    """
    folders = [run_folder(root, e) for e in experiments]
    if len(set(folders)) < len(folders):
        raise UserError("two experiments have the same name and seed: give them labels")
    pairs = list(zip(experiments, folders, strict=True))
    for experiment, folder in pairs:
        if (folder / "config.json").exists():
            _refuse_other_settings(experiment, folder)
    tried: set[str] = set()
    for experiment, folder in pairs:  # Nothing was refused: only now is anything written.
        if not (folder / "config.json").exists():
            # What can run with one seed can with another, and a model may take minutes to make.
            kind = json.dumps(replace(experiment, seed=0, label=None).to_json())
            write_config(experiment, folder, tried=kind in tried)
            tried.add(kind)
    if not display:
        return run_all(folders, workers=workers, engine=engine, address=address, retries=retries)
    with _SweepDisplay(root, folders) as shown:
        return run_all(
            folders,
            workers=workers,
            engine=engine,
            address=address,
            retries=retries,
            report=shown.report,
        )


def run_folder(root: Path, experiment: Experiment) -> Path:
    """Where a sweep keeps a run."""
    return root / experiment.name.replace("/", "_") / f"seed_{experiment.seed}"


def grid(experiment: Experiment, settings: Sequence[str], seeds: Iterable[int]) -> list[Experiment]:
    """Every combination of `path=value,value` settings and seeds.

    Raises:
        UserError: a setting that does not exist, or a value it cannot have.
    """
    axes = []
    for setting in settings:
        path, separator, values = setting.partition("=")
        if not separator or not values:
            raise UserError(f"--grid needs setting=value,value, got {setting!r}")
        axes.append([(path, value) for value in values.split(",")])
    experiments = []
    for combination in itertools.product(*axes):
        changed, parts = experiment, []
        for path, text in combination:
            changed = _with_setting(changed, path.split("."), text)
            parts.append(f"{path.rpartition('.')[2]}={text}")
        label = " ".join([experiment.name, *parts])
        experiments += [replace(changed, seed=seed, label=label) for seed in seeds]
    return experiments


def comparison(
    slugs: Sequence[str],
    *,
    stage: Stage,
    seeds: Iterable[int],
    hidden: tuple[int, ...] | None = None,
    updates_per_step: float | None = None,
    batch_size: int | None = None,
    evaluation: EvaluationConfig,
    runtime: RuntimeConfig,
    log: LogConfig,
) -> list[Experiment]:
    """Methods on equal footing: same task, steps, networks and update ratio, own learning rates.

    Warm-up is cut to a tenth of the steps where a method's own would eat more of a short run.

    Args:
        stage: the task; its data go to those methods that read any.
        batch_size: of language and diffusion methods; None: each method's own.

    Raises:
        UserError: an unknown method, one named twice, methods that cannot do the same task, or data
            that none of them reads.
    """
    data, steps = stage.data, stage.steps
    if len(set(slugs)) < len(slugs):
        raise UserError(f"a method is named twice: {' '.join(slugs)}")
    kinds = {slug: load_method(slug) for slug in slugs}
    tasks = {(k.world, _read_by(k)) for k in kinds.values()}
    if len(tasks) > 1:
        listed = ", ".join(f"{slug} {_read_by(k)}" for slug, k in kinds.items())
        raise UserError(
            f"these methods learn from different things, so compare them apart: {listed}"
        )
    control = next(iter(tasks))[0] == "control"
    if control and data is not None and all(k.data == "none" for k in kinds.values()):
        raise UserError(f"none of {' '.join(slugs)} learns from logged steps: leave out --data")
    experiments = []
    for slug in slugs:
        kind = kinds[slug]
        config, read = kind.Config(), None if kind.data == "none" and control else data
        changes: dict[str, Any] = {}
        names = {f.name for f in dataclasses.fields(config)}
        if hidden is not None and "hidden" in names:
            changes["hidden"] = hidden
        if updates_per_step is not None and "updates_per_step" in names:
            changes["updates_per_step"] = updates_per_step
        if batch_size is not None and "batch_size" in names:
            changes["batch_size"] = batch_size
        if "warmup_updates" in names:
            changes["warmup_updates"] = min(config.warmup_updates, steps // 10)
        if "warmup" in names:
            changes["warmup"] = min(config.warmup, steps // 10)
        if "buffer_size" in names:
            changes["buffer_size"] = max(config.batch_size, min(config.buffer_size, steps))
        experiments += [
            Experiment(
                method=replace(config, **changes),
                stages=(replace(stage, data=read),),
                seed=seed,
                evaluation=evaluation,
                runtime=runtime,
                log=log,
            )
            for seed in seeds
        ]
    return experiments


def _read_by(kind: Any) -> str:
    """What a method learns from, in words."""
    if kind.world == "language":
        return kind.rows
    if kind.world == "diffusion":
        return "real samples" if kind.loop == "offline" else "samples of its model"
    return "environments"


def _refuse_other_settings(experiment: Experiment, folder: Path) -> None:
    wanted = experiment.resolved().to_json()
    found = read_experiment(folder).to_json()
    if wanted != json.loads(json.dumps(found)) and json.loads(json.dumps(wanted)) != found:
        different = sorted(k for k in wanted if json.dumps(wanted[k]) != json.dumps(found.get(k)))
        raise UserError(
            f"{folder} holds a run with other settings ({', '.join(different)}): choose another "
            "--directory, or give the same options to resume it"
        )


def _with_setting(value: Any, path: list[str], text: str) -> Any:
    """A copy of nested dataclasses with one field set from text."""
    name, *rest = path
    parts = {part for parts in STAGE_PARTS.values() for part in parts} | {"data", "steps"}
    if isinstance(value, Experiment) and name in parts:
        stage = _with_setting(value.stages[-1], path, text)
        return replace(value, stages=(*value.stages[:-1], stage))
    known = [f.name for f in dataclasses.fields(value)]
    if name not in known:
        raise UserError(f"no setting {'.'.join(path)!r}: {nearest(name, known)}")
    if rest:
        return replace(value, **{name: _with_setting(getattr(value, name), rest, text)})
    import tyro

    kind = typing.get_type_hints(type(value))[name]
    arguments = [f"--{name}", *text.split()]
    holder = dataclasses.make_dataclass("Setting", [(name, kind)])
    try:
        parsed = tyro.cli(holder, args=arguments, console_outputs=False)
    except SystemExit:
        raise UserError(f"--grid: {name} cannot be {text!r}") from None
    return replace(value, **{name: getattr(parsed, name)})


class _SweepDisplay:
    """One bar a run on a terminal; a line as each run ends elsewhere."""

    def __init__(self, root: Path, folders: Sequence[Path]):
        self._console = Console(stderr=True)
        self._root, self._ended = root, 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._total = len(folders)
        self._tasks = {
            folder: self._progress.add_task(str(folder.relative_to(root)), total=1.0, state="")
            for folder in folders
        }

    def __enter__(self) -> "_SweepDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def report(self, folder: Path, state: str, share: float) -> None:
        self._progress.update(self._tasks[folder], completed=share, state=state)
        if state in ("finished", "failed"):
            self._ended += 1
            if not self._console.is_terminal:
                name = folder.relative_to(self._root)
                self._console.print(f"{name}: {state} ({self._ended} of {self._total})")
