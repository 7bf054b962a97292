"""The pictures that the `pygen` command writes: grids of images, codebook usage, bars of times. Needs matplotlib."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pygen.models.iresnet import NotConverged

INK, OURS, OTHER = "#22303c", "#0b7a75", "#b8c1c9"
_GAP = 1  # pixels between the images of a grid
_PAIR_GAP = 5
_PAIR_COLUMNS, _PAIRS = 16, 64  # of reconstructions
_SHOWN = {"character": 60, "word": 24}  # tokens of a text whose distances are drawn
_BINS, _CELLS, _POINTS = 80, 120, 2000  # of a histogram and of a density along an axis; samples beside them


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


def pairs_grid(x: Tensor, below: Tensor, levels: int, columns: int) -> np.ndarray:
    """Rows of x, each above its row of `below`, as one picture like `grid`'s; pairs of rows are further apart."""
    strips = []
    for above, under in zip(x.split(columns), below.split(columns), strict=True):
        blank = above.new_full((columns - len(above), *above.shape[1:]), levels - 1)
        strips.append(grid(torch.cat((above, blank, under, blank)), levels, columns))
        strips.append(np.ones((_PAIR_GAP, *strips[-1].shape[1:]), np.float32))
    return np.concatenate(strips[:-1])


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


def save_reconstructions(
    path: Path, x: Tensor, reconstructions: Tensor, levels: int | None, *, below: str = "what the codes keep of it"
) -> None:
    """Write rows of samples, each above the row of its reconstructions.

    Args:
        path: file; its folder is created.
        x, reconstructions: (N, C, H, W) integers with 1 or 3 channels.
        levels: how many values an element has.
        below: what to call the reconstructions.

    Raises:
        ValueError: samples of a shape that has no picture.
    """
    if not _is_picture(x.shape[1:], levels):
        raise ValueError(f"samples of shape {tuple(x.shape[1:])} have no reconstruction picture")
    assert levels is not None
    picture = pairs_grid(x, reconstructions, levels, min(len(x), _PAIR_COLUMNS))
    figure, axes = _figure(9.0, 0.3 + 9.0 * picture.shape[0] / picture.shape[1])
    axes[0, 0].set_title(f"above: test data; below: {below}", color=INK)
    _show(axes[0, 0], picture)
    _save(figure, path)


def save_codebook(path: Path, counts: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    """Write how the codes are used: their frequencies, most frequent first, and perplexity over the training.

    Args:
        path: file; its folder is created.
        counts: (Q, K), how often each code of Q codebooks occurs.
        history: rows of metrics.csv.
    """
    codes = counts.size(1)
    figure, axes = _figure(9.6, 3.4, 2)
    frequencies, training = axes[0]
    for i, row in enumerate(counts / counts.sum(1, keepdim=True).clamp_min(1)):
        label = None if len(counts) == 1 else f"quantizer {i + 1}"
        frequencies.plot(
            range(1, codes + 1), row.sort(descending=True).values, color=_shade(i, len(counts)), label=label
        )
    frequencies.axhline(1 / codes, color=OTHER, linestyle="--", linewidth=1, label="all codes alike")
    frequencies.set_title(f"how often each of {codes} codes is used", color=INK)
    frequencies.set_xlabel("code, most frequent first")
    frequencies.set_ylabel("share of all positions")
    rows = [row for row in history if math.isfinite(row["perplexity"])]
    steps = [row["step"] for row in rows]
    for name, colour in (("active_codes", OTHER), ("perplexity", OURS)):
        values = [row[name] for row in rows]
        training.plot(steps, values, color=colour, marker="." if len(rows) < 10 else "", label=name.replace("_", " "))
    training.set_title("codes in use during the training", color=INK)
    training.set_xlabel("step")
    for axis in axes[0]:
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_scores(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write how an adversarial training went: the discriminator's scores of data and samples, and their distance.

    Args:
        path: file; its folder is created.
        history: rows of metrics.csv, with `score_real` and `score_fake`; those without a validation are left out.
    """
    rows = [row for row in history if math.isfinite(row["score_real"])]
    steps = [row["step"] for row in rows]
    marker = "." if len(rows) < 10 else ""
    figure, axes = _figure(9.6, 3.4, 2)
    scores, distance = axes[0]
    for name, label, colour in (("score_real", "of real data", OTHER), ("score_fake", "of samples", OURS)):
        scores.plot(steps, [row[name] for row in rows], color=colour, marker=marker, label=label)
    scores.set_title("mean score by the discriminator", color=INK)
    scores.legend(frameon=False)
    distance.plot(steps, [row["valid"] for row in rows], color=OURS, marker=marker)
    distance.axhline(0, color=OTHER, linestyle="--", linewidth=1)
    distance.set_title("distance of samples from validation data, x 10^-3", color=INK)
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_curves(path: Path, history: Sequence[Mapping[str, float]], level: str) -> None:
    """Write how a language model learned: bits per character, or perplexity by words, against steps.

    Args:
        path: file; its folder is created.
        history: rows of metrics.csv.
        level: "character" or "word".
    """
    figure, axes = _figure(6.4, 3.8)
    axis = axes[0, 0]
    for name, label, colour in (("loss", "training, with its regularisation", OTHER), ("valid", "validation", OURS)):
        rows = [row for row in history if math.isfinite(row[name])]
        # A loss that no float's exp holds is a beginning that nobody looks at.
        values = [row[name] / math.log(2) if level == "character" else math.exp(min(row[name], 99)) for row in rows]
        marker = "." if len(rows) < 10 else ""
        axis.plot([row["step"] for row in rows], values, color=colour, marker=marker, label=label)
    if level == "word":
        axis.set_yscale("log")
    axis.set_title("bits per character" if level == "character" else "perplexity", color=INK)
    axis.set_xlabel("step")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def save_distances(path: Path, symbols: Sequence[str], distances: Tensor) -> None:
    """Write how far the forget gates of each layer reach at every token of a text.

    Args:
        path: file; its folder is created.
        symbols: T words or characters.
        distances: (L, T), 1 - mean(master forget gate): high where more of the past is forgotten.
    """
    figure, axes = _figure(max(5.0, 0.22 * len(symbols) * max(1.0, max(map(len, symbols)) / 4)), 3.2)
    axis = axes[0, 0]
    for i, row in enumerate(distances.tolist()):
        axis.plot(range(len(symbols)), row, color=_shade(len(distances) - 1 - i, len(distances)), marker=".",
                  label=f"layer {i + 1}")  # fmt: skip
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, symbols)) > 1 else {}
    axis.set_xticks(range(len(symbols)), [_visible(symbol) for symbol in symbols], **slanted)
    axis.set_title("distance at each token: 1 - mean(master forget gate)", color=INK)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():  # a font that lacks a letter is no reason to warn in the middle of a training
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        _save(figure, path)


def _visible(symbol: str) -> str:
    """A symbol as a label: white space has a sign, and no dollar begins a formula."""
    return {"\n": "\u21b5", " ": "\u00b7", "\t": "\u2192"}.get(symbol, symbol).replace("$", "\\$")


def save_density(path: Path, x: Tensor, density: Tensor, samples: Tensor, extent: float) -> None:
    """Write data in the plane as a histogram, the density that a model has learned of them, and its samples.

    Args:
        path: file; its folder is created.
        x, samples: (N, 2), real.
        density: (side, side), p at the centres of cells of [-extent, extent]^2; row 0 is the lowest.
        extent: of the picture.
    """
    figure, axes = _figure(12.6, 4.7, 3)
    corners = (-extent, extent, -extent, extent)
    data, learned, drawn = axes[0]
    data.hist2d(*x.numpy().T, bins=_BINS, range=(corners[:2], corners[2:]), cmap="viridis")
    data.set_title("data", color=INK)
    learned.imshow(density.numpy(), origin="lower", extent=corners, cmap="viridis", interpolation="bilinear")
    learned.set_title("learned density", color=INK)
    drawn.scatter(*samples.numpy().T, s=2, color=OURS)
    drawn.set_title("samples", color=INK)
    for axis in axes[0]:
        axis.set(xlim=corners[:2], ylim=corners[2:], xticks=[], yticks=[], aspect="equal")
    _save(figure, path)


def _shade(i: int, n: int) -> tuple[float, ...]:
    """Our colour for the first of n, lighter for those that follow."""
    from matplotlib.colors import to_rgb

    return tuple(1 - (1 - part) * (1 - 0.8 * i / n) for part in to_rgb(OURS))


def _draw_reconstructions(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    if len(model.shape) == 3 and model.shape[0] in (1, 3) and model.levels is not None:  # others have no picture
        x = x[:_PAIRS]
        device = next(model.parameters()).device
        found = model.reconstruct(x.to(device)).cpu()
        save_reconstructions(path, x, found, model.levels, below=model.reconstruction)


def _draw_codebook(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    from pygen.training.evaluate import summed_statistics

    counts = summed_statistics(model, x, device=next(model.parameters()).device)
    save_codebook(path, counts.cpu().view(-1, model.codebook_size), history)


def _draw_samples(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    """Always of the same latents, so that drawings of one training compare."""
    if len(model.shape) == 3 and model.shape[0] in (1, 3) and model.levels is not None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        save_samples(path, model.sample(_PAIRS, generator=generator).cpu(), model.levels, beside=x[:_PAIRS])


@torch.no_grad()
def _draw_density(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    parameter = next(model.parameters())
    extent = 1.1 * x.abs().amax().item()
    centres = (torch.arange(_CELLS, dtype=parameter.dtype) + 0.5) * (2 * extent / _CELLS) - extent
    points = torch.cartesian_prod(centres, centres).flip(1)  # the second coordinate is the row
    parts = [model.log_prob(part.to(parameter.device)).cpu() for part in points.split(_CELLS * 16)]
    generator = torch.Generator(parameter.device).manual_seed(0)
    samples = model.sample(len(x[:_POINTS]), generator=generator).cpu()
    save_density(path, x, torch.cat(parts).exp().float().view(_CELLS, _CELLS), samples, extent)


def _draw_inversions(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    """Test images above those that are found again from their features, with how well that went."""
    x = x[:_PAIRS]
    z = model.features(x.to(next(model.parameters()).device)).detach()
    found = model.invert(z)
    error = (found.x.cpu() - x - 0.5).abs().amax().item()
    below = (
        f"found again from its features\n{int(found.converged.sum())} of {len(x)} converged in at most "
        f"{int(found.iterations.max())} iterations a block, largest error {error:.0e} of a grey level"
    )
    again = found.x.nan_to_num().floor().clamp(0, model.levels - 1).long().cpu()
    save_reconstructions(path, x, again, model.levels, below=below)


def _draw_scores(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    save_scores(path, history)


def _draw_curves(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    save_curves(path, history, model.level)


def _draw_distances(path: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> None:
    tokens = x[0, : _SHOWN[model.level]].long()
    forget, _ = model.distances(tokens.unsqueeze(1))
    save_distances(path, [model.vocabulary[token] for token in tokens.tolist()], forget[..., 0].cpu())


# What the names in `Model.pictures` stand for.
_DRAW = {
    "reconstructions": _draw_reconstructions,
    "codebook": _draw_codebook,
    "samples": _draw_samples,
    "scores": _draw_scores,
    "density": _draw_density,
    "inversions": _draw_inversions,
    "curves": _draw_curves,
    "distances": _draw_distances,
}


def save_pictures(folder: Path, model: Any, x: Tensor, history: Sequence[Mapping[str, float]]) -> list[Path]:
    """Write the pictures that a model says show what it learned.

    Args:
        folder: of the run; each is NAME.png in it.
        model: in eval mode.
        x: (N, *shape), data that it was not trained on.
        history: rows of metrics.csv.

    Returns:
        The files.
    """
    paths = {name: folder / f"{name}.png" for name in model.pictures}
    for name, path in paths.items():
        try:
            _DRAW[name](path, model, x, history)
        except NotConverged as error:  # no reason to end a training
            warnings.warn(f"{path} was not drawn: {error}", stacklevel=2)
    return [path for path in paths.values() if path.exists()]


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
