"""Layers of ON-LSTM to run, and the published cell as a plain loop over steps in float64, for the tests of the op."""

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (T, B, H, C): one of everything, sizes around a vector, one chunk, chunks of one unit, hidden sizes without factors of
# two; and few steps, where a kernel that takes several at a time may fail.
SHAPES = [(1, 1, 1, 1), (1, 2, 10, 10), (2, 7, 10, 1), (3, 33, 6, 2), (4, 1, 24, 8), (5, 2, 33, 3), (6, 7, 63, 9)]
SHAPES += [(7, 1, 20, 20), (8, 33, 16, 4), (9, 2, 100, 10)]


def width(hidden: int, chunk_size: int) -> int:
    """Of the gates."""
    return 2 * (hidden // chunk_size) + 4 * hidden


class Layer(NamedTuple):
    """The tensors of a call."""

    gates: Tensor  # (N, W)
    weight: Tensor  # (W, H)
    hidden: Tensor  # (B, H)
    cell: Tensor  # (B, H)

    def leaves(self) -> "Layer":
        return Layer(*(x.detach().clone().requires_grad_() for x in self))


def layer(
    rows: int, batch: int, hidden: int, chunk_size: int, *, dtype=torch.float32, device="cpu", seed=0, spread=1.5
) -> Layer:
    """Gaussian gates and states, and a weight as the published code draws it."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    size = width(hidden, chunk_size)
    weight = (2 * torch.rand(size, hidden, generator=g, dtype=torch.float64) - 1) / hidden**0.5
    found = Layer(spread * draw(rows, size), weight, draw(batch, hidden).tanh(), draw(batch, hidden))
    return Layer(*(x.to(device, dtype) for x in found))


def true_cell(gates: Tensor, cell: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden (B, H), cell (B, H), distances (2, B)) of gates (B, W): the formulas of the paper, chunks by view."""
    n = cell.shape[1] // chunk_size
    master_in = 1 - gates[:, :n].softmax(-1).cumsum(-1)
    master_forget = gates[:, n : 2 * n].softmax(-1).cumsum(-1)
    out, candidate, write, forget = gates[:, 2 * n :].reshape(-1, 4 * n, chunk_size).chunk(4, 1)
    distances = torch.stack((1 - master_forget.mean(-1), master_in.mean(-1)))
    master_in, master_forget = master_in[:, :, None], master_forget[:, :, None]
    overlap = master_forget * master_in
    kept = forget.sigmoid() * overlap + (master_forget - overlap)
    written = write.sigmoid() * overlap + (master_in - overlap)
    new = kept * cell.reshape(-1, n, chunk_size) + written * candidate.tanh()
    return (out.sigmoid() * new.tanh()).flatten(1), new.flatten(1), distances


def _steps(gates: Tensor, weight: Tensor, h: Tensor, c: Tensor, chunk_size: int, zoneout: Tensor | None):
    """Of gates (T, B, W) and zoneout (2, T, B, H): (output (T, B, H), h, c, distances (2, T, B))."""
    outputs, distances = [gates.new_empty(0, *h.shape)], [gates.new_empty(2, 0, len(h))]
    for t, x in enumerate(gates):
        new_h, new_c, distance = true_cell(x + h @ weight.T, c, chunk_size)
        if zoneout is not None:
            keep_c, keep_h = zoneout[:, t]
            new_h, new_c = keep_h * h + (1 - keep_h) * new_h, keep_c * c + (1 - keep_c) * new_c
        h, c = new_h, new_c
        outputs.append(h[None])
        distances.append(distance[:, None])
    return torch.cat(outputs), h, c, torch.cat(distances, 1)


def rows_of(sequence: int, batch_sizes: Tensor) -> Tensor:
    """Where the steps of a sequence lie among the rows."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    return starts[batch_sizes > sequence] + sequence


def truth(gates, weight, hidden, cell, *, chunk_size, mask=None, zoneout=None, batch_sizes=None) -> tuple[Tensor, ...]:
    """What `ops.on_lstm` returns, in float64 on the CPU and differentiable; packed sequences run each alone."""
    gates, weight, hidden, cell = (x.cpu().double() for x in (gates, weight, hidden, cell))
    zoneout = None if zoneout is None else zoneout.cpu().double()
    if mask is not None:
        weight = weight.masked_fill(mask.cpu(), 0)
    batch, rows = len(hidden), len(gates)
    if batch_sizes is None or not rows:
        at_step = zoneout if zoneout is None else zoneout.reshape(2, rows // max(batch, 1), *hidden.shape)
        steps = gates.reshape(rows // max(batch, 1), batch, -1) if rows else gates.reshape(0, batch, gates.shape[1])
        output, h, c, distances = _steps(steps, weight, hidden, cell, chunk_size, at_step)
        return output.flatten(0, 1), h, c, distances.flatten(1)
    places = [rows_of(b, batch_sizes) for b in range(batch)]
    alone = [
        _steps(
            gates[place, None],
            weight,
            hidden[b : b + 1],
            cell[b : b + 1],
            chunk_size,
            None if zoneout is None else zoneout[:, place, None],
        )
        for b, place in enumerate(places)
    ]
    order = torch.cat(places).argsort()
    outputs, hs, cs, distances = zip(*alone, strict=True)
    return torch.cat(outputs)[order, 0], torch.cat(hs), torch.cat(cs), torch.cat(distances, 1)[:, order, 0]


def incoming(outputs, seed=1) -> list[Tensor]:
    """A gradient for each output."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) for y in outputs]


def differentiated(function, tensors, grads=None, used=(0, 1, 2, 3), **options):
    """(outputs, gradients of the four tensors; None where the used outputs do not depend on one)."""
    leaves = Layer(*tensors).leaves()
    outputs = function(*leaves, **options)
    grads = incoming(outputs) if grads is None else [g.to(y) for g, y in zip(grads, outputs, strict=True)]
    # Of no steps, the loop's output is not a function of anything.
    chosen = [k for k in used if outputs[k].requires_grad]
    if not chosen:
        return outputs, (None,) * 4
    found = torch.autograd.grad([outputs[k] for k in chosen], leaves, [grads[k] for k in chosen], allow_unused=True)
    return outputs, found


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str = "") -> None:
    """Relative to the size of `want`, by the norm and by the largest element; NaN where `want` has it."""
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places than expected"
    if not want.numel():
        return
    difference, want = (got - want).nan_to_num(), want.nan_to_num()
    for size, error in ((want.norm(), difference.norm()), (want.abs().max(), difference.abs().max())):
        # What is as small as 1e-3 is a remainder of larger numbers.
        allowed = tolerance * size.clamp_min(1e-3)
        assert error <= allowed, f"{what}: error {error:.2e} of {size:.2e}, allowed {allowed:.2e}"


# By dtype: what the spec of the op promises; 16-bit gradients are rounded before and after a product of them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
NAMES = ("output", "hidden", "cell", "distances", "d gates", "d weight", "d hidden", "d cell")


def assert_as_the_loop(function, tensors, *, used=(0, 1, 2, 3), what="", **options) -> None:
    """Outputs and gradients of `function`, which is called as `ops.on_lstm`, against the loop's."""
    dtype = tensors[0].dtype
    outputs, gradients = differentiated(function, tensors, used=used, **options)
    grads = [g.cpu().double() for g in incoming(outputs)]
    exact = [x.cpu().double() for x in tensors]
    true_outputs, true_gradients = differentiated(truth, exact, grads, used, **options)
    for name, got, want in zip(NAMES, (*outputs, *gradients), (*true_outputs, *true_gradients), strict=True):
        if got is None or want is None:
            assert got is None or not got.any(), f"{what} {name}: the loop has no gradient"
            assert want is None or not want.any(), f"{what} {name}: no gradient"
            continue
        assert_near(got, want, TOLERANCE[dtype], f"{what} {name}")
