"""Goal-conditioned behavioural cloning: a perceptron that answers with the mean action of the data.

The baseline of policies that learn goals from play: where the data do one thing or another, it does
neither, but what lies between.

    loss = mean |A - mu(S, G)|^2,   G reached later in the same episode

| variable | meaning | shape | unit |
|---|---|---|---|
| state | S | b s | scaled by the data |
| goal | G | b k | scaled as the entries that it is about |
| action | A | b a | scaled by the data |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.goals import GoalColumns, Observed, observed_by
from esscher.distributions.policies import Deterministic
from esscher.errors import require
from esscher.experience import Dataset
from esscher.experience.windows import WindowBatch, Windows
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.method import Method, Paper, continuous_only
from esscher.nn.mlp import MLP
from esscher.nn.scaling import Scaling
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim
from esscher.types import Metrics, Spec

PAPER = Paper(
    title="Learning to Reach Goals via Iterated Supervised Learning",
    year=2019,
    arxiv="1912.06088",
    purpose="The mean action towards a goal, cloned from play: the baseline without a distribution.",
    claim="",
    sections="sec. 4, the supervised step on logged data",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of goal-conditioned behavioural cloning."""

    goal: tuple[int, ...] = ()
    """Entries of the flat observation that hold the goal which the task wants. None: no goals."""
    achieved: tuple[int, ...] = ()
    """Entries that a goal is about, in the same order."""
    observation_scaling: Literal["standard", "range", "none"] = "standard"
    """By the data's mean and deviation, by their range to [-1, 1], or not."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    learning_rate: float = 3e-4
    """Adam step, > 0."""
    batch_size: int = 256
    """Steps an update."""

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")


class MeanPolicy(nn.Module):
    """Observations to one action each, in the data's units."""

    def __init__(self, observed: Observed, actions: Scaling, hidden: tuple[int, ...]):
        super().__init__()
        self.observed, self.actions = observed, actions
        sizes = (observed.state_dim + observed.goal_dim, *hidden, len(actions.shift))
        self.net = MLP(sizes, "gelu")

    def scaled(
        self, state: Float[Tensor, "b s"], goal: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b a"]:
        return self.net(torch.cat([state, goal], -1)).float()

    def forward(self, obs: Float[Tensor, "b o"]) -> Deterministic:
        action = self.scaled(self.observed.state(obs), self.observed.wanted(obs))
        return Deterministic(self.actions.inverse(action))


class GoalCloning(Method):
    """Goal-conditioned behavioural cloning."""

    Config = Config
    loop = "offline"
    data = "required"
    headline = "loss"

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "gc_bc")
        columns = GoalColumns(cfg.goal, cfg.achieved)
        observed = observed_by(spec, columns, cfg.observation_scaling)
        # Defined from the start: a policy that becomes a graph cannot ask whether it has seen data.
        observed.scaling.as_is()
        actions = Scaling(spec.action_dim, "standard", "action").as_is()
        self.actor = MeanPolicy(observed, actions, cfg.hidden).to(runtime.device)
        self.opt = Optim(self.actor.net.parameters(), cfg.learning_rate)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> MeanPolicy:
        return self.actor

    def experience(self, data: Dataset) -> Windows:
        """Single steps with their goals; takes the statistics of the data."""
        device = self.runtime.device
        self.actor.observed.fit(data.transitions.obs.to(device))
        self.actor.actions.fit(data.transitions.action.to(device), constant="refuse")
        return Windows(data, 1, self.cfg.batch_size, about=self.cfg.achieved, device=device)

    def update(self, batch: WindowBatch, step: int) -> Metrics:
        observed = self.actor.observed
        goal = torch.where(batch.has_goal.unsqueeze(-1), observed.reached(batch.goal[:, 0]), 0.0)
        state, action = observed.state(batch.obs[:, 0]), self.actor.actions(batch.action[:, 0])
        return self._descend(state, goal, action)

    def descend(
        self,
        state: Float[Tensor, "b s"],
        goal: Float[Tensor, "b k"],
        action: Float[Tensor, "b a"],
    ) -> Metrics:
        """One step of Adam."""
        loss = (self.actor.scaled(state, goal) - action).square().mean()
        self.opt.minimize(loss)
        return {"loss": loss.detach()}


def smoke() -> Experiment:
    """A few hundred updates of a small network: does everything run?"""
    return Experiment.of(
        Config(goal=(2, 3), achieved=(0, 1), hidden=(16, 16), batch_size=32),
        env=EnvConfig(id="esscher.envs:TwoGaps"),
        data="esscher.datasets:two_gaps",
        steps=200,
        evaluation=EvaluationConfig(every=100, episodes=2, step_limit=20),
    )
