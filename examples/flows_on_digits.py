"""NICE, RealNVP, Glow and NSF trained for the same minutes on the same digits, on one thread, in one table.

    python examples/flows_on_digits.py --minutes 2 --out flows_on_digits.md

Needs the `train` extra. The table (markdown) has test bits per dimension beside two simple densities. The settings were
chosen by validation; what they have in common is what keeps flows from learning 1,347 images by heart.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from pygen import data, models, training
from pygen.models.baselines import FullGaussian, PixelHistogram

TRAINING: dict[str, Any] = {"learning_rate": 5e-3, "weight_decay": 1e-2, "ema": 0.995, "validation_draws": 2}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "NICE": ("nice", {"logit": True, "alpha": 0.01, "depth": 6, "hidden": (128, 128), "dropout": 0.3}),
    "RealNVP": (
        "realnvp",
        {"alpha": 0.01, "architecture": "multiscale", "depth": 4, "hidden": (32,), "dropout": 0.1},
    ),
    "Glow": ("glow", {"alpha": 0.01, "steps": 4, "hidden": (32,), "dropout": 0.1}),
    "NSF": ("nsf", {"alpha": 0.01, "depth": 6, "hidden": (128, 128), "dropout": 0.4}),
}


def trained(name: str, arguments: dict[str, Any], digits: data.Dataset, minutes: float, seed: int, run: Path) -> str:
    """Train one flow; its cells of the table."""
    torch.manual_seed(seed)
    flow = models.create(name, {"shape": digits.shape, "levels": digits.levels, **arguments})
    config = training.TrainConfig(epochs=None, max_minutes=minutes, seed=seed, device="cpu", **TRAINING)
    result = training.train(flow, digits, config, run)
    if result.interrupted:
        raise KeyboardInterrupt
    bits = training.evaluate(flow, digits.test, draws=20)
    size = sum(parameter.numel() for parameter in flow.parameters())
    return f"{bits:.3f} | {size:,} | {result.steps:,}"


def table(minutes: float, seed: int, runs: Path, only: list[str]) -> str:
    """The whole table; runs are kept in `runs`."""
    digits = data.load("digits")
    gaussian = FullGaussian(digits.train).bits_per_dim(digits.test).mean().item()
    histogram = PixelHistogram(digits.train, digits.levels).bits_per_dim(digits.test).mean().item()
    rows = [
        "| density | test bits/dim | parameters | steps |",
        "| --- | ---: | ---: | ---: |",
        f"| Gaussian, full covariance | {gaussian:.3f} | | |",
        f"| histogram of every pixel | {histogram:.3f} | | |",
    ]
    for title in only:
        print(title)
        name, arguments = PRESETS[title]
        rows.append(f"| {title} | {trained(name, arguments, digits, minutes, seed, runs / name)} |")
    note = f"{minutes:g} min of training each, one thread, seed {seed}, torch {torch.__version__}."
    return "\n".join((*rows, "", note, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of training, for each flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--runs", type=Path, help="folder that keeps the trained flows, for `pygen sample`")
    parser.add_argument("--out", type=Path, default=Path("flows_on_digits.md"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            text = table(options.minutes, options.seed, options.runs or Path(temporary), options.only)
    except ValueError as error:  # a folder that already holds runs, for one
        parser.error(str(error))
    options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
