"""In which order the samples of a data set make batches: shuffled, or for sequential models in parallel streams."""

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled(samples: int, batches: int, batch_size: int, rank: int, world: int, seed: int) -> Tensor:
    """Indices (batches, batch_size): a process's share of all samples in random order."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[rank::world]
    return order[: batches * batch_size].view(batches, batch_size)


def streams(batches: int, batch_size: int, rank: int) -> Tensor:
    """Indices (batches, batch_size): each column is a run of neighbours, and every process has columns of its own."""
    first = (rank * batch_size + torch.arange(batch_size)) * batches
    return first + torch.arange(batches).unsqueeze(1)


def uneven_streams(samples: int, width: int) -> Iterator[Tensor]:
    """Indices of batches of at most `width` streams that have every sample once.

    Where it does not come out even, the first streams are longer by one sample; they are what the last batch has.
    """
    width = max(1, min(width, samples))
    length, longer = divmod(samples, width)
    stream = torch.arange(width)
    first = stream * length + stream.clamp_max(longer)
    for step in range(length):
        yield first + step
    if longer or not samples:  # a batch of none, where there are none
        yield first[:longer] + length
