"""Every op in plain PyTorch: the truth in tests, the baseline in benchmarks, the fallback on other devices."""

from pygen.reference.actnorm_conv1x1 import actnorm_conv1x1, actnorm_conv1x1_backward, actnorm_conv1x1_inverse
from pygen.reference.affine_coupling import (
    SCALE_MAPS,
    additive_coupling,
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_halves,
    affine_coupling_halves_backward,
    log_scale,
)
from pygen.reference.codebook_statistics import codebook_statistics
from pygen.reference.cumax import cumax, cumax_backward
from pygen.reference.nearest_codebook import METRICS, nearest_codebook
from pygen.reference.on_lstm import on_lstm, on_lstm_backward
from pygen.reference.power_iteration import power_iteration, power_iteration_backward
from pygen.reference.rational_quadratic_spline import (
    TAILS,
    rational_quadratic_spline,
    rational_quadratic_spline_backward,
)

__all__ = [
    "METRICS",
    "SCALE_MAPS",
    "TAILS",
    "actnorm_conv1x1",
    "actnorm_conv1x1_backward",
    "actnorm_conv1x1_inverse",
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_backward",
    "affine_coupling_halves",
    "affine_coupling_halves_backward",
    "codebook_statistics",
    "cumax",
    "cumax_backward",
    "log_scale",
    "nearest_codebook",
    "on_lstm",
    "on_lstm_backward",
    "power_iteration",
    "power_iteration_backward",
    "rational_quadratic_spline",
    "rational_quadratic_spline_backward",
]
