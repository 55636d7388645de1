"""Soft values by hand, the family of phi against closed forms, and what shaping cannot explain."""

import math

import numpy as np
import pytest
import torch

from esscher.functional.soft_values import (
    boltzmann_log_probs,
    concave_terms,
    concave_weights,
    inverse_soft_bellman,
    soft_value,
    without_shaping,
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_soft_value_and_policy_by_hand():
    # exp(2 * 0) + exp(2 * log(3) / 2) = 1 + 3, so V = log(4) / 2 and the policy is (1/4, 3/4).
    q = double([0.0, math.log(3) / 2])
    assert soft_value(q, 2.0).item() == pytest.approx(math.log(4) / 2, rel=1e-14)
    probs = boltzmann_log_probs(q, 2.0).exp()
    np.testing.assert_allclose(probs, [0.25, 0.75], rtol=1e-14)


def test_inverse_temperature_multiplies_inside_and_divides_outside():
    q = double([[1.0, -2.0, 0.5]])
    # Greedy as it grows; the mean, plus log(3) / lambda, as it falls.
    assert soft_value(q, 1e3).item() == pytest.approx(1.0, abs=1e-9)
    small = soft_value(q, 1e-4).item() - math.log(3) / 1e-4
    assert small == pytest.approx(q.mean().item(), abs=1e-3)
    # Units of reward: V of 10 Q at lambda is ten times V of Q at 10 lambda.
    assert soft_value(10 * q, 0.3).item() == pytest.approx(10 * soft_value(q, 3.0).item())
    # V is the mean of Q plus the entropy over lambda.
    logp = boltzmann_log_probs(q, 0.7)
    split = (logp.exp() * (q - logp / 0.7)).sum().item()
    assert soft_value(q, 0.7).item() == pytest.approx(split, rel=1e-13)


def test_gradient_of_the_soft_value_is_the_policy():
    q = double([0.3, -1.0, 2.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_value(q, 1.7), q)
    np.testing.assert_allclose(gradient, boltzmann_log_probs(q, 1.7).exp().detach(), rtol=1e-13)


def test_inverse_soft_bellman_by_hand():
    reward = inverse_soft_bellman(
        double([2.0, 2.0]), double([3.0, 3.0]), torch.tensor([False, True]), 0.9
    )
    np.testing.assert_allclose(reward, [2 - 0.9 * 3, 2.0], rtol=1e-14)


def test_what_is_terminated_is_not_even_looked_at():
    reward = inverse_soft_bellman(double([1.0]), double([math.inf]), torch.tensor([True]), 0.9)
    assert reward.item() == 1.0


# Values and slopes by hand at x = 1; identities: phi(x) = -f*(-x).
AT_ONE = {
    "chi2": (1 - 1 / 2, 1 - 1.0),  # alpha 0.5: x - x^2 / 2
    "identity": (1.0, 1.0),
    "total_variation": (0.5, 0.0),
    "kl": (-math.exp(-2), math.exp(-2)),
    "shifted_kl": (1 - math.exp(-1), math.exp(-1)),
    "reverse_kl": (1.0, 1.0),
    "js": (math.log(2 - math.exp(-1)), math.exp(-1) / (2 - math.exp(-1))),
    "squared_hellinger": (0.5, 0.25),
}


@pytest.mark.parametrize("phi", AT_ONE)
def test_phi_and_its_slope_at_one(phi):
    value, slope = AT_ONE[phi]
    x = double([1.0])
    assert concave_terms(x, phi, 0.5).item() == pytest.approx(value, rel=1e-13, abs=1e-15)
    assert concave_weights(x, phi, 0.5).item() == pytest.approx(slope, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("phi", AT_ONE)
def test_phi_is_concave_finite_and_its_gradient_is_the_weight(phi):
    x = torch.linspace(-8, 8, 400, dtype=torch.float64).requires_grad_()
    terms = concave_terms(x, phi, 0.5)
    assert torch.isfinite(terms).all()
    (gradient,) = torch.autograd.grad(terms.sum(), x)
    torch.testing.assert_close(gradient, concave_weights(x, phi, 0.5), rtol=1e-12, atol=1e-15)
    assert (gradient.diff() <= 1e-12).all(), "slopes must fall"
    assert phi == "chi2" or (gradient >= 0).all()
    secant = terms.detach().diff() / x.detach().diff()
    assert (secant <= gradient[:-1] + 1e-9).all() and (secant >= gradient[1:] - 1e-9).all()


def test_below_the_floor_phi_is_its_tangent():
    # Hellinger at -1/2: value -1, slope 4; from there to -3 a line: -1 - 4 * 2.5.
    assert concave_terms(double([-3.0]), "squared_hellinger").item() == pytest.approx(-11.0)
    # js at -1/2: slope e^0.5 / (2 - e^0.5).
    slope = math.exp(0.5) / (2 - math.exp(0.5))
    assert concave_weights(double([-7.0]), "js").item() == pytest.approx(slope)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_phi_is_refused():
    for function in (concave_terms, concave_weights):
        with pytest.raises(ValueError, match="phi must be one of chi2"):
            function(double([0.0]), "hinge")


def test_shaping_is_taken_out_and_nothing_else():
    # Two states, one action each way: 0 -> 1 and 1 -> 0. With c = (1, 3) and discount 0.5 the
    # shaping c(s) - 0.5 c(s') is (1 - 1.5, 3 - 0.5).
    transition = double([[[0.0, 1.0]], [[1.0, 0.0]]])
    shaping = double([[-0.5], [2.5]])
    left = without_shaping(shaping, transition, 0.5)
    assert left.abs().max().item() < 1e-12
    # With two actions that lead to the same place, their difference is no shaping.
    doubled = transition.repeat(1, 2, 1)
    reward = torch.cat([shaping + 0.2, shaping - 0.2], 1)
    np.testing.assert_allclose(
        without_shaping(reward, doubled, 0.5), [[0.2, -0.2], [0.2, -0.2]], atol=1e-12
    )


def test_where_the_task_ends_there_is_no_next_potential():
    # One state that ends with probability 1/4: c - 0.8 * 0.75 c = 0.4 c explains any one reward,
    # while of two actions only what they share is explained.
    transition = double([[[0.75], [1.0]]])
    left = without_shaping(double([[0.4, 0.2]]), transition, 0.8)
    assert left.abs().max().item() < 1e-12  # c = 1 gives (0.4, 0.2) exactly
    left = without_shaping(double([[0.2, 0.4]]), transition, 0.8)
    # c = (0.4 * 0.2 + 0.2 * 0.4) / (0.16 + 0.04) = 0.8: left are 0.2 - 0.32 and 0.4 - 0.16.
    np.testing.assert_allclose(left, [[-0.12, 0.24]], atol=1e-12)
