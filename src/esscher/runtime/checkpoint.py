"""Checkpoints that survive a kill at any moment, load without executing code, and detect damage.

    RUN/checkpoints/step_000010000/state.safetensors    every tensor of the run
    RUN/checkpoints/step_000010000/manifest.json        scalars, versions, digests; written last
    RUN/experience/rows_0_10000.safetensors             transitions, written once and shared

A checkpoint is written under another name and renamed when complete; transitions are appended as
row files that a manifest lists, so that saving a replay of a million rows costs only the new ones.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from esscher import __version__
from esscher.errors import UserError, disk_full
from esscher.runtime.state import State

ROWS_A_FILE = 65_536
"""Bounds the memory that serialising transitions takes, whatever the size of the replay."""


class Rows(Protocol):
    """An experience whose rows are saved as they come (see Replay)."""

    num_added: int

    @property
    def capacity(self) -> int: ...

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Tensor]]: ...

    def put_rows(self, start: int, columns: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and found whole."""

    step: int
    state: State
    meta: dict[str, Any]
    row_files: list[dict[str, Any]]


def save(
    run: Path, step: int, state: State, meta: dict[str, Any], rows: Rows | None, keep: int
) -> Path:
    """Write a checkpoint, then remove those beyond the newest `keep`.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step_{step:09d}"
    if (target / "manifest.json").exists():
        return target  # Written by the run that this one resumes: equal by construction.
    writing = target.with_name(".writing")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        row_files = _save_rows(run, rows) if rows is not None else []
        tensors = {k: v.cpu().contiguous() for k, v in state.items() if isinstance(v, Tensor)}
        payload = save_tensors(_without_sharing(tensors))
        _write(writing / "state.safetensors", payload)
        manifest = {
            "esscher_version": __version__,
            "step": step,
            "plain": {k: v for k, v in state.items() if not isinstance(v, Tensor)},
            "digest": hashlib.sha256(payload).hexdigest(),
            "row_files": row_files,
            "machine": machine(),
            **meta,
        }
        manifest["manifest_digest"] = _digest_of(manifest)
        _write(writing / "manifest.json", json.dumps(manifest, indent=1).encode())
        os.replace(writing, target)
        _sync(target.parent)
    except OSError as error:
        shutil.rmtree(writing, ignore_errors=True)
        if not disk_full(error):
            raise
        last = steps(run)
        kept = (
            f"the last complete checkpoint is step {last[-1]}" if last else "none is complete yet"
        )
        raise UserError(
            f"no space left to write the checkpoint of step {step} under {run}: {kept}; free some "
            f"space, then esscher resume {run}"
        ) from error
    _prune(run, keep)
    return target


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if (f / "manifest.json").exists())


def load(run: Path, step: int | None = None) -> Checkpoint:
    """Read a checkpoint (the newest by default) and verify every digest but those of the rows.

    Raises:
        UserError: none there, damaged, a pickle, or written by another version.
    """
    available = steps(run)
    if not available:
        raise UserError(f"{run} holds no complete checkpoint")
    if step is not None and step not in available:
        raise UserError(f"{run} has no checkpoint of step {step}: it has {available}")
    step = available[-1] if step is None else step
    folder = run / "checkpoints" / f"step_{step:09d}"
    others = [s for s in available if s != step]
    remedy = f"use an older one: --step {others[-1]}" if others else "the run has no other"
    manifest = _read_manifest(folder / "manifest.json", remedy)
    if _minor(manifest["esscher_version"]) != _minor(__version__):
        raise UserError(
            f"{folder} was written by esscher {manifest['esscher_version']} and this is "
            f"{__version__}: install that version to go on with it"
        )
    payload = _read_verified(folder / "state.safetensors", manifest["digest"], remedy)
    state: State = {**load_tensors(payload), **manifest["plain"]}
    meta = {k: v for k, v in manifest.items() if k not in ("plain", "digest", "row_files")}
    return Checkpoint(step, state, meta, manifest["row_files"])


def discard_after(run: Path, step: int) -> None:
    """Remove the checkpoints that are newer than `step`, when a run goes back to an older one."""
    for newer in steps(run):
        if newer > step:
            _remove(run, newer)


def load_rows(run: Path, checkpoint: Checkpoint, rows: Rows) -> None:
    """Put the transitions that a checkpoint lists back into an experience."""
    for entry in checkpoint.row_files:
        payload = _read_verified(run / "experience" / entry["file"], entry["digest"], "")
        rows.put_rows(entry["start"], load_tensors(payload))


def machine() -> dict[str, Any]:
    """What bit-for-bit equality depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "system": platform.system(),
    }


def require_unchanged(what: str, held: str, then: str, now: str) -> None:
    """Raise unless what a run began with still has the digest of then.

    Raises:
        UserError: it holds other weights, demonstrations, samples.
    """
    if then != now:
        raise UserError(
            f"{what} {held} than when this run began: put those back, or start a new run"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    _write(temporary, text.encode())
    os.replace(temporary, path)


def _save_rows(run: Path, rows: Rows) -> list[dict[str, Any]]:
    """Write the rows that no earlier checkpoint wrote; list all files that hold living rows."""
    folder = run / "experience"
    folder.mkdir(exist_ok=True)
    known = steps(run)
    listed: list[dict[str, Any]] = []
    if known:
        manifest = run / "checkpoints" / f"step_{known[-1]:09d}" / "manifest.json"
        listed = _read_manifest(manifest, "")["row_files"]
    oldest = max(0, rows.num_added - rows.capacity)
    listed = [entry for entry in listed if entry["stop"] > oldest]
    start = max(oldest, listed[-1]["stop"] if listed else 0)
    while start < rows.num_added:
        stop = min(start + ROWS_A_FILE, rows.num_added)
        for piece in rows.rows(start, stop):
            count = len(piece["reward"])
            name = f"rows_{start}_{start + count}.safetensors"
            payload = save_tensors({k: v.cpu().contiguous() for k, v in piece.items()})
            _write(folder / f".{name}.writing", payload)
            os.replace(folder / f".{name}.writing", folder / name)
            digest = hashlib.sha256(payload).hexdigest()
            listed.append({"file": name, "start": start, "stop": start + count, "digest": digest})
            start += count
    _sync(folder)
    return listed


def _prune(run: Path, keep: int) -> None:
    available = steps(run)
    for step in available[:-keep]:
        _remove(run, step)
    needed = set()
    for step in available[-keep:]:
        manifest = _read_manifest(run / "checkpoints" / f"step_{step:09d}" / "manifest.json", "")
        needed |= {entry["file"] for entry in manifest["row_files"]}
    for path in (run / "experience").glob("*rows_*"):
        if path.name not in needed:
            path.unlink()


def _remove(run: Path, step: int) -> None:
    """Rename first, so that a kill half-way never leaves half a checkpoint under its name."""
    removing = run / "checkpoints" / ".removing"
    shutil.rmtree(removing, ignore_errors=True)
    os.replace(run / "checkpoints" / f"step_{step:09d}", removing)
    shutil.rmtree(removing)


def _read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = manifest.pop("manifest_digest") == _digest_of(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole, manifest = False, {}
    if not whole:
        raise UserError(f"{path} is damaged (its digest does not match); {remedy}".rstrip("; "))
    return manifest


def _read_verified(path: Path, digest: str, remedy: str) -> bytes:
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}".rstrip("; ")) from None
    if hashlib.sha256(payload).hexdigest() != digest:
        if _is_pickle(payload):
            raise UserError(
                f"{path} is a pickle, which could run code when loaded: Esscher reads safetensors only"
            )
        raise UserError(f"{path} is damaged (its digest does not match); {remedy}".rstrip("; "))
    try:
        load_tensors(payload)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    return payload


def _is_pickle(payload: bytes) -> bool:
    # A safetensors file may start with 0x80 too, but its first eight bytes are a small number.
    return payload[:4] == b"PK\x03\x04" or (payload[:1] == b"\x80" and any(payload[4:8]))


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The format refuses tensors that share memory; views of one storage are copied."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _write(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
