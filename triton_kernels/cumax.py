"""cumax, the cumulative softmax, on the GPU. Called by `pygen.ops.cumax`; the formulas stand there.

Sums. A float32 result promises two units in the last place, so e^(x - max) is computed in float32 with the rounding of
x - max recovered, and its sums are kept in float64. A compensated float32 sum would need a two-element scan with six
operations a step; float64 needs one, and about eight operations an element in all (two multiplications, the adds of
the scan), few enough to hide behind the memory traffic on data-centre chips. 16-bit tensors are computed in float32
throughout: its errors are a hundredth of their rounding. float64 stays float64.

Blocks. A row that fits one tile is read once and written once. Longer rows take two passes over tiles of the row, first
for the maximum and the sum, then for the scan, with what is carried from tile to tile in the type of the sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.triton_kernels import _common
from pygen.triton_kernels._math import exp_difference

# A GPU scans a tile as a tree, which may round a later element's sum below an earlier one's; a running maximum of the
# result restores the order. The interpreter's cumsum runs from left to right and cannot do that, and its other scans
# are Python loops over elements.
monotone_by_maximum = not _common.interpreted

# Bytes of a tile: what 512 threads hold in registers, half of it for the backward pass with its second tensor, and
# half again where a row takes several tiles and the carried sums are held as well. (The next size spills on sm_80.)
FORWARD_CAPACITY, BACKWARD_CAPACITY = 32768, 16384
TARGET_TILE = 8192
PER_THREAD = 32
# 16-bit tensors are computed in float32 and fill the registers as float32 does.
NARROWEST = 4
# Where neighbouring rows are neighbours in memory (dim is not the last), a tile is 32 rows wide, or 8 where that lets
# a column fit: 8 float32 are still a whole sector of memory.
COLUMNS, FEWEST_COLUMNS = 32, 8


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _wide(x):
    """The type that x's exponentials are computed in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def _start(inner, outer, tiles, R: tl.constexpr):
    """(outer indices, this program's rows): program -> (outer 0, outer 1, tile of the innermost row dimension)."""
    program = tl.program_id(0)
    rest = program // tiles
    rows = (program % tiles).to(tl.int64) * R + tl.arange(0, R)
    return (rest // outer).to(tl.int64), (rest % outer).to(tl.int64), rows


@triton.jit
def _rows(pointer, strides, first, second, rows):
    """Pointers (R, 1) to the start of each row."""
    return (pointer + first * strides[0] + second * strides[1]) + (rows * strides[2])[:, None]


@triton.jit
def _load(row, step, k, present, n, fill):
    """Elements k of each row, (R, N), widened; `fill` outside the row."""
    x = tl.load(row + k.to(tl.int64)[None, :] * step, mask=present & (k >= 0)[None, :] & (k < n)[None, :], other=fill)
    return _wide(x)


@triton.jit
def _no_infinity(m):
    """A maximum to subtract: of a row of -inf alone it is 0, as x - m would be NaN before a finite element is seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _begin(row, present, FAST: tl.constexpr):
    """(a maximum, an empty sum), (R, 1), for a loop over a row: its first element, and 0 (NaN if that is not finite or
    -inf)."""
    m = _wide(tl.load(row, mask=present, other=float("-inf")))
    return m, exp_difference(m, _no_infinity(m), FAST) * 0.0


@triton.jit
def _cumulate(s, total, k, n, COMPLEMENT: tl.constexpr, MONOTONE: tl.constexpr, DTYPE: tl.constexpr):
    """Sums (R, N) and row totals (R, 1) to results: at most 1, monotone, exactly 1 at the end, NaN without a total."""
    y = (s * (1.0 / total)).to(DTYPE)
    y = tl.where(y < 1.0, y, 1.0)
    if MONOTONE:
        y = tl.associative_scan(y, 1, _maximum, reverse=COMPLEMENT)
    if not COMPLEMENT:
        y = tl.where((k == n - 1)[None, :], 1.0, y)
    return tl.where(total > 0, y, float("nan"))


@triton.jit
def cumax_kernel(
    x_pointer,
    y_pointer,
    n,
    inner,
    outer,
    tiles,
    x_strides,
    y_strides,
    COMPLEMENT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    MONOTONE: tl.constexpr,
    FAST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """R rows per program. The complement's element k is the sum over j > k: its scan reads x one element ahead."""
    SHIFT: tl.constexpr = 1 if COMPLEMENT else 0
    first, second, rows = _start(inner, outer, tiles, R)
    x_row = _rows(x_pointer, x_strides, first, second, rows)
    y_row = _rows(y_pointer, y_strides, first, second, rows)
    present = (rows < inner)[:, None]
    k = tl.arange(0, N)
    low = float("-inf")
    if ONE_TILE:
        x = _load(x_row, x_strides[3], k + SHIFT, present, n, low)
        m = tl.max(x, 1)[:, None]
        if COMPLEMENT:
            head = _wide(tl.load(x_row, mask=present, other=low))
            m = tl.maximum(m, head)
        p = exp_difference(x, m, FAST)
        total = tl.sum(p, 1)[:, None]
        if COMPLEMENT:
            total += exp_difference(head, m, FAST)
        y = _cumulate(tl.cumsum(p, 1, reverse=COMPLEMENT), total, k, n, COMPLEMENT, MONOTONE, x.dtype)
        tl.store(y_row + k.to(tl.int64)[None, :] * y_strides[3], y, mask=present & (k < n)[None, :])
    else:
        m, total = _begin(x_row, present, FAST)
        for start in range(0, n, N):
            x = _load(x_row, x_strides[3], start + k, present, n, low)
            before = m
            m = tl.maximum(m, tl.max(x, 1)[:, None])
            center = _no_infinity(m)
            # In float64, so that thousands of corrections leave no trace; once a row and tile.
            correction = exp_difference(before.to(tl.float64), center.to(tl.float64), False).to(total.dtype)
            total = total * correction + tl.sum(exp_difference(x, center, FAST), 1)[:, None]
        center = _no_infinity(m)
        carry = total * 0.0
        blocks = tl.cdiv(n, N)
        for i in range(0, blocks):
            start = (blocks - 1 - i if COMPLEMENT else i) * N
            p = exp_difference(_load(x_row, x_strides[3], start + k + SHIFT, present, n, low), center, FAST)
            s = carry + tl.cumsum(p, 1, reverse=COMPLEMENT)
            # The largest sum of this tile, not the sum of the tile: the next tile may not begin below it.
            carry = tl.maximum(carry, tl.max(s, 1)[:, None])
            y = _cumulate(s, total, start + k, n, COMPLEMENT, MONOTONE, m.dtype)
            y_at = y_row + (start + k).to(tl.int64)[None, :] * y_strides[3]
            tl.store(y_at, y, mask=present & (start + k < n)[None, :])


@triton.jit
def _scan_gradient(row, step, k, present, n, carry, SHIFT: tl.constexpr, FAST: tl.constexpr):
    """(G, the carry after it): G_j = sum_{k >= j} g_k from the right, or with SHIFT sum_{k < j} g_k from the left."""
    g = _load(row, step, k - SHIFT, present & (k < n)[None, :], n, 0.0)
    g = g.to(tl.float32 if FAST else tl.float64)
    return carry + tl.cumsum(g, 1, reverse=SHIFT == 0), carry + tl.sum(g, 1)[:, None]


@triton.jit
def cumax_backward_kernel(
    grad_pointer,
    x_pointer,
    out_pointer,
    n,
    inner,
    outer,
    tiles,
    grad_strides,
    x_strides,
    out_strides,
    COMPLEMENT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    FAST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
):
    """dx_j = p_j (G_j - sum_i p_i G_i), R rows per program."""
    SHIFT: tl.constexpr = 1 if COMPLEMENT else 0
    first, second, rows = _start(inner, outer, tiles, R)
    grad_row = _rows(grad_pointer, grad_strides, first, second, rows)
    x_row = _rows(x_pointer, x_strides, first, second, rows)
    out_row = _rows(out_pointer, out_strides, first, second, rows)
    present = (rows < inner)[:, None]
    k = tl.arange(0, N)
    low = float("-inf")
    if ONE_TILE:
        x = _load(x_row, x_strides[3], k, present, n, low)
        p = exp_difference(x, tl.max(x, 1)[:, None], FAST)
        scale = 1.0 / tl.sum(p, 1)[:, None]
        g_sum, _ = _scan_gradient(grad_row, grad_strides[3], k, present, n, scale * 0.0, SHIFT, FAST)
        mean = tl.sum(p * g_sum, 1)[:, None] * scale
        out = p * scale * (g_sum - mean)
        tl.store(out_row + k.to(tl.int64)[None, :] * out_strides[3], out, mask=present & (k < n)[None, :])
    else:
        m, total = _begin(x_row, present, FAST)
        mean, carry = total, total
        blocks = tl.cdiv(n, N)
        for i in range(0, blocks):
            j = (i if COMPLEMENT else blocks - 1 - i) * N + k
            g_sum, carry = _scan_gradient(grad_row, grad_strides[3], j, present, n, carry, SHIFT, FAST)
            x = _load(x_row, x_strides[3], j, present, n, low)
            before = m
            m = tl.maximum(m, tl.max(x, 1)[:, None])
            center = _no_infinity(m)
            correction = exp_difference(before.to(tl.float64), center.to(tl.float64), False).to(total.dtype)
            p = exp_difference(x, center, FAST)
            total = total * correction + tl.sum(p, 1)[:, None]
            mean = mean * correction + tl.sum(p * g_sum, 1)[:, None]
        scale = 1.0 / total
        mean = mean * scale
        center = _no_infinity(m)
        carry = carry * 0.0
        for i in range(0, blocks):
            j = (i if COMPLEMENT else blocks - 1 - i) * N + k
            g_sum, carry = _scan_gradient(grad_row, grad_strides[3], j, present, n, carry, SHIFT, FAST)
            p = exp_difference(_load(x_row, x_strides[3], j, present, n, low), center, FAST)
            out = p * scale * (g_sum - mean)
            tl.store(out_row + j.to(tl.int64)[None, :] * out_strides[3], out, mask=present & (j < n)[None, :])


class _Plan(NamedTuple):
    """How tensors of one shape are walked: rows in three dimensions (two outer, one inner), then along the row."""

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, int, int, int]  # n, inner, second outer, tiles of the inner dimension
    strides: list[tuple[int, ...]]  # per tensor: two outer, inner, along the row
    programs: int
    tile: tuple[int, int]  # rows, elements of a row
    num_warps: int


def _tile(n: int, inner: int, outer: int, capacity: int, target: int, columns: bool) -> tuple[int, int]:
    """(R, N): rows and elements of a row in a tile of about `target` and at most `capacity` elements."""
    length, rows = triton.next_power_of_2(n), triton.next_power_of_2(inner)
    if columns:
        width = _common.shrink_until_enough(min(rows, max(COLUMNS, target // length)), inner, outer)
        width = max(width, min(rows, FEWEST_COLUMNS))
        while width * length > capacity and width > FEWEST_COLUMNS:
            width //= 2
    else:
        width = _common.shrink_until_enough(min(rows, max(1, target // length)), inner, outer)
    return width, length if width * length <= capacity else capacity // (2 * width)


def _plan(dim: int, capacity: int, *tensors: Tensor) -> _Plan:
    """`capacity`: the bytes of a tile."""
    shape = tensors[0].shape
    others = [d for d in range(len(shape)) if d != dim]
    outer_shape = [shape[d] for d in others]
    sizes, strides = _common.collapse(outer_shape, *([t.stride(d) for d in others] for t in tensors))
    if len(sizes) > 3:
        # Rows in more than three dimensions that do not merge: rare, and not worth a slower kernel for all.
        return _plan(dim, capacity, *(t.contiguous() for t in tensors))
    first, outer, inner = _common.pad_front(sizes, 3, 1)
    n, steps = shape[dim], [t.stride(dim) for t in tensors]
    columns = strides[0][-1:] == [1] and steps[0] != 1 and inner > 1
    itemsize = max(NARROWEST, tensors[0].element_size())
    tile = _tile(n, inner, first * outer, capacity // itemsize, TARGET_TILE // itemsize, columns)
    tiles = triton.cdiv(inner, tile[0])
    num_warps = _common.warps_for(tile[0] * tile[1], PER_THREAD // itemsize)
    walks = [(*_common.pad_front(s, 3, 0), step) for s, step in zip(strides, steps, strict=True)]
    return _Plan(tensors, (n, inner, outer, tiles), walks, first * outer * tiles, tile, num_warps)


def _checked_dim(dim: int, rank: int) -> int:
    if not -rank <= dim < rank:
        raise IndexError(f"cumax: dim must be in [{-rank}, {rank - 1}], got {dim}")
    return dim % rank


def _constants(plan: _Plan, x: Tensor, complement: bool) -> dict:
    rows, length = plan.tile
    return {
        "COMPLEMENT": complement,
        "ONE_TILE": plan.sizes[0] <= length,
        "FAST": x.dtype in _common.SIXTEEN_BIT,
        "R": rows,
        "N": length,
    }


def cumax(x: Tensor, dim: int, complement: bool) -> Tensor:
    """`torch.ops.pygen.cumax` on a GPU: contiguous, x's shape and dtype; x may have any strides."""
    dim = _checked_dim(dim, max(x.dim(), 1))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    plan = _plan(dim, FORWARD_CAPACITY, x if x.dim() else x.reshape(1), y if y.dim() else y.view(1))
    constants = {**_constants(plan, x, complement), "MONOTONE": monotone_by_maximum}
    args = (*plan.tensors, *plan.sizes, *plan.strides)
    _common.launch(cumax_kernel, plan.programs, x, args, constants, plan.num_warps)
    return y


def cumax_backward(grad: Tensor, x: Tensor, dim: int, complement: bool) -> Tensor:
    """`torch.ops.pygen.cumax_backward` on a GPU: contiguous, x's shape and dtype; grad and x may have any strides."""
    dim = _checked_dim(dim, max(x.dim(), 1))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    grad = grad.expand_as(x)
    tensors = (grad, x, out) if x.dim() else (grad.reshape(1), x.reshape(1), out.view(1))
    plan = _plan(dim, BACKWARD_CAPACITY, *tensors)
    args = (*plan.tensors, *plan.sizes, *plan.strides)
    _common.launch(cumax_backward_kernel, plan.programs, x, args, _constants(plan, x, complement), plan.num_warps)
    return out
