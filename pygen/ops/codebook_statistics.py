"""How often each code was chosen and the sum of what chose it. Kernels: csrc/codebook_statistics.cpp (CPU),
triton_kernels/codebook_statistics.py (GPU)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, operator


def _fake(x, indices, num_codes, mask):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # What has a gradient comes first in an operator's results: torch.library.opcheck adds the others to it.
    return x.new_empty((num_codes, x.size(1)), dtype=dtype), x.new_empty(num_codes, dtype=torch.int64)


def _save(ctx, inputs, output):
    x, indices, _, mask = inputs
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(indices if mask is None else torch.where(mask, indices, -1))


def _backward(ctx, grad_sums, _):
    if grad_sums is None:
        return None, None, None, None
    (indices,) = ctx.saved_tensors
    chosen = (indices >= 0)[:, None]
    grad = torch.where(chosen, grad_sums[indices.clamp_min(0)], 0)
    return grad.to(ctx.dtype), None, None, None


def _vmap(info, in_dims, x, indices, num_codes, mask):
    """A batch of statistics is one of batch_size * num_codes codes."""

    def batched(tensor: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    x, indices = batched(x, in_dims[0]), batched(indices, in_dims[1])
    if mask is not None:
        indices = torch.where(batched(mask, in_dims[3]), indices, -1)
    first = torch.arange(info.batch_size, device=x.device)[:, None] * num_codes
    indices = torch.where(indices >= 0, indices + first, indices)
    sums, counts = _statistics(x.flatten(0, 1), indices.flatten(), info.batch_size * num_codes, None)
    return (sums.unflatten(0, (-1, num_codes)), counts.unflatten(0, (-1, num_codes))), (0, 0)


_statistics: Callable[..., Any] = operator(
    "codebook_statistics",
    Rules("codebook_statistics", 1, reference.codebook_statistics, _fake, _save, _backward, _vmap),
)


def codebook_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""How often each code was chosen, and the sum of the vectors that chose it.

    .. math::
        n_k = \#\{i : z_i = k\}, \qquad s_k = \sum_{i : z_i = k} x_i

    This is what an exponential moving average of a codebook and Lloyd's algorithm need of a batch. Sums are kept in
    float64 in an order that depends on the indices alone: the same bits at every number of threads, no atomics, no
    one-hot matrix.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16.
        indices: (...), int64, from 0 to num_codes - 1; rows of -1, as `nearest_codebook` marks what it leaves out, are
            left out.
        num_codes: K.
        mask: (...), bool; rows where it is False are left out.

    Returns:
        counts: (K,) int64. sums: (K, D), float64 for float64 and float32 for the others; differentiable in x.

    Raises:
        TypeError: dtypes. ValueError: shapes. RuntimeError: an index below -1 or beyond num_codes - 1 (CPU; on a GPU
        such a row is left out, for to look would be to wait for it).

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> ops.codebook_statistics(x, torch.tensor([1, 1, -1]), 3)
        (tensor([0, 2, 0]), tensor([[0., 0.],
                [4., 6.],
                [0., 0.]]))

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017, appendix A.1.
    """
    if not isinstance(x, Tensor) or not isinstance(indices, Tensor):
        raise TypeError("codebook_statistics: x and indices must be torch.Tensors")
    if not x.is_floating_point():
        raise TypeError(f"codebook_statistics: x must be floating point, got {x.dtype}")
    if indices.dtype != torch.int64:
        raise TypeError(f"codebook_statistics: indices must be int64, got {indices.dtype}")
    if x.dim() == 0 or x.shape[:-1] != indices.shape:
        raise ValueError(
            f"codebook_statistics: indices must be x's shape without its last dimension, got {tuple(indices.shape)} "
            f"for x {tuple(x.shape)}"
        )
    if num_codes < 0:
        raise ValueError(f"codebook_statistics: num_codes must not be negative, got {num_codes}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"codebook_statistics: mask must be bool, got {mask.dtype}")
        if mask.shape != indices.shape:
            raise ValueError(
                f"codebook_statistics: mask must have the shape of indices, got {tuple(mask.shape)} for "
                f"{tuple(indices.shape)}"
            )
        mask = mask.reshape(-1)
    sums, counts = _statistics(x.reshape(indices.numel(), x.size(-1)), indices.reshape(-1), num_codes, mask)
    return counts, sums
