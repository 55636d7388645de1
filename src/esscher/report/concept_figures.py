"""Figures of the concept pages: the exponential tilt, in closed form, and every f-divergence.

They are drawn when the site is built, from the formulas that the methods use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from . import plots

Array = np.ndarray


@dataclass(frozen=True)
class Mixture:
    """Gaussians on the line: weights, means and standard deviations, each of shape (k,)."""

    weights: Array
    means: Array
    stds: Array

    def density(self, x: Array) -> Array:
        """At each x (n,)."""
        scaled = (x[:, None] - self.means) / self.stds
        each = np.exp(-0.5 * scaled**2) / (self.stds * np.sqrt(2 * np.pi))
        return each @ self.weights

    def tilted(self, target: float, beta: float) -> "Mixture":
        """The tilt p(x) exp(r(x) / beta) / Z by r(x) = -(x - target)^2 / 2; beta > 0, in reward.

        The factor is a Gaussian around the target of variance beta, so each component stays one:
        precisions add up, means are their average weighed by precisions, and the component's weight
        changes by what the Gaussian of variance std^2 + beta around the target says at its mean.
        """
        precision = 1 / self.stds**2 + 1 / beta
        means = (self.means / self.stds**2 + target / beta) / precision
        spread = self.stds**2 + beta
        weights = self.weights * np.exp(-0.5 * (self.means - target) ** 2 / spread)
        weights = weights * np.sqrt(beta / spread)
        return Mixture(weights / weights.sum(), means, precision**-0.5)


BASE = Mixture(np.array([0.55, 0.3, 0.15]), np.array([-1.6, 0.7, 2.6]), np.array([0.55, 0.4, 0.35]))
TARGET = 2.4
BETAS = (4.0, 1.0, 0.25)


def tilt() -> Figure:
    """A base density, a reward, and the tilt at three temperatures."""
    with rc_context(plots.DRAWING):
        figure = Figure(figsize=(plots.WIDTH, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.2])
        x = np.linspace(-4, 4.5, 500)
        above.plot(x, -0.5 * (x - TARGET) ** 2, color=plots.INK)
        above.set_title("reward r(x)")
        below.fill_between(x, BASE.density(x), color=plots.INK, alpha=0.15, linewidth=0)
        below.plot(x, BASE.density(x), color=plots.INK, linewidth=1, label="base")
        for beta, colour in zip(BETAS, plots.PALETTE, strict=False):
            density = BASE.tilted(TARGET, beta).density(x)
            below.plot(x, density, color=colour, linewidth=2, label=f"tilted, beta = {beta:g}")
        below.set_title("densities")
        below.set_xlabel("x")
        below.set_ylim(bottom=0)
        below.legend(loc="upper left")
    return figure


def generators() -> Figure:
    """Each generator f and its derivative f' against the ratio u, one panel a generator."""
    import torch

    from esscher.functional.divergences import GENERATORS, alpha

    records = [*(make() for make in GENERATORS.values()), alpha(0.5), alpha(-1.0)]
    u = np.linspace(0.05, 4, 400)
    log_u = torch.from_numpy(u).log()
    with rc_context(plots.SMALL):
        figure = Figure(figsize=(plots.WIDTH * 1.2, 7.2), layout="constrained")
        grid = figure.subplots(4, 3, sharex=True)
        for axes, record in zip(grid.flat, records, strict=True):
            axes.axvline(1, color=plots.INK, linewidth=0.8, alpha=0.5)
            axes.plot(u, record.f(log_u), color=plots.PALETTE[0], linewidth=2, label="f(u)")
            axes.plot(u, record.df(log_u), "--", color=plots.PALETTE[1], label="f'(u)")
            axes.set_title(record.name)
            axes.set_ylim(-3, 4)
        grid[0, 0].legend(loc="lower right")
        for axes in grid[-1]:
            axes.set_xlabel("u")
    return figure


@dataclass(frozen=True)
class Drawing:
    """A figure of the site, with what a screen reader says of it."""

    draw: Callable[[], Figure]
    title: str
    description: str

    def svg(self, name: str) -> str:
        """Inline, in the colours of the page."""
        return plots.inline_svg(self.draw(), name, self.title, self.description)


DRAWINGS = {
    "tilt": Drawing(
        tilt,
        "An exponential tilt",
        "A mixture of three Gaussians, a reward that is highest at 2.4, and the tilted densities: the "
        "lower the temperature, the more of the mass lies near the reward's maximum.",
    ),
    "generators": Drawing(
        generators,
        "Generators of f-divergences",
        "Twelve panels, each with a generator f and its derivative f' between u = 0.05 and u = 4.",
    ),
}
