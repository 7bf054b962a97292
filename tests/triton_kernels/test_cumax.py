"""The Triton cumax launchers against the formulas in 80-bit (or wider) arithmetic."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pygen.triton_kernels import _common  # noqa: E402
from pygen.triton_kernels import cumax as kernels  # noqa: E402
from pygen.triton_kernels.cumax import cumax, cumax_backward  # noqa: E402

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device", "poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Units in the last place. float32 is promised 2. The 16-bit types are rounded once, bfloat16 by truncation under the
# interpreter. float64 sums in float64: 2e-14 for rows of some thousand.
FORWARD_ULPS = {torch.float32: 2, torch.float64: 90, torch.bfloat16: 1.02, torch.float16: 0.6}
# What p (float32, to half a unit) or the sums (float64; float32 for the 16-bit types) are computed to.
BACKWARD_SCALE = {torch.float32: 1e-7, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def wide(x):
    return x.detach().cpu().double().numpy().astype(np.longdouble)


def softmax(x, dim):
    p = np.exp(x - x.max(dim, keepdims=True))
    return p / p.sum(dim, keepdims=True)


def exact_cumax(x, dim, complement):
    p = softmax(wide(x), dim)
    if not complement:
        return p.cumsum(dim)
    suffix = np.flip(np.flip(p, dim).cumsum(dim), dim)
    result = np.roll(suffix, -1, dim)
    np.moveaxis(result, dim, 0)[-1] = 0
    return result


def exact_backward(grad, x, dim, complement):
    """(dx, p max|G|): the second is the scale of its rounding errors."""
    p, g = softmax(wide(x), dim), wide(grad)
    if complement:
        total = np.roll(g.cumsum(dim), 1, dim)
        np.moveaxis(total, dim, 0)[0] = 0
    else:
        total = np.flip(np.flip(g, dim).cumsum(dim), dim)
    return p * (total - (p * total).sum(dim, keepdims=True)), p * np.abs(total).max(dim, keepdims=True)


def ulp(exact, dtype):
    info = torch.finfo(dtype)
    exponent = np.frexp(np.abs(exact))[1] - 1
    return np.maximum(np.ldexp(np.longdouble(info.eps), exponent), info.tiny * info.eps)


def assert_cumax(x, dim, complement):
    y = cumax(x, dim, complement)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    exact = exact_cumax(x, dim, complement)
    assert (np.abs(wide(y) - exact) <= FORWARD_ULPS[x.dtype] * ulp(exact, x.dtype)).all()
    steps = y.float().diff(dim=dim)
    assert (steps <= 0).all() if complement else (steps >= 0).all()
    assert (y.select(dim, -1) == (0 if complement else 1)).all()


def assert_backward(grad, x, dim, complement):
    dx = cumax_backward(grad, x, dim, complement)
    assert dx.shape == x.shape and dx.dtype == x.dtype and dx.is_contiguous()
    exact, scale = exact_backward(grad, x, dim, complement)
    # The subtraction in G - sum p G cancels, and leaves what p and the sums were computed to.
    bound = 4 * ulp(exact, x.dtype) + BACKWARD_SCALE[x.dtype] * scale
    assert (np.abs(wide(dx) - exact) <= bound).all()


def sample(*shape, dtype, device, spread=5.0):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * spread
    return x.to(dtype).to(device)


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 1000, 4099])
def test_cumax_and_its_gradient_match_the_formulas(n, dtype, complement, device):
    x = sample(3, n, dtype=dtype, device=device)
    assert_cumax(x, 1, complement)
    assert_backward(sample(3, n, dtype=dtype, device=device).flip(1), x, -1, complement)


@pytest.mark.parametrize("complement", [False, True])
def test_float32_keeps_two_ulps_when_the_early_elements_are_tiny(complement, device):
    x = torch.linspace(-60, 60, 2000, device=device).reshape(1, -1)
    assert_cumax(x if not complement else x.flip(1), 1, complement)


LAYOUTS = {
    "transposed": lambda f: f(70, 33).t(),
    "every other element": lambda f: f(6, 130)[:, 1::2],
    "gates of a wider tensor": lambda f: f(5, 300)[:, 37:101],
    "expanded rows": lambda f: f(1, 33).expand(4, 33),
    "expanded elements": lambda f: f(4, 1).expand(4, 33),
    "permuted": lambda f: f(5, 4, 33).permute(1, 2, 0),
    "two outer dimensions": lambda f: f(4, 6, 5, 9)[::2, :, ::2],
    "five dimensions that do not merge": lambda f: f(4, 4, 4, 4, 9)[::2, ::2, ::2, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_a_bit(layout, device):
    def fresh(*shape):
        return sample(*shape, dtype=torch.float32, device=device)

    x = LAYOUTS[layout](fresh)
    for dim in (1, -1):
        assert torch.equal(cumax(x, dim, False), cumax(x.contiguous(), dim, False))
        plain = cumax_backward(x.contiguous().neg(), x.contiguous(), dim, True)
        assert torch.equal(cumax_backward(x.contiguous().neg(), x, dim, True), plain)
        assert torch.equal(cumax_backward(x.neg(), x.contiguous(), dim, True), plain)
    assert_cumax(x, 1, True)


def test_expanded_gradient_of_a_sum(device):
    x = sample(3, 40, dtype=torch.float32, device=device)
    assert_backward(torch.ones((), device=device).expand(3, 40), x, 1, False)


def test_usual_layouts_are_read_without_a_copy(device, monkeypatch):
    launches = []
    monkeypatch.setattr(_common, "recorder", launches)
    gates = sample(20, 64, dtype=torch.float32, device=device)
    for x, dim in ((gates[:, 16:48], 1), (gates.t(), 0), (gates.t(), 1), (gates.reshape(4, 5, 64)[:, ::2, 1::2], 2)):
        cumax(x, dim, False)
        assert launches.pop().args[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_row(dtype, complement, device):
    x = sample(1, 2**17, dtype=dtype, device=device)
    x[0, 1000:20000] = float("-inf")
    assert_cumax(x, 1, complement)
    assert_backward(sample(1, 2**17 + 1, dtype=dtype, device=device)[:, 1:], x, 1, complement)


@pytest.mark.parametrize("start", [float("-inf"), -80.0])
def test_long_row_whose_maximum_grows_in_every_block_keeps_two_ulps(start, device):
    x = torch.linspace(-30, 3, 2**16, device=device).reshape(1, -1)
    x[:, :9000] = start
    assert_cumax(x, 1, False)
    assert_backward(sample(1, 2**16, dtype=torch.float32, device=device), x, 1, True)


def test_long_columns(device):
    x = sample(2, 3000, 37, dtype=torch.float32, device=device)
    assert_cumax(x, 1, True)
    assert_backward(x.neg(), x, 1, False)


@pytest.mark.parametrize("n", [7, 9000])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("complement", [False, True])
def test_a_row_that_softmax_cannot_normalise_is_nan_and_its_neighbours_are_not(n, bad, complement, device):
    x = sample(3, n, dtype=torch.float32, device=device)
    if bad == "-inf":
        x[1] = float("-inf")
    else:
        x[1, n // 2] = float(bad)
    dx = cumax_backward(torch.ones_like(x), x, 1, complement)
    for result in (cumax(x, 1, complement), dx):
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("complement", [False, True])
def test_masked_elements_have_no_mass_and_no_gradient(complement, device):
    x = sample(2, 12, dtype=torch.float32, device=device)
    x[:, [0, 1, 5, 11]] = float("-inf")
    assert_cumax(x, 1, complement)
    dx = cumax_backward(torch.randn(2, 12, device=device), x, 1, complement)
    assert (dx[:, [0, 1, 5, 11]] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty_tensors(shape, device):
    x = torch.zeros(shape, device=device)
    for dim in range(len(shape)):
        assert cumax(x, dim, False).shape == shape
        assert cumax_backward(x, x, dim, True).shape == shape


def test_a_scalar_is_a_row_of_one(device):
    x = torch.tensor(-3.0, device=device)
    assert cumax(x, 0, False) == 1 and cumax(x, -1, True) == 0
    assert cumax_backward(torch.ones_like(x), x, 0, False) == 0


def test_complement_keeps_relative_accuracy_where_subtraction_loses_it(device):
    x = torch.zeros(1, 30, device=device)
    x[0, 0] = 25
    y = cumax(x, 1, True)
    exact = exact_cumax(x, 1, True)
    assert (np.abs(wide(y) - exact)[0, :-1] <= 2.0**-22 * exact[0, :-1]).all()


def test_dim_out_of_range_is_named(device):
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\], got 2"):
        cumax(x, 2, False)
    with pytest.raises(IndexError, match="dim must be in"):
        cumax_backward(x, x, -3, False)


def test_rows_more_than_2_to_31_elements_apart(device):
    if device != "cpu":
        pytest.skip("the buffer is address space without memory, which CUDA does not lend")
    buffer = torch.from_numpy(np.zeros(2**31 + 24, dtype=np.float16))
    x = buffer.as_strided((2, 9), (2**31 + 8, 1))
    x.copy_(sample(2, 9, dtype=torch.float16, device=device))
    assert torch.equal(cumax(x, 1, False), cumax(x.contiguous(), 1, False))
    assert torch.equal(cumax_backward(x, x, 1, True), cumax_backward(x.contiguous(), x.contiguous(), 1, True))


@triton.jit
def _cumulate_kernel(s_pointer, y_pointer, n, COMPLEMENT: tl.constexpr, N: tl.constexpr):
    k = tl.arange(0, N)
    s = tl.load(s_pointer + k)[None, :]
    total = tl.zeros_like(s) + 1.0
    y = kernels._cumulate(s, total, k, n, COMPLEMENT, True, tl.float32)
    tl.store(y_pointer + k[None, :], y)


@pytest.mark.parametrize("complement", [False, True])
def test_sums_that_a_tree_scan_rounds_out_of_order_are_put_in_order(complement, device):
    s = torch.tensor([0.1, 0.3, 0.2999999, 0.5, 0.4999999, 0.9, 1.0000001, 1.0], dtype=torch.float64, device=device)
    y = torch.zeros(8, device=device)
    _cumulate_kernel[(1,)](s.flip(0).contiguous() if complement else s, y, 8, complement, 8)
    expected = torch.tensor([0.1, 0.3, 0.3, 0.5, 0.5, 0.9, 1.0, 1.0])
    assert torch.equal(y.cpu(), expected.flip(0) if complement else expected)


@pytest.mark.parametrize("complement", [False, True])
def test_running_maximum_changes_nothing_that_is_in_order(complement, device, monkeypatch):
    x = sample(3, 50, dtype=torch.float32, device=device)
    plain = cumax(x, 1, complement)
    monkeypatch.setattr(kernels, "monotone_by_maximum", True)
    assert torch.equal(cumax(x, 1, complement), plain)
