"""The full state of an environment as plain data, and back: no code is ever loaded.

Every layer (wrappers and the task itself) is walked attribute by attribute. Numbers, strings,
arrays, generators and containers of them are saved; spaces, specifications and renderers are not
state and are skipped; MuJoCo's data is saved in its own complete binary form, because quantities
that rewards read (positions of bodies, say) lag the integrated state. Anything else makes the
environment inexact, and the reason is reported. An environment may bring `get_state()` and
`set_state(state)` on plain data instead, which is then all that is saved of its innermost layer.
"""

import json
from collections import deque
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

Snapshot = dict[str, Any]
"""Flat: dotted name -> tensor, or one JSON text for all that is not an array."""

SKIPPED_TYPES = (spaces.Space, EnvSpec, FunctionType, MethodType, ModuleType, type, Enum)
SKIPPED_NAMES = {"env", "metadata", "spec", "mujoco_renderer", "model", "renderer", "screen", "clock"}
SKIPPED_NAMES |= {"_previous_data", "unsupported_reason", "_cached_spec", "surf", "np_random"}


class Unsupported(Exception):
    """A part of an environment that plain data cannot hold."""


class SnapshotWrapper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Outermost layer of every training environment: reads and writes the state of all below."""

    def __init__(self, env: gymnasium.Env[Any, Any]):
        super().__init__(env)
        self.unsupported_reason: str | None = unsupported(env)

    @property
    def snapshot(self) -> Snapshot:
        return {} if self.unsupported_reason else take(self.env)

    @snapshot.setter
    def snapshot(self, snapshot: Snapshot) -> None:
        put(self.env, snapshot)


def unsupported(env: gymnasium.Env[Any, Any]) -> str | None:
    """Why `take` cannot capture this environment, after a reset; None if it can."""
    env.reset(seed=0)
    try:
        take(env)
    except Unsupported as error:
        return str(error)
    return None


def take(env: gymnasium.Env[Any, Any]) -> Snapshot:
    """The state of every layer.

    Raises:
        Unsupported: some attribute is not plain data.
    """
    arrays: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for depth, layer in enumerate(_layers(env)):
        if hasattr(layer, "get_state") and hasattr(layer, "set_state") and not _is_mujoco(layer):
            attributes = {"get_state": layer.get_state()}
        else:
            attributes = {k: v for k, v in vars(layer).items() if k not in SKIPPED_NAMES}
        for name, value in attributes.items():
            if isinstance(value, SKIPPED_TYPES):
                continue
            where = f"{type(layer).__name__}.{name}"
            if name == "data" and _is_mujoco(layer):
                buffer = np.frombuffer(value.__getstate__(), np.uint8).copy()
                arrays[f"{depth}.{name}"] = torch.from_numpy(buffer)
            else:
                plain[f"{depth}.{name}"] = _encode(value, where, f"{depth}.{name}", arrays)
    return {**arrays, "plain": json.dumps(plain)}


def put(env: gymnasium.Env[Any, Any], snapshot: Snapshot) -> None:
    """Write a state taken from an equal environment into this one."""
    plain = json.loads(snapshot["plain"])
    for depth, layer in enumerate(_layers(env)):
        prefix = f"{depth}."
        for key, code in plain.items():
            if key.startswith(prefix):
                name = key[len(prefix) :]
                value = _decode(code, snapshot)
                if name == "get_state":
                    layer.set_state(value)
                else:
                    setattr(layer, name, value)
        if _is_mujoco(layer):
            _put_mujoco(layer, snapshot[f"{depth}.data"])


def _layers(env: gymnasium.Env[Any, Any]) -> list[Any]:
    layers: list[Any] = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _is_mujoco(layer: Any) -> bool:
    return type(getattr(layer, "data", None)).__name__ == "MjData"


def _put_mujoco(layer: Any, buffer: torch.Tensor) -> None:
    import mujoco

    source = mujoco.MjData.__new__(mujoco.MjData)
    source.__setstate__(buffer.numpy().tobytes())
    mujoco.mj_copyData(layer.data, layer.model, source)


def _encode(value: Any, where: str, key: str, arrays: dict[str, torch.Tensor]) -> Any:
    """A JSON value; arrays go aside under `key`. Tagged lists mark what JSON has no form for."""
    if isinstance(value, np.generic):
        return ["scalar", str(value.dtype), value.item()]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return _array(value, where, key, arrays)
    if isinstance(value, np.random.Generator):
        return ["generator", _encode(value.bit_generator.state, where, key, arrays)]
    if isinstance(value, dict):
        items = [[k, _encode(v, where, f"{key}.{k}", arrays)] for k, v in value.items()]
        return ["dict", items]
    if isinstance(value, list | tuple | deque):
        items = [_encode(v, where, f"{key}.{i}", arrays) for i, v in enumerate(value)]
        limit = value.maxlen if isinstance(value, deque) else None
        return [type(value).__name__ if type(value) in (list, tuple, deque) else "tuple", items, limit]
    raise Unsupported(f"{where} is a {type(value).__name__}, which cannot be saved as plain data")


def _array(
    value: np.ndarray[Any, Any], where: str, key: str, arrays: dict[str, torch.Tensor]
) -> Any:
    if value.dtype.kind not in "fiub":
        raise Unsupported(f"{where} is an array of {value.dtype}, which cannot be saved")
    contiguous = np.ascontiguousarray(value)
    arrays[key] = torch.from_numpy(contiguous.reshape(-1).view(np.uint8).copy())
    return ["array", key, str(value.dtype), list(value.shape)]


def _decode(code: Any, snapshot: Snapshot) -> Any:
    if not isinstance(code, list):
        return code
    kind = code[0]
    if kind == "scalar":
        return np.dtype(code[1]).type(code[2])
    if kind == "array":
        return snapshot[code[1]].numpy().view(code[2]).reshape(code[3]).copy()
    if kind == "generator":
        state = _decode(code[1], snapshot)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    if kind == "dict":
        return {_hashable(k): _decode(v, snapshot) for k, v in code[1]}
    items = [_decode(item, snapshot) for item in code[1]]
    if kind == "deque":
        return deque(items, maxlen=code[2])
    return tuple(items) if kind == "tuple" else items


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
