"""Convolutions as operators: norms against dense matrices that torch's own modules fill in; the parametrization."""

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn.utils import parametrize

from pygen.nn.utils.conv_spectral_norm import conv_operator_norm, conv_spectral_norm

# The dense truth and the Fourier value are exact in float64 up to rounding; the power iteration promises half its
# tolerance of 1e-5 and mostly is at its square.
EXACT = {"rtol": 1e-11, "atol": 0}
ITERATED = {"rtol": 5e-6, "atol": 0}


def operator_matrix(module, input_shape):
    """(outputs, inputs): the images of the unit vectors under the module itself, in float64."""
    module = copy.deepcopy(module).double()
    channels = module.in_channels
    numel = channels * torch.Size(input_shape).numel()
    with torch.no_grad():
        basis = torch.eye(numel, dtype=torch.float64).view(numel, channels, *input_shape)
        zero = module(torch.zeros_like(basis[:1]))
        return (module(basis) - zero).flatten(1).T


def true_norm(module, input_shape):
    return torch.linalg.svdvals(operator_matrix(module.eval(), input_shape))[0]


def seeded(make, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return make(*args, **kwargs)


def conv2d(*args, **kwargs):
    return seeded(nn.Conv2d, *args, **kwargs)


def norm_of(module, shape, **kwargs):
    return conv_operator_norm(module, shape, **kwargs)


GRID = [
    dict(kernel_size=k, stride=s, padding=p, dilation=d, groups=g)
    for k, s, p, d, g in itertools.product((1, 2, 3), (1, 2), (0, 1), (1, 2), (1, 2))
]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_the_norm_of_a_6x6_convolution_is_its_matrixs(mode):
    for options in GRID:
        conv = conv2d(2, 4, padding_mode=mode, **options)
        truth = true_norm(conv, (6, 6))
        torch.testing.assert_close(norm_of(conv, (6, 6)), truth, **ITERATED, msg=str(options))
        torch.testing.assert_close(norm_of(conv, (6, 6), method="dense"), truth, **EXACT, msg=str(options))


def test_the_norm_of_a_transposed_convolution_is_its_matrixs():
    for k, s, p, d, g, o in itertools.product((1, 3), (1, 2), (0, 1), (1, 3), (1, 2), (0, 2)):
        options = dict(kernel_size=k, stride=s, padding=p, dilation=d, groups=g, output_padding=o)
        if o >= max(s, d):
            continue  # torch refuses it
        conv = seeded(nn.ConvTranspose2d, 4, 2, **options)
        truth = true_norm(conv, (4, 5))
        torch.testing.assert_close(norm_of(conv, (4, 5)), truth, **ITERATED, msg=str(options))
        torch.testing.assert_close(norm_of(conv, (4, 5), method="dense"), truth, **EXACT, msg=str(options))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "make, options, shape",
    [
        (nn.Conv1d, dict(kernel_size=5, padding="same"), (9,)),
        (nn.Conv1d, dict(kernel_size=3, stride=3, padding=2, dilation=2), (11,)),
        (nn.ConvTranspose1d, dict(kernel_size=4, stride=2, padding=1), (7,)),
        (nn.Conv2d, dict(kernel_size=(2, 3), padding="same"), (5, 6)),
        (nn.Conv2d, dict(kernel_size=(4, 2), padding="same", padding_mode="circular"), (5, 6)),
        (nn.Conv2d, dict(kernel_size=(3, 1), padding="valid", stride=(1, 2)), (5, 6)),
        (nn.Conv2d, dict(kernel_size=3, padding=(2, 1), dilation=(2, 1), padding_mode="reflect"), (5, 6)),
        (nn.Conv3d, dict(kernel_size=2, padding=1, stride=2), (3, 4, 3)),
        (nn.Conv3d, dict(kernel_size=3, padding=1, padding_mode="replicate"), (3, 3, 2)),
        (nn.ConvTranspose3d, dict(kernel_size=2, stride=2), (2, 2, 3)),
    ],
)
def test_the_norm_is_right_in_every_dimension_and_with_named_padding(make, options, shape):
    conv = seeded(make, 3, 2, **options)
    torch.testing.assert_close(norm_of(conv, shape), true_norm(conv, shape), **ITERATED)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((6, 6), dict(kernel_size=3, padding=1)),
        ((6, 5), dict(kernel_size=5, padding=2)),
        ((7, 8), dict(kernel_size=3, padding=2, dilation=2, groups=2)),
        ((6, 8), dict(kernel_size=3, padding=1, stride=2)),
        ((6, 8), dict(kernel_size=(3, 4), padding=(1, 1), stride=(3, 2), groups=2)),
        ((4, 4), dict(kernel_size=2, stride=2)),
    ],
)
def test_the_fourier_value_of_a_circular_convolution_is_exact(shape, options):
    conv = conv2d(4, 6, padding_mode="circular", **options)
    truth = true_norm(conv, shape)
    torch.testing.assert_close(norm_of(conv, shape, method="fourier"), truth, **EXACT)
    torch.testing.assert_close(norm_of(conv, shape), truth, **ITERATED)


def test_power_iteration_agrees_with_fourier_where_no_dense_matrix_fits():
    conv = conv2d(8, 8, 3, padding=1, padding_mode="circular")
    exact = norm_of(conv, (32, 32), method="fourier")
    torch.testing.assert_close(norm_of(conv, (32, 32)), exact, **ITERATED)


def test_the_reshaped_kernel_has_another_norm():
    smoothing = conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(smoothing.weight)
    reshaped = torch.linalg.matrix_norm(smoothing.weight.detach().flatten(1), 2)
    assert reshaped == pytest.approx(3)
    assert true_norm(smoothing, (16, 16)) > 2.9 * reshaped  # 9 on an infinite image
    torch.testing.assert_close(norm_of(smoothing, (16, 16)), true_norm(smoothing, (16, 16)), **ITERATED)


def test_iterating_the_unpadded_convolution_of_a_padded_layer_underestimates_sigma():
    """What FrEIA's IResNetLayer does: conv2d and conv_transpose2d with their default padding, at the real size."""
    conv = conv2d(2, 4, 3, padding=1)
    truth = true_norm(conv, (6, 6))
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    weight = conv.weight.detach().double()
    for _ in range(500):
        y = nn.functional.conv2d(x / x.norm(), weight)
        x = nn.functional.conv_transpose2d(y, weight)
    assert y.norm() < 0.97 * truth
    torch.testing.assert_close(norm_of(conv, (6, 6)), truth, **ITERATED)


def test_the_power_iteration_warns_when_it_does_not_converge():
    with pytest.warns(UserWarning, match="no convergence in 2 iterations"):
        sigma = norm_of(conv2d(3, 5, 3, padding=1), (8, 8), n_iterations=2)
    assert 0 < sigma < true_norm(conv2d(3, 5, 3, padding=1), (8, 8))


def test_the_operator_norm_leaves_torchs_generator_alone():
    conv = conv2d(3, 5, 3)
    state = torch.get_rng_state()
    assert norm_of(conv, (6, 6)) == norm_of(conv, (6, 6))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_the_norm_of_weights_of_any_size(scale):
    conv = conv2d(3, 5, 3, padding=1).double()
    truth = norm_of(conv, (6, 6), method="dense")
    with torch.no_grad():
        conv.weight.mul_(scale)
    torch.testing.assert_close(norm_of(conv, (6, 6)), truth * scale, **ITERATED)


@pytest.mark.parametrize(
    "module, shape, options, error, words",
    [
        (nn.Linear(3, 3), (6,), {}, TypeError, "got Linear"),
        (nn.Conv2d(3, 3, 3), (3, 6, 6), {}, ValueError, "2 positive spatial sizes"),
        (nn.Conv2d(3, 3, 3), (2, 6), {}, ValueError, "no output"),
        (nn.Conv2d(3, 3, 3, padding=2, padding_mode="reflect"), (2, 6), {}, ValueError, "too small for the padding"),
        (nn.Conv2d(3, 3, 3), (6, 6), dict(method="svd"), ValueError, "power, fourier, dense"),
        (nn.Conv2d(3, 3, 3, padding=1), (6, 6), dict(method="fourier"), ValueError, "circular"),
        (nn.Conv2d(3, 3, 3), (6, 6), dict(tolerance=0.0), ValueError, "tolerance positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(module, shape, options, error, words):
    with pytest.raises(error, match=words):
        conv_operator_norm(module, shape, **options)


# --- The parametrization

LAYERS = [
    (nn.Conv1d, dict(kernel_size=3, padding=1), (12,)),
    (nn.Conv2d, dict(kernel_size=3, padding=1), (6, 6)),
    (nn.Conv2d, dict(kernel_size=3, padding="same", dilation=2, groups=2), (6, 7)),
    (nn.Conv2d, dict(kernel_size=4, padding=1, stride=2), (6, 6)),
    (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="circular"), (6, 6)),
    (nn.Conv2d, dict(kernel_size=3, padding=1, padding_mode="reflect"), (6, 6)),
    (nn.Conv2d, dict(kernel_size=1), (6, 6)),
    (nn.Conv2d, dict(kernel_size=1, groups=2), (6, 6)),
    (nn.Conv3d, dict(kernel_size=2, padding=1), (3, 3, 3)),
    (nn.ConvTranspose2d, dict(kernel_size=4, stride=2, padding=1), (4, 4)),
    (nn.ConvTranspose2d, dict(kernel_size=1), (4, 4)),
]


@pytest.mark.parametrize("make, options, shape", LAYERS)
def test_the_normalised_convolution_has_operator_norm_1(make, options, shape):
    conv = conv_spectral_norm(seeded(make, 4, 6, **options).double(), shape)
    x = torch.randn(2, 4, *shape, dtype=torch.float64)
    for _ in range(300):
        conv(x)
    torch.testing.assert_close(true_norm(conv, shape), torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("make, options, shape", LAYERS)
def test_sigma_is_right_before_the_first_step(make, options, shape):
    """invertible-resnet#14: after few iterations singular values are above 1. Ours are not, and in float32 at that."""
    conv = conv_spectral_norm(seeded(make, 4, 6, **options), shape)
    assert true_norm(conv, shape) == pytest.approx(1, rel=1e-4)


def test_ten_plain_iterations_leave_singular_values_above_1():
    """What the warm-up is for, on the same layer: the iteration of invertible-resnet#14."""
    conv = conv2d(16, 16, 3, padding=1)
    weight, x = conv.weight.detach(), torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        y = nn.functional.conv2d(x / x.norm(), weight, padding=1)
        x = nn.functional.conv_transpose2d(y, weight, padding=1)
    truth = norm_of(conv, (12, 12))
    assert truth / y.norm() > 1.02
    assert norm_of(conv_spectral_norm(conv, (12, 12)).eval(), (12, 12)) < 1.0001


@pytest.mark.parametrize("bound, norm", [(0.5, 0.5), (1e3, None)])
def test_a_bound_is_kept_and_smaller_weights_are_left_alone(bound, norm):
    conv = conv2d(4, 6, 3, padding=1).double()
    before, weight = true_norm(conv, (6, 6)), conv.weight.detach().clone()
    conv_spectral_norm(conv, (6, 6), bound=bound)
    if norm is None:
        assert before < bound and torch.equal(conv.weight, weight)
    else:
        assert true_norm(conv, (6, 6)) == pytest.approx(norm, rel=1e-4)


def matrix_of_weight(conv, weight, shape):
    """`operator_matrix` with a graph to the weight."""
    basis = torch.eye(conv.in_channels * torch.Size(shape).numel(), dtype=weight.dtype)
    basis = basis.view(-1, conv.in_channels, *shape)
    return torch.func.functional_call(conv, {"weight": weight}, (basis,)).flatten(1)


@pytest.mark.parametrize("bound", [None, 0.5, 1e3])
@pytest.mark.parametrize("make, options, shape", LAYERS)
def test_the_gradient_is_that_of_the_largest_singular_value(make, options, shape, bound):
    """Also above the bound, where invertible-resnet#4 lost it."""
    plain = seeded(make, 4, 6, bias=False, **options).double()
    weight = plain.weight.detach().clone().requires_grad_()
    sigma = torch.linalg.svdvals(matrix_of_weight(plain, weight, shape))[0]
    by = sigma if bound is None else (sigma / bound).clamp_min(1)
    grad = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(2))
    ((weight / by) * grad).sum().backward()
    conv = conv_spectral_norm(plain, shape, bound=bound)
    norm = conv.parametrizations.weight[0]
    pixels = norm._v.shape[1:]  # one for pointwise convolutions
    u, _, vh = torch.linalg.svd(operator_matrix(conv, pixels))
    norm._u.copy_(u[:, 0].view_as(norm._u)), norm._v.copy_(vh[0].view_as(norm._v))
    (conv.weight * grad).sum().backward()
    torch.testing.assert_close(conv.parametrizations.weight.original.grad, weight.grad, rtol=1e-8, atol=1e-10)


def test_two_forwards_before_a_backward():
    conv = conv_spectral_norm(conv2d(2, 3, 3, padding=1), (5, 5))
    x = torch.randn(2, 2, 5, 5)
    (conv(x) - conv(2 * x)).sum().backward()
    conv.eval()
    y = conv(x)
    conv.train()
    conv(x)
    y.sum().backward()  # u and v of the evaluation are a copy


def test_evaluation_leaves_u_and_v_and_training_moves_them():
    conv = conv_spectral_norm(conv2d(2, 3, 3, padding=1), (5, 5))
    with torch.no_grad():
        conv.parametrizations.weight.original.add_(torch.randn(3, 2, 3, 3))
    before = copy.deepcopy(conv.state_dict())
    conv.eval()(torch.randn(1, 2, 5, 5))
    assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())
    u = conv.parametrizations.weight[0]._u
    conv.train()(torch.randn(1, 2, 5, 5))
    assert not torch.equal(before["parametrizations.weight.0._u"], u)
    assert conv.parametrizations.weight[0]._u is u, "in place, as DistributedDataParallel needs it"
    once = conv.eval().weight
    assert torch.equal(once, conv.weight)


def test_measuring_the_norm_changes_nothing():
    conv = conv_spectral_norm(conv2d(2, 3, 3, padding=1), (5, 5))
    with torch.no_grad():
        conv.parametrizations.weight.original.add_(torch.randn(3, 2, 3, 3))
    before = copy.deepcopy(conv.state_dict())
    torch.testing.assert_close(norm_of(conv, (5, 5)), true_norm(copy.deepcopy(conv), (5, 5)), **ITERATED)
    assert conv.training and all(m.training for m in conv.modules())
    assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())


def test_a_new_weight_that_is_assigned_has_norm_1_at_once():
    conv = conv_spectral_norm(conv2d(2, 3, 3, padding=1), (5, 5))
    conv.weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(5))
    assert true_norm(conv, (5, 5)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("bound", [None, 0.9])
def test_a_weight_of_zeros_gives_zeros_and_no_nan(kernel_size, bound):
    conv = conv2d(2, 3, kernel_size)
    nn.init.zeros_(conv.weight)
    conv_spectral_norm(conv, (5, 5), bound=bound)
    conv(torch.ones(1, 2, 5, 5)).sum().backward()
    assert torch.equal(conv.weight, torch.zeros_like(conv.weight))
    assert conv.parametrizations.weight.original.grad.isfinite().all()
    with torch.no_grad():
        conv.parametrizations.weight.original.normal_(generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        _ = conv.weight
    assert true_norm(conv, (5, 5)) == pytest.approx(bound or 1, rel=1e-2), "and it recovers"


def test_buffers_exist_from_registration_on_and_a_checkpoint_loads():
    """residual-flows creates u and v at the first forward, and load_state_dict before it fails."""
    trained = conv_spectral_norm(conv2d(2, 3, 3, stride=2), (7, 9))
    trained(torch.randn(1, 2, 7, 9))
    state = trained.state_dict()
    assert state["parametrizations.weight.0._u"].shape == (3, 3, 4)
    assert state["parametrizations.weight.0._v"].shape == (2, 7, 9)
    fresh = conv_spectral_norm(conv2d(2, 3, 3, stride=2, seed=1), (7, 9))
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval().weight, trained.eval().weight)


def test_the_buffers_of_a_pointwise_convolution_are_one_pixel():
    state = conv_spectral_norm(conv2d(2, 3, 1), (7, 9)).state_dict()
    assert state["parametrizations.weight.0._u"].shape == (3, 1, 1)
    assert state["parametrizations.weight.0._v"].shape == (2, 1, 1)


def test_copies_are_independent_and_removal_keeps_the_weight():
    conv = conv_spectral_norm(conv2d(2, 3, 3), (5, 5))
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.parametrizations.weight.original.mul_(-1).add_(1)
    twin(torch.randn(1, 2, 5, 5))
    assert not torch.equal(twin.parametrizations.weight[0]._v, conv.parametrizations.weight[0]._v)
    weight = conv.eval().weight.detach().clone()
    parametrize.remove_parametrizations(conv, "weight")
    assert torch.equal(conv.weight, weight) and set(conv.state_dict()) == {"weight", "bias"}


def test_a_tied_weight_has_the_norm_of_each_layer_that_uses_it():
    first, second = conv2d(2, 2, 3, padding=1), conv2d(2, 2, 3, stride=2)
    second.weight = first.weight
    conv_spectral_norm(first, (6, 6)), conv_spectral_norm(second, (6, 6))
    assert first.parametrizations.weight.original is second.parametrizations.weight.original
    for conv in (first, second):
        assert true_norm(conv, (6, 6)) == pytest.approx(1, rel=1e-4)
    (first.weight.sum() + second.weight.sum()).backward()


def test_sigma_does_not_change_under_autocast():
    conv = conv_spectral_norm(conv2d(2, 3, 3, padding=1), (5, 5))
    plain = copy.deepcopy(conv)
    with torch.autocast("cpu", torch.bfloat16):
        weight = conv.weight
        assert conv(torch.randn(1, 2, 5, 5)).dtype == torch.bfloat16
    assert weight.dtype == torch.float32 and torch.equal(weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_keep_their_type(dtype):
    conv = conv_spectral_norm(conv2d(4, 6, 3, padding=1).to(dtype), (6, 6))
    assert conv.weight.dtype == dtype
    # Every weight is rounded to 8 or 11 bits.
    assert true_norm(conv, (6, 6)) == pytest.approx(1, rel=4e-3)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_compiles_to_one_graph_once(kernel_size):
    conv = conv_spectral_norm(conv2d(2, 3, kernel_size), (5, 5))
    eager, x = copy.deepcopy(conv), torch.randn(1, 2, 5, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv, backend=counter, fullgraph=True)
    for _ in range(4):
        with torch.no_grad():
            for module in (conv, eager):
                module.parametrizations.weight.original.add_(0.1)
        for module in (compiled, eager):
            module(x).square().sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(conv.parametrizations.weight[0]._v, eager.parametrizations.weight[0]._v)
    torch.testing.assert_close(conv.parametrizations.weight.original.grad, eager.parametrizations.weight.original.grad)


def test_it_can_be_registered_on_the_meta_device():
    with torch.device("meta"):
        conv = conv_spectral_norm(nn.Conv2d(2, 3, 3), (5, 5))
    full = conv_spectral_norm(conv2d(2, 3, 3), (5, 5))
    conv.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(conv.eval().weight, full.eval().weight)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(name="kernel"), "no parameter called 'kernel'"),
        (dict(name="bias"), "must be the convolution's"),
        (dict(n_power_iterations=0), "n_power_iterations"),
        (dict(eps=0.0), "eps"),
        (dict(bound=-1.0), "bound"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        conv_spectral_norm(conv2d(2, 3, 3), (5, 5), **options)
