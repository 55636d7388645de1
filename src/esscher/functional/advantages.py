"""Advantages of a prompt's responses from their rewards alone, without a critic.

One row is one response; rows with the same group id answer the same prompt, and may stand in any
order. GRPO, Dr. GRPO, DAPO, REINFORCE++, RLOO and Lite PPO differ in what is subtracted and in
what it is divided by:

  method        mean           std       method      mean           std
  GRPO, DAPO    group          group     Dr. GRPO    group          none
  Lite PPO      group          batch     RLOO        leave_one_out  none
  REINFORCE++   batch          batch     REINFORCE   none           none

Nothing here waits for the device or looks at values: refusing rewards that are not finite, and
group statistics of groups of one, is the caller's. CUDA adds the members of a group in no fixed
order unless torch.use_deterministic_algorithms is on.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from esscher.functional.reductions import masked_mean, masked_sum

Mean = Literal["none", "group", "batch", "running", "leave_one_out"]
Std = Literal["none", "group", "batch", "running"]
Scalar = Float[Tensor, ""]

INFINITY = float("inf")


@torch.no_grad()
def group_advantages(
    reward: Float[Tensor, "b"],
    group: Int[Tensor, "b"],
    *,
    mean: Mean = "group",
    std: Std = "group",
    epsilon: float = 1e-6,
    correction: int = 1,
    valid: Bool[Tensor, "b"] | None = None,
    running: tuple[Scalar | float, Scalar | float] | None = None,
) -> Float[Tensor, "b"]:
    """Rewards less a mean, over a standard deviation, each of its own scope.

    A = (r - mean) / (std + epsilon), std^2 = sum (r - mean of its scope)^2 / (n - correction);
    std "none" divides by nothing, epsilon included; mean "leave_one_out" is that of the group's
    other rows. Correction 1 is ROLL's and TRL's, with epsilons 1e-6 and 1e-4. Rows that are not
    valid enter no statistic and have A = 0.

    A = 0 wherever the standard deviation is exactly 0, and for mean "group" or "leave_one_out" in
    groups of one or of equal rewards; the other means leave those groups an A. A tiny standard
    deviation is kept: 1 failure in a batch of 1024 has A = -28. Log it, clip A, or use "none".

    Source: Liu et al. 2025, Tricks or Traps (arXiv 2508.08221), sec. 4; RLOO: arXiv 2402.14740.
    Gradient: none.
    Raises: ValueError if mean or std is unknown, "running" is asked for without `running` =
        (mean, std), epsilon is negative, or correction is neither 0 nor 1.
    """
    for name, value, known in (("mean", mean, get_args(Mean)), ("std", std, get_args(Std))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if running is None and "running" in (mean, std):
        raise ValueError("running statistics need running=(mean, std), see running_moments")
    if not epsilon >= 0 or correction not in (0, 1):
        raise ValueError(f"need epsilon >= 0 and correction 0 or 1, got {epsilon}, {correction}")
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    running_mean, running_std = running or (0.0, 1.0)

    if mean == "none" or mean == "running":
        advantage = reward - (running_mean if mean == "running" else 0.0)
    else:
        advantage, _, count = _deviations(reward, _slot(group, mean), valid)
        if mean == "leave_one_out":  # r - (n m - r) / (n - 1) = (r - m) n / (n - 1)
            advantage = advantage * count / (count - 1).clamp(min=1)
    if std != "none":
        if std == "running":
            scale = torch.ones_like(reward) * running_std
        else:
            _, squares, count = _deviations(reward, _slot(group, std), valid)
            scale = (squares / (count - correction).clamp(min=1)).sqrt().to(reward.dtype)
        advantage = advantage / (scale.masked_fill(scale == 0, INFINITY) + epsilon)
    return advantage.masked_fill(~valid, 0.0)


@torch.no_grad()
def running_moments(
    reward: Float[Tensor, "b"],
    count: Scalar,
    mean: Scalar,
    squares: Scalar,
    valid: Bool[Tensor, "b"] | None = None,
) -> tuple[Scalar, Scalar, Scalar]:
    """Count, mean and summed squared deviations of all rewards so far, after these; from zeros.

    std = sqrt(squares / (count - 1)). ROLL takes a batch in before normalising it.

    Source: Chan, Golub and LeVeque 1979, the pairwise update.
    Gradient: none.
    """
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    size, centre = valid.sum(), masked_mean(reward, valid)
    total, shift = count + size, centre - mean
    share = size / total.clamp(min=1)
    spread = masked_sum((reward - centre).square(), valid) + shift.square() * count * share
    return total, mean + shift * share, squares + spread


@torch.no_grad()
def mixed_groups(
    reward: Float[Tensor, "b"], group: Int[Tensor, "b"], valid: Bool[Tensor, "b"] | None = None
) -> Bool[Tensor, "b"]:
    """True in groups whose valid rewards are not all equal: those that DAPO keeps.

    The others have A = 0 under the group mean. Rows that are not valid are False.

    Source: Yu et al. 2025, DAPO (arXiv 2503.14476), sec. 3.2, dynamic sampling.
    Gradient: none.
    """
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    slot = _slot(group, "group")
    return valid & (_largest(reward, slot, valid) != -_largest(-reward, slot, valid))


def overlong_mask(
    completion_mask: Bool[Tensor, "b t"], finished: Bool[Tensor, "b"]
) -> Bool[Tensor, "b t"]:
    """Overlong filtering: a response that did not end itself is masked everywhere.

    `finished` means that it holds an end token, not that it is shorter than the limit: a response
    may end exactly there. Its reward still counts, as in ROLL and TRL; `valid` leaves it out.

    Source: DAPO (arXiv 2503.14476), sec. 3.4; Tricks or Traps (arXiv 2508.08221), sec. 4.
    """
    return completion_mask & finished.unsqueeze(1)


def overlong_penalty(length: Num[Tensor, "b"], limit: int, buffer: int) -> Float[Tensor, "b"]:
    """Soft overlong punishment, to be added to the reward; lengths in tokens.

    0 up to limit - buffer, falling in a straight line to -1 at the limit, -1 beyond.

    Source: DAPO (arXiv 2503.14476), eq. 13.
    Raises: ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer must be in (0, limit], got {buffer} with limit {limit}")
    return ((limit - buffer - length) / buffer).clamp(-1.0, 0.0)


def _slot(group: Tensor, scope: str) -> Tensor:
    """Ids as places in a table of b entries: in one scope iff in one place."""
    if scope == "batch":
        return torch.zeros_like(group)
    return torch.searchsorted(group.sort().values, group)


def _largest(reward: Tensor, slot: Tensor, valid: Tensor) -> Tensor:
    """The largest valid reward in each row's slot, -inf if there is none."""
    reward = reward.masked_fill(~valid, -INFINITY)
    return torch.full_like(reward, -INFINITY).scatter_reduce(0, slot, reward, "amax")[slot]


def _deviations(reward: Tensor, slot: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's r - mean, and the sum of squares and count of its slot's valid rows."""

    def total(x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, slot, x)[slot]

    count = total(valid.to(reward.dtype))
    # Shifting by a member first makes equal rewards exactly 0; else rounding noise is whitened.
    shifted = (reward - _largest(reward, slot, valid)).masked_fill(~valid, 0.0)
    centred = (shifted - total(shifted) / count.clamp(min=1)).masked_fill(~valid, 0.0)
    return centred, total(centred.double().square()), count  # Of 1e20 infinite in float32.
