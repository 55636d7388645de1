"""TD3: the target by hand, who moves when, and a bandit whose best action is known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esscher.errors import UserError
from esscher.loops.online import LoopState, online
from esscher.methods.control.td3 import TD3, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
LINE = Spec(obs_shape=(1,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))


def build(spec=LINE, seed=0, **settings) -> TD3:
    torch.manual_seed(seed)
    settings = {"hidden": (8,), "batch_size": 4, "buffer_size": 100, **settings}
    return TD3(Config(**settings), spec, Runtime(RUNTIME))


def linear(**settings) -> TD3:
    """Q_i = action weight * a + bias: (3 a + 1) and (-3 a + 4); pi = tanh(2 s). Targets as well."""
    method = build(hidden=(), **settings)
    with torch.no_grad():
        for critic in (method.critic, method.target_critic):
            critic.net.weights[0].copy_(torch.tensor([[[0.0], [3.0]], [[0.0], [-3.0]]]))
            critic.net.biases[0].copy_(torch.tensor([[[1.0]], [[4.0]]]))
        for actor in (method.actor, method.target_actor):
            actor.net.weights[0].fill_(2.0)
            actor.net.biases[0].zero_()
    return method


def batch(size=4, spec=LINE, seed=0) -> Transitions:
    draw = torch.Generator().manual_seed(seed)
    return Transitions(
        obs=torch.randn(size, *spec.obs_shape, generator=draw),
        action=torch.rand(size, *spec.action_shape, generator=draw) * 2 - 1,
        reward=torch.randn(size, generator=draw),
        next_obs=torch.randn(size, *spec.obs_shape, generator=draw),
        terminated=torch.rand(size, generator=draw) < 0.3,
        truncated=torch.zeros(size, dtype=torch.bool),
    )


def copy(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]


def test_target_by_hand(monkeypatch):
    method = linear(discount=0.5, target_noise=0.2, target_noise_clip=0.5)
    # pi'(s) = tanh(2 s): 0, and 0.99932930 at s = 2, and 0.46211716 at s = 0.25.
    next_obs = torch.tensor([[0.0], [0.0], [0.0], [2.0], [0.25], [0.0]])
    draws = torch.tensor([[1.0], [4.0], [-4.0], [1.0], [0.0], [1.0]])
    monkeypatch.setattr(torch, "randn_like", lambda like: draws.clone())
    reward = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 7.0])
    terminated = torch.tensor([False, False, False, False, False, True])
    target = method.critic_target(reward, next_obs, terminated)
    # a = 0.2:  min(1.6, 3.4) = 1.6, y = 1 + 0.8.
    # a = 0.8 clipped to 0.5: min(2.5, 2.5) = 2.5, y = 1 + 1.25 (unclipped: 1.6, y = 1.8).
    # a = -0.5: min(-0.5, 5.5) = -0.5, y = 1 - 0.25.
    # a = 0.999 + 0.2 clipped to 1: min(4, 1) = 1, y = 1.5 (unclipped: 0.402, y = 1.201).
    # a = 0.46211716 without noise: min(2.38635, 2.61365), y = 1 + 1.193176.
    # terminated: the reward alone.
    expected = torch.tensor([1.8, 2.25, 0.75, 1.5, 2.193176, 7.0])
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-5)


def test_target_reads_target_networks_only():
    method, rows = build(target_noise=0.0), batch()
    before = method.critic_target(rows.reward, rows.next_obs, rows.terminated)
    with torch.no_grad():
        for network in (method.actor, method.critic):
            for parameter in network.parameters():
                parameter.add_(1.0)
    after = method.critic_target(rows.reward, rows.next_obs, rows.terminated)
    assert torch.equal(before, after)


def test_critic_loss_by_hand():
    method = linear()
    rows = Transitions(
        obs=torch.zeros(2, 1),
        action=torch.tensor([[0.0], [1.0]]),
        reward=torch.tensor([2.0, 2.0]),
        next_obs=torch.zeros(2, 1),
        terminated=torch.tensor([True, True]),
        truncated=torch.zeros(2, dtype=torch.bool),
    )
    loss, q_mean = method.critic_loss(
        rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated
    )
    # Q_1 = (1, 4), Q_2 = (4, 1), target 2: errors 1 + 4 and 4 + 1, halved by the mean of two rows.
    assert loss.item() == pytest.approx(2.5 + 2.5)
    assert q_mean.item() == pytest.approx(2.5)


def test_actor_climbs_the_first_critic():
    method, obs = linear(), torch.tensor([[1.0], [-0.25]])
    loss = method.actor_loss(obs)
    # -mean(3 a + 1) at a = tanh(2) = 0.96402758 and tanh(-0.5) = -0.46211716; in the first row the
    # other critic is the smaller one.
    assert loss.item() == pytest.approx(-(1 + 1.5 * (0.96402758 - 0.46211716)), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, [method.actor.net.biases[0]])
    # -3 mean(1 - tanh^2): down the loss the action rises, as Q_1 does.
    slopes = (1 - 0.96402758**2, 1 - 0.46211716**2)
    assert gradient.item() == pytest.approx(-1.5 * sum(slopes), abs=1e-5)


def test_gradient_reach():
    method, rows = build(), batch()
    networks = (method.actor, method.critic, method.target_actor, method.target_critic)

    def reached(loss):
        for network in networks:
            network.requires_grad_(True)
        grads = []
        for network in networks:
            found = torch.autograd.grad(
                loss(), list(network.parameters()), allow_unused=True, retain_graph=True
            )
            grads.append([g is not None and bool(g.abs().sum() > 0) for g in found])
        return [(any(g), all(g)) for g in grads]

    def critic_loss():
        return method.critic_loss(
            rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated
        )[0]

    none, whole = (False, False), (True, True)
    assert reached(critic_loss) == [none, whole, none, none]
    # Into the critic as well, if `update` did not freeze it; into no target network.
    actor_reach = reached(lambda: method.actor_loss(rows.obs))
    assert actor_reach[0] == whole
    assert actor_reach[2:] == [none, none]


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_delayed_updates_move_everything_else_together(delay):
    method = build(policy_delay=delay, tau=0.25)
    others = (method.actor, method.target_actor, method.target_critic)
    for step in range(7):
        before = [copy(network) for network in others]
        critic = copy(method.critic)
        metrics = method.update(batch(seed=step), step)
        assert all(moved(method.critic, critic))
        due = step % delay == delay - 1
        assert ("actor_loss" in metrics) == due
        for network, old in zip(others, before, strict=True):
            assert moved(network, old) == [due] * len(old)
        if due:
            pairs = ((method.target_actor, method.actor), (method.target_critic, method.critic))
            for (target, source), old in zip(pairs, before[1:], strict=True):
                for p, q, o in zip(target.parameters(), source.parameters(), old, strict=True):
                    torch.testing.assert_close(p.detach(), 0.75 * o + 0.25 * q.detach())
        assert all(p.requires_grad for p in method.critic.parameters())
        assert all(p.grad is None for p in method.target_critic.parameters())


def test_the_actor_step_leaves_the_critic_as_its_own_step_made_it():
    left, right = build(policy_delay=1), build(policy_delay=2)
    for method in (left, right):
        torch.manual_seed(1)
        method.update(batch(), 0)
    for p, q in zip(left.critic.parameters(), right.critic.parameters(), strict=True):
        assert torch.equal(p, q)


def test_exploration_noise_has_its_size_and_stays_in_the_box():
    method = linear(exploration_noise=0.1)
    torch.manual_seed(0)
    action = method.act(torch.zeros(20_000, 1), explore=True).value
    assert action.std().item() == pytest.approx(0.1, rel=0.03)
    assert action.mean().item() == pytest.approx(0.0, abs=0.003)
    at_the_face = method.act(torch.full((1000, 1), 5.0), explore=True).value
    assert at_the_face.max().item() <= 1.0
    assert 0.3 < (at_the_face == 1.0).float().mean().item() < 0.7
    plain = method.act(torch.full((3, 1), 0.25), explore=False).value
    assert plain.flatten().tolist() == pytest.approx([0.46211716] * 3)


def test_discrete_actions_are_refused():
    spec = Spec(obs_shape=(3,), action_shape=(), num_actions=4)
    with pytest.raises(UserError, match=r"td3 needs a continuous \(Box\).*Discrete\(4\): use ppo"):
        build(spec)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discount", 1.0),
        ("tau", 0.0),
        ("policy_delay", 0),
        ("target_noise_clip", -0.1),
        ("learning_rate", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be .*, got {value}"):
        Config(**{name: value})


class Bandit:
    """One-step episodes: reward 1 - (a - best(s))^2, best(s) = 0.6 s + 0.2, s in (-1, 1)."""

    spec = Spec(
        obs_shape=(1,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,), num_envs=16
    )

    def reset(self, iteration):
        self.draw = torch.Generator().manual_seed(iteration)
        self.obs = self._next()
        return self.obs.numpy()

    def random_actions(self):
        return torch.rand(16, 1) * 2 - 1

    def step(self, action, step):
        reward = 1 - (action - self.best(self.obs)).square().squeeze(-1)
        next_obs, self.obs = self.obs, self._next()
        always = torch.ones(16, dtype=torch.bool).numpy()
        return SimpleNamespace(
            reward=reward.numpy(),
            next_obs=next_obs.numpy(),
            obs=self.obs.numpy(),
            terminated=always,
            truncated=~always,
            episodes=[],
        )

    @staticmethod
    def best(obs):
        return 0.6 * obs + 0.2

    def _next(self):
        return torch.rand(16, 1, generator=self.draw) * 2 - 1


def test_learns_the_best_action_of_a_bandit():
    envs = Bandit()
    method = build(
        envs.spec,
        hidden=(32, 32),
        learning_rate=3e-3,
        batch_size=64,
        buffer_size=20_000,
        warmup=800,
        updates_per_step=1 / 16,
        tau=0.05,
    )
    state = LoopState(torch.from_numpy(envs.reset(0)))
    for _ in online(method, envs, method.experience(), state, seed=0, steps=10_400):
        pass
    assert state.num_updates == 600
    obs = torch.linspace(-0.9, 0.9, 19).unsqueeze(-1)
    action = method.act(obs, explore=False).value
    assert (action - envs.best(obs)).square().mean().sqrt().item() < 0.1
    # Every step terminates: values are rewards, 1 at the optimum, and nothing is bootstrapped.
    value = method.critic(obs, envs.best(obs)).mean
    assert (value - 1).abs().max().item() < 0.1
