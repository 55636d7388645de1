"""Multi-agent adversarial imitation (MA-GAIL, MA-AIRL): agents that learn to pass for the experts.

From joint demonstrations, without rewards. Each agent has a discriminator that tells its own choices
from the expert's in its place, and is paid for being taken for the expert; all agents act at once
and improve on what they are paid by PPO.

    J_D,i = E_expert[log D_i] + E_pi[log(1 - D_i)]          the discriminators climb
    r_i   = log D_i - log(1 - D_i) = logit D_i              the agents' reward

    gail: logit D_i = d_i(o, a)
    airl: logit D_i = f_i(o, a, o') - log pi_i(a | o), that is, D_i = exp f_i / (exp f_i + pi_i),
          f_i = g_i(o, a) + discount (1 - terminated) h_i(o') - h_i(o)

Signs: D_i tends to 1 on demonstrations and to 0 on the agents' own steps, and r_i is high where a
step looks like the expert's (MA-GAIL's paper names the classes the other way round, and has costs).
The reward of both is the logit: at the best D it is the log ratio of the expert's to the agent's
occupancy, and its mean over the agent's own steps is -KL(agent | expert), which is 0 at best. That is
MA-AIRL's; its code pays g alone. MA-GAIL's paper pays -log(1 - D), which is positive for any step and
so pays for staying alive; its code pays 2 D - 1.

Compared with GAIL and AIRL of one agent (arXiv 1606.03476, 1710.11248):
- a discriminator, a policy and a value an agent, each on what that agent observes and does, of
  batched networks: the papers' decentralised form, with values on own observations as well;
- g_i is of own observation and choice, as in MA-AIRL's paper (its code: of the observation alone);
- PPO instead of the papers' MACK (Kronecker-factored actor-critic with centralised values), and no
  square of the discriminators' weights in their loss (MA-AIRL's code).

Policies begin as clones of the demonstrations, as in the authors' code: the first rollout is spent
on that. Then follow a few updates of the discriminators alone, because a discriminator that knows
nothing would undo the cloning. Terminated states are worth nothing; truncated ones are bootstrapped
from. The task's own rewards are never read. At MA-AIRL's optimum, f_i = log pi_i of the experts: g_i
is their reward in nats (times their inverse temperature), up to shaping c(o) - discount E[c(o')].

| variable | paper | shape | unit |
|---|---|---|---|
| actor | pi_theta_i | g b a | nats |
| critic | V_phi_i | g b | nats |
| discriminator.choices | d_i(o, .), or g_omega_i(o, .) | g b a | nats |
| discriminator.potential | h_phi_i | g b | nats |
| logit | log D_i - log(1 - D_i) | g b | nats |
| advantage | A-hat_i | g b | deviations, once whitened |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from esscher.distributions import Categorical
from esscher.errors import UserError, require
from esscher.experience import Dataset, OfflineReplay, RolloutBuffer
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.kl import kl_k3_terms
from esscher.functional.reductions import masked_whiten
from esscher.functional.returns import gae
from esscher.functional.surrogates import clipped_ratio_terms
from esscher.method import Method, Paper, act_by
from esscher.nn.mlp import MLP, Activation
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim
from esscher.types import Action, Metrics, Rollout, Spec, Transitions

PAPER = Paper(
    title="Multi-Agent Generative Adversarial Imitation Learning",
    year=2018,
    arxiv="1807.09936",
    sections="sec. 4.1 and 4.2, decentralized; MA-AIRL (arXiv 1907.13220): sec. 4, algorithm 1",
    purpose="Policies of several agents at once, from demonstrations of all of them, as a baseline.",
    claim="A discriminator an agent, trained against its policy, imitates several experts from few "
    "demonstrations better than cloning them.",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MA-GAIL and MA-AIRL; defaults from the authors' code where it has them, else ours."""

    reward: Literal["gail", "airl"] = "gail"
    """gail: the discriminators are free; airl: of the form that recovers a reward."""
    learning_rate: float = 3e-4
    """Adam step of policies and values (the authors': Kronecker-factored steps)."""
    discriminator_learning_rate: float = 1e-3
    """Adam step of the discriminators. Higher: they find the policies out sooner, and what they pay
    changes faster than PPO can follow."""
    discriminator_steps: int = 5
    """Steps of the discriminators a rollout (the authors': 1, of 50,000 rollouts). Higher: fewer
    environment steps needed, until demonstrations are known by heart."""
    batch_size: int = 256
    """Steps from the demonstrations, and as many from the rollout, a step of the discriminators (the
    authors' code: a whole rollout)."""
    cloning_steps: int = 500
    """Steps of cloning, on `batch_size` demonstrated choices each, before everything else; 0: none."""
    head_start: int = 10
    """Rollouts, after that of the cloning, on which the discriminators alone learn."""
    discount: float = 0.99
    """Weight of a reward one step later, in [0, 1)."""
    gae_lambda: float = 0.95
    """Decay of the advantage's trace, in [0, 1]. Higher: less bias from the values, more noise."""
    clip: float = 0.2
    """Policies' ratios pay inside [1 - clip, 1 + clip], in (0, 1]. Higher: larger steps a rollout."""
    entropy_coefficient: float = 0.0
    """Reward for each policy's entropy, per nat, >= 0. Higher: explores longer."""
    rollout_length: int = 1_000
    """Steps of each environment between updates. With many environments, lower it by as much."""
    epochs: int = 4
    """Passes of PPO over each rollout."""
    num_minibatches: int = 4
    """Minibatches a pass."""
    hidden: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers of every network."""
    activation: Activation = "relu"
    """Of the hidden layers."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "discriminator_learning_rate"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        require("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "in [0, 1]")
        require("clip", self.clip, 0 < self.clip <= 1, "in (0, 1]")
        for name in ("cloning_steps", "head_start", "entropy_coefficient"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("discriminator_steps", "rollout_length", "epochs", "num_minibatches"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")


class JointChoices:
    """Independent choices of all agents.

    Args:
        logits: `g b a`, in nats up to a constant for each agent and row.
        shape: of one row's action: `(g,)`, or `()` for the choice of a single agent.
    """

    def __init__(self, logits: Float[Tensor, "g b a"], shape: tuple[int, ...]):
        self.each = Categorical(logits.flatten(0, 1))
        self.shape, self.num_agents = shape, len(logits)

    def mode(self) -> Int[Tensor, "b *g"]:
        return self._joint(self.each.mode())

    def sample(self) -> Int[Tensor, "b *g"]:
        return self._joint(self.each.sample())

    def log_prob(self, x: Int[Tensor, "b *g"]) -> Float[Tensor, "g b"]:
        """Of each agent's own choice."""
        own = own_choices(x)
        return self.each.log_prob(own.flatten()).view(own.shape)

    def entropy(self) -> Float[Tensor, "g b"]:
        """Of each agent's own choice."""
        return self.each.entropy().view(self.num_agents, -1)

    def _joint(self, flat: Int[Tensor, "k"]) -> Int[Tensor, "b *g"]:
        return flat.view(self.num_agents, -1).T.reshape(-1, *self.shape)


class Policies(nn.Module):
    """Each agent's logits, from what it observes."""

    def __init__(self, spec: Spec, cfg: Config):
        super().__init__()
        self.num_agents, self.action_shape = spec.num_agents, spec.action_shape
        self.net = per_agent(spec, cfg, spec.num_actions or 1, orthogonal_gain=0.01)

    def logits(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b a"]:
        return self.net(own_parts(obs, self.num_agents)).to(obs.dtype)

    def forward(self, obs: Float[Tensor, "b o"]) -> JointChoices:
        return JointChoices(self.logits(obs), self.action_shape)


class AgentValues(nn.Module):
    """One value an agent, from what it observes."""

    def __init__(self, spec: Spec, cfg: Config):
        super().__init__()
        self.num_agents = spec.num_agents
        self.net = per_agent(spec, cfg, 1, orthogonal_gain=1.0)

    def forward(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b"]:
        return self.net(own_parts(obs, self.num_agents)).to(obs.dtype).squeeze(-1)


class Discriminators(nn.Module):
    """One an agent; `forward` gives the logit of D, positive where a step looks like the expert's."""

    def __init__(self, spec: Spec, cfg: Config):
        super().__init__()
        self.num_agents, self.discount = spec.num_agents, cfg.discount
        self.choices = per_agent(spec, cfg, spec.num_actions or 1)
        self.potential = per_agent(spec, cfg, 1) if cfg.reward == "airl" else None

    def of_choices(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b a"]:
        """Of every choice of each agent: d (gail) or g (airl)."""
        return self.choices(own_parts(obs, self.num_agents)).to(obs.dtype)

    def forward(
        self,
        obs: Float[Tensor, "b o"],
        action: Int[Tensor, "b *g"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
        logp: Float[Tensor, "g b"],
    ) -> Float[Tensor, "g b"]:
        """Gradient: to the discriminators; to logp, for airl."""
        taken = self.of_choices(obs).gather(-1, own_choices(action).unsqueeze(-1)).squeeze(-1)
        if self.potential is None:
            return taken
        both = own_parts(torch.cat([obs, next_obs]), self.num_agents)
        here, ahead = self.potential(both).to(obs.dtype).squeeze(-1).chunk(2, 1)
        return taken + self.discount * ahead.masked_fill(terminated, 0.0) - here - logp


def per_agent(spec: Spec, cfg: Config, outputs: int, orthogonal_gain: float | None = None) -> MLP:
    """As many networks as agents, of what each observes."""
    sizes = (spec.obs_dim // spec.num_agents, *cfg.hidden, outputs)
    return MLP(sizes, cfg.activation, ensemble=spec.num_agents, orthogonal_gain=orthogonal_gain)


def own_parts(obs: Float[Tensor, "b o"], num_agents: int) -> Float[Tensor, "g b p"]:
    """What each agent observes."""
    return obs.unflatten(-1, (num_agents, -1)).transpose(0, 1)


def own_choices(action: Int[Tensor, "b *g"]) -> Int[Tensor, "g b"]:
    """What each agent did."""
    return action.reshape(len(action), -1).T


class Batch(NamedTuple):
    """What one update learns from."""

    rollout: Rollout
    demonstrations: OfflineReplay
    """To draw from, as many steps as it takes."""


class MAGAIL(Method):
    """See the module; `update` is one iteration of the papers' algorithms 1."""

    Config = Config
    data = "required"
    games = True

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        if spec.num_actions is None:
            raise UserError(
                "ma_gail needs Discrete actions, and this task's are continuous: use odice to learn "
                "from demonstrations of one agent"
            )
        check_minibatches(cfg, spec.num_envs)
        self.actor = Policies(spec, cfg).to(runtime.device)
        self.critic = AgentValues(spec, cfg).to(runtime.device)
        self.discriminator = Discriminators(spec, cfg).to(runtime.device)
        self.actor_opt = Optim(self.actor.parameters(), cfg.learning_rate)
        self.critic_opt = Optim(self.critic.parameters(), cfg.learning_rate)
        self.discriminator_opt = Optim(
            self.discriminator.parameters(), cfg.discriminator_learning_rate
        )
        self._clone = runtime.graph(self.clone)
        self._discriminate = runtime.graph(self.discriminate)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> Policies:
        return self.actor

    def experience(self, data: Dataset) -> RolloutBuffer:
        return _Mixture(self.spec, data, self.cfg, self.runtime.device)

    def act(self, obs: Float[Tensor, "n o"], *, explore: bool) -> Action:
        return Action(value=act_by(self.actor, obs, explore=explore))

    def update(self, batch: Batch, step: int) -> Metrics:
        cfg, demonstrations = self.cfg, batch.demonstrations
        spent_on_cloning = int(cfg.cloning_steps > 0)
        if step < spent_on_cloning:
            # This rollout is none of the clones', and so it teaches nothing more.
            drawn = (demonstrations.sample(cfg.batch_size) for _ in range(cfg.cloning_steps))
            return averaged([self._clone(expert.obs, expert.action) for expert in drawn])
        own = flattened(batch.rollout)
        reports: list[Metrics] = []
        for _ in range(cfg.discriminator_steps):
            index = torch.randint(len(own), (cfg.batch_size,), device=self.runtime.device)
            expert = demonstrations.sample(cfg.batch_size)
            reports.append(self._discriminate(expert, own.index(index)))
        metrics = averaged(reports)
        if step < spent_on_cloning + cfg.head_start:
            return metrics
        columns = self.columns(batch.rollout)
        reports = []
        for _ in range(cfg.epochs):
            order = torch.randperm(len(own), device=self.runtime.device)
            for index in order.view(cfg.num_minibatches, -1):
                minibatch = [column.index_select(1, index) for column in columns]
                reports.append(self._descend(own.obs[index], own.action[index], *minibatch))
        return metrics | averaged(reports)

    def clone(self, obs: Float[Tensor, "b o"], action: Int[Tensor, "b *g"]) -> Metrics:
        """One step of all policies towards the demonstrated choices."""
        loss = self.cloning_loss(obs, action).sum()
        self.actor_opt.minimize(loss)
        return {"cloning_loss": loss.detach()}

    def cloning_loss(
        self, obs: Float[Tensor, "b o"], action: Int[Tensor, "b *g"]
    ) -> Float[Tensor, "g"]:
        """-E[log pi_i(a_i | o_i)], nats."""
        return -self.actor(obs).log_prob(action).mean(1)

    def discriminate(self, expert: Transitions, own: Transitions) -> Metrics:
        """One step of all discriminators, which share no parameter."""
        loss, report = self.discriminator_loss(expert, own)
        # The sum over agents: each one's gradient is that of its own loss.
        self.discriminator_opt.minimize(loss.sum())
        return report

    def discriminator_loss(
        self, expert: Transitions, own: Transitions
    ) -> tuple[Float[Tensor, "g"], Metrics]:
        """-E_expert[log D_i] - E_pi[log(1 - D_i)] of each agent, and metrics."""
        on_expert, on_own = self.logit(expert), self.logit(own)
        loss = -logsigmoid(on_expert).mean(1) - logsigmoid(-on_own).mean(1)
        return loss, {
            "discriminator_loss": loss.detach().sum(),
            "expert_reward": on_expert.detach().mean(),
            "own_reward": on_own.detach().mean(),
        }

    def logit(self, steps: Transitions) -> Float[Tensor, "g b"]:
        """Log D - log(1 - D) of the policies as they are. Gradient: to the discriminators."""
        with torch.no_grad():
            logp = self.actor(steps.obs).log_prob(steps.action)
        parts = (steps.obs, steps.action, steps.next_obs, steps.terminated)
        return self.discriminator(*parts, logp)

    @torch.no_grad()
    def columns(self, rollout: Rollout) -> list[Float[Tensor, "g b"]]:
        """Log-probabilities of the policies that acted, advantages, and returns, by agent.

        A truncated step is bootstrapped from the observation it led to, a terminated one is not.
        """
        cfg, own = self.cfg, flattened(rollout)
        length, num_envs = rollout.terminated.shape

        def over_time(rows: Float[Tensor, "g b"]) -> Float[Tensor, "t k"]:
            """To a column for each agent in each environment, agent after agent."""
            return rows.view(-1, length, num_envs).transpose(0, 1).flatten(1)

        value = self.critic(own.obs)
        traced = gae(
            over_time(self.logit(own)),
            over_time(value),
            over_time(self.critic(own.next_obs)),
            rollout.terminated.repeat(1, len(value)),
            rollout.truncated.repeat(1, len(value)),
            cfg.discount,
            cfg.gae_lambda,
        )
        advantage = traced.view(length, -1, num_envs).transpose(0, 1).flatten(1)
        # Nothing has moved the policies since they acted.
        old_logp = self.actor(own.obs).log_prob(own.action)
        return [old_logp, advantage, advantage + value]

    def descend(
        self,
        obs: Float[Tensor, "b o"],
        action: Int[Tensor, "b *g"],
        old_logp: Float[Tensor, "g b"],
        advantage: Float[Tensor, "g b"],
        returns: Float[Tensor, "g b"],
    ) -> Metrics:
        """One step of all policies and one of all values, on one minibatch."""
        actor_loss, report = self.actor_loss(obs, action, old_logp, advantage)
        self.actor_opt.minimize(actor_loss.sum())
        critic_loss = self.critic_loss(obs, returns)
        self.critic_opt.minimize(critic_loss.sum())
        return report | {"critic_loss": critic_loss.detach().sum()}

    def actor_loss(
        self,
        obs: Float[Tensor, "b o"],
        action: Int[Tensor, "b *g"],
        old_logp: Float[Tensor, "g b"],
        advantage: Float[Tensor, "g b"],
    ) -> tuple[Float[Tensor, "g"], Metrics]:
        """Clipped surrogate of each agent's whitened advantage, less its entropy; and metrics."""
        cfg, choices = self.cfg, self.actor(obs)
        everything = torch.ones_like(advantage, dtype=torch.bool)
        advantage = masked_whiten(advantage, everything, dim=1)
        log_ratio, entropy = choices.log_prob(action) - old_logp, choices.entropy().mean(1)
        surrogate = clipped_ratio_terms(log_ratio, advantage, cfg.clip, cfg.clip).mean(1)
        loss = surrogate - cfg.entropy_coefficient * entropy
        return loss, {
            "actor_loss": loss.detach().sum(),
            "entropy": entropy.detach().mean(),
            # KL from the acting policy, whose actions these are: hence the sign.
            "approx_kl": kl_k3_terms(-log_ratio.detach()).mean(),
        }

    def critic_loss(
        self, obs: Float[Tensor, "b o"], returns: Float[Tensor, "g b"]
    ) -> Float[Tensor, "g"]:
        """Half the mean squared error of each agent's values."""
        return 0.5 * (self.critic(obs) - returns).square().mean(1)

    @torch.no_grad()
    def marginal_reward(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b a"]:
        """G: each agent's reward for every choice of its own, in nats, up to shaping.

        Raises:
            UserError: the discriminators are free and hold no reward.
        """
        if self.cfg.reward != "airl":
            raise UserError(
                f"reward is {self.cfg.reward}, whose discriminators end up at 0: rewards are "
                "recovered by airl"
            )
        return self.discriminator.of_choices(obs)


class _Mixture(RolloutBuffer):
    """The agents' own steps, and with each rollout of them the demonstrations."""

    def __init__(self, spec: Spec, data: Dataset, cfg: Config, device: torch.device):
        super().__init__(spec, cfg.rollout_length, device=device)
        self.demonstrations = OfflineReplay(data, cfg.batch_size, device=device)

    def batches(self, step: int) -> Iterator[Any]:
        for rollout in super().batches(step):
            yield Batch(rollout, self.demonstrations)


def flattened(rollout: Rollout) -> Transitions:
    """The steps of a rollout, one a row."""
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    return Transitions(**{name: getattr(rollout, name).flatten(0, 1) for name in names})


def averaged(reports: list[Metrics]) -> Metrics:
    """The mean of every metric."""
    return {name: torch.stack([report[name] for report in reports]).mean() for name in reports[0]}


def check_minibatches(cfg: Config, num_envs: int) -> None:
    """Refuse rollouts that do not divide into equal minibatches of two steps or more.

    Raises:
        UserError: naming the three numbers.
    """
    rows, count = cfg.rollout_length * num_envs, cfg.num_minibatches
    if rows % count or rows == count:
        raise UserError(
            f"num_minibatches must divide a rollout into parts of 2 steps or more, got {count}, and "
            f"rollout_length {cfg.rollout_length} times env.num {num_envs} is {rows} steps: change "
            "one of them"
        )


def smoke() -> Experiment:
    """A few rollouts in a random game of two agents: does everything run?"""
    cfg = Config(
        hidden=(32, 32),
        batch_size=64,
        cloning_steps=20,
        head_start=1,
        rollout_length=50,
        num_minibatches=2,
        epochs=2,
    )
    return Experiment.of(
        cfg,
        env=EnvConfig(id="esscher.games:RandomGame", max_episode_steps=30),
        data="esscher.datasets:random_game",
        steps=400,
        evaluation=EvaluationConfig(every=200, episodes=2),
    )
