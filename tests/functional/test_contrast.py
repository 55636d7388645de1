"""Implicit rewards, contrasts and splits: by hand, and the greedy split against all there are."""

import itertools
import math

import pytest
import torch

from esscher.functional.contrast import (
    diffusion_dpo_terms,
    diffusion_kto_terms,
    greedy_split,
    halved_split,
    implicit_reward,
    kto_baseline,
    paired_split,
)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- losses


def test_a_lower_error_than_the_references_is_a_reward():
    error = double(0.5, 2.0).requires_grad_()
    ref_error = double(0.8, 1.5).requires_grad_()
    reward = implicit_reward(error, ref_error)
    assert reward.tolist() == pytest.approx([0.3, -0.5])
    reward.sum().backward()
    assert error.grad.tolist() == [-1, -1]
    assert ref_error.grad is None


def test_dpo_by_hand():
    # (4 / 2) (0.3 - (-0.2)) = 1, and (4 / 2) (0 - 0.5) = -1.
    terms = diffusion_dpo_terms(double([0.3, -0.2], [0.0, 0.5]), 4.0)
    assert terms.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))])


def test_dpo_begins_at_log_two_and_lowers_the_positive_error():
    error = double([1.0, 1.0]).requires_grad_()
    term = diffusion_dpo_terms(implicit_reward(error, error.detach()), 6.0)
    assert term.item() == pytest.approx(math.log(2))
    term.backward()
    # Descent moves against these: down for the positive sample, up for the negative one.
    assert error.grad.tolist() == [pytest.approx([6 / 4, -6 / 4])]


def test_the_errors_of_diffusion_dpos_code_give_the_same():
    """As its train.py has it: -logsigmoid(-0.5 beta (model_diff - ref_diff))."""
    model_w, model_l, ref_w, ref_l = 0.31, 0.92, 0.47, 0.88
    inside = -0.5 * 7.0 * ((model_w - model_l) - (ref_w - ref_l))
    reward = implicit_reward(double([model_w, model_l]), double([ref_w, ref_l]))
    assert diffusion_dpo_terms(reward, 7.0).item() == pytest.approx(-math.log(sigmoid(inside)))


def test_kto_by_hand():
    # Q = 0.1: 1 - sigma(5 (0.5 - 0.1)) and 1 - sigma(-5 (-0.3 - 0.1)).
    reward = double([0.5, -0.3])
    terms = diffusion_kto_terms(reward, 5.0, kto_baseline(reward))
    assert terms.tolist() == [pytest.approx([1 - sigmoid(2.0), 1 - sigmoid(2.0)])]
    # And a positive sample that is explained worse than the baseline costs more than a half.
    terms = diffusion_kto_terms(double([-0.3, 0.5]), 5.0, double(0.1).squeeze())
    assert terms.tolist() == [pytest.approx([1 - sigmoid(-2.0), 1 - sigmoid(-2.0)])]


def test_kto_lowers_the_positive_error():
    error = double([1.0, 1.0]).requires_grad_()
    reward = implicit_reward(error, error.detach())
    terms = diffusion_kto_terms(reward, 6.0, kto_baseline(reward))
    assert terms.tolist() == [[0.5, 0.5]]
    terms.sum().backward()
    assert error.grad.tolist() == [pytest.approx([6 / 4, -6 / 4])]


@pytest.mark.parametrize(("reward", "expected"), [([[0.4, 0.2]], 0.3), ([[0.4, -0.6]], 0.0)])
def test_the_baseline_is_the_mean_but_never_below_0(reward, expected):
    assert kto_baseline(double(*reward)).item() == pytest.approx(expected)


def test_no_gradient_flows_through_the_baseline():
    reward = double([0.6, 0.2], [0.1, 0.3]).requires_grad_()
    assert not kto_baseline(reward).requires_grad
    baseline = reward.mean()  # Not cut off by the caller.
    diffusion_kto_terms(reward, 2.0, baseline).sum().backward()
    for row, column in itertools.product(range(2), range(2)):
        sign = 1 - 2 * column
        p = sigmoid(sign * 2.0 * (reward[row, column].item() - 0.3))
        assert reward.grad[row, column].item() == pytest.approx(-sign * 2.0 * p * (1 - p))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        diffusion_dpo_terms(double([0.0, 0.0]), beta)
    with pytest.raises(ValueError, match="beta must be positive"):
        diffusion_kto_terms(double([0.0, 0.0]), beta, double(0.0).squeeze())


# ---- splits


def test_pairs_by_reward():
    reward = double([1.0, 2.0], [5.0, 4.0], [3.0, 3.0])
    assert paired_split(reward).tolist() == [[1, 0], [2, 3], [4, 5]]


def test_halves_by_reward():
    # Flat: 1 2 | 9 8 | 3 7. The best three are 9, 8 and 7, both of the second pair among them.
    split = halved_split(double([1.0, 2.0], [9.0, 8.0], [3.0, 7.0]))
    assert split[:, 0].tolist() == [2, 3, 5]
    assert sorted(split[:, 1].tolist()) == [0, 1, 4]


def test_halves_of_equal_rewards_hold_every_sample_once():
    split = halved_split(torch.zeros(5, 2))
    assert sorted(split.flatten().tolist()) == list(range(10))


def best_of_all(embedding, of_set):
    """The most that a choice of one sample a pair can be worth."""
    pairs = range(len(embedding))
    choices = itertools.product((0, 1), repeat=len(embedding))
    return max(of_set(torch.stack([embedding[k, c[k]] for k in pairs])) for c in choices)


def orders(passes, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(count, generator=draw) for _ in range(passes)])


def test_of_an_additive_reward_the_greedy_split_is_the_best_and_that_of_the_samples():
    draw = torch.Generator().manual_seed(1)
    embedding = torch.randn(7, 2, 1, generator=draw, dtype=torch.float64)
    split = greedy_split(embedding, lambda chosen: chosen.mean().item(), orders(1, 7))
    chosen = embedding.flatten(0, 1)[split[:, 0]]
    best = best_of_all(embedding, lambda chosen: chosen.mean().item())
    assert chosen.mean().item() == pytest.approx(best)
    for pair, (positive, negative) in enumerate(split.tolist()):
        values = embedding[pair].flatten().tolist()
        assert positive == 2 * pair + values.index(max(values))
        assert {positive, negative} == {2 * pair, 2 * pair + 1}


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_split_is_never_worth_less_than_the_first_samples(seed):
    """Of a reward that no sample has: minus the distance of the set's mean from a place."""
    draw = torch.Generator().manual_seed(seed)
    embedding = torch.randn(8, 2, 2, generator=draw, dtype=torch.float64)

    def of_set(chosen):
        return -float((chosen.mean(0) - double(0.2, -0.1)).norm())

    first = of_set(embedding[:, 0])
    found = [
        of_set(embedding.flatten(0, 1)[greedy_split(embedding, of_set, orders(n, 8))[:, 0]])
        for n in (1, 2, 5)
    ]
    assert first <= found[0] <= found[1] <= found[2] <= best_of_all(embedding, of_set)
    assert found[0] > first


def test_a_swap_must_raise_the_worth():
    """All sets are worth the same: nothing is swapped, and after one pass nothing more is asked."""
    asked = []

    def of_set(chosen):
        asked.append(chosen.clone())
        return 1.0

    split = greedy_split(torch.arange(6.0).view(3, 2, 1), of_set, orders(4, 3))
    assert split.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert len(asked) == 1 + 3
    assert asked[0].flatten().tolist() == [0, 2, 4]


def test_pairs_are_tried_in_the_order_given():
    """The set may have one second sample alone: it is that of the pair which comes first."""

    def of_set(chosen):
        seconds = int((chosen > 0).sum())
        return float(seconds == 1)

    embedding = torch.tensor([0.0, 1.0]).repeat(4, 1).unsqueeze(-1)
    split = greedy_split(embedding, of_set, torch.tensor([[2, 0, 3, 1]]))
    assert split[:, 0].tolist() == [0, 2, 5, 6]
