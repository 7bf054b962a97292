"""Monotonic rational-quadratic spline. Kernels: csrc/rational_quadratic_spline.cpp (CPU),
triton_kernels/rational_quadratic_spline.py (GPU)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, contiguous_like, derivative_through_reference, operator
from pygen.reference._dtypes import compute_dtype
from pygen.reference.rational_quadratic_spline import derivative_count


def _fake(x, widths, heights, derivatives, *options):
    return contiguous_like(x), contiguous_like(x).to(compute_dtype(x.dtype))


def _fake_backward(grad_y, grad_log_det, *tensors_and_options):
    return tuple(contiguous_like(tensor) for tensor in tensors_and_options[:4])


def _save(ctx, inputs, output):
    *tensors, inverse, tails, bound, width, height, derivative = inputs
    ctx.options = inverse, tails, bound, width, height, derivative
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y, grad_log_det):
    if grad_y is None and grad_log_det is None:
        return (None,) * 10
    return *_spline_backward(grad_y, grad_log_det, *ctx.saved_tensors, *ctx.options), *(None,) * 6


def _vmapped(op: Callable[[], Any], tensors: int):
    """Elementwise but for the last dimension of the parameters: one more dimension in front is all vmap needs."""

    def rule(info, in_dims, *args):
        moved = [
            tensor
            if tensor is None
            else (tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0))
            for tensor, dim in zip(args[:tensors], in_dims, strict=False)
        ]
        outputs = op()(*moved, *args[tensors:])
        return outputs, (0,) * len(outputs)

    return rule


_second_setup, _second_backward = derivative_through_reference(reference.rational_quadratic_spline_backward)

_spline_backward: Callable[..., Any] = operator(
    "rational_quadratic_spline_backward",
    Rules(
        "rational_quadratic_spline",
        6,
        reference.rational_quadratic_spline_backward,
        _fake_backward,
        _second_setup,
        _second_backward,
        _vmapped(lambda: _spline_backward, 6),
    ),
)
_spline: Callable[..., Any] = operator(
    "rational_quadratic_spline",
    Rules(
        "rational_quadratic_spline",
        4,
        reference.rational_quadratic_spline,
        _fake,
        _save,
        _backward,
        _vmapped(lambda: _spline, 4),
    ),
)

_NAMES = ("x", "widths", "heights", "derivatives")


def _one_dtype(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Promote as arithmetic would; free when there is nothing to do."""
    dtype = tensors[0].dtype
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _broadcast(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters over x's elements."""
    expanded = [x]
    for name, tensor in zip(_NAMES[1:], parameters, strict=True):
        try:
            expanded.append(tensor.expand(*x.shape, tensor.size(-1)))
        except RuntimeError:
            raise ValueError(
                f"rational_quadratic_spline: {name} must be (*x.shape, n) or broadcast to it, got "
                f"{tuple(tensor.shape)} for x {tuple(x.shape)}"
            ) from None
    return tuple(expanded)


def _check(tensors: tuple[Tensor, ...], tails: str) -> None:
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rational_quadratic_spline: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"rational_quadratic_spline: {name} must be floating point, got {tensor.dtype}")
    _, widths, heights, derivatives = tensors
    if min(tensor.dim() for tensor in tensors[1:]) == 0 or widths.size(-1) == 0:
        raise ValueError("rational_quadratic_spline: widths must have their bins in the last dimension, at least one")
    bins = widths.size(-1)
    if heights.size(-1) != bins:
        raise ValueError(
            f"rational_quadratic_spline: widths and heights must have as many bins, got {bins} and {heights.size(-1)}"
        )
    expected = derivative_count(bins, tails)
    if derivatives.size(-1) != expected:
        shown = None if tails == "none" else tails
        raise ValueError(
            f"rational_quadratic_spline: {bins} bins with tails={shown!r} take {expected} derivatives in the last "
            f"dimension, got {derivatives.size(-1)}"
        )


def _check_options(bins: int, tail_bound: float, width: float, height: float, derivative: float) -> None:
    if not 0 < tail_bound < math.inf:  # a comparison, which the compiler can trace
        raise ValueError(f"rational_quadratic_spline: tail_bound must be a positive number, got {tail_bound}")
    for name, smallest in (("min_bin_width", width), ("min_bin_height", height)):
        if not (smallest > 0 and smallest * bins <= 1):
            raise ValueError(
                f"rational_quadratic_spline: {name} must be positive and at most 1 / bins ({1 / bins:g}), "
                f"got {smallest}"
            )
    if not derivative > 0:
        raise ValueError(f"rational_quadratic_spline: min_derivative must be positive, got {derivative}")


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    inverse: bool = False,
    tails: str | None = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    r"""Monotonic rational-quadratic spline and the logarithm of its slope, elementwise and fused.

    The interval [-B, B], B = `tail_bound`, is cut into K bins. With m the smallest share of a bin, widths are
    :math:`2B\,(m + (1 - Km)\,\mathrm{softmax}(\mathrm{widths}))`, heights alike, and the slope at a knot is
    `min_derivative` + softplus(derivatives). In the bin of x, with :math:`s = \Delta y / \Delta x` its mean slope,
    :math:`\xi = (x - x_k) / \Delta x` and :math:`d_0, d_1` the slopes at its knots,

    .. math::
        y = y_k + \Delta y\, \frac{s \xi^2 + d_0 \xi (1 - \xi)}{s + (d_0 + d_1 - 2s)\, \xi (1 - \xi)}, \qquad
        \log \frac{dy}{dx} = \log \frac{s^2\, (d_1 \xi^2 + 2 s\, \xi (1 - \xi) + d_0 (1 - \xi)^2)}
        {(s + (d_0 + d_1 - 2s)\, \xi (1 - \xi))^2}

    Arguments and shapes are those of nflows' `unconstrained_rational_quadratic_spline`.

    ============  =============  =====================================================  ==========================
    `tails`       derivatives    outside [-B, B]                                        slope at the bounds
    ============  =============  =====================================================  ==========================
    "linear"      [..., K - 1]   y = x                                                  exactly 1
    "circular"    [..., K]       y = x; inside, x is an angle                           the same at both
    None          [..., K + 1]   straight on, with the slope of the end that was left   as given
    ============  =============  =====================================================  ==========================

    Args:
        x: any shape [...], float64, float32, bfloat16 or float16 (16-bit types are computed in float32).
        widths, heights: [..., K], unnormalised; leading dimensions x's or broadcastable to them. Any strides: views of
            one packed tensor cost no copy.
        derivatives: unnormalised, the last dimension as in the table.
        inverse: the inverse spline. Its quadratic is solved in the form that does not cancel; no input makes it fail.
        tails: "linear", "circular" or None.
        tail_bound: B.
        min_bin_width, min_bin_height: the smallest bin, as a share of 2B; at most 1/K.
        min_derivative: the smallest slope at a knot.

    Returns:
        y: x's shape and dtype. log_abs_det: x's shape, log dy/dx of what was computed (so minus the forward's for the
        inverse), float32 for 16-bit inputs, else x's dtype. A NaN in x gives NaN in its own element alone.

    Raises:
        ValueError: shapes, `tails` or a bound that do not fit. TypeError: not a floating-point tensor.

    Differentiable in all four tensors, twice (the second derivative is computed by the plain formula).

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x, w, h, d = torch.linspace(-2, 2, 5), torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 7)
        >>> y, log_abs_det = ops.rational_quadratic_spline(x, w, h, d)
        >>> back, _ = ops.rational_quadratic_spline(y, w, h, d, inverse=True)
        >>> torch.allclose(back, x, atol=1e-5), y[[0, 4]], log_abs_det[[0, 4]]
        (True, tensor([-2.,  2.]), tensor([0., 0.]))

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019, section 3.
    """
    kind = "none" if tails is None else tails
    tensors: tuple[Tensor, ...] = (x, widths, heights, derivatives)
    _check(tensors, kind)
    _check_options(widths.size(-1), tail_bound, min_bin_width, min_bin_height, min_derivative)
    tensors = _one_dtype(tensors)
    if not widths.shape[:-1] == heights.shape[:-1] == derivatives.shape[:-1] == x.shape:
        tensors = _broadcast(*tensors)
    return _spline(*tensors, inverse, kind, tail_bound, min_bin_width, min_bin_height, min_derivative)
