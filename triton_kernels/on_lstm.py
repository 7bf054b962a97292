"""The recurrence of ON-LSTM on the GPU. Called by `pygen.ops.on_lstm`; the formulas stand there.

Every step is one matrix product, h W^T, by the vendor's library, and one launch of the fused cell, which adds the
inputs' part; backward, one launch of the cell's gradient and one product. Nothing waits for the device, and the shapes
of dense batches do not change from step to step, so a CUDA graph captures the whole. Where the weight is small enough
to be read again and again by single multiprocessors, the whole sequence is one launch (`_on_lstm_sequence`).

Types. The cell state, the gates behind their sigmoids and all sums are float32 (float64 for float64). Of 16-bit tensors
the products take the hidden state, the gates' gradients and the weight as they are, in 16 bits, as tensor cores want
them, and add in float32: between steps the hidden state and its gradient are what 16 bits hold.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pygen.reference._dtypes import compute_dtype
from pygen.reference.on_lstm import steps_of
from pygen.triton_kernels import _common
from pygen.triton_kernels import _on_lstm_sequence as sequence
from pygen.triton_kernels._on_lstm_cell import (
    LOGITS,
    MASTERS,
    UNITS,
    WHOLE,
    on_lstm_cell_backward_kernel,
    on_lstm_cell_kernel,
)

# Elements, of 4 and 8 bytes, of the largest tile (chunks, units of a chunk) that holds a row; of a longer row's tiles a
# quarter. A program has a dozen such tensors, backward twice as many. (The next size spills on sm_80 or gfx942.)
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = {4: 4096, 8: 1024}, {4: 2048, 8: 1024}
# Short rows share a program, up to so many bytes. The interpreter takes its time for each program.
TARGET_TILE = 2**16 if _common.interpreted else 1024
# Bytes of a thread's part of a tile.
PER_THREAD = 32


class _Shape(NamedTuple):
    """The sizes of a call and how its sequences are laid out in rows."""

    batch: int
    size: int
    rows: int
    width: int
    n: int
    chunk_size: int
    steps: list[int]  # how many sequences have each step

    @property
    def begins(self) -> list[int]:
        """The first row of each step."""
        found, at = [], 0
        for count in self.steps:
            found.append(at)
            at += count
        return found


def _shape(op: str, rows: int, width: int, cell: Tensor, batch_sizes: Tensor | None, chunk_size: int) -> _Shape:
    if cell.dim() != 2 or chunk_size < 1 or cell.size(1) % chunk_size:
        raise RuntimeError(
            f"{op}: cell must be (B, H) with H a multiple of chunk_size, got {tuple(cell.shape)} and {chunk_size}"
        )
    batch, size = cell.shape
    n = size // chunk_size
    if width != 2 * n + 4 * size:
        raise RuntimeError(f"{op}: gates must have 2 H / chunk_size + 4 H = {2 * n + 4 * size} columns, got {width}")
    return _Shape(batch, size, rows, width, n, chunk_size, steps_of(op, rows, batch, batch_sizes))


def _check(op: str, like: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """What the kernels read without asking."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or tensor.device != like.device):
            raise RuntimeError(
                f"{op}: {name} must be {shape} on {like.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )


def _contiguous(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _masked(weight: Tensor | None, mask: Tensor | None) -> Tensor | None:
    return weight.masked_fill(mask, 0.0) if weight is not None and mask is not None else weight


def _tile(shape: _Shape, itemsize: int, elements: int) -> tuple[bool, int, int, int]:
    """(whether a row is one tile, and a tile's rows, chunks and units of a chunk)."""
    n, chunk = triton.next_power_of_2(shape.n), triton.next_power_of_2(shape.chunk_size)
    if n * chunk <= elements:
        most = triton.next_power_of_2(max(shape.steps))
        return True, max(1, min(most, TARGET_TILE // itemsize // (n * chunk))), n, chunk
    chunk = min(chunk, elements // 4)
    return False, 1, min(n, elements // 4 // chunk), chunk


def _persistent(like: Tensor, shape: _Shape) -> bool:
    """Whether one launch takes all steps: where it pays, and every sequence has every step."""
    if min(shape.steps) < shape.batch:
        return False
    return sequence.wanted(like, shape.batch, shape.n, shape.chunk_size, shape.rows)


def _scratch(shape: _Shape, one_tile: bool, fields: int, like: Tensor, wide: torch.dtype) -> Tensor | None:
    if one_tile:
        return None
    return torch.empty((max(shape.steps), fields, shape.n), dtype=wide, device=like.device)


def _product(like: Tensor, shape: _Shape, columns: int) -> Tensor:
    """Where the products of all steps go, one after the other."""
    return torch.empty((max(shape.steps), columns), dtype=like.dtype, device=like.device)


def _constants(like: Tensor, shape: _Shape, itemsize: int, elements: dict[int, int]) -> tuple[bool, dict, int]:
    """(whether a row is one tile, the kernel's constants, its warps)."""
    one_tile, rows, n, chunk = _tile(shape, itemsize, elements[itemsize])
    constants = {"FAST": like.dtype in _common.SIXTEEN_BIT, "R": rows, "N": n, "C": chunk}
    return one_tile, constants, _common.warps_for(rows * n * chunk, PER_THREAD // itemsize // (1 if one_tile else 2))


def _run(
    gates: Tensor,
    matrix: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
    zoneout: Tensor | None,
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    shape: _Shape,
) -> None:
    """All steps; `hidden` and `cell` become the last states."""
    if matrix is not None and _persistent(gates, shape):
        product = _product(cell, shape, shape.width)
        sequence.run(gates, matrix, product, hidden, cell, zoneout, results, shape.n, shape.chunk_size)
        return
    one_tile, constants, warps = _constants(gates, shape, cell.element_size(), FORWARD_ELEMENTS)
    scratch = _scratch(shape, one_tile, 2, gates, cell.dtype)
    product = None if matrix is None else _product(gates, shape, shape.width)
    for begin, count in zip(shape.begins, shape.steps, strict=True):
        if count == 0:
            break
        if matrix is not None and product is not None:
            torch.mm(hidden[:count], matrix.t(), out=product[:count])
        numbers = (begin, count, shape.rows, shape.n, shape.chunk_size)
        args = (gates, product, hidden, cell, zoneout, *results, scratch, *numbers)
        programs = triton.cdiv(count, constants["R"])
        for phase in (WHOLE,) if one_tile else (MASTERS, UNITS):
            _common.launch(on_lstm_cell_kernel, programs, gates, args, {**constants, "PHASE": phase.value}, warps)


def on_lstm(
    gates: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor,
    zoneout: Tensor | None,
    batch_sizes: Tensor | None,
    chunk_size: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.pygen.on_lstm` on a GPU: (output, last hidden, last cell, distances, cells, activations), contiguous;
    the last two are empty unless `save`."""
    if gates.dim() != 2:
        raise RuntimeError(f"on_lstm: gates must be (N, 2 H / chunk_size + 4 H), got {tuple(gates.shape)}")
    shape = _shape("on_lstm", *gates.shape, cell, batch_sizes, chunk_size)
    batch, size, rows, width = shape[:4]
    matrices, states = (width, size), (batch, size)
    expected = {"weight": (weight, matrices), "mask": (mask, matrices), "hidden": (hidden, states)}
    _check("on_lstm", gates, {**expected, "cell": (cell, states), "zoneout": (zoneout, (2, rows, size))})
    wide, device = compute_dtype(gates.dtype), gates.device

    output = torch.empty((rows, size), dtype=gates.dtype, device=device)
    distances = torch.empty((2, rows), dtype=wide, device=device)
    cells = torch.empty((rows, size) if save else 0, dtype=wide, device=device)
    activations = torch.empty((rows, width) if save else 0, dtype=wide, device=device)
    new_hidden = torch.empty(states, dtype=gates.dtype, device=device)
    new_hidden.zero_() if hidden is None else new_hidden.copy_(hidden)
    new_cell = torch.empty(states, dtype=wide, device=device).copy_(cell)
    if size == 0:
        distances.fill_(float("nan"))  # means of nothing
    elif rows:
        matrix = _contiguous(_masked(weight, mask), gates.dtype)
        results = (output, cells if save else None, activations if save else None, distances)
        _run(gates.contiguous(), matrix, new_hidden, new_cell, _contiguous(zoneout), results, shape)
    return output, new_hidden, new_cell, distances, cells, activations


def _run_steps_back(
    grad_output: Tensor | None,
    matrix: Tensor | None,
    product: Tensor | None,
    carried: tuple[Tensor | None, Tensor],
    grad_distances: Tensor | None,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor],
    of_gates: Tensor,
    shape: _Shape,
) -> None:
    """Step by step from the last; `carried` and `product` as `step_back` leaves them."""
    zoneout, cell, cells, activations = saved
    one_tile, constants, warps = _constants(of_gates, shape, cell.element_size(), BACKWARD_ELEMENTS)
    scratch = _scratch(shape, one_tile, 4, of_gates, cell.dtype)
    later, begins = 0, shape.begins
    for at in reversed(range(len(shape.steps))):
        count, begin = shape.steps[at], begins[at]
        if count == 0:
            continue
        before, begin_before = (cells, begins[at - 1]) if at else (cell, 0)
        args = (grad_output, product, *carried, grad_distances, zoneout, before, activations, of_gates, scratch)
        args += (begin, begin_before, count, later, shape.rows, shape.n, shape.chunk_size)
        programs = triton.cdiv(count, constants["R"])
        for phase in (WHOLE,) if one_tile else (MASTERS, UNITS, LOGITS):
            of_phase = {**constants, "PHASE": phase.value}
            _common.launch(on_lstm_cell_backward_kernel, programs, of_gates, args, of_phase, warps)
        if matrix is not None and product is not None:
            torch.mm(of_gates[begin : begin + count], matrix, out=product[:count])
        later = count


def _run_back(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    matrix: Tensor | None,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor],
    of_gates: Tensor,
    of_hidden: Tensor,
    of_cell: Tensor,
    shape: _Shape,
) -> None:
    """All steps from the last; `grads` are those of the output, the last hidden state and the distances, `of_cell`
    begins as that of the last cell state."""
    grad_output, grad_hidden, grad_distances = grads
    zoneout = saved[0]
    carried = None
    if grad_hidden is not None or zoneout is not None:
        carried = torch.zeros(of_cell.shape, dtype=of_cell.dtype, device=of_cell.device)
        if grad_hidden is not None:
            carried.copy_(grad_hidden)
    product = None
    if matrix is not None and _persistent(of_gates, shape):
        product = _product(of_cell, shape, shape.size)
        both = (carried, of_cell)
        sequence.run_back(
            grad_output, matrix, product, both, grad_distances, saved, of_gates, shape.n, shape.chunk_size
        )
    else:
        product = None if matrix is None else _product(of_gates, shape, shape.size)
        _run_steps_back(grad_output, matrix, product, (carried, of_cell), grad_distances, saved, of_gates, shape)
    # A sequence without a step keeps the gradient that it came with.
    total = torch.zeros_like(of_cell) if carried is None else carried
    first = shape.steps[0]
    if zoneout is None:
        total[:first].zero_()
    if product is not None:
        total[:first] += product[:first]
    of_hidden.copy_(total)


def on_lstm_backward(
    grad_output: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    grad_distances: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    cell: Tensor,
    zoneout: Tensor | None,
    output: Tensor,
    cells: Tensor,
    activations: Tensor,
    batch_sizes: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.pygen.on_lstm_backward` on a GPU: gradients of the gates, of the first hidden and of the first cell
    state, contiguous."""
    op = "on_lstm_backward"
    if activations.dim() != 2:
        raise RuntimeError(f"{op}: activations must be (N, 2 H / chunk_size + 4 H), got {tuple(activations.shape)}")
    shape = _shape(op, *activations.shape, cell, batch_sizes, chunk_size)
    batch, size, rows, width = shape[:4]
    states, outputs, matrices = (batch, size), (rows, size), (width, size)
    expected = {
        "grad_output": (grad_output, outputs),
        "grad_hidden": (grad_hidden, states),
        "grad_cell": (grad_cell, states),
        "grad_distances": (grad_distances, (2, rows)),
        "weight": (weight, matrices),
        "mask": (mask, matrices),
        "zoneout": (zoneout, (2, *outputs)),
        "output": (output, outputs),
        "cells": (cells, outputs),
    }
    _check(op, activations, expected)
    wide, device = compute_dtype(output.dtype), output.device

    of_gates = torch.empty((rows, width), dtype=output.dtype, device=device)
    of_hidden = torch.empty(states, dtype=output.dtype, device=device)
    of_cell = torch.empty(states, dtype=wide, device=device)
    of_cell.zero_() if grad_cell is None else of_cell.copy_(grad_cell)
    if size == 0 or rows == 0:
        of_hidden.zero_() if grad_hidden is None else of_hidden.copy_(grad_hidden)
        return of_gates, of_hidden, of_cell.to(cell.dtype)
    matrix = _contiguous(_masked(weight, mask), output.dtype)
    grads = (_contiguous(grad_output), _contiguous(grad_hidden), _contiguous(grad_distances))
    first_cell = cell.to(wide).contiguous()
    saved = (_contiguous(zoneout), first_cell, cells.contiguous(), activations.contiguous())
    _run_back(grads, matrix, saved, of_gates, of_hidden, of_cell, shape)
    return of_gates, of_hidden, of_cell.to(cell.dtype)
