"""The figure of a proof record: each claim, what was measured, and which checks it passed."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

GOOD, BAD = "#00795a", "#b4450a"
PANELS = 3  # side by side; more go on a further line
TEXT_COLUMNS = 50  # characters of the text beside the panels
LINE = 0.185  # inches of one line of that text


def write_proof_figure(record: dict[str, Any], out: Path) -> Path:
    """Draws a proof record as a PNG, one row a claim; returns where it is.

    Left: for each figure of merit the value of every seed and arm (small marks) and the mean
    (bar), and the claim's learning curves if it has them. Right: the claim and its checks.
    record: {"slug", "title", "verdict", "claims": [{"name", "statement", "verdict", "checks":
    [{"name", "value", "rule", "passed"}], "arms": {arm: {figure: [value per seed]}}, "curves":
    {arm: {"steps": [...], "returns": [[per seed] ...]}} (optional)}]}.
    Raises: ValueError if the record has no claim.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from . import plots

    claims = record.get("claims") or []
    if not claims:
        raise ValueError(f"the proof record of {record.get('slug')!r} has no claims to draw")
    texts = [_claim_lines(claim) for claim in claims]
    heights = [
        max(2.3 * _panel_lines(claim), LINE * len(lines) + 0.5)
        for claim, lines in zip(claims, texts, strict=True)
    ]
    with matplotlib.rc_context(plots.SMALL):
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
        figure = Figure(figsize=(13.0, sum(heights) + 0.7), layout=layout)
        title = textwrap.shorten(record.get("title") or record["slug"], 100, placeholder=" …")
        colour = _colour(record["verdict"] == "reproduced")
        figure.suptitle(f"{title}: {record['verdict']}", x=0.01, ha="left", size=13,
                        weight="bold", color=colour)  # fmt: skip
        rows = figure.subfigures(len(claims), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, claim, lines in zip(rows, claims, texts, strict=True):
            left, right = row.subfigures(1, 2, width_ratios=[8.6, 4.4])
            _draw_panels(left, claim)
            _write_lines(right, lines)
        return plots.write_png(figure, Path(out), dots_per_inch=110)


def _draw_panels(figure: Any, claim: dict[str, Any]) -> None:
    from . import plots

    arms = claim.get("arms") or {}
    styles = plots.method_styles([*arms, *(claim.get("curves") or {})])
    names = list(dict.fromkeys(name for values in arms.values() for name in values))
    lines = _panel_lines(claim)
    for index, name in enumerate(names):
        axes = figure.add_subplot(lines, PANELS, index + 1)
        measured = {arm: _numbers(values.get(name)) for arm, values in arms.items()}
        measured = {arm: values for arm, values in measured.items() if len(values)}
        for row, (arm, values) in enumerate(measured.items()):
            _draw_arm(axes, row, values, styles[arm])
        axes.set_yticks(range(len(measured)), [plots.short(arm, 18) for arm in measured])
        axes.set_ylim(max(len(measured), 1) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_title(plots.short(name, 32))
        plots.format_axis(axes.xaxis, 4)
    if claim.get("curves"):
        axes = figure.add_subplot(lines, PANELS, len(names) + 1)
        for arm, curve in claim["curves"].items():
            _draw_curve(axes, curve, styles[arm], plots.short(arm, 18))
        axes.set_title("return against steps")
        axes.legend(fontsize=8)
        plots.format_axis(axes.xaxis, 4)
        plots.format_axis(axes.yaxis, 5)


def _draw_arm(axes: Any, row: int, values: np.ndarray, style: Any) -> None:
    places = row + (np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else np.zeros(1))
    axes.plot(values, places, style.marker, color=style.colour, markersize=5, alpha=0.7)
    axes.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=style.colour, linewidth=3)


def _draw_curve(axes: Any, curve: dict[str, Any], style: Any, label: str) -> None:
    steps = np.asarray(curve["steps"], dtype=float)
    seeds = np.array(curve["returns"], dtype=float).reshape(-1, len(steps))
    axes.plot(steps, seeds.T, color=style.colour, linewidth=0.6, alpha=0.5)
    axes.plot(steps, seeds.mean(axis=0), color=style.colour, linestyle=style.dashes,
              linewidth=2, label=label)  # fmt: skip


def _write_lines(figure: Any, lines: list[tuple[str, str | None, str]]) -> None:
    height = figure.bbox.height / figure.get_figure(root=True).dpi
    for index, (text, colour, weight) in enumerate(lines):
        figure.text(0.03, 1.0 - (0.25 + LINE * index) / height, text, va="top", weight=weight,
                    **({"color": colour} if colour else {}))  # fmt: skip


def _claim_lines(claim: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    """The text beside a claim: (line, colour, weight)."""
    verdict = claim.get("verdict", "")
    head = f"{claim['name']}: {verdict}" if verdict else claim["name"]
    checks = claim.get("checks") or []
    colour = _colour(all(check["passed"] for check in checks))
    lines: list[tuple[str, str | None, str]] = []
    lines += [(line, colour, "bold") for line in textwrap.wrap(head, TEXT_COLUMNS - 4)]
    lines += [(line, None, "normal") for line in textwrap.wrap(claim["statement"], TEXT_COLUMNS)]
    for check in checks:
        wrapped = textwrap.wrap(check_line(check), TEXT_COLUMNS, subsequent_indent="      ")
        lines += [(line, _colour(check["passed"]), "normal") for line in wrapped]
    return lines


def check_line(check: dict[str, Any]) -> str:
    """A check of a record in words: what was measured, what was asked for, whether it held."""
    value = "nan" if check.get("value") is None else f"{check['value']:.4g}"
    word = "PASS" if check["passed"] else "FAIL"
    return f"{word}  {check['name']} = {value}  ({check['rule']})"


def _panel_lines(claim: dict[str, Any]) -> int:
    names = {name for values in (claim.get("arms") or {}).values() for name in values}
    return max(-(-(len(names) + bool(claim.get("curves"))) // PANELS), 1)


def _numbers(values: Any) -> np.ndarray:
    """The finite numbers among one value or a list of them; None counts as missing."""
    values = np.atleast_1d(np.array([] if values is None else values, dtype=float))
    return values[np.isfinite(values)]


def _colour(good: bool) -> str:
    return GOOD if good else BAD
