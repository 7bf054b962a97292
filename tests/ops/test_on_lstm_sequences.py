"""on_lstm on sequences of different lengths, with DropConnect's mask and with zoneout, on every kernel."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from harness import INTERPRETED
from ops.on_lstm_loop import (
    TOLERANCE,
    assert_as_the_loop,
    assert_near,
    differentiated,
    incoming,
    layer,
    rows_of,
    truth,
)
from pygen import ops

# As in test_on_lstm.py: a step is a launch, of a tenth of a second in Triton's interpreter.
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="seconds of launches for nothing that the kernel decides")
DTYPES = (torch.float32,) if INTERPRETED else (torch.float64, torch.float32, torch.bfloat16)
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Sequences, and how many of them have each step: all alike, one shorter by one, several ending at once, down to one,
# some that have no step at all, one sequence, no steps.
PACKED = {
    "even": (3, [3, 3, 3]),
    "by one": (3, [3, 3, 2, 1]),
    "by several": (7, [7, 3, 1] if INTERPRETED else [7, 7, 3, 3, 1]),
    "from many to one": (33, [33, 1, 1]),
    "some without a step": (5, [3, 2]),
    "all but one without a step": (4, [1, 1, 1]),
    "one sequence": (1, [1] * 6),
    "no steps": (3, []),
    "a step of nobody": (3, [3, 2, 0]),
    "nobody": (0, []),
}
packed = pytest.mark.parametrize("name", PACKED if not INTERPRETED else ["by several", "some without a step"])


def packed_layer(name, *, dtype=torch.float32, device="cpu", hidden=12, chunk=3):
    batch, sizes = PACKED[name]
    tensors = layer(sum(sizes), batch, hidden, chunk, dtype=dtype, device=device)
    return tensors, torch.tensor(sizes, dtype=torch.int64)


def a_mask(like, probability=0.45, seed=2):
    """True where a weight is left out."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(like.shape, generator=g) < probability).to(like.device)


def rates(rows, hidden, *, dtype=torch.float32, device="cpu", drawn=False, seed=3):
    """(2, N, H): how much of the cell and of the hidden state stays; `drawn` as training draws them, 0 or 1."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.rand(2, rows, hidden, generator=g, dtype=torch.float64)
    return (rate.lt(0.4).double() if drawn else rate).to(device, dtype)


# ---- lengths ---------------------------------------------------------------------------------------------------------


@packed
@typed
def test_packed_sequences_and_their_gradients_are_those_of_each_sequence_alone(
    name, dtype, backend_device, poisoned_memory
):
    tensors, batch_sizes = packed_layer(name, dtype=dtype, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes, what=name)


@not_interpreted
@pytest.mark.parametrize("hidden, chunk", [(10, 10), (33, 3), (6, 1), (1, 1), (64, 8)])
def test_packed_sequences_of_other_sizes(hidden, chunk, backend_device, poisoned_memory):
    tensors, batch_sizes = packed_layer("by several", device=backend_device, hidden=hidden, chunk=chunk)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=chunk, batch_sizes=batch_sizes)


@not_interpreted
def test_a_sequence_alone_in_a_call_of_its_own_is_what_it_is_among_others(backend_device):
    tensors, batch_sizes = packed_layer("by several", dtype=torch.float64, device=backend_device)
    together, of_together = differentiated(ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes)
    grads = incoming(together)
    of_weight = torch.zeros_like(of_together[1])
    for b in range(len(tensors.hidden)):
        rows = rows_of(b, batch_sizes)
        one = tensors.gates[rows], tensors.weight, tensors.hidden[b : b + 1], tensors.cell[b : b + 1]
        of_one = grads[0][rows], grads[1][b : b + 1], grads[2][b : b + 1], grads[3][:, rows]
        alone, gradients = differentiated(ops.on_lstm, one, of_one, chunk_size=3)
        mine = together[0][rows], together[1][b : b + 1], together[2][b : b + 1], together[3][:, rows]
        for got, want in zip(mine, alone, strict=True):
            assert_near(got, want, 1e-12, f"sequence {b}")
        for got, want in ((of_together[0][rows], 0), (of_together[2][b : b + 1], 2), (of_together[3][b : b + 1], 3)):
            assert_near(got, gradients[want], 1e-12, f"sequence {b}")
        of_weight += gradients[1]
    assert_near(of_together[1], of_weight, 1e-12)


def test_a_sequence_without_a_step_passes_its_state_and_its_gradient_through(backend_device):
    tensors, batch_sizes = packed_layer("some without a step", device=backend_device)
    (_, h, c, _), (_, _, of_hidden, of_cell) = outputs, _ = differentiated(
        ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes
    )
    assert torch.equal(h[3:], tensors.hidden[3:]) and torch.equal(c[3:], tensors.cell[3:])
    grads = incoming(outputs)
    assert torch.equal(of_hidden[3:], grads[1][3:]) and torch.equal(of_cell[3:], grads[2][3:])


@not_interpreted
def test_the_last_states_are_those_of_each_sequences_last_step_of_a_packed_sequence(backend_device):
    lengths, hidden = [5, 5, 2, 1], 12
    x = torch.randn(5, 4, 2 * 4 + 4 * hidden, generator=torch.Generator().manual_seed(0))
    sequence = pack_padded_sequence(x, lengths).to(backend_device)
    _, weight, h, c = layer(0, 4, hidden, 3, device=backend_device)
    output, h, _, _ = ops.on_lstm(sequence.data, weight, h, c, chunk_size=3, batch_sizes=sequence.batch_sizes)
    for b in range(4):
        assert torch.equal(h[b], output[rows_of(b, sequence.batch_sizes)[-1]])


@not_interpreted
def test_even_lengths_are_what_no_lengths_are(backend_device):
    tensors, batch_sizes = packed_layer("even", device=backend_device)
    packed_run = differentiated(ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes)
    dense_run = differentiated(ops.on_lstm, tensors, chunk_size=3)
    for got, want in zip((*packed_run[0], *packed_run[1]), (*dense_run[0], *dense_run[1]), strict=True):
        torch.testing.assert_close(got, want)


@not_interpreted
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (1, 3)], ids=str)
def test_an_output_of_packed_sequences_that_nobody_uses_has_no_part_in_the_gradients(used, backend_device):
    for name in ("by several", "some without a step"):
        tensors, batch_sizes = packed_layer(name, dtype=torch.float64, device=backend_device)
        assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes, used=used, what=name)


# Of seven rows and three sequences.
REFUSED = {
    "growing": [2, 3, 2],
    "too few rows": [3, 3],
    "too many rows": [3, 3, 2],
    "more than the sequences": [4, 3],
    "later more than the sequences": [3, 4],
    "negative": [8, -1],
}


@pytest.mark.parametrize("sizes", REFUSED.values(), ids=REFUSED)
def test_batch_sizes_that_grow_or_are_not_the_rows_or_the_sequences_are_refused(sizes, backend_device):
    tensors = layer(7, 3, 12, 3, device=backend_device)
    with pytest.raises((RuntimeError, ValueError), match="on_lstm: batch_sizes"):
        ops.on_lstm(*tensors, chunk_size=3, batch_sizes=torch.tensor(sizes))


# ---- DropConnect -----------------------------------------------------------------------------------------------------


@typed
def test_a_masked_weight_is_a_weight_of_zeros_there_and_has_no_gradient_there(dtype, backend_device, poisoned_memory):
    tensors = layer(3 * 3, 3, 12, 3, dtype=dtype, device=backend_device)
    mask = a_mask(tensors.weight)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, mask=mask)
    outputs, gradients = differentiated(ops.on_lstm, tensors, chunk_size=3, mask=mask)
    assert not gradients[1][mask].any() and gradients[1][~mask].any()
    if INTERPRETED:
        return
    zeroed = tensors._replace(weight=tensors.weight.masked_fill(mask, 0))
    want_outputs, want_gradients = differentiated(ops.on_lstm, zeroed, chunk_size=3)
    want_gradients = (want_gradients[0], want_gradients[1].masked_fill(mask, 0), *want_gradients[2:])
    for got, want in zip((*outputs, *gradients), (*want_outputs, *want_gradients), strict=True):
        assert_near(got, want, TOLERANCE[dtype] / 10)


@not_interpreted
def test_what_is_masked_may_be_nan_or_infinite(backend_device):
    """A weight that is left out is not read: nothing times zero."""
    tensors = layer(4 * 2, 2, 12, 3, device=backend_device)
    mask = a_mask(tensors.weight)
    clean, of_clean = differentiated(ops.on_lstm, tensors, chunk_size=3, mask=mask)
    for bad in (float("nan"), float("inf")):
        spoilt = tensors._replace(weight=tensors.weight.masked_fill(mask, bad))
        got, of_got = differentiated(ops.on_lstm, spoilt, chunk_size=3, mask=mask)
        for g, w in zip((*got, *of_got), (*clean, *of_clean), strict=True):
            torch.testing.assert_close(g, w)


@not_interpreted
@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_nothing_and_of_everything(value, backend_device):
    tensors = layer(3 * 2, 2, 12, 3, device=backend_device)
    mask = torch.full_like(tensors.weight, value, dtype=torch.bool)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, mask=mask)
    if value:
        _, gradients = differentiated(
            ops.on_lstm, tensors, (torch.ones(6, 12),) * 4, used=(0,), chunk_size=3, mask=mask
        )
        assert not gradients[1].any() and not gradients[2].any()


@not_interpreted
def test_a_transposed_mask_and_zoneout_have_no_other_result(backend_device):
    tensors = layer(4 * 2, 2, 12, 3, device=backend_device)
    mask, zoneout = a_mask(tensors.weight), rates(8, 12, device=backend_device)
    want = differentiated(ops.on_lstm, tensors, chunk_size=3, mask=mask, zoneout=zoneout)
    got = differentiated(
        ops.on_lstm, tensors, chunk_size=3, mask=mask.T.contiguous().T, zoneout=zoneout.mT.contiguous().mT
    )
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(g, w)


# ---- zoneout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [False, True], ids=["rates", "drawn"])
@typed
def test_zoneout_and_its_gradients_are_those_of_the_loop(drawn, dtype, backend_device, poisoned_memory):
    tensors = layer(3 * 3, 3, 12, 3, dtype=dtype, device=backend_device)
    zoneout = rates(9, 12, dtype=dtype, device=backend_device, drawn=drawn)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, zoneout=zoneout)


@packed
def test_zoneout_and_a_mask_go_with_packed_sequences(name, backend_device, poisoned_memory):
    tensors, batch_sizes = packed_layer(name, device=backend_device)
    options = {
        "mask": a_mask(tensors.weight),
        "zoneout": rates(len(tensors.gates), 12, device=backend_device, drawn=True),
    }
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, batch_sizes=batch_sizes, what=name, **options)


def test_zoneout_of_nothing_changes_nothing_and_of_everything_lets_nothing_change(backend_device):
    tensors = layer(4 * 2, 2, 12, 3, device=backend_device)
    zeros = torch.zeros(2, 8, 12, device=backend_device)
    for got, want in zip(
        ops.on_lstm(*tensors, chunk_size=3, zoneout=zeros), ops.on_lstm(*tensors, chunk_size=3), strict=True
    ):
        torch.testing.assert_close(got, want)
    (output, h, c, _), gradients = differentiated(ops.on_lstm, tensors, used=(0, 1, 2), chunk_size=3, zoneout=zeros + 1)
    assert torch.equal(output.view(4, 2, 12), tensors.hidden.expand(4, 2, 12))
    assert torch.equal(h, tensors.hidden) and torch.equal(c, tensors.cell)
    assert not gradients[0].any() and not gradients[1].any()


def test_the_cell_and_the_hidden_state_are_kept_each_by_its_own_rate(backend_device):
    tensors = layer(3 * 2, 2, 12, 3, device=backend_device)
    keep = torch.zeros(2, 6, 12, device=backend_device)
    keep[0] = 1
    output, _, c, _ = ops.on_lstm(*tensors, chunk_size=3, zoneout=keep)
    assert torch.equal(c, tensors.cell) and not torch.equal(output[:2], tensors.hidden)
    _, h, c, _ = ops.on_lstm(*tensors, chunk_size=3, zoneout=1 - keep)
    assert torch.equal(h, tensors.hidden) and not torch.equal(c, tensors.cell)


def test_zoneout_is_a_constant_to_the_gradient(backend_device):
    tensors = layer(3 * 2, 2, 12, 3, device=backend_device).leaves()
    zoneout = rates(6, 12, device=backend_device).requires_grad_()
    outputs = ops.on_lstm(*tensors, chunk_size=3, zoneout=zoneout)
    assert torch.autograd.grad(outputs, zoneout, incoming(outputs), allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_float32_rates_go_with_16_bit_gates(dtype, backend_device):
    tensors = layer(4 * 2, 2, 12, 3, dtype=dtype, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, zoneout=rates(8, 12, device=backend_device))


@pytest.mark.parametrize("sizes", [None, [2, 1, 0]], ids=["one step", "packed"])
@pytest.mark.parametrize("zoned", [False, True], ids=["plain", "zoneout"])
def test_an_operator_without_weight_and_hidden_state_takes_zeros_for_both(sizes, zoned, backend_device):
    rows, hidden, chunk = 3, 12, 3
    tensors = layer(rows, rows, hidden, chunk, dtype=torch.float64, device=backend_device)
    zoneout = torch.rand(2, rows, hidden, dtype=torch.float64, device=backend_device) if zoned else None
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    zeros = {"weight": torch.zeros_like(tensors.weight), "hidden": torch.zeros_like(tensors.hidden)}
    want = truth(**tensors._replace(**zeros)._asdict(), chunk_size=chunk, zoneout=zoneout, batch_sizes=batch_sizes)
    given = (tensors.gates, None, None, None, tensors.cell, zoneout, batch_sizes, chunk, False)
    for got, exact in zip(torch.ops.pygen.on_lstm(*given), want, strict=False):
        assert_near(got, exact, 1e-12)
