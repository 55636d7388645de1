"""Distributional rewards optimise diffusion models (DRAGON).

A diffusion model is fine-tuned on any reward: of single samples, or of a whole set of them (their
distance to exemplars, their variety), which gives no sample a reward of its own. The reward need
not be differentiable, and there are no people's preferences. In each iteration the model draws two
samples A_i, B_i of each condition, these are divided into a positive set D+ and a negative set D-
of one size, with r(D+) > r(D-), and the model is told to denoise D+ better than D-:

    rewards of samples   D+_i = the better one of A_i, B_i, or D+ = the better half of all samples
    rewards of sets      D+ = A at first; swap A_i and B_i, i in random order, if it raises r(D+)

    m(x) = mean over components of |eps - eps_theta(x_t, t, c)|^2,   g(x) = -(m(x) - m_ref(x))

    DPO    L = -log sigma((beta / 2) [g(x+) - g(x-)])        the same t and eps in both
    KTO    L = mean of 1 - sigma(s beta (g(x) - Q)),   s = 1 on D+, -1 on D-,   Q = max(mean g, 0)
    SFT    L = mean of m(x+)                                  the baseline: imitate D+ alone

Samples are used in their iteration alone. The reference is and stays the model before training.

Compared with Diffusion-DPO: the pairs are the model's own, drawn anew in each iteration, and
ordered by a reward. Compared with DDPO: it needs no chain of steps and their log-probabilities, so
that any solver will do, and a reward of a set will too.

- If r(D+) is not above r(D-) the iteration ends without an update.
- KTO moves a model even if its labels say nothing, for Q is never below 0 and its utility is not
  symmetric; DPO does not. The setting divided_by = lot is the control that shows it.
- beta is of m as a mean over components, with the half of the authors' code in DPO. Papers that add
  components up have a beta as much smaller as there are components.

| variable | paper | shape | unit |
|---|---|---|---|
| x | A_i, B_i | 2n *d | |
| split | places of D+ (column 0) and D- in x | n 2 | |
| sigma | noise level of x = x0 + sigma eps | n | std of the noise over the signal |
| error, ref_error | m, m_ref | b 2 | |
| implicit | g | b 2 | |
| baseline | Q | scalar | that of g |
| beta | beta | scalar | 1 / error |

Of the paper only the abstract and summaries could be had: how sets are made for rewards of sets,
and most defaults, are choices; see the settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import require
from esscher.exemplars import RADIUS, STD, ring
from esscher.experience.conditions import Turns, Wanted
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    ImageConfig,
    LogConfig,
    ModelConfig,
)
from esscher.functional.contrast import (
    diffusion_dpo_terms,
    diffusion_kto_terms,
    greedy_split,
    halved_split,
    implicit_reward,
    kto_baseline,
    paired_split,
)
from esscher.functional.diffusion import Prediction, denoising_terms, over
from esscher.functional.sets import frechet_distance, moments, vendi_score
from esscher.images import mixture
from esscher.method import Judge, Method, Paper
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.runtime.device import Runtime, RuntimeConfig, sum_over_processes
from esscher.runtime.optim import Optim, polyak
from esscher.samplers.denoisers import Condition, repeated, rows_of
from esscher.samplers.solvers import Solver
from esscher.types import Asked, Drawn, Metrics

PAPER = Paper(
    title="DRAGON: Distributional Rewards Optimize Diffusion Generative Models",
    year=2025,
    arxiv="2504.15217",
    purpose="A diffusion model for any reward, also one that only whole sets of samples have.",
    claim="Contrasting a positive with a negative set of the model's own samples raises rewards of "
    "samples and of distributions alike, without preference labels.",
    sections="the positive and negative sets, the losses, fig. 2",
)

Loss = Literal["dpo", "kto", "sft"]
MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DRAGON. The paper's own numbers are known of the drawing alone; the others are
    those of Diffusion-DPO's and Diffusion-KTO's code, or choices of this library's.
    """

    loss: Loss = "dpo"
    """dpo, kto, or sft: the baseline that imitates the positive set alone."""
    pairing: Literal["paired", "unpaired"] = "paired"
    """Of rewards of samples: the better of each two, or the better half of all; dpo needs pairs."""
    divided_by: Literal["reward", "lot"] = "reward"
    """lot: a control whose sets are drawn by lot, from which nothing can be learned."""
    beta: float = 5_000.0
    """Strength of the contrast, and by it of the hold on the reference, > 0; without effect in sft.
    Lower: freer to move away. Diffusion-DPO's code: 5,000; Diffusion-KTO's: 1,000."""
    passes: int = 1
    """Of rewards of sets: how often every pair may change places, >= 1 (a choice)."""
    batch_size: int = 64
    """Conditions an iteration, of two samples each, over all processes, in [1, 100,000] (a choice)."""
    inner_steps: int = 4
    """Optimiser steps on the samples of an iteration, each at noise of its own, >= 1 (a choice)."""
    micro_batch_size: int = 0
    """Pairs whose activations are held at once, in drawing too, >= 0; 0: all. Does not change the
    objective."""
    draw_steps: int = 40
    """Of drawing, >= 1 (the paper; it finds that fewer do as well)."""
    scale: float = 1.0
    """Of guidance in drawing, in training and after it; 1: none. The paper trains with that of
    use."""
    solver: Solver = "ddim"
    """Of drawing, in training and after it: ddim, euler, heun or dpmpp_2m."""
    learning_rate: float = 1e-5
    """AdamW step, > 0 (a choice, for adapters; 1e-6 where all weights are trained)."""
    weight_decay: float = 0.01
    """Decoupled, per unit learning rate, >= 0 (Diffusion-DPO's code)."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length, > 0 (Diffusion-DPO's code)."""
    average: float = 0.0
    """Kept, each step, of the average of weights that is drawn from in the end, in [0, 1); 0: the
    newest weights are."""
    weighting: Prediction = "epsilon"
    """Whose error m is: of the noise (the papers), the sample, v or the flow."""

    def __post_init__(self) -> None:
        for name in ("beta", "learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("passes", "inner_steps", "draw_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("micro_batch_size", "weight_decay"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("batch_size", self.batch_size, 1 <= self.batch_size <= MOST, f"in [1, {MOST:,}]")
        require("scale", self.scale, abs(self.scale) < float("inf"), "finite")
        require("average", self.average, 0 <= self.average < 1, "in [0, 1)")
        pairs = self.pairing == "paired" or self.loss != "dpo"
        require("pairing", self.pairing, pairs, "paired with loss dpo (kto and sft need no pairs)")


class DRAGON(Method):
    """See the module; `improve` is one iteration."""

    Config = Config
    world = "diffusion"
    loop = "draw"
    rewarded = True
    sets = True
    headline = "reward_difference"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: ImageSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        runtime.share(cfg.batch_size)  # Said before work starts where they cannot.
        if spec.of_sets:
            told = ">= 2 with a reward of sets, for a set of one sample has none"
            require("batch_size", cfg.batch_size, cfg.batch_size >= 2, told)
            told = "paired with a reward of sets, which gives no sample a rank"
            require("pairing", cfg.pairing, cfg.pairing == "paired", told)
        self.model = spec.model
        self.model.guided(cfg.scale)  # Both refuse what they cannot do.
        self.model.levels(cfg.draw_steps)
        self.average = spec.model.averaged() if cfg.average else spec.model
        self._reference = spec.model.frozen()
        runtime.prepare(self.model, self.average, self._reference)
        self.opt = Optim(
            self.model.trained,
            cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
        )
        self._errors = runtime.autocast(self.errors)

    @property
    def policy(self) -> DiffusionModel:
        return self.average

    def experience(self, wanted: Wanted) -> Turns:
        return Turns(wanted, self.cfg.batch_size)

    def improve(
        self, asked: Asked, reward: Judge | None, step: int
    ) -> tuple[Metrics, Float[Tensor, "n"]]:
        assert reward is not None
        cfg = self.cfg
        condition = repeated(asked.condition, 2)
        x, judged = self._judged(condition, [row for row in asked.rows for _ in range(2)], reward)
        split, told, rewards = self.divided(judged, reward)
        # A lottery has nothing to gain; skipping its worse half would make it choose by the reward.
        skipped = cfg.divided_by == "reward" and float(told["reward_difference"]) <= 0
        told["skipped"] = x.new_tensor(float(skipped))
        if not skipped:
            steps = [self.descend(x, condition, split) for _ in range(cfg.inner_steps)]
            told |= {name: torch.stack([one[name] for one in steps]).mean() for name in steps[0]}
        return told, rewards

    @torch.no_grad()
    def _judged(
        self, condition: Condition, rows: Sequence[Mapping[str, Any]], reward: Judge
    ) -> tuple[Float[Tensor, "m *d"], Float[Tensor, "m *e"]]:
        """A sample each of the newest model, and its reward, or its embedding for one of sets; each
        process draws its share.
        """
        judge = reward.embed if reward.of_sets else reward
        seeds = torch.randint(2**62, (len(rows),)).tolist()
        drawn, judged = [], []
        here = range(len(rows))[self.runtime.part(len(rows))]
        size = 2 * self.cfg.micro_batch_size or len(here)
        for part in (here[start : start + size] for start in range(0, len(here), size)):
            places = slice(part.start, part.stop)
            drawn.append(self._draw(self.model, rows_of(condition, places), seeds[places]))
            judged.append(judge(drawn[-1], rows[places]))
        return self.runtime.joined(torch.cat(drawn)), self.runtime.joined(torch.cat(judged))

    @torch.no_grad()
    def divided(
        self, judged: Float[Tensor, "m *e"], reward: Judge
    ) -> tuple[Int[Tensor, "n 2"], Metrics, Float[Tensor, "k"]]:
        """The positive and the negative set, what they are worth, and the rewards of all drawn.

        Of a reward of sets the last is one number, that of the first samples of all pairs.

        Args:
            judged: rewards or embeddings, those of a pair one after the other.
        """
        cfg = self.cfg
        pairs, by_rank = judged.unflatten(0, (-1, 2)), cfg.pairing == "unpaired"
        told: Metrics = {}
        if cfg.divided_by == "reward" and reward.of_sets:
            order = torch.stack([torch.randperm(len(pairs)) for _ in range(cfg.passes)])
            split = greedy_split(pairs, reward.of_set, order)
            told["swaps"] = (split[:, 0] % 2).sum().float()
        else:
            lots = torch.rand(pairs.shape[:2]).to(pairs)
            rank = pairs if cfg.divided_by == "reward" else lots
            split = halved_split(rank) if by_rank else paired_split(rank)

        def worth(these: Float[Tensor, "k *e"]) -> Tensor:
            return judged.new_tensor(reward.of_set(these)) if reward.of_sets else these.mean()

        positive, negative = worth(judged[split[:, 0]]), worth(judged[split[:, 1]])
        told |= {"positive_reward": positive, "negative_reward": negative}
        told["reward_difference"] = positive - negative
        return split, told, worth(pairs[:, 0]).unsqueeze(0) if reward.of_sets else judged

    def descend(
        self, x: Float[Tensor, "m *d"], condition: Condition, split: Int[Tensor, "n 2"]
    ) -> Metrics:
        """An optimiser step on both sets, each pair at a noise level and with noise of its own; each
        process takes its share of the pairs.

        Args:
            x: all samples.
            condition: of each.
            split: places of the positive and the negative ones.
        """
        cfg, count = self.cfg, len(split)
        members = split[:, :1] if cfg.loss == "sft" else split
        sigma, noise = self.model.noise_levels(count), torch.randn_like(x[:count])
        here = torch.arange(count, device=x.device)[self.runtime.part(count)]
        parts = here.split(cfg.micro_batch_size or count)
        found: list[tuple[Tensor, Tensor]] = []

        def errors(model: DiffusionModel, rows: Tensor) -> Float[Tensor, "b k"]:
            return self._errors(model, x, condition, members[rows], sigma[rows], noise[rows])

        with torch.no_grad():
            ref_error, baseline = sigma.new_zeros(members.shape), sigma.new_zeros(())
            if cfg.loss != "sft":
                error = torch.cat([errors(self._reference, rows) for rows in parts])
                ref_error = self.runtime.joined(error)
            if cfg.loss == "kto":  # Of all parts, so that it does not matter how they are cut.
                error = torch.cat([errors(self.model, rows) for rows in parts])
                error = self.runtime.joined(error)
                baseline = kto_baseline(implicit_reward(error, ref_error))

        def loss(rows: Tensor) -> Float[Tensor, ""]:
            implicit = implicit_reward(errors(self.model, rows), ref_error[rows])
            terms = self.contrast_terms(implicit, baseline)
            found.append((terms.detach(), implicit.detach()))
            return terms.sum() / count

        self.opt.minimize_sum(loss, parts)
        if self.average is not self.model:
            polyak(self.average, self.model, 1 - cfg.average)
        terms, implicit = (torch.cat(values) for values in zip(*found, strict=True))
        told = {"loss": terms.mean()}
        if cfg.loss != "sft":
            better, worse = implicit.unbind(-1)
            told["implicit_accuracy"] = ((better > worse) + 0.5 * (better == worse)).mean()
        told = {name: value / self.runtime.world for name, value in told.items()}
        sum_over_processes(list(told.values()))
        return told

    def errors(
        self,
        model: DiffusionModel,
        x: Float[Tensor, "m *d"],
        condition: Condition,
        places: Int[Tensor, "b k"],
        sigma: Float[Tensor, "b"],
        noise: Float[Tensor, "b *d"],
    ) -> Float[Tensor, "b k"]:
        """The errors m of samples by their places, those of a row in the same noise."""
        x0, copies = x[places.flatten()], places.shape[1]
        level = sigma.repeat_interleave(copies)
        noisy = x0 + over(level, x0) * noise.repeat_interleave(copies, 0)
        denoised = model.denoiser(noisy, level, rows_of(condition, places.flatten()))
        return denoising_terms(denoised, x0, level, self.cfg.weighting).view(places.shape)

    def contrast_terms(
        self, implicit: Float[Tensor, "b k"], baseline: Float[Tensor, ""]
    ) -> Float[Tensor, "b"]:
        """The loss of each pair; in sft its one member's error, whose reference counts as 0."""
        if self.cfg.loss == "dpo":
            return diffusion_dpo_terms(implicit, self.cfg.beta)
        if self.cfg.loss == "kto":
            return diffusion_kto_terms(implicit, self.cfg.beta, baseline).mean(-1)
        return -implicit[:, 0]

    def draw(self, asked: Asked, seeds: Sequence[int]) -> Drawn:
        return Drawn(x=self._draw(self.average, asked.condition, seeds), told={})

    def _draw(self, model: DiffusionModel, condition: Condition, seeds: Sequence[int]) -> Tensor:
        cfg = self.cfg
        options = {"steps": cfg.draw_steps, "scale": cfg.scale, "solver": cfg.solver}
        return model.draw(condition, seeds, **options)


# ---- recipes


def smoke() -> Experiment:
    """Ten iterations of a small mixture, a set reward."""
    return replace(
        _in_the_plane(
            Config(
                beta=20.0,
                batch_size=8,
                inner_steps=2,
                micro_batch_size=5,
                draw_steps=4,
                learning_rate=1e-3,
                average=0.5,
            ),
            FRECHET,
            steps=10,
            width=16,
        ),
        evaluation=EvaluationConfig(every=5, episodes=8),
        checkpoint=CheckpointConfig(every=5),
    )


def paper() -> Experiment:
    """The paper's drawing, and this library's choices for adapters; give the model, the conditions
    and the reward.
    """
    return Experiment.of(
        Config(batch_size=128, micro_batch_size=8, average=0.99),
        model=ModelConfig(lora_rank=16),
        steps=500,
    )


def samples() -> Experiment:
    """A ring of eight Gaussians moves to three of them, by a reward of single samples; a minute."""
    return _in_the_plane(CONTRAST, MAHALANOBIS)


def frechet() -> Experiment:
    """A ring of eight Gaussians becomes like exemplars of three of them, by a distance of sets; a
    minute.
    """
    return _in_the_plane(CONTRAST, FRECHET)


def vendi() -> Experiment:
    """One Gaussian spreads, by a reward of the variety of a set; a minute."""
    return _in_the_plane(SPREAD, VENDI, components=1)


FRECHET: dict[str, Any] = {
    "reward": "esscher.image_rewards:Frechet",
    "reward_kwargs": {"exemplars": "esscher.exemplars:three_of_eight"},
}
MAHALANOBIS = FRECHET | {"reward": "esscher.exemplars:Mahalanobis"}
VENDI = {"reward": "esscher.image_rewards:Vendi"}
# The sheet's beta of 20 is without the half: 40 here. Its Adam neither decays nor clips.
CONTRAST = Config(
    beta=40.0,
    batch_size=128,
    draw_steps=20,
    learning_rate=5e-4,
    weight_decay=0.0,
    max_grad_norm=1e6,
)
SPREAD = replace(CONTRAST, beta=5.0)


def _in_the_plane(
    cfg: Config,
    reward: Mapping[str, Any],
    *,
    steps: int = 100,
    width: int = 128,
    components: int = 8,
) -> Experiment:
    return Experiment.of(
        cfg,
        model=ModelConfig(
            source="esscher.images:mixture",
            kwargs={"radius": 3.0, "std": 0.4, "width": width, "components": components},
        ),
        image=ImageConfig(**reward, at_once=512),
        steps=steps,
        evaluation=EvaluationConfig(every=20, episodes=512),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=10),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


# ---- proof


def proof() -> Proof:
    """The sheet's miniature: eight Gaussians, three of them wanted, and one that is to spread."""
    kto = replace(CONTRAST, loss="kto", beta=20.0)
    return Proof(
        claims=(
            Claim(
                name="rewards of sets",
                statement="From a ring of eight Gaussians, with exemplars of three of them: DPO on "
                "the Frechet distance of sets ends below a distance of 4.5, sets drawn by lot "
                "leave it within 10% of where it began, and a reward of single samples ends within "
                "15% of the reward of sets.",
                arms={
                    "dpo, set": partial(_steered, CONTRAST, FRECHET),
                    "dpo, samples": partial(_steered, CONTRAST, MAHALANOBIS),
                    "dpo, lots": partial(_steered, replace(CONTRAST, divided_by="lot"), FRECHET),
                    "kto, set": partial(_steered, kto, FRECHET),
                    "kto, lots": partial(_steered, replace(kto, divided_by="lot"), FRECHET),
                },
                measure=_measure_frechet,
                judge=_judge_frechet,
            ),
            Claim(
                name="variety",
                statement="One Gaussian of the ring, and the Vendi score of a set, which gives no "
                "sample a reward: it rises by more than half of what the whole ring is above it.",
                arms={
                    "dpo, set": partial(_steered, SPREAD, VENDI, components=1),
                    "dpo, lots": partial(
                        _steered, replace(SPREAD, divided_by="lot"), VENDI, components=1
                    ),
                },
                measure=_measure_vendi,
                judge=_judge_vendi,
            ),
        ),
        notes="The sheet's start is a trained network; here it is a network around the exact "
        "mixture, with that mixture's noise levels. Distances are of 4,096 samples to the exact "
        "moments of the three Gaussians. The 15% are of means over the seeds. The sheet's beta of "
        "20 for DPO leaves out the half in the loss and is 40 here. The sheet planned the second "
        "claim without settings; at beta 40 the model stays near the one Gaussian (1.16 of 2), so "
        "beta is 5. The Vendi score takes the cosine of the samples themselves, which have two "
        "components, so it is 2 at most. KTO, and lots in the second claim, are shown and not "
        "judged: KTO drifts under labels that say nothing, as the sheet found.",
    )


def _steered(cfg: Config, reward: Mapping[str, Any], seed: int, components: int = 8) -> Experiment:
    return _in_the_plane(cfg, reward, components=components)


@torch.no_grad()
def _measure_frechet(run: FinishedRun) -> dict[str, float]:
    wanted = ring(range(3))
    mean = wanted.means.double().mean(0)
    away = wanted.means.double() - mean
    covariance = away.T @ away / len(away) + STD**2 * torch.eye(2).double()
    model, reference = run.learner.policy, run.learner._reference
    return {
        name: frechet_distance(*moments(_points(of, 4_096)), mean, covariance).item()
        for name, of in {"distance": model, "distance before": reference}.items()
    }


def _judge_frechet(figures: Figures) -> list[Check]:
    checks = []
    for seed, distance in enumerate(figures["dpo, set"]["distance"]):
        told = f"distance, reward of sets, seed {seed}"
        checks.append(Check(told, distance, "< 4.5", distance < 4.5))
    lots = figures["dpo, lots"]
    for seed, pair in enumerate(zip(lots["distance"], lots["distance before"], strict=True)):
        change = pair[0] / pair[1] - 1
        told = f"change of the distance, sets by lot, seed {seed}"
        checks.append(Check(told, change, "-0.1 < x < 0.1", abs(change) < 0.1))
    of_sets, of_samples = (
        sum(figures[arm]["distance"]) / len(lots["distance"])
        for arm in ("dpo, set", "dpo, samples")
    )
    gap = of_sets / of_samples - 1
    told = "distance, reward of sets over that of samples, less 1"
    return [*checks, Check(told, gap, "-0.15 < x < 0.15", abs(gap) < 0.15)]


@torch.no_grad()
def _measure_vendi(run: FinishedRun) -> dict[str, float]:
    whole = mixture(radius=RADIUS, std=STD)
    models = {"model": run.learner.policy, "one": run.learner._reference, "eight": whole}
    return {f"Vendi, {name}": vendi_score(_points(of, 512)).item() for name, of in models.items()}


def _judge_vendi(figures: Figures) -> list[Check]:
    found = figures["dpo, set"]
    scores = zip(*(found[f"Vendi, {name}"] for name in ("model", "one", "eight")), strict=True)
    checks = []
    for seed, (model, one, eight) in enumerate(scores):
        share = (model - one) / (eight - one)
        told = f"share of the gap to the whole ring, seed {seed}"
        checks.append(Check(told, share, "> 0.5", share > 0.5))
    return checks


def _points(model: DiffusionModel, count: int) -> Float[Tensor, "n d"]:
    return model.draw(None, range(count), steps=CONTRAST.draw_steps)
