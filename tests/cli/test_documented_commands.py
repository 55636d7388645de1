"""Commands that the documentation and the Makefile print: their verbs and options exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from esscher import cli
from esscher.errors import UserError
from esscher.registry import find

ROOT = Path(__file__).parents[2]
STAND_INS = {"SLUG": "sac", "SLUG[:RECIPE]": "sac:smoke", "RECIPE": "smoke", "$*": "sac"}


class Parsed(Exception):
    """Raised where a command would begin its work."""


@pytest.fixture
def parse_only(monkeypatch):
    parse = tyro.cli

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse_and_stop)


def commands(text):
    """Arguments of every `esscher ...` line in fenced blocks, with broken lines joined."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"^\s*(\$ |> )?(\.venv/bin/|\$\(BIN\)/)?", "", line)
            if words.startswith("esscher "):
                found.append(arguments_of(words))
    return found


def arguments_of(line):
    words = shlex.split(line, comments=True)[1:]
    end = next((k for k, word in enumerate(words) if word in ("|", ">", "&&", ";", "&")), None)
    return [STAND_INS.get(word, word) for word in words[:end] if word != "..."]


def check(arguments):
    """Raise unless a command line could begin its work."""
    if arguments[0] in ("--help", "--version"):
        return
    if arguments[0] not in cli.VERBS:
        raise UserError(f"no such command: {arguments[0]}")
    try:
        cli.VERBS[arguments[0]](list(arguments[1:]))
    except Parsed:
        pass
    except SystemExit as ended:
        assert ended.code == 0, arguments
    if arguments[0] in ("show", "prove"):
        find(arguments[1])
    if arguments[0] == "compare":
        for word in arguments[1:]:
            if word.startswith("-"):
                break
            find(word)


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_documentation_exist(name, parse_only):
    for arguments in commands((ROOT / name).read_text(encoding="utf-8")):
        check(arguments)


def test_commands_of_the_makefile_exist(parse_only):
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = [arguments_of(line) for line in re.findall(r"\$\(BIN\)/(esscher .*)", text)]
    assert found
    for arguments in found:
        check(arguments)


def test_the_line_that_the_usage_suggests_exists(parse_only, capsys):
    cli.run_command([])
    suggested = capsys.readouterr().out.partition("Start with: ")[2]
    lines = [line.strip(" ,\n") for line in suggested.split(" or: ")]
    assert len(lines) == 2
    for line in lines:
        check(arguments_of(line))


def test_the_check_sees_a_wrong_line(parse_only, capsys):
    text = "text\n```bash\n$ esscher run sac \\\n    --stepps 9  # oops\n```\nesscher nothing\n"
    assert commands(text) == [["run", "sac", "--stepps", "9"]]
    with pytest.raises(AssertionError):
        check(["run", "sac", "--stepps", "9"])
    for arguments in (["runn"], ["run", "sack"], ["compare", "sac", "pp0"], ["show", "sack"]):
        with pytest.raises(UserError):
            check(arguments)
    check(["compare", "sac", "ppo", "--steps", "9"])
    assert "Unrecognized" in capsys.readouterr().err
