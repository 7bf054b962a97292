"""nflows 0.14: its splines and couplings compute what ours do, and its trained flows become ours."""

import pytest
import torch

from peers.trained import assert_same_flow, trained
from pygen import nn, ops
from pygen.nn import convert

nflows_transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")

from nflows.distributions import StandardNormal  # noqa: E402
from nflows.flows import Flow, SimpleRealNVP  # noqa: E402
from nflows.nn.nets import ConvResidualNet, ResidualNet  # noqa: E402
from nflows.transforms.splines.rational_quadratic import (  # noqa: E402
    rational_quadratic_spline as bounded_spline,
)
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline  # noqa: E402
from nflows.utils import create_alternating_binary_mask, create_mid_split_binary_mask  # noqa: E402

T = nflows_transforms
# What nflows says about its own networks and torch's retired functions.
pytestmark = pytest.mark.filterwarnings("ignore")


# ---- ops -------------------------------------------------------------------------------------------------------------


def their_spline(x, w, h, d, inverse, tails, bound):
    if tails == "linear":
        return unconstrained_rational_quadratic_spline(x, w, h, d, inverse=inverse, tails=tails, tail_bound=bound)
    edges = {"left": -bound, "right": bound, "bottom": -bound, "top": bound}
    return bounded_spline(x, w, h, d, inverse=inverse, **edges)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("tails", ["linear", None], ids=["linear", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_spline_values_and_gradients_are_those_of_nflows(inverse, tails, dtype, tolerance):
    bins, bound = 8, 3.0
    generator = torch.Generator().manual_seed(0)
    sizes = (bins, bins, bins - 1 if tails == "linear" else bins + 1)
    raws = [torch.randn(40, 5, n, generator=generator, dtype=torch.float64).mul(0.5) for n in sizes]
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).view(40, 5) * (4.0 if tails == "linear" else 2.99)
    tensors = [t.to(dtype).requires_grad_() for t in (x, *raws)]
    theirs = their_spline(*tensors, inverse, tails, bound)
    ours = ops.rational_quadratic_spline(*tensors, inverse=inverse, tails=tails, tail_bound=bound)
    incoming = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in ours]
    results = [(*ys, *torch.autograd.grad(ys, tensors, incoming)) for ys in (ours, theirs)]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


def test_inputs_at_which_nflows_fails_do_not_fail_here():
    """Its inverse asserts that rounding left the discriminant positive (#71, #87); all inputs in tails: #23."""
    raws = [torch.zeros(1, n) for n in (8, 8, 7)]
    for inverse in (False, True):
        y, log_slope = ops.rational_quadratic_spline(torch.tensor([9.0]), *raws, inverse=inverse, tail_bound=3.0)
        assert y == 9 and log_slope == 0
    with pytest.raises(Exception, match=""):
        bounded_spline(torch.tensor([9.0]), *raws[:2], torch.zeros(1, 9), left=-3.0, right=3.0, bottom=-3.0, top=3.0)
    y, _ = ops.rational_quadratic_spline(torch.tensor([9.0]), *raws[:2], torch.zeros(1, 9), tails=None, tail_bound=3.0)
    assert y.isfinite()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_affine_coupling_values_and_gradients_are_those_of_nflows(inverse):
    params = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    mask = create_mid_split_binary_mask(6)  # the first three are transformed

    class Given(torch.nn.Module):
        def forward(self, inputs, context=None):
            return params

    theirs = T.AffineCouplingTransform(mask, lambda n_in, n_out: Given())
    want = theirs.inverse(x) if inverse else theirs(x)
    shift, scale = params.chunk(2, 1)
    y, log_det = ops.affine_coupling(x[:, :3], scale, shift, scale_map="nflows", inverse=inverse)
    got = torch.cat((y, x[:, 3:]), 1), log_det
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    grads = [torch.autograd.grad((z.square().sum(), ld.square().sum()), (x, params)) for z, ld in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


# ---- converted flows -------------------------------------------------------------------------------------------------


def resnet(n_in, n_out):
    return ResidualNet(n_in, n_out, hidden_features=16, num_blocks=1)


def conditional_resnet(n_in, n_out):
    return ResidualNet(n_in, n_out, hidden_features=16, num_blocks=1, context_features=3)


class Plain(torch.nn.Sequential):
    """A network that does not say how wide it is: nflows then divides nothing."""

    def forward(self, x, context=None):
        return super().forward(x)


def plain(n_in, n_out):
    return Plain(torch.nn.Linear(n_in, 12), torch.nn.Tanh(), torch.nn.Linear(12, n_out))


def convnet(n_in, n_out):
    return ConvResidualNet(n_in, n_out, hidden_channels=6, num_blocks=1)


def spline_coupling(mask, net=resnet, **options):
    options = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0} | options
    return T.PiecewiseRationalQuadraticCouplingTransform(mask, net, **options)


def assert_converts(transform, shape, context=None, tolerance=1e-9, inverts=True):
    """`transform` is trained; compares all, with samples in and outside of splines' bounds."""
    x = 1.5 * torch.randn(50, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, context = (t if t is None else t.to(next(transform.parameters(), x)) for t in (x, context))
    flow = convert.from_nflows(transform)
    inverse = (lambda z: transform.inverse(z, context)) if inverts else None
    assert_same_flow(flow, lambda t: transform(t, context), inverse, x, context, tolerance)
    return flow


ALTERNATING = create_alternating_binary_mask(5)
COUPLINGS = {
    "affine": lambda mask: T.AffineCouplingTransform(mask, resnet),
    "additive": lambda mask: T.AdditiveCouplingTransform(mask, resnet),
    "spline": lambda mask: spline_coupling(mask),
    "spline, plain network": lambda mask: spline_coupling(mask, plain),
    "spline, other options": lambda mask: spline_coupling(
        mask, num_bins=7, tail_bound=1.0, min_bin_width=1e-2, min_bin_height=2e-2, min_derivative=5e-3
    ),
    "spline, unconditional for the others": lambda mask: spline_coupling(mask, apply_unconditional_transform=True),
}
MASKS = {
    "alternating": ALTERNATING,
    "alternating, even": create_alternating_binary_mask(5, even=False),
    "middle": create_mid_split_binary_mask(5),
    "one of five": torch.tensor([-1, -1, 1, 0, -3]),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_coupling_converts(coupling, mask):
    assert_converts(trained(COUPLINGS[coupling](MASKS[mask])), (5,))


@pytest.mark.parametrize("options", [{}, {"apply_unconditional_transform": True, "img_shape": [4, 3]}], ids=str)
def test_couplings_of_image_channels_convert(options):
    mask = torch.tensor([1, -1, 1, -1])
    transform = T.CompositeTransform(
        [
            spline_coupling(mask, convnet, **options),
            T.AffineCouplingTransform(-mask, convnet),
            T.AdditiveCouplingTransform(mask, convnet),
        ]
    )
    assert_converts(trained(transform), (4, 4, 3))


def test_a_conditional_flow_converts():
    transform = T.CompositeTransform(
        [
            T.AffineCouplingTransform(ALTERNATING, conditional_resnet),
            spline_coupling(-ALTERNATING + 1, conditional_resnet),
        ]
    )
    assert_converts(trained(transform), (5,), torch.randn(50, 3, dtype=torch.float64))


def actnorm(features):
    layer = T.ActNorm(features)
    layer.initialized.fill_(True)
    return layer


LAYERS = {
    "RandomPermutation": (lambda: T.RandomPermutation(5), (5,)),
    "ReversePermutation": (lambda: T.ReversePermutation(5), (5,)),
    "ReversePermutation of rows": (lambda: T.ReversePermutation(4, dim=2), (2, 4, 3)),
    "ActNorm": (lambda: actnorm(5), (5,)),
    "ActNorm of channels": (lambda: actnorm(4), (4, 2, 3)),
    "BatchNorm": (lambda: T.BatchNorm(5), (5,)),
    "LULinear": (lambda: T.LULinear(5, identity_init=False), (5,)),
    "NaiveLinear": (lambda: T.NaiveLinear(5), (5,)),
    "QRLinear": (lambda: T.QRLinear(5, num_householder=3), (5,)),
    "SVDLinear": (lambda: T.SVDLinear(5, num_householder=4), (5,)),
    "OneByOneConvolution": (lambda: T.OneByOneConvolution(4, identity_init=False), (4, 2, 3)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_without_a_network_converts(layer):
    make, shape = LAYERS[layer]
    transform = make()
    for name, buffer in transform.named_buffers():
        if name.startswith("running"):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    assert_converts(trained(transform), shape, inverts=layer != "NaiveLinear")  # by torch.solve, which is gone


def test_squeeze_converts():
    x = torch.randn(3, 2, 4, 6)
    squeeze = T.SqueezeTransform(2)
    flow = convert.from_nflows(squeeze)
    assert torch.equal(flow(x)[0], squeeze(x)[0])
    assert torch.equal(flow.inverse(squeeze(x)[0])[0], x)


def stack():
    layers = []
    for i in range(3):
        mask = create_alternating_binary_mask(4, even=i % 2 == 0)
        layers += [actnorm(4), T.RandomPermutation(4), T.LULinear(4, identity_init=False)]
        layers += [spline_coupling(mask), T.CompositeTransform([T.AffineCouplingTransform(mask, resnet)])]
    return trained(T.CompositeTransform(layers), spread=0.1)


def test_a_trained_stack_gives_the_same_log_prob_and_gradients():
    transform = stack()
    peer = Flow(transform, StandardNormal([4])).double()
    flow = assert_converts(transform, (4,), tolerance=1e-8)
    x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    z, log_det = flow(x)
    ours = StandardNormal([4]).double().log_prob(z) + log_det
    theirs = peer.log_prob(x)
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)
    grads = [torch.autograd.grad(log_prob.sum(), x)[0] for log_prob in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_in_float32_a_coupling_agrees_to_1e_5(coupling):
    assert_converts(trained(COUPLINGS[coupling](ALTERNATING)).float(), (5,), tolerance=1e-5)


def test_the_realnvp_that_nflows_ships_converts():
    for options in ({}, {"batch_norm_between_layers": True}, {"use_volume_preserving": True}):
        peer = SimpleRealNVP(6, hidden_features=8, num_layers=4, num_blocks_per_layer=1, **options)
        for layer in peer.modules():
            if isinstance(layer, T.BatchNorm):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
        assert_converts(trained(peer)._transform, (6,))


def test_the_converted_flow_trains_on_its_own_also_reversibly():
    peer = stack()
    before = [p.detach().clone() for p in peer.parameters()]
    flow = convert.from_nflows(peer)
    x = torch.randn(20, 4, dtype=torch.float64)
    gradients = []
    for chain in (flow, nn.ReversibleSequential(*flow)):
        chain.zero_grad()
        z, log_det = chain(x)
        (z.square().sum() - log_det.sum()).backward()
        gradients.append([p.grad.clone() for p in flow.parameters()])
    assert len(gradients[0]) >= len(before)
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w, atol=1e-7, rtol=1e-7)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
    assert all(torch.equal(p, b) for p, b in zip(peer.parameters(), before, strict=True))


def test_an_actnorm_that_saw_no_data_yet_is_set_by_the_first_batch_here_as_well():
    flow = convert.from_nflows(T.ActNorm(3)).train()
    z, _ = flow(5 + 3 * torch.randn(200, 3))
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-5, rtol=0)


class Doubled(T.AffineCouplingTransform):
    """Looks like a coupling of nflows and computes something else."""


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: T.Sigmoid(),
            TypeError,
            "cannot convert a nflows.transforms.nonlinearities.Sigmoid; it converts ActNorm",
        ),
        (lambda: Doubled(ALTERNATING, resnet), TypeError, "cannot convert a .*Doubled"),
        (lambda: torch.nn.Linear(2, 2), TypeError, "cannot convert a torch.nn.modules.linear.Linear"),
        (lambda: spline_coupling(ALTERNATING, tails=None), ValueError, r"tails='linear', got None .* acts on \[0, 1\]"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_a_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        convert.from_nflows(make())
