"""cumax against arithmetic of 80 bits where tests/ops/test_cumax.py does not look: every type, both directions, long
rows' gradients, masked elements', derivatives at lengths that no vector divides, more rows than a side of a grid."""

import math

import numpy as np
import pytest
import torch

from harness import INTERPRETED
from pygen import ops
from pygen.triton_kernels import _common

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes minutes; tests/triton_kernels has its own")

INF = math.inf
LENGTHS = [1, 2, 17, 1000, 4099, 2**17, 2**20]
# Units in the last place. float32 and what is rounded from it sum in float64: half a unit for 16 bits, and what float32
# adds before. float64 sums in itself, in blocks: test_cumax.py allows 4 as well, of which eager sums are far.
ULPS = {torch.float64: 4, torch.float32: 2, torch.bfloat16: 0.51, torch.float16: 0.51}
both = pytest.mark.parametrize("complement", [False, True], ids=["cumax", "complement"])


def rows(n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 if n > 10**5 else 3, n, generator=generator, dtype=torch.float64) * 3
    return x.to(dtype).to(device)


def wide(x):
    return x.detach().cpu().double().numpy().astype(np.longdouble)


def softmax(x):
    e = np.exp(wide(x) - wide(x).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def before_or_after(g, complement):
    """G of the derivative: sums of the gradients that an element's probability reaches."""
    if complement:
        return np.cumsum(g, -1) - g
    return np.cumsum(g[..., ::-1], -1)[..., ::-1]


def true_cumax(x, complement):
    p = softmax(x)
    if not complement:
        return np.cumsum(p, -1)
    sums = np.zeros_like(p)
    sums[..., :-1] = np.cumsum(p[..., :0:-1], -1)[..., ::-1]
    return sums


def unit(values, dtype):
    """One unit in the last place of `values` in `dtype`; of the smallest normal number below that."""
    info = torch.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(values), info.tiny))[1] - 1
    return np.ldexp(np.longdouble(info.eps), exponent)


def kernels_only(backend):
    if backend == "reference":
        pytest.skip("the plain formulas sum in the type itself, which is what the kernels avoid")


@both
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", ULPS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_element_is_within_its_units_of_the_exact_one_from_length_1_to_a_million(
    dtype, n, complement, backend, backend_device
):
    kernels_only(backend)
    x = rows(n, dtype, backend_device)
    want = true_cumax(x, complement)
    error = np.abs(wide(ops.cumax(x, complement=complement)) - want)
    # Where the exact complement is 0 so is the kernel's: 0 <= 0.
    assert (error <= ULPS[dtype] * unit(want, dtype) * (want != 0)).all(), (error / unit(want, dtype)).max()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_elements_leave_the_others_exact_in_both_directions(dtype, complement, backend, backend_device):
    kernels_only(backend)
    x = rows(333, dtype, backend_device)
    x[:, [0, 1, 100, 101, 102, 332]] = -INF
    x[0, :300] = -INF  # a long plateau at an end
    want = true_cumax(x, complement)
    y = ops.cumax(x, complement=complement)
    assert (np.abs(wide(y) - want) <= ULPS[dtype] * unit(want, dtype)).all()
    assert (y[0, :300] == (1 if complement else 0)).all()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_elements_have_no_gradient_and_do_not_disturb_that_of_the_others(
    dtype, complement, backend, backend_device
):
    x = rows(77, dtype, backend_device)
    masked = torch.zeros(77, dtype=torch.bool)
    masked[[0, 5, 6, 7, 40, 76]] = True
    x[:, masked] = -INF
    weight = rows(77, dtype, backend_device, seed=1)

    def gradient(leaf, g):
        leaf = leaf.detach().requires_grad_()
        return torch.autograd.grad(ops.cumax(leaf, complement=complement), leaf, g)[0]

    found = gradient(x, weight)
    assert (found[:, masked] == 0).all() and found.isfinite().all()
    p, total = softmax(x), before_or_after(wide(weight), complement)
    want = p * (total - (p * total).sum(-1, keepdims=True))
    scale = float((p * np.abs(total).max()).max())
    assert np.abs(wide(found) - want).max() <= 4 * torch.finfo(dtype).eps * scale


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [4099, 2**17, 2**20])
def test_gradients_of_long_rows_keep_the_accuracy_of_their_sums(n, dtype, complement, backend, backend_device):
    kernels_only(backend)
    x = rows(n, dtype, backend_device).requires_grad_()
    weight = rows(n, dtype, backend_device, seed=1)
    (found,) = torch.autograd.grad(ops.cumax(x, complement=complement), x, weight)
    p, total = softmax(x), before_or_after(wide(weight), complement)
    want = p * (total - (p * total).sum(-1, keepdims=True))
    # p is right to a unit; G is a sum of n terms and the subtraction leaves what it was rounded to.
    scale = p * np.abs(total).max(-1, keepdims=True)
    allowed = 4 * torch.finfo(dtype).eps * scale * (1 if dtype == torch.float32 else math.log2(n))
    assert (np.abs(wide(found) - want) <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 63, 4099])
def test_cumax_and_its_complement_add_up_to_one_within_two_units(dtype, n, backend, backend_device):
    kernels_only(backend)
    x = rows(n, dtype, backend_device)
    total = ops.cumax(x) + ops.cumax(x, complement=True)
    assert (total - 1).abs().max() <= 2 * torch.finfo(dtype).eps


@both
@pytest.mark.parametrize("shape_and_dim", [((2, 17), 1), ((9, 3), 0), ((1, 1), 1), ((2, 33), -1)], ids=str)
def test_full_gradcheck_and_gradgradcheck_at_lengths_that_no_vector_divides(shape_and_dim, complement, backend_device):
    """The common contract checks one random direction of rows of 5; here every entry of both Jacobians."""
    shape, dim = shape_and_dim
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(backend_device)
    x.requires_grad_()

    def function(v):
        return ops.cumax(v, dim, complement=complement)

    assert torch.autograd.gradcheck(function, x)
    if x.numel() < 40:  # n^3 entries
        assert torch.autograd.gradgradcheck(function, x)


def test_second_derivatives_with_masked_elements_are_finite_and_zero_there(backend_device):
    x = torch.randn(2, 9, dtype=torch.float64, device=backend_device)
    x[:, [0, 4, 8]] = -INF
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.cumax(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all() and (second[:, [0, 4, 8]] == 0).all() and (second[:, 1:4] != 0).all()


@both
@pytest.mark.parametrize(("shape", "dim"), [((70_001, 3), 1), ((3, 70_001), 0), ((2, 5, 70_001), 1)])
def test_more_rows_than_a_side_of_a_grid_are_all_done(shape, dim, complement, backend_device, poisoned_memory):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backend_device).requires_grad_()
    y = ops.cumax(x, dim, complement=complement)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    leaf = x.detach().cpu().double().requires_grad_()
    p = leaf.softmax(dim)
    want = p.flip(dim).cumsum(dim).flip(dim) - p if complement else p.cumsum(dim)
    (want_grad,) = torch.autograd.grad(want.square().sum(), leaf)
    torch.testing.assert_close(y.detach().cpu().double(), want.detach(), rtol=0, atol=3e-7)
    # A gradient is p times the difference of sums of up to n terms, each 2 at most: of size 2 n, rounded a few times.
    torch.testing.assert_close(grad.cpu().double(), want_grad, rtol=0, atol=4 * 2 * shape[dim] * 2**-23)


@pytest.mark.parametrize(("shape", "dim"), [((70_001, 3), 1), ((3, 70_001), 0), ((70_001, 2, 70_001), 1)])
def test_rows_are_counted_along_the_first_side_of_the_grid_which_has_room_for_two_billion(shape, dim, monkeypatch):
    kernels = pytest.importorskip("pygen.triton_kernels.cumax")
    launches = []
    monkeypatch.setattr(_common, "launch", lambda kernel, programs, *_, **__: launches.append(programs))
    x = torch.empty(shape, device="meta")
    kernels.cumax(x, dim, False)
    kernels.cumax_backward(x, x, dim, True)
    # `_common.launch` has no other side than this one.
    assert len(launches) == 2 and all(0 < programs < 2**31 for programs in launches)
