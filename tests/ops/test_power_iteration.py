"""power_iteration on every kernel: values, what cannot be iterated on, memory, the same bits alone and among others.

Not in cases.py: its operator takes lists, and u and v are constants of the gradient. The claims are those of the
contract. Gradients and torch's transformations are in test_power_iteration_torch.py.
"""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import INTERPRETED
from ops.power_iteration_data import FLOATS, array, flat, layer, sharp_layer, true_iteration
from ops.test_contract import LAYOUTS
from pygen import ops

DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else FLOATS
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ordered = pytest.mark.parametrize("u_first", [False, True], ids=["v_first", "u_first"])

# (shape, dim): one row, one column, sizes around a vector, convolutions' kernels, rows in other dimensions.
SHAPES = [((1, 1), 0), ((1, 7), 0), ((7, 1), 0), ((3, 5), 0), ((3, 5), 1), ((3, 5), -1), ((8, 3, 3, 3), 0)]
SHAPES += [((3, 8, 4, 4), 1), ((4, 2, 3), -1), ((2, 3, 1, 2, 2), -4), ((64, 27), 0), ((17, 33), 0), ((63, 65), 0)]
# Sizes that blocks and threads care about.
LARGE = [((128, 1024), 0), ((1024, 130), 1), ((512, 4608), 0), ((96, 128, 3, 3), 1), ((1, 70000), 0), ((70000, 1), 0)]
# A launch takes a tenth of a second in Triton's interpreter.
if INTERPRETED:
    SHAPES, LARGE = [((1, 7), 0), ((5, 3), -1), ((3, 4, 2, 2), 1)], [((63, 65), 0)]
MANY = 15 if INTERPRETED else 40  # steps to convergence, by 0.36 each


def eps_of(dtype):
    """Of what is computed in: 16-bit inputs are widened."""
    return torch.finfo(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype).eps


def assert_iterated(weight, u, v, got, *, return_weight=True, **options):
    """Within 8 epsilon of float64, by the norm; measured over all shapes and 50 steps: 5.3. The iteration forgets its
    rounding, for a step shrinks what lies beside the largest singular vector."""
    sigma, new_u, new_v, *normalized = got
    true_sigma, true_u, true_v = true_iteration(weight, u, v, **options)
    eps = eps_of(weight.dtype)
    assert sigma.dtype == (torch.float64 if weight.dtype == torch.float64 else torch.float32) and sigma.shape == ()
    # Of given vectors sigma may cancel: relative to what is summed.
    size = np.linalg.norm(array(flat(weight, options.get("dim", 0))) @ true_v)
    assert abs(sigma.item() - true_sigma) <= 8 * eps * max(size, abs(true_sigma))
    for new, true, given_vector in ((new_u, true_u, u), (new_v, true_v, v)):
        assert new.dtype == given_vector.dtype and new.shape == given_vector.shape and new.is_contiguous()
        # float64 vectors of a float32 weight are computed in float32; 16-bit ones are rounded once.
        allowed = 8 * max(eps, torch.finfo(new.dtype).eps / 4)
        assert np.linalg.norm(array(new) - true) <= allowed * max(np.linalg.norm(true), 1e-30)
    if normalized:
        (normalized,) = normalized
        assert normalized.dtype == weight.dtype and normalized.shape == weight.shape and normalized.is_contiguous()
        want = array(weight) / sigma.item()
        allowed = 2 * max(eps, torch.finfo(weight.dtype).eps)
        assert np.linalg.norm(array(normalized) - want) <= allowed * np.linalg.norm(want)


# ---- values ----------------------------------------------------------------------------------------------------------


@typed
@ordered
@pytest.mark.parametrize("n_iterations", [0, 2] if INTERPRETED else [0, 1, 2, 50])
def test_sigma_and_vectors_are_those_of_float64(n_iterations, u_first, dtype, backend_device, poisoned_memory):
    for shape, dim in SHAPES:
        weight, u, v = layer(*shape, dim=dim, dtype=dtype, device=backend_device)
        options = {"n_iterations": n_iterations, "u_first": u_first, "dim": dim}
        assert_iterated(weight, u, v, ops.power_iteration(weight, u, v, return_weight=True, **options), **options)


@pytest.mark.parametrize("shape", LARGE, ids=lambda shape: "x".join(map(str, shape[0])))
def test_large_layers_are_as_right(shape, backend, backend_device, poisoned_memory):
    if backend == "reference":
        pytest.skip("for blocks and threads, of which the plain formulas have none")
    size, dim = shape
    for dtype in (torch.float32, torch.bfloat16):
        weight, u, v = layer(*size, dim=dim, dtype=dtype, vectors=torch.float32, device=backend_device)
        for u_first in (False, True):
            options = {"n_iterations": 2, "u_first": u_first, "dim": dim}
            assert_iterated(weight, u, v, ops.power_iteration(weight, u, v, return_weight=True, **options), **options)


@typed
@pytest.mark.parametrize("vectors", FLOATS, ids=lambda dtype: f"vectors_{str(dtype).removeprefix('torch.')}")
def test_vectors_may_have_another_dtype_than_the_weight(vectors, dtype, backend_device):
    for n_iterations in (0, 3):
        weight, u, v = layer(6, 3, 3, 3, dtype=dtype, vectors=vectors, device=backend_device)
        got = ops.power_iteration(weight, u, v, n_iterations=n_iterations, return_weight=True)
        assert_iterated(weight, u, v, got, n_iterations=n_iterations)


def test_u_and_v_may_have_different_dtypes(backend_device):
    weight, u, v = layer(9, 5, device=backend_device)
    for u_dtype, v_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        mixed = weight, u.to(u_dtype), v.to(v_dtype)
        assert_iterated(*mixed, ops.power_iteration(*mixed, n_iterations=2), n_iterations=2)


@typed
@ordered
def test_sigma_converges_to_the_largest_singular_value(u_first, dtype, backend_device):
    for shape, dim in [((64, 27), 0), ((1, 7), 0), ((7, 1), 0), ((3, 8, 4, 4), 1)][3 * INTERPRETED :]:
        weight, u, v = sharp_layer(*flat(torch.empty(shape), dim).shape, dtype=dtype, device=backend_device)
        if dim == 1:
            weight = weight.view(8, 3, 4, 4).transpose(0, 1)
        sigma, *_ = ops.power_iteration(weight, u, v, n_iterations=MANY, u_first=u_first, dim=dim)
        true = np.linalg.svd(array(flat(weight, dim)), compute_uv=False)[0]
        assert abs(sigma.item() / true - 1) < 1e-5


@typed
def test_the_normalised_weight_has_spectral_norm_one(dtype, backend_device):
    weight, u, v = sharp_layer(20, 9, dtype=dtype, device=backend_device)
    *_, normalized = ops.power_iteration(weight, u, v, n_iterations=MANY, return_weight=True)
    largest = np.linalg.svd(array(normalized), compute_uv=False)[0]
    assert abs(largest - 1) < max(1e-5, torch.finfo(dtype).eps)


def test_steps_may_be_made_one_call_at_a_time(backend_device):
    """As a training loop does: a step an update, from where the last one ended."""
    weight, u, v = sharp_layer(12, 30, device=backend_device)
    for _ in range(MANY):
        sigma, u, v = ops.power_iteration(weight, u, v)
    assert abs(sigma.item() / np.linalg.svd(array(weight), compute_uv=False)[0] - 1) < 1e-5


def test_u_first_has_the_numbers_of_torchs_parametrization_and_v_first_those_of_the_paper(backend_device):
    weight, u, v = layer(10, 4, 3, 3, device=backend_device)
    _, got_u, got_v = ops.power_iteration(weight, u, v, u_first=True)
    want_u = torch.nn.functional.normalize(flat(weight) @ v, dim=0)
    want_v = torch.nn.functional.normalize(flat(weight).T @ want_u, dim=0)
    torch.testing.assert_close((got_u, got_v), (want_u, want_v))
    _, got_u, got_v = ops.power_iteration(weight, u, v)
    want_v = torch.nn.functional.normalize(flat(weight).T @ u, dim=0)
    torch.testing.assert_close((got_u, got_v), (torch.nn.functional.normalize(flat(weight) @ want_v, dim=0), want_v))


@settings(
    max_examples=3 if INTERPRETED else 25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    dim=st.integers(0, 1),
    n_iterations=st.integers(0, 3),
    u_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(shape, dim, n_iterations, u_first, seed, backend_device):
    weight, u, v = layer(*shape, dim=dim, device=backend_device, seed=seed)
    options = {"n_iterations": n_iterations, "u_first": u_first, "dim": dim}
    assert_iterated(weight, u, v, ops.power_iteration(weight, u, v, return_weight=True, **options), **options)


# ---- what cannot be iterated on, and numbers near the ends of their range --------------------------------------------


@typed
@ordered
def test_a_matrix_of_zeros_gives_sigma_zero_and_zeros_and_no_nan(u_first, dtype, backend_device, poisoned_memory):
    for shape in ((5, 4), (1, 1), (3, 2, 2, 2)):
        weight, u, v = layer(*shape, dtype=dtype, device=backend_device)
        zeros = torch.zeros_like(weight)
        sigma, new_u, new_v, normalized = ops.power_iteration(
            zeros, u, v, n_iterations=3, u_first=u_first, return_weight=True
        )
        assert sigma == 0 and torch.equal(normalized, zeros)
        assert torch.equal(new_u, u) and torch.equal(new_v, v)


@ordered
def test_zero_vectors_stay_until_a_product_moves_them(u_first, backend_device):
    weight, u, v = layer(6, 4, device=backend_device)
    _, new_u, new_v = ops.power_iteration(weight, torch.zeros_like(u), torch.zeros_like(v), u_first=u_first)
    assert (new_u == 0).all() and (new_v == 0).all()
    one_zero = (u, torch.zeros_like(v)) if u_first else (torch.zeros_like(u), v)
    got = ops.power_iteration(weight, *one_zero, n_iterations=2, u_first=u_first)
    assert_iterated(weight, *one_zero, got, n_iterations=2, u_first=u_first)


def test_a_vector_in_the_null_space_leaves_the_other_as_it_was(backend_device):
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.0]], device=backend_device)
    along, null = torch.tensor([0.6, 0.8], device=backend_device), torch.tensor([0.0, 1.0], device=backend_device)
    unit = torch.tensor([1.0, 0.0], device=backend_device)
    sigma, u, v = ops.power_iteration(weight, null, along)  # W^T u = 0
    assert torch.equal(v, along) and torch.equal(u, unit) and sigma.item() == pytest.approx(1.2)
    sigma, u, v = ops.power_iteration(weight, along, null, u_first=True)  # W v = 0
    assert torch.equal(u, along) and torch.equal(v, unit) and sigma.item() == pytest.approx(1.2)
    _, u, v = ops.power_iteration(weight, null, null, n_iterations=5)
    assert torch.equal(u, null) and torch.equal(v, null)


@typed
@ordered
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_shows_in_sigma_and_leaves_u_and_v_usable(bad, u_first, dtype, backend_device):
    weight, u, v = layer(40, 9, dtype=dtype, device=backend_device)
    weight[17, 3] = bad
    sigma, new_u, new_v = ops.power_iteration(weight, u, v, n_iterations=2, u_first=u_first)
    assert not sigma.isfinite()
    assert torch.equal(new_u, u) and torch.equal(new_v, v)
    weight[17, 3] = 1.0
    assert_iterated(weight, u, v, ops.power_iteration(weight, new_u, new_v))


@ordered
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e25, 1e30, 1e35])
def test_numbers_whose_squares_overflow_or_vanish_are_as_right(scale, u_first, backend_device):
    """|W v|^2 is 1e60, and W^T W v of vectors that were not normalised in between as well."""
    for shape in ((9, 5), (30, 20))[INTERPRETED:]:
        weight, u, v = layer(*shape, device=backend_device)
        weight *= scale
        options = {"n_iterations": 3, "u_first": u_first, "eps": 1e-38}
        assert_iterated(weight, u, v, ops.power_iteration(weight, u, v, return_weight=True, **options), **options)


@pytest.mark.parametrize("scale", [1e-4, 30.0], ids=["small", "large"])
def test_a_float16_weight_has_the_range_of_float32_inside(scale, backend_device):
    weight, u, v = layer(60, 60, dtype=torch.float16, vectors=torch.float32, device=backend_device)
    weight *= scale * 60  # squares of 1e4 and sums over them are no float16
    assert_iterated(weight, u, v, ops.power_iteration(weight, u, v, n_iterations=2), n_iterations=2)


def test_norms_below_eps_are_divided_by_eps(backend_device):
    weight, u, v = layer(6, 4, device=backend_device)
    got = ops.power_iteration(weight, u, v, eps=100.0)
    assert_iterated(weight, u, v, got, eps=100.0)
    assert got[1].norm() < 1 and got[2].norm() < 0.1
    *_, normalized = ops.power_iteration(weight, u, v, eps=100.0, return_weight=True)
    torch.testing.assert_close(normalized, weight / 100)


def test_a_weight_far_below_eps_gives_no_nan(backend_device):
    weight, u, v = layer(6, 4, device=backend_device)
    for got in ops.power_iteration(1e-30 * weight, u, v, n_iterations=4, return_weight=True):
        assert got.isfinite().all()


def test_a_negative_sigma_of_given_vectors_divides_with_its_sign(backend_device):
    weight = torch.diag(torch.tensor([2.0, 1.0], device=backend_device))
    u = torch.tensor([1.0, 0.0], device=backend_device)
    sigma, *_, normalized = ops.power_iteration(weight, u, -u, n_iterations=0, return_weight=True)
    assert sigma == -2 and torch.equal(normalized, weight / -2)


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 0), ((4, 0), 0), ((0, 0), 0), ((3, 0, 2), 0), ((3, 0, 2), 1)])
@pytest.mark.parametrize("n_iterations", [1] if INTERPRETED else [0, 1, 3])
def test_an_empty_weight_has_sigma_zero_and_keeps_its_vectors(
    shape, dim, n_iterations, backend_device, poisoned_memory
):
    weight, u, v = layer(*shape, dim=dim, device=backend_device)
    sigma, new_u, new_v, normalized = ops.power_iteration(
        weight, u, v, n_iterations=n_iterations, dim=dim, return_weight=True
    )
    assert sigma == 0 and normalized.shape == weight.shape
    assert torch.equal(new_u, u) and torch.equal(new_v, v)


# ---- layouts and memory ----------------------------------------------------------------------------------------------


def assert_same(got, want, backend):
    """The same bits; from the plain formulas the same values: torch's own sums depend on layout and threads."""
    for g, w in zip(got, want, strict=True):
        if backend == "reference":
            assert g.shape == w.shape and torch.equal(g.isnan(), w.isnan())
            error = (g - w).double().nan_to_num().norm()
            assert error <= 16 * torch.finfo(g.dtype).eps * w.double().nan_to_num().norm()
        else:
            assert torch.equal(g, w)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_the_inputs_do_not_change_a_bit(layout, dtype, backend, backend_device):
    for shape, dim in (((4, 6, 2, 5), 0), ((11, 7), 0), ((4, 6, 2, 5), 1))[2 * INTERPRETED :]:
        weight, u, v = layer(*shape, dim=dim, dtype=dtype, device=backend_device)
        options = {"n_iterations": 2, "dim": dim, "return_weight": True}
        vectors = [torch.stack((x, x + 1), -1)[:, 0] for x in (u, v)]
        got = ops.power_iteration(LAYOUTS[layout](weight), *vectors, **options)
        assert_same(got, ops.power_iteration(weight, u, v, **options), backend)
        assert all(result.is_contiguous() for result in got)


def test_transposed_and_expanded_weights_equal_their_copies(backend, backend_device):
    weight, u, v = layer(7, 12, device=backend_device)
    row = weight[:1].expand(7, 12)
    for strided, vectors in ((weight.T, (v, u)), (row, (u, v)), (weight.T, (v[:1].expand(12), u))):
        got = ops.power_iteration(strided, *vectors, n_iterations=2, return_weight=True)
        want = ops.power_iteration(strided.contiguous(), *vectors, n_iterations=2, return_weight=True)
        assert_same(got, want, backend)


@pytest.mark.parametrize("n_iterations", [0, 1])
def test_inputs_are_not_modified_and_results_are_memory_of_their_own(n_iterations, backend_device):
    """Callers copy the new vectors into their buffers: shared memory would change what a graph has saved."""
    layers = [
        layer(5, 4, device=backend_device),
        layer(1, 3, device=backend_device),
        layer(6, 1, device=backend_device),
    ]
    weights, us, vs = (list(tensors) for tensors in zip(*layers, strict=True))
    given_tensors = [*weights, *us, *vs]
    copies = [x.clone() for x in given_tensors]
    sigma, new_us, new_vs, normalized = ops.power_iteration_multi(
        weights, us, vs, n_iterations=n_iterations, return_weights=True
    )
    assert all(torch.equal(x, copy) for x, copy in zip(given_tensors, copies, strict=True))
    results = [sigma, *new_us, *new_vs, *normalized]
    addresses = [x.untyped_storage().data_ptr() for x in (*given_tensors, *results)]
    assert len(set(addresses)) == len(addresses)
    assert all(x.is_contiguous() and not x.requires_grad for x in results)


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16], ids=str)
def test_no_steps_return_the_bits_of_the_given_vectors(vectors, backend_device):
    weight, u, v = layer(5, 4, vectors=vectors, device=backend_device)
    _, new_u, new_v = ops.power_iteration(weight, 3 * u, v / 7, n_iterations=0)
    assert torch.equal(new_u, 3 * u) and torch.equal(new_v, v / 7)


# ---- many layers, and the same bits ----------------------------------------------------------------------------------


def network(dtype=torch.float32, device="cpu"):
    """Weights, us, vs and dims of layers of all kinds."""
    shapes = [*SHAPES, ((0, 4), 0), ((4, 0), 0), *([] if INTERPRETED else [((130, 257), 0)])]
    layers = [layer(*shape, dim=dim, dtype=dtype, device=device, seed=i) for i, (shape, dim) in enumerate(shapes)]
    return *(list(tensors) for tensors in zip(*layers, strict=True)), [dim for _, dim in shapes]


@typed
@ordered
@pytest.mark.parametrize("return_weights", [True] if INTERPRETED else [False, True])
def test_layers_in_one_call_have_the_bits_of_each_alone(
    return_weights, u_first, dtype, backend, backend_device, poisoned_memory
):
    weights, us, vs, dims = network(dtype, backend_device)
    sigma, new_us, new_vs, *normalized = ops.power_iteration_multi(
        weights, us, vs, dims=dims, n_iterations=2, u_first=u_first, return_weights=return_weights
    )
    assert sigma.shape == (len(weights),) and len(normalized) == return_weights
    for i, alone in enumerate(zip(weights, us, vs, dims, strict=True)):
        want = ops.power_iteration(
            *alone[:3], dim=alone[3], n_iterations=2, u_first=u_first, return_weight=return_weights
        )
        assert_same((sigma[i], new_us[i], new_vs[i], *(w[i] for w in normalized)), want, backend)


def test_the_order_of_the_layers_does_not_matter(backend, backend_device):
    weights, us, vs, dims = network(device=backend_device)
    sigma, *_, normalized = ops.power_iteration_multi(weights, us, vs, dims=dims, return_weights=True)
    backwards = [values[::-1] for values in (weights, us, vs)]
    flipped, *_, flipped_weights = ops.power_iteration_multi(*backwards, dims=dims[::-1], return_weights=True)
    assert_same((sigma, *normalized), (flipped.flip(0), *flipped_weights[::-1]), backend)


def test_a_layer_may_come_twice_and_a_bad_one_spoils_no_other(backend, backend_device):
    weight, u, v = layer(9, 6, device=backend_device)
    bad = torch.full_like(weight, torch.nan)
    sigma, new_us, new_vs = ops.power_iteration_multi([weight, bad, weight], [u, u, u], [v, v, v])
    assert sigma[1].isnan() and torch.equal(new_us[1], u) and torch.equal(new_vs[1], v)
    assert sigma[0] == sigma[2] and torch.equal(new_us[0], new_us[2]) and torch.equal(new_vs[0], new_vs[2])
    assert_same((sigma[0], new_us[0], new_vs[0]), ops.power_iteration(weight, u, v), backend)


def test_lists_tuples_and_parameters_are_taken(backend_device):
    weight, u, v = layer(5, 3, device=backend_device)
    parameter = torch.nn.Parameter(weight)
    want, *_ = ops.power_iteration(weight, u, v)
    for sequence in (list, tuple):
        sigma, us, vs = ops.power_iteration_multi(sequence([parameter]), sequence([u]), sequence([v]))
        assert sigma.item() == want.item() and len(us) == len(vs) == 1


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is one thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_bits_at_one_and_two_threads_and_again(dtype, backend, backend_device, two_threads):
    layers = [layer(*shape, dtype=dtype, device=backend_device) for shape in ((301, 1003), (3, 5), (1025, 64), (1, 9))]
    layers.append(layer(64, 60, 3, 3, dim=1, dtype=dtype, device=backend_device))
    weights, us, vs = (list(tensors) for tensors in zip(*layers, strict=True))
    for u_first in (False, True):
        runs = []
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            leaves = [w.detach().requires_grad_() for w in weights]
            sigma, new_us, new_vs, normalized = ops.power_iteration_multi(
                leaves, us, vs, n_iterations=2, dims=[0, 0, 0, 0, 1], u_first=u_first, return_weights=True
            )
            grads = torch.autograd.grad([sigma.sum(), *normalized], leaves, [None, *weights])
            runs.append((sigma, *new_us, *new_vs, *normalized, *grads))
        assert_same(runs[1], runs[0], backend)
        assert_same(runs[2], runs[0], backend)


# ---- errors ----------------------------------------------------------------------------------------------------------

W, U, V = torch.zeros(3, 4), torch.zeros(3), torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.power_iteration([[1.0]], U, V), TypeError, "weight, u and v must be torch.Tensors"),
        (lambda: ops.power_iteration(W, None, V), TypeError, "weight, u and v must be torch.Tensors"),
        (lambda: ops.power_iteration(U, U, V), ValueError, r"weight must have at least 2 dimensions, .* got \(3,\)"),
        (lambda: ops.power_iteration(W, U, V, dim=2), ValueError, r"2 among them, got \(3, 4\)"),
        (lambda: ops.power_iteration(W, U, V, dim=-3), ValueError, r"-3 among them, got \(3, 4\)"),
        (
            lambda: ops.power_iteration(W, V, U),
            ValueError,
            r"u must be \(3,\) and v \(4,\) for a weight \(3, 4\) .* dimension 0, got \(4,\) and \(3,\)",
        ),
        (lambda: ops.power_iteration(W, U, V, dim=1), ValueError, r"u must be \(4,\) and v \(3,\)"),
        (lambda: ops.power_iteration(W, U[:, None], V), ValueError, r"u must be \(3,\) .* got \(3, 1\)"),
        (lambda: ops.power_iteration(W[:0], U[:0], U), ValueError, r"u must be \(0,\) and v \(4,\) .* got \(0,\) and"),
        (
            lambda: ops.power_iteration(W, U, V, n_iterations=-1),
            ValueError,
            "n_iterations must not be negative, got -1",
        ),
        (lambda: ops.power_iteration(W, U, V, eps=0.0), ValueError, "eps must be positive, got 0.0"),
        (lambda: ops.power_iteration(W, U, V, eps=-1e-9), ValueError, "eps must be positive, got -1e-09"),
        (lambda: ops.power_iteration(W, U, V, eps=float("nan")), ValueError, "eps must be positive, got nan"),
        (lambda: ops.power_iteration_multi([], [], []), ValueError, "expected at least one weight, got none"),
        (
            lambda: ops.power_iteration_multi([W, W], [U], [V, V]),
            ValueError,
            "weights, us, vs and dims must be equally many, got 2, 1, 2 and 2",
        ),
        (
            lambda: ops.power_iteration_multi([W], [U], [V], dims=[0, 0]),
            ValueError,
            "must be equally many, got 1, 1, 1 and 2",
        ),
        (
            lambda: ops.power_iteration_multi([W, W.double()], [U, U], [V, V]),
            ValueError,
            "one dtype and one device, got torch.float32 on cpu and torch.float64 on cpu",
        ),
        (
            lambda: ops.power_iteration_multi([W, W.to("meta")], [U, U], [V, V]),
            ValueError,
            "one dtype and one device, got torch.float32 on cpu and torch.float32 on meta",
        ),
        (lambda: ops.power_iteration_multi([W, W], [U, V], [V, U]), ValueError, r"got \(4,\) and \(3,\)"),
        (lambda: ops.power_iteration_multi([W], [U], [V], n_iterations=-2), ValueError, "must not be negative, got -2"),
        (lambda: ops.power_iteration_multi([W], [U], [V], eps=0.0), ValueError, "eps must be positive, got 0.0"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, error, sentence):
    with pytest.raises(error, match=f"power_iteration: .*{sentence}"):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_a_weight_or_a_vector_that_is_not_floating_point_is_an_error(dtype, backend, backend_device):
    if not backend.startswith("cpu-"):
        pytest.skip("the compiled kernels say it")
    weight, u, v = layer(3, 4, device=backend_device)
    for wrong in ((weight.to(dtype), u, v), (weight, u.to(dtype), v), (weight, u, v.to(dtype))):
        with pytest.raises(RuntimeError, match=f"power_iteration: .* floating point .* got .*{dtype}"):
            ops.power_iteration(*wrong)


@pytest.mark.skipif(INTERPRETED or not Path("/proc/self/statm").exists(), reason="counts the pages of a Linux process")
def test_memory_does_not_grow_from_call_to_call(two_threads):
    """Threads hand each other the memory for their sums."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    torch.set_num_threads(2)
    weights = [torch.ones(128, 300) for _ in range(12)]
    us, vs = [torch.ones(128)] * 12, [torch.ones(300)] * 12
    for _ in range(200):
        ops.power_iteration_multi(weights, us, vs, u_first=True)
    before = resident()
    for _ in range(800):
        ops.power_iteration_multi(weights, us, vs, u_first=True)
    assert resident() - before < 8 << 20
