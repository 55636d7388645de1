"""Scaling of observations and actions by the statistics of the data that a policy learns from."""

from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.errors import UserError


class Scaling(nn.Module):
    """(x - shift) / scale by component, and back.

    range: the data's smallest value becomes -1 and the largest 1; standard: mean 0 and deviation 1;
    none: as it is, though bounds are taken. A component that never changes is left out of the scaling
    (it becomes 0), or refused where that is asked for.

    Args:
        size: number of components.
        how: see above.
        what: a name for messages.
        plain: components that stay as they are, whatever is done to the others (a gripper's, say).
    """

    shift: Tensor
    scale: Tensor
    """0 until the data were seen."""
    low: Tensor
    high: Tensor

    def __init__(
        self,
        size: int,
        how: Literal["range", "standard", "none"],
        what: str,
        plain: tuple[int, ...] = (),
    ):
        super().__init__()
        self.how, self.what, self.plain = how, what, list(plain)
        for name in ("shift", "scale", "low", "high"):
            self.register_buffer(name, torch.zeros(size))

    @classmethod
    def identity(cls, size: int, what: str) -> "Scaling":
        """None at all, for values that are as a network wants them; bounds are -1 and 1."""
        return cls(size, "none", what).as_is()

    def as_is(self) -> Self:
        """Change nothing until the data were seen; bounds are -1 and 1."""
        self.shift.zero_()
        self.scale.fill_(1.0)
        self.low.fill_(-1.0)
        self.high.fill_(1.0)
        return self

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "b d"], *, constant: Literal["keep", "refuse"]) -> None:
        """Take the statistics of the data.

        Raises:
            UserError: a component never changes, and that is to be refused.
        """
        low, high = values.amin(0), values.amax(0)
        still = low == high
        if constant == "refuse" and bool(still.any()):
            component = int(still.nonzero()[0, 0])
            raise UserError(
                f"{self.what} {component} has zero range in the data (it is always "
                f"{float(low[component]):g}), so it cannot be scaled or learned: take data in which it "
                "changes, or leave that component out of the task"
            )
        if self.how == "range":
            shift, scale = (low + high) / 2, (high - low) / 2
        elif self.how == "standard":
            shift, scale = values.mean(0), values.std(0, correction=0)
        else:
            shift, scale = torch.zeros_like(low), torch.ones_like(low)
        if self.how != "none":
            shift, scale = torch.where(still, low, shift), torch.where(still, 1.0, scale)
            shift[self.plain], scale[self.plain] = 0.0, 1.0
        for name, value in (("shift", shift), ("scale", scale), ("low", low), ("high", high)):
            getattr(self, name).copy_(value)

    def check(self) -> None:
        """Refuse to scale without statistics.

        Raises:
            UserError: no data were seen.
        """
        if not bool((self.scale > 0).all()):
            raise UserError(
                f"the statistics of {self.what} are missing: train on data first, or load a run"
            )

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """What the networks see."""
        return (x - self.shift) / self.scale

    def inverse(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        """In units of the data again, cut at their bounds."""
        return (x * self.scale + self.shift).clamp(self.low, self.high)
