"""ActNorm and 1x1 convolution as one op: values, gradients, layouts, on every kernel. The module is in tests/nn."""

import pytest
import torch

from harness import INTERPRETED, ordinary_levels
from pygen import backends, ops

pytestmark = pytest.mark.skipif(INTERPRETED, reason="no Triton kernel: on a GPU it is a library call")

# Vectors, few pixels, one vector of pixels, a ragged row of them; channels that fill tiles and that do not.
SHAPES = [(3, 5), (3, 1, 5), (2, 4, 4, 4), (5, 12, 7, 3), (33, 24, 8, 8), (2, 48, 4, 4), (2, 13, 33, 5)]
named = pytest.mark.parametrize("shape", SHAPES, ids=str)


def parameters(channels, dtype=torch.float64, seed=0):
    """bias, log_scale, lower, upper, log_diagonal; sign, permutation. The unused triangles are not empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(randn(channels, channels)).Q)
    diagonal = upper.diagonal()
    noise = randn(channels, channels)
    free = (randn(channels), 0.3 * randn(channels), lower + noise.triu(), upper + noise.tril(-1), diagonal.abs().log())
    return [p.to(dtype).requires_grad_() for p in free] + [diagonal.sign().to(dtype), permutation.to(dtype)]


def draw(shape, dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(x, bias, log_scale, lower, upper, log_diagonal, sign, permutation):
    """One layer after the other, an einsum over channels, and the determinant of the matrix that was used."""
    flat = x.reshape(*x.shape[:2], -1)
    normalized = (flat + bias[:, None]) * log_scale.exp()[:, None]
    unit = torch.eye(len(bias), dtype=x.dtype)
    weight = permutation @ (lower.tril(-1) + unit) @ (upper.triu(1) + torch.diag(sign * log_diagonal.exp()))
    z = torch.einsum("ij,bjp->bip", weight, normalized)
    log_det = flat.size(2) * (torch.linalg.slogdet(weight).logabsdet + log_scale.sum())
    return z.reshape(x.shape), log_det.expand(len(x))


def with_gradients(function, x, ps, grads):
    leaves = [x.detach().requires_grad_(), *ps[:5]]
    outputs = function(leaves[0], *ps)
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def assert_exact(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.detach().double() - w).norm() <= tolerance * w.detach().norm().clamp_min(1e-3)


@named
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_and_gradients_are_those_of_the_layers_one_by_one(shape, dtype, backend, backend_device):
    if backend == "cuda":
        pytest.skip("compared on the CPU")
    ps, x = parameters(shape[1], dtype), draw(shape, dtype)
    grads = (draw(shape, dtype, 2), draw(shape[:1], dtype, 3))
    got = with_gradients(ops.actnorm_conv1x1, x, ps, grads)
    wide = [p.detach().double().requires_grad_(p.requires_grad) for p in ps]
    want = with_gradients(truth, x.double(), wide, [g.double() for g in grads])
    # Sums over channels, and for the weight's gradients over all pixels.
    assert_exact(got, want, 32 * torch.finfo(dtype).eps)


@named
def test_the_inverse_finds_x_again_and_negates_log_det(shape, backend, backend_device):
    if backend == "cuda":
        pytest.skip("compared on the CPU")
    ps, x = parameters(shape[1]), draw(shape)
    z, log_det = ops.actnorm_conv1x1(x, *ps)
    back, back_log_det = ops.actnorm_conv1x1(z, *ps, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(back_log_det, -log_det)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradcheck_and_gradgradcheck(inverse):
    ps, x = parameters(3), draw((2, 3, 4)).requires_grad_()

    def function(*args):
        return ops.actnorm_conv1x1(*args, *ps[5:], inverse=inverse)

    assert torch.autograd.gradcheck(function, (x, *ps[:5]))
    assert torch.autograd.gradgradcheck(function, (x, *ps[:5]), fast_mode=True)


def test_unused_outputs_cost_no_gradient():
    ps, x = parameters(4), draw((2, 4, 3)).requires_grad_()
    z, log_det = ops.actnorm_conv1x1(x, *ps)
    of_log = torch.autograd.grad(log_det.sum(), [x, ps[0], ps[1]], retain_graph=True)
    assert not of_log[0].any() and not of_log[1].any()
    assert torch.equal(of_log[2], torch.full_like(ps[1], 2 * 3))
    of_z = torch.autograd.grad(z.sum(), ps[1])
    want = torch.autograd.grad(truth(x, *ps)[0].sum(), ps[1])
    torch.testing.assert_close(of_z, want)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_strides_of_x_and_of_gradients_do_not_change_a_bit(layout):
    make = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "sliced": lambda t: torch.stack((t, t + 1), -1).flatten(-2)[..., ::2],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    ps, x, g = parameters(6, torch.float32), draw((3, 6, 5, 4), torch.float32), draw((3, 6, 5, 4), torch.float32, 2)
    g_log = draw((3,), torch.float32, 3)
    strided = with_gradients(ops.actnorm_conv1x1, make(x), ps, (make(g), g_log))
    plain = with_gradients(ops.actnorm_conv1x1, make(x).contiguous(), ps, (make(g).contiguous(), g_log))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


def test_results_are_the_same_bits_at_one_and_two_threads(two_threads):
    ps, x = parameters(12, torch.float32), draw((40, 12, 16, 16), torch.float32)
    grads = (draw(x.shape, torch.float32, 2), draw((40,), torch.float32, 3))
    runs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        runs.append(with_gradients(ops.actnorm_conv1x1, x, ps, grads))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (3, 4, 0)], ids=str)
def test_empty_batches_and_images(shape):
    ps, x = parameters(4), draw(shape).requires_grad_()
    z, log_det = ops.actnorm_conv1x1(x, *ps)
    assert z.shape == shape and log_det.shape == shape[:1] and not log_det.isnan().any()
    grads = torch.autograd.grad((z, log_det), ps[:5], (torch.zeros_like(z), torch.zeros_like(log_det)))
    assert all(not g.any() for g in grads)


def test_opcheck():
    ps, x = parameters(3), draw((2, 3, 4)).requires_grad_()
    torch.library.opcheck(torch.ops.pygen.actnorm_conv1x1.default, (x, *ps))
    torch.library.opcheck(torch.ops.pygen.actnorm_conv1x1_inverse.default, (x, *ps))


def test_vmap_equals_a_loop_over_inputs_and_over_weights():
    ps = [torch.stack(p) for p in zip(parameters(3, seed=0), parameters(3, seed=1), strict=True)]
    x = draw((2, 4, 3, 5))
    mapped = torch.func.vmap(ops.actnorm_conv1x1)(x, *ps)
    for i in range(2):
        for together, alone in zip(mapped, ops.actnorm_conv1x1(x[i], *(p[i] for p in ps)), strict=True):
            torch.testing.assert_close(together[i], alone)


def test_every_level_agrees_with_every_other():
    ps, x = parameters(20), draw((4, 20, 6, 6))
    results = []
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            results.append(ops.actnorm_conv1x1(x, *ps)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-13)


def test_mistakes_are_sentences():
    ps, x = parameters(4), draw((2, 4, 3))
    for error, sentence, arguments in (
        (TypeError, "x must be a torch.Tensor, got int", (1, *ps)),
        (TypeError, "all be float32 or all float64", (x.float(), *ps)),
        (TypeError, "all be float32 or all float64", (x.bfloat16(), *(p.bfloat16() for p in ps))),
        (ValueError, r"x must be \(B, C, ...\)", (x[0, 0], *ps)),
        (ValueError, r"bias must be \(5,\) for x \(2, 5, 3\), got \(4,\)", (draw((2, 5, 3)), *ps)),
        (ValueError, r"lower must be \(4, 4\)", (x, *ps[:2], ps[0], *ps[3:])),
        (RuntimeError, "permutation must be a permutation matrix", (x, *ps[:6], torch.ones(4, 4).double())),
    ):
        with pytest.raises(error, match=sentence):
            ops.actnorm_conv1x1(*arguments)
