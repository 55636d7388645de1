"""Policies that draw a chunk of actions at once by denoising, and execute some of it.

    states of the last `obs_steps` steps, and the goal  ->  chunk [horizon, actions]
    row `obs_steps` - 1 of the chunk is the action of now; the rows before it are of the past

A chunk model is trained at discrete noise levels k = 0 .. K-1 (variance preserving):

    z_k = sqrt(abar_k) A + sqrt(1 - abar_k) eps
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from esscher.distributions.goals import Observed
from esscher.distributions.remembering import Memory
from esscher.errors import UserError, require
from esscher.functional.counted_noise import counted_normal
from esscher.functional.diffusion import (
    Prediction,
    denoised_of,
    over,
    reverse_kernel,
    sigma_of_alpha_bar,
)
from esscher.nn.scaling import Scaling
from esscher.types import record

Noise = Callable[[int], Tensor]
"""Which draw, counted from 0 -> standard normal noise of a chunk's shape for all rows."""


class ChunkNetwork(Protocol):
    """What is learned: (noisy chunk, level, condition) -> a prediction."""

    def __call__(
        self,
        z: Float[Tensor, "b h a"],
        level: Float[Tensor, "b"],
        condition: Float[Tensor, "b c"],
    ) -> Float[Tensor, "b h a"]: ...


class ChunkModel(nn.Module):
    """A network of chunks with all that it takes to draw from it.

    Args:
        network: predicts, at a level, what `prediction` says.
        alpha_bars: of the levels, falling and above 0.
        observed: what it sees of flat observations.
        actions: how its actions are scaled.
        horizon: h, rows of a chunk, >= 2.
        obs_steps: states that it sees, in [1, horizon].
        prediction: epsilon, sample or v_prediction.
        clip: denoised chunks are cut to +-clip, > 0; inf: not at all.

    Raises:
        UserError: naming the setting that is out of range.
    """

    alpha_bars: Tensor

    def __init__(
        self,
        network: nn.Module,
        alpha_bars: Float[Tensor, "k"],
        observed: Observed,
        actions: Scaling,
        *,
        horizon: int,
        obs_steps: int,
        prediction: Prediction = "epsilon",
        clip: float = 1.0,
    ):
        super().__init__()
        require("horizon", horizon, horizon >= 2, ">= 2: a chunk of one action has no next one")
        require("obs_steps", obs_steps, 1 <= obs_steps <= horizon, f"in [1, {horizon}]")
        require("clip", clip, clip > 0, "> 0")
        if prediction not in ("epsilon", "sample", "v_prediction"):
            raise UserError(
                f"prediction_type {prediction!r} has no discrete noise levels: give a model of "
                "epsilon, sample or v_prediction"
            )
        falling = bool((alpha_bars[1:] < alpha_bars[:-1]).all()) and float(alpha_bars[-1]) > 0
        require("alpha_bars", alpha_bars.tolist(), falling, "falling and above 0")
        self.network, self.observed, self.actions = network, observed, actions
        self.horizon, self.obs_steps, self.clip = horizon, obs_steps, clip
        self.prediction: Prediction = prediction
        self.register_buffer("alpha_bars", alpha_bars.double())

    @property
    def levels(self) -> int:
        """K."""
        return len(self.alpha_bars)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        return self.horizon, len(self.actions.shift)

    def condition(
        self, state: Float[Tensor, "b n s"], goal: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b c"]:
        """What the network is told: the last states, one after another, and the goal."""
        return torch.cat([state.flatten(1), goal], -1)

    def denoised(
        self, z: Float[Tensor, "b h a"], level: int, condition: Float[Tensor, "b c"]
    ) -> Float[Tensor, "b h a"]:
        """The estimate of the clean chunk: one network evaluation."""
        kept = self.alpha_bars[level]
        output = self.network(z, z.new_full((len(z),), level), condition)
        sigma = sigma_of_alpha_bar(kept).to(z)
        found = denoised_of(self.prediction, output, z / kept.sqrt().to(z), sigma)
        return found.clamp(-self.clip, self.clip)

    def step(
        self,
        z: Float[Tensor, "b h a"],
        level: int,
        condition: Float[Tensor, "b c"],
        noise: Float[Tensor, "b h a"] | None,
        to: int | None = None,
    ) -> Float[Tensor, "b h a"]:
        """A step of DDPM, from a level to the one below, or to `to` (-1: clean).

        Args:
            noise: of the step; None at the last one, which has none.

        Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), eq. 6 and 7, the posterior of level k - 1 given
            level k and the estimate (variance "fixed_small").
        """
        below = level - 1 if to is None else to
        kept = self.alpha_bars[level]
        kept_below = self.alpha_bars[below] if below >= 0 else torch.ones_like(kept)
        found = self.denoised(z, level, condition)
        if below < 0:
            return found
        sigma, next_sigma = (sigma_of_alpha_bar(x).to(z) for x in (kept, kept_below))
        mean, std = reverse_kernel(z / kept.sqrt().to(z), found, sigma, next_sigma, 1.0)
        assert noise is not None
        return kept_below.sqrt().to(z) * (mean + over(std, z) * noise)

    def draw(self, condition: Float[Tensor, "b c"], noise: Noise) -> Float[Tensor, "b h a"]:
        """A chunk of each row, by all K levels; draw 0 is the noise that it begins with."""
        z = noise(0)
        for level in range(self.levels - 1, -1, -1):
            z = self.step(z, level, condition, noise(self.levels - level) if level else None)
        return z


@record
class ChunkMemory(Memory):
    """The last states, and the chunk that is being executed."""

    state: Float[Tensor, "n p s"]
    chunk: Float[Tensor, "n h a"]
    """As it was drawn, scaled."""
    used: Int[Tensor, "n"]
    """How many of its actions were executed."""


Kept = TypeVar("Kept", bound=ChunkMemory)


def begun(model: ChunkModel, seed: Int[Tensor, "n"]) -> ChunkMemory:
    """Nothing seen, and nothing planned."""
    zeros, none = model.actions.shift.new_zeros, torch.zeros_like(seed)
    return ChunkMemory(
        seed=seed,
        time=none,
        evaluations=none,
        state=zeros(len(seed), model.obs_steps, model.observed.state_dim),
        chunk=zeros(len(seed), *model.chunk_shape),
        used=none,
    )


def seen(
    model: ChunkModel, obs: Float[Tensor, "n o"], memory: ChunkMemory
) -> Float[Tensor, "n p s"]:
    """The last states with the new one; before an episode's first step that one stands in.

    Raises:
        UserError: the data's statistics are missing.
    """
    for scaling in (model.observed.scaling, model.actions):
        scaling.check()
    new = model.observed.state(obs).unsqueeze(1)
    moved = torch.cat([memory.state[:, 1:], new], 1)
    return torch.where((memory.time == 0).view(-1, 1, 1), new.expand_as(moved), moved)


def drawn_for(
    rows: Bool[Tensor, "n"],
    draw: Callable[[Float[Tensor, "m c"], Noise, Float[Tensor, "m h a"]], Tensor],
    model: ChunkModel,
    state: Float[Tensor, "n p s"],
    obs: Float[Tensor, "n o"],
    memory: ChunkMemory,
) -> Float[Tensor, "n h a"]:
    """The chunks with new ones in some rows: `draw(condition, noise, chunks of before)`.

    Of the rows that keep theirs, nothing is asked of the network.
    """
    if not bool(rows.any()):
        return memory.chunk
    seed, time = memory.seed[rows], memory.time[rows]
    condition = model.condition(state[rows], model.observed.wanted(obs[rows]))
    drawn = draw(
        condition, lambda k: counted_normal(seed, time, k, model.chunk_shape), memory.chunk[rows]
    )
    return memory.chunk.index_put((rows,), drawn)


def check_executed(model: ChunkModel, executed: int) -> None:
    """Refuse to execute more than a chunk holds.

    Raises:
        UserError: the setting is out of range.
    """
    most = model.horizon - model.obs_steps + 1
    permitted = f"in [1, {most}], the rows of a chunk from that of now on"
    require("executed", executed, 1 <= executed <= most, permitted)


class ChunkPolicy(nn.Module):
    """Draws a chunk by all levels, executes some of its actions, and draws the next one.

    Args:
        model: of chunks.
        executed: actions of each chunk, >= 1; 1: a new chunk at every step.
    """

    def __init__(self, model: ChunkModel, executed: int):
        super().__init__()
        check_executed(model, executed)
        self.model, self.executed = model, executed

    def begin(self, seed: Int[Tensor, "n"]) -> ChunkMemory:
        return begun(self.model, seed)

    @torch.no_grad()
    def act(
        self, obs: Float[Tensor, "n o"], memory: ChunkMemory
    ) -> tuple[Float[Tensor, "n a"], ChunkMemory]:
        """One action for each environment.

        Raises:
            UserError: the data's statistics are missing.
        """
        model = self.model
        state = seen(model, obs, memory)
        due = (memory.time == 0) | (memory.used >= self.executed)
        chunk = drawn_for(
            due, lambda told, noise, _: model.draw(told, noise), model, state, obs, memory
        )
        used = torch.where(due, 0, memory.used)
        row = model.obs_steps - 1 + used
        action = chunk[torch.arange(len(obs), device=obs.device), row]
        return model.actions.inverse(action), ChunkMemory(
            seed=memory.seed,
            time=memory.time + 1,
            evaluations=memory.evaluations + model.levels * due,
            state=state,
            chunk=chunk,
            used=used + 1,
        )
