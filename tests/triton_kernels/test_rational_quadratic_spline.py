"""The Triton spline launchers against the plain formulas in float64, on every layout, and on the inputs that hurt."""

import itertools

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pygen import reference  # noqa: E402
from pygen.triton_kernels import _common, _math  # noqa: E402
from pygen.triton_kernels.rational_quadratic_spline import (  # noqa: E402
    BLOCK,
    rational_quadratic_spline,
    rational_quadratic_spline_backward,
)

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device", "poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

BOUND = 1.7
SMALLEST = (2e-3, 5e-3, 1e-2)
TAILS = ("linear", "circular", "none")
MODES = list(itertools.product(TAILS, (False, True)))
every_mode = pytest.mark.parametrize(("tails", "inverse"), MODES)
single_and_double = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
INFINITY = float("inf")


def options(tails="linear", inverse=False, bound=BOUND, smallest=SMALLEST):
    return inverse, tails, bound, *smallest


def inputs(shape, bins, tails="linear", dtype=torch.float32, device="cpu", spread=0.7, seed=0):
    """(x, widths, heights, derivatives): an x in nine lies in the tails."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((), (bins,), (bins,), (bins - 1 + TAILS.index(tails),))
    draw = [torch.randn((*shape, *more), generator=generator, dtype=torch.float64) for more in sizes]
    return [t.to(dtype).to(device) for t in (1.1 * draw[0], *(spread * raw for raw in draw[1:]))]


def incoming(x, seed=1):
    """Gradients of y and of log_abs_det."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn((2, *x.shape), generator=generator, dtype=torch.float64)
    log_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return draw[0].to(x), draw[1].to(x.device, log_dtype)


def double(*tensors):
    return [None if t is None else t.cpu().double() for t in tensors]


def computed(tensors, grads, mode):
    return *rational_quadratic_spline(*tensors, *mode), *rational_quadratic_spline_backward(*grads, *tensors, *mode)


def truth(tensors, grads, mode):
    wide, wide_grads = double(*tensors), double(*grads)
    return (
        *reference.rational_quadratic_spline(*wide, *mode),
        *reference.rational_quadratic_spline_backward(*wide_grads, *wide, *mode),
    )


def moved_truth(tensors, grads, mode, eps, seed):
    """The truth of inputs that are each moved as far as one rounding at the bound's size moves a knot."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]
    moved = [t + eps * mode[2] * e for t, e in zip(double(*tensors), noise, strict=True)]
    # Not across a bound, where gradients jump.
    moved[0] = torch.where((moved[0].abs() > mode[2]) == (double(tensors[0])[0].abs() > mode[2]), moved[0], tensors[0])
    return truth(moved, grads, mode)


def assert_matches(tensors, grads, mode):
    """Errors by the norm: a few roundings of the result, and eight times what one rounding of the inputs does to it.

    A bin's width divides the rounding of its knots, so that no constant times epsilon judges all parameters. For
    float64 the truth is no better: twice that. The interpreter truncates to bfloat16, which costs one epsilon.
    """
    x = tensors[0]
    compute_eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    expected = truth(tensors, grads, mode)
    tries = [moved_truth(tensors, grads, mode, compute_eps, seed) for seed in range(3)]
    moves = [max((t - e).norm() for t in tried) for *tried, e in zip(*tries, expected, strict=True)]
    dtypes = [x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32, *(t.dtype for t in tensors)]
    shapes = [x.shape, x.shape, *(t.shape for t in tensors)]
    for i, got in enumerate(computed(tensors, grads, mode)):
        assert got.dtype == dtypes[i] and got.shape == shapes[i] and got.is_contiguous()
        times = 16 if x.dtype == torch.float64 else 8
        allowed = times * moves[i] + 4 * torch.finfo(got.dtype).eps * expected[i].norm()
        error = (got.cpu().double() - expected[i]).norm()
        # The slope of the identity (one bin, linear tails) is 1 to a rounding, and its logarithm zero.
        assert error <= allowed + 4 * compute_eps * got.numel() ** 0.5, f"output {i}: {error:.2e} > {allowed:.2e}"


# ---- values and gradients --------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("dtype", "bins"),
    [*((torch.float32, bins) for bins in (1, 2, 5, 8, 16)), (torch.float64, 8)],
)
def test_values_and_gradients_match_the_formulas(bins, dtype, tails, inverse, device):
    tensors = inputs((40,), bins, tails, dtype, device)
    assert_matches(tensors, incoming(tensors[0]), options(tails, inverse))


@every_mode
def test_16_bit_types_are_computed_in_float32(tails, inverse, device):
    tensors = inputs((40,), 8, tails, torch.float16 if inverse else torch.bfloat16, device)
    assert_matches(tensors, incoming(tensors[0]), options(tails, inverse))


@pytest.mark.parametrize(("bins", "dtype"), [(33, torch.float64), (100, torch.float32)])
def test_more_bins_than_a_thread_holds(bins, dtype, device):
    for tails, inverse in (("linear", False), ("none", True)):
        tensors = inputs((7,), bins, tails, dtype, device)
        assert_matches(tensors, incoming(tensors[0]), options(tails, inverse))


def test_more_bins_than_a_warp_holds(device):
    tensors = inputs((2,), 700, "circular", torch.float32, device)
    assert_matches(tensors, incoming(tensors[0]), options("circular", smallest=(1e-4, 1e-4, 1e-3)))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2 * BLOCK + 1,)])
def test_shapes(shape, device):
    tensors = inputs(shape, 3, "linear", torch.float32, device)
    assert_matches(tensors, incoming(tensors[0]), options())


def test_an_element_does_not_depend_on_the_others_nor_on_the_program_that_computes_it(device):
    tensors = inputs((BLOCK + 30,), 5, "circular", torch.float32, device)
    grads = incoming(tensors[0])
    mode = options("circular")
    together = computed(tensors, grads, mode)
    for part in (slice(0, 20), slice(BLOCK - 5, None)):
        alone = computed([t[part] for t in tensors], [g[part] for g in grads], mode)
        assert all(torch.equal(t[part], a) for t, a in zip(together, alone, strict=True))


@every_mode
def test_gradients_that_are_none_are_zero(tails, inverse, device):
    tensors = inputs((20,), 4, tails, torch.float64, device)
    mode = options(tails, inverse)
    for wanted in ((True, False), (False, True)):
        grads = [g if want else None for g, want in zip(incoming(tensors[0]), wanted, strict=True)]
        expected = reference.rational_quadratic_spline_backward(*double(*grads), *double(*tensors), *mode)
        for got, want in zip(rational_quadratic_spline_backward(*grads, *tensors, *mode), expected, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
def test_float64_keeps_options_that_float32_cannot_hold(inverse, device):
    third = 1 / 3
    tensors = inputs((40,), 6, "linear", torch.float64, device)
    assert_matches(tensors, incoming(tensors[0]), options("linear", inverse, 10 * third, (third / 7, third / 9, third)))


@pytest.mark.parametrize("bins", [8, 32])
def test_bins_are_as_large_as_softmax_says_when_they_differ_by_many_magnitudes(bins, device):
    """The sums of exponentials are integers, which a bin of e^-40 does not change; its own gradient keeps its bits."""
    x, widths, heights, derivatives = inputs((bins,), bins, "linear", torch.float32, device)
    widths[:] = torch.linspace(-40, 0, bins)
    tensors = torch.linspace(-BOUND, BOUND, bins, device=device), widths, heights, derivatives
    mode = options(smallest=(1e-2, 1e-2, 1e-2))
    got = rational_quadratic_spline_backward(None, torch.ones_like(x), *tensors, *mode)[1].cpu().double()
    ones = torch.ones(bins, dtype=torch.float64)
    want = reference.rational_quadratic_spline_backward(None, ones, *double(*tensors), *mode)[1]
    # Bin by bin: the rounding of x - max makes 40 of 24 bits.
    assert ((got - want).norm(dim=0) <= 1e-4 * want.norm(dim=0)).all()


# ---- layouts ---------------------------------------------------------------------------------------------------------


def packed(shape, counts, fresh):
    return fresh(*shape, sum(counts)).split(counts, -1)


def image(shape, counts, fresh):
    """(B, C, H, W): parameters are the conditioner's channels, feature-major."""
    batch, channels, *space = shape
    out = fresh(batch, channels * sum(counts), *space)
    return out.unflatten(1, (channels, sum(counts))).movedim(2, -1).split(counts, -1)


def separate(shape, counts, fresh):
    return [fresh(*shape, count) for count in counts]


def bins_first(shape, counts, fresh):
    return [fresh(count, *shape).movedim(0, -1) for count in counts]


def one_for_all_samples(shape, counts, fresh):
    return [fresh(1, *shape[1:], count).expand(*shape, count) for count in counts]


def one_for_all_bins(shape, counts, fresh):
    return [fresh(*shape, 1).expand(*shape, count) for count in counts]


def scattered(shape, counts, fresh):
    every_second = [slice(None, None, 2)] * len(shape)
    doubled = [2 * size for size in shape]
    return [fresh(*doubled, 3 * count)[(*every_second, slice(1, None, 3))] for count in counts]


LAYOUTS = [
    (packed, (6, 5)),
    (packed, (2, 3, 2, 2)),
    (image, (2, 3, 2, 4)),
    (separate, (6, 5)),
    (bins_first, (6, 5)),
    (one_for_all_samples, (3, 2, 4)),
    (one_for_all_bins, (6, 5)),
    (scattered, (2, 3, 4)),
    (scattered, (2, 2, 2, 3)),
]


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_strides_do_not_change_a_bit(layout, shape, device):
    bins = 5
    generator = torch.Generator().manual_seed(3)
    parameters = layout(shape, (bins, bins, bins - 1), lambda *s: torch.randn(s, generator=generator).to(device))
    x, *_ = inputs(shape, bins, device=device)
    mode = options("linear", inverse=len(shape) == 2)
    grads = incoming(x)
    plain = computed([x, *(p.contiguous() for p in parameters)], grads, mode)
    every_second = torch.stack((x, x), -1)[..., 0]
    columns = [g.mT.contiguous().mT for g in grads]
    strided = computed([every_second, *parameters], columns, mode)
    assert all(torch.equal(s, p) for s, p in zip(strided, plain, strict=True))


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS[:-1])
def test_usual_layouts_are_read_without_a_copy(layout, shape, device, monkeypatch):
    parameters = layout(shape, (5, 5, 4), lambda *s: torch.zeros(s, device=device))
    tensors = [torch.zeros(shape, device=device), *parameters]
    launches = []
    monkeypatch.setattr(_common, "recorder", launches)
    rational_quadratic_spline(*tensors, *options())
    rational_quadratic_spline_backward(tensors[0], None, *tensors, *options())
    forward, backward = launches
    assert [p.data_ptr() for p in forward.args[:4]] == [t.data_ptr() for t in tensors]
    assert [p.data_ptr() for p in backward.args[2:6]] == [t.data_ptr() for t in tensors]


def test_rows_and_bins_more_than_2_to_31_elements_apart(device):
    if device != "cpu":
        pytest.skip("the buffer is address space without memory, which CUDA does not lend")
    buffer = torch.from_numpy(np.zeros(2**32 + 24, dtype=np.float16))
    x, widths, heights, derivatives = inputs((2,), 3, "linear", torch.float16)
    far_rows = buffer.as_strided((2, 3), (2**31 + 8, 1))
    far_bins = buffer.as_strided((2, 3), (1, 2**31 + 8), 5)[:, :2]
    for far, near in ((far_rows, widths), (far_bins, derivatives)):
        far.copy_(near)
    strided, plain = (x, far_rows, heights, far_bins), (x, widths, heights, derivatives)
    grads = incoming(x)
    for got, want in zip(computed(strided, grads, options()), computed(plain, grads, options()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_tensors(shape, device):
    tensors = inputs(shape, 4, device=device)
    y, log_det, *grads = computed(tensors, (tensors[0], tensors[0]), options())
    assert y.shape == log_det.shape == shape
    assert [g.shape for g in grads] == [t.shape for t in tensors]


# ---- edges -----------------------------------------------------------------------------------------------------------


def awkward(tails, inverse, dtype, extreme):
    """A spline for each of: its knots, their neighbours, the bounds, the tails near and far."""
    _, *parameters = inputs((1,), 5, tails, dtype)
    if extreme:
        # -50 and 50 in every order that alternates: bins of the smallest size beside one that has all the rest.
        parameters = [50 * (-1.0) ** torch.arange(raw.size(-1), dtype=dtype)[None] for raw in parameters]
    share = parameters[1 if inverse else 0].double().softmax(-1)
    smallest = SMALLEST[1 if inverse else 0]
    knots = (2 * BOUND * (smallest + (1 - 5 * smallest) * share).cumsum(-1) - BOUND)[0, :-1].to(dtype)
    ends = torch.tensor([-BOUND, BOUND], dtype=dtype)
    at = torch.cat((knots, ends))
    around = [at, at.nextafter(at + 1), at.nextafter(at - 1)]
    far = torch.tensor([0.0, 1e-30, 3.0, -3.0, 1e20, -1e20], dtype=dtype)
    x = torch.cat((*around, far))
    return [x, *(raw.expand(len(x), -1).contiguous() for raw in parameters)]


@every_mode
@single_and_double
@pytest.mark.parametrize("extreme", [False, True], ids=["moderate", "extreme"])
def test_knots_bounds_and_tails_are_finite_with_finite_gradients(extreme, dtype, tails, inverse, device):
    tensors = [t.to(device) for t in awkward(tails, inverse, dtype, extreme)]
    results = computed(tensors, incoming(tensors[0]), options(tails, inverse))
    assert all(result.isfinite().all() for result in results)
    inside = tensors[0].abs() <= BOUND
    assert (results[0].abs() <= BOUND)[inside].all()


@every_mode
def test_the_ends_are_fixed_points_exactly(tails, inverse, device):
    for bins in (1, 7):
        tensors = inputs((40,), bins, tails, torch.float32, device)
        tensors[0] = torch.tensor([-BOUND, BOUND] * 20, device=device)
        y, log_det = rational_quadratic_spline(*tensors, *options(tails, inverse))
        assert torch.equal(y, tensors[0])
        if tails == "linear":
            assert (log_det == 0).all()


@every_mode
def test_infinity_lies_in_the_tails(tails, inverse, device):
    tensors = inputs((2,), 5, tails, torch.float32, device)
    tensors[0] = torch.tensor([-INFINITY, INFINITY], device=device)
    y, log_det = rational_quadratic_spline(*tensors, *options(tails, inverse))
    assert torch.equal(y, tensors[0]) and log_det.isfinite().all()


@pytest.mark.parametrize("tails", ["linear", "circular"])
@pytest.mark.parametrize("inverse", [False, True])
def test_tails_pass_values_and_gradients_unchanged(tails, inverse, device):
    tensors = inputs((4,), 5, tails, torch.float32, device)
    tensors[0] = torch.tensor([-INFINITY, -2.0, 1e30, INFINITY], device=device)
    grads = incoming(tensors[0])
    y, log_det, grad_x, *rest = computed(tensors, grads, options(tails, inverse))
    assert torch.equal(y, tensors[0]) and (log_det == 0).all()
    assert torch.equal(grad_x, grads[0])
    assert all((grad == 0).all() for grad in rest)


@every_mode
def test_nan_stays_in_its_own_element(tails, inverse, device):
    tensors = inputs((9,), 4, tails, torch.float32, device)
    tensors[0] = torch.linspace(-2, 2, 9, device=device)
    grads = incoming(tensors[0])
    clean = computed(tensors, grads, options(tails, inverse))
    # Inside the bounds, where every tensor counts.
    spoiled = torch.tensor([2, 4, 5, 6], device=device)
    for tensor, element in zip(tensors, spoiled, strict=True):
        tensor[element] = float("nan")
    results = computed(tensors, grads, options(tails, inverse))
    assert results[0][spoiled].isnan().all() and results[1][spoiled].isnan().all()
    others = torch.ones(9, dtype=torch.bool, device=device)
    others[spoiled] = False
    assert all(torch.equal(result[others], want[others]) for result, want in zip(results, clean, strict=True))


def test_sizes_that_softmax_cannot_normalise_are_nan_and_those_it_can_are_not(device):
    x, widths, heights, derivatives = inputs((4,), 4, "linear", torch.float32, device)
    x = torch.zeros_like(x)
    widths[0] = -INFINITY
    widths[1, 2] = INFINITY
    widths[2, 2] = -INFINITY
    y, _ = rational_quadratic_spline(x, widths, heights, derivatives, *options())
    assert y.isnan().tolist() == [True, True, False, False]


def test_unknown_tails_are_refused(device):
    tensors = inputs((2,), 3, device=device)
    with pytest.raises(ValueError, match='tails must be one of linear, circular, none, got "cubic"'):
        rational_quadratic_spline(*tensors, *options("cubic"))
    with pytest.raises(ValueError, match="tails must be one of"):
        rational_quadratic_spline_backward(None, None, *tensors, *options("cubic"))


# ---- the exponential that the softmax is made of ---------------------------------------------------------------------


@triton.jit
def _exp_kernel(x_pointer, y_pointer, FAST: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_pointer + i, _math.exp_of_negative(tl.load(x_pointer + i), FAST))


@single_and_double
def test_exponential_of_negative_numbers_is_within_two_units_in_the_last_place(dtype, device):
    lowest = -708 if dtype == torch.float64 else -87
    x = (torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * lowest).to(device, dtype)
    x[:5] = torch.tensor([0.0, -1e-9, float("nan"), -INFINITY, 20 * lowest])
    y = torch.full_like(x, float("nan"))
    _exp_kernel[(1,)](x, y, False, 4096)
    assert y[:5].tolist() == [1.0, 1.0 - 1e-9 if dtype == torch.float64 else 1.0, 0.0, 0.0, 0.0]
    exact = np.exp(x[5:].cpu().numpy().astype(np.longdouble))
    error = np.abs(y[5:].cpu().numpy().astype(np.longdouble) - exact) / exact
    assert error.max() < 2 * torch.finfo(dtype).eps
