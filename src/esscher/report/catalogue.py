"""The pages of the documentation site that nobody writes: a card a method, their index, the manual.

Everything is read from where it is kept anyway (method files, proof records, README, CONTRIBUTING), and
exists only while the site is built. Pages are named by their place under docs/.
"""

import json
import posixpath
import re
from pathlib import Path

from esscher.registry import Entry, catalogue
from esscher.report.card import Look, memory_table, method_card, plain, table
from esscher.report.equations import symbols_of, with_equations
from esscher.report.readme import END, methods_table, verdict_of

FAMILIES = {
    "control": "Controllers that act in a task while they learn",
    "offline": "Controllers from logged data",
    "robots": "Policies of chunks and goals, from demonstrations",
    "diversity": "Collections of controllers that behave differently",
    "language": "Language models",
    "diffusion": "Diffusion models",
    "applied": "Populations that are known by samples",
}
DOCUMENTS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "README.md": "manual.md",
}
"""Pages that are files at the root of the repository."""
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r"(\$\$.*?\$\$|\$[^$\n]+\$)", re.DOTALL)
SHORT_OF = "## What is known to fall short"


def pages(root: Path) -> dict[str, str]:
    """Every generated page, by its place under docs/, as Markdown.

    Args:
        root: of the repository.
    """
    proofs = root / "proofs"
    found = {f"methods/{slug}.md": _card(entry, root) for slug, entry in catalogue().items()}
    found["methods/index.md"] = _index(proofs)
    for source, page in DOCUMENTS.items():
        text = (root / source).read_text(encoding="utf-8")
        if source == "README.md":
            text = "# Manual" + text.partition(END)[2]
        found[page] = relocated(text, source, page)
    return found


def records(root: Path) -> dict[str, Path]:
    """Files that pages link to: records of proofs and benchmarks with their figures, the licence."""
    folders, kinds = ("proofs", "benchmarks"), ("*.json", "*.png")
    found = [path for folder in folders for kind in kinds for path in (root / folder).glob(kind)]
    return {path.relative_to(root).as_posix(): path for path in [*found, root / "LICENSE"]}


def families() -> dict[str, list[Entry]]:
    """Family -> its methods, papers first; families in the order in which the site shows them."""
    order = [*FAMILIES, *sorted({e.family for e in catalogue().values()} - set(FAMILIES))]
    grouped = {name: [e for e in catalogue().values() if e.family == name] for name in order}
    return {name: entries for name, entries in grouped.items() if entries}


def relocated(text: str, source: str, page: str) -> str:
    """Markdown with its relative links turned from places in the repository to places on the site.

    Args:
        text: of the document.
        source: where it is in the repository.
        page: where it is on the site.
    """

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = DOCUMENTS.get(place, place.removeprefix("docs/"))
        return before + posixpath.relpath(place, posixpath.dirname(page) or ".") + after

    return LINK.sub(moved, text)


def _memory(root: Path) -> str:
    return memory_table()


def _measured_7b(root: Path) -> str:
    """Of benchmarks/language_7b.json: a row a size of micro-batches."""
    record = json.loads((root / "benchmarks/language_7b.json").read_text(encoding="utf-8"))
    rows = [
        (
            name,
            f"{row['seconds']:.2f} s",
            f"{row['peak_gib']:.1f} GiB",
            f"{row['calculated_gib']:.1f} GiB",
        )
        for name, row in record["updates"].items()
    ]
    return table(("activations of", "an update", "peak memory", "calculated"), rows)


TABLES = {"memory": _memory, "measured_7b": _measured_7b}
"""Tables that written pages name, made from the root of the repository."""


def _index(proofs: Path) -> str:
    """All methods in one table a family, with buttons that leave one family."""
    shown = families()
    buttons = [
        f'<label><input type="radio" name="family" value="{name}"{checked}> {name}</label>'
        for name, checked in [("all", " checked"), *((name, "") for name in shown)]
    ]
    hidden = [
        f'body:has(input[value="{name}"]:checked) .family:not(#{name}-methods) {{ display: none }}'
        for name in shown
    ]
    counted = len(catalogue())
    parts = [
        "---\ntitle: All methods\nhide: [toc]\n---",
        "# Methods",
        f"{counted} methods, of 64 that are planned. Each has a card: what it is for, its equations, "
        "every setting with its default, recipes, and the paper's claim beside what was measured here. "
        "Searching finds words of the cards too; [families and verdicts](../families.md) lists them by "
        "tag.",
        "<style>" + " ".join(hidden) + "</style>",
        f'<fieldset class="families"><legend>Family</legend>{"".join(buttons)}</fieldset>',
    ]
    for name, entries in shown.items():
        table = methods_table(entries, proofs, lambda slug: f"[`{slug}`](docs/methods/{slug}.md)")
        parts.append(
            f'<section class="family" id="{name}-methods" markdown="1">\n\n'
            f"## {name.capitalize()}\n\n{FAMILIES.get(name, '')}\n\n"
            f"{relocated(table, 'README.md', 'methods/index.md')}\n</section>"
        )
    return "\n\n".join(parts) + "\n"


def _card(entry: Entry, root: Path) -> str:
    """The card of `esscher show`, with equations set, the figure shown, and tags to filter by."""
    proofs = root / "proofs"
    look = Look(explained=_explained, record=lambda path: _record(entry, path))
    # A terminal takes a backslash before < for that sign alone, this Markdown does not.
    card = method_card(entry.slug, proofs, look).replace(r"\<", "&lt;")
    title, _, body = card.partition("\n")
    front = {
        "title": f"{entry.slug}: {entry.paper['title']}",
        "description": entry.paper["purpose"],
        "tags": [entry.family, verdict_of(entry, proofs)],
    }
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in front.items())
    note = (
        '!!! note "A baseline"\n\n    Papers compare with it; nothing is proved here.'
        if entry.baseline
        else ""
    )
    return f"---\n{lines}\n---\n\n{title}\n\n{note}\n\n{body}{_short_of(entry, root)}"


def _explained(text: str) -> str:
    """The docstring with equations and symbols set; sentences as `show` has them."""
    parts = FORMULA.split(with_equations(_with_symbols(text)))
    return "".join(part if part.startswith("$") else plain(part) for part in parts)


def _with_symbols(text: str) -> str:
    """Symbol tables: variables as code, the paper's symbols as formulas."""
    lines, column = [], -1
    for line in text.split("\n"):
        cells = [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []
        if cells[:1] == ["variable"]:
            column = 1
        elif cells and column > 0 and not line.startswith("|-"):
            cells[0] = ", ".join(f"`{name}`" for name in cells[0].split(", "))
            cells[column] = symbols_of(cells[column])
            line = "| " + " | ".join(cells) + " |"
        lines.append(line)
    return "\n".join(lines)


def _record(entry: Entry, path: Path) -> str:
    """The figure of a proof and a link to its record."""
    place = f"../proofs/{entry.slug}"
    shown = f"[Record]({place}.json) with every figure of every seed."
    if path.with_suffix(".png").exists():
        alt = f"The proof of {entry.slug}: each claim with what was measured on every seed"
        shown += f'\n\n[![{alt}]({place}.png){{ .proof loading="lazy" }}]({place}.png)'
    return shown


def _short_of(entry: Entry, root: Path) -> str:
    """What docs/design.md lists as falling short of this method."""
    section = (root / "docs/design.md").read_text(encoding="utf-8").partition(SHORT_OF)[2]
    rows = [line for line in section.split("\n") if line.startswith("|")]
    own = [row for row in rows[2:] if _names(row.split("|")[1], entry.slug)]
    return "\n".join(["\n## Known to fall short\n", *rows[:2], *own, ""]) if own else ""


def _names(text: str, slug: str) -> bool:
    words = re.sub(r"[^a-z0-9]+", " ", text.lower())
    return f" {slug.replace('_', ' ')} " in f" {words} "
