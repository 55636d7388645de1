"""Named, recursive state: everything that a run must remember, collected by attribute name."""

from typing import Any

import torch
from torch import Tensor, nn

from esscher.nn.sharding import placed_like

State = dict[str, Any]
"""Flat: dotted name -> tensor or JSON scalar."""

EXCLUDED = ("cfg", "spec", "runtime")
SCALARS = (bool, int, float, str, type(None))


class Stateful:
    """Collects modules, optimisers, tensors, counters and nested Stateful attributes by name.

    Attributes that start with an underscore, and `cfg`, `spec`, `runtime`, are excluded. Anything
    else that cannot be collected raises, so that no part of a learner is silently forgotten.
    """

    def state_dict(self) -> State:
        """Flat name -> tensor (sharing memory with the live state) or JSON scalar."""
        state: State = {}
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in EXCLUDED:
                _collect(value, f"{type(self).__name__}.{name}", name, state)
        return state

    def load_state_dict(self, state: State) -> None:
        """Copy a state into this object, in place.

        Raises:
            ValueError: names or shapes differ from this object's own.
        """
        check_names(self.state_dict(), state, type(self).__name__)
        for name, value in vars(self).items():
            if not name.startswith("_") and name not in EXCLUDED:
                setattr(self, name, _restore(value, name, state))


def under(prefix: str, state: State) -> State:
    """The part of a flat state that lies below a name, with the name cut off."""
    return {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(prefix + ".")}


def check_names(expected: State, found: State, owner: str) -> None:
    """Raise unless both states have the same names and the tensors the same shapes."""
    missing, surplus = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    if missing or surplus:
        raise ValueError(f"{owner}: state does not fit: missing {missing}, unexpected {surplus}")
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.shape != found[name].shape:
            raise ValueError(
                f"{owner}: {name} has shape {tuple(found[name].shape)}, need {tuple(value.shape)}"
            )


def _collect(value: Any, owner: str, name: str, state: State) -> None:
    if isinstance(value, (Tensor, *SCALARS)):
        state[name] = value.detach() if isinstance(value, Tensor) else value
    elif isinstance(value, nn.Module | Stateful):
        state.update({f"{name}.{key}": item for key, item in value.state_dict().items()})
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _collect(item, owner, f"{name}.{index}", state)
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, owner, f"{name}.{key}", state)
    else:
        raise TypeError(
            f"{owner} is a {type(value).__name__}, which no checkpoint can hold: make it a tensor, "
            "a module or Stateful, or start its name with an underscore if it is not state"
        )


def _restore(value: Any, name: str, state: State) -> Any:
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.copy_(placed_like(state[name], value))
        return value
    if isinstance(value, SCALARS):
        return state[name]
    if isinstance(value, nn.Module | Stateful):
        value.load_state_dict(under(name, state))
        return value
    if isinstance(value, dict):
        return {key: _restore(item, f"{name}.{key}", state) for key, item in value.items()}
    return type(value)(_restore(item, f"{name}.{index}", state) for index, item in enumerate(value))
