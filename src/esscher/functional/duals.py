"""Losses for dual variables kept positive by optimising their logarithm.

Minimising a term ascends the dual: the multiplier grows while its constraint is violated. The
two forms have the same sign and the same fixed point and differ in speed: "paper" multiplies
the step in log space by the multiplier itself, so a small multiplier recovers slowly; "log"
moves at a rate that does not depend on it.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor


def multiplier_terms(
    log_multiplier: Float[Tensor, "*#s"],
    cost: Float[Tensor, "*s"],
    threshold: float | Float[Tensor, "*#s"],
    form: Literal["log", "paper"] = "paper",
) -> Float[Tensor, "*s"]:
    """Dual loss of the constraint E[cost] <= threshold; the multiplier rises when cost exceeds it.

    "paper": -exp(log_multiplier) (cost - threshold); "log": -log_multiplier (cost - threshold).
    For a reward that must reach a level pass cost = -reward and threshold = -level.

    Source: Lagrangian duality; Boyd and Vandenberghe, Convex Optimization, sec. 5.1.
    Gradient: to log_multiplier only.
    Raises: ValueError if form is neither "log" nor "paper".
    """
    if form not in ("log", "paper"):
        raise ValueError(f'form must be "log" or "paper", got {form!r}')
    dual = log_multiplier if form == "log" else log_multiplier.exp()
    return -dual * (cost.detach() - threshold)


def temperature_terms(
    log_alpha: Float[Tensor, "*#s"],
    logp: Float[Tensor, "*s"],
    target_entropy: float,
    form: Literal["log", "paper"] = "log",
) -> Float[Tensor, "*s"]:
    """SAC temperature loss; the temperature rises while entropy is below its target.

    "paper": J = -alpha (logp + target_entropy); "log": J = -log_alpha (logp + target_entropy),
    as in the official code. logp in nats of actions in (-1, 1); usual target: -dim(action).

    Source: Haarnoja et al. 2018 (arXiv 1812.05905), eq. 18.
    Gradient: to log_alpha only.
    Raises: ValueError if form is neither "log" nor "paper".
    """
    # Entropy E[-logp] >= target is the inequality E[logp] <= -target.
    return multiplier_terms(log_alpha, logp, -target_entropy, form)
