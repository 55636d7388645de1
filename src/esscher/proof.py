"""A paper's central claim in miniature, as data: what runs, what is measured, what must hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esscher.experiment import Experiment

Figures = Mapping[str, Mapping[str, Sequence[float]]]
"""Arm -> name of the figure -> one value a seed."""


@dataclass(frozen=True)
class Check:
    """One inequality of a claim, with the value it was tried on."""

    name: str
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
    measure: Callable[[Path], Mapping[str, float]]
    """Finished run folder -> figures."""
    judge: Callable[[Figures], Sequence[Check]]
    num_seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Proof:
    """All claims of a paper that are tried; it is reproduced if every check of every one passes."""

    claims: tuple[Claim, ...]
    notes: str = ""
    """What a reader should know: deviations from the sheet and why."""


def returns_of(run: Path) -> dict[str, float]:
    """The usual figure: mean return of the last evaluation."""
    from esscher.runtime.run import read_result

    result = read_result(run)
    assert result is not None
    return {"return": result.evaluation.mean}


def within(name: str, value: float, low: float, high: float) -> Check:
    """low < value < high."""
    return Check(name, value, f"{low:g} < x < {high:g}", low < value < high)
