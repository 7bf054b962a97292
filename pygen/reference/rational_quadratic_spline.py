"""Monotonic rational-quadratic spline in plain PyTorch. The fused op is `pygen.ops.rational_quadratic_spline`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.reference._dtypes import widen

TAILS = ("linear", "circular", "none")


def derivative_count(num_bins: int, tails: str) -> int:
    """How many raw derivatives a spline takes: at the inner knots, at all but the last, or at all of them."""
    if tails not in TAILS:
        raise ValueError(f'rational_quadratic_spline: tails must be one of {", ".join(TAILS)}, got "{tails}"')
    return num_bins + TAILS.index(tails) - 1


class _Axis(NamedTuple):
    """One axis cut into K bins of [-bound, bound]; tensors [..., K]."""

    probability: Tensor  # softmax of the raw sizes
    size: Tensor  # of each bin
    start: Tensor  # of each bin


class _Bin(NamedTuple):
    """The bin that holds each element, and where in it the element lies; tensors like x."""

    number: Tensor  # int64, 0 .. K - 1
    xi: Tensor  # (x - start) / width, in [0, 1]
    width: Tensor
    slope: Tensor  # height / width
    height: Tensor
    start: Tensor  # x at the left knot
    base: Tensor  # y at the left knot
    left: Tensor  # dy/dx at the left knot
    right: Tensor


def _axis(raw: Tensor, bound: float, smallest: float) -> _Axis:
    probability = raw.softmax(-1)
    share = smallest + (1 - smallest * raw.size(-1)) * probability
    before = F.pad(share.cumsum(-1)[..., :-1], (1, 0))
    return _Axis(probability, 2 * bound * share, 2 * bound * before - bound)


def _knot_derivatives(raw: Tensor, tails: str, smallest: float) -> Tensor:
    """dy/dx at all K + 1 knots: exactly 1 at both ends with linear tails, the same at both with circular ones."""
    slopes = smallest + F.softplus(raw)
    if tails == "linear":
        return F.pad(slopes, (1, 1), value=1.0)
    return torch.cat((slopes, slopes[..., :1]), -1) if tails == "circular" else slopes


def _pick(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _solve(r: Tensor, slope: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """xi where the spline has risen by the share r of its bin's height: the root of a xi^2 + b xi - slope r = 0.

    Of the two forms of the root, the one whose terms do not cancel.
    """
    bend = left + right - 2 * slope
    a, b = slope - left + r * bend, left - r * bend
    root = (b.square() + 4 * a * slope * r).clamp_min(0).sqrt()
    first = b >= 0
    return torch.where(first, 2 * slope * r, root - b) / torch.where(first, b + root, 2 * a)


def _locate(
    x: Tensor, horizontal: _Axis, vertical: _Axis, derivatives: Tensor, tail_bound: float, inverse: bool
) -> _Bin:
    """The bin of x, or of y = x for the inverse."""
    searched = vertical if inverse else horizontal
    inside = x.clamp(-tail_bound, tail_bound)
    index = (inside.unsqueeze(-1) >= searched.start[..., 1:]).sum(-1)
    start, width = _pick(horizontal.start, index), _pick(horizontal.size, index)
    base, height = _pick(vertical.start, index), _pick(vertical.size, index)
    left, right = _pick(derivatives, index), _pick(derivatives, index + 1)
    slope = height / width
    xi = _solve(((inside - base) / height).clamp(0, 1), slope, left, right) if inverse else (inside - start) / width
    # At the bounds and beyond, the slope is the end knot's to the last bit.
    xi = torch.where(x >= tail_bound, 1.0, torch.where(x <= -tail_bound, 0.0, xi.clamp(0, 1)))
    return _Bin(index, xi, width, slope, height, start, base, left, right)


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """x: [...], widths and heights: [..., K], derivatives: [..., K - 1 | K | K + 1] -> y, log_abs_det: [...]."""
    wide = widen(x)
    horizontal = _axis(widen(widths), tail_bound, min_bin_width)
    vertical = _axis(widen(heights), tail_bound, min_bin_height)
    knots = _knot_derivatives(widen(derivatives), tails, min_derivative)
    at = _locate(wide, horizontal, vertical, knots, tail_bound, inverse)
    p = at.xi * (1 - at.xi)
    den = at.slope + (at.left + at.right - 2 * at.slope) * p
    ratio = at.slope / den
    rise = at.right * at.xi.square() + 2 * at.slope * p + at.left * (1 - at.xi).square()
    log_slope = (ratio * (ratio * rise)).log()
    if inverse:
        y = at.start + at.width * at.xi
        log_slope = -log_slope
    else:
        y = at.base + at.height * (at.slope * at.xi.square() + at.left * p) / den
    # The bounds are mapped to themselves, exactly; beyond them the spline goes straight on.
    bound = wide.clamp(-tail_bound, tail_bound)
    outside = wide.abs() >= tail_bound
    y = y.clamp(-tail_bound, tail_bound)
    if tails == "none":
        end = torch.where(wide > 0, at.right, at.left)
        y = torch.where(outside, bound + ((wide - bound) / end if inverse else (wide - bound) * end), y)
    else:
        y = torch.where(outside, wide, y)
        # A circular spline has a slope of its own at the bounds.
        log_slope = torch.where(outside if tails == "linear" else wide.abs() > tail_bound, 0.0, log_slope)
    return y.to(x.dtype), log_slope


def _grad_axis(
    axis: _Axis, index: Tensor, grad_start: Tensor, grad_size: Tensor, bound: float, smallest: float
) -> Tensor:
    """The raw sizes' gradients from those of the chosen bin's start (the sizes before it) and size."""
    bins = torch.arange(axis.size.size(-1), device=index.device)
    chosen = index.unsqueeze(-1)
    grad_share = torch.where(bins < chosen, grad_start.unsqueeze(-1), 0.0)
    grad_share = torch.where(bins == chosen, grad_size.unsqueeze(-1), grad_share)
    mean = (axis.probability * grad_share).sum(-1, keepdim=True)
    return 2 * bound * (1 - smallest * bins.numel()) * axis.probability * (grad_share - mean)


def _grad_derivatives(raw: Tensor, tails: str, index: Tensor, grad_left: Tensor, grad_right: Tensor) -> Tensor:
    """The raw derivatives' gradients from those at the chosen bin's knots."""
    count = raw.size(-1) + {"linear": 2, "circular": 1, "none": 0}[tails]
    knots = torch.arange(count, device=index.device)
    chosen = index.unsqueeze(-1)
    grad = torch.where(knots == chosen, grad_left.unsqueeze(-1), 0.0)
    grad = grad + torch.where(knots == chosen + 1, grad_right.unsqueeze(-1), 0.0)
    if tails == "linear":
        grad = grad[..., 1:-1]
    elif tails == "circular":
        grad = torch.cat((grad[..., :1] + grad[..., -1:], grad[..., 1:-1]), -1)
    return grad * raw.sigmoid()


def rational_quadratic_spline_backward(
    grad_y: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, widths, heights and derivatives.

    With y = base + height N / den and log y' = 2 log s + log M - 2 log den as functions of xi, s, the bin's two
    derivatives and its place, the inverse's gradients follow from the forward's: where x = f^-1(y; theta) receives g,
    f receives -g / f' at x, and y receives g / f'.
    """
    wide = widen(x)
    horizontal = _axis(widen(widths), tail_bound, min_bin_width)
    vertical = _axis(widen(heights), tail_bound, min_bin_height)
    knots = _knot_derivatives(widen(derivatives), tails, min_derivative)
    at = _locate(wide, horizontal, vertical, knots, tail_bound, inverse)
    g = torch.zeros_like(wide) if grad_y is None else widen(grad_y)
    g_log = torch.zeros_like(wide) if grad_log_det is None else grad_log_det.to(wide.dtype)
    outside = wide.abs() > tail_bound
    inside = ~outside
    xi, s, left, right = at.xi, at.slope, at.left, at.right
    p, q = xi * (1 - xi), 1 - 2 * xi
    bend = left + right - 2 * s
    den = s + bend * p
    m = right * xi.square() + 2 * s * p + left * (1 - xi).square()
    ratio = s / den
    rising = ratio * (ratio * m)  # dy/dx
    log_by_xi = 2 * (right * xi + s * q - left * (1 - xi)) / m - 2 * bend * q / den
    log_by_xi = torch.where(inside, log_by_xi, 0.0)
    if inverse:
        total = (g - g_log * log_by_xi / at.width) / rising
        g, g_log = -total, -g_log
    share = (s * xi.square() + left * p) / den
    g_height = g * at.height
    by_xi = torch.where(inside, g * at.width * rising + g_log * log_by_xi, 0.0)
    by_slope = g_height * (xi.square() - share * (1 - 2 * p)) / den + 2 * g_log * (1 / s + p / m - (1 - 2 * p) / den)
    by_left = g_height * p * (1 - share) / den + g_log * ((1 - xi).square() / m - 2 * p / den)
    by_right = -g_height * share * p / den + g_log * (xi.square() / m - 2 * p / den)
    if tails == "none":
        beyond = g * (wide - wide.clamp(-tail_bound, tail_bound))
        if inverse:
            beyond = beyond / rising
        by_left = by_left + torch.where(wide < -tail_bound, beyond, 0.0)
        by_right = by_right + torch.where(wide > tail_bound, beyond, 0.0)
        grad_outside = total if inverse else g * rising
        counted = torch.ones_like(inside)
    else:
        grad_outside = g if not inverse else (torch.zeros_like(wide) if grad_y is None else widen(grad_y))
        counted = inside
    grad_x = torch.where(inside, total if inverse else by_xi / at.width, grad_outside)

    def only(value: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, value, 0.0)

    grad_widths = _grad_axis(
        horizontal,
        at.number,
        only(-by_xi / at.width, inside),
        only(-(xi * by_xi + s * by_slope) / at.width, inside),
        tail_bound,
        min_bin_width,
    )
    grad_heights = _grad_axis(
        vertical,
        at.number,
        only(g, inside),
        only(g * share + by_slope / at.width, inside),
        tail_bound,
        min_bin_height,
    )
    grad_derivatives = _grad_derivatives(
        widen(derivatives), tails, at.number, only(by_left, counted), only(by_right, counted)
    )
    return (
        grad_x.to(x.dtype),
        grad_widths.to(widths.dtype),
        grad_heights.to(heights.dtype),
        grad_derivatives.to(derivatives.dtype),
    )
