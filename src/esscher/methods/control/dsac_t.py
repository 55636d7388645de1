"""Distributional soft actor-critic with three refinements (DSAC-T, also DSACv2).

For control where plain SAC over-estimates values or wants its rewards scaled by hand: the critics
predict a Gaussian over the soft return, and the errors of a batch are measured in units of its
spread. The standard deviation can be read out as uncertainty of the return.

Compared with SAC:
- each critic gives the mean and the standard deviation of the return, learned by a likelihood;
- refinement 1, expected-value substitution: the mean chases the target's mean, not a sample of it;
- refinement 2, twin distributions: the twin with the smaller mean supplies mean and deviation;
- refinement 3, variance-based adjustment: errors are clipped at xi standard deviations, and the
  critics' gradient is multiplied by their mean variance, so that reward units cancel;
- target actions come from a slowly moving copy of the policy; policy, temperature and all targets
  move at every second update; policy and temperature see the critics from before their step.

| variable | paper | shape | unit |
|---|---|---|---|
| values.mean, values.std | Q_theta_i, sigma_theta_i | e b | return |
| mean_target | y_q | b | return |
| sampled_target | y_z | b | return |
| std_scale | running mean of sigma_i, bound b_i = xi times it | e | return |
| gradient_scale | omega_i | e | squared return |
| tau, tau_b | Polyak steps of the targets, of the running scales | scalar | |
| alpha | alpha | scalar | reward per nat |
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from esscher.critics import GaussianCritic, target_of
from esscher.distributions.policies import TanhNormalPolicy
from esscher.errors import require
from esscher.experience import Replay
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.distributional import gaussian_critic_huber_terms, gaussian_critic_terms
from esscher.functional.duals import temperature_terms
from esscher.functional.returns import td_target
from esscher.method import Method, Paper, act_by, continuous_only
from esscher.nn.mlp import Activation
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, returns_of, within
from esscher.registry import load_method
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim, polyak
from esscher.types import Action, Metrics, Spec, Transitions

PAPER = Paper(
    title="Distributional Soft Actor-Critic with Three Refinements",
    year=2023,
    arxiv="2310.05858",
    sections="sec. 4, eq. 18 to 27 (numbers second-hand)",
    purpose="Continuous control without scaling rewards by hand, with the return's uncertainty.",
    claim="The critic learns the distribution of returns, and learning does not depend on the scale "
    "of the reward, where DSACv1 and SAC do.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DSAC-T; defaults from the authors' MuJoCo script."""

    critic_learning_rate: float = 1e-4
    """Adam step of the critics."""
    actor_learning_rate: float = 1e-4
    """Adam step of the policy."""
    alpha_learning_rate: float = 3e-4
    """Adam step of the temperature."""
    discount: float = 0.99
    """Weight of a reward one step later, in [0, 1); the authors' Hopper script has 0.999."""
    tau: float = 0.005
    """Polyak step of the target critics and the target policy, in (0, 1]."""
    tau_b: float | None = None
    """Step of the running scales, in (0, 1]; None: tau."""
    delay_update: int = 2
    """Critic updates per move of policy, temperature and targets."""
    xi: float = 3.0
    """Targets are clipped at this many mean standard deviations. Higher: less biased, less safe."""
    epsilon: float = 0.1
    """Added to the powers of sigma that divide, so that a certain critic takes bounded steps."""
    epsilon_omega: float = 0.1
    """Added to the gradient scale omega, so that a certain critic still learns."""
    gradient_scale: Literal["squared_mean", "mean_square"] = "squared_mean"
    """omega: the squared running mean of sigma (the code) or a running mean of sigma^2 (the paper)."""
    critic_loss: Literal["paper", "huber"] = "paper"
    """paper: the likelihood's gradient. huber: the authors' code since July 2025."""
    huber_second_moment_factor: float = 2.0
    """k of the Huber form. 2 makes sigma a standard deviation; the authors' code has 1, which
    shrinks sigma by sqrt(2) at each backup."""
    mean_target: Literal["expected", "clipped", "sampled"] = "expected"
    """What the mean chases: y_q (refinement 1), or the ablation y_z clipped, or DSACv1's plain y_z."""
    num_critics: int = 2
    """2: twin distributions (refinement 2); 1: the ablation, and DSACv1."""
    variance_adjustment: bool = True
    """Refinement 3; False takes the fixed bound below and no gradient scale."""
    fixed_bound: float = 20.0
    """Clip bound without refinement 3, in returns (DSACv1's class default; its script passes 1)."""
    initial_log_alpha: float = 1.0
    """Logarithm of the first temperature: alpha starts at e (the authors' SB3 port starts at 1)."""
    alpha: float | None = None
    """Fixed temperature, reward per nat, >= 0; None learns it."""
    target_entropy: float | None = None
    """Entropy that the learned temperature holds, nats; None: minus the number of components."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this; the method's point is that it hardly matters."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the hidden layers of policy and critics."""
    activation: Activation = "gelu"
    """Of the hidden layers."""
    log_std_range: tuple[float, float] = (-20.0, 0.5)
    """Clamp of the policy's log standard deviation, before tanh."""
    batch_size: int = 256
    """Transitions an update."""
    buffer_size: int = 1_000_000
    """Transitions kept."""
    warmup: int = 10_000
    """Environment steps of uniformly random actions before the first update."""
    updates_per_step: float = 0.05
    """Updates per environment step: the authors collect 20 steps for each. 1 learns from far fewer
    steps, at more time a step."""

    def __post_init__(self) -> None:
        for name in ("critic_learning_rate", "actor_learning_rate", "alpha_learning_rate"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("xi", "fixed_bound", "reward_scale", "huber_second_moment_factor"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("epsilon", "epsilon_omega", "warmup"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        require("tau", self.tau, 0 < self.tau <= 1, "in (0, 1]")
        require("tau_b", self.tau_b, self.tau_b is None or 0 < self.tau_b <= 1, "in (0, 1]")
        require("delay_update", self.delay_update, self.delay_update >= 1, ">= 1")
        require("num_critics", self.num_critics, self.num_critics >= 1, ">= 1")
        require("alpha", self.alpha, self.alpha is None or self.alpha >= 0, "None or >= 0")
        low, high = self.log_std_range
        require("log_std_range", self.log_std_range, low < high, "increasing")


class DSACT(Method):
    """See the module; `update` is one iteration of the paper's algorithm."""

    Config = Config

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "dsac_t")
        obs_dim, action_dim, device = spec.obs_dim, spec.action_dim, runtime.device
        self.actor = TanhNormalPolicy(
            obs_dim, action_dim, cfg.hidden, cfg.activation, cfg.log_std_range
        ).to(device)
        self.critic = GaussianCritic(
            obs_dim, action_dim, cfg.hidden, cfg.activation, ensemble=cfg.num_critics
        ).to(device)
        self.target_actor, self.target_critic = target_of(self.actor), target_of(self.critic)
        initial = cfg.initial_log_alpha if cfg.alpha is None else torch.tensor(cfg.alpha).log()
        self.log_alpha = torch.tensor(float(initial), device=device, requires_grad=True)
        self.target_entropy = (
            -float(action_dim) if cfg.target_entropy is None else cfg.target_entropy
        )
        # Running means of sigma and sigma^2; zero says that no batch was seen yet.
        self.std_scale = torch.zeros(cfg.num_critics, device=device)
        self.variance_scale = torch.zeros(cfg.num_critics, device=device)
        self.actor_opt = Optim(self.actor.parameters(), cfg.actor_learning_rate)
        self.critic_opt = Optim(self.critic.parameters(), cfg.critic_learning_rate)
        self.alpha_opt = Optim([self.log_alpha], cfg.alpha_learning_rate)
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
        return self._descend(batch, step % self.cfg.delay_update == 0)

    def descend(self, batch: Transitions, move_policy: bool) -> Metrics:
        """One step of the critics and, when their turn has come, of all else."""
        cfg, alpha = self.cfg, self.log_alpha.exp().detach()
        critic_loss, scales, metrics = self.critic_loss(
            batch.obs, batch.action, batch.reward, batch.next_obs, batch.terminated, alpha
        )
        if move_policy:
            # Before the critics' step: the policy climbs the critics that this batch found. The
            # critics' loss does not read the policy, so the order of the two steps is free.
            actor_loss, logp = self.actor_loss(batch.obs, alpha)
            self.actor_opt.minimize(actor_loss)
            if cfg.alpha is None:
                terms = temperature_terms(self.log_alpha, logp, self.target_entropy, form="log")
                self.alpha_opt.minimize(terms.mean())
            metrics |= {"actor_loss": actor_loss.detach(), "entropy": -logp.mean()}
        self.critic_opt.minimize(critic_loss)
        self.std_scale.copy_(scales[0])
        self.variance_scale.copy_(scales[1])
        if move_policy:
            polyak(self.target_critic, self.critic, cfg.tau)
            polyak(self.target_actor, self.actor, cfg.tau)
        return {**metrics, "alpha": alpha}

    def critic_loss(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        reward: Float[Tensor, "b"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
        alpha: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], tuple[Tensor, Tensor], Metrics]:
        """Surrogate of the critics (sum over critics), the new running scales, and metrics."""
        cfg = self.cfg
        values = self.critic(obs, action)
        std = values.std.detach()
        with torch.no_grad():
            next_action, next_logp = self.target_actor(next_obs).rsample_with_log_prob()
            next_mean, next_std = self.target_critic(next_obs, next_action).smallest()
            noise = torch.randn_like(next_std).clamp(-3, 3)
            soft = alpha * next_logp
            scaled = cfg.reward_scale * reward
            mean_target = td_target(scaled, next_mean - soft, terminated, cfg.discount)
            sampled = next_mean + next_std * noise - soft
            sampled_target = td_target(scaled, sampled, terminated, cfg.discount)
            std_scale = self.running(self.std_scale, std.mean(-1))
            variance_scale = self.running(self.variance_scale, std.square().mean(-1))
            omega = std_scale.square() if cfg.gradient_scale == "squared_mean" else variance_scale
            bound = (
                cfg.xi * std_scale if cfg.variance_adjustment else cfg.fixed_bound + 0 * std_scale
            )
            bound = bound.unsqueeze(-1)
            if cfg.mean_target == "sampled":
                mean_target = sampled_target
            elif cfg.mean_target == "clipped":
                mean = values.mean.detach()
                mean_target = mean + (sampled_target - mean).clamp(-bound, bound)
        if cfg.critic_loss == "huber":
            # Without the adjustment a weight of one: sigma^2 + epsilon cancels in the form's ratio.
            own = std.square() + cfg.epsilon
            scale = omega.unsqueeze(-1) if cfg.variance_adjustment else own
            loss = gaussian_critic_huber_terms(
                values.mean,
                values.std,
                mean_target,
                sampled_target,
                bound,
                scale,
                second_moment_factor=cfg.huber_second_moment_factor,
                epsilon=cfg.epsilon,
            ).mean(-1)
        else:
            terms = gaussian_critic_terms(
                values.mean, values.std, mean_target, sampled_target, bound, cfg.epsilon
            )
            weight = (
                omega + cfg.epsilon_omega if cfg.variance_adjustment else torch.ones_like(omega)
            )
            loss = weight * terms.mean(-1)
        # The surrogate's value means nothing: report the error and the spread instead.
        error = (mean_target - values.mean).detach().abs().mean()
        metrics = {"td_error": error, "q_mean": values.mean.detach().mean(), "q_std": std.mean()}
        return loss.sum(), (std_scale, variance_scale), metrics

    def running(self, scale: Float[Tensor, "e"], now: Float[Tensor, "e"]) -> Float[Tensor, "e"]:
        """Exponential average that starts at its first observation."""
        tau_b = self.cfg.tau if self.cfg.tau_b is None else self.cfg.tau_b
        return torch.where(scale == 0, now, torch.lerp(scale, now, tau_b))

    def actor_loss(
        self, obs: Float[Tensor, "b o"], alpha: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b"]]:
        """E[alpha log pi - min_i Q_i] on reparameterised actions, and log pi without gradient."""
        action, logp = self.actor(obs).rsample_with_log_prob()
        return (alpha * logp - self.critic(obs, action).lower("min")).mean(), logp.detach()


def dsac_v1(**changes: object) -> Config:
    """The method before its refinements: one critic, sampled targets, a fixed clip bound."""
    before = {"mean_target": "sampled", "num_critics": 1, "variance_adjustment": False}
    return Config(**{**before, **changes})  # type: ignore[arg-type]


def smoke() -> Experiment:
    """A few hundred updates of a small network: does everything run?"""
    small = Config(
        hidden=(32, 32), batch_size=32, buffer_size=2_000, warmup=100, updates_per_step=1.0
    )
    evaluation = EvaluationConfig(every=200, episodes=2)
    return Experiment.of(small, env="Pendulum-v1", steps=400, evaluation=evaluation)


def paper() -> Experiment:
    """The authors' Humanoid run: 1.5 million updates, 20 environment steps each."""
    return Experiment.of(Config(), env="Humanoid-v5", steps=30_000_000)


def humanoid_on_a_desk() -> Experiment:
    """The same task at one update a step: days become hours."""
    return Experiment.of(Config(updates_per_step=1.0), env="Humanoid-v5", steps=1_000_000)


def proof() -> Proof:
    """The sheet's miniature: an exact return distribution, and indifference to reward units."""
    return Proof(
        claims=(
            Claim(
                name="exact return distribution",
                statement="Rewards of N(0.5, 1) for ever, discount 0.9: the return is N(5, 2.294^2). "
                "The critic finds it, in units of the reward, at reward scales 1 and 10.",
                arms={
                    "scale 1": lambda seed: _gaussian_reward(1.0),
                    "scale 10": lambda seed: _gaussian_reward(10.0),
                    "huber k = 1": lambda seed: _gaussian_reward(1.0, "huber", 1.0),
                },
                measure=_critic_figures,
                judge=_judge_distribution,
            ),
            Claim(
                name="reward scales",
                statement="On Pendulum-v1 DSAC-T returns much the same at reward scales 0.01, 1 and "
                "10 (worst within 100 of best), and its worst scale beats DSACv1's worst.",
                arms={
                    f"{name} x{scale:g}": partial(_pendulum, name, scale)
                    for name in ("dsac_t", "dsac_v1", "sac")
                    for scale in SCALES
                },
                measure=returns_of,
                judge=_judge_scales,
                num_seeds=2,
            ),
        ),
        notes="Exact return distribution: the sheet's 6,000 Adam steps of 3e-3 can move a parameter "
        "by 18 at most, and reward scale 10 needs 50; with targets that move at every second update "
        "they are also not converged. Run here: 20,000 updates of 1e-2, both scales alike. "
        "Reward scales: 20,000 steps, where the sheet estimates 6,000. The temperature starts at e "
        "and moves at every second update, so 5,000 updates of 1e-3 bring it to 0.2 at best; scale "
        "0.01 wants less than 0.01, and until then entropy outweighs the reward, for DSACv1 alike.",
    )


SCALES = (0.01, 1.0, 10.0)


def _gaussian_reward(
    scale: float, critic_loss: Literal["paper", "huber"] = "paper", factor: float = 2.0
) -> Experiment:
    cfg = Config(
        critic_learning_rate=1e-2,
        discount=0.9,
        alpha=0.0,
        reward_scale=scale,
        critic_loss=critic_loss,
        huber_second_moment_factor=factor,
        hidden=(),
        warmup=1_000,
        buffer_size=30_000,
        updates_per_step=1.0,
    )
    env = EnvConfig(id="esscher.envs:GaussianReward", max_episode_steps=100)
    return _tiny(cfg, env, 21_000, every=0, episodes=1)


def _pendulum(name: str, scale: float, seed: int) -> Experiment:
    common = {"hidden": (64, 64), "warmup": 1_000, "buffer_size": 10_000, "reward_scale": scale}
    if name == "sac":
        cfg = load_method("sac").Config(learning_rate=1e-3, **common)
    else:
        rates = dict.fromkeys(
            ("critic_learning_rate", "actor_learning_rate", "alpha_learning_rate"), 1e-3
        )
        make = dsac_v1 if name == "dsac_v1" else Config
        cfg = make(updates_per_step=1.0, **rates, **common)
    return _tiny(cfg, EnvConfig(id="Pendulum-v1"), 20_000, every=2_000, episodes=10)


def _tiny(cfg: object, env: EnvConfig, steps: int, every: int, episodes: int) -> Experiment:
    return Experiment.of(
        cfg,
        env=env,
        steps=steps,
        evaluation=EvaluationConfig(every=every, episodes=episodes),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _critic_figures(run: FinishedRun) -> dict[str, float]:
    """Mean and deviation of the return over the last fifth of training, in units of the reward."""
    scale, rows = run.experiment.method.reward_scale, run.rows("train")
    last = rows[-len(rows) // 5 :]
    means = {name: sum(row[name] for row in last) / len(last) for name in ("q_mean", "q_std")}
    return {"mean": means["q_mean"] / scale, "std": means["q_std"] / scale}


def _judge_distribution(figures: Figures) -> list[Check]:
    average = {arm: {k: sum(v) / len(v) for k, v in f.items()} for arm, f in figures.items()}
    checks = []
    for arm in ("scale 1", "scale 10"):
        for seed, value in enumerate(figures[arm]["std"]):
            checks.append(within(f"std, {arm}, seed {seed}", value, 2.17, 2.41))
        for seed, value in enumerate(figures[arm]["mean"]):
            checks.append(within(f"mean, {arm}, seed {seed}", value, 4.3, 5.05))
    for name in ("std", "mean"):
        ratio = average["scale 10"][name] / average["scale 1"][name]
        checks.append(within(f"{name}, scale 10 over scale 1", ratio, 0.97, 1.03))
    biased = average["huber k = 1"]["std"]
    checks.append(within("std of the Huber form with k = 1 (its bias: 0.917)", biased, 0.8, 1.0))
    return checks


def _judge_scales(figures: Figures) -> list[Check]:
    means = {arm: sum(f["return"]) / len(f["return"]) for arm, f in figures.items()}
    own = [means[f"dsac_t x{scale:g}"] for scale in SCALES]
    before = [means[f"dsac_v1 x{scale:g}"] for scale in SCALES]
    gap, lead = max(own) - min(own), min(own) - min(before)
    return [
        Check("DSAC-T, best scale minus worst", gap, "< 100", gap < 100),
        Check("worst scale, DSAC-T minus DSACv1", lead, "> 0", lead > 0),
    ]
