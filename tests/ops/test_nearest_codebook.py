"""nearest_codebook returns the float64 argmin on every kernel: zero differences on data that is made to cause some.

The op is not in cases.py: the contract there compares real numbers within a tolerance, and an index has none. What
torch does with the op is in test_nearest_codebook_torch.py.
"""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import INTERPRETED
from ops.codebook_data import (
    FEW_KINDS,
    FLOATS,
    KINDS,
    METRICS,
    brute_force,
    codebook_set,
    distance,
    dtypes_of,
    stepped,
)
from pygen import backends, ops, reference

on_cpu = pytest.mark.skipif(INTERPRETED, reason="of the CPU kernels, or too long for the interpreter")
# A search takes half a second in the interpreter, and longer with every code in doubt: few of them, and small ones.
# tests/triton_kernels has more, kernel by kernel.
SOME_KINDS = FEW_KINDS if INTERPRETED else tuple(KINDS)
SOME_METRICS = METRICS[:1] if INTERPRETED else METRICS
SIZES = ((7, 37, 10),) if INTERPRETED else ((40, 70, 24), (33, 47, 5), (50, 300, 64))
N, K, D = (5, 20, 10) if INTERPRETED else (30, 40, 24)
HAS_CPU_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("pygen::nearest_codebook", "CPU")
needs_cpu_kernel = pytest.mark.skipif(not HAS_CPU_KERNEL or INTERPRETED, reason="a claim about the CPU kernels")


def search(x, codebook, device="cpu", **options):
    """The public function on `device`, results on the CPU."""
    results = ops.nearest_codebook(x.to(device), codebook.to(device), **options)
    return tuple(y.cpu() for y in results) if isinstance(results, tuple) else results.cpu()


def definition(x, codebook, metric="euclidean"):
    """Indices by the reference, in the order of summation that all kernels share."""
    heads = codebook if codebook.dim() == 3 else codebook[None]
    rows = x.reshape(len(heads), -1, x.size(-1))
    return reference.nearest_codebook(rows, heads, metric, None, False, False)[1].view(x.shape[:-1])


@functools.cache
def known(kind, sizes, dtype, metric, seed=0):
    """(x, codebook, indices by definition, by brute force, whether that is certain): the same for all kernels."""
    x, codebook = codebook_set(kind, *sizes, dtype, seed)
    return x, codebook, definition(x, codebook, metric), *brute_force(x, codebook, metric)


def assert_exact(kind, sizes, dtype, metric, device, seed=0):
    x, codebook, defined, nearest, certain = known(kind, sizes, dtype, metric, seed)
    got = search(x, codebook, device, metric=metric)
    what = f"{kind}, {sizes}, {dtype}, {metric}"
    assert got.dtype == torch.int64
    assert torch.equal(got[certain], nearest[certain]), f"{what}: {(got != nearest)[certain].sum()} differences"
    assert torch.equal(got, defined), f"{what}: {(got != defined).sum()} differences from the definition"
    return certain


# ---- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", SOME_METRICS)
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_every_index_is_that_of_the_float64_brute_force(kind, metric, search_device):
    few = dtypes_of(kind)[1 : 3 if kind == "random" else 2]
    for dtype in few if INTERPRETED else dtypes_of(kind):
        for sizes in SIZES:
            certain = assert_exact(kind, sizes, dtype, metric, search_device)
            # The oracle is sure of every set that float64 decides: of a huge row all codes are as far, to rounding.
            if dtype != torch.float64 and metric == "euclidean":
                assert certain.sum() >= len(certain) - (kind == "one huge")


@pytest.mark.parametrize(
    "sizes",
    [(7, 5, 3), (3, 33, 40)]
    if INTERPRETED
    else [
        *((1, 1, 1), (1, 1, 70), (2, 1000, 1), (500, 3, 1), (65, 129, 2), (31, 33, 15), (64, 64, 16), (33, 257, 17)),
        *((100, 31, 31), (97, 1030, 32), (100, 65, 63), (130, 127, 65), (37, 511, 100), (20, 513, 129), (30, 100, 256)),
        *((17, 60, 1000), (5, 3, 4096), (9, 40, 4095), (1025, 16, 8)),
    ],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_no_size_needs_to_divide_anything(sizes, search_device):
    for kind in ("random", "duplicates", "opposite"):
        for metric in SOME_METRICS if kind == "opposite" else METRICS[:1]:
            for dtype in (torch.float32, torch.bfloat16)[: 1 if INTERPRETED else 2]:
                assert_exact(kind, sizes, dtype, metric, search_device)


@settings(
    max_examples=3 if INTERPRETED else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_kind_of_any_shape_and_dtype_is_exact(search_device, data):
    kind = data.draw(st.sampled_from(SOME_KINDS))
    largest = (9, 40, 20) if INTERPRETED else (150, 400, 130)
    sizes = tuple(data.draw(st.integers(1, size)) for size in largest)
    dtype, metric = data.draw(st.sampled_from(dtypes_of(kind))), data.draw(st.sampled_from(METRICS))
    assert_exact(kind, sizes, dtype, metric, search_device, seed=data.draw(st.integers(0, 10**6)))


def test_of_equal_codes_the_first_wins_wherever_they_stand(search_device):
    k, d = (70, 8) if INTERPRETED else (1100, 32)
    x, codebook = codebook_set("random", 1, k, d)
    pairs = [(0, k - 1), (31, 32), (7, 64), (0, 1), (15, 16), (63, 64), (k - 2, k - 1), (k // 2, k - 1)]
    for first, second in pairs[: 3 if INTERPRETED else None]:
        codes = codebook.clone()
        codes[first] = codes[second] = x[0]
        for metric in SOME_METRICS[:2]:
            assert search(x, codes, search_device, metric=metric).item() == first


def test_one_unit_in_the_last_place_decides(search_device):
    """A search that is quietly in TF32, float16 or bfloat16 takes the first of these codes."""
    d = 8 if INTERPRETED else 64
    for dtype in FLOATS[1:2] if INTERPRETED else FLOATS:
        code = codebook_set("random", 1, 1, d, dtype)[1]
        for coordinates in (slice(None), slice(d - 1, d), slice(0, 1))[: 2 if INTERPRETED else 3]:
            near = code.clone()
            near[:, coordinates] = stepped(near[:, coordinates], 1)
            codebook = torch.cat((near, near, code, near))
            index, found = search(code, codebook, search_device, return_distance=True)
            assert index.item() == 2 and found.item() == 0
            assert search(near, codebook.flip(0).contiguous(), search_device).item() == 0


@on_cpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_that_torch_allows_its_products_changes_nothing(precision, search_device):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for kind in ("one ulp everywhere", "offset 1e4"):
            assert_exact(kind, (50, 300, 64), torch.float32, "euclidean", search_device)
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def a_million_codes():
    """Small integers: each value some sixty times, so that the lowest index matters."""
    x, codebook = codebook_set("integers", 3, 1 << 20, 6)
    return x, codebook, torch.stack([((row - codebook) ** 2).sum(-1).argmin() for row in x])


@on_cpu
def test_a_million_codes(search_device):
    x, codebook, want = a_million_codes()
    assert torch.equal(search(x, codebook, search_device), want)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_is_always_that_of_a_code(metric, search_device):
    """Of a zero codebook, of opposite ones and of one whose scores all overflow: never K, never beyond."""
    for kind in ("opposite",) if INTERPRETED else ("opposite", "overflowing", "zeros", "all equal"):
        x, codebook = codebook_set(kind, N, K, D)
        for codes in (codebook, torch.zeros_like(codebook)):
            index = search(x, codes, search_device, metric=metric)
            assert index.min() >= 0 and index.max() < K


def test_zeros_of_both_signs_are_equal(search_device):
    codebook = torch.tensor([[1.0, 1.0], [-0.0, -0.0], [0.0, 0.0], [-0.0, 0.0]])
    for metric, want in (("euclidean", 1), ("dot", 0), ("cosine", 0)):
        index = search(torch.tensor([[0.0, 0.0], [-0.0, 0.0], [-0.0, -0.0]]), codebook, search_device, metric=metric)
        assert (index == want).all()


def test_mixed_dtypes_compare_the_values_as_given(search_device):
    # float64 codes that one float32 stands for, and rows that are one of them.
    x, codebook = codebook_set("below float32", N, K, D, torch.float64)
    for left, right in (
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        a, b = x.to(left), codebook.to(right)
        want, certain = brute_force(a.double(), b.double(), "euclidean")
        got = search(a, b, search_device)
        assert torch.equal(got[certain], want[certain])
        assert torch.equal(got, definition(a, b))


# ---- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOATS[1:2] if INTERPRETED else FLOATS, ids=str)
def test_distances_are_those_of_float64_to_a_unit_in_the_last_place(dtype, metric, search_device, poisoned_memory):
    for kind in ("random",) if INTERPRETED else ("random", "offset 1e4", "clustered", "mixed norms", "rows are codes"):
        x, codebook = codebook_set(kind, N, K, D, dtype)
        index, got = search(x, codebook, search_device, metric=metric, return_distance=True)
        want = distance(x, codebook[index], metric).numpy()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # What float64 sums round: relative to the sum, of a dot product and of 1 - cosine to the terms.
        terms = {"euclidean": np.abs(want), "cosine": 1.0, "dot": (x.double() * codebook[index]).abs().sum(-1).numpy()}
        spacing = np.spacing(np.abs(want).astype(got.numpy().dtype)).astype(np.float64)
        assert (np.abs(got.double().numpy() - want) <= spacing + 1e-14 * terms[metric]).all()


def test_the_distance_of_a_row_to_itself_is_exactly_zero(search_device):
    for kind in ("offset 1e4", "rows are codes", "huge 1e18", "tiny 1e-20")[: 1 if INTERPRETED else 4]:
        _, codebook = codebook_set(kind, 1, N, D)
        index, found = search(codebook, codebook, search_device, return_distance=True)
        assert (found == 0).all() and torch.equal(codebook[index], codebook)


@on_cpu
def test_the_index_is_the_same_with_and_without_a_distance(search_device):
    for kind in ("duplicates", "one ulp everywhere", "shell"):
        x, codebook = codebook_set(kind, 100, 300, 64)
        alone = search(x, codebook, search_device)
        index, _, _ = search(x, codebook, search_device, return_distance=True, return_candidates=True)
        assert torch.equal(alone, index)


# ---- rows and codes that are not numbers, masks ----------------------------------------------------------------------


def test_a_row_that_is_not_finite_gets_minus_one_and_no_distance(search_device):
    x, codebook = codebook_set("random", 6, 20, 10)
    x[1, 3], x[2, 0], x[4, 9] = torch.nan, torch.inf, -torch.inf
    for metric in METRICS:
        index, found, candidates = search(
            x, codebook, search_device, metric=metric, return_distance=True, return_candidates=True
        )
        bad = torch.tensor([False, True, True, False, True, False])
        assert (index[bad] == -1).all() and found[bad].isnan().all() and (candidates[bad] == 0).all()
        assert torch.equal(index[~bad], definition(x[~bad], codebook, metric)) and found[~bad].isfinite().all()


def test_a_code_that_is_not_finite_is_never_chosen(search_device):
    x, codebook = codebook_set("random", 10, 12, 10)
    for bad in (torch.nan, torch.inf, -torch.inf)[: 1 if INTERPRETED else 3]:
        codes = codebook.clone()
        codes[:11, 2] = bad
        for metric in SOME_METRICS:
            assert (search(x, codes, search_device, metric=metric) == 11).all()
        codes[11, 0] = bad
        index, found = search(x, codes, search_device, return_distance=True)
        assert (index == -1).all() and found.isnan().all()


@pytest.mark.parametrize("shape", [(4, 5), (5,), (4, 1), (1, 5), ()][: 2 if INTERPRETED else None], ids=str)
def test_masked_rows_get_minus_one_and_distance_zero_whatever_they_hold(shape, search_device):
    x, codebook = codebook_set("random", 20, 30, 10)
    x = x.view(4, 5, 10)
    mask = (torch.arange(torch.Size(shape).numel()) % 3 != 0).view(shape)
    seen = mask.expand(4, 5)
    x[~seen] = torch.nan
    index, found, candidates = search(
        x, codebook, search_device, mask=mask.to(search_device), return_distance=True, return_candidates=True
    )
    assert torch.equal(index == -1, ~seen)
    assert (found[~seen] == 0).all() and (candidates[~seen] == 0).all() and (candidates[seen] >= 1).all()
    assert torch.equal(index[seen], definition(x[seen], codebook))


# ---- shapes and strides ----------------------------------------------------------------------------------------------


def test_each_head_searches_its_own_codebook(search_device):
    sets = [codebook_set(kind, 6, 23, 10) for kind in ("random", "duplicates", "offset 1e4")]
    x, codebook = (torch.stack(tensors) for tensors in zip(*sets, strict=True))
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    for metric in SOME_METRICS:
        index = search(x.view(3, 2, 3, 10), codebook, search_device, metric=metric).view(3, 6)
        for head in range(3):
            assert torch.equal(index[head], definition(x[head], codebook[head], metric))
    masked = search(x, codebook, search_device, mask=mask.to(search_device))
    assert torch.equal(masked, torch.where(mask, definition(x, codebook), -1))


STRIDES = {
    "permuted": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat((x[..., :1, :] + 1, x), -2)[..., 1:, :],
    "every other row": lambda x: torch.stack((x, x + 1), -2).flatten(-3, -2)[..., ::2, :],
}


@pytest.mark.parametrize("layout", STRIDES)
def test_strides_change_nothing_and_no_input_is_modified(layout, search_device):
    x, codebook = codebook_set("random" if INTERPRETED else "one ulp in one", N, K, D)
    want = definition(x, codebook)
    a, b = STRIDES[layout](x), STRIDES[layout](codebook)
    assert not (a.is_contiguous() and a.storage_offset() == 0)
    copies = a.clone(), b.clone()
    for left, right in ((a, b), (a, codebook), (x, b))[: 1 if INTERPRETED else 3]:
        assert torch.equal(search(left, right, search_device), want)
    assert torch.equal(a, copies[0]) and torch.equal(b, copies[1])


def test_expanded_rows_and_codebooks_equal_their_copies(search_device):
    x, codebook = codebook_set("random", 7, 20, 10)
    shared = search(x.expand(3, 7, 10), codebook.expand(3, 20, 10), search_device)
    assert torch.equal(shared, definition(x, codebook).expand(3, 7))
    assert torch.equal(search(x[:1].expand(5, 10), codebook, search_device), definition(x[:1], codebook).expand(5))
    alike = search(x, codebook[:1].expand(20, 10), search_device)
    assert (alike == 0).all()


@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (), (1,), (2, 3)][: 2 if INTERPRETED else None], ids=str)
def test_rows_come_in_any_shape(shape, search_device):
    x, codebook = codebook_set("random", 12, 20, 10)
    x = x[: torch.Size(shape).numel()].view(*shape, 10)
    assert torch.equal(search(x, codebook, search_device), definition(x.reshape(-1, 10), codebook).view(shape))


@pytest.mark.parametrize(
    ("x_shape", "codebook_shape"),
    [((0, 4), (3, 4)), ((2, 0, 4), (3, 4)), ((2, 0, 4), (2, 3, 4)), ((0, 5, 4), (0, 3, 4))],
    ids=str,
)
def test_no_rows_give_no_indices(x_shape, codebook_shape, search_device):
    index, found = search(torch.zeros(x_shape), torch.zeros(codebook_shape), search_device, return_distance=True)
    assert index.shape == found.shape == x_shape[:-1] and index.dtype == torch.int64


# ---- determinism and work --------------------------------------------------------------------------------------------


@on_cpu
def test_all_results_are_the_same_bits_at_one_and_two_threads_and_again(search_device, two_threads):
    for kind, sizes in (("random", (3000, 100, 16)), ("duplicates", (999, 333, 40)), ("shell", (500, 64, 64))):
        x, codebook = codebook_set(kind, *sizes)
        runs = []
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            runs.append(search(x, codebook, search_device, return_distance=True, return_candidates=True))
        for run in runs[1:]:
            assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


def test_every_proved_row_has_a_candidate_and_codes_that_cannot_be_told_apart_all_are(search_device):
    x, codebook = codebook_set("random", N, K, D)
    _, candidates = search(x, codebook, search_device, return_candidates=True)
    assert candidates.dtype == torch.int32 and candidates.min() >= 1 and candidates.max() <= K
    _, candidates = search(x, codebook[:1].repeat(K, 1), search_device, return_candidates=True)
    assert (candidates == K).all()


@needs_cpu_kernel
@pytest.mark.parametrize("level", backends.cpu_capabilities())
def test_on_gaussian_data_few_codes_are_left_in_doubt(level):
    """A proof that leaves the work to float64 is worth nothing: the bound must be nearly as tight as the rounding."""
    x, codebook = codebook_set("random", 512, 512, 64)
    with backends.cpu_capability(level):
        _, near = ops.nearest_codebook(x, codebook, return_candidates=True)
        _, far = ops.nearest_codebook(x + 100, codebook + 100, return_candidates=True)
    assert near.double().mean() < 12
    assert far.double().mean() < 24, "an offset that all share must not widen the bound"


def peak_memory(n, k, d):
    """(all that a process with these rows and codes ever held, what the search added to what it found), in bytes."""
    command = [sys.executable, "-m", "pygen.benchmarks.codebook_memory", *map(str, (n, k, d))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["peak"], found["growth"]


@needs_cpu_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_matrix_of_distances_never_exists():
    _, growth = peak_memory(1 << 16, 1 << 12, 64)
    assert growth < 64e6  # the matrix would be 1.07e9, its bfloat16 form half of that


@pytest.mark.slow
@needs_cpu_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_rows_and_sixteen_thousand_codes_fit_into_little_memory():
    peak, growth = peak_memory(1 << 20, 1 << 14, 64)
    assert peak < 1.5e9  # torch itself and 268 MB of rows included
    assert growth < 200e6


@on_cpu
def test_the_report_says_which_kernel_searches_on_each_device():
    served = {(service.op, service.device): service.kernel for service in backends.services()}
    for op in ("nearest_codebook", "codebook_statistics"):
        if backends.cpu_capabilities():
            assert served[op, "cpu"].startswith("C++") and (op, "cuda") in served and served[op, "other"] == "reference"
        else:
            assert served[op, "any"] == "reference"


# ---- errors ----------------------------------------------------------------------------------------------------------

X, CODEBOOK = torch.zeros(3, 4), torch.zeros(5, 4)


@on_cpu
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.nearest_codebook([1.0], CODEBOOK), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: ops.nearest_codebook(X, None), TypeError, "codebook must be a torch.Tensor, got NoneType"),
        (lambda: ops.nearest_codebook(X.long(), CODEBOOK), TypeError, "x must be floating point, got torch.int64"),
        (lambda: ops.nearest_codebook(X, CODEBOOK * 1j), TypeError, "codebook must be floating point, got .*complex64"),
        (lambda: ops.nearest_codebook(X, CODEBOOK, metric="l2"), ValueError, "one of euclidean, cosine, dot, got 'l2'"),
        (lambda: ops.nearest_codebook(X, CODEBOOK[0]), ValueError, r"codebook must be .*\(H, K, D\), got \(4,\)"),
        (lambda: ops.nearest_codebook(X, CODEBOOK[:0]), ValueError, r"codebook must have a code .* got \(0, 4\)"),
        (
            lambda: ops.nearest_codebook(X, CODEBOOK[:, :3]),
            ValueError,
            r"x must be \(\.\.\., 3\) .* \(5, 3\), got \(3, 4\)",
        ),
        (
            lambda: ops.nearest_codebook(X, CODEBOOK.expand(2, 5, 4)),
            ValueError,
            r"x must be \(2, \.\.\., 4\), a head first, .* got \(3, 4\)",
        ),
        (lambda: ops.nearest_codebook(X, CODEBOOK, mask=X[:, 0]), TypeError, "mask must be bool, got torch.float32"),
        (
            lambda: ops.nearest_codebook(X, CODEBOOK, mask=torch.ones(2, dtype=torch.bool)),
            ValueError,
            r"mask must broadcast to \(3,\), got \(2,\)",
        ),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=f"nearest_codebook: .*{sentence}"):
        call()
