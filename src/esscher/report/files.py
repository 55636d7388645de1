"""Files that are written whole or not at all, and the numbers of a report as CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .ranking import Group


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes beside the target first and moves into place, so no reader meets half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def curves_csv(groups: Sequence[Group]) -> str:
    """Every point of every learning curve; `phase` says whether it was evaluated or trained, and
    `measure` what the value is.
    """
    rows = []
    for group in groups:
        for run in group.runs:
            named = [group.world, group.measure, run.env, run.name, run.slug, run.seed]
            for step, value in zip(run.steps, run.returns, strict=True):
                rows.append([*named, run.returns_from, int(step), float(value), run.folder])
    names = ["world", "measure", "task", "method", "slug", "seed", "phase", "step", "value", "run"]
    return csv_text(names, rows)


def ranking_csv(groups: Sequence[Group]) -> str:
    """Every row of every ranking, unrounded; an empty cell is undefined."""
    names = ["world", "measure", "task", "step", "rank", "method", "seeds", "iqm", "low", "high"]
    names += ["curve_mean", "steps_per_second", "seconds", "beats_first", "beats_first_low"]
    names += ["beats_first_high", "separated_from_first"]
    rows = []
    for group in groups:
        for ranking in group.every:
            for rank, entry in enumerate(ranking.entries, 1):
                row = [group.world, group.measure, ranking.name, ranking.step]
                row += [rank if entry.scores.size else None, entry.method, entry.num_seeds]
                row += [*entry.final, entry.curve_mean, entry.steps_per_second, entry.seconds]
                unknown = _is_nan(entry.over_first.point)
                rows.append([*row, *entry.over_first, None if unknown else entry.separated])
    return csv_text(names, rows)


def csv_text(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a head; not a number is an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([None if _is_nan(cell) else cell for cell in row])
    return buffer.getvalue()


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and np.isnan(cell)
