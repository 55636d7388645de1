"""Modules that may not be there: users' own, and optional libraries."""

import importlib
import inspect
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


def made(source: str, what: str, *given: Any, **settings: Any) -> Any:
    """What a function that a user names returns for these arguments; its own errors are its own.

    Raises:
        UserError: it cannot be imported or called, or takes other arguments.
    """
    function = users_own(source, what)
    try:
        inspect.signature(function).bind(*given, **settings)
    except TypeError as error:
        raise UserError(f"{what} {source!r} cannot be called so: {error}") from error
    except ValueError:  # Compiled functions may not tell what they take.
        pass
    return function(*given, **settings)


def needed(module: str, what: str, extra: str = "control") -> ModuleType:
    """Import an optional library.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f'{what} needs {module}: pip install "esscher[{extra}]"') from None
