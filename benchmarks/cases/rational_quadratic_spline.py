"""Rational-quadratic spline against nflows and the plain form that `torch.compile` makes the most of."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen import ops, reference
from pygen.benchmarks.registry import Call, Case, Floor, Inputs, Target, call, compiled, register

BOUND = 3.0


def _nflows(inverse: bool):
    """The drop-in original. It selects the elements inside the bounds by a mask, hence the many launches."""

    def factory(inputs: Inputs) -> Call:
        from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

        return call(partial(unconstrained_rational_quadratic_spline, inverse=inverse, tail_bound=BOUND))(inputs)

    return factory


def _knots(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and sizes of the bins, [..., K] each.

    The sums are a product with a triangle: of `cumsum` here, torch 2.13's compiler makes wrong gradients.
    """
    bins = raw.size(-1)
    sizes = 2 * BOUND * (1e-3 + (1 - 1e-3 * bins) * raw.softmax(-1))
    return sizes @ torch.ones(bins, bins, dtype=raw.dtype, device=raw.device).triu(1) - BOUND, sizes


def static_spline(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, inverse: bool = False):
    """nflows' spline with linear tails, rewritten for the compiler: static shapes, no mask that selects elements."""
    (x_start, width), (y_start, height) = _knots(widths), _knots(heights)
    slopes = F.pad(1e-3 + F.softplus(derivatives), (1, 1), value=1.0)
    inside = x.clamp(-BOUND, BOUND)
    index = (inside.unsqueeze(-1) >= (y_start if inverse else x_start)[..., 1:]).sum(-1, keepdim=True)
    x0, w, y0, h, d0, d1 = (
        tensor.gather(-1, at).squeeze(-1)
        for tensor, at in (
            (x_start, index),
            (width, index),
            (y_start, index),
            (height, index),
            (slopes, index),
            (slopes, index + 1),
        )
    )
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        rise = inside - y0
        a, b, c = h * (s - d0) + rise * bend, h * d0 - rise * bend, -s * rise
        xi = 2 * c / (-b - (b * b - 4 * a * c).clamp_min(0).sqrt())
        y = x0 + xi * w
    else:
        xi = (inside - x0) / w
    p = xi * (1 - xi)
    den = s + bend * p
    if not inverse:
        y = y0 + h * (s * xi * xi + d0 * p) / den
    log_slope = 2 * s.log() + (d1 * xi * xi + 2 * s * p + d0 * (1 - xi).square()).log() - 2 * den.log()
    outside = x.abs() > BOUND
    return torch.where(outside, x, y), torch.where(outside, 0.0, -log_slope if inverse else log_slope)


def _case(elements: int, bins: int, *, targets=(), inverse=False, backward=False, dtype=torch.float32) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def randn(*size):
            return torch.randn(size, device=device, generator=generator)

        x, *parameters = randn(elements), randn(elements, bins), randn(elements, bins), randn(elements, bins - 1)
        grads = (randn(elements).to(dtype), randn(elements)) if backward else ()
        return Inputs(tuple(t.to(dtype) for t in (x, *parameters)), grads)

    plain = partial(reference.rational_quadratic_spline, inverse=inverse, tail_bound=BOUND)
    words = [
        f"{elements}x{bins}",
        "inverse" if inverse else "forward",
        "" if dtype == torch.float32 else str(dtype).removeprefix("torch."),
    ]
    words[1] += "+backward" if backward else ""
    # Read x and 3K - 1 parameters, write y and log_abs_det; backward reads all again and writes their gradients.
    values = (3 * bins + 2) + (2 * 3 * bins + 2 if backward else 0)
    implementations = {
        "pygen": call(partial(ops.rational_quadratic_spline, inverse=inverse, tail_bound=BOUND)),
        "eager": call(plain),
        # The rewrite computes in its inputs' type; the reference widens, and forward the compiler gets it right.
        "compiled": compiled(partial(static_spline, inverse=inverse) if dtype == torch.float32 else plain),
    }
    if dtype == torch.float32:
        implementations["nflows"] = _nflows(inverse)
    return Case(
        op="rational_quadratic_spline",
        name=" ".join(word for word in words if word),
        shape=(elements,),
        dtype=dtype,
        make=make,
        implementations=implementations,
        reference=call(plain),
        floor=Floor(bytes=values * elements * dtype.itemsize),
        targets=targets,
        # What rounding does to a narrow, steep bin: its slope, up to a thousand here, times the last place.
        tolerance=1e-2 if dtype == torch.float32 else 5e-2,
    )


register(
    _case(65536, 8, targets=(Target("nflows", 20), Target("compiled", 4))),
    _case(65536, 16, targets=(Target("nflows", 15), Target("compiled", 5))),
    _case(65536, 8, backward=True, targets=(Target("nflows", 15), Target("compiled", 3))),
    _case(65536, 16, backward=True, targets=(Target("nflows", 12), Target("compiled", 3))),
    _case(65536, 8, inverse=True),
    _case(65536, 8, dtype=torch.bfloat16),
)
