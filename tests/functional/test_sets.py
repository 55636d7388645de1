"""What sets are worth: closed forms, scipy's square root of a matrix, and sums written out."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from esscher.functional.sets import (
    energy_distance,
    frechet_distance,
    frechet_distance_by_roots,
    gaussian_of,
    moments,
    root_of,
    vendi_score,
    vendi_score_of_kernel,
)


def normal(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def covariance(size, seed, rank=None):
    x = normal(size, rank or 2 * size, seed=seed)
    return x @ x.T / x.shape[1]


# ---- moments


def test_moments_by_hand():
    mean, spread = moments(torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 2.0]]))
    assert mean.tolist() == [3.0, 2.0]
    # Centred: (-2, -2), (0, 2), (2, 0); divided by 2.
    assert spread.tolist() == [[4.0, 2.0], [2.0, 4.0]]
    assert mean.dtype == spread.dtype == torch.float64


def test_moments_are_those_of_numpy():
    x = normal(50, 4)
    np.testing.assert_allclose(moments(x)[1], np.cov(x.numpy().T), rtol=1e-12)


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        moments(torch.zeros(1, 3))


# ---- Frechet


def test_frechet_distance_of_commuting_covariances():
    """|m - m'|^2 + sum (s - s')^2, with s the standard deviations along common axes."""
    axes = torch.linalg.qr(normal(3, 3, seed=3)).Q
    ours, theirs = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.0]).double()
    found = frechet_distance(
        torch.tensor([1.0, 2.0, 3.0]),
        axes * ours.square() @ axes.T,
        torch.tensor([1.0, 0.0, 2.0]),
        axes * theirs.square() @ axes.T,
    )
    assert found.item() == pytest.approx(5 + 4 + 1 + 0.25)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_frechet_distance_by_scipys_root(size):
    a, b = covariance(size, seed=1), covariance(size, seed=2)
    mean_a, mean_b = normal(size, seed=4), normal(size, seed=5)
    root = np.real(sqrtm(a.numpy() @ b.numpy()))
    expected = float((mean_a - mean_b).square().sum()) + np.trace(a.numpy() + b.numpy() - 2 * root)
    assert frechet_distance(mean_a, a, mean_b, b).item() == pytest.approx(expected)
    assert frechet_distance(mean_b, b, mean_a, a).item() == pytest.approx(expected)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    """Singular covariances: of a set to itself it is 0, and to another one finite and above."""
    x, y = normal(4, 9), normal(5, 9, seed=1)
    assert frechet_distance(*moments(x), *moments(x)).item() == pytest.approx(0, abs=1e-6)
    far = frechet_distance(*moments(x), *moments(y)).item()
    assert math.isfinite(far) and far > 1


@pytest.mark.parametrize(("count", "other"), [(4, 5), (12, 5), (12, 30), (1, 12)])
def test_frechet_distance_by_roots_is_that_by_covariances(count, other):
    """Fewer samples than dimensions and more, of either side; a single sample has covariance 0."""
    x, y = 2 * normal(count, 9) + 1, normal(other, 9, seed=1)
    mean, root = gaussian_of(x)
    assert root.shape == (min(count, 9), 9)
    told = moments(x) if count > 1 else (x[0], torch.zeros(9, 9).double())
    torch.testing.assert_close(root.mT @ root, told[1])
    expected = frechet_distance(*told, *moments(y)).item()
    found = frechet_distance_by_roots(mean, root, *gaussian_of(y))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    there = moments(y)
    found = frechet_distance_by_roots(mean, root, there[0], root_of(there[1]))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_by_roots(mean, root, mean, root).item() == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_many_sets_at_once():
    sets, y = normal(3, 6, 4), normal(20, 4, seed=1)
    found = frechet_distance_by_roots(*gaussian_of(sets), *gaussian_of(y))
    each = [frechet_distance(*moments(x), *moments(y)).item() for x in sets]
    assert found.tolist() == pytest.approx(each)


def test_what_is_no_covariance_has_no_root():
    for bad in (
        torch.ones(2, 3),
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.full((2, 2), math.nan),
    ):
        with pytest.raises(ValueError, match="square, symmetric and finite"):
            root_of(bad)


# ---- Vendi


def test_orthogonal_samples_are_all_different_and_equal_ones_are_one():
    for size in (2, 5):
        assert vendi_score(3 * torch.eye(size)).item() == pytest.approx(size)
        assert vendi_score(torch.full((size, 4), -2.0)).item() == pytest.approx(1)


def test_vendi_score_of_two_clusters():
    """Three samples of one kind and one of another: exp of the entropy of (3/4, 1/4)."""
    embedding = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0], [0.0, 7.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi_score(embedding).item() == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize(("count", "size"), [(3, 8), (8, 3), (4, 4)])
def test_vendi_score_from_the_whole_kernel(count, size):
    """By the n x n matrix of cosines, whichever of the two was smaller."""
    x = normal(count, size).numpy()
    cosine = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in x] for a in x])
    values = np.linalg.eigvalsh(cosine / count)
    values = values[values > 1e-12]
    assert vendi_score(torch.from_numpy(x)).item() == pytest.approx(
        np.exp(-(values * np.log(values)).sum())
    )


def test_vendi_score_of_a_kernel_by_hand():
    """Two samples of likeness k: eigenvalues (1 + k) / 2 and (1 - k) / 2."""
    k = 0.3
    shares = [(1 + k) / 2, (1 - k) / 2]
    found = vendi_score_of_kernel(torch.tensor([[1.0, k], [k, 1.0]]))
    assert found.item() == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))


def test_vendi_score_needs_directions():
    with pytest.raises(ValueError, match="no direction"):
        vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


# ---- energy


def test_energy_distance_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    # Across: 1, 5, 1, 3: twice their mean is 5. Within: 2 and 4.
    assert energy_distance(a, b).item() == pytest.approx(5 - 2 - 4)


def test_energy_distance_tells_laws_apart():
    a, b = normal(400, 2), normal(400, 2, seed=1)
    assert abs(energy_distance(a, b).item()) < 0.02
    # Of points on two places r apart: 2 r.
    there, here = torch.zeros(5, 2), torch.full((5, 2), 3.0)
    assert energy_distance(there, here).item() == pytest.approx(2 * 3 * math.sqrt(2))


def test_energy_distance_needs_pairs():
    with pytest.raises(ValueError, match="at least 2 samples, got 1 and 3"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2))
