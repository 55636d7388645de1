"""The mazes of Gymnasium-Robotics, with D4RL's waypoint controller as the expert."""

import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters import mujoco_state
from esscher.adapters.imports import needed
from esscher.adapters.mazes import Cell, towards
from esscher.errors import UserError, nearest

MAZES = re.compile(r"PointMaze_\w+-v3|AntMaze_\w+-v[45]")

STIFFNESS, DAMPING = 10.0, 1.0
"""Of the controller: force per distance, and per speed (D4RL, pointmaze/waypoint_controller.py)."""


class RoboticsMaze:
    """One maze, such as PointMaze_UMaze-v3: see `esscher.adapters.mazes.Simulator`.

    Raises:
        UserError: Gymnasium-Robotics is not installed, or has no such maze.
    """

    packages: tuple[str, ...] = ("gymnasium-robotics", "mujoco")

    def __init__(self, maze: str):
        self.name = f"gymnasium_robotics:{maze}"
        gymnasium.register_envs(needed("gymnasium_robotics", self.name, "mazes"))
        known = [name for name in gymnasium.registry if MAZES.fullmatch(name)]
        if maze not in known:
            raise UserError(f"Gymnasium-Robotics has no maze {maze!r}: {nearest(maze, known)}")
        made = gymnasium.make(maze, continuing_task=True, reset_target=False)
        self._env: Any = made.unwrapped
        self._body = self._env.point_env if "Point" in maze else self._env.ant_env
        self.max_steps = int((made.spec and made.spec.max_episode_steps) or 300)
        self.fps = int(self._env.metadata.get("render_fps", 50))
        box = self._env.action_space
        self.action_space: spaces.Box[Any] = spaces.Box(box.low, box.high, dtype=np.float32)
        self.walls = np.array([[cell == 1 for cell in row] for row in self._env.maze.maze_map])

    def begin(self, seed: int, cells: tuple[Cell, Cell] | None) -> None:
        options = None if cells is None else {"reset_cell": cells[0], "goal_cell": cells[1]}
        self._seen, info = self._env.reset(seed=seed, options=options)
        self._success = bool(info["success"])

    def want(self, cell: Cell) -> None:
        centre = self._env.maze.cell_rowcol_to_xy(np.array(cell))
        self._env.goal = self._env.add_xy_position_noise(centre)
        self._env.update_target_site_pos()

    def step(self, action: NDArray[Any]) -> None:
        self._seen, _, _, _, info = self._env.step(np.asarray(action, np.float32))
        self._success = bool(info["success"])

    def position(self) -> NDArray[np.float64]:
        return np.asarray(self._seen["achieved_goal"], np.float64)

    def wanted(self) -> NDArray[np.float64]:
        return np.asarray(self._env.goal, np.float64)

    def rest(self) -> NDArray[np.float64]:
        return np.asarray(self._seen["observation"], np.float64)

    def reached(self) -> bool:
        return self._success

    def expert(self) -> NDArray[np.float64]:
        """A damped spring to the centre of the next cell, and to the goal within its own, for a point.

        Source: D4RL, pointmaze/waypoint_controller.py.
        """
        if "PointMaze" not in self.name:
            raise UserError(
                f"{self.name} has no expert: collect in a PointMaze, or with a policy of your own "
                "(esscher data collect RUN)"
            )
        maze, here, goal = self._env.maze, self.position(), self.wanted()
        start, end = self._cell(here), self._cell(goal)
        following = towards(self.walls, start, end)
        target = goal if following == start else maze.cell_rowcol_to_xy(np.array(following))
        return STIFFNESS * (target - here) - DAMPING * self.rest()[2:]

    def get_state(self) -> dict[str, Any]:
        return {
            "mujoco": mujoco_state.take(self._body.model, self._body.data),
            "seen": {name: np.array(part) for name, part in self._seen.items()},
            "wanted": self.wanted(),
            "success": self._success,
            "generator": self._env.np_random,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        mujoco_state.put(self._body.model, self._body.data, state["mujoco"])
        self._seen, self._success = state["seen"], state["success"]
        self._env.goal, self._env.np_random = state["wanted"], state["generator"]
        self._env.update_target_site_pos()

    def close(self) -> None:
        self._env.close()

    def _cell(self, place: NDArray[np.float64]) -> Cell:
        row, column = self._env.maze.cell_xy_to_rowcol(place)
        return int(row), int(column)
