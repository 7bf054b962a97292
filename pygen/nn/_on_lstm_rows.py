"""Where the rows of a batch of sequences lie: what on_lstm.py asks to go from tensors of any form to packed rows."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences as rows (N, ...), steps behind each other; a step's rows are the sequences that have it.

    With `batch_sizes` a step has as many rows as it says, of the longest sequences first: place b of a step is
    sequence `order[b]` (b itself without an order). Without, every step has all B.
    """

    steps: int
    batch: int
    batch_sizes: Tensor | None = None  # (T,) int64 on the CPU
    order: Tensor | None = None  # (B,) int64 on the CPU

    @classmethod
    def of_packed(cls, packed: PackedSequence) -> "Rows":
        order = packed.sorted_indices
        return cls(
            len(packed.batch_sizes),
            int(packed.batch_sizes[0]),
            packed.batch_sizes,
            None if order is None else order.cpu(),
        )

    @classmethod
    def of_lengths(cls, steps: int, lengths: Tensor) -> "Rows":
        """lengths: (B,) int64 on the CPU, from 0 to steps."""
        if bool((lengths == steps).all()):
            return cls(steps, len(lengths))
        sizes = (lengths > torch.arange(steps, device="cpu").unsqueeze(1)).sum(1)
        return cls(steps, len(lengths), sizes[sizes > 0], lengths.argsort(descending=True, stable=True))

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """(the first row of every step (T,), the step of every row (N,), its place there (N,))."""
        assert self.batch_sizes is not None
        sizes = self.batch_sizes
        first = sizes.cumsum(0) - sizes
        step = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        return first, step, torch.arange(len(step), device="cpu") - first[step]

    @cached_property
    def _grid(self) -> Tensor:
        """The place of every row in a padded (T B, ...)."""
        _, step, place = self._places
        return step * self.batch + (place if self.order is None else self.order[place])

    @cached_property
    def _mirror(self) -> Tensor:
        """The row that takes a row's place when every sequence is read from its end."""
        first, step, place = self._places
        lengths = place.bincount(minlength=self.batch)
        return first[lengths[place] - 1 - step] + place

    def gather(self, x: Tensor) -> Tensor:
        """x: (T, B, F) -> (N, F)."""
        flat = x.flatten(0, 1)
        return flat if self.batch_sizes is None else flat[self._grid.to(x.device)]

    def padded(self, x: Tensor) -> Tensor:
        """x: (N, ...) -> (T, B, ...), 0 where a sequence has ended."""
        if self.batch_sizes is not None:
            x = x.new_zeros(self.steps * self.batch, *x.shape[1:]).index_copy(0, self._grid.to(x.device), x)
        return x.view(self.steps, self.batch, *x.shape[1:])

    def mirrored(self, x: Tensor) -> Tensor:
        """x: (N, F) -> (N, F), every sequence from its own end to its start."""
        if self.batch_sizes is None:
            return x.reshape(self.steps, self.batch, x.shape[1]).flip(0).flatten(0, 1)
        return x[self._mirror.to(x.device)]

    def scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """x: (N, F) times what its sequence has, factors: (B, F)."""
        if self.batch_sizes is None:
            return (x.reshape(self.steps, self.batch, x.shape[1]) * factors).flatten(0, 1)
        return x * factors[self._places[2].to(x.device)]

    def by_place(self, state: Tensor) -> Tensor:
        """state: (B, H), a row per sequence -> a row per place."""
        return state if self.order is None else state[self.order.to(state.device)]

    def by_sequence(self, state: Tensor) -> Tensor:
        """The inverse of `by_place`."""
        return state if self.order is None else state[self.order.argsort().to(state.device)]
