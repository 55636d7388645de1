"""Figures of a report: drawn once, shown inline as SVG in any page theme, or saved as PNG.

Everything that is text or axis is drawn in `INK`, which `inline_svg` turns into the page's own
text colour (CSS currentColor). No function here touches pyplot or any global matplotlib state.
"""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .aggregate import (
    Interval,
    bootstrap_curves,
    common_grid,
    interpolate_curve,
    performance_profile,
    stratified_bootstrap,
)
from .files import write_whole
from .ranking import Entry, Improvement, Ranking
from .runs import RunRecord

INK = "#23272e"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
MARKERS = "osD^vPX"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)))
DRAWING: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "esscher",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
SMALL: dict[Any, Any] = {**DRAWING, "axes.titlesize": 10, "font.size": 9}
WIDTH = 6.0  # inches; the page scales it, so that 10 points stay readable on a phone
SHOWN_POINTS = 120  # of one line in the diagnostics
THRESHOLDS = np.linspace(0.0, 1.0, 101)  # of a performance profile


class MethodStyle(NamedTuple):
    """How a method is drawn in every figure and table of a report."""

    colour: str
    marker: str
    dashes: Any


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """Colour-blind safe colours (Okabe-Ito) by name; beyond seven methods the dashes differ."""
    size = len(PALETTE)
    return {
        method: MethodStyle(
            PALETTE[index % size], MARKERS[index % size], DASHES[index // size % len(DASHES)]
        )
        for index, method in enumerate(sorted(set(methods)))
    }


def learning_curves(
    rankings: Sequence[Ranking], styles: dict[str, MethodStyle], columns: int = 1
) -> Figure:
    """Return against steps, one panel per task.

    Bold line: interquartile mean over the scored runs, with its 95% bootstrap band; thin lines:
    single runs, dashed where a run is not scored. Names stand at the ends of the lines.
    """
    with matplotlib.rc_context(DRAWING):
        columns = min(columns, len(rankings))
        rows = -(-len(rankings) // columns)
        height = 3.5
        figure = Figure(figsize=(WIDTH * columns, height * rows), layout="constrained")
        for index, ranking in enumerate(rankings):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_curves(axes, ranking, styles, height - 0.8)
    return figure


def ranking_intervals(ranking: Ranking, styles: dict[str, MethodStyle]) -> Figure:
    """Final score of each method, best on top: interquartile mean, 95% interval, single runs."""
    with matplotlib.rc_context(DRAWING):
        entries = ranking.scored
        figure = Figure(figsize=(WIDTH, 0.75 + 0.42 * len(entries)), layout="constrained")
        axes = figure.add_subplot()
        for row, entry in enumerate(entries):
            style = styles[entry.method]
            runs = entry.scores[~np.isnan(entry.scores)]
            axes.plot(runs, np.full(len(runs), row + 0.22), style.marker, color=style.colour,
                      markersize=4, alpha=0.55, markeredgewidth=0)  # fmt: skip
            axes.plot(entry.final[1:], [row, row], color=style.colour, linewidth=5, alpha=0.55,
                      solid_capstyle="round")  # fmt: skip
            axes.plot(entry.final.point, row, style.marker, color=style.colour, markersize=9)
        axes.set_yticks(range(len(entries)), [short(entry.method) for entry in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelsize=11)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        format_axis(axes.xaxis, 6)
        axes.set_xlabel(_score_name(ranking))
    return figure


def performance_profiles(ranking: Ranking, styles: dict[str, MethodStyle]) -> Figure:
    """Fraction of runs above each normalised score, with 95% bootstrap bands."""
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for entry in ranking.scored:
            style = styles[entry.method]
            profile = profile_of(entry)
            axes.fill_between(THRESHOLDS, profile.low, profile.high, color=style.colour,
                              alpha=0.15, linewidth=0, step="post")  # fmt: skip
            axes.step(THRESHOLDS, profile.point, where="post", color=style.colour,
                      linestyle=style.dashes, linewidth=2)  # fmt: skip
            ends.append((entry.method, 1.0, float(np.mean(profile.point))))
        axes.set(xlabel="normalised score", title="fraction of runs above the score",
                 xlim=(0, 1), ylim=(-0.02, 1.02))  # fmt: skip
        _label_ends(axes, ends, styles, 2.4)
    return figure


def improvement_intervals(pairs: Sequence[Improvement]) -> Figure:
    """Chance that a run of the one method beats one of the other, with its 95% interval, a row a
    pair; where the interval crosses one half the data do not tell.
    """
    with matplotlib.rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.34 * len(pairs)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6)
        for row, pair in enumerate(pairs):
            axes.plot(pair.chance[1:], [row, row], color=PALETTE[0], linewidth=5, alpha=0.55,
                      solid_capstyle="round")  # fmt: skip
            axes.plot(pair.chance.point, row, "o", color=PALETTE[0], markersize=8)
        names = [f"{short(one.method, 18)} > {short(other.method, 18)}" for one, other, _ in pairs]
        axes.set_yticks(range(len(pairs)), names)
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="probability of improvement", xlim=(-0.02, 1.02))
    return figure


def diagnostics(runs: Sequence[RunRecord], styles: dict[str, MethodStyle]) -> Figure | None:
    """Every training metric, one small panel each: mean over seeds, shaded from least to most.

    Long records are averaged into at most 120 bins; None if the runs logged no metric.
    """
    names = metric_names(runs)
    methods = sorted({run.name for run in runs})
    if not names:
        return None
    with matplotlib.rc_context(SMALL):
        rows = -(-len(names) // 2)
        figure = Figure(figsize=(WIDTH, 0.4 + 1.65 * rows), layout="constrained")
        for index, name in enumerate(names):
            axes = figure.add_subplot(rows, 2, index + 1)
            _draw_metric(axes, name, runs, methods, styles)
        handles = [
            Line2D([], [], color=styles[method].colour, linewidth=2,
                                    linestyle=styles[method].dashes, label=short(method))
            for method in methods
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(methods)))
    return figure


def reward_against_distance(
    runs: Sequence[RunRecord], styles: dict[str, MethodStyle], measure: str
) -> Figure | None:
    """What each evaluation reached against its distance from the model of before, a line a run; and
    beside it what a judge says that nothing learns from, where runs have one.

    None if no run was evaluated twice at such a distance.
    """
    found = [(run, run.distances()) for run in runs]
    found = [(run, rows) for run, rows in found if len(rows) > 1]
    if not found:
        return None
    with matplotlib.rc_context(DRAWING):
        judged = [(run, rows) for run, rows in found if not np.isnan(rows[:, 3]).any()]
        panels = [(2, f"{found[0][0].env}: {measure}", found)]
        if judged:  # Half as much room for titles.
            panels = [(2, measure, found), (3, "by the judge", judged)]
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        for place, (column, title, drawn) in enumerate(panels, 1):
            axes = figure.add_subplot(1, len(panels), place)
            ends: dict[str, tuple[str, float, float]] = {}
            for run, rows in drawn:
                far, reached = rows[:, 1], rows[:, column]
                style = styles[run.name]
                axes.plot(far, reached, color=style.colour, linestyle=style.dashes, linewidth=1.2,
                          marker=style.marker, markersize=4, alpha=0.8)  # fmt: skip
                ends.setdefault(run.name, (run.name, float(far[-1]), float(reached[-1])))
            axes.set(xlabel="KL to the model of before, nats", title=title)
            format_axis(axes.xaxis, 6 // len(panels))
            format_axis(axes.yaxis, 5)
            _label_ends(axes, list(ends.values()), styles, 2.7)
    return figure


def inline_svg(figure: Figure, identifier: str, title: str, description: str) -> str:
    """The figure as an `<svg>` for an HTML page.

    It scales to its place, takes the text colour and font of the page, names itself to screen
    readers, and prefixes every id with `identifier` so that figures on one page never collide.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(DRAWING):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # Found once: a PNG of it keeps the places.
    svg = buffer.getvalue()
    view_box = svg.split('viewBox="', 1)[1].split('"', 1)[0]
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    body = body.replace("xlink:href", "href").replace(INK, "currentColor")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", body)
    body = re.sub(r"<[^>]*>", lambda tag: _rounded(tag.group()), body)  # Not what is written.
    body = re.sub(r"\n\s*", "\n", body).strip()
    return (
        f'<svg viewBox="{view_box}" role="img" style="stroke-linejoin:round" '
        f'aria-labelledby="{identifier}-title {identifier}-description">\n'
        f'<title id="{identifier}-title">{escape(title)}</title>\n'
        f'<desc id="{identifier}-description">{escape(description)}</desc>\n{body}\n</svg>'
    )


def _rounded(tag: str) -> str:
    """Coordinates to a thousandth of a point."""
    return re.sub(r"(\d\.\d{3})\d+", r"\1", tag)


def png_bytes(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(DRAWING):
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white",
                       metadata={"Software": None})  # fmt: skip
    return buffer.getvalue()


def write_png(figure: Figure, path: Path, dots_per_inch: int = 160) -> Path:
    """Writes the figure as a PNG on white, whole or not at all."""
    return write_whole(Path(path), png_bytes(figure, dots_per_inch))


def _draw_curves(
    axes: Axes, ranking: Ranking, styles: dict[str, MethodStyle], height: float
) -> None:
    ends = []
    for entry in ranking.entries:
        style = styles[entry.method]
        drawn = [run for run in entry.runs if len(run.steps)]
        for run in drawn:
            counted = run in entry.counted
            grid = common_grid([run.steps])
            axes.plot(grid, interpolate_curve(run.steps, run.returns, grid), color=style.colour,
                      linewidth=0.7, alpha=0.45 if counted else 0.8,
                      linestyle="-" if counted else "--",
                      marker="." if len(grid) == 1 else None)  # fmt: skip
        if entry.counted:
            ends.append((entry.method, *_draw_band(axes, entry, style)))
        elif drawn:
            longest = max(drawn, key=lambda run: run.steps[-1])
            ends.append((entry.method, longest.steps[-1], longest.returns[-1]))
    returns_from = {run.returns_from for entry in ranking.entries for run in entry.runs}
    phase = "training" if returns_from <= {"train", "none"} else "evaluation"
    kind = f"{phase} return" if ranking.measure == "return" else ranking.measure
    axes.set_title(f"{ranking.name}: {kind}")
    axes.set_xlabel("steps")
    format_axis(axes.xaxis, 6)
    format_axis(axes.yaxis, 6)
    axes.margins(x=0.01)
    _label_ends(axes, ends, styles, height)


def _draw_band(axes: Axes, entry: Entry, style: MethodStyle) -> tuple[float, float]:
    """Draws a method's line and band where all its scored runs have a curve; returns its end."""
    grid, (middle, low, high) = band_of(entry)
    axes.fill_between(grid, low, high, color=style.colour, alpha=0.18, linewidth=0)
    axes.plot(grid, middle, color=style.colour, linestyle=style.dashes, linewidth=2)
    axes.plot(grid[-1], middle[-1], style.marker, color=style.colour, markersize=6, clip_on=False)
    return grid[-1], middle[-1]


def band_of(entry: Entry) -> tuple[np.ndarray, Interval[np.ndarray]]:
    """Steps and interquartile mean with its 95% band, where all scored runs have a curve."""
    start = max(run.steps[0] for run in entry.counted)
    stop = min(run.steps[-1] for run in entry.counted)
    grid = common_grid([run.steps for run in entry.counted])
    grid = np.unique([start, *grid[(grid > start) & (grid < stop)], stop])
    curves = [interpolate_curve(run.steps, run.returns, grid) for run in entry.counted]
    return grid, bootstrap_curves(np.array(curves))


def profile_of(entry: Entry) -> Interval[np.ndarray]:
    """Fraction of the runs above each of `THRESHOLDS`, with its 95% band."""
    return stratified_bootstrap(
        entry.scores, lambda scores: performance_profile(scores, THRESHOLDS), 500
    )


def spread_of(
    name: str, runs: Sequence[RunRecord]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """A training metric of one method's runs: steps, mean over seeds, lowest and highest seed; None
    if none of them logged it.
    """
    series = [_thinned(*curve) for curve in (run.metric(name) for run in runs) if len(curve[0])]
    if not series:
        return None
    grid = common_grid([steps for steps, _ in series], SHOWN_POINTS)
    values = np.array([interpolate_curve(*curve, grid) for curve in series])
    known = ~np.isnan(values).all(axis=0)
    grid, values = grid[known], values[:, known]
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return grid, np.nanmean(values, axis=0), low, high


def metric_names(runs: Sequence[RunRecord]) -> list[str]:
    """Of all training metrics that some of these runs logged; lengths only where they say something:
    what is drawn or written at once has length 1.
    """
    names = dict.fromkeys(name for run in runs for name in run.metric_names())
    if all(np.all(run.metric("length")[1] == 1) for run in runs):
        names.pop("length", None)
    return list(names)


def _draw_metric(
    axes: Axes,
    name: str,
    runs: Sequence[RunRecord],
    methods: Sequence[str],
    styles: dict[str, MethodStyle],
) -> None:
    everything = []
    for method in methods:
        found = spread_of(name, [run for run in runs if run.name == method])
        if found is None:
            continue
        grid, mean, low, high = found
        style = styles[method]
        axes.fill_between(grid, low, high, color=style.colour, alpha=0.18, linewidth=0)
        axes.plot(grid, mean, color=style.colour, linewidth=1.3,
                  linestyle=style.dashes, marker="." if len(grid) == 1 else None)  # fmt: skip
        everything += [low, high]
    pooled = np.concatenate(everything)
    logarithmic = pooled.min() > 0 and pooled.max() > 1000 * pooled.min()
    axes.set_title(short(name, 34) + (" (log scale)" if logarithmic else ""))
    format_axis(axes.xaxis, 4)
    if logarithmic:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    else:
        format_axis(axes.yaxis, 4)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The series averaged into at most `SHOWN_POINTS` bins of equal count."""
    if len(steps) <= SHOWN_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), SHOWN_POINTS)
    means = [(steps[part].mean(), values[part].mean()) for part in parts]
    mean_steps, mean_values = np.array(means).T
    return mean_steps, mean_values


def _label_ends(
    axes: Axes,
    ends: Sequence[tuple[str, float, float]],
    styles: dict[str, MethodStyle],
    height: float,
) -> None:
    """Writes each name right of the panel, level with the end of its line where there is room.

    ends: (name, x, y) in data units; height: of the panel, in inches.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    wanted = np.array([(y - low) / (high - low) for _, _, y in ends])
    place = axes.transAxes
    for (name, _, _), level in zip(ends, _spread(wanted, 0.21 / height), strict=True):
        style = styles[name]
        axes.plot([1.02, 1.06], [level, level], transform=place, color=style.colour,
                  linewidth=2, linestyle=style.dashes, clip_on=False)  # fmt: skip
        axes.plot(1.04, level, style.marker, transform=place, color=style.colour, markersize=5,
                  clip_on=False)  # fmt: skip
        axes.text(1.08, level, short(name, 18), transform=place, va="center")


def _spread(levels: np.ndarray, gap: float) -> np.ndarray:
    """Levels in [0, 1] moved as little as needed for neighbours to be `gap` apart."""
    order = np.argsort(levels, kind="stable")
    placed = np.clip(levels[order], 0.0, 1.0)
    gap = min(gap, 1.0 / max(len(placed) - 1, 1))
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    placed -= max(placed[-1] - 1.0, 0.0)
    for index in range(len(placed) - 2, -1, -1):
        placed[index] = min(placed[index], placed[index + 1] - gap)
    spread = np.empty_like(placed)
    spread[order] = placed
    return spread


def format_axis(axis: Axis, ticks: int) -> None:
    """At most about so many ticks, labelled as `compact` does, with more digits where that would label
    two of them alike.
    """

    def label(value: float, _: int | None = None) -> str:
        places = axis.get_majorticklocs()
        found = (n for n in range(4, 16) if len({compact(p, n) for p in places}) == len(places))
        return compact(value, next(found, 16))

    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(label))


def _score_name(ranking: Ranking) -> str:
    if ranking.step is None:
        return f"normalised final {ranking.measure} (0 worst run, 1 best run of each task)"
    return f"{ranking.name}: {ranking.measure} after {ranking.step:,} steps"


def compact(value: float, digits: int = 4) -> str:
    """Tick labels: 250k, 1.5M, 0.02, with a true minus sign."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def short(name: str, length: int = 24) -> str:
    """The name, cut to `length` characters with an ellipsis if it is longer."""
    return name if len(name) <= length else name[: length - 1] + "…"
