"""Two processes that share X; each fails unless it finds what one process alone finds in all of X.

Run by test_kmeans_processes.py with the path of a file to meet at. It forks itself: importing torch once is enough.
"""

import os
import sys
import warnings
from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from pygen.cluster import KMeans, kmeans

RANKS = 2
LEFT = 2047  # rows of rank 0, not a multiple of any block; rank 1 has the rest


def share(x: np.ndarray, rank: int, left: int = LEFT) -> np.ndarray:
    return x[:left] if rank == 0 else x[left:]


def assert_alike(values: np.ndarray) -> None:
    """The same bits on all ranks."""
    mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    everyones = [torch.empty_like(mine) for _ in range(RANKS)]
    distributed.all_gather(everyones, mine)
    assert all(torch.equal(mine, other) for other in everyones), "the processes must have the same bits"


def assert_same_fit(model: KMeans, alone: KMeans, rank: int, left: int = LEFT) -> None:
    # Sums of float64 are split between the processes: 1e-16 of them is lost elsewhere than in one process.
    np.testing.assert_allclose(model.cluster_centers_, alone.cluster_centers_, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(model.inertia_, alone.inertia_, rtol=1e-11)
    np.testing.assert_allclose(model.counts_, alone.counts_, rtol=1e-11)
    np.testing.assert_array_equal(model.labels_, share(alone.labels_, rank, left))
    assert model.n_iter_ == alone.n_iter_
    assert_alike(model.cluster_centers_)
    assert_alike(np.array([model.inertia_, model.n_iter_]))


def main(store: str, rank: int) -> None:
    limit = timedelta(seconds=60)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3000, 3)) + 4 * rng.standard_normal((6, 3))[rng.integers(6, size=3000)]
    weight = rng.random(3000)
    mine, my_weight = share(x, rank), share(weight, rank)

    for options in ({"init": x[:6]}, {"init": x[:6], "metric": "cosine"}, {"init": x[:6], "temperature": 2.0}):
        alone = KMeans(6, **options).fit(x, sample_weight=weight)
        assert_same_fit(KMeans(6, sync=True, **options).fit(mine, sample_weight=my_weight), alone, rank)

    # The draws are of all rows, in the order of the ranks: the same start as of one process.
    for options in ({}, {"init": "random", "n_init": 2}, {"init_size": 500}, {"metric": "cosine"}):
        alone = KMeans(6, random_state=3, **options).fit(x)
        assert_same_fit(KMeans(6, random_state=3, sync=True, **options).fit(mine), alone, rank)

    # One process without a row, and a process group in place of True.
    for left in (0, 3000):
        alone = KMeans(6, random_state=1).fit(x)
        group = distributed.group.WORLD
        assert_same_fit(KMeans(6, random_state=1, sync=group).fit(share(x, rank, left)), alone, rank, left)

    # Different seeds: the first process's counts.
    torch.manual_seed(rank)
    assert_alike(KMeans(6, sync=True).fit(mine).cluster_centers_)
    assert_alike(kmeans(torch.from_numpy(mine), 6, sync=True).centers.numpy())

    # Empty clusters get the farthest rows of all, whichever process has them.
    few = np.array([[0.0], [1.0], [2.0], [50.0], [10.0], [11.0], [-70.0]])
    start = np.array([[1.0], [900.0], [10.0], [-900.0]])
    alone = KMeans(4, init=start, max_iter=1).fit(few)
    assert sorted(alone.cluster_centers_.ravel()) == [-70.0, 1.0, 10.5, 50.0]
    for left in (0, 4, 5, 7):
        model = KMeans(4, init=start, max_iter=1, sync=True).fit(share(few, rank, left))
        assert_same_fit(model, alone, rank, left)

    # Mini-batches: every process brings its share of each batch.
    alone, model = KMeans(6, random_state=0), KMeans(6, random_state=0, sync=True)
    for first in range(0, 3000, 1000):
        batch, left = x[first : first + 1000], first // 4
        alone.partial_fit(batch)
        model.partial_fit(share(batch, rank, left))
        np.testing.assert_allclose(model.cluster_centers_, alone.cluster_centers_, rtol=1e-11)
        np.testing.assert_array_equal(model.labels_, share(alone.labels_, rank, left))
        assert_alike(model.cluster_centers_)

    # What is wrong with the rows of one is told by all; none is left waiting.
    for bad in (np.where(rank == 1, np.nan, mine), mine[:2]):
        try:
            KMeans(6, sync=True).fit(bad)
        except ValueError as error:
            assert "finite" in str(error) or "got 4" in str(error), error
        else:
            raise AssertionError("must be refused")

    # Without sync a process is by itself, whatever the others do.
    if rank == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            KMeans(3, random_state=0).fit(mine[:50]).predict(mine)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    main(sys.argv[1], rank=1 if child else 0)
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
