"""spectral_norm_all: step by step the same as spectral_norm on every layer, in one call of the op per forward, of which
nothing is left after it."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize

import pygen.nn.utils._spectral_norm as implementation
from pygen.nn.utils import conv_spectral_norm, spectral_norm, spectral_norm_all


class Critic(nn.Module):
    """A layer of every kind, each used once."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 2, stride=2)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Tanh(), nn.Flatten())
        self.label = nn.Embedding(5, 6)
        self.pair = nn.Bilinear(36, 6, 7)
        self.head = nn.Linear(7, 1)

    def forward(self, x, label):
        return self.head(self.pair(self.body(self.up(x)), self.label(label)))


KINDS = (nn.ConvTranspose2d, nn.Conv2d, nn.Embedding, nn.Bilinear, nn.Linear)


def one_by_one(model, **options):
    for layer in model.modules():
        if isinstance(layer, KINDS):
            spectral_norm(layer, **options)
    return model


def seeded(make):
    torch.manual_seed(0)
    return make()


def both(make=Critic, **options):
    """(layer by layer, together): the same model from the same seed."""
    return [seeded(lambda f=f: f(make(), **options)) for f in (one_by_one, spectral_norm_all)]


def batch():
    return torch.randn(3, 2, 3, 3), torch.randint(5, (3,))


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, implementation.SpectralNorm)]


def vectors(model):
    return [t.clone() for t in model.buffers()]


def assert_same_state(a, b, tolerance=1e-6):
    for (name, mine), (other, theirs) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_gradients(a, b, tolerance=1e-6):
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)


def assert_nothing_is_left(model):
    assert norms_of(model) and all(norm.delivered is None for norm in norms_of(model))


@pytest.fixture
def calls():
    """The numbers of weights in the calls of the op: [6, 1, ...]."""
    made = []

    def recording(function):
        def call(weights, *args, **kwargs):
            made.append(len(weights) if isinstance(weights, list) else 1)
            return function(weights, *args, **kwargs)

        return call

    names = ("spectral_weights", "bounded_weight", "power_iteration_multi")
    patches = {name: recording(getattr(implementation, name)) for name in names}
    with mock.patch.multiple(implementation, **patches):
        yield made


@pytest.mark.parametrize("options", ({}, {"n_power_iterations": 3}, {"bound": 0.4}, {"bound": 5.0}))
def test_training_is_that_of_the_layers_one_by_one(options):
    models = both(**options)
    assert_same_state(*models)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for _ in range(10):
        x = batch()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(*x).square().mean().backward()
        assert_same_gradients(*models)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_state(*models, tolerance=1e-5)
    x = batch()
    torch.testing.assert_close(models[0].eval()(*x), models[1].eval()(*x))


def test_all_layers_are_one_call_per_forward(calls):
    model = spectral_norm_all(Critic())
    calls.clear()
    for training in (True, False):
        model.train(training)(*batch())
    assert calls == [6, 6]


def test_layers_of_several_dtypes_are_one_call_each(calls):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow = two_layers()
            self.wide = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.wide(self.narrow(x).double())

    models = both(Mixed)
    calls.clear()
    for model in models:
        model(torch.ones(2, 4)).sum().backward()
    assert calls == [1] * 3 + [2, 1]
    assert_same_gradients(*models)


def test_layers_in_evaluation_rest_while_the_others_train():
    models = both()
    for model in models:
        model.body.eval()
    resting = vectors(models[1].body)
    for _ in range(3):
        x = batch()
        for model in models:
            model(*x).sum().backward()
    assert_same_state(*models)
    assert_same_gradients(*models)
    assert all(torch.equal(a, b) for a, b in zip(resting, models[1].body.buffers(), strict=True))


def test_a_frozen_layer_gets_no_gradient():
    model = spectral_norm_all(two_layers())
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    before = vectors(model[0])
    model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is None for p in model[0].parameters())
    assert all(p.grad is not None for p in model[2].parameters())
    assert not torch.equal(before[0], next(model[0].buffers())), "u and v follow, as torch's do"


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_without_gradients_the_output_is_the_same(mode):
    models = both()
    for training in (True, False):
        x = batch()
        with mode():
            a, b = (model.train(training)(*x) for model in models)
        torch.testing.assert_close(a, b)
        assert not b.requires_grad
    models[1].train()(*batch()).sum().backward()
    assert_nothing_is_left(models[1])


def test_a_gradient_is_recorded_where_the_model_turns_recording_on():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            with torch.enable_grad():
                return self.layer(x)

    model = spectral_norm_all(Inner())
    with torch.no_grad():
        y = model(torch.ones(2, 3))
    y.sum().backward()
    assert model.layer.parametrizations.weight.original.grad is not None


class Failure(Exception):
    pass


def test_nothing_is_left_after_a_forward_or_a_failure():
    model = spectral_norm_all(two_layers())
    model(torch.ones(2, 4))
    assert_nothing_is_left(model)

    def fail(*_):
        raise Failure

    for register in (model.register_forward_pre_hook, model[1].register_forward_hook, model.register_forward_hook):
        handle = register(fail)
        with pytest.raises(Failure):
            model(torch.ones(2, 4))
        handle.remove()
        assert_nothing_is_left(model)


def test_what_an_interrupt_left_is_not_used_once_the_weights_changed():
    """No hook runs after KeyboardInterrupt, and in a notebook work goes on."""
    model = spectral_norm_all(two_layers())

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4))
    handle.remove()
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.eye(4))
    torch.testing.assert_close(model[0].weight, torch.eye(4))
    model(torch.ones(2, 4)).sum().backward()
    assert_nothing_is_left(model)


def test_outside_of_a_forward_a_layer_computes_its_own_weight(calls):
    models = both(two_layers)
    calls.clear()
    for model in models:
        model[0](torch.ones(2, 4)).sum().backward()
        assert model[2].weight.shape == (3, 4)
        model(torch.ones(2, 4)).sum().backward()
    assert calls[4:] == [1, 1, 2]
    assert_same_state(*models)
    assert_same_gradients(*models)


def test_layers_that_a_forward_does_not_use_take_a_step_and_get_no_gradient():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(9, 8), nn.Linear(9, 8)

        def forward(self, x):
            return self.used(x)

    model = spectral_norm_all(Branching())
    before = vectors(model.unused)
    model(torch.ones(2, 9)).sum().backward()
    assert not torch.equal(before[0], next(model.unused.buffers()))
    assert model.unused.parametrizations.weight.original.grad is None
    assert model.used.parametrizations.weight.original.grad is not None


def test_a_layer_used_twice_takes_one_step():
    model = seeded(lambda: spectral_norm_all(nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer)))
    other = seeded(lambda: one_by_one(nn.Sequential(layer := nn.Linear(4, 4), nn.Tanh(), layer)))
    model(torch.ones(2, 4)).sum().backward()
    with parametrize.cached():
        other(torch.ones(2, 4)).sum().backward()
    assert_same_state(model, other)
    assert_same_gradients(model, other)


def test_several_forwards_inside_cached_take_one_step():
    models = both(two_layers)
    for model in models:
        with parametrize.cached():
            (model(torch.ones(2, 4)) - model(torch.zeros(2, 4))).sum().backward()
    assert_same_state(*models)
    assert_same_gradients(*models)


def test_two_forwards_before_a_backward():
    models = both()
    real, fake = batch(), batch()
    for model in models:
        (model(*real).square().sum() - model(*fake).square().sum()).backward()
    assert_same_state(*models)
    assert_same_gradients(*models)


def test_a_gradient_penalty():
    models = both(lambda: Critic().double())
    x, label = batch()
    for model in models:
        y = x.double().requires_grad_()
        (slope,) = torch.autograd.grad(model(y, label).sum(), y, create_graph=True)
        slope.square().sum().backward()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_products_with_the_hessian():
    models = both(lambda: two_layers().double())
    for model in models:
        originals = [norm.original for norm in (model[0].parametrizations.weight, model[2].parametrizations.weight)]
        loss = model(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)).square().sum()
        gradients = torch.autograd.grad(loss, originals, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
    assert_same_gradients(*models, tolerance=1e-12)


class Tied(nn.Module):
    """A language model's embedding and output layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.output = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.embedding(x))


def test_a_tied_weight_is_normalised_once_for_both(calls):
    model = spectral_norm_all(Tied(), n_power_iterations=50)
    calls.clear()
    seen = []
    for layer in (model.embedding, model.output):
        layer.register_forward_hook(lambda layer, *_: seen.append(layer.weight))
    model(torch.tensor([1, 2])).square().sum().backward()
    assert calls == [1]
    assert seen[0] is seen[1]
    assert len(list(model.parameters())) == 2, "the weight and a bias"
    assert set(model.state_dict()) == set(one_by_one(Tied()).state_dict())

    # Both uses' gradients, by the formula.
    other = Tied()
    other.load_state_dict({"embedding.weight": model.embedding.parametrizations.weight.original.detach()}, strict=False)
    other.output.bias = model.output.bias
    weight = other.embedding.weight
    u, v = norms_of(model)[0]._u, norms_of(model)[0]._v
    normalized = weight / (u @ weight @ v)
    y = nn.functional.linear(normalized[torch.tensor([1, 2])], normalized, other.output.bias)
    (expected,) = torch.autograd.grad(y.square().sum(), weight)
    torch.testing.assert_close(model.embedding.parametrizations.weight.original.grad, expected)


def test_a_tied_weight_whose_outputs_are_in_other_dimensions_has_two_norms():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 3, 2)
            self.up.weight = self.down.weight

    model = spectral_norm_all(Autoencoder(), n_power_iterations=200)
    assert [norm.dim for norm in norms_of(model)] == [0, 1]
    assert torch.linalg.svdvals(model.down.weight.flatten(1))[0].item() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.svdvals(model.up.weight.transpose(0, 1).flatten(1))[0].item() == pytest.approx(1, abs=1e-5)


def test_a_tied_weight_joins_the_norm_that_its_first_layer_has():
    model = Tied()
    spectral_norm(model.embedding)
    spectral_norm_all(model)
    assert len(norms_of(model)) == 1
    assert model.output.parametrizations.weight[0] is norms_of(model)[0]


def test_a_copy_uses_its_own_layers():
    model = spectral_norm_all(two_layers())
    other = copy.deepcopy(model)
    before = vectors(model)
    with torch.no_grad():
        other[0].parametrizations.weight.original.copy_(torch.eye(4))
    other(torch.ones(2, 4)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert_nothing_is_left(model)
    assert_nothing_is_left(other)
    copy.deepcopy(model[0])(torch.ones(2, 4)).sum().backward()


def replica_of(module):
    """As torch.nn.parallel.replicate makes them, where the first one shares the buffers' memory."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, None if child is None else replica_of(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
    return replica


def test_replicas_of_data_parallel_serve_themselves(calls):
    models = both(two_layers)
    calls.clear()
    for model in models:
        replica_of(model)(torch.ones(2, 4)).sum().backward()
    assert calls == [1, 1, 2]
    assert_same_state(*models)
    assert_same_gradients(*models)
    assert_nothing_is_left(models[1])


@pytest.mark.parametrize("inner_first", (True, False))
def test_a_normalised_model_inside_of_another_is_one_call(calls, inner_first):
    inner = two_layers()
    model = nn.Sequential(nn.Linear(2, 4), inner)
    for part in (inner, model) if inner_first else (model, inner):
        spectral_norm_all(part)
    calls.clear()
    model(torch.ones(3, 2)).sum().backward()
    assert calls == [3]
    inner(torch.ones(3, 4))
    assert calls == [3, 2]
    assert_nothing_is_left(model)


def test_a_second_registration_changes_nothing(calls):
    model = spectral_norm_all(two_layers())
    before = copy.deepcopy(model.state_dict())
    spectral_norm_all(model, bound=3.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(norm.bound is None for norm in norms_of(model)) and len(model._forward_pre_hooks) == 1
    calls.clear()
    model(torch.ones(2, 4))
    assert calls == [2]


def test_a_layer_keeps_the_options_of_its_own_spectral_norm():
    model = two_layers()
    spectral_norm(model[0], n_power_iterations=7, bound=0.3)
    spectral_norm_all(model)
    assert [(n.n_power_iterations, n.bound) for n in norms_of(model)] == [(7, 0.3), (1, None)]
    model(torch.ones(2, 4)).sum().backward()
    assert torch.linalg.svdvals(model[0].weight)[0].item() == pytest.approx(0.3, rel=1e-2)
    assert_nothing_is_left(model)


def test_layers_with_torchs_spectral_norm_are_left_alone():
    model = two_layers()
    parametrizations.spectral_norm(model[0])
    spectral_norm_all(model)
    assert len(model[0].parametrizations.weight) == 1 and len(norms_of(model)) == 1
    model(torch.ones(2, 4)).sum().backward()


def test_weight_norm_before_it_stays():
    models = both(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)))
    for _ in range(2):
        for model in models:
            model(torch.ones(2, 4)).sum().backward()
    assert_same_state(*models)
    assert_same_gradients(*models)
    assert len(spectral_norm_all(models[1])[0].parametrizations.weight) == 2, "once is enough"


def test_a_removed_or_replaced_layer_is_passed_over(calls):
    model = spectral_norm_all(nn.Sequential(*two_layers(), nn.Linear(3, 3)))
    parametrize.remove_parametrizations(model[0], "weight")
    model[2] = nn.Linear(4, 3)
    calls.clear()
    model(torch.ones(2, 4)).sum().backward()
    assert calls == [1]
    del model[3]
    model(torch.ones(2, 4)).sum().backward()
    assert calls == [1]


def test_a_layer_alone_is_a_model(calls):
    layer = spectral_norm_all(nn.Linear(3, 4))
    calls.clear()
    layer(torch.ones(2, 3)).sum().backward()
    assert calls == [1]
    assert_nothing_is_left(layer)


def test_checkpoints_are_those_of_torch():
    torchs, ours = (seeded(Critic) for _ in range(2))
    for layer in torchs.modules():
        if isinstance(layer, KINDS):
            parametrizations.spectral_norm(layer)
    spectral_norm_all(ours)
    assert list(torchs.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    x = batch()
    torch.testing.assert_close(ours.eval()(*x), torchs.eval()(*x))


def test_saving_the_whole_model_is_refused_by_torch(tmp_path):
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(spectral_norm_all(two_layers()), tmp_path / "model.pt")


def test_cast_models_keep_working():
    for dtype in (torch.bfloat16, torch.float64):
        model = spectral_norm_all(two_layers()).to(dtype)
        y = model(torch.ones(2, 4, dtype=dtype))
        assert y.dtype == dtype
        y.sum().backward()


@pytest.mark.parametrize("bound", (None, 0.5))
def test_autocast_leaves_the_vectors_in_float32(bound):
    plain, mixed = (seeded(lambda: spectral_norm_all(two_layers(), bound=bound)) for _ in range(2))
    for _ in range(3):
        x = torch.randn(2, 4)
        plain(x).sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = mixed(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert_same_state(plain, mixed, tolerance=0)


@pytest.mark.parametrize("bound", (None, 0.5))
def test_compiled_training_is_one_graph_and_is_compiled_once(bound):
    torch._dynamo.reset()
    counter = CompileCounter()
    model = seeded(lambda: spectral_norm_all(nn.Sequential(two_layers(), nn.Linear(3, 2)), bound=bound))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for module, run in ((model, compiled), (eager, eager)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            run(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
    assert counter.frame_count == 1
    assert_same_state(model, eager)
    assert_nothing_is_left(model)


def test_compiled_gradients_are_the_eager_ones():
    torch._dynamo.reset()
    model = seeded(lambda: spectral_norm_all(two_layers()))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (compiled, eager):
        for _ in range(2):
            run(torch.ones(3, 4)).square().sum().backward()
    assert_same_state(model, eager)
    assert_same_gradients(model, eager)


def test_functional_calls_and_per_sample_gradients():
    model = spectral_norm_all(two_layers()).eval()
    x = torch.randn(5, 4)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    parameters = dict(model.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


def test_a_functional_call_moves_the_buffers_that_it_is_given():
    models = both(two_layers)
    parameters = {n: t.detach() * 2 for n, t in models[0].named_parameters()}
    before = vectors(models[1])
    results = []
    for model in models:
        buffers = {n: t.clone() for n, t in model.named_buffers()}
        y = torch.func.functional_call(model, (parameters, buffers), (torch.ones(2, 4),))
        results.append((y, *buffers.values()))
        torch.func.grad(lambda p, b, m=model: torch.func.functional_call(m, (p, b), (torch.ones(2, 4),)).sum())(
            parameters, buffers
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, models[1].buffers(), strict=True))
    assert_nothing_is_left(models[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({"modules": nn.Linear}, ["head"]),
        ({"modules": (nn.Conv2d, nn.Embedding)}, ["body.0", "body.2", "label"]),
        ({"exclude": ["body", "head"]}, ["up", "label", "pair"]),
        ({"exclude": "body.2"}, ["up", "body.0", "label", "pair", "head"]),
        (
            {"exclude": lambda name, layer: isinstance(layer, nn.Embedding) or name == "up"},
            ["body.0", "body.2", "pair", "head"],
        ),
    ),
)
def test_which_layers_are_normalised_is_for_the_caller_to_say(options, expected):
    model = spectral_norm_all(Critic(), **options)
    assert [n for n, m in model.named_modules() if parametrize.is_parametrized(m)] == expected
    model(*batch()).sum().backward()


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Sequential has no layer with a 'weight' to normalise"):
        spectral_norm_all(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="exclude: the model has no module called 'haed'"):
        spectral_norm_all(Critic(), exclude=["haed"])
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="run the lazy module once"):
        spectral_norm_all(model)
    with pytest.raises(ValueError, match="bound must be positive"):
        spectral_norm_all(model[0], bound=0)
    assert type(model[0]) is nn.Linear, "what was refused has changed nothing"
    assert not model._forward_pre_hooks


def test_a_convolution_that_is_normalised_as_an_operator_is_left_alone():
    convolution = conv_spectral_norm(nn.Conv2d(1, 2, 3, padding=1), (5, 5))
    model = spectral_norm_all(nn.Sequential(convolution, nn.Flatten(), nn.Linear(50, 3)))
    assert len(model[0].parametrizations.weight) == 1
    assert len(norms_of(model)) == 1
