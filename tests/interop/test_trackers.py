"""Trackers really receive a run: values, steps, settings and how it ended; each point once, also
where a run was killed and resumed.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import esscher
from esscher.errors import UserError
from esscher.report.settings import flat
from esscher.runtime.metrics import Averager, MetricsLog
from esscher.runtime.run import Interrupted
from esscher.runtime.trackers import IDENTITIES
from support import die_after, smoke, train, train_until

Points = dict[str, list[tuple[int, float]]]
CLOCK = ("seconds", "steps_per_second")
"""What a clock decides, so that a repeated row has it otherwise."""


class Received(NamedTuple):
    """What a tracker has of one run."""

    points: Points
    settings: dict[str, Any]
    ended: str


class Store(NamedTuple):
    """A tracker with a store of its own."""

    name: str
    read: Callable[[], list[Received]]


def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for module in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(module, reason=f"MLflow with a SQLite store needs {module}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)

    def read() -> list[Received]:
        from mlflow import MlflowClient

        client = MlflowClient()
        experiment = client.get_experiment_by_name("esscher")
        found = []
        for run in client.search_runs([experiment.experiment_id]):
            points = {
                name: sorted(
                    (p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)
                )
                for name in run.data.metrics
            }
            found.append(Received(points, run.data.params, run.info.status))
        return found

    return Store("mlflow", read)


def trackio_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    # It reads these when it is imported, and keeps one folder for the process.
    monkeypatch.setenv("TRACKIO_PROJECT", tmp_path.name.replace("_", "-"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("trackio", reason="Trackio is not installed")
    project = os.environ["TRACKIO_PROJECT"]

    def read() -> list[Received]:
        from trackio.sqlite_storage import SQLiteStorage

        found = []
        for record in SQLiteStorage.get_run_records(project):
            name, identity = record["name"], record["id"]
            points: Points = {}
            for row in SQLiteStorage.get_logs(project, name, run_id=identity):
                for metric, value in row.items():
                    if metric not in ("step", "timestamp"):
                        points.setdefault(metric, []).append((row["step"], value))
            points = {metric: sorted(values) for metric, values in points.items()}
            config = SQLiteStorage.get_run_config(project, name, run_id=identity) or {}
            alerts = SQLiteStorage.get_alerts(project, run_name=name, run_id=identity)
            ended = alerts[0]["title"].removeprefix("Run ") if alerts else "finished"
            found.append(Received(points, flat(config), ended))
        return found

    return Store("trackio", read)


@pytest.fixture(scope="module", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        yield


@pytest.fixture(params=[mlflow_store, trackio_store], ids=["mlflow", "trackio"])
def store(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return request.param(tmp_path, monkeypatch)


def experiment(store: Store) -> esscher.Experiment:
    return smoke(
        "sac",
        steps=300,
        log=esscher.LogConfig(every=20, to=(store.name,)),
        checkpoint=esscher.CheckpointConfig(every=50),
        evaluation=esscher.EvaluationConfig(every=50, episodes=1, step_limit=10),
    )


def written(run: Path) -> Points:
    """The scalars of metrics.jsonl."""
    found: Points = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                found.setdefault(f"{row['phase']}/{name}", []).append((row["step"], value))
    return found


def one(store: Store) -> Received:
    (found,) = store.read()
    return found


def test_a_tracker_has_the_values_the_steps_and_the_settings(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(experiment(store), run)
    received = one(store)
    expected = written(run)
    assert {"train/critic_loss", "train/return", "evaluate/return_mean"} <= expected.keys()
    assert received.points == expected
    assert [step for step, _ in received.points["evaluate/return_mean"]] == [*range(50, 301, 50)]
    settings = json.loads((run / "config.json").read_text())
    assert flat(settings).items() <= received.settings.items()
    assert received.settings["method.discount"] == str(settings["method"]["discount"])
    assert received.ended in ("FINISHED", "finished")


def test_points_are_sent_once_where_a_run_is_killed_and_resumed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as context:
        # Who is killed says nothing of his end.
        context.setattr(MetricsLog, "close", lambda log, ended: log._file.close())
        train_until(experiment(store), run, 100, monkeypatch)
        from esscher.runtime import checkpoint

        save = checkpoint.save

        def die(*arguments: Any) -> Any:
            raise SystemExit(9)

        context.setattr(checkpoint, "save", die)  # Rows up to 150 are sent, and come again.
        with pytest.raises(SystemExit):
            esscher.resume(run, display=False)
        context.setattr(checkpoint, "save", save)
    die_after(200, monkeypatch, lambda: esscher.resume(run, display=False))
    esscher.resume(run, display=False)
    received, expected = one(store), written(run)
    assert received.points.keys() == expected.keys()
    for name, points in expected.items():
        if name.endswith(CLOCK):
            assert [step for step, _ in received.points[name]] == [step for step, _ in points]
        else:
            assert received.points[name] == points, name
    assert received.ended in ("FINISHED", "failed")  # Trackio keeps the alert of the third sitting.


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    from esscher.runtime import checkpoint

    def die(*_: Any) -> Any:
        raise SystemExit(9)

    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save", die)
        with pytest.raises(SystemExit):
            train(experiment(store), run)
    assert [step for step, _ in one(store).points["evaluate/return_mean"]] == [50]
    esscher.resume(run, display=False)
    received, expected = one(store), written(run)
    steps = {name: [step for step, _ in points] for name, points in received.points.items()}
    assert steps == {name: [step for step, _ in points] for name, points in expected.items()}


def test_how_a_run_ended(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Averager.add

    def stop(averager: Averager, *arguments: Any) -> None:
        add(averager, *arguments)
        averager.count = getattr(averager, "count", 0) + 1  # type: ignore[attr-defined]
        if averager.count == 130:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as context:
        context.setattr(Averager, "add", stop)
        with pytest.raises(Interrupted):
            train(experiment(store), tmp_path / "run")
    assert one(store).ended in ("KILLED", "interrupted")
    with monkeypatch.context() as context:
        context.setattr(Averager, "drain", lambda averager: {"loss": float("nan")})
        with pytest.raises(UserError, match="diverged"):
            esscher.resume(tmp_path / "run", display=False)
    assert one(store).ended in ("FAILED", "failed")
    esscher.resume(tmp_path / "run", display=False)
    if store.name == "mlflow":
        assert one(store).ended == "FINISHED"


def test_two_runs_of_one_name_are_kept_apart(store: Store, tmp_path: Path) -> None:
    """As where a folder was removed, or in another checkout."""
    for name in ("one", "two"):
        train(experiment(store), tmp_path / name)
    assert len(store.read()) == 2
    for received in store.read():
        steps = [step for step, _ in received.points["evaluate/return_mean"]]
        assert steps == [*range(50, 301, 50)]


def test_a_run_that_mlflow_does_not_know_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = mlflow_store(tmp_path, monkeypatch)
    run = tmp_path / "run"
    train_until(experiment(store), run, 100, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    with pytest.raises(UserError, match=r"other\.db does not have: set MLFLOW_TRACKING_URI"):
        esscher.resume(run, display=False)
    identities = json.loads((run / IDENTITIES).read_text())
    (run / IDENTITIES).write_text(
        json.dumps({k: v for k, v in identities.items() if k != "mlflow"})
    )
    esscher.resume(run, display=False)
    assert [step for step, _ in one(store).points["evaluate/return_mean"]] == [150, 200, 250, 300]


def test_a_run_of_ones_own_in_mlflow_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = mlflow_store(tmp_path, monkeypatch)
    import mlflow

    mlflow.set_experiment("mine")
    with mlflow.start_run() as mine:
        train(experiment(store), tmp_path / "run")
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert not mlflow.get_run(mine.info.run_id).data.metrics
    assert one(store).ended == "FINISHED"
