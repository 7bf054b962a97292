"""power_iteration under torch's transformations: gradients, compilation, export, vmap, autocast, meta."""

import pytest
import torch

from harness import INTERPRETED
from ops.power_iteration_data import FLOATS, array, flat, layer, true_iteration, true_outputs
from ops.test_contract import LAYOUTS
from pygen import ops

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="traces with fake tensors, or hundreds of launches")
DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else FLOATS
typed = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = [((1, 1), 0), ((1, 7), 0), ((7, 1), 0), ((5, 3), 1), ((8, 3, 3, 3), 0), ((3, 8, 2, 2), 1), ((9, 5), -1)]
if not INTERPRETED:  # where a launch takes a tenth of a second
    SHAPES += [((64, 27), 0), ((63, 65), 0), ((130, 257), 0), ((24, 40, 3, 3), 1)]


def iterated(*shape, dim=0, dtype=torch.float32, device="cpu", seed=0):
    """As `layer`, with vectors after three steps: of random ones sigma nearly cancels. They are of float32 for 16-bit
    weights, so that the graph keeps the very vectors that sigma is of."""
    vectors = torch.promote_types(dtype, torch.float32)
    weight, u, v = layer(*shape, dim=dim, dtype=dtype, vectors=vectors, seed=seed)
    _, new_u, new_v = true_iteration(weight, u, v, n_iterations=3, dim=dim)
    return weight.to(device), *(torch.as_tensor(x).to(device, before.dtype) for x, before in ((new_u, u), (new_v, v)))


def noise(like, seed=1):
    """A gradient for each output."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in like]


def assert_close(got, want, dtype, what=""):
    """Relative by the norm: 32 epsilon of the arithmetic, for the two terms of the gradient nearly cancel in a matrix
    of one row or column, and two roundings of the type of the result."""
    eps = torch.finfo(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype).eps
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape
    allowed = max(32 * eps, 2 * torch.finfo(dtype).eps)
    assert (got - want).norm() <= allowed * want.norm().clamp_min(0.1), what


def true_gradient(weight, u, v, dim, grad_sigma, grad_weight):
    """Of <outputs, gradients> in float64; u and v are constants."""
    leaf = weight.detach().cpu().double().requires_grad_()
    outputs, grads = true_outputs(leaf, u, v, dim), (grad_sigma, grad_weight)
    used = [(y, g.cpu().double()) for y, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([y for y, _ in used], leaf, [g for _, g in used])[0]


# ---- gradients -------------------------------------------------------------------------------------------------------


@typed
@pytest.mark.parametrize("used", ["sigma", "weight", "both"])
def test_gradients_are_those_of_the_float64_formula(used, dtype, backend_device, poisoned_memory):
    for shape, dim in SHAPES:
        weight, u, v = iterated(*shape, dim=dim, dtype=dtype, device=backend_device)
        weight.requires_grad_()
        sigma, new_u, new_v, normalized = ops.power_iteration(weight, u, v, n_iterations=1, dim=dim, return_weight=True)
        assert not new_u.requires_grad and not new_v.requires_grad
        grads = noise((sigma, normalized))
        outputs = {"sigma": [sigma], "weight": [normalized], "both": [sigma, normalized]}[used]
        (got,) = torch.autograd.grad(outputs, weight, {"sigma": grads[:1], "weight": grads[1:], "both": grads}[used])
        want = true_gradient(
            weight, new_u, new_v, dim, grads[0] if used != "weight" else None, grads[1] if used != "sigma" else None
        )
        assert got.dtype == dtype and got.is_contiguous()
        assert_close(got, want, dtype, f"{shape}, {dim}")


def test_the_gradient_of_sigma_is_u_times_v_and_the_steps_have_none(backend_device):
    weight, u, v = layer(6, 9, device=backend_device)
    weight.requires_grad_()
    for n_iterations in (0, 1, 5):
        for u_first in (False, True):
            sigma, new_u, new_v = ops.power_iteration(weight, u, v, n_iterations=n_iterations, u_first=u_first)
            (got,) = torch.autograd.grad(sigma, weight)
            torch.testing.assert_close(got, torch.outer(new_u, new_v))


def test_without_a_request_for_the_weight_the_gradient_is_that_of_sigma_alone(backend_device):
    weight, u, v = iterated(4, 5, 3, device=backend_device)
    weight.requires_grad_()
    without = torch.autograd.grad(ops.power_iteration(weight, u, v)[0].square(), weight)[0]
    with_it = torch.autograd.grad(ops.power_iteration(weight, u, v, return_weight=True)[0].square(), weight)[0]
    torch.testing.assert_close(without, with_it)


def network(device, dtype=torch.float32):
    layers = [iterated(*shape, dim=dim, dtype=dtype, device=device, seed=i) for i, (shape, dim) in enumerate(SHAPES)]
    weights, us, vs = (list(tensors) for tensors in zip(*layers, strict=True))
    return [w.requires_grad_() for w in weights], us, vs, [dim for _, dim in SHAPES]


@typed
@pytest.mark.parametrize("sigma_used", [False, True], ids=["weights_alone", "with_sigma"])
def test_layers_of_which_nobody_asked_anything_have_no_gradient_and_the_others_theirs(
    sigma_used, dtype, backend_device, poisoned_memory
):
    weights, us, vs, dims = network(backend_device, dtype)
    sigma, us, vs, normalized = ops.power_iteration_multi(weights, us, vs, dims=dims, return_weights=True)
    used = [0, 2, 4, 5]
    grads = noise(normalized)
    outputs = [normalized[i] for i in used] + ([sigma] if sigma_used else [])
    incoming = [grads[i] for i in used] + ([torch.ones_like(sigma)] if sigma_used else [])
    found = torch.autograd.grad(outputs, weights, incoming, allow_unused=True)
    for i, (got, weight, u, v, dim) in enumerate(zip(found, weights, us, vs, dims, strict=True)):
        if i not in used and not sigma_used:
            assert got is None
            continue
        one = torch.ones((), dtype=torch.float64)
        want = true_gradient(weight, u, v, dim, one if sigma_used else None, grads[i] if i in used else None)
        assert got.dtype == dtype
        assert_close(got, want, dtype, f"layer {i}")


def test_some_weights_may_not_require_a_gradient(backend_device):
    weights, us, vs, dims = network(backend_device)
    frozen = [w.detach() if i % 2 else w for i, w in enumerate(weights)]
    leaves = frozen[::2]
    sigma, _, _, normalized = ops.power_iteration_multi(frozen, us, vs, dims=dims, return_weights=True)
    all_of_them = ops.power_iteration_multi(weights, us, vs, dims=dims, return_weights=True)
    grads = [torch.ones_like(sigma), *noise(normalized)]
    got = torch.autograd.grad([sigma, *normalized], leaves, grads)
    want = torch.autograd.grad([all_of_them[0], *all_of_them[3]], weights, grads)
    for g, w in zip(got, want[::2], strict=True):
        torch.testing.assert_close(g, w)


def test_one_sigma_of_many_touches_its_own_layer_only(backend_device):
    weights, us, vs, dims = network(backend_device)
    sigma, us, vs = ops.power_iteration_multi(weights, us, vs, dims=dims)
    found = torch.autograd.grad(sigma[4], weights, allow_unused=True)
    for i, got in enumerate(found):
        if i == 4:
            torch.testing.assert_close(flat(got), torch.outer(us[4], vs[4]))
        else:
            assert got is None or not got.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_incoming_gradients_and_weights_do_not_change_the_gradient(layout, dtype, backend, backend_device):
    for shape, dim in (((4, 6, 2, 5), 0), ((11, 7), 0), ((4, 6, 2, 5), 1))[2 * INTERPRETED :]:
        weight, u, v = iterated(*shape, dim=dim, dtype=dtype, device=backend_device)
        grads = noise((torch.ones(()), weight))
        found = []
        for change in (lambda x: x, LAYOUTS[layout]):
            leaf = change(weight).detach().requires_grad_()
            sigma, _, _, normalized = ops.power_iteration(leaf, u, v, dim=dim, return_weight=True)
            incoming = grads[0].to(sigma), change(grads[1])
            found.append(torch.autograd.grad((sigma, normalized), leaf, incoming)[0])
        if backend == "reference":
            assert_close(found[1], found[0], dtype)
        else:
            assert torch.equal(*found)


def test_an_expanded_gradient_equals_its_copy(backend_device):
    weight, u, v = iterated(6, 5, device=backend_device)
    weight.requires_grad_()
    *_, normalized = ops.power_iteration(weight, u, v, return_weight=True)
    flat_grad = torch.ones((), device=backend_device).expand(6, 5)
    got = torch.autograd.grad(normalized, weight, flat_grad, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(normalized, weight, flat_grad.contiguous()))


def test_where_eps_divides_the_gradient_goes_through_it_alone(backend_device):
    weight, u, v = iterated(6, 5, device=backend_device)
    weight.requires_grad_()
    *_, normalized = ops.power_iteration(weight, u, v, n_iterations=0, eps=100.0, return_weight=True)
    (grad,) = noise([normalized])
    torch.testing.assert_close(torch.autograd.grad(normalized, weight, grad)[0], grad / 100)


@typed
def test_the_gradient_at_a_matrix_of_zeros_is_finite(dtype, backend_device):
    _, u, v = iterated(4, 6, dtype=dtype, device=backend_device)
    zeros = torch.zeros(4, 6, dtype=dtype, device=backend_device, requires_grad=True)
    sigma, _, _, normalized = ops.power_iteration(zeros, u, v, eps=1e-4, return_weight=True)
    (got,) = torch.autograd.grad((sigma, normalized), zeros, (torch.ones_like(sigma), torch.ones_like(normalized)))
    assert_close(got, 1e4 + torch.outer(u, v).double(), dtype)


def test_numbers_near_the_ends_of_their_range_have_finite_gradients(backend_device):
    """sigma^2 is no float32."""
    for scale in (1e-25, 1e25):
        weight, u, v = iterated(6, 5, device=backend_device)
        leaf = (scale * weight).requires_grad_()
        *_, normalized = ops.power_iteration(leaf, u, v, n_iterations=0, eps=1e-38, return_weight=True)
        (grad,) = noise([normalized])
        (got,) = torch.autograd.grad(normalized, leaf, grad)
        # W / sigma does not depend on the scale: its gradient is that of the unscaled weight over the scale.
        assert_close(scale * got.double(), true_gradient(weight, u, v, 0, None, grad), torch.float32)


def test_buffers_may_be_overwritten_with_the_new_vectors_before_the_backward_pass(backend_device):
    weight, u, v = iterated(6, 5, device=backend_device)
    weight.requires_grad_()
    sigma, new_u, new_v = ops.power_iteration(weight, u, v)
    u.copy_(new_u), v.copy_(new_v)
    torch.testing.assert_close(torch.autograd.grad(sigma, weight)[0], torch.outer(new_u, new_v))


def test_empty_weights_have_empty_gradients(backend_device):
    for shape in ((0, 4), (4, 0)):
        weight, u, v = layer(*shape, device=backend_device)
        weight.requires_grad_()
        sigma, *_, normalized = ops.power_iteration(weight, u, v, return_weight=True)
        (got,) = torch.autograd.grad((sigma, normalized), weight, (torch.ones_like(sigma), torch.ones_like(weight)))
        assert got.shape == shape


# ---- derivatives of derivatives --------------------------------------------------------------------------------------


def fixed(u, v, dim=0):
    """(sigma, weight / sigma) as a function of the weight: no steps, for their vectors are constants by definition."""

    def function(weight):
        sigma, _, _, normalized = ops.power_iteration(weight, u, v, n_iterations=0, dim=dim, return_weight=True)
        return sigma, normalized

    return function


@not_interpreted
@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((2, 3, 2), 1)])
def test_gradcheck_and_gradgradcheck(shape, dim, backend_device):
    weight, u, v = iterated(*shape, dim=dim, dtype=torch.float64, device=backend_device)
    weight.requires_grad_()
    for outputs in (slice(1), slice(1, 2), slice(2)):

        def function(w, outputs=outputs):
            return fixed(u, v, dim)(w)[outputs]

        assert torch.autograd.gradcheck(function, weight)
        assert torch.autograd.gradgradcheck(lambda w, f=function: tuple(y.square() for y in f(w)), weight)


@not_interpreted
def test_gradgradcheck_of_layers_together(backend_device):
    layers = [iterated(*s, dtype=torch.float64, device=backend_device) for s in ((2, 3), (3, 1))]
    weights, us, vs = (list(tensors) for tensors in zip(*layers, strict=True))

    def function(*leaves):
        sigma, _, _, normalized = ops.power_iteration_multi(leaves, us, vs, n_iterations=0, return_weights=True)
        return sigma.square(), *normalized

    leaves = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


@not_interpreted
def test_hessian_by_torch_func_equals_that_of_the_formula(backend_device):
    weight, u, v = iterated(2, 3, dtype=torch.float64, device=backend_device)

    def loss(outputs):
        return sum(y.square().sum() for y in outputs) + (outputs[0] * outputs[1]).sum() ** 3

    got = torch.func.jacrev(torch.func.grad(lambda w: loss(fixed(u, v)(w))))(weight)
    want = torch.func.jacrev(torch.func.grad(lambda w: loss(true_outputs_plain(w, u.cpu(), v.cpu()))))(weight.cpu())
    torch.testing.assert_close(got.cpu(), want)


def true_outputs_plain(weight, u, v):
    """`true_outputs` without a question about values, for torch.func."""
    sigma = u @ weight @ v
    return sigma, weight / sigma


def test_forward_mode_is_refused_not_silently_zero(backend_device):
    weight, u, v = layer(3, 4, device=backend_device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        with pytest.raises(NotImplementedError, match="jvp"):
            ops.power_iteration(dual, u, v)


# ---- torch's transformations -----------------------------------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("return_weights", [False, True])
def test_opcheck(return_weights):
    """Of the registrations, which all kernels share."""
    layers = [iterated(4, 3), iterated(2, 3, 2, dim=1)]
    weights, us, vs = (list(tensors) for tensors in zip(*layers, strict=True))
    dims, leaves = [0, 1], [w.requires_grad_() for w in weights]
    torch.library.opcheck(
        torch.ops.pygen.power_iteration.default, (leaves, us, vs, dims, 1, 1e-12, False, return_weights)
    )
    sigma = torch.ones(2, requires_grad=True)
    grads = [g.requires_grad_() for g in noise(weights)] if return_weights else []
    for grad_sigma in (torch.ones(2), None) if return_weights else (torch.ones(2),):
        torch.library.opcheck(
            torch.ops.pygen.power_iteration_backward.default,
            (grad_sigma, grads, leaves, sigma, us, vs, dims, 1e-12),
        )


@not_interpreted
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiles_into_one_graph_with_the_same_gradients(compiler, backend, backend_device):
    if compiler == "inductor" and backend != "reference" and backend_device.type == "cpu" and backend != "cpu-default":
        pytest.skip("compiled once for a reference and once for a kernel")
    weights, us, vs, dims = network(backend_device)
    weights, us, vs, dims = (values[3:7] for values in (weights, us, vs, dims))

    def step(*leaves):
        sigma, new_us, new_vs, normalized = ops.power_iteration_multi(
            [2 * w for w in leaves], us, vs, dims=dims, n_iterations=2, return_weights=True
        )
        return sigma.square().sum() + sum((w**3).sum() for w in normalized), new_us, new_vs

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    (got, *got_vectors), (want, *vectors) = compiled(*weights), step(*weights)
    torch.testing.assert_close((got, got_vectors), (want, vectors))
    torch.testing.assert_close(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights))


@not_interpreted
def test_a_compiled_training_step_keeps_its_buffers_and_is_compiled_once(backend_device):
    """The vectors change from step to step; that must not look like another graph."""
    weight, u, v = layer(6, 5, device=backend_device)
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=compiles)
    def step(weight, u, v):
        sigma, new_u, new_v = ops.power_iteration(weight, u, v)
        with torch.no_grad():
            u.copy_(new_u), v.copy_(new_v)
        return sigma

    eager_u, eager_v = u.clone(), v.clone()
    for _ in range(4):
        got = step(weight, u, v)
        want, eager_u, eager_v = ops.power_iteration(weight, eager_u, eager_v)
        torch.testing.assert_close((got, u, v), (want, eager_u, eager_v))
    assert compiles.frame_count == 1


@not_interpreted
def test_exports(backend_device):
    class Normalized(torch.nn.Module):
        def forward(self, weight, u, v):
            return ops.power_iteration(weight, u, v, return_weight=True)

    tensors = layer(6, 5, device=backend_device)
    exported = torch.export.export(Normalized(), tensors).module()
    torch.testing.assert_close(exported(*tensors), ops.power_iteration(*tensors, return_weight=True))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (2, 1, None), (1, None, 0)], ids=str)
def test_vmap_equals_a_loop(in_dims, backend_device):
    layers = [layer(4, 3, dtype=torch.float64, device=backend_device, seed=i) for i in range(3)]
    inputs = [
        tensors[0] if dim is None else torch.stack(tensors, dim)
        for tensors, dim in zip(zip(*layers, strict=True), in_dims, strict=True)
    ]

    def both(weight, u, v):
        return ops.power_iteration(weight, u, v, n_iterations=2, return_weight=True)

    mapped = torch.func.vmap(both, in_dims)(*inputs)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)]
        for together, alone in zip(mapped, both(*one), strict=True):
            torch.testing.assert_close(together[i], alone)


def test_vmap_over_layers_together_and_nested_equals_loops(backend_device):
    g = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 4, 5, generator=g, dtype=torch.float64).to(backend_device)
    second = torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64).to(backend_device)
    us, vs = [first[0, 0, :, 0], second[0, 0, :, 0]], [first[0, 0, 0], second[0, 0, 0]]

    def all_layers(a, b):
        sigma, new_us, _, normalized = ops.power_iteration_multi([a, b], us, vs, return_weights=True)
        return sigma, *new_us, *normalized

    mapped = torch.func.vmap(torch.func.vmap(all_layers))(first, second)
    for i in range(2):
        for j in range(3):
            for together, alone in zip(mapped, all_layers(first[i, j], second[i, j]), strict=True):
                torch.testing.assert_close(together[i, j], alone)


@pytest.mark.parametrize("used", ["sigma", "weight", "both"])
def test_per_sample_gradients_by_vmap_of_grad_equal_a_loop(used, backend_device):
    weight, u, v = iterated(4, 3, dtype=torch.float64, device=backend_device)
    weights = torch.stack([weight, 2 * weight + 1, weight - 0.5])

    def loss(weight, u, v):
        sigma, _, _, normalized = ops.power_iteration(weight, u, v, return_weight=True)
        return {"sigma": sigma**2, "weight": (normalized**3).sum(), "both": sigma * (normalized**3).sum()}[used]

    mapped = torch.func.vmap(torch.func.grad(loss), (0, None, None))(weights, u, v)
    for together, weight in zip(mapped, weights, strict=True):
        torch.testing.assert_close(together, torch.func.grad(loss)(weight, u, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_op_runs_in_float32_and_gradients_keep_their_dtype(dtype, backend_device):
    weight, u, v = iterated(6, 5, dtype=dtype, device=backend_device)
    weight.requires_grad_()
    with torch.autocast(backend_device.type, torch.bfloat16):
        sigma, new_u, new_v, normalized = ops.power_iteration(weight, u, v, return_weight=True)
    assert all(x.dtype == torch.float32 for x in (sigma, new_u, new_v, normalized))
    want, true_u, _ = true_iteration(weight, u, v)
    assert sigma.item() == pytest.approx(want, rel=1e-6)
    assert abs(array(new_u) - true_u).max() < 1e-6
    (got,) = torch.autograd.grad(normalized, weight, torch.ones_like(normalized))
    assert got.dtype == dtype


@pytest.mark.parametrize("return_weights", [False, True])
def test_on_the_meta_device_shapes_dtypes_and_strides_are_right(return_weights):
    for dtype in FLOATS:
        tensors = [iterated(4, 3, dtype=dtype), iterated(2, 3, 2, dim=1, dtype=dtype)]
        weights, us, vs = (list(t) for t in zip(*tensors, strict=True))
        weights[1] = weights[1].mT.contiguous().mT
        options = {"dims": [0, 1], "return_weights": return_weights}
        real = ops.power_iteration_multi(weights, us, vs, **options)
        meta = ops.power_iteration_multi(*([x.to("meta") for x in xs] for xs in (weights, us, vs)), **options)
        for got, want in zip(meta, real, strict=True):
            pairs = zip(got, want, strict=True) if isinstance(want, list | tuple) else [(got, want)]
            for g, w in pairs:
                assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride()) and g.device.type == "meta"
