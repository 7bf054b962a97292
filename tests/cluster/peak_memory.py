"""Fit K-Means to half a million rows that exist only while they are read; prints by how many MiB the process grew.

Run by test_kmeans_estimator.py as a process of its own: the peak of a process never falls again.
"""

import resource
import sys

import numpy as np

from pygen.cluster import KMeans

N, D, K = 1 << 19, 32, 64  # X would take 64 MiB, N x K float32 128 MiB


class Generated:
    """X[i] = table[i mod 1000] + a small multiple of i: rows of 1000 kinds, made when they are asked for."""

    shape, dtype = (N, D), np.dtype(np.float32)

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).standard_normal((1000, D)).astype(np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        number = np.arange(rows.start, rows.stop)
        return self.table[number % 1000] + (1e-9 * number[:, None]).astype(np.float32)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # KiB, on Linux


def main() -> None:
    x = Generated()
    options = {"init_size": 4096, "max_iter": 1, "chunk_size": 16384, "random_state": 0}
    KMeans(K, **options).fit(x[slice(0, 20000)])  # whatever the first call loads and starts
    before = peak()
    model = KMeans(K, **options).fit(x)
    model.partial_fit(x[slice(0, 5000)])
    print(peak() - before)
    assert "sklearn" not in sys.modules


if __name__ == "__main__":
    main()
