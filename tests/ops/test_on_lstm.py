"""on_lstm and on_lstm_cell on every kernel against a loop of the published cell: values, gradients, extreme numbers.

Not in cases.py: of on_lstm's tensors some have rows and others none. The claims are those of the contract, in which
on_lstm_cell is. Sequences of different lengths, masks and zoneout are in test_on_lstm_sequences.py, torch's
transformations and wrong arguments in test_on_lstm_torch.py.
"""

import math

import pytest
import torch

from harness import INTERPRETED
from ops.on_lstm_loop import (
    FLOATS,
    NAMES,
    SHAPES,
    TOLERANCE,
    assert_as_the_loop,
    assert_near,
    differentiated,
    incoming,
    layer,
    true_cell,
    truth,
    width,
)
from ops.test_contract import LAYOUTS
from pygen import ops

DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else FLOATS
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# A launch takes a tenth of a second in Triton's interpreter, and every step is one: there is the kernel's side alone,
# without what the operator does for all kernels alike.
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="seconds of launches for nothing that the kernel decides")
FEW_SHAPES = [(1, 1, 1, 1), (2, 3, 10, 1), (3, 2, 12, 4)] if INTERPRETED else SHAPES


def same(got, want, backend):
    """The same bits; of the plain formulas the same values, for the library's products depend on layout and threads."""
    if backend == "reference":
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


# ---- values and gradients --------------------------------------------------------------------------------------------


@typed
@pytest.mark.parametrize("shape", FEW_SHAPES, ids=lambda shape: "T{}-B{}-H{}-C{}".format(*shape))
def test_outputs_states_distances_and_every_gradient_are_those_of_the_loop(
    shape, dtype, backend_device, poisoned_memory
):
    steps, batch, hidden, chunk = shape
    tensors = layer(steps * batch, batch, hidden, chunk, dtype=dtype, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=chunk, what=f"{shape}")


@pytest.mark.skipif(INTERPRETED, reason="for blocks and threads: minutes in the interpreter")
@pytest.mark.parametrize(("hidden", "chunk"), [(1150, 10), (509, 509), (257, 1)])
def test_wide_layers_are_as_right(hidden, chunk, backend, backend_device, poisoned_memory):
    if backend == "reference" or (hidden > 1000 and backend in ("cpu-default", "cpu-avx2")):
        pytest.skip("for blocks and threads, of which the plain formulas have none; the widest on the widest vectors")
    tensors = layer(2 * 5, 5, hidden, chunk, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=chunk)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_errors_do_not_grow_over_a_hundred_steps(backend_device):
    tensors = layer(100 * 2, 2, 24, 4, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=4)


@pytest.mark.parametrize("steps", [1, 2] if INTERPRETED else range(1, 10))
def test_as_few_as_one_to_nine_steps_are_right(steps, backend_device, poisoned_memory):
    tensors = layer(steps * 3, 3, 12, 3, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=3, what=f"T = {steps}")


def state_tolerance(dtype, backend):
    """Of the cell state. A GPU's product of 16-bit tensors takes the hidden state as it is returned, rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return TOLERANCE[dtype if backend in ("cuda", "triton") else wide]


@typed
def test_the_cell_state_and_the_distances_of_16_bit_inputs_are_those_of_wide_arithmetic(dtype, backend, backend_device):
    """The state is neither rounded between steps nor at the end."""
    tensors = layer(6 * 2, 2, 16, 4, dtype=dtype, device=backend_device)
    output, h, c, distances = ops.on_lstm(*tensors, chunk_size=4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (output.dtype, h.dtype, c.dtype, distances.dtype) == (dtype, dtype, wide, wide)
    _, _, true_c, true_distances = truth(*tensors, chunk_size=4)
    assert_near(c, true_c, state_tolerance(dtype, backend), "cell")
    assert_near(distances, true_distances, state_tolerance(dtype, backend), "distances")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_float32_cell_state_goes_with_16_bit_gates(dtype, backend, backend_device):
    """What a call returns goes into the next."""
    gates, weight, hidden, cell = layer(2 * 2, 2, 12, 4, dtype=dtype, device=backend_device)
    tensors = gates, weight, hidden, cell.float() * 1.0001  # no 16-bit number
    (_, _, c, _), gradients = differentiated(ops.on_lstm, tensors, chunk_size=4)
    assert_near(c, truth(*tensors, chunk_size=4)[2], state_tolerance(dtype, backend))
    assert [g.dtype for g in gradients] == [dtype, dtype, dtype, torch.float32]


@not_interpreted
@typed
def test_a_sequence_cut_in_two_is_the_whole_sequence(dtype, backend_device):
    """What truncated back-propagation relies on."""
    gates, weight, hidden, cell = layer(7 * 3, 3, 12, 4, dtype=dtype, device=backend_device)
    whole = ops.on_lstm(gates, weight, hidden, cell, chunk_size=4)
    first = ops.on_lstm(gates[:9], weight, hidden, cell, chunk_size=4)
    second = ops.on_lstm(gates[9:], weight, *first[1:3], chunk_size=4)
    pieces = torch.cat((first[0], second[0])), *second[1:3], torch.cat((first[3], second[3]), 1)
    for got, want in zip(pieces, whole, strict=True):
        # The hidden state is rounded to 16 bits where the sequence is cut.
        assert_near(got, want, TOLERANCE[dtype])


def test_a_sequence_of_one_step_is_the_cell(backend_device):
    gates, weight, hidden, cell = layer(4, 4, 15, 5, dtype=torch.float64, device=backend_device)
    output, h, c, distances = ops.on_lstm(gates, weight, hidden, cell, chunk_size=5)
    want = ops.on_lstm_cell(gates + hidden @ weight.T, cell, chunk_size=5)
    torch.testing.assert_close((h, c, distances), want)
    assert torch.equal(output, h)


CELLS = [(33, 3, ()), (6, 1, (5,)), (1, 1, (3,)), (10, 10, (2, 2)), (64, 8, (2, 1, 3))][: 2 if INTERPRETED else None]


@typed
def test_the_cell_and_its_gradients_are_those_of_the_formula(dtype, backend_device, poisoned_memory):
    for hidden, chunk, front in CELLS:
        gates, _, _, cell = layer(math.prod(front), math.prod(front), hidden, chunk, dtype=dtype, device=backend_device)
        leaves = gates.view(*front, -1).requires_grad_(), cell.view(*front, -1).requires_grad_()
        outputs = ops.on_lstm_cell(*leaves, chunk_size=chunk)
        assert [tuple(y.shape) for y in outputs] == [(*front, hidden), (*front, hidden), (2, *front)]
        exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
        flat = [x.reshape(-1, x.shape[-1]) for x in exact]
        true = [y.view(z.shape) for y, z in zip(true_cell(*flat, chunk), outputs, strict=True)]
        grads = incoming(outputs)
        got = *outputs, *torch.autograd.grad(outputs, leaves, grads)
        want = *true, *torch.autograd.grad(true, exact, [g.cpu().double() for g in grads])
        for name, g, w in zip(("hidden", "cell", "distances", "d gates", "d cell"), got, want, strict=True):
            assert_near(g, w, TOLERANCE[dtype], f"{hidden} {chunk} {front} {name}")


@not_interpreted
def test_a_chunk_of_all_units_lets_nothing_in_and_keeps_everything(backend_device):
    """One master gate: cumax of one number is 1, so the input's master gate is 0 and the forget gate's 1."""
    gates, weight, hidden, cell = layer(5 * 2, 2, 6, 6, device=backend_device)
    _, _, c, distances = ops.on_lstm(gates, weight, hidden, cell, chunk_size=6)
    assert torch.equal(c, cell) and distances.abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "used", [(0, 3), (0,), (1,), (2,), (3,), (1, 2), (0, 1, 2)][: 1 if INTERPRETED else None], ids=str
)
def test_an_output_that_nobody_uses_has_no_part_in_the_gradients(used, backend_device, poisoned_memory):
    tensors = layer(3 * 2, 2, 12, 4, dtype=torch.float64, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=4, used=used)


@not_interpreted
def test_gradients_of_some_inputs_alone_are_the_same(backend, backend_device):
    tensors = layer(3 * 2, 2, 12, 4, device=backend_device)
    _, everything = differentiated(ops.on_lstm, tensors, chunk_size=4)
    for k in range(4):
        some = [x.detach().requires_grad_(i == k) for i, x in enumerate(tensors)]
        outputs = ops.on_lstm(*some, chunk_size=4)
        (got,) = torch.autograd.grad(outputs, some[k], incoming(outputs))
        same(got, everything[k], backend)


# ---- extreme numbers -------------------------------------------------------------------------------------------------


@typed
def test_saturated_gates_overflow_nowhere(dtype, backend_device, poisoned_memory):
    """Distances are then whole chunks: 0, 1 / n, 2 / n, ..."""
    largest = {torch.float16: 6e4}.get(dtype, 1e30)
    for size in (1e4, largest)[INTERPRETED:]:
        gates, *others = layer(3 * 2, 2, 12, 3, dtype=dtype, device=backend_device)
        # +- size with distinct columns of the masters, so that a largest one is there.
        order = torch.linspace(0.5, 1, gates.shape[1], device=backend_device, dtype=torch.float64)
        gates = (gates.sign().double() * size * order).to(dtype)
        assert_as_the_loop(ops.on_lstm, (gates, *others), chunk_size=3, what=f"{size}")
        chunks = ops.on_lstm(gates, *others, chunk_size=3)[3] * 4
        assert (chunks - chunks.round()).abs().max() <= 8 * torch.finfo(chunks.dtype).eps


@typed
def test_a_master_gate_of_minus_infinity_is_a_chunk_that_is_never_chosen(dtype, backend_device):
    gates, *others = layer(3 * 2, 2, 12, 3, dtype=dtype, device=backend_device)
    gates[:, 1] = gates[:, 6] = gates[2, 4] = -math.inf
    assert_as_the_loop(ops.on_lstm, (gates, *others), chunk_size=3)


@not_interpreted
@typed
def test_infinite_gates_of_units_are_open_and_closed(dtype, backend_device):
    gates, *others = layer(2 * 2, 2, 12, 3, dtype=dtype, device=backend_device)
    gates[:, 8::5] = math.inf
    gates[:, 10::5] = -math.inf
    assert_as_the_loop(ops.on_lstm, (gates, *others), chunk_size=3)


# Of 4 + 4 master gates.
UNNORMALISABLE = {
    "input all -inf": (slice(0, 4), -math.inf),
    "forget all -inf": (slice(4, 8), -math.inf),
    "forget inf": (5, math.inf),
    "input nan": (2, math.nan),
    "unit nan": (30, math.nan),
}


@pytest.mark.parametrize(
    ("columns", "value"),
    list(UNNORMALISABLE.values())[: 1 if INTERPRETED else None],
    ids=list(UNNORMALISABLE)[: 1 if INTERPRETED else None],
)
def test_what_softmax_cannot_normalise_is_nan_in_its_own_sequence_from_there_on(
    columns, value, backend, backend_device
):
    clean = layer(4 * 3, 3, 12, 3, device=backend_device)
    gates = clean.gates.clone()
    gates[1 * 3 + 1, columns] = value  # step 1 of sequence 1
    spoilt = clean._replace(gates=gates)
    got, got_gradients = differentiated(ops.on_lstm, spoilt, chunk_size=3)
    want, want_gradients = differentiated(ops.on_lstm, clean, chunk_size=3)
    output, undisturbed = got[0].view(4, 3, 12), want[0].view(4, 3, 12)
    assert torch.equal(output.isnan(), truth(*spoilt, chunk_size=3)[0].view(4, 3, 12).to(output.device).isnan())
    assert output[1:, 1].isnan().any(1).all() and not output[0].isnan().any()
    same(output[:, [0, 2]], undisturbed[:, [0, 2]], backend)
    for k in (1, 2):
        same(got[k][[0, 2]], want[k][[0, 2]], backend)
    of_gates, of_clean_gates = (g[0].view(4, 3, -1) for g in (got_gradients, want_gradients))
    same(of_gates[:, [0, 2]], of_clean_gates[:, [0, 2]], backend)
    assert of_gates[:2, 1].isnan().any(1).all()


def test_empty_results_of_no_steps_and_no_sequences(backend_device):
    for rows, batch in ((0, 3), (0, 0)):
        tensors = layer(rows, batch, 12, 3, device=backend_device)
        (output, h, c, distances), gradients = differentiated(ops.on_lstm, tensors, chunk_size=3)
        assert output.shape == (0, 12) and distances.shape == (2, 0)
        assert torch.equal(h, tensors.hidden) and torch.equal(c, tensors.cell)
        assert [g.shape for g in gradients] == [x.shape for x in tensors]
        grads = incoming((output, h, c, distances))
        assert torch.equal(gradients[2], grads[1]) and torch.equal(gradients[3], grads[2]) and not gradients[1].any()


# ---- sizes above what a grid of programs can count -------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_70000_steps_are_counted_and_the_last_gradients_are_those_of_the_last_steps(backend, backend_device):
    """A state is forgotten within a hundred steps, so the end of a long sequence is a short one from a known state."""
    if backend == "reference":
        pytest.skip("for the grids of launches; the plain formulas have none, and take half a minute")
    steps, last = 70_000, 100
    tensors = layer(steps, 1, 2, 1, device=backend_device)
    leaves = tensors.leaves()
    output, h, c, distances = ops.on_lstm(*leaves, chunk_size=1)
    assert output.shape == (steps, 2) and distances.shape == (2, steps)
    cut = steps - last
    with torch.no_grad():
        _, near_h, near_c, _ = truth(*tensors._replace(gates=tensors.gates[cut - 1000 : cut]), chunk_size=1)
    end = tensors.gates[cut:].cpu().double().requires_grad_()
    true = truth(end, tensors.weight, near_h, near_c, chunk_size=1)
    for got, want in zip((output[cut:], h, c, distances[:, cut:]), true, strict=True):
        assert_near(got, want, 1e-5)
    grads = incoming((output[cut:], h, c, distances[:, cut:]))
    (got,) = torch.autograd.grad((output[cut:], h, c, distances[:, cut:]), leaves.gates, grads)
    (want,) = torch.autograd.grad(true, end, [g.cpu().double() for g in grads])
    assert got.isfinite().all()
    assert_near(got[cut:], want, 1e-5)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
def test_70000_sequences_and_70000_cells_are_counted(backend, backend_device):
    if backend == "reference":
        pytest.skip("for the grids of launches, of which the plain formulas have none")
    tensors = layer(70_000, 70_000, 2, 1, device=backend_device)
    assert_as_the_loop(ops.on_lstm, tensors, chunk_size=1)
    gates, cell = tensors.gates, tensors.cell
    got, want = ops.on_lstm_cell(gates, cell, chunk_size=1), true_cell(gates.cpu().double(), cell.cpu().double(), 1)
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, 1e-5)


# ---- layouts and bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["permuted"] if INTERPRETED else LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_of_inputs_and_gradients_do_not_change_a_bit_and_no_input_is_modified(
    layout, dtype, backend, backend_device
):
    tensors = layer(4 * 3, 3, 12, 3, dtype=dtype, device=backend_device)
    strided = [LAYOUTS[layout](x) for x in tensors]
    assert any(not x.is_contiguous() or x.storage_offset() for x in strided)
    copies = [x.clone() for x in strided]
    outputs, want = differentiated(ops.on_lstm, tensors, chunk_size=3)
    grads = incoming(outputs)
    leaves = [x.detach().requires_grad_() for x in strided]
    got_outputs = ops.on_lstm(*leaves, chunk_size=3)
    got = torch.autograd.grad(got_outputs, leaves, [LAYOUTS[layout](g) for g in grads])
    assert all(y.is_contiguous() for y in got_outputs)
    for g, w in zip((*got_outputs, *got), (*outputs, *want), strict=True):
        same(g, w, backend)
    assert all(torch.equal(x, copy) for x, copy in zip(strided, copies, strict=True)), "an input was modified"


@not_interpreted
def test_expanded_states_and_gradients_equal_their_copies(backend, backend_device):
    gates, weight, hidden, cell = layer(4 * 3, 3, 12, 3, device=backend_device)
    expanded = gates, weight, hidden[:1].expand(3, 12), cell[:1].expand(3, 12)
    for scale in (1.0, 0.0):
        found = []
        for tensors, change in ((expanded, lambda g: g), ([x.contiguous() for x in expanded], torch.Tensor.contiguous)):
            leaves = [x.detach().requires_grad_() for x in tensors]
            outputs = ops.on_lstm(*leaves, chunk_size=3)
            grads = [change(torch.full((), scale, device=backend_device).expand(y.shape)) for y in outputs]
            found.append((*outputs, *torch.autograd.grad(outputs, leaves, grads)))
        for got, want in zip(*found, strict=True):
            same(got, want, backend)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is one thread")
@pytest.mark.parametrize(("batch", "hidden", "chunk"), [(1, 300, 10), (33, 128, 8), (20, 250, 5)])
def test_results_are_the_same_bits_at_one_and_two_threads_and_again(
    batch, hidden, chunk, backend, backend_device, two_threads
):
    if backend == "reference":
        pytest.skip("the plain formulas are the library's products")
    tensors = layer(6 * batch, batch, hidden, chunk, device=backend_device)
    runs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        outputs, gradients = differentiated(ops.on_lstm, tensors, chunk_size=chunk)
        runs.append((*outputs, *gradients))
    for run in runs[1:]:
        for name, got, want in zip(NAMES, run, runs[0], strict=True):
            if name == "d weight":  # one product, of the library that torch calls
                assert_near(got, want, 1e-5, name)
            else:
                assert torch.equal(got, want), name


@pytest.mark.parametrize(("hidden", "chunk"), [(12, 3), (33, 3), (250, 5)])
def test_a_sequence_has_the_same_bits_alone_and_among_others(hidden, chunk, backend, backend_device):
    """So that no batch size changes a sentence's tree."""
    if not backend.startswith("cpu"):
        pytest.skip("of the CPU's own products; a library's depend on their shape")
    tensors = layer(4 * 9, 9, hidden, chunk, device=backend_device)
    outputs, gradients = differentiated(ops.on_lstm, tensors, chunk_size=chunk)
    grads = incoming(outputs)
    for b in (0, 3, 4, 8):
        own, one = slice(b, None, 9), slice(b, b + 1)
        mine = tensors.gates[own], tensors.weight, tensors.hidden[one], tensors.cell[one]
        of_mine = grads[0][own], grads[1][one], grads[2][one], grads[3][:, own]
        alone, of_alone = differentiated(ops.on_lstm, mine, of_mine, chunk_size=chunk)
        together = outputs[0][own], outputs[1][one], outputs[2][one], outputs[3][:, own]
        for name, got, want in zip(NAMES, alone, together, strict=False):
            assert torch.equal(got, want), f"{name} of {b}"
        for k, want in ((0, gradients[0][own]), (2, gradients[2][one]), (3, gradients[3][one])):
            assert torch.equal(of_alone[k], want), f"{NAMES[4 + k]} of {b}"


def test_the_width_of_the_gates_is_two_masters_a_chunk_and_four_gates_a_unit():
    assert width(1150, 10) == 4830 and width(7, 7) == 30
