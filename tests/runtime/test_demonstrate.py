"""Collecting demonstrations: what is kept, what noise does, and going on after a stop."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import toy_robots
from esscher.adapters.data import load_dataset
from esscher.adapters.lerobot import read_scenes
from esscher.adapters.robots import robot_task
from esscher.cli import run_command
from esscher.errors import UserError
from esscher.runtime.collect import COLLECT
from esscher.runtime.demonstrate import Plan, demonstrate
from esscher.runtime.rng import mix

PLAN = Plan(tasks=("toy_robots:drive", "toy_robots:stop"), episodes=3, images=(6, 8))


def test_a_set_of_two_tasks_follows_from_the_tasks(tmp_path: Path) -> None:
    told = demonstrate(PLAN, str(tmp_path / "set"), display=False)
    data = read_scenes(str(tmp_path / "set"))
    assert data.spec.instructions == ("drive", "stop")
    assert data.spec.tasks == ("toy_robots:drive", "toy_robots:stop")
    assert data.task.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.lengths().tolist() == told.lengths and told.solved == 6 and told.dropped == 0
    # Steps are rewarded by -1, -2, ...: the sum over an episode says how long it was.
    assert told.returns == [-n * (n + 1) / 2 for n in told.lengths]
    # Where the box is symmetric about 0 and 2 wide to each side, an action moves by 0.2 of itself.
    inside = (data.episode[1:] == data.episode[:-1]).numpy()
    moved = np.diff(data.state.numpy()[:, 0])[inside]
    assert np.allclose(moved, 0.2 * data.action.numpy()[:-1, 0][inside], atol=1e-6)
    first = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert first["fps"] == 20 and first["total_episodes"] == 6


def test_the_images_are_of_the_moment_before_the_action(tmp_path: Path) -> None:
    plan = replace(PLAN, tasks=("toy_robots:drive",), episodes=1)
    demonstrate(plan, str(tmp_path / "set"), display=False)
    data = read_scenes(str(tmp_path / "set"))
    task = robot_task("toy_robots:drive")
    task.reset(mix(plan.seed, COLLECT, 0) % 2**31)
    for row in range(len(data)):
        assert np.array_equal(data.images[row].numpy(), task.images())
        assert np.array_equal(data.state[row].numpy(), task.state())
        task.step(np.asarray(task.expert(), np.float32))


def test_failures_are_left_out_and_counted_unless_they_are_wanted(tmp_path: Path) -> None:
    plan = replace(PLAN, tasks=("toy_robots:lazy",), episodes=6)
    told = demonstrate(plan, str(tmp_path / "few"), display=False)
    assert told.dropped > 0 and told.solved == 6 and len(told.lengths) == 6
    data = read_scenes(str(tmp_path / "few"))
    assert data.provenance["dropped"] == told.dropped and data.provenance["successes"] == 6
    everything = replace(plan, keep_failures=True)
    told = demonstrate(everything, str(tmp_path / "all"), display=False)
    assert told.dropped == 0 and 0 < told.solved < 6
    assert 25 in told.lengths, "an attempt that fails lasts to its limit"


def test_noise_moves_the_robot_and_not_what_is_recorded(tmp_path: Path) -> None:
    plan = replace(PLAN, tasks=("toy_robots:drive",), noise=0.2)
    demonstrate(plan, str(tmp_path / "set"), display=False)
    data = read_scenes(str(tmp_path / "set"))
    inside = (data.episode[1:] == data.episode[:-1]).numpy()
    moved = np.diff(data.state.numpy()[:, 0])[inside]
    expected = 0.2 * data.action.numpy()[:-1, 0][inside]
    off = (moved - expected) / 0.2
    assert 0.1 < off.std() < 0.3, "the deviation of the noise, where the box is [-1, 1]"
    # The first action is the expert's own, of the place where it began: the noise came after it.
    quiet = replace(plan, noise=0.0)
    demonstrate(quiet, str(tmp_path / "quiet"), display=False)
    other = read_scenes(str(tmp_path / "quiet"))
    assert np.array_equal(data.action[0], other.action[0])
    assert not np.array_equal(data.action[1], other.action[1])


def test_a_stopped_collection_goes_on_to_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demonstrate(PLAN, str(tmp_path / "whole"), display=False)
    whole = read_scenes(str(tmp_path / "whole"))
    steps = toy_robots.Point.step
    resets: list[int] = []

    def breaks(self: toy_robots.Point, action: np.ndarray) -> object:
        resets.append(1)
        if len(resets) > 60:
            raise KeyboardInterrupt
        return steps(self, action)

    monkeypatch.setattr(toy_robots.Point, "step", breaks)
    with pytest.raises(KeyboardInterrupt):
        demonstrate(PLAN, str(tmp_path / "set"), display=False)
    assert not (tmp_path / "set").exists()
    finished = list((tmp_path / ".set.collecting").glob("*.npz"))
    assert finished and len(finished) < 6
    before = {path: path.stat().st_mtime_ns for path in finished}
    with pytest.raises(UserError, match=r"was begun with noise 0.0, not 0.1: go on with that"):
        demonstrate(replace(PLAN, noise=0.1), str(tmp_path / "set"), display=False)
    monkeypatch.setattr(toy_robots.Point, "step", steps)
    played: list[int] = []
    resetting = toy_robots.Point.reset
    monkeypatch.setattr(
        toy_robots.Point, "reset", lambda self, seed: played.append(seed) or resetting(self, seed)
    )
    demonstrate(PLAN, str(tmp_path / "set"), display=False)
    assert len([seed for seed in played if seed]) == 6 - len(before), (
        "finished ones are not repeated"
    )
    resumed = read_scenes(str(tmp_path / "set"))
    assert resumed.digest() == whole.digest()
    assert not (tmp_path / ".set.collecting").exists()


def test_states_alone_become_a_minari_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    looked = toy_robots.Point.images
    monkeypatch.setattr(toy_robots.Point, "images", lambda self: pytest.fail("nobody asked"))
    plan = replace(PLAN, tasks=("toy_robots:drive",), images=None)
    told = demonstrate(plan, "drive/expert-v0", display=False)
    data = load_dataset("minari:drive/expert-v0", None)
    assert len(data) == told.steps and len(data.ends()) == 3
    assert not data.transitions.terminated.any(), "solving it ended the recording, not the task"
    monkeypatch.setattr(toy_robots.Point, "images", looked)
    demonstrate(replace(plan, images=(6, 8)), str(tmp_path / "seen"), display=False)
    assert np.array_equal(read_scenes(str(tmp_path / "seen")).state, data.transitions.obs)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": (7, 8)}, "has images of 6 x 8, not 7 x 8"),
        ({"cameras": ("top",)}, "sees by front, hand, not by top"),
        (
            {"tasks": ("toy_robots:drive", "toy_robots:wide")},
            "do not fit in one set: state_dim is 3",
        ),
        (
            {"tasks": ("toy_robots:drive", "toy_robots:lazy")},
            "two tasks have one instruction: drive",
        ),
        ({"tasks": ("toy_robots:missing",)}, "cannot be imported"),
        ({"kwargs": {"colour": "red"}}, "cannot be made"),
        ({"kwargs": {"max_steps": 2}, "tasks": ("toy_robots:drive",)}, "solved 0 of 29 attempts"),
    ],
)
def test_bad_plans_are_refused(tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        demonstrate(replace(PLAN, **changes), str(tmp_path / "set"), display=False)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"episodes": 0}, "--episodes must be >= 1"),
        ({"noise": -0.1}, "--noise must be in"),
        ({"tasks": ("a:b", "a:b")}, "named twice"),
        ({"images": None}, "a set of states holds one task"),
        ({"images": None, "tasks": ("a:b",), "cameras": ("x",)}, "--cameras are of images"),
    ],
)
def test_plans_out_of_range(changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        replace(PLAN, **changes)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists: choose another --out"):
        demonstrate(PLAN, str(tmp_path), display=False)


# ---- tasks by name


def test_an_environment_of_gymnasiums() -> None:
    task = robot_task("toy_robots:room", cameras=("right",))
    task.reset(0)
    assert (task.instruction, task.max_steps, task.image_size) == ("go right", 9, (4, 4))
    assert task.images().shape == (1, 4, 4, 3) and int(task.images()[0, 0, 0, 0]) == 100
    outcomes = [task.step(task.expert()) for _ in range(4)]
    assert [o.success for o in outcomes] == [False, False, False, True]
    assert task.state().tolist() == [2.0] and int(task.images()[0, 0, 0, 0]) == 120
    assert [task.step(np.array([-9.0])).truncated for _ in range(5)] == [False] * 4 + [True]
    assert task.state().tolist() == [-0.5], "actions are clipped to the box"
    assert robot_task("toy_robots:room").cameras == ("left", "right")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "reach-v3",
            "no task 'reach-v3': give metaworld:TASK, ogbench:MAZE, gymnasium_robotics:MAZE",
        ),
        ("toy_robots:unfinished", "returned a Half without instruction, cameras"),
        ("toy_robots:flat", "must observe a dictionary with images and a box `state`"),
        ("toy_robots:floats", "must have uint8 images"),
    ],
)
def test_tasks_that_are_none(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        robot_task(name)


def test_a_task_that_does_not_say_whether_it_is_solved() -> None:
    task = robot_task("toy_robots:room", kwargs={"told": False})
    task.reset(0)
    with pytest.raises(UserError, match="does not say info"):
        task.step(task.expert())
    with pytest.raises(UserError, match="no camera 'lift': did you mean left"):
        robot_task("toy_robots:room", cameras=("lift",))


def test_demonstrations_of_one_task_need_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["data", "collect", "toy_robots:drive", "--episodes", "1", "--images", "6", "8"]
    assert run_command(line) == 0
    assert (tmp_path / "data/drive/meta/info.json").exists()
    assert run_command(["data", "collect", "toy_robots:drive", "--episodes", "1"]) == 2
    assert "give --out, the name of a new Minari set" in capsys.readouterr().err
    assert run_command([*line[:3], "toy_robots:stop", *line[3:]]) == 2
    assert "give --out, a new folder" in capsys.readouterr().err
