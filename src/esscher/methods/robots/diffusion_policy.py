"""Diffusion Policy: chunks of actions, drawn by denoising, given the last observations.

Imitation of demonstrations that do the same thing in several ways. A network predicts the noise in a
chunk of actions; acting draws a chunk by all of DDPM's levels and executes its first half, open loop.

    loss = mean (eps_hat(sqrt(abar_k) A + sqrt(1 - abar_k) eps, k, O) - eps)^2

The baseline of faster policies of this kind, and what `rti_dp` makes fast.

| variable | paper | shape | unit |
|---|---|---|---|
| chunk | A | b h a | actions scaled to [-1, 1] |
| state | O | b n s | scaled by the data |
| level | k | b | 0 .. levels - 1 |
| alpha_bars | abar | levels | share of the signal's variance |
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from esscher.distributions.chunks import ChunkModel, ChunkPolicy
from esscher.distributions.goals import GoalColumns, Observed, observed_by
from esscher.errors import require
from esscher.experience import Dataset
from esscher.experience.windows import WindowBatch, Windows
from esscher.experiment import EnvConfig, EvaluationConfig, Experiment
from esscher.functional.diffusion import BetaSchedule, alpha_bars, over
from esscher.method import Method, Paper, continuous_only
from esscher.nn.mlp import MLP
from esscher.nn.scaling import Scaling
from esscher.nn.unet1d import ConditionalUNet1d, sinusoids
from esscher.runtime.device import Runtime
from esscher.runtime.optim import Optim, polyak
from esscher.types import Metrics, Spec

PAPER = Paper(
    title="Diffusion Policy: Visuomotor Policy Learning via Action Diffusion",
    year=2023,
    arxiv="2303.04137",
    purpose="Imitation of demonstrations with several ways of doing a thing, by chunks of actions.",
    claim="",
    sections="sec. 3, with low-dimensional observations",
    baseline=True,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of Diffusion Policy; defaults from the authors' code for low-dimensional PushT."""

    goal: tuple[int, ...] = ()
    """Entries of the flat observation that hold the goal which the task wants. None: no goals (the
    paper)."""
    achieved: tuple[int, ...] = ()
    """Entries that a goal is about, in the same order: what was reached there later is the goal."""
    horizon: int = 16
    """Rows h of a chunk, >= 2; of a U-Net a multiple of 2^(levels of channels - 1)."""
    obs_steps: int = 2
    """Observations that are seen, >= 1; a chunk begins with the first of them."""
    executed: int = 8
    """Actions of a chunk that are executed before the next one is drawn, >= 1."""
    levels: int = 100
    """Noise levels K, and network evaluations a chunk, >= 2."""
    noise_schedule: BetaSchedule = "squaredcos_cap_v2"
    """Of the levels: linear, scaled_linear or squaredcos_cap_v2."""
    network: Literal["unet", "mlp"] = "unet"
    """A convolutional U-Net along time, or a perceptron on the whole chunk (small tasks)."""
    channels: tuple[int, ...] = (256, 512, 1024)
    """Of the U-Net's levels."""
    kernel: int = 5
    """Of its convolutions, odd."""
    groups: int = 8
    """Of its normalisation, a divisor of all channels."""
    embedding: int = 256
    """Width of the noise level's embedding, even, >= 4."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the perceptron's hidden layers."""
    unscaled: tuple[int, ...] = ()
    """Components of an action that are not scaled by the data's range: a gripper that is +-1."""
    learning_rate: float = 1e-4
    """AdamW step, > 0."""
    betas: tuple[float, float] = (0.95, 0.999)
    """Decay of the gradient's moments, each in [0, 1)."""
    weight_decay: float = 1e-6
    """Decoupled, per unit learning rate, >= 0."""
    warmup_updates: int = 500
    """Updates over which the step grows to its size, in a straight line, >= 0."""
    cosine_updates: int = 0
    """Updates after which the step has fallen to 0 along a cosine, >= 0; 0: it stays (the paper: the
    run's length)."""
    average_power: float = 0.75
    """The weights that act keep a share 1 - (1 + k)^-power of themselves at update k, >= 0."""
    mask_padding: bool = False
    """Leave what lies outside of the episode out of the loss (the authors imitate the repeated
    step)."""
    batch_size: int = 256
    """Chunks an update."""

    def __post_init__(self) -> None:
        require("horizon", self.horizon, self.horizon >= 2, ">= 2")
        most = self.horizon - self.obs_steps + 1
        require("obs_steps", self.obs_steps, 1 <= self.obs_steps <= self.horizon, "in [1, horizon]")
        require("executed", self.executed, 1 <= self.executed <= most, f"in [1, {most}]")
        require("levels", self.levels, self.levels >= 2, ">= 2")
        positive = all(isinstance(width, int) and width >= 1 for width in self.hidden)
        require("hidden", self.hidden, positive, "widths >= 1")
        for name in ("kernel", "groups"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        even = self.embedding >= 4 and self.embedding % 2 == 0
        require("embedding", self.embedding, even, "even and >= 4")
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        require("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "in [0, 1) each")
        for name in ("weight_decay", "warmup_updates", "cosine_updates", "average_power"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        if self.network == "unet":
            divisor = 2 ** (len(self.channels) - 1)
            fits = self.horizon % divisor == 0
            told = f"a multiple of {divisor} with {len(self.channels)} channels"
            require("horizon", self.horizon, fits, told)


class ChunkMLP(nn.Module):
    """A perceptron on the whole noisy chunk, the level's embedding and the condition."""

    def __init__(
        self,
        shape: tuple[int, int],
        condition_dim: int,
        hidden: tuple[int, ...],
        embedding: int,
    ):
        super().__init__()
        self.shape, self.embedding = shape, embedding
        size = math.prod(shape)
        self.net = MLP((size + embedding + condition_dim, *hidden, size), "gelu")

    def forward(
        self,
        x: Float[Tensor, "b h a"],
        level: Float[Tensor, "b"],
        condition: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b h a"]:
        parts = [x.flatten(1), sinusoids(level, self.embedding), condition]
        return self.net(torch.cat(parts, -1)).float().view(-1, *self.shape)


class DiffusionPolicy(Method):
    """Diffusion Policy on low-dimensional observations."""

    Config = Config
    loop = "offline"
    data = "required"
    headline = "loss"

    def __init__(self, cfg: Config, spec: Spec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        continuous_only(spec, "diffusion_policy")
        known = all(0 <= column < spec.action_dim for column in cfg.unscaled)
        require("unscaled", cfg.unscaled, known, f"components in [0, {spec.action_dim})")
        observed = observed_by(spec, GoalColumns(cfg.goal, cfg.achieved), "range")
        actions = Scaling(spec.action_dim, "range", "action", cfg.unscaled)
        self.network = self._fresh_network(observed).to(runtime.device)
        average = copy.deepcopy(self.network).requires_grad_(False).eval()
        model = ChunkModel(
            average,
            alpha_bars(cfg.noise_schedule, cfg.levels),
            observed,
            actions,
            horizon=cfg.horizon,
            obs_steps=cfg.obs_steps,
        )
        self.acting = ChunkPolicy(model, cfg.executed).to(runtime.device)
        self.opt = Optim(
            self.network.parameters(),
            cfg.learning_rate,
            betas=cfg.betas,
            weight_decay=cfg.weight_decay,
        )
        self._gradients = runtime.graph(self.gradients)

    @property
    def policy(self) -> ChunkPolicy:
        return self.acting

    def experience(self, data: Dataset) -> Windows:
        """Chunks that may reach out of their episode at both ends, as far as is needed to act there.

        Raises:
            UserError: an episode is shorter than a chunk, or an action never changes.
        """
        cfg, device, model = self.cfg, self.runtime.device, self.acting.model
        model.observed.fit(data.transitions.obs.to(device))
        model.actions.fit(data.transitions.action.to(device), constant="refuse")
        return Windows(
            data,
            cfg.horizon,
            cfg.batch_size,
            before=cfg.obs_steps - 1,
            after=cfg.executed - 1,
            about=cfg.achieved,
            what="chunk",
            device=device,
        )

    def update(self, batch: WindowBatch, step: int) -> Metrics:
        cfg, model = self.cfg, self.acting.model
        goal = model.observed.reached(batch.goal[:, 0])
        goal = torch.where(batch.has_goal.unsqueeze(-1), goal, 0.0)
        state = model.observed.state(batch.obs[:, : cfg.obs_steps])
        chunk, count = model.actions(batch.action), len(batch)
        level = torch.randint(cfg.levels, (count,), device=chunk.device)
        counts = batch.mask if cfg.mask_padding else torch.ones_like(batch.mask)
        condition, noise = model.condition(state, goal), torch.randn_like(chunk)
        loss, gradients = self._gradients(chunk, level, noise, condition, counts.float())
        self.opt.learning_rate = max(cfg.learning_rate * self._share(step), 1e-12)
        self.opt.apply(gradients)
        kept = 1 - (1 + step) ** -cfg.average_power
        polyak(model.network, self.network, 1 - min(kept, 0.9999))
        return {"loss": loss}

    def gradients(
        self,
        chunk: Float[Tensor, "b h a"],
        level: Int[Tensor, "b"],
        noise: Float[Tensor, "b h a"],
        condition: Float[Tensor, "b c"],
        counts: Float[Tensor, "b h"],
    ) -> tuple[Float[Tensor, ""], list[Tensor]]:
        """The mean squared error of the noise over the rows that count, and its gradient."""
        kept = self.acting.model.alpha_bars[level].to(chunk.dtype)
        z = over(kept.sqrt(), chunk) * chunk + over((1 - kept).sqrt(), chunk) * noise
        error = (self.network(z, level.float(), condition) - noise).square().mean(-1)
        loss = (error * counts).sum() / counts.sum()
        return loss.detach(), list(torch.autograd.grad(loss, list(self.network.parameters())))

    def _share(self, step: int) -> float:
        """Of the learning rate, at an update counted from 0."""
        cfg = self.cfg
        if step < cfg.warmup_updates:
            return (step + 1) / cfg.warmup_updates
        if cfg.cosine_updates <= cfg.warmup_updates:
            return 1.0
        done = (step - cfg.warmup_updates) / (cfg.cosine_updates - cfg.warmup_updates)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def _fresh_network(self, observed: Observed) -> nn.Module:
        cfg, action_dim = self.cfg, self.spec.action_dim
        told = cfg.obs_steps * observed.state_dim + observed.goal_dim
        if cfg.network == "mlp":
            return ChunkMLP((cfg.horizon, action_dim), told, cfg.hidden, cfg.embedding)
        return ConditionalUNet1d(
            action_dim,
            told,
            cfg.channels,
            kernel=cfg.kernel,
            groups=cfg.groups,
            embedding=cfg.embedding,
        )


def smoke() -> Experiment:
    """Eighty updates of a small U-Net: does everything run?"""
    return Experiment.of(
        Config(
            horizon=4,
            executed=2,
            levels=4,
            channels=(8, 16),
            groups=4,
            kernel=3,
            embedding=8,
            hidden=(16,),
            batch_size=32,
        ),
        env=EnvConfig(id="esscher.envs:Dodge"),
        data="esscher.datasets:dodge",
        steps=80,
        evaluation=EvaluationConfig(every=40, episodes=2, step_limit=20),
    )


def dodge() -> Experiment:
    """A perceptron that learns to pass an obstacle on either side, in a minute or two."""
    return Experiment.of(
        Config(
            network="mlp",
            hidden=(128, 128),
            horizon=8,
            obs_steps=1,
            executed=8,
            levels=50,
            embedding=32,
            learning_rate=1e-3,
        ),
        env=EnvConfig(id="esscher.envs:Dodge"),
        data="esscher.datasets:dodge",
        steps=10_000,
        evaluation=EvaluationConfig(every=5_000, episodes=100, deterministic=False),
    )
