"""ONLSTMCell: the weights of one layer of ON-LSTM and one step of it. on_lstm.py runs whole sequences through them."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen import ops

State = tuple[Tensor, Tensor]
Zoneout = float | tuple[float, float]


def check_size(owner: str, name: str, value: Any) -> None:
    # A bool is an int: nn.LSTM's fourth argument is `bias`, here it is `chunk_size`.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {value}")


def check_flag(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def check_rate(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def zoneout_rates(owner: str, value: Any) -> tuple[float, float]:
    """(of the cell state, of the hidden state)."""
    pair = value if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{owner}: zoneout must be a number or a pair (cell, hidden), got {value!r}")
    return check_rate(owner, "zoneout", pair[0]), check_rate(owner, "zoneout", pair[1])


def check_input(owner: str, x: Any, size: int, weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: input must be a torch.Tensor, got {type(x).__name__}")
    if x.shape[-1:] != (size,):
        raise ValueError(f"{owner}: input must have input_size = {size} features, got {tuple(x.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{owner}: input must be {weight.dtype} as the weights are, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{owner}: input must be on the weights' device {weight.device}, got {x.device}")


def check_state(owner: str, hx: Any, shape: tuple[int, ...], x: Tensor) -> None:
    """hx: (h, c), both of `shape`, for an input x."""
    if not isinstance(hx, tuple | list) or len(hx) != 2 or not all(isinstance(state, Tensor) for state in hx):
        raise TypeError(f"{owner}: a state must be a pair (h, c) of tensors, got {type(hx).__name__}")
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, state, allowed in zip("hc", hx, ((x.dtype,), (x.dtype, wide)), strict=True):
        if state.shape != shape:
            raise ValueError(f"{owner}: {name} must be {shape}, got {tuple(state.shape)}")
        if state.dtype not in allowed and not torch.is_autocast_enabled(x.device.type):
            expected = " or ".join(dict.fromkeys(map(str, allowed)))
            raise TypeError(f"{owner}: {name} must be {expected} for an input of {x.dtype}, got {state.dtype}")


def sizes_of(weight_ih: Tensor, weight_hh: Tensor) -> tuple[int, int, int]:
    """(input_size, hidden_size, chunk_size) of a cell with these weights."""
    (width, input_size), hidden_size = weight_ih.shape, weight_hh.shape[1]
    chunks = (width - 4 * hidden_size) // 2
    if weight_hh.shape[0] != width or chunks < 1 or 2 * chunks + 4 * hidden_size != width or hidden_size % chunks:
        raise ValueError(
            "ONLSTMStack: weights (2 H / C + 4 H, I) and (2 H / C + 4 H, H) expected, got "
            f"{tuple(weight_ih.shape)} and {tuple(weight_hh.shape)}"
        )
    return input_size, hidden_size, hidden_size // chunks


class ONLSTMCell(nn.Module):
    r"""One step of ON-LSTM, in nn.LSTMCell's convention.

    .. math::
        [\tilde i, \tilde f\,|\,o, \hat c, i, f] = x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh}

    and what `pygen.ops.on_lstm` makes of these gates. For whole sequences `ONLSTM` is faster.

    Args:
        input_size: I. hidden_size: H, a multiple of chunk_size.
        chunk_size: C, how many neighbouring hidden units share one pair of master gates. It cuts the hidden state into
            H / C groups that are forgotten and written together; it has nothing to do with the batch or with time.
        bias: False leaves both biases out.
        dropconnect: in training, the rate at which entries of the recurrent weight are left out. One draw has to serve
            a whole sequence: take it from `sample_mask` and give it to every step. In evaluation the weight is
            multiplied by 1 - dropconnect.
        zoneout: the rate at which units keep their state of the step before, of both states or a pair
            (cell, hidden). In evaluation the two are mixed in that proportion.
        device, dtype: of the parameters.

    Attributes:
        ih.0.weight (2 H / C + 4 H, I), ih.0.bias; hh.weight (2 H / C + 4 H, H), hh.bias: names, shapes and first values
        are those of the published code.

    Shape:
        input: (B, I) or (I,). hx: (h, c), each (B, H) or (H,), zeros by default. Returns (h, c), and with
        return_distances (h, c, (distance_forget, distance_in)), each (B,) or a scalar. c and the distances are float32
        for a 16-bit input.

    Raises:
        ValueError, TypeError: sizes and dtypes that do not fit, hidden_size not a multiple of chunk_size. RuntimeError:
        dropconnect in training without a mask.

    Example:
        >>> import torch
        >>> from pygen.nn.on_lstm import ONLSTMCell
        >>> cell = ONLSTMCell(3, 8, chunk_size=4, dropconnect=0.5)
        >>> state, mask = None, cell.sample_mask()
        >>> for x in torch.randn(5, 2, 3):
        ...     state = cell(x, state, mask)
        >>> state[0].shape
        torch.Size([2, 8])

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", ICLR 2019.
    """

    ih: nn.Sequential
    hh: nn.Linear

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        chunk_size: int = 10,
        *,
        bias: bool = True,
        dropconnect: float = 0.0,
        zoneout: Zoneout = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for key, value in (("input_size", input_size), ("hidden_size", hidden_size), ("chunk_size", chunk_size)):
            check_size(name, key, value)
        check_flag(name, "bias", bias)
        if hidden_size % chunk_size:
            raise ValueError(
                f"{name}: hidden_size must be a multiple of chunk_size (a master gate serves chunk_size neighbouring "
                f"units), got hidden_size {hidden_size} and chunk_size {chunk_size}"
            )
        self.input_size, self.hidden_size, self.chunk_size = input_size, hidden_size, chunk_size
        self.bias = bias
        self.dropconnect = check_rate(name, "dropconnect", dropconnect)
        self.zoneout = zoneout_rates(name, zoneout)
        width = 2 * (hidden_size // chunk_size) + 4 * hidden_size
        self.ih = nn.Sequential(nn.Linear(input_size, width, bias, device, dtype))
        self.hh = nn.Linear(hidden_size, width, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew, as nn.Linear does."""
        for linear in (*self.ih, self.hh):
            linear.reset_parameters()  # type: ignore[operator]

    def sample_mask(self) -> Tensor | None:
        """DropConnect's draw for a sequence, bool as hh.weight, True where left out; None where there is none to draw:
        in evaluation, or without dropconnect."""
        if not self.training or not self.dropconnect:
            return None
        return torch.empty_like(self.hh.weight, dtype=torch.bool).bernoulli_(self.dropconnect)

    def input_gates(self, x: Tensor) -> Tensor:
        """x: (..., I) -> the inputs' part of the gates, with both biases."""
        linear = cast(nn.Linear, self.ih[0])
        return F.linear(x, linear.weight, linear.bias + self.hh.bias if self.bias else None)

    def recurrent_weight(self) -> Tensor:
        """The weight as it counts in this mode, but for the mask."""
        return self.hh.weight if self.training or not self.dropconnect else self.hh.weight * (1 - self.dropconnect)

    def zoneout_of(self, like: Tensor) -> Tensor | None:
        """like: (..., H) -> how much of the states before stays, (2, ..., H) of cell and hidden state, or None."""
        if not any(self.zoneout):
            return None
        wide = torch.promote_types(like.dtype, torch.float32)
        kept = torch.stack([torch.full_like(like, rate, dtype=wide) for rate in self.zoneout])
        return kept.bernoulli() if self.training else kept

    def forward(
        self, input: Tensor, hx: State | None = None, mask: Tensor | None = None, return_distances: bool = False
    ) -> Any:
        """The next state (h, c); `mask` is `sample_mask`'s."""
        name = type(self).__name__
        check_input(name, input, self.input_size, self.hh.weight)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: input must be (B, I) or (I,), got {tuple(input.shape)}")
        if mask is None and self.training and self.dropconnect:
            raise RuntimeError(
                f"{name}: in training with dropconnect one mask serves a whole sequence: draw it with sample_mask() "
                "and give it to every step"
            )
        shape = (*input.shape[:-1], self.hidden_size)
        if hx is None:
            hx = (input.new_zeros(shape), input.new_zeros(shape))
        else:
            check_state(name, hx, shape, input)
        h, c, distances = self._step(self.input_gates(input), hx, mask)
        return (h, c, tuple(distances.unbind())) if return_distances else (h, c)

    def _step(self, gates: Tensor, hx: State, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h, c = hx
        weight = self.recurrent_weight()
        gates = gates + F.linear(h, weight if mask is None else weight.masked_fill(mask, 0.0))
        new_h, new_c, distances = ops.on_lstm_cell(gates, c, chunk_size=self.chunk_size)
        kept = self.zoneout_of(c)
        if kept is not None:
            new_c = torch.lerp(new_c, c.to(new_c.dtype), kept[0])
            new_h = torch.lerp(new_h, h.to(new_h.dtype), kept[1].to(new_h.dtype))
        return new_h, new_c, distances

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}, chunk_size={self.chunk_size}"]
        if not self.bias:
            parts.append("bias=False")
        if self.dropconnect:
            parts.append(f"dropconnect={self.dropconnect}")
        if any(self.zoneout):
            parts.append(f"zoneout={self.zoneout}")
        return ", ".join(parts)
