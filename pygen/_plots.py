"""The pictures that the `pygen` command writes: grids of samples and bars of times. Needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

INK, OURS, OTHER = "#22303c", "#0b7a75", "#b8c1c9"
_GAP = 1  # pixels between the images of a grid


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150, facecolor="white")
    finally:
        pyplot.close(figure)


def grid(x: Tensor, levels: int, columns: int | None = None) -> np.ndarray:
    """(N, C, H, W) integers as one picture in [0, 1], (rows (H + 1) + 1, columns (W + 1) + 1, 1 or 3), gaps white."""
    n, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    picture = np.ones((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), np.float32)
    for i, image in enumerate(x.permute(0, 2, 3, 1).numpy() / max(levels - 1, 1)):
        top, left = (i // columns) * (height + _GAP) + _GAP, (i % columns) * (width + _GAP) + _GAP
        picture[top : top + height, left : left + width] = image
    return picture


def _is_picture(shape: Sequence[int], levels: int | None) -> bool:
    """Whether samples of this shape are images; those that have no picture at all end with a sentence."""
    image = len(shape) == 3 and shape[0] in (1, 3) and levels is not None
    if not image and tuple(shape) != (2,):
        raise ValueError(f"samples of shape {tuple(shape)} have no picture; write them with --out FILE.npz")
    return image


def _show(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def save_samples(
    path: Path, x: Tensor, levels: int | None, *, beside: Tensor | None = None, title: str = "samples"
) -> None:
    """Write samples as a picture: a grid of images, or points for pairs of numbers.

    Args:
        path: file; its folder is created.
        x: (N, C, H, W) integers with 1 or 3 channels, or (N, 2).
        levels: how many values an element has, None for real data.
        beside: real images to show on the right, in a grid of the same shape.
        title: what to write above x.

    Raises:
        ValueError: samples of a shape that has no picture.
    """
    image = _is_picture(x.shape[1:], levels)
    panels = [(title, x)] if beside is None else [(title, x), ("real data", beside)]
    figure, axes = _figure(5.2 * len(panels), 5.5, len(panels))
    for axis, (name, samples) in zip(axes[0], panels, strict=True):
        axis.set_title(name, color=INK)
        if image:
            assert levels is not None
            _show(axis, grid(samples, levels))
        else:
            axis.scatter(*samples.numpy().T, s=4, color=OURS)
    _save(figure, path)


def save_interpolations(path: Path, x: Tensor, levels: int | None) -> None:
    """Write interpolations as a picture: a row of images for each, or a line for pairs of numbers.

    Args:
        path: file; its folder is created.
        x: (N, steps, C, H, W) integers with 1 or 3 channels, or (N, steps, 2).
        levels: how many values an element has, None for real data.

    Raises:
        ValueError: samples of a shape that has no picture.
    """
    rows, steps = x.shape[:2]
    image = _is_picture(x.shape[2:], levels)
    height = 0.6 * rows * x.size(-2) / x.size(-1) if image else 5.0
    figure, axes = _figure(0.6 * steps if image else 5.2, height + 0.5)
    axis = axes[0, 0]
    axis.set_title("from one sample of the data (left) to another" if image else "interpolations", color=INK)
    if image:
        assert levels is not None
        _show(axis, grid(x.flatten(0, 1), levels, columns=steps))
    else:
        for line in x.numpy():
            axis.plot(*line.T, marker=".", color=OURS)
    _save(figure, path)


def save_times(path: Path, groups: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Write bars of milliseconds: a panel per group, whose title compares its last entry, ours, with its first."""
    figure, axes = _figure(4.4 * len(groups), 3.4, len(groups))
    for axis, (group, times) in zip(axes[0], groups.items(), strict=True):
        bars = axis.bar(list(times), list(times.values()), color=[OTHER] * (len(times) - 1) + [OURS], width=0.6)
        axis.bar_label(bars, [f"{value:.2f} ms" for value in times.values()], color=INK)
        first, *_, ours = times.values()
        axis.set_title(f"{group}: {first / ours:.2f}x as fast", color=INK)
        axis.set_ylabel("milliseconds")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, color=INK)
    _save(figure, path)
