"""The full state of an environment as plain data, and back: no code is ever loaded.

Every layer (wrappers and the task itself) is walked attribute by attribute. Numbers, strings,
enumerations, arrays, generators and containers of them are saved, two names for one object as such;
spaces, specifications, checkers and renderers are not state and are skipped; MuJoCo's data is saved
in its own complete binary form, because quantities that rewards read (positions of bodies, say) lag
the integrated state. Anything else makes the environment inexact, and the reason is reported. An
environment may bring `get_state()` and `set_state(state)` on plain data instead, which is then all
that is saved of its innermost layer.
"""

import hashlib
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
from gymnasium.wrappers import PassiveEnvChecker

Snapshot = dict[str, Any]
"""Flat: dotted name -> tensor, or one JSON text for all that is not an array."""

SKIPPED_TYPES = (spaces.Space, EnvSpec, FunctionType, MethodType, ModuleType, type)
SKIPPED_NAMES = {"env", "metadata", "spec", "_cached_spec"}
RENDERERS = {"mujoco_renderer", "model", "renderer", "screen", "clock", "surf", "viewer"}
"""Skipped where they are not plain data: a task may also call its own state one of these."""


class Unsupported(Exception):
    """A part of an environment that plain data cannot hold."""


class SnapshotWrapper(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Outermost layer of every training environment: reads and writes the state of all below.

    Of `info` it lets through what the adapter reads: of the rest, vector environments would make arrays
    at every step.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]):
        super().__init__(env)
        self.unsupported_reason: str | None = unsupported(env)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        told = {"success": info["success"]} if "success" in info else {}
        return obs, reward, terminated, truncated, told

    @property
    def snapshot(self) -> Snapshot:
        return {} if self.unsupported_reason else take(self.env)

    @snapshot.setter
    def snapshot(self, snapshot: Snapshot) -> None:
        put(self.env, snapshot)


def unsupported(env: gymnasium.Env[Any, Any]) -> str | None:
    """Why `take` cannot capture this environment; None if it can. Tries two resets and a step."""
    model = _mujoco_models(env)
    env.reset(seed=0)
    env.action_space.seed(0)
    env.step(env.action_space.sample())
    try:
        take(env)
    except Unsupported as error:
        return str(error)
    env.reset(seed=1)
    if _mujoco_models(env) != model:
        return f"{type(env.unwrapped).__name__} changes its MuJoCo model"
    return None


def take(env: gymnasium.Env[Any, Any]) -> Snapshot:
    """The state of every layer.

    Raises:
        Unsupported: some attribute is not plain data.
    """
    encoder = _Encoder()
    plain: dict[str, Any] = {}
    for depth, layer in enumerate(_layers(env)):
        if isinstance(layer, PassiveEnvChecker):
            continue
        if hasattr(layer, "get_state") and hasattr(layer, "set_state") and not _is_mujoco(layer):
            attributes = {"get_state": layer.get_state()}
        else:
            attributes = {k: v for k, v in vars(layer).items() if k not in SKIPPED_NAMES}
        for name, value in attributes.items():
            key, where = f"{depth}.{name}", f"{type(layer).__name__}.{name}"
            if isinstance(value, SKIPPED_TYPES):
                continue
            if name == "data" and _is_mujoco(layer):
                for timer in value.timer:
                    timer.duration, timer.number = 0.0, 0  # A profile, different in every run.
                buffer = np.frombuffer(value.__getstate__(), np.uint8).copy()
                encoder.arrays[key] = torch.from_numpy(buffer)
            elif isinstance(value, Enum):
                plain[key] = ["enum", value.name]
            else:
                try:
                    plain[key] = encoder.encode(value, where, key)
                except Unsupported:
                    if name not in RENDERERS:
                        raise
    return {**encoder.arrays, "plain": json.dumps(plain)}


def put(env: gymnasium.Env[Any, Any], snapshot: Snapshot) -> None:
    """Write a state taken from an equal environment into this one."""
    plain = json.loads(snapshot["plain"])
    decoder = _Decoder(snapshot)
    for depth, layer in enumerate(_layers(env)):
        prefix = f"{depth}."
        for key, code in plain.items():
            if key.startswith(prefix):
                name = key[len(prefix) :]
                if isinstance(code, list) and code[0] == "enum":
                    kind: Any = type(getattr(layer, name))
                    setattr(layer, name, kind[code[1]])
                elif name == "get_state":
                    layer.set_state(decoder.decode(code, key))
                else:
                    setattr(layer, name, decoder.decode(code, key))
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
    import mujoco as library

    mujoco: Any = library
    source = mujoco.MjData.__new__(mujoco.MjData)
    source.__setstate__(buffer.numpy().tobytes())
    if hasattr(mujoco, "mj_copyData"):
        mujoco.mj_copyData(layer.data, layer.model, source)
    else:
        _copy_fields(layer.data, source)


def _copy_fields(target: Any, source: Any) -> None:
    """What mj_copyData does, where MuJoCo's Python does not offer it (3.3.0, say).

    Lists of contacts and constraints have no fixed size and stay behind; each step makes them anew.
    """
    target.time = source.time
    for name in dir(source):
        value = None if name.startswith("_") else getattr(source, name, None)
        if isinstance(value, np.ndarray):
            here = getattr(target, name)
            if here.shape == value.shape and here.flags.writeable:
                here[...] = value


def _mujoco_models(env: gymnasium.Env[Any, Any]) -> list[str]:
    models = [layer.model for layer in _layers(env) if _is_mujoco(layer)]
    return [hashlib.sha256(model.__getstate__()).hexdigest() for model in models]


class _Encoder:
    """Values to JSON; arrays go aside. Tagged lists mark what JSON has no form for."""

    def __init__(self) -> None:
        self.arrays: dict[str, torch.Tensor] = {}
        self.seen: dict[int, tuple[str, Any]] = {}
        """Identity -> first name and the object itself, which keeps its identity from reuse."""

    def encode(self, value: Any, where: str, key: str) -> Any:
        if isinstance(value, np.generic):
            return ["scalar", str(value.dtype), value.item()]
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.seen:
            return ["same", self.seen[id(value)][0]]
        self.seen[id(value)] = (key, value)
        if isinstance(value, np.ndarray):
            return self._array(value, where, key)
        if isinstance(value, np.random.Generator):
            return ["generator", self.encode(value.bit_generator.state, where, f"{key}.state")]
        if type(value) is dict:
            names = [_encode_name(name, where) for name in value]
            items = [self.encode(v, where, f"{key}.{k}") for k, v in enumerate(value.values())]
            return ["dict", names, items]
        if type(value) in (list, tuple, deque):
            items = [self.encode(v, where, f"{key}.{k}") for k, v in enumerate(value)]
            return [type(value).__name__, items, getattr(value, "maxlen", None)]
        raise Unsupported(
            f"{where} is a {type(value).__name__}, which cannot be saved as plain data"
        )

    def _array(self, value: np.ndarray[Any, Any], where: str, key: str) -> Any:
        if value.dtype.kind not in "fiub":
            raise Unsupported(f"{where} is an array of {value.dtype}, which cannot be saved")
        memory: Any = value
        while getattr(memory, "base", None) is not None:
            memory = memory.base
        if memory is not value and self.seen.setdefault(id(memory), (key, memory))[0] != key:
            raise Unsupported(f"{where} shares memory with another attribute")
        if type(memory).__name__ == "MjData":
            raise Unsupported(f"{where} is a view into MuJoCo's data")
        flat = np.ascontiguousarray(value).reshape(-1)
        self.arrays[key] = torch.from_numpy(flat.view(np.uint8).copy())
        return ["array", str(value.dtype), list(value.shape)]


class _Decoder:
    def __init__(self, snapshot: Snapshot):
        self.snapshot = snapshot
        self.made: dict[str, Any] = {}

    def decode(self, code: Any, key: str) -> Any:
        if not isinstance(code, list):
            return code
        if code[0] == "scalar":
            return np.dtype(code[1]).type(code[2])
        if code[0] == "same":
            return self.made[code[1]]
        self.made[key] = self._object(code, key)
        return self.made[key]

    def _object(self, code: list[Any], key: str) -> Any:
        kind = code[0]
        if kind == "array":
            return self.snapshot[key].numpy().view(code[1]).reshape(code[2]).copy()
        if kind == "generator":
            state = self.decode(code[1], f"{key}.state")
            generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
            generator.bit_generator.state = state
            return generator
        if kind == "dict":
            names = (tuple(name) if isinstance(name, list) else name for name in code[1])
            items = (self.decode(item, f"{key}.{k}") for k, item in enumerate(code[2]))
            return dict(zip(names, items, strict=True))
        values = [self.decode(item, f"{key}.{k}") for k, item in enumerate(code[1])]
        if kind == "deque":
            return deque(values, maxlen=code[2])
        return tuple(values) if kind == "tuple" else values


def _encode_name(name: Any, where: str) -> Any:
    plain = (bool, int, float, str, type(None))
    if type(name) in plain or (type(name) is tuple and all(type(part) in plain for part in name)):
        return name
    raise Unsupported(f"{where} has keys of type {type(name).__name__}, which cannot be saved")
