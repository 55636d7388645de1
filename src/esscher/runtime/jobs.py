"""Many runs at once: each is a prepared run folder, worked on by `resume` in a process of its own.

A job is only a folder with a config.json, so a killed job is simply resumed, on whatever executes
jobs: processes of this machine, or Ray tasks here or on a cluster.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esscher.adapters.ray_environments import join_ray
from esscher.runtime.own_process import collect_seldom
from esscher.runtime.run import read_experiment, read_result

Engine = Literal["processes", "ray"]


@dataclass(frozen=True)
class Outcome:
    """How one job ended."""

    folder: Path
    error: str | None
    """Last line of what it said before failing; None if it finished."""


Report = Callable[[Path, str, float], None]
"""Told of each job: folder, "running" | "finished" | "failed", and its share done in [0, 1]."""


def run_all(
    folders: Sequence[Path],
    *,
    workers: int,
    engine: Engine = "processes",
    address: str | None = None,
    retries: int = 1,
    report: Report | None = None,
) -> list[Outcome]:
    """Bring every run folder to its end; finished ones are left as they are.

    Args:
        folders: prepared by `write_config`.
        workers: jobs at a time (with Ray on a cluster: its processors decide).
        engine: processes of this machine, or Ray.
        address: of a Ray cluster; None starts one on this machine.
        retries: how often a failed job is resumed before it counts as failed.
        report: called as jobs move on.
    """
    waiting = [f for f in folders if read_result(f) is None]
    done = [Outcome(f, None) for f in folders if f not in waiting]
    for outcome in done:
        if report:
            report(outcome.folder, "finished", 1.0)
    start = _start_process if engine == "processes" else _ray_starter(address)
    attempts = dict.fromkeys(waiting, 0)
    active: dict[Path, _Job] = {}
    before = _sigterm_as_interrupt()
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                folder = waiting.pop(0)
                attempts[folder] += 1
                active[folder] = start(folder)
            for folder, job in list(active.items()):
                if not job.finished():
                    if report:
                        report(folder, "running", share_done(folder))
                    continue
                del active[folder]
                if read_result(folder) is not None:
                    outcome = Outcome(folder, None)
                elif attempts[folder] <= retries:
                    waiting.append(folder)
                    continue
                else:
                    outcome = Outcome(folder, _last_words(folder))
                done.append(outcome)
                if report:
                    report(folder, "failed" if outcome.error else "finished", share_done(folder))
            time.sleep(0.25)
    finally:
        for job in active.values():
            job.stop()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return sorted(done, key=lambda outcome: folders.index(outcome.folder))


def _sigterm_as_interrupt() -> Any:
    """Let SIGTERM unwind like Ctrl-C, so that jobs are stopped; the handler that was there."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, interrupt)


def share_done(folder: Path) -> float:
    """Share of a run's steps that its metrics have reached."""
    if (folder / "result.json").exists():
        return 1.0
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="ignore")
        step = int(text.rpartition('"step": ')[2].partition(",")[0])
    except (OSError, ValueError):
        return 0.0
    return step / read_experiment(folder).stages[-1].steps


def work(folder: str) -> None:
    """What a job does."""
    collect_seldom()
    from esscher.runtime.run import resume

    resume(folder, display=False)


class _Job:
    def finished(self) -> bool:
        raise AssertionError

    def stop(self) -> None:
        raise AssertionError


class _Process(_Job):
    def __init__(self, folder: Path):
        self._log = open(folder / "log.txt", "ab")  # noqa: SIM115
        threads = str(read_experiment(folder).runtime.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "esscher.runtime.worker", str(folder)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def finished(self) -> bool:
        ended = self._process.poll() is not None
        if ended:
            self._log.close()
        return ended

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _start_process(folder: Path) -> _Job:
    return _Process(folder)


class _RayTask(_Job):
    def __init__(self, ray: Any, reference: Any, folder: Path):
        self._ray, self._reference, self._folder = ray, reference, folder

    def finished(self) -> bool:
        ready, _ = self._ray.wait([self._reference], timeout=0)
        if ready:
            try:
                self._ray.get(self._reference)
            except Exception as error:
                with open(self._folder / "log.txt", "a", encoding="utf-8") as log:
                    log.write(f"{error}\n")
        return bool(ready)

    def stop(self) -> None:
        self._ray.cancel(self._reference, force=True)


def _ray_starter(address: str | None) -> Callable[[Path], _Job]:
    ray = join_ray(address)

    def start(folder: Path) -> _Job:
        threads = read_experiment(folder).runtime.threads
        # One fresh process a job: torch's thread count and default generators are its own.
        task = ray.remote(num_cpus=threads, max_calls=1, max_retries=0)(work)
        return _RayTask(ray, task.remote(str(folder.resolve())), folder)

    return start


def _last_words(folder: Path) -> str:
    try:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in reversed(lines) if line.strip()), "ended without a word")
