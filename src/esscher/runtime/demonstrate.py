"""Data sets from scripted experts: images and states in LeRobot's layout, or states as a Minari set.

Every finished attempt is a file in a hidden folder beside the set's place. What an attempt becomes
follows from the seed and its number alone, so the same command goes on where it was stopped, and ends
with the very set that it would have made without the stop. The set appears under its name when it is
complete.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from esscher import __version__
from esscher.adapters.lerobot import Demonstration, Layout, encode_png, write_lerobot
from esscher.adapters.robots import RobotTask, robot_task
from esscher.errors import UserError, require
from esscher.runtime.collect import COLLECT, Episode, check_new, held, shown, to_disk, writing
from esscher.runtime.prove import _commit
from esscher.runtime.rng import mix
from esscher.runtime.stopping import stop_requests


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be collected."""

    tasks: tuple[str, ...]
    """Such as metaworld:reach-v3."""
    episodes: int = 50
    """Of each task."""
    images: tuple[int, int] | None = None
    """Rows and columns; None: states alone, and then those that hold the objects as well."""
    cameras: tuple[str, ...] = ()
    """Which; the task's own by default."""
    noise: float = 0.0
    """Standard deviation of what is added to the expert's actions before they are carried out, where
    the box is [-1, 1]. The set holds the expert's own actions: they show the way back."""
    seed: int = 1
    keep_failures: bool = False
    """Keep the episodes that did not solve the task."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """For every task."""

    def __post_init__(self) -> None:
        require("--episodes", self.episodes, self.episodes >= 1, ">= 1")
        require("--noise", self.noise, 0 <= self.noise <= 1, "in [0, 1]")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"a task is named twice: {', '.join(self.tasks)}")
        if self.images is None and self.cameras:
            raise UserError("--cameras are of images: add --images 64")
        if self.images is None and len(self.tasks) > 1:
            raise UserError("a set of states holds one task: name one, or add --images 64")


@dataclass(frozen=True)
class Demonstrated:
    """What was written."""

    name: str
    path: Path
    returns: list[float]
    lengths: list[int]
    solved: int
    """Episodes of the set that solved their task."""
    dropped: int
    """Attempts that did not, and are not in the set."""

    @property
    def steps(self) -> int:
        return sum(self.lengths)


def demonstrate(plan: Plan, out: str, *, display: bool = True) -> Demonstrated:
    """Let the tasks' experts act, and write what they did.

    Args:
        plan: what is to be collected.
        out: with images a folder that does not exist, else the name of a Minari set.
        display: show progress.

    Raises:
        UserError: no such task, a task without an expert, tasks of different sizes, images that cannot
            be drawn, a name that is taken, an expert that hardly ever succeeds, or a set that was begun
            with another plan.
        KeyboardInterrupt: stopped; what was finished is kept, and the same call goes on.
    """
    name = out.removeprefix("minari:") if plan.images is None else out
    if plan.images is None:
        target = check_new(name)
        root = target.parents[name.count("/")]
        work = root / ".esscher_collecting" / name.replace("/", "__")
    else:
        target = _check_folder(Path(out))
        work = target.parent / f".{target.name}.collecting"
    with ExitStack() as stack:
        tasks = [stack.enter_context(closing(_made(task, plan))) for task in plan.tasks]
        layout = _layout(tasks, plan)
        folder = stack.enter_context(held(work, out, keep=True))
        requested = stack.enter_context(stop_requests())
        _check_plan(plan, folder, out)
        tally, total = _Tally(), plan.episodes * len(tasks)
        title = f"collecting {out}"
        source = chain.from_iterable(
            _attempts(task, number, plan, folder, tally, requested)
            for number, task in enumerate(tasks)
        )
        for _ in shown(source, title, total, display, tally.told):
            pass
        about = _about(plan, tasks, tally)
        parts = sorted(folder.glob("*.npz"))
        if plan.images is None:
            _finish_minari(parts, layout, name, about)
        else:
            _finish_lerobot(parts, layout, folder / "set", target, about)
        shutil.rmtree(folder)
    return Demonstrated(name, target, tally.returns, tally.lengths, tally.solved, tally.dropped)


def _check_folder(target: Path) -> Path:
    if target.exists():
        raise UserError(f"{target} exists: choose another --out")
    return target.absolute()


def _made(name: str, plan: Plan) -> RobotTask:
    kwargs = dict(plan.kwargs)
    if plan.images is None and name.startswith("metaworld:"):
        kwargs.setdefault("full_state", True)
    return robot_task(name, cameras=plan.cameras, size=plan.images, kwargs=kwargs)


def _layout(tasks: Sequence[RobotTask], plan: Plan) -> Layout:
    """What the tasks share; an image and an expert's action are tried before work starts."""
    shared = ("state_dim", "action_low", "action_high", "cameras", "image_size")
    first = tasks[0]
    for task in tasks:
        for what in shared:
            here, there = getattr(task, what), getattr(first, what)
            if here != there:
                raise UserError(
                    f"{task.name} and {first.name} do not fit in one set: {what} is {here} and {there}"
                )
        task.reset(0)
        task.expert()
        if plan.images is not None:
            task.images()
    instructions = tuple(task.instruction for task in tasks)
    if len(set(instructions)) < len(instructions):
        raise UserError(f"two tasks have one instruction: {', '.join(instructions)}")
    return Layout(
        cameras=first.cameras if plan.images is not None else (),
        image_size=first.image_size,
        state_dim=first.state_dim,
        action_low=first.action_low,
        action_high=first.action_high,
        instructions=instructions,
        tasks=plan.tasks,
        fps=int(getattr(first, "fps", 10)),
    )


def _check_plan(plan: Plan, folder: Path, out: str) -> None:
    """Note the plan, or compare it with the one that the folder was begun with."""
    path = folder / "plan.json"
    wanted = json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        _replace(path, json.dumps(wanted).encode())
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for key, value in wanted.items():
        if begun.get(key) != value:
            raise UserError(
                f"{out} was begun with {key} {begun.get(key)}, not {value}: go on with that, or remove "
                f"{folder} to begin anew"
            )


# ---- playing


@dataclass
class _Tally:
    """What has come of the attempts so far."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    solved: int = 0
    dropped: int = 0

    def told(self) -> str:
        return f", {self.solved:,} of {len(self.lengths) + self.dropped:,} attempts solved"


def _attempts(
    task: RobotTask,
    number: int,
    plan: Plan,
    folder: Path,
    tally: _Tally,
    requested: Sequence[int],
) -> Iterator[int]:
    """Play until enough episodes are kept; those that are there already are not played again."""
    kept = dropped = 0
    for attempt in count():
        path = folder / f"{number:03d}-{attempt:06d}.npz"
        failed = path.with_suffix(".failed")
        if not path.exists() and not failed.exists():
            part = _play(task, attempt, plan, requested)
            solved = bool(part["success"][-1]) or plan.keep_failures
            if solved and len(part["action"]) > 1:
                _write_part(path, part)
            else:
                failed.touch()
        if failed.exists():
            dropped, tally.dropped = dropped + 1, tally.dropped + 1
            if dropped > 4 * plan.episodes + 16:
                raise UserError(
                    f"the expert of {task.name} solved {kept} of {kept + dropped} attempts: lower "
                    "--noise, allow more steps, or --keep-failures"
                )
            continue
        with np.load(path) as part:
            tally.returns.append(float(part["reward"].sum(dtype=np.float64)))
            tally.lengths.append(len(part["action"]))
            tally.solved += int(part["success"][-1])
        kept += 1
        yield attempt
        if kept == plan.episodes:
            return


def _play(task: RobotTask, attempt: int, plan: Plan, requested: Sequence[int]) -> dict[str, Any]:
    """One attempt, which ends when the task is solved: arrays of t steps, and t + 1 states."""
    generator = np.random.default_rng(mix(plan.seed, COLLECT, attempt, 1))
    low, high = np.array(task.action_low), np.array(task.action_high)
    images: list[bytes] = []
    states, actions, outcomes = [], [], []
    task.reset(mix(plan.seed, COLLECT, attempt) % 2**31)
    states.append(task.state())
    while True:
        if requested:
            raise KeyboardInterrupt
        if plan.images is not None:
            images += [encode_png(image) for image in task.images()]
        action = np.clip(np.asarray(task.expert(), np.float32), low, high).astype(np.float32)
        noise = plan.noise * generator.standard_normal(len(low)) * (high - low) / 2
        outcome = task.step(np.clip(action + noise, low, high).astype(np.float32))
        actions.append(action)
        outcomes.append(outcome)
        states.append(task.state())
        if not (np.isfinite(action).all() and np.isfinite(states[-1]).all()):
            raise UserError(
                f"{task.name} has an action or a state that is not finite at step {len(actions)} of "
                f"attempt {attempt}"
            )
        if outcome.success or outcome.terminated or outcome.truncated:
            break
    return {
        "state": np.stack(states),
        "action": np.stack(actions),
        "reward": np.array([outcome.reward for outcome in outcomes]),
        "success": np.array([outcome.success for outcome in outcomes]),
        "terminated": np.array(outcomes[-1].terminated),
        "png": np.frombuffer(b"".join(images), np.uint8),
        "png_length": np.array([len(image) for image in images], np.int64),
    }


def _write_part(path: Path, part: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **part)
    _replace(path, buffer.getvalue())


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    beside = path.with_suffix(".partial")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# ---- writing the set


def _about(plan: Plan, tasks: Sequence[RobotTask], tally: _Tally) -> dict[str, Any]:
    packages = {package for task in tasks for package in getattr(task, "packages", ())}
    return {
        "version": __version__,
        "code": _commit(),
        **getattr(tasks[0], "provenance", {}),
        "packages": {package: version(package) for package in sorted(packages)},
        "expert": "scripted, of the task",
        "noise": plan.noise,
        "seed": plan.seed,
        "kwargs": plan.kwargs,
        "kept": "all attempts" if plan.keep_failures else "attempts that solved the task",
        "dropped": tally.dropped,
    }


def _demonstrations(parts: Sequence[Path], cameras: int) -> Iterator[Demonstration]:
    for path in parts:
        with np.load(path) as part:
            bounds = np.concatenate([[0], np.cumsum(part["png_length"])])
            whole = part["png"].tobytes()
            images = [whole[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
            length = len(part["action"])
            yield Demonstration(
                png=[images[k * cameras : (k + 1) * cameras] for k in range(length)],
                state=part["state"][:-1],
                action=part["action"],
                reward=part["reward"].astype(np.float32),
                success=part["success"],
                task=int(path.name[:3]),
            )


def _finish_lerobot(
    parts: Sequence[Path], layout: Layout, folder: Path, target: Path, about: dict[str, Any]
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # Of a process that was killed.
    folder.mkdir()
    write_lerobot(folder, _demonstrations(parts, len(layout.cameras)), layout, about)
    to_disk(folder)
    _check_folder(target)
    os.replace(folder, target)
    to_disk(target.parent, deep=False)


@dataclass(frozen=True)
class _Spaces:
    observation_space: spaces.Box
    action_space: spaces.Box


def _finish_minari(parts: Sequence[Path], layout: Layout, name: str, about: dict[str, Any]) -> None:
    low, high = (np.array(x, np.float32) for x in (layout.action_low, layout.action_high))
    task = _Spaces(
        spaces.Box(-np.inf, np.inf, (layout.state_dim,), np.float32), spaces.Box(low, high)
    )
    metadata = {
        "algorithm_name": "scripted expert",
        "description": f"{len(parts)} episodes of {layout.tasks[0]} ({layout.instructions[0]}) by "
        "esscher data collect.",
        "esscher": {"task": layout.tasks[0], **about},
    }
    with writing(name, task, None, metadata) as writer:
        for path in parts:
            writer.add(_episode(path))


def _episode(path: Path) -> Episode:
    with np.load(path) as part:
        length = len(part["action"])
        ends: NDArray[np.bool_] = np.arange(length) == length - 1
        terminated = ends & bool(part["terminated"])
        # A task that is solved could go on, and be rewarded: only the recording ends.
        return Episode(
            observations=part["state"],
            actions=part["action"],
            rewards=part["reward"].astype(np.float64),
            terminations=terminated,
            truncations=ends & ~terminated,
        )
