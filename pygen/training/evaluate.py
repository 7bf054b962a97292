"""The loss of a model on data it does not train on, the same at every call: its noise is seeded."""

import torch
from torch import Tensor, nn

_BATCH = 256


@torch.no_grad()
def summed_loss(model: nn.Module, x: Tensor, *, draws: int, device: torch.device | str) -> float:
    """Sum over the samples of `model.loss`, averaged over draws of its noise (torch's global generator)."""
    total = 0.0
    for part in x.split(_BATCH):
        part = part.to(device)
        for _ in range(draws):
            total += model.loss(part).item() * len(part) / draws  # type: ignore[operator]
    return total


def evaluate(model: nn.Module, x: Tensor, *, draws: int = 10, seed: int = 0) -> float:
    """Mean of `model.loss` over x (for flows: bits per dimension), averaged over draws of the dequantisation noise.

    Args:
        model: in eval mode; x is brought to its device.
        x: (N, *shape), N > 0.
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
    if len(x) == 0:
        raise ValueError("evaluate: x is empty")
    if model.training:
        raise ValueError("evaluate: the model is in training mode; call model.eval() first")
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return summed_loss(model, x, draws=draws, device=device) / len(x)
