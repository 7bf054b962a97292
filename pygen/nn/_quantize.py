"""Codes in the place of vectors: their values, the gradients that pass them, and the commitment loss, as one function.
vector_quantize.py calls it with what the search of _codebook.py found."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygen.nn._codebook_kmeans import UNIT_EPS, statistics_of_heads
from pygen.reference._dtypes import compute_dtype, widen


class Gradients(NamedTuple):
    """Where gradients go."""

    quantized: str  # of the codes: "rotation" or "straight" to x, "codebook", or "none"
    codebook_commits: bool  # of the commitment loss, besides to x


def quantize(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    distance: Tensor | None,
    mask: Tensor | None,
    gradients: Gradients,
    commitment: bool,
) -> tuple[Tensor, Tensor]:
    """x (H, N, D), codebook (H, K, D), indices (H, N) -> the chosen codes (H, N, D) in x's dtype, and the loss.

    The loss, a scalar, is the mean of (x - c)^2 over all elements where mask (H, N) is True; 0 if there are none, and
    unless `commitment`. `distance` (H, N) are the |x - c| if they are known. A masked row's code is 0, that of a row
    with index -1 is NaN.
    """
    return _Quantize.apply(x, codebook, indices, distance, mask, gradients, commitment)


class _Quantize(torch.autograd.Function):
    """A pass over x (N, D) each for the codes and their gradient: no matrix of rotations, no temporaries of a loss."""

    @staticmethod
    def forward(x, codebook, indices, distance, mask, gradients, commitment):
        heads, n, dim = x.shape
        codes = codebook.size(1)
        # Two more rows: what a vector without a code gets, and a masked one.
        table = torch.cat([codebook.to(x.dtype), x.new_full((heads, 1, dim), torch.nan), x.new_zeros(heads, 1, dim)], 1)
        rows = torch.where(indices < 0, codes, indices)
        if mask is not None:
            rows = torch.where(mask, rows, codes + 1)
        rows = rows + torch.arange(heads, device=x.device)[:, None] * (codes + 2)
        quantized = table.flatten(0, 1).index_select(0, rows.flatten()).view(heads, n, dim)
        if not commitment:
            return quantized, torch.zeros((), dtype=compute_dtype(x.dtype), device=x.device)
        squared = _difference(x, quantized).square().sum(-1) if distance is None else distance.square()
        if mask is not None:
            squared = torch.where(mask, squared, 0)
        return quantized, squared.sum() / _elements(x, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, codebook, indices, _, mask, ctx.gradients, ctx.commitment = inputs
        ctx.codes, ctx.codebook_dtype = codebook.size(1), codebook.dtype
        ctx.save_for_backward(x, output[0], indices, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("VectorQuantize: double backward (create_graph=True) is not supported")
        grad, grad_commitment = grads
        x, quantized, indices, mask = ctx.saved_tensors
        weight = 2 * grad_commitment / _elements(x, mask) if ctx.commitment else None
        by_x, by_codebook = ctx.needs_input_grad[:2]
        grad_x = grad_codebook = None
        # Autocast would take the products in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            if by_x:
                grad_x = _grad_x(grad, weight, x, quantized, ctx.gradients.quantized)
                if grad_x is not None and mask is not None:
                    grad_x = torch.where(mask[..., None], grad_x, 0)
            parts = [grad] if by_codebook and ctx.gradients.quantized == "codebook" else []
            if by_codebook and weight is not None and ctx.gradients.codebook_commits:
                parts.append(_difference(quantized, x) * weight)
            if parts:
                # Masked rows have index -1.
                _, sums = statistics_of_heads(sum(parts[1:], parts[0]), indices, ctx.codes)
                grad_codebook = sums.to(ctx.codebook_dtype)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return grad_x, grad_codebook, None, None, None, None, None


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """x - y, in float32 for 16-bit types."""
    return widen(x) - widen(y)


def _grad_x(grad: Tensor, weight: Tensor | None, x: Tensor, q: Tensor, route: str) -> Tensor | None:
    """The result's gradient by its route to x, and that of the loss, weight * (x - q)."""
    if route == "rotation":
        return _rotated_back(grad, weight, x, q)
    routed = grad if route == "straight" else None
    if weight is None:
        return routed
    difference = _difference(x, q)
    return difference * weight if routed is None else torch.addcmul(widen(routed), difference, weight)


def _elements(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Of how many elements the loss is the mean."""
    if mask is None:
        return max(1, x.numel())
    return (mask.sum() * x.size(-1)).clamp_min(1)


def _rotated_back(grad: Tensor, weight: Tensor | None, x: Tensor, q: Tensor) -> Tensor:
    r"""The transpose of the map that turns x into q, applied to the gradient, and weight * (x - q).

    With u = x/|x|, v = q/|q| and w = (u + v)/|u + v| the map is e -> (|q|/|x|) (e - 2 (e.w) w + 2 (e.u) v), a rotation
    and a scaling, all of which counts as constant. Its transpose needs three dot products a row, g.x, g.q and x.q; all
    else is one combination of g, x and q.
    """
    x, q, grad = (widen(t) for t in (x, q, grad))
    x_norm, q_norm = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, q))
    x_inverse, q_inverse = 1 / x_norm.clamp_min(UNIT_EPS), 1 / q_norm.clamp_min(UNIT_EPS)
    along_x, along_q = _dots(grad, x) * x_inverse, _dots(grad, q) * q_inverse
    cosine = _dots(x, q) * (x_inverse * q_inverse)
    unit_x, unit_q = x_norm * x_inverse, q_norm * q_inverse
    # |u + v|^2, where neither is of length 1 if it is a zero vector.
    between = (unit_x.square() + unit_q.square() + 2 * cosine).clamp_min(UNIT_EPS**2)
    scale = q_norm * x_inverse
    by_w = -2 * scale * (along_x + along_q) / between
    by_x, by_q = (by_w + 2 * scale * along_q) * x_inverse, by_w * q_inverse
    if weight is not None:
        by_x, by_q = by_x + weight, by_q - weight
    # In place: fresh memory is the dearest part of a pass.
    return (scale * grad).addcmul_(x, by_x).addcmul_(q, by_q)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, (H, N, D) -> (H, N, 1), without a product of N x D elements in between."""
    products = torch.bmm(a.reshape(-1, 1, a.size(-1)), b.reshape(-1, b.size(-1), 1))
    return products.view(*a.shape[:-1], 1)
