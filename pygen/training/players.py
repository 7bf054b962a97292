"""Who learns in a training: the whole model, or players that move by turns, each with its optimizer and loss. loop.py
gives them their turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pygen.models.model import Model
from pygen.nn._codebook_sync import packed_codebook_updates
from pygen.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class _Objective(nn.Module):
    """A player's loss as a forward pass, for wrappers (DDP, autocast) that hook into forward."""

    def __init__(self, model: Model, player: str) -> None:
        super().__init__()
        self.model = model
        self.player = player

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        # Whatever codebooks a model has, they learn from all processes' data by one all-reduce.
        with packed_codebook_updates(self.model):
            return self.model.loss(x, *labels) if labels else self.model.player_loss(self.player, x)


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    # One fused pass over all parameters: a quarter of a small model's step goes into the optimizer otherwise.
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.optimizer == "asgd":
        return torch.optim.SGD(parameters, **settings)  # averaged by the loop, which keeps an average anyway
    kind = torch.optim.AdamW if config.weight_decay else torch.optim.Adam
    return kind(parameters, betas=config.betas, **settings)


class Player:
    """A part of a model that learns by a loss of its own, and its optimizer. Most models are their only player."""

    def __init__(self, model: Model, name: str, config: TrainConfig, accelerator: Accelerator) -> None:
        self.name = name
        self.parameters = list(model.get_submodule(name).parameters())
        own = set(map(id, self.parameters))
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        optimizer = _optimizer(self.parameters, config)
        with self.alone():  # DDP waits for the gradient of whatever requires one now
            self.objective, self.optimizer = accelerator.prepare(_Objective(model, name), optimizer)
        if accelerator.num_processes > 1:
            # DDP has made the buffers of all processes equal, and they change alike: codebooks by their own all-reduce.
            # Sending them again in every step would cost as much as the gradients, and hide those that do not.
            self.objective.broadcast_buffers = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile the other players' parameters are constants: no work for gradients that nobody uses."""
        for parameter in self._others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._others:
                parameter.requires_grad_(True)

    @property
    def key(self) -> str:
        """The prefix of its optimizer's tensors in a checkpoint."""
        return f"optimizer.{self.name}." if self.name else "optimizer."


def parameter_pairs(
    ema: Model, model: Model
) -> tuple[tuple[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]:
    """The parameters of the averaged model and of the model, those that are averaged and those that are copied."""
    kept = {id(p) for name in model.averaged for p in model.get_submodule(name).parameters()}
    averaged: tuple[list[Tensor], list[Tensor]] = ([], [])
    copied: tuple[list[Tensor], list[Tensor]] = ([], [])
    for mine, its in zip(ema.parameters(), model.parameters(), strict=True):
        for pair, parameter in zip(averaged if id(its) in kept else copied, (mine, its), strict=True):
            pair.append(parameter)
    return averaged, copied
