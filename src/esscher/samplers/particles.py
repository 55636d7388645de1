"""Steering a diffusion model towards a reward with a population of samples: p(x0) exp(lambda r(x0)).

| sampler | proposal | what weighs a particle |
|---|---|---|
| `best_of_n` | the model | nothing: the best is taken at the end |
| `steer`, potential "diff" (SMC, FK steering) | the model | lambda (v_now - v_before) |
| `steer`, potential "max" (FK steering for search) | the model | lambda max of v so far |
| `steer`, resample_at () (DPS, reward guidance) | N(mean + lambda std^2 grad v, std^2) | as below |
| `steer`, proposal "guided" (TDS) | the same | log p / q beside the potential |

v(x) = r(D(x, sigma)) is the reward of the denoised estimate (Tweedie), and r itself at the end. Weights
are exact for every one of them: those of the particles that come out stand for p exp(lambda r) of the
chain that the denoiser and the noise levels make, however rough v is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from esscher.errors import UserError, require
from esscher.functional.diffusion import gaussian_log_prob, over, reverse_kernel
from esscher.samplers.denoisers import Condition, Denoiser, repeated
from esscher.samplers.solvers import checked_sigmas, level_pairs

Reward = Callable[[Tensor], Tensor]
"""Samples "b *d", not decoded -> the reward of each, "b"."""


def judge(reward: Reward, x: Float[Tensor, "b *d"]) -> Float[Tensor, "b"]:
    """Rewards of samples, checked.

    Raises:
        UserError: they are not one finite number a sample.
    """
    told = reward(x)
    if not isinstance(told, Tensor) or tuple(told.shape) != (len(x),):
        found = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
        raise UserError(f"the reward must return a tensor of shape ({len(x)},), got {found}")
    if not told.is_floating_point():
        raise UserError(f"the reward must return floating-point numbers, got {told.dtype}")
    if not bool(told.isfinite().all()):
        bad = int((~told.isfinite()).sum())
        raise UserError(
            f"the reward must be finite, got {bad} of {len(x)} that are not: give what cannot be "
            "judged a low number instead"
        )
    return told


# ---- formulas


def log_increment(
    logp: Float[Tensor, "p"],
    logq: Float[Tensor, "p"],
    value: Float[Tensor, "p"],
    before: Float[Tensor, "p"],
    inverse_temperature: float,
) -> Float[Tensor, "p"]:
    """What a step adds to a particle's log-weight, nats.

    log p(x' | x) - log q(x' | x) + lambda v(x') - lambda v(x)

    Args:
        logp: of the step under the model.
        logq: of the step under the proposal that it was drawn from.
        value: v(x').
        before: v(x); 0 before the first step.

    Source: Wu et al. 2023, TDS (arXiv 2306.17775), eq. 9; Singhal et al. 2025 (arXiv 2501.06848).
    Gradient: to all.
    """
    return logp - logq + inverse_temperature * (value - before)


def effective_size(log_weight: Float[Tensor, "p"]) -> Float[Tensor, ""]:
    """Effective number of particles, (sum w)^2 / sum w^2, in [1, p]."""
    return (2 * log_weight.logsumexp(-1) - (2 * log_weight).logsumexp(-1)).exp()


def systematic(log_weight: Float[Tensor, "p"], uniform: float, count: int) -> Int[Tensor, "n"]:
    """Who is copied: `count` indices, rising, by one uniform number in [0, 1).

    Index i comes floor or ceil of count w_i times; where sum w = 1, cumulative weights are cut at
    (j + u) / count.

    Source: Kitagawa 1996; Doucet and Johansen 2009, sec. 3.4.
    """
    weight = (log_weight.double() - log_weight.double().max()).exp()
    cumulative = weight.cumsum(-1)
    places = torch.arange(count, dtype=torch.float64, device=weight.device) + uniform
    found = torch.searchsorted(cumulative, places / count * cumulative[-1], right=True)
    # Rounding can put the last place at the total; who ends there is the last with a weight.
    last = torch.searchsorted(cumulative, cumulative[-1:])
    return torch.minimum(found, last)


def guidance_shift(
    gradient: Float[Tensor, "p *d"],
    std: Float[Tensor, "p"],
    inverse_temperature: float,
    clip: float,
) -> Float[Tensor, "p *d"]:
    """What reward guidance adds to the mean of a step: lambda std^2 grad v, of norm at most `clip` std.

    The tilt p(x' | x) exp(lambda v(x')) of a Gaussian step has this mean where v is linear; in the
    coordinates x0 + sigma eps, in which the gradient is taken too.

    Source: Chung et al. 2023, DPS (arXiv 2209.14687), as reward guidance; clipping: own choice of norm.
    """
    shift = inverse_temperature * over(std.square(), gradient) * gradient
    norm = shift.flatten(1).norm(dim=-1)
    share = (clip * std / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)
    return over(share, shift) * shift


# ---- samplers


@dataclass(frozen=True, kw_only=True)
class SteeringSettings:
    """How a population is steered."""

    inverse_temperature: float = 1.0
    """lambda > 0, nats a unit of reward."""
    potential: Literal["diff", "max"] = "diff"
    proposal: Literal["model", "guided"] = "model"
    resample_at: tuple[int, ...] | None = None
    """Steps, counted from 0, before which particles are judged and perhaps resampled; None: all; ():
    none, so that weights only come at the end."""
    threshold: float = 0.5
    """Resample where the effective number of particles is below this share of all, in [0, 1]."""
    clip: float = 10.0
    """Longest shift of a guided step, in standard deviations of the step, > 0."""

    def __post_init__(self) -> None:
        lam = self.inverse_temperature
        require("inverse_temperature", lam, 0 < lam < math.inf, "positive and finite")
        require("potential", self.potential, self.potential in ("diff", "max"), "diff or max")
        named = self.proposal in ("model", "guided")
        require("proposal", self.proposal, named, "model or guided")
        require("threshold", self.threshold, 0 <= self.threshold <= 1, "in [0, 1]")
        require("clip", self.clip, self.clip > 0, "> 0")
        steps = self.resample_at
        rising = steps is None or all(a < b for a, b in zip((-1, *steps), steps, strict=False))
        require("resample_at", steps, rising, "steps from 0 that rise")


@dataclass(frozen=True, kw_only=True)
class Particles:
    """A weighted population: sum_i w_i f(x_i) is the mean of f under p exp(lambda r) / Z."""

    x: Float[Tensor, "p *d"]
    reward: Float[Tensor, "p"]
    log_weight: Float[Tensor, "p"]
    """Nats, adding up to 1."""
    log_normaliser: float
    """Estimate of log Z = log E_p[exp(lambda r)], nats; Z without bias."""
    effective: Float[Tensor, "k"]
    """Effective number of particles each time they were judged, before resampling; the last at the
    end."""
    resampled: Bool[Tensor, "k"]
    evaluations: int
    """Rows that the denoiser was asked about."""

    def draw(self, count: int, seed: int) -> "Particles":
        """`count` particles of equal weight, drawn by weight (systematic): costs nothing.

        Raises: UserError if count < 1.
        """
        require("count", count, count >= 1, ">= 1")
        rows = systematic(self.log_weight, _uniform(torch.Generator().manual_seed(seed)), count)
        return Particles(
            x=self.x[rows],
            reward=self.reward[rows],
            log_weight=torch.full_like(self.log_weight[rows], -math.log(count)),
            log_normaliser=self.log_normaliser,
            effective=self.effective,
            resampled=self.resampled,
            evaluations=self.evaluations,
        )

    def best(self) -> int:
        """The row of the highest reward; the first of several."""
        return int(self.reward.argmax())


@torch.no_grad()
def best_of_n(
    denoiser: Denoiser,
    reward: Reward,
    sigmas: Sequence[float] | Float[Tensor, "k"],
    shape: Sequence[int],
    count: int,
    seed: int,
    *,
    condition: Condition = None,
    eta: float = 1.0,
    batch: int | None = None,
    start: float | None = None,
    end: float = 1.0,
    device: torch.device | str = "cpu",
) -> Particles:
    """Samples of the model, to take the best of; weighted by exp(r) / count for whoever wants them so.

    `steer` without resampling, at inverse temperature 1.

    Raises: UserError as `steer` does.
    """
    return steer(
        denoiser,
        reward,
        sigmas,
        shape,
        count,
        seed,
        SteeringSettings(resample_at=()),
        condition=condition,
        eta=eta,
        batch=batch,
        start=start,
        end=end,
        device=device,
    )


@torch.no_grad()
def steer(
    denoiser: Denoiser,
    reward: Reward,
    sigmas: Sequence[float] | Float[Tensor, "k"],
    shape: Sequence[int],
    count: int,
    seed: int,
    settings: SteeringSettings,
    *,
    condition: Condition = None,
    eta: float = 1.0,
    batch: int | None = None,
    start: float | None = None,
    end: float = 1.0,
    device: torch.device | str = "cpu",
) -> Particles:
    """Sequential Monte Carlo along the reverse chain, `count` evaluations a step.

    A weight is kept where nothing is resampled, and starts at 0 again where something is. Potential
    "diff" telescopes to lambda r(x0); what "max" has added, the end divides by.

    Args:
        denoiser: under guided proposals a function with a gradient to x.
        reward: of denoised samples; under guided proposals with a gradient to them.
        sigmas: noise levels, falling; the last is 0 or what noise is to be left.
        shape: of one sample.
        count: particles.
        seed: all that is drawn is a function of it.
        settings: potential, proposal, and when to resample.
        condition: one row, of all particles; None: none.
        eta: share of the ancestral noise, in (0, 1].
        batch: rows that the denoiser and the reward are asked about at a time; None: all.
        start: standard deviation of x to begin with; None: sigmas[0].
        end: what x is multiplied by at the last level, to be a sample; see `DiffusionModel`.
        device: of the particles.

    Source: Singhal et al. 2025, FK steering (arXiv 2501.06848); Wu et al. 2023, TDS.
    Raises: UserError if sigmas do not fall, eta is not in (0, 1], resample_at goes beyond the steps,
        the condition has more than one row, a reward is not finite or, where it must, has no gradient.
    """
    levels = checked_sigmas(sigmas)
    steps, lam = len(levels) - 1, settings.inverse_temperature
    require("eta", eta, 0 < eta <= 1, "in (0, 1]: without noise, copies of a particle stay alike")
    require("count", count, count >= 1, ">= 1")
    require("batch", batch, batch is None or batch >= 1, ">= 1")
    judged = range(steps) if settings.resample_at is None else settings.resample_at
    require("resample_at", tuple(judged)[-3:], all(k < steps for k in judged), f"below {steps}")
    generator = torch.Generator().manual_seed(seed)
    ask = _Asked(denoiser, reward, condition, batch or count)
    guided = settings.proposal == "guided"

    def normal() -> Tensor:
        return torch.randn((count, *shape), generator=generator).to(device)

    x = normal() * (float(levels[0]) if start is None else start)
    zero = torch.zeros(count, dtype=torch.float64, device=x.device)
    log_weight, log_normaliser = zero, 0.0
    before = zero
    """The value at which the weight stands (diff); the highest value so far (max)."""
    owed = zero
    """What potentials of "max" have added, and the end takes back."""
    effective: list[Tensor] = []
    resampled: list[bool] = []
    for step, (sigma, following) in enumerate(level_pairs(levels, x)):
        denoised, value, gradient = ask(x, sigma, value=step in judged, gradient=guided)
        if step in judged:
            if settings.potential == "diff":
                log_weight, before = log_weight + lam * (value - before), value
            else:
                before = value if not effective else torch.maximum(before, value)
                log_weight, owed = log_weight + lam * before, owed + lam * before
            size = effective_size(log_weight)
            effective.append(size)
            resampled.append(bool(size < settings.threshold * count))
            uniform = _uniform(generator)
            if resampled[-1]:
                log_normaliser += float(log_weight.logsumexp(-1)) - math.log(count)
                rows = systematic(log_weight, uniform, count)
                x, denoised, gradient = x[rows], denoised[rows], gradient[rows]
                before, owed, log_weight = before[rows], owed[rows], zero
        mean, std = reverse_kernel(x, denoised, sigma, following, eta)
        if not bool(std > 0):
            x = mean
            continue
        std = std.expand(count)
        shift = guidance_shift(gradient, std, lam, settings.clip) if guided else None
        centre = mean if shift is None else mean + shift
        x = centre + over(std, x) * normal()
        if shift is not None:
            logp, logq = (gaussian_log_prob(x, m, std, "sum").double() for m in (mean, centre))
            log_weight = log_weight + log_increment(logp, logq, zero, zero, lam)
    x = x * end
    final = torch.cat([judge(reward, part) for part in x.split(batch or count)]).to(x.device)
    gained = lam * final.double()
    taken_back = lam * before if settings.potential == "diff" else owed
    log_weight = log_weight + gained - taken_back
    effective.append(effective_size(log_weight))
    total = log_weight.logsumexp(-1)
    return Particles(
        x=x,
        reward=final,
        log_weight=log_weight - total,
        log_normaliser=log_normaliser + float(total) - math.log(count),
        effective=torch.stack(effective),
        resampled=torch.tensor([*resampled, False]),
        evaluations=ask.evaluations,
    )


class _Asked:
    """Denoised estimates, and where asked for their rewards and the gradients of these, in batches."""

    def __init__(self, denoiser: Denoiser, reward: Reward, condition: Condition, batch: int):
        self._denoiser, self._reward, self._batch = denoiser, reward, batch
        self._condition = one_row(condition)
        self.evaluations = 0

    def __call__(
        self, x: Float[Tensor, "p *d"], sigma: Float[Tensor, ""], *, value: bool, gradient: bool
    ) -> tuple[Float[Tensor, "p *d"], Float[Tensor, "p"], Float[Tensor, "p *d"]]:
        """Values in float64; zeros where they were not asked for, and gradients likewise."""
        self.evaluations += len(x)
        parts = [self._part(part, sigma, value, gradient) for part in x.split(self._batch)]
        denoised, values, gradients = (torch.cat(column) for column in zip(*parts, strict=True))
        return denoised, values, gradients

    def _part(
        self, x: Tensor, sigma: Tensor, value: bool, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        condition = repeated(self._condition, len(x))
        if not gradient:
            denoised = self._denoiser(x, sigma.expand(len(x)), condition)
            told = judge(self._reward, denoised) if value else x.new_zeros(len(x))
            return denoised, told.double().to(x.device), torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = self._denoiser(x, sigma.expand(len(x)), condition)
            told = judge(self._reward, denoised)
            if not told.requires_grad:
                raise UserError(
                    "guided proposals need a reward and a denoiser with a gradient to their input: use "
                    "proposal model for a reward without one"
                )
            (slope,) = torch.autograd.grad(told.sum(), x)
        if not bool(slope.isfinite().all()):
            raise UserError("the gradient of the reward is not finite: use proposal model")
        return denoised.detach(), told.detach().double().to(x.device), slope


def one_row(condition: Condition) -> Condition:
    """A condition, of one sample.

    Raises:
        UserError: it has another number of rows than 1.
    """
    if condition is not None:
        parts = [condition] if isinstance(condition, Tensor) else condition.values()
        for part in parts:
            require(
                "rows of the condition", len(part), len(part) == 1, "1: particles share a target"
            )
    return condition


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
