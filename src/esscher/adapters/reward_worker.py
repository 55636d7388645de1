"""A process that runs a user's reward, so that one that hangs, crashes or prints harms nothing else.

Started by adapters/rewards.py: python -m esscher.adapters.reward_worker SOURCE. Requests come as
pickles (of our own), answers go back as one line of JSON each.
"""

import json
import os
import pickle
import sys
from typing import Any

from esscher.adapters.imports import needed, users_own
from esscher.errors import UserError
from esscher.rewards import LIBRARIES


def main() -> None:
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What the reward prints is for people, not for the pipe.
    try:
        reward = verifier(sys.argv[1])
    except UserError as error:
        _say(answers, {"refused": str(error)})
        return
    _say(answers, {"ready": True})
    while True:
        try:
            items = pickle.load(requests)
        except EOFError:
            return
        for prompt, completion, row in items:
            _say(answers, judged(reward, prompt, completion, row))


def verifier(source: str) -> Any:
    """The function that a reward or task names.

    Raises:
        UserError: it cannot be imported, is none, or needs a library that is not installed.
    """
    kind, _, _ = source.partition(":")
    if kind == "reasoning_gym":
        source = "esscher.rewards:reasoning_gym_answer"
    function = users_own(source, "reward")
    if not callable(function):
        raise UserError(f"reward {source!r} is a {type(function).__name__}, not a function")
    library = LIBRARIES.get(source.removeprefix("esscher.rewards:"))
    if library is not None:
        needed(library, source, "language")
    return function


def judged(reward: Any, prompt: str, completion: str, row: Any) -> dict[str, Any]:
    """{"parts": {name: number}}, or {"error": what was wrong}."""
    try:
        value = reward(prompt, completion, row)
        parts = value if isinstance(value, dict) else {"reward": value}
        numbers = {str(name): float(part) for name, part in parts.items()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if not numbers:
        return {"error": "it returned no component"}
    for name, number in numbers.items():
        if number != number or abs(number) == float("inf"):
            return {"error": f"its component {name} is {number}"}
    return {"parts": numbers}


def _say(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
