"""The world of robots that see: demonstrations with images, a vision-language model, tasks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esscher.adapters.lerobot import read_scenes
from esscher.adapters.pretrained import digest_of
from esscher.adapters.robots import RobotTask, robot_task
from esscher.adapters.vision_language import (
    instruction_tokens,
    load_vision_language,
    save_vision_language,
)
from esscher.distributions.policies import device_of
from esscher.distributions.vision_language import VisionSpec
from esscher.errors import UserError
from esscher.experience.scenes import SceneData, SceneWindows
from esscher.experiment import EvaluationConfig, Experiment
from esscher.loops.offline import offline
from esscher.loops.online import LoopState, Progress
from esscher.runtime.checkpoint import require_unchanged
from esscher.runtime.device import Runtime
from esscher.runtime.evaluate import Evaluation, wilson
from esscher.runtime.rng import Phase, mix, numpy_generator, seed_phase
from esscher.runtime.state import State
from esscher.types import RobotSpec, Scenes

COPIES = 16
"""Most copies of a task played side by side, so that the model looks for all of them at once."""
JUDGED = 256
"""Most windows whose actions are compared with the demonstrator's."""
FILMED = 8
"""Most pictures of an episode in a strip of film."""


@dataclass
class Strip:
    """Some of what one episode looked like."""

    task: str
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    """Of the first camera, h w 3."""
    steps: list[int] = field(default_factory=list)
    """When each of them was seen."""
    success: bool = False
    length: int = 0


class RobotWorld:
    """Demonstrations, some of them held out, and the tasks that they are about.

    Args:
        experiment: its last stage is used.
        runtime: where to compute.
        known: of a run that is only opened: no data are read.
    """

    inexact_because: str | None = None
    judged_before: bool = False

    def __init__(self, experiment: Experiment, runtime: Runtime, *, known: RobotSpec | None = None):
        self.experiment, self.runtime = experiment, runtime
        self.stage, self.kind = experiment.stages[-1], "offline"
        self.data: tuple[SceneData, SceneData] | None = None
        self.data_digest = ""
        if known is None:
            assert self.stage.data is not None
            every = read_scenes(self.stage.data, cameras=self.stage.robot.cameras)
            self.data_digest = every.digest()
            self.data = _divided(every, self.stage.robot.held_out_share, experiment.seed)
            known = every.spec
        seed_phase(experiment.seed, 0, Phase.INITIALISE)  # For models that are made, not read.
        model, tokenizer = load_vision_language(self.stage.model, runtime.device)
        self.digest = digest_of(model)
        self.spec = VisionSpec(
            robot=known,
            model=model,
            tokenizer=tokenizer,
            instruction=instruction_tokens(tokenizer, known.instructions, model.context_length),
        )
        names = self.stage.robot.tasks or tuple(name for name in known.tasks if name)
        self._tasks = {
            name: TaskJudge(name, self.stage.robot.task_kwargs, known)
            for name in dict.fromkeys(names)
        }
        self._strips: list[Strip] = []

    def experience(self, method: Any) -> SceneWindows:
        assert self.data is not None
        return method.experience(self.data[0])

    def begin(self) -> Tensor:
        return torch.zeros(0)

    def iterations(
        self, method: Any, experience: Any, state: LoopState, barrier_every: int
    ) -> Iterator[Progress]:
        return offline(method, experience, state, seed=self.experiment.seed, steps=self.stage.steps)

    @torch.no_grad()
    def evaluate(self, method: Any, step: int) -> Evaluation:
        """Play whole episodes of every task, and compare actions with those of demonstrations that were
        held out. How often a task was solved comes with Wilson's interval of 95 %.
        """
        config, seed, policy = self.experiment.evaluation, self.experiment.seed, method.policy
        policy.eval()
        seed_phase(seed, 0, Phase.EVALUATE)
        extras: dict[str, float] = {}
        if self.data is not None:
            extras["action_error"] = self._action_error(method)
        solved: list[float] = []
        lengths: list[int] = []
        self._strips, seconds, looks = [], 0.0, 0
        for number, (name, judge) in enumerate(self._tasks.items()):
            seeds = [mix(seed, number, Phase.EVALUATE, k) % 2**31 for k in range(config.episodes)]
            played = judge(policy, self.spec, seeds, config)
            solved += [float(won) for won in played.success]
            lengths += played.lengths
            seconds, looks = seconds + played.seconds, looks + played.looks
            low, high = wilson(sum(played.success), len(seeds))
            extras |= {
                f"success of {name}": sum(played.success) / len(seeds),
                f"success of {name}, low": low,
                f"success of {name}, high": high,
            }
            self._strips.append(played.strip)
        if not solved:
            return Evaluation([-extras["action_error"]], [1], "negative action error", extras)
        milliseconds = 1000 * seconds / max(looks, 1)
        return Evaluation(solved, lengths, "success rate", extras, milliseconds=milliseconds)

    def pictures(self) -> dict[str, Any]:
        """A strip of film of the first episode in every task."""
        from esscher.report.pictures import film_figure

        if not self._strips:
            return {}
        rows = [
            (
                f"{strip.task}: {'solved' if strip.success else 'not solved'} after {strip.length} "
                "steps",
                strip.frames,
                strip.steps,
            )
            for strip in self._strips
        ]
        return {"samples": film_figure(rows)}

    def score(self, evaluation: Evaluation) -> float | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            **asdict(self.spec.robot),
            "model": self.stage.model.source,
            "model_digest": self.digest,
            "digest": self.data_digest,
        }

    def check(self, described: Mapping[str, Any]) -> None:
        """Raise unless model and data are still those that a run began with.

        Raises:
            UserError: they have changed.
        """
        what = f"the model {self.stage.model.source}"
        require_unchanged(what, "has other weights", described["model_digest"], self.digest)
        if self.data is not None:
            then, now = described["digest"], self.data_digest
            require_unchanged(str(self.stage.data), "holds other demonstrations", then, now)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State, step: int) -> None:
        assert not state

    def finish(self, method: Any, folder: Path) -> None:
        save_vision_language(self.spec.model, self.spec.tokenizer, folder / "model")

    def close(self) -> None:
        for judge in self._tasks.values():
            judge.close()

    def _action_error(self, method: Any) -> float:
        """Mean absolute difference of all actions that are executed of a chunk, in [-1, 1]."""
        assert self.data is not None
        policy, held_out = method.policy, self.data[1]
        count = min(JUDGED, len(held_out))
        windows = SceneWindows(
            held_out,
            method.cfg.horizon,
            count,
            self.spec.instruction,
            device=self.runtime.device,
        )
        rows = torch.linspace(0, len(held_out) - 1, count).long()
        difference, number = 0.0, 0
        for part in rows.split(COPIES):
            batch = windows.at(part)
            error = (policy.chunk(batch.scenes) - batch.action).abs().mean(-1)
            counts = batch.mask[:, : policy.executed]
            difference += float((error[:, : policy.executed] * counts).sum())
            number += int(counts.sum())
        return difference / number


@dataclass
class Played:
    """Episodes of one task."""

    success: list[bool]
    lengths: list[int]
    strip: Strip
    seconds: float = 0.0
    """That the policy took, for all chunks together."""
    looks: int = 0
    """How often it was asked, for up to COPIES episodes at once."""


class TaskJudge:
    """Copies of one task, in which episodes are played side by side.

    Args:
        name: such as metaworld:reach-v3.
        kwargs: passed to the task.
        spec: what the policy sees; the task must show the same.
    """

    def __init__(self, name: str, kwargs: Mapping[str, Any], spec: RobotSpec):
        self.name, self._kwargs, self._spec = name, kwargs, spec
        self._copies: list[RobotTask] = []

    def __call__(
        self, policy: Any, spec: VisionSpec, seeds: Sequence[int], config: EvaluationConfig
    ) -> Played:
        """An episode from each of these seeds; it ends where the task is solved."""
        played = Played([], [], Strip(self.name))
        for first in range(0, len(seeds), COPIES):
            self._play(policy, spec, seeds[first : first + COPIES], config.step_limit, played)
        return played

    def close(self) -> None:
        for copy in self._copies:
            copy.close()

    def _play(
        self, policy: Any, spec: VisionSpec, seeds: Sequence[int], limit: int, played: Played
    ) -> None:
        while len(self._copies) < len(seeds):
            self._copies.append(self._made())
        copies = self._copies[: len(seeds)]
        for copy, seed in zip(copies, seeds, strict=True):
            copy.reset(seed)
        instruction = instruction_tokens(
            spec.tokenizer, (copies[0].instruction,), spec.model.context_length
        )
        success, length = [False] * len(copies), [0] * len(copies)
        running, filming, chunk = list(range(len(copies))), not played.success, np.zeros(0)
        for time_step in range(min(limit, copies[0].max_steps)):
            row = time_step % policy.executed
            if row == 0:
                scenes = seen([copies[k] for k in running], instruction, device_of(policy))
                if filming and running[0] == 0:
                    played.strip.frames.append(scenes.images[0, 0].cpu().numpy())
                    played.strip.steps.append(time_step)
                began = time.perf_counter()
                drawn = policy.chunk(scenes)
                chunk = np.zeros((len(copies), *drawn.shape[1:]))
                chunk[running] = drawn.cpu().numpy()
                played.seconds += time.perf_counter() - began
                played.looks += 1
            for k in list(running):
                outcome = copies[k].step(spec.robot.native(chunk[k, row]))
                length[k], success[k] = time_step + 1, outcome.success
                if outcome.success or outcome.terminated or outcome.truncated:
                    running.remove(k)
                    if filming and k == 0:
                        played.strip.frames.append(copies[k].images()[0])
                        played.strip.steps.append(time_step + 1)
            if not running:
                break
        if filming:
            played.strip.success, played.strip.length = success[0], length[0]
            kept = np.linspace(0, len(played.strip.frames) - 1, FILMED).round().astype(int)
            kept = np.unique(kept)
            played.strip.frames = [played.strip.frames[k] for k in kept]
            played.strip.steps = [played.strip.steps[k] for k in kept]
        played.success += success
        played.lengths += length

    def _made(self) -> RobotTask:
        spec = self._spec
        task = robot_task(
            self.name, cameras=spec.cameras, size=spec.image_size, kwargs=dict(self._kwargs)
        )
        theirs = {
            "cameras": (task.cameras, spec.cameras),
            "images of": (task.image_size, spec.image_size),
            "state numbers": (task.state_dim, spec.state_dim),
            "action box": (
                (task.action_low, task.action_high),
                (spec.action_low, spec.action_high),
            ),
        }
        for what, (has, wanted) in theirs.items():
            if has != wanted:
                task.close()
                raise UserError(
                    f"{self.name} has {what} {has}, and the demonstrations have {wanted}: set "
                    "--robot.task-kwargs, or name another task with --robot.tasks"
                )
        return task


def seen(
    copies: Sequence[RobotTask], instruction: tuple[Tensor, Tensor], device: torch.device
) -> Scenes:
    """What these copies of one task show now, all with the one instruction."""
    tokens, mask = (part.expand(len(copies), -1) for part in instruction)
    return Scenes(
        images=torch.from_numpy(np.stack([copy.images() for copy in copies])),
        state=torch.from_numpy(np.stack([copy.state() for copy in copies])),
        instruction=tokens,
        instruction_mask=mask,
    ).to(device)


def spec_of(described: Mapping[str, Any]) -> RobotSpec:
    """The specification that a checkpoint describes."""
    names = {field.name for field in fields(RobotSpec)}
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in described.items()
        if name in names
    }
    return RobotSpec(**known)


def _divided(data: SceneData, share: float, seed: int) -> tuple[SceneData, SceneData]:
    """Episodes to learn from, and to judge by: of each instruction its share, but never all."""
    generator = numpy_generator(seed, 0, Phase.ORDER, rank=3)
    held_out: list[int] = []
    for task in range(len(data.spec.instructions)):
        own = generator.permutation((data.task == task).nonzero().squeeze(1).numpy())
        held_out += own[: min(round(share * len(own)), max(len(own) - 1, 0))].tolist()
    if not held_out:
        return data, data
    left = sorted(set(range(data.num_episodes)) - set(held_out))
    return data.of_episodes(left), data.of_episodes(sorted(held_out))
