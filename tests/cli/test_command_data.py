"""esscher data: collect, combine, show; its help, and its bad input."""

import contextlib
import io
import re
import sys

import minari
import numpy as np
import pytest
from command_line import BANDIT, SMALL, SMALL_METHOD, command, plain

import esscher
from esscher.cli import logged_data
from esscher.runtime import collect as collecting


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of SAC on a task of single steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    options = ("--directory", folder, "--checkpoint.every", 12)
    with contextlib.redirect_stdout(io.StringIO()):
        assert command("run", "sac", *SMALL, *SMALL_METHOD, *options) == 0
    return folder


# ---- help


def test_help_names_every_word(capsys):
    assert command("data", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: esscher data WORD")
    for word in ("collect", "combine", "show"):
        assert f"\n  {word} " in shown


OPTIONS = {
    "collect": [
        *("--out", "--policy {agent,random,replay}", "--episodes", "--step", "--seed"),
        *("--stochastic", "--deterministic", "--reference", "--step-limit"),
    ],
    "combine": ["--out", "--reference"],
    "show": ["--env.id", "--env.kwargs"],
}


@pytest.mark.parametrize("word", logged_data.DATA_WORDS)
def test_help_of_every_word(word, capsys):
    assert command("data", word, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: esscher data {word}")
    for option in OPTIONS[word]:
        assert option in shown
    assert "--no-" not in shown


# ---- use


def test_collect_show_and_combine(run, capsys, tmp_path):
    assert command("data", "collect", run, "--episodes", 30, "--out", "bandit/agent-v0") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("bandit/agent-v0: 30 episodes, 30 steps, return -")
    assert said[1:] == [f"set: {tmp_path}/minari/bandit/agent-v0", "data: minari:bandit/agent-v0"]
    sets = {
        "random": ("--policy", "random", "--episodes", 40, "--reference", -10, 0),
        "mode": ("--deterministic", "--episodes", 5, "--seed", 4),
        "early": ("--stochastic", "--episodes", 6, "--step", 12),
        "replay": ("--policy", "replay"),
    }
    for name, options in sets.items():
        assert command("data", "collect", run, *options, "--out", f"bandit/{name}-v0") == 0
    names = [f"bandit/{name}-v0" for name in ("agent", "random")]
    assert command("data", "combine", *names, "--out", "bandit/both-v1") == 0
    assert "bandit/both-v1: 70 episodes, 70 steps" in capsys.readouterr().out
    found = {name: minari.load_dataset(f"bandit/{name}-v0") for name in ("agent", *sets)}
    told = {name: one.storage.metadata["esscher"] for name, one in found.items()}
    assert [told[n]["stochastic"] for n in ("agent", "mode", "early")] == [True, False, True]
    assert [told[n]["step"] for n in ("agent", "early", "random")] == [24, 12, None]
    assert [told[n]["seed"] for n in ("agent", "mode", "replay")] == [1, 4, None]
    assert found["replay"].total_steps == 24  # every step of the run
    # One policy without noise in one state: one action.
    modes = {float(e.actions[0, 0]) for e in found["mode"].iterate_episodes()}
    assert len(modes) == 1
    assert modes.pop() == pytest.approx(float(esscher.load(run).policy.predict(np.zeros(1))[0][0]))

    assert command("data", "show", "minari:bandit/both-v1", "--env.id", BANDIT) == 0
    shown = plain(capsys.readouterr().out)
    assert "minari:bandit/both-v1" in shown and f"task fits {BANDIT}" in shown
    assert " steps 70 " in shown and " terminated 100.0% of episodes " in shown
    returns = [
        float(e.rewards[0]) for e in minari.load_dataset("bandit/both-v1").iterate_episodes()
    ]
    mean, std = np.mean(returns), np.std(returns)
    assert f"return {mean:,.1f} +- {std:,.1f} ({min(returns):,.1f} to {max(returns):,.1f})" in shown
    assert "return -10.0 counts as 0, 0.0 as 100" in shown
    score = float(re.search(r"score (-?[\d.]+)", shown)[1])
    assert score == pytest.approx(100 * (mean + 10) / 10, abs=0.06)


def test_show_of_a_file(capsys):
    np.savez(
        "mine.npz",
        observations=np.zeros((5, 3)),
        next_observations=np.zeros((5, 3)),
        actions=np.zeros((5, 2)),
        rewards=[1, 2, 3, 4, 6],
        terminals=[0, 1, 0, 0, 0],
        timeouts=[0, 0, 0, 0, 1],
    )
    assert command("data", "show", "mine.npz") == 0
    shown = plain(capsys.readouterr().out)
    for words in (
        "mine.npz steps 5 episodes 2",
        "return 8.0 +- 5.0 (3.0 to 13.0)",
        "length 2.5 +- 0.5 (2.0 to 3.0)",
        "terminated 50.0% of episodes truncated 50.0% of episodes",
        "observation 3 numbers action 2 numbers reference none stated",
        "task not checked (--env.id ID does)",
    ):
        assert words in shown
    assert command("data", "show", "mine.npz", "--env.id", "Pendulum-v1") == 2
    said = capsys.readouterr().err
    assert "actions of 2 numbers, and the task's are of 1 number: choose the task" in said


def test_an_interrupt_says_that_nothing_is_left(run, capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(collecting.Writer, "add", interrupted)
    assert command("data", "collect", run, "--out", "bandit/a-v0") == 130
    assert "esscher: stopped; nothing was written under bandit/a-v0" in capsys.readouterr().err
    assert [path for path in (tmp_path / "minari").rglob("*") if path.is_file()] == []


# ---- bad input: status 2, one clear sentence, nothing written


BAD = [
    ((), "WORD is missing: esscher data collect|combine|show"),
    (("colect", "RUN"), "data knows no 'colect': did you mean collect?"),
    (("list",), "data knows no 'list': known: collect, combine, show"),
    (("collect",), "RUN is missing: esscher data collect RUN --out NAME"),
    (("collect", "nowhere"), "--out"),
    (("collect", "nowhere", "--out", "drive/expert-v0"), "nowhere is not a run folder"),
    (
        ("collect", "RUN", "--out", "hopper"),
        "'hopper' is not a name of a Minari set: write it like",
    ),
    (("collect", "RUN", "--out", "a/bc-v0", "--policy", "agnet"), "agent"),
    (("collect", "RUN", "--out", "ab/c-v0", "--episodes", 0), "--episodes must be >= 1, got 0"),
    (("collect", "RUN", "--out", "ab/c-v0", "--step", 7), "it has [12, 24]"),
    (
        ("collect", "RUN", "--out", "ab/c-v0", "--stochastic", "--deterministic"),
        "--stochastic and --deterministic exclude each other",
    ),
    (("collect", "RUN", "--out", "ab/c-v0", "--reference", 5, 1), "LOW < HIGH, got 5 1"),
    (("combine", "ab/c-v0", "ab/d-v0"), "--out"),
    (("combine", "ab/c-v0", "--out", "ab/e-v0"), "combine needs two sets or more"),
    (("show",), "SOURCE is missing: esscher data show SOURCE"),
    (("show", "nowhere.hdf5"), "no data file 'nowhere.hdf5' here"),
    (("show", "nothing"), "no data 'nothing' here: give minari:NAME, FILE.hdf5, a FOLDER"),
    (("show", "minari:nowhere-v0", "--env.id", "Pendulm-v1"), "did you mean Pendulum-v1"),
]


@pytest.mark.parametrize(("arguments", "clause"), BAD, ids=lambda part: str(part)[:60])
def test_bad_input(arguments, clause, capsys, tmp_path, run):
    assert command("data", *(run if word == "RUN" else word for word in arguments)) == 2
    said = capsys.readouterr()
    assert clause in plain(said.err)
    assert "Traceback" not in said.err and said.out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_not_installed(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for arguments in (
        ("collect", run, "--out", "drive/expert-v0"),
        ("show", "minari:drive/expert-v0"),
    ):
        assert command("data", *arguments) == 2
        assert 'needs minari: pip install "esscher[control]"' in capsys.readouterr().err


# ---- demonstrations


def test_demonstrations_are_collected_and_shown(capsys):
    asked = ("toy_robots:drive", "toy_robots:stop", "--episodes", 2, "--images", 6, 8)
    assert command("data", "collect", *asked, "--out", "set") == 0
    told = plain(capsys.readouterr().out)
    assert re.search(r"set: 4 episodes, \d+ steps, 4 solved their task; 0 failed attempts", told)
    assert command("data", "show", "set") == 0
    shown = plain(capsys.readouterr().out)
    for text in ("'drive', 2 episodes, played in toy_robots:drive", "4 of 4 episodes"):
        assert text in shown
    assert "6 x 8, of front, hand" in shown and "the task's box" in shown


def test_states_of_an_expert_are_a_minari_set(capsys):
    assert (
        command("data", "collect", "toy_robots:drive", "--episodes", 2, "--out", "drive/expert-v0")
        == 0
    )
    assert "data: minari:drive/expert-v0" in plain(capsys.readouterr().out)
    assert command("data", "show", "minari:drive/expert-v0") == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("toy_robots:drive", "--images", 1, 2, 3),
            "--images takes one number or rows and columns",
        ),
        (("toy_robots:drive", "--images", 9), "has images of 6 x 8, not 9 x 9"),
        (("toy_robots:missing", "--images", 9), "cannot be imported"),
        (("toy_robots:drive", "--images", 6, 8, "--cameras", "top"), "not by top"),
    ],
)
def test_demonstrations_that_cannot_be_had(options, told, capsys):
    assert command("data", "collect", *options, "--out", "set") == 2
    assert told in plain(capsys.readouterr().err)


def test_a_stopped_collection_says_how_to_go_on(monkeypatch, capsys):
    import toy_robots

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy_robots.Point, "expert", stopped)
    asked = ("toy_robots:drive", "--episodes", 2, "--images", 6, 8, "--out", "set")
    assert command("data", "collect", *asked) == 130
    assert "the same command goes on" in plain(capsys.readouterr().err)
