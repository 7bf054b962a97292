"""Affine and additive coupling. Kernels: csrc/affine_coupling.cpp (CPU), triton_kernels/affine_coupling.py (GPU)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, contiguous_like, derivative_through_reference, operator
from pygen.reference._dtypes import compute_dtype
from pygen.reference.affine_coupling import shift_gradient


def _fake(x, scale, shift, scale_map, shift_first, clamp, inverse):
    return contiguous_like(x), x.new_empty(x.size(0), dtype=compute_dtype(x.dtype))


def _fake_backward(grad_y, grad_log_det, x, scale, shift, scale_map, shift_first, clamp, inverse):
    return contiguous_like(x), contiguous_like(scale)


def _save(ctx, inputs, output):
    x, scale, shift, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, shift)


def _backward(ctx, grad_y, grad_log_det):
    if grad_y is None and grad_log_det is None:
        return (None,) * 7
    x, scale, shift = ctx.saved_tensors
    _, shift_first, _, inverse = ctx.options
    grad_x, grad_scale = _affine_coupling_backward(grad_y, grad_log_det, x, scale, shift, *ctx.options)
    grad_shift = None
    if grad_y is None:
        grad_x = None  # log_det does not depend on x or shift
    elif ctx.needs_input_grad[2]:
        grad_shift = shift_gradient(grad_y, grad_x, shift_first, inverse)
    return grad_x, grad_scale, grad_shift, None, None, None, None


def _fake_halves(x, parameters, *options):
    return contiguous_like(x), x.new_empty(x.size(0), dtype=compute_dtype(x.dtype))


def _fake_halves_backward(grad_z, grad_log_det, x, parameters, *options):
    return contiguous_like(x), contiguous_like(parameters)


def _save_halves(ctx, inputs, output):
    x, parameters, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, parameters)


def _backward_halves(ctx, grad_z, grad_log_det):
    if grad_z is None and grad_log_det is None:
        return (None,) * 8
    grads = _affine_coupling_halves_backward(grad_z, grad_log_det, *ctx.saved_tensors, *ctx.options)
    # The log-determinant alone does not depend on x.
    return grads[0] if grad_z is not None else None, grads[1], *(None,) * 6


def _fold(batch: int, tensor: Tensor | None, batch_dim: int | None) -> Tensor | None:
    """vmap's dimension V and the op's batch B become one batch of V * B samples."""
    if tensor is None:
        return None
    tensor = tensor.expand(batch, *tensor.shape) if batch_dim is None else tensor.movedim(batch_dim, 0)
    return tensor.flatten(0, 1)


def _vmapped(op, tensors: int):
    """The vmap rule of an op whose first arguments are `tensors` tensors with the batch in front."""

    def rule(info, in_dims, *args):
        folded = [_fold(info.batch_size, *pair) for pair in zip(args[:tensors], in_dims, strict=False)]
        outputs = op()(*folded, *args[tensors:])
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in outputs), (0, 0)

    return rule


_second_setup, _second_backward = derivative_through_reference(reference.affine_coupling_backward)

_affine_coupling_backward: Callable[..., Any] = operator(
    "affine_coupling_backward",
    Rules(
        "affine_coupling",
        5,
        reference.affine_coupling_backward,
        _fake_backward,
        _second_setup,
        _second_backward,
        _vmapped(lambda: _affine_coupling_backward, 5),
    ),
)
_affine_coupling: Callable[..., Any] = operator(
    "affine_coupling",
    Rules(
        "affine_coupling", 3, reference.affine_coupling, _fake, _save, _backward, _vmapped(lambda: _affine_coupling, 3)
    ),
)

_second_setup_halves, _second_backward_halves = derivative_through_reference(reference.affine_coupling_halves_backward)

_affine_coupling_halves_backward: Callable[..., Any] = operator(
    "affine_coupling_halves_backward",
    Rules(
        "affine_coupling",
        4,
        reference.affine_coupling_halves_backward,
        _fake_halves_backward,
        _second_setup_halves,
        _second_backward_halves,
        _vmapped(lambda: _affine_coupling_halves_backward, 4),
    ),
)
_affine_coupling_halves: Callable[..., Any] = operator(
    "affine_coupling_halves",
    Rules(
        "affine_coupling",
        2,
        reference.affine_coupling_halves,
        _fake_halves,
        _save_halves,
        _backward_halves,
        _vmapped(lambda: _affine_coupling_halves, 2),
    ),
)


def _same_shape_and_dtype(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast and promote as x * scale + shift would; free when there is nothing to do."""
    for name, tensor in (("x", x), ("scale", scale), ("shift", shift)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"affine_coupling: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if scale.dtype != x.dtype or shift.dtype != x.dtype:
        dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), shift.dtype)
        x, scale, shift = x.to(dtype), scale.to(dtype), shift.to(dtype)
    if scale.shape != x.shape or shift.shape != x.shape:
        scale, shift = _expand("affine_coupling", "scale", scale, x), _expand("affine_coupling", "shift", shift, x)
    return x, scale, shift


def _expand(op: str, name: str, tensor: Tensor, x: Tensor) -> Tensor:
    try:
        return tensor.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must have x's shape or broadcast to it, got {tuple(tensor.shape)} for x {tuple(x.shape)}"
        ) from None


def affine_coupling(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Affine coupling transform and its log-determinant, fused.

    With :math:`a` the raw scale that the conditioner gives and :math:`t` the shift,

    .. math::
        y = x\, s(a) + t, \qquad \log\det_b = \sum \log s(a)

    or :math:`y = (x + t)\, s(a)` with ``shift_first``. ``inverse=True`` computes :math:`(x - t) / s(a)`, or
    :math:`x / s(a) - t`, and minus the sum.

    ============  ==============================================  ==========================================
    `scale_map`   s(a)                                            found in
    ============  ==============================================  ==========================================
    "exp"         e^a                                             NICE's scaling, normflows
    "tanh"        e^{tanh a}                                      RealNVP
    "sigmoid"     sigmoid(a + 2)                                  Glow, residual-flows, normflows
    "nflows"      sigmoid(a + 2) + 0.001                          nflows
    "softplus"    softplus(a) + 0.001, clamped to [0, 3]          nflows' GENERAL activation
    "atan"        exp(0.636 clamp atan a)                         FrEIA
    ============  ==============================================  ==========================================

    Args:
        x: (B, ...) with at least one dimension, float64, float32, bfloat16 or float16.
        scale: raw scale, x's shape or broadcastable to it. Halves and interleaved channels of one parameter tensor are
            read as the views they are, without a copy.
        shift: likewise.
        scale_map: which s(a), from the table.
        shift_first: shift before scaling, as openai/glow does.
        clamp: bound of the "atan" map; other maps ignore it.
        inverse: undo the transform.

    Returns:
        y: contiguous, x's shape and dtype. log_det: (B,), float32 for 16-bit inputs and x's dtype otherwise. Mixed
        dtypes are promoted as torch promotes them; under autocast the op runs in float32.

    Raises:
        RuntimeError: a wrong dtype or rank, or an unknown scale_map. ValueError: shapes that do not broadcast to x.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x, a, t = torch.randn(3, 8, 5).unbind()
        >>> y, log_det = ops.affine_coupling(x, a, t, scale_map="tanh")
        >>> back, _ = ops.affine_coupling(y, a, t, scale_map="tanh", inverse=True)
        >>> torch.allclose(back, x, atol=1e-6), log_det.shape
        (True, torch.Size([8]))

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, section 3.
    """
    x, scale, shift = _same_shape_and_dtype(x, scale, shift)
    return _affine_coupling(x, scale, shift, scale_map, shift_first, clamp, inverse)


def _check_halves(x: Tensor, parameters: Tensor, dim: int, swap: bool) -> int:
    """`dim` counted from the front. Every kernel relies on these shapes."""
    for name, tensor in (("x", x), ("parameters", parameters)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"affine_coupling_halves: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    dims = x.dim()
    if not (0 < dim < dims or -dims < dim < 0):
        raise ValueError(
            f"affine_coupling_halves: dim must be a dimension of x behind the batch, got {dim} for x {tuple(x.shape)}"
        )
    n = x.size(dim)
    if n < 2:
        raise ValueError(
            f"affine_coupling_halves: dimension {dim} must have at least 2 elements to be split, got x {tuple(x.shape)}"
        )
    dim %= dims
    expected = (*x.shape[:dim], 2 * (n - n // 2 if swap else n // 2), *x.shape[dim + 1 :])
    if parameters.shape != expected:
        raise ValueError(
            f"affine_coupling_halves: parameters must be {tuple(expected)}, scale and shift of the active part of x "
            f"{tuple(x.shape)}, got {tuple(parameters.shape)}"
        )
    return dim


def affine_coupling_halves(
    x: Tensor,
    parameters: Tensor,
    *,
    dim: int = 1,
    swap: bool = False,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A coupling layer around its conditioner: one half of x passes, `affine_coupling` transforms the other.

    .. math::
        z_p = x_p, \qquad z_a = x_a\, s(a) + t, \qquad (a, t) = \text{parameters}, \qquad
        \log\det_b = \sum \log s(a)

    The same as splitting x and the parameters, `affine_coupling` and putting z together, in one pass: neither the
    parts of z nor those of a gradient are ever a tensor of their own that is copied into place.

    Args:
        x: (B, ..., n, ...), float64, float32, bfloat16 or float16; n, at least 2, in dimension `dim`. Its first
            n - n // 2 elements there pass, the last n // 2 are transformed.
        parameters: (B, ..., 2 m, ...) for the m elements that are transformed: along `dim` first the raw scales, then
            the shifts.
        dim: the dimension that is split; not 0, the batch.
        swap: the first n - n // 2 elements are transformed, the last n // 2 pass.
        scale_map, shift_first, clamp, inverse: as in `affine_coupling`.

    Returns:
        z: contiguous, x's shape and dtype. log_det: (B,), float32 for 16-bit inputs and x's dtype otherwise. Mixed
        dtypes are promoted as torch promotes them; under autocast the op runs in float32.

    Raises:
        ValueError: dim is not a dimension behind the batch or cannot be split, or parameters do not fit. TypeError: x
        or parameters is not a tensor. RuntimeError: a wrong dtype or an unknown scale_map.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x, conditioner = torch.randn(8, 5), torch.nn.Linear(3, 4)
        >>> z, log_det = ops.affine_coupling_halves(x, conditioner(x[:, :3]), scale_map="tanh")
        >>> back, _ = ops.affine_coupling_halves(z, conditioner(z[:, :3]), scale_map="tanh", inverse=True)
        >>> torch.allclose(back, x, atol=1e-6), log_det.shape
        (True, torch.Size([8]))

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, section 3.2.
    """
    dim = _check_halves(x, parameters, dim, swap)
    if parameters.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, parameters.dtype)
        x, parameters = x.to(dtype), parameters.to(dtype)
    return _affine_coupling_halves(x, parameters, dim, swap, scale_map, shift_first, clamp, inverse)


def additive_coupling(x: Tensor, shift: Tensor, *, inverse: bool = False) -> Tensor:
    r"""Additive coupling :math:`y = x + t`, or :math:`x - t` with ``inverse``. Its log-determinant is 0.

    There is nothing to fuse: torch's own addition is this kernel, on every device, with every derivative. The function
    exists for the checked shapes and the name.

    Args:
        x: (B, ...), floating point.
        shift: x's shape or broadcastable to it.
        inverse: subtract.

    Returns:
        y: x's shape.

    Raises:
        TypeError: x or shift is not floating point. ValueError: shift does not broadcast to x.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> ops.additive_coupling(torch.ones(1, 2), torch.full((1, 2), 0.5))
        tensor([[1.5000, 1.5000]])

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, section 3.2.
    """
    for name, tensor in (("x", x), ("shift", shift)):
        if not tensor.is_floating_point():
            raise TypeError(f"additive_coupling: {name} must be floating point, got {tensor.dtype}")
    if shift.shape != x.shape:
        shift = _expand("additive_coupling", "shift", shift, x)
    return reference.additive_coupling(x, shift, inverse)
