"""The runner: the only place with side effects. Files, evaluation, checkpoints, early stop."""

import fcntl
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from esscher import __version__
from esscher.errors import UserError, disk_full
from esscher.experiment import Experiment
from esscher.files import read_json, readable
from esscher.loops.online import LoopState, Progress, crossed
from esscher.nn.sharding import whole_on_cpu
from esscher.registry import load_method
from esscher.runtime import checkpoint as checkpoints
from esscher.runtime.checkpoint import write_atomically
from esscher.runtime.device import (
    Runtime,
    join_processes,
    process_rank,
    sharding_asked,
    sum_over_processes,
)
from esscher.runtime.display import Display
from esscher.runtime.evaluate import Evaluation
from esscher.runtime.launch import refuse_unstarted
from esscher.runtime.metrics import Averager, MetricsLog
from esscher.runtime.rng import Phase, seed_phase
from esscher.runtime.state import State, under
from esscher.runtime.stopping import stop_requests
from esscher.runtime.trackers import Ended, check_trackers
from esscher.runtime.worlds import world_of


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    directory: Path
    slug: str
    steps: int
    updates: int
    seconds: float
    """Training and evaluation, over all sittings of a resumed run."""
    evaluation: Evaluation


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""


def run(
    experiment: Experiment, *, directory: str | Path | None = None, display: bool = True
) -> Result:
    """Train, evaluate and save.

    Args:
        experiment: what to do.
        directory: the run folder, which must not exist yet; by default a fresh one under runs/.
        display: show progress.

    Raises:
        UserError: bad input, found before training starts, or a reward that is not finite.
        Interrupted: on Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    _join(experiment)
    chosen = fresh_folder(experiment) if directory is None else Path(directory)
    with _own_folder(chosen) as run_folder, _full_disk_explained(run_folder):
        experiment = _ready(experiment, run_folder)
        # Every complaint about the input comes before anything is written.
        with closing(_Parts(experiment)) as parts:
            _write_config(experiment, run_folder)
            with _locked(run_folder), stop_requests() as requested:
                return _Run(run_folder, experiment, parts, None, display).train(requested)


def resume(directory: str | Path, *, step: int | None = None, display: bool = True) -> Result:
    """Continue a run exactly where its newest checkpoint (or that of `step`) left it.

    A run that was killed before its first checkpoint starts again from its beginning, which is the
    same thing. A finished run is returned as it is.

    Raises:
        UserError: not a run folder, a damaged checkpoint, or one of another version.
    """
    shared = Path(directory)
    experiment = read_experiment(shared)  # Whatever is wrong with the folder is said first.
    result = read_result(shared)
    if result is not None and step is None:
        return result
    _join(experiment)
    fresh = step is None and not checkpoints.steps(shared)
    checkpoint = None if fresh else checkpoints.load(shared, step)
    with (
        _own_folder(shared) as run_folder,
        _full_disk_explained(run_folder),
        _locked(run_folder),
        stop_requests() as requested,
        closing(_Parts(experiment)) as parts,
    ):
        return _Run(run_folder, experiment, parts, checkpoint, display).train(requested)


def write_config(experiment: Experiment, run_folder: Path, *, tried: bool = False) -> None:
    """Create a run folder with its config.json, every automatic choice resolved.

    Args:
        experiment: what is to run.
        run_folder: made.
        tried: the same with another seed was built before, so that there is nothing to complain about.

    Raises:
        UserError: the folder exists and is not empty, or the experiment cannot run here.
    """
    experiment = _ready(experiment, run_folder)
    if not tried:
        _Parts(experiment).close()
    _write_config(experiment, run_folder)


def _ready(experiment: Experiment, run_folder: Path) -> Experiment:
    """With every automatic choice resolved, if it may begin in this folder."""
    check_unused(run_folder)
    check_trackers(experiment.log.to)
    refuse_unstarted(experiment)
    return experiment.resolved()


def _write_config(experiment: Experiment, run_folder: Path) -> None:
    check_unused(run_folder)  # Another may have begun there while the parts were built.
    run_folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run_folder / "config.json", json.dumps(experiment.to_json(), indent=2))


def check_unused(run_folder: Path) -> None:
    """Raise where a run cannot begin in a folder.

    Raises:
        UserError: it exists and is not empty.
    """
    if run_folder.exists() and any(run_folder.iterdir()):
        known = (run_folder / "config.json").exists()
        remedy = f"esscher resume {run_folder} goes on with it" if known else "it is not a run"
        raise UserError(f"{run_folder} exists: {remedy}; or choose another --directory")


def read_experiment(run_folder: Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
        UserError: no run there, or its config.json cannot be read.
    """
    path = run_folder / "config.json"
    if not path.exists():
        raise UserError(f"{run_folder} is not a run folder: it has no config.json")
    data = read_json(path, ": the folder cannot be used")
    version = str(data.get("esscher_version"))
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise UserError(
            f"{run_folder} comes from esscher {version} and this is {__version__}: install that "
            "version to go on with it"
        )
    return Experiment.from_json(data)


def read_result(run_folder: Path) -> Result | None:
    """The result of a finished run, or None."""
    path = run_folder / "result.json"
    if not path.exists():
        return None
    again = f": remove it, and esscher resume {run_folder} writes it anew"
    data = read_json(path, again)
    with readable(f"{path} is no result of a run", again):
        measure = data.get("measure", "return")
        evaluation = Evaluation(data["returns"], data["lengths"], measure)
        return Result(
            run_folder, data["slug"], data["steps"], data["updates"], data["seconds"], evaluation
        )


def fresh_folder(experiment: Experiment) -> Path:
    """runs/ENVIRONMENT/NAME_seedK, with a number behind it if that is taken."""
    task = experiment.subject.replace("/", "_").replace(":", "_")
    stem = Path("runs") / task / f"{experiment.name}_seed{experiment.seed}"
    folder, count = stem, 1
    while folder.exists():
        count += 1
        folder = stem.with_name(f"{stem.name}_{count}")
    return folder


class _Parts:
    """A run's moving parts, built from its configuration alone."""

    def __init__(self, experiment: Experiment):
        torch.set_num_threads(experiment.runtime.threads)
        self.runtime = Runtime(experiment.runtime)
        self.world = world_of(experiment, self.runtime)
        try:
            seed_phase(experiment.seed, 0, Phase.INITIALISE)
            method_class = load_method(experiment.slug)
            self.method = method_class(experiment.method, self.world.spec, self.runtime)
            self.experience = self.world.experience(self.method)
            self.loop = LoopState(self.world.begin())
        except BaseException:
            self.world.close()
            raise
        self.averager = Averager()
        self.inexact_because = self.world.inexact_because

    def state_dict(self) -> State:
        parts = {"method": self.method, "experience": self.experience, "loop": self.loop}
        parts["envs"] = self.world
        return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        self.method.load_state_dict(under("method", state))
        self.experience.load_state_dict(under("experience", state))
        self.loop.load_state_dict(under("loop", state))
        self.world.load_state_dict(under("envs", state), self.loop.step)

    def close(self) -> None:
        self.world.close()


class _Run:
    """One sitting of a run."""

    def __init__(
        self,
        folder: Path,
        experiment: Experiment,
        parts: _Parts,
        checkpoint: checkpoints.Checkpoint | None,
        display: bool,
    ):
        self.folder, self.experiment, self.parts = folder, experiment, parts
        self.stage = experiment.stages[-1]
        barrier = experiment.checkpoint.barrier or parts.inexact_because is not None
        self.barrier_every = experiment.checkpoint.every if barrier else 0
        self.seconds_before, offset = 0.0, 0
        if checkpoint is not None:
            parts.world.check(checkpoint.meta["spec"])
            parts.load_state_dict(checkpoint.state)
            if hasattr(parts.experience, "put_rows"):
                checkpoints.load_rows(folder, checkpoint, parts.experience)
            meta = checkpoint.meta
            parts.averager.load_state_dict(meta["averager"], parts.runtime.device)
            self.seconds_before, offset = meta["seconds"], meta["metrics_offset"]
            if meta["evaluation"] is not None:
                self.last_evaluation = (checkpoint.step, Evaluation(**meta["evaluation"]))
            (folder / "result.json").unlink(missing_ok=True)
            checkpoints.discard_after(folder, checkpoint.step)
        first = parts.runtime.rank == 0
        self.log = MetricsLog(
            folder,
            experiment.log.to if first else (),
            f"{experiment.name}_seed{experiment.seed}",
            experiment.to_json(),
            offset,
            parts.loop.step,
        )
        title = f"{experiment.name} on {experiment.subject}"
        self.display = None
        if display and first:
            self.display = Display(title, self.stage.steps, parts.loop.step)
        if self.display and parts.inexact_because:
            self.display.note(f"resume: {self._exact_because()}")
        self.began = time.monotonic()

    def train(self, requested: list[int]) -> Result:
        experiment, parts = self.experiment, self.parts
        step = parts.loop.step
        ended: Ended = "failed"
        try:
            if step == 0 and parts.world.judged_before and experiment.evaluation.every > 0:
                self._evaluate()
            for progress in self._iterations():
                self._agree(requested)
                parts.averager.add(progress.metrics, progress.episodes)
                advance, step = progress.step - step, progress.step
                if crossed(step, advance, experiment.log.every):
                    self._log_training()
                if crossed(step, advance, experiment.evaluation.every):
                    self._evaluate()
                due = crossed(step, advance, experiment.checkpoint.every)
                if due or (requested and self.barrier_every == 0):
                    self._save()
                if requested:
                    raise Interrupted(self._farewell(step))
                if self.display and step % 64 < advance:
                    self.display.update(step)
            result = self._finish()
            ended = "finished"
            return result
        except (Interrupted, KeyboardInterrupt):
            ended = "interrupted"
            raise
        finally:
            self.log.close(ended)
            if self.display:
                self.display.close()

    def _agree(self, requested: list[int]) -> None:
        """Several processes stop together, or one would wait for the other for ever."""
        if self.parts.runtime.world == 1:
            return
        asked = torch.tensor([float(bool(requested))], device=self.parts.runtime.device)
        sum_over_processes([asked])
        if asked.item() and not requested:
            requested.append(0)

    def _iterations(self) -> Iterator[Progress]:
        parts = self.parts
        return parts.world.iterations(
            parts.method, parts.experience, parts.loop, self.barrier_every
        )

    def _farewell(self, step: int) -> str:
        saved = checkpoints.steps(self.folder)
        place = f"from step {saved[-1]:,}" if saved else "from the start"
        return f"stopped at step {step:,}; esscher resume {self.folder} goes on {place}"

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _log_training(self) -> None:
        loop, row = self.parts.loop, self.parts.averager.drain()
        for name, value in row.items():
            if value != value or abs(value) == float("inf"):
                raise UserError(
                    f"{name} became {value} at step {loop.step}: training has diverged. Lower the "
                    f"learning rate, or look at the last rows of {self.folder}/metrics.jsonl"
                )
        seconds = self.seconds
        rate = loop.step / seconds if seconds else 0.0
        counters = {"phase": "train", "step": loop.step, "updates": loop.num_updates}
        self.log.append({**counters, "seconds": seconds, "steps_per_second": rate, **row})
        headline = self.parts.method.headline
        if self.display and headline in row:
            self.display.update(loop.step, f"{headline.replace('_', ' ')} {row[headline]:,.1f}")

    def _evaluate(self) -> Evaluation:
        parts, step = self.parts, self.parts.loop.step
        evaluation = parts.world.evaluate(parts.method, step)
        counters = {"phase": "evaluate", "step": step, "seconds": self.seconds}
        score = parts.world.score(evaluation)
        scored = {} if score is None else {"score": score}
        self.log.append({**counters, **evaluation.to_json(), **scored})
        if evaluation.samples:
            self._keep_samples(step, evaluation.samples)
        self._keep_pictures(step)
        if self.display:
            self.display.update(step, f"evaluated {evaluation.measure} {evaluation.told}")
        self.last_evaluation = (step, evaluation)
        return evaluation

    def _keep_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """One file an evaluation, written whole: what a resumed run writes again is replaced."""
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"step_{step:09d}.json", json.dumps(samples, indent=1))

    def _keep_pictures(self, step: int) -> None:
        for name, figure in self.parts.world.pictures().items():
            from esscher.report.plots import write_png

            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            write_png(figure, folder / f"step_{step:09d}.png")

    def _save(self) -> None:
        parts = self.parts
        self.log.sync()
        exact = parts.inexact_because is None or self.barrier_every > 0
        step, evaluation = getattr(self, "last_evaluation", (None, None))
        meta = {
            "exact": exact,
            "exact_because": self._exact_because(),
            "seconds": self.seconds,
            "metrics_offset": self.log.offset,
            "averager": parts.averager.state_dict(),
            "evaluation": vars(evaluation) if evaluation and step == parts.loop.step else None,
            "spec": parts.world.describe(),
        }
        rows = parts.experience if hasattr(parts.experience, "put_rows") else None
        keep, first = self.experiment.checkpoint.keep, parts.runtime.rank == 0
        state = whole_on_cpu(parts.state_dict(), keep=first)  # All processes give their parts.
        if first:
            checkpoints.save(self.folder, parts.loop.step, state, meta, rows, keep)

    def _exact_because(self) -> str:
        reason = self.parts.inexact_because
        if reason is None:
            return "every part of the state is saved"
        if self.barrier_every:
            return f"environments are reset at each checkpoint, because {reason}"
        return f"not exact, because {reason} and no checkpoints are taken on the way"

    def _finish(self) -> Result:
        loop = self.parts.loop
        step, evaluation = getattr(self, "last_evaluation", (None, None))
        if step != loop.step or evaluation is None:
            evaluation = self._evaluate()
        self._save()
        self._draw()
        self.parts.world.finish(self.parts.method, self.folder)
        result = {
            "status": "finished",
            "slug": self.experiment.slug,
            "env": self.experiment.subject,
            "seed": self.experiment.seed,
            "steps": loop.step,
            "updates": loop.num_updates,
            "seconds": self.seconds,
            **evaluation.to_json(),
            "lengths": evaluation.lengths,
            "processes": self.parts.runtime.world,
            "esscher_version": __version__,
            "machine": checkpoints.machine(),
        }
        write_atomically(self.folder / "result.json", json.dumps(result, indent=2))
        finished = read_result(self.folder)
        assert finished is not None
        return finished

    def _draw(self) -> None:
        """Save the pictures that a method draws of itself, if it draws any."""
        draw = getattr(self.parts.method, "figures", None)
        if draw is None:
            return
        from esscher.report.plots import write_png

        pictures = self.folder / "figures"
        pictures.mkdir(exist_ok=True)
        for name, figure in draw().items():
            write_png(figure, pictures / f"{name}.png")


def _join(experiment: Experiment) -> None:
    """Join other processes, where there are any.

    Raises:
        UserError: the method cannot share its work.
    """
    refuse_unstarted(experiment)
    join_processes(experiment.runtime.device)
    world = process_rank()[1]
    if world > 1 and not load_method(experiment.slug).shares:
        raise UserError(
            f"{experiment.slug} trains in one process, and {world} were started: use esscher sweep "
            "for many runs at once"
        )
    if world > 1 and sharding_asked() is not None and not load_method(experiment.slug).shards:
        raise UserError(
            f"{experiment.slug} needs whole weights in every process, and these were started to shard "
            "them (FSDP): start them with distributed_type MULTI_GPU or MULTI_CPU"
        )


@contextmanager
def _own_folder(run_folder: Path) -> Iterator[Path]:
    """The first process writes the run folder; what the others write is thrown away."""
    if process_rank()[0] == 0:
        yield run_folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        own = Path(temporary) / "run"
        if (run_folder / "checkpoints").exists():
            own.mkdir()
            for name in ("config.json", "metrics.jsonl"):
                if (run_folder / name).exists():
                    shutil.copy(run_folder / name, own / name)
        yield own


@contextmanager
def _full_disk_explained(run_folder: Path) -> Iterator[None]:
    """Say in one sentence that nothing more can be written, wherever in a run that shows."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        saved = checkpoints.steps(run_folder)
        place = f"from its checkpoint of step {saved[-1]:,}" if saved else "from the start"
        raise UserError(
            f"no space left to write under {run_folder}: free some, then esscher resume {run_folder} "
            f"goes on {place}"
        ) from error


@contextmanager
def _locked(run_folder: Path) -> Iterator[TextIO]:
    """Hold a run folder, so that two processes never write one run."""
    with open(run_folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_folder} is in use by another process") from None
        yield file
