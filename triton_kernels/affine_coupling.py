"""Affine coupling and its log-determinant on the GPU. Called by `pygen.ops.affine_coupling`; the formulas stand there
and in `pygen.reference.affine_coupling`, which every branch here mirrors.

A program takes a tile of samples times consecutive elements of a sample, writes y once and one partial log-determinant
per sample and tile. The partial sums are added in a fixed order afterwards: no atomics, the same bits every time.
"""

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.reference import SCALE_MAPS
from pygen.reference.affine_coupling import FREIA_ATAN_GAIN, join_halves, shift_gradient, split_halves
from pygen.reference.affine_coupling import NFLOWS_FLOOR as _FLOOR
from pygen.reference.affine_coupling import NFLOWS_SOFTPLUS_CEILING as _CEILING
from pygen.reference.affine_coupling import SIGMOID_OFFSET as _OFFSET
from pygen.triton_kernels import _common
from pygen.triton_kernels._math import atan, divide, exp, log, sigmoid_and_log, softplus, tanh_and_slope

SIGMOID_OFFSET = tl.constexpr(_OFFSET)
NFLOWS_FLOOR = tl.constexpr(_FLOOR)
NFLOWS_SOFTPLUS_CEILING = tl.constexpr(_CEILING)

# Elements of a tile, and of a thread: two 16-byte loads of float32 from each tensor. Half of both for float64.
TILE = 2048
SMALLEST_BLOCK = 256
PER_THREAD = 8
SAMPLE_DIMS = 3


@triton.jit
def _log_scale(a, gain, MAP: tl.constexpr, FAST: tl.constexpr):
    """(log s, s, d log s / da) of the raw scale a. What a kernel does not use is not computed."""
    if MAP == "exp":
        return a, exp(a, FAST), tl.zeros_like(a) + 1.0
    elif MAP == "tanh":
        log_s, slope = tanh_and_slope(a, FAST)
        return log_s, exp(log_s, FAST), slope
    elif MAP == "sigmoid":
        s, rest, log_s = sigmoid_and_log(a + SIGMOID_OFFSET, FAST)
        return log_s, s, rest
    elif MAP == "nflows":
        sigma, rest, _ = sigmoid_and_log(a + SIGMOID_OFFSET, FAST)
        s = sigma + NFLOWS_FLOOR
        return log(s, FAST), s, sigma * rest / s
    elif MAP == "softplus":
        free = softplus(a, FAST) + NFLOWS_FLOOR
        s = tl.where(free > NFLOWS_SOFTPLUS_CEILING, NFLOWS_SOFTPLUS_CEILING, free)
        sigma, _, _ = sigmoid_and_log(a, FAST)
        return log(s, FAST), s, tl.where(free <= NFLOWS_SOFTPLUS_CEILING, sigma / s, 0.0)
    else:
        tl.static_assert(MAP == "atan")
        log_s = gain * atan(a)
        return log_s, exp(log_s, FAST), gain / (1.0 + a * a)


@triton.jit
def _wide(x):
    """The type that x is computed in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _load(pointer, strides, samples, e, d1, d2, mask, DIMS: tl.constexpr):
    """Elements e of each sample, (S, BLOCK), widened: e counts a sample's elements in its (d0, d1, d2) order."""
    if DIMS == 1:
        at = e.to(tl.int64) * strides[3]
    elif DIMS == 2:
        at = (e // d2).to(tl.int64) * strides[2] + (e % d2).to(tl.int64) * strides[3]
    else:
        row = e // d2
        at = (row // d1).to(tl.int64) * strides[1] + (row % d1).to(tl.int64) * strides[2]
        at += (e % d2).to(tl.int64) * strides[3]
    return _wide(tl.load(pointer + (samples * strides[0])[:, None] + at[None, :], mask=mask, other=0.0))


@triton.jit
def _tile(batch, size, blocks, S: tl.constexpr, BLOCK: tl.constexpr, WIDE_INDEX: tl.constexpr):
    """(samples, elements, mask, block) of this program."""
    program = tl.program_id(0)
    block = program % blocks
    samples = (program // blocks).to(tl.int64) * S + tl.arange(0, S)
    # Division is several times cheaper in 32 bits, and enough for a sample of fewer than 2^31 elements.
    start = (block.to(tl.int64) if WIDE_INDEX else block) * BLOCK
    e = start + tl.arange(0, BLOCK)
    return samples, e, (samples < batch)[:, None] & (e < size)[None, :], block


@triton.jit
def _gain(high, low, like):
    """The atan map's gain: kernel arguments are float32, so a float64 arrives in two parts."""
    return tl.zeros_like(like) + high + low


@triton.jit
def affine_coupling_kernel(
    x_pointer,
    scale_pointer,
    shift_pointer,
    y_pointer,
    sums_pointer,
    batch,
    size,
    blocks,
    d1,
    d2,
    gain_high,
    gain_low,
    y_stride,
    x_strides,
    scale_strides,
    shift_strides,
    MAP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    DIMS: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y: (batch, size), a sample contiguous, sums: (batch, blocks) partial log-determinants."""
    samples, e, mask, block = _tile(batch, size, blocks, S, BLOCK, WIDE_INDEX)
    x = _load(x_pointer, x_strides, samples, e, d1, d2, mask, DIMS)
    a = _load(scale_pointer, scale_strides, samples, e, d1, d2, mask, DIMS)
    t = _load(shift_pointer, shift_strides, samples, e, d1, d2, mask, DIMS)
    log_s, s, _ = _log_scale(a, _gain(gain_high, gain_low, a), MAP, FAST)
    if INVERSE:
        y = divide(x, s, FAST) - t if SHIFT_FIRST else divide(x - t, s, FAST)
        log_s = -log_s
    else:
        y = (x + t) * s if SHIFT_FIRST else x * s + t
    tl.store(y_pointer + (samples * y_stride)[:, None] + e[None, :], y, mask=mask)
    total = tl.sum(tl.where(mask, log_s, 0.0), 1)
    tl.store(sums_pointer + samples * blocks + block, total, mask=samples < batch)


@triton.jit
def affine_coupling_backward_kernel(
    grad_y_pointer,
    grad_log_det_pointer,
    x_pointer,
    scale_pointer,
    shift_pointer,
    grad_x_pointer,
    grad_scale_pointer,
    grad_shift_pointer,
    batch,
    size,
    blocks,
    d1,
    d2,
    gain_high,
    gain_low,
    grad_x_stride,
    grad_parameters_stride,
    grad_log_det_stride,
    grad_y_strides,
    x_strides,
    scale_strides,
    shift_strides,
    MAP: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    INVERSE: tl.constexpr,
    FAST: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    DIMS: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x, grad_scale, and grad_shift if it is wanted: (batch, size), a sample contiguous. An incoming gradient that
    is None is zero and is not read."""
    samples, e, mask, _ = _tile(batch, size, blocks, S, BLOCK, WIDE_INDEX)
    a = _load(scale_pointer, scale_strides, samples, e, d1, d2, mask, DIMS)
    _, s, slope = _log_scale(a, _gain(gain_high, gain_low, a), MAP, FAST)
    grad_x_at = (samples * grad_x_stride)[:, None] + e[None, :]
    parameters_at = (samples * grad_parameters_stride)[:, None] + e[None, :]
    grad_a = tl.zeros_like(a)
    if grad_y_pointer is None:
        tl.store(grad_x_pointer + grad_x_at, grad_a, mask=mask)
        if grad_shift_pointer is not None:
            tl.store(grad_shift_pointer + parameters_at, grad_a, mask=mask)
    else:
        g = _load(grad_y_pointer, grad_y_strides, samples, e, d1, d2, mask, DIMS)
        # w is the factor that s multiplies; the shift is in it only if it was added before scaling.
        w = _load(x_pointer, x_strides, samples, e, d1, d2, mask, DIMS)
        if SHIFT_FIRST != INVERSE:
            t = _load(shift_pointer, shift_strides, samples, e, d1, d2, mask, DIMS)
            w = w - t if INVERSE else w + t
        grad_x = divide(g, s, FAST) if INVERSE else g * s
        tl.store(grad_x_pointer + grad_x_at, grad_x, mask=mask)
        if grad_shift_pointer is not None:
            grad_t = grad_x if SHIFT_FIRST != INVERSE else g
            tl.store(grad_shift_pointer + parameters_at, -grad_t if INVERSE else grad_t, mask=mask)
        grad_a = grad_x * w
    if grad_log_det_pointer is not None:
        per_sample = tl.load(grad_log_det_pointer + samples * grad_log_det_stride, mask=samples < batch, other=0.0)
        grad_a += per_sample.to(a.dtype)[:, None]
    grad_a = (-grad_a if INVERSE else grad_a) * slope
    tl.store(grad_scale_pointer + parameters_at, grad_a, mask=mask)


class _Plan(NamedTuple):
    """How samples of one shape are walked: the batch, then up to three dimensions of a sample."""

    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int, int, int]  # batch, elements of a sample, blocks of a sample, d1, d2
    strides: list[tuple[int, ...]]  # per tensor: batch, d0, d1, d2
    programs: int
    constants: dict
    num_warps: int


def _plan(*tensors: Tensor | None) -> _Plan:
    given = [t for t in tensors if t is not None]
    batch, *sample = given[0].shape
    shape, strides = _common.collapse(sample, *(t.stride()[1:] for t in given))
    if len(shape) > SAMPLE_DIMS:
        # Layouts that do not merge into three dimensions: rare, and not worth a slower kernel for all.
        return _plan(*(t if t is None else t.contiguous() for t in tensors))
    size = given[0].numel() // batch
    double = given[0].dtype == torch.float64
    tile = TILE // 2 if double else TILE
    block = min(tile, triton.next_power_of_2(size))
    samples = min(tile // block, triton.next_power_of_2(batch))
    samples = _common.shrink_until_enough(samples, batch, triton.cdiv(size, block))
    if samples == 1 and block > SMALLEST_BLOCK:
        block = max(SMALLEST_BLOCK, _common.shrink_until_enough(block, size, batch))
    blocks = triton.cdiv(size, block)
    walks = iter([(t.stride(0), *_common.pad_front(s, 3, 0)) for t, s in zip(given, strides, strict=True)])
    constants = {
        "FAST": given[0].dtype in _common.SIXTEEN_BIT,
        "WIDE_INDEX": size + block >= 2**31,
        "DIMS": max(1, len(shape)),
        "S": samples,
        "BLOCK": block,
    }
    return _Plan(
        tensors,
        (batch, size, blocks, *_common.pad_front(shape, 3, 1)[1:]),
        [(0, 0, 0, 0) if t is None else next(walks) for t in tensors],
        triton.cdiv(batch, samples) * blocks,
        constants,
        _common.warps_for(samples * block, PER_THREAD // 2 if double else PER_THREAD),
    )


def _split_gain(scale_map: str, clamp: float) -> tuple[float, float]:
    """(high, low), float32 both, with high + low = clamp * 0.636 in float64, for the map that has a clamp."""
    if scale_map != "atan":
        return 0.0, 0.0
    gain = clamp * FREIA_ATAN_GAIN
    high = ctypes.c_float(gain).value
    return high, gain - high


def _check(x: Tensor, scale_map: str) -> None:
    if x.dim() == 0:
        raise RuntimeError("affine_coupling: x must have at least one dimension, the batch, got a scalar")
    if scale_map not in SCALE_MAPS:
        maps = ", ".join(SCALE_MAPS)
        raise RuntimeError(f'affine_coupling: scale_map must be one of {maps}, got "{scale_map}"')


def _options(plan: _Plan, scale_map: str, shift_first: bool, inverse: bool) -> dict:
    return {"MAP": scale_map, "SHIFT_FIRST": shift_first, "INVERSE": inverse, **plan.constants}


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _common.SIXTEEN_BIT else x.dtype


def _forward_into(
    y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, scale_map: str, shift_first: bool, clamp: float, inverse: bool
) -> Tensor:
    """Writes y, like x with contiguous samples, and returns log_det (B,)."""
    if x.numel() == 0:
        return torch.zeros(x.size(0), dtype=_sum_dtype(x), device=x.device)
    plan = _plan(x, scale, shift)
    batch, _, blocks, _, _ = plan.sizes
    sums = torch.empty((batch, blocks), dtype=_sum_dtype(x), device=x.device)
    gain = _split_gain(scale_map, clamp)
    args = (*plan.tensors, y, sums, *plan.sizes, *gain, y.stride(0), *plan.strides)
    options = _options(plan, scale_map, shift_first, inverse)
    _common.launch(affine_coupling_kernel, plan.programs, x, args, options, plan.num_warps)
    # torch sums a dimension in an order that depends on the shape alone.
    return sums.view(batch) if blocks == 1 else sums.sum(1)


def _backward_into(
    grad_x: Tensor,
    grad_scale: Tensor,
    grad_shift: Tensor | None,
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_map: str,
    shift_first: bool,
    clamp: float,
    inverse: bool,
) -> None:
    """Writes the gradients, like x with contiguous samples; the parameters' have one stride between samples."""
    if x.numel() == 0:
        return
    plan = _plan(grad_y, x, scale, shift)
    grad_y, *rest = plan.tensors
    gain = _split_gain(scale_map, clamp)
    strides = (grad_x.stride(0), grad_scale.stride(0), 0 if grad_log_det is None else grad_log_det.stride(0))
    results = (grad_x, grad_scale, grad_shift)
    args = (grad_y, grad_log_det, *rest, *results, *plan.sizes, *gain, *strides, *plan.strides)
    options = _options(plan, scale_map, shift_first, inverse)
    _common.launch(affine_coupling_backward_kernel, plan.programs, x, args, options, plan.num_warps)


def affine_coupling(
    x: Tensor, scale: Tensor, shift: Tensor, scale_map: str, shift_first: bool, clamp: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.affine_coupling` on a GPU: (y like x, contiguous; log_det (B,)), any strides."""
    _check(x, scale_map)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parameters = scale.expand_as(x), shift.expand_as(x)
    return y, _forward_into(y, x, *parameters, scale_map, shift_first, clamp, inverse)


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_map: str,
    shift_first: bool,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.affine_coupling_backward` on a GPU: (grad_x, grad_scale), both contiguous, like x and scale."""
    _check(x, scale_map)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_scale = torch.empty(x.shape, dtype=scale.dtype, device=x.device)
    grad_y = None if grad_y is None else grad_y.expand_as(x)
    given = (grad_y, grad_log_det, x, scale.expand_as(x), shift.expand_as(x))
    _backward_into(grad_x, grad_scale, None, *given, scale_map, shift_first, clamp, inverse)
    return grad_x, grad_scale


# ---- by halves -------------------------------------------------------------------------------------------------------
# The kernels write the active half of every sample where it belongs, torch copies the passive half. Where dimensions
# in front of the split one cut a sample's half into pieces, torch.cat puts it together.


def _in_one_piece(x: Tensor, dim: int) -> bool:
    """Whether each half of a sample is contiguous memory in a contiguous tensor."""
    return all(size == 1 for size in x.shape[1 : dim % x.dim()])


def affine_coupling_halves(
    x: Tensor,
    parameters: Tensor,
    dim: int,
    swap: bool,
    scale_map: str,
    shift_first: bool,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.affine_coupling_halves` on a GPU: (z like x, contiguous; log_det (B,)), any strides."""
    _check(x, scale_map)
    passive, active = split_halves(x, dim, swap)
    scale, shift = parameters.chunk(2, dim)
    options = (scale_map, shift_first, clamp, inverse)
    if not _in_one_piece(x, dim):
        y, log_det = affine_coupling(active, scale, shift, *options)
        return join_halves(passive, y, dim, swap), log_det
    z = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z_passive, z_active = split_halves(z, dim, swap)
    z_passive.copy_(passive)
    return z, _forward_into(z_active, active, scale, shift, *options)


def affine_coupling_halves_backward(
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    parameters: Tensor,
    dim: int,
    swap: bool,
    scale_map: str,
    shift_first: bool,
    clamp: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.affine_coupling_halves_backward` on a GPU: (grad_x, grad_parameters), contiguous."""
    _check(x, scale_map)
    _, active = split_halves(x, dim, swap)
    given = (grad_log_det, active, *parameters.chunk(2, dim))
    passive_grad, grad_y = (None, None) if grad_z is None else split_halves(grad_z, dim, swap)
    options = (scale_map, shift_first, clamp, inverse)
    if not _in_one_piece(x, dim):
        grad_active, grad_scale = affine_coupling_backward(grad_y, *given, *options)
        grad_shift = torch.zeros_like(grad_scale)
        if grad_y is not None:
            grad_shift = shift_gradient(grad_y, grad_active, shift_first, inverse)
        passive_grad = x.new_zeros(()).expand_as(split_halves(x, dim, swap)[0]) if grad_z is None else passive_grad
        return join_halves(passive_grad, grad_active, dim, swap), torch.cat((grad_scale, grad_shift), dim)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_parameters = torch.empty(parameters.shape, dtype=parameters.dtype, device=x.device)
    to_passive, to_active = split_halves(grad_x, dim, swap)
    if passive_grad is None:
        to_passive.zero_()
    else:
        to_passive.copy_(passive_grad)
    _backward_into(to_active, *grad_parameters.chunk(2, dim), grad_y, *given, *options)
    return grad_x, grad_parameters
