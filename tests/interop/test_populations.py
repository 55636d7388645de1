"""Populations from files, tables and functions: what is read, how it is divided, what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from esscher.adapters.sets import checked_sets, read_table, set_data
from esscher.errors import UserError
from esscher.experiment import SetConfig

COLUMNS: dict[str, Any] = {
    "a": [1.0, 2.0, 3.0, 4.0, 5.0],
    "b": [0.5, 0.25, -1.0, 2.0, 8.0],
    "set_id": ["x", "y", "x", "y", "y"],
}
FOUND: dict[str, Any] = {}


def given() -> Any:
    """What a test has put there: esscher reads it as test_sets:given."""
    return FOUND["data"]


def table_of(data: Any, **config: Any) -> Any:
    FOUND["data"] = data
    return read_table(f"{__name__}:given", SetConfig(**config))


def rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# ---- sources


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    pyarrow.parquet.write_table(pyarrow.table(COLUMNS), tmp_path / "t.parquet")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(COLUMNS), *zip(*COLUMNS.values(), strict=True)])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows(COLUMNS))))
    np.savez(tmp_path / "t.npz", **{k: np.array(v) for k, v in COLUMNS.items()})
    datasets.Dataset.from_dict(COLUMNS).save_to_disk(tmp_path / "folder")
    return {path.name: str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl", "t.npz", "folder"])
def test_one_table_in_every_form(name: str, files: dict[str, str]) -> None:
    table = read_table(files[name], SetConfig())
    assert table.columns == ("a", "b") and table.shape == (2,)
    np.testing.assert_allclose(table.x, np.stack([COLUMNS["a"], COLUMNS["b"]], 1))
    assert table.group is not None and table.group.tolist() == COLUMNS["set_id"]


def test_what_functions_may_return() -> None:
    x = np.stack([COLUMNS["a"], COLUMNS["b"]], 1)
    frame = pandas.DataFrame(COLUMNS)
    split = {"x": x[[0, 2]], "y": x[[1, 3, 4]]}
    forms = [COLUMNS, frame, rows(COLUMNS), split, [{"samples": s} for s in split.values()]]
    forms += [list(split.values()), {"sample": x, "set_id": COLUMNS["set_id"]}]
    for form in forms:
        table = table_of(form)
        data, spec = set_data(table, SetConfig(held_out_share=0, standardise=False), 0)
        sizes = sorted(len(own) for own in data.training.rows)  # type: ignore[union-attr]
        assert sizes == [2, 3] and spec.dim == 2
        assert sorted(data.x[:, 0].tolist()) == [1, 2, 3, 4, 5]
    torch_sets = [torch.tensor(s) for s in split.values()]
    assert len(table_of(torch_sets).x) == 5


def test_columns_by_other_names_and_some_of_them() -> None:
    frame = pandas.DataFrame({**COLUMNS, "note": list("pqrst")}).rename(columns={"set_id": "who"})
    table = table_of(frame, columns={"set_id": "who"}, features=("b",))
    assert table.columns == ("b",) and table.x.shape == (5, 1)
    with pytest.raises(UserError, match="the column note holds no numbers .such as 'p'.: name the"):
        table_of(frame, columns={"set_id": "who"})
    with pytest.raises(UserError, match="no column 'bb': did you mean b"):
        table_of(frame, columns={"set_id": "who"}, features=("bb",))


def test_labels_stand_in_for_set_ids_and_whole_numbers_lose_their_point(tmp_path: Path) -> None:
    table = table_of({"a": [1.0, 2.0], "label": [3.0, 4.0]})
    assert table.group.tolist() == ["3", "4"]
    path = tmp_path / "t.csv"
    path.write_text("a,set_id\n1,7\n2,7\n3,8\n4,8\n")
    assert read_table(str(path), SetConfig()).group.tolist() == ["7", "7", "8", "8"]


def test_images_of_a_folder_and_of_an_array(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in range(2):
            shade = 100 * number + (20 if name == "dogs" else 0)
            Image.new("L", (4, 3), shade).save(tmp_path / name / f"{number}.png")
    table = read_table(str(tmp_path), SetConfig())
    assert table.shape == (1, 3, 4) and table.x.shape == (4, 12)
    assert table.group.tolist() == ["cats", "cats", "dogs", "dogs"]
    np.testing.assert_allclose(table.x[:, 0] * 255, [0, 100, 20, 120], atol=1e-4)
    array = np.full((4, 5, 5), 51, np.uint8)
    table = table_of({"image": array, "label": [0, 0, 1, 1]})
    assert table.shape == (5, 5) and table.x.max() == pytest.approx(0.2)


# ---- division


def test_populations_are_held_out_whole_and_standardised_by_the_others() -> None:
    draw = np.random.default_rng(0)
    sets = {f"s{k}": 3 * k + draw.normal(size=(20, 2)) for k in range(20)}
    table = table_of(sets)
    data, spec = set_data(table, SetConfig(held_out_share=0.25), 3)
    names = [set(data.training.names), set(data.held_out.names)]  # type: ignore[union-attr]
    assert [len(n) for n in names] == [15, 5] and not names[0] & names[1]
    known = np.concatenate([sets[name] for name in sorted(names[0])])
    np.testing.assert_allclose(spec.mean, known.mean(0), atol=1e-5)
    np.testing.assert_allclose(spec.std, known.std(0), rtol=1e-5)
    restored = spec.restored(data.x)
    np.testing.assert_allclose(restored, table.x, atol=1e-4)
    again, _ = set_data(table, SetConfig(held_out_share=0.25), 3)
    other, _ = set_data(table, SetConfig(held_out_share=0.25), 4)
    assert again.held_out.names == data.held_out.names  # type: ignore[union-attr]
    assert other.held_out.names != data.held_out.names  # type: ignore[union-attr]


def test_small_differences_at_large_offsets_are_learned_from() -> None:
    x = 1e9 + np.arange(8.0).reshape(4, 2) / 8
    data, _ = set_data(table_of({"a": x[:2], "b": x[2:]}), SetConfig(held_out_share=0), 0)
    assert data.x.dtype == torch.float32 and len(set(data.x[:, 0].tolist())) == 4
    assert data.x.std(0, correction=0).tolist() == pytest.approx([1, 1], rel=1e-5)


def test_a_component_that_never_changes_is_left_alone() -> None:
    table = table_of({"a": [5.0] * 4, "b": [0.0, 1.0, 2.0, 3.0], "set_id": [0, 0, 1, 1]})
    data, spec = set_data(table, SetConfig(held_out_share=0), 0)
    assert spec.std[0] == 1 and (data.x[:, 0] == 0).all()


def test_of_mixtures_rows_are_held_out_and_of_neighbourhoods_label_values() -> None:
    columns = {"a": np.arange(40.0), "label": np.arange(40) // 10}
    data, _ = set_data(table_of(columns), SetConfig(mixed=2, held_out_share=0.3), 0)
    kept, held = (source.groups for source in (data.training, data.held_out))  # type: ignore[union-attr]
    assert kept.names == held.names == ["0", "1", "2", "3"]
    for ours, theirs in zip(kept.rows, held.rows, strict=True):
        assert len(ours) == 7 and len(theirs) == 3 and not set(ours) & set(theirs)
    assert data.training.recipe(0)[1].tolist() != data.held_out.recipe(0)[1].tolist()  # type: ignore[union-attr]
    data, _ = set_data(table_of(columns), SetConfig(bandwidth=0.5, held_out_share=0.25), 0)
    (left_out,) = data.held_out.centres.tolist()  # type: ignore[union-attr]
    assert left_out not in data.training.label.tolist()  # type: ignore[union-attr]
    assert len(data.training.rows) == 30 and len(data.held_out.rows) == 40  # type: ignore[union-attr]


def test_a_label_of_whole_populations_is_their_class() -> None:
    columns = {"a": np.arange(12.0), "set_id": np.arange(12) // 2}
    each = ["ill", "well", "ill", "", "well", "ill"]
    labelled = {**columns, "label": np.repeat(each, 2)}
    data, spec = set_data(table_of(labelled), SetConfig(held_out_share=0.3), 0)
    assert spec.classes == ("ill", "well")
    for source in (data.training, data.held_out):
        told = dict(zip(source.names, source.labels, strict=True))  # type: ignore[union-attr]
        assert told == {n: {"ill": 0, "well": 1, "": -1}[each[int(n)]] for n in told}
        sets = data.sets(source, [0], 2, np.random.default_rng(0))
        assert sets.label is not None and sets.label.tolist() == [source.labels[0]]  # type: ignore[union-attr]
    varying = {**columns, "label": np.arange(12)}
    for other in (columns, varying, {"a": np.arange(12.0), "label": np.arange(12) // 2}):
        data, spec = set_data(table_of(other), SetConfig(), 0)
        assert spec.classes == () and not data.training.labels  # type: ignore[union-attr]
        assert data.sets(data.training, [0], 2, np.random.default_rng(0)).label is None


# ---- what is refused, in one sentence each


def refused(match: str, data: Any, **config: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        set_data(table_of(data, **config), SetConfig(**config), 0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_bad_sets_are_refused() -> None:
    good = np.zeros((3, 2))
    refused("there are no sets", [])
    refused("set 1 is empty: leave it out", [good, np.zeros((0, 2))])
    refused("set 1 has one sample, and says nothing of a distribution", [good, np.zeros((1, 2))])
    refused(r"set 1 has samples of shape \(3,\), and set 0 of \(2,\)", [good, np.zeros((4, 3))])
    refused(
        "set b holds int64, and set a float64: give all of one type",
        {"a": good, "b": good.astype(int)},
    )
    refused("set 0 holds <U1: samples must be numbers", [np.array([["a", "b"]] * 2)])
    refused(r"set 0 has shape \(3,\): a set is samples times components", [np.zeros(3)])
    refused("no column set_id or label", {"a": np.zeros(3), "b": np.zeros(3)})
    nan = good.copy()
    nan[2, 1] = np.nan
    refused("set 1, sample 2: component 1 is nan: fill in or leave out", [good, nan])
    with pytest.raises(UserError, match="different lengths in one array: give a list of arrays"):
        ragged = np.empty(2, dtype=object)
        ragged[:] = [good, good[:2]]
        checked_sets(ragged, place="sets")


def test_bad_tables_are_refused() -> None:
    refused("made?|given: columns of different lengths", {**COLUMNS, "a": [1.0]})
    refused("given, sample 1: b is nan", {**COLUMNS, "b": [0.0, np.nan, 0.0, 0.0, 0.0]})
    refused("set x has one sample", {"a": [1.0, 2.0, 3.0], "set_id": ["x", "y", "y"]})
    refused("no columns beside set_id", {"set_id": ["x", "x"]})
    refused("row 1: other columns than row 0", [{"a": 1, "set_id": 0}, {"b": 1, "set_id": 0}])
    refused("holds no rows", {"a": [], "set_id": []})
    refused("equally many numbers in every row", {"sample": [[1, 2], [3]], "set_id": [0, 0]})
    refused("populations: 1 cannot be divided", {"a": [1.0, 2.0], "set_id": [0, 0]})
    refused("sets.mixed must be at most 2", COLUMNS, mixed=3)
    refused("rows of x: 2 cannot be divided", COLUMNS, mixed=2, held_out_share=0.9)
    refused("needs a column label of numbers", COLUMNS, bandwidth=1.0)
    refused("1 row is left to learn from", {"a": [1.0, 2.0], "label": [0.0, 1.0]}, bandwidth=1.0)
    refused("exclude each other", {**COLUMNS, "label": [1.0] * 5}, bandwidth=1.0, mixed=2)
    refused(
        "label is not finite in row 1", {"a": [1.0, 2.0], "label": [0.0, np.nan]}, bandwidth=1.0
    )


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,set_id\n1,0\n2\n")
    with pytest.raises(UserError, match="line 3: 1 values for 2 columns"):
        read_table(str(path), SetConfig())
    path.write_text("a,set_id\n")
    with pytest.raises(UserError, match="no rows below its heading"):
        read_table(str(path), SetConfig())
    path.write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(UserError, match="no column set_id or label .* .it has a, b.: name it"):
        read_table(str(path), SetConfig())
    path.write_text("a,set_id\n1,0\n,0\n2,1\n3,1\n")
    with pytest.raises(UserError, match="sample 1: a is nan"):
        read_table(str(path), SetConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 1),
        ("bandwidth", -1.0),
        ("mixed", -1),
        ("concentration", 0.0),
        ("held_out_share", 0.95),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"sets.{name} must be"):
        SetConfig(**{name: value})


# ---- the data sets that are here


def test_gaussians_poisson_laws_and_digits_are_what_they_say() -> None:
    from esscher.datasets import gaussian_populations, poisson_populations, three_digits

    found = gaussian_populations()
    x = found["sample"].reshape(4_000, 128, 2)
    assert (np.diff(found["set_id"]) >= 0).all() and found["set_id"][128] == 1
    means = x.mean(1)
    assert means.min() > -1.5 and means.max() < 6.5
    assert means.mean() == pytest.approx(2.5, abs=0.05)
    # E[A A^T + 0.1 I] has 2 x 0.36 + 0.1 on its diagonal.
    spread = (x - means[:, None]) ** 2
    assert spread.sum(1).mean() / 127 == pytest.approx(0.82, abs=0.02)
    counts = poisson_populations()["count"].reshape(20_000, 40)
    rate = counts.mean(1)
    assert rate.mean() == pytest.approx(2, abs=0.02)
    assert rate.var() == pytest.approx(1 + 2 / 40, abs=0.03)
    assert np.mean(counts == 0) == pytest.approx((2 / 3) ** 4, abs=0.005)
    digits = three_digits()
    assert digits["image"].shape == (537, 8, 8) and set(digits["set_id"]) == {0, 1, 2}


def test_tumours_are_classes_of_equal_size_by_radius() -> None:
    from esscher.datasets import tumours

    found = tumours()
    names, counts = np.unique(found["set_id"], return_counts=True)
    assert len(names) == 24 and set(counts) == {23, 24}
    largest = [found["label"][found["set_id"] == name].max() for name in names]
    smallest = [found["label"][found["set_id"] == name].min() for name in names]
    assert all(a <= b for a, b in zip(largest[:-1], smallest[1:], strict=True))
    assert set(found) == {
        "texture",
        "smoothness",
        "compactness",
        "concavity",
        "concave_points",
        "symmetry",
        "fractal_dimension",
        "set_id",
        "label",
    }
