"""How a process ends that is one of several."""

import os
import signal
import subprocess
import sys
import warnings

import pytest

from esscher import cli
from esscher.runtime.own_process import warn_in_one_sentence

SCRIPT = """
import atexit, os, sys, threading, time
sys.argv = ["esscher", "--version"]
from esscher.cli import main
class Fragile:
    def __del__(self, abort=os.abort):
        abort()  # What a thread does that lets go of a tensor while Python takes itself apart.
fragile = Fragile()
atexit.register(print, "registered", end="")
print("not yet flushed", end="|")
def late():
    time.sleep(0.5)
    print("of a thread")
threading.Thread(target=late).start()
main()
"""


@pytest.mark.processes
@pytest.mark.parametrize("launched", [True, False])
def test_it_ends_without_being_taken_apart(launched: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**environment, **({"RANK": "1", "WORLD_SIZE": "2"} if launched else {})},
        check=False,
    )
    assert done.stdout.startswith("not yet flushed|esscher ")
    assert done.stdout.endswith("\nof a thread\nregistered")
    assert done.returncode == (0 if launched else -signal.SIGABRT), "the other way shows the danger"


def test_own_warnings_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # Put back afterwards.
    warn_in_one_sentence()
    told = warnings.formatwarning(UserWarning("too short"), UserWarning, cli.__file__, 3)
    assert told == "esscher: warning: too short\n"
    for category, file in ((UserWarning, __file__), (DeprecationWarning, cli.__file__)):
        told = warnings.formatwarning(category("of others"), category, file, 3)
        assert told.startswith(f"{file}:3: {category.__name__}: of others\n")
