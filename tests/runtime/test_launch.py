"""Accelerate files: what is read of them, what is refused, and how the command ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esscher.cli import run_command
from esscher.errors import UserError
from esscher.experiment import Experiment
from esscher.registry import load_method
from esscher.runtime import run as runner
from esscher.runtime.launch import launch_of, read_launch, status_of
from support import smoke

pytestmark = pytest.mark.processes

WRITTEN: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_CPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": True,
}
"""As `accelerate config` writes it."""

SHARDED: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_activation_checkpointing": False,
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(**changed: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(WRITTEN | changed), encoding="utf-8")
        return path

    return written


def asking(path: Path, slug: str = "f_dpo", **runtime: Any) -> Experiment:
    experiment = smoke(slug)
    there = replace(experiment.runtime, device="cpu", **runtime)
    return replace(experiment, runtime=replace(there, accelerate=str(path)))


def test_what_accelerate_writes_is_read(write: Write) -> None:
    launch = read_launch(write())
    assert (launch.processes, launch.on_cpu, launch.sharded) == (2, True, False)
    assert not launch.names_port and not launch.bfloat16
    launch = read_launch(write(distributed_type="FSDP", fsdp_config=SHARDED, num_processes=8))
    assert (launch.processes, launch.on_cpu, launch.sharded) == (8, True, True)
    assert not read_launch(write(distributed_type="NO", num_processes=1)).sharded


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"distributed_type": "DEEPSPEED"}, "distributed_type must be one of NO, MULTI_GPU"),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type must be one of"),
        ({"distributed_type": "XLA"}, "distributed_type must be one of"),
        ({"distributed_type": "NO"}, "MULTI_GPU, MULTI_CPU or FSDP for 2 processes, got NO"),
        ({"deepspeed_config": {"zero_stage": 3}}, "deepspeed_config must be {} or left out"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment must be LOCAL_MACHINE"),
        ({"num_machines": 2}, "num_machines must be 1"),
        ({"num_processes": 0}, "num_processes must be a whole number >= 1, got 0"),
        ({"num_processes": True}, "num_processes must be a whole number >= 1, got true"),
        ({"tpu_use_cluster": True}, "tpu_use_cluster must be false or left out, got true"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be no or bf16, got fp16"),
        ({"use_cpu": False}, "use_cpu must be true with distributed_type MULTI_CPU, got false"),
        ({"num_proceses": 2}, "'num_proceses': did you mean num_processes"),
        ({"distributed_type": "FSDP"}, "fsdp_config must be a table"),
        ({"fsdp_config": SHARDED}, "fsdp_config must be a table of settings with distributed_type"),
        *(
            ({"distributed_type": "FSDP", "fsdp_config": SHARDED | changed}, told)
            for changed, told in (
                ({"fsdp_version": 1}, "fsdp_version must be 2 .*got 1"),
                ({"fsdp_offload_params": True}, "fsdp_offload_params must be false"),
                ({"fsdp_activation_checkpointing": True}, "give --model.gradient-checkpointing"),
                ({"fsdp_auto_wrap_policy": "NO_WRAP"}, "fsdp_auto_wrap_policy must be TRANSFORMER"),
                ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "checkpoints hold whole weights"),
                ({"fsdp_forward_prefetch": True}, "does not know, 'fsdp_forward_prefetch'"),
            )
        ),
    ],
)
def test_what_is_not_done_is_refused(write: Write, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_launch(write(**changed))


def test_what_accelerate_would_take_for_granted_must_be_said(write: Write) -> None:
    shorter = {key: value for key, value in SHARDED.items() if key != "fsdp_version"}
    with pytest.raises(UserError, match="fsdp_version must be 2 .*got nothing"):
        read_launch(write(distributed_type="FSDP", fsdp_config=shorter))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_launch(tmp_path / "nowhere.yaml")
    path = tmp_path / "config.yaml"
    for text, told in (("a: [", "is not YAML"), ("- 1", "it holds a list where keys")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            read_launch(path)


def test_methods_devices_and_precision_must_fit(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="sac trains in one process, and runtime.accelerate .* 2:"):
        launch_of(asking(write(), "sac"))
    with pytest.raises(UserError, match="archer trains in one process"):
        launch_of(asking(write(), "archer"))
    with pytest.raises(UserError, match="runtime.precision is float32, and .* bf16"):
        launch_of(asking(write(mixed_precision="bf16")))
    there = {"distributed_type": "MULTI_GPU", "use_cpu": False}
    with pytest.raises(UserError, match="runtime.device is cpu, and .* use_cpu false"):
        launch_of(asking(write(**there)))
    monkeypatch.setattr(load_method("genarm"), "shards", False)
    with pytest.raises(UserError, match="genarm needs whole weights in every process"):
        launch_of(asking(write(distributed_type="FSDP", fsdp_config=SHARDED), "genarm"))


def test_one_process_needs_no_launcher(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_of(asking(write(distributed_type="NO", num_processes=1))) is None
    assert launch_of(smoke("f_dpo")) is None
    path = write()
    assert launch_of(asking(path)) is not None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch_of(asking(path)) is None, "a process that was started starts no others"


def test_scripts_are_told_how_to_start(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 processes, which the command alone starts"):
        runner.run(asking(write()), directory=tmp_path / "run", display=False)
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_before_it_starts(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["run", "sac", "--runtime.accelerate", str(write()), "--runtime.device", "cpu"]
    assert run_command(line) == 2
    told = capsys.readouterr().err
    assert told.startswith("esscher: sac trains in one process") and told.count("\n") == 1


def test_the_file_is_named_by_its_whole_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.chdir(path.parent)
    assert asking(Path(path.name)).resolved().runtime.accelerate == str(path)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([2, 2], 2), ([130, 2], 2), ([130, 130], 130), ([130], 1), ([], 1)],
)
def test_one_status_for_all(statuses: list[int], status: int) -> None:
    """A process that left none has failed with a traceback, or was killed."""
    assert status_of(statuses, 2) == status


def test_more_processes_than_devices(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    experiment = asking(write(distributed_type="MULTI_GPU", use_cpu=False))
    experiment = replace(experiment, runtime=replace(experiment.runtime, device="cuda"))
    with pytest.raises(UserError, match="num_processes is 2, and this machine has 1 CUDA"):
        launch_of(experiment)
