"""Errors that a user can mend: one clear sentence with the field, the value and the remedy."""

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input, found before work starts or while nothing can be lost. The command prints its
    one sentence and exits with status 2; any other exception is a defect and keeps its traceback.
    """


def require(name: str, value: Any, condition: bool, permitted: str) -> None:
    """Raise the library's one form of range error unless `condition` holds.

    Raises:
        UserError: naming the field, the permitted range and the value.
    """
    if not condition:
        raise UserError(f"{name} must be {permitted}, got {value}")


def disk_full(error: OSError) -> bool:
    """Whether writing failed for want of space, quota or permitted file size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that names the nearest known words, or else all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
