"""PPO: rollouts against a plain loop, who gets gradients, and tasks with known answers."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esscher.errors import UserError
from esscher.loops.online import LoopState, online
from esscher.methods.control.ppo import PPO, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Rollout, Spec

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
PLAIN = {"normalize_obs": False, "normalize_reward": False, "normalize_advantage": False}


def box(obs_dim=2, action_dim=2, num_envs=1) -> Spec:
    return Spec(
        obs_shape=(obs_dim,),
        action_shape=(action_dim,),
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        num_envs=num_envs,
    )


def choices(obs_dim=2, num_actions=3, num_envs=1) -> Spec:
    return Spec(obs_shape=(obs_dim,), action_shape=(), num_actions=num_actions, num_envs=num_envs)


def build(spec: Spec, seed=0, **settings: Any) -> PPO:
    torch.manual_seed(seed)
    settings = {"hidden": (8,), "rollout_length": 12, "num_minibatches": 4, "epochs": 2, **settings}
    return PPO(Config(**settings), spec, Runtime(RUNTIME))


class Envs:
    """A task without randomness of its own: obs from a function of (iteration, copy)."""

    def __init__(
        self,
        spec: Spec,
        obs: Callable[[int], torch.Tensor],
        reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        episode: int = 1,
        terminates: bool = True,
    ):
        self.spec, self._obs, self._reward = spec, obs, reward
        self._episode, self._terminates, self._time = episode, terminates, 0

    def reset(self, iteration):
        self.obs = self._obs(0)
        return self.obs.numpy()

    def step(self, action, step):
        reward = self._reward(self.obs, action)
        self._time += 1
        self.obs = self._obs(self._time)
        ended = torch.full((self.spec.num_envs,), self._time % self._episode == 0)
        never = torch.zeros_like(ended)
        return SimpleNamespace(
            reward=reward.numpy(),
            next_obs=self.obs.numpy(),
            obs=self.obs.numpy(),
            terminated=(ended if self._terminates else never).numpy(),
            truncated=(never if self._terminates else ended).numpy(),
            episodes=[],
        )


def drive(method: PPO, envs: Envs, steps: int) -> list[dict[str, torch.Tensor]]:
    """Metrics of every update."""
    state = LoopState(torch.from_numpy(envs.reset(0)))
    loop = online(method, envs, method.experience(), state, seed=0, steps=steps)
    return [metrics for progress in loop for metrics in progress.metrics]


def rollout(method: PPO, seed=0, ends=0.15, scale=1.0) -> Rollout:
    """Random steps with both kinds of ends, acted on by the method."""
    spec, length = method.spec, method.cfg.rollout_length
    torch.manual_seed(seed)
    obs = scale * torch.randn(length + 1, spec.num_envs, spec.obs_dim) + scale
    actions = [method.act(row, explore=True) for row in obs[:-1]]
    lead = (length, spec.num_envs)
    return Rollout(
        obs=obs[:-1],
        action=torch.stack([a.value for a in actions]),
        reward=torch.randn(lead) * 3 + 1,
        next_obs=obs[1:] + 0.1,
        terminated=torch.rand(lead) < ends,
        truncated=torch.rand(lead) < ends,
        extras={k: torch.stack([a.extras[k] for a in actions]) for k in ("logp", "value")},
    )


def spy(method: PPO) -> list[dict[str, Any]]:
    """Record what each minibatch was given and what it reported."""
    calls: list[dict[str, Any]] = []
    names = ("obs", "action", "old_logp", "old_value", "advantage", "returns")

    def record(*columns):
        report = method.descend(*columns)
        calls.append({**dict(zip(names, columns, strict=True)), "report": report})
        return report

    method._descend = record
    return calls


def flat(batch: Rollout) -> list[torch.Tensor]:
    columns = (batch.obs, batch.action, batch.extras["logp"], batch.extras["value"])
    return [column.flatten(0, 1) for column in columns]


def states(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# The rollout against a plain loop


def plain_scaled_rewards(batch, carried, past, discount):
    """Divide by the deviation of all discounted returns seen so far; `past` and `carried` grow."""
    length, num_envs = batch.reward.shape
    for n in range(num_envs):
        for t in range(length):
            carried[n] = discount * carried[n] + batch.reward[t, n].item()
            past.append(carried[n])
            if batch.terminated[t, n] or batch.truncated[t, n]:
                carried[n] = 0.0
    mean = sum(past) / len(past)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in past) / len(past))
    return [
        [max(-10.0, min(10.0, batch.reward[t, n].item() / deviation)) for n in range(num_envs)]
        for t in range(length)
    ]


def plain_advantages(method, batch, reward, discount, lambda_):
    """Each advantage as its own sum over the rest of its episode."""
    length, num_envs = batch.reward.shape
    table = torch.zeros(length, num_envs)
    for n in range(num_envs):
        for t in range(length):
            weight = 1.0
            for k in range(t, length):
                ahead = method.value(batch.next_obs[k, n : n + 1]).item()
                future = 0.0 if batch.terminated[k, n] else discount * ahead
                delta = reward[k][n] + future - batch.extras["value"][k, n].item()
                table[t, n] += weight * delta
                weight *= discount * lambda_
                if batch.terminated[k, n] or batch.truncated[k, n]:
                    break
    return table


@pytest.mark.parametrize("spec", [box(num_envs=3), choices(num_envs=3)])
def test_advantages_equal_a_plain_loop_over_two_rollouts(spec):
    method = build(spec, discount=0.9, gae_lambda=0.8)
    carried, past = [0.0] * 3, []
    for seed in range(2):
        batch = rollout(method, seed)
        assert batch.terminated.any()
        assert (batch.truncated & ~batch.terminated).any()
        reward = plain_scaled_rewards(batch, carried, past, 0.9)
        expected = plain_advantages(method, batch, reward, 0.9, 0.8)
        torch.testing.assert_close(method.advantages(batch), expected, rtol=1e-3, atol=1e-4)
        assert method.discounted_return.tolist() == pytest.approx(carried, rel=1e-4, abs=1e-5)


def test_rewards_stay_as_they_are_if_asked():
    method = build(box(), **PLAIN, discount=0.9, gae_lambda=0.8)
    batch = rollout(method)
    expected = plain_advantages(method, batch, batch.reward.tolist(), 0.9, 0.8)
    torch.testing.assert_close(method.advantages(batch), expected, rtol=1e-4, atol=1e-5)


def test_scaled_rewards_are_clipped_and_keep_their_sign_and_zero():
    method = build(box(), rollout_length=100, discount=0.0)
    batch = rollout(method)
    batch.reward.zero_()
    batch.reward[5], batch.reward[50] = 1000.0, -0.5
    scaled = method.scaled_reward(batch).squeeze(-1)
    # Returns are the rewards: one of 1000 among 100 has the deviation 99.5.
    assert scaled[5].item() == 10.0
    assert scaled[50].item() == pytest.approx(-0.5 / 99.5, rel=1e-3)
    assert scaled[0].item() == 0.0


@pytest.mark.parametrize("spec", [box(num_envs=2), choices(num_envs=2)])
def test_epochs_visit_every_row_once_with_its_own_numbers(spec):
    method = build(spec, epochs=3, rollout_length=10, num_minibatches=5)
    calls, batch = spy(method), rollout(method)
    # The same rollout twice through `advantages` would count its rewards twice.
    twin = build(spec, epochs=3, rollout_length=10, num_minibatches=5)
    advantage = twin.advantages(batch)
    columns = [*flat(batch), advantage.flatten(), (advantage + batch.extras["value"]).flatten()]
    names = ("obs", "action", "old_logp", "old_value", "advantage", "returns")
    torch.manual_seed(3)
    method.update(batch, 0)
    assert len(calls) == 15
    orders = []
    for epoch in range(3):
        part = calls[5 * epoch : 5 * epoch + 5]
        assert all(len(call["obs"]) == 4 for call in part)
        logp = torch.cat([call["old_logp"] for call in part])
        order = [int((columns[2] == x).nonzero()[0, 0]) for x in logp]
        assert sorted(order) == list(range(20))
        orders.append(order)
        for name, column in zip(names, columns, strict=True):
            torch.testing.assert_close(torch.cat([call[name] for call in part]), column[order])
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != list(range(20))


# The loss


def numbers(*values):
    return torch.tensor(values)


def test_loss_by_hand():
    """Two actions of equal probability 1/2 = exp(-0.693147); old ones chosen to give the ratios."""
    method = build(
        choices(1, 2), **PLAIN, hidden=(), value_coefficient=0.25, entropy_coefficient=0.1
    )
    with torch.no_grad():
        for parameter in (*method.actor.parameters(), *method.critic.parameters()):
            parameter.zero_()
        method.critic.net.biases[0].fill_(1.0)
    ratio = numbers(1.5, 0.5, 1.5, 0.5, 1.1)
    advantage = numbers(2.0, 2.0, -2.0, -2.0, 1.0)
    old_logp = math.log(0.5) - ratio.log()
    returns = numbers(1.0, 2.0, 3.0, 1.0, -1.0)
    loss, report = method.loss(
        torch.zeros(5, 1),
        torch.zeros(5, dtype=torch.int64),
        old_logp,
        0 * ratio,
        advantage,
        returns,
    )
    # Clipped to 1.2 * 2; pessimistic 0.5 * 2; 1.5 * -2; clipped to 0.8 * -2; inside: 1.1.
    surrogate = -(2.4 + 1.0 - 3.0 - 1.6 + 1.1) / 5
    value_loss = 0.5 * (0 + 1 + 4 + 0 + 4) / 5
    entropy = math.log(2)
    assert report["policy_loss"].item() == pytest.approx(surrogate, abs=1e-6)
    assert report["value_loss"].item() == pytest.approx(value_loss)
    assert report["entropy"].item() == pytest.approx(entropy)
    assert report["clip_fraction"].item() == pytest.approx(0.8)
    # ratio - 1 - log ratio: 0.094535 (twice), 0.193147 (twice), 0.004690.
    assert report["approx_kl"].item() == pytest.approx(0.116011, abs=1e-5)
    expected = surrogate + 0.25 * value_loss - 0.1 * entropy
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_gradient_stops_where_the_ratio_has_gone_far_enough():
    method = build(choices(1, 2), **PLAIN, hidden=())
    with torch.no_grad():
        for parameter in method.actor.parameters():
            parameter.zero_()
    logits = method.actor.net.net.biases[0]

    def slope(ratio, advantage):
        old_logp = numbers(math.log(0.5) - math.log(ratio))
        zeros = torch.zeros(1)
        columns = (torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), old_logp, zeros)
        loss, _ = method.loss(*columns, numbers(advantage), zeros)
        return torch.autograd.grad(loss, logits)[0][0].item()

    # d/dlogit of -ratio A is -ratio A / 2 at probability 1/2; zero past the bound that pays.
    assert slope(1.0, 1.0) == pytest.approx(-0.5)
    assert slope(1.0, -1.0) == pytest.approx(0.5)
    assert slope(1.5, 1.0) == 0.0
    assert slope(0.5, -1.0) == 0.0
    assert slope(1.5, -1.0) == pytest.approx(0.75)
    assert slope(0.5, 1.0) == pytest.approx(-0.25)


def test_whitening_uses_the_minibatch():
    advantage, ratio = numbers(1.0, 2.0, 3.0, 6.0), numbers(1.1, 1.0, 1.0, 0.9)
    settings = {**PLAIN, "normalize_advantage": True}
    method = build(choices(1, 2), **settings, hidden=())
    with torch.no_grad():
        for parameter in method.actor.parameters():
            parameter.zero_()
    old_logp = math.log(0.5) - ratio.log()
    columns = (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), old_logp, 0 * ratio)
    _, report = method.loss(*columns, advantage, 0 * ratio)
    # Mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5: whitened -2, -1, 0, 3 over sqrt(3.5).
    expected = -(1.1 * -2 - 1 + 0 + 0.9 * 3) / math.sqrt(3.5) / 4
    assert report["policy_loss"].item() == pytest.approx(expected, abs=1e-6)


def test_value_clip_by_hand():
    method = build(choices(1, 2), **PLAIN, hidden=(), value_clip=0.5)
    with torch.no_grad():
        for parameter in method.critic.parameters():
            parameter.zero_()
        method.critic.net.biases[0].fill_(2.0)
    old_value, returns = numbers(1.0, 1.0, 1.8), numbers(3.0, 0.0, 3.0)
    columns = (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(3), old_value)
    loss, report = method.loss(*columns, torch.zeros(3), returns)
    # Near values 1.5, 1.5, 2: max(1, 2.25), max(4, 2.25), max(1, 1).
    assert report["value_loss"].item() == pytest.approx(0.5 * (2.25 + 4 + 1) / 3)
    # The first row's error is that of the clipped value, without gradient; 2 and -1 remain.
    (gradient,) = torch.autograd.grad(loss, [method.critic.net.biases[0]])
    assert gradient.item() == pytest.approx(0.5 * (2 - 1) / 3)


@pytest.mark.parametrize("spec", [box(), choices()])
def test_gradient_reach(spec):
    method = build(spec, value_coefficient=0.0)
    batch = rollout(method)
    rows = [*flat(batch), *torch.randn(2, 12)]
    actor, critic = list(method.actor.parameters()), list(method.critic.parameters())

    def reached(**weights):
        method.cfg = Config(hidden=(8,), **weights)
        loss, report = method.loss(*rows)
        assert not any(value.requires_grad for value in report.values())
        grads = torch.autograd.grad(loss, actor + critic, allow_unused=True)
        found = [g is not None and bool(g.abs().sum() > 0) for g in grads]
        return found[: len(actor)], found[len(actor) :]

    # Surrogate alone: the whole actor (its log_std too), nothing of the critic.
    to_actor, to_critic = reached(value_coefficient=0.0)
    assert all(to_actor)
    assert not any(to_critic)
    to_actor, to_critic = reached(value_coefficient=0.5)
    assert all(to_actor)
    assert all(to_critic)
    # With equal advantages, whitened to 0, the values' loss reaches the critic alone.
    rows[-2] = torch.full((12,), 0.7)
    to_actor, to_critic = reached(value_coefficient=0.5)
    assert not any(to_actor)
    assert all(to_critic)
    # And the entropy the actor alone.
    assert any(reached(value_coefficient=0.0, entropy_coefficient=0.1)[0])


def test_an_update_moves_all_of_actor_and_critic_and_a_weight_of_zero_spares_the_critic():
    for coefficient, expected in ((0.5, True), (0.0, False)):
        method = build(box(), value_coefficient=coefficient)
        actor, critic = states(method.actor), states(method.critic)
        metrics = method.update(rollout(method), 0)
        assert all(not torch.equal(p, q) for p, q in zip(states(method.actor), actor, strict=True))
        changed = [
            not torch.equal(p, q) for p, q in zip(states(method.critic), critic, strict=True)
        ]
        assert changed == [expected] * len(critic)
        assert all(v.ndim == 0 and torch.isfinite(v) for v in metrics.values())
        assert set(metrics) == {
            "policy_loss",
            "value_loss",
            "entropy",
            "approx_kl",
            "clip_fraction",
            "explained_variance",
        }


def test_gradients_are_clipped_jointly():
    for limit, expected in ((0.01, 0.01), (None, None)):
        method = build(box(), epochs=1, num_minibatches=1, max_grad_norm=limit)
        method.update(rollout(method), 0)
        # After one step Adam's first moments are a tenth of the gradients.
        parts = [moment.square().sum() for moment in method.opt.first_moment]
        norm = 10 * torch.stack(parts).sum().sqrt().item()
        assert norm == pytest.approx(expected, rel=1e-3) if expected else norm > 0.1


def test_explained_variance():
    method = build(box(), **PLAIN, gae_lambda=1.0, discount=0.0, epochs=1)
    batch = rollout(method)
    batch.extras["value"].copy_(batch.reward)
    # Values that foresaw every return (discount 0: the reward), then values that foresaw nothing.
    assert method.update(batch, 0)["explained_variance"].item() == pytest.approx(1.0)
    batch.extras["value"].zero_()
    assert method.update(batch, 0)["explained_variance"].item() == pytest.approx(0.0, abs=1e-5)


# Moments


@pytest.mark.parametrize("spec", [box(num_envs=2), choices(num_envs=2)])
def test_first_ratios_of_every_update_are_one(spec):
    """And would not be, had the moments changed between acting and learning."""
    method = build(spec, learning_rate=1e-2)
    calls = spy(method)
    for seed in range(3):
        batch = rollout(method, seed, scale=5.0)
        calls.clear()
        method.update(batch, seed)
        assert calls[0]["report"]["approx_kl"].item() < 1e-10
        assert calls[0]["report"]["clip_fraction"].item() == 0.0
        assert calls[-1]["report"]["approx_kl"].item() > 1e-5
    batch = rollout(method, 3)
    method.actor.moments.observe(50 + batch.obs.flatten(0, 1))
    calls.clear()
    method.update(batch, 3)
    assert calls[0]["report"]["approx_kl"].item() > 1e-5


def test_moments_hold_every_observation_acted_on_and_are_deployed():
    method = build(box(num_envs=2))
    seen = []
    for seed in range(3):
        batch = rollout(method, seed, scale=5.0)
        seen.append(batch.obs.flatten(0, 1))
        method.update(batch, seed)
    seen = torch.cat(seen)
    moments = method.policy.moments
    torch.testing.assert_close(moments.mean, seen.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moments.variance, seen.var(0, correction=0), rtol=1e-3, atol=1e-3)
    assert "moments.mean" in method.policy.state_dict()
    # The policy takes observations as they come, and so does the critic.
    obs = seen[:4]
    normal = ((obs - moments.mean) / (moments.variance + 1e-8).sqrt()).clamp(-10, 10)
    torch.testing.assert_close(method.policy(obs).mode(), method.policy.net(normal).mode())
    torch.testing.assert_close(method.value(obs), method.critic(normal).mean[0])
    assert not torch.allclose(method.policy(obs).mode(), method.policy.net(obs).mode())


def test_a_restored_learner_goes_on_bit_for_bit():
    spec = box(num_envs=2)
    first, second = build(spec), build(spec, seed=9)
    first.update(rollout(first), 0)
    assert first.discounted_return.abs().sum() > 0
    second.load_state_dict(first.state_dict())
    for method in (first, second):
        batch = rollout(method, 1)
        torch.manual_seed(4)
        method.update(batch, 1)
    left, right = first.state_dict(), second.state_dict()
    assert {"discounted_return", "return_moments.variance", "actor.moments.mean"} <= left.keys()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])), name


# Acting and settings


def test_acting_reports_the_log_probability_of_the_unclipped_action():
    method = build(box(), initial_log_std=1.0)
    obs = torch.randn(500, 2)
    torch.manual_seed(0)
    action = method.act(obs, explore=True)
    assert action.value.abs().max().item() > 1.0
    mean = method.policy(obs).mode()
    normal = torch.distributions.Normal(mean, math.e)
    torch.testing.assert_close(action.extras["logp"], normal.log_prob(action.value).sum(-1))
    torch.testing.assert_close(action.extras["value"], method.value(obs))
    assert torch.equal(method.act(obs, explore=False).value, mean)


def test_target_kl_stops_after_the_epoch_that_exceeds_it():
    for target, expected in ((1e-9, 4), (None, 20), (1e9, 20)):
        method = build(box(), epochs=5, target_kl=target, learning_rate=1e-2)
        calls = spy(method)
        method.update(rollout(method), 0)
        assert len(calls) == expected


def test_rollouts_must_divide_into_minibatches():
    with pytest.raises(UserError, match=r"got 4, and rollout_length 10 times env.num 3 is 30"):
        build(box(num_envs=3), rollout_length=10, num_minibatches=4)
    build(box(num_envs=2), rollout_length=10, num_minibatches=4)
    with pytest.raises(UserError, match=r"2 or more transitions a minibatch, got 12"):
        build(box(), rollout_length=12, num_minibatches=12)
    build(box(), rollout_length=12, num_minibatches=12, normalize_advantage=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discount", 1.0),
        ("gae_lambda", 1.1),
        ("clip", 0.0),
        ("epochs", 0),
        ("entropy_coefficient", -0.1),
        ("value_clip", 0.0),
        ("max_grad_norm", -1.0),
        ("target_kl", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be .*, got {value}"):
        Config(**{name: value})


# Tasks with known answers


def test_learns_the_best_action_of_every_context():
    table = torch.tensor([[0.0, 1.0, 0.5, 0.2], [0.3, 0.0, 0.1, 0.7], [0.4, 0.3, 0.0, 0.1]])
    spec = choices(3, 4, num_envs=12)
    contexts = torch.eye(3).repeat(4, 1)
    envs = Envs(spec, lambda time: contexts, lambda obs, a: table[obs.argmax(-1), a])
    method = build(
        spec,
        hidden=(16,),
        learning_rate=2e-2,
        rollout_length=8,
        num_minibatches=4,
        epochs=4,
        normalize_reward=False,
    )
    metrics = drive(method, envs, 40 * 8 * 12)
    assert len(metrics) == 40
    distribution = method.policy(torch.eye(3))
    assert distribution.mode().tolist() == [1, 3, 0]
    assert distribution.logits.amax(-1).exp().min().item() > 0.9
    # Every step terminates, so a context's value is its best reward.
    value = method.value(torch.eye(3))
    assert value.tolist() == pytest.approx([1.0, 0.7, 0.4], abs=0.1)


@pytest.mark.parametrize("terminates", [False, True])
def test_value_of_a_constant_reward(terminates):
    """Reward 1 for ever is worth 1 / (1 - discount) = 10, though the recording stops at step 5.

    If it were the task that ends there, the five states of an episode, which look the same, would
    be worth (1 - 0.9^k) / 0.1 for k = 1 to 5: between 1 and 4.1.
    """
    spec = choices(1, 2, num_envs=4)
    one = torch.ones(4, 1)
    envs = Envs(spec, lambda time: one, lambda obs, a: torch.ones(4), 5, terminates)
    method = build(
        spec,
        hidden=(),
        discount=0.9,
        gae_lambda=0.5,
        learning_rate=5e-2,
        rollout_length=10,
        num_minibatches=2,
        epochs=4,
        max_grad_norm=None,
        normalize_obs=False,
        normalize_reward=False,
    )
    drive(method, envs, 60 * 40)
    value = method.value(torch.ones(1, 1)).item()
    if terminates:
        assert 1.0 < value < 4.2
    else:
        assert value == pytest.approx(10.0, rel=0.02)
