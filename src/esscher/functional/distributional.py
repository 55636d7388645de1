"""Losses for critics that predict a distribution of returns: quantile, categorical, Gaussian."""

import torch
from jaxtyping import Float
from torch import Tensor


def quantile_huber_terms(
    quantiles: Float[Tensor, "b q"], target: Float[Tensor, "b p"], threshold: float = 1.0
) -> Float[Tensor, "b q p"]:
    """Pairwise quantile-regression losses of q predicted quantiles against p target samples.

    terms[b, i, j] = |tau_i - 1{d < 0}| Huber(d) / threshold, d = target_j - quantiles_i,
    tau_i = (i + 1/2) / q, Huber(d) = d^2/2 if |d| <= threshold else threshold (|d| - threshold/2).
    threshold 0 is the limit |tau_i - 1{d < 0}| |d|. Units: those of returns.

    Source: Dabney et al. 2018 (arXiv 1710.10044), eq. 9 and 10, divided by the threshold.
    Gradient: to `quantiles` only.
    Raises: ValueError if threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    num_quantiles = quantiles.shape[-1]
    fraction = torch.arange(num_quantiles, dtype=quantiles.dtype, device=quantiles.device)
    fraction = ((fraction + 0.5) / num_quantiles).unsqueeze(-1)
    difference = target.detach().unsqueeze(-2) - quantiles.unsqueeze(-1)
    weight = (fraction - (difference.detach() < 0).to(fraction.dtype)).abs()
    if threshold == 0:
        return weight * difference.abs()
    return weight * _huber(difference, threshold) / threshold


def quantile_huber_loss(
    quantiles: Float[Tensor, "b q"], target: Float[Tensor, "b p"], threshold: float = 1.0
) -> Float[Tensor, ""]:
    """Quantile-regression loss: mean over targets, sum over quantiles, mean over the batch.

    mean_b sum_i mean_j terms[b, i, j] of `quantile_huber_terms`.

    Source: Dabney et al. 2018 (arXiv 1710.10044), algorithm 1.
    Gradient: to `quantiles` only.
    Raises: ValueError if threshold is negative.
    """
    return quantile_huber_terms(quantiles, target, threshold).mean(-1).sum(-1).mean()


def categorical_projection(
    atoms: Float[Tensor, "b p"], probability: Float[Tensor, "b p"], support: Float[Tensor, "k"]
) -> Float[Tensor, "b k"]:
    """Projects weighted atoms onto an evenly spaced, increasing support, keeping total mass.

    result_k = sum_j probability_j max(0, 1 - |clip(atoms_j, z_1, z_K) - z_k| / spacing). The mean
    is kept too where no atom is clipped. `atoms` are already shifted: reward + discount * z.

    Source: Bellemare et al. 2017 (arXiv 1707.06887), eq. 7.
    Gradient: to `probability` and, almost everywhere, `atoms`.
    Raises: ValueError if the support has fewer than two atoms.
    """
    if len(support) < 2:
        raise ValueError(f"support must have at least 2 atoms, got {len(support)}")
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    inside = torch.clamp(atoms, support[0], support[-1])
    distance = (inside.unsqueeze(-2) - support.unsqueeze(-1)).abs() / spacing
    return ((1 - distance).clamp(min=0) * probability.unsqueeze(-2)).sum(-1)


def gaussian_critic_terms(
    mean: Float[Tensor, "*s"],
    std: Float[Tensor, "*s"],
    mean_target: Float[Tensor, "*#s"],
    sampled_target: Float[Tensor, "*#s"],
    bound: Float[Tensor, "*#s"] | float,
    epsilon: float = 0.1,
) -> Float[Tensor, "*s"]:
    """Surrogate whose gradient is DSAC-T's for a Gaussian return; its value means nothing.

    - sg((mean_target - mean) / (std^2 + epsilon)) mean
    - sg(((C - mean)^2 - std^2) / (std^3 + epsilon)) std,
    C = mean + clip(sampled_target - mean, -bound, bound), sg = stop-gradient. The factor
    (omega + eps_w) is left to the caller, once per critic, on the whole term. Targets and bound
    may broadcast ("b" or "e 1" beside "e b"). Units: mean, std, bound in returns, std > 0.

    Source: Duan et al., DSAC-T (arXiv 2310.05858), eq. 18 to 27 (numbering second-hand).
    Gradient: to mean and std, through the two linear factors only.
    Raises: ValueError if an argument does not broadcast to the shape of mean.
    """
    _check_broadcast(mean, mean_target, sampled_target, bound)
    clipped = _clip(sampled_target - mean, bound)
    mean_pull = (mean_target - mean) / (std.square() + epsilon)
    std_pull = (clipped.square() - std.square()) / (std.pow(3) + epsilon)  # std^3, not std^2
    return -(mean_pull.detach() * mean + std_pull.detach() * std)


def gaussian_critic_huber_terms(
    mean: Float[Tensor, "*s"],
    std: Float[Tensor, "*s"],
    mean_target: Float[Tensor, "*#s"],
    sampled_target: Float[Tensor, "*#s"],
    bound: Float[Tensor, "*#s"] | float,
    scale: Float[Tensor, "*#s"] | float,
    second_moment_factor: float = 2.0,
    delta: float = 50.0,
    epsilon: float = 0.1,
) -> Float[Tensor, "*s"]:
    """Huber form of the DSAC-T critic, with its own clipped scale on both terms.

    rho (Huber(mean - mean_target) + std sg(std^2 - k Huber(mean - C)) / (sg(std) + epsilon)),
    rho = sg(clip(scale / (std^2 + epsilon), 0.1, 10)), Huber with threshold delta, k =
    second_moment_factor, C as in `gaussian_critic_terms`. `scale` is omega (squared returns).
    Huber(d) is d^2/2 near 0, so k = 2 makes std^2 a second moment; the official code has k = 1,
    whose std is too small by sqrt(2) at each backup.

    Source: DSAC-T official code (Jingliang-Duan/DSAC-v2, since c5105eb).
    Gradient: to mean (through its Huber loss) and std (through the linear factor).
    Raises: ValueError if an argument does not broadcast to the shape of mean.
    """
    _check_broadcast(mean, mean_target, sampled_target, bound, scale)
    clipped = _clip(sampled_target - mean, bound)
    weight = (scale / (std.square() + epsilon)).clamp(0.1, 10.0).detach()
    std_push = (std.square() - second_moment_factor * _huber(clipped, delta)) / (std + epsilon)
    return weight * (_huber(mean - mean_target.detach(), delta) + std_push.detach() * std)


def _huber(difference: Tensor, threshold: float) -> Tensor:
    """d^2/2 inside the threshold, threshold (|d| - threshold/2) outside."""
    inner = difference.abs().clamp(max=threshold)
    return inner * (difference.abs() - 0.5 * inner)


def _clip(difference: Tensor, bound: Tensor | float) -> Tensor:
    if isinstance(bound, Tensor):  # the same call twice: its stubs take no union
        return torch.clamp(difference, -bound, bound)
    return torch.clamp(difference, -bound, bound)


def _check_broadcast(mean: Tensor, *others: Tensor | float) -> None:
    """Catches "b 1" against "b", which would silently become "b b"."""
    for other in others:
        shape = tuple(other.shape) if isinstance(other, Tensor) else ()
        pairs = zip(reversed(shape), reversed(mean.shape), strict=False)
        if len(shape) > mean.dim() or any(size not in (1, full) for size, full in pairs):
            raise ValueError(f"shape {shape} does not broadcast to the mean's {tuple(mean.shape)}")
