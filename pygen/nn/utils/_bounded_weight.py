"""A weight whose spectral norm is held below a bound, W / max(1, sigma / bound): the short way for the CPU, beside
`pygen.ops._spectral_weights`, on which it stands, and the formula for everything else. Used by _spectral_norm.py."""

from typing import Any

import torch
from torch import Tensor

from pygen.ops._spectral_weights import compute, gradients, is_plain
from pygen.ops.power_iteration import power_iteration


def divided(weight: Tensor, scale: Tensor) -> Tensor:
    """W / max(1, scale) in W's dtype, exactly W where scale, of no dimensions, is at most 1."""
    return weight / scale.clamp_min(1)


def _value(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float, bound: float
) -> tuple[Tensor, Tensor | None]:
    """The bounded weight; and, only if sigma is above the bound, what the gradient needs."""
    (normalized,), (saved,) = compute([weight], [u], [v], [dim], n_iterations, eps)
    if saved[0].item() > bound:
        return normalized.mul_(bound), saved
    return normalized.copy_(weight), None


class _BoundedWeight(torch.autograd.Function):
    """On the CPU the value of sigma decides: above the bound it is that times W / sigma, below it the identity."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float, bound: float
    ) -> Tensor:
        result, saved = _value(weight, u, v, dim, n_iterations, eps, bound)
        if saved is not None:
            ctx.save_for_backward(weight, saved)
        ctx.dim, ctx.eps, ctx.bound = dim, eps, bound if saved is not None else None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if ctx.bound is None:
            return grad, None, None, None, None, None, None
        weight, saved = ctx.saved_tensors
        (found,) = gradients([grad * ctx.bound], [weight], [saved], [ctx.dim], ctx.eps)
        return found, None, None, None, None, None, None


def bounded_weight(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float, bound: float
) -> Tensor:
    """W / max(1, sigma / bound) after n_iterations steps, u before v; u and v are changed in place."""
    if weight.is_cpu and is_plain(weight.dtype):
        if weight.requires_grad and torch.is_grad_enabled():
            return _BoundedWeight.apply(weight, u, v, dim, n_iterations, eps, bound)
        with torch.no_grad():
            return _value(weight, u, v, dim, n_iterations, eps, bound)[0]
    # On a GPU, asking for sigma's value would make the CPU wait for it.
    sigma, new_u, new_v = power_iteration(weight, u, v, n_iterations=n_iterations, eps=eps, dim=dim, u_first=True)
    if n_iterations:
        with torch.no_grad():
            u.copy_(new_u)
            v.copy_(new_v)
    return divided(weight, sigma / bound)
