"""Finite Markov decision processes, written down outcome by outcome, and solved exactly."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """One thing that an action may lead to."""

    probability: float
    reward: tuple[float, ...]
    """One number, or a vector of them."""
    next_state: int | None
    """None ends the task."""


@dataclass(frozen=True)
class FiniteMDP:
    """`outcomes[state][action]` lists what may happen; every state has the same actions.

    Raises: ValueError if probabilities do not sum to 1, a state is unknown, or sizes differ.
    """

    outcomes: tuple[tuple[tuple[Outcome, ...], ...], ...]

    def __post_init__(self) -> None:
        sizes = {len(o.reward) for row in self.outcomes for case in row for o in case}
        if len({len(row) for row in self.outcomes}) != 1 or len(sizes) != 1:
            raise ValueError("every state needs equally many actions, every reward one length")
        for state, row in enumerate(self.outcomes):
            for action, case in enumerate(row):
                total = sum(outcome.probability for outcome in case)
                if not abs(total - 1) <= 1e-9 or min(o.probability for o in case) < 0:
                    raise ValueError(
                        f"state {state}, action {action}: probabilities sum to {total}"
                    )
                for outcome in case:
                    known = outcome.next_state is None or 0 <= outcome.next_state < self.num_states
                    if not known:
                        raise ValueError(f"there is no state {outcome.next_state}")

    @property
    def num_states(self) -> int:
        return len(self.outcomes)

    @property
    def num_actions(self) -> int:
        return len(self.outcomes[0])

    @property
    def reward_dim(self) -> int:
        return len(self.outcomes[0][0][0].reward)

    def tensors(self) -> tuple[Float[Tensor, "s a s"], Float[Tensor, "s a d"]]:
        """Probabilities of the next state (rows sum to less where the task may end), mean rewards."""
        shape = (self.num_states, self.num_actions)
        moves = torch.zeros(*shape, self.num_states, dtype=torch.float64)
        rewards = torch.zeros(*shape, self.reward_dim, dtype=torch.float64)
        for state, row in enumerate(self.outcomes):
            for action, case in enumerate(row):
                for outcome in case:
                    reward = torch.tensor(outcome.reward, dtype=torch.float64)
                    rewards[state, action] += outcome.probability * reward
                    if outcome.next_state is not None:
                        moves[state, action, outcome.next_state] += outcome.probability
        return moves, rewards


def value_iteration(
    moves: Float[Tensor, "s a s"], reward: Float[Tensor, "s a"], discount: float, num_steps: int
) -> Float[Tensor, "t s a"]:
    """Best expected returns with t + 1 steps to go, by state and first action.

    Q_0 = reward, Q_t = reward + discount moves max_a Q_{t-1}. The last row converges to the values
    without a horizon where discount < 1 or the task ends by itself.

    Source: Sutton and Barto, Reinforcement Learning (2nd ed.), sec. 4.4. Gradient: to both tensors.
    Raises: ValueError if discount is outside [0, 1] or num_steps < 1.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    values = [reward]
    for _ in range(num_steps - 1):
        values.append(reward + discount * moves @ values[-1].amax(-1))
    return torch.stack(values)
