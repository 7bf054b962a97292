"""How often each code was chosen and the sum of what chose it, on the GPU, without atomics. Called by
`pygen.ops.codebook_statistics`.

The rows are sorted by their code and cut into chunks of equal length, so that a code that all rows chose costs no more
than one that few did. `chunk_sums_kernel` adds each code's rows inside one chunk and writes the sum of a code that lies
in one chunk; of a code that does not, `boundary_sums_kernel` adds the parts. What is added in which order depends on
the sorted indices alone: the same bits, run after run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.triton_kernels import _common

# Rows of a chunk at least, chunks times D at most: the parts of codes that do not lie in one chunk are float64.
CHUNK_ROWS, PARTS = 32, 2**20
# Rows that are loaded together, and columns of a program.
ROWS, COLUMNS = 8, 128


@triton.jit
def _add_rows(pointer, order, start, end, step, columns, column_step, mask, ROWS: tl.constexpr, C: tl.constexpr):
    """Sum (C,) in float64 of the rows order[start:end], or without an order of the rows themselves."""
    sums = tl.zeros((ROWS, C), tl.float64)
    for at in range(start, end, ROWS):
        i = at + tl.arange(0, ROWS)
        row = i if order is None else tl.load(order + i, mask=i < end, other=0)
        where = row.to(tl.int64)[:, None] * step + columns.to(tl.int64)[None, :] * column_step
        sums += tl.load(pointer + where, mask=(i < end)[:, None] & mask[None, :], other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def chunk_sums_kernel(
    x_pointer,
    sorted_pointer,
    order_pointer,
    offsets_pointer,
    sums_pointer,
    parts_pointer,
    n,
    d,
    codes,
    length,
    column_blocks,
    x_strides,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """One chunk of `length` sorted rows, C columns. Parts (chunks, 2, D): of the code that began before the chunk, and
    of the one that begins in it and goes on behind it."""
    chunk = tl.program_id(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * C + tl.arange(0, C)
    mask = columns < d
    first = chunk.to(tl.int64) * length
    last = tl.minimum(first + length, n)
    at = first
    code = tl.load(sorted_pointer + at)
    while (at < last) & (code < codes):
        begin = tl.load(offsets_pointer + code)
        end = tl.load(offsets_pointer + code + 1)
        until = tl.minimum(end, last)
        total = _add_rows(x_pointer, order_pointer, at, until, x_strides[0], columns, x_strides[1], mask, ROWS, C)
        if (begin >= first) & (end <= last):
            tl.store(sums_pointer + code.to(tl.int64) * d + columns, total, mask=mask)
        else:
            slot = tl.where(begin >= first, 1, 0)
            tl.store(parts_pointer + (chunk.to(tl.int64) * 2 + slot) * d + columns, total, mask=mask)
        at = until
        code = tl.load(sorted_pointer + at, mask=at < n, other=codes)


@triton.jit
def boundary_sums_kernel(
    sorted_pointer,
    offsets_pointer,
    parts_pointer,
    sums_pointer,
    d,
    codes,
    length,
    column_blocks,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """The code that begins in one chunk and goes on in the next: its part there, and what the chunks behind it have."""
    chunk = tl.program_id(0) // column_blocks
    columns = tl.program_id(0) % column_blocks * C + tl.arange(0, C)
    mask = columns < d
    behind = (chunk.to(tl.int64) + 1) * length
    code = tl.load(sorted_pointer + behind)
    if code < codes:
        begin = tl.load(offsets_pointer + code)
        end = tl.load(offsets_pointer + code + 1)
        if (begin < behind) & (begin >= behind - length):
            total = tl.load(parts_pointer + (chunk.to(tl.int64) * 2 + 1) * d + columns, mask=mask, other=0.0)
            total += _add_rows(
                parts_pointer, None, chunk.to(tl.int64) + 1, tl.cdiv(end, length), 2 * d, columns, 1, mask, ROWS, C
            )
            tl.store(sums_pointer + code.to(tl.int64) * d + columns, total, mask=mask)


def _sums_into(sums: Tensor, x: Tensor, keys: Tensor, order: Tensor, offsets: Tensor) -> None:
    n, d = x.shape
    codes = sums.size(0)
    columns = min(COLUMNS, triton.next_power_of_2(d))
    blocks = triton.cdiv(d, columns)
    length = max(CHUNK_ROWS, triton.cdiv(n, max(1, PARTS // d)))
    chunks = triton.cdiv(n, length)
    parts = torch.empty((chunks, 2, d), dtype=torch.float64, device=x.device)
    constants = {"ROWS": ROWS, "C": columns}
    args = (x, keys, order, offsets, sums, parts, n, d, codes, length, blocks, x.stride())
    _common.launch(chunk_sums_kernel, chunks * blocks, x, args, constants, 2)
    if chunks > 1:
        args = (keys, offsets, parts, sums, d, codes, length, blocks)
        _common.launch(boundary_sums_kernel, (chunks - 1) * blocks, x, args, constants, 2)


def codebook_statistics(x: Tensor, indices: Tensor, num_codes: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`torch.ops.pygen.codebook_statistics` on a GPU: (sums (K, D), counts (K,) int64) of x (N, D) by indices (N,), any
    strides. A row whose index is not in [0, K) is left out: to refuse it would be to wait for the GPU."""
    if x.dim() != 2 or indices.shape != x.shape[:1]:
        raise RuntimeError(
            f"codebook_statistics: x must be (N, D) and indices (N,), got {tuple(x.shape)} and {tuple(indices.shape)}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.zeros((num_codes, x.size(1)), dtype=dtype, device=x.device)
    chosen = (indices >= 0) & (indices < num_codes)
    if mask is not None:
        chosen = chosen & mask
    # What is left out is sorted to the end. 32 bits sort in half the time.
    keys = torch.where(chosen, indices, num_codes).to(torch.int32)
    keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(num_codes + 1, dtype=torch.int32, device=x.device))
    if x.numel() and num_codes:
        _sums_into(sums, x, keys, order, offsets)
    return sums, offsets.diff()
