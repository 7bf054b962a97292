"""Invertible 1x1 convolutions: exact determinants and inverses, and the fold with ActNorm changes nothing."""

import pytest
import torch
from nn.jacobian import assert_exact, normal, randomized
from torch.autograd import gradcheck
from torch.func import functional_call

from pygen import nn

DECOMPOSITIONS = ("plu", "none")
SHAPES = ((3, 4), (3, 4, 5), (3, 4, 2, 3), (2, 3, 2, 1, 2))


def random_layer(kind, channels, decomposition, seed=0):
    """Away from the rotation it starts as; "none" near enough to it to be far from singular."""
    torch.manual_seed(seed)
    layer = kind(channels, decomposition=decomposition).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(normal(*parameter.shape, seed=seed + 1), alpha=0.15)
    return layer


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
@pytest.mark.parametrize("shape", SHAPES)
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(kind, decomposition, shape):
    assert_exact(random_layer(kind, shape[1], decomposition), normal(*shape))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_it_is_a_1x1_convolution_by_its_matrix(decomposition):
    layer, x = random_layer(nn.InvertibleConv1x1, 4, decomposition), normal(3, 4, 2, 5)
    expected = torch.nn.functional.conv2d(x, layer.matrix()[:, :, None, None])
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-14)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(layer.matrix() @ layer.inverse_matrix(), eye, rtol=0, atol=1e-13)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("channels", (1, 2, 48))
def test_a_new_layer_is_a_rotation(decomposition, channels):
    layer = nn.InvertibleConv1x1(channels, decomposition=decomposition)
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
    weight = layer.matrix()
    torch.testing.assert_close(weight @ weight.t(), torch.eye(channels).double(), rtol=0, atol=1e-5)
    x = torch.randn(2, channels, 4, 4)
    z, log_det = layer(x)
    torch.testing.assert_close(z.norm(), x.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-4)
    assert channels == 1 or not torch.equal(nn.InvertibleConv1x1(channels).matrix(), weight)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_from_matrix_has_the_matrix_it_was_given(decomposition, dtype):
    weight = normal(6, 6, seed=3).to(dtype)
    layer = nn.InvertibleConv1x1.from_matrix(weight, decomposition)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(layer.matrix(), weight.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(layer.log_abs_det(), torch.linalg.slogdet(weight.double())[1], rtol=0, atol=tolerance)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_state_dict_brings_signs_and_permutation_along(decomposition):
    layer, other = (nn.ActNormConv1x1(5, decomposition=decomposition) for _ in range(2))
    layer(torch.randn(4, 5, 3))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("training", (False, True))
def test_fold_equals_actnorm_then_convolution(decomposition, training):
    folded = nn.ActNormConv1x1(4, decomposition=decomposition).double().train(training)
    if not training:
        randomized(folded.actnorm)
    x = 3 * normal(5, 4, 3, 2) + 1
    z, log_det = folded(x)
    apart, expected = nn.Sequential(folded.actnorm, folded.convolution)(x)
    torch.testing.assert_close(z, apart, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-12)
    if training:  # the first batch has set the ActNorm inside
        standardised = folded.convolution.inverse(z)[0]
        torch.testing.assert_close(standardised.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(standardised.square().mean((0, 2, 3)), torch.ones(4).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
@pytest.mark.parametrize("channels_last", (False, True))
def test_gradients_of_x_and_every_parameter_match_finite_differences(kind, decomposition, channels_last):
    layer = random_layer(kind, 3, decomposition)
    x = normal(2, 3, 2, 2)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    def inverse(z, *values):
        class Inverse(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = layer

            def forward(self, z):
                return self.layer.inverse(z)

        return functional_call(Inverse(), {f"layer.{n}": v for n, v in zip(names, values, strict=True)}, (z,))

    for function in (forward, inverse):
        assert gradcheck(function, (x.requires_grad_(), *values))


def test_unused_triangles_of_the_factors_do_not_count():
    layer, x = random_layer(nn.InvertibleConv1x1, 4, "plu"), normal(2, 4, 3)
    before = layer(x)
    with torch.no_grad():
        layer.lower.add_(torch.ones(4, 4).triu())
        layer.upper.add_(torch.ones(4, 4).tril())
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
def test_every_memory_format_gives_the_same(kind):
    layer, x = random_layer(kind, 4, "plu"), normal(3, 4, 4, 6)
    expected = layer(x)[0]
    wide = normal(3, 8, 4, 12)
    sliced = wide[:, 2:6, :, ::2].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), sliced, x.transpose(2, 3).contiguous().mT):
        z, _ = layer(other)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(layer.inverse(z)[0], x, rtol=0, atol=1e-12)
    assert layer(x.contiguous(memory_format=torch.channels_last))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
def test_empty_batches_and_empty_images(kind):
    layer = kind(4)
    for shape in ((0, 4), (0, 4, 3, 3), (2, 4, 0, 3)):
        z, log_det = layer(torch.empty(shape))
        assert z.shape == shape and torch.equal(log_det, torch.zeros(shape[0]))
        assert layer.inverse(z)[0].shape == shape


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
def test_sixteen_bit_x_is_multiplied_in_float32(kind, decomposition):
    """W rounded to bf16 would have another determinant than the one reported, times every pixel."""
    layer = random_layer(kind, 8, decomposition).float()
    x = normal(2, 8, 16, 16).bfloat16()
    z, log_det = layer(x)
    exact, exact_log_det = layer.double()(x.double())
    assert z.dtype == torch.bfloat16 and log_det.dtype == torch.float32
    assert torch.equal(z, exact.bfloat16()) or (z - exact).abs().max() <= exact.abs().max() * 2**-8
    torch.testing.assert_close(log_det.double(), exact_log_det, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", (nn.InvertibleConv1x1, nn.ActNormConv1x1))
def test_autocast_changes_nothing(kind):
    for x in (torch.randn(2, 4, 3, 3), torch.randn(2, 4)):
        layer = kind(4)
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
            assert layer.inverse(expected[0])[0].dtype == torch.float32


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
def test_inverse_recovers_input_at_depth_32(decomposition, dtype, tolerance):
    torch.manual_seed(0)
    flow = nn.Sequential(*(nn.ActNormConv1x1(12, decomposition=decomposition) for _ in range(32))).to(dtype)
    x = normal(4, 12, 4, 4, dtype=dtype)
    z, log_det = flow(x)
    back, inverse_log_det = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=10 * tolerance)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="decomposition must be one of plu, none, got 'qr'"):
        nn.InvertibleConv1x1(3, decomposition="qr")
    with pytest.raises(ValueError, match="channels must be at least 1"):
        nn.InvertibleConv1x1(0)
    for kind in (nn.InvertibleConv1x1, nn.ActNormConv1x1):
        with pytest.raises(ValueError, match=kind.__name__ + r": x must be \(B, 3, ...\), got \(5, 4, 2\)"):
            kind(3)(torch.randn(5, 4, 2))
        with pytest.raises(ValueError, match=r"\(B, 3, ...\), got \(3,\)"):
            kind(3).inverse(torch.randn(3))
    with pytest.raises(ValueError, match=r"weight must be \(C, C\), got \(2, 3\)"):
        nn.InvertibleConv1x1.from_matrix(torch.ones(2, 3))
    for singular in (torch.ones(2, 2), torch.full((2, 2), float("nan"))):
        with pytest.raises(ValueError, match="must be invertible"):
            nn.InvertibleConv1x1.from_matrix(singular)
    layer = nn.InvertibleConv1x1(2, decomposition="none")
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(RuntimeError, match="singular"):
        layer.inverse(torch.randn(1, 2))
