"""Two processes under Accelerate make the run of one: same batches, objective and gradients."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from esscher.cli import run_command
from esscher.errors import UserError
from esscher.files import read_json
from esscher.runtime import device
from esscher.runtime import run as runner
from support import smoke

PAIRS = (
    *("run", "f_dpo", "--model", "esscher.models:tiny_llama", "--log.to"),
    *("--data", "esscher.datasets:sums_compared", "--divergence", "js", "--steps", "3"),
    *("--batch-size", "4", "--learning-rate", "1e-3", "--warmup-updates", "0"),
    *("--evaluation.episodes", "4", "--runtime.device", "cpu", "--runtime.threads", "1"),
)


def alone(line: Sequence[str], folder: Path) -> dict[str, torch.Tensor]:
    """The weights that this process trains."""
    assert run_command([*line, "--directory", str(folder)]) == 0
    return load_file(folder / "model/model.safetensors")


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
    """Weights of a finished run, which two processes have made."""
    assert read_json(folder / "result.json")["processes"] == 2
    return load_file(folder / "model/model.safetensors")


def check_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    one = alone(PAIRS, tmp_path / "one")
    done = two(*PAIRS, folder=tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("preference accuracy") == 1, "one process speaks"
    check_close(one, trained(tmp_path / "two"))
    fresh = runner._Parts(smoke("f_dpo"))
    fresh.close()
    moved = max(
        (value - one[name]).abs().max().item()
        for name, value in fresh.method.model.model.state_dict().items()
        if name in one
    )
    assert moved > 1e-3, "three Adam steps of 1e-3"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["one", "two", "two.yaml"], "the second process leaves nothing"


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
