"""ON-LSTM over whole sequences: ONLSTM, a drop-in for nn.LSTM, and ONLSTMStack, whose layers have sizes of their own.

_on_lstm_cell.py has the weights, _on_lstm_rows.py the order of the rows, _on_lstm_layers.py runs them.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pygen.nn._on_lstm_cell import (
    ONLSTMCell,
    State,
    Zoneout,
    check_flag,
    check_input,
    check_rate,
    check_size,
    check_state,
    sizes_of,
)
from pygen.nn._on_lstm_layers import PUBLISHED_PREFIX, Layers
from pygen.nn._on_lstm_rows import Rows

__all__ = ["ONLSTM", "ONLSTMCell", "ONLSTMStack", "ONLSTMStackOutput"]


class ONLSTMStackOutput(NamedTuple):
    """What `ONLSTMStack` returns; the tensors (T, B, ...) are PackedSequences if the input was one."""

    output: Any  # (T, B, H_L)
    states: list[State]  # of every layer (h (B, H_l), c (B, H_l))
    distances: Tensor  # (2, L, T, B): forget and input, 0 behind a sequence's end
    raw_outputs: list[Any]  # of every layer, before dropout
    outputs: list[Any]  # of every layer, after dropout: the last layer's has none


def _repacked(x: Tensor, like: PackedSequence) -> PackedSequence:
    return PackedSequence(x, like.batch_sizes, like.sorted_indices, like.unsorted_indices)


def _check_steps(owner: str, x: Tensor) -> None:
    """x: (T, B, I)."""
    # Not len(x), which would fix the number of steps in an export.
    if x.shape[0] == 0:
        raise ValueError(f"{owner}: input must have at least one step, got {tuple(x.shape)}")


class ONLSTMStack(Layers):
    """Layers of ON-LSTM on each other, each of its own size: the recurrent part of the published language model.

    Formulas, `chunk_size`, `dropconnect` and `zoneout` are those of `ONLSTMCell`; each is drawn once a call and layer
    (zoneout: for every step).

    Args:
        layer_sizes: I, H_1, ..., H_L.
        chunk_size: how many neighbouring hidden units share one pair of master gates; divides every H_l.
        dropout: of every layer's output but the last's, locked: one draw a sequence and unit, the same for all steps.
        dropconnect, zoneout, bias, device, dtype: as in `ONLSTMCell`.

    Attributes:
        cells: the layers, `ONLSTMCell`. The names of the parameters are those of the published code; load_state_dict
            also takes the published model's whole dict, where they begin with "rnn.", and leaves its embedding
            (encoder) and projection (decoder) aside.

    Shape:
        input: (T, B, I) or a PackedSequence. states: a list of (h, c) per layer, each (B, H_l); zeros by default.
        Returns an `ONLSTMStackOutput`.

    Raises:
        ValueError, TypeError: sizes and dtypes that do not fit, a size that is not a multiple of chunk_size.

    Example:
        >>> import torch
        >>> from pygen.nn.on_lstm import ONLSTMStack
        >>> stack = ONLSTMStack([5, 8, 8, 5 * 4], chunk_size=4)
        >>> found = stack(torch.randn(7, 2, 5))
        >>> found.output.shape, len(found.states), found.distances.shape
        (torch.Size([7, 2, 20]), 3, torch.Size([2, 3, 7, 2]))

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", ICLR 2019. Gal, Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks", NeurIPS 2016, for locked dropout.
    """

    def __init__(
        self,
        layer_sizes: Sequence[int],
        chunk_size: int = 10,
        *,
        dropout: float = 0.0,
        dropconnect: float = 0.0,
        zoneout: Zoneout = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.layer_sizes = tuple(layer_sizes)
        if len(self.layer_sizes) < 2:
            raise ValueError(f"ONLSTMStack: layer_sizes must be (input, hidden, ...), got {self.layer_sizes}")
        self.chunk_size = chunk_size
        self.dropout = check_rate("ONLSTMStack", "dropout", dropout)
        self.cells = nn.ModuleList(
            ONLSTMCell(
                *sizes, chunk_size, bias=bias, dropconnect=dropconnect, zoneout=zoneout, device=device, dtype=dtype
            )
            for sizes in zip(self.layer_sizes, self.layer_sizes[1:], strict=False)
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **options: Any) -> "ONLSTMStack":
        """A stack with these weights, sizes and chunk_size read from them; `options` are the constructor's others.

        state_dict: the published model's, or its `rnn` part's, or this module's.
        """
        cells = {key.removeprefix(PUBLISHED_PREFIX): value for key, value in state_dict.items() if "cells." in key}
        layers = sum(key.startswith("cells.") and key.endswith(".hh.weight") for key in cells)
        if not layers:
            raise ValueError(f"ONLSTMStack: a state_dict with cells.0.hh.weight expected, got {list(state_dict)[:4]}")
        sizes = [sizes_of(cells[f"cells.{i}.ih.0.weight"], cells[f"cells.{i}.hh.weight"]) for i in range(layers)]
        weight = cells["cells.0.hh.weight"]
        given = {"bias": "cells.0.hh.bias" in cells, "device": weight.device, "dtype": weight.dtype, **options}
        stack = cls([sizes[0][0], *(hidden for _, hidden, _ in sizes)], sizes[0][2], **given)
        stack.load_state_dict(state_dict)
        return stack

    def forward(self, input: Tensor | PackedSequence, states: Sequence[State] | None = None) -> ONLSTMStackOutput:
        x = input.data if isinstance(input, PackedSequence) else input
        check_input("ONLSTMStack", x, self.layer_sizes[0], self.cells[0].hh.weight)  # type: ignore[union-attr,arg-type]
        if isinstance(input, PackedSequence):
            rows = Rows.of_packed(input)
        elif x.dim() != 3:
            raise ValueError(f"ONLSTMStack: input must be (T, B, I), got {tuple(x.shape)}")
        else:
            _check_steps("ONLSTMStack", x)
            rows, x = Rows(x.shape[0], x.shape[1]), x.flatten(0, 1)
        run = self.run(x, rows, self._placed(states, rows, x))

        def form(one: Tensor) -> Any:
            return _repacked(one, input) if isinstance(input, PackedSequence) else rows.padded(one)

        raw_outputs = [form(one) for one in run.raw_outputs]
        # Without dropout they are the same tensors, and are not computed twice.
        outputs = [
            raw if one is before else form(one)
            for one, before, raw in zip(run.outputs, run.raw_outputs, raw_outputs, strict=True)
        ]
        last = [(rows.by_sequence(h), rows.by_sequence(c)) for h, c in run.states]
        return ONLSTMStackOutput(outputs[-1], last, run.distance_grid(rows), raw_outputs, outputs)

    def _placed(self, states: Sequence[State] | None, rows: Rows, x: Tensor) -> list[State] | None:
        if states is None:
            return None
        if len(states) != len(self.cells):
            raise ValueError(f"ONLSTMStack: states must be {len(self.cells)} pairs (h, c), got {len(states)}")
        for state, size in zip(states, self.layer_sizes[1:], strict=True):
            check_state("ONLSTMStack", state, (rows.batch, size), x)
        return [(rows.by_place(h), rows.by_place(c)) for h, c in states]

    def extra_repr(self) -> str:
        return f"{list(self.layer_sizes)}, chunk_size={self.chunk_size}" + (
            f", dropout={self.dropout}" if self.dropout else ""
        )


class ONLSTM(Layers):
    r"""ON-LSTM in nn.LSTM's calling convention: the line that makes the module is the one that changes.

    A layer is one product of the whole input with its weight and one call of `pygen.ops.on_lstm`, whose docstring has
    the formulas.

    Args:
        input_size: I. hidden_size: H, a multiple of chunk_size. num_layers: L.
        chunk_size: C, how many neighbouring hidden units share one pair of master gates. It cuts the hidden state into
            H / C groups that are forgotten and written together (more groups order the units more finely, at
            2 H / C more gates); it has nothing to do with the batch or with time. C = H makes the master gates
            constant: the forget one 1, the input one 0, so that nothing is ever written.
        bias: False leaves the biases out. batch_first: input and output are (B, T, ...).
        dropout: of every layer's output but the last's, locked: one draw a sequence and unit, the same for all steps,
            as published. nn.LSTM draws for every step.
        dropconnect: the rate at which entries of the recurrent weights are left out in training, one draw a call; in
            evaluation the weights are multiplied by 1 - dropconnect.
        return_distances: forward also returns (distance_forget, distance_in).
        bidirectional: a second cell a layer, `cells_reverse`, reads each sequence from its end.
        zoneout: the rate at which units keep their state of the step before in training, of both states or a pair
            (cell, hidden); in evaluation the two are mixed in that proportion.
        device, dtype: of the parameters.

    Attributes:
        cells, cells_reverse: the layers, `ONLSTMCell`. Parameters are cells.{i}.ih.0.weight, cells.{i}.ih.0.bias,
            cells.{i}.hh.weight and cells.{i}.hh.bias, as in the published code, whose model's whole state_dict loads
            too (see `ONLSTMStack`).

    Shape:
        input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence. hx: (h, c), each
        (L D, B, H), unbatched (L D, H), D = 2 if bidirectional else 1; zeros by default. lengths: (B,) integers from 0
        to T, of a padded batch, best on the CPU: results are those of each sequence alone, and 0 behind its end.
        Returns (output, (h, c)): output (T, B, D H) in the input's form, h and c as hx. Distances: (L D, T, B), with
        batch_first (L D, B, T), unbatched (L D, T), of a PackedSequence padded, from 0 to 1. For a 16-bit input c and
        the distances are float32, and such a c goes in again.

    Raises:
        ValueError, TypeError: sizes and dtypes that do not fit, hidden_size not a multiple of chunk_size, no step.

    Example:
        >>> import torch
        >>> from pygen.nn.on_lstm import ONLSTM
        >>> lstm = ONLSTM(5, 12, num_layers=2, chunk_size=4, return_distances=True)
        >>> output, (h, c), (distance_forget, distance_in) = lstm(torch.randn(7, 3, 5), lengths=[7, 2, 4])
        >>> output.shape, h.shape, distance_forget.shape
        (torch.Size([7, 3, 12]), torch.Size([2, 3, 12]), torch.Size([2, 7, 3]))

    Source: as `ONLSTMStack`; Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations",
    ICLR 2017; Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        chunk_size: int = 10,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        dropconnect: float = 0.0,
        return_distances: bool = False,
        bidirectional: bool = False,
        zoneout: Zoneout = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_size("ONLSTM", "num_layers", num_layers)
        flags = {"batch_first": batch_first, "return_distances": return_distances, "bidirectional": bidirectional}
        for name, flag in flags.items():
            check_flag("ONLSTM", name, flag)
        self.dropout = check_rate("ONLSTM", "dropout", dropout)
        if dropout and num_layers == 1:
            warnings.warn(
                f"ONLSTM: dropout={dropout} acts between layers, and num_layers=1 has no such place", stacklevel=2
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.chunk_size, self.bias, self.batch_first = chunk_size, bias, batch_first
        self.return_distances, self.bidirectional = return_distances, bidirectional

        def cells() -> nn.ModuleList:
            width = hidden_size * (1 + bidirectional)
            return nn.ModuleList(
                ONLSTMCell(
                    width if layer else input_size,
                    hidden_size,
                    chunk_size,
                    bias=bias,
                    dropconnect=dropconnect,
                    zoneout=zoneout,
                    device=device,
                    dtype=dtype,
                )
                for layer in range(num_layers)
            )

        self.cells = cells()
        if bidirectional:
            self.cells_reverse = cells()

    def directions(self) -> list[tuple[Any, ...]]:
        return list(zip(self.cells, self.cells_reverse, strict=True)) if self.bidirectional else super().directions()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Any:
        packed = isinstance(input, PackedSequence)
        data: Tensor = input.data if isinstance(input, PackedSequence) else input
        check_input("ONLSTM", data, self.input_size, self.cells[0].hh.weight)  # type: ignore[union-attr,arg-type]
        unbatched = not packed and data.dim() == 2
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("ONLSTM: a PackedSequence has its lengths; lengths must be None")
            x, rows = data, Rows.of_packed(input)
        else:
            x, rows = self._dense(data, lengths)
        run = self.run(x, rows, self._placed(hx, rows, unbatched, x))
        h, c = (torch.stack([rows.by_sequence(state[i]) for state in run.states]) for i in (0, 1))
        if isinstance(input, PackedSequence):
            output: Any = _repacked(run.outputs[-1], input)
        else:
            output = self._in_form(rows.padded(run.outputs[-1]), unbatched)
        state = (h.squeeze(1), c.squeeze(1)) if unbatched else (h, c)
        if not self.return_distances:
            return output, state
        return output, state, self._distances(run.distance_grid(rows), packed, unbatched)

    def _dense(self, x: Tensor, lengths: Tensor | Sequence[int] | None) -> tuple[Tensor, Rows]:
        """(rows (N, I), where they lie)."""
        if x.dim() not in (2, 3):
            expected = "(B, T, I)" if self.batch_first else "(T, B, I)"
            raise ValueError(f"ONLSTM: input must be {expected} or (T, I), got {tuple(x.shape)}")
        if x.dim() == 2:
            x = x.unsqueeze(1)
            if lengths is not None:
                raise ValueError("ONLSTM: lengths are of a batch, got an input (T, I)")
        elif self.batch_first:
            x = x.transpose(0, 1)
        _check_steps("ONLSTM", x)
        steps, batch = x.shape[:2]
        rows = Rows(steps, batch) if lengths is None else Rows.of_lengths(steps, _lengths(lengths, steps, batch))
        return rows.gather(x), rows

    def _placed(self, hx: State | None, rows: Rows, unbatched: bool, x: Tensor) -> list[State] | None:
        """The states of every layer and direction."""
        if hx is None:
            return None
        count = self.num_layers * (1 + self.bidirectional)
        batch = () if unbatched else (rows.batch,)
        check_state("ONLSTM", hx, (count, *batch, self.hidden_size), x)
        h, c = ((state.unsqueeze(1) if unbatched else state).unbind() for state in hx)
        return [(rows.by_place(h[i]), rows.by_place(c[i])) for i in range(count)]

    def _in_form(self, x: Tensor, unbatched: bool) -> Tensor:
        """x: (T, B, H) as the input was."""
        if unbatched:
            return x.squeeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def _distances(self, grid: Tensor, packed: bool, unbatched: bool) -> tuple[Tensor, ...]:
        """grid: (2, L D, T, B)."""
        if unbatched:
            grid = grid.squeeze(3)
        elif self.batch_first and not packed:
            grid = grid.transpose(2, 3)
        return tuple(grid.unbind())

    def extra_repr(self) -> str:
        defaults = {"bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        parts = [f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, chunk_size={self.chunk_size}"]
        parts += [f"{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)


def _lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """(B,) int64 on the CPU."""
    given = torch.as_tensor(lengths, device="cpu")
    if given.shape != (batch,) or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"ONLSTM: lengths must be {batch} integers, got {given.dtype} {tuple(given.shape)}")
    given = given.to(torch.int64)
    if batch and not 0 <= int(given.min()) <= int(given.max()) <= steps:
        raise ValueError(f"ONLSTM: lengths must be from 0 to {steps} steps, got {given.tolist()}")
    return given
