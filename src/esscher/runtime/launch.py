"""Several processes by one command: an Accelerate configuration file, read strictly, and the start of
the processes that it names.

The file is what `accelerate config` writes. What this library does not do as the file says is refused
before anything starts: a setting passed over in silence would be a run that nobody asked for.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esscher.adapters.imports import needed
from esscher.errors import UserError, nearest
from esscher.experiment import Experiment
from esscher.files import readable
from esscher.registry import load_method
from esscher.runtime.own_process import started

STATUS_FOLDER = "ESSCHER_STATUS_FOLDER"
"""Names, in the environment of a started process, the folder where it leaves its exit status."""

INTERRUPTED = 130

FIXED: Mapping[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "num_machines": (1,),
    "machine_rank": (0,),
    "main_training_function": ("main", None),
    "downcast_bf16": ("no", False),
    "tpu_env": ([], None),
    "tpu_use_cluster": (False,),
    "tpu_use_sudo": (False,),
    **dict.fromkeys(("tpu_name", "tpu_zone", "tpu_vm", "commands", "command_file"), (None, [])),
    **{
        f"{name}_config": ({}, None)
        for name in ("deepspeed", "megatron_lm", "mpirun", "fp8", "parallelism", "dynamo")
    },
}
"""Keys of which one value alone is what this library does; the first is what leaving it out means."""

PASSED_ON = (
    *("gpu_ids", "debug", "enable_cpu_affinity", "rdzv_backend", "same_network"),
    *("main_process_ip", "main_process_port"),
)
"""Keys that concern Accelerate's launcher alone."""

READ = ("distributed_type", "num_processes", "use_cpu", "mixed_precision", "fsdp_config")
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")

FSDP_FIXED: Mapping[str, tuple[Any, str]] = {
    "fsdp_version": (2, "weights are sharded by torch's fully_shard"),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "a model is sharded block by block"),
    "fsdp_offload_params": (False, "shards stay on the device that trains them"),
    "fsdp_cpu_ram_efficient_loading": (False, "every process reads the model itself"),
    "fsdp_activation_checkpointing": (False, "give --model.gradient-checkpointing instead"),
    "fsdp_state_dict_type": ("FULL_STATE_DICT", "checkpoints hold whole weights"),
}
"""Of Accelerate's settings of FSDP, what each must be, and why."""

FSDP_READ = ("fsdp_reshard_after_forward", "fsdp_transformer_layer_cls_to_wrap")
"""Settings of FSDP that are done as they say, by what Accelerate tells the processes."""

FSDP_STATED = ("fsdp_version", "fsdp_offload_params", "fsdp_cpu_ram_efficient_loading")
"""Settings that a file must name: what Accelerate takes where they are missing is something else."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What an Accelerate file says of a run."""

    path: Path
    processes: int
    on_cpu: bool
    sharded: bool
    """Whether each process holds its share of the weights alone."""
    bfloat16: bool
    """Whether the file asks for mixed precision."""
    names_port: bool
    """Whether it says by which port the processes find each other."""


def read_launch(source: str | Path) -> Launch:
    """An Accelerate file.

    Raises:
        UserError: no such file, not YAML, or something in it that this library does not do.
    """
    path = Path(source).expanduser()
    values = _read(path)
    _refuse_unknown(path, values, (*FIXED, *PASSED_ON, *READ))
    for key, permitted in FIXED.items():
        value = values.get(key, permitted[0])
        told = f"{_shown(permitted[0])} or left out"
        _demand(path, key, value, any(_same(value, one) for one in permitted), told)
    kind = values.get("distributed_type")
    # YAML makes false of a no without quotation marks.
    kind = "NO" if kind is False else _shown(kind)
    _demand(path, "distributed_type", kind, kind in KINDS, "one of " + ", ".join(KINDS))
    processes = values.get("num_processes", 1)
    whole = type(processes) is int and processes >= 1
    _demand(path, "num_processes", processes, whole, "a whole number >= 1")
    told = f"MULTI_GPU, MULTI_CPU or FSDP for {processes} processes"
    _demand(path, "distributed_type", kind, processes == 1 or kind != "NO", told)
    on_cpu = values.get("use_cpu", kind == "MULTI_CPU")
    fitting = {"MULTI_GPU": (False,), "MULTI_CPU": (True,)}.get(kind, (False, True))
    told = " or ".join(str(one).lower() for one in fitting) + f" with distributed_type {kind}"
    _demand(path, "use_cpu", on_cpu, any(_same(on_cpu, one) for one in fitting), told)
    precision = values.get("mixed_precision") or "no"
    _demand(path, "mixed_precision", precision, precision in ("no", "bf16"), "no or bf16")
    _check_sharding(path, kind, values.get("fsdp_config") or {})
    return Launch(
        path=path,
        processes=processes,
        on_cpu=on_cpu,
        sharded=kind == "FSDP" and processes > 1,
        bfloat16=precision == "bf16",
        names_port=values.get("main_process_port") is not None,
    )


def launch_of(experiment: Experiment) -> Launch | None:
    """The processes that still have to be started for a run: None where one is enough, or where this is
    one of them.

    Raises:
        UserError: the file cannot be used, or not for this method on this machine.
    """
    if experiment.runtime.accelerate is None or started():
        return None
    launch = read_launch(experiment.runtime.accelerate)
    check_launch(launch, experiment)
    return launch if launch.processes > 1 else None


def check_launch(launch: Launch, experiment: Experiment) -> None:
    """Raise where a run cannot be what the file says.

    Raises:
        UserError: the method trains in one process, or with whole weights; the precision or the
            device is another; there are fewer devices than processes.
    """
    method, runtime, where = load_method(experiment.slug), experiment.runtime, launch.path
    if launch.processes > 1 and not method.shares:
        raise UserError(
            f"{experiment.slug} trains in one process, and runtime.accelerate {where} names "
            f"{launch.processes}: leave it out, or use esscher sweep for many runs at once"
        )
    if launch.sharded and not method.shards:
        raise UserError(
            f"{experiment.slug} needs whole weights in every process, and runtime.accelerate {where} "
            "shards them (distributed_type FSDP): set MULTI_GPU or MULTI_CPU"
        )
    if launch.bfloat16 and runtime.precision != "bfloat16":
        raise UserError(
            f"runtime.precision is {runtime.precision}, and runtime.accelerate {where} has "
            "mixed_precision bf16: give --runtime.precision bfloat16, or set mixed_precision to no"
        )
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if launch.on_cpu != (device == "cpu"):
        wanted = "--runtime.device cpu" if launch.on_cpu else "--runtime.device cuda"
        raise UserError(
            f"runtime.device is {device}, and runtime.accelerate {where} has use_cpu "
            f"{str(launch.on_cpu).lower()}: give {wanted}, or change the file"
        )
    if launch.processes > 1 and device.startswith("cuda:"):
        raise UserError(
            f"runtime.device must be cuda with {launch.processes} processes, one a device, got {device}"
        )
    devices = torch.cuda.device_count()
    if not launch.on_cpu and launch.processes > devices:
        raise UserError(
            f"runtime.accelerate {where}: num_processes is {launch.processes}, and this machine has "
            f"{devices} CUDA devices: lower it"
        )


def refuse_unstarted(experiment: Experiment) -> None:
    """Raise in a process that ought to be one of several, and stands alone.

    Raises:
        UserError: only the command starts them.
    """
    launch = launch_of(experiment)
    if launch is not None:
        raise UserError(
            f"runtime.accelerate asks for {launch.processes} processes, which the command alone "
            "starts: use esscher run or esscher resume with it; or leave it out, and start your script "
            f"by accelerate launch --config_file {launch.path}"
        )


def start(launch: Launch, arguments: Sequence[str]) -> int:
    """Run a command line of this library in the processes that a file names, and wait for them.

    Accelerate's own launcher starts them, ends all when one fails, and passes on requests to stop.

    Args:
        launch: of the file.
        arguments: of the command, the verb first.

    Returns:
        The exit status of the command.
    """
    needed("accelerate", "runtime.accelerate", "language")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    line = ["--config_file", str(launch.path)]
    if not launch.sharded:
        line.append("--multi_gpu")  # Without it a file for processors starts one process alone.
    if not launch.names_port:
        line += ["--main_process_port", "0"]
    line += ["--module", "esscher.cli", *arguments]
    # Of a process that failed it tells more lines than the process itself, which has spoken.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STATUS_FOLDER] = folder
        try:
            launch_command(launch_command_parser().parse_args(line))
        except (ChildFailedError, SignalException):
            return _ended_with(Path(folder), launch.processes)
        finally:
            del os.environ[STATUS_FOLDER]
    return 0


def leave_status(status: int, said: str) -> None:
    """Tell the process that started this one how it ends, and what it has to say of it."""
    left = Path(os.environ[STATUS_FOLDER]) / os.environ["RANK"]
    left.write_text(json.dumps({"status": status, "said": said}), encoding="utf-8")


def _ended_with(folder: Path, processes: int) -> int:
    """Say what the processes have left to say, each thing once; the status of all together."""
    left = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir())]
    for said in dict.fromkeys(one["said"] for one in left if one["said"]):
        print(f"esscher: {said}", file=sys.stderr)
    return status_of([one["status"] for one in left], processes)


def status_of(statuses: Sequence[int], processes: int) -> int:
    """One status for all: the first complaint; interrupted where all were; else a defect.

    When a process fails the others are asked to stop, and say that they were interrupted.
    """
    complaints = [status for status in statuses if status not in (0, INTERRUPTED)]
    if complaints:
        return min(complaints)
    return INTERRUPTED if len(statuses) == processes else 1


def _read(path: Path) -> dict[str, Any]:
    yaml: Any = needed("yaml", "runtime.accelerate", "language")
    if not path.is_file():
        raise UserError(
            f"runtime.accelerate {path}: there is no such file (accelerate config --config_file {path} "
            "writes one)"
        )
    with readable(f"runtime.accelerate {path} is not YAML as accelerate config writes it"):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} where keys were expected")
        return {str(key): value for key, value in found.items()}


def _check_sharding(path: Path, kind: Any, config: Any) -> None:
    told = "a table of settings with distributed_type FSDP, and left out otherwise"
    fits = isinstance(config, dict) and (kind == "FSDP") == bool(config)
    _demand(path, "fsdp_config", config, fits, told)
    if kind != "FSDP":
        return
    _refuse_unknown(path, config, (*FSDP_FIXED, *FSDP_READ))
    for key, (permitted, why) in FSDP_FIXED.items():
        value = config.get(key, None if key in FSDP_STATED else permitted)
        _demand(path, key, value, _same(value, permitted), f"{_shown(permitted)} ({why})")
    reshard = config.get("fsdp_reshard_after_forward", True)
    _demand(path, "fsdp_reshard_after_forward", reshard, type(reshard) is bool, "true or false")
    blocks = config.get("fsdp_transformer_layer_cls_to_wrap", "")
    told = "names of classes, separated by commas"
    _demand(path, "fsdp_transformer_layer_cls_to_wrap", blocks, isinstance(blocks, str), told)


def _refuse_unknown(path: Path, values: Iterable[str], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(
                f"runtime.accelerate {path} has a key that this library does not know, {key!r}: "
                f"{nearest(key, known)}"
            )


def _demand(path: Path, key: str, value: Any, condition: bool, permitted: str) -> None:
    if not condition:
        raise UserError(
            f"runtime.accelerate {path}: {key} must be {permitted}, got {_shown(value)}"
        )


def _same(value: Any, other: Any) -> bool:
    """Equal and of one type: YAML's 1 is no true."""
    return type(value) is type(other) and value == other


def _shown(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else "nothing"
        if value is None
        else str(value)
    )
