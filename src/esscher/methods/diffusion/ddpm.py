"""Denoising diffusion: learn to draw what a set of real samples holds, from nothing or from a model.

The way to a small model of one's own, and the baseline of methods that learn from real samples:

    L = E |x0 - D(x0 + sigma eps, sigma, c)|^2 w(sigma)

with w such that the error is that of the noise (the simple loss), of x0, of v or of the flow. Labels
are left out now and then, so that the model can be drawn from with guidance. What is drawn from is a
running average of the weights.

| variable | meaning | shape | unit |
|---|---|---|---|
| x0 | a real sample as the denoiser sees it | b *d | |
| sigma | noise level, as the model was trained | b | std of the noise over the signal |
| D | estimate of x0 | b *d | |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel, ImageSpec
from esscher.errors import require
from esscher.experience.conditions import RealSamples, SampleBatches
from esscher.experiment import CheckpointConfig, EvaluationConfig, Experiment, ModelConfig
from esscher.functional.diffusion import Prediction, denoising_terms, over
from esscher.method import Method, Paper
from esscher.runtime.device import Runtime, sum_over_processes
from esscher.runtime.optim import Optim, polyak
from esscher.samplers.denoisers import Condition, expanded, rows_of
from esscher.samplers.solvers import Solver
from esscher.types import Asked, Drawn, Metrics, Samples

PAPER = Paper(
    title="Denoising Diffusion Probabilistic Models",
    year=2020,
    arxiv="2006.11239",
    purpose="A diffusion model that draws what a set of samples holds: where all others begin.",
    claim="",
    sections="3.4, the simple loss",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of denoising diffusion."""

    weighting: Prediction = "epsilon"
    """Whose error is lowered: of the noise (the paper), the sample, v or the flow."""
    learning_rate: float = 2e-4
    """AdamW step, > 0 (the paper's for CIFAR-10)."""
    warmup_updates: int = 0
    """Updates over which the step grows to its size, in a straight line, >= 0 (the paper: 5,000)."""
    weight_decay: float = 0.0
    """Decoupled, per unit learning rate, >= 0."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this length, > 0."""
    batch_size: int = 128
    """Samples an update, over all processes, >= 1."""
    micro_batch_size: int = 0
    """Samples whose activations are held at once, >= 0; 0: all. Does not change the objective."""
    average: float = 0.999
    """Of the weights that are drawn from, in [0, 1); 0: the newest ones (the paper: 0.9999)."""
    drop_condition: float = 0.1
    """Share of samples whose condition is left out, in [0, 1]; without effect where a model has no
    null condition."""
    draw_steps: int = 50
    """Of drawing, >= 1."""
    scale: float = 1.0
    """Of guidance in drawing; 1: none."""
    solver: Solver = "ddim"
    """Of drawing: ddim, euler, heun or dpmpp_2m."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm"):
            require(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("warmup_updates", "weight_decay", "micro_batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("batch_size", "draw_steps"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        require("average", self.average, 0 <= self.average < 1, "in [0, 1)")
        require("drop_condition", self.drop_condition, 0 <= self.drop_condition <= 1, "in [0, 1]")


class DDPM(Method):
    """Denoising diffusion."""

    Config = Config
    world = "diffusion"
    loop = "offline"
    data = "required"
    headline = "loss"
    shares = True
    shards = True

    def __init__(self, cfg: Config, spec: ImageSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        runtime.share(cfg.batch_size)  # Said before work starts where they cannot.
        self.model = spec.model
        self.model.guided(cfg.scale)  # Refuses what it cannot do.
        self.average = spec.model.averaged() if cfg.average else spec.model
        runtime.prepare(self.model, self.average)
        self.opt = Optim(
            self.model.trained,
            cfg.learning_rate,
            weight_decay=cfg.weight_decay,
            max_grad_norm=cfg.max_grad_norm,
        )
        self._terms = runtime.autocast(self.denoising_terms)

    @property
    def policy(self) -> DiffusionModel:
        return self.average

    def experience(self, real: RealSamples) -> SampleBatches:
        return SampleBatches(real, self.cfg.batch_size)

    def update(self, batch: Samples, step: int) -> Metrics:
        cfg, count = self.cfg, len(batch)
        sigma = self.model.noise_levels(count)
        noise = torch.randn_like(batch.x)
        condition = self._some_left_out(batch.condition, count)
        losses: list[Tensor] = []

        def loss(rows: Tensor) -> Float[Tensor, ""]:
            part = rows_of(condition, rows)
            terms = self._terms(batch.x[rows], sigma[rows], noise[rows], part)
            losses.append(terms.sum() / count)
            return losses[-1]

        self.opt.learning_rate = cfg.learning_rate * min(1, (step + 1) / max(cfg.warmup_updates, 1))
        # All processes draw the same noise levels and noise, and each learns from its own rows.
        places = torch.arange(count, device=batch.x.device)[self.runtime.part(count)]
        self.opt.minimize_sum(loss, places.split(cfg.micro_batch_size or count))
        if self.average is not self.model:
            # A young average would be the weights that it began with.
            polyak(self.average, self.model, max(1 - cfg.average, 1 / (step + 2)))
        total = torch.stack(losses).detach().sum()
        sum_over_processes([total])
        return {"loss": total}

    def denoising_terms(
        self,
        x0: Float[Tensor, "b *d"],
        sigma: Float[Tensor, "b"],
        noise: Float[Tensor, "b *d"],
        condition: Condition,
    ) -> Float[Tensor, "b"]:
        """The loss of each sample."""
        denoised = self.model.denoiser(x0 + over(sigma, x0) * noise, sigma, condition)
        return denoising_terms(denoised, x0, sigma, self.cfg.weighting)

    def draw(self, asked: Asked, seeds: Sequence[int]) -> Drawn:
        cfg = self.cfg
        options = {"steps": cfg.draw_steps, "scale": cfg.scale, "solver": cfg.solver}
        return Drawn(x=self.average.draw(asked.condition, seeds, **options), told={})

    def _some_left_out(self, condition: Condition, count: int) -> Condition:
        if condition is None or self.model.null is None:
            return condition
        null = expanded(self.model.null, count)
        out = torch.rand(count, device=self.model.device) < self.cfg.drop_condition
        if isinstance(condition, Tensor):
            assert isinstance(null, Tensor)
            return torch.where(over(out, condition), null, condition)
        assert isinstance(null, Mapping)
        return {name: torch.where(over(out, c), null[name], c) for name, c in condition.items()}


# ---- recipes


def smoke() -> Experiment:
    """Ten updates of a tiny U-Net."""
    return replace(
        Experiment.of(
            Config(batch_size=8, draw_steps=4),
            model=ModelConfig(
                source="esscher.images:tiny_unet",
                kwargs={"size": 8, "channels": 1, "width": 8, "classes": 10},
            ),
            data="esscher.datasets:digits",
            steps=10,
        ),
        evaluation=EvaluationConfig(every=5, episodes=4),
        checkpoint=CheckpointConfig(every=5),
    )


def digits() -> Experiment:
    """A small U-Net that draws handwritten digits of 8 x 8, by class, in about three minutes."""
    return replace(
        Experiment.of(
            Config(learning_rate=2e-3, batch_size=64, average=0.99),
            model=ModelConfig(
                source="esscher.images:tiny_unet",
                kwargs={"size": 8, "channels": 1, "width": 16, "classes": 10},
            ),
            data="esscher.datasets:digits",
            steps=1_500,
        ),
        evaluation=EvaluationConfig(every=500, episodes=100),
        checkpoint=CheckpointConfig(every=500),
    )
