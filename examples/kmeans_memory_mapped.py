"""K-Means over rows in a file, which need not fit into memory: a whole fit, then mini-batches.

    python examples/kmeans_memory_mapped.py --rows 1000000

It writes a file of random blobs first, and deletes it at the end.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from pygen.cluster import KMeans

BATCH = 50_000  # rows


def write_blobs(path: Path, rows: int, features: int, blobs: int) -> None:
    """(rows, features) float32 around `blobs` random centres, written a batch at a time."""
    rng = np.random.default_rng(0)
    centers = 4 * rng.standard_normal((blobs, features))
    with path.open("wb") as file:
        for first in range(0, rows, BATCH):
            n = min(BATCH, rows - first)
            batch = centers[rng.integers(blobs, size=n)] + rng.standard_normal((n, features))
            batch.astype(np.float32).tofile(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--clusters", type=int, default=32)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f32"
        write_blobs(path, options.rows, options.features, options.clusters)
        x = np.memmap(path, np.float32, "r", shape=(options.rows, options.features))
        print(f"{path.stat().st_size / 2**20:.0f} MiB of rows")

        # The start is drawn from some rows: k-means++ reads all that it draws from up to twice for every centre.
        whole = KMeans(options.clusters, init_size=20_000, random_state=0)
        began = time.perf_counter()
        whole.fit(x)
        took = time.perf_counter() - began
        print(f"fit: {whole.n_iter_} iterations, {took:.1f} s, inertia per row {whole.inertia_ / len(x):.3f}")

        batches = KMeans(options.clusters, random_state=0)
        began = time.perf_counter()
        for first in range(0, len(x), BATCH):
            batches.partial_fit(x[first : first + BATCH])
        took = time.perf_counter() - began
        print(f"partial_fit: one pass, {took:.1f} s, inertia per row {-batches.score(x) / len(x):.3f}")


if __name__ == "__main__":
    main()
