"""A vector for each distribution, of which only samples are seen (generative distribution embeddings).

A patient is a set of cells, a clone a set of sequences: the unit is a distribution P, observed through
samples of it. An encoder E turns a set S of samples into a vector z, and a conditional generator G draws
from z again; both are trained together on the generator's own loss,

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
baseline, autoregressive generators, and a loss of labels on z.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.experience.sets import SetBatches, SetData
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
    claim="Encoders that see a set's empirical measure alone, trained with a conditional generator, give "
    "vectors whose distances follow Wasserstein distances and which predict new samples.",
    sections="sec. 3, proposition 1, tables 1, 2 and 5",
)

DRAWN_AT_ONCE = 65_536
"""Samples: the activations of so many are held in memory."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of generative distribution embeddings; defaults are those of the authors' code."""

    encoder: SetEncoderKind = "residual"
    """residual: the paper's best; mean_pooled, median_pooled, attention, kernel_mean and mean: its others
    (see nn/set_encoder.py); sum_pooled: a control that is not invariant."""
    generator: Literal["ddpm", "cvae", "sliced_w2", "mmd", "sinkhorn"] = "ddpm"
    """ddpm: denoising diffusion; cvae: a variational autoencoder; the others: a network that is trained
    by this distance between drawn and real sets."""
    explained: Literal["same", "others"] = "same"
    """What G has to explain: the samples that z is made of (the paper), or as many others of the same
    population."""
    latent: int = 32
    """Components of z, >= 1, even for kernel_mean."""
    width: int = 128
    """Of all hidden layers, >= 1."""
    blocks: int = 2
    """Of the encoder, each of which sees the whole set, >= 1."""
    layers: int = 2
    """Hidden ones of each of the encoder's perceptrons, >= 1."""
    heads: int = 4
    """Of attention, >= 1; they divide the width (this library)."""
    bandwidth: float = 0.1
    """Of kernel_mean's Gaussian kernel at the beginning, standardised units, > 0."""
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
    """Of the KL of cvae's codes, >= 0; both it and the error are means over components (this library)."""
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
            "generator_layers",
            "code",
            "projections",
            "iterations",
            "batch_size",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("bandwidth", "epsilon", "learning_rate"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("kl_weight", "kl_warmup", "cosine_updates"):
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
        self.opt = Optim(self.policy.parameters(), cfg.learning_rate)
        self._loss = runtime.autocast(self.loss)

    @property
    def policy(self) -> nn.ModuleDict:
        return nn.ModuleDict({"encoder": self.encoder, "generator": self.generator})

    def experience(self, data: SetData) -> SetBatches:
        times = 1 if self.cfg.explained == "same" else 2
        return SetBatches(data, self.cfg.batch_size, times=times, device=self.runtime.device)

    def update(self, batch: Sets, step: int) -> Metrics:
        cfg = self.cfg
        if cfg.cosine_updates:
            done = min(step / cfg.cosine_updates, 1.0)
            self.opt.learning_rate = cfg.learning_rate * (1 + math.cos(math.pi * done)) / 2
        kl_weight = cfg.kl_weight * min(1.0, (step + 1) / max(cfg.kl_warmup, 1))
        loss, told = self._loss(batch.x, batch.mask, kl_weight)
        self.opt.minimize(loss)
        return {"loss": loss.detach()} | told

    def loss(
        self, x: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"] | None, kl_weight: float
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The generator's loss of each set given its own vector, and what else there is to say."""
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
            return (error + kl_weight * kl).mean(), told
        return self.generator.terms(asked, z, asked_mask).mean(), told

    @torch.no_grad()
    def embed(
        self, x: Float[Tensor, "b m d"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b l"]:
        """The vectors of sets, standardised."""
        device = self.runtime.device
        return self.encoder(x.to(device), None if mask is None else mask.to(device))

    @torch.no_grad()
    def draw(
        self, z: Float[Tensor, "b l"], count: int, seeds: Sequence[int]
    ) -> Float[Tensor, "b n d"]:
        """`count` samples of each vector's distribution, standardised; those of a vector depend on its
        own seed alone.
        """
        shape = self.generator.noise_shape(count)
        size = max(1, DRAWN_AT_ONCE // count)
        drawn = []
        for start in range(0, len(z), size):
            part = z[start : start + size].to(self.runtime.device)
            _, noise = seeded_noise(seeds[start : start + size], shape, part.device)
            drawn.append(self.generator.draw(part, noise))
        return torch.cat(drawn)


def _generator(cfg: Config, dim: int) -> SetGenerator:
    sizes = (dim, cfg.latent, cfg.width, cfg.generator_layers)
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
            Config(latent=4, width=16, noise_steps=10, beta_end=0.5, batch_size=8),
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
            _short(latent=16, width=64, generator_layers=4, batch_size=32),
            data="esscher.datasets:gaussian_populations",
            sets=SetConfig(size=64, held_out_share=0.02),
            steps=2_500,
        ),
        evaluation=EvaluationConfig(every=500, episodes=60),
    )


def digits() -> Experiment:
    """Mixtures of handwritten 0, 1 and 2 by a variational autoencoder: under a minute."""
    return replace(
        Experiment.of(
            Config(
                generator="cvae",
                latent=16,
                width=64,
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
            _short(latent=8, width=64, generator_layers=3, batch_size=32),
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
