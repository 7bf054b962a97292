"""One step of Glow: openai's formula, exact, and one graph under torch.compile."""

import pytest
import torch
from nn.jacobian import assert_exact, normal, randomized

from pygen import nn


def step(channels=4, coupling="affine", **options):
    """A trained-like step: nothing in it is the identity."""
    out = channels // 2 * (2 if coupling == "affine" else 1)
    conditioner = nn.ConvNet(channels - channels // 2, out, 4, 1)
    torch.manual_seed(0)
    step = nn.GlowStep(channels, conditioner, coupling=coupling, **options).eval()
    randomized(step[1])
    with torch.no_grad():
        for index, parameter in enumerate(step[0].parameters()):
            parameter.add_(normal(*parameter.shape, seed=index, dtype=torch.float32), alpha=0.2)
    return step


@pytest.mark.parametrize("decomposition", ("plu", "none"))
@pytest.mark.parametrize("coupling", ("affine", "additive"))
@pytest.mark.parametrize("channels", (4, 5))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(channels, coupling, decomposition):
    assert_exact(step(channels, coupling, decomposition=decomposition).double(), normal(2, channels, 3, 2))


def test_it_is_the_step_of_openai_glow():
    """actnorm, then invertible_1x1_conv, then z2 = (z2 + shift) * sigmoid(h + 2) from the first half."""
    layer, x = step().double(), normal(3, 4, 3, 3)
    actnorm, convolution = layer[0].actnorm, layer[0].convolution
    h = (x + actnorm.bias.view(-1, 1, 1)) * actnorm.log_scale.exp().view(-1, 1, 1)
    h = torch.einsum("ij,bjhw->bihw", convolution.matrix(), h)
    first, second = h.chunk(2, 1)
    scale, shift = layer[1].conditioner(first).chunk(2, 1)
    expected = torch.cat((first, (second + shift) * torch.sigmoid(scale + 2)), 1)
    log_det = torch.nn.functional.logsigmoid(scale + 2).sum((1, 2, 3))
    log_det = log_det + 9 * (actnorm.log_scale.sum() + convolution.log_diagonal.sum())
    torch.testing.assert_close(layer(x), (expected, log_det), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
@pytest.mark.parametrize("coupling", ("affine", "additive"))
def test_inverse_recovers_input_at_depth_32(coupling, dtype, tolerance):
    torch.manual_seed(0)
    steps = []
    for index in range(32):
        steps.append(nn.GlowStep(4, nn.ConvNet(2, 4 if coupling == "affine" else 2, 8, 1), coupling=coupling))
        randomized(steps[-1][1], seed=index)
    flow = nn.Sequential(*steps).to(dtype)
    x = 2 * normal(8, 4, 4, 4, dtype=dtype) + 1
    z, log_det = flow(x)  # the first batch: every ActNorm standardises what reaches it
    assert all(layer[0].actnorm.initialized for layer in steps)
    back, inverse_log_det = flow.inverse(z)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=10 * tolerance)


def test_every_parameter_gets_the_gradient_of_finite_differences():
    layer = step(2).double()
    x = normal(1, 2, 2, 2).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


def test_the_defaults_step_compiles_to_one_graph_after_its_first_batch():
    layer, x = nn.GlowStep(4, nn.ConvNet(2, 4, 4, 1)), torch.randn(3, 4, 4, 4)
    layer(x)
    randomized(layer[1])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    z, log_det = compiled(leaf)
    expected = layer(x)
    torch.testing.assert_close((z, log_det), expected, rtol=0, atol=1e-6)
    (z.square().sum() + log_det.sum()).backward()
    assert leaf.grad.isfinite().all() and all(p.grad is not None for p in layer.parameters())


def test_sixteen_bit_steps_keep_their_type_and_a_float32_log_det():
    layer = step().bfloat16()
    z, log_det = layer(torch.randn(2, 4, 3, 3, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16 and log_det.dtype == torch.float32


def test_under_autocast_the_flow_stays_float32_and_inverts():
    layer, x = step(), torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = layer(x)
        back, _ = layer.inverse(z)
    assert z.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="coupling must be one of affine, additive, got 'spline'"):
        nn.GlowStep(4, nn.MLP(2, 4), coupling="spline")
    with pytest.raises(ValueError, match="ActNormConv1x1: x must be"):
        nn.GlowStep(4, nn.ConvNet(2, 4))(torch.randn(1, 6, 2, 2))
