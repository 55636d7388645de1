"""What reading and writing models of the transformers and the diffusers library have in common."""

import hashlib
import importlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esscher.errors import UserError


def check_is_there(source: str, setting: str) -> None:
    """Raise where a source can only be meant as a folder, and there is none.

    Raises:
        UserError: beginning with the setting that named it.
    """
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_a_path and not Path(source).is_dir():
        raise UserError(f"{setting} {source}: there is no such folder")


def digest_of(model: nn.Module) -> str:
    """Of all weights: tells whether a source still holds what a run began with."""
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode())
        flat = parameter.detach().cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Where to write a folder, which takes its place (and that of one already there) at the end."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    yield writing
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(writing, folder)


@contextmanager
def without_progress_bars(*libraries: str) -> Iterator[None]:
    """These (transformers, diffusers) draw them over our own display, and say which of two readers of
    images they have taken where none is asked for.
    """
    readers = logging.getLogger("transformers.utils.import_utils")
    modules: list[Any] = [importlib.import_module(f"{name}.utils.logging") for name in libraries]
    shown = [module for module in modules if module.is_progress_bar_enabled()]
    level = readers.level
    readers.setLevel(logging.ERROR)
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        readers.setLevel(level)
        for module in shown:
            module.enable_progress_bar()
