"""Where K-Means starts: k-means++ and random rows, drawn from chunks and from the shares of several processes alike."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.cluster._samples import Samples, block_sums

DRAWS_AT_ONCE = 64  # of a block of potentials each: 8 MiB
KEPT_PAIRS = 1 << 21  # 48 MiB
GATHERED = 1 << 20  # numbers of rows that are subtracted at once: 8 MiB
# Times D, more than the float64 rounding of |x|^2 + |c|^2 - 2 x.c relative to |x|^2 + |c|^2: (D + 2) 2^-52 in any order
# of summation (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1), the rest for small D.
ROUNDING = 2.0**-49


class Pairs(NamedTuple):
    """Rows of X and candidates that are nearer to them than any centre is."""

    row: Tensor  # (m,) int64
    candidate: Tensor  # (m,) int64
    squared: Tensor  # (m,) float64: their squared distance


def _running_sum(values: Tensor) -> Tensor:
    """cumsum along the last dimension, on the CPU: a GPU's is not deterministic."""
    return values.cpu().cumsum(-1).to(values.device)


def _locate(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds the target; at most the last one that adds anything."""
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    return torch.minimum(torch.searchsorted(cumulative, targets, right=True), last)


def _locate_row(potential: Tensor, prefix: Tensor, targets: Tensor, size: int) -> Tensor:
    """The row at which the running sum of the potential passes each target; prefix: that sum after each block."""
    rows = []
    for part in targets.split(DRAWS_AT_ONCE):
        block = _locate(prefix, part)
        before = torch.where(block > 0, prefix[(block - 1).clamp_min(0)], 0)
        inside = block[:, None] * size + torch.arange(size, device=potential.device)
        values = torch.where(inside < len(potential), potential[inside.clamp_max(len(potential) - 1)], 0)
        at = _locate(_running_sum(values), (part - before)[:, None])[:, 0]
        rows.append(block * size + at)
    return torch.cat(rows)


def draw(samples: Samples, potential: Tensor, shares: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows drawn in proportion to their potential (N,) float64, one for each number in [0, 1) of shares (m,).

    Returns (owned (m,) bool, row (m,)), which say for each draw whether the row is of this process and which one it is;
    None if all potentials of all processes are 0.
    """
    prefix = _running_sum(block_sums(potential, samples.block))
    totals = samples.from_ranks(prefix[-1] if len(prefix) else potential.new_zeros(()))
    upto = _running_sum(totals)
    if not upto[-1] > 0:
        return None
    targets = shares.to(potential) * upto[-1]
    rank = _locate(upto, targets)
    owned = rank == samples.rank
    row = torch.zeros_like(rank)
    if bool(owned.any()):
        row[owned] = _locate_row(potential, prefix, (targets - (upto - totals)[rank])[owned], samples.block)
    return owned, row


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, dtype=torch.float64, generator=generator)


def _rows(samples: Samples, potential: Tensor, shares: Tensor) -> Tensor:
    """(m, D): the rows drawn; by their weights where no potential is left and all rows are duplicates of centres."""
    drawn = draw(samples, potential, shares)
    if drawn is None:
        drawn = draw(samples, _weights(samples), shares)
    assert drawn is not None, "that some weight is positive is checked before"
    return samples.rows_of(*drawn)


def _weights(samples: Samples) -> Tensor:
    if samples.weights is not None:
        return samples.weights
    return torch.ones(samples.n, dtype=torch.float64, device=samples.device)


class _Nearest:
    """How far each row is from the nearest of the centres so far.

    A product says which rows a candidate may be nearer to, give or take a bound on its rounding; these are computed
    from x - c, row by row. So no bit depends on chunks, threads or the library of the product, and a row is at distance
    0 from itself. For the cosine all are unit vectors, whose squared distance is 2 (1 - cos).
    """

    def __init__(self, samples: Samples, first: Tensor) -> None:
        self.samples = samples
        self.squared, self.norm = torch.full((2, samples.n), math.inf, dtype=torch.float64, device=samples.device)
        self.kept: Pairs | None = None
        for start, chunk in samples.chunks():
            for _, where, rows in samples.blocks(chunk, start):
                self.squared[where] = (rows - samples.prepared(first)).square().sum(1)
                self.norm[where] = rows.square().sum(1)

    def _nearer(self, candidates: Tensor) -> Iterator[tuple[slice, Pairs]]:
        """(rows of X, the pairs in which a candidate is nearer) of each block."""
        norm, slack = candidates.square().sum(1), self.samples.d * ROUNDING
        at_once = max(1, GATHERED // self.samples.d)
        for start, chunk in self.samples.chunks():
            for _, where, rows in self.samples.blocks(chunk, start):
                scale = self.norm[where, None] + norm
                least = scale * (1 - slack) - 2 * (rows @ candidates.T)
                row, candidate = (least < self.squared[where, None]).nonzero().unbind(1)
                parts = [
                    (rows[i] - candidates[k]).square().sum(1)
                    for i, k in zip(row.split(at_once), candidate.split(at_once), strict=True)
                ]
                found = torch.cat(parts)
                better = found < self.squared[where][row]
                yield where, Pairs(row[better] + where.start, candidate[better], found[better])

    def gains(self, candidates: Tensor) -> Tensor:
        """(m,): by how much the potential of all processes would fall with each candidate (m, D) as a centre."""
        self.candidates = self.samples.prepared(candidates)
        local, size = self.squared.new_zeros(len(candidates)), 0
        kept: list[Pairs] = []
        for where, pairs in self._nearer(self.candidates):
            gain = local.new_zeros(where.stop - where.start, len(candidates))
            fall = self.squared[pairs.row] - pairs.squared
            gain[pairs.row - where.start, pairs.candidate] = self.samples.weighted(fall, pairs.row)
            local += gain.sum(0)
            size += len(fall)
            if size <= KEPT_PAIRS:
                kept.append(pairs)
        # Early centres are nearer to most rows: where that is too much to keep, `add` finds them again.
        self.kept = Pairs(*map(torch.cat, zip(*kept, strict=True))) if kept and size <= KEPT_PAIRS else None
        return _running_sum(self.samples.from_ranks(local).T)[:, -1]

    def add(self, chosen: int) -> None:
        """Make the candidate of this number, of those whose gains were computed last, a centre."""
        if self.kept is not None:
            mine = self.kept.candidate == chosen
            self.squared[self.kept.row[mine]] = self.kept.squared[mine]
            return
        for _, pairs in self._nearer(self.candidates[chosen : chosen + 1]):
            self.squared[pairs.row] = pairs.squared


def kmeans_plus_plus(samples: Samples, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(K, D) rows of X: each the best of 2 + floor(log K) drawn in proportion to w d^2 to the nearest one before it.

    Source: Arthur, Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007; the greedy choice is that
    of its section 6, with scikit-learn's number of candidates.
    """
    trials = 2 + int(math.log(n_clusters))
    weights = _weights(samples)
    rows = [_rows(samples, weights, _uniform(1, generator))[0]]
    nearest = _Nearest(samples, rows[0])
    while len(rows) < n_clusters:
        candidates = _rows(samples, samples.weighted(nearest.squared), _uniform(trials, generator))
        best = int(nearest.gains(candidates).argmax())
        rows.append(candidates[best])
        nearest.add(best)
    return torch.stack(rows)


def random_rows(samples: Samples, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(K, D) different rows of X, drawn one after the other in proportion to their weights."""
    left = _weights(samples).clone()
    rows: list[Tensor] = []
    while len(rows) < n_clusters:
        shares = _uniform(n_clusters - len(rows), generator)
        drawn = draw(samples, left, shares)
        if drawn is None:  # fewer rows of positive weight than centres
            rows.extend(_rows(samples, left, shares))
            break
        owned, row = drawn
        # Drawing again what was drawn before, and drawing from what is left, are the same law.
        names = samples.sum_over_ranks([torch.where(owned, row + samples.offset, 0).double()])[0]
        first = torch.tensor(_first_occurrences(names.tolist()), device=row.device)
        rows.extend(samples.rows_of(owned[first], row[first]))
        left[row[first][owned[first]]] = 0
    return torch.stack(rows)


def _first_occurrences(names: list[float]) -> list[int]:
    seen: dict[float, int] = {}
    for i, name in enumerate(names):
        seen.setdefault(name, i)
    return list(seen.values())


def subset(samples: Samples, size: int, generator: torch.Generator) -> Samples:
    """`size` different rows of X, drawn evenly and kept in memory, the same on all processes."""
    names: list[float] = []
    while len(names) < size:
        more = (_uniform(size, generator) * samples.total).floor().tolist()
        names = [*dict.fromkeys(names + more)][:size]
    chosen = torch.tensor(sorted(names), device=samples.device).long() - samples.offset
    owned = (chosen >= 0) & (chosen < samples.n)
    weights = torch.where(owned, _weights(samples)[chosen.clamp(0, max(samples.n - 1, 0))], 0) if samples.n else 0.0
    rows = samples.rows_of(owned, chosen)
    weights = samples.sum_over_ranks([weights + torch.zeros_like(rows[:, 0])])[0]
    return Samples(rows.to(samples.dtype), samples.metric, weights, samples.device, samples.chunk_size)
