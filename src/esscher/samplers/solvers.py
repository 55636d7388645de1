"""From noise to samples: the solvers, one loop each, over any denoiser.

They keep no position and own no random numbers: noise is handed in, so what is drawn for one sample
depends on its own noise alone and not on the batch around it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.errors import UserError, require
from esscher.functional.diffusion import eps_of, gaussian_log_prob, multistep, over, reverse_kernel
from esscher.samplers.denoisers import Condition, Denoiser
from esscher.types import Chain

Solver = Literal["ddim", "euler", "heun", "dpmpp_2m"]
Noise = Callable[[int], Tensor]
"""Step, counted from 0 -> standard normal noise "b *d" of that step."""
FEW = 15
"""Steps of dpmpp_2m from which on its last one is of second order too."""


def solve(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Sequence[float] | Float[Tensor, "k"],
    condition: Condition = None,
    *,
    solver: Solver = "ddim",
    eta: float = 0.0,
    noise: Noise | None = None,
    clip: float | None = None,
    keeps_noise: bool = False,
) -> Float[Tensor, "b *d"]:
    """Samples, from x = x0 + sigmas[0] eps down to the last noise level.

    ddim: the reverse kernel at `eta`, which with eta 0 is the same as euler on the probability flow;
    heun: its second-order correction, two evaluations a step but the last; dpmpp_2m: DPM-Solver++(2M).

    Args:
        denoiser: called once a step and sample, where nothing else is said.
        x: noise to begin with, of standard deviation sigmas[0], or a little more (see
            `DiffusionModel`).
        sigmas: noise levels, falling; the last is 0 or what noise is to be left.
        eta: share of the ancestral noise, in [0, 1]; ddim only.
        noise: drawn for each step; needed where eta > 0.
        clip, keeps_noise: as in `Stepper`; not with heun, whose denoiser is to be `clipped`.

    Raises:
        UserError: sigmas do not fall to >= 0, eta without noise, or with another solver.
    """
    levels = checked_sigmas(sigmas)
    _check_eta(solver, eta, noise)
    stepper = None
    if solver != "heun":
        options: Any = {"clip": clip, "keeps_noise": keeps_noise, "steps": len(levels) - 1}
        stepper = Stepper(solver, eta=eta, noise=noise, **options)
    for sigma, following in level_pairs(levels, x):
        level = sigma.expand(len(x))
        denoised = denoiser(x, level, condition)
        if stepper is not None:
            x = stepper.update(x, denoised, sigma, following)
        elif following == 0:
            x = denoised
        else:
            slope, level_there = eps_of(x, denoised, level), following.expand(len(x))
            ahead = x + (following - sigma) * slope
            slope_there = eps_of(ahead, denoiser(ahead, level_there, condition), level_there)
            x = x + (following - sigma) * (slope + slope_there) / 2
    return x


class Stepper:
    """The steps of a solver that asks the denoiser once a step, for loops that ask it their own way.

    One object is one path: it counts its steps, and remembers what the next one needs of the last.

    Args:
        solver: ddim, euler or dpmpp_2m; see `solve`.
        eta: share of the ancestral noise, in [0, 1]; ddim only.
        noise: drawn for each step; needed where eta > 0.
        clip: bound of a clean sample's components, to which estimates are clipped; None: there is none.
        keeps_noise: whether ddim without noise of its own takes the noise that the estimate implied
            before it was clipped, as DDIM in diffusers does; else what follows from the clipped one,
            as in DDPM.
        steps: of the path; of fewer than 15 the last of dpmpp_2m is of first order, as in diffusers
            (lower_order_final). None: it need not know.

    Raises:
        UserError: heun, which asks twice a step; eta without noise, or with another solver.
    """

    def __init__(
        self,
        solver: Solver = "ddim",
        *,
        eta: float = 0.0,
        noise: Noise | None = None,
        clip: float | None = None,
        keeps_noise: bool = False,
        steps: int | None = None,
    ):
        _check_eta(solver, eta, noise)
        if solver not in ("ddim", "euler", "dpmpp_2m"):
            raise UserError(
                f"the solver must ask the denoiser once a step: ddim, euler or dpmpp_2m, got {solver}"
            )
        self.solver, self.eta, self.noise, self.clip = solver, eta, noise, clip
        self._keeps_noise = keeps_noise and solver == "ddim" and eta == 0
        self._last = steps - 1 if steps is not None and steps < FEW else None
        self.steps_done = 0
        self._before: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        x: Float[Tensor, "b *d"],
        denoised: Float[Tensor, "b *d"],
        sigma: Float[Tensor, ""],
        next_sigma: Float[Tensor, ""],
    ) -> Float[Tensor, "b *d"]:
        """What x is at the next noise level, from the denoised estimate at this one."""
        step, self.steps_done = self.steps_done, self.steps_done + 1
        told = denoised
        if self.clip is not None:
            denoised = denoised.clamp(-self.clip, self.clip)
        before, self._before = self._before, (denoised, sigma)
        if next_sigma == 0:
            return denoised
        if self.eta > 0:
            assert self.noise is not None
            levels = sigma.expand(len(x)), next_sigma.expand(len(x))
            mean, std = reverse_kernel(x, denoised, *levels, self.eta)
            return mean + over(std, x) * self.noise(step)
        if self.solver == "dpmpp_2m" and before is not None and step != self._last:
            return multistep(x, denoised, *before, sigma, next_sigma)
        noisy = x - (told if self._keeps_noise else denoised)
        return denoised + (next_sigma / sigma) * noisy


def ancestral(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Sequence[float] | Float[Tensor, "k"],
    condition: Condition = None,
    *,
    eta: float,
    noise: Noise,
    reduction: Literal["sum", "mean"] = "sum",
    logp_from: int = 0,
) -> Chain:
    """All of a path by the stochastic reverse kernel, with the log-probability of each step.

    The last step, to noise level 0, is no draw and has log-probability 0.

    Args:
        eta: in (0, 1].
        reduction: log-probabilities added up, or averaged, over a sample's components.
        logp_from: steps before this one, counted from 0, are not scored: log-probability 0.

    Raises:
        UserError: sigmas do not fall, or eta is not in (0, 1].
    """
    levels = checked_sigmas(sigmas)
    require("eta", eta, 0 < eta <= 1, "in (0, 1]: without noise a step has no density")
    path, logp = [x], []
    for step, (sigma, following) in enumerate(level_pairs(levels, x)):
        level = sigma.expand(len(x))
        denoised = denoiser(x, level, condition)
        mean, std = reverse_kernel(x, denoised, level, following.expand(len(x)), eta)
        drawn = following > 0
        x = mean + over(std, x) * noise(step) if drawn else mean
        scored = drawn and step >= logp_from
        told = gaussian_log_prob(x, mean, std, reduction) if scored else None
        logp.append(x.new_zeros(len(x)) if told is None else told)
        path.append(x)
    return Chain(x=torch.stack(path), sigma=levels.to(x), logp=torch.stack(logp))


def seeded_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "b *d"], Noise]:
    """Standard normal noise to begin with, and of every step: a sample's from its own seed alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(step: int) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)

    return draw(-1), draw


def checked_sigmas(sigmas: Sequence[float] | Tensor) -> Float[Tensor, "k"]:
    """As a tensor in float64.

    Raises:
        UserError: fewer than two, not falling, or below 0.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if len(levels) < 2 or not bool((levels[1:] < levels[:-1]).all()) or float(levels[-1]) < 0:
        raise UserError(
            f"sigmas must be at least two levels that fall to 0 or above, got {levels.tolist()}"
        )
    return levels


def level_pairs(
    levels: Float[Tensor, "k"], x: Float[Tensor, "b *d"]
) -> Iterator[tuple[Float[Tensor, ""], Float[Tensor, ""]]]:
    """Each noise level with the next, as x has its numbers."""
    values = levels.to(x)
    return zip(values[:-1], values[1:], strict=True)


def _check_eta(solver: Solver, eta: float, noise: Noise | None) -> None:
    require("eta", eta, 0 <= eta <= 1, "in [0, 1]")
    if eta > 0 and (noise is None or solver != "ddim"):
        raise UserError("eta > 0 needs noise, and the solver ddim: the others follow an equation")
