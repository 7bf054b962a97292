"""Modules on top of pygen.ops: flow transforms, their conditioners and masks."""

from pygen.nn.conditioners import MLP, ConvNet
from pygen.nn.coupling import AdditiveCoupling, AffineCoupling, alternating_mask, checkerboard_mask
from pygen.nn.transform import Permutation, Reshape, Sequential, Transform

__all__ = [
    "MLP",
    "AdditiveCoupling",
    "AffineCoupling",
    "ConvNet",
    "Permutation",
    "Reshape",
    "Sequential",
    "Transform",
    "alternating_mask",
    "checkerboard_mask",
]
