"""Marginals over the others against loops, and quantal equilibria against a closed form."""

import itertools
import math

import numpy as np
import pytest
import torch

from esscher.functional.markov_games import (
    average_over_others,
    joint_index,
    joint_policy,
    marginal_transition,
    soft_equilibrium,
)


def random_policies(agents, states, actions, seed=0):
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.normal(size=(agents, states, actions))).log_softmax(-1)


def test_the_last_agent_changes_fastest():
    action = torch.tensor([[0, 0], [0, 2], [1, 0], [2, 1]])
    assert joint_index(action, 3).tolist() == [0, 2, 3, 7]


@pytest.mark.parametrize(("agents", "actions"), [(1, 3), (2, 3), (3, 2), (4, 2)])
def test_average_over_others_is_the_sum_over_their_choices(agents, actions):
    states = 2
    logp = random_policies(agents, states, actions)
    joint = torch.from_numpy(np.random.default_rng(1).normal(size=(states, actions**agents)))
    probs = logp.exp().numpy()
    for agent in range(agents):
        expected = np.zeros((states, actions))
        for s in range(states):
            for k, choices in enumerate(itertools.product(range(actions), repeat=agents)):
                others = [j for j in range(agents) if j != agent]
                weight = math.prod(probs[j, s, choices[j]] for j in others)
                expected[s, choices[agent]] += weight * joint[s, k].item()
        found = average_over_others(joint, logp, agent)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_joint_policy_and_marginal_transition_against_loops():
    logp = random_policies(2, 3, 2)
    probs = logp.exp().numpy()
    draw = np.random.default_rng(2)
    transition = draw.dirichlet(np.ones(3), (3, 4))
    joint = joint_policy(logp).numpy()
    for s, (a, b) in itertools.product(range(3), itertools.product(range(2), repeat=2)):
        assert joint[s, 2 * a + b] == pytest.approx(probs[0, s, a] * probs[1, s, b])
    first = marginal_transition(torch.from_numpy(transition), logp, 0).numpy()
    second = marginal_transition(torch.from_numpy(transition), logp, 1).numpy()
    for s, a in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(first[s, a], probs[1, s] @ transition[s, 2 * a : 2 * a + 2])
        np.testing.assert_allclose(second[s, a], probs[0, s] @ transition[s, a::2])


def test_a_number_of_columns_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 agents of 3 actions need 9 columns"):
        average_over_others(torch.zeros(1, 8), torch.zeros(2, 1, 3), 0)


def test_equilibrium_of_a_coordination_game_solves_its_equation():
    # One state, discount 0: both earn 1 for equal choices. With p the probability of action 0, the
    # equilibrium obeys p = sigmoid(lambda (2 p - 1)), whose symmetric solution is 1/2; a bonus of
    # 0.3 for action 0 moves it to p = sigmoid(lambda (2 p - 1 + 0.3)).
    reward = torch.tensor([[[1.3, 0.3, 0.0, 1.0]], [[1.3, 0.0, 0.3, 1.0]]], dtype=torch.float64)
    found = soft_equilibrium(
        lambda value: value.unsqueeze(-1).expand(-1, -1, 4), reward, 2, 0.0, 1.5
    )
    p = 0.5
    for _ in range(500):
        p = 1 / (1 + math.exp(-1.5 * (2 * p - 1 + 0.3)))
    np.testing.assert_allclose(found.logp.exp()[:, 0, 0], [p, p], rtol=1e-8)
    assert found.residual <= 1e-10


def test_discounting_adds_a_geometric_series():
    # Nothing that anyone does matters, each step earns 2: V = (2 + log(3) / lambda) / (1 - 0.8).
    reward = torch.full((2, 1, 9), 2.0, dtype=torch.float64)
    found = soft_equilibrium(
        lambda value: value.unsqueeze(-1).expand(-1, -1, 9), reward, 3, 0.8, 4.0, damping=1.0
    )
    assert found.value[0, 0].item() == pytest.approx((2 + math.log(3) / 4) / 0.2, rel=1e-9)


def test_the_fixed_point_is_a_soft_best_response_in_a_random_game():
    agents, states, actions, discount, inverse = 2, 4, 3, 0.9, 2.0
    draw = np.random.default_rng(0)
    transition = draw.dirichlet(np.full(states, 0.5), (states, actions**agents))
    reward = draw.normal(size=(agents, states, actions**agents))
    dynamics = torch.from_numpy(transition)
    found = soft_equilibrium(
        lambda value: torch.einsum("skt,gt->gsk", dynamics, value),
        torch.from_numpy(reward),
        actions,
        discount,
        inverse,
        damping=0.5,
    )
    q, probs = found.q.numpy(), found.logp.exp().numpy()
    value = np.log(np.exp(inverse * q).sum(-1)) / inverse
    for s, a in itertools.product(range(states), range(actions)):
        for agent in range(agents):
            total = 0.0
            for b in range(actions):
                k = actions * a + b if agent == 0 else actions * b + a
                ahead = reward[agent, s, k] + discount * transition[s, k] @ value[agent]
                total += probs[1 - agent, s, b] * ahead
            assert q[agent, s, a] == pytest.approx(total, abs=1e-9)
    np.testing.assert_allclose(probs, np.exp(inverse * (q - value[..., None])), rtol=1e-10)


def test_an_iteration_that_does_not_arrive_says_so():
    reward = torch.ones(2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="no equilibrium within 3 backups"):
        soft_equilibrium(
            lambda value: value.unsqueeze(-1).expand(-1, -1, 4),
            reward,
            2,
            0.9,
            1.0,
            max_iterations=3,
        )
