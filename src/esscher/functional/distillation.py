"""One-step students of diffusion models by distribution matching: the gradient, its weights, a GAN.

A student x = G(z) follows, at noised samples x_t = x + sigma eps,

    grad D_f(p || q) = -E[h(r) (score_p(x_t) - score_q(x_t)) dG],   r = p / q,   h(r) = r^2 f''(r)

with p the teacher's density, q the student's. With scores as denoised estimates, score = (mu - x_t) /
sigma^2, the direction of descent is mu_p - mu_q. h is `curvature` in functional/divergences.py.

Source: Xu et al. 2025, f-distill (arXiv 2502.15681), sec. 3; Yin et al. 2024, DMD2 (arXiv 2405.14867).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

EPSILON = 1e-6
"""Added to every denominator, as in NVlabs/FastGen."""


@torch.no_grad()
def density_ratio(
    logits: Float[Tensor, "b k"], limit: float, low: float, high: float
) -> Float[Tensor, "b"]:
    """R = p / q of a discriminator that says log(p / q): the mean of its k heads, in float32.

    The logit is held in [-limit, limit] before the exponential, the ratio in [low, high] after it.

    Source: NVlabs/FastGen, f_distill.py (10, 0.1 and 20).
    Gradient: none.
    Raises: ValueError unless limit > 0 and 0 < low < high.
    """
    if not (limit > 0 and 0 < low < high):
        raise ValueError(f"need limit > 0 and 0 < low < high, got {limit}, {low}, {high}")
    return logits.float().mean(-1).clamp(-limit, limit).exp().clamp(low, high)


def bin_of(value: Float[Tensor, "b"], low: float, high: float, num_bins: int) -> Int[Tensor, "b"]:
    """Which of the equally wide bins of [low, high] each value lies in; those outside, in the nearest.

    Raises: ValueError unless num_bins >= 1 and low < high.
    """
    if not (num_bins >= 1 and low < high):
        raise ValueError(f"need num_bins >= 1 and low < high, got {num_bins}, {low}, {high}")
    place = (value - low) / (high - low) * num_bins
    return place.floor().clamp(0, num_bins - 1).long()  # No whole number is as large as 1e30.


@torch.no_grad()
def moved_bin_means(
    means: Float[Tensor, "k"],
    ratio: Float[Tensor, "b"],
    bins: Int[Tensor, "b"],
    average: float,
) -> Float[Tensor, "k"]:
    """Running means of the ratio in each bin: average m + (1 - average) (mean of the batch).

    A bin that no sample of the batch lies in keeps its mean.

    Source: NVlabs/FastGen, f_distill.py (average 0, or 0.5 for ImageNet-64).
    Gradient: none.
    """
    count = torch.zeros_like(means).index_add(0, bins, torch.ones_like(ratio))
    total = torch.zeros_like(means).index_add(0, bins, ratio)
    moved = average * means + (1 - average) * total / count.clamp(min=1)
    return torch.where(count > 0, moved, means)


def over_mean(weight: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Weights divided by their mean over the batch, so that a divergence does not scale the step.

    Gradient: to weight.
    """
    return weight / (weight.mean() + EPSILON)


@torch.no_grad()
def matching_direction(
    x: Float[Tensor, "b *d"],
    teacher: Float[Tensor, "b *d"],
    fake: Float[Tensor, "b *d"],
    weight: Float[Tensor, "b"],
) -> Float[Tensor, "b *d"]:
    """The student's gradient at each sample: weight (mu_q - mu_p) / mean over components |x - mu_p|.

    The denominator is DMD's, from code: it makes all noise levels weigh about the same, where the
    scores alone would ask for 1 / sigma^2.

    Args:
        x: the student's samples, clean.
        teacher: mu_p, the teacher's denoised estimate at the noised samples.
        fake: mu_q, that of the student's own distribution.
        weight: h.

    Source: tianweiy/DMD2, edm_guidance.py; NVlabs/FastGen, common_loss.py.
    Gradient: none.
    """
    shape = (-1, *[1] * (x.dim() - 1))
    size = (x - teacher).abs().flatten(1).mean(-1)
    return (weight / (size + EPSILON)).view(shape) * (fake - teacher)


def pseudo_target_terms(
    x: Float[Tensor, "b *d"], direction: Float[Tensor, "b *d"]
) -> Float[Tensor, "b"]:
    """Half the squared distance to x - direction, a constant, averaged over components.

    The gradient of the batch mean is direction / numel(x), exactly.

    Source: Yin et al. 2024, DMD (arXiv 2311.18828), app. (the loss of the generator's code).
    Gradient: to x.
    """
    target = (x - direction).detach()
    return 0.5 * (x - target).square().flatten(1).mean(-1)


def discriminator_terms(
    real: Float[Tensor, "b k"], fake: Float[Tensor, "b k"]
) -> Float[Tensor, "b"]:
    """softplus(-real) + softplus(fake), averaged over heads; the best logit is log(p_real / p_fake).

    Source: Goodfellow et al. 2014 (arXiv 1406.2661), eq. 1, in logits.
    Gradient: to both.
    """
    return (softplus(-real.float()) + softplus(fake.float())).mean(-1)


def generator_terms(fake: Float[Tensor, "b k"]) -> Float[Tensor, "b"]:
    """softplus(-fake), averaged over heads: the loss of a generator that does not saturate.

    Source: Goodfellow et al. 2014 (arXiv 1406.2661), sec. 3.
    Gradient: to fake.
    """
    return softplus(-fake.float()).mean(-1)


def approximate_r1_terms(
    logits: Float[Tensor, "b k"], nudged: Float[Tensor, "b k"]
) -> Float[Tensor, "b"]:
    """(D(x) - D(x + a n))^2, averaged over heads: about a^2 |grad D|^2 for small noise a n.

    Source: Lin et al. 2025, APT (arXiv 2501.08316), sec. 3.4; NVlabs/FastGen (a = 0.1).
    Gradient: to both.
    """
    return (logits.float() - nudged.float()).square().mean(-1)
