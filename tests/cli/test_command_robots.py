"""The command with policies that remember: judged, exported, and played to make data."""

import json
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from command_line import command, plain

EXPERT = "esscher.chunk_models:dodge_expert"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robots") / "run"
    assert (
        command(
            *("run", "rti_dp", "--env.id", "esscher.envs:Dodge", "--method.policy", EXPERT),
            *("--data", "esscher.datasets:dodge", "--steps", 2, "--method.batch-size", 2),
            *("--method.steps", 2, 1, 0, "--evaluation.episodes", 1, "--log.to"),
            *("--runtime.device", "cpu", "--runtime.threads", 1, "--directory", folder),
        )
        == 0
    )
    return folder


def test_eval_tells_network_evaluations_and_milliseconds(run_folder: Path, capsys: Any) -> None:
    assert command("eval", run_folder, "--json", "--episodes", 2) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["return_mean"] == 1.0
    # Of 22 actions the first took 100 evaluations, the others 3.
    assert told["evaluations_per_action"] == pytest.approx((100 + 21 * 3) / 22)
    assert told["milliseconds_per_step"] > 0
    assert command("eval", run_folder, "--episodes", 1) == 0
    assert "7.41 network evaluations an action" in plain(capsys.readouterr().out)


def test_export_to_onnx_is_refused(run_folder: Path, capsys: Any) -> None:
    assert command("export", run_folder) == 2
    assert "remembers its episode" in plain(capsys.readouterr().err)


def test_collected_episodes_do_not_depend_on_how_many_there_are(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    actions = {}
    for count in (2, 10):
        name = f"dodge/of{count}-v0"
        assert command("data", "collect", run_folder, "--out", name, "--episodes", count) == 0
        episodes = list(minari.load_dataset(name).iterate_episodes())
        assert len(episodes) == count
        actions[count] = [episode.actions for episode in episodes]
    for few, many in zip(actions[2], actions[10], strict=False):
        np.testing.assert_allclose(few, many, atol=1e-5)
    first = np.array([episode[0, 0] for episode in actions[10]])
    assert (first > 0).any() and (first < 0).any(), "each has draws of its own"


def test_without_a_policy_it_says_what_to_give(tmp_path: Path, capsys: Any) -> None:
    wanted = ("run", "rti_dp", "--env.id", "esscher.envs:Dodge", "--data", "esscher.datasets:dodge")
    assert command(*wanted, "--directory", tmp_path / "run") == 2
    assert "give --method.policy RUN of diffusion_policy" in plain(capsys.readouterr().err)
