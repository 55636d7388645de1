"""Robots that see: what is held out, how episodes are judged, and what a user gets."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import esscher
from esscher.errors import UserError
from esscher.experiment import EvaluationConfig, RobotConfig
from esscher.methods.robots import discrete_diffusion_vla as vla
from esscher.runtime.device import Runtime
from esscher.runtime.robots import RobotWorld, _divided, wilson
from esscher.runtime.run import resume
from esscher.scenes import RoundObstacle, few_round_obstacle

TASK = "esscher.scenes:RoundObstacle"


def experiment(**options) -> esscher.Experiment:
    return replace(vla.smoke(), **options)


class Scripted(torch.nn.Module):
    """Flies what a plan of the scenes' starts says, or away from where it should."""

    evaluations, executed = 1, 8

    def __init__(self, plan: bool, executed: int = 8):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.plan, self.executed = plan, executed
        self.looked: list[torch.Tensor] = []

    def chunk(self, scenes):
        self.looked.append(scenes.state)
        chunks = []
        for image, state in zip(scenes.images, scenes.state, strict=True):
            task = RoundObstacle()
            task.start = state.numpy().astype(float)
            red = image[0, :, :, 0].float()
            y = 1 - (torch.arange(16) + 0.5) / 16 * 2
            task.height = float((red.sum(1) * y).sum() / red.sum())
            away = np.tile([-0.5, 0.0], (8, 1))
            chunks.append(task.plan(1.0) if self.plan else away)
        return torch.tensor(np.stack(chunks), dtype=torch.float32)


class Method:
    def __init__(self, policy):
        self.policy, self.cfg = policy, vla.smoke().method


@pytest.mark.parametrize("plan, rate", [(True, 1.0), (False, 0.0)])
def test_a_policy_that_knows_the_way_solves_every_episode_and_one_that_does_not_none(plan, rate):
    world = RobotWorld(experiment(evaluation=EvaluationConfig(episodes=20)), Runtime())
    found = world.evaluate(Method(Scripted(plan)), 0)
    world.close()
    low, high = wilson(int(20 * rate), 20)
    assert found.measure == "success rate"
    assert found.returns == [rate] * 20
    assert found.extras[f"success of {TASK}"] == rate
    assert found.extras[f"success of {TASK}, low"] == low
    assert found.extras[f"success of {TASK}, high"] == high
    assert found.milliseconds is not None and "milliseconds" not in found.to_json()


def test_a_policy_looks_once_a_chunk_and_acts_with_its_eyes_closed():
    world = RobotWorld(experiment(evaluation=EvaluationConfig(episodes=3)), Runtime())
    policy = Scripted(True, executed=4)
    world.data = None
    world.evaluate(Method(policy), 0)
    world.close()
    assert [len(states) for states in policy.looked] == [3, 3]
    moved = (policy.looked[1] - policy.looked[0]).norm(dim=-1)
    assert (moved > 0.3).all()


def test_the_interval_is_wilsons():
    z, n, p = 1.959964, 10, 0.8
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert wilson(8, 10) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_actions_are_compared_with_those_of_episodes_that_were_held_out():
    world = RobotWorld(experiment(stages=(_without_tasks(),)), Runtime())
    assert world.data is not None
    learned, held_out = world.data
    assert (learned.num_episodes, held_out.num_episodes) == (45, 5)
    found = world.evaluate(Method(Scripted(True)), 0)
    assert found.measure == "negative action error"
    # The expert flies either side; the script one side only, from the start of an episode only.
    assert 0.05 < -found.mean < 1


def _without_tasks():
    stage = vla.smoke().stages[-1]
    return replace(stage, data=f"{__name__}:nowhere")


def nowhere():
    """The demonstrations, which do not say where they were made."""
    data = few_round_obstacle()
    return replace(data, spec=replace(data.spec, tasks=("",)))


def test_each_instruction_keeps_an_episode_to_learn_from():
    data = few_round_obstacle().of_episodes(range(6))
    spec = replace(data.spec, instructions=("left", "right"), tasks=("", ""))
    data = replace(data, spec=spec, task=torch.tensor([0, 0, 0, 0, 0, 1]))
    learned, held_out = _divided(data, 0.5, seed=0)
    assert learned.task.tolist().count(1) == 1
    assert sorted([learned.num_episodes, held_out.num_episodes]) == [2, 4] or (
        learned.num_episodes + held_out.num_episodes == 6
    )
    assert torch.equal(
        torch.cat([learned.state, held_out.state]).sort(0).values, data.state.sort(0).values
    )
    whole, same = _divided(data, 0.0, seed=0)
    assert whole is data and same is data


class Wider(RoundObstacle):
    state_dim = 3


def test_a_task_that_shows_something_else_is_refused():
    stage = vla.smoke().stages[-1]
    stage = replace(stage, robot=RobotConfig(tasks=(f"{__name__}:Wider",)))
    world = RobotWorld(experiment(stages=(stage,)), Runtime())
    with pytest.raises(UserError, match="state numbers 3, and the demonstrations have 2"):
        world.evaluate(Method(Scripted(True)), 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robot") / "run"
    esscher.run(experiment(), directory=folder, display=False)
    return folder


def test_a_user_hands_over_pictures_and_words_and_gets_actions_in_the_tasks_units(finished):
    robot = esscher.load(finished).policy
    task = RoundObstacle()
    task.reset(5)
    told = task.images()[0], task.state(), task.instruction
    chunk = robot.act(*told)
    assert chunk.shape == (8, 2) and chunk.dtype == np.float32
    assert (np.abs(chunk) <= 1).all()
    np.testing.assert_array_equal(robot.act({"above": told[0]}, *told[1:]), chunk)
    assert (robot.act(*told, seed=1) != chunk).any()


@pytest.mark.parametrize(
    "image, state, told",
    [
        (np.zeros((16, 16, 3), np.float32), np.zeros(2), r"must be 16x16x3 bytes .* float32"),
        (np.zeros((8, 16, 3), np.uint8), np.zeros(2), r"must be 16x16x3 bytes .* 8x16x3"),
        ({"below": np.zeros((16, 16, 3), np.uint8)}, np.zeros(2), "no image of the camera above"),
        (np.zeros((16, 16, 3), np.uint8), np.zeros(3), "state must be 2 finite numbers"),
        (np.zeros((16, 16, 3), np.uint8), np.full(2, np.nan), "state must be 2 finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(finished, image, state, told):
    with pytest.raises(UserError, match=told):
        esscher.load(finished).policy.act(image, state, "go round the obstacle")


def test_an_instruction_longer_than_the_context_is_refused(finished):
    robot = esscher.load(finished).policy
    with pytest.raises(UserError, match="tokens, and the model's context has room"):
        robot.act(np.zeros((16, 16, 3), np.uint8), np.zeros(2), "on and " * 1_000)


def test_a_run_leaves_a_model_that_transformers_opens_and_a_strip_of_film(finished):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(finished / "model")
    held = esscher.load(finished).method.spec.model.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, held[name])
    assert [path.name for path in sorted((finished / "samples").iterdir())] == [
        "step_000000005.png",
        "step_000000010.png",
    ]


def test_other_demonstrations_are_refused_when_a_run_goes_on(tmp_path, finished, monkeypatch):
    settings = json.loads((finished / "config.json").read_text())
    assert settings["stages"][0]["data"] == "esscher.scenes:few_round_obstacle"
    changed = few_round_obstacle()
    changed.state[3] += 1
    monkeypatch.setattr("esscher.scenes.few_round_obstacle", lambda: changed)
    with pytest.raises(UserError, match="holds other demonstrations than when this run began"):
        resume(finished, step=5, display=False)
