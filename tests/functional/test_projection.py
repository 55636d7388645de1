import math

import numpy as np
import pytest
import torch

from esscher.functional.projection import cosine, inner, orthogonal_part


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


# a = (1, 2, 2) with length 3 and b = (4, 0, -3), cut into a matrix and a scalar.
A, B = tensors([[1.0, 2.0]], 2.0), tensors([[4.0, 0.0]], -3.0)


def test_by_hand():
    assert inner(A, B).item() == 4 + 0 - 6
    assert inner(A, A).item() == 9
    assert cosine(A, B).item() == pytest.approx(-2 / (3 * 5))
    # b + (2 / 9) a
    matrix, scalar = orthogonal_part(B, A)
    assert matrix.flatten().tolist() == pytest.approx([4 + 2 / 9, 4 / 9])
    assert scalar.item() == pytest.approx(-3 + 4 / 9)
    # The other way round it is a + (2 / 25) b: the roles differ.
    matrix, scalar = orthogonal_part(A, B)
    assert matrix.flatten().tolist() == pytest.approx([1 + 8 / 25, 2.0])
    assert scalar.item() == pytest.approx(2 - 6 / 25)


def test_one_coefficient_for_all_tensors():
    """Tensor by tensor nothing would be left of b; jointly something is."""
    along, vector = tensors([1.0], [1.0]), tensors([2.0], [-4.0])
    left = orthogonal_part(vector, along)
    assert [part.item() for part in left] == [3.0, -3.0]


@pytest.mark.parametrize("seed", range(5))
def test_against_numpy_on_the_flattened_vectors(seed):
    draw = np.random.default_rng(seed)
    shapes = [(3, 4), (5,), (), (2, 1, 6)]
    a, b = ([draw.normal(size=shape) for shape in shapes] for _ in range(2))
    flat_a, flat_b = (np.concatenate([np.ravel(x) for x in v]) for v in (a, b))
    # The residual of least squares of b on a.
    (coefficient,), *_ = np.linalg.lstsq(flat_a[:, None], flat_b, rcond=None)
    expected = flat_b - coefficient * flat_a
    found = orthogonal_part(tensors(*b), tensors(*a))
    assert [tuple(part.shape) for part in found] == shapes
    flat = np.concatenate([part.numpy().ravel() for part in found])
    np.testing.assert_allclose(flat, expected, rtol=1e-12, atol=1e-12)
    angle = np.dot(flat_a, flat_b) / np.linalg.norm(flat_a) / np.linalg.norm(flat_b)
    assert cosine(tensors(*a), tensors(*b)).item() == pytest.approx(angle, rel=1e-12)


def test_what_is_left_is_orthogonal_and_keeps_the_length_by_pythagoras():
    left = orthogonal_part(B, A)
    assert abs(inner(left, A).item()) < 1e-14
    taken = [b - part for b, part in zip(B, left, strict=True)]
    assert (inner(left, left) + inner(taken, taken)).item() == pytest.approx(inner(B, B).item())
    again = orthogonal_part(left, A)
    assert all(torch.allclose(x, y, atol=1e-14) for x, y in zip(again, left, strict=True))


def test_it_does_not_depend_on_the_length_or_sign_of_what_is_projected_out():
    for factor in (1e-3, 1e3, -2.0):
        left = orthogonal_part(B, [factor * a for a in A])
        expected = orthogonal_part(B, A)
        assert all(torch.allclose(x, y) for x, y in zip(left, expected, strict=True))


def test_nothing_is_taken_out_along_zero():
    zero = [torch.zeros_like(a) for a in A]
    left = orthogonal_part(B, zero)
    assert all(torch.equal(x, y) for x, y in zip(left, B, strict=True))
    assert cosine(B, zero).item() == 0.0
    # Below the guard the coefficient is <a, b> / epsilon: a = 1e-6, b = 1, 1e-6 / 1e-10 = 1e4.
    assert orthogonal_part(tensors(1.0), tensors(1e-6))[0].item() == pytest.approx(1 - 1e4 * 1e-6)
    assert orthogonal_part(tensors(1.0), tensors(1e-6), 1e-20)[0].item() == pytest.approx(0.0)


def test_float32_stays_orthogonal_where_the_vectors_nearly_cancel():
    torch.manual_seed(0)
    along = [torch.randn(2, 256, 256), torch.randn(2, 1, 256)]
    vector = [-a + 0.01 * torch.randn_like(a) for a in along]
    left = orthogonal_part(vector, along)
    product = sum((a.double() * x.double()).sum() for a, x in zip(along, left, strict=True))
    square = sum(a.double().square().sum() for a in along)
    assert abs((product / square).item()) < 1e-6
    assert inner(left, left).item() == pytest.approx(1e-4 * inner(along, along).item(), rel=0.05)


def test_gradients_against_finite_differences():
    a, b = ([x.clone().requires_grad_() for x in v] for v in (A, B))

    def total(*parts):
        left = orthogonal_part(parts[2:], parts[:2])
        return cosine(parts[:2], parts[2:]) + (left[0] * 3).sum() + left[1] ** 2

    assert torch.autograd.gradcheck(total, (*a, *b))


@pytest.mark.parametrize(
    ("left", "right"), [([], []), (A, A[:1]), (A, A[::-1]), (A, tensors([[1.0, 2.0]], [2.0]))]
)
def test_lists_that_do_not_match_are_refused(left, right):
    with pytest.raises(ValueError, match="equal shapes"):
        inner(left, right)
    with pytest.raises(ValueError, match="equal shapes"):
        orthogonal_part(right, left)
    assert math.isfinite(inner(A, A))
