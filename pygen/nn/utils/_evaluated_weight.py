"""A layer's weight read without changing the layer: what conv_operator_norm and lipschitz_bound measure."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as _SpectralNormHook
from torch.nn.utils.weight_norm import WeightNorm as _WeightNormHook


@torch.no_grad()
def evaluated_weight(module: Any) -> Tensor:
    """The weight as evaluation mode has it, without a step of any iteration: float64, no gradient.

    Raises:
        ValueError: an unknown hook computes it, or it is not finite.
    """
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module, "weight"):
        with _evaluating(module.parametrizations.weight):
            weight = module.parametrizations.weight()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _SpectralNormHook) and hook.name == "weight":
            weight = hook.compute_weight(module, do_power_iteration=False)
        elif isinstance(hook, _WeightNormHook) and hook.name == "weight":
            weight = hook.compute_weight(module)
    if weight is None:
        raise ValueError("the weight must be a parameter or parametrized, got one that an unknown hook computes")
    weight = weight.detach().double()
    if not weight.isfinite().all():
        raise ValueError("the weight must be finite, got infinities or NaN")
    return weight


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """As module.eval(), and afterwards every flag as it was."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = False
        yield
    finally:
        for m, training in flags:
            m.training = training
