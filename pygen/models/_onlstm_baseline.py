"""What the ON-LSTM language model is compared with: a stack of nn.LSTM with the same regularisation, and the size at
which it has as many parameters. onlstm.py builds it for rnn="lstm"."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.nn.on_lstm import ONLSTMStackOutput

State = tuple[Tensor, Tensor]


def locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """x (T, B, H) with units left out that are the same at every step of a sequence."""
    if not training or rate == 0:
        return x
    return x * F.dropout(x.new_ones(1, *x.shape[1:]), rate)


class LSTMStack(nn.Module):
    """Layers of nn.LSTM with the interface of `nn.ONLSTMStack`; it has no distances.

    Args:
        layer_sizes: of the input and of each layer.
        dropout: between layers, one mask for all steps.
        dropconnect: of the recurrent weights, one mask for all steps; what is kept is scaled up.
    """

    def __init__(self, layer_sizes: Sequence[int], *, dropout: float = 0.0, dropconnect: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.dropconnect = dropout, dropconnect
        sizes = zip(layer_sizes[:-1], layer_sizes[1:], strict=True)
        self.cells = nn.ModuleList([nn.LSTM(size, hidden) for size, hidden in sizes])

    def forward(self, x: Tensor, states: Sequence[State] | None = None) -> ONLSTMStackOutput:
        """x (T, B, I), states [(h (B, H_l), c (B, H_l))]: zeros when left out."""
        raw, dropped, last = [], [], []
        for i, cell in enumerate(self.cells):
            from_input, from_hidden, *biases = cell.parameters()
            zeros = x.new_zeros(x.size(1), from_hidden.size(1))
            h, c = states[i] if states is not None else (zeros, zeros)
            weights = [from_input, F.dropout(from_hidden, self.dropconnect, self.training), *biases]
            x, h, c = torch.lstm(
                x, (h.unsqueeze(0), c.unsqueeze(0)), weights, True, 1, 0.0, self.training, False, False
            )
            last.append((h.squeeze(0), c.squeeze(0)))
            raw.append(x)
            if i + 1 < len(self.cells):
                x = locked_dropout(x, self.dropout, self.training)
            dropped.append(x)
        return ONLSTMStackOutput(x, last, x.new_zeros(2, 0, *x.shape[:2]), raw, dropped)


def equal_lstm(build: Callable[..., nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with rnn="lstm" and the hidden_size at which the number of parameters is nearest to config's own.

    Raises:
        ValueError: no size of hidden layers can change.
    """
    if config["tied"] and config["num_layers"] == 1:
        raise ValueError("tied weights make the only layer as wide as the embedding; give num_layers=2 or tied=false")

    def parameters(**changes: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(**{**config, **changes}).parameters())

    wanted = parameters()
    low, high = 1, 2
    while parameters(rnn="lstm", hidden_size=high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(rnn="lstm", hidden_size=middle) < wanted else (low, middle)
    size = min((low, high), key=lambda hidden: abs(parameters(rnn="lstm", hidden_size=hidden) - wanted))
    return {**config, "rnn": "lstm", "hidden_size": size}
