"""The tilt that the concept page shows, against numerical integration."""

import numpy as np
import pytest
from scipy.integrate import quad

from esscher.functional.divergences import GENERATORS
from esscher.report.concept_figures import BASE, BETAS, DRAWINGS, TARGET, generators, tilt


@pytest.mark.parametrize("beta", BETAS)
def test_the_tilt_is_exact(beta: float) -> None:
    def unnormalised(x: float) -> float:
        gaussians = zip(BASE.weights, BASE.means, BASE.stds, strict=True)
        base = sum(
            w / (s * np.sqrt(2 * np.pi)) * np.exp(-((x - m) ** 2) / (2 * s**2))
            for w, m, s in gaussians
        )
        return base * np.exp(-((x - TARGET) ** 2) / (2 * beta))

    whole, _ = quad(unnormalised, -15, 15, limit=500)
    tilted = BASE.tilted(TARGET, beta)
    assert tilted.weights.sum() == pytest.approx(1)
    for x in (-2.0, -0.5, 0.8, 2.4, 3.1):
        assert tilted.density(np.array([x]))[0] == pytest.approx(unnormalised(x) / whole, rel=1e-6)


def test_the_shares_that_the_page_names() -> None:
    shares = [BASE.weights[2], *(BASE.tilted(TARGET, beta).weights[2] for beta in (4, 1, 0.25))]
    assert [round(100 * share) for share in shares] == [15, 34, 63, 94]


def test_every_generator_has_its_panel() -> None:
    titles = {axes.get_title(loc="left") for axes in generators().axes}
    assert set(GENERATORS) < titles and len(titles) == len(GENERATORS) + 2
    assert len(tilt().axes) == 2


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_takes_the_colours_of_the_page(name: str) -> None:
    svg = DRAWINGS[name].svg(name)
    assert "currentColor" in svg and DRAWINGS[name].title in svg and "<script" not in svg
