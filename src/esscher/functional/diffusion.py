"""Noise levels, what a diffusion model predicts at each of them, and steps from one to the next.

The library has one system of coordinates, x = x0 + sigma eps, whatever a model was trained in:

    trained in                                      sigma                       its input z
    z = sqrt(abar) x0 + sqrt(1 - abar) eps  (vp)    sqrt((1 - abar) / abar)     x / sqrt(1 + sigma^2)
    z = (1 - t) x0 + t eps                  (flow)  t / (1 - t)                 x / (1 + sigma)

Here "denoised" is the estimate of x0 that every network is turned into; the noise and the score follow:

    eps = (x - denoised) / sigma        score = (denoised - x) / sigma^2
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["leading", "trailing", "linspace"]
Level = Float[Tensor, "b"] | Float[Tensor, ""]
"""A number for each row, or one for all of them."""
Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


def alpha_bars(
    schedule: BetaSchedule, steps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float[Tensor, "t"]:
    """Share of the signal's variance that is left after each training step: prod (1 - beta).

    linear: beta from beta_start to beta_end; scaled_linear: the same of sqrt(beta);
    squaredcos_cap_v2: cos^2((u + 0.008) / 1.008 pi / 2) at the ends of each step, beta at most 0.999.
    In float64.

    Source: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol and Dhariwal 2021 (cosine).
    Raises: ValueError if steps < 1 or the betas are not in (0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (0 < beta_start < 1 and 0 < beta_end < 1):
        raise ValueError(f"betas must be in (0, 1), got {beta_start} to {beta_end}")
    if schedule == "linear":
        beta = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        ends = math.sqrt(beta_start), math.sqrt(beta_end)
        beta = torch.linspace(*ends, steps, dtype=torch.float64).square()
    else:
        place = torch.arange(steps + 1, dtype=torch.float64) / steps
        left = ((place + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta = (1 - left[1:] / left[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def sigma_of_alpha_bar(alpha_bar: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Noise over signal: sqrt((1 - abar) / abar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of_sigma(sigma: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Share of the signal's variance: 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma.square())


def sampling_timesteps(
    train_steps: int, count: int, spacing: Spacing, offset: int = 0
) -> Float[Tensor, "k"]:
    """`count` of the training steps 0 .. train_steps - 1, from the noisiest down.

    leading: 0, r, 2r ... (r = train_steps // count) plus `offset`; trailing: the last step and
    every train_steps / count before it; linspace: both ends and equal distances, not rounded.

    Source: Lin et al. 2024 (arXiv 2305.08891), table 2.
    Raises: ValueError if count is not in [1, train_steps].
    """
    if not 1 <= count <= train_steps:
        raise ValueError(f"count must be in [1, {train_steps}], got {count}")
    if spacing == "leading":
        steps = torch.arange(count, dtype=torch.float64) * (train_steps // count) + offset
        return steps.flip(0)
    if spacing == "trailing":
        return (
            train_steps
            - 1
            - (torch.arange(count, dtype=torch.float64) * train_steps / count).round()
        )
    return torch.linspace(train_steps - 1, 0, count, dtype=torch.float64)


def karras_sigmas(count: int, low: float, high: float, rho: float = 7.0) -> Float[Tensor, "k"]:
    """Noise levels from `high` to `low`, equally far apart as sigma^(1/rho).

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 5.
    Raises: ValueError unless count >= 2, 0 < low < high and rho > 0.
    """
    if count < 2 or not 0 < low < high or not rho > 0:
        raise ValueError(
            f"need count >= 2, 0 < low < high and rho > 0, got {count}, {low}, {high}, {rho}"
        )
    ends = high ** (1 / rho), low ** (1 / rho)
    return torch.linspace(*ends, count, dtype=torch.float64) ** rho


def exponential_sigmas(count: int, low: float, high: float) -> Float[Tensor, "k"]:
    """Noise levels from `high` to `low`, equally far apart as log sigma.

    Raises: ValueError unless count >= 1 and 0 < low < high.
    """
    _check_levels(count, low, high)
    return torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64).exp()


def linear_sigmas(count: int, low: float, high: float) -> Float[Tensor, "k"]:
    """Noise levels from `high` to `low`, equally far apart.

    Raises: ValueError unless count >= 1 and 0 < low < high.
    """
    _check_levels(count, low, high)
    return torch.linspace(high, low, count, dtype=torch.float64)


def _check_levels(count: int, low: float, high: float) -> None:
    if count < 1 or not 0 < low < high:
        raise ValueError(f"need count >= 1 and 0 < low < high, got {count}, {low}, {high}")


def truncated_log_logistic(
    uniform: Float[Tensor, "*s"], loc: float, scale: float, low: float, high: float
) -> Float[Tensor, "*s"]:
    """Noise levels whose logarithm is logistic, cut to [low, high]: the inverse distribution function.

    P(sigma) = 1 / (1 + exp(-(log sigma - loc) / scale)), rescaled so that P(low) = 0 and P(high) = 1.

    Args:
        uniform: in [0, 1].
        loc: of log sigma, nats.
        scale: of log sigma, > 0.

    Source: Reuss et al. 2023 (BESO, arXiv 2304.02532), the density of noise levels in training.
    Raises: ValueError unless scale > 0 and 0 < low < high.
    """
    if not (scale > 0 and 0 < low < high):
        raise ValueError(f"need scale > 0 and 0 < low < high, got {scale}, {low}, {high}")
    first, last = (_logistic((math.log(end) - loc) / scale) for end in (low, high))
    share = first + (last - first) * uniform.double()
    return (loc + scale * (share / (1 - share)).log()).exp().clamp(low, high).to(uniform.dtype)


def _logistic(z: float) -> float:
    """1 / (1 + exp(-z)), where neither end overflows."""
    small = math.exp(-abs(z))
    return (1.0 if z >= 0 else small) / (1 + small)


def denoised_of(
    prediction: Prediction,
    output: Float[Tensor, "b *d"],
    x: Float[Tensor, "b *d"],
    sigma: Level,
) -> Float[Tensor, "b *d"]:
    """The estimate of x0 that a network's output stands for.

    epsilon: x - sigma out. sample: out. v_prediction (out = sqrt(abar) eps - sqrt(1 - abar) x0):
    x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) out. flow_prediction (out = eps - x0):
    (x - sigma out) / (1 + sigma).

    Source: Salimans and Ho 2022 (arXiv 2202.00512), app. D (v); Lipman et al. 2023 (flow).
    Gradient: to output and x.
    """
    level = over(sigma, x)
    if prediction == "epsilon":
        return x - level * output
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        # Not from squares, which are infinite from 2e19 on; levels without signal come near it.
        root = torch.hypot(level, torch.ones_like(level))
        return x / root / root - level / root * output
    if prediction == "flow_prediction":
        return (x - level * output) / (1 + level)
    raise ValueError(f"prediction {prediction!r} is not one of {Prediction.__args__}")


def input_scale(prediction: Prediction, sigma: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """What x is multiplied by to become the input of a network of this kind: see the module."""
    if prediction == "flow_prediction":
        return 1 / (1 + sigma)
    return 1 / torch.hypot(sigma, torch.ones_like(sigma))


def eps_of(
    x: Float[Tensor, "b *d"], denoised: Float[Tensor, "b *d"], sigma: Level
) -> Float[Tensor, "b *d"]:
    """The noise that a denoised estimate implies: (x - denoised) / sigma."""
    return (x - denoised) / over(sigma, x)


def score_of(
    x: Float[Tensor, "b *d"], denoised: Float[Tensor, "b *d"], sigma: Level
) -> Float[Tensor, "b *d"]:
    """Gradient of the log-density of x: (denoised - x) / sigma^2.

    Source: Tweedie's formula; Karras et al. 2022, eq. 3.
    """
    return (denoised - x) / over(sigma, x).square()


def guided_estimate(
    conditional: Float[Tensor, "b *d"],
    unconditional: Float[Tensor, "b *d"],
    scale: float | Float[Tensor, ""],
) -> Float[Tensor, "b *d"]:
    """Classifier-free guidance of estimates (or of eps, which is linear in them): u + s (c - u).

    s = 1 is the conditional one, s = 0 the other; papers that write (1 + w) c - w u mean s = 1 + w.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6, in the convention of Imagen and diffusers.
    Gradient: to both.
    """
    return unconditional + scale * (conditional - unconditional)


def edm_scalings(
    sigma: Float[Tensor, "*s"], sigma_data: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Preconditioning: denoised = skip x + out F(in x, noise). Returns (skip, out, in, noise).

    skip = sd^2 / (sigma^2 + sd^2), out = sigma sd / sqrt(sigma^2 + sd^2), in = 1 / sqrt(sigma^2 +
    sd^2), noise = log(sigma) / 4.

    Source: Karras et al. 2022, table 1.
    """
    root = torch.hypot(sigma, torch.full_like(sigma, sigma_data))
    return (sigma_data / root).square(), sigma / root * sigma_data, 1 / root, sigma.log() / 4


def denoising_terms(
    denoised: Float[Tensor, "b *d"],
    x0: Float[Tensor, "b *d"],
    sigma: Float[Tensor, "b"],
    weighting: Prediction,
) -> Float[Tensor, "b"]:
    """Squared error of a denoised estimate, averaged over components, as the error of a prediction:

        sample            |x0 - denoised|^2
        epsilon           |x0 - denoised|^2 / sigma^2                      (the simple loss of DDPM)
        v_prediction      |x0 - denoised|^2 (1 + sigma^2) / sigma^2
        flow_prediction   |x0 - denoised|^2 (1 + sigma)^2 / sigma^2

    Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 14; Salimans and Ho 2022 (arXiv 2202.00512).
    Gradient: to all.
    """
    error = (denoised - x0).square().flatten(1).mean(-1)
    if weighting == "sample":
        return error
    if weighting == "epsilon":
        return error / sigma.square()
    if weighting == "v_prediction":
        return error * (1 + sigma.square()) / sigma.square()
    return error * ((1 + sigma) / sigma).square()


def reverse_kernel(
    x: Float[Tensor, "b *d"],
    denoised: Float[Tensor, "b *d"],
    sigma: Level,
    next_sigma: Level,
    eta: float,
) -> tuple[Float[Tensor, "b *d"], Level]:
    """Mean and standard deviation of the next, less noisy x.

    std = eta next sqrt(1 - (next / sigma)^2), mean = denoised + sqrt(next^2 - std^2) eps. At eta 0
    this is DDIM, at 1 ancestral sampling (DDPM). A step to noise level 0 has no noise of its own.

    Source: Song et al. 2021 (DDIM, arXiv 2010.02502), eq. 12 and 16, divided by sqrt(abar_next).
    Gradient: to x and denoised.
    Raises: ValueError if eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    std = eta * next_sigma * (1 - (next_sigma / sigma).square()).clamp(min=0).sqrt()
    kept = (next_sigma.square() - std.square()).clamp(min=0).sqrt()
    return denoised + over(kept / sigma, x) * (x - denoised), std


def gaussian_log_prob(
    x: Float[Tensor, "b *d"],
    mean: Float[Tensor, "b *d"],
    std: Level,
    reduction: Literal["sum", "mean"],
) -> Float[Tensor, "b"]:
    """Log-density of x under independent Gaussians, in nats; over an event's components added up, or
    averaged as papers on policy gradients of diffusion models have it.

    Gradient: to x, mean and std.
    Raises: ValueError if reduction is neither.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
    spread = over(std, x)
    terms = -0.5 * ((x - mean) / spread).square() - spread.log() - 0.5 * math.log(2 * math.pi)
    flat = terms.flatten(1)
    return flat.sum(-1) if reduction == "sum" else flat.mean(-1)


def reverse_kl_terms(
    denoised: Float[Tensor, "b *d"],
    reference: Float[Tensor, "b *d"],
    sigma: Level,
    next_sigma: Level,
    eta: float,
) -> Float[Tensor, "b"]:
    """KL of a step's reverse kernel under two models that stand at the same x, nats.

    |mean - mean_ref|^2 / (2 std^2), symmetric; at eta 1 it is (1 / next^2 - 1 / sigma^2) / 2 times
    |denoised - denoised_ref|^2. Added up along a chain it bounds the KL of what the chains end in.

    Args:
        next_sigma: > 0, for a step to noise level 0 has no density.
        eta: in (0, 1].

    Source: Fan et al. 2023 (DPOK, arXiv 2305.16381), lemma 4.2, for this kernel.
    Gradient: to both estimates.
    """
    origin = torch.zeros_like(denoised)  # Where they stand makes no difference.
    mean, std = reverse_kernel(origin, denoised, sigma, next_sigma, eta)
    other, _ = reverse_kernel(origin, reference, sigma, next_sigma, eta)
    return (mean - other).flatten(1).square().sum(-1) / (2 * std.square())


def multistep(
    x: Float[Tensor, "b *d"],
    denoised: Float[Tensor, "b *d"],
    before: Float[Tensor, "b *d"],
    sigma_before: Float[Tensor, ""],
    sigma: Float[Tensor, ""],
    next_sigma: Float[Tensor, ""],
) -> Float[Tensor, "b *d"]:
    """A step of DPM-Solver++(2M): the denoised estimate extrapolated along log sigma.

    With h = log(sigma / next), r = log(sigma_before / sigma) / h and
    d = denoised + (denoised - before) / (2 r):  next x = (next / sigma) x + (1 - next / sigma) d.

    Args:
        before: the estimate at `sigma_before`, one step earlier.
        next_sigma: > 0.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """
    ratio = (sigma_before / sigma).log() / (sigma / next_sigma).log()
    extrapolated = denoised + (denoised - before) / (2 * ratio)
    share = next_sigma / sigma
    return share * x + (1 - share) * extrapolated


def over(value: Tensor, x: Tensor) -> Tensor:
    """A number per row ("b", or a scalar), shaped to multiply x ("b *d")."""
    return value if value.dim() == 0 else value.view(-1, *[1] * (x.dim() - 1))
