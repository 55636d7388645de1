"""Data and models of users, cut short and with bits flipped: read, or refused in one sentence."""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import esscher
from esscher import images
from esscher.adapters.data import load_dataset
from esscher.adapters.diffusers import load_diffusion
from esscher.adapters.models import frozen_model, load_encoder, load_model
from esscher.adapters.real_samples import read_samples
from esscher.adapters.sets import read_table
from esscher.adapters.text import read_rows
from esscher.errors import UserError
from esscher.experiment import ModelConfig, SetConfig
from esscher.image_rewards import Frechet
from esscher.models import tiny_llama
from esscher.runtime.collect import collect
from esscher.types import Spec
from support import read_damaged, smoke, train

CPU = torch.device("cpu")
SPEC = Spec(obs_shape=(2,), action_shape=(1,), action_low=(-2.0,), action_high=(2.0,))
STEPS = 20


def steps() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        "observations": draw.normal(size=(STEPS, 2)),
        "actions": draw.uniform(-2, 2, (STEPS, 1)),
        "rewards": draw.normal(size=STEPS),
        "next_observations": draw.normal(size=(STEPS, 2)),
        "terminations": np.arange(STEPS) % 10 == 9,
        "truncations": np.zeros(STEPS, bool),
    }


def rows() -> dict[str, list[Any]]:
    return {"a": [1.0, 2.5, 3.0, 4.0], "text": ["é", "b", "c", "d"], "set_id": ["x", "x", "y", "y"]}


def write_npz(path: Path) -> None:
    np.savez_compressed(path, **steps())


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for name, values in steps().items():
            file.create_dataset(name, data=values, fletcher32=True)


def write_parquet(path: Path) -> None:
    table = pyarrow.table(rows())
    pyarrow.parquet.write_table(table, path, compression="none", write_page_checksum=True)


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(rows()), *zip(*rows().values(), strict=True)])


def write_json(path: Path) -> None:
    lines = [dict(zip(rows(), row, strict=True)) for row in zip(*rows().values(), strict=True)]
    whole = json.dumps(lines, ensure_ascii=False)
    parts = [json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(parts) if path.suffix == ".jsonl" else whole, encoding="utf-8")


def write_text(path: Path) -> None:
    path.write_text("\n\n".join(rows()["text"]), encoding="utf-8")


def write_images(path: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(path, image=draw.integers(0, 256, (3, 8, 8), dtype=np.uint8), label=np.arange(3))


def write_embeddings(path: Path) -> None:
    np.save(path, np.random.default_rng(0).normal(size=(5, 3)))


def columns(path: Path) -> Any:
    return read_table(str(path), SetConfig(features=("a",)))


FILES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "steps.npz": (write_npz, lambda path: load_dataset(str(path), SPEC)),
    "steps.hdf5": (write_hdf5, lambda path: load_dataset(str(path), SPEC)),
    "sets.parquet": (write_parquet, columns),
    "sets.csv": (write_csv, columns),
    "sets.jsonl": (write_json, columns),
    "rows.parquet": (write_parquet, lambda path: read_rows(str(path))),
    "rows.jsonl": (write_json, lambda path: read_rows(str(path))),
    "rows.json": (write_json, lambda path: read_rows(str(path))),
    "rows.txt": (write_text, lambda path: read_rows(str(path))),
    "images.npz": (write_images, lambda path: read_samples(str(path), (1, 8, 8), columns={})),
    "embeddings.npy": (write_embeddings, lambda path: Frechet(str(path))),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_data(name: str, tmp_path: Path) -> None:
    write, read = FILES[name]
    path = tmp_path / name
    write(path)
    read_damaged(path, lambda: read(path))


@pytest.mark.parametrize("name", ["steps.npz", "steps.hdf5", "rows.parquet", "images.npz"])
def test_what_a_format_has_sums_of_never_comes_back_changed(name: str, tmp_path: Path) -> None:
    """Zip archives, Fletcher's sums in HDF5, and pages of Parquet that have theirs."""
    write, read = FILES[name]
    path = tmp_path / name
    write(path)

    def values() -> bytes:
        found: Any = read(path)
        if name.startswith("steps"):
            found = [
                found.transitions.fields()[k].tolist() for k in sorted(found.transitions.fields())
            ]
        if name.startswith("images"):
            found = found[0].tolist()
        return json.dumps(found).encode()

    expected, payload = values(), path.read_bytes()
    if name.endswith("npz"):
        assert all(found == expected for found in read_damaged(path, values))
        return
    # Of these the sums are of numbers, not of names and sizes.
    number = 2.5 if name == "rows.parquet" else steps()["rewards"][3]
    place = payload.find(np.float64(number).tobytes())
    assert place > 0
    broken = bytearray(payload)
    broken[place + 6] ^= 1
    path.write_bytes(bytes(broken))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        values()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_images(suffix: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for k in range(2):
        picture = draw.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{k}.{suffix}")
    first = tmp_path / f"0.{suffix}"
    read_damaged(first, lambda: read_samples(str(tmp_path), (1, 8, 8), columns={}))
    read_damaged(first, lambda: read_table(str(tmp_path), SetConfig()))


def test_folders_of_the_datasets_library(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows()).save_to_disk(tmp_path / "saved")
    for path in sorted((tmp_path / "saved").iterdir()):
        read_damaged(path, lambda: read_rows(str(tmp_path / "saved")))


def test_minari_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    evaluation = esscher.EvaluationConfig(every=0, episodes=1, step_limit=20)
    train(smoke("sac", steps=101, evaluation=evaluation), tmp_path / "run")
    collect(tmp_path / "run", "pole/some-v0", policy="random", episodes=2, display=False)
    for name in ("main_data.hdf5", "metadata.json"):
        path = tmp_path / "minari" / "pole" / "some-v0" / "data" / name
        read_damaged(path, lambda: load_dataset("minari:pole/some-v0", None))


# ---- models


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, and adapters on it."""
    import peft

    root = tmp_path_factory.mktemp("writers")
    model, tokenizer = tiny_llama()
    model.save_pretrained(root / "model")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(root / "model")
    adapted.save_pretrained(root / "adapters")
    for folder in ("model", "adapters"):
        tokenizer.save_pretrained(root / folder)
    return root


def opened(folder: Path) -> Any:
    return load_model(ModelConfig(source=str(folder)), CPU)


def merged(folder: Path) -> Any:
    return frozen_model(str(folder), CPU, "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model/config.json", opened),
        ("model/generation_config.json", opened),
        ("model/model.safetensors", opened),
        ("model/tokenizer.json", opened),
        ("model/tokenizer_config.json", opened),
        ("adapters/adapter_config.json", merged),
        ("adapters/adapter_model.safetensors", merged),
    ],
)
def test_folders_of_language_models(name: str, read: Any, writers: Path) -> None:
    path = writers / name
    read_damaged(path, lambda: read(path.parent))


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("painters") / "unet"
    images.tiny_unet(size=8, width=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_folders_of_diffusion_models(name: str, painter: Path) -> None:
    read_damaged(painter / name, lambda: load_diffusion(ModelConfig(source=str(painter)), CPU))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model/model.safetensors", opened),
        ("model/model.safetensors", lambda folder: load_encoder(str(folder), CPU, "critic")),
        ("adapters/adapter_model.safetensors", merged),
        (
            "unet/diffusion_pytorch_model.safetensors",
            lambda folder: load_diffusion(ModelConfig(source=str(folder.parent)), CPU),
        ),
    ],
)
def test_weights_that_are_missing_are_not_made_up(
    name: str, read: Any, writers: Path, painter: Path
) -> None:
    """The libraries behind draw them at random, with a remark."""
    path = (painter if name.startswith("unet") else writers) / name
    payload, weights = path.read_bytes(), load_file(path)
    gone = next(key for key in sorted(weights) if "norm" in key or "lora_B" in key)
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    try:
        with pytest.raises(UserError, match=r"cannot be read: .*(norm|lora_B)"):
            read(path.parent)
    finally:
        path.write_bytes(payload)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(path.parent)
