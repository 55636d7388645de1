"""What a set of samples is worth as a whole: how far from another set, how varied."""

import torch
from jaxtyping import Float
from torch import Tensor


def energy_distance(a: Float[Tensor, "n *d"], b: Float[Tensor, "m *d"]) -> Float[Tensor, ""]:
    """2 E|a - b| - E|a - a'| - E|b - b'|, of two sets of samples; 0 on average for equal laws.

    Pairs of a sample with itself are left out, so it has no bias and may be below 0.

    Source: Szekely and Rizzo 2013, eq. 5.
    Gradient: to both.
    Raises: ValueError if a set has fewer than 2 samples.
    """
    a, b = a.flatten(1), b.flatten(1)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"each set needs at least 2 samples, got {len(a)} and {len(b)}")
    within = [_distances(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 2 * _distances(a, b).mean() - within[0] - within[1]


def _distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Not from products, which cancel to noise far from 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def moments(
    x: Float[Tensor, "*b n d"],
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b d d"]]:
    """Mean and covariance (divided by n - 1) of a set, or of many sets of one size, in float64.

    Raises: ValueError if a set has fewer than 2 samples.
    """
    count = x.shape[-2]
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 samples, got {count}")
    x = x.double()
    mean = x.mean(-2)
    centred = x - mean.unsqueeze(-2)
    return mean, centred.mT @ centred / (count - 1)


def frechet_distance(
    mean_a: Float[Tensor, "*b d"],
    covariance_a: Float[Tensor, "*b d d"],
    mean_b: Float[Tensor, "*c d"],
    covariance_b: Float[Tensor, "*c d d"],
) -> Float[Tensor, "*e"]:
    """Squared Wasserstein-2 distance of two Gaussians:

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    In float64. The trace of the root is the sum of the roots of the eigenvalues of
    S_a^(1/2) S_b S_a^(1/2), which are those of S_a S_b, and below 0 only by rounding. Leading axes
    are broadcast.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (FID, arXiv 1706.08500), eq. 6.
    Raises: ValueError if a covariance is not finite.
    """
    for covariance in (covariance_a, covariance_b):
        if not bool(covariance.isfinite().all()):
            raise ValueError(
                "a covariance that is not finite has no root: look for NaN in the samples"
            )
    mean_a, mean_b = mean_a.double(), mean_b.double()
    covariance_a, covariance_b = covariance_a.double(), covariance_b.double()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    joint = torch.linalg.eigvalsh(root @ covariance_b @ root)
    traces = sum(c.diagonal(dim1=-2, dim2=-1).sum(-1) for c in (covariance_a, covariance_b))
    roots = joint.clamp(min=0).sqrt().sum(-1)
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * roots


def gaussian_of(
    x: Float[Tensor, "*b n d"],
) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b k d"]]:
    """Mean of a set, or of many of one size, and a root R of its covariance (divided by n - 1), which
    is R^T R; in float64. It has min(n, d) rows, so that no d x d matrix is made of few samples.

    A set of one sample has covariance 0.
    """
    x = x.double()
    count, mean = x.shape[-2], x.mean(-2)
    root = (x - mean.unsqueeze(-2)) / max(count - 1, 1) ** 0.5
    return mean, root if count <= x.shape[-1] else torch.linalg.qr(root).R


def root_of(covariance: Float[Tensor, "d e"]) -> Float[Tensor, "d d"]:
    """R with R^T R = covariance, whose eigenvalues below 0 are taken for 0; in float64.

    Raises: ValueError if it is not square, symmetric and finite.
    """
    covariance = covariance.double()
    square = covariance.ndim == 2 and covariance.shape[0] == covariance.shape[1]
    if not (square and bool(torch.isclose(covariance, covariance.mT, rtol=1e-4).all())):
        raise ValueError(
            f"a covariance must be square, symmetric and finite, got shape {tuple(covariance.shape)}"
        )
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT


def frechet_distance_by_roots(
    mean_a: Float[Tensor, "*b d"],
    root_a: Float[Tensor, "*b k d"],
    mean_b: Float[Tensor, "*c d"],
    root_b: Float[Tensor, "*c l d"],
) -> Float[Tensor, "*e"]:
    """`frechet_distance` of Gaussians with covariances R^T R:

    |m_a - m_b|^2 + |R_a|^2 + |R_b|^2 - 2 |R_a R_b^T|_*,   |.|_* the sum of singular values,

    since those of R_a R_b^T are the roots of the eigenvalues of S_a S_b. In float64; no d x d matrix is
    made.

    Source: as `frechet_distance`.
    """
    mean_a, mean_b = mean_a.double(), mean_b.double()
    root_a, root_b = root_a.double(), root_b.double()
    traces = sum(root.square().sum((-2, -1)) for root in (root_a, root_b))
    joint = torch.linalg.svdvals(root_a @ root_b.mT).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * joint


def vendi_score(embedding: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Effective number of different samples, in [1, n]: exp of the entropy of the eigenvalues of K / n,
    where K is the cosine of each pair.

    The eigenvalues are those of the d x d matrix E^T E / n as well, the smaller one is taken.

    Source: Friedman and Dieng 2023 (arXiv 2210.02410), definition 3.1.
    Raises: ValueError if there are none, or one is 0 or not finite, and so has no direction.
    """
    if not len(embedding):
        raise ValueError("a Vendi score needs at least 1 sample, got 0")
    length = embedding.double().norm(dim=-1, keepdim=True)
    if not bool(((length > 0) & length.isfinite()).all()):
        raise ValueError(
            "an embedding of length 0, or not finite, has no direction: centre or change the embedding"
        )
    unit = embedding.double() / length
    gram = unit.T @ unit if unit.shape[1] < unit.shape[0] else unit @ unit.T
    return _entropic_rank(gram / len(unit))


def vendi_score_of_kernel(kernel: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """`vendi_score` by any positive semidefinite likeness of each pair, 1 of a sample with itself.

    Source: Friedman and Dieng 2023 (arXiv 2210.02410), definition 3.1.
    """
    return _entropic_rank(kernel.double() / len(kernel))


def _entropic_rank(matrix: Float[Tensor, "k k"]) -> Float[Tensor, ""]:
    share = torch.linalg.eigvalsh(matrix).clamp(min=0)
    return torch.special.entr(share).sum().exp()
