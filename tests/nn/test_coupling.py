"""Coupling layers: invertible, with the log-determinant that autograd's Jacobian has, for every way to split."""

import pytest
import torch
from nn.jacobian import jacobian_log_det, randomized

from pygen import nn
from pygen.reference import SCALE_MAPS


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
        return nn.AffineCoupling(torch.nn.Linear(2, 4), dim=-1, **options), (2, 3, 4)
    if kind == "alternating mask":
        return nn.AffineCoupling(nn.MLP(5, 10, (8,)), mask=nn.alternating_mask(5), **options), (5,)
    mask = nn.checkerboard_mask(3, 4, 2)
    return nn.AffineCoupling(nn.ConvNet(2, 4, 4, 1), mask=mask, swap="swapped" in kind, **options), (2, 3, 4)


SPLITS = (
    "halves",
    "odd halves",
    "odd halves, swapped",
    "channels",
    "rows",
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


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_halves_and_their_gradients_are_never_put_together_from_pieces():
    layer = randomized(nn.AffineCoupling(nn.ConvNet(2, 4, 4, 1)))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with Recorder() as recorder:
        z, log_det = layer(x)
        torch.autograd.grad(z.square().sum() + log_det.sum(), (x, *layer.parameters()))
    assert "pygen::affine_coupling_halves" in recorder.names
    assert not {"aten::cat", "aten::slice_backward"} & set(recorder.names)


def plain_halves(layer, x, inverse=False):
    """The coupling written out: split, transform, cat."""
    first, second = x.split((x.size(layer.dim) - x.size(layer.dim) // 2, x.size(layer.dim) // 2), layer.dim)
    passive, active = (second, first) if layer.swap else (first, second)
    scale, shift = layer.conditioner(passive).chunk(2, layer.dim)
    log_s = scale.tanh()
    active = (active - shift) / log_s.exp() if inverse else active * log_s.exp() + shift
    parts = (active, passive) if layer.swap else (passive, active)
    return torch.cat(parts, layer.dim), (-log_s if inverse else log_s).flatten(1).sum(1)


HALVES = [kind for kind in SPLITS if "halves" in kind or kind in ("channels", "rows")]


@pytest.mark.parametrize("used", ((0, 1), (0,), (1,)))
@pytest.mark.parametrize("inverse", (False, True))
@pytest.mark.parametrize("split", HALVES)
def test_gradients_by_halves_are_those_of_the_layer_written_out(split, inverse, used):
    layer, shape = affine(split)
    layer = randomized(layer.double())
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    outputs, truth = (layer.inverse if inverse else layer)(x), plain_halves(layer, x, inverse)
    grads = [torch.randn_like(y) for y in truth]
    leaves = (x, *layer.parameters())
    got, want = (
        torch.autograd.grad([y[k] for k in used], leaves, [grads[k] for k in used], allow_unused=True)
        for y in (outputs, truth)
    )
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or torch.allclose(g, w, rtol=1e-12, atol=1e-12)


def test_second_derivatives_by_halves_are_those_of_the_layer_written_out():
    layer = randomized(nn.AffineCoupling(nn.MLP(3, 4, (8,)))).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def penalty(function):
        z, log_det = function(x)
        (grad,) = torch.autograd.grad(z.square().sum() + log_det.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, *layer.parameters()), allow_unused=True)

    for got, want in zip(penalty(layer), penalty(lambda x: plain_halves(layer, x)), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, rtol=1e-11, atol=1e-11)


def test_backward_twice_through_a_retained_graph_gives_the_same_and_leaves_the_incoming_gradient():
    layer = randomized(nn.AffineCoupling(nn.MLP(3, 4, (8,))))
    x, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    copy = grad.clone()
    z, _ = layer(x)
    first, second = (torch.autograd.grad(z, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(grad, copy)


def test_per_sample_gradients_and_compiled_layers_agree_with_a_loop():
    layer = randomized(nn.AffineCoupling(nn.MLP(3, 4, (8,)))).double()
    x = torch.randn(4, 5, dtype=torch.float64)

    def loss(sample):
        z, log_det = layer(sample[None])
        return z.square().sum() + log_det.sum()

    together = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(together, torch.stack([torch.func.grad(loss)(sample) for sample in x]))
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda x: sum(y.square().sum() for y in layer(x)), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(leaf), leaf)
    (want,) = torch.autograd.grad(sum(y.square().sum() for y in layer(leaf)), leaf)
    torch.testing.assert_close(got, want)


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
