"""The command: a thin table of verbs. Nothing heavy is imported before the verb needs it.

Exit status: 0 done; 1 a defect (with its traceback); 2 bad input (one sentence); 3 a proof that was
not reproduced; 4 a sweep or comparison with failed runs; 130 interrupted, and saved.
"""

import os
import sys
from collections.abc import Callable, Sequence

from esscher import __version__
from esscher.cli.catalogue import list_methods, show_method
from esscher.cli.logged_data import handle_data
from esscher.cli.many_runs import compare_methods, prove_claims, report_runs, sweep_settings
from esscher.cli.options import INTERRUPTED
from esscher.cli.trained import evaluate_run, export_run, sample_run
from esscher.cli.training import resume_run, run_method
from esscher.errors import UserError, nearest
from esscher.runtime.own_process import collect_seldom, leave, started, warn_in_one_sentence

VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "list": list_methods,
    "show": show_method,
    "run": run_method,
    "resume": resume_run,
    "eval": evaluate_run,
    "sample": sample_run,
    "prove": prove_claims,
    "sweep": sweep_settings,
    "compare": compare_methods,
    "report": report_runs,
    "export": export_run,
    "data": handle_data,
}


def main() -> None:
    """Entry point of `esscher`."""
    collect_seldom()
    warn_in_one_sentence()
    status = run_command(sys.argv[1:])
    if started():
        leave(status)
    sys.exit(status)


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status."""
    status, said = _ended(arguments)
    # One of several processes tells the one that started them, which says once what all have to say.
    if "ESSCHER_STATUS_FOLDER" in os.environ:
        from esscher.runtime.launch import leave_status

        leave_status(status, said)
    elif said:
        print(f"esscher: {said}", file=sys.stderr)
    return status


def _ended(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status, and what there is to complain of."""
    try:
        status = _dispatch(list(arguments))
        sys.stdout.flush()
        return status, ""
    except UserError as error:
        return 2, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    except BrokenPipeError:  # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if arguments[0] == "--version":
        print(f"esscher {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown command {verb!r}: {nearest(verb, VERBS)}")
    return VERBS[verb](rest) or 0


def _print_usage() -> None:
    print("usage: esscher COMMAND [options]      (esscher COMMAND --help tells more)\n")
    for verb, function in VERBS.items():
        print(f"  {verb:<8} {(function.__doc__ or '').strip().splitlines()[0]}")
    print(
        "\nStart with: esscher list, or: "
        "esscher run sac --env.id Pendulum-v1 --steps 5000 --method.warmup 500"
    )
