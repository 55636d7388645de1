"""The card of one method as Markdown, read from its source and its proof record.

The source is parsed, never imported: a card costs no torch and runs no code of the method.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esscher.files import read_record
from esscher.registry import Entry, find
from esscher.report.memory import memory_rows

NOT_TRIED, NOTHING_TO_PROVE = "not tried", "a baseline: nothing to prove"


def method_card(slug: str, proofs: Path) -> str:
    """Everything that a user should know of a method before running it, as Markdown.

    Args:
        slug: of the catalogue.
        proofs: folder of the proof records.

    Raises:
        UserError: unknown slug, or a proof record that cannot be read.
    """
    entry = find(slug)
    source = entry.path.read_text(encoding="utf-8")
    module = ast.parse(source)
    paper = entry.paper
    _, _, explained = (ast.get_docstring(module) or "").partition("\n")
    where = f", {paper['sections']}" if paper.get("sections") else ""
    parts = [
        f"# {slug}: {_plain(paper['title'])}",
        f"Paper: {paper['year']}, arXiv [{paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})"
        f"{_plain(where)}. Family: {entry.family}.",
        f"**What it is for.** {_plain(paper['purpose'])}",
        f"**The paper's claim.** {_plain(paper['claim'])}" if paper["claim"] else "",
        "## How it works",
        _plain(explained.strip()),
        "## Settings",
        *_settings(module, source),
        "## Recipes",
        *_recipes(module, slug),
        *_memory(module),
        "## Measured proof",
        *_proof(entry, proofs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(module: ast.Module, source: str) -> Iterator[str]:
    config = _class(module, "Config")
    yield _plain(ast.get_docstring(config) or "")
    rows = [
        (f"`{name}`", f"`{default}`", _plain(documentation))
        for name, default, documentation in _fields(config, source)
    ]
    yield _table(("setting", "default", "meaning"), rows)
    yield "On the command line: `--method.NAME VALUE`, with dashes or underscores."


def _fields(config: ast.ClassDef, source: str) -> Iterator[tuple[str, str, str]]:
    """Name, default as written, and the text below, of each field of a dataclass."""
    below = [*config.body[1:], None]
    for node, following in zip(config.body, below, strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        default = ast.get_source_segment(source, node.value) if node.value else None
        yield node.target.id, default or "required", _text(following)


OWN_TASK = {
    "control": "--env.id ID --steps STEPS",
    "pairs": "--model FOLDER --data PAIRS.jsonl` with columns prompt, chosen and rejected, "
    "`--steps UPDATES",
    "demonstrations": "--model FOLDER --data ROWS.jsonl` with columns prompt and completion (or text), "
    "`--steps UPDATES",
    "rows": "--model FOLDER --data ROWS.jsonl` with a column prompt or label (or "
    "`--image.labels 0 1`), `--reward module:function --steps ITERATIONS",
    "sets": "--data POPULATIONS.parquet` with a column set_id, `--steps UPDATES",
    "samples": "--model FOLDER --data FOLDER_OF_IMAGES --steps UPDATES",
    "prompts": "--model FOLDER --data PROMPTS.jsonl --reward module:function` (or "
    "`--task reasoning_gym:NAME` in place of both), `--steps ITERATIONS",
}


def _literals(module: ast.Module) -> dict[str, Any]:
    """What the method class says of itself: world, loop, rows."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any(
            getattr(b, "id", "") == "Method" for b in node.bases
        ):
            return {
                target.id: item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
                for target in item.targets
                if isinstance(target, ast.Name)
            }
    return {}


def _own_task(module: ast.Module) -> str:
    said = _literals(module)
    if said.get("world") == "diffusion":
        return OWN_TASK["samples" if said.get("loop") == "offline" else "rows"]
    if said.get("world") == "sets":
        return OWN_TASK["sets"]
    language = said.get("world") == "language"
    return OWN_TASK[said.get("rows", "demonstrations") if language else "control"]


def _memory(module: ast.Module) -> Iterator[str]:
    """What a model of seven billion weights needs, by calculation."""
    said = _literals(module)
    if said.get("world") != "language":
        return
    yield "## Memory of a 7B model"
    heads = (
        "how",
        "frozen weights",
        "trained, with gradients and moments",
        "activations",
        "in all",
    )
    yield _table(heads, memory_rows())
    yield (
        "With `--model.dtype bfloat16 --model.gradient-checkpointing --runtime.precision bfloat16`; "
        "`--model.lora-rank 16` for adapters. `--method.micro-batch-size` says how many sequences' "
        "activations are held at once, and does not change the objective. By calculation; the first "
        "row was also measured with f_dpo on an H200, at 17.4 GiB (benchmarks/language_7b.json)."
    )


def _recipes(module: ast.Module, slug: str) -> Iterator[str]:
    rows = [
        (f"`esscher run {slug}:{node.name}`", _plain(_one_line(ast.get_docstring(node) or "")))
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and isinstance(node.returns, ast.Name)
        and node.returns.id == "Experiment"
    ]
    yield _table(("command", "what it runs"), rows) if rows else ""
    yield f"On your own task: `esscher run {slug} {_own_task(module)}`."


def _proof(entry: Entry, proofs: Path) -> Iterator[str]:
    if entry.baseline:
        yield f"Verdict: {NOTHING_TO_PROVE}."
        return
    path = proofs / f"{entry.slug}.json"
    if not path.exists():
        yield f"Verdict: **{NOT_TRIED}**. To try it: `esscher prove {entry.slug}`."
        return
    yield from _verdict(read_record(path))
    figure = path.with_suffix(".png")
    yield f"Record: `{path}`" + (f"; figure: `{figure}`" if figure.exists() else "")


def _verdict(record: dict[str, Any]) -> Iterator[str]:
    facts = [record.get("date"), record.get("code") and f"code {record['code']}"]
    measured = ", ".join(str(fact) for fact in facts if fact)
    yield f"Verdict: **{record['verdict']}**" + (f" ({measured})." if measured else ".")
    for claim in record["claims"]:
        seeds = claim.get("seeds")
        counted = f", {len(seeds)} seed{'s' * (len(seeds) != 1)}" if seeds else ""
        yield f"### {_plain(claim['name'])}: {claim['verdict']}{counted}"
        yield _plain(claim["statement"])
        rows = [
            (
                _plain(check["name"]),
                _number(check["value"]),
                _plain(check["rule"]),
                "yes" if check["passed"] else "**no**",
            )
            for check in claim["checks"]
        ]
        yield _table(("check", "measured", "must hold", "passed"), rows)
    yield _plain(record.get("notes") or "")


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


def _plain(text: str) -> str:
    """Markdown that shows these words as they are; code and indented lines are left alone."""
    return "\n".join(
        line if line.startswith("    ") else _outside_code(line) for line in text.split("\n")
    )


def _outside_code(line: str) -> str:
    pieces = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([_*<])", r"\\\1", p) for p in pieces)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )
