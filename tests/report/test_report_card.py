"""Method cards: complete for every method, read from the source without running it."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from esscher import registry
from esscher.errors import UserError
from esscher.report.card import method_card

NOWHERE = Path("no-such-folder")
SOURCE = '''"""One line.

The body, with a_name and `code_name`.

    literal_block
"""

PAPER = Paper(
    title="A Paper",
    year=2020,
    arxiv="2001.00001",
    purpose="A purpose.",
    claim="A claim.",
    baseline=False,
)

OTHER = 3


class Config:
    """About the settings."""

    first: float = 3e-4
    """What first means,
    on two lines, a | b."""
    second: Literal["x", "y"] = "x"
    third: int

    def __post_init__(self) -> None:
        local: int = 1


def smoke() -> Experiment:
    """Small."""


def helper() -> Config:
    """Not a recipe."""


def _arm(seed) -> Experiment:
    """Not a recipe."""
'''
RECORD: dict[str, Any] = {
    "slug": "made_up",
    "title": "A Paper",
    "verdict": "not reproduced",
    "claims": [
        {
            "name": "first claim",
            "statement": "This holds.",
            "verdict": "not reproduced",
            "seeds": [0, 1, 2],
            "checks": [
                {"name": "good", "value": 0.123456, "rule": "0 < x < 1", "passed": True},
                {"name": "bad", "value": 7, "rule": "x < 1", "passed": False},
            ],
        }
    ],
    "notes": "A deviation.",
    "date": "2020-01-02",
    "code": "abc123",
}


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A catalogue of one method whose file could not even be imported."""
    (tmp_path / "some_family").mkdir()
    (tmp_path / "some_family" / "made_up.py").write_text(SOURCE)
    monkeypatch.setattr(registry, "METHODS", tmp_path)
    registry.catalogue.cache_clear()
    yield tmp_path / "some_family" / "made_up.py"
    registry.catalogue.cache_clear()


def rows(card: str, header: str) -> list[list[str]]:
    """Cells of the table whose header starts with these words."""
    lines = card.split("\n")
    start = next(k for k, line in enumerate(lines) if line.startswith(f"| {header}"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.replace(r"\|", "¦").split("|")[1:-1]])
    return found


@pytest.mark.parametrize("slug", registry.catalogue())
def test_every_method_has_a_complete_card(slug: str) -> None:
    card = method_card(slug, NOWHERE)
    module, paper = registry.load_module(slug), registry.find(slug).paper
    assert card.startswith(f"# {slug}: {paper['title']}\n")
    assert str(paper["year"]) in card and f"https://arxiv.org/abs/{paper['arxiv']}" in card
    settings = rows(card, "setting")
    fields = dataclasses.fields(module.Config)
    assert [row[0] for row in settings] == [f"`{field.name}`" for field in fields]
    for (_, default, meaning), field in zip(settings, fields, strict=True):
        assert eval(default.strip("`")) == field.default
        assert len(meaning) > 5, f"{field.name} has no documentation"
    commands = {row[0] for row in rows(card, "command")}
    recipes = [name for name in registry.recipes(slug) if not name.startswith("_")]
    assert commands == {f"`esscher run {slug}:{name}`" for name in recipes}
    assert all(row[1] for row in rows(card, "command"))
    explained = card.partition("## How it works")[2].partition("## Settings")[0]
    assert len(explained) > 100
    assert (module.__doc__ or "").splitlines()[0] not in card


def test_a_baseline_has_nothing_to_prove_and_a_paper_is_not_tried() -> None:
    for slug, entry in registry.catalogue().items():
        proof = method_card(slug, NOWHERE).partition("## Measured proof")[2]
        assert ("a baseline: nothing to prove" in proof) is entry.baseline
        assert ("not tried" in proof) is not entry.baseline


def test_settings_are_as_written_in_the_source(made_up: Path) -> None:
    card = method_card("made_up", NOWHERE)
    assert rows(card, "setting") == [
        ["`first`", "`3e-4`", "What first means, on two lines, a ¦ b."],
        ["`second`", '`"x"`', ""],
        ["`third`", "`required`", ""],
    ]
    assert rows(card, "command") == [["`esscher run made_up:smoke`", "Small."]]
    assert "About the settings." in card and "Not a recipe" not in card


def test_words_are_not_taken_for_emphasis(made_up: Path) -> None:
    card = method_card("made_up", NOWHERE)
    assert r"with a\_name and `code_name`." in card
    assert "    literal_block" in card
    assert "One line." not in card


def test_a_record_is_told_check_by_check(made_up: Path, tmp_path: Path) -> None:
    (tmp_path / "made_up.json").write_text(json.dumps(RECORD))
    card = method_card("made_up", tmp_path)
    assert "Verdict: **not reproduced** (2020-01-02, code abc123)." in card
    assert "### first claim: not reproduced, 3 seeds" in card
    assert "This holds." in card and "A deviation." in card
    assert rows(card, "check") == [
        ["good", "0.1235", "0 \\< x \\< 1", "yes"],
        ["bad", "7", "x \\< 1", "**no**"],
    ]
    assert "made_up.json" in card and "made_up.png" not in card
    (tmp_path / "made_up.png").write_bytes(b"")
    assert "made_up.png" in method_card("made_up", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"verdict": "reproduced"}', '{"claims": []}'])
def test_a_damaged_record_is_refused(made_up: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "made_up.json").write_text(text)
    with pytest.raises(UserError, match=r"made_up\.json is not a proof record"):
        method_card("made_up", tmp_path)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean sac"):
        method_card("sacc", NOWHERE)


def test_a_card_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "gymnasium", "matplotlib", "rich", "esscher.methods")
    check = (
        "from pathlib import Path; from esscher.report.card import method_card; "
        f"method_card('sac', Path('.')); import sys; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_it_is_markdown_that_a_terminal_can_show() -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(Markdown(method_card("dsac_t", NOWHERE)))
    shown = console.export_text()
    assert "gradient_scale" in shown and "values.mean, values.std" in shown
    assert "\\" not in shown
