"""`retrace`: from z alone every layer finds x again, with the graph that autograd records in the forward."""

import pytest
import torch

from pygen import nn
from pygen.reference import SCALE_MAPS

IMAGE = (4, 4, 2)


def mlp_coupling(kind=nn.AffineCoupling, outputs=2, **options):
    return kind(nn.MLP(3, 3 * outputs, (8,), context_features=2), **options)


def image_coupling(kind=nn.AffineCoupling, outputs=2, **options):
    return kind(nn.ConvNet(2, 2 * outputs, 4, 1, context_features=2), **options)


def masked_coupling(kind=nn.AffineCoupling, outputs=2, **options):
    mask = nn.checkerboard_mask(4, 2, 4)
    return kind(nn.ConvNet(4, 4 * outputs, 4, 1, context_features=2), mask=mask, **options)


LAYERS = {
    **{f"affine, {m}": (lambda m=m: mlp_coupling(scale_map=m, clamp=1.5), (6,)) for m in SCALE_MAPS},
    **{f"masked, {m}": (lambda m=m: masked_coupling(scale_map=m, clamp=1.5), IMAGE) for m in SCALE_MAPS},
    "affine, shift first": (lambda: mlp_coupling(shift_first=True), (6,)),
    "affine, swapped": (lambda: mlp_coupling(swap=True), (6,)),
    "affine, channels": (lambda: image_coupling(swap=True), IMAGE),
    "affine, masked, swapped": (lambda: masked_coupling(swap=True), IMAGE),
    "additive": (lambda: mlp_coupling(nn.AdditiveCoupling, 1), (6,)),
    "additive, masked": (lambda: masked_coupling(nn.AdditiveCoupling, 1), IMAGE),
    "spline": (lambda: mlp_coupling(nn.RationalQuadraticCoupling, 11, num_bins=4), (6,)),
    "spline, masked": (lambda: masked_coupling(nn.RationalQuadraticCoupling, 11, num_bins=4), IMAGE),
    "permutation": (lambda: nn.Permutation.reverse(4), IMAGE),
    "reshape": (lambda: nn.Reshape(IMAGE, (32,)), IMAGE),
    "squeeze": (lambda: nn.Squeeze(), IMAGE),
    "actnorm": (lambda: nn.ActNorm(4), IMAGE),
    "1x1 convolution": (lambda: nn.InvertibleConv1x1(4), IMAGE),
    "1x1 convolution, plain": (lambda: nn.InvertibleConv1x1(4, decomposition="none"), IMAGE),
    "actnorm and 1x1 convolution": (lambda: nn.ActNormConv1x1(4), IMAGE),
    "glow step": (lambda: nn.GlowStep(4, nn.ConvNet(2, 4, 4, 1, context_features=2)), IMAGE),
}


def gradients(outputs, weights, sources):
    """Of the weighted sum of those outputs that depend on anything."""
    pairs = [(out, weight) for out, weight in zip(outputs, weights, strict=True) if out.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, sources, weights, allow_unused=True)


def prepared(make):
    torch.manual_seed(0)
    layer = make().double()
    with torch.no_grad():
        for parameter in layer.parameters():  # conditioners start at zero; they must do something here
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_retrace_finds_x_and_the_gradient_that_autograd_finds_in_the_forward(name):
    make, shape = LAYERS[name]
    layer = prepared(make)
    x = torch.randn(3, *shape, dtype=torch.float64)
    context = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    layer(x, context)  # ActNorm takes its first batch
    x.requires_grad_()
    z, log_det = layer(x, context)
    weights = torch.randn_like(z), torch.randn_like(log_det)
    parameters = tuple(layer.parameters())
    expected = gradients((z, log_det), weights, (x, context, *parameters))

    before = z.detach().clone()
    step = layer.retrace(before, context)
    assert torch.equal(before, z), "retrace must not write into z"
    assert not step.x.requires_grad and all(leaf.is_leaf and leaf.requires_grad for leaf in step.leaves)
    torch.testing.assert_close(step.x, x.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close((step.z, step.log_det), (z, log_det), rtol=0, atol=1e-10)
    found = gradients((step.z, step.log_det), weights, (*step.leaves, context, *parameters))
    count = len(step.leaves)
    for mine, theirs in zip((step.join(found[:count]), *found[count:]), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("affine", "masked", "additive", "spl"))])
def test_a_coupling_runs_its_conditioner_once_to_go_back(name):
    make, shape = LAYERS[name]
    layer, calls = prepared(make), []
    z, _ = layer(torch.randn(3, *shape, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    layer.conditioner.register_forward_hook(lambda *_: calls.append(1))
    step = layer.retrace(z, torch.zeros(3, 2, dtype=torch.float64))
    torch.autograd.grad((step.z.sum() + step.log_det.sum()), step.leaves)
    assert len(calls) == 1


def test_where_no_gradient_arrives_the_joined_one_is_zero():
    for name in ("affine, tanh", "masked, tanh", "permutation"):
        make, shape = LAYERS[name]
        step = prepared(make).retrace(torch.randn(2, *shape).double(), torch.zeros(2, 2).double())
        assert torch.equal(step.join((None,) * len(step.leaves)), torch.zeros(2, *shape).double())
