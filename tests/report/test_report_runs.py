"""Run folders: complete, still going, killed in mid-line, resumed, never evaluated, not a run."""

import json

import numpy as np
import pytest
from synthetic_runs import write_run

from esscher.report import find_runs, read_run


def append(folder, *rows):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "run", seed=3, label="SAC, wide"))
    assert (run.slug, run.name, run.env, run.seed) == ("sac", "SAC, wide", "Hopper-v5", 3)
    assert run.finished and run.status == "finished" and run.last_step == 100_000
    assert run.returns_from == "evaluate"
    assert run.steps.tolist() == list(range(5_000, 100_001, 5_000))
    assert run.returns[-1] == run.result["return_mean"]
    assert run.steps_per_second == pytest.approx(100_000 / run.result["seconds"])
    assert run.metric_names() == [
        "steps_per_second", "critic_loss", "alpha", "q_mean", "entropy"
    ]  # fmt: skip
    steps, values = run.metric("alpha")
    assert steps[0] == 1_000 and values[0] == pytest.approx(0.1999)


def test_a_killed_run_loses_only_its_half_line(tmp_path):
    folder = write_run(tmp_path / "run", reached=40_000, half_line=True)
    run = read_run(folder)
    assert not run.finished and run.status == "unfinished at step 40,000"
    assert run.name == "sac" and run.unreadable_lines == 0 and run.steps[-1] == 40_000


def test_an_unreadable_line_in_the_middle_is_counted(tmp_path):
    folder = write_run(tmp_path / "run", reached=5_000)
    append(folder, '{"phase": "tra', {"phase": "train", "step": 6_000, "return": 1.0})
    run = read_run(folder)
    assert run.unreadable_lines == 1 and run.last_step == 6_000


def test_rows_repeated_after_a_resume_are_kept_once(tmp_path):
    folder = write_run(tmp_path / "run", reached=20_000)
    append(
        folder,
        {"phase": "evaluate", "step": 15_000, "return_mean": 1.0},
        {"phase": "evaluate", "step": 20_000, "return_mean": 2.0},
    )
    run = read_run(folder)
    assert run.steps.tolist() == [5_000, 10_000, 15_000, 20_000]
    assert run.returns[2:].tolist() == [1.0, 2.0]


def test_without_evaluation_the_training_returns_stand_in(tmp_path):
    run = read_run(write_run(tmp_path / "run", evaluated=False))
    assert run.returns_from == "train" and run.steps[0] == 2_000 and len(run.steps) == 50


def test_values_that_are_not_finite_are_no_points(tmp_path):
    folder = write_run(tmp_path / "run", reached=5_000)
    append(folder, '{"phase": "evaluate", "step": 6000, "return_mean": NaN}')
    assert read_run(folder).steps.tolist() == [5_000]


def test_a_run_that_has_logged_nothing(tmp_path):
    folder = write_run(tmp_path / "run", reached=0)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert run.returns_from == "none" and len(run.steps) == 0 and run.last_step == 0
    assert np.isnan(run.seconds) and np.isnan(run.steps_per_second) and run.metric_names() == []


def test_runs_are_found_below_and_once(tmp_path):
    one = write_run(tmp_path / "sweep" / "one")
    two = write_run(tmp_path / "sweep" / "deep" / "two", seed=1)
    (one / "checkpoints").mkdir()
    (one / "checkpoints" / "config.json").write_text('{"slug": "inside a run"}')
    (tmp_path / "sweep" / "model").mkdir()
    (tmp_path / "sweep" / "model" / "config.json").write_text('{"hidden_size": 8}')
    assert find_runs([tmp_path, one, one / ".." / "one"]) == [two, one]
    assert find_runs([str(one)]) == [one]


def test_what_is_no_run_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"nothing does not exist; give a run folder"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match=r"holds no run.*esscher run"):
        find_runs([tmp_path])
    with pytest.raises(ValueError, match=r"no run folder.*config.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON.*restore"):
        read_run(tmp_path)
