"""Pictures of runs and replays, one panel per species. Needs matplotlib; run.py and simulate.py call it."""

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pygen.ssa.run import Run
    from pygen.ssa.simulate import Replay

KINDS = ("mean", "trajectories", "histogram")
_INK, _GRID = "#22303c", "#e4e8eb"
# One colour per panel: dark enough for a line on white, told apart also by the colour-blind (Okabe and Ito, 2008).
_COLOURS = ("#0b7a75", "#d55e00", "#0072b2", "#a3528a", "#9a7400", "#4b5563")
_MOST_PANELS = 6  # drawn when nothing is asked for
_STEPS_BEHIND_MEAN, _STEPS_ALONE = 3, 6  # trajectories shown
_MOST_BARS = 80  # of a histogram: wider bins above
_MOST_POINTS = 20_000  # of a line: more than any screen shows


def _shown(species: str | Sequence[str] | None, known: Sequence[str]) -> list[str]:
    if species is None:
        return list(known[:_MOST_PANELS])
    wanted = [species] if isinstance(species, str) else list(species)
    for name in wanted:
        if name not in known:
            raise ValueError(f"plot: no species {name!r} was recorded; there is: {', '.join(known)}")
    if not wanted:
        raise ValueError("plot: species must name at least one")
    return wanted


def _panels(names: Sequence[str], title: str, xlabel: str, ylabel: str) -> tuple[Any, list[Any]]:
    """A figure with an axis for each name; pyplot's, so that notebooks show it and plt.show() finds it."""
    from matplotlib import pyplot

    columns = min(len(names), 3 if len(names) != 4 else 2)
    rows = math.ceil(len(names) / columns)
    width = 6.4 if columns == 1 else 4.3 * columns
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(width, (4.0 if rows == 1 else 3.0 * rows) + 0.3), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for axis in axes[len(names) :]:
        axis.remove()
    for k, (axis, name) in enumerate(zip(axes, names, strict=False)):
        axis.set_title(name, color=_INK, loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_INK)
        axis.tick_params(colors=_INK)
        axis.grid(axis="y", color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        if k + columns >= len(names):
            axis.set_xlabel(xlabel, color=_INK)
        if k % columns == 0:
            axis.set_ylabel(ylabel, color=_INK)
    figure.suptitle(title, color=_INK, fontsize="medium")
    return figure, axes[: len(names)]


def _finish(figure: Any, path: str | PathLike[str] | None) -> Any:
    if path is not None:
        from matplotlib import pyplot

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150, facecolor="white")
        finally:
            pyplot.close(figure)  # the file was wanted; notebooks would show it as well
    return figure


def _title(run: "Run", what: str) -> str:
    return f"{run.source.name}: {what} of {run.trajectories:,} trajectories, seed {run.seed}"


def plot(
    run: "Run",
    kind: str,
    species: str | Sequence[str] | None,
    at: float | None,
    path: str | PathLike[str] | None,
) -> Any:
    """See Run.plot."""
    if kind not in KINDS:
        raise ValueError(f"plot: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if at is not None and kind != "histogram":
        raise ValueError('plot: at is the time of kind="histogram"')
    names = _shown(species, run.species)
    draw = {"mean": _plot_mean, "trajectories": _plot_trajectories, "histogram": _plot_histogram}[kind]
    return _finish(draw(run, names) if at is None else _plot_histogram(run, names, at), path)


def _steps(axis: Any, run: "Run", name: str, number: int, colours: Sequence[Any], **style: Any) -> None:
    counts = run._trajectories("a plot of trajectories")[:number, :, run.species.index(name)].cpu().numpy()
    for row, colour in zip(np.where(counts < 0, np.nan, counts), colours, strict=False):
        axis.plot(run.t.numpy(), row, drawstyle="steps-post", color=colour, **style)


def _shades(colour: str, n: int) -> list[np.ndarray]:
    """n colours from a light to a dark shade of one."""
    from matplotlib.colors import to_rgb

    rgb = np.array(to_rgb(colour))
    whiteness = np.linspace(0.6, -0.35, n)  # below 0: towards black
    return [rgb + (1 - rgb) * w if w > 0 else rgb * (1 + w) for w in whiteness]


def _band(run: "Run", k: int, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Lower and upper end [T] of the band around the mean of species k, and what it is."""
    exact_bins = run.reduced is not None and all(h.edges is None for h in run.reduced.histograms.values())
    if run.counts is not None or (exact_bins and run.reduced is not None and run.reduced.histograms):
        low, high = run.quantile([0.05, 0.95])[:, :, k].numpy()
        return low, high, "5% to 95%"
    std = run.std()[:, k].numpy()
    return mean - std, mean + std, "mean ± standard deviation"


def _plot_mean(run: "Run", names: Sequence[str]) -> Any:
    figure, axes = _panels(names, _title(run, "mean"), "time", "count")
    means, t = run.mean().numpy(), run.t.numpy()
    for axis, name, colour in zip(axes, names, _cycle(len(names)), strict=True):
        k = run.species.index(name)
        low, high, label = _band(run, k, means[:, k])
        axis.fill_between(t, low, high, color=colour, alpha=0.18, linewidth=0, label=label)
        if run.counts is not None:
            faint = [colour] * _STEPS_BEHIND_MEAN
            _steps(axis, run, name, _STEPS_BEHIND_MEAN, faint, alpha=0.5, linewidth=0.6)
        axis.plot(t, means[:, k], color=colour, linewidth=2.2, label="mean")
        axis.set_xlim(t[0], t[-1] if t[-1] > t[0] else t[0] + 1)
    axes[0].legend(frameon=False, labelcolor=_INK, fontsize="small")
    return figure


def _plot_trajectories(run: "Run", names: Sequence[str]) -> Any:
    shown = min(_STEPS_ALONE, run.trajectories)
    figure, axes = _panels(names, _title(run, f"the first {shown}"), "time", "count")
    for axis, name, colour in zip(axes, names, _cycle(len(names)), strict=True):
        _steps(axis, run, name, shown, _shades(colour, _STEPS_ALONE), linewidth=1.0)
        axis.set_xlim(float(run.t[0]), float(run.t[-1]) if run.t[-1] > run.t[0] else float(run.t[0]) + 1)
    return figure


def _plot_histogram(run: "Run", names: Sequence[str], at: float | None = None) -> Any:
    row = len(run.t) - 1 if at is None else int((run.t - at).abs().argmin())
    figure, axes = _panels(
        names, _title(run, f"distribution at time {float(run.t[row]):g}"), "count", "probability per count"
    )
    for axis, name, colour in zip(axes, names, _cycle(len(names)), strict=True):
        axis_values, cells = (x.numpy() for x in run.histogram(name))
        numbers = cells[row]
        if len(axis_values) == len(numbers):  # bins of width 1
            edges, numbers = _coarser(axis_values, numbers)
        else:
            edges = axis_values
        density = numbers / max(numbers.sum(), 1) / np.diff(edges)
        axis.stairs(density, edges, fill=True, color=colour, alpha=0.35)
        axis.stairs(density, edges, color=colour, linewidth=1.3)
        axis.set_ylim(bottom=0)
    return figure


def _coarser(values: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and numbers of bins of one whole width, few enough to be seen, around the values that occur."""
    occurring = np.flatnonzero(numbers)
    if not len(occurring):
        return np.array([-0.5, 0.5]), np.zeros(1)
    values, numbers = values[occurring[0] : occurring[-1] + 1], numbers[occurring[0] : occurring[-1] + 1]
    width = math.ceil(len(values) / _MOST_BARS)
    bars = math.ceil(len(values) / width)
    padded = np.zeros(bars * width, dtype=np.int64)
    padded[: len(numbers)] = numbers
    return values[0] - 0.5 + width * np.arange(bars + 1), padded.reshape(bars, width).sum(1)


def _cycle(n: int) -> list[str]:
    return [_COLOURS[k % len(_COLOURS)] for k in range(n)]


def plot_replay(replay: "Replay", species: str | Sequence[str] | None, path: str | PathLike[str] | None) -> Any:
    """See Replay.plot."""
    names = _shown(species, replay.species)
    figure, axes = _panels(names, f"every jump of one trajectory: {len(replay.time):,}", "time", "count")
    t = np.concatenate(([replay.t0], replay.time.numpy(), [replay.t_end]))
    states = replay.states.numpy()
    thin = slice(None, None, max(1, len(t) // _MOST_POINTS))
    for axis, name, colour in zip(axes, names, _cycle(len(names)), strict=True):
        column = states[:, replay.species.index(name)]
        column = np.append(column, column[-1])
        axis.plot(t[thin], column[thin], drawstyle="steps-post", color=colour, linewidth=0.9)
        axis.set_xlim(replay.t0, max(replay.t_end, replay.t0 + 1e-300))
    return _finish(figure, path)
