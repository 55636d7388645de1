"""Pictures of what a diffusion model drew in the plane."""

import numpy as np
import pytest
import torch
from torch import Tensor

from esscher.report.pictures import samples_figure
from esscher.report.plots import png_bytes


def cloud(seed: int, reach: float = 1.0, centre: float = 0.0) -> Tensor:
    draws = np.random.default_rng(seed)
    return torch.tensor(centre + reach * draws.uniform(-1, 1, (20, 2)), dtype=torch.float32)


@pytest.mark.parametrize("power", range(-4, 6))
def test_nothing_is_cut_off(power: int) -> None:
    """Whatever the ticks say, which has its width."""
    for seed in range(4):
        reach = 10.0**power * (1 + seed)
        # Wide, tall and far from zero: each once moved the ticks after room was made for them.
        for stretch, centre in (([1, 1], 0.0), ([1, 1e-3], 0.0), ([1e-3, 1], 2.0), ([1, 0.1], 3.0)):
            points = cloud(seed, reach) * torch.tensor(stretch) + reach * centre
            figure = samples_figure(points)
            png_bytes(figure)
            extent = figure.axes[0].get_tightbbox()
            assert extent is not None
            assert min(extent.x0, extent.y0) >= 0, (power, seed, stretch)
            assert extent.x1 <= figure.bbox.width and extent.y1 <= figure.bbox.height


def limits(points: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    axes = samples_figure(points).axes[0]
    return tuple(map(float, axes.get_xlim())), tuple(map(float, axes.get_ylim()))


def test_pictures_of_two_steps_have_the_same_axes_where_they_can() -> None:
    """By hand: the next of 1, 2, 5 times a power of ten, on both sides of zero."""
    for reach, end in ((0.9, 1.0), (1.0, 1.0), (1.7, 2.0), (3.0, 5.0), (4.4, 5.0), (60.0, 100.0)):
        corners = torch.tensor([[-reach, 0.0], [reach, 0.5 * reach]])
        assert limits(corners) == ((-end, end), (-end, end)), reach
    before, after = cloud(0, 3.0), cloud(1, 1.5) + 2
    assert limits(before) == limits(after)


def test_a_cloud_far_from_zero_and_one_of_a_single_point_can_be_seen() -> None:
    across, upwards = limits(cloud(0, 0.01, centre=300.0))
    assert 299.9 < across[0] < 300 < across[1] < 300.1
    assert across[1] - across[0] == pytest.approx(upwards[1] - upwards[0])
    across, _ = limits(torch.full((3, 2), 4.0))
    assert across[0] < 4 < across[1]


def test_what_is_not_finite_or_has_one_component_is_no_error() -> None:
    points = cloud(0, 3.0)
    points[0] = torch.tensor([float("nan"), float("inf")])
    assert limits(points) == ((-5, 5), (-5, 5))
    assert limits(torch.full((3, 2), float("nan"))) == ((-1, 1), (-1, 1))
    assert limits(cloud(0, 3.0)[:, :1]) == ((-5, 5), (-5, 5))


def test_images_can_be_told_from_what_lies_between_them() -> None:
    """Two white ones and a black one: grey between them, and where the fourth would be."""
    images = torch.stack([torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])
    sheet = samples_figure(images).axes[0].images[0].get_array()
    assert sheet is not None
    expected = np.full((5, 5), 0.8)
    expected[:2, :2] = expected[:2, 3:] = 1.0
    expected[3:, :2] = 0.0
    np.testing.assert_allclose(sheet, expected)
