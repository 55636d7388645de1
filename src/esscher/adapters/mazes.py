"""Mazes in which a body is asked for a place: the task, and an expert that wanders through it.

A flat observation begins with where the body is and where it is wanted, so that the same settings
(`goal` 2 3, `achieved` 0 1) do in every maze:

    x, y, wanted x, wanted y, and what else there is to see of the body

The simulators are next to this file, one a module; what they share is here.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters.robots import Outcome
from esscher.errors import UserError, nearest, require

Cell = tuple[int, int]
"""Row and column."""

Wandering = Literal["navigate", "path"]

WANTED, ACHIEVED = (2, 3), (0, 1)
"""Entries of an observation: where the body is wanted, and where it is."""

NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1))


# ---- cells


def free_cells(walls: NDArray[np.bool_]) -> list[Cell]:
    """All cells without a wall, row by row.

    Args:
        walls: rows x columns, with a wall all around.
    """
    return [(int(row), int(column)) for row, column in np.argwhere(~walls)]


def ends_and_turns(walls: NDArray[np.bool_]) -> list[Cell]:
    """The free cells but for those in the middle of a straight corridor.

    Source: OGBench, data_gen_scripts/generate_locomaze.py (vertex cells): where goals lie.
    """

    def corridor(row: int, column: int) -> bool:
        up, down = walls[row - 1, column], walls[row + 1, column]
        left, right = walls[row, column - 1], walls[row, column + 1]
        along, across = not up and not down, not left and not right
        return bool((along and left and right) or (across and up and down))

    return [cell for cell in free_cells(walls) if not corridor(*cell)]


def towards(walls: NDArray[np.bool_], start: Cell, goal: Cell) -> Cell:
    """The cell to go to next on a shortest way, by breadth first search.

    Of equally short ways the first counts, where up comes before left, down and right, as in OGBench.

    Returns:
        The start itself where it is the goal, or where no way leads there.
    """
    distance = {goal: 0}
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        for neighbour in _around(cell, walls):
            if neighbour not in distance:
                distance[neighbour] = distance[cell] + 1
                queue.append(neighbour)
    here = distance.get(start, 0)
    nearer = (cell for cell in _around(start, walls) if distance.get(cell, here) < here)
    return next(nearer, start)


def _around(cell: Cell, walls: NDArray[np.bool_]) -> Iterator[Cell]:
    for down, right in NEIGHBOURS:
        row, column = cell[0] + down, cell[1] + right
        inside = 0 <= row < walls.shape[0] and 0 <= column < walls.shape[1]
        if inside and not walls[row, column]:
            yield row, column


# ---- the task


class Simulator(Protocol):
    """A body in a maze; everything that is drawn follows from the seed of the episode."""

    name: str
    """Such as ogbench:pointmaze-medium-v0."""
    action_space: spaces.Box[Any]
    walls: NDArray[np.bool_]
    """Rows x columns."""
    max_steps: int
    """After which the benchmark's own episodes are cut."""
    fps: int
    packages: tuple[str, ...]
    """Whose versions decide what happens."""

    def begin(self, seed: int, cells: tuple[Cell, Cell] | None) -> None:
        """Begin an episode.

        Args:
            seed: decides what is drawn.
            cells: where to start, and where the goal lies; None: as the benchmark evaluates.
        """
        ...

    def want(self, cell: Cell) -> None:
        """Move the goal into another cell."""
        ...

    def step(self, action: NDArray[Any]) -> None: ...

    def position(self) -> NDArray[np.float64]:
        """X and y."""
        ...

    def wanted(self) -> NDArray[np.float64]:
        """X and y of the goal."""
        ...

    def rest(self) -> NDArray[np.float64]:
        """What else is seen of the body."""
        ...

    def reached(self) -> bool:
        """Whether the body is at the goal, as near as the benchmark asks for."""
        ...

    def expert(self) -> NDArray[np.float64]:
        """The action on a shortest way.

        Raises:
            UserError: nobody knows how to move this body.
        """
        ...

    def get_state(self) -> dict[str, Any]:
        """All that changes within an episode, as plain data."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def observation(simulator: Simulator) -> NDArray[np.float32]:
    """Where the body is, where it is wanted, and the rest: 4 + r."""
    parts = (simulator.position(), simulator.wanted(), simulator.rest())
    return np.concatenate(parts).astype(np.float32)


class Maze(gymnasium.Env[NDArray[np.float32], NDArray[Any]]):
    """Reach the goal once: a reward of 1, and the end of the episode.

    Starts and goals are those that the benchmark evaluates with.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  As Gymnasium declares it.
        "render_modes": [],
        "goal": WANTED,
        "achieved": ACHIEVED,
    }

    def __init__(self, simulator: Simulator):
        self._simulator = simulator
        simulator.begin(0, None)
        width = len(observation(simulator))
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = simulator.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._simulator.begin(int(self.np_random.integers(2**31)), None)
        return observation(self._simulator), {"success": self._simulator.reached()}

    def step(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._simulator.step(action)
        reached = self._simulator.reached()
        return observation(self._simulator), float(reached), reached, False, {"success": reached}

    def get_state(self) -> dict[str, Any]:
        return {"np_random": self.np_random, "simulator": self._simulator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.np_random = state["np_random"]
        self._simulator.set_state(state["simulator"])

    def close(self) -> None:
        self._simulator.close()


class MazeTask:
    """A maze for `esscher data collect`: an expert with noisy actions goes from goal to goal.

    An episode starts in any free cell and goals lie in all but corridors, drawn uniformly; the expert
    goes towards the next cell of a shortest way, and noise is added to each of its actions. The
    actions recorded are those that were carried out, as in OGBench's data sets.

    Args:
        simulator: of the maze.
        wandering: navigate draws another goal whenever one is reached, until the time is over, and an
            episode counts as solved if one was; path ends at the first goal, which does not lie in
            the cell of the start.
        noise: its standard deviation, where the box of actions is [-1, 1].
        max_steps: of an episode; by default the benchmark's own.

    Raises:
        UserError: a value is out of range, or the maze has no expert.
    """

    cameras: tuple[str, ...] = ()
    image_size: tuple[int, int] = (0, 0)

    def __init__(
        self,
        simulator: Simulator,
        *,
        wandering: str = "navigate",
        noise: float = 0.5,
        max_steps: int = 0,
    ):
        known = get_args(Wandering)
        if wandering not in known:
            raise UserError(f"no wandering {wandering!r}: {nearest(wandering, known)}")
        require("noise", noise, 0 <= noise <= 2, "in [0, 2]")
        self.max_steps = max_steps or simulator.max_steps
        require("max_steps", max_steps, self.max_steps >= 2, ">= 2, or 0 for the maze's own")
        self.name, self._simulator = simulator.name, simulator
        self.instruction = "go to the goal"
        self._wandering, self._noise = wandering, noise
        self.action_low, self.action_high = (
            tuple(map(float, bound))
            for bound in (simulator.action_space.low, simulator.action_space.high)
        )
        self.fps, self.packages = simulator.fps, simulator.packages
        self._starts, self._goals = free_cells(simulator.walls), ends_and_turns(simulator.walls)
        self.reset(0)
        self.state_dim = len(self.state())
        self.provenance = {
            "wandering": wandering,
            "noise_of_expert": noise,
            "max_steps": self.max_steps,
        }

    def reset(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        start = self._drawn(self._starts)
        left_out = start if self._wandering == "path" else None
        goal = self._drawn([cell for cell in self._goals if cell != left_out])
        self._simulator.begin(int(self._generator.integers(2**31)), (start, goal))
        self._steps = self._reached = 0

    def images(self) -> NDArray[np.uint8]:
        raise UserError(f"{self.name} has no images: leave out --images")

    def state(self) -> NDArray[np.float32]:
        return observation(self._simulator)

    def step(self, action: NDArray[Any]) -> Outcome:
        self._simulator.step(action)
        self._steps += 1
        reached, over = self._simulator.reached(), self._steps >= self.max_steps
        self._reached += reached
        if reached and self._wandering == "navigate":
            self._simulator.want(self._drawn(self._goals))
        solved = reached if self._wandering == "path" else over and self._reached > 0
        return Outcome(reward=float(reached), success=solved, terminated=False, truncated=over)

    def expert(self) -> NDArray[np.float32]:
        """What to do now; noise is drawn anew with each call."""
        low, high = np.array(self.action_low), np.array(self.action_high)
        noise = self._noise * self._generator.standard_normal(len(low)) * (high - low) / 2
        return np.clip(self._simulator.expert() + noise, low, high).astype(np.float32)

    def close(self) -> None:
        self._simulator.close()

    def _drawn(self, cells: list[Cell]) -> Cell:
        return cells[int(self._generator.integers(len(cells)))]


# ---- by name


SIMULATORS = ("ogbench", "gymnasium_robotics")
"""What stands before the colon in the name of a maze, and the library that it needs."""


def is_maze(name: str) -> bool:
    """Whether this names a maze, such as ogbench:pointmaze-medium-v0."""
    return name.partition(":")[0] in SIMULATORS


def simulator_of(name: str) -> Simulator:
    """The simulator of a maze.

    Raises:
        UserError: its library is not installed, or has no such maze.
    """
    library, _, maze = name.partition(":")
    if library == "ogbench":
        from esscher.adapters.ogbench import OGBenchMaze

        return OGBenchMaze(maze)
    from esscher.adapters.gymnasium_robotics import RoboticsMaze

    return RoboticsMaze(maze)
