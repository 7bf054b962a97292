"""The Triton affine coupling launchers against the maps' formulas in float64, and autograd through them."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from pygen.triton_kernels import _common  # noqa: E402
from pygen.triton_kernels.affine_coupling import (  # noqa: E402
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_halves,
    affine_coupling_halves_backward,
)

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device", "poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLAMP = 1.9
# s(a), from the papers and packages named in the op's docstring.
SCALE = {
    "exp": lambda a: a.exp(),
    "tanh": lambda a: a.tanh().exp(),
    "sigmoid": lambda a: torch.sigmoid(a + 2),
    "nflows": lambda a: torch.sigmoid(a + 2) + 1e-3,
    "softplus": lambda a: (F.softplus(a) + 1e-3).clamp(0, 3),
    "atan": lambda a: (CLAMP * 0.636 * a.atan()).exp(),
}
MAPS = list(SCALE)
# Relative to the terms of each sum. float32: the map and the products each round to a few units; the 16-bit types round
# the result once, bfloat16 by truncation under the interpreter.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def per_sample(terms):
    return terms.reshape(terms.size(0), -1).sum(1)


def exact(x, a, t, scale_map, shift_first, inverse):
    """(y, log_det, the size of y's terms), differentiable, of float64 inputs."""
    s = SCALE[scale_map](a)
    log_det = per_sample(s.log())
    if inverse:
        y = x / s - t if shift_first else (x - t) / s
        size = x.abs() / s + (t.abs() if shift_first else t.abs() / s)
        return y, -log_det, size
    y = (x + t) * s if shift_first else x * s + t
    return y, log_det, x.abs() * s + (t.abs() * s if shift_first else t.abs())


def inputs(shape, dtype, device, spread=1.5):
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = torch.randn((4, *shape), dtype=torch.float64, generator=generator)
    tensors[1] *= spread
    log_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grad_log_det = torch.randn(shape[:1], dtype=torch.float64, generator=generator).to(log_dtype).to(device)
    return *tensors.to(dtype).to(device).unbind(), grad_log_det


def double(*tensors):
    return [t.detach().cpu().double() for t in tensors]


def assert_close(got, expected, size, tolerance):
    assert ((got.cpu().double() - expected).abs() <= tolerance * size + 1e-30).all()


def assert_forward(x, a, t, scale_map, shift_first, inverse):
    y, log_det = affine_coupling(x, a, t, scale_map, shift_first, CLAMP, inverse)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert log_det.shape == x.shape[:1]
    assert log_det.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    expected, expected_log_det, size = exact(*double(x, a, t), scale_map, shift_first, inverse)
    assert_close(y, expected, size, TOLERANCE[x.dtype])
    terms = per_sample(SCALE[scale_map](double(a)[0]).log().abs())
    assert_close(log_det, expected_log_det, terms, 1e-14 if x.dtype == torch.float64 else 1e-6)


def assert_backward(grad_y, grad_log_det, x, a, t, scale_map, shift_first, inverse):
    result = affine_coupling_backward(grad_y, grad_log_det, x, a, t, scale_map, shift_first, CLAMP, inverse)
    wide = [tensor.requires_grad_() for tensor in double(x, a, t)]
    y, log_det, size = exact(*wide, scale_map, shift_first, inverse)
    zero = y.detach() * 0
    g = zero if grad_y is None else double(grad_y)[0]
    g_log_det = log_det.detach() * 0 if grad_log_det is None else double(grad_log_det)[0]
    expected = torch.autograd.grad((y, log_det), wide[:2], (g, g_log_det))
    s = SCALE[scale_map](wide[1]).detach()
    grad_x_size = g.abs() / s if inverse else g.abs() * s
    # |d log s / da| <= 1 for these maps, but for atan's CLAMP * 0.636.
    grad_a_size = CLAMP * (g.abs() * size.detach() + g_log_det.abs().reshape(-1, *[1] * (x.dim() - 1)))
    for got, want, scale in zip(result, expected, (grad_x_size, grad_a_size), strict=True):
        assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous()
        assert_close(got, want, scale, TOLERANCE[x.dtype])


def assert_matches(grad_y, grad_log_det, x, a, t, *options):
    assert_forward(x, a, t, *options)
    assert_backward(grad_y, grad_log_det, x, a, t, *options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale_map", "inverse"), list(itertools.product(MAPS, (False, True))))
def test_values_and_gradients_match_the_formulas(scale_map, inverse, dtype, device):
    x, a, t, g, grad_log_det = inputs((3, 63), dtype, device)
    for shift_first in (False, True):
        assert_matches(g, grad_log_det, x, a, t, scale_map, shift_first, inverse)


@pytest.mark.parametrize("shape", [(1, 1), (5,), (7, 1000), (2, 4099), (600, 3), (2, 3, 5, 7)])
def test_shapes(shape, device):
    x, a, t, g, grad_log_det = inputs(shape, torch.float32, device)
    assert_matches(g, grad_log_det, x, a, t, "tanh", False, False)


def test_float64_keeps_a_clamp_that_float32_cannot_hold(device):
    x, a, t, _, _ = inputs((2, 40), torch.float64, device, spread=8)
    assert_forward(x, a, t, "atan", False, False)


def halves(shape, fresh):
    batch, channels, *rest = shape
    return fresh(batch, 2 * channels, *rest).chunk(2, 1)


def interleaved(shape, fresh):
    batch, channels, *rest = shape
    both = fresh(batch, 2 * channels, *rest)
    return both[:, 1::2], both[:, 0::2]


def channels_last(shape, fresh):
    batch, channels, height, width = shape
    return [fresh(batch, height, width, channels).permute(0, 3, 1, 2) for _ in range(2)]


def one_for_all_samples(shape, fresh):
    return [fresh(1, *shape[1:]).expand(shape) for _ in range(2)]


def one_per_channel(shape, fresh):
    return [fresh(1, shape[1], 1, 1).expand(shape) for _ in range(2)]


def scattered(shape, fresh):
    doubled = [2 * size for size in shape]
    return [fresh(*doubled)[tuple(slice(None, None, 2) for _ in shape)] for _ in range(2)]


LAYOUTS = [
    (halves, (3, 12)),
    (halves, (3, 4, 5, 6)),
    (interleaved, (3, 12)),
    (interleaved, (3, 4, 5, 6)),
    (channels_last, (2, 3, 4, 5)),
    (one_for_all_samples, (3, 4, 5, 6)),
    (one_per_channel, (3, 4, 5, 6)),
    (scattered, (2, 3, 4, 5)),
    (scattered, (2, 3, 2, 3, 5)),
]


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_layouts(layout, shape, device):
    x, _, _, g, grad_log_det = inputs(shape, torch.float32, device)
    generator = torch.Generator().manual_seed(1)
    a, t = layout(shape, lambda *size: torch.randn(size, generator=generator).to(device))
    assert_matches(g, grad_log_det, x, a, t, "sigmoid", True, False)
    # The same layout for what is transformed and for the incoming gradient.
    assert_matches(t, grad_log_det, a, x, g, "sigmoid", False, True)


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS[:-1])
def test_usual_layouts_are_read_without_a_copy(layout, shape, device, monkeypatch):
    a, t = layout(shape, lambda *size: torch.zeros(size, device=device))
    x = torch.zeros(shape, device=device)
    launches = []
    monkeypatch.setattr(_common, "recorder", launches)
    affine_coupling(x, a, t, "exp", False, 2.0, False)
    assert [p.data_ptr() for p in launches[0].args[:3]] == [p.data_ptr() for p in (x, a, t)]


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_that_are_none_are_zero(inverse, device):
    x, a, t, g, grad_log_det = inputs((3, 20), torch.float32, device)
    for grads in ((g, None), (None, grad_log_det), (None, None)):
        assert_backward(*grads, x, a, t, "softplus", False, inverse)


def test_expanded_gradients_of_sums(device):
    x, a, t, _, _ = inputs((3, 20), torch.float32, device)
    one = torch.ones((), device=device)
    assert_backward(one.expand(3, 20), one.expand(3), x, a, t, "tanh", False, False)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_samples_and_batches(shape, device):
    x = torch.zeros(shape, device=device)
    y, log_det = affine_coupling(x, x, x, "tanh", False, 2.0, False)
    assert y.shape == shape and torch.equal(log_det, torch.zeros(shape[0], device=device))
    grads = affine_coupling_backward(x, log_det, x, x, x, "tanh", False, 2.0, False)
    assert [g.shape for g in grads] == [shape, shape]


def test_log_sigmoid_does_not_saturate(device):
    a = torch.tensor([[-90.0], [12.0]], device=device)
    _, log_det = affine_coupling(torch.ones_like(a), a, torch.zeros_like(a), "sigmoid", False, 2.0, False)
    expected = torch.tensor([-math.log1p(math.exp(88.0)), -math.log1p(math.exp(-14.0))])
    torch.testing.assert_close(log_det.cpu(), expected, rtol=1e-6, atol=0)


def test_overflow_is_infinite_and_stays_in_its_sample(device):
    x, a, t, g, grad_log_det = inputs((3, 8), torch.float32, device)
    a[1, 3] = 1000
    y, log_det = affine_coupling(x, a, t, "exp", False, 2.0, False)
    assert y[1, 3].isinf() and log_det.isfinite().all()
    grads = affine_coupling_backward(g, grad_log_det, x, a, t, "exp", False, 2.0, False)
    for result in (y, *grads):
        elsewhere = torch.ones_like(a, dtype=torch.bool)
        elsewhere[1, 3] = False
        assert result[elsewhere].isfinite().all()


@pytest.mark.parametrize("scale_map", MAPS)
def test_nan_stays_in_its_element_and_its_log_det(scale_map, device):
    x, a, t, _, _ = inputs((3, 8), torch.float32, device)
    a[1, 3] = float("nan")
    y, log_det = affine_coupling(x, a, t, scale_map, False, 2.0, False)
    assert torch.equal(y.isnan(), a.isnan())
    assert log_det.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("scale_map", MAPS)
def test_inverse_undoes_the_transform(scale_map, device):
    x, a, t, _, _ = inputs((4, 100), torch.float64, device)
    for shift_first in (False, True):
        y, log_det = affine_coupling(x, a, t, scale_map, shift_first, CLAMP, False)
        back, opposite = affine_coupling(y, a, t, scale_map, shift_first, CLAMP, True)
        torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
        assert torch.equal(opposite, -log_det)


def test_samples_more_than_2_to_31_elements_apart(device):
    if device != "cpu":
        pytest.skip("the buffer is address space without memory, which CUDA does not lend")
    buffer = torch.from_numpy(np.zeros(2**31 + 24, dtype=np.float16))
    x = buffer.as_strided((2, 9), (2**31 + 8, 1))
    x.copy_(torch.linspace(-1, 1, 18).reshape(2, 9))
    y, log_det = affine_coupling(x, x, x, "exp", False, 2.0, False)
    plain = x.contiguous()
    expected, expected_log_det = affine_coupling(plain, plain, plain, "exp", False, 2.0, False)
    assert torch.equal(y, expected) and torch.equal(log_det, expected_log_det)


def test_unknown_map_and_missing_batch_are_refused(device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(RuntimeError, match='scale_map must be one of exp, tanh.*got "cosh"'):
        affine_coupling(x, x, x, "cosh", False, 2.0, False)
    with pytest.raises(RuntimeError, match="at least one dimension"):
        affine_coupling(x[0, 0], x[0, 0], x[0, 0], "exp", False, 2.0, False)


# ---- by halves -------------------------------------------------------------------------------------------------------


def parts(x, dim, swap):
    first, second = x.split((x.size(dim) - x.size(dim) // 2, x.size(dim) // 2), dim)
    return (second, first) if swap else (first, second)


def joined(passive, active, dim, swap):
    return torch.cat((active, passive) if swap else (passive, active), dim)


def halves_inputs(shape, dim, swap, dtype, device):
    """x, the parameters of its active half, and gradients of z and log_det."""
    x, a, t, g, grad_log_det = inputs(shape, dtype, device)
    return x, torch.cat([parts(p, dim, swap)[1] for p in (a, t)], dim), g, grad_log_det


def assert_halves_match_the_parts(x, parameters, g, grad_log_det, dim, swap, *options):
    """Forward and backward with the bits of the launchers for parts, and the shift's gradient by autograd's formula."""
    passive, active = parts(x, dim, swap)
    scale, shift = parameters.chunk(2, dim)
    z, log_det = affine_coupling_halves(x, parameters, dim, swap, *options)
    y, expected_log_det = affine_coupling(active, scale, shift, *options)
    assert z.is_contiguous() and torch.equal(z, joined(passive, y, dim, swap))
    assert torch.equal(log_det, expected_log_det)
    grad_x, grad_parameters = affine_coupling_halves_backward(g, grad_log_det, x, parameters, dim, swap, *options)
    passive_grad, grad_y = (None, None) if g is None else parts(g, dim, swap)
    grad_active, grad_scale = affine_coupling_backward(grad_y, grad_log_det, active, scale, shift, *options)
    _, shift_first, _, inverse = options
    grad_shift = torch.zeros_like(shift)
    if g is None:
        passive_grad = torch.zeros_like(passive)
    else:
        grad_shift = (-1 if inverse else 1) * (grad_active if shift_first != inverse else grad_y)
    assert grad_x.is_contiguous() and torch.equal(grad_x, joined(passive_grad, grad_active, dim, swap))
    assert grad_parameters.is_contiguous() and torch.equal(grad_parameters, torch.cat((grad_scale, grad_shift), dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shift_first", "inverse"), list(itertools.product((False, True), repeat=2)))
def test_halves_have_the_bits_of_their_parts(shift_first, inverse, dtype, device):
    for swap in (False, True):
        x, parameters, g, grad_log_det = halves_inputs((3, 5, 7), 1, swap, dtype, device)
        for grads in ((g, grad_log_det), (g, None), (None, grad_log_det)):
            assert_halves_match_the_parts(x, parameters, *grads, 1, swap, "tanh", shift_first, CLAMP, inverse)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 2), 1), ((300, 3), -1), ((2, 4099), 1), ((2, 3, 5), -1), ((2, 3, 4, 5), 2)]
)
def test_halves_of_every_dimension(shape, dim, device):
    x, parameters, g, grad_log_det = halves_inputs(shape, dim, False, torch.float32, device)
    for grads in ((g, grad_log_det), (None, grad_log_det)):
        assert_halves_match_the_parts(x, parameters, *grads, dim, False, "sigmoid", True, CLAMP, False)


def test_halves_of_tensors_with_strides(device):
    def strided(x):
        return x.movedim(0, -1).contiguous().movedim(-1, 0)

    given = halves_inputs((3, 4, 2, 5), 1, False, torch.float32, device)
    assert_halves_match_the_parts(*map(strided, given), 1, False, "exp", False, CLAMP, False)


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 1), ((0, 3, 4), -1), ((3, 4, 0), 1)])
def test_empty_halves(shape, dim, device):
    x = torch.zeros(shape, device=device)
    z, log_det = affine_coupling_halves(x, x, dim, False, "tanh", False, 2.0, False)
    assert z.shape == shape and torch.equal(log_det, torch.zeros(shape[0], device=device))
    grads = affine_coupling_halves_backward(x, log_det, x, x, dim, False, "tanh", False, 2.0, False)
    assert [g.shape for g in grads] == [shape, shape]


def test_one_launch_writes_the_active_halves_where_they_belong(device, monkeypatch):
    x = torch.zeros(3, 8, 4, device=device)
    launches = []
    monkeypatch.setattr(_common, "recorder", launches)
    z, _ = affine_coupling_halves(x, x, 1, False, "exp", False, 2.0, False)
    grad_x, grad_parameters = affine_coupling_halves_backward(x, None, x, x, 1, False, "exp", False, 2.0, False)
    forward, backward = (launch.args for launch in launches)
    assert forward[3].data_ptr() == z[:, 4:].data_ptr()
    results = [tensor.data_ptr() for tensor in (grad_x[:, 4:], grad_parameters, grad_parameters[:, 4:])]
    assert [tensor.data_ptr() for tensor in backward[5:8]] == results
