"""Two processes under Accelerate make the run of one: same batches, objective and gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from together import together

from esscher.cli import run_command
from esscher.errors import UserError
from esscher.files import read_json
from esscher.runtime import checkpoint, device
from esscher.runtime import run as runner
from support import smoke

pytestmark = pytest.mark.processes

COMMON = (
    *("--steps", "3", "--log.to", "--log.every", "1", "--evaluation.episodes", "4"),
    *("--runtime.device", "cpu", "--runtime.threads", "1"),
)
DIGITS = (
    *("--model", "esscher.images:tiny_unet", "--lora-rank", "2", "--model.kwargs"),
    *("size", "8", "classes", "10", "width", "8", "--image.labels", "0", "1", "2"),
    *("--reward", "esscher.image_rewards:Compressibility", "--method.draw-steps", "3"),
    *("--evaluation.every", "0"),
)
AVERAGED = ("--method.average", "0.9")
"""Also what an average is made of."""

LEARNERS = {
    "f_dpo": (
        *("f_dpo", "--model", "esscher.models:tiny_llama", "--divergence", "js"),
        *("--data", "esscher.datasets:sums_compared", "--batch-size", "4"),
        *("--learning-rate", "1e-3", "--warmup-updates", "0"),
    ),
    "sft": ("sft:smoke",),
    "genarm": ("genarm:smoke",),
    "ddpm": ("ddpm:smoke", *AVERAGED),
}
"""From data."""
WRITERS = {
    # In one minibatch: which rows are together is each process's own.
    "lite_ppo": ("lite_ppo:smoke", "--method.num-minibatches", "1"),
    "divergence_ppo": ("divergence_ppo:smoke", "--method.num-minibatches", "1"),
    "f_dpg": ("f_dpg:smoke",),
}
"""From completions that they write."""
PAINTERS = {
    "dragon": ("dragon", *DIGITS, "--method.batch-size", "4", *AVERAGED),
    "f_distill": ("f_distill:smoke", *AVERAGED),
    "b2_diffurl": (  # With this seed the processes learn from parts that are not equally many.
        *("b2_diffurl", "--seed", "1", *DIGITS),
        *("--method.algorithm", "dpok", "--method.scale", "2"),
        *("--method.batch-size", "2", "--method.copies", "3", "--method.branches", "3"),
        *("--method.first-suffix", "2", "--method.last-suffix", "3", "--method.epochs", "1"),
        *("--method.draw-batch-size", "2", "--method.minibatch-size", "3"),
        *("--method.positive-threshold", "0", "--method.negative-threshold", "0"),
    ),
}
"""From images that they draw."""


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, moments and what else a method keeps."""
    state = checkpoint.load(folder).state
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_same_run(one: Path, other: Path) -> None:
    """All that was learned, within a third of what three of Adam's steps can move a weight; and its
    gradients closer, for their size does not show in so few steps.
    """
    ours, theirs = learned(one), learned(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam takes whole steps, also down gradients that rounding alone has made.
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-3, atol=3e-4, msg=f"{other}: {name}"
        )
    for moments in {name.rsplit(".", 1)[0] for name in ours if ".first_moment." in name}:
        names = [name for name in ours if name.startswith(f"{moments}.")]
        a, b = (torch.cat([found[name].flatten() for name in names]) for found in (ours, theirs))
        assert (a - b).norm() < 1e-3 * a.norm(), f"{other}: {moments}"


def test_two_processes_make_the_runs_of_one(tmp_path: Path) -> None:
    """Each with all of the weights, and each with half of them."""
    lines = {
        slug: ("run", *line, *COMMON, "--directory")
        for slug, line in (LEARNERS | WRITERS | PAINTERS).items()
    }
    whole, half = (
        [(*line, str(tmp_path / f"{slug}_{held}")) for slug, line in lines.items()]
        for held in ("whole", "half")
    )
    with together(whole) as running:
        for slug, line in lines.items():
            assert run_command([*line, str(tmp_path / slug)]) == 0
        said = running.communicate()[1]
    assert running.returncode == 0, said[-6000:]
    with together(half, sharded=True) as running:
        said = running.communicate()[1]
    assert running.returncode == 0, said[-6000:]
    for slug in lines:
        for other in (tmp_path / f"{slug}_whole", tmp_path / f"{slug}_half"):
            assert read_json(other / "result.json")["processes"] == 2
            check_same_run(tmp_path / slug, other)
            if slug in PAINTERS:
                for ours, theirs in zip(read_rows(tmp_path / slug), read_rows(other), strict=True):
                    # Before the first step all pairs are ties but for rounding.
                    ties = [row.pop("implicit_accuracy", 0.5) for row in (ours, theirs)]
                    assert ties[0] == pytest.approx(ties[1], abs=0.1), other
                    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), other
    saved = "model/unet/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / saved) for name in ("ddpm", "ddpm_half"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=3e-4)
    fresh, found = runner._Parts(smoke("f_dpo")), learned(tmp_path / "f_dpo")
    fresh.close()
    moved = max(
        (value - found[f"method.model.{name}"]).abs().max().item()
        for name, value in fresh.method.model.state_dict().items()
    )
    assert moved > 1e-3, "three Adam steps of 1e-3"


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
    path = tmp_path / "two.yaml"
    values = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    line = ("run", *LEARNERS["f_dpo"], *COMMON, "--text.max-length", "3")
    line += ("--directory", str(tmp_path / "two"), "--runtime.accelerate", str(path))
    done = subprocess.run(
        [sys.executable, "-m", "esscher.cli", *line],
        capture_output=True,
        text=True,
        env={**os.environ, "ESSCHER_TYPECHECK": "0", "OMP_NUM_THREADS": "1"},
        check=False,
    )
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
