"""Archives: which cell, who stays, and what is remembered."""

import numpy as np
import pytest
import torch

from esscher.errors import UserError
from esscher.experience.archive import Archive
from esscher.types import Population

LOW, HIGH = (0.0, -1.0), (1.0, 1.0)


def people(*rows: tuple[float, float, float, float]) -> Population:
    """Rows of genotype (one number), fitness, and two descriptors."""
    table = torch.tensor(rows)
    return Population(genotype=table[:, :1], fitness=table[:, 1], descriptor=table[:, 2:])


def grid() -> Archive:
    """Cells [0, 0.5), [0.5, 1] by [-1, 0), [0, 1]."""
    return Archive(1, LOW, HIGH, (2, 2))


def listed(archive: Archive) -> list[list[float]]:
    elites = archive.elites()
    return torch.cat(
        [elites.genotype, elites.fitness[:, None], elites.descriptor], 1
    ).tolist()  # fmt: skip


def test_the_best_of_a_cell_stays():
    archive = grid()
    first = people((1, 5, 0.25, -0.5), (2, 7, 0.25, -0.25), (3, 6, 0.75, -0.5), (4, -2, 0.75, 0.5))
    assert archive.add(first).tolist() == [2, 2, 2, 2]
    assert listed(archive) == [[2, 7, 0.25, -0.25], [3, 6, 0.75, -0.5], [4, -2, 0.75, 0.5]]
    # Worse, equal, better, and an empty cell; of two that are better, the better one.
    then = people(
        (5, 6.5, 0.25, -0.5), (6, 6, 0.75, -0.75), (7, -1, 1.0, 1.0), (8, 3, 0.0, 0.0),
        (9, -1.5, 0.5, 0.0),
    )  # fmt: skip
    assert archive.add(then).tolist() == [0, 0, 1, 2, 1]
    assert listed(archive) == [
        [2, 7, 0.25, -0.25], [8, 3, 0, 0], [3, 6, 0.75, -0.5], [7, -1, 1, 1]
    ]  # fmt: skip
    found = {name: value.item() for name, value in archive.summary().items()}
    assert found == {"qd_score": 15, "coverage": 1, "max_fitness": 7}
    assert archive.best().genotype.item() == 2
    assert len(archive) == 4 and archive.num_cells == 4


def test_coverage_counts_cells():
    archive = grid()
    assert archive.summary() == {}
    archive.add(people((1, 5, 0.25, -0.5)))
    assert archive.summary()["coverage"].item() == 0.25


def test_nearest_in_parts_of_the_range():
    archive = grid()
    archive.add(people((1, 0, 0.2, -0.5), (2, 0, 0.9, 0.5)))
    # From (0.6, -0.1): 0.4 and 0.2 of the ranges away from the one, 0.3 and 0.3 from the other; in
    # the descriptors' own units the one would be at 0.566 and the other at 0.671.
    assert archive.nearest(torch.tensor([0.6, -0.1])).genotype.item() == 2
    assert archive.nearest(torch.tensor([0.3, -0.4])).genotype.item() == 1


def test_voronoi_cells_are_those_of_the_nearest_centroid():
    archive = Archive(1, LOW, HIGH, (12,))
    centroids = archive.state_dict()["centroids"].numpy()
    assert centroids.shape == (12, 2)
    draw = np.random.default_rng(0)
    places = draw.uniform(LOW, HIGH, (200, 2)).astype(np.float32)
    fitness = draw.normal(size=200).astype(np.float32)
    archive.add(
        Population(
            genotype=torch.arange(200.0)[:, None],
            fitness=torch.from_numpy(fitness),
            descriptor=torch.from_numpy(places),
        )
    )
    cell = np.square(places[:, None] - centroids).sum(-1).argmin(1)
    best = [max(np.flatnonzero(cell == k), key=lambda i: fitness[i]) for k in np.unique(cell)]
    assert archive.elites().genotype.squeeze(1).tolist() == best
    # Every cell takes about its share of a uniform sample.
    large = draw.uniform(LOW, HIGH, (20_000, 2))
    counts = np.bincount(np.square(large[:, None] - centroids).sum(-1).argmin(1), minlength=12)
    assert counts.min() > 0.6 * 20_000 / 12 and counts.max() < 1.5 * 20_000 / 12
    again = Archive(1, LOW, HIGH, (12,)).state_dict()["centroids"].numpy()
    assert np.array_equal(centroids, again)


@pytest.mark.parametrize("cells", [(3, 4), (12,)])
def test_a_state_goes_into_another_archive(cells):
    draw = torch.Generator().manual_seed(0)
    some = torch.rand(40, 4, generator=draw)
    crowd = Population(
        genotype=some[:, :1], fitness=some[:, 1], descriptor=some[:, 2:] * torch.tensor([1.0, 2.0])
        - torch.tensor([0.0, 1.0]),
    )  # fmt: skip
    one, other = Archive(1, LOW, HIGH, cells), Archive(1, LOW, HIGH, cells)
    one.add(crowd.index(slice(20)))
    one.add(crowd.index(slice(20, None)))
    other.add(crowd.index(slice(5)))
    state = {name: value.clone() for name, value in one.state_dict().items()}
    if "centroids" in state:
        state["centroids"] += 1e-9  # As from a machine that rounds otherwise.
    other.load_state_dict(state)
    assert listed(other) == listed(one)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    newer = people((9, 2, 0.1, 0.9))
    assert one.add(newer).tolist() == other.add(newer).tolist()
    assert listed(other) == listed(one)
    empty = Archive(1, LOW, HIGH, cells)
    other.load_state_dict({**state, **empty.state_dict()})
    assert len(other) == 0
    with pytest.raises(ValueError, match="shape"):
        Archive(2, LOW, HIGH, cells).load_state_dict(state)


def test_an_empty_archive_has_no_elites():
    for ask in (grid().elites, grid().best, lambda: grid().nearest(torch.zeros(2))):
        with pytest.raises(UserError, match="archive is empty"):
            ask()


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        ((1.5, 0.0), r"descriptor 0 of individual 1 is 1.5, outside \[0, 1\]"),
        ((0.5, -1.25), r"descriptor 1 of individual 1 is -1.25, outside \[-1, 1\]"),
        ((0.5, float("nan")), "descriptor 1 of individual 1 is nan"),
    ],
)
def test_descriptors_out_of_bounds_are_refused(descriptor, message):
    archive = grid()
    with pytest.raises(UserError, match=message):
        archive.add(people((1, 0, 0.5, 0.5), (2, 0, *descriptor)))
    assert len(archive) == 0


def test_a_fitness_that_is_none_is_refused():
    with pytest.raises(UserError, match="fitness of individual 0 is inf"):
        grid().add(people((1, float("inf"), 0.5, 0.5)))


@pytest.mark.parametrize("cells", [(1,), (0, 3), (2, 2, 2), (1, 1)])
def test_cells_that_do_not_suit(cells):
    with pytest.raises(UserError, match="cells must be"):
        Archive(1, LOW, HIGH, cells)


def test_bounds_that_are_empty():
    with pytest.raises(UserError, match="bounds low < high"):
        Archive(1, (0.0,), (0.0,), (4,))


@pytest.mark.parametrize("cells", [(3, 4), (12,)])
def test_it_is_drawn_by_pyribs(cells):
    from matplotlib.figure import Figure

    archive = Archive(1, LOW, HIGH, cells)
    archive.add(people((1, 5, 0.25, -0.5), (2, 7, 0.75, 0.25)))
    axes = Figure().add_subplot()
    archive.heatmap(axes)
    assert axes.has_data() and axes.get_xlim() == (0, 1) and axes.get_ylim() == (-1, 1)
