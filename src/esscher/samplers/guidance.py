"""Adaptive Guidance: classifier-free guidance for as long as it changes anything, sample by sample.

Guidance asks the network twice a step, eps = eps_u + s (eps_c - eps_u). Late in sampling the two
answers point the same way, and the conditional one alone will do. How a step is taken:

| step | eps | evaluations |
|---|---|---|
| "guided", or a scale of its own | eps_u + s (eps_c - eps_u) | 2 |
| "linear" | the same, eps_u estimated from the path so far (LinearAG) | 1 |
| "conditional" | eps_c | 1 |
| "unconditional" | eps_u | 1 |

Steps in advance, for all samples, are a policy (`full`, `cut_off`, `interleaved`, `linear_guidance`,
or one that was searched for); the threshold then takes samples out of it one by one, for good.
In the library's coordinates eps = (x - denoised) / sigma whatever the network predicts. The cosine is
not the same for denoised estimates, so thresholds are only comparable for eps.

Source: Castillo et al. 2023, Adaptive Guidance (arXiv 2312.12487).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from esscher.errors import UserError, require
from esscher.functional.diffusion import eps_of, guided_estimate, over
from esscher.samplers.denoisers import (
    Condition,
    Denoiser,
    both,
    classifier_free,
    expanded,
    rows_of,
)
from esscher.samplers.solvers import Noise, Solver, Stepper, checked_sigmas, level_pairs, solve

Step = Literal["guided", "linear", "conditional", "unconditional"] | float
Policy = Sequence[Step]
ONE_ANSWER = ("linear", "conditional", "unconditional")
"""Steps that ask the network once."""
NO_SIGNAL = 1_000.0
"""Noise level, in standard deviations of the signal, from which a cosine of answers is 1 to 1e-6."""
Distance = Callable[[Tensor, Tensor], Tensor]
"""(samples "b *d", what they should be "b *d") -> a distance for each, "b"; differentiable."""


@dataclass(frozen=True, kw_only=True)
class Guided:
    """Samples, and what they took."""

    x: Float[Tensor, "b *d"]
    evaluations: Int[Tensor, "b"]
    """How often the network was asked about each sample."""
    cosine: Float[Tensor, "k b"]
    """Of the conditional and unconditional eps at each step; NaN unless both were asked for."""
    guided: Bool[Tensor, "k b"]
    """Whether the step was guided, by an unconditional eps that was asked for or estimated."""


@dataclass(frozen=True, kw_only=True)
class LinearGuidance:
    """A regression of the unconditional eps of a step on the path so far, one number a path entry.

    eps_u,i = sum_{j <= i} conditional[i, j] eps_c,j + sum_{j < i} unconditional[i, j] eps_u,j
              + intercept[i]

    It belongs to one model, which it cannot recognise, and to the settings that it holds.
    """

    conditional: Float[Tensor, "k k"]
    unconditional: Float[Tensor, "k k"]
    intercept: Float[Tensor, "k"]
    unexplained: Float[Tensor, "k"]
    """Share of the sum of squares of eps_u that the regression left over at each step, in [0, 1]."""
    sigmas: Float[Tensor, "levels"]
    scale: float
    solver: Solver
    null: Condition
    """One row."""

    def estimate(
        self, conditional: Sequence[Tensor], unconditional: Sequence[Tensor]
    ) -> Float[Tensor, "b *d"]:
        """The unconditional eps of a step, from the conditional ones up to it and the unconditional
        ones before it, each "b *d"; estimates of earlier steps may stand for the latter.
        """
        step = len(unconditional)
        weights = self.conditional[step, : step + 1].tolist() + self.unconditional[step].tolist()
        total = torch.full_like(conditional[0], float(self.intercept[step]))
        for weight, entry in zip(weights, [*conditional, *unconditional], strict=False):
            total = total + weight * entry
        return total

    def check(
        self, sigmas: Float[Tensor, "k"], scale: float, solver: Solver, null: Condition
    ) -> None:
        """Refuse other settings than those of the fit.

        Raises:
            UserError: naming what differs.
        """
        if len(sigmas) != len(self.sigmas) or not torch.allclose(sigmas, self.sigmas, rtol=1e-6):
            raise UserError(
                f"the linear guidance was fitted on the noise levels {_short(self.sigmas)}, not on "
                f"{_short(sigmas)}: fit it again, for it holds for one schedule only"
            )
        for name, fitted, asked in (("scale", self.scale, scale), ("solver", self.solver, solver)):
            if fitted != asked:
                raise UserError(
                    f"the linear guidance was fitted with {name} {fitted}, not {asked}: fit it again"
                )
        if not _same_rows(self.null, null):
            raise UserError(
                "the linear guidance was fitted with another null condition: it has no way to follow "
                "a negative one; fit it again, or use adaptive guidance without it"
            )


@dataclass(frozen=True, kw_only=True)
class PolicySearch:
    """What a search over policies found."""

    options: tuple[Step, ...]
    probabilities: Float[Tensor, "k o"]
    """Of each option at each step."""
    distance: Float[Tensor, "n"]
    """To full guidance, in each iteration, of the mixture of all options."""
    expected_evaluations: Float[Tensor, "n"]
    """Of one sample, in each iteration."""

    def best(self) -> tuple[Step, ...]:
        """The likeliest option at each step."""
        return tuple(self.options[option] for option in self.probabilities.argmax(-1).tolist())


# ---- policies


def full(steps: int) -> tuple[Step, ...]:
    """Guidance at every step."""
    return ("guided",) * steps


def cut_off(steps: int, guided: int) -> tuple[Step, ...]:
    """Guidance in the first `guided` steps, and the conditional model alone after them.

    Raises: UserError if guided is not in [0, steps].
    """
    require("guided", guided, 0 <= guided <= steps, f"in [0, {steps}]")
    return ("guided",) * guided + ("conditional",) * (steps - guided)


def interleaved(
    steps: int, until: int | None = None, between: Step = "conditional"
) -> tuple[Step, ...]:
    """Guidance at every other step, from the first on, and `between` at the others; after `until`
    steps (None: all) the conditional model alone.

    Raises: UserError if until is not in [0, steps].
    """
    until = steps if until is None else until
    require("until", until, 0 <= until <= steps, f"in [0, {steps}]")
    alternating: tuple[Step, ...] = ("guided", between) * ((until + 1) // 2)
    return alternating[:until] + ("conditional",) * (steps - until)


def linear_guidance(steps: int) -> tuple[Step, ...]:
    """LinearAG: the first half alternates true and estimated guidance, the second has none.

    Source: Castillo et al. 2023; 25 evaluations for 20 steps.
    """
    return interleaved(steps, steps // 2, "linear")


def evaluations_of(policy: Policy) -> int:
    """How often a policy asks the network about one sample."""
    return sum(1 if step in ONE_ANSWER else 2 for step in policy)


# ---- sampling


def cosine(
    conditional: Float[Tensor, "b *d"], unconditional: Float[Tensor, "b *d"]
) -> Float[Tensor, "b"]:
    """<c, u> / (|c| |u|) of each sample over all its components, in [-1, 1]; 0 if one of them is 0.

    Source: Castillo et al. 2023, the similarity gamma of its adaptive policy.
    Gradient: to both.
    """
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    c, u = conditional.flatten(1).to(dtype), unconditional.flatten(1).to(dtype)
    norms = (c.square().sum(-1).sqrt() * u.square().sum(-1).sqrt()).clamp(
        min=torch.finfo(dtype).tiny
    )
    return ((c * u).sum(-1) / norms).clamp(-1, 1)


def least_guided(
    sigmas: Float[Tensor, "k"],
    asked: int | None,
    threshold: float | None,
    guided_at_crossing: bool = True,
) -> int:
    """Steps of the policy that a sample makes before it may leave.

    At a level without signal (terminal signal-to-noise ratio 0, or a flow's beginning) both answers are
    the noise that is there, and their cosine is 1 whatever the network says: none leaves there.

    Args:
        sigmas: falling, and the last one below them.
        asked: None: a quarter of all steps, rounded up, and more where there is no signal.
        threshold, guided_at_crossing: as in `adaptive_solve`.

    Raises:
        UserError: asked is out of its range, or lets samples leave where the cosine says nothing.
    """
    steps = len(sigmas) - 1
    blind = 0 if threshold is None else int((sigmas[:-1] >= NO_SIGNAL).sum())
    needed = min(steps, blind + guided_at_crossing) if blind else 0
    if asked is None:
        return max(needed, math.ceil(steps / 4))
    require("min_guided_steps", asked, 0 <= asked <= steps, f"in [0, {steps}]")
    if asked < needed:
        raise UserError(
            f"min_guided_steps must be >= {needed}, or None, where sampling begins at "
            f"{float(sigmas[0]):,.4g} times as much noise as signal, got {asked}: there the cosine of "
            "both answers is 1, whatever they are"
        )
    return asked


def adaptive_solve(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Sequence[float] | Float[Tensor, "k"],
    condition: Condition,
    null: Condition,
    *,
    scale: float,
    threshold: float | None,
    min_guided_steps: int | None = None,
    guided_at_crossing: bool = True,
    solver: Solver = "ddim",
    eta: float = 0.0,
    noise: Noise | None = None,
    clip: float | None = None,
    keeps_noise: bool = False,
    policy: Policy | None = None,
    linear: LinearGuidance | None = None,
) -> Guided:
    """Samples under guidance that each of them leaves once it makes no difference any more.

    As long as gamma = cos(eps_c, eps_u) < threshold a sample follows the policy; from then on it is
    conditional, for good, at one evaluation a step. Rows that have no use for the unconditional answer
    are not asked about; all others share one call of the denoiser with the conditional rows.

    A cosine is known only where both were asked for, so it is at "guided" steps that samples leave.
    Near pure noise both answers are the noise and the cosine starts high, hence min_guided_steps (see
    `least_guided`), and where that is None nobody leaves whose cosine has not been below the threshold
    first. Thresholds do not carry over from one model to another.

    Args:
        x: noise to begin with, of standard deviation sigmas[0].
        null: one row, or one a sample; what stands for no condition, or is to be avoided.
        scale: s of "guided" and "linear" steps; not 1.
        threshold: in (-1, 1]; None: no sample leaves the policy. The paper's is 0.991.
        min_guided_steps: no sample leaves before it has made so many steps of the policy, in [0, k];
            None: a quarter of all, rounded up, never at a level without signal, and only once its
            cosine has been below the threshold.
        guided_at_crossing: whether a step is guided still at which the cosine reaches the threshold:
            both answers are paid for by then.
        solver: ddim, euler or dpmpp_2m.
        eta, noise: as in `solve`.
        clip, keeps_noise: as in `Stepper`, of the estimate that a step is made by.
        policy: one entry a step; None: `linear_guidance` if `linear` is given, or else `full`.
        linear: estimates the unconditional eps of "linear" steps; fitted for these settings.

    Source: Castillo et al. 2023, Adaptive Guidance (arXiv 2312.12487).
    Gradient: to x and the denoiser, not through the cosine's decisions.

    Raises:
        UserError: an argument out of its range, no null condition, a policy of another length or with
            steps that need what is missing, linear guidance with noise or fitted for other settings.
    """
    levels = checked_sigmas(sigmas)
    steps = len(levels) - 1
    _check_scale("scale", scale)
    if threshold is not None:
        require("threshold", threshold, -1 < threshold <= 1, "in (-1, 1], or None")
    least = least_guided(levels, min_guided_steps, threshold, guided_at_crossing)
    options: Any = {"clip": clip, "keeps_noise": keeps_noise, "steps": len(levels) - 1}
    stepper = Stepper(solver, eta=eta, noise=noise, **options)
    if policy is None:
        policy = full(steps) if linear is None else linear_guidance(steps)
    _check_condition(condition, len(x))
    without = expanded(null, len(x))
    if linear is not None:
        if eta > 0:
            raise UserError(
                f"linear guidance needs a path without noise, got eta {eta}: noise on the way cannot "
                "be foreseen from the path so far; use eta 0, or adaptive guidance alone"
            )
        linear.check(levels, scale, solver, null)
    check_policy(policy, steps, linear)

    last_estimate = max((i for i, step in enumerate(policy) if step == "linear"), default=-1)
    history_c: list[Tensor] = []
    history_u: list[Tensor] = []
    everybody = torch.ones(len(x), dtype=torch.bool, device=x.device)
    guiding, evaluations = everybody, torch.zeros_like(everybody, dtype=torch.long)
    may_leave = everybody if min_guided_steps is not None else ~everybody
    trace, was_guided = [], []
    for place, (sigma, following) in enumerate(level_pairs(levels, x)):
        step, level = policy[place], sigma.expand(len(x))
        compared = guiding & (step not in ONE_ANSWER)
        alone = step == "unconditional"
        asks_c, asks_u = (~guiding, guiding) if alone else (everybody, compared)
        conditional, unconditional = _ask(denoiser, x, level, condition, without, asks_c, asks_u)
        evaluations = evaluations + asks_c.long() + asks_u.long()

        eps_c, eps_u = eps_of(x, conditional, level), eps_of(x, unconditional, level)
        gamma = cosine(eps_c, eps_u).detach().masked_fill(~compared, torch.nan)
        if linear is not None and place <= last_estimate:
            # Rows that have left guidance hold nonsense here, which is never looked at again.
            history_c.append(accurate(eps_c))
            history_u.append(
                accurate(eps_u) if step == "guided" else linear.estimate(history_c, history_u)
            )
            unconditional = (
                x - over(level, x) * history_u[-1].to(x) if step == "linear" else unconditional
            )

        made = place + 1 if guided_at_crossing else place
        leaves = compared & (gamma >= (torch.inf if threshold is None else threshold))
        leaves = leaves & may_leave & (made >= least)
        if threshold is not None:
            may_leave = may_leave | (compared & (gamma < threshold))
        use = guiding & (step != "conditional")
        if not guided_at_crossing:
            use = use & ~leaves
        strength = (0.0 if alone else scale) if isinstance(step, str) else step
        with_guidance = guided_estimate(conditional, unconditional, strength)
        denoised = torch.where(over(use, x), with_guidance, conditional)
        guiding = guiding & ~leaves
        trace.append(gamma)
        was_guided.append(use & (not alone))
        x = stepper.update(x, denoised, sigma, following)
    return Guided(
        x=x, evaluations=evaluations, cosine=torch.stack(trace), guided=torch.stack(was_guided)
    )


# ---- LinearAG


@torch.no_grad()
def fit_linear(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Sequence[float] | Float[Tensor, "k"],
    condition: Condition,
    null: Condition,
    *,
    scale: float,
    solver: Solver = "ddim",
    clip: float | None = None,
    keeps_noise: bool = False,
    intercept: bool = False,
    batch_size: int | None = None,
) -> LinearGuidance:
    """The unconditional eps of every step, regressed on the path before it by ordinary least squares.

    Each component of each path under full guidance is one row of the regression, in float64. One
    triangular factor of the columns c_1, u_1, c_2, u_2 ... serves all steps, for u_i comes after all
    that it is regressed on; so no path is kept. Where columns cannot be told apart in the numbers of
    x, the shortest coefficients are taken.

    Args:
        x: noise to begin with, a path a row; the paper has 200.
        null: one row.
        scale: s; not 1.
        solver: ddim, euler or dpmpp_2m.
        clip, keeps_noise: as in `Stepper`.
        intercept: whether a constant is fitted at each step. The paper's formula has none.
        batch_size: paths at once; None: all.

    Source: Castillo et al. 2023, LinearAG (arXiv 2312.12487).
    Gradient: none.

    Raises:
        UserError: scale 1, a solver that asks twice a step, a null condition of several rows, or fewer
            components in all paths than coefficients.
    """
    levels = checked_sigmas(sigmas)
    steps = len(levels) - 1
    _check_scale("scale", scale)
    _check_condition(condition, len(x))
    if _count(null) != 1:
        raise UserError(
            f"linear guidance is fitted to one null condition, got {_count(null)} rows: give one row"
        )
    columns = 2 * steps + intercept
    require("components of all paths", x.numel(), x.numel() >= columns, f"at least {columns}")
    size = len(x) if batch_size is None else batch_size
    require("batch_size", size, size >= 1, ">= 1")

    factor = torch.zeros(0, columns, dtype=torch.float64)
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        stepper = Stepper(solver, clip=clip, keeps_noise=keeps_noise, steps=len(levels) - 1)
        path = _path(denoiser, x[rows], levels, rows_of(condition, rows), null, scale, stepper)
        if intercept:
            path = torch.cat([torch.ones(len(path), 1, dtype=path.dtype), path], 1)
        factor = torch.linalg.qr(torch.cat([factor, path]), mode="r").R

    return regressed(
        factor,
        intercept=intercept,
        dtype=x.dtype,
        sigmas=levels,
        scale=scale,
        solver=solver,
        null=null,
    )


def regressed(
    factor: Float[Tensor, "r c"],
    *,
    intercept: bool = False,
    dtype: torch.dtype,
    **settings: Any,
) -> LinearGuidance:
    """Least squares of every step, from a triangular factor of the columns (1,) c_1, u_1, c_2, u_2 ...

    Args:
        intercept: whether the first column is that of ones.
        dtype: of the numbers that columns were computed in; what these cannot tell apart has the
            shortest coefficients.
        settings: what the linear guidance is for, see there.
    """
    columns = factor.shape[1]
    steps = (columns - intercept) // 2
    weights_c, weights_u = torch.zeros(2, steps, steps, dtype=torch.float64)
    constants, unexplained = torch.zeros(2, steps, dtype=torch.float64)
    resolution = columns * torch.finfo(accurate(torch.zeros((), dtype=dtype)).dtype).eps
    for step in range(steps):
        known = 2 * step + 1 + intercept
        features, target = factor[:, :known], factor[:, known]
        found = torch.linalg.lstsq(
            features, target.unsqueeze(-1), rcond=resolution, driver="gelsd"
        ).solution.squeeze(-1)
        left = (target - features @ found).square().sum()
        unexplained[step] = left / target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
        if intercept:
            constants[step], found = found[0], found[1:]
        weights_c[step, : step + 1], weights_u[step, :step] = found[0::2], found[1::2]
    return LinearGuidance(
        conditional=weights_c,
        unconditional=weights_u,
        intercept=constants,
        unexplained=unexplained,
        **settings,
    )


def _path(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    condition: Condition,
    null: Condition,
    scale: float,
    stepper: Stepper,
) -> Float[Tensor, "n c"]:
    """Of paths under full guidance the columns c_1, u_1, c_2, u_2 ..., each component a row."""
    without = expanded(null, len(x))
    everybody = torch.ones(len(x), dtype=torch.bool, device=x.device)
    columns: list[Tensor] = []
    for sigma, following in level_pairs(levels, x):
        level = sigma.expand(len(x))
        asked = _ask(denoiser, x, level, condition, without, everybody, everybody)
        columns += [eps_of(x, answer, level).flatten().cpu().double() for answer in asked]
        conditional, unconditional = asked
        guided = guided_estimate(conditional, unconditional, scale)
        x = stepper.update(x, guided, sigma, following)
    return torch.stack(columns, 1)


# ---- search


def search_policy(
    denoiser: Denoiser,
    x: Float[Tensor, "b *d"],
    sigmas: Sequence[float] | Float[Tensor, "k"],
    condition: Condition,
    null: Condition,
    *,
    scale: float,
    sparsity: float,
    scales: Sequence[float] | None = None,
    solver: Solver = "ddim",
    iterations: int = 200,
    learning_rate: float = 0.1,
    distance: Distance | None = None,
) -> PolicySearch:
    """Which steps need guidance, by gradients through the whole sampler; for small models.

    Every step takes all options at once, weighted by w_i = softmax(alpha_i), and Adam lowers

        distance(x(alpha), x of full guidance) + sparsity sum_i sum_o w_i,o cost_o

    The options are unconditional (cost 1), conditional (1) and guided at each of `scales` (2). Their
    mixture is guidance of scale sum_o w_o s_o, so that two evaluations serve all of them.

    Args:
        denoiser: differentiable; its weights receive no gradient.
        x: noise to begin with, all of it in every iteration.
        scale: of the full guidance that is to be matched; not 1.
        sparsity: what one evaluation costs, in units of the distance, >= 0.
        scales: of the guided options; None: `scale` alone.
        learning_rate: of Adam, on logits that begin at 0.
        distance: None: mean squared error of a sample's components.

    Source: Castillo et al. 2023, the search that motivates its adaptive policy; the distance and the
        form of the relaxation are this library's.

    Raises:
        UserError: an argument out of its range, or no null condition.
    """
    levels = checked_sigmas(sigmas)
    guided = (scale,) if scales is None else tuple(scales)
    _check_scale("scale", scale)
    for option in guided:
        _check_scale("scales", option)
    require("scales", guided, len(guided) >= 1, "at least one")
    require("sparsity", sparsity, 0 <= sparsity < float("inf"), ">= 0")
    require("iterations", iterations, iterations >= 1, ">= 1")
    require("learning_rate", learning_rate, 0 < learning_rate < float("inf"), "> 0")
    _check_condition(condition, len(x))
    Stepper(solver)  # refuses what it cannot do before work starts
    measure = _mean_squared_error if distance is None else distance
    without = expanded(null, len(x))
    options: tuple[Step, ...] = ("unconditional", "conditional", *guided)
    strength = torch.tensor([0.0, 1.0, *guided], device=x.device, dtype=x.dtype)
    cost = torch.tensor([evaluations_of([o]) for o in options], device=x.device, dtype=x.dtype)
    with torch.no_grad():
        wanted = solve(
            classifier_free(denoiser, without, scale), x, levels, condition, solver=solver
        )

    logits = x.new_zeros(len(levels) - 1, len(options), requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=learning_rate)
    everybody = torch.ones(len(x), dtype=torch.bool, device=x.device)
    distances, expected = [], []
    for _ in range(iterations):
        weight = logits.softmax(-1)
        stepper, now = Stepper(solver, steps=len(levels) - 1), x
        for scale_now, (sigma, following) in zip(
            weight @ strength, level_pairs(levels, x), strict=True
        ):
            level = sigma.expand(len(x))
            c, u = _ask(denoiser, now, level, condition, without, everybody, everybody)
            now = stepper.update(now, guided_estimate(c, u, scale_now), sigma, following)
        apart, asked = measure(now, wanted).mean(), (weight @ cost).sum()
        (logits.grad,) = torch.autograd.grad(apart + sparsity * asked, [logits])
        optimiser.step()
        distances.append(apart.detach())
        expected.append(asked.detach())
    return PolicySearch(
        options=options,
        probabilities=logits.detach().softmax(-1),
        distance=torch.stack(distances),
        expected_evaluations=torch.stack(expected),
    )


def _mean_squared_error(x: Tensor, wanted: Tensor) -> Tensor:
    return (x - wanted).square().flatten(1).mean(-1)


# ---- what they share


def _ask(
    denoiser: Denoiser,
    x: Tensor,
    level: Tensor,
    condition: Condition,
    without: Condition,
    asks_c: Tensor,
    asks_u: Tensor,
) -> tuple[Tensor, Tensor]:
    """Denoised estimates with and without the condition, of the rows that ask, in one call; x itself,
    which is an eps of 0, stands in the other rows.
    """
    rows_c, rows_u = asks_c.nonzero().squeeze(-1), asks_u.nonzero().squeeze(-1)
    if len(rows_u) == 0:
        asked = rows_of(condition, rows_c)
    elif len(rows_c) == 0:
        asked = rows_of(without, rows_u)
    else:
        asked = both(rows_of(condition, rows_c), rows_of(without, rows_u))
    rows = torch.cat([rows_c, rows_u])
    told_c, told_u = denoiser(x[rows], level[rows], asked).split([len(rows_c), len(rows_u)])
    return x.index_copy(0, rows_c, told_c), x.index_copy(0, rows_u, told_u)


def accurate(values: Tensor) -> Tensor:
    """Half precision is too coarse to add up a history in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_scale(name: str, scale: float) -> None:
    require(name, scale, math.isfinite(scale), "finite")
    if scale == 1:
        raise UserError(
            f"{name} must not be 1: that is no guidance, and there is nothing to be saved; sample from "
            "the conditional model as it is"
        )


def _check_condition(condition: Condition, count: int) -> None:
    if condition is None:
        raise UserError("guidance needs a condition to guide towards, got None")
    require("x", count, count >= 1, "at least one row")
    rows = _count(condition)
    require("the rows of the condition", rows, rows == count, f"{count}, those of x")


def check_policy(policy: Policy, steps: int, linear: LinearGuidance | None) -> None:
    named = ("guided", *ONE_ANSWER)
    require("policy", len(policy), len(policy) == steps, f"of one entry a step, {steps} in all")
    for place, step in enumerate(policy):
        if isinstance(step, str):
            require(
                f"step {place} of the policy", step, step in named, f"a scale or one of {named}"
            )
        else:
            _check_scale(f"the scale of step {place}", step)
    if ("linear" in policy) != (linear is not None):
        raise UserError(
            "steps of the policy that are linear need a fit, and a fit needs such steps: give both "
            "policy and linear, or neither"
        )
    estimated = [place for place, step in enumerate(policy) if step == "linear"]
    for place in range(estimated[-1] if estimated else 0):
        if policy[place] not in ("guided", "linear", "conditional"):
            raise UserError(
                f"step {place} of the policy is {policy[place]}, before a linear step: the fit knows "
                "paths at one scale whose conditional answer is known; use guided or conditional"
            )


def _count(condition: Condition) -> int:
    """How many rows a condition has."""
    if condition is None:
        raise UserError("guidance needs a null condition: this model has none")
    return len(condition if isinstance(condition, Tensor) else next(iter(condition.values())))


def _same_rows(fitted: Condition, asked: Condition) -> bool:
    """Whether every row of `asked` is the one row of `fitted`."""
    if isinstance(fitted, Tensor) and isinstance(asked, Tensor):
        return fitted.shape[1:] == asked.shape[1:] and bool((asked == fitted.to(asked)).all())
    if fitted is None or asked is None or isinstance(fitted, Tensor) or isinstance(asked, Tensor):
        return False
    return fitted.keys() == asked.keys() and all(
        _same_rows(value, asked[name]) for name, value in fitted.items()
    )


def _short(sigmas: Tensor) -> str:
    return f"{float(sigmas[0]):.4g} .. {float(sigmas[-1]):.4g} ({len(sigmas)})"
