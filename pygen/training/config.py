"""What a training run is told (`TrainConfig`) and what it answers (`Result`)."""

from dataclasses import dataclass
from pathlib import Path

OPTIMIZERS = ("adamw", "asgd")
PRECISIONS = ("no", "bf16")  # no fp16: its loss scaling would hide a loss that became NaN


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; every model trains with the same ones.

    Args:
        epochs: stop after so many passes over the training data; None to stop by `max_minutes` alone.
        max_minutes: stop after so many minutes of training; None to stop by `epochs` alone. The learning-rate schedule
            follows whichever is nearer to its end.
        batch_size: samples per process and step.
        optimizer: "adamw" (Adam when weight_decay is 0), or "asgd": stochastic gradient descent and, once the
            validation loss has stopped falling, the mean of all weights since in place of the moving average.
        learning_rate, weight_decay: of the optimizer.
        betas: of AdamW.
        patience: with "asgd", averaging begins when a validation loss is above the lowest of those that are older than
            the last so many.
        warmup_steps: steps in which the learning rate grows linearly.
        final_learning_rate: where the cosine ends, as a fraction of learning_rate.
        clip: bound of the gradient's norm.
        ema: decay of the exponential moving average of the parameters, in [0, 1); validation and `best` use it. Not
            with "asgd".
        seed: of data order, dropout and noise.
        precision: "no" (float32) or "bf16" (autocast).
        device: "auto", "cpu" or "cuda".
        checkpoint_seconds: write a checkpoint at least so often (and at the end).
        validate_epochs: measure the validation loss every so many epochs.
        validation_draws: average the validation loss over so many draws of its noise; always the same ones.
        progress: show a progress bar (needs rich).

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int | None = 100
    max_minutes: float | None = None
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    patience: int = 5
    warmup_steps: int = 50
    final_learning_rate: float = 0.02
    clip: float = 1.0
    ema: float = 0.99
    seed: int = 0
    precision: str = "no"
    device: str = "auto"
    checkpoint_seconds: float = 30.0
    validate_epochs: int = 1
    validation_draws: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_minutes is None:
            raise ValueError("TrainConfig: give epochs or max_minutes, or the run would never end")
        for name in ("epochs", "max_minutes", "batch_size", "learning_rate", "clip", "validate_epochs",
                     "validation_draws", "patience"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainConfig: {name} must be positive, got {value}")
        for name in ("weight_decay", "warmup_steps", "final_learning_rate", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainConfig: {name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"TrainConfig: ema must be in [0, 1), got {self.ema}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"TrainConfig: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"TrainConfig: precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        steps, epochs, seconds: done, over all resumptions.
        best_valid: the lowest validation loss, in the model's unit.
        samples_per_second: training samples over training time of this call, all processes together.
        interrupted: Ctrl-C ended it.
        run_dir: where its files are.
    """

    steps: int
    epochs: int
    seconds: float
    best_valid: float
    samples_per_second: float
    interrupted: bool
    run_dir: Path


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite."""
