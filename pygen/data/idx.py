"""Reader of the IDX format, in which MNIST and its relatives are published."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file, gzipped or not.

    Format: two zero bytes, a type code, the rank, one big-endian uint32 per dimension, then the elements.

    Args:
        path: the file.

    Returns:
        An array of the file's rank, in native byte order.

    Raises:
        ValueError: the file is not IDX, is truncated, or is damaged. OSError: it cannot be read.

    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits".
    """
    raw = Path(path).read_bytes()
    try:
        data = gzip.decompress(raw) if raw[:2] == _GZIP else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise ValueError(f"{path}: not an IDX file (it must begin with two zero bytes and a type code)")
    dtype, rank = np.dtype(_DTYPES[data[2]]), data[3]
    start = 4 + 4 * rank
    if len(data) < start:
        raise ValueError(f"{path}: truncated IDX file, its header of {start} bytes is not complete")
    shape = tuple(np.frombuffer(data, ">u4", rank, 4).tolist())
    expected = start + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ValueError(f"{path}: damaged IDX file, its header {shape} asks for {expected} bytes, it has {len(data)}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
