"""Rewards of what a diffusion model draws: users' functions, in this process, since gradients may be
asked of them.

A reward of samples is called as reward(images, rows): a tensor, one image (or whatever the model draws)
a row, and as many rows of the data. It returns one finite number an image; more is better. A reward of
sets has two methods instead: embed(images, rows), a vector an image, and of_set(embeddings), a number.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from esscher.adapters.imports import users_own
from esscher.errors import UserError

Rows = Sequence[Mapping[str, Any]]
SUSPECT = 50
"""Images (or sets of them) after which a reward that never changed is spoken of."""
TELLING = 1_000
"""Images (or sets of them) after which it is refused."""
NOTHING = "nothing can be learned from a reward that is constant"


class ImageReward:
    """A user's reward, with its answers checked.

    Args:
        source: module:function.
        kwargs: if there are any, or `source` is a class, it is called with these first and returns the
            reward.
        decode: denoised samples -> what the reward is shown.

    Raises:
        UserError: it cannot be imported or made.
    """

    def __init__(self, source: str, kwargs: Mapping[str, Any], decode: Callable[[Tensor], Tensor]):
        self.source, self._decode = source, decode
        self._function = users_own(source, "reward")
        if kwargs or isinstance(self._function, type):
            try:
                self._function = self._function(**kwargs)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"reward {source} cannot be made: {error!r} (it is given --image.reward-kwargs "
                    "NAME VALUE ...)"
                ) from error
        self.of_sets = hasattr(self._function, "of_set")
        self._seen, self._lowest, self._highest = 0, float("inf"), -float("inf")
        self._of, self._is_told = "images", False

    def __call__(self, x: Float[Tensor, "b *d"], rows: Rows) -> Float[Tensor, "b"]:
        """The reward of each sample, not yet decoded.

        Raises:
            UserError: it raised, its answer is not one finite number a sample, it has never changed,
                or it judges sets.
        """
        self.require_samples()
        answer = self._asked(self._function, x, rows)
        if answer.shape != (len(x),):
            raise UserError(
                f"reward {self.source} must return {len(x)} numbers, one an image, got shape "
                f"{tuple(answer.shape)}"
            )
        self._check_telling(answer, "images")
        return answer.to(x.dtype)

    def require_samples(self) -> None:
        """Raise where it judges sets."""
        if self.of_sets:
            raise UserError(
                f"reward {self.source} judges sets of samples, and here each sample is judged alone: "
                "use dragon, or a reward called with (images, rows)"
            )

    def embed(self, x: Float[Tensor, "b *d"], rows: Rows) -> Float[Tensor, "b e"]:
        """Of a reward of sets, what it looks at of each sample.

        Raises:
            UserError: it raised, its answer is not a finite vector a sample, or it judges samples.
        """
        if not self.of_sets:
            raise UserError(
                f"reward {self.source} judges samples one by one: a reward of sets has embed and of_set"
            )
        answer = self._asked(self._function.embed, x, rows)
        if answer.ndim != 2 or len(answer) != len(x):
            raise UserError(
                f"reward {self.source} must embed {len(x)} images as as many vectors, got shape "
                f"{tuple(answer.shape)}"
            )
        return answer

    def of_set(self, embedding: Float[Tensor, "n e"]) -> float:
        """Of a reward of sets, what these samples are worth together.

        Raises:
            UserError: it raised, its answer is not a finite number, or it has never changed.
        """
        answer = self._called(self._function.of_set, embedding)
        if answer.numel() != 1 or not bool(answer.isfinite().all()):
            raise UserError(
                f"reward {self.source} must return a finite number for a set, got {answer.tolist()}"
            )
        self._check_telling(answer.flatten(), "sets")
        return float(answer)

    def _asked(self, function: Callable[..., Any], x: Tensor, rows: Rows) -> Tensor:
        answer = self._called(function, self._decode(x), rows).to(x.device)
        bad = ~answer.isfinite().flatten(1 if answer.ndim > 1 else 0)
        if bool(bad.any()):
            raise UserError(
                f"reward {self.source} returned {answer[~answer.isfinite()][0].item()} for an image: "
                "what it returns must be finite"
            )
        return answer

    def _called(self, function: Callable[..., Any], *given: Any) -> Tensor:
        try:
            answer = function(*given)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward {self.source} failed: {error!r}") from error
        try:
            return torch.as_tensor(answer)
        except Exception as error:
            raise UserError(
                f"reward {self.source} must return a tensor or numbers, got {type(answer).__name__}"
            ) from error

    def _check_telling(self, answer: Tensor, of: str) -> None:
        before = self._seen
        self._seen += len(answer)
        self._lowest = min(self._lowest, float(answer.min()))
        self._highest = max(self._highest, float(answer.max()))
        self._of = of
        if self._seen >= TELLING and self._lowest == self._highest:
            raise UserError(f"{self._constant()}: {NOTHING}")
        if before < SUSPECT <= self._seen:
            self.warn_if_constant()

    def warn_if_constant(self) -> None:
        """Say once that it was the same for all of at least two images or sets so far, if it was."""
        if self._is_told or self._seen < 2 or self._lowest < self._highest:
            return
        self._is_told = True
        told = f"{self._constant()}: {NOTHING}, and it is refused after {TELLING:,} {self._of}"
        warnings.warn(told, stacklevel=2)

    def _constant(self) -> str:
        return f"reward {self.source} was {self._lowest:g} for all of the first {self._seen} {self._of}"
