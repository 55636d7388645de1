"""A maze small enough to know every way in it, with a simulator of a few lines.

#######
#. . .#      row 1: columns 1 to 3
### ###      row 2: column 2, a corridor
#. . .#      row 3
#######
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from esscher.adapters.mazes import Cell, Maze, MazeTask, towards
from esscher.errors import UserError

WALLS = np.array(
    [
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 0, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 1, 1, 1],
    ],
    bool,
)


class Walker:
    """A point that moves by half of its action, and stays where a wall would be; x is the column."""

    name = "toy_mazes:walk"
    walls, max_steps, fps, packages = WALLS, 60, 10, ("numpy",)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def begin(self, seed: int, cells: tuple[Cell, Cell] | None) -> None:
        self.generator = np.random.default_rng(seed)
        start, goal = cells or ((1, 1), (3, 3))
        self.place, self.goal = self._in(start), self._in(goal)

    def want(self, cell: Cell) -> None:
        self.goal = self._in(cell)

    def step(self, action: Any) -> None:
        place = self.place + 0.5 * np.asarray(action, np.float64)
        column, row = np.floor(place).astype(int)
        if not self.walls[row, column]:
            self.place = place

    def position(self) -> np.ndarray:
        return self.place.copy()

    def wanted(self) -> np.ndarray:
        return self.goal.copy()

    def rest(self) -> np.ndarray:
        return np.array([7.0])

    def reached(self) -> bool:
        return bool(np.linalg.norm(self.place - self.goal) < 0.3)

    def expert(self) -> np.ndarray:
        (x, y), (goal_x, goal_y) = np.floor(self.place), np.floor(self.goal)
        row, column = towards(self.walls, (int(y), int(x)), (int(goal_y), int(goal_x)))
        last = (row, column) == (int(y), int(x))
        target = self.goal if last else np.array([column + 0.5, row + 0.5])
        return np.clip(2 * (target - self.place), -1, 1)

    def get_state(self) -> dict[str, Any]:
        return {"place": self.place, "goal": self.goal, "generator": self.generator}

    def set_state(self, state: dict[str, Any]) -> None:
        self.place, self.goal, self.generator = state["place"], state["goal"], state["generator"]

    def close(self) -> None:
        pass

    def _in(self, cell: Cell) -> np.ndarray:
        row, column = cell
        return np.array([column + 0.5, row + 0.5]) + self.generator.uniform(-0.1, 0.1, 2)


class Statue(Walker):
    """Nobody knows how to move it."""

    def expert(self) -> np.ndarray:
        raise UserError("toy_mazes:statue has no expert")


def walk(**kwargs: Any) -> MazeTask:
    return MazeTask(Walker(), **kwargs)


def statue() -> MazeTask:
    return MazeTask(Statue())


def maze() -> gymnasium.Env[Any, Any]:
    return TimeLimit(Maze(Walker()), 60)
