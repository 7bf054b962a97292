"""Smooth functions beside the hard ones that they stand for, and their errors beside the bounds.

    python examples/smooth_functions.py --out smooth.png

On the left the maximum of x and 0 at three temperatures, in the middle the weights of the best 4 of 12 numbers by both
methods, on the right how far 300 random rows are from the hard choice at all temperatures. A point above the line of
its bound would be an error in `pygen.functional.smooth`. Needs matplotlib (`pip install '.[cli]'`).
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pygen.functional import smooth

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

COLOURS = {"threshold": "#0b7a75", "elementary_symmetric": "#c44536"}
INK = "#22303c"
N, K = 12, 4


def draw_maximum(axis: plt.Axes) -> None:
    x = torch.linspace(-3, 3, 200, dtype=torch.float64)
    pairs = torch.stack((x, torch.zeros_like(x)), -1)
    axis.plot(x, x.clamp_min(0), color=INK, linewidth=2.4, label="max(x, 0)")
    for t, style in ((1.0, "-"), (0.5, "--"), (0.1, ":")):
        axis.plot(x, smooth.smooth_max(pairs, temperature=t), style, color="#0b7a75", label=f"log-sum-exp, T = {t}")
        axis.plot(x, smooth.smooth_max(pairs, temperature=t, mean=True), style, color="#d9a21b")
    axis.plot([], [], color="#d9a21b", label="with the mean")
    axis.set(title="smooth_max of x and 0", xlabel="x")
    axis.legend(frameon=False, fontsize=8)


def draw_top_k(axis: plt.Axes) -> None:
    x = torch.randn(N, dtype=torch.float64).sort(descending=True).values
    axis.bar(range(N), [1] * K + [0] * (N - K), color=INK, alpha=0.12, label=f"the {K} largest")
    for method, colour in COLOURS.items():
        for t, style in ((1.0, "--"), (0.2, "-")):
            weights = smooth.soft_top_k(x, K, method=method, temperature=t)
            axis.plot(range(N), weights, style, marker="o", markersize=3, color=colour, label=f"{method}, T = {t}")
    axis.set(title=f"soft_top_k, {K} of {N} normal numbers", xlabel="rank")
    axis.legend(frameon=False, fontsize=8)


def errors(method: str, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of every row the gap over the temperature, and the sum of absolute differences to the hard choice."""
    hard = torch.zeros_like(x).scatter(-1, x.topk(K).indices, 1.0)
    ordered = x.sort(-1, descending=True).values
    off = (smooth.soft_top_k(x, K, method=method, temperature=temperature) - hard).abs().sum(-1)
    return (ordered[:, K - 1] - ordered[:, K]) / temperature, off


def draw_errors(axis: plt.Axes) -> None:
    x = torch.randn(300, N, dtype=torch.float64)
    gaps = torch.linspace(0, 30, 100, dtype=torch.float64)
    for (method, colour), power in zip(COLOURS.items(), (1, 2), strict=True):
        found = [errors(method, x, t) for t in (2.0, 0.5, 0.1, 0.03)]
        gap, off = (torch.cat(parts) for parts in zip(*found, strict=True))
        shown = gap < 30
        axis.scatter(gap[shown], off[shown], s=3, color=colour, alpha=0.4)
        bound = 2 * (math.sqrt(K * (N - K)) * (-gaps / 2).exp()) ** power
        axis.plot(gaps, bound, color=colour, label=f"bound of {method}")
    axis.set(title="distance to the hard choice", xlabel="gap / T", yscale="log", ylim=(1e-13, 1e2))
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("smooth.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for draw, axis in zip((draw_maximum, draw_top_k, draw_errors), axes, strict=True):
        draw(axis)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
