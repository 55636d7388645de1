"""The catalogue, one run and what may be done with it, and every kind of bad input."""

import contextlib
import io
import json
import math
import shutil
from pathlib import Path

import pytest
from command_line import BANDIT, SMALL, SMALL_METHOD, command, plain

import esscher
from esscher import cli, registry
from esscher.controller import Controller

SUBJECTS = {  # what must stand before --help, for the options to be known
    **dict.fromkeys(("show", "run", "sweep", "prove"), ("sac",)),
    **dict.fromkeys(("resume", "eval", "sample", "export"), ("RUN",)),
}


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


# ---- help and catalogue


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("help",)])
def test_usage_names_every_verb(arguments, capsys):
    assert command(*arguments) == 0
    shown = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb} " in shown
    assert "Start with:" in shown


def test_version(capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out.strip() == f"esscher {esscher.__version__}"


OPTIONS = {
    "list": ["--family"],
    "show": [],
    "run": ["--env.id", "--steps", "--seed", "--method.learning-rate", "--directory", "--log.to"],
    "resume": ["--step"],
    "eval": ["--episodes", "--json", "--env", "--stochastic", "--step"],
    "sample": ["--prompt", "--seed", "--chat", "--decoding.temperature"],
    "prove": ["--seeds", "--out", "--claims", "--workers"],
    "sweep": ["--seeds", "--grid", "--engine", "--address", "--method.tau", "--retries"],
    "compare": ["--env.id", "--steps", "--seeds", "--hidden", "--as-published"],
    "report": ["--out", "--title", "--no-figures"],
    "export": ["--to", "--out", "--step"],
    "data": ["collect", "combine", "show"],
}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(verb, capsys):
    assert command(verb, *SUBJECTS.get(verb, ()), "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: esscher {verb}")
    for option in OPTIONS[verb]:
        assert option in shown


@pytest.mark.parametrize("verb", sorted(SUBJECTS))
def test_help_before_the_subject_says_what_is_missing(verb, capsys):
    assert command(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert f"usage: esscher {verb} " in shown and "before --help" in shown


def test_list_shows_every_method(capsys):
    assert command("list") == 0
    shown = capsys.readouterr().out
    for entry in registry.catalogue().values():
        assert f"\n {entry.slug} " in shown
    assert shown.index("Methods") < shown.index(" sac ") < shown.index("Baselines")
    assert shown.index("Baselines") < shown.index(" ppo ")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_list_cuts_no_word_whatever_the_width(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert command("list") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    words = set(shown.replace("\n", " ").split())
    for entry in registry.catalogue().values():
        assert {entry.slug, *entry.paper["purpose"].split(), *entry.paper["title"].split()} <= words
    if width == 80:
        assert shown.count("\n") < 6 * len(registry.catalogue())


def test_list_searches(capsys):
    assert command("list", "return's", "UNCERTAINTY") == 0
    shown = capsys.readouterr().out
    assert " dsac_t " in shown and " ppo " not in shown and " sac " not in shown
    # A word in the name counts more than one in the purpose: sac comes before dsac_t, both found.
    assert command("list", "entropy") == 0
    assert " sac " in capsys.readouterr().out
    assert command("list", "--family", "control") == 0
    assert " td3 " in capsys.readouterr().out


def test_show(capsys):
    assert command("show", "sac") == 0
    shown = plain(capsys.readouterr().out)
    assert "Soft Actor-Critic Algorithms and Applications" in shown and "1812.05905" in shown
    for name in ("learning_rate", "target_entropy", "smoke", "paper"):
        assert name in shown


# ---- a run, and what may be done with it


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder in which `esscher run sac:smoke` was typed, and what it printed."""
    place, output = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.chdir(place), contextlib.redirect_stdout(output):
        code = command("run", "sac:smoke", "--runtime.threads", 1, "--runtime.device", "cpu")
    assert code == 0
    return place, output.getvalue()


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished[0] / "runs/Pendulum-v1/sac_seed0", tmp_path / "a_run")
    return Path("a_run")


def test_run_leaves_a_whole_folder(finished):
    place, output = finished
    run = Path("runs/Pendulum-v1/sac_seed0")
    assert f"run: {run}\n" in output and f"report: {run}/report.html\n" in output
    assert output.startswith("sac: return -") and "after 400 steps" in output
    run = place / run
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    (events,) = [name for name in names if name.startswith("tensorboard/")]
    figures = {name for name in names if name.startswith("report_figures/")}
    assert {Path(name).name for name in figures} >= {
        "curves_Pendulum-v1.png",
        "curves_Pendulum-v1.csv",
    }
    assert names - {events, ".lock"} - figures == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "report_curves.csv",
        "report_curves.png",
        "report_ranking.csv",
        "checkpoints/step_000000400/manifest.json",
        "checkpoints/step_000000400/state.safetensors",
        "experience/rows_0_400.safetensors",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["slug"] == "sac" and config["method"]["hidden"] == [32, 32]
    assert config["runtime"]["graph"] == "eager"  # automatic choices are written down
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["steps"], result["updates"]) == ("finished", 400, 300)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["phase"] == "evaluate"] == [200, 400]
    assert result["return_mean"] == rows[-1]["return_mean"]


def test_run_takes_options(capsys):
    options = ("--seed", 3, "--label", "tiny sac", "--method.alpha", 0.5, "--directory", "here")
    assert command("run", "sac", *SMALL, *SMALL_METHOD, *options) == 0
    assert "run: here\n" in capsys.readouterr().out
    config = json.loads(Path("here/config.json").read_text())
    assert (config["seed"], config["label"], config["method"]["alpha"]) == (3, "tiny sac", 0.5)
    assert config["method"]["hidden"] == [8] and config["stages"][0]["env"]["id"] == BANDIT
    assert "tiny sac" in Path("here/report.html").read_text()


def test_default_folder_is_always_a_fresh_one(capsys):
    taken = Path("runs/esscher.envs_QuadraticBandit/sac_seed0")
    taken.mkdir(parents=True)
    assert command("run", "sac", *SMALL, *SMALL_METHOD) == 0
    assert f"run: {taken}_2\n" in capsys.readouterr().out
    assert list(taken.iterdir()) == []


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_never_overwrites(run_folder, capsys):
    before = contents(run_folder)
    assert command("run", "sac", *SMALL, *SMALL_METHOD, "--directory", run_folder) == 2
    said = capsys.readouterr().err
    assert said.startswith("esscher: a_run exists: esscher resume a_run goes on with it")
    assert contents(run_folder) == before
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    assert command("run", "sac", *SMALL, *SMALL_METHOD, "--directory", "other") == 2
    assert "it is not a run" in capsys.readouterr().err
    assert contents(Path("other")) == {Path("other/notes.txt"): b"mine"}


def test_resume_of_a_finished_run_changes_nothing(run_folder, capsys):
    before = contents(run_folder)
    assert command("resume", run_folder) == 0
    assert "after 400 steps" in capsys.readouterr().out
    after = contents(run_folder)
    assert after.keys() == before.keys()
    # The page tells where the run lies, and this one is a copy.
    assert all(p.name.startswith("report") for p in before if before[p] != after[p])


def test_eval(run_folder, capsys):
    results = []
    for options in ((), (), ("--seed", 5), ("--stochastic",), ("--step", 400)):
        assert command("eval", run_folder, "--json", "--episodes", 3, *options) == 0
        results.append(json.loads(capsys.readouterr().out))
    first, again, other, noisy, named = results
    assert len(first["returns"]) == 3 and first["length_mean"] == 200
    assert first["return_mean"] == pytest.approx(sum(first["returns"]) / 3)
    assert first == again == named
    assert other["returns"] != first["returns"] != noisy["returns"]
    assert command("eval", run_folder, "--episodes", 3) == 0
    said = capsys.readouterr().out
    assert "sac on Pendulum-v1, checkpoint of step 400" in said and "over 3 episodes" in said
    assert f"return {first['return_mean']:,.1f}" in said


def test_eval_of_a_method_that_wraps_its_task(tmp_path, capsys):
    """Stocks are part of what it sees: the task has to be wrapped as in training."""
    folder = tmp_path / "run"
    assert command("run", "distributional_dp:smoke", "--directory", folder, "--steps", 250) == 0
    capsys.readouterr()
    assert command("eval", folder, "--json", "--episodes", 2) == 0
    assert len(json.loads(capsys.readouterr().out)["returns"]) == 2


def test_eval_of_a_behaviour(tmp_path, capsys):
    folder = tmp_path / "run"
    assert command("run", "dcg_map_elites:smoke", "--directory", folder) == 0
    capsys.readouterr()
    elites = esscher.load(folder).method.archive.elites()
    for k in (0, len(elites) - 1):
        wanted = [f"{x:.6f}" for x in elites.descriptor[k].tolist()]
        assert command("eval", folder, "--json", "--episodes", 2, "--descriptor", *wanted) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["descriptor_mean"] == pytest.approx(elites.descriptor[k].tolist(), abs=1e-4)
        assert told["return_mean"] == pytest.approx(elites.fitness[k].item(), abs=1e-3)
    assert command("eval", folder, "--episodes", 2, "--descriptor", 0.5, -0.5, "--asked") == 0
    assert "descriptor: " in capsys.readouterr().out
    assert command("eval", folder, "--descriptor", 0.5) == 2
    assert "descriptor must have 2 numbers, got 1" in capsys.readouterr().err
    assert command("eval", folder, "--asked") == 2
    assert "--asked needs --descriptor" in capsys.readouterr().err


def test_eval_of_a_behaviour_where_there_is_one_policy(run_folder, capsys):
    assert command("eval", run_folder, "--descriptor", 0.5) == 2
    assert "leave out --descriptor" in capsys.readouterr().err


def test_eval_elsewhere(run_folder, capsys):
    Path("heavier.py").write_text(
        "import gymnasium\n"
        "def make():\n"
        "    env = gymnasium.make('Pendulum-v1')\n"
        "    env.unwrapped.m = 3.0\n"
        "    return env\n"
    )
    assert command("eval", run_folder, "--json", "--episodes", 2, "--env", "heavier:make") == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["return_mean"])
    for env in ("CartPole-v1", BANDIT):  # other spaces
        assert command("eval", run_folder, "--episodes", 1, "--env", env) == 2
        assert f"a_run cannot act in {env}: obs_shape is" in capsys.readouterr().err


def test_export(run_folder, capsys, unchecked):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    import numpy as np

    assert command("export", run_folder, "--to", "onnx") == 0
    assert f"exported: {run_folder}/policy.onnx" in capsys.readouterr().out
    session = runtime.InferenceSession(str(run_folder / "policy.onnx"))
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    (action,) = session.run(None, {"obs": obs})
    wanted, _ = esscher.load(run_folder).policy.predict(obs)
    np.testing.assert_allclose(action, wanted, rtol=1e-4, atol=1e-5)


def test_export_says_what_is_missing(run_folder, capsys, monkeypatch):
    def broken(self, path):
        raise ImportError("onnxscript")

    monkeypatch.setattr(Controller, "to_onnx", broken)
    assert command("export", run_folder, "--out", "x.onnx") == 2
    assert 'pip install "esscher[export]"' in capsys.readouterr().err


def test_report(run_folder, capsys):
    shutil.copytree(run_folder, "b_run")
    assert command("report", run_folder, "b_run", "--out", "page/all.html", "--title", "Two") == 0
    assert "report: page/all.html" in capsys.readouterr().out
    beside = {"all.html", "all_curves.csv", "all_curves.png", "all_ranking.csv", "all_figures"}
    assert {path.name for path in Path("page").iterdir()} == beside
    page = Path("page/all.html").read_text()
    assert "<title>Two" in page and "2 of 2 finished" in page


# ---- bad input: status 2, one clear sentence, nothing written


BAD = [
    (("frobnicate",), "unknown command 'frobnicate'"),
    (("swep", "sac"), "did you mean sweep"),
    (("list", "--family", "contrl"), "unknown family 'contrl': did you mean control?"),
    (("list", "zebra"), "no method matches 'zebra'"),
    (("show", "dsac-t2"), "unknown method 'dsac-t2': did you mean dsac_t"),
    (("show",), "SLUG is missing: esscher show SLUG"),
    (("run",), "SLUG is missing"),
    (("run", "sacc"), "unknown method 'sacc': did you mean sac"),
    (("run", "sac:smok"), "sac has no recipe 'smok': did you mean smoke?"),
    (("run", "sac", "--method.discont", "0.9"), "--method.discount"),
    (("run", "sac", "--stpes", "9"), "--steps"),
    (("run", "sac", "--steps", "many"), "--steps"),
    (("run", "sac", "--steps", "0"), "steps must be >= 1, got 0"),
    (("run", "sac", "--method.discount", "1.2"), "discount must be in [0, 1), got 1.2"),
    (("run", "sac", "--method.actor-q", "max"), "min"),
    (("run", "sac", "--seed", "-1"), "seed must be in [0, 2**63), got -1"),
    (("run", "sac", "--env.id", "Pendulm-v1"), "did you mean Pendulum-v1"),
    (("run", "sac", "--env.id", "nowhere:make"), "cannot be imported"),
    (("run", "sac", "--env.id", "esscher.envs:Quadratic"), "cannot be imported"),
    (("run", "sac", "--env.id", "CartPole-v1"), "continuous (Box) action space"),
    (("run", "sac", "--env.id", "CartPole-v1"), "use ppo"),
    (
        ("run", "sac", *SMALL, *SMALL_METHOD, "--method.batch-size", 101),
        "batch_size must be in [1, buffer_size], got 101 with buffer_size 100",
    ),
    (("run", "sac", *SMALL), "method.warmup 10000 leaves nothing to learn in 24 steps"),
    (("resume", "nowhere"), "nowhere is not a run folder"),
    (("eval", "nowhere"), "nowhere is not a run folder"),
    (("export", "nowhere"), "nowhere is not a run folder"),
    (("sample", "nowhere"), "nowhere is not a run folder"),
    (("export", "nowhere", "--to", "onx"), "onnx"),
    (("report",), "report needs run folders"),
    (("report", "nowhere"), "nowhere does not exist"),
    (("report", "."), "holds no run"),
    (("prove", "ppo"), "ppo is a baseline"),
    (("prove", "sac", "--claims", "exact optimun"), "did you mean exact optimum?"),
    (("sweep", "sac", *SMALL, "--seeds", 0), "--seeds must be >= 1, got 0"),
    (("compare",), "compare needs methods"),
    (("compare", "sac", "sac"), "a method is named twice"),
    (("compare", "sac", "pppo", "--env.id", BANDIT), "unknown method 'pppo': did you mean ppo"),
    (("compare", "sac", "--env.id", BANDIT, "--seeds", 0), "--seeds must be >= 1"),
    (("compare", "sac", "--env.id", BANDIT, "--engine", "cloud"), "processes"),
]


@pytest.mark.parametrize(("arguments", "clause"), BAD, ids=lambda part: str(part)[:60])
def test_bad_input(arguments, clause, capsys, tmp_path):
    assert command(*arguments) == 2
    said = capsys.readouterr()
    assert clause in plain(said.err)
    assert "Traceback" not in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_steps_of_a_run_are_named(run_folder, capsys):
    for verb in ("resume", "eval", "export"):
        assert command(verb, run_folder, "--step", 7) == 2
        assert "has no checkpoint of step 7: it has [400]" in capsys.readouterr().err


def test_a_damaged_config_is_named(run_folder, capsys):
    (run_folder / "config.json").write_text("{")
    assert command("resume", run_folder) == 2
    assert "is not valid JSON" in capsys.readouterr().err


# ---- other ends


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(arguments):
        raise RuntimeError("a defect")

    monkeypatch.setitem(cli.VERBS, "list", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        command("list")


def test_an_interrupt_has_its_status(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "list", interrupted)
    assert command("list") == 130
