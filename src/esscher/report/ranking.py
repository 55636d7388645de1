"""Who is ahead, and how sure we are: runs grouped by method and task, scored and ordered.

Methods are compared at one step per task, the largest that every finished run of the task
reached (that every run reached, while none is finished). Runs short of it are shown, not scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def rank_task(runs: Sequence[RunRecord], *, alone: bool = True) -> Ranking:
    """Ranks the methods among runs of one task by the interquartile mean of their returns.

    alone: there are no runs of this task that are measured by something else.
    """
    tasks, measures = {run.env for run in runs}, {run.measure for run in runs}
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
    (measure,) = measures
    name = task if measure == "return" or alone else f"{task}, {measure}"
    last = None if np.isnan(step) else int(step)
    return Ranking(name, (task,), last, _ordered(entries), measure)


def rank_tasks(runs: Sequence[RunRecord]) -> tuple[list[Ranking], Ranking | None]:
    """One ranking per task, and the one over all tasks that every method was scored on.

    Over tasks, scores are normalised per task: 0 is the worst final return among these runs, 1
    the best. It is None unless two methods or more share two tasks or more.
    """
    kinds = sorted({(run.env, run.measure) for run in runs})
    tasks = [task for task, _ in kinds]
    rankings = [
        rank_task([r for r in runs if (r.env, r.measure) == kind], alone=tasks.count(kind[0]) == 1)
        for kind in kinds
    ]
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
    return rankings, Ranking(f"{len(tasks)} tasks", tasks, None, _ordered(entries))


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
