"""Base densities: what a flow maps its data to. flow.py adds the log-determinant to them, and samples from them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pygen.reference._dtypes import widen


class Base(NamedTuple):
    """`log_prob` takes z (B, ...) to (B,) nats; `sample` takes what torch.randn takes."""

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[..., Tensor]


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """(B, ...) -> (B,): log N(z; 0, 1), summed over each sample."""
    z = widen(z).flatten(1)
    return -0.5 * (z.square().sum(1) + z.size(1) * math.log(2 * math.pi))


def standard_logistic_log_prob(z: Tensor) -> Tensor:
    r"""(B, ...) -> (B,): the standard logistic :math:`-\ln(1 + e^z) - \ln(1 + e^{-z})`, summed over each sample.

    Example:
        >>> import torch
        >>> from pygen.models.base import standard_logistic_log_prob
        >>> standard_logistic_log_prob(torch.zeros(1, 1)).exp()  # its mode is 1/4
        tensor([0.2500])

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, section 3.4.
    """
    z = widen(z).flatten(1)
    return (F.logsigmoid(z) + F.logsigmoid(-z)).sum(1)


def _logistic(*shape: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(shape, dtype=dtype, device=device, generator=generator)
    # rand may be 0 but not 1; its logit is not a number that anything can be inverted from.
    return u.clamp_min(torch.finfo(dtype).tiny).logit()


BASES = {
    "normal": Base(standard_normal_log_prob, torch.randn),
    "logistic": Base(standard_logistic_log_prob, _logistic),
}


def base_density(name: str) -> Base:
    """The base density of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in BASES:
        raise ValueError(f"prior must be one of {', '.join(BASES)}, got {name!r}")
    return BASES[name]
