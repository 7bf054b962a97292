"""The fused ops as functions: differentiable, compilable, on every device."""

from pygen.ops.actnorm_conv1x1 import actnorm_conv1x1
from pygen.ops.affine_coupling import additive_coupling, affine_coupling, affine_coupling_halves
from pygen.ops.cumax import cumax
from pygen.ops.rational_quadratic_spline import rational_quadratic_spline

__all__ = [
    "actnorm_conv1x1",
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_halves",
    "cumax",
    "rational_quadratic_spline",
]
