"""Exact answers in small Markov games: marginals over the others, and quantal equilibria.

Axes: g agents, s states, a own actions, k joint actions (all agents' choices as one number, the last
agent's changing fastest: k = A^g), t next states. Every agent has the same number A of actions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.functional.soft_values import boltzmann_log_probs, soft_value


class Equilibrium(NamedTuple):
    """A fixed point of soft best responses."""

    q: Float[Tensor, "g s a"]
    """Marginal critics: own action taken, the others drawn from their policies."""
    value: Float[Tensor, "g s"]
    """Soft values."""
    logp: Float[Tensor, "g s a"]
    """Policies, nats."""
    residual: float
    """Largest distance of q from one more backup."""


def joint_index(action: Int[Tensor, "*s g"], num_actions: int) -> Int[Tensor, "*s"]:
    """All agents' choices as one number."""
    agents = action.shape[-1]
    radix = num_actions ** torch.arange(agents - 1, -1, -1, device=action.device)
    return (action * radix).sum(-1)


def average_over_others(
    joint: Float[Tensor, "*s k"], logp: Float[Tensor, "g *s a"], agent: int
) -> Float[Tensor, "*s a"]:
    """E over the others' independent choices of a quantity of the joint action, by enumeration.

    Gradient: to both.
    Raises: ValueError if k is not A^g.
    """
    agents, actions = logp.shape[0], logp.shape[-1]
    if joint.shape[-1] != actions**agents:
        raise ValueError(f"{agents} agents of {actions} actions need {actions**agents} columns")
    # Own choice first; then the last axis is always that of the last agent still in there.
    rest = joint.unflatten(-1, (actions,) * agents).movedim(agent - agents, -agents)
    for other in reversed([other for other in range(agents) if other != agent]):
        probs = logp[other].exp()
        between = rest.ndim - probs.ndim
        probs = probs.reshape(*probs.shape[:-1], *(1,) * between, actions)
        rest = (rest * probs).sum(-1)
    return rest


def soft_equilibrium(
    expected_next: Callable[[Float[Tensor, "g s"]], Float[Tensor, "g s k"]],
    reward: Float[Tensor, "g s k"],
    num_actions: int,
    discount: float,
    inverse_temperature: float,
    *,
    damping: float = 0.1,
    tolerance: float = 1e-10,
    max_iterations: int = 50_000,
) -> Equilibrium:
    """The logit (quantal) equilibrium: Q <- (1 - damping) Q + damping T Q until T Q = Q.

    (T Q)_i(s, a_i) = E_{a_-i ~ pi_-i}[ R_i(s, a) + discount E[V_i(s')] ], with V and pi of Q.

    Args:
        expected_next: from a value of every state to E[value(s') | s, joint action]; a missing part
            of the probability ends the task.
        reward: of each agent.
        num_actions: of each agent.
        discount: in [0, 1).
        inverse_temperature: lambda > 0.
        damping: in (0, 1]. Without it agents that answer each other may circle for ever.
        tolerance: largest permitted residual.
        max_iterations: backups.

    Gradient: none.
    Raises: ValueError if the iteration does not get there.
    """
    agents, states = reward.shape[:2]
    q = reward.new_zeros(agents, states, num_actions)
    residual = float("inf")
    with torch.no_grad():
        for _ in range(max_iterations):
            logp = boltzmann_log_probs(q, inverse_temperature)
            joint = reward + discount * expected_next(soft_value(q, inverse_temperature))
            backup = torch.stack([average_over_others(joint[i], logp, i) for i in range(agents)])
            residual = float((backup - q).abs().max())
            if math.isnan(residual):
                raise ValueError(
                    "rewards or expected values are not numbers, so there is no equilibrium"
                )
            if residual <= tolerance:
                value = soft_value(q, inverse_temperature)
                return Equilibrium(q, value, logp, residual)
            q = q + damping * (backup - q)
    raise ValueError(
        f"no equilibrium within {max_iterations} backups: the residual is {residual:.1e}; lower "
        "damping or inverse_temperature"
    )


def marginal_transition(
    transition: Float[Tensor, "s k t"], logp: Float[Tensor, "g s a"], agent: int
) -> Float[Tensor, "s a t"]:
    """P(s' | s, a_i) with the others drawn from their policies.

    Gradient: to both.
    """
    by_target = transition.movedim(-1, 0)
    repeated = logp.unsqueeze(1).expand(-1, len(by_target), -1, -1)
    return average_over_others(by_target, repeated, agent).movedim(0, -1)


def joint_policy(logp: Float[Tensor, "g s a"]) -> Float[Tensor, "s k"]:
    """Probability of each joint action when all choose independently."""
    product = logp[0].exp()
    for other in logp[1:]:
        product = (product.unsqueeze(-1) * other.exp().unsqueeze(-2)).flatten(-2)
    return product
