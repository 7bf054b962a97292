"""cumax beyond the common contract: exactness, monotony, special values, long rows, the ends of the row."""

import numpy as np
import pytest
import torch

from harness import INTERPRETED, ordinary_levels
from pygen import backends, ops

LEVELS = ordinary_levels()
on_each_level = pytest.mark.parametrize("level", LEVELS)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the CPU kernels; Triton's own tests are in tests/triton_kernels")


def rows(n, count=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, n, generator=generator, dtype=torch.float64) * 3).to(dtype)


def truth(x, complement=False):
    """softmax and sums in 80-bit floats, so that float64 results can be judged as well."""
    wide = x.double().numpy().astype(np.longdouble)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    sums = np.cumsum(e[:, ::-1], -1)[:, ::-1] - e if complement else np.cumsum(e, -1)
    return sums / e.sum(-1, keepdims=True)


def ulps(got, want):
    """Error in units in the last place of the result, where it is a normal number."""
    size = np.abs(want).astype(np.float64)
    info = np.finfo(got.numpy().dtype)
    spacing = np.spacing(np.maximum(size, info.tiny).astype(got.numpy().dtype)).astype(np.longdouble)
    return (np.abs(got.numpy().astype(np.longdouble) - want) / spacing)[size > info.tiny].max()


@on_each_level
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 1000, 4099, 2**17, 2**20])
def test_float32_is_within_two_ulp_of_the_exact_result_at_any_length(level, n, complement):
    x = rows(n, count=1 if n > 10**5 else 4)
    with backends.cpu_capability(level):
        y = ops.cumax(x, complement=complement)
    want = truth(x, complement)
    if complement:  # the last element is exactly 0, which has no ulp
        assert (y[:, -1] == 0).all()
        y, want = y[:, :-1], want[:, :-1]
    if n > 1:
        assert ulps(y, want) <= 2


@on_each_level
@pytest.mark.parametrize("n", [2, 17, 1000, 4099, 2**17])
def test_float64_is_within_four_ulp_at_any_length(level, n):
    x = rows(n, dtype=torch.float64)
    with backends.cpu_capability(level):
        assert ulps(ops.cumax(x), truth(x)) <= 4


@on_each_level
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 7, 64, 1000, 100_001])
def test_rows_rise_to_exactly_one_and_complements_fall_to_exactly_zero(level, dtype, n):
    x = rows(n, dtype=dtype)
    x[0, ::3] = -float("inf")  # plateaus: e^-inf adds nothing
    x[0, 0] = 0
    with backends.cpu_capability(level):
        y, complement = ops.cumax(x), ops.cumax(x, complement=True)
    assert (y.diff(dim=-1) >= 0).all()
    assert (y[:, -1] == 1).all()
    assert (complement.diff(dim=-1) <= 0).all()
    assert (complement[:, -1] == 0).all()
    torch.testing.assert_close(y + complement, torch.ones_like(y))


@on_each_level
def test_the_complement_keeps_small_values_that_subtraction_would_lose(level):
    x = torch.tensor([[40.0, 0.0, -3.0]])
    with backends.cpu_capability(level):
        complement = ops.cumax(x, complement=True)
    assert complement[0, 0] == pytest.approx(float(truth(x, True)[0, 0]), rel=3e-7)
    assert (1 - ops.cumax(x))[0, 0] == 0


@on_each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e3, -1e3, 3e4, 1e6, -1e6, 1e30, -1e30])
def test_a_common_offset_changes_nothing_that_the_inputs_still_hold(level, dtype, offset):
    x = (rows(100, dtype=torch.float64) + offset).to(dtype)
    with backends.cpu_capability(level):
        y = ops.cumax(x)
    np.testing.assert_allclose(y.numpy(), truth(x).astype(np.float64), rtol=1e-6 if dtype == torch.float32 else 1e-13)


@on_each_level
@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_softmax_cannot_normalise_is_nan_and_its_neighbours_are_not(level, complement, bad):
    x = rows(37)
    x[1, 5] = bad
    x[2] = -float("inf")
    with backends.cpu_capability(level):
        y = ops.cumax(x, complement=complement)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(ops.cumax(leaf, complement=complement).sum(), leaf)
    expected = x.softmax(-1).isnan()
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(grad.isnan(), expected)
    assert expected[1:3].all() and not expected[[0, 3]].any()


@on_each_level
def test_single_minus_infinities_count_nothing(level):
    x = rows(50)
    x[:, 3:20] = -float("inf")
    with backends.cpu_capability(level):
        y = ops.cumax(x)
    assert ulps(y, truth(x)) <= 2
    assert (y[:, 3:20] == y[:, 2:3]).all()


def test_a_scalar_is_a_row_of_one():
    assert ops.cumax(torch.tensor(3.0)) == 1
    assert ops.cumax(torch.tensor(3.0), complement=True) == 0
    x = torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(ops.cumax(x), x)[0] == 0


@on_each_level
def test_more_dimensions_than_any_kernel_was_written_for(level):
    x = torch.randn(2, 1, 3, 2, 1, 2, 3, 2, 2, 5)
    with backends.cpu_capability(level):
        for dim in (0, 4, 6, -1):
            permuted = x.permute(9, 3, 1, 0, 2, 8, 7, 6, 5, 4)
            torch.testing.assert_close(ops.cumax(permuted, dim), permuted.softmax(dim).cumsum(dim))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.cumax(torch.arange(3)), RuntimeError, "cumax: x must be floating point .* got torch.int64"),
        (lambda: ops.cumax(torch.ones(2) * 1j), RuntimeError, "floating point .* got torch.complex64"),
        (
            lambda: ops.cumax(torch.ones(2, 3), 2),
            IndexError,
            r"dim must be in \[-2, 1\] for x of shape \(2, 3\), got 2",
        ),
        (lambda: ops.cumax([1.0]), TypeError, "cumax: expected a torch.Tensor, got list"),
        (
            lambda: torch.ops.pygen.cumax_backward(torch.ones(2), torch.ones(3), 0, False),
            RuntimeError,
            r"incoming gradient must have x's shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4096
    try:
        x = torch.zeros(n // 4096, 4096, dtype=torch.bfloat16)
        x[-1, 0] = 30
        y = ops.cumax(x)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        pytest.skip("not enough memory for 9 GB of tensors")
    assert torch.equal(y[-1], torch.ones(4096, dtype=torch.bfloat16))
    assert torch.equal(y[-2], ops.cumax(x[0]))
