"""Judge a policy by whole episodes in environments of its own."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from esscher.adapters.episodes import EpisodeRunner
from esscher.adapters.gymnasium import Environments
from esscher.distributions.policies import device_of
from esscher.distributions.remembering import Player
from esscher.experiment import EnvConfig, EvaluationConfig
from esscher.runtime.rng import Phase, seed_phase


@dataclass(frozen=True)
class Evaluation:
    """Returns (undiscounted sums of reward) and lengths of the episodes.

    Of a language model: what each row held out was worth, by the measure named, and its tokens.
    """

    returns: list[float]
    lengths: list[int]
    measure: str = "return"
    """What the numbers are; more is better."""
    extras: dict[str, float] = field(default_factory=dict)
    """Further means, by name."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Of a language model: some prompts with what it wrote."""
    milliseconds: float | None = None
    """Of a policy that draws chunks of actions: what one took it, for all episodes side by side. Not a
    part of what is recorded, since a clock decides it."""

    @property
    def told(self) -> str:
        """The mean for a reader: returns are large numbers, most other measures small ones."""
        return self._number(self.mean)

    @property
    def told_with_spread(self) -> str:
        """Beside it the standard deviation, if there is more than one number (a set has one)."""
        return f"{self.told} +- {self._number(self.std)}" if len(self.returns) > 1 else self.told

    def _number(self, value: float) -> str:
        return f"{value:,.1f}" if self.measure == "return" else f"{value:,.3f}"

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))

    def to_json(self) -> dict[str, Any]:
        return {
            **({} if self.measure == "return" else {"measure": self.measure}),
            "return_mean": self.mean,
            "return_std": self.std,
            "returns": self.returns,
            "length_mean": float(np.mean(self.lengths)),
            **self.extras,
        }


class Evaluator:
    """One environment an episode, all stepped together so that the policy runs in batches.

    Every evaluation starts its episodes from the same seeds, which depend on the run's seed only,
    and with what the policy names as its `reset_options`, if it has any. Of a policy with a memory it
    also reports how often its network was asked for an action; of a task that says info["success"], the
    share of the episodes that were successful at any step, with Wilson's interval of 95 %.
    """

    milliseconds: float = 0.0
    """That the policy took for the actions of all running episodes, a step on average, in the last
    evaluation. Not a part of what is recorded, since a clock decides it."""

    def __init__(self, env: EnvConfig, config: EvaluationConfig, seed: int):
        copies = EnvConfig(
            id=env.id,
            num=config.episodes,
            parallel=False,
            max_episode_steps=env.max_episode_steps,
            kwargs=env.kwargs,
        )
        self.config, self._seed = config, seed
        self._envs = Environments(copies, seed, Phase.EVALUATE)
        self.spec = self._envs.spec

    def __call__(self, policy: nn.Module) -> Evaluation:
        """Run one episode in each environment."""
        config = self.config
        device = device_of(policy)
        obs = self._envs.reset(0, getattr(policy, "reset_options", None))
        running = np.ones(config.episodes, bool)
        returns, lengths = np.zeros(config.episodes), np.zeros(config.episodes, np.int64)
        seed_phase(self._seed, 0, Phase.EVALUATE)
        player, seconds = Player(policy, explore=not config.deterministic), 0.0
        evaluations = np.zeros(config.episodes, np.int64)
        solved, judged = np.zeros(config.episodes, bool), False
        for step in range(config.step_limit):
            began = time.perf_counter()
            action = player(torch.from_numpy(obs).to(device))
            seconds += time.perf_counter() - began
            if player.memory is not None:
                asked = player.memory.evaluations.cpu().numpy()
                evaluations = np.where(running, asked, evaluations)
            outcome = self._envs.step(action, step)
            returns += outcome.reward * running
            lengths += running
            if outcome.success is not None:
                solved, judged = solved | (outcome.success & running), True
            running &= ~(outcome.terminated | outcome.truncated)
            obs = outcome.obs
            if not running.any():
                break
        self.milliseconds = 1000 * seconds / max(int(lengths.max()), 1)
        extras: dict[str, float] = {}
        if player.memory is not None:
            extras["evaluations_per_action"] = float(evaluations.sum() / lengths.sum())
        if judged:
            low, high = wilson(int(solved.sum()), config.episodes)
            extras |= {"success": float(solved.mean()), "success, low": low, "success, high": high}
        return Evaluation(returns.tolist(), lengths.tolist(), extras=extras)

    def close(self) -> None:
        self._envs.close()


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's interval of 95 % for a share.

    Source: Wilson 1927, without continuity correction.
    """
    from scipy.stats import binomtest  # Half a second, which few commands need.

    interval = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def achieved_by(
    policy: nn.Module, env: EnvConfig, config: EvaluationConfig, seed: int
) -> list[float]:
    """Mean descriptor of whole episodes, in a task that describes them."""
    judge = EpisodeRunner(env, seed, config.step_limit)
    seed_phase(seed, 0, Phase.EVALUATE)
    episodes = judge(Player(policy, explore=not config.deterministic), config.episodes, 0)
    judge.close()
    return episodes.descriptor.mean(0).tolist()
