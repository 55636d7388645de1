"""Weights in shards: each of several processes holds a part of every tensor of a model (torch's
fully_shard), block after block is put together while it computes, and gradients come back added up.

All processes have to ask a sharded model equally often, since all of them give their part.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from esscher.errors import UserError

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How weights are divided among processes."""

    blocks: tuple[str, ...] = ()
    """Names of the classes that are put together one after the other; empty: the model says it."""
    reshard_after_forward: bool = True
    """Give a block's weights back between its forward and its backward pass."""


def shard(
    module: nn.Module,
    network: nn.Module,
    device: torch.device,
    sharding: Sharding,
    blocks: Sequence[str] | None = None,
) -> None:
    """Leave each process its part of every parameter, in place; nothing if that is done already.

    Gradients are added up over the processes, not averaged: losses divide by the denominator of the
    whole batch.

    Args:
        module: asked through `put_together` from now on.
        network: the model in it that has the blocks, by which it is named.
        device: where the parts are kept; the module may still lie elsewhere.
        sharding: how.
        blocks: classes of blocks where `sharding` names none; None: those that the network names, as
            models of transformers do.

    Raises:
        UserError: the module has no such block.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if _is_put_together(module):
        return
    mesh, again = _mesh(device.type), sharding.reshard_after_forward
    named = getattr(network, "_no_split_modules", None) if blocks is None else blocks
    blocks = tuple(sharding.blocks or named or ())
    found = [part for part in module.modules() if type(part).__name__ in blocks]
    if not found:
        raise UserError(
            f"{type(network).__name__} cannot be sharded block by block: no module is one of "
            f"{', '.join(blocks) or 'any class that it names'}; name the class of its blocks in the "
            "Accelerate file (fsdp_transformer_layer_cls_to_wrap)"
        )
    for block in reversed(found):  # What lies within another first.
        fully_shard(block, mesh=mesh, reshard_after_forward=again)
    fully_shard(module, mesh=mesh, reshard_after_forward=again)
    for part in _parts(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # Gloo knows no other.
    sharded: Any = module
    sharded._put_together, sharded._gives_back = _asked, again
    register_fsdp_forward_method(module, "_put_together")


def put_together(module: Any, piece: Callable[..., Answer], *args: Any) -> Answer:
    """What a piece that reads a module's weights answers, with those that lie in shards put together.

    Args:
        module: perhaps sharded.
        piece: asks the module or parts of it.
        args: of the piece.
    """
    if _is_put_together(module):
        return module._put_together(piece, *args)
    return piece(*args)


@contextmanager
def held_whole(module: Any) -> Iterator[None]:
    """Every process holds all weights for as long as this lasts, and may ask as often as it likes."""
    if not _is_put_together(module):
        yield
        return
    parts = _parts(module)
    module._get_fsdp_state()._lazy_init()  # Else the first forward pass would do it.
    module.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(module._gives_back, recurse=False)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone."""
    # Torch loads what it shards by only when it is asked for, which takes a while; then there is some.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # pyright: ignore


def placed_like(value: Tensor, own: Tensor) -> Tensor:
    """A tensor that every process has whole, with the part of it that this process is to hold."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    whole, place = value.to(own.device), cast(Any, own)
    return distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None)


def whole_on_cpu(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """A state with the parts of all processes put together, one tensor after the other.

    Args:
        state: of a model, an optimiser or a run; the same names in the same order in all processes.
        keep: whether this process wants it; the others only give their parts, and get nothing.
    """
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and is_sharded(value):
            whole = cast(Any, value).full_tensor()
            value = whole.cpu() if keep else None
        if keep:
            found[name] = value
    return found


def _is_put_together(module: nn.Module) -> bool:
    return hasattr(module, "_put_together")


def _parts(module: nn.Module) -> list[Any]:
    """All that is put together by itself, the module too."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _asked(piece: Callable[..., Any], *args: Any) -> Any:
    return piece(*args)


@cache
def _mesh(device_type: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (torch.distributed.get_world_size(),))
