"""Multi-agent inverse soft Q-learning (MAMQL): rewards and policies from joint demonstrations.

Several agents with interests of their own were seen acting at once. Each gets one soft critic over
its own action, averaged over what the others do, and both its policy and its reward follow from that
critic; nothing is trained against an adversary.

    pi_i(a_i | s) proportional to exp(lambda Qbar_i(s, a_i)),
    Vbar_i(s) = 1 / lambda log sum_b exp(lambda Qbar_i(s, b)),
    J_i = E_expert[phi(Qbar_i(s, a_i) - discount Vbar_i(s'))] - E_rho[Vbar_i(s) - discount Vbar_i(s')]

A RECONSTRUCTION: the loss in the paper, its online mixture, its regression of joint rewards and its
settings were not available to us. What stands here follows from the paper's abstract, from a public
summary of one paragraph, and from the equations of IQ-Learn (arXiv 2106.12142). The class of methods
is right, the details are ours. The authors of IQ-Learn license their code for individual research
only and mention a patent filing: nothing of it was ported here, all is written from equations.

Compared with IQ-Learn (one agent):
- one critic an agent, of one batched network; the demonstrations hold the others' actions already,
  so each agent's is a problem of one agent, in the decision process averaged over the others;
- hence offline it IS IQ-Learn for each agent alone, and with phi = identity it is cloning divided by
  lambda, for any critic: what is gained comes from phi's curvature, or from states that the learned
  policies visit (`samples="online"`);
- online all agents act at once with what they have learned so far, and half of each batch is theirs;
- the reward of joint actions: a regression whose average over the others is the marginal reward.

Terminated states are worth nothing; truncated ones are bootstrapped from. The task's own rewards are
never read. In a task of one agent with Discrete actions it is IQ-Learn itself.

| variable | paper | shape | unit |
|---|---|---|---|
| inverse_temperature | lambda | scalar | 1 / reward |
| q | Qbar_i(s, .) | g b a | reward |
| reward | rbar_i(s, a_i, s') | g b | reward |
| flow | Vbar_i(s) - discount Vbar_i(s') | g b | reward |
| alpha | alpha, of chi2: x - x^2 / (4 alpha) | scalar | reward |
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.critics import target_of
from esscher.distributions import Categorical
from esscher.errors import UserError, require
from esscher.experience import Dataset, OfflineReplay, Replay
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.markov_games import (
    average_over_others,
    joint_index,
    joint_policy,
    marginal_transition,
)
from esscher.functional.soft_values import (
    Phi,
    boltzmann_log_probs,
    concave_terms,
    inverse_soft_bellman,
    soft_value,
    without_shaping,
)
from esscher.method import Method, Paper, act_by
from esscher.nn.mlp import MLP, Activation
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.registry import load_method
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.types import Action, Metrics, Spec, Transitions

PAPER = Paper(
    title="Multi-Agent Inverse Q-Learning from Demonstrations",
    year=2025,
    arxiv="2503.04679",
    sections="abstract (the equations are a reconstruction)",
    purpose="Rewards and policies of several agents at once, from demonstrations of all of them.",
    claim="Critics averaged over the others recover every agent's reward and policy, without an "
    "adversary and better than with one: the policies than MA-GAIL's, the rewards than MA-AIRL's.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MAMQL; defaults from IQ-Learn's configuration, as the paper's are not known."""

    loss: Literal["iq", "bc"] = "iq"
    """iq: the inverse soft Q objective; bc: clone each agent's choices, the comparison."""
    samples: Literal["online", "offline", "v0"] = "online"
    """rho, whose flow of values is held down. online: half demonstrations, half the policies' own
    steps; offline: demonstrations; v0: first states, times 1 - discount. Environments are stepped in
    any case, but offline and v0 read none of it."""
    phi: Phi = "chi2"
    """Concave function of the recovered reward; identity clones, where samples are offline."""
    alpha: float = 0.5
    """Of chi2, in reward, > 0. Higher: rewards less held to zero (5 is gentler in small games)."""
    penalize: Literal["all", "expert"] = "all"
    """Take the square in chi2 over all steps of a batch (IQ-Learn online), or the demonstrations'."""
    inverse_temperature: float = 10.0
    """lambda, > 0: higher is greedier. IQ-Learn's code has 100; 2 suits dense rewards of size 1."""
    discount: float = 0.99
    """Weight of a value one step later, in [0, 1)."""
    learning_rate: float = 1e-4
    """Adam step of the critics."""
    target_update_interval: int | None = None
    """Take V(s') from a copy of the critics, renewed every so many updates; None: from the critics
    themselves, with its gradient, as in IQ-Learn."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of each agent's critic."""
    activation: Activation = "relu"
    """Of the hidden layers."""
    batch_size: int = 32
    """Steps an update from the demonstrations, and as many from the policies."""
    buffer_size: int = 100_000
    """Own steps kept."""
    warmup: int = 0
    """Environment steps of uniformly random actions before the first update."""
    updates_per_step: float = 1.0
    """Updates per environment step."""

    def __post_init__(self) -> None:
        for name in ("alpha", "inverse_temperature", "learning_rate"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        require("discount", self.discount, 0 <= self.discount < 1, "in [0, 1)")
        every = self.target_update_interval
        require("target_update_interval", every, every is None or every >= 1, "None or >= 1")
        require("warmup", self.warmup, self.warmup >= 0, ">= 0")


class JointChoices:
    """Independent choices of all agents.

    Args:
        logits: `g b a`, in nats up to a constant for each agent and row.
        shape: of one row's action: `(g,)`, or `()` for the choice of a single agent.
    """

    def __init__(self, logits: Float[Tensor, "g b a"], shape: tuple[int, ...]):
        rows = logits.transpose(0, 1)
        self.each = Categorical(rows.reshape(-1, rows.shape[-1]))
        self.shape, self.num_agents = shape, len(logits)

    def mode(self) -> Int[Tensor, "b *g"]:
        return self.each.mode().view(-1, *self.shape)

    def sample(self) -> Int[Tensor, "b *g"]:
        return self.each.sample().view(-1, *self.shape)

    def log_prob(self, x: Int[Tensor, "b *g"]) -> Float[Tensor, "b"]:
        return self.each.log_prob(x.reshape(-1)).view(-1, self.num_agents).sum(-1)

    def entropy(self) -> Float[Tensor, "b"]:
        return self.each.entropy().view(-1, self.num_agents).sum(-1)


class MarginalCritics(nn.Module):
    """One critic an agent on what that agent observes, which is its Boltzmann policy as well."""

    def __init__(self, spec: Spec, cfg: Config):
        super().__init__()
        self.num_agents, self.action_shape = spec.num_agents, spec.action_shape
        self.inverse_temperature = cfg.inverse_temperature
        sizes = (spec.obs_dim // spec.num_agents, *cfg.hidden, spec.num_actions or 1)
        self.net = MLP(sizes, cfg.activation, ensemble=spec.num_agents)

    def q(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b a"]:
        """Qbar of every action."""
        own = obs.unflatten(-1, (self.num_agents, -1)).transpose(0, 1)
        return self.net(own).to(obs.dtype)

    def forward(self, obs: Float[Tensor, "b o"]) -> JointChoices:
        return JointChoices(self.inverse_temperature * self.q(obs), self.action_shape)


class Batch(NamedTuple):
    """What one update learns from."""

    expert: Transitions
    policy: Transitions | None
    """The policies' own steps, where they are read."""
    first_obs: Float[Tensor, "b o"]
    """Where demonstrations began."""


class Terms(NamedTuple):
    """What an objective is made of, for each agent and row."""

    reward: Float[Tensor, "g b"]
    """Recovered marginal rewards."""
    flow: Float[Tensor, "g b"]
    """V(s) - discount V(s')."""
    logp: Float[Tensor, "g b"]
    """Of the choice that was made, nats."""
    q: Float[Tensor, "g b a"]


class MAMQL(Method):
    """See the module; `update` is one step of all agents' critics on the same batch."""

    Config = Config
    data = "required"
    games = True

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        if spec.num_actions is None:
            raise UserError(
                "mamql needs Discrete actions, and this task's are continuous: use odice to learn "
                "from demonstrations of one agent"
            )
        self.actor = MarginalCritics(spec, cfg).to(runtime.device)
        if cfg.target_update_interval is not None:
            self.target_actor = target_of(self.actor)
        self.actor_opt = Optim(self.actor.parameters(), cfg.learning_rate)
        self._descend = runtime.graph(self.descend)

    @property
    def policy(self) -> MarginalCritics:
        return self.actor

    def experience(self, data: Dataset) -> Replay:
        return _Mixture(self.spec, data, self.cfg, self.runtime.device)

    def act(self, obs: Float[Tensor, "n o"], *, explore: bool) -> Action:
        return Action(value=act_by(self.actor, obs, explore=explore))

    def update(self, batch: Batch, step: int) -> Metrics:
        every = self.cfg.target_update_interval
        return self._descend(batch, every is not None and (step + 1) % every == 0)

    def descend(self, batch: Batch, renew_target: bool) -> Metrics:
        """One Adam step of all critics, which share no parameter; the target's copy."""
        loss, metrics = self.loss(batch)
        # The sum over agents: each critic's gradient is that of its own loss.
        self.actor_opt.minimize(loss.sum())
        if renew_target:
            with torch.no_grad():
                pairs = zip(self.target_actor.parameters(), self.actor.parameters(), strict=True)
                for target, source in pairs:
                    target.copy_(source)
        return {"loss": loss.detach().sum(), **metrics}

    def loss(self, batch: Batch) -> tuple[Float[Tensor, "g"], Metrics]:
        """-J of each agent, or its cloning loss; and metrics."""
        cfg, expert, policy = self.cfg, batch.expert, batch.policy
        rows = (expert.obs, expert.action, expert.next_obs, expert.terminated)
        if policy is not None:
            own = (policy.obs, policy.action, policy.next_obs, policy.terminated)
            rows = tuple(torch.cat(pair) for pair in zip(rows, own, strict=True))
        terms, size = self.terms(*rows), len(expert.obs)
        reward, logp = terms.reward[:, :size], terms.logp[:, :size]
        if cfg.loss == "bc":
            loss = -logp.mean(1)
        else:
            if cfg.samples == "v0":
                first = soft_value(self.actor.q(batch.first_obs), cfg.inverse_temperature)
                held_down = (1 - cfg.discount) * first.mean(1)
            else:
                held_down = terms.flow.mean(1)
            if cfg.phi == "chi2" and cfg.penalize == "all":
                penalty = terms.reward.square().mean(1) / (4 * cfg.alpha)
                loss = held_down + penalty - reward.mean(1)
            else:
                loss = held_down - concave_terms(reward, cfg.phi, cfg.alpha).mean(1)
        return loss, {
            "expert_logp": logp.detach().mean(),
            "expert_reward": reward.detach().mean(),
            "q": terms.q.detach().mean(),
        }

    def terms(
        self,
        obs: Float[Tensor, "b o"],
        action: Int[Tensor, "b *g"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
    ) -> Terms:
        """Rewards, flows and log-probabilities; gradient to all, but not to the target."""
        cfg = self.cfg
        own = action.reshape(len(action), -1).T.unsqueeze(-1)
        if cfg.target_update_interval is None:
            # One pass for both, which is most of the time of small networks.
            q, next_q = self.actor.q(torch.cat([obs, next_obs])).chunk(2, 1)
        else:
            q = self.actor.q(obs)
            with torch.no_grad():
                next_q = self.target_actor.q(next_obs)
        value = soft_value(q, cfg.inverse_temperature)
        next_value = soft_value(next_q, cfg.inverse_temperature)
        taken = q.gather(-1, own).squeeze(-1)
        return Terms(
            reward=inverse_soft_bellman(taken, next_value, terminated, cfg.discount),
            flow=inverse_soft_bellman(value, next_value, terminated, cfg.discount),
            logp=cfg.inverse_temperature * (taken - value),
            q=q,
        )

    @torch.no_grad()
    def marginal_reward(
        self,
        obs: Float[Tensor, "b o"],
        action: Int[Tensor, "b *g"],
        next_obs: Float[Tensor, "b o"],
        terminated: Bool[Tensor, "b"],
    ) -> Float[Tensor, "g b"]:
        """Each agent's reward for its own choice, averaged over the others', up to shaping."""
        return self.terms(obs, action, next_obs, terminated).reward

    def joint_reward(
        self, data: Dataset, *, steps: int = 2_000, learning_rate: float = 1e-2, ridge: float = 1e-4
    ) -> "JointReward":
        """Each agent's reward for joint actions, whose average over the others is the marginal one.

            min E[(E_{a'_-i ~ pi_-i}[R_i(s, a_i, a'_-i)] - rbar_i(s, a_i, s'))^2] + ridge E[R_i^2]

        The inner average is an exact sum: a sampled one would bias the square. What the others'
        choices change at equal average no demonstration shows; the ridge sets it to the least.

        Args:
            data: steps to fit on, all at once.
            steps: of Adam.
            learning_rate: of Adam.
            ridge: weight of the square of R.

        Raises:
            UserError: there are too many joint actions to sum over.
        """
        rows = data.transitions.to(self.runtime.device)
        marginal = self.marginal_reward(rows.obs, rows.action, rows.next_obs, rows.terminated)
        model = JointReward(self.spec, self.cfg).to(self.runtime.device)
        opt = Optim(model.parameters(), learning_rate)
        with torch.no_grad():
            logp = boltzmann_log_probs(self.actor.q(rows.obs), self.cfg.inverse_temperature)
        own = rows.action.reshape(len(rows), -1).T.unsqueeze(-1)
        for _ in range(steps):
            joint = model.table(rows.obs)
            each = [average_over_others(joint[k], logp, k) for k in range(len(joint))]
            average = torch.stack(each).gather(-1, own).squeeze(-1)
            opt.minimize((average - marginal).square().mean() + ridge * joint.square().mean())
        return model


class JointReward(nn.Module):
    """Rewards of every agent for all joint actions, from what that agent observes."""

    def __init__(self, spec: Spec, cfg: Config):
        super().__init__()
        self.num_agents, self.num_actions = spec.num_agents, spec.num_actions or 1
        columns = self.num_actions**self.num_agents
        if columns > 4_096:
            raise UserError(
                f"{self.num_agents} agents of {self.num_actions} actions have {columns:,} joint "
                "actions: joint rewards are recovered for up to 4,096"
            )
        sizes = (spec.obs_dim // spec.num_agents, *cfg.hidden, columns)
        self.net = MLP(sizes, cfg.activation, ensemble=spec.num_agents)

    def table(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "g b k"]:
        """Of every joint action, in the order of `joint_index`."""
        return self.net(obs.unflatten(-1, (self.num_agents, -1)).transpose(0, 1))

    def forward(
        self, obs: Float[Tensor, "b o"], action: Int[Tensor, "b *g"]
    ) -> Float[Tensor, "g b"]:
        choice = joint_index(action.reshape(len(action), -1), self.num_actions)
        index = choice.expand(self.num_agents, -1).unsqueeze(-1)
        return self.table(obs).gather(-1, index).squeeze(-1)


class _Mixture(Replay):
    """The policies' own steps, and beside each batch of them one of the demonstrations."""

    def __init__(self, spec: Spec, data: Dataset, cfg: Config, device: torch.device):
        super().__init__(
            spec,
            cfg.buffer_size,
            cfg.batch_size,
            warmup=cfg.warmup,
            updates_per_step=cfg.updates_per_step,
            device=device,
        )
        self.demonstrations = OfflineReplay(data, cfg.batch_size, device=device)
        self._first_obs = data.transitions.obs[data.step == 0].to(device)
        self._reads_own = cfg.samples == "online" and cfg.loss == "iq"

    def batches(self, step: int) -> Iterator[Any]:
        for own in super().batches(step):
            size = len(own)
            index = torch.randint(len(self._first_obs), (size,), device=own.obs.device)
            yield Batch(
                expert=self.demonstrations.sample(size),
                policy=own if self._reads_own else None,
                first_obs=self._first_obs[index],
            )


def smoke() -> Experiment:
    """A few hundred updates in a random game of two agents: does everything run?"""
    return Experiment.of(
        Config(hidden=(32, 32), inverse_temperature=2.0, buffer_size=2_000, warmup=50),
        env=EnvConfig(id="esscher.games:RandomGame", max_episode_steps=30),
        data="esscher.datasets:random_game",
        steps=400,
        evaluation=EvaluationConfig(every=200, episodes=2),
    )


def paper() -> Experiment:
    """Gems on the paper's scale of steps; the field is ours, the paper's script is not public."""
    return Experiment.of(
        Config(discount=0.95),
        env=EnvConfig(id="esscher.games:Gems", max_episode_steps=15),
        data="esscher.datasets:gems",
        steps=200_000,
        evaluation=EvaluationConfig(every=10_000, episodes=50, deterministic=False),
    )


def proof() -> Proof:
    """The sheet's miniature: exact identities, what the square in chi2 does, and Gems."""
    return Proof(
        claims=(
            Claim(
                name="exact identities",
                statement="Random games of two agents (6 states, 3 actions each, discount 0.9, "
                "lambda 2): at the equilibrium the inverse operator gives the true marginal reward; "
                "with phi = identity, offline, the loss is cloning divided by lambda for any critic; "
                "from exact occupancies it recovers the policies, and the rewards up to shaping; "
                "chi2 recovers rewards the worse, the smaller alpha is.",
                arms={"game": _identities},
                measure=_identity_figures,
                judge=_judge_identities,
            ),
            Claim(
                name="regularisation",
                statement="From 100 episodes of 30 steps, chi2 with alpha 5 comes within 5% of the "
                "experts' returns, and alpha 0.5 flattens the policies.",
                arms={f"alpha {x:g}": partial(_regularised, x) for x in (5.0, 0.5)},
                measure=_share_figures,
                judge=_judge_regularisation,
            ),
            Claim(
                name="gems",
                statement="Gems on 5 x 5, two agents, one gem of each colour, 15 steps, experts in the "
                "exact soft equilibrium, 10 demonstrations, 20,000 environment steps: online MAMQL "
                "earns more an agent than cloning and than MA-GAIL, and its marginal rewards are, "
                "but for shaping, nearer to the true ones than MA-AIRL's.",
                arms={
                    "mamql": partial(_gems, "iq"),
                    "cloning": partial(_gems, "bc"),
                    "ma_gail": partial(_adversarial, "gail", 5),
                    "ma_airl": partial(_adversarial, "airl", 20),
                },
                measure=_gems_figures,
                judge=_judge_gems,
            ),
        ),
        notes="The method is a reconstruction; see its description. Exact identities: the runs only "
        "carry their learner, all figures are computed afterwards; seed k is game k. Regularisation: "
        "returns are discounted and exact, and measured as shares of the way from uniform policies (0) "
        "to the experts (1), since an offset of the rewards changes plain ratios; game 0. Gems: "
        "returns are exact, of sampling policies. The networks are perceptrons on the field's planes, "
        "not convolutions; the gems lie in fixed cells and the agents begin in random ones. Errors of "
        "rewards are root mean squares over agents, all states and all choices, after least squares "
        "over potentials at the experts' dynamics, in units of reward: MA-AIRL's are in nats, and "
        "divided by the experts' inverse temperature, which MAMQL is told as well; 'error of no "
        "reward' is what a reward of 0 everywhere would get. MAMQL, MA-GAIL and MA-AIRL were each "
        "given a choice of settings on seed 100, by return alone, and the best of each stands here. "
        "MA-GAIL (13 tried) and MA-AIRL (11): steps of the policies of 1e-4, 3e-4 and 1e-3 and of the "
        "discriminators of 1e-4, 3e-4, 1e-3 and 3e-3; 1, 5, 10 and 20 of the latter a rollout; "
        "rollouts of 200, 300, 600 and 1,000; an entropy bonus of 0 and 0.01; traces of 0.8 and 0.95; "
        "cloning with 500 and 2,000 steps and a head start of the discriminators, and neither; not in "
        "every combination. MAMQL: its defaults (2.95, where the experts earn 3.89); steps of 3e-4 "
        "(3.47) and 1e-3 (3.28); with 3e-4 a target copy every 4 updates (3.81) or 50 (3.80), with "
        "1e-3 every 4 (3.77); with 3e-4 and no copy alpha 0.1 (2.35) and 5 (2.13), lambda 5 (3.15), "
        "batches of 128 (3.46), the square on demonstrations alone (2.04), 4 updates a step (2.91), "
        "and phi Hellinger (1.59) and KL (1.98).",
    )


GAMES = "esscher.games"


def _tiny(cfg: Any, env: EnvConfig, data: str, steps: int) -> Experiment:
    return Experiment.of(
        cfg,
        env=env,
        data=f"esscher.datasets:{data}",
        steps=steps,
        evaluation=EvaluationConfig(every=0, episodes=10, deterministic=False),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _identities(seed: int) -> Experiment:
    cfg = Config(
        samples="offline", phi="identity", inverse_temperature=2.0, discount=0.9, hidden=()
    )
    env = EnvConfig(id=f"{GAMES}:RandomGame", max_episode_steps=30, kwargs={"seed": seed})
    return _tiny(cfg, env, "random_game", 50)


def _regularised(alpha: float, seed: int) -> Experiment:
    cfg = Config(
        samples="offline",
        alpha=alpha,
        inverse_temperature=2.0,
        discount=0.9,
        learning_rate=3e-3,
        hidden=(),
        batch_size=256,
    )
    env = EnvConfig(id=f"{GAMES}:RandomGame", max_episode_steps=30)
    return _tiny(cfg, env, "random_game", 4_000)


def _gems(loss: Literal["iq", "bc"], seed: int) -> Experiment:
    cfg = Config(loss=loss, discount=0.95)
    if loss == "iq":
        cfg = replace(cfg, learning_rate=3e-4, target_update_interval=4)
    return _tiny(cfg, EnvConfig(id=f"{GAMES}:Gems", max_episode_steps=15), "gems", 20_000)


def _adversarial(
    reward: Literal["gail", "airl"], discriminator_steps: int, seed: int
) -> Experiment:
    cfg = load_method("ma_gail").Config(
        reward=reward,
        discount=0.95,
        learning_rate=1e-3,
        discriminator_steps=discriminator_steps,
        batch_size=128,
        cloning_steps=0,
        head_start=0,
        rollout_length=300,
        hidden=(64, 64),
    )
    return _tiny(cfg, EnvConfig(id=f"{GAMES}:Gems", max_episode_steps=15), "gems", 20_000)


def _game(run: FinishedRun) -> Any:
    """The task of a run."""
    from esscher import games

    env = run.experiment.stages[-1].env
    return getattr(games, env.id.partition(":")[2])(**env.kwargs)


def _everywhere(method: Method, game: Any) -> Tensor:
    """All agents' observations of every state."""
    return game.observe(torch.arange(game.num_states)).repeat(1, method.spec.num_agents)


def _policies(method: Any, game: Any) -> Tensor:
    """Log-probabilities in every state, double precision."""
    seen = _everywhere(method, game)
    with torch.no_grad():
        if isinstance(method, MAMQL):
            q = method.actor.q(seen).double()
            return boltzmann_log_probs(q, method.cfg.inverse_temperature)
        return method.actor.logits(seen).double().log_softmax(-1)


def _identity_figures(run: FinishedRun) -> dict[str, float]:
    """Everything that the sheet lists, in double precision on enumerated rows."""
    method, game = run.learner, _game(run)
    expert, transition, discount = game.equilibrium, game.transition, game.discount
    true = torch.stack(
        [average_over_others(game.reward[k], expert.logp, k) for k in range(len(game.reward))]
    )
    dynamics = [marginal_transition(transition, expert.logp, k) for k in range(len(true))]

    def recovered(q: Tensor) -> Tensor:
        value = soft_value(q, game.inverse_temperature)
        return q - discount * torch.stack(
            [ahead @ v for ahead, v in zip(dynamics, value, strict=True)]
        )

    def unexplained(q: Tensor) -> float:
        pairs = zip(recovered(q) - true, dynamics, strict=True)
        return max(float(without_shaping(d, p, discount).abs().max()) for d, p in pairs)

    rows, weight = _enumerated(game)
    method.actor.double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.actor.parameters():
            parameter.copy_(3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
        terms = method.terms(*rows)
    objective = (weight * (terms.reward - terms.flow)).sum(1)
    cloning = (weight * terms.logp).sum(1) / method.cfg.inverse_temperature
    figures = {
        "bellman": float((recovered(expert.q) - true).abs().max()),
        "cloning": float((objective - cloning).abs().max()),
    }
    identity = _fitted(method, rows, weight, "identity", 1.0)
    learned = boltzmann_log_probs(identity, game.inverse_temperature)
    divergence = (expert.logp.exp() * (expert.logp - learned)).sum(-1)
    return figures | {
        "kl": float(divergence.max()),
        "raw": float((recovered(identity) - true).abs().max()),
        "shaped": unexplained(identity),
        "shaped, chi2 5": unexplained(_fitted(method, rows, weight, "chi2", 5.0)),
        "shaped, chi2 0.5": unexplained(_fitted(method, rows, weight, "chi2", 0.5)),
    }


def _enumerated(game: Any) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """All steps (s, k, t) of a random game, and their weights: the experts' discounted occupancy."""
    states, actions, agents = game.num_states, game.num_actions, len(game.reward)
    s, k, t = torch.meshgrid(
        torch.arange(states),
        torch.arange(actions**agents),
        torch.arange(states),
        indexing="ij",
    )
    joint = joint_policy(game.equilibrium.logp)
    ahead = torch.einsum("sk,skt->st", joint, game.transition)
    # d = (1 - discount) d_0 + discount d P, from all states alike.
    flow = torch.eye(states, dtype=torch.float64) - game.discount * ahead.T
    first = torch.full((states,), (1 - game.discount) / states, dtype=torch.float64)
    occupancy = torch.linalg.solve(flow, first)
    weight = occupancy[:, None, None] * joint.unsqueeze(-1) * game.transition
    radix = actions ** torch.arange(agents - 1, -1, -1)
    action = k.flatten().unsqueeze(-1) // radix % actions
    obs, next_obs = (game.observe(x.flatten()).double().repeat(1, agents) for x in (s, t))
    never = torch.zeros(len(obs), dtype=torch.bool)
    return (obs, action, next_obs, never), weight.flatten()


def _fitted(
    method: MAMQL, rows: tuple[Tensor, ...], weight: Tensor, phi: Phi, alpha: float
) -> Tensor:
    """Critics of every state at the optimum of the weighted offline objective."""
    with torch.no_grad():
        for parameter in method.actor.parameters():
            parameter.zero_()
    optimiser = torch.optim.LBFGS(
        method.actor.parameters(),
        max_iter=5_000,
        max_eval=10_000,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        terms = method.terms(*rows)
        loss = (weight * (terms.flow - concave_terms(terms.reward, phi, alpha))).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    states = method.spec.obs_dim // method.spec.num_agents
    seen = torch.eye(states, dtype=torch.float64).repeat(1, method.spec.num_agents)
    with torch.no_grad():
        return method.actor.q(seen)


def _judge_identities(figures: Figures) -> list[Check]:
    bounds = {"bellman": 1e-8, "cloning": 1e-12, "kl": 1e-4, "shaped": 5e-3}
    checks = [
        Check(f"{name}, game {k}", value, f"< {bound:g}", value < bound)
        for name, bound in bounds.items()
        for k, value in enumerate(figures["game"][name])
    ]
    for k in range(len(figures["game"]["shaped"])):
        own, gentle, harsh = (
            figures["game"][name][k] for name in ("shaped", "shaped, chi2 5", "shaped, chi2 0.5")
        )
        rows = (("chi2 5 over identity", gentle - own), ("chi2 0.5 over chi2 5", harsh - gentle))
        checks += [Check(f"residual, {n}, game {k}", v, "> 0", v > 0) for n, v in rows]
    return checks


def _share_figures(run: FinishedRun) -> dict[str, float]:
    """Exact discounted returns of each agent, and their share between uniform and expert."""
    game, steps = _game(run), 300
    learned = _policies(run.learner, game)
    uniform = torch.zeros_like(learned).log_softmax(-1)
    low, own, high = (
        game.expected_returns(logp, steps, game.discount)
        for logp in (uniform, learned, game.equilibrium.logp)
    )
    figures = {}
    for k in range(len(own)):
        figures |= {
            f"share {k}": float((own[k] - low[k]) / (high[k] - low[k])),
            f"return {k}": float(own[k]),
            f"expert {k}": float(high[k]),
            f"uniform {k}": float(low[k]),
        }
    return figures


def _judge_regularisation(figures: Figures) -> list[Check]:
    checks = []
    for agent in range(2):
        for seed, share in enumerate(figures["alpha 5"][f"share {agent}"]):
            checks.append(
                Check(f"alpha 5, agent {agent}, seed {seed}", share, "> 0.95", share > 0.95)
            )
        for seed, share in enumerate(figures["alpha 0.5"][f"share {agent}"]):
            checks.append(
                Check(f"alpha 0.5, agent {agent}, seed {seed}", share, "< 0.9", share < 0.9)
            )
    return checks


def _gems_figures(run: FinishedRun) -> dict[str, float]:
    """Exact returns of 15 steps, of the learned policies and the experts; errors of rewards."""
    game, method = _game(run), run.learner
    own = game.expected_returns(_policies(method, game), 15)
    experts = game.expected_returns(game.equilibrium.logp, 15)
    figures = {
        "return": float(own.mean()),
        "agent 0": float(own[0]),
        "agent 1": float(own[1]),
        "experts": float(experts.mean()),
    }
    if isinstance(method, MAMQL) or method.cfg.reward == "airl":
        found = _marginal_rewards(method, game)
        figures["reward error"] = _reward_error(found, game)
        figures["error of no reward"] = _reward_error(torch.zeros_like(found), game)
    return figures


def _marginal_rewards(method: Any, game: Any) -> Tensor:
    """What a method says that each choice earns in each state, in units of reward."""
    seen, logp = _everywhere(method, game), game.equilibrium.logp
    if not isinstance(method, MAMQL):
        # Nats, which are rewards times the experts' inverse temperature.
        return method.marginal_reward(seen).double() / game.inverse_temperature
    with torch.no_grad():
        q = method.actor.q(seen).double()
    ahead = game.expected_next(soft_value(q, method.cfg.inverse_temperature))
    next_value = [average_over_others(ahead[k], logp, k) for k in range(len(q))]
    return q - game.discount * torch.stack(next_value)


def _reward_error(found: Tensor, game: Any) -> float:
    """Root mean square, over agents, states and choices, of what no potential explains."""
    logp = game.equilibrium.logp
    rest = []
    for k in range(len(found)):
        difference = found[k] - average_over_others(game.reward[k], logp, k)
        rest.append(_without_shaping(difference, game, k))
    return float(torch.stack(rest).square().mean().sqrt())


def _without_shaping(difference: Tensor, game: Any, agent: int) -> Tensor:
    """As the function of that name, whose full matrix would take a gigabyte: two agents, Gems."""
    states, actions = difference.shape
    # Axes: state, own choice, the other's choice. Each row of the matrix is an own choice in a state,
    # given by the columns in which it has entries: c(s) - discount c(s') for each of the other's.
    following = game.successor.unflatten(1, (actions, actions)).movedim(1 + agent, 1)
    prob = game.equilibrium.logp[1 - agent].exp().unsqueeze(1).expand(following.shape)
    here = torch.arange(states).view(-1, 1, 1).expand(following.shape)
    columns = torch.cat([here, following], -1).flatten(0, 1)
    entries = torch.cat([prob, -game.discount * prob], -1).flatten(0, 1)
    pairs, target = (columns.unsqueeze(2), columns.unsqueeze(1)), difference.reshape(-1, 1)
    normal, right = target.new_zeros(states, states), target.new_zeros(states)
    normal.index_put_(pairs, entries.unsqueeze(2) * entries.unsqueeze(1), accumulate=True)
    right.index_add_(0, columns.flatten(), (entries * target).flatten())
    potential = torch.cholesky_solve(right.unsqueeze(1), torch.linalg.cholesky(normal))
    explained = (entries * potential.squeeze(1)[columns]).sum(1, keepdim=True)
    return (target - explained).view(states, actions)


def _judge_gems(figures: Figures) -> list[Check]:
    own, checks = figures["mamql"], []
    for name, arm in (("cloning", "cloning"), ("MA-GAIL", "ma_gail")):
        for k, (more, less) in enumerate(zip(own["return"], figures[arm]["return"], strict=True)):
            check = f"return an agent, MAMQL minus {name}, seed {k}"
            checks.append(Check(check, more - less, "> 0", more > less))
    errors = zip(figures["ma_airl"]["reward error"], own["reward error"], strict=True)
    for k, (more, less) in enumerate(errors):
        check = f"reward error, MA-AIRL minus MAMQL, seed {k}"
        checks.append(Check(check, more - less, "> 0", more > less))
    return checks
