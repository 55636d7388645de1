"""Twin delayed deep deterministic policy gradient (TD3): actor-critic that resists over-estimation.

Off-policy control with continuous actions by a deterministic policy. Maximising over noisy values
picks the noise; three small measures keep the critics from believing their own errors.

Compared with DDPG:
- two critics learn from one target, the smaller of their values (clipped double Q-learning);
- the policy and all target networks move at every second update only (delayed updates);
- the target action is blurred by clipped noise, so that narrow peaks of the critics lose weight.

| variable | paper | shape | unit |
|---|---|---|---|
| actor, critic, target_actor, target_critic | pi_phi, Q_theta_i, pi_phi', Q_theta'_i | | |
| exploration_noise | sigma of N(0, sigma), acting | scalar | half widths of the action box |
| target_noise, target_noise_clip | sigma-tilde, c | scalar | half widths of the action box |
| policy_delay | d | scalar | updates |
| tau | tau | scalar | Polyak step of the targets |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esscher.critics import ScalarCritic, target_of
from esscher.distributions.policies import DeterministicPolicy
from esscher.errors import require
from esscher.experience import Replay
from esscher.experiment import EvaluationConfig, Experiment
from esscher.functional.returns import td_target
from esscher.method import Method, Paper, act_by, continuous_only
from esscher.nn.mlp import Activation
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim, polyak
from esscher.types import Action, Metrics, Spec, Transitions

PAPER = Paper(
    title="Addressing Function Approximation Error in Actor-Critic Methods",
    year=2018,
    arxiv="1802.09477",
    sections="sec. 4.2, 5.2 and 5.3, algorithm 1",
    purpose="Continuous control with a deterministic policy and few settings, as a baseline.",
    claim="The smaller of two critics, delayed policy updates and smoothed target actions curb "
    "over-estimation, and with them DDPG's successor exceeds the methods of its time on MuJoCo.",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of TD3; defaults from the authors' current code unless a line says otherwise."""

    learning_rate: float = 3e-4
    """Adam step of critics and actor (the paper: 1e-3, with smaller batches). Higher: faster, until
    the critics diverge."""
    discount: float = 0.99
    """Weight of a reward one step later, in [0, 1)."""
    tau: float = 0.005
    """Polyak step of the target networks, in (0, 1]."""
    policy_delay: int = 2
    """Updates of the critics for each move of the policy and of all targets. Higher: the policy
    climbs critics that have settled more, but climbs less often."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions while training, in half widths of the box."""
    target_noise: float = 0.2
    """Standard deviation of the noise on target actions. Higher: smoother values, less sharp."""
    target_noise_clip: float = 0.5
    """The target noise is clipped to plus or minus this."""
    num_critics: int = 2
    """Critics whose smaller value is the target; 1 over-estimates (the paper's ablation)."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critics (the paper: 400 and 300)."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    batch_size: int = 256
    """Transitions an update (the paper: 100)."""
    buffer_size: int = 1_000_000
    """Transitions kept."""
    warmup: int = 25_000
    """Environment steps of uniformly random actions before the first update. 25,000 is the authors'
    code on every task; the paper has 10,000 on HalfCheetah and Ant and 1,000 elsewhere."""
    updates_per_step: float = 1.0
    """Updates per environment step. Higher: fewer steps needed, more time a step."""

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        require("tau", self.tau, 0 < self.tau <= 1, "in (0, 1]")
        require("policy_delay", self.policy_delay, self.policy_delay >= 1, ">= 1")
        require("num_critics", self.num_critics, self.num_critics >= 1, ">= 1")
        for name in ("exploration_noise", "target_noise", "target_noise_clip", "warmup"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")


class TD3(Method):
    """See the module; `update` is one iteration of the paper's algorithm 1."""

    Config = Config

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "td3")
        obs_dim, action_dim, device = spec.obs_dim, spec.action_dim, runtime.device
        self.actor = DeterministicPolicy(obs_dim, action_dim, cfg.hidden, cfg.activation).to(device)
        self.critic = ScalarCritic(
            obs_dim, action_dim, cfg.hidden, cfg.activation, ensemble=cfg.num_critics
        ).to(device)
        self.target_actor, self.target_critic = target_of(self.actor), target_of(self.critic)
        self.actor_opt = Optim(self.actor.parameters(), cfg.learning_rate)
        self.critic_opt = Optim(self.critic.parameters(), cfg.learning_rate)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> DeterministicPolicy:
        return self.actor

    def experience(self) -> Replay:
        cfg = self.cfg
        return Replay(
            self.spec,
            cfg.buffer_size,
            cfg.batch_size,
            warmup=cfg.warmup,
            updates_per_step=cfg.updates_per_step,
            device=self.runtime.device,
        )

    def act(self, obs: Float[Tensor, "n o"], *, explore: bool) -> Action:
        action = act_by(self.actor, obs, explore=False)
        if explore:
            noise = self.cfg.exploration_noise * torch.randn_like(action)
            action = (action + noise).clamp(-1, 1)
        return Action(value=action)

    def update(self, batch: Transitions, step: int) -> Metrics:
        return self._descend(batch, (step + 1) % self.cfg.policy_delay == 0)

    def descend(self, batch: Transitions, move_policy: bool) -> Metrics:
        """One step of the critics; then, when its turn has come, of the policy and all targets."""
        critic_loss, q_mean = self.critic_loss(
            batch.obs, batch.action, batch.reward, batch.next_obs, batch.terminated
        )
        self.critic_opt.minimize(critic_loss)
        metrics = {"critic_loss": critic_loss.detach(), "q_mean": q_mean}
        if move_policy:
            actor_loss = self.actor_loss(batch.obs)
            self.actor_opt.minimize(actor_loss)
            polyak(self.target_critic, self.critic, self.cfg.tau)
            polyak(self.target_actor, self.actor, self.cfg.tau)
            metrics["actor_loss"] = actor_loss.detach()
        return metrics

    def critic_loss(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        reward: Float[Tensor, "b"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Squared Bellman error, summed over critics, and the mean value."""
        target = self.critic_target(reward, next_obs, terminated)
        q = self.critic(obs, action).mean
        return (q - target).square().mean(-1).sum(), q.detach().mean()

    @torch.no_grad()
    def critic_target(
        self,
        reward: Float[Tensor, "b"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
    ) -> Float[Tensor, "b"]:
        """Target y = r + discount min_i Q'_i(s', clip(pi'(s') + clip(noise))), sec. 4.2 and 5.3."""
        cfg = self.cfg
        mode = self.target_actor(next_obs).mode()
        noise = cfg.target_noise * torch.randn_like(mode)
        noise = noise.clamp(-cfg.target_noise_clip, cfg.target_noise_clip)
        next_value = self.target_critic(next_obs, (mode + noise).clamp(-1, 1)).lower("min")
        return td_target(reward, next_value, terminated, cfg.discount)

    def actor_loss(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, ""]:
        """-E[Q_1(s, pi(s))]: the policy climbs the first critic, not the smaller one."""
        return -self.critic(obs, self.actor(obs).mode()).lower("first").mean()


def smoke() -> Experiment:
    """A few hundred updates of a small network: does everything run?"""
    return Experiment.of(
        Config(hidden=(32, 32), batch_size=32, buffer_size=2_000, warmup=100),
        env="Pendulum-v1",
        steps=400,
        evaluation=EvaluationConfig(every=200, episodes=2),
    )


def paper() -> Experiment:
    """The paper's HalfCheetah run."""
    return Experiment.of(Config(), env="HalfCheetah-v5", steps=1_000_000)
