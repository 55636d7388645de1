"""Diffusion tree sampling: samples tilted by a reward, without training, better the longer it runs.

What is wanted is p(x0) exp(lambda r(x0)) / Z, or one sample of high reward. Every path ever drawn from
the model is kept in a tree, and the reward at its end is told to all states that it passed:

    V(x_t) = (1 / lambda) log E[exp(lambda r(x0)) | x_t]
    v(x)   = (1 / lambda) log( (1 / |C(x)|) sum_{c in C(x)} exp(lambda v(c)) ),   v(x0) = r(x0)

An iteration grows one tree for each row of its batch: walk down by exp(lambda v) (DTS) or by upper
confidence bounds (DTS*), until a node has room for another child, |C| < C N^alpha, draw that and
its way to x0, and back up. Drawing from a tree that has grown costs no evaluation of the network.

Compared with best of n and sequential Monte Carlo (`sampler`), which forget what they have drawn:
- values come from rewards of finished samples and not of clean estimates of noisy states (Tweedie),
  which are wrong where the model is still undecided; with smooth rewards, where these are right, Monte
  Carlo is as good or better;
- an interrupted search goes on, and the law of what is drawn tends to the target.
- until then values are too low: a child whose first sample was poor is hardly seen again, as in any
  average that decides on what it is taken of. Of a Gaussian tilted by 1.2 standard deviations three
  quarters of the way were gone at 5,000 evaluations, and no more at 80,000.

| variable | paper | shape | unit |
|---|---|---|---|
| inverse_temperature | lambda | scalar | nats a unit of reward |
| widening_scale, widening_exponent | C, alpha | scalar | |
| exploration | c_uct | scalar | reward |
| evaluations | NFE | scalar | rows that the network was asked about; 2 a step with guidance |

The tree and the samplers that it is compared with stand in esscher.samplers, for processes of your own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import UserError, require
from esscher.experience.conditions import Turns, Wanted
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ImageConfig,
    LogConfig,
    ModelConfig,
)
from esscher.method import Judge, Method, Paper
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.rng import mix
from esscher.runtime.state import State, under
from esscher.samplers.denoisers import rows_of
from esscher.samplers.particles import SteeringSettings, best_of_n, effective_size, steer
from esscher.samplers.solvers import ancestral, seeded_noise
from esscher.samplers.tree import DenoisingProcess, Tree, TreeSettings
from esscher.types import Asked, Drawn, Metrics

PAPER = Paper(
    title="Diffusion Tree Sampling: Scalable Inference-Time Alignment of Diffusion Models",
    year=2025,
    arxiv="2506.20701",
    purpose="Samples of a diffusion model tilted by a reward, or its best one, without training.",
    claim="A tree of all paths drawn so far, with rewards told to the states that led to them, draws "
    "from the model tilted by the reward, the more exactly the longer it grows, where sequential Monte "
    "Carlo is led astray by rewards of unfinished samples.",
    sections="algorithms 1 and 2, appendix F",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of diffusion tree sampling; defaults are the paper's for images."""

    sampler: Literal["tree", "smc", "best_of_n", "gradient"] = "tree"
    """tree: DTS and DTS*. To compare with, anew each iteration: sequential Monte Carlo, best of n, and
    steps that are moved along the gradient of the reward of clean estimates (DPS)."""
    selection: Literal["softmax", "uct"] = "softmax"
    """softmax: sample from the tilted law (DTS); uct: search for one sample (DTS*)."""
    inverse_temperature: float = 1.0
    """lambda > 0, nats a unit of reward."""
    backup: Literal["soft", "max"] = "soft"
    """max: the limit of large lambda (the paper's for DTS* on text)."""
    widening_scale: float = 2.0
    """C >= 1: a node takes another child while it has fewer than C N^alpha, N its visits."""
    widening_exponent: float = 0.8
    """alpha in (0, 1]. The first 36 iterations are all fresh paths from the root."""
    exploration: float = 1.0
    """c of uct, >= 0, in units of reward (not stated in the paper)."""
    draw_steps: int = 50
    """Of drawing, >= 2."""
    branches: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    """Where a tree branches, as shares of the steps; from 0, rising, below 1. Monte Carlo resamples
    there."""
    eta: float = 1.0
    """Share of the ancestral noise, in (0, 1]."""
    scale: float = 1.0
    """Of classifier-free guidance; 1: none."""
    batch_size: int = 1
    """Rows an iteration, each with a tree of its own, >= 1."""
    evaluations: int = 1_000
    """Of the network for each of these rows in an iteration, >= 1; what a tree takes more to finish a
    path, the next iteration takes less."""
    paths_at_once: int = 1
    """Paths that are chosen before any is drawn, >= 1; 1: the paper's. More keep a GPU busy."""
    potential: Literal["diff", "max"] = "diff"
    """Of Monte Carlo."""
    proposal: Literal["model", "guided"] = "model"
    """guided: Monte Carlo moves along the gradient of the reward of clean estimates (TDS)."""

    def __post_init__(self) -> None:
        for name in ("inverse_temperature", "scale"):
            require(name, getattr(self, name), abs(getattr(self, name)) < math.inf, "finite")
        require(
            "inverse_temperature", self.inverse_temperature, self.inverse_temperature > 0, "> 0"
        )
        require("widening_scale", self.widening_scale, 1 <= self.widening_scale < math.inf, ">= 1")
        require(
            "widening_exponent",
            self.widening_exponent,
            0 < self.widening_exponent <= 1,
            "in (0, 1]",
        )
        require("exploration", self.exploration, 0 <= self.exploration < math.inf, ">= 0")
        require("draw_steps", self.draw_steps, self.draw_steps >= 2, ">= 2")
        require("eta", self.eta, 0 < self.eta <= 1, "in (0, 1]: without noise children are alike")
        for name in ("batch_size", "evaluations", "paths_at_once"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        at = self.branches
        rising = at[:1] == (0.0,) and all(a < b for a, b in zip(at, at[1:], strict=False))
        require("branches", at, rising and at[-1] < 1, "shares that rise from 0, below 1")


class DiffusionTreeSampling(Method):
    """Grows trees over a diffusion model that stays as it is."""

    Config = Config
    world = "diffusion"
    loop = "draw"
    rewarded = True
    trains = False
    headline = "best_reward"

    def __init__(self, cfg: Config, spec: ImageSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        self._model = spec.model
        self._denoiser = self._model.guided(cfg.scale)
        self._levels = self._model.levels(cfg.draw_steps)
        steps = len(self._levels) - 1
        self._branches = sorted({round(share * steps) for share in cfg.branches})
        # A step to noise level 0 draws nothing, so no branch can begin there.
        last = steps - 1 - int(float(self._levels[-1]) == 0)
        told = f"at most {last} of the {steps} steps of this model, say with fewer branches"
        require("the last of branches", self._branches[-1], self._branches[-1] <= last, told)
        self._settings = TreeSettings(
            inverse_temperature=cfg.inverse_temperature,
            selection=cfg.selection,
            backup=cfg.backup,
            widening_scale=cfg.widening_scale,
            widening_exponent=cfg.widening_exponent,
            exploration=cfg.exploration,
            batch=cfg.paths_at_once,
        )
        self.evaluations = torch.zeros((), dtype=torch.float64)
        self.best_reward = torch.full((), -torch.inf, dtype=torch.float64)
        # Of each row: its tree, or the newest population with its weights.
        self._found: dict[int, Tree | dict[str, Tensor]] = {}

    @property
    def policy(self) -> DiffusionModel:
        return self._model

    def experience(self, wanted: Wanted) -> Turns:
        return Turns(wanted, self.cfg.batch_size)

    @torch.no_grad()
    def improve(
        self, asked: Asked, reward: Judge | None, step: int
    ) -> tuple[Metrics, Float[Tensor, "n"]]:
        """Let the trees of these rows grow, or draw a population for each."""
        assert reward is not None
        known: list[Tensor] = []
        told: list[dict[str, float]] = []
        for place, row in enumerate(asked.row):
            search = self._search_tree if self.cfg.sampler == "tree" else self._search_anew
            rewards, facts = search(asked, place, row, reward)
            known.append(rewards)
            told.append(facts)
            self.evaluations += facts.pop("new_evaluations")
        rewards = torch.cat(known)
        if len(rewards):
            self.best_reward.clamp_(min=float(rewards.max()))
        metrics = {name: torch.tensor(fmean(part[name] for part in told)) for name in told[0]}
        totals = {"best_reward": self.best_reward.clone(), "evaluations": self.evaluations.clone()}
        return metrics | totals, rewards.float()

    @torch.no_grad()
    def draw(self, asked: Asked, seeds: Sequence[int]) -> Drawn:
        """From the trees, without asking the network; of rows that have none yet, from the model."""
        x = torch.zeros((len(asked), *self._model.shape), device=self._model.device)
        if self._found and -1 in asked.row:
            known = asked.rows[asked.row.index(-1)]
            raise UserError(
                f"no tree has grown for {dict(known)}: the run searched for the rows of its data "
                "alone, so run it with this row among them"
            )
        without = [place for place, row in enumerate(asked.row) if row not in self._found]
        if without:
            x[without] = self._from_model(asked, without, [seeds[place] for place in without])
        for row in self._found.keys() & set(asked.row):
            places = [place for place, other in enumerate(asked.row) if other == row]
            x[places] = self._from_found(row, [seeds[place] for place in places]).to(x)
        return Drawn(x=x, told={})

    def tree(self, row: int) -> Tree:
        """The tree of a row of the data.

        Raises: UserError if none has grown for it.
        """
        found = self._found.get(row)
        if not isinstance(found, Tree):
            raise UserError(f"no tree has grown for row {row} of the data")
        return found

    def _search_tree(
        self, asked: Asked, place: int, row: int, reward: Judge
    ) -> tuple[Tensor, dict[str, float]]:
        """Rewards of the new leaves, and what the tree has to say."""
        process = self._process(rows_of(asked.condition, slice(place, place + 1)))
        tree = self._found.get(row)
        if not isinstance(tree, Tree):
            tree = self._new_tree(int(torch.randint(2**62, ())))
            self._found[row] = tree
        known: list[Tensor] = []

        def judged(x: Tensor) -> Tensor:
            x = x.to(self._model.device)
            known.append(reward(x, [asked.rows[place]] * len(x)).cpu())
            return known[-1]

        tree.process, tree.reward = process, judged
        before, size = tree.evaluations, self.cfg.evaluations
        tree.grow(evaluations=(before // size + 1) * size)
        facts = {
            "value": tree.value,
            "nodes": float(len(tree)),
            "new_evaluations": float(tree.evaluations - before),
        }
        return torch.cat(known), facts

    def _search_anew(
        self, asked: Asked, place: int, row: int, reward: Judge
    ) -> tuple[Tensor, dict[str, float]]:
        """Rewards of a population, weighted to stand for the tilted law."""
        cfg = self.cfg
        steps, calls = len(self._levels) - 1, 1 if cfg.scale == 1 else 2
        count = max(1, cfg.evaluations // (steps * calls))
        shared: dict[str, Any] = {
            "condition": rows_of(asked.condition, slice(place, place + 1)),
            "eta": cfg.eta,
            "start": self._model.start(self._levels),
            "end": self._model.end(self._levels),
            "device": self._model.device,
        }
        where = (self._levels, self._model.shape, count, int(torch.randint(2**62, ())))

        def judged(x: Tensor) -> Tensor:
            return reward(x, [asked.rows[place]] * len(x))

        if cfg.sampler == "best_of_n":
            found = best_of_n(self._denoiser, judged, *where, **shared)
        else:
            alone = cfg.sampler == "gradient"
            settings = SteeringSettings(
                inverse_temperature=cfg.inverse_temperature,
                potential=cfg.potential,
                proposal="guided" if alone else cfg.proposal,
                resample_at=() if alone else tuple(self._branches[1:]),
            )
            found = steer(self._denoiser, judged, *where, settings, **shared)
        if cfg.sampler == "smc":
            weight = found.log_weight.double()
        elif cfg.sampler == "gradient" and cfg.selection == "softmax":
            weight = torch.zeros(count, dtype=torch.float64).log_softmax(-1)
        elif cfg.selection == "softmax":
            weight = (cfg.inverse_temperature * found.reward.double()).log_softmax(-1)
        else:
            weight = torch.where(found.reward == found.reward.max(), 0.0, -torch.inf).double()
        self._found[row] = {"x": found.x.cpu(), "log_weight": weight.cpu()}
        facts = {
            "effective": float(effective_size(weight)),
            "new_evaluations": float(found.evaluations * calls),
        }
        return found.reward.cpu(), facts

    def _from_found(self, row: int, seeds: Sequence[int]) -> Float[Tensor, "n *d"]:
        """By a uniform number from each seed; of DTS* the one best sample."""
        found = self._found[row]
        uniform = torch.tensor([mix(seed) / 2**63 for seed in seeds], dtype=torch.float64)
        if isinstance(found, Tree):
            if self.cfg.selection == "uct":
                return found.best().x.expand(len(seeds), *self._model.shape)
            return found.drawn_by(uniform).x
        cumulative = found["log_weight"].exp().cumsum(0)
        place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return found["x"][place.clamp(max=len(cumulative) - 1)]

    def _from_model(self, asked: Asked, places: Sequence[int], seeds: Sequence[int]) -> Tensor:
        model = self._model
        start, noise = seeded_noise(seeds, model.shape, model.device)
        condition = rows_of(asked.condition, torch.tensor(places, device=model.device))
        start = start * model.start(self._levels)
        chain = ancestral(
            self._denoiser, start, self._levels, condition, eta=self.cfg.eta, noise=noise
        )
        return chain.x[-1] * model.end(self._levels)

    def _process(self, condition: Any) -> DenoisingProcess:
        return DenoisingProcess(
            self._denoiser,
            self._levels,
            self._model.shape,
            self._branches,
            eta=self.cfg.eta,
            condition=condition,
            calls=1 if self.cfg.scale == 1 else 2,
            start=self._model.start(self._levels),
            end=self._model.end(self._levels),
            device=self._model.device,
        )

    def _new_tree(self, seed: int) -> Tree:
        return Tree(self._process(None), _unjudged, self._settings, seed=seed)

    def state_dict(self) -> State:
        """Besides, of each row, its tree or population."""
        state = super().state_dict()
        for row, found in self._found.items():
            held = found.state_dict() if isinstance(found, Tree) else found
            state |= {f"found.{row}.{name}": value for name, value in held.items()}
        return state

    def load_state_dict(self, state: State) -> None:
        """Also trees of rows that this one has none for."""
        self._found = {}
        super().load_state_dict({k: v for k, v in state.items() if not k.startswith("found.")})
        for row in sorted({int(name.partition(".")[0]) for name in under("found", state)}):
            held = under(f"found.{row}", state)
            if "level" not in held:
                self._found[row] = held
                continue
            tree = self._new_tree(int(held["seed"]))
            tree.load_state_dict(held)
            self._found[row] = tree


def _unjudged(x: Tensor) -> Tensor:
    raise AssertionError("a tree is given its reward when it grows")


# ---- recipes


def smoke() -> Experiment:
    """Four iterations over two classes of a mixture of Gaussians."""
    return replace(
        Experiment.of(
            Config(draw_steps=10, evaluations=60, batch_size=2),
            model=ModelConfig(source="esscher.images:mixture", kwargs={"classes": True}),
            image=ImageConfig(labels=(0, 1, 2), reward="esscher.image_rewards:nearness"),
            steps=4,
        ),
        evaluation=EvaluationConfig(every=2, episodes=6),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1),
    )


def paper() -> Experiment:
    """The paper's settings for Stable Diffusion: give --reward, and --data with a column prompt."""
    return Experiment.of(
        Config(selection="uct", scale=7.5, evaluations=5_000),
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        image=ImageConfig(reward="esscher.image_rewards:Compressibility"),
        steps=10,
    )


def digits() -> Experiment:
    """Handwritten digits that a classifier takes for a three, from a model that knows no classes of
    its own accord (about three minutes).
    """
    return replace(
        Experiment.of(
            Config(evaluations=2_000, paths_at_once=16),
            model="esscher.images:digits_unet",
            image=ImageConfig(
                labels=(10,),
                reward="esscher.image_rewards:ClassProbability",
                reward_kwargs={"classifier": "esscher.images:digits_classifier", "target": 3},
                judge="esscher.image_rewards:ClassProbability",
                judge_kwargs={"classifier": "esscher.images:digits_judge", "target": 3},
            ),
            steps=10,
        ),
        evaluation=EvaluationConfig(every=5, episodes=64),
        checkpoint=CheckpointConfig(every=5),
    )


# ---- proof


def proof() -> Proof:
    """The sheet's miniature: eight Gaussians on a circle, their exact denoiser, and rewards that say
    little before the end.
    """
    return Proof(
        claims=(
            Claim(
                name="exact sampling",
                statement="Drawn from a tree, the shares of the modes come closer to the tilted law "
                "the more evaluations it grew by, and at 60,000 are twice as close as those of "
                "sequential Monte Carlo.",
                arms={
                    "tree, 20,000": lambda seed: _tilted("tree", 20_000),
                    "tree, 60,000": lambda seed: _tilted("tree", 60_000),
                    "tree, 200,000": lambda seed: _tilted("tree", 200_000),
                    "monte carlo, 20,000": lambda seed: _tilted("smc", 20_000),
                    "monte carlo, 60,000": lambda seed: _tilted("smc", 60_000),
                    "monte carlo, 200,000": lambda seed: _tilted("smc", 200_000),
                },
                measure=_shares,
                judge=_judge_shares,
                num_seeds=20,
            ),
            Claim(
                name="search",
                statement="With few evaluations, 2,000, a tree that searches finds a better sample "
                "than the best of as many drawn independently, and with more it is no worse.",
                arms={
                    f"{name}, {budget:,}": (
                        lambda seed, sampler=sampler, budget=budget: _sought(sampler, budget)
                    )
                    for budget in (2_000, 20_000)
                    for name, sampler in (("tree", "tree"), ("best of n", "best_of_n"))
                },
                measure=_best,
                judge=_judge_search,
                num_seeds=32,
            ),
        ),
        notes="With a reward that is smooth, so that clean estimates of noisy states get it right, "
        "sequential Monte Carlo is as good or better: trees are for rewards that are not. Evaluations "
        "are rows that the denoiser was asked about. Trees of one budget differ by 0.02 to 0.04 in "
        "total variation, the budgets by 0.01 to 0.02, so five seeds, the sheet's, put them in any "
        "order; here are 20, and 32 of the search. The sheet has searching trees ahead at 2,000 "
        "evaluations; but those are 20 paths, and the first 36 are all drawn from the root, "
        "independently: that is best of n, so on which side of 0 that check falls is chance.",
    )


def _circle(config: Config, reward: str) -> Experiment:
    """Radius 4, standard deviation 0.3, 100 steps."""
    return replace(
        Experiment.of(
            config,
            model=ModelConfig(
                source="esscher.images:exact_mixture", kwargs={"radius": 4.0, "std": 0.3}
            ),
            image=ImageConfig(reward=reward, at_once=3_000),
            steps=1,
        ),
        evaluation=EvaluationConfig(every=0, episodes=3_000),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=1),
        runtime=RuntimeConfig(threads=1),
    )


def _tilted(sampler: Any, evaluations: int) -> Experiment:
    config = Config(sampler=sampler, draw_steps=100, evaluations=evaluations)
    return _circle(config, "esscher.image_rewards:rising_modes")


def _sought(sampler: Any, evaluations: int) -> Experiment:
    config = Config(sampler=sampler, selection="uct", draw_steps=100, evaluations=evaluations)
    return _circle(config, "esscher.image_rewards:narrow_modes")


def _shares(run: FinishedRun) -> dict[str, float]:
    """Total variation between the shares of the modes among 3,000 samples and those of the target."""
    from esscher.runtime.load import load

    drawn = load(run.folder).policy.draw(3_000, seed=1)
    angle = torch.arange(8) * (2 * math.pi / 8)
    means = 4 * torch.stack([angle.cos(), angle.sin()], -1)
    share = torch.cdist(drawn, means).argmin(-1).bincount(minlength=8) / len(drawn)
    target = (0.6 * torch.arange(8)).softmax(-1)
    evaluations = run.rows("train")[-1]["evaluations"]
    return {
        "total_variation": float((share - target).abs().sum() / 2),
        "evaluations": evaluations,
    }


def _best(run: FinishedRun) -> dict[str, float]:
    row = run.rows("train")[-1]
    return {"best_reward": row["best_reward"], "evaluations": row["evaluations"]}


def _judge_shares(figures: Figures) -> list[Check]:
    mean = {arm: fmean(values["total_variation"]) for arm, values in figures.items()}
    few, some, many = (mean[f"tree, {n}"] for n in ("20,000", "60,000", "200,000"))
    other = mean["monte carlo, 60,000"]
    return [
        Check("total variation of the tree at 60,000", some, "< 0.15", some < 0.15),
        Check("the same over that of Monte Carlo", some / other, "< 0.5", some < other / 2),
        Check(
            "total variation at 200,000 over that at 20,000",
            many / few,
            "< 1, and between them",
            many < some < few,
        ),
    ]


def _judge_search(figures: Figures) -> list[Check]:
    mean = {arm: fmean(values["best_reward"]) for arm, values in figures.items()}
    few = mean["tree, 2,000"] - mean["best of n, 2,000"]
    many = mean["tree, 20,000"] - mean["best of n, 20,000"]
    return [
        Check("best reward of the tree over best of n at 2,000", few, "> 0", few > 0),
        Check("the same at 20,000", many, "> -0.3", many > -0.3),
    ]
