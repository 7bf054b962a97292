"""What `ODERNN` is given, checked and in the shapes that it computes with; for ode_rnn.py."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Observed(NamedTuple):
    """Observations: (T, B, D) each what they are, 0 where there is none, and 1 / scale, 0 where there is none; their
    number M."""

    target: Tensor
    weight: Tensor
    number: int


def check_choice(what: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"ODERNN: {what} must be one of {', '.join(choices)}, got {value!r}")


def parameter(name: Any, value: Any, dtype: torch.dtype, device: Any) -> nn.Parameter:
    if not (isinstance(name, str) and name.isidentifier()) or name == "x0" or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"ODERNN: the name of a parameter must be an identifier, and not x0 nor an attribute of nn.ParameterDict, "
            f"got {name!r}"
        )
    # not as_tensor without a dtype, which rounds Python's numbers to float32
    numbers = value.detach() if isinstance(value, Tensor) else np.asarray(value)
    real = numbers.dtype != torch.bool and not numbers.is_complex() if isinstance(numbers, Tensor) else _real(numbers)
    tensor = torch.as_tensor(numbers) if real else None
    if tensor is None or not tensor.isfinite().all():
        raise ValueError(f"ODERNN: parameter {name} must be of finite real numbers, got {value!r}")
    return nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True))


def _real(numbers: np.ndarray) -> bool:
    return numbers.dtype.kind in "fiu"


def written(values: Tensor) -> str:
    """For a message."""
    numbers = [f"{v:.4g}" for v in values.detach().flatten().tolist()]
    return numbers[0] if values.dim() == 0 else f"[{', '.join(numbers)}]"


def starts(x0: Any, like: Tensor | None) -> tuple[Tensor, bool]:
    """x0 as (B, D), and whether it came without B.

    Args:
        like: a parameter, whose dtype and device are the model's.
    """
    if isinstance(x0, Tensor):
        if like is not None and x0.device != like.device:
            raise ValueError(f"ODERNN: x0 must be on the device of the parameters, {like.device}, got {x0.device}")
        own = x0.dtype if x0.is_floating_point() else torch.float64
        x = x0.to(own if like is None else like.dtype)
    else:
        device = None if like is None else like.device
        x = torch.as_tensor(x0, dtype=torch.float64 if like is None else like.dtype, device=device)
    if x.dim() not in (1, 2) or not x.numel():
        raise ValueError(f"ODERNN: x0 must be (B, D) or (D,) and not empty, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("ODERNN: x0 must be finite")
    return (x.unsqueeze(0), True) if x.dim() == 1 else (x, False)


def checked_times(times: Any, batch: int, t0: float) -> np.ndarray:
    """float64 (T, 1) or (T, B)."""
    if isinstance(times, Tensor):
        if times.requires_grad:
            raise ValueError("ODERNN: times are constants, they cannot require a gradient")
        times = times.cpu().numpy()
    t = np.asarray(times, dtype=np.float64)
    if t.ndim not in (1, 2) or not len(t) or (t.ndim == 2 and t.shape[1] != batch):
        raise ValueError(f"ODERNN: times must be (T,) or (T, B) = (T, {batch}) and T at least 1, got {t.shape}")
    if not math.isfinite(t0):
        raise ValueError(f"ODERNN: t0 must be finite, got {t0}")
    if np.isinf(t).any() or (t.ndim == 1 and np.isnan(t).any()):
        raise ValueError("ODERNN: times must be finite, only those of (T, B) may be NaN")
    t = t.reshape(len(t), -1)
    before = np.fmax.accumulate(np.concatenate((np.full((1, t.shape[1]), t0), t)))[:-1]
    if (t < before).any():
        row, column = np.argwhere(t < before)[0]
        raise ValueError(
            f"ODERNN: times must not decrease nor lie before t0 = {t0:g}, got {t[row, column]:g} after "
            f"{before[row, column]:g}"
        )
    return t


def observed(x: Tensor, alone: bool, times: np.ndarray, observations: Any, mask: Any, scale: Any) -> Observed:
    """What is not NaN, not masked, and at a time that is not NaN.

    Args:
        x: (B, D), the starts. alone: they came as (D,).
        times: (T, 1) or (T, B).
    """
    shape = (len(times), len(x), x.size(1))
    outside = (shape[0], shape[2]) if alone else shape
    target = torch.as_tensor(observations, dtype=x.dtype, device=x.device)
    if tuple(target.shape) != outside:
        names = "(T, D)" if alone else "(T, B, D)"
        raise ValueError(f"ODERNN: observations must be {names} = {outside}, got {tuple(target.shape)}")
    seen = ~target.isnan()
    if mask is not None:
        given = torch.as_tensor(mask, device=x.device)
        if given.dtype != torch.bool or tuple(given.shape) not in (outside, outside[:-1]):
            raise ValueError(
                f"ODERNN: mask must be bool {outside} or {outside[:-1]}, got {given.dtype} {tuple(given.shape)}"
            )
        seen = seen & (given if given.shape == target.shape else given.unsqueeze(-1))
    timed = torch.as_tensor(~np.isnan(times), device=x.device).unsqueeze(-1)
    seen = seen.view(shape) & timed
    number = int(seen.sum())
    if not number:
        raise ValueError("ODERNN: nothing is observed: all observations are NaN or masked")
    target = torch.where(seen, target.view(shape), 0)
    if not target.isfinite().all():
        raise ValueError("ODERNN: observations must be finite, or NaN for what is not observed")
    return Observed(target, torch.where(seen, 1 / _scale(scale, x, outside).view(shape), 0), number)


def _scale(scale: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    given = torch.as_tensor(1.0 if scale is None else scale, dtype=x.dtype, device=x.device)
    if not (given.isfinite() & (given > 0)).all():
        raise ValueError("ODERNN: scale must be positive")
    try:
        return given.expand(shape).contiguous()
    except RuntimeError as error:
        raise ValueError(f"ODERNN: scale must broadcast to {shape}, got {tuple(given.shape)}") from error
