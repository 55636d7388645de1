"""Distributions against quadrature, torch.distributions and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions as reference

from esscher.distributions import Categorical, Normal, TanhNormal
from esscher.distributions.policies import (
    CategoricalPolicy,
    DeterministicPolicy,
    NormalPolicy,
    TanhNormalPolicy,
)


def independent(distribution: reference.Distribution) -> reference.Independent:
    return reference.Independent(distribution, 1)


def random_parameters(rows: int = 64, width: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, width).double(), torch.randn(rows, width).double() * 0.4 - 0.5


# ---- Normal


def test_normal_equals_torch() -> None:
    mean, log_std = random_parameters()
    ours, theirs = Normal(mean, log_std), independent(reference.Normal(mean, log_std.exp()))
    x = torch.randn_like(mean)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), mean)


def test_normal_broadcasts_one_log_std() -> None:
    mean, _ = random_parameters()
    log_std = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    ours, theirs = Normal(mean, log_std), independent(reference.Normal(mean, log_std.exp()))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    torch.testing.assert_close(ours.log_prob(mean + 1), theirs.log_prob(mean + 1))


def test_normal_samples_follow_their_law() -> None:
    torch.manual_seed(1)
    mean, log_std = torch.tensor([[1.5, -2.0]]), torch.tensor([[-0.7, 0.4]])
    sample = Normal(mean.expand(20_000, 2), log_std.expand(20_000, 2)).sample()
    for k in range(2):
        law = stats.norm(mean[0, k].item(), log_std[0, k].exp().item())
        assert stats.kstest(sample[:, k].numpy(), law.cdf).pvalue > 1e-3


# ---- tanh of a Normal


def test_tanh_log_prob_equals_torch_transformed() -> None:
    mean, log_std = random_parameters()
    base = reference.Normal(mean, log_std.exp())
    theirs = independent(reference.TransformedDistribution(base, reference.TanhTransform()))
    action = torch.tanh(mean + 0.7 * torch.randn_like(mean))
    ours = TanhNormal(mean, log_std)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action), rtol=1e-6, atol=1e-6)


def test_tanh_log_prob_is_the_numerical_change_of_variables() -> None:
    mean, log_std = random_parameters(16, 1)
    u = mean + torch.randn_like(mean)
    step = 1e-6
    slope = (torch.tanh(u + step) - torch.tanh(u - step)) / (2 * step)
    expected = stats.norm.logpdf(u, mean, log_std.exp()) - slope.log().numpy()
    ours = TanhNormal(mean, log_std).log_prob(torch.tanh(u))
    np.testing.assert_allclose(ours.numpy(), expected[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.2, -1.0), (-0.5, 0.3)])
def test_tanh_density_integrates_to_one(mean: float, log_std: float) -> None:
    # Substituting a = tanh(u) keeps the quadrature away from the faces of the box.
    u = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    action = torch.tanh(u).unsqueeze(-1)
    ours = TanhNormal(torch.full_like(action, mean), torch.full_like(action, log_std))
    density = ours.log_prob(action).exp() * (1 - torch.tanh(u) ** 2)
    assert torch.trapezoid(density, u).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("u", [-20.0, -9.0, 9.0, 20.0, 60.0])
def test_tanh_log_prob_far_out_is_exact(u: float) -> None:
    """log(1 - tanh(u)^2) = log 4 - 2|u| - 2 log(1 + exp(-2|u|)), while tanh(u) rounds to one."""
    mean, log_std = torch.full((4, 1), u), torch.full((4, 1), -20.0)
    torch.manual_seed(0)
    action, logp = TanhNormal(mean, log_std).rsample_with_log_prob()
    torch.manual_seed(0)
    noise = torch.randn(4, 1)
    gaussian = stats.norm.logpdf(noise[:, 0].numpy()) + 20.0
    correction = math.log(4) - 2 * abs(u) - 2 * math.log1p(math.exp(-2 * abs(u)))
    np.testing.assert_allclose(logp.numpy(), gaussian - correction, rtol=1e-5)
    assert torch.isfinite(action).all() and (action.abs() <= 1).all()


def test_tanh_log_prob_of_the_faces_is_finite_with_gradient() -> None:
    mean = torch.zeros(2, 1, requires_grad=True)
    log_std = torch.zeros(2, 1, requires_grad=True)
    logp = TanhNormal(mean, log_std).log_prob(torch.tensor([[1.0], [-1.0]]))
    logp.sum().backward()
    assert torch.isfinite(logp).all()
    assert torch.isfinite(mean.grad).all() and torch.isfinite(log_std.grad).all()


def test_tanh_sample_and_its_log_prob_agree() -> None:
    torch.manual_seed(0)
    mean, log_std = (v.float() for v in random_parameters())
    ours = TanhNormal(mean, log_std)
    action, logp = ours.rsample_with_log_prob()
    torch.testing.assert_close(logp, ours.log_prob(action), rtol=1e-3, atol=1e-3)
    torch.manual_seed(5)
    first, _ = ours.rsample_with_log_prob()
    torch.manual_seed(5)
    assert torch.equal(first, ours.sample())


def test_tanh_samples_follow_the_density() -> None:
    torch.manual_seed(3)
    mean, log_std = torch.full((20_000, 1), 0.4), torch.full((20_000, 1), -0.3)
    sample = TanhNormal(mean, log_std).sample()[:, 0].numpy()
    law = stats.norm(0.4, math.exp(-0.3))
    assert stats.kstest(np.arctanh(sample), law.cdf).pvalue > 1e-3


def test_tanh_gradient_equals_finite_differences() -> None:
    mean, log_std = random_parameters(4, 2)
    mean.requires_grad_(), log_std.requires_grad_()

    def objective(m: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(2)
        action, logp = TanhNormal(m, s).rsample_with_log_prob()
        return (logp + (action * torch.tensor([1.0, -2.0]).double()).sum(-1)).sum()

    assert torch.autograd.gradcheck(objective, (mean, log_std))


def test_sampling_promises_no_gradient() -> None:
    mean = torch.zeros(2, 1, requires_grad=True)
    log_std = torch.zeros(2, 1)
    assert not TanhNormal(mean, log_std).sample().requires_grad
    assert not Normal(mean, log_std).sample().requires_grad


# ---- Categorical


def test_categorical_equals_torch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(32, 5) * 3
    ours, theirs = Categorical(logits + 7), reference.Categorical(logits=logits)
    choice = torch.randint(5, (32,))
    torch.testing.assert_close(ours.log_prob(choice), theirs.log_prob(choice))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), logits.argmax(-1))


def test_categorical_frequencies() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.09, 0.01])
    sample = Categorical(probabilities.log().expand(40_000, 5)).sample()
    counts = torch.bincount(sample, minlength=5).numpy()
    expected = probabilities.double().numpy() / probabilities.double().sum().item()
    assert stats.chisquare(counts, expected * 40_000).pvalue > 1e-3


def test_categorical_with_an_impossible_choice() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    ours = Categorical(logits.expand(2_000, 3))
    assert ours.entropy()[0].item() == pytest.approx(math.log(2))
    assert not (ours.sample() == 1).any()
    ours.entropy().sum().backward()
    assert torch.isfinite(logits.grad).all()


# ---- policies


def test_policies_give_the_shapes_that_they_name() -> None:
    obs = torch.randn(5, 3)
    assert TanhNormalPolicy(3, 2, (8,))(obs).mode().shape == (5, 2)
    assert NormalPolicy(3, 2, (8,))(obs).log_prob(torch.zeros(5, 2)).shape == (5,)
    assert CategoricalPolicy(3, 4, (8,))(obs).sample().shape == (5,)
    action = DeterministicPolicy(3, 2, (8,))(obs).mode()
    assert action.shape == (5, 2) and (action.abs() < 1).all()


def test_tanh_policy_clamps_log_std() -> None:
    torch.manual_seed(0)
    policy = TanhNormalPolicy(3, 2, (8,), log_std_range=(-1.0, 0.5))
    log_std = policy(torch.randn(200, 3) * 1e3).log_std
    assert log_std.min() == -1.0 and log_std.max() == 0.5
