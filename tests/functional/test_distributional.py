import math

import pytest
import torch

from esscher.functional.distributional import (
    categorical_projection,
    gaussian_critic_huber_terms,
    gaussian_critic_terms,
    quantile_huber_loss,
    quantile_huber_terms,
)


def double(*numbers, grad=False):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=grad)


def test_quantile_huber_by_hand():
    # tau = (1/4, 3/4), quantiles (0, 1). Target 3: d = (3, 2), Huber = (2.5, 1.5), weights tau.
    # Target -1: d = (-1, -2), Huber = (0.5, 1.5), weights 1 - tau. A flipped sign swaps them.
    terms = quantile_huber_terms(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, -1.0]]))
    assert terms.shape == (1, 2, 2)
    assert terms[0].tolist() == [[0.625, 0.375], [1.125, 0.375]]
    # Mean over targets 0.5 and 0.75, summed over quantiles.
    loss = quantile_huber_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, -1.0]]))
    assert loss.item() == 1.25
    # Repeating the targets changes nothing: the mean is over targets, the sum over quantiles.
    target = torch.tensor([[3.0, -1.0, 3.0, -1.0]])
    assert quantile_huber_loss(torch.tensor([[0.0, 1.0]]), target).item() == 1.25


@pytest.mark.parametrize("threshold", [0.1, 1.0, 3.0])
def test_quantile_huber_against_loops_and_torch(threshold):
    torch.manual_seed(0)
    quantiles = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    target = (2 * torch.randn(2, 4, dtype=torch.float64)).requires_grad_()
    terms = quantile_huber_terms(quantiles, target, threshold)
    slope = torch.zeros_like(quantiles)
    for b in range(2):
        for i in range(3):
            for j in range(4):
                tau = (2 * i + 1) / 6
                below = target[b, j] < quantiles[b, i]
                weight = (1 - tau if below else tau) / threshold
                huber = torch.nn.functional.huber_loss(
                    quantiles[b, i], target[b, j], delta=threshold
                )
                assert terms[b, i, j].item() == pytest.approx((weight * huber).item(), rel=1e-12)
                gap = (quantiles[b, i] - target[b, j]).item()
                slope[b, i] += weight * max(-threshold, min(threshold, gap))
    terms.sum().backward()
    torch.testing.assert_close(quantiles.grad, slope)
    assert target.grad is None


def test_quantile_regression_finds_quantiles():
    # Targets 0.5, 1.5, ..., 99.5 and three quantiles: 1/6, 1/2, 5/6 of the range.
    target = (torch.arange(100, dtype=torch.float64) + 0.5).unsqueeze(0)
    right = 100 * double(1 / 6, 1 / 2, 5 / 6).unsqueeze(0)
    for threshold in (0.0, 1e-3):
        best = quantile_huber_loss(right, target, threshold)
        for i in range(3):
            for step in (-2.0, 2.0):
                moved = right.clone()
                moved[0, i] += step
                assert quantile_huber_loss(moved, target, threshold) > best
    with pytest.raises(ValueError, match="threshold"):
        quantile_huber_terms(right, target, -1.0)


def test_projection_by_hand():
    # 0.25 splits 3:1 between 0 and 1; 3 is clipped to 2; 1 is on the support.
    found = categorical_projection(
        double(0.25, 3.0, 1.0)[None], double(0.4, 0.5, 0.1)[None], double(0.0, 1.0, 2.0)
    )
    torch.testing.assert_close(found, double(0.3, 0.2, 0.5)[None])


def test_projection_against_the_published_loop():
    torch.manual_seed(0)
    support = torch.linspace(-2, 3, 11, dtype=torch.float64)
    atoms = 3 * torch.randn(5, 7, dtype=torch.float64)
    probability = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    expected = torch.zeros(5, 11, dtype=torch.float64)
    for b in range(5):
        for j in range(7):
            position = (min(3.0, max(-2.0, atoms[b, j].item())) + 2.0) / 0.5
            low = min(math.floor(position), 9)
            expected[b, low] += probability[b, j] * (low + 1 - position)
            expected[b, low + 1] += probability[b, j] * (position - low)
    found = categorical_projection(atoms, probability, support)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.ones(5, dtype=torch.float64))
    inside = atoms.clamp(-2, 3)
    torch.testing.assert_close(
        (found * support).sum(-1),
        (categorical_projection(inside, probability, support) * support).sum(-1),
    )
    torch.testing.assert_close((found * support).sum(-1), (inside * probability).sum(-1))
    with pytest.raises(ValueError, match="at least 2 atoms"):
        categorical_projection(atoms, probability, support[:1])


def gradients(terms, *inputs):
    return torch.autograd.grad(terms.sum(), inputs)


def test_gaussian_critic_gradient_by_hand():
    mean, std = double(1.0, grad=True), double(2.0, grad=True)
    # y_q - Q = 2; y_z - Q = 8 is clipped to 4, so (16 - 4) / (8 + 0.1) pulls the std up.
    terms = gaussian_critic_terms(mean, std, double(3.0), double(9.0), 4.0)
    for_mean, for_std = gradients(terms, mean, std)
    assert for_mean.item() == pytest.approx(-2 / 4.1, rel=1e-12)
    assert for_std.item() == pytest.approx(-12 / 8.1, rel=1e-12)
    # Value: minus each pull times its variable.
    assert terms.item() == pytest.approx(-2 / 4.1 * 1 - 12 / 8.1 * 2, rel=1e-12)
    # From the other side the clip is at -4 and squares to the same pull; the mean is pulled down.
    for_mean, for_std = gradients(
        gaussian_critic_terms(mean, std, double(-3.0), double(-9.0), 4.0), mean, std
    )
    assert for_mean.item() == pytest.approx(4 / 4.1, rel=1e-12)
    assert for_std.item() == pytest.approx(-12 / 8.1, rel=1e-12)


def closed_form_gradient(mean, std, mean_target, sampled_target, bound, epsilon):
    centred = (sampled_target - mean).maximum(-bound).minimum(bound)
    for_mean = -(mean_target - mean) / (std**2 + epsilon)
    for_std = -(centred**2 - std**2) / (std**3 + epsilon)
    return for_mean, for_std


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
@pytest.mark.parametrize("shape", [(), (2, 1), (2, 5)])
def test_gaussian_critic_gradient_of_an_ensemble(epsilon, shape):
    torch.manual_seed(0)
    mean = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    std = (0.1 + torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    mean_target = torch.randn(5, dtype=torch.float64, requires_grad=True)
    sampled_target = (3 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    bound = (1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    terms = gaussian_critic_terms(mean, std, mean_target, sampled_target, bound, epsilon)
    assert terms.shape == (2, 5)
    expected = closed_form_gradient(mean, std, mean_target, sampled_target, bound, epsilon)
    terms.sum().backward()
    torch.testing.assert_close(mean.grad, expected[0].detach())
    torch.testing.assert_close(std.grad, expected[1].detach())
    assert mean_target.grad is None and sampled_target.grad is None and bound.grad is None


def test_without_epsilon_and_clip_it_is_the_gaussian_log_likelihood():
    torch.manual_seed(0)
    mean = torch.randn(6, dtype=torch.float64, requires_grad=True)
    std = (0.5 + torch.rand(6, dtype=torch.float64)).requires_grad_()
    sample = torch.randn(6, dtype=torch.float64)
    surrogate = gaussian_critic_terms(mean, std, sample, sample, 1e9, epsilon=0.0)
    likelihood = -torch.distributions.Normal(mean, std).log_prob(sample)
    for one, two in zip(
        gradients(surrogate, mean, std), gradients(likelihood, mean, std), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_huber_form_by_hand():
    mean, std = double(1.0, grad=True), double(2.0, grad=True)
    # rho = 8.2 / 4.1 = 2; Huber(2) = 2; Huber(4) = 8; std^2 - 2 * 8 = -12, over 2.1.
    terms = gaussian_critic_huber_terms(mean, std, double(3.0), double(9.0), 4.0, 8.2)
    assert terms.item() == pytest.approx(2 * (2 + 2 * (-12 / 2.1)), rel=1e-12)
    for_mean, for_std = gradients(terms, mean, std)
    assert for_mean.item() == pytest.approx(2 * -2, rel=1e-12)
    assert for_std.item() == pytest.approx(2 * -12 / 2.1, rel=1e-12)
    # delta 1: Huber(2) = 1.5 with slope -1, Huber(4) = 3.5, std^2 - 2 * 3.5 = -3.
    terms = gaussian_critic_huber_terms(mean, std, double(3.0), double(9.0), 4.0, 8.2, delta=1.0)
    assert terms.item() == pytest.approx(2 * (1.5 + 2 * (-3 / 2.1)), rel=1e-12)
    assert gradients(terms, mean, std)[0].item() == pytest.approx(-2, rel=1e-12)


@pytest.mark.parametrize(("scale", "rho"), [(1e-6, 0.1), (4.1, 1.0), (1e6, 10.0)])
def test_huber_scale_is_clipped_and_weighs_both_terms(scale, rho):
    mean, std = double(1.0, grad=True), double(2.0, grad=True)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    terms = gaussian_critic_huber_terms(mean, std, double(3.0), double(9.0), 4.0, scale)
    terms.sum().backward()
    assert mean.grad.item() == pytest.approx(rho * -2, rel=1e-12)
    assert std.grad.item() == pytest.approx(rho * -12 / 2.1, rel=1e-12)
    assert scale.grad is None


def fixed_point_std(terms_of, errors):
    """The std at which the mean gradient over these errors vanishes, by bisection."""
    low, high = 1e-3, 10.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        std = torch.full_like(errors, middle, requires_grad=True)
        slope = gradients(terms_of(torch.zeros_like(errors), std, errors), std)[0].mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return middle


def test_fixed_point_of_the_std_and_the_bias_of_factor_one():
    errors = double(-2.0, -1.0, 0.0, 1.0, 2.0)  # mean square 2
    zero = torch.zeros_like(errors)

    def huber(factor):
        return lambda mean, std, sample: gaussian_critic_huber_terms(
            mean, std, zero, sample, 100.0, 1.0, second_moment_factor=factor
        )

    def paper(mean, std, sample):
        return gaussian_critic_terms(mean, std, zero, sample, 100.0)

    assert fixed_point_std(paper, errors) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert fixed_point_std(huber(2.0), errors) == pytest.approx(math.sqrt(2), rel=1e-6)
    assert fixed_point_std(huber(1.0), errors) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 1), (4,), (1, 2, 5), (3, 5)])
def test_silent_outer_products_are_refused(shape):
    mean, std, good = torch.zeros(2, 5), torch.ones(2, 5), torch.zeros(5)
    with pytest.raises((ValueError, TypeError)):  # TypeError: jaxtyping's, if its hook is on
        gaussian_critic_terms(mean, std, torch.zeros(shape), good, 1.0)
    with pytest.raises((ValueError, TypeError)):
        gaussian_critic_huber_terms(mean, std, good, good, 1.0, torch.ones(shape))
