"""The tables of methods, written from the catalogue and the proof records: the README's and the site's.

python -m esscher.report.readme README.md    rewrites what lies between the marks
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from esscher.files import read_record
from esscher.registry import Entry, catalogue

BEGIN, END = "<!-- methods: written by make readme -->", "<!-- end of methods -->"


def methods_tables(proofs: Path) -> str:
    """Papers with their verdicts, then baselines, as Markdown."""
    entries = list(catalogue().values())
    return (
        methods_table((entry for entry in entries if not entry.baseline), proofs)
        + "\nBaselines, which papers compare with and which prove nothing here:\n\n"
        + methods_table((entry for entry in entries if entry.baseline), proofs)
    )


def methods_table(
    entries: Iterable[Entry], proofs: Path, name: Callable[[str], str] = lambda slug: f"`{slug}`"
) -> str:
    """One table, a row a method; `name` says how a slug is written."""
    head = "| name | what it is for | paper | proof |\n|---|---|---|---|\n"
    return head + "".join(_row(entry, name(entry.slug), proofs) for entry in entries)


def with_tables(text: str, proofs: Path) -> str:
    """The text with the tables between its marks brought up to date.

    Raises: ValueError if a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the marks {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n\n{methods_tables(proofs)}\n{END}{after}"


def verdict_of(entry: Entry, proofs: Path) -> str:
    """In a word: baseline, not tried, reproduced or not reproduced."""
    if entry.baseline:
        return "baseline"
    path = proofs / f"{entry.slug}.json"
    if not path.exists():
        return "not tried"
    return read_record(path)["verdict"]


def _row(entry: Entry, name: str, proofs: Path) -> str:
    paper, proof = entry.paper, _proof(entry, proofs)
    link = f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}) ({paper['year']})"
    return f"| {name} | {paper['purpose']} | {link} | {proof} |\n"


def _proof(entry: Entry, proofs: Path) -> str:
    verdict = verdict_of(entry, proofs)
    if verdict in ("baseline", "not tried"):
        return verdict
    if verdict != "reproduced":
        record = read_record(proofs / f"{entry.slug}.json")
        failed = [c["name"] for c in record["claims"] if c["verdict"] != "reproduced"]
        held = [c["name"] for c in record["claims"] if c["verdict"] == "reproduced"]
        verdict = f"not reproduced as a whole: {_are(failed)} not"
        verdict += f", {_are(held)}" if held else ""
    place = f"{proofs.name}/{entry.slug}"
    return f"{verdict}: [record]({place}.json), [figure]({place}.png)"


def _are(names: list[str]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_tables(readme.read_text(encoding="utf-8"), readme.parent / "proofs"))
