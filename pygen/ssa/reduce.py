"""Statistics of an ensemble from exact integer sums: the same bits however its trajectories are cut up or spread out.

simulate.py adds block after block of counts, run.py asks for the statistics. Counts are integers up to 2^53, so a sum
of their products over 10^9 trajectories has 136 bits: it is kept as words of 20 bits, one int64 element each. A word
times a word has 40 bits, which leaves an int64 room for 2^21 trajectories before a carry.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pygen.ssa import _collective, engine

WORD = 20  # bits
_MASK = (1 << WORD) - 1
_LIMBS = 3  # words of one count: 60 bits >= 53
_INT64_BITS, _FLOAT64_BITS = 63, 53
_SUM_WORDS, _PRODUCT_WORDS = 5, 7  # 2^53 and 2^106 times 2^30 trajectories: 83 and 136 bits
_PIECE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}  # counts summed at a time: temporaries of 4 MiB stay in the cache
_PIECE_ROWS = {False: 1 << 20, True: 1 << 13}  # without and with cross products, by the room for carries
MAX_CELLS = 1 << 26  # of a histogram: 512 MiB


class ExactSum:
    """Sums of non-negative integers, [*shape], as words: int64 [words, *shape], each below 2^20."""

    def __init__(self, words: Tensor) -> None:
        self.words = words

    @classmethod
    def zeros(cls, words: int, shape: Sequence[int], device: torch.device) -> "ExactSum":
        return cls(torch.zeros(words, *shape, dtype=torch.int64, device=device))

    def add(self, partial: Tensor, word: int = 0) -> None:
        """Add partial * 2^(20 word); partial: int64 [*shape], non-negative."""
        for k in range(word, min(word + 4, len(self.words))):  # 63 bits are four words
            self.words[k] += (partial >> (WORD * (k - word))) & _MASK

    def carry(self) -> None:
        """Bring every word below 2^20 again; due before a word has taken 2^43 additions."""
        for k in range(len(self.words) - 1):
            self.words[k + 1] += self.words[k] >> WORD
            self.words[k] &= _MASK

    def merge(self, group: object) -> None:
        self.words = _collective.sum_over_ranks(self.words, group)
        self.carry()

    def integers(self) -> np.ndarray:
        """The sums as Python integers: an object array [*shape]."""
        words = self.words.cpu().numpy()
        total = np.zeros(words.shape[1:], dtype=object)
        for word in words[::-1]:
            total = (total << WORD) + word.astype(object)
        return total


def _limbs(x: Tensor, fits: bool) -> list[Tensor]:
    """x as words of 20 bits, lowest first; x itself where its sums fit as they are."""
    return [x] if fits else [(x >> (WORD * k)) & _MASK for k in range(_LIMBS)]


def _present(counts: Tensor, lowest: int) -> Tensor | None:
    """Which rows [n, T] have a value; None where all have."""
    return None if lowest >= 0 else counts[:, :, 0] >= 0


class Moments:
    """Sums of counts and of their squares, or of all products of two species, for every time.

    Args:
        n_times, n_species: shape of the counts, [n, T, K].
        cross: keep the products of different species too.
        device: of the counts.
    """

    def __init__(self, n_times: int, n_species: int, cross: bool, device: torch.device) -> None:
        self.cross = cross
        shape = (n_times, n_species)
        self.present = torch.zeros(n_times, dtype=torch.int64, device=device)
        self.sums = ExactSum.zeros(_SUM_WORDS, shape, device)
        self.products = ExactSum.zeros(_PRODUCT_WORDS, (*shape, n_species) if cross else shape, device)

    def add(self, counts: Tensor) -> None:
        """Take in counts, int64 [n, T, K]; rows of -1 are left out."""
        per_row = max(1, counts.size(1) * counts.size(2))
        rows = min(_PIECE_ELEMENTS[counts.device.type] // per_row + 1, _PIECE_ROWS[self.cross])
        for piece in counts.split(rows) if len(counts) else ():
            lowest, highest = (int(x) for x in piece.aminmax())
            present = _present(piece, lowest)
            if present is None:
                self.present += len(piece)
            else:
                self.present += present.sum(0)
                piece = piece.clamp_min(0)
            self._add_sums(piece, highest)
            self._add_products(piece, highest)
        self.sums.carry()
        self.products.carry()

    def _add_sums(self, x: Tensor, highest: int) -> None:
        for k, limb in enumerate(_limbs(x, len(x) * highest < 1 << _INT64_BITS)):
            self.sums.add(limb.sum(0), k)

    def _add_products(self, x: Tensor, highest: int) -> None:
        # The matrix product is computed in float64, exactly: no partial sum needs more than its 53 bits.
        limbs = _limbs(x, len(x) * highest**2 < 1 << (_FLOAT64_BITS if self.cross else _INT64_BITS))
        if self.cross:
            limbs = [limb.transpose(0, 1).double() for limb in limbs]  # [T, n, K]
        for i, a in enumerate(limbs):
            for j, b in enumerate(limbs):
                if self.cross:
                    self.products.add((a.mT @ b).long(), i + j)
                elif i <= j:
                    self.products.add((a * b).sum(0) * (1 if i == j else 2), i + j)

    def merge(self, group: object) -> None:
        self.present = _collective.sum_over_ranks(self.present, group)
        self.sums.merge(group)
        self.products.merge(group)

    def mean(self) -> np.ndarray:
        """float64 [T, K], correctly rounded; NaN where no trajectory has a value."""
        result = np.full(self.sums.words.shape[1:], np.nan)
        for t, (n, total) in enumerate(zip(self.present.tolist(), self.sums.integers(), strict=True)):
            if n > 0:
                result[t] = total / n
        return result

    def covariance(self) -> np.ndarray:
        """float64, unbiased, correctly rounded: [T, K] variances, or [T, K, K] where the cross products were kept."""
        result = np.full(self.products.words.shape[1:], np.nan)
        for t, n in enumerate(self.present.tolist()):
            if n > 1:  # time by time: Python integers take many times the memory of the result
                total = ExactSum(self.sums.words[:, t]).integers()
                squares = total[:, None] * total[None, :] if self.cross else total**2
                result[t] = (n * ExactSum(self.products.words[:, t]).integers() - squares) / (n * (n - 1))
        return result

    def variance(self) -> np.ndarray:
        """float64 [T, K], unbiased."""
        covariance = self.covariance()
        return np.diagonal(covariance, axis1=1, axis2=2).copy() if self.cross else covariance

    def arrays(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """What to save: names, dimensions, tensors."""
        other = ("other_species",) if self.cross else ()
        return {
            "present": (("time",), self.present),
            "sum_words": (("sum_word", "time", "species"), self.sums.words),
            "product_words": (("product_word", "time", "species", *other), self.products.words),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Moments":
        """What `arrays` took apart."""
        result = cls(0, 0, tensors["product_words"].dim() == 4, torch.device("cpu"))
        result.present = tensors["present"]
        result.sums, result.products = ExactSum(tensors["sum_words"]), ExactSum(tensors["product_words"])
        return result


class Histogram:
    """How many trajectories have each count, for one species at every time.

    Without edges there is one bin for every integer between the smallest and the largest count seen so far, so that
    nothing is lost. With edges, bin b holds e_b <= count < e_{b+1}, the last one e_{B} too, as numpy's does, and counts
    outside are left out.

    Args:
        name: of the species, for messages.
        n_times: T.
        edges: float64 [B + 1], ascending, or None.
        device: of the counts.
    """

    def __init__(self, name: str, n_times: int, edges: np.ndarray | None, device: torch.device) -> None:
        self.name, self.n_times, self.edges = name, n_times, edges
        self.low = 0  # the count of bin 0
        self.cells = torch.zeros(n_times, 0 if edges is None else len(edges) - 1, dtype=torch.int64, device=device)
        self._bounds = None if edges is None else torch.from_numpy(edges).to(device)

    def add(self, counts: Tensor) -> None:
        """Take in counts, int64 [n, T]; those of -1 are left out."""
        if counts.numel():
            for piece in counts.split(_PIECE_ELEMENTS[counts.device.type] // self.n_times + 1):
                self._add(piece)

    def _add(self, counts: Tensor) -> None:
        lowest, highest = (int(x) for x in counts.aminmax())
        inside = None if lowest >= 0 else counts >= 0
        if inside is not None:
            if highest < 0:
                return
            lowest = int(counts[inside].min())
        if self._bounds is None:
            self._grow(lowest, highest)
            bins = counts - self.low
        else:
            bins, inside = self._between_edges(counts, inside)
        # In one row of all cells: bin + bins * time.
        n_bins = self.cells.size(1)
        index = bins + n_bins * torch.arange(self.n_times, device=counts.device)
        index = index[inside] if inside is not None else index.flatten()
        one = torch.ones(1, dtype=torch.int64, device=counts.device)
        self.cells.view(-1).scatter_add_(0, index, one.expand(index.numel()))

    def _between_edges(self, counts: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._bounds is not None
        x = counts.double()
        inside_edges = (x >= self._bounds[0]) & (x <= self._bounds[-1])
        bins = torch.bucketize(x, self._bounds, right=True).clamp_max(len(self._bounds) - 1) - 1
        return bins, inside_edges if inside is None else inside_edges & inside

    def _grow(self, lowest: int, highest: int) -> None:
        """Widen the bins so that they reach from `lowest` to `highest`, exactly as far as needed."""
        n_bins = self.cells.size(1)
        if n_bins:
            lowest, highest = min(lowest, self.low), max(highest, self.low + n_bins - 1)
        width = highest - lowest + 1
        if width == n_bins:
            return
        if width * self.n_times > MAX_CELLS:
            raise ValueError(
                f"histogram: {self.name} ranges over {lowest}..{highest} at {self.n_times} times, more than "
                f"{MAX_CELLS} bins of width 1; give edges, as bins={{{self.name!r}: [0, 1000, 2000]}}"
            )
        wider = self.cells.new_zeros(self.n_times, width)
        if n_bins:
            wider[:, self.low - lowest : self.low - lowest + n_bins] = self.cells
        self.low, self.cells = lowest, wider

    def merge(self, group: object) -> None:
        if self.edges is None:
            # A rank without trajectories has no range: it takes that of the others.
            n_bins = self.cells.size(1)
            ends = (-self.low, self.low + n_bins - 1) if n_bins else (-(1 << 62), -1)
            range_ = _collective.max_over_ranks(torch.tensor(ends), group)
            if range_[1] >= 0:
                self._grow(-int(range_[0]), int(range_[1]))
        self.cells = _collective.sum_over_ranks(self.cells, group)

    def axis(self) -> np.ndarray:
        """The count of every bin, int64 [B]; or the edges, float64 [B + 1]."""
        return np.arange(self.low, self.low + self.cells.size(1)) if self.edges is None else self.edges

    def quantile(self, q: float) -> np.ndarray:
        """float64 [T]: the smallest count v with P(count <= v) >= q, from bins of width 1."""
        cumulated = self.cells.cumsum(1).cpu().numpy()
        result = np.full(self.n_times, np.nan)
        for t, row in enumerate(cumulated):
            if len(row) and row[-1] > 0:
                result[t] = self.low + np.searchsorted(row, quantile_rank(q, int(row[-1])))
        return result


def quantile_rank(q: float, n: int) -> int:
    """Which of n sorted values, counted from 1, is their q-quantile: the inverse of the distribution function."""
    return min(max(math.ceil(q * n), 1), n)


class Reduction:
    """Everything that a run keeps instead of its trajectories.

    Args:
        wanted: some of "moments", "covariance", "histogram", "first_passage".
        species: the K recorded ones.
        n_times: T.
        trajectories: how many will be added.
        edges: of the histograms of some species.
        device: of the blocks.
    """

    def __init__(
        self,
        wanted: Sequence[str],
        species: Sequence[str],
        n_times: int,
        trajectories: int,
        edges: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        self.moments: Moments | None = None
        self.histograms: dict[str, Histogram] = {}
        self.stop_time: Tensor | None = None
        self.status_counts = torch.zeros(len(engine.STATUS_NAMES), dtype=torch.int64)
        self.n_events = torch.zeros((), dtype=torch.int64)
        if "moments" in wanted or "covariance" in wanted:
            self.moments = Moments(n_times, len(species), "covariance" in wanted, device)
        if "histogram" in wanted:
            self.histograms = {name: Histogram(name, n_times, edges.get(name), device) for name in species}
        if "first_passage" in wanted:
            self.stop_time = torch.full((trajectories,), torch.inf, dtype=torch.float64)

    def add(self, block: engine.Block, begin: int) -> None:
        """Take in a block whose row 0 is the trajectory number `begin` of those that will be added."""
        if self.moments is not None:
            self.moments.add(block.counts)
        for k, histogram in enumerate(self.histograms.values()):
            histogram.add(block.counts[:, :, k])
        if self.stop_time is not None:
            self.stop_time[begin : begin + len(block.status)] = block.stop_time.cpu()
        self.status_counts += block.status.long().bincount(minlength=len(engine.STATUS_NAMES)).cpu()
        self.n_events += block.n_events.sum().cpu()

    def merge(self, group: object, begin: int, total: int) -> None:
        """Put together what all ranks of a group have; on every rank the same comes out.

        Args:
            group: the process group; None: nothing to do.
            begin: the number, among all `total` trajectories, of this rank's first one.
        """
        if group is None:
            return
        if self.moments is not None:
            self.moments.merge(group)
        for histogram in self.histograms.values():
            histogram.merge(group)
        if self.stop_time is not None:
            # The bits of float64 as integers, and 0 where another rank has them: nothing is rounded.
            bits = torch.zeros(total, dtype=torch.int64)
            bits[begin : begin + len(self.stop_time)] = self.stop_time.view(torch.int64)
            self.stop_time = _collective.sum_over_ranks(bits, group).view(torch.float64)
        self.status_counts = _collective.sum_over_ranks(self.status_counts, group)
        self.n_events = _collective.sum_over_ranks(self.n_events, group)
