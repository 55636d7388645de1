"""Modules that may not be there: users' own, and optional libraries."""

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from esscher.errors import UserError


def users_own(source: str, what: str) -> Any:
    """What a user names as module:function, with the module importable from the working folder.

    Raises:
        UserError: it cannot be imported; the message begins with `what` it was meant as.
    """
    module_name, _, name = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{what} {source!r} cannot be imported: {error}. Write module:function, with the module "
            "importable from the working folder"
        ) from error


def needed(module: str, what: str, extra: str = "control") -> ModuleType:
    """Import an optional library.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{what} needs {module}: pip install "esscher[{extra}]"') from None
