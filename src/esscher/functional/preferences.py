"""Losses on pairs of answers, the implicit rewards inside them, and the optimum they aim at.

log_ratio = log pi - log pi_ref in nats, summed over the tokens of one answer to one prompt, and
u = pi / pi_ref, so that D_f(pi || pi_ref) = E_ref[f(u)] in the names of divergences.py: DPO is
generator kl, "forward KL" is reverse_kl, and f-DPO's alpha is alpha(a) (in TRL from 0.29 on 1 - a).

Losses without a reference (GenARM: beta_r (logp_w - logp_l) - gamma) hand `bradley_terry_terms`
their own margin.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from esscher.functional.divergences import FDivergence

INFINITY = float("inf")
MAX_EXPONENT = 80.0
"""Nats; exp(80) is 5.5e34, and the largest float32 is exp(88.7)."""
POWERS = {"reverse_kl": 1.0, "neyman_chi2": 2.0, "squared_hellinger": 0.5}
"""c of f'(u) ~ -u^-c as u -> 0; a for alpha(a), none for kl and js, which fall as log u."""


def implicit_score(log_ratio: Float[Tensor, "*s"], f: FDivergence) -> Float[Tensor, "*s"]:
    """Reward over beta that a policy implies, up to a constant per prompt; float32 or better.

    r(y) = beta f'(u) + const holds at the optimum of E[r] - beta D_f(pi || pi_ref) if f' can be
    inverted and never reaches a value at u = 0. So f'(0) must be -inf: true of kl, js,
    reverse_kl, alpha(a) with a >= 0, neyman_chi2 (1 - u^-2) and squared_hellinger (1 - u^-1/2),
    not of pearson_chi2 (-2), alpha(a) with a < 0 (1 / a) and total_variation (-1/2), whose optimum
    has zeros, or ties, from which no reward can be read back.

    For u^-c in f' the log-ratio is held at -80 / c nats from below, so that nothing overflows in
    float32; kl and js are never held.

    Source: Wang et al. 2023, f-DPO (arXiv 2309.16240), the KKT theorem and table 1.
    Gradient: to log_ratio: u f''(u), zero below -80 / c.
    Raises: ValueError for a generator whose f'(0) is finite.
    """
    if f.domain[0] != -INFINITY:
        raise ValueError(
            f"f must have f'(0) = -inf, or its optimum does not determine the reward; "
            f"{f.name} has f'(0) = {f.domain[0]:g}. Use kl, reverse_kl, js or alpha(a), 0 <= a <= 1"
        )
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    power = float(f.name[6:-1]) if f.name.startswith("alpha(") else POWERS.get(f.name, 0.0)
    return f.df(log_ratio.clamp(min=-MAX_EXPONENT / power) if power > 0 else log_ratio)


def bradley_terry_terms(
    margin: Float[Tensor, "*s"], label: Float[Tensor, "*#s"] | float | None = None
) -> Float[Tensor, "*s"]:
    """Cross-entropy of a preference whose log-odds are the margin.

    -label log sigma(margin) - (1 - label) log sigma(-margin), label = P(the first is preferred),
    by default 1. Label smoothing (conservative DPO) is label = 1 - smoothing.

    Source: Bradley and Terry 1952; Rafailov et al. 2023, DPO (arXiv 2305.18290), eq. 7.
    Gradient: to margin: sigma(margin) - label.
    Raises: ValueError if a number is passed as label and is outside [0, 1].
    """
    if label is None:
        return -logsigmoid(margin)
    if isinstance(label, Tensor):
        label = label.detach()
    elif not 0 <= label <= 1:
        raise ValueError(f"label must be a probability in [0, 1], got {label}")
    return -label * logsigmoid(margin) - (1 - label) * logsigmoid(-margin)


def preference_terms(
    chosen_log_ratio: Float[Tensor, "*s"],
    rejected_log_ratio: Float[Tensor, "*s"],
    f: FDivergence,
    beta: float,
    label: Float[Tensor, "*#s"] | float | None = None,
) -> Float[Tensor, "*s"]:
    """f-DPO: a preference as likely as the two implied rewards make it.

    -log sigma(beta f'(u_chosen) - beta f'(u_rejected)), with a label as in `bradley_terry_terms`.
    Where f' is bounded above (all but kl) so is the margin that one answer can win, by
    beta (f'(inf) - f'(u_rejected)): beta does not compare across generators.

    Source: Wang et al. 2023, f-DPO (arXiv 2309.16240); for kl: DPO (arXiv 2305.18290), eq. 7.
    Gradient: to both log-ratios, as in `implicit_score`.
    Raises: ValueError if beta is not positive, or as its two parts do.
    """
    _check_beta(beta)
    margin = implicit_score(chosen_log_ratio, f) - implicit_score(rejected_log_ratio, f)
    return bradley_terry_terms(beta * margin, label)


@torch.no_grad()
def tilted(
    log_reference: Float[Tensor, "*s k"],
    reward: Float[Tensor, "*s k"],
    f: FDivergence,
    beta: float,
) -> Float[Tensor, "*s k"]:
    """Log-probabilities of the exact optimum of E[r] - beta D_f(pi || pi_ref) over k outcomes.

    pi* = pi_ref (f')^{-1}((r - lambda) / beta), or 0 where the argument is below f'(0); lambda is
    found by bisection on log u of the best outcome. Computed in float64: the relative error is
    below 1e-15 / pi_ref(best), and ratios u below 1e-308 come out as 0. Logits of pi_ref will do;
    -inf in either argument forbids an outcome.

    Source: Wang et al. 2023, f-DPO (arXiv 2309.16240), the KKT theorem.
    Gradient: none.
    Raises: ValueError if beta is not positive, f is total_variation (f' has no inverse), or no
        possible outcome has a finite reward.
    """
    _check_beta(beta)
    if f.name == "total_variation":
        raise ValueError("total_variation has no optimum of this form: its f' has no inverse")
    log_reference = log_reference.double().log_softmax(-1)
    reward = reward.double().masked_fill(log_reference == -INFINITY, -INFINITY)
    best, at = reward.max(-1, keepdim=True)
    if not best.isfinite().all():
        raise ValueError("every row needs an outcome with pi_ref > 0 and a finite reward")
    gap = (best - reward) / beta

    def log_unnormalised(log_u_best: Tensor) -> Tensor:
        return log_reference + f.dconj_positive(f.df(log_u_best) - gap).log()

    # The best u is at least 1, the mean ratio, and its probability at most 1.
    low, high = torch.zeros_like(best), -log_reference.gather(-1, at)
    for _ in range(64):
        middle = (low + high) / 2
        too_low = log_unnormalised(middle).logsumexp(-1, keepdim=True) < 0
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return log_unnormalised((low + high) / 2).log_softmax(-1)


def penalty_terms(log_ratio: Float[Tensor, "*s"], f: FDivergence) -> Float[Tensor, "*s"]:
    """Never negative estimate of D_f(pi || pi_ref) from a token drawn from pi.

    g(k) - g'(1) (k - 1), k = pi_ref / pi. As E_ref[f(u)] = E_pi[k f(1 / k)], g is the swapped
    generator, and E_pi[k - 1] = 0: kl has g = -log k and gives k3 of kl.py, reverse_kl g = k log k,
    js its own g, alpha(a) g = (k^a - a k + a - 1) / (a (a - 1)). Near u = 1, and so small, terms
    carry a rounding error of the size of epsilon, of either sign.

    Source: official code of f-DPO (alecwangcq/f-divergence-dpo, 07d9369), ppo/configs.py.
    Gradient: to log_ratio, -k (g'(k) - g'(1)); as for k3, its mean with x ~ pi fixed is not the
        gradient of the divergence.
    """
    g = f.swapped()
    slope = g.df(torch.zeros_like(log_ratio))
    return g.f(-log_ratio) - slope * torch.expm1(-log_ratio)


def _check_beta(beta: float) -> None:
    if not 0 < beta < INFINITY:
        raise ValueError(f"beta must be positive and finite, got {beta}")
