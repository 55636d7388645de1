"""The README's tables of methods, written from the catalogue and the proof records.

python -m esscher.report.readme README.md    rewrites what lies between the marks
"""

import sys
from pathlib import Path

from esscher.files import read_record
from esscher.registry import Entry, catalogue

BEGIN, END = "<!-- methods: written by make readme -->", "<!-- end of methods -->"


def methods_tables(proofs: Path) -> str:
    """Papers with their verdicts, then baselines, as Markdown."""
    entries = list(catalogue().values())
    papers = [_row(entry, _verdict(entry, proofs)) for entry in entries if not entry.baseline]
    baselines = [_row(entry, "baseline") for entry in entries if entry.baseline]
    head = "| name | what it is for | paper | proof |\n|---|---|---|---|\n"
    return (
        head
        + "".join(papers)
        + "\nBaselines, which papers compare with and which prove nothing here:\n\n"
        + head
        + "".join(baselines)
    )


def with_tables(text: str, proofs: Path) -> str:
    """The text with the tables between its marks brought up to date.

    Raises: ValueError if a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the marks {BEGIN} and {END} are not both there")
    return f"{before}{BEGIN}\n\n{methods_tables(proofs)}\n{END}{after}"


def _row(entry: Entry, proof: str) -> str:
    paper = entry.paper
    link = f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}) ({paper['year']})"
    return f"| `{entry.slug}` | {paper['purpose']} | {link} | {proof} |\n"


def _verdict(entry: Entry, proofs: Path) -> str:
    path = proofs / f"{entry.slug}.json"
    if not path.exists():
        return "not tried"
    record = read_record(path)
    verdict = record["verdict"]
    if verdict != "reproduced":
        failed = [c["name"] for c in record["claims"] if c["verdict"] != "reproduced"]
        held = [c["name"] for c in record["claims"] if c["verdict"] == "reproduced"]
        verdict = f"not reproduced as a whole: {_are(failed)} not"
        verdict += f", {_are(held)}" if held else ""
    name = f"{proofs.name}/{entry.slug}"
    return f"{verdict}: [record]({name}.json), [figure]({name}.png)"


def _are(names: list[str]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(with_tables(readme.read_text(encoding="utf-8"), readme.parent / "proofs"))
