"""The command: a thin table of verbs. Nothing heavy is imported before the verb needs it.

Exit status: 0 done; 1 a defect (with its traceback); 2 bad input (one sentence); 3 a proof that was
not reproduced; 4 a sweep or comparison with failed runs; 130 interrupted, and saved.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from esscher import __version__
from esscher.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from esscher.experiment import Experiment

NOT_REPRODUCED, FAILED_RUNS, INTERRUPTED = 3, 4, 130


def main() -> None:
    """Entry point of `esscher`."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status."""
    try:
        status = _dispatch(list(arguments))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"esscher: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if arguments[0] == "--version":
        print(f"esscher {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown command {verb!r}: {nearest(verb, VERBS)}")
    return VERBS[verb](rest) or 0


def _print_usage() -> None:
    print("usage: esscher COMMAND [options]      (esscher COMMAND --help tells more)\n")
    for verb, function in VERBS.items():
        print(f"  {verb:<8} {(function.__doc__ or '').strip().splitlines()[0]}")
    print(
        "\nStart with: esscher list, or: "
        "esscher run sac --env.id Pendulum-v1 --steps 5000 --method.warmup 500"
    )


def _list(arguments: list[str]) -> int:
    """The catalogue, searched by words if given: esscher list [WORD ...] [--family F]."""
    words = []
    while arguments and not arguments[0].startswith("-"):
        words.append(arguments.pop(0))
    options = _parse(ListOptions, arguments, "esscher list [WORD ...]")
    from rich import box
    from rich.table import Table

    from esscher.registry import catalogue

    entries = list(catalogue().values())
    if options.family:
        families = {entry.family for entry in entries}
        if options.family not in families:
            hint = nearest(options.family, sorted(families))
            raise UserError(f"unknown family {options.family!r}: {hint}")
        entries = [entry for entry in entries if entry.family == options.family]
    if words:
        scores = {entry.slug: _relevance(entry, words) for entry in entries}
        entries = sorted((e for e in entries if scores[e.slug] > 0), key=lambda e: -scores[e.slug])
        if not entries:
            raise UserError(f"no method matches {' '.join(words)!r}: esscher list shows all")
    for title, baseline in (("Methods", False), ("Baselines", True)):
        chosen = [entry for entry in entries if entry.baseline is baseline]
        if not chosen:
            continue
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("name", "family", "what it is for", "paper", "claim"):
            table.add_column(column, no_wrap=column in ("name", "family", "claim"))
        for entry in chosen:
            paper = f"{entry.paper['title']} ({entry.paper['year']})"
            status = "baseline" if baseline else _proof_status(entry.slug)
            table.add_row(entry.slug, entry.family, entry.paper["purpose"], paper, status)
        _console().print(table)
    return 0


def _show(arguments: list[str]) -> int:
    """The card of one method: claim, settings with their sources, recipes, measured proof."""
    slug = _positional(arguments, "esscher show SLUG", "SLUG")
    _parse(NoOptions, arguments, "esscher show SLUG")
    from rich.markdown import Markdown

    from esscher.report.card import method_card

    _console().print(Markdown(method_card(slug, proofs_folder())))
    return 0


def _run(arguments: list[str]) -> int:
    """Train a method on a task: esscher run SLUG[:RECIPE] [options]."""
    target = _positional(arguments, "esscher run SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = _experiment_options(target, arguments, f"esscher run {target}", RunExtras)
    from esscher.runtime.run import run

    return _finish_run(lambda: run(experiment, directory=options.directory))


def _resume(arguments: list[str]) -> int:
    """Continue an interrupted run exactly: esscher resume RUN."""
    folder = Path(_positional(arguments, "esscher resume RUN [--step N]", "RUN"))
    options = _parse(StepOption, arguments, "esscher resume RUN")
    from esscher.runtime.run import resume

    return _finish_run(lambda: resume(folder, step=options.step))


def _eval(arguments: list[str]) -> int:
    """Evaluate the policy of a run: esscher eval RUN."""
    folder = Path(_positional(arguments, "esscher eval RUN [options]", "RUN"))
    options = _parse(EvalOptions, arguments, "esscher eval RUN")
    from esscher.experiment import EvaluationConfig
    from esscher.runtime.evaluate import Evaluator
    from esscher.runtime.load import load

    loaded = load(folder, step=options.step)
    stage = loaded.experiment.stages[-1]
    env = stage.env if options.env is None else replace(stage.env, id=options.env)
    config = EvaluationConfig(episodes=options.episodes, deterministic=not options.stochastic)
    evaluator, wanted = Evaluator(env, config, options.seed), loaded.policy.spec
    for name in ("obs_shape", "action_shape", "num_actions"):
        here, there = getattr(wanted, name), getattr(evaluator.spec, name)
        if here != there:
            raise UserError(f"{folder} cannot act in {env.id}: {name} is {there}, needs {here}")
    evaluation = evaluator(loaded.policy.policy)
    if options.json:
        print(json.dumps(evaluation.to_json()))
    else:
        low, high = min(evaluation.returns), max(evaluation.returns)
        print(
            f"{loaded.experiment.name} on {env.id}, checkpoint of step {loaded.step:,}: return "
            f"{evaluation.mean:,.1f} +- {evaluation.std:,.1f} over "
            f"{_count(options.episodes, 'episode')} "
            f"({low:,.1f} to {high:,.1f})"
        )
    return 0


def _prove(arguments: list[str]) -> int:
    """Try a paper's central claim in miniature, with its baselines, over seeds: esscher prove SLUG."""
    slug = _positional(arguments, "esscher prove SLUG [options]", "SLUG")
    options = _parse(ProveOptions, arguments, "esscher prove SLUG")
    from esscher.runtime.prove import prove

    record = prove(
        slug,
        out=options.out,
        work=options.work,
        seeds=options.seeds,
        first_seed=options.first_seed,
        workers=_workers(options.workers, 1),
        claims=options.claims,
    )
    print(f"{slug}: {record['verdict']} ({options.out / slug}.json)")
    return 0 if record["verdict"] == "reproduced" else NOT_REPRODUCED


def _sweep(arguments: list[str]) -> int:
    """Many runs of one method, over seeds and settings: esscher sweep SLUG[:RECIPE] --seeds 10."""
    target = _positional(arguments, "esscher sweep SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = _experiment_options(
        target, arguments, f"esscher sweep {target}", SweepExtras
    )
    from esscher.runtime.sweep import grid, sweep

    experiments = grid(experiment, options.grid, _seeds(options.seeds, experiment.seed))
    root = options.directory or Path("runs") / f"sweep_{target.replace(':', '_')}"
    return _sweep_and_report(experiments, root, options, sweep)


def _compare(arguments: list[str]) -> int:
    """Which of these works on my problem? esscher compare SLUG SLUG ... [task options] --seeds 5."""
    slugs = []
    while arguments and not arguments[0].startswith("-"):
        slugs.append(arguments.pop(0))
    options = _parse(_compare_options(), arguments, "esscher compare SLUG SLUG ...")
    if not slugs:
        raise UserError("compare needs methods: esscher compare sac ppo --env.id Pendulum-v1")
    from esscher.runtime.sweep import comparison, sweep

    experiments = comparison(
        slugs,
        env=options.env,
        steps=options.steps,
        seeds=_seeds(options.seeds, options.seed),
        hidden=None if options.as_published else options.hidden,
        updates_per_step=None if options.as_published else options.updates_per_step,
        evaluation=options.evaluation,
        runtime=options.runtime,
        log=options.log,
    )
    task = options.env.id.replace("/", "_").replace(":", "_")
    root = options.directory or Path("runs") / f"compare_{task}"
    return _sweep_and_report(experiments, root, options, sweep)


def _report(arguments: list[str]) -> int:
    """One page from any runs: curves with intervals, ranking, settings: esscher report RUN ..."""
    runs = []
    while arguments and not arguments[0].startswith("-"):
        runs.append(Path(arguments.pop(0)))
    options = _parse(ReportOptions, arguments, "esscher report RUN ...")
    if not runs:
        raise UserError("report needs run folders: esscher report runs/Hopper-v5")
    from esscher.report.page import write_report

    try:
        page = write_report(runs, options.out, title=options.title)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"report: {page}")
    return 0


def _export(arguments: list[str]) -> int:
    """Hand a trained policy to another tool: esscher export RUN --to onnx."""
    folder = Path(_positional(arguments, "esscher export RUN --to onnx", "RUN"))
    options = _parse(ExportOptions, arguments, "esscher export RUN")
    from esscher.runtime.load import load

    out = options.out or folder / "policy.onnx"
    try:
        load(folder, step=options.step).policy.to_onnx(out)
    except ImportError:
        raise UserError('export to onnx needs: pip install "esscher[export]"') from None
    print(f"exported: {out} (obs float32 [batch, features] -> action)")
    return 0


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "list": _list,
    "show": _show,
    "run": _run,
    "resume": _resume,
    "eval": _eval,
    "prove": _prove,
    "sweep": _sweep,
    "compare": _compare,
    "report": _report,
    "export": _export,
}


# Options of the verbs. Plain dataclasses: tyro makes the flags and the help from them.


@dataclass
class NoOptions:
    pass


@dataclass
class ListOptions:
    family: str | None = None
    """Only this family."""


@dataclass
class StepOption:
    step: int | None = None
    """Checkpoint to start from; by default the newest."""


@dataclass
class RunExtras:
    directory: Path | None = None
    """Run folder, which must not exist yet; by default a fresh one under runs/."""


@dataclass
class EvalOptions:
    episodes: int = 10
    """Episodes to run."""
    seed: int = 1
    """Of the episodes' starts."""
    step: int | None = None
    """Checkpoint to judge; by default the newest."""
    env: str | None = None
    """Another environment of the same spaces."""
    stochastic: bool = False
    """Sample actions instead of taking the mode."""
    json: bool = False
    """Print one JSON object, for scripts."""


@dataclass
class ExportOptions:
    to: Literal["onnx"] = "onnx"
    """Format."""
    out: Path | None = None
    """File; by default policy.onnx in the run folder."""
    step: int | None = None
    """Checkpoint; by default the newest."""


@dataclass
class ReportOptions:
    out: Path = Path("report.html")
    """The page; CSV files and a PNG are written beside it."""
    title: str | None = None
    """Heading of the page."""


@dataclass
class ProveOptions:
    out: Path = Path("proofs")
    """Where the record and the figure go."""
    work: Path | None = None
    """Keep the runs here (and resume them); by default they go to a temporary folder."""
    seeds: int | None = None
    """Seeds of each arm; by default what the proof asks for."""
    first_seed: int = 0
    """Where the seeds start: take another one to check a record with fresh seeds."""
    workers: int = 0
    """Runs at a time; 0: one a processor."""
    claims: tuple[str, ...] = ()
    """Only the claims with these names (nothing is then written to --out)."""


@dataclass
class SweepExtras:
    seeds: int = 5
    """Number of seeds, counted from --seed."""
    grid: tuple[str, ...] = ()
    """Settings to combine: --grid method.tau=0.005,0.01 method.discount=0.98,0.99."""
    directory: Path | None = None
    """Folder of the runs; the same command again resumes what is unfinished."""
    engine: Literal["ray", "processes"] = "ray"
    """Ray (this machine or a cluster), or plain processes of this machine."""
    address: str | None = None
    """Of a Ray cluster; by default one is started on this machine."""
    workers: int = 0
    """Runs at a time; 0: processors divided by threads a run."""
    retries: int = 1
    """How often a failed run is resumed."""


def _compare_options() -> type:
    from esscher.experiment import EnvConfig, EvaluationConfig, LogConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass
    class CompareOptions:
        env: EnvConfig = field(default_factory=EnvConfig)
        """The task."""
        steps: int = 100_000
        """Environment steps of each run."""
        seeds: int = 3
        """Number of seeds, counted from --seed."""
        seed: int = 0
        """First seed."""
        hidden: tuple[int, ...] = (256, 256)
        """Hidden layers of every network of every method."""
        updates_per_step: float = 1.0
        """Updates per environment step of every off-policy method."""
        as_published: bool = False
        """Keep each method's own network and update ratio instead of the two above."""
        evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=LogConfig)
        directory: Path | None = None
        """Folder of the runs; the same command again resumes what is unfinished."""
        engine: Literal["processes", "ray"] = "processes"
        """Plain processes of this machine, or Ray."""
        address: str | None = None
        """Of a Ray cluster."""
        workers: int = 0
        """Runs at a time; 0: processors divided by threads a run."""
        retries: int = 1
        """How often a failed run is resumed."""

    return CompareOptions


def _experiment_options(
    target: str, arguments: list[str], program: str, extras: type
) -> tuple["Experiment", Any]:
    """Flags for every field of an experiment, with the recipe's values as defaults."""
    from esscher.experiment import Experiment, Stage
    from esscher.registry import load_module, recipes

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
    values = {
        "env": (type(stage.env), stage.env),
        "steps": (int, stage.steps),
        "seed": (int, default.seed),
        "method": (module.Config, default.method),
        **{
            name: (type(getattr(default, name)), getattr(default, name))
            for name in ("evaluation", "checkpoint", "runtime", "log")
        },
        "label": (str | None, default.label),
    }
    helps = {
        "steps": "Environment steps, counted over all parallel copies.",
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
    options = _parse(options_type, arguments, program)
    experiment = Experiment(
        method=options.method,
        stages=(*default.stages[:-1], Stage(env=options.env, steps=options.steps)),
        seed=options.seed,
        evaluation=options.evaluation,
        checkpoint=options.checkpoint,
        runtime=options.runtime,
        log=options.log,
        label=options.label,
    )
    return experiment, options


def _parse(options: Any, arguments: list[str], program: str) -> Any:
    import tyro

    return tyro.cli(options, args=arguments, prog=program)


def _positional(arguments: list[str], usage: str, name: str) -> str:
    if arguments and not arguments[0].startswith("-"):
        return arguments.pop(0)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n(options depend on {name}: give it before --help)")
        sys.exit(0)
    raise UserError(f"{name} is missing: {usage}")


def _finish_run(start: Callable[[], Any]) -> int:
    from esscher.runtime.run import Interrupted

    try:
        result = start()
    except Interrupted as stopped:
        print(f"esscher: {stopped}", file=sys.stderr)
        return INTERRUPTED
    from esscher.report.page import write_report

    page = write_report([result.directory], result.directory / "report.html")
    evaluation = result.evaluation
    print(
        f"{result.slug}: return {evaluation.mean:,.1f} +- {evaluation.std:,.1f} after "
        f"{result.steps:,} steps and {result.seconds:,.0f} s\nrun: {result.directory}\nreport: {page}"
    )
    return 0


def _sweep_and_report(
    experiments: list["Experiment"], root: Path, options: Any, start: Callable[..., Any]
) -> int:
    from esscher.report.page import write_report

    threads = experiments[0].runtime.threads or 1
    outcomes = start(
        experiments,
        root,
        workers=_workers(options.workers, threads),
        engine=options.engine,
        address=options.address,
        retries=options.retries,
    )
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.folder}: {outcome.error}", file=sys.stderr)
    if len(failed) < len(outcomes):
        page = write_report([root], root / "report.html")
        print(f"report: {page}")
    return FAILED_RUNS if failed else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _workers(asked: int, threads: int) -> int:
    from esscher.runtime.device import available_processors

    return asked or max(1, available_processors() // threads)


def _seeds(count: int, first: int) -> range:
    if count < 1:
        raise UserError(f"--seeds must be >= 1, got {count}")
    return range(first, first + count)


def proofs_folder() -> Path:
    """Where proof records are looked for: here, or in the checkout that this package lies in."""
    here, checkout = Path("proofs"), Path(__file__).parents[2] / "proofs"
    return here if here.is_dir() else checkout


def _proof_status(slug: str) -> str:
    path = proofs_folder() / f"{slug}.json"
    if not path.exists():
        return "not tried"
    return str(json.loads(path.read_text(encoding="utf-8"))["verdict"])


def _relevance(entry: Any, words: Sequence[str]) -> int:
    """Words found in the name count most, then purpose, title and claim."""
    weights = {"purpose": 3, "title": 2, "claim": 1}
    score = 0
    for word in (word.lower() for word in words):
        found = 5 * (word in entry.slug) + 3 * (word in entry.family)
        found += sum(w for name, w in weights.items() if word in str(entry.paper[name]).lower())
        if not found:
            return 0
        score += found
    return score


def _console() -> "Console":
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Its own way ends the process with status 1.

    return Plain()


if __name__ == "__main__":
    main()
