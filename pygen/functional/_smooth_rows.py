"""What the smooth functions share: checks of their arguments, and rows divided by a temperature without overflow.
`smooth.py` and `_smooth_top_k.py` stand on it."""

import math

import torch
from torch import Tensor

from pygen.reference._dtypes import compute_dtype, widen


def check_row(name: str, x: Tensor, dim: int, temperature: float) -> None:
    """Refuse what is no row of at least one floating-point number, and what is no temperature."""
    check_floating(name, "x", x, temperature)
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"{name}: dim must be in [{-rank}, {rank - 1}] for x of shape {tuple(x.shape)}, got {dim}")
    if not length(x, dim):
        raise ValueError(f"{name}: x must have at least one element along dim {dim}, got shape {tuple(x.shape)}")


def check_floating(name: str, argument: str, x: Tensor, temperature: float) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: {argument} must be floating point, got {x.dtype}")
    if isinstance(temperature, Tensor):
        raise TypeError(f"{name}: temperature must be a number, got a tensor")
    least = torch.finfo(compute_dtype(x.dtype)).tiny  # less is divided by as if it were 0
    if not least <= temperature < math.inf:
        raise ValueError(f"{name}: temperature must be finite and at least {least:.2g}, got {temperature}")


def length(x: Tensor, dim: int) -> int:
    return x.size(dim) if x.dim() else 1


def scaled(x: Tensor, dim: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(x - m) / temperature and m, the largest element: x / temperature itself may overflow.

    What is made of it does not depend on m, hence no gradient through it. m is 0 for a row without a finite maximum,
    which then is what it would be without m.
    """
    x = widen(x)
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0.0)
    return (x - largest) / temperature, largest


def probabilities(x: Tensor, dim: int, temperature: float) -> Tensor:
    """softmax(x / temperature), float32 for 16-bit x; NaN for a row of -inf, as softmax's."""
    return scaled(x, dim, temperature)[0].softmax(dim)
