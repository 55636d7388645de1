"""Several commands in turn, each by the same two processes.

    python -m torch.distributed.run --nproc-per-node 2 together.py JSON

To start two processes takes longer than most runs that tests make.
"""

import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from esscher.cli import run_command
from esscher.runtime.own_process import leave

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What Accelerate's launcher tells processes that are to hold a part of the weights each."""


def together(
    commands: Sequence[Sequence[str]], *, sharded: bool = False
) -> "subprocess.Popen[str]":
    """Start them; the status is that of the first one that fails."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    own = {"ESSCHER_TYPECHECK": "0", "OMP_NUM_THREADS": "1", **(SHARDED if sharded else {})}
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, __file__, json.dumps(commands)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )


if __name__ == "__main__":
    faulthandler.enable()
    for line in json.loads(sys.argv[1]):
        if status := run_command(line):
            leave(status)
    leave(0)
