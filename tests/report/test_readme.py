"""The README's tables say what the catalogue and the records say."""

import json
from pathlib import Path

import pytest

from esscher.registry import catalogue
from esscher.report.readme import BEGIN, END, methods_tables, with_tables

ROOT = Path(__file__).parents[2]


def test_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(text, ROOT / "proofs") == text, "run: make readme"


def test_every_method_has_a_line_with_its_verdict(tmp_path):
    record = {
        "verdict": "not reproduced",
        "claims": [
            {"name": "one", "statement": "", "verdict": "reproduced", "checks": []},
            {"name": "two", "statement": "", "verdict": "not reproduced", "checks": []},
        ],
    }
    (tmp_path / "sac.json").write_text(json.dumps(record))
    (tmp_path / "dsac_t.json").write_text(json.dumps({"verdict": "reproduced", "claims": []}))
    lines = methods_tables(tmp_path).splitlines()
    for slug, entry in catalogue().items():
        (line,) = [line for line in lines if line.startswith(f"| `{slug}` |")]
        assert entry.paper["purpose"] in line and entry.paper["arxiv"] in line
        assert line.endswith("| baseline |") == entry.baseline
    (sac,) = [line for line in lines if "`sac`" in line]
    assert "not reproduced as a whole: two is not, one is: [record]" in sac
    (odice,) = [line for line in lines if "`odice`" in line]
    assert odice.endswith("| not tried |")
    (dsac_t,) = [line for line in lines if "`dsac_t`" in line]
    assert "| reproduced: [record]" in dsac_t


def test_marks_are_needed():
    with pytest.raises(ValueError, match="marks"):
        with_tables(f"{BEGIN} but no end", ROOT)
    assert with_tables(f"a{BEGIN}old{END}z", ROOT / "proofs").startswith(f"a{BEGIN}\n\n| name")
