"""Meta-World's tasks; all but the errors need the library, and pictures need a way to draw."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esscher.adapters import metaworld
from esscher.adapters.robots import robot_task
from esscher.errors import UserError

INSTALLED = importlib.util.find_spec("metaworld") is not None
needs_metaworld = pytest.mark.skipif(
    not INSTALLED, reason='Meta-World is not installed: pip install "esscher[robots]"'
)


def drawn(task: metaworld.MetaWorldTask) -> np.ndarray:
    try:
        return task.images()
    except UserError as error:
        pytest.skip(f"nothing can be drawn here: {error}")


@pytest.mark.parametrize(
    ("task", "instruction"),
    [
        ("reach-v3", "reach"),
        ("button-press-topdown-v3", "button press topdown"),
        ("drawer-close-v12", "drawer close"),
    ],
)
def test_the_instruction_is_the_words_of_the_name(task: str, instruction: str) -> None:
    assert metaworld.instruction_of(task) == instruction


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(UserError, match=r'needs metaworld: pip install "esscher\[robots\]"'):
        robot_task("metaworld:reach-v3")


@needs_metaworld
def test_unknown_names() -> None:
    with pytest.raises(UserError, match="no task 'reech-v3': did you mean reach-v3"):
        robot_task("metaworld:reech-v3")
    with pytest.raises(UserError, match="no camera 'corner9': did you mean corner"):
        robot_task("metaworld:reach-v3", cameras=("corner9",))
    with pytest.raises(UserError, match=r"max_steps must be in \[1, 500\], got 501"):
        robot_task("metaworld:reach-v3", kwargs={"max_steps": 501})
    with pytest.raises(UserError, match="cannot be made"):
        robot_task("metaworld:reach-v3", kwargs={"colour": "red"})


@needs_metaworld
@pytest.mark.parametrize("name", ["reach-v3", "button-press-topdown-v3", "drawer-close-v3"])
def test_experts_solve_their_tasks_and_seeds_decide(name: str) -> None:
    def play(task: metaworld.MetaWorldTask, seed: int) -> list[bytes]:
        task.reset(seed)
        trace = [task.state().tobytes()]
        for _ in range(100):
            outcome = task.step(task.expert())
            trace.append(task.state().tobytes())
            if outcome.success:
                return trace
        pytest.fail("not solved within 100 steps")

    task = metaworld.MetaWorldTask(name, full_state=True)
    first = play(task, 5)
    assert play(task, 6) != first
    assert play(task, 5) == first, "an episode follows from its seed alone"
    assert play(metaworld.MetaWorldTask(name, full_state=True), 5) == first


@needs_metaworld
def test_states() -> None:
    hand, full = (metaworld.MetaWorldTask("reach-v3", full_state=f) for f in (False, True))
    for task in (hand, full):
        task.reset(3)
    assert (hand.state_dim, full.state_dim) == (4, 39)
    assert np.array_equal(hand.state(), full.state()[:4])
    goal = full._env._target_pos
    assert np.allclose(full.state()[-3:], goal) and np.abs(goal).sum() > 0.5
    # Of reach, success is a distance of the gripper to the goal of at most 5 cm.
    for _ in range(100):
        if hand.step(hand.expert()).success:
            break
    assert np.linalg.norm(hand._env.tcp_center - goal) <= 0.05
    limited = metaworld.MetaWorldTask("reach-v3", max_steps=3)
    limited.reset(0)
    truncated = [limited.step(np.zeros(4, np.float32)).truncated for _ in range(3)]
    assert truncated == [False, False, True]


@needs_metaworld
def test_images_are_upright_and_show_the_goal_at_once() -> None:
    cameras = ("close", "corner2")
    task = metaworld.MetaWorldTask("reach-v3", cameras=cameras, size=(48, 64))
    task.reset(0)
    before = drawn(task)
    assert before.shape == (2, 48, 64, 3) and before.dtype == np.uint8
    for image in before:
        # The table is of brown wood, and is below the wall, which is grey.
        assert (
            np.ptp(image[2].astype(int), axis=-1).mean()
            < np.ptp(image[30].astype(int), axis=-1).mean()
        )
    assert np.array_equal(task.images(), before), "looking changes nothing"
    task.step(task.expert())
    moved = task.images()
    assert not np.array_equal(moved, before)
    task.reset(0)
    assert np.array_equal(task.images(), before), "the goal is where this episode has it"
    task.reset(1)
    assert not np.array_equal(task.images(), before)
    task.close()


@needs_metaworld
@pytest.mark.parametrize("chosen", ["", "nonsense"])
def test_where_nothing_can_be_drawn(chosen: str) -> None:
    if not chosen and os.environ.get("DISPLAY"):
        pytest.skip("there is a display, where no MUJOCO_GL is needed")
    code = (
        "from esscher.adapters.robots import robot_task; from esscher.errors import UserError\n"
        "try: robot_task('metaworld:reach-v3').images()\n"
        "except UserError as error: print('told:', error)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    env |= {"MUJOCO_GL": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "told: images cannot be drawn here" in done.stdout, done.stderr
    for word in ("MUJOCO_GL=osmesa", "libosmesa6", "MUJOCO_GL=egl", "libegl1"):
        assert word in done.stdout
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


@needs_metaworld
def test_collected_and_read_back(tmp_path: Path) -> None:
    from esscher.adapters.lerobot import read_scenes
    from esscher.runtime.demonstrate import Plan, demonstrate

    drawn(metaworld.MetaWorldTask("reach-v3"))
    plan = Plan(tasks=("metaworld:reach-v3",), episodes=2, images=(32, 32))
    told = demonstrate(plan, str(tmp_path / "set"), display=False)
    data = read_scenes(str(tmp_path / "set"))
    assert told.solved == 2 and data.spec.instructions == ("reach",)
    assert data.spec.tasks == ("metaworld:reach-v3",) and data.spec.action_low == (-1.0,) * 4
    assert data.images.shape == (told.steps, 1, 32, 32, 3) and data.spec.state_dim == 4
    # Played again from the data alone: the same actions lead through the same states.
    from esscher.runtime.collect import COLLECT
    from esscher.runtime.rng import mix

    task = robot_task("metaworld:reach-v3")
    task.reset(mix(plan.seed, COLLECT, 0) % 2**31)
    for row in range(told.lengths[0]):
        assert np.array_equal(task.state(), data.state[row].numpy())
        outcome = task.step(data.action[row].numpy())
    assert outcome.success
