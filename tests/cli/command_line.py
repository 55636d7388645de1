"""The command in this process, and small jobs for it."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from esscher.cli import run_command
from esscher.runtime import jobs

BANDIT = "esscher.envs:QuadraticBandit"
# Options that make a run of a twinkling; the task needs no more than numpy.
SMALL = (
    *("--env.id", BANDIT, "--steps", 24, "--evaluation.episodes", 1),
    *("--runtime.device", "cpu", "--runtime.threads", 1, "--runtime.graph", "eager", "--log.to"),
)
SMALL_METHOD = (
    *("--method.hidden", 8, "--method.warmup", 12),
    *("--method.batch-size", 4, "--method.buffer-size", 100),
)


def command(*arguments: object) -> int:
    """Exit status of one command line."""
    try:
        return run_command([str(argument) for argument in arguments])
    except SystemExit as ended:  # how the option parser leaves
        assert isinstance(ended.code, int)
        return ended.code


def esscher(*arguments: object) -> SimpleNamespace:
    """One command line: its `returncode`, and what it printed, `stdout` and `stderr`."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = command(*arguments)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def plain(text: str) -> str:
    """Without the boxes that options are drawn in, on one line."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


class InThisProcess(jobs._Job):
    """A job that is done when it has been started."""

    started: ClassVar[list[Path]] = []

    def __init__(self, folder: Path):
        InThisProcess.started.append(folder)
        jobs.work(str(folder))

    def finished(self) -> bool:
        return True

    def stop(self) -> None:
        pass


def jobs_in_this_process(monkeypatch: Any) -> list[Path]:
    """Let sweeps run their jobs here; the list of folders they start."""
    monkeypatch.setattr(InThisProcess, "started", [])
    monkeypatch.setattr(jobs, "_start_process", InThisProcess)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    return InThisProcess.started
