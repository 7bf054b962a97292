"""The monotonic rational-quadratic spline on the GPU. Called by `pygen.ops.rational_quadratic_spline`; the formulas
stand there and in `pygen.reference.rational_quadratic_spline`, which every step here mirrors.

A program takes BLOCK elements and holds their K bins in a tile (BINS, BLOCK). Every parameter is read once, but of the
derivatives only the two at the chosen bin's knots; every gradient is written once.

Same bits in every layout. A sum over bins of floats would depend on how the compiler spreads a tile over threads, which
depends on strides. So the softmax's exponentials are summed as integers, in units of 2^-b (`UNIT`), which is exact in
any order; all other sums over bins have one term that is not zero. The knots come from these integer sums, so they are
in order, and symmetric: a knot is B (2 before - total) / total, whose difference is exact as well.

One thread for each element. A thread that holds all bins of its element sums them without talking to another, and
computes its element once. Triton would rather spread a row of bins over lanes, where it sees that they lie side by
side: hence strides arrive negated, as 1 would be compiled in as a constant. What the lanes then read is not coalesced
for rows of bins, but comes from L1, as each line is used by the next bins' loads. Gradients are contiguous, and Triton
reorders the tile in shared memory before it writes them.
"""

import ctypes
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.reference.rational_quadratic_spline import derivative_count
from pygen.triton_kernels import _common
from pygen.triton_kernels._math import divide, exp_of_negative, log, sigmoid_and_log

# Elements of a program, at most and at least. Triton's interpreter takes as long for few as for many.
BLOCK = 128
SMALLEST_BLOCK = 128 if _common.interpreted else 32
# Bytes of a tile that one thread holds: with more, the backward pass spills.
PER_THREAD = 64
NARROW_WARP = 32
# 16-bit tensors are computed in float32.
NARROWEST = 4
LEADING_DIMS = 3

# 16 exponentials in units of 2^-26 fit into 31 bits, and round as float32 does. More of them, and float64, take 63.
NARROW_SUM_BINS = 16

# How many numbers `_numbers` passes to a kernel.
NUMBERS = tl.constexpr(6)


@triton.jit
def _wide(x):
    """The type that x is computed in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _number(parts, i, like):
    """Number i of `_numbers`. Kernel arguments are float32, so a float64 arrives in three parts."""
    number = tl.cast(parts[i], like.dtype)
    if like.dtype == tl.float64:
        number += tl.cast(parts[i + NUMBERS], like.dtype) + tl.cast(parts[i + 2 * NUMBERS], like.dtype)
    return number


@triton.jit
def _at(pointer, back, e, d1, d2, DIMS: tl.constexpr):
    """Where the elements e lie, which are counted in (d0, d1, d2) order; back: the strides, negated."""
    if DIMS == 1:
        return pointer - e.to(tl.int64) * back[2]
    elif DIMS == 2:
        return pointer - (e // d2).to(tl.int64) * back[1] - (e % d2).to(tl.int64) * back[2]
    else:
        row = e // d2
        outer = pointer - (row // d1).to(tl.int64) * back[0] - (row % d1).to(tl.int64) * back[1]
        return outer - (e % d2).to(tl.int64) * back[2]


@triton.jit
def _load(pointer, back, e, d1, d2, present, DIMS: tl.constexpr):
    return _wide(tl.load(_at(pointer, back, e, d1, d2, DIMS), mask=present, other=0.0))


@triton.jit
def _axis(row, back, k, present, K: tl.constexpr, UNIT: tl.constexpr, WIDE_SUM: tl.constexpr, FAST: tl.constexpr):
    """One axis: (e^(raw - max), the same in integer units, both (BINS, BLOCK); their integer sum, 1 / sum)."""
    inside = (k < K)[:, None] & present[None, :]
    raw = _wide(tl.load(row[None, :] - (k.to(tl.int64) * back)[:, None], mask=inside, other=float("-inf")))
    # Softmax cannot normalise a row with a NaN, with +inf, or of -inf alone: its size is NaN, all else stays finite.
    top = tl.max(tl.where(raw == raw, raw, float("inf")), 0)
    e = exp_of_negative(raw - top[None, :], FAST)
    units = (e * UNIT + 0.5).to(tl.int64 if WIDE_SUM else tl.int32)
    total = tl.sum(units, 0)
    one = tl.full(total.shape, 1.0, raw.dtype)
    inverse = tl.where(tl.abs(top) < float("inf"), divide(one, total.to(raw.dtype), FAST), float("nan"))
    return e, units, total, inverse


@triton.jit
def _knot(bin, before, axis, lengths, K: tl.constexpr):
    """Where a bin starts, of the units before it: B m (2 bin - K) + B (1 - K m) (2 before - total) / total."""
    floor, span = lengths
    total, inverse = axis[2], axis[3]
    return floor * (2 * bin - K).to(floor.dtype) + span * inverse * (before - (total - before)).to(floor.dtype)


@triton.jit
def _find(at, k, axis, lengths, K: tl.constexpr):
    """The bin that holds each of `at` (BLOCK,)."""
    before = tl.cumsum(axis[1], 0) - axis[1]
    passed = (at[None, :] >= _knot(k[:, None], before, axis, lengths, K)) & ((k > 0) & (k < K))[:, None]
    return tl.sum(passed.to(tl.int32), 0)


@triton.jit
def _pick(index, k, axis, lengths, bound, K: tl.constexpr, UNIT: tl.constexpr):
    """Of the chosen bin: (start, size, softmax of all before it, its own)."""
    e, units, total, inverse = axis
    before = tl.sum(tl.where(k[:, None] < index[None, :], units, 0), 0)
    probability = tl.sum(tl.where(k[:, None] == index[None, :], e, 0.0), 0) * (UNIT * inverse)
    start = tl.where(index == 0, -bound, _knot(index, before, axis, lengths, K))
    size = 2.0 * (lengths[0] + lengths[1] * probability)
    return start, size, before.to(e.dtype) * inverse, probability


@triton.jit
def _knots(index, K: tl.constexpr, TAILS: tl.constexpr):
    """(place among the raw derivatives, whether there is one) of the chosen bin's left knot, and of its right one."""
    if TAILS == "linear":
        return index - 1, index > 0, index, index < K - 1
    elif TAILS == "circular":
        return index, index >= 0, tl.where(index < K - 1, index + 1, 0), index >= 0
    else:
        tl.static_assert(TAILS == "none")
        return index, index >= 0, index + 1, index >= 0


@triton.jit
def _slope(row, back, place, free, present, smallest):
    """(dy/dx at a knot, its derivative by the raw one); 1 and 0 where the knot is not free.

    Two for each element, so they are accurate even for 16-bit tensors, whose log_abs_det is float32.
    """
    raw = _wide(tl.load(row - place.to(tl.int64) * back, mask=free & present, other=0.0))
    # softplus(raw) = -log sigmoid(-raw)
    _, sigma, log_sigmoid = sigmoid_and_log(-raw, False)
    return tl.where(free, smallest - log_sigmoid, 1.0), tl.where(free, sigma, 0.0)


@triton.jit
def _clamp(x, low, high):
    """As torch's: NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _solve(r, s, left, right, FAST: tl.constexpr):
    """xi where the spline has risen by the share r of its bin's height, by the root whose terms do not cancel."""
    bend = left + right - 2.0 * s
    a, b = s - left + r * bend, left - r * bend
    square = b * b + 4.0 * a * s * r
    square = tl.where(square < 0, 0.0, square)
    root = tl.sqrt(square) if FAST or square.dtype == tl.float64 else tl.sqrt_rn(square)
    first = b >= 0
    return divide(tl.where(first, 2.0 * s * r, root - b), tl.where(first, b + root, 2.0 * a), FAST)


@triton.jit
def _locate(
    x,
    rows,
    backs,
    k,
    present,
    numbers,
    INVERSE: tl.constexpr,
    TAILS: tl.constexpr,
    FAST: tl.constexpr,
    WIDE_SUM: tl.constexpr,
    UNIT: tl.constexpr,
    K: tl.constexpr,
):
    """The bin of x, or of y = x for the inverse: (bound, clamped x, index, xi, horizontal, vertical, knots).

    horizontal, vertical: (axis, lengths, picked) as of `_axis` and `_pick`; knots: (left, right), each as of `_slope`.
    """
    bound, smallest = _number(numbers, 0, x), _number(numbers, 5, x)
    lengths_x = (_number(numbers, 1, x), _number(numbers, 2, x))
    lengths_y = (_number(numbers, 3, x), _number(numbers, 4, x))
    clamped = _clamp(x, -bound, bound)
    axis_x = _axis(rows[0], backs[0], k, present, K, UNIT, WIDE_SUM, FAST)
    axis_y = _axis(rows[1], backs[1], k, present, K, UNIT, WIDE_SUM, FAST)
    index = _find(clamped, k, axis_y, lengths_y, K) if INVERSE else _find(clamped, k, axis_x, lengths_x, K)
    picked_x = _pick(index, k, axis_x, lengths_x, bound, K, UNIT)
    picked_y = _pick(index, k, axis_y, lengths_y, bound, K, UNIT)
    left_place, left_free, right_place, right_free = _knots(index, K, TAILS)
    left = _slope(rows[2], backs[2], left_place, left_free, present, smallest)
    right = _slope(rows[2], backs[2], right_place, right_free, present, smallest)
    if INVERSE:
        r = _clamp(divide(clamped - picked_y[0], picked_y[1], FAST), 0.0, 1.0)
        xi = _solve(r, divide(picked_y[1], picked_x[1], FAST), left[0], right[0], FAST)
    else:
        xi = divide(clamped - picked_x[0], picked_x[1], FAST)
    # At the bounds and beyond, the slope is the end knot's to the last bit.
    xi = tl.where(x >= bound, 1.0, tl.where(x <= -bound, 0.0, _clamp(xi, 0.0, 1.0)))
    return bound, clamped, index, xi, (axis_x, lengths_x, picked_x), (axis_y, lengths_y, picked_y), (left, right)


@triton.jit
def _elements(count, WIDE_INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """(elements, which of them there are) of this program."""
    program = tl.program_id(0)
    # Division is several times cheaper in 32 bits.
    e = (program.to(tl.int64) if WIDE_INDEX else program) * BLOCK + tl.arange(0, BLOCK)
    return e, e < count


@triton.jit
def rational_quadratic_spline_kernel(
    x_pointer,
    widths_pointer,
    heights_pointer,
    derivatives_pointer,
    y_pointer,
    log_det_pointer,
    count,
    d1,
    d2,
    numbers,
    x_back,
    widths_back,
    heights_back,
    derivatives_back,
    INVERSE: tl.constexpr,
    TAILS: tl.constexpr,
    FAST: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    WIDE_SUM: tl.constexpr,
    UNIT: tl.constexpr,
    DIMS: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y, log_det: (count,) contiguous."""
    e, present = _elements(count, WIDE_INDEX, BLOCK)
    k = tl.arange(0, BINS)
    x = _load(x_pointer, x_back, e, d1, d2, present, DIMS)
    rows = (
        _at(widths_pointer, widths_back, e, d1, d2, DIMS),
        _at(heights_pointer, heights_back, e, d1, d2, DIMS),
        _at(derivatives_pointer, derivatives_back, e, d1, d2, DIMS),
    )
    backs = (widths_back[3], heights_back[3], derivatives_back[3])
    bound, clamped, _, xi, horizontal, vertical, knots = _locate(
        x, rows, backs, k, present, numbers, INVERSE, TAILS, FAST, WIDE_SUM, UNIT, K
    )
    start, width, _, _ = horizontal[2]
    base, height, _, _ = vertical[2]
    left, right = knots[0][0], knots[1][0]
    s = divide(height, width, FAST)
    p = xi * (1.0 - xi)
    den = s + (left + right - 2.0 * s) * p
    ratio = divide(s, den, FAST)
    slope = ratio * (ratio * (right * xi * xi + 2.0 * s * p + left * (1.0 - xi) * (1.0 - xi)))
    y = start + width * xi if INVERSE else base + height * divide(s * xi * xi + left * p, den, FAST)
    # The bounds are mapped to themselves, exactly; beyond them the spline goes straight on.
    outside = tl.abs(x) >= bound
    y = _clamp(y, -bound, bound)
    if TAILS == "none":
        end = tl.where(x > 0, right, left)
        beyond = x - clamped
        y = tl.where(outside, clamped + (divide(beyond, end, FAST) if INVERSE else beyond * end), y)
    else:
        y = tl.where(outside, x, y)
        # A circular spline has a slope of its own at the bounds.
        slope = tl.where(outside if TAILS == "linear" else tl.abs(x) > bound, 1.0, slope)
    log_slope = log(slope, False)
    tl.store(y_pointer + e, y, mask=present)
    tl.store(log_det_pointer + e, -log_slope if INVERSE else log_slope, mask=present)


@triton.jit
def _store_sizes(pointer, e, k, index, located, grad_start, grad_size, present, K: tl.constexpr, UNIT: tl.constexpr):
    """The raw sizes' gradients, (count, K) contiguous, from those of the chosen bin's start (all before it) and size.

    span p_k (g_k - sum_j p_j g_j), span = 2 B (1 - K m).
    """
    axis, (_, span), picked = located
    mean = grad_start * picked[2] + grad_size * picked[3]
    here = index[None, :]
    grad = tl.where(k[:, None] < here, grad_start[None, :], tl.where(k[:, None] == here, grad_size[None, :], 0.0))
    grad = (2.0 * span * (UNIT * axis[3]))[None, :] * axis[0] * (grad - mean[None, :])
    at = pointer + (e.to(tl.int64) * K)[None, :] + k[:, None]
    tl.store(at, grad, mask=(k < K)[:, None] & present[None, :])


@triton.jit
def _store_derivatives(
    pointer, e, k, index, grad_left, grad_right, present, K: tl.constexpr, COUNT: tl.constexpr, TAILS: tl.constexpr
):
    """The raw derivatives' gradients, (count, COUNT) contiguous: zero but at the chosen bin's knots."""
    left_place, _, right_place, _ = _knots(index, K, TAILS)
    grad = tl.where(k[:, None] == left_place[None, :], grad_left[None, :], 0.0)
    # Both may be the same one: a circle of one bin has one knot.
    grad += tl.where(k[:, None] == right_place[None, :], grad_right[None, :], 0.0)
    row = pointer + e.to(tl.int64) * COUNT
    tl.store(row[None, :] + k[:, None], grad, mask=(k < min(COUNT, K))[:, None] & present[None, :])
    if COUNT > K:
        # One more than there are bins: a tile of the next power of two would be half empty.
        tl.store(row + K, tl.where(index == K - 1, grad_right, 0.0), mask=present)


@triton.jit
def rational_quadratic_spline_backward_kernel(
    grad_y_pointer,
    grad_log_det_pointer,
    x_pointer,
    widths_pointer,
    heights_pointer,
    derivatives_pointer,
    grad_x_pointer,
    grad_widths_pointer,
    grad_heights_pointer,
    grad_derivatives_pointer,
    count,
    d1,
    d2,
    numbers,
    grad_y_back,
    grad_log_det_back,
    x_back,
    widths_back,
    heights_back,
    derivatives_back,
    INVERSE: tl.constexpr,
    TAILS: tl.constexpr,
    FAST: tl.constexpr,
    WIDE_INDEX: tl.constexpr,
    WIDE_SUM: tl.constexpr,
    UNIT: tl.constexpr,
    DIMS: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    """All gradients contiguous, COUNT of derivatives. An incoming gradient that is None is zero and is not read."""
    e, present = _elements(count, WIDE_INDEX, BLOCK)
    k = tl.arange(0, BINS)
    x = _load(x_pointer, x_back, e, d1, d2, present, DIMS)
    rows = (
        _at(widths_pointer, widths_back, e, d1, d2, DIMS),
        _at(heights_pointer, heights_back, e, d1, d2, DIMS),
        _at(derivatives_pointer, derivatives_back, e, d1, d2, DIMS),
    )
    backs = (widths_back[3], heights_back[3], derivatives_back[3])
    bound, clamped, index, xi, horizontal, vertical, knots = _locate(
        x, rows, backs, k, present, numbers, INVERSE, TAILS, FAST, WIDE_SUM, UNIT, K
    )
    if grad_y_pointer is None:
        grad_y = tl.zeros_like(x)
    else:
        grad_y = _load(grad_y_pointer, grad_y_back, e, d1, d2, present, DIMS)
    if grad_log_det_pointer is None:
        g_log = tl.zeros_like(x)
    else:
        g_log = _load(grad_log_det_pointer, grad_log_det_back, e, d1, d2, present, DIMS)
    width, height = horizontal[2][1], vertical[2][1]
    left, right = knots[0][0], knots[1][0]
    s = divide(height, width, FAST)
    rest = 1.0 - xi
    p, q = xi * rest, rest - xi
    bend = left + right - 2.0 * s
    den, m = s + bend * p, right * xi * xi + 2.0 * s * p + left * rest * rest
    per_den, per_m = 1.0 / den, 1.0 / m
    ratio = s * per_den
    rising = ratio * (ratio * m)
    log_by_xi = 2.0 * (right * xi + s * q - left * rest) * per_m - 2.0 * bend * q * per_den
    inside = ~(tl.abs(x) > bound)
    g, g_log_inside = grad_y, tl.where(inside, g_log, 0.0)
    if INVERSE:
        # Where x = f^-1(y) receives g, f receives -g / f' at x, and y receives g / f'.
        grad_x = (g - g_log_inside * log_by_xi / width) / rising
        g, g_log, g_log_inside = -grad_x, -g_log, -g_log_inside
    g_inside = tl.where(inside, g, 0.0)
    share = (s * xi * xi + left * p) * per_den
    g_height = g_inside * height
    by_xi = g_inside * width * rising + g_log_inside * log_by_xi
    by_slope = g_height * (xi * xi - share * (1.0 - 2.0 * p)) * per_den
    by_slope += 2.0 * g_log_inside * (1.0 / s + p * per_m - (1.0 - 2.0 * p) * per_den)
    by_left = g_height * p * (1.0 - share) * per_den + g_log_inside * (rest * rest * per_m - 2.0 * p * per_den)
    by_right = -g_height * share * p * per_den + g_log_inside * (xi * xi * per_m - 2.0 * p * per_den)
    if TAILS == "none":
        # Straight on with the slope of the end knot, which is m there.
        by_end = g * (x - clamped) / rising if INVERSE else g * (x - clamped)
        by_end += g_log * per_m
        by_left += tl.where(x < -bound, by_end, 0.0)
        by_right += tl.where(x > bound, by_end, 0.0)
    if not INVERSE:
        grad_x = tl.where(inside, by_xi / width, g * rising if TAILS == "none" else grad_y)
    elif TAILS != "none":
        grad_x = tl.where(inside, grad_x, grad_y)
    tl.store(grad_x_pointer + e, grad_x, mask=present)
    _store_sizes(
        grad_widths_pointer,
        e,
        k,
        index,
        horizontal,
        -by_xi / width,
        -(xi * by_xi + s * by_slope) / width,
        present,
        K,
        UNIT,
    )
    _store_sizes(
        grad_heights_pointer, e, k, index, vertical, g_inside, g_inside * share + by_slope / width, present, K, UNIT
    )
    grad_left, grad_right = by_left * knots[0][1], by_right * knots[1][1]
    _store_derivatives(grad_derivatives_pointer, e, k, index, grad_left, grad_right, present, K, COUNT, TAILS)


class _Plan(NamedTuple):
    """How elements of one shape are walked: up to three dimensions, then the bins of each tensor that has them."""

    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int]  # elements, d1, d2
    backs: list[tuple[int, ...]]  # per tensor: d0, d1, d2, bins; strides, negated
    programs: int
    constants: dict
    num_warps: int


def _tile(count: int, bins: int, per_thread: int) -> tuple[int, int]:
    """(elements of a program, warps), for `bins` bins in the tile and `per_thread` of them in a thread."""
    warp = _common.warp_size
    if bins > per_thread:
        # Lanes of one warp share an element, or several warps if they must. More elements than one warp's would be
        # spread over lanes first and their bins over warps, which exchange sums much slower. A warp of 64 holds no more
        # than one of 32: comparisons with every bin fill AMD's scalar registers.
        block = max(1, NARROW_WARP * per_thread // bins)
        return block, block * bins // (NARROW_WARP * per_thread)
    # Fewer elements than lanes of a warp would leave the others idle.
    block = max(warp, SMALLEST_BLOCK, _common.shrink_until_enough(BLOCK, count))
    return block, block // warp


def _plan(x: Tensor, bins: int, *tensors: Tensor | None) -> _Plan:
    """tensors: x's dimensions, and one more for bins."""
    given = [t for t in tensors if t is not None]
    rank = x.dim()
    shape, strides = _common.collapse(x.shape, *(t.stride()[:rank] for t in given))
    if len(shape) > LEADING_DIMS:
        # Layouts that do not merge into three dimensions: rare, and not worth a slower kernel for all.
        return _plan(x, bins, *(t if t is None else t.contiguous() for t in tensors))
    count, padded = x.numel(), triton.next_power_of_2(bins)
    block, num_warps = _tile(count, padded, PER_THREAD // max(NARROWEST, x.element_size()))
    walks = iter(
        [
            tuple(-step for step in (*_common.pad_front(s, LEADING_DIMS, 0), *t.stride()[rank:]))
            for t, s in zip(given, strides, strict=True)
        ]
    )
    wide_sum = x.dtype == torch.float64 or padded > NARROW_SUM_BINS
    constants = {
        "FAST": x.dtype in _common.SIXTEEN_BIT,
        "WIDE_INDEX": count + block >= 2**31,
        "WIDE_SUM": wide_sum,
        "UNIT": 2.0 ** (62 if wide_sum else 30) / padded,
        "DIMS": max(1, len(shape)),
        "K": bins,
        "BINS": padded,
        "BLOCK": block,
    }
    return _Plan(
        tensors,
        (count, *_common.pad_front(shape, LEADING_DIMS, 1)[1:]),
        [(0,) * LEADING_DIMS if t is None else next(walks) for t in tensors],
        triton.cdiv(count, block),
        constants,
        num_warps,
    )


def _numbers(
    bins: int, tail_bound: float, min_bin_width: float, min_bin_height: float, min_derivative: float
) -> tuple[float, ...]:
    """B, then B m and B (1 - K m) of widths and of heights, then the smallest derivative; each the sum of three float32
    numbers, all first parts first: one holds 24 of a float64's 53 bits."""
    rest = [tail_bound]
    for smallest in (min_bin_width, min_bin_height):
        rest += [tail_bound * smallest, tail_bound * (1 - bins * smallest)]
    rest.append(min_derivative)
    parts: list[float] = []
    for _ in range(3):
        rounded = [ctypes.c_float(number).value for number in rest]
        rest = [number - part for number, part in zip(rest, rounded, strict=True)]
        parts += rounded
    return tuple(parts)


def _empty(x: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=x.device)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    inverse: bool,
    tails: str,
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.rational_quadratic_spline` on a GPU: (y, log_abs_det), contiguous; any strides."""
    bins = widths.size(-1)
    derivative_count(bins, tails)
    y, log_det = _empty(x, x), _empty(x, x, torch.float32 if x.dtype in _common.SIXTEEN_BIT else x.dtype)
    if x.numel() == 0:
        return y, log_det
    plan = _plan(x, bins, x, widths, heights, derivatives)
    numbers = _numbers(bins, tail_bound, min_bin_width, min_bin_height, min_derivative)
    args = (*plan.tensors, y, log_det, *plan.sizes, numbers, *plan.backs)
    options = {"INVERSE": inverse, "TAILS": tails, **plan.constants}
    _common.launch(rational_quadratic_spline_kernel, plan.programs, x, args, options, plan.num_warps)
    return y, log_det


def rational_quadratic_spline_backward(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    inverse: bool,
    tails: str,
    tail_bound: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.pygen.rational_quadratic_spline_backward` on a GPU: gradients of the four tensors, contiguous."""
    bins = widths.size(-1)
    of_derivatives = derivative_count(bins, tails)
    grads = _empty(x, x), _empty(x, widths), _empty(x, heights), _empty(x, derivatives)
    if x.numel() == 0:
        return grads
    plan = _plan(x, bins, grad_y, grad_log_det, x, widths, heights, derivatives)
    numbers = _numbers(bins, tail_bound, min_bin_width, min_bin_height, min_derivative)
    args = (*plan.tensors, *grads, *plan.sizes, numbers, *plan.backs)
    options = {"INVERSE": inverse, "TAILS": tails, **plan.constants, "COUNT": of_derivatives}
    _common.launch(rational_quadratic_spline_backward_kernel, plan.programs, x, args, options, plan.num_warps)
    return grads
