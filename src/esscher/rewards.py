"""Verifiers: rewards that can be checked. Each returns named components, in [0, 1] but for `digits`.

Use them like your own: `--reward esscher.rewards:math_answer`. See docs/rewards.md.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from esscher.adapters.imports import needed

LIBRARIES = {"math_answer": "math_verify", "reasoning_gym_answer": "reasoning_gym"}
"""What a verifier needs; imported before the first completion's time begins to count."""

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def given_answer(completion: str) -> str:
    """What stands between the last <answer> tags, else the whole completion."""
    tagged = TAGGED.findall(completion)
    return (tagged[-1] if tagged else completion).strip()


def exact_answer(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Whether the answer is letter for letter that of the row's column answer."""
    return {"correct": float(given_answer(completion) == str(row["answer"]).strip())}


def math_answer(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    """Whether the answer equals that of the row's column answer as mathematics (1/2 is 0.5)."""
    math_verify: Any = needed("math_verify", "esscher.rewards:math_answer", "language")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    settings = {"parsing_timeout": None}  # The judge has its own limit of time.
    gold = math_verify.parse(f"${row['answer']}$", **settings)
    found = math_verify.parse(_as_mathematics(given_answer(completion)), **settings)
    return {"correct": float(math_verify.verify(gold, found, timeout_seconds=None))}


def reasoning_gym_answer(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    """What reasoning-gym's own verifier gives for the answer."""
    gym: Any = needed("reasoning_gym", f"reasoning_gym:{row['task']}", "language")
    scorer = gym.get_score_answer_fn(row["task"])
    return {"correct": float(scorer(given_answer(completion), row["entry"]))}


def digits(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, float]:
    """How many there are in the completion, and whether it begins with one: for first tries."""
    count = sum(character.isdigit() for character in completion)
    return {"reward": float(count), "begins_with_a_digit": float(completion[:1].isdigit())}


def _as_mathematics(answer: str) -> str:
    return answer if "$" in answer or "\\" in answer else f"${answer}$"
