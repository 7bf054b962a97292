"""The spline beyond the common contract: what users of other packages trip over, and that it is the map it claims."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from harness import INTERPRETED
from ops.cases import spline_oracle
from pygen import ops

TAILS = ("linear", "circular", None)
BOUND = 3.0
SMALLEST = (1e-3, 1e-3, 1e-3)

every_tails = pytest.mark.parametrize("tails", TAILS, ids=str)
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
# The interpreter takes seconds for what a kernel does in microseconds: there run the tests of a few launches.
takes_many_launches = pytest.mark.skipif(INTERPRETED, reason="minutes in Triton's interpreter")
only_compiled = pytest.mark.skipif(INTERPRETED, reason="compiled graphs do not go through Triton's interpreter")


def parameters(shape, bins, tails, dtype=torch.float64, device="cpu", spread=1.0, seed=0):
    """Raw widths, heights and derivatives for x of the given shape."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (bins, bins, bins + {"linear": -1, "circular": 0, None: 1}[tails])
    draw = [torch.randn(*shape, size, generator=generator, dtype=torch.float64) for size in sizes]
    return tuple((spread * raw).to(device, dtype) for raw in draw)


def extreme_parameters(shape, bins, tails, dtype, device="cpu", seed=0):
    """Raw parameters of which a third are -50, a third 50 and a third anything between."""
    raws = parameters(shape, bins, tails, spread=1.0, seed=seed)
    return tuple((25 * raw).round(decimals=1).clamp(-50, 50).mul(3).clamp(-50, 50).to(device, dtype) for raw in raws)


def spline(x, raws, tails, inverse=False, bound=BOUND, **options):
    return ops.rational_quadratic_spline(x, *raws, tails=tails, inverse=inverse, tail_bound=bound, **options)


def truth(x, raws, tails, inverse=False, bound=BOUND):
    bins = raws[0].size(-1)
    return spline_oracle(bins, tails, inverse, bound, SMALLEST)(*(t.cpu().double() for t in (x, *raws)))


def knots(raw, bound=BOUND, least=1e-3):
    """Where the bins meet, both ends among them: [..., K + 1], float64."""
    share = least + (1 - least * raw.size(-1)) * raw.cpu().double().softmax(-1)
    ends = torch.full((*raw.shape[:-1], 1), bound, dtype=torch.float64)
    return torch.cat((-ends, 2 * bound * share.cumsum(-1)[..., :-1] - bound, ends), -1)


def awkward(raws, inverse, dtype, device):
    """(x [N, M], raws [N, M, ...]): for each of N splines its knots, their neighbours, the bounds and both tails."""
    at = knots(raws[1] if inverse else raws[0]).to(dtype)
    up, down = torch.tensor(float("inf"), dtype=dtype), torch.tensor(-float("inf"), dtype=dtype)
    far = torch.tensor([0.0, 1e-30, -1e-30, 4.0, -4.0, 1e6, -1e6, 1e20, -1e20], dtype=dtype).expand(len(at), -1)
    x = torch.cat((at, at.nextafter(up), at.nextafter(down), far), -1).to(device)
    return x, tuple(raw[:, None].expand(-1, x.size(1), -1) for raw in raws)


# ---- the oracle itself -----------------------------------------------------------------------------------------------


@every_tails
def test_the_oracles_inverse_inverts_it_and_its_log_slope_is_the_slope_autograd_finds(tails):
    raws = parameters((500,), 6, tails)
    x = torch.linspace(-4, 4, 500, dtype=torch.float64, requires_grad=True)
    y, log_slope = truth(x, raws, tails)
    back, inverse_log_slope = truth(y, raws, tails, inverse=True)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(back, x, atol=1e-11, rtol=0)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-11, rtol=0)
    torch.testing.assert_close(inverse_log_slope, -log_slope, atol=1e-10, rtol=0)


# ---- one kernel, one graph (dingo-gw/dingo#407) ----------------------------------------------------------------------


@only_compiled
@every_tails
@both_directions
def test_a_compiled_graph_holds_the_op_once_and_nothing_else(tails, inverse):
    graphs = []

    def look(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    raws = parameters((4, 3), 8, tails, torch.float32)
    compiled = torch.compile(lambda *t: spline(t[0], t[1:], tails, inverse), backend=look, fullgraph=True)
    compiled(torch.randn(4, 3), *raws)
    calls = [target for target in graphs[0] if "getitem" not in str(target)]
    assert len(graphs) == 1
    assert calls == [torch.ops.pygen.rational_quadratic_spline.default]


@only_compiled
def test_a_change_of_batch_size_does_not_recompile_a_dynamic_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda *t: spline(t[0], t[1:], "linear"), backend=counter, fullgraph=True, dynamic=True)
    for batch in (4, 7, 12):
        # In the tails and out of them: no branch on values.
        compiled(torch.randn(batch, 3) * batch, *parameters((batch, 3), 8, "linear", torch.float32))
    assert counter.frame_count == 1


# ---- the inverse never fails (nflows#87, nflows#71, pyro#3139) -------------------------------------------------------


@every_tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_parameters_make_the_inverse_or_the_forward_fail(tails, dtype, backend_device):
    rounds, widths = (1, (8,)) if INTERPRETED else (10, (2, 8))
    for seed, bins in itertools.product(range(rounds), widths):
        raws = extreme_parameters((150,), bins, tails, dtype, backend_device, seed)
        x = (torch.rand(150, generator=torch.Generator().manual_seed(seed)) * 8 - 4).to(backend_device, dtype)
        inside = x.abs() <= BOUND
        for inverse in (False, True):
            y, log_slope = spline(x, raws, tails, inverse)
            assert y.isfinite().all() and log_slope.isfinite().all()
            assert (y.abs() <= BOUND)[inside].all()


@takes_many_launches
@every_tails
def test_the_inverse_at_extreme_parameters_is_right_to_a_rounding_of_x_or_of_y(tails, backend_device):
    """At slopes from 1e-8 to 1e5 the closest float32 number may be far off in y, and the closest y far off in x."""
    step = 16 * torch.finfo(torch.float32).eps * BOUND
    raws = extreme_parameters((400,), 8, tails, torch.float32, backend_device)
    y = torch.linspace(-BOUND, BOUND, 400).to(backend_device)
    x = spline(y, raws, tails, inverse=True)[0].cpu().double()
    below, above = truth(x - step, raws, tails)[0], truth(x + step, raws, tails)[0]
    y = y.cpu().double()
    assert ((below - step <= y) & (y <= above + step)).all()


@takes_many_launches
@every_tails
def test_inverse_recovers_the_input(tails, backend_device):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        raws = parameters((200,), 8, tails, dtype, backend_device)
        x = torch.linspace(-4, 4, 200, dtype=dtype).to(backend_device)
        y, log_slope = spline(x, raws, tails)
        back, inverse_log_slope = spline(y, raws, tails, inverse=True)
        # Where the spline is flat, y's rounding is magnified on the way back.
        flatness = (-log_slope).exp().clamp_min(1)
        assert ((back - x).abs() <= tolerance * flatness).all()
        assert ((inverse_log_slope + log_slope).abs() <= 10 * tolerance * flatness).all()


# ---- tails (nflows#23, flowjax#239, bayesflow#721) -------------------------------------------------------------------


@pytest.mark.parametrize("tails", ["linear", "circular"])
@both_directions
def test_inputs_that_all_lie_in_the_tails_pass_unchanged_with_unit_gradient(tails, inverse, backend_device):
    raws = [raw.requires_grad_() for raw in parameters((60,), 8, tails, torch.float32, backend_device)]
    x = (torch.linspace(3.1, 50, 60) * torch.tensor([1, -1]).repeat(30)).to(backend_device).requires_grad_()
    y, log_slope = spline(x, raws, tails, inverse)
    assert torch.equal(y, x) and (log_slope == 0).all()
    grad_x, *grads = torch.autograd.grad((y.sum() + log_slope.sum()), (x, *raws))
    assert (grad_x == 1).all()
    assert all((grad == 0).all() for grad in grads)


@both_directions
def test_without_tails_the_spline_goes_straight_on_with_the_slope_of_its_end(inverse, backend_device):
    raws = parameters((6,), 8, None, torch.float64, backend_device)
    x = torch.tensor([-1e3, -7.0, -3.5, 3.5, 7.0, 1e3], dtype=torch.float64).to(backend_device)
    y, log_slope = spline(x, raws, None, inverse)
    slope = 1e-3 + torch.where(x < 0, raws[2][:, 0], raws[2][:, -1]).exp().log1p()
    slope = 1 / slope if inverse else slope
    torch.testing.assert_close(y, x.sign() * BOUND + (x - x.sign() * BOUND) * slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(log_slope, slope.log(), rtol=1e-12, atol=1e-14)


@every_tails
@both_directions
@pytest.mark.parametrize("extreme", [False, True], ids=["moderate", "extreme"])
def test_values_and_gradients_are_finite_in_tails_on_knots_and_at_the_bounds(tails, inverse, extreme, backend_device):
    if INTERPRETED and not extreme:
        pytest.skip("the extremes suffice")
    for dtype in (torch.float32,) if INTERPRETED else (torch.float32, torch.float64):
        make = extreme_parameters if extreme else parameters
        x, raws = awkward(make((4,), 6, tails, dtype), inverse, dtype, "cpu")
        x = x.to(backend_device).requires_grad_()
        raws = [raw.to(backend_device).contiguous().requires_grad_() for raw in raws]
        y, log_slope = spline(x, raws, tails, inverse)
        assert y.isfinite().all() and log_slope.isfinite().all()
        both = (y.sum(), log_slope.sum())
        for outputs in (both,) if INTERPRETED else (both[:1], both[1:], both):
            grads = torch.autograd.grad(outputs, (x, *raws), retain_graph=True)
            assert all(grad.isfinite().all() for grad in grads)


@every_tails
@both_directions
def test_the_ends_are_fixed_points_exactly(tails, inverse, backend_device):
    some = ((8,), (torch.float32,)) if INTERPRETED else ((1, 2, 8, 13), (torch.float32, torch.bfloat16))
    for bins, dtype in itertools.product(*some):
        for make in (parameters, extreme_parameters):
            raws = make((100,), bins, tails, dtype, backend_device)
            x = torch.tensor([-BOUND, BOUND] * 50).to(backend_device, dtype)
            y, _ = spline(x, raws, tails, inverse)
            assert torch.equal(y, x), (bins, dtype, make.__name__)


@takes_many_launches
@both_directions
def test_with_linear_tails_the_slope_at_the_bounds_is_one_and_the_density_continuous(inverse, backend_device):
    """nflows' identity initialisation gives 1.295 there."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-1)):
        raws = parameters((400,), 8, "linear", dtype, backend_device, spread=2.0)
        at = torch.tensor([-BOUND, BOUND], dtype=dtype).repeat(200)
        inner, outer = at.nextafter(torch.zeros_like(at)), at.nextafter(2 * at)
        _, log_slope = spline(at.to(backend_device), raws, "linear", inverse)
        _, within = spline(inner.to(backend_device), raws, "linear", inverse)
        _, beyond = spline(outer.to(backend_device), raws, "linear", inverse)
        assert (log_slope == 0).all() and (beyond == 0).all()
        # One number further in; a steep bin bends log y' by 4 x 500 / 0.006 there.
        assert within.abs().max() <= tolerance


@takes_many_launches
def test_the_density_stays_continuous_across_every_knot(backend_device):
    for tails, inverse in itertools.product(TAILS, (False, True)):
        raws = parameters((1,), 8, tails, torch.float64)
        at = knots(raws[1] if inverse else raws[0])[0, 1:-1]
        raws = [raw.expand(len(at), -1).contiguous().to(backend_device) for raw in raws]
        left, right = (spline((at + e).to(backend_device), raws, tails, inverse) for e in (-1e-12, 1e-12))
        for before, after in zip(left, right, strict=True):
            torch.testing.assert_close(before, after, atol=1e-8, rtol=0)


# ---- it is a monotone map with the slope it claims -------------------------------------------------------------------


@takes_many_launches
@every_tails
@both_directions
def test_it_is_monotone_on_a_dense_grid(tails, inverse, backend_device):
    points = 4001
    raws = parameters((1,), 8, tails, torch.float64, backend_device, spread=2.0)
    x = torch.linspace(-4, 4, points, dtype=torch.float64).to(backend_device)
    y, _ = spline(x, [raw.expand(points, -1) for raw in raws], tails, inverse)
    assert (y.diff() > 0).all()
    raws = extreme_parameters((1,), 8, tails, torch.float32, backend_device)
    y, _ = spline(x.float(), [raw.expand(points, -1) for raw in raws], tails, inverse)
    # Neighbours on a plateau may come out in either order, by a few roundings.
    assert (y.diff() >= -8 * torch.finfo(torch.float32).eps * y.abs().clamp_min(BOUND)[1:]).all()


@takes_many_launches
@every_tails
@both_directions
def test_log_abs_det_is_the_logarithm_of_the_slope_that_autograd_finds(tails, inverse, backend_device):
    raws = parameters((300,), 8, tails, torch.float64, backend_device)
    x = torch.linspace(-4, 4, 300, dtype=torch.float64).to(backend_device).requires_grad_()
    y, log_slope = spline(x, raws, tails, inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-9, rtol=0)


@takes_many_launches
@every_tails
@both_directions
def test_gradcheck_and_gradgradcheck_of_every_tensor_element_by_element(tails, inverse, backend_device):
    raws = parameters((2,), 2, tails, torch.float64, backend_device)
    x = torch.tensor([-3.3, 2.0], dtype=torch.float64).to(backend_device)
    inputs = [t.requires_grad_() for t in (x, *raws)]

    def function(x, *raws):
        return spline(x, raws, tails, inverse)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 33, 64, 200])
@both_directions
def test_any_number_of_bins(bins, inverse, backend_device):
    if INTERPRETED and bins > 33:
        pytest.skip("minutes in Triton's interpreter")
    for tails in TAILS[:1] if INTERPRETED else TAILS:
        raws = parameters((60,), bins, tails, torch.float64, backend_device)
        x = torch.linspace(-4, 4, 60, dtype=torch.float64).to(backend_device)
        for got, want in zip(spline(x, raws, tails, inverse), truth(x, raws, tails, inverse), strict=True):
            torch.testing.assert_close(got.cpu(), want, atol=1e-9, rtol=1e-9)


@takes_many_launches
def test_one_bin_with_linear_tails_is_the_identity(backend_device):
    raws = parameters((50,), 1, "linear", torch.float32, backend_device)
    x = torch.linspace(-4, 4, 50).to(backend_device)
    for inverse in (False, True):
        y, log_slope = spline(x, raws, "linear", inverse)
        torch.testing.assert_close(y, x, atol=1e-6, rtol=0)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-6, rtol=0)


@takes_many_launches
def test_bins_that_are_all_at_their_smallest_make_equal_bins(backend_device):
    raws = parameters((20,), 10, "linear", torch.float64, backend_device, spread=9.0)
    x = torch.linspace(-4, 4, 20, dtype=torch.float64).to(backend_device)
    equal = torch.zeros_like(raws[0])
    got = spline(x, raws, "linear", min_bin_width=0.1, min_bin_height=0.1)
    want = spline(x, (equal, equal, raws[2]), "linear", min_bin_width=0.1, min_bin_height=0.1)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


# ---- types, special values, layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both_directions
def test_16_bit_inputs_give_a_float32_log_abs_det_of_float32_accuracy(dtype, inverse, backend_device):
    raws = parameters((200,), 8, "linear", dtype, backend_device)
    x = torch.linspace(-4, 4, 200).to(backend_device, dtype)
    y, log_slope = spline(x, raws, "linear", inverse)
    wide_y, wide_log_slope = spline(x.float(), [raw.float() for raw in raws], "linear", inverse)
    assert y.dtype == dtype and log_slope.dtype == torch.float32
    # float32's rounding times slopes of tens; 16-bit arithmetic would miss by 1e-2.
    torch.testing.assert_close(log_slope, wide_log_slope, atol=1e-4, rtol=0)
    torch.testing.assert_close(y.float(), wide_y, atol=0, rtol=torch.finfo(dtype).eps)


@takes_many_launches
@every_tails
@both_directions
def test_nan_stays_in_its_own_element(tails, inverse, backend_device):
    nan = float("nan")
    clean = (torch.linspace(-4, 4, 40).to(backend_device), *parameters((40,), 8, tails, device=backend_device))
    clean = [t.float() for t in clean]
    want = spline(clean[0], clean[1:], tails, inverse)
    for spoiled in range(4):
        # The 20th x lies in the middle, where every parameter counts.
        tensors = [t.clone() for t in clean]
        tensors[spoiled][20] = nan
        tensors = [t.requires_grad_() for t in tensors]
        got = spline(tensors[0], tensors[1:], tails, inverse)
        others = torch.arange(40, device=backend_device) != 20
        for g, w in zip(got, want, strict=True):
            assert g[20].isnan()
            assert torch.equal(g[others], w[others])
        grads = torch.autograd.grad([g[others].sum() for g in got], tensors)
        assert all(grad[others].isfinite().all() for grad in grads)
        grads = torch.autograd.grad([g.sum() for g in spline(tensors[0], tensors[1:], tails, inverse)], tensors)
        assert all(grad[others].isfinite().all() for grad in grads)


@takes_many_launches
@every_tails
@both_directions
def test_infinity_lies_in_the_tails(tails, inverse, backend_device):
    raws = parameters((2,), 8, tails, torch.float32, backend_device)
    x = torch.tensor([-float("inf"), float("inf")]).to(backend_device)
    y, log_slope = spline(x, raws, tails, inverse)
    assert torch.equal(y, x) and log_slope.isfinite().all()


@takes_many_launches
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1025])
def test_every_element_is_its_own_however_many_there_are(size, backend, backend_device):
    """Sizes around those at which the work is cut. The plain formulas are exempt: torch's softmax has blocks itself."""
    if backend == "reference":
        pytest.skip("for kernels")
    raws = parameters((size,), 8, "linear", torch.float32, backend_device)
    x = torch.linspace(-4, 4, size).to(backend_device)
    together = spline(x, raws, "linear")
    step = max(size // 6, 1)
    for i in range(0, size, step):
        alone = spline(x[i : i + 1], [raw[i : i + 1] for raw in raws], "linear")
        assert all(torch.equal(t[i : i + 1], a) for t, a in zip(together, alone, strict=True))


@takes_many_launches
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2, 3)], ids=["features", "image"])
@both_directions
def test_views_of_one_packed_conditioner_output_equal_their_copies(shape, inverse, backend, backend_device):
    bins, (batch, features, *space) = 8, shape
    per_feature = 3 * bins - 1
    out = torch.randn(batch, features * per_feature, *space, generator=torch.Generator().manual_seed(0))
    packed = out.to(backend_device).unflatten(1, (features, per_feature)).movedim(2, -1)
    views = packed.split([bins, bins, bins - 1], -1)
    x = torch.linspace(-4, 4, torch.Size(shape).numel()).view(shape).to(backend_device)
    got, want = spline(x, views, "linear", inverse), spline(x, [v.contiguous() for v in views], "linear", inverse)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0 if backend != "reference" else 1e-4)


@takes_many_launches
def test_six_irregular_dimensions_are_read_in_order(backend_device):
    shape = (2, 3, 2, 3, 2, 3)
    raws = parameters(shape, 5, "linear", torch.float64, backend_device)
    x = torch.linspace(-4, 4, 216, dtype=torch.float64).view(shape).to(backend_device)
    order = (4, 2, 0, 5, 3, 1)
    got = spline(x.permute(order), [raw.permute(*order, 6) for raw in raws], "linear")
    want = spline(x, raws, "linear")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.permute(order), atol=1e-10, rtol=0)


@takes_many_launches
def test_parameters_broadcast_over_the_batch_and_their_gradients_sum(backend_device):
    raws = [raw.requires_grad_() for raw in parameters((3,), 5, "linear", torch.float64, backend_device)]
    x = torch.linspace(-4, 4, 12, dtype=torch.float64).view(4, 3).to(backend_device)
    copies = [raw.detach().expand(4, *raw.shape).clone().requires_grad_() for raw in raws]
    outputs, expected = spline(x, raws, "linear"), spline(x, copies, "linear")
    torch.testing.assert_close(outputs, expected, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad([y.sum() for y in outputs], raws)
    want = torch.autograd.grad([y.sum() for y in expected], copies)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.sum(0), atol=1e-10, rtol=1e-10)


def test_mixed_dtypes_are_promoted_as_torch_promotes():
    raws = parameters((4,), 5, "linear", torch.bfloat16)
    y, log_slope = spline(torch.zeros(4), raws, "linear")
    assert y.dtype == log_slope.dtype == torch.float32
    y, _ = spline(torch.zeros(4, dtype=torch.float64), raws, "linear")
    assert y.dtype == torch.float64


# ---- mistakes --------------------------------------------------------------------------------------------------------


def call(x=None, widths=8, heights=8, derivatives=7, **options):
    x = torch.zeros(2, 3) if x is None else x
    sizes = (widths, heights, derivatives)
    return ops.rational_quadratic_spline(
        x, *(torch.zeros(2, 3, n) if isinstance(n, int) else n for n in sizes), **options
    )


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"widths": None}, TypeError, "widths must be a torch.Tensor, got NoneType"),
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x must be floating point, got torch.int64"),
        ({"heights": torch.zeros(2, 3, 8).bool()}, TypeError, "heights must be floating point, got torch.bool"),
        ({"widths": 0, "heights": 0, "derivatives": 0}, ValueError, "bins in the last dimension, at least one"),
        ({"widths": torch.tensor(1.0)}, ValueError, "bins in the last dimension, at least one"),
        ({"heights": 7}, ValueError, "widths and heights must have as many bins, got 8 and 7"),
        ({"derivatives": 8}, ValueError, "8 bins with tails='linear' take 7 derivatives .* got 8"),
        ({"tails": "circular"}, ValueError, "8 bins with tails='circular' take 8 derivatives .* got 7"),
        ({"tails": None}, ValueError, "8 bins with tails=None take 9 derivatives .* got 7"),
        ({"tails": "cubic"}, ValueError, 'tails must be one of linear, circular, none, got "cubic"'),
        ({"widths": torch.zeros(5, 8)}, ValueError, r"widths must be \(\*x.shape, n\) .* got \(5, 8\) for x \(2, 3\)"),
        ({"tail_bound": 0.0}, ValueError, "tail_bound must be a positive number, got 0.0"),
        ({"tail_bound": float("nan")}, ValueError, "tail_bound must be a positive number, got nan"),
        ({"tail_bound": float("inf")}, ValueError, "tail_bound must be a positive number, got inf"),
        ({"min_bin_width": 0.2}, ValueError, r"min_bin_width must be positive and at most 1 / bins \(0.125\), got 0.2"),
        (
            {"min_bin_height": 0.2},
            ValueError,
            r"min_bin_height must be positive and at most 1 / bins \(0.125\), got 0.2",
        ),
        ({"min_bin_width": 0.0}, ValueError, "min_bin_width must be positive"),
        ({"min_derivative": 0.0}, ValueError, "min_derivative must be positive, got 0.0"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        call(**arguments)


def test_right_arguments_are_not_refused():
    call()
    call(derivatives=8, tails="circular")
    call(derivatives=9, tails=None, min_bin_width=0.125)
