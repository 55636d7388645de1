"""Real samples, from every kind of source, against arrays written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esscher.adapters.real_samples import read_samples
from esscher.errors import UserError

GREY = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
SHAPE = (1, 4, 4)


def expected() -> torch.Tensor:
    return torch.from_numpy(GREY.astype(np.float32) / 255).unsqueeze(1)


def arrays() -> dict[str, Any]:
    return {"image": GREY, "label": np.array([2, 0, 1])}


def rows() -> list[dict[str, Any]]:
    return [{"image": Image.fromarray(image), "caption": str(n)} for n, image in enumerate(GREY)]


def points() -> list[dict[str, Any]]:
    return [{"sample": [1.0, 2.0], "label": 0}, {"sample": [3.0, 4.0], "label": 1}]


def test_arrays_of_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", **arrays())
    x, others = read_samples(str(tmp_path / "some.npz"), SHAPE, columns={})
    assert torch.equal(x, expected())
    assert others == [{"label": 2}, {"label": 0}, {"label": 1}]


@pytest.mark.parametrize("form", ["n h w c", "n c h w", "float"])
def test_colour_images_in_either_order(tmp_path: Path, form: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    given: Any = image.transpose(0, 2, 3, 1) if form == "n h w c" else image
    if form == "float":
        given = image / 255
    np.savez(tmp_path / "some.npz", picture=given)
    x, _ = read_samples(str(tmp_path / "some.npz"), (3, 4, 4), columns={"image": "picture"})
    torch.testing.assert_close(x, torch.from_numpy(image.astype(np.float32) / 255))


def test_a_folder_of_images_whose_folders_are_classes(tmp_path: Path) -> None:
    for name, image in zip(("b", "a", "b"), GREY, strict=True):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name / f"{image[0, 0]:03d}.png")
    x, others = read_samples(str(tmp_path), SHAPE, columns={})
    assert torch.equal(x, expected()[[1, 0, 2]])
    assert others == [{"label": 0}, {"label": 1}, {"label": 1}]


def test_images_are_made_as_large_as_the_models_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    x, others = read_samples(str(tmp_path), SHAPE, columns={})
    assert x.shape == (1, *SHAPE) and float(x.mean()) > 0.9 and others == [{}]


def test_functions_of_rows_and_columns_of_other_names() -> None:
    x, others = read_samples(f"{__name__}:rows", SHAPE, columns={"prompt": "caption"})
    assert torch.equal(x, expected())
    assert others == [{"prompt": "0"}, {"prompt": "1"}, {"prompt": "2"}]
    x, others = read_samples(f"{__name__}:points", (2,), columns={})
    assert x.tolist() == [[1.0, 2.0], [3.0, 4.0]] and others == [{"label": 0}, {"label": 1}]


def test_a_parquet_file_of_the_hub(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "some.parquet")
    x, others = read_samples(str(tmp_path / "some.parquet"), SHAPE, columns={})
    assert torch.equal(x, expected()) and others[1] == {"caption": "1"}
    table.save_to_disk(tmp_path / "saved")
    x, _ = read_samples(str(tmp_path / "saved"), SHAPE, columns={})
    assert torch.equal(x, expected())


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    def read(shape: Any = SHAPE, **given: Any) -> None:
        np.savez(tmp_path / "some.npz", **given)
        read_samples(str(tmp_path / "some.npz"), shape, columns={})

    with pytest.raises(UserError, match="no array image or sample"):
        read(picture=GREY)
    with pytest.raises(UserError, match=r"shape \(1, 4, 4\), and this model draws \(3, 4, 4\)"):
        read((3, 4, 4), image=GREY)
    with pytest.raises(UserError, match="0 to 255"):
        read(image=GREY / 10)
    with pytest.raises(UserError, match="3 samples and 2 of label"):
        read(image=GREY, label=np.zeros(2))
    with pytest.raises(UserError, match="not finite"):
        read((2,), sample=np.array([[np.nan, 0.0]]))
    with pytest.raises(UserError, match="row 0: there is no column image"):
        read_samples("esscher.datasets:sums_asked", SHAPE, columns={})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "one.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read"):
        read_samples(str(tmp_path / "bad"), SHAPE, columns={})
