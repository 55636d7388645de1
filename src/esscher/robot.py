"""A trained policy of a robot that sees, as its user wants it: pictures and words in, actions out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from esscher.adapters.vision_language import instruction_tokens
from esscher.distributions.policies import device_of
from esscher.distributions.vision_language import VisionSpec
from esscher.errors import UserError
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Scenes


class Robot:
    """Chunks of actions in the task's own units.

    Args:
        policy: of a method, for scenes.
        spec: of the robot, with the model that it sees with.
    """

    def __init__(self, policy: Any, spec: VisionSpec):
        self.policy, self.spec = policy, spec

    @torch.no_grad()
    def act(
        self,
        images: Mapping[str, ArrayLike] | ArrayLike,
        state: ArrayLike,
        instruction: str,
        *,
        seed: int = 0,
    ) -> NDArray[np.float32]:
        """The actions to execute before looking again, one a row: (steps, actions).

        Args:
            images: of each camera by its name, rows x columns x 3 bytes; of one camera, that alone.
            state: of the robot, as in the demonstrations.
            instruction: what to do; another one than in the demonstrations is only more text.
            seed: decides the draw.

        Raises:
            UserError: a camera is missing, or an image, a state or an instruction is of another size
                or kind than the policy was trained on.
        """
        robot = self.spec.robot
        told = np.asarray(state, np.float32)
        if told.shape != (robot.state_dim,) or not np.isfinite(told).all():
            raise UserError(
                f"state must be {robot.state_dim} finite numbers, got the shape {told.shape}"
            )
        tokens = instruction_tokens(
            self.spec.tokenizer, (instruction,), self.spec.model.context_length
        )
        scenes = Scenes(
            images=torch.from_numpy(self._pictures(images)).unsqueeze(0),
            state=torch.from_numpy(told).unsqueeze(0),
            instruction=tokens[0],
            instruction_mask=tokens[1],
        )
        self.policy.eval()
        with torch.random.fork_rng():
            seed_phase(seed, 0, Phase.EVALUATE)
            chunk = self.policy.chunk(scenes.to(device_of(self.policy)))[0, : self.policy.executed]
        return robot.native(chunk.cpu().numpy())

    def _pictures(self, images: Mapping[str, ArrayLike] | ArrayLike) -> NDArray[np.uint8]:
        robot = self.spec.robot
        if not isinstance(images, Mapping):
            if len(robot.cameras) > 1:
                raise UserError(f"images must name the cameras {', '.join(robot.cameras)}")
            images = dict.fromkeys(robot.cameras, images)
        wanted, found = (*robot.image_size, 3), []
        for camera in robot.cameras:
            if camera not in images:
                raise UserError(f"there is no image of the camera {camera}")
            picture = np.asarray(images[camera])
            if picture.dtype != np.uint8 or picture.shape != wanted:
                raise UserError(
                    f"an image of the camera {camera} must be {'x'.join(map(str, wanted))} bytes "
                    f"(uint8), got {'x'.join(map(str, picture.shape))} of {picture.dtype}"
                )
            found.append(picture)
        return np.stack(found)
