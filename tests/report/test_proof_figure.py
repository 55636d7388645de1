"""The figure of a proof record."""

import numpy as np
import pytest
from PIL import Image

from esscher.report import write_proof_figure

RECORD = {
    "slug": "dsac_t",
    "title": "DSAC-T",
    "verdict": "reproduced",
    "claims": [
        {
            "name": "bias",
            "statement": "Overestimates less. " * 20,
            "verdict": "reproduced",
            "checks": [
                {"name": "ratio", "value": 0.16, "rule": "x < 0.5", "passed": True},
                {"name": "broken", "value": None, "rule": "x < 0.5", "passed": False},
            ],
            "arms": {
                "DSAC-T": {"bias": [1.0, 2.0], "a": [1], "b": [2], "c": 3.0},
                "SAC": {"bias": [3.0, None], "a": [float("nan")]},
            },
            "curves": {"SAC": {"steps": [0, 1, 2], "returns": [[1, 2, 3], [2, 3, 4]]}},
        },
        {"name": "bare", "statement": "No numbers.", "verdict": "reproduced", "checks": []},
    ],
}


def test_every_claim_gets_its_row(tmp_path):
    out = write_proof_figure(RECORD, tmp_path / "proof.png")
    both = np.asarray(Image.open(out).convert("L"))
    write_proof_figure(RECORD | {"claims": RECORD["claims"][:1]}, tmp_path / "one.png")
    one = np.asarray(Image.open(tmp_path / "one.png").convert("L"))
    assert both.shape[1] == one.shape[1] and both.shape[0] > one.shape[0]
    assert (both < 128).any() and both[0, 0] == 255
    assert write_proof_figure(RECORD, tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_text_beside_the_panels_says_pass_and_fail():
    from esscher.report.proof_figure import BAD, GOOD, _claim_lines

    lines = {text.split("  ")[0]: colour for text, colour, _ in _claim_lines(RECORD["claims"][0])}
    assert lines["PASS"] == GOOD and lines["FAIL"] == BAD


def test_a_record_without_claims_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'dsac_t' has no claims"):
        write_proof_figure({"slug": "dsac_t", "verdict": "", "claims": []}, tmp_path / "x.png")
