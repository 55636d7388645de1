"""Distribution matching: pi towards p = P / Z, where only the unnormalised P >= 0 can be computed.

Everything is a function of log pi, log P, the log-density of the proposal q the samples x came
from, and an estimate of log Z; nats, summed over the tokens of one x, in float32 or better. In the
names of divergences.py with t = pi / p, D_f(pi || p) = E_p[f(t)]: generator kl is KL(pi || p),
which RL with a KL penalty minimises ("RKL"); reverse_kl is KL(p || pi), the objective of GDC and
DPG ("KL"); js is twice the half-weighted Jensen-Shannon divergence; neyman_chi2 is the official
code's "chi2", pearson_chi2 its "reverse chi2".

No function here but `fit_tilt` waits for the device.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from esscher.functional.divergences import (
    FDivergence,
    divergence_terms,
    js,
    kl,
    reverse_kl,
    total_variation,
)

INFINITY = float("inf")


@torch.no_grad()
def log_density_ratio(
    logp: Float[Tensor, "*s"],
    log_target: Float[Tensor, "*s"],
    log_partition: Float[Tensor, "*#s"] | float,
) -> Float[Tensor, "*s"]:
    """Log t = log pi - (log P - log Z), +inf where P = 0 (also while the estimate of Z is 0).

    Source: Go et al. 2023, f-DPG (arXiv 2302.08215).
    Gradient: none.
    """
    return (logp - log_target + log_partition).masked_fill(log_target == -INFINITY, INFINITY)


@torch.no_grad()
def pseudo_reward(log_ratio: Float[Tensor, "*s"], f: FDivergence) -> Float[Tensor, "*s"]:
    """The reward whose policy gradient descends D_f(pi || p), though it changes with pi.

    r = -f'(t) at log t, since grad D_f(pi || p) = E_pi[f'(t) grad log pi]. Where p = 0 it is
    -f'(inf): 0 for reverse_kl, -1/2 for total_variation, -log 2 for js, -1 for neyman_chi2, and
    -inf for kl and pearson_chi2 (ask `finite_at_zero_target`). A constant in f' is a baseline.
    Far below p it is p / pi for reverse_kl and (p / pi)^2 for neyman_chi2, which leave float32 at
    log t = -88 and -44: with q = pi the running Z keeps p / pi below the number of samples.

    Source: Go et al. 2023, f-DPG (arXiv 2302.08215), theorem 1.
    Gradient: none.
    """
    return -f.df(log_ratio)


def finite_at_zero_target(f: FDivergence) -> bool:
    """Whether `pseudo_reward` is finite where p = 0: whether f'(inf) is.

    If not, 0 * inf is NaN in `matching_terms`: refuse targets with hard constraints, or give them
    a floor P >= epsilon.
    """
    return math.isfinite(f.domain[1])


def matching_terms(
    logp: Float[Tensor, "*s"], advantage: Float[Tensor, "*s"], log_weight: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """f-DPG's loss per sample x ~ q, to be minimised.

    -rho A log pi, rho = pi / q = exp(log_weight) (1 on policy), A = pseudo-reward - baseline. The
    baseline must not depend on x: a mean over earlier samples, before it takes these in.

    Source: Go et al. 2023, f-DPG (arXiv 2302.08215).
    Gradient: to logp only.
    """
    return -log_weight.detach().exp() * advantage.detach() * logp


@torch.no_grad()
def log_partition_update(
    log_mean: Float[Tensor, "*s"],
    count: Num[Tensor, "*s"],
    log_weight: Float[Tensor, "*s n"],
    valid: Bool[Tensor, "*s n"] | None = None,
) -> tuple[Float[Tensor, "*s"], Num[Tensor, "*s"]]:
    """Log of the mean of P / q over all samples so far, and their number, after n more; from 0, 0.

    Z' = (count Z + sum_n exp(log_weight_n)) / (count + n), log_weight = log P - log q. Unbiased as
    E_q[P / q] = Z, and -inf until P > 0 for the first time. With q = pi it falls short once pi has
    left a part of p: keep the early samples, or draw some from a fixed q. Samples that are not valid
    are as if they had not been drawn.

    Source: Go et al. 2023, f-DPG (arXiv 2302.08215).
    Gradient: none.
    """
    seen = count.to(log_mean.dtype).log()
    # Without samples the mean so far may be any number.
    before = log_mean.masked_fill(count == 0, -INFINITY) + seen
    if valid is None:
        valid = torch.ones_like(log_weight, dtype=torch.bool)
    log_weight, total = log_weight.masked_fill(~valid, -INFINITY), count + valid.sum(-1)
    log_total = total.clamp(min=1).to(log_mean.dtype).log()
    return torch.logaddexp(before, log_weight.logsumexp(-1)) - log_total, total


class DivergenceEstimates(NamedTuple):
    """Divergences between policy and target in nats, and the features' means under the policy."""

    kl_policy_target: Float[Tensor, ""]
    kl_target_policy: Float[Tensor, ""]
    total_variation: Float[Tensor, ""]
    jensen_shannon: Float[Tensor, ""]
    moments: Float[Tensor, "k"]


@torch.no_grad()
def divergence_estimates(
    logp: Float[Tensor, "n"],
    log_target: Float[Tensor, "n"],
    log_proposal: Float[Tensor, "n"],
    log_partition: Float[Tensor, ""] | float,
    features: Float[Tensor, "n k"] | None = None,
    weight: Float[Tensor, "n"] | None = None,
) -> DivergenceEstimates:
    """All divergences by importance sampling from x ~ q, whichever is trained; float64.

    Means of `divergence_terms`, where Jensen-Shannon has half weights, as metrics do; moments are
    E_q[(pi / q) phi]. KL(pi || p) is inf as soon as one sample has P = 0 < pi. `weight`, which adds
    up to 1, is what samples count in these means, by default all alike; one of 0 does not count.

    Source: Go et al. 2023, f-DPG (arXiv 2302.08215).
    Gradient: none.
    """
    policy = logp.double() - log_proposal
    target = log_target.double() - log_partition - log_proposal
    if features is None:
        features = policy.new_zeros(len(policy), 0)
    if weight is None:
        weight = torch.full_like(policy, 1 / max(len(policy), 1))
    weight = weight.double()

    def mean(f: FDivergence) -> Tensor:
        return weight @ divergence_terms(policy, target, f).masked_fill(weight == 0, 0.0)

    return DivergenceEstimates(
        kl_policy_target=mean(kl()),
        kl_target_policy=mean(reverse_kl()),
        total_variation=mean(total_variation()),
        jensen_shannon=0.5 * mean(js()),
        moments=(weight * policy.exp()) @ features.double(),
    )


@torch.no_grad()
def fit_tilt(
    log_weight: Float[Tensor, "*g n"],
    features: Float[Tensor, "*g n k"],
    moments: Float[Tensor, "k"],
    *,
    tolerance: float = 1e-8,
    max_steps: int = 100,
) -> Float[Tensor, "k"]:
    """The lambda for which p = a exp(lambda . phi) / Z has the given moments of phi.

    Over x ~ q with log_weight = log a - log q, w = exp(log_weight + lambda . phi), self-normalised:
    m(lambda) = sum w phi / sum w. Minimises the convex dual log sum w - lambda . moments by
    Newton's method in float64 until max |m - moments| <= tolerance. With groups g (prompts), each
    is normalised by itself, and m is the mean over the groups; groups without weight are left out.

    Source: Khalifa et al. 2021, GDC (arXiv 2012.11635).
    Gradient: none.
    Raises: ValueError naming the feature that is constant over the samples (never seen), or whose
        moment is not inside of its range; or if moments that each are cannot be had together.
    """
    log_weight = log_weight.flatten(0, -2).double() if log_weight.dim() > 1 else log_weight[None]
    seen = features.reshape(*log_weight.shape, -1).double()
    possible = log_weight > -INFINITY
    log_weight, seen, possible = (x[possible.any(-1)] for x in (log_weight, seen, possible))
    seen = seen.masked_fill(~possible.unsqueeze(-1), 0.0)
    finite = log_weight[possible].isfinite().all() and seen.isfinite().all()
    if len(seen) == 0 or not finite:
        raise ValueError("fit_tilt needs samples with a > 0, finite weights and finite features")
    beyond = torch.full_like(seen, INFINITY).masked_fill_(possible.unsqueeze(-1), 0.0)
    low, high = (seen + beyond).amin(1).mean(0), (seen - beyond).amax(1).mean(0)
    for index, moment in enumerate(moments.tolist()):
        least, most = low[index].item(), high[index].item()
        if least == most:
            raise ValueError(f"feature {index} is {least:g} in every sample: draw more, or drop it")
        if not least < moment < most:
            raise ValueError(
                f"moments[{index}] must be inside of its feature's range over the samples, "
                f"({least:g}, {most:g}), got {moment:g}"
            )
    scale = high - low
    centred, tilt = (seen - moments.double()) / scale, torch.zeros_like(scale)

    def dual(tilt: Tensor) -> Tensor:
        return (log_weight + centred @ tilt).logsumexp(-1).mean()

    error = scale
    for _ in range(max_steps + 1):
        weight = (log_weight + centred @ tilt).softmax(-1).unsqueeze(-1)
        means = (weight * centred).sum(1)
        slope = means.mean(0)
        error = slope * scale
        if error.abs().max() <= tolerance:
            return (tilt / scale).to(features.dtype)
        spread = centred - means.unsqueeze(1)
        curvature = (weight * spread).flatten(0, 1).T @ spread.flatten(0, 1) / len(means)
        curvature.diagonal().add_(1e-12)  # for features that depend on one another
        step, length = torch.linalg.solve(curvature, slope), 1.0
        ceiling = dual(tilt) + 1e-14
        while dual(tilt - length * step) > ceiling and length > 1e-10:
            length /= 2
        tilt = tilt - length * step
    worst = int(error.abs().argmax())
    raise ValueError(
        f"no tilt gives these moments: after {max_steps} steps that of feature {worst} is off by "
        f"{error[worst].item():g}; do they contradict one another, or is tolerance too small?"
    )
