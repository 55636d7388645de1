"""Files of runs and proofs, cut short and with bits flipped: one sentence each, and never other numbers
where there is a digest.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import esscher
from esscher.errors import UserError
from esscher.files import read_json, read_record, readable
from esscher.proof import FinishedRun
from esscher.report.runs import read_run
from esscher.runtime import checkpoint
from esscher.runtime.run import read_experiment, read_result
from support import damaged, read_damaged, smoke, train

# A replay, an archive, and trees in the state; rows in files of their own.
RUNS = {"sac": 120, "dcg_map_elites": 200, "diffusion_tree_sampling": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    for slug, steps in RUNS.items():
        evaluation = esscher.EvaluationConfig(every=0, episodes=1, step_limit=20)
        every = esscher.CheckpointConfig(every=max(1, steps // 2))
        experiment = smoke(slug, steps=steps, evaluation=evaluation, checkpoint=every)
        if slug == "dcg_map_elites":
            experiment = replace(experiment, method=replace(experiment.method, cells=(16,)))
        train(experiment, root / slug)
    return {slug: root / slug for slug in RUNS}


@pytest.fixture
def run(whole: dict[str, Path], tmp_path: Path) -> Path:
    """One with a replay, to be damaged."""
    return Path(shutil.copytree(whole["sac"], tmp_path / "run"))


@pytest.mark.parametrize("slug", RUNS)
def test_no_damage_to_a_checkpoint_goes_unseen(whole: Any, slug: str) -> None:
    run = whole[slug]
    newest = checkpoint.steps(run)[-1]
    found = checkpoint.load(run)
    for name in ("manifest.json", "state.safetensors"):
        path = run / "checkpoints" / f"step_{newest:09d}" / name
        assert read_damaged(path, lambda: checkpoint.load(run)) == [], name

    class Rows:
        def put_rows(self, start: int, columns: Any) -> None: ...

    def rows() -> Any:
        checkpoint.load_rows(run, found, Rows())  # pyright: ignore

    for entry in found.row_files[-1:]:
        assert read_damaged(run / "experience" / entry["file"], rows) == []
    assert (slug == "sac") <= bool(found.row_files)


def test_a_damaged_experience_stops_a_run_from_going_on(run: Path) -> None:
    (run / "result.json").unlink()
    path = next((run / "experience").iterdir())
    payload = path.read_bytes()
    for copy in (payload[: len(payload) // 2], payload[:-1] + bytes([payload[-1] ^ 1])):
        path.write_bytes(copy)
        with pytest.raises(UserError, match=rf"{path.name}.* is damaged"):
            esscher.resume(run, display=False)
    path.write_bytes(payload)
    assert esscher.resume(run, display=False).steps == RUNS["sac"]


def test_settings(run: Path) -> None:
    before = read_experiment(run).to_json()
    for found in read_damaged(run / "config.json", lambda: read_experiment(run)):
        assert isinstance(found, esscher.Experiment)  # A setting has no digest.
    assert read_experiment(run).to_json() == before
    for text in ("[]", "null", "3", '"sac"', "{}", '{"esscher_version": 3}'):
        (run / "config.json").write_text(text)
        with pytest.raises(UserError):
            read_experiment(run)


def test_results(run: Path) -> None:
    before = read_result(run)
    read_damaged(run / "result.json", lambda: read_result(run))
    for text in ("", "[]", "{}", '{"returns": 3, "lengths": 4}'):
        (run / "result.json").write_text(text)
        with pytest.raises(UserError, match=r"result\.json .*: remove it, and esscher resume"):
            read_result(run)
    (run / "result.json").unlink()
    again = esscher.resume(run, display=False)
    assert before is not None and again.evaluation == before.evaluation


def test_reports_read_what_can_be_read(run: Path) -> None:
    for name in ("config.json", "result.json", "metrics.jsonl"):
        read_damaged(run / name, lambda: read_run(run))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    damaged_line = lines[0].replace('"step"', '"step')
    (run / "metrics.jsonl").write_text("\n".join([damaged_line, *lines[1:]]) + "\n")
    assert read_run(run).unreadable_lines == 1


def test_claims_are_measured_on_whole_rows(run: Path) -> None:
    finished = FinishedRun(run)
    read_damaged(run / "metrics.jsonl", lambda: finished.rows("evaluate"))
    (run / "metrics.jsonl").write_text('{"phase": "evaluate"}\n[3]\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        finished.rows("evaluate")


def test_proof_records(tmp_path: Path) -> None:
    check = {"name": "alpha", "value": 0.2, "rule": "0.1 < x < 0.3", "passed": True}
    claim = {"name": "optimum", "statement": "So it is.", "verdict": "reproduced"}
    record = {"slug": "some", "verdict": "reproduced", "claims": [{**claim, "checks": [check]}]}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(record))
    for found in read_damaged(path, lambda: read_record(path)):
        assert found["verdict"] in ("reproduced", "not reproduced")
    for wrong in (
        {**record, "verdict": "reprpduced"},
        {**record, "claims": [{**claim, "checks": [{"name": "alpha"}]}]},
        {**record, "claims": [{"verdict": "reproduced", "checks": []}]},
        {**record, "claims": 3},
        [record],
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(
            UserError, match="not a proof record.*esscher prove some writes it anew"
        ):
            read_record(path)


def test_errors_become_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="^it is broken: because; mend it$"),
        readable("it is broken", "; mend it"),
    ):
        raise RuntimeError("because.\nA long story.")
    with pytest.raises(UserError, match="^it is broken: MemoryError$"), readable("it is broken"):
        raise MemoryError
    with pytest.raises(UserError, match="^said already$"), readable("it is broken"):
        raise UserError("said already")
    with pytest.raises(KeyboardInterrupt), readable("it is broken"):
        raise KeyboardInterrupt
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    with pytest.raises(UserError, match="deep.json is not valid JSON"):
        read_json(deep)


def test_damage_is_what_it_says() -> None:
    payload = bytes(range(200))
    copies = [copy for _, copy in damaged(payload)]
    assert sum(len(copy) < 200 for copy in copies) == 6
    assert all(
        sum(a != b for a, b in zip(copy, payload, strict=True)) == 1
        for copy in copies
        if len(copy) == 200
    )
