"""Several commands in turn, each by the same two processes.

    python -m torch.distributed.run --nproc-per-node 2 together.py JSON

To start two processes takes longer than most runs that tests make.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from esscher.cli import run_command
from esscher.runtime.own_process import collect_seldom

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What Accelerate's launcher tells processes that are to hold a part of the weights each."""


def together(
    commands: Sequence[Sequence[str]], sharded: Sequence[Sequence[str]] = ()
) -> "subprocess.Popen[str]":
    """Start them, those with whole weights first; the status is that of the first that fails."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, __file__, json.dumps([commands, sharded])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ESSCHER_TYPECHECK": "0", "OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    collect_seldom()
    for told, lines in zip(({}, SHARDED), json.loads(sys.argv[1]), strict=True):
        os.environ.update(told)
        for line in lines:
            if status := run_command(line):
                sys.exit(status)
