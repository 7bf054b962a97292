"""Coupling layers: invertible, with the log-determinant that autograd's Jacobian has, for every way to split."""

import pytest
import torch

from pygen import nn
from pygen.reference import SCALE_MAPS


def randomized(module, seed=0, gain=0.5):
    """Conditioners start at zero; a test needs layers that do something: weights of gain / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
        torch.nn.init.normal_(parameter, std=gain / fan_in**0.5, generator=generator)
    return module


def jacobian_log_det(function, x):
    """log |det dz/dx| of every sample, from autograd's full Jacobian: knows nothing of couplings."""
    dets = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda s: function(s[None])[0][0], sample)
        dets.append(torch.linalg.slogdet(jacobian.reshape(sample.numel(), sample.numel())).logabsdet)
    return torch.stack(dets)


def affine(kind, **options):
    """(layer, shape of a sample) for every way to split."""
    if kind == "halves":
        return nn.AffineCoupling(nn.MLP(3, 6, (8,)), **options), (6,)
    if kind == "odd halves":
        return nn.AffineCoupling(nn.MLP(3, 4, (8,)), **options), (5,)
    if kind == "odd halves, swapped":
        return nn.AffineCoupling(nn.MLP(2, 6, (8,)), swap=True, **options), (5,)
    if kind == "channels":
        return nn.AffineCoupling(nn.ConvNet(2, 4, 4, 1), **options), (4, 3, 2)
    if kind == "rows":
        return nn.AffineCoupling(nn.ConvNet(1, 2, 4, 1), dim=3, **options), (1, 3, 4)
    if kind == "alternating mask":
        return nn.AffineCoupling(nn.MLP(5, 10, (8,)), mask=nn.alternating_mask(5), **options), (5,)
    mask = nn.checkerboard_mask(3, 4, 2)
    return nn.AffineCoupling(nn.ConvNet(2, 4, 4, 1), mask=mask, swap="swapped" in kind, **options), (2, 3, 4)


SPLITS = (
    "halves",
    "odd halves",
    "odd halves, swapped",
    "channels",
    "alternating mask",
    "checkerboard",
    "checkerboard, swapped",
)


@pytest.mark.parametrize("split", SPLITS)
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(split):
    layer, shape = affine(split)
    layer = randomized(layer.double())
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z, log_det = layer(x)
    back, inverse_log_det = layer.inverse(z)
    assert log_det.abs().min() > 1e-3, "the layer under test must do something"
    torch.testing.assert_close(log_det, jacobian_log_det(layer, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, jacobian_log_det(layer.inverse, z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift_first", (False, True))
@pytest.mark.parametrize("scale_map", SCALE_MAPS)
@pytest.mark.parametrize("split", ("halves", "checkerboard"))
def test_every_scale_map_is_exact_under_halves_and_masks(split, scale_map, shift_first):
    layer, shape = affine(split, scale_map=scale_map, shift_first=shift_first, clamp=1.5)
    layer = randomized(layer.double())
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z, log_det = layer(x)
    torch.testing.assert_close(log_det, jacobian_log_det(layer, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
def test_passive_part_is_untouched_and_alone_decides(split):
    layer, shape = affine(split)
    layer = randomized(layer)
    x = torch.randn(4, *shape)
    z, _ = layer(x)
    untouched = (z == x).all(0)
    assert 0 < untouched.sum() < untouched.numel()
    other = torch.where(untouched, x, torch.randn_like(x))
    assert torch.equal(layer(other)[1], layer(x)[1]), "the active part must not change scale or shift"


def test_mask_says_what_is_transformed():
    mask = torch.tensor([True, False, False, True, False])
    layer = randomized(nn.AffineCoupling(nn.MLP(5, 10, (8,)), mask=mask))
    x = torch.randn(3, 5)
    z, _ = layer(x)
    assert torch.equal((z != x).all(0), mask)
    swapped = randomized(nn.AffineCoupling(nn.MLP(5, 10, (8,)), mask=mask, swap=True))
    assert torch.equal((swapped(x)[0] != x).all(0), ~mask)


def test_loading_a_state_dict_brings_its_mask_along():
    trained = randomized(nn.AffineCoupling(nn.MLP(4, 8, (8,)), mask=torch.tensor([True, False, True, True])))
    other = nn.AffineCoupling(nn.MLP(4, 8, (8,)), mask=nn.alternating_mask(4))
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.AffineCoupling(nn.MLP(4, 8, (8,)), mask=nn.alternating_mask(5)).load_state_dict(trained.state_dict())
    other.load_state_dict(trained.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(other(x)[0], trained(x)[0])


def test_conditioner_may_return_a_tuple():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x.sin(), x.cos()

    class One(torch.nn.Module):
        def forward(self, x):
            return torch.cat((x.sin(), x.cos()), 1)

    x = torch.randn(3, 6)
    torch.testing.assert_close(nn.AffineCoupling(Pair())(x), nn.AffineCoupling(One())(x), rtol=0, atol=0)


def test_parameters_reach_the_op_as_views_of_the_conditioners_output(monkeypatch):
    from pygen import ops

    seen = []
    original = ops.affine_coupling
    monkeypatch.setattr(ops, "affine_coupling", lambda x, a, t, **o: seen.append((a, t)) or original(x, a, t, **o))
    nn.AffineCoupling(nn.ConvNet(2, 4, 4, 1))(torch.randn(2, 4, 3, 3))
    ((scale, shift),) = seen
    assert scale.untyped_storage().data_ptr() == shift.untyped_storage().data_ptr()


def flow_of_depth(depth, dtype, additive=False):
    torch.manual_seed(0)
    kind = nn.AdditiveCoupling if additive else nn.AffineCoupling
    out = 4 if additive else 8
    layers = [nn.Permutation.random(8)]
    for i in range(depth):  # the gain of a trained flow: a random one of gain 0.5 is chaotic, and float32 loses x
        layers.append(randomized(kind(nn.MLP(4, out, (16,)), swap=i % 2 == 1), i, gain=0.4))
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
@pytest.mark.parametrize("additive", (False, True))
def test_inverse_recovers_input_at_depth_32(dtype, tolerance, additive):
    flow = flow_of_depth(32, dtype, additive)
    x = torch.randn(64, 8, dtype=dtype)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=tolerance * 10)


def test_sequential_sums_log_dets_to_that_of_the_autograd_jacobian():
    flow = flow_of_depth(6, torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(flow(x)[1], jacobian_log_det(flow, x), rtol=0, atol=1e-9)


def test_additive_coupling_keeps_volume_exactly():
    layer = randomized(nn.AdditiveCoupling(nn.MLP(3, 3, (8,)))).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    z, log_det = layer(x)
    assert torch.equal(log_det, torch.zeros(4, dtype=torch.float64)) and not torch.equal(z, x)
    torch.testing.assert_close(jacobian_log_det(layer, x), log_det, rtol=0, atol=1e-12)
    masked = randomized(nn.AdditiveCoupling(nn.MLP(6, 6, (8,)), mask=nn.alternating_mask(6))).double()
    torch.testing.assert_close(masked.inverse(masked(x)[0])[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", ("halves", "checkerboard"))
def test_a_new_layer_is_the_identity(split):
    layer, shape = affine(split)
    x = torch.randn(3, *shape)
    z, log_det = layer(x)
    assert torch.equal(z, x) and torch.equal(log_det, torch.zeros(3))


def test_context_changes_the_transform_and_gets_a_gradient():
    for conditioner, shape in ((nn.MLP(2, 4, (8,), context_features=3), (4,)),
                               (nn.ConvNet(1, 2, 4, 1, context_features=3), (2, 3, 3))):  # fmt: skip
        layer = randomized(nn.AffineCoupling(conditioner))
        x, context = torch.randn(5, *shape), torch.randn(5, 3, requires_grad=True)
        z, log_det = layer(x, context)
        torch.testing.assert_close(layer.inverse(z, context)[0], x, rtol=0, atol=1e-5)
        assert not torch.allclose(layer(x, context + 1)[0], z)
        (gradient,) = torch.autograd.grad(z.sum() + log_det.sum(), context)
        assert gradient.abs().sum(1).min() > 0
        with pytest.raises(ValueError, match=r"context must be \(B, 3\), got none"):
            layer(x)


@pytest.mark.parametrize("split", ("halves", "checkerboard"))
def test_gradients_of_parameters_match_finite_differences(split):
    layer, shape = affine(split)
    layer = randomized(layer.double())
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bit_layers_keep_their_type_and_a_float32_log_det(dtype):
    layer = randomized(nn.AffineCoupling(nn.MLP(3, 6, (8,)), mask=None)).to(dtype)
    z, log_det = layer(torch.randn(4, 6, dtype=dtype))
    assert z.dtype == dtype and log_det.dtype == torch.float32
    assert nn.AdditiveCoupling(torch.nn.Identity())(torch.randn(4, 6, dtype=dtype))[1].dtype == torch.float32


def test_empty_batch():
    for split in SPLITS:
        layer, shape = affine(split)
        z, log_det = layer(torch.empty(0, *shape))
        assert z.shape == (0, *shape) and log_det.shape == (0,)


def test_bad_input_is_a_sentence():
    mlp = nn.MLP(2, 4, (8,))
    with pytest.raises(ValueError, match="dimension 1 must have at least 2 elements"):
        nn.AffineCoupling(nn.MLP(1, 2))(torch.randn(3, 1))
    with pytest.raises(ValueError, match="scale_map must be one of exp, tanh.*got 'cube'"):
        nn.AffineCoupling(mlp, scale_map="cube")
    with pytest.raises(TypeError, match="mask must be bool"):
        nn.AffineCoupling(mlp, mask=torch.ones(4))
    for everything in (torch.ones(4).bool(), torch.zeros(4).bool()):
        with pytest.raises(ValueError, match="at least one element as it is and transform at least one"):
            nn.AffineCoupling(mlp, mask=everything)
    with pytest.raises(ValueError, match=r"conditioner must return 2 x \(3, 2\).*got \(3, 2\)"):
        nn.AffineCoupling(nn.MLP(2, 2))(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"mask's shape \(4,\) per sample, got \(3, 5\)"):
        nn.AffineCoupling(nn.MLP(4, 8), mask=nn.alternating_mask(4))(torch.randn(3, 5))


def test_masks():
    assert nn.alternating_mask(5).tolist() == [False, True, False, True, False]
    assert torch.equal(nn.alternating_mask(5, even=True), ~nn.alternating_mask(5))
    board = nn.checkerboard_mask(3, 4)
    assert all(board[i, j] == ((i + j) % 2 == 1) for i in range(3) for j in range(4))
    assert torch.equal(nn.checkerboard_mask(3, 4, 2, even=True), ~board.expand(2, 3, 4))
