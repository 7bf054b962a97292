"""Modules on top of pygen.ops: flow transforms, their conditioners and masks."""

from pygen.nn import convert
from pygen.nn.actnorm import ActNorm
from pygen.nn.conditioners import MLP, ConvNet
from pygen.nn.convolution import ActNormConv1x1, InvertibleConv1x1
from pygen.nn.coupling import AdditiveCoupling, AffineCoupling, alternating_mask, checkerboard_mask
from pygen.nn.glow import ConvPrior, GlowStep
from pygen.nn.multiscale import Multiscale, Squeeze
from pygen.nn.reversible import ReversibleSequential
from pygen.nn.spline_coupling import RationalQuadraticCoupling
from pygen.nn.transform import Permutation, Reshape, Sequential, Transform

__all__ = [
    "MLP",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "ConvPrior",
    "GlowStep",
    "InvertibleConv1x1",
    "Multiscale",
    "Permutation",
    "RationalQuadraticCoupling",
    "Reshape",
    "ReversibleSequential",
    "Sequential",
    "Squeeze",
    "Transform",
    "alternating_mask",
    "checkerboard_mask",
    "convert",
]
