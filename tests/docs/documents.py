"""Fenced blocks of a Markdown page, in their order."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(text: str) -> list[Block]:
    """Every fenced block; `title="NAME"` after the language names a file."""
    found = re.findall(r"^```(\w*)([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [
        Block(language, (re.findall(r'title="([^"]+)"', rest) or [""])[0], body)
        for language, rest, body in found
    ]
