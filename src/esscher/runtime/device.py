"""Where and how a run computes: device, threads, precision, and how update pieces are executed."""

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch

from esscher.errors import UserError, require
from esscher.nn.sharding import Sharding

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILE_PAYS_FROM = 20_000
"""Environment steps below which compiling (10 to 40 seconds) costs more than it saves."""

NARROW = 128
"""Width of layers up to which a second thread gains nothing."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How to compute. Everything here may change the last bits of a result, so it is recorded."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """Threads of one process; 0: one for layers up to 128 wide, else those available, at most 4. On
    a machine that others use too, 1 is safest: threads that wait for each other cost far more."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products in half the time; parameters and losses stay float32."""
    graph: Literal["auto", "eager", "compile"] = "auto"
    """How update pieces run; auto compiles runs of 20,000 steps or more where a compiler exists."""
    accelerate: str | None = None
    """A file that `accelerate config` wrote: the command starts the processes that it names, and they
    train together (see docs/large_models.md)."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"runtime.threads must be >= 0, got {self.threads}")

    def resolve(self, steps: int, width: int = 256) -> "RuntimeConfig":
        """Replace every `auto` by what this machine offers, so that a resumed run does the same.

        Args:
            steps: environment steps of the run.
            width: of the widest layer.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.device(device)
        except RuntimeError:
            raise UserError(
                f"runtime.device must be auto, cpu, cuda or cuda:NUMBER, got {device!r}"
            ) from None
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"runtime.device is {device}, but no CUDA device is available: use cpu")
        if self.precision == "bfloat16" and device == "cpu":
            warn_of_slow_bfloat16("runtime.precision")
        graph = self.graph
        if graph == "auto":
            pays = steps >= COMPILE_PAYS_FROM
            graph = "compile" if pays and compiler_available(device) else "eager"
        elif graph == "compile" and not compiler_available(device):
            warnings.warn(
                f"runtime.graph is compile, but {MISSING_COMPILER}: running eagerly", stacklevel=2
            )
            graph = "eager"
        threads = 1 if width <= NARROW else min(available_processors(), 4)
        return replace(self, device=device, threads=self.threads or threads, graph=graph)


class Shardable(Protocol):
    """A model whose weights can be divided among processes."""

    def shard(self, device: torch.device, sharding: Sharding) -> None: ...


def sharding_asked() -> Sharding | None:
    """What Accelerate's launcher has told this process of FSDP; None: weights stay whole.

    Raises:
        UserError: it is told of something that is not done here.
    """
    told = os.environ
    if told.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for name, permitted in (("FSDP_VERSION", "2"), ("FSDP_OFFLOAD_PARAMS", "false")):
        require(name, told.get(name), told.get(name, permitted) == permitted, permitted)
    names = told.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    return Sharding(
        blocks=tuple(name.strip() for name in names if name.strip()),
        reshard_after_forward=told.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true",
    )


class Runtime:
    """What a method may know of the machine: its device, and how to run its pieces fast."""

    def __init__(self, config: RuntimeConfig | None = None):
        config = (config or RuntimeConfig(device="cpu", graph="eager", threads=1)).resolve(0)
        self.config = config
        self.device = torch.device(config.device)
        self.rank, self.world = process_rank()
        self.sharding = sharding_asked() if self.world > 1 else None

    def share(self, batch_size: int, name: str = "batch_size") -> int:
        """How many rows of a batch are this process's.

        Args:
            batch_size: over all processes.
            name: of the setting that says so.

        Raises:
            UserError: the processes cannot share them equally.
        """
        told = f"a multiple of the {self.world} processes"
        require(name, batch_size, batch_size % self.world == 0, told)
        return batch_size // self.world

    def part(self, batch_size: int) -> slice:
        """Which rows of a batch are this process's: consecutive ones, in the order of ranks.

        Raises:
            UserError: the processes cannot share them equally.
        """
        own = self.share(batch_size)
        return slice(self.rank * own, (self.rank + 1) * own)

    def joined(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, equally many of each, in the order of ranks; without gradient."""
        if self.world == 1:
            return own
        kind = torch.int64 if own.dtype == torch.bool else own.dtype  # Truths have no sum.
        table = own.new_zeros((self.world, *own.shape), dtype=kind)
        table[self.rank] = own
        sum_over_processes([table])
        return table.flatten(0, 1).to(own.dtype)

    def most(self, count: int) -> int:
        """The largest of the counts that the processes have."""
        return int(self.joined(torch.tensor([count], device=self.device)).max())

    @property
    def reading_device(self) -> torch.device:
        """Where to read a model that `prepare` is to be called with: whole, it might not fit a GPU."""
        return self.device if self.sharding is None else torch.device("cpu")

    def prepare(self, *models: "Shardable") -> None:
        """Make models ready to be trained, or asked, by these processes together: once, when all copies
        of them are made and before an optimiser is. Sharded where that was asked for; else nothing.
        """
        if self.sharding is not None:
            for model in models:
                model.shard(self.device, self.sharding)

    def autocast(self, function: Function) -> Function:
        """Run a piece in the configured precision, always eager: for shapes that change."""
        if self.config.precision == "bfloat16":
            return _autocast(function, self.device.type)
        return function

    def graph(self, function: Function) -> Function:
        """Run a pure piece of an update as the configuration says: eager or compiled.

        The larger the piece the better: a whole update, with its gradients, optimiser steps and
        target moves, becomes one graph. It must have static shapes and no `.item()`; random numbers
        are drawn by torch's own generators in either mode, so both modes see the same noise.
        """
        function = self.autocast(function)
        if self.config.graph == "compile":
            function = _compile_or_fall_back(function)
        return function


def join_processes(device: str) -> None:
    """Join the processes that `accelerate launch` or torchrun has started beside this one, if any.

    Raises:
        UserError: accelerate is not installed.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or torch.distributed.is_initialized():
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise UserError('several processes need: pip install "esscher[language]"') from None
    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def process_rank() -> tuple[int, int]:
    """Which process this is, and how many train together (torch.distributed; alone: 0 of 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Add up each tensor over the processes that train together, in place."""
    if process_rank()[1] == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))


def available_processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


MISSING_COMPILER = "there is no compiler (a C++ compiler, g++ or clang++; on a GPU, Triton)"


def compiler_available(device: str) -> bool:
    """Whether torch.compile can produce code for the device here."""
    if device.startswith("cuda"):
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def warn_of_slow_bfloat16(setting: str) -> None:
    """Warn where the processor has no instructions for what a setting asks for."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        warnings.warn(
            f"{setting} is bfloat16 and this processor has no instructions for it: "
            "matrix products will take up to 100 times longer than with float32",
            stacklevel=3,
        )


def _autocast(function: Function, device_type: str) -> Function:
    @functools.wraps(function)
    def cast(*args: Any, **kwargs: Any) -> Any:
        # No cache: it would keep the weights of before an optimiser's step, and a graph whose
        # gradient was already taken, which the compiler cannot trace.
        with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
            return function(*args, **kwargs)

    return cast  # type: ignore[return-value]


def _compile_or_fall_back(function: Function) -> Function:
    import torch._dynamo.config
    from torch._dynamo.exc import BackendCompilerFailed

    # Without it (torch before 2.10) gradients are taken between compiled pieces, which is slower.
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):
        torch._dynamo.config.trace_autograd_ops = True

    compiled = torch.compile(function, dynamic=False, options={"fallback_random": True})
    state = {"checked": False, "call": compiled}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if state["checked"]:
            return state["call"](*args, **kwargs)
        try:
            result = compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"torch.compile failed, running eagerly instead: {reason}", stacklevel=2)
            state["call"] = function
            result = function(*args, **kwargs)
        state["checked"] = True
        return result

    return call  # type: ignore[return-value]
