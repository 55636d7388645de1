"""Targets and advantages from rewards and values; the only module that knows `terminated`.

Row t of a "t n" tensor is one environment step: its reward, and in `next_value` the value of the
observation that step really led to (the final observation at an episode's end, never the reset).
`terminated`: there is no future, nothing is bootstrapped. `truncated`: the recording stopped but
the future goes on, next_value stands for it. Both end the episode, so nothing crosses to row t+1;
where both are set `terminated` wins. The last row is treated as truncated unless terminated.

Except for `vtrace` the results are linear in rewards and values and differentiable in them; call
under `torch.no_grad()` where a target must carry no gradient.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def td_target(
    reward: Float[Tensor, "*#s"],
    next_value: Float[Tensor, "*s"],
    terminated: Bool[Tensor, "*#s"],
    discount: float,
) -> Float[Tensor, "*s"]:
    """One-step Bellman target, bootstrapped unless the episode terminated.

    reward + discount * (1 - terminated) * next_value. For n-step rewards pass discount**n. To
    share a reward along further axes give it axes of size one ("b 1" beside "b q").

    Source: Sutton and Barto, Reinforcement Learning (2nd ed.), sec. 6.1.
    Gradient: to reward and next_value; next_value gets none, and may be NaN, where terminated.
    Raises: ValueError if discount is outside [0, 1] or the numbers of axes differ.
    """
    _check_unit(discount=discount)
    if not reward.dim() == next_value.dim() == terminated.dim():
        raise ValueError(
            "reward, next_value and terminated must have equally many axes, got shapes "
            f"{tuple(reward.shape)}, {tuple(next_value.shape)}, {tuple(terminated.shape)}"
        )
    return reward + discount * next_value.masked_fill(terminated, 0.0)


def n_step_returns(
    reward: Float[Tensor, "t n"],
    next_value: Float[Tensor, "t n"],
    terminated: Bool[Tensor, "t n"],
    truncated: Bool[Tensor, "t n"],
    discount: float,
    num_steps: int,
) -> Float[Tensor, "t n"]:
    """Returns of up to `num_steps` rewards, bootstrapped where they stop.

    sum_{k<m} discount^k reward_{t+k} + discount^m next_value_{t+m-1}, where m is num_steps or the
    number of rows left in the episode or the rollout, whichever is smaller.

    Source: Sutton and Barto, sec. 7.1.
    Gradient: to reward and next_value.
    Raises: ValueError if discount is outside [0, 1] or num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    one_step = td_target(reward, next_value, terminated, discount)
    stops = (terminated | truncated)[:-1]
    returns = one_step
    for _ in range(min(num_steps, len(reward)) - 1):
        longer = reward[:-1] + discount * returns[1:]
        returns = torch.cat([torch.where(stops, one_step[:-1], longer), one_step[-1:]])
    return returns


def gae(
    reward: Float[Tensor, "t n"],
    value: Float[Tensor, "t n"],
    next_value: Float[Tensor, "t n"],
    terminated: Bool[Tensor, "t n"],
    truncated: Bool[Tensor, "t n"],
    discount: float,
    lambda_: float,
) -> Float[Tensor, "t n"]:
    """Generalised advantage estimates, not whitened.

    A_t = delta_t + discount * lambda * (1 - terminated_t)(1 - truncated_t) A_{t+1},
    delta_t = reward_t + discount * (1 - terminated_t) next_value_t - value_t.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16.
    Gradient: to reward, value and next_value.
    Raises: ValueError if discount or lambda_ is outside [0, 1].
    """
    _check_unit(lambda_=lambda_)
    delta = td_target(reward, next_value, terminated, discount) - value
    decay = discount * lambda_ * _continues(terminated, truncated, delta)
    return _backward_scan(delta, decay, torch.zeros_like(delta[-1]))


def lambda_returns(
    reward: Float[Tensor, "t n"],
    next_value: Float[Tensor, "t n"],
    terminated: Bool[Tensor, "t n"],
    truncated: Bool[Tensor, "t n"],
    discount: float,
    lambda_: float,
) -> Float[Tensor, "t n"]:
    """Geometric mixture of all n-step returns: lambda 0 is one-step TD, lambda 1 Monte Carlo.

    G_t = reward_t + discount * (1 - terminated_t) ((1 - lambda) next_value_t + lambda G_{t+1}),
    where next_value_t replaces G_{t+1} at truncation and in the last row. Equals gae + value if
    next_value_t = value_{t+1} inside episodes.

    Source: Sutton and Barto, sec. 12.1.
    Gradient: to reward and next_value.
    Raises: ValueError if discount or lambda_ is outside [0, 1].
    """
    _check_unit(lambda_=lambda_)
    weight = lambda_ * _continues(terminated, truncated, reward)
    immediate = td_target(reward, (1 - weight) * next_value, terminated, discount)
    return _backward_scan(immediate, discount * weight, next_value[-1])


def monte_carlo_returns(
    reward: Float[Tensor, "t n"],
    next_value: Float[Tensor, "t n"],
    terminated: Bool[Tensor, "t n"],
    truncated: Bool[Tensor, "t n"],
    discount: float,
) -> Float[Tensor, "t n"]:
    """Discounted rewards to the episode's end, completed by next_value if it was cut short.

    G_t = reward_t + discount * (0 if terminated_t, next_value_t if truncated_t or last, else
    G_{t+1}).

    Source: Sutton and Barto, sec. 5.1 (completion at time limits: Pardo et al. 2018,
    arXiv 1712.00378).
    Gradient: to reward and next_value.
    Raises: ValueError if discount is outside [0, 1].
    """
    return lambda_returns(reward, next_value, terminated, truncated, discount, lambda_=1.0)


@torch.no_grad()
def vtrace(
    log_ratio: Float[Tensor, "t n"],
    reward: Float[Tensor, "t n"],
    value: Float[Tensor, "t n"],
    next_value: Float[Tensor, "t n"],
    terminated: Bool[Tensor, "t n"],
    truncated: Bool[Tensor, "t n"],
    discount: float,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Float[Tensor, "t n"], Float[Tensor, "t n"]]:
    """Off-policy value targets and policy-gradient advantages with clipped importance ratios.

    With log_ratio = log pi(a|s) - log mu(a|s) in nats (mu acted), rho = min(rho_clip, ratio) and
    c = lambda min(c_clip, ratio):
    v_t = V_t + rho_t delta_t + discount c_t (1 - terminated_t)(1 - truncated_t)(v_{t+1} - V_{t+1}),
    advantage_t = rho_t (reward_t + discount (1 - terminated_t) v_{t+1} - V_t), where next_value_t
    replaces v_{t+1} at truncation and in the last row. Returns (v, advantage).

    Source: Espeholt et al. 2018 (arXiv 1802.01561), eq. 1 and sec. 4.2.
    Gradient: none.
    Raises: ValueError if discount or lambda_ is outside [0, 1], or c_clip exceeds rho_clip.
    """
    _check_unit(lambda_=lambda_)
    if not 0 < c_clip <= rho_clip:
        raise ValueError(f"need 0 < c_clip <= rho_clip, got c_clip {c_clip}, rho_clip {rho_clip}")
    ratio = log_ratio.exp()
    rho, trace = ratio.clamp(max=rho_clip), lambda_ * ratio.clamp(max=c_clip)
    delta = rho * (td_target(reward, next_value, terminated, discount) - value)
    decay = discount * trace * _continues(terminated, truncated, delta)
    corrected = value + _backward_scan(delta, decay, torch.zeros_like(delta[-1]))
    following = torch.cat([corrected[1:], next_value[-1:]])
    following = torch.where(truncated, next_value, following)  # terminated: td_target
    return corrected, rho * (td_target(reward, following, terminated, discount) - value)


def _continues(terminated: Tensor, truncated: Tensor, like: Tensor) -> Tensor:
    """1 where row t+1 belongs to the same episode as row t, else 0; refuses what has no rows."""
    if not len(terminated):
        raise ValueError("returns need at least one row of time, got none")
    return (~(terminated | truncated)).to(like.dtype)


def _backward_scan(increment: Tensor, decay: Tensor, final: Tensor) -> Tensor:
    """x_t = increment_t + decay_t x_{t+1} from the last row backwards, with x_T = final."""
    carry, rows = final, []
    for increment_row, decay_row in zip(
        reversed(increment.unbind()), reversed(decay.unbind()), strict=True
    ):
        carry = increment_row + decay_row * carry
        rows.append(carry)
    return torch.stack(rows[::-1])


def _check_unit(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
