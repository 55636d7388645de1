"""One self-contained HTML page from run folders, with every figure as PNG and CSV beside it."""

import base64
import html
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .commands import commands
from .files import csv_text, curves_csv, ranking_csv, write_whole
from .ranking import SEEDS_NEEDED, Entry, Group, Ranking, rank_groups
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
    sentence,
)


def write_report(
    paths: Sequence[Path],
    out: Path,
    title: str | None = None,
    notes: str | None = None,
    figures: bool = True,
) -> Path:
    """Writes one HTML page about the runs at or below `paths`; returns where it is.

    The page needs no network and no script. Runs of different families, or judged by different
    measures, stand in sections of their own. Beside `report.html` come `report_curves.csv`,
    `report_ranking.csv` and `report_curves.png`, named after the page, and a folder `report_figures`
    with each figure as PNG and its numbers as CSV; other PNG and CSV files in that folder are removed.
    Equal runs give an equal page.

    Args:
        out: the page, or a folder for a `report.html`.
        notes: plain text put under the answer.
        figures: whether to write that folder.

    Raises:
        ValueError: a path holds no run.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from . import plots

    runs = [read_run(folder) for folder in find_runs(paths)]
    groups = rank_groups(runs)
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
    rankings = [ranking for group in groups for ranking in group.rankings]
    picture = plots.learning_curves(rankings, styles, columns=2)
    beside = {
        "_curves.csv": ("the curves in numbers", curves_csv(groups)),
        "_ranking.csv": ("the rankings in numbers", ranking_csv(groups)),
        "_curves.png": ("the curves as a picture", plots.png_bytes(picture)),
    }
    folder = _FigureFolder(out.with_name(f"{out.stem}_figures") if figures else None)
    page = environment.get_template("template.html").render(
        title=title or default_title(runs),
        notes=[part for part in (notes or "").split("\n\n") if part.strip()],
        cautions=cautions(runs, rankings)
        + [text for group in groups for text in settings_cautions(group.runs)],
        colours={name: style.colour for name, style in styles.items()},
        groups=[
            _section(group, number, _part_name(group, groups), styles, folder)
            for number, group in enumerate(groups)
        ],
        provenance=_provenance(runs),
        commands=commands(runs, groups),
        runs=[_run_row(run) for run in runs],
        beside={out.stem + ending: what for ending, (what, _) in beside.items()},
        folder=folder.path.name if folder.path else None,
        seeds_needed=SEEDS_NEEDED,
        unknown=UNKNOWN,
    )
    folder.write()
    for ending, (_, content) in beside.items():
        write_whole(out.with_name(out.stem + ending), content)
    return write_whole(out, page)


class _FigureFolder:
    """Collects the figures of a page, and writes them when the page is complete."""

    def __init__(self, path: Path | None):
        self.path = path
        self._files: dict[str, str | bytes] = {}

    def add(self, shown: Any, part: str) -> dict[str, str]:
        """Takes in a figure; {"PNG": address, "CSV": address} for links, empty without a folder."""
        if self.path is None:
            return {}
        stem = name = re.sub(r"[^\w.-]+", "_", f"{part} {shown.name}").strip("_")
        count = 1
        while f"{name}.png" in self._files:
            count += 1
            name = f"{stem}_{count}"
        files: dict[str, str | bytes] = {f"{name}.png": shown.png}
        if shown.table is not None:
            files[f"{name}.csv"] = csv_text(*shown.table)
        self._files |= files
        return {file[-3:].upper(): f"{self.path.name}/{file}" for file in files}

    def write(self) -> None:
        if self.path is None:
            return
        self.path.mkdir(exist_ok=True)
        for name, content in self._files.items():
            write_whole(self.path / name, content)
        for old in self.path.iterdir():
            if old.suffix in (".png", ".csv") and old.name not in self._files:
                old.unlink()


def _part_name(group: Group, groups: Sequence[Group]) -> str:
    return f"{group.world} {group.measure}" if len(groups) > 1 else ""


def _section(
    group: Group, number: int, named: str, styles: dict, folder: _FigureFolder
) -> dict[str, Any]:
    """What the page says of runs that can be compared; named: before the names of its files."""
    from . import figures
    from .samples import sample_tables

    rows, left_out = figures.pictures(group)
    drawn = {
        "ranking": figures.ranking_figures(group, styles),
        "curves": figures.curve_figures(group, styles),
        "diagnostics": figures.diagnostic_figures(group, styles),
    }
    return {
        "id": f"part{number}",
        "title": group.title,
        "answers": [answer(ranking) for ranking in group.every],
        "tables": [_table(ranking) for ranking in group.every],
        "figures": {
            kind: [
                _figure(shown, named, f"part{number}-{kind}-{place}", folder)
                for place, shown in enumerate(some)
            ]
            for kind, some in drawn.items()
        },
        "pictures": [
            {
                "title": row.title,
                "wide": row.wide,
                "remark": row.remark,
                "figures": [_figure(shown, named, "", folder) for shown in row.shown],
            }
            for row in rows
        ],
        "left_out": f"{plural(left_out, 'more picture')} of these runs in their own folders, under "
        "samples and figures."
        if left_out
        else "",
        "samples": sample_tables(group),
        "settings": settings_tables(group.runs),
    }


def _figure(shown: Any, part: str, identifier: str, folder: _FigureFolder) -> dict[str, Any]:
    from . import plots

    if shown.picture is None:
        image = plots.inline_svg(shown.drawing, identifier, shown.title, shown.description)
    else:
        data = base64.b64encode(shown.png).decode()
        alt = html.escape(shown.description)
        image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
    return {
        "image": image,
        "title": shown.title,
        "caption": shown.caption,
        "files": folder.add(shown, part),
    }


def _table(ranking: Ranking) -> dict[str, Any]:
    """A ranking as text; a cell is its text, the number it is sorted by, and a remark."""
    single = len(ranking.tasks) == 1
    score = sentence(ranking.measure) if single else f"Normalised {ranking.measure}"
    if ranking.step is not None:
        score += f" after {plural(ranking.step, 'step')}"
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
