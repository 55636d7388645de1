"""Distances of distributions: closed forms, assignments, a linear program, sums written out."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance

from esscher.functional.sets import frechet_distance, moments
from esscher.functional.transport import (
    gaussian_w2,
    half_squared_costs,
    median_distance,
    mmd_terms,
    random_directions,
    sinkhorn_divergence_terms,
    sliced_w2_terms,
)


def normal(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


# ---- Gaussians


def test_w2_of_the_sheets_two_gaussians():
    """Also by hand: for 2 x 2, tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det A det B)).

    A B = [[1.85, -.35], [.2, .35]], det A = 1.75, det B = .41: tr = 2.2, root of 1.75 x .41 = .847054.
    |m|^2 = 5, traces 3 + 1.5; 9.5 - 2 sqrt(2.2 + 1.694107) = 5.553302.
    """
    first = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    second = torch.tensor([[1.0, -0.3], [-0.3, 0.5]])
    means = torch.zeros(2), torch.tensor([1.0, 2.0])
    found = gaussian_w2(means[0], first, means[1], second)
    assert found.item() == pytest.approx(2.356544, abs=1e-6)
    by_hand = 9.5 - 2 * math.sqrt(2.2 + 2 * math.sqrt(1.75 * 0.41))
    assert found.item() ** 2 == pytest.approx(by_hand, abs=1e-6)


def test_w2_of_all_pairs_at_once_is_that_of_each():
    x = normal(4, 30, 3) * torch.tensor([1.0, 2.0, 0.5]) + normal(4, 1, 3, seed=1)
    mean, covariance = moments(x)
    every = gaussian_w2(mean[:, None], covariance[:, None], mean, covariance)
    assert every.shape == (4, 4)
    for i in range(4):
        one = np.cov(x[i].numpy().T)
        np.testing.assert_allclose(covariance[i], one, rtol=1e-12)
        for j in range(4):
            single = frechet_distance(mean[i], covariance[i], mean[j], covariance[j])
            assert every[i, j].item() == pytest.approx(math.sqrt(max(single.item(), 0)), abs=1e-7)
    torch.testing.assert_close(every, every.T, atol=1e-7, rtol=0)


def test_w2_of_equal_and_of_degenerate_gaussians():
    """Points have covariance 0, and rounding must not make a NaN of the root."""
    spread = normal(5, 2, seed=2)
    singular = spread @ spread.T  # Rank 2 of 5.
    zero, mean = torch.zeros(5, 5), torch.arange(5.0)
    assert gaussian_w2(mean, singular, mean, singular).item() == pytest.approx(0, abs=1e-6)
    assert gaussian_w2(mean, zero, mean + 2, zero).item() == pytest.approx(math.sqrt(20))
    to_point = gaussian_w2(mean, singular, mean, zero)
    assert to_point.item() == pytest.approx(math.sqrt(singular.trace().item()))


# ---- sliced


def test_sliced_w2_along_one_axis_is_w2_of_sorted_values():
    x, y = normal(3, 40, 1), 2 * normal(3, 40, 1, seed=1) + 1
    found = sliced_w2_terms(x, y, torch.ones(1, 1).double())
    for k in range(3):
        cost = (x[k] - y[k].T).square().numpy()
        row, column = linear_sum_assignment(cost)
        assert found[k].item() == pytest.approx(cost[row, column].mean())


def test_sliced_w2_of_a_shift_is_the_shift_squared_over_the_dimension():
    """A projection moves by d . s, whose mean square over the sphere is |s|^2 / dim."""
    x, shift = normal(1, 20, 3), torch.tensor([1.0, -2.0, 0.5]).double()
    draw = random_directions(200_000, x)
    assert draw.norm(dim=-1).sub(1).abs().max() < 1e-12
    found = sliced_w2_terms(x, x + shift, draw)
    assert found.item() == pytest.approx(shift.square().sum().item() / 3, rel=0.01)


def test_sliced_w2_of_a_masked_set_is_that_of_what_is_there():
    x, y, draw = normal(2, 6, 3), normal(2, 6, 3, seed=1), random_directions(7, normal(1, 3))
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    found = sliced_w2_terms(x, y, draw, mask)
    for k in range(2):
        alone = sliced_w2_terms(x[k : k + 1, mask[k]], y[k : k + 1, mask[k]], draw)
        assert found[k].item() == pytest.approx(alone.item())
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(sliced_w2_terms(x, y, draw, mask).sum(), x)
    assert gradient.isfinite().all() and (gradient[1, [1, 4, 5]] == 0).all()
    assert (gradient[1, [0, 2, 3]] != 0).all()


def test_a_step_against_the_gradient_of_sliced_w2_comes_nearer():
    x, y, draw = normal(1, 30, 2), normal(1, 30, 2, seed=1) + 3, random_directions(50, normal(1, 2))
    x.requires_grad_()
    before = sliced_w2_terms(x, y, draw)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    assert sliced_w2_terms(x - gradient, y, draw).item() < before.item()


# ---- Sinkhorn


def entropic_by_hand(cost, epsilon):
    """Minimum of <P, C> + epsilon KL(P | a b) by plain scaling in float64; its value."""
    m, n = cost.shape
    a, b = np.full(m, 1 / m), np.full(n, 1 / n)
    kernel, v = np.exp(-cost / epsilon), np.ones(n)
    for _ in range(5_000):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    product = a[:, None] * b
    return (plan * cost).sum() + epsilon * (plan * np.log(plan / product)).sum()


def test_sinkhorn_is_the_primal_value_of_plain_scaling():
    x, y, epsilon = normal(2, 7, 2), normal(2, 5, 2, seed=1) + 1, 0.5
    found = sinkhorn_divergence_terms(x, y, epsilon=epsilon, iterations=400)
    for k in range(2):
        a, b = x[k].numpy(), y[k].numpy()
        costs = [cdist(p, q, "sqeuclidean") / 2 for p, q in ((a, b), (a, a), (b, b))]
        xy, xx, yy = (entropic_by_hand(cost, epsilon) for cost in costs)
        assert found[k].item() == pytest.approx(xy - (xx + yy) / 2, rel=1e-6)


def test_sinkhorn_becomes_half_of_the_squared_distance():
    x, y = normal(1, 8, 2), normal(1, 8, 2, seed=1) + 2
    cost = cdist(x[0], y[0], "sqeuclidean")
    row, column = linear_sum_assignment(cost)
    found = sinkhorn_divergence_terms(x, y, epsilon=0.005, iterations=3_000)
    assert found.item() == pytest.approx(cost[row, column].mean() / 2, rel=0.01)


def test_sinkhorn_of_sets_of_two_sizes_against_a_linear_program():
    x, y = normal(1, 4, 2), normal(1, 6, 2, seed=1) + 2
    cost = cdist(x[0], y[0], "sqeuclidean") / 2
    marginals = np.concatenate([np.kron(np.eye(4), np.ones(6)), np.kron(np.ones(4), np.eye(6))])
    exact = linprog(cost.ravel(), A_eq=marginals, b_eq=[1 / 4] * 4 + [1 / 6] * 6).fun
    found = sinkhorn_divergence_terms(x, y, epsilon=0.005, iterations=3_000)
    assert found.item() == pytest.approx(exact, rel=0.01)


def test_sinkhorn_of_masked_sets_is_that_of_what_is_there():
    x, y = normal(2, 5, 2), normal(2, 4, 2, seed=1) + 1
    masks = torch.tensor([[1, 1, 0, 1, 0], [1] * 5]).bool(), torch.tensor([[0, 1, 1, 1], [1] * 4])
    masks = masks[0], masks[1].bool()
    options = {"epsilon": 0.3, "iterations": 60}
    x.requires_grad_()
    found = sinkhorn_divergence_terms(x, y, x_mask=masks[0], y_mask=masks[1], **options)
    for k in range(2):
        pair = x[k : k + 1, masks[0][k]], y[k : k + 1, masks[1][k]]
        assert found[k].item() == pytest.approx(sinkhorn_divergence_terms(*pair, **options).item())
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all() and (gradient[0, [2, 4]] == 0).all()
    # Far away y = x + s: the gradient of |s|^2 / 2 over the mean is -s / m for each sample.
    x = normal(1, 5, 2).requires_grad_()
    moved = sinkhorn_divergence_terms(x, x.detach() + 2, epsilon=1.0, iterations=300)
    (gradient,) = torch.autograd.grad(moved.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(gradient, -2 / 5), atol=1e-4, rtol=0)
    assert moved.item() == pytest.approx(4, rel=1e-4)


def test_sinkhorn_refuses_what_has_no_meaning():
    x = normal(1, 3, 2)
    with pytest.raises(ValueError, match="epsilon > 0"):
        sinkhorn_divergence_terms(x, x, epsilon=0.0, iterations=3)
    with pytest.raises(ValueError, match="iterations >= 1"):
        sinkhorn_divergence_terms(x, x, epsilon=0.1, iterations=0)


def test_costs_are_halves_of_squares_and_have_a_gradient_where_samples_coincide():
    x = normal(1, 4, 3).requires_grad_()
    expected = cdist(x[0].detach(), x[0].detach(), "sqeuclidean") / 2
    np.testing.assert_allclose(half_squared_costs(x, x)[0].detach(), expected, atol=1e-12)
    (gradient,) = torch.autograd.grad(half_squared_costs(x, x.detach()).sum(), x)
    assert gradient.isfinite().all()


# ---- MMD


def test_mmd_by_sums():
    x, y, h = normal(2, 4, 3), normal(2, 6, 3, seed=1) + 1, torch.tensor([0.7, 2.0]).double()
    found = mmd_terms(x, y, bandwidth=h)
    for k in range(2):
        total = 0.0
        for sign, p, q in ((1, x[k], x[k]), (1, y[k], y[k]), (-2, x[k], y[k])):
            values = [
                math.exp(-float((a - b).square().sum()) / (2 * float(h[k]) ** 2))
                for a in p
                for b in q
            ]
            total += sign * sum(values) / len(values)
        assert found[k].item() == pytest.approx(total)
    assert mmd_terms(x, x.flip(1)).abs().max() < 1e-12


def test_median_distance_is_that_of_scipy_and_of_what_is_there():
    x, y = normal(1, 4, 2), normal(1, 5, 2, seed=1)
    mask = torch.tensor([[True, True, False, True]])
    there = torch.cat([x[0, mask[0]], y[0]]).numpy()
    pairs = np.sort(pdist(there))
    expected = pairs[(len(pairs) - 1) // 2]
    assert median_distance(x, y, x_mask=mask).item() == pytest.approx(expected)
    found = mmd_terms(x, y, x_mask=mask)
    alone = mmd_terms(x[:, mask[0]], y)
    assert found.item() == pytest.approx(alone.item())
    same = torch.ones(1, 3, 2).double()
    assert median_distance(same, same).item() == 1


def test_first_distance_of_sorted_values_against_scipy():
    """The order in which `sliced_w2_terms` pairs is that of optimal transport for |x - y| as well."""
    x, y = normal(1, 25, 1), 3 * normal(1, 25, 1, seed=1)
    gap = (x[0, :, 0].sort().values - y[0, :, 0].sort().values).abs().mean()
    assert gap.item() == pytest.approx(wasserstein_distance(x[0, :, 0], y[0, :, 0]))
