"""Archives: cells over descriptors, each keeping the best individual that fell into it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.errors import UserError
from esscher.runtime.state import State, Stateful, check_names
from esscher.types import Population

CENTROID_SAMPLES = 50_000
"""Uniform points that k-means puts cells around."""


class Archive(Stateful):
    """A MAP-Elites archive of pyribs, with dense tensors as its state.

    Cells are a grid, or the Voronoi cells of centroids that k-means finds among uniform points
    (CVT). The points are the same for every run, so that archives of one shape can be compared cell
    by cell.

    Args:
        size: numbers in a genotype.
        low: smallest descriptor.
        high: largest descriptor.
        cells: their number, for CVT; or their numbers along each descriptor, for a grid.

    Raises:
        UserError: pyribs is not installed, cells do not suit the descriptors, or bounds are empty.
    """

    def __init__(
        self, size: int, low: Sequence[float], high: Sequence[float], cells: Sequence[int]
    ):
        if not low or any(not a < b for a, b in zip(low, high, strict=True)):
            raise UserError(f"descriptors need bounds low < high, got {tuple(low)}, {tuple(high)}")
        if len(cells) not in (1, len(low)) or min(cells) < 1 or torch.tensor(cells).prod() < 2:
            raise UserError(
                f"cells must be one number >= 2 (CVT), or {len(low)} numbers (a grid with so many "
                f"along each descriptor), got {tuple(cells)}"
            )
        self._low, self._high = tuple(map(float, low)), tuple(map(float, high))
        self._size, self._shape = size, tuple(cells)
        grid = len(cells) == len(low)
        self._archive = _grid(self, cells) if grid else _voronoi(self, _centroids(self, cells[0]))

    @property
    def num_cells(self) -> int:
        """Occupied or not."""
        return int(self._archive.cells)

    def __len__(self) -> int:
        """Occupied cells."""
        return len(self._archive)

    def add(self, population: Population) -> Int[Tensor, "p"]:
        """Offer individuals, all at once: of those that fall into one cell the best competes, and
        enters if the cell is empty or its elite is worse.

        Returns:
            2 for each that falls into an empty cell, 1 for each better than its cell's elite (of
            these, the best of each cell stays), 0 for the others.

        Raises:
            UserError: a fitness that is not finite, a descriptor that is not or lies out of bounds.
        """
        self._check(population)
        info = self._archive.add(
            population.genotype.cpu().numpy(),
            population.fitness.double().cpu().numpy(),
            population.descriptor.double().cpu().numpy(),
        )
        return torch.from_numpy(info["status"]).long()

    def elites(self) -> Population:
        """Of all occupied cells, in the order of the cells.

        Raises:
            UserError: there are none.
        """
        found, order = self._found()
        return Population(
            genotype=torch.from_numpy(found["solution"])[order],
            fitness=torch.from_numpy(found["objective"])[order].float(),
            descriptor=torch.from_numpy(found["measures"])[order].float(),
        )

    def best(self) -> Population:
        """The elite of the largest fitness, alone."""
        elites = self.elites()
        return elites.index(elites.fitness.argmax().reshape(1))

    def nearest(self, descriptor: Float[Tensor, "c"]) -> Population:
        """The elite whose descriptor is nearest, alone; distances in parts of the bounds' range."""
        elites = self.elites()
        away = (elites.descriptor - descriptor) / (
            torch.tensor(self._high) - torch.tensor(self._low)
        )
        return elites.index(away.square().sum(-1).argmin().reshape(1))

    def summary(self) -> dict[str, Tensor]:
        """QD-score (sum of the elites' fitness), coverage (share of cells), largest fitness."""
        if not len(self):
            return {}
        fitness = self.elites().fitness
        return {
            "qd_score": fitness.sum(),
            "coverage": torch.tensor(len(self) / self.num_cells),
            "max_fitness": fitness.max(),
        }

    def heatmap(self, axes: Any) -> None:
        """Pyribs' own picture of one or two descriptors: each cell in the colour of its fitness."""
        from ribs.visualize import cvt_archive_heatmap, grid_archive_heatmap

        if len(self._low) > 2:
            raise ValueError("pyribs draws heat maps of one or two descriptors")
        if len(self._shape) == len(self._low):
            grid_archive_heatmap(self._archive, axes, cmap="viridis")
        else:
            cvt_archive_heatmap(self._archive, axes, cmap="viridis", lw=0.2)

    def state_dict(self) -> State:
        """One row a cell; those of empty cells are zero."""
        cells = self.num_cells
        state = {
            "genotype": torch.zeros(cells, self._size),
            "fitness": torch.zeros(cells, dtype=torch.float64),
            "descriptor": torch.zeros(cells, len(self._low), dtype=torch.float64),
            "occupied": torch.zeros(cells, dtype=torch.bool),
        }
        if hasattr(self._archive, "centroids"):
            state["centroids"] = torch.from_numpy(self._archive.centroids)
        if len(self):
            found, order = self._found()
            where = torch.from_numpy(found["index"]).long()[order]
            state["genotype"][where] = torch.from_numpy(found["solution"])[order]
            state["fitness"][where] = torch.from_numpy(found["objective"])[order]
            state["descriptor"][where] = torch.from_numpy(found["measures"])[order]
            state["occupied"][where] = True
        return state

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`."""
        check_names(self.state_dict(), state, type(self).__name__)
        if "centroids" in state:
            # Not computed anew: another machine's k-means may differ in the last bits.
            self._archive = _voronoi(self, state["centroids"].numpy())
        self._archive.clear()
        occupied = state["occupied"]
        if occupied.any():
            columns = (state[name][occupied] for name in ("genotype", "fitness", "descriptor"))
            self._archive.add(*(column.numpy() for column in columns))

    def _found(self) -> tuple[dict[str, Any], Tensor]:
        if not len(self):
            raise UserError("the archive is empty: no individual has been judged yet")
        found = self._archive.data()
        return found, torch.from_numpy(found["index"]).long().argsort()

    def _check(self, population: Population) -> None:
        if not population.fitness.isfinite().all():
            which = int((~population.fitness.isfinite()).nonzero()[0])
            value = population.fitness[which].item()
            raise UserError(f"the fitness of individual {which} is {value}: it must be finite")
        descriptor = population.descriptor.cpu()
        low, high = torch.tensor(self._low), torch.tensor(self._high)
        inside = (descriptor >= low) & (descriptor <= high)  # Also false of NaN.
        if not inside.all():
            which, component = (int(k) for k in (~inside).nonzero()[0])
            low, high = self._low[component], self._high[component]
            raise UserError(
                f"descriptor {component} of individual {which} is "
                f"{descriptor[which, component].item():g}, outside [{low:g}, {high:g}]: widen the "
                "bounds, or clip it in the task"
            )


def _ranges(archive: Archive) -> list[tuple[float, float]]:
    return list(zip(archive._low, archive._high, strict=True))


def _options(archive: Archive) -> dict[str, Any]:
    return {
        "solution_dim": archive._size,
        "ranges": _ranges(archive),
        "solution_dtype": "float32",
        "objective_dtype": "float64",
        "measures_dtype": "float64",
    }


def _grid(archive: Archive, cells: Sequence[int]) -> Any:
    return _library().GridArchive(dims=tuple(cells), **_options(archive))


def _voronoi(archive: Archive, centroids: Any) -> Any:
    return _library().CVTArchive(centroids=centroids, **_options(archive))


def _centroids(archive: Archive, cells: int) -> Any:
    from threadpoolctl import threadpool_limits

    library = _library()
    with threadpool_limits(1):  # Sums of several threads come out in any order.
        centroids, _ = library.k_means_centroids(
            centroids=cells, ranges=_ranges(archive), samples=CENTROID_SAMPLES, seed=0
        )
    return centroids


def _library() -> Any:
    try:
        import ribs.archives
    except ImportError:
        raise UserError('archives need pyribs: pip install "esscher[control]"') from None
    return ribs.archives
