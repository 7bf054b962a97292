"""The loss and the metrics of a model on data it does not train on, the same at every call: its noise is seeded."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pygen.models.model import Model

_BATCH = 256


@torch.no_grad()
def summed_loss(model: Model, *data: Tensor, draws: int, device: torch.device | str) -> float:
    """Sum over the samples of `model.loss`, averaged over draws of its noise (torch's global generator). `data` are x
    and, for a model that is trained with them, labels."""
    total = 0.0
    for part in _parts(data, device):
        for _ in range(draws):
            total += model.loss(*part).item() * len(part[0]) / draws
    return total


@torch.no_grad()
def summed_statistics(model: Model, *data: Tensor, device: torch.device | str) -> Tensor:
    """Sum of `model.statistics` over the samples, float64, on `device`."""
    return torch.stack([model.statistics(*part) for part in _parts(data, device)]).sum(0)


def _parts(data: Sequence[Tensor], device: torch.device | str) -> Iterator[tuple[Tensor, ...]]:
    for part in zip(*(tensor.split(_BATCH) for tensor in data), strict=True):
        yield tuple(tensor.to(device) for tensor in part)


def evaluate(model: Model, x: Tensor, *labels: Tensor, draws: int = 10, seed: int = 0) -> float:
    """Mean of `model.loss` over x, in its `loss_unit`, averaged over draws of its noise (dequantisation, for flows).

    Args:
        model: in eval mode; x is brought to its device.
        x: (N, *shape), N > 0.
        labels: (N,), for a model that is trained with them.
        draws: how often to draw the noise.
        seed: of the noise. The global random state is left as it was.

    Raises:
        ValueError: x is empty, or the model is in training mode.

    Example:
        >>> from pygen import data, models, training
        >>> digits = data.load("digits")
        >>> model = models.RealNVP(digits.shape, levels=17).eval()
        >>> 0 < training.evaluate(model, digits.test) < 10
        True
    """
    device = _check("evaluate", model, x)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return summed_loss(model, x, *labels, draws=draws, device=device) / len(x)


def measure(model: Model, x: Tensor, *labels: Tensor) -> dict[str, float]:
    """What the model reports beside its loss, over x: `model.metrics`; nothing for flows.

    Args:
        model: in eval mode; x is brought to its device.
        x: (N, *shape), N > 0.
        labels: (N,), for a model that is trained with them.

    Raises:
        ValueError: x is empty, or the model is in training mode.

    Example:
        >>> from pygen import data, models, training
        >>> digits = data.load("digits")
        >>> model = models.VQVAE(digits.shape, levels=17, num_hiddens=8).eval()
        >>> list(training.measure(model, digits.test))
        ['perplexity', 'active_codes']
    """
    device = _check("measure", model, x)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return model.metrics(summed_statistics(model, x, *labels, device=device))


def _check(name: str, model: Model, x: Tensor) -> torch.device:
    if len(x) == 0:
        raise ValueError(f"{name}: x is empty")
    if model.training:
        raise ValueError(f"{name}: the model is in training mode; call model.eval() first")
    return next(model.parameters()).device
