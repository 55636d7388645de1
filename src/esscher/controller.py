"""A trained policy as its user wants it: observations in, actions of the environment out."""

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn

from esscher.distributions.policies import device_of
from esscher.distributions.remembering import Player, remembers
from esscher.errors import UserError
from esscher.types import Spec


class Controller(nn.Module):
    """Wraps a policy network with its task's observation shape and action box.

    `predict` has the signature that Stable-Baselines3's tools expect of a model.
    """

    low: Tensor
    high: Tensor

    def __init__(self, policy: nn.Module, spec: Spec):
        super().__init__()
        self.policy, self.spec = policy, spec
        self.register_buffer("low", torch.tensor(spec.action_low))
        self.register_buffer("high", torch.tensor(spec.action_high))

    @property
    def reset_options(self) -> dict[str, Any] | None:
        """What the policy wants an episode to begin with: env.reset(options=...). None: nothing."""
        return getattr(self.policy, "reset_options", None)

    def forward(
        self, obs: Float[Tensor, "b o"], deterministic: bool = True
    ) -> Shaped[Tensor, "b *a"]:
        """Actions in the environment's own units (or labels)."""
        distribution = self.policy(obs)
        return self.native(distribution.mode() if deterministic else distribution.sample())

    def native(self, action: Shaped[Tensor, "b *a"]) -> Shaped[Tensor, "b *a"]:
        """In the environment's own units (or labels), from [-1, 1] (or choices)."""
        if self.spec.num_actions is not None:
            return action + self.spec.action_start
        native = self.low + (action.clamp(-1, 1) + 1) * 0.5 * (self.high - self.low)
        return native.clamp(self.low, self.high)  # The sum may round to just outside.

    @torch.no_grad()
    def predict(
        self,
        observation: NDArray[Any],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], Any]:
        """The action for one observation, or one a row for a batch of them.

        Args:
            observation: of the environment's shape, with or without a leading batch axis.
            state: what a policy with a memory returned with the last action; None: every episode
                begins now. Returned as given by the other policies.
            episode_start: where an episode begins with this observation, one a row: those are
                forgotten. Without effect on policies without a memory.
            deterministic: the mode of the policy, else a sample; a policy with a memory draws then
                too, always the same.
        """
        observation = np.asarray(observation)
        batch_of_one = observation.ndim > 1 and len(observation) == 1
        single = observation.size == self.spec.obs_dim and not batch_of_one
        device = device_of(self)
        flat = observation.reshape(1 if single else len(observation), -1).astype(np.float32)
        if flat.shape[1] != self.spec.obs_dim:
            raise ValueError(
                f"observation must have {self.spec.obs_dim} numbers, got {observation.shape}"
            )
        has_memory = remembers(self.policy)
        held = state if has_memory else None
        if held is not None and len(held) != len(flat):
            raise ValueError(
                f"the state remembers {len(held)} episodes and there are {len(flat)} observations: "
                "start with state None"
            )
        started = None
        if episode_start is not None:
            started = torch.from_numpy(np.asarray(episode_start, bool).reshape(-1))
        player = Player(self.policy, explore=not deterministic, memory=held)
        action = self.native(player(torch.from_numpy(flat).to(device), started)).cpu().numpy()
        known = player.memory if has_memory else state
        return (action[0] if single else action), known

    def to_onnx(self, path: Path) -> None:
        """Write the deterministic policy as an ONNX graph: obs "b o" float32 -> action.

        Raises:
            ImportError: onnxscript is not installed (pip install "esscher[export]").
            UserError: the policy has a memory, which a graph of one step cannot hold.
        """
        if remembers(self.policy):
            raise UserError(
                "this policy remembers its episode and draws its actions, which an ONNX graph of one "
                "step cannot: use esscher.load(RUN).policy.predict with its state"
            )
        example = torch.zeros(2, self.spec.obs_dim)
        module = copy.deepcopy(self).cpu().eval()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # It misses torchvision, aloud.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._export(module, example, path)

    def _export(self, module: nn.Module, example: Tensor, path: Path) -> None:
        torch.onnx.export(
            module,
            (example,),
            str(path),
            input_names=["obs"],
            output_names=["action"],
            dynamic_shapes={"obs": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
