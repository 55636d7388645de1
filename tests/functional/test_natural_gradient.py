"""Against direct solvers, explicit Fisher matrices, and line searches worked by hand."""

import math

import pytest
import torch

from esscher.functional.natural_gradient import (
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    trust_region_step,
)


def positive(size, seed=0, lead=()):
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(*lead, size, size, dtype=torch.float64, generator=draw)
    return root @ root.mT + 0.3 * torch.eye(size, dtype=torch.float64)


def applied(matrix):
    return lambda vector: (matrix @ vector.unsqueeze(-1)).squeeze(-1)


# ---- conjugate gradients


def test_conjugate_gradient_by_hand():
    # A = diag(1, 3), b = (1, 1). First step: r'r / r'Ar = 2 / 4, x = (1/2, 1/2), r = (1/2, -1/2);
    # then beta = (1/2) / 2 = 1/4, d = (3/4, -1/4), alpha = (1/2) / (9/16 + 3/16) = 2/3, x = (1, 1/3).
    product, target = applied(torch.diag(torch.tensor([1.0, 3.0]))), torch.ones(2)
    assert conjugate_gradient(product, target, 1).tolist() == pytest.approx([0.5, 0.5])
    assert conjugate_gradient(product, target, 2).tolist() == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize("size", [1, 4, 9])
def test_as_many_iterations_as_dimensions_solve_the_system(size):
    matrix = positive(size)
    target = torch.arange(1.0, size + 1, dtype=torch.float64)
    found = conjugate_gradient(applied(matrix), target, size)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-7, atol=1e-8)
    if size > 1:
        early = conjugate_gradient(applied(matrix), target, size - 1)
        assert not torch.allclose(early, torch.linalg.solve(matrix, target), rtol=1e-6)


def test_two_distinct_eigenvalues_take_two_iterations_and_more_do_no_harm():
    matrix = torch.diag(torch.tensor([2.0] * 5 + [7.0] * 5))
    target = torch.randn(10, generator=torch.Generator().manual_seed(1))
    expected = target / matrix.diagonal()
    for iterations in (2, 30):
        found = conjugate_gradient(applied(matrix), target, iterations)
        torch.testing.assert_close(found, expected)


def test_problems_on_leading_axes_do_not_mix():
    matrices = positive(5, lead=(2, 3))
    target = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target[1, 2] = 0
    found = conjugate_gradient(applied(matrices), target, 5)
    for i in range(2):
        for j in range(3):
            alone = torch.linalg.solve(matrices[i, j], target[i, j])
            torch.testing.assert_close(found[i, j], alone, rtol=1e-7, atol=1e-8)
    assert torch.equal(found[1, 2], torch.zeros(5, dtype=torch.float64))


def test_a_direction_of_no_or_negative_curvature_is_not_followed():
    for curvature in (0.0, -1.0):
        product = applied(curvature * torch.eye(3))
        assert torch.equal(conjugate_gradient(product, torch.ones(3), 4), torch.zeros(3))


# ---- the Fisher matrix


def gaussian(parameters, contexts):
    """Mean W c + b and log-deviation s of two components, from 8 parameters."""
    weight, bias, log_std = parameters[:4].view(2, 2), parameters[4:6], parameters[6:8]
    return contexts @ weight.T + bias, log_std.expand(len(contexts), 2)


def gaussian_divergence(parameters, contexts):
    old_mean, old_log_std = (x.detach() for x in gaussian(parameters, contexts))

    def divergence(new):
        mean, log_std = gaussian(new, contexts)
        old, own = (2 * old_log_std).exp(), (2 * log_std).exp()
        terms = log_std - old_log_std + (old + (old_mean - mean) ** 2) / (2 * own) - 0.5
        return terms.sum(-1).mean()

    return divergence


def test_fisher_of_a_diagonal_gaussian():
    """Of a mean: E[c c'] / sigma^2 (with a 1 for the bias); of log sigma: 2; nothing between."""
    contexts = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-3.0, 0.25]], dtype=torch.float64)
    parameters = torch.tensor([0.3, -0.2, 0.1, 0.7, 0.4, -0.5, 0.2, -0.6], dtype=torch.float64)
    design = torch.cat([contexts, torch.ones(3, 1, dtype=torch.float64)], 1)
    moments = design.T @ design / 3
    fisher = torch.zeros(8, 8, dtype=torch.float64)
    for k, log_std in enumerate((0.2, -0.6)):
        where = [2 * k, 2 * k + 1, 4 + k]
        fisher[torch.tensor(where)[:, None], torch.tensor(where)] = moments / math.exp(2 * log_std)
        fisher[6 + k, 6 + k] = 2.0
    divergence = gaussian_divergence(parameters, contexts)
    for k, vector in enumerate(torch.eye(8, dtype=torch.float64)):
        found = fisher_vector_product(divergence, parameters, vector)
        torch.testing.assert_close(found, fisher[k])
        damped = fisher_vector_product(divergence, parameters, vector, 0.1)
        torch.testing.assert_close(damped, fisher[k] + 0.1 * vector)


def test_fisher_of_a_softmax():
    """diag(p) - p p' of its logits."""
    logits = torch.tensor([0.2, -1.0, 0.7, 0.0], dtype=torch.float64)
    probabilities = logits.exp() / logits.exp().sum()

    def divergence(new):
        return (probabilities * (probabilities.log() - new.log_softmax(-1))).sum()

    fisher = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
    vector = torch.tensor([1.0, 2.0, -0.5, 0.3], dtype=torch.float64)
    found = fisher_vector_product(divergence, logits, vector)
    torch.testing.assert_close(found, fisher @ vector)
    assert not found.requires_grad


def test_fisher_of_two_problems_at_once():
    logits = torch.tensor([[0.2, -1.0, 0.7], [1.0, 0.0, 0.0]], dtype=torch.float64)
    old = logits.log_softmax(-1)
    vector = torch.tensor([[1.0, 2.0, -0.5], [0.3, 0.0, -1.0]], dtype=torch.float64)
    found = fisher_vector_product(
        lambda new: (old.exp() * (old - new.log_softmax(-1))).sum(-1), logits, vector
    )
    for row in range(2):
        p = old[row].exp()
        torch.testing.assert_close(found[row], p * vector[row] - p * (p @ vector[row]))


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        found = fisher_vector_product(lambda x: (x**2).sum(-1), torch.ones(3), torch.ones(3))
    assert found.tolist() == [2.0, 2.0, 2.0]


# ---- the step


def test_the_step_has_the_length_that_the_bound_allows():
    matrix, bound = positive(6), 0.01
    gradient = torch.linspace(-1, 2, 6, dtype=torch.float64)
    step = trust_region_step(applied(matrix), gradient, bound, 6)
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(bound, rel=1e-9)
    natural = torch.linalg.solve(matrix, gradient)
    cosine = step @ natural / (step.norm() * natural.norm())
    assert cosine.item() == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(trust_region_step(applied(matrix), 0 * gradient, bound, 6), 0 * gradient)


def test_the_step_by_hand():
    # F = 4, g = -2: direction -1/2, quadratic divergence 4 (1/4) / 2 = 1/2; bound 2: twice as far.
    step = trust_region_step(lambda v: 4 * v, torch.tensor([-2.0]), 2.0, 1)
    assert step.item() == pytest.approx(-1.0)


# ---- the line search


def search(objective, divergence, step, gradient, bound=1.0, start=0.0, **options):
    """Of one parameter, for as many problems as `step` has."""
    steps = torch.as_tensor(step, dtype=torch.float64).view(-1, 1)
    slopes = torch.as_tensor(gradient, dtype=torch.float64).view(-1, 1)
    new, taken = backtracking_line_search(
        lambda x: (objective(x.squeeze(-1)), divergence(x.squeeze(-1))),
        torch.full_like(steps, start),
        steps,
        slopes,
        bound,
        **options,
    )
    assert not new.requires_grad
    return new.squeeze(-1).tolist(), taken.tolist()


def nothing(x):
    return torch.zeros_like(x)


def test_line_search_backs_off_until_the_objective_rises():
    # f(x) = x - x^2 from 0 along 4: f(4) = -12, f(2) = -2, f(1) = 0 (no rise), f(1/2) = 1/4 > 0.1/2.
    assert search(lambda x: x - x**2, nothing, 4.0, 1.0) == ([0.5], [0.125])
    assert search(lambda x: x - x**2, nothing, 4.0, 1.0, num_backtracks=3) == ([0.0], [0.0])


def test_line_search_asks_for_a_share_of_what_the_gradient_promises():
    # f(x) = x - 0.95 x^2: at 1 it rises by 0.05, less than 0.1; at 1/2 by 0.2625 > 0.05.
    assert search(lambda x: x - 0.95 * x**2, nothing, 1.0, 1.0) == ([0.5], [0.5])
    assert search(lambda x: x - 0.95 * x**2, nothing, 1.0, 1.0, accept_ratio=0.04) == ([1.0], [1.0])


def test_line_search_keeps_the_divergence_below_its_bound():
    # x^2 / 2 <= 0.1 first at 4 / 16 = 0.25 (0.03125); 4 / 8 gives 0.125. Equality is allowed.
    rising, square = (lambda x: x), (lambda x: x**2 / 2)
    assert search(rising, square, 4.0, 1.0, bound=0.1) == ([0.25], [0.0625])
    assert search(rising, square, 4.0, 1.0, bound=0.125) == ([0.5], [0.125])
    assert search(rising, square, 4.0, 1.0, bound=1e-9) == ([0.0], [0.0])


def test_line_search_shrinks_by_what_it_is_told():
    assert search(lambda x: x - x**2, nothing, 4.0, 1.0, shrink=0.1) == ([0.4], [0.1])


def test_line_searches_of_several_problems_are_their_own():
    peak = torch.tensor([10.0, 1.0, -1.0], dtype=torch.float64)
    # Tops at 10, 1 and -1 along a step of 4: straight on; (4 - 1)^2 > 1, then (2 - 1)^2 = 1, then
    # at 1; and the wrong way, for ever.
    found = search(lambda x: -((x - peak) ** 2), nothing, [4.0] * 3, [1.0] * 3)
    assert found == ([4.0, 1.0, 0.0], [1.0, 0.25, 0.0])


def test_a_step_that_is_not_a_number_is_not_taken():
    assert search(lambda x: x, nothing, math.nan, 1.0, start=2.0) == ([2.0], [0.0])


def test_arguments_out_of_range_are_refused():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="num_iterations"):
        conjugate_gradient(lambda v: v, one, 0)
    with pytest.raises(ValueError, match="damping"):
        fisher_vector_product(lambda x: x.sum(), one, one, -0.1)
    with pytest.raises(ValueError, match="max_divergence"):
        trust_region_step(lambda v: v, one, 0.0, 1)
    for options in ({"num_backtracks": 0}, {"shrink": 1.0}):
        with pytest.raises(ValueError, match="num_backtracks >= 1 and 0 < shrink < 1"):
            backtracking_line_search(lambda x: (x, x), one, one, one, 1.0, **options)
