"""A damped pendulum: its length and damping from noisy angles, with error bars; starts and speeds are learned too.

    python examples/ode_pendulum.py --out ode_pendulum.png

Needs matplotlib (`pip install '.[cli]'`). The picture of docs/ode-rnn.md.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from pygen import models

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

INK, OTHER, COLOURS = "#22303c", "#b8c1c9", ("#0b7a75", "#d55e00")
GRAVITY = 9.81  # m/s^2
TRUE = {"length": 1.2, "damping": 0.35}  # m, 1/s
START = {"length": 1.0, "damping": 0.1}
UNITS = {"length": "m", "damping": "1/s"}
SWINGS = [[2.6, 0.0], [-0.4, 2.0]]  # rad, rad/s: one nearly upright, one small
NOISE = 0.12  # rad
SAMPLES, SECONDS = 40, 8.0


def pendulum(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
    """theta'' = -g/l sin theta - b theta'; x: (B, 2) of theta and theta'."""
    angle, speed = x.unbind(-1)
    return torch.stack((speed, -GRAVITY / p["length"] * angle.sin() - p["damping"] * speed), -1)


def measure(seed: int) -> tuple[Tensor, Tensor]:
    """Times (T, B), other ones for each swing, and noisy angles (T, B, 2), without speeds. The solver that makes them
    takes steps of a hundredth."""
    generator = torch.Generator().manual_seed(seed)
    times = (SECONDS * torch.rand(SAMPLES, len(SWINGS), generator=generator, dtype=torch.float64)).sort(0).values
    with torch.no_grad():
        angles = models.ODERNN(pendulum, TRUE, step=0.01, method="rk4")(SWINGS, times)
    angles += NOISE * torch.randn(angles.shape, generator=generator, dtype=torch.float64)
    angles[..., 1] = math.nan
    return times, angles


def draw(times: Tensor, angles: Tensor, curves: dict[str, tuple[Tensor, Tensor]], lines: list[str], path: Path) -> None:
    figure, axes = plt.subplots(len(SWINGS), 1, figsize=(8.2, 5), layout="constrained", sharex=True)
    for b, (axis, colour) in enumerate(zip(axes, COLOURS, strict=True)):
        axis.plot(curves["start"][0], curves["start"][1][:, b, 0], color=OTHER, linewidth=1.2, label="before")
        axis.plot(
            curves["true"][0],
            curves["true"][1][:, b, 0],
            color=INK,
            linewidth=1,
            linestyle="--",
            label="true",
            zorder=4,
        )
        axis.plot(curves["fitted"][0], curves["fitted"][1][:, b, 0], color=colour, linewidth=2.8, label="fitted")
        axis.errorbar(
            times[:, b],
            angles[:, b, 0],
            NOISE,
            fmt="o",
            markersize=3.6,
            color=INK,
            markerfacecolor="white",
            elinewidth=0.9,
            zorder=5,
            label="measured ± noise",
        )
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.set(ylabel="angle (rad)", xlim=(0, SECONDS))
        axis.legend(frameon=False, loc="upper right", ncols=4, labelcolor=INK, fontsize="small")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.18 * (high - low))  # room for the legend
    axes[-1].set_xlabel("time (s)")
    axes[0].set_title("      ".join(lines), color=INK, fontsize="medium", loc="left")
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=float, default=0.05, help="of the fit, in seconds")
    parser.add_argument("--out", type=Path, default=Path("ode_pendulum.png"))
    options = parser.parse_args()

    times, angles = measure(options.seed)
    model = models.ODERNN(pendulum, START, step=options.step, method="rk4")
    with torch.no_grad():
        curves = {"start": model.trajectory([[2.3, 0.0], [-0.4, 1.5]], SECONDS)}
        fit = model.fit([[2.3, 0.0], [-0.4, 1.5]], times, angles, learn_start=True, positive=True)
        curves["fitted"] = model.trajectory(fit.x0, SECONDS)
        curves["true"] = models.ODERNN(pendulum, TRUE, step=0.01, method="rk4").trajectory(SWINGS, SECONDS)
    errors = model.standard_errors(fit.x0, times, angles, learn_start=True)
    print(f"{fit.reason} after {len(fit.losses) - 1} iterations; root mean squared error {math.sqrt(fit.loss):.3f} rad")
    lines = []
    for name, true in TRUE.items():
        found, error = fit.parameters[name].item(), errors[name].item()
        lines.append(f"{name} {found:.4f} ± {error:.4f} {UNITS[name]} (true {true:g})")
        print(f"  {lines[-1]}, {(found - true) / error:+.1f} standard errors away")
    draw(times, angles, curves, lines, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
