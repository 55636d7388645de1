"""Discrete Diffusion VLA: chunks of actions as tokens, filled in by a vision-language model in rounds.

Images, an instruction and the robot's state go in, a chunk of actions comes out. Each component of each
action is a token, a bin between two quantiles of the data. In training some of them are replaced by a
mask, and the model, which looks in both directions, tells what they were; acting begins with masks
alone, keeps in each round the tokens that it is surest of, and may return to those that became
doubtful.

    L = -(1 / N) sum_b sum_{i in M_b} log p(a_bi | a~_b, c_b),   N masked tokens in the batch

Compared with other decoders of actions, three of which are here on the same backbone:
- from left to right (`autoregressive`): a pass a token, where this takes a dozen;
- a continuous diffusion head (`diffusion`): the noise of a chunk, mean squared error;
- one pass for all (`regression`, L1; or `rounds` 1 and `temperature` 0): blind to how they belong
  together.

| variable | paper | shape | unit |
|---|---|---|---|
| tokens | a_0 | b l, l = h a, step after step | bins, 0 .. k - 1 |
| inputs | a~ | b l | bins; k is the mask |
| valid | | b l | what lies in the episode |
| hidden | | b l d | |
| low, high | q01, q99 | a | actions |
| sight | c | | images, instruction, state |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esscher.distributions.vision_language import VisionLanguage, VisionSpec
from esscher.errors import UserError, require
from esscher.experience.scenes import SceneData, SceneWindows
from esscher.experiment import (
    CheckpointConfig,
    EvaluationConfig,
    Experiment,
    LogConfig,
    ModelConfig,
)
from esscher.functional.binning import bin_of, centre_of
from esscher.functional.diffusion import alpha_bars, denoised_of, over, sigma_of_alpha_bar
from esscher.functional.masking import (
    MaskSchedule,
    mask_counts,
    masked_cross_entropy,
    places_of_least,
)
from esscher.functional.reductions import masked_mean
from esscher.method import Method, Paper
from esscher.nn.mlp import MLP
from esscher.nn.scaling import Scaling
from esscher.nn.trained import TrainedState
from esscher.nn.unet1d import sinusoids
from esscher.proof import Check, Claim, Figures, FinishedRun, Proof, within
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.optim import Optim
from esscher.runtime.rng import Phase, seed_phase
from esscher.samplers.masked import Edit, MaskedDecoding, decode_masked
from esscher.samplers.solvers import solve
from esscher.scenes import RoundObstacle, rounds_obstacle
from esscher.types import Metrics, RobotSpec, SceneChunks, Scenes

PAPER = Paper(
    title="Discrete Diffusion VLA: Bringing Discrete Diffusion to Action Decoding in "
    "Vision-Language-Action Policies",
    year=2025,
    arxiv="2508.20072",
    sections="sec. 3",
    purpose="A robot that follows instructions by what it sees: a vision-language model fills in "
    "chunks of actions.",
    claim="Masked diffusion over action tokens, decoded in a few rounds by confidence, captures how "
    "actions belong together, which decoding all at once does not, in fewer passes than from left to "
    "right.",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of Discrete Diffusion VLA; defaults from the authors' code."""

    head: Literal["masked", "autoregressive", "diffusion", "regression"] = "masked"
    """How a chunk is decoded; the paper: masked."""
    horizon: int = 8
    """Actions h of a chunk, >= 1."""
    executed: int | None = None
    """Actions of a chunk that are executed before the next one is drawn; None: all (the paper)."""
    bins: int = 256
    """Of each component, k >= 2."""
    binary: tuple[int, ...] = ()
    """Components with two values, such as a gripper: two tokens, the data's smallest and largest."""
    constant: tuple[int, ...] = ()
    """Components that never change in the data, such as a gripper that is not used: nothing is learned
    of them, and they are executed as they were."""
    quantile: float = 0.01
    """Bins lie between this quantile of a component and that of its complement, in [0, 0.5)."""
    attention: Literal["full", "prefix"] = "full"
    """full: all see all (the paper); prefix: images, instruction and state do not see the actions, so
    that a chunk needs their keys and values once. From left to right it is always prefix."""
    rounds: int = 12
    """Of decoding, >= 1; 1: all tokens at once."""
    schedule: MaskSchedule = "cosine"
    """Of the share of masked tokens, in training and decoding."""
    temperature: float = 1.0
    """At which tokens are drawn, >= 0; 0: the likeliest. Also from left to right."""
    annealed: bool = False
    """Let the temperature fall to 0 over the rounds (the paper)."""
    score: Literal["drawn", "likeliest", "gap"] = "drawn"
    """How sure a token is: its probability, that of the likeliest one (the paper), or how far that is
    ahead of the second."""
    choice_temperature: float = 1.0
    """Of the noise on which tokens are kept, >= 0, falling to 0."""
    remask: Literal["none", "scale", "threshold", "drop"] = "none"
    """Which kept tokens may return to the mask; the paper: threshold."""
    eta: float = 0.3
    """Of threshold and drop, in [0, 1] (a choice; the paper does not say)."""
    levels: int = 50
    """Noise levels of the diffusion head, and its passes a chunk, >= 2."""
    learning_rate: float = 5e-4
    """AdamW step, > 0."""
    decay_after: int = 100_000
    """Updates after which the step is a tenth, >= 1."""
    weight_decay: float = 0.0
    """Decoupled, per unit learning rate, >= 0."""
    crop: float = 1.0
    """Share of an image's area that is seen, in (0, 1]: a random part in training, the middle when
    acting (the authors: 0.9)."""
    batch_size: int = 64
    """Chunks an update, >= 1 (the authors: 4 to 8 on each of 4 to 8 devices)."""

    def __post_init__(self) -> None:
        for name in ("horizon", "rounds", "decay_after", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        for name in ("bins", "levels"):
            require(name, getattr(self, name), getattr(self, name) >= 2, ">= 2")
        shown = self.executed is None or 1 <= self.executed <= self.horizon
        require("executed", self.executed, shown, f"None or in [1, {self.horizon}]")
        for name in ("binary", "constant"):
            require(
                name, getattr(self, name), all(n >= 0 for n in getattr(self, name)), ">= 0 each"
            )
        if set(self.binary) & set(self.constant):
            raise UserError(
                "binary and constant name the same component: it has two values, or one"
            )
        require("quantile", self.quantile, 0 <= self.quantile < 0.5, "in [0, 0.5)")
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "> 0")
        for name in ("temperature", "choice_temperature", "weight_decay"):
            require(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        require("crop", self.crop, 0 < self.crop <= 1, "in (0, 1]")
        require("eta", self.eta, 0 <= self.eta <= 1, "in [0, 1]")

    @property
    def decoding(self) -> MaskedDecoding:
        return MaskedDecoding(
            rounds=self.rounds,
            schedule=self.schedule,
            temperature=self.temperature,
            annealed=self.annealed,
            score=self.score,
            choice_temperature=self.choice_temperature,
            remask=self.remask,
            eta=self.eta,
        )


# ---- what is seen


@dataclass(frozen=True)
class Sight:
    """Scenes as the model has them: what passes over actions look at."""

    network: "SceneTransformer"
    embeddings: Float[Tensor, "n c d"]
    mask: Bool[Tensor, "n c"]
    """What is no padding."""
    two_ways: bool
    """Whether the scene sees the actions too."""
    causal: bool
    """Whether actions see earlier ones only."""
    cache: Any = None
    """Keys and values of the scene, where it does not see the actions."""

    def hidden(
        self, rows: Float[Tensor, "n r d"], valid: Bool[Tensor, "n r"] | None = None
    ) -> Float[Tensor, "n r d"]:
        """Hidden states of actions: one pass.

        Args:
            rows: their embeddings.
            valid: which of them may be seen; None: all.
        """
        valid = self.mask.new_ones(rows.shape[:2]) if valid is None else valid
        seen = torch.cat([self.mask, valid], 1).unsqueeze(1).expand(-1, rows.shape[1], -1)
        if self.causal:
            scene = self.mask.new_ones(rows.shape[1], self.mask.shape[1])
            earlier = self.mask.new_ones(rows.shape[1], rows.shape[1]).tril()
            seen = seen & torch.cat([scene, earlier], 1)
        model, positions = self.network.model, self.positions(rows.shape[1])
        if self.cache is not None:
            return model.hidden(rows, seen, positions, self.cache)
        of_scene = (
            seen[:, :1] if self.two_ways else nn.functional.pad(self.mask, (0, rows.shape[1]))
        )
        of_scene = of_scene.view(len(rows), 1, -1).expand(-1, self.mask.shape[1], -1)
        together = torch.cat([self.embeddings, rows.to(self.embeddings.dtype)], 1)
        positions = torch.cat([places(self.mask), positions], 1)
        hidden = model.hidden(together, torch.cat([of_scene, seen], 1), positions)
        return hidden[:, self.mask.shape[1] :]

    def next(self, row: Float[Tensor, "n 1 d"], number: int) -> Float[Tensor, "n 1 d"]:
        """The hidden state of the next action token, which those after it will see; it has a cache."""
        seen = torch.cat([self.mask, self.mask.new_ones(len(row), number + 1)], 1).unsqueeze(1)
        positions = self.positions(number + 1)[:, -1:]
        hidden, _ = self.network.model.extended(row, seen, positions, self.cache)
        return hidden

    def positions(self, rows: int) -> Int[Tensor, "n r"]:
        """Of actions: right behind the scene, whatever its padding."""
        steps = torch.arange(rows, device=self.mask.device)
        return self.mask.sum(-1, keepdim=True) + steps

    def cached(self) -> "Sight":
        """With the keys and values of the scene, computed once."""
        seen = self.mask.unsqueeze(1).expand(-1, self.mask.shape[1], -1)
        model = self.network.model
        _, cache = model.extended(self.embeddings, seen, places(self.mask))
        return replace(self, cache=cache)


def places(mask: Bool[Tensor, "n c"]) -> Int[Tensor, "n c"]:
    """Positions that count what is no padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class SceneTransformer(nn.Module):
    """The backbone, with a token for the robot's state behind images and instruction."""

    def __init__(self, model: VisionLanguage, robot: RobotSpec, attention: str, causal: bool):
        super().__init__()
        self.model, self.robot = model, robot
        self.two_ways, self.causal = attention == "full" and not causal, causal
        self.state_scaling = Scaling(robot.state_dim, "standard", "state")
        width = model.hidden_size
        self.of_state = MLP((robot.state_dim, width, width), "gelu")

    def forward(self, scenes: Scenes) -> Sight:
        embeddings, mask = self.model.context(scenes)
        state = self.of_state(self.state_scaling(scenes.state)).unsqueeze(1)
        together = torch.cat([embeddings, state.to(embeddings.dtype)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return Sight(self, together, mask, self.two_ways, self.causal)


def random_crop(images: Tensor, area: float) -> Tensor:
    """A part of so much of the area of each image ("n c h w 3"), where torch's generator says."""
    rows, columns = images.shape[2:4]
    high, wide = cropped(rows, area), cropped(columns, area)
    top = torch.randint(rows - high + 1, (*images.shape[:2], 1), device=images.device)
    left = torch.randint(columns - wide + 1, (*images.shape[:2], 1), device=images.device)
    row = (top + torch.arange(high, device=images.device))[..., None, None].expand(
        -1, -1, -1, columns, 3
    )
    column = (left + torch.arange(wide, device=images.device))[:, :, None, :, None].expand(
        -1, -1, high, -1, 3
    )
    return images.gather(2, row).gather(3, column)


def centre_crop(images: Tensor, area: float) -> Tensor:
    """The middle part of so much of the area."""
    rows, columns = images.shape[2:4]
    high, wide = cropped(rows, area), cropped(columns, area)
    top, left = (rows - high) // 2, (columns - wide) // 2
    return images[:, :, top : top + high, left : left + wide]


def cropped(length: int, area: float) -> int:
    return max(1, round(length * math.sqrt(area)))


# ---- actions


class ActionRange(nn.Module):
    """Actions between two quantiles of the data, by component: as tokens, or as numbers in [-1, 1]."""

    low: Tensor
    high: Tensor

    def __init__(self, size: int, cfg: Config):
        super().__init__()
        self.bins, self.quantile = cfg.bins, cfg.quantile
        self.binary, self.constant = list(cfg.binary), list(cfg.constant)
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(size))

    @torch.no_grad()
    def fit(self, action: Float[Tensor, "b a"]) -> None:
        """Take the statistics of the data.

        Raises:
            UserError: a component has no range, or one that should be constant has.
        """
        q = torch.tensor([self.quantile, 1 - self.quantile], dtype=action.dtype)
        ends = torch.stack([column.quantile(q) for column in action.cpu().unbind(-1)], 1)
        for number in self.binary:
            ends[:, number] = torch.stack(action[:, number].cpu().aminmax())
        for number in self.constant:
            low, high = (float(end) for end in action[:, number].cpu().aminmax())
            if low < high:
                raise UserError(
                    f"action {number} is named in constant and changes in the data, from {low:g} to "
                    f"{high:g}: leave it out"
                )
            ends[:, number] = torch.tensor([low - 1, low + 1])  # Its value lies in the middle.
        for number, (low, high) in enumerate(ends.T.tolist()):
            if low >= high:
                raise UserError(
                    f"action {number} has zero range in the data (between its quantiles it is always "
                    f"{low:g}), so it cannot be learned: lower quantile, name it in binary if it has "
                    f"two values, or in constant if it has one (--method.constant {number})"
                )
        self.low.copy_(ends[0])
        self.high.copy_(ends[1])

    def check(self) -> None:
        """Refuse to act without statistics.

        Raises:
            UserError: no data were seen.
        """
        if not bool((self.low < self.high).all()):
            raise UserError(
                "the statistics of actions are missing: train on data first, or load a run"
            )

    def tokens(self, action: Float[Tensor, "b h a"]) -> Int[Tensor, "b l"]:
        """Bins, step after step; of a component with two values, 0 or 1."""
        found = bin_of(action, self.low, self.high, self.bins)
        for number in self.binary:
            middle = (self.low[number] + self.high[number]) / 2
            found[..., number] = (action[..., number] > middle).long()
        found[..., self.constant] = 0
        return found.flatten(1)

    def values(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b h a"]:
        """The middle of each bin; one of the two values."""
        tokens = tokens.unflatten(1, (-1, len(self.low)))
        found = centre_of(tokens, self.low, self.high, self.bins)
        for number in self.binary:
            upper = tokens[..., number] > 0
            found[..., number] = torch.where(upper, self.high[number], self.low[number])
        found[..., self.constant] = ((self.low + self.high) / 2)[self.constant]
        return found.clamp(-1, 1)

    def permitted(self, horizon: int) -> Bool[Tensor, "l k"]:
        """Which tokens each place may hold."""
        allowed = torch.ones(len(self.low), self.bins, dtype=torch.bool, device=self.low.device)
        allowed[self.binary, 2:] = False
        allowed[self.constant, 1:] = False
        return allowed.repeat(horizon, 1)

    def scaled(self, action: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """The quantiles become -1 and 1; what lies outside is cut."""
        return ((action - self.low) / (self.high - self.low) * 2 - 1).clamp(-1, 1)

    def restored(self, scaled: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """The inverse; of a component with two values, the nearer one."""
        scaled = scaled.clamp(-1, 1)
        for number in self.binary:
            scaled[..., number] = torch.where(scaled[..., number] > 0, 1.0, -1.0)
        scaled[..., self.constant] = 0
        return (self.low + (scaled + 1) / 2 * (self.high - self.low)).clamp(-1, 1)


class TokenHead(nn.Module):
    """Embeddings of k tokens and of the mask, and logits of the k."""

    def __init__(self, width: int, actions: ActionRange, cfg: Config):
        super().__init__()
        self.cfg, self.actions, self.mask_token = cfg, actions, cfg.bins
        self.of_token = nn.Embedding(cfg.bins + 1, width)
        self.to_logits = nn.Linear(width, cfg.bins)
        nn.init.normal_(self.of_token.weight, 0.0, 0.02)

    def logits(self, hidden: Float[Tensor, "n l d"], first: int = 0) -> Float[Tensor, "n l k"]:
        """Of the tokens that are permitted at the places from `first` on."""
        permitted = self.actions.permitted(self.cfg.horizon)[first : first + hidden.shape[1]]
        return self.to_logits(hidden).float().masked_fill(~permitted, -torch.inf)

    @property
    def length(self) -> int:
        """L."""
        return self.cfg.horizon * len(self.actions.low)


class MaskedHead(TokenHead):
    """Some tokens are masked, and found by the others: the paper's."""

    @property
    def evaluations(self) -> int:
        return self.cfg.rounds

    def loss(
        self, sight: Sight, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h"]
    ) -> Metrics:
        tokens, valid = self.actions.tokens(action), self._valid(mask)
        time = torch.rand(len(tokens), device=tokens.device)
        counts = mask_counts(self.cfg.schedule, time, valid.sum(-1))
        noise = torch.rand(tokens.shape, device=tokens.device).masked_fill(~valid, torch.inf)
        return self.loss_at(sight, tokens, valid, places_of_least(noise, counts))

    def loss_at(
        self,
        sight: Sight,
        tokens: Int[Tensor, "b l"],
        valid: Bool[Tensor, "b l"],
        masked: Bool[Tensor, "b l"],
    ) -> Metrics:
        """Where these places are masked; what is not valid is not seen."""
        logits = self.predicted(sight, tokens.masked_fill(masked | ~valid, self.mask_token), valid)
        loss = masked_cross_entropy(logits, tokens, masked)
        right = (logits.argmax(-1) == tokens)[masked].float().mean()
        return {"loss": loss, "accuracy": right, "masked": masked.float().sum() / valid.sum()}

    def predicted(
        self, sight: Sight, inputs: Int[Tensor, "n l"], valid: Bool[Tensor, "n l"] | None = None
    ) -> Float[Tensor, "n l k"]:
        """Logits of every place, by one pass."""
        return self.logits(sight.hidden(self.of_token(inputs), valid))

    def draw(
        self, sight: Sight, decoding: MaskedDecoding | None = None, edit: Edit | None = None
    ) -> Float[Tensor, "n h a"]:
        """Chunks, by `decoding` in place of the settings' and with `edit` between rounds, if given."""
        start = sight.mask.new_ones(len(sight.mask), self.length).long() * self.mask_token
        tokens = decode_masked(
            lambda tokens: self.predicted(sight, tokens),
            start,
            self.mask_token,
            decoding or self.cfg.decoding,
            edit=edit,
        )
        return self.actions.values(tokens)

    def _valid(self, mask: Bool[Tensor, "b h"]) -> Bool[Tensor, "b l"]:
        return mask.repeat_interleave(len(self.actions.low), 1)


class AutoregressiveHead(TokenHead):
    """Token after token; the mask's embedding stands before the first."""

    @property
    def evaluations(self) -> int:
        return self.length

    def loss(
        self, sight: Sight, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h"]
    ) -> Metrics:
        tokens = self.actions.tokens(action)
        valid = mask.repeat_interleave(len(self.actions.low), 1)
        logits = self.predicted(sight, tokens.masked_fill(~valid, self.mask_token))
        terms = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        right = (logits.argmax(-1) == tokens)[valid].float().mean()
        return {"loss": masked_mean(terms, valid), "accuracy": right}

    def predicted(self, sight: Sight, tokens: Int[Tensor, "n l"]) -> Float[Tensor, "n l k"]:
        """Logits of every token given those before it, by one pass."""
        before = nn.functional.pad(tokens[:, :-1], (1, 0), value=self.mask_token)
        return self.logits(sight.hidden(self.of_token(before)))

    def draw(self, sight: Sight) -> Float[Tensor, "n h a"]:
        """Chunks; a pass a token, in which what came before is not computed again."""
        last = sight.mask.new_ones(len(sight.mask), 1).long() * self.mask_token
        found = []
        for number in range(self.length):
            hidden = sight.next(self.of_token(last), number)
            logits = self.logits(hidden, number).squeeze(1)
            if self.cfg.temperature == 0:
                last = logits.argmax(-1, keepdim=True)
            else:
                last = (logits / self.cfg.temperature).softmax(-1).multinomial(1)
            found.append(last)
        return self.actions.values(torch.cat(found, 1))


class DiffusionHead(nn.Module):
    """The noise in continuous actions, each of which is a token."""

    kept: Tensor

    def __init__(self, width: int, actions: ActionRange, cfg: Config):
        super().__init__()
        self.cfg, self.actions, self.width = cfg, actions, width
        size = len(actions.low)
        self.of_action, self.to_noise = nn.Linear(size, width), nn.Linear(width, size)
        self.of_level = MLP((width, width, width), "gelu")
        self.register_buffer("kept", alpha_bars("squaredcos_cap_v2", cfg.levels), persistent=False)

    @property
    def evaluations(self) -> int:
        return self.cfg.levels

    def loss(
        self, sight: Sight, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h"]
    ) -> Metrics:
        level = torch.randint(self.cfg.levels, (len(action),), device=action.device)
        noise = torch.randn_like(action)
        return {"loss": self.loss_at(sight, action, mask, level, noise)}

    def loss_at(
        self,
        sight: Sight,
        action: Float[Tensor, "b h a"],
        mask: Bool[Tensor, "b h"],
        level: Int[Tensor, "b"],
        noise: Float[Tensor, "b h a"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the noise, over the rows that are in the episode."""
        clean, kept = self.actions.scaled(action), self.kept[level].to(action.dtype)
        z = over(kept.sqrt(), clean) * clean + over((1 - kept).sqrt(), clean) * noise
        error = (self.predicted(sight, z, level, mask) - noise).square().mean(-1)
        return masked_mean(error, mask)

    def predicted(
        self,
        sight: Sight,
        z: Float[Tensor, "n h a"],
        level: Int[Tensor, "n"],
        valid: Bool[Tensor, "n h"] | None = None,
    ) -> Float[Tensor, "n h a"]:
        told = self.of_level(sinusoids(level.float(), self.width)).unsqueeze(1)
        return self.to_noise(sight.hidden(self.of_action(z) + told, valid)).float()

    def draw(self, sight: Sight) -> Float[Tensor, "n h a"]:
        """Chunks by DDIM, through every level."""
        sigmas = [*sigma_of_alpha_bar(self.kept).flip(0).tolist(), 0.0]
        levels = iter(range(self.cfg.levels - 1, -1, -1))

        def denoiser(x: Tensor, sigma: Tensor, condition: Any = None) -> Tensor:
            level = torch.full((len(x),), next(levels), device=x.device)
            output = self.predicted(sight, x * over((1 + sigma.square()).rsqrt(), x), level)
            return denoised_of("epsilon", output, x, sigma).clamp(-1, 1)

        shape = len(sight.mask), self.cfg.horizon, len(self.actions.low)
        x = sigmas[0] * torch.randn(shape, device=sight.mask.device)
        return self.actions.restored(solve(denoiser, x, sigmas))


class RegressionHead(nn.Module):
    """The median of each number: one pass, one answer."""

    evaluations = 1

    def __init__(self, width: int, actions: ActionRange, cfg: Config):
        super().__init__()
        self.cfg, self.actions = cfg, actions
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.to_action = nn.Linear(width, len(actions.low))

    def loss(
        self, sight: Sight, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h"]
    ) -> Metrics:
        error = (self.predicted(sight, mask) - self.actions.scaled(action)).abs().mean(-1)
        return {"loss": masked_mean(error, mask)}

    def predicted(self, sight: Sight, valid: Bool[Tensor, "n h"] | None) -> Float[Tensor, "n h a"]:
        rows = self.query.expand(len(sight.mask), self.cfg.horizon, -1)
        return self.to_action(sight.hidden(rows, valid)).float()

    def draw(self, sight: Sight) -> Float[Tensor, "n h a"]:
        return self.actions.restored(self.predicted(sight, None))


HEADS: Mapping[str, Any] = {
    "masked": MaskedHead,
    "autoregressive": AutoregressiveHead,
    "diffusion": DiffusionHead,
    "regression": RegressionHead,
}


# ---- the policy and the method


class VisionLanguagePolicy(TrainedState):
    """Draws chunks of actions for scenes; torch's own generator decides.

    Args:
        spec: of the robot and the backbone.
        cfg: of the method.
    """

    def __init__(self, spec: VisionSpec, cfg: Config):
        super().__init__()
        self.robot, self.crop = spec.robot, cfg.crop
        self.executed = cfg.executed or cfg.horizon
        causal = cfg.head == "autoregressive"
        self.network = SceneTransformer(spec.model, spec.robot, cfg.attention, causal)
        self.actions = ActionRange(spec.robot.action_dim, cfg)
        self.head: Any = HEADS[cfg.head](spec.model.hidden_size, self.actions, cfg)

    @property
    def evaluations(self) -> int:
        """Passes of the network a chunk."""
        return self.head.evaluations

    def chunk(self, scenes: Scenes, **options: Any) -> Float[Tensor, "n h a"]:
        """Actions in [-1, 1]; options are those of the head's `draw`.

        Raises:
            UserError: the data's statistics are missing, or images are of another kind than theirs.
        """
        self.actions.check()
        self.network.state_scaling.check()
        self.check(scenes)
        scenes = replace(scenes, images=centre_crop(scenes.images, self.crop))
        training = self.network.training
        self.eval()  # A model that recomputes activations keeps no cache in training mode.
        try:
            with torch.no_grad():
                sight = self.network(scenes)
                sight = sight if sight.two_ways else sight.cached()
                return self.head.draw(sight, **options)
        finally:
            self.train(training)

    def loss(self, batch: SceneChunks) -> Metrics:
        """What the head reports; its `loss` has a gradient."""
        scenes = batch.scenes
        scenes = replace(scenes, images=random_crop(scenes.images, self.crop))
        return self.head.loss(self.network(scenes), batch.action, batch.mask)

    def check(self, scenes: Scenes) -> None:
        """Refuse images of other cameras or sizes than those of the data.

        Raises:
            UserError: they are.
        """
        wanted = (len(self.robot.cameras), *self.robot.image_size)
        found = tuple(scenes.images.shape[1:4])
        if found != wanted:
            cameras, rows, columns = wanted
            raise UserError(
                f"images must be of {cameras} camera(s), {rows} x {columns}, as in the data, got "
                f"{found[0]} of {found[1]} x {found[2]}"
            )


class DiscreteDiffusionVLA(Method):
    """See the module."""

    Config = Config
    world = "robots"
    loop = "offline"
    data = "required"
    headline = "loss"

    def __init__(self, cfg: Config, spec: VisionSpec, runtime: Runtime):
        super().__init__(cfg, spec, runtime)
        size, room = spec.robot.action_dim, spec.model.context_length
        for name in ("binary", "constant"):
            known = all(component < size for component in getattr(cfg, name))
            require(name, getattr(cfg, name), known, f"components in [0, {size})")
        of_images = len(spec.robot.cameras) * spec.model.image_tokens
        words = spec.instruction[0].shape[1]
        total = of_images + words + 1 + cfg.horizon * size
        if room is not None and total > room:
            raise UserError(
                f"{of_images} tokens of images, {words} of the longest instruction and "
                f"{cfg.horizon * size} of actions do not fit the model's context of {room}: shorten "
                "the instruction or the horizon"
            )
        self.acting = VisionLanguagePolicy(spec, cfg).to(runtime.device)
        trained = [p for p in self.acting.parameters() if p.requires_grad]
        self.opt = Optim(trained, cfg.learning_rate, weight_decay=cfg.weight_decay)
        self._loss = runtime.autocast(self.acting.loss)

    @property
    def policy(self) -> VisionLanguagePolicy:
        return self.acting

    def experience(self, data: SceneData) -> SceneWindows:
        """Chunks that begin at every step; statistics are taken of all steps.

        Raises:
            UserError: an episode is shorter than a chunk, or an action has no range.
        """
        cfg, device = self.cfg, self.runtime.device
        instruction = self.spec.instruction
        windows = SceneWindows(data, cfg.horizon, cfg.batch_size, instruction, device=device)
        self.acting.actions.fit(data.action)
        self.acting.network.state_scaling.fit(data.state.to(device), constant="keep")
        return windows

    def update(self, batch: SceneChunks, step: int) -> Metrics:
        cfg = self.cfg
        told = self._loss(batch)
        self.opt.learning_rate = cfg.learning_rate * (1.0 if step < cfg.decay_after else 0.1)
        self.opt.minimize(told["loss"])
        return {name: value.detach() for name, value in told.items()}


# ---- recipes


def smoke() -> Experiment:
    """Ten updates of a tiny model."""
    return replace(
        Experiment.of(
            Config(bins=16, rounds=3, levels=3, batch_size=8, learning_rate=1e-3),
            model="esscher.models:tiny_llava",
            data="esscher.scenes:few_round_obstacle",
            steps=10,
        ),
        evaluation=EvaluationConfig(every=5, episodes=2),
        checkpoint=CheckpointConfig(every=5),
    )


def paper() -> Experiment:
    """The paper's decoding and the code's training, with adapters: bring a GPU, and a LeRobot folder
    libero_object.
    """
    return Experiment.of(
        Config(
            score="likeliest",
            annealed=True,
            choice_temperature=0.0,
            remask="threshold",
            crop=0.9,
            binary=(6,),
        ),
        model=ModelConfig(
            source="google/paligemma-3b-pt-224",
            dtype="bfloat16",
            lora_rank=32,
            gradient_checkpointing=True,
        ),
        data="libero_object",
        steps=200_000,
        runtime=RuntimeConfig(precision="bfloat16"),
    )


def tabletop() -> Experiment:
    """A small model for images of 64 x 64, an hour or less of one core; give --data, such as
    demonstrations that `esscher data collect metaworld:TASK --images 64` has made.
    """
    return replace(
        Experiment.of(
            Config(
                bins=64, crop=0.9, batch_size=32, learning_rate=1e-3, decay_after=3_000, levels=20
            ),
            model=ModelConfig(
                source="esscher.models:tiny_llava",
                kwargs={"layers": 3, "width": 96, "image_size": 64, "patch_size": 16},
            ),
            data="demonstrations",
            steps=4_000,
        ),
        evaluation=EvaluationConfig(every=2_000, episodes=10, step_limit=200),
        checkpoint=CheckpointConfig(every=1_000),
    )


def round_obstacle() -> Experiment:
    """A small model that goes round an obstacle on either side, in some minutes."""
    return _learned(Config())


def _learned(cfg: Config) -> Experiment:
    return replace(
        Experiment.of(
            replace(cfg, bins=32, levels=20, learning_rate=1e-3, decay_after=DECAY),
            model=ModelConfig(
                source="esscher.models:tiny_llava",
                kwargs={"layers": 3, "width": 64, "words": "go round the obstacle"},
            ),
            data="esscher.scenes:round_obstacle",
            steps=STEPS,
        ),
        evaluation=EvaluationConfig(every=0, episodes=100),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(every=100),
        runtime=RuntimeConfig(device="cpu", threads=1, graph="eager"),
    )


# ---- proof

STEPS, DECAY = 4_000, 3_200
CHUNKS = 500


def proof() -> Proof:
    """Decoding by an oracle, where all is known; and learned, beside a baseline from left to right."""
    return Proof(
        claims=(
            Claim(
                name="exact sampler",
                statement="The target is all 0 or all 1, and the model its exact posterior. Of l "
                "tokens decoded in t rounds with the cosine schedule so many chunks are one of the "
                "two: l 4: 1/8, 1/2, 1 for t 1, 2, 4; l 8: 1/128, 1/4, 1.",
                arms={"oracle": lambda seed: smoke()},
                measure=_oracle_figures,
                judge=_judge_oracle,
            ),
            Claim(
                name="learned",
                statement="A point that goes round a disc on either side, 8 actions of 2 components in "
                "32 bins: chunks that arrive without a touch and keep to one side are >= 0.95 of those "
                "in 12 rounds, <= 0.6 of those in 1, and as many within 0.03 as from left to right in "
                "16 passes. Where a kept token is changed halfway, re-masking by threshold recovers "
                "more than none.",
                arms={
                    "masked": lambda seed: _learned(Config()),
                    "autoregressive": lambda seed: _learned(Config(head="autoregressive")),
                },
                measure=_learned_figures,
                judge=_judge_learned,
            ),
        ),
        notes="The oracle is asked without a run: that of its arm is only there to have one. What is "
        f"learned: a Llava of width 64 and 3 layers, {STEPS} updates of 64 chunks; {CHUNKS} chunks a "
        "figure, each from a start of its own that is not in the data. Chunks are judged by executing "
        "them: at x >= 0.35 without a touch, at every step within 0.15 of the same side's plan. Both "
        "ablations are among the figures: the order of the tokens (random, or by confidence without "
        "noise) and re-masking.",
    )


def oracle(tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l 2"]:
    """Logits of a sequence that is all 0 or all 1, given what is not masked (2)."""
    ones, zeros = ((tokens == value).any(-1) for value in (1, 0))
    upper = torch.where(ones == zeros, 0.5, ones.float())
    both = torch.stack([1 - upper, upper], -1).log()
    return both.unsqueeze(1).expand(-1, tokens.shape[1], -1)


ORACLE = {(4, 1): 1 / 8, (4, 2): 1 / 2, (4, 4): 1.0, (8, 1): 1 / 128, (8, 2): 1 / 4, (8, 4): 1.0}
DRAWS = 20_000


def _oracle_figures(run: FinishedRun) -> dict[str, float]:
    seed_phase(run.experiment.seed, 0, Phase.EVALUATE)
    found = {}
    for length, rounds in ORACLE:
        start = torch.full((DRAWS, length), 2)
        tokens = decode_masked(oracle, start, 2, MaskedDecoding(rounds=rounds))
        alike = (tokens == tokens[:, :1]).all(-1)
        found[f"valid, {length} tokens, {rounds} rounds"] = float(alike.float().mean())
    return found


def _judge_oracle(figures: Figures) -> list[Check]:
    """Four standard errors around what is known; 1 where it is certain."""
    checks = []
    for (length, rounds), known in ORACLE.items():
        name = f"valid, {length} tokens, {rounds} rounds"
        error = 4 * math.sqrt(known * (1 - known) / DRAWS)
        for seed, share in enumerate(figures["oracle"][name]):
            told = f"{name}, seed {seed}"
            if known == 1:
                checks.append(Check(told, share, "= 1", share == 1))
            else:
                checks.append(within(told, share, known - error, known + error))
    return checks


DECODINGS: Mapping[str, Mapping[str, Any]] = {
    "12 rounds": {},
    "4 rounds": {"rounds": 4},
    "1 round": {"rounds": 1},
    "1 round, likeliest": {"rounds": 1, "temperature": 0.0},
    "random order": {"choice_temperature": 1e6},
    "order by confidence alone": {"choice_temperature": 0.0},
    "threshold": {"remask": "threshold"},
    "scale": {"remask": "scale"},
    "the paper's": {
        "score": "likeliest",
        "annealed": True,
        "choice_temperature": 0.0,
        "remask": "threshold",
    },
}


def _learned_figures(run: FinishedRun) -> dict[str, float]:
    method, seed = run.learner, run.experiment.seed
    tasks, scenes = _starts(method, seed)

    def valid(**options: Any) -> float:
        seed_phase(seed, 0, Phase.EVALUATE)
        return float(rounds_obstacle(tasks, method.policy.chunk(scenes, **options)).float().mean())

    passes = {"passes": float(method.policy.evaluations)}
    if method.cfg.head != "masked":
        return {"valid": valid(), **passes}
    plain = method.cfg.decoding
    found = {
        f"valid, {name}": valid(decoding=replace(plain, **changes))
        for name, changes in DECODINGS.items()
    }
    for remask in ("none", "scale", "threshold"):
        told = replace(plain, remask=remask)
        found[f"valid, corrupted, {remask}"] = valid(
            decoding=told, edit=_corrupt(plain, method.cfg.bins)
        )
    return {**found, **passes}


def _starts(method: "DiscreteDiffusionVLA", seed: int) -> tuple[list[RoundObstacle], Scenes]:
    """Tasks that are not in the data, about to begin, and what is seen there."""
    tasks = []
    for number in range(CHUNKS):
        tasks.append(RoundObstacle())
        tasks[-1].reset(1_000_000 * (seed + 1) + number)
    tokens, mask = method.spec.instruction
    scenes = Scenes(
        images=torch.stack([torch.from_numpy(task.images()) for task in tasks]),
        state=torch.stack([torch.from_numpy(task.state()) for task in tasks]),
        instruction=tokens.expand(CHUNKS, -1),
        instruction_mask=mask.expand(CHUNKS, -1),
    )
    return tasks, scenes


def _corrupt(decoding: MaskedDecoding, bins: int) -> Edit:
    """Moves one kept token of each row by half of the bins, halfway through the rounds."""

    def edit(turn: int, tokens: Tensor) -> Tensor:
        if turn != decoding.rounds // 2:
            return tokens
        noise = torch.rand(tokens.shape).masked_fill(tokens == bins, -1)
        place = noise.argmax(-1, keepdim=True)
        return tokens.scatter(1, place, (tokens.gather(1, place) + bins // 2) % bins)

    return edit


def _judge_learned(figures: Figures) -> list[Check]:
    ours, theirs, checks = figures["masked"], figures["autoregressive"], []
    for seed, share in enumerate(ours["valid, 12 rounds"]):
        once, apart = ours["valid, 1 round"][seed], abs(share - theirs["valid"][seed])
        passes, more = ours["passes"][seed], theirs["passes"][seed]
        kept, left = (ours[f"valid, corrupted, {r}"][seed] for r in ("threshold", "none"))
        checks += [
            Check(f"valid, 12 rounds, seed {seed}", share, ">= 0.95", share >= 0.95),
            Check(f"valid, 1 round, seed {seed}", once, "<= 0.6", once <= 0.6),
            Check(
                f"12 rounds and left to right, apart, seed {seed}", apart, "<= 0.03", apart <= 0.03
            ),
            Check(f"passes, seed {seed}", passes, f"< {more:g}", passes < more),
            Check(f"corrupted: threshold over none, seed {seed}", kept - left, "> 0", kept > left),
        ]
    return checks
