"""Many runs: sweeps, comparisons, proofs, and how each ends."""

import json
import sys
from pathlib import Path

import pytest
from command_line import BANDIT, SMALL, SMALL_METHOD, command, jobs_in_this_process

from esscher.errors import UserError
from esscher.methods.control import sac
from esscher.proof import Check, Claim, Proof, returns_of
from esscher.runtime import jobs
from esscher.runtime import run as run_module

SWEEP = (*SMALL, *SMALL_METHOD, "--directory", "all")
COMPARE = (
    *("--env.id", BANDIT, "--hidden", 8, "--evaluation.episodes", 1, "--seeds", 1),
    *("--runtime.device", "cpu", "--log.to", "--directory", "all"),
)


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


# ---- sweeps


def test_grid_of_settings_and_seeds(monkeypatch, capsys):
    started = jobs_in_this_process(monkeypatch)
    grid = ("--grid", "method.tau=0.005,0.01", "env.max_episode_steps=3")
    options = ("--seeds", 2, "--seed", 4, "--engine", "processes")
    assert command("sweep", "sac", *SWEEP, *options, *grid) == 0
    names = [f"sac tau={tau} max_episode_steps=3" for tau in ("0.005", "0.01")]
    folders = [Path("all") / name / f"seed_{seed}" for name in names for seed in (4, 5)]
    assert sorted(started) == folders
    for folder in folders:
        found = config(folder)
        assert f"tau={found['method']['tau']} " in found["label"]
        assert found["stages"][0]["env"]["max_episode_steps"] == 3
        assert f"seed_{found['seed']}" == folder.name
        assert (folder / "result.json").exists()
    assert "report: all/report.html" in capsys.readouterr().out
    page = Path("all/report.html").read_text()
    assert all(name in page for name in names)


@pytest.mark.parametrize(
    ("setting", "clause"),
    [
        ("method.tua=0.1", "no setting 'tua': did you mean tau"),
        ("metod.tau=0.1", "no setting 'metod.tau': did you mean method"),
        ("method.tau", "--grid needs setting=value,value, got 'method.tau'"),
        ("method.tau=", "--grid needs setting=value,value"),
        ("method.tau=fast", "--grid: tau cannot be 'fast'"),
        ("method.tau=0.1,2", "tau must be in (0, 1], got 2"),
        ("method.actor_q=max", "--grid: actor_q cannot be 'max'"),
        ("method.tau=0.1,0.1", "the same name and seed"),
    ],
)
def test_bad_grids(monkeypatch, capsys, tmp_path, setting, clause):
    started = jobs_in_this_process(monkeypatch)
    assert command("sweep", "sac", *SWEEP, "--engine", "processes", "--grid", setting) == 2
    assert clause in capsys.readouterr().err
    assert started == [] and list(tmp_path.iterdir()) == []


BREAKS = """
from esscher.envs import QuadraticBandit

class Breaks(QuadraticBandit):
    def __init__(self, last: int):
        super().__init__()
        self.last, self.count = last, 0

    def step(self, action):
        self.count += 1
        if self.count > self.last:
            raise RuntimeError("the wheel came off")
        return super().step(action)
"""


def test_a_failed_run_has_its_status_and_the_others_their_report(monkeypatch, capsys, tmp_path):
    """In processes of their own: one run breaks in the middle, the other ends."""
    Path("wheels.py").write_text(BREAKS)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "wheels", raising=False)
    grid = ("--grid", "env.kwargs=last 1000,last 15", "--env.id", "wheels:Breaks")
    options = ("--seeds", 1, "--retries", 0, "--engine", "processes", "--workers", 2)
    assert command("sweep", "sac", *SWEEP, *grid, *options) == 4
    good, bad = (Path(f"all/sac kwargs=last {last}/seed_0") for last in (1000, 15))
    said = capsys.readouterr()
    assert f"failed: {bad}: RuntimeError: the wheel came off" in said.err
    assert str(good) not in said.err.partition("failed:")[2]
    assert (good / "result.json").exists() and not (bad / "result.json").exists()
    assert "Traceback" in (bad / "log.txt").read_text()
    assert "report: all/report.html" in said.out
    monkeypatch.delitem(sys.modules, "wheels", raising=False)


def leave_a_word(folder):
    (folder / "log.txt").write_text("no luck\n\n")


def test_retries_are_counted(monkeypatch, capsys):
    started = jobs_in_this_process(monkeypatch)
    monkeypatch.setattr(jobs, "work", lambda folder: leave_a_word(Path(folder)))
    options = ("--seeds", 1, "--engine", "processes", "--retries", 2)
    assert command("sweep", "sac", *SWEEP, *options) == 4
    said = capsys.readouterr()
    assert len(started) == 3
    assert "failed: all/sac/seed_0: no luck" in said.err
    assert "report" not in said.out  # nothing finished: nothing to report


@pytest.mark.processes
def test_sweep_on_ray(capsys):
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    try:
        assert command("sweep", "sac", *SWEEP, "--seeds", 1, "--workers", 1) == 0  # the default
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert json.loads(Path("all/sac/seed_0/result.json").read_text())["steps"] == 24
    assert "report: all/report.html" in capsys.readouterr().out


# ---- comparisons


def test_compare_resumes_and_never_retrains(monkeypatch, capsys):
    started = jobs_in_this_process(monkeypatch)
    again = ("compare", "sac", "td3", *COMPARE, "--steps", 30)
    assert command(*again) == 0
    folders = [Path("all/sac/seed_0"), Path("all/td3/seed_0")]
    assert started == folders
    for folder in folders:  # on equal footing
        found = config(folder)
        assert found["method"]["hidden"] == [8] and found["method"]["updates_per_step"] == 1.0
        assert found["method"]["warmup"] == 3 and found["stages"][0]["steps"] == 30
    page = Path("all/report.html").read_text()
    assert "sac" in page and "td3" in page
    files = [folder / name for folder in folders for name in ("result.json", "metrics.jsonl")]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    started.clear()
    capsys.readouterr()

    # The same again: nothing starts, and the report is there.
    assert command(*again) == 0
    assert started == []
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert "report: all/report.html" in capsys.readouterr().out

    # Other settings are refused before anything starts.
    for options, name in ((("--steps", 40), "stages"), (("--hidden", 9), "method")):
        assert command(*again, *options) == 2
        said = capsys.readouterr().err
        assert "holds a run with other settings" in said and name in said
    # A new method before the refused one leaves no folder behind, which would then be in the way.
    assert command("compare", "dsac_t", "sac", *COMPARE, "--steps", 40) == 2
    assert started == [] and not Path("all/dsac_t").exists()
    # One run was interrupted, and a method is new: those two only are worked on.
    (folders[1] / "result.json").unlink()
    assert command("compare", "sac", "td3", "dsac_t", *COMPARE, "--steps", 30) == 0
    assert started == [folders[1], Path("all/dsac_t/seed_0")]
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files[:2]] == before[:2]


def test_compare_as_published(monkeypatch):
    started = jobs_in_this_process(monkeypatch)
    monkeypatch.setattr(jobs, "work", lambda folder: None)
    options = ("--steps", 30, "--as-published", "--retries", 0)
    assert command("compare", "sac", "dsac_t", *COMPARE, *options) == 4  # they did not run
    assert started == [Path("all/sac/seed_0"), Path("all/dsac_t/seed_0")]
    assert [config(folder)["method"]["hidden"] for folder in started] == [[256] * 2, [256] * 3]
    assert config(started[1])["method"]["updates_per_step"] == 0.05


# ---- proofs


def test_compare_gives_data_to_those_who_read_them(monkeypatch, capsys):
    folders = []

    def remember(experiments, root, **options):
        folders.extend(experiments)
        raise UserError("enough")

    monkeypatch.setattr("esscher.runtime.sweep.sweep", remember)
    options = ("--env.id", "Pendulum-v1", "--steps", 100, "--seeds", 2)
    data = "esscher.datasets:pendulum"
    assert command("compare", "odice", "sac", *options, "--data", data) == 2
    read = {(e.slug, e.seed): e.stages[-1].data for e in folders}
    assert read == {("odice", 0): data, ("odice", 1): data, ("sac", 0): None, ("sac", 1): None}
    capsys.readouterr()
    assert command("compare", "sac", "td3", *options, "--data", data) == 2
    assert "none of sac td3 learns from logged steps" in capsys.readouterr().err


def small_proof(passes):
    def arm(seed):
        config = sac.Config(hidden=(8,), warmup=12, batch_size=4, buffer_size=100)
        return sac.Experiment.of(
            config,
            env=BANDIT,
            steps=24,
            evaluation=sac.EvaluationConfig(episodes=1),
            runtime=sac.RuntimeConfig(device="cpu", threads=1, graph="eager"),
        )

    def judge(figures):
        (value,) = figures["sac"]["return"]
        assert -10 <= value <= 0
        return [Check("return, seed 0", value, "whatever", passes)]

    claim = Claim(
        name="a claim", statement="So.", arms={"sac": arm}, measure=returns_of, judge=judge
    )
    return lambda: Proof(claims=(claim,))


def test_a_proof_that_fails_has_its_status(monkeypatch, capsys):
    started = jobs_in_this_process(monkeypatch)
    options = ("--seeds", 1, "--work", "work", "--workers", 1, "--out", "proofs")
    for passes, code, verdict in ((False, 3, "not reproduced"), (True, 0, "reproduced")):
        monkeypatch.setattr(sac, "proof", small_proof(passes))
        assert command("prove", "sac", *options) == code
        told = capsys.readouterr().out
        assert f"a claim: {verdict}\n  {'PASS' if passes else 'FAIL'}  return, seed 0 = -" in told
        assert f"sac: {verdict} (proofs/sac.json)" in told
        record = json.loads(Path("proofs/sac.json").read_text())
        assert (record["verdict"], record["claims"][0]["verdict"]) == (verdict, verdict)
        assert record["claims"][0]["checks"][0]["passed"] is passes
        assert Path("proofs/sac.png").stat().st_size > 0
        # The catalogue tells it.
        monkeypatch.setenv("COLUMNS", "160")
        assert command("list", "--family", "control") == 0
        row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith(" sac "))
        assert row.rstrip().endswith(verdict) and ("not " in row[-30:]) is not passes
    Path("proofs/sac.json").unlink()
    assert command("prove", "sac", *options, "--claims", "a claim") == 0
    assert "sac: reproduced (not written: some claims alone)" in capsys.readouterr().out
    assert not Path("proofs/sac.json").exists()
    assert len(started) == 1  # the other times found its runs in --work


def test_a_proof_names_its_seeds(monkeypatch, capsys):
    jobs_in_this_process(monkeypatch)
    monkeypatch.setattr(sac, "proof", small_proof(True))
    options = ("--seeds", 1, "--first-seed", 40, "--workers", 1, "--out", "proofs")
    assert command("prove", "sac", *options) == 0
    assert "PASS  return, seed 40 = -" in capsys.readouterr().out
    (claim,) = json.loads(Path("proofs/sac.json").read_text())["claims"]
    assert claim["seeds"] == [40] and claim["checks"][0]["name"] == "return, seed 40"


def test_a_proof_never_mixes_runs_of_two_commits(monkeypatch, capsys):
    jobs_in_this_process(monkeypatch)
    monkeypatch.setattr(sac, "proof", small_proof(True))
    options = ("--seeds", 1, "--work", "work", "--workers", 1, "--out", "proofs")
    commit = Path("work/commit.txt")
    assert command("prove", "sac", *options) == 0
    commit.write_text("0123abc\n")
    assert command("prove", "sac", *options) == 2
    assert "work holds runs of commit 0123abc" in capsys.readouterr().err
    assert commit.read_text() == "0123abc\n"


def test_what_differs_by_its_seed_alone_is_tried_out_once(monkeypatch, capsys):
    jobs_in_this_process(monkeypatch)
    monkeypatch.setattr(jobs, "work", lambda folder: leave_a_word(Path(folder)))
    built = []
    parts = run_module._Parts
    monkeypatch.setattr(run_module, "_Parts", lambda e: built.append(e) or parts(e))
    options = ("--seeds", 3, "--grid", "method.tau=0.01,0.02", "--engine", "processes")
    assert command("sweep", "sac", *SWEEP, *options, "--retries", 0) == 4
    capsys.readouterr()
    assert [(e.seed, e.method.tau) for e in built] == [(0, 0.01), (0, 0.02)]
    assert len(list(Path("all").glob("*/seed_*/config.json"))) == 6
