import math

import pytest
import torch

from esscher.functional.duals import multiplier_terms, temperature_terms


def scalar(number):
    return torch.tensor(number, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("form", ["log", "paper"])
def test_temperature_by_hand(form):
    log_alpha = scalar(math.log(0.5))
    logp = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    # logp + Hbar = (1, 3) - 1 = (0, 2).
    terms = temperature_terms(log_alpha, logp, -1.0, form)
    dual, slope = (math.log(0.5), 1.0) if form == "log" else (0.5, 0.5)
    assert terms.tolist() == pytest.approx([0.0, -2 * dual])
    terms.mean().backward()
    # Entropy is -2, below the target -1: the gradient is negative and descent raises alpha.
    assert log_alpha.grad.item() == pytest.approx(-slope, rel=1e-12)
    assert logp.grad is None


def test_log_is_the_default_form_of_the_temperature_only():
    log_alpha, logp = scalar(-1.0), torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert torch.equal(
        temperature_terms(log_alpha, logp, 2.0), temperature_terms(log_alpha, logp, 2.0, "log")
    )
    assert torch.equal(
        multiplier_terms(log_alpha, logp, 2.0), multiplier_terms(log_alpha, logp, 2.0, "paper")
    )


@pytest.mark.parametrize("form", ["log", "paper"])
@pytest.mark.parametrize(("cost", "rises"), [(3.0, True), (1.0, False)])
def test_multiplier_rises_only_when_cost_exceeds_its_threshold(form, cost, rises):
    log_multiplier = scalar(0.7)
    costs = torch.tensor([cost, cost], dtype=torch.float64, requires_grad=True)
    multiplier_terms(log_multiplier, costs, 2.0, form).mean().backward()
    assert (log_multiplier.grad.item() < 0) == rises
    factor = 1.0 if form == "log" else math.exp(0.7)
    assert log_multiplier.grad.item() == pytest.approx(-factor * (cost - 2.0), rel=1e-12)
    assert costs.grad is None


def test_several_constraints_at_once():
    log_multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    thresholds = torch.tensor([2.5, 4.0], dtype=torch.float64)
    multiplier_terms(log_multipliers, costs, thresholds).mean(0).sum().backward()
    assert log_multipliers.grad.tolist() == [0.5, -1.0]


@pytest.mark.parametrize("form", ["log", "paper"])
def test_dual_ascent_solves_a_constrained_problem(form):
    # min (x - 2)^2 with x <= 1: x = 2 - multiplier/2, so the multiplier is 2 and x is 1.
    log_multiplier = scalar(0.0)
    for _ in range(400):
        x = 2 - log_multiplier.detach().exp() / 2
        loss = multiplier_terms(log_multiplier, x.unsqueeze(0), 1.0, form).mean()
        (slope,) = torch.autograd.grad(loss, log_multiplier)
        log_multiplier = (log_multiplier - 0.2 * slope).detach().requires_grad_()
    assert log_multiplier.exp().item() == pytest.approx(2.0, rel=1e-6)


def test_sac_temperature_of_a_gaussian_reaches_its_closed_form():
    # Maximise E[-10 a^2] + alpha H: variance alpha/20. Entropy -1 means variance e^-3 / (2 pi).
    log_alpha = scalar(0.0)
    for _ in range(300):
        variance = log_alpha.detach().exp() / 20
        entropy = 0.5 * torch.log(2 * math.pi * math.e * variance)
        loss = temperature_terms(log_alpha, -entropy.unsqueeze(0), -1.0).mean()
        (slope,) = torch.autograd.grad(loss, log_alpha)
        log_alpha = (log_alpha - 0.2 * slope).detach().requires_grad_()
    assert log_alpha.exp().item() == pytest.approx(0.158477, abs=1e-6)


def test_unknown_form_is_refused():
    with pytest.raises((ValueError, TypeError), match="form"):
        temperature_terms(scalar(0.0), torch.zeros(1, dtype=torch.float64), 1.0, "exp")
