"""The Triton ON-LSTM launchers against a loop over steps in float64, differentiated by autograd."""

import pytest
import torch

triton = pytest.importorskip("triton")

from ops.on_lstm_loop import truth  # noqa: E402
from pygen.triton_kernels import _common  # noqa: E402
from pygen.triton_kernels import _on_lstm_cell as cell_kernels  # noqa: E402
from pygen.triton_kernels import _on_lstm_sequence as sequence  # noqa: E402
from pygen.triton_kernels import on_lstm as kernels  # noqa: E402
from pygen.triton_kernels.on_lstm import on_lstm, on_lstm_backward  # noqa: E402

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device", "poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DOUBLE, SINGLE, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# Relative to the largest element: what is promised of float32 and float64; of the 16-bit types four roundings (the
# hidden state and its gradient, each times a weight, over the few steps of a test).
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 1e-5, BF16: 4 * 2.0**-8, FP16: 4 * 2.0**-11}


def wide(dtype):
    return DOUBLE if dtype == DOUBLE else SINGLE


def normal(*shape, seed, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE).to(DEVICE, dtype)


class Layer:
    """The operator's arguments, and incoming gradients for all of its results."""

    def __init__(self, sizes, n, chunk_size, dtype, batch=None, dense=True, weight=True, mask=False, zoneout=False):
        rows, batch, size = sum(sizes), sizes[0] if batch is None else batch, n * chunk_size
        width = 2 * n + 4 * size
        self.sizes, self.chunk_size, self.dtype = sizes, chunk_size, dtype
        self.gates = 2 * normal(rows, width, seed=0, dtype=dtype)
        self.weight = normal(width, size, seed=1, dtype=dtype) * max(size, 1) ** -0.5 if weight else None
        self.mask = normal(width, size, seed=2) > 0.5 if mask else None
        self.hidden = normal(batch, size, seed=3, dtype=dtype) if weight else None
        self.cell = normal(batch, size, seed=4, dtype=wide(dtype))
        self.zoneout = torch.sigmoid(normal(2, rows, size, seed=5)).to(dtype) if zoneout else None
        self.batch_sizes = None if dense else torch.tensor(sizes)
        self.grads = [
            normal(rows, size, seed=6, dtype=dtype),
            normal(batch, size, seed=7, dtype=dtype),
            normal(batch, size, seed=8, dtype=wide(dtype)),
            normal(2, rows, seed=9, dtype=wide(dtype)),
        ]

    @property
    def inputs(self):
        given = (self.gates, self.weight, self.mask, self.hidden, self.cell, self.zoneout)
        return (*given, self.batch_sizes, self.chunk_size)

    def back(self, forward, grads):
        saved = (self.weight, self.mask, self.cell, self.zoneout, forward[0], *forward[4:])
        return on_lstm_backward(*grads, *saved, self.batch_sizes, self.chunk_size)


def loop(layer, gates, hidden, cell):
    """(output, last hidden, last cell, distances) by the formulas; without a weight it is as if that were 0."""
    weight = gates.new_zeros(gates.shape[1], cell.shape[1]) if layer.weight is None else layer.weight
    options = {"mask": layer.mask, "zoneout": layer.zoneout, "batch_sizes": layer.batch_sizes}
    return truth(gates, weight, hidden, cell, chunk_size=layer.chunk_size, **options)


def assert_near(got, want, dtype):
    assert got.shape == want.shape and got.is_contiguous()
    error = (got.detach().cpu().double() - want.detach().cpu()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, want.abs().max())


def assert_layer(layer, grads=None):
    """Results, and gradients for `grads` (all of them unless given)."""
    grads = layer.grads if grads is None else grads
    gates, cell = (x.double().requires_grad_() for x in (layer.gates, layer.cell))
    hidden = torch.zeros_like(cell) if layer.hidden is None else layer.hidden.double()
    hidden = hidden.detach().requires_grad_()
    want = loop(layer, gates, hidden, cell)
    got = on_lstm(*layer.inputs, True)
    dtype = layer.dtype
    assert [y.dtype for y in got] == [dtype, dtype, *[wide(dtype)] * 4]
    for y, exact in zip(got, want, strict=False):
        assert_near(y, exact, dtype)
    total = sum((y * g.cpu().double()).sum() for y, g in zip(want, grads, strict=True) if g is not None)
    exact_gradients = torch.autograd.grad(total, (gates, hidden, cell), materialize_grads=True)
    gradients = layer.back(got, grads)
    assert [g.dtype for g in gradients] == [dtype, dtype, layer.cell.dtype]
    for g, exact in zip(gradients, exact_gradients, strict=True):
        assert_near(g, exact, dtype)


@pytest.fixture(params=["steps", "sequence"])
def road(request, monkeypatch):
    """Step by step, or in one launch."""
    if request.param == "steps":
        monkeypatch.setattr(sequence, "wanted", lambda *_: False)
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short rows have several, and blocks of master gates likewise."""
    for name in ("FORWARD_ELEMENTS", "BACKWARD_ELEMENTS"):
        monkeypatch.setattr(kernels, name, {4: 64, 8: 32})
    if DEVICE == "cpu":
        # Part of a compiled kernel.
        monkeypatch.setattr(cell_kernels, "LONG", triton.language.constexpr(4))


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, BF16, FP16])
def test_a_layer_equals_the_loop(dtype, road):
    assert_layer(Layer([3, 3, 3], 5, 3, dtype))


@pytest.mark.parametrize(("n", "chunk_size"), [(7, 10), (6, 1), (1, 5), (16, 4)])
def test_chunks_of_any_number_and_size(n, chunk_size):
    assert_layer(Layer([2, 2], n, chunk_size, DOUBLE))


def test_zoneout_and_dropconnect(road):
    assert_layer(Layer([2, 2, 2], 5, 3, SINGLE, mask=True, zoneout=True))


def test_one_step_of_one_sequence():
    assert_layer(Layer([1], 3, 2, SINGLE))


@pytest.mark.parametrize("zoneout", [False, True])
def test_a_packed_batch_equals_each_sequence_alone(zoneout):
    assert_layer(Layer([4, 2, 2, 1], 3, 2, DOUBLE, dense=False, zoneout=zoneout))


def test_sequences_without_a_step_keep_their_states():
    assert_layer(Layer([2, 1], 3, 2, DOUBLE, batch=4, dense=False))


def test_without_a_weight_it_is_the_cell():
    assert_layer(Layer([5], 4, 3, SINGLE, weight=False))
    assert_layer(Layer([2], 4, 3, DOUBLE, weight=False, zoneout=True))


def test_more_sequences_than_a_program_takes():
    assert_layer(Layer([sequence.ROWS + 1] * 2, 3, 2, SINGLE))


def test_cells_in_parts_of_a_program(monkeypatch):
    monkeypatch.setattr(sequence, "CELL_TILE", 4 * 8 * 4 * 16)
    assert_layer(Layer([9, 9], 4, 3, SINGLE))


@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_one_incoming_gradient_alone(given):
    layer = Layer([2, 1], 3, 2, DOUBLE, dense=False, zoneout=given == 1)
    assert_layer(layer, [g if i == given else None for i, g in enumerate(layer.grads)])


def test_one_incoming_gradient_alone_in_one_launch():
    layer = Layer([2, 2], 3, 2, SINGLE)
    assert_layer(layer, [None, None, layer.grads[2], None])


def test_no_incoming_gradient_is_no_gradient(road):
    layer = Layer([2, 2], 3, 2, SINGLE)
    for g in layer.back(on_lstm(*layer.inputs, True), (None,) * 4):
        assert (g == 0).all()


@pytest.mark.parametrize(("sizes", "n", "chunk_size", "dtype"), [([1, 1], 9, 3, DOUBLE), ([1], 3, 40, SINGLE)])
def test_a_row_longer_than_a_tile(sizes, n, chunk_size, dtype, small_tiles):
    # In tiles of 8 elements in float64, of many chunks, or of 16 in float32, of many units of a chunk.
    assert_layer(Layer(sizes, n, chunk_size, dtype, zoneout=dtype == SINGLE))


def test_a_cell_state_of_16_bits_gets_a_gradient_of_16_bits():
    layer = Layer([2, 2], 3, 2, BF16)
    layer.cell = layer.cell.bfloat16()
    assert_layer(layer)


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_small_master_gates_keep_their_relative_accuracy():
    layer = Layer([1], 12, 1, SINGLE, weight=False)
    layer.gates[0, :12] = torch.arange(12, 0, -1, device=DEVICE) * 4.0
    layer.gates[0, 12:24] = torch.arange(12, 0, -1, device=DEVICE) * -4.0
    # Open output gates and no cell state before: what is written is f~ i~ / 2 + i~ (1 - f~), times tanh of 20.
    layer.gates[0, 24:] = 0
    layer.gates[0, 36:48] = 20
    layer.cell.zero_()
    i_tilde, f_tilde = layer.gates[0, :24].double().view(2, 12).softmax(1)
    master_in = i_tilde.flip(0).cumsum(0).flip(0).roll(-1)
    master_in[-1] = 0
    overlap = master_in * f_tilde.cumsum(0)
    want = overlap / 2 + (master_in - overlap)
    got = on_lstm(*layer.inputs, False)[2][0].double()
    assert ((got - want).abs() <= 1e-5 * want).all()


def test_saturated_gates_are_finite(road):
    layer = Layer([2, 2], 3, 2, SINGLE)
    layer.gates *= 1e4
    forward = on_lstm(*layer.inputs, True)
    assert all(y.isfinite().all() for y in (*forward, *layer.back(forward, layer.grads)))


@pytest.mark.parametrize("long", [False, True])
def test_a_nan_stays_in_its_sequence(long, request):
    if long:
        request.getfixturevalue("small_tiles")
    layer = Layer([3] if long else [3, 3], 9, 3, DOUBLE if long else SINGLE)
    layer.gates[1, 2] = float("nan")
    forward = on_lstm(*layer.inputs, True)
    of_gates, of_hidden, of_cell = layer.back(forward, layer.grads)
    for rows in (*forward[:3], forward[3].t(), of_gates, of_hidden, of_cell):
        assert rows.view(-1, 3, rows.shape[1])[:, [0, 2]].isfinite().all()
    assert forward[0][1::3].isnan().all() and of_hidden[1].isnan().all()


def test_a_row_of_masked_master_gates_is_nan_as_softmax_is():
    layer = Layer([2], 3, 2, SINGLE, weight=False)
    layer.gates[0, :3] = float("-inf")
    layer.gates[1, 1] = float("-inf")
    output = on_lstm(*layer.inputs, False)[0]
    assert output[0].isnan().any() and output[1].isfinite().all()


def test_nothing_is_saved_unless_asked_and_no_bit_changes(road):
    layer = Layer([2, 2], 3, 2, SINGLE, zoneout=True)
    kept, plain = on_lstm(*layer.inputs, True), on_lstm(*layer.inputs, False)
    assert plain[4].shape == plain[5].shape == (0,)
    for a, b in zip(kept[:4], plain[:4], strict=True):
        assert torch.equal(a, b)


def test_no_hidden_state_is_one_of_zeros(road):
    layer = Layer([2, 2], 3, 2, SINGLE)
    layer.hidden = torch.zeros_like(layer.hidden)
    want = on_lstm(*layer.inputs, False)
    layer.hidden = None
    assert torch.equal(on_lstm(*layer.inputs, False)[0], want[0])


def every_second(x):
    return None if x is None else torch.stack((x, x), -1)[..., 0]


def test_strides_do_not_change_a_bit_and_inputs_are_left_alone(road):
    layer = Layer([2, 2], 3, 2, SINGLE, mask=True, zoneout=True)
    names = ("gates", "weight", "mask", "hidden", "cell", "zoneout")
    forward = on_lstm(*layer.inputs, True)
    want = (*forward, *layer.back(forward, layer.grads))
    before = {name: getattr(layer, name).clone() for name in names}
    for name in names:
        setattr(layer, name, every_second(before[name]))
    strided = on_lstm(*layer.inputs, True)
    got = (*strided, *layer.back([every_second(y) for y in strided], [every_second(g) for g in layer.grads]))
    for a, b in zip(got, want, strict=True):
        assert a.is_contiguous() and torch.equal(a, b)
    for name in names:
        assert torch.equal(getattr(layer, name), before[name])


@pytest.mark.parametrize(
    ("sizes", "batch", "n", "chunk_size"), [([0], 3, 2, 2), ([], 0, 2, 2), ([2, 2], 2, 0, 3), ([0, 0], 2, 3, 1)]
)
def test_nothing_to_do_is_done(sizes, batch, n, chunk_size):
    layer = Layer(sizes, n, chunk_size, SINGLE, batch=batch, dense=len(sizes) < 2)
    forward = on_lstm(*layer.inputs, True)
    rows, size = sum(sizes), n * chunk_size
    assert [y.shape for y in forward[:4]] == [(rows, size), (batch, size), (batch, size), (2, rows)]
    assert torch.equal(forward[1], layer.hidden) and torch.equal(forward[2], layer.cell)
    assert forward[3].isnan().all()
    of_gates, of_hidden, of_cell = layer.back(forward, layer.grads)
    assert of_gates.shape == layer.gates.shape
    assert torch.equal(of_hidden, layer.grads[1]) and torch.equal(of_cell, layer.grads[2])


@pytest.mark.parametrize("sizes", [[1, 2], [2, 2], [3], [4, -1]])
def test_batch_sizes_that_do_not_fit_are_refused(sizes):
    layer = Layer([2, 1], 3, 2, SINGLE, dense=False)
    layer.batch_sizes = torch.tensor(sizes)
    with pytest.raises(RuntimeError, match="batch_sizes must not increase"):
        on_lstm(*layer.inputs, False)


def test_arguments_that_do_not_fit_are_named():
    layer = Layer([2, 2], 3, 2, SINGLE)
    forward = on_lstm(*layer.inputs, True)
    with pytest.raises(RuntimeError, match="gates must have a multiple of the 2 sequences' rows, got 3"):
        on_lstm(layer.gates[:3], *layer.inputs[1:], False)
    with pytest.raises(RuntimeError, match="H a multiple of chunk_size"):
        on_lstm(*layer.inputs[:-1], 4, False)
    with pytest.raises(RuntimeError, match=r"gates must have .* = 30 columns, got 29"):
        on_lstm(layer.gates[:, 1:], *layer.inputs[1:], False)
    layer.weight = layer.weight.t()
    with pytest.raises(RuntimeError, match=r"weight must be \(30, 6\)"):
        on_lstm(*layer.inputs, False)
    with pytest.raises(RuntimeError, match="on_lstm_backward: weight"):
        layer.back(forward, layer.grads)


# ---- which road ------------------------------------------------------------------------------------------------------


def launches(n, chunk_size, dtype, batch, steps, monkeypatch):
    """What a dense layer would launch; meta tensors have no values that a launcher could wait for."""
    recorded = []
    monkeypatch.setattr(_common, "recorder", recorded)
    size = n * chunk_size
    gates, weight, state = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((steps * batch, 2 * n + 4 * size), (2 * n + 4 * size, size), (batch, size))
    )
    on_lstm(gates, weight, None, state, state.to(wide(dtype)), None, None, chunk_size, True)
    return [launch.kernel.__name__ for launch in recorded]


@pytest.mark.parametrize(
    ("n", "chunk_size", "dtype", "batch"),
    [(16, 8, SINGLE, 64), (16, 16, BF16, 32), (15, 10, SINGLE, 20), (16, 8, SINGLE, 16 * sequence.MULTIPROCESSORS)],
)
def test_a_small_weight_takes_all_steps_in_one_launch(n, chunk_size, dtype, batch, monkeypatch):
    assert launches(n, chunk_size, dtype, batch, 5, monkeypatch) == ["on_lstm_sequence_kernel"]


@pytest.mark.parametrize(
    ("n", "chunk_size", "dtype", "batch"),
    [
        (115, 10, SINGLE, 20),
        (16, 16, SINGLE, 32),
        (17, 10, SINGLE, 20),
        (16, 8, DOUBLE, 64),
        (16, 8, SINGLE, 16 * sequence.MULTIPROCESSORS + 1),
    ],
)
def test_a_large_weight_or_batch_or_float64_takes_one_launch_a_step(n, chunk_size, dtype, batch, monkeypatch):
    assert launches(n, chunk_size, dtype, batch, 5, monkeypatch) == ["on_lstm_cell_kernel"] * 5


def test_a_cuda_graph_captures_a_layer(road):
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs need a CUDA device")
    layer = Layer([3] * 4, 5, 3, SINGLE)
    want = on_lstm(*layer.inputs, True)
    layer.back(want, layer.grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = on_lstm(*layer.inputs, True)
        layer.back(got, layer.grads)
    graph.replay()
    assert torch.equal(got[0], want[0])
