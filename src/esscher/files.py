"""Files that are not ours, or that a fault may have changed: read whole, or refused in one sentence."""

import json
import zipfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esscher.errors import UserError


@contextmanager
def readable(complaint: str, remedy: str = "") -> Iterator[None]:
    """Make one sentence of whatever goes wrong inside: the complaint, the first line of the reason, and
    the remedy, which brings what separates it. Only what reads belongs inside.

    Raises:
        UserError: instead of any other error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Every format has errors of its own for damage, of any type.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{complaint}: {reason}{remedy}") from error


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: it is not JSON, or no object.
    """
    with readable(f"{path} is not valid JSON", remedy):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} where an object was expected")
    return found


def read_npz(path: Path, wanted: Container[str] | None = None) -> dict[str, Any]:
    """Arrays of a NumPy archive by name, None for those that are not wanted.

    Raises:
        UserError: it is none, is damaged, or holds pickles.
    """
    import numpy as np  # Here: the catalogue reads records, and does not need it.

    with readable(f"{path} cannot be read as .npz"):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays, or its end is missing")
        try:
            with np.load(path, allow_pickle=False) as file:
                return {k: file[k] if wanted is None or k in wanted else None for k in file}
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise UserError(
                f"{path} holds pickled objects, which could run code when loaded: save plain arrays "
                "of numbers"
            ) from error


def read_record(path: Path) -> dict[str, Any]:
    """What `esscher prove` wrote, with all that its readers show of it.

    Raises:
        UserError: it is damaged, or no proof record.
    """
    with readable(f"{path} is not a proof record", f": esscher prove {path.stem} writes it anew"):
        record = json.loads(path.read_text(encoding="utf-8"))
        for part in (record, *record["claims"]):
            if part["verdict"] not in ("reproduced", "not reproduced"):
                raise ValueError(f"its verdict is {part['verdict']!r}")
        for claim in record["claims"]:
            for part, names in (
                (claim, ("name", "statement")),
                *((check, ("name", "value", "rule", "passed")) for check in claim["checks"]),
            ):
                missing = [name for name in names if name not in part]
                if missing:
                    raise ValueError(f"it lacks {missing[0]}")
        return record
