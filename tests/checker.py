"""The run-time type checker of the import hook (see conftest.py)."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, but for signatures with `Self`, which it can only check on whole classes."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
