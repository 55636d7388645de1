"""Denoisers of the user's own: what they bring, and a call of one before work starts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import UserError, require
from esscher.functional.diffusion import karras_sigmas
from esscher.samplers.denoisers import Condition, both, expanded, rows_of
from esscher.samplers.solvers import seeded_noise

Found = TypeVar("Found")


def model_of(denoiser: Any, source: str) -> DiffusionModel:
    """A denoiser D(x, sigma, condition) with its attributes (see `load_diffusion`).

    Raises:
        UserError: it cannot be called, or has no shape.
    """
    if not callable(denoiser) or not hasattr(denoiser, "shape"):
        raise UserError(
            f"model {source} must return a pipeline of diffusers, a DiffusionModel, or a denoiser "
            "(x, sigma, condition) whose attribute shape is that of a sample, got "
            f"{type(denoiser).__name__}"
        )
    options = {
        name: getattr(denoiser, name)
        for name in ("null", "encode", "decode", "invert", "columns", "most_steps")
        if getattr(denoiser, name, None) is not None
    }
    brought: Any = denoiser
    levels = getattr(denoiser, "levels", karras_levels)
    return DiffusionModel(brought, brought.shape, levels, **options)


def karras_levels(steps: int, low: float = 0.002, high: float = 80.0) -> Float[Tensor, "k"]:
    """Noise levels from `high` to `low` and then 0, equally far apart as sigma^(1/7).

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 5 and table 1.
    Raises: UserError if steps < 1.
    """
    require("steps", steps, steps >= 1, ">= 1")
    ends = torch.tensor([high], dtype=torch.float64)
    return torch.cat([ends if steps == 1 else karras_sigmas(steps, low, high), ends.new_zeros(1)])


@torch.no_grad()
def try_out(model: DiffusionModel, rows: Sequence[Mapping[str, Any]], source: str) -> None:
    """Ask a model for two samples of noise, with their conditions and without, so that what is wrong
    with it shows before work starts. The CPU's random numbers go on as if it had not been asked.

    Args:
        rows: of the data, at least one.

    Raises:
        UserError: it or its `encode` or `levels` raised, levels do not fall, there are not as many
            conditions as rows, the null condition is not one row of their kind, or the answer is not
            finite or not of x's shape.
    """
    rows = [*rows, *rows][: max(2, len(rows))]
    with torch.random.fork_rng(devices=[]):
        told = f"encode of model {source} failed on rows of the data"
        condition = _asked(lambda: model.encode(rows), told)
        for name, value in _parts(condition).items():
            if value.ndim == 0 or len(value) != len(rows):
                raise UserError(
                    f"encode of model {source} must return {len(rows)} rows{name} for as many rows of "
                    f"the data, got shape {tuple(value.shape)}"
                )
        asked = [rows_of(condition, slice(2))]
        if model.null is not None:
            for name, value in _parts(model.null).items():
                if len(value) != 1:
                    raise UserError(
                        f"null of model {source} must have one row{name}, got {len(value)}"
                    )
            asked.append(expanded(model.null, 2))
            if condition is not None:
                both(*asked)
        level = float(_levels_tried(model, source)[0])
        for condition in asked:
            _try(model, condition, level, source)


def _levels_tried(model: DiffusionModel, source: str) -> Float[Tensor, "k"]:
    """Those to learn at, which work needs whatever samples are drawn by."""
    told = (
        f"levels of model {source} failed on up to 1,000 steps (where it takes fewer, give it the "
        "attribute most_steps; where it takes one number of steps alone, the levels themselves as a "
        "tensor)"
    )
    found = _asked(lambda: torch.as_tensor(model.levels_up_to(1_000)), told)
    falls = found.ndim == 1 and len(found) >= 2 and bool((found[1:] < found[:-1]).all())
    if not falls or not bool(found.isfinite().all()) or float(found[-1]) < 0:
        raise UserError(
            f"levels of model {source} must be a falling vector of finite noise levels that ends at 0 "
            f"or above, got shape {tuple(found.shape)}"
            + (f", from {float(found[0]):g} to {float(found[-1]):g}" if found.numel() else "")
        )
    return found


def _try(model: DiffusionModel, condition: Condition, level: float, source: str) -> None:
    x = seeded_noise([0, 1], model.shape, model.device)[0] * level
    shapes = [f"a condition{of} of shape {tuple(v.shape)}" for of, v in _parts(condition).items()]
    conditioned = " and ".join(shapes) or "no condition (an attribute encode makes them of rows)"
    given = f"x of shape {tuple(x.shape)}, sigma of shape (2,) and {conditioned}"
    sigma = x.new_full((2,), level)
    answer = _asked(
        lambda: model.denoiser(x, sigma, condition), f"model {source} failed on {given}"
    )
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        got = (
            f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        )
        raise UserError(
            f"model {source} must answer {given} by clean samples of x's shape, got {got}"
        )
    if not bool(answer.isfinite().all()):
        bad = answer[~answer.isfinite()][0].item()
        raise UserError(f"model {source} answered {given} by {bad}: what it returns must be finite")


def _parts(condition: Condition) -> dict[str, Tensor]:
    """The tensors of a condition, by how to speak of each."""
    if condition is None:
        return {}
    if isinstance(condition, Tensor):
        return {"": condition}
    return {f" {name}": value for name, value in condition.items()}


def _asked(function: Callable[[], Found], told: str) -> Found:
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{told}: {error!r}") from error
