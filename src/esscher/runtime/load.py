"""Open a run folder for use: its policy, its method, its experiment."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esscher.controller import Controller
from esscher.embedder import Embedder
from esscher.errors import UserError
from esscher.experiment import EvaluationConfig, Experiment
from esscher.painter import Painter
from esscher.registry import load_method
from esscher.runtime import checkpoint as checkpoints
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.run import read_experiment
from esscher.runtime.state import under
from esscher.runtime.worlds import world_of
from esscher.types import Spec
from esscher.writer import Writer


@dataclass(frozen=True)
class Loaded:
    """A trained run."""

    experiment: Experiment
    policy: Any
    """Of a controller: maps observations to actions of the environment; see Controller.predict. Of a
    language model: answers prompts; see Writer.complete. Of a diffusion model: draws; see
    Painter.draw. Of populations: embeds sets; see Embedder. Of a robot that sees: see Robot.act."""
    method: Any
    """The whole learner, critics and optimisers included."""
    step: int
    """Steps of the checkpoint that was read."""

    def policy_for(self, descriptor: Sequence[float], *, asked: bool = False) -> Controller:
        """Of a run that fills an archive: the policy for a behaviour.

        Args:
            descriptor: of an episode, in the task's units.
            asked: the actor that is asked for it, instead of the archive's nearest elite.

        Raises:
            UserError: the method fills no archive, the archive is empty, the actor cannot be asked,
                or the descriptor has another size than the task's.
        """
        spec = self.policy.spec
        if not spec.descriptor_low:
            raise UserError(
                f"{self.experiment.slug} has one policy and no descriptors: leave out --descriptor"
            )
        if len(descriptor) != len(spec.descriptor_low):
            raise UserError(
                f"descriptor must have {len(spec.descriptor_low)} numbers, got {len(descriptor)}"
            )
        choose = self.method.actor_for if asked else self.method.elite_for
        return Controller(choose(descriptor), spec)


def load(directory: str | Path, *, step: int | None = None) -> Loaded:
    """Open the newest checkpoint of a run, or that of `step`, on the CPU.

    Raises:
        UserError: not a run folder, no checkpoint, a damaged one, or one of another version.
    """
    folder = Path(directory)
    experiment = read_experiment(folder)
    checkpoint = checkpoints.load(folder, step)
    world = load_method(experiment.slug).world
    if world == "language":
        return _load_language(experiment, checkpoint)
    if world == "diffusion":
        return _load_diffusion(experiment, checkpoint)
    if world == "sets":
        return _load_sets(experiment, checkpoint)
    if world == "robots":
        return _load_robot(experiment, checkpoint)
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint.meta["spec"].items()
    }
    spec = Spec(**fields)
    method = load_method(experiment.slug)(experiment.method, spec, Runtime())
    method.load_state_dict(under("method", checkpoint.state))
    return Loaded(experiment, Controller(method.policy, spec), method, checkpoint.step)


def evaluate_model(
    directory: str | Path,
    evaluation: EvaluationConfig,
    *,
    step: int | None = None,
    tasks: tuple[str, ...] = (),
) -> tuple[Loaded, Evaluation]:
    """Judge what is no controller anew, on the rows or populations that were held out, on what is
    drawn, or in tasks.

    Args:
        directory: of the run.
        evaluation: how much.
        step: of the checkpoint; None: the newest.
        tasks: where a robot is judged; empty: where its run judged it.

    Raises:
        UserError: as `load` does, or the data cannot be read any more.
    """
    experiment = replace(read_experiment(Path(directory)), evaluation=evaluation)
    if tasks:
        stage = experiment.stages[-1]
        stage = replace(stage, robot=replace(stage.robot, tasks=tasks))
        experiment = replace(experiment, stages=(*experiment.stages[:-1], stage))
    checkpoint = checkpoints.load(Path(directory), step)
    opened = {
        "language": _load_language,
        "diffusion": _load_diffusion,
        "sets": _load_sets,
        "robots": _load_robot,
    }[load_method(experiment.slug).world]
    with closing(world_of(experiment, Runtime())) as world:
        loaded = opened(experiment, checkpoint, world)
        return loaded, world.evaluate(loaded.method, checkpoint.step)


def _load_language(
    experiment: Experiment, checkpoint: checkpoints.Checkpoint, world: Any = None
) -> Loaded:
    from esscher.runtime.language import LanguageWorld

    runtime = Runtime()
    world = world or LanguageWorld(experiment, runtime, with_text=False)
    world.check(checkpoint.meta["spec"])
    method = load_method(experiment.slug)(experiment.method, world.spec, runtime)
    method.load_state_dict(under("method", checkpoint.state))
    writer = Writer(method.policy, world.spec.tokenizer, getattr(method, "write", None))
    return Loaded(experiment, writer, method, checkpoint.step)


def _load_diffusion(
    experiment: Experiment, checkpoint: checkpoints.Checkpoint, world: Any = None
) -> Loaded:
    from esscher.runtime.diffusion import DiffusionWorld

    runtime = Runtime()
    world = world or DiffusionWorld(experiment, runtime)
    world.check(checkpoint.meta["spec"])
    method = load_method(experiment.slug)(experiment.method, world.spec, runtime)
    method.load_state_dict(under("method", checkpoint.state))
    at_once = experiment.stages[-1].image.at_once
    painter = Painter(method.policy, world.wanted, method.draw, at_once=at_once)
    return Loaded(experiment, painter, method, checkpoint.step)


def _load_sets(
    experiment: Experiment, checkpoint: checkpoints.Checkpoint, world: Any = None
) -> Loaded:
    """The data are not needed, but where there is a world they must be the same."""
    from esscher.runtime.sets import spec_of

    if world is not None:
        world.check(checkpoint.meta["spec"])
    spec = spec_of(checkpoint.meta["spec"])
    method = load_method(experiment.slug)(experiment.method, spec, Runtime())
    method.load_state_dict(under("method", checkpoint.state))
    return Loaded(experiment, Embedder(method, spec), method, checkpoint.step)


def _load_robot(
    experiment: Experiment, checkpoint: checkpoints.Checkpoint, world: Any = None
) -> Loaded:
    """The data are not needed, but where there is a world they must be the same."""
    from esscher.robot import Robot
    from esscher.runtime.robots import RobotWorld, spec_of

    described, runtime = checkpoint.meta["spec"], Runtime()
    world = world or RobotWorld(experiment, runtime, known=spec_of(described))
    world.check(described)
    method = load_method(experiment.slug)(experiment.method, world.spec, runtime)
    method.load_state_dict(under("method", checkpoint.state))
    return Loaded(experiment, Robot(method.policy, world.spec), method, checkpoint.step)
