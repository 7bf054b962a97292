"""The Triton power iteration launchers against the definition in float64, written out here."""

import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from pygen.triton_kernels import _common  # noqa: E402
from pygen.triton_kernels import power_iteration as kernels  # noqa: E402
from pygen.triton_kernels.power_iteration import power_iteration, power_iteration_backward  # noqa: E402

# The interpreter's numpy evaluates both arms of a choice and warns of the infinities in the one not taken.
pytestmark = [pytest.mark.usefixtures("device", "poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-12
# Relative to the length of what is compared. Sums of a few hundred float32 products, twice per step, in another order;
# of weights that have 16 bits only the result is rounded to 16 bits.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}
ROUNDED = {**TOLERANCE, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# A vector of each kind, less than a tile and more, and the rows of a transposed convolution.
MIXED = [((1, 1), 0), ((1, 9), 0), ((9, 1), 0), ((5, 7), 0), ((63, 65), 0), ((8, 3, 3, 3), 0), ((6, 5, 2, 2), 1)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small matrices have many blocks of each phase, and more of them than are added at once."""
    for name, value in {"ROW_TILE": (4, 8), "COLUMN_TILE": (8, 4), "PARTS": 4, "CHUNK": 8, "ELEMENTS": 64}.items():
        monkeypatch.setattr(kernels, name, value)
    if DEVICE == "cpu":
        # Part of a compiled kernel.
        monkeypatch.setattr(kernels, "SUMS", triton.language.constexpr(2))
    plans = (kernels._forward_plan, kernels._backward_plan)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def layers(shapes_and_dims, dtype=torch.float32, vector_dtype=None):
    """(weights, us, vs, dims) with vectors of length 1."""
    weights = [normal(*shape, seed=i, dtype=dtype) for i, (shape, _) in enumerate(shapes_and_dims)]
    dims = [dim for _, dim in shapes_and_dims]
    rows = [w.size(d) for w, d in zip(weights, dims, strict=True)]
    vector_dtype = vector_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    columns = [
        math.prod(w.shape[: d % w.dim()]) * math.prod(w.shape[d % w.dim() + 1 :])
        for w, d in zip(weights, dims, strict=True)
    ]
    vectors = ([(r, 1) for r in rows], [(c, 2) for c in columns])
    us, vs = ([torch.nn.functional.normalize(normal(n, seed=s).double(), dim=0) for n, s in v] for v in vectors)
    return weights, [u.to(vector_dtype) for u in us], [v.to(vector_dtype) for v in vs], dims


def matrix(weight, dim):
    return np.moveaxis(weight.detach().cpu().double().numpy(), dim, 0).reshape(weight.shape[dim], -1)


def iterated(weight, u, v, dim, n_iterations, u_first):
    """(sigma, u, v) by the definition."""
    w, u, v = matrix(weight, dim), u.cpu().double().numpy(), v.cpu().double().numpy()
    for _ in range(n_iterations):
        if u_first:
            u = w @ v / max(np.linalg.norm(w @ v), EPS)
        v = w.T @ u / max(np.linalg.norm(w.T @ u), EPS)
        if not u_first:
            u = w @ v / max(np.linalg.norm(w @ v), EPS)
    return u @ w @ v, u, v


def assert_near(got, want, tolerance, length=None):
    got, want = got.detach().cpu().double().numpy(), np.asarray(want)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * (np.linalg.norm(want) if length is None else length)


def assert_iterates(given, n_iterations, u_first, return_weights=True):
    weights, us, vs, dims = given
    results = power_iteration(weights, us, vs, dims, n_iterations, EPS, u_first, return_weights)
    sigma, normalized, new_us, new_vs = results
    dtype = weights[0].dtype
    assert sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert len(normalized) == (len(weights) if return_weights else 0)
    tolerance, rounded = TOLERANCE[sigma.dtype], ROUNDED[us[0].dtype]
    for i, (weight, u, v, dim) in enumerate(zip(weights, us, vs, dims, strict=True)):
        want, want_u, want_v = iterated(weight, u, v, dim, n_iterations, u_first)
        # sigma is a sum whose terms are as long as the matrix: without a step it may be near 0.
        length = np.linalg.norm(matrix(weight, dim))
        assert_near(sigma[i], want, tolerance, length)
        assert_near(new_us[i], want_u, rounded)
        assert_near(new_vs[i], want_v, rounded)
        assert new_us[i].dtype == u.dtype and new_vs[i].dtype == v.dtype
        if return_weights:
            assert normalized[i].dtype == weight.dtype and normalized[i].is_contiguous()
            exact = weight.cpu().double() / sigma[i].cpu().double()
            assert_near(normalized[i], exact.numpy(), ROUNDED[dtype])
    return results


def flat(results):
    for result in results:
        yield from result if isinstance(result, list) else [result]


def assert_same_bits(left, right):
    for a, b in zip(flat(left), flat(right), strict=True):
        assert torch.equal(a, b)


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("u_first", [True, False])
@pytest.mark.parametrize("n_iterations", [0, 1, 3])
def test_layers_of_mixed_sizes_in_one_call(n_iterations, u_first):
    assert_iterates(layers(MIXED if n_iterations == 1 else MIXED[3:]), n_iterations, u_first)


@pytest.mark.parametrize(("dtype", "u_first"), [(torch.float64, True), (torch.bfloat16, False), (torch.float16, True)])
def test_every_dtype(dtype, u_first):
    assert_iterates(layers(MIXED[-3:], dtype), 1, u_first)


@pytest.mark.parametrize("vector_dtype", [torch.bfloat16, torch.float64])
def test_vectors_of_another_dtype_come_back_in_it(vector_dtype):
    given = layers(MIXED[-2:], vector_dtype=vector_dtype)
    _, _, new_us, new_vs = power_iteration(*given, 1, EPS, True, False)
    for weight, u, v, dim, new_u, new_v in zip(*given, new_us, new_vs, strict=True):
        _, want_u, want_v = iterated(weight, u, v, dim, 1, True)
        assert new_u.dtype == new_v.dtype == vector_dtype
        # Computed in float32, whatever holds the result.
        assert_near(new_u, want_u, max(2e-6, torch.finfo(vector_dtype).eps))
        assert_near(new_v, want_v, max(2e-6, torch.finfo(vector_dtype).eps))


@pytest.mark.parametrize("u_first", [True, False])
def test_many_blocks_of_every_phase(u_first, small_tiles):
    assert_iterates(layers([((14, 21), 0), ((3, 9, 4), 1), ((2, 3, 7), -1)]), 2, u_first)


@pytest.mark.parametrize("u_first", [True, False])
def test_a_matrix_larger_than_a_tile(u_first):
    assert_iterates(layers([((130, 257), 0), ((7, 1100), 0)]), 1, u_first)


def test_a_few_steps_find_the_largest_singular_value_of_many():
    weights, us, vs, dims = layers([((9, 6), 0)])
    weights[0] += 10 * torch.outer(normal(9), normal(6))
    sigma, _, _, _ = power_iteration(weights, us, vs, dims, 4, EPS, False, False)
    assert_near(sigma[0], np.linalg.norm(matrix(weights[0], 0), 2), 2e-6)


def test_what_is_computed_for_a_layer_does_not_depend_on_the_others(small_tiles):
    given = layers([((5, 7), 0), ((13, 17), 0)])
    together = power_iteration(*given, 1, EPS, True, True)
    for i in range(2):
        alone = power_iteration(*([part[i]] for part in given), 1, EPS, True, True)
        assert_same_bits(alone, [together[0][i : i + 1], *([part[i]] for part in together[1:])])


def test_more_layers_than_the_smallest_table():
    assert_iterates(layers([((2, 3), 0)] * 9), 0, True, return_weights=False)


def test_the_same_bits_again_and_inputs_are_left_alone():
    given = layers(MIXED[4:])
    before = [[t.clone() for t in part] for part in given[:3]]
    assert_same_bits(power_iteration(*given, 1, EPS, True, True), power_iteration(*given, 1, EPS, True, True))
    assert_same_bits(given[:3], before)


def test_strides_do_not_change_a_bit():
    (weight,), (u,), (v,), _ = layers([((10, 3, 4, 2), 1)])
    plain = power_iteration([weight], [u], [v], [1], 1, EPS, True, True)
    channels_last = weight.to(memory_format=torch.channels_last)
    every_second = torch.stack((u, u), -1)[:, 0]
    assert not channels_last.is_contiguous() and not every_second.is_contiguous()
    strided = power_iteration([channels_last], [every_second], [v], [1], 1, EPS, True, True)
    assert_same_bits(plain, strided)
    assert all(t.is_contiguous() for t in flat(strided))


@pytest.mark.parametrize("u_first", [True, False])
def test_indices_of_64_bits_find_the_same_elements(u_first, monkeypatch, small_tiles):
    given = layers([((6, 5, 3), 1), ((9, 10), 0)])
    want = power_iteration(*given, 1, EPS, u_first, True)
    grads = [normal(*w.shape, seed=9) for w in given[0]]
    want_grads = power_iteration_backward(want[0], grads, given[0], want[0], *want[2:], given[3], EPS)
    monkeypatch.setattr(kernels, "LARGEST_INDEX", 0)
    kernels._forward_plan.cache_clear()
    kernels._backward_plan.cache_clear()
    assert_same_bits(power_iteration(*given, 1, EPS, u_first, True), want)
    again = power_iteration_backward(want[0], grads, given[0], want[0], *want[2:], given[3], EPS)
    assert_same_bits(again, want_grads)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("u_first", [True, False])
def test_a_matrix_of_zeros_keeps_its_vectors_and_gives_no_nan(u_first):
    (weight,), us, vs, dims = layers([((5, 7), 0)])
    sigma, normalized, new_us, new_vs = power_iteration([weight * 0], us, vs, dims, 3, EPS, u_first, True)
    assert sigma.item() == 0 and (normalized[0] == 0).all()
    assert_same_bits((new_us, new_vs), (us, vs))


@pytest.mark.parametrize("u_first", [True, False])
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_squares_that_float32_cannot_hold_do_not_matter(scale, u_first):
    weights, us, vs, dims = layers([((12, 9), 0)])
    plain = power_iteration(weights, us, vs, dims, 2, 1e-300, u_first, True)
    scaled = power_iteration([w * scale for w in weights], us, vs, dims, 2, 1e-300, u_first, True)
    # A power of two changes exponents alone.
    assert_same_bits((plain[0] * scale, *plain[1:]), scaled)


@pytest.mark.parametrize("u_first", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_layer_and_leaves_its_vectors(value, u_first):
    weights, us, vs, dims = layers([((5, 7), 0), ((4, 3), 0)])
    clean = power_iteration(weights, us, vs, dims, 2, EPS, u_first, True)
    weights[0][2, 3] = value
    sigma, normalized, new_us, new_vs = power_iteration(weights, us, vs, dims, 2, EPS, u_first, True)
    assert not sigma[0].isfinite()
    assert_same_bits((new_us[0], new_vs[0]), (us[0], vs[0]))
    assert_same_bits((sigma[1:], normalized[1], new_us[1], new_vs[1]), (clean[0][1:], *(part[1] for part in clean[1:])))


def test_a_first_vector_that_has_no_product_is_kept_and_the_second_is_updated_all_the_same():
    weight = torch.diag(torch.tensor([3.0, 1.0, 0.0])).to(DEVICE)
    u = torch.tensor([0.6, 0.8, 0.0], device=DEVICE)
    v = torch.tensor([0.0, 0.0, 1.0], device=DEVICE)
    # The first step has W v = 0 and so u as it was; those behind it are ordinary.
    want_u, want_v = np.array([0.6, 0.8, 0]), np.array([1.8, 0.8, 0])
    for n_iterations in (1, 2, 3):
        want_v = want_v / np.linalg.norm(want_v)
        sigma, _, (new_u,), (new_v,) = power_iteration([weight], [u], [v], [0], n_iterations, EPS, True, False)
        assert_near(new_u, want_u, 2e-6)
        assert_near(new_v, want_v, 2e-6)
        assert_near(sigma[0], want_u @ (np.array([3, 1, 0]) * want_v), 2e-6)
        want_u = np.array([3, 1, 0]) * want_v
        want_u /= np.linalg.norm(want_u)
        want_v = np.array([3, 1, 0]) * want_u


def test_norms_below_eps_are_divided_by_eps():
    weight = torch.full((2, 2), 2.0**-3, device=DEVICE)
    u = v = torch.tensor([1.0, 0.0], device=DEVICE)
    sigma, (normalized,), (new_u,), (new_v,) = power_iteration([weight], [u], [v], [0], 1, 0.5, True, True)
    # W v = (1/8, 1/8), shorter than 1/2; W^T u = (1/16, 1/16), too; sigma = 1/64 is divided by as 1/2.
    assert new_u.tolist() == [0.25, 0.25] and new_v.tolist() == [0.125, 0.125]
    assert sigma.item() == 2.0**-6 and (normalized == 0.25).all()


@pytest.mark.parametrize(("shape", "dim"), [((0, 3), 0), ((3, 0), 0), ((2, 0, 4), 1), ((2, 4, 0), 1)])
def test_weights_without_elements(shape, dim):
    for u_first in (True, False):
        given = layers([(shape, dim), ((2, 3), 0)])
        sigma, normalized, new_us, new_vs = power_iteration(*given, 1, EPS, u_first, True)
        assert sigma[0] == 0 and sigma[1] != 0 and normalized[0].shape == shape
        assert_same_bits((new_us[0], new_vs[0]), (given[1][0], given[2][0]))
        grads = power_iteration_backward(sigma, normalized, given[0], sigma, new_us, new_vs, given[3], EPS)
        assert [g.shape for g in grads] == [w.shape for w in given[0]] and grads[1].isfinite().all()


def test_wrong_arguments_are_refused_with_a_sentence():
    weights, us, vs, dims = layers([((5, 7), 0)])
    with pytest.raises(RuntimeError, match=r"u must be \(7,\) and v \(5,\) for a weight \(5, 7\) with its rows in dim"):
        power_iteration(weights, us, vs, [1], 1, EPS, True, False)
    with pytest.raises(RuntimeError, match="must be equally many, and one at least, got 1, 0, 1, 1"):
        power_iteration(weights, [], vs, dims, 1, EPS, True, False)
    with pytest.raises(
        RuntimeError, match="must be floating point .* got torch.float32, torch.int64 and torch.float32"
    ):
        power_iteration(weights, [u.long() for u in us], vs, dims, 1, EPS, True, False)
    with pytest.raises(
        RuntimeError, match="one dtype, and all tensors one device, got torch.float32 on .* and torch.float6"
    ):
        power_iteration([weights[0], weights[0].double()], us * 2, vs * 2, dims * 2, 1, EPS, True, False)
    with pytest.raises(RuntimeError, match=r"grads must be empty or like their weights, got \(7, 5\) for \(5, 7\)"):
        power_iteration_backward(None, [weights[0].mT], weights, us[0][:1], us, vs, dims, EPS)
    with pytest.raises(RuntimeError, match=r"sigma must be \(1,\) beside the weights, got \(2,\)"):
        power_iteration_backward(None, [], weights, us[0][:2], us, vs, dims, EPS)


# ---- backward --------------------------------------------------------------------------------------------------------


def gradient(grad_sigma, grad, weight, sigma, u, v, dim):
    """G / sigma + (g - <G, W> / sigma^2) u v^T by the definition, as a matrix."""
    u, v, sigma = u.cpu().double().numpy(), v.cpu().double().numpy(), sigma.item()
    along, result = 0.0 if grad_sigma is None else grad_sigma.item(), 0.0
    if grad is not None and grad.numel():
        along -= (matrix(grad, dim) * matrix(weight, dim)).sum() / sigma**2
        result = matrix(grad, dim) / sigma
    return result + along * np.outer(u, v)


def assert_gradients(given, grad_sigma, grads):
    weights, us, vs, dims = given
    sigma = torch.stack([w.abs().sum(dtype=torch.float64).sqrt() for w in weights])
    sigma = sigma.to(torch.float64 if weights[0].dtype == torch.float64 else torch.float32)
    results = power_iteration_backward(grad_sigma, grads, weights, sigma, us, vs, dims, EPS)
    for i, (result, weight) in enumerate(zip(results, weights, strict=True)):
        assert result.shape == weight.shape and result.dtype == weight.dtype and result.is_contiguous()
        parts = (grad_sigma if grad_sigma is None else grad_sigma[i], grads[i] if grads else None)
        want = gradient(*parts, weight, sigma[i], us[i], vs[i], dims[i])
        got = torch.from_numpy(matrix(result, dims[i]))
        assert_near(got, want, ROUNDED[weight.dtype])
    return results


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_both_results(dtype):
    given = layers(MIXED, dtype)
    grad_sigma = normal(len(MIXED), dtype=given[1][0].dtype)
    assert_gradients(given, grad_sigma, [normal(*w.shape, seed=7, dtype=dtype) for w in given[0]])


def test_gradients_of_either_result_alone():
    given = layers(MIXED[3:])
    grads = [normal(*w.shape, seed=7) for w in given[0]]
    assert_gradients(given, None, grads)
    assert_gradients(given, normal(len(grads)), [])
    absent = torch.empty(0, device=DEVICE)
    assert_gradients(given, normal(len(grads)), [absent, *grads[1:-1], absent])
    assert_gradients(given, normal(len(grads)), [absent] * len(grads))


def test_gradients_of_many_blocks(small_tiles):
    given = layers([((23, 17), 0), ((3, 2), 0), ((11, 5, 7), 1), ((4, 3, 9), -1)])
    assert_gradients(given, normal(4), [normal(*w.shape, seed=7) for w in given[0]])


def test_strides_of_incoming_gradients_do_not_change_a_bit():
    given = layers([((6, 5), 0)])
    grad, sigma = normal(6, 5, seed=7), normal(1)
    strided = grad.mT.contiguous().mT
    assert_same_bits(assert_gradients(given, sigma.expand(1), [strided]), assert_gradients(given, sigma, [grad]))
    ones = torch.ones(1, device=DEVICE)
    assert_same_bits(
        assert_gradients(given, None, [ones.expand(6, 5)]), assert_gradients(given, None, [ones.repeat(6, 5)])
    )


def test_a_sigma_below_eps_is_no_part_of_the_gradient():
    (weight,), us, vs, dims = layers([((4, 3), 0)])
    grad, sigma = normal(4, 3, seed=7), torch.full((1,), 1e-3, device=DEVICE)
    (result,) = power_iteration_backward(None, [grad], [weight], sigma, us, vs, dims, 0.5)
    assert torch.equal(result, grad / 0.5)


# ---- launches --------------------------------------------------------------------------------------------------------


def test_all_layers_take_one_launch(monkeypatch):
    """Where a GPU's programs can wait for one another; phase by phase there are as many launches as phases."""
    given = [[t.to("meta") if isinstance(t, torch.Tensor) else t for t in part] for part in layers(MIXED)]
    launches = []
    monkeypatch.setattr(_common, "recorder", launches)
    for together, n_iterations, count in ((True, 3, 1), (False, 3, 7), (True, 0, 1), (False, 0, 2)):
        monkeypatch.setattr(kernels, "PHASES_IN_ONE_LAUNCH", together)
        launches.clear()
        sigma, normalized, us, vs = power_iteration(*given, n_iterations, EPS, True, True)
        assert len(launches) == count
        launches.clear()
        power_iteration_backward(sigma, normalized, given[0], sigma, us, vs, given[3], EPS)
        assert len(launches) == (1 if together else 2)


@pytest.mark.parametrize("u_first", [True, False])
def test_one_launch_and_phase_by_phase_give_the_same_bits(u_first, monkeypatch, small_tiles):
    """Under the interpreter the one launch has one program, which takes all blocks and waits for nobody."""
    given = layers([((13, 21), 0), ((3, 5, 4), 1)])
    grads = [normal(*w.shape, seed=7) for w in given[0]]
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernels, "_counter", lambda like: counter)
    results = {}
    for together in (True, False):
        monkeypatch.setattr(kernels, "PHASES_IN_ONE_LAUNCH", together)
        if DEVICE == "cpu":
            monkeypatch.setattr(kernels, "TOGETHER", {})
            monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 1)
        forward = power_iteration(*given, 2, EPS, u_first, True)
        backward = power_iteration_backward(forward[0], grads, given[0], forward[0], *forward[2:], given[3], EPS)
        results[together] = [*flat(forward), *backward]
    assert_same_bits(results[True], results[False])
    # Five barriers, after each of which the counter is ready for the next launch, of however many programs.
    assert counter.item() % kernels.TURN.value == 0 and counter.item() // kernels.TURN.value % 2 == 1


def test_a_table_written_by_launches_is_the_table():
    values = (0, 1, 2**62 + 1, -5, 7 * 2**40, *range(100))
    table = kernels._written_table(values, torch.device(DEVICE))
    assert table.dtype == torch.int64 and tuple(table.tolist()) == values


def test_a_cuda_graph_replays_with_new_values():
    if DEVICE == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    weights, us, vs, dims = layers([((130, 257), 0), ((64, 16, 4, 4), 1), ((512, 2000), 0)])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        power_iteration(weights, us, vs, dims, 2, EPS, True, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = power_iteration(weights, us, vs, dims, 2, EPS, True, True)
    for _ in range(3):
        for weight in weights:
            weight.mul_(0.5).add_(0.01)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, power_iteration(weights, us, vs, dims, 2, EPS, True, True))


def test_launches_of_many_streams_at_once_wait_for_their_own_programs_only():
    if DEVICE == "cpu":
        pytest.skip("the interpreter's programs do not wait")
    given = layers([((1024, 1024), 0), ((512, 4608), 0)])
    want = power_iteration(*given, 3, EPS, True, True)
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 20:
        with torch.cuda.stream(stream):
            results.append(power_iteration(*given, 3, EPS, True, True))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, want)
