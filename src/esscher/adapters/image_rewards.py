"""Rewards of what a diffusion model draws: users' functions, in this process, since gradients may be
asked of them.

A reward is called as reward(images, rows): a tensor, one image (or whatever the model draws) a row, and
as many rows of the data. It returns one finite number an image; more is better.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.adapters.imports import users_own
from esscher.errors import UserError


class ImageReward:
    """A user's reward, with its answers checked.

    Args:
        source: module:function.
        decode: denoised samples -> what the reward is shown.

    Raises:
        UserError: it cannot be imported.
    """

    def __init__(self, source: str, decode: Callable[[Tensor], Tensor]):
        self.source, self._decode = source, decode
        self._function = users_own(source, "reward")

    def __call__(
        self, samples: Float[Tensor, "b *d"], rows: Sequence[Mapping[str, Any]]
    ) -> Float[Tensor, "b"]:
        """The reward of each sample, not yet decoded.

        Raises:
            UserError: it raised, or its answer is not one finite number a sample.
        """
        shown = self._decode(samples)
        try:
            answer = torch.as_tensor(self._function(shown, rows), device=samples.device)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {self.source} failed: {error!r}") from error
        if answer.shape != (len(samples),):
            raise UserError(
                f"reward {self.source} must return {len(samples)} numbers, one an image, got shape "
                f"{tuple(answer.shape)}"
            )
        bad = ~answer.isfinite()
        if bool(bad.any()):
            raise UserError(
                f"reward {self.source} returned {answer[bad][0].item()} for {int(bad.sum())} of "
                f"{len(samples)} images: it must be finite"
            )
        return answer.to(samples.dtype)

    def of(self, rows: Sequence[Mapping[str, Any]]) -> Callable[[Tensor], Tensor]:
        """The reward of samples of these rows, in this order; several of each follow each other."""

        def reward(samples: Tensor) -> Tensor:
            copies = len(samples) // len(rows)
            return self(samples, [row for row in rows for _ in range(copies)])

        return reward
