"""What the tests of residual blocks share: branches of a known Lipschitz constant, and the names of the estimators."""

import math

import torch
from torch import nn

from pygen.nn.utils.conv_spectral_norm import conv_spectral_norm
from pygen.nn.utils.spectral_norm import spectral_norm

ESTIMATORS = {
    "truncated": {"log_det": "truncated", "n_terms": 6},
    "geometric": {"log_det": "russian_roulette"},
    "poisson": {"log_det": "russian_roulette", "distribution": "poisson"},
}


def scaled(layer, norm, shape):
    """The layer with a weight whose norm as an operator on inputs of this shape is `norm`, by its dense matrix."""
    matrix = torch.autograd.functional.jacobian(layer.double(), torch.zeros(1, *shape, dtype=torch.float64))
    with torch.no_grad():
        layer.weight *= norm / torch.linalg.matrix_norm(matrix.reshape(-1, math.prod(shape)), 2)
    return layer


def dense(c, size=4, width=16, seed=0):
    torch.manual_seed(seed)
    first, second = scaled(nn.Linear(size, width), 1, (size,)), scaled(nn.Linear(width, size), c, (width,))
    return nn.Sequential(first, nn.ELU(), second)


def convolutional(c, channels=1, size=4, width=3, seed=0):
    torch.manual_seed(seed)
    first, second = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((channels, width), (width, channels)))
    shapes = (channels, size, size), (width, size, size)
    return nn.Sequential(scaled(first, 1, shapes[0]), nn.ELU(), scaled(second, c, shapes[1]))


BRANCHES = {"dense": (dense, (5, 4)), "convolutional": (convolutional, (5, 1, 4, 4))}


class Conditional(nn.Module):
    """tanh(a x + b context), which shrinks by a."""

    def __init__(self, a=0.5):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, 2.0))

    def forward(self, x, context):
        return (self.a * x + self.b * context).tanh()


class Linear(nn.Module):
    """x -> x W^T for a fixed W."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x @ self.weight.T


def spectral_dense(c, n_power_iterations=5):
    layers = [
        spectral_norm(nn.Linear(a, b), n_power_iterations=n_power_iterations, bound=c) for a, b in ((2, 32), (32, 2))
    ]
    return nn.Sequential(layers[0], nn.ELU(), layers[1])


def spectral_convolutional(c):
    layers = [
        conv_spectral_norm(nn.Conv2d(a, b, 3, padding=1), (4, 4), n_power_iterations=5, bound=c)
        for a, b in ((1, 8), (8, 1))
    ]
    return nn.Sequential(layers[0], nn.ELU(), layers[1])
