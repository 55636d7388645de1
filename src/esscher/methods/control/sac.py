"""Soft actor-critic: maximise reward plus entropy, with the price of entropy learned.

Off-policy control with continuous actions that needs no tuning of exploration: the temperature is
the dual variable of the constraint that the policy's mean entropy is at least a target.

Compared with TD3:
- the policy is stochastic, and its log-probability enters the critic target and the actor loss;
- target actions come from the current policy, without added noise;
- the policy moves at every update, not at every second one.

| variable | paper | shape | unit |
|---|---|---|---|
| alpha, log_alpha | alpha | scalar | reward per nat |
| target_entropy | H-bar | scalar | nats, of actions in (-1, 1) |
| tau | tau | scalar | Polyak step of the target critics |
| actor, critic, target_critic | pi_phi, Q_theta_i, Q_theta-bar_i | | |
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esscher.critics import Aggregate, ScalarCritic, target_of
from esscher.distributions.policies import TanhNormalPolicy
from esscher.errors import require
from esscher.experience import Replay
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.duals import temperature_terms
from esscher.functional.returns import td_target
from esscher.method import Method, Paper, act_by, continuous_only
from esscher.nn.mlp import Activation
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, returns_of, within
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim, polyak
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Action, Metrics, Spec, Transitions

PAPER = Paper(
    title="Soft Actor-Critic Algorithms and Applications",
    year=2018,
    arxiv="1812.05905",
    sections="sec. 4 and 5, eq. 5, 6, 17 and 18",
    purpose="Sample-efficient continuous control without tuning exploration.",
    claim="A learned temperature holds the policy's entropy at its target and solves the constrained "
    "problem; control is sample-efficient and stable across seeds.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SAC; defaults from the authors' code unless a line says otherwise."""

    learning_rate: float = 3e-4
    """Adam step of critics, actor and temperature. Higher: faster, until the critics diverge."""
    discount: float = 0.99
    """Weight of a reward one step later, in [0, 1)."""
    tau: float = 0.005
    """Polyak step of the target critics, in (0, 1]; 1 copies (hard updates)."""
    target_update_interval: int = 1
    """Updates between moves of the target critics (1000 with tau 1: the paper's hard updates)."""
    alpha: float | None = None
    """Fixed temperature, reward per nat, >= 0; None learns it."""
    initial_alpha: float = 1.0
    """Where the learned temperature starts, > 0."""
    target_entropy: float | None = None
    """Entropy that the learned temperature holds, nats; None: minus the number of components."""
    temperature_loss: Literal["log", "paper"] = "log"
    """log: -log_alpha (log pi + H), as in most ports; paper: -alpha (log pi + H), eq. 18. Same
    fixed point, gradients differ by the factor alpha."""
    num_critics: int = 2
    """Critics whose aggregate is believed; 1 over-estimates (the paper's ablation)."""
    actor_q: Aggregate = "min"
    """What the actor climbs: min (the paper), mean (the authors' last code) or first."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this; with a fixed temperature it is 1 / alpha in another form."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    batch_size: int = 256
    """Transitions an update."""
    buffer_size: int = 1_000_000
    """Transitions kept (from memory of the paper's table; the code leaves it to its caller)."""
    warmup: int = 10_000
    """Environment steps of uniformly random actions before the first update."""
    updates_per_step: float = 1.0
    """Updates per environment step. Higher: fewer steps needed, more time a step."""

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        require("tau", self.tau, 0 < self.tau <= 1, "in (0, 1]")
        interval = self.target_update_interval
        require("target_update_interval", interval, interval >= 1, ">= 1")
        require("alpha", self.alpha, self.alpha is None or self.alpha >= 0, "None or >= 0")
        require("initial_alpha", self.initial_alpha, self.initial_alpha > 0, "> 0")
        require("num_critics", self.num_critics, self.num_critics >= 1, ">= 1")
        require("reward_scale", self.reward_scale, self.reward_scale > 0, "> 0")
        require("warmup", self.warmup, self.warmup >= 0, ">= 0")


class SAC(Method):
    """See the module; `update` is one iteration of the paper's algorithm 1."""

    Config = Config

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "sac")
        obs_dim, action_dim, device = spec.obs_dim, spec.action_dim, runtime.device
        self.actor = TanhNormalPolicy(obs_dim, action_dim, cfg.hidden, cfg.activation).to(device)
        self.critic = ScalarCritic(
            obs_dim, action_dim, cfg.hidden, cfg.activation, ensemble=cfg.num_critics
        ).to(device)
        self.target_critic = target_of(self.critic)
        initial = cfg.initial_alpha if cfg.alpha is None else cfg.alpha
        self.log_alpha = torch.tensor(initial, device=device).log().requires_grad_()
        self.target_entropy = (
            -float(action_dim) if cfg.target_entropy is None else cfg.target_entropy
        )
        self.actor_opt = Optim(self.actor.parameters(), cfg.learning_rate)
        self.critic_opt = Optim(self.critic.parameters(), cfg.learning_rate)
        self.alpha_opt = Optim([self.log_alpha], cfg.learning_rate)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> TanhNormalPolicy:
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
        return Action(value=act_by(self.actor, obs, explore=explore))

    def update(self, batch: Transitions, step: int) -> Metrics:
        move_target = (step + 1) % self.cfg.target_update_interval == 0
        return self._descend(batch, move_target)

    def descend(self, batch: Transitions, move_target: bool) -> Metrics:
        """One step of critics, actor and temperature, in this order, and of the target critics."""
        alpha = self.log_alpha.exp().detach()
        critic_loss, q_mean = self.critic_loss(
            batch.obs, batch.action, batch.reward, batch.next_obs, batch.terminated, alpha
        )
        self.critic_opt.minimize(critic_loss)
        actor_loss, logp = self.actor_loss(batch.obs, alpha)
        self.actor_opt.minimize(actor_loss)
        if self.cfg.alpha is None:
            form, target = self.cfg.temperature_loss, self.target_entropy
            terms = temperature_terms(self.log_alpha, logp, target, form=form)
            self.alpha_opt.minimize(terms.mean())
        if move_target:
            polyak(self.target_critic, self.critic, self.cfg.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q_mean": q_mean,
            "alpha": alpha,
            "entropy": -logp.mean(),
        }

    def critic_loss(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        reward: Float[Tensor, "b"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
        alpha: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Squared soft Bellman error, summed over critics (eq. 5), and the mean value."""
        with torch.no_grad():
            next_action, next_logp = self.actor(next_obs).rsample_with_log_prob()
            next_q = self.target_critic(next_obs, next_action).lower("min")
            next_value = next_q - alpha * next_logp
            scaled = self.cfg.reward_scale * reward
            target = td_target(scaled, next_value, terminated, self.cfg.discount)
        q = self.critic(obs, action).mean
        return 0.5 * (q - target).square().mean(-1).sum(), q.detach().mean()

    def actor_loss(
        self, obs: Float[Tensor, "b o"], alpha: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b"]]:
        """E[alpha log pi - Q] on reparameterised actions (eq. 9), and log pi without gradient."""
        action, logp = self.actor(obs).rsample_with_log_prob()
        q = self.critic(obs, action).lower(self.cfg.actor_q)
        return (alpha * logp - q).mean(), logp.detach()


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
    return Experiment.of(Config(), env="HalfCheetah-v5", steps=3_000_000)


def proof() -> Proof:
    """The sheet's miniature: an exact optimum, the direction of the temperature, and learning."""
    return Proof(
        claims=(
            Claim(
                name="exact optimum",
                statement="One step, r = -10 a^2, entropy held at -1: the best policy is a Gaussian "
                "of variance alpha / 20, so alpha = 0.1585 and std = 0.0890.",
                arms={"sac": _bandit},
                measure=_policy_figures,
                judge=_judge_bandit,
            ),
            Claim(
                name="zero reward",
                statement="With nothing to gain, entropy rises above its target of -1 towards the "
                "uniform policy's log 2, and the temperature decays towards 0.",
                arms={"sac": _zero_reward},
                measure=_policy_figures,
                judge=_judge_zero_reward,
            ),
            Claim(
                name="pendulum",
                statement="Pendulum-v1 is learned in 8,000 steps on every seed; without entropy "
                "(alpha = 0) the mean is lower or the spread of seeds larger.",
                arms={"sac": _pendulum, "alpha = 0": lambda seed: _pendulum(seed, alpha=0.0)},
                measure=returns_of,
                judge=_judge_pendulum,
            ),
        )
    )


def _bandit(seed: int) -> Experiment:
    cfg = Config(discount=0.0, learning_rate=3e-3, hidden=(64, 64), warmup=500, buffer_size=10_000)
    return _tiny(cfg, EnvConfig(id="esscher.envs:QuadraticBandit"), 6_500)


def _zero_reward(seed: int) -> Experiment:
    cfg = Config(learning_rate=3e-3, hidden=(64, 64), warmup=500, buffer_size=10_000)
    env = EnvConfig(id="esscher.envs:ZeroReward", max_episode_steps=100)
    return _tiny(cfg, env, 3_500)


def _pendulum(seed: int, alpha: float | None = None) -> Experiment:
    cfg = Config(hidden=(64, 64), warmup=1_000, buffer_size=10_000, alpha=alpha)
    return _tiny(cfg, EnvConfig(id="Pendulum-v1"), 8_000, every=1_000)


def _tiny(cfg: Config, env: EnvConfig, steps: int, every: int = 0) -> Experiment:
    return Experiment.of(
        cfg,
        env=env,
        steps=steps,
        evaluation=EvaluationConfig(every=every),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _policy_figures(run: FinishedRun) -> dict[str, float]:
    """Temperature of the learner, and moments of its policy from 100,000 samples in one state."""
    method = run.learner
    seed_phase(0, 0, Phase.EVALUATE)
    with torch.no_grad():
        action, logp = method.actor(torch.zeros(100_000, 1)).rsample_with_log_prob()
    return {
        "alpha": float(method.log_alpha.detach().exp()),
        "std": float(action.std()),
        "mean": float(action.mean()),
        "entropy": float(-logp.mean()),
    }


def _judge_bandit(figures: Figures) -> list[Check]:
    wanted = {
        "alpha": (0.1585, 0.012),
        "std": (0.089, 0.008),
        "mean": (0, 0.02),
        "entropy": (-1, 0.06),
    }
    return [
        within(f"{name}, seed {seed}", value, centre - width, centre + width)
        for name, (centre, width) in wanted.items()
        for seed, value in enumerate(figures["sac"][name])
    ]


def _judge_zero_reward(figures: Figures) -> list[Check]:
    arm = figures["sac"]
    uniform = torch.tensor(2.0).log().item()
    return [
        *(
            within(f"entropy, seed {k}", x, -1, uniform + 0.01)
            for k, x in enumerate(arm["entropy"])
        ),
        *(within(f"alpha, seed {k}", x, 0, 0.05) for k, x in enumerate(arm["alpha"])),
    ]


def _judge_pendulum(figures: Figures) -> list[Check]:
    returns = torch.tensor(figures["sac"]["return"])
    without = torch.tensor(figures["alpha = 0"]["return"])
    worse = bool(without.mean() < returns.mean() or without.std() > returns.std())
    return [
        *(within(f"return, seed {k}", x, -250, 0) for k, x in enumerate(returns.tolist())),
        Check(
            "mean with entropy minus mean without",
            float(returns.mean() - without.mean()),
            "> 0, or the spread without is larger",
            worse,
        ),
    ]
