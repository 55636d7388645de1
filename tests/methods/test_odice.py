"""ODICE: its three gradients by hand and against numpy, the cloning, the data, and a fixed point.

Networks without hidden layers on one-hot observations are tables (and one shared bias), so values
are written down. The references share no code with the method.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import esscher
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.functional.divergences import by_name
from esscher.methods.offline.odice import (
    ODICE,
    Config,
    cloning_weight,
    conjugate_terms,
    imitation,
    proof,
)
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
BOX = {"action_low": (-1.0, -1.0), "action_high": (1.0, 1.0)}
SPEC = Spec(obs_shape=(4,), action_shape=(2,), **BOX)

# Row k is the step from state k to state k + 1; the last one ends the task, the first is cut.
ACTION = np.array([[0.5, -0.2], [-0.9, 0.1], [0.3, 0.3], [0.0, 0.8]])
REWARD = np.array([1.0, -2.0, 0.5, 3.0])
TERMINATED = np.array([False, False, False, True])
FOLLOWING = [1, 2, 3, 0]

# Of two heads. The second has row 1 of its forward and row 0 of its backward residual below -2.
VALUE = np.array([[1.0, 2.0, -1.0, 0.5], [2.0, 4.0, 0.0, 0.4]])
TARGET = np.array([[0.3, -1.0, 4.0, 2.0], [3.5, -2.0, 5.0, 1.0]])
MEAN = np.array([[0.1, -0.4], [0.7, 0.2], [-1.2, 0.0], [0.4, 0.9]])


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


def tabular(value=VALUE, target=TARGET, spec=SPEC, **settings):
    """A learner whose networks are tables."""
    torch.manual_seed(0)
    small = {
        "num_critics": len(value),
        "hidden": (),
        "layer_norm": False,
        "policy_hidden": (),
        "discount": 0.9,
        "batch_size": 4,
    }
    method = ODICE(Config(**{**small, **settings}), spec, Runtime(RUNTIME))
    put(method.critic, value[:, :, None], np.zeros((len(value), 1, 1)))
    if hasattr(method, "target_critic"):
        put(method.target_critic, target[:, :, None], np.zeros((len(value), 1, 1)))
    if spec is SPEC:
        put(method.actor, MEAN, np.zeros(2))
    return method


def put(network, weight, bias):
    with torch.no_grad():
        network.net.weights[0].copy_(torch.tensor(weight))
        network.net.biases[0].copy_(torch.tensor(bias))


def table(network):
    return network.net.weights[0].detach().double().numpy()[..., 0]


def flat(gradients):
    return np.concatenate([g.detach().double().numpy().ravel() for g in gradients])


# ---- the three gradients, by hand


SMALL = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))


def two_states(value_gradient, **settings):
    """0 leads to 1 with reward 1, which ends with reward -4; V = 1, 2 and V-bar = 3, 5."""
    method = tabular(
        np.array([[1.0, 2.0]]),
        np.array([[3.0, 5.0]]),
        SMALL,
        **{"value_gradient": value_gradient, "discount": 0.5, "batch_size": 2, **settings},
    )
    rows = batch(
        obs=np.eye(2),
        action=np.zeros((2, 1)),
        reward=np.array([1.0, -4.0]),
        next_obs=np.array([[0.0, 1.0], [1.0, 0.0]]),
        terminated=np.array([False, True]),
        truncated=np.array([False, False]),
    )
    return method, rows


# Gradients of V(0), V(1) and the bias, with lambda = 0.6. Forward residuals 1 + 0.5 * 5 - 1 = 2.5
# and -4 - 2 = -6, so f*' = 2.25 and 0: g_f = -0.3 * (2.25, 0). Backward residuals
# 1 + 0.5 * 2 - 3 = -1 and -9, so f*' = 0.5 and 0: g_b = 0.3 * 0.5 * 0.5 in V(1). g_v = 0.2 each.
FORWARD = [-0.675, 0.0, -0.675]
BACKWARD = [0.0, 0.075, 0.075]
DIRECT = [0.2, 0.2, 0.4]


def test_parts_by_hand():
    method, rows = two_states("orthogonal")
    residual, loss, terms = method.gradient_terms(rows)
    assert residual.tolist() == [[2.5, -6.0]]
    assert flat(terms.forward).tolist() == pytest.approx(FORWARD)
    assert flat(terms.backward).tolist() == pytest.approx(BACKWARD)
    assert flat(terms.direct).tolist() == pytest.approx(DIRECT)
    # f*(2.5) = 2.5 + 2.5^2 / 4 = 4.0625 and f*(-6) = -1.
    assert loss.item() == pytest.approx(0.4 * 1.5 + 0.6 * (4.0625 - 1) / 2)


def test_orthogonal_by_hand():
    method, rows = two_states("orthogonal")
    residual, gradients, metrics = method.value_gradients(rows)
    # <g_f, g_b> = -0.675 * 0.075 (the bias), <g_f, g_f> = 2 * 0.675^2: c = -1 / 18, and
    # g_b - c g_f = (-0.0375, 0.075, 0.0375).
    expected = [0.2 - 0.675 - 0.0375, 0.2 + 0.075, 0.4 - 0.675 + 0.0375]
    assert flat(gradients).tolist() == pytest.approx(expected)
    assert metrics["cosine"].item() == pytest.approx(-0.5)
    assert residual.tolist() == [[2.5, -6.0]] and not residual.requires_grad


def test_backward_scale_multiplies_the_backward_part_alone():
    method, rows = two_states("orthogonal", backward_scale=3.0)
    expected = [0.2 - 0.675 - 3 * 0.0375, 0.2 + 3 * 0.075, 0.4 - 0.675 + 3 * 0.0375]
    assert flat(method.value_gradients(rows)[1]).tolist() == pytest.approx(expected)


def test_semi_by_hand():
    method, rows = two_states("semi")
    residual, gradients, metrics = method.value_gradients(rows)
    assert residual.tolist() == [[2.5, -6.0]]
    assert flat(gradients).tolist() == pytest.approx([0.2 - 0.675, 0.2, 0.4 - 0.675])
    assert metrics["value_loss"].item() == pytest.approx(0.4 * 1.5 + 0.6 * (4.0625 - 1) / 2)


def test_true_by_hand():
    method, rows = two_states("true")
    residual, gradients, metrics = method.value_gradients(rows)
    # Residuals 1 + 0.5 * 2 - 1 = 1 and -6: f*' = 1.5 and 0, through V(0) and half through V(1).
    assert residual.tolist() == [[1.0, -6.0]]
    assert flat(gradients).tolist() == pytest.approx([0.2 - 0.45, 0.2 + 0.225, 0.4 - 0.45 + 0.225])
    assert metrics["value_loss"].item() == pytest.approx(0.4 * 1.5 + 0.6 * (1.25 - 1) / 2)
    assert not hasattr(method, "target_critic")


def test_no_forward_gradient_leaves_the_backward_one_whole():
    method, rows = two_states("orthogonal")
    put(method.critic, np.array([[[10.0], [9.0]]]), np.zeros((1, 1, 1)))
    put(method.target_critic, np.array([[[-9.0], [5.0]]]), np.zeros((1, 1, 1)))
    # Forward residuals 3.5 - 10 and -4 - 9 are below -2; the backward one of row 0 is 5.5 + 9.
    *_, terms = method.gradient_terms(rows)
    assert flat(terms.forward).tolist() == [0, 0, 0]
    part = 0.3 * 0.5 * (14.5 / 2 + 1)
    expected = [0.2, 0.2 + part, 0.4 + part]
    assert flat(method.value_gradients(rows)[1]).tolist() == pytest.approx(expected)


# ---- the same against numpy


RATIO = {
    "pearson_chi2": lambda y: np.maximum(y / 2 + 1, 0),
    "kl": lambda y: np.exp(y - 1),
}


def slopes(gradient_of_value):
    """Of [e, rows] with a row for each state, as gradients of a table and its bias."""
    return np.concatenate([gradient_of_value.ravel(), gradient_of_value.sum(1)])


def reference(kind, generator, weight, eta, discount=0.9):
    """Residuals and the descended gradient of the tables above, twin heads."""
    ratio, going = RATIO[generator], discount * ~TERMINATED
    size = VALUE.size
    smallest = TARGET.min(0)
    direct = np.full(VALUE.shape, (1 - weight) / size)
    if kind == "true":
        residual = REWARD + going * VALUE[:, FOLLOWING] - VALUE
        slope = weight * ratio(residual) / size
        through = np.zeros(VALUE.shape)
        through[:, FOLLOWING] = going * slope
        return residual, slopes(direct - slope + through)
    residual = REWARD + going * smallest[FOLLOWING] - VALUE
    forward = slopes(-weight * ratio(residual) / size)
    if kind == "semi":
        return residual, slopes(direct) + forward
    behind = REWARD + going * VALUE[:, FOLLOWING] - smallest
    through = np.zeros(VALUE.shape)
    through[:, FOLLOWING] = going * weight * eta * ratio(behind) / size
    backward = slopes(through)
    backward = backward - forward @ backward / (forward @ forward) * forward
    return residual, slopes(direct) + forward + backward


@pytest.mark.parametrize("generator", ["pearson_chi2", "kl"])
@pytest.mark.parametrize("kind", ["orthogonal", "true", "semi"])
@pytest.mark.parametrize(("weight", "eta"), [(0.6, 1.0), (0.2, 0.5)])
def test_twins_against_numpy(kind, generator, weight, eta):
    method = tabular(
        value_gradient=kind, generator=generator, conjugate_weight=weight, backward_scale=eta
    )
    residual, gradients, _ = method.value_gradients(batch())
    expected_residual, expected = reference(kind, generator, weight, eta)
    np.testing.assert_allclose(residual.numpy(), expected_residual, rtol=1e-5)
    np.testing.assert_allclose(flat(gradients), expected, rtol=1e-4, atol=1e-6)


def test_the_tables_can_tell_the_smaller_target_and_the_flat_part():
    assert set(TARGET.argmin(0)) == {0, 1}
    residual = reference("orthogonal", "pearson_chi2", 0.6, 1.0)[0]
    assert (residual < -2).any() and (residual > -2).any()


def network_values(parameters, obs, eps=1e-5):
    """Two layers with layer normalisation, then one value: e heads in numpy."""
    x = np.broadcast_to(obs, (len(parameters["w0"]), *obs.shape))
    for layer in (0, 1):
        x = x @ parameters[f"w{layer}"] + parameters[f"b{layer}"]
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        x = np.maximum(x * parameters[f"s{layer}"] + parameters[f"t{layer}"], 0)
    return (x @ parameters["w2"] + parameters["b2"])[..., 0]


def test_networks_with_layer_norm_against_finite_differences():
    torch.manual_seed(1)
    method = ODICE(Config(hidden=(4, 3), policy_hidden=(4,)), SPEC, Runtime(RUNTIME))
    for critic in (method.critic, method.target_critic):
        critic.double()
        for parameter in critic.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    draw = np.random.default_rng(0)
    obs, next_obs, reward = draw.normal(size=(6, 4)), draw.normal(size=(6, 4)), draw.normal(size=6)
    terminated = np.arange(6) == 2
    rows = Transitions(
        obs=torch.tensor(obs),
        action=torch.zeros(6, 2),
        reward=torch.tensor(reward),
        next_obs=torch.tensor(next_obs),
        terminated=torch.tensor(terminated),
        truncated=torch.zeros(6, dtype=torch.bool),
    )

    def arrays(critic):
        net = critic.net
        kinds = {"w": net.weights, "b": net.biases, "s": critic.scales, "t": critic.shifts}
        return {
            f"{kind}{i}": p.detach().numpy().copy()
            for kind, items in kinds.items()
            for i, p in enumerate(items)
        }

    own, target, names = arrays(method.critic), arrays(method.target_critic), {}
    for name, parameter in method.critic.named_parameters():
        for key, value in own.items():
            if np.array_equal(value, parameter.detach().numpy()):
                names[name] = key
    assert sorted(names.values()) == sorted(own)
    near, far = (network_values(target, x).min(0) for x in (obs, next_obs))
    going = 0.99 * ~terminated

    def conjugate(y):
        u = np.maximum(y / 2 + 1, 0)
        return 0.6 * np.mean(u * y - (u - 1) ** 2)

    losses = {
        "direct": lambda: 0.4 * network_values(own, obs).mean(),
        "forward": lambda: conjugate(reward + going * far - network_values(own, obs)),
        "backward": lambda: conjugate(reward + going * network_values(own, next_obs) - near),
    }
    *_, terms = method.gradient_terms(rows)
    for part, loss in losses.items():
        found = dict(zip(names.values(), getattr(terms, part), strict=True))
        for key, value in own.items():
            expected = np.zeros_like(value)
            for index in np.ndindex(value.shape):
                ends = []
                for sign in (1, -1):
                    value[index] += sign * 1e-6
                    ends.append(loss())
                    value[index] -= sign * 1e-6
                expected[index] = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-5, atol=1e-8)
        assert any(g.abs().max() > 1e-3 for g in found.values()), part
    # Nothing is lost of the forward part, and the update is their sum with one coefficient.
    f, b, v = (flat(getattr(terms, part)) for part in ("forward", "backward", "direct"))
    total = flat(method.value_gradients(rows)[1])
    np.testing.assert_allclose(total, v + f + b - (f @ b) / (f @ f) * f, rtol=1e-10)
    assert (total - v) @ f == pytest.approx(f @ f, rel=1e-10)


def test_semi_equals_orthogonal_without_backward_part():
    gradients = []
    for settings in ({"value_gradient": "semi"}, {"backward_scale": 0.0}):
        torch.manual_seed(3)
        method = ODICE(
            Config(hidden=(16, 16), policy_hidden=(8,), **settings), SPEC, Runtime(RUNTIME)
        )
        gradients.append(flat(method.value_gradients(batch())[1]))
    np.testing.assert_allclose(*gradients, atol=1e-6)
    method = ODICE(Config(hidden=(16, 16), policy_hidden=(8,)), SPEC, Runtime(RUNTIME))
    assert not np.allclose(flat(method.value_gradients(batch())[1]), gradients[0], atol=1e-3)


# ---- conjugates and weights


def test_conjugates_by_hand():
    chi2, kl = by_name("pearson_chi2"), by_name("kl")
    y = torch.tensor([-5.0, -2.0, 0.0, 2.0])
    assert conjugate_terms(chi2, y, 1.0).tolist() == [-1.0, -1.0, 0.0, 3.0]
    e = math.e
    y = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    terms = conjugate_terms(kl, y, 1.0)
    # exp(y - 1) up to an exponent of 1, there e with slope e.
    assert terms.tolist() == pytest.approx([1.0, e, 2 * e, 4 * e])
    terms.sum().backward()
    assert y.grad.tolist() == pytest.approx([1.0, e, e, e])


def test_weights_by_hand():
    chi2, kl = by_name("pearson_chi2"), by_name("kl")
    y = torch.tensor([-3.0, -1.0, 0.0, 2.0, 500.0])
    assert cloning_weight(chi2, y, "official", 100.0).tolist() == [0, 0, 0, 2, 100]
    assert cloning_weight(chi2, y, "exact", 100.0).tolist() == [0, 0.5, 1, 2, 100]
    for form in ("official", "exact"):
        found = cloning_weight(kl, y, form, 100.0).tolist()
        assert found == pytest.approx([math.exp(-4), math.exp(-2), 1 / math.e, math.e, 100])


def test_large_residuals_stay_finite():
    method = tabular(generator="kl", weight="exact")
    for _ in range(3):
        metrics = method.update(batch(reward=np.array([1e4, -1e4, 0.0, 5.0])), 0)
        assert all(math.isfinite(value.item()) for value in metrics.values())
    assert all(torch.isfinite(p).all() for p in method.critic.parameters())
    # At first: residuals of 1e4 at the cap, of -1e4 near zero; the mean over heads and rows.
    assert metrics["weight"].item() > 25


def test_ratio_by_hand():
    method, rows = two_states("orthogonal")
    # With the network's own V(s'): residuals 1 + 0.5 * 2 - 1 = 1 and -6.
    assert method.ratio(rows).tolist() == [1.5, 0.0]
    twins = tabular()
    residual = REWARD + 0.9 * ~TERMINATED * VALUE.min(0)[FOLLOWING] - VALUE
    expected = np.maximum(residual / 2 + 1, 0).mean(0)
    np.testing.assert_allclose(twins.ratio(batch()).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(twins.value(torch.eye(4)).numpy(), VALUE.min(0))


# ---- the policy


def log_density(action, mean, std):
    return (-0.5 * ((action - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)


@pytest.mark.parametrize("tanh_mean", [False, True])
def test_cloning_loss_against_numpy(tanh_mean):
    method = tabular(tanh_mean=tanh_mean)
    method.actor.log_std.data.copy_(torch.tensor([-0.5, 0.3]))
    weight = np.array([[1.0, 0.0, 2.0, 5.0], [3.0, 0.0, 0.5, 1.0]])
    found = method.policy_loss(torch.eye(4), torch.tensor(ACTION), torch.tensor(weight))
    mean = np.tanh(MEAN) if tanh_mean else MEAN
    logp = log_density(ACTION, mean, np.exp([-0.5, 0.3]))
    assert found.item() == pytest.approx(-np.mean(weight * logp), rel=1e-5)
    np.testing.assert_allclose(method.policy(torch.eye(4)).mode().detach(), mean, rtol=1e-5)


def test_deviation_is_clamped():
    method = tabular()
    method.actor.log_std.data.copy_(torch.tensor([-9.0, 7.0]))
    assert method.policy(torch.eye(4)).log_std[0].tolist() == [-5.0, 2.0]


def test_policy_against_a_plain_optimiser():
    """Three whole updates: weights before the networks' step, decay within the gradient."""
    method = tabular(policy_weight_decay=0.2, policy_learning_rate=0.03, value_learning_rate=0.5)
    mean, bias = torch.tensor(MEAN, requires_grad=True), torch.zeros(2, dtype=torch.float64)
    log_std = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    parameters = [mean, bias.requires_grad_(), log_std]
    optimiser = torch.optim.Adam(parameters, lr=0.03, weight_decay=0.2)
    for _ in range(3):
        with torch.no_grad():
            value = method.critic(torch.eye(4)).numpy()
            target = method.target_critic(torch.eye(4)).numpy().min(0)
        weight = np.maximum(REWARD + 0.9 * ~TERMINATED * target[FOLLOWING] - value, 0)
        metrics = method.update(batch(), 0)
        assert metrics["weight"].item() == pytest.approx(weight.mean(), rel=1e-4)
        optimiser.zero_grad()
        z = (torch.tensor(ACTION) - mean - bias) / log_std.exp()
        logp = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        loss = -(torch.tensor(weight) * logp).mean()
        loss.backward()
        optimiser.step()
        assert metrics["policy_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    own = [method.actor.net.weights[0], method.actor.net.biases[0], method.actor.log_std]
    for mine, other in zip(own, parameters, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), other.detach().numpy(), atol=1e-4)


def test_without_weights_the_decay_alone_moves_the_policy():
    method = tabular(policy_weight_decay=1e-4, policy_learning_rate=0.01)
    metrics = method.update(batch(reward=np.full(4, -50.0)), 0)
    assert metrics["weight"].item() == 0
    # Adam's first step has the size of the rate, towards zero; AdamW would move by 1e-6.
    moved = method.actor.net.weights[0].detach().numpy() - MEAN
    np.testing.assert_allclose(moved, -0.01 * np.sign(MEAN), rtol=0.02, atol=1e-6)


# ---- who moves, when


def parts(method):
    modules = {n: getattr(method, n) for n in ("actor", "critic", "target_critic")}
    return {n: [p.detach().clone() for p in m.parameters()] for n, m in modules.items()}


def test_value_networks_descend_and_targets_follow_by_tau():
    method = tabular(value_learning_rate=0.01, tau=0.3)
    _, gradient = reference("orthogonal", "pearson_chi2", 0.6, 1.0)
    method.update(batch(), 0)
    step = table(method.critic) - VALUE
    # The first step of Adam is the rate against the sign of the gradient.
    np.testing.assert_allclose(step, -0.01 * np.sign(gradient[:8]).reshape(2, 4), rtol=1e-3)
    expected = 0.7 * TARGET + 0.3 * table(method.critic)
    np.testing.assert_allclose(table(method.target_critic), expected, rtol=1e-5)


def test_gradients_reach_their_own_networks_only():
    method = tabular()
    before = parts(method)
    method.actor_opt.apply = lambda gradients: None
    method.update(batch(), 0)
    after = parts(method)
    assert all(map(torch.equal, before["actor"], after["actor"]))
    assert not any(map(torch.equal, before["critic"], after["critic"]))
    loss = method.policy_loss(torch.eye(4), torch.tensor(ACTION), torch.ones(2, 4))
    critics = list(method.critic.parameters())
    assert torch.autograd.grad(loss, critics, allow_unused=True) == (None,) * len(critics)
    everything = [*method.critic.parameters(), *method.actor.parameters()]
    assert all(p.grad is None for p in everything)


def test_truncation_is_not_an_end():
    residuals = [
        tabular().value_gradients(batch(truncated=truncated))[0]
        for truncated in (np.zeros(4, bool), np.ones(4, bool))
    ]
    assert torch.equal(*residuals)


def test_twins_start_apart_and_targets_equal():
    torch.manual_seed(0)
    method = ODICE(Config(hidden=(8,), policy_hidden=(8,)), SPEC, Runtime(RUNTIME))
    for parameter in [*method.critic.net.parameters()]:
        assert not torch.equal(parameter[0], parameter[1])
    pairs = zip(method.critic.parameters(), method.target_critic.parameters(), strict=True)
    assert all(torch.equal(p, q) and not q.requires_grad for p, q in pairs)


# ---- the data


def data(rewards, ends, obs=None, truncated=()):
    """Episodes that end (terminated, or cut where named) after the rows `ends`."""
    count = len(rewards)
    terminated = np.isin(np.arange(count), [e for e in ends if e not in truncated])
    cut = np.isin(np.arange(count), truncated)
    obs = np.zeros((count, 4)) if obs is None else obs
    rows = batch(
        obs=obs,
        action=np.zeros((count, 2)),
        reward=np.array(rewards, float),
        next_obs=obs,
        terminated=terminated,
        truncated=cut,
    )
    return Dataset(transitions=rows, step=torch.zeros(count, dtype=torch.int64), name="toy")


def rewards_of(method, source):
    torch.manual_seed(0)
    rows = method.experience(source).sample(400)
    return sorted({round(r, 4) for r in rows.reward.tolist()})


def test_reward_transforms_by_hand():
    # Returns 1 + 2 = 3, -4 and 6 (cut): 1000 / (6 + 4) = 100.
    source = data([1, 2, -4, 6], [1, 2, 3], truncated=(3,))
    assert rewards_of(tabular(reward_transform="none"), source) == [-4, 1, 2, 6]
    assert rewards_of(tabular(reward_transform="locomotion"), source) == [-400, 100, 200, 600]
    assert rewards_of(tabular(reward_transform="zero"), source) == [0]
    maze = data([0, 0, 1, 0], [2, 3])
    assert rewards_of(tabular(reward_transform="antmaze"), maze) == [-3, 0]
    assert source.transitions.reward.tolist() == [1, 2, -4, 6], "the data stay as they are"


def test_rewards_that_do_not_suit_are_refused():
    with pytest.raises(UserError, match=r"antmaze needs rewards 0 and 1, and those of toy lie in "):
        tabular(reward_transform="antmaze").experience(data([0, 0.5, 1, 1], [3]))
    with pytest.raises(UserError, match="all episodes of toy return the same"):
        tabular(reward_transform="locomotion").experience(data([1, 1, 2, 0], [1, 3]))


def test_the_first_episodes_alone():
    source = data([1, 2, 3, 4, 5, 6, 7], [1, 4, 6])
    method = tabular(num_episodes=2)
    assert rewards_of(method, source) == [1, 2, 3, 4, 5]
    assert rewards_of(tabular(num_episodes=1, batch_size=2), source) == [1, 2]
    with pytest.raises(UserError, match="num_episodes must be <= 3, those of toy, got 4"):
        tabular(num_episodes=4).experience(source)


def test_observations_are_normalised_for_every_network_and_deployed_so():
    obs = np.array([[0.0, 10, 5, 1], [2, 30, 5, 1], [4, 50, 5, 1], [6, 70, 5, 7]])
    method = tabular(normalize_obs=True)
    plain = {k: v.clone() for k, v in method.actor.state_dict().items()}
    method.experience(data([1, 2, 3, 4], [3], obs=obs))
    scale = obs.std(0) + 1e-3
    expected = (obs - obs.mean(0)) / scale
    seen = torch.tensor(obs, dtype=torch.float32)
    np.testing.assert_allclose(method.policy(seen).mode().detach(), expected @ MEAN, rtol=1e-4)
    np.testing.assert_allclose(method.value(seen), (expected @ VALUE.T).min(1), rtol=1e-4)
    rows = method.normalized(batch(obs=obs, next_obs=2 * obs))
    np.testing.assert_allclose(rows.obs, expected, rtol=1e-4)
    np.testing.assert_allclose(rows.next_obs, (2 * obs - obs.mean(0)) / scale, rtol=1e-4)
    # The moments travel with the policy's own state.
    other = tabular(normalize_obs=True)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.policy(seen).mode(), method.policy(seen).mode())
    assert not torch.equal(plain["obs_scale"], method.actor.state_dict()["obs_scale"])


def test_an_update_uses_normalised_observations():
    obs = np.array([[0.0, 10, 5, 1], [2, 30, 5, 1], [4, 50, 5, 1], [6, 70, 5, 7]])
    raw, normal = tabular(), tabular(normalize_obs=True)
    normal.experience(data([1, 2, 3, 4], [3], obs=obs))
    shifted = (obs - obs.mean(0)) / (obs.std(0) + 1e-3)
    found = normal.update(batch(obs=obs, next_obs=obs), 0)
    expected = raw.update(batch(obs=shifted, next_obs=shifted), 0)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name


def test_imitation_sees_no_reward():
    experiment = imitation()
    assert experiment.method.reward_transform == "zero" and experiment.method.num_episodes == 1
    states = []
    for rewards in ([1, 2, 3, 4], [-9, 0, 5, 5]):
        torch.manual_seed(0)
        cfg = replace(experiment.method, hidden=(8,), policy_hidden=(8,), batch_size=4)
        method = ODICE(cfg, SPEC, Runtime(RUNTIME))
        experience = method.experience(data(rewards, [3], obs=np.eye(4)))
        torch.manual_seed(1)
        for rows in experience.batches(1):
            method.update(rows, 0)
        states.append(method.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if torch.is_tensor(v))


# ---- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("conjugate_weight", 0.0),
        ("conjugate_weight", 1.0),
        ("backward_scale", -0.1),
        ("discount", 1.0),
        ("tau", 0.0),
        ("weight_cap", 0.0),
        ("max_exponent", 0.0),
        ("policy_weight_decay", -1e-4),
        ("num_critics", 0),
        ("num_episodes", 0),
        ("policy_hidden", (0,)),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(UserError, match=f"{setting} must be .*, got "):
        Config(**{setting: value})


def test_choices_are_refused():
    spec = Spec(obs_shape=(4,), action_shape=(), num_actions=3)
    with pytest.raises(UserError, match=r"odice needs a continuous .* Discrete\(3\)"):
        ODICE(Config(), spec, Runtime(RUNTIME))


def test_data_are_asked_for():
    with pytest.raises(UserError, match="odice learns from logged steps"):
        esscher.Experiment.of(Config(), env="Pendulum-v1", steps=10).resolved()


# ---- what the proof runs on, and a fixed point


def test_chain_data_return_what_the_rewards_add_up_to():
    from esscher.datasets import chain

    columns = chain()
    assert columns["rewards"][:5].tolist() == [1.0, -0.5, 2.0, 0.25, -1.0]
    assert columns["terminations"][:6].tolist() == [False] * 4 + [True, False]
    np.testing.assert_array_equal(columns["observations"][:5], np.eye(5))
    np.testing.assert_array_equal(columns["next_observations"][:4], np.eye(5)[1:])
    assert len(columns["rewards"]) == 498 and columns["terminations"].sum() == 99


def test_corridor_data_are_a_staggering_walk():
    from esscher.datasets import corridor

    columns = corridor()
    action, ended = columns["actions"], columns["terminations"]
    assert len(ended) == 4_000 and ended.sum() >= 5
    forward = action.sum(1)
    assert set(forward.tolist()) == {1.0, -1.0} and set(np.abs(action).sum(1).tolist()) == {1.0}
    assert np.mean(forward == 1) == pytest.approx(0.6, abs=0.025)
    assert (columns["rewards"] == np.where(ended, 0.0, -1.0)).all()
    # Each step goes 0.04 along the leg and 0 across; both ends are seen with noise of 0.03.
    step = columns["next_observations"] - columns["observations"]
    along = (step * action).sum(1)
    across = (step * (1 - np.abs(action))).sum(1)
    start = np.abs(columns["observations"] + 0.8).max(1) < 0.15
    # Noise of two sightings cancels between consecutive steps, so the mean is sharp.
    assert along[~start].mean() == pytest.approx(0.04, abs=0.002)
    assert np.abs(across.mean()) < 0.002 and across.std() == pytest.approx(0.03 * 2**0.5, rel=0.05)
    last = columns["next_observations"][ended]
    assert np.abs(last - 0.8).max() < 0.15
    again = corridor()
    assert all(np.array_equal(again[name], columns[name]) for name in columns)


@pytest.mark.parametrize("weight", [0.5, 0.65])
def test_values_reach_the_exact_fixed_point(weight):
    """One action a state: f*'(residual) = (1 - lambda) / lambda wherever V is free to move."""
    method = tabular(
        value_gradient="semi", conjugate_weight=weight, tau=0.2, value_learning_rate=0.03
    )
    for step in range(700):
        method.update(batch(), step)
    expected, following = np.zeros(4), 0.0
    for state in (3, 2, 1, 0):
        following = REWARD[state] + 0.9 * following - 2 * (1 - 2 * weight) / weight
        expected[state] = following
    with torch.no_grad():
        found = method.critic(torch.eye(4)).numpy()
    np.testing.assert_allclose(found, np.broadcast_to(expected, (2, 4)), atol=5e-3)


def test_the_proof_can_be_judged_and_fails_without_the_effect():
    claims = {claim.name: claim for claim in proof().claims}
    good = {
        "orthogonal": {"value": [-4.0], "overlap": [30.0], "cosine": [-0.99]},
        "true": {"value": [-300.0], "overlap": [9e3]},
        "semi": {"value": [-4.0], "overlap": [38.0]},
    }
    assert all(check.passed for check in claims["conflict"].judge(good))
    for arm, name, value in [
        ("orthogonal", "cosine", 0.99),
        ("orthogonal", "value", 1.0),
        ("orthogonal", "overlap", 39.0),
        ("true", "value", -4.0),
        ("semi", "value", -21.0),
    ]:
        worse = json.loads(json.dumps(good))
        worse[arm][name] = [value]
        assert not all(check.passed for check in claims["conflict"].judge(worse)), (arm, name)
