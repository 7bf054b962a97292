"""Statistics without trajectories: exact sums against Python's integers and fractions, histograms against NumPy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pygen.ssa import _collective, reduce

CPU = torch.device("cpu")
LARGEST = 2**53


def ensemble(n, t, k, largest, seed=0):
    """Counts of all magnitudes up to `largest`: int64 [n, t, k]."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, largest, (n, t, k), endpoint=True) >> rng.integers(0, 60, (n, t, k))
    x[0] = largest
    return torch.from_numpy(x)


def exact_moments(counts):
    """Mean and covariance as fractions, [t][k] and [t][k][k], from Python integers."""
    means, covariances = [], []
    for now in counts.transpose(0, 1).tolist():
        now = [row for row in now if row[0] >= 0]
        n, columns = len(now), list(zip(*now, strict=True))
        sums = [sum(column) for column in columns]
        means.append([Fraction(s, n) for s in sums])
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in columns] for a in columns]
        covariances.append(
            [
                [Fraction(n * p - a * b, n * (n - 1)) for p, b in zip(row, sums, strict=True)]
                for row, a in zip(products, sums, strict=True)
            ]
        )
    return means, covariances


@pytest.mark.parametrize("cross", (False, True), ids=("squares", "all products"))
@pytest.mark.parametrize("largest", (1, 200, 2**20, 2**31, LARGEST))
def test_moments_are_the_correctly_rounded_fractions(largest, cross):
    counts = ensemble(97, 3, 4, largest)
    counts[5:20, 1] = -1  # trajectories that have no value at the second time
    moments = reduce.Moments(3, 4, cross, CPU)
    for block in counts.split(10):
        moments.add(block)
    means, covariances = exact_moments(counts)
    assert moments.present.tolist() == [97, 82, 97]
    assert moments.mean().tolist() == [[float(x) for x in row] for row in means]
    diagonal = [[float(rows[k][k]) for k in range(4)] for rows in covariances]
    assert moments.variance().tolist() == diagonal
    if cross:
        assert moments.covariance().tolist() == [[[float(x) for x in row] for row in rows] for rows in covariances]


@pytest.mark.parametrize("cross", (False, True), ids=("squares", "all products"))
def test_sums_of_a_thousand_million_trajectories_of_2_to_53_are_exact(cross, monkeypatch):
    rows, ranks = 1 << 20, 1 << 10
    moments = reduce.Moments(1, 1, cross, CPU)
    moments.add(torch.full((1, 1, 1), LARGEST).expand(rows, 1, 1))
    moments.add(torch.ones(1, 1, 1, dtype=torch.int64))
    monkeypatch.setattr(_collective, "sum_over_ranks", lambda x, group: x * ranks)  # as many ranks with equal shares
    moments.merge(object())
    n = (rows + 1) * ranks
    total, squares = ranks * (rows * LARGEST + 1), ranks * (rows * LARGEST**2 + 1)
    assert int(moments.present) == n > 10**9
    assert moments.sums.integers().item() == total
    assert moments.products.integers().item() == squares
    assert moments.mean().item() == total / n
    assert moments.variance().item() == float(Fraction(n * squares - total**2, n * (n - 1)))


def test_moments_do_not_depend_on_the_blocks():
    counts = ensemble(90, 5, 3, LARGEST)
    results = []
    for size in (1, 7, 64, 90):
        moments = reduce.Moments(5, 3, True, CPU)
        for block in counts.split(size):
            moments.add(block)
        results.append((moments.sums.words, moments.products.words))
    for sums, products in results[1:]:
        assert torch.equal(sums, results[0][0]) and torch.equal(products, results[0][1])


def test_no_trajectory_has_no_mean_and_one_has_no_variance():
    moments = reduce.Moments(1, 2, False, CPU)
    moments.add(torch.zeros(0, 1, 2, dtype=torch.int64))
    assert np.isnan(moments.mean()).all() and np.isnan(moments.variance()).all()
    moments.add(torch.tensor([[[3, 4]]]))
    assert moments.mean().tolist() == [[3, 4]] and np.isnan(moments.variance()).all()


def test_histogram_grows_to_the_range_of_its_counts_and_no_further():
    rng = np.random.default_rng(1)
    counts = rng.integers(50, 60, (40, 3))
    counts[10:] += rng.integers(-40, 900, (30, 3))
    counts[33, 2] = -1
    for size in (1, 9, 40):
        histogram = reduce.Histogram("A", 3, None, CPU)
        for block in torch.from_numpy(counts).split(size):
            histogram.add(block)
        present = counts[counts >= 0]
        assert histogram.axis().tolist() == list(range(present.min(), present.max() + 1))
        for t in range(3):
            column = counts[counts[:, t] >= 0, t]
            expected = np.bincount(column - present.min(), minlength=len(histogram.axis()))
            assert histogram.cells[t].tolist() == expected.tolist()


def test_bins_with_edges_are_those_of_numpy():
    counts = np.random.default_rng(2).integers(0, 40, (500, 2))
    edges = np.array([0.0, 3.5, 10.0, 11.0, 30.0])
    histogram = reduce.Histogram("A", 2, edges, CPU)
    for block in torch.from_numpy(counts).split(77):
        histogram.add(block)
    for t in range(2):
        assert histogram.cells[t].tolist() == np.histogram(counts[:, t], edges)[0].tolist()


def test_a_range_too_wide_for_bins_of_width_1_is_refused_with_the_remedy():
    histogram = reduce.Histogram("mRNA", 2, None, CPU)
    histogram.add(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match=r"mRNA ranges over 5..9007199254740992 at 2 times.*give edges, as bins="):
        histogram.add(torch.tensor([[5, LARGEST]]))


@pytest.mark.parametrize("n", (1, 2, 10, 99))
def test_quantiles_are_numpys_inverted_cdf(n):
    x = np.random.default_rng(n).integers(3, 20, n)
    histogram = reduce.Histogram("A", 1, None, CPU)
    histogram.add(torch.from_numpy(x)[:, None])
    for q in (0.0, 0.05, 0.1, 0.25, 0.5, 0.7, 0.9, 0.95, 1.0, 1 / 3, math.nextafter(0.5, 1)):
        assert histogram.quantile(q).tolist() == [np.quantile(x, q, method="inverted_cdf")]
