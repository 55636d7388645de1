"""Finds methods by file name. There is no list to edit: a file in methods/FAMILY/ is a method.

The catalogue reads each file's `PAPER = Paper(...)` as literals, so listing imports nothing.
"""

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from esscher.errors import UserError, nearest

METHODS = Path(__file__).parent / "methods"
STAGE_PARTS = {
    "control": ("env",),
    "language": ("model", "text"),
    "diffusion": ("model", "image"),
    "sets": ("sets",),
    "robots": ("model", "robot"),
}
"""What methods of each world read of a stage, besides its data and steps."""


@dataclass(frozen=True)
class Entry:
    """A method of the catalogue."""

    slug: str
    family: str
    paper: dict[str, Any]
    """The fields of the file's Paper record."""

    @property
    def module(self) -> str:
        return f"esscher.methods.{self.family}.{self.slug}"

    @property
    def path(self) -> Path:
        return METHODS / self.family / f"{self.slug}.py"

    @property
    def baseline(self) -> bool:
        return bool(self.paper.get("baseline", False))


@cache
def catalogue() -> dict[str, Entry]:
    """Slug -> entry, papers first, each kind in alphabetical order."""
    paths = (path for path in METHODS.glob("*/*.py") if not path.name.startswith("_"))
    entries = [Entry(path.stem, path.parent.name, _read_paper(path)) for path in paths]
    return {e.slug: e for e in sorted(entries, key=lambda e: (e.baseline, e.slug))}


def find(slug: str) -> Entry:
    """The entry of a slug.

    Raises:
        UserError: unknown slug; the message names the nearest ones.
    """
    entries = catalogue()
    if slug not in entries:
        hint = nearest(slug.replace("-", "_"), entries)
        raise UserError(f"unknown method {slug!r}: {hint} (esscher list shows all)")
    return entries[slug]


def load_module(slug: str) -> ModuleType:
    """Import the file of a method."""
    return importlib.import_module(find(slug).module)


def load_method(slug: str) -> Any:
    """The method class of a slug: the one class of its file with that file's Config."""
    module = load_module(slug)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and value.__dict__.get("Config") is module.Config
    ]
    if len(classes) != 1:
        raise ValueError(f"{module.__name__} must define one method class, found {len(classes)}")
    return classes[0]


def slug_of(config: Any) -> str:
    """The slug of the method whose Config this is."""
    slug = type(config).__module__.rpartition(".")[2]
    if type(config).__name__ != "Config" or slug not in catalogue():
        raise ValueError(f"not the Config of a method: {config!r}")
    return slug


def recipes(slug: str) -> dict[str, Any]:
    """Name -> function of the recipes at the foot of a method's file."""
    module = load_module(slug)
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and getattr(value, "__annotations__", {}).get("return") is module.Experiment
    }


def declared(slug: str) -> dict[str, Any]:
    """What a method's class says of itself in literals (`world`, `loop`, `rows` and their kin), read
    without importing; what it leaves at the default of `Method` is missing.

    Raises:
        UserError: unknown slug.
    """
    return _declared(find(slug).path)


@cache
def _declared(path: Path) -> dict[str, Any]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(
            getattr(base, "id", "") == "Method" for base in node.bases
        ):
            return {
                target.id: item.value.value
                for item in node.body
                if isinstance(item, ast.Assign | ast.AnnAssign)
                if isinstance(item.value, ast.Constant)
                for target in (item.targets if isinstance(item, ast.Assign) else [item.target])
                if isinstance(target, ast.Name)
            }
    return {}


def _read_paper(path: Path) -> dict[str, Any]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAPER":
            call = node.value
            assert isinstance(call, ast.Call)
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    raise ValueError(f"{path}: no PAPER = Paper(...) at module level")
