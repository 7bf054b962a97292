"""The ops that the contract tests run: an op joins every test of test_contract.py by one entry in CASES.

An oracle is written from the formula, in float64, without pygen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pygen import ops


@dataclass(frozen=True)
class OpCase:
    name: str
    function: Callable[..., object]  # the public function, on tensors alone
    oracle: Callable[..., object]  # the same of float64 tensors
    operator: Callable[[], object]  # torch.ops.pygen.<op>.default, asked for late: a build may lack it
    arguments: tuple  # what follows the tensors in the operator's schema
    tensors: int
    shapes: tuple[tuple[int, ...], ...]
    empty_shapes: tuple[tuple[int, ...], ...]
    threads_shape: tuple[int, ...] = (4, 30000)  # work for more than one thread
    spread: float = 2.0  # standard deviation of the inputs
    # What each tensor has behind the common shape; () for all when left out.
    trailing: tuple[tuple[int, ...], ...] = ()
    # Relative error in units of the dtype's epsilon, by the norm over all elements.
    tolerance: float = 4.0
    # Of an ill-conditioned op, how large a number inside it is rounded: its results may also err by a few times what
    # rounding each input at that size makes of the true results.
    rounded_at: float = 0.0
    costly: bool = False  # a launch in Triton's interpreter takes seconds: fewer of them there
    # All of the operator's arguments, where they are not the tensors and then `arguments`.
    schema: Callable[..., tuple] | None = None
    extra: dict = field(default_factory=dict)

    def inputs(self, shape, dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(full, generator=generator, dtype=torch.float64) for full in self.full_shapes(shape)]
        return [(x * self.spread).to(device, dtype) for x in draw]

    def rounded(self, tensors, dtype, seed) -> list[Tensor]:
        """The tensors, each moved about as far as one rounding of `dtype` moves it."""
        generator = torch.Generator().manual_seed(seed)
        step = torch.finfo(dtype).eps * self.rounded_at
        noise = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in tensors]
        return [x.cpu().double() + step * e for x, e in zip(tensors, noise, strict=True)]

    def full_shapes(self, shape) -> list[tuple[int, ...]]:
        return [(*shape, *more) for more in self.trailing or [()] * self.tensors]

    def operator_arguments(self, tensors) -> tuple:
        return (*tensors, *self.arguments) if self.schema is None else self.schema(*tensors)

    def outputs(self, tensors) -> tuple[Tensor, ...]:
        result = self.function(*tensors)
        return result if isinstance(result, tuple) else (result,)

    def true_outputs(self, tensors) -> tuple[Tensor, ...]:
        result = self.oracle(*(x.cpu().double() for x in tensors))
        return result if isinstance(result, tuple) else (result,)


def cumax_oracle(dim: int, complement: bool):
    def oracle(x: Tensor) -> Tensor:
        e = (x - x.amax(dim, keepdim=True)).exp() if x.numel() else x
        p = e / e.sum(dim, keepdim=True)
        if complement:
            return p.flip(dim).cumsum(dim).flip(dim) - p
        return p.cumsum(dim)

    return oracle


def true_scale(a: Tensor, scale_map: str, clamp: float = 2.0) -> Tensor:
    if scale_map == "exp":
        return torch.exp(a)
    if scale_map == "tanh":
        return torch.exp(torch.tanh(a))
    if scale_map == "sigmoid":
        return torch.sigmoid(a + 2)
    if scale_map == "nflows":
        return torch.sigmoid(a + 2) + 1e-3
    if scale_map == "softplus":
        return (torch.log1p(torch.exp(a)) + 1e-3).clamp(0, 3)
    return torch.exp(clamp * 0.636 * torch.atan(a))


def coupling_oracle(scale_map: str, shift_first: bool, inverse: bool):
    def oracle(x: Tensor, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = true_scale(a, scale_map)
        log_det = s.log().reshape(len(x), -1).sum(1) if x.numel() else x.new_zeros(len(x))
        if inverse:
            return (x / s - t if shift_first else (x - t) / s), -log_det
        return ((x + t) * s if shift_first else x * s + t), log_det

    return oracle


def spline_oracle(bins: int, tails: str | None, inverse: bool, bound: float, smallest: tuple[float, float, float]):
    """Bin by bin: a bin's formula is evaluated for every x, at its middle for those that lie elsewhere."""

    def lengths(raw: Tensor, least: float) -> tuple[Tensor, ...]:
        e = (raw - raw.amax(-1, keepdim=True)).exp()
        return (2 * bound * (least + (1 - bins * least) * e / e.sum(-1, keepdim=True))).unbind(-1)

    def slopes(raw: Tensor, x: Tensor) -> list[Tensor]:
        inner = list((smallest[2] + torch.log1p(torch.exp(raw))).unbind(-1))
        if tails == "linear":
            return [torch.ones_like(x), *inner, torch.ones_like(x)]
        return [*inner, inner[0]] if tails == "circular" else inner

    def beyond(x: Tensor, slope: Tensor, end: float) -> tuple[Tensor, Tensor]:
        """On the far side of an end."""
        if tails is not None:
            return x, torch.zeros_like(x)
        return end + ((x - end) / slope if inverse else (x - end) * slope), -slope.log() if inverse else slope.log()

    def oracle(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        w, h, d = lengths(widths, smallest[0]), lengths(heights, smallest[1]), slopes(derivatives, x)
        below, above = beyond(x, d[0], -bound), beyond(x, d[-1], bound)
        y, log_slope = (torch.where(x < 0, *pair) for pair in zip(below, above, strict=True))
        x_k = y_k = torch.full_like(x, -bound)
        for k in range(bins):
            start, length = (y_k, h[k]) if inverse else (x_k, w[k])
            here = (x >= start) & ((x <= bound) if k == bins - 1 else (x < start + length))
            along = torch.where(here, x, start + length / 2) - start
            s = h[k] / w[k]
            bend = d[k] + d[k + 1] - 2 * s
            xi = along / w[k]
            if inverse:
                a, b, c = h[k] * (s - d[k]) + along * bend, h[k] * d[k] - along * bend, -s * along
                xi = 2 * c / (-b - (b * b - 4 * a * c).sqrt())
            rest = xi * (1 - xi)
            den = s + bend * rest
            there = x_k + xi * w[k] if inverse else y_k + h[k] * (s * xi**2 + d[k] * rest) / den
            log_here = (s**2 * (d[k + 1] * xi**2 + 2 * s * rest + d[k] * (1 - xi) ** 2) / den**2).log()
            y, log_slope = torch.where(here, there, y), torch.where(here, -log_here if inverse else log_here, log_slope)
            x_k, y_k = x_k + w[k], y_k + h[k]
        return y, log_slope

    return oracle


def cumax_case(dim: int, complement: bool) -> OpCase:
    return OpCase(
        name=f"cumax-dim{dim}{'-complement' if complement else ''}",
        function=lambda x: ops.cumax(x, dim, complement=complement),
        oracle=cumax_oracle(dim, complement),
        operator=lambda: torch.ops.pygen.cumax.default,
        arguments=(dim, complement),
        tensors=1,
        shapes=((1, 1), (2, 3, 5), (3, 63), (63, 3), (5, 1000), (1030, 2), (17, 16, 17)),
        empty_shapes=((0, 4), (4, 0), (0, 0)),
        spread=3.0,
    )


def coupling_case(scale_map: str, shift_first: bool, inverse: bool) -> OpCase:
    return OpCase(
        name=f"affine-{scale_map}{'-shift_first' if shift_first else ''}{'-inverse' if inverse else ''}",
        function=lambda x, a, t: ops.affine_coupling(
            x, a, t, scale_map=scale_map, shift_first=shift_first, inverse=inverse
        ),
        oracle=coupling_oracle(scale_map, shift_first, inverse),
        operator=lambda: torch.ops.pygen.affine_coupling.default,
        arguments=(scale_map, shift_first, 2.0, inverse),
        tensors=3,
        shapes=((1,), (7, 1), (3, 63), (2, 5, 7, 3), (4, 700), (2, 20011)),
        empty_shapes=((0, 4), (4, 0), (0,)),
        spread=1.0,
    )


def halves_case(n: int, swap: bool, scale_map: str, shift_first: bool, inverse: bool) -> OpCase:
    """Along the last dimension, of n: for (B, n) a sample's half is one row, with more dimensions many."""
    sizes = [n - n // 2, n // 2]
    active = sizes[0] if swap else sizes[1]
    couple = coupling_oracle(scale_map, shift_first, inverse)

    def oracle(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.split(sizes, -1)
        passive, y = (second, first) if swap else (first, second)
        y, log_det = couple(y, parameters[..., :active], parameters[..., active:])
        return torch.cat((y, passive) if swap else (passive, y), -1), log_det

    options = {"scale_map": scale_map, "shift_first": shift_first, "inverse": inverse}
    names = [name for name, is_on in (("swap", swap), ("shift_first", shift_first), ("inverse", inverse)) if is_on]
    return OpCase(
        name="-".join((f"halves{n}", scale_map, *names)),
        function=lambda x, parameters: ops.affine_coupling_halves(x, parameters, dim=-1, swap=swap, **options),
        oracle=oracle,
        operator=lambda: torch.ops.pygen.affine_coupling_halves.default,
        arguments=(-1, swap, scale_map, shift_first, 2.0, inverse),
        tensors=2,
        trailing=((n,), (2 * active,)),
        shapes=((1,), (7,), (700,), (3, 9), (2, 5, 3), (2, 2003)),
        empty_shapes=((0, 4), (4, 0), (0,)),
        threads_shape=(3, 4001),
        spread=1.0,
    )


def spline_case(bins: int, tails: str | None, inverse: bool) -> OpCase:
    # No 16-bit number is the bound, where the gradient jumps.
    bound, smallest = 1.7, (2e-3, 5e-3, 1e-2)
    names = ("min_bin_width", "min_bin_height", "min_derivative")
    options = {"inverse": inverse, "tails": tails, "tail_bound": bound, **dict(zip(names, smallest, strict=True))}
    derivatives = bins + {"linear": -1, "circular": 0, None: 1}[tails]
    kind = tails or "none"
    return OpCase(
        name=f"spline-{kind}{bins}{'-inverse' if inverse else ''}",
        function=lambda *tensors: ops.rational_quadratic_spline(*tensors, **options),
        oracle=spline_oracle(bins, tails, inverse, bound, smallest),
        operator=lambda: torch.ops.pygen.rational_quadratic_spline.default,
        arguments=(inverse, kind, bound, *smallest),
        tensors=4,
        trailing=((), (bins,), (bins,), (derivatives,)),
        shapes=((), (1,), (7, 1), (3, 63), (2, 5, 7, 3), (3, 2011)),
        empty_shapes=((0, 4), (4, 0), (0,)),
        threads_shape=(3, 1201),
        spread=1.0,  # one x in eleven lies in the tails
        rounded_at=bound,
        costly=True,
    )


def on_lstm_cell_case(hidden: int, chunk_size: int) -> OpCase:
    n = hidden // chunk_size

    def oracle(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        masters, units = gates[..., : 2 * n], gates[..., 2 * n :].reshape(*gates.shape[:-1], 4 * n, chunk_size)
        out, candidate, write, keep = units.chunk(4, -2)
        to_write = cumax_oracle(-1, True)(masters[..., :n]).unsqueeze(-1)
        to_keep = cumax_oracle(-1, False)(masters[..., n:]).unsqueeze(-1)
        overlap = to_write * to_keep
        kept, written = (to_keep - overlap * (-keep).sigmoid()), (to_write - overlap * (-write).sigmoid())
        new = kept * cell.reshape(*cell.shape[:-1], n, chunk_size) + written * candidate.tanh()
        distances = torch.stack((1 - to_keep.mean((-2, -1)), to_write.mean((-2, -1))))
        return (out.sigmoid() * new.tanh()).flatten(-2), new.flatten(-2), distances

    return OpCase(
        name=f"on_lstm_cell{hidden}-chunk{chunk_size}",
        function=lambda gates, cell: ops.on_lstm_cell(gates, cell, chunk_size=chunk_size),
        oracle=oracle,
        operator=lambda: torch.ops.pygen.on_lstm.default,
        arguments=(),
        # Rows of gates and states, and none of what a sequence has besides.
        schema=lambda gates, cell: (
            *(gates.flatten(0, -2), None, None, None, cell.flatten(0, -2), None, None),
            *(chunk_size, True),
        ),
        tensors=2,
        trailing=((2 * n + 4 * hidden,), (hidden,)),
        shapes=((), (1,), (7, 1), (3, 9), (2, 5, 3), (130, 9)),
        empty_shapes=((0, 4), (4, 0), (0,)),
        threads_shape=(3, 1201),
        spread=1.5,
        costly=True,
    )


CASES = [
    cumax_case(-1, False),
    cumax_case(-1, True),
    cumax_case(0, False),
    cumax_case(0, True),
    *(
        coupling_case(scale_map, shift_first, inverse)
        for scale_map in ("exp", "tanh", "sigmoid", "nflows", "softplus", "atan")
        for shift_first, inverse in ((False, False), (True, False), (False, True), (True, True))
    ),
    halves_case(5, False, "tanh", False, False),
    halves_case(8, True, "sigmoid", True, False),
    halves_case(3, True, "nflows", False, True),
    spline_case(8, "linear", False),
    spline_case(8, "linear", True),
    spline_case(5, "circular", False),
    spline_case(16, "circular", True),
    spline_case(5, None, False),
    spline_case(10, None, True),
    on_lstm_cell_case(6, 3),
]

# One case for each op and direction, for the tests that cost seconds.
FEW_NAMES = (
    "cumax-dim-1",
    "cumax-dim0-complement",
    "affine-tanh",
    "affine-sigmoid-shift_first-inverse",
    "halves8-sigmoid-swap-shift_first",
    "spline-linear8",
    "spline-none10-inverse",
    "on_lstm_cell6-chunk3",
)
FEW_CASES = [case for case in CASES if case.name in FEW_NAMES]
