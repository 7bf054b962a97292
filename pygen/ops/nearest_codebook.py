"""The nearest code, proved nearest. Kernels: csrc/nearest_codebook.cpp (CPU), triton_kernels/nearest_codebook.py (GPU).
How the proof goes: docs/nearest-codebook.md."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, operator
from pygen.ops.codebook_statistics import codebook_statistics
from pygen.reference.nearest_codebook import METRICS


def _distance_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake(x, codebook, metric, mask, return_distance, return_candidates):
    rows = x.shape[:2]
    # What has a gradient comes first in an operator's results: torch.library.opcheck adds the others to it.
    return (
        x.new_empty(rows if return_distance else (0,), dtype=_distance_dtype(x)),
        x.new_empty(rows, dtype=torch.int64),
        x.new_empty(rows if return_candidates else (0,), dtype=torch.int32),
    )


def _save(ctx, inputs, output):
    x, codebook, ctx.metric, _, ctx.return_distance, _ = inputs
    _, indices, candidates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, candidates)
    ctx.save_for_backward(x, codebook, indices)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v / |v|, 1 / |v|), both 0 for a zero vector, where the norm has no derivative."""
    squared = v.square().sum(-1, keepdim=True)
    present = squared > 0
    inverse = torch.where(present, torch.where(present, squared, 1).rsqrt(), 0)
    return v * inverse, inverse


def _distance_gradients(x: Tensor, code: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """d distance / dx and d distance / d code, each (..., D)."""
    if metric == "dot":
        return -code, -x
    if metric == "euclidean":
        direction, _ = _unit(x - code)
        return direction, -direction
    (x_unit, x_inverse), (code_unit, code_inverse) = _unit(x), _unit(code)
    cosine = (x_unit * code_unit).sum(-1, keepdim=True)
    return (cosine * x_unit - code_unit) * x_inverse, (cosine * code_unit - x_unit) * code_inverse


def _backward(ctx, grad, _indices, _candidates):
    if grad is None or not ctx.return_distance:
        return (None,) * 6
    x, codebook, indices = ctx.saved_tensors
    # Torch's sums depend on strides, and results must not.
    x, codebook = x.contiguous(), codebook.contiguous()
    heads, codes = codebook.shape[:2]
    dtype = _distance_dtype(x)
    chosen = indices >= 0
    # A row of all codebooks: gathering and adding are then of two dimensions, and the sums deterministic.
    rows = indices.clamp_min(0) + torch.arange(heads, device=x.device)[:, None] * codes
    code = codebook.to(dtype).flatten(0, 1)[rows]
    by_x, by_code = _distance_gradients(x.to(dtype), code, ctx.metric)
    grad = torch.where(chosen, grad, 0)[..., None]
    grad_x = torch.where(chosen[..., None], grad * by_x, 0)
    grad_code = torch.where(chosen[..., None], grad * by_code, 0)
    _, sums = codebook_statistics(grad_code, torch.where(chosen, rows, -1), heads * codes)
    return grad_x.to(x.dtype), sums.view_as(codebook).to(codebook.dtype), None, None, None, None


def _vmap(info, in_dims, x, codebook, metric, mask, return_distance, return_candidates):
    """A batch is more rows of each head where all share the codebook, and more heads where they do not."""
    size = info.batch_size

    def batched(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    shared = in_dims[1] is None
    x = batched(x, in_dims[0])
    _, heads, n, d = x.shape
    mask = None if mask is None else batched(mask, in_dims[3])
    if shared:
        x = x.transpose(0, 1).reshape(heads, size * n, d)
        mask = None if mask is None else mask.transpose(0, 1).reshape(heads, size * n)
    else:
        codebook = batched(codebook, in_dims[1]).flatten(0, 1)
        x, mask = x.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
    results = _nearest(x, codebook, metric, mask, return_distance, return_candidates)

    def unbatched(result: Tensor) -> Tensor:
        if result.dim() == 1:  # not asked for
            return result.expand(size, 0)
        return result.view(heads, size, n).transpose(0, 1) if shared else result.view(size, heads, n)

    return tuple(unbatched(result) for result in results), (0, 0, 0)


_nearest: Callable[..., Any] = operator(
    "nearest_codebook",
    Rules("nearest_codebook", 2, reference.nearest_codebook, _fake, _save, _backward, _vmap),
)


def _check(x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None) -> None:
    for name, tensor in (("x", x), ("codebook", codebook)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"nearest_codebook: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"nearest_codebook: {name} must be floating point, got {tensor.dtype}")
    if metric not in METRICS:
        raise ValueError(f"nearest_codebook: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if codebook.dim() not in (2, 3):
        raise ValueError(f"nearest_codebook: codebook must be (K, D) or (H, K, D), got {tuple(codebook.shape)}")
    if codebook.size(-2) == 0 or codebook.size(-1) == 0:
        raise ValueError(
            f"nearest_codebook: the codebook must have a code of at least one element, got {tuple(codebook.shape)}"
        )
    if x.dim() == 0 or x.size(-1) != codebook.size(-1):
        raise ValueError(
            f"nearest_codebook: x must be (..., {codebook.size(-1)}) as the codebook {tuple(codebook.shape)}, got "
            f"{tuple(x.shape)}"
        )
    if codebook.dim() == 3 and (x.dim() < 2 or x.size(0) != codebook.size(0)):
        raise ValueError(
            f"nearest_codebook: x must be ({codebook.size(0)}, ..., {codebook.size(-1)}), a head first, for the "
            f"codebook {tuple(codebook.shape)}, got {tuple(x.shape)}"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"nearest_codebook: mask must be bool, got {mask.dtype}")


def nearest_codebook(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    mask: Tensor | None = None,
    return_distance: bool = False,
    return_candidates: bool = False,
) -> Any:
    r"""The index of the code nearest to each vector, certified exact.

    .. math::
        z_i = \min \arg\min_k d(x_i, c_k)

    with :math:`d` the distance of the values as given, computed in float64: :math:`\lVert x - c \rVert`
    ("euclidean"), :math:`1 - x \cdot c / (\lVert x \rVert \lVert c \rVert)` ("cosine"; a zero vector has cosine 0
    with everything) or :math:`-x \cdot c` ("dot"). The search itself runs in low precision, with a proved bound on its
    error; the codes that the bound leaves in doubt are decided in float64. So the indices are the same on every device,
    at every instruction set and number of threads, ties go to the lowest index, and the N x K matrix of distances never
    exists: memory is O(N + K D).

    Args:
        x: (..., D), or (H, ..., D) for H codebooks; float64, float32, bfloat16 or float16.
        codebook: (K, D), or (H, K, D) for x's first dimension; its dtype may differ from x's.
        metric: "euclidean", "cosine" or "dot".
        mask: bool, broadcastable to the shape of the indices; where it is False the index is -1 and the distance 0.
        return_distance: also return the distance to the chosen code; it is differentiable in x and codebook.
        return_candidates: also return how many codes the bound left in doubt for each vector; 1 says that the search
            alone was proof.

    Returns:
        indices: (...), int64. Then, if asked for, distance: (...), float32 (float64 for float64), and candidates:
        (...), int32. A vector with NaN or infinity gets -1 and distance NaN. A code with NaN or infinity is never
        chosen, and if there is no other all get -1.

    Raises:
        TypeError: dtypes. ValueError: shapes, an unknown metric, an empty codebook.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x, codebook = torch.tensor([[0.9, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> ops.nearest_codebook(x, codebook, return_distance=True)
        (tensor([0, 1]), tensor([0.1000, 2.0000]))

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017; for the bound,
    Higham, "Accuracy and Stability of Numerical Algorithms", 2002, chapter 3.
    """
    _check(x, codebook, metric, mask)
    rows = x.shape[:-1]
    if mask is not None:
        try:
            mask = mask.expand(rows)
        except RuntimeError:
            raise ValueError(
                f"nearest_codebook: mask must broadcast to {tuple(rows)}, got {tuple(mask.shape)}"
            ) from None
    heads = codebook.size(0) if codebook.dim() == 3 else 1
    distance, indices, candidates = _nearest(
        x.reshape(heads, rows.numel() // heads if heads else 0, x.size(-1)),
        codebook if codebook.dim() == 3 else codebook[None],
        metric,
        None if mask is None else mask.reshape(heads, -1),
        return_distance,
        return_candidates,
    )
    results = [indices]
    results += [distance] if return_distance else []
    results += [candidates] if return_candidates else []
    shaped = tuple(result.reshape(rows) for result in results)
    return shaped if len(shaped) > 1 else shaped[0]
