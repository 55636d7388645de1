"""The figures of a report: what each shows, in words for every reader and in numbers for a table."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from . import plots
from .ranking import Group, Ranking, improvements
from .runs import RunRecord
from .words import moment, sentence, spoken

PICTURES_SHOWN = 12
PAIRS_SHOWN = 21
"""Of methods in one figure; where there are more, only those with the first."""

FILM = "robots"
"""The world whose pictures are strips of film, too wide to stand beside each other."""

Styles = dict[str, plots.MethodStyle]


class Table(NamedTuple):
    """The numbers of a figure."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True, eq=False)
class Shown:
    """One figure of the page and of its folder: drawn from numbers, or a picture that a run left."""

    name: str
    """Of its files."""
    title: str
    description: str
    """Its content, for those who cannot see it."""
    caption: str
    drawing: Figure | None = None
    table: Table | None = None
    picture: Path | None = None

    @property
    def png(self) -> bytes:
        if self.picture is not None:
            return self.picture.read_bytes()
        assert self.drawing is not None
        return plots.png_bytes(self.drawing)


@dataclass(frozen=True, eq=False)
class Row:
    """Pictures that belong together, under one heading."""

    title: str
    shown: list[Shown]
    wide: bool = False
    """Each as wide as the page."""
    remark: str = ""
    """What holds for all of them."""


def ranking_figures(group: Group, styles: Styles) -> list[Shown]:
    """Final scores; over several tasks also profiles; of three methods or more, every pair."""
    found = [
        Shown(
            name=f"final {ranking.name}",
            title=f"Final {ranking.measure} of each method on {ranking.name}",
            description=spoken(ranking),
            caption=f"{ranking.name}: interquartile mean, 95% interval and single runs (small marks).",
            drawing=plots.ranking_intervals(ranking, styles),
            table=_final_table(ranking),
        )
        for ranking in group.every
        if len(ranking.scored) > 1
    ]
    if group.overall is not None:
        found.append(_profiles(group.overall, styles))
    told = [group.overall] if group.overall is not None else group.rankings
    return found + [_improvement(ranking) for ranking in told if len(ranking.scored) > 2]


def curve_figures(group: Group, styles: Styles) -> list[Shown]:
    """Learning curves of every task, and what was reached against the distance from the start."""
    found = [
        Shown(
            name=f"curves {ranking.name}",
            title=f"Learning curves on {ranking.name}",
            description=spoken(ranking),
            caption=f"{ranking.name}: bold, the interquartile mean with its 95% bootstrap band; "
            "thin, single runs; thin and dashed, runs that are not scored.",
            drawing=plots.learning_curves([ranking], styles),
            table=_curve_table(ranking),
        )
        for ranking in group.rankings
    ]
    for ranking in group.rankings:
        drawing = plots.reward_against_distance(ranking.runs, styles, ranking.measure)
        if drawing is not None:
            found.append(_distance(ranking, drawing))
    return found


def diagnostic_figures(group: Group, styles: Styles) -> list[Shown]:
    """The training metrics of every task."""
    return [
        Shown(
            name=f"diagnostics {ranking.name}",
            title=f"Training metrics on {ranking.name}",
            description="Each logged training metric against steps, one panel each.",
            caption=f"{ranking.name}: mean over seeds, shaded from the lowest to the highest seed.",
            drawing=drawing,
            table=_diagnostic_table(ranking.runs),
        )
        for ranking in group.rankings
        if (drawing := plots.diagnostics(ranking.runs, styles)) is not None
    ]


def pictures(group: Group) -> tuple[list[Row], int]:
    """What the first seed of each method drew, before beside after, and of itself; and how many
    pictures of other runs are left out.
    """
    found: list[Row] = []
    room = PICTURES_SHOWN
    for row in (row for ranking in group.rankings for row in _rows_of(ranking)):
        if room < min(2, len(row.shown)):  # Nothing is shown as it began alone.
            break
        found.append(replace(row, shown=row.shown[:room]))
        room -= len(found[-1].shown)
    every = sum(len(run.drawn()) + len(run.figures()) for run in group.runs)
    return found, every - (PICTURES_SHOWN - room)


def first_seeds(ranking: Ranking) -> list[RunRecord]:
    """One run of each method, best first: that of its lowest seed."""
    return [entry.runs[0] for entry in ranking.entries]


def _profiles(ranking: Ranking, styles: Styles) -> Shown:
    rows = []
    for entry in ranking.scored:
        columns = (plots.THRESHOLDS, *plots.profile_of(entry))
        rows += [[entry.method, *map(float, row)] for row in zip(*columns, strict=True)]
    return Shown(
        name="performance profile",
        title="Performance profiles",
        description=f"Fraction of the runs of each method above each normalised score. "
        f"{spoken(ranking)}",
        caption="Performance profile: at each score, the method with the higher line has more runs "
        "above it; bands are 95% intervals.",
        drawing=plots.performance_profiles(ranking, styles),
        table=Table(["method", "score", "fraction_above", "low", "high"], rows),
    )


def _improvement(ranking: Ranking) -> Shown:
    order = [entry.method for entry in ranking.scored]
    pairs = improvements(ranking)
    better = [
        pair for pair in pairs if order.index(pair.one.method) < order.index(pair.other.method)
    ]
    if len(better) > PAIRS_SHOWN:
        better = [pair for pair in better if pair.one.method == order[0]]
    said = "; ".join(f"{p.one.method} over {p.other.method} {p.chance.point:.2f}" for p in better)
    return Shown(
        name=f"improvement {ranking.name}",
        title=f"Probability of improvement on {ranking.name}",
        description=f"{said}.",
        caption=f"{ranking.name}: probability that a run of the first method scores above one of the "
        "second, ties counting half, with its 95% interval. At one half (dashed) neither is better.",
        drawing=plots.improvement_intervals(better),
        table=Table(
            ["method", "over", "probability", "low", "high"],
            [[pair.one.method, pair.other.method, *pair.chance] for pair in pairs],
        ),
    )


def _distance(ranking: Ranking, drawing: Figure) -> Shown:
    rows = [
        [run.name, run.seed, int(step), distance, value, None if math.isnan(judged) else judged]
        for run in ranking.runs
        for step, distance, value, judged in run.distances().tolist()
    ]
    has_judge = any(row[-1] is not None for row in rows)
    last = {(row[0], row[1]): row for row in rows}
    said = "; ".join(
        f"{method}, seed {seed}: {value:.3g} at {distance:.3g} nats"
        for method, seed, _, distance, value, _ in last.values()
    )
    return Shown(
        name=f"distance {ranking.name}",
        title=f"{sentence(ranking.measure)} on {ranking.name}, against the distance from the model "
        "of before",
        description=f"Where each run ended: {said}.",
        caption=f"{ranking.name}: each evaluation, a line a run; further up is better, further right "
        "is further from the model that training began with."
        + (" Where the judge does not follow, the reward has been fooled." if has_judge else ""),
        drawing=drawing,
        table=Table(["method", "seed", "step", "kl_to_reference", "value", "judge"], rows),
    )


def _final_table(ranking: Ranking) -> Table:
    """A row an estimate and a row a run."""
    rows: list[list[Any]] = []
    for entry in ranking.scored:
        named = dict(zip(("iqm", "low", "high"), entry.final, strict=True))
        rows += [[entry.method, what, value] for what, value in named.items()]
        known = entry.scores[~np.isnan(entry.scores)].tolist()
        rows += [[entry.method, "run", value] for value in known]
    return Table(["method", "what", "value"], rows)


def _curve_table(ranking: Ranking) -> Table:
    rows = []
    for entry in ranking.entries:
        if entry.counted:
            grid, (middle, low, high) = plots.band_of(entry)
            numbers = zip(grid, middle, low, high, strict=True)
            rows += [[entry.method, *map(float, row)] for row in numbers]
    return Table(["method", "step", "iqm", "low", "high"], rows)


def _diagnostic_table(runs: Sequence[RunRecord]) -> Table:
    rows = []
    for metric in plots.metric_names(runs):
        for method in sorted({run.name for run in runs}):
            found = plots.spread_of(metric, [run for run in runs if run.name == method])
            if found is not None:
                numbers = zip(*found, strict=True)
                rows += [[metric, method, *map(float, row)] for row in numbers]
    return Table(["metric", "method", "step", "mean", "lowest", "highest"], rows)


def _rows_of(ranking: Ranking) -> Iterator[Row]:
    """A row a method; where all methods began alike (same model, same noise) one for all of them, which
    shows the start once.
    """
    runs = first_seeds(ranking)
    drew = [run for run in runs if run.drawn()]
    starts = {run.drawn()[0][1].read_bytes() for run in drew}
    together = len(drew) > 1 and len(starts) == 1
    for some in [drew] if together else [[run] for run in drew]:
        yield _before_and_after(some, ranking)
    for run in runs:
        if run.figures():
            where = f"{run.name} on {run.env}, seed {run.seed}"
            yield Row(
                title=f"What {run.name} drew of itself on {run.env}, seed {run.seed}",
                shown=[
                    _picture(
                        f"{path.stem} {run.name} {run.env}",
                        f"{path.stem} of {where}",
                        path.stem,
                        path,
                    )
                    for path in run.figures()
                ],
            )


def _before_and_after(runs: Sequence[RunRecord], ranking: Ranking) -> Row:
    """Of runs that began alike, or of one."""
    first, several = runs[0], len(runs) > 1
    film = first.world == FILM
    everyone = "every method" if several else first.name
    shown: list[Shown] = []
    for run in runs:
        for number, (step, path) in enumerate(run.drawn()):
            common = several and number == 0
            if common and shown:
                continue
            who = everyone if common else run.name
            where = f"on {run.env}, seed {run.seed}, {moment(step)}"
            when = f"before: step {step:,}" if step == 0 else f"after: step {step:,}"
            shown.append(
                _picture(
                    f"samples {'start' if common else run.name} {step} {ranking.name}",
                    f"Episodes of {who} {where}" if film else f"What {who} drew {where}",
                    f"{when}, {who}" if several else when,
                    path,
                )
            )
    seed = f"on {first.env}, seed {first.seed}"
    return Row(
        title=f"Episodes of {everyone} {seed}" if film else f"What {everyone} drew {seed}",
        shown=shown,
        wide=film,
        remark="" if film or len(shown) < 2 else "Each was drawn from the same noise.",
    )


def _picture(name: str, what: str, caption: str, path: Path) -> Shown:
    return Shown(name=name, title=what, description=what, caption=caption, picture=path)
