"""Run folders as records: what was configured, what was logged, and how far the run came."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from esscher.errors import UserError
from esscher.files import readable
from esscher.registry import catalogue, declared


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run folder.

    `steps` and `returns` are the learning curve (shape: points): evaluation returns, or the
    training returns when the run was never evaluated (`returns_from` says which). Rows that a
    resumed run logged a second time are kept once; `step` counts through all stages of a run.
    """

    folder: Path
    slug: str
    label: str | None
    env: str
    seed: int
    config: dict[str, Any]
    training: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    result: dict[str, Any] | None
    steps: np.ndarray
    returns: np.ndarray
    returns_from: Literal["evaluate", "train", "none"]
    unreadable_lines: int

    @property
    def name(self) -> str:
        """The name shown to a reader: the label if the run has one, else the method's slug."""
        return self.label or self.slug

    @property
    def world(self) -> str:
        """What the method is about: "control", "language", "diffusion", "sets" or "robots". A method
        that this catalogue does not have counts as a controller.
        """
        return (
            declared(self.slug).get("world", "control") if self.slug in catalogue() else "control"
        )

    @property
    def model(self) -> str | None:
        """What a language or diffusion model was before; None of a controller."""
        return ((self.config.get("stages") or [{}])[-1].get("model") or {}).get("source")

    @property
    def measure(self) -> str:
        """What the numbers of its curve are: "return", or what its evaluations say."""
        return str(next((row["measure"] for row in self.evaluations if "measure" in row), "return"))

    def samples(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """What a language model wrote at its first and its last evaluation: step, samples."""
        files = sorted((self.folder / "samples").glob("step_*.json"))
        ends = files[:1] + files[1:][-1:]
        return [(int(path.stem[5:]), _read_json(path)) for path in ends]

    def drawn(self) -> list[tuple[int, Path]]:
        """What was drawn at the first and the last evaluation, from the same noise: step, picture."""
        files = sorted((self.folder / "samples").glob("step_*.png"))
        return [(int(path.stem[5:]), path) for path in files[:1] + files[1:][-1:]]

    def figures(self) -> list[Path]:
        """What the method drew of itself."""
        return sorted((self.folder / "figures").glob("*.png"))

    @property
    def finished(self) -> bool:
        """Whether the run reached its end (its `result.json` says so)."""
        return self.result is not None and self.result.get("status") == "finished"

    @property
    def last_step(self) -> int:
        """The last step that left a trace in the folder."""
        steps = [row.get("steps", row.get("step", 0)) for row in self._last_rows()]
        return int(max(steps, default=0))

    @property
    def seconds(self) -> float:
        """Wall time of the run so far in seconds; nan if it logged none."""
        seconds = [row["seconds"] for row in self._last_rows() if "seconds" in row]
        return float(max(seconds, default=np.nan))

    @property
    def steps_per_second(self) -> float:
        """Steps over wall time, evaluation included; nan if the run logged no time."""
        return self.last_step / self.seconds if self.seconds > 0 else float("nan")

    @property
    def status(self) -> str:
        """Either "finished" or "unfinished at step N"."""
        return "finished" if self.finished else f"unfinished at step {self.last_step:,}"

    def metric_names(self) -> list[str]:
        """Names of the scalars in the training rows, in order of appearance, counters left out."""
        counters = {"phase", "step", "updates", "seconds", "episodes", "return"}
        return [
            name
            for name in dict.fromkeys(name for row in self.training for name in row)
            if name not in counters and any(_is_number(row.get(name)) for row in self.training)
        ]

    def metric(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one training scalar (shape: points), non-finite values left out."""
        return _curve(self.training, name)

    def distances(self) -> np.ndarray:
        """Of each evaluation that says so, a row (shape: evaluations, 4): step, KL to the model of
        before in nats, what was reached, and what a judge says of it that nothing learns from (NaN:
        there is none).
        """
        rows = [row for row in self.evaluations if _is_number(row.get("kl_to_reference"))]
        names = ("step", "kl_to_reference", "return_mean", "judge_mean")
        found = [[row.get(name, np.nan) for name in names] for row in rows]
        return np.array(found, dtype=float).reshape(-1, 4)

    def _last_rows(self) -> list[dict[str, Any]]:
        result = [self.result] if self.result else []
        return [*self.training[-1:], *self.evaluations[-1:], *result]


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Run folders at or below the given paths: those whose `config.json` names a "slug".

    Raises: UserError if a path does not exist or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist; give a run folder or a folder of run folders")
        below = list(_walk(path))
        if not below:
            raise UserError(
                f'{path} holds no run: no config.json with a "slug" at or below it; '
                "give a folder that `esscher run` wrote"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read_run(folder: Path | str) -> RunRecord:
    """Reads one run folder; a run that is still going, or was killed, is read as far as it came.

    Raises: UserError if the folder is not a run.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if config is None:
        raise UserError(
            f'{folder} is no run folder: it needs a config.json with a "slug"; '
            "give a folder that `esscher run` wrote, or find_runs() one above it"
        )
    result = _read_json(folder / "result.json") if (folder / "result.json").exists() else None
    rows, unreadable_lines = _read_rows(folder / "metrics.jsonl")
    training = _latest_history(row for row in rows if row.get("phase") == "train")
    evaluations = _latest_history(row for row in rows if row.get("phase") == "evaluate")
    source: Literal["evaluate", "train", "none"] = "evaluate"
    steps, returns = _curve(evaluations, "return_mean")
    if not len(steps):
        steps, returns = _curve(training, "return")
        source = "train" if len(steps) else "none"
    return RunRecord(
        folder=folder,
        slug=str(config["slug"]),
        label=config.get("label") or None,
        env=_task_name(config, result),
        seed=int(config.get("seed") or 0),
        config=config,
        training=training,
        evaluations=evaluations,
        result=result,
        steps=steps,
        returns=returns,
        returns_from=source,
        unreadable_lines=unreadable_lines,
    )


def _walk(path: Path) -> Iterable[Path]:
    """Run folders at or below a path, sorted; what lies inside a run (a checkpoint) is no run."""
    if not path.is_dir():
        return
    if _read_config(path) is not None:
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from _walk(child)


def _read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run folder, None if the folder is not one."""
    path = folder / "config.json"
    config = _read_json(path) if path.is_file() else None
    return config if isinstance(config, dict) and config.get("slug") else None


def _read_json(path: Path) -> Any:
    with readable(f"{path} is not valid JSON", "; restore it or move its folder out of the way"):
        return json.loads(path.read_text(encoding="utf-8"))


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of a metrics file, and how many lines before the last one could not be read.

    A killed run may leave its last line half written, so that one is dropped without a word.
    """
    if not path.exists():
        return [], 0
    lines = path.read_bytes().decode("utf-8", errors="replace").rstrip("\n").split("\n")
    rows = [_read_row(line) for line in lines]
    return [row for row in rows if row], sum(
        row is None and bool(line.strip()) for row, line in zip(rows[:-1], lines[:-1], strict=True)
    )


def _read_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and _is_number(row.get("step")) else None


def _latest_history(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Rows in order of step; a run resumed from an earlier checkpoint replaces what it repeats."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return tuple(kept)


def _curve(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if _is_number(row.get(name))]
    points = [point for point in points if np.isfinite(point[1])]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _task_name(config: dict[str, Any], result: dict[str, Any] | None) -> str:
    """What the run was about: its environment, else its data set, else "unnamed task"."""
    if result and result.get("env"):
        return str(result["env"])
    for stage in reversed(config.get("stages") or []):
        for key in ("env", "data", "task"):
            value = stage.get(key)
            value = value.get("id") or value.get("name") if isinstance(value, dict) else value
            if value:
                return str(value)
    return "unnamed task"
