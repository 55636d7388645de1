"""Checkpoints: what comes back, what is detected, what is kept."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

import esscher
from esscher.errors import UserError
from esscher.experience import Replay
from esscher.runtime import checkpoint
from esscher.types import Action, Spec
from support import Killed, transitions

SPEC = Spec(obs_shape=(3,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def filled(replay: Replay, count: int, seed: int) -> None:
    rows = transitions(count, seed=seed)
    replay.add(rows, Action(value=rows.action))


def save(run: Path, step: int, replay: Replay | None = None, keep: int = 2, **state: Any) -> Path:
    state = state or {"weight": torch.full((3,), float(step)), "count": step, "rate": 0.1}
    return checkpoint.save(run, step, state, {"note": "x"}, replay, keep)


def held(replay: Replay) -> dict[str, torch.Tensor]:
    pieces = list(replay.rows(replay.num_added - len(replay), replay.num_added))
    return {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}


def test_round_trip(run: Path) -> None:
    state = {
        "a": torch.randn(3, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "negative_zero": torch.tensor([-0.0, float("nan"), float("inf")]),
        "number": 0.1 + 0.2,
        "big": 2**80,
        "nothing": None,
        "yes": True,
        "text": "ä\n",
    }
    save(run, 7, **state)
    found = checkpoint.load(run)
    assert found.step == 7 and found.meta["note"] == "x"
    assert found.state.keys() == state.keys()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            got = found.state[name]
            assert got.dtype == value.dtype and got.shape == value.shape
            assert got.numpy().tobytes() == value.numpy().tobytes()
        else:
            assert type(found.state[name]) is type(value) and found.state[name] == value


def test_views_of_one_storage_are_saved(run: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save(run, 1, whole=base, row=base[1], column=base[:, 2], again=base)
    state = checkpoint.load(run).state
    assert torch.equal(state["whole"], base) and torch.equal(state["again"], base)
    assert torch.equal(state["row"], base[1]) and torch.equal(state["column"], base[:, 2])


# ---- damage


def flip(path: Path, position: float) -> None:
    payload = bytearray(path.read_bytes())
    payload[int(position * (len(payload) - 1))] ^= 1
    path.write_bytes(bytes(payload))


@pytest.fixture
def two(run: Path) -> tuple[Path, Replay]:
    replay = Replay(SPEC, 10, 2)
    filled(replay, 4, 0)
    save(run, 4, replay)
    filled(replay, 3, 1)
    save(run, 7, replay)
    return run, replay


@pytest.mark.parametrize("position", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_flipped_bit_is_detected(two: Any, name: str, position: float) -> None:
    run, _ = two
    flip(run / "checkpoints" / "step_000000007" / name, position)
    with pytest.raises(UserError, match="damaged") as caught:
        checkpoint.load(run)
    assert name in str(caught.value) and "--step 4" in str(caught.value)
    assert checkpoint.load(run, 4).state["count"] == 4


def test_a_number_changed_in_the_manifest_is_detected(two: Any) -> None:
    run, _ = two
    path = run / "checkpoints" / "step_000000007" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["plain"]["count"] = 8
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(run)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{"])
def test_a_manifest_that_is_none_is_detected(two: Any, text: str) -> None:
    run, _ = two
    (run / "checkpoints" / "step_000000007" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(run)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_flipped_bit_in_the_rows_is_detected(two: Any, position: float) -> None:
    run, _ = two
    found = checkpoint.load(run)
    flip(run / "experience" / found.row_files[0]["file"], position)
    with pytest.raises(UserError, match=r"rows_0_4.*damaged"):
        checkpoint.load_rows(run, found, Replay(SPEC, 10, 2))


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL, "torch"])
def test_a_pickle_is_refused_and_not_run(two: Any, tmp_path: Path, protocol: Any) -> None:
    run, _ = two
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trace), 0o700)

    target = run / "checkpoints" / "step_000000007" / "state.safetensors"
    if protocol == "torch":
        torch.save({"a": Evil()}, target)
    else:
        target.write_bytes(pickle.dumps(Evil(), protocol=protocol))
    with pytest.raises(UserError, match="pickle"):
        checkpoint.load(run)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["state.safetensors", "rows"])
def test_a_missing_file_is_named(two: Any, name: str) -> None:
    run, _ = two
    found = checkpoint.load(run)
    if name == "rows":
        (run / "experience" / found.row_files[1]["file"]).unlink()
        with pytest.raises(UserError, match="rows_4_7.safetensors is missing"):
            checkpoint.load_rows(run, found, Replay(SPEC, 10, 2))
    else:
        (run / "checkpoints" / "step_000000007" / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            checkpoint.load(run)


def test_another_version_is_refused(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = two
    monkeypatch.setattr(checkpoint, "__version__", "7.3.1")
    with pytest.raises(UserError, match=r"7\.3\.1.*install that version"):
        checkpoint.load(run)
    monkeypatch.setattr(checkpoint, "__version__", esscher.__version__ + "9")
    assert checkpoint.load(run).step == 7, "a patch release reads the files of its series"


def test_no_checkpoint_and_no_such_step(run: Path, two: Any) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load(run.with_name("other"))
    with pytest.raises(UserError, match=r"no checkpoint of step 5: it has \[4, 7\]"):
        checkpoint.load(run, 5)


def test_a_half_written_checkpoint_is_none(two: Any) -> None:
    run, replay = two
    folder = run / "checkpoints"
    shutil.copytree(folder / "step_000000007", folder / ".writing")
    (run / "experience" / ".rows_7_9.safetensors.writing").write_bytes(b"half")
    assert checkpoint.steps(run) == [4, 7]
    filled(replay, 2, 2)
    save(run, 9, replay)
    assert checkpoint.steps(run) == [7, 9]
    assert not (folder / ".writing").exists()
    assert sorted(p.name for p in (run / "experience").iterdir()) == [
        "rows_0_4.safetensors",
        "rows_4_7.safetensors",
        "rows_7_9.safetensors",
    ]


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_killed_while_removing_an_old_checkpoint(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file went first, what is left is never taken for a checkpoint."""
    for step in (1, 2, 3):
        save(run, step, keep=5)
    real = shutil.rmtree

    def half(path: Any, *args: Any, **options: Any) -> None:
        if not Path(path).exists():
            return
        (Path(path) / name).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.discard_after(run, 2)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert checkpoint.steps(run) == [1, 2]
    assert checkpoint.load(run).step == 2
    save(run, 3, keep=5)
    assert checkpoint.load(run).state["count"] == 3


class Crash:
    """Dies at a given one of the changes that a block makes to the file system."""

    armed: "Crash | None" = None
    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copytree")

    def __init__(self, at: int | None):
        self.at, self.count = at, 0

    def __enter__(self) -> "Crash":
        Crash.armed = self
        return self

    def __exit__(self, *_: Any) -> None:
        Crash.armed = None

    @staticmethod
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        self = Crash.armed
        changes = event in Crash.EVENTS or (event == "open" and "w" in str(arguments[1]))
        if self is not None and changes:
            self.count += 1
            if self.count - 1 == self.at:
                Crash.armed = None
                raise Killed


sys.addaudithook(Crash.hook)


def test_killed_at_any_change_of_the_files(tmp_path: Path) -> None:
    """Whatever happened last, there is a whole newest checkpoint, and the next save succeeds."""

    def start(folder: Path) -> tuple[Path, Replay]:
        replay = Replay(SPEC, 10, 2)
        for step, count in ((4, 4), (8, 4)):
            filled(replay, count, step)
            save(folder, step, replay, 2, **replay.state_dict(), weight=torch.ones(3) * step)
        filled(replay, 6, 14)
        return folder, replay

    def check(folder: Path, replays: dict[int, dict[str, torch.Tensor]]) -> int:
        found, back = checkpoint.load(folder), Replay(SPEC, 10, 2)
        back.load_state_dict({n: found.state[n] for n in ("num_added", "num_batches")})
        checkpoint.load_rows(folder, found, back)
        assert torch.equal(found.state["weight"], torch.ones(3) * found.step)
        for name, value in replays[found.step].items():
            assert torch.equal(held(back)[name], value), name
        return found.step

    def finish(folder: Path, replay: Replay) -> None:
        save(folder, 14, replay, 1, **replay.state_dict(), weight=torch.ones(3) * 14)

    folder, replay = start(tmp_path / "count")
    early = Replay(SPEC, 10, 2)
    filled(early, 4, 4), filled(early, 4, 8)
    expected = {8: held(early), 14: held(replay)}
    with Crash(None) as whole:
        finish(folder, replay)
    assert whole.count >= 8
    seen = set()
    for at in range(whole.count):
        folder, replay = start(tmp_path / str(at))
        with Crash(at), pytest.raises(Killed):
            finish(folder, replay)
        seen.add(check(folder, expected))
        finish(folder, replay)
        assert check(folder, expected) == 14
        assert not [p.name for p in (folder / "experience").iterdir() if "writing" in p.name]
    assert seen == {8, 14}


# ---- space


class Full:
    """Lets some bytes through and then has no space left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, number: int):
        self.left, write = after, checkpoint._write

        def limited(path: Path, payload: bytes) -> None:
            if len(payload) > self.left:
                path.write_bytes(payload[: self.left])
                raise OSError(number, os.strerror(number))
            self.left -= len(payload)
            write(path, payload)

        monkeypatch.setattr(checkpoint, "_write", limited)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after", [0, 700, 1000])
def test_a_full_disk_leaves_earlier_checkpoints(
    two: Any, monkeypatch: pytest.MonkeyPatch, after: int, number: int
) -> None:
    run, replay = two
    filled(replay, 2, 2)
    with monkeypatch.context() as context:
        Full(context, after, number)
        with pytest.raises(UserError, match=r"no space left.*step 9.*step 7.*esscher resume"):
            save(run, 9, replay)
    assert checkpoint.steps(run) == [4, 7]
    found = checkpoint.load(run)
    back = Replay(SPEC, 10, 2)
    checkpoint.load_rows(run, found, back)
    save(run, 9, replay)
    assert checkpoint.steps(run) == [7, 9]


def test_other_errors_of_the_system_are_not_hidden(
    two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, replay = two
    filled(replay, 2, 2)
    Full(monkeypatch, 0, errno.EIO)
    with pytest.raises(OSError, match="[Ii]nput/output"):
        save(run, 9, replay)


def _save_with_a_limit(run: Path, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save(run, 1, a=torch.zeros(100))
    try:
        save(run, 2, a=torch.zeros(10_000))
    except UserError as error:
        queue.put((str(error), checkpoint.steps(run)))


def test_a_real_limit_on_file_size(run: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_save_with_a_limit, args=(run, queue))
    process.start()
    message, left = queue.get(timeout=60)
    process.join()
    assert "no space left" in message and left == [1]


# ---- what is kept


def test_the_newest_are_kept(run: Path) -> None:
    for step in (1, 2, 3, 4):
        save(run, step, keep=3)
    assert checkpoint.steps(run) == [2, 3, 4]
    save(run, 5, keep=1)
    assert checkpoint.steps(run) == [5]


def test_rows_are_written_once_and_pruned_with_the_ring(run: Path) -> None:
    replay, times = Replay(SPEC, 10, 2), {}
    for step in range(1, 9):
        filled(replay, 3, step)
        save(run, step, replay, keep=2)
        names = {p.name for p in (run / "experience").iterdir()}
        oldest_needed = max(0, 3 * (step - 1) - 10)
        starts = sorted(int(n.split("_")[1]) for n in names)
        stops = {int(n.split("_")[1]): int(n.split("_")[2].split(".")[0]) for n in names}
        assert stops[starts[0]] > oldest_needed, "no file beyond what a kept checkpoint needs"
        for name in names & times.keys():
            assert (run / "experience" / name).stat().st_mtime_ns == times[name], "rewritten"
        times = {p.name: p.stat().st_mtime_ns for p in (run / "experience").iterdir()}


@pytest.mark.parametrize(
    "sizes", [(4,), (4, 9), (10,), (7, 7, 7), (3,) * 9, (10, 10, 3), (1,) * 25]
)
def test_a_wrapped_ring_comes_back(run: Path, sizes: tuple[int, ...]) -> None:
    replay = Replay(SPEC, 10, 2)
    for step, size in enumerate(sizes):
        filled(replay, size, step)
        save(run, step + 1, replay, **replay.state_dict())
    found, back = checkpoint.load(run), Replay(SPEC, 10, 2)
    filled(back, 8, 99)
    back.load_state_dict(found.state)
    checkpoint.load_rows(run, found, back)
    for name, value in held(replay).items():
        assert torch.equal(value, held(back)[name]), name
    # The same rows lie in the same places, so that the same random index draws the same row.
    torch.manual_seed(0)
    first = replay.sample(50)
    torch.manual_seed(0)
    assert torch.equal(first.obs, back.sample(50).obs)


def test_many_rows_between_two_checkpoints(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "ROWS_A_FILE", 4)
    replay = Replay(SPEC, 10, 2)
    for start in range(0, 24, 3):
        filled(replay, 3, start)
    save(run, 1, replay, **replay.state_dict())
    found, back = checkpoint.load(run), Replay(SPEC, 10, 2)
    assert all(entry["stop"] - entry["start"] <= 4 for entry in found.row_files)
    back.load_state_dict(found.state)
    checkpoint.load_rows(run, found, back)
    for name, value in held(replay).items():
        assert torch.equal(value, held(back)[name]), name


def test_going_back_writes_other_rows_under_the_same_name(run: Path) -> None:
    """Rows that were discarded with their checkpoint must not come back."""
    replay = Replay(SPEC, 20, 2)
    filled(replay, 4, 0)
    save(run, 4, replay, **replay.state_dict())
    filled(replay, 4, 1)
    save(run, 8, replay, **replay.state_dict())
    checkpoint.discard_after(run, 4)
    other = Replay(SPEC, 20, 2)
    found = checkpoint.load(run)
    other.load_state_dict(found.state)
    checkpoint.load_rows(run, found, other)
    filled(other, 4, 77)
    save(run, 8, other, **other.state_dict())
    back, found = Replay(SPEC, 20, 2), checkpoint.load(run)
    back.load_state_dict(found.state)
    checkpoint.load_rows(run, found, back)
    assert torch.equal(held(back)["obs"], held(other)["obs"])


def test_files_are_plain_safetensors(two: Any) -> None:
    run, _ = two
    from safetensors import safe_open

    for path in run.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert list(file.keys())
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pkl", ".pickle", ".npy")]


def test_rows_that_are_not_safetensors_are_refused(two: Any) -> None:
    run, _ = two
    found = checkpoint.load(run)
    import hashlib

    payload = save_tensors({"reward": torch.zeros(4)})[:-4]
    found.row_files[0]["digest"] = hashlib.sha256(payload).hexdigest()
    (run / "experience" / found.row_files[0]["file"]).write_bytes(payload)
    with pytest.raises(UserError, match="not a safetensors file"):
        checkpoint.load_rows(run, found, Replay(SPEC, 10, 2))
