"""What several test folders share: small runs, complete states, and how to compare them."""

import json
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

import esscher
from esscher.adapters.data import load_dataset
from esscher.errors import UserError
from esscher.registry import catalogue, load_method, recipes
from esscher.runtime import checkpoint
from esscher.runtime import run as runner
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")


def smoke(slug: str, **changes: Any) -> esscher.Experiment:
    """A method's smoke recipe on one thread; `changes` are fields, or env_* and steps of its stage."""
    experiment = recipes(slug)["smoke"]()
    stage = experiment.stages[-1]
    env = {k[4:]: changes.pop(k) for k in list(changes) if k.startswith("env_")}
    stage = replace(stage, env=replace(stage.env, **env), steps=changes.pop("steps", stage.steps))
    every = 70 if stage.steps >= 140 else 2
    defaults = {"log": esscher.LogConfig(every=every, to=()), "runtime": RUNTIME}
    return replace(experiment, stages=(stage,), **{**defaults, **changes})


def train(experiment: esscher.Experiment, directory: Path) -> esscher.Result:
    return esscher.run(experiment, directory=directory, display=False)


class Killed(BaseException):
    """Stands for a kill in tests that stay in one process."""


def train_until(experiment: esscher.Experiment, directory: Path, step: int, patch: Any) -> None:
    """Run, and die right after the first checkpoint at or after `step` is complete."""
    die_after(step, patch, lambda: train(experiment, directory))


def die_after(step: int, patch: Any, work: Callable[[], Any]) -> None:
    """Do some work, and die right after the first checkpoint at or after `step` is complete."""
    save = checkpoint.save

    def save_and_die(run: Path, at: int, *args: Any) -> Path:
        target = save(run, at, *args)
        if at >= step:
            raise Killed
        return target

    with patch.context() as context:
        context.setattr(checkpoint, "save", save_and_die)
        try:
            work()
        except Killed:
            return
    raise AssertionError(f"no checkpoint at or after step {step}")


def final_state(run: Path, step: int | None = None) -> dict[str, Any]:
    """Every leaf of a checkpoint, with the transitions that its experience still holds."""
    found = checkpoint.load(run, step)
    state = dict(found.state)
    added = state.get("experience.num_added")
    if added is not None:
        rows: dict[str, list[Any]] = {}
        expected = found.row_files[0]["start"] if found.row_files else 0
        for entry in found.row_files:
            assert entry["start"] == expected, "row files must follow each other without a gap"
            expected = entry["stop"]
            tensors = load_tensors((run / "experience" / entry["file"]).read_bytes())
            for name, value in tensors.items():
                rows.setdefault(name, []).append(value)
        assert expected == added
        capacity = experience_of(run, step).capacity
        held = min(added, capacity)
        for name, pieces in rows.items():
            state[f"rows.{name}"] = torch.cat(pieces)[-held:]
            assert len(state[f"rows.{name}"]) == held
    return state


def experience_of(run: Path, step: int | None = None) -> Any:
    """A fresh store of the kind that a run learns from, around its data if it has any."""
    loaded = esscher.load(run, step=step)
    source = loaded.experiment.stages[-1].data
    if loaded.method.world in ("diffusion", "sets", "robots"):
        return store(loaded.method, data_of(loaded.experiment.slug))
    data = None if source is None else load_dataset(source, loaded.method.spec)
    return store(loaded.method, data)


def store(method: Any, data: Any) -> Any:
    """A method's experience, with data for those that read any."""
    reads = method.data != "none" or method.world != "control"
    return method.experience(data) if reads else method.experience()


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the leaves that are not equal bit for bit (NaN equals NaN)."""
    names = sorted(left.keys() ^ right.keys())
    for name in sorted(left.keys() & right.keys()):
        a, b = left[name], right[name]
        if isinstance(a, torch.Tensor):
            same = (
                isinstance(b, torch.Tensor)
                and a.dtype == b.dtype
                and a.shape == b.shape
                and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
            )
        else:
            same = type(a) is type(b) and a == b
        if not same:
            names.append(name)
    return names


def metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "steps_per_second")} for r in rows]


def assert_same_run(left: Path, right: Path) -> None:
    """Final states and metrics of two runs are equal."""
    a, b = final_state(left), final_state(right)
    assert len(a) > 8
    assert differences(a, b) == []
    assert metrics(left) == metrics(right)


@cache
def spec_of(slug: str) -> Any:
    """Of the task of a method's smoke recipe."""
    parts = runner._Parts(smoke(slug))
    parts.close()
    return parts.world.spec


def of_world(name: str) -> list[str]:
    """Slugs of the methods about controllers, language models, diffusion models or populations."""
    return [slug for slug in catalogue() if load_method(slug).world == name]


@cache
def data_of(slug: str) -> Any:
    """What a method's smoke recipe learns from, if it reads data."""
    if load_method(slug).world == "language":
        parts = runner._Parts(smoke(slug))
        parts.close()
        return parts.world.text
    if load_method(slug).world == "diffusion":
        parts = runner._Parts(smoke(slug))
        return parts.world.wanted if parts.world.real is None else parts.world.real
    if load_method(slug).world == "sets":
        return runner._Parts(smoke(slug)).world.data
    if load_method(slug).world == "robots":
        return runner._Parts(smoke(slug)).world.data[0]
    source = smoke(slug).stages[-1].data
    return None if source is None else load_dataset(source, spec_of(slug))


def learner(slug: str, spec: Spec | None = None, seed: int = 0, **options: Any) -> Any:
    """A fresh method with its smoke configuration, for its smoke task or for another."""
    spec = spec_of(slug) if spec is None else spec
    torch.manual_seed(seed)
    config = replace(recipes(slug)["smoke"]().method, **options)
    return load_method(slug)(config, spec, Runtime(RUNTIME))


def policy_leaves(method: Any) -> list[str]:
    """Names, in the method's state, of what its policy is made of; of a method that leaves its model as
    it is, of all that it finds out.
    """
    if not method.trains:
        return [n for n, v in method.state_dict().items() if torch.is_tensor(v)]
    own = {p.data_ptr() for p in method.policy.parameters()}
    state = method.state_dict()
    return [n for n, v in state.items() if torch.is_tensor(v) and v.data_ptr() in own]


def transitions(size: int, obs_dim: int = 3, action_dim: int = 1, seed: int = 0) -> Transitions:
    """Random rows."""
    draw = torch.Generator().manual_seed(seed)
    return Transitions(
        obs=torch.randn(size, obs_dim, generator=draw),
        action=torch.rand(size, action_dim, generator=draw) * 2 - 1,
        reward=torch.randn(size, generator=draw),
        next_obs=torch.randn(size, obs_dim, generator=draw),
        terminated=torch.rand(size, generator=draw) < 0.1,
        truncated=torch.rand(size, generator=draw) < 0.1,
    )


def parts_after(experiment: esscher.Experiment, updates: int) -> Any:
    """Every part of a run, stopped after so many updates, without files."""
    parts = runner._Parts(experiment)
    advance(parts, experiment, updates)
    return parts


def advance(parts: Any, experiment: esscher.Experiment, updates: int) -> None:
    """So many updates more."""
    goal = parts.loop.num_updates + updates
    stage = experiment.stages[-1]
    parts.world.stage = replace(stage, steps=100_000)
    parts.world.experiment = experiment
    rest = parts.world.iterations(parts.method, parts.experience, parts.loop, 0)
    while parts.loop.num_updates < goal:
        next(rest)


def take_over(parts: Any, others: Any) -> dict[str, Any]:
    """Give other parts the state of some, rows included, as a checkpoint does; what it was."""
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in parts.state_dict().items()}
    others.load_state_dict({k: v.cpu() if torch.is_tensor(v) else v for k, v in state.items()})
    if hasattr(parts.experience, "put_rows"):
        held = parts.experience.num_added - len(parts.experience)
        for piece in parts.experience.rows(held, parts.experience.num_added):
            others.experience.put_rows(held, {k: v.cpu() for k, v in piece.items()})
            held += len(piece["reward"])
    return state


def damaged(payload: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Copies cut short, and with single bits flipped: at the start, in the middle, at the end, and at a
    few random places; each with what was done to it.
    """
    size, draw = len(payload), random.Random(seed)
    for kept in (0, 1, size // 4, size // 2, 3 * size // 4, size - 1):
        yield f"cut to {kept}", payload[:kept]
    places = (0, 1, 8, size // 2, size - 1, *(draw.randrange(size) for _ in range(6)))
    for place in places:
        for bit in (0, 6, 7):
            flipped = bytearray(payload)
            flipped[min(place, size - 1)] ^= 1 << bit
            yield f"bit {bit} of byte {place} flipped", bytes(flipped)


def read_damaged(path: Path, read: Callable[[], Any]) -> list[Any]:
    """What reading says to each damaged copy of a file that loads: nothing but one sentence, or a
    result; these are returned.
    """
    payload, results = path.read_bytes(), []
    read()
    for what, copy in damaged(payload):
        path.write_bytes(copy)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Libraries remark on what they pass over.
                results.append(read())
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 800, (path, what, str(error))
        except Exception as error:
            raise AssertionError(f"{path} {what}: {error!r}") from error
    path.write_bytes(payload)
    read()
    return results


# For processes of their own (multiprocessing "forkserver", preloaded with this module).
FORKSERVER_PRELOAD = ["support", "esscher.runtime.run", "esscher.methods.control.sac"]


def run_or_resume(experiment: dict[str, Any], directory: str) -> None:
    """Start a run, or go on with it if it is there."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (Path(directory) / "config.json").exists():
        esscher.resume(directory, display=False)
    else:
        train(esscher.Experiment.from_json(experiment), Path(directory))
