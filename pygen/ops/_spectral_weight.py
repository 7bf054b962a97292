"""A weight divided by its spectral norm, u and v brought up to date in place: what `pygen.nn.utils.spectral_norm` does
at every forward of a layer. The arithmetic is that of `pygen.ops.power_iteration`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from pygen.ops import _operator
from pygen.ops._operator import small_road
from pygen.ops.power_iteration import power_iteration, power_iteration_backward

_forward_small = small_road("spectral_weight")
_backward_small = small_road("spectral_weight_backward")

_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled


def compute(weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """(W / sigma, sigma with the new u and v behind it: what the gradient needs). Called without recording gradients.

    u and v are changed in place: whoever shares the buffers (DistributedDataParallel, replicas) knows them by their
    memory. The gradient has its own, so that several forwards may come before a backward.
    """
    found = _forward_small(weight, u, v, dim, n_iterations, eps)
    if found is not None:
        if n_iterations:
            increment_version((u, v))
        return found
    sigma, new_u, new_v, normalized = power_iteration(
        weight, u, v, n_iterations=n_iterations, eps=eps, dim=dim, u_first=True, return_weight=True
    )
    if n_iterations:
        u.copy_(new_u)
        v.copy_(new_v)
    return normalized, torch.cat((sigma.reshape(1), new_u, new_v))


def gradient(grad: Tensor, weight: Tensor, saved: Tensor, dim: int, eps: float) -> Tensor:
    """The weight's gradient from that of W / sigma."""
    if grad.layout is not torch.strided:  # of a sparse embedding
        grad = grad.to_dense()
    if not _grad_enabled():
        found = _backward_small(grad, weight, saved, dim, eps)
        if found is not None:
            return found
    rows = weight.shape[dim]
    sigma, u, v = saved[:1], saved[1 : 1 + rows], saved[1 + rows :]
    if _grad_enabled():
        # For a second derivative: sigma as a function of the weight, which the saved one is not.
        sigma = power_iteration(weight, u, v, n_iterations=0, eps=eps, dim=dim)[0].reshape(1)
    return power_iteration_backward(None, [grad], [weight], sigma, [u], [v], [dim], eps)[0]


class _SpectralWeight(torch.autograd.Function):
    """One tensor in, one out, and for small ones a C function in place of the dispatcher: a third of the time of
    `power_iteration`, whose four results torch has to wrap."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor, dim: int, n_iterations: int, eps: float) -> Tensor:
        normalized, saved = compute(weight, u, v, dim, n_iterations, eps)
        ctx.save_for_backward(weight, saved)
        ctx.options = dim, eps
        return normalized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return gradient(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


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
            return compute(weight, u, v, dim, n_iterations, eps)[0]
    _, new_u, new_v, normalized = power_iteration(
        weight, u, v, n_iterations=n_iterations, eps=eps, dim=dim, u_first=True, return_weight=True
    )
    if n_iterations:
        with torch.no_grad():
            u.copy_(new_u)
            v.copy_(new_v)
    return normalized
