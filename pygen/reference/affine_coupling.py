"""Affine and additive coupling in plain PyTorch. The fused op is `pygen.ops.affine_coupling`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.reference._dtypes import widen

SCALE_MAPS = ("exp", "tanh", "sigmoid", "nflows", "softplus", "atan")

# Constants of the published maps, named after where they come from.
SIGMOID_OFFSET = 2.0  # openai/glow, nflows: s starts at sigma(2), near 1
NFLOWS_FLOOR = 1e-3  # nflows keeps s away from 0
NFLOWS_SOFTPLUS_CEILING = 3.0  # nflows' GENERAL activation clamps s to [0, 3]
FREIA_ATAN_GAIN = 0.636  # FrEIA's 2/pi: |log s| < clamp


def log_scale(scale: Tensor, scale_map: str, clamp: float = 2.0) -> Tensor:
    """log s(a) of the raw scale `a`, elementwise, in `a`'s own type."""
    if scale_map == "exp":
        return scale
    if scale_map == "tanh":
        return scale.tanh()
    if scale_map == "sigmoid":
        return F.logsigmoid(scale + SIGMOID_OFFSET)
    if scale_map == "nflows":
        return (torch.sigmoid(scale + SIGMOID_OFFSET) + NFLOWS_FLOOR).log()
    if scale_map == "softplus":
        return (F.softplus(scale) + NFLOWS_FLOOR).clamp(0, NFLOWS_SOFTPLUS_CEILING).log()
    if scale_map == "atan":
        return clamp * FREIA_ATAN_GAIN * scale.atan()
    raise ValueError(f'affine_coupling: scale_map must be one of {", ".join(SCALE_MAPS)}, got "{scale_map}"')


def _sum_per_sample(x: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return x.reshape(x.size(0), -1).sum(1) if x.numel() else x.new_zeros(x.size(0))


def affine_coupling(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """x: (B, ...), scale and shift alike -> y: (B, ...), log_det: (B,), float32 for 16-bit inputs."""
    wide, t = widen(x), widen(shift)
    log_s = log_scale(widen(scale), scale_map, clamp)
    if inverse:
        s = log_s.exp()
        y = wide / s - t if shift_first else (wide - t) / s
        log_det = -_sum_per_sample(log_s)
    else:
        s = log_s.exp()
        y = (wide + t) * s if shift_first else wide * s + t
        log_det = _sum_per_sample(log_s)
    return y.to(x.dtype), log_det


def affine_coupling_backward(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the raw scale; the shift's is +-grad_y or +-the gradient of x (see pygen.ops).

    With d = d log s / da and w = the factor that s multiplies:
    forward  grad_x = g s,  grad_a = (g s w + l_b) d,   w = x, or x + t with shift_first;
    inverse  grad_x = g/s,  grad_a = -(g w/s + l_b) d,  w = x - t, or x with shift_first.
    """
    wide, t, a = widen(x), widen(shift), widen(scale)
    slope = log_scale_slope(a, scale_map, clamp)
    s = log_scale(a, scale_map, clamp).exp()
    g = torch.zeros_like(wide) if grad_y is None else widen(grad_y)
    shape = (-1,) + (1,) * (x.dim() - 1)
    per_sample = wide.new_zeros(()) if grad_log_det is None else grad_log_det.to(wide.dtype).reshape(shape)
    if inverse:
        grad_x = g / s
        grad_a = -(grad_x * (wide if shift_first else wide - t) + per_sample) * slope
    else:
        grad_x = g * s
        grad_a = (grad_x * (wide + t if shift_first else wide) + per_sample) * slope
    return grad_x.to(x.dtype), grad_a.to(scale.dtype)


def split_halves(x: Tensor, dim: int, swap: bool) -> tuple[Tensor, Tensor]:
    """(passive, active): the first n - n // 2 of `dim`'s n elements and the others, or exchanged."""
    first, second = x.split((x.size(dim) - x.size(dim) // 2, x.size(dim) // 2), dim)
    return (second, first) if swap else (first, second)


def join_halves(passive: Tensor, active: Tensor, dim: int, swap: bool) -> Tensor:
    return torch.cat((active, passive) if swap else (passive, active), dim)


def affine_coupling_halves(
    x: Tensor,
    parameters: Tensor,
    dim: int = 1,
    swap: bool = False,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """x: (B, ..., n, ...), parameters: (B, ..., 2 m, ...) for the m active of n -> z like x, log_det: (B,)."""
    passive, active = split_halves(x, dim, swap)
    scale, shift = parameters.chunk(2, dim)
    active, log_det = affine_coupling(active, scale, shift, scale_map, shift_first, clamp, inverse)
    return join_halves(passive, active, dim, swap), log_det


def affine_coupling_halves_backward(
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    parameters: Tensor,
    dim: int = 1,
    swap: bool = False,
    scale_map: str = "exp",
    shift_first: bool = False,
    clamp: float = 2.0,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the parameters. The log-determinant depends on the scales alone."""
    _, active = split_halves(x, dim, swap)
    scale, shift = parameters.chunk(2, dim)
    passive_grad, active_grad = (None, None) if grad_z is None else split_halves(grad_z, dim, swap)
    options = (scale_map, shift_first, clamp, inverse)
    grad_active, grad_scale = affine_coupling_backward(active_grad, grad_log_det, active, scale, shift, *options)
    if passive_grad is None:
        return torch.zeros_like(x), torch.cat((grad_scale, torch.zeros_like(shift)), dim)
    grad_shift = shift_gradient(active_grad, grad_active, shift_first, inverse)
    return join_halves(passive_grad, grad_active, dim, swap), torch.cat((grad_scale, grad_shift), dim)


def shift_gradient(grad_y, grad_x, shift_first: bool, inverse: bool):
    """y = x s + t, (x + t) s, (x - t) / s or x / s - t: t's gradient is one that is at hand, up to its sign."""
    grad = grad_x if shift_first != inverse else grad_y
    return -grad if inverse else grad


def log_scale_slope(a: Tensor, scale_map: str, clamp: float = 2.0) -> Tensor:
    """d log s(a) / da."""
    if scale_map == "exp":
        return torch.ones_like(a)
    if scale_map == "tanh":
        return 1 - a.tanh().square()
    if scale_map == "sigmoid":
        return torch.sigmoid(-(a + SIGMOID_OFFSET))
    if scale_map == "nflows":
        sigma = torch.sigmoid(a + SIGMOID_OFFSET)
        return sigma * torch.sigmoid(-(a + SIGMOID_OFFSET)) / (sigma + NFLOWS_FLOOR)
    if scale_map == "softplus":
        s = F.softplus(a) + NFLOWS_FLOOR
        return torch.where(s <= NFLOWS_SOFTPLUS_CEILING, torch.sigmoid(a) / s, torch.zeros_like(a))
    if scale_map == "atan":
        return clamp * FREIA_ATAN_GAIN / (1 + a.square())
    raise ValueError(f'affine_coupling: scale_map must be one of {", ".join(SCALE_MAPS)}, got "{scale_map}"')


def additive_coupling(x: Tensor, shift: Tensor, inverse: bool = False) -> Tensor:
    """x + shift, or x - shift; log_det is 0."""
    return x - shift if inverse else x + shift
