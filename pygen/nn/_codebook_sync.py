"""How the codebooks of several processes stay equal: what they sum, in one all-reduce, and how they choose data vectors
together. _codebook.py records and applies the sums; torch.distributed carries them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """This process's rank and the number of processes; asked at every step, as the group may come after the module."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not one of its ranks")
    return rank, distributed.get_world_size(group)


def all_reduce_packed(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
    """The sum over all processes of every tensor, in one all-reduce; one process alone gets its tensors back.

    Every process has to give as many tensors of the same shapes and dtypes, on one device. Integers travel as float64,
    in which sums up to 2^53 are exact.
    """
    if rank_and_size(group)[1] == 1 or not sum(t.numel() for t in tensors):
        return list(tensors)
    narrow = all(t.is_floating_point() and t.dtype != torch.float64 for t in tensors)
    flat = torch.cat([t.reshape(-1).to(torch.float32 if narrow else torch.float64) for t in tensors])
    distributed.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


class CodebookStatistics(NamedTuple):
    """What one codebook learns from a step. Every field is summed over the processes; its shape is always the same."""

    uses: Tensor  # (1,): in how many forwards it was collected; 0 for a codebook that was not used
    counts: Tensor  # (H, K): how many vectors chose each code
    sums: Tensor  # (H, K, D): and their sum
    proposals: Tensor  # (H, P, D): vectors of the batch that may replace a dead code; P is 0 where none is replaced
    keys: Tensor  # (H, P): their random order, in (0, 1]; 0 where there is no vector

    def followed_by(self, later: "CodebookStatistics", decay: float) -> "CodebookStatistics":
        """The statistics of two uses in a row: as if each had gone into the moving average by itself.

        a <- d a + (1 - d) s, twice, is a <- d^2 a + (1 - d) (d s_1 + s_2): sums and counts are joined here, and the
        power of d is the number of uses.
        """
        chosen = later.keys > self.keys
        return CodebookStatistics(
            self.uses + later.uses,
            decay * self.counts + later.counts,
            decay * self.sums + later.sums,
            torch.where(chosen[..., None], later.proposals, self.proposals),
            torch.where(chosen, later.keys, self.keys),
        )


class SynchronizedCodebook(nn.Module):
    """A codebook whose updates `packed_codebook_updates` can collect; _codebook.py's is the one there is.

    Attributes:
        decay: of the moving averages. cluster_size: that of counts, (H, K).
        sync: False keeps this process's statistics to itself.
        pending: None, or the statistics recorded so far in the `packed_codebook_updates` around this forward.
    """

    decay: float
    cluster_size: Tensor
    sync: bool | None = None
    pending: list[CodebookStatistics] | None = None

    def empty_statistics(self) -> CodebookStatistics | None:
        """Statistics of no use at all; None from a codebook that is not being updated."""
        raise NotImplementedError

    def apply_statistics(self, statistics: CodebookStatistics) -> None:
        """Update the codebook by what all processes saw."""
        raise NotImplementedError

    def update(self, statistics: CodebookStatistics) -> None:
        """Apply this process's statistics with those of the others: now, or at the end of the surrounding block."""
        # In one dtype, whatever that of this process's input: others may send `empty_statistics`.
        statistics = CodebookStatistics(*(field.to(self.cluster_size.dtype) for field in statistics))
        if self.pending is not None:
            self.pending.append(statistics)
            return
        if self.sync is not False:
            (statistics,) = _over_processes([statistics])
        self.apply_statistics(statistics)

    def take_pending(self) -> CodebookStatistics | None:
        """Leave the block: the statistics of all its uses of this codebook."""
        recorded, self.pending = self.pending or [], None
        if not recorded:
            return None
        joined = recorded[0]
        for statistics in recorded[1:]:
            joined = joined.followed_by(statistics, self.decay)
        return joined


def _over_processes(recorded: Sequence[CodebookStatistics]) -> list[CodebookStatistics]:
    """This process's statistics with those of the others, in one all-reduce."""
    summed = iter(all_reduce_packed([field for statistics in recorded for field in statistics]))
    size = rank_and_size()[1]
    together = [CodebookStatistics(*(next(summed) for _ in statistics)) for statistics in recorded]
    return [statistics._replace(uses=statistics.uses / size) for statistics in together]


def _named_codebooks(modules: Sequence[nn.Module]) -> list[tuple[str, SynchronizedCodebook]]:
    """Every codebook of the modules once, in module order, which is the same on every process."""
    found: dict[int, tuple[str, SynchronizedCodebook]] = {}
    for module in modules:
        for name, child in module.named_modules():
            if isinstance(child, SynchronizedCodebook):
                found.setdefault(id(child), (name, child))
    return list(found.values())


@contextmanager
def packed_codebook_updates(*modules: nn.Module) -> Iterator[None]:
    r"""All codebooks of the modules updated at once, with one all-reduce, when the block ends.

    Inside the block the quantisers in `modules` only record what they would learn: with d the decay, and for each code
    the number n of vectors that chose it and their sum s,

    .. math::
        N \leftarrow d^u N + (1 - d) \textstyle\sum_{ranks} n, \qquad
        m \leftarrow d^u m + (1 - d) \textstyle\sum_{ranks} s, \qquad c = m / N

    happen at the end of the block, for all quantisers of all modules, with the sums of all processes packed into one
    `torch.distributed.all_reduce`. u is how often the codebook was used in the block, as a mean over the processes: 1
    for most; for a shared codebook, or for several forwards in one block, as if each use had gone into the averages by
    itself, later ones with more weight. A codebook that no process used is left alone. A process that did not use a
    codebook still takes its place in the all-reduce, so a branch that only some processes take cannot make them hang.

    Without the block every quantiser makes its own all-reduce in its forward (`ResidualVQ` and `ProductVQ` make one for
    all of theirs). In one process the block changes nothing but the moment of the update. Blocks nest, and the
    outermost counts. An exception leaves the codebooks as they were before the block.

    What is left outside of it: the k-means start of a codebook, which needs its batch at once, and codebooks with
    `sync_codebook=False`, which are updated at the end of the block, each process by itself.

    Args:
        modules: whole models or single quantisers; models wrapped in DistributedDataParallel or torch.compile as well.
            The same on every process, and either all of them training or all of them not.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> model = torch.nn.Sequential(nn.VectorQuantize(4, 8), torch.nn.Identity())
        >>> before = model[0].codebook.clone()
        >>> with nn.packed_codebook_updates(model):
        ...     quantized, indices, loss = model(torch.randn(2, 10, 4))
        ...     assert torch.equal(model[0].codebook, before)
        >>> torch.equal(model[0].codebook, before)
        False

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017, appendix A.1,
    for the averages.
    """
    # A codebook that is recording already belongs to an outer block.
    codebooks = [codebook for _, codebook in _named_codebooks(modules) if codebook.pending is None]
    for codebook in codebooks:
        codebook.pending = []
    try:
        yield
    except BaseException:
        for codebook in codebooks:
            codebook.pending = None
        raise
    _apply_together(codebooks)


@torch.no_grad()
def _apply_together(codebooks: Sequence[SynchronizedCodebook]) -> None:
    several = rank_and_size()[1] > 1
    shared, recorded = [], []
    for codebook in codebooks:
        statistics = codebook.take_pending()
        together = several and codebook.sync is not False
        if statistics is None and together:
            statistics = codebook.empty_statistics()
        if statistics is None:
            continue
        if together:
            shared.append(codebook)
            recorded.append(statistics)
        else:
            codebook.apply_statistics(statistics)
    for codebook, statistics in zip(shared, _over_processes(recorded), strict=True):
        codebook.apply_statistics(statistics)


def proposal_slots(slots: int, group: Any = None) -> int:
    """How many proposals `propose_rows` makes room for: `slots`, rounded up to equal shares of all processes."""
    size = rank_and_size(group)[1]
    return -(-slots // size) * size


def _rows_of_heads(rows: Tensor, chosen: Tensor) -> Tensor:
    """rows: (H, N, D), chosen: (H, M) -> (H, M, D). To select from one list of rows is several times as fast as to
    gather along a dimension of a tensor with three."""
    heads, n, d = rows.shape
    first = n * torch.arange(heads, device=rows.device)[:, None]
    return rows.reshape(heads * n, d).index_select(0, (chosen + first).flatten()).view(*chosen.shape, d)


def propose_rows(rows: Tensor, valid: Tensor, slots: int, group: Any = None) -> tuple[Tensor, Tensor]:
    """Random vectors of this process's batch, in its share of the slots, and zeros in the other processes' shares.

    Summed over the processes, every slot holds one process's vector as it is, not a mean of several. Nothing is asked
    of other processes, nothing is read back from the device, and the shapes do not depend on the data: a process
    without rows just leaves its slots empty.

    Args:
        rows: (H, N, D). valid: (H, N) bool, the rows that may be proposed. slots: about how many proposals all
            processes make together.

    Returns:
        proposals: (H, P, D) for P = proposal_slots(slots), float32 at least. keys: (H, P) float32, the random order in
        which `choose_replacements` takes them, in (0, 1]; 0 for an empty slot. A process offers those of its rows that
        drew the highest keys, so the highest of all are a uniform sample of all processes' rows, whoever has more.
    """
    rank, size = rank_and_size(group)
    heads, n, d = rows.shape
    share = -(-slots // size)
    drawn = 1 - torch.rand(heads, n, device=rows.device)
    best, chosen = torch.where(valid, drawn, 0).topk(min(share, n), dim=1)
    # A masked row may hold anything, NaN as well, and must not get into the sum.
    offered = _rows_of_heads(rows, chosen).to(torch.promote_types(rows.dtype, torch.float32))
    offered.masked_fill_(best[..., None] == 0, 0)
    before, after = rank * share, share * size - rank * share - min(share, n)
    proposals = nn.functional.pad(offered, (0, 0, before, after))
    return proposals, nn.functional.pad(best, (before, after))


def choose_replacements(
    proposals: Tensor, keys: Tensor, dead: Tensor, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A vector for every dead code, from what all processes proposed: the same on every process, as it depends on
    nothing but the sums that all of them hold.

    Args:
        proposals: (H, P, D) and keys: (H, P), `propose_rows` summed over the processes. dead: (H, K) bool.
        priority: (H, K); of more dead codes than proposals, those with the smallest come first. Without it, those with
            the lowest index.

    Returns:
        vectors: (H, K, D), to be read where revived: (H, K) bool is True. No proposal is used twice; codes for which
        none is left stay dead until the next step.
    """
    slots, d = proposals.shape[1:]
    if slots == 0:
        return proposals.new_zeros(*dead.shape, d), torch.zeros_like(dead)
    if priority is None:
        place = dead.cumsum(1) - 1
    else:
        turn = torch.where(dead, priority, torch.inf).argsort(dim=1, stable=True)
        place = torch.zeros_like(turn).scatter(1, turn, torch.arange(dead.size(1), device=dead.device).expand_as(turn))
    revived = dead & (place < (keys > 0).sum(1, keepdim=True))
    order = keys.argsort(dim=1, descending=True, stable=True)  # the empty slots, whose key is 0, come last
    picked = order.gather(1, place.clamp(0, slots - 1))
    return _rows_of_heads(proposals, picked), revived


def sample_rows(rows: Tensor, valid: Tensor, num: int, group: Any = None) -> Tensor:
    """`num` random vectors of all processes' batches together, the same on every process: the start of k-means.

    Each process gives in proportion to its valid rows, and no row comes twice where all together have `num` or more.
    Two all-reduces.

    Args:
        rows: (H, N, D). valid: (H, N) bool.

    Returns:
        (H, num, D) of rows' dtype; zeros for a head without a valid row on any process.
    """
    rank, size = rank_and_size(group)
    heads, n, d = rows.shape
    own = valid.sum(1)  # (H,)
    counts = torch.zeros(heads, size, dtype=torch.int64, device=rows.device)
    counts[:, rank] = own
    (counts,) = all_reduce_packed([counts], group)
    upto = counts.cumsum(1)
    total = upto[:, -1].clamp_min(1)
    # Floors of a running share: they leave no slot out, and give a process at most as many as it has rows.
    end = num * upto[:, rank] // total
    begin = num * (upto[:, rank] - own) // total
    slot = torch.arange(num, device=rows.device)
    given = (slot >= begin[:, None]) & (slot < end[:, None])
    if n == 0:
        sampled = rows.new_zeros(heads, num, d)
    else:
        order = torch.where(valid, torch.rand(heads, n, device=rows.device), 2).argsort(dim=1)
        place = (slot - begin[:, None]) % own.clamp_min(1)[:, None]
        sampled = _rows_of_heads(rows, order.gather(1, place)).masked_fill_(~given[..., None], 0)
    return all_reduce_packed([sampled], group)[0]


# Odd constants of the splitmix64 generator, as signed integers: what a sum of bits is scattered with.
_SCATTER = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def _scattered(x: Tensor) -> Tensor:
    """int64 in, int64 out: a permutation of the integers in which every bit moves every other."""
    for shift, factor in zip((30, 27, 31), _SCATTER, strict=True):
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> 29)


def _checksum(codebook: nn.Module) -> Tensor:
    """() int64, from the bits of every parameter and buffer."""
    result = torch.zeros((), dtype=torch.int64)
    state = [*codebook.named_parameters(), *codebook.named_buffers()]
    for _, tensor in sorted(state, key=lambda pair: pair[0]):
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        words = nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
        places = torch.arange(len(words), device=words.device)
        folded = _scattered(words ^ _scattered(places)).sum().cpu()
        result = _scattered(result * 31 + folded)
    return result


@torch.no_grad()
def codebook_checksums(module: nn.Module) -> dict[str, int]:
    """A number for every codebook in a model, by its name, from the bits of all its state: codes, moving averages, and
    whatever else it keeps. Equal state, equal numbers; one bit more or less, another number."""
    return {name: int(_checksum(codebook)) for name, codebook in _named_codebooks([module])}


@torch.no_grad()
def assert_codebooks_equal(module: nn.Module, group: Any = None) -> None:
    """Raise on every process unless all of them hold the same codebooks, bit for bit. Every process has to call it.

    Args:
        module: a model or a quantiser.

    Raises:
        RuntimeError: names the codebooks that differ, or says that the processes have different numbers of them.
    """
    if rank_and_size(group)[1] == 1:
        return
    checksums = codebook_checksums(module)
    parameter = next(iter([*module.parameters(), *module.buffers()]), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if _differ(torch.tensor([len(checksums)], device=device), group).any():
        raise RuntimeError("assert_codebooks_equal: the processes have different numbers of codebooks")
    if not checksums:
        return
    differ = _differ(torch.tensor(list(checksums.values()), device=device), group).tolist()
    names = [name or "the module itself" for name, differs in zip(checksums, differ, strict=True) if differs]
    if names:
        raise RuntimeError(f"assert_codebooks_equal: these codebooks differ between processes: {', '.join(names)}")


def _differ(values: Tensor, group: Any) -> Tensor:
    """(n,) int64 -> (n,) bool, the same on every process: where the processes' values are not all equal."""
    both = torch.stack([values, ~values])  # the maximum of ~v is the ~ of the minimum of v, without overflow
    distributed.all_reduce(both, distributed.ReduceOp.MAX, group=group)
    return both[0] != ~both[1]
