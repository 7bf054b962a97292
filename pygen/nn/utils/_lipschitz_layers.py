"""The bounds of single layers of which lipschitz.py makes a network's. What convolutions are as operators is in
_conv_operator.py."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn.actnorm import ActNorm
from pygen.nn.convolution import InvertibleConv1x1
from pygen.nn.multiscale import Squeeze
from pygen.nn.transform import Permutation, Reshape, Transform
from pygen.nn.utils._conv_operator import CONVOLUTIONS, TRANSPOSED, ConvOperator, dense_matrix, fourier_norm
from pygen.nn.utils._evaluated_weight import evaluated_weight

Shape = tuple[int, ...] | None

# More than a product and a sum in float64 lose.
ROUNDING = 1e-15

# Larger than any padding: whether a convolution is pointwise does not depend on the size.
_LARGE = 2**20

# Elements of a convolution's matrix whose singular values are worth computing: 1024 x 1024 take half a second.
_DENSE_LIMIT = 2**20

# Largest slopes, found with mpmath to 30 digits and rounded up.
_SILU, _MISH, _SELU = 1.0998394, 1.0884982, 1.7580994
_GELU = {"none": 1.1289042, "tanh": 1.1289931}


class NeedsShape(Exception):
    """A bound depends on the size of the input, which is not known."""


def shape_after(module: Any, kind: type[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...]:
    if kind in ELEMENTWISE:
        return shape
    if kind is nn.Linear:
        return (*shape[:-1], module.out_features)
    if kind in (*CONVOLUTIONS, *TRANSPOSED):
        return (module.out_channels, *ConvOperator.of(module, shape[1:]).output_shape)
    if isinstance(module, Transform):
        return module.output_shape(shape)
    return tuple(module(torch.empty(1, *shape, device="meta")).shape[1:])


# --- Layers with weights


def _up(norm: Tensor, rows: int, columns: int, taps: int = 1) -> float:
    """More than the norm can have lost to rounding, where float64 computed it.

    Singular values are those of a matrix that differs by some eps (rows + columns) of its norm; the matrix at one
    frequency is a sum of `taps` matrices, each of a norm that is at most that of the operator.
    """
    eps = torch.finfo(torch.float64).eps
    return float(norm) * (1 + 32 * eps * (rows + columns + taps) * taps * math.sqrt(min(rows, columns)))


def _linear(module: nn.Module, shape: Shape) -> float:
    weight = evaluated_weight(module)
    if shape is not None and shape[-1:] != (weight.size(1),):
        raise ValueError(f"it takes {weight.size(1)} features")
    return _matrix_norm(weight)


def _matrix_norm(matrices: Tensor) -> float:
    """(..., rows, columns): the largest of all singular values."""
    if matrices.numel() == 0:
        return 0.0
    return _up(torch.linalg.svdvals(matrices).amax(), *matrices.shape[-2:])


def _convolution(module: Any, shape: Shape) -> float:
    weight = evaluated_weight(module)
    if shape is None:
        pointwise = ConvOperator.of(module, (_LARGE,) * len(module.kernel_size)).is_pointwise
        if not pointwise:
            raise NeedsShape
        return _matrix_norm(weight.flatten(1).unflatten(0, (module.groups, -1)))
    if shape[:1] != (module.in_channels,):
        raise ValueError(f"it takes {module.in_channels} channels")
    operator = ConvOperator.of(module, shape[1:])
    if operator.is_pointwise:
        return _matrix_norm(weight.flatten(1).unflatten(0, (module.groups, -1)))
    rows = operator.out_channels * math.prod(operator.output_shape)
    columns = operator.in_channels * math.prod(operator.input_shape)
    if rows * columns <= _DENSE_LIMIT:
        return _matrix_norm(dense_matrix(operator, weight))
    return min(_fourier_bounds(operator, weight))


def _fourier_bounds(operator: ConvOperator, weight: Tensor) -> Iterator[float]:
    """Numbers that the operator's norm does not exceed."""

    def on(torus: Sequence[int], part_of: ConvOperator) -> float:
        columns = weight.size(1) * math.prod(part_of.stride)
        return _up(fourier_norm(part_of, weight, torus), weight.size(0), columns, math.prod(operator.kernel_size))

    if operator.is_circulant:
        yield on(operator.output_shape, operator)
        return
    yield on(operator.torus(), operator) * operator.pad_norm() * (1 + ROUNDING)
    sizes = zip(operator.output_shape, operator.stride, operator.input_shape, strict=True)
    if operator.padding_mode == "circular" and all(s * (m - 1) < n for m, s, n in sizes):
        # Rows of the circulant matrix of stride 1, none of them twice.
        yield on(operator.input_shape, replace(operator, stride=(1,) * len(operator.stride)))


def _batch_norm(module: Any, shape: Shape) -> float:
    if module.training or module.running_var is None:
        raise ValueError("it normalises with the statistics of its batch, which has no bound; call model.eval()")
    scale = module.running_var.double().add(module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * evaluated_weight(module)
    return _up(scale.abs().amax(), 1, 1)


def _act_norm(module: Any, shape: Shape) -> float:
    if module.training and not module.initialized:
        raise ValueError("its scales are those of the first batch, which it has not seen")
    return _up(module.log_scale.double().amax().exp(), 1, 1)


def _prelu(module: nn.Module, shape: Shape) -> float:
    return max(1.0, float(evaluated_weight(module).abs().amax()))


# --- Layers without weights


_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def _dropout(module: Any, shape: Shape) -> float:
    """The mask is a constant here, whatever it is."""
    if not module.training:
        return 1.0
    return 0.0 if module.p == 1 else 1 / (1 - module.p) * (1 + ROUNDING)


def _alpha_dropout(module: nn.Module, shape: Shape) -> float:
    if module.training:
        raise ValueError("it has a bound in eval mode only")
    return 1.0


def _softplus(module: Any, shape: Shape) -> float:
    # Where it becomes linear it jumps by exp(-threshold) / beta: from 20 on that is less than rounding.
    return 1.0 if module.threshold >= 20 else math.inf


def _max_pool(module: Any, shape: Shape) -> float:
    """The root of how many windows share a pixel: so often its change can be the maximum's."""
    if module.return_indices:
        raise ValueError("it returns indices, which have no bound")
    n = next(n for n, kind in enumerate(_MAX_POOLS, start=1) if isinstance(module, kind))
    kernel, stride, dilation = (
        v if isinstance(v, tuple) else (v,) * n for v in (module.kernel_size, module.stride, module.dilation)
    )
    # Window i holds pixel i s + d j: those of one pixel have j that are s / gcd(s, d) apart.
    shared = (-(-k * math.gcd(s, d) // s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return _root(math.prod(shared))


def _adaptive_max_pool(module: nn.Module, shape: Shape) -> float:
    if shape is None:
        raise NeedsShape
    out = module(torch.empty(1, *shape, device="meta")).shape[1:]
    copies = 1
    for n, m in zip(shape[1:], out[1:], strict=True):
        count = torch.zeros(n)
        for i in range(m):
            count[i * n // m : -(-(i + 1) * n // m)] += 1
        copies *= int(count.max())
    return _root(copies)


def _weighted_sums(module: nn.Module, shape: Shape) -> float:
    r"""A linear layer (or one with a constant added) without negative weights: :math:`\sqrt{|A|_1 |A|_\infty}`.

    That is exact where all rows, and all columns, have the same sum.
    """
    if shape is None:
        raise NeedsShape
    with torch.enable_grad():
        ones = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
        image = module(ones)
        (columns,) = torch.autograd.grad(image.sum(), ones)
    rows = image.detach() - module(torch.zeros_like(ones)).detach()
    return _root(float(rows.amax() * columns.amax()) * (1 + ROUNDING * ones.numel()))


def _upsample(module: Any, shape: Shape) -> float:
    if module.mode == "bicubic":
        raise ValueError("bicubic weights are negative in part, and no bound is known")
    return _weighted_sums(module, shape)


def _root(x: float) -> float:
    """Rounded up, unless it is exact."""
    root = math.sqrt(x)
    return root if root * root == x else math.nextafter(root, math.inf)


def _constant(value: float) -> Callable[[Any, Shape], float]:
    return lambda module, shape: value


# --- Tables


ELEMENTWISE: dict[type[nn.Module], Callable[[Any, Shape], float]] = {
    **dict.fromkeys(
        (nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Tanhshrink, nn.Softshrink, nn.Softsign), _constant(1)
    ),
    nn.LogSigmoid: _constant(1),
    nn.Sigmoid: _constant(1 / 4),
    nn.Hardsigmoid: _constant(0.1666667),  # torch has 1 / 6 in float32
    nn.Hardswish: _constant(1.5),
    nn.SiLU: _constant(_SILU),
    nn.Mish: _constant(_MISH),
    nn.SELU: _constant(_SELU),
    nn.GELU: lambda module, shape: _GELU[module.approximate],
    nn.LeakyReLU: lambda module, shape: max(1.0, abs(module.negative_slope)),
    nn.RReLU: lambda module, shape: max(1.0, abs(module.lower), abs(module.upper)),
    nn.PReLU: _prelu,
    nn.ELU: lambda module, shape: max(1.0, abs(module.alpha)),
    # Of a negative alpha the slope is exp(x / alpha), x < 0.
    nn.CELU: lambda module, shape: 1.0 if module.alpha > 0 else math.inf,
    nn.Softplus: _softplus,
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _alpha_dropout),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    # The Jacobian is the covariance matrix of one draw.
    **dict.fromkeys((nn.Softmax, nn.Softmin, nn.Softmax2d), _constant(1 / 2)),
}

LAYERS: dict[type[nn.Module], Callable[[Any, Shape], float]] = {
    **ELEMENTWISE,
    nn.Linear: _linear,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), _convolution),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), _constant(1)),
    **dict.fromkeys(_MAX_POOLS, _max_pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive_max_pool),
    **dict.fromkeys(
        (
            *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
            *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
        ),
        _weighted_sums,
    ),
    **dict.fromkeys(
        (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), _constant(1)
    ),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _upsample),
    **dict.fromkeys((Permutation, Reshape, Squeeze), _constant(1)),
    ActNorm: _act_norm,
    InvertibleConv1x1: lambda module, shape: _matrix_norm(module.matrix()),
}
