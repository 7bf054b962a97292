"""pygen: fused, exact and reproducible kernels for generative models in PyTorch."""

from pygen import backends, cluster, functional, models, nn, ops, reference, ssa

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "cluster", "functional", "models", "nn", "ops", "reference", "ssa"]
