"""Small Markov games with known answers, for proofs and tests.

Use them like any other: `--env.id esscher.games:Gems`. All agents choose at the same moment, each
from the same number of actions, and all observe the whole state.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pettingzoo import ParallelEnv
from torch import Tensor

from esscher.functional.markov_games import Equilibrium, joint_policy, soft_equilibrium

Observation = NDArray[np.float32]
Observations = dict[str, Observation]


class TabularGame(ParallelEnv[str, Any, Any]):
    """A game whose states are numbered. It never ends by itself: give it a time limit.

    A subclass says how many states, agents and actions there are, what a state looks like, what a
    joint action earns, and where it leads.
    """

    num_states: int
    num_actions: int
    discount: float
    inverse_temperature: float
    """Of the experts: soft values and equilibrium policies are meant at this one."""
    damping = 0.5

    def __init__(self, num_agents: int):
        self.metadata = {"name": type(self).__name__}
        self.possible_agents = [f"agent_{k}" for k in range(num_agents)]
        self.agents: list[str] = []
        self.state_number = 0
        self.generator = np.random.default_rng(0)

    # ---- what a subclass says

    reward: Float[Tensor, "g s k"]
    """Of each agent for each joint action, double precision."""

    def expected_next(self, value: Float[Tensor, "g s"]) -> Float[Tensor, "g s k"]:
        """E[value(s') | s, joint action]."""
        raise NotImplementedError

    def observe(self, states: Int[Tensor, "b"]) -> Float[Tensor, "b o"]:
        """What every agent sees of these states."""
        raise NotImplementedError

    def draw_next(self, state: int, joint: int) -> int:
        """A successor, by `self.generator`."""
        raise NotImplementedError

    def push(self, state_probs: Float[Tensor, "s"], joint: Float[Tensor, "s k"]) -> Tensor:
        """Where the mass of states goes in one step, given each state's joint action."""
        raise NotImplementedError

    # ---- what follows

    @cached_property
    def first_states(self) -> Int[Tensor, "f"]:
        """Where episodes begin, each equally likely."""
        return torch.arange(self.num_states)

    @cached_property
    def equilibrium(self) -> Equilibrium:
        """The experts: the logit equilibrium at `inverse_temperature`."""
        return soft_equilibrium(
            self.expected_next,
            self.reward,
            self.num_actions,
            self.discount,
            self.inverse_temperature,
            damping=self.damping,
        )

    def expected_returns(
        self, logp: Float[Tensor, "g s a"], steps: int, discount: float = 1.0
    ) -> Float[Tensor, "g"]:
        """Exact expected return of policies over so many steps, from the first states."""
        joint = joint_policy(logp.double())
        earned = (self.reward * joint).sum(-1)
        mass = torch.zeros(self.num_states, dtype=torch.float64)
        mass[self.first_states] = 1 / len(self.first_states)
        total = earned.new_zeros(len(earned))
        for step in range(steps):
            total = total + discount**step * (earned @ mass)
            mass = self.push(mass, joint)
        return total

    # ---- PettingZoo

    def observation_space(self, agent: str) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.observe(torch.zeros(1, dtype=torch.int64)).shape[1],))

    def action_space(self, agent: str) -> spaces.Discrete:
        return spaces.Discrete(self.num_actions)

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, dict[str, Any]]]:
        if seed is not None:
            self.generator = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.state_number = int(self.first_states[self.generator.integers(len(self.first_states))])
        return self._observations(), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[Any, Any, Any, Any, Any]:
        joint = 0
        for agent in self.agents:
            joint = joint * self.num_actions + int(actions[agent])
        earned = self.reward[:, self.state_number, joint].tolist()
        self.state_number = self.draw_next(self.state_number, joint)
        rewards = dict(zip(self.agents, earned, strict=True))
        never = dict.fromkeys(self.agents, False)
        infos: dict[str, dict[str, Any]] = {agent: {} for agent in self.agents}
        return self._observations(), rewards, never, dict(never), infos

    def get_state(self) -> dict[str, Any]:
        """All that changes, as plain data."""
        return {"state": self.state_number, "agents": list(self.agents), "random": self.generator}

    def set_state(self, state: dict[str, Any]) -> None:
        """The inverse of `get_state`."""
        self.state_number, self.generator = state["state"], state["random"]
        self.agents = list(state["agents"])

    def _observations(self) -> Observations:
        seen = self.observe(torch.tensor([self.state_number]))[0].numpy()
        # Afresh for each, so that no agent can write into another's.
        return {agent: seen.copy() for agent in self.agents}


class RandomGame(TabularGame):
    """Rewards of N(0, 1), transitions of a Dirichlet(0.5); observations are one-hot.

    Args:
        seed: of the game itself.
    """

    discount, inverse_temperature = 0.9, 2.0

    def __init__(
        self, seed: int = 0, num_states: int = 6, num_actions: int = 3, num_agents: int = 2
    ):
        super().__init__(num_agents)
        draw = np.random.default_rng(seed)
        self.num_states, self.num_actions = num_states, num_actions
        joint = num_actions**num_agents
        rows = draw.dirichlet(np.full(num_states, 0.5), (num_states, joint))
        self.transition = torch.from_numpy(rows)
        self.reward = torch.from_numpy(draw.normal(size=(num_agents, num_states, joint)))

    def expected_next(self, value: Float[Tensor, "g s"]) -> Float[Tensor, "g s k"]:
        return torch.einsum("skt,gt->gsk", self.transition, value)

    def observe(self, states: Int[Tensor, "b"]) -> Float[Tensor, "b o"]:
        return torch.eye(self.num_states)[states]

    def draw_next(self, state: int, joint: int) -> int:
        cumulated = self.transition[state, joint].cumsum(0).numpy()
        return min(int((cumulated < self.generator.random()).sum()), self.num_states - 1)

    def push(self, state_probs: Float[Tensor, "s"], joint: Float[Tensor, "s k"]) -> Tensor:
        return torch.einsum("s,sk,skt->t", state_probs, joint, self.transition)


class Gems(TabularGame):
    """Two agents on a square field with a blue, a red and a purple gem that lie where they lie.

    Agent 0 earns 1 for the blue gem, agent 1 earns 1 for the red one, by standing on it, and both
    earn 3 for the purple one when they stand on it together; a gem that was earned is gone. Moves
    are +x, -x, +y, -y and none; a wall stops them; cells can be shared. Episodes begin with all gems
    there and the agents in cells drawn at random. Observations are five planes of the field, laid
    out in a row: agent 0, agent 1, blue, red, purple.

    The field and the prizes follow the Gems task of arXiv 2503.04679's first author, with one gem of
    each colour; that the gems lie in fixed cells is what makes its states few enough to count.

    Args:
        size: cells along an edge.
        seed: of the cells in which the gems lie.
    """

    num_actions, discount, inverse_temperature = 5, 0.95, 10.0
    moves = ((1, 0), (-1, 0), (0, 1), (0, -1), (0, 0))

    def __init__(self, size: int = 5, seed: int = 0):
        super().__init__(2)
        self.size, self.cells = size, size * size
        draw = np.random.default_rng(seed)
        self.gems = torch.from_numpy(draw.choice(self.cells, 3, replace=False))
        # A state is ((cell of agent 0 * cells + cell of agent 1) * 8) + gems left, a bit each.
        self.num_states = self.cells * self.cells * 8
        self.successor, self.reward = self._dynamics()

    @cached_property
    def first_states(self) -> Int[Tensor, "f"]:
        return torch.arange(self.cells * self.cells) * 8 + 7

    def expected_next(self, value: Float[Tensor, "g s"]) -> Float[Tensor, "g s k"]:
        return value[:, self.successor]

    def observe(self, states: Int[Tensor, "b"]) -> Float[Tensor, "b o"]:
        first, second, left = self._parts(states)
        planes = torch.zeros(len(states), 5, self.cells)
        row = torch.arange(len(states))
        planes[row, 0, first] = 1.0
        planes[row, 1, second] = 1.0
        for gem in range(3):
            planes[row, 2 + gem, self.gems[gem]] = (left >> gem & 1).float()
        return planes.flatten(1)

    def draw_next(self, state: int, joint: int) -> int:
        return int(self.successor[state, joint])

    def push(self, state_probs: Float[Tensor, "s"], joint: Float[Tensor, "s k"]) -> Tensor:
        mass = (state_probs.unsqueeze(-1) * joint).flatten()
        return torch.zeros_like(state_probs).index_add(0, self.successor.flatten(), mass)

    def _parts(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = states // 8
        return cells // self.cells, cells % self.cells, states % 8

    def _dynamics(self) -> tuple[Int[Tensor, "s k"], Float[Tensor, "g s k"]]:
        first, second, left = self._parts(torch.arange(self.num_states).unsqueeze(1))
        joint = torch.arange(self.num_actions**2).unsqueeze(0)
        first = self._move(first, joint // self.num_actions)
        second = self._move(second, joint % self.num_actions)
        blue = (left & 1).bool() & (first == self.gems[0])
        red = (left >> 1 & 1).bool() & (second == self.gems[1])
        purple = (left >> 2 & 1).bool() & (first == self.gems[2]) & (second == self.gems[2])
        left = left - blue.long() - 2 * red.long() - 4 * purple.long()
        reward = torch.stack([blue + 3.0 * purple, red + 3.0 * purple]).double()
        return (first * self.cells + second) * 8 + left, reward

    def _move(self, cell: Tensor, action: Tensor) -> Tensor:
        move = torch.tensor(self.moves)[action]
        x = (cell % self.size + move[..., 0]).clamp(0, self.size - 1)
        y = (cell // self.size + move[..., 1]).clamp(0, self.size - 1)
        return y * self.size + x
