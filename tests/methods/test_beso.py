"""BESO: the sheet's numbers, its loss by hand, who sees whom, contexts, guidance, two modes."""

import math
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from esscher.adapters.gymnasium import make
from esscher.datasets import two_gaps
from esscher.distributions.goals import GoalColumns, Observed
from esscher.distributions.remembering import Player
from esscher.envs import TwoGaps
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.experiment import EnvConfig
from esscher.methods.robots.beso import (
    ActionDenoiser,
    BesoPolicy,
    Config,
    Sampling,
    denoising_loss,
    held,
    some_left_out,
)
from esscher.nn.scaling import Scaling
from esscher.types import Spec, Transitions
from support import learner, store

GAPS = Spec(obs_shape=(4,), action_shape=(2,), action_low=(-1.0, -1.0), action_high=(1.0, 1.0))
EXACT = Sampling(
    steps=3,
    sampler="ddim",
    schedule="exponential",
    guidance=1.0,
    sigma_min=0.005,
    sigma_max=1.0,
    keep_last_actions=False,
)


def gaussian(x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
    """Exact for N(0.3, 0.2^2)."""
    level = sigma.view(-1, 1)
    return (0.04 * x + 0.3 * level**2) / (0.04 + level**2)


def end(**changes: Any) -> float:
    start = torch.full((1, 1), 1.5, dtype=torch.float64)
    return replace(EXACT, **changes).draw(gaussian, start, None, lambda _: start).item()


# ---- sampling


def test_three_steps_of_ddim_by_the_sheet() -> None:
    assert EXACT.sigmas() == pytest.approx([1.0, 0.0707107, 0.005, 0.0], abs=1e-7)
    x, seen = 1.5, []
    for sigma, following in zip(EXACT.sigmas()[:-1], EXACT.sigmas()[1:], strict=True):
        clean = (0.04 * x + 0.3 * sigma**2) / (0.04 + sigma**2)
        x = following / sigma * x + (1 - following / sigma) * clean
        seen.append(x)
    assert seen == pytest.approx([0.427743, 0.414553, 0.414482], abs=1e-6)
    assert end() == pytest.approx(0.414482, abs=1e-6)


def test_samplers_converge_to_the_end_of_the_flow() -> None:
    flow = 0.3 + 1.2 * 0.2 / math.sqrt(1.04)
    assert flow == pytest.approx(0.535339, abs=1e-6)
    for sampler in ("ddim", "euler", "heun", "dpmpp_2m"):
        errors = [abs(end(sampler=sampler, steps=n) - flow) for n in (3, 10, 50)]
        assert errors[0] > errors[1] > errors[2], sampler
    assert abs(end(sampler="heun", steps=50) - flow) < abs(end(steps=50) - flow) / 10


def test_the_other_schedules() -> None:
    assert replace(EXACT, schedule="linear").sigmas() == pytest.approx([1, 0.5025, 0.005, 0])
    root = (1 + 0.005**0.2) / 2
    assert replace(EXACT, schedule="karras").sigmas() == pytest.approx([1, root**5, 0.005, 0])
    assert replace(EXACT, steps=1).sigmas() == [1.0, 0.0]


def test_a_step_of_euler_ancestral_by_hand() -> None:
    """From sigma 1 to 0.5 to 0: s_up^2 = 0.25 * 0.75 = 0.1875, s_down = sqrt(0.25 - 0.1875) = 0.25."""
    how = replace(EXACT, steps=2, sampler="euler_ancestral", schedule="linear", sigma_min=0.5)
    start, z = torch.full((1, 1), 1.5, dtype=torch.float64), 0.4
    drawn = how.draw(gaussian, start, None, lambda _: torch.full_like(start, z)).item()
    clean = (0.04 * 1.5 + 0.3) / 1.04
    x = 1.5 + (1.5 - clean) / 1.0 * (0.25 - 1.0) + math.sqrt(0.1875) * z
    assert drawn == pytest.approx((0.04 * x + 0.3 * 0.25) / 0.29, rel=1e-9)


def test_known_actions_are_held() -> None:
    known, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    clean = held(lambda x, sigma, condition=None: x * 10, known, mask)
    assert clean(torch.tensor([[7.0, 3.0]]), torch.ones(1)).tolist() == [[1.0, 30.0]]


# ---- the denoiser


def denoiser(window: int = 3, goal_length: int = 2, **changes: Any) -> ActionDenoiser:
    torch.manual_seed(0)
    cfg = Config(
        window=window, goal_length=goal_length, width=16, layers=2, heads=2, attention_dropout=0.0
    )
    observed = Observed(4, GoalColumns((2, 3), (0, 1)), "none")
    return ActionDenoiser(observed, 2, replace(cfg, **changes))


def test_an_action_sees_the_goal_and_all_before_and_itself() -> None:
    net, count = denoiser(), 3
    state, action = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    goal, noise = torch.randn(1, 2, 2), torch.randn(1)
    seen = torch.autograd.functional.jacobian(
        lambda *parts: net.network(*parts).sum((0, 2)), (state, action, goal, noise)
    )
    for part, expected in (
        (seen[0].abs().sum((1, 3)), torch.ones(count, count).tril()),
        (seen[1].abs().sum((1, 3)), torch.ones(count, count).tril()),
        (seen[2].abs().sum((1, 3)), torch.ones(count, 2)),
        (seen[3].abs(), torch.ones(count, 1)),
    ):
        assert torch.equal(part > 1e-9, expected > 0)


def test_what_comes_later_does_not_change_the_first_actions() -> None:
    net = denoiser()
    state, x, goal = torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.randn(1, 2, 2)
    sigma = torch.tensor([0.3])
    whole = net(x, sigma, {"state": state, "goal": goal})
    state[:, 2], x[:, 2] = 9.0, -9.0
    torch.testing.assert_close(net(x, sigma, {"state": state, "goal": goal})[:, :2], whole[:, :2])


def test_preconditioning_by_hand() -> None:
    """With sigma = sigma_data = 0.5: skip 1/2, out 0.5/sqrt(2), in sqrt(2), noise log(0.5)/4."""
    net = denoiser()
    x, told = torch.randn(2, 3, 2), {"state": torch.randn(2, 3, 2), "goal": torch.randn(2, 2, 2)}
    output = net.network(
        told["state"], math.sqrt(2) * x, told["goal"], torch.full((2,), math.log(0.5) / 4)
    )
    torch.testing.assert_close(
        net(x, torch.full((2,), 0.5), told), x / 2 + 0.5 / math.sqrt(2) * output
    )


def test_loss_is_the_error_of_the_estimate_over_the_output_scale() -> None:
    net = denoiser()
    action, noise, state = torch.randn(3, 4, 3, 2).unbind(0)
    goal, sigma = torch.randn(4, 2, 2), torch.tensor([0.01, 0.2, 0.5, 1.0])
    loss = denoising_loss(net, action, sigma, noise, state, goal)
    clean = net(action + sigma.view(-1, 1, 1) * noise, sigma, {"state": state, "goal": goal})
    scale = (sigma * 0.5 / (sigma**2 + 0.25).sqrt()).view(-1, 1, 1)
    torch.testing.assert_close(loss, ((clean - action) / scale).square().mean())


def test_a_goal_is_embedded_as_the_state_that_it_is_about() -> None:
    """Entry 3 alone is a goal, about entry 1: elsewhere that state is 0."""
    cfg = Config(window=1, goal_length=1, width=8, layers=1, heads=2, attention_dropout=0.0)
    net = ActionDenoiser(Observed(4, GoalColumns((3,), (1,)), "none"), 1, cfg)
    seen: list[Tensor] = []
    net.of_state.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    net.network(
        torch.zeros(1, 1, 3), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 5.0), torch.ones(1)
    )
    assert seen[0].tolist() == [[[0.0, 5.0, 0.0]]]


# ---- goals


def test_goals_are_left_out_by_sample_or_by_number() -> None:
    torch.manual_seed(0)
    goal = torch.ones(4_000, 2, 3)
    by_sample, by_element = (some_left_out(goal, 0.1, what) for what in ("sample", "element"))
    wholly = [(x == 0).all(2).all(1).float().mean().item() for x in (by_sample, by_element)]
    anything = [(x == 0).float().mean().item() for x in (by_sample, by_element)]
    assert wholly[0] == pytest.approx(0.1, abs=0.02) and wholly[1] == 0
    assert anything == pytest.approx([0.1, 0.1], abs=0.02)
    assert torch.equal(some_left_out(goal, 0.0, "sample"), goal)


def test_observations_are_taken_apart_and_goals_scaled_alike() -> None:
    observed = Observed(5, GoalColumns((1, 3), (4, 0)), "range")
    obs = torch.tensor([[0.0, 10.0, 5.0, 20.0, 2.0], [4.0, 30.0, 7.0, 40.0, 6.0]])
    observed.fit(obs)
    assert observed.state(obs).tolist() == [[-1, -1, -1], [1, 1, 1]]
    # (10 - 4) / 2 and (20 - 2) / 2.
    assert observed.wanted(obs[:1]).tolist() == [[3.0, 9.0]]
    assert observed.reached(torch.tensor([[6.0, 0.0]])).tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal": (2,), "achieved": (0, 1)}, "goal names 1 entries .* and achieved 2"),
        ({"goal": (2, 4), "achieved": (0, 1)}, r"goal must be entries .* in \[0, 4\)"),
        ({"goal": (2, 2), "achieved": (0, 1)}, "goal must be entries named once"),
        ({"goal": (0, 1), "achieved": (0, 2)}, "name the same entry"),
        ({"width": 16, "heads": 3}, "heads must be a divisor of the width, 16, got 3"),
        ({"sigma_min": 2.0}, "sigma_max must be above sigma_min, 2, got 1"),
        (
            {"mask_probability": 0.0, "guidance": 1.5},
            "guidance must be .* 1 with mask_probability 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learner("beso", GAPS, **changes)


# ---- acting


def acting(**changes: Any) -> BesoPolicy:
    cfg = Config(
        goal=(2, 3), achieved=(0, 1), window=3, goal_length=1, width=16, layers=1, heads=2,
        attention_dropout=0.0, **{"guidance": 1.0, **changes},
    )  # fmt: skip
    observed = Observed(4, GoalColumns((2, 3), (0, 1)), "none")
    observed.scaling = Scaling.identity(2, "observation")
    torch.manual_seed(1)
    net = ActionDenoiser(observed, 2, cfg)
    return BesoPolicy(net, observed, Scaling.identity(2, "action"), cfg).eval()


def test_the_context_holds_the_last_states_and_executed_actions() -> None:
    player, actions = Player(acting(), explore=False), []
    for step in range(5):
        actions.append(player(torch.tensor([[float(step), 10.0, 0.5, 0.5]])))
        memory: Any = player.memory
        count = min(step + 1, 3)
        assert memory.state[0, :count, 0].tolist() == list(range(step + 1 - count, step + 1))
        torch.testing.assert_close(
            memory.action[0, :count], torch.cat(actions[-count:]), rtol=1e-5, atol=1e-6
        )
        assert bool((memory.state[0, count:] == 0).all())


def test_evaluations_follow_from_steps_and_guidance() -> None:
    for changes, expected in (
        ({"guidance": 1.0}, 3), ({"guidance": 0.0}, 3), ({"guidance": 2.0}, 6),
        ({"guidance": 1.0, "sampler": "heun"}, 5), ({"guidance": 1.0, "denoising_steps": 7}, 7),
    ):  # fmt: skip
        player = Player(acting(**changes), explore=False)
        player(torch.zeros(2, 4))
        assert player.memory is not None
        assert player.memory.evaluations.tolist() == [expected, expected]


def test_guidance_none_ignores_the_goal_and_more_amplifies_it() -> None:
    policy = acting(denoising_steps=1, sampler="ddim", guidance=0.0)
    here, there = torch.tensor([[0.1, 0.2, 1.0, -1.0]]), torch.tensor([[0.1, 0.2, -1.0, 1.0]])

    def act(obs: Tensor, guidance: float) -> Tensor:
        policy.sampling = replace(policy.sampling, guidance=guidance)
        return Player(policy, explore=False)(obs)

    assert torch.equal(act(here, 0.0), act(there, 0.0))
    none, plain, twice = (act(here, scale) for scale in (0.0, 1.0, 2.0))
    # One step of DDIM gives the guided estimate itself, cut at the bounds of actions.
    torch.testing.assert_close(twice, (none + 2 * (plain - none)).clamp(-1, 1))
    assert not torch.allclose(plain, none)


# ---- training


def play(count: int = 300) -> Dataset:
    """Episodes of three steps that go up or down by 0.5, throughout, whatever is seen."""
    side = torch.where(torch.arange(count) % 2 == 0, 0.5, -0.5).repeat_interleave(3)
    step = torch.arange(3).repeat(count)
    noise = 0.02 * torch.randn(len(step), 2, generator=torch.Generator().manual_seed(0))
    obs = torch.zeros(len(step), 4)
    obs[:, 0] = step.float() / 2 - 0.5
    ended = step == 2
    return Dataset(
        transitions=Transitions(
            obs=obs,
            action=torch.stack([torch.zeros(len(step)), side], -1) + noise,
            reward=torch.zeros(len(step)),
            next_obs=obs,
            terminated=ended,
            truncated=torch.zeros_like(ended),
        ),
        step=step,
        name="play",
    )


def test_it_learns_both_modes_and_keeps_to_one() -> None:
    method = learner(
        "beso", GAPS, window=2, width=32, batch_size=128, learning_rate=3e-3, guidance=1.0,
        sampler="ddim", denoising_steps=10, goal=(), achieved=(),
    )  # fmt: skip
    windows = store(method, play())
    before = {k: v.clone() for k, v in method.denoiser.state_dict().items()}
    for step in range(400):
        torch.manual_seed(step)
        for batch in windows.batches(step):
            method.update(batch, step)
    trained = {k for k, v in method.denoiser.named_parameters() if not torch.equal(v, before[k])}
    assert trained == {name for name, _ in method.denoiser.named_parameters()}
    torch.manual_seed(0)
    player, obs = Player(method.policy, explore=True), torch.zeros(200, 4)
    obs[:, 0] = -0.5
    first = player(obs)[:, 1]
    assert 0.3 < (first > 0).float().mean() < 0.7
    assert (first.abs() - 0.5).abs().median() < 0.15, "not the mean of both"
    obs[:, 0] = 0.0
    second = player(obs)[:, 1]
    assert (second.sign() == first.sign()).float().mean() > 0.9, "the context tells which"


def test_the_average_follows_with_its_warm_up() -> None:
    method = learner("beso", GAPS)
    windows = store(method, replace(play(), name="short"))
    name = "head.weight"
    start = method.acting.denoiser.state_dict()[name].clone()
    for batch in windows.batches(0):
        method.update(batch, 0)
    moved = method.denoiser.state_dict()[name]
    expected = 0.1 * start + 0.9 * moved
    torch.testing.assert_close(method.acting.denoiser.state_dict()[name], expected)
    for batch in windows.batches(100):
        method.update(batch, 100)
    assert method.opt.learning_rate == pytest.approx(method.cfg.learning_rate * 0.99)


class Reach(gymnasium.Env[Any, Any]):
    """Observations in the form of Gymnasium-Robotics."""

    def __init__(self) -> None:
        place, more = (spaces.Box(-9, 9, (size,), np.float64) for size in (2, 3))
        self.observation_space = spaces.Dict(
            {"observation": more, "desired_goal": place, "achieved_goal": place}
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return {
            "observation": np.array([1.0, 2.0, 3.0]),
            "desired_goal": np.array([4.0, 5.0]),
            "achieved_goal": np.array([6.0, 7.0]),
        }, {}


def test_dictionaries_of_gymnasium_robotics_come_in_the_order_of_their_names() -> None:
    obs, _ = make(EnvConfig(id=f"{__name__}:Reach")).reset()
    flat = torch.from_numpy(obs).float().unsqueeze(0)
    assert flat.tolist() == [[6, 7, 4, 5, 1, 2, 3]]
    observed = Observed(7, GoalColumns((2, 3), (0, 1)), "none")
    observed.scaling.as_is()
    assert observed.state(flat).tolist() == [[6, 7, 1, 2, 3]]
    assert observed.wanted(flat).tolist() == [[4, 5]]


def through(env: TwoGaps, *waypoints: tuple[float, float]) -> tuple[float, bool, float, int]:
    """Reward, whether it ended, where it passed the wall, and steps."""
    reward, ended, passed, steps = 0.0, False, 0.0, 0
    for waypoint in waypoints:
        while not ended and np.linalg.norm(np.array(waypoint) - env.place) > 0.05 and steps < 60:
            way = np.array(waypoint) - env.place
            action = np.clip(way / max(np.linalg.norm(way), 0.08), -1, 1)
            _, reward, terminated, truncated, info = env.step(action)
            ended, passed = terminated or truncated, float(info["descriptor"][0])
            steps += 1
    return reward, ended, passed, steps


def test_the_wall_stops_all_but_the_gaps_and_the_wanted_goal_pays() -> None:
    env = TwoGaps()
    obs, _ = env.reset(seed=0)
    goal = float(obs[3])
    assert through(env, (0.9, 0.0))[:3] == (0.0, True, 0.0)
    for side in (-1.0, 1.0):
        env.reset(seed=0)
        reward, ended, passed, _ = through(env, (-0.05, side * 0.5), (0.1, side * 0.5), (0.9, goal))
        assert (reward, ended) == (1.0, True) and passed == pytest.approx(side * 0.5, abs=0.05)
        env.reset(seed=0)
        other = goal + 0.4 if goal < 0.5 else goal - 0.4
        reward, ended, _, _ = through(env, (-0.05, side * 0.5), (0.1, side * 0.5), (0.9, other))
        assert (reward, ended) == (0.0, True)


def test_play_takes_either_gap_to_every_goal() -> None:
    columns = two_gaps()
    obs, following = columns["observations"], columns["next_observations"]
    crossing = (obs[:, 0] < 0) & (following[:, 0] >= 0)
    assert crossing.sum() == 400 and columns["rewards"].sum() == 400
    assert 0.4 < (following[crossing, 1] > 0).mean() < 0.6
    ends = following[columns["terminations"], 1]
    assert all(0.15 < (np.abs(ends - goal) < 0.15).mean() < 0.35 for goal in TwoGaps.goals)
