"""Weights in shards (FSDP): two processes that hold half each make the run of one that holds all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esscher.cli import run_command
from esscher.errors import UserError
from esscher.nn.sharding import held_whole, own_part, placed_like, put_together, whole_on_cpu
from esscher.runtime import checkpoint
from esscher.runtime.device import Runtime, sharding_asked
from esscher.runtime.own_process import leave

pytestmark = pytest.mark.processes

FILE: dict[str, Any] = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "use_cpu": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_offload_params": False,
        "fsdp_cpu_ram_efficient_loading": False,
    },
}

PAIRS = (
    *("run", "f_dpo:smoke", "--log.to", "--steps", "4", "--checkpoint.every", "2"),
    *("--method.warmup-updates", "0", "--micro-batch-size", "1", "--max-grad-norm", "0.5"),
    *("--evaluation.every", "2", "--runtime.device", "cpu", "--runtime.threads", "1"),
)


def command(*line: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "ESSCHER_TYPECHECK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "esscher.cli", *line],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder).state
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float, atol: float
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol)


def test_it_trains_as_one_process_does_and_goes_on_exactly(tmp_path: Path) -> None:
    path, one, two = tmp_path / "config.yaml", tmp_path / "one", tmp_path / "two"
    path.write_text(yaml.safe_dump(FILE), encoding="utf-8")
    assert run_command([*PAIRS, "--directory", str(one)]) == 0
    done = command(*PAIRS, "--directory", str(two), "--runtime.accelerate", str(path))
    assert done.stdout.count("preference accuracy") == 1, "one process speaks"
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["config.yaml", "one", "two"], "the second process leaves nothing"
    sharded = tensors(two)
    check_close(tensors(one), sharded, rtol=1e-5, atol=3e-5)
    model = (folder / "model/model.safetensors" for folder in (one, two))
    sizes = [file.stat().st_size for file in model]
    assert abs(sizes[0] - sizes[1]) < 1000, "the model is written whole, and tied weights once"

    killed = tmp_path / "killed"  # What is left of a run that was killed after its second step.
    shutil.copytree(two, killed)
    (killed / "result.json").unlink()
    shutil.rmtree(killed / "checkpoints/step_000000004")
    shutil.rmtree(killed / "model")
    command("resume", str(killed))
    again = tensors(killed)
    assert sharded.keys() == again.keys()
    for name in sharded:
        assert torch.equal(sharded[name], again[name]), name


def test_each_process_holds_half(tmp_path: Path) -> None:
    """Of the model, of its reference and of the moments; and what two backward passes add up to."""
    place = f"file://{tmp_path}/rendezvous"
    torch.multiprocessing.spawn(_held, (place,), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def _held(rank: int, place: str) -> None:
    """What one of two processes checks."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    from esscher.distributions.autoregressive import LanguageModel
    from esscher.models import tiny_llama
    from esscher.runtime.optim import Optim

    torch.manual_seed(0)
    found, tokenizer = tiny_llama()
    model = LanguageModel(found, end_tokens=[tokenizer.eos_token_id], pad_token=0)
    runtime = Runtime()
    whole = sum(p.numel() for p in model.trained)
    reference = model.frozen()
    runtime.prepare(model, reference)
    opt = Optim(model.trained, 1e-3)
    for held in (model.parameters(), reference.parameters(), opt.first_moment, opt.second_moment):
        share = sum(own_part(tensor).numel() for tensor in held) / whole
        assert 0.45 < share < 0.55, share

    # The gradient of a sum over processes, each with rows of its own.
    tokens = torch.tensor([[3, 4, 5, 6], [6, 5, 4, 3]])[rank : rank + 1]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    scored = mask.clone()
    scored[:, 0] = False
    gradients = opt._gradients(model.log_prob(tokens, mask, scored).sum())
    rows = torch.tensor([[3, 4, 5, 6], [6, 5, 4, 3]])
    torch.manual_seed(0)
    plain = LanguageModel(tiny_llama()[0], end_tokens=[tokenizer.eos_token_id], pad_token=0)
    both = mask.expand(2, -1)
    loss = plain.log_prob(rows, both, scored.expand(2, -1)).sum()
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, plain.trained), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]

    # Held whole, one process may ask alone; afterwards it holds its part again.
    with held_whole(model.model):
        if rank == 0:
            model.log_prob(tokens, mask, scored)
    assert 0.45 < sum(own_part(p).numel() for p in model.parameters()) / whole < 0.55
    leave(0)


def test_alone_nothing_is_sharded() -> None:
    layer, value = torch.nn.Linear(2, 2), torch.ones(2)
    assert put_together(layer, layer.forward, value).shape == (2,)
    assert own_part(value) is value and placed_like(value, value) is value
    with held_whole(layer):
        assert whole_on_cpu({"a": value, "b": 3}, keep=True) == {"a": value, "b": 3}
    assert whole_on_cpu({"a": value}, keep=False) == {}


def test_what_launchers_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding_asked() is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer, Other")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    asked = sharding_asked()
    assert asked is not None and asked.blocks == ("LlamaDecoderLayer", "Other")
    assert not asked.reshard_after_forward
    assert Runtime().sharding is None, "one process holds all"
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="FSDP_VERSION must be 2, got 1"):
        sharding_asked()
