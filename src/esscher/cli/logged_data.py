"""Logged steps and demonstrations: esscher data collect, combine, show."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from esscher.cli.options import INTERRUPTED, counted, leading, parse, positional, terminal
from esscher.errors import UserError, nearest


def handle_data(arguments: list[str]) -> int:
    """Make, mix and look at sets of logged steps: esscher data collect|combine|show."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: esscher data WORD [options]      (esscher data WORD --help tells more)\n")
        for word, function in DATA_WORDS.items():
            print(f"  {word:<8} {(function.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if not arguments:
        raise UserError(f"WORD is missing: esscher data {'|'.join(DATA_WORDS)}")
    word, rest = arguments[0], arguments[1:]
    if word not in DATA_WORDS:
        raise UserError(f"data knows no {word!r}: {nearest(word, DATA_WORDS)}")
    return DATA_WORDS[word](rest)


def _collect_options() -> type:
    from tyro.conf import FlagCreatePairsOff

    @dataclass
    class CollectOptions:
        out: str
        """Name of the Minari set to write, such as hopper/medium-v0; it must not exist yet."""
        policy: Literal["agent", "random", "replay"] = "agent"
        """agent: the run's policy; random: uniform actions; replay: the steps that the run's replay
        holds."""
        episodes: int | None = None
        """Episodes to run, 100 by default; a replay is written whole."""
        step: int | None = None
        """Checkpoint to read, by default the newest; an earlier one is a weaker policy."""
        stochastic: FlagCreatePairsOff[bool] = False
        """Sample the agent's actions, as is done unless --deterministic is given."""
        deterministic: FlagCreatePairsOff[bool] = False
        """Take the mode of the agent's policy instead."""
        seed: int = 1
        """Of the episodes' starts and of all sampling."""
        reference: tuple[float, float] | None = None
        """Returns that count as 0 and as 100 in normalised scores."""
        step_limit: int = 10_000
        """Steps after which an episode is cut in a task that has no limit of its own."""

    return CollectOptions


def _data_collect(arguments: list[str]) -> int:
    """Act with a run's policy, or a task's expert, and write it: esscher data collect RUN|TASK."""
    usage = "esscher data collect RUN --out NAME, or: esscher data collect TASK ... --out FOLDER"
    wants_help = arguments[:1] in (["-h"], ["--help"])  # The options are the same for every run.
    if arguments and ":" in arguments[0] and not Path(arguments[0]).exists():
        return _data_demonstrate(arguments)
    folder = Path("RUN" if wants_help else positional(arguments, usage, "RUN"))
    options = parse(_collect_options(), arguments, "esscher data collect RUN")
    if options.stochastic and options.deterministic:
        raise UserError("--stochastic and --deterministic exclude each other: leave out one")
    from esscher.runtime.collect import collect

    return _announce(
        lambda: collect(
            folder,
            options.out,
            policy=options.policy,
            episodes=options.episodes,
            step=options.step,
            stochastic=not options.deterministic,
            seed=options.seed,
            reference=options.reference,
            step_limit=options.step_limit,
        ),
        options.out,
    )


def _default_out(tasks: Sequence[str], seen: bool) -> str:
    """Where demonstrations go if nobody says so."""
    if not seen or len(tasks) > 1:
        kind = "a new folder" if seen else "the name of a new Minari set, such as reach/expert-v0"
        raise UserError(f"give --out, {kind}")
    return f"data/{tasks[0].rpartition(':')[2]}"


def _demonstration_options() -> type:
    from tyro.conf import FlagCreatePairsOff

    @dataclass
    class DemonstrationOptions:
        out: str = ""
        """With --images a new folder, in the layout of LeRobot, by default data/TASK of one task; else
        the name of a new Minari set, such as reach/expert-v0. The same command goes on where it was
        stopped."""
        episodes: int = 50
        """Of each task."""
        images: tuple[int, ...] = ()
        """Size of the images, or rows and columns; without it only states are collected, and then those
        of the objects and the goal as well."""
        cameras: tuple[str, ...] = ()
        """Which, by default the task's own."""
        noise: float = 0.0
        """Standard deviation of what is added to the expert's actions, in a box of [-1, 1]; the set
        holds the expert's own actions."""
        seed: int = 1
        """Of the episodes' starts and of the noise."""
        keep_failures: FlagCreatePairsOff[bool] = False
        """Keep episodes that did not solve the task as well."""
        kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
        """Passed to the tasks: --kwargs max_steps 150."""

    return DemonstrationOptions


def _data_demonstrate(arguments: list[str]) -> int:
    """Let experts act: esscher data collect metaworld:TASK ... --images 64 --out FOLDER."""
    tasks = leading(arguments)
    options = parse(_demonstration_options(), arguments, "esscher data collect TASK ...")
    if len(options.images) > 2:
        raise UserError(f"--images takes one number or rows and columns, got {options.images}")
    from esscher.runtime.demonstrate import Plan, demonstrate

    size = (options.images[0], options.images[-1]) if options.images else None
    plan = Plan(
        tasks=tuple(tasks),
        episodes=options.episodes,
        images=size,
        cameras=options.cameras,
        noise=options.noise,
        seed=options.seed,
        keep_failures=options.keep_failures,
        kwargs=options.kwargs,
    )
    try:
        written = demonstrate(plan, options.out or _default_out(tasks, bool(size)))
    except KeyboardInterrupt:
        print(
            "esscher: stopped; what was finished is kept, and the same command goes on",
            file=sys.stderr,
        )
        return INTERRUPTED
    episodes = len(written.lengths)
    data = written.path if size else f"minari:{written.name}"
    print(
        f"{written.name}: {counted(episodes, 'episode')}, {written.steps:,} steps, {written.solved} "
        f"solved their task; {counted(written.dropped, 'failed attempt')} dropped\ndata: {data}"
    )
    return 0


@dataclass
class CombineOptions:
    out: str
    """Name of the new Minari set, such as hopper/medium-expert-v0."""
    reference: tuple[float, float] | None = None
    """Returns that count as 0 and as 100 in normalised scores; by default what the sets state."""


def _data_combine(arguments: list[str]) -> int:
    """Several sets of one task as one: esscher data combine NAME NAME ... --out NAME."""
    names = leading(arguments)
    options = parse(CombineOptions, arguments, "esscher data combine NAME NAME ...")
    from esscher.runtime.collect import combine

    return _announce(lambda: combine(names, options.out, reference=options.reference), options.out)


@dataclass
class DataTask:
    id: str | None = None
    """Task that the data must fit; by default they are shown as they are."""
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to the environment."""


@dataclass
class DataShowOptions:
    env: DataTask = field(default_factory=DataTask)


def _data_show(arguments: list[str]) -> int:
    """Size, returns, lengths and ends, checked against a task if given: esscher data show SOURCE."""
    wants_help = arguments[:1] in (["-h"], ["--help"])
    usage = "esscher data show SOURCE [--env.id ID]"
    source = "" if wants_help else positional(arguments, usage, "SOURCE")
    options = parse(DataShowOptions, arguments, "esscher data show SOURCE")
    from rich import box
    from rich.table import Table

    from esscher.adapters.data import describe, load_dataset
    from esscher.adapters.lerobot import describe_scenes, is_lerobot, read_scenes

    if is_lerobot(source):
        scenes = read_scenes(source)
        table = Table(
            title=scenes.name, title_justify="left", box=box.SIMPLE_HEAD, show_header=False
        )
        for label, value in describe_scenes(scenes).items():
            table.add_row(label, value)
        terminal().print(table)
        return 0

    spec = None
    if options.env.id is not None:
        from esscher.adapters.gymnasium import Environments
        from esscher.experiment import EnvConfig

        envs = Environments(EnvConfig(id=options.env.id, kwargs=options.env.kwargs), seed=0)
        spec = envs.spec
        envs.close()
    data = load_dataset(source, spec)
    table = Table(title=data.name, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    for label, value in describe(data).items():
        table.add_row(label, value)
    fits = "not checked (--env.id ID does)" if spec is None else f"fits {options.env.id}"
    table.add_row("task", fits)
    terminal().print(table)
    return 0


DATA_WORDS: dict[str, Callable[[list[str]], int]] = {
    "collect": _data_collect,
    "combine": _data_combine,
    "show": _data_show,
}


def _announce(write: Callable[[], Any], name: str) -> int:
    try:
        written = write()
    except KeyboardInterrupt:
        print(f"esscher: stopped; nothing was written under {name}", file=sys.stderr)
        return INTERRUPTED
    from statistics import fmean, pstdev

    returns = written.returns
    print(
        f"{written.name}: {counted(len(returns), 'episode')}, {written.steps:,} steps, return "
        f"{fmean(returns):,.1f} +- {pstdev(returns):,.1f} ({min(returns):,.1f} to "
        f"{max(returns):,.1f})\nset: {written.path}\ndata: minari:{written.name}"
    )
    return 0
