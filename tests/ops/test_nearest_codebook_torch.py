"""nearest_codebook under torch's transformations: gradients of its distances, compilation, vmap, autocast, meta."""

import pytest
import torch

from harness import INTERPRETED
from ops.codebook_data import METRICS, codebook_set
from ops.test_contract import LAYOUTS
from pygen import ops

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="traces with fake tensors, or hundreds of launches")
some_metrics = pytest.mark.parametrize("metric", METRICS[:1] if INTERPRETED else METRICS)


def data(dtype=torch.float64, n=6, k=9, d=5, heads=None, device="cpu", kind="random"):
    """x and codebook, of `heads` heads where given; no row is near a border between two codes."""
    sets = [codebook_set(kind, n, k, d, dtype, seed) for seed in range(heads or 1)]
    x, codebook = (torch.stack(tensors).to(device) for tensors in zip(*sets, strict=True))
    return (x, codebook) if heads else (x[0], codebook[0])


def distances(x, codebook, metric, mask=None):
    """The public function's distances alone."""
    return ops.nearest_codebook(x, codebook, metric=metric, mask=mask, return_distance=True)[1]


def plain_distances(x, codebook, metric):
    """The distance to the nearest code in differentiable float64 formulas, without pygen."""
    x, codebook = x.double(), codebook.double()
    if metric == "euclidean":
        every = (x[..., None, :] - codebook).square().sum(-1).sqrt()
    else:
        every = -(x[..., None, :] * codebook).sum(-1)
        if metric == "cosine":
            every = 1 + every / (x.norm(dim=-1)[..., None] * codebook.norm(dim=-1))
    return every.amin(-1)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# ---- gradients -------------------------------------------------------------------------------------------------------


@some_metrics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64][: 1 if INTERPRETED else 3], ids=str)
def test_gradients_are_those_of_the_plain_formula(metric, dtype, search_device, poisoned_memory):
    n = 5 if INTERPRETED else 20
    x, codebook = data(dtype, n=n, k=13, d=7)
    grad = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = leaves(x.to(search_device), codebook.to(search_device))
    found = distances(*ours, metric)
    got = torch.autograd.grad(found, ours, grad.to(found))
    plain = leaves(x, codebook)
    want = torch.autograd.grad(plain_distances(*plain, metric), plain, grad)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(g.cpu(), w, rtol=8 * eps, atol=8 * eps * float(w.abs().max()), check_dtype=False)


@not_interpreted
@some_metrics
def test_first_and_second_derivatives_are_those_of_finite_differences(metric, search_device):
    tensors = leaves(*data(n=3, k=4, d=3, device=search_device))
    assert torch.autograd.gradcheck(lambda *t: distances(*t, metric), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: distances(*t, metric), tensors)


def test_the_distance_of_a_row_to_itself_has_gradient_zero_not_nan(search_device):
    x, codebook = leaves(*data(torch.float32, kind="rows are codes", device=search_device))
    for grad in torch.autograd.grad(distances(x, codebook, "euclidean").sum(), (x, codebook)):
        assert (grad == 0).all()


def test_zero_vectors_have_finite_gradients_of_the_cosine(search_device):
    x, codebook = leaves(*data(torch.float32, n=4, kind="zeros", device=search_device))
    found = distances(x, codebook, "cosine")
    assert torch.equal(found[::2].cpu(), torch.ones(2))
    grad_x, grad_codebook = torch.autograd.grad(found.sum(), (x, codebook))
    assert (grad_x[::2] == 0).all() and grad_x.isfinite().all() and grad_codebook.isfinite().all()


@some_metrics
def test_rows_that_are_left_out_have_gradient_zero_whatever_they_hold(metric, search_device):
    x, codebook = data(torch.float32, n=8)
    mask = torch.arange(8) % 2 == 0
    x[1], x[3, 0] = torch.nan, torch.inf
    x, codebook = leaves(x.to(search_device), codebook.to(search_device))
    grads = torch.autograd.grad(distances(x, codebook, metric, mask.to(search_device)).sum(), (x, codebook))
    kept = leaves(x[::2], codebook)
    want = torch.autograd.grad(distances(*kept, metric).sum(), kept)
    assert (grads[0][1::2] == 0).all()
    assert torch.equal(grads[0][::2], want[0]) and torch.equal(grads[1], want[1])


def test_indices_and_candidates_have_no_gradient(search_device):
    x, codebook = leaves(*data(device=search_device))
    index, found, candidates = ops.nearest_codebook(x, codebook, return_distance=True, return_candidates=True)
    assert found.requires_grad and not index.requires_grad and not candidates.requires_grad
    assert not ops.nearest_codebook(x, codebook).requires_grad


@pytest.mark.parametrize("layout", ["permuted"] if INTERPRETED else LAYOUTS)
def test_strides_of_inputs_and_incoming_gradients_do_not_change_a_bit(layout, search_device):
    x, codebook = data(torch.float32, n=6, heads=2, device=search_device)
    grad = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)).to(search_device)
    results = []
    for change in (lambda t: t, LAYOUTS[layout]):
        tensors = leaves(x, codebook)
        found = distances(*(change(t) for t in tensors), "euclidean")
        results.append(torch.autograd.grad(found, tensors, change(grad)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@not_interpreted
def test_gradients_of_a_codebook_are_the_same_bits_at_one_and_two_threads(search_device, two_threads):
    tensors = leaves(*data(torch.float32, n=2000, k=3, d=16, device=search_device))
    runs = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        runs.append(torch.autograd.grad(distances(*tensors, "euclidean").sum(), tensors))
    assert all(torch.equal(got, want) for run in runs[1:] for got, want in zip(run, runs[0], strict=True))


# ---- torch's transformations -----------------------------------------------------------------------------------------


@not_interpreted
@some_metrics
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(metric, masked):
    x, codebook = leaves(*data(torch.float32, heads=2))
    mask = torch.rand(2, 6) < 0.5 if masked else None
    arguments = (x, codebook, metric, mask)
    torch.library.opcheck(torch.ops.pygen.nearest_codebook.default, (*arguments, True, True))
    # Without distances no result depends on an input that has a gradient.
    detached = (x.detach(), codebook.detach(), metric, mask)
    torch.library.opcheck(torch.ops.pygen.nearest_codebook.default, (*detached, False, False))


@not_interpreted
def test_a_step_compiles_into_one_graph_with_the_same_gradients(search_device):
    def step(x, codebook, mask):
        index, found = ops.nearest_codebook(2 * x, codebook, mask=mask, return_distance=True)
        return index, (found * found).sum()

    tensors = leaves(*data(torch.float32, device=search_device))
    mask = torch.arange(6, device=search_device) != 2
    results = []
    for function in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        index, loss = function(*tensors, mask)
        results.append((index, loss, *torch.autograd.grad(loss, tensors)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:])


@not_interpreted
def test_a_compiled_search_takes_another_number_of_rows():
    x, codebook = data(torch.float32, n=30, k=11, d=20)
    compiled = torch.compile(lambda x: ops.nearest_codebook(x, codebook) + 1, fullgraph=True, backend="aot_eager")
    for n in (30, 7, 12):
        assert torch.equal(compiled(x[:n]), ops.nearest_codebook(x[:n], codebook) + 1)


@not_interpreted
def test_it_compiles_through_inductor():
    x, codebook = data(torch.float32)
    compiled = torch.compile(lambda x: x - codebook[ops.nearest_codebook(x, codebook)], fullgraph=True)
    torch.testing.assert_close(compiled(x), x - codebook[ops.nearest_codebook(x, codebook)])


@not_interpreted
def test_exports(search_device):
    class Module(torch.nn.Module):
        def forward(self, x, codebook):
            return ops.nearest_codebook(x, codebook, return_distance=True)

    tensors = data(torch.float32, device=search_device)
    exported = torch.export.export(Module(), tensors).module()
    for got, want in zip(exported(*tensors), Module()(*tensors), strict=True):
        assert torch.equal(got, want)


VMAP_DIMS = [(0, None, None), (1, 0, 0), (0, 0, None), (None, 0, 0), (0, None, 0)]


@pytest.mark.parametrize("heads", [2] if INTERPRETED else [None, 2])
@pytest.mark.parametrize("in_dims", VMAP_DIMS[: 2 if INTERPRETED else None], ids=str)
def test_vmap_equals_a_loop(in_dims, heads, search_device):
    x, codebook = zip(*(data(torch.float32, n=3, heads=heads, device=search_device) for _ in range(3)), strict=True)
    scale = [1.0, 2.0, 0.5]
    inputs = [
        torch.stack([s * t for s, t in zip(scale, x, strict=True)]),
        torch.stack([s * t for s, t in zip(scale, codebook, strict=True)]),
        torch.rand(3, *x[0].shape[:-1], generator=torch.Generator().manual_seed(0)).to(search_device) < 0.7,
    ]
    inputs = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(inputs, in_dims, strict=True)]

    def function(x, codebook, mask):
        return ops.nearest_codebook(x, codebook, mask=mask, return_distance=True)

    together = torch.func.vmap(function, in_dims)(*inputs)
    for i in range(3):
        alone = function(*(t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)))
        assert torch.equal(together[0][i], alone[0]) and torch.equal(together[1][i], alone[1])


@not_interpreted
def test_per_sample_gradients_by_vmap_of_grad_equal_a_loop(search_device):
    x, codebook = data(torch.float64, n=4, heads=3, device=search_device)

    def loss(x, codebook):
        return distances(x, codebook, "euclidean").square().sum()

    for dims in ((0, 0), (0, None)):
        given = codebook if dims[1] == 0 else codebook[0]
        mapped = torch.func.vmap(torch.func.grad(loss, (0, 1)), dims)(x, given)
        for i in range(3):
            alone = torch.func.grad(loss, (0, 1))(x[i], given[i] if dims[1] == 0 else given)
            torch.testing.assert_close(tuple(together[i] for together in mapped), alone)


def test_forward_mode_is_refused_not_silently_zero(search_device):
    x, codebook = data(device=search_device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            distances(dual, codebook, "euclidean")


@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)][
        : 1 if INTERPRETED else 3
    ],
    ids=str,
)
def test_under_autocast_dtypes_mix_and_gradients_keep_theirs(dtypes, search_device):
    """Encoders hand 16-bit activations to a float32 codebook there: no mismatch, no NaN, distances in float32."""
    x, codebook = data(torch.float32, n=10, device=search_device)
    x, codebook = leaves(1e3 * x.to(dtypes[0]), 1e3 * codebook.to(dtypes[1]))  # squares are beyond float16
    with torch.autocast(search_device.type, torch.bfloat16):
        index, found = ops.nearest_codebook(x, codebook, return_distance=True)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert torch.equal(index, ops.nearest_codebook(x.detach(), codebook.detach()))
    grads = torch.autograd.grad(found.sum(), (x, codebook))
    assert tuple(g.dtype for g in grads) == dtypes and all(g.isfinite().all() for g in grads)


def test_on_the_meta_device_shapes_and_dtypes_are_right():
    for heads in (None, 2):
        x, codebook = data(torch.bfloat16, heads=heads)
        real = ops.nearest_codebook(x, codebook, return_distance=True, return_candidates=True)
        meta = ops.nearest_codebook(x.to("meta"), codebook.to("meta"), return_distance=True, return_candidates=True)
        for got, want in zip(meta, real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
