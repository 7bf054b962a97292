"""Two species that compete: six parameters from twelve counts, by a recurrent net whose cell is a step of Euler.

    python examples/ode_competition.py --out ode_competition.png

Needs matplotlib (`pip install '.[cli]'`). The picture of docs/ode-rnn.md.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from pygen import models

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

INK, OTHER, COLOURS = "#22303c", "#b8c1c9", ("#0b7a75", "#d55e00")
X0 = [100.0, 150.0]
TIMES = [10.0, 15.0, 30.0, 36.0, 40.0, 42.0]
COUNTS = [[165.0, 283.0], [197.0, 290.0], [280.0, 276.0], [305.0, 269.0], [318.0, 266.0], [324.0, 264.0]]
# What the counts were made with, and where the search begins.
TRUE = {"r": [0.1, 0.3], "a": [1e-4, 2e-4], "i": [0.002, 0.003]}
START = {"r": [0.1, 0.1], "a": [0.001, 0.001], "i": [0.001, 0.001]}
END = 120.0  # of the curves: the counts end at 42


def competition(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
    """r_k x_k (1 - i_k x_k) - a_k x_1 x_2 for both species k at once; x: (B, 2)."""
    return x * (p["r"] * (1 - p["i"] * x) - p["a"] * x.flip(-1))


def rows(found: dict[str, Tensor], errors: dict[str, Tensor]) -> list[tuple[str, str, str, str, str]]:
    """Name, start, fitted, standard error and true value of each parameter."""
    table = []
    for name, start in START.items():
        for k in range(2):
            numbers = (start[k], found[name][k].item(), errors[name][k].item(), TRUE[name][k])
            table.append(
                (f"{name}{'₁₂'[k]}", *(f"{value:.2g}" if j != 1 else f"{value:.3g}" for j, value in enumerate(numbers)))
            )
    return table


def draw(curves: dict[str, tuple[Tensor, Tensor]], fit: models.ode_rnn.Fit, table: list[Any], path: Path) -> None:
    figure, axes = plt.subplot_mosaic(
        [["curves", "losses"], ["curves", "table"]],
        figsize=(9.6, 4.6),
        layout="constrained",
        width_ratios=(1.35, 1),
        height_ratios=(1, 1.15),
    )
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
    axis = axes["curves"]
    t, begin = curves["start"]
    for k, colour in enumerate(COLOURS):
        axis.plot(t, begin[:, k], color=colour, linewidth=1.3, linestyle=":")
        axis.plot(t, curves["fitted"][1][:, k], color=colour, linewidth=2.2)
        axis.scatter(TIMES, [row[k] for row in COUNTS], s=36, color="white", edgecolor=colour, linewidth=1.6, zorder=3)
    for k, level in enumerate((375, 250)):
        axis.annotate(f"x{'₁₂'[k]}", (END, level), (6, 0), textcoords="offset points", color=COLOURS[k], va="center")
    axis.plot([], [], color=INK, linewidth=2.2, label="fitted")
    axis.plot([], [], color=INK, linewidth=1.3, linestyle=":", label="where the search began")
    axis.scatter([], [], s=36, color="white", edgecolor=INK, linewidth=1.6, label="counted")
    axis.legend(frameon=False, loc="lower right", labelcolor=INK)
    axis.set(xlabel="time", ylabel="individuals", xlim=(0, END), ylim=(0, 420))
    axis.set_title("twelve counts, and the curves through them", color=INK, loc="left")

    axes["losses"].semilogy(fit.losses, color=INK, linewidth=1.4)
    axes["losses"].set(xlabel="iteration of L-BFGS", xlim=(0, None))
    axes["losses"].set_title("mean squared error", color=INK, loc="left")
    axes["table"].set_axis_off()
    cells = axes["table"].table(
        [row[1:] for row in table],
        rowLabels=[row[0] for row in table],
        colLabels=["start", "fitted", "± error", "true"],
        bbox=(0.06, 0, 0.94, 1),
        cellLoc="right",
        edges="horizontal",
    )
    cells.auto_set_font_size(False)
    cells.set_fontsize(9.5)
    for cell in cells.get_celld().values():
        cell.set_edgecolor(OTHER)
        cell.set_text_props(color=INK, ha="right")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ode_competition.png"))
    options = parser.parse_args()

    counts = torch.tensor(COUNTS, dtype=torch.float64)
    true = models.ODERNN(competition, TRUE, step=0.1)
    print(f"true parameters: largest difference from the table {(true(X0, TIMES) - counts).abs().max():.2f}")
    print(f"in the end: {', '.join(f'{x:.4f}' for x in true(X0, [400.0])[0].tolist())}")

    model = models.ODERNN(competition, START, step=0.1)
    curves = {}
    with torch.no_grad():
        curves["start"] = model.trajectory(X0, END)
        fit = model.fit(X0, TIMES, counts)
        curves["fitted"] = model.trajectory(X0, END)
    errors = model.standard_errors(X0, TIMES, counts)
    worst = (model(X0, TIMES) - counts).abs().max()
    print(f"{fit.reason} after {len(fit.losses) - 1} iterations, {fit.evaluations} evaluations")
    print(f"fitted: largest difference from the table {worst:.2f}")
    table = rows(fit.parameters, errors)
    for name, start, found, error, right in table:
        print(f"  {name}  start {start:>6}  fitted {found:>9} ± {error:>7}  true {right:>6}")
    draw(curves, fit, table, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
