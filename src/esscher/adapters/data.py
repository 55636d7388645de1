"""Logged steps from wherever users keep them, as one `Dataset` that fits a task.

| source | what is read |
|---|---|
| minari:NAME | a Minari set of this machine, or downloaded by Minari |
| FILE.hdf5, FILE.h5 | D4RL's layout: one array a column, episodes one after another |
| FOLDER, FILE.npz | NumPy files in the order of their names, each one or more whole episodes |
| module:function | what it returns: a dictionary of arrays, or a `Dataset` |

Everything is checked against the task before it is used: what does not fit is refused, and the
message names the row.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esscher.adapters.imports import made, needed
from esscher.errors import UserError, nearest
from esscher.experience import Dataset
from esscher.files import read_npz, readable
from esscher.types import Spec, Transitions

Columns = Mapping[str, Any]

SYNONYMS = {"terminals": "terminations", "timeouts": "truncations"}
"""D4RL's names, and those of Gymnasium and Minari, which are used from here on."""

COLUMNS = (
    *("observations", "actions", "rewards", "next_observations"),
    *("terminations", "truncations", *SYNONYMS),
)

BOX_TOLERANCE = 1e-4
"""How far outside of the task's box an action may lie, in widths of the box, as rounding."""


def load_dataset(source: str, spec: Spec | None) -> Dataset:
    """The data set that `Stage.data` names.

    An HDF5 or NumPy file without next_observations is read as D4RL's usual loaders do: the row
    after is the successor, and the last row of an episode that a timeout cut (or the file's end) is
    dropped, because its successor was not written down. A terminal row stands for its own
    successor, which nobody bootstraps from.

    Args:
        source: minari:NAME, FILE.hdf5, FOLDER of .npz, or module:function.
        spec: of the task that the data must fit; None takes the sizes that the data have.

    Raises:
        UserError: no such data set, or one that does not fit the task; see `from_arrays`.
    """
    found = _open(source)
    if isinstance(found, Dataset):
        if spec is not None:
            _check_sizes(found, spec)
        return found
    if spec is None:
        found.pieces = list(found.pieces)
        spec = _spec_of(found.pieces)
    pieces = (_transitions(columns, spec, name) for name, columns in found.pieces)
    return _assemble(pieces, source, found.reference, found.provenance)


def from_arrays(columns: Columns, spec: Spec, name: str) -> Dataset:
    """A data set from plain arrays, episode after episode, checked.

    Args:
        columns: observations `b ...`, actions (`b ...` in the task's own box, or `b` labels),
            rewards `b`, terminations and truncations `b` (or terminals and timeouts; one of them may
            be missing), and next_observations as observations. Without next_observations the row
            after is the successor, see `load_dataset`; or observations have one row more than the
            rest, and all is one episode.
        spec: of the task that the data must fit.
        name: of the data, for messages.

    Raises:
        UserError: a column is missing, empty, or has another length or shape than the task's, is
            not finite, or holds actions outside the task's box or labels.
    """
    return _assemble([_transitions(columns, spec, name)], name, None, {})


def describe(data: Dataset) -> dict[str, str]:
    """What a person wants to know of a data set first: label -> value."""
    rows, ends = data.transitions, data.ends()
    returns = data.returns().double().numpy()
    lengths = (data.step[ends] + 1).double().numpy()
    terminated = rows.terminated[ends].double().mean().item()
    labels = rows.action.dtype == torch.int64
    shown = {
        "steps": f"{len(data):,}",
        "episodes": f"{len(ends):,}",
        "return": f"{_moments(returns)}",
        "length": f"{_moments(lengths)}",
        "terminated": f"{terminated:.1%} of episodes",
        "truncated": f"{1 - terminated:.1%} of episodes",
        "observation": _count(rows.obs.shape[1]),
        "action": "a label" if labels else _count(rows.action.shape[1]),
    }
    if data.reference is None:
        return shown | {"reference": "none stated"}
    low, high = data.reference
    score = data.score(float(returns.mean()))
    shown["reference"] = f"return {low:,.1f} counts as 0, {high:,.1f} as 100"
    return shown | {"score": f"{score:,.1f} (of the mean return)"}


def minari_path(name: str) -> Path:
    """Where the Minari set of a name lies, or would lie, on this machine.

    Raises:
        UserError: Minari is not installed, or cannot use the name.
    """
    needed("minari", f"minari set {name!r}")
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):  # The latter where the version is missing.
        raise UserError(
            f"{name!r} is not a name of a Minari set: write it like hopper/medium-v0 (letters, "
            "digits, _ and -, at least two before a stroke; then -v and a number)"
        ) from None
    return get_dataset_path(name)


def open_minari(name: str, *, download: bool = True) -> Any:
    """The minari.MinariDataset of a name.

    Raises:
        UserError: Minari is not installed, the set is neither here nor to be had, or is damaged.
    """
    path = minari_path(name)
    import minari

    if not (path / "data").exists():
        if not download:
            raise UserError(f"no Minari set {name!r} on this machine: {_nearest_set(name)}")
        _download(name)
    with readable(f"minari set {name!r} in {path} cannot be read"):
        return minari.load_dataset(name)


# ---- sources


@dataclass
class _Found:
    """Whole episodes in pieces, each with its name for messages."""

    pieces: Iterable[tuple[str, Columns]]
    reference: tuple[float, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def _open(source: str) -> _Found | Dataset:
    if source.startswith("minari:"):
        return _from_minari(source)
    path = Path(source).expanduser()
    if path.suffix in (".hdf5", ".h5"):
        return _Found([(source, _read_hdf5(path))], provenance={"file": str(path)})
    if path.is_dir() or path.suffix == ".npz":
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"data {source!r} holds no .npz files")
        pieces = ((str(file), _read_npz(file)) for file in files)
        return _Found(pieces, provenance={"files": [str(file) for file in files]})
    if ":" in source:
        return _from_function(source)
    raise UserError(
        f"no data {source!r} here: give minari:NAME, FILE.hdf5, a FOLDER of .npz files or "
        "module:function"
    )


def _from_minari(source: str) -> _Found:
    dataset = open_minari(source.removeprefix("minari:"))
    metadata = dict(dataset.storage.read_raw_metadata(dataset.storage.data_path))
    written = metadata.pop("observation_space", None)
    space, order = dataset.observation_space, json.loads(written) if written else None
    metadata.pop("action_space", None)
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")

    def pieces() -> Iterator[tuple[str, Columns]]:
        with readable(f"{source} cannot be read"):
            for episode in dataset.iterate_episodes():
                yield (
                    f"{source}, episode {episode.id}",
                    {
                        "observations": _flat(space, order, episode.observations),
                        "actions": episode.actions,
                        "rewards": episode.rewards,
                        "terminations": episode.terminations,
                        "truncations": episode.truncations,
                    },
                )

    reference = None if low is None or high is None else (float(low), float(high))
    return _Found(pieces(), reference, metadata)


def _flat(space: Any, order: Any, values: Any) -> NDArray[Any]:
    """Observations of any space as rows, each as gymnasium.spaces.flatten gives it.

    Args:
        space: of one observation.
        order: the space as Minari wrote it down, whose keys keep the environment's order; a
            dictionary space that was read back has sorted them.
        values: arrays with a leading time axis, in the structure of the space.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts: Any = space.spaces
        written = parts if order is None else order["subspaces"]
        names = list(written) if isinstance(space, spaces.Dict) else range(len(parts))
        columns = [_flat(parts[k], None if order is None else written[k], values[k]) for k in names]
        return np.concatenate(columns, axis=1)
    if isinstance(space, spaces.Box):
        return np.asarray(values).reshape(len(values), -1)
    return np.stack([np.asarray(spaces.flatten(space, value)) for value in values])


def _download(name: str) -> None:
    import minari

    missing = f"no Minari set {name!r} on this machine ({_nearest_set(name)})"
    with readable(
        f"{missing}, and it cannot be downloaded",
        f". Copy it into {minari_path(name)}, or go online",
    ):
        try:
            minari.download_dataset(name)
        except ImportError:
            raise UserError(
                f'{missing}, and downloading it needs: pip install "minari[hf]"'
            ) from None


def _nearest_set(name: str) -> str:
    import minari

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About damaged sets, which are not asked for.
        known = list(minari.list_local_datasets())
    return nearest(name, known) if known else "there are none yet"


def _read_hdf5(path: Path) -> Columns:
    h5py = needed("h5py", str(path))
    if not path.exists():
        raise UserError(f"no data file {str(path)!r} here")
    with readable(f"{path} cannot be read as HDF5"), h5py.File(path, "r") as file:
        # What no method reads (infos, metadata) may be larger than all the rest.
        arrays = {k for k in COLUMNS if k in file and isinstance(file[k], h5py.Dataset)}
        return {key: file[key][()] if key in arrays else None for key in file}


def _read_npz(path: Path) -> Columns:
    if not path.exists():
        raise UserError(f"no data file {str(path)!r} here")
    return read_npz(path, COLUMNS)


def _from_function(source: str) -> _Found | Dataset:
    found = made(source, "data")
    if isinstance(found, Dataset):
        return found
    if not isinstance(found, Mapping):
        raise UserError(
            f"{source} returned a {type(found).__name__}: return a dictionary of arrays, or an "
            "esscher.experience.Dataset"
        )
    return _Found([(source, found)], provenance={"function": source})


# ---- columns


def _transitions(columns: Columns, spec: Spec, name: str) -> Transitions | None:
    """Checked rows with their successors; None if there are no rows."""
    arrays = _arrays(columns, name)
    if not any(len(array) for key, array in arrays.items() if key != "observations"):
        return None
    length = len(arrays["rewards"])
    one_episode = "next_observations" not in arrays and len(arrays["observations"]) == length + 1
    _check_lengths(arrays, one_episode, name)
    flags = {k: _flags(arrays[k], k, name) for k in ("terminations", "truncations") if k in arrays}
    terminated = flags.get("terminations", np.zeros(length, bool))
    truncated = flags.get("truncations", np.zeros(length, bool)) & ~terminated
    obs = _numbers(arrays["observations"], "observations", name, spec.obs_dim)
    reward = _numbers(arrays["rewards"], "rewards", name, 1)[:, 0]
    action = _actions(arrays["actions"], spec, name)
    kept = np.ones(length, bool)
    if one_episode:
        _check_one_episode(terminated | truncated, name)
        obs, next_obs = obs[:-1], obs[1:]
    elif "next_observations" in arrays:
        next_obs = _numbers(arrays["next_observations"], "next_observations", name, spec.obs_dim)
    else:
        _warn_without_timeouts(arrays, name)
        next_obs, truncated, kept = _row_after(obs, terminated, truncated)
        if not kept.any():
            raise UserError(f"{name} holds no step whose successor is known: add next_observations")
    last = np.flatnonzero(kept)[-1]
    truncated[last] |= not terminated[last]
    return Transitions(
        obs=torch.from_numpy(obs[kept]),
        action=torch.from_numpy(action[kept]),
        reward=torch.from_numpy(reward[kept]),
        next_obs=torch.from_numpy(next_obs[kept]),
        terminated=torch.from_numpy(terminated[kept]),
        truncated=torch.from_numpy(truncated[kept]),
    )


def _arrays(columns: Columns, name: str) -> dict[str, NDArray[Any]]:
    """The columns that are read, under one name each."""
    arrays: dict[str, NDArray[Any]] = {}
    for key in COLUMNS:
        if columns.get(key) is not None:
            column = SYNONYMS.get(key, key)
            if column in arrays:
                raise UserError(f"{name} has both {column} and {key}: leave out one of them")
            arrays[column] = np.asarray(columns[key])
    for key in ("observations", "actions", "rewards"):
        if key not in arrays:
            held = sorted(map(str, columns))
            shown = ", ".join(held[:10]) + (", ..." if len(held) > 10 else "")
            raise UserError(f"{name} has no {key}: it holds {shown or 'nothing'}")
        if arrays[key].ndim == 0:
            raise UserError(f"{name} has a single value for {key}: give one row a step")
    if not {"terminations", "truncations"} & arrays.keys():
        raise UserError(
            f"{name} does not say where episodes end: add terminations (or terminals), 1 where the "
            "task was over, and truncations (or timeouts), 1 where only the recording ended"
        )
    return arrays


def _check_lengths(arrays: dict[str, NDArray[Any]], one_episode: bool, name: str) -> None:
    lengths = {key: len(array) for key, array in arrays.items()}
    own = {**lengths, "observations": lengths["observations"] - one_episode}
    if len(set(own.values())) > 1:
        shown = ", ".join(f"{key} {length:,}" for key, length in lengths.items())
        raise UserError(f"{name} has columns of different lengths: {shown}")


def _check_one_episode(ended: NDArray[np.bool_], name: str) -> None:
    if ended[:-1].any():
        raise UserError(
            f"{name} has one observation more than rewards, as a single episode has, but one ends "
            f"at row {int(np.argmax(ended)):,}: give next_observations, or a file an episode"
        )


def _warn_without_timeouts(arrays: dict[str, NDArray[Any]], name: str) -> None:
    if "truncations" not in arrays:
        warnings.warn(
            f"{name} has neither next_observations nor truncations (timeouts): where an episode was "
            "cut, the next one's first observation is taken for the successor",
            stacklevel=5,
        )


def _numbers(array: NDArray[Any], column: str, name: str, width: int) -> NDArray[np.float32]:
    """One row a step, finite."""
    values = _rows(array, column, name)
    if values.shape[1] != width:
        raise UserError(
            f"{name} has {column} of {_count(values.shape[1])}, and the task's are of "
            f"{_count(width)}: choose the task that the data come from (--env.id), or other data"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    check_finite(values, column, name)
    return values


def _rows(array: NDArray[Any], column: str, name: str) -> NDArray[Any]:
    if array.dtype.kind not in "fiub":
        raise UserError(f"{name} holds {column} of type {array.dtype}: they must be numbers")
    return array.reshape(len(array), int(np.prod(array.shape[1:])))


def check_finite(values: NDArray[Any], column: str, name: str) -> None:
    """Refuse values b w that are not finite.

    Raises:
        UserError: naming the row and the component.
    """
    finite = np.isfinite(values)
    if not finite.all():
        row, component = np.argwhere(~finite)[0]
        raise UserError(
            f"{name} has {values[row, component]} in {column} at row {row:,} (component "
            f"{component}): mend it, or remove that episode"
        )


def _flags(array: NDArray[Any], column: str, name: str) -> NDArray[np.bool_]:
    values = _rows(array, column, name)
    if values.shape[1] != 1:
        raise UserError(f"{name} has {column} of {_count(values.shape[1])}: give one flag a step")
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        row = int(np.argwhere(wrong)[0, 0])
        raise UserError(f"{name} has {values[row, 0]} in {column} at row {row:,}: give 0 or 1")
    return values[:, 0].astype(bool)


def _actions(native: NDArray[Any], spec: Spec, name: str) -> NDArray[Any]:
    """From the task's box to [-1, 1], or from its labels to choices from 0."""
    values = _rows(native, "actions", name)
    if spec.num_actions is not None:
        return _choices(values, spec, spec.num_actions, name)
    low, high = np.array(spec.action_low), np.array(spec.action_high)
    if values.shape[1] != len(low):
        raise UserError(
            f"{name} has actions of {_count(values.shape[1])}, and the task's are of "
            f"{_count(len(low))}: choose the task that the data come from (--env.id), or other data"
        )
    remedy = "choose the task that they come from (--env.id)"
    return in_unit_box(values, low, high, name, remedy)


def in_unit_box(
    values: NDArray[Any], low: NDArray[Any], high: NDArray[Any], name: str, remedy: str
) -> NDArray[np.float32]:
    """Actions b a from their box to [-1, 1].

    Args:
        values: actions in the task's own units.
        low: of each component, over all.
        high: likewise; may equal `low` where a component never changes, which becomes 0.
        name: of the data, for messages.
        remedy: what else to do about actions outside of the box, for messages.

    Raises:
        UserError: an action that is not finite, or further out of the box than rounding leads.
    """
    check_finite(values, "actions", name)
    slack = BOX_TOLERANCE * (high - low)
    outside = (values < low - slack) | (values > high + slack)
    if outside.any():
        row, component = np.argwhere(outside)[0]
        raise UserError(
            f"{name} has the action {values[row, component]:g} at row {row:,} (component "
            f"{component}), outside the task's box [{low[component]:g}, {high[component]:g}]: give "
            f"actions in the task's own units, or {remedy}"
        )
    # About the centre, so that a box that is symmetric loses nothing of small actions.
    half = np.where(high > low, (high - low) / 2, 1)
    return np.clip((values - (high + low) / 2) / half, -1, 1).astype(np.float32)


def _choices(values: NDArray[Any], spec: Spec, count: int, name: str) -> NDArray[np.int64]:
    start, last = spec.action_start, spec.action_start + count - 1
    wanted = int(np.prod(spec.action_shape))  # One label, or one an agent.
    if values.shape[1] != wanted:
        labels = "labels" if wanted == 1 else f"{wanted} labels"
        raise UserError(
            f"{name} has actions of {_count(values.shape[1])}, and the task's are {labels} "
            f"({start} to {last}): choose the task that the data come from (--env.id), or give labels"
        )
    check_finite(values, "actions", name)
    wrong = (values < start) | (values > last) | (values != np.floor(values))
    if wrong.any():
        row, component = np.argwhere(wrong)[0]
        raise UserError(
            f"{name} has the action {values[row, component]:g} at row {row:,}, and the task's labels "
            f"are {start} to {last}: number them as the task does, or choose the task that they come "
            "from (--env.id)"
        )
    return values.astype(np.int64).reshape(len(values), *spec.action_shape) - start


def _row_after(
    obs: NDArray[np.float32], terminated: NDArray[np.bool_], truncated: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Successors where none are given, new truncations, and which rows have a successor."""
    dropped = truncated.copy()
    dropped[-1] |= not terminated[-1]
    next_obs = np.concatenate([obs[1:], obs[-1:]])
    next_obs[terminated] = obs[terminated]
    # The row before a dropped one, if it is of the same episode, is now the episode's last.
    before = np.append(dropped[1:], False) & ~terminated & ~truncated
    return next_obs, truncated | before, ~dropped


def _assemble(
    pieces: Iterable[Transitions | None],
    name: str,
    reference: tuple[float, float] | None,
    provenance: dict[str, Any],
) -> Dataset:
    whole = [piece for piece in pieces if piece is not None]
    if not whole:
        raise UserError(f"{name} is empty: it holds no step")
    rows = Transitions.cat(whole)
    ended = (rows.terminated | rows.truncated).numpy()
    step = _time_in_episode(ended)
    lengths = step[ended] + 1
    same = len(lengths) > 1 and lengths[0] > 1 and bool((lengths == lengths[0]).all())
    if same and not rows.truncated.any():
        warnings.warn(
            f"{name}: all {len(lengths):,} episodes have {lengths[0]:,} steps and end as terminated: "
            "if a time limit ended them, store that as truncations (timeouts), or values come out "
            "too low",
            stacklevel=3,
        )
    return Dataset(
        transitions=rows,
        step=torch.from_numpy(step),
        name=name,
        reference=reference,
        provenance=provenance,
    )


def _time_in_episode(ended: NDArray[np.bool_]) -> NDArray[np.int64]:
    index = np.arange(len(ended))
    starts = np.concatenate([[True], ended[:-1]])
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def _check_sizes(data: Dataset, spec: Spec) -> None:
    """Refuse a ready-made data set of another task."""
    rows = data.transitions
    for what, here, there in (
        ("observations", tuple(rows.obs.shape[1:]), spec.obs_shape),
        ("actions", tuple(rows.action.shape[1:]), spec.action_shape),
    ):
        if here != there:
            raise UserError(
                f"{data.name} has {what} of shape {list(here)}, and the task's are {list(there)}: "
                "choose the task that the data come from (--env.id), or other data"
            )


def _spec_of(pieces: list[tuple[str, Columns]]) -> Spec:
    """Sizes and bounds that the data themselves have."""
    arrays = [_arrays(columns, name) for name, columns in pieces]
    arrays = [found for found in arrays if len(found["actions"])] or arrays
    if not arrays:
        return Spec(obs_shape=(0,), action_shape=(0,))
    obs_dim = int(np.prod(arrays[0]["observations"].shape[1:]))
    actions = [_rows(found["actions"], "actions", pieces[0][0]) for found in arrays]
    width = actions[0].shape[1]
    same = np.concatenate([values for values in actions if values.shape[1] == width])
    low, high = (same.min(0), same.max(0)) if len(same) else (np.zeros(width), np.ones(width))
    if width == 1 and same.dtype.kind in "iub":
        first = min(0, int(low[0]))
        count = int(high[0]) - first + 1
        return Spec(obs_shape=(obs_dim,), action_shape=(), num_actions=count, action_start=first)
    return Spec(
        obs_shape=(obs_dim,),
        action_shape=(width,),
        action_low=tuple(map(float, low)),
        action_high=tuple(map(float, np.where(high > low, high, low + 1))),
    )


def _moments(values: NDArray[np.float64]) -> str:
    return (
        f"{values.mean():,.1f} +- {values.std():,.1f} ({values.min():,.1f} to {values.max():,.1f})"
    )


def _count(width: int) -> str:
    return f"{width} number{'' if width == 1 else 's'}"
