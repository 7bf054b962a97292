"""What the models share in building their layers: chains, and the two halves of a flattened sample."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pygen.nn import (
    MLP,
    Permutation,
    Reshape,
    ReversibleSequential,
    Sequential,
    alternating_mask,
    checkerboard_mask,
)
from pygen.nn.transform import Transform

ARCHITECTURES = ("mlp", "multiscale")


def chain(transforms: Iterable[Transform], *, reversible: bool) -> Transform:
    """One after the other, with the same state_dict either way."""
    return (ReversibleSequential if reversible else Sequential)(*transforms)


def halves_order(shape: Sequence[int]) -> Tensor:
    """int64 (D,): the order that puts the passive half of a flattened sample first.

    Even positions of a vector, the white squares of an image's checkerboard (Dinh et al., 2017, section 3.4). A
    permutation once instead of a mask in every layer: each coupling then reads and computes its half only.
    """
    if len(shape) == 1:
        mask = alternating_mask(shape[0])
    else:
        mask = checkerboard_mask(shape[-2], shape[-1], math.prod(shape[:-2])).flatten()
    return torch.cat(((~mask).nonzero(), mask.nonzero())).squeeze(1)


def halves(shape: Sequence[int], layers: Iterable[Transform], *, reversible: bool) -> Transform:
    """The flattened sample, passive half first, through `layers` of (B, D)."""
    size = math.prod(shape)
    return chain((Reshape(shape, (size,)), Permutation(halves_order(shape)), *layers), reversible=reversible)


def half_conditioner(size: int, swap: bool, outputs: int, hidden: Sequence[int], **options: Any) -> MLP:
    """From one half of `size` features to `outputs` numbers for each feature of the other; see `AffineCoupling`."""
    check_widths(hidden)
    active = size - size // 2 if swap else size // 2
    return MLP(size - active, outputs * active, hidden, **options)


def check_size(name: str, shape: Sequence[int], depth: int) -> int:
    """D of a sample, for models whose couplings need two halves."""
    size = math.prod(shape)
    if size < 2 or depth < 1:
        raise ValueError(f"{name}: needs at least 2 dimensions and depth 1, got shape {tuple(shape)} and depth {depth}")
    return size


def check_choice(name: str, argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(choices)}, got {value!r}")


def check_widths(hidden: Sequence[int]) -> None:
    if not isinstance(hidden, tuple | list) or any(not isinstance(width, int) or width < 1 for width in hidden):
        raise ValueError(f"hidden must be a list of positive widths, as [64, 64], got {hidden!r}")
