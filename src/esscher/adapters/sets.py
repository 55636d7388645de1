"""Populations of samples from wherever users keep them: long tables, arrays, images, lists of sets.

| source | what is read |
|---|---|
| FILE.parquet, FILE.csv | a row a sample: `set_id` says of which population; the rest are components |
| FILE.jsonl, a FOLDER of datasets, a Hugging Face name | likewise, or `sample`, or `image` |
| FILE.npz | likewise, an array a column; or `sample` (n d) or `image` (n h w, n c h w) and `set_id` |
| FOLDER of images | each file; folders in it are the populations |
| module:function | columns, a data frame, a mapping of names to arrays (m d), or a list of arrays |

Without a column `set_id` the column `label` says to which population a row belongs; beside it, a label
that is the same for all rows of a population is its class. AnnData go through a function that returns
{"sample": adata.X, "set_id": adata.obs["donor"]}.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esscher.adapters.imports import made, needed
from esscher.adapters.real_samples import SUFFIXES, read_samples
from esscher.adapters.text import read_rows
from esscher.errors import UserError, nearest
from esscher.experience.sets import Groups, Kernels, Mixtures, Populations, SetData
from esscher.experiment import SetConfig
from esscher.files import read_npz, readable
from esscher.runtime.rng import Phase, numpy_generator
from esscher.types import SetSpec

Array = NDArray[Any]
OWN = ("set_id", "label", "sample", "image")
UNKNOWN = {"", "nan", "None"}
"""Labels that say nothing, as text."""


@dataclass(frozen=True)
class Table:
    """Samples, and what says to which population each belongs."""

    name: str
    x: NDArray[np.floating[Any]]
    """Samples n d, in float32 where they were read so, else in float64."""
    shape: tuple[int, ...]
    """Of one sample."""
    columns: tuple[str, ...]
    """Names of the components, or none."""
    group: Array
    """Of each sample: its population, as text."""
    label: Array | None
    """Of each sample, as it was given."""
    labelled: bool = False
    """Whether label says something beside group."""


def read_table(source: str, config: SetConfig) -> Table:
    """All samples of a source; see the module.

    Raises:
        UserError: no such source, columns that are missing or no numbers, values that are not finite,
            sets that are empty, hold one sample, or differ in width.
    """
    found = _read(source, config)
    if hasattr(found, "to_numpy") and hasattr(found, "columns"):  # A data frame of any library.
        found = {str(name): found[name].to_numpy() for name in found.columns}
    theirs = {config.columns.get(name, name) for name in ("set_id", "label")}
    if isinstance(found, Mapping) and not theirs & set(found):
        if any(np.ndim(one) < 2 for one in found.values()):
            raise UserError(
                f"{source} has no column set_id or label that says to which population a row belongs "
                f"(it has {', '.join(map(str, found))}): name it with --sets.columns set_id NAME"
            )
        return _of_sets(source, list(map(str, found)), list(found.values()))
    if isinstance(found, Mapping):
        return _of_columns(source, found, config)
    items = list(found)
    if items and isinstance(items[0], Mapping) and "samples" in items[0]:
        names = [str(item.get("set_id", number)) for number, item in enumerate(items)]
        return _of_sets(source, names, [item["samples"] for item in items])
    if items and isinstance(items[0], Mapping):
        return _of_columns(source, _turned(source, items), config)
    return _of_sets(source, [str(number) for number in range(len(items))], items)


def set_data(table: Table, config: SetConfig, seed: int) -> tuple[SetData, SetSpec]:
    """The populations of a table, divided into those to learn from and those to judge by.

    Groups and neighbourhoods are held out whole, with all rows of their own label value; of mixtures,
    rows of every group are.

    Raises:
        UserError: populations of fewer than two samples, too few of them, or no labels where they are
            needed.
    """
    if config.bandwidth > 0 and config.mixed:
        raise UserError("sets.bandwidth and sets.mixed exclude each other: both say what a set is")
    divide = _kernels if config.bandwidth > 0 else _mixtures if config.mixed else _groups
    training, held_out, rows = divide(
        table, config, numpy_generator(seed, 0, Phase.ORDER, rank=2), seed
    )
    if config.standardise:
        known = table.x[rows].astype(np.float64)
        mean, std = known.mean(0), known.std(0)
        std[std < 1e-12 * (1 + np.abs(mean))] = 1.0
    else:
        mean, std = np.zeros(table.x.shape[1]), np.ones(table.x.shape[1])
    spec = SetSpec(
        shape=table.shape,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        columns=table.columns,
        classes=_classes(table, all_groups(table))[0] if divide is _groups else (),
    )
    x = spec.standardised(torch.from_numpy(table.x)).float()
    data = SetData(
        name=table.name, x=x, training=training, held_out=held_out, size=config.size, seed=seed
    )
    return data, spec


def checked_sets(sets: Any, names: Sequence[str] | None = None, *, place: str) -> list[Array]:
    """Sets as arrays of one width, (m, *shape) each.

    Raises:
        UserError: no list of sets, or one that is empty, has one sample, another width or type than the
            others, or values that are no finite numbers.
    """
    if isinstance(sets, np.ndarray) and sets.dtype == object:
        raise UserError(
            f"{place}: sets of different lengths in one array: give a list of arrays, or one array "
            "padded to the longest with a mask of what is there"
        )
    arrays = [np.asarray(one) for one in sets]
    if not arrays:
        raise UserError(f"{place}: there are no sets")
    names = names or [str(number) for number in range(len(arrays))]
    first = arrays[0]
    for name, one in zip(names, arrays, strict=True):
        where = f"{place}: set {name}"
        if one.dtype.kind not in "fiub":
            raise UserError(
                f"{where} holds {one.dtype}: samples must be numbers, equally many each"
            )
        if one.ndim < 2:
            raise UserError(
                f"{where} has shape {one.shape}: a set is samples times components (m, d)"
            )
        if not len(one):
            raise UserError(f"{where} is empty: leave it out, or give two samples or more")
        if len(one) < 2:
            raise UserError(
                f"{where} has one sample, and says nothing of a distribution: give two or more"
            )
        if one.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{where} has samples of shape {one.shape[1:]}, and set {names[0]} of "
                f"{first.shape[1:]}: all sets must have the same components"
            )
        if one.dtype != first.dtype:
            raise UserError(
                f"{where} holds {one.dtype}, and set {names[0]} {first.dtype}: give all of one type"
            )
        _check_finite(one.reshape(len(one), -1), where)
    return arrays


def _read(source: str, config: SetConfig) -> Any:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".npz":
        return read_npz(path)
    if path.is_file() and path.suffix == ".csv":
        return _read_csv(path)
    if path.is_file() and path.suffix == ".parquet":
        parquet: Any = needed("pyarrow.parquet", source, "applied")
        with readable(f"{path} cannot be read as Parquet"):
            table = parquet.read_table(path, page_checksum_verification=True)
            return {name: _of_arrow(table[name]) for name in table.column_names}
    if path.is_dir() and (files := _images(path)):
        return _read_images(source, path, files)
    if ":" in source and not path.exists():
        return made(source, "data")
    return read_rows(source, split=config.split)


def _of_arrow(column: Any) -> Any:
    values = column.to_numpy()
    return values.tolist() if values.dtype == object else values


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with readable(f"{path} cannot be read"), path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise UserError(f"{path} holds no rows below its heading")
    heading, *rows = rows
    for number, row in enumerate(rows, 2):
        if len(row) != len(heading):
            raise UserError(f"{path}, line {number}: {len(row)} values for {len(heading)} columns")
    return {
        name: _numbers(column)
        for name, column in zip(heading, zip(*rows, strict=True), strict=True)
    }


def _numbers(column: Sequence[str]) -> list[Any]:
    """As numbers, where all of them are; an empty cell is none that is known."""
    try:
        return [float(value) if value.strip() else np.nan for value in column]
    except ValueError:
        return list(column)


def _images(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)


def _read_images(source: str, path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Files of a folder, as large as the first of them."""
    images: Any = needed("PIL.Image", source, "applied")
    with readable(f"{files[0]} cannot be read"), images.open(files[0]) as first:
        channels = 1 if first.mode in ("1", "L", "I", "I;16") else 3
        shape = (channels, first.height, first.width)
    x, _ = read_samples(source, shape, columns={})
    folders = [file.parent.relative_to(path).as_posix() for file in files]
    return {"sample": x.numpy(), "set_id": folders}


def _turned(source: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns."""
    for number, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            different = sorted(row.keys() ^ rows[0].keys())
            raise UserError(
                f"{source}, row {number}: other columns than row 0 ({', '.join(map(str, different))})"
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _of_columns(source: str, found: Mapping[str, Any], config: SetConfig) -> Table:
    theirs = {name: config.columns.get(name, name) for name in OWN}
    lengths = {name: len(column) for name, column in found.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{source}: columns of different lengths: {lengths}")
    if not next(iter(lengths.values())):
        raise UserError(f"{source} holds no rows")
    whole = next((name for name in ("sample", "image") if theirs[name] in found), None)
    if whole is not None and not config.features:
        x = _stacked(source, theirs[whole], found[theirs[whole]])
        if whole == "image" and x.dtype.kind in "iu":
            x = x / 255
        shape, columns = x.shape[1:], ()
    else:
        columns = config.features or tuple(n for n in found if n not in theirs.values())
        if not columns:
            raise UserError(
                f"{source} has no columns beside {', '.join(found)}: samples have no parts"
            )
        for name in columns:
            if name not in found:
                raise UserError(f"{source} has no column {name!r}: {nearest(name, found)}")
        x = np.stack([_numeric(source, name, found[name]) for name in columns], 1)
        shape = (len(columns),)
    x = x.reshape(len(x), -1)
    _check_finite(x, source, columns)
    label = np.asarray(found[theirs["label"]]) if theirs["label"] in found else None
    group = found.get(theirs["set_id"], label)
    return Table(
        name=Path(source).name,
        x=_as_float(x),
        shape=tuple(shape),
        columns=tuple(columns),
        group=_as_text(np.asarray(group)),
        label=label,
        labelled=theirs["set_id"] in found and label is not None,
    )


def _as_float(x: Array) -> NDArray[np.floating[Any]]:
    """Small differences at large offsets are kept until samples are standardised."""
    return x if x.dtype == np.float32 else x.astype(np.float64)


def _as_text(group: Array) -> Array:
    """Names of populations; whole numbers without a point, however they were read."""
    if group.dtype.kind == "f" and np.array_equal(group, np.round(group)):
        group = group.astype(np.int64)
    return group.astype(str)


def _of_sets(source: str, names: list[str], sets: list[Any]) -> Table:
    arrays = checked_sets(sets, names, place=source)
    flat = [one.reshape(len(one), -1) for one in arrays]
    return Table(
        name=Path(source).name,
        x=_as_float(np.concatenate(flat)),
        shape=arrays[0].shape[1:],
        columns=(),
        group=np.repeat(np.array(names), [len(one) for one in flat]),
        label=None,
    )


def _stacked(source: str, name: str, column: Any) -> Array:
    try:
        values = np.asarray(column)
    except ValueError:
        values = np.zeros(0, dtype=object)
    if values.dtype.kind not in "fiub" or values.ndim < 2:
        raise UserError(f"{source}: the column {name} must hold equally many numbers in every row")
    return values


def _numeric(source: str, name: str, column: Any) -> Array:
    values = np.asarray(column)
    if values.dtype.kind not in "fiub" or values.ndim != 1:
        raise UserError(
            f"{source}: the column {name} holds no numbers (such as {column[0]!r}): name the columns "
            "that are components with --sets.features, or the one that names sets with "
            "--sets.columns set_id NAME"
        )
    return values.astype(np.float64)


def _check_finite(x: Array, where: str, columns: Sequence[str] = ()) -> None:
    bad = np.argwhere(~np.isfinite(x.astype(np.float64)))
    if len(bad):
        row, component = bad[0]
        name = columns[component] if columns else f"component {component}"
        raise UserError(
            f"{where}, sample {row}: {name} is {x[row, component]}: fill in or leave out what is not "
            "finite"
        )


def _groups(
    table: Table, config: SetConfig, generator: np.random.Generator, seed: int
) -> tuple[Populations, Populations, Array]:
    groups = all_groups(table)
    training, held_out = _divided(groups.count, config, generator, f"{table.name}: populations")

    def part(numbers: Array) -> Groups:
        own = [int(number) for number in numbers]
        labels = [groups.labels[n] for n in own] if groups.labels else []
        return Groups([groups.names[n] for n in own], [groups.rows[n] for n in own], labels)

    return part(training), part(held_out), np.concatenate([groups.rows[n] for n in training])


def _kernels(
    table: Table, config: SetConfig, generator: np.random.Generator, seed: int
) -> tuple[Populations, Populations, Array]:
    if table.label is None or table.label.dtype.kind not in "fiu":
        raise UserError(
            f"{table.name}: sets.bandwidth needs a column label of numbers (--sets.columns label NAME)"
        )
    label = table.label.astype(np.float64)
    if not np.isfinite(label).all():
        raise UserError(
            f"{table.name}: label is not finite in row {int(np.argmin(np.isfinite(label)))}"
        )
    centres = np.unique(label)
    training, held_out = _divided(len(centres), config, generator, f"{table.name}: label values")
    rows = np.arange(len(label))
    known = rows
    if config.held_out_share > 0:
        known = rows[~np.isin(label, centres[held_out])]
    if len(known) < 2:
        raise UserError(f"{table.name}: {len(known)} row is left to learn from: give two or more")
    return (
        Kernels(centres[training], label[known], known, config.bandwidth),
        Kernels(centres[held_out], label, rows, config.bandwidth),
        known,
    )


def _mixtures(
    table: Table, config: SetConfig, generator: np.random.Generator, seed: int
) -> tuple[Populations, Populations, Array]:
    groups = all_groups(table)
    if config.mixed > groups.count:
        raise UserError(
            f"sets.mixed must be at most {groups.count}, the populations of {table.name}, got "
            f"{config.mixed}"
        )
    kept, held = [], []
    for name, rows in zip(groups.names, groups.rows, strict=True):
        place = f"{table.name}: rows of {name}"
        training, held_out = _divided(len(rows), config, generator, place)
        kept.append(rows[training])
        held.append(rows[held_out])
    options = {"sources": config.mixed, "concentration": config.concentration}
    return (
        Mixtures(Groups(groups.names, kept), **options, seed=2 * seed),
        Mixtures(Groups(groups.names, held), **options, seed=2 * seed + 1),
        np.concatenate(kept),
    )


def _divided(
    count: int, config: SetConfig, generator: np.random.Generator, what: str
) -> tuple[Array, Array]:
    """Numbers to learn from and to judge by; the same where nothing is held out."""
    order = generator.permutation(count)
    if config.held_out_share == 0:
        return order, order
    held = max(1, round(config.held_out_share * count))
    if count - held < 1:
        raise UserError(
            f"{what}: {count} cannot be divided: give more, or --sets.held-out-share 0 to judge by "
            "what is learned from"
        )
    return np.sort(order[held:]), np.sort(order[:held])


def all_groups(table: Table) -> Groups:
    """The populations of a table by what it says of each row.

    Raises:
        UserError: there is a population of one sample.
    """
    names: Array
    names, inverse, counts = np.unique(table.group, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        number = int(counts.argmin())
        raise UserError(
            f"{table.name}: set {names[number]} has one sample, and says nothing of a distribution: "
            "leave it out, or give two or more"
        )
    rows = np.split(np.argsort(inverse, kind="stable"), counts.cumsum()[:-1])
    groups = Groups(names.astype(str).tolist(), rows)
    return replace(groups, labels=_classes(table, groups)[1])


def _classes(table: Table, groups: Groups) -> tuple[tuple[str, ...], list[int]]:
    """Names of the classes of populations, and which one each is of: where a column label is there
    beside set_id, and is the same for all rows of a population. An empty text is a class that is not
    known.
    """
    if table.label is None or not table.labelled:
        return (), []
    label = _as_text(table.label)
    own = [set(label[rows].tolist()) for rows in groups.rows]
    if any(len(values) > 1 for values in own):
        return (), []
    each = [next(iter(values)) for values in own]
    names = tuple(sorted(set(each) - UNKNOWN))
    return names, [names.index(name) if name in names else -1 for name in each]
