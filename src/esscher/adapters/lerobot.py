"""Demonstrations on disk, in the layout of LeRobot's data sets (v3.0), with images as PNG.

| file | what it holds |
|---|---|
| meta/info.json | version, counts, frames a second, every column with its type and shape |
| meta/tasks.parquet | the instructions |
| meta/episodes/chunk-000/file-000.parquet | a row an episode: its rows, its length, its statistics |
| meta/stats.json | statistics of every column |
| data/chunk-000/file-000.parquet | a row a step; images are bytes of PNG files |
| meta/esscher.json | ours: where the tasks are played, the box of the actions, how it was collected |

Actions are stored in the task's own units. Version 2's layout (a file an episode, lists in .jsonl) is
read as well; images that are stored as videos are not.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esscher.adapters.data import check_finite, in_unit_box
from esscher.adapters.imports import made, needed
from esscher.errors import UserError, nearest
from esscher.experience.scenes import SceneData
from esscher.types import RobotSpec

IMAGES = "observation.images."
STATE, ACTION, SUCCESS = "observation.state", "action", "next.success"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_A_CHUNK = 1000
MEGABYTES_A_FILE = 100
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One episode of t steps."""

    png: list[list[bytes]]
    """Of each step, an image a camera."""
    state: NDArray[np.float32]
    """t s."""
    action: NDArray[np.float32]
    """t a, in the task's own units."""
    reward: NDArray[np.float32]
    """t."""
    success: NDArray[np.bool_]
    """t: whether the task was solved after the step."""
    task: int
    """Which of the set's instructions it follows."""

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What all episodes of a set share."""

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    state_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    instructions: tuple[str, ...]
    tasks: tuple[str, ...]
    fps: int


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of an image h w 3."""
    pictures = needed("PIL.Image", "writing images", "robots")
    buffer = io.BytesIO()
    pictures.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(data: bytes, where: str) -> NDArray[np.uint8]:
    """An image h w 3.

    Raises:
        UserError: it is no image, or not of three colours with 8 bits each.
    """
    pictures = needed("PIL.Image", "reading images", "robots")
    try:
        with pictures.open(io.BytesIO(data)) as picture:
            if picture.mode != "RGB":
                raise UserError(
                    f"{where} is an image of type {picture.mode}: store RGB with 8 bits a colour "
                    "(uint8)"
                )
            return np.asarray(picture)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{where} cannot be read as an image: {error}") from error


# ---- writing


def write_lerobot(
    folder: Path, episodes: Iterable[Demonstration], layout: Layout, about: Mapping[str, Any]
) -> None:
    """Write a data set into an empty folder.

    Args:
        folder: which exists, and gets its name when all is written; see runtime/demonstrate.py.
        episodes: one after another; none is kept.
        layout: of all of them.
        about: further entries of meta/esscher.json.
    """
    writer = _Writer(folder, layout)
    for episode in episodes:
        writer.add(episode)
    writer.finish(about)


class _Writer:
    """Takes episodes one by one; files are closed before they grow beyond MEGABYTES_A_FILE."""

    def __init__(self, folder: Path, layout: Layout):
        self.arrow = needed("pyarrow", "writing demonstrations", "robots")
        self.parquet = needed("pyarrow.parquet", "writing demonstrations", "robots")
        self.folder, self.layout = folder, layout
        self.features = _features(layout)
        self.schema = _schema(self.arrow, self.features)
        self.frames = self.bytes = self.file = 0
        self.open: Any = None
        self.episodes: list[dict[str, Any]] = []
        self.columns: dict[str, list[Array]] = {}
        self.histograms: dict[str, NDArray[np.int64]] = {}

    def add(self, episode: Demonstration) -> None:
        columns = self._columns(episode)
        size = sum(len(image) for images in episode.png for image in images) + episode.state.nbytes
        if self.open is not None and self.bytes + size > MEGABYTES_A_FILE * 2**20:
            self.open.close()
            self.open, self.bytes, self.file = None, 0, self.file + 1
        if self.open is None:
            path = self.folder / "data" / FILE.format(**self._place())
            path.parent.mkdir(parents=True, exist_ok=True)
            self.open = self.parquet.ParquetWriter(path, self.schema)
        arrays = [
            self.arrow.array(_cells(columns[name]), self.schema.field(name).type)
            for name in self.schema.names
        ]
        self.open.write_table(self.arrow.Table.from_arrays(arrays, schema=self.schema))
        self._note(columns, size)

    def finish(self, about: Mapping[str, Any]) -> None:
        layout = self.layout
        if self.open is not None:
            self.open.close()
        meta = self.folder / "meta"
        path = meta / "episodes" / FILE.format(chunk_index=0, file_index=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parquet.write_table(self.arrow.Table.from_pylist(self.episodes), path)
        pandas = needed("pandas", "writing demonstrations", "robots")
        index = pandas.Index(layout.instructions, name="task")
        frame = pandas.DataFrame({"task_index": range(len(layout.instructions))}, index=index)
        frame.to_parquet(meta / "tasks.parquet")
        stats = {name: _statistics(np.concatenate(rows)) for name, rows in self.columns.items()}
        stats |= {name: _image_statistics(self.histograms[name]) for name in self.histograms}
        _write_json(meta / "stats.json", stats)
        _write_json(
            meta / "info.json",
            {
                "codebase_version": "v3.0",
                "robot_type": None,
                "total_episodes": len(self.episodes),
                "total_frames": self.frames,
                "total_tasks": len(layout.instructions),
                "chunks_size": FILES_A_CHUNK,
                "data_files_size_in_mb": MEGABYTES_A_FILE,
                "video_files_size_in_mb": 200,
                "fps": layout.fps,
                "splits": {"train": f"0:{len(self.episodes)}"},
                "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                "video_path": None,
                "features": self.features,
            },
        )
        own = {
            "tasks": dict(zip(layout.instructions, layout.tasks, strict=True)),
            "action_low": layout.action_low,
            "action_high": layout.action_high,
        }
        _write_json(meta / "esscher.json", own | dict(about))

    def _place(self) -> dict[str, int]:
        chunk, file = divmod(self.file, FILES_A_CHUNK)
        return {"chunk_index": chunk, "file_index": file}

    def _columns(self, episode: Demonstration) -> dict[str, Any]:
        length = len(episode)
        steps = np.arange(length)
        done = np.zeros(length, bool)
        done[-1] = True
        columns: dict[str, Any] = {
            f"{IMAGES}{camera}": [
                {"bytes": images[number], "path": f"frame-{step:06d}.png"}
                for step, images in enumerate(episode.png)
            ]
            for number, camera in enumerate(self.layout.cameras)
        }
        return columns | {
            STATE: episode.state,
            ACTION: episode.action,
            "next.reward": episode.reward,
            "next.done": done,
            SUCCESS: episode.success,
            "timestamp": (steps / self.layout.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, len(self.episodes)),
            "index": steps + self.frames,
            "task_index": np.full(length, episode.task),
        }

    def _note(self, columns: Mapping[str, Any], size: int) -> None:
        """Keep what the files under meta/ say of an episode."""
        length = len(columns[ACTION])
        stats = {}
        for name, values in columns.items():
            if name.startswith(IMAGES):
                histogram = _histogram([cell["bytes"] for cell in values], name)
                self.histograms[name] = self.histograms.get(name, 0) + histogram
                stats[name] = _image_statistics(histogram)
            else:
                rows = np.asarray(values, np.float64).reshape(length, -1)
                self.columns.setdefault(name, []).append(rows)
                stats[name] = _statistics(rows)
        place = self._place()
        self.episodes.append(
            {
                "episode_index": len(self.episodes),
                "tasks": [self.layout.instructions[int(columns["task_index"][0])]],
                "length": length,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{
                    f"stats/{name}/{k}": v
                    for name, found in stats.items()
                    for k, v in found.items()
                },
            }
        )
        self.frames, self.bytes = self.frames + length, self.bytes + size


def _features(layout: Layout) -> dict[str, dict[str, Any]]:
    rows, columns = layout.image_size
    image = {
        "dtype": "image",
        "shape": [rows, columns, 3],
        "names": ["height", "width", "channels"],
    }
    one = {"shape": [1], "names": None}
    return {
        **{f"{IMAGES}{camera}": image for camera in layout.cameras},
        STATE: {"dtype": "float32", "shape": [layout.state_dim], "names": None},
        ACTION: {"dtype": "float32", "shape": [len(layout.action_low)], "names": None},
        "next.reward": {"dtype": "float32", **one},
        "next.done": {"dtype": "bool", **one},
        SUCCESS: {"dtype": "bool", **one},
        "timestamp": {"dtype": "float32", **one},
        **{
            name: {"dtype": "int64", **one}
            for name in ("frame_index", "episode_index", "index", "task_index")
        },
    }


def _schema(arrow: Any, features: Mapping[str, Mapping[str, Any]]) -> Any:
    """Arrow's types, and a note in which the datasets library finds its own."""
    fields, noted = [], {}
    for name, feature in features.items():
        if feature["dtype"] == "image":
            kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
            noted[name] = {"_type": "Image"}
        else:
            kind = getattr(arrow, feature["dtype"] + "_" * (feature["dtype"] == "bool"))()
            noted[name] = {"dtype": feature["dtype"], "_type": "Value"}
            if feature["shape"] != [1]:
                length = feature["shape"][0]
                kind = arrow.list_(kind, length)
                noted[name] = {"feature": noted[name], "length": length, "_type": "Sequence"}
        fields.append(arrow.field(name, kind))
    note = json.dumps({"info": {"features": noted}})
    return arrow.schema(fields, metadata={"huggingface": note})


def _cells(values: Any) -> list[Any]:
    """Python values, one a row; rows of one number are that number."""
    if isinstance(values, list):
        return values
    squeezed = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    return squeezed.tolist() if squeezed.ndim == 1 else list(squeezed)


def _statistics(rows: NDArray[np.float64]) -> dict[str, list[Any]]:
    """Of each component of n k."""
    found = {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        **{name: np.quantile(rows, q, axis=0) for name, q in QUANTILES.items()},
    }
    return {name: value.tolist() for name, value in found.items()} | {"count": [len(rows)]}


def _histogram(images: Sequence[bytes], where: str) -> NDArray[np.int64]:
    """How often each colour has each value, 3 256, and then the number of images."""
    counts = np.zeros((3, 257), np.int64)
    for data in images:
        pixels = decode_png(data, where).reshape(-1, 3)
        for colour in range(3):
            counts[colour, :256] += np.bincount(pixels[:, colour], minlength=256)
    counts[:, 256] = len(images)
    return counts


def _image_statistics(histogram: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Of each colour in [0, 1], in the shape 3 1 1 that LeRobot wants."""
    value, counts = np.arange(256) / 255, histogram[:, :256]
    share = counts / counts.sum(1, keepdims=True)
    mean, reached = share @ value, np.cumsum(share, 1)
    found = {
        "min": [value[np.flatnonzero(row)[0]] for row in counts],
        "max": [value[np.flatnonzero(row)[-1]] for row in counts],
        "mean": mean,
        "std": [np.sqrt(row @ (value - m) ** 2) for row, m in zip(share, mean, strict=True)],
        # The smallest value that this share of the pixels does not exceed.
        **{
            name: [value[min(int(np.searchsorted(row, q)), 255)] for row in reached]
            for name, q in QUANTILES.items()
        },
    }
    shaped = {name: np.reshape(colours, (3, 1, 1)).tolist() for name, colours in found.items()}
    return shaped | {"count": [int(histogram[0, 256])]}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")


# ---- reading


def is_lerobot(source: str) -> bool:
    """Whether this is a folder in the layout of LeRobot."""
    return (Path(source).expanduser() / "meta" / "info.json").is_file()


def read_scenes(source: str, *, cameras: Sequence[str] = ()) -> SceneData:
    """Demonstrations of robots that see.

    Actions are rescaled to [-1, 1] by the task's box, which the data of `esscher data collect` state;
    else by the range of each component in the data, and `provenance["action_range"]` says which.

    Args:
        source: a folder in the layout of LeRobot, or module:function, which returns a `SceneData`.
        cameras: which, in this order; all by default.

    Raises:
        UserError: no such data; columns or cameras that are missing; images that are videos, of several
            sizes or not RGB with 8 bits a colour; values that are not finite; actions outside the
            task's box; an episode of one step, of several tasks, or with steps out of order.
    """
    if is_lerobot(source):
        return _read_folder(Path(source).expanduser(), cameras)
    if Path(source).expanduser().exists() or ":" not in source:
        raise UserError(
            f"no demonstrations {source!r} here: give a folder in the layout of LeRobot (with "
            "meta/info.json), or module:function"
        )
    found = made(source, "data")
    if not isinstance(found, SceneData):
        raise UserError(
            f"{source} returned a {type(found).__name__}: return an "
            "esscher.experience.scenes.SceneData"
        )
    return _of_function(found, cameras)


def describe_scenes(data: SceneData) -> dict[str, str]:
    """What a person wants to know of demonstrations first: label -> value."""
    spec, lengths = data.spec, data.lengths()
    episodes = torch.bincount(data.task, minlength=len(spec.instructions)).tolist()
    told = zip(spec.instructions, spec.tasks, episodes, strict=True)
    rows, columns = spec.image_size
    low, high = data.action.min(0).values.tolist(), data.action.max(0).values.tolist()
    ranges = ", ".join(f"{a:.2g} to {b:.2g}" for a, b in zip(low, high, strict=True))
    shown = {
        "steps": f"{len(data):,}",
        "episodes": f"{data.num_episodes:,}",
        "length": f"{lengths.double().mean():,.1f} ({lengths.min()} to {lengths.max()})",
        "tasks": "\n".join(
            f"{words!r}, {count} episodes" + (f", played in {place}" if place else "")
            for words, place, count in told
        ),
    }
    if "successes" in data.provenance:
        shown["successes"] = f"{data.provenance['successes']:,} of {data.num_episodes:,} episodes"
    if "dropped" in data.provenance:
        shown["dropped"] = f"{data.provenance['dropped']:,} failed attempts, not in the set"
    return shown | {
        "images": f"{rows} x {columns}, of {', '.join(spec.cameras)}",
        "state": f"{spec.state_dim} numbers",
        "action": f"{spec.action_dim} numbers, in [-1, 1]: {ranges}",
        "action range": str(data.provenance.get("action_range", "not stated")),
    }


def _of_function(data: SceneData, cameras: Sequence[str]) -> SceneData:
    _check_lengths(data.lengths().tolist(), data.name)
    for column, values in (("state", data.state), ("actions", data.action)):
        check_finite(values.numpy(), column, data.name)
    if not cameras:
        return data
    chosen = [_camera(camera, data.spec.cameras, data.name) for camera in cameras]
    place = [data.spec.cameras.index(camera) for camera in chosen]
    return replace(
        data, images=data.images[:, place], spec=replace(data.spec, cameras=tuple(cameras))
    )


def _read_folder(folder: Path, cameras: Sequence[str]) -> SceneData:
    name = str(folder)
    info = _read_json(folder / "meta" / "info.json")
    features: Mapping[str, Any] = info.get("features", {})
    chosen = _cameras(features, cameras, name)
    own_path = folder / "meta" / "esscher.json"
    own = _read_json(own_path) if own_path.exists() else {}
    table = _read_table(folder, [IMAGES + camera for camera in chosen])
    episode, task = _episodes(table, name)
    instructions = _instructions(folder)
    if not set(task.tolist()) <= set(instructions):
        raise UserError(f"{name} has task_index {task.max()}, which meta/tasks does not explain")
    state = _numbers(table, STATE, name)
    check_finite(state, STATE, name)
    native = _numbers(table, ACTION, name)
    check_finite(native, ACTION, name)
    known = "action_low" in own
    low = np.array(own["action_low"]) if known else native.min(0).astype(np.float64)
    high = np.array(own["action_high"]) if known else native.max(0).astype(np.float64)
    if len(low) != native.shape[1]:
        raise UserError(f"{name} has actions of {native.shape[1]} numbers, and a box of {len(low)}")
    action = in_unit_box(native, low, high, name, "mend meta/esscher.json")
    views = [_images(table, IMAGES + camera, name) for camera in chosen]
    for camera, view in zip(chosen, views, strict=True):
        if view.shape != views[0].shape:
            (a, b), (c, d) = view.shape[1:3], views[0].shape[1:3]
            raise UserError(
                f"{name} has images of several sizes: {camera} {a} x {b} and {chosen[0]} {c} x {d}: "
                "bring all to one size, or choose cameras"
            )
    images = np.stack(views, axis=1)
    used = sorted(set(task.tolist()))
    words = tuple(instructions[number] for number in used)
    provenance = {k: v for k, v in own.items() if k not in ("tasks", "action_low", "action_high")}
    provenance |= {
        "format": f"LeRobot {info.get('codebase_version', 'of unknown version')}",
        "fps": info.get("fps"),
        "action_range": "the task's box" if known else "the range of each component in the data",
    }
    if SUCCESS in table.column_names:
        solved = _numbers(table, SUCCESS, name)[:, 0]
        provenance["successes"] = len(np.unique(episode[solved > 0]))
    return SceneData(
        images=torch.from_numpy(images),
        state=torch.from_numpy(state.astype(np.float32)),
        action=torch.from_numpy(action),
        episode=torch.from_numpy(episode),
        task=torch.from_numpy(np.searchsorted(used, task)),
        spec=RobotSpec(
            cameras=chosen,
            image_size=(images.shape[2], images.shape[3]),
            state_dim=state.shape[1],
            action_low=tuple(low.tolist()),
            action_high=tuple(high.tolist()),
            instructions=words,
            tasks=tuple(own.get("tasks", {}).get(text, "") for text in words),
        ),
        name=name,
        provenance=provenance,
    )


def _cameras(features: Mapping[str, Any], asked: Sequence[str], name: str) -> tuple[str, ...]:
    """Which of the set's images are read.

    Raises:
        UserError: it has none, or not these, or stores them as videos.
    """
    kinds = {
        key.removeprefix(IMAGES): feature["dtype"]
        for key, feature in features.items()
        if key.startswith(IMAGES)
    }
    if not kinds:
        raise UserError(f"{name} has no images: it has no column {IMAGES}NAME")
    chosen = tuple(_camera(camera, kinds, name) for camera in asked) or tuple(kinds)
    for camera in chosen:
        if kinds[camera] != "image":
            raise UserError(
                f"{name} stores {IMAGES}{camera} as {kinds[camera]}: only images in the Parquet files "
                "(dtype image) are read, which LeRobot writes with use_videos=False"
            )
    return chosen


def _camera(camera: str, known: Iterable[str], name: str) -> str:
    known = list(known)
    if camera not in known:
        raise UserError(f"{name} has no camera {camera!r}: {nearest(camera, known)}")
    return camera


def _read_table(folder: Path, images: Sequence[str]) -> Any:
    """All rows, of the columns that are read."""
    arrow = needed("pyarrow", str(folder), "robots")
    parquet = needed("pyarrow.parquet", str(folder), "robots")
    files = sorted(folder.glob("data/*/*.parquet"))
    if not files:
        raise UserError(f"{folder} holds no data/chunk-000/*.parquet")
    needs = [*images, STATE, ACTION, "episode_index", "frame_index", "task_index"]
    tables = []
    for file in files:
        try:
            names = parquet.read_schema(file).names
            missing = [column for column in needs if column not in names]
            if missing:
                raise UserError(f"{file} has no column {missing[0]}: it has {', '.join(names)}")
            read = [*needs, *([SUCCESS] if SUCCESS in names else [])]
            tables.append(parquet.read_table(file, columns=read))
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read as Parquet: {error}") from error
    try:
        return arrow.concat_tables([table.select(tables[0].column_names) for table in tables])
    except arrow.ArrowException as error:
        raise UserError(f"{folder} has files with columns of different types: {error}") from error


def _episodes(table: Any, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of each row's episode, counted from 0, and the task of each episode."""
    stored = _numbers(table, "episode_index", name)[:, 0].astype(np.int64)
    frame = _numbers(table, "frame_index", name)[:, 0].astype(np.int64)
    task = _numbers(table, "task_index", name)[:, 0].astype(np.int64)
    if not len(stored):
        raise UserError(f"{name} is empty: it holds no step")
    _, first, episode, lengths = np.unique(
        stored, return_index=True, return_inverse=True, return_counts=True
    )
    if (np.diff(stored) < 0).any() or (frame != np.arange(len(frame)) - first[episode]).any():
        raise UserError(f"{name} has steps out of order: frame_index must count 0, 1, ... in each")
    if (task != task[first][episode]).any():
        row = int(np.argmax(task != task[first][episode]))
        raise UserError(f"{name} has an episode of several tasks: number {stored[row]}")
    _check_lengths(lengths.tolist(), name)
    return episode.astype(np.int64), task[first]


def _check_lengths(lengths: Sequence[int], name: str) -> None:
    if min(lengths, default=0) < 2:
        raise UserError(
            f"{name} has an episode of {min(lengths, default=0)} step (number "
            f"{int(np.argmin(lengths)) if lengths else 0}): leave it out, it shows nothing"
        )


def _instructions(folder: Path) -> dict[int, str]:
    """Of each task_index: meta/tasks.parquet, or meta/tasks.jsonl of version 2."""
    path, older = folder / "meta" / "tasks.parquet", folder / "meta" / "tasks.jsonl"
    if path.exists():
        table = needed("pyarrow.parquet", str(folder), "robots").read_table(path).to_pydict()
        # pandas calls an index without a name so.
        texts = table.get("task", table.get("__index_level_0__"))
        if texts is None or "task_index" not in table:
            raise UserError(f"{path} must have the columns task and task_index, not {list(table)}")
        return dict(zip(table["task_index"], texts, strict=True))
    if older.exists():
        lines = [json.loads(line) for line in older.read_text(encoding="utf-8").splitlines()]
        return {line["task_index"]: line["task"] for line in lines}
    raise UserError(f"{folder} has no meta/tasks.parquet, which holds the instructions")


def _numbers(table: Any, column: str, name: str) -> Array:
    """A row a step."""
    values = table.column(column).to_pylist()
    try:
        rows = np.asarray(values).reshape(len(values), -1)
    except ValueError as error:
        raise UserError(f"{name} has {column} of different widths") from error
    if rows.dtype.kind not in "fiub":
        raise UserError(f"{name} holds {column} of type {rows.dtype}: they must be numbers")
    return rows


def _images(table: Any, column: str, name: str) -> NDArray[np.uint8]:
    """All of a camera: b h w 3.

    Raises:
        UserError: one is missing, of another size or of another type.
    """
    images: Any = None
    cells = table.column(column).to_pylist()
    for row, cell in enumerate(cells):
        where = f"{name}: {column} at row {row:,}"
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if data is None:
            raise UserError(f"{where} holds no bytes: store the images in the Parquet files")
        image = decode_png(data, where)
        if images is None:
            images = np.empty((len(cells), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            (a, b), (c, d) = image.shape[:2], images.shape[1:3]
            raise UserError(
                f"{where} is {a} x {b}, and the first is {c} x {d}: bring all to one size first"
            )
        images[row] = image
    return images


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
