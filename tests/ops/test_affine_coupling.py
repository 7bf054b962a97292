"""Affine and additive coupling beyond the common contract: log-determinants, overflow, views of one tensor, errors."""

import math

import mpmath
import pytest
import torch

from harness import INTERPRETED, ordinary_levels
from ops.cases import true_scale
from pygen import backends, ops, reference

MAPS = reference.SCALE_MAPS
LEVELS = ordinary_levels()
on_each_level = pytest.mark.parametrize("level", LEVELS)
every_map = pytest.mark.parametrize("scale_map", MAPS)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the CPU kernels; Triton's own tests are in tests/triton_kernels")


# ---- the elementary functions, through the op ------------------------------------------------------------------------


def exact(scale_map, a):
    """s(a) and log s(a) in 50 digits."""
    a = mpmath.mpf(a)
    sigma = 1 / (1 + mpmath.exp(-(a + 2)))
    if scale_map == "exp":
        s = mpmath.exp(a)
    elif scale_map == "tanh":
        s = mpmath.exp(mpmath.tanh(a))
    elif scale_map == "sigmoid":
        s = sigma
    elif scale_map == "nflows":
        s = sigma + mpmath.mpf(1e-3)
    elif scale_map == "softplus":
        s = min(mpmath.log(1 + mpmath.exp(a)) + mpmath.mpf(1e-3), mpmath.mpf(3))
    else:
        s = mpmath.exp(2 * mpmath.mpf(0.636) * mpmath.atan(a))
    return s, mpmath.log(s)


@on_each_level
@every_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_scale_and_log_scale_are_accurate_to_a_few_roundings(level, scale_map, dtype):
    spread = torch.cat((torch.linspace(-12, 12, 97), torch.logspace(-7, 1, 30), -torch.logspace(-7, 1, 30)))
    a = spread.to(dtype)
    # One element a sample: y is s and log_det is log s.
    with backends.cpu_capability(level):
        y, log_det = ops.affine_coupling(torch.ones_like(a), a, torch.zeros_like(a), scale_map=scale_map)
    eps = torch.finfo(dtype).eps
    # The constants 0.001 and 0.636 are the dtype's own, and log s near s = 1 inherits s's rounding.
    with mpmath.workdps(50):
        for value, s, log_s in zip(a.tolist(), y.tolist(), log_det.tolist(), strict=True):
            true_s, true_log = exact(scale_map, value)
            assert abs(s - true_s) <= 4 * eps * true_s, (value, s)
            assert abs(log_s - true_log) <= 4 * eps * max(
                abs(true_log), 1 if scale_map in ("nflows", "softplus") else 0
            )


@on_each_level
@every_map
def test_large_raw_scales_overflow_to_infinity_in_their_own_sample_only(level, scale_map):
    a = torch.zeros(3, 8)
    a[1] = torch.tensor([1e4, -1e4, 88.0, -88.0, 120.0, -120.0, float("inf"), -float("inf")])
    x = torch.ones(3, 8, requires_grad=True)
    scale = a.requires_grad_()
    with backends.cpu_capability(level):
        y, log_det = ops.affine_coupling(x, scale, torch.zeros(3, 8), scale_map=scale_map)
        grads = torch.autograd.grad((y[[0, 2]].sum(), log_det[[0, 2]].sum()), (x, scale))
    assert not y.isnan().any()
    assert y[[0, 2]].isfinite().all() and log_det[[0, 2]].isfinite().all()
    assert all(g[[0, 2]].isfinite().all() for g in grads)
    expected = true_scale(a.detach()[1].double(), scale_map)
    torch.testing.assert_close(y.detach()[1].double(), expected.float().double(), rtol=1e-5, atol=1e-37)


# ---- what the transform is -------------------------------------------------------------------------------------------


@every_map
@pytest.mark.parametrize("shift_first", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_that_of_the_autograd_jacobian(scale_map, shift_first, inverse):
    x, a, t = torch.randn(3, 4, 5, dtype=torch.float64).unbind()

    def transform(row, i):
        options = {"scale_map": scale_map, "shift_first": shift_first, "inverse": inverse}
        return ops.affine_coupling(row[None], a[i : i + 1], t[i : i + 1], **options)[0][0]

    _, log_det = ops.affine_coupling(x, a, t, scale_map=scale_map, shift_first=shift_first, inverse=inverse)
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda row, i=i: transform(row, i), x[i])
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[i].item(), abs=1e-9)


@on_each_level
@every_map
@pytest.mark.parametrize("shift_first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 4e-2)],
    ids=["float64", "float32", "bfloat16"],
)
def test_the_inverse_inverts(level, scale_map, shift_first, dtype, tolerance):
    x, a, t = torch.randn(3, 6, 300, dtype=torch.float64).to(dtype).unbind()
    options = {"scale_map": scale_map, "shift_first": shift_first}
    with backends.cpu_capability(level):
        y, log_det = ops.affine_coupling(x, a, t, **options)
        back, inverse_log_det = ops.affine_coupling(y, a, t, inverse=True, **options)
    # A scale of e^-3 magnifies y's rounding twentyfold on the way back: compare where it does not.
    moderate = true_scale(a.double(), scale_map) > 0.2
    assert ((back - x).abs()[moderate] <= tolerance * (1 + (x.abs() + t.abs())[moderate])).all()
    assert torch.equal(log_det, -inverse_log_det)


@on_each_level
@pytest.mark.parametrize("shape", [(5, 8, 6, 4), (5, 8), (3, 2, 40, 50)])
def test_halves_and_interleaved_channels_of_one_tensor_equal_their_copies(level, shape):
    batch, channels, *space = shape
    packed = torch.randn(batch, 2 * channels, *space)
    x = torch.randn(shape)
    views = {
        "halves": packed.chunk(2, 1),
        "interleaved": (packed[:, 1::2], packed[:, 0::2]),
    }
    for scale, shift in views.values():
        with backends.cpu_capability(level):
            got = ops.affine_coupling(x, scale, shift, scale_map="sigmoid", shift_first=True)
            want = ops.affine_coupling(x, scale.contiguous(), shift.contiguous(), scale_map="sigmoid", shift_first=True)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@on_each_level
@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 700, 4096, 8191, 8192, 8193, 50_000])
def test_every_sample_is_its_own_whatever_its_size(level, size):
    """Sizes around those at which the work is cut: 512 elements a chunk, 8192 a block."""
    x, a, t = torch.randn(3, 5, size).unbind()
    with backends.cpu_capability(level):
        y, log_det = ops.affine_coupling(x, a, t)
        alone = [ops.affine_coupling(x[i : i + 1], a[i : i + 1], t[i : i + 1]) for i in range(5)]
    assert torch.equal(y, torch.cat([y for y, _ in alone]))
    assert torch.equal(log_det, torch.cat([log_det for _, log_det in alone]))
    torch.testing.assert_close(log_det.double(), a.double().sum(1), rtol=1e-6, atol=1e-5)


def test_log_det_of_16_bit_inputs_is_float32_and_does_not_saturate():
    a = torch.full((1, 100_000), 0.01, dtype=torch.bfloat16)
    _, log_det = ops.affine_coupling(a, a, a)
    assert log_det.dtype == torch.float32
    assert log_det.item() == pytest.approx(100_000 * a[0, 0].item(), rel=1e-6)


def test_scale_and_shift_broadcast_and_their_gradients_sum():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    scale = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(1, dtype=torch.float64, requires_grad=True)
    y, log_det = ops.affine_coupling(x, scale, shift)
    torch.testing.assert_close(y, x * scale.exp() + shift)
    torch.testing.assert_close(log_det, scale.sum().expand(4) * 5)
    assert torch.autograd.gradcheck(lambda a, t: ops.affine_coupling(x, a, t), (scale, shift))


def test_mixed_dtypes_are_promoted_as_torch_promotes():
    y, _ = ops.affine_coupling(torch.ones(2, 3), torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3).double())
    assert y.dtype == torch.float64


def test_atan_clamps_log_scale_at_the_given_bound():
    a = torch.tensor([[1e6, -1e6]], dtype=torch.float64)
    for clamp in (0.5, 2.0):
        y, _ = ops.affine_coupling(torch.ones_like(a), a, torch.zeros_like(a), scale_map="atan", clamp=clamp)
        bound = math.exp(clamp * 0.636 * math.pi / 2)
        torch.testing.assert_close(y, torch.tensor([[bound, 1 / bound]], dtype=torch.float64), rtol=1e-5, atol=0)


def test_softplus_has_no_gradient_where_nflows_clamps_it():
    a = torch.tensor([[2.0, 4.0]], requires_grad=True)
    y, log_det = ops.affine_coupling(torch.ones(1, 2), a, torch.zeros(1, 2), scale_map="softplus")
    (grad,) = torch.autograd.grad((y.sum() + log_det.sum()), a)
    assert y[0, 1] == 3 and grad[0, 1] == 0 and grad[0, 0] > 0


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: ops.affine_coupling(x, x, x, scale_map="cube"), (RuntimeError, ValueError), 'got "cube"'),
        (lambda x: ops.affine_coupling(x, x[:, :2], x), ValueError, r"scale must have x's shape .* got \(2, 2\)"),
        (lambda x: ops.affine_coupling(x.long(), x.long(), x.long()), RuntimeError, "floating point .* torch.int64"),
        (lambda x: ops.affine_coupling(x[0, 0], x[0, 0], x[0, 0]), RuntimeError, "batch dimension"),
        (lambda x: ops.affine_coupling([1.0], x, x), TypeError, "x must be a torch.Tensor, got list"),
        (lambda x: ops.additive_coupling(x, x[:, :2]), ValueError, r"shift must have x's shape .* got \(2, 2\)"),
        (lambda x: ops.additive_coupling(x.long(), x), TypeError, "x must be floating point, got torch.int64"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.randn(2, 3))


# ---- additive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_additive_coupling_adds_and_its_inverse_subtracts(dtype):
    x, t = torch.randn(2, 4, 7, dtype=torch.float64).to(dtype).unbind()
    assert torch.equal(ops.additive_coupling(x, t), x + t)
    assert torch.equal(ops.additive_coupling(x, t, inverse=True), x - t)


def test_additive_coupling_differentiates_twice():
    x, t = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradgradcheck(lambda x, t: ops.additive_coupling(x, t).square(), (x, t))


@pytest.mark.parametrize(
    ("scale_map", "largest"),
    [
        ("sigmoid", 1.0),
        ("nflows", 1.001),
        ("softplus", 3.0),
        ("tanh", math.e),
        ("atan", math.exp(2.0 * 0.636 * math.pi / 2)),
        ("exp", math.inf),
    ],
)
def test_the_largest_scale_is_the_choice_of_the_map_nflows_49(scale_map, largest, backend_device):
    """nflows' default cannot expand by more than 1.001; here that is one map of six, and the caller names it."""
    x, a = torch.tensor([[1.0], [1.0]], device=backend_device), torch.tensor([[1e5], [0.0]], device=backend_device)
    y, log_det = ops.affine_coupling(x, a, torch.zeros_like(x), scale_map=scale_map)
    assert y[0].item() == pytest.approx(largest, rel=1e-4)
    assert y[1].isfinite().all() and log_det[1].isfinite()
