"""The road past the dispatcher for small plain CPU tensors: who takes it, who must not, and that nothing shows."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness import INTERPRETED, ordinary_levels
from pygen import _native, backends, ops

pytestmark = pytest.mark.skipif(_native.C is None or INTERPRETED, reason="the road is part of the compiled CPU kernels")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
either_end = pytest.mark.parametrize("complement", [False, True], ids=["", "complement"])


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def takes_the_road(x, dim=-1, complement=False):
    return _native.C.cumax_small(x, dim, complement) is not None


def by_the_dispatcher(x, dim=-1, complement=False):
    return torch.ops.pygen.cumax(x, dim, complement)


class SeenByDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


# ---- who takes it ----------------------------------------------------------------------------------------------------


@typed
@either_end
@pytest.mark.parametrize("level", ordinary_levels())
@pytest.mark.parametrize("shape", [(1,), (4, 4), (3, 17), (2, 3, 65), (4096,)], ids=str)
def test_a_small_tensor_takes_it_and_gets_the_dispatchers_bits(shape, level, dtype, complement):
    x = numbers(*shape, dtype=dtype)
    with backends.cpu_capability(level):
        for dim in range(-len(shape), len(shape)):
            assert takes_the_road(x, dim, complement)
            assert torch.equal(ops.cumax(x, dim, complement=complement), by_the_dispatcher(x, dim, complement))


@either_end
def test_rows_that_softmax_cannot_normalise_are_nan_on_it_too(complement):
    x = numbers(4, 5)
    x[0, 2], x[1, 0], x[2] = float("nan"), float("inf"), float("-inf")
    assert takes_the_road(x)
    y = ops.cumax(x, complement=complement)
    assert y[:3].isnan().all() and torch.equal(y[3:], by_the_dispatcher(x[3:], -1, complement))


@pytest.mark.parametrize(
    "strided",
    [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:2].expand(6, 8), lambda x: x[0, 0]],
    ids=["transposed", "sliced", "expanded", "scalar"],
)
def test_strides_make_no_difference(strided):
    x = strided(numbers(6, 8))
    assert takes_the_road(x)
    y = ops.cumax(x)
    assert y.is_contiguous() and torch.equal(y, by_the_dispatcher(x))
    assert torch.equal(y, ops.cumax(x.contiguous()))


def test_without_gradients_what_could_need_one_takes_it():
    x = numbers(4, 4).requires_grad_()
    with torch.no_grad():
        assert takes_the_road(x)
        assert not ops.cumax(x).requires_grad
    with torch.inference_mode():
        assert takes_the_road(x)
        assert ops.cumax(x).is_inference()


def test_the_result_owns_fresh_memory_and_the_input_keeps_its_references():
    x = numbers(4, 4)
    before = x.clone()
    results = [ops.cumax(x) for _ in range(10)]
    assert torch.equal(x, before)
    assert len({y.data_ptr() for y in (x, *results)}) == 11
    # A reference kept in C++ would never be freed; one too few would free it twice.
    assert x._use_count() == 1 and all(y._use_count() == 1 for y in results)


def test_closing_it_sends_every_call_to_the_dispatcher_until_it_is_opened_again():
    x = numbers(4, 4)
    with backends.use_kernels("reference"):
        assert not takes_the_road(x)
        with backends.use_kernels("reference"):
            pass
        assert not takes_the_road(x)
    assert takes_the_road(x)


# ---- who must not ----------------------------------------------------------------------------------------------------


def test_a_gradient_flows_although_the_tensor_is_small():
    x = numbers(4, 4, dtype=torch.float64).requires_grad_()
    assert not takes_the_road(x)
    assert torch.autograd.gradcheck(ops.cumax, (x,))


def test_a_dispatch_mode_sees_the_operator():
    x = numbers(4, 4)
    want = ops.cumax(x)
    with SeenByDispatch() as seen:
        y = ops.cumax(x)
    assert torch.equal(y, want)
    assert seen.names == ["pygen::cumax"]


def test_a_function_mode_sees_the_operator():
    x = numbers(4, 4)
    want = ops.cumax(x)
    with SeenByFunction() as seen:
        y = ops.cumax(x)
    assert torch.equal(y, want)
    assert torch.ops.pygen.cumax.default in seen.functions


def test_the_profiler_records_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.cumax(numbers(4, 4))
    assert "pygen::cumax" in {event.name for event in profile.events()}


def test_autocast_computes_in_float32():
    x = numbers(4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.cumax(x)
    assert y.dtype == torch.float32 and torch.equal(y, by_the_dispatcher(x.float()))


def test_vmap_and_grad_transform_it():
    x = numbers(5, 4, 3)
    assert torch.equal(torch.func.vmap(lambda row: ops.cumax(row, 0))(x), ops.cumax(x, 1))
    weights = numbers(3)
    got = torch.func.grad(lambda row: (ops.cumax(row) * weights).sum())(x[0, 0])
    leaf = x[0, 0].clone().requires_grad_()
    (want,) = torch.autograd.grad((torch.softmax(leaf, -1).cumsum(-1) * weights).sum(), leaf)
    torch.testing.assert_close(got, want)


def test_forward_mode_says_that_it_is_missing_and_is_not_silently_zero():
    x = numbers(4, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        ops.cumax(forward_ad.make_dual(x, torch.ones_like(x)))


def test_compiled_whole_graphs_hold_the_operator():
    x = numbers(4, 4)
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    y = torch.compile(lambda x: ops.cumax(x) * 2, fullgraph=True, backend=keep)(x)
    assert torch.equal(y, ops.cumax(x) * 2)
    assert [node.target for node in graphs[0].graph.nodes if "cumax" in str(node.target)] == [
        torch.ops.pygen.cumax.default
    ]


def test_traced_graphs_hold_the_operator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ops.cumax, numbers(4, 4))
    other = numbers(4, 4) * 3
    assert "pygen::cumax" in str(traced.graph)
    assert torch.equal(traced(other), ops.cumax(other))


def test_make_fx_records_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: ops.cumax(x))(numbers(4, 4)).graph
    assert torch.ops.pygen.cumax.default in [node.target for node in graph.nodes]


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.as_subclass(Subclass),
        torch.nn.Parameter,
        lambda x: torch._neg_view(x),
        lambda x: torch.complex(torch.zeros_like(x), x).conj().imag,
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.to_mkldnn(),
        lambda x: torch._efficientzerotensor(4, 4),
        lambda x: torch._to_functional_tensor(x),
        lambda x: x[:0],
        lambda x: x.long(),
        lambda x: x.to(torch.complex64),
        lambda x: numbers(4097),
        lambda x: x.tolist(),
        lambda x: None,
    ],
    ids=["subclass", "parameter", "negated", "lazily_negated", "meta", "sparse", "opaque", "zero", "functional"]
    + ["empty", "integer", "complex", "big", "list", "none"],
)
def test_what_is_not_plain_does_not_take_it(odd):
    assert not takes_the_road(odd(numbers(4, 4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_on_the_gpu_does_not_take_it():
    assert not takes_the_road(numbers(4, 4).cuda())


@pytest.mark.parametrize(
    "arguments", [(), (-1,), (-1, 0), (-1.0, False), (2, False), (-3, False), (2**70, False), (True, False)], ids=str
)
def test_odd_arguments_do_not_take_it_and_raise_nothing(arguments):
    assert _native.C.cumax_small(numbers(4, 4), *arguments) is None


@pytest.mark.parametrize(
    "watching",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        SeenByDispatch,
        SeenByFunction,
        forward_ad.dual_level,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["autocast", "dispatch_mode", "function_mode", "forward_mode", "profiler"],
)
def test_while_somebody_watches_nobody_takes_it(watching):
    x = numbers(4, 4)
    with watching():
        assert not takes_the_road(x)
    assert takes_the_road(x)


def test_within_a_transformation_nobody_takes_it():
    x = numbers(4, 4)
    taken = []
    torch.func.vmap(lambda row: (taken.append(takes_the_road(row) or takes_the_road(x)), row)[1])(x)
    assert taken == [False]


def test_lazily_negated_numbers_are_read_negated():
    x = numbers(4, 4)
    for negated in (torch._neg_view(x), torch.complex(torch.zeros_like(x), x).conj().imag):
        assert negated.is_neg()
        assert torch.equal(ops.cumax(negated), ops.cumax(-x))


@pytest.mark.parametrize("dim", [2, -3])
def test_errors_are_the_dispatchers(dim):
    x = numbers(4, 4)
    with pytest.raises(IndexError) as by_road:
        ops.cumax(x, dim)
    with pytest.raises(IndexError) as by_dispatcher:
        by_the_dispatcher(x, dim)
    assert str(by_road.value).splitlines()[0] == str(by_dispatcher.value).splitlines()[0]
