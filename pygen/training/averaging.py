"""The averaged model of a training, which validation, `best` and samples use: loop.py gives it every step's weights."""

import copy
from typing import Any

import torch

from pygen.models.model import Model
from pygen.training.config import TrainConfig
from pygen.training.players import parameter_pairs

_WARMUP = 10  # the average starts as a plain mean, decay (1 + n) / (10 + n), and forgets the first weights


class Average:
    """A copy of a model with the moving average of its weights or, with averaged SGD, the mean of those since a step.

    Attributes:
        model: the copy, in eval mode, without gradients.
        since: the step from which on averaged SGD takes the mean; None before, when the copy is the model itself.
        valid: the validation losses by which that is decided.
    """

    def __init__(self, model: Model, config: TrainConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._parameters, self._copied = parameter_pairs(self.model, model)
        self._source = model
        self.since: int | None = None
        self.valid: list[float] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        torch._foreach_lerp_(*self._parameters, 1 - self._decay(step))
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        for average, buffer in zip(self.model.buffers(), self._source.buffers(), strict=True):
            average.copy_(buffer)

    def _decay(self, step: int) -> float:
        """How much of the average stays."""
        if self.config.optimizer != "asgd":
            return min(self.config.ema, step / (_WARMUP + step))
        return 0.0 if self.since is None else 1 - 1 / (step - self.since)

    def validated(self, valid: float, step: int) -> None:
        """Averaged SGD begins to average when the loss is above the lowest of `patience` validations ago."""
        if self.config.optimizer != "asgd":
            return
        older = self.valid[: -self.config.patience]
        if self.since is None and older and valid > min(older):
            self.since = step
        self.valid.append(valid)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, beside the weights."""
        return {"averaged_since": self.since, "valid": self.valid}

    def restore(self, info: dict[str, Any]) -> None:
        self.since, self.valid = info.get("averaged_since"), info.get("valid", [])
