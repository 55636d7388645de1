"""Finite decision processes: what they refuse, their tensors, and their values by enumeration."""

import itertools

import pytest
import torch

from esscher.functional.tabular import FiniteMDP, Outcome, value_iteration


def sure(reward, following):
    return (Outcome(1.0, (float(reward),), following),)


def small():
    """State 0: stay for 1, or go to 1 for nothing (0.5) or 2 (0.5). State 1: end for 3, or back."""
    go = (Outcome(0.5, (0.0,), 1), Outcome(0.5, (2.0,), 1))
    return FiniteMDP(((sure(1, 0), go), (sure(3, None), sure(0, 0))))


def test_tensors_by_hand():
    moves, reward = small().tensors()
    assert moves.tolist() == [[[1, 0], [0, 1]], [[0, 0], [1, 0]]]
    assert reward.squeeze(-1).tolist() == [[1, 1], [3, 0]]
    assert small().num_states == small().num_actions == 2
    assert small().reward_dim == 1


def test_vector_rewards():
    mdp = FiniteMDP((((Outcome(0.25, (4.0, 0.0), None), Outcome(0.75, (0.0, 8.0), None)),),))
    assert mdp.reward_dim == 2
    assert mdp.tensors()[1].tolist() == [[[1, 6]]]


def test_value_iteration_by_hand():
    moves, reward = small().tensors()
    values = value_iteration(moves, reward.squeeze(-1), 0.5, 3)
    # One step: as rewarded. Two: 1 + 1/2, 1 + 3/2; 3, 0 + 1/2. Three: 1 + 2.5/2, 1 + 3/2; 3, 2.5/2.
    assert values.tolist() == [[[1, 1], [3, 0]], [[1.5, 2.5], [3, 0.5]], [[2.25, 2.5], [3, 1.25]]]


@pytest.mark.parametrize("discount", [0.5, 0.9, 1.0])
def test_value_iteration_is_the_best_of_all_policies(discount):
    """Three steps: every policy of step and state, by plain recursion over outcomes."""
    mdp, num_steps = small(), 3

    def worth(policy, time, state):
        if time == num_steps or state is None:
            return 0.0
        outcomes = mdp.outcomes[state][policy[2 * time + state]]
        return sum(
            o.probability * (o.reward[0] + discount * worth(policy, time + 1, o.next_state))
            for o in outcomes
        )

    policies = list(itertools.product(range(2), repeat=2 * num_steps))
    moves, reward = mdp.tensors()
    values = value_iteration(moves, reward.squeeze(-1), discount, num_steps)[-1].amax(-1)
    for state in range(2):
        best = max(worth(policy, 0, state) for policy in policies)
        assert values[state].item() == pytest.approx(best, rel=1e-12)


def test_it_converges_to_the_fixed_point():
    moves, reward = small().tensors()
    values = value_iteration(moves, reward.squeeze(-1), 0.9, 400)[-1]
    # Staying for ever is worth 1 / (1 - 0.9) = 10; from state 1 it is better to go back: 9.
    torch.testing.assert_close(
        values, torch.tensor([[10.0, 1 + 0.9 * 9], [3.0, 9.0]], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "outcomes",
    [
        ((sure(1, 0), sure(1, 0)), (sure(1, 0),)),
        (((Outcome(0.5, (1.0,), 0),),),),
        (((Outcome(1.5, (1.0,), 0), Outcome(-0.5, (1.0,), 0)),),),
        ((sure(1, 1),),),
        ((sure(1, -1),),),
        (((Outcome(0.5, (1.0,), 0), Outcome(0.5, (1.0, 2.0), 0)),),),
    ],
    ids=["actions", "mass", "negative", "unknown", "below", "lengths"],
)
def test_what_is_no_process_is_refused(outcomes):
    with pytest.raises(ValueError):
        FiniteMDP(outcomes)


def test_bad_arguments_are_refused():
    moves, reward = small().tensors()
    for discount, steps in ((-0.1, 1), (1.1, 1), (0.5, 0)):
        with pytest.raises(ValueError):
            value_iteration(moves, reward.squeeze(-1), discount, steps)
