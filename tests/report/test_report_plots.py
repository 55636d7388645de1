"""Figures: what is drawn, and what inlining does to it."""

import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_runs import write_run

from esscher.report import plots, read_run
from esscher.report.ranking import rank_task


def labels(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_learning_curves_name_every_method_and_draw_the_runs(tmp_path):
    runs = [read_run(write_run(tmp_path / f"a{seed}", "sac", seed=seed)) for seed in range(2)]
    runs += [read_run(write_run(tmp_path / "b", "td3", reached=30_000))]
    styles = plots.method_styles(run.name for run in runs)
    before = dict(matplotlib.rcParams)
    figure = plots.learning_curves([rank_task(runs)], styles)
    assert dict(matplotlib.rcParams) == before, "global settings were changed"
    assert labels(figure) == ["sac", "td3"]
    (axes,) = figure.axes
    thin = [line for line in axes.lines if line.get_linewidth() < 1]
    assert [line.get_linestyle() for line in thin] == ["-", "-", "--"]
    bold = next(line for line in axes.lines if line.get_linewidth() == 2)
    both = np.mean([run.returns for run in runs[:2]], axis=0)
    np.testing.assert_allclose(bold.get_ydata(), both)


def test_diagnostics_average_over_seeds_and_thin_long_records(tmp_path):
    runs = [read_run(write_run(tmp_path / f"a{seed}", seed=seed)) for seed in range(2)]
    figure = plots.diagnostics(runs, plots.method_styles(["sac"]))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["steps_per_second", "critic_loss (log scale)", "alpha", "q_mean", "entropy"]
    alpha = figure.axes[2].lines[0].get_ydata()
    np.testing.assert_allclose(alpha, np.mean([run.metric("alpha")[1] for run in runs], axis=0))
    steps, values = plots._thinned(np.arange(240.0), np.arange(240.0) ** 2)
    np.testing.assert_array_equal(steps, np.arange(0.5, 240, 2))  # bins of two: 0 and 1, ...
    np.testing.assert_array_equal(values, steps**2 + 0.25)


def test_styles_do_not_depend_on_order_and_stay_apart():
    names = [f"method {index}" for index in range(20)]
    styles = plots.method_styles(names)
    assert styles == plots.method_styles(reversed(names))
    assert len(set(styles.values())) == 20


def test_inline_svg_is_self_contained_and_its_ids_are_its_own():
    def figure():
        drawing = Figure()
        with matplotlib.rc_context(plots.DRAWING):
            drawing.add_subplot().plot([0, 1], [0, 1], "o-")
        return drawing

    one = plots.inline_svg(figure(), "one", "A < B", "x & y")
    two = plots.inline_svg(figure(), "two", "A < B", "x & y")
    ids = [re.findall(r'\bid="([^"]*)"', svg) for svg in (one, two)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    used = re.findall(r'(?:href="|url\()#([^")]*)', one)
    assert used and set(used) <= set(ids[0])
    assert "http" not in one and "<style" not in one and plots.INK not in one
    assert "A &lt; B" in one and "x &amp; y" in one and "currentColor" in one
    assert plots.inline_svg(figure(), "one", "A < B", "x & y") == one


def test_what_is_written_in_a_figure_keeps_its_digits():
    figure = Figure()
    with matplotlib.rc_context(plots.DRAWING):
        axes = figure.add_subplot()
        axes.plot([0.0, 0.123456], [0.0, 1.0])
        axes.set_title("0.00051234")
    svg = plots.inline_svg(figure, "one", "x", "y")
    assert ">0.00051234<" in svg
    places = re.findall(r' d="([^"]*)"', svg)
    assert places and not any(re.search(r"\d\.\d{4}", place) for place in places)


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_labels_keep_their_order_and_distance(count):
    levels = np.random.default_rng(count).uniform(0.4, 0.6, count)
    placed = plots._spread(levels, 0.05)
    assert np.array_equal(np.argsort(placed, kind="stable"), np.argsort(levels, kind="stable"))
    assert placed.min() >= -1e-9 and placed.max() <= 1 + 1e-9
    if count > 1:
        assert np.diff(np.sort(placed)).min() >= min(0.05, 1 / (count - 1)) - 1e-9
    assert plots._spread(np.array([0.2, 0.8]), 0.1).tolist() == [0.2, 0.8]


def test_numbers_on_axes():
    shown = [plots.compact(value) for value in (0, 0.02, 999, 1500, 2.5e6, -3e9)]
    assert shown == ["0", "0.02", "999", "1.5k", "2.5M", "\N{MINUS SIGN}3G"]


def test_reward_is_drawn_against_distance_where_runs_say_it(tmp_path):
    from support import smoke, train

    train(smoke("dragon"), tmp_path / "run")
    record = read_run(tmp_path / "run")
    steps, far, reached, judged = record.distances().T
    assert np.isnan(judged).all()
    assert len(far) == 3 and far[0] == 0 and far[-1] > 0
    assert steps.tolist() == list(record.steps) and reached.tolist() == list(record.returns)
    figure = plots.reward_against_distance([record], plots.method_styles([record.name]), "reward")
    assert figure is not None
    (line,) = figure.axes[0].lines[:1]
    assert line.get_xdata().tolist() == far.tolist() and len(figure.axes) == 1


def test_a_judge_is_drawn_beside_the_reward(tmp_path):
    from support import smoke, train

    experiment = smoke("dragon")
    stage = experiment.stages[-1]
    image = replace(stage.image, judge="esscher.image_rewards:nearness")
    train(replace(experiment, stages=(replace(stage, image=image),)), tmp_path / "run")
    record = read_run(tmp_path / "run")
    figure = plots.reward_against_distance([record], plots.method_styles([record.name]), "reward")
    assert figure is not None
    reward, judge = figure.axes
    assert judge.get_title("left") == "by the judge"
    expected = [row["judge_mean"] for row in record.evaluations]
    assert judge.lines[0].get_ydata().tolist() == expected
    assert reward.lines[0].get_ydata().tolist() == list(record.returns) != expected


@pytest.mark.parametrize(("low", "high"), [(0.99999, 1.00001), (-1028.2, -1028.1), (1e6, 1e6 + 40)])
def test_no_two_ticks_have_the_same_label(low, high):
    """Of what hardly changes, too."""
    axes = Figure().add_subplot()
    axes.plot([0, 1], [low, high])
    plots.format_axis(axes.yaxis, 4)
    shown = [axes.yaxis.get_major_formatter()(place, None) for place in axes.get_yticks()]
    assert len(shown) == len(set(shown)) > 2 and max(map(len, shown)) <= 10
