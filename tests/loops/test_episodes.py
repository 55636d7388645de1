"""Whole episodes of a population, and what describes them."""

from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium import spaces

from esscher.adapters.descriptors import FeetContact, FinalPosition, with_descriptor
from esscher.adapters.episodes import EpisodeRunner
from esscher.adapters.gymnasium import make
from esscher.envs import PointMass
from esscher.errors import UserError
from esscher.experiment import EnvConfig


class Countdown(gymnasium.Env[Any, Any]):
    """Ends after round(10 a) steps of the first action a in [0, 1], each paying that many tenths."""

    observation_space = spaces.Box(-10, 10, (2,), np.float32)
    action_space = spaces.Box(0, 1, (1,), np.float32)
    descriptor_space = spaces.Box(0, 10, (1,), np.float32)
    describes = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first, self.time = float(self.np_random.uniform()), 0
        self.total = 0
        return np.array([self.first, 0], np.float32), {}

    def step(self, action):
        if not self.time:
            self.total = round(10 * float(action[0]))
        self.time += 1
        obs = np.array([self.first, self.time], np.float32)
        over = self.time >= self.total
        info = {"descriptor": np.array([self.total], np.float32)} if over and self.describes else {}
        return obs, self.total / 10, over, False, info


class Silent(Countdown):
    describes = False


class Broken(Countdown):
    def step(self, action):
        obs, reward, over, cut, info = super().step(action)
        return obs, float("nan") if self.time == 2 else reward, over, cut, info


def actions(values: list[float], obs: torch.Tensor) -> torch.Tensor:
    """Each individual does its own thing, in [-1, 1] for [0, 1]."""
    assert len(obs) == len(values)
    return 2 * torch.tensor(values)[:, None] - 1


def here(name: str, **changes: Any) -> EnvConfig:
    return EnvConfig(id=f"{__name__}:{name}", **changes)


@pytest.mark.parametrize("parallel", [False, True])
def test_each_individual_has_one_episode(parallel, monkeypatch):
    from esscher.adapters import episodes as module

    monkeypatch.setattr(module, "available_processors", lambda: 3)
    judge = EpisodeRunner(here("Countdown", parallel=parallel), seed=3)
    assert judge.spec.descriptor_low == (0.0,) and judge.spec.descriptor_high == (10.0,)
    found = judge(partial(actions, [0.3, 0.1, 0.2, 0.5]), 4, 7)
    judge.close()
    assert found.length.tolist() == [3, 1, 2, 5]
    assert found.fitness.tolist() == pytest.approx([0.9, 0.1, 0.4, 2.5])
    assert found.descriptor.tolist() == [[3], [1], [2], [5]]
    # Rows: an episode after the other, in the order of time.
    rows = found.transitions
    assert found.individual.tolist() == [0] * 3 + [1] + [2] * 2 + [3] * 5
    assert rows.obs[:, 1].tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 4]
    assert rows.next_obs[:, 1].tolist() == [1, 2, 3, 1, 1, 2, 1, 2, 3, 4, 5]
    assert torch.equal(rows.obs[:, 0], rows.next_obs[:, 0])
    assert rows.terminated.tolist() == [0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1]
    assert not rows.truncated.any()
    assert rows.action[:, 0].tolist() == pytest.approx([-0.4] * 3 + [-0.8] + [-0.6] * 2 + [0.0] * 5)
    firsts = [rows.obs[k, 0].item() for k in (0, 3, 4, 6)]
    assert len(set(firsts)) == 4, "each from a first state of its own"


def test_first_states_follow_from_seed_and_iteration():
    def firsts(seed: int, iteration: int) -> list[float]:
        judge = EpisodeRunner(here("Countdown"), seed)
        judge(partial(actions, [0.1] * 5), 5, 99)  # What was played before changes nothing.
        return judge(partial(actions, [0.1] * 3), 3, iteration).transitions.obs[:, 0].tolist()

    assert firsts(0, 5) == firsts(0, 5)
    assert firsts(0, 5) != firsts(0, 6) and firsts(0, 5) != firsts(1, 5)


def test_a_step_limit_truncates():
    judge = EpisodeRunner(here("Countdown", max_episode_steps=4), seed=0)
    with pytest.raises(UserError, match="at step 3 without"):
        judge(partial(actions, [0.2, 0.9]), 2, 0)
    judge = EpisodeRunner(EnvConfig(id="esscher.envs:PointMass"), seed=0, step_limit=10)
    found = judge(lambda obs: torch.zeros(2, 2), 2, 0)
    assert found.length.tolist() == [10, 10]
    assert found.transitions.truncated.nonzero().flatten().tolist() == [9, 19]
    assert not found.transitions.terminated.any()


def test_one_sentence_for_what_is_wrong():
    with pytest.raises(UserError, match=r"step 0 without info\[\"descriptor\"\] of 1 numbers"):
        EpisodeRunner(here("Silent"), 0)(partial(actions, [0.1]), 1, 0)
    with pytest.raises(
        UserError, match="a reward that is not finite at step 1 .* individual 1: nan"
    ):
        EpisodeRunner(here("Broken"), 0)(partial(actions, [0.1, 0.4]), 2, 0)
    with pytest.raises(UserError, match="action is not finite"):
        EpisodeRunner(here("Countdown"), 0)(lambda obs: obs[:, :1] * torch.nan, 1, 0)
    assert EpisodeRunner(EnvConfig(id="Pendulum-v1"), 0).spec.descriptor_low == ()


def test_the_point_mass_by_hand_and_as_one():
    """Its vectorised form, which the runner takes, against copies of the other."""
    judge = EpisodeRunner(EnvConfig(id="esscher.envs:PointMass"), seed=0)
    assert type(judge._copies).__name__ == "_Vector"
    aims = torch.tensor([[0.8, -0.4], [0.0, 0.0], [1.0, 1.0], [-0.5, 0.25]])
    found = judge(lambda obs: aims, 4, 0)
    for k, (x, y) in enumerate(aims.tolist()):
        assert found.fitness[k].item() == pytest.approx(25 - 25 * (x * x + y * y) / 2, abs=1e-4)
        place = [min(25 * 0.045 * x, 1), min(25 * 0.045 * y, 1)]
        assert found.descriptor[k].tolist() == pytest.approx(place, abs=1e-5)
        env = PointMass()
        obs, _ = env.reset(seed=0)
        for time, row in enumerate(range(25 * k, 25 * k + 25)):
            torch.testing.assert_close(found.transitions.obs[row], torch.from_numpy(obs))
            assert obs[2] == pytest.approx(time / 25)
            obs, reward, terminated, truncated, info = env.step(np.array([x, y], np.float32))
            assert found.transitions.reward[row].item() == pytest.approx(reward, abs=1e-6)
            assert terminated == (time == 24) == found.transitions.terminated[row].item()
            assert not truncated
        np.testing.assert_allclose(info["descriptor"], found.descriptor[k], atol=1e-6)


# ---- MuJoCo's bodies


def test_feet_are_down_as_often_as_contacts_say():
    env = make(with_descriptor(EnvConfig(id="HalfCheetah-v5"), "feet_contact", 1.0))
    assert isinstance(env.unwrapped, gymnasium.Env)
    unwrapped: Any = env.unwrapped
    draw = np.random.default_rng(0)
    for _ in range(2):  # The count begins anew.
        env.reset(seed=1)
        down = np.zeros(2)
        for time in range(1, 61):
            action = draw.uniform(-1, 1, 6).astype(np.float32)
            _, _, _, _, info = env.step(action)
            names = set()
            for k in range(unwrapped.data.ncon):
                contact = unwrapped.data.contact[k]
                pair = {
                    mujoco.mj_id2name(unwrapped.model, mujoco.mjtObj.mjOBJ_GEOM, g)
                    for g in (contact.geom1, contact.geom2)
                }
                if "floor" in pair:
                    names |= pair
            down += ["bfoot" in names, "ffoot" in names]
            np.testing.assert_allclose(info["descriptor"], down / time, atol=1e-6)
        assert down.min() > 0 and down.max() < 60


@pytest.mark.parametrize(
    ("name", "feet"), [("Ant-v5", 4), ("Walker2d-v5", 2), ("Hopper-v5", 1), ("HalfCheetah-v5", 2)]
)
def test_bodies_with_feet(name, feet):
    env = make(with_descriptor(EnvConfig(id=name), "feet_contact", 1.0))
    space = env.get_wrapper_attr("descriptor_space")
    assert space.shape == (feet,) and (space.low == 0).all() and (space.high == 1).all()


def test_where_an_ant_ends():
    env = make(
        with_descriptor(EnvConfig(id="Ant-v5", max_episode_steps=30), "final_position", 12.0)
    )
    assert env.get_wrapper_attr("descriptor_space").high.tolist() == [12.0, 12.0]
    env.reset(seed=0)
    unwrapped: Any = env.unwrapped
    truncated = False
    while not truncated:
        _, _, _, truncated, info = env.step(np.ones(8, np.float32))
    assert info["descriptor"].tolist() == pytest.approx(
        [info["x_position"], info["y_position"]], abs=1e-6
    )
    assert info["descriptor"][0] == pytest.approx(unwrapped.data.body("torso").xpos[0], abs=0.1)
    assert np.abs(info["descriptor"]).max() > 0.01


def test_tasks_that_cannot_be_described():
    with pytest.raises(UserError, match="not MuJoCo's"):
        FinalPosition(gymnasium.make("Pendulum-v1"), 1.0)
    with pytest.raises(UserError, match="not MuJoCo's"):
        FeetContact(gymnasium.make("Pendulum-v1"))
    with pytest.raises(UserError, match="none of them is here"):
        FeetContact(gymnasium.make("Swimmer-v5"))
