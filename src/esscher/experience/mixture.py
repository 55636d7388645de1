"""Whole episodes of a fixed horizon, and beside them logged steps of the same times."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from esscher.errors import UserError, require
from esscher.experience.offline import Dataset
from esscher.experience.rollout import RolloutBuffer
from esscher.runtime.state import Stateful
from esscher.types import Action, Rollout, Spec, Transitions


@dataclass(frozen=True)
class Mixed:
    """What a hybrid learner gets: steps of its own, and steps of others."""

    rollout: Rollout
    """Each environment's episodes, one after another: t is a multiple of the horizon."""
    logged: Transitions
    """The first rows are of time 0, as many of time 1 follow, and so on up to the horizon."""


class Mixture(Stateful):
    """Collects whole episodes, and yields them with equally many logged steps of each time.

    The time in the episode (0, 1, ..., horizon - 1) is the last component of every observation, on
    policy and logged: a policy that is asked for an action has nothing else to read it from. That it
    is there, and that every episode takes exactly `horizon` steps, is checked at every step. Episodes
    that a reset boundary cuts are left out.

    Logged steps are drawn uniformly from those of their time, with replacement. They are not part of
    the state; their digest is, so that a run is never resumed on other data.

    Args:
        spec: shapes of the task, with the number of environments.
        data: what is logged. Episodes may end before the horizon.
        horizon: steps of an episode.
        batch_size: environment steps between updates, rounded up to whole episodes.
        device: where the steps live.

    Raises:
        UserError: data without a step of some time, with times beyond the horizon, or whose
            observations do not end with the time; a batch larger than the data.
    """

    def __init__(
        self,
        spec: Spec,
        data: Dataset,
        horizon: int,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
    ):
        require("horizon", horizon, horizon >= 1, ">= 1")
        if not 1 <= batch_size <= len(data):
            raise UserError(
                f"batch_size must be in [1, {len(data)}], the size of {data.name}, got {batch_size}"
            )
        _check_times(data, horizon)
        self._horizon = horizon
        length = horizon * math.ceil(batch_size / (horizon * spec.num_envs))
        self.rollout = RolloutBuffer(spec, length, device=device)
        self._num_logged = length // horizon * spec.num_envs
        order, counts = data.step.argsort(stable=True), data.step.bincount(minlength=horizon)
        self._rows = data.transitions.index(order).to(device)
        self._counts = counts.to(device)
        self._starts = (counts.cumsum(0) - counts).to(device)
        self._name, self.digest = data.name, data.digest()
        self.num_cut = 0

    def __len__(self) -> int:
        return len(self.rollout)

    def warming_up(self, step: int) -> bool:
        """Never: random actions would not come from the policy that is being improved."""
        return False

    def add(self, transitions: Transitions, action: Action) -> None:
        """Append one step of every environment.

        Raises:
            UserError: the time that the observations tell is wrong, or the episodes do not take
                exactly `horizon` steps.
        """
        time = len(self.rollout) % self._horizon
        told = transitions.obs[:, -1]
        if not bool((told == time).all()):
            wrong = told[told != time][0].item()
            raise UserError(
                f"observations must end with the time in the episode, which is {time} here, and "
                f"got {wrong:g}: {_REMEDY}"
            )
        self.rollout.add(transitions, action)
        if time == self._horizon - 1:
            self.num_cut = 0
            if not bool((transitions.terminated | transitions.truncated).all()):
                raise UserError(
                    f"horizon is {self._horizon}, and an episode goes on after as many steps: set "
                    f"horizon to the task's, or {_REMEDY}"
                )
        elif bool(transitions.truncated.all()):
            self.rollout.filled -= time + 1
            self.num_cut += 1
            if self.num_cut > 1:
                raise UserError(
                    f"horizon is {self._horizon}, and episodes are cut after {time + 1} steps: set "
                    "horizon to the task's, or checkpoint.every to many episodes"
                )
        elif bool((transitions.terminated | transitions.truncated).any()):
            raise UserError(
                f"horizon is {self._horizon}, and an episode ended after {time + 1} steps: {_REMEDY}"
            )

    def batches(self, step: int) -> Iterator[Mixed]:
        """The rollout once full, and logged steps with it."""
        for rollout in self.rollout.batches(step):
            yield Mixed(rollout, self.sample(self._num_logged))

    def sample(self, size: int) -> Transitions:
        """So many logged steps of each time, drawn by torch's default generator."""
        lead, device = (self._horizon, size), self._counts.device
        # In double precision, which counts rows exactly.
        uniform = torch.rand(lead, dtype=torch.float64, device=device)
        index = self._starts[:, None] + (uniform * self._counts[:, None]).long()
        return self._rows.index(index.flatten())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state.

        Raises:
            UserError: the data are not those of the saved run.
        """
        if state["digest"] != self.digest:
            raise UserError(
                f"{self._name} has changed since the run was saved: restore it, or start a new run"
            )
        super().load_state_dict(state)


_REMEDY = (
    "use a task whose episodes all take `horizon` steps and whose observations end with the time, "
    "or --env.id esscher.envs:FiniteHorizon around your own"
)


def _check_times(data: Dataset, horizon: int) -> None:
    obs, step = data.transitions.obs, data.step
    if int(step.min()) < 0:
        raise UserError(f"{data.name} does not tell the time in the episode of every step")
    last = int(step.max())
    if last >= horizon:
        raise UserError(
            f"{data.name} has a step at time {last}, and horizon is {horizon}: the last time is "
            "horizon - 1. Raise horizon, or cut the logged episodes"
        )
    missing = (step.bincount(minlength=horizon) == 0).nonzero().flatten().tolist()
    if missing:
        raise UserError(
            f"{data.name} has no step at time {missing[0]}, and horizon is {horizon}: lower horizon, "
            "or log episodes that are as long"
        )
    wrong = (obs[:, -1] != step).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise UserError(
            f"observations of {data.name} must end with the time in the episode, and row {row} has "
            f"{obs[row, -1].item():g} where the time is {int(step[row])}: log it with them "
            "(esscher.envs:FiniteHorizon appends it)"
        )
