"""K-Means with scikit-learn's interface, which is not imported: its clone, Pipeline and search find what they look for.

Chunks, processes and devices are `_samples.Samples`; the runs are kmeans.py's.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.cluster._lloyd import (
    Lloyd,
    assign,
    assign_softly,
    cluster_weights,
    distance_table,
    inertia,
    responsibilities,
    table_rows,
)
from pygen.cluster._samples import Samples, as_rows, unit
from pygen.cluster.kmeans import Options, check_options, check_temperature, fit, new_generator, start
from pygen.ops import nearest_codebook


class NotFittedError(ValueError, AttributeError):
    """A method was called that needs centres, before fit or partial_fit."""


def _seed(random_state: Any) -> tuple[torch.Generator | None, int | None]:
    """(generator to draw a seed from, the seed): one of them is None."""
    if random_state is None or isinstance(random_state, torch.Generator):
        return random_state, None
    for draw in ("integers", "randint"):  # numpy's Generator and RandomState
        if hasattr(random_state, draw):
            return None, int(getattr(random_state, draw)(1 << 31))
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise TypeError(
            f"random_state must be None, an int, a torch.Generator or numpy's, got {type(random_state).__name__}"
        )
    if not 0 <= random_state < 1 << 53:
        raise ValueError(f"random_state must be at least 0 and below 2^53, got {random_state}")
    return None, int(random_state)


class _Parameters:
    """get_params and set_params by the constructor's signature, as scikit-learn's clone and searches call them."""

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Any:
        """Change constructor arguments; returns self."""
        for name in params:
            if name not in self._names():
                raise ValueError(f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(self._names())}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self)).parameters.items()}
        given = {name: value for name, value in self.get_params().items() if value is not defaults[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.base import BaseEstimator  # who asks for tags has it

        tags = BaseEstimator().__sklearn_tags__()
        tags.estimator_type, tags.target_tags.required = "clusterer", False
        return tags


class KMeans(_Parameters):
    r"""K-Means by Lloyd's algorithm on the exact search, for data of any size.

    What it computes is written at `pygen.cluster.kmeans`; arguments, attributes and methods are scikit-learn's. X may
    be a tensor, an array, a memory map or anything with shape, dtype and slices of rows: it is read in chunks, never
    copied, and no N x K matrix exists. Results are tensors for a tensor and arrays for everything else.

    Args:
        n_clusters: K.
        init: "k-means++", "random" (rows of X) or the centres (K, D) to start from.
        n_init: how many starts to take the best of; "auto" is 10 for "random" and 1 otherwise.
        max_iter: iterations of a start at most.
        tol: ends a start when the squared shift of the centres is within tol times the mean variance of the features.
        random_state: int, torch.Generator, numpy's generators, or None: torch's own generator.
        metric: "euclidean", or "cosine" for spherical K-Means.
        temperature: None for hard assignments; T > 0 fits with soft ones, :math:`\operatorname{softmax}_k(-d_{ik}/T)`
            with :math:`d_{ik} = \lVert x_i - c_k \rVert^2` or :math:`1 - \cos`.
        init_size: draw the start from this many rows of X, kept in memory; None for all rows. k-means++ passes 2 K
            times over what it draws from.
        chunk_size: rows read at once, rounded up to whole blocks of at most 16384; None for about 4 million numbers.
        device: where to compute; by default where X is.
        sync: False; or True or a process group, over whose processes X is spread, of any sizes: fit and partial_fit
            then give all of them the same centres, counts and inertia, and have to be called by all.

    Attributes:
        cluster_centers_: (K, D), float64 for float64 and float32 for the others. labels_: (N,), of this process's rows.
        inertia_: the weighted sum of squared distances (of 1 - cos) to the nearest centres. n_iter_: of the best start.
        converged_: False where max_iter ended it. counts_: (K,) float64, the weight that each centre has seen.
        n_steps_: calls of partial_fit. n_features_in_: D.

    Example:
        >>> import numpy as np
        >>> from pygen.cluster import KMeans
        >>> X = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> model = KMeans(n_clusters=2, random_state=0).fit(X)
        >>> sorted(model.cluster_centers_.tolist()), model.inertia_
        ([[0.0, 0.5], [9.0, 0.5]], 1.0)

    Source: as for `pygen.cluster.kmeans`; Sculley, "Web-scale k-means clustering", WWW 2010 (partial_fit).
    """

    cluster_centers_: Any
    labels_: Any
    inertia_: float
    n_iter_: int
    converged_: bool
    counts_: Any
    n_steps_: int
    n_features_in_: int

    _estimator_type = "clusterer"

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
        metric: str = "euclidean",
        temperature: float | None = None,
        init_size: int | None = None,
        chunk_size: int | None = None,
        device: Any = None,
        sync: Any = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.metric = metric
        self.temperature = temperature
        self.init_size = init_size
        self.chunk_size = chunk_size
        self.device = device
        self.sync = sync

    def _samples(self, X: Any, sample_weight: Any = None, sync: Any = False) -> Samples:
        return Samples(X, self.metric, sample_weight, self.device, self.chunk_size, sync)

    def _options(self) -> Options:
        return Options(
            self.n_clusters, self.init, self.n_init, self.max_iter, self.tol, self.temperature, self.init_size
        )

    def _fitted(self, X: Any, sample_weight: Any = None, sync: Any = False) -> tuple[Samples, Tensor]:
        """The samples, and the centres on their device; raises where they do not go together."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError("this KMeans has no centres yet: call fit or partial_fit first")
        samples = self._samples(X, sample_weight, sync)
        centers = torch.as_tensor(self.cluster_centers_).to(samples.device)
        if samples.d != centers.size(1):
            raise ValueError(f"X must have {centers.size(1)} features, as in fit, got {samples.d}")
        return samples, centers

    def _like(self, X: Any, result: Tensor) -> Any:
        """A result in X's kind: a tensor on its device (labels int64), or an array (labels int32)."""
        if isinstance(X, Tensor):
            return result.to(X.device, torch.int64 if result.dtype == torch.int32 else result.dtype)
        return result.cpu().numpy()

    def _keep_centers(self, X: Any, centers: Tensor) -> None:
        self.cluster_centers_ = self._like(X, centers)
        self.n_features_in_ = centers.size(1)

    @torch.no_grad()
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        """Find the centres of X (N, D). Interrupted, it keeps those of the last iteration, without labels_.

        Args:
            X: (N, D), of real numbers. y: not used. sample_weight: (N,), not negative.
        """
        samples = self._samples(X, sample_weight, self.sync)
        latest: list[Lloyd] = []
        try:
            generator = new_generator(samples, *_seed(self.random_state))
            run = fit(samples, self._options(), generator, lambda run: latest.__setitem__(slice(None), [run]))
            counts = cluster_weights(samples, run.labels, len(run.centers))
        except KeyboardInterrupt:
            if latest:
                for name in ("labels_", "inertia_", "counts_", "converged_"):
                    self.__dict__.pop(name, None)
                self._keep_centers(X, latest[0].centers)
                self.n_iter_ = latest[0].n_iter
            raise
        self._keep_centers(X, run.centers)
        self.labels_, self.counts_ = self._like(X, run.labels), self._like(X, counts)
        self.inertia_, self.n_iter_, self.converged_ = float(run.inertia), run.n_iter, run.converged
        self.n_steps_ = 0
        return self

    @torch.no_grad()
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "KMeans":
        r"""One step of mini-batch K-Means: every centre becomes the mean of all the rows it has ever been nearest to.

        .. math::
            n_k \leftarrow n_k + \sum_{z_i = k} w_i, \qquad
            c_k \leftarrow c_k + \frac{1}{n_k} \sum_{z_i = k} w_i (x_i - c_k)

        The first call draws the start from X, unless fit went before: then its rows count as seen. "cosine" brings the
        centres back to length 1; with a temperature, every row counts for every centre. labels_ and inertia_ are those
        of X with the new centres.
        """
        fitted = self.__sklearn_is_fitted__()
        if fitted:
            samples, centers = self._fitted(X, sample_weight, self.sync)
        else:
            samples = self._samples(X, sample_weight, self.sync)
        check_options(self._options(), samples, enough=not fitted)
        samples.variance()  # raises where X is not finite
        if not fitted:
            centers = start(samples, self._options(), new_generator(samples, *_seed(self.random_state)))
            centers = samples.prepared(centers).to(samples.dtype)
        labels = torch.full((samples.n,), -1, dtype=torch.int32, device=samples.device)
        if self.temperature is None:
            found = assign(samples, centers, labels)
        else:
            found = assign_softly(samples, centers, self.temperature)
        before = torch.as_tensor(getattr(self, "counts_", torch.zeros(len(centers)))).to(found.weights)
        counts, seen = before + found.weights, (found.weights > 0)[:, None]
        means = (centers.double() * before[:, None] + found.sums) / torch.where(seen, counts[:, None], 1)
        means = unit(means) if self.metric == "cosine" else means
        centers = torch.where(seen, means, centers.double()).to(centers.dtype)
        assign(samples, centers, labels, with_sums=False)
        total = inertia(samples, centers, labels)
        self._keep_centers(X, centers)
        self.labels_, self.counts_ = self._like(X, labels), self._like(X, counts)
        self.inertia_, self.n_steps_ = float(total), getattr(self, "n_steps_", 0) + 1
        return self

    @torch.no_grad()
    def _labels(self, samples: Samples, centers: Tensor) -> Tensor:
        """(N,) int32: the nearest centres, of rows that are finite."""
        labels = torch.empty(samples.n, dtype=torch.int32, device=samples.device)
        for first, chunk in samples.chunks():
            nearest = nearest_codebook(chunk, centers, metric=self.metric)
            missing = (nearest < 0).nonzero()
            if len(missing):
                raise ValueError(f"X must be finite, got NaN or infinity in row {first + int(missing[0])}")
            labels[first : first + len(chunk)] = nearest
        return labels

    def predict(self, X: Any) -> Any:
        """(N,): the nearest centre of each row of X (N, D), the first of several; int64 tensor or int32 array."""
        return self._like(X, self._labels(*self._fitted(X)))

    @torch.no_grad()
    def _table(self, X: Any, temperature: float | None) -> Any:
        """(N, K): distances, or responsibilities at a temperature."""
        samples, centers = self._fitted(X)
        centers = samples.prepared(centers)
        home = X.device if isinstance(X, Tensor) else torch.device("cpu")
        result = torch.empty(samples.n, len(centers), dtype=samples.dtype, device=home)
        for first, chunk in samples.chunks():
            for _, where, rows in samples.blocks(chunk, first):
                for i in range(0, len(rows), table_rows(samples, len(centers))):
                    part = rows[i : i + table_rows(samples, len(centers))]
                    if temperature is not None:
                        table = responsibilities(samples, part, centers, temperature)
                    else:
                        table = distance_table(samples, part, centers)
                        table = table if self.metric == "cosine" else table.sqrt()
                    result[where][i : i + len(part)] = table
        return self._like(X, result)

    def predict_soft(self, X: Any, temperature: float | None = None) -> Any:
        """(N, K): how much a row of X belongs to each centre, softmax(-d / temperature), d = |x - c|^2 or 1 - cos.

        Args:
            X: (N, D). temperature: that of the constructor by default.
        """
        temperature = self.temperature if temperature is None else temperature
        if temperature is None:
            raise ValueError("predict_soft needs a temperature: as its argument, or as KMeans(temperature=...)")
        check_temperature(temperature)
        return self._table(X, temperature)

    def transform(self, X: Any) -> Any:
        """(N, K): the distance of each row of X (N, D) to each centre, |x - c| or 1 - cos; 0 where they are equal."""
        return self._table(X, None)

    @torch.no_grad()
    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of X (N, D), this process's rows, with the centres there are."""
        samples, centers = self._fitted(X, sample_weight)
        return -float(inertia(samples, centers, self._labels(samples, centers)))

    def fit_predict(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """labels_ after fit."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """transform(X) after fit."""
        X = as_rows(X)
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of transform's columns: kmeans0, kmeans1, ..."""
        if not self.__sklearn_is_fitted__():
            raise NotFittedError("this KMeans has no centres yet: call fit or partial_fit first")
        return np.asarray([f"kmeans{k}" for k in range(len(self.cluster_centers_))], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "cluster_centers_")
