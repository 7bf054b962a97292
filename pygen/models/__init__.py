"""Complete models, one file each, readable next to their papers; `create` builds one from its name and config."""

from collections.abc import Mapping
from typing import Any

from pygen.models.flow import Flow
from pygen.models.glow import Glow
from pygen.models.iresnet import IResNet
from pygen.models.model import Model
from pygen.models.nice import NICE
from pygen.models.nsf import NSF
from pygen.models.ode_rnn import ODERNN
from pygen.models.onlstm import ONLSTMLanguageModel
from pygen.models.preprocess import Logit, Scale, dequantize
from pygen.models.realnvp import RealNVP
from pygen.models.sngan import SNGAN
from pygen.models.vqvae import VQVAE

MODELS: dict[str, type[Model]] = {
    model.name: model for model in (NICE, RealNVP, Glow, NSF, IResNet, VQVAE, SNGAN, ONLSTMLanguageModel)
}


def check_name(name: str) -> None:
    """Raise a ValueError that lists what exists when there is no such model."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there is: {', '.join(sorted(MODELS))}")


def create(name: str, config: Mapping[str, Any]) -> Model:
    """Build a model from its registered name and the arguments of its class.

    Args:
        name: a key of `MODELS`.
        config: keyword arguments of the class, as in `model.config`.

    Raises:
        ValueError: no such model, or an argument that it does not have.

    Example:
        >>> from pygen import models
        >>> model = models.create("realnvp", {"shape": [2], "depth": 2})
        >>> type(models.create(model.name, model.config)).__name__
        'RealNVP'
    """
    check_name(name)
    try:
        return MODELS[name](**config)
    except TypeError as error:
        raise ValueError(f"model {name}: {error}") from error


__all__ = [
    "MODELS",
    "NICE",
    "NSF",
    "ODERNN",
    "ONLSTMLanguageModel",
    "SNGAN",
    "VQVAE",
    "Flow",
    "Glow",
    "IResNet",
    "Logit",
    "Model",
    "RealNVP",
    "Scale",
    "check_name",
    "create",
    "dequantize",
]
