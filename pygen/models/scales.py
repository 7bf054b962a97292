"""The frame of the convolutional flows: an image at several scales, half of whose channels leave after each."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from pygen.models.stacks import chain, check_widths
from pygen.nn import ConvNet, ConvPrior, Multiscale, Reshape, Sequential
from pygen.nn.transform import Transform

Level = Callable[[tuple[int, ...], bool], Iterable[Transform]]


def image_shape(name: str, shape: Sequence[int], scales: int, squeezes: int) -> tuple[int, ...]:
    """(C, H, W) of an image (H, W) or (C, H, W) whose sides can be halved `squeezes` times.

    Raises:
        ValueError: not an image, sides that cannot, or no scale.
    """
    if scales < 1:
        raise ValueError(f"{name}: scales must be at least 1, got {scales}")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"{name}: shape must be an image's, (H, W) or (C, H, W), got {tuple(shape)}")
    height, width = shape[-2:]
    if height % 2**squeezes or width % 2**squeezes:
        raise ValueError(
            f"{name}: scales={scales} needs images with a height and width divisible by {2**squeezes}, "
            f"got {height} x {width}; choose fewer scales, or another size"
        )
    return (1, *shape) if len(shape) == 2 else tuple(shape)


def multiscale(
    shape: Sequence[int],
    image: tuple[int, ...],
    scales: int,
    level: Level,
    *,
    reversible: bool,
    prior: bool = False,
    **options: Any,
) -> Transform:
    """`level(shape, last)` gives the layers of a scale; the second half of the channels leaves after all but the last.

    Args:
        shape, image: of a sample, and the same with channels.
        prior: learn mean and scale of what leaves from what stays; with the `options` of `ConvPrior`.
    """
    levels: list[Transform] = []
    priors: list[nn.Module] = []
    at = image
    for i in range(scales):
        levels.append(chain(level(at, i == scales - 1), reversible=reversible))
        channels, *sides = levels[-1].output_shape(at)
        at = (channels - channels // 2, *sides)
        if prior and i < scales - 1:
            priors.append(ConvPrior(at[0], channels // 2, **options))
    frame = Multiscale(image, levels, priors=priors or None)
    return frame if tuple(shape) == image else Sequential(Reshape(shape, image), frame)


def image_conditioner(name: str, in_channels: int, out_channels: int, hidden: Sequence[int], **options: Any) -> ConvNet:
    """`hidden` as of the fully connected conditioners: as many residual blocks as numbers, all of one width."""
    check_widths(hidden)
    if len(set(hidden)) != 1:
        raise ValueError(f"{name}: hidden must be equal numbers of channels, one for each block, got {tuple(hidden)}")
    return ConvNet(in_channels, out_channels, hidden[0], len(hidden), **options)
