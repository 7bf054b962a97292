"""The Triton codebook_statistics launcher against sums of the chosen rows in float64."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from pygen import reference  # noqa: E402
from pygen.triton_kernels import codebook_statistics as kernels  # noqa: E402
from pygen.triton_kernels.codebook_statistics import codebook_statistics  # noqa: E402

pytestmark = [pytest.mark.usefixtures("device", "poisoned")]

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of seven rows: codes inside one, across a boundary, over several, and chunks with many codes."""
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 7)


def normal(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))
    return x.to(dtype)


def drawn(n, low, high):
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(n))


def assert_statistics(x, indices, codes, mask=None):
    """Sums of the float64 sums of each code's rows, within what float64 rounds, and exact counts."""
    on = [None if t is None else t.to(DEVICE) for t in (x, indices, mask)]
    sums, counts = (t.cpu() for t in codebook_statistics(*on[:2], codes, on[2]))
    assert sums.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and counts.dtype == torch.int64
    assert sums.shape == (codes, x.size(1)) and sums.is_contiguous()
    wide = x.double().numpy().astype(np.longdouble)
    kept = np.ones(len(x), dtype=bool) if mask is None else mask.numpy()
    for code in range(codes):
        rows = wide[kept & (indices.numpy() == code)]
        assert counts[code] == len(rows)
        # float32 is rounded once more: half a unit in the last place.
        rounded = np.abs(rows.sum(0)) * (0 if x.dtype == torch.float64 else 2.0**-24)
        bound = rounded + 2.0**-52 * max(1, len(rows)) * np.abs(rows).sum(0)
        assert (np.abs(sums[code].numpy() - rows.sum(0)) <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_counts_and_sums_of_every_dtype(dtype):
    assert_statistics(normal(61, 9, dtype=dtype), drawn(61, -1, 8), 8)


def test_the_result_is_the_references():
    x, indices = normal(50, 6), drawn(50, -1, 9)
    for mine, theirs in zip(
        codebook_statistics(x.to(DEVICE), indices.to(DEVICE), 9, None),
        reference.codebook_statistics(x, indices, 9, None),
        strict=True,
    ):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-7, atol=1e-14)


@pytest.mark.parametrize("n", [1, 6, 7, 8, 14, 15, 60])
def test_a_code_that_every_row_chose(n):
    assert_statistics(normal(n, 3), torch.full((n,), 2), 4)


def test_codes_that_begin_and_end_at_the_edges_of_chunks():
    lengths = [7, 14, 3, 4, 1, 20, 0, 8, 6]
    indices = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    assert_statistics(normal(len(indices), 4), indices[order], len(lengths))


def test_more_codes_than_rows():
    assert_statistics(normal(20, 2), drawn(20, 0, 300), 300)


def test_more_columns_than_a_program_takes(monkeypatch):
    monkeypatch.setattr(kernels, "COLUMNS", 8)
    assert_statistics(normal(40, 21), drawn(40, 0, 5), 5)


def test_chunks_grow_so_that_their_parts_stay_bounded(monkeypatch):
    monkeypatch.setattr(kernels, "PARTS", 9)
    assert_statistics(normal(40, 3), drawn(40, 0, 5), 5)


def test_masked_rows_and_rows_without_a_code_are_left_out():
    indices = drawn(50, -1, 6)
    indices[[3, 30]] = torch.tensor([6, 1 << 40])
    mask = drawn(50, 0, 2).bool()
    x = normal(50, 5)
    x[(indices < 0) | (indices > 5) | ~mask] = torch.nan
    assert_statistics(x, indices, 6, mask)
    assert_statistics(x, indices, 6, torch.zeros(50, dtype=torch.bool))


def test_strides_do_not_change_a_bit():
    x, indices = normal(5, 80).t()[::2], drawn(80, 0, 5)[::2]
    plain = codebook_statistics(x.contiguous().to(DEVICE), indices.contiguous().to(DEVICE), 5, None)
    for a, b in zip(codebook_statistics(x.to(DEVICE), indices.to(DEVICE), 5, None), plain, strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_again():
    x, indices = normal(60, 5).to(DEVICE), drawn(60, 0, 3).to(DEVICE)
    first, second = (codebook_statistics(x, indices, 3, None)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("n,d,codes", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_empty_tensors(n, d, codes):
    sums, counts = codebook_statistics(
        normal(n, d).to(DEVICE), torch.zeros(n, dtype=torch.int64).to(DEVICE), codes, None
    )
    assert sums.shape == (codes, d) and (sums == 0).all()
    assert counts.sum() == (n if codes else 0) and counts.shape == (codes,)


def test_indices_of_another_length_are_refused_with_a_sentence():
    with pytest.raises(RuntimeError, match=r"indices \(N,\), got \(4, 2\) and \(3,\)"):
        codebook_statistics(torch.zeros(4, 2, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE), 2, None)
