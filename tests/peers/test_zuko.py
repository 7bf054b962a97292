"""zuko: its spline squashes raw parameters in its own way; behind that it is ours."""

import math

import pytest
import torch

from pygen import ops

zuko_transforms = pytest.importorskip("zuko.transforms", reason="zuko is not installed")

BOUND, SLOPE = 3.0, 1e-3


def our_parameters(widths, heights, derivatives):
    """zuko squashes sizes so that no bin vanishes, and slopes are e^d; ours are softplus(d) above a smallest slope."""

    def squashed(raw, strength):
        return raw / (1 + (strength * raw / math.log(SLOPE)).abs())

    slopes = squashed(derivatives, 1).exp()
    return squashed(widths, 2), squashed(heights, 2), torch.log(torch.expm1(slopes - 1e-12))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_spline_values_and_gradients_are_those_of_zuko_where_conventions_agree(inverse):
    generator = torch.Generator().manual_seed(0)
    raws = [torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (8, 8, 7)]
    x = torch.linspace(-4, 4, 200, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, *raws)]
    transform = zuko_transforms.MonotonicRQSTransform(*tensors[1:], bound=BOUND, slope=SLOPE)
    if inverse:
        y = transform.inv(tensors[0])
        theirs = y, -transform.log_abs_det_jacobian(y, tensors[0])
    else:
        theirs = transform.call_and_ladj(tensors[0])
    options = {"tail_bound": BOUND, "min_bin_width": 1e-12, "min_bin_height": 1e-12, "min_derivative": 1e-12}
    ours = ops.rational_quadratic_spline(tensors[0], *our_parameters(*tensors[1:]), inverse=inverse, **options)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)
    incoming = [torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2)]
    # zuko's log-determinant of an inverse is that of a forward at y: its gradient passes through y.
    grads = [torch.autograd.grad(ys, tensors, incoming) for ys in (ours, theirs)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
