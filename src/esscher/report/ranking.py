"""Who is ahead, and how sure we are: runs grouped by method and task, scored and ordered.

Methods are compared at one step per task, the largest that every finished run of the task
reached (that every run reached, while none is finished). Runs short of it are shown, not scored.
Runs of different families, or judged by different measures, are never ranked or averaged together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .aggregate import (
    Interval,
    area_under_curve,
    interpolate_curve,
    interquartile_mean,
    probability_of_improvement,
    stratified_bootstrap,
)
from .runs import RunRecord

SEEDS_NEEDED = 3  # with fewer, no order between two methods is claimed
WORLDS = {
    "control": "Controllers",
    "language": "Language models",
    "diffusion": "Diffusion models",
    "sets": "Populations",
    "robots": "Robots that see",
}
UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True, eq=False)
class Entry:
    """One method in a ranking.

    `scores` is (counted runs, tasks). `over_first` is the probability that a run of this method
    beats one of the first method (nan for the first itself), and `separated` says whether the
    order of the two is more than chance: enough seeds, and intervals that do not overlap.
    `curve_mean` is the area under the learning curve over its steps, nan over several tasks.
    """

    method: str
    runs: tuple[RunRecord, ...]
    counted: tuple[RunRecord, ...]
    scores: np.ndarray
    final: Interval[float]
    curve_mean: float
    over_first: Interval[float] = UNDEFINED
    separated: bool = False

    @property
    def num_seeds(self) -> int:
        """Scored runs of the task that has fewest."""
        return int(np.min(np.sum(~np.isnan(self.scores), axis=0))) if self.scores.size else 0

    @property
    def steps_per_second(self) -> float:
        """Median over the runs."""
        return _median([run.steps_per_second for run in self.runs])

    @property
    def seconds(self) -> float:
        """Median wall time of a run, of the counted ones if there are any."""
        return _median([run.seconds for run in self.counted or self.runs])


@dataclass(frozen=True, eq=False)
class Ranking:
    """Methods on one task, best first; or over several tasks, their scores normalised."""

    name: str
    tasks: tuple[str, ...]
    step: int | None
    entries: tuple[Entry, ...]
    measure: str = "return"
    """What the scores are."""

    @property
    def scored(self) -> tuple[Entry, ...]:
        """The entries with at least one scored run."""
        return tuple(entry for entry in self.entries if entry.scores.size)

    @property
    def runs(self) -> list[RunRecord]:
        """Of every method, scored or not."""
        return [run for entry in self.entries for run in entry.runs]


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that can be compared: of one world, judged by one measure."""

    world: str
    measure: str
    runs: tuple[RunRecord, ...]
    rankings: tuple[Ranking, ...]
    """One a task."""
    overall: Ranking | None
    """Over all tasks that every method was scored on, where those are several."""

    @property
    def every(self) -> tuple[Ranking, ...]:
        """The overall ranking, if there is one, and those of the tasks."""
        return (self.overall, *self.rankings) if self.overall else self.rankings

    @property
    def title(self) -> str:
        """Such as "Controllers, by return"."""
        return f"{WORLDS.get(self.world, self.world)}, by {self.measure}"


def rank_groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs sorted into groups that can be compared, and ranked within each, in the order of `WORLDS`.

    A run without any evaluation does not say by what it is judged: it goes with those of its task, if
    these are judged by one measure.
    """
    measured: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        if run.evaluations:
            measured.setdefault((run.world, run.env), set()).add(run.measure)
    members: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        (likely, *others) = measured.get((run.world, run.env), {run.measure})
        measure = run.measure if run.evaluations or len(run.steps) or others else likely
        members.setdefault((run.world, measure), []).append(run)
    order = {world: place for place, world in enumerate(WORLDS)}
    groups = []
    for world, measure in sorted(members, key=lambda kind: (order.get(kind[0], 99), kind)):
        own = members[world, measure]
        rankings, overall = rank_tasks(own, measure)
        groups.append(Group(world, measure, tuple(own), tuple(rankings), overall))
    return groups


def rank_task(runs: Sequence[RunRecord], measure: str | None = None) -> Ranking:
    """Ranks the methods among runs of one task by the interquartile mean of what they reached.

    measure: what that is; by default what the runs say, which must then be the same.
    """
    tasks, measures = {run.env for run in runs}, {measure or run.measure for run in runs}
    if len(measures) > 1:
        raise ValueError(f"runs with different measures cannot be ranked: {sorted(measures)}")
    if len(tasks) != 1:
        raise ValueError(f"rank_task needs runs of one task, got {sorted(tasks)}; use rank_tasks")
    with_curve = [run for run in runs if len(run.steps)]
    finished = [run for run in with_curve if run.finished]
    step = min((run.steps[-1] for run in finished or with_curve), default=float("nan"))
    counted = [run for run in with_curve if run.steps[0] <= step <= run.steps[-1]]
    start = max((run.steps[0] for run in counted), default=float("nan"))
    entries = []
    for method in sorted({run.name for run in runs}):
        own = tuple(sorted((run for run in runs if run.name == method), key=_seed))
        reached = tuple(run for run in own if run in counted)
        scores = np.array([[interpolate_curve(run.steps, run.returns, step)] for run in reached])
        curve_mean = interquartile_mean([_area(run, start, step) for run in reached])
        entries.append(_entry(method, own, reached, scores, curve_mean))
    (task,) = tasks
    (said,) = measures
    last = None if np.isnan(step) else int(step)
    return Ranking(task, (task,), last, _ordered(entries), said)


def rank_tasks(
    runs: Sequence[RunRecord], measure: str | None = None
) -> tuple[list[Ranking], Ranking | None]:
    """One ranking per task, and the one over all tasks that every method was scored on.

    Over tasks, scores are normalised per task: 0 is the worst final return among these runs, 1
    the best. It is None unless two methods or more share two tasks or more.
    """
    rankings = [
        rank_task([run for run in runs if run.env == task], measure)
        for task in sorted({run.env for run in runs})
    ]
    if len({ranking.measure for ranking in rankings}) > 1:
        raise ValueError("tasks judged by different measures cannot be averaged: use rank_groups")
    methods = sorted({run.name for run in runs})
    shared = [ranking for ranking in rankings if len(ranking.scored) == len(methods)]
    if len(shared) < 2 or len(methods) < 2:
        return rankings, None
    entries = []
    for method in methods:
        own = [entry for ranking in shared for entry in ranking.scored if entry.method == method]
        scores = np.full((max(len(entry.scores) for entry in own), len(shared)), np.nan)
        for column, (ranking, entry) in enumerate(zip(shared, own, strict=True)):
            pooled = np.concatenate([other.scores for other in ranking.scored])
            worst, spread = pooled.min(), np.ptp(pooled)
            normal = (entry.scores[:, 0] - worst) / spread if spread else 0.5
            scores[: len(entry.scores), column] = normal
        every = tuple(run for entry in own for run in entry.runs)
        counted = tuple(run for entry in own for run in entry.counted)
        entries.append(_entry(method, every, counted, scores, float("nan")))
    tasks = tuple(ranking.name for ranking in shared)
    said = shared[0].measure
    return rankings, Ranking(f"{len(tasks)} tasks", tasks, None, _ordered(entries), said)


class Improvement(NamedTuple):
    """Chance that a run of `one` scores above a run of `other`."""

    one: Entry
    other: Entry
    chance: Interval[float]


def improvements(ranking: Ranking) -> list[Improvement]:
    """Of every ordered pair of scored methods, in the order of the ranking."""
    return [
        Improvement(one, other, probability_of_improvement(one.scores, other.scores))
        for one in ranking.scored
        for other in ranking.scored
        if one is not other
    ]


def _entry(
    method: str,
    runs: tuple[RunRecord, ...],
    counted: tuple[RunRecord, ...],
    scores: np.ndarray,
    curve_mean: float,
) -> Entry:
    final = stratified_bootstrap(scores) if scores.size else UNDEFINED
    return Entry(method, runs, counted, scores, final, curve_mean)


def _ordered(entries: list[Entry]) -> tuple[Entry, ...]:
    """Best first, the unscored last, each set against the first."""
    entries = sorted(entries, key=lambda entry: (not entry.scores.size, -entry.final.point))
    first = entries[0]
    return (first, *(_against(entry, first) for entry in entries[1:]))


def _against(entry: Entry, first: Entry) -> Entry:
    if not entry.scores.size:
        return entry
    separated = (
        min(entry.num_seeds, first.num_seeds) >= SEEDS_NEEDED and entry.final.high < first.final.low
    )
    over_first = probability_of_improvement(entry.scores, first.scores)
    return replace(entry, over_first=over_first, separated=separated)


def _area(run: RunRecord, start: float, step: float) -> float:
    inside = run.steps[(run.steps > start) & (run.steps < step)]
    grid = np.unique([start, *inside, step])
    return area_under_curve(grid, interpolate_curve(run.steps, run.returns, grid))


def _seed(run: RunRecord) -> tuple[int, str]:
    return run.seed, str(run.folder)


def _median(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else float("nan")
