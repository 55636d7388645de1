"""Hybrid natural policy gradient: on-policy trust regions whose critic also learns from logged data.

Control over a finite horizon with continuous actions, where exploration is hard and a modest data
set covers good behaviour. A policy gradient alone never finds the reward; bootstrapping from the data
alone breaks when the critics cannot represent the values. Here one critic is fitted to both at once,
and the natural gradient is taken over the states of both.

Compared with TRPO, which is what remains with `hybrid=False`:
- the critic is an action value, fitted to the on-policy returns and, by one bootstrapped step, to the
  logged steps (hybrid fitted policy evaluation);
- the policy's surrogate also runs over logged states, with actions drawn anew from the policy and
  f - V as their advantage; the logged actions themselves teach the critic alone;
- each time in the episode has a policy and a critic of its own. They are the leading axis of one
  network each, the critics are fitted from the last time to the first, and the trust-region steps of
  all times are taken side by side.

The time is read from the last component of the observation, because a deployed policy has nothing
else to read it from; the networks do not see it. `Mixture` checks that it is there.

Networks see, and the policy draws, actions in units of `initial_std`: so the paper's policies, which
start with deviation 1 on unbounded actions, are the same functions in the box [-1, 1].

The tables at the foot of the file are the paper's algorithms 1 and 2 for linear critics and softmax
policies, with exact answers for the proofs.

| variable | paper | shape | unit |
|---|---|---|---|
| actor, critic | pi_h, f_h (a leading axis h each) | | |
| obs | s without its time | h b o | |
| returns | y, the return to go | h b | return |
| on_policy_weight | lambda | scalar | |
| gae_lambda | tau | scalar | |
| max_kl | delta of eq. 50 | scalar | nats |
| damping | added to the Fisher matrix | scalar | nats per parameter^2 |
| horizon | H | scalar | steps |
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from esscher.distributions import Normal
from esscher.errors import UserError, require
from esscher.experience import Dataset
from esscher.experience.mixture import Mixed, Mixture
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.kl import gaussian_kl
from esscher.functional.natural_gradient import (
    backtracking_line_search,
    fisher_vector_product,
    trust_region_step,
)
from esscher.functional.returns import gae, td_target
from esscher.method import Method, Paper, act_by, continuous_only
from esscher.nn.mlp import MLP
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, within
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.types import Action, Metrics, Spec

PAPER = Paper(
    title="Offline Data Enhanced On-Policy Policy Gradient with Provable Guarantees",
    year=2023,
    arxiv="2311.08384",
    sections="algorithms 1, 2, 4 and 5, eq. 1 and 48 to 50, sec. 6, appendix E",
    purpose="Control over a finite horizon where exploration is hard and logged data cover good "
    "behaviour.",
    claim="On-policy regression and off-policy bootstrapping in one critic, with natural gradients "
    "over the states of both, inherit whichever guarantee holds: it neither diverges like fitted "
    "evaluation nor misses the reward like an on-policy gradient.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of HNPG; defaults from the paper's table 1 unless a line says otherwise."""

    horizon: int = 50
    """Steps of every episode, >= 1; one policy and one critic each (the paper: 5 to 50)."""
    batch_size: int = 1_000
    """Environment steps an update, rounded up to whole episodes; as many logged steps with them."""
    hybrid: bool = True
    """Learn from the logged data. False is TRPO with the same critics: the on-policy baseline."""
    on_policy_weight: float = 1.0
    """Weight of the on-policy term in the critic's loss, >= 0. Higher: less trust in bootstrapping
    (the paper tried 0.1, 1 and 10). The policy weighs all samples alike."""
    gae_lambda: float = 0.97
    """Decay of the on-policy advantage's trace, in [0, 1]. Lower: more trust in the critic."""
    max_kl: float = 1e-2
    """Bound on the mean KL of each time's policy from the one before, nats, > 0."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix, >= 0. Higher: nearer to the plain gradient."""
    conjugate_gradient_steps: int = 10
    """Fisher-vector products an update, >= 1 (from the authors' code)."""
    num_backtracks: int = 10
    """Halvings that the line search tries, >= 1 (from the authors' code)."""
    accept_ratio: float = 0.1
    """Share of the improvement that the gradient promises which a step must keep, in [0, 1) (from
    the authors' code)."""
    critic_learning_rate: float = 3e-4
    """Adam step of the critics."""
    critic_steps: int = 30
    """Full-batch steps of each regression, from a fresh Adam state, >= 1."""
    num_value_samples: int = 10
    """Actions drawn for the value of a state, >= 1 (from the authors' code)."""
    initial_std: float = 1.0
    """First deviation of the policy, in half widths of the box, > 0, and the unit in which networks
    see actions."""
    hidden: tuple[int, ...] = (16, 16)
    """Widths of the policies' hidden layers."""
    critic_hidden: tuple[int, ...] = (64, 64)
    """Widths of the critics' hidden layers."""

    def __post_init__(self) -> None:
        for name in (
            *("horizon", "batch_size", "conjugate_gradient_steps", "num_backtracks"),
            *("critic_steps", "num_value_samples"),
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("max_kl", "critic_learning_rate", "initial_std"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("on_policy_weight", "damping"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "in [0, 1]")
        require("accept_ratio", self.accept_ratio, 0 <= self.accept_ratio < 1, "in [0, 1)")
        for name in ("hidden", "critic_hidden"):
            widths = getattr(self, name)
            require(name, widths, all(width >= 1 for width in widths), "positive widths")


class StepGaussians(nn.Module):
    """Mean and log standard deviation of each time's policy; deviations do not depend on the state.

    Args:
        horizon: number of policies, the leading axis of every parameter.
        obs_dim: width of an observation without its time.
        action_dim: number of action components.
        hidden: widths of the hidden layers.
        unit: first deviation; means are in this unit too.
    """

    def __init__(
        self, horizon: int, obs_dim: int, action_dim: int, hidden: tuple[int, ...], unit: float
    ):
        super().__init__()
        self.net = small_head(MLP((obs_dim, *hidden, action_dim), "tanh", ensemble=horizon))
        self.log_std = nn.Parameter(torch.zeros(horizon, 1, action_dim))
        self.unit = unit

    def forward(
        self, obs: Float[Tensor, "h b o"]
    ) -> tuple[Float[Tensor, "h b a"], Float[Tensor, "h b a"]]:
        mean = self.unit * self.net(obs).float()
        return mean, (self.log_std + math.log(self.unit)).expand_as(mean)


class StepPolicy(nn.Module):
    """Reads the time from the last component of an observation, and asks that time's policy."""

    def __init__(self, horizon: int, gaussians: StepGaussians):
        super().__init__()
        self.horizon, self.gaussians = horizon, gaussians

    def forward(self, obs: Float[Tensor, "b o"]) -> Normal:
        time = obs[:, -1].round().long().clamp(0, self.horizon - 1)
        mean, log_std = at_times(self.gaussians, time, obs[:, None, :-1])
        return Normal(mean.squeeze(1), log_std.squeeze(1))


class HNPG(Method):
    """See the module; `update` is one iteration of the paper's algorithm 5."""

    Config = Config
    data: ClassVar = "required"

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "hnpg")
        if spec.obs_dim < 2:
            raise UserError(
                "hnpg needs observations of 2 or more numbers, the last of which is the time in the "
                f"episode, got {spec.obs_dim}: esscher.envs:FiniteHorizon appends the time"
            )
        obs_dim, action_dim, device = spec.obs_dim - 1, spec.action_dim, runtime.device
        gaussians = StepGaussians(cfg.horizon, obs_dim, action_dim, cfg.hidden, cfg.initial_std)
        self.actor = StepPolicy(cfg.horizon, gaussians).to(device)
        sizes = (obs_dim + action_dim, *cfg.critic_hidden, 1)
        self.critic = small_head(MLP(sizes, "tanh", ensemble=cfg.horizon)).to(device)
        self.critic_opt = Optim(self.critic.parameters(), cfg.critic_learning_rate)
        self._descend = runtime.graph(self.descend)
        self._improve = runtime.graph(self.improve)

    @property
    def policy(self) -> StepPolicy:
        return self.actor

    def experience(self, data: Dataset) -> Mixture:
        cfg = self.cfg
        device = self.runtime.device
        return Mixture(self.spec, data, cfg.horizon, cfg.batch_size, device=device)

    def act(self, obs: Float[Tensor, "n o"], *, explore: bool) -> Action:
        return Action(value=act_by(self.actor, obs, explore=explore))

    def update(self, batch: Mixed, step: int) -> Metrics:
        horizon, rollout, logged = self.cfg.horizon, batch.rollout, batch.logged
        columns = (rollout.obs[..., :-1], rollout.action, rollout.reward)
        obs, action, reward = (by_time(column, horizon) for column in columns)
        returns = reward.flip(0).cumsum(0).flip(0)
        logged_obs, logged_action = (
            column.unflatten(0, (horizon, -1)) for column in (logged.obs[:, :-1], logged.action)
        )
        times = torch.arange(horizon, device=self.runtime.device).split(1)
        reports: list[Metrics] = []
        for h in reversed(range(horizon)):
            self.restart(self.critic_opt)
            own = slice(h * logged_obs.shape[1], (h + 1) * logged_obs.shape[1])
            target = self.target(
                None if h == horizon - 1 else times[h + 1],
                logged.reward[own],
                logged.next_obs[own, :-1],
                logged.terminated[own],
            )
            on_policy = (obs[h], action[h], returns[h])
            columns = (times[h], *on_policy, logged_obs[h], logged_action[h], target)
            steps = [self._descend(*columns) for _ in range(self.cfg.critic_steps)]
            reports.append(steps[-1])
        fit = {name: torch.stack([r[name] for r in reports]).mean() for name in reports[0]}
        return fit | self._improve(obs, action, reward, logged_obs)

    @torch.no_grad()
    def restart(self, optimiser: Optim) -> None:
        """Forget the moments: each regression is a problem of its own."""
        for moment in (*optimiser.first_moment, *optimiser.second_moment, optimiser.num_steps):
            moment.zero_()

    @torch.no_grad()
    def target(
        self,
        following: Int[Tensor, "1"] | None,
        reward: Float[Tensor, "b"],
        next_obs: Float[Tensor, "b o"],
        terminated: Tensor,
    ) -> Float[Tensor, "b"]:
        """Of logged steps: r + f_{h+1}(s', a') with one a' of the policy, and r at the last time.

        Args:
            following: h + 1, None at the last time.
        """
        if following is None:
            return reward
        mean, log_std = at_times(self.actor.gaussians, following, next_obs[None])
        next_action = mean + log_std.exp() * torch.randn_like(mean)
        next_value = self.q(next_obs[None], next_action, following).squeeze(0)
        return td_target(reward, next_value, terminated, 1.0)

    def descend(
        self,
        time: Int[Tensor, "1"],
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        returns: Float[Tensor, "b"],
        logged_obs: Float[Tensor, "c o"],
        logged_action: Float[Tensor, "c a"],
        target: Float[Tensor, "c"],
    ) -> Metrics:
        """One step of one time's critic (eq. 1); the others get gradients of 0 and do not move."""
        states, actions = torch.cat([obs, logged_obs]), torch.cat([action, logged_action])
        value = self.q(states[None], actions[None], time).squeeze(0)
        on_policy_loss = (value[: len(obs)] - returns).square().mean()
        logged_loss = (value[len(obs) :] - target).square().mean()
        loss = on_policy_loss
        if self.cfg.hybrid:
            loss = self.cfg.on_policy_weight * on_policy_loss + logged_loss
        self.critic_opt.minimize(loss)
        return {"on_policy_loss": on_policy_loss.detach(), "logged_loss": logged_loss.detach()}

    def improve(
        self,
        obs: Float[Tensor, "h b o"],
        action: Float[Tensor, "h b a"],
        reward: Float[Tensor, "h b"],
        logged_obs: Float[Tensor, "h c o"],
    ) -> Metrics:
        """One trust-region step of every time's policy (eq. 48 to 50)."""
        advantage = self.advantages(obs, reward)
        if self.cfg.hybrid:
            drawn, logged_advantage = self.drawn_advantages(logged_obs)
            obs = torch.cat([obs, logged_obs], 1)
            action = torch.cat([action, drawn], 1)
            advantage = torch.cat([advantage, logged_advantage], 1)
        return self.trust_region(obs, action, advantage)

    @torch.no_grad()
    def advantages(
        self, obs: Float[Tensor, "h b o"], reward: Float[Tensor, "h b"]
    ) -> Float[Tensor, "h b"]:
        """Generalised advantage estimates of whole episodes, which end at the horizon."""
        value = self.value(obs)
        next_value = value.roll(-1, 0)  # What comes round to the last time is not read.
        never = torch.zeros_like(value, dtype=torch.bool)
        ends = torch.cat([never[1:], ~never[:1]])
        return gae(reward, value, next_value, ends, never, 1.0, self.cfg.gae_lambda)

    @torch.no_grad()
    def drawn_advantages(
        self, obs: Float[Tensor, "h b o"]
    ) -> tuple[Float[Tensor, "h b a"], Float[Tensor, "h b"]]:
        """Actions of the policy at logged states, and f - V of them."""
        mean, log_std = self.actor.gaussians(obs)
        action = mean + log_std.exp() * torch.randn_like(mean)
        return action, self.q(obs, action) - self.value(obs)

    def value(self, obs: Float[Tensor, "h b o"]) -> Float[Tensor, "h b"]:
        """Mean of f over a few actions of the policy."""
        count = self.cfg.num_value_samples
        mean, log_std = (x.repeat(1, count, 1) for x in self.actor.gaussians(obs))
        action = mean + log_std.exp() * torch.randn_like(mean)
        values = self.q(obs.repeat(1, count, 1), action)
        return values.unflatten(1, (count, -1)).mean(1)

    def q(
        self,
        obs: Float[Tensor, "h b o"],
        action: Float[Tensor, "h b a"],
        times: Int[Tensor, "h"] | None = None,
    ) -> Float[Tensor, "h b"]:
        """The critics of each time, or of these times."""
        inputs = torch.cat([obs, action / self.cfg.initial_std], -1)
        found = self.critic(inputs) if times is None else at_times(self.critic, times, inputs)
        return found.float().squeeze(-1)

    def trust_region(
        self,
        obs: Float[Tensor, "h b o"],
        action: Float[Tensor, "h b a"],
        advantage: Float[Tensor, "h b"],
    ) -> Metrics:
        """Natural-gradient ascent on E[ratio advantage] to where the KL meets its bound."""
        cfg, gaussians = self.cfg, self.actor.gaussians
        names, parameters = zip(*gaussians.named_parameters(), strict=True)
        sizes = [parameter[0].numel() for parameter in parameters]
        now = torch.cat([p.detach().flatten(1) for p in parameters], 1).requires_grad_()

        def shaped(flat: Tensor) -> list[Tensor]:
            pieces = zip(flat.split(sizes, 1), parameters, strict=True)
            return [piece.reshape(parameter.shape) for piece, parameter in pieces]

        def gaussians_of(flat: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(gaussians, dict(zip(names, shaped(flat), strict=True)), (obs,))

        with torch.no_grad():
            old_mean, old_log_std = gaussians(obs)
            old_logp = log_density(action, old_mean, old_log_std)

        def surrogate(flat: Tensor) -> Tensor:
            ratio = (log_density(action, *gaussians_of(flat)) - old_logp).exp()
            return (ratio * advantage).mean(-1)

        def divergence(flat: Tensor) -> Tensor:
            mean, log_std = gaussians_of(flat)
            return gaussian_kl(old_mean, old_log_std.exp(), mean, log_std.exp()).mean(-1)

        (gradient,) = torch.autograd.grad(surrogate(now).sum(), now)
        now = now.detach()
        step = trust_region_step(
            lambda vector: fisher_vector_product(divergence, now, vector, cfg.damping),
            gradient,
            cfg.max_kl,
            cfg.conjugate_gradient_steps,
        )
        new, taken = backtracking_line_search(
            lambda flat: (surrogate(flat), divergence(flat)),
            now,
            step,
            gradient,
            cfg.max_kl,
            num_backtracks=cfg.num_backtracks,
            accept_ratio=cfg.accept_ratio,
        )
        with torch.no_grad():
            rise, moved = surrogate(new) - surrogate(now), divergence(new)
            for parameter, piece in zip(parameters, shaped(new), strict=True):
                parameter.copy_(piece)
        return {
            "surrogate_rise": rise.mean(),
            "kl": moved.mean(),
            "step_taken": taken.mean(),
            "std": gaussians.log_std.detach().exp().mean() * cfg.initial_std,
        }


def small_head(net: MLP) -> MLP:
    """With a tenth of the last layer's weights and no last bias, as in the authors' code."""
    with torch.no_grad():
        net.weights[-1].mul_(0.1)
        net.biases[-1].zero_()
    return net


def at_times(module: nn.Module, times: Int[Tensor, "h"], inputs: Tensor) -> Any:
    """The networks of these times alone, each on its own entry of the leading axis."""
    picked = {name: p.index_select(0, times) for name, p in module.named_parameters()}
    return functional_call(module, picked, (inputs,))


def by_time(column: Float[Tensor, "t n *x"], horizon: int) -> Float[Tensor, "h b *x"]:
    """Episodes, one after another in each environment, as one row a time and one column an episode."""
    return column.unflatten(0, (-1, horizon)).movedim(1, 0).flatten(1, 2)


def log_density(
    action: Float[Tensor, "h b a"], mean: Float[Tensor, "h b a"], log_std: Float[Tensor, "h b a"]
) -> Float[Tensor, "h b"]:
    """Of diagonal Gaussians, nats."""
    flat = (x.flatten(0, 1) for x in (mean, log_std))
    return Normal(*flat).log_prob(action.flatten(0, 1)).view(mean.shape[:2])


def smoke() -> Experiment:
    """A few updates of small networks on a short lock: does everything run?"""
    small = Config(
        horizon=3,
        batch_size=60,
        initial_std=0.2,
        critic_steps=3,
        conjugate_gradient_steps=3,
        num_backtracks=3,
        hidden=(8,),
        critic_hidden=(16,),
    )
    return Experiment.of(
        small,
        env=EnvConfig(id="esscher.envs:CombinationLock", kwargs={"horizon": 3}),
        data="esscher.datasets:combination_lock_3",
        steps=240,
        evaluation=EvaluationConfig(every=120, episodes=2),
    )


def paper() -> Experiment:
    """The longest lock: about the steps that the paper needed (its code stops at 1.5 million)."""
    return Experiment.of(
        Config(initial_std=0.2),
        env=EnvConfig(id="esscher.envs:CombinationLock", kwargs={"horizon": 50}),
        data="esscher.datasets:combination_lock_50",
        steps=30_000_000,
    )


def proof() -> Proof:
    """The sheet's miniature: two states, a lock in tables, a lock behind noise."""
    return Proof(
        claims=(
            Claim(
                name="doubly robust",
                statement="Two states, one feature that cannot represent the values: fitted "
                "evaluation multiplies its weight by 1.188 an iteration, and with the on-policy term "
                "of weight 1 by 0.594, both to 1e-6.",
                arms={
                    "fitted evaluation": lambda seed: _beside_tables(0.0),
                    "hybrid": lambda seed: _beside_tables(1.0),
                },
                measure=_two_states,
                judge=_judge_two_states,
                num_seeds=1,
            ),
            Claim(
                name="exploration",
                statement="A lock in tables, 5 actions, softmax policies, 60 iterations of 100 "
                "episodes, 1,000 logged ones: on-policy alone opens it at horizon 3 but not at 6 and "
                "10, and the hybrid at all three. Returns are exact.",
                arms={
                    f"{kind}, horizon {horizon}": lambda seed: _beside_tables(1.0)
                    for kind in ("hybrid", "on-policy")
                    for horizon in HORIZONS
                },
                measure=_lock_return,
                judge=_judge_locks,
            ),
            Claim(
                name="continuous lock",
                statement="Ten-dimensional actions behind noisy mixed observations, horizon 5, 60 "
                "iterations of 500 steps, 5,000 logged episodes: HNPG returns more than 0.5 on "
                "average, TRPO with the same critics less than 0.15.",
                arms={
                    "hnpg": lambda seed: _continuous(True),
                    "trpo": lambda seed: _continuous(False),
                },
                measure=_continuous_return,
                judge=_judge_continuous,
                num_seeds=2,
            ),
        ),
        notes="The first two claims are computed in tables after a run of no account. Tables use the "
        "same samples in all iterations of an evaluation, which is then exact after as many as the "
        "horizon; their return is that of the last policy. The continuous lock's return is the mean "
        "of 100 episodes of the stochastic policy.",
    )


HORIZONS = (3, 6, 10)


def _beside_tables(on_policy_weight: float) -> Experiment:
    """One update, for the record; what is measured is in tables."""
    experiment = smoke()
    cfg = replace(experiment.method, on_policy_weight=on_policy_weight)
    return Experiment.of(
        cfg,
        env=experiment.stages[0].env,
        data=experiment.stages[0].data,
        steps=60,
        evaluation=EvaluationConfig(every=0, episodes=1),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _two_states(run: FinishedRun) -> dict[str, float]:
    """s1 leads to s2 and s2 to itself, no rewards; features 1 and 2, both distributions uniform."""
    features, next_features = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [2.0]])
    weights = hybrid_fitted_evaluation(
        features.double(),
        torch.zeros(2, dtype=torch.float64),
        next_features.double(),
        features.double(),
        torch.zeros(2, dtype=torch.float64),
        discount=0.99,
        on_policy_weight=run.experiment.method.on_policy_weight,
        initial=torch.ones(1, dtype=torch.float64),
        num_iterations=50,
    )
    return {f"weight {k}": weights[k].item() for k in (1, 3, 50)}


def _judge_two_states(figures: Figures) -> list[Check]:
    checks = []
    for arm, factor in (("fitted evaluation", 1.188), ("hybrid", 0.594)):
        for k in (1, 3, 50):
            ratio = figures[arm][f"weight {k}"][0] / factor**k
            name = f"{arm}, weight after {k} iterations over {factor:g}^{k}"
            checks.append(within(name, ratio, 1 - 1e-6, 1 + 1e-6))
    return checks


def _lock_return(run: FinishedRun) -> dict[str, float]:
    """Exact return of the last policy; the arm's label says which."""
    kind, _, horizon = str(run.experiment.label).partition(", horizon ")
    draw = torch.Generator().manual_seed(run.experiment.seed)
    lock = TabularLock(int(horizon), 5, draw)
    logged = None
    if kind == "hybrid":
        logged = lock.sample(lock.knowing_policy(1 / lock.horizon), 1_000, draw)
    evaluate = functools.partial(fitted_values, lock, logged, 100, 1.0, draw)
    policy = softmax_actor_critic(evaluate, lock.shape, eta=2.0, num_iterations=60)
    return {"return": lock.expected_return(policy)}


def _judge_locks(figures: Figures) -> list[Check]:
    checks = []
    for arm, found in figures.items():
        opens = arm.startswith("hybrid") or arm.endswith("horizon 3")
        for seed, value in enumerate(found["return"]):
            rule, passed = ("> 0.95", value > 0.95) if opens else ("< 0.2", value < 0.2)
            checks.append(Check(f"{arm}, seed {seed}", value, rule, passed))
    return checks


def _continuous(hybrid: bool) -> Experiment:
    return Experiment.of(
        Config(horizon=5, batch_size=500, initial_std=0.2, hybrid=hybrid),
        env=EnvConfig(id="esscher.envs:CombinationLock", num=10, kwargs={"horizon": 5}),
        data="esscher.datasets:combination_lock_5",
        steps=30_000,
        evaluation=EvaluationConfig(every=3_000, episodes=100, deterministic=False),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _continuous_return(run: FinishedRun) -> dict[str, float]:
    training = [row["return"] for row in run.rows("train") if "return" in row]
    return {
        "return": run.rows("evaluate")[-1]["return_mean"],
        "training return, last tenth": sum(training[-3:]) / 3,
    }


def _judge_continuous(figures: Figures) -> list[Check]:
    checks = []
    for arm, rule in (("hnpg", "> 0.5"), ("trpo", "< 0.15")):
        for seed, value in enumerate(figures[arm]["return"]):
            passed = value > 0.5 if arm == "hnpg" else value < 0.15
            checks.append(Check(f"mean return, {arm}, seed {seed}", value, rule, passed))
    return checks


# ---- algorithms 1 and 2 in tables


def hybrid_fitted_evaluation(
    features: Float[Tensor, "m p"],
    reward: Float[Tensor, "m"],
    next_features: Float[Tensor, "m p"],
    own_features: Float[Tensor, "n p"],
    returns: Float[Tensor, "n"],
    *,
    discount: float,
    on_policy_weight: float,
    initial: Float[Tensor, "p"],
    num_iterations: int,
) -> Float[Tensor, "k p"]:
    """Weights of f_0, ..., f_K for f = w' features: eq. 1 in closed form, on the same samples.

    Features that no sample has get the weight 0 (the smallest of all minimisers). `next_features`
    are means over the policy's actions. Logged rows are the first three arguments, on-policy rows
    the next two; either may be none.
    """
    logged = features.T / max(len(features), 1)
    own = on_policy_weight * own_features.T / max(len(own_features), 1)
    inverse = torch.linalg.pinv(logged @ features + own @ own_features, hermitian=True)
    constant, bootstrap = logged @ reward + own @ returns, discount * logged @ next_features
    weights = [initial]
    for _ in range(num_iterations):
        weights.append(inverse @ (constant + bootstrap @ weights[-1]))
    return torch.stack(weights)


def softmax_actor_critic(
    evaluate: Callable[[Tensor], Tensor], shape: tuple[int, ...], *, eta: float, num_iterations: int
) -> Float[Tensor, "h s a"]:
    """Algorithm 1 from the uniform policy: probabilities multiplied by exp(eta f), the last ones.

    Args:
        evaluate: policy -> f, both `h s a`.
        shape: of the policy.
        eta: step size.
        num_iterations: evaluations.
    """
    logits = torch.zeros(shape, dtype=torch.float64)
    for _ in range(num_iterations):
        logits = logits + eta * evaluate(logits.softmax(-1))
    return logits.softmax(-1)


@dataclass(frozen=True)
class TabularSteps:
    """Episodes in a table: h times, e episodes."""

    state: Int[Tensor, "h e"]
    action: Int[Tensor, "h e"]
    reward: Float[Tensor, "h e"]
    next_state: Int[Tensor, "h e"]


class TabularLock:
    """The lock of esscher.envs:CombinationLock without its observations and its softmax.

    States 0 and 1 are good, 2 is dead; a policy is a table of probabilities `h s a`.
    """

    def __init__(self, horizon: int, num_actions: int, generator: torch.Generator):
        self.horizon, self.num_actions = horizon, num_actions
        self.shape = (horizon, 3, num_actions)
        self.right = torch.randint(num_actions, (horizon, 2), generator=generator)

    def knowing_policy(self, epsilon: float) -> Float[Tensor, "h s a"]:
        """Right but for uniform actions with probability epsilon; uniform when dead."""
        policy = torch.full(self.shape, 1 / self.num_actions, dtype=torch.float64)
        right = nn.functional.one_hot(self.right, self.num_actions).double()
        policy[:, :2] = (1 - epsilon) * right + epsilon / self.num_actions
        return policy

    def sample(
        self, policy: Float[Tensor, "h s a"], count: int, generator: torch.Generator
    ) -> TabularSteps:
        """So many episodes."""
        state = torch.randint(2, (count,), generator=generator)
        rows = []
        for h in range(self.horizon):
            action = torch.multinomial(policy[h, state], 1, generator=generator).squeeze(1)
            alive = state < 2
            opened = alive & (action == self.right[h, state.clamp(max=1)])
            tempted = torch.rand(count, generator=generator) < 0.5
            reward = 0.1 * (alive & ~opened & tempted).double()
            if h == self.horizon - 1:
                reward = reward + opened.double()
            following = torch.randint(2, (count,), generator=generator)
            next_state = torch.where(opened, following, 2)
            rows.append((state, action, reward, next_state))
            state = next_state
        return TabularSteps(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def exact_values(self, policy: Float[Tensor, "h s a"]) -> Float[Tensor, "h s a"]:
        """Q of the policy, backwards from the last time."""
        values = torch.zeros(self.shape, dtype=torch.float64)
        good_next = 0.0
        for h in reversed(range(self.horizon)):
            last = h == self.horizon - 1
            values[h, :2] = 0.05
            for state in range(2):
                values[h, state, self.right[h, state]] = 1.0 if last else good_next
            good_next = (policy[h, :2] * values[h, :2]).sum(-1).mean()
        return values

    def expected_return(self, policy: Float[Tensor, "h s a"]) -> float:
        """From either good state with probability 1/2."""
        return (policy[0, :2] * self.exact_values(policy)[0, :2]).sum(-1).mean().item()


def fitted_values(
    lock: TabularLock,
    logged: TabularSteps | None,
    num_episodes: int,
    on_policy_weight: float,
    generator: torch.Generator,
    policy: Float[Tensor, "h s a"],
) -> Float[Tensor, "h s a"]:
    """Algorithm 2 on fresh on-policy episodes: one feature a cell, so 0 where nobody was."""
    own = lock.sample(policy, num_episodes, generator)
    returns = own.reward.flip(0).cumsum(0).flip(0).flatten()
    size = policy.numel()
    if logged is None:
        nothing = torch.zeros(0, size, dtype=torch.float64)
        columns = nothing, nothing[:, 0], nothing
    else:
        columns = _cells(lock, logged), logged.reward.flatten(), _next_cells(logged, policy)
    weights = hybrid_fitted_evaluation(
        *columns,
        _cells(lock, own),
        returns,
        discount=1.0,
        on_policy_weight=on_policy_weight,
        initial=torch.zeros(size, dtype=torch.float64),
        num_iterations=lock.horizon,
    )
    return weights[-1].view(policy.shape)


def _cells(lock: TabularLock, steps: TabularSteps) -> Float[Tensor, "m p"]:
    """One-hot (time, state, action), time after time."""
    times = torch.arange(lock.horizon)[:, None]
    index = (times * 3 + steps.state) * lock.num_actions + steps.action
    return nn.functional.one_hot(index.flatten(), math.prod(lock.shape)).double()


def _next_cells(steps: TabularSteps, policy: Float[Tensor, "h s a"]) -> Float[Tensor, "m p"]:
    """Probabilities of the cells that a step leads to; all 0 after the last time."""
    horizon, episodes = steps.state.shape
    table = torch.zeros(horizon, episodes, *policy.shape, dtype=torch.float64)
    rows = torch.arange(episodes)
    for h in range(horizon - 1):
        following = steps.next_state[h]
        table[h, rows, h + 1, following] = policy[h + 1, following]
    return table.view(horizon * episodes, -1)
