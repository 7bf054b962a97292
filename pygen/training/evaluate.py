"""The loss and the metrics of a model on data it does not train on, the same at every call: its noise is seeded."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pygen.models.model import Model
from pygen.training.order import uneven_streams

_BATCH = 256
# In which a sequential model reads: on 55,000 characters the beginnings without a past added 0.0003 to a loss of 2.139.
STREAMS = 16


@torch.no_grad()
def summed_loss(model: Model, *data: Tensor, draws: int, device: torch.device | str, streams: int = STREAMS) -> float:
    """Sum over the samples of `model.loss`, averaged over draws of its noise (torch's global generator). `data` are x
    and, for a model that is trained with them, labels. A sequential model reads its windows once, in parallel streams.
    """
    total = 0.0
    draws = 1 if model.sequential else draws
    with beginning(model):
        for part in _parts(model, data, device, streams):
            for _ in range(draws if len(part[0]) else 0):
                total += model.loss(*part).item() * len(part[0]) / draws
    return total


@torch.no_grad()
def summed_statistics(model: Model, *data: Tensor, device: torch.device | str) -> Tensor:
    """Sum of `model.statistics` over the samples, float64, on `device`."""
    with beginning(model):
        return torch.stack([model.statistics(*part) for part in _parts(model, data, device, STREAMS)]).sum(0)


@contextlib.contextmanager
def beginning(model: Model) -> Iterator[None]:
    """A sequential model begins its sequences here, and afterwards stands where it stood."""
    before, model.carried = model.carried, () if model.sequential else None
    try:
        yield
    finally:
        model.carried = before


def _parts(
    model: Model, data: Sequence[Tensor], device: torch.device | str, streams: int
) -> Iterator[tuple[Tensor, ...]]:
    if not model.sequential:
        for part in zip(*(tensor.split(_BATCH) for tensor in data), strict=True):
            yield tuple(tensor.to(device) for tensor in part)
        return
    for indices in uneven_streams(len(data[0]), streams):
        yield tuple(tensor[indices].to(device) for tensor in data)


def evaluate(model: Model, x: Tensor, *labels: Tensor, draws: int = 10, seed: int = 0, streams: int = STREAMS) -> float:
    """Mean of `model.loss` over x, in its `loss_unit`, averaged over draws of its noise (dequantisation, for flows).

    Args:
        model: in eval mode; x is brought to its device.
        x: (N, *shape), N > 0.
        labels: (N,), for a model that is trained with them.
        draws: how often to draw the noise; a sequential model has none.
        seed: of the noise. The global random state is left as it was.
        streams: in how many parallel streams a sequential model reads x. Every window is counted once, with all of its
            stream's past; 1 is x in one piece, exact and slow.

    Raises:
        ValueError: x is empty, the model is in training mode, or streams is not positive.

    Example:
        >>> from pygen import data, models, training
        >>> digits = data.load("digits")
        >>> model = models.RealNVP(digits.shape, levels=17).eval()
        >>> 0 < training.evaluate(model, digits.test) < 10
        True
    """
    device = _check("evaluate", model, x)
    if streams < 1:
        raise ValueError(f"evaluate: streams must be positive, got {streams}")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return summed_loss(model, x, *labels, draws=draws, device=device, streams=streams) / len(x)


def measure(model: Model, x: Tensor, *labels: Tensor) -> dict[str, float]:
    """What the model reports beside its loss, over x: `model.metrics` and `metrics_of_loss`; nothing for flows.

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
        found = model.metrics(summed_statistics(model, x, *labels, device=device))
        if set(model.metric_names) - found.keys():  # the others follow from the loss
            found |= model.metrics_of_loss(summed_loss(model, x, *labels, draws=1, device=device) / len(x))
        return found


def _check(name: str, model: Model, x: Tensor) -> torch.device:
    if len(x) == 0:
        raise ValueError(f"{name}: x is empty")
    if model.training:
        raise ValueError(f"{name}: the model is in training mode; call model.eval() first")
    return next(model.parameters()).device
