import math

import pytest
import torch

from esscher.functional.surrogates import clipped_ratio_terms


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
