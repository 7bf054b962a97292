"""Spline coupling: exact for every split and tail; a zero conditioner is the identity, with slope 1 at the bounds."""

import math

import pytest
import torch
from nn.jacobian import assert_exact, normal, randomized

from pygen import nn

TAILS = ("linear", "circular", None)
BINS = 4


def of(tails, bins=BINS):
    return nn.RationalQuadraticCoupling.parameters_per_feature_of(bins, tails)


def layer_of(split, tails="linear", **options):
    """(layer, shape of a sample) for every way to split."""
    options = {"num_bins": BINS, "tails": tails, **options}
    per, kind = of(tails), nn.RationalQuadraticCoupling
    if split == "halves":
        return kind(nn.MLP(2, 2 * per, (8,)), **options), (4,)
    if split == "odd halves, swapped":
        return kind(nn.MLP(2, 3 * per, (8,)), swap=True, **options), (5,)
    if split == "channels":
        return kind(nn.ConvNet(2, 1 * per, 4, 1), **options), (3, 2, 2)
    if split == "rows":
        return kind(nn.ConvNet(1, 1 * per, 4, 1), dim=-1, **options), (1, 3, 2)
    if split == "alternating mask":
        return kind(nn.MLP(5, 5 * per, (8,)), mask=nn.alternating_mask(5), **options), (5,)
    return kind(nn.ConvNet(2, 2 * per, 4, 1), mask=nn.checkerboard_mask(2, 3, 2), **options), (2, 2, 3)


SPLITS = ("halves", "odd halves, swapped", "channels", "alternating mask", "checkerboard")


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("split", SPLITS)
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(split, tails):
    layer, shape = layer_of(split, tails)
    x = 2 * normal(3, *shape)  # the interval is [-3, 3]: some lie outside
    assert (x.abs() > 3).any()
    assert_exact(randomized(layer.double(), gain=1), x)


def test_rows_are_split_by_a_negative_dimension_too():
    per = of("linear")

    class Rows(torch.nn.Module):
        def forward(self, x):
            return torch.cat([(x * (k + 1)).sin() for k in range(per)], -1)

    layer = nn.RationalQuadraticCoupling(Rows(), dim=-1, num_bins=BINS)
    assert_exact(layer, normal(2, 1, 3, 4))


@pytest.mark.parametrize("split", ("channels", "checkerboard"))
def test_context_changes_the_transform_and_gets_a_gradient(split):
    layer, shape = layer_of(split)
    n = layer.conditioner.leave[-1].out_channels
    inputs = 2
    layer.conditioner = nn.ConvNet(inputs, n, 4, 1, context_features=3)
    x, context = normal(2, *shape), normal(2, 3, seed=4)
    assert_exact(randomized(layer.double()), x, context)
    context.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, context)[1].sum(), context)
    assert gradient.abs().sum(1).min() > 0


def test_parameters_are_those_of_nflows_feature_by_feature():
    """Feature f's widths, heights and derivatives are the numbers f P .. f P + K, + 2K, + 3K - 1 of the output."""
    from pygen import ops

    theta = normal(3, 2 * of("linear"))

    class Given(torch.nn.Module):
        def forward(self, x):
            return theta

    x = normal(3, 4)
    layer = nn.RationalQuadraticCoupling(Given(), num_bins=BINS, identity_init=False)
    z, log_det = layer(x)
    expected, per = [], of("linear")
    for feature in (0, 1):
        own = theta[:, feature * per : (feature + 1) * per]
        widths, heights, derivatives = own[:, :BINS], own[:, BINS : 2 * BINS], own[:, 2 * BINS :]
        expected.append(ops.rational_quadratic_spline(x[:, 2 + feature], widths, heights, derivatives, tail_bound=3.0))
    torch.testing.assert_close(z[:, 2:], torch.stack([y for y, _ in expected], 1), rtol=0, atol=0)
    torch.testing.assert_close(log_det, sum(log_slope for _, log_slope in expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("split", SPLITS)
def test_passive_part_is_untouched_and_alone_decides(split):
    layer, shape = layer_of(split)
    layer = randomized(layer, gain=2)
    x = torch.rand(4, *shape) * 4 - 2
    z, _ = layer(x)
    untouched = (z == x).all(0)
    assert 0 < untouched.sum() < untouched.numel()
    (jacobian,) = torch.autograd.functional.jacobian(lambda x: layer(x)[0], (x[:1],))
    n = untouched.numel()
    jacobian = jacobian.reshape(n, n)
    active = ~untouched.flatten()
    off_diagonal = jacobian[active][:, active] - torch.diag(jacobian.diagonal()[active])
    assert torch.equal(off_diagonal, torch.zeros_like(off_diagonal)), "an active element depends on another one"


def test_parameters_reach_the_op_as_views_of_the_conditioners_output(monkeypatch):
    from pygen import ops

    seen = []
    original = ops.rational_quadratic_spline
    layer, shape = layer_of("channels", identity_init=False)
    monkeypatch.setattr(ops, "rational_quadratic_spline", lambda x, *p, **o: seen.extend(p) or original(x, *p, **o))
    layer(torch.randn(2, *shape))
    assert len(seen) == 3 and len({p.untyped_storage().data_ptr() for p in seen}) == 1


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("min_derivative", (1e-3, 0.3))
def test_a_new_layer_is_the_identity(split, tails, min_derivative):
    layer, shape = layer_of(split, tails, min_derivative=min_derivative)
    x = 2 * normal(8, *shape)
    z, log_det = layer.double()(x)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-13)
    torch.testing.assert_close(log_det, torch.zeros(8).double(), rtol=0, atol=1e-12)


def slopes_beside_the_bound(layer):
    """dz/dx of the active element just inside and outside of +-3."""
    edge = torch.tensor([-3 - 1e-10, -3 + 1e-10, 3 - 1e-10, 3 + 1e-10], dtype=torch.float64, requires_grad=True)
    z, _ = layer.double()(torch.stack((torch.zeros(4).double(), edge), 1))
    return torch.autograd.grad(z[:, 1].sum(), edge)[0]


def test_slope_at_the_bounds_is_1_and_not_1_295_as_with_enable_identity_init_of_nflows():
    """The density must not jump at +-B, for a new conditioner and for a trained one."""
    for gain in (0.0, 3.0):
        layer = nn.RationalQuadraticCoupling(nn.MLP(1, of("linear"), (8,)), num_bins=BINS)
        slopes = slopes_beside_the_bound(randomized(layer, gain=gain))
        torch.testing.assert_close(slopes, torch.ones(4).double(), rtol=0, atol=1e-6)


def test_without_identity_init_inner_slopes_are_those_of_nflows():
    """Raw zeros: the slope at inner knots is min_derivative + softplus(0), and 1 at the bounds all the same."""
    layer = nn.RationalQuadraticCoupling(nn.MLP(1, of("linear"), (8,)), num_bins=BINS, identity_init=False)
    x = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    _, log_det = layer.double()(x)
    torch.testing.assert_close(log_det.exp(), torch.tensor([1e-3 + math.log(2)]).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(slopes_beside_the_bound(layer), torch.ones(4).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("split", ("halves", "checkerboard"))
def test_gradients_of_parameters_match_finite_differences(split, tails):
    layer, shape = layer_of(split, tails)
    layer = randomized(layer.double(), gain=1)
    x = normal(2, *shape).requires_grad_()
    *_, (last, value) = layer.named_parameters()  # the last bias: reached on the way to every other parameter

    def function(x, value):
        return torch.func.functional_call(layer, {last: value}, (x,))

    assert torch.autograd.gradcheck(function, (x, value))


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
def test_inverse_recovers_input_at_depth_32(dtype, tolerance):
    torch.manual_seed(0)
    layers = []
    for index in range(32):
        layer = nn.RationalQuadraticCoupling(nn.MLP(3, 3 * of("linear", 8), (16,)))
        # At a gain of 0.5 the flow's Jacobian has a singular value of 1e-6: there no float32 finds x again.
        layers += [randomized(layer, seed=index, gain=0.3), nn.Permutation.random(6)]
    flow, x = nn.Sequential(*layers).to(dtype), normal(64, 6, dtype=dtype)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=10 * tolerance)


def test_all_inputs_in_the_tails_are_the_identity_with_finite_gradients():
    layer, _ = layer_of("halves")
    x = torch.full((3, 4), 50.0, requires_grad=True)
    z, log_det = randomized(layer, gain=2)(x)
    assert torch.equal(z, x) and torch.equal(log_det, torch.zeros(3))
    gradients = torch.autograd.grad(z.sum() + log_det.sum(), (x, *layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_dimensional_data_is_a_sentence_and_not_nan_unlike_normflows_58():
    layer = nn.RationalQuadraticCoupling(nn.MLP(1, of("linear"), (8,)), num_bins=BINS)
    with pytest.raises(ValueError, match=r"dimension 1 must have at least 2 elements to be split, got x \(3, 1\)"):
        layer(torch.randn(3, 1))
    with pytest.raises(ValueError, match="must leave at least one element as it is"):
        nn.RationalQuadraticCoupling(nn.MLP(1, of("linear")), mask=torch.tensor([True]))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bit_layers_keep_their_type_and_a_float32_log_det(dtype):
    for split in ("halves", "alternating mask"):
        layer, shape = layer_of(split)
        z, log_det = randomized(layer).to(dtype)(torch.randn(4, *shape, dtype=dtype))
        assert z.dtype == dtype and log_det.dtype == torch.float32


def test_empty_batch():
    for split in SPLITS:
        layer, shape = layer_of(split)
        z, log_det = layer(torch.empty(0, *shape))
        assert z.shape == (0, *shape) and log_det.shape == (0,)


@pytest.mark.parametrize(("tails", "parameters"), (("linear", 23), ("circular", 24), (None, 25)))
def test_parameters_per_feature(tails, parameters):
    layer = nn.RationalQuadraticCoupling(nn.MLP(1, parameters), tails=tails)
    assert layer.parameters_per_feature == of(tails, 8) == parameters


def test_bad_input_is_a_sentence():
    mlp, kind = nn.MLP(2, 46), nn.RationalQuadraticCoupling
    with pytest.raises(ValueError, match=r"23 parameters for each of 2 features.*\(5, 46\), got \(5, 40\)"):
        kind(nn.MLP(2, 40))(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"mask's shape \(4,\) per sample, got \(3, 5\)"):
        kind(nn.MLP(4, 92), mask=nn.alternating_mask(4))(torch.randn(3, 5))
    with pytest.raises(ValueError, match="tails must be one of linear, circular, none"):
        kind(mlp, tails="cubic")
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        kind(mlp, num_bins=0)
    with pytest.raises(ValueError, match="tail_bound must be a positive number"):
        kind(mlp, tail_bound=0.0)
    with pytest.raises(ValueError, match="min_bin_width must be positive and at most"):
        kind(mlp, min_bin_width=0.2)
    with pytest.raises(ValueError, match="identity_init needs 0 < min_derivative < 1"):
        kind(mlp, min_derivative=1.0)
