"""A classifier of digits that can be inverted: trains, classifies, and finds the digits again from its features.

    python examples/iresnet_digits.py --epochs 12 --out iresnet_digits

Needs the `train` and `cli` extras. The folder gets the run and a picture, inversions.png.
"""

import argparse
from pathlib import Path

import torch

from pygen import data, models, training
from pygen._plots import save_reconstructions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("iresnet_digits"))
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    digits = data.load("digits")
    model = models.IResNet(**models.IResNet.arguments_for(digits), objective="classifier", blocks=2)
    config = training.TrainConfig(epochs=options.epochs, learning_rate=1e-2, seed=options.seed, device="cpu")
    training.train(model, digits, config, options.out)

    accuracy = training.measure(model, *digits.tensors("test", labelled=True))["accuracy"]
    found = model.invert(model.features(digits.test))
    error = (found.x - (digits.test + 0.5)).abs().amax().item()
    print(f"test accuracy {accuracy:.1%}")
    print(f"{int(found.converged.sum())} of {len(digits.test)} inverses converged, ", end="")
    print(f"in at most {int(found.iterations.max())} iterations of a block; largest error {error:.1e} of a grey level")
    path = options.out / "inversions.png"
    again = model.reconstruct(digits.test[:64])
    save_reconstructions(path, digits.test[:64], again, digits.levels, below=model.reconstruction)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
