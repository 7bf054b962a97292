"""The data a model trains on: integer tensors in three splits. loaders.py fills it; pygen.training consumes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPLIT_SEED = 0  # one split for everybody, so that numbers of different runs compare


@dataclass(frozen=True)
class Dataset:
    """Three splits of integer samples.

    Args:
        train, valid, test: (N, *shape), integers 0 .. levels - 1 (uint8 where they fit, else int64), none empty.
        levels: how many values an element can have.
        shape: of one sample; (C, H, W) for images.
        name: what to call it.
        source: the arguments of `pygen.data.load` that give it again, of JSON types; None when built by hand.

    Raises:
        ValueError: an empty split, a wrong shape, or values outside 0 .. levels - 1.

    Example:
        >>> from pygen import data
        >>> digits = data.load("digits")
        >>> digits.shape, digits.levels, len(digits.train) + len(digits.valid) + len(digits.test)
        ((1, 8, 8), 17, 1797)
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int
    shape: tuple[int, ...]
    name: str
    source: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for split, x in self.splits():
            if x.is_floating_point() or tuple(x.shape[1:]) != self.shape:
                raise ValueError(
                    f"{self.name}: {split} must be integers (N, {', '.join(map(str, self.shape))}), "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if len(x) == 0:
                raise ValueError(f"{self.name}: {split} is empty; each of train, valid and test needs a sample")
            low, high = int(x.min()), int(x.max())
            if low < 0 or high >= self.levels:
                raise ValueError(f"{self.name}: {split} must be in 0 .. {self.levels - 1}, got {low} .. {high}")

    def splits(self) -> Iterator[tuple[str, Tensor]]:
        """("train", train), ("valid", valid), ("test", test)."""
        yield from (("train", self.train), ("valid", self.valid), ("test", self.test))


def split(x: Tensor, *fractions: float) -> list[Tensor]:
    """Cut x into len(fractions) + 1 random parts that do not overlap: the rest first, then one of each fraction.

    The order comes from a fixed seed: everybody gets the same parts. A part has at least one sample when x has enough.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [max(1, round(len(x) * fraction)) for fraction in fractions]
    rest = max(0, len(x) - sum(sizes))
    return [part.contiguous() for part in x[order].split([rest, *sizes])] if rest else [x, *(x[:0] for _ in sizes)]
