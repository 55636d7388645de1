"""What diffusion models drew, as figures: images side by side, points in a plane."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

MOST = 64
"""Samples in one figure of images."""


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
    axes.set_aspect("equal", adjustable="datalim")
    if title:
        axes.set_title(title)
    return figure


def _grid(images: np.ndarray, title: str | None) -> Figure:
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    height, width = images.shape[2:]
    sheet = np.ones((lines * (height + 1) - 1, columns * (width + 1) - 1, images.shape[1]))
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
