"""Coupling by halves beyond the common contract: the bits of splitting, coupling and joining; views; errors."""

import pytest
import torch

from harness import INTERPRETED, ordinary_levels
from ops.cases import coupling_oracle
from pygen import backends, ops, reference

LEVELS = ordinary_levels()
on_each_level = pytest.mark.parametrize("level", LEVELS)
every_map = pytest.mark.parametrize("scale_map", reference.SCALE_MAPS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# (shape of x, dim): sizes around those at which work is cut (512 elements a chunk, 8192 a block), halves in one piece
# and in rows, odd and even.
SHAPES = [
    ((5, 7), 1),
    ((300, 8), -1),
    ((70, 33), 1),
    ((3, 6, 4, 5), 1),
    ((3, 5, 90, 40), 1),
    ((2, 1, 9, 4), 2),
    ((3, 4, 5), -1),
    ((2, 3, 7, 4), 2),
    ((2, 3, 6001), 2),
    ((2, 1201, 9), -1),
]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the CPU kernels; Triton's own tests are in tests/triton_kernels")


def split(x, dim, swap):
    first, second = x.split((x.size(dim) - x.size(dim) // 2, x.size(dim) // 2), dim)
    return (second, first) if swap else (first, second)


def joined(passive, active, dim, swap):
    return torch.cat((active, passive) if swap else (passive, active), dim)


def by_pieces(x, parameters, dim, swap, **options):
    """Splitting, the coupling of the parts, and torch.cat."""
    passive, active = split(x, dim, swap)
    active, log_det = ops.affine_coupling(active, *parameters.chunk(2, dim), **options)
    return joined(passive, active, dim, swap), log_det


def inputs(shape, dim, swap, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    like = list(shape)
    like[dim] = 2 * (shape[dim] - shape[dim] // 2 if swap else shape[dim] // 2)
    x, parameters = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in (shape, like))
    log_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    grads = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(shape[0], generator=generator, dtype=log_dtype),
    )
    return x.requires_grad_(), parameters.requires_grad_(), grads


def gradients(outputs, leaves, grads, used=(0, 1)):
    outputs, grads = [outputs[k] for k in used], [grads[k] for k in used]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


@on_each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values_and_gradients_are_the_bits_of_splitting_coupling_and_joining(level, dtype, shape, dim, poisoned_memory):
    for swap, shift_first, inverse in ((False, False, False), (True, True, False), (False, True, True)):
        x, parameters, grads = inputs(shape, dim, swap, dtype)
        options = {"scale_map": "sigmoid", "shift_first": shift_first, "inverse": inverse}
        with backends.cpu_capability(level):
            got = ops.affine_coupling_halves(x, parameters, dim=dim, swap=swap, **options)
            want = by_pieces(x, parameters, dim, swap, **options)
            results = (*got, *gradients(got, (x, parameters), grads))
            expected = (*want, *gradients(want, (x, parameters), grads))
        for result, exact in zip(results, expected, strict=True):
            assert result.is_contiguous() and torch.equal(result, exact)


@every_map
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shift_first", [False, True])
def test_values_and_gradients_are_those_of_the_float64_formula(scale_map, swap, inverse, shift_first, poisoned_memory):
    for shape, dim in (((4, 9), 1), ((3, 5, 4, 2), 1), ((2, 4, 7), -1)):
        x, parameters, grads = inputs(shape, dim, swap, torch.float64)
        options = {"scale_map": scale_map, "shift_first": shift_first, "inverse": inverse}
        got = ops.affine_coupling_halves(x, parameters, dim=dim, swap=swap, **options)
        passive, active = split(x, dim, swap)
        active, log_det = coupling_oracle(**options)(active, *parameters.chunk(2, dim))
        want = joined(passive, active, dim, swap), log_det
        results, expected = [*got], [*want]
        for used in ((0, 1), (0,), (1,)):
            results += gradients(got, (x, parameters), grads, used)
            expected += gradients(want, (x, parameters), grads, used)
        for result, true in zip(results, expected, strict=True):
            torch.testing.assert_close(result, true, rtol=1e-12, atol=1e-12)


STRIDED = {
    "permuted": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "part of a wider tensor": lambda x: torch.cat((x + 1, x, x), 1)[:, x.size(1) : 2 * x.size(1)],
    "every other": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "flipped twice": lambda x: x.mT.contiguous().mT,
}


@on_each_level
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_strides_do_not_change_a_bit(level, layout, dtype, dim):
    x, parameters, (grad, grad_log_det) = inputs((3, 6, 5, 7), dim, True, dtype)
    strided = STRIDED[layout]
    with backends.cpu_capability(level):
        want = ops.affine_coupling_halves(x, parameters, dim=dim, swap=True)
        expected = (*want, *gradients(want, (x, parameters), (grad, grad_log_det)))
        leaves = [strided(t.detach()).requires_grad_() for t in (x, parameters)]
        got = ops.affine_coupling_halves(*leaves, dim=dim, swap=True)
        log_det_grads = torch.stack((grad_log_det, grad_log_det + 1), 1)[:, 0]
        results = (*got, *gradients(got, leaves, (strided(grad), log_det_grads)))
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result, exact)


@on_each_level
def test_more_irregular_dimensions_than_a_kernel_walks_are_still_exact(level):
    wide = torch.randn(*(4,) * 2, *(3,) * 9, dtype=torch.float64)
    x = wide[tuple(slice(0, 2) for _ in wide.shape)]
    parameters = torch.randn_like(wide)[tuple(slice(0, 2) for _ in wide.shape)]
    with backends.cpu_capability(level):
        got = ops.affine_coupling_halves(x, parameters, dim=4)
        want = ops.affine_coupling_halves(x.contiguous(), parameters.contiguous(), dim=4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_each_level
def test_an_infinite_scale_leaves_the_gradients_of_log_det_finite(level):
    x, parameters = torch.ones(1, 2, requires_grad=True), torch.tensor([[100.0, 1.0]], requires_grad=True)
    with backends.cpu_capability(level):
        z, log_det = ops.affine_coupling_halves(x, parameters)
        grad_x, grad_parameters = torch.ops.pygen.affine_coupling_halves_backward(
            None, torch.ones(1), x, parameters, 1, False, "exp", True, 2.0, False
        )
    assert z[0, 1].isinf() and log_det.item() == 100
    assert grad_x.tolist() == [[0, 0]] and grad_parameters[0, 1] == 0


def test_the_passive_part_keeps_every_bit_even_of_nan_and_infinity():
    x = torch.tensor([[float("nan"), float("inf"), -0.0, 1.0, 2.0, 3.0]])
    for dtype in DTYPES:
        z, _ = ops.affine_coupling_halves(x.to(dtype), torch.zeros(1, 6, dtype=dtype))
        integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[z.element_size()]
        assert torch.equal(z[:, :3].view(integers), x.to(dtype)[:, :3].view(integers))


def test_the_inverse_inverts():
    x, parameters, _ = inputs((4, 9, 3), 1, True, torch.float64)
    z, log_det = ops.affine_coupling_halves(x, parameters, swap=True, scale_map="atan", clamp=1.5)
    back, opposite = ops.affine_coupling_halves(z, parameters, swap=True, scale_map="atan", clamp=1.5, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-13, atol=1e-13)
    assert torch.equal(opposite, -log_det)


def test_mixed_dtypes_are_promoted_as_torch_promotes():
    z, log_det = ops.affine_coupling_halves(torch.ones(2, 4).bfloat16(), torch.zeros(2, 4))
    assert z.dtype == log_det.dtype == torch.float32


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 1), ((0, 3, 5), -1), ((3, 4, 0), 1)])
def test_empty_tensors(shape, dim):
    x, parameters, grads = inputs(shape, dim, False, torch.float32)
    outputs = ops.affine_coupling_halves(x, parameters, dim=dim)
    assert outputs[0].shape == shape and torch.equal(outputs[1], torch.zeros(shape[0]))
    assert [g.shape for g in gradients(outputs, (x, parameters), grads)] == [x.shape, parameters.shape]


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck_and_gradgradcheck_along_a_middle_dimension(inverse):
    x, parameters, _ = inputs((2, 2, 3, 2), 2, True, torch.float64)

    def function(x, parameters):
        return ops.affine_coupling_halves(x, parameters, dim=2, swap=True, scale_map="softplus", inverse=inverse)

    assert torch.autograd.gradcheck(function, (x, parameters))
    assert torch.autograd.gradgradcheck(function, (x, parameters), fast_mode=True)


@on_each_level
def test_results_are_the_same_bits_at_one_and_two_threads(level, two_threads):
    for shape, dim in (((300, 90), 1), ((3, 5, 120, 40), 1), ((2, 3001, 9), -1)):
        x, parameters, grads = inputs(shape, dim, False, torch.float32)
        runs = []
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            with backends.cpu_capability(level):
                outputs = ops.affine_coupling_halves(x, parameters, dim=dim, scale_map="tanh")
                runs.append((*outputs, *gradients(outputs, (x, parameters), grads)))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda x: ops.affine_coupling_halves(x, x[:, :3]),
            ValueError,
            r"must be \(2, 4\), .* x \(2, 4\), got \(2, 3\)",
        ),
        (lambda x: ops.affine_coupling_halves(x, x, dim=0), ValueError, "behind the batch, got 0"),
        (lambda x: ops.affine_coupling_halves(x, x, dim=-2), ValueError, "behind the batch, got -2"),
        (lambda x: ops.affine_coupling_halves(x, x, dim=2), ValueError, "dimension of x .* got 2"),
        (lambda x: ops.affine_coupling_halves(x[0], x[0]), ValueError, r"got 1 for x \(4,\)"),
        (lambda x: ops.affine_coupling_halves(x[:, :1], x), ValueError, r"at least 2 elements .* got x \(2, 1\)"),
        (lambda x: ops.affine_coupling_halves(x.long(), x.long()), RuntimeError, "floating point .* torch.int64"),
        (lambda x: ops.affine_coupling_halves(x, x, scale_map="cube"), RuntimeError, 'got "cube"'),
        (lambda x: ops.affine_coupling_halves(x, [1.0]), TypeError, "parameters must be a torch.Tensor, got list"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"parameters": torch.zeros(2, 6)}, r"parameters must be .* 4 in dimension 1.* got \(2, 6\)"),
        ({"parameters": torch.zeros(2, 4).double()}, "got .* torch.float64"),
        ({"dim": 2}, "and not the batch, got 2"),
        ({"dim": -2}, "and not the batch, got -2"),
        ({"x": torch.zeros(2, 1)}, "at least 2 elements"),
        ({"grad_z": torch.zeros(2, 3)}, r"gradient of z must be \(2, 4\)"),
        ({"grad_log_det": torch.zeros(3)}, r"gradient of log_det must be \(2,\)"),
    ],
)
def test_the_operator_itself_refuses_what_its_kernel_could_not_read(change, sentence):
    given = {"x": torch.zeros(2, 4), "parameters": torch.zeros(2, 4), "dim": 1, **change}
    grads = [given.pop(name, None) for name in ("grad_z", "grad_log_det")]
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.pygen.affine_coupling_halves_backward(*grads, *given.values(), False, "exp", False, 2.0, False)
