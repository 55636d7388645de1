"""LeRobot's layout: what is written is read back bit for bit, hand-made files are read right."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import toy_robots
from esscher.adapters import lerobot
from esscher.adapters.lerobot import Demonstration, Layout, describe_scenes, read_scenes
from esscher.errors import UserError

LAYOUT = Layout(
    cameras=("front", "hand"),
    image_size=(6, 8),
    state_dim=3,
    action_low=(-2.0, 0.0),
    action_high=(2.0, 4.0),
    instructions=("push the puck", "open"),
    tasks=("metaworld:push-v3", ""),
    fps=20,
)


def png(image: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def episodes(lengths: tuple[int, ...] = (4, 3, 5)) -> tuple[list[Demonstration], list[np.ndarray]]:
    generator, made, images = np.random.default_rng(0), [], []
    for number, length in enumerate(lengths):
        pixels = generator.integers(0, 256, (length, 2, 6, 8, 3), np.uint8)
        images.append(pixels)
        made.append(
            Demonstration(
                png=[[png(image) for image in step] for step in pixels],
                state=generator.standard_normal((length, 3)).astype(np.float32),
                action=generator.uniform([-2, 0], [2, 4], (length, 2)).astype(np.float32),
                reward=np.arange(length, dtype=np.float32),
                success=np.arange(length) == length - 1,
                task=number % 2,
            )
        )
    return made, images


def written(folder: Path, layout: Layout = LAYOUT) -> tuple[list[Demonstration], list[np.ndarray]]:
    folder.mkdir()
    made, images = episodes()
    lerobot.write_lerobot(folder, made, layout, {"dropped": 2})
    return made, images


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made, images = written(tmp_path / "set")
    data = read_scenes(str(tmp_path / "set"))
    assert np.array_equal(data.images.numpy(), np.concatenate(images))
    state = np.concatenate([episode.state for episode in made])
    assert np.array_equal(data.state.numpy(), state) and data.state.dtype == torch.float32
    native = np.concatenate([episode.action for episode in made]).astype(np.float64)
    # [-2, 2] and [0, 4]: half of it, and half of it less 1.
    assert np.allclose(data.action.numpy(), native / 2 - [0, 1], atol=1e-7)
    assert data.episode.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert data.task.tolist() == [0, 1, 0]
    assert data.spec.instructions == ("push the puck", "open")
    assert data.spec.tasks == ("metaworld:push-v3", "")
    assert data.spec.cameras == ("front", "hand") and data.spec.image_size == (6, 8)
    assert data.spec.action_low == (-2.0, 0.0) and data.spec.action_high == (2.0, 4.0)
    assert data.provenance["action_range"] == "the task's box"
    assert data.provenance["successes"] == 3


def test_actions_of_a_box_that_is_the_unit_box_keep_their_bits(tmp_path: Path) -> None:
    from dataclasses import replace

    (tmp_path / "set").mkdir()
    made, _ = episodes()
    made = [replace(e, action=(e.action / 4).astype(np.float32)) for e in made]
    unit = replace(LAYOUT, action_low=(-1.0, -1.0), action_high=(1.0, 1.0))
    lerobot.write_lerobot(tmp_path / "set", made, unit, {})
    action = read_scenes(str(tmp_path / "set")).action.numpy()
    assert action.tobytes() == np.concatenate([e.action for e in made]).tobytes()


def test_cameras_are_chosen_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    _, images = written(tmp_path / "set")
    data = read_scenes(str(tmp_path / "set"), cameras=("hand", "front"))
    assert np.array_equal(data.images.numpy(), np.concatenate(images)[:, ::-1])
    assert data.spec.cameras == ("hand", "front")
    with pytest.raises(UserError, match=r"no camera 'hund': did you mean hand"):
        read_scenes(str(tmp_path / "set"), cameras=("hund",))


def test_the_files_are_those_of_version_3(tmp_path: Path) -> None:
    """As LeRobot 0.4.4 reads them."""
    made, images = written(tmp_path / "set")
    meta = tmp_path / "set" / "meta"
    info = json.loads((meta / "info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 20
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 12, 2)
    assert info["splits"] == {"train": "0:3"} and info["video_path"] is None
    rows = pq.read_table(
        tmp_path / "set" / info["data_path"].format(chunk_index=0, file_index=0)
    ).to_pylist()
    assert set(rows[0]) == set(info["features"])
    row = rows[5]  # The second step of the second episode.
    assert (row["index"], row["episode_index"], row["frame_index"], row["task_index"]) == (
        5,
        1,
        1,
        1,
    )
    assert row["timestamp"] == pytest.approx(0.05)
    assert [r["next.done"] for r in rows[4:7]] == [False, False, True]
    assert [r["next.success"] for r in rows[4:7]] == [False, False, True]
    pixels = np.asarray(Image.open(io.BytesIO(row["observation.images.hand"]["bytes"])))
    assert np.array_equal(pixels, images[1][1, 1])
    found = pq.read_table(meta / "episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["dataset_from_index"] for e in found] == [0, 4, 7]
    assert [e["dataset_to_index"] for e in found] == [4, 7, 12]
    assert [e["tasks"] for e in found] == [["push the puck"], ["open"], ["push the puck"]]
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(meta / "tasks.parquet")
    assert tasks.loc["open"].task_index == 1 and tasks.iloc[0].name == "push the puck"
    stats = json.loads((meta / "stats.json").read_text())
    state = np.concatenate([e.state for e in made]).astype(np.float64)
    assert np.allclose(stats["observation.state"]["std"], state.std(0))
    assert np.allclose(stats["observation.state"]["q90"], np.quantile(state, 0.9, axis=0))
    front = np.concatenate(images)[:, 0] / 255
    assert np.shape(stats["observation.images.front"]["mean"]) == (3, 1, 1)
    assert np.allclose(np.ravel(stats["observation.images.front"]["mean"]), front.mean((0, 1, 2)))
    assert np.allclose(np.ravel(stats["observation.images.front"]["std"]), front.std((0, 1, 2)))
    assert np.allclose(np.ravel(stats["observation.images.front"]["max"]), front.max((0, 1, 2)))
    assert stats["observation.images.front"]["count"] == [12]
    second = images[1][:, 1] / 255
    there = np.ravel(found[1]["stats/observation.images.hand/mean"])
    assert np.allclose(there, second.mean((0, 1, 2)))


def test_the_datasets_library_decodes_the_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    _, images = written(tmp_path / "set")
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(np.asarray(rows[4]["observation.images.front"]), images[1][0, 0])
    assert len(rows[4]["action"]) == 2


def test_large_sets_are_divided_among_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot, "MEGABYTES_A_FILE", 2e-3)
    monkeypatch.setattr(lerobot, "FILES_A_CHUNK", 2)
    _, images = written(tmp_path / "set")
    files = sorted(
        p.relative_to(tmp_path / "set/data") for p in (tmp_path / "set/data").rglob("*.p*")
    )
    assert [str(f) for f in files] == [
        *("chunk-000/file-000.parquet", "chunk-000/file-001.parquet", "chunk-001/file-000.parquet")
    ]
    assert np.array_equal(read_scenes(str(tmp_path / "set")).images, np.concatenate(images))


# ---- files made by hand


def by_hand(folder: Path, **changes: Any) -> str:
    """Version 2's layout with one camera: a file an episode, two episodes of two steps."""
    (folder / "meta").mkdir(parents=True)
    kind = changes.pop("kind", "image")
    features = {"observation.images.top": {"dtype": kind, "shape": [2, 2, 3]}}
    info = {"codebase_version": "v2.1", "fps": 10, "features": changes.pop("features", features)}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 7, "task": "lift"}\n')
    grey = [png(np.full((2, 2, 3), k, np.uint8)) for k in range(4)]
    columns: dict[str, list[Any]] = {
        "observation.images.top": [{"bytes": data, "path": None} for data in grey],
        "observation.state": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]],
        "action": [[0.0, 5.0], [2.0, 5.0], [8.0, 5.0], [4.0, 5.0]],
        "episode_index": [3, 3, 4, 4],
        "frame_index": [0, 1, 0, 1],
        "task_index": [7, 7, 7, 7],
    }
    columns |= {name.replace("__", "."): value for name, value in changes.items()}
    columns = {name: values for name, values in columns.items() if values is not None}
    (folder / "data/chunk-000").mkdir(parents=True)
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        table = pa.table({name: values[rows] for name, values in columns.items()})
        pq.write_table(table, folder / f"data/chunk-000/episode_{number:06d}.parquet")
    return str(folder)


def test_a_set_made_by_hand(tmp_path: Path) -> None:
    data = read_scenes(by_hand(tmp_path))
    assert data.images.shape == (4, 1, 2, 2, 3)
    assert data.images[:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.state.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    # The range of the data, [0, 8], becomes [-1, 1]; what never changes becomes 0.
    assert data.action.tolist() == [[-1, 0], [-0.5, 0], [1, 0], [0, 0]]
    assert data.episode.tolist() == [0, 0, 1, 1] and data.task.tolist() == [0, 0]
    assert data.spec.instructions == ("lift",) and data.spec.tasks == ("",)
    assert data.provenance["action_range"] == "the range of each component in the data"
    shown = describe_scenes(data)
    assert shown["episodes"] == "2" and shown["images"] == "2 x 2, of top"
    assert shown["tasks"] == "'lift', 2 episodes" and "successes" not in shown


SMALL, LARGE = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
NAN = float("nan")


def cells(*images: bytes | None) -> list[dict[str, Any]]:
    return [{"bytes": image, "path": None} for image in images]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "video"}, "stores observation.images.top as video: only images in the Parquet"),
        ({"features": {}}, "has no images: it has no column observation.images.NAME"),
        ({"observation__state": None}, "has no column observation.state"),
        ({"action": None}, "has no column action"),
        (
            {"observation__images__top": cells(*[png(SMALL)] * 3, png(LARGE))},
            "at row 3 is 2 x 3, and the first is 2 x 2: bring all to one size",
        ),
        (
            {"observation__images__top": cells(*[png(SMALL)] * 3, png(SMALL, "L"))},
            "is an image of type L: store RGB with 8 bits a colour",
        ),
        (
            {"observation__images__top": cells(*[png(SMALL)] * 3, b"nonsense")},
            "cannot be read as an image",
        ),
        (
            {"observation__images__top": cells(*[png(SMALL)] * 3, None)},
            "at row 3 holds no bytes",
        ),
        (
            {"observation__state": [[1.0, 2.0], [3.0, NAN], [5.0, 6.0], [7.0, 8.0]]},
            "has nan in observation.state at row 1 \\(component 1\\)",
        ),
        (
            {"action": [[0.0, 5.0], [2.0, 5.0], [float("inf"), 5.0], [4.0, 5.0]]},
            "has inf in action at row 2",
        ),
        (
            {"episode_index": [3, 3, 4, 5], "frame_index": [0, 1, 0, 0]},
            "has an episode of 1 step \\(number 1\\)",
        ),
        ({"frame_index": [0, 1, 1, 0]}, "has steps out of order"),
        ({"task_index": [7, 7, 7, 8]}, "has an episode of several tasks: number 4"),
        ({"task_index": [7, 7, 9, 9]}, "has task_index 9, which meta/tasks does not explain"),
        ({"action": [["a"], ["b"], ["c"], ["d"]]}, "they must be numbers"),
        ({"action": [["a"], ["b"], [0.0], [1.0]]}, "columns of different types"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_scenes(by_hand(tmp_path, **changes))


def test_actions_outside_of_the_box_are_refused(tmp_path: Path) -> None:
    source = by_hand(tmp_path)
    own = {"tasks": {}, "action_low": [0.0, 0.0], "action_high": [4.0, 9.0]}
    (tmp_path / "meta/esscher.json").write_text(json.dumps(own))
    with pytest.raises(
        UserError, match=r"action 8 at row 2 \(component 0\), outside the task's box"
    ):
        read_scenes(source)


def test_cameras_of_several_sizes_are_refused(tmp_path: Path) -> None:
    sizes = {"observation.images.top": SMALL, "observation.images.side": LARGE}
    features = {name: {"dtype": "image"} for name in sizes}
    source = by_hand(
        tmp_path, features=features, observation__images__side=cells(*[png(LARGE)] * 4)
    )
    with pytest.raises(UserError, match="several sizes: side 2 x 3 and top 2 x 2"):
        read_scenes(source)
    assert read_scenes(source, cameras=("side",)).spec.image_size == (2, 3)


def test_sources_that_are_no_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no demonstrations"):
        read_scenes(str(tmp_path))
    with pytest.raises(UserError, match="no demonstrations 'missing' here"):
        read_scenes("missing")
    with pytest.raises(UserError, match="returned a dict: return an esscher.experience.scenes"):
        read_scenes("toy_robots:nothing")


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "set")
    data = read_scenes(str(tmp_path / "set"))
    monkeypatch.setattr(toy_robots, "_SCENES", data)
    assert read_scenes("toy_robots:scenes") is data
    chosen = read_scenes("toy_robots:scenes", cameras=("hand",))
    assert torch.equal(chosen.images, data.images[:, 1:]) and chosen.spec.cameras == ("hand",)
