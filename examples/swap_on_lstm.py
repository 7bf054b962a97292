"""A model with nn.LSTM, and the same with pygen's ONLSTM: what each learns of nested brackets, and the times of both.

    python examples/swap_on_lstm.py

One line changes: which recurrent module the model is given. ONLSTM also says how far apart neighbouring symbols are:
the last lines show its distances for one bracketing.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.nn.on_lstm import ONLSTM

SYMBOLS = "([)]"
LAYERS, CHUNK_SIZE = 2, 8


def brackets(length: int, rng: random.Random) -> list[int]:
    """A balanced string of two kinds of brackets, of even length, as indices into SYMBOLS."""
    word: list[int] = []
    open_kinds: list[int] = []
    for left in range(length, 0, -1):
        if not open_kinds or (len(open_kinds) < left and rng.random() < 0.5):
            open_kinds.append(rng.randrange(2))
            word.append(open_kinds[-1])
        else:
            word.append(2 + open_kinds.pop())
    return word


def batch_of(size: int, length: int, rng: random.Random) -> Tensor:
    """(T, B) int64."""
    return torch.tensor([brackets(length, rng) for _ in range(size)]).t()


class NextSymbol(nn.Module):
    """tokens: (T, B) -> logits (T, B, symbols) of each following symbol."""

    def __init__(self, recurrent: Callable[..., nn.Module], hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS), hidden)
        self.recurrent = recurrent(hidden, hidden, LAYERS)
        self.head = nn.Linear(hidden, len(SYMBOLS))

    def forward(self, tokens: Tensor) -> Tensor:
        output, _ = self.recurrent(self.embedding(tokens))
        return self.head(output)


def loss_of(model: NextSymbol, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:-1]).flatten(0, 1), tokens[1:].flatten())


@torch.no_grad()
def right_kinds(model: NextSymbol, tokens: Tensor) -> float:
    """How many of the closing brackets get the kind that they must have."""
    closing = model(tokens[:-1])[..., 2:].argmax(2) + 2
    is_closing = tokens[1:] >= 2
    return (closing == tokens[1:])[is_closing].double().mean().item()


def train(models: dict[str, NextSymbol], options: argparse.Namespace) -> dict[str, list[float]]:
    """Both take every batch, in turns; seconds of each step."""
    rng = random.Random(0)
    optimizers = {name: torch.optim.Adam(model.parameters(), 3e-3) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.steps):
        tokens = batch_of(options.batch, options.length, rng)
        for name, model in models.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss_of(model, tokens).backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show_distances(model: NextSymbol, length: int) -> None:
    """The layers' mean forget distance before every symbol of one bracketing: long where much is forgotten."""
    tokens = torch.tensor(brackets(length, random.Random(2)))
    recurrent = model.recurrent
    assert isinstance(recurrent, ONLSTM)
    recurrent.return_distances = True
    with torch.no_grad():
        _, _, (distance_forget, _) = recurrent(model.embedding(tokens))
    distance = distance_forget.mean(0)
    low, high = distance.min(), distance.max()
    print(f"forget distances, from {low:.3f} (#) to {high:.3f} ({'#' * 20})")
    for token, one in zip(tokens, distance, strict=True):
        print(f"  {SYMBOLS[token]} {'#' * (1 + int(19 * (one - low) / (high - low)))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="symbols of a bracketing, an even number")
    parser.add_argument("--hidden", type=int, default=64, help=f"a multiple of {CHUNK_SIZE}")
    options = parser.parse_args()

    torch.manual_seed(0)
    models = {
        "nn.LSTM": NextSymbol(nn.LSTM, options.hidden),
        "ONLSTM": NextSymbol(lambda *sizes: ONLSTM(*sizes, chunk_size=CHUNK_SIZE), options.hidden),  # the line
    }
    seconds = train(models, options)
    unseen = batch_of(256, options.length, random.Random(1))
    for name, model in models.items():
        with torch.no_grad():
            loss = loss_of(model, unseen).item()
        print(
            f"{name:8} loss {loss:.3f}, {right_kinds(model, unseen):6.1%} of the closing brackets of the right kind, "
            f"{statistics.median(seconds[name]) * 1e3:6.2f} ms a training step"
        )
    show_distances(models["ONLSTM"], 16)


if __name__ == "__main__":
    main()
