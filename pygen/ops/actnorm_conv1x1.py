"""ActNorm and invertible 1x1 convolution as one op. CPU kernel: csrc/actnorm_conv1x1.cpp. On a GPU the product is the
vendor library's, and the plain formulas are the kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, contiguous_like, derivative_through_reference, looped_vmap, operator

_NAMES = ("bias", "log_scale", "lower", "upper", "log_diagonal", "sign", "permutation")


def _fake(x, *parameters):
    return contiguous_like(x), x.new_empty(x.size(0))


def _fake_backward(grad_z, grad_log_det, x, *parameters):
    return tuple(contiguous_like(tensor) for tensor in (x, *parameters[:5]))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_z, grad_log_det):
    if grad_z is None and grad_log_det is None:
        return (None,) * 8
    return *_mix_backward(grad_z, grad_log_det, *ctx.saved_tensors), None, None


_second_setup, _second_backward = derivative_through_reference(reference.actnorm_conv1x1_backward)

_mix_backward: Callable[..., Any] = operator(
    "actnorm_conv1x1_backward",
    Rules(
        "actnorm_conv1x1",
        10,
        reference.actnorm_conv1x1_backward,
        _fake_backward,
        _second_setup,
        _second_backward,
        looped_vmap(lambda: _mix_backward, 10),
        gpu="library",
    ),
)
_mix: Callable[..., Any] = operator(
    "actnorm_conv1x1",
    Rules(
        "actnorm_conv1x1",
        8,
        reference.actnorm_conv1x1,
        _fake,
        _save,
        _backward,
        looped_vmap(lambda: _mix, 8),
        gpu="library",
    ),
)

# Inverses are for sampling and for finding inputs again: their derivative is rare, and takes the plain formula.
_inverse_setup, _inverse_backward = derivative_through_reference(reference.actnorm_conv1x1_inverse)
_unmix: Callable[..., Any] = operator(
    "actnorm_conv1x1_inverse",
    Rules(
        "actnorm_conv1x1",
        8,
        reference.actnorm_conv1x1_inverse,
        _fake,
        _inverse_setup,
        _inverse_backward,
        looped_vmap(lambda: _unmix, 8),
        gpu="library",
    ),
)


def _check(x: Tensor, parameters: tuple[Tensor, ...]) -> None:
    for name, tensor in zip(("x", *_NAMES), (x, *parameters), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"actnorm_conv1x1: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != x.dtype:
            raise TypeError(
                f"actnorm_conv1x1: x and the parameters must all be float32 or all float64, got {tensor.dtype} for "
                f"{name} and {x.dtype} for x"
            )
    if x.dim() < 2 or x.size(1) == 0:
        raise ValueError(f"actnorm_conv1x1: x must be (B, C, ...), got {tuple(x.shape)}")
    channels = x.size(1)
    for name, tensor in zip(_NAMES, parameters, strict=True):
        shape = (channels, channels) if name in ("lower", "upper", "permutation") else (channels,)
        if tensor.shape != shape:
            raise ValueError(
                f"actnorm_conv1x1: {name} must be {shape} for x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )


def actnorm_conv1x1(
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    *,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The linear half of a Glow step: ActNorm and invertible 1x1 convolution, one matrix product, one kernel each way.

    .. math::
        z_{b,:,p} = W \left((x_{b,:,p} + b)\, e^{s}\right), \quad W = P L\, (U + \mathrm{diag}(\sigma e^{d})), \qquad
        \log\det = \mathrm{pixels} \sum_c (s_c + d_c)

    The matrices are multiplied in float64; pixels in x's type, each output in one register, and a weight's gradient is
    summed over samples in float64, in an order that does not depend on the number of threads.

    Args:
        x: (B, C, ...), float32 or float64; contiguous is fast.
        bias, log_scale: b and s, (C,), x's dtype as all others.
        lower, upper: (C, C), of which the strict triangles count; L has ones on its diagonal.
        log_diagonal, sign: d and sigma, (C,).
        permutation: P, (C, C).
        inverse: :math:`x = e^{-s} W^{-1} z - b`, W inverted by triangular solves in float64.

    Returns:
        z (or x): x's shape and dtype. log_det: (B,).

    Raises:
        TypeError: dtypes that differ or are not float32 or float64. ValueError: shapes. RuntimeError: P is not a
        permutation matrix (CPU).

    Differentiable, twice, in all but sign and permutation. `nn.ActNormConv1x1` is the module.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> x, zero, eye = torch.randn(2, 3, 4, 4), torch.zeros(3), torch.eye(3)
        >>> z, log_det = ops.actnorm_conv1x1(x, zero, zero, eye, eye, zero + 1, zero + 1, eye)
        >>> torch.allclose(z, 2.718282 * x), log_det
        (True, tensor([48., 48.]))

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, section 3.
    """
    parameters = (bias, log_scale, lower, upper, log_diagonal, sign, permutation)
    _check(x, parameters)
    return (_unmix if inverse else _mix)(x, *parameters)
