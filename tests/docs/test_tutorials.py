"""The tutorials run as they are printed, block after block, in an empty folder."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, blocks

from esscher import cli
from esscher.runtime import jobs

TUTORIALS = sorted(path.stem for path in (ROOT / "docs/tutorials").glob("*.md"))
WITH_BLOCKS = [name for name in TUTORIALS if name != "index"]


class InThisProcess(jobs._Job):
    """A job of `compare` that is done when it has been started."""

    def __init__(self, folder: Path):
        jobs.work(str(folder))

    def finished(self) -> bool:
        return True

    def stop(self) -> None:
        pass


def command(line: str) -> int:
    """Exit status of one line of the shell that calls esscher."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "esscher", line
    try:
        return cli.run_command(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_a_tutorial_runs(name: str, tmp_path: Path, monkeypatch: Any, unchecked: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(jobs, "_start_process", InThisProcess)
    before, names = set(sys.modules), {"__name__": "tutorial"}
    try:
        for block in blocks((ROOT / f"docs/tutorials/{name}.md").read_text(encoding="utf-8")):
            if block.title:
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                exec(compile(block.text, f"{name}.md", "exec"), names)
            else:
                assert block.language == "bash"
                for line in block.text.splitlines():
                    assert command(line) == 0, line
    finally:
        for module in set(sys.modules) - before:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[module]


def test_there_are_three_tutorials() -> None:
    assert WITH_BLOCKS == ["control", "diffusion", "preferences"]
