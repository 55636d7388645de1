"""What every diffusion model is turned into: a function D(x, sigma, condition) of a clean estimate.

Guidance makes a denoiser of a denoiser, a solver calls one. Coordinates are x = x0 + sigma eps; see
functional/diffusion.py. A condition is a tensor or several by name, one row a sample.
"""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import UserError, require
from esscher.functional.diffusion import (
    Prediction,
    denoised_of,
    guided_estimate,
    input_scale,
    over,
    sigma_of_alpha_bar,
)

Condition = Tensor | Mapping[str, Tensor] | None
Between = Literal["linear", "log", "nearest", "below"]


@runtime_checkable
class Denoiser(Protocol):
    """An estimate of the clean sample, E[x0 | x]."""

    def __call__(
        self, x: Float[Tensor, "b *d"], sigma: Float[Tensor, "b"], condition: Condition = None
    ) -> Float[Tensor, "b *d"]: ...


class Discrete(nn.Module):
    """A network trained at discrete noise levels z = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

    Args:
        network: (z "b *d", t "b", condition) -> output "b *d".
        alpha_bars: of every training step, falling.
        prediction: what the output is.
        between: what step a level between two of training is told as: by its place between them,
            linear in sigma or in log sigma, or the step nearest to, or below, the latter.

    Raises:
        UserError: alpha_bars do not fall, or the last one is 0 (no signal at all: such a level has no
            sigma; rescale the schedule, or leave the last step out).
    """

    def __init__(
        self,
        network: Callable[[Tensor, Tensor, Condition], Tensor],
        alpha_bars: Float[Tensor, "t"],
        prediction: Prediction,
        between: Between = "linear",
    ):
        super().__init__()
        self.network = network
        self.between: Between = between
        self.prediction: Prediction = prediction
        if not bool((alpha_bars[1:] < alpha_bars[:-1]).all()):
            raise UserError("alpha_bars must fall from one training step to the next")
        if not float(alpha_bars[-1]) > 0:
            raise UserError(
                "the last training step keeps no signal at all (terminal signal-to-noise ratio 0), "
                "which has no finite noise level: leave that step out of the schedule"
            )
        self.register_buffer("sigmas", sigma_of_alpha_bar(alpha_bars.double()), persistent=False)

    sigmas: Tensor
    """Noise level of each training step, rising."""

    def timestep(self, sigma: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The training step of a noise level; see `between`."""
        table, level, most = self.sigmas, sigma.to(self.sigmas), len(self.sigmas) - 1
        if most == 0:
            return torch.zeros_like(sigma, dtype=torch.float32)
        above = torch.searchsorted(table, level).clamp(1, most)
        low, high = table[above - 1], table[above]
        if self.between != "linear":
            low, level, high = low.log(), level.log(), high.log()
        step = (above - 1 + (level - low) / (high - low)).clamp(0, most)
        return whole_steps(step, self.between).float()

    def forward(
        self, x: Float[Tensor, "b *d"], sigma: Float[Tensor, "b"], condition: Condition = None
    ) -> Float[Tensor, "b *d"]:
        z = x * over(input_scale(self.prediction, sigma), x)
        output = self.network(z, self.timestep(sigma), condition)
        return denoised_of(self.prediction, output, x, sigma)


def whole_steps(step: Float[Tensor, "b"], between: Between) -> Float[Tensor, "b"]:
    """Steps of training, which may lie between two, as a network is told them."""
    if between == "nearest":
        return step.round()
    # What is whole but for rounding stays.
    return (step + 1e-4).floor() if between == "below" else step


class Counted:
    """A denoiser that counts how many rows it has been asked about: network evaluations."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.evaluations = 0

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        self.evaluations += len(x)
        return self.denoiser(x, sigma, condition)


def rows_of(condition: Condition, rows: Tensor | slice) -> Condition:
    """The condition of some of the samples."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition[rows]
    return {name: value[rows] for name, value in condition.items()}


def placed(condition: Condition, device: torch.device) -> Condition:
    """The condition on a device."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition.to(device)
    return {name: value.to(device) for name, value in condition.items()}


def repeated(condition: Condition, copies: int) -> Condition:
    """Each sample's condition `copies` times, one after the other."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition.repeat_interleave(copies, 0)
    return {name: value.repeat_interleave(copies, 0) for name, value in condition.items()}


def both(first: Condition, second: Condition) -> Condition:
    """Two conditions, one below the other.

    Raises:
        UserError: one has what the other lacks, or rows of another shape.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise UserError(
                f"the condition has rows of shape {tuple(first.shape[1:])} and the null condition of "
                f"{tuple(second.shape[1:])}: they must be alike"
            )
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping) and first.keys() == second.keys():
        pairs = {name: both(first[name], second[name]) for name in first}
        return {name: value for name, value in pairs.items() if isinstance(value, Tensor)}
    raise UserError("guidance needs a condition and a null condition of the same kind")


def classifier_free(denoiser: Denoiser, null: Condition, scale: float) -> Denoiser:
    """Guided denoiser D_u + scale (D_c - D_u); scale 1 is no guidance. Two evaluations a sample.

    Args:
        denoiser: of a model trained with and without conditions.
        null: what stands for no condition, or for what is to be avoided; one row, or one a sample.
        scale: s; other code writes (1 + w) D_c - w D_u with w = s - 1.

    Source: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6.
    Raises: UserError if scale is not finite.
    """
    require("scale", scale, abs(scale) < float("inf"), "finite")

    def guided(x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        if scale == 1:
            return denoiser(x, sigma, condition)
        without = expanded(null, len(x))
        together = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both(condition, without))
        conditional, unconditional = together.chunk(2)
        return guided_estimate(conditional, unconditional, scale)

    return guided


def clipped(denoiser: Denoiser, bound: float) -> Denoiser:
    """A denoiser whose estimates stay in [-bound, bound], as images do; what a solver takes for the
    noise follows from the clipped estimate.

    Source: Ho et al. 2020 (arXiv 2006.11239), as in its code; in diffusers clip_sample, with DDIM's
    use_clipped_model_output.
    """

    def estimate(x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        return denoiser(x, sigma, condition).clamp(-bound, bound)

    return estimate


def expanded(null: Condition, count: int) -> Condition:
    """A null condition of one row, for `count` samples.

    Raises:
        UserError: it has neither one row nor `count`.
    """
    if null is None:
        raise UserError("guidance needs a null condition: this model has none")
    if isinstance(null, Mapping):
        told = {name: expanded(value, count) for name, value in null.items()}
        return {name: value for name, value in told.items() if isinstance(value, Tensor)}
    if len(null) == count:
        return null
    if len(null) != 1:
        raise UserError(
            f"the null condition has {len(null)} rows for {count} samples: give 1 or {count}"
        )
    return null.expand(count, *null.shape[1:])
