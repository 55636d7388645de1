"""Train: esscher run, esscher resume."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esscher.cli.options import INTERRUPTED, counted, experiment_options, parse, positional


@dataclass
class RunExtras:
    directory: Path | None = None
    """Run folder, which must not exist yet; by default a fresh one under runs/."""


def run_method(arguments: list[str]) -> int:
    """Train a method on a task: esscher run SLUG[:RECIPE] [options]."""
    target = positional(arguments, "esscher run SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = experiment_options(
        target, list(arguments), f"esscher run {target}", RunExtras
    )
    from esscher.runtime.launch import launch_of, start
    from esscher.runtime.run import check_unused, run

    launch = launch_of(experiment)
    if launch is not None:  # What can be said before the processes start is said once, here.
        if options.directory is not None:
            check_unused(options.directory)
        experiment.resolved()
        return start(launch, ["run", target, *arguments])
    return _finish_run(lambda: run(experiment, directory=options.directory))


@dataclass
class StepOption:
    step: int | None = None
    """Checkpoint to start from; by default the newest."""


def resume_run(arguments: list[str]) -> int:
    """Continue an interrupted run exactly: esscher resume RUN."""
    folder = Path(positional(arguments, "esscher resume RUN [--step N]", "RUN"))
    options = parse(StepOption, list(arguments), "esscher resume RUN")
    from esscher.runtime.launch import launch_of, start
    from esscher.runtime.run import read_experiment, read_result, resume

    launch = launch_of(read_experiment(folder))
    if launch is not None and (read_result(folder) is None or options.step is not None):
        return start(launch, ["resume", str(folder), *arguments])
    return _finish_run(lambda: resume(folder, step=options.step))


def _finish_run(start: Callable[[], Any]) -> int:
    from esscher.runtime.device import process_rank
    from esscher.runtime.run import Interrupted

    try:
        result = start()
    except Interrupted as stopped:
        if process_rank()[0] == 0:
            print(f"esscher: {stopped}", file=sys.stderr)
        return INTERRUPTED
    from esscher.report.page import write_report

    if process_rank()[0] > 0:
        return 0
    page = write_report([result.directory], result.directory / "report.html")
    evaluation = result.evaluation
    model = result.directory / "model"
    print(
        f"{result.slug}: {evaluation.measure} {evaluation.told_with_spread} after "
        f"{counted(result.steps, 'step')} and {result.seconds:,.0f} s\nrun: {result.directory}"
        + (f"\nmodel: {model}" if model.exists() else "")
        + f"\nreport: {page}"
    )
    return 0
