"""The command for populations: run, eval, sample, and what it says where there is nothing to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import esscher

FEW = ["--evaluation.episodes", "3", "--runtime.threads", "1", "--log.to"]
SMALL = ["--latent", "4", "--width", "8", "--generator-width", "8", "--noise-steps", "5"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "cells.csv"
    draw = np.random.default_rng(0)
    rows = [f"{draw.normal(k):.4f},{draw.normal():.4f},p{k}" for k in range(8) for _ in range(20)]
    path.write_text("\n".join(["gene,other,donor", *rows]))
    return path


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "cells"
    data = ["--data", str(table), "--sets.columns", "set_id", "donor", "--size", "10"]
    options = ["--held-out-share", "0.4", "--steps", "3", "--batch-size", "4", *FEW, *SMALL]
    done = esscher("run", "gde", *data, *options, "--directory", str(folder))
    assert done.returncode == 0, done.stderr
    assert "gde: negative Wasserstein-2 distance" in done.stdout
    return folder


def test_options_of_sets_have_short_forms(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    stage = config["stages"][-1]
    assert stage["sets"]["size"] == 10 and stage["sets"]["columns"] == {"set_id": "donor"}
    assert config["method"]["latent"] == 4 and stage["data"].endswith("cells.csv")


def test_it_is_judged_again(run: Path) -> None:
    told = json.loads(esscher("eval", str(run), "--episodes", "2", "--json").stdout)
    assert told["measure"] == "negative Wasserstein-2 distance" and len(told["returns"]) == 2
    shown = esscher("eval", str(run)).stdout
    assert "over 3 populations" in shown and "sliced w2" in shown


def test_it_draws_its_own_populations_and_others(run: Path, table: Path, tmp_path: Path) -> None:
    done = esscher("sample", str(run), "--count", "6", "--out", str(tmp_path / "own.npz"))
    assert done.returncode == 0, done.stderr
    assert "8 populations" in done.stdout
    with np.load(tmp_path / "own.npz") as found:
        assert found["sample"].shape == (48, 2) and set(found["set_id"]) == {
            f"p{k}" for k in range(8)
        }
    other = tmp_path / "other.csv"
    other.write_text("gene,other,donor\n1,2,new\n3,4,new\n2,2,new\n")
    line = ["sample", str(run), "--data", str(other), "--out", str(tmp_path / "other.npz")]
    assert "1 population" in esscher(*line).stdout
    again = esscher(*line)
    assert again.returncode == 2 and "must name a new FILE.npz" in again.stderr
    wrong = esscher("sample", str(run), "--label", "1", "--out", str(tmp_path / "x.npz"))
    assert wrong.returncode == 2 and "give --data FILE" in wrong.stderr


def test_what_does_not_fit_populations_is_said(run: Path) -> None:
    for line, match in {
        ("export", str(run)): "embeddings.csv lists their vectors",
        ("compare", "gde", "--seeds", "1"): "esscher sweep gde",
        ("run", "gde"): "give --data FILE.parquet",
    }.items():
        done = esscher(*line)
        assert done.returncode == 2 and match in done.stderr, done.stderr
    shown = esscher("show", "gde").stdout.replace("\n", " ")
    assert "--data POPULATIONS.parquet" in shown
