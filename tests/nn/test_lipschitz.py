"""Certified Lipschitz bounds: never below dense singular values, slopes or secants, and tight where they can be."""

import copy
import math

import pytest
import torch
from torch import nn

import pygen.nn as pnn
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.utils import _lipschitz_layers
from pygen.nn.utils.conv_spectral_norm import conv_spectral_norm
from pygen.nn.utils.lipschitz import lipschitz_bound
from pygen.nn.utils.spectral_norm import spectral_norm

# What the bounds allow for rounding is below this; they are never below the truth themselves.
MARGIN = 1e-8


def jacobian_norm(function, shape, x=None):
    """The largest singular value of the Jacobian, float64, at x or at a random point."""
    x = torch.randn(1, *shape, dtype=torch.float64) if x is None else x
    jacobian = torch.autograd.functional.jacobian(function, x)
    return float(torch.linalg.svdvals(jacobian.reshape(-1, x.numel())).amax())


def linear_norm(module, shape):
    """The same for a linear layer, from the images of the unit vectors."""
    with torch.no_grad():
        basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
        return float(torch.linalg.svdvals((module(basis) - module(torch.zeros_like(basis[:1]))).flatten(1))[0])


def assert_exact(module, shape):
    module = module.double()
    truth, bound = linear_norm(module, shape), lipschitz_bound(module, shape)
    assert truth * (1 - 1e-13) <= bound <= truth * (1 + MARGIN)


@pytest.fixture
def without_dense(monkeypatch):
    """Convolutions as if their matrix were too large."""
    monkeypatch.setattr(_lipschitz_layers, "_DENSE_LIMIT", 0)


def largest_secant(model, shape, pairs=10_000, scale=1.0):
    """The largest of |f(x) - f(y)| / |x - y|, for y far from x and near to it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(pairs, *shape, generator=generator, dtype=torch.float64) * scale
    step = torch.randn(pairs, *shape, generator=generator, dtype=torch.float64)
    y = x + step * torch.logspace(-3, 1, pairs, dtype=torch.float64).view(-1, *[1] * len(shape))
    with torch.no_grad():
        difference = (model(x) - model(y)).flatten(1).norm(dim=1)
    return float((difference / (x - y).flatten(1).norm(dim=1)).max())


@pytest.mark.parametrize("bounded", [False, True])
def test_secants_of_a_relu_network_stay_below_the_bound_on_ten_thousand_pairs(bounded):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)]
    model = nn.Sequential(*layers).double()
    if bounded:
        for layer in layers[::2]:
            spectral_norm(layer, n_power_iterations=50, bound=0.9)
    bound = lipschitz_bound(model)
    assert not bounded or bound <= 0.9**3 * (1 + 1e-3)
    assert largest_secant(model.eval(), (4,)) <= bound


def test_secants_of_a_convolutional_network_stay_below_the_bound():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), nn.GELU()),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(3, stride=2),
        nn.Flatten(),
        nn.Linear(27, 5),
        nn.Softmax(1),
    ).double()
    model(torch.randn(8, 2, 8, 8, dtype=torch.float64))
    model.eval()
    bound = lipschitz_bound(model, (2, 8, 8))
    assert 0 < largest_secant(model, (2, 8, 8), 2_000) <= bound


def test_the_bound_of_a_chain_of_aligned_matrices_is_attained():
    torch.manual_seed(0)
    widths, expected = (5, 4, 6, 3), 1.0
    model = nn.Sequential(*(nn.Linear(n, m) for n, m in zip(widths, widths[1:], strict=False))).double()
    direction = None
    for layer in model:  # each stretches most what the last one gave
        u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        if direction is not None:
            rotation = torch.linalg.qr(torch.cat((direction[:, None], torch.randn(len(direction), 9).double()), 1)).Q
            vh = rotation[:, : len(s)].T
        layer.weight.data.copy_(u * s @ vh)
        direction, expected = u[:, 0], expected * float(s[0])
    assert expected * (1 - 1e-13) <= lipschitz_bound(model) <= expected * (1 + MARGIN)
    assert jacobian_norm(model, (5,)) == pytest.approx(expected, rel=1e-12)


def random_convolutions():
    """60 layers of all kinds on small images."""
    generator = torch.Generator().manual_seed(7)

    def draw(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for seed in range(60):
        dims, groups, kernel, stride, dilation = draw(1, 2, 2, 3), draw(1, 1, 2), draw(1, 2, 3, 4), draw(1, 2, 3), 1
        kernel, dilation = (min(kernel, 2), 1) if dims == 3 else (kernel, draw(1, 1, 2))
        padding = draw(0, 1, 2)
        shape = tuple(draw(4, 5, 6) for _ in range(dims)) if dims < 3 else (3, 4, 3)
        options = dict(stride=stride, dilation=dilation, groups=groups, bias=False)
        torch.manual_seed(seed)
        if draw(False, True):
            make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
            padding = min(padding, dilation * (kernel - 1) // 2)
            conv = make(2, 4, kernel, padding=padding, output_padding=draw(0, stride - 1), **options)
        else:
            make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
            mode = draw("zeros", "circular", "reflect", "replicate")
            padding = max(padding, 1) if dilation * (kernel - 1) >= min(shape) else padding
            conv = make(2, 4, kernel, padding=padding, padding_mode=mode, **options)
        yield conv.double(), (2, *shape)


def too_small(conv, shape):
    return not conv.transposed and any(
        n + 2 * p < d * (k - 1) + 1
        for n, p, d, k in zip(shape[1:], conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )


def test_the_bound_of_a_convolution_is_never_below_its_matrix_and_close_to_it(without_dense):
    ratios = []
    for conv, shape in random_convolutions():
        if too_small(conv, shape):
            continue
        truth, bound = linear_norm(conv, shape), lipschitz_bound(conv, shape)
        assert bound >= truth, f"{conv} at {shape}"
        if conv.padding_mode == "zeros":
            ratios.append(bound / truth)
    # On images of 4 to 6 pixels, whose boundary is most of them; it shrinks with the square of the size.
    assert len(ratios) > 20 and max(ratios) < 2 and sum(ratios) / len(ratios) < 1.25


def test_small_convolutions_have_their_exact_norm():
    for conv, shape in random_convolutions():
        if not too_small(conv, shape):
            assert_exact(conv, shape)


@pytest.mark.parametrize(
    "make, options, shape",
    [
        (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="circular"), (4, 6, 5)),
        (nn.Conv2d, dict(kernel_size=4, padding=1, stride=2, padding_mode="circular"), (4, 6, 8)),
        (nn.Conv2d, dict(kernel_size=2, stride=2), (4, 6, 6)),
        (nn.Conv2d, dict(kernel_size=1, groups=2), (4, 6, 6)),
        (nn.ConvTranspose2d, dict(kernel_size=2, stride=2), (4, 3, 3)),
        (nn.ConvTranspose1d, dict(kernel_size=1, stride=3), (4, 5)),
    ],
)
def test_large_convolutions_without_a_boundary_have_their_exact_norm(without_dense, make, options, shape):
    torch.manual_seed(0)
    assert_exact(make(4, 6, **options), shape)


def test_the_bound_of_a_padded_convolution_approaches_its_norm_with_the_size(without_dense):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    excess = [lipschitz_bound(conv, (2, n, n)) / linear_norm(conv, (2, n, n)) - 1 for n in (4, 16)]
    assert 0 < excess[1] < 0.02 and excess[1] < excess[0] / 3


ACTIVATIONS = [
    (nn.ReLU(), 1),
    (nn.ReLU6(), 1),
    (nn.LeakyReLU(0.1), 1),
    (nn.LeakyReLU(-2.0), 2),
    (nn.RReLU(1.5, 2.5), 2.5),
    (nn.ELU(), 1),
    (nn.ELU(1.5), 1.5),
    (nn.CELU(0.5), 1),
    (nn.SELU(), 1.7581),
    (nn.SiLU(), 1.09984),
    (nn.GELU(), 1.12891),
    (nn.GELU("tanh"), 1.12900),
    (nn.Mish(), 1.0885),
    (nn.Tanh(), 1),
    (nn.Tanhshrink(), 1),
    (nn.Sigmoid(), 0.25),
    (nn.LogSigmoid(), 1),
    (nn.Hardsigmoid(), 1 / 6),
    (nn.Hardswish(), 1.5),
    (nn.Hardtanh(), 1),
    (nn.Softplus(), 1),
    (nn.Softplus(3.0), 1),
    (nn.Softsign(), 1),
    (nn.Softshrink(), 1),
    (nn.Identity(), 1),
]


@pytest.mark.parametrize("activation, expected", ACTIVATIONS, ids=lambda a: str(a))
def test_the_constant_of_an_activation_is_its_largest_slope(activation, expected):
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(activation.eval()(x).sum(), x)
    bound = lipschitz_bound(activation)
    assert bound == pytest.approx(expected, rel=1e-5)
    assert float(slopes.abs().max()) <= bound * (1 + 1e-12)
    # The slope of RReLU in eval mode is the mean one; that in training mode is drawn.
    largest = 2.5 if isinstance(activation, nn.RReLU) else float(slopes.abs().max())
    assert bound <= largest * (1 + 1e-5), "attained on the grid"


def test_a_prelu_has_its_largest_slope():
    prelu = nn.PReLU(3)
    prelu.weight.data = torch.tensor([0.5, -3.0, 0.1])
    assert lipschitz_bound(prelu) == 3
    prelu.weight.data.fill_(0.2)
    assert lipschitz_bound(prelu) == 1


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.AvgPool1d(2), (3, 6)),
        (nn.AvgPool2d(2), (1, 6, 6)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 5)),
        (nn.AdaptiveAvgPool2d(3), (1, 6, 6)),
        (nn.Upsample(scale_factor=2), (2, 3, 4)),
        (nn.UpsamplingNearest2d(scale_factor=3), (1, 3, 2)),
        (nn.ZeroPad2d(2), (2, 3, 4)),
        (nn.ConstantPad1d(2, 5.0), (2, 4)),
        (nn.ReflectionPad2d(2), (1, 4, 5)),
        (nn.ReplicationPad1d(3), (2, 4)),
        (nn.CircularPad2d(1), (1, 4, 3)),
        (nn.PixelShuffle(2), (4, 2, 3)),
        (nn.PixelUnshuffle(2), (1, 4, 6)),
        (nn.ChannelShuffle(2), (4, 2, 2)),
        (nn.Flatten(), (2, 2, 3)),
        (nn.Unflatten(1, (2, 3)), (6,)),
    ],
    ids=lambda a: str(a),
)
def test_layers_that_copy_move_and_average_have_their_exact_norm(layer, shape):
    assert_exact(layer, shape)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.AvgPool2d(3, stride=1, padding=1), (1, 6, 6)),
        (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), (1, 7, 7)),
        (nn.AvgPool1d(3, stride=2, ceil_mode=True), (1, 8)),
        (nn.AdaptiveAvgPool1d(4), (1, 7)),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (1, 4, 4)),
        (nn.Upsample(size=(5, 3), mode="bilinear"), (1, 4, 4)),
    ],
    ids=lambda a: str(a),
)
def test_overlapping_averages_stay_below_their_bound(layer, shape):
    truth, bound = jacobian_norm(layer, shape), lipschitz_bound(layer, shape)
    assert truth <= bound <= 1.5 * truth


@pytest.mark.parametrize(
    "pool, shape, expected",
    [
        (nn.MaxPool2d(2), (1, 6, 6), 1),
        (nn.MaxPool2d(3, stride=2, padding=1), (1, 7, 7), 2),
        (nn.MaxPool2d(3, stride=1), (1, 5, 5), 3),
        (nn.MaxPool1d(3, stride=1, dilation=2), (1, 9), math.sqrt(3)),
        (nn.MaxPool1d(2, stride=2, dilation=2), (1, 9), math.sqrt(2)),
        (nn.MaxPool3d(2, stride=1), (1, 3, 3, 3), math.sqrt(8)),
        (nn.AdaptiveMaxPool2d(1), (1, 5, 5), 1),
        (nn.AdaptiveMaxPool1d(3), (1, 5), math.sqrt(2)),
    ],
)
def test_overlapping_maxima_count_a_pixel_as_often_as_windows_have_it(pool, shape, expected):
    """Attained: a pixel far above the others is the maximum of all its windows."""
    assert lipschitz_bound(pool, shape) == pytest.approx(expected, rel=1e-12)
    slopes = []
    for pixel in range(math.prod(shape)):
        x = torch.randn(1, *shape, dtype=torch.float64)
        x.view(-1)[pixel] += 100
        slopes.append(jacobian_norm(pool, shape, x))
    assert max(slopes) == pytest.approx(expected, rel=1e-12)


def test_dropout_scales_in_training_mode_only():
    dropout = nn.Dropout(0.2)
    assert lipschitz_bound(dropout) == pytest.approx(1.25, rel=1e-12)
    assert lipschitz_bound(dropout.eval()) == 1
    assert lipschitz_bound(nn.Dropout(1.0)) == 0


def test_batch_norm_has_a_bound_in_eval_mode():
    norm = nn.BatchNorm1d(3).double()
    norm.running_var.copy_(torch.tensor([0.5, 4.0, 1.0]))
    norm.weight.data.copy_(torch.tensor([1.0, -8.0, 0.0]))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        lipschitz_bound(norm)
    assert_exact(norm.eval(), (3,))
    with pytest.raises(ValueError, match="statistics of its batch"):
        lipschitz_bound(nn.BatchNorm1d(3, track_running_stats=False).eval())


def test_a_softmax_is_a_half():
    x = torch.tensor([[0.0, 0.0, -50.0]], dtype=torch.float64)
    assert jacobian_norm(nn.Softmax(1), (3,), x) == pytest.approx(0.5, rel=1e-9)
    assert lipschitz_bound(nn.Softmax(1)) == 0.5


def test_a_residual_block_adds_1_to_its_branch():
    branch = nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 3)).double()
    block = InvertibleResidual(branch)
    bound = lipschitz_bound(block, (3,))
    assert bound == pytest.approx(1 + lipschitz_bound(branch), rel=1e-12)
    assert jacobian_norm(lambda x: x + branch(x), (3,)) <= bound
    assert lipschitz_bound(pnn.Sequential(block, block), (3,)) == pytest.approx(bound**2, rel=1e-12)


def test_pygens_own_networks_and_linear_flow_layers_have_bounds():
    torch.manual_seed(0)
    mlp = pnn.MLP(3, 2, (8,), activation="tanh").double()
    net = pnn.ConvNet(2, 4, hidden=3, blocks=2).double().eval()
    for module in (mlp, net):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    assert jacobian_norm(mlp, (3,)) <= lipschitz_bound(mlp)
    assert jacobian_norm(net, (2, 4, 4)) <= lipschitz_bound(net, (2, 4, 4))
    flow = pnn.Sequential(pnn.Squeeze(), pnn.ActNormConv1x1(4), pnn.Permutation.reverse(4)).double().eval()
    nn.init.normal_(flow[1].actnorm.log_scale)
    truth = jacobian_norm(lambda x: flow(x)[0], (1, 4, 4))
    assert truth * (1 - 1e-13) <= lipschitz_bound(flow, (1, 4, 4))


def test_zero_layers_give_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(threshold=1.0), nn.Linear(4, 2))
    assert lipschitz_bound(model) == math.inf  # it jumps
    nn.init.zeros_(model[2].weight)
    assert lipschitz_bound(model) == 0
    conv = nn.Conv2d(2, 2, 3)
    nn.init.zeros_(conv.weight)
    assert lipschitz_bound(conv, (2, 64, 64)) == 0


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_bound_reads_normalised_weights_and_changes_nothing(training, old):
    torch.manual_seed(0)
    normalise = nn.utils.spectral_norm if old else spectral_norm
    model = nn.Sequential(normalise(nn.Linear(6, 6)), nn.ReLU(), normalise(nn.Linear(6, 6))).train(training)
    if not old:
        model.append(nn.Unflatten(1, (2, 3)))
        model.append(conv_spectral_norm(nn.Conv1d(2, 2, 3, padding=1), (3,))).train(training)
    state = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    bound = lipschitz_bound(model, (6,))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    model.eval()
    x = torch.randn(1, 6)
    model(x)
    expected = math.prod(
        jacobian_norm(m.float(), (2, 3) if i == 4 else (6,), x.view(1, 2, 3) if i == 4 else x)
        for i, m in enumerate(model)
        if hasattr(m, "weight")
    )
    assert bound == pytest.approx(expected, rel=1e-5)  # of float32 Jacobians


def test_the_size_is_followed_through_the_network():
    """The same layer has another norm at another size; each is taken where it stands."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    model = nn.Sequential(conv, nn.MaxPool2d(2), conv)
    expected = linear_norm(conv, (2, 8, 8)) * linear_norm(conv, (2, 4, 4))
    assert lipschitz_bound(model, (2, 8, 8)) == pytest.approx(expected, rel=1e-9)


def test_copies_under_torch_compile_and_inference_mode_have_the_same_bound():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.AvgPool1d(2))
    bound = lipschitz_bound(model, (1, 3))
    with torch.inference_mode():
        assert lipschitz_bound(torch.compile(model, backend="eager"), (1, 3)) == bound


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "model, shape, error, words",
    [
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.LayerNorm(3))), None, TypeError, r"'1.0' \(LayerNorm\)"),
        (nn.LSTM(3, 3), None, TypeError, r"the model \(LSTM\)"),
        (nn.Sequential(Doubled(3, 3)), None, TypeError, r"'0' \(Doubled\)"),
        (nn.Sequential(nn.Hardshrink()), None, TypeError, "Hardshrink"),
        (pnn.MLP(3, 2, context_features=2), None, TypeError, "MLP"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), None, ValueError, r"input_shape.* needed for '0' \(Conv2d\)"),
        (nn.AvgPool2d(2), None, ValueError, "needed for the model"),
        (nn.Conv2d(2, 2, 3), (3, 8, 8), ValueError, "takes 2 channels"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), (3,), ValueError, "'1' .*takes 4 features"),
        (nn.Conv2d(2, 2, 5), (2, 3, 3), ValueError, "no output"),
        (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 4, 4), ValueError, "bicubic"),
        (nn.AlphaDropout(), None, ValueError, "eval mode"),
    ],
    ids=lambda a: None,
)
def test_what_has_no_bound_is_refused_by_name(model, shape, error, words):
    with pytest.raises(error, match=words):
        lipschitz_bound(model, shape)


def test_weights_that_are_not_finite_are_refused():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, math.nan)
    with pytest.raises(ValueError, match="finite"):
        lipschitz_bound(model)
