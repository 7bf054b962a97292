"""on_lstm under torch's transformations: derivatives of derivatives, compilation, export, vmap, autocast; and what it
refuses. on_lstm_cell is in cases.py."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from harness import INTERPRETED, available_backends
from ops.on_lstm_loop import differentiated, incoming, layer, truth, width
from pygen import ops

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="traces with fake tensors, or hundreds of launches")
CHUNK, HIDDEN = 2, 4
SIZES = [3, 3, 1]  # of packed steps, of four sequences
NAMES = ("gates", "weight", "hidden", "cell")


def tiny(*, packed=False, dtype=torch.float64, device="cpu", seed=0):
    """(tensors, options) of three steps."""
    batch = 4 if packed else 2
    rows = sum(SIZES) if packed else 6
    tensors = layer(rows, batch, HIDDEN, CHUNK, dtype=dtype, device=device, seed=seed, spread=1.0)
    options = {"chunk_size": CHUNK}
    return tensors, options | ({"batch_sizes": torch.tensor(SIZES)} if packed else {})


def extras(tensors):
    """A mask and zoneout for the tensors."""
    g = torch.Generator().manual_seed(5)
    mask = torch.rand(tensors.weight.shape, generator=g) < 0.3
    zoneout = torch.rand(2, *tensors.gates.shape[:1], HIDDEN, generator=g, dtype=torch.float64)
    return {"mask": mask.to(tensors.gates.device), "zoneout": zoneout.to(tensors.gates)}


@pytest.fixture
def few_device(backend, backend_device):
    """Where the plain formulas and one kernel run: what torch does with an op is the same for every kernel."""
    if backend not in ("reference", available_backends()[-1]):
        pytest.skip("the same for every kernel")
    return backend_device


lengths = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


# ---- derivatives of derivatives --------------------------------------------------------------------------------------


@not_interpreted
@lengths
@pytest.mark.parametrize("extra", [False, True], ids=["plain", "mask and zoneout"])
def test_gradcheck_and_gradgradcheck(packed, extra, few_device):
    tensors, options = tiny(packed=packed, device=few_device)
    options |= extras(tensors) if extra else {}
    leaves = tuple(tensors.leaves())
    assert torch.autograd.gradcheck(lambda *x: ops.on_lstm(*x, **options), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: ops.on_lstm(*x, **options), leaves, fast_mode=True)


@not_interpreted
@pytest.mark.parametrize("used", [0, 1, 2, 3])
def test_the_gradient_of_a_gradients_norm_is_that_of_the_loop(used, few_device):
    """As a gradient penalty does, through one output at a time."""
    tensors, options = tiny(device=few_device)
    found = []
    for function in (ops.on_lstm, truth):
        leaves = tensors.leaves()
        output = function(*leaves, **options)[used]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for name, got, want in zip(NAMES, *found, strict=True):
        torch.testing.assert_close(got.cpu(), want.cpu(), atol=1e-10, rtol=1e-10, msg=name)


def test_forward_mode_is_refused_not_silently_zero(backend_device):
    tensors, options = tiny(device=backend_device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors.gates, torch.ones_like(tensors.gates))
        with pytest.raises(NotImplementedError, match="jvp"):
            ops.on_lstm(dual, *tensors[1:], **options)


# ---- what is kept ----------------------------------------------------------------------------------------------------


class _Kept(TorchDispatchMode):
    """How many numbers the operator's calls gave for a backward."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.pygen.on_lstm.default:
            self.kept.append(sum(x.numel() for x in found[4:]))
        return found


def test_without_a_gradient_nothing_is_kept(backend_device):
    tensors, options = tiny(device=backend_device)
    with _Kept() as calls:
        with torch.no_grad():
            plain = ops.on_lstm(*tensors.leaves(), **options)
        with torch.inference_mode():
            ops.on_lstm(*tensors, **options)
        graph = ops.on_lstm(*tensors.leaves(), **options)
    assert calls.kept == [0, 0, 6 * (HIDDEN + width(HIDDEN, CHUNK))]
    for got, want in zip(plain, graph, strict=True):
        assert not got.requires_grad and torch.equal(got, want)


def test_what_keeps_nothing_refuses_a_backward(backend_device):
    tensors, _ = tiny(device=backend_device)
    gates, weight, hidden, cell = tensors.leaves()
    found = torch.ops.pygen.on_lstm(gates, weight, None, hidden, cell, None, None, CHUNK, False)
    with pytest.raises(RuntimeError, match="on_lstm: called with save=False"):
        found[0].sum().backward()


def test_the_states_before_may_be_overwritten_with_those_behind_when_no_gradient_is_asked(backend_device):
    """As generation does, in place."""
    tensors, options = tiny(device=backend_device)
    with torch.no_grad():
        h, c = tensors.hidden.clone(), tensors.cell.clone()
        for t in range(3):
            _, new_h, new_c, _ = ops.on_lstm(tensors.gates[2 * t : 2 * t + 2], tensors.weight, h, c, **options)
            h.copy_(new_h), c.copy_(new_c)
        _, want_h, want_c, _ = ops.on_lstm(*tensors, **options)
    torch.testing.assert_close((h, c), (want_h, want_c))


def test_results_do_not_share_memory_with_each_other_or_with_inputs(backend_device):
    """An in-place change of one must not reach another."""
    for packed in (False, True):
        tensors, options = tiny(packed=packed, device=backend_device)
        found = [*ops.on_lstm(*tensors, **options), *tensors]
        assert len({x.untyped_storage().data_ptr() for x in found}) == len(found)


# ---- torch's transformations -----------------------------------------------------------------------------------------


# What reads no shape as a symbol: of packed sequences, values say how many rows there are, and each call of the others
# costs seconds.
FEW_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@not_interpreted
def test_opcheck():
    """Of the registration, which all kernels share."""
    tensors, _ = tiny(dtype=torch.float32)
    gates, weight, hidden, cell = tensors.leaves()
    more = extras(tensors)
    operator = torch.ops.pygen.on_lstm.default
    torch.library.opcheck(operator, (gates, weight, more["mask"], hidden, cell, more["zoneout"], None, CHUNK, True))
    for arguments in (
        (gates, weight, None, hidden, cell, None, None, CHUNK, True),
        (gates.detach(), weight.detach(), None, hidden.detach(), cell.detach(), None, None, CHUNK, False),
        (gates.detach()[:2].requires_grad_(), None, None, None, cell, None, None, CHUNK, True),
    ):
        torch.library.opcheck(operator, arguments, test_utils=FEW_CHECKS)


@not_interpreted
def test_opcheck_of_packed_sequences_and_of_the_backward():
    tensors, options = tiny(packed=True, dtype=torch.float32)
    gates, weight, hidden, cell = tensors.leaves()
    sizes = options["batch_sizes"]
    operator = torch.ops.pygen.on_lstm.default
    torch.library.opcheck(
        operator, (gates, weight, None, hidden, cell, None, sizes, CHUNK, True), test_utils=FEW_CHECKS
    )
    found = [x.detach() for x in operator(gates, weight, None, hidden, cell, None, sizes, CHUNK, True)]
    output, _, _, _, cells, activations = found
    given = (weight, None, cell, None, output, cells, activations, sizes, CHUNK)
    for used in ((0, 1, 2, 3), (0,), (2, 3)):
        grads = [g if k in used else None for k, g in enumerate(incoming(found[:4]))]
        torch.library.opcheck(torch.ops.pygen.on_lstm_backward.default, (*grads, *given), test_utils=FEW_CHECKS)


@not_interpreted
@lengths
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiles_into_one_graph_with_the_same_gradients(compiler, packed, backend, few_device):
    if compiler == "inductor" and (packed or backend == "reference"):
        pytest.skip("seconds of code generation for the same graph")
    tensors, options = tiny(packed=packed, dtype=torch.float32, device=few_device)
    options |= extras(tensors)
    leaves = tensors.leaves()

    def step(gates, weight, hidden, cell, batch_sizes):
        lengths = {"batch_sizes": batch_sizes} if packed else {}
        found = ops.on_lstm(2 * gates, weight.tanh(), hidden, cell, **options | lengths)
        return sum((y**3).sum() for y in found)

    sizes = options.get("batch_sizes")
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    got = torch.autograd.grad(compiled(*leaves, sizes), leaves)
    want = torch.autograd.grad(step(*leaves, sizes), leaves)
    torch.testing.assert_close(got, want)


@not_interpreted
def test_sequences_of_another_length_need_few_compilations(few_device):
    """torch.compile makes the number of rows a symbol after the first change."""
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = layer(0, 2, HIDDEN, CHUNK, device=few_device).weight

    @torch.compile(fullgraph=True, backend=compiles)
    def step(gates, weight, hidden, cell):
        return ops.on_lstm(gates, weight, hidden, cell, chunk_size=CHUNK)[0].sum()

    for steps in (3, 4, 5, 6, 7):
        gates, _, hidden, cell = layer(2 * steps, 2, HIDDEN, CHUNK, device=few_device)
        want = ops.on_lstm(gates, weight, hidden, cell, chunk_size=CHUNK)[0].sum()
        torch.testing.assert_close(step(gates, weight, hidden, cell), want)
    assert compiles.frame_count <= 2


@not_interpreted
@lengths
def test_exports(packed, few_device):
    tensors, options = tiny(packed=packed, dtype=torch.float32, device=few_device)

    class Recurrence(torch.nn.Module):
        def forward(self, gates, weight, hidden, cell):
            return ops.on_lstm(gates, weight, hidden, cell, **options)

    with torch.no_grad():
        exported = torch.export.export(Recurrence(), tuple(tensors)).module()
        torch.testing.assert_close(exported(*tensors), ops.on_lstm(*tensors, **options))


@not_interpreted
@pytest.mark.parametrize(
    "in_dims", [(0, None, None, None), (1, None, 1, 1), (None, 0, None, None), (0, 0, 0, 0)], ids=str
)
def test_vmap_equals_a_loop(in_dims, few_device):
    layers = [tiny(device=few_device, seed=i)[0] for i in range(3)]
    inputs = [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip(zip(*layers, strict=True), in_dims, strict=True)
    ]
    mapped = torch.func.vmap(lambda *x: ops.on_lstm(*x, chunk_size=CHUNK), in_dims)(*inputs)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)]
        for together, alone in zip(mapped, ops.on_lstm(*one, chunk_size=CHUNK), strict=True):
            torch.testing.assert_close(together[i], alone)


@not_interpreted
@lengths
def test_per_sample_gradients_by_vmap_of_grad_equal_a_loop(packed, few_device):
    tensors, options = tiny(packed=packed, device=few_device)
    gates = torch.stack([tensors.gates, tensors.gates.flip(0), 2 * tensors.gates])

    def loss(gates, weight, hidden, cell):
        return sum((y**3).sum() for y in ops.on_lstm(gates, weight, hidden, cell, **options))

    of_each = torch.func.grad(loss, argnums=(0, 1, 2, 3))
    mapped = torch.func.vmap(of_each, (0, None, None, None))(gates, *tensors[1:])
    for i in range(3):
        for name, together, alone in zip(NAMES, mapped, of_each(gates[i], *tensors[1:]), strict=True):
            torch.testing.assert_close(together[i], alone, msg=name)


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_under_autocast_the_op_runs_in_float32_and_gradients_keep_their_dtype(dtype, few_device):
    """Gates of a product are of 16 bits there, weights and states are not."""
    tensors, options = tiny(dtype=torch.float32, device=few_device)
    more = extras(tensors)
    leaves = tensors._replace(gates=tensors.gates.to(dtype)).leaves()
    with torch.autocast(few_device.type, torch.bfloat16):
        outputs = ops.on_lstm(*leaves, **options, **more)
    assert [y.dtype for y in outputs] == [torch.float32] * 4
    want = ops.on_lstm(leaves.gates.float(), *leaves[1:], **options, **more)
    torch.testing.assert_close(outputs, want)
    gradients = torch.autograd.grad(outputs, leaves, incoming(outputs))
    assert [g.dtype for g in gradients] == [dtype] + [torch.float32] * 3


@lengths
def test_on_the_meta_device_shapes_dtypes_and_strides_are_right(packed):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors, options = tiny(packed=packed, dtype=dtype)
        real = differentiated(ops.on_lstm, tensors, **options)
        meta = differentiated(ops.on_lstm, [x.to("meta") for x in tensors], **options)
        for got, want in zip((*meta[0], *meta[1]), (*real[0], *real[1]), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
            assert got.device.type == "meta"


# ---- what is refused -------------------------------------------------------------------------------------------------

GATES, WEIGHT, STATE = (6, width(HIDDEN, CHUNK)), (width(HIDDEN, CHUNK), HIDDEN), (2, HIDDEN)
# What is given instead, the error, and what its sentence says.
WRONG = {
    "chunk size does not divide": (
        {"chunk_size": 3},
        ValueError,
        "multiple of chunk_size.*hidden size 4 and chunk_size 3",
    ),
    "chunk size 0": ({"chunk_size": 0}, ValueError, "multiple of chunk_size"),
    "chunk size negative": ({"chunk_size": -2}, ValueError, "multiple of chunk_size"),
    "gates of another width": ({"gates": torch.ones(6, 19)}, ValueError, r"weight must be \(19, 4\), got \(20, 4\)"),
    "chunk size of other gates": ({"chunk_size": 4}, ValueError, r"= 18 columns .* got \(6, 20\)"),
    "gates of three dimensions": ({"gates": torch.ones(3, 2, 20)}, ValueError, r"got \(3, 2, 20\) and \(2, 4\)"),
    "gates of one dimension": ({"gates": torch.ones(20)}, ValueError, r"got \(20,\)"),
    "cell of one dimension": ({"cell": torch.ones(4)}, ValueError, r"cell \(B, H\), got .* \(4,\)"),
    "rows no multiple of the batch": (
        {"gates": torch.ones(5, 20)},
        ValueError,
        "multiple of the 2 sequences' rows, got 5",
    ),
    "weight transposed": ({"weight": torch.ones(4, 20)}, ValueError, r"weight must be \(20, 4\), got \(4, 20\)"),
    "hidden of another batch": ({"hidden": torch.ones(3, 4)}, ValueError, r"hidden must be \(2, 4\), got \(3, 4\)"),
    "hidden of another size": ({"hidden": torch.ones(2, 6)}, ValueError, r"hidden must be \(2, 4\), got \(2, 6\)"),
    "mask of another shape": (
        {"mask": torch.ones(4, 20, dtype=torch.bool)},
        ValueError,
        r"mask must be \(20, 4\), got \(4, 20\)",
    ),
    "zoneout of another shape": ({"zoneout": torch.ones(2, 3, 4)}, ValueError, r"zoneout must be \(2, 6, 4\)"),
    "gates of integers": ({"gates": torch.ones(GATES, dtype=torch.int64)}, TypeError, "floating point.*int64"),
    "gates no tensor": ({"gates": [[0.0]]}, TypeError, "gates must be a floating point tensor, got list"),
    "no weight": ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    "no cell": ({"cell": None}, TypeError, "cell must be a torch.Tensor, got NoneType"),
    "weight no tensor": ({"weight": 3.0}, TypeError, "weight must be a torch.Tensor, got float"),
    "weight of another dtype": (
        {"weight": torch.ones(WEIGHT).double()},
        TypeError,
        "weight must be torch.float32 .*float64",
    ),
    "hidden of another dtype": ({"hidden": torch.ones(STATE).bfloat16()}, TypeError, "hidden must be .*bfloat16"),
    "cell of another dtype": ({"cell": torch.ones(STATE).double()}, TypeError, "cell must be torch.float32 .*float64"),
    "mask of numbers": ({"mask": torch.ones(WEIGHT)}, TypeError, "mask must be torch.bool .*float32"),
    "weight elsewhere": (
        {"weight": torch.ones(WEIGHT, device="meta")},
        ValueError,
        "weight must be on the gates' device cpu",
    ),
    "batch_sizes of 32 bits": (
        {"batch_sizes": torch.tensor([3, 3]).int()},
        ValueError,
        "batch_sizes must be int64.*int32",
    ),
    "batch_sizes of two dimensions": ({"batch_sizes": torch.ones(2, 3).long()}, ValueError, r"batch_sizes .*\(2, 3\)"),
}


@pytest.mark.parametrize(("given", "error", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected_and_what_came(given, error, sentence):
    right = dict(zip(NAMES, layer(6, 2, HIDDEN, CHUNK), strict=True)) | {"chunk_size": CHUNK}
    ops.on_lstm(**right)
    with pytest.raises(error, match=f"^on_lstm: .*{sentence}"):
        ops.on_lstm(**right | given)


CELL = {
    "fronts that differ": (
        torch.ones(3, 20),
        torch.ones(2, 4),
        2,
        ValueError,
        r"agree in front.*\(3, 20\) and \(2, 4\)",
    ),
    "no dimension": (torch.ones(()), torch.ones(()), 1, ValueError, "agree in front"),
    "no units": (torch.ones(2, 0), torch.ones(2, 0), 2, ValueError, "multiple of chunk_size.*hidden size 0"),
    "a chunk size that does not divide": (torch.ones(2, 20), torch.ones(2, 4), 3, ValueError, "multiple of chunk_size"),
    "another width": (torch.ones(2, 19), torch.ones(2, 4), 2, ValueError, r"= 20 columns.*\(2, 19\)"),
    "integers": (torch.ones(2, 20).int(), torch.ones(2, 4), 2, TypeError, "floating point"),
    "another dtype": (torch.ones(2, 20), torch.ones(2, 4).half(), 2, TypeError, "cell must be torch.float32 .*float16"),
    "no tensor": (torch.ones(2, 20), None, 2, TypeError, "cell must be a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize(("gates", "cell", "chunk", "error", "sentence"), CELL.values(), ids=CELL)
def test_a_wrong_argument_of_the_cell_is_named(gates, cell, chunk, error, sentence):
    with pytest.raises(error, match=f"^on_lstm_cell: .*{sentence}"):
        ops.on_lstm_cell(gates, cell, chunk_size=chunk)
