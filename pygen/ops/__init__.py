"""The fused ops as functions: differentiable, compilable, on every device."""

from pygen.ops.actnorm_conv1x1 import actnorm_conv1x1
from pygen.ops.affine_coupling import additive_coupling, affine_coupling, affine_coupling_halves
from pygen.ops.codebook_statistics import codebook_statistics
from pygen.ops.cumax import cumax
from pygen.ops.nearest_codebook import nearest_codebook
from pygen.ops.on_lstm import on_lstm, on_lstm_cell
from pygen.ops.power_iteration import power_iteration, power_iteration_multi
from pygen.ops.rational_quadratic_spline import rational_quadratic_spline

__all__ = [
    "actnorm_conv1x1",
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_halves",
    "codebook_statistics",
    "cumax",
    "nearest_codebook",
    "on_lstm",
    "on_lstm_cell",
    "power_iteration",
    "power_iteration_multi",
    "rational_quadratic_spline",
]
