"""The mazes of OGBench, with the oracle that its own data sets were collected with."""

import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher.adapters import mujoco_state
from esscher.adapters.imports import needed
from esscher.adapters.mazes import Cell
from esscher.errors import UserError, nearest

MAZES = re.compile(r"(point|ant|humanoid)maze-(medium|large|giant|teleport)-v0")


class OGBenchMaze:
    """One maze, such as pointmaze-medium-v0: see `esscher.adapters.mazes.Simulator`.

    OGBench draws by NumPy's global state; here everything is drawn from the episode's own seed.

    Raises:
        UserError: OGBench is not installed, or has no such maze.
    """

    packages: tuple[str, ...] = ("ogbench", "mujoco")

    def __init__(self, maze: str):
        self.name = f"ogbench:{maze}"
        needed("ogbench", self.name, "mazes")
        known = [name for name in gymnasium.registry if MAZES.fullmatch(name)]
        if maze not in known:
            raise UserError(f"OGBench has no maze {maze!r}: {nearest(maze, known)}")
        made = gymnasium.make(maze, terminate_at_goal=False)
        self._env: Any = made.unwrapped
        self.max_steps = int((made.spec and made.spec.max_episode_steps) or 1000)
        self.fps = int(self._env.metadata.get("render_fps", 10))
        box = self._env.action_space
        self.action_space: spaces.Box[Any] = spaces.Box(box.low, box.high, dtype=np.float32)
        self.walls = np.asarray(self._env.maze_map) == 1
        self._env.add_noise = self._noisy
        teleports = self._env._teleport_info
        self._exits = [] if teleports is None else list(teleports["teleport_out_xys"])
        self._generator = np.random.default_rng(0)

    def begin(self, seed: int, cells: tuple[Cell, Cell] | None) -> None:
        self._generator = np.random.default_rng(seed)
        self._env.action_space.seed(seed)  # It takes a few random steps before an episode.
        if cells is None:
            options = {"task_id": 1 + int(self._generator.integers(self._env.num_tasks))}
        else:
            options = {"task_info": {"init_ij": cells[0], "goal_ij": cells[1]}}
        self._seen, _ = self._env.reset(seed=seed, options=options)
        self._success = self._env.compute_success()

    def want(self, cell: Cell) -> None:
        self._env.set_goal(goal_xy=self._noisy(self._env.ij_to_xy(cell)))

    def step(self, action: NDArray[Any]) -> None:
        self._seen, _, _, _, info = self._env.step(np.asarray(action, np.float64))
        self._success = bool(info["success"])
        if any(np.array_equal(self._env.get_xy(), place) for place in self._exits):
            # A teleport has drawn its exit by NumPy's global state.
            place = self._exits[int(self._generator.integers(len(self._exits)))]
            self._env.set_xy(np.array(place))

    def position(self) -> NDArray[np.float64]:
        return np.asarray(self._seen[:2], np.float64)

    def wanted(self) -> NDArray[np.float64]:
        return np.asarray(self._env.cur_goal_xy, np.float64)

    def rest(self) -> NDArray[np.float64]:
        return np.asarray(self._seen[2:], np.float64)

    def reached(self) -> bool:
        return self._success

    def expert(self) -> NDArray[np.float64]:
        """Of full size towards the centre of the next cell, for a point.

        Source: OGBench, data_gen_scripts/generate_locomaze.py.
        """
        if "pointmaze" not in self.name:
            raise UserError(
                f"{self.name} has no expert: OGBench's was trained and is no part of the library; "
                "collect in a pointmaze, or with a policy of your own (esscher data collect RUN)"
            )
        here = self._env.get_xy()
        subgoal, _ = self._env.get_oracle_subgoal(here, self._env.cur_goal_xy)
        way = subgoal - here
        return way / (np.linalg.norm(way) + 1e-6)

    def get_state(self) -> dict[str, Any]:
        return {
            "mujoco": mujoco_state.take(self._env.model, self._env.data),
            "seen": np.array(self._seen),
            "wanted": self.wanted(),
            "success": self._success,
            "generator": self._generator,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        mujoco_state.put(self._env.model, self._env.data, state["mujoco"])
        self._env.set_goal(goal_xy=state["wanted"])
        self._seen, self._success = state["seen"], state["success"]
        self._generator = state["generator"]

    def close(self) -> None:
        self._env.close()

    def _noisy(self, place: Any) -> tuple[float, float]:
        """Somewhere in the middle half of a cell, for starts and goals."""
        reach = self._env._noise * self._env._maze_unit / 4
        x, y = np.asarray(place) + self._generator.uniform(-reach, reach, 2)
        return float(x), float(y)
