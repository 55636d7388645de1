"""Copies of a task as Ray actors, on this machine or on a cluster: for tasks that are slow to step.

They look like Gymnasium's vector environments that restart in the same step, and do the same from the
same seeds; where an actor runs changes nothing in what it returns.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esscher.errors import UserError

LOCAL = "local"


def join_ray(address: str | None) -> Any:
    """The ray module, joined to the cluster of this address; None or "local": one on this machine.

    Raises:
        UserError: Ray is not installed, or nothing answers at the address.
    """
    try:
        import ray
    except ImportError:
        raise UserError('working on Ray needs it installed: pip install "esscher[scale]"') from None
    if not ray.is_initialized():
        try:
            ray.init(
                address=None if address == LOCAL else address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            told = str(error).strip().splitlines()[0]
            raise UserError(f"no Ray cluster answers at {address}: {told}") from error
    return ray


class _Copy:
    """One environment, in an actor of its own."""

    def __init__(self, make: Callable[[], Any]):
        self._env = make()

    def spaces(self) -> tuple[Any, Any, dict[str, Any]]:
        metadata = {
            name: value
            for name, value in self._env.metadata.items()
            if isinstance(value, int | float | str | tuple)
        }
        return self._env.observation_space, self._env.action_space, metadata

    def reset(self, seed: int | None, options: Any) -> Any:
        return self._env.reset(seed=seed, options=options)[0]

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        """Ends with the last observation of an episode that is over, where the first of the next one
        stands before it.
        """
        obs, reward, terminated, truncated, _ = self._env.step(action)
        last = None
        if terminated or truncated:
            last, obs = obs, self._env.reset()[0]
        return obs, float(reward), bool(terminated), bool(truncated), last

    def get(self, name: str) -> Any:
        return self._env.get_wrapper_attr(name)

    def set(self, name: str, value: Any) -> None:
        setattr(self._env, name, value)

    def close(self) -> None:
        self._env.close()


class RayEnvironments:
    """As many actors as makers.

    Args:
        makers: of an environment each.
        address: of a Ray cluster, or local.

    Raises:
        UserError: no Ray, or no cluster at the address.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]], address: str):
        self._ray = join_ray(address)
        # Actors that wait for a slow task use little of a processor: there may be more of them.
        processors = self._ray.cluster_resources().get("CPU", 1.0)
        kind = self._ray.remote(num_cpus=min(1.0, processors / len(makers)))(_Copy)
        self._copies = [kind.remote(make) for make in makers]
        first = self._get([self._copies[0].spaces.remote()])[0]
        self.single_observation_space, self.single_action_space, self.metadata = first

    def reset(self, *, seed: Sequence[int], options: Any = None) -> tuple[NDArray[Any], dict]:
        pairs = zip(self._copies, seed, strict=True)
        return np.stack(self._get([copy.reset.remote(s, options) for copy, s in pairs])), {}

    def step(self, action: NDArray[Any]) -> tuple[Any, ...]:
        pairs = zip(self._copies, action, strict=True)
        found = self._get([copy.step.remote(one) for copy, one in pairs])
        obs, reward, terminated, truncated, last = zip(*found, strict=True)
        ends = np.array(terminated, bool), np.array(truncated, bool)
        return np.stack(obs), np.array(reward), *ends, {"final_obs": last}

    def get_attr(self, name: str) -> tuple[Any, ...]:
        return tuple(self._get([copy.get.remote(name) for copy in self._copies]))

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        pairs = zip(self._copies, values, strict=True)
        self._get([copy.set.remote(name, value) for copy, value in pairs])

    def close(self) -> None:
        for copy in self._copies:
            self._ray.kill(copy)
        self._copies = []

    def _get(self, references: Sequence[Any]) -> list[Any]:
        try:
            return self._ray.get(list(references))
        except self._ray.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except self._ray.exceptions.RayActorError as error:
            raise UserError(
                "an environment's actor died (its node, or its memory, is gone): esscher resume goes "
                "on from the last checkpoint"
            ) from error
