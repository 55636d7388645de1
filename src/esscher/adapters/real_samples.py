"""Real samples for diffusion models: images in files and data sets, arrays.

| source | what is read |
|---|---|
| FOLDER of images | each file; folders in it are classes, by name in the column `label` |
| FILE.npz | the array `image` (n c h w or n h w, 0 to 255 or 0 to 1) or `sample`, others as columns |
| FILE.parquet, a FOLDER of datasets, a Hugging Face name | the column `image`, others as columns |
| module:function | a mapping of arrays, as in an .npz, or rows with a column `image` or `sample` |

Images of files are made as large as the model's, their shorter side first, and cut in the middle.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from esscher.adapters.imports import made, needed
from esscher.adapters.text import read_rows
from esscher.errors import UserError
from esscher.files import read_npz, readable

Row = Mapping[str, Any]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_samples(
    source: str, shape: Sequence[int], *, columns: Mapping[str, str], split: str = "train"
) -> tuple[Float[Tensor, "n *s"], list[dict[str, Any]]]:
    """Samples as a model shows them (images in [0, 1]), and the other columns of each.

    Args:
        source: see the module.
        shape: of one sample as the model shows it.
        columns: ours -> theirs, where the data have other names.
        split: of a Hugging Face data set.

    Raises:
        UserError: no such source, no column of samples, or samples of another shape.
    """
    path = Path(source).expanduser()
    files = (
        sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
    )
    found: Any
    if path.suffix == ".npz" and path.is_file():
        found = read_npz(path)
    elif files:
        found = _of_folder(path, files)
    elif ":" in source and not path.exists():
        found = made(source, "data")
    else:
        found = read_rows(source, split=split)
    if isinstance(found, Mapping):
        return _of_arrays(found, shape, columns, source)
    return _of_rows(found, shape, columns, source)


def _of_folder(path: Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    folders = sorted({file.parent.relative_to(path).as_posix() for file in files})
    classes = {name: number for number, name in enumerate(folders)} if len(folders) > 1 else {}
    rows: list[dict[str, Any]] = []
    for file in files:
        name = file.parent.relative_to(path).as_posix()
        rows.append({"image": file, **({"label": classes[name]} if classes else {})})
    return rows


def _of_arrays(
    arrays: Mapping[str, Any], shape: Sequence[int], columns: Mapping[str, str], source: str
) -> tuple[Tensor, list[dict[str, Any]]]:
    names = {columns.get(ours, ours): ours for ours in ("image", "sample")}
    key = next((name for name in names if name in arrays), None)
    if key is None:
        raise UserError(
            f"{source} has no array image or sample (it has {', '.join(arrays) or 'none'}): name it "
            "with --image.columns image NAME"
        )
    values = torch.as_tensor(np.asarray(arrays[key]))
    if names[key] == "image":
        values = _as_images(values, source)
    _check_shape(values, shape, source)
    others = {k: np.asarray(v).tolist() for k, v in arrays.items() if k != key}
    for name, column in others.items():
        if len(column) != len(values):
            raise UserError(
                f"{source} has {len(values)} samples and {len(column)} of {name}: they must be as many"
            )
    ours = {theirs: own for own, theirs in columns.items()}
    rows = [
        {ours.get(name, name): column[number] for name, column in others.items()}
        for number in range(len(values))
    ]
    return values.float(), rows


def _of_rows(
    rows: Sequence[Row], shape: Sequence[int], columns: Mapping[str, str], source: str
) -> tuple[Tensor, list[dict[str, Any]]]:
    ours = {theirs: own for own, theirs in columns.items()}
    samples, others = [], []
    for number, row in enumerate(rows):
        named = {ours.get(name, name): value for name, value in row.items()}
        if "image" in named:
            samples.append(_image(named.pop("image"), shape, f"{source}, row {number}"))
        elif "sample" in named:
            samples.append(torch.as_tensor(named.pop("sample"), dtype=torch.float32))
        else:
            raise UserError(
                f"{source}, row {number}: there is no column image or sample (it has "
                f"{', '.join(map(str, named)) or 'none'}): name it with --image.columns image NAME"
            )
        others.append(named)
        if samples[-1].shape != samples[0].shape:
            raise UserError(
                f"{source}, row {number}: a sample of shape {tuple(samples[-1].shape)}, and the first "
                f"has {tuple(samples[0].shape)}"
            )
    if not samples:
        raise UserError(f"{source} holds no samples")
    values = torch.stack(samples)
    _check_shape(values, shape, source)
    return values, others


def _image(value: Any, shape: Sequence[int], place: str) -> Float[Tensor, "c h w"]:
    """An image as a file, its bytes, a PIL image or an array; in [0, 1]."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray | list | Tensor):
        return _as_images(torch.as_tensor(np.asarray(value)).unsqueeze(0), place)[0]
    images: Any = needed("PIL.Image", place, "diffusion")
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"{place}: images, and this model draws samples of shape {tuple(shape)}")
    channels, height, width = shape
    with readable(f"{place}: no image that can be read"):
        file: Any = io.BytesIO(value) if isinstance(value, bytes) else value
        picture = file if hasattr(file, "convert") else images.open(file)
        picture = picture.convert("L" if channels == 1 else "RGB")
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if size != picture.size:
        picture = picture.resize(size, images.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    picture = picture.crop((left, top, left + width, top + height))
    array = torch.from_numpy(np.array(picture)).float() / 255
    return array.unsqueeze(0) if array.ndim == 2 else array.permute(2, 0, 1)


def _as_images(values: Tensor, place: str) -> Float[Tensor, "n c h w"]:
    """In [0, 1], channels first."""
    whole = not values.is_floating_point()
    values = values.float() / 255 if whole else values.float()
    if values.ndim == 3:
        values = values.unsqueeze(1)
    if values.ndim != 4:
        raise UserError(f"{place}: images must be n h w or n c h w, got {tuple(values.shape)}")
    if values.shape[1] not in (1, 3) and values.shape[3] in (1, 3):
        values = values.permute(0, 3, 1, 2)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise UserError(
            f"{place}: images must be whole numbers from 0 to 255 or lie in [0, 1], got {low:g} to "
            f"{high:g}"
        )
    return values.contiguous()


def _check_shape(values: Tensor, shape: Sequence[int], source: str) -> None:
    if tuple(values.shape[1:]) != tuple(shape):
        raise UserError(
            f"{source} has samples of shape {tuple(values.shape[1:])}, and this model draws "
            f"{tuple(shape)}: bring them to that shape first"
        )
    if not bool(values.isfinite().all()):
        raise UserError(f"{source} has samples that are not finite")
