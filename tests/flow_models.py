"""The flow models that tests go through, small, and with weights at which every layer does something."""

import torch

from pygen import models

# name of the variant: (registered name, shape of a sample, arguments). Odd sizes, one and three channels, both priors.
VARIANTS = {
    "nice": ("nice", (5,), {"depth": 3, "hidden": (8,)}),
    "nice normal": ("nice", (2, 3, 3), {"depth": 4, "hidden": (8,), "prior": "normal", "logit": True}),
    "realnvp": ("realnvp", (5,), {"depth": 3, "hidden": (8,)}),
    "realnvp multiscale": ("realnvp", (1, 4, 4), {"architecture": "multiscale", "depth": 4, "hidden": (4,)}),
    "realnvp multiscale odd": ("realnvp", (6, 2), {"architecture": "multiscale", "depth": 3, "hidden": (4,)}),
    "glow": ("glow", (1, 4, 4), {"steps": 2, "hidden": (4,)}),
    "glow additive": ("glow", (3, 4, 2), {"steps": 2, "scales": 1, "hidden": (4, 4), "coupling": "additive"}),
    "glow plain": ("glow", (4, 4), {"steps": 2, "hidden": (4,), "learn_prior": False, "logit": False}),
    "nsf": ("nsf", (5,), {"depth": 3, "hidden": (8,), "num_bins": 4}),
    "nsf lu": ("nsf", (2, 3), {"depth": 2, "hidden": (8,), "num_bins": 4, "linear": "lu"}),
    "nsf multiscale": ("nsf", (1, 4, 4), {"architecture": "multiscale", "depth": 2, "hidden": (4,), "num_bins": 4}),
}


def randomized(model, seed=0, gain=0.5):
    """Conditioners start at zero; a test needs layers that do something: weights of gain / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        torch.nn.init.normal_(parameter, std=gain / fan_in**0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("initialized"):
            buffer.fill_(True)  # ActNorm keeps these weights, in training mode too
    return model.eval()


def variant(name, **arguments):
    """A new model of this variant, with arguments added; what is random in it and no parameter is always the same."""
    torch.manual_seed(0)
    kind, shape, own = VARIANTS[name]
    return models.create(kind, {"shape": shape, **own, **arguments})


def data_of(model, n, seed=0):
    """(n, *shape) real numbers that the model takes: in its levels, if it has some."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if model.levels is None:
        return torch.randn(n, *model.shape, generator=generator, dtype=dtype)
    return model.levels * torch.rand(n, *model.shape, generator=generator, dtype=dtype)
