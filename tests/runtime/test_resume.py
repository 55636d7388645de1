"""A run that was stopped anywhere, and resumed, equals one that never was: every leaf, every row."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import esscher
import support
from esscher.errors import UserError
from esscher.runtime import checkpoint, metrics
from esscher.runtime import run as runner
from support import (
    FORKSERVER_PRELOAD,
    Killed,
    assert_same_run,
    die_after,
    differences,
    final_state,
    run_or_resume,
    smoke,
    train,
    train_until,
)

EVERY = esscher.CheckpointConfig(every=100)


def experiment(**changes: Any) -> esscher.Experiment:
    parts = smoke("sac", **{"checkpoint": EVERY, **changes})
    return replace(parts, method=replace(parts.method, updates_per_step=0.4))


def resume_until(run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume, and die once the checkpoint of `step` is complete."""
    die_after(step, monkeypatch, lambda: esscher.resume(run, display=False))


def die(*_: Any) -> None:
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that the others are held against."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(experiment(), folder)
    return folder


# ---- killed by the system, at any moment


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKSERVER_PRELOAD)
    return context


def writing(run: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    if (run / "checkpoints" / ".writing").exists():
        return True
    folder = run / "experience"
    return folder.exists() and any(name.startswith(".rows") for name in os.listdir(folder))


def kill_when(process: Any, condition: Any) -> bool:
    while process.is_alive():
        if condition():
            process.kill()
            process.join()
            return True
    process.join()
    return False


@pytest.mark.parametrize("num_envs", [1, 3])
def test_killed_again_and_again(num_envs: int, tmp_path: Path, processes: Any, whole: Path) -> None:
    run = tmp_path / "run"
    parts = experiment(env_num=num_envs)
    if num_envs > 1:
        whole = tmp_path / "whole"
        train(parts, whole)
    draw, torn, kills = random.Random(num_envs), 0, 0
    for attempt in range(60):
        arguments = (parts.to_json(), str(run))
        process = processes.Process(target=run_or_resume, args=arguments)
        process.start()
        if kills < 9:
            if kills % 3 == 2:
                stop = time.monotonic() + draw.uniform(0.05, 0.6)
                killed = kill_when(process, lambda stop=stop: time.monotonic() > stop)
            else:
                killed = kill_when(process, lambda: writing(run))
            kills += killed
            torn += writing(run)
        else:
            process.join()
            assert process.exitcode == 0
        if (run / "result.json").exists():
            break
    assert kills >= 3, "the run must have been killed"
    assert torn >= 1, "a checkpoint must have been torn while it was written"
    assert_same_run(run, whole)


# ---- stopped at each checkpoint, in one process


@pytest.mark.parametrize("step", [100, 200, 300])
def test_resumed_from_each_checkpoint(
    step: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_until(experiment(), run, step, monkeypatch)
    assert checkpoint.steps(run)[-1] == step
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_parts_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a large model would be read twice before anything is learned."""
    built: list[Any] = []
    whole = runner._Parts.__init__
    monkeypatch.setattr(
        runner._Parts, "__init__", lambda self, given: (built.append(given), whole(self, given))[0]
    )
    train(experiment(), tmp_path / "run")
    assert len(built) == 1


@pytest.mark.parametrize("late", ["metrics", "evaluation"])
def test_killed_after_the_last_checkpoint(
    late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is done but result.json: no evaluation is written twice."""
    every = 200 if late == "metrics" else 150
    parts = experiment(
        checkpoint=esscher.CheckpointConfig(every=every),
        evaluation=esscher.EvaluationConfig(every=every, episodes=1),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    run.mkdir()
    shutil.copy(whole / "config.json", run)
    with monkeypatch.context() as context:
        context.setattr(runner, "write_atomically", die)
        with pytest.raises(Killed):
            esscher.resume(run, display=False)
    assert not (run / "result.json").exists()
    esscher.resume(run, display=False)
    assert_same_run(run, whole)
    assert (run / "result.json").exists()
    ours, theirs = (esscher.resume(f, display=False).evaluation for f in (run, whole))
    assert ours == theirs


def test_checkpoints_more_often_than_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second stop before any row was written must find the metrics as the first left them."""
    parts = experiment(
        checkpoint=esscher.CheckpointConfig(every=20), log=esscher.LogConfig(every=130, to=())
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    train_until(parts, run, 160, monkeypatch)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 170, "what": "written after the checkpoint"}\n')
    resume_until(run, 180, monkeypatch)
    resume_until(run, 200, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_rows_after_the_checkpoint_are_written_again(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_until(experiment(), run, 200, monkeypatch)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "train", "step": 210, "a": 1}\n{"phase": "tra')
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_metrics_that_a_checkpoint_counts_on_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_until(experiment(), run, 200, monkeypatch)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl"):
        esscher.resume(run, display=False)


def test_a_ring_that_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = experiment()
    parts = replace(parts, method=replace(parts.method, buffer_size=130))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    train_until(parts, run, 300, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_back_to_an_older_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(experiment(), run)
    assert checkpoint.steps(run) == [300, 400]
    esscher.resume(run, step=300, display=False)
    assert_same_run(run, whole)
    # Stopped on the way, the result of the first time is not mistaken for that of the second.
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "save", die)
        with pytest.raises(Killed):
            esscher.resume(run, step=300, display=False)
    assert not (run / "result.json").exists()
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_asked_to_stop_it_saves_itself(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    add = metrics.Averager.add
    calls = []

    def add_and_stop(self: Any, *args: Any) -> None:
        add(self, *args)
        calls.append(1)
        if len(calls) == 237:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as context:
        context.setattr(metrics.Averager, "add", add_and_stop)
        with pytest.raises(esscher.runtime.run.Interrupted, match="step 237"):
            train(experiment(), run)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoint.steps(run)[-1] == 237
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_a_finished_run_is_returned_as_it_is(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    result = esscher.resume(whole, display=False)
    assert result.steps == 400 and result.updates == 120
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before


def test_metrics_have_no_gap_and_no_double(whole: Path) -> None:
    rows = support.metrics(whole)
    assert [r["step"] for r in rows if r["phase"] == "train"] == [70, 140, 210, 280, 350]
    assert [r["step"] for r in rows if r["phase"] == "evaluate"] == [200, 400]


def test_the_comparison_sees_a_difference(whole: Path, tmp_path: Path) -> None:
    """The final state really holds every part, and one bit of one leaf is enough."""
    state = final_state(whole)
    for part in ("method.actor", "method.target_critic", "method.critic_opt", "method.log_alpha"):
        assert any(name.startswith(part) for name in state), part
    for part in ("experience.num_added", "loop.step", "loop.obs", "envs.copy.0", "rows.obs"):
        assert any(name.startswith(part) for name in state), part
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel():
            flat = value.clone().contiguous().view(-1).numpy().view("uint8")
            changed = flat.copy()
            changed[-1] ^= 1
            other = torch.from_numpy(changed.view(value.numpy().dtype)).view(value.shape)
            assert differences(state, {**state, name: other}) == [name]


# ---- environments whose state cannot be saved


def test_the_barrier_makes_stopped_and_whole_runs_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = experiment(env_id="toys:Opaque", env_num=2)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    meta = checkpoint.load(whole).meta
    assert meta["exact"] and "Dice" in meta["exact_because"]
    train_until(parts, run, 100, monkeypatch)
    resume_until(run, 300, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_the_barrier_may_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = experiment(checkpoint=esscher.CheckpointConfig(every=100, barrier=True))
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    train_until(parts, run, 200, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)
    truncated = final_state(whole)["rows.truncated"]
    assert torch.nonzero(truncated).flatten().tolist() == [99, 199, 299, 399]


def test_evaluation_does_not_depend_on_the_sitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tasks that carry something over their resets as well."""
    for number, env in enumerate(("toys:Growing", "toys:Opaque")):
        evaluation = esscher.EvaluationConfig(every=50, episodes=2)
        parts = experiment(env_id=env, evaluation=evaluation, steps=200)
        whole, run = tmp_path / f"whole{number}", tmp_path / f"run{number}"
        train(parts, whole)
        train_until(parts, run, 100, monkeypatch)
        esscher.resume(run, display=False)
        assert_same_run(run, whole)


@pytest.mark.parametrize("parallel", [False, True])
def test_mujoco_with_several_copies(
    parallel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = experiment(
        env_id="HalfCheetah-v5",
        env_num=2,
        env_parallel=parallel,
        env_max_episode_steps=45,
        steps=200,
        evaluation=esscher.EvaluationConfig(every=0, episodes=1, step_limit=20),
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(parts, whole)
    train_until(parts, run, 100, monkeypatch)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


# ---- folders


def test_an_existing_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(UserError, match="esscher resume"):
        train(experiment(), whole)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a run"):
        train(experiment(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_complaints_come_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="toys:Unbounded"):
        train(experiment(env_id="toys:Unbounded"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"not a run folder.*config\.json"):
            esscher.resume(folder, display=False)
    assert not list(tmp_path.iterdir())


def test_killed_before_the_first_checkpoint(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    runner.write_config(experiment(), run)
    (run / "metrics.jsonl").write_text('{"phase": "train", "step": 70}\n')
    (run / "checkpoints" / ".writing").mkdir(parents=True)
    (run / "checkpoints" / ".writing" / "state.safetensors").write_bytes(b"half")
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_killed_while_the_folder_was_made(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.json.writing").write_text('{"esscher_ver')
    with pytest.raises(UserError, match="not a run"):
        esscher.resume(run, display=False)
    with pytest.raises(UserError, match="exists"):
        train(experiment(), run)
    (run / ".config.json.writing").unlink()
    assert (
        train(experiment(steps=104, checkpoint=esscher.CheckpointConfig(every=0)), run).steps == 104
    )


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"esscher_version":')
    with pytest.raises(UserError, match=r"config\.json.*not valid JSON"):
        esscher.resume(run, display=False)


def test_another_version_is_refused(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    data = json.loads((whole / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**data, "esscher_version": "9.1.0"}))
    with pytest.raises(UserError, match=r"esscher 9\.1\.0.*install that version"):
        esscher.resume(run, display=False)


def test_a_folder_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    train_until(experiment(), run, 100, monkeypatch)
    before = (run / "metrics.jsonl").read_bytes()
    with runner._locked(run), pytest.raises(UserError, match="in use by another process"):
        esscher.resume(run, display=False)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_automatic_choices_are_written_down(tmp_path: Path) -> None:
    parts = experiment(runtime=esscher.RuntimeConfig(), steps=104)
    runner.write_config(parts, tmp_path / "run")
    runtime = json.loads((tmp_path / "run" / "config.json").read_text())["runtime"]
    assert runtime["device"] in ("cpu", "cuda") and runtime["threads"] >= 1
    assert runtime["graph"] == "eager"


def test_a_full_disk_stops_the_run_and_loses_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    run, write = tmp_path / "run", checkpoint._write

    def full(path: Path, payload: bytes) -> None:
        if "200_300" in path.name:
            path.write_bytes(payload[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, payload)

    with monkeypatch.context() as context:
        context.setattr(checkpoint, "_write", full)
        with pytest.raises(UserError, match=r"no space left.*step 300.*step 200"):
            train(experiment(), run)
    assert checkpoint.steps(run) == [100, 200]
    esscher.resume(run, display=False)
    assert_same_run(run, whole)


def test_a_disk_that_fills_between_checkpoints_is_explained(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from esscher.runtime.metrics import MetricsLog

    run, append = tmp_path / "run", MetricsLog.append

    def full(self: MetricsLog, row: dict[str, Any]) -> None:
        if row["step"] > 250:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, row)

    with monkeypatch.context() as context:
        context.setattr(MetricsLog, "append", full)
        with pytest.raises(UserError, match=r"no space left.*resume.*step 200"):
            train(experiment(), run)
    esscher.resume(run, display=False)
    assert_same_run(run, whole)
