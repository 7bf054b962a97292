"""The rows that K-Means runs over, read a chunk at a time wherever they lie: tensor, array, file, one share of many.

_seeding.py and _lloyd.py see nothing of X but this; estimator.py and kmeans.py make it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from pygen.nn._codebook_sync import all_reduce_packed, rank_and_size

METRICS = ("euclidean", "cosine")
# Sums are formed of a block of rows at a time and added in order, whatever is read at once, so that no bit depends on
# chunk_size. A block's length depends on D alone: 2^21 numbers (16 MiB of float64), so that adding up K x D sums costs
# little beside finding them; but below the 32768 from which on torch splits a sum by the number of threads.
BLOCK_ELEMENTS, LEAST_BLOCK, MOST_BLOCK = 1 << 21, 256, 1 << 14
CHUNK_ELEMENTS = 1 << 22  # of X, held at a time unless chunk_size says otherwise: 16 MiB of float32


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def block_sums(values: Tensor, block: int) -> Tensor:
    """(n,) -> (ceil(n / block),): the sum of each block."""
    return pad(values, (0, -len(values) % block)).view(-1, block).sum(1)


def as_rows(x: Any, what: str = "X") -> Any:
    """x as something (N, D) that can be sliced: a tensor or an array-like, which is not read here."""
    if hasattr(x, "toarray"):
        raise TypeError(f"{what} must be dense, got {type(x).__name__}: call its toarray()")
    if not isinstance(x, Tensor) and not all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")):
        x = np.asarray(x)
    if len(x.shape) != 2:
        raise ValueError(f"{what} must be (samples, features), got shape {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{what} must have a feature, got shape {tuple(x.shape)}")
    return x


def as_tensor(values: Any) -> Tensor:
    """A floating-point tensor of some rows; integers of up to 16 bits become float32, longer ones float64."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"X must be of real numbers, got {array.dtype}")
        wide = array.dtype.itemsize > (4 if array.dtype.kind == "f" else 2)
        plain = array.dtype == np.float16
        # A file's pages may be read-only, of another byte order or longer than a double: torch takes none of them.
        target = np.float16 if plain else np.float64 if wide else np.float32
        array = np.ascontiguousarray(array, dtype=target)
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.is_complex():
        raise TypeError(f"X must be of real numbers, got {values.dtype}")
    if not values.is_floating_point():
        values = values.to(torch.float64 if values.dtype.itemsize > 2 else torch.float32)
    return values


class Samples:
    """X (N, D), the part of it that this process has, with the weights of its rows.

    Args:
        x: tensor, array, memory map, or anything with shape, dtype and slices of rows.
        metric: "cosine" makes the rows of `prepared` unit vectors.
        weights: (N,), not negative; None for all 1.
        device: where to compute; by default where a tensor is, and the CPU for the others.
        chunk_size: rows read at once, rounded up to whole blocks; by default CHUNK_ELEMENTS numbers.
        sync: False: this process alone; True: X is spread over all processes; or over those of a process group.
    """

    def __init__(
        self,
        x: Any,
        metric: str = "euclidean",
        weights: Any = None,
        device: Any = None,
        chunk_size: int | None = None,
        sync: Any = False,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        check_sync(sync)
        self.x, self.metric = as_rows(x), metric
        self.n, self.d = (int(size) for size in self.x.shape)
        if device is None:
            device = self.x.device if isinstance(self.x, Tensor) else "cpu"
        self.device = torch.device(device)
        rows = chunk_size or max(1, min(1 << 16, CHUNK_ELEMENTS // self.d))
        fitting = 1 << max(0, (BLOCK_ELEMENTS // self.d).bit_length() - 1)
        self.block = min(max(fitting, LEAST_BLOCK), MOST_BLOCK)  # a power of two
        self.chunk_size = -(-rows // self.block) * self.block
        self.dtype = torch.float64 if self.read(0, 0).dtype == torch.float64 else torch.float32  # of the centres
        self.weights = None if weights is None else self._checked_weights(weights)
        self.sync = sync
        self.group = None if isinstance(sync, bool) else sync
        self.rank, self.ranks = rank_and_size(self.group) if sync is not False else (0, 1)
        sizes = self.from_ranks(torch.tensor(float(self.n), device=self.device, dtype=torch.float64))
        self.total, self.offset = int(sizes.sum()), int(sizes[: self.rank].sum())

    def _checked_weights(self, weights: Any) -> Tensor:
        weights = torch.as_tensor(np.asarray(weights) if not isinstance(weights, Tensor) else weights)
        weights = weights.detach().to(self.device, torch.float64)
        if weights.shape != (self.n,):
            raise ValueError(f"sample_weight must be ({self.n},), a number for each sample, got {tuple(weights.shape)}")
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("sample_weight must be finite and not negative")
        return weights

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1 of this process, on the device."""
        return as_tensor(self.x[start:stop]).detach().to(self.device)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, rows (n, D)) of one chunk after the other."""
        for start in range(0, self.n, self.chunk_size):
            yield start, self.read(start, min(start + self.chunk_size, self.n))

    def prepared(self, rows: Tensor) -> Tensor:
        """Rows as they enter sums: float64, and for the cosine of length 1."""
        rows = rows.double()
        return unit(rows) if self.metric == "cosine" else rows

    def blocks(self, chunk: Tensor, start: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """(where in the chunk, where in X, prepared rows (at most block, D)) of the chunk that begins at row start."""
        for first in range(0, len(chunk), self.block):
            last = min(first + self.block, len(chunk))
            yield slice(first, last), slice(start + first, start + last), self.prepared(chunk[first:last])

    def weighted(self, values: Tensor, where: slice | Tensor = slice(None)) -> Tensor:
        """values (n,) times the weights of these rows."""
        return values if self.weights is None else values * self.weights[where]

    def sum_over_ranks(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor summed over the processes, in one all-reduce."""
        return list(tensors) if self.ranks == 1 else all_reduce_packed(tensors, self.group)

    def from_ranks(self, value: Tensor) -> Tensor:
        """(ranks, ...): the float64 value of every process."""
        values = value.new_zeros(self.ranks, *value.shape)
        values[self.rank] = value
        return self.sum_over_ranks([values])[0]

    def rows_of(self, owned: Tensor, local: Tensor) -> Tensor:
        """(m, D) float64, alike on all processes: row local[i] of the one where owned[i]."""
        rows = torch.zeros(len(local), self.d, dtype=torch.float64, device=self.device)
        names = local[owned].tolist()
        if names and isinstance(self.x, Tensor | np.ndarray):
            rows[owned] = as_tensor(self.x[names]).detach().to(self.device).double()
        elif names:  # a file's own array type, of which only slices are asked
            rows[owned] = torch.cat([self.read(name, name + 1) for name in names]).double()
        return self.sum_over_ranks([rows])[0]

    def variance(self) -> float:
        """The mean over the features of the variance of all prepared rows; raises where a value is not finite.

        Blocks are joined as in Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979: accurate far from the origin.
        """
        count = 0
        mean, squares = torch.zeros(2, self.d, dtype=torch.float64, device=self.device)
        bad = torch.zeros((), dtype=torch.int64, device=self.device)
        for start, chunk in self.chunks():
            bad += (~chunk.isfinite()).any(1).sum()
            for _, _, rows in self.blocks(chunk, start):
                n, own = len(rows), rows.mean(0)
                delta, joined = own - mean, count + n
                squares = squares + (rows - own).square().sum(0) + delta.square() * (count * n / joined)
                mean, count = mean + delta * (n / joined), joined
        total, bad = self.sum_over_ranks([mean * count, bad])
        if bad:
            raise ValueError(f"X must be finite, got {int(bad)} rows with NaN or infinity")
        squares = self.sum_over_ranks([squares + count * (mean - total / max(self.total, 1)).square()])[0]
        return float(squares.mean()) / max(self.total, 1)

    def broadcast_seed(self, seed: int) -> int:
        """The first process's seed, on all of them."""
        return int(self.from_ranks(torch.tensor(float(seed), dtype=torch.float64, device=self.device))[0])


def check_sync(sync: Any) -> None:
    """Raise unless sync is a bool or a process group."""
    if isinstance(sync, bool):
        return
    if not distributed.is_available() or not isinstance(sync, distributed.ProcessGroup):
        raise TypeError(f"sync must be True, False or a process group, got {type(sync).__name__}")
