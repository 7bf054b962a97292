"""Modules on top of pygen.ops: flow transforms, their conditioners and masks; vector quantisers; spectral norms;
ON-LSTM."""

from pygen.nn import convert, utils
from pygen.nn._codebook_sync import assert_codebooks_equal, packed_codebook_updates
from pygen.nn.actnorm import ActNorm
from pygen.nn.conditioners import MLP, ConvNet
from pygen.nn.convolution import ActNormConv1x1, InvertibleConv1x1
from pygen.nn.coupling import AdditiveCoupling, AffineCoupling, alternating_mask, checkerboard_mask
from pygen.nn.glow import ConvPrior, GlowStep
from pygen.nn.invertible_residual import FixedPoint, InvertibleResidual
from pygen.nn.multiscale import Multiscale, Squeeze
from pygen.nn.on_lstm import ONLSTM, ONLSTMCell, ONLSTMStack
from pygen.nn.product_vq import ProductVQ
from pygen.nn.residual_vq import ResidualVQ
from pygen.nn.reversible import ReversibleSequential
from pygen.nn.spline_coupling import RationalQuadraticCoupling
from pygen.nn.transform import Permutation, Reshape, Sequential, Transform
from pygen.nn.vector_quantize import VectorQuantize

__all__ = [
    "ONLSTM",
    "ONLSTMCell",
    "ONLSTMStack",
    "MLP",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "ConvPrior",
    "FixedPoint",
    "GlowStep",
    "InvertibleConv1x1",
    "InvertibleResidual",
    "Multiscale",
    "Permutation",
    "ProductVQ",
    "RationalQuadraticCoupling",
    "Reshape",
    "ResidualVQ",
    "ReversibleSequential",
    "Sequential",
    "Squeeze",
    "Transform",
    "VectorQuantize",
    "assert_codebooks_equal",
    "alternating_mask",
    "checkerboard_mask",
    "convert",
    "packed_codebook_updates",
    "utils",
]
