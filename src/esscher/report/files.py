"""Files that are written whole or not at all, and the numbers of a report as CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .ranking import Ranking
from .runs import RunRecord


def write_whole(path: Path, content: str | bytes) -> Path:
    """Writes beside the target first and moves into place, so no reader meets half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def curves_csv(runs: Sequence[RunRecord]) -> str:
    """Every point of every learning curve; `phase` says whether it was evaluated or trained."""
    rows = []
    for run in runs:
        named = [run.env, run.name, run.slug, run.seed, run.returns_from]
        for step, value in zip(run.steps, run.returns, strict=True):
            rows.append([*named, int(step), float(value), run.folder])
    return _csv(["task", "method", "slug", "seed", "phase", "step", "return", "run"], rows)


def ranking_csv(rankings: Sequence[Ranking]) -> str:
    """Every row of every ranking, unrounded; an empty cell is undefined."""
    names = ["task", "step", "rank", "method", "seeds", "iqm", "low", "high", "curve_mean"]
    names += ["steps_per_second", "seconds", "beats_first", "beats_first_low", "beats_first_high"]
    names += ["separated_from_first"]
    rows = []
    for ranking in rankings:
        for rank, entry in enumerate(ranking.entries, 1):
            row = [ranking.name, ranking.step, rank if entry.scores.size else None, entry.method]
            row += [entry.num_seeds, *entry.final, entry.curve_mean, entry.steps_per_second]
            row += [entry.seconds, *entry.over_first]
            rows.append([*row, None if _is_nan(entry.over_first.point) else entry.separated])
    return _csv(names, rows)


def _csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([None if _is_nan(cell) else cell for cell in row])
    return buffer.getvalue()


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and np.isnan(cell)
