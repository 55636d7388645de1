"""Look through the catalogue: esscher list, esscher show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esscher.cli.options import leading, parse, positional, terminal
from esscher.errors import UserError, nearest

WIDE_LIST = 120
"""Columns of a terminal from which the catalogue has a column for everything."""


@dataclass
class ListOptions:
    family: str | None = None
    """Only this family."""


def list_methods(arguments: list[str]) -> int:
    """The catalogue, searched by words if given: esscher list [WORD ...] [--family F]."""
    words = leading(arguments)
    options = parse(ListOptions, arguments, "esscher list [WORD ...]")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from esscher.registry import catalogue

    entries = list(catalogue().values())
    if options.family:
        families = {entry.family for entry in entries}
        if options.family not in families:
            hint = nearest(options.family, sorted(families))
            raise UserError(f"unknown family {options.family!r}: {hint}")
        entries = [entry for entry in entries if entry.family == options.family]
    if words:
        scores = {entry.slug: _relevance(entry, words) for entry in entries}
        entries = sorted((e for e in entries if scores[e.slug] > 0), key=lambda e: -scores[e.slug])
        if not entries:
            raise UserError(f"no method matches {' '.join(words)!r}: esscher list shows all")
    for title, baseline in (("Methods", False), ("Baselines", True)):
        chosen = [entry for entry in entries if entry.baseline is baseline]
        if not chosen:
            continue
        console = terminal()
        wide = console.width >= WIDE_LIST
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            leading=0 if wide else 1,
        )
        columns = ("name", "family", "what it is for", "paper", "claim")
        for column in columns if wide else ("name", "what it is for"):
            short = column in ("name", "family", "claim")
            table.add_column(column, no_wrap=short, overflow="fold")
        for entry in chosen:
            paper = f"{entry.paper['title']} ({entry.paper['year']})"
            status = "baseline" if baseline else _proof_status(entry.slug)
            if wide:
                table.add_row(entry.slug, entry.family, entry.paper["purpose"], paper, status)
                continue
            # Five columns would leave a dozen characters for a sentence each.
            about = Text(f"{entry.family}, {status}" if not baseline else entry.family, "dim")
            name = Text(entry.slug).append("\n").append(about)
            said = Text(entry.paper["purpose"]).append("\n").append(Text(paper, "dim"))
            table.add_row(name, said)
        console.print(table)
    return 0


@dataclass
class NoOptions:
    pass


def show_method(arguments: list[str]) -> int:
    """The card of one method: claim, settings with their sources, recipes, measured proof."""
    slug = positional(arguments, "esscher show SLUG", "SLUG")
    parse(NoOptions, arguments, "esscher show SLUG")
    from rich.markdown import Markdown

    from esscher.report.card import method_card

    terminal().print(Markdown(method_card(slug, proofs_folder())))
    return 0


def proofs_folder() -> Path:
    """Where proof records are looked for: here, or in the checkout that this package lies in."""
    here, checkout = Path("proofs"), Path(__file__).parents[3] / "proofs"
    return here if here.is_dir() else checkout


def _proof_status(slug: str) -> str:
    path = proofs_folder() / f"{slug}.json"
    if not path.exists():
        return "not tried"
    from esscher.files import read_record

    return str(read_record(path)["verdict"])


def _relevance(entry: Any, words: Sequence[str]) -> int:
    """Words found in the name count most, then purpose, title and claim."""
    weights = {"purpose": 3, "title": 2, "claim": 1}
    score = 0
    for word in (word.lower() for word in words):
        found = 5 * (word in entry.slug) + 3 * (word in entry.family)
        found += sum(w for name, w in weights.items() if word in str(entry.paper[name]).lower())
        if not found:
            return 0
        score += found
    return score
