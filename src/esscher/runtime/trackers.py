"""Trackers of experiments: TensorBoard, Weights & Biases, MLflow, Trackio.

Each is told the settings of a run, its scalars and how it ended. A resumed run goes on in the tracker
run that it began: `trackers.json` in the run folder names it. What a killed run had sent after its last
checkpoint is not sent a second time; since a resumed run repeats it exactly, nothing is missing.
"""

import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from esscher.errors import UserError
from esscher.report.settings import flat
from esscher.runtime.checkpoint import write_atomically

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
PROJECT = "esscher"
"""Under which trackers file runs, unless their own environment variables say otherwise."""
MOST_PARAMETERS = 100
"""In one request to MLflow."""
LONGEST_PARAMETER = 500
"""Characters that every store of MLflow takes."""

Ended = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """What a tracker is told of a run at its beginning."""

    run: Path
    name: str
    config: dict[str, Any]
    step: int
    """Of the checkpoint that the run goes on from; 0 at its beginning."""


class Tracker(Protocol):
    """One sitting of a run in a tracker."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Take scalars, named phase/name."""
        ...

    def close(self, ended: Ended) -> None:
        """Send what is waiting, and say how the run ended."""
        ...


def check_trackers(to: tuple[str, ...]) -> None:
    """Raise if a tracker that was asked for is not installed."""
    for tracker in to:
        if importlib.util.find_spec(PACKAGES[tracker]) is None:
            raise UserError(f"--log.to {tracker}: not installed (pip install {PACKAGES[tracker]})")


def begin(to: tuple[str, ...], tracked: Tracked) -> list[Tracker]:
    """Begin, or go on with, a run in each tracker.

    Raises:
        UserError: one of them refuses; those before it are told that the run failed.
    """
    begun: list[Tracker] = []
    for name in to:
        try:
            begun.append(_TRACKERS[name](tracked))
        except Exception as error:
            for tracker in begun:
                tracker.close("failed")
            if isinstance(error, UserError | OSError):
                raise
            raise UserError(f"--log.to {name}: it cannot begin a run ({error})") from error
    return begun


class _TensorBoard:
    """Readers of event files leave out what was written from `purge_step` on."""

    def __init__(self, tracked: Tracked):
        from torch.utils.tensorboard import SummaryWriter

        folder, kept = tracked.run / "tensorboard", tracked.step + 1 if tracked.step else 0
        # Files are read in the order of their names, which begin with the second that they are from.
        while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._writer = SummaryWriter(str(folder), purge_step=kept)

    def log(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ended: Ended) -> None:
        self._writer.close()


class _Wandb:
    """It drops by itself what comes again at a step that it has passed."""

    def __init__(self, tracked: Tracked):
        import wandb  # pyright: ignore[reportMissingImports]

        identity = _identity(tracked.run, "wandb") or _remember(tracked.run, "wandb", _new(tracked))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracked.name,
            config=tracked.config,
            dir=str(tracked.run),
            id=identity,
            resume="allow",
        )

    def log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log(scalars, step=step)

    def close(self, ended: Ended) -> None:
        self._run.finish(exit_code={"finished": 0, "interrupted": 130, "failed": 1}[ended])


class _MLflow:
    """Through its client, so that a run that the caller has open in this process is left alone."""

    STATUS: Mapping[Ended, str] = {
        "finished": "FINISHED",
        "interrupted": "KILLED",
        "failed": "FAILED",
    }

    def __init__(self, tracked: Tracked):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._client, self._metric = MlflowClient(), Metric
        known = _identity(tracked.run, "mlflow")
        if known is None:
            run = self._client.create_run(self._experiment(), run_name=tracked.name)
            self._id = _remember(tracked.run, "mlflow", run.info.run_id)
        else:
            self._id = known
            run = self._known_run(tracked.run)
            self._client.update_run(known, status="RUNNING")
        history = self._client.get_metric_history
        self._sent = {name: {p.step for p in history(self._id, name)} for name in run.data.metrics}
        parameters = [
            Param(name, value[:LONGEST_PARAMETER]) for name, value in flat(tracked.config).items()
        ]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[start : start + MOST_PARAMETERS])

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def _known_run(self, folder: Path) -> Any:
        from mlflow import get_tracking_uri  # pyright: ignore[reportMissingImports]
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        try:
            return self._client.get_run(self._id)
        except MlflowException as error:
            raise UserError(
                f"--log.to mlflow: {folder} began as run {self._id}, which the store "
                f"{get_tracking_uri()} does not have: set MLFLOW_TRACKING_URI to the store that does, "
                f"or remove mlflow from {folder / IDENTITIES} to begin a new run"
            ) from error

    def log(self, scalars: dict[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        new = [
            self._metric(name, value, now, step)
            for name, value in scalars.items()
            if step not in self._sent.get(name, ())
        ]
        self._client.log_batch(self._id, metrics=new)

    def close(self, ended: Ended) -> None:
        self._client.set_terminated(self._id, self.STATUS[ended])


class _Trackio:
    """It knows no states of runs: one that did not finish gets an alert that says so."""

    def __init__(self, tracked: Tracked):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        known = _identity(tracked.run, "trackio")
        name = known or _remember(tracked.run, "trackio", _new(tracked))
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with _quiet():
            self._run = trackio.init(
                project=project,
                name=name,
                config=tracked.config,
                resume="allow" if known else "never",
            )
        self._sent = self._already(project) if known else set()

    def _already(self, project: str) -> set[tuple[str, int]]:
        """(name, step) of all that this run has sent to its local store."""
        from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

        rows = SQLiteStorage.get_logs(project, self._run.name, run_id=self._run.id)
        return {(name, row["step"]) for row in rows for name in row}

    def log(self, scalars: dict[str, float], step: int) -> None:
        new = {name: value for name, value in scalars.items() if (name, step) not in self._sent}
        if new:
            self._run.log(new, step=step)

    def close(self, ended: Ended) -> None:
        with _quiet():
            if ended != "finished":
                level = getattr(self._trackio.AlertLevel, "ERROR" if ended == "failed" else "WARN")
                self._trackio.alert(f"Run {ended}", level=level)
            self._trackio.finish()


IDENTITIES = "trackers.json"


def _identity(run: Path, tracker: str) -> str | None:
    """Of this run in a tracker, if it has begun there."""
    path = run / IDENTITIES
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.exists() else None


def _remember(run: Path, tracker: str, identity: str) -> str:
    path = run / IDENTITIES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_atomically(path, json.dumps({**known, tracker: identity}, indent=2))
    return identity


def _new(tracked: Tracked) -> str:
    """A name that no other run has, here or in another checkout."""
    return f"{tracked.name.replace('/', '_').replace(' ', '_')}_{uuid.uuid4().hex[:8]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """What a tracker prints goes to standard error: standard output is the command's."""
    with redirect_stdout(sys.stderr):
        yield


_TRACKERS: dict[str, Any] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
