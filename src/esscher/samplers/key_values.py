"""Room in a key-value cache for the tokens to come.

The caches of transformers that grow by a token copy all keys and values each time; here they are
written into buffers that have room for more, and handed on as views of them.
"""

from typing import Any

import torch
from torch import Tensor

ROOM = 64
"""Tokens for which a buffer has room when it is made."""


def roomy(cache: Any) -> Any:
    """The same cache; layers that would copy themselves at every token do so no longer."""
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ == "DynamicLayer" and not isinstance(layer.update, _Appending):
            layer.update = _Appending(layer)
    return cache


class _Appending:
    """A layer's `update`, where keys and values ("b heads t d") are the beginnings of longer buffers.

    Not for what takes gradients: it writes in place.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keys and values with those of the new tokens behind them."""
        self.layer.keys = self._appended("keys", self.layer.keys, keys)
        self.layer.values = self._appended("values", self.layer.values, values)
        return self.layer.keys, self.layer.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        length = held.shape[-2]
        end = length + new.shape[-2]
        buffer = self._buffers.get(name)
        # Rows that were selected or repeated since are a new tensor, and no part of the buffer.
        if buffer is None or held.data_ptr() != buffer.data_ptr() or buffer.shape[-2] < end:
            shape = (*new.shape[:-2], end + ROOM, new.shape[-1])
            self._buffers[name] = buffer = torch.empty(shape, dtype=new.dtype, device=new.device)
            buffer[..., :length, :] = held
        buffer[..., length:end, :] = new
        return buffer[..., :end, :]
