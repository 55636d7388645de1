"""Proximal policy optimisation: several epochs on each rollout, kept close by a clipped ratio.

On-policy control with continuous or discrete actions. Each rollout is used for a few epochs of
minibatch steps; the surrogate stops paying once an action's probability has moved by more than the
clip range from that of the policy that acted.

Compared with a plain policy gradient (A2C):
- each rollout is learned from in several epochs, by the ratio pi / pi_old instead of log pi;
- the ratio is clipped, so that an epoch too many does little harm;
- in the usual recipe, and switchable here: observations are normalised by running moments, rewards
  are divided by the running deviation of the discounted return, advantages are whitened.

The moments of the observations change only after an update: the policy that acted, the one that the
ratios refer to, and the one that the first minibatch sees are the same function, and its first
ratios are 1. They belong to the policy module, hence to what is deployed.

| variable | paper | shape | unit |
|---|---|---|---|
| actor, critic | pi_theta, V_theta (separate networks) | | |
| advantage | A-hat_t | t n | scaled return |
| logp, old_logp | log pi_theta, log pi_theta_old | b | nats |
| clip | epsilon | scalar | |
| value_coefficient, entropy_coefficient | c_1, c_2 | scalar | |
| rollout_length, epochs | T, K | scalar | steps of one environment, passes |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from esscher.critics import ScalarCritic
from esscher.distributions import Categorical, Normal
from esscher.distributions.policies import CategoricalPolicy, NormalPolicy
from esscher.errors import UserError, require
from esscher.experience import RolloutBuffer
from esscher.experiment import EvaluationConfig, Experiment
from esscher.functional.kl import kl_k3_terms
from esscher.functional.reductions import masked_whiten
from esscher.functional.returns import gae
from esscher.functional.surrogates import clipped_ratio_terms
from esscher.method import Method, Paper
from esscher.nn.mlp import Activation
from esscher.nn.moments import RunningMoments
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim
from esscher.types import Action, Metrics, Rollout, Spec

PAPER = Paper(
    title="Proximal Policy Optimization Algorithms",
    year=2017,
    arxiv="1707.06347",
    sections="sec. 3 and 5, eq. 7, 9, 11 and 12, algorithm 1, table 3",
    purpose="On-policy control with continuous or discrete actions, as a baseline.",
    claim="A clipped probability ratio gives the stability of trust regions with first-order steps "
    "and several epochs a rollout, and exceeds the on-policy methods of its time on MuJoCo.",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PPO; defaults from the paper's MuJoCo table unless a line says otherwise."""

    learning_rate: float = 3e-4
    """Adam step of actor and critic, held constant (the authors' code anneals it to 0)."""
    discount: float = 0.99
    """Weight of a reward one step later, in [0, 1)."""
    gae_lambda: float = 0.95
    """Decay of the advantage's trace, in [0, 1]. Higher: less bias from the critic, more noise."""
    clip: float = 0.2
    """The ratio pays inside [1 - clip, 1 + clip], in (0, 1]. Higher: larger steps a rollout."""
    value_clip: float | None = None
    """Keeps a new value this near to the old one, > 0, in units of the scaled return; None does not
    (the authors' code: the ratio's clip range, though values and ratios have different units)."""
    value_coefficient: float = 0.5
    """Weight of half the squared error of values; actor and critic share no layer, so it acts only
    through `max_grad_norm` (from the authors' code)."""
    entropy_coefficient: float = 0.0
    """Reward for entropy, per nat, >= 0. Higher: explores longer (0.01 in the paper on Atari)."""
    max_grad_norm: float | None = 0.5
    """Clip of the joint gradient norm, > 0; None leaves it (from the authors' code)."""
    rollout_length: int = 2048
    """Steps of each environment in a rollout. With many environments, lower it by as much."""
    epochs: int = 10
    """Passes over each rollout."""
    num_minibatches: int = 32
    """Minibatches a pass (64 transitions each, with one environment)."""
    target_kl: float | None = None
    """Stop after an epoch whose mean KL from the acting policy exceeds this, nats, > 0; None never
    stops. Looked at once an epoch, because each look waits for the device."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic."""
    activation: Activation = "tanh"
    """Of the hidden layers."""
    initial_log_std: float = 0.0
    """Where the log standard deviation of continuous actions starts; the box is [-1, 1]."""
    normalize_obs: bool = True
    """Normalise observations by running moments (not in the paper; in its MuJoCo code)."""
    normalize_reward: bool = True
    """Divide rewards by the running deviation of the discounted return, and clip them to +-10 (not
    in the paper; in its MuJoCo code)."""
    normalize_advantage: bool = True
    """Whiten the advantages of each minibatch (not in the paper; in its code, over the rollout at
    first, then over the minibatch as here)."""

    def __post_init__(self) -> None:
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        require("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "in [0, 1]")
        require("clip", self.clip, 0 < self.clip <= 1, "in (0, 1]")
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        for name in ("value_coefficient", "entropy_coefficient"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("rollout_length", "epochs", "num_minibatches"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("value_clip", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "None or > 0")


class NormalizedPolicy(nn.Module):
    """A policy behind the moments of its observations, so that neither is deployed alone."""

    def __init__(
        self, moments: RunningMoments | nn.Identity, net: NormalPolicy | CategoricalPolicy
    ):
        super().__init__()
        self.moments, self.net = moments, net

    def forward(self, obs: Float[Tensor, "b o"]) -> Normal | Categorical:
        return self.net(self.moments(obs))


class PPO(Method):
    """See the module; `update` is one iteration of the paper's algorithm 1."""

    Config = Config

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        check_minibatches(cfg, spec.num_envs)
        obs_dim, device = spec.obs_dim, runtime.device
        if spec.num_actions is None:
            net: NormalPolicy | CategoricalPolicy = NormalPolicy(
                obs_dim, spec.action_dim, cfg.hidden, cfg.activation, cfg.initial_log_std
            )
        else:
            net = CategoricalPolicy(obs_dim, spec.num_actions, cfg.hidden, cfg.activation)
        moments = RunningMoments(spec.obs_shape) if cfg.normalize_obs else nn.Identity()
        self.actor = NormalizedPolicy(moments, net).to(device)
        self.critic = ScalarCritic(
            obs_dim, 0, cfg.hidden, cfg.activation, ensemble=1, orthogonal_gain=1.0
        ).to(device)
        self.opt = Optim(
            [*self.actor.parameters(), *self.critic.parameters()],
            cfg.learning_rate,
            epsilon=1e-5,
            max_grad_norm=cfg.max_grad_norm,
        )
        self.return_moments = RunningMoments(()).to(device)
        self.discounted_return = torch.zeros(spec.num_envs, device=device)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> NormalizedPolicy:
        return self.actor

    def experience(self) -> RolloutBuffer:
        length, device = self.cfg.rollout_length, self.runtime.device
        return RolloutBuffer(self.spec, length, extras=("logp", "value"), device=device)

    @torch.no_grad()
    def act(self, obs: Float[Tensor, "n o"], *, explore: bool) -> Action:
        distribution = self.actor(obs)
        action = distribution.sample() if explore else distribution.mode()
        # Not clipped to the box here: the log-probability is that of the unclipped action.
        logp = distribution.log_prob(action)
        return Action(value=action, extras={"logp": logp, "value": self.value(obs)})

    def value(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b"]:
        """Of observations as they come; the critic sees them as the policy does."""
        return self.critic(self.actor.moments(obs)).lower("first")

    def update(self, batch: Rollout, step: int) -> Metrics:
        cfg, old_value = self.cfg, batch.extras["value"]
        advantage = self.advantages(batch)
        returns = advantage + old_value
        columns = (batch.obs, batch.action, batch.extras["logp"], old_value, advantage, returns)
        rows = [column.flatten(0, 1) for column in columns]
        reports: list[Metrics] = []
        for _ in range(cfg.epochs):
            order = torch.randperm(len(rows[0]), device=self.runtime.device)
            for index in order.view(cfg.num_minibatches, -1):
                minibatch = [row.index_select(0, index) for row in rows]
                reports.append(self._descend(*minibatch))
            if cfg.target_kl is not None:
                kls = [report["approx_kl"] for report in reports[-cfg.num_minibatches :]]
                if torch.stack(kls).mean().item() > cfg.target_kl:
                    break
        if isinstance(self.actor.moments, RunningMoments):
            self.actor.moments.observe(rows[0])
        metrics = {name: torch.stack([r[name] for r in reports]).mean() for name in reports[0]}
        variance = returns.var(correction=0).clamp_min(1e-8)
        return metrics | {"explained_variance": 1 - advantage.var(correction=0) / variance}

    def descend(self, *minibatch: Tensor) -> Metrics:
        """One step on the columns that `loss` takes."""
        loss, report = self.loss(*minibatch)
        self.opt.minimize(loss)
        return report

    @torch.no_grad()
    def advantages(self, batch: Rollout) -> Float[Tensor, "t n"]:
        """Generalised advantage estimates of the acting policy (eq. 11 and 12).

        A truncated step is bootstrapped from the observation it led to, a terminated one is not.
        """
        cfg, reward = self.cfg, batch.reward
        if cfg.normalize_reward:
            reward = self.scaled_reward(batch)
        next_value = self.value(batch.next_obs.flatten(0, 1)).view_as(reward)
        value, ends = batch.extras["value"], (batch.terminated, batch.truncated)
        return gae(reward, value, next_value, *ends, cfg.discount, cfg.gae_lambda)

    def scaled_reward(self, batch: Rollout) -> Float[Tensor, "t n"]:
        """Rewards over the running deviation of the discounted return up to each step.

        Takes the rollout into the running moments first. The return of an episode that the rollout
        leaves unfinished is carried to the next one.
        """
        running, rows = self.discounted_return, []
        ended = batch.terminated | batch.truncated
        for reward_row, ended_row in zip(batch.reward.unbind(), ended.unbind(), strict=True):
            running = self.cfg.discount * running + reward_row
            rows.append(running)
            running = running.masked_fill(ended_row, 0.0)
        self.discounted_return.copy_(running)
        moments = self.return_moments
        moments.observe(torch.cat(rows))
        scaled = batch.reward / (moments.variance + 1e-8).sqrt()
        return scaled.clamp(-moments.clip, moments.clip)

    def loss(
        self,
        obs: Float[Tensor, "b o"],
        action: Shaped[Tensor, "b *a"],
        old_logp: Float[Tensor, "b"],
        old_value: Float[Tensor, "b"],
        advantage: Float[Tensor, "b"],
        returns: Float[Tensor, "b"],
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Surrogate, value error and entropy of one minibatch, weighted (eq. 9), and metrics."""
        cfg, distribution = self.cfg, self.actor(obs)
        if cfg.normalize_advantage:
            advantage = masked_whiten(advantage, torch.ones_like(advantage, dtype=torch.bool))
        log_ratio = distribution.log_prob(action) - old_logp
        policy_loss = clipped_ratio_terms(log_ratio, advantage, cfg.clip, cfg.clip).mean()
        value = self.value(obs)
        error = (value - returns).square()
        if cfg.value_clip is not None:
            near = old_value + (value - old_value).clamp(-cfg.value_clip, cfg.value_clip)
            error = torch.maximum(error, (near - returns).square())
        value_loss = 0.5 * error.mean()
        entropy = distribution.entropy().mean()
        loss = policy_loss + cfg.value_coefficient * value_loss - cfg.entropy_coefficient * entropy
        log_ratio = log_ratio.detach()
        return loss, {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            # KL from the acting policy, whose actions these are: hence the sign.
            "approx_kl": kl_k3_terms(-log_ratio).mean(),
            "clip_fraction": ((log_ratio.exp() - 1).abs() > cfg.clip).float().mean(),
        }


def check_minibatches(cfg: Config, num_envs: int) -> None:
    """Refuse rollouts that do not divide into equal minibatches.

    Raises:
        UserError: naming the three numbers.
    """
    rows, count = cfg.rollout_length * num_envs, cfg.num_minibatches
    numbers = f"rollout_length {cfg.rollout_length} times env.num {num_envs} is {rows} transitions"
    if rows % count:
        raise UserError(
            f"num_minibatches must divide a rollout, got {count}, and {numbers}: change one of them"
        )
    if cfg.normalize_advantage and rows == count:
        raise UserError(
            f"num_minibatches must leave 2 or more transitions a minibatch, got {count}, and "
            f"{numbers}: one advantage alone whitens to 0. Lower it, or normalize_advantage false"
        )


def smoke() -> Experiment:
    """A few updates of a small network: does everything run?"""
    return Experiment.of(
        Config(hidden=(32, 32), rollout_length=128, num_minibatches=4, epochs=2),
        env="Pendulum-v1",
        steps=512,
        evaluation=EvaluationConfig(every=256, episodes=2),
    )


def cartpole() -> Experiment:
    """Discrete actions: balances the pole in about a minute.

    Without moments: with them one seed of four fell back to returns near 250 for a while, without
    them none did.
    """
    plain = Config(normalize_obs=False, normalize_reward=False)
    return Experiment.of(plain, env="CartPole-v1", steps=40_000)


def paper() -> Experiment:
    """The paper's HalfCheetah run."""
    return Experiment.of(Config(), env="HalfCheetah-v5", steps=1_000_000)
