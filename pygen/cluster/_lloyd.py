"""Lloyd's algorithm over `Samples`: assign, average, repair, until nothing moves. kmeans.py chooses among its runs.

The assignment is `ops.nearest_codebook`, the averages are `ops.codebook_statistics`; sums are float64 throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pygen.cluster._samples import Samples, unit
from pygen.ops import codebook_statistics, nearest_codebook

TABLE_ELEMENTS = 1 << 22  # of a table of distances (rows, K), at most this many at a time: 32 MiB
# Squared distances below this share of |x|^2 + |c|^2 are computed again from x - c: above it, the cancellation in
# |x|^2 - 2 x.c + |c|^2 has cost no more than 10 of float64's 53 bits.
CANCELLED = 2.0**-10


class Sums(NamedTuple):
    """What the rows say about the centres; everything is summed over chunks and processes."""

    weights: Tensor  # (K,) float64
    counts: Tensor  # (K,) float64: rows of positive weight
    sums: Tensor  # (K, D) float64, of prepared rows times their weights
    changed: Tensor  # () float64: rows whose label is not what it was


def zero_sums(samples: Samples, k: int) -> Sums:
    weights, counts = torch.zeros(2, k, dtype=torch.float64, device=samples.device)
    return Sums(weights, counts, weights.new_zeros(k, samples.d), weights.new_zeros(()))


def over_ranks(samples: Samples, sums: Sums) -> Sums:
    return Sums(*samples.sum_over_ranks(sums))


def assign(samples: Samples, centers: Tensor, labels: Tensor, with_sums: bool = True) -> Sums:
    """Write the nearest centres into labels (N,) int32 and return the sums; without them, only `changed` is counted."""
    k = len(centers)
    result = zero_sums(samples, k if with_sums else 0)
    for start, chunk in samples.chunks():
        nearest = nearest_codebook(chunk, centers, metric=samples.metric)
        before = labels[start : start + len(chunk)]
        result.changed.add_((nearest != before).sum())
        before.copy_(nearest)
        for inside, where, rows in samples.blocks(chunk, start) if with_sums else ():
            chosen = nearest[inside]
            if samples.weights is None:
                counts, sums = codebook_statistics(rows, chosen, k)
                result.weights.add_(counts)
            else:
                weights = samples.weights[where]
                rows = torch.cat((rows * weights[:, None], weights[:, None]), 1)
                counts, sums = codebook_statistics(rows, torch.where(weights > 0, chosen, -1), k)
                result.weights.add_(sums[:, -1])
            result.counts.add_(counts)
            result.sums.add_(sums[:, : samples.d])
    return over_ranks(samples, result)


def distances_to_own(samples: Samples, centers: Tensor, labels: Tensor, chunk: Tensor, start: int) -> Tensor:
    """(n,) float64: |x - c|^2 to the labelled centre; for the cosine half of it between unit vectors, 1 - cos."""
    wide = samples.prepared(centers)
    parts = [(rows - wide[labels[where].long()]).square().sum(1) for _, where, rows in samples.blocks(chunk, start)]
    return torch.cat(parts) / (2 if samples.metric == "cosine" else 1)


def inertia(samples: Samples, centers: Tensor, labels: Tensor) -> Tensor:
    """() float64: the weighted sum of the distances to the labelled centres, over all processes."""
    total = torch.zeros((), dtype=torch.float64, device=samples.device)
    for start, chunk in samples.chunks():
        own = distances_to_own(samples, centers, labels, chunk, start)
        for part in samples.weighted(own, slice(start, start + len(chunk))).split(samples.block):
            total += part.sum()
    return samples.sum_over_ranks([total])[0]


def cluster_weights(samples: Samples, labels: Tensor, k: int) -> Tensor:
    """(K,) float64: the weight of the rows of each label, over all processes."""
    total = torch.zeros(k, dtype=torch.float64, device=samples.device)
    for first in range(0, samples.n, samples.block):
        where = slice(first, min(first + samples.block, samples.n))
        ones = total.new_ones(where.stop - first)
        total += codebook_statistics(samples.weighted(ones, where)[:, None], labels[where].long(), k)[1][:, 0]
    return samples.sum_over_ranks([total])[0]


def _farthest(samples: Samples, centers: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(distance, row), each at most (size,): this process's rows of positive weight farthest from their centres.

    In falling order; of equal ones the first row comes first.
    """
    best = torch.zeros(0, dtype=torch.float64, device=samples.device)
    names = torch.zeros(0, dtype=torch.int64, device=samples.device)
    for start, chunk in samples.chunks():
        own = distances_to_own(samples, centers, labels, chunk, start)
        if samples.weights is not None:
            own = torch.where(samples.weights[start : start + len(chunk)] > 0, own, 0)
        best = torch.cat((best, own))
        names = torch.cat((names, start + torch.arange(len(chunk), device=own.device)))
        best, order = best.sort(descending=True, stable=True)
        best, names = best[:size], names[order[:size]]
    return best, names


def repair(samples: Samples, centers: Tensor, labels: Tensor, found: Sums) -> Sums:
    """Give every empty cluster a row: those farthest from their centres leave their clusters and become centres.

    As in scikit-learn: the farthest row for the first empty cluster, and so on; rows that lie on their centre stay.
    The same on all processes, whichever of them has the row.
    """
    empty = (found.counts == 0).nonzero().flatten()
    if not len(empty):
        return found
    size = len(empty)
    distance, row = _farthest(samples, centers, labels, size)
    padded = distance.new_zeros(size)
    padded[: len(distance)] = distance
    everyones, order = samples.from_ranks(padded).flatten().sort(descending=True, stable=True)
    order = order[:size][everyones[:size] > 0]
    owned = order // size == samples.rank
    local = torch.zeros_like(order)
    local[owned] = row[order[owned] % size]
    facts = torch.zeros(len(order), 2, dtype=torch.float64, device=samples.device)  # weight and label
    facts[owned, 0] = samples.weighted(facts.new_ones(int(owned.sum())), local[owned])
    facts[owned, 1] = labels[local[owned]].double()
    weight, old = samples.sum_over_ranks([facts])[0].unbind(1)
    moved = samples.prepared(samples.rows_of(owned, local)) * weight[:, None]
    weights, counts, sums = found.weights.clone(), found.counts.clone(), found.sums.clone()
    for new, left, w, vector in zip(empty.tolist(), old.long().tolist(), weight, moved, strict=False):
        weights[left] -= w
        counts[left] -= 1
        sums[left] -= vector
        weights[new], counts[new], sums[new] = w, 1, vector
    # What subtraction leaves of a cluster without rows is rounding.
    return Sums(torch.where(counts > 0, weights, 0), counts, sums, found.changed)


def average(samples: Samples, centers: Tensor, found: Sums) -> Tensor:
    """The centres (K, D) that the sums stand for; a cluster that is still empty joins the heaviest one."""
    filled = found.weights > 0
    means = found.sums / torch.where(filled, found.weights, 1)[:, None]
    if samples.metric == "cosine":  # vectors that cancel have no direction: their centre stays
        means = torch.where(means.square().sum(1, keepdim=True) > 0, unit(means), centers.double())
    means = torch.where(filled[:, None], means, means[found.weights.argmax()])
    return means.to(samples.dtype)


def distance_table(samples: Samples, rows: Tensor, centers: Tensor) -> Tensor:
    """(n, K) float64: |x - c|^2, or 1 - cos, of prepared rows and centres; 0 where they are equal.

    A float64 product about the centres' mean, where no TF32 can enter; what cancels is computed from x - c.
    """
    middle = 0 if samples.metric == "cosine" else centers.mean(0)
    x, c = rows - middle, centers - middle
    scale = x.square().sum(1, keepdim=True) + c.square().sum(1)
    table = (scale - 2 * (x @ c.T)).clamp_min_(0)
    close = (table <= CANCELLED * scale).nonzero()
    for i, k in (part.unbind(1) for part in close.split(max(1, TABLE_ELEMENTS // samples.d))):
        table[i, k] = (rows[i] - centers[k]).square().sum(1)
    return table / 2 if samples.metric == "cosine" else table


def table_rows(samples: Samples, k: int) -> int:
    """How many rows of distances to k centres to hold at once: a power of two, so that a block is a multiple of it."""
    return min(samples.block, 1 << max(0, (TABLE_ELEMENTS // k).bit_length() - 1))


def responsibilities(samples: Samples, rows: Tensor, centers: Tensor, temperature: float) -> Tensor:
    """(n, K) float64: softmax over the centres of -distance / temperature."""
    return (distance_table(samples, rows, centers) / -temperature).softmax(1)


def assign_softly(samples: Samples, centers: Tensor, temperature: float) -> Sums:
    """The sums of all rows for all centres, by their responsibilities; `counts` and `changed` stay 0."""
    result = zero_sums(samples, len(centers))
    wide, size = samples.prepared(centers), table_rows(samples, len(centers))
    for start, chunk in samples.chunks():
        for _, where, rows in samples.blocks(chunk, start):
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                share = responsibilities(samples, part, wide, temperature)
                if samples.weights is not None:
                    share *= samples.weights[where][first : first + size, None]
                result.weights.add_(share.sum(0))
                result.sums.add_(share.T @ part)
    return over_ranks(samples, result)


class Lloyd:
    """One run from given centres (K, D). After `run`, the best that it found, also if it was interrupted.

    Attributes:
        centers: (K, D), of samples.dtype. labels: (N,) int32, the nearest centres. inertia: () float64.
        n_iter: iterations done. converged: whether the last one was within the tolerance.
    """

    def __init__(self, samples: Samples, centers: Tensor, temperature: float | None = None) -> None:
        self.samples, self.temperature = samples, temperature
        self.centers = samples.prepared(centers).to(samples.dtype)
        self.labels = torch.full((samples.n,), -1, dtype=torch.int32, device=samples.device)
        self.inertia = torch.tensor(torch.inf, dtype=torch.float64, device=samples.device)
        self.n_iter, self.converged = 0, False

    def _step(self) -> tuple[Tensor, bool]:
        """(new centres, whether no label changed)."""
        samples = self.samples
        if self.temperature is not None:
            found = assign_softly(samples, self.centers, self.temperature)
            means = average(samples, self.centers, found)
            return torch.where((found.weights > 0)[:, None], means, self.centers), False
        found = assign(samples, self.centers, self.labels)
        return average(samples, self.centers, repair(samples, self.centers, self.labels, found)), not found.changed

    def run(self, max_iter: int, tolerance: float, after: Callable[["Lloyd"], None] | None = None) -> "Lloyd":
        """Iterate until no label changes, or the squared shift of the centres is within the tolerance.

        `after` is called with the run after every iteration.
        """
        same_labels = False
        while self.n_iter < max_iter and not self.converged:
            centers, same_labels = self._step()
            shift = (centers.double() - self.centers.double()).square().sum()
            self.centers, self.n_iter = centers, self.n_iter + 1
            self.converged = same_labels or bool(shift <= tolerance)
            if after is not None:
                after(self)
        if not same_labels:  # the labels are those of the centres before the last step
            assign(self.samples, self.centers, self.labels, with_sums=False)
        self.inertia = inertia(self.samples, self.centers, self.labels)
        return self
