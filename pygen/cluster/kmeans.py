"""K-Means as a function of tensors. estimator.py offers the same with scikit-learn's interface; _seeding.py and
_lloyd.py do the work."""

import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygen.cluster._lloyd import Lloyd
from pygen.cluster._samples import Samples
from pygen.cluster._seeding import kmeans_plus_plus, random_rows, subset

STARTS = {"k-means++": kmeans_plus_plus, "random": random_rows}
RUNS_OF_RANDOM_STARTS = 10  # scikit-learn's n_init="auto"


class Options(NamedTuple):
    """What a fit is told, as `KMeans` names it."""

    n_clusters: int
    init: Any
    n_init: Any
    max_iter: int
    tol: float
    temperature: float | None
    init_size: int | None = None


def _check_number(name: str, value: Any, kind: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an int' if kind is numbers.Integral else 'a number'}, got {value!r}")
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_temperature(temperature: Any) -> None:
    """Raise unless it is None or a positive number."""
    if temperature is None:
        return
    _check_number("temperature", temperature, numbers.Real, 0)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, or None for hard assignments, got {temperature}")


def check_options(options: Options, samples: Samples, enough: bool = True) -> None:
    """Raise unless the options make sense, and the samples are enough to start from."""
    for name, kind, least in (("n_clusters", numbers.Integral, 1), ("max_iter", numbers.Integral, 1)):
        _check_number(name, getattr(options, name), kind, least)
    _check_number("tol", options.tol, numbers.Real, 0)
    check_temperature(options.temperature)
    if options.n_init != "auto":
        _check_number("n_init", options.n_init, numbers.Integral, 1)
    if options.init_size is not None:
        _check_number("init_size", options.init_size, numbers.Integral, options.n_clusters)
    if isinstance(options.init, str) and options.init not in STARTS:
        raise ValueError(f"init must be one of {', '.join(STARTS)} or the centres, got {options.init!r}")
    if not enough:
        return
    if samples.total < options.n_clusters:
        raise ValueError(f"X must have at least n_clusters={options.n_clusters} samples, got {samples.total}")
    if samples.weights is not None and not samples.sum_over_ranks([samples.weights.sum()])[0] > 0:
        raise ValueError("sample_weight must not be 0 for all samples")


def start(samples: Samples, options: Options, generator: torch.Generator) -> Tensor:
    """(K, D): the given centres, or drawn ones."""
    if isinstance(options.init, str):
        size = options.init_size
        source = samples if size is None or size >= samples.total else subset(samples, size, generator)
        return STARTS[options.init](source, options.n_clusters, generator)
    centers = torch.as_tensor(options.init).detach().to(samples.device, samples.dtype)
    if centers.shape != (options.n_clusters, samples.d):
        raise ValueError(
            f"init must be ({options.n_clusters}, {samples.d}), a centre for each cluster, got {tuple(centers.shape)}"
        )
    if not bool(centers.isfinite().all()):
        raise ValueError("init must be finite, got NaN or infinity")
    return centers


def new_generator(samples: Samples, source: torch.Generator | None, seed: int | None = None) -> torch.Generator:
    """A generator that begins alike on all processes: from the seed, or a number drawn from the source.

    On the CPU, whatever the device of the samples: then the draws are the same on every device.
    """
    if seed is None:
        device = "cpu" if source is None else source.device
        seed = int(torch.randint(1 << 48, (), generator=source, device=device))
    return torch.Generator().manual_seed(samples.broadcast_seed(seed))


def fit(
    samples: Samples,
    options: Options,
    generator: torch.Generator,
    after: Callable[[Lloyd], None] | None = None,
) -> Lloyd:
    """The best of the runs that the options ask for."""
    check_options(options, samples)
    tolerance = options.tol * samples.variance()
    runs = options.n_init
    if runs == "auto":
        runs = RUNS_OF_RANDOM_STARTS if isinstance(options.init, str) and options.init == "random" else 1
    if not isinstance(options.init, str) and runs != 1:
        warnings.warn(f"init gives the centres: one start instead of n_init={runs}", RuntimeWarning, stacklevel=4)
    best: Lloyd | None = None
    for _ in range(runs if isinstance(options.init, str) else 1):
        run = Lloyd(samples, start(samples, options, generator), options.temperature)
        run.run(options.max_iter, tolerance, after)
        if best is None or run.inertia < best.inertia:
            best = run
    assert best is not None
    if options.temperature is None:
        _warn_of_duplicates(samples, best, options.n_clusters)
    return best


def _warn_of_duplicates(samples: Samples, run: Lloyd, n_clusters: int) -> None:
    used = torch.zeros(n_clusters, dtype=torch.float64, device=samples.device)
    used[run.labels.long()] = 1
    distinct = int((samples.sum_over_ranks([used])[0] > 0).sum())
    if distinct < n_clusters:
        message = f"only {distinct} of n_clusters={n_clusters} clusters have samples: X may have duplicates"
        warnings.warn(message, UserWarning, stacklevel=5)


class KMeansResult(NamedTuple):
    """What `kmeans` found; of a batch, every field has a leading dimension."""

    centers: Tensor  # (K, D), float64 for float64 and float32 for the others
    labels: Tensor  # (N,) int64
    inertia: Tensor  # () float64: the weighted sum of squared distances to the nearest centres
    n_iter: Tensor  # () int64
    converged: Tensor  # () bool: False where max_iter ended it


def kmeans(
    x: Tensor,
    n_clusters: int,
    *,
    weights: Tensor | None = None,
    init: str | Tensor = "k-means++",
    n_init: int | str = "auto",
    max_iter: int = 300,
    tol: float = 1e-4,
    metric: str = "euclidean",
    temperature: float | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    sync: Any = False,
) -> KMeansResult:
    r"""Lloyd's algorithm with the exact search, on the device of x.

    .. math::
        z_i = \min \arg\min_k \lVert x_i - c_k \rVert, \qquad
        c_k \leftarrow \frac{\sum_{i : z_i = k} w_i x_i}{\sum_{i : z_i = k} w_i}

    until no label changes or :math:`\sum_k \lVert \Delta c_k \rVert^2 \le` tol times the mean variance of the features.
    A cluster without rows gets the row farthest from its centre. "cosine" is spherical K-Means: rows count with length
    1, centres are brought to length 1, and the distance is :math:`1 - \cos`. With a temperature T assignments are soft:
    every row counts for every centre with :math:`r_{ik} = \operatorname{softmax}_k(-d_{ik} / T)`,
    :math:`d_{ik} = \lVert x_i - c_k \rVert^2` or :math:`1 - \cos`, which is expectation maximisation for a mixture of
    equally weighted spheres of variance T / 2.

    Args:
        x: (N, D), or (H, N, D) for H separate problems; float64, float32, bfloat16 or float16.
        n_clusters: K, at most N.
        weights: (N,) or (H, N), not negative; 1 by default.
        init: "k-means++", "random" (rows of x) or the centres (K, D) or (H, K, D) to start from.
        n_init: how many starts to take the best of; "auto" is 10 for "random" and 1 otherwise.
        max_iter, tol: when to stop.
        metric: "euclidean" or "cosine".
        temperature: None for hard assignments, or T of soft ones. Labels and inertia are those of the nearest centres.
        generator: draws the starts; torch's own by default.
        chunk_size: rows worked on at a time, rounded up to whole blocks of at most 16384; no bit of the result depends
            on it.
        sync: False; or True or a process group, over whose processes x is spread: all get the same centres.

    Returns:
        KMeansResult(centers (K, D), labels (N,) int64, inertia () float64, n_iter () int64, converged () bool).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape or range, or x is not finite.

    Example:
        >>> import torch
        >>> from pygen.cluster import kmeans
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> result = kmeans(x, 2, init=x[::2])
        >>> result.centers, result.labels, result.inertia.item()
        (tensor([[0.0000, 0.5000],
                [9.0000, 0.5000]]), tensor([0, 0, 1, 1]), 1.0)

    Source: Lloyd, "Least squares quantization in PCM", 1982; Dhillon, Modha, "Concept decompositions for large sparse
    text data using clustering", 2001 (cosine); Arthur, Vassilvitskii, "k-means++", SODA 2007.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    options = Options(n_clusters, init, n_init, max_iter, tol, temperature)
    if x.dim() == 3:
        if not len(x):
            raise ValueError(f"x must have a problem to solve, got shape {tuple(x.shape)}")
        results = []
        for h, rows in enumerate(x):
            own = options if isinstance(init, str) or init.dim() == 2 else options._replace(init=init[h])
            samples = Samples(rows, metric, None if weights is None else weights[h], None, chunk_size, sync)
            results.append(_solve(samples, own, generator))
        return KMeansResult(*(torch.stack(field) for field in zip(*results, strict=True)))
    return _solve(Samples(x, metric, weights, None, chunk_size, sync), options, generator)


def _solve(samples: Samples, options: Options, generator: torch.Generator | None) -> KMeansResult:
    with torch.no_grad():
        run = fit(samples, options, new_generator(samples, generator))
    device = samples.device
    return KMeansResult(
        run.centers,
        run.labels.long(),
        run.inertia,
        torch.tensor(run.n_iter, device=device),
        torch.tensor(run.converged, device=device),
    )
