"""SAC: losses against numpy, direction of the temperature, who moves when, and a known optimum.

Networks without hidden layers on one-hot observations are tables, so every value below is written
down; only the action enters through a slope. The reference in numpy shares no code with the method.
"""

import json
import math

import numpy as np
import pytest
import torch

import esscher
from esscher.errors import UserError
from esscher.methods.control import sac
from esscher.methods.control.sac import SAC, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
BOX = {"action_low": (-1.0, -1.0), "action_high": (1.0, 1.0)}
SPEC = Spec(obs_shape=(4,), action_shape=(2,), **BOX)

# Row k is the step from state k to state k + 1; the last one ends the task, the first is cut.
ACTION = np.array([[0.5, -0.2], [-0.9, 0.1], [0.3, 0.3], [0.0, 0.8]])
REWARD = np.array([1.0, -2.0, 0.5, 3.0])
TERMINATED = np.array([False, False, False, True])
FOLLOWING = [1, 2, 3, 0]

# Values of three critics in each state, and what a unit of each action component adds.
CRITIC = np.array([[1.0, 2.0, -1.0, 0.5], [2.0, 1.0, 0.0, 0.4], [0.2, 3.0, 1.0, -0.7]])
SLOPE = np.array([[1.0, -0.5], [-0.8, 0.6], [0.3, 0.9]])
TARGET = np.array([[0.3, -1.0, 4.0, 2.0], [0.9, -2.0, 5.0, 1.0], [0.5, -1.5, 3.0, 9.0]])
TARGET_SLOPE = np.array([[0.4, 0.7], [-0.6, 1.1], [0.2, -0.3]])
MEAN = np.array([[0.1, -0.4], [0.7, 0.2], [-1.2, 0.0], [0.4, 0.9]])
LOG_STD = np.array([[-0.5, 0.1], [0.3, -1.0], [-0.2, -0.7], [0.0, 0.4]])
NEXT_NOISE = np.array([[0.3, -1.1], [2.0, 0.4], [-0.6, 0.9], [1.4, -0.2]])
NOISE = np.array([[-0.8, 0.5], [0.1, 1.7], [1.2, -0.3], [-2.1, 0.6]])


def batch(**fields):
    values = {
        "obs": np.eye(4),
        "action": ACTION,
        "reward": REWARD,
        "next_obs": np.eye(4)[FOLLOWING],
        "terminated": TERMINATED,
        "truncated": np.array([True, False, False, False]),
        **fields,
    }
    return Transitions(
        **{
            name: torch.tensor(value, dtype=torch.bool if value.dtype == bool else torch.float32)
            for name, value in values.items()
        }
    )


def tabular(**settings):
    """A learner whose networks are the tables above."""
    torch.manual_seed(0)
    settings = {"hidden": (), "batch_size": 4, "buffer_size": 10, "discount": 0.9, **settings}
    method = SAC(Config(**settings), SPEC, Runtime(RUNTIME))
    members = method.cfg.num_critics
    for critic, table, slope in (
        (method.critic, CRITIC, SLOPE),
        (method.target_critic, TARGET, TARGET_SLOPE),
    ):
        weight = np.concatenate([table, slope], axis=1)[:members, :, None]
        put(critic, weight, np.zeros((members, 1, 1)))
    put(method.actor, np.concatenate([MEAN, LOG_STD], axis=1), np.zeros(4))
    return method


def put(network, weight, bias):
    with torch.no_grad():
        network.net.weights[0].copy_(torch.tensor(weight))
        network.net.biases[0].copy_(torch.tensor(bias))


def critic_tables(method):
    """Table and slope of the critics as they are now."""
    weight = method.critic.net.weights[0].detach().double().numpy()[:, :, 0]
    bias = method.critic.net.biases[0].detach().double().numpy()[:, :, 0]
    return weight[:, :4] + bias, weight[:, 4:]


def draws(monkeypatch, *arrays):
    """Let these be the next standard normal numbers, in this order."""
    waiting = [torch.tensor(array, dtype=torch.float32) for array in arrays]

    def next_draw(like):
        draw = waiting.pop(0)
        assert draw.shape == like.shape
        return draw

    monkeypatch.setattr(torch, "randn_like", next_draw)
    return waiting


# ---- the reference


def sample(mean, log_std, noise):
    """A squashed Gaussian action and the logarithm of its density, textbook form."""
    u = mean + np.exp(log_std) * noise
    gaussian = np.exp(-0.5 * noise**2) / (np.exp(log_std) * math.sqrt(2 * math.pi))
    return np.tanh(u), np.log(gaussian / (1 - np.tanh(u) ** 2)).sum(-1)


def q_values(table, slope, states, action):
    return np.array([table[i][states] + action @ slope[i] for i in range(len(table))])


def expected_critic(alpha, scale=1.0, members=2, discount=0.9):
    """Critic loss and the residuals of critics and rows."""
    action, logp = sample(MEAN[FOLLOWING], LOG_STD[FOLLOWING], NEXT_NOISE)
    next_q = q_values(TARGET[:members], TARGET_SLOPE, FOLLOWING, action).min(0)
    future = np.where(TERMINATED, 0.0, next_q - alpha * logp)
    target = scale * REWARD + discount * future
    residual = q_values(CRITIC[:members], SLOPE, range(4), ACTION) - target
    return sum(0.5 * np.mean(row**2) for row in residual), residual


AGGREGATES = {"min": lambda q: q.min(0), "mean": lambda q: q.mean(0), "first": lambda q: q[0]}


def expected_actor(alpha, how="min", mean=MEAN, log_std=LOG_STD, table=CRITIC[:2], slope=SLOPE):
    action, logp = sample(mean, log_std, NOISE)
    return np.mean(alpha * logp - AGGREGATES[how](q_values(table, slope, range(4), action))), logp


# ---- losses


def losses(method, alpha):
    rows = batch()
    alpha = torch.tensor(float(alpha))
    critic_loss, q_mean = method.critic_loss(
        rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated, alpha
    )
    actor_loss, logp = method.actor_loss(rows.obs, alpha)
    return critic_loss, q_mean, actor_loss, logp


def test_losses_of_constants_by_hand(monkeypatch):
    method = tabular()
    put(method.critic, np.zeros((2, 6, 1)), np.array([[[1.0]], [[2.0]]]))
    put(method.target_critic, np.zeros((2, 6, 1)), np.array([[[3.0]], [[2.5]]]))
    put(method.actor, np.zeros((4, 4)), np.zeros(4))
    draws(monkeypatch, np.zeros((4, 2)), np.zeros((4, 2)))
    critic_loss, q_mean, actor_loss, logp = losses(method, 0.5)
    # u = 0 with std 1: log pi = 2 * (-0.9189385) = -1.837877. The soft value of the next state is
    # 2.5 + 0.5 * 1.837877 = 3.4189385, so y = r + 3.0770447: 4.0770447, 1.0770447, 3.5770447, and
    # the reward 3 alone where the task ends.
    # Errors of Q = 1: 3.0770447, 0.0770447, 2.5770447, 2; of Q = 2: one less, squared.
    first = (3.0770447**2 + 0.0770447**2 + 2.5770447**2 + 2**2) / 8
    second = (2.0770447**2 + 0.9229553**2 + 1.5770447**2 + 1**2) / 8
    assert critic_loss.item() == pytest.approx(first + second, rel=1e-5)
    assert q_mean.item() == pytest.approx(1.5)
    assert logp.tolist() == pytest.approx([-1.837877] * 4, rel=1e-5)
    assert actor_loss.item() == pytest.approx(0.5 * -1.837877 - 1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "scale", "members"), [(0.7, 1.0, 2), (0.7, 2.5, 2), (0.0, 1.0, 1), (1.3, 0.5, 3)]
)
def test_critic_loss_against_numpy(monkeypatch, alpha, scale, members):
    method = tabular(reward_scale=scale, num_critics=members)
    waiting = draws(monkeypatch, NEXT_NOISE, NOISE)
    loss, *_ = losses(method, alpha)
    expected, residual = expected_critic(alpha, scale, members)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert waiting == []
    # One-hot rows: the gradient of a table entry is that of its row's value, residual / 4.
    loss.backward()
    gradient = method.critic.net.weights[0].grad.numpy()[:, :4, 0]
    np.testing.assert_allclose(gradient, residual / 4, rtol=1e-4, atol=1e-6)


def test_smallest_target_is_chosen_row_by_row():
    action, _ = sample(MEAN[FOLLOWING], LOG_STD[FOLLOWING], NEXT_NOISE)
    chosen = q_values(TARGET[:2], TARGET_SLOPE, FOLLOWING, action).argmin(0)
    assert set(chosen[~TERMINATED]) == {0, 1}  # else the tables above could not tell


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("how", ["min", "mean", "first"])
def test_actor_loss_against_numpy(monkeypatch, how, alpha):
    method = tabular(actor_q=how)
    draws(monkeypatch, NEXT_NOISE, NOISE)
    _, _, loss, logp = losses(method, alpha)
    expected, expected_logp = expected_actor(alpha, how)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logp.numpy(), expected_logp, rtol=1e-5)
    assert not logp.requires_grad
    # Reparameterised: the gradient flows through the action into Q and into log pi.
    loss.backward()
    gradient = method.actor.net.weights[0].grad.numpy()
    for row, column in np.ndindex(4, 4):
        step = np.zeros((4, 4))
        step[row, column] = 1e-5
        ends = [
            expected_actor(alpha, how, MEAN + sign * step[:, :2], LOG_STD + sign * step[:, 2:])[0]
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient[row, column] == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_truncation_is_not_an_end(monkeypatch):
    results = []
    for truncated in (np.zeros(4, bool), np.ones(4, bool)):
        method = tabular()
        draws(monkeypatch, NEXT_NOISE, NOISE)
        results.append(method.update(batch(truncated=truncated), 0)["critic_loss"].item())
    assert results[0] == results[1] == pytest.approx(expected_critic(1.0)[0], rel=1e-5)


# ---- temperature


def gradient_of(optim):
    """That of a scalar after one step: the first moment starts as a tenth of it."""
    assert optim.num_steps.item() == 1
    return 10 * optim.first_moment[0].item()


def with_logp(monkeypatch, logp, **settings):
    """A learner whose policy has this log-probability at every action: u = 0, equal stds."""
    method = tabular(**settings)
    log_std = -(logp / 2 + 0.5 * math.log(2 * math.pi))
    put(method.actor, np.zeros((4, 4)), np.array([0.0, 0.0, log_std, log_std]))
    draws(monkeypatch, np.zeros((4, 2)), np.zeros((4, 2)))
    return method


@pytest.mark.parametrize("form", ["log", "paper"])
@pytest.mark.parametrize(("logp", "direction"), [(3.0, 1), (-1.5, -1), (2.5, 1), (1.5, -1)])
def test_temperature_follows_the_entropy(monkeypatch, form, logp, direction):
    # The target is -2 nats for two components: log pi = 3 is an entropy of -3, too little.
    alpha, rate = 0.2, 0.01
    method = with_logp(
        monkeypatch, logp, temperature_loss=form, initial_alpha=alpha, learning_rate=rate
    )
    metrics = method.update(batch(), 0)
    factor = alpha if form == "paper" else 1.0
    assert gradient_of(method.alpha_opt) == pytest.approx(-factor * (logp - 2), rel=1e-4)
    # The first step of Adam is the learning rate, against the sign of the gradient.
    moved = method.log_alpha.item() - math.log(alpha)
    assert moved == pytest.approx(direction * rate, rel=1e-3)
    assert metrics["alpha"].item() == pytest.approx(alpha)  # the one that the losses used
    assert metrics["entropy"].item() == pytest.approx(-logp, rel=1e-5)


def test_target_entropy_may_be_given(monkeypatch):
    method = with_logp(monkeypatch, 3.0, target_entropy=-4.0)
    method.update(batch(), 0)
    assert gradient_of(method.alpha_opt) == pytest.approx(-(3 - 4), rel=1e-4)
    assert method.log_alpha.item() < 0


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_fixed_temperature_never_moves(monkeypatch, alpha):
    method = tabular(alpha=alpha, initial_alpha=5.0)
    before = method.log_alpha.item()
    for step in range(3):
        draws(monkeypatch, NEXT_NOISE, NOISE)
        metrics = method.update(batch(), step)
        assert metrics["alpha"].item() == pytest.approx(alpha)
        assert all(math.isfinite(value.item()) for value in metrics.values())
        if step == 0:
            expected, _ = expected_critic(alpha)
            assert metrics["critic_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert method.log_alpha.item() == before
    assert before == pytest.approx(math.log(alpha) if alpha else -math.inf)
    assert method.alpha_opt.num_steps.item() == 0


# ---- who moves, when, and by how much


def parts(method):
    modules = {n: getattr(method, n) for n in ("actor", "critic", "target_critic")}
    found = {n: [p.detach().clone() for p in m.parameters()] for n, m in modules.items()}
    return {**found, "log_alpha": [method.log_alpha.detach().clone()]}


def changed(before, after):
    return {
        name
        for name in before
        if not all(torch.equal(p, q) for p, q in zip(before[name], after[name], strict=True))
    }


def record(monkeypatch, method):
    """The optimisers and target moves that follow, each with the parts that it changed."""
    order = []
    minimize, polyak = Optim.minimize, sac.polyak
    names = {id(getattr(method, n)): n for n in ("actor_opt", "critic_opt", "alpha_opt")}

    def note(name, action, *arguments):
        before = parts(method)
        action(*arguments)
        order.append((name, changed(before, parts(method))))

    monkeypatch.setattr(
        Optim, "minimize", lambda self, loss: note(names[id(self)], minimize, self, loss)
    )
    monkeypatch.setattr(sac, "polyak", lambda *arguments: note("polyak", polyak, *arguments))
    return order


def test_each_step_moves_its_own_part_in_order(monkeypatch):
    method = tabular(initial_alpha=0.5)
    order = record(monkeypatch, method)
    method.update(batch(), 0)
    assert order == [
        ("critic_opt", {"critic"}),
        ("actor_opt", {"actor"}),
        ("alpha_opt", {"log_alpha"}),
        ("polyak", {"target_critic"}),
    ]


def test_gradients_reach_their_own_part_only():
    method = tabular()
    critic_loss, _, actor_loss, _ = losses(method, 0.5)
    others = [*method.actor.parameters(), method.log_alpha]
    assert torch.autograd.grad(critic_loss, others, allow_unused=True, retain_graph=True) == (
        (None,) * len(others)
    )
    # The temperature enters both losses as a number.
    critic_loss, _, actor_loss, _ = losses(method, method.log_alpha.exp().detach())
    assert torch.autograd.grad(actor_loss, [method.log_alpha], allow_unused=True) == (None,)


def test_no_gradient_is_left_behind():
    method = tabular()
    method.update(batch(), 0)
    modules = (method.critic, method.target_critic, method.actor)
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert method.log_alpha.grad is None


def test_actor_climbs_the_updated_critics(monkeypatch):
    # One step of Adam moves every entry of the critics by 0.5: the two readings are far apart.
    method = tabular(learning_rate=0.5, alpha=0.7)
    before = critic_tables(method)
    draws(monkeypatch, NEXT_NOISE, NOISE)
    metrics = method.update(batch(), 0)
    after = critic_tables(method)
    old = expected_actor(0.7, table=before[0], slope=before[1])[0]
    new = expected_actor(0.7, table=after[0], slope=after[1])[0]
    assert abs(old - new) > 0.1
    assert metrics["actor_loss"].item() == pytest.approx(new, rel=1e-4)


def test_targets_follow_by_tau():
    method = tabular(tau=0.3, learning_rate=0.5)
    method.update(batch(), 0)
    table, slope = critic_tables(method)
    weight = method.target_critic.net.weights[0].detach().numpy()[:, :, 0]
    np.testing.assert_allclose(weight[:, :4], 0.7 * TARGET[:2] + 0.3 * (table - bias(method)), 1e-5)
    np.testing.assert_allclose(weight[:, 4:], 0.7 * TARGET_SLOPE[:2] + 0.3 * slope, 1e-5)
    found = method.target_critic.net.biases[0].detach().numpy()[:, :, 0]
    np.testing.assert_allclose(found, 0.3 * bias(method), 1e-5)


def bias(method):
    return method.critic.net.biases[0].detach().double().numpy()[:, :, 0]


def test_hard_updates_every_third():
    method = tabular(tau=1.0, target_update_interval=3, learning_rate=0.1)
    for step in range(6):
        before = parts(method)["target_critic"]
        method.update(batch(), step)
        now = parts(method)
        if step in (2, 5):
            assert all(map(torch.equal, now["target_critic"], now["critic"]))
        else:
            assert all(map(torch.equal, now["target_critic"], before))


# ---- the object


def test_twins_start_apart_and_targets_equal():
    torch.manual_seed(0)
    method = SAC(Config(hidden=(8,)), SPEC, Runtime(RUNTIME))
    for parameter in method.critic.parameters():
        assert not torch.equal(parameter[0], parameter[1])
    pairs = zip(method.critic.parameters(), method.target_critic.parameters(), strict=True)
    assert all(torch.equal(p, q) and not q.requires_grad for p, q in pairs)
    assert method.target_entropy == -2.0
    assert method.log_alpha.item() == 0.0


def test_actions(monkeypatch):
    method = tabular()
    mode = method.act(torch.eye(4), explore=False).value
    np.testing.assert_allclose(mode.numpy(), np.tanh(MEAN), rtol=1e-5)
    draws(monkeypatch, NOISE)
    drawn = method.act(torch.eye(4), explore=True).value
    np.testing.assert_allclose(drawn.numpy(), sample(MEAN, LOG_STD, NOISE)[0], rtol=1e-5)
    assert not drawn.requires_grad


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("discount", 1.0),
        ("discount", -0.1),
        ("tau", 0.0),
        ("tau", 1.1),
        ("target_update_interval", 0),
        ("alpha", -0.1),
        ("initial_alpha", 0.0),
        ("num_critics", 0),
        ("reward_scale", 0.0),
        ("warmup", -1),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(UserError, match=f"{setting} must be .*, got {value}"):
        Config(**{setting: value})


def test_choices_are_refused():
    spec = Spec(obs_shape=(4,), action_shape=(), num_actions=3)
    with pytest.raises(UserError, match=r"sac needs a continuous .* Discrete\(3\): use ppo"):
        SAC(Config(), spec, Runtime(RUNTIME))


# ---- learning


def test_bandit_reaches_the_exact_optimum(tmp_path, unchecked):
    """Reward -10 a^2, entropy held at -1: alpha = 0.1585 and std = 0.0890.

    With the entropy of a Gaussian, log(std sqrt(2 pi e)) = -1 gives std = 0.0890, and the best
    policy for a temperature has variance alpha / 20. A temperature doubled in one loss would show
    as alpha 0.079 or 0.317, a doubled or sign-flipped target entropy as std 0.033 or 0.66.
    """
    config = Config(
        learning_rate=3e-3,
        discount=0.0,
        hidden=(32, 32),
        activation="gelu",
        batch_size=128,
        buffer_size=5_000,
        warmup=100,
        initial_alpha=0.3,
    )
    experiment = esscher.Experiment.of(
        config,
        env="esscher.envs:QuadraticBandit",
        steps=1_300,
        runtime=RUNTIME,
        log=esscher.LogConfig(every=100, to=()),
        evaluation=esscher.EvaluationConfig(every=0, episodes=1),
        checkpoint=esscher.CheckpointConfig(every=0),
    )
    esscher.run(experiment, directory=tmp_path / "run", display=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["phase"] == "train"][-4:]
    alpha = np.mean([row["alpha"] for row in rows])
    entropy = np.mean([row["entropy"] for row in rows])
    policy = esscher.load(tmp_path / "run").method.policy
    torch.manual_seed(0)
    actions = policy(torch.zeros(20_000, 1)).sample()
    assert abs(alpha - 0.1585) < 0.035
    assert abs(entropy + 1) < 0.08
    assert abs(actions.std().item() - 0.0890) < 0.012
    assert abs(actions.mean().item()) < 0.03
