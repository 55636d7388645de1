"""A sweep on a cluster of Ray's own, of which a node dies on the way: nothing is lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import esscher
from esscher.experiment import CheckpointConfig, EvaluationConfig, LogConfig
from esscher.methods.control import sac
from esscher.runtime.sweep import sweep


def experiments() -> list[esscher.Experiment]:
    """Two short runs, which save themselves often."""
    short = replace(
        sac.smoke(),
        checkpoint=CheckpointConfig(every=100),
        evaluation=EvaluationConfig(every=0, episodes=1),
        log=LogConfig(every=50, to=()),
    )
    stage = replace(short.stages[-1], steps=800)
    return [replace(short, stages=(stage,), seed=seed) for seed in (0, 1)]


def steps_logged(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["phase"] == "train"]


@pytest.mark.processes
def test_a_node_that_dies_mid_sweep_loses_nothing(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        doomed = cluster.add_node(num_cpus=1)
        told, killed = [], []

        def report(folder, state, share):
            told.append((folder.name, state))
            running = {name for name, state in told if state == "running"}
            if not killed and share > 0.2 and len(running) == 2:
                killed.append(folder.name)
                cluster.remove_node(doomed, allow_graceful=False)

        monkeypatch.setattr("esscher.runtime.sweep._SweepDisplay", lambda *_: Shown(report))
        outcomes = sweep(
            experiments(), tmp_path, workers=2, engine="ray", address=cluster.address, retries=2
        )
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert [outcome.error for outcome in outcomes] == [None, None]
    for outcome in outcomes:
        assert steps_logged(outcome.folder) == list(range(50, 801, 50))


class Shown:
    """In place of the display: passes on what it is told."""

    def __init__(self, report):
        self.report = report

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
