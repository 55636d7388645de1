"""A paper's central claim in miniature, as data: what runs, what is measured, what must hold."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esscher.experiment import Experiment
from esscher.files import readable

Figures = Mapping[str, Mapping[str, Sequence[float]]]
"""Arm -> name of the figure -> one value a seed."""


@dataclass(frozen=True)
class Check:
    """One inequality of a claim, with the value it was tried on."""

    name: str
    """What is checked; `seed 0` is the first of the claim's (the record names the seed itself)."""
    value: float
    rule: str
    """The inequality in words and numbers, as it stands in the sheet."""
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Several experiments, and what must hold of their figures."""

    name: str
    statement: str
    arms: Mapping[str, Callable[[int], Experiment]]
    """Name -> experiment of a seed; the method and what it is compared with."""
    measure: Callable[["FinishedRun"], Mapping[str, float]]
    """Finished run -> figures."""
    judge: Callable[[Figures], Sequence[Check]]
    num_seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Proof:
    """All claims of a paper that are tried; it is reproduced if every check of every one passes."""

    claims: tuple[Claim, ...]
    notes: str = ""
    """What a reader should know: deviations from the sheet and why."""


@dataclass(frozen=True)
class FinishedRun:
    """What a claim may read of a run."""

    folder: Path

    @property
    def experiment(self) -> Experiment:
        from esscher.runtime.run import read_experiment

        return read_experiment(self.folder)

    @property
    def learner(self) -> Any:
        """The trained method, from the last checkpoint."""
        from esscher.runtime.load import load

        return load(self.folder).method

    def rows(self, phase: str) -> list[dict[str, Any]]:
        """Metrics rows of a phase, "train" or "evaluate"."""
        path = self.folder / "metrics.jsonl"
        with readable(f"{path} is damaged", f": remove {self.folder}, to run it again"):
            lines = path.read_text(encoding="utf-8").splitlines()
            return [row for row in map(json.loads, lines) if row["phase"] == phase]


def returns_of(run: FinishedRun) -> dict[str, float]:
    """The usual figure: mean return of the last evaluation."""
    return {"return": run.rows("evaluate")[-1]["return_mean"]}


def within(name: str, value: float, low: float, high: float) -> Check:
    """Low < value < high."""
    return Check(name, value, f"{low:g} < x < {high:g}", low < value < high)
