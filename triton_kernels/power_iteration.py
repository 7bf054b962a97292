"""Power iteration of all layers of a network on the GPU in one launch. Called by `pygen.ops.power_iteration_multi`;
what is computed, exceptions and all, stands in `pygen.reference.power_iteration`.

A step updates one vector, the first, and from it the other, the second: u and v with `u_first`, v and u without. Let M
be the weight with the first vector's dimension in front, x the second vector. The phases:

multiply  blocks of M's rows: y = M x, and while the block is in cache M^T y of the block alone
combine   chunks of the second vector: |y| is known, so M^T (y / |y|) is the sum over blocks divided by it
          (the two alternate, once per step)
divide    the second vector's norm is known, and with it sigma = |M^T first|; chunks of W / sigma

so that a step reads W from memory once. Blocks are cut by a layer's own shape, each writes its own slot, and slots are
added in their order: no bit depends on the number of programs, on the other layers, or on who came first. A table in
device memory has a row for each layer: its pointers, its sizes, where its blocks begin.

One launch. As many programs as the GPU has multiprocessors share the blocks of a phase and wait for one another before
the next; the launch is cooperative, so all of them are on the chip or none. Where that is not to be had (AMD, Triton's
interpreter), every phase is a launch, for all layers together.

Magnitudes. |y| is not known while M^T y is summed, and y may be as large as the type allows. Each block divides its y
by its largest element, times the number of rows, so that its sums are no larger than M; the factors come back in
float64.
"""

import functools
import math
import struct
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.reference._dtypes import compute_dtype
from pygen.triton_kernels import _common

# Programs that wait for one another need all of them on the chip.
PHASES_IN_ONE_LAUNCH = not _common.interpreted and not torch.version.hip

# The launch is refused if not all of them fit. One program has a multiprocessor's registers to itself, which ptxas
# would save for a second one and spill.
TOGETHER = {"launch_cooperative_grid": True, "maxnreg": 255}

# Elements (first, second) of a tile of `multiply`, which a block of `first` rows of M walks along: along rows of W, or
# down its columns, 16 of which are whole sectors of memory; half as long in float64. The interpreter takes its time for
# each program, and has few.
ROW_TILE, COLUMN_TILE = ((64, 512), (64, 512)) if _common.interpreted else ((8, 512), (16, 256))
# Blocks that `combine` adds together, and elements of its chunks.
PARTS, CHUNK = (64, 512) if _common.interpreted else (32, 64)
# Elements of W that a block of `divide` and of the backward pass takes, half as many in float64.
ELEMENTS = 2**16 if _common.interpreted else 2**12
WARPS = 8
# Sums of blocks that are added together.
SUMS = tl.constexpr(256)
# Tables that are kept on the device: a network that trains has two, one for each pass.
TABLES = 64
# Indices of rows and columns are 32-bit below this; a tile beyond the end must not overflow. Offsets are 64-bit always.
LARGEST_INDEX = 2**31 - 2**16
TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# A layer's row of the table. Pointers: the weight, the given vectors, where the new ones go, where W / sigma goes.
WEIGHT, FIRST, SECOND, NEW_FIRST, NEW_SECOND, RESULT = (tl.constexpr(i) for i in range(6))
# M is (P, Q); the dimensions of W behind that of its rows have INNER elements.
P, Q, INNER = (tl.constexpr(i) for i in range(6, 9))
# How many blocks the layer has in each phase, the first of them among all layers', and the layer's first element of two
# workspaces. `work`, in the type of the sums: y (P), M^T y (Q), the blocks' parts of it (blocks, Q). `sums`, float64:
# for each block of `multiply` the largest element of its y, |y|^2 and y . first; for each chunk of `combine` its square
# and its product with the second vector.
MULTIPLY_BLOCKS, COMBINE_BLOCKS, DIVIDE_BLOCKS, MULTIPLY, COMBINE, DIVIDE, WORK, SUM = (
    tl.constexpr(i) for i in range(9, 17)
)
FIELDS = tl.constexpr(17)

# The row of the backward pass. GRAD is 0 where a weight / sigma has no gradient.
GRAD, GRAD_U, GRAD_V, GRAD_RESULT, ROWS, COLUMNS, GRAD_INNER, GRAD_BLOCKS, GRAD_BLOCK = (
    tl.constexpr(i) for i in range(1, 10)
)
GRAD_FIELDS = tl.constexpr(10)

# Numbers that differ from network to network and should not have a kernel compiled for each.
PHASES = ["layers", "eps_bits", "first_phase", "last_phase"]
FORWARD_COUNTS = [*PHASES, "multiply_blocks", "combine_blocks", "divide_blocks", "steps"]
BACKWARD_COUNTS = [*PHASES, "blocks"]

# Added to the barrier's counter by all programs together: one bit of it turns when the last has come, the bits below
# are zero again, and so the counter never has to be reset.
TURN = tl.constexpr(2**30)


# ---- what the kernels share ------------------------------------------------------------------------------------------


@triton.jit
def _wait_for_all(counter):
    """Return when every program of the launch is here and sees what the others wrote."""
    # The atomics are one thread's: it speaks for the others once they are done, and they follow it.
    tl.debug_barrier()
    mine = tl.where(tl.program_id(0) == 0, TURN - (tl.num_programs(0) - 1), 1)
    before = tl.atomic_add(counter, mine, sem="acq_rel", scope="gpu")
    now = before
    while ((before ^ now) & TURN) == 0:
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _layer_of(table, block, layers, FIELD: tl.constexpr, FIELDS: tl.constexpr, LAYERS: tl.constexpr):
    """The layer that a block belongs to."""
    at = tl.arange(0, LAYERS)
    starts = tl.load(table + at * FIELDS + FIELD, mask=at < layers, other=0x7FFFFFFFFFFFFFFF)
    return tl.sum((starts <= block).to(tl.int32), 0) - 1


@triton.jit
def _total(sums, count):
    total = tl.zeros((SUMS,), tl.float64)
    for at in range(0, count, SUMS):
        i = at + tl.arange(0, SUMS)
        total += tl.load(sums + i, mask=i < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _divide(x, y):
    """x / y, correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _divisor(sigma, eps):
    """What a weight is divided by."""
    return tl.where(tl.abs(sigma).to(tl.float64) < eps, eps.to(sigma.dtype), sigma)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _updated(product, squares, count, before, eps):
    """(the vector, what to divide it by, whether it is the product): the product over its norm, or what was before
    where the product is zero or not finite."""
    norm = tl.sqrt(_total(squares, count))
    usable = (norm > 0) & (norm < float("inf"))
    vector = before
    divisor = tl.full((), 1.0, tl.float64)
    if usable:
        vector = product
        divisor = tl.maximum(norm, eps)
    return vector, divisor, usable


@triton.jit
def _keep(new, vector, divisor, size, part, parts, S: tl.constexpr):
    """Write this program's share of a vector."""
    for at in range(part * S, size, parts * S):
        i = at + tl.arange(0, S)
        x = tl.load(vector + i, mask=i < size, other=0.0)
        tl.store(new + i, (x.to(tl.float64) / divisor).to(x.dtype), mask=i < size)


@triton.jit
def _load_tile(weight, first, second, p, q, inner, BY_ROWS: tl.constexpr, PLAIN: tl.constexpr, TYPE: tl.constexpr):
    """W's elements (rows, columns) at M[first, second], widened. PLAIN: a row of W is contiguous."""
    row, column = (first, second) if BY_ROWS else (second, first)
    rows, columns = (p, q) if BY_ROWS else (q, p)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    start = row.to(tl.int64) * inner
    if PLAIN:
        return tl.load(weight + start[:, None] + column[None, :], mask=mask, other=0.0).to(TYPE)
    else:
        turns = column // inner
        behind = turns.to(tl.int64) * rows * inner + (column - turns * inner)
        return tl.load(weight + start[:, None] + behind[None, :], mask=mask, other=0.0).to(TYPE)


@triton.jit
def _times(tile, x, ALONG_ROWS: tl.constexpr):
    """W's elements times those of a vector along its rows, or down its columns."""
    if ALONG_ROWS:
        return tile * x[None, :]
    else:
        return tile * x[:, None]


@triton.jit
def _second(row, work, sums, steps, eps):
    """`_updated` of the second vector after `steps` steps."""
    TYPE: tl.constexpr = work.dtype.element_ty
    vector = tl.load(row + SECOND).to(tl.pointer_type(TYPE))
    divisor = tl.full((), 1.0, tl.float64)
    usable = False
    if steps > 0:
        if steps > 1:
            vector = tl.load(row + NEW_SECOND).to(tl.pointer_type(TYPE))
        product = work + tl.load(row + WORK) + tl.load(row + P)
        squares = sums + tl.load(row + SUM) + 3 * tl.load(row + MULTIPLY_BLOCKS)
        vector, divisor, usable = _updated(product, squares, tl.load(row + COMBINE_BLOCKS), vector, eps)
    return vector, divisor, usable


@triton.jit
def _multiply(
    table,
    work,
    sums,
    block,
    layers,
    steps,
    eps,
    transposed_too,
    TYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """y of one block of F rows of M after `steps` steps, and its part of M^T y."""
    C: tl.constexpr = work.dtype.element_ty
    layer = _layer_of(table, block, layers, MULTIPLY, FIELDS, LAYERS)
    row = table + layer * FIELDS
    part = (block - tl.load(row + MULTIPLY)).to(INDEX)
    p, q, inner = tl.load(row + P).to(INDEX), tl.load(row + Q).to(INDEX), tl.load(row + INNER).to(INDEX)
    parts = tl.load(row + MULTIPLY_BLOCKS)
    weight = tl.load(row + WEIGHT).to(tl.pointer_type(TYPE))
    vector, divisor, _ = _second(row, work, sums, steps, eps)
    previous = tl.load(row + FIRST).to(tl.pointer_type(C))
    if steps > 0:
        previous = tl.load(row + NEW_FIRST).to(tl.pointer_type(C))
        # The next step may need it when the product that it came from is no more.
        _keep(tl.load(row + NEW_SECOND).to(tl.pointer_type(C)), vector, divisor, q, part, parts, S)

    first = part * F + tl.arange(0, F)
    present = first < p
    sum_y = tl.zeros((F, S) if BY_ROWS else (S, F), C)
    for at in range(0, q, S):
        second = at + tl.arange(0, S)
        x = tl.load(vector + second, mask=second < q, other=0.0)
        if steps > 0:
            x = (x.to(tl.float64) / divisor).to(C)
        sum_y += _times(_load_tile(weight, first, second, p, q, inner, BY_ROWS, PLAIN, C), x, BY_ROWS)
    y = tl.sum(sum_y, 1 if BY_ROWS else 0)

    start = tl.load(row + WORK)
    tl.store(work + start + first, y, mask=present)
    wide = y.to(tl.float64)
    largest = tl.max(tl.abs(wide), 0) * F
    mine = sums + tl.load(row + SUM) + part
    tl.store(mine, largest)
    tl.store(mine + parts, tl.sum(wide * wide, 0))
    before = tl.load(previous + first, mask=present, other=0.0)
    tl.store(mine + 2 * parts, tl.sum(before.to(tl.float64) * wide, 0))

    if transposed_too:
        scaled = (wide / tl.where(largest > 0, largest, 1.0)).to(C)
        results = work + start + p + q + part.to(tl.int64) * q
        # From the end, where the cache was filled last.
        tiles = tl.cdiv(q, S)
        for tile in range(0, tiles):
            second = (tiles - 1 - tile) * S + tl.arange(0, S)
            product = _times(_load_tile(weight, first, second, p, q, inner, BY_ROWS, PLAIN, C), scaled, not BY_ROWS)
            tl.store(results + second, tl.sum(product, 0 if BY_ROWS else 1), mask=second < q)


@triton.jit
def _combine(
    table,
    work,
    sums,
    block,
    layers,
    steps,
    eps,
    TYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """One chunk of M^T first, first the y of `_multiply` over its norm, or as it was before step `steps` + 1."""
    C: tl.constexpr = work.dtype.element_ty
    layer = _layer_of(table, block, layers, COMBINE, FIELDS, LAYERS)
    row = table + layer * FIELDS
    chunk = (block - tl.load(row + COMBINE)).to(INDEX)
    p, q, inner = tl.load(row + P).to(INDEX), tl.load(row + Q).to(INDEX), tl.load(row + INNER).to(INDEX)
    parts, chunks = tl.load(row + MULTIPLY_BLOCKS).to(INDEX), tl.load(row + COMBINE_BLOCKS).to(INDEX)
    y = work + tl.load(row + WORK)
    largest = sums + tl.load(row + SUM)

    before = tl.load(row + FIRST).to(tl.pointer_type(C))
    x_before = tl.load(row + SECOND).to(tl.pointer_type(C))
    if steps > 0:
        before = tl.load(row + NEW_FIRST).to(tl.pointer_type(C))
        x_before = tl.load(row + NEW_SECOND).to(tl.pointer_type(C))
    vector, divisor, usable = _updated(y, largest + parts, parts, before, eps)
    _keep(tl.load(row + NEW_FIRST).to(tl.pointer_type(C)), vector, divisor, p, chunk, chunks, S)

    second = chunk * CHUNK + tl.arange(0, CHUNK)
    present = second < q
    if usable:
        total = tl.zeros((PARTS, CHUNK), tl.float64)
        for at in range(0, parts, PARTS):
            i = at + tl.arange(0, PARTS)
            where = i.to(tl.int64)[:, None] * q + second[None, :]
            product = tl.load(y + p + q + where, mask=(i < parts)[:, None] & present[None, :], other=0.0)
            total += product.to(tl.float64) * tl.load(largest + i, mask=i < parts, other=0.0)[:, None]
        t = (tl.sum(total, 0) / divisor).to(C)
    else:
        weight = tl.load(row + WEIGHT).to(tl.pointer_type(TYPE))
        sum_t = tl.zeros((PARTS, CHUNK) if BY_ROWS else (CHUNK, PARTS), C)
        for at in range(0, p, PARTS):
            i = at + tl.arange(0, PARTS)
            u = tl.load(vector + i, mask=i < p, other=0.0)
            sum_t += _times(_load_tile(weight, i, second, p, q, inner, BY_ROWS, PLAIN, C), u, not BY_ROWS)
        t = tl.sum(sum_t, 0 if BY_ROWS else 1)
    tl.store(y + p + second, t, mask=present)
    wide = t.to(tl.float64)
    mine = largest + 3 * parts + chunk
    tl.store(mine, tl.sum(wide * wide, 0))
    x = tl.load(x_before + second, mask=present, other=0.0)
    tl.store(mine + chunks, tl.sum(x.to(tl.float64) * wide, 0))


@triton.jit
def _sigma(row, sums, divisor, usable, steps):
    """first . M second, of which one product is known: with y without a step, with M^T first after one."""
    blocks, chunks = tl.load(row + MULTIPLY_BLOCKS), tl.load(row + COMBINE_BLOCKS)
    mine = sums + tl.load(row + SUM)
    if steps == 0:
        sigma = _total(mine + 2 * blocks, blocks)
    elif usable:
        sigma = _total(mine + 3 * blocks, chunks) / divisor
    else:
        sigma = _total(mine + 3 * blocks + chunks, chunks)
    return sigma


@triton.jit
def _divide_weights(
    table,
    work,
    sums,
    sigmas,
    layers,
    blocks,
    steps,
    eps,
    TYPE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """sigma, the second vector and W / sigma of this program's share of all blocks: neighbours, so that a layer's sigma
    is found once."""
    C: tl.constexpr = work.dtype.element_ty
    each = tl.cdiv(blocks, tl.num_programs(0))
    current = -1
    sigma = tl.zeros((), C)
    vector = work
    divisor = tl.full((), 1.0, tl.float64)
    for block in range(tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, blocks)):
        layer = _layer_of(table, block, layers, DIVIDE, FIELDS, LAYERS)
        row = table + layer * FIELDS
        p, q = tl.load(row + P), tl.load(row + Q)
        part = block - tl.load(row + DIVIDE)
        if layer != current:
            current = layer
            vector, divisor, usable = _second(row, work, sums, steps, eps)
            sigma = _sigma(row, sums, divisor, usable, steps).to(C)
        if part == 0:
            tl.store(sigmas + layer, sigma)
        parts = tl.load(row + DIVIDE_BLOCKS)
        _keep(tl.load(row + NEW_SECOND).to(tl.pointer_type(C)), vector, divisor, q, part, parts, S)
        if steps == 0:
            _keep(
                tl.load(row + NEW_FIRST).to(tl.pointer_type(C)),
                tl.load(row + FIRST).to(tl.pointer_type(C)),
                divisor,
                p,
                part,
                parts,
                S,
            )
        if NORMALIZE:
            i = part * ELEMENTS + tl.arange(0, ELEMENTS)
            w = tl.load(tl.load(row + WEIGHT).to(tl.pointer_type(TYPE)) + i, mask=i < p * q, other=0.0).to(C)
            tl.store(
                tl.load(row + RESULT).to(tl.pointer_type(TYPE)) + i, _divide(w, _divisor(sigma, eps)), mask=i < p * q
            )


@triton.jit(do_not_specialize=FORWARD_COUNTS)
def power_iteration_kernel(
    table,
    work,
    sums,
    sigmas,
    counter,
    layers,
    multiply_blocks,
    combine_blocks,
    divide_blocks,
    eps_bits,
    steps,
    first_phase,
    last_phase,
    TYPE: tl.constexpr,
    INDEX: tl.constexpr,
    BY_ROWS: tl.constexpr,
    PLAIN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    F: tl.constexpr,
    S: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Phases first_phase to last_phase of `steps` steps: `multiply` and `combine` in turn, two for each step, then
    `divide`. Without a step there is one `multiply`, for sigma."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    for phase in range(first_phase, last_phase + 1):
        done = phase // 2
        if phase == tl.maximum(2 * steps, 1):
            _divide_weights(
                table,
                work,
                sums,
                sigmas,
                layers,
                divide_blocks,
                steps,
                eps,
                TYPE,
                NORMALIZE,
                F,
                S,
                CHUNK,
                ELEMENTS,
                LAYERS,
            )
        elif phase % 2 == 0:
            for block in range(program, multiply_blocks, programs):
                _multiply(
                    table,
                    work,
                    sums,
                    block,
                    layers,
                    done,
                    eps,
                    steps > 0,
                    TYPE,
                    INDEX,
                    BY_ROWS,
                    PLAIN,
                    F,
                    S,
                    CHUNK,
                    LAYERS,
                )
        else:
            for block in range(program, combine_blocks, programs):
                _combine(
                    table,
                    work,
                    sums,
                    block,
                    layers,
                    done,
                    eps,
                    TYPE,
                    INDEX,
                    BY_ROWS,
                    PLAIN,
                    F,
                    S,
                    PARTS,
                    CHUNK,
                    LAYERS,
                )
        if ONE_LAUNCH and phase < last_phase:
            _wait_for_all(counter)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _write_gradient(
    row, part, along, divisor, TYPE: tl.constexpr, C: tl.constexpr, INDEX: tl.constexpr, PLAIN: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """G / divisor + along u v^T of one block of a contiguous weight's elements."""
    rows, columns = tl.load(row + ROWS), tl.load(row + COLUMNS)
    inner = tl.load(row + GRAD_INNER)
    at = part * ELEMENTS
    i = at + tl.arange(0, ELEMENTS)
    mask = i < rows * columns
    # 64-bit divisions are slow: one for the block, 32-bit ones for what lies behind its start.
    start = at // inner
    behind = (at - start * inner).to(INDEX) + tl.arange(0, ELEMENTS)
    steps = behind // inner.to(INDEX)
    column = behind - steps * inner.to(INDEX)
    if PLAIN:
        r = start + steps
        c = column.to(tl.int64)
    else:
        outer = start // rows
        r = (start - outer * rows).to(INDEX) + steps
        turns = r // rows.to(INDEX)
        r = (r - turns * rows.to(INDEX)).to(tl.int64)
        c = (outer + turns) * inner + column
    u = tl.load(tl.load(row + GRAD_U).to(tl.pointer_type(C)) + r, mask=mask, other=0.0)
    v = tl.load(tl.load(row + GRAD_V).to(tl.pointer_type(C)) + c, mask=mask, other=0.0)
    result = along * (u * v)
    if tl.load(row + GRAD) != 0:
        result += _divide(
            tl.load(tl.load(row + GRAD).to(tl.pointer_type(TYPE)) + i, mask=mask, other=0.0).to(C), divisor
        )
    tl.store(tl.load(row + GRAD_RESULT).to(tl.pointer_type(TYPE)) + i, result, mask=mask)


@triton.jit(do_not_specialize=BACKWARD_COUNTS)
def power_iteration_backward_kernel(
    table,
    sigmas,
    grad_sigmas,
    sums,
    counter,
    layers,
    blocks,
    eps_bits,
    first_phase,
    last_phase,
    TYPE: tl.constexpr,
    INDEX: tl.constexpr,
    PLAIN: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """Phase 0: <G, W> of each block. Phase 1: the gradients G / sigma + (g - <G, W> / sigma^2) u v^T."""
    C: tl.constexpr = sigmas.dtype.element_ty
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    each = tl.cdiv(blocks, tl.num_programs(0))
    begin, end = tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, blocks)
    for phase in range(first_phase, last_phase + 1):
        current = -1
        along = tl.zeros((), C)
        divisor = tl.zeros((), C)
        for block in range(begin, end):
            layer = _layer_of(table, block, layers, GRAD_BLOCK, GRAD_FIELDS, LAYERS)
            row = table + layer * GRAD_FIELDS
            start = tl.load(row + GRAD_BLOCK)
            part = block - start
            size = tl.load(row + ROWS) * tl.load(row + COLUMNS)
            given = tl.load(row + GRAD) != 0
            if phase == 0:
                if given:
                    i = part * ELEMENTS + tl.arange(0, ELEMENTS)
                    grad = tl.load(tl.load(row + GRAD).to(tl.pointer_type(TYPE)) + i, mask=i < size, other=0.0)
                    weight = tl.load(tl.load(row + WEIGHT).to(tl.pointer_type(TYPE)) + i, mask=i < size, other=0.0)
                    tl.store(sums + block, tl.sum(grad.to(tl.float64) * weight.to(tl.float64), 0))
            else:
                if layer != current:
                    current = layer
                    sigma = tl.load(sigmas + layer)
                    divisor = _divisor(sigma, eps)
                    factor = tl.zeros((), tl.float64)
                    if grad_sigmas is not None:
                        factor += tl.load(grad_sigmas + layer).to(tl.float64)
                    if given & (tl.abs(sigma).to(tl.float64) >= eps):
                        s = sigma.to(tl.float64)
                        factor -= _total(sums + start, tl.load(row + GRAD_BLOCKS)) / s / s
                    along = factor.to(C)
                _write_gradient(row, part, along, divisor, TYPE, C, INDEX, PLAIN, ELEMENTS)
        if ONE_LAUNCH and phase < last_phase:
            _wait_for_all(counter)


# ---- tables ----------------------------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    rows: int
    columns: int
    inner: int  # elements of the weight's dimensions behind that of the rows; 1 at least
    plain: bool  # whether a row is contiguous


def _matrix(shape: Sequence[int], dim: int) -> _Matrix:
    dim %= len(shape)
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    return _Matrix(shape[dim], outer * inner, max(1, inner), outer == 1)


def _index_type(matrices: Sequence[_Matrix]) -> Any:
    return tl.int32 if all(max(m.rows, m.columns) < LARGEST_INDEX for m in matrices) else tl.int64


class _Plan(NamedTuple):
    """What depends on the layers' shapes alone."""

    rows: list[tuple[int, ...]]  # the table's, behind the pointers
    blocks: tuple[int, ...]  # of each kind of phase
    work: int
    sums: int
    constants: dict[str, Any]


@functools.lru_cache(maxsize=TABLES)
def _forward_plan(
    shapes: tuple[tuple[int, ...], ...], dims: tuple[int, ...], double: bool, u_first: bool, return_weights: bool
) -> _Plan:
    matrices = [_matrix(shape, dim) for shape, dim in zip(shapes, dims, strict=True)]
    f, s = ROW_TILE if u_first else COLUMN_TILE
    s, elements = (s // 2, ELEMENTS // 2) if double else (s, ELEMENTS)
    rows = []
    multiply = combine = divide = work = sums = 0
    for m in matrices:
        p, q = (m.rows, m.columns) if u_first else (m.columns, m.rows)
        blocks, chunks = _block_count(p, f), _block_count(q, CHUNK)
        shares = _block_count(p * q if return_weights else 0, elements)
        rows.append((p, q, m.inner, blocks, chunks, shares, multiply, combine, divide, work, sums))
        multiply, combine, divide = multiply + blocks, combine + chunks, divide + shares
        work += p + q + blocks * q
        sums += 3 * blocks + 2 * chunks
    constants = {
        "INDEX": _index_type(matrices),
        "BY_ROWS": u_first,
        "PLAIN": all(m.plain for m in matrices),
        "NORMALIZE": return_weights,
        "F": f,
        "S": s,
        "PARTS": PARTS,
        "CHUNK": CHUNK,
        "ELEMENTS": elements,
        "LAYERS": _padded(len(rows)),
    }
    return _Plan(rows, (multiply, combine, divide), work, sums, constants)


@functools.lru_cache(maxsize=TABLES)
def _backward_plan(shapes: tuple[tuple[int, ...], ...], dims: tuple[int, ...], double: bool) -> _Plan:
    matrices = [_matrix(shape, dim) for shape, dim in zip(shapes, dims, strict=True)]
    elements = ELEMENTS // 2 if double else ELEMENTS
    rows = []
    blocks = 0
    for m in matrices:
        count = _block_count(m.rows * m.columns, elements)
        rows.append((m.rows, m.columns, m.inner, count, blocks))
        blocks += count
    constants = {
        "INDEX": _index_type(matrices),
        "PLAIN": all(m.plain for m in matrices),
        "ELEMENTS": elements,
        "LAYERS": _padded(len(rows)),
    }
    return _Plan(rows, (blocks,), 0, blocks, constants)


def _block_count(size: int, block: int) -> int:
    return max(1, triton.cdiv(size, block))


def _padded(layers: int) -> int:
    """Few sizes, so that networks share a kernel."""
    return max(8, triton.next_power_of_2(layers))


def _capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream


@functools.lru_cache(maxsize=TABLES)
def _copied_table(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """On the device, copied on the stream that will read it, without waiting for it."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def _written_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The table as arguments of launches: a CUDA graph replays these, a copy would read host memory that is long gone.
    It belongs to the graph, as the pointers do."""
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), list(values))
    return table


def _table(pointers: Sequence[Sequence[Tensor | None]], rows: Sequence[tuple[int, ...]], like: Tensor) -> Tensor:
    """The table of `pointers` (field, layer) and `rows`; the addresses that a training loop meets again are cached."""
    addresses = zip(*([0 if t is None else t.data_ptr() for t in field] for field in pointers), strict=True)
    values = tuple(chain.from_iterable(chain(a, r) for a, r in zip(addresses, rows, strict=True)))
    if not like.is_cuda:
        return torch.tensor(values, dtype=torch.int64, device=like.device)
    if _capturing(like):
        return _written_table(values, like.device)
    return _copied_table(values, like.device, _stream(like))


@functools.cache
def _kept_counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _counter(like: Tensor) -> Tensor:
    """The barrier's counter. One for each stream, on which launches follow one another; a CUDA graph has its own."""
    if not like.is_cuda or _capturing(like):
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    return _kept_counter(like.device, _stream(like))


# ---- launchers -------------------------------------------------------------------------------------------------------


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def _launch_phases(
    kernel: Any, like: Tensor, args: tuple, blocks: Sequence[int], first: int, constants: dict[str, Any]
) -> None:
    """Phases `first` and on, of which phase i has blocks[i] blocks, in one launch or one by one."""
    last = len(blocks) - 1
    together = PHASES_IN_ONE_LAUNCH and last > first
    constants = {**constants, "ONE_LAUNCH": together}
    if together:
        programs = min(max(blocks[first:]), _multiprocessors(like.device))
        _common.launch(kernel, programs, like, (*args, first, last), constants, WARPS, **TOGETHER)
        return
    for phase in range(first, last + 1):
        _common.launch(kernel, blocks[phase], like, (*args, phase, phase), constants, WARPS)


def _check(op: str, weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int]) -> None:
    """What the kernels read without asking."""
    if not weights or not len(weights) == len(us) == len(vs) == len(dims):
        counts = ", ".join(str(len(given)) for given in (weights, us, vs, dims))
        raise RuntimeError(f"{op}: weights, us, vs and dims must be equally many, and one at least, got {counts}")
    dtype, device = weights[0].dtype, weights[0].device
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        if not (weight.dtype in TRITON_TYPES and u.dtype in TRITON_TYPES and v.dtype in TRITON_TYPES):
            raise RuntimeError(
                f"{op}: weight, u and v must be floating point (float64, float32, bfloat16, float16), got "
                f"{weight.dtype}, {u.dtype} and {v.dtype}"
            )
        if weight.dtype != dtype or weight.device != device or u.device != device or v.device != device:
            raise RuntimeError(
                f"{op}: all weights must have one dtype, and all tensors one device, got {dtype} on {device} and "
                f"{weight.dtype} on {weight.device} with u on {u.device} and v on {v.device}"
            )
        if weight.dim() < 2 or not -weight.dim() <= dim < weight.dim():
            raise RuntimeError(f"{op}: weights must have 2 dimensions at least, {dim} among them, got {weight.dim()}")
        rows = weight.size(dim)
        columns = weight.numel() // rows if rows else _matrix(weight.shape, dim).columns
        if u.shape != (rows,) or v.shape != (columns,):
            raise RuntimeError(
                f"{op}: u must be ({rows},) and v ({columns},) for a weight {tuple(weight.shape)} with its rows in "
                f"dimension {dim}, got {tuple(u.shape)} and {tuple(v.shape)}"
            )


def _as_bits(eps: float) -> int:
    """A float64 as kernel argument: Triton makes float32 of a float. Of a subnormal it would make 32 bits."""
    return struct.unpack("<q", struct.pack("<d", max(eps, sys.float_info.min)))[0]


def _held(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous tensors of `dtype`. What is asked for is mostly there, and torch takes longer to say so."""
    return [t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous() for t in tensors]


def _returned(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.dtype == given.dtype else t.to(given.dtype) for t, given in zip(tensors, like, strict=True)]


def power_iteration(
    weights: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    n_iterations: int,
    eps: float,
    u_first: bool,
    return_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """`torch.ops.pygen.power_iteration` on a GPU: (sigma (L,), weights / sigma or nothing, us, vs), all contiguous.

    Contiguous weights are read where they lie, whatever their `dims`; others, and vectors that have not the type of the
    sums, are copied first.
    """
    _check("power_iteration", weights, us, vs, dims)
    like, dtype = weights[0], compute_dtype(weights[0].dtype)
    shapes = tuple(weight.shape for weight in weights)
    plan = _forward_plan(shapes, tuple(dims), dtype == torch.float64, u_first, return_weights)

    weights, wide_us, wide_vs = _held(weights, like.dtype), _held(us, dtype), _held(vs, dtype)
    new_us = [torch.empty(u.shape, dtype=dtype, device=like.device) for u in us]
    new_vs = [torch.empty(v.shape, dtype=dtype, device=like.device) for v in vs]
    normalized = [torch.empty(w.shape, dtype=w.dtype, device=like.device) for w in weights] if return_weights else []
    sigma = torch.empty(len(weights), dtype=dtype, device=like.device)
    work = torch.empty(plan.work, dtype=dtype, device=like.device)
    sums = torch.empty(plan.sums, dtype=torch.float64, device=like.device)

    firsts, seconds = ((wide_us, new_us), (wide_vs, new_vs)) if u_first else ((wide_vs, new_vs), (wide_us, new_us))
    pointers = (weights, firsts[0], seconds[0], firsts[1], seconds[1], normalized or [None] * len(weights))
    table = _table(pointers, plan.rows, like)
    args = (table, work, sums, sigma, _counter(like), len(weights), *plan.blocks, _as_bits(eps), n_iterations)
    constants = {"TYPE": TRITON_TYPES[like.dtype], **plan.constants}
    multiply, combine, divide = plan.blocks
    blocks = (*([multiply, combine] * n_iterations or [multiply]), divide)
    _launch_phases(power_iteration_kernel, like, args, blocks, 0, constants)

    return sigma, normalized, _returned(new_us, us), _returned(new_vs, vs)


def power_iteration_backward(
    grad_sigma: Tensor | None,
    grads: list[Tensor],
    weights: list[Tensor],
    sigma: Tensor,
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    eps: float,
) -> list[Tensor]:
    """`torch.ops.pygen.power_iteration_backward` on a GPU: the weights' gradients, contiguous."""
    op = "power_iteration_backward"
    _check(op, weights, us, vs, dims)
    like, dtype = weights[0], compute_dtype(weights[0].dtype)
    for name, given in (("sigma", sigma), ("grad_sigma", grad_sigma)):
        if given is not None and (given.shape != (len(weights),) or given.device != like.device):
            raise RuntimeError(f"{op}: {name} must be ({len(weights)},) beside the weights, got {tuple(given.shape)}")
    if grads and len(grads) != len(weights):
        raise RuntimeError(f"{op}: grads must be none or {len(weights)}, got {len(grads)}")
    for grad, weight in zip(grads, weights, strict=False):
        if grad.numel() and (grad.shape != weight.shape or grad.device != like.device):
            raise RuntimeError(
                f"{op}: grads must be empty or like their weights, got {tuple(grad.shape)} for {tuple(weight.shape)}"
            )
    plan = _backward_plan(tuple(weight.shape for weight in weights), tuple(dims), dtype == torch.float64)

    weights, wide_us, wide_vs = _held(weights, like.dtype), _held(us, dtype), _held(vs, dtype)
    sigma = sigma.to(dtype).contiguous()
    grad_sigma = None if grad_sigma is None else grad_sigma.to(dtype).contiguous()
    given_grads = [g.to(like.dtype).contiguous() if g.numel() else None for g in grads] or [None] * len(weights)
    results = [torch.empty(w.shape, dtype=w.dtype, device=like.device) for w in weights]
    sums = torch.empty(plan.sums, dtype=torch.float64, device=like.device)

    table = _table((weights, given_grads, wide_us, wide_vs, results), plan.rows, like)
    args = (table, sigma, grad_sigma, sums, _counter(like), len(weights), *plan.blocks, _as_bits(eps))
    constants = {"TYPE": TRITON_TYPES[like.dtype], **plan.constants}
    first = 0 if any(g is not None for g in given_grads) else 1
    _launch_phases(power_iteration_backward_kernel, like, args, plan.blocks * 2, first, constants)
    return results
