"""Losses, regularisers and penalties as differentiable PyTorch functions; no kernels of their own."""

from pygen.functional.gradient_penalties import gradient_penalty, interpolates
from pygen.functional.regularizers import (
    SpectralPenalty,
    frobenius_bound,
    orthogonality,
    self_orthogonality,
    spectral_penalty,
)

__all__ = [
    "SpectralPenalty",
    "frobenius_bound",
    "gradient_penalty",
    "interpolates",
    "orthogonality",
    "self_orthogonality",
    "spectral_penalty",
]
