"""Many runs, and what they come to: esscher sweep, compare, report, prove."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esscher.cli.options import (
    FAILED_RUNS,
    NOT_REPRODUCED,
    experiment_options,
    in_full,
    leading,
    parse,
    positional,
    world_of,
)
from esscher.errors import UserError

if TYPE_CHECKING:
    from esscher.experiment import Experiment


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


def sweep_settings(arguments: list[str]) -> int:
    """Many runs of one method, over seeds and settings: esscher sweep SLUG[:RECIPE] --seeds 10."""
    target = positional(arguments, "esscher sweep SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = experiment_options(
        target, arguments, f"esscher sweep {target}", SweepExtras
    )
    from esscher.runtime.sweep import grid, sweep

    experiments = grid(experiment, options.grid, _seeds(options.seeds, experiment.seed))
    root = options.directory or Path("runs") / f"sweep_{target.replace(':', '_')}"
    return _sweep_and_report(experiments, root, options, sweep)


@dataclass(kw_only=True)
class ManyRuns:
    """What all comparisons share."""

    seeds: int = 3
    """Number of seeds, counted from --seed."""
    seed: int = 0
    """First seed."""
    as_published: bool = False
    """Keep each method's own settings where they are made equal otherwise."""
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


def _compare_options() -> type:
    from esscher.experiment import EnvConfig, EvaluationConfig, LogConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        env: EnvConfig = field(default_factory=EnvConfig)
        """The task."""
        data: str | None = None
        """Logged steps for the methods among them that read any."""
        steps: int = 100_000
        """Environment steps of each run; updates, where a method learns from data alone."""
        hidden: tuple[int, ...] = (256, 256)
        """Hidden layers of every network of every method."""
        updates_per_step: float = 1.0
        """Updates per environment step of every off-policy method."""
        evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=LogConfig)

    return CompareOptions


def _compare_writers_options() -> type:
    from esscher.experiment import EvaluationConfig, LogConfig, ModelConfig, TextConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        model: ModelConfig = field(default_factory=ModelConfig)
        """What every method begins with."""
        text: TextConfig = field(default_factory=TextConfig)
        data: str | None = None
        """Rows of text."""
        steps: int = 1_000
        """Updates, or iterations of writing and learning."""
        batch_size: int = 32
        """Rows an update of every method."""
        evaluation: EvaluationConfig = field(
            default_factory=lambda: EvaluationConfig(every=100, episodes=32)
        )
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=lambda: LogConfig(every=10))

    return CompareOptions


def _compare_painters_options() -> type:
    from esscher.experiment import EvaluationConfig, ImageConfig, LogConfig, ModelConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        model: ModelConfig = field(default_factory=ModelConfig)
        """What every method begins with."""
        image: ImageConfig = field(default_factory=ImageConfig)
        data: str | None = None
        """Rows to draw."""
        steps: int = 100
        """Iterations of drawing and learning."""
        batch_size: int = 32
        """Rows an iteration of every method."""
        evaluation: EvaluationConfig = field(
            default_factory=lambda: EvaluationConfig(every=10, episodes=32)
        )
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=lambda: LogConfig(every=1))

    return CompareOptions


def compare_methods(arguments: list[str]) -> int:
    """Which of these works on my problem? esscher compare SLUG SLUG ... [task options] --seeds 5."""
    slugs = leading(arguments)
    kinds = {
        "control": _compare_options,
        "language": _compare_writers_options,
        "diffusion": _compare_painters_options,
    }
    world = world_of(slugs[0]) if slugs else "control"
    if world == "robots":
        raise UserError(
            f"{slugs[0]} is the only method for robots that see: esscher sweep {slugs[0]} --data "
            "FOLDER --grid method.head=masked,autoregressive,diffusion,regression compares its heads"
        )
    if world == "sets":
        raise UserError(
            f"{slugs[0]} is the only method about populations: esscher sweep {slugs[0]} --data FILE "
            "--grid method.encoder=residual,kernel_mean compares its encoders"
        )
    kind = kinds[world]()
    if world != "control":
        arguments = in_full(arguments, {f.name: (f.type,) for f in dataclasses.fields(kind)})
    options = parse(kind, arguments, "esscher compare SLUG SLUG ...")
    if not slugs:
        raise UserError("compare needs methods: esscher compare sac ppo --env.id Pendulum-v1")
    from esscher.experiment import Stage
    from esscher.runtime.sweep import comparison, sweep

    names = ("env", "model", "text", "image", "data", "steps")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    footing = {}
    if not options.as_published:
        names = ("hidden", "updates_per_step", "batch_size")
        footing = {name: getattr(options, name) for name in names if hasattr(options, name)}
    experiments = comparison(
        slugs,
        stage=Stage(**given),
        seeds=_seeds(options.seeds, options.seed),
        **footing,
        evaluation=options.evaluation,
        runtime=options.runtime,
        log=options.log,
    )
    task = experiments[0].subject.replace("/", "_").replace(":", "_")
    root = options.directory or Path("runs") / f"compare_{task}"
    return _sweep_and_report(experiments, root, options, sweep)


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


@dataclass
class ReportOptions:
    out: Path = Path("report.html")
    """The page. Curves and rankings are written beside it as CSV, the curves as PNG too."""
    title: str | None = None
    """Heading of the page."""
    figures: bool = True
    """Write each figure as PNG, with its numbers as CSV, into a folder named after the page
    (report_figures), whose other PNG and CSV files are removed."""


def report_runs(arguments: list[str]) -> int:
    """One page from any runs: curves with intervals, ranking, settings: esscher report RUN ..."""
    runs = [Path(run) for run in leading(arguments)]
    options = parse(ReportOptions, arguments, "esscher report RUN ...")
    if not runs:
        raise UserError("report needs run folders: esscher report runs/Hopper-v5")
    from esscher.report.page import write_report

    try:
        page = write_report(runs, options.out, title=options.title, figures=options.figures)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"report: {page}")
    return 0


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


def prove_claims(arguments: list[str]) -> int:
    """Try a paper's central claim in miniature, with its baselines, over seeds: esscher prove SLUG."""
    slug = positional(arguments, "esscher prove SLUG [options]", "SLUG")
    options = parse(ProveOptions, arguments, "esscher prove SLUG")
    from esscher.report.proof_figure import check_line
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
    for claim in record["claims"]:
        print(f"{claim['name']}: {claim['verdict']}")
        print(*(f"  {check_line(check)}" for check in claim["checks"]), sep="\n")
    where = f"{options.out / slug}.json" if not options.claims else "not written: some claims alone"
    print(f"{slug}: {record['verdict']} ({where})")
    return 0 if record["verdict"] == "reproduced" else NOT_REPRODUCED


def _workers(asked: int, threads: int) -> int:
    from esscher.runtime.device import available_processors

    return asked or max(1, available_processors() // threads)


def _seeds(count: int, first: int) -> range:
    if count < 1:
        raise UserError(f"--seeds must be >= 1, got {count}")
    return range(first, first + count)
