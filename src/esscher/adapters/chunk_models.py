"""Trained chunk models from where users have them: run folders, functions, diffusers' schedulers."""

from pathlib import Path
from typing import Any

from torch import nn

from esscher.adapters.diffusers import noise_table
from esscher.adapters.imports import made
from esscher.distributions.chunks import ChunkModel, ChunkPolicy
from esscher.distributions.goals import GoalColumns, Observed
from esscher.errors import UserError
from esscher.nn.scaling import Scaling
from esscher.types import Spec


def load_chunk_model(source: str, spec: Spec) -> ChunkModel:
    """The model of a run that trained a policy of chunks, or what a user's function returns.

    Args:
        source: a run folder, or module:function, which is called with the specification.
        spec: of the task.

    Raises:
        UserError: neither, or of another task.
    """
    if Path(source).is_dir():
        from esscher.runtime.load import load

        policy = load(source).method.policy
        if not isinstance(policy, ChunkPolicy):
            raise UserError(
                f"policy {source} is a run without chunks of actions: give one of diffusion_policy"
            )
        model = policy.model
    elif ":" in source:
        model = made(source, "policy", spec)
        if not isinstance(model, ChunkModel):
            raise UserError(
                f"policy {source!r} returned a {type(model).__name__}: return a ChunkModel "
                "(esscher.adapters.chunk_models.from_diffusers makes one)"
            )
    else:
        raise UserError(
            f"policy {source!r} is no run folder here, and no module:function: give one of them"
        )
    sizes = (model.observed.obs_dim, len(model.actions.shift))
    if sizes != (spec.obs_dim, spec.action_dim):
        raise UserError(
            f"policy {source} is for observations of {sizes[0]} and actions of {sizes[1]} numbers, "
            f"and the task has {spec.obs_dim} and {spec.action_dim}: choose its own task (--env.id)"
        )
    return model


def from_diffusers(
    network: nn.Module,
    scheduler: Any,
    spec: Spec,
    *,
    horizon: int,
    obs_steps: int = 1,
    observed: Observed | None = None,
    actions: Scaling | None = None,
) -> ChunkModel:
    """A chunk model of a network and the DDPMScheduler of diffusers that it was trained with.

    Args:
        network: (noisy chunk "b h a", level "b", condition "b c") -> what the scheduler's
            `prediction_type` says; the condition is the last observations, one after another.
        scheduler: variance "fixed_small".
        spec: of the task.
        horizon: h, rows of a chunk.
        obs_steps: observations that it sees.
        observed: how observations are scaled; None: not.
        actions: how actions are scaled; None: not, they are [-1, 1] as everywhere here.

    Raises:
        UserError: a kind of noise or of prediction that is not supported.
    """
    config = scheduler.config
    if config.get("variance_type", "fixed_small") != "fixed_small":
        raise UserError(
            f"variance_type {config.variance_type!r} is not supported: give a DDPMScheduler with "
            "variance_type fixed_small"
        )
    if observed is None:
        observed = Observed(spec.obs_dim, GoalColumns(), "none")
        observed.scaling = Scaling.identity(spec.obs_dim, "observation")
    return ChunkModel(
        network,
        noise_table(scheduler),
        observed,
        actions or Scaling.identity(spec.action_dim, "action"),
        horizon=horizon,
        obs_steps=obs_steps,
        prediction=config.prediction_type,
        clip=config.clip_sample_range if config.get("clip_sample", True) else float("inf"),
    )
