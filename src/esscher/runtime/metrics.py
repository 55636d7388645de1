"""Training metrics: accumulated on the device, drained to files and trackers."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from esscher.errors import UserError
from esscher.runtime.trackers import Ended, Tracked, begin, check_trackers
from esscher.types import Metrics


class Averager:
    """Running sums of metrics since the last row, kept as tensors so that nothing synchronises."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._episodes: list[tuple[float, int]] = []

    def add(self, metrics: list[Metrics], episodes: list[tuple[float, int]]) -> None:
        """Take in what one iteration reported."""
        for update in metrics:
            for name, value in update.items():
                if name in self._sums:
                    self._sums[name] += value
                    self._counts[name] += 1
                else:
                    self._sums[name] = value.detach().float().clone()
                    self._counts[name] = 1
        self._episodes += episodes

    def drain(self) -> dict[str, float]:
        """Means since the last drain, with the return and length of finished episodes."""
        row = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        if self._episodes:
            count = len(self._episodes)
            row["return"] = sum(value for value, _ in self._episodes) / count
            row["length"] = sum(length for _, length in self._episodes) / count
            row["episodes"] = count
        self._sums, self._counts, self._episodes = {}, {}, []
        return row

    def state_dict(self) -> dict[str, Any]:
        """As plain data: a run may stop between two rows."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"sums": sums, "counts": self._counts, "episodes": self._episodes}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        self._sums = {k: torch.tensor(v, device=device) for k, v in state["sums"].items()}
        self._counts = dict(state["counts"])
        self._episodes = [(float(value), int(length)) for value, length in state["episodes"]]


class MetricsLog:
    """Appends rows to metrics.jsonl and passes them to trackers.

    Args:
        run: the run folder.
        to: trackers to feed.
        name: of the run, for trackers that want one.
        config: of the run, for trackers that show one.
        offset: bytes of metrics.jsonl to keep, the rest being what an interrupted run had written
            after its checkpoint; 0 for a new run.
        step: of that checkpoint.
    """

    def __init__(
        self,
        run: Path,
        to: tuple[str, ...],
        name: str,
        config: dict[str, Any],
        offset: int = 0,
        step: int = 0,
    ):
        check_trackers(to)
        self._file = open(run / "metrics.jsonl", "ab")  # noqa: SIM115
        if self._file.tell() < offset:
            raise UserError(
                f"{run}/metrics.jsonl has {self._file.tell()} bytes, but the checkpoint of step "
                f"{step} was written after {offset}: put the file back, or use an older --step"
            )
        self._file.truncate(offset)
        self._file.seek(offset)
        self._trackers = begin(to, Tracked(run=run, name=name, config=config, step=step))

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; scalars go to the trackers as phase/name."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        scalars = {
            f"{row['phase']}/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "phase")
        }
        for tracker in self._trackers:
            tracker.log(scalars, row["step"])

    def sync(self) -> None:
        """Force the rows to disk, as a checkpoint relies on them."""
        os.fsync(self._file.fileno())

    def close(self, ended: Ended = "finished") -> None:
        """Tell every tracker how the run ended."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close(ended)
