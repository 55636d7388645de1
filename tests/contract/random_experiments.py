"""Experiments with a few settings at random: right ones, extreme ones, and of the wrong kind."""

import copy
import dataclasses
import math
import random
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import esscher
from esscher.registry import load_method

Path = tuple[str | int, ...]
NUMBERS = (-1, 0, 1, 2, 3, 10**9)
SHARES = (-1.0, 0.0, 1e-30, 0.1, 0.5, 1.0, 1.5, 1e30, float("nan"), float("inf"))
WORDS = ("", "nonsense", "no_module:nothing", "esscher.envs:QuadraticBandit", "./nowhere", "a/b")


def values(kind: Any) -> Iterator[Any]:
    """Plain values of a type, as JSON holds them, some out of any range."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            yield from values(option)
    elif origin is Literal:
        yield from arguments
    elif origin is tuple:
        items = list(values(arguments[0]))
        yield from ([], items[-1:], items[:2], items[2:4])
        yield [items[k % len(items)] for k in range(len(arguments))]
    elif origin is dict:
        yield from ({}, {"key": 1}, {"": "text"})
    elif kind is bool:
        yield from (True, False)
    elif kind is int:
        yield from NUMBERS
    elif kind is float:
        yield from SHARES
    elif kind is str:
        yield from WORDS
    else:
        yield None


WRONG = (None, "nonsense", [], {}, [None], True, 0.5, {"key": None})
"""Of another type than most settings."""


def settings(
    kind: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Where each setting below a dataclass stands, and of what type it is."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from settings(hint, (*path, name))
        elif name == "stages":
            yield from settings(esscher.Stage, (*path, name, 0))
        elif name != "method" and typing.get_origin(hint) is not typing.ClassVar:
            yield (*path, name), hint


@cache
def known_settings(slug: str) -> tuple[list[Any], list[Any]]:
    """Those of every experiment, and the method's own."""
    own = settings(load_method(slug).Config, ("method",))
    return list(settings(esscher.Experiment)), list(own)


def changed(
    experiment: esscher.Experiment, draw: random.Random, few: int = 3, largest: float = math.inf
) -> tuple[dict[str, Any], list[str]]:
    """An experiment as plain data with one to a few settings changed, and their names.

    Args:
        experiment: to begin with.
        draw: decides.
        few: settings at most.
        largest: number to give; what runs should not take for ever.
    """
    data = copy.deepcopy(experiment.to_json())
    known, own = known_settings(experiment.slug)
    names = []
    for _ in range(draw.randint(1, few)):
        path, kind = draw.choice(own if draw.random() < 0.6 else known)
        place: Any = data
        for part in path[:-1]:
            place = place[part]
        offered = WRONG if draw.random() < 0.15 else values(kind)
        place[path[-1]] = draw.choice([v for v in offered if _size(v) <= largest])
        names.append(str(path[-1]))
    return data, names


def _size(value: Any) -> float:
    """Of numbers, in a list as well."""
    if isinstance(value, list):
        return max(map(_size, value), default=0.0)
    return abs(value) if isinstance(value, int | float) and not math.isnan(value) else 0.0
