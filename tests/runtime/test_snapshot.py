"""An environment put back into a fresh one goes on bit for bit."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from esscher.adapters.gymnasium import Environments, make
from esscher.adapters.snapshot import SnapshotWrapper, put, take
from esscher.experiment import EnvConfig

STEPS = 50
TASKS = {
    # Episodes end soon after the snapshot, so that a reset is crossed: (id, limit, taken at).
    "Pendulum-v1": (40, 23),
    "CartPole-v1": (None, 17),
    "MountainCarContinuous-v0": (45, 31),
    "HalfCheetah-v5": (40, 27),
    "Humanoid-v5": (None, 11),
    "Ant-v5": (30, 19),
    "toys:Tricky": (None, 13),
    "toys:OwnState": (None, 3),
    "toys:Countdown": (None, 7),
    "toys:Mixed": (None, 7),
}


def follow(env: gymnasium.Env, actions: list[Any]) -> list[Any]:
    trace = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        trace.append((np.asarray(obs).tobytes(), float(reward), bool(terminated), bool(truncated)))
        if terminated or truncated:
            trace.append(np.asarray(env.reset()[0]).tobytes())
    return trace


@pytest.mark.parametrize("task", TASKS)
def test_a_fresh_environment_goes_on_exactly(task: str) -> None:
    limit, at = TASKS[task]
    config = EnvConfig(id=task, max_episode_steps=limit)
    original, fresh = make(config), make(config)
    original.action_space.seed(1)
    original.reset(seed=7)
    actions = [original.action_space.sample() for _ in range(at + STEPS)]
    follow(original, actions[:at])
    snapshot = take(original)
    fresh.reset(seed=99)
    follow(fresh, actions[40:45])
    put(fresh, snapshot)
    continued, restored = follow(original, actions[at:]), follow(fresh, actions[at:])
    assert continued == restored
    assert len(continued) > STEPS, "the comparison must cross a reset"


def test_a_snapshot_is_not_touched_by_what_happens_later() -> None:
    env = make(EnvConfig(id="toys:Tricky"))
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(5)]
    snapshot = take(env)
    first = follow(env, actions)
    for _ in range(2):
        put(env, snapshot)
        assert follow(env, actions) == first


@pytest.mark.parametrize("parallel", [False, True])
def test_copies_go_on_exactly(parallel: bool) -> None:
    import torch

    config = EnvConfig(id="toys:Countdown", num=3, parallel=parallel)
    action = torch.linspace(-1, 1, 3).unsqueeze(-1)

    def steps(envs: Environments, count: int) -> list[Any]:
        outcomes = [envs.step(action, 0) for _ in range(count)]
        return [
            (o.obs.tolist(), o.reward.tolist(), o.truncated.tolist(), o.episodes) for o in outcomes
        ]

    first, second = Environments(config, 0), Environments(config, 0)
    assert first.inexact_because() is None
    first.reset(0)
    steps(first, 8)
    state = first.state_dict()
    second.reset(3)
    steps(second, 2)
    second.load_state_dict(state)
    assert steps(first, 20) == steps(second, 20)
    first.close(), second.close()


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ("toys:Opaque", "Opaque.dice is a Dice"),
        ("toys:OpaqueLater", "OpaqueLater.dice is a Dice"),
        ("toys:View", "View.part shares memory"),
        ("toys:Randomised", "changes its MuJoCo model"),
        ("toys:randomised_by_name", "RandomState"),
    ],
)
def test_what_cannot_be_saved_says_why(env: str, reason: str) -> None:
    envs = Environments(EnvConfig(id=env, num=2), 0)
    assert reason in str(envs.inexact_because())


@pytest.mark.parametrize("env", ["toys:Clocked"])
def test_state_with_the_name_of_a_renderer_is_saved(env: str) -> None:
    original, fresh = make(EnvConfig(id=env)), make(EnvConfig(id=env))
    original.reset(seed=0), fresh.reset(seed=0)
    zero = np.zeros(1, np.float32)
    follow(original, [zero] * 3)
    put(fresh, take(original))
    assert follow(original, [zero] * 3) == follow(fresh, [zero] * 3)


def test_normalising_wrappers_are_reported() -> None:
    env = gymnasium.wrappers.NormalizeObservation(gymnasium.make("Pendulum-v1"))
    assert "RunningMeanStd" in str(SnapshotWrapper(env).unsupported_reason)


def test_no_code_is_in_a_snapshot() -> None:
    import torch

    env = make(EnvConfig(id="HalfCheetah-v5"))
    env.reset(seed=0)
    for name, value in take(env).items():
        assert isinstance(value, str if name == "plain" else torch.Tensor), name


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Humanoid-v5"])
def test_mujocos_data_are_restored_where_its_python_cannot_copy_them(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mujoco

    monkeypatch.delattr(mujoco, "mj_copyData", raising=False)
    original, fresh = make(EnvConfig(id=task)), make(EnvConfig(id=task))
    original.action_space.seed(1)
    original.reset(seed=7)
    actions = [original.action_space.sample() for _ in range(30)]
    follow(original, actions[:11])
    snapshot = take(original)
    fresh.reset(seed=99)
    follow(fresh, actions[20:25])
    data = original.unwrapped.data
    put(fresh, snapshot)
    for name in ("qpos", "qvel", "act", "ctrl", "xpos", "cfrc_ext", "qacc_warmstart", "cinert"):
        assert np.array_equal(getattr(fresh.unwrapped.data, name), getattr(data, name)), name
    assert fresh.unwrapped.data.time == data.time > 0
    assert follow(original, actions[11:]) == follow(fresh, actions[11:])
