"""Whole sequences of ON-LSTM in one launch, for weights small enough to be read anew at every step. `on_lstm` asks
`wanted` and otherwise goes step by step.

A program owns R sequences from the first step to the last: it multiplies their hidden states by the weight, writes the
products, and then is the cell of `_on_lstm_cell`; backward, first the cell, then the product. What one phase hands to
the next lies in memory, a few kilobytes that stay in cache, as does the weight. Programs do not wait for one another.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.triton_kernels import _common
from pygen.triton_kernels._on_lstm_cell import WHOLE, step, step_back

# Sequences of a program: the rows of a tensor core's tile.
ROWS = 16
# The bytes of a weight that one multiprocessor reads from the second-level cache in about the time of the two launches
# that it saves: 64 bytes a cycle, 5 us.
MOST_BYTES = 576 * 1024
# Steps below which there is nothing to save.
FEWEST_STEPS = 2
# Multiprocessors where the device does not say: with more programs than these, steps one by one fill the chip.
MULTIPROCESSORS = 128
WARPS = 8
# Bytes of a tile of the cell, half of the backward pass's in `on_lstm`: addresses of the product take registers too.
CELL_TILE = 4096
# Columns and depth of a product's tile, and how many lie in shared memory, by bytes of an element. The interpreter
# takes its time for each.
COLUMNS, DEPTH, STAGES = (1024, 128, 1) if _common.interpreted else (128, {2: 64, 4: 32}, 3)


@triton.jit
def _multiply(
    left,
    right,
    product,
    in_batch,
    length,
    columns,
    to_next_column,
    to_next_row,
    M: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Rows of `length` elements, to which `left` (R, 1) points, times the matrix `right` (length, columns), whose
    elements are as far apart as said, to the rows that `product` points to."""
    for first in range(0, columns, M):
        column = first + tl.arange(0, M)[None, :]
        sums = tl.zeros((left.shape[0], M), tl.float32)
        for start in tl.range(0, length, K, num_stages=STAGES):
            k = start + tl.arange(0, K)
            x = tl.load(left + k[None, :], mask=in_batch & (k < length)[None, :], other=0.0)
            at = k[:, None] * to_next_row + column * to_next_column
            w = tl.load(right + at, mask=(k < length)[:, None] & (column < columns), other=0.0)
            if INTERPRETED:
                # The interpreter multiplies bfloat16's bits.
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(x, w, sums, input_precision=PRECISION)
        tl.store(product + column, sums, mask=in_batch & (column < columns))


@triton.jit(do_not_specialize=["batch", "rows"])
def on_lstm_sequence_kernel(
    gates,
    weight,
    product,
    hidden,
    cell,
    zoneout,
    output,
    cells,
    activations,
    distances,
    batch,
    rows,
    n,
    chunk_size,
    FAST: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All steps of R sequences, the cell for PART of them at a time. `hidden` and `cell` are replaced by the last
    states."""
    first = tl.program_id(0).to(tl.int64) * R
    mine = first + tl.arange(0, R)[:, None]
    size, width = n * chunk_size, n * (2 + 4 * chunk_size)
    begin = tl.zeros((), tl.int64)
    for _ in tl.range(0, rows // batch, num_stages=1):
        _multiply(
            hidden + mine * size, weight, product + mine * width, mine < batch, size, width, size, 1,
            M, K, STAGES, PRECISION, INTERPRETED,
        )  # fmt: skip
        # What all threads have written is read by others.
        tl.debug_barrier()
        for part in tl.range(0, R, PART, num_stages=1):
            row = first + part + tl.arange(0, PART)[:, None]
            step(
                gates, product, hidden, cell, zoneout, output, cells, activations, distances, None, row, begin, batch,
                rows, n, chunk_size, WHOLE, FAST, N, C,
            )  # fmt: skip
        tl.debug_barrier()
        begin += batch


@triton.jit(do_not_specialize=["batch", "rows"])
def on_lstm_sequence_backward_kernel(
    grad_output,
    weight,
    product,
    carried_h,
    carried_c,
    grad_distances,
    zoneout,
    cell,
    cells,
    activations,
    of_gates,
    batch,
    rows,
    n,
    chunk_size,
    FAST: tl.constexpr,
    R: tl.constexpr,
    PART: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All steps of R sequences from the last; the hidden state's gradient is left in `carried_h` and `product`."""
    first = tl.program_id(0).to(tl.int64) * R
    mine = first + tl.arange(0, R)[:, None]
    size, width = n * chunk_size, n * (2 + 4 * chunk_size)
    begin = tl.zeros((), tl.int64) + rows
    later = tl.zeros((), tl.int64)
    for _ in tl.range(0, rows // batch, num_stages=1):
        begin -= batch
        before = cell
        if begin > 0:
            before = cells + (begin - batch) * size
        for part in tl.range(0, R, PART, num_stages=1):
            row = first + part + tl.arange(0, PART)[:, None]
            step_back(
                grad_output, product, carried_h, carried_c, grad_distances, zoneout, before, activations, of_gates,
                None, row, begin, 0, batch, later, rows, n, chunk_size, WHOLE, FAST, N, C,
            )  # fmt: skip
        # What all threads have written is read by others.
        tl.debug_barrier()
        left = of_gates + (mine + begin) * width
        _multiply(
            left, weight, product + mine * size, mine < batch, width, size, 1, size,
            M, K, STAGES, PRECISION, INTERPRETED,
        )  # fmt: skip
        tl.debug_barrier()
        later = tl.zeros((), tl.int64) + batch


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def _padded(n: int, chunk_size: int) -> tuple[int, int]:
    """(chunks, units of a chunk), filled up to powers of two."""
    return triton.next_power_of_2(n), triton.next_power_of_2(chunk_size)


def _cell_elements(n: int, chunk_size: int) -> int:
    """The elements of the cell's tile. Of rows that are filled up each has an address of its own, in two registers."""
    exact = _padded(n, chunk_size) == (n, chunk_size)
    return (CELL_TILE if exact else CELL_TILE // 4) // torch.float32.itemsize


def wanted(like: Tensor, batch: int, n: int, chunk_size: int, rows: int) -> bool:
    """Whether a dense batch of `like`'s dtype goes through all its steps in one launch.

    It does if the weight is small enough to be read at every step, a row of the cell is one tile, and there are no more
    programs than multiprocessors: beyond, a product of the vendor's for all sequences reads the weight less often. Not
    in float64, which has no fast product of small tiles, and not on AMD, whose scalar registers the addresses overflow.
    """
    chunks, units = _padded(n, chunk_size)
    size = n * chunk_size
    return (
        like.dtype != torch.float64
        and _common.warp_size == 32
        and chunks * units <= _cell_elements(n, chunk_size)
        and (2 * n + 4 * size) * size * like.element_size() <= MOST_BYTES
        and rows >= FEWEST_STEPS * batch
        and triton.cdiv(batch, ROWS) <= _multiprocessors(like.device)
    )


def _constants(like: Tensor, n: int, chunk_size: int) -> dict[str, Any]:
    chunks, units = _padded(n, chunk_size)
    return {
        "FAST": like.dtype in _common.SIXTEEN_BIT,
        "R": ROWS,
        "PART": min(ROWS, _cell_elements(n, chunk_size) // (chunks * units)),
        "N": chunks,
        "C": units,
        "M": COLUMNS,
        "K": DEPTH if isinstance(DEPTH, int) else DEPTH[like.element_size()],
        "STAGES": STAGES,
        # Three products of TF32 lose nothing that a sum in float32 keeps.
        "PRECISION": "ieee" if _common.interpreted else "tf32x3",
        "INTERPRETED": _common.interpreted,
    }


def run(
    gates: Tensor,
    matrix: Tensor,
    product: Tensor,
    hidden: Tensor,
    cell: Tensor,
    zoneout: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    n: int,
    chunk_size: int,
) -> None:
    """All steps; `hidden` and `cell` become the last states."""
    batch = len(cell)
    args = (gates, matrix, product, hidden, cell, zoneout, *results, batch, len(gates), n, chunk_size)
    constants, programs = _constants(gates, n, chunk_size), triton.cdiv(batch, ROWS)
    _common.launch(on_lstm_sequence_kernel, programs, gates, args, constants, WARPS, num_stages=1)


def run_back(
    grad_output: Tensor | None,
    matrix: Tensor,
    product: Tensor,
    carried: tuple[Tensor | None, Tensor],
    grad_distances: Tensor | None,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor],
    of_gates: Tensor,
    n: int,
    chunk_size: int,
) -> None:
    """All steps from the last; `carried` and `product` as `step_back` leaves them, `saved` are zoneout, first cell
    state, cell states and activations."""
    batch = len(carried[1])
    args = (grad_output, matrix, product, *carried, grad_distances, *saved, of_gates, batch, len(of_gates))
    constants, programs = _constants(of_gates, n, chunk_size), triton.cdiv(batch, ROWS)
    kernel = on_lstm_sequence_backward_kernel
    _common.launch(kernel, programs, of_gates, (*args, n, chunk_size), constants, WARPS, num_stages=1)
