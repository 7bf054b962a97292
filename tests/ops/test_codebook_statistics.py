"""codebook_statistics on every kernel: counts that are exact, sums of one fixed order, gradients, masks, empty codes.

Not in cases.py: half of its results and arguments are integers. Layouts and tolerances are those of the contract there.
"""

import pytest
import torch

from harness import INTERPRETED
from ops.test_contract import LAYOUTS
from pygen import ops

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="traces with fake tensors, or too long for the interpreter")


def rows(n, d, k, dtype=torch.float32, device="cpu", left_out=True, seed=0):
    """x (N, D) and indices (N,), one in ten of them -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    indices = torch.randint(k, (n,), generator=generator)
    if left_out:
        indices[torch.rand(n, generator=generator) < 0.1] = -1
    return x.to(device, dtype), indices.to(device)


def truth(x, indices, k, mask=None):
    """Counts and float64 sums by one-hot products."""
    seen = indices.cpu() if mask is None else torch.where(mask.cpu(), indices.cpu(), -1)
    chosen = (seen.flatten()[:, None] == torch.arange(k)).double()
    return chosen.sum(0).long(), chosen.T @ x.detach().cpu().double().flatten(0, -2).nan_to_num()


def assert_right(x, indices, k, mask=None):
    counts, sums = ops.codebook_statistics(x, indices, k, mask=mask)
    want_counts, want_sums = truth(x, indices, k, mask)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert (counts.dtype, sums.dtype) == (torch.int64, dtype)
    assert torch.equal(counts.cpu(), want_counts)
    # Sums are kept in float64 and rounded once; float64's own order of summation differs from the product's.
    eps = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(sums.cpu().double(), want_sums, rtol=eps, atol=1e-12)
    return counts, sums


# ---- counts and sums -------------------------------------------------------------------------------------------------

SIZES = [(1, 1, 1), (7, 3, 5), (40, 20, 9)]
if not INTERPRETED:
    SIZES += [(100, 1, 1), (1000, 5, 3), (513, 17, 100), (3000, 64, 700), (20, 4096, 3), (4, 2, 5000)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_counts_are_exact_and_sums_those_of_float64_rounded_once(sizes, dtype, backend_device, poisoned_memory):
    n, d, k = sizes
    assert_right(*rows(n, d, k, dtype, backend_device), k)


def test_a_code_that_nobody_chose_has_count_and_sum_zero(backend_device, poisoned_memory):
    x, indices = rows(30, 8, 5, device=backend_device, left_out=False)
    counts, sums = assert_right(x, 3 * indices, 16)
    unused = torch.arange(16) % 3 != 0
    assert (counts[unused] == 0).all() and (sums[unused] == 0).all()


def test_all_rows_may_choose_one_code(backend_device):
    n = 200 if INTERPRETED else 20000
    x, indices = rows(n, 16, 1, device=backend_device, left_out=False)
    counts, _ = assert_right(x, indices + 6, 11)
    assert counts[6] == n


def test_a_sum_of_many_rows_loses_nothing_that_float64_holds(backend_device):
    """Added in float32, the ones beside a row of 2^24 would all vanish."""
    n = 100 if INTERPRETED else 4096
    x = torch.ones(n + 2, 2, device=backend_device)
    x[0], x[-1] = 2.0**24, -(2.0**24)
    _, sums = ops.codebook_statistics(x, torch.zeros(n + 2, dtype=torch.int64, device=backend_device), 1)
    assert (sums == n).all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (3, 1, 2, 2)], ids=str)
def test_rows_come_in_any_shape(shape, backend_device):
    n = torch.Size(shape).numel()
    x, indices = rows(n, 6, 4, device=backend_device)
    got = ops.codebook_statistics(x.view(*shape, 6), indices.view(shape), 4)
    assert all(torch.equal(a, b) for a, b in zip(got, ops.codebook_statistics(x, indices, 4), strict=True))


def test_masked_rows_and_those_of_minus_one_are_left_out_whatever_they_hold(backend_device):
    x, indices = rows(60, 5, 7, device=backend_device)
    mask = (torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.6).to(backend_device)
    x[~mask | (indices == -1)] = torch.nan
    counts, sums = assert_right(x, indices, 7, mask)
    assert counts.sum() == (mask & (indices >= 0)).sum() and sums.isfinite().all()
    counts, sums = ops.codebook_statistics(x, indices, 7, mask=torch.zeros_like(mask))
    assert (counts == 0).all() and (sums == 0).all()


def test_a_row_that_is_not_finite_spoils_its_own_code_only(backend_device):
    x, indices = rows(40, 5, 4, device=backend_device, left_out=False)
    x[11] = torch.nan
    _, sums = ops.codebook_statistics(x, indices, 4)
    spoilt = torch.arange(4, device=backend_device) == indices[11]
    assert sums[spoilt].isnan().all() and sums[~spoilt].isfinite().all()


@pytest.mark.parametrize(("n", "d", "k"), [(0, 3, 4), (5, 3, 0), (0, 0, 0), (5, 0, 4)])
def test_nothing_to_count_gives_zeros(n, d, k, backend_device, poisoned_memory):
    x = torch.zeros(n, d, device=backend_device)
    indices = torch.full((n,), 0 if k else -1, dtype=torch.int64, device=backend_device)
    counts, sums = ops.codebook_statistics(x, indices, k)
    assert counts.shape == (k,) and sums.shape == (k, d)
    assert counts.sum() == (n if k else 0) and (sums == 0).all()


# ---- the same bits ---------------------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("k", [1, 3, 100, 5000])
def test_sums_are_the_same_bits_at_one_and_two_threads_and_again(k, backend_device, two_threads):
    x, indices = rows(50_000, 9, k, device=backend_device)
    x *= 10 ** torch.linspace(-6, 6, len(x), device=backend_device)[:, None]  # where the order of a sum shows
    runs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        runs.append(ops.codebook_statistics(x, indices, k))
    assert all(torch.equal(got, want) for run in runs[1:] for got, want in zip(run, runs[0], strict=True))


def test_rows_of_other_codes_do_not_enter_a_sum(backend_device):
    """Differences of sums over sorted rows would lose ones beside rows of 1e30."""
    x, indices = rows(60 if INTERPRETED else 3000, 4, 7, device=backend_device, left_out=False)
    x = torch.where((indices % 2 == 0)[:, None], 1.0, 1e30 * x)
    counts, sums = ops.codebook_statistics(x, indices, 7)
    assert torch.equal(sums[::2], counts[::2, None].expand(4, 4).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_a_bit_and_no_input_is_modified(layout, backend_device):
    x, indices = rows(48, 5, 7, device=backend_device)
    change = LAYOUTS[layout]
    strided_x, strided = change(x.view(4, 12, 5)), torch.stack((indices, indices), -1)[:, 0].view(4, 12)
    copies = strided_x.clone(), strided.clone()
    got, want = ops.codebook_statistics(strided_x, strided, 7), ops.codebook_statistics(x, indices, 7)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.equal(strided_x, copies[0]) and torch.equal(strided, copies[1])


def test_expanded_rows_equal_their_copies(backend_device):
    x, indices = rows(1, 6, 4, device=backend_device, left_out=False)
    got = ops.codebook_statistics(x.expand(9, 6), indices.expand(9), 4)
    want = ops.codebook_statistics(x.repeat(9, 1), indices.repeat(9), 4)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- gradients and torch's transformations ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_gets_the_gradient_of_its_codes_sum(dtype, layout, backend_device):
    x, indices = rows(20, 6, 5, dtype, backend_device)
    mask = torch.arange(20, device=backend_device) % 4 != 0
    grad = LAYOUTS[layout](torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1)).to(backend_device))[0]
    x.requires_grad_()
    counts, sums = ops.codebook_statistics(x, indices, 5, mask=mask)
    assert not counts.requires_grad
    (got,) = torch.autograd.grad(sums, x, grad.to(sums))
    kept = (mask & (indices >= 0))[:, None]
    assert got.dtype == dtype and torch.equal(got, torch.where(kept, grad.to(sums)[indices], 0).to(dtype))


@not_interpreted
def test_gradcheck_and_gradgradcheck(backend_device):
    x, indices = rows(6, 3, 4, torch.float64, backend_device)
    x.requires_grad_()

    def squares(x):  # the sums alone are linear
        return ops.codebook_statistics(x, indices, 4)[1].square()

    assert torch.autograd.gradcheck(squares, x) and torch.autograd.gradgradcheck(squares, x)


@not_interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    x, indices = rows(12, 4, 5)
    mask = torch.arange(12) % 3 != 0 if masked else None
    torch.library.opcheck(torch.ops.pygen.codebook_statistics.default, (x.requires_grad_(), indices, 5, mask))


@not_interpreted
def test_compiles_into_one_graph_with_the_same_gradient(backend_device):
    x, indices = rows(30, 4, 5, device=backend_device)
    x.requires_grad_()

    def step(x, indices):
        counts, sums = ops.codebook_statistics(2 * x, indices, 5)
        return sums / counts.clamp_min(1)[:, None]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (30, 11):
        got, want = compiled(x[:n], indices[:n]), step(x[:n], indices[:n])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), x), torch.autograd.grad(want.square().sum(), x)
        )


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None), (1, 1)], ids=str)
def test_vmap_equals_a_loop(in_dims, backend_device):
    x, indices = rows(18, 4, 5, device=backend_device)
    inputs = [x.view(3, 6, 4), indices.view(3, 6)]
    inputs = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(inputs, in_dims, strict=True)]
    mask = torch.arange(6, device=backend_device) != 2
    counts, sums = torch.func.vmap(lambda x, i: ops.codebook_statistics(x, i, 5, mask=mask), in_dims)(*inputs)
    for row in range(3):
        one = [t if dim is None else t.select(dim, row) for t, dim in zip(inputs, in_dims, strict=True)]
        alone = ops.codebook_statistics(*one, 5, mask=mask)
        assert torch.equal(counts[row], alone[0]) and torch.equal(sums[row], alone[1])


def test_under_autocast_sums_are_float32_and_gradients_keep_their_dtype(backend_device):
    x, indices = rows(20, 4, 3, torch.bfloat16, backend_device)
    x.requires_grad_()
    with torch.autocast(backend_device.type, torch.bfloat16):
        counts, sums = ops.codebook_statistics(x, indices, 3)
    assert (counts.dtype, sums.dtype) == (torch.int64, torch.float32)
    assert torch.equal(sums, ops.codebook_statistics(x, indices, 3)[1])
    assert torch.autograd.grad(sums.sum(), x)[0].dtype == torch.bfloat16


def test_on_the_meta_device_shapes_and_dtypes_are_right():
    for dtype in FLOATS:
        x, indices = rows(6, 4, 5, dtype)
        real = ops.codebook_statistics(x, indices, 5)
        for got, want in zip(ops.codebook_statistics(x.to("meta"), indices.to("meta"), 5), real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_forward_mode_is_refused_not_silently_zero(backend_device):
    x, indices = rows(6, 4, 5, device=backend_device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            ops.codebook_statistics(dual, indices, 5)


# ---- errors ----------------------------------------------------------------------------------------------------------

X, INDICES = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("bad", [5, -2, 2**40, -(2**62)])
@pytest.mark.parametrize("n", [3, 5000])
def test_an_index_out_of_range_is_an_error_on_the_cpu(bad, n, backend_device):
    if backend_device.type == "cuda" or INTERPRETED:
        pytest.skip("a GPU leaves the row out")
    indices = torch.zeros(n, dtype=torch.int64)
    indices[n // 2] = bad
    with pytest.raises(RuntimeError, match=r"codebook_statistics: indices must be in \[-1, 4\], got .*"):
        ops.codebook_statistics(torch.zeros(n, 4), indices, 5)
    # Where the row is masked nobody reads it.
    ops.codebook_statistics(torch.zeros(n, 4), indices, 5, mask=indices == 0)


@not_interpreted
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.codebook_statistics([1.0], INDICES, 5), TypeError, "x and indices must be torch.Tensors"),
        (lambda: ops.codebook_statistics(X.long(), INDICES, 5), TypeError, "x must be floating point, got torch.int64"),
        (lambda: ops.codebook_statistics(X, INDICES.int(), 5), TypeError, "indices must be int64, got torch.int32"),
        (
            lambda: ops.codebook_statistics(X, INDICES[:2], 5),
            ValueError,
            r"indices must be .* got \(2,\) for x \(3, 4\)",
        ),
        (lambda: ops.codebook_statistics(X, INDICES, -1), ValueError, "num_codes must not be negative, got -1"),
        (lambda: ops.codebook_statistics(X, INDICES, 5, mask=INDICES), TypeError, "mask must be bool, got torch.int64"),
        (
            lambda: ops.codebook_statistics(X, INDICES, 5, mask=INDICES[:2] == 0),
            ValueError,
            r"mask must have the shape of indices, got \(2,\) for \(3,\)",
        ),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=f"codebook_statistics: .*{sentence}"):
        call()
