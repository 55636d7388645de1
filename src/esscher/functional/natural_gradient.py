"""Natural gradients without the Fisher matrix: conjugate gradients, curvature products, line search.

Vectors are flattened parameters on the last axis. Leading axes are problems of their own (one policy
a time step, say), solved side by side: a function of the parameters `*s p` answers with one number a
problem, `*s`, and the number of a problem depends on its own parameters alone.

Nothing here looks at a value to decide what to compute, so all of it can be captured as one graph:
iterations are counted, and what a problem no longer needs is masked.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""Vectors `*s p` -> a symmetric matrix a problem, applied to them."""


def conjugate_gradient(
    product: Product, target: Float[Tensor, "*s p"], num_iterations: int
) -> Float[Tensor, "*s p"]:
    """Solve product(x) = target, approximately: best in the Krylov space of that many products.

    Starts from 0 and is exact, but for rounding, after as many iterations as the matrix has distinct
    eigenvalues. A problem stands still once its residual is 0, or along a direction in which the
    matrix is not positive.

    Source: Hestenes and Stiefel 1952.
    Gradient: none is meant to flow; call it on detached tensors.
    Raises: ValueError if num_iterations < 1.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    solution = torch.zeros_like(target)
    residual = direction = target
    square = _dot(residual, residual)
    for _ in range(num_iterations):
        applied = product(direction)
        length = _ratio(square, _dot(direction, applied))
        solution = solution + length * direction
        residual = residual - length * applied
        next_square = _dot(residual, residual)
        direction = residual + _ratio(next_square, square) * direction
        square = next_square
    return solution


def fisher_vector_product(
    divergence: Callable[[Tensor], Tensor],
    parameters: Float[Tensor, "*s p"],
    vector: Float[Tensor, "*s p"],
    damping: float = 0.0,
) -> Float[Tensor, "*s p"]:
    """(F + damping I) vector, by differentiating the divergence twice.

    `divergence` maps new parameters to the mean KL(old || new) of each problem, where the old
    distribution is a constant that equals the new one at `parameters`. There, its gradient is 0 and
    its Hessian is the Fisher matrix, exactly. It must be twice differentiable by autograd.

    Source: Schulman et al. 2015 (arXiv 1502.05477), appendix C.1.
    Gradient: none; the result is detached.
    Raises: ValueError if damping < 0.
    """
    if damping < 0:
        raise ValueError(f"damping must be >= 0, got {damping}")
    with torch.enable_grad():
        at = parameters.detach().requires_grad_()
        (slope,) = torch.autograd.grad(divergence(at).sum(), at, create_graph=True)
        (curved,) = torch.autograd.grad((slope * vector.detach()).sum(), at)
    return curved + damping * vector.detach()


def trust_region_step(
    product: Product,
    gradient: Float[Tensor, "*s p"],
    max_divergence: float,
    num_iterations: int,
) -> Float[Tensor, "*s p"]:
    """The step along F^-1 gradient whose quadratic divergence, x'Fx / 2, is max_divergence.

    0 where the gradient is 0. F is whatever `product` applies, its damping included.

    Source: Schulman et al. 2015 (arXiv 1502.05477), appendix C.
    Gradient: none is meant to flow.
    Raises: ValueError if max_divergence <= 0 or num_iterations < 1.
    """
    if not max_divergence > 0:
        raise ValueError(f"max_divergence must be > 0, got {max_divergence}")
    direction = conjugate_gradient(product, gradient, num_iterations)
    quadratic = 0.5 * _dot(direction, product(direction))
    return direction * _ratio(torch.full_like(quadratic, max_divergence), quadratic).sqrt()


def backtracking_line_search(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: Float[Tensor, "*s p"],
    step: Float[Tensor, "*s p"],
    gradient: Float[Tensor, "*s p"],
    max_divergence: float,
    *,
    num_backtracks: int = 10,
    shrink: float = 0.5,
    accept_ratio: float = 0.1,
) -> tuple[Float[Tensor, "*s p"], Float[Tensor, "*s"]]:
    """The first of parameters + shrink^k step, k < num_backtracks, that is good enough.

    `evaluate` gives the objective (to be raised) and the divergence from `parameters` of each
    problem. Good enough: the objective rises, by more than accept_ratio of what its gradient
    promises (shrink^k gradient'step), and the divergence is at most max_divergence. Returns the new
    parameters and the fraction of the step that was taken, 0 where none was good enough.

    Source: Schulman et al. 2015 (arXiv 1502.05477), appendix C.
    Gradient: none; the results are detached.
    Raises: ValueError if num_backtracks < 1, or shrink is outside (0, 1).
    """
    if num_backtracks < 1 or not 0 < shrink < 1:
        raise ValueError(
            f"need num_backtracks >= 1 and 0 < shrink < 1, got {num_backtracks} and {shrink}"
        )
    with torch.no_grad():
        before, _ = evaluate(parameters)
        promised = (gradient * step).sum(-1)
        taken = torch.zeros_like(before)
        for k in range(num_backtracks):
            fraction = shrink**k
            after, divergence = evaluate(parameters + fraction * step)
            rise = after - before
            good = (rise > 0) & (rise > accept_ratio * fraction * promised)
            good &= divergence <= max_divergence
            taken = torch.where((taken == 0) & good, fraction, taken)
        taken_step = torch.where((taken > 0).unsqueeze(-1), taken.unsqueeze(-1) * step, 0.0)
        return parameters + taken_step, taken


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Of each problem, with an axis of one to multiply vectors by."""
    return (left * right).sum(-1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where the denominator is not positive."""
    positive = below > 0
    return torch.where(positive, above / torch.where(positive, below, 1.0), 0.0)
