"""A vector for each distribution, of which only samples are seen (generative distribution embeddings).

A patient is a set of cells, a clone a set of sequences: the unit is a distribution P, observed
through samples of it. An encoder E turns a set S of samples into a vector z, and a conditional
generator G draws from z again; both are trained together on the generator's own loss,

    min over E, G of E_P E_S~P [loss of S under G(E(S))]

so that G(E(S)) becomes P as sets grow. Distances between vectors then follow Wasserstein distances
between distributions, and straight lines between vectors the paths of optimal transport.

E may depend on the set through its empirical measure alone: neither the order of the samples nor
repeating each of them k times may change z. Otherwise z tells how large a set was, and an encoder that
learned from sets of 64 is lost with one of 1,000.

Compared with an autoencoder of single samples:
- the encoder sees a set and the decoder draws, so that reconstruction is of a law and not of points;
- the generator is any conditional one: denoising diffusion, a variational autoencoder, or a network
  that is trained by a distance between drawn and real sets.

| variable | paper | shape | unit |
|---|---|---|---|
| x | S, samples of each set | b m d | standardised |
| mask | which samples are there | b m | |
| z | E(S) | b l | |
| latent | l | scalar | |
| width | H | scalar | |

What this file settles where the paper is open. Components are standardised over the training data, and
distances are in those units. Each set counts as much as any other, whatever its size. With
`explained` others, z is made of one half of a set's samples and G is trained on the other half: the
optimum is then the predictive distribution of new samples given the set, where the paper's own loss has
its optimum, of all that z can tell, in the empirical measure of the set itself. Left out: the Wormhole
baseline and autoregressive generators.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.experience.sets import Mixtures, SetBatches, SetData
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    LogConfig,
    SetConfig,
)
from esscher.functional.sets import moments
from esscher.functional.transport import gaussian_w2
from esscher.method import Method, Paper
from esscher.nn.set_encoder import SetEncoder, SetEncoderKind
from esscher.nn.set_generators import (
    DiffusionGenerator,
    DirectGenerator,
    SetGenerator,
    VariationalGenerator,
)
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.samplers.solvers import seeded_noise
from esscher.types import Metrics, Sets, SetSpec

PAPER = Paper(
    title="Generative Distribution Embeddings",
    year=2025,
    arxiv="2505.18150",
    purpose="A vector for each population that is known by samples: to compare, interpolate and draw.",
    claim="Encoders that see a set's empirical measure alone, trained with a conditional generator, "
    "give vectors whose distances follow Wasserstein distances and which predict new samples.",
    sections="sec. 3, proposition 1, tables 1, 2 and 5",
)

AT_ONCE = 65_536
"""Samples whose activations are held in memory: drawn, or embedded where parts of a set can be."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of generative distribution embeddings; defaults are those of the authors' code."""

    encoder: SetEncoderKind = "residual"
    """residual: the paper's best; mean_pooled, median_pooled, attention, kernel_mean and mean: its
    others (see nn/set_encoder.py); sum_pooled: a control that is not invariant."""
    generator: Literal["ddpm", "cvae", "sliced_w2", "mmd", "sinkhorn"] = "ddpm"
    """ddpm: denoising diffusion; cvae: a variational autoencoder; the others: a network that is trained
    by this distance between drawn and real sets."""
    explained: Literal["same", "others"] = "same"
    """What G has to explain: the samples that z is made of (the paper), or as many others of the same
    population."""
    latent: int = 32
    """Components of z, >= 1, even for kernel_mean."""
    width: int = 128
    """Of the encoder's hidden layers, >= 1."""
    blocks: int = 2
    """Of the encoder, each of which sees the whole set, >= 1."""
    layers: int = 2
    """Hidden ones of each of the encoder's perceptrons, >= 1."""
    heads: int = 4
    """Of attention, >= 1; they divide the width (this library)."""
    bandwidth: float = 0.1
    """Of kernel_mean's Gaussian kernel at the beginning, standardised units, > 0."""
    generator_width: int = 128
    """Of the generator's hidden layers, >= 1."""
    generator_layers: int = 4
    """Hidden ones of the generator, of encoder and decoder each for cvae, >= 1."""
    noise_steps: int = 400
    """Of ddpm, >= 2. With fewer raise beta_end, so that nothing is left of the sample at the last."""
    beta_start: float = 1e-4
    """Variance that ddpm's first step adds, in (0, beta_end]."""
    beta_end: float = 0.02
    """Variance that its last step adds, in [beta_start, 1)."""
    code: int = 16
    """Components of the noise of all generators but ddpm, >= 1 (this library)."""
    kl_weight: float = 0.1
    """Of the KL of cvae's codes, >= 0; both it and the error are means over components (this
    library)."""
    class_weight: float = 0.0
    """Of the cross-entropy of a population's class, read off z by a linear layer, >= 0; populations
    whose class is not known do not count in it. 0: none (1 for the paper's semi-supervised form)."""
    kl_warmup: int = 0
    """Updates over which that weight grows from 0, in a straight line, >= 0."""
    projections: int = 100
    """Random directions of sliced_w2, >= 1."""
    epsilon: float = 0.05
    """Entropic regularisation of sinkhorn, units of half a squared distance, > 0 (this library)."""
    iterations: int = 50
    """Of sinkhorn, >= 1 (this library)."""
    learning_rate: float = 2e-4
    """Adam step, > 0."""
    cosine_updates: int = 0
    """Updates over which the step falls to 0 along half a cosine, >= 0; 0: constant."""
    batch_size: int = 256
    """Sets an update, >= 1 (8 for sets of images)."""

    def __post_init__(self) -> None:
        for name in (
            "latent",
            "width",
            "blocks",
            "layers",
            "heads",
            "generator_width",
            "generator_layers",
            "code",
            "projections",
            "iterations",
            "batch_size",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("bandwidth", "epsilon", "learning_rate"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("kl_weight", "kl_warmup", "class_weight", "cosine_updates"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("noise_steps", self.noise_steps, self.noise_steps >= 2, ">= 2")
        end = self.beta_end
        require("beta_start", self.beta_start, 0 < self.beta_start <= end, "in (0, beta_end]")
        require("beta_end", end, end < 1, "in [beta_start, 1)")
        if self.encoder == "kernel_mean":
            require("latent", self.latent, self.latent % 2 == 0, "even for kernel_mean")
        if self.encoder == "attention":
            fits = self.width % self.heads == 0
            require("heads", self.heads, fits, f"a divisor of width = {self.width}")


class GDE(Method):
    """See the module; `update` is the paper's training step."""

    Config = Config
    world = "sets"
    loop = "offline"
    data = "required"
    headline = "loss"

    def __init__(self, cfg: Config, spec: SetSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        encoder = SetEncoder(
            cfg.encoder,
            spec.dim,
            cfg.latent,
            width=cfg.width,
            blocks=cfg.blocks,
            layers=cfg.layers,
            heads=cfg.heads,
            bandwidth=cfg.bandwidth,
        )
        self.encoder = encoder.to(runtime.device)
        self.generator = _generator(cfg, spec.dim).to(runtime.device)
        if cfg.class_weight:
            if len(spec.classes) < 2:
                raise UserError(
                    "class_weight needs two classes or more: a column label beside set_id that is the "
                    "same for all rows of a population"
                )
            self.classifier = nn.Linear(cfg.latent, len(spec.classes)).to(runtime.device)
        self.opt = Optim(self.policy.parameters(), cfg.learning_rate)
        self._loss = runtime.autocast(self.loss)

    @property
    def policy(self) -> nn.ModuleDict:
        parts = {"encoder": self.encoder, "generator": self.generator}
        if self.cfg.class_weight:
            parts["classifier"] = self.classifier
        return nn.ModuleDict(parts)

    def experience(self, data: SetData) -> SetBatches:
        times = 1 if self.cfg.explained == "same" else 2
        return SetBatches(data, self.cfg.batch_size, times=times, device=self.runtime.device)

    def update(self, batch: Sets, step: int) -> Metrics:
        cfg = self.cfg
        if cfg.cosine_updates:
            done = min(step / cfg.cosine_updates, 1.0)
            self.opt.learning_rate = cfg.learning_rate * (1 + math.cos(math.pi * done)) / 2
        kl_weight = cfg.kl_weight * min(1.0, (step + 1) / max(cfg.kl_warmup, 1))
        loss, told = self._loss(batch.x, batch.mask, kl_weight, batch.label)
        self.opt.minimize(loss)
        return {"loss": loss.detach()} | told

    def loss(
        self,
        x: Float[Tensor, "b m d"],
        mask: Bool[Tensor, "b m"] | None,
        kl_weight: float,
        label: Int[Tensor, "b"] | None = None,
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The generator's loss of each set given its own vector, with that of the sets' classes where
        these count; and what else there is to say.
        """
        seen, seen_mask, asked, asked_mask = x, mask, x, mask
        if self.cfg.explained == "others":
            # Sets come in random order, and those that are shorter are filled up at the end.
            seen, asked = x[:, 0::2], x[:, 1::2]
            if mask is not None:
                seen_mask, asked_mask = mask[:, 0::2], mask[:, 1::2]
        z = self.encoder(seen, seen_mask)
        told = {"latent_std": z.detach().std(0, correction=0).mean()}
        if isinstance(self.generator, VariationalGenerator):
            error, kl = self.generator.parts(asked, z, asked_mask)
            told |= {"error": error.detach().mean(), "kl": kl.detach().mean()}
            loss = (error + kl_weight * kl).mean()
        else:
            loss = self.generator.terms(asked, z, asked_mask).mean()
        if self.cfg.class_weight and label is not None:
            terms = nn.functional.cross_entropy(
                self.classifier(z), label, ignore_index=-1, reduction="none"
            )
            class_loss = terms.sum() / (label >= 0).sum().clamp(min=1)
            told["class_loss"] = class_loss.detach()
            loss = loss + self.cfg.class_weight * class_loss
        return loss, told

    @torch.no_grad()
    def embed(
        self, x: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b l"]:
        """The vectors of sets, standardised; of large ones in parts, where that is the same."""
        x = x.to(self.runtime.device)
        if mask is None and self.encoder.pools_once and x.shape[1] > AT_ONCE:
            return torch.stack([self.encoder.in_chunks(one, AT_ONCE) for one in x])
        return self.encoder(x, None if mask is None else mask.to(x.device))

    @torch.no_grad()
    def classify(self, z: Float[Tensor, "b l"]) -> Float[Tensor, "b c"]:
        """Log-probabilities of the classes."""
        return self.classifier(z.to(self.runtime.device)).log_softmax(-1)

    @torch.no_grad()
    def draw(
        self, z: Float[Tensor, "b l"], count: int, seeds: Sequence[int]
    ) -> Float[Tensor, "b n d"]:
        """`count` samples of each vector's distribution, standardised; those of a vector depend on its
        own seed alone.
        """
        shape = self.generator.noise_shape(count)
        size = max(1, AT_ONCE // count)
        drawn = []
        for start in range(0, len(z), size):
            part = z[start : start + size].to(self.runtime.device)
            _, noise = seeded_noise(seeds[start : start + size], shape, part.device)
            drawn.append(self.generator.draw(part, noise))
        return torch.cat(drawn)


def _generator(cfg: Config, dim: int) -> SetGenerator:
    sizes = (dim, cfg.latent, cfg.generator_width, cfg.generator_layers)
    if cfg.generator == "ddpm":
        betas = (cfg.beta_start, cfg.beta_end)
        return DiffusionGenerator(*sizes, steps=cfg.noise_steps, betas=betas)
    if cfg.generator == "cvae":
        return VariationalGenerator(*sizes, code=cfg.code)
    return DirectGenerator(
        *sizes,
        code=cfg.code,
        distance=cfg.generator,
        projections=cfg.projections,
        epsilon=cfg.epsilon,
        iterations=cfg.iterations,
    )


# ---- recipes


def smoke() -> Experiment:
    """Twenty updates of a small encoder on rows of a table: does everything run?"""
    return replace(
        Experiment.of(
            Config(
                latent=4, width=16, generator_width=16, noise_steps=10, beta_end=0.5, batch_size=8
            ),
            data="esscher.datasets:tumours",
            sets=SetConfig(size=8, held_out_share=0.2),
            steps=20,
        ),
        evaluation=EvaluationConfig(every=10, episodes=4),
        checkpoint=CheckpointConfig(every=10),
    )


def paper() -> Experiment:
    """The authors' settings for Gaussian mixtures and cells; give your own populations (--data)."""
    return replace(
        Experiment.of(Config(latent=32, width=128, batch_size=256), steps=20_000),
        evaluation=EvaluationConfig(every=2_000, episodes=64),
    )


def gaussians() -> Experiment:
    """Gaussians in the plane, with a short chain of noise: a minute or two."""
    return replace(
        Experiment.of(
            _short(latent=16, width=64, batch_size=32),
            data="esscher.datasets:gaussian_populations",
            sets=SetConfig(size=64, held_out_share=0.02),
            steps=2_500,
        ),
        evaluation=EvaluationConfig(every=500, episodes=60),
    )


def digits() -> Experiment:
    """Mixtures of handwritten 0, 1 and 2 by a variational autoencoder: about a minute."""
    return replace(
        Experiment.of(
            Config(
                generator="cvae",
                latent=16,
                width=64,
                generator_width=64,
                generator_layers=2,
                learning_rate=1e-3,
                cosine_updates=2_000,
                batch_size=16,
            ),
            data="esscher.datasets:three_digits",
            sets=SetConfig(size=64, mixed=3, held_out_share=0.3),
            steps=2_000,
        ),
        evaluation=EvaluationConfig(every=500, episodes=60),
    )


def table() -> Experiment:
    """Breast tumours by the mean radius of their nuclei, a continuous label: neighbourhoods of a radius
    are populations, and neighbours in radius are neighbours in the latent map.
    """
    return replace(
        Experiment.of(
            _short(latent=8, width=64, generator_width=64, batch_size=32),
            data="esscher.datasets:tumours",
            sets=SetConfig(size=64, bandwidth=0.75, held_out_share=0.1),
            steps=2_500,
        ),
        evaluation=EvaluationConfig(every=500, episodes=40),
    )


def _short(**options: Any) -> Config:
    """With 60 steps of noise in place of 400."""
    noise = {"noise_steps": 60, "beta_start": 1e-3, "beta_end": 0.15}
    return Config(**noise, learning_rate=1e-3, cosine_updates=2_500, **options)


# ---- proof


def proof() -> Proof:
    """The sheet's parts A, B and D."""
    return Proof(
        claims=(
            Claim(
                name="geometry",
                statement="Gaussians in the plane: distances of vectors rank as exact Wasserstein-2 "
                "distances do (Spearman at least 0.93, and 0.05 above a kernel mean embedding with the "
                "same generator), what is drawn from a vector is within 0.5 of the Gaussian, and with "
                "sums in place of means, which learn from sets of 64 and are asked about sets of "
                "1,000, it is ten times as far.",
                arms={
                    "gde": partial(_gaussian, "residual"),
                    "kernel mean": partial(_gaussian, "kernel_mean"),
                    "sum": partial(_gaussian, "sum_pooled"),
                },
                measure=_measure_geometry,
                judge=_judge_geometry,
            ),
            Claim(
                name="predictive sufficiency",
                statement="Ten counts of a Poisson law whose rate is from Gamma(4, rate 2): the mean "
                "squared error of P(X = 0), as drawn from the vector, is above that of the posterior "
                "mean, below the share of zeros', and below that of the Rao-Blackwell estimator.",
                arms={"gde": partial(_poisson, "same")},
                measure=_measure_poisson,
                judge=_judge_poisson,
            ),
            Claim(
                name="explaining others",
                statement="The same, where the generator has to explain other samples of a population "
                "than those that its vector was made of.",
                arms={"gde": partial(_poisson, "others")},
                measure=_measure_poisson,
                judge=_judge_poisson,
            ),
            Claim(
                name="digits",
                statement="Dirichlet mixtures of handwritten 0, 1 and 2, of images that were held out: "
                "distances of vectors rank as distances of the weights do (Spearman at least 0.8).",
                arms={"gde": lambda seed: _quiet(digits())},
                measure=_measure_digits,
                judge=_judge_digits,
            ),
        ),
        notes="Whitening is standardising each component, in whose units distances are. Geometry: 60 "
        "new Gaussians, 1,000 samples of each embedded and 500 drawn; the kernel mean's bandwidth "
        "begins at 1, for from 0.1 it learned nothing here. The share of zeros, the "
        "Rao-Blackwell estimator and the posterior mean are computed on the same 1,000 sets of ten as "
        "the method, and the variance of counting 200 draws is taken off its error. The paper's own "
        "loss explains the samples that the vector is made of: its optimum is the expected empirical "
        "measure given z, which is the Rao-Blackwell estimator where z is the total and the share of "
        "zeros where z tells everything. So it cannot be better than Rao-Blackwell but for what z and "
        "G leave out, and it is only when other samples are to be explained that the optimum is the "
        "posterior mean. Both are judged by the sheet's rule.",
    )


def _quiet(experiment: Experiment) -> Experiment:
    return replace(
        experiment,
        evaluation=replace(experiment.evaluation, every=0),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
        log=LogConfig(every=100, to=()),
    )


def _gaussian(encoder: SetEncoderKind, seed: int) -> Experiment:
    whole = gaussians()
    # With a kernel of 0.1 samples of unit scale all seem equally far apart: a baseline in name only.
    return _quiet(replace(whole, method=replace(whole.method, encoder=encoder, bandwidth=1.0)))


def _measure_geometry(run: FinishedRun) -> dict[str, float]:
    from esscher.datasets import gaussian_parameters

    learner = run.learner
    spec: SetSpec = learner.spec
    draw = np.random.default_rng([1, run.experiment.seed])
    mean, covariance = map(torch.from_numpy, gaussian_parameters(draw, 60))
    noise = torch.from_numpy(draw.standard_normal((60, 1_500, 2)))
    x = mean[:, None] + noise @ torch.linalg.cholesky(covariance).mT
    x, mean = spec.standardised(x), spec.standardised(mean)
    scale = torch.tensor(spec.std, dtype=torch.float64)
    covariance = covariance / (scale[:, None] * scale)
    shown = x[:, :1_000].float()
    z = learner.embed(shown)
    drawn = moments(learner.draw(z, 500, range(60)))
    return {
        "rank correlation": _ranks(
            z, gaussian_w2(mean[:, None], covariance[:, None], mean, covariance)
        ),
        "error": gaussian_w2(mean, covariance, *drawn).mean().item(),
        "error of 500 real": gaussian_w2(mean, covariance, *moments(x[:, 1_000:])).mean().item(),
        "moved by repeating": (learner.embed(shown.repeat(1, 2, 1)) - z).norm(dim=-1).mean().item(),
    }


def _ranks(z: Tensor, distance: Tensor) -> float:
    """Spearman's correlation, over pairs, of the distance of vectors with another one."""
    first, second = torch.triu_indices(len(z), len(z), 1)
    latent = (z[first] - z[second]).double().norm(dim=-1)
    found: Any = spearmanr(latent, distance[first, second])
    return float(found.statistic)


def _judge_geometry(figures: Figures) -> list[Check]:
    ours, kernel = figures["gde"], figures["kernel mean"]["rank correlation"]
    checks = []
    for seed, (rank, error) in enumerate(zip(ours["rank correlation"], ours["error"], strict=True)):
        least = max(0.93, kernel[seed] + 0.05)
        rule = f">= 0.93 and >= {kernel[seed]:.4f} + 0.05, that of the kernel mean"
        checks.append(Check(f"rank correlation, seed {seed}", rank, rule, rank >= least))
        checks.append(Check(f"error, seed {seed}", error, "<= 0.5", error <= 0.5))
        summed = figures["sum"]["error"][seed]
        rule = f">= 10 x {error:.4f}, that of gde"
        checks.append(Check(f"error of sums, seed {seed}", summed, rule, summed >= 10 * error))
    return checks


def _poisson(explained: Literal["same", "others"], seed: int) -> Experiment:
    sizes = {"width": 64, "generator_width": 64, "generator_layers": 3}
    return _quiet(
        Experiment.of(
            _short(latent=8, **sizes, batch_size=128, explained=explained),
            data="esscher.datasets:poisson_populations",
            sets=SetConfig(size=10, held_out_share=0.01),
            steps=2_500,
        )
    )


def _measure_poisson(run: FinishedRun) -> dict[str, float]:
    learner = run.learner
    spec: SetSpec = learner.spec
    draw = np.random.default_rng([1, run.experiment.seed])
    rate = draw.gamma(4.0, 0.5, 1_000)
    counts = torch.from_numpy(draw.poisson(rate[:, None], (1_000, 10))).double()
    truth, total = torch.from_numpy(np.exp(-rate)), counts.sum(-1)
    z = learner.embed(spec.standardised(counts.unsqueeze(-1)).float())
    drawn = spec.restored(learner.draw(z, 200, range(1_000)))
    share = (drawn.squeeze(-1) < 0.5).double().mean(-1)
    counting = (share * (1 - share) / 199).mean()
    estimates = {
        "share of zeros": (counts == 0).double().mean(-1),
        "Rao-Blackwell": (1 - 1 / 10) ** total,
        "posterior mean": (12 / 13) ** (4 + total),
    }
    found = {name: (value - truth).square().mean().item() for name, value in estimates.items()}
    return {"gde": ((share - truth).square().mean() - counting).item(), **found}


def _judge_poisson(figures: Figures) -> list[Check]:
    found, checks = figures["gde"], []
    for seed, error in enumerate(found["gde"]):
        best, simple = found["posterior mean"][seed], found["share of zeros"][seed]
        least = found["Rao-Blackwell"][seed]
        rule = f"{best:.6f} <= x < {simple:.6f}, posterior mean and share of zeros"
        checks.append(Check(f"error, seed {seed}", error, rule, best <= error < simple))
        rule = f"< {least:.6f}, Rao-Blackwell"
        checks.append(Check(f"error, seed {seed}, again", error, rule, error < least))
    return checks


def _measure_digits(run: FinishedRun) -> dict[str, float]:
    from esscher.runtime.worlds import world_of

    learner = run.learner
    data: SetData = world_of(run.experiment, learner.runtime).data  # type: ignore[attr-defined]
    mixtures = data.held_out
    assert isinstance(mixtures, Mixtures)
    share = torch.zeros(60, 3, dtype=torch.float64)
    for number in range(60):
        chosen, weights = mixtures.recipe(number)
        share[number, torch.from_numpy(chosen)] = torch.from_numpy(weights)
    sets = data.sets(mixtures, range(60), 500, np.random.default_rng([1, run.experiment.seed]))
    z = learner.embed(sets.x, sets.mask)
    return {"rank correlation": _ranks(z, torch.cdist(share, share))}


def _judge_digits(figures: Figures) -> list[Check]:
    found = figures["gde"]["rank correlation"]
    return [
        Check(f"rank correlation, seed {seed}", value, ">= 0.8", value >= 0.8)
        for seed, value in enumerate(found)
    ]
