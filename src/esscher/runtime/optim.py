"""One object between a loss and its parameters: backward, clipping, fused step."""

# pyright: reportPrivateImportUsage=false
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.runtime.state import Stateful


class Optim(Stateful):
    """Adam (AdamW with `weight_decay`) on a fixed list of parameters.

    The update is torch's own fused kernel, called directly with one step counter for all parameters:
    the optimiser class around it spends more time in Python than the kernel does on networks of this
    library's control methods.

    Args:
        params: parameters that this optimiser, and no other, moves.
        learning_rate: step size.
        betas: decay of the first and second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled (AdamW), per unit learning rate.
        max_grad_norm: clip the joint 2-norm of the gradients to this; None leaves them.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        learning_rate: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ):
        self._params = list(params)
        if not self._params:
            raise ValueError("Optim: no parameters given")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self._betas, self._epsilon, self._weight_decay = betas, epsilon, weight_decay
        self._max_grad_norm = max_grad_norm
        self.learning_rate = float(learning_rate)
        self.first_moment = [torch.zeros_like(p, requires_grad=False) for p in self._params]
        self.second_moment = [torch.zeros_like(p, requires_grad=False) for p in self._params]
        self.num_steps = torch.zeros((), device=self._params[0].device)

    def minimize(self, loss: Float[Tensor, ""]) -> None:
        """One step down the gradient of `loss`; no other parameter receives a gradient."""
        for parameter in self._params:
            parameter.grad = None
        loss.backward(inputs=self._params)
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._params]
        if self._max_grad_norm is not None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        with torch.no_grad():
            self.num_steps += 1
            torch.ops.aten._fused_adamw_(
                self._params,
                gradients,
                self.first_moment,
                self.second_moment,
                [],
                [self.num_steps] * len(self._params),
                lr=self.learning_rate,
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=self._weight_decay,
                eps=self._epsilon,
                amsgrad=False,
                maximize=False,
            )


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Target <- (1 - tau) target + tau source, in one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, gradients flow through these modules but not into their parameters."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
