"""What was drawn, as figures: images side by side, points in a plane, populations beside their own
reconstructions, episodes as strips of film.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

MOST = 64
"""Samples in one figure of images."""

GAP = 0.8
"""Grey level between images, which are often white or black at their edges."""


def samples_figure(samples: Tensor, title: str | None = None) -> Figure:
    """Images "b c h w" in [0, 1] as a grid; anything else by its first two components.

    Args:
        samples: decoded, on the CPU.
    """
    shown = samples.detach().numpy()
    if shown.ndim == 4 and shown.shape[1] in (1, 3):
        return _grid(shown[:MOST], title)
    flat = shown.reshape(len(shown), -1)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot()
    second = flat[:, 1] if flat.shape[1] > 1 else np.zeros(len(flat))
    axes.plot(flat[:, 0], second, ".", markersize=4, alpha=0.6)
    axes.set_xlabel("first component")
    axes.set_ylabel("second component")
    across, upwards = _square_around(np.stack([flat[:, 0], second], axis=1))
    axes.set(xlim=across, ylim=upwards)
    axes.locator_params(nbins=5)
    # Not "datalim", which moves the limits, and so the room for ticks, after the layout is made.
    axes.set_aspect("equal", adjustable="box")
    if title:
        axes.set_title(title)
    return figure


def _square_around(points: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of both axes, of one length. They lie evenly around zero and end at 1, 2 or 5 times a
    power of ten, so that the pictures of two steps mostly have the same; a cloud that is small for its
    distance from zero has close ones instead.

    Args:
        points: "n 2"; those that are not finite do not count.
    """
    points = points[np.isfinite(points).all(axis=1)].astype(float)
    reach = np.abs(points).max(initial=0.0)
    if reach == 0:
        return (-1, 1), (-1, 1)
    low, high = points.min(axis=0), points.max(axis=0)
    span = (high - low).max()
    if span >= reach / 10:
        power = 10.0 ** math.floor(math.log10(reach))
        end = next((n * power for n in (1, 2, 5) if reach <= n * power), 10 * power)
        return (-end, end), (-end, end)
    half = 0.55 * span or reach / 10
    (left, right), (bottom, top) = ((m - half, m + half) for m in (low + high) / 2)
    return (left, right), (bottom, top)


def _grid(images: np.ndarray, title: str | None) -> Figure:
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    height, width = images.shape[2:]
    shape = (lines * (height + 1) - 1, columns * (width + 1) - 1, images.shape[1])
    sheet = np.full(shape, GAP)
    for number, image in enumerate(images):
        line, column = divmod(number, columns)
        top, left = line * (height + 1), column * (width + 1)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    figure = Figure(figsize=(4, 4 * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    axes = figure.add_subplot()
    sheet = sheet.clip(0, 1)
    axes.imshow(sheet[..., 0] if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    if title:
        axes.set_title(title)
    return figure


def write_samples(samples: Tensor, folder: Path) -> None:
    """A PNG file an image; anything that is no image together as samples.npy.

    Args:
        samples: decoded, on the CPU.
        folder: made; must not exist.
    """
    from PIL import Image

    folder.mkdir(parents=True)
    shown = samples.detach().numpy()
    if not (shown.ndim == 4 and shown.shape[1] in (1, 3)):
        np.save(folder / "samples.npy", shown)
        return
    for number, image in enumerate((shown.clip(0, 1) * 255).round().astype(np.uint8)):
        picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(picture).save(folder / f"{number:05d}.png")


SETS_SHOWN = 6
"""Sets beside their reconstructions in one figure."""


def populations_figure(
    vectors: Tensor, names: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]], spec: Any
) -> Figure:
    """A map of populations by the first two principal components of their vectors, and some of the
    sets, each with what was drawn from its vector.

    Args:
        vectors: "s l", on the CPU.
        names: of the populations.
        pairs: real and drawn samples "m d", in the data's units.
        spec: their SetSpec. Images are shown as such, real above drawn; anything else by its first two
            components, one component as a histogram.
    """
    shown = pairs[:SETS_SHOWN]
    figure = Figure(figsize=(4 + 2.2 * ((len(shown) + 1) // 2), 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 2 + (len(shown) + 1) // 2)
    axes = figure.add_subplot(grid[:, :2])
    centred = (vectors - vectors.mean(0)).double().numpy()
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    place = centred @ directions[:2].T
    second = place[:, 1] if place.shape[1] > 1 else np.zeros(len(place))
    axes.plot(place[:, 0], second, ".", color="#4c566a")
    for number, name in enumerate(names[: len(shown)]):
        axes.annotate(shortened(name), (place[number, 0], second[number]), fontsize=7)
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second principal component")
    axes.set_title("vectors of populations held out", fontsize=9)
    for number, (real, drawn) in enumerate(shown):
        below = figure.add_subplot(grid[number % 2, 2 + number // 2])
        below.set_title(shortened(names[number]), fontsize=8)
        below.tick_params(labelsize=6)
        _real_and_drawn(below, real.numpy(), drawn.numpy(), spec)
    return figure


def shortened(name: str, most: int = 24) -> str:
    """A name that fits a panel."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _real_and_drawn(axes: Any, real: np.ndarray, drawn: np.ndarray, spec: Any) -> None:
    if len(spec.shape) > 1:
        height, width = spec.shape[-2:]
        halves = [
            np.concatenate(list(part[:4].reshape(-1, height, width)), axis=-1)
            for part in (real, drawn)
        ]
        low, high = real.min(), real.max()
        gap = np.full((1, halves[0].shape[1]), high)
        axes.imshow(np.concatenate([halves[0], gap, halves[1]]), cmap="gray", vmin=low, vmax=high)
        axes.set_xticks([])
        middle = (height - 1) / 2
        axes.set_yticks([middle, middle + height + 1], ["real", "drawn"])
        return
    if real.shape[1] == 1:
        bins = np.histogram_bin_edges(np.concatenate([real, drawn]), 20)
        for part, label in ((real, "real"), (drawn, "drawn")):
            axes.hist(part[:, 0], bins, density=True, histtype="step", label=label)
    else:
        for part, label in ((real, "real"), (drawn, "drawn")):
            axes.plot(part[:200, 0], part[:200, 1], ".", markersize=2, alpha=0.6, label=label)
        axes.set_xlabel(spec.columns[0] if spec.columns else "first component", fontsize=6)
        axes.set_ylabel(spec.columns[1] if spec.columns else "second component", fontsize=6)
    axes.legend(fontsize=5)


def film_figure(strips: Sequence[tuple[str, Sequence[np.ndarray], Sequence[int]]]) -> Figure:
    """Episodes as strips of film, one below the other.

    Args:
        strips: of each, what it is called, its pictures (h w 3, bytes) and the steps that they show.
    """
    columns = max(len(frames) for _, frames, _ in strips)
    figure = Figure(figsize=(1.3 * columns, 1.65 * len(strips)), layout="constrained")
    parts: Any = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for part, (title, frames, steps) in zip(parts, strips, strict=True):
        part.suptitle(title, fontsize=9, x=0.01, ha="left")
        panels = part.subplots(1, columns, squeeze=False)[0]
        for axes in panels:
            axes.set_axis_off()
        for axes, frame, step in zip(panels, frames, steps, strict=False):
            axes.imshow(frame)
            axes.set_title(f"step {step}", fontsize=7)
    return figure
