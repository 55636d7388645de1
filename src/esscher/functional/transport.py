"""Distances between distributions that are known by samples: optimal transport and mean embeddings.

A leading axis b holds pairs of sets, x_i and y_i, which are compared each with its partner. A mask says
which samples of a set are there; without one all are.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esscher.functional.sets import frechet_distance


def gaussian_w2(
    mean_a: Float[Tensor, "*b d"],
    covariance_a: Float[Tensor, "*b d d"],
    mean_b: Float[Tensor, "*c d"],
    covariance_b: Float[Tensor, "*c d d"],
) -> Float[Tensor, "*e"]:
    """Exact Wasserstein-2 distance of Gaussians, in the samples' units: the root of `frechet_distance`.

    In float64; what rounding leaves below 0 counts as 0. Leading axes are broadcast.

    Source: Dowson and Landau 1982.
    """
    return frechet_distance(mean_a, covariance_a, mean_b, covariance_b).clamp(min=0).sqrt()


def random_directions(count: int, like: Float[Tensor, "*b d"]) -> Float[Tensor, "p d"]:
    """Directions that are uniform on the unit sphere of the last axis, by torch's own generator."""
    drawn = torch.randn(count, like.shape[-1], device=like.device, dtype=like.dtype)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def sliced_w2_terms(
    x: Float[Tensor, "b m d"],
    y: Float[Tensor, "b m d"],
    directions: Float[Tensor, "p d"],
    mask: Bool[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b"]:
    """Squared sliced Wasserstein-2 distance of sets of one size: the mean over the directions of that
    of the projections, which is the mean squared difference of sorted values.

    Args:
        mask: of both sets; each has at least one sample.

    Source: Bonneel et al. 2015; GDE (arXiv 2505.18150), the direct generator.
    Gradient: to both sets.
    """
    ours, theirs = (torch.einsum("bmd,pd->bpm", s, directions) for s in (x, y))
    if mask is None:
        return (ours.sort(-1).values - theirs.sort(-1).values).square().mean((1, 2))
    out = ~mask.unsqueeze(1)
    # What is not there goes to the end of both lists, where it is counted out.
    ours, theirs = (s.masked_fill(out, torch.inf).sort(-1).values for s in (ours, theirs))
    count = mask.sum(-1)
    there = torch.arange(x.shape[1], device=x.device) < count.unsqueeze(-1)
    gap = torch.where(there.unsqueeze(1), ours, 0) - torch.where(there.unsqueeze(1), theirs, 0)
    return gap.square().sum(-1).mean(-1) / count


def sinkhorn_divergence_terms(
    x: Float[Tensor, "b m d"],
    y: Float[Tensor, "b n d"],
    *,
    epsilon: float,
    iterations: int,
    x_mask: Bool[Tensor, "b m"] | None = None,
    y_mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b"]:
    """Debiased entropic transport, S = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, at the cost
    c = |x - y|^2 / 2: as epsilon falls to 0 it becomes half of the squared Wasserstein-2 distance.

    OT is the dual value sum a f + sum b g after so many symmetric iterations in log space, each of
    which moves f and g half way to

        f_i = -epsilon log sum_j b_j exp((g_j - c_ij) / epsilon)

    and likewise g; one full step of each ends them. epsilon is in units of the cost: it is the square
    of geomloss's blur.

    Source: Feydy et al. 2019 (arXiv 1810.08278), eq. 3 and sec. 3.1; Knight et al. 2014.
    Gradient: to both sets.
    Raises: ValueError unless epsilon > 0 and iterations >= 1.
    """
    if not (epsilon > 0 and iterations >= 1):
        raise ValueError(f"need epsilon > 0 and iterations >= 1, got {epsilon} and {iterations}")
    a, b = _log_weights(x, x_mask), _log_weights(y, y_mask)

    def value(left: Tensor, right: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return _entropic_transport(
            half_squared_costs(left, right), log_a, log_b, epsilon, iterations
        )

    return value(x, y, a, b) - (value(x, x, a, a) + value(y, y, b, b)) / 2


def half_squared_costs(
    x: Float[Tensor, "b m d"], y: Float[Tensor, "b n d"]
) -> Float[Tensor, "b m n"]:
    """|x_i - y_j|^2 / 2; its gradient is finite where samples coincide, unlike that of a root.

    Gradient: to both.
    """
    centre = x.detach().mean(1, keepdim=True)  # Far from 0 the squares would cancel to noise.
    x, y = x - centre, y - centre
    squares = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (squares / 2 - x @ y.mT).clamp(min=0)


def _log_weights(x: Tensor, mask: Tensor | None) -> Float[Tensor, "b m"]:
    """Logarithm of 1 / count for each sample that is there, -inf for the others."""
    if mask is None:
        return x.new_full(x.shape[:2], -math.log(x.shape[1]))
    return torch.where(mask, -mask.sum(-1, keepdim=True).to(x.dtype).log(), -torch.inf)


def _entropic_transport(
    cost: Float[Tensor, "b m n"],
    log_a: Float[Tensor, "b m"],
    log_b: Float[Tensor, "b n"],
    epsilon: float,
    iterations: int,
) -> Float[Tensor, "b"]:
    def towards_x(g: Tensor) -> Tensor:
        return -epsilon * ((g / epsilon + log_b).unsqueeze(-2) - cost / epsilon).logsumexp(-1)

    def towards_y(f: Tensor) -> Tensor:
        return -epsilon * ((f / epsilon + log_a).unsqueeze(-1) - cost / epsilon).logsumexp(-2)

    f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for _ in range(iterations):
        f, g = (f + towards_x(g)) / 2, (g + towards_y(f)) / 2
    f = towards_x(g)
    g = towards_y(f)  # After f, so that the plan's mass is 1 and the dual value has no third term.
    return (log_a.exp() * f).sum(-1) + (log_b.exp() * g).sum(-1)


def mmd_terms(
    x: Float[Tensor, "b m d"],
    y: Float[Tensor, "b n d"],
    *,
    x_mask: Bool[Tensor, "b m"] | None = None,
    y_mask: Bool[Tensor, "b n"] | None = None,
    bandwidth: Float[Tensor, "b"] | None = None,
) -> Float[Tensor, "b"]:
    """Squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 h^2)), as a V-statistic:
    pairs of a sample with itself count, so it is never below 0, and 0 for equal sets.

    Args:
        bandwidth: h of each pair of sets, > 0; None: `median_distance`.

    Source: Gretton et al. 2012, eq. 5.
    Gradient: to both sets, not through the bandwidth.
    """
    if bandwidth is None:
        bandwidth = median_distance(x, y, x_mask=x_mask, y_mask=y_mask)
    scale = bandwidth.square().view(-1, 1, 1)
    a, b = _log_weights(x, x_mask).exp(), _log_weights(y, y_mask).exp()

    def mean(left: Tensor, right: Tensor, wl: Tensor, wr: Tensor) -> Tensor:
        kernel = (-half_squared_costs(left, right) / scale).exp()
        return torch.einsum("bm,bmn,bn->b", wl, kernel, wr)

    return mean(x, x, a, a) + mean(y, y, b, b) - 2 * mean(x, y, a, b)


@torch.no_grad()
def median_distance(
    x: Float[Tensor, "b m d"],
    y: Float[Tensor, "b n d"],
    *,
    x_mask: Bool[Tensor, "b m"] | None = None,
    y_mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b"]:
    """The median (the lower one of two) of the distances of all pairs of different samples of both sets
    together; 1 where it is 0.

    Source: Gretton et al. 2012, sec. 8.
    """
    both = torch.cat([x, y], 1)
    masks = [
        s.new_ones(s.shape[:2], dtype=torch.bool) if m is None else m
        for s, m in ((x, x_mask), (y, y_mask))
    ]
    mask = torch.cat(masks, 1)
    pairs = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    upper = torch.ones_like(pairs[0]).triu(1)
    distance = (2 * half_squared_costs(both, both)).sqrt()
    found = distance.masked_fill(~(pairs & upper), torch.nan).flatten(1).nanmedian(-1).values
    return torch.where(found > 0, found, 1.0)
