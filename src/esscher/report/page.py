"""One self-contained HTML page from run folders, with its numbers as CSV and its curves as PNG."""

import base64
import html
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .files import curves_csv, ranking_csv, write_whole
from .ranking import SEEDS_NEEDED, Entry, Ranking, rank_tasks
from .runs import RunRecord, find_runs, read_run
from .settings import settings_cautions, settings_tables
from .words import (
    UNKNOWN,
    answer,
    cautions,
    default_title,
    duration,
    interval,
    listed,
    number,
    plural,
    spoken,
)


def write_report(
    paths: Sequence[Path], out: Path, title: str | None = None, notes: str | None = None
) -> Path:
    """Writes one HTML page about the runs at or below `paths`; returns where it is.

    The page needs no network and no script. Beside `report.html` come `report_curves.csv`,
    `report_ranking.csv` and `report_curves.png`, named after the page. Equal runs give an equal
    page. out: the page, or a folder for a `report.html`. notes: plain text put under the answer.
    Raises: ValueError if a path holds no run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from . import plots

    runs = [read_run(folder) for folder in find_runs(paths)]
    rankings, overall = rank_tasks(runs)
    every = [overall, *rankings] if overall else rankings
    styles = plots.method_styles(run.name for run in runs)
    out = Path(out)
    out = out if out.suffix and not out.is_dir() else out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    picture = plots.learning_curves(rankings, styles, columns=2)
    beside = {
        "_curves.csv": ("the curves in numbers", curves_csv(runs)),
        "_ranking.csv": ("the rankings in numbers", ranking_csv(every)),
        "_curves.png": ("the curves as a picture", plots.png_bytes(picture)),
    }
    page = environment.get_template("template.html").render(
        title=title or default_title(runs),
        answers=[answer(ranking) for ranking in every],
        notes=[part for part in (notes or "").split("\n\n") if part.strip()],
        cautions=cautions(runs, rankings) + settings_cautions(runs),
        tables=[_table(ranking) for ranking in every],
        colours={name: style.colour for name, style in styles.items()},
        figures={
            "ranking": _ranking_figures(every, styles),
            "curves": _curve_figures(rankings, styles) + _distance_figures(rankings, styles),
            "pictures": _pictures(runs),
            "diagnostics": _diagnostic_figures(rankings, styles),
        },
        samples=_samples(runs),
        settings=settings_tables(runs),
        provenance=_provenance(runs),
        commands=_commands(runs, every),
        runs=[_run_row(run) for run in runs],
        beside={out.stem + ending: what for ending, (what, _) in beside.items()},
        seeds_needed=SEEDS_NEEDED,
        unknown=UNKNOWN,
    )
    for ending, (_, content) in beside.items():
        write_whole(out.with_name(out.stem + ending), content)
    return write_whole(out, page)


def _table(ranking: Ranking) -> dict[str, Any]:
    """A ranking as text; a cell is its text, the number it is sorted by, and a remark."""
    single = len(ranking.tasks) == 1
    score = "Normalised return" if not single else "Return"
    if ranking.step is not None:
        score = f"{ranking.measure.capitalize()} after {ranking.step:,} steps"
    columns = ["Rank", "Method", "Seeds", score, *(["Curve mean"] if single else [])]
    columns += ["Steps/s", "Time a run", "P(beats first)"]
    rows = []
    for rank, entry in enumerate(ranking.entries, 1):
        scored = bool(entry.scores.size)
        beats, chance, remark = _against_first(entry)
        cells = [
            (str(rank) if scored else UNKNOWN, rank, ""),
            (str(entry.num_seeds), entry.num_seeds, ""),
            (interval(entry.final), entry.final.point, ""),
            *([(number(entry.curve_mean), entry.curve_mean, "")] if single else []),
            (number(entry.steps_per_second), entry.steps_per_second, ""),
            (duration(entry.seconds), entry.seconds, ""),
            (beats, chance, remark),
        ]
        cells = [(text, float(key) if np.isfinite(key) else "", mark) for text, key, mark in cells]
        rows.append({"method": entry.method, "mark": _unfinished(entry), "cells": cells})
    name = ranking.name if single else f"all of {listed(ranking.tasks)}"
    return {"name": name, "columns": columns, "rows": rows}


def _against_first(entry: Entry) -> tuple[str, float, str]:
    point, low, high = entry.over_first
    if np.isnan(point):
        return ("first", 0.5, "") if entry.scores.size else (UNKNOWN, point, "")
    ends = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
    return f"{point:.2f}{ends}", point, "" if entry.separated else "not separated"


def _unfinished(entry: Entry) -> str:
    """Such as "2 runs unfinished at step 40,000 and 60,000", or nothing."""
    steps = [run.last_step for run in entry.runs if not run.finished]
    if not steps:
        return ""
    places = listed([f"{step:,}" for step in sorted(set(steps))])
    return f"{plural(len(steps), 'run')} unfinished at step {places}"


def _ranking_figures(every: Sequence[Ranking], styles: dict) -> list[dict[str, str]]:
    from . import plots

    figures = [
        _figure(
            f"ranking-{index}",
            plots.ranking_intervals(ranking, styles),
            f"Final return of each method on {ranking.name}",
            spoken(ranking),
            f"{ranking.name}: interquartile mean, 95% interval and single runs (small marks).",
        )
        for index, ranking in enumerate(every)
        if len(ranking.scored) > 1
    ]
    several = [ranking for ranking in every if len(ranking.tasks) > 1]
    return figures + [
        _figure(
            "profile",
            plots.performance_profiles(ranking, styles),
            "Performance profiles",
            f"Fraction of the runs of each method above each normalised score. {spoken(ranking)}",
            "Performance profile: at each score, the method with the higher line has more runs "
            "above it; bands are 95% intervals.",
        )
        for ranking in several
    ]


def _curve_figures(rankings: Sequence[Ranking], styles: dict) -> list[dict[str, str]]:
    from . import plots

    return [
        _figure(
            f"curves-{index}",
            plots.learning_curves([ranking], styles),
            f"Learning curves on {ranking.name}",
            spoken(ranking),
            f"{ranking.name}: bold, the interquartile mean with its 95% bootstrap band; thin, "
            "single runs; thin and dashed, runs that are not scored.",
        )
        for index, ranking in enumerate(rankings)
    ]


def _distance_figures(rankings: Sequence[Ranking], styles: dict) -> list[dict[str, str]]:
    from . import plots

    drawings = [
        plots.reward_against_distance(
            [run for entry in ranking.entries for run in entry.runs], styles
        )
        for ranking in rankings
    ]
    return [
        _figure(
            f"distance-{index}",
            drawing,
            f"What was reached on {ranking.name}, against the distance from the model of before",
            "Each evaluation of each run: its mean against its KL to the model of before.",
            f"{ranking.name}: each evaluation, a line a run; further up is better, further right is "
            "further from the model that training began with.",
        )
        for index, (ranking, drawing) in enumerate(zip(rankings, drawings, strict=True))
        if drawing is not None
    ]


def _diagnostic_figures(rankings: Sequence[Ranking], styles: dict) -> list[dict[str, str]]:
    from . import plots

    drawings = [
        plots.diagnostics([run for entry in ranking.entries for run in entry.runs], styles)
        for ranking in rankings
    ]
    return [
        _figure(
            f"diagnostics-{index}",
            drawing,
            f"Training metrics on {ranking.name}",
            "Each logged training metric against steps, one panel each.",
            f"{ranking.name}: mean over seeds, shaded from the lowest to the highest seed.",
        )
        for index, (ranking, drawing) in enumerate(zip(rankings, drawings, strict=True))
        if drawing is not None
    ]


PICTURES_SHOWN = 12


def _pictures(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """What runs drew, first and last, and of themselves; the first so many, others are only files."""
    found = [(run, path) for run in runs for path in run.pictures()]
    shown = []
    for run, path in found[:PICTURES_SHOWN]:
        name = path.stem
        if path.parent.name == "samples":
            name = f"samples after {int(path.stem[5:]):,} steps"
        what = html.escape(f"{name} of {run.name} on {run.env}, seed {run.seed}")
        data = base64.b64encode(path.read_bytes()).decode()
        shown.append(
            {"svg": f'<img src="data:image/png;base64,{data}" alt="{what}">', "caption": what}
        )
    if shown and len(found) > len(shown):
        shown[-1]["caption"] += (
            f" ({len(found) - len(shown)} more lie in the runs' figures folders)"
        )
    return shown


SAMPLES_SHOWN = 8
RUNS_WITH_SAMPLES = 6


def _samples(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """What language models wrote first and last, of each method's first seed."""
    firsts: dict[tuple[str, str], RunRecord] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        firsts.setdefault((run.env, run.name), run)
    tables = []
    for run in firsts.values():
        written = run.samples()
        if not written or len(tables) == RUNS_WITH_SAMPLES:
            continue
        columns = ["Prompt", *[f"After {step:,} steps" for step, _ in written]]
        rows = [
            [(same[0]["prompt"], ""), *[(s["completion"], _sample_mark(s)) for s in same]]
            for same in zip(*[samples for _, samples in written], strict=False)
        ]
        name = f"{run.name} on {run.env}, seed {run.seed}"
        tables.append({"name": name, "columns": columns, "rows": rows[:SAMPLES_SHOWN]})
    return tables


def _sample_mark(sample: dict[str, Any]) -> str:
    marks = [f"reward {number(sample['reward'])}"] if "reward" in sample else []
    return ", ".join(marks if sample.get("finished", True) else [*marks, "cut at the length limit"])


def _figure(
    identifier: str, drawing: Any, title: str, description: str, caption: str
) -> dict[str, str]:
    from . import plots

    return {"svg": plots.inline_svg(drawing, identifier, title, description), "caption": caption}


def _provenance(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Where the runs and the page come from."""
    packages = [f"{name} {_version(name)}" for name in ("esscher", "numpy", "matplotlib")]
    rows = {
        "Runs": f"{sum(run.finished for run in runs)} of {len(runs)} finished",
        "Trained with": _distinct(
            [f"esscher {run.config.get('esscher_version', 'unknown')}" for run in runs]
        ),
        "Runtime": _distinct([_described(run.config.get("runtime")) for run in runs]),
        "Machine": _distinct([_described(run.config.get("machine")) for run in runs]),
        "Total time": duration(sum(run.seconds for run in runs if np.isfinite(run.seconds))),
        "Page written with": f"{', '.join(packages)}, Python {platform.python_version()}",
    }
    return {name: text for name, text in rows.items() if text}


def _described(part: Any) -> str:
    if isinstance(part, dict):
        return ", ".join(f"{name} {value}" for name, value in part.items() if value is not None)
    return str(part or "")


def _distinct(texts: Sequence[str]) -> str:
    return "; ".join(sorted(set(texts) - {""}))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed, source tree)"


def _commands(runs: Sequence[RunRecord], every: Sequence[Ranking]) -> list[tuple[str, str]]:
    """What to type next, each with its purpose."""
    scored = [ranking.scored[0] for ranking in every if ranking.scored]
    best = max(scored[0].counted, key=lambda run: run.returns[-1]) if scored else runs[0]
    commands = [
        (f"Go on with {run.name}, seed {run.seed}, on {run.env}", f"esscher resume {_path(run)}")
        for run in runs
        if not run.finished
    ]
    commands = commands or [("Go on with a run that was interrupted", "esscher resume RUN")]
    slugs = " ".join(shlex.quote(slug) for slug in sorted({run.slug for run in runs}))
    if best.embeds:
        return [
            *commands,
            (f"Judge {best.name}, seed {best.seed}, again", f"esscher eval {_path(best)}"),
            ("Draw its populations again", f"esscher sample {_path(best)}"),
            ("Read the vectors of its populations", f"head {_path(best)}/embeddings.csv"),
        ]
    language = best.model is not None
    also = [("Let it write", f"esscher sample {_path(best)} --prompt TEXT")] if language else []
    form = "transformers" if language else "onnx"
    return [
        *commands,
        (f"Evaluate {best.name}, seed {best.seed}, again", f"esscher eval {_path(best)}"),
        *also,
        ("Take its policy to another tool", f"esscher export {_path(best)} --to {form}"),
        ("Learn more with more seeds", f"esscher compare {slugs} {_task(best)} --seeds 10"),
    ]


def _task(run: RunRecord) -> str:
    stage = run.config["stages"][-1]
    if run.model is None:
        return f"--env.id {shlex.quote(run.env)} --steps {stage['steps']}"
    text = stage.get("text") or {}
    given = {"model": run.model, "data": stage.get("data"), "steps": stage["steps"]}
    given |= {name: text.get(name) for name in ("task", "reward")}
    return " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in given.items() if v is not None)


def _path(run: RunRecord) -> str:
    return shlex.quote(str(run.folder))


def _run_row(run: RunRecord) -> dict[str, str]:
    return {
        "method": run.name,
        "task": run.env,
        "seed": str(run.seed),
        "status": run.status,
        "last": number(run.returns[-1]) if len(run.returns) else UNKNOWN,
        "time": duration(run.seconds),
        "folder": str(run.folder),
    }
