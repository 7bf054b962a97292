"""The recurrence of ON-LSTM, step by step in plain PyTorch. The fused op is `pygen.ops.on_lstm`, whose docstring has
the maths."""

from typing import NamedTuple

import torch
from torch import Tensor

from pygen.reference._dtypes import compute_dtype, widen


class _Gates(NamedTuple):
    """What a cell computes from its gates: the master gates' softmaxes (B, n), and the four gates (B, n, C)."""

    p_in: Tensor
    p_forget: Tensor
    output: Tensor
    candidate: Tensor
    input: Tensor
    forget: Tensor

    @classmethod
    def split(cls, x: Tensor, chunk_size: int) -> "_Gates":
        """The parts of (B, 2 n + 4 H), whatever they hold."""
        n = x.size(1) // (2 + 4 * chunk_size)
        masters, rest = x.split([2 * n, x.size(1) - 2 * n], 1)
        return cls(*masters.chunk(2, 1), *rest.reshape(-1, 4 * n, chunk_size).chunk(4, 1))

    def joined(self) -> Tensor:
        return torch.cat([part.flatten(1) for part in self], 1)

    @property
    def master_in(self) -> Tensor:
        """1 - cumax, summed from the end: (B, n, 1)."""
        return (self.p_in.flip(1).cumsum(1).flip(1) - self.p_in).unsqueeze(2)

    @property
    def master_forget(self) -> Tensor:
        """cumax: (B, n, 1)."""
        return self.p_forget.cumsum(1).unsqueeze(2)

    def combined(self) -> tuple[Tensor, Tensor]:
        """(what is written, what is kept): the gates and master gates together, (B, n, C)."""
        master_in, master_forget = self.master_in, self.master_forget
        overlap = master_in * master_forget
        return self.input * overlap + (master_in - overlap), self.forget * overlap + (master_forget - overlap)


def _activated(gates: Tensor, chunk_size: int) -> _Gates:
    parts = _Gates.split(gates, chunk_size)
    return _Gates(
        parts.p_in.softmax(1),
        parts.p_forget.softmax(1),
        parts.output.sigmoid(),
        parts.candidate.tanh(),
        parts.input.sigmoid(),
        parts.forget.sigmoid(),
    )


def _distances(parts: _Gates) -> Tensor:
    return torch.stack((1 - parts.master_forget.mean((1, 2)), parts.master_in.mean((1, 2))))


def steps_of(op: str, rows: int, batch: int, batch_sizes: Tensor | None) -> list[int]:
    """How many sequences have each step, of rows that are steps behind each other.

    Raises:
        RuntimeError: `batch_sizes` that increase or do not add up, or rows that are no whole number of steps.
    """
    if batch_sizes is None:
        if rows % batch if batch else rows:
            raise RuntimeError(f"{op}: gates must have a multiple of the {batch} sequences' rows, got {rows}")
        return [batch] * (rows // max(batch, 1))
    steps: list[int] = batch_sizes.tolist()
    falling = all(a >= b for a, b in zip([batch, *steps], [*steps, 0], strict=True))
    if not falling or sum(steps) != rows:
        raise RuntimeError(
            f"{op}: batch_sizes must not increase, begin with at most the {batch} sequences and add up to {rows} rows, "
            f"got {steps}"
        )
    return steps


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return widen(weight if mask is None else weight.masked_fill(mask, 0.0))


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
    """(output (N, H), last hidden (B, H), last cell (B, H), distances (2, N), cells (N, H), activations (N, W)).

    Rows are steps behind each other, B rows a step or, with batch_sizes, as many as it says. Without a weight it is one
    step whose gates have all in them. The last two results are what the backward needs: empty unless `save`.
    """
    batch, size = cell.shape
    matrix = None if weight is None else _masked(weight, mask)
    wide, c = widen(gates), widen(cell)
    h = torch.zeros_like(c) if hidden is None else widen(hidden)
    outputs, cells, activations, distances = [], [], [], []
    finished_h, finished_c = [], []
    at = 0
    for rows in steps_of("on_lstm", len(gates), batch, batch_sizes):
        finished_h.append(h[rows:])
        finished_c.append(c[rows:])
        h, c = h[:rows], c[:rows]
        x = wide[at : at + rows]
        parts = _activated(x if matrix is None else x + h @ matrix.T, chunk_size)
        written, kept = (part.flatten(1) for part in parts.combined())
        new_c = kept * c + written * parts.candidate.flatten(1)
        new_h = parts.output.flatten(1) * new_c.tanh()
        if zoneout is not None:
            keep_c, keep_h = widen(zoneout[:, at : at + rows])
            new_c, new_h = keep_c * c + (1 - keep_c) * new_c, keep_h * h + (1 - keep_h) * new_h
        h, c = new_h, new_c
        outputs.append(h)
        cells.append(c)
        activations.append(parts.joined())
        distances.append(_distances(parts))
        at += rows
    finished_h.append(h)
    finished_c.append(c)

    def stacked(values: list[Tensor], shape: tuple[int, ...], dim: int = 0) -> Tensor:
        return torch.cat(values, dim) if values else wide.new_empty(shape)

    return (
        stacked(outputs, (0, size)).to(gates.dtype),
        # From the sequence that ended last to the one that ended first: the longest come first.
        torch.cat(finished_h[::-1]).to(gates.dtype),
        torch.cat(finished_c[::-1]),
        stacked(distances, (2, 0), 1),
        stacked(cells, (0, size)) if save else wide.new_empty(0),
        stacked(activations, (0, gates.size(1))) if save else wide.new_empty(0),
    )


def _cell_backward(
    parts: _Gates, cell: Tensor, grad_h: Tensor, grad_c: Tensor, grad_distances: Tensor | None, injected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the gates, of the cell before): grad_h and grad_c are those of the new hidden and cell state."""
    chunk_size = parts.output.size(2)
    n = parts.p_in.size(1)

    def chunks(x: Tensor) -> Tensor:
        return x.reshape(-1, n, chunk_size)

    cell, grad_h, grad_c = chunks(cell), chunks(grad_h), chunks(grad_c)
    written, kept = parts.combined()
    squashed = (kept * cell + written * parts.candidate).tanh()
    grad_c = grad_c + grad_h * parts.output * (1 - squashed * squashed)
    master_in, master_forget = parts.master_in, parts.master_forget
    overlap = master_in * master_forget
    d_kept, d_written = grad_c * cell, grad_c * parts.candidate
    d_overlap = (d_kept * (parts.forget - 1) + d_written * (parts.input - 1)).sum(2)
    d_forget = d_kept.sum(2) + d_overlap * master_in.squeeze(2)
    d_in = d_written.sum(2) + d_overlap * master_forget.squeeze(2)
    if grad_distances is not None:
        d_forget = d_forget - grad_distances[0].unsqueeze(1) / n
        d_in = d_in + grad_distances[1].unsqueeze(1) / n
    d = _Gates(
        d_in.cumsum(1) - d_in,  # p_j is in every 1 - cumax before it
        d_forget.flip(1).cumsum(1).flip(1),  # and in every cumax from it on
        grad_h * squashed,
        grad_c * written,
        d_written * overlap,
        d_kept * overlap,
    )
    if injected is not None:
        d = _Gates(*(a + b for a, b in zip(d, _Gates.split(injected, chunk_size), strict=True)))
    before = _Gates(
        parts.p_in * (d.p_in - (parts.p_in * d.p_in).sum(1, keepdim=True)),
        parts.p_forget * (d.p_forget - (parts.p_forget * d.p_forget).sum(1, keepdim=True)),
        d.output * parts.output * (1 - parts.output),
        d.candidate * (1 - parts.candidate * parts.candidate),
        d.input * parts.input * (1 - parts.input),
        d.forget * parts.forget * (1 - parts.forget),
    )
    return before.joined(), (grad_c * kept).flatten(1)


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
    grad_cells: Tensor | None = None,
    grad_activations: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates (N, W), of the first hidden state (B, H) and of the first cell state (B, H).

    The gradient of the weight is that of the gates times the hidden states before: a product that callers form.
    The last two arguments are gradients of what `on_lstm` saved; only derivatives of derivatives have them.
    """
    batch, size = cell.shape
    steps = steps_of("on_lstm_backward", len(output), batch, batch_sizes)
    matrix = None if weight is None else _masked(weight, mask)
    wide = compute_dtype(output.dtype)

    def of_last(grad: Tensor | None) -> Tensor:
        return cell.new_zeros(cell.shape, dtype=wide) if grad is None else widen(grad)

    end_h, end_c = of_last(grad_hidden), of_last(grad_cell)
    # Gradients of the states behind the step in hand, of the sequences that have it.
    grad_h, grad_c = end_h[:0], end_c[:0]
    found: list[Tensor] = []
    at = len(output)
    for step in reversed(range(len(steps))):
        rows = steps[step]
        at -= rows
        here = slice(at, at + rows)
        # Sequences whose last step this is.
        grad_h = torch.cat((grad_h, end_h[len(grad_h) : rows]))
        grad_c = torch.cat((grad_c, end_c[len(grad_c) : rows]))
        if grad_output is not None:
            grad_h = grad_h + widen(grad_output[here])
        if grad_cells is not None:
            grad_c = grad_c + widen(grad_cells[here])
        before = cells[at - steps[step - 1] :][:rows] if step else widen(cell)[:rows]
        past_h = past_c = None
        if zoneout is not None:
            keep_c, keep_h = widen(zoneout[:, here])
            past_h, past_c = grad_h * keep_h, grad_c * keep_c
            grad_h, grad_c = grad_h - past_h, grad_c - past_c
        of_gates, grad_c = _cell_backward(
            _Gates.split(activations[here], chunk_size),
            before,
            grad_h,
            grad_c,
            None if grad_distances is None else widen(grad_distances[:, here]),
            None if grad_activations is None else grad_activations[here],
        )
        grad_h = torch.zeros_like(grad_h) if matrix is None else of_gates @ matrix
        if past_h is not None and past_c is not None:
            grad_h, grad_c = grad_h + past_h, grad_c + past_c
        found.append(of_gates)
    grad_h = torch.cat((grad_h, end_h[len(grad_h) :]))
    grad_c = torch.cat((grad_c, end_c[len(grad_c) :]))
    of_all = torch.cat(found[::-1]) if found else activations.new_empty(0, activations.shape[1])
    return of_all.to(output.dtype), grad_h.to(output.dtype), grad_c.to(cell.dtype)
