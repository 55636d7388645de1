"""Real-time iteration of diffusion policies: a few low noise levels from the last plan, no full draw.

A diffusion policy asks its network about 100 times for a chunk of actions, and then executes several of
them with its eyes closed. Nothing is trained here: the chunk of before, shifted by what was executed,
is taken for a sample of a low noise level, and denoised from there, at every step.

    t = 0:   G = all K levels, from noise
    t >= 1:  G = [G_1, ..., G_T-1, G_T-1]
             for k in steps:  G = ddpm_step(M(G, k, O_t), k, G)
             execute the row of now

Compared with the policy that it makes fast:
- no noise is added to the guess, nor is it scaled to its level;
- a guess lies in one mode of the demonstrations, so the policy stays with what it decided, where
  drawing anew at every step would dither between modes;
- components with two values (a gripper) stick to the guess. clip: the guess keeps their sign alone, at
  a tenth; scale: the demonstrations' were divided by ten. Either way they are executed as +-1.

Its updates only measure: chunks are drawn in full for consecutive observations of the data, and tell
the level whose forward mean sqrt(abar_k) A is nearest to the shifted guess.

| variable | paper | shape | unit |
|---|---|---|---|
| chunk | A | n h a | scaled actions |
| guess | G | n h a | scaled actions |
| steps | K' | | levels, falling to 0 |
| alpha_bars | abar | K | share of the signal's variance |
"""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.adapters.chunk_models import load_chunk_model
from esscher.adapters.episodes import EpisodeRunner
from esscher.distributions.chunks import (
    ChunkMemory,
    ChunkModel,
    ChunkPolicy,
    Noise,
    begun,
    check_executed,
    drawn_for,
    seen,
)
from esscher.distributions.remembering import Player
from esscher.errors import UserError, require
from esscher.experience import Dataset
from esscher.experience.windows import WindowBatch, Windows
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment, whole_path
from esscher.functional.counted_noise import counted_normal
from esscher.functional.diffusion import alpha_bars
from esscher.method import Method, Paper, continuous_only
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, within
from esscher.registry import load_module
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Metrics, Spec

PAPER = Paper(
    title="Real-Time Iteration Scheme for Diffusion Policy",
    year=2025,
    arxiv="2508.05396",
    sections="sec. III",
    purpose="A trained diffusion policy, made about thirty times faster and closed-loop, untrained.",
    claim="Denoising from the shifted last prediction at a few low noise levels acts as well as full "
    "denoising, at 3 network evaluations an action instead of 100 a chunk, and stays with one mode.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the real-time iteration; defaults from the authors' code."""

    policy: str | None = None
    """What is made fast: a RUN folder of diffusion_policy, or module:function that returns a chunk
    model (esscher/chunk_models.py shows one; from_diffusers makes one of a DDPMScheduler)."""
    steps: tuple[int, ...] = (3, 1, 0)
    """Levels of a warm start, falling to 0; none: those from the level that the data suggest down to 0.
    The authors: from 2, 1, 0 (PushT) to 20 .. 0 (square, from images)."""
    skip: Literal["relabel", "jump"] = "relabel"
    """Where steps leaves levels out: relabel takes the sample of the level below for one of the next
    step (the authors), jump goes all the way down."""
    warm_start: bool = True
    """False: all levels from noise at every prediction, the policy as it was."""
    executed: int = 1
    """Actions of a prediction that are executed, by which the guess is shifted, >= 1."""
    discrete: tuple[int, ...] = ()
    """Components of an action that are -1 or 1."""
    variant: Literal["clip", "scale"] = "clip"
    """Of discrete components: clip cuts the guess to their sign over `factor`; scale leaves it, for a
    policy that learned them divided by ten."""
    factor: float = 10.0
    """See variant, >= 1."""
    noise_schedule: Literal["training", "linear"] = "training"
    """The policy's own, or DDPM's linear one, which the authors' evaluation puts in its place."""
    batch_size: int = 64
    """Windows of the data that a measurement draws chunks for."""

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
        ends = not self.steps or self.steps[-1] == 0
        require("steps", self.steps, falls and ends, "levels that fall strictly and end at 0")
        require("executed", self.executed, self.executed >= 1, ">= 1")
        require("factor", self.factor, self.factor >= 1, ">= 1")
        require("discrete", self.discrete, all(n >= 0 for n in self.discrete), ">= 0 each")

    def resolved(self) -> "Config":
        """With folders named by their whole paths."""
        return replace(self, policy=whole_path(self.policy))


def shifted(chunk: Float[Tensor, "b h a"], executed: int) -> Float[Tensor, "b h a"]:
    """The chunk as it stands after so many steps: its first rows dropped, its last one repeated."""
    rest = chunk[:, executed:]
    return torch.cat([rest, chunk[:, -1:].expand(-1, executed, -1)], 1)


def warm_start(
    model: ChunkModel,
    guess: Float[Tensor, "b h a"],
    condition: Float[Tensor, "b c"],
    steps: tuple[int, ...],
    noise: Noise,
    skip: Literal["relabel", "jump"],
) -> Float[Tensor, "b h a"]:
    """The guess denoised at these levels; noise k is that of the k-th step."""
    z = guess
    for place, level in enumerate(steps):
        last = place == len(steps) - 1
        to = -1 if last else steps[place + 1] if skip == "jump" else level - 1
        z = model.step(z, level, condition, None if to < 0 else noise(place), to)
    return z


def deviations(kept: Float[Tensor, "k"], moments: Float[Tensor, "3"]) -> Float[Tensor, "k"]:
    """E |G - sqrt(abar_k) A|^2 at every level, from the means of |G|^2, <G, A> and |A|^2; or sums."""
    guess, product, chunk = moments
    return guess - 2 * kept.sqrt() * product + kept * chunk


class RealTimeIteration(nn.Module):
    """A chunk model that goes on from its last plan.

    Args:
        model: of chunks; with the linear noise schedule its levels are replaced.
        cfg: see there.

    Raises:
        UserError: a level that the model does not have, more executed than a chunk holds, or a discrete
            component that an action does not have.
    """

    moments: Tensor

    def __init__(self, model: ChunkModel, cfg: Config):
        super().__init__()
        check_executed(model, cfg.executed)
        below = all(level < model.levels for level in cfg.steps)
        require("steps", cfg.steps, below, f"levels below {model.levels}, those of the policy")
        width = model.chunk_shape[1]
        known = all(n < width for n in cfg.discrete)
        require("discrete", cfg.discrete, known, f"components of an action, in [0, {width})")
        self.model, self.cfg = model, cfg
        self.register_buffer("moments", torch.zeros(3, dtype=torch.float64))
        if cfg.noise_schedule == "linear":
            model.alpha_bars.copy_(alpha_bars("linear", model.levels))

    @property
    def suggested(self) -> int:
        """The level nearest to what a shifted guess is."""
        return int(deviations(self.model.alpha_bars, self.moments).argmin())

    @property
    def steps(self) -> tuple[int, ...]:
        return self.cfg.steps or tuple(range(self.suggested, -1, -1))

    def begin(self, seed: Int[Tensor, "n"]) -> ChunkMemory:
        return begun(self.model, seed)

    @torch.no_grad()
    def act(
        self, obs: Float[Tensor, "n o"], memory: ChunkMemory
    ) -> tuple[Float[Tensor, "n a"], ChunkMemory]:
        """One action for each environment; the first of an episode takes all levels.

        Raises:
            UserError: the data's statistics are missing.
        """
        cfg, model = self.cfg, self.model
        state = seen(model, obs, memory)
        first = memory.time == 0
        due = first | (memory.used >= cfg.executed)
        cold = first if cfg.warm_start else due
        chunk = drawn_for(
            cold, lambda told, noise, _: model.draw(told, noise), model, state, obs, memory
        )
        steps = self.steps
        memory = replace(memory, chunk=chunk)
        warm = due & ~cold
        chunk = drawn_for(
            warm,
            lambda told, noise, guess: warm_start(
                model, shifted(guess, cfg.executed), told, steps, noise, cfg.skip
            ),
            model,
            state,
            obs,
            memory,
        )
        used = torch.where(due, 0, memory.used)
        row = model.obs_steps - 1 + used
        action = model.actions.inverse(chunk[torch.arange(len(obs), device=obs.device), row])
        if cfg.discrete:
            columns = list(cfg.discrete)
            action[:, columns] = torch.where(action[:, columns] > 0, 1.0, -1.0)
            if cfg.variant == "clip":
                chunk[..., columns] = chunk[..., columns].sign() / cfg.factor
        return action, replace(
            memory,
            time=memory.time + 1,
            evaluations=memory.evaluations + model.levels * cold + len(steps) * warm,
            state=state,
            chunk=chunk,
            used=used + 1,
        )


class RTIDP(Method):
    """See the module; `update` measures which level suits the data."""

    Config = Config
    loop = "offline"
    data = "required"
    trains = False
    headline = "suggested_level"

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "rti_dp")
        if cfg.policy is None:
            raise UserError(
                "rti_dp makes a trained policy fast: give --method.policy RUN of diffusion_policy, or "
                "module:function"
            )
        model = load_chunk_model(cfg.policy, spec).requires_grad_(False).eval()
        self.acting = RealTimeIteration(model, cfg).to(runtime.device)
        # Of one element: a graph would take a double without axes for a number, and not change it.
        self.count = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        self._measure = runtime.graph(self.measure)

    @property
    def policy(self) -> RealTimeIteration:
        return self.acting

    def experience(self, data: Dataset) -> Windows:
        """Windows that hold what is seen at a step and at the next prediction.

        Raises:
            UserError: an episode is shorter than that.
        """
        length = self.acting.model.obs_steps + self.cfg.executed
        return Windows(data, length, self.cfg.batch_size, device=self.runtime.device)

    @torch.no_grad()
    def update(self, batch: WindowBatch, step: int) -> Metrics:
        model, executed = self.acting.model, self.cfg.executed
        seed = torch.randint(2**62, (len(batch),), device=batch.obs.device)
        told = []
        for start in (0, executed):
            obs = batch.obs[:, start : start + model.obs_steps]
            state, goal = model.observed.state(obs), model.observed.wanted(obs[:, -1])
            told.append(model.condition(state, goal))

        def noise(draw: int) -> Tensor:
            """The same for both, so that they are draws of one mode."""
            one = counted_normal(seed, torch.zeros_like(seed), draw, model.chunk_shape)
            return torch.cat([one, one])

        before, after = model.draw(torch.cat(told), noise).chunk(2)
        return self._measure(shifted(before, executed), after)

    def measure(self, guess: Float[Tensor, "b h a"], chunk: Float[Tensor, "b h a"]) -> Metrics:
        """Take a guess, and what full denoising makes of the same moment, into the sums."""
        pairs = ((guess, guess), (guess, chunk), (chunk, chunk))
        found = torch.stack([(a.double() * b.double()).flatten(1).sum(-1).mean() for a, b in pairs])
        totals, count = self.acting.moments + found, self.count + 1
        apart = deviations(self.acting.model.alpha_bars, totals / count)
        self.acting.moments.copy_(totals)
        self.count.copy_(count)
        return {
            "suggested_level": apart.argmin().float(),
            "deviation": apart.min().float(),
        }


# ---- recipes


def smoke() -> Experiment:
    """A few measurements with the exact denoiser of an expert: does everything run?"""
    return Experiment.of(
        Config(policy="esscher.chunk_models:quick_dodge_expert", batch_size=4),
        env=EnvConfig(id=DODGE),
        data="esscher.datasets:dodge",
        steps=8,
        evaluation=EvaluationConfig(every=4, episodes=2),
    )


def paper() -> Experiment:
    """The settings of PushT, on the exact expert; give --method.policy RUN for a policy of your own."""
    return Experiment.of(
        Config(policy=EXPERT, steps=(2, 1, 0)),
        env=EnvConfig(id=DODGE),
        data="esscher.datasets:dodge",
        steps=50,
        evaluation=EvaluationConfig(every=0, episodes=400, deterministic=False),
    )


EXPERT, DODGE = "esscher.chunk_models:dodge_expert", "esscher.envs:Dodge"


def proof() -> Proof:
    """The sheet's three miniatures: an exact denoiser, a learned one, and a gripper."""
    return Proof(
        claims=(
            Claim(
                name="exact denoiser",
                statement="With the exact denoiser of an expert who passes an obstacle on either side: "
                "three evaluations a step succeed as full denoising of chunks does, and use both "
                "sides; full denoising at every step dithers between them.",
                arms={
                    "rti, levels 2 1 0": lambda seed: _exact(Config(steps=(2, 1, 0))),
                    "rti, level 0": lambda seed: _exact(Config(steps=(0,))),
                    "full, 8 actions": lambda seed: _exact(Config(warm_start=False, executed=8)),
                    "full, 1 action": lambda seed: _exact(Config(warm_start=False)),
                },
                measure=_exact_figures,
                judge=_judge_exact,
            ),
            Claim(
                name="learned denoiser",
                statement="The same order with a network that learned from 500 episodes of the expert, "
                "at a tenth of the time an action or less.",
                arms={"diffusion policy": lambda seed: _learned("dodge")},
                measure=_learned_figures,
                judge=_judge_learned,
            ),
            Claim(
                name="gripper",
                statement="A component that flips once sticks to a warm start; cut to a tenth of its "
                "sign, or learned at a tenth, it flips within three steps.",
                arms={
                    "plain": lambda seed: _learned("dodge_and_grip"),
                    "scaled": lambda seed: _learned("dodge_and_grip_scaled"),
                },
                measure=_gripper_figures,
                judge=_judge_gripper,
            ),
        ),
        notes="400 roll-outs each. Times are of one environment on one thread, the median of 50 "
        "actions after the first. The learned policies have a perceptron of 2 x 128, 50 levels and one "
        "observation. The gripper's component is not scaled by the data's range, or a tenth would be "
        "made whole again.",
    )


ROLLOUTS = 400


def _exact(cfg: Config) -> Experiment:
    return Experiment.of(
        replace(cfg, policy=EXPERT),
        env=EnvConfig(id=DODGE),
        data="esscher.datasets:dodge",
        steps=10,
        evaluation=EvaluationConfig(every=0, episodes=10),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _learned(data: str) -> Experiment:
    gripper = data != "dodge"
    recipe = load_module("diffusion_policy").dodge()
    stage = replace(
        recipe.stages[-1],
        env=EnvConfig(id=DODGE, kwargs={"gripper": True} if gripper else {}),
        data=f"esscher.datasets:{data}",
    )
    return replace(
        recipe,
        method=replace(recipe.method, unscaled=(1,) if gripper else ()),
        stages=(stage,),
        evaluation=EvaluationConfig(every=0, episodes=10),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


def _rolled_out(run: FinishedRun, policy: RealTimeIteration | ChunkPolicy) -> dict[str, float]:
    """Success, the share that passed above, evaluations a step after the first, how late it gripped."""
    runner = EpisodeRunner(run.experiment.task, run.experiment.seed)
    seed_phase(run.experiment.seed, 0, Phase.EVALUATE)
    player = Player(policy, explore=True)
    episodes = runner(player, ROLLOUTS, 0)
    runner.close()
    assert player.memory is not None
    asked = player.memory.evaluations - policy.model.levels
    found = {
        "success": float(episodes.fitness.mean()),
        "above": float((episodes.descriptor[:, 0] > 0).float().mean()),
        "evaluations": float((asked / (player.memory.time - 1)).mean()),
    }
    if episodes.descriptor.shape[1] > 1:
        late = episodes.descriptor[:, 1]
        found |= {"late": float(late.mean()), "in time": float((late <= 3).float().mean())}
    return found


def _milliseconds(policy: RealTimeIteration | ChunkPolicy) -> float:
    """Of an action in one environment: the median of 50, after the first."""
    obs, spent = torch.zeros(1, 2), []
    player = Player(policy, explore=False)
    for _ in range(51):
        began = time.perf_counter()
        player(obs)
        spent.append(1000 * (time.perf_counter() - began))
    return float(torch.tensor(spent[1:]).median())


def _exact_figures(run: FinishedRun) -> dict[str, float]:
    policy = run.learner.policy
    return {**_rolled_out(run, policy), "milliseconds": _milliseconds(policy)}


def _judge_exact(figures: Figures) -> list[Check]:
    ours, dithering = figures["rti, levels 2 1 0"], figures["full, 1 action"]
    checks = []
    for seed, success in enumerate(ours["success"]):
        gain, asked = success - dithering["success"][seed], ours["evaluations"][seed]
        checks += [
            Check(f"success, seed {seed}", success, ">= 0.95", success >= 0.95),
            Check(f"success over full, 1 action, seed {seed}", gain, ">= 0.5", gain >= 0.5),
            Check(f"evaluations a step, seed {seed}", asked, "= 3", asked == 3),
            within(f"share above, seed {seed}", ours["above"][seed], 0.4, 0.6),
        ]
    return checks


ARMS_LEARNED = {
    "rti": Config(steps=(2, 1, 0)),
    "full, 8 actions": Config(warm_start=False, executed=8),
    "full, 1 action": Config(warm_start=False),
}


def _learned_figures(run: FinishedRun) -> dict[str, float]:
    model, found = run.learner.policy.model, {}
    for name, cfg in ARMS_LEARNED.items():
        policy = RealTimeIteration(model, cfg)
        rolled = _rolled_out(run, policy)
        found |= {f"{key}, {name}": value for key, value in rolled.items()}
        if cfg.executed == 1:  # With chunks most actions cost nothing, and a median would say so.
            found[f"milliseconds, {name}"] = _milliseconds(policy)
    return found


def _judge_learned(figures: Figures) -> list[Check]:
    found, checks = figures["diffusion policy"], []
    for seed, success in enumerate(found["success, rti"]):
        chunks, steps = (found[f"success, full, {n}"][seed] for n in ("8 actions", "1 action"))
        faster = found["milliseconds, full, 1 action"][seed] / found["milliseconds, rti"][seed]
        checks += [
            Check(
                f"success less that of full, 8 actions, seed {seed}",
                success - chunks,
                ">= -0.05",
                success - chunks >= -0.05,
            ),
            Check(
                f"success over full, 1 action, seed {seed}",
                success - steps,
                "> 0",
                success > steps,
            ),
            within(f"share above, seed {seed}", found["above, rti"][seed], 0.4, 0.6),
            Check(f"times faster, seed {seed}", faster, ">= 10", faster >= 10),
        ]
    return checks


def _gripper_figures(run: FinishedRun) -> dict[str, float]:
    model, found = run.learner.policy.model, {}
    plain = not run.experiment.stages[-1].data.endswith("scaled")  # type: ignore[union-attr]
    arms = {"as learned": Config(discrete=(1,), variant="scale", steps=(2, 1, 0))}
    if plain:
        arms["clip"] = replace(arms["as learned"], variant="clip")
    arms["full, 8 actions"] = replace(arms["as learned"], warm_start=False, executed=8)
    for name, cfg in arms.items():
        rolled = _rolled_out(run, RealTimeIteration(model, cfg))
        found |= {f"{key}, {name}": rolled[key] for key in ("success", "late", "in time")}
    return found


def _judge_gripper(figures: Figures) -> list[Check]:
    told = (
        ("sticks: in time, without scaling", figures["plain"]["in time, as learned"], False),
        ("in time, clip", figures["plain"]["in time, clip"], True),
        ("in time, scale", figures["scaled"]["in time, as learned"], True),
    )
    return [
        Check(
            f"{name}, seed {seed}",
            share,
            ">= 0.95" if wanted else "< 0.5",
            share >= 0.95 if wanted else share < 0.5,
        )
        for name, shares, wanted in told
        for seed, share in enumerate(shares)
    ]
