"""Data sets: real digits and densities in the plane built in, .npz, IDX and image folders by path."""

from pygen.data.dataset import Dataset
from pygen.data.densities import DENSITIES, Density
from pygen.data.idx import read_idx
from pygen.data.loaders import load

__all__ = ["DENSITIES", "Dataset", "Density", "load", "read_idx"]
