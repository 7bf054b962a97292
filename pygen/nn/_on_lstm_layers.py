"""Rows of sequences through layers of ON-LSTM: between on_lstm.py and the cells, whose recurrence is ops.on_lstm."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen import ops
from pygen.nn._on_lstm_cell import ONLSTMCell, State
from pygen.nn._on_lstm_rows import Rows

# The published model is an embedding (encoder), the stack (rnn) and a projection (decoder).
PUBLISHED_PREFIX, _PUBLISHED_REST = "rnn.", ("encoder.", "decoder.")


class Run(NamedTuple):
    """What the layers made of rows (N, I); states and distances per layer and direction."""

    states: list[State]  # (B, H) each
    distances: list[Tensor]  # (2, N) each
    raw_outputs: list[Tensor]  # (N, H), both directions side by side, per layer
    outputs: list[Tensor]

    def distance_grid(self, rows: Rows) -> Tensor:
        """(2, L D, T, B)."""
        by_row = torch.stack(self.distances, 1).permute(2, 0, 1)
        return rows.padded(by_row).permute(2, 3, 0, 1)


class Layers(nn.Module):
    """What ONLSTM and ONLSTMStack share: `cells`, how rows go through them, and the published names."""

    cells: nn.ModuleList
    dropout: float

    def directions(self) -> list[tuple[Any, ...]]:
        """The cells of every layer: one, or a forward and a backward one."""
        return [(cell,) for cell in self.cells]

    def run(self, x: Tensor, rows: Rows, states: Sequence[State] | None) -> Run:
        """x: (N, I); states: for every layer and direction, by place."""
        run = Run([], [], [], [])
        for cells in self.directions():
            found = []
            for backward, cell in enumerate(cells):
                state = None if states is None else states[len(run.states)]
                output, last, distances = _layer(cell, rows.mirrored(x) if backward else x, rows, state)
                found.append(rows.mirrored(output) if backward else output)
                run.distances.append(rows.mirrored(distances.t()).t() if backward else distances)
                run.states.append(last)
            x = found[0] if len(found) == 1 else torch.cat(found, 1)
            run.raw_outputs.append(x)
            if len(run.outputs) < len(self.cells) - 1 and self.training and self.dropout:
                x = rows.scaled(x, F.dropout(x.new_ones(rows.batch, x.shape[1]), self.dropout))
            run.outputs.append(x)
        return run

    def reset_parameters(self) -> None:
        """Draw all weights anew, as nn.Linear does."""
        for cells in self.directions():
            for cell in cells:
                cell.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no flat copy of the weights. For code that calls it on an nn.LSTM."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        published = prefix + PUBLISHED_PREFIX
        if any(key.startswith(f"{published}cells.") for key in state_dict):
            for key in list(state_dict):
                if key.startswith(published):
                    state_dict[prefix + key.removeprefix(published)] = state_dict.pop(key)
                elif key.removeprefix(prefix).startswith(_PUBLISHED_REST):
                    del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _layer(cell: ONLSTMCell, x: Tensor, rows: Rows, state: State | None) -> tuple[Tensor, State, Tensor]:
    """x: (N, I) -> (output (N, H), (h, c) behind the last step, distances (2, N))."""
    gates = cell.input_gates(x)
    if state is None:
        zeros = gates.new_zeros(rows.batch, cell.hidden_size)
        state = zeros, zeros
    output, h, c, distances = ops.on_lstm(
        gates,
        cell.recurrent_weight(),
        *state,
        chunk_size=cell.chunk_size,
        mask=cell.sample_mask(),
        zoneout=cell.zoneout_of(gates[:, : cell.hidden_size]),
        batch_sizes=rows.batch_sizes,
    )
    return output, (h, c), distances
