"""The card of one method as Markdown, read from its source and its proof record.

The source is parsed, never imported: a card costs no torch and runs no code of the method. The command
`show` prints it; the documentation site sets the same card with a `Look` of its own.
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esscher.files import read_record
from esscher.registry import Entry, declared, find
from esscher.report.memory import memory_rows

NOT_TRIED, NOTHING_TO_PROVE = "not tried", "a baseline: nothing to prove"


def plain(text: str) -> str:
    """Markdown that shows these words as they are; code and indented lines are left alone."""
    return "\n".join(
        line if line.startswith("    ") else _outside_code(line) for line in text.split("\n")
    )


def record_paths(record: Path) -> str:
    """Where a proof record and its figure are."""
    figure = record.with_suffix(".png")
    return f"Record: `{record}`" + (f"; figure: `{figure}`" if figure.exists() else "")


@dataclass(frozen=True)
class Look:
    """How those parts of a card are set that differ between a terminal and a page."""

    explained: Callable[[str], str] = plain
    """Of what the file says of the method, with its equations and symbols."""
    record: Callable[[Path], str] = record_paths
    """Of a proof record and its figure."""


def method_card(slug: str, proofs: Path, look: Look = Look()) -> str:
    """Everything that a user should know of a method before running it, as Markdown.

    Args:
        slug: of the catalogue.
        proofs: folder of the proof records.
        look: how equations and the record are set.

    Raises:
        UserError: unknown slug, or a proof record that cannot be read.
    """
    entry = find(slug)
    source = entry.path.read_text(encoding="utf-8")
    module = ast.parse(source)
    paper = entry.paper
    _, _, explained = (ast.get_docstring(module) or "").partition("\n")
    explained, remarks = _parted(explained.strip())
    where = f", {paper['sections']}" if paper.get("sections") else ""
    parts = [
        f"# {slug}: {plain(paper['title'])}",
        f"Paper: {paper['year']}, arXiv [{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
        f"{plain(where)}. Family: {entry.family}.",
        f"**What it is for.** {plain(paper['purpose'])}",
        f"**The paper's claim.** {plain(paper['claim'])}" if paper["claim"] else "",
        "## How it works",
        look.explained(explained),
        "## Before you run it",
        *_needs(module, slug),
        look.explained(remarks),
        "## Settings",
        *_settings(module, source),
        "## Recipes",
        *_recipes(module, slug),
        *_memory(slug),
        "## Measured proof",
        *_proof(entry, proofs, look),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parted(explained: str) -> tuple[str, str]:
    """What stands before and with the symbol table, and the remarks behind it."""
    paragraphs = explained.split("\n\n")
    tables = [place for place, text in enumerate(paragraphs) if text.startswith("|")]
    end = tables[-1] + 1 if tables else len(paragraphs)
    return "\n\n".join(paragraphs[:end]), "\n\n".join(paragraphs[end:])


LOOPS = {
    "online": "It acts in the task while it learns; steps are environment steps.",
    "offline": "It learns from `--data` alone; steps are updates.",
    "evolve": "It judges a population by whole episodes; steps are environment steps.",
    "generate": "The model writes completions and a reward judges them; steps are iterations.",
    "converse": "The model plays whole dialogues with a game; steps are iterations.",
    "draw": "The model draws samples in every iteration; steps are iterations.",
}
DATA = {
    "required": "Logged steps (`--data`) are required beside the task.",
    "optional": "Logged steps (`--data`) may be given beside the task.",
}
EXTRAS = {"language": "language", "diffusion": "diffusion", "sets": "applied", "robots": "robots"}


def _needs(module: ast.Module, slug: str) -> Iterator[str]:
    """What the method class says it asks of a user, as a list."""
    said = declared(slug)
    world, loop = said.get("world", "control"), said.get("loop", "online")
    lines = [LOOPS[loop]]
    if world == "control" and loop != "offline" and said.get("data") in DATA:
        lines.append(DATA[said["data"]])
    if said.get("rewarded"):
        lines.append("A reward (`--reward`) is required.")
    if said.get("trains") is False:
        lines.append("No weights are changed: only how the model is drawn from.")
    if said.get("games"):
        lines.append("Several agents can be trained at once, each with choices of its own.")
    if "continuous_only" in _calls(module):
        lines.append("Actions must be continuous (a bounded Box).")
    extra = EXTRAS.get(world) or ("control" if loop != "online" or said.get("data") else "")
    if extra:
        lines.append(f'It needs `pip install ".[{extra}]"`.')
    yield "\n".join(f"- {line}" for line in lines)


def _calls(module: ast.Module) -> set[str]:
    """Names of the functions that are called anywhere in the file."""
    calls = (node.func for node in ast.walk(module) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


def _settings(module: ast.Module, source: str) -> Iterator[str]:
    config = _class(module, "Config")
    yield plain(ast.get_docstring(config) or "")
    rows = [
        (f"`{name}`", f"`{default}`", plain(documentation))
        for name, default, documentation in _fields(config, source)
    ]
    yield table(("setting", "default", "meaning"), rows)
    yield "On the command line: `--method.NAME VALUE`, with dashes or underscores."


def _fields(config: ast.ClassDef, source: str) -> Iterator[tuple[str, str, str]]:
    """Name, default as written, and the text below, of each field of a dataclass."""
    below, lines = [*config.body[1:], None], source.encode().splitlines(keepends=True)
    for node, following in zip(config.body, below, strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        default = _as_written(lines, node.value) if node.value else "required"
        yield node.target.id, default, _text(following)


def _as_written(lines: list[bytes], node: ast.expr) -> str:
    """The source of an expression; ast.get_source_segment would split the file anew each time."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    if first == last:
        return lines[first][node.col_offset : node.end_col_offset].decode()
    inner = lines[first + 1 : last]
    return b"".join(
        [lines[first][node.col_offset :], *inner, lines[last][: node.end_col_offset]]
    ).decode()


OWN_TASK = {
    "control": "--env.id ID --steps STEPS",
    "pairs": "--model FOLDER --data PAIRS.jsonl` with columns prompt, chosen and rejected, "
    "`--steps UPDATES",
    "demonstrations": "--model FOLDER --data ROWS.jsonl` with columns prompt and completion (or text), "
    "`--steps UPDATES",
    "rows": "--model FOLDER --data ROWS.jsonl` with a column prompt or label (or "
    "`--image.labels 0 1`), `--reward module:function --steps ITERATIONS",
    "sets": "--data POPULATIONS.parquet` with a column set_id, `--steps UPDATES",
    "robots": "--model FOLDER --data DEMONSTRATIONS` in LeRobot's layout, `--steps UPDATES",
    "samples": "--model FOLDER --data FOLDER_OF_IMAGES --steps UPDATES",
    "prompts": "--model FOLDER --data PROMPTS.jsonl --reward module:function` (or "
    "`--task reasoning_gym:NAME` in place of both), `--steps ITERATIONS",
}


def _own_task(slug: str) -> str:
    said = declared(slug)
    if said.get("world") == "diffusion":
        return OWN_TASK["samples" if said.get("loop") == "offline" else "rows"]
    if said.get("world") in ("sets", "robots"):
        return OWN_TASK[said["world"]]
    language = said.get("world") == "language"
    return OWN_TASK[said.get("rows", "demonstrations") if language else "control"]


def memory_table() -> str:
    """What a model of seven billion weights needs, in several ways, as Markdown."""
    trained = "trained, with gradients and moments"
    return table(("how", "frozen weights", trained, "activations", "in all"), memory_rows())


def _memory(slug: str) -> Iterator[str]:
    """What a model of seven billion weights needs, by calculation."""
    said = declared(slug)
    if said.get("world") != "language":
        return
    yield "## Memory of a 7B model"
    yield memory_table()
    yield (
        "With `--model.dtype bfloat16 --model.gradient-checkpointing --runtime.precision bfloat16`; "
        "`--model.lora-rank 16` for adapters. `--method.micro-batch-size` says how many sequences' "
        "activations are held at once, and does not change the objective. By calculation; the first "
        "row was also measured with f_dpo on an H200, at 17.4 GiB (benchmarks/language_7b.json)."
    )


def _recipes(module: ast.Module, slug: str) -> Iterator[str]:
    rows = [
        (f"`esscher run {slug}:{node.name}`", plain(_one_line(ast.get_docstring(node) or "")))
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and isinstance(node.returns, ast.Name)
        and node.returns.id == "Experiment"
    ]
    yield table(("command", "what it runs"), rows) if rows else ""
    yield f"On your own task: `esscher run {slug} {_own_task(slug)}`."


def _proof(entry: Entry, proofs: Path, look: Look) -> Iterator[str]:
    if entry.baseline:
        yield f"Verdict: {NOTHING_TO_PROVE}."
        return
    path = proofs / f"{entry.slug}.json"
    if not path.exists():
        yield f"Verdict: **{NOT_TRIED}**. To try it: `esscher prove {entry.slug}`."
        return
    yield from _verdict(read_record(path))
    yield look.record(path)


def _verdict(record: dict[str, Any]) -> Iterator[str]:
    facts = [record.get("date"), record.get("code") and f"code {record['code']}"]
    measured = ", ".join(str(fact) for fact in facts if fact)
    yield f"Verdict: **{record['verdict']}**" + (f" ({measured})." if measured else ".")
    if "seconds" in record:
        yield _took(record["seconds"], record["machine"])
    for claim in record["claims"]:
        seeds = claim.get("seeds")
        counted = f", {len(seeds)} seed{'s' * (len(seeds) != 1)}" if seeds else ""
        yield f"### {plain(claim['name'])}: {claim['verdict']}{counted}"
        yield plain(claim["statement"])
        rows = [
            (
                plain(check["name"]),
                _number(check["value"]),
                plain(check["rule"]),
                "yes" if check["passed"] else "**no**",
            )
            for check in claim["checks"]
        ]
        yield table(("check", "measured", "must hold", "passed"), rows)
    yield plain(record.get("notes") or "")


def _took(seconds: float, machine: dict[str, Any]) -> str:
    """How long a proof takes, and where that was measured."""
    minutes = max(round(seconds / 60), 1)
    return (
        f"All seeds and baselines took {minutes} minute{'s' * (minutes != 1)} on "
        f"{machine['processors']} processors ({machine['processor']}), with torch {machine['torch']}."
    )


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)


def _text(node: ast.stmt | None) -> str:
    """The string that a statement consists of, on one line; nothing for any other statement."""
    value = node.value if isinstance(node, ast.Expr) else None
    text = value.value if isinstance(value, ast.Constant) else None
    return _one_line(text) if isinstance(text, str) else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _outside_code(line: str) -> str:
    pieces = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([_*<])", r"\\\1", p) for p in pieces)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; a bar within a cell is kept."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )
