"""HNPG: tables with exact answers, each piece against explicit matrices and loops, known optima."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from esscher import datasets
from esscher.envs import CombinationLock, FiniteHorizon
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.experience.mixture import Mixed
from esscher.loops.online import LoopState, online
from esscher.methods.control import hnpg
from esscher.methods.control.hnpg import (
    HNPG,
    Config,
    TabularLock,
    fitted_values,
    hybrid_fitted_evaluation,
    softmax_actor_critic,
)
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Rollout, Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
H, EPISODES = 3, 4


def box(obs_dim=3, action_dim=2, num_envs=1) -> Spec:
    return Spec(
        obs_shape=(obs_dim,),
        action_shape=(action_dim,),
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        num_envs=num_envs,
    )


def build(spec=None, seed=0, **settings: Any) -> HNPG:
    """With small networks that are not the small ones of the start."""
    torch.manual_seed(seed)
    defaults = {"horizon": H, "batch_size": H * EPISODES, "critic_steps": 2}
    settings = {**defaults, "hidden": (8,), "critic_hidden": (8,), **settings}
    method = HNPG(Config(**settings), spec or box(), Runtime(RUNTIME))
    with torch.no_grad():
        for parameter in (*method.actor.parameters(), *method.critic.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method


def random_batch(seed=0, action_dim=2, features=2) -> Mixed:
    draw = torch.Generator().manual_seed(seed)
    rows, length = H * EPISODES, H * EPISODES // 2
    time = torch.arange(H).float()

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    own = time.repeat(EPISODES // 2)[:, None, None].expand(length, 2, 1)
    theirs = time.repeat_interleave(EPISODES)[:, None]
    rollout = Rollout(
        obs=torch.cat([normal(length, 2, features), own], -1),
        action=normal(length, 2, action_dim),
        reward=normal(length, 2),
        next_obs=torch.cat([normal(length, 2, features), own + 1], -1),
        terminated=own.squeeze(-1) == H - 1,
        truncated=torch.zeros(length, 2, dtype=torch.bool),
        extras={},
    )
    logged = Transitions(
        obs=torch.cat([normal(rows, features), theirs], -1),
        action=normal(rows, action_dim),
        reward=normal(rows),
        next_obs=torch.cat([normal(rows, features), theirs + 1], -1),
        terminated=torch.rand(rows, generator=draw) < 0.3,
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
    return Mixed(rollout, logged)


def episode(batch: Mixed, e: int, h: int) -> tuple[int, int]:
    """Row and environment of time h in episode e; two environments, episodes one after another."""
    return e // 2 * H + h, e % 2


def states(method: HNPG) -> dict[str, torch.Tensor]:
    modules = {"actor": method.actor, "critic": method.critic}
    return {
        f"{k}.{n}": p.detach().clone() for k, m in modules.items() for n, p in m.named_parameters()
    }


def moved(before: dict[str, torch.Tensor], method: HNPG, part: str) -> list[list[bool]]:
    """Of each parameter of a module, at which times it changed."""
    pairs = [(before[n], p) for n, p in states(method).items() if n.startswith(part)]
    return [[not torch.equal(a, b) for a, b in zip(p, q, strict=True)] for p, q in pairs]


# ---- tables: hybrid fitted evaluation


def two_states(weight: float, iterations: int, returns=(0.0, 0.0)) -> list[float]:
    """Feature 1 leads to feature 2, and 2 to itself; each half of the time, logged and on policy."""
    column = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    return hybrid_fitted_evaluation(
        column,
        zero,
        torch.full((2, 1), 2.0, dtype=torch.float64),
        column,
        torch.tensor(returns, dtype=torch.float64),
        discount=0.99,
        on_policy_weight=weight,
        initial=torch.ones(1, dtype=torch.float64),
        num_iterations=iterations,
    )[:, 0].tolist()


def test_two_states_by_hand():
    # E[phi phi'] = (1 * 2 + 2 * 2) / 2 = 3, E[phi^2] = 5/2: w <- 0.99 * 3 / (2.5 (1 + lambda)) w.
    assert two_states(0.0, 3) == pytest.approx([1, 1.188, 1.411344, 1.676676672], abs=1e-9)
    assert two_states(1.0, 3) == pytest.approx([1, 0.594, 0.352836, 0.209584584], abs=1e-9)
    assert two_states(3.0, 1)[1] == pytest.approx(0.297)
    assert two_states(0.0, 50)[50] == pytest.approx(1.188**50, rel=1e-9) and 1.188**50 > 5_000
    assert abs(two_states(1.0, 50)[50]) < 1e-11


def test_the_on_policy_weight_is_on_the_on_policy_term():
    # Returns 10 and 20 want the weight 10: E[phi y] = (10 + 40) / 2 = 25 against the pull of 3 w.
    assert two_states(1.0, 1, (10.0, 20.0))[1] == pytest.approx((0.99 * 3 + 25) / 5)
    assert two_states(4.0, 1, (10.0, 20.0))[1] == pytest.approx((0.99 * 3 + 4 * 25) / 12.5)
    assert two_states(1e9, 1, (10.0, 20.0))[1] == pytest.approx(10.0, abs=1e-6)


def test_evaluation_minimises_equation_1():
    """Against a least-squares solver on the stacked and weighted rows."""
    draw = np.random.default_rng(0)
    logged, following, own = (
        draw.normal(size=(7, 3)),
        draw.normal(size=(7, 3)),
        draw.normal(size=(5, 3)),
    )
    reward, returns, initial = draw.normal(size=7), draw.normal(size=5), draw.normal(size=3)
    target = reward + 0.9 * following @ initial
    scale = np.concatenate([np.full(7, 7**-0.5), np.full(5, (2.0 / 5) ** 0.5)])
    rows = np.concatenate([logged, own]) * scale[:, None]
    expected, *_ = np.linalg.lstsq(rows, np.concatenate([target, returns]) * scale)
    found = hybrid_fitted_evaluation(
        *(torch.tensor(x) for x in (logged, reward, following, own, returns)),
        discount=0.9,
        on_policy_weight=2.0,
        initial=torch.tensor(initial),
        num_iterations=1,
    )
    np.testing.assert_allclose(found[1], expected, rtol=1e-9)
    np.testing.assert_allclose(found[0], initial)


# ---- tables: the lock and the softmax actor-critic


def lock(horizon=3, num_actions=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TabularLock(horizon, num_actions, draw), draw


def enumerated_return(right, policy):
    """Over every sequence of actions and of good states."""
    horizon, _, num_actions = policy.shape
    total = 0.0
    for path in itertools.product((0, 1), repeat=horizon):
        for actions in itertools.product(range(num_actions), repeat=horizon):
            # The states beyond a fall do not exist: count a path only where it is the first of its
            # kind, by asking that what follows a fall be zeros.
            probability, reward, fallen = 0.5**horizon, 0.0, False
            for h, (state, action) in enumerate(zip(path, actions, strict=True)):
                if fallen:
                    continue
                probability *= policy[h, state, action].item()
                if action != right[h, state]:
                    reward, fallen, fell_at = 0.05, True, h
                elif h == horizon - 1:
                    reward = 1.0
            if fallen:
                probability *= (1 / num_actions) ** (horizon - 1 - fell_at)
            total += probability * reward
    return total


def test_exact_return_against_enumeration():
    table, draw = lock(3, 3)
    policy = torch.rand(table.shape, generator=draw, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    expected = enumerated_return(table.right, policy)
    assert table.expected_return(policy) == pytest.approx(expected, abs=1e-12)


def test_exact_values_by_hand():
    """Uniform over five: at the last time 1 if right, else 0.05; mean 0.24; and 0.088 before."""
    table, _ = lock(2)
    uniform = torch.full(table.shape, 0.2, dtype=torch.float64)
    values = table.exact_values(uniform)
    for h, right in ((1, 1.0), (0, 0.24)):
        for state in range(2):
            expected = [right if a == table.right[h, state] else 0.05 for a in range(5)]
            assert values[h, state].tolist() == pytest.approx(expected)
    assert not values[:, 2].any()
    assert table.expected_return(uniform) == pytest.approx(0.088)


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_samples_agree_with_exact_values(epsilon):
    table, draw = lock(3)
    policy = table.knowing_policy(epsilon)
    opens = (1 - 0.8 * epsilon) ** 3
    assert table.expected_return(policy) == pytest.approx(opens + 0.05 * (1 - opens))
    steps = table.sample(policy, 20_000, draw)
    returns = steps.reward.sum(0)
    deviation = returns.std().item() / 20_000**0.5
    assert returns.mean().item() == pytest.approx(
        table.expected_return(policy), abs=5 * deviation + 1e-9
    )
    assert torch.equal(steps.next_state[:-1], steps.state[1:])
    if epsilon == 0:
        switched = (steps.next_state != steps.state).double().mean()
        assert switched.item() == pytest.approx(0.5, abs=0.02)
    assert (steps.next_state == 0).sum().item() == pytest.approx(
        (steps.next_state == 1).sum().item(), rel=0.05
    )
    assert not steps.reward[steps.state == 2].any()
    assert (steps.next_state[steps.state == 2] == 2).all()


def fitted_by_loops(table, logged, own, policy, weight):
    """Backward sweep over dictionaries: each cell's weighted mean of targets and of returns."""
    values = torch.zeros(table.shape, dtype=torch.float64)
    for h in reversed(range(table.horizon)):
        above, below = {}, {}
        count = own.state.shape[1]
        for e in range(count):
            cell = (own.state[h, e].item(), own.action[h, e].item())
            returns = own.reward[h:, e].sum().item()
            above[cell] = above.get(cell, 0.0) + weight * returns / (count * table.horizon)
            below[cell] = below.get(cell, 0.0) + weight / (count * table.horizon)
        if logged is not None:
            count = logged.state.shape[1]
            for e in range(count):
                cell = (logged.state[h, e].item(), logged.action[h, e].item())
                target, after = logged.reward[h, e].item(), logged.next_state[h, e].item()
                if h < table.horizon - 1:
                    target += (policy[h + 1, after] * values[h + 1, after]).sum().item()
                above[cell] = above.get(cell, 0.0) + target / (count * table.horizon)
                below[cell] = below.get(cell, 0.0) + 1 / (count * table.horizon)
        for (state, action), total in above.items():
            values[h, state, action] = total / below[state, action]
    return values


@pytest.mark.parametrize("with_logs", [True, False])
def test_fitted_values_against_plain_loops(with_logs):
    table, draw = lock(3)
    policy = torch.rand(table.shape, generator=draw, dtype=torch.float64)
    policy /= policy.sum(-1, keepdim=True)
    logged = table.sample(table.knowing_policy(0.3), 40, draw) if with_logs else None
    again = torch.Generator().set_state(draw.get_state())
    own = table.sample(policy, 30, again)
    found = fitted_values(table, logged, 30, 2.5, draw, policy)
    expected = fitted_by_loops(table, logged, own, policy, 2.5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found == 0).any()


def test_actor_critic_multiplies_weights():
    """Probabilities in proportion to exp(3 * 0.5 * f) after three evaluations of a constant f."""
    f = torch.tensor([[[0.0, math.log(2.0), -1.0]]], dtype=torch.float64)
    asked = []

    def evaluate(policy):
        asked.append(policy)
        return f

    policy = softmax_actor_critic(evaluate, (1, 1, 3), eta=0.5, num_iterations=3)
    weights = np.array([1.0, 2**1.5, math.exp(-1.5)])
    np.testing.assert_allclose(policy[0, 0], weights / weights.sum())
    np.testing.assert_allclose(asked[0][0, 0], [1 / 3] * 3)
    np.testing.assert_allclose(asked[1][0, 0, 1] / asked[1][0, 0, 0], 2**0.5)


def test_actor_critic_opens_the_lock():
    """With exact values always; on samples where the uniform policy sees the reward; with logs."""
    table, draw = lock(6)
    exact = softmax_actor_critic(table.exact_values, table.shape, eta=2.0, num_iterations=60)
    assert table.expected_return(exact) > 0.999
    results = []
    for logged in (None, table.sample(table.knowing_policy(1 / 6), 300, draw)):
        policy = softmax_actor_critic(
            lambda p, logs=logged: fitted_values(table, logs, 100, 1.0, draw, p),
            table.shape,
            eta=2.0,
            num_iterations=25,
        )
        results.append(table.expected_return(policy))
    assert results[0] < 0.1 and results[1] > 0.95


# ---- the networks


def mlp(module, h, inputs):
    """Member h by its own matrices."""
    for k, (weight, bias) in enumerate(zip(module.weights, module.biases, strict=True)):
        inputs = inputs @ weight[h] + bias[h, 0]
        if k < len(module.weights) - 1:
            inputs = torch.tanh(inputs)
    return inputs


def test_each_row_is_acted_on_by_the_policy_of_its_time():
    method = build(initial_std=0.2)
    time = torch.tensor([2.0, 0.0, 1.0, 1.0, 7.0, -3.0])
    obs = torch.cat([torch.randn(6, 2), time[:, None]], 1)
    found = method.policy(obs)
    gaussians = method.actor.gaussians
    for row, h in enumerate((2, 0, 1, 1, 2, 0)):
        mean = 0.2 * mlp(gaussians.net, h, obs[row, :2])
        torch.testing.assert_close(found.mean[row], mean)
        torch.testing.assert_close(
            found.log_std[row].exp(), 0.2 * gaussians.log_std[h, 0].exp().detach()
        )
    assert torch.equal(method.act(obs, explore=False).value, found.mode())
    assert not torch.equal(method.act(obs, explore=True).value, found.mode())


def test_first_policies_are_the_papers():
    """Mean heads a tenth of their size, deviations as set."""
    torch.manual_seed(0)
    method = HNPG(Config(horizon=4, initial_std=0.2), box(5), Runtime(RUNTIME))
    gaussians, critic = method.actor.gaussians, method.critic
    assert [tuple(w.shape) for w in gaussians.net.weights] == [(4, 4, 16), (4, 16, 16), (4, 16, 2)]
    assert [tuple(w.shape) for w in critic.weights] == [(4, 6, 64), (4, 64, 64), (4, 64, 1)]
    assert 0.02 < gaussians.net.weights[2].abs().max() <= 0.1 / 16**0.5
    assert 0.01 < critic.weights[2].abs().max() <= 0.1 / 64**0.5
    assert not gaussians.net.biases[2].any() and not critic.biases[2].any()
    torch.testing.assert_close(
        method.policy(torch.zeros(1, 5)).log_std.exp(), torch.full((1, 2), 0.2)
    )


def test_critics_see_actions_in_units_of_the_first_deviation():
    method = build(initial_std=0.2)
    obs, action = torch.randn(H, 5, 2), torch.randn(H, 5, 2)
    found = method.q(obs, action)
    for h in range(H):
        expected = mlp(method.critic, h, torch.cat([obs[h], 5 * action[h]], -1)).squeeze(-1)
        torch.testing.assert_close(found[h], expected)
    times = torch.tensor([2, 0])
    torch.testing.assert_close(method.q(obs[times], action[times], times), found[times])


# ---- the critics


def tensors(draw, *shapes):
    return [torch.tensor(draw.normal(size=shape), dtype=torch.float32) for shape in shapes]


@pytest.mark.parametrize(("hybrid", "weight"), [(True, 1.0), (True, 2.5), (False, 2.5)])
def test_critic_gradient_against_numpy(hybrid, weight):
    """Of a linear critic: means of 2 (f - y) x and 2 (f - target) x, weighted as in equation 1."""
    method = build(critic_hidden=(), hybrid=hybrid, on_policy_weight=weight)
    obs, action, returns, logged_obs, logged_action, target = tensors(
        np.random.default_rng(0), (4, 2), (4, 2), (4,), (6, 2), (6, 2), (6,)
    )
    before = states(method)
    w, b = method.critic.weights[0][1, :, 0], method.critic.biases[0][1, 0, 0]
    own, theirs = torch.cat([obs, action], 1), torch.cat([logged_obs, logged_action], 1)
    own_error, error = own @ w + b - returns, theirs @ w + b - target
    expected = 2 * weight * own_error @ own / 4 + 2 * error @ theirs / 6
    if not hybrid:
        expected = 2 * own_error @ own / 4
    method.restart(method.critic_opt)
    columns = (obs, action, returns, logged_obs, logged_action, target)
    report = method.descend(torch.tensor([1]), *columns)
    # After one step from fresh moments, Adam's first moment is a tenth of the gradient.
    gradient = 10 * method.critic_opt.first_moment[0]
    torch.testing.assert_close(gradient[1, :, 0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert not gradient[0].any() and not gradient[2].any()
    assert report["on_policy_loss"].item() == pytest.approx(own_error.square().mean().item())
    assert report["logged_loss"].item() == pytest.approx(error.square().mean().item())
    assert moved(before, method, "critic") == [[False, True, False]] * 2
    assert not any(any(rows) for rows in moved(before, method, "actor"))
    # And a step of the learning rate against the gradient's sign.
    step = method.critic.weights[0] - before["critic.weights.0"]
    torch.testing.assert_close(
        step[1, :, 0], -3e-4 * expected.detach().sign(), rtol=1e-2, atol=1e-7
    )


def test_targets_bootstrap_from_the_next_critic_and_the_policys_own_action(monkeypatch):
    method = build(initial_std=0.5)
    draws = tensors(np.random.default_rng(1), (1, 4, 2))[0]
    monkeypatch.setattr(torch, "randn_like", lambda like: draws.view(like.shape))
    reward, next_obs = tensors(np.random.default_rng(2), (4,), (4, 2))
    terminated = torch.tensor([False, True, False, False])
    found = method.target(torch.tensor([2]), reward, next_obs, terminated)
    gaussians = method.actor.gaussians
    action = mlp(gaussians.net, 2, next_obs) + gaussians.log_std[2, 0].exp() * draws[0]
    value = mlp(method.critic, 2, torch.cat([next_obs, action], -1)).squeeze(-1)
    expected = (reward + torch.where(terminated, 0.0, value)).detach()
    torch.testing.assert_close(found, expected)
    assert found[1] == reward[1] and not found.requires_grad
    assert torch.equal(method.target(None, reward, next_obs, terminated), reward)


def test_sweep_goes_from_the_last_time_to_the_first_on_the_right_columns(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    method, batch = build(critic_steps=3, critic_learning_rate=1e-2), random_batch()
    seen = []

    def spy(time, *columns):
        h = int(time)
        if not seen or seen[-1] != h:
            assert not method.critic_opt.num_steps and not method.critic_opt.first_moment[0].any()
            check(h, columns)
        seen.append(h)
        return HNPG.descend(method, time, *columns)

    def check(h, columns):
        obs, action, returns, logged_obs, logged_action, target = columns
        rollout, logged = batch.rollout, batch.logged
        rows = slice(h * EPISODES, (h + 1) * EPISODES)
        assert torch.equal(logged_obs, logged.obs[rows, :2])
        assert torch.equal(logged_action, logged.action[rows])
        where = [(rollout.obs == torch.cat([row, torch.tensor([h])])).all(-1) for row in obs]
        places = [tuple(w.nonzero()[0].tolist()) for w in where]
        assert sorted(places) == sorted(episode(batch, e, h) for e in range(EPISODES))
        for k, (t, n) in enumerate(places):
            assert torch.equal(action[k], rollout.action[t, n])
            total = sum(rollout.reward[t + j, n].item() for j in range(H - h))
            assert returns[k].item() == pytest.approx(total, abs=1e-5)
        expected = logged.reward[rows].clone()
        if h < H - 1:
            # With the next time's critic as it is now, after its own regression.
            next_obs = logged.next_obs[rows, :2]
            inputs = torch.cat([next_obs, mlp(method.actor.gaussians.net, h + 1, next_obs)], -1)
            value = mlp(method.critic, h + 1, inputs).squeeze(-1)
            expected += torch.where(logged.terminated[rows], 0.0, value)
        torch.testing.assert_close(target, expected.detach())

    method._descend = spy
    method.update(batch, 0)
    assert seen == [2, 2, 2, 1, 1, 1, 0, 0, 0]


# ---- advantages


def test_on_policy_advantages_against_a_plain_loop(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    method = build(gae_lambda=0.6)
    obs, reward = tensors(np.random.default_rng(3), (H, EPISODES, 2), (H, EPISODES))
    found = method.advantages(obs, reward)
    for e in range(EPISODES):
        values = [
            mlp(
                method.critic,
                h,
                torch.cat([obs[h, e], mlp(method.actor.gaussians.net, h, obs[h, e])]),
            ).item()
            for h in range(H)
        ] + [0.0]
        for h in range(H):
            expected = sum(
                0.6 ** (k - h) * (reward[k, e].item() + values[k + 1] - values[k])
                for k in range(h, H)
            )
            assert found[h, e].item() == pytest.approx(expected, abs=1e-5)
    assert not found.requires_grad


def test_value_is_the_mean_over_drawn_actions(monkeypatch):
    """A linear critic of actions: the mean of its inputs. Ten draws of each state, not one."""
    method = build(critic_hidden=(), num_value_samples=10)
    noise = torch.randn(H, 10 * EPISODES, 2, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(torch, "randn_like", lambda like: noise.view(like.shape))
    (obs,) = tensors(np.random.default_rng(5), (H, EPISODES, 2))
    found = method.value(obs)
    for h in range(H):
        for e in range(EPISODES):
            draws = noise[h].view(10, EPISODES, 2)[:, e].mean(0)
            gaussians = method.actor.gaussians
            action = mlp(gaussians.net, h, obs[h, e]) + gaussians.log_std[h, 0].exp() * draws
            expected = mlp(method.critic, h, torch.cat([obs[h, e], action]))
            assert found[h, e].item() == pytest.approx(expected.item(), abs=1e-5)


def test_logged_states_get_new_actions_and_their_advantage_over_the_mean():
    """With a critic linear in actions, f - V is its slope times (a - mean), but for ten draws."""
    method = build(critic_hidden=(), num_value_samples=4_000, initial_std=0.5)
    (obs,) = tensors(np.random.default_rng(6), (H, 50, 2))
    torch.manual_seed(1)
    action, advantage = method.drawn_advantages(obs)
    mean, log_std = method.actor.gaussians(obs)
    standard = ((action - mean) / log_std.exp()).detach()
    assert abs(standard.mean().item()) < 0.2 and standard.std().item() == pytest.approx(1, abs=0.1)
    slope = method.critic.weights[0][:, 2:, 0]
    expected = ((action - mean) / 0.5 * slope[:, None]).sum(-1).detach()
    torch.testing.assert_close(advantage, expected, rtol=0.0, atol=0.05)
    assert not action.requires_grad and not advantage.requires_grad


# ---- the policy's step


def natural_step(obs, action, advantage, weight, bias, log_std, damping, max_kl):
    """Of one linear Gaussian policy: explicit score vectors, Fisher matrix and solve."""
    mean, std = obs @ weight + bias, np.exp(log_std)
    gradient = np.zeros(weight.size + bias.size + log_std.size)
    fisher = np.zeros((gradient.size, gradient.size))
    for row in range(len(obs)):
        z = (action[row] - mean[row]) / std
        score = np.concatenate([np.outer(obs[row], z / std).ravel(), z / std, z**2 - 1])
        gradient += advantage[row] * score / len(obs)
        for k in range(len(std)):
            of_mean = np.zeros(gradient.size)
            of_mean[: weight.size].reshape(weight.shape)[:, k] = obs[row]
            of_mean[weight.size + k] = 1
            fisher += np.outer(of_mean, of_mean) / std[k] ** 2 / len(obs)
            fisher[weight.size + bias.size + k, weight.size + bias.size + k] += 2 / len(obs)
    damped = fisher + damping * np.eye(gradient.size)
    direction = np.linalg.solve(damped, gradient)
    return direction * math.sqrt(2 * max_kl / (direction @ damped @ direction)), gradient, fisher


def test_policy_step_against_explicit_fisher_matrices():
    """Of each time by itself; the bound is so small that the whole step is taken."""
    method = build(hidden=(), conjugate_gradient_steps=25, max_kl=1e-4)
    obs, action, advantage = tensors(np.random.default_rng(7), (H, 9, 2), (H, 9, 2), (H, 9))
    gaussians, before = method.actor.gaussians, states(method)
    parts = [("log_std", 2), ("net.weights.0", 4), ("net.biases.0", 2)]
    assert [n for n, _ in gaussians.named_parameters()] == [n for n, _ in parts]
    report = method.trust_region(obs, action, advantage)
    after, rises = states(method), []
    for h in range(H):
        old = {n: before[f"actor.gaussians.{n}"][h].double().numpy() for n, _ in parts}
        step, gradient, _ = natural_step(
            *(x[h].double().numpy() for x in (obs, action, advantage)),
            old["net.weights.0"],
            old["net.biases.0"][0],
            old["log_std"][0],
            0.1,
            1e-4,
        )
        found = [
            (after[f"actor.gaussians.{n}"][h] - before[f"actor.gaussians.{n}"][h]).flatten()
            for n in ("net.weights.0", "net.biases.0", "log_std")
        ]
        np.testing.assert_allclose(torch.cat(found), step, rtol=5e-3, atol=2e-5)
        rises.append(gradient @ step)
    assert report["step_taken"].item() == 1.0
    assert 0.5e-4 < report["kl"].item() <= 1e-4
    assert report["surrogate_rise"].item() == pytest.approx(np.mean(rises), rel=0.05)
    assert all(all(rows) for rows in moved(before, method, "actor"))
    assert not any(any(rows) for rows in moved(before, method, "critic"))


def test_policy_step_respects_its_bound():
    """Large advantages and little damping: the quadratic step would go too far."""
    method = build(max_kl=0.05, damping=1e-4)
    obs, action, advantage = tensors(np.random.default_rng(8), (H, 6, 2), (H, 6, 2), (H, 6))
    with torch.no_grad():
        old = [x.double() for x in method.actor.gaussians(obs)]
    report = method.trust_region(obs, action, 100 * advantage)
    with torch.no_grad():
        new = [x.double() for x in method.actor.gaussians(obs)]
    divergence = (
        torch.distributions.kl_divergence(
            torch.distributions.Normal(old[0], old[1].exp()),
            torch.distributions.Normal(new[0], new[1].exp()),
        )
        .sum(-1)
        .mean(-1)
    )
    assert (divergence <= 0.05 + 1e-6).all() and (divergence > 0.005).all()
    assert report["kl"].item() == pytest.approx(divergence.mean().item(), rel=1e-3)


def test_a_policy_without_advantage_stays():
    method = build()
    before = states(method)
    obs, action, advantage = tensors(np.random.default_rng(9), (H, 6, 2), (H, 6, 2), (H, 6))
    advantage[1] = 0
    method.trust_region(obs, action, advantage)
    assert moved(before, method, "actor") == [[True, False, True]] * len(
        list(method.actor.parameters())
    )


def test_policy_learns_from_both_halves_with_equal_weight(monkeypatch):
    method = build()
    obs, action, reward, logged_obs = tensors(
        np.random.default_rng(10), (H, 4, 2), (H, 4, 2), (H, 4), (H, 4, 2)
    )
    given = {}

    def spy(*columns):
        given["columns"] = columns
        return {}

    monkeypatch.setattr(method, "trust_region", spy)
    torch.manual_seed(3)
    method.improve(obs, action, reward, logged_obs)
    torch.manual_seed(3)
    advantage = method.advantages(obs, reward)
    drawn, logged_advantage = method.drawn_advantages(logged_obs)
    for found, parts in zip(
        given["columns"],
        ((obs, logged_obs), (action, drawn), (advantage, logged_advantage)),
        strict=True,
    ):
        assert torch.equal(found, torch.cat(parts, 1))
    alone = build(hybrid=False)
    monkeypatch.setattr(alone, "trust_region", spy)
    torch.manual_seed(3)
    alone.improve(obs, action, reward, logged_obs)
    for found, part in zip(given["columns"], (obs, action, advantage), strict=True):
        assert torch.equal(found, part)


def test_without_the_hybrid_terms_logs_change_nothing():
    for hybrid in (True, False):
        results = []
        for seed in (1, 2):
            method = build(hybrid=hybrid)
            mixed = Mixed(random_batch().rollout, random_batch(seed).logged)
            torch.manual_seed(5)
            metrics = method.update(mixed, 0)
            results.append(states(method))
            assert all(v.ndim == 0 and torch.isfinite(v) for v in metrics.values())
        same = [torch.equal(results[0][n], results[1][n]) for n in results[0]]
        assert not any(same) if hybrid else all(same)


def test_an_update_moves_every_policy_and_every_critic():
    method = build()
    before = states(method)
    method.update(random_batch(), 0)
    for part in ("actor", "critic"):
        assert all(all(rows) for rows in moved(before, method, part))


def test_a_restored_learner_goes_on_bit_for_bit():
    first, second = build(), build(seed=9)
    first.update(random_batch(), 0)
    second.load_state_dict(first.state_dict())
    for method in (first, second):
        torch.manual_seed(4)
        method.update(random_batch(1), 1)
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])), name


# ---- a task with a known answer


class Targets:
    """Three steps, each with its own best action; reward -(a - best)^2."""

    best = (0.3, -0.4, 0.1)

    def __init__(self, spec):
        self.spec, self.time = spec, 0

    def obs(self):
        obs = np.ones((self.spec.num_envs, 2), np.float32)
        obs[:, 1] = self.time
        return obs

    def reset(self, iteration):
        self.time = 0
        return self.obs()

    def step(self, action, step):
        reward = -((action[:, 0].numpy() - self.best[self.time]) ** 2)
        self.time += 1
        next_obs, ended = self.obs(), self.time == H
        if ended:
            self.time = 0
        return SimpleNamespace(
            reward=reward,
            next_obs=next_obs,
            obs=self.obs(),
            terminated=np.full(self.spec.num_envs, ended),
            truncated=np.zeros(self.spec.num_envs, bool),
            episodes=[],
        )


def target_logs(episodes=50):
    draw = np.random.default_rng(0)
    action = draw.uniform(-1, 1, (episodes * H, 1)).astype(np.float32)
    step = np.tile(np.arange(H), episodes)
    reward = -((action[:, 0] - np.array(Targets.best)[step]) ** 2)
    obs = np.stack([np.ones(len(step)), step], 1).astype(np.float32)
    next_obs = np.stack([np.ones(len(step)), step + 1], 1).astype(np.float32)
    ends = torch.from_numpy(step == H - 1)
    rows = Transitions(
        obs=torch.from_numpy(obs),
        action=torch.from_numpy(action),
        reward=torch.from_numpy(reward.astype(np.float32)),
        next_obs=torch.from_numpy(next_obs),
        terminated=ends,
        truncated=torch.zeros_like(ends),
    )
    return Dataset(transitions=rows, step=torch.from_numpy(step), name="targets")


@pytest.mark.parametrize("hybrid", [True, False])
def test_finds_the_best_action_of_every_time(hybrid):
    spec = box(2, 1, num_envs=20)
    torch.manual_seed(0)
    cfg = Config(
        horizon=H,
        batch_size=120,
        hybrid=hybrid,
        hidden=(),
        critic_hidden=(16,),
        critic_learning_rate=3e-2,
        critic_steps=5,
        conjugate_gradient_steps=4,
        initial_std=0.5,
        max_kl=0.1,
    )
    method, envs = HNPG(cfg, spec, Runtime(RUNTIME)), Targets(spec)
    state = LoopState(torch.from_numpy(envs.reset(0)))
    experience = method.experience(target_logs())
    updates = 0
    for progress in online(method, envs, experience, state, seed=0, steps=120 * 20):
        updates += len(progress.metrics)
    assert updates == 20
    obs = torch.tensor([[1.0, float(h)] for h in range(H)])
    found = method.policy(obs)
    assert found.mode()[:, 0].tolist() == pytest.approx(Targets.best, abs=0.12)
    assert found.log_std.exp().max().item() < 0.25


# ---- settings and tasks that are refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("horizon", 0),
        ("batch_size", 0),
        ("on_policy_weight", -0.1),
        ("gae_lambda", 1.1),
        ("max_kl", 0.0),
        ("damping", -0.1),
        ("conjugate_gradient_steps", 0),
        ("num_backtracks", 0),
        ("accept_ratio", 1.0),
        ("critic_learning_rate", 0.0),
        ("critic_steps", 0),
        ("num_value_samples", 0),
        ("initial_std", 0.0),
        ("hidden", (0,)),
        ("critic_hidden", (8, -1)),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name} must be "):
        Config(**{name: value})


def test_tasks_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="hnpg needs a continuous"):
        build(Spec(obs_shape=(3,), action_shape=(), num_actions=2))
    with pytest.raises(UserError, match="hnpg needs observations of 2 or more numbers"):
        build(box(1))


# ---- the lock


def plain(env, obs):
    """Unmixed: one-hot state, one-hot time."""
    size = len(obs) - 1
    return (env.mixing.T @ obs[:-1].astype(np.float64)) / size


def choose(latent, by=5.0):
    return by * np.eye(10)[latent]


def test_observations_are_mixed_one_hots_with_the_time_last():
    env = CombinationLock(horizon=5, noise=0.0)
    assert env.observation_space.shape == (17,) and env.mixing.shape == (16, 16)
    np.testing.assert_array_equal(env.mixing @ env.mixing.T, 16 * np.eye(16))
    obs, _ = env.reset(seed=0)
    for time in range(5):
        expected = np.zeros(16)
        expected[[env.state, 3 + time]] = 1
        np.testing.assert_allclose(plain(env, obs), expected, atol=1e-6)
        assert obs[-1] == time and obs.dtype == np.float32
        obs, *_ = env.step(choose(env.right[time, min(env.state, 1)]))
    assert obs[-1] == 5
    assert CombinationLock(horizon=50).observation_space.shape == (65,)


def test_noise_has_its_deviation_before_mixing():
    env = CombinationLock(horizon=5, noise=0.1)
    rows = []
    for seed in range(400):
        obs, _ = env.reset(seed=seed)
        noise = plain(env, obs)
        noise[[env.state, 3]] -= 1
        rows.append(noise)
    rows = np.array(rows)
    assert np.abs(rows[:, 9:]).max() < 1e-6
    np.testing.assert_allclose(rows[:, :9].std(0), 0.1, rtol=0.2)


def test_the_combination_opens_it_through_both_good_states():
    env, visited = CombinationLock(horizon=4), []
    for seed in range(200):
        env.reset(seed=seed)
        rewards = []
        for time in range(4):
            visited.append((time, env.state))
            _, reward, terminated, truncated, _ = env.step(choose(env.right[time, env.state]))
            rewards.append(reward)
            assert terminated == (time == 3) and not truncated
        assert rewards == [0, 0, 0, 1]
    states = np.array([state for _, state in visited]).reshape(200, 4)
    assert ((states.mean(0) > 0.35) & (states.mean(0) < 0.65)).all()
    switched = (states[:, 1:] != states[:, :-1]).mean(0)
    assert ((switched > 0.35) & (switched < 0.65)).all()


@pytest.mark.parametrize("decoy", ["on_fall", "last_step"])
def test_the_decoy_is_paid_when_the_setting_says(decoy):
    env, paid = CombinationLock(horizon=4, decoy=decoy), []
    for seed in range(400):
        env.reset(seed=seed)
        rewards = []
        for time in range(4):
            right = env.right[time, min(env.state, 1)]
            wrong = time >= 1  # The first fall is at time 1.
            rewards.append(env.step(choose((right + wrong) % 10))[1])
            assert (env.state == 2) == wrong
        paid.append(rewards)
    paid = np.array(paid)
    at = 1 if decoy == "on_fall" else 3
    assert not np.delete(paid, at, 1).any()
    assert set(paid[:, at]) == {0.0, 0.1}
    assert 0.4 < (paid[:, at] > 0).mean() < 0.6


def test_a_fall_at_the_last_step_pays_the_decoy_once():
    for decoy in ("on_fall", "last_step"):
        env = CombinationLock(horizon=1, decoy=decoy)
        rewards = []
        for seed in range(300):
            env.reset(seed=seed)
            rewards.append(env.step(choose((env.right[0, env.state] + 1) % 10))[1])
        assert set(rewards) == {0.0, 0.1} and 0.04 < np.mean(rewards) < 0.06


def test_latent_actions_follow_the_softmax():
    env = CombinationLock(horizon=1)
    env.reset(seed=0)
    action = np.array([0.1, 0.2, 0.0, 0, 0, 0, 0, 0, 0, -5.0])
    counts = np.bincount([env._choose(action) for _ in range(20_000)], minlength=10)
    weights = np.exp([1, 2, 0, 0, 0, 0, 0, 0, 0, -50])
    expected = 20_000 * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1e-9).all()


def test_locks_are_told_apart_by_their_combination_alone():
    same, other = CombinationLock(8, combination=1), CombinationLock(8, combination=2)
    again = CombinationLock(8, combination=1)
    assert (same.right == again.right).all() and (same.right != other.right).any()
    for settings in ({"horizon": 0}, {"decoy": "never"}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} must be"):
            CombinationLock(**settings)


def test_logged_episodes_of_the_lock():
    columns = datasets.combination_lock(5, 600)
    rows = {name: column.reshape(600, 5, *column.shape[1:]) for name, column in columns.items()}
    assert (rows["observations"][..., -1] == np.arange(5)).all()
    assert rows["terminations"][:, -1].all() and not rows["terminations"][:, :-1].any()
    opened = (rows["rewards"][:, -1] == 1).mean()
    # 0.82^5 = 0.371, with a deviation of 0.02.
    assert 0.30 < opened < 0.44
    greedy = ((rows["actions"] == 0) | (rows["actions"] == 1)).all(-1)
    assert 0.76 < greedy.mean() < 0.84
    right = CombinationLock(5).right
    chosen = rows["actions"].argmax(-1)
    for time in range(5):
        assert set(chosen[:, time][greedy[:, time]]) == set(right[time])
    assert (rows["actions"][greedy].sum(-1) == 1).all()
    assert (columns["actions"] == datasets.combination_lock(5, 600)["actions"]).all()


# ---- any task as one of a fixed horizon


def test_finite_horizon_tells_the_time_and_stays_where_the_task_ended():
    env = FiniteHorizon("CartPole-v1", 60)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == (5,) and obs[-1] == 0
    rewards, rows = [], []
    for time in range(60):
        obs, reward, terminated, truncated, _ = env.step(0)
        assert obs[-1] == time + 1 and obs.dtype == np.float32 and not truncated
        assert terminated == (time == 59)
        rewards.append(reward)
        rows.append(obs[:-1])
    alive = int(sum(rewards))
    assert 5 < alive < 20 and rewards == [1.0] * alive + [0.0] * (60 - alive)
    assert (np.array(rows)[alive - 1 :] == rows[alive - 1]).all()
    assert not (rows[alive - 2] == rows[alive - 1]).all()
    obs, _ = env.reset(seed=1)
    assert obs[-1] == 0 and env.step(0)[1] == 1.0


def test_finite_horizon_cuts_a_task_that_has_no_end():
    env = FiniteHorizon("Pendulum-v1", 3, g=9.0)
    env.reset(seed=0)
    assert env.unwrapped.g == 9.0
    ends = [env.step(np.zeros(1, np.float32))[2] for _ in range(3)]
    assert ends == [False, False, True]
    with pytest.raises(UserError, match="horizon must be >= 1"):
        FiniteHorizon("Pendulum-v1", 0)


# ---- the recipes


def test_arms_of_the_proof_differ_in_what_is_claimed():
    claims = {claim.name: claim for claim in hnpg.proof().claims}
    pair = [claims["continuous lock"].arms[name](0) for name in ("hnpg", "trpo")]
    assert [e.method.hybrid for e in pair] == [True, False]
    assert pair[0].stages == pair[1].stages
    weights = [make(0).method.on_policy_weight for make in claims["doubly robust"].arms.values()]
    assert weights == [0.0, 1.0]
    assert len(claims["exploration"].arms) == 6
