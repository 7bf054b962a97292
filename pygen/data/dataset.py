"""The data a model trains on: tensors in three splits, with labels if there are any. loaders.py and densities.py fill
it; pygen.training consumes it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPLITS = ("train", "valid", "test")
SPLIT_SEED = 0  # one split for everybody, so that numbers of different runs compare


@dataclass(frozen=True)
class Dataset:
    """Three splits of samples.

    Args:
        train, valid, test: (N, *shape), integers 0 .. levels - 1 (uint8 where they fit, else int64), none empty;
            without levels real numbers, floating point and finite.
        levels: how many values an element can have; None for real numbers.
        shape: of one sample; (C, H, W) for images.
        name: what to call it.
        source: the arguments of `pygen.data.load` that give it again, of JSON types; None when built by hand.
        labels: the class of each sample, int64 (N,) from 0 upwards, of "train", "valid" and "test"; None without.
        vocabulary: of a text, what its tokens stand for: `levels` strings; None for other data. The samples of a text
            are windows that follow each other, each beginning with the last token of the one before.
        level: of a text: "character" or "word".

    Raises:
        ValueError: an empty split, a wrong shape, values outside 0 .. levels - 1 or not finite, labels that do not
            belong to the samples, or a vocabulary of another size.

    Example:
        >>> from pygen import data
        >>> digits = data.load("digits")
        >>> digits.shape, digits.levels, len(digits.train) + len(digits.valid) + len(digits.test)
        ((1, 8, 8), 17, 1797)
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int | None
    shape: tuple[int, ...]
    name: str
    source: Mapping[str, Any] | None = None
    labels: Mapping[str, Tensor] | None = None
    vocabulary: Sequence[str] | None = None
    level: str | None = None

    def __post_init__(self) -> None:
        if self.vocabulary is not None and len(self.vocabulary) != self.levels:
            raise ValueError(f"{self.name}: vocabulary must be {self.levels} strings, got {len(self.vocabulary)}")
        kind = "real numbers" if self.levels is None else "integers"
        for split, x in self.splits():
            if x.is_floating_point() != (self.levels is None) or tuple(x.shape[1:]) != self.shape:
                raise ValueError(
                    f"{self.name}: {split} must be {kind} (N, {', '.join(map(str, self.shape))}), "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
            if len(x) == 0:
                raise ValueError(f"{self.name}: {split} is empty; each of train, valid and test needs a sample")
            self._check_values(split, x)
            if self.labels is not None:
                self._check_labels(split, x, self.labels)

    def splits(self) -> Iterator[tuple[str, Tensor]]:
        """("train", train), ("valid", valid), ("test", test)."""
        yield from ((split, getattr(self, split)) for split in SPLITS)

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels name; None without labels."""
        return None if self.labels is None else 1 + max(int(labels.max()) for labels in self.labels.values())

    def tensors(self, split: str, *, labelled: bool) -> tuple[Tensor, ...]:
        """(x,) of a split, or (x, labels) for a model that is trained with labels.

        Raises:
            ValueError: labels are asked for and there are none.
        """
        x: Tensor = getattr(self, split)
        if not labelled:
            return (x,)
        if self.labels is None:
            raise ValueError(f"{self.name}: the data have no labels, and this model is trained with labels")
        return x, self.labels[split]

    def _check_values(self, split: str, x: Tensor) -> None:
        if self.levels is None:
            if not x.isfinite().all():
                raise ValueError(f"{self.name}: {split} must be finite, got NaN or infinity")
            return
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= self.levels:
            raise ValueError(f"{self.name}: {split} must be in 0 .. {self.levels - 1}, got {low} .. {high}")

    def _check_labels(self, split: str, x: Tensor, labels: Mapping[str, Tensor]) -> None:
        found = labels.get(split)
        if found is None or found.dtype != torch.int64 or found.shape != (len(x),) or int(found.min()) < 0:
            got = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}"
            if found is not None and found.numel() and int(found.min()) < 0:
                got += f" with {int(found.min())}"
            raise ValueError(
                f"{self.name}: labels of {split} must be int64 ({len(x)},), a class from 0 upwards each, got {got}"
            )


def split(x: Tensor, *fractions: float) -> list[Tensor]:
    """Cut x into len(fractions) + 1 random parts that do not overlap: the rest first, then one of each fraction.

    The order comes from a fixed seed: everybody gets the same parts. A part has at least one sample when x has enough.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    sizes = [max(1, round(len(x) * fraction)) for fraction in fractions]
    rest = max(0, len(x) - sum(sizes))
    return [part.contiguous() for part in x[order].split([rest, *sizes])] if rest else [x, *(x[:0] for _ in sizes)]
