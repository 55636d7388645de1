"""Rewards as users write them. Apart from the tests, because each test's process imports them."""

import math
import os
import time
from collections.abc import Mapping
from typing import Any


def length(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    return len(completion)


def components(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {"right": completion == row["answer"], "brief": 0.5}


def weighed(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {"reward": 10.0, "right": 1.0}


def difficult(prompt: str, completion: str, row: Mapping[str, Any]) -> Any:
    print("a reward may print")
    kinds: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "none": None, "empty": {}}
    if completion == "raise":
        raise ZeroDivisionError("of its own")
    if completion == "hang":
        time.sleep(60)
    if completion == "exit":
        os._exit(7)
    return kinds.get(completion, 1.0)


not_a_function = 3
