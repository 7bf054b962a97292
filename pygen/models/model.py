"""What training and the command line ask of every model, with answers that suit most. flow.py and vqvae.py fill it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pygen.data import Dataset


def arguments(local: Mapping[str, Any]) -> dict[str, Any]:
    """`locals()` at the start of a model's `__init__` as its `config`: the arguments, tuples as lists for JSON."""
    own = {name: value for name, value in local.items() if name not in ("self", "__class__")}
    return {name: list(value) if isinstance(value, tuple | list) else value for name, value in own.items()}


class Model(nn.Module):
    """A model that `pygen.training` trains and the command `pygen` knows.

    A subclass defines `loss`; one in which several parts learn, each by a loss of its own, defines `players`,
    `player_loss` and, for what validation compares, `loss`. What it has to say beside the loss, it says in two steps,
    so that every process of a training measures its share of the data: `statistics` are added up over batches and
    processes, `metrics` are computed from the sums.

    Attributes:
        name: what the command line calls it.
        loss_unit: what to print after a loss.
        metric_names: the keys of `metrics`, in the order of their columns in metrics.csv.
        pictures: the pictures of pygen/_plots.py that show what it learned; drawn while it trains.
        config: the arguments that rebuild it, of JSON types; saved with every checkpoint.
        shape, levels: of the data, as in `pygen.data.Dataset`.
        sequential: whether samples follow each other, each a window of one sequence: batches are then parallel streams
            in order, in training and in validation, and the model carries its state from one to the next.
        carried: what a sequential model found at the end of the last batch and begins the next with, without gradients:
            tensors (B, ...), fewer streams use their first rows. Whoever runs through a sequence sets it to () where it
            begins, and back to None behind it: then each batch stands alone.
        labelled: whether `loss` and `statistics` take the labels of x, int64 (B,), as a second argument; then the model
            is its only player.
        players: the submodules that learn, each by its own optimizer and loss; "" is the model itself.
        averaged: the submodules whose moving average validation and samples use; the rest is taken as it is.
        train_defaults: settings of `training.TrainConfig` to train it with when nothing else is said.
        asgd_defaults: those that differ with optimizer="asgd".
        cannot: what the command line says when it is asked for what the model cannot do.
        reconstruction: what `reconstruct` gives, for the title of a picture.
    """

    name = "model"
    loss_unit = "loss"
    metric_names: Sequence[str] = ()
    pictures: Sequence[str] = ()
    labelled = False
    sequential = False
    carried: Sequence[Tensor] | None = None
    players: Sequence[str] = ("",)
    averaged: Sequence[str] = ("",)
    train_defaults: Mapping[str, Any] = {}
    asgd_defaults: Mapping[str, Any] = {}
    cannot: Mapping[str, str] = {}
    reconstruction = "what the codes keep of it"
    config: dict[str, Any]
    shape: tuple[int, ...]
    levels: int | None

    @classmethod
    def arguments_for(cls, data: Dataset) -> dict[str, Any]:
        """The arguments that the data decide."""
        return {"shape": data.shape, "levels": data.levels}

    def check_data(self, data: Dataset) -> None:
        """Raise a ValueError when the model was built for other data; training asks before it begins."""
        if data.vocabulary is not None:
            raise ValueError(f"{self.name} does not learn from a text, and {data.name} is one; onlstm does")

    def loss(self, x: Tensor) -> Tensor:
        """What training minimises, a scalar: the mean over x (B, *shape). In eval mode: what validation compares."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(x)")

    def turns(self, step: int) -> Sequence[str]:
        """The players that move in this step, one after the other: 0 is the first step. All have the step's batch."""
        return self.players

    def player_loss(self, player: str, x: Tensor) -> Tensor:
        """What a player minimises in its turn, a scalar; training sees that only its own parameters have gradients."""
        return self.loss(x)

    def statistics(self, x: Tensor) -> Tensor:
        """What `metrics` needs to know of x (B, *shape), as numbers that add up: float64, (S,)."""
        return x.new_zeros(0, dtype=torch.float64)

    def metrics(self, statistics: Tensor) -> dict[str, float]:
        """Numbers to log beside the loss, from the sum of `statistics` over all data."""
        return {}

    def metrics_of_loss(self, loss: float) -> dict[str, float]:
        """Numbers to log that are the mean loss in another unit."""
        return {}
