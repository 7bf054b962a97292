"""The kernels' elementary functions against 80-bit (or wider) arithmetic."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from pygen.triton_kernels import _math  # noqa: E402

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@triton.jit
def evaluate(x_pointer, y_pointer, n, NAME: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_pointer + i, mask=i < n, other=1.0)
    if NAME == "exp":
        y = _math.exp(x, FAST)
    elif NAME == "expm1":
        _, y = _math.exp_and_expm1(x, FAST)
    elif NAME == "log":
        y = _math.log(x, FAST)
    elif NAME == "log1p":
        y = _math.log1p(x, FAST)
    elif NAME == "softplus":
        y = _math.softplus(x, FAST)
    elif NAME == "sigmoid":
        y, _, _ = _math.sigmoid_and_log(x, FAST)
    elif NAME == "log_sigmoid":
        _, _, y = _math.sigmoid_and_log(x, FAST)
    elif NAME == "tanh":
        y, _ = _math.tanh_and_slope(x, FAST)
    elif NAME == "tanh_slope":
        _, y = _math.tanh_and_slope(x, FAST)
    else:
        y = _math.atan(x)
    tl.store(y_pointer + i, y, mask=i < n)


def run(name, x, fast=False):
    y = torch.full_like(x, float("nan"))
    evaluate[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), name, fast, 1024)
    return y


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


EXACT = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "softplus": _softplus,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "log_sigmoid": lambda x: -_softplus(-x),
    "tanh": np.tanh,
    "tanh_slope": lambda x: 1 / np.cosh(x) ** 2,
    "atan": np.arctan,
}
# The range of arguments, as the kernels use the function.
RANGE = {"exp": (-87, 88), "expm1": (-87, 0), "log1p": (0, 1), "tanh_slope": (-40, 40)}


def arguments(name, dtype, device):
    torch.manual_seed(0)
    low, high = RANGE.get(name, (-50, 50))
    spread = torch.rand(3000, dtype=torch.float64) * (high - low) + low
    # As many near zero, over many magnitudes: where cancellation would show.
    small = torch.exp(torch.rand(1000, dtype=torch.float64) * -30) * (-1 if high == 0 else 1)
    x = torch.cat([spread, small]).to(dtype).to(device)
    return x.abs() + torch.finfo(dtype).tiny if name == "log" else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_function_is_within_four_units_in_the_last_place(name, dtype, device):
    x = arguments(name, dtype, device)
    y = run(name, x)
    exact = EXACT[name](x.cpu().numpy().astype(np.longdouble))
    error = np.abs(y.cpu().numpy().astype(np.longdouble) - exact) / np.abs(exact)
    assert error.max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", sorted(set(EXACT) - {"atan"}))
def test_fast_function_is_exact_to_half_a_float16_unit(name, device):
    x = arguments(name, torch.float32, device)
    y = run(name, x, fast=True)
    exact = EXACT[name](x.cpu().numpy().astype(np.longdouble))
    # log near 1 and expm1-like values keep an absolute accuracy of float32.
    error = np.abs(y.cpu().numpy().astype(np.longdouble) - exact) / np.maximum(np.abs(exact), 1e-3)
    assert error.max() < torch.finfo(torch.float16).eps / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_overflows_to_infinity_and_underflows_to_zero(dtype, device):
    x = torch.tensor([1e4, float("inf"), -1e4, -float("inf"), 0.0], dtype=dtype, device=device)
    assert run("exp", x).tolist() == [float("inf"), float("inf"), 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_nan(name, dtype, device):
    x = torch.tensor([float("nan")], dtype=dtype, device=device)
    assert run(name, x).isnan().all()


def test_exp_keeps_subnormal_results(device):
    x = torch.tensor([-88.0, -95.0, -103.0], device=device)
    exact = torch.tensor(np.exp(np.array([-88.0, -95.0, -103.0])), dtype=torch.float32)
    assert (run("exp", x).cpu() - exact).abs().max() <= 2**-149
