"""The mazes of OGBench and Gymnasium-Robotics themselves, where they are installed."""

import numpy as np
import pytest
import torch

from esscher.adapters.gymnasium import Environments, make
from esscher.adapters.mazes import MazeTask, simulator_of, towards
from esscher.adapters.robots import robot_task
from esscher.errors import UserError
from esscher.experiment import EnvConfig

POINTS = ("ogbench:pointmaze-medium-v0", "gymnasium_robotics:PointMaze_UMaze-v3")
ANTS = ("ogbench:antmaze-medium-v0", "gymnasium_robotics:AntMaze_UMaze-v5")


def installed(name: str) -> str:
    pytest.importorskip(name.partition(":")[0], reason='pip install "esscher[mazes]"')
    return name


def played(name: str, seed: int, steps: int) -> list[np.ndarray]:
    task = robot_task(installed(name))
    task.reset(seed)
    states = [task.state()]
    for _ in range(steps):
        task.step(task.expert())
        states.append(task.state())
    task.close()
    return states


@pytest.mark.parametrize("name", [*POINTS, "ogbench:pointmaze-teleport-v0"])
def test_an_episode_follows_from_its_seed_whatever_numpy_draws(name: str) -> None:
    generator = np.random.default_rng(0)
    first = played(name, 4, 400)
    np.random.seed(int(generator.integers(100)))
    assert np.array_equal(first, played(name, 4, 400))
    assert not np.array_equal(first, played(name, 5, 400))


@pytest.mark.parametrize("name", POINTS)
def test_the_expert_reaches_goals_and_they_are_replaced(name: str) -> None:
    goals = 0.0
    for seed in range(3):
        task = robot_task(installed(name))
        task.reset(seed)
        for _ in range(task.max_steps):
            wanted = task.state()[2:4]
            outcome = task.step(task.expert())
            goals += outcome.reward
            assert outcome.reward == 0 or not np.array_equal(task.state()[2:4], wanted)
            assert not outcome.terminated
        assert outcome.truncated
    assert goals >= 6


def test_the_way_is_that_of_ogbenchs_oracle() -> None:
    simulator = simulator_of(installed("ogbench:pointmaze-large-v0"))
    env, walls = simulator._env, simulator.walls  # type: ignore[attr-defined]
    cells = [tuple(map(int, cell)) for cell in np.argwhere(~walls)]
    for start in cells[::3]:
        for goal in cells[::4]:
            here, there = (np.array(env.ij_to_xy(cell)) for cell in (start, goal))
            expected, _ = env.get_oracle_subgoal(here, there)
            assert env.xy_to_ij(expected) == towards(walls, start, goal)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*POINTS, *ANTS])
def test_evaluation_asks_for_the_benchmarks_goals(name: str) -> None:
    env = make(EnvConfig(id=installed(name)))
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert np.array_equal(obs, env.reset(seed=0)[0]) and not np.array_equal(
        obs, env.reset(seed=1)[0]
    )
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    env.close()


@pytest.mark.parametrize("name", [*POINTS, ANTS[0]])
def test_an_interrupted_episode_goes_on_bit_for_bit(name: str) -> None:
    def go(envs: Environments, steps: int) -> np.ndarray:
        torch.manual_seed(0)
        return np.stack([envs.step(envs.random_actions(), step).obs for step in range(steps)])

    envs = Environments(EnvConfig(id=installed(name)), 0)
    envs.reset(0)
    assert envs.inexact_because() is None
    go(envs, 5)
    state = envs.state_dict()
    expected = go(envs, 30)
    again = Environments(EnvConfig(id=name), 9)
    again.reset(0)
    again.load_state_dict(state)
    assert np.array_equal(go(again, 30), expected)


@pytest.mark.parametrize("name", ANTS)
def test_ants_have_no_expert(name: str) -> None:
    with pytest.raises(UserError, match=r"has no expert: .*esscher data collect RUN"):
        task = robot_task(installed(name))
        assert isinstance(task, MazeTask)
        task.expert()


def test_unknown_mazes() -> None:
    installed(POINTS[0])
    with pytest.raises(
        UserError, match="no maze 'pointmaze-midium-v0': did you mean pointmaze-med"
    ):
        robot_task("ogbench:pointmaze-midium-v0")
    installed(POINTS[1])
    with pytest.raises(UserError, match="no maze 'PointMaze_Umaze-v3': did you mean PointMaze_UM"):
        make(EnvConfig(id="gymnasium_robotics:PointMaze_Umaze-v3"))
