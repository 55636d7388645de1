"""`python -m esscher.runtime.worker RUN`: bring one run folder to its end, in this process."""

import ctypes
import os
import signal
import sys

from esscher.errors import UserError
from esscher.runtime.jobs import work
from esscher.runtime.run import Interrupted

PR_SET_PDEATHSIG = 1


def stop_with_parent() -> None:
    """Ask Linux for a SIGTERM when whoever started this dies, so that no run is orphaned."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(130)


if __name__ == "__main__":
    stop_with_parent()
    try:
        work(sys.argv[1])
    except UserError as error:
        sys.exit(f"esscher: {error}")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
