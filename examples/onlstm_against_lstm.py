"""ON-LSTM against nn.LSTM on one text, character by character: as many parameters, the same recipe, the same steps.

    python examples/onlstm_against_lstm.py plays.txt --epochs 10 --out runs/against

Each model first looks for its learning rate, an epoch with each; then both train from the same seed. The table has the
bits per character of the test text, the picture the curves. Runs are kept in --out: called again, finished ones are not
repeated. A text of a million characters takes about half an hour on two cores. Needs the `train` and `cli` extras.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch

from pygen import data, training
from pygen.models.onlstm import ONLSTMLanguageModel
from pygen.training import checkpoint, metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

NAMES = {"onlstm": "ON-LSTM", "lstm": "nn.LSTM"}
COLOURS = {"onlstm": "#0b7a75", "lstm": "#d1495b"}
Run = tuple[ONLSTMLanguageModel, Path]


def configs(text: data.Dataset) -> dict[str, dict[str, Any]]:
    """The arguments of both models, with (nearly) as many parameters."""
    model = ONLSTMLanguageModel(**ONLSTMLanguageModel.arguments_for(text))
    return {"onlstm": model.config, "lstm": model.lstm_config()}


def trained(config: dict[str, Any], text: data.Dataset, epochs: int, rate: float, seed: int, out: Path) -> Run:
    """A model with its best weights; read from the run's folder if it is finished."""
    settings = training.TrainConfig(
        **{**ONLSTMLanguageModel.train_defaults, "epochs": epochs, "learning_rate": rate, "seed": seed, "device": "cpu"}
    )
    if not (out / checkpoint.LAST).exists() or len(metrics.read(out / checkpoint.METRICS)) < epochs:
        torch.manual_seed(seed)
        training.train(ONLSTMLanguageModel(**config), text, settings, out, resume=(out / checkpoint.LAST).exists())
    return training.load_model(out), out  # type: ignore[return-value]


def best_rate(config: dict[str, Any], text: data.Dataset, rates: list[float], seed: int, out: Path) -> float:
    """The learning rate with the lowest validation loss after an epoch; without a choice, the one there is."""
    if len(rates) == 1:
        return rates[0]
    losses = {}
    for rate in rates:
        _, run = trained(config, text, 1, rate, seed, out / f"rate-{rate:g}")
        losses[rate] = min(row["valid"] for row in metrics.read(run / checkpoint.METRICS))
    return min(losses, key=losses.__getitem__)


def picture(path: Path, runs: dict[str, Run]) -> None:
    """Bits per character of training and validation against epochs."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name, (_, run) in runs.items():
        rows = metrics.read(run / checkpoint.METRICS)
        epochs = [row["epoch"] for row in rows]
        for column, style, what in (("loss", ":", "training"), ("valid", "-", "validation")):
            bits = [row[column] / math.log(2) for row in rows]
            axes.plot(epochs, bits, style, color=COLOURS[name], lw=2, label=f"{NAMES[name]}, {what}")
    axes.set(xlabel="epoch", ylabel="bits per character")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a UTF-8 file")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2], help="learning rates to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/against"))
    options = parser.parse_args()

    text = data.load(options.text, level="character")
    runs: dict[str, Run] = {}
    rates = {}
    for name, config in configs(text).items():
        folder = options.out / name
        rates[name] = best_rate(config, text, options.rates, options.seed, folder)
        runs[name] = trained(config, text, options.epochs, rates[name], options.seed, folder / "run")
    print(f"\n{'model':10}{'hidden':>8}{'parameters':>12}{'rate':>8}{'seconds':>9}{'test bits/character':>21}")
    for name, (model, run) in runs.items():
        parameters = sum(p.numel() for p in model.parameters())
        seconds = metrics.read(run / checkpoint.METRICS)[-1]["seconds"]
        bits = training.evaluate(model, text.test) / math.log(2)
        hidden = model.config["hidden_size"]
        print(f"{NAMES[name]:10}{hidden:>8}{parameters:>12,}{rates[name]:>8g}{seconds:>9.0f}{bits:>21.4f}")
    picture(options.out / "curves.png", runs)
    print(f"wrote {options.out / 'curves.png'}")


if __name__ == "__main__":
    main()
