"""Reports: read run folders, aggregate them over seeds and tasks, and write one HTML page.

Nothing heavy is imported here; each name below is imported from its module when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aggregate import Interval as Interval
    from .page import write_report as write_report
    from .proof_figure import write_proof_figure as write_proof_figure
    from .runs import RunRecord as RunRecord
    from .runs import find_runs as find_runs
    from .runs import read_run as read_run

_HOMES = {
    "Interval": "aggregate",
    "RunRecord": "runs",
    "find_runs": "runs",
    "read_run": "runs",
    "write_proof_figure": "proof_figure",
    "write_report": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
