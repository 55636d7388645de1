"""Mazes: shortest ways, what is collected in them, and policies that reach their goals."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esscher.adapters.data import load_dataset
from esscher.adapters.gymnasium import Environments, make
from esscher.adapters.mazes import Maze, MazeTask, ends_and_turns, free_cells, is_maze, towards
from esscher.adapters.robots import robot_task
from esscher.distributions.goals import GoalColumns, observed_by
from esscher.errors import UserError
from esscher.experience.windows import Windows
from esscher.experiment import EnvConfig, EvaluationConfig
from esscher.runtime.demonstrate import Plan, demonstrate
from esscher.runtime.evaluate import Evaluator, wilson
from esscher.types import Spec
from toy_mazes import WALLS

PLAN = Plan(tasks=("toy_mazes:walk",), episodes=4)
MAZE = EnvConfig(id="toy_mazes:maze")


# ---- ways


def test_cells_by_hand() -> None:
    assert free_cells(WALLS) == [(1, 1), (1, 2), (1, 3), (2, 2), (3, 1), (3, 2), (3, 3)]
    # (2, 2) has walls on both sides; (1, 2) and (3, 2) have a way that branches off.
    assert ends_and_turns(WALLS) == [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2), (3, 3)]
    lying = np.pad(np.zeros((1, 3), bool), 1, constant_values=True)
    assert ends_and_turns(lying) == [(1, 1), (1, 3)]
    assert ends_and_turns(lying.T) == [(1, 1), (3, 1)]


def test_the_shortest_way_cell_by_cell() -> None:
    cell, way = (1, 1), []
    while cell != (3, 3):
        cell = towards(WALLS, cell, (3, 3))
        way.append(cell)
    assert way == [(1, 2), (2, 2), (3, 2), (3, 3)]
    assert towards(WALLS, (3, 3), (3, 3)) == (3, 3)
    island = WALLS.copy()
    island[2, 2] = True
    assert towards(island, (1, 1), (3, 3)) == (1, 1), "no way leads there"


def test_of_two_ways_the_one_upwards() -> None:
    room = np.pad(np.zeros((2, 2), bool), 1, constant_values=True)
    assert towards(room, (2, 2), (1, 1)) == (1, 2)
    assert towards(room, (1, 1), (2, 2)) == (2, 1), "down before right"


# ---- collecting


def test_navigating_goes_from_goal_to_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    told = demonstrate(PLAN, "walk/navigate-v0", display=False)
    assert told.lengths == [60] * 4 and all(total >= 1 for total in told.returns)
    data = load_dataset("minari:walk/navigate-v0", None)
    rows = data.transitions
    assert rows.obs.shape == (240, 5) and not rows.terminated.any()
    changed = (rows.obs[1:, 2:4] != rows.obs[:-1, 2:4]).any(1)
    inside = ~(rows.terminated | rows.truncated)[:-1]
    reached = rows.reward[:-1] == 1
    assert torch.equal(changed & inside, reached & inside), "a goal that is reached is replaced"
    about = data.provenance["esscher"]
    assert about["task"] == "toy_mazes:walk" and about["wandering"] == "navigate"
    assert about["noise_of_expert"] == 0.5 and about["packages"] == {"numpy": np.__version__}


def test_a_path_ends_at_its_goal_in_another_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    plan = replace(PLAN, episodes=20, kwargs={"wandering": "path"})
    told = demonstrate(plan, "walk/path-v0", display=False)
    assert told.returns == [1.0] * 20 and told.solved == 20
    rows = load_dataset("minari:walk/path-v0", None).transitions
    first = torch.cat([torch.tensor([True]), rows.truncated[:-1]])
    start, goal = rows.obs[first, :2].floor(), rows.obs[first, 2:4].floor()
    assert bool((start != goal).any(1).all())
    assert torch.equal(rows.reward == 1, rows.truncated)


def test_actions_are_recorded_as_they_were_carried_out() -> None:
    task = robot_task("toy_mazes:walk")
    assert isinstance(task, MazeTask)
    task.reset(3)
    moved = 0
    for _ in range(40):
        before, action = task.state()[:2], task.expert()
        assert np.abs(action).max() <= 1
        task.step(action)
        after = task.state()[:2]
        if not np.array_equal(before, after):
            assert np.allclose(after - before, 0.5 * action, atol=1e-6)
            moved += 1
    assert moved > 20


def test_the_noise_is_the_experts_own() -> None:
    def actions(noise: float, seed: int = 0) -> np.ndarray:
        task = robot_task("toy_mazes:walk", kwargs={"noise": noise})
        task.reset(seed)
        return np.stack([task.expert() for _ in range(500)])

    quiet, noisy = actions(0.0), actions(0.25)
    assert (quiet == quiet[0]).all()
    assert np.array_equal(noisy, actions(0.25)) and not np.array_equal(noisy, actions(0.25, 1))
    spread = (noisy - quiet)[:, np.abs(quiet[0]).argmin()].std()
    assert 0.1 < spread < 0.3


def test_killed_at_any_moment_the_same_command_ends_with_the_same_set(tmp_path: Path) -> None:
    pytest.importorskip("minari")
    script = (
        "import sys; from esscher.cli import run_command; "
        "sys.exit(run_command(['data', 'collect', 'toy_mazes:walk', '--episodes', '150', '--out', "
        "'walk/navigate-v0']))"
    )

    def environment(folder: Path) -> dict[str, str]:
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        return os.environ | {"MINARI_DATASETS_PATH": str(folder), "PYTHONPATH": paths}

    def collect(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script], env=environment(folder), stderr=subprocess.DEVNULL
        )

    process = collect(tmp_path / "killed")
    parts = tmp_path / "killed/.esscher_collecting/walk__navigate-v0"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.npz"))) < 20 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/walk/navigate-v0").exists()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert kept
    assert collect(tmp_path / "killed").wait() == 0
    assert collect(tmp_path / "whole").wait() == 0
    digests = []
    for folder in ("killed", "whole"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MINARI_DATASETS_PATH", str(tmp_path / folder))
            digests.append(load_dataset("minari:walk/navigate-v0", None).digest())
    assert digests[0] == digests[1]


# ---- hindsight


def test_goals_in_training_are_what_was_reached_later_in_the_same_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    demonstrate(PLAN, "walk/navigate-v0", display=False)
    data = load_dataset("minari:walk/navigate-v0", None)
    windows = Windows(data, 3, 64, about=(0, 1))
    batch = windows.sample(200)
    places = data.transitions.obs[:, :2]
    episode = torch.arange(240) // 60
    for k in torch.nonzero(batch.has_goal).flatten().tolist():
        last = torch.nonzero((data.transitions.obs == batch.obs[k, -1]).all(1)).flatten()
        goal = torch.nonzero((places == batch.goal[k, 0]).all(1)).flatten()
        later = [(a, b) for a in last.tolist() for b in goal.tolist() if a < b]
        assert any(episode[a] == episode[b] for a, b in later)


# ---- acting


class Known(nn.Module):
    """Goes where it is wanted, by the only corridor, or nowhere."""

    def __init__(self, lazy: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.lazy = lazy

    def forward(self, obs: torch.Tensor) -> Any:
        where, wanted = obs[:, :2], obs[:, 2:4]
        above, aligned = where[:, 1:] < 3.0, (where[:, :1] - 2.5).abs() < 0.4
        entry = torch.tensor([2.5, 1.5]).expand_as(where)
        down = torch.cat([entry[:, :1], wanted[:, 1:]], -1)
        target = torch.where(above, torch.where(aligned, down, entry), wanted)
        action = torch.zeros_like(where) if self.lazy else (2 * (target - where)).clamp(-1, 1)
        return Always(action)


class Always:
    def __init__(self, action: torch.Tensor):
        self.action = action

    def mode(self) -> torch.Tensor:
        return self.action

    def sample(self) -> torch.Tensor:
        return self.action


def test_success_is_counted_with_its_interval() -> None:
    evaluator = Evaluator(MAZE, EvaluationConfig(episodes=8), seed=0)
    reached = evaluator(Known())
    assert reached.returns == [1.0] * 8 and max(reached.lengths) < 60
    low, high = wilson(8, 8)
    assert reached.extras == {"success": 1.0, "success, low": low, "success, high": high}
    stayed = evaluator(Known(lazy=True))
    assert stayed.extras["success"] == 0.0 and stayed.lengths == [60] * 8
    assert (
        "success"
        not in Evaluator(EnvConfig(id="esscher.envs:TwoGaps"), EvaluationConfig(episodes=2), 0)(
            Known()
        ).extras
    )


def test_success_of_the_step_that_ends_an_episode_is_told() -> None:
    envs = Environments(replace(MAZE, num=2), 0)
    obs = envs.reset(0)
    assert envs.spec.goal == (2, 3) and envs.spec.achieved == (0, 1)
    for step in range(60):
        outcome = envs.step(Known()(torch.from_numpy(obs)).mode(), step)
        assert outcome.success is not None
        assert np.array_equal(outcome.success, outcome.terminated)
        obs = outcome.obs
        if outcome.terminated.any():
            return
    pytest.fail("nobody arrived")


def test_a_maze_is_saved_in_the_middle_of_an_episode() -> None:
    def go(envs: Environments, obs: np.ndarray, steps: int) -> np.ndarray:
        for step in range(steps):
            obs = envs.step(Known()(torch.from_numpy(obs)).mode(), step).obs
        return obs

    envs = Environments(MAZE, 0)
    assert envs.inexact_because() is None
    obs = go(envs, envs.reset(0), 3)
    state = envs.state_dict()
    expected = go(envs, obs, 40)
    again = Environments(MAZE, 5)
    again.reset(0)
    again.load_state_dict(state)
    assert np.array_equal(go(again, obs, 40), expected)


# ---- errors


def test_a_goal_that_lies_elsewhere_is_refused() -> None:
    spec = Spec(obs_shape=(5,), action_shape=(2,), goal=(2, 3), achieved=(0, 1))
    assert observed_by(spec, GoalColumns((2, 3), (0, 1)), "none").state_dim == 3
    assert observed_by(spec, GoalColumns(), "none").goal_dim == 0, "no goals are asked for"
    with pytest.raises(UserError, match=r"goal is 3 4 .* --method.goal 2 3 --method.achieved 0 1"):
        observed_by(spec, GoalColumns((3, 4), (0, 1)), "none")
    with pytest.raises(UserError, match="goal names 3 entries of an observation and achieved 2"):
        observed_by(spec, GoalColumns((2, 3, 4), (0, 1)), "none")
    with pytest.raises(UserError, match=r"goal must be entries of an observation, in \[0, 5\)"):
        observed_by(spec, GoalColumns((4, 5), (0, 1)), "none")


@pytest.mark.parametrize("library", ["ogbench", "gymnasium_robotics"])
def test_without_the_simulator(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    told = rf'needs {library}: pip install "esscher\[mazes\]"'
    with pytest.raises(UserError, match=told):
        robot_task(f"{library}:pointmaze-medium-v0")
    with pytest.raises(UserError, match=told):
        make(EnvConfig(id=f"{library}:pointmaze-medium-v0"))


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"wandering": "navigat"}, "no wandering 'navigat': did you mean navigate"),
        ({"noise": -1.0}, r"noise must be in \[0, 2\], got -1.0"),
        ({"max_steps": 1}, "max_steps must be >= 2"),
        ({"colour": "red"}, "cannot be made"),
    ],
)
def test_bad_settings(kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        robot_task("toy_mazes:walk", kwargs=kwargs)


def test_a_body_that_nobody_can_move_and_images_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no expert"):
        robot_task("toy_mazes:statue").expert()
    with pytest.raises(UserError, match="takes no env.kwargs, got colour"):
        make(EnvConfig(id="ogbench:pointmaze-medium-v0", kwargs={"colour": 1}))
    with pytest.raises(UserError, match="has no images: leave out --images"):
        robot_task("ogbench:pointmaze-medium-v0", size=(64, 64))
    with pytest.raises(UserError, match="has no images"):
        robot_task("toy_mazes:walk").images()
    assert is_maze("ogbench:x") and not is_maze("metaworld:reach-v3") and Maze.metadata["goal"]
