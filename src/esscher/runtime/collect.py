"""Data sets from runs: whole episodes of a policy, or what a replay holds, as Minari sets.

A set is written in a hidden folder beside its place and renamed when it is complete, so that its
name never stands for half of it.
"""

import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from gymnasium import Env, spaces
from gymnasium.wrappers import FlattenObservation
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from esscher import __version__
from esscher.adapters.data import load_dataset, minari_path, open_minari
from esscher.adapters.gymnasium import Environments, make
from esscher.controller import Controller
from esscher.distributions.remembering import Memory, Remembering, remembers
from esscher.errors import UserError, require
from esscher.experiment import EnvConfig, Experiment
from esscher.registry import load_method
from esscher.runtime import checkpoint as checkpoints
from esscher.runtime.display import spoken_time
from esscher.runtime.load import Loaded, load
from esscher.runtime.prove import _commit
from esscher.runtime.rng import Phase, mix, seed_phase
from esscher.runtime.run import read_experiment
from esscher.runtime.state import under
from esscher.runtime.stopping import stop_requests
from esscher.types import Transitions

T = TypeVar("T")

Policy = Literal["agent", "random", "replay"]

COPIES = 8
"""Copies of the task stepped together, so that the policy acts in batches."""

COLLECT = int.from_bytes(b"data", "big")
"""Keeps the seeds of collected episodes apart from those of training and evaluation."""

STEPS_A_WRITE = 20_000
"""Steps that are written to disk at once."""

EPISODES_A_WRITE = 200
"""At most: short ones take milliseconds each to write, and a request to stop waits for all."""

SECONDS_A_LINE = 10
"""Between lines of progress where there is no terminal."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """T steps in the environment's own spaces and units, with T + 1 observations."""

    observations: Any
    """An array, or dictionaries and tuples of arrays as the observation space is built."""
    actions: Any
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    seed: int | None = None
    """Resets the environment to the first observation, with the options."""
    options: Any = None
    infos: Any = None


@dataclass(frozen=True)
class Collected:
    """What was written."""

    name: str
    path: Path
    returns: list[float]
    lengths: list[int]

    @property
    def steps(self) -> int:
        return sum(self.lengths)


def collect(
    run: str | Path,
    out: str,
    *,
    policy: Policy = "agent",
    episodes: int | None = None,
    step: int | None = None,
    stochastic: bool = True,
    seed: int = 1,
    reference: tuple[float, float] | None = None,
    step_limit: int = 10_000,
    display: bool = True,
) -> Collected:
    """Write a Minari set of a run's own task.

    Args:
        run: a finished run folder, or one that is still being trained.
        out: name of the set, such as hopper/medium-v0; it must not exist.
        policy: agent acts as the run's policy; random acts uniformly in the action space; replay
            writes the steps that the run's replay holds.
        episodes: how many, 100 by default; a replay is written whole.
        step: checkpoint to read; by default the newest.
        stochastic: whether the agent samples its actions or takes the mode.
        seed: of the episodes' starts and of all sampling.
        reference: returns that count as 0 and as 100 in normalised scores.
        step_limit: steps after which an episode is cut in a task that has no limit of its own.
        display: show progress.

    Raises:
        UserError: not a run, no such checkpoint, no replay in it, or the name is taken or not one.
    """
    folder, name = Path(run), out.removeprefix("minari:")
    experiment = read_experiment(folder)
    check_new(name)
    _check_options(policy, episodes, step, reference, step_limit)
    config = replace(experiment.task, num=1, parallel=False)
    loaded = None if policy == "random" else load(folder, step=step)
    task = _own_spaces(make(config))
    with closing(task), stop_requests() as requested:
        if policy == "replay":
            assert loaded is not None
            stored = list(_stored(folder, loaded, task))
            total, source = len(stored), iter(stored)
        else:
            total = 100 if episodes is None else episodes
            choose = _random(task) if loaded is None else _agent(loaded.policy, seed, stochastic)
            options = None if loaded is None else loaded.policy.reset_options
            source = _play(config, total, seed, options, choose, step_limit, requested)
        metadata = _metadata(experiment, loaded, policy, total, stochastic, seed)
        title = f"{metadata['algorithm_name']} on {experiment.stages[-1].env.id}"
        # A factory may change what it makes: its specification would recover another task.
        made_by_factory = ":" in config.id and not config.id.startswith("ale_py")
        env_spec = None if made_by_factory else task.spec
        with writing(name, task, env_spec, metadata | _reference(reference)) as writer:
            writer.add_all(shown(source, title, total, display), requested)
        return Collected(name, minari_path(name), writer.returns, writer.lengths)


def combine(
    names: Sequence[str],
    out: str,
    *,
    reference: tuple[float, float] | None = None,
    display: bool = True,
) -> Collected:
    """Write the episodes of several Minari sets of one task as one set.

    It holds what minari.combine_datasets would make; besides, seeds of episodes and references are
    kept, and images are stored as they are.

    Args:
        names: of the sets, in the order in which their episodes come.
        out: name of the new set, which must not exist.
        reference: returns that count as 0 and as 100; by default what the parts state.
        display: show progress.

    Raises:
        UserError: fewer than two sets, one named twice or missing, sets of different tasks or with
            different references, or the name is taken or not one.
    """
    names, name = [part.removeprefix("minari:") for part in names], out.removeprefix("minari:")
    if len(names) < 2:
        raise UserError("combine needs two sets or more: esscher data combine NAME NAME --out NAME")
    if len(set(names)) < len(names):
        raise UserError(f"a set is named twice: {', '.join(names)}")
    check_new(name)
    _check_reference(reference)
    parts = [open_minari(part) for part in names]
    env_spec = _common_task(parts)
    raw = [dict(part.storage.read_raw_metadata(part.storage.data_path)) for part in parts]
    metadata = {
        "combined_datasets": names,
        "algorithm_name": " + ".join(str(m.get("algorithm_name", "unknown")) for m in raw),
        "description": f"The episodes of {', '.join(names)}.",
        "esscher": {
            "version": __version__,
            "code": _commit(),
            "parts": {part: m.get("esscher") for part, m in zip(names, raw, strict=True)},
        },
        **_reference(reference or _common_reference(names, raw)),
    }
    total = sum(part.total_episodes for part in parts)
    with stop_requests() as requested, writing(name, parts[0], env_spec, metadata) as writer:
        episodes = shown(_episodes_of(parts), f"combining into {name}", total, display)
        writer.add_all(episodes, requested)
    return Collected(name, minari_path(name), writer.returns, writer.lengths)


def check_new(name: str) -> Path:
    """Where a set of this name will lie.

    Raises:
        UserError: it is not a name, or there is such a set.
    """
    path = minari_path(name)
    if path.exists():
        raise UserError(
            f"the name {name!r} is taken, by {path}: choose another --out, or remove that one "
            f"(minari delete {name})"
        )
    return path


# ---- what is written


def _metadata(
    experiment: Experiment,
    loaded: Loaded | None,
    policy: Policy,
    episodes: int,
    stochastic: bool,
    seed: int,
) -> dict[str, Any]:
    task, name, step = experiment.stages[-1].env.id, experiment.slug, loaded and loaded.step
    doing = "sampled from" if stochastic else "the mode of"
    told = {
        "agent": f"actions {doing} the policy at step {step}",
        "random": "actions uniform in the action space",
        "replay": f"what the replay held at step {step}",
    }
    used = ("gymnasium", "minari", "mujoco", "torch")
    return {
        "algorithm_name": {"agent": name, "random": "random", "replay": f"{name} replay"}[policy],
        "description": f"{episodes} episodes of {task} by esscher data collect: {told[policy]}.",
        "esscher": {
            "version": __version__,
            "method": None if policy == "random" else name,
            "policy": policy,
            "step": step,
            "stochastic": stochastic if policy == "agent" else None,
            "seed": None if policy == "replay" else seed,
            "run_seed": experiment.seed,
            "config": experiment.to_json(),
            "code": _commit(),
            "packages": {package: version(package) for package in used},
            "machine": checkpoints.machine(),
        },
    }


def _reference(reference: tuple[float, float] | None) -> dict[str, float]:
    if reference is None:
        return {}
    return {"ref_min_score": float(reference[0]), "ref_max_score": float(reference[1])}


def _check_options(
    policy: Policy,
    episodes: int | None,
    step: int | None,
    reference: tuple[float, float] | None,
    step_limit: int,
) -> None:
    require("--episodes", episodes, episodes is None or episodes >= 1, ">= 1")
    require("--step-limit", step_limit, step_limit >= 1, ">= 1")
    if policy == "replay" and episodes is not None:
        raise UserError("a replay is written whole: leave out --episodes")
    if policy == "random" and step is not None:
        raise UserError("random actions need no checkpoint: leave out --step")
    _check_reference(reference)


def _check_reference(reference: tuple[float, float] | None) -> None:
    if reference is not None:
        low, high = reference
        finite = bool(np.isfinite(reference).all())
        require("--reference", f"{low:g} {high:g}", finite and low < high, "LOW HIGH, LOW < HIGH")


# ---- episodes by acting


class _Copy:
    """One copy of the task and the episode that it is in."""

    def __init__(self, config: EnvConfig):
        self.config, self.env = config, _own_spaces(make(config))

    def begin(self, number: int, seed: int, options: dict[str, Any] | None) -> None:
        """Start episode `number`, which (seed, number) and the options decide."""
        self.number, self.seed = number, mix(seed, COLLECT, number) % 2**31
        self.generator = np.random.default_rng(mix(seed, COLLECT, number, 1))
        self.observations: list[Any] = []
        self.actions: list[Any] = []
        self.rewards: list[float] = []
        self.terminated = self.truncated = False
        self.options = options
        self.memory: Memory | None = None
        self._note(self.env.reset(seed=self.seed, options=options)[0])

    def step(self, action: Any, limit: int) -> bool:
        """Whether the episode is over."""
        obs, reward, self.terminated, self.truncated, _ = self.env.step(action)
        self.actions.append(np.array(action, self.env.action_space.dtype))
        self.rewards.append(float(reward))
        if not np.isfinite(self.rewards[-1]):
            raise UserError(f"{self._place()} has a reward that is not finite: {reward}")
        self._note(obs)
        cut = len(self.rewards) >= limit and not self.terminated
        self.truncated = bool(self.truncated) or cut
        return bool(self.terminated) or self.truncated

    def episode(self) -> Episode:
        terminations = np.zeros(len(self.rewards), bool)
        truncations = terminations.copy()
        terminations[-1], truncations[-1] = self.terminated, self.truncated
        return Episode(
            observations=_stacked(self.env.observation_space, self.observations),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards, np.float64),
            terminations=terminations,
            truncations=truncations,
            seed=self.seed,
            options=self.options,
        )

    def _note(self, obs: Any) -> None:
        space = self.env.observation_space
        self.observations.append(_copied(space, obs))  # The task may write into what it returned.
        self.flat = np.asarray(spaces.flatten(space, obs)).astype(np.float32)
        if not np.isfinite(self.flat).all():
            raise UserError(f"{self._place()} has an observation that is not finite: {obs}")

    def _place(self) -> str:
        return f"{self.config.id}, episode {self.number}, step {len(self.rewards)},"


Choose = Callable[[Sequence[_Copy], int], Sequence[Any]]
"""Actions for all copies, in the environment's own units, at an iteration."""


def _agent(policy: Controller, seed: int, stochastic: bool) -> Choose:
    def choose(copies: Sequence[_Copy], iteration: int) -> Sequence[Any]:
        seed_phase(mix(seed, COLLECT), iteration, Phase.ACT)
        obs, state = np.stack([copy.flat for copy in copies]), None
        if remembers(policy.policy):
            held = [copy.memory or _fresh_memory(policy.policy, copy, seed) for copy in copies]
            state = held[0].cat(held)
        actions, state = policy.predict(obs, state=state, deterministic=not stochastic)
        for place, copy in enumerate(copies):
            copy.memory = state.index(slice(place, place + 1)) if state is not None else None
        if not np.isfinite(actions).all():
            raise UserError("the policy's action is not finite: training has diverged")
        return [_within(copy.env.action_space, a) for copy, a in zip(copies, actions, strict=True)]

    return choose


def _fresh_memory(policy: Remembering, copy: _Copy, seed: int) -> Memory:
    """Of the episode that the copy begins: its draws follow from (seed, number)."""
    return policy.begin(torch.tensor([mix(seed, COLLECT, copy.number, 2)]))


def _random(task: Env[Any, Any]) -> Choose:
    space: Any = task.action_space

    def choose(copies: Sequence[_Copy], iteration: int) -> Sequence[Any]:
        if isinstance(space, spaces.Discrete):
            return [copy.generator.integers(space.n) + space.start for copy in copies]
        if isinstance(space, spaces.MultiDiscrete):
            return [copy.generator.integers(space.nvec) + space.start for copy in copies]
        return [_within(space, copy.generator.uniform(space.low, space.high)) for copy in copies]

    return choose


def _within(space: Any, action: Any) -> Any:
    """In the space's own shape and type, whose rounding may have led out of it."""
    if not isinstance(space, spaces.Box):
        return action
    return np.clip(action.reshape(space.shape).astype(space.dtype), space.low, space.high)


def _play(
    config: EnvConfig,
    episodes: int,
    seed: int,
    options: dict[str, Any] | None,
    choose: Choose,
    step_limit: int,
    requested: Sequence[int],
) -> Iterator[Episode]:
    """Episodes 0, 1, ...; all that are begun are given, or short ones would be preferred."""
    copies = [_Copy(config) for _ in range(min(COPIES, episodes))]
    try:
        waiting, finished, due = iter(range(episodes)), dict[int, Episode](), 0
        for copy in copies:
            copy.begin(next(waiting), seed, options)
        active, iteration = list(copies), 0
        while active:
            if requested:
                raise KeyboardInterrupt
            actions = choose(active, iteration)
            iteration += 1
            for copy, action in zip(list(active), actions, strict=True):
                if copy.step(action, step_limit):
                    finished[copy.number] = copy.episode()
                    number = next(waiting, None)
                    if number is None:
                        active.remove(copy)
                    else:
                        copy.begin(number, seed, options)
            while due in finished:
                yield finished.pop(due)
                due += 1
    finally:
        for copy in copies:
            copy.env.close()


def _own_spaces(env: Env[Any, Any]) -> Env[Any, Any]:
    """Without the flattening that training sees."""
    return env.env if isinstance(env, FlattenObservation) else env


def _copied(space: Any, obs: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _copied(part, obs[name]) for name, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_copied(part, obs[k]) for k, part in enumerate(space.spaces))
    return np.array(obs, space.dtype)


def _stacked(space: Any, observations: Sequence[Any]) -> Any:
    """With a leading time axis at every leaf, as Minari wants it."""
    if isinstance(space, spaces.Dict):
        return {
            name: _stacked(part, [obs[name] for obs in observations])
            for name, part in space.spaces.items()
        }
    if isinstance(space, spaces.Tuple):
        return tuple(
            _stacked(part, [obs[k] for obs in observations]) for k, part in enumerate(space.spaces)
        )
    return np.stack(observations)


# ---- episodes from a replay


def _stored(folder: Path, loaded: Loaded, task: Env[Any, Any]) -> Iterator[Episode]:
    """What the replay of a checkpoint holds, in the order in which the episodes began.

    An episode whose beginning has been overwritten is left out; one that was not over yet is cut.
    """
    rows, first, copies = _replay(folder, loaded)
    envs = Environments(replace(loaded.experiment.task, num=1, parallel=False), 0)
    native = envs.to_native(rows.action)
    envs.close()
    bounds = [
        bound for turn in range(copies) for bound in _episode_rows(rows, turn, copies, first > 0)
    ]
    if not bounds:
        raise UserError(f"the replay of {folder} holds no episode from its beginning")
    for index in sorted(bounds, key=lambda index: index[0]):
        obs = np.concatenate([rows.obs[index].numpy(), rows.next_obs[index[-1:]].numpy()])
        terminations = rows.terminated[index].numpy()
        truncations = rows.truncated[index].numpy().copy()
        truncations[-1] |= not terminations[-1]
        yield Episode(
            observations=_unflattened(task.observation_space, obs),
            actions=native[index],
            rewards=rows.reward[index].double().numpy(),
            terminations=terminations,
            truncations=truncations,
        )


def _replay(folder: Path, loaded: Loaded) -> tuple[Transitions, int, int]:
    """Rows held, the number of the first of them, and the copies of the task that took turns."""
    experiment, spec = loaded.experiment, loaded.policy.spec
    kind, data = load_method(experiment.slug), experiment.stages[-1].data
    arguments = [] if kind.data == "none" else [data and load_dataset(data, spec)]
    experience = loaded.method.experience(*arguments)
    if not (hasattr(experience, "put_rows") and hasattr(experience, "rows")):
        raise UserError(f"{experiment.slug} keeps no replay: leave out --policy replay")
    checkpoint = checkpoints.load(folder, loaded.step)
    experience.load_state_dict(under("experience", checkpoint.state))
    checkpoints.load_rows(folder, checkpoint, experience)
    first = experience.num_added - len(experience)
    names = [field.name for field in dataclasses.fields(Transitions)]
    pieces = [
        Transitions(**{name: piece[name] for name in names})
        for piece in experience.rows(first, experience.num_added)
    ]
    rows = Transitions.cat(pieces).to("cpu")
    if tuple(rows.action.shape[1:]) != spec.action_shape:
        raise UserError(f"the replay of {experiment.slug} does not hold single steps of the task")
    return rows, first, spec.num_envs


def _episode_rows(
    rows: Transitions, offset: int, copies: int, skip_first: bool
) -> Iterator[NDArray[np.int64]]:
    """Row numbers of each episode of one copy of the task, whose rows are `copies` apart."""
    index = np.arange(offset, len(rows), copies)
    if not len(index):
        return
    ended = (rows.terminated | rows.truncated).numpy()[index]
    # A run that was resumed from a reset boundary went on elsewhere without saying so.
    moved = (rows.next_obs[index[:-1]] != rows.obs[index[1:]]).any(1).numpy()
    ended[:-1] |= moved
    episodes = np.split(index, np.flatnonzero(ended[:-1]) + 1)
    yield from episodes[1:] if skip_first else episodes


def _unflattened(space: Any, rows: NDArray[np.float32]) -> Any:
    """The inverse of gymnasium.spaces.flatten, for rows."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Any = space.spaces
        named = parts.items() if isinstance(space, spaces.Dict) else enumerate(parts)
        found, start = {}, 0
        for name, part in named:
            stop = start + spaces.flatdim(part)
            found[name], start = _unflattened(part, rows[:, start:stop]), stop
        return found if isinstance(space, spaces.Dict) else tuple(found.values())
    if isinstance(space, spaces.Box):
        return rows.astype(space.dtype).reshape(len(rows), *space.shape)
    return np.stack([np.asarray(spaces.unflatten(space, row)) for row in rows])


# ---- episodes of other sets


def _episodes_of(parts: Sequence[Any]) -> Iterator[Episode]:
    for part in parts:
        known = part.storage.get_episode_metadata(part.episode_indices)
        for episode, metadata in zip(part.iterate_episodes(), known, strict=True):
            yield Episode(
                observations=episode.observations,
                actions=episode.actions,
                rewards=episode.rewards,
                terminations=episode.terminations,
                truncations=episode.truncations,
                seed=metadata.get("seed"),
                options=metadata.get("options"),
                infos=episode.infos,
            )


def _common_task(parts: Sequence[Any]) -> Any:
    """The specification that fits all sets (None where they have none)."""
    from minari.utils import validate_datasets_to_combine

    first = parts[0]
    for part in parts[1:]:
        for what in ("observation_space", "action_space"):
            here, there = getattr(part, what), getattr(first, what)
            if here != there:
                raise UserError(
                    f"{part.id} and {first.id} are not of one task: the {what.replace('_', ' ')} is "
                    f"{here} and {there}"
                )
    try:
        return validate_datasets_to_combine(list(parts))
    except ValueError:
        tasks = ", ".join(f"{part.id} of {part.env_spec and part.env_spec.id}" for part in parts)
        raise UserError(f"the sets are not of one task with equal settings: {tasks}") from None


def _common_reference(
    names: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> tuple[float, float] | None:
    stated = {
        (m["ref_min_score"], m["ref_max_score"]): name
        for name, m in zip(names, metadata, strict=True)
        if m.get("ref_min_score") is not None and m.get("ref_max_score") is not None
    }
    if len(stated) > 1:
        shown = ", ".join(f"{low:g} {high:g} ({name})" for (low, high), name in stated.items())
        raise UserError(f"the sets state different references: {shown}; give --reference LOW HIGH")
    return next(iter(stated), None)


# ---- writing


@dataclass
class Writer:
    """Takes episodes into a Minari storage, many at a time."""

    storage: Any
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    _pending: list[Any] = field(default_factory=list)
    _steps: int = 0

    def add_all(self, episodes: Iterable[Episode], requested: Sequence[int]) -> None:
        """Stops with KeyboardInterrupt when that has been requested."""
        for episode in episodes:
            self.add(episode)
            if requested:
                raise KeyboardInterrupt

    def add(self, episode: Episode) -> None:
        from minari.data_collector import EpisodeBuffer

        fields: dict[str, Any] = dict(vars(episode))
        self._pending.append(EpisodeBuffer(**fields))
        self.returns.append(float(np.sum(episode.rewards, dtype=np.float64)))
        self.lengths.append(len(episode.rewards))
        self._steps += self.lengths[-1]
        if self._steps >= STEPS_A_WRITE or len(self._pending) >= EPISODES_A_WRITE:
            self.flush()

    def flush(self) -> None:
        self.storage.update_episodes(self._pending)
        self._pending.clear()
        self._steps = 0


@contextmanager
def writing(name: str, task: Any, env_spec: Any, metadata: dict[str, Any]) -> Iterator[Writer]:
    """A new set that appears under its name when the block ends, or not at all.

    Args:
        name: of the set.
        task: whatever has the observation_space and the action_space.
        env_spec: what recover_environment makes the task from, if anything can.
        metadata: of the set, beside what Minari writes itself.
    """
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces

    target = check_new(name)
    root = minari_path(name).parents[name.count("/")]
    with held(root / ".esscher_writing" / name.replace("/", "__"), name) as folder:
        (folder / "data").mkdir()
        writer = Writer(
            MinariStorage.new(
                folder / "data",
                observation_space=task.observation_space,
                action_space=task.action_space,
                env_spec=env_spec,
                jpeg_encoding=False,
            )
        )
        yield writer
        writer.flush()
        own = {"dataset_id": name, "minari_version": minari.__version__}
        writer.storage.update_metadata({**own, **metadata})
        to_disk(folder)
        namespace = parse_dataset_id(name)[0]
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        os.replace(folder, check_new(name))
        to_disk(target.parent, deep=False)


@contextmanager
def held(folder: Path, name: str, *, keep: bool = False) -> Iterator[Path]:
    """A folder that no other process writes: empty, and gone afterwards unless it was renamed.

    Args:
        folder: which may be there already.
        name: of what is being written, for messages.
        keep: leave what is in it, before and afterwards.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name} is being written by another process") from None
        try:
            for leftover in () if keep else folder.iterdir():  # Of a process that was killed.
                shutil.rmtree(leftover)
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # Others may be writing there.
                folder.parent.rmdir()
    finally:
        os.close(descriptor)


def to_disk(folder: Path, *, deep: bool = True) -> None:
    """Wait until a folder, and what is in it, would survive a power cut."""
    for path in [*(folder.rglob("*") if deep else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def shown(
    episodes: Iterable[T],
    title: str,
    total: int,
    display: bool,
    told: Callable[[], str] = lambda: "",
) -> Iterator[T]:
    """The same episodes, with progress, the time left and `told` on standard error."""
    if not display:
        yield from episodes
        return
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} episodes{task.fields[told]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(title, total=total, told="")
            for episode in episodes:
                yield episode
                progress.update(bar, advance=1, told=told())
        return
    began = spoken = time.monotonic()
    for count, episode in enumerate(episodes, 1):
        yield episode
        now = time.monotonic()
        if now - spoken > SECONDS_A_LINE:
            spoken, left = now, (now - began) / count * (total - count)
            console.print(
                f"{title}: {count:,} of {total:,} episodes{told()}, {spoken_time(left)} left",
                highlight=False,
            )
