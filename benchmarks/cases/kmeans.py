"""K-Means against scikit-learn's Lloyd and FAISS, all from the same start for the same number of iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pygen.benchmarks.cases.nearest_codebook import FAISS, addmm_argmin, index_add
from pygen.benchmarks.registry import EAGER, OURS, Call, Case, Factory, Floor, Inputs, call, register

SKLEARN = "scikit-learn"


def _our_kmeans(iterations: int) -> Factory:
    def factory(inputs: Inputs) -> Call:
        from pygen.cluster import KMeans

        x, start = inputs.tensors
        means = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0)
        return lambda: means.fit(x).cluster_centers_

    return factory


def _sklearn_kmeans(iterations: int) -> Factory:
    def factory(inputs: Inputs) -> Call:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        x, start = (tensor.cpu().numpy() for tensor in inputs.tensors)
        means = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")

        def fit() -> Tensor:
            with threadpool_limits(torch.get_num_threads()):
                return torch.from_numpy(means.fit(x).cluster_centers_)

        return fit

    return factory


def _faiss_kmeans(iterations: int) -> Factory:
    def factory(inputs: Inputs) -> Call:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        x, start = (tensor.cpu().numpy() for tensor in inputs.tensors)
        means = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x))

        def fit() -> Tensor:
            means.train(x, init_centroids=start)
            return torch.from_numpy(means.centroids.copy())

        return fit

    return factory


def plain_lloyd(x: Tensor, centres: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        counts, sums = index_add(x, addmm_argmin(x, centres), len(centres))
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
    return centres


@dataclass(frozen=True)
class Inertia:
    """Sum of squared distances to the nearest centre, and the rows, to compute it of other centres."""

    x: Tensor
    value: float


def inertia(x: Tensor, centres: Tensor) -> float:
    return (x - centres[addmm_argmin(x, centres)]).square().sum().item()


def _inertia_error(centres: Tensor, expected: Inertia) -> float:
    found = inertia(expected.x, centres.to(expected.x))
    return math.inf if math.isnan(found) else abs(found / expected.value - 1)


def _kmeans(n: int, k: int, d: int, iterations: int) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        x = torch.randn(n, d, device=device, generator=generator)
        return Inputs((x, x[:k].clone()))

    def truth(inputs: Inputs) -> Call:
        x, start = inputs.tensors
        return lambda: Inertia(x, inertia(x, plain_lloyd(x, start, iterations)))

    return Case(
        op="kmeans",
        name=f"{n}x{k}x{d}, {iterations} iterations",
        shape=(n, d),
        make=make,
        implementations={
            OURS: _our_kmeans(iterations),
            EAGER: call(partial(plain_lloyd, iterations=iterations)),
            SKLEARN: _sklearn_kmeans(iterations),
            FAISS: _faiss_kmeans(iterations),
        },
        reference=truth,
        error=_inertia_error,
        # A row between two centres may go either way in float32, and the paths part from there on.
        tolerance=1e-4,
        baseline=SKLEARN,
        floor=Floor(flops=2 * n * k * d * iterations, any_precision=True),
        long=True,
    )


register(_kmeans(65536, 256, 32, iterations=20))
