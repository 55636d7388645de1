"""What only a process of its own can show: signals, a light start, a closed pipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import SMALL, SMALL_METHOD, command

from support import assert_same_run

ESSCHER = Path(sys.executable).with_name("esscher")


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_list_loads_nothing_heavy():
    done = python(
        "import sys\n"
        "from esscher.cli import run_command\n"
        "code = run_command(['list'])\n"
        "heavy = {'torch', 'numpy', 'scipy', 'gymnasium', 'matplotlib', 'ray'} & set(sys.modules)\n"
        "print('loaded:', code, sorted(heavy))\n"
    )
    assert done.stdout.splitlines()[-1] == "loaded: 0 []", done.stdout + done.stderr
    assert " sac " in done.stdout


def test_usage_and_version_load_no_parser_either():
    done = python(
        "import sys\n"
        "from esscher.cli import run_command\n"
        "code = run_command([]) or run_command(['--version'])\n"
        "print('loaded:', code, sorted({'torch', 'numpy', 'tyro', 'rich'} & set(sys.modules)))\n"
    )
    assert done.stdout.splitlines()[-1] == "loaded: 0 []", done.stdout + done.stderr


def test_the_installed_command_and_its_status():
    done = subprocess.run([ESSCHER, "frobnicate"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("esscher: unknown command 'frobnicate'")
    module = [sys.executable, "-m", "esscher.cli", "--version"]
    assert subprocess.run(module, capture_output=True, timeout=120).returncode == 0


def test_a_defect_is_status_1_with_its_traceback():
    done = python(
        "from esscher import cli\n"
        "def broken(arguments): raise RuntimeError('a defect')\n"
        "cli.VERBS['list'] = broken\n"
        "import sys\n"
        "sys.argv = ['esscher', 'list']\n"
        "cli.main()\n"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("RuntimeError: a defect\n")


@pytest.mark.parametrize("arguments", [("--help",), ("list",), ("show", "sac")])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [ESSCHER, *arguments], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


WAITS = """
import time
from pathlib import Path

from esscher.envs import GaussianReward

class Waits(GaussianReward):
    def __init__(self):
        super().__init__()
        self.count = 0

    def step(self, action):
        self.count += 1
        if self.count == 31 and Path("hold").exists():
            Path("reached").touch()
            while Path("hold").exists():
                time.sleep(0.02)
        return super().step(action)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_itself_and_goes_on_exactly(number, monkeypatch, tmp_path, capsys):
    # The task holds the run in its 30th step (one more was spent on trying whether its state can be
    # saved) until the signal is sent: no race, no clock.
    Path("tasks.py").write_text(WAITS)
    Path("hold").touch()
    options = ("--env.id", "tasks:Waits", "--env.max-episode-steps", 20, "--steps", 60)
    arguments = [*SMALL, *SMALL_METHOD, *options, "--log.every", 10, "--checkpoint.every", 0]
    line = [str(part) for part in ("run", "sac", *arguments, "--directory", "stopped")]
    process = subprocess.Popen([ESSCHER, *line], stderr=subprocess.PIPE, text=True)
    try:
        while not Path("reached").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        Path("hold").unlink()
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "esscher: stopped at step 30; esscher resume stopped goes on" in said
    assert [path.name for path in Path("stopped/checkpoints").iterdir()] == ["step_000000030"]
    assert not Path("stopped/result.json").exists()

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
    assert command("resume", "stopped") == 0
    assert "after 60 steps" in capsys.readouterr().out
    # Never stopped: the same numbers throughout.
    assert command("run", "sac", *arguments, "--directory", "whole") == 0
    assert_same_run(Path("stopped"), Path("whole"))
    monkeypatch.delitem(sys.modules, "tasks", raising=False)
