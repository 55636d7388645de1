import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from esscher.functional.kl import (
    categorical_kl,
    gaussian_kl,
    kl_k1_terms,
    kl_k2_terms,
    kl_k3_terms,
)

INFINITY = float("inf")


@pytest.fixture
def logits():
    torch.manual_seed(0)
    p, q = torch.randn(2, 7, dtype=torch.float64)
    return p.requires_grad_(), q.requires_grad_()


def test_by_hand_with_the_direction():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = 3/4 log(3/2) - 1/4 log 2 = 0.130812;
    # KL(q||p) = log(2/sqrt(3)) = 0.143841.
    p = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    assert categorical_kl(p, q).item() == pytest.approx(0.130812, abs=1e-6)
    assert categorical_kl(q, p).item() == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-12)
    ratio = torch.tensor([math.log(2.0)], dtype=torch.float64)
    assert kl_k1_terms(ratio).item() == pytest.approx(math.log(2))
    assert kl_k2_terms(ratio).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3_terms(ratio).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_estimators_in_expectation(logits):
    log_p, log_q = (x.detach().log_softmax(-1) for x in logits)
    ratio, exact = log_p - log_q, categorical_kl(*logits).item()
    assert (log_p.exp() * kl_k1_terms(ratio)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (log_p.exp() * kl_k3_terms(ratio)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (kl_k3_terms(ratio) > 0).all() and (kl_k2_terms(ratio) > 0).all()
    # Under the wrong direction (samples of q) k3 estimates something else.
    assert abs((log_q.exp() * kl_k3_terms(ratio)).sum().item() - exact) > 0.1
    # k2 is biased, but nearly right for close distributions.
    near = (log_p + 0.01 * torch.sin(torch.arange(7))).log_softmax(-1)
    ratio = log_p - near
    assert (log_p.exp() * kl_k2_terms(ratio)).sum().item() == pytest.approx(
        categorical_kl(log_p, near).item(), rel=0.02
    )


def test_expected_gradients_with_samples_held_fixed(logits):
    p, q = logits
    log_p, log_q = p.log_softmax(-1), q.detach().log_softmax(-1)

    def expected_gradient(terms):
        return torch.autograd.grad((log_p.detach().exp() * terms).sum(), p, retain_graph=True)[0]

    forward = torch.autograd.grad(categorical_kl(p, q.detach()), p, retain_graph=True)[0]
    backward = torch.autograd.grad(categorical_kl(q.detach(), p), p, retain_graph=True)[0]
    ratio = log_p - log_q
    assert expected_gradient(kl_k1_terms(ratio)).abs().max() < 1e-15
    torch.testing.assert_close(expected_gradient(kl_k2_terms(ratio)), forward)
    torch.testing.assert_close(expected_gradient(kl_k3_terms(ratio)), backward)


def test_categorical_against_torch(logits):
    p, q = (x.detach().reshape(1, 7) + torch.zeros(3, 1) for x in logits)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(categorical_kl(p, q), expected)
    # Adding a constant to logits changes nothing.
    torch.testing.assert_close(categorical_kl(p + 5, q - 3), expected)
    assert torch.autograd.gradcheck(categorical_kl, logits)


def test_categorical_with_impossible_outcomes():
    p = torch.tensor([0.0, 1.0, -INFINITY, -INFINITY], requires_grad=True)
    q = torch.tensor([0.5, 0.0, 2.0, -INFINITY], requires_grad=True)
    found = categorical_kl(p, q)
    expected = kl_divergence(Categorical(logits=p[:3]), Categorical(logits=q[:3]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    assert torch.isfinite(p.grad).all() and torch.isfinite(q.grad).all()
    assert categorical_kl(q, p).item() == INFINITY


def test_gaussian_by_hand_and_against_torch():
    one, two = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    # Per axis, N(0,1) against N(1,2): log 2 + (1 + 1)/8 - 1/2; N(1,2) against N(0,1):
    # -log 2 + (4 + 1)/2 - 1/2.
    found = gaussian_kl(one, two, two, 2 * two)
    assert found.item() == pytest.approx(2 * (math.log(2) - 0.25), rel=1e-6)
    found = gaussian_kl(two, 2 * two, one, two)
    assert found.item() == pytest.approx(2 * (2 - math.log(2)), rel=1e-6)
    torch.manual_seed(0)
    means = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    stds = (0.3 + torch.rand(2, 4, 3, dtype=torch.float64)).requires_grad_()
    expected = kl_divergence(
        Independent(Normal(means[0], stds[0]), 1), Independent(Normal(means[1], stds[1]), 1)
    )
    torch.testing.assert_close(gaussian_kl(means[0], stds[0], means[1], stds[1]), expected)
    arguments = (means[0], stds[0], means[1], stds[1])
    assert torch.autograd.gradcheck(gaussian_kl, arguments)
    assert (gaussian_kl(means[0], stds[0], means[0], stds[0]) == 0).all()
