"""Solves x + g(x) = z by iterating x <- z - g(x), and differentiates the solution; for invertible_residual.py."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.nn._log_det_series import vector_jacobian


class FixedPoint(NamedTuple):
    """What `InvertibleResidual.invert` found.

    Attributes:
        x: (B, ...), the last iterate of every sample, without a gradient.
        converged: bool (B,).
        iterations: int64 (B,), how often the sample was updated.
        error: (B,), the residual :math:`|x + g(x) - z|_\\infty / \\max(1, |z|_\\infty)` at x, computed, not estimated;
            what `converged` compares with the tolerance. Not finite where the iteration ran away.
    """

    x: Tensor
    converged: Tensor
    iterations: Tensor
    error: Tensor


def _largest(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the largest absolute element of every sample."""
    return x.abs().flatten(1).amax(1)


@torch.no_grad()
def solve(
    branch: Callable[[Tensor, Tensor | None], Tensor],
    z: Tensor,
    context: Tensor | None,
    tolerance: float,
    max_iterations: int,
) -> FixedPoint:
    """Iterates from x = z. A sample that has converged, or is no longer finite, is left as it is and takes no part."""
    x = z.clone()
    iterations = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    error = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    left = torch.arange(len(z) if z.numel() else 0, device=z.device)
    current, target = x, z
    k = 0
    while len(left):
        following = target - branch(current, context)
        residual = _largest(current - following) / _largest(target).clamp_min(1)
        going = (residual > tolerance) & residual.isfinite()
        if k == max_iterations or not going.all():
            done = ~going if k < max_iterations else torch.ones_like(going)
            x[left[done]], error[left[done]], iterations[left[done]] = current[done], residual[done], k
            left, target, following = left[~done], target[~done], following[~done]
            context = None if context is None else context[~done]
        current = following
        k += 1
    return FixedPoint(x, error <= tolerance, iterations, error)


class ImplicitGradient(torch.autograd.Function):
    r"""x, with the gradients that the implicit function theorem gives it.

    From :math:`x + g(x; \theta) = z`, :math:`dx = (I + J)^{-1} (dz - \partial_\theta g\, d\theta)`. So of
    :math:`y = z - g(x; \theta)` at a constant x the gradient is :math:`w = (I + J)^{-T} \bar x`, the fixed point of
    :math:`w \leftarrow \bar x - J^\top w`.
    """

    @staticmethod
    def forward(ctx, y, system):
        # g: (B, ...), with a graph that leads to x; the tolerance, relative to the gradient; the limit of iterations
        ctx.system = system
        return system[1].detach().clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError("InvertibleResidual: second derivatives of the inverse are not supported")
        g, x, tolerance, max_iterations = ctx.system
        scale = _largest(grad).clamp_min(torch.finfo(grad.dtype).tiny)
        w = grad
        for _ in range(max_iterations + 1):
            following = grad - vector_jacobian(g, x, w)
            error = (_largest(following - w) / scale).amax()
            w = following
            if not error > tolerance:
                break
        if not error <= tolerance:
            raise RuntimeError(
                f"InvertibleResidual: the gradient of the inverse did not converge in {max_iterations} iterations, "
                f"the error is {error.item():.1e} and the tolerance {tolerance:.1e}"
            )
        return w, None
