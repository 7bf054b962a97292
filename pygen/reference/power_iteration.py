"""Power iteration and spectral normalisation in plain PyTorch. The fused op is `pygen.ops.power_iteration_multi`, whose
docstring has the maths."""

import torch
from torch import Tensor

from pygen.reference._dtypes import widen


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """Dimension `dim` in front, the others flattened behind it: (rows, columns)."""
    return weight.movedim(dim, 0).flatten(1)


def _normalized(product: Tensor, before: Tensor, eps: float) -> Tensor:
    """product / max(|product|, eps); what was there before, where the product is zero or not finite."""
    # Squares of the largest numbers overflow, those of the smallest vanish.
    product = product.double()
    largest = product.abs().max() if product.numel() else product.new_zeros(())
    norm = largest * (product / largest).norm()
    usable = (norm > 0) & (norm < torch.inf)
    return torch.where(usable, (product / norm.clamp_min(eps)).to(before.dtype), before)


@torch.no_grad()
def _iterate(
    matrix: Tensor, u: Tensor, v: Tensor, n_iterations: int, eps: float, u_first: bool
) -> tuple[Tensor, Tensor]:
    for _ in range(n_iterations):
        if u_first:
            u = _normalized(matrix @ v, u, eps)
        v = _normalized(matrix.T @ u, v, eps)
        if not u_first:
            u = _normalized(matrix @ v, u, eps)
    return u, v


def power_iteration(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    n_iterations: int,
    eps: float,
    u_first: bool,
    return_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """(sigma (L,), weights / sigma or nothing, us, vs); see `pygen.ops.power_iteration_multi`."""
    sigmas, normalized, new_us, new_vs = [], [], [], []
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        matrix = as_matrix(widen(weight), dim)
        wide_u, wide_v = _iterate(matrix, u.to(matrix.dtype), v.to(matrix.dtype), n_iterations, eps, u_first)
        sigma = wide_u @ (matrix @ wide_v)
        sigmas.append(sigma)
        new_us.append(wide_u.to(u.dtype, copy=True))
        new_vs.append(wide_v.to(v.dtype, copy=True))
        if return_weights:
            normalized.append((widen(weight) / divisor(sigma, eps)).to(weight.dtype).contiguous())
    return torch.stack(sigmas), normalized, new_us, new_vs


def divisor(sigma: Tensor, eps: float) -> Tensor:
    """What a weight is divided by: sigma, or eps where sigma is smaller than that."""
    return torch.where(sigma.abs() < eps, eps, sigma)


def power_iteration_backward(
    grad_sigma: Tensor | None,
    grads: list[Tensor],
    weights: list[Tensor],
    sigma: Tensor,
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    eps: float,
) -> list[Tensor]:
    """Gradients with respect to the weights: G / sigma + (g - <G, W> / sigma^2) u v^T.

    grads: of weights / sigma; an empty list, or an empty tensor for a weight, where there is none.
    """
    results = []
    for i, (weight, u, v, dim) in enumerate(zip(weights, us, vs, dims, strict=True)):
        matrix = as_matrix(widen(weight), dim)
        along = grad_sigma[i] if grad_sigma is not None else sigma.new_zeros(())
        result = torch.zeros_like(matrix)
        if grads and grads[i].numel():
            grad = as_matrix(widen(grads[i]), dim)
            s = divisor(sigma[i], eps)
            along = along - torch.where(sigma[i].abs() < eps, 0.0, (grad * (matrix / s)).sum() / s)
            result = grad / s
        result = result + along * torch.outer(u.to(matrix.dtype), v.to(matrix.dtype))
        rest = [weight.size(d) for d in range(weight.dim()) if d != dim % weight.dim()]
        result = result.unflatten(1, rest).movedim(0, dim)
        results.append(result.to(weight.dtype).contiguous())
    return results
