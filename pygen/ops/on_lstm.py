"""The recurrence of ON-LSTM, a layer or one cell. Kernels: csrc/on_lstm.cpp (CPU), triton_kernels/on_lstm.py (GPU)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import (
    Rules,
    contiguous_like,
    derivative_through_reference,
    looped_vmap,
    operator,
)
from pygen.reference._dtypes import compute_dtype

_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(gates, weight, mask, hidden, cell, zoneout, batch_sizes, chunk_size, save):
    rows, size = gates.shape[0], cell.shape[1]

    def wide(*shape):
        return gates.new_empty(shape, dtype=compute_dtype(gates.dtype))

    saved = (wide(rows, size), wide(*gates.shape)) if save else (wide(0), wide(0))
    return gates.new_empty((rows, size)), gates.new_empty(cell.shape), wide(*cell.shape), wide(2, rows), *saved


def _fake_backward(
    grad_output, grad_hidden, grad_cell, grad_distances, weight, mask, cell, zoneout, output, cells, activations, *_
):
    return (
        activations.new_empty(activations.shape, dtype=output.dtype),
        cell.new_empty(cell.shape, dtype=output.dtype),
        contiguous_like(cell),
    )


def _save(ctx, inputs, output):
    gates, weight, mask, hidden, cell, zoneout, batch_sizes, ctx.chunk_size, save = inputs
    ctx.set_materialize_grads(False)
    ctx.saved = save
    ctx.save_for_backward(weight, mask, hidden, cell, zoneout, batch_sizes, output[0], *output[4:])


def _previous(output: Tensor, hidden: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """The hidden state before every row of `output`."""
    rows, batch = len(output), len(hidden)
    if batch_sizes is None:
        return torch.cat((hidden, output[: max(rows - batch, 0)]))[:rows]
    # Counted without looking at a value, so that a compiler can follow: a row's predecessor lies as many rows before it
    # as the step before has.
    steps = torch.arange(len(batch_sizes)).repeat_interleave(batch_sizes, output_size=rows)
    back = torch.cat((batch_sizes.new_full((1,), batch), batch_sizes))[steps]
    before = torch.arange(batch, batch + rows) - back
    return torch.cat((hidden, output))[before.to(output.device)]


def _backward(ctx, grad_output, grad_hidden, grad_cell, grad_distances, grad_cells=None, grad_activations=None):
    weight, mask, hidden, cell, zoneout, batch_sizes, output, cells, activations = ctx.saved_tensors
    if not ctx.saved:
        raise RuntimeError("on_lstm: called with save=False, which keeps nothing for a backward")
    incoming = (grad_output, grad_hidden, grad_cell, grad_distances)
    given = (weight, mask, cell, zoneout, output, cells, activations, batch_sizes, ctx.chunk_size)
    if grad_cells is None and grad_activations is None:
        of_gates, of_hidden, of_cell = _on_lstm_backward(*incoming, *given)
    else:
        # Only the derivative of a derivative has gradients of what was saved.
        of_gates, of_hidden, of_cell = reference.on_lstm_backward(*incoming, *given, grad_cells, grad_activations)
    of_weight = None
    if weight is not None and ctx.needs_input_grad[1]:
        of_weight = of_gates.t() @ _previous(output, hidden, batch_sizes)
        if mask is not None:
            of_weight = of_weight.masked_fill(mask, 0.0)
    return of_gates, of_weight, None, None if hidden is None else of_hidden, of_cell, None, None, None, None


_second_setup, _second_backward = derivative_through_reference(reference.on_lstm_backward)

_on_lstm_backward: Callable[..., Any] = operator(
    "on_lstm_backward",
    Rules(
        "on_lstm",
        12,
        reference.on_lstm_backward,
        _fake_backward,
        _second_setup,
        _second_backward,
        looped_vmap(lambda: _on_lstm_backward, 12),
    ),
)
_on_lstm: Callable[..., _Found] = operator(
    "on_lstm",
    Rules("on_lstm", 7, reference.on_lstm, _fake, _save, _backward, looped_vmap(lambda: _on_lstm, 7)),
)


def _check_chunks(op: str, gates: Tensor, size: int, chunk_size: int) -> None:
    if chunk_size < 1 or size < 1 or size % chunk_size:
        raise ValueError(
            f"{op}: the hidden size must be a multiple of chunk_size (a master gate serves chunk_size neighbouring "
            f"units), got hidden size {size} and chunk_size {chunk_size}"
        )
    width = 2 * (size // chunk_size) + 4 * size
    if gates.shape[-1] != width:
        raise ValueError(
            f"{op}: gates must have 2 H / chunk_size + 4 H = {width} columns for hidden size {size} and chunk_size "
            f"{chunk_size}, got {tuple(gates.shape)}"
        )


def _check_tensors(op: str, gates: Tensor, **others: Tensor | None) -> None:
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        got = gates.dtype if isinstance(gates, Tensor) else type(gates).__name__
        raise TypeError(f"{op}: gates must be a floating point tensor, got {got}")
    for name, tensor in others.items():
        if tensor is None and name in ("mask", "zoneout"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        states = (gates.dtype, compute_dtype(gates.dtype))
        allowed = (torch.bool,) if name == "mask" else states if name in ("cell", "zoneout") else (gates.dtype,)
        if tensor.dtype not in allowed and not torch.is_autocast_enabled(gates.device.type):
            raise TypeError(
                f"{op}: {name} must be {' or '.join(dict.fromkeys(map(str, allowed)))} for gates of {gates.dtype}, "
                f"got {tensor.dtype}"
            )
        if tensor.device != gates.device:
            raise ValueError(f"{op}: {name} must be on the gates' device {gates.device}, got {tensor.device}")


def _check_shapes(
    gates: Tensor,
    weight: Tensor,
    hidden: Tensor,
    cell: Tensor,
    mask: Tensor | None,
    zoneout: Tensor | None,
    batch_sizes: Tensor | None,
) -> None:
    if gates.dim() != 2 or cell.dim() != 2:
        raise ValueError(
            f"on_lstm: gates must be (N, 2 H / chunk_size + 4 H) and cell (B, H), got {tuple(gates.shape)} and "
            f"{tuple(cell.shape)}"
        )
    (batch, size), (rows, width) = cell.shape, gates.shape
    expected = {
        "weight": (weight, (width, size)),
        "hidden": (hidden, (batch, size)),
        "mask": (mask, (width, size)),
        "zoneout": (zoneout, (2, rows, size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"on_lstm: {name} must be {shape}, got {tuple(tensor.shape)}")
    if batch_sizes is None:
        if rows % batch if batch else rows:
            raise ValueError(f"on_lstm: gates must have a multiple of the {batch} sequences' rows, got {rows}")
        return
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise ValueError(
            f"on_lstm: batch_sizes must be int64 (T,) on the CPU, got {batch_sizes.dtype} {tuple(batch_sizes.shape)} "
            f"on {batch_sizes.device}"
        )


def on_lstm(
    gates: Tensor,
    weight: Tensor,
    hidden: Tensor,
    cell: Tensor,
    *,
    chunk_size: int,
    mask: Tensor | None = None,
    zoneout: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""One layer of ON-LSTM over whole sequences: the recurrence, when the inputs' part of the gates is known.

    With H hidden units in n = H / C chunks of C = ``chunk_size`` neighbours, the gates of a step,
    ``gates[t] + h @ weight.T``, hold :math:`[\tilde i, \tilde f\,|\,o, \hat c, i, f]` in 2 n + 4 H columns; a master
    gate is one number for the C units of its chunk:

    .. math::
        \tilde f &= \mathrm{cumax}(\cdot), \quad \tilde i = 1 - \mathrm{cumax}(\cdot), \quad
        \omega = \tilde f \tilde i \\
        \hat f &= \sigma(f)\,\omega + (\tilde f - \omega), \quad \hat i = \sigma(i)\,\omega + (\tilde i - \omega) \\
        c_t &= \hat f\,c_{t-1} + \hat i \tanh(\hat c), \quad h_t = \sigma(o) \tanh(c_t)

    Everything is computed in float32 (float64 for float64), the cell state and the distances are returned in it, and
    the gates are kept for the backward, which is one pass. The result does not depend on the number of threads, nor on
    the other sequences of the batch. On a GPU the recurrent product of 16-bit gates takes h in 16 bits.

    Args:
        gates: (N, 2 n + 4 H), the inputs' part with all biases, steps behind each other: N = T B, or the rows of a
            `PackedSequence` with its ``batch_sizes``. float64, float32, bfloat16 or float16.
        weight: (2 n + 4 H, H), of the gates' dtype.
        hidden: (B, H), before the first step, of the gates' dtype.
        cell: (B, H), before the first step, of the gates' dtype or float32.
        chunk_size: how many neighbouring units share a master gate; divides H.
        mask: (2 n + 4 H, H) bool, DropConnect: True where the weight is left out.
        zoneout: (2, N, H), how much of the cell state (first) and of the hidden state (second) before a step stays in
            place of the new one: 0 or 1 in training, the rate in evaluation. A constant to the gradient.
        batch_sizes: (T,) int64 on the CPU, how many sequences have each step, not increasing.

    Returns:
        (output (N, H), last hidden state (B, H), last cell state (B, H), distances (2, N)): the distances are
        1 - mean(master forget gate) and mean(master input gate).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, H not a multiple of chunk_size. RuntimeError:
        batch_sizes that increase or do not add up to N.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> steps, batch, hidden, chunk = 7, 2, 6, 3
        >>> width = 2 * hidden // chunk + 4 * hidden
        >>> state = torch.zeros(batch, hidden)
        >>> output, h, c, distances = ops.on_lstm(
        ...     torch.randn(steps * batch, width), torch.randn(width, hidden), state, state, chunk_size=chunk
        ... )
        >>> output.shape, torch.equal(output[-batch:], h), distances.shape
        (torch.Size([14, 6]), True, torch.Size([2, 14]))

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", ICLR 2019, section 4; Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013;
    Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations", ICLR 2017.
    """
    _check_tensors("on_lstm", gates, weight=weight, hidden=hidden, cell=cell, mask=mask, zoneout=zoneout)
    _check_shapes(gates, weight, hidden, cell, mask, zoneout, batch_sizes)
    _check_chunks("on_lstm", gates, cell.shape[1], chunk_size)
    if zoneout is not None:
        zoneout = zoneout.detach()
    save = torch.is_grad_enabled()
    return _on_lstm(gates, weight, mask, hidden, cell, zoneout, batch_sizes, chunk_size, save)[:4]


def on_lstm_cell(gates: Tensor, cell: Tensor, *, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step of ON-LSTM when its gates are known: everything in the cell behind the matrix products, fused.

    The formulas are those of `on_lstm`.

    Args:
        gates: (..., 2 n + 4 H), the sum of the inputs' and the hidden state's part, of any float dtype.
        cell: (..., H), the cell state before, of the gates' dtype or float32.
        chunk_size: how many neighbouring units share a master gate; divides H.

    Returns:
        (hidden state (..., H), cell state (..., H), distances (2, ...)).

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, H not a multiple of chunk_size.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> hidden, cell, distances = ops.on_lstm_cell(torch.zeros(1, 2 + 8), torch.ones(1, 2), chunk_size=2)
        >>> cell
        tensor([[0.5000, 0.5000]])

    Source: as `on_lstm`.
    """
    _check_tensors("on_lstm_cell", gates, cell=cell)
    if gates.dim() < 1 or gates.shape[:-1] != cell.shape[:-1]:
        raise ValueError(
            "on_lstm_cell: gates (..., 2 H / chunk_size + 4 H) and cell (..., H) must agree in front, got "
            f"{tuple(gates.shape)} and {tuple(cell.shape)}"
        )
    _check_chunks("on_lstm_cell", gates, cell.shape[-1], chunk_size)
    front = gates.shape[:-1]
    flat_gates, flat_cell = gates.reshape(-1, gates.shape[-1]), cell.reshape(-1, cell.shape[-1])
    save = torch.is_grad_enabled()
    found = _on_lstm(flat_gates, None, None, None, flat_cell, None, None, chunk_size, save)
    return found[0].view(cell.shape), found[2].view(cell.shape), found[3].view(2, *front)
