import math

import pytest
import torch

from esscher.functional.surrogates import clip_fraction, clipped_ratio_terms, sequence_log_ratio


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside: minus ratio A, slope -ratio A
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # above and improving: held at 1.3 A
        (0.5, 2.0, -1.0, -1.0),  # below and worse: the unclipped, pessimistic one
        (0.5, -2.0, 1.6, 0.0),  # below and improving: held at 0.8 A
        (1.5, -2.0, 3.0, 3.0),  # above and worse
    ],
)
def test_all_six_cases_by_hand(ratio, advantage, term, slope):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    weight = torch.tensor([advantage], dtype=torch.float64, requires_grad=True)
    found = clipped_ratio_terms(log_ratio, weight, clip_low=0.2, clip_high=0.3)
    assert found.item() == pytest.approx(term, rel=1e-12)
    found.sum().backward()
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12)
    assert weight.grad is None


def test_on_policy_gradient_is_the_policy_gradient():
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    logp, advantage = logits.log_softmax(-1), torch.randn(5, dtype=torch.float64)
    terms = clipped_ratio_terms(logp - logp.detach(), advantage)
    (found,) = torch.autograd.grad(terms.mean(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantage * logp).mean(), logits)
    torch.testing.assert_close(found, expected)


def test_bounds_and_per_sequence_advantages():
    log_ratio = torch.tensor([[-5.0, 5.0], [-5.0, 5.0]])
    advantage = torch.tensor([[1.0], [-1.0]])
    terms = clipped_ratio_terms(log_ratio, advantage, 1.0, 0.5)
    # The lower bound 1 - 1 = 0 never binds; the upper one binds for the positive advantage only.
    expected = torch.tensor([[-math.exp(-5), -1.5], [math.exp(-5), math.exp(5)]])
    torch.testing.assert_close(terms, expected)
    for low, high, name in [(-0.1, 0.2, "clip_low"), (1.1, 0.2, "clip_low"), (0.2, -1.0, "high")]:
        with pytest.raises(ValueError, match=name):
            clipped_ratio_terms(log_ratio, advantage, low, high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "slope"),
    [
        (1.3, -2.0, 2.6, 2.6),  # above the interval and worse, but below c
        (1.39, -2.0, 2.78, 2.78),
        (1.41, -2.0, 2.8, 0.0),  # held at c |A|
        (50.0, -2.0, 2.8, 0.0),
        (0.81, -2.0, 1.62, 1.62),
        (0.79, -2.0, 1.6, 0.0),  # the lower bound as before
        (50.0, 2.0, -2.4, 0.0),  # a positive advantage does not see c
        (1.19, 2.0, -2.38, -2.38),
        (0.1, 2.0, -0.2, -0.2),
    ],
)
def test_the_dual_clip_bounds_the_cost_of_a_negative_advantage(ratio, advantage, term, slope):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    weight = torch.tensor([advantage], dtype=torch.float64)
    found = clipped_ratio_terms(log_ratio, weight, 0.2, 0.2, dual_clip=1.4)
    assert found.item() == pytest.approx(term, rel=1e-12)
    found.sum().backward()
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12)
    # Not even a c inside the interval is seen by a positive advantage.
    found = clipped_ratio_terms(log_ratio, weight.abs(), 0.2, 0.5, dual_clip=1.1)
    assert found.item() == pytest.approx(-min(ratio, 1.5) * 2, rel=1e-12)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, float("nan")])
def test_a_dual_clip_that_would_stop_learning_on_policy_is_refused(dual_clip):
    numbers, mask = torch.ones(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_ratio_terms(numbers, numbers, dual_clip=dual_clip)
    with pytest.raises(ValueError, match="dual_clip"):
        clip_fraction(numbers, numbers, mask, dual_clip=dual_clip)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ratios_beyond_float32_give_neither_nan_nor_infinity(dual_clip):
    huge = [500.0, 100.0, -500.0, float("inf"), -float("inf")]
    log_ratio = torch.tensor([huge] * 3, requires_grad=True)
    advantage = torch.tensor([[1.0], [0.0], [-1.0]])
    terms = clipped_ratio_terms(log_ratio, advantage, 0.2, 0.28, dual_clip=dual_clip)
    terms.mean().backward()
    assert torch.isfinite(terms).all()
    assert (log_ratio.grad == 0).all()
    held = math.exp(44.361) if dual_clip is None else 3.0
    expected = [[-1.28, -1.28, 0, -1.28, 0], [0.0] * 5, [held, held, 0.8, held, 0.8]]
    torch.testing.assert_close(terms, torch.tensor(expected), rtol=1e-3, atol=0)


def test_a_ratio_that_is_large_but_a_float_is_not_touched():
    log_ratio = torch.tensor([44.0], requires_grad=True)
    terms = clipped_ratio_terms(log_ratio, -torch.ones(1))
    terms.sum().backward()
    assert terms.item() == pytest.approx(math.exp(44), rel=1e-5)
    assert log_ratio.grad.item() == pytest.approx(math.exp(44), rel=1e-5)


def test_sequence_ratios_by_hand():
    log_ratio = torch.tensor([[0.1, 0.3, float("nan")], [0.2, 0.5, -1.0], [1.0, 1.0, 1.0]])
    log_ratio.requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    found = sequence_log_ratio(log_ratio, mask)
    torch.testing.assert_close(found, torch.tensor([[0.2] * 3, [-0.1] * 3, [0.0] * 3]))
    # d/dx of the first row's first column: each of its two tokens owns half of the mean.
    found[:2, 0].sum().backward()
    third = 1 / 3
    expected = torch.tensor([[0.5, 0.5, 0.0], [third] * 3, [0.0] * 3])
    torch.testing.assert_close(log_ratio.grad, expected)


def test_a_sequence_is_clipped_as_a_whole():
    # Ratios e^0.5 and e^-0.5 leave [0.8, 1.2] one by one; their geometric mean is 1.
    log_ratio = torch.tensor([[0.5, -0.5]], dtype=torch.float64, requires_grad=True)
    mask, weight = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.float64)
    whole = clipped_ratio_terms(sequence_log_ratio(log_ratio, mask), weight)
    (slope,) = torch.autograd.grad(whole.mean(), log_ratio)
    torch.testing.assert_close(slope, torch.full_like(slope, -0.5))
    (slope,) = torch.autograd.grad(clipped_ratio_terms(log_ratio, weight).mean(), log_ratio)
    torch.testing.assert_close(slope, torch.tensor([[0.0, -math.exp(-0.5) / 2]]).double())


@pytest.mark.parametrize(("dual_clip", "share"), [(None, 2 / 6), (3.0, 3 / 6)])
def test_clip_fraction_is_the_share_of_terms_without_gradient(dual_clip, share):
    ratio = torch.tensor([[1.31, 0.5, 1.0, 9.0], [0.79, 1.31, 5.0, 9.0]], dtype=torch.float64)
    advantage = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    log_ratio = ratio.log().requires_grad_()
    found = clip_fraction(log_ratio, advantage, mask, 0.2, 0.3, dual_clip=dual_clip)
    assert found.item() == pytest.approx(share)
    assert not found.requires_grad
    terms = clipped_ratio_terms(log_ratio, advantage, 0.2, 0.3, dual_clip=dual_clip)
    (slope,) = torch.autograd.grad(terms.sum(), log_ratio)
    assert (slope[mask] == 0).double().mean().item() == pytest.approx(share)
    half = clip_fraction(
        log_ratio, advantage, mask, 0.2, 0.3, dual_clip=dual_clip, denominator=12.0
    )
    assert half.item() == pytest.approx(share / 2)
