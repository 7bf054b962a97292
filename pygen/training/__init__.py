"""Training: one loop for every model, and the files of a run. Needs the `train` extra."""

from pygen.training.checkpoint import load_model
from pygen.training.config import Result, TrainConfig, TrainingDiverged
from pygen.training.evaluate import evaluate, measure
from pygen.training.loop import train

__all__ = ["Result", "TrainConfig", "TrainingDiverged", "evaluate", "load_model", "measure", "train"]
