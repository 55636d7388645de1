"""The figure of populations: a map of vectors, and sets beside what was drawn, whatever they hold."""

import numpy as np
import pytest
import torch

from esscher.report.pictures import SETS_SHOWN, populations_figure
from esscher.types import SetSpec


def spec(*shape, columns=()):
    size = int(np.prod(shape))
    return SetSpec(shape=shape, mean=(0.0,) * size, std=(1.0,) * size, columns=columns)


def figure_of(samples, count=4, latent=3, vectors=None):
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.rand(7, samples.dim, generator=draw), torch.rand(7, samples.dim, generator=draw))
        for _ in range(count)
    ]
    vectors = torch.randn(count, latent, generator=draw) if vectors is None else vectors
    names = [f"population {k} with a name that does not fit its panel" for k in range(count)]
    return populations_figure(vectors, names, pairs, samples)


@pytest.mark.parametrize("shape", [(2,), (1,), (30,), (8, 8), (3, 4, 4)])
def test_it_draws_samples_of_every_shape(shape):
    figure = figure_of(spec(*shape))
    figure.canvas.draw()
    assert len(figure.axes) == 5
    assert figure.axes[1].get_title() == "population 0 with a nam…"


@pytest.mark.parametrize(("count", "latent"), [(1, 3), (2, 1), (9, 3)])
def test_it_draws_few_populations_and_many(count, latent):
    figure = figure_of(spec(2), count, latent)
    figure.canvas.draw()
    assert len(figure.axes) == 1 + min(count, SETS_SHOWN)


def test_the_map_keeps_distances_of_vectors_in_a_plane():
    plane = torch.tensor([[0.0, 0.0], [3.0, 4.0], [-1.0, 2.0], [5.0, 0.0]])
    turned = (
        plane @ torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))).Q[:2]
    )
    (line,) = figure_of(spec(2), vectors=turned + 7).axes[0].lines
    found = torch.tensor(np.stack(line.get_data(), 1)).float()
    torch.testing.assert_close(torch.pdist(found), torch.pdist(plane), atol=1e-4, rtol=1e-4)


def test_axes_have_the_names_of_columns():
    axes = figure_of(spec(2, columns=("gene", "other"))).axes[1]
    assert axes.get_xlabel() == "gene" and axes.get_ylabel() == "other"
