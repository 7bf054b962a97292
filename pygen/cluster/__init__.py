"""Clustering on the exact search of `pygen.ops.nearest_codebook`: K-Means as a function and as an estimator."""

from pygen.cluster.estimator import KMeans, NotFittedError
from pygen.cluster.kmeans import KMeansResult, kmeans

__all__ = ["KMeans", "KMeansResult", "NotFittedError", "kmeans"]
