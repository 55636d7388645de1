"""RTI-DP: the iteration by hand, its guess, its gripper, the level it suggests, what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import esscher
from esscher.adapters.chunk_models import load_chunk_model
from esscher.datasets import dodge, dodge_and_grip_scaled
from esscher.distributions.chunks import ChunkModel
from esscher.distributions.remembering import Player
from esscher.envs import Dodge
from esscher.errors import UserError
from esscher.functional.diffusion import alpha_bars
from esscher.methods.robots.rti_dp import (
    Config,
    RealTimeIteration,
    deviations,
    shifted,
    warm_start,
)
from esscher.registry import recipes
from esscher.types import Spec
from support import data_of, learner, metrics, smoke, store, train

EXPERT = "esscher.chunk_models:dodge_expert"
SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))


def expert() -> ChunkModel:
    return load_chunk_model(EXPERT, SPEC)


def test_the_guess_is_shifted_by_what_was_executed() -> None:
    chunk = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    assert shifted(chunk, 1).flatten().tolist() == [2, 3, 4, 4]
    assert shifted(chunk, 3).flatten().tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("skip", ["relabel", "jump"])
def test_a_warm_start_by_the_formulas_of_ddpm(skip: Any) -> None:
    """The clean guess as a sample of level 3, then 1 and 0, each a step of one level or to the next."""
    model, kept = expert(), alpha_bars("squaredcos_cap_v2", 100)
    told, guess = torch.tensor([[0.2, 0.05]]), torch.linspace(-0.5, 0.9, 8).view(1, 8, 1)
    noises = torch.randn(2, 1, 8, 1, generator=torch.Generator().manual_seed(0))
    z = guess.double()
    for place, level in enumerate((3, 1, 0)):
        eps = model.network(z.float(), torch.tensor([float(level)]), told).double()
        a = kept[level]
        clean = ((z - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        if level == 0:
            z = clean
            continue
        below = kept[level - 1] if skip == "relabel" else kept[(1, 0)[place]]
        alpha = a / below
        mean = below.sqrt() * (1 - alpha) / (1 - a) * clean
        mean = mean + alpha.sqrt() * (1 - below) / (1 - a) * z
        z = mean + ((1 - below) / (1 - a) * (1 - alpha)).sqrt() * noises[place]
    ours = warm_start(model, guess, told, (3, 1, 0), lambda k: noises[k], skip)
    torch.testing.assert_close(ours.double(), z, rtol=1e-4, atol=1e-4)


def test_the_noise_of_a_step_has_the_size_in_the_sheet() -> None:
    """About 0.029 at level 2 and 0.020 at level 1."""
    model, told = expert(), torch.zeros(1, 2)
    z = torch.zeros(1, 8, 1)
    for level, size in ((2, 0.029), (1, 0.020)):
        moved = model.step(z, level, told, torch.ones(1, 8, 1)) - model.step(z, level, told, z)
        assert moved.mean().item() == pytest.approx(size, abs=1e-3)


def acted(policy: RealTimeIteration, obs: Tensor, steps: int) -> tuple[list[list[float]], Any]:
    player = Player(policy, explore=False)
    actions = [player(obs).flatten().tolist() for _ in range(steps)]
    return actions, player.memory


def test_evaluations_first_all_levels_then_the_steps() -> None:
    for cfg, expected in (
        (Config(steps=(2, 1, 0)), 100 + 3 * 3),
        (Config(steps=(0,)), 100 + 3),
        (Config(steps=(2, 1, 0), executed=2), 100 + 3),
        (Config(warm_start=False), 400),
        (Config(warm_start=False, executed=2), 200),
    ):
        _, memory = acted(RealTimeIteration(expert(), cfg), torch.zeros(2, 2), 4)
        assert memory.evaluations.tolist() == [expected, expected]


def test_it_stays_with_its_side_where_drawing_anew_dithers() -> None:
    obs = torch.zeros(64, 2)
    signs = {}
    for name, cfg in (("warm", Config(steps=(2, 1, 0))), ("cold", Config(warm_start=False))):
        actions, _ = acted(RealTimeIteration(expert(), cfg), obs, 8)
        signs[name] = torch.tensor(actions).sign()
    assert bool((signs["warm"] == signs["warm"][0]).all())
    assert 0.3 < (signs["warm"][0] > 0).float().mean() < 0.7
    flips = (signs["cold"][1:] != signs["cold"][:-1]).float().mean()
    assert 0.35 < flips < 0.65


class Fixed(ChunkModel):
    """Says that the clean chunk is what it sees, so that only the guess's own handling shows."""

    def denoised(self, z: Tensor, level: int, condition: Tensor) -> Tensor:
        return z

    def draw(self, condition: Tensor, noise: Any) -> Tensor:
        return torch.tensor([[-0.8, 0.3, -0.2, 0.6]]).view(1, 4, 1).expand(len(condition), -1, -1)


def fixed() -> ChunkModel:
    model = expert()
    model.horizon = 4
    model.__class__ = Fixed
    return model


def test_a_gripper_is_cut_in_the_guess_and_executed_whole() -> None:
    clip = RealTimeIteration(fixed(), Config(steps=(0,), discrete=(0,)))
    actions, memory = acted(clip, torch.zeros(1, 2), 2)
    assert actions == [[-1.0], [1.0]]
    torch.testing.assert_close(memory.chunk.flatten(), torch.tensor([0.1, -0.1, 0.1, 0.1]))
    scale = RealTimeIteration(fixed(), Config(steps=(0,), discrete=(0,), variant="scale"))
    actions, memory = acted(scale, torch.zeros(1, 2), 2)
    assert actions == [[-1.0], [1.0]]
    torch.testing.assert_close(memory.chunk.flatten(), torch.tensor([0.3, -0.2, 0.6, 0.6]))
    plain = RealTimeIteration(fixed(), Config(steps=(0,)))
    actions, _ = acted(plain, torch.zeros(1, 2), 5)
    torch.testing.assert_close(
        torch.tensor(actions).flatten(), torch.tensor([-0.8, 0.3, -0.2, 0.6, 0.6])
    )


def test_deviations_by_hand_and_the_level_that_they_suggest() -> None:
    kept = torch.tensor([0.81, 0.25], dtype=torch.float64)
    guess, chunk = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 1.0])
    moments = torch.stack([guess @ guess, guess @ chunk, chunk @ chunk]).double()
    expected = [float((guess - root * chunk).square().sum()) for root in (0.9, 0.5)]
    assert deviations(kept, moments).tolist() == pytest.approx(expected)
    policy = RealTimeIteration(expert(), Config(steps=()))
    # A guess that is 0.95 of the chunk is nearest to the level whose sqrt(abar) is 0.95.
    policy.moments.copy_(torch.tensor([0.9025, 0.95, 1.0]))
    level = int((alpha_bars("squaredcos_cap_v2", 100).sqrt() - 0.95).abs().argmin())
    assert policy.suggested == level and 15 < level < 25
    assert policy.steps == tuple(range(level, -1, -1))


def test_updates_measure_and_leave_the_network_alone() -> None:
    method = learner("rti_dp", policy=EXPERT)
    before = {k: v.clone() for k, v in method.acting.model.state_dict().items()}
    windows = store(method, data_of("rti_dp"))
    torch.manual_seed(0)
    for step in range(3):
        for batch in windows.batches(step):
            told = method.update(batch, step)
    after = method.acting.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    # With the same noise the chunk of the next step is the old one, moved on.
    guess, product, chunk = method.acting.moments.tolist()
    assert product / (guess * chunk) ** 0.5 > 0.95
    assert 0 <= told["suggested_level"] < 40 and method.count.tolist() == [3]


def test_the_schedule_of_the_authors_evaluation() -> None:
    model = RealTimeIteration(expert(), Config(noise_schedule="linear")).model
    assert float(model.alpha_bars[2]) == pytest.approx(0.9991, abs=1e-4)
    assert float(model.alpha_bars[99]) == pytest.approx(0.36, abs=0.01)
    assert float(RealTimeIteration(expert(), Config()).model.alpha_bars[2]) == pytest.approx(
        0.9967, abs=1e-4
    )


def test_a_run_of_diffusion_policy_is_made_fast(tmp_path: Path) -> None:
    base = smoke("diffusion_policy", steps=80)
    train(replace(base, checkpoint=esscher.CheckpointConfig(every=0)), tmp_path / "base")
    mine = smoke("rti_dp")
    cfg = replace(mine.method, policy=str(tmp_path / "base"), steps=(2, 1, 0))
    lengths = train(replace(mine, method=cfg), tmp_path / "fast").evaluation.lengths
    told = metrics(tmp_path / "fast")[-1]["evaluations_per_action"]
    assert told == pytest.approx(sum(4 + 3 * (n - 1) for n in lengths) / sum(lengths))
    one, two = (esscher.load(tmp_path / name).policy.policy.model for name in ("base", "fast"))
    told, noise = torch.zeros(1, 4), torch.randn(4, 1, 4, 1)
    assert torch.equal(one.draw(told, lambda k: noise[k]), two.draw(told, lambda k: noise[k]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (1, 2, 0)}, "steps must be levels that fall strictly and end at 0"),
        ({"steps": (2, 2, 0)}, "steps must be levels that fall strictly"),
        ({"steps": (3, 1)}, "steps must be levels that fall strictly and end at 0"),
        ({"steps": (100, 0)}, "steps must be levels below 100"),
        ({"executed": 9}, r"executed must be in \[1, 8\]"),
        ({"discrete": (1,)}, r"discrete must be components of an action, in \[0, 1\)"),
        ({"policy": None}, "give --method.policy RUN"),
    ],
)
def test_what_does_not_fit_the_policy_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner("rti_dp", SPEC, **{"policy": EXPERT, **changes})


def test_every_recipe_names_a_policy() -> None:
    for recipe in recipes("rti_dp").values():
        assert recipe().method.policy is not None


def passed(action: list[float], gripper: bool = False) -> tuple[float, int, list[float]]:
    env = Dodge(gripper=gripper)
    env.reset(seed=0)
    for step in range(1, 40):
        _, reward, ended, _, info = env.step(np.array(action, np.float32))
        if ended:
            return reward, step, info["descriptor"].tolist()
    raise AssertionError("it never ends")


def test_what_stands_in_the_way_is_hit_or_dodged() -> None:
    assert passed([0.0])[:2] == (0.0, 19), "0.95 is the first x inside"
    for side in (-1.0, 1.0):
        reward, steps, (height,) = passed([side])
        assert (reward, steps) == (1.0, 22) and height == pytest.approx(1.1 * side, abs=0.1)
    # From x = 0.5 on, the action of step 11 is the first that should close: 12 steps are left.
    assert passed([1.0, -1.0], gripper=True)[2][1] == 12
    assert passed([1.0, 1.0], gripper=True)[2][1] == 0


def test_experts_choose_both_sides_wherever_they_are() -> None:
    columns = dodge()
    obs, action = columns["observations"], columns["actions"][:, 0]
    for low in (0.0, 0.25, 0.5):
        near = (np.abs(obs[:, 1]) < 0.1) & (obs[:, 0] >= low) & (obs[:, 0] < low + 0.25)
        assert near.sum() > 100 and 0.3 < (action[near] > 0).mean() < 0.7
    scaled = dodge_and_grip_scaled()["actions"]
    assert sorted(set(np.abs(scaled[:, 1]).round(6))) == [pytest.approx(0.1)]
