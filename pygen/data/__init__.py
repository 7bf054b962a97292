"""Data sets: real digits, densities in the plane and a toy grammar built in; .npz, IDX, image folders and texts by
path."""

from pygen.data.dataset import Dataset
from pygen.data.densities import DENSITIES, Density
from pygen.data.grammar import PCFG
from pygen.data.idx import read_idx
from pygen.data.loaders import load
from pygen.data.trees import Tree, read_trees, write_trees

__all__ = ["DENSITIES", "PCFG", "Dataset", "Density", "Tree", "load", "read_idx", "read_trees", "write_trees"]
