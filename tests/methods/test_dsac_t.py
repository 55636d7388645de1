"""DSAC-T: targets and gradients against numpy, each ablation, who moves when, an exact return.

As in the tests of SAC the networks are tables: no hidden layers, one-hot observations. A row's state
is its own, so the gradient of a table entry is that row's gradient with respect to mean or std.
"""

import math

import numpy as np
import pytest
import torch

from esscher.errors import UserError
from esscher.methods.control import dsac_t
from esscher.methods.control.dsac_t import DSACT, Config, dsac_v1
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
SPEC = Spec(obs_shape=(5,), action_shape=(2,), action_low=(-1.0, -1.0), action_high=(1.0, 1.0))

# Row k is the step from state k to state k + 1; the last one ends the task.
ACTION = np.array([[0.5, -0.2], [-0.9, 0.1], [0.3, 0.3], [0.0, 0.8], [-0.4, -0.6]])
REWARD = np.array([1.0, -2.0, 0.5, 3.0, -1.5])
TERMINATED = np.array([False, False, False, False, True])
FOLLOWING = [1, 2, 3, 4, 0]

# Mean and std of the return in each state for two critics; what an action adds to the mean.
Q = np.array([[1.0, 2.0, -1.0, 0.5, 0.1], [2.0, 1.0, 0.0, 0.4, -0.9]])
STD = np.array([[0.5, 1.2, 0.3, 0.8, 2.0], [0.9, 0.4, 1.5, 0.6, 0.7]])
SLOPE = np.array([[1.0, -0.5], [-0.8, 0.6]])
# In state 1 the smaller mean comes with the larger std, in state 2 with the smaller one, and the
# other critic has the smaller mean in states 3 and 4, again with a larger and with a smaller std.
TARGET_Q = np.array([[9.0, -1.0, 1.0, 6.0, 5.0], [8.0, 2.0, 4.0, 2.0, 1.5]])
TARGET_STD = np.array([[0.1, 2.5, 0.4, 0.7, 1.9], [0.2, 0.3, 1.1, 1.8, 0.5]])
TARGET_SLOPE = np.array([[0.4, 0.7], [-0.3, 0.5]])
MEAN = np.array([[0.1, -0.4], [0.7, 0.2], [-1.2, 0.0], [0.4, 0.9], [0.0, -0.3]])
LOG_STD = np.array([[-0.5, 0.1], [0.3, -1.0], [-0.2, -0.7], [0.0, 0.4], [-0.9, 0.2]])
TARGET_MEAN = MEAN[::-1] + 0.3
TARGET_LOG_STD = LOG_STD[::-1] - 0.2
NEXT_NOISE = np.array([[0.3, -1.1], [2.0, 0.4], [-0.6, 0.9], [1.4, -0.2], [0.2, 0.2]])
RETURN_NOISE = np.array([5.0, -4.0, 0.7, -1.3, 2.0])  # the first two lie beyond the clip at 3
NOISE = np.array([[-0.8, 0.5], [0.1, 1.7], [1.2, -0.3], [-2.1, 0.6], [0.4, -1.5]])


def rows():
    def single(values):
        return torch.tensor(values, dtype=torch.float32)

    return Transitions(
        obs=single(np.eye(5)),
        action=single(ACTION),
        reward=single(REWARD),
        next_obs=single(np.eye(5)[FOLLOWING]),
        terminated=torch.tensor(TERMINATED),
        truncated=torch.tensor([True, False, False, False, False]),
    )


def tabular(make=Config, **settings):
    """A learner whose networks are the tables above."""
    torch.manual_seed(0)
    common = {"hidden": (), "batch_size": 5, "buffer_size": 10, "discount": 0.9}
    method = DSACT(make(**{**common, **settings}), SPEC, Runtime(RUNTIME))
    put_critic(method.critic, Q, STD, SLOPE)
    put_critic(method.target_critic, TARGET_Q, TARGET_STD, TARGET_SLOPE)
    put_actor(method.actor, MEAN, LOG_STD)
    put_actor(method.target_actor, TARGET_MEAN, TARGET_LOG_STD)
    return method


def put_critic(critic, mean, std, slope):
    members = len(critic.net.weights[0])
    raw = np.log(np.expm1(std))
    table = np.stack([mean, raw], -1)
    slopes = np.stack([slope, np.zeros_like(slope)], -1)
    with torch.no_grad():
        critic.net.weights[0].copy_(torch.tensor(np.concatenate([table, slopes], 1)[:members]))
        critic.net.biases[0].zero_()


def put_actor(actor, mean, log_std):
    with torch.no_grad():
        actor.net.weights[0].copy_(torch.tensor(np.concatenate([mean, log_std], 1)))
        actor.net.biases[0].zero_()


def draws(monkeypatch, *arrays):
    """Let these be the next standard normal numbers, in this order."""
    waiting = [torch.tensor(array, dtype=torch.float32) for array in arrays]

    def next_draw(like):
        draw = waiting.pop(0)
        assert draw.shape == like.shape
        return draw

    monkeypatch.setattr(torch, "randn_like", next_draw)
    return waiting


def critic_draws(monkeypatch):
    return draws(monkeypatch, NEXT_NOISE, RETURN_NOISE)


def loss_of(method, alpha=0.7):
    batch = rows()
    return method.critic_loss(
        batch.obs,
        batch.action,
        batch.reward,
        batch.next_obs,
        batch.terminated,
        torch.tensor(float(alpha)),
    )


def gradients(method, alpha=0.7):
    """With respect to mean and std of each critic and row, out of the tables' gradients."""
    loss, *_ = loss_of(method, alpha)
    (gradient,) = torch.autograd.grad(loss, [method.critic.net.weights[0]])
    gradient = gradient.double().numpy()[:, :5]
    raw = np.log(np.expm1(STD[: len(gradient)]))
    return gradient[..., 0], gradient[..., 1] * (1 + np.exp(-raw))  # softplus' = sigmoid


# ---- the reference


def sample(mean, log_std, noise):
    """A squashed Gaussian action and the logarithm of its density, textbook form."""
    u = mean + np.exp(log_std) * noise
    gaussian = np.exp(-0.5 * noise**2) / (np.exp(log_std) * math.sqrt(2 * math.pi))
    return np.tanh(u), np.log(gaussian / (1 - np.tanh(u) ** 2)).sum(-1)


def targets(alpha=0.7, members=2, discount=0.9, scale=1.0):
    """y_q and y_z, row by row."""
    mean_targets, sampled_targets = [], []
    action, logp = sample(TARGET_MEAN[FOLLOWING], TARGET_LOG_STD[FOLLOWING], NEXT_NOISE)
    for row, state in enumerate(FOLLOWING):
        values = [TARGET_Q[i][state] + action[row] @ TARGET_SLOPE[i] for i in range(members)]
        twin = int(np.argmin(values))
        goes_on = 0.0 if TERMINATED[row] else discount
        noise = min(3.0, max(-3.0, RETURN_NOISE[row]))
        soft = values[twin] - alpha * logp[row]
        mean_targets.append(scale * REWARD[row] + goes_on * soft)
        sampled_targets.append(
            scale * REWARD[row] + goes_on * (soft + TARGET_STD[twin][state] * noise)
        )
    return np.array(mean_targets), np.array(sampled_targets)


def own_values(members=2):
    mean = Q + np.einsum("ea,ba->eb", SLOPE, ACTION)
    return mean[:members], STD[:members]


def closed_form(
    bound,
    weight,
    *,
    epsilon=0.1,
    members=2,
    mean_target="expected",
    alpha=0.7,
    scale=1.0,
):
    """The sheet's gradients of L_i with respect to Q_i and sigma_i."""
    y_q, y_z = targets(alpha, members, scale=scale)
    mean, std = own_values(members)
    bound, weight = np.asarray(bound)[:, None], np.asarray(weight)[:, None]
    clipped = np.minimum(np.maximum(y_z - mean, -bound), bound)
    pull = {"expected": y_q - mean, "sampled": y_z - mean, "clipped": clipped}[mean_target]
    for_mean = -weight / 5 * pull / (std**2 + epsilon)
    for_std = -weight / 5 * (clipped**2 - std**2) / (std**3 + epsilon)
    return for_mean, for_std


def assert_gradients(found, expected):
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-5)


# ---- targets and gradients


def test_targets_of_one_row_by_hand():
    """The first row: state 0 to state 1, where the first critic has the smaller mean, -1 + a w."""
    y_q, y_z = targets()
    # TARGET_MEAN[1] = (0.7, 1.2), TARGET_LOG_STD[1] = (-0.2, 0.2), noise (0.3, -1.1):
    # u = 0.7 + 0.818731 * 0.3 = 0.945619 and 1.2 - 1.221403 * 1.1 = -0.143543,
    # a = (0.737795, -0.142565), Q_1 = -1 + 0.295118 - 0.099796 = -0.804678 (Q_2 = 1.707379).
    # log N: -0.045 + 0.2 - 0.918939 and -0.605 - 0.2 - 0.918939.
    # log(1 - a^2): -0.786010 and -0.020534.
    # log pi = -0.763939 - 1.723939 + 0.786010 + 0.020534 = -1.681334.
    # y_q = 1 + 0.9 (-0.804678 + 0.7 * 1.681334); y_z adds 0.9 * 2.5 * 3 (noise 5, clipped).
    assert y_q[0] == pytest.approx(1.335030, abs=3e-6)
    assert y_z[0] == pytest.approx(1.335030 + 6.75, abs=3e-6)


def test_tables_tell_the_selections_apart():
    action, _ = sample(TARGET_MEAN[FOLLOWING], TARGET_LOG_STD[FOLLOWING], NEXT_NOISE)
    mean = TARGET_Q[:, FOLLOWING] + np.einsum("ea,ba->eb", TARGET_SLOPE, action)
    by_mean = mean.argmin(0)[~TERMINATED]
    by_std = TARGET_STD[:, FOLLOWING].argmin(0)[~TERMINATED]
    assert set(by_mean) == {0, 1}
    assert set(by_mean == by_std) == {True, False}


def test_gradients_are_the_closed_forms(monkeypatch):
    method = tabular()
    waiting = critic_draws(monkeypatch)
    scale = STD.mean(1)  # the first observation starts the running mean
    found = gradients(method)
    assert waiting == []
    assert_gradients(found, closed_form(3 * scale, scale**2 + 0.1))
    # The tables exercise both sides of the clip.
    _, y_z = targets()
    beyond = np.abs(y_z - own_values()[0]) > 3 * scale[:, None]
    assert beyond.any() and not beyond.all()


def test_surrogate_and_metrics(monkeypatch):
    method = tabular()
    critic_draws(monkeypatch)
    loss, _, metrics = loss_of(method)
    scale = STD.mean(1)
    for_mean, for_std = closed_form(3 * scale, scale**2 + 0.1)
    mean, std = own_values()
    assert loss.item() == pytest.approx((for_mean * mean + for_std * std).sum(), rel=1e-4)
    assert metrics["td_error"].item() == pytest.approx(np.abs(targets()[0] - mean).mean(), rel=1e-4)
    assert metrics["q_mean"].item() == pytest.approx(mean.mean(), rel=1e-4)
    assert metrics["q_std"].item() == pytest.approx(std.mean(), rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("alpha", "settings"),
    [
        (0.0, {}),
        (1.3, {}),
        (0.7, {"reward_scale": 2.5}),
        (0.7, {"epsilon": 0.02}),
        (0.7, {"epsilon_omega": 0.0}),
        (0.7, {"xi": 1.0}),
    ],
)
def test_each_setting_enters_where_it_should(monkeypatch, alpha, settings):
    method = tabular(**settings)
    critic_draws(monkeypatch)
    scale = STD.mean(1)
    expected = closed_form(
        settings.get("xi", 3) * scale,
        scale**2 + settings.get("epsilon_omega", 0.1),
        epsilon=settings.get("epsilon", 0.1),
        alpha=alpha,
        scale=settings.get("reward_scale", 1.0),
    )
    assert_gradients(gradients(method, alpha), expected)


# ---- running scales


def test_running_scales_start_at_the_first_batch(monkeypatch):
    method = tabular(tau_b=0.25)
    assert method.std_scale.tolist() == method.variance_scale.tolist() == [0.0, 0.0]
    draws(monkeypatch, NEXT_NOISE, RETURN_NOISE, NOISE)
    method.update(rows(), 0)
    np.testing.assert_allclose(method.std_scale.numpy(), STD.mean(1), rtol=1e-5)
    np.testing.assert_allclose(method.variance_scale.numpy(), (STD**2).mean(1), rtol=1e-5)
    assert not method.std_scale.requires_grad


@pytest.mark.parametrize("kind", ["squared_mean", "mean_square"])
def test_running_scales_move_before_the_loss(monkeypatch, kind):
    method = tabular(tau_b=0.25, gradient_scale=kind)
    method.std_scale.copy_(torch.tensor([2.0, 0.3]))
    method.variance_scale.copy_(torch.tensor([5.0, 0.2]))
    critic_draws(monkeypatch)
    scale = 0.75 * np.array([2.0, 0.3]) + 0.25 * STD.mean(1)
    variance = 0.75 * np.array([5.0, 0.2]) + 0.25 * (STD**2).mean(1)
    omega = scale**2 if kind == "squared_mean" else variance
    assert_gradients(gradients(method), closed_form(3 * scale, omega + 0.1))
    assert method.std_scale.tolist() == pytest.approx([2.0, 0.3])  # `update` stores what it returns
    draws(monkeypatch, NEXT_NOISE, RETURN_NOISE, NOISE)
    method.update(rows(), 1)
    np.testing.assert_allclose(method.std_scale.numpy(), scale, rtol=1e-5)
    np.testing.assert_allclose(method.variance_scale.numpy(), variance, rtol=1e-5)


def test_running_scales_take_tau_by_default(monkeypatch):
    method = tabular(tau=0.5)
    method.std_scale.copy_(torch.tensor([2.0, 0.3]))
    method.variance_scale.fill_(1.0)
    draws(monkeypatch, NEXT_NOISE, RETURN_NOISE)
    method.update(rows(), 1)
    expected = 0.5 * np.array([2.0, 0.3]) + 0.5 * STD.mean(1)
    np.testing.assert_allclose(method.std_scale.numpy(), expected, rtol=1e-5)


# ---- ablations and the older method


@pytest.mark.parametrize("mean_target", ["clipped", "sampled"])
def test_without_expected_value_substitution(monkeypatch, mean_target):
    method = tabular(mean_target=mean_target)
    critic_draws(monkeypatch)
    found, scale = gradients(method), STD.mean(1)
    usual = closed_form(3 * scale, scale**2 + 0.1)
    assert_gradients(found, closed_form(3 * scale, scale**2 + 0.1, mean_target=mean_target))
    np.testing.assert_allclose(found[1], usual[1], rtol=2e-4, atol=1e-5)  # the std is not touched
    assert np.abs(found[0] - usual[0])[:, ~TERMINATED].min() > 1e-3


def test_single_distribution(monkeypatch):
    method = tabular(num_critics=1)
    critic_draws(monkeypatch)
    scale = STD.mean(1)[:1]
    found = gradients(method)
    assert_gradients(found, closed_form(3 * scale, scale**2 + 0.1, members=1))
    twins = closed_form(3 * STD.mean(1), STD.mean(1) ** 2 + 0.1)
    assert np.abs(found[0] - twins[0][:1]).max() > 1e-2  # other targets: no minimum


@pytest.mark.parametrize("bound", [20.0, 1.5])
def test_fixed_bound_and_no_gradient_scale(monkeypatch, bound):
    method = tabular(variance_adjustment=False, fixed_bound=bound, epsilon_omega=7.0)
    method.std_scale.fill_(9.0)
    critic_draws(monkeypatch)
    assert_gradients(gradients(method), closed_form([bound, bound], [1.0, 1.0]))


def test_dsac_v1(monkeypatch):
    older = dsac_v1(discount=0.8, fixed_bound=1.0)
    changed = {k: v for k, v in vars(older).items() if v != getattr(Config(), k)}
    assert changed == {
        "mean_target": "sampled",
        "num_critics": 1,
        "variance_adjustment": False,
        "discount": 0.8,
        "fixed_bound": 1.0,
    }
    method = tabular(dsac_v1)
    critic_draws(monkeypatch)
    expected = closed_form([20.0], [1.0], members=1, mean_target="sampled")
    assert_gradients(gradients(method), expected)


# ---- the Huber form


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 0.7), (40.0, 0.2)])
def test_huber_form_against_torch(monkeypatch, factor, scale, alpha):
    method = tabular(
        critic_loss="huber", huber_second_moment_factor=factor, reward_scale=scale, xi=100.0
    )
    critic_draws(monkeypatch)
    loss, *_ = loss_of(method, alpha)
    y_q, y_z = (torch.tensor(y) for y in targets(alpha, scale=scale))
    mean, std = (torch.tensor(value, requires_grad=True) for value in own_values())
    running = torch.tensor(STD.mean(1))[:, None]
    huber = torch.nn.HuberLoss(reduction="none", delta=50.0)
    target = mean.detach() + torch.clamp(y_z - mean.detach(), -100 * running, 100 * running)
    gap = std.detach() ** 2 - factor * huber(mean.detach(), target)
    rho = torch.clamp(running**2 / (std.detach() ** 2 + 0.1), 0.1, 10.0)
    terms = rho * (huber(mean, y_q.expand(2, 5)) + std * gap / (std.detach() + 0.1))
    expected = terms.sum() / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, [method.critic.net.weights[0]])
    for_mean, for_std = torch.autograd.grad(expected, [mean, std])
    sigmoid = 1 - torch.exp(-std.detach())
    found = gradient.double()[:, :5]
    torch.testing.assert_close(found[..., 0], for_mean, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(found[..., 1], for_std * sigmoid, rtol=2e-4, atol=1e-5)
    if scale > 1:
        assert (y_q - mean.detach()).abs().max() > 50  # beyond the Huber threshold


# ---- policy and temperature


def expected_actor(alpha, mean=MEAN, log_std=LOG_STD, table=Q, slope=SLOPE):
    action, logp = sample(mean, log_std, NOISE)
    return np.mean(alpha * logp - (table + np.einsum("ea,ba->eb", slope, action)).min(0)), logp


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_actor_loss_against_numpy(monkeypatch, alpha):
    method = tabular()
    draws(monkeypatch, NOISE)
    loss, logp = method.actor_loss(rows().obs, torch.tensor(alpha))
    expected, expected_logp = expected_actor(alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logp.numpy(), expected_logp, rtol=1e-5)
    assert not logp.requires_grad
    (gradient,) = torch.autograd.grad(loss, [method.actor.net.weights[0]])
    for row, column in np.ndindex(5, 4):
        step = np.zeros((5, 4))
        step[row, column] = 1e-5
        ends = [
            expected_actor(alpha, MEAN + sign * step[:, :2], LOG_STD + sign * step[:, 2:])[0]
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient[row, column].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("logp", "direction"), [(3.0, 1), (1.5, -1), (-1.0, -1)])
def test_temperature_follows_the_entropy(monkeypatch, logp, direction):
    method = tabular(initial_log_alpha=-1.0, alpha_learning_rate=0.02)
    log_std = -(logp / 2 + 0.5 * math.log(2 * math.pi))
    put_actor(method.actor, np.zeros((5, 2)), np.full((5, 2), log_std))
    draws(monkeypatch, NEXT_NOISE, RETURN_NOISE, np.zeros((5, 2)))
    metrics = method.update(rows(), 0)
    # The first moment starts as a tenth of the gradient.
    gradient = 10 * method.alpha_opt.first_moment[0].item()
    assert gradient == pytest.approx(-(logp - 2), rel=1e-4)
    assert method.log_alpha.item() == pytest.approx(-1 + direction * 0.02, rel=1e-4)
    assert metrics["alpha"].item() == pytest.approx(math.exp(-1), rel=1e-5)
    assert metrics["entropy"].item() == pytest.approx(-logp, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_fixed_temperature_never_moves(alpha):
    method = tabular(alpha=alpha)
    before = method.log_alpha.item()
    for step in range(4):
        metrics = method.update(rows(), step)
        assert metrics["alpha"].item() == pytest.approx(alpha)
        assert all(math.isfinite(value.item()) for value in metrics.values())
    assert method.log_alpha.item() == before
    assert before == pytest.approx(math.log(alpha) if alpha else -math.inf)
    assert method.alpha_opt.num_steps.item() == 0


# ---- who moves, when, and by how much

NETWORKS = ("actor", "critic", "target_actor", "target_critic")


def parts(method):
    found = {n: [p.detach().clone() for p in getattr(method, n).parameters()] for n in NETWORKS}
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
    minimize, polyak = Optim.minimize, dsac_t.polyak
    names = {id(getattr(method, n)): n for n in ("actor_opt", "critic_opt", "alpha_opt")}

    def note(name, action, *arguments):
        before = parts(method)
        action(*arguments)
        order.append((name, changed(before, parts(method))))

    monkeypatch.setattr(
        Optim, "minimize", lambda self, loss: note(names[id(self)], minimize, self, loss)
    )
    monkeypatch.setattr(dsac_t, "polyak", lambda *arguments: note("polyak", polyak, *arguments))
    return order


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_delayed_moves(monkeypatch, delay):
    method = tabular(delay_update=delay)
    order = record(monkeypatch, method)
    critic = ("critic_opt", {"critic"})
    for step in range(2 * delay + 1):
        order.clear()
        metrics = method.update(rows(), step)
        if step % delay:
            assert order == [critic]
            assert "actor_loss" not in metrics
            continue
        # Policy and temperature come before the critics' step: they must see the critics as they
        # were. The targets come last and follow the critics that were just moved.
        assert sorted(order[:-2], key=str) == sorted(
            [("actor_opt", {"actor"}), ("alpha_opt", {"log_alpha"}), critic], key=str
        )
        assert order[-2:] == [("polyak", {"target_critic"}), ("polyak", {"target_actor"})]
        assert "actor_loss" in metrics


def critic_tables(method):
    weight = method.critic.net.weights[0].detach().double().numpy()[..., 0]
    bias = method.critic.net.biases[0].detach().double().numpy()[..., 0]
    return weight[:, :5] + bias, weight[:, 5:]


def test_policy_climbs_the_critics_of_before(monkeypatch):
    # One step of Adam moves every entry of the critics by 0.5: the two readings are far apart.
    method = tabular(alpha=0.7, critic_learning_rate=0.5)
    draws(monkeypatch, NEXT_NOISE, RETURN_NOISE, NOISE)
    metrics = method.update(rows(), 0)
    table, slope = critic_tables(method)
    old, new = expected_actor(0.7)[0], expected_actor(0.7, table=table, slope=slope)[0]
    assert abs(old - new) > 0.1
    assert metrics["actor_loss"].item() == pytest.approx(old, rel=1e-4)


def test_targets_follow_by_tau():
    method = tabular(tau=0.3, critic_learning_rate=0.5, actor_learning_rate=0.5)
    before = parts(method)
    method.update(rows(), 0)
    now = parts(method)
    for name in ("actor", "critic"):
        assert changed({name: before[name]}, {name: now[name]})
        for target, old, source in zip(
            now[f"target_{name}"], before[f"target_{name}"], now[name], strict=True
        ):
            torch.testing.assert_close(target, 0.7 * old + 0.3 * source)


def test_gradients_reach_their_own_part_only(monkeypatch):
    method = tabular()
    critic_draws(monkeypatch)
    loss, *_ = loss_of(method)
    others = [*method.actor.parameters(), method.log_alpha]
    found = torch.autograd.grad(loss, others, allow_unused=True)
    assert found == (None,) * len(others)
    for name in ("target_actor", "target_critic"):
        assert not any(p.requires_grad for p in getattr(method, name).parameters())


def test_next_actions_come_from_the_target_policy(monkeypatch):
    method = tabular()
    results = []
    for network in (None, method.actor, method.target_actor):
        if network is not None:
            with torch.no_grad():
                network.net.biases[0].add_(0.5)
        critic_draws(monkeypatch)
        results.append(gradients(method)[0])
    assert np.array_equal(results[0], results[1])
    assert np.abs(results[2] - results[0])[:, ~TERMINATED].min() > 1e-4


# ---- the object


def test_start():
    torch.manual_seed(0)
    method = DSACT(Config(hidden=(8,)), SPEC, Runtime(RUNTIME))
    for parameter in method.critic.parameters():
        assert not torch.equal(parameter[0], parameter[1])
    for name in ("actor", "critic"):
        source, target = getattr(method, name), getattr(method, f"target_{name}")
        pairs = zip(source.parameters(), target.parameters(), strict=True)
        assert all(torch.equal(p, q) and not q.requires_grad for p, q in pairs)
    assert method.log_alpha.item() == 1.0
    assert method.target_entropy == -2.0
    assert method.actor(torch.full((1, 5), 1e6)).log_std.max().item() <= 0.5


def test_actions(monkeypatch):
    method = tabular()
    mode = method.act(torch.eye(5), explore=False).value
    np.testing.assert_allclose(mode.numpy(), np.tanh(MEAN), rtol=1e-5)
    draws(monkeypatch, NOISE)
    drawn = method.act(torch.eye(5), explore=True).value
    np.testing.assert_allclose(drawn.numpy(), sample(MEAN, LOG_STD, NOISE)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("critic_learning_rate", 0.0),
        ("actor_learning_rate", -1.0),
        ("alpha_learning_rate", 0.0),
        ("discount", 1.0),
        ("tau", 0.0),
        ("tau_b", 1.5),
        ("delay_update", 0),
        ("xi", 0.0),
        ("epsilon", -0.1),
        ("epsilon_omega", -0.1),
        ("huber_second_moment_factor", 0.0),
        ("num_critics", 0),
        ("fixed_bound", 0.0),
        ("alpha", -0.1),
        ("reward_scale", -1.0),
        ("log_std_range", (1.0, 0.5)),
        ("warmup", -1),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(UserError, match=f"{setting} must be "):
        Config(**{setting: value})


def test_choices_are_refused():
    spec = Spec(obs_shape=(4,), action_shape=(), num_actions=3)
    with pytest.raises(UserError, match=r"dsac_t needs a continuous .* Discrete\(3\): use ppo"):
        DSACT(Config(), spec, Runtime(RUNTIME))


# ---- learning


def learned_return(updates=1_100, **settings):
    """Mean and std that the critics settle at for endless rewards of N(0.5, 1) at discount 0.9."""
    line = Spec(obs_shape=(1,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    torch.manual_seed(0)
    config = Config(
        hidden=(),
        discount=0.9,
        alpha=0.0,
        critic_learning_rate=2e-2,
        tau=0.1,
        delay_update=1,
        **settings,
    )
    method = DSACT(config, line, Runtime(RUNTIME))
    draw = torch.Generator().manual_seed(0)
    never, nothing = torch.zeros(256, dtype=torch.bool), torch.zeros(256, 1)
    mean, std = [], []
    for step in range(updates):
        batch = Transitions(
            obs=nothing,
            action=torch.rand(256, 1, generator=draw) * 2 - 1,
            reward=0.5 + torch.randn(256, generator=draw),
            next_obs=nothing,
            terminated=never,
            truncated=never,
        )
        metrics = method.update(batch, step)
        if step >= 0.75 * updates:
            mean.append(metrics["q_mean"].item())
            std.append(metrics["q_std"].item())
    return np.mean(mean), np.mean(std)


def test_return_distribution_is_found(unchecked):
    # Exact: mean 0.5 / (1 - 0.9) = 5, variance 1 / (1 - 0.81), std 2.294. The clips at three stds
    # cost about 2.5% of the std, the minimum over twins a part of the mean.
    mean, std = learned_return()
    assert 4.6 < mean < 5.1
    assert abs(std - 2.24) < 0.15


def test_huber_factor_one_shrinks_the_std(unchecked):
    # Its fixed point is sqrt(0.5 / (1 - 0.405)) = 0.917 before the clips.
    _, std = learned_return(critic_loss="huber", huber_second_moment_factor=1.0)
    assert 0.75 < std < 1.0
