"""One object between a loss and its parameters: gradient, clipping, fused step."""

# pyright: reportPrivateImportUsage=false
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.nn.sharding import is_sharded, own_part
from esscher.runtime.device import process_rank, sum_over_processes
from esscher.runtime.state import Stateful

Part = TypeVar("Part")


class Optim(Stateful):
    """Adam (AdamW with `weight_decay`) on a fixed list of parameters, whole or in shards.

    The update is torch's own fused kernel, called directly with one step counter for all parameters:
    the optimiser class around it spends more time in Python than the kernel does on networks of this
    library's control methods. Inside a compiled piece it is traced instead.

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
        self._sharded = any(is_sharded(p) for p in self._params)
        self.learning_rate = float(learning_rate)
        self.first_moment = [torch.zeros_like(p, requires_grad=False) for p in self._params]
        self.second_moment = [torch.zeros_like(p, requires_grad=False) for p in self._params]
        self.num_steps = torch.zeros((), device=self._params[0].device)

    def minimize(self, loss: Float[Tensor, ""]) -> None:
        """One step down the gradient of `loss`, which is taken for these parameters alone."""
        self.apply(self._gradients(loss))

    def minimize_mean(self, loss: Float[Tensor, ""]) -> None:
        """One step down the mean of the losses of all processes, each of which hands over its own."""
        self.minimize_sum(lambda share: loss * share, [1 / process_rank()[1]])

    def minimize_sum(
        self, loss: Callable[[Part], Float[Tensor, ""]], parts: Iterable[Part]
    ) -> None:
        """One step down the gradient of the sum of the losses of all parts, over all processes.

        The parts are micro-batches: of their activations only one part's are held at a time. The
        denominators in `loss` must be those of the whole batch; then it does not matter how it is cut.
        A process may have no parts.
        """
        total: list[Tensor] = []
        for part in parts:
            gradients = self._gradients(loss(part))
            if total:
                torch._foreach_add_(self._own(total), self._own(gradients))
            else:
                total = gradients
        total = total or [torch.zeros_like(p) for p in self._params]
        sum_over_processes([gradient for gradient in total if not is_sharded(gradient)])
        self.apply(total)

    def _gradients(self, loss: Float[Tensor, ""]) -> list[Tensor]:
        """Of these parameters alone; where those are sharded already added up over the processes."""
        if self._sharded:
            # The weights that a sharded model computed with are put together anew each time, and what
            # it hands their gradients over to are the parts of its own.
            loss.backward()
            gradients = [p.grad for p in self._params]
            for parameter in self._params:
                parameter.grad = None
        else:
            gradients = torch.autograd.grad(loss, self._params, allow_unused=True)
        pairs = zip(self._params, gradients, strict=True)
        return [torch.zeros_like(p) if g is None else g for p, g in pairs]

    @torch.no_grad()
    def apply(self, gradients: list[Tensor]) -> None:
        """One step against these gradients, one a parameter."""
        if self._max_grad_norm is not None:
            scale = (self._max_grad_norm / (self._norm(gradients) + 1e-6)).clamp(max=1.0)
            gradients = [gradient * scale for gradient in self._own(gradients)]
        self.num_steps.add_(1)
        if torch.compiler.is_compiling():
            self._traced_step(gradients)
        else:
            self._fused_step(gradients)

    def _norm(self, gradients: list[Tensor]) -> Float[Tensor, ""]:
        """Joint 2-norm of whole gradients."""
        norms = torch.stack(torch._foreach_norm(self._own(gradients)))
        if not self._sharded:
            return torch.linalg.vector_norm(norms)
        shared = torch.tensor([is_sharded(g) for g in gradients], device=norms.device)
        squares = norms.square()
        elsewhere = (squares * shared).sum()
        sum_over_processes([elsewhere])
        return (elsewhere + (squares * ~shared).sum()).sqrt()

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        """What this process holds of each."""
        return [own_part(tensor) for tensor in tensors] if self._sharded else tensors

    def _fused_step(self, gradients: list[Tensor]) -> None:
        torch.ops.aten._fused_adamw_(
            self._own(self._params),
            list(map(_laid_out_as, self._own(gradients), self._own(self.first_moment))),
            self._own(self.first_moment),
            self._own(self.second_moment),
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

    def _traced_step(self, gradients: list[Tensor]) -> None:
        """The same arithmetic in the open, for the compiler to fuse with what stands around it."""
        beta1, beta2 = self._betas
        t = self.num_steps
        step, root = self.learning_rate / (1 - beta1**t), (1 - beta2**t).rsqrt()
        # A scan is never inlined: else the powers would be computed anew for every element.
        nothing = torch.zeros_like(t)
        _, step, _, root = (
            torch.stack([nothing, step, nothing, root]).view(2, 2).cumsum(1).flatten()
        )
        torch._foreach_lerp_(self.first_moment, gradients, 1 - beta1)
        torch._foreach_mul_(self.second_moment, beta2)
        torch._foreach_addcmul_(self.second_moment, gradients, gradients, 1 - beta2)
        moments = zip(self._params, self.first_moment, self.second_moment, strict=True)
        for parameter, mean, square in moments:
            if self._weight_decay:
                parameter.mul_(1 - self.learning_rate * self._weight_decay)
            parameter.sub_(step * mean / (square.sqrt() * root + self._epsilon))


def _laid_out_as(gradient: Tensor, other: Tensor) -> Tensor:
    """With the strides of another tensor.

    Torch's fused kernel reads memory in order, and a convolution's gradient may have its channels last.
    """
    if gradient.stride() == other.stride():
        return gradient
    return torch.empty_like(other).copy_(gradient)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Target <- (1 - tau) target + tau source, in one fused call."""
    targets, sources = list(target.parameters()), list(source.parameters())
    if not torch.compiler.is_compiling():  # Shards are never compiled.
        targets, sources = map(own_part, targets), map(own_part, sources)
    torch._foreach_lerp_(list(targets), list(sources), tau)
