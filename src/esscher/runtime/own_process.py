"""What a process that only does Esscher's work sets for itself."""

import atexit
import gc
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import NoReturn

PACKAGE = str(Path(__file__).parents[1]) + os.sep


def collect_seldom() -> None:
    """Look for unreachable cycles less often than Python does by itself.

    Hundreds of thousands of objects that libraries create as they are imported stay to the end, and to
    look through them again and again takes a fifth of the time until the first step.
    """
    gc.set_threshold(50_000, 10, 10)


def warn_in_one_sentence() -> None:
    """Show this library's own warnings without the line of code that they come from."""
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is UserWarning and filename.startswith(PACKAGE):
            return f"esscher: warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def started() -> bool:
    """Whether a launcher (Accelerate's or torchrun) has started this process beside others."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def leave(status: int) -> NoReturn:
    """End one of several processes that train together, without taking Python's objects apart.

    A thread of torch's process group that lets go of its last tensor while Python takes itself apart
    ends the process by SIGABRT, and a launcher then stops the others: a run that had succeeded fails.
    Threads are waited for and what is registered in `atexit` is done, as in every process.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
