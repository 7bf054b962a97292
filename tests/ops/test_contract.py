"""What every op promises, on every kernel: values, gradients, layouts, types, determinism, torch's transformations."""

import pytest
import torch

from harness import INTERPRETED
from ops.cases import CASES, FEW_CASES
from pygen.reference._dtypes import compute_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# tests/triton_kernels has the others, kernel by kernel.
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED else DTYPES
named = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# What torch does with an op is the same for every kernel; the interpreter leaves it out where a launch takes seconds.
FEW_QUICK_CASES = [case for case in FEW_CASES if not (INTERPRETED and case.costly)]
named_few = pytest.mark.parametrize("case", FEW_QUICK_CASES, ids=lambda case: case.name)
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Triton's interpreter runs a program at a time in Python, a thousand times slower than a kernel: there every case is
# checked for its values and gradients, without the sizes that only threads care about, and a few cases for the rest.
LARGEST = 200 if INTERPRETED else 10**9
FEW_LAUNCHES = [case for case in FEW_CASES if case.name != "spline-linear8"]
named_most = pytest.mark.parametrize("case", FEW_LAUNCHES, ids=lambda case: case.name) if INTERPRETED else named


def shapes_of(case, backend):
    # The large shapes are there for the kernels' blocks and threads; the plain formulas have none.
    largest = 200 if backend == "reference" else LARGEST
    shapes = [shape for shape in case.shapes if torch.Size(shape).numel() <= largest]
    return shapes[::3] if INTERPRETED and case.costly else shapes


def assert_close(got, want, tolerance, what="", unavoidable=0.0):
    """Relative error by the norm, in units of the result's epsilon: rounding is judged by what the result can hold.

    `unavoidable` is an error that is allowed besides, absolute.
    """
    got, want = got.detach().cpu().double(), want.detach().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places than expected"
    size = want.nan_to_num().norm().clamp_min(1e-3)
    error, allowed = (got - want).nan_to_num().norm() / size, tolerance + unavoidable / size
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def tolerance_of(case, output, backend):
    # float64 results are compared with float64 formulas that round themselves, sums of 20,000 terms among them.
    eps = torch.finfo(output.dtype).eps
    if output.dtype == torch.float64:
        return 1e-12
    # The interpreter's conversion to bfloat16 truncates. The plain formulas sum in the type itself, as eager code does:
    # what they lose against float64 grows with the length, and is what the kernels avoid.
    return case.tolerance * eps * {"triton": 2, "reference": 16}.get(backend, 1)


_known: dict[tuple, tuple] = {}


def truth_and_unavoidable(case, key, truth, tensors):
    """The true results of `tensors`, and for each an error that no arithmetic of their precision avoids.

    A spline multiplies the rounding of its knots by slopes of a hundred and loses it again in tails. No constant times
    epsilon judges both, but how far the truth moves does: allowed is eight times the furthest that rounding the inputs
    moved it in three tries. Plain PyTorch stays below six times that, and below four but for one case.

    Costly, and the same on every kernel: computed once for each `key`.
    """
    if not case.rounded_at:
        true = truth(tensors)
        return true, [0.0] * len(true)
    key = (case.name, tensors[0].shape, tensors[0].dtype, key)
    if key not in _known:
        true = truth(tensors)
        dtype = compute_dtype(tensors[0].dtype)
        moved = [truth(case.rounded(tensors, dtype, seed)) for seed in range(3)]
        _known[key] = true, [8 * max((m[k] - t).norm().item() for m in moved) for k, t in enumerate(true)]
    return _known[key]


def assert_same(case, got, want, backend):
    """The same bits; from the plain formulas only the same values: torch's own sums depend on layout and threads."""
    if backend == "reference":
        # An ill-conditioned op multiplies what those sums differ by with its slopes, up to hundreds.
        eps = torch.finfo(got.dtype).eps * (100 if case.rounded_at else 1)
        torch.testing.assert_close(got, want, rtol=8 * eps, atol=64 * eps)
    else:
        assert torch.equal(got, want)


def incoming(outputs, seed=1):
    """A gradient for each output."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]


def gradients(case, tensors, grads=None):
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = case.outputs(leaves)
    return torch.autograd.grad(outputs, leaves, grads or incoming(outputs))


def true_gradients(case, tensors, grads):
    leaves = [x.detach().cpu().double().requires_grad_() for x in tensors]
    outputs = case.true_outputs(leaves)
    return torch.autograd.grad(outputs, leaves, [g.cpu().double() for g in grads])


# ---- values and gradients --------------------------------------------------------------------------------------------


@named
@typed
def test_values_are_those_of_the_float64_formula(case, dtype, backend, backend_device, poisoned_memory):
    for shape in shapes_of(case, backend):
        tensors = case.inputs(shape, dtype, backend_device)
        true, allowed = truth_and_unavoidable(case, "values", case.true_outputs, tensors)
        for got, want, more in zip(case.outputs(tensors), true, allowed, strict=True):
            assert_close(got, want, tolerance_of(case, got, backend), f"{shape}", more)


@named
@typed
def test_gradients_are_those_of_the_float64_formula(case, dtype, backend, backend_device, poisoned_memory):
    for shape in shapes_of(case, backend):
        tensors = case.inputs(shape, dtype, backend_device)
        grads = incoming(case.outputs(tensors))
        true, allowed = truth_and_unavoidable(
            case, "gradients", lambda inputs, g=grads: true_gradients(case, inputs, g), tensors
        )
        for got, want, more in zip(gradients(case, tensors, grads), true, allowed, strict=True):
            assert got.dtype == dtype
            # The formula's own cancellations, two roundings of 16-bit inputs: twice the tolerance of values.
            assert_close(got, want, 2 * tolerance_of(case, got, backend), f"{shape}", more)


@named_most
def test_an_output_that_nobody_uses_costs_no_gradient(case, backend_device):
    tensors = case.inputs((3, 20), torch.float64, backend_device)
    for used in range(len(case.outputs(tensors))):
        leaves = [x.requires_grad_() for x in case.inputs((3, 20), torch.float64, backend_device)]
        truth = [x.requires_grad_() for x in case.inputs((3, 20), torch.float64)]
        got = torch.autograd.grad(case.outputs(leaves)[used].sum(), leaves, allow_unused=True)
        want = torch.autograd.grad(case.true_outputs(truth)[used].sum(), truth, allow_unused=True)
        for g, w, leaf in zip(got, want, truth, strict=True):
            zero = torch.zeros_like(leaf)
            torch.testing.assert_close(zero if g is None else g.cpu(), zero if w is None else w, atol=1e-10, rtol=1e-10)


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat((x + 1, x), 0)[len(x) :],
    "channels_last": lambda x: (
        x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT
    ),
}


@named_most
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_strides_of_the_inputs_do_not_change_a_bit(case, layout, dtype, backend, backend_device):
    shapes = [(3, 5, 7), (2, 6, 4, 5), (40, 30)]
    for shape in shapes[:1] if INTERPRETED and case.costly else shapes:
        tensors = case.inputs(shape, dtype, backend_device)
        strided = [LAYOUTS[layout](x) for x in tensors]
        copies = [x.clone() for x in strided]
        for got, want in zip(case.outputs(strided), case.outputs(tensors), strict=True):
            assert got.is_contiguous()
            assert_same(case, got, want, backend)
        for got, want in zip(gradients(case, strided), gradients(case, tensors), strict=True):
            assert_same(case, got, want, backend)
        assert all(torch.equal(x, copy) for x, copy in zip(strided, copies, strict=True)), "an input was modified"


@named_most
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_incoming_gradients_do_not_change_a_bit(case, layout, backend, backend_device):
    tensors = case.inputs((4, 6, 5), torch.float32, backend_device)
    grads = incoming(case.outputs(tensors))
    strided = [LAYOUTS[layout](g) if g.dim() > 1 else torch.stack((g, g), -1)[:, 0] for g in grads]
    for got, want in zip(gradients(case, tensors, strided), gradients(case, tensors, grads), strict=True):
        assert_same(case, got, want, backend)


@named_most
def test_expanded_inputs_and_gradients_equal_their_copies(case, backend, backend_device):
    tensors = [x.expand(4, *x.shape[1:]) for x in case.inputs((1, 6, 5), torch.float32, backend_device)]
    copies = [x.contiguous() for x in tensors]
    for got, want in zip(case.outputs(tensors), case.outputs(copies), strict=True):
        assert_same(case, got, want, backend)
    flat = [torch.ones((), device=backend_device).expand(y.shape) for y in case.outputs(tensors)]
    full = [g.contiguous() for g in flat]
    for got, want in zip(gradients(case, copies, flat), gradients(case, copies, full), strict=True):
        assert_same(case, got, want, backend)


@named_most
@typed
def test_empty_tensors_give_empty_results(case, dtype, backend_device):
    for shape in case.empty_shapes:
        tensors = case.inputs(shape, dtype, backend_device)
        for got, want in zip(case.outputs(tensors), case.true_outputs(tensors), strict=True):
            assert got.shape == want.shape
            assert not got.isnan().any()
        assert all(g.shape == x.shape for g, x in zip(gradients(case, tensors), tensors, strict=True))


# ---- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is one thread")
@named
def test_results_are_the_same_bits_at_one_and_two_threads_and_again(case, backend, backend_device, two_threads):
    tensors = case.inputs(case.threads_shape, torch.float32, backend_device)
    runs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        runs.append((*case.outputs(tensors), *gradients(case, tensors)))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert_same(case, got, want, backend)


# ---- torch's transformations -----------------------------------------------------------------------------------------


@named_most
def test_gradcheck_and_gradgradcheck(case, backend_device):
    if INTERPRETED and case.costly:
        pytest.skip("hundreds of launches, of seconds each")
    tensors = [x.requires_grad_() for x in case.inputs((2, 5), torch.float64, backend_device)]
    fast = len(CASES) > 8
    assert torch.autograd.gradcheck(case.function, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(case.function, tensors, fast_mode=fast)


@pytest.mark.skipif(INTERPRETED, reason="opcheck traces with fake tensors, which Triton's interpreter cannot run")
@named
def test_opcheck(case):
    """Of the registration, which all kernels share."""
    tensors = [x.requires_grad_() for x in case.inputs((3, 4), torch.float32)]
    torch.library.opcheck(case.operator(), case.operator_arguments(tensors))


@pytest.mark.skipif(INTERPRETED, reason="compiled graphs do not go through Triton's interpreter")
@named_few
def test_compiles_into_one_graph_with_the_same_gradients(case, backend_device):
    tensors = case.inputs((3, 20), torch.float32, backend_device)
    leaves = [x.requires_grad_() for x in tensors]

    def step(*inputs):
        # An operation before and one after, so that there is a graph to break.
        outputs = case.outputs([x * 1.0 for x in inputs])
        return sum((y * y).sum() for y in outputs)

    compiled = torch.compile(step, fullgraph=True)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    want = torch.autograd.grad(step(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.skipif(INTERPRETED, reason="torch.export traces with fake tensors")
@named_few
def test_exports(case, backend_device):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return case.outputs(tensors)

    tensors = tuple(case.inputs((3, 20), torch.float32, backend_device))
    exported = torch.export.export(Module(), tensors).module()
    for got, want in zip(exported(*tensors), case.outputs(tensors), strict=True):
        torch.testing.assert_close(got, want)


@named_few
def test_vmap_equals_a_loop(case, backend_device):
    tensors = case.inputs((4, 3, 6), torch.float64, backend_device)
    mapped = torch.func.vmap(lambda *x: case.outputs(x))(*tensors)
    for k, together in enumerate(mapped):
        alone = torch.stack([case.outputs([x[i] for x in tensors])[k] for i in range(4)])
        torch.testing.assert_close(together, alone)


@named_few
def test_per_sample_gradients_by_vmap_of_grad_equal_a_loop(case, backend_device):
    tensors = case.inputs((4, 3, 6), torch.float64, backend_device)

    def loss(*x):
        return sum((y * y).sum() for y in case.outputs(x))

    numbers = tuple(range(case.tensors))
    mapped = torch.func.vmap(torch.func.grad(loss, numbers))(*tensors)
    for k, together in enumerate(mapped):
        alone = torch.stack([torch.func.grad(loss, numbers)(*(x[i] for x in tensors))[k] for i in range(4)])
        torch.testing.assert_close(together, alone)


@named_few
def test_hessian_by_torch_func_equals_that_of_the_formula(case, backend_device):
    tensors = case.inputs((2, 3), torch.float64, backend_device)

    def loss(outputs):
        return sum((y * y).sum() for y in outputs)

    got = torch.func.jacrev(torch.func.grad(lambda x: loss(case.outputs([x, *tensors[1:]]))))(tensors[0])
    plain = [x.cpu() for x in tensors]
    want = torch.func.jacrev(torch.func.grad(lambda x: loss(case.true_outputs([x, *plain[1:]]))))(plain[0])
    torch.testing.assert_close(got.cpu(), want)


@named_few
def test_forward_mode_is_refused_not_silently_zero(case, backend_device):
    tensors = case.inputs((2, 3), torch.float64, backend_device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(NotImplementedError, match="jvp"):
            case.outputs([dual, *tensors[1:]])


@named_few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_under_autocast_the_op_runs_in_float32_and_gradients_keep_their_dtype(case, dtype, backend_device):
    leaves = [x.requires_grad_() for x in case.inputs((3, 20), dtype, backend_device)]
    with torch.autocast(backend_device.type, torch.bfloat16):
        outputs = case.outputs(leaves)
    assert all(y.dtype == torch.float32 for y in outputs)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    assert all(g.dtype == dtype for g in grads)


@named_few
def test_a_module_on_the_meta_device_has_the_right_shapes(case):
    tensors = [torch.empty(shape, device="meta") for shape in case.full_shapes((3, 20))]
    real = case.outputs(case.inputs((3, 20), torch.float32))
    for got, want in zip(case.outputs(tensors), real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
