"""Weights divided by their spectral norms, u and v brought up to date in place, as `pygen.nn.utils.spectral_norm` does
at every forward. The arithmetic is that of `pygen.ops.power_iteration_multi`, u before v."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from pygen.ops import _operator
from pygen.ops._operator import small_road
from pygen.ops.power_iteration import power_iteration_backward, power_iteration_multi

# For tensors of any size: what is short is the way from Python and back.
_forward = small_road("spectral_weights")
_backward = small_road("spectral_weights_backward")

_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_WIDE = (torch.float32, torch.float64)


def is_plain(dtype: torch.dtype) -> bool:
    """Whether nobody transforms the computation. Under autocast the operator widens: nothing to ask where dtype is
    wide."""
    return not (
        _is_compiling()
        or _operator._functorch_active()
        or forward_ad._current_level >= 0
        or (_operator._autocast_enabled() and dtype not in _WIDE)
    )


def compute(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], n_iterations: int, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(W / sigma, what the gradient needs: sigma with the new u and v behind it), for every weight. Called without
    recording gradients.

    u and v are changed in place: whoever shares the buffers (DistributedDataParallel, replicas) knows them by their
    memory. The gradient has its own, so that several forwards may come before a backward.
    """
    found = _forward(weights, us, vs, dims, n_iterations, eps)
    if found is not None:
        if n_iterations:
            increment_version(us)
            increment_version(vs)
        return found[: len(weights)], found[len(weights) :]
    sigma, new_us, new_vs, normalized = power_iteration_multi(
        weights, us, vs, n_iterations=n_iterations, eps=eps, dims=dims, u_first=True, return_weights=True
    )
    if n_iterations:
        torch._foreach_copy_(us + vs, new_us + new_vs)
    return normalized, [torch.cat((s, u, v)) for s, u, v in zip(sigma.split(1), new_us, new_vs, strict=True)]


def gradients(
    grads: Sequence[Tensor | None], weights: Sequence[Tensor], saved: Sequence[Tensor], dims: list[int], eps: float
) -> list[Tensor | None]:
    """The weights' gradients from those of W / sigma; None where there is none."""
    found: list[Tensor | None] = [None] * len(weights)
    if len(weights) == 1 and grads[0] is not None and not _grad_enabled():  # the same as below, in half the time
        results = _backward(list(grads), list(weights), list(saved), dims, eps)
        if results is not None:
            return results
    asked = [i for i, g in enumerate(grads) if g is not None]
    if not asked:
        return found
    # A sparse embedding's gradient is sparse.
    given = [g if g.layout is torch.strided else g.to_dense() for g in grads if g is not None]
    weights, saved, dims = ([values[i] for i in asked] for values in (weights, saved, dims))  # type: ignore[assignment]
    results = None if _grad_enabled() else _backward(given, weights, saved, dims, eps)
    if results is None:
        rows = [w.shape[dim] for w, dim in zip(weights, dims, strict=True)]
        us = [x[1 : 1 + n] for x, n in zip(saved, rows, strict=True)]
        vs = [x[1 + n :] for x, n in zip(saved, rows, strict=True)]
        if _grad_enabled():
            # For a second derivative: sigma as a function of the weight, which the saved one is not.
            sigma = power_iteration_multi(weights, us, vs, n_iterations=0, eps=eps, dims=dims)[0]
        else:
            sigma = torch.cat([x[:1] for x in saved])
        results = power_iteration_backward(None, given, list(weights), sigma, us, vs, dims, eps)
    for i, result in zip(asked, results, strict=True):
        found[i] = result
    return found


class _SpectralWeights(torch.autograd.Function):
    """Weights in, as many out, and on the CPU a C function in place of the dispatcher: a small weight takes a third of
    the time that it takes by `power_iteration`, whose four results torch has to wrap."""

    @staticmethod
    def forward(ctx: Any, us: list[Tensor], vs: list[Tensor], options: tuple, *weights: Tensor) -> Any:
        normalized, saved = compute(list(weights), us, vs, *options)
        ctx.save_for_backward(*weights, *saved)
        ctx.set_materialize_grads(False)
        ctx.dims, _, ctx.eps = options
        return tuple(normalized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        tensors, n = ctx.saved_tensors, len(grads)
        return None, None, None, *gradients(grads, tensors[:n], tensors[n:], ctx.dims, ctx.eps)


def spectral_weights(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], n_iterations: int, eps: float
) -> Sequence[Tensor]:
    """W / sigma of every weight after n_iterations steps, u before v; us and vs, without gradients, are changed in
    place. All weights have one dtype and device.

    `power_iteration_multi(weights, us, vs, u_first=True, return_weights=True)`, with less on the way.
    """
    if is_plain(weights[0].dtype) and weights[0].is_cpu:
        if _grad_enabled() and any([w.requires_grad for w in weights]):
            return _SpectralWeights.apply(us, vs, (dims, n_iterations, eps), *weights)
        with torch.no_grad():
            return compute(weights, us, vs, dims, n_iterations, eps)[0]
    _, new_us, new_vs, normalized = power_iteration_multi(
        weights, us, vs, n_iterations=n_iterations, eps=eps, dims=dims, u_first=True, return_weights=True
    )
    if n_iterations:
        copy_all(us + vs, new_us + new_vs)
    return normalized


@torch.no_grad()
def copy_all(buffers: list[Tensor], values: list[Tensor]) -> None:
    if _operator._functorch_active():  # has no rule for _foreach_copy_
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
    else:
        torch._foreach_copy_(buffers, values)
