"""normflows: circular splines, and affine couplings with its two ways to scale."""

import pytest
import torch

from pygen import ops

normflows = pytest.importorskip("normflows", reason="normflows is not installed")


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_spline_values_and_gradients_are_those_of_normflows(inverse, tails):
    generator = torch.Generator().manual_seed(0)
    sizes = (8, 8, 8 if tails == "circular" else 7)
    raws = [torch.randn(200, n, generator=generator, dtype=torch.float64) for n in sizes]
    x = torch.linspace(-4, 4, 200, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, *raws)]
    options = {"inverse": inverse, "tails": tails, "tail_bound": 3.0}
    ours = ops.rational_quadratic_spline(*tensors, **options)
    theirs = normflows.utils.splines.unconstrained_rational_quadratic_spline(*tensors, **options)
    incoming = [torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(2)]
    results = [(*ys, *torch.autograd.grad(ys, tensors, incoming)) for ys in (ours, theirs)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    ("scale_map", "options"),
    [
        # In the density direction it computes (x - shift) e^-scale, (x - shift) sigmoid(scale + 2), and over sigmoid.
        ("exp", {"scale_map": "exp", "inverse": True}),
        ("sigmoid", {"scale_map": "sigmoid", "shift_first": True}),
        ("sigmoid_inv", {"scale_map": "sigmoid", "inverse": True}),
    ],
)
def test_affine_coupling_is_that_of_normflows(scale_map, options):
    params = torch.randn(7, 6, dtype=torch.float64)
    first, second = torch.randn(2, 7, 3, dtype=torch.float64).unbind()

    class Given(torch.nn.Module):
        def forward(self, z):
            return params

    peer = normflows.flows.AffineCoupling(Given(), scale_map=scale_map)
    (_, want), want_log_det = peer.inverse([first, second])
    # Interleaved, read as strided views.
    shift, scale = params[:, 0::2], params[:, 1::2]
    shift = -shift if options.get("shift_first") else shift
    y, log_det = ops.affine_coupling(second, scale, shift, **options)
    torch.testing.assert_close(y, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(log_det, want_log_det, atol=1e-10, rtol=1e-10)
