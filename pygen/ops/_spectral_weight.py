"""A weight divided by its spectral norm, u and v brought up to date in place: what `pygen.nn.utils.spectral_norm` does
at every forward of a layer. The arithmetic is that of `pygen.ops.power_iteration`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pygen.ops import _operator
from pygen.ops._operator import small_road
from pygen.ops.power_iteration import power_iteration, power_iteration_backward

_forward_small = small_road("spectral_weight")
_backward_small = small_road("spectral_weight_backward")

_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled


def _compute(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W / sigma, sigma (1,), u, v)."""
    found = _forward_small(weight, u, v, dim, n_iterations, eps)
    if found is None:
        sigma, new_u, new_v, normalized = power_iteration(
            weight, u, v, n_iterations=n_iterations, eps=eps, dim=dim, u_first=True, return_weight=True
        )
        found = normalized, sigma.reshape(1), new_u, new_v
    if n_iterations:
        # In place: whoever shares the buffers (DistributedDataParallel, replicas) knows them by their memory. The
        # gradient needs the new vectors, which nobody changes, so that several forwards may come before a backward.
        u.copy_(found[2])
        v.copy_(found[3])
    return found


class _SpectralWeight(torch.autograd.Function):
    """One tensor in, one out, and for small ones a C function in place of the dispatcher: a third of the time of
    `power_iteration`, whose four results torch has to wrap."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float) -> Tensor:
        normalized, *saved = _compute(weight, u, v, dim, n_iterations, eps)
        ctx.save_for_backward(weight, *saved)
        ctx.dim, ctx.eps = dim, eps
        return normalized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, sigma, u, v = ctx.saved_tensors
        if grad.layout is not torch.strided:  # of a sparse embedding
            grad = grad.to_dense()
        found = None
        if _grad_enabled():
            # For a second derivative: sigma as a function of the weight, which the saved one is not.
            sigma = power_iteration(weight, u, v, n_iterations=0, eps=ctx.eps, dim=ctx.dim)[0].reshape(1)
        else:
            found = _backward_small(grad, weight, sigma, u, v, ctx.dim, ctx.eps)
        if found is None:
            (found,) = power_iteration_backward(None, [grad], [weight], sigma, [u], [v], [ctx.dim], ctx.eps)
        return found, None, None, None, None, None


def spectral_weight(weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float) -> Tensor:
    """W / sigma after n_iterations steps, u before v; u and v, without a gradient, are changed in place.

    `power_iteration(weight, u, v, u_first=True, return_weight=True)` in a third of the time where weights are small.
    """
    # Under autocast the operator widens to float32: nothing to ask where the weight is that wide.
    if not (_is_compiling() or _operator._functorch_active() or forward_ad._current_level >= 0
            or (_operator._autocast_enabled() and weight.dtype not in (torch.float32, torch.float64))):  # fmt: skip
        if weight.requires_grad and _grad_enabled():
            return _SpectralWeight.apply(weight, u, v, dim, n_iterations, eps)
        with torch.no_grad():
            return _compute(weight, u, v, dim, n_iterations, eps)[0]
    _, new_u, new_v, normalized = power_iteration(
        weight, u, v, n_iterations=n_iterations, eps=eps, dim=dim, u_first=True, return_weight=True
    )
    if n_iterations:
        with torch.no_grad():
            u.copy_(new_u)
            v.copy_(new_v)
    return normalized
