"""RealNVP on two interleaved half circles: trains, then draws data, learned density and samples.

    python examples/density_2d.py --out density_2d.png

Needs matplotlib (`pip install '.[cli]'`). The training loop is written out; `pygen.training` has one for real work.
"""

import argparse
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from pygen import models

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

EXTENT = 2.7  # the pictures show [-EXTENT, EXTENT]^2


def two_moons(n: int, rng: np.random.Generator, noise: float = 0.08) -> np.ndarray:
    """(n, 2) float32: half of the points on each of two half circles, centred at the origin."""
    angle = math.pi * rng.random(n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    points = 1.5 * np.stack((x, y), 1) + noise * rng.standard_normal((n, 2))
    return points.astype(np.float32)


def train(model: models.RealNVP, steps: int, batch: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        loss = -model.log_prob(torch.from_numpy(two_moons(batch, rng))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % max(1, steps // 5) == 0:
            print(f"step {step:5d}  {loss.item():.3f} nats")


@torch.no_grad()
def density(model: models.RealNVP, side: int) -> Tensor:
    """p at the centres of side x side cells; row 0 is the lowest y."""
    centres = (torch.arange(side) + 0.5) * (2 * EXTENT / side) - EXTENT
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return model.log_prob(torch.stack((x.flatten(), y.flatten()), 1)).exp().view(side, side)


def draw(data: np.ndarray, p: Tensor, samples: np.ndarray, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    corners = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axes[0].scatter(*data.T, s=2, color="#22303c")
    axes[1].imshow(p.numpy(), origin="lower", extent=corners, cmap="viridis", interpolation="bilinear")
    axes[2].scatter(*samples.T, s=2, color="#0b7a75")
    for axis, title in zip(axes, ("data", "learned density", "samples of the model"), strict=True):
        axis.set(title=title, xlim=corners[:2], ylim=corners[2:], xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=120, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("density_2d.png"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = models.RealNVP((2,), depth=10, hidden=(64, 64))
    train(model, options.steps, options.batch, rng)

    model.eval()
    side = 400
    p = density(model, side)
    mass = p.sum().item() * (2 * EXTENT / side) ** 2
    print(f"the density's integral over the picture is {mass:.4f}")
    draw(two_moons(3000, rng), p, model.sample(3000).numpy(), options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
