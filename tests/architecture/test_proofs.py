"""Every paper's committed proof record was made by the experiments that the code now describes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esscher.experiment import Experiment
from esscher.proof import Claim
from esscher.registry import load_module

PROOFS = Path(__file__).parents[2] / "proofs"
PAPERS = [p.stem for p in sorted(PROOFS.glob("*.json"))]


def record_of(slug: str) -> dict[str, Any]:
    return json.loads((PROOFS / f"{slug}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("slug", PAPERS)
def test_record_tells_the_experiments_of_the_code(slug: str) -> None:
    record = record_of(slug)
    claims: dict[str, Claim] = {claim.name: claim for claim in load_module(slug).proof().claims}
    assert [claim["name"] for claim in record["claims"]] == list(claims)
    for told in record["claims"]:
        claim = claims[told["name"]]
        assert told["statement"] == claim.statement
        assert set(told["experiments"]) == set(claim.arms)
        for arm, make in claim.arms.items():
            seed = told["seeds"][0]
            expected = replace(make(seed), seed=seed, label=arm)
            assert Experiment.from_json(told["experiments"][arm]) == expected


@pytest.mark.parametrize("slug", PAPERS)
def test_verdict_follows_from_the_checks_and_no_seed_is_missing(slug: str) -> None:
    record = record_of(slug)
    for claim in record["claims"]:
        passed = all(check["passed"] for check in claim["checks"])
        assert claim["verdict"] == ("reproduced" if passed else "not reproduced")
        assert claim["seeds"] == list(range(len(claim["seeds"])))
        for figures in claim["arms"].values():
            assert all(len(values) == len(claim["seeds"]) for values in figures.values())
    reproduced = all(claim["verdict"] == "reproduced" for claim in record["claims"])
    assert record["verdict"] == ("reproduced" if reproduced else "not reproduced")
    assert (PROOFS / f"{slug}.png").exists()


@pytest.mark.parametrize("slug", PAPERS)
def test_judging_the_recorded_figures_again_gives_the_recorded_checks(slug: str) -> None:
    for told in record_of(slug)["claims"]:
        claim = next(c for c in load_module(slug).proof().claims if c.name == told["name"])
        again = [vars(check) for check in claim.judge(told["arms"])]
        assert json.loads(json.dumps(again)) == told["checks"]
