"""Soft values, Boltzmann policies, and the inverse soft Bellman operator of IQ-Learn.

An inverse temperature lambda (1 / reward) multiplies Q inside the log-sum-exp and divides it
outside: as lambda grows, V tends to max Q, and as it falls, to the mean of Q plus log(k) / lambda.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esscher.functional.divergences import FDivergence, by_name

Phi = Literal[
    "chi2",
    "identity",
    "total_variation",
    "kl",
    "shifted_kl",
    "reverse_kl",
    "js",
    "squared_hellinger",
]
"""Concave functions of a recovered reward, by the generator f whose -f*(-x) they are."""

# Below its number a curve goes on as a straight line: its slope runs to infinity, or overflows.
FLOORS = {"kl": -5.0, "shifted_kl": -4.0, "reverse_kl": 0.1, "js": -0.5, "squared_hellinger": -0.5}


def soft_value(q: Float[Tensor, "*s a"], inverse_temperature: float) -> Float[Tensor, "*s"]:
    """V = (1 / lambda) log sum_a exp(lambda Q(a)), in units of reward.

    Gradient: to q, the Boltzmann probabilities.
    """
    return torch.logsumexp(inverse_temperature * q, -1) / inverse_temperature


def boltzmann_log_probs(
    q: Float[Tensor, "*s a"], inverse_temperature: float
) -> Float[Tensor, "*s a"]:
    """Log pi(a) = lambda (Q(a) - V), nats.

    Gradient: to q.
    """
    return torch.log_softmax(inverse_temperature * q, -1)


def inverse_soft_bellman(
    q: Float[Tensor, "*s"],
    next_value: Float[Tensor, "*s"],
    terminated: Bool[Tensor, "*#s"],
    discount: float,
) -> Float[Tensor, "*s"]:
    """The reward that explains Q: r = Q(s, a) - discount V(s'), and V = 0 where the task ended.

    Source: Garg et al. 2021, IQ-Learn (arXiv 2106.12142), sec. 4.
    Gradient: to both values.
    """
    return q - discount * next_value.masked_fill(terminated, 0.0)


def concave_terms(
    reward: Float[Tensor, "*s"], phi: Phi = "chi2", alpha: float = 1.0
) -> Float[Tensor, "*s"]:
    """phi(x), concave, whose slope phi'(x) is the weight of a step in IQ-Learn's objective.

      chi2              x - x^2 / (4 alpha)
      identity          x
      total_variation   min(x, 1/2)
      kl                -exp(-x - 1)
      shifted_kl        1 - exp(-x)
      reverse_kl        1 + log x
      js                log(2 - exp(-x))
      squared_hellinger x / (1 + x)

    The last five follow their tangent at FLOORS where x is smaller, so that they are defined for
    every x; the total variation's phi is minus infinity below -1/2, where it goes on as x here.

    Source: Garg et al. 2021, IQ-Learn, table of divergences; phi(x) = -f*(-x).
    Gradient: to reward.
    Raises: ValueError for an unknown phi.
    """
    if phi not in get_args(Phi):
        raise ValueError(f"phi must be one of {', '.join(get_args(Phi))}, got {phi!r}")
    if phi == "chi2":
        return reward - reward.square() / (4 * alpha)
    if phi == "identity":
        return reward
    if phi == "total_variation":
        return reward.clamp(max=0.5)
    generator, inside = _generator(phi), reward.clamp(min=FLOORS[phi])
    slope = generator.dconj(-inside).detach()
    return slope * (reward - inside) - generator.conj(-inside)


def concave_weights(
    reward: Float[Tensor, "*s"], phi: Phi = "chi2", alpha: float = 1.0
) -> Float[Tensor, "*s"]:
    """The slope phi'(x) of `concave_terms`, detached.

    Raises: ValueError for an unknown phi.
    """
    x = reward.detach()
    if phi == "chi2":
        return 1 - x / (2 * alpha)
    if phi == "identity":
        return torch.ones_like(x)
    if phi == "total_variation":
        return (x <= 0.5).to(x.dtype)
    if phi not in get_args(Phi):
        raise ValueError(f"phi must be one of {', '.join(get_args(Phi))}, got {phi!r}")
    return _generator(phi).dconj(-x.clamp(min=FLOORS[phi]))


def without_shaping(
    difference: Float[Tensor, "s a"], transition: Float[Tensor, "s a s"], discount: float
) -> Float[Tensor, "s a"]:
    """What no potential explains of the difference of two rewards.

    Rewards r and r + c(s) - discount E[c(s')] have the same optimal (and soft optimal) policies, so
    demonstrations cannot tell them apart: least squares over c, and what it leaves. Zero if and
    only if the rewards agree up to shaping.

    Args:
        difference: of two rewards, states by actions.
        transition: P(t | s, a); a row that sums to less than 1 ends the task with what is missing.
        discount: weight of the next state's potential.

    Gradient: to difference.
    """
    states, actions = difference.shape
    own = torch.eye(states, dtype=transition.dtype, device=transition.device)
    shapings = (own.unsqueeze(1) - discount * transition).reshape(states * actions, states)
    potential = torch.linalg.lstsq(shapings, difference.reshape(-1, 1)).solution
    return difference - (shapings @ potential).reshape(states, actions)


def _generator(phi: str) -> FDivergence:
    return by_name("alpha(0)" if phi == "shifted_kl" else phi)
