"""cumax in plain PyTorch. The fused op is `pygen.ops.cumax`; the maths stands in its docstring."""

import torch
from torch import Tensor

from pygen.reference._dtypes import widen


def _suffix_sum(p: Tensor, dim: int) -> Tensor:
    """S_k = sum_{j >= k} p_j."""
    return p.flip(dim).cumsum(dim).flip(dim)


def _exclusive(inclusive_next: Tensor, zero: Tensor, dim: int, *, at_end: bool) -> Tensor:
    """Put `zero` where an exclusive sum is empty: behind the last element, or before the first."""
    parts = (inclusive_next, zero) if at_end else (zero, inclusive_next)
    return torch.cat(parts, dim)


def cumax(x: Tensor, dim: int = -1, complement: bool = False) -> Tensor:
    """cumsum(softmax(x)), or sum_{j > k} softmax(x)_j where `complement` asks for 1 - cumax."""
    if x.dim() == 0:
        return cumax(x.reshape(1), 0, complement).reshape(())
    p = widen(x).softmax(dim)
    if not complement:
        return p.cumsum(dim).to(x.dtype)
    n = x.size(dim)
    if n == 0:
        return p.to(x.dtype)
    # 0 * p keeps the NaN of a row that softmax cannot normalise.
    zero = p.narrow(dim, n - 1, 1) * 0
    return _exclusive(_suffix_sum(p.narrow(dim, 1, n - 1), dim), zero, dim, at_end=True).to(x.dtype)


def cumax_backward(grad: Tensor, x: Tensor, dim: int = -1, complement: bool = False) -> Tensor:
    """dx_j = p_j (G_j - sum_i p_i G_i), G_j = sum_{k >= j} g_k; the complement has G_j = sum_{k < j} g_k."""
    if x.dim() == 0:
        return cumax_backward(grad.reshape(1), x.reshape(1), 0, complement).reshape(())
    p = widen(x).softmax(dim)
    g = widen(grad)
    n = x.size(dim)
    if n == 0:
        return torch.zeros_like(x)
    if complement:
        zero = torch.zeros_like(g.narrow(dim, 0, 1))
        total = _exclusive(g.narrow(dim, 0, n - 1).cumsum(dim), zero, dim, at_end=False)
    else:
        total = _suffix_sum(g, dim)
    return (p * (total - (p * total).sum(dim, keepdim=True))).to(x.dtype)
