"""Esscher: published methods for optimising distributions, run on your own task.

>>> import esscher
>>> experiment = esscher.Experiment.of("sac", env="Hopper-v5", steps=100_000)
>>> result = esscher.run(experiment, directory="runs/hopper")
>>> action, _ = esscher.load("runs/hopper").policy.predict(obs, deterministic=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CheckpointConfig": "experiment",
    "EnvConfig": "experiment",
    "EvaluationConfig": "experiment",
    "Experiment": "experiment",
    "LogConfig": "experiment",
    "Stage": "experiment",
    "RuntimeConfig": "runtime.device",
    "Result": "runtime.run",
    "load": "runtime.load",
    "resume": "runtime.run",
    "run": "runtime.run",
    "write_report": "report.page",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from esscher.experiment import (
        CheckpointConfig,
        EnvConfig,
        EvaluationConfig,
        Experiment,
        LogConfig,
        Stage,
    )
    from esscher.report.page import write_report
    from esscher.runtime.device import RuntimeConfig
    from esscher.runtime.load import load
    from esscher.runtime.run import Result, resume, run


def __getattr__(name: str) -> Any:
    """Import on first use: `import esscher` alone loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'esscher' has no attribute {name!r}")
    return getattr(import_module(f"esscher.{_HOMES[name]}"), name)
