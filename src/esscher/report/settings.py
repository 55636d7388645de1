"""The configurations of runs side by side."""

import json
from collections.abc import Sequence
from typing import Any

from esscher.registry import STAGE_PARTS

from .runs import RunRecord
from .words import listed

NAMES = ("seed", "label", "slug")  # these tell runs apart, so they are not settings


def settings_tables(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Settings of every method: those that differ, those only some have, and all."""
    settings, methods = _values(runs), sorted({run.name for run in runs})
    rows = [
        {"name": name, "values": [" or ".join(values.get(method, ())) for method in methods]}
        for name, values in settings.items()
    ]
    return {
        "methods": methods,
        "differing": [row for row in rows if all(row["values"]) and len(set(row["values"])) > 1],
        "partial": [row for row in rows if not all(row["values"])],
        "all": rows,
    }


def settings_cautions(runs: Sequence[RunRecord]) -> list[str]:
    """Where runs of one name differ, and where methods did not meet the same conditions."""
    cautions = []
    for task, method in sorted({(run.env, run.name) for run in runs}):
        own = [run for run in runs if (run.env, run.name) == (task, method)]
        varying = [name for name, values in _values(own).items() if len(values[method]) > 1]
        slugs = {run.slug for run in own}
        if varying or len(slugs) > 1:
            cautions.append(
                f"Runs called {method} on {task} differ in "
                f"{listed(varying + ['slug'] * (len(slugs) > 1))}: give variants their own label."
            )
    for task in sorted({run.env for run in runs}):
        own = [run for run in runs if run.env == task]
        methods = {run.name for run in own}
        conditions = [
            name
            for name, values in _values(own).items()
            if name.startswith(("stages.", "evaluation."))
            and len({values.get(method) for method in methods}) > 1
        ]
        if conditions:
            cautions.append(
                f"Methods on {task} did not run under equal conditions: {listed(conditions)}."
            )
    return cautions


def _values(runs: Sequence[RunRecord]) -> dict[str, dict[str, tuple[str, ...]]]:
    """{setting: {method: its different values as text, sorted}}."""
    settings: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for name, value in flat(run.config).items():
            if name not in NAMES and not _of_another_world(name, run.world):
                settings.setdefault(name, {}).setdefault(run.name, set()).add(value)
    return {
        name: {method: tuple(sorted(values)) for method, values in by_method.items()}
        for name, by_method in settings.items()
    }


def _of_another_world(name: str, world: str) -> bool:
    """Whether a setting is of a part of a stage that methods of this world do not read: a run records
    all of them.
    """
    start, _, rest = name.partition(".")
    part = rest.split(".")[1] if start == "stages" and rest.count(".") else ""
    every = {part for parts in STAGE_PARTS.values() for part in parts}
    return part in every and part not in STAGE_PARTS[world]


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested configuration as {"stages.0.env.id": text}; a list of plain values is one text."""
    nested = isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(part, dict | list) for part in value)
    )
    if not nested or not value:
        return {prefix: value if isinstance(value, str) and value else json.dumps(value)}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, str] = {}
    for name, part in parts:
        found |= flat(part, f"{prefix}.{name}" if prefix else str(name))
    return found
