"""The Triton nearest_codebook launcher against brute force in extended precision and against the definition."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from pygen import reference  # noqa: E402
from pygen.triton_kernels import nearest_codebook as kernels  # noqa: E402
from pygen.triton_kernels.nearest_codebook import METRICS, nearest_codebook  # noqa: E402

# The interpreter's numpy warns of the infinities that are squared on purpose.
pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
# The interpreter needs a twentieth of a second for a row. More than one tile of codes, and no multiple of anything.
N, K, D = 3, 37, 11


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def keys(x, codebook, metric):
    """What is smallest for the nearest code, (N, K), in numpy's widest type and order of summation."""
    x, c = x.double().numpy().astype(np.longdouble)[:, None], codebook.double().numpy().astype(np.longdouble)[None]
    if metric == "euclidean":
        return ((x - c) ** 2).sum(-1)
    dot = (x * c).sum(-1)
    if metric == "dot":
        return -dot
    norms = (c * c).sum(-1)
    return np.where(norms > 0, -dot * np.abs(dot) / np.where(norms > 0, norms, 1), 0)


def assert_nearest(x, codebook, metric, indices):
    """Brute force agrees on every row. No two codes may differ by less than float64 rounds, but they may tie."""
    key = keys(x, codebook, metric)
    key[:, ~np.isfinite(codebook.double().numpy()).all(-1)] = np.inf
    size = key if metric == "euclidean" else -keys(x.abs(), codebook.abs(), metric)
    best = key.argmin(1)[:, None]
    lowest, noise = np.take_along_axis(key, best, 1), 1e-13 * (size + np.take_along_axis(size, best, 1))
    close = np.isfinite(key) & (key <= lowest + noise) & (key != lowest)
    rows = np.isfinite(x.double().numpy()).all(-1) & np.isfinite(key).any(1)
    assert not close[rows].any()
    assert (indices.cpu().numpy()[rows] == key.argmin(1)[rows]).all()
    assert (indices.cpu().numpy()[~rows] == -1).all()


def assert_as_defined(x, codebook, metric, mask=None):
    """Everything that the operator returns, to the last bit of an index; (indices, candidates)."""
    on = [None if t is None else t.to(DEVICE) for t in (x, codebook, mask)]
    distance, indices, candidates = nearest_codebook(*on[:2], metric, on[2], True, True)
    expected, expected_indices, _ = reference.nearest_codebook(x, codebook, metric, mask, True, True)
    assert indices.dtype == torch.int64 and candidates.dtype == torch.int32 and distance.dtype == expected.dtype
    assert torch.equal(indices.cpu(), expected_indices)
    torch.testing.assert_close(distance.cpu(), expected, rtol=1e-6, atol=1e-14, equal_nan=True)
    assert ((candidates.cpu() > 0) == (expected_indices >= 0)).all()
    return indices.cpu(), candidates.cpu()


def neighbours(codes, steps):
    """Each element of `codes` (float32) that many units in the last place higher."""
    return (codes.float().view(torch.int32) + steps.int()).view(torch.float32)


def float32_sets():
    """Name -> (x (N, D), codebook (K, D)), float32."""
    x, c = normal(N, D), normal(K, D)
    twice = c.clone()
    twice[K // 2 :] = c[: K - K // 2]
    base = normal(1, D)
    steps = torch.randint(-1, 2, (K, D), generator=torch.Generator().manual_seed(5))
    grid = torch.randint(-1, 2, (N + K, D), generator=torch.Generator().manual_seed(6)).double()
    bad_rows, bad_codes, none_left, zeros = x.clone(), c.clone(), torch.full_like(c, torch.nan), c.clone()
    bad_rows[1, 3], bad_rows[2, D - 1] = torch.nan, -torch.inf
    bad_codes[::2, 2], bad_codes[1, 0] = torch.nan, torch.inf
    none_left[3] = torch.inf
    zeros[2:9] = 0
    some_zero = x.clone()
    some_zero[1] = 0
    spread = 10 ** torch.linspace(-18, 18, K, dtype=torch.float64)[torch.randperm(K)][:, None]
    sets = {
        "normal": (x, c),
        "codes that stand twice": (twice[:N] + 1e-3 * x, twice),
        "codes one unit in the last place apart": (neighbours(base, steps[:N]), neighbours(base, steps)),
        "far from the origin": (1e4 + 0.01 * x, 1e4 + 0.01 * c),
        "rows far from the codes": (1e7 * x, c),
        "rows so far that all codes look the same": (1e17 * x, c),
        "huge": (1e18 * x, 1e18 * c),
        "tiny": (1e-18 * x, 1e-18 * c),
        "subnormal": (1e-42 * x, 1e-42 * c),
        "norms from 1e-18 to 1e18": (10 ** torch.linspace(-18, 18, N, dtype=torch.float64)[:, None] * x, spread * c),
        "one huge code": (x, torch.cat((1e18 * c[:1], c[1:]))),
        "integers that tie": (grid[:N], grid[N:]),
        "all codes equal": (x, c[:1].expand(K, D)),
        "rows that are codes": (c[[5, K - 1, 0]], c),
        "zero rows and codes": (some_zero, zeros),
        "rows with NaN and infinity": (bad_rows, c),
        "codes with NaN and infinity": (x, bad_codes),
        "no finite code": (x, none_left),
    }
    return {name: (rows.float(), codes.float()) for name, (rows, codes) in sets.items()}


def float64_sets():
    x, c = normal(N, D), normal(K, D)
    powers = 10 ** torch.linspace(-160, 160, K, dtype=torch.float64)[:, None]
    return {
        "normal": (x, c),
        "last bits": (1 + 2.0**-48 * x, 1 + 2.0**-48 * c),
        "squares that overflow": (1e200 * x, 1e200 * c),
        "differences that overflow": (1e308 * x.clamp(-1, 1), 1e308 * c.clamp(-1, 1)),
        "squares that underflow": (1e-200 * x, 1e-200 * c),
        "rows whose squares overflow": (1e180 * x, c),
        "norms over all of float64": (x, powers * c),
    }


def in_dtypes(x_dtype, codebook_dtype, *names):
    sets = float32_sets()
    return {name: (sets[name][0].to(x_dtype), sets[name][1].to(codebook_dtype)) for name in names}


USUAL = ("normal", "codes that stand twice", "far from the origin", "integers that tie", "rows that are codes")
SETS = {
    "float32": float32_sets,
    "float64": float64_sets,
    "bfloat16": lambda: in_dtypes(torch.bfloat16, torch.bfloat16, *USUAL),
    "float16": lambda: in_dtypes(torch.float16, torch.float16, *USUAL),
    "bfloat16 in float32": lambda: in_dtypes(torch.bfloat16, torch.float32, *USUAL),
}
# Sets on which only the definition's order of summation decides.
TOO_CLOSE = {
    "euclidean": ("rows so far that all codes look the same",),
    "cosine": ("far from the origin", "codes one unit in the last place apart"),
    "dot": ("far from the origin", "codes one unit in the last place apart"),
}
CASES = [("float32", m) for m in METRICS] + [("float64", "euclidean"), ("float64", "cosine")]
CASES += [("bfloat16", "euclidean"), ("float16", "cosine"), ("bfloat16 in float32", "dot")]


@functools.cache
def searched(family, metric):
    """Name -> (x, codebook, distance, indices, candidates): all sets of a family in one call, a head each."""
    sets = SETS[family]()
    x, codebook = (torch.stack(tensors).to(DEVICE) for tensors in zip(*sets.values(), strict=True))
    results = [r.cpu() for r in nearest_codebook(x, codebook, metric, None, True, True)]
    return {name: (*pair, *(r[h] for r in results)) for h, (name, pair) in enumerate(sets.items())}


@pytest.mark.parametrize("family,metric,name", [(f, m, name) for f, m in CASES for name in SETS[f]()])
def test_indices_and_distances_are_the_definitions(family, metric, name):
    x, codebook, distance, indices, candidates = searched(family, metric)[name]
    expected, expected_indices, _ = reference.nearest_codebook(x[None], codebook[None], metric, None, True, False)
    assert torch.equal(indices, expected_indices[0])
    torch.testing.assert_close(distance, expected[0], rtol=1e-6, atol=1e-14, equal_nan=True)
    assert ((candidates > 0) == (indices >= 0)).all()
    if family != "float64" and name not in TOO_CLOSE[metric]:
        assert_nearest(x, codebook, metric, indices)


def test_few_codes_are_in_doubt_where_codes_are_apart():
    for family, name in (
        ("float32", "normal"),
        ("float32", "far from the origin"),
        ("float32", "huge"),
        ("float32", "tiny"),
        ("bfloat16", "normal"),
    ):
        candidates = searched(family, "euclidean")[name][-1]
        assert candidates.float().mean() <= 2, name


def test_every_code_is_in_doubt_where_all_are_equal():
    *_, candidates = searched("float32", "euclidean")["all codes equal"]
    assert (candidates == K).all()


@pytest.mark.parametrize(
    "heads,n,k,d", [(1, 1, 1, 1), (1, 17, 2, 3), (2, 3, 65, 8), (1, 2, 129, 70), (3, 2, 16, 17), (1, 2, 64, 300)]
)
def test_shapes_that_divide_nothing(heads, n, k, d):
    x, codebook = normal(heads, n, d).float(), normal(heads, k, d).float()
    for h, indices in enumerate(assert_as_defined(x, codebook, "euclidean")[0]):
        assert_nearest(x[h], codebook[h], "euclidean", indices)


def test_groups_of_many_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "CODES_PER_SPAN", 16)
    x, codebook = normal(2, 2, D).float(), normal(2, 300, D).float()
    codebook[0, 150:] = codebook[0, :150]
    indices, candidates = assert_as_defined(x, codebook, "euclidean")
    assert (candidates[1] < 150).all()
    assert_nearest(x[1], codebook[1], "euclidean", indices[1])


def test_rows_in_many_steps_of_few_dimensions(monkeypatch):
    monkeypatch.setattr(kernels, "WHOLE_DIMENSIONS", 16)
    monkeypatch.setattr(kernels, "STEP_DIMENSIONS", 16)
    assert_as_defined(normal(1, 3, 37).float(), normal(1, 70, 37).float(), "euclidean")


def test_rows_in_chunks_of_the_workspace(monkeypatch):
    monkeypatch.setattr(kernels, "WORKSPACE", 1)
    x, codebook = normal(2, 33, 5), normal(2, 9, 5)
    mask = torch.arange(33) % 5 == 0
    assert_as_defined(x.float(), codebook.float(), "cosine", mask.expand(2, 33))


def test_a_masked_row_is_minus_one_at_distance_zero():
    x, codebook = normal(2, 5, D).float(), normal(2, K, D).float()
    x[0, 1, 1] = torch.nan
    mask = torch.tensor([[True, False, True, False, True], [False, False, False, False, False]])
    indices, candidates = assert_as_defined(x, codebook, "euclidean", mask)
    assert (indices[~mask] == -1).all() and (candidates[~mask] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_strides_do_not_change_a_bit(metric):
    wide = normal(D, 2, 2, 7).float()
    x = wide.permute(1, 3, 2, 0)[:, ::2, 1]
    codebook = normal(1, D, 2 * K).float().transpose(1, 2)[:, ::2].expand(2, K, D)
    plain = nearest_codebook(x.contiguous().to(DEVICE), codebook.contiguous().to(DEVICE), metric, None, True, True)
    strided = nearest_codebook(x.to(DEVICE), codebook.to(DEVICE), metric, None, True, True)
    assert not x.is_contiguous() and not codebook.is_contiguous()
    for a, b in zip(plain, strided, strict=True):
        assert torch.equal(a, b)


def test_what_was_not_asked_for_is_empty():
    x, codebook = normal(1, 1, 3).to(DEVICE), normal(1, 2, 3).to(DEVICE)
    distance, indices, candidates = nearest_codebook(x, codebook, "dot", None, False, False)
    assert distance.shape == (0,) and candidates.shape == (0,) and indices.shape == (1, 1)
    assert distance.dtype == torch.float64 and candidates.dtype == torch.int32


@pytest.mark.parametrize("heads,n,d", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors(heads, n, d):
    x, codebook = torch.zeros(heads, n, d), torch.zeros(heads, 5, d)
    distance, indices, _ = nearest_codebook(x.to(DEVICE), codebook.to(DEVICE), "euclidean", None, True, False)
    assert distance.shape == (heads, n) and torch.equal(indices.cpu(), torch.zeros(heads, n, dtype=torch.int64))


def test_what_cannot_be_searched_is_refused_with_a_sentence():
    x = torch.zeros(1, 2, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match='metric must be one of euclidean, cosine, dot, got "manhattan"'):
        nearest_codebook(x, x, "manhattan", None, False, False)
    with pytest.raises(RuntimeError, match=r"got \(1, 2, 3\) and \(1, 0, 3\)"):
        nearest_codebook(x, x[:, :0], "dot", None, False, False)


COMPILE = """
import torch
from pygen.triton_kernels import _common, aot
from pygen.triton_kernels.nearest_codebook import nearest_codebook
x, codebook = (torch.empty((1, n, 64), dtype=torch.bfloat16, device="meta") for n in (300, 512))
gpu, _common.shared_limit = aot.TARGETS["sm_90"]
for launch in aot.recorded(lambda: nearest_codebook(x, codebook, "euclidean", None, True, True)):
    name = launch.kernel.__name__
    if name == "prepare_kernel":
        continue
    ptx = aot.compiled(launch, gpu).asm["ptx"]
    print(name, launch.options["enable_fp_fusion"], *(int(s in ptx) for s in ("wgmma", "fma.rn.f64", "max.ftz")))
"""


def test_hopper_multiplies_on_its_tensor_cores_and_float64_is_not_contracted():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["screen_kernel True 1 0 0", "decide_kernel False 0 0 0"]
