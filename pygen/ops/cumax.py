"""cumax, the cumulative softmax. Kernels: csrc/cumax.cpp (CPU), triton_kernels/cumax.py (GPU)."""

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, derivative_through_reference, operator, small_road


def _like(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, x, dim, complement):
    return _like(x)


def _save(ctx, inputs, output):
    x, ctx.dim, ctx.complement = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return _cumax_backward(grad, x, ctx.dim, ctx.complement), None, None


def _batched_dim(x: Tensor, batch_dim: int, dim: int) -> tuple[Tensor, int]:
    """Bring vmap's dimension to the front and count `dim` from the back, where it does not move."""
    rank = max(x.dim() - 1, 1)
    if not -rank <= dim < rank:
        raise IndexError(f"cumax: dim must be in [{-rank}, {rank - 1}], got {dim}")
    x = x.movedim(batch_dim, 0)
    # A row of one element under vmap (a scalar per sample) is a (B, 1) matrix here.
    return (x.unsqueeze(-1), -1) if x.dim() == 1 else (x, dim if dim < 0 else dim + 1)


def _vmap(info, in_dims, x, dim, complement):
    moved, moved_dim = _batched_dim(x, in_dims[0], dim)
    return _cumax(moved, moved_dim, complement).reshape(x.movedim(in_dims[0], 0).shape), 0


def _vmap_backward(info, in_dims, grad, x, dim, complement):
    grad_dim, x_dim = in_dims[:2]
    shape = x.shape if x_dim is None else x.movedim(x_dim, 0).shape[1:]
    full = (info.batch_size, *shape)
    grad = grad.expand(full) if grad_dim is None else grad.movedim(grad_dim, 0)
    x = x.expand(full) if x_dim is None else x.movedim(x_dim, 0)
    moved_grad, moved_dim = _batched_dim(grad, 0, dim)
    moved_x, _ = _batched_dim(x, 0, dim)
    return _cumax_backward(moved_grad, moved_x, moved_dim, complement).reshape(full), 0


_second_setup, _second_backward = derivative_through_reference(reference.cumax_backward)

_cumax_backward = operator(
    "cumax_backward",
    Rules("cumax", 2, reference.cumax_backward, _fake_backward, _second_setup, _second_backward, _vmap_backward),
)
_cumax = operator("cumax", Rules("cumax", 1, reference.cumax, _like, _save, _backward, _vmap))
_small = small_road("cumax")
_is_compiling = torch.compiler.is_dynamo_compiling


def cumax(x: Tensor, dim: int = -1, *, complement: bool = False) -> Tensor:
    r"""Cumulative softmax along one dimension, in one pass.

    .. math::
        y_k = \sum_{j \le k} p_j, \qquad p = \mathrm{softmax}(x)

    and with ``complement=True`` :math:`1 - y_k = \sum_{j > k} p_j`, summed from the other end so that small values keep
    their relative accuracy. The result is monotone, its last element is 1 (0 for the complement), and for float32 it is
    within two units in the last place of the float64 result: the sums are kept in float64.

    The derivative is computed in one pass as well: with g the incoming gradient and :math:`G_j = \sum_{k \ge j} g_k`,
    :math:`dx_j = p_j (G_j - \sum_i p_i G_i)`.

    Args:
        x: any shape, float64, float32, bfloat16 or float16. Any strides; contiguous rows are fastest.
        dim: the dimension to sum along.
        complement: return 1 - cumax(x).

    Returns:
        A contiguous tensor of x's shape and dtype. A row that softmax cannot normalise (all -inf, or with NaN or +inf)
        is NaN, as softmax's is.

    Raises:
        RuntimeError: x is not floating point.
        IndexError: dim is out of range.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> ops.cumax(torch.tensor([0.0, 0.0, 0.0, 0.0]))
        tensor([0.2500, 0.5000, 0.7500, 1.0000])

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", ICLR 2019, section 4.1.
    """
    y = None if _is_compiling() else _small(x, dim, complement)
    return _cumax(x, dim, complement) if y is None else y
