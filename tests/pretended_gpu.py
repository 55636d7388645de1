"""A GPU that is none: tensors that say they are on one, computed on the CPU.

They refuse what tensors on a GPU refuse: to be mixed with those on the CPU, to be read as an array, to
be drawn with the CPU's generator. So a machine without a GPU finds what would fail on one; what is
computed there, and how fast, only a GPU shows (test_cuda.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map_only

GPU = torch.device("cuda", 0)

MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.type_as}
MIXES = {
    torch.Tensor.copy_,
    torch.Tensor.__setitem__,
    torch.Tensor.data.__set__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.grad.__set__,  # pyright: ignore[reportAttributeAccessIssue]
}
"""What may have tensors of both kinds."""


class OnGpu(torch.Tensor):
    """Computed on the CPU all the same."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return GPU
        if func == torch.Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue]
            return True
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert a tensor on a GPU to numpy; use Tensor.cpu() first")
        if func in MOVES or kwargs.get("device") is not None:
            return moved(func, args, kwargs)
        refuse_mixed(func, args, kwargs)
        return tagged(func, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = retagged(self.detach().clone(), like=self)
        return memo[id(self)]


class GpuParameter(OnGpu, nn.Parameter):
    """A weight of a model that was moved there."""


def retagged(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    tensor = tensor.requires_grad_(like.requires_grad)
    tensor.__class__ = type(like)
    return tensor


def untagged(function: Any, args: Any, kwargs: Any) -> Any:
    """Called without tags on what it returns."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def tagged(function: Any, args: Any, kwargs: Any) -> Any:
    """Called; what it returns is on the GPU."""
    found = untagged(function, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return tree_map_only(
            torch.Tensor,
            lambda x: x if isinstance(x, OnGpu) else x.as_subclass(OnGpu),
            found,
        )


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def moved(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensor.to and what makes tensors: on the GPU or off it, as they are told."""
    if function not in MOVES:
        told = {k: v for k, v in kwargs.items() if k != "device"}
        if not is_gpu(kwargs["device"]):
            return untagged_as_plain(function, args, told)
        refuse_generator(function, told)
        return tagged(function, args, told)
    tensor, *rest = args
    device, dtype = None, kwargs.get("dtype")
    if function in (torch.Tensor.cpu, torch.Tensor.cuda):
        device = "cpu" if function == torch.Tensor.cpu else GPU
    for value in (*rest, kwargs.get("other"), kwargs.get("device")):
        if isinstance(value, torch.Tensor):
            device, dtype = (GPU if isinstance(value, OnGpu) else "cpu"), value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, str | torch.device):
            device = value
    there = isinstance(tensor, OnGpu) if device is None else is_gpu(device)
    with torch._C.DisableTorchFunctionSubclass():
        found = tensor.to(dtype) if dtype is not None else tensor
        if there != isinstance(tensor, OnGpu):
            if found.data_ptr() == tensor.data_ptr():
                found = found.clone()
            return found.as_subclass(OnGpu if there else torch.Tensor)
        return found.as_subclass(OnGpu) if there and not isinstance(found, OnGpu) else found


def untagged_as_plain(function: Any, args: Any, kwargs: Any) -> Any:
    found = untagged(function, args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return tree_map_only(torch.Tensor, lambda x: x.as_subclass(torch.Tensor), found)


def refuse_generator(function: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{name_of(function)}: expected a cuda generator, found one of the CPU")


def refuse_mixed(function: Any, args: Any, kwargs: Any) -> None:
    """As torch does: tensors without dimensions go anywhere, and so do indices on the CPU."""
    refuse_generator(function, kwargs)
    if function in MIXES:
        return
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        if function is torch.Tensor.__getitem__:
            if isinstance(args[0], OnGpu):
                return
            tensors = [args[0].new_zeros(1), *tensors]
        plain = [tuple(x.shape) for x in tensors if x.dim() and not isinstance(x, OnGpu)]
        there = [tuple(x.shape) for x in tensors if isinstance(x, OnGpu)]
    if plain and there:
        raise RuntimeError(
            f"{name_of(function)}: tensors on different devices: cuda:0 {there}, cpu {plain}"
        )


def name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or getattr(function, "__name__", repr(function))


class Pretending(TorchFunctionMode):
    """While entered, `device="cuda"` makes tensors that say so."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, OnGpu) for t in types):
            return OnGpu.__torch_function__(func, types, args, kwargs)
        if func in MOVES or is_gpu(kwargs.get("device")):
            return moved(func, args, kwargs)
        return func(*args, **kwargs)


def move_module(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to; weights stay the same objects."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None:
        plain_module_to(module, dtype)
    if device is None:
        return module
    there = is_gpu(device)
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                parameter.__class__ = GpuParameter if there else nn.Parameter
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    return module


plain_module_to = nn.Module.to


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`runtime.device` may be cuda while this is entered."""
    from esscher.runtime import device

    with monkeypatch.context() as patch:
        patch.setattr(device.torch.cuda, "is_available", lambda: True)
        patch.setattr(nn.Module, "to", move_module)
        with Pretending():
            yield
