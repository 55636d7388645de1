"""Statistics over seeds and tasks, numpy only.

Scores are arrays of shape (runs, tasks); nan marks a run that a task lacks. Every function that
resamples owns a generator made from its `seed`, so equal arguments give equal intervals.
Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (interquartile mean, stratified bootstrap, profiles, probability of improvement).
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike

Value = TypeVar("Value")  # a number, or an array of them


class Interval(NamedTuple, Generic[Value]):
    """A point estimate with the ends of its confidence interval (nan where undefined)."""

    point: Value
    low: Value
    high: Value


@overload
def interquartile_mean(scores: ArrayLike, axis: None = None) -> float: ...
@overload
def interquartile_mean(scores: ArrayLike, axis: int) -> np.ndarray: ...
def interquartile_mean(scores: ArrayLike, axis: int | None = None) -> float | np.ndarray:
    """Mean of the middle half: floor(n/4) values are dropped at either end, nan ignored.

    Below four values nothing is dropped, so it is the plain mean; of no value it is nan.
    """
    scores = np.asarray(scores, dtype=float)
    if axis is None:
        return float(interquartile_mean(scores.ravel(), axis=0))
    ordered = np.moveaxis(np.sort(scores, axis=axis), axis, -1)  # nan sorts last
    count = np.sum(~np.isnan(ordered), axis=-1, keepdims=True)
    position = np.arange(ordered.shape[-1])
    kept = (position >= count // 4) & (position < count - count // 4)
    with np.errstate(invalid="ignore"):
        return np.where(kept, ordered, 0.0).sum(-1) / kept.sum(-1)


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[np.ndarray], Value] = interquartile_mean,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval[Value]:
    """Percentile interval of `statistic` when the runs of each task are redrawn on their own.

    scores: (runs, tasks). statistic: such an array to a number or an array.
    A task with a single run has no known spread, so the ends are then nan.
    Raises: ValueError on a wrong shape, infinite scores, or arguments out of range.
    """
    scores = _check_scores(scores)
    _check_bootstrap(num_resamples, confidence)
    point = statistic(scores)
    if _fewest_runs(scores) < 2:
        return Interval(point, *_unknown_ends(point))
    drawn = _resamples(scores, num_resamples, np.random.default_rng(seed))
    return _interval(point, np.array([statistic(sample) for sample in drawn]), confidence)


def bootstrap_curves(
    curves: ArrayLike, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Interval[np.ndarray]:
    """Interquartile mean at each point of a curve, whole runs redrawn; curves: (runs, points)."""
    curves = _check_scores(curves)
    _check_bootstrap(num_resamples, confidence)
    point = interquartile_mean(curves, axis=0)
    if len(curves) < 2:
        return Interval(point, *_unknown_ends(point))
    picks = np.random.default_rng(seed).integers(len(curves), size=(num_resamples, len(curves)))
    return _interval(point, interquartile_mean(curves[picks], axis=1), confidence)


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Fraction of all (run, task) scores strictly above each threshold; shape of `thresholds`."""
    scores = _check_scores(scores)
    known = scores[~np.isnan(scores)]
    return np.mean(known > np.asarray(thresholds, dtype=float)[..., None], axis=-1)


def probability_of_improvement(
    x: ArrayLike,
    y: ArrayLike,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval[float]:
    """Chance that a run of `x` scores above a run of `y` on a task drawn at random.

    P = mean over tasks of U / (n m), U the Mann-Whitney count in which a tie is half a win.
    x: (runs, tasks), y: (other runs, same tasks); the ends are nan if a task has a single run.
    Raises: ValueError if the tasks differ or one has no run.
    """
    x, y = _check_scores(x), _check_scores(y)
    _check_bootstrap(num_resamples, confidence)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks and y has {y.shape[1]}; give both the same")
    if not _fewest_runs(x) or not _fewest_runs(y):
        raise ValueError("a task has no run in x or in y; keep only the tasks that both have")
    point = float(_win_fraction(x, y))
    if _fewest_runs(x) < 2 or _fewest_runs(y) < 2:
        return Interval(point, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    drawn_x, drawn_y = (_resamples(scores, num_resamples, generator) for scores in (x, y))
    wins = [_win_fraction(one, other) for one, other in zip(drawn_x, drawn_y, strict=True)]
    return _interval(point, np.array(wins), confidence)


def interpolate_curve(steps: ArrayLike, values: ArrayLike, grid: ArrayLike) -> np.ndarray:
    """The curve at the steps of `grid`, straight between its points, nan outside them.

    Raises: ValueError unless steps and values are of one length and steps increase.
    """
    steps, values = _check_curve(steps, values)
    grid = np.asarray(grid, dtype=float)
    return np.interp(grid, steps, values, left=np.nan, right=np.nan)


def common_grid(curves: Sequence[ArrayLike], limit: int = 200) -> np.ndarray:
    """Every step at which some curve has a point, or `limit` even steps if those are more."""
    steps = np.unique(np.concatenate([np.asarray(curve, dtype=float) for curve in curves]))
    return steps if len(steps) <= limit else np.linspace(steps[0], steps[-1], limit)


def area_under_curve(steps: ArrayLike, values: ArrayLike) -> float:
    """Trapezoid area over the range of steps, in the unit of the values: the mean height.

    A curve of one point has that point's value. Raises: ValueError as `interpolate_curve`.
    """
    steps, values = _check_curve(steps, values)
    if len(steps) == 1:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def _resamples(
    scores: np.ndarray, num_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Bootstrap draws (resamples, runs, tasks): each task redraws as many runs as it has."""
    packed = np.sort(scores, axis=0)  # known scores first, nan last
    count = np.sum(~np.isnan(packed), axis=0)
    picks = (generator.random((num_resamples, *scores.shape)) * count).astype(int)
    drawn = np.take_along_axis(packed[None], picks, axis=1)
    drawn[:, np.isnan(packed)] = np.nan
    return drawn


def _win_fraction(x: np.ndarray, y: np.ndarray) -> float:
    one, other = x[:, None], y[None, :]
    known = ~np.isnan(one) & ~np.isnan(other)
    wins = np.where(known, (one > other) + 0.5 * (one == other), 0.0)
    return np.mean(wins.sum((0, 1)) / known.sum((0, 1)))


def _unknown_ends(point: Value) -> tuple[Value, Value]:
    unknown = point * float("nan")  # pyright: ignore[reportOperatorIssue]
    return unknown, unknown


def _interval(point: Value, replicates: np.ndarray, confidence: float) -> Interval[Value]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(replicates, [tail, 1.0 - tail], axis=0)
    return Interval(point, low if low.ndim else low.item(), high if high.ndim else high.item())


def _fewest_runs(scores: np.ndarray) -> int:
    return int(np.min(np.sum(~np.isnan(scores), axis=0), initial=len(scores)))


def _check_scores(scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(
            f"scores must be a non-empty (runs, tasks) array, got shape {scores.shape}; "
            "for one task use scores[:, None]"
        )
    if np.isinf(scores).any():
        raise ValueError("scores must be finite, got inf; leave the run out or mark it nan")
    return scores


def _check_bootstrap(num_resamples: int, confidence: float) -> None:
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}; 0.95 is usual")


def _check_curve(steps: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if steps.ndim != 1 or steps.shape != values.shape or not len(steps):
        raise ValueError(
            f"a curve needs as many steps as values, at least one: got shapes "
            f"{steps.shape} and {values.shape}"
        )
    if np.any(np.diff(steps) <= 0):
        raise ValueError("the steps of a curve must increase; sort them and drop repeats")
    return steps, values
