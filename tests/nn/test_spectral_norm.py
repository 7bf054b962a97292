"""spectral_norm: beside torch's own parametrization, against singular values, and in every setting that a layer meets.
All layers of a model in one call: test_spectral_norm_all.py."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize

from pygen.nn.utils.spectral_norm import spectral_norm

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), lambda: torch.randn(4, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), lambda: torch.randn(2, 3, 5, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 6, 3), lambda: torch.randn(2, 3, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 6, 3), lambda: torch.randn(2, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda: torch.randint(9, (6,))),
    "one_row": (lambda: nn.Linear(7, 1), lambda: torch.randn(4, 7)),
    "one_column": (lambda: nn.Linear(1, 7), lambda: torch.randn(4, 1)),
    "vector": (lambda: nn.LayerNorm(6), lambda: torch.randn(4, 6)),
}
# Both sides round 50 steps of float32 in their own order; in float64 nothing but the formula is left.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def seeded(make):
    torch.manual_seed(0)
    return make()


def assert_near(actual, expected, tolerance=1e-6):
    """Up to a part of the largest element: a sum that cancels has no digits of its own."""
    scale = expected.detach().abs().max().clamp_min(torch.finfo(expected.dtype).tiny).item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def sigma_max(layer, dim=0):
    return torch.linalg.svdvals(layer.weight.detach().double().movedim(dim, 0).flatten(1))[0].item()


def norm_of(layer, name="weight"):
    return layer.parametrizations[name][0]


def both(make, dtype=torch.float32, **options):
    """(torch's, ours): the same layer, normalised from the same seed."""
    return [seeded(lambda f=f: f(make().to(dtype), **options)) for f in (parametrizations.spectral_norm, spectral_norm)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("steps", (1, 3))
@pytest.mark.parametrize("name", LAYERS)
def test_fifty_training_steps_are_torchs(name, steps, dtype):
    make, data = LAYERS[name]
    layers = both(make, dtype, n_power_iterations=steps)
    optimizers = [torch.optim.SGD(layer.parameters(), 0.05, momentum=0.5) for layer in layers]
    assert_same_state(*layers, TOLERANCE[dtype])
    for _ in range(50):
        x = data()
        x = x.to(dtype) if x.is_floating_point() else x
        direction = None
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            y = layer(x)
            direction = torch.randn_like(y) if direction is None else direction
            (y * direction).mean().backward()
            optimizer.step()
        assert_same_state(*layers, TOLERANCE[dtype])
        for theirs, ours in zip(*(layer.parameters() for layer in layers), strict=True):
            assert_near(ours.grad, theirs.grad, TOLERANCE[dtype])
    theirs, ours = (layer.eval().weight for layer in layers)
    assert_near(ours, theirs, TOLERANCE[dtype])


def assert_same_state(theirs, ours, tolerance):
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        assert_near(b, a, tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_load_both_ways(name):
    make, _ = LAYERS[name]
    theirs, ours = both(make)
    for source, target in ((theirs, spectral_norm(make())), (ours, parametrizations.spectral_norm(make()))):
        target.load_state_dict(source.state_dict(), strict=True)
        assert_near(target.eval().weight, source.eval().weight)


@pytest.mark.parametrize("dim", (1, -1, -2))
def test_the_dimension_of_the_rows_is_torchs(dim):
    theirs, ours = both(lambda: nn.Conv2d(3, 4, (2, 3)), dim=dim)
    assert_same_state(theirs, ours, 1e-5)
    assert_near(ours.weight, theirs.weight)


def test_another_parameter_or_a_buffer_is_normalised_by_its_name():
    layers = both(lambda: nn.RNNCell(3, 4), name="weight_hh")
    assert_near(layers[1](torch.ones(2, 3)), layers[0](torch.ones(2, 3)))
    holder = nn.Module()
    holder.register_buffer("table", torch.randn(3, 4))
    spectral_norm(holder, "table", n_power_iterations=50)
    assert torch.linalg.svdvals(holder.table)[0].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "vector"])
def test_the_largest_singular_value_is_one_after_convergence(name):
    layer = seeded(lambda: spectral_norm(LAYERS[name][0](), n_power_iterations=300))
    assert sigma_max(layer, norm_of(layer).dim) == pytest.approx(1, abs=1e-5)


def test_a_vector_is_divided_by_its_norm():
    layer = spectral_norm(nn.LayerNorm(4))
    layer.weight = torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert layer.weight.tolist() == pytest.approx([0.6, 0, 0.8, 0])
    assert not list(norm_of(layer).buffers())


def test_evaluation_rests_and_training_goes_on_from_there():
    theirs, ours = both(lambda: nn.Linear(6, 5))
    for training in (True, False, False, True, False, True):
        for layer in (theirs, ours):
            layer.train(training)
        before = norm_of(ours)._u.clone()
        assert_near(ours.weight, theirs.weight)
        assert torch.equal(before, norm_of(ours)._u) != training
        assert_same_state(theirs, ours, 1e-6)


def test_the_buffers_stay_the_same_tensors():
    norm = norm_of(layer := spectral_norm(nn.Linear(6, 5)))
    addresses = [b.data_ptr() for b in norm.buffers()]
    for _ in range(3):
        assert layer.weight.requires_grad
    assert [b.data_ptr() for b in norm.buffers()] == addresses
    assert not any(b.requires_grad for b in norm.buffers())


def test_two_forwards_before_a_backward_have_torchs_gradient():
    """loss = D(real) - D(fake): the second forward changes u and v, not what the first one's gradient needs."""
    real, fake = torch.randn(2, 4, 6)
    layers = both(lambda: nn.Linear(6, 5))
    for layer in layers:
        (layer(real).square().sum() - layer(fake).square().sum()).backward()
        layer(real).sum().backward()  # and gradients add up
    assert_near(norm_of(layers[1])._u, norm_of(layers[0])._u)
    for theirs, ours in zip(*(layer.parameters() for layer in layers), strict=True):
        assert_near(ours.grad, theirs.grad)


@pytest.mark.parametrize("bound", (None, 0.9))
def test_a_matrix_of_zeros_gives_zeros_and_recovers(bound):
    layer = spectral_norm(nn.Linear(4, 5, bias=False), bound=bound)
    layer.weight = torch.zeros(5, 4)
    for _ in range(3):
        layer(torch.ones(2, 4)).sum().backward()
        assert torch.equal(layer.weight, torch.zeros(5, 4))
        assert layer.parametrizations.weight.original.grad.isfinite().all()
    layer.weight = torch.randn(5, 4)
    for _ in range(200):
        weight = layer.weight
    assert torch.linalg.svdvals(weight)[0].item() == pytest.approx(bound or 1, abs=1e-5)


def test_a_layer_that_starts_with_zeros_recovers():
    linear = nn.Linear(4, 5)
    nn.init.zeros_(linear.weight)
    layer = spectral_norm(linear, n_power_iterations=100)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)


def dead():
    """A checkpoint of torch's parametrization after one forward with a weight of zeros."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 5))
    layer.weight = torch.zeros(5, 4)
    assert layer.weight.isnan().all()
    layer.weight = torch.ones(5, 4)
    return layer.state_dict()


def test_vectors_of_zeros_in_a_checkpoint_do_not_stay():
    state = dead()
    assert not state["parametrizations.weight.0._u"].any()
    layer = spectral_norm(nn.Linear(4, 5), n_power_iterations=100)
    layer.load_state_dict(state)
    assert sigma_max(layer) == pytest.approx(1, abs=1e-5)


def test_a_small_matrix_is_left_as_it_is_by_a_bound():
    layer = seeded(lambda: spectral_norm(nn.Linear(4, 5), n_power_iterations=50, bound=3.0))
    original = layer.parametrizations.weight.original
    assert torch.linalg.svdvals(original.detach())[0] < 3
    assert torch.equal(layer.weight, original)
    direction = torch.randn(5, 4)
    assert torch.equal(torch.autograd.grad((layer.weight * direction).sum(), original)[0], direction)


def test_a_large_matrix_has_the_bound_as_its_norm():
    layer = seeded(lambda: spectral_norm(nn.Linear(4, 5), n_power_iterations=300, bound=0.25))
    assert sigma_max(layer) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("bound", (0.25, 1.0, 5.0))
@pytest.mark.parametrize(
    "make", (lambda: nn.Linear(4, 5), lambda: nn.ConvTranspose2d(2, 3, 2), lambda: nn.LayerNorm(6))
)
def test_the_gradient_of_a_bounded_weight_flows_through_sigma(make, bound):
    """Where it does not, a weight grows without limit while its norm is cut off."""
    layer = seeded(lambda: spectral_norm(make().double(), bound=bound).eval())
    original = layer.parametrizations.weight.original
    weight, direction = layer.weight, torch.randn(original.shape, dtype=torch.float64)
    if original.ndim == 1:
        sigma = original.square().sum().sqrt()
    else:
        u, v = norm_of(layer)._u, norm_of(layer)._v
        sigma = u @ original.transpose(0, norm_of(layer).dim).flatten(1) @ v
    expected = original / torch.maximum(sigma / bound, torch.tensor(1.0, dtype=torch.float64))
    assert_near(weight, expected, 1e-12)
    gradients = [torch.autograd.grad((w * direction).sum(), original)[0] for w in (weight, expected)]
    assert_near(*gradients, 1e-12)


@pytest.mark.parametrize("bound", (None, 0.1, 10.0))
def test_gradcheck(bound):
    layer = seeded(lambda: spectral_norm(nn.Linear(4, 3).double(), bound=bound).eval())

    def weight(original):
        return norm_of(layer)(original)

    original = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(weight, original)
    assert torch.autograd.gradgradcheck(weight, original)


def test_products_with_the_hessian_are_torchs():
    """The second derivative sees that sigma depends on the weight."""
    products = []
    for layer in both(lambda: nn.Linear(4, 3), torch.float64):
        original = layer.parametrizations.weight.original
        for _ in range(2):
            loss = layer(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)).square().sum()
            (gradient,) = torch.autograd.grad(loss, original, create_graph=True)
            products.append(torch.autograd.grad(gradient.square().sum(), original)[0])
    for theirs, ours in zip(products[:2], products[2:], strict=True):
        assert_near(ours, theirs, 1e-12)


def critic(normalize):
    return nn.Sequential(
        normalize(nn.Conv2d(2, 4, 3).double()),
        nn.Softplus(),
        nn.Flatten(),
        normalize(nn.Linear(36, 5).double()),
        nn.Tanh(),
        nn.Linear(5, 1).double(),
    )


def test_a_gradient_penalty_has_torchs_gradient():
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    gradients = []
    for normalize in (parametrizations.spectral_norm, spectral_norm):
        model = seeded(lambda n=normalize: critic(n))
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(y).sum(), y, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        gradients.append(torch.autograd.grad(penalty, list(model.parameters())[:-1]))
    for theirs, ours in zip(*gradients, strict=True):
        assert_near(ours, theirs, 1e-12)


@pytest.mark.parametrize("bound", (None, 0.5))
def test_autocast_leaves_the_vectors_in_float32(bound):
    """In bfloat16 u and v have two digits, and sigma is a few percent off."""
    plain, mixed = (seeded(lambda: spectral_norm(nn.Linear(16, 16), bound=bound)) for _ in range(2))
    x = torch.randn(4, 16)
    for _ in range(5):
        plain(x).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mixed.weight.dtype == torch.float32
            y = mixed(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert plain.weight.requires_grad  # as many uses as the other has had
        assert_same_state(plain, mixed, 0)
    assert mixed.parametrizations.weight.original.grad.dtype == torch.float32


def test_autocast_does_not_widen_a_bfloat16_layer():
    layer = spectral_norm(nn.Linear(6, 5)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.dtype == norm_of(layer)._u.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_a_layer_that_is_cast_keeps_working(dtype):
    layer = spectral_norm(nn.Linear(6, 5)).to(dtype)
    for _ in range(20):
        weight = layer.weight
    assert weight.dtype == norm_of(layer)._v.dtype == dtype
    # u and v are rounded to the type's digits, once per step.
    assert sigma_max(layer) == pytest.approx(1, abs=4 * torch.finfo(dtype).eps + 0.01)
    weight.sum().backward()


def test_a_layer_made_without_memory_takes_a_checkpoint():
    source = spectral_norm(nn.Linear(6, 5))
    with torch.device("meta"):
        layer = spectral_norm(nn.Linear(6, 5))
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer.eval().weight, source.eval().weight)


def test_compiled_training_is_one_graph_and_is_compiled_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = seeded(lambda: spectral_norm(nn.Linear(6, 5)))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for module, run in ((layer, compiled), (eager, eager)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            run(torch.ones(3, 6)).square().sum().backward()
            optimizer.step()
    assert counter.frame_count == 1
    assert_same_state(eager, layer, 1e-6)


@pytest.mark.parametrize("bound", (None, 0.5))
def test_compiled_gradients_are_the_eager_ones(bound):
    torch._dynamo.reset()
    layer = seeded(lambda: spectral_norm(nn.Linear(6, 5), bound=bound))
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run in (compiled, eager):
        for _ in range(2):
            run(torch.ones(3, 6)).square().sum().backward()
    assert_same_state(eager, layer, 1e-6)
    for a, b in zip(layer.parameters(), eager.parameters(), strict=True):
        assert_near(a.grad, b.grad)


def test_per_sample_gradients_in_evaluation():
    layer = seeded(lambda: spectral_norm(nn.Linear(4, 3))).eval()
    parameters = dict(layer.named_parameters())
    x = torch.randn(5, 4)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    loss(parameters, x).backward()
    for name, parameter in layer.named_parameters():
        assert_near(per_sample[name].sum(0), parameter.grad)


def test_an_ensemble_of_functional_layers_trains_its_own_buffers():
    layers = [spectral_norm(nn.Linear(4, 3)) for _ in range(2)]

    def stacked(tensors):
        return {name: torch.stack([t.detach(), other.detach()]) for (name, t), (_, other) in zip(*tensors, strict=True)}

    parameters, buffers = (
        stacked([m(layer) for layer in layers]) for m in (nn.Module.named_parameters, nn.Module.named_buffers)
    )
    skeleton = copy.deepcopy(layers[0])

    def call(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    x = torch.randn(5, 4)
    y = torch.func.vmap(call, (0, 0, None))(parameters, buffers, x)
    for i, layer in enumerate(layers):
        assert_near(y[i], layer(x))
        assert_near(buffers["parametrizations.weight.0._u"][i], norm_of(layer)._u)


def test_a_copy_is_independent():
    layer = spectral_norm(nn.Linear(4, 3))
    other = copy.deepcopy(layer)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    other(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        other.parametrizations.weight.original.zero_()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    assert layer.parametrizations.weight.original.grad is None


@pytest.mark.parametrize("leave", (True, False))
def test_removing_leaves_the_normalised_or_the_original_weight(leave):
    layer = spectral_norm(nn.Linear(4, 3)).eval()
    original = layer.parametrizations.weight.original
    expected = (layer.weight if leave else original).detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
    assert type(layer) is nn.Linear and layer.weight is original
    assert torch.equal(layer.weight, expected)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_cached_takes_one_step_for_many_uses():
    theirs, ours = both(lambda: nn.Linear(4, 4))
    for layer in (theirs, ours):
        with parametrize.cached():
            assert layer.weight is layer.weight
    assert_same_state(theirs, ours, 1e-6)


def test_it_follows_another_parametrization():
    layers = []
    for normalize in (parametrizations.spectral_norm, spectral_norm):
        layer = seeded(lambda n=normalize: n(parametrizations.weight_norm(nn.Linear(4, 3))))
        layer(torch.ones(2, 4)).square().sum().backward()
        layers.append(layer)
    assert_same_state(*layers, 1e-5)
    for theirs, ours in zip(*(layer.parameters() for layer in layers), strict=True):
        assert_near(ours.grad, theirs.grad, 1e-5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return 2 * weight


def test_another_parametrization_follows_it():
    layers = both(lambda: nn.Linear(4, 3))
    for layer in layers:
        before = layer.eval().weight
        parametrize.register_parametrization(layer, "weight", Halved())
        assert torch.equal(layer.weight, before / 2)
        layer.weight = torch.eye(3, 4)
    assert_near(layers[1].weight, layers[0].weight)


def test_gradients_of_a_sparse_embedding_are_torchs():
    layers = both(lambda: nn.Embedding(9, 4))
    for layer in layers:
        layer.sparse = True
        layer(torch.tensor([1, 1, 3])).square().sum().backward()
    theirs, ours = (layer.parametrizations.weight.original.grad for layer in layers)
    assert_near(ours.to_dense(), theirs.to_dense())


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="no parameter or buffer called 'heavy'"):
        spectral_norm(nn.Linear(3, 4), "heavy")
    with pytest.raises(ValueError, match="n_power_iterations must be positive, got 0"):
        spectral_norm(nn.Linear(3, 4), n_power_iterations=0)
    for dim in (2, -3):
        with pytest.raises(IndexError, match=rf"dim must be in \[-2, 1\] .* got {dim}"):
            spectral_norm(nn.Linear(3, 4), dim=dim)
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        spectral_norm(nn.Linear(3, 4), eps=0)
    with pytest.raises(ValueError, match="bound must be positive or None, got -1"):
        spectral_norm(nn.Linear(3, 4), bound=-1)
    with pytest.raises(TypeError, match="real floating-point dtype, got torch.complex64"):
        spectral_norm(nn.Linear(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="run the lazy module once"):
        spectral_norm(nn.LazyLinear(4))
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError):
        spectral_norm(layer, bound=0)
    assert type(layer) is nn.Linear, "what was refused has changed nothing"


def test_replicas_of_two_processes_stay_equal(tmp_path):
    script = Path(__file__).with_name("two_processes_spectral_norm.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_vector_that_is_zero_is_no_nan():
    layer = spectral_norm(nn.LayerNorm(4))
    layer.weight = torch.zeros(4)
    assert torch.equal(layer.weight, F.normalize(torch.zeros(4), dim=0))
