"""The adapter and the online loop on environments whose every step is known."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import toys
from esscher.adapters.gymnasium import Environments, make
from esscher.controller import Controller
from esscher.errors import UserError
from esscher.experiment import EnvConfig
from esscher.loops.online import LoopState, crossed, online
from esscher.runtime.rng import Phase, mix
from esscher.types import Action, Transitions


class Recorder:
    """An experience that keeps everything and owes nothing."""

    def __init__(self) -> None:
        self.steps: list[Transitions] = []

    def warming_up(self, step: int) -> bool:
        return step < 8

    def add(self, transitions: Transitions, action: Action) -> None:
        self.steps.append(transitions)

    def batches(self, step: int) -> Any:
        return ()


class Wanderer:
    """A method that acts at random and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def act(self, obs: torch.Tensor, *, explore: bool) -> Action:
        self.seen.append(obs.clone())
        return Action(value=torch.rand(len(obs), 1) * 2 - 1)


def record(config: EnvConfig, steps: int, seed: int = 3, **options: Any) -> Any:
    envs = Environments(config, seed)
    experience, method = Recorder(), Wanderer()
    state = LoopState(torch.from_numpy(envs.reset(0)))
    progress = list(online(method, envs, experience, state, seed=seed, steps=steps, **options))
    envs.close()
    return SimpleNamespace(steps=experience.steps, seen=method.seen, progress=progress, state=state)


def reference(copy: int, actions: list[float], seed: int = 3) -> list[tuple]:
    """The same steps of one copy by hand."""
    env = toys.Countdown()
    obs, _ = env.reset(seed=mix(seed, 0, Phase.RESET, copy) % 2**31)
    rows = []
    for action in actions:
        after, reward, terminated, truncated, _ = env.step(np.array([action], np.float32))
        rows.append((obs, reward, after, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else after
    return rows


@pytest.mark.parametrize("parallel", [False, True])
def test_transitions_are_those_of_single_environments(parallel: bool) -> None:
    config = EnvConfig(id="toys:Countdown", num=3, parallel=parallel)
    found = record(config, steps=180)
    ended = {"terminated": 0, "truncated": 0, "both": 0}
    episodes: list[tuple[float, int]] = []
    for copy in range(3):
        actions = [step.action[copy, 0].item() for step in found.steps]
        assert len(actions) == 60
        total, length = 0.0, 0
        for step, row in zip(found.steps, reference(copy, actions), strict=True):
            obs, reward, after, terminated, truncated = row
            np.testing.assert_array_equal(step.obs[copy], obs)
            np.testing.assert_array_equal(step.next_obs[copy], after)
            assert step.reward[copy].item() == np.float32(reward)
            assert bool(step.terminated[copy]) == terminated
            assert bool(step.truncated[copy]) == truncated
            total, length = total + reward, length + 1
            if terminated or truncated:
                kind = (
                    "both"
                    if terminated and truncated
                    else "truncated"
                    if truncated
                    else "terminated"
                )
                ended[kind] += 1
                episodes.append((total, length))
                total, length = 0.0, 0
    assert min(ended.values()) > 0, "every kind of end must have occurred"
    reported = [episode for progress in found.progress for episode in progress.episodes]
    assert [n for _, n in sorted(reported)] == [n for _, n in sorted(episodes)]
    np.testing.assert_allclose(sorted(reported), sorted(episodes), rtol=1e-6)
    # What the policy saw is what was stored, once it acts by itself.
    for seen, step in zip(found.seen, found.steps[-len(found.seen) :], strict=True):
        assert torch.equal(seen, step.obs)


def test_processes_give_the_same_transitions() -> None:
    both = [
        record(EnvConfig(id="toys:Countdown", num=3, parallel=p), steps=90).steps
        for p in (False, True)
    ]
    for left, right in zip(*both, strict=True):
        for name, value in left.fields().items():
            assert torch.equal(value, getattr(right, name)), name


def test_copies_and_runs_start_from_different_seeds() -> None:
    def starts(seed: int, iteration: int = 0, phase: Phase = Phase.RESET) -> list[float]:
        envs = Environments(EnvConfig(id="Pendulum-v1", num=3), seed, phase)
        return envs.reset(iteration)[:, 0].tolist()

    every = starts(0) + starts(1) + starts(0, 7) + starts(0, 0, Phase.EVALUATE)
    assert len(set(every)) == len(every) == 12
    assert starts(0) == starts(0)


def test_a_reset_forgets_everything_before_it() -> None:
    envs = Environments(EnvConfig(id="toys:Growing", num=2), 0)
    rewards = []
    for _ in range(3):
        envs.reset(5)
        rewards.append(envs.step(torch.zeros(2, 1), 0).reward.tolist())
    assert rewards[0] == rewards[1] == rewards[2]


def test_barrier_truncates_and_restarts() -> None:
    config = EnvConfig(id="toys:Countdown", num=2)
    found = record(config, steps=40, barrier_every=10)
    for number, step in enumerate(found.steps):
        at = 2 * (number + 1)
        if at % 10 == 0:
            assert step.truncated.all(), at
            if number + 1 < len(found.steps):
                envs = Environments(config, 3)
                expected = envs.reset(at)
                np.testing.assert_array_equal(found.steps[number + 1].obs, expected)
                assert not np.array_equal(step.next_obs, expected)
    assert any(not step.truncated.all() for step in found.steps)


def test_stopping_and_going_on_is_one_run() -> None:
    whole = record(EnvConfig(id="toys:Countdown", num=2), steps=40)
    envs, experience = Environments(EnvConfig(id="toys:Countdown", num=2), 3), Recorder()
    state = LoopState(torch.from_numpy(envs.reset(0)))
    for steps in (10, 26, 40):
        list(online(Wanderer(), envs, experience, state, seed=3, steps=steps))
    for left, right in zip(whole.steps, experience.steps, strict=True):
        assert torch.equal(left.obs, right.obs) and torch.equal(left.action, right.action)


@pytest.mark.parametrize("phase", ["act", "update"])
def test_phases_draw_from_streams_of_their_own(phase: str) -> None:
    """However much randomness acting takes, the updates of a step draw the same, and vice versa."""

    def draws(greed: int) -> list[float]:
        drawn: list[float] = []

        class Greedy(Wanderer):
            def act(self, obs: torch.Tensor, *, explore: bool) -> Action:
                if phase == "act":
                    torch.rand(greed)
                else:
                    drawn.append(torch.rand(1).item())
                return Action(value=torch.zeros(len(obs), 1))

        class Thrifty(Recorder):
            def batches(self, step: int) -> Any:
                if phase == "act":
                    drawn.append(torch.rand(1).item())
                else:
                    torch.rand(greed)
                return ()

        envs = Environments(EnvConfig(id="toys:Countdown"), 0)
        state = LoopState(torch.from_numpy(envs.reset(0)))
        list(online(Greedy(), envs, Thrifty(), state, seed=0, steps=30))
        return drawn

    first = draws(1)
    assert first == draws(5) and len(set(first)) == len(first) > 20


def test_crossed() -> None:
    assert [s for s in range(3, 31, 3) if crossed(s, 3, 10)] == [12, 21, 30]
    assert not any(crossed(s, 3, 0) for s in range(30))


# ---- actions


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        ([-2.0], [2.0], "float32"),
        ([0.1, -7.3], [0.3, 1e-3], "float32"),
        ([[0.1, 0.2], [-0.3, -5.0]], [[0.7, 0.9], [0.1, 5.1]], "float32"),
        ([-0.7, 1 / 3], [0.1, 2 / 3], "float64"),
        (-1.5, 0.3, "float32"),
    ],
)
def test_actions_are_rescaled_to_the_box(low: Any, high: Any, dtype: str) -> None:
    config = EnvConfig(id="toys:Echo", kwargs={"low": low, "high": high, "dtype": dtype}, num=2)
    envs = Environments(config, 0)
    envs.reset(0)
    low, high = np.ravel(low), np.ravel(high)
    size = len(low)
    assert envs.spec.action_shape == (size,)
    torch.manual_seed(0)
    values = [-1.0, 1.0, 0.0, 0.5, -3.0, 40.0, math.nextafter(1, 0), *torch.rand(20).tolist()]
    for value in values:
        action = torch.full((2, size), value)
        got = envs.step(action, 0).next_obs
        share = (min(max(value, -1), 1) + 1) / 2
        expected = low + share * (high - low)
        for row in got:
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_rescaled_actions_never_leave_the_box() -> None:
    """Rounding in low + (high - low) may pass high by one step of float32."""
    draw = np.random.default_rng(0)
    low = draw.uniform(-10, 0, 500).astype(np.float32)
    high = (low + draw.uniform(0.01, 10, 500)).astype(np.float32)
    kwargs = {"low": low.tolist(), "high": high.tolist()}
    envs = Environments(EnvConfig(id="toys:Echo", kwargs=kwargs), 0)
    envs.reset(0)
    box = envs._envs.single_action_space
    for value in (-1.0, 1.0, 5.0):
        action = torch.full((1, 500), value)
        envs.step(action, 0)  # The environment itself asserts that it contains the action.

        class Point(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.anchor = torch.nn.Parameter(torch.zeros(1))

            def forward(self, obs: torch.Tensor, value: float = value) -> Any:
                return SimpleNamespace(mode=lambda: torch.full((len(obs), 500), value))

        deployed, _ = Controller(Point(), envs.spec).predict(np.zeros(500))
        assert box.contains(deployed.astype(np.float32))
        np.testing.assert_allclose(deployed, envs.to_native(action)[0], rtol=1e-6)


def test_random_actions_fill_the_range() -> None:
    torch.manual_seed(0)
    envs = Environments(EnvConfig(id="toys:Echo", num=500, kwargs={"low": [0.0], "high": [3.0]}), 0)
    action = envs.random_actions()
    assert action.shape == (500, 1)
    assert -1 <= action.min() < -0.98 and 0.98 < action.max() <= 1


def test_discrete_labels_start_where_the_space_says() -> None:
    envs = Environments(EnvConfig(id="toys:Choices", num=3), 0)
    envs.reset(0)
    assert envs.spec.num_actions == 3 and envs.spec.action_start == -1
    assert envs.step(torch.tensor([0, 1, 2]), 0).next_obs[:, 0].tolist() == [-1.0, 0.0, 1.0]
    torch.manual_seed(0)
    drawn = torch.cat([envs.random_actions() for _ in range(20)])
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


# ---- observations


def test_dictionary_observations_become_one_vector() -> None:
    env = make(EnvConfig(id="toys:Mixed"))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (7,) and obs.tolist() == [1, 0, 0, -4, -3, -2, -1]
    envs = Environments(EnvConfig(id="toys:Mixed", num=2), 0)
    assert envs.spec.obs_shape == (7,)
    envs.reset(0)
    assert envs.step(torch.zeros(2, 1), 0).obs[1].tolist() == [0, 1, 0, -3, -2, -1, 0]


@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1", "toys:Echo"])
def test_observations_and_rewards_are_float32(env: str) -> None:
    kwargs = {"low": [0.0], "high": [1.0]} if env == "toys:Echo" else {}
    envs = Environments(EnvConfig(id=env, num=2, kwargs=kwargs), 0)
    assert envs.reset(0).dtype == np.float32
    outcome = envs.step(envs.random_actions(), 0)
    assert outcome.obs.dtype == outcome.next_obs.dtype == outcome.reward.dtype == np.float32
    assert outcome.terminated.dtype == outcome.truncated.dtype == bool


def test_observations_are_not_overwritten_by_later_steps() -> None:
    envs = Environments(EnvConfig(id="Pendulum-v1", num=2), 0)
    first = envs.reset(0)
    kept = first.copy()
    outcome = envs.step(torch.ones(2, 1), 0)
    after = outcome.next_obs.copy()
    envs.step(-torch.ones(2, 1), 1)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(outcome.next_obs, after)


# ---- limits and complaints


def test_step_limit_truncates() -> None:
    for env in ("Pendulum-v1", "toys:Opaque"):
        envs = Environments(EnvConfig(id=env, max_episode_steps=4), 0)
        envs.reset(0)
        flags = [bool(envs.step(torch.zeros(1, 1), k).truncated[0]) for k in range(8)]
        assert flags == [False, False, False, True] * 2


def test_arguments_reach_the_environment() -> None:
    env = make(EnvConfig(id="Pendulum-v1", kwargs={"g": 3.25}))
    assert env.unwrapped.g == 3.25


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_values_that_are_not_finite_name_their_place(what: str, parallel: bool) -> None:
    config = EnvConfig(id="toys:NotFinite", num=2, kwargs={"what": what}, parallel=parallel)
    envs = Environments(config, 0)
    envs.reset(0)
    with pytest.raises(UserError, match=r"toys:NotFinite.*step \d.*environment 0"):
        for step in range(4):
            envs.step(torch.zeros(2, 1), step)
    envs.close()


def test_a_first_observation_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match=r"toys:NotFiniteStart.*not finite"):
        envs = Environments(EnvConfig(id="toys:NotFiniteStart"), 0)
        envs.reset(0)
        for step in range(20):
            envs.step(torch.zeros(1, 1), step)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("toys:WrongType", ["float32", "float64", "observation_space"]),
        ("toys:Unbounded", ["unbounded", "RescaleAction"]),
        ("toys:Several", ["MultiDiscrete", "Box and Discrete"]),
        ("toys:not_an_environment", ["returned a str"]),
        ("toys:Missing", ["cannot be imported", "Missing"]),
        ("no_such_module:Thing", ["cannot be imported", "no_such_module"]),
        ("HalfCheeta-v5", ["unknown environment", "HalfCheetah-v5"]),
        ("Pendulm-v1", ["unknown environment", "Pendulum-v1"]),
        ("Pendulum-v7", ["Pendulum-v7", "v1"]),
        ("nowhere/Pendulum-v1", ["nowhere"]),
    ],
)
def test_bad_environments_are_refused_with_a_remedy(env: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Environments(EnvConfig(id=env), 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="gravity"):
        make(EnvConfig(id="Pendulum-v1", kwargs={"gravity": 1.0}))
    with pytest.raises(UserError, match="gravity"):
        make(EnvConfig(id="toys:Countdown", kwargs={"gravity": 1.0}))


@pytest.mark.processes
def test_actors_of_ray_do_what_copies_in_this_process_do():
    ray = pytest.importorskip("ray")
    config = EnvConfig(id="Pendulum-v1", num=2, max_episode_steps=4)
    here, there = Environments(config, seed=3), Environments(replace(config, ray="local"), seed=3)
    try:
        assert there.spec == here.spec
        np.testing.assert_array_equal(there.reset(0), here.reset(0))
        saved = None
        for step in range(10):
            action = torch.full((2, 1), 0.1 * step)
            ours, theirs = here.step(action, step), there.step(action, step)
            for name in ("obs", "next_obs", "reward", "terminated", "truncated"):
                np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
            assert theirs.episodes == ours.episodes
            if step == 5:
                saved = there.state_dict()
        there.load_state_dict(saved)
        again = there.step(torch.full((2, 1), 0.6), 6)
        here.load_state_dict(saved)
        np.testing.assert_array_equal(again.obs, here.step(torch.full((2, 1), 0.6), 6).obs)
    finally:
        here.close()
        there.close()
        ray.shutdown()
