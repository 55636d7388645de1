"""Flat observations as policies with goals see them: a state, a goal, and what was reached."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.nn.scaling import Scaling
from esscher.types import Spec


@dataclass(frozen=True)
class GoalColumns:
    """Which entries of a flat observation hold the goal that is wanted, and which ones it is about.

    Gymnasium-Robotics' dictionaries come in the order of their names: achieved_goal, desired_goal,
    observation. So with goals of three numbers `wanted` is (3, 4, 5) and `about` is (0, 1, 2).
    What is wanted is no part of the state. Both empty: there is no goal.
    """

    wanted: tuple[int, ...] = ()
    about: tuple[int, ...] = ()

    def check(self, obs_dim: int) -> None:
        """Refuse entries that a flat observation does not have.

        Raises:
            UserError: naming the setting, or both of them if they do not match.
        """
        for name, columns in (("goal", self.wanted), ("achieved", self.about)):
            known = all(0 <= column < obs_dim for column in columns)
            require(name, columns, known, f"entries of an observation, in [0, {obs_dim})")
            require(name, columns, len(set(columns)) == len(columns), "entries named once each")
        if len(self.wanted) != len(self.about):
            raise UserError(
                f"goal names {len(self.wanted)} entries of an observation and achieved "
                f"{len(self.about)}: a goal is about as many entries as it has"
            )
        if set(self.wanted) & set(self.about):
            raise UserError("goal and achieved name the same entry: a goal is no part of the state")


def observed_by(
    spec: Spec, columns: GoalColumns, how: Literal["range", "standard", "none"]
) -> "Observed":
    """What a policy sees of a task.

    Raises:
        UserError: entries that an observation does not have, or other ones than the task says that
            its goal lies in.
    """
    columns.check(spec.obs_dim)
    if (
        columns.wanted
        and spec.goal
        and (columns.wanted, columns.about) != (spec.goal, spec.achieved)
    ):
        wanted, about = (" ".join(map(str, part)) for part in (spec.goal, spec.achieved))
        raise UserError(
            f"goal is {' '.join(map(str, columns.wanted))} and achieved "
            f"{' '.join(map(str, columns.about))}, and the goal of this task lies elsewhere: give "
            f"--method.goal {wanted} --method.achieved {about}"
        )
    return Observed(spec.obs_dim, columns, how)


class Observed(nn.Module):
    """States and goals, scaled by the data's statistics; goals as the entries that they are about.

    Args:
        obs_dim: entries of a flat observation.
        columns: which of them are goals.
        how: the scaling; entries that never change become 0.
    """

    def __init__(
        self, obs_dim: int, columns: GoalColumns, how: Literal["range", "standard", "none"]
    ):
        super().__init__()
        columns.check(obs_dim)
        states = [column for column in range(obs_dim) if column not in columns.wanted]
        self.obs_dim, self.state_dim, self.goal_dim = obs_dim, len(states), len(columns.wanted)
        self.state_columns, self.wanted_columns = states, list(columns.wanted)
        self.about_states = [states.index(column) for column in columns.about]
        """Place, within the state, of each entry that goals are about."""
        self.scaling = Scaling(len(states), how, "observation")

    def fit(self, obs: Float[Tensor, "b o"]) -> None:
        """Take the statistics of the data."""
        self.scaling.fit(obs[:, self.state_columns], constant="keep")

    def state(self, obs: Float[Tensor, "*s o"]) -> Float[Tensor, "*s n"]:
        """All but the wanted goal."""
        return self.scaling(obs[..., self.state_columns])

    def wanted(self, obs: Float[Tensor, "*s o"]) -> Float[Tensor, "*s k"]:
        """The goal that a task asks for."""
        return self.reached(obs[..., self.wanted_columns])

    def reached(self, goal: Float[Tensor, "*s k"]) -> Float[Tensor, "*s k"]:
        """A goal in the data's units, scaled as the entries that it is about."""
        shift = self.scaling.shift[self.about_states]
        return (goal - shift) / self.scaling.scale[self.about_states]
