"""Adaptive Guidance inside a pipeline of diffusers, whatever its scheduler:

    with adaptive_guidance(pipeline, threshold=0.991) as counted:
        images = pipeline(prompts, num_inference_steps=20).images
    print(counted.evaluations)

Such a pipeline asks its network about all samples twice in one call, without and with their conditions.
Here the call is taken apart: samples that have left guidance are asked about once, and the answer is
given for both, so that what the pipeline makes of them is the conditional answer at any scale.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from esscher.adapters.diffusers import LATEST, noise_table
from esscher.errors import UserError, require
from esscher.functional.diffusion import denoised_of, eps_of, input_scale, over, sigma_of_alpha_bar
from esscher.samplers.guidance import cosine, least_guided

CONDITIONAL_FIRST = ("DiTPipeline",)
"""All others put the conditional half second."""


@dataclass
class CountedGuidance:
    """What the network was asked by the newest call of the pipeline."""

    evaluations: Int[Tensor, "b"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Of each sample."""
    cosines: list[Float[Tensor, "b"]] = field(default_factory=list)
    """Of both answers at each step; NaN for samples that have left guidance."""


@contextmanager
def adaptive_guidance(
    pipeline: Any, *, threshold: float = 0.991, min_guided_steps: int | None = None
) -> Iterator[CountedGuidance]:
    """While it lasts, samples leave guidance once both answers point the same way.

    Args:
        pipeline: with a `unet` or `transformer` and a scheduler, whose guidance asks about both halves
            of a batch in one call.
        threshold: cosine of both answers, as noise, at which a sample leaves, in (-1, 1].
        min_guided_steps: steps before which none leaves; None: a quarter of all, rounded up, and never
            at a level without signal.

    Source: Castillo et al. 2023, Adaptive Guidance (arXiv 2312.12487).
    Raises: UserError if an argument is out of range, or the pipeline has no such network; and from a
        call of the pipeline if samples might leave at a level without signal.
    """
    require("threshold", threshold, -1 < threshold <= 1, "in (-1, 1]")
    least = min_guided_steps
    require("min_guided_steps", least, least is None or least >= 0, "None or >= 0")
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None:
        raise UserError(f"{type(pipeline).__name__} has no unet or transformer to guide")
    told, whole = CountedGuidance(), network.forward
    network.forward = _Guided(pipeline, whole, told, threshold, least)
    try:
        yield told
    finally:
        network.forward = whole


class _Guided:
    """The network's own forward, asked about fewer rows."""

    def __init__(
        self,
        pipeline: Any,
        forward: Callable[..., Any],
        told: CountedGuidance,
        threshold: float,
        asked: int | None,
    ):
        self._pipeline, self._forward, self._told = pipeline, forward, told
        self._threshold, self._asked, self._least = threshold, asked, 0
        self._guiding = torch.zeros(0, dtype=torch.bool)
        self._step, self._left = 0, 0
        self._kind: Any = None
        self._levels = torch.zeros(1)

    def __call__(self, *given: Any, **named: Any) -> Any:
        names = ("sample", "hidden_states")
        z = given[0] if given else next(named[name] for name in names if name in named)
        if self._left == 0:
            self._begin(z)
        if len(z) != 2 * len(self._guiding):
            raise UserError(
                f"the pipeline asks about {len(z)} rows in one call: adaptive guidance needs one that "
                "asks about each sample twice, with a guidance_scale above 1"
            )
        count, guiding = len(self._guiding), self._guiding
        first = type(self._pipeline).__name__ in CONDITIONAL_FIRST
        with_condition = torch.arange(count, device=z.device) + (0 if first else count)
        without = torch.arange(count, device=z.device)[guiding] + (count if first else 0)
        rows = torch.cat([with_condition, without])
        asked = tuple(_rows_of(value, rows, len(z)) for value in given)
        options = {name: _rows_of(value, rows, len(z)) for name, value in named.items()}
        answer = self._forward(*asked, **options)
        output = answer[0] if isinstance(answer, tuple) else answer.sample
        conditional, unconditional = output[:count], output[:count].clone()
        unconditional[guiding] = output[count:]
        self._leave(z[with_condition], conditional, unconditional)
        halves = (conditional, unconditional) if first else (unconditional, conditional)
        together = torch.cat(halves)
        if isinstance(answer, tuple):
            return (together, *answer[1:])
        answer.sample = together
        return answer

    def _begin(self, z: Tensor) -> None:
        self._kind, self._levels = _noise_levels(self._pipeline.scheduler)
        self._least = least_guided(self._levels, self._asked, self._threshold)
        self._left, self._step = len(self._levels) - 1, 0
        self._guiding = torch.ones(len(z) // 2, dtype=torch.bool, device=z.device)
        self._told.evaluations = torch.zeros(len(z) // 2, dtype=torch.long, device=z.device)
        self._told.cosines = []

    def _leave(self, z: Tensor, conditional: Tensor, unconditional: Tensor) -> None:
        """Who is guided in the next step."""
        channels, sigma = z.shape[1], float(self._levels[self._step])
        pair = conditional[:, :channels].float(), unconditional[:, :channels].float()
        eps_c, eps_u = (_as_noise(self._kind, half, z.float(), sigma) for half in pair)
        gamma = cosine(eps_c, eps_u).masked_fill(~self._guiding, math.nan)
        self._told.cosines.append(gamma)
        self._told.evaluations += 1 + self._guiding.long()
        self._step, self._left = self._step + 1, self._left - 1
        if self._step >= self._least:
            self._guiding = self._guiding & ~(gamma >= self._threshold)


def _as_noise(kind: Any, output: Tensor, z: Tensor, sigma: float) -> Float[Tensor, "b *d"]:
    """The eps that an output stands for, whatever the network predicts."""
    if kind == "epsilon":
        return output
    level = z.new_full((len(z),), sigma)
    x = z / over(input_scale(kind, level), z)
    return eps_of(x, denoised_of(kind, output, x, level), level)


def _noise_levels(scheduler: Any) -> tuple[Any, Float[Tensor, "k"]]:
    """What the network predicts, and noise over signal at each step of sampling and after it.

    Where it predicts the noise, which may differ without signal too and needs no conversion, that is 0.
    """
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    times = torch.as_tensor(scheduler.timesteps).cpu().double()
    levels = times.new_zeros(len(times) + 1)
    if kind == "flow_prediction":
        share = (times / scheduler.config.num_train_timesteps).clamp(max=LATEST)
        levels[:-1] = share / (1 - share)
    elif kind != "epsilon":
        table = sigma_of_alpha_bar(noise_table(scheduler)).cpu()
        levels[:-1] = table[times.round().long().clamp(max=len(table) - 1)]
    return kind, levels


def _rows_of(value: Any, rows: Int[Tensor, "k"], count: int) -> Any:
    """Rows of whatever has one for each of the batch."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim > 0 and len(value) == count else value
    if isinstance(value, Mapping):
        return {name: _rows_of(item, rows, count) for name, item in value.items()}
    return value
