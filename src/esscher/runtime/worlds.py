"""What a run is about: controllers, language models, diffusion models, populations known by samples,
robots that see.

A world builds the parts that depend on it (specification, experience, evaluation) and drives the loop;
the runner around it is the same for all.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from esscher.adapters.data import load_dataset
from esscher.adapters.episodes import EpisodeRunner
from esscher.adapters.gymnasium import Environments
from esscher.errors import UserError
from esscher.experiment import Experiment
from esscher.loops.evolve import evolve
from esscher.loops.offline import offline
from esscher.loops.online import LoopState, Progress, online
from esscher.registry import load_method
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation, Evaluator
from esscher.runtime.state import State


class World(Protocol):
    """What the runner asks."""

    kind: str
    spec: Any
    inexact_because: str | None
    judged_before: bool
    """Whether what training begins with is worth an evaluation."""

    def experience(self, method: Any) -> Any: ...

    def begin(self) -> torch.Tensor:
        """What the loop's state starts with."""
        ...

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]: ...

    def evaluate(self, method: Any, step: int) -> Evaluation: ...

    def pictures(self) -> dict[str, Any]:
        """Figures of what the last evaluation drew, by name."""
        ...

    def score(self, evaluation: Evaluation) -> float | None:
        """On the scale of the data's reference, where they have one."""
        ...

    def describe(self) -> dict[str, Any]:
        """What `spec` can be built from again, as plain data."""
        ...

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise a UserError if this world is not the one that a checkpoint describes."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, step: int) -> None: ...

    def finish(self, method: Any, folder: Path) -> None:
        """Leave the result in the form in which other tools take it."""
        ...

    def close(self) -> None: ...


def world_of(experiment: Experiment, runtime: Runtime) -> World:
    """The world of an experiment's last stage.

    Raises:
        UserError: a task, model or data that cannot be used.
    """
    world = load_method(experiment.slug).world
    if world == "language":
        from esscher.runtime.language import LanguageWorld

        return LanguageWorld(experiment, runtime)
    if world == "diffusion":
        from esscher.runtime.diffusion import DiffusionWorld

        return DiffusionWorld(experiment, runtime)
    if world == "sets":
        from esscher.runtime.sets import SetWorld

        return SetWorld(experiment, runtime)
    if world == "robots":
        from esscher.runtime.robots import RobotWorld

        return RobotWorld(experiment, runtime)
    return ControlWorld(experiment, runtime)


class ControlWorld:
    """Environments, with logged steps where the method reads any."""

    judged_before: bool = False

    def __init__(self, experiment: Experiment, runtime: Runtime):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.method_class = experiment.stages[-1], load_method(experiment.slug)
        self.kind = self.method_class.loop
        self.envs: Any
        if self.kind == "evolve":
            limit = experiment.evaluation.step_limit
            self.envs = EpisodeRunner(experiment.task, experiment.seed, limit)
        else:
            self.envs = Environments(experiment.task, experiment.seed)
        self.spec = self.envs.spec
        try:
            self.data = None
            if self.stage.data is not None:
                self.data = load_dataset(self.stage.data, self.spec)
        except BaseException:
            self.envs.close()
            raise
        # A task that judges whole episodes carries nothing from one iteration to the next.
        self.inexact_because = self.envs.inexact_because() if self.kind == "online" else None
        self._evaluator: Evaluator | None = None

    def experience(self, method: Any) -> Any:
        return method.experience(*([] if self.method_class.data == "none" else [self.data]))

    def begin(self) -> torch.Tensor:
        if self.kind != "online":
            return torch.zeros(0)
        return torch.from_numpy(self.envs.reset(0)).to(self.runtime.device)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        limits = {"seed": self.experiment.seed, "steps": self.stage.steps}
        if self.kind == "offline":
            return offline(method, experience, state, **limits)
        if self.kind == "evolve":
            return evolve(method, self.envs, experience, state, **limits)
        return online(method, self.envs, experience, state, barrier_every=barrier_every, **limits)

    def evaluate(self, method: Any, step: int) -> Evaluation:
        experiment = self.experiment
        if self._evaluator is None:
            self._evaluator = Evaluator(experiment.task, experiment.evaluation, experiment.seed)
        return self._evaluator(method.policy)

    def pictures(self) -> dict[str, Any]:
        return {}

    def score(self, evaluation: Evaluation) -> float | None:
        return None if self.data is None else self.data.score(evaluation.mean)

    def describe(self) -> dict[str, Any]:
        return dict(vars(self.spec))

    def check(self, described: Mapping[str, Any]) -> None:
        pass

    def state_dict(self) -> State:
        if self.inexact_because is None and self.kind == "online":
            return self.envs.state_dict()
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        if self.kind != "online":
            return
        if self.inexact_because is None:
            self.envs.load_state_dict(state)
        else:
            self.envs.reset(step)

    def finish(self, method: Any, folder: Path) -> None:
        pass

    def close(self) -> None:
        self.envs.close()
        if self._evaluator is not None:
            self._evaluator.close()


SUBJECTS = {
    "control": "a controller",
    "language": "a language model",
    "diffusion": "a diffusion model",
    "sets": "populations",
    "robots": "a robot that sees",
}


def refuse_unless(world: str, experiment: Experiment, what: str) -> None:
    """Raise unless the experiment's method lives in this world.

    Raises:
        UserError: saying what is not possible with the other kind.
    """
    if load_method(experiment.slug).world != world:
        other = load_method(experiment.slug).world
        raise UserError(f"{experiment.slug} is about {SUBJECTS[other]}: {what}")
