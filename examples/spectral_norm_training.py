"""How well do the steps of the power iteration keep up with training? A small GAN on points of a ring is trained from
one seed with pygen's and with torch's spectral norm; the picture shows the true norms of the discriminator's weights.

    python examples/spectral_norm_training.py --out spectral-norm-training.png

On the left one step of the iteration for each training step, the default: while the largest singular values are close
together and Adam turns the weights, sigma lags by some percent. On the right forty, which hold the weights within one.
Every tenth step the weights that the discriminator used are decomposed in float64. Needs matplotlib
(`pip install '.[cli]'`).
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pygen.nn.utils.spectral_norm import spectral_norm

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

WIDTH = 32
LATENT = 2
EVERY = 10  # training steps between two decompositions
ITERATIONS = (1, 40)  # steps of the power iteration for each training step
NORMALIZERS: dict[str, Callable[..., nn.Module]] = {
    "pygen": spectral_norm,
    "torch": parametrizations.spectral_norm,
}
COLOURS = ("#0b7a75", "#c44536", "#d9a21b", "#5b4b8a")


class Norms(NamedTuple):
    """The largest singular values that a training has seen."""

    steps: list[int]
    names: list[str]
    values: Tensor  # (steps, layers)


def discriminator(normalize: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    """(B, 2) -> (B, 1)."""
    sizes, layers = (2, WIDTH, WIDTH, WIDTH, 1), list[nn.Module]()
    for n_in, n_out in pairwise(sizes):
        linear = nn.Linear(n_in, n_out)
        nn.init.kaiming_normal_(linear.weight)
        layers += [normalize(linear), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


def generator() -> nn.Sequential:
    """(B, LATENT) -> (B, 2)."""
    return nn.Sequential(nn.Linear(LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))


def ring(n: int) -> Tensor:
    """(n, 2): eight clusters on a circle."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return 1.5 * torch.stack((angle.cos(), angle.sin()), 1) + 0.1 * torch.randn(n, 2)


def train(normalize: Callable[[nn.Module], nn.Module], steps: int, batch: int = 64, seed: int = 0) -> Norms:
    """Alternate steps of both networks with the hinge loss; every tenth, the norms of the weights in use."""
    torch.manual_seed(seed)
    critic, maker = discriminator(normalize), generator()
    optimizers = [torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.9)) for net in (critic, maker)]
    layers = [layer for layer in critic if parametrize.is_parametrized(layer)]
    seen, values = [], []

    for step in range(steps):
        fake = maker(torch.randn(batch, LATENT))
        # One weight, and so one step of the power iteration, for both batches and for the decomposition.
        with parametrize.cached():
            loss = F.relu(1 - critic(ring(batch))).mean() + F.relu(1 + critic(fake.detach())).mean()
            if step % EVERY == 0 or step == steps - 1:
                seen.append(step)
                values.append(torch.stack([largest_singular_value(layer.weight) for layer in layers]))
        _descend(optimizers[0], loss)
        _descend(optimizers[1], -critic(fake).mean())
    names = [f"{layer.weight.size(0)} x {layer.weight.size(1)}" for layer in layers]
    return Norms(seen, names, torch.stack(values))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def largest_singular_value(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double().flatten(1))[0]


def draw(found: dict[tuple[str, int], Norms], path: Path) -> None:
    figure, axes = plt.subplots(1, len(ITERATIONS), figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, n_iterations in zip(axes, ITERATIONS, strict=True):
        axis.axhspan(0.99, 1.01, color="#22303c", alpha=0.1, lw=0, label="within 1%")
        ours, theirs = found["pygen", n_iterations], found["torch", n_iterations]
        for i, (name, colour) in enumerate(zip(ours.names, COLOURS, strict=True)):
            axis.plot(ours.steps, ours.values[:, i], color=colour, lw=2.2, alpha=0.8, label=f"layer {i + 1}, {name}")
            axis.plot(theirs.steps, theirs.values[:, i], "k:", lw=0.9, label="torch's, all layers" if i == 3 else None)
        plural = "s" if n_iterations > 1 else ""
        axis.set(xlabel="training step", title=f"{n_iterations} step{plural} of the power iteration a training step")
    axes[0].set(ylabel="true largest singular value of W / sigma", ylim=(0.98, None))
    axes[1].legend(frameon=False, loc="upper right", fontsize=9)
    figure.savefig(path, dpi=120, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("spectral-norm-training.png"))
    options = parser.parse_args()

    found = {}
    for n_iterations in ITERATIONS:
        for name, normalize in NORMALIZERS.items():
            norms = train(partial(normalize, n_power_iterations=n_iterations), options.steps, seed=options.seed)
            found[name, n_iterations] = norms
            low, high = norms.values.min().item(), norms.values.max().item()
            print(f"{name}, {n_iterations:2d} a step: largest singular values from {low:.4f} to {high:.4f}", flush=True)
    draw(found, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
