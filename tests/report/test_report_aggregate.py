"""Statistics against hand-worked numbers, scipy, and the properties an interval must have."""

from importlib import import_module

import numpy as np
import pytest
import scipy.stats

from esscher.report.aggregate import (
    area_under_curve,
    bootstrap_curves,
    common_grid,
    interpolate_curve,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)


def normal_scores(runs: int, tasks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100.0, 10.0, (runs, tasks))


def test_interquartile_mean_by_hand():
    # eight values: two dropped at either end, (3 + 4 + 5 + 6) / 4
    assert interquartile_mean([[1, 2], [3, 4], [5, 6], [7, 800]]) == 4.5
    assert interquartile_mean([1, 2, 6]) == 3.0  # below four values: the plain mean
    assert interquartile_mean([7.0]) == 7.0
    assert np.isnan(interquartile_mean([np.nan]))
    assert interquartile_mean([np.nan, 1, 2, 3, 100]) == 2.5  # nan is no value: four are left


@pytest.mark.parametrize("count", range(1, 14))
def test_interquartile_mean_is_the_trimmed_mean_of_scipy(count):
    values = np.random.default_rng(count).normal(size=(count, 3))
    ours = interquartile_mean(values, axis=0)
    np.testing.assert_allclose(ours, scipy.stats.trim_mean(values, 0.25, axis=0))
    np.testing.assert_allclose(
        interquartile_mean(values), scipy.stats.trim_mean(values, 0.25, axis=None)
    )


def test_equal_seeds_give_equal_intervals_whatever_the_global_generator_does():
    scores = normal_scores(6, 3)
    np.random.seed(1)
    first = stratified_bootstrap(scores, num_resamples=200, seed=5)
    np.random.seed(2)
    assert stratified_bootstrap(scores, num_resamples=200, seed=5) == first
    assert stratified_bootstrap(scores, num_resamples=200, seed=6) != first


@pytest.mark.parametrize("seed", range(10))
def test_interval_contains_its_point_and_shrinks_with_runs_and_confidence(seed):
    few, many = normal_scores(5, 2, seed), normal_scores(50, 2, seed)
    point, low, high = stratified_bootstrap(few, num_resamples=500)
    assert low <= point <= high
    _, low_half, high_half = stratified_bootstrap(few, num_resamples=500, confidence=0.5)
    assert low <= low_half <= high_half <= high
    _, low_many, high_many = stratified_bootstrap(many, num_resamples=500)
    assert high_many - low_many < high - low


def test_interval_of_the_mean_matches_its_standard_error():
    scores = normal_scores(200, 1)
    _, low, high = stratified_bootstrap(scores, np.mean, num_resamples=4000)
    expected = 2 * 1.96 * scores.std() / np.sqrt(200)
    assert high - low == pytest.approx(expected, rel=0.06)


def test_runs_are_redrawn_within_their_task():
    # no spread within a task: however far tasks lie apart, the interval has no width
    scores = np.array([[0.0, 1000.0]] * 5)
    assert stratified_bootstrap(scores, np.mean, num_resamples=50) == (500.0, 500.0, 500.0)


def test_missing_runs_stay_missing_when_redrawn():
    scores = np.array([[1.0, 10.0], [1.0, 10.0], [1.0, np.nan]])
    seen = []
    stratified_bootstrap(scores, lambda drawn: seen.append(drawn) or 0.0, num_resamples=20)
    for drawn in seen:
        assert np.isnan(drawn).sum() == 1
        assert set(drawn[:, 0]) == {1.0}
        assert np.nanmax(drawn[:, 1]) == np.nanmin(drawn[:, 1]) == 10.0


def test_one_run_has_no_interval():
    point, low, high = stratified_bootstrap([[3.0, 5.0]])
    assert point == 4.0 and np.isnan(low) and np.isnan(high)
    point, low, high = stratified_bootstrap([[1.0, 5.0], [2.0, np.nan]])
    assert np.isnan(low) and np.isnan(high)
    point, low, high = bootstrap_curves([[1.0, 2.0]])
    assert point.tolist() == [1.0, 2.0] and np.isnan(low).all() and np.isnan(high).all()


def test_bootstrap_takes_a_statistic_with_several_values():
    thresholds = np.linspace(60, 140, 9)
    band = stratified_bootstrap(
        normal_scores(8, 3), lambda scores: performance_profile(scores, thresholds), 200
    )
    assert band.point.shape == band.low.shape == band.high.shape == (9,)
    assert np.all(band.low <= band.point) and np.all(band.point <= band.high)


def test_bootstrap_of_curves_contains_the_curve_and_redraws_whole_runs():
    curves = normal_scores(6, 20).cumsum(axis=1)
    point, low, high = bootstrap_curves(curves, num_resamples=300, seed=1)
    np.testing.assert_allclose(point, interquartile_mean(curves, axis=0))
    assert np.all(low <= point) and np.all(point <= high)
    again = bootstrap_curves(curves, num_resamples=300, seed=1)
    np.testing.assert_array_equal(low, again.low)
    shifted = bootstrap_curves(curves + 7.0, num_resamples=300, seed=1)
    np.testing.assert_allclose(shifted.low, low + 7.0)


def test_performance_profile_by_hand():
    scores = [[1.0, 2.0], [3.0, np.nan]]
    np.testing.assert_allclose(performance_profile(scores, [0, 1, 2.5, 3]), [1, 2 / 3, 1 / 3, 0])
    profile = performance_profile(normal_scores(10, 4), np.linspace(0, 200, 50))
    assert np.all(np.diff(profile) <= 0) and profile[0] == 1 and profile[-1] == 0


def test_probability_of_improvement_by_hand():
    # pairs: 2>1, 2=2 (half), 4>1, 4>2 -> 3.5 of 4
    assert probability_of_improvement([[2], [4]], [[1], [2]]).point == 0.875
    assert probability_of_improvement([[1], [2]], [[2], [4]]).point == 0.125
    # two tasks are averaged: won outright, and lost outright
    assert probability_of_improvement([[5, 0], [5, 0]], [[1, 9], [1, 9]]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_probability_of_improvement_is_mann_whitney(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 6, (7, 1)), generator.integers(0, 5, (4, 1))
    statistic = scipy.stats.mannwhitneyu(x[:, 0], y[:, 0]).statistic
    point, low, high = probability_of_improvement(x, y, num_resamples=300, seed=seed)
    assert point == pytest.approx(statistic / 28)
    assert 0 <= low <= point <= high <= 1
    assert probability_of_improvement(x, y, num_resamples=300, seed=seed) == (point, low, high)
    back = probability_of_improvement(y, x, num_resamples=300).point
    assert point + back == pytest.approx(1.0)


def test_probability_of_improvement_of_one_run_has_no_interval():
    point, low, high = probability_of_improvement([[2.0]], [[1.0], [3.0]])
    assert point == 0.5 and np.isnan(low) and np.isnan(high)


def test_curves_by_hand():
    assert interpolate_curve([0, 10], [0, 100], [5, 10]).tolist() == [50, 100]
    assert np.isnan(interpolate_curve([5, 10], [0, 1], [4, 11])).all()
    assert area_under_curve([0, 10, 20], [0, 10, 10]) == 7.5  # (50 + 100) / 20
    assert area_under_curve([100, 110, 120], [0, 10, 10]) == 7.5  # normalised by its steps
    assert area_under_curve([3], [8.0]) == 8.0
    assert common_grid([[0, 10], [5, 10]]).tolist() == [0, 5, 10]
    grid = common_grid([np.arange(1000)], limit=11)
    assert len(grid) == 11 and grid[0] == 0 and grid[-1] == 999


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stratified_bootstrap([1.0, 2.0]), r"scores\[:, None\]"),
        (lambda: stratified_bootstrap(np.empty((0, 1))), "non-empty"),
        (lambda: stratified_bootstrap([[np.inf], [1.0]]), "finite"),
        (lambda: stratified_bootstrap([[1.0]], confidence=95), "confidence must be in"),
        (lambda: stratified_bootstrap([[1.0]], num_resamples=0), "num_resamples"),
        (lambda: probability_of_improvement([[1.0]], [[1.0, 2.0]]), "1 tasks and y has 2"),
        (lambda: probability_of_improvement([[np.nan]], [[1.0]]), "no run"),
        (lambda: interpolate_curve([1, 1], [0, 0], [1]), "must increase"),
        (lambda: area_under_curve([], []), "at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- The same as rliable, by which these statistics are known


def rliable():
    """Its modules; it fails to import beside a pandas that is newer than its own dependencies."""
    try:
        return import_module("rliable.metrics"), import_module("rliable.library")
    except Exception as error:
        pytest.skip(f"rliable cannot be imported here: {error}")


def test_estimates_are_those_of_rliable():
    metrics, library = rliable()
    for seed in range(5):
        x, y = normal_scores(6, 3, seed), normal_scores(9, 3, seed + 100) + 2
        assert interquartile_mean(x) == pytest.approx(metrics.aggregate_iqm(x))
        ours = probability_of_improvement(x, y, num_resamples=1).point
        assert ours == pytest.approx(metrics.probability_of_improvement(x, y))
        thresholds = np.linspace(80, 120, 11)
        theirs = [library.run_score_deviation(x, threshold) for threshold in thresholds]
        np.testing.assert_allclose(performance_profile(x, thresholds), theirs)


def test_intervals_are_those_of_rliable():
    """Up to the noise of resampling: both ends within a tenth of the interval's width."""
    metrics, library = rliable()
    x, y = normal_scores(8, 4), normal_scores(8, 4, 1) + 3
    np.random.seed(0)  # rliable draws from the global generator.
    _, theirs = library.get_interval_estimates(
        {"x": x}, lambda scores: np.array([metrics.aggregate_iqm(scores)]), reps=3000
    )
    _, low, high = stratified_bootstrap(x, num_resamples=3000)
    np.testing.assert_allclose([low, high], theirs["x"][:, 0], atol=(high - low) / 10)
    _, theirs = library.get_interval_estimates(
        {"x,y": (x, y)},
        lambda one, other: np.array([metrics.probability_of_improvement(one, other)]),
        reps=2000,
    )
    _, low, high = probability_of_improvement(x, y, num_resamples=2000)
    np.testing.assert_allclose([low, high], theirs["x,y"][:, 0], atol=(high - low) / 10)
