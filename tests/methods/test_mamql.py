"""MAMQL: its loss against numpy loops, the identities with cloning, its mixture, rewards recovered.

The networks are tables: no hidden layers, one-hot observations of three states for each of two agents
with two actions. So Q of agent g in state s for action a is an entry of a table.
"""

import numpy as np
import pytest
import torch

from esscher import datasets
from esscher.errors import UserError
from esscher.experience import Dataset
from esscher.functional.soft_values import without_shaping
from esscher.games import Gems, RandomGame
from esscher.methods.control.mamql import (
    MAMQL,
    Batch,
    Config,
    JointChoices,
    JointReward,
    _reward_error,
)
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Action, Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
SPEC = Spec(obs_shape=(6,), action_shape=(2,), num_actions=2, num_agents=2)

Q = np.array([[[1.0, -0.5], [0.2, 0.7], [-1.0, 0.3]], [[0.4, 0.1], [2.0, -1.0], [0.0, 0.6]]])
TARGET_Q = np.array([[[0.0, 0.5], [1.2, -0.7], [0.5, 0.5]], [[-0.4, 1.1], [0.3, 0.9], [2.0, -0.6]]])
# Rows are (state, (choice of agent 0, choice of agent 1), next state, terminated, truncated).
EXPERT = [
    (0, (0, 1), 1, False, False),
    (1, (1, 0), 2, False, True),
    (2, (1, 1), 0, True, False),
]
POLICY = [(1, (0, 0), 0, False, False), (2, (0, 1), 1, True, False), (0, (1, 1), 2, False, True)]
FIRST = [0, 2, 0]
INVERSE, DISCOUNT, ALPHA = 2.0, 0.9, 0.7


def observe(states):
    return torch.eye(3)[torch.tensor(states)].repeat(1, 2)


def rows(table):
    states, actions, following, terminated, truncated = zip(*table, strict=True)
    return Transitions(
        obs=observe(states),
        action=torch.tensor(actions),
        reward=torch.full((len(table),), 1e6),  # Whoever reads it will be noticed.
        next_obs=observe(following),
        terminated=torch.tensor(terminated),
        truncated=torch.tensor(truncated),
    )


def put(critics, table):
    with torch.no_grad():
        critics.net.weights[0].copy_(torch.tensor(table))
        critics.net.biases[0].zero_()


def tabular(**settings):
    torch.manual_seed(0)
    common = {
        "hidden": (),
        "inverse_temperature": INVERSE,
        "discount": DISCOUNT,
        "alpha": ALPHA,
        "batch_size": 3,
        "buffer_size": 10,
    }
    method = MAMQL(Config(**{**common, **settings}), SPEC, Runtime(RUNTIME))
    put(method.actor, Q)
    if method.cfg.target_update_interval is not None:
        put(method.target_actor, TARGET_Q)
    return method


def batch(own=True):
    return Batch(rows(EXPERT), rows(POLICY) if own else None, observe(FIRST))


def value_of(table, agent, state):
    return np.log(np.exp(INVERSE * table[agent, state]).sum()) / INVERSE


def reward_of(agent, row, ahead=Q):
    state, choices, following, terminated, _ = row
    after = 0.0 if terminated else DISCOUNT * value_of(ahead, agent, following)
    return Q[agent, state, choices[agent]] - after


def flow_of(agent, row, ahead=Q):
    state, _, following, terminated, _ = row
    after = 0.0 if terminated else DISCOUNT * value_of(ahead, agent, following)
    return value_of(Q, agent, state) - after


def losses(method, own=True):
    return method.loss(batch(own))[0].detach().numpy()


# ---- the loss


def test_online_loss_with_chi2_against_loops():
    expected = []
    for agent in range(2):
        recovered = [reward_of(agent, row) for row in EXPERT]
        every = [reward_of(agent, row) for row in EXPERT + POLICY]
        flows = [flow_of(agent, row) for row in EXPERT + POLICY]
        square = np.mean(np.square(every)) / (4 * ALPHA)
        expected.append(-(np.mean(recovered) - np.mean(flows) - square))
    np.testing.assert_allclose(losses(tabular()), expected, rtol=1e-6)


def test_the_square_may_be_taken_over_demonstrations_alone():
    expected = []
    for agent in range(2):
        x = np.array([reward_of(agent, row) for row in EXPERT])
        flows = [flow_of(agent, row) for row in EXPERT + POLICY]
        expected.append(np.mean(flows) - np.mean(x - x**2 / (4 * ALPHA)))
    np.testing.assert_allclose(losses(tabular(penalize="expert")), expected, rtol=1e-6)


def test_offline_both_ways_of_the_square_are_one():
    one, two = (
        losses(tabular(samples="offline", penalize=p), own=False) for p in ("all", "expert")
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)
    expected = []
    for agent in range(2):
        x = np.array([reward_of(agent, row) for row in EXPERT])
        flows = [flow_of(agent, row) for row in EXPERT]
        expected.append(np.mean(flows) - np.mean(x - x**2 / (4 * ALPHA)))
    np.testing.assert_allclose(one, expected, rtol=1e-6)


def test_v0_holds_down_first_states():
    expected = []
    for agent in range(2):
        x = np.array([reward_of(agent, row) for row in EXPERT])
        # Hellinger's curve; below -1/2 its tangent, of slope 4.
        terms = np.where(x > -0.5, x / (1 + x), -1 + 4 * (x + 0.5))
        first = np.mean([value_of(Q, agent, state) for state in FIRST])
        expected.append((1 - DISCOUNT) * first - np.mean(terms))
    found = losses(tabular(samples="v0", phi="squared_hellinger"), own=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_target_network_supplies_the_next_values_and_no_gradient():
    method = tabular(target_update_interval=4)
    expected = []
    for agent in range(2):
        recovered = [reward_of(agent, row, TARGET_Q) for row in EXPERT]
        every = [reward_of(agent, row, TARGET_Q) for row in EXPERT + POLICY]
        flows = [flow_of(agent, row, TARGET_Q) for row in EXPERT + POLICY]
        square = np.mean(np.square(every)) / (4 * ALPHA)
        expected.append(np.mean(flows) + square - np.mean(recovered))
    np.testing.assert_allclose(losses(method), expected, rtol=1e-6)
    # Through V(s') no gradient: that of the critics is as if next values were numbers.
    assert not any(p.requires_grad for p in method.target_actor.parameters())
    (gradient,) = torch.autograd.grad(method.loss(batch())[0][0], [method.actor.net.weights[0]])
    # State 0 of agent 0 is no row's (s) but the first and third: with rewards x of all six rows,
    # d L / d Q(0, a) = mean of pi(a | 0) + x / (2 alpha) [a taken] over rows, less [a taken] / 3.
    probs = np.exp(INVERSE * Q[0, 0]) / np.exp(INVERSE * Q[0, 0]).sum()
    slope = 2 * probs / 6
    for row, share in ((EXPERT[0], 1 / 3), (POLICY[2], 0.0)):
        x = reward_of(0, row, TARGET_Q)
        slope[row[1][0]] += x / (2 * ALPHA) / 6 - share
    np.testing.assert_allclose(gradient[0, 0], slope, rtol=1e-5, atol=1e-7)


def test_the_target_is_renewed_when_its_turn_has_come():
    method = tabular(target_update_interval=3)
    for step in range(3):
        before = method.target_actor.net.weights[0].clone()
        method.update(batch(), step)
        renewed = torch.equal(method.target_actor.net.weights[0], method.actor.net.weights[0])
        assert renewed == (step == 2)
        assert renewed or torch.equal(before, method.target_actor.net.weights[0])


def test_gradients_against_finite_differences_through_both_values():
    method = tabular()
    method.actor.double()
    double = Batch(*(part if part is None else _double(part) for part in batch()))
    (gradient,) = torch.autograd.grad(method.loss(double)[0].sum(), [method.actor.net.weights[0]])
    for place in [(0, 0, 0), (0, 2, 1), (1, 1, 0), (1, 0, 1)]:
        values = []
        for shift in (1e-6, -1e-6):
            table = Q.copy()
            table[place] += shift
            put(method.actor, table)
            values.append(method.loss(double)[0].sum().item())
        slope = (values[0] - values[1]) / 2e-6
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def _double(part):
    if isinstance(part, torch.Tensor):
        return part.double()
    obs, next_obs = part.obs.double(), part.next_obs.double()
    return Transitions(**{**part.fields(), "obs": obs, "next_obs": next_obs})


def test_no_agent_learns_from_another_one():
    """Each critic's gradient is that of its own loss, and an update is one Adam step each."""
    method = tabular()
    weight = method.actor.net.weights[0]
    for agent in range(2):
        (gradient,) = torch.autograd.grad(method.loss(batch())[0][agent], [weight])
        assert gradient[agent].abs().max() > 0 and gradient[1 - agent].abs().max() == 0
    before = weight.detach().clone()
    (gradient,) = torch.autograd.grad(method.loss(batch())[0].sum(), [weight])
    method.update(batch(), 0)
    moved = weight.detach() - before
    sure = gradient.abs() > 1e-4
    expected = -method.cfg.learning_rate * gradient.sign()
    torch.testing.assert_close(moved[sure], expected[sure], rtol=1e-3, atol=1e-9)


# ---- what it is offline


def cloning_loss(agent):
    total = 0.0
    for state, choices, *_ in EXPERT:
        weights = np.exp(INVERSE * Q[agent, state])
        total -= np.log(weights[choices[agent]] / weights.sum())
    return total / len(EXPERT)


def test_offline_with_the_identity_it_is_cloning_over_lambda():
    found = losses(tabular(samples="offline", phi="identity"), own=False)
    expected = [cloning_loss(agent) / INVERSE for agent in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cloning_as_a_loss_of_its_own():
    found = losses(tabular(loss="bc"), own=False)
    np.testing.assert_allclose(found, [cloning_loss(agent) for agent in range(2)], rtol=1e-6)


def test_online_it_is_not_cloning():
    found = losses(tabular(phi="identity"))
    assert np.abs(found - [cloning_loss(agent) / INVERSE for agent in range(2)]).min() > 1e-2


def test_two_agents_offline_are_two_learners_of_one():
    """Offline each agent's loss is that of single-agent IQ-Learn on its own choices."""
    both = losses(tabular(samples="offline"), own=False)
    spec = Spec(obs_shape=(3,), action_shape=(), num_actions=2)
    for agent in range(2):
        method = MAMQL(tabular(samples="offline").cfg, spec, Runtime(RUNTIME))
        put(method.actor, Q[agent : agent + 1])
        table = [(s, choices[agent], *rest) for s, choices, *rest in EXPERT]
        whole = rows(table)
        single = Transitions(
            **{**whole.fields(), "obs": whole.obs[:, :3], "next_obs": whole.next_obs[:, :3]}
        )
        loss = method.loss(Batch(single, None, observe(FIRST)[:, :3]))[0]
        assert loss.item() == pytest.approx(both[agent], rel=1e-6)
        assert method.act(torch.eye(3), explore=True).value.shape == (3,)


# ---- acting


def test_policies_are_boltzmann_and_independent():
    method = tabular()
    choices = method.policy(observe([0, 1, 2]))
    assert choices.mode().tolist() == [[0, 0], [1, 0], [1, 1]]
    torch.manual_seed(0)
    drawn = method.act(observe([1] * 40_000), explore=True).value
    probs = np.exp(INVERSE * Q[:, 1]) / np.exp(INVERSE * Q[:, 1]).sum(-1, keepdims=True)
    np.testing.assert_allclose(drawn.double().mean(0), probs[:, 1], atol=0.01)
    together = (drawn == 1).all(1).double().mean().item()
    assert together == pytest.approx(probs[0, 1] * probs[1, 1], abs=0.01)


def test_joint_choices_score_and_entropy_by_hand():
    third = np.log([[[0.25, 0.75]], [[0.5, 0.5]]])
    choices = JointChoices(torch.tensor(third), (2,))
    logp = choices.log_prob(torch.tensor([[1, 0]])).item()
    assert logp == pytest.approx(np.log(0.75 * 0.5))
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) + np.log(2)
    assert choices.entropy().item() == pytest.approx(entropy)


def test_each_agent_sees_its_own_part_of_the_observation():
    method = tabular()
    obs = torch.cat([torch.eye(3)[[0]], torch.eye(3)[[2]]], 1)
    np.testing.assert_allclose(method.actor.q(obs)[:, 0].detach(), [Q[0, 0], Q[1, 2]], rtol=1e-6)


# ---- what it learns from


def demonstrations():
    return Dataset(transitions=rows(EXPERT), step=torch.tensor([0, 1, 0]), name="three steps")


def own_steps(experience, count):
    table = [POLICY[k % 3] for k in range(count)]
    for row in table:
        experience.add(rows([row]), Action(value=torch.tensor([row[1]])))


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({}, True),
        ({"samples": "offline"}, False),
        ({"samples": "v0"}, False),
        ({"loss": "bc"}, False),
    ],
)
def test_batches_hold_demonstrations_and_own_steps_where_they_are_read(settings, reads):
    experience = tabular(**settings).experience(demonstrations())
    own_steps(experience, 4)
    found = list(experience.batches(4))
    assert len(found) == 4
    expert = {tuple(row) for row in rows(EXPERT).action.tolist()}
    for part in found:
        assert {tuple(row) for row in part.expert.action.tolist()} <= expert
        assert len(part.expert) == 3 and (part.policy is not None) == reads
        # Demonstrations begin in states 0 and 2.
        assert set(part.first_obs[:, :3].argmax(1).tolist()) <= {0, 2}
    if reads:
        seen = {row.argmax().item() for part in found for row in part.policy.obs[:, :3]}
        assert seen <= {0, 1, 2} and (found[0].policy.reward == 1e6).all()


def test_other_demonstrations_are_refused_when_a_run_is_resumed():
    state = tabular().experience(demonstrations()).state_dict()
    other = Dataset(transitions=rows(POLICY), step=torch.tensor([0, 1, 0]), name="others")
    with pytest.raises(UserError, match="others has changed since the run was saved"):
        tabular().experience(other).load_state_dict(state)


def test_the_demonstrations_of_the_random_game_are_the_experts():
    data = datasets.random_game()
    assert len(data) == 3_000 and len(data.ends()) == 100
    game = RandomGame()
    state = data.transitions.obs[:, :6].argmax(1)
    probs = game.equilibrium.logp.exp()
    for agent in range(2):
        for s in range(6):
            chosen = data.transitions.action[state == s, agent]
            share = torch.bincount(chosen, minlength=3) / len(chosen)
            slack = 4 * (0.25 / len(chosen)) ** 0.5
            assert (share - probs[agent, s]).abs().max() < slack
    following = data.transitions.next_obs[:-1].argmax(1)[
        data.transitions.truncated[:-1].logical_not()
    ]
    assert torch.equal(following, state[1:][data.step[1:] > 0])


# ---- rewards


def test_marginal_rewards_against_loops():
    found = tabular().marginal_reward(*_parts(rows(EXPERT)))
    expected = [[reward_of(agent, row) for row in EXPERT] for agent in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _parts(batch_):
    return batch_.obs, batch_.action, batch_.next_obs, batch_.terminated


def test_joint_rewards_solve_their_regression():
    """One state, each choice in half of the rows: R(a_i, .) = m p / (<p, p> + ridge / 2)."""
    method = tabular(hidden=())
    table = [(1, (a, b), 1, False, False) for a in range(2) for b in range(2)]
    data = Dataset(transitions=rows(table), step=torch.arange(4), name="one state")
    torch.manual_seed(0)
    ridge = 0.5
    model = method.joint_reward(data, steps=400, learning_rate=2e-2, ridge=ridge)
    found = model.table(observe([1]))[:, 0].detach().numpy().reshape(2, 2, 2)
    probs = np.exp(INVERSE * Q[:, 1]) / np.exp(INVERSE * Q[:, 1]).sum(-1, keepdims=True)
    for agent in range(2):
        other = probs[1 - agent]
        # Own choice first: agent 1's is the last axis.
        own_first = found[agent] if agent == 0 else found[agent].T
        for choice in range(2):
            joint = (choice, 0) if agent == 0 else (0, choice)
            marginal = reward_of(agent, (1, joint, 1, False, False))
            best = marginal * other / (other @ other + ridge / 2)
            np.testing.assert_allclose(own_first[choice], best, atol=2e-3)
    picked = model(observe([1, 1]), torch.tensor([[0, 1], [1, 0]])).detach().numpy()
    np.testing.assert_allclose(picked, found[:, [0, 1], [1, 0]], rtol=1e-6)


def test_too_many_joint_actions_are_refused():
    spec = Spec(obs_shape=(10,), action_shape=(5,), num_actions=6, num_agents=5)
    with pytest.raises(UserError, match="7,776 joint actions"):
        JointReward(spec, Config())


def test_errors_of_rewards_in_gems_agree_with_the_full_least_squares():
    game = Gems(size=2)
    torch.manual_seed(0)
    found = torch.randn(2, game.num_states, 5, dtype=torch.float64)
    transition = torch.zeros(game.num_states, 25, game.num_states, dtype=torch.float64)
    transition.scatter_(2, game.successor.unsqueeze(-1), 1.0)
    probs, squares = game.equilibrium.logp.exp(), []
    for agent in range(2):
        joint, ahead = game.reward[agent].view(-1, 5, 5), transition.view(-1, 5, 5, game.num_states)
        # The other's choice is summed over: agent 0's changes slowest.
        letters = "sab,sb->sa" if agent == 0 else "sba,sb->sa"
        true = torch.einsum(letters, joint, probs[1 - agent])
        letters = "sabt,sb->sat" if agent == 0 else "sbat,sb->sat"
        dynamics = torch.einsum(letters, ahead, probs[1 - agent])
        squares.append(without_shaping(found[agent] - true, dynamics, 0.95).square())
    expected = torch.stack(squares).mean().sqrt().item()
    assert _reward_error(found, game) == pytest.approx(expected, rel=1e-9)


# ---- settings and tasks


def test_continuous_actions_are_refused():
    spec = Spec(obs_shape=(3,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    with pytest.raises(UserError, match="mamql needs Discrete actions.*continuous"):
        MAMQL(Config(), spec, Runtime(RUNTIME))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inverse_temperature", 0.0),
        ("inverse_temperature", -1.0),
        ("alpha", 0.0),
        ("discount", 1.0),
        ("target_update_interval", 0),
        ("warmup", -1),
        ("learning_rate", 0.0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        Config(**{name: value})


def test_a_gradient_step_raises_the_experts_choices_and_not_the_task_reward():
    """Trained on one deterministic row it comes to choose it; the reward column is a trap."""
    method = tabular(samples="offline", phi="identity", learning_rate=0.05)
    only = Batch(rows(EXPERT[:1]), None, observe([0]))
    for step in range(200):
        method.update(only, step)
    assert method.policy(observe([0])).mode().tolist() == [[0, 1]]
    logp = method.policy(observe([0])).log_prob(torch.tensor([[0, 1]])).item()
    assert logp > np.log(0.99)
