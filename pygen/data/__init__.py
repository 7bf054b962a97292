"""Data sets: real digits built in, .npz, IDX and image folders by path."""

from pygen.data.dataset import Dataset
from pygen.data.idx import read_idx
from pygen.data.loaders import load

__all__ = ["Dataset", "load", "read_idx"]
