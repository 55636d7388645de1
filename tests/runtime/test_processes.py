"""Two processes under Accelerate make the run of one: same batches, objective and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esscher.errors import UserError
from esscher.runtime import device
from esscher.runtime import run as runner
from support import smoke

LINE = (
    *("run", "f_dpo", "--model", "esscher.models:tiny_llama", "--log.to"),
    *("--data", "esscher.datasets:sums_compared", "--divergence", "js", "--steps", "3"),
    *("--batch-size", "4", "--learning-rate", "1e-3", "--warmup-updates", "0"),
    *("--evaluation.episodes", "4", "--runtime.device", "cpu", "--runtime.threads", "1"),
)


def launched(processes: int, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """The trained weights."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command += ["--module", "esscher.cli", *LINE, *more, "--directory", str(folder)]
    environment = {**os.environ, "ESSCHER_TYPECHECK": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("preference accuracy") == 1, "one process speaks"
    return load_file(folder / "model/model.safetensors")


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    one, two = launched(1, tmp_path / "one"), launched(2, tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)
    fresh = runner._Parts(smoke("f_dpo"))
    fresh.close()
    moved = max(
        (value - one[name]).abs().max().item()
        for name, value in fresh.method.model.model.state_dict().items()
        if name in one
    )
    assert moved > 1e-3, "three Adam steps of 1e-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_controllers_train_in_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "process_rank", lambda: (0, 2))
    with pytest.raises(UserError, match="sac trains in one process, and 2 were started"):
        runner.run(smoke("sac"), directory=tmp_path / "run", display=False)


def test_alone_nothing_is_exchanged() -> None:
    values = [torch.tensor([1.0, 2.0])]
    device.sum_over_processes(values)
    assert values[0].tolist() == [1, 2] and device.process_rank() == (0, 1)
