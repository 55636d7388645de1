"""What can be asked of a return besides its mean: utilities of stock plus return, and tail means.

The stock c is an extra state variable with c' = (c + r) / discount, so that with G_t the return
from step t on, c_0 + G_0 = discount^t (c_t + G_t): what was earned so far, in today's units. A
utility f then judges c + G at every step alike, if only its order survives the factor discount^t:
for every discount where f is positively homogeneous (f(y x) = y^p f(x), y > 0), for discount 1
always.

  utility      f(x)                        degree  wanted
  mean         x                           1       the largest expected return
  target       -|x|                        1       a return of g, from the stock -g
  shortfall    min(x, 0)                   1       CVaR of the worst share, from the best stock
  excess       max(x, 0)                   1       CVaR of the best share, likewise
  homeostasis  -||x||                      1       a vector of stocks near 0
  exponential  (1 - exp(-a x)) / a         none    risk aversion a, with discount 1 only
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Tail = Literal["lower", "upper"]


@dataclass(frozen=True, kw_only=True)
class Utility:
    """A function f of stock plus return whose expectation is maximised.

    `degree` is the p of f(y x) = y^p f(x) for all y > 0; None where there is no such p. A vector
    utility maps "... d" to "...", the others work entry by entry. Two records are equal if their
    names are.
    """

    name: str
    function: Callable[[Tensor], Tensor] = field(compare=False)
    degree: float | None
    vector: bool = False

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """F(x), in the utility's own unit."""
        return self.function(x)


MEAN = Utility(name="mean", function=lambda x: x, degree=1.0)
TARGET = Utility(name="target", function=lambda x: -x.abs(), degree=1.0)
SHORTFALL = Utility(name="shortfall", function=lambda x: x.clamp(max=0.0), degree=1.0)
EXCESS = Utility(name="excess", function=lambda x: x.clamp(min=0.0), degree=1.0)
HOMEOSTASIS = Utility(
    name="homeostasis",
    function=lambda x: -torch.linalg.vector_norm(x, dim=-1),
    degree=1.0,
    vector=True,
)


def exponential(aversion: float) -> Utility:
    """(1 - exp(-a x)) / a: averse to risk for a > 0, fond of it for a < 0, the mean as a -> 0.

    Raises: ValueError if `aversion` is zero.
    """
    if aversion == 0:
        raise ValueError("aversion must not be 0: that is the mean")
    return Utility(
        name=f"exponential({aversion:g})",
        function=lambda x: -torch.expm1(-aversion * x) / aversion,
        degree=None,
    )


def homogeneity_gap(
    utility: Utility, x: Float[Tensor, "..."], scale: Float[Tensor, "*s"]
) -> Float[Tensor, ""]:
    """Largest |f(y x) - y^p f(x)| over the scales y: zero, up to rounding, if the degree is right.

    Raises: ValueError if the utility states no degree.
    """
    if utility.degree is None:
        raise ValueError(f"{utility.name} states no degree of homogeneity")
    gaps = [utility(y * x) - y.pow(utility.degree) * utility(x) for y in scale.flatten()]
    return torch.stack(gaps).abs().max()


def check_discount(utility: Utility, discount: float) -> None:
    """Refuse a discount under which the order of the utility's values would change with time.

    Raises: ValueError if discount is outside (0, 1], or below 1 without a degree of homogeneity.
    """
    if not 0 < discount <= 1:
        raise ValueError(f"discount must be in (0, 1], got {discount}")
    if discount < 1 and utility.degree is None:
        raise ValueError(
            f"{utility.name} is not positively homogeneous, so what is best would depend on the "
            f"step: discount must be 1, got {discount}"
        )


def next_stock(
    stock: Float[Tensor, "*s"], reward: Float[Tensor, "*s"], discount: float
) -> Float[Tensor, "*s"]:
    """C' = (c + r) / discount: divided after the reward was added.

    Source: Pires et al. 2025 (arXiv 2501.13028), stock augmentation (from memory, re-derived).
    Gradient: to both.
    """
    return (stock + reward) / discount


def edited_stock(
    stock: Float[Tensor, "*s"],
    start: Float[Tensor, "*s"],
    new_start: Float[Tensor, "*s"],
    time: Float[Tensor, "*s"],
    discount: float,
) -> Float[Tensor, "*s"]:
    """The stock at step `time` had the episode begun with `new_start` instead of `start`.

    c_t + discount^-t (new_start - start): rewards and moves of the task do not depend on stocks.

    Source: the stock rule, unrolled. Gradient: to all but time.
    """
    return stock + (new_start - start) * torch.pow(discount, -time)


def expected_utility(
    utility: Utility,
    stock: Float[Tensor, "*#s"],
    atoms: Float[Tensor, "*s k"],
    weights: Float[Tensor, "*#s k"],
) -> Float[Tensor, "*s"]:
    """E f(c + G) for G at `atoms` with probabilities `weights`; scalar utilities.

    Gradient: to all.
    Raises: ValueError for a vector utility.
    """
    if utility.vector:
        raise ValueError(f"{utility.name} judges vectors: apply it to stock + atoms directly")
    return (weights * utility(stock.unsqueeze(-1) + atoms)).sum(-1)


def cvar(
    atoms: Float[Tensor, "*s k"],
    weights: Float[Tensor, "*#s k"],
    level: float,
    tail: Tail = "lower",
) -> Float[Tensor, "*s"]:
    """Mean of the worst (lower) or best (upper) share `level` of a distribution of atoms.

    The atom at the boundary counts with as much of its weight as is needed. Weights are >= 0 and
    sum to 1 along the last axis. Level 1 is the mean.

    Source: Rockafellar and Uryasev 2000. Gradient: to atoms and weights, almost everywhere.
    Raises: ValueError if level is outside (0, 1].
    """
    _check_level(level)
    if tail == "upper":
        return -cvar(-atoms, weights, level)
    atoms, order = atoms.sort(-1)
    weights = weights.expand_as(atoms).gather(-1, order)
    before = weights.cumsum(-1) - weights
    share = torch.minimum((level - before).clamp(min=0.0), weights)
    return (share * atoms).sum(-1) / level


def cvar_objective(
    stock: Float[Tensor, "*s"], value: Float[Tensor, "*s"], level: float
) -> Float[Tensor, "*s"]:
    """-c + value / level, whose optimum over stocks c is the CVaR.

    With value(c) = E min(c + G, 0) the maximum is the lower CVaR of G, attained at minus its
    quantile of that level; with E max(c + G, 0) the minimum is the upper one.

    Source: Rockafellar and Uryasev 2000, in the signs of returns. Gradient: to stock and value.
    Raises: ValueError if level is outside (0, 1].
    """
    _check_level(level)
    return value / level - stock


def _check_level(level: float) -> None:
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], got {level}")
