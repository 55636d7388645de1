"""Consecutive steps of every environment, given to the learner once and then forgotten."""

from collections.abc import Iterator

import torch
from torch import Tensor

from esscher.errors import UserError
from esscher.runtime.state import Stateful
from esscher.types import Action, Rollout, Spec, Transitions


class RolloutBuffer(Stateful):
    """Fills `length` steps of all environments, yields them as one `Rollout`, and starts again.

    Args:
        spec: shapes of the task, with the number of environments.
        length: steps of each environment in a rollout.
        extras: names of the scalars an action that the actor wants back (logp, value).
        device: where the arrays live.
    """

    def __init__(
        self,
        spec: Spec,
        length: int,
        extras: tuple[str, ...] = (),
        device: torch.device | str = "cpu",
    ):
        if length < 1:
            raise UserError(f"rollout length must be >= 1, got {length}")
        lead = (length, spec.num_envs)
        action_dtype = torch.float32 if spec.num_actions is None else torch.int64
        self._length = length
        self.filled = 0
        self.obs = torch.zeros(*lead, *spec.obs_shape, device=device)
        self.action = torch.zeros(*lead, *spec.action_shape, dtype=action_dtype, device=device)
        self.reward = torch.zeros(lead, device=device)
        self.next_obs = torch.zeros(*lead, *spec.obs_shape, device=device)
        self.terminated = torch.zeros(lead, dtype=torch.bool, device=device)
        self.truncated = torch.zeros(lead, dtype=torch.bool, device=device)
        self.extras: dict[str, Tensor] = {name: torch.zeros(lead, device=device) for name in extras}

    def __len__(self) -> int:
        return self.filled

    def warming_up(self, step: int) -> bool:
        """Never: random actions would not come from the policy that is being improved."""
        return False

    def add(self, transitions: Transitions, action: Action) -> None:
        """Append one step of every environment."""
        for name, values in transitions.fields().items():
            getattr(self, name)[self.filled] = values
        for name, column in self.extras.items():
            column[self.filled] = action.extras[name]
        self.filled += 1

    def batches(self, step: int) -> Iterator[Rollout]:
        """The rollout, once full; its arrays are overwritten by the next steps."""
        if self.filled == self._length:
            self.filled = 0
            yield Rollout(
                obs=self.obs,
                action=self.action,
                reward=self.reward,
                next_obs=self.next_obs,
                terminated=self.terminated,
                truncated=self.truncated,
                extras=self.extras,
            )
