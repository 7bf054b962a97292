"""Two simple densities of integer data that a model has to beat, in the same unit: bits per dimension."""

import math

import torch
from torch import Tensor


def _bits_per_dim(log_prob: Tensor, dimensions: int) -> Tensor:
    return -log_prob / (dimensions * math.log(2))


def _flat(name: str, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.dim() < 2 or len(x) == 0:
        raise ValueError(f"{name}: x must be a non-empty integer tensor (N, ...), got {x.dtype} {tuple(x.shape)}")
    return x.flatten(1).long()


class PixelHistogram:
    r"""Every dimension on its own: :math:`P(x_d = k) = (n_{dk} + s) / (N + s L)`, counts with Laplace smoothing s.

    Args:
        x: integers 0 .. levels - 1, (N, ...), to fit.
        levels: L.
        smoothing: s.

    Example:
        >>> import torch
        >>> from pygen.models.baselines import PixelHistogram
        >>> PixelHistogram(torch.tensor([[0], [1]]), levels=2).bits_per_dim(torch.tensor([[0]]))
        tensor([1.], dtype=torch.float64)
    """

    def __init__(self, x: Tensor, levels: int, smoothing: float = 1.0) -> None:
        x = _flat("PixelHistogram", x)
        counts = torch.full((x.size(1), levels), smoothing, dtype=torch.float64)
        counts.scatter_add_(1, x.T, torch.ones(x.T.shape, dtype=torch.float64))
        self.log_probabilities = counts.log() - counts.sum(1, keepdim=True).log()  # (D, L)

    def log_prob(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,), nats; exact."""
        return self.log_probabilities.gather(1, _flat("PixelHistogram", x).T).sum(0)

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,)."""
        return _bits_per_dim(self.log_prob(x), x[0].numel())


class FullGaussian:
    r"""A Gaussian with full covariance on uniformly dequantised data, the best one for the data it is fitted to.

    With :math:`v = x + u`, the noise has mean 1/2, variance 1/12 and is independent of x, so the maximum-likelihood
    fit is :math:`m = \bar x + 1/2`, :math:`\Sigma = \mathrm{cov}(x) + I / 12`, and the bound of the integers'
    log-likelihood that flows are measured by has a closed form, without sampling noise:

    .. math::
        E_u \log N(x + u; m, \Sigma) = \log N(x + 1/2; m, \Sigma) - \mathrm{tr}(\Sigma^{-1}) / 24

    Args:
        x: integers, (N, ...), to fit.

    Example:
        >>> import torch
        >>> from pygen.models.baselines import FullGaussian
        >>> FullGaussian(torch.zeros(2, 1).long()).bits_per_dim(torch.zeros(1, 1).long())  # log2 sqrt(2 pi e / 12)
        tensor([0.2546], dtype=torch.float64)
    """

    def __init__(self, x: Tensor) -> None:
        data = _flat("FullGaussian", x).double()
        self.mean = data.mean(0) + 0.5
        centred = data + 0.5 - self.mean
        covariance = centred.T @ centred / len(data) + torch.eye(data.size(1), dtype=torch.float64) / 12
        self.cholesky = torch.linalg.cholesky(covariance)
        self.noise = torch.cholesky_inverse(self.cholesky).trace() / 24

    def log_prob(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,), nats; the lower bound in closed form."""
        centred = _flat("FullGaussian", x).double() + 0.5 - self.mean
        white = torch.linalg.solve_triangular(self.cholesky, centred.T, upper=False)
        log_determinant = self.cholesky.diagonal().log().sum()
        constant = 0.5 * len(self.mean) * math.log(2 * math.pi)
        return -0.5 * white.square().sum(0) - log_determinant - constant - self.noise

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N,)."""
        return _bits_per_dim(self.log_prob(x), x[0].numel())
