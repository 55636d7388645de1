"""Two processes under Accelerate make the run of one: same batches, objective and gradients."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from together import together

from esscher.cli import run_command
from esscher.errors import UserError
from esscher.files import read_json
from esscher.runtime import checkpoint, device
from esscher.runtime import run as runner
from support import smoke

pytestmark = pytest.mark.processes

PAIRS = (
    *("run", "f_dpo", "--model", "esscher.models:tiny_llama", "--log.to"),
    *("--data", "esscher.datasets:sums_compared", "--divergence", "js", "--steps", "3"),
    *("--batch-size", "4", "--learning-rate", "1e-3", "--warmup-updates", "0"),
    *("--evaluation.episodes", "4", "--runtime.device", "cpu", "--runtime.threads", "1"),
)


PAINTERS = ("b2_diffurl", "dragon", "ddpm", "f_distill")
WRITERS = ("lite_ppo", "f_dpg", "divergence_ppo")


def alone(line: Sequence[str], folder: Path) -> dict[str, torch.Tensor]:
    """What this process learns."""
    assert run_command([*line, "--directory", str(folder)]) == 0
    return learned(folder)


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, moments and what else a method keeps."""
    state = checkpoint.load(folder).state
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def two(*line: str, folder: Path, **file: object) -> subprocess.CompletedProcess[str]:
    """A command that starts two processes."""
    path = folder.with_suffix(".yaml")
    values = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True, **file}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "esscher.cli", *line, "--directory", str(folder)]
    environment = {**os.environ, "ESSCHER_TYPECHECK": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--runtime.accelerate", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What a finished run of two processes has learned."""
    assert read_json(folder / "result.json")["processes"] == 2
    return learned(folder)


def check_close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 3e-5
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        # Adam takes whole steps, of 1e-3 here, down gradients that rounding alone has made.
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=atol)


def line_of(slug: str) -> list[str]:
    line = ["run", f"{slug}:smoke", "--log.to", "--log.every", "1", "--steps", "3"]
    line += ["--runtime.device", "cpu", "--runtime.threads", "1", "--evaluation.episodes", "4"]
    if slug in ("lite_ppo", "divergence_ppo"):
        line += ["--method.num-minibatches", "1"]  # Which rows are together is each process's own.
    return line


def test_two_processes_make_the_runs_of_one(tmp_path: Path) -> None:
    """One that learns from data, and those that draw or write what they learn from."""
    lines = {slug: line_of(slug) for slug in (*PAINTERS, *WRITERS)} | {"f_dpo": list(PAIRS)}
    command = [[*line, "--directory", str(tmp_path / f"{k}_two")] for k, line in lines.items()]
    with together(command) as running:
        ones = {slug: alone(line, tmp_path / slug) for slug, line in lines.items()}
        said = running.communicate()[1]
    assert running.returncode == 0, said[-3000:]
    for slug, one in ones.items():
        check_close(one, trained(tmp_path / f"{slug}_two"), 3e-4 if slug in PAINTERS else 3e-5)
    fresh = runner._Parts(smoke("f_dpo"))
    fresh.close()
    moved = max(
        (value - ones["f_dpo"][f"method.model.{name}"]).abs().max().item()
        for name, value in fresh.method.model.state_dict().items()
    )
    assert moved > 1e-3, "three Adam steps of 1e-3"
    for slug in PAINTERS:
        told = [read_rows(tmp_path / name) for name in (slug, f"{slug}_two")]
        for ours, theirs in zip(*told, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), slug


def read_rows(folder: Path) -> list[dict[str, float]]:
    """What was reported of training, without times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = ("phase", "seconds", "steps_per_second")
    return [
        {name: value for name, value in row.items() if name not in timed}
        for row in rows
        if row["phase"] == "train"
    ]


def test_what_goes_wrong_in_all_is_said_once(tmp_path: Path) -> None:
    done = two(*PAIRS, "--text.max-length", "3", folder=tmp_path / "two")
    assert done.returncode == 2
    complaints = [line for line in done.stderr.splitlines() if line.startswith("esscher:")]
    assert len(complaints) == 1 and "has 10 tokens, and 3 fit" in complaints[0]
    assert "Traceback" not in done.stderr and not (tmp_path / "two").exists()


def test_controllers_train_in_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "process_rank", lambda: (0, 2))
    with pytest.raises(UserError, match="sac trains in one process, and 2 were started"):
        runner.run(smoke("sac"), directory=tmp_path / "run", display=False)


def test_alone_nothing_is_exchanged() -> None:
    values = [torch.tensor([1.0, 2.0])]
    device.sum_over_processes(values)
    assert values[0].tolist() == [1, 2] and device.process_rank() == (0, 1)
