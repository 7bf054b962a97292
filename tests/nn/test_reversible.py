"""`ReversibleSequential`: the gradients of ordinary backpropagation in memory that does not grow with depth."""

import copy
import pickle
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch

from pygen import models, nn


def randomized(layers, gain=0.5, seed=0):
    """Conditioners start at zero; here they do something: weights of gain / sqrt(fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for parameter in getattr(layer, "conditioner", layer).parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            torch.nn.init.normal_(parameter, std=gain / fan_in**0.5, generator=generator)
    return layers


def vector_layers(depth, *, context=2, dropout=0.0, hidden=16, gain=0.5, kind=nn.AffineCoupling):
    outputs = 8 if kind is nn.AffineCoupling else 4
    layers = []
    for i in range(depth):
        conditioner = nn.MLP(4, outputs, (hidden,), context_features=context, dropout=dropout, activation="silu")
        layers.append(kind(conditioner, swap=i % 2 == 1))
    layers = randomized(layers, gain)
    return [nn.Permutation.random(8, generator=torch.Generator().manual_seed(1)), *layers]


def masked_layers():
    mask = nn.alternating_mask(8)
    return randomized(
        [
            nn.AffineCoupling(nn.MLP(8, 16, (8,), context_features=2), mask=mask, swap=i % 2 == 1, scale_map="sigmoid")
            for i in range(4)
        ]
    )


def spline_layers():
    return randomized(
        [
            nn.RationalQuadraticCoupling(nn.MLP(4, 44, (8,), context_features=2), swap=i % 2 == 1, num_bins=4)
            for i in range(4)
        ]
    )


def image_layers():
    """Flattened to an image, squeezed, three steps of Glow, and back."""
    steps = [nn.GlowStep(8, nn.ConvNet(4, 8, 4, 1, context_features=2, activation="silu")) for _ in range(3)]
    randomized([step[1] for step in steps])
    inside = nn.ReversibleSequential(nn.Sequential(*steps[1:]), nn.Reshape((8, 1, 1), (8,)))
    return [nn.Reshape((8,), (2, 2, 2)), nn.Squeeze(), steps[0], inside]


FLOWS = {
    "affine": lambda: vector_layers(6),
    "additive": lambda: vector_layers(4, kind=nn.AdditiveCoupling),
    "masked": masked_layers,
    "spline": spline_layers,
    "glow, nested": image_layers,
}

LOSSES = {
    "z": lambda z, log_det, w: z.tanh().sum(),
    "log_det": lambda z, log_det, w: log_det.square().sum(),
    "log_prob": lambda z, log_det, w: (z.square().sum(1) / 2 - log_det).mean(),
    "both, not separable": lambda z, log_det, w: (z.sin().sum(1) * log_det.exp() * w).sum(),
}


def twins(layers, dtype=torch.float64, **options):
    """The same layers, reversible and ordinary."""
    return nn.ReversibleSequential(*layers, **options).to(dtype), nn.Sequential(*copy.deepcopy(layers)).to(dtype)


def batch(n=5, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator, dtype=dtype)
    context = torch.randn(n, 2, generator=generator, dtype=dtype)
    return x, context, torch.rand(n, generator=generator, dtype=dtype)


def gradients(flow, x, context, loss):
    """Of the loss with respect to x, context (if any) and all parameters."""
    x = x.detach().requires_grad_()
    context = None if context is None else context.detach().requires_grad_()
    sources = [x, *([] if context is None else [context]), *flow.parameters()]
    return torch.autograd.grad(loss(*flow(x, context)), sources, allow_unused=True)


def assert_same_gradients(found, expected, tolerance=1e-9):
    """By the relative root mean square error of each; what is 1e-6 of all or less is rounding, and compared to that."""
    floor = 1e-6 * sum(theirs.double().square().sum() for theirs in expected if theirs is not None) ** 0.5
    for mine, theirs in zip(found, expected, strict=True):
        if theirs is None or mine is None:
            assert (mine is None or not mine.any()) and (theirs is None or not theirs.any())
        else:
            assert mine.dtype == theirs.dtype
            error, size = (mine - theirs).double().norm(), max(theirs.double().norm(), floor)
            assert error <= tolerance * size, f"relative error {error / size:.1e}"


# ---- exact ----


# An additive flow's log_det is constant, and ordinary backpropagation refuses it as a loss.
@pytest.mark.parametrize(("name", "loss"), [pair for pair in product(FLOWS, LOSSES) if pair != ("additive", "log_det")])
def test_results_and_gradients_are_those_of_ordinary_backpropagation(name, loss):
    reversible, ordinary = twins(FLOWS[name]())
    x, context, w = batch()
    for flow in (reversible, ordinary):
        flow(x, context)  # ActNorm takes its first batch
    for mine, theirs in zip(reversible(x, context), ordinary(x, context), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    found, expected = (gradients(f, x, context, lambda *out: LOSSES[loss](*out, w)) for f in (reversible, ordinary))
    assert_same_gradients(found, expected)
    assert reversible.stored == ()


def test_per_sample_weights_of_log_det_are_exact_residual_flows():
    """residual-flows' memory-efficient log-det takes the first sample's weight for the whole batch."""
    reversible, ordinary = twins(vector_layers(4, context=0))
    x, _, _ = batch()
    for w in torch.eye(5, dtype=torch.float64):
        loss = lambda z, log_det, w=w: (w * (log_det - z.square().sum(1) / 2)).sum()  # noqa: E731
        found = gradients(reversible, x, None, loss)
        assert_same_gradients(found, gradients(ordinary, x, None, loss))
        assert torch.equal(found[0].abs().sum(1) > 0, w > 0), "one sample's gradient must not reach another"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_in_lower_precision_are_as_good_as_ordinary_ones(dtype):
    reversible, ordinary = twins(vector_layers(8), dtype)
    exact = copy.deepcopy(ordinary).double()
    x, context, _ = batch(64, dtype)
    loss = lambda z, log_det: (z.square().sum(1) / 2 - log_det).mean()  # noqa: E731
    truth = gradients(exact, x.double(), context.double(), loss)
    off = []
    for flow in (reversible, ordinary):
        found = gradients(flow, x, context, loss)
        off.append(max((g - t).norm() / t.norm() for g, t in zip(found, truth, strict=True)))
    assert off[0] <= 1.5 * off[1] + torch.finfo(dtype).eps


def test_autograd_grad_of_any_subset_memcnn():
    """MemCNN frees and refills storages, so torch.autograd.grad does not work there."""
    reversible, ordinary = twins(vector_layers(4))
    x, context, _ = batch()

    def subset(flow, *names):
        values = {**dict(flow.named_parameters()), "x": x.clone().requires_grad_(), "c": context.clone()}
        values["c"].requires_grad_()
        z, log_det = flow(values["x"], values["c"])
        return torch.autograd.grad(z.square().sum() - log_det.sum(), [values[name] for name in names])

    weight = "transforms.3.conditioner.layers.0.weight"
    for names in (("x",), ("c",), (weight,), ("x", weight), ("c", weight)):
        assert_same_gradients(subset(reversible, *names), subset(ordinary, *names))


def test_backward_can_be_repeated_while_the_graph_is_kept():
    flow = nn.ReversibleSequential(*vector_layers(3)).double()
    x, context, _ = batch()
    z, log_det = flow(x, context)
    parameters = list(flow.parameters())
    first = torch.autograd.grad(z.sum() + log_det.sum(), parameters, retain_graph=True)
    again = torch.autograd.grad(z.sum() + log_det.sum(), parameters)
    assert all(map(torch.equal, first, again))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z.sum(), parameters)


# ---- memory ----


class Witness(torch.nn.Module):
    """A conditioner that counts how many of its hidden activations are alive."""

    def __init__(self, alive, peak):
        super().__init__()
        self.net, self.alive, self.peak = nn.MLP(4, 8, (16,)), alive, peak

    def forward(self, x):
        hidden = self.net.layers[:2](x)
        self.alive.add(hidden)
        self.peak[0] = max(self.peak[0], len(self.alive))
        return self.net.layers[2:](hidden)


def memory(container, depth):
    """(bytes saved by the forward besides parameters, most hidden activations alive at once until the gradient)"""
    alive, peak, saved = weakref.WeakSet(), [0], {}
    flow = container(*(nn.AffineCoupling(Witness(alive, peak), swap=i % 2 == 1) for i in range(depth)))
    own = {parameter.data_ptr() for parameter in flow.parameters()}

    def count(tensor):
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        z, log_det = flow(torch.randn(256, 8))
    (z.square().sum() - log_det.sum()).backward()
    return sum(saved.values()), peak[0]


def test_memory_does_not_grow_with_depth_memcnn_41():
    small, large = memory(nn.ReversibleSequential, 4), memory(nn.ReversibleSequential, 32)
    assert small == large
    assert small[1] <= 2, "one step's graph must go before the next one comes"
    ordinary = memory(nn.Sequential, 32)
    assert ordinary[1] == 32 and large[0] * 8 < ordinary[0], "or this test could not fail"


def test_what_a_forward_keeps_is_freed_with_it():
    flow = nn.ReversibleSequential(*vector_layers(3, context=0))
    x = torch.randn(4, 8)
    z, log_det = flow(x)
    reference = weakref.ref(z.grad_fn)
    (z.sum() + log_det.sum()).backward()
    del z, log_det
    assert reference() is None, "a reference cycle would wait for the garbage collector"


# ---- inside other code ----


class InPlace(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.before, self.flow = torch.nn.Linear(8, 8), flow

    def forward(self, x, context=None):
        z, log_det = self.flow(self.before(x).relu_())
        z.mul_(2).relu_()
        return z, log_det.mul_(3)


def test_in_place_operations_and_relus_around_the_block_memcnn_70():
    pair = [InPlace(flow).double() for flow in twins(vector_layers(4, context=0))]
    pair[1].load_state_dict(pair[0].state_dict())
    x, _, _ = batch()
    found, expected = (gradients(m, x, None, lambda z, d: z.sum() + d.sum()) for m in pair)
    assert_same_gradients(found, expected)


def test_frozen_layers_and_inputs_without_gradient():
    x, context, _ = batch()
    for frozen in ((1, 2), (3, 4), (1, 2, 3, 4)):
        reversible, ordinary = twins(vector_layers(4))
        for flow in (reversible, ordinary):
            for k in frozen:
                flow[k].requires_grad_(False)
        for needs_x in (False, True):
            results = []
            for flow in (reversible, ordinary):
                inputs = x.clone().requires_grad_(needs_x)
                z, log_det = flow(inputs, context)
                assert z.requires_grad == (needs_x or len(frozen) < 4)
                if z.requires_grad:
                    sources = [p for p in flow.parameters() if p.requires_grad] + [inputs] * needs_x
                    results.append(torch.autograd.grad(z.sin().sum() + log_det.sum(), sources))
            assert_same_gradients(*results or ([], []))


def test_steps_below_the_last_trainable_one_are_not_inverted(monkeypatch):
    flow = nn.ReversibleSequential(*vector_layers(4, context=0))
    for k in (1, 2, 3):
        flow[k].requires_grad_(False)
        monkeypatch.setattr(flow[k], "retrace", lambda *_: pytest.fail("needless work"))
    flow(torch.randn(4, 8))[0].sum().backward()
    assert flow[4].conditioner.layers[0].weight.grad is not None


def test_without_parameters_gradients_pass_through():
    flow = nn.ReversibleSequential(nn.Permutation.reverse(3), nn.Reshape((3,), (3, 1)))
    x = torch.randn(2, 3, requires_grad=True)
    z, log_det = flow(x)
    z.backward(torch.tensor([1.0, 2.0, 3.0])[:, None].expand(2, 3, 1))
    assert torch.equal(x.grad, torch.tensor([3.0, 2.0, 1.0]).expand(2, 3)) and not log_det.any()


def test_empty_sequence_and_empty_batch():
    x = torch.randn(3, 2, requires_grad=True)
    z, log_det = nn.ReversibleSequential()(x)
    assert z is x and torch.equal(log_det, torch.zeros(3))
    flow = nn.ReversibleSequential(*vector_layers(2, context=0))
    z, log_det = flow(torch.empty(0, 8))
    (z.sum() + log_det.sum()).backward()
    assert z.shape == (0, 8) and all(not p.grad.any() for p in flow.parameters())


def test_it_is_interchangeable_with_sequential():
    reversible, ordinary = twins(vector_layers(3), torch.float32)
    assert list(reversible.state_dict()) == list(ordinary.state_dict())
    fresh = nn.ReversibleSequential(*vector_layers(3, gain=0.1))
    fresh.load_state_dict(ordinary.state_dict())
    x, context, _ = batch(dtype=torch.float32)
    for flow in (fresh, copy.deepcopy(reversible), pickle.loads(pickle.dumps(reversible))):
        assert torch.equal(flow(x, context)[0], ordinary(x, context)[0])
        assert all(p.grad is None for p in flow.parameters())
        flow(x, context)[0].sum().backward()
        assert all(p.grad is not None for p in list(flow.parameters()))
    with torch.no_grad():
        z, log_det = reversible(x, context)
    assert not z.requires_grad and torch.equal(z, ordinary(x, context)[0])
    torch.testing.assert_close(reversible.inverse(z, context)[0], x, rtol=0, atol=1e-5)


def test_a_flow_model_trains_samples_and_evaluates_with_it():
    torch.manual_seed(0)
    layers = vector_layers(4, context=0)
    pair = [models.Flow(c(*copy.deepcopy(layers)), (8,), levels=None, alpha=0.05, config={}) for c in CONTAINERS]
    x = torch.randn(32, 8) * 3
    for model in pair:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        model.eval()
    torch.testing.assert_close(pair[0].log_prob(x), pair[1].log_prob(x), rtol=1e-4, atol=1e-4)
    assert pair[0].sample(3).shape == (3, 8)


CONTAINERS = (nn.ReversibleSequential, nn.Sequential)


def test_shared_parameters_add_up_and_hooks_run_once():
    layers = vector_layers(4)
    layers[3].conditioner = layers[1].conditioner
    reversible, ordinary = twins(layers)
    calls = []
    for flow in (reversible, ordinary):
        flow[1].conditioner.layers[0].weight.register_hook(lambda g: calls.append(1) or g * 2)
    x, context, w = batch()
    found, expected = (gradients(f, x, context, lambda z, d: (z.sum(1) * w + d).sum()) for f in (reversible, ordinary))
    assert_same_gradients(found, expected)
    assert len(calls) == 2


def test_parameters_given_by_functional_call_get_the_gradient():
    reversible, ordinary = twins(vector_layers(3, context=0))
    x, _, _ = batch()
    results = []
    for flow in (reversible, ordinary):
        given = {name: (p.detach() * 1.1).requires_grad_() for name, p in flow.named_parameters()}
        z, log_det = torch.func.functional_call(flow, given, (x,))
        results.append(torch.autograd.grad(z.sin().sum() + log_det.sum(), list(given.values())))
    assert_same_gradients(*results)


def test_torch_func_differentiates_the_layers_themselves():
    reversible, ordinary = twins(vector_layers(3, context=0))
    x, _, _ = batch()
    found, expected = (torch.func.vmap(torch.func.grad(lambda s, f=f: f(s[None])[0].sin().sum()))(x) for f in
                       (reversible, ordinary))  # fmt: skip
    assert torch.equal(found, expected)


class Recurrent(torch.nn.Module):
    """A conditioner whose layer keeps a list of its weights, beside the parameters that every module has."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = torch.nn.GRU(1, 4, batch_first=True), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x.unsqueeze(-1))[0]).permute(0, 2, 1).flatten(1)


def test_recurrent_conditioners():
    reversible, ordinary = twins([nn.AffineCoupling(Recurrent(), swap=i % 2 == 1) for i in range(2)])
    x, _, _ = batch()
    found, expected = (gradients(f, x, None, lambda z, d: z.sin().sum() + d.sum()) for f in (reversible, ordinary))
    assert_same_gradients(found, expected)


# ---- state ----


class Wobble(nn.Transform):
    """Scales by random numbers; its retrace is the generic one, which draws them twice."""

    def forward(self, x, context=None):
        scale = torch.rand_like(x) + 0.5
        return x * scale, scale.log().sum(1)

    def inverse(self, z, context=None):
        scale = torch.rand_like(z) + 0.5
        return z / scale, -scale.log().sum(1)


def test_dropout_and_other_random_numbers_are_drawn_again_and_leave_no_trace():
    layers = vector_layers(4, dropout=0.5)
    reversible, ordinary = twins([*layers[:3], Wobble(), *layers[3:]])
    x, context, _ = batch()
    results, after = [], []
    for flow in (reversible, ordinary):
        torch.manual_seed(3)
        results.append(gradients(flow, x, context, lambda z, d: z.sin().sum() + d.sum()))
        after.append(torch.rand(4))
    assert_same_gradients(*results)
    assert torch.equal(*after), "the backward must leave the generator where it was"
    assert reversible.stored == ()


def test_first_batch_of_actnorm_goes_through():
    reversible, ordinary = twins(image_layers())
    x, context, _ = batch()
    found, expected = (gradients(f, x, context, lambda z, d: z.sin().sum() + d.sum()) for f in (reversible, ordinary))
    assert_same_gradients(found, expected)


def test_batch_norm_counts_every_batch_once():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))

        def forward(self, x):
            return self.net(x)

    reversible, ordinary = twins([nn.AffineCoupling(Normed(), swap=i % 2 == 1) for i in range(3)])
    x, _, _ = batch()
    found, expected = (gradients(f, x, None, lambda z, d: z.sin().sum() + d.sum()) for f in (reversible, ordinary))
    assert_same_gradients(found, expected)
    for mine, theirs in zip(reversible.buffers(), ordinary.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_autocast_is_that_of_the_forward():
    reversible, ordinary = twins(vector_layers(6), torch.float32)
    x, context, _ = batch(64, torch.float32)
    results = []
    for flow in (reversible, ordinary):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, log_det = flow(inputs, context)
            loss = (z.square().sum(1) / 2 - log_det).mean()
        results.append(torch.autograd.grad(loss, [inputs, *flow.parameters()]))
    in_float32 = gradients(ordinary, x, context, lambda z, d: (z.square().sum(1) / 2 - d).mean())[2:]
    assert_same_gradients(*results, tolerance=2e-3)
    with pytest.raises(AssertionError, match="relative error"):  # bfloat16 and float32 can be told apart
        assert_same_gradients(results[0][1:], in_float32, tolerance=2e-3)


def test_weights_cast_under_no_grad_are_not_handed_to_others_by_autocast():
    flow = nn.ReversibleSequential(*vector_layers(1, context=0))
    conditioner = flow[1].conditioner
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow(x)
        out = conditioner(x[:, :4])
    out.sum().backward()
    assert conditioner.layers[0].weight.grad.any()


def test_torch_compile_steps_over_it_cleanly():
    torch.compiler.reset()
    reversible, ordinary = twins(vector_layers(3, context=0))
    x, _, _ = batch()

    def loss_of(flow):
        def loss(x):
            z, log_det = flow(x * 2)
            return (z.square().sum(1) / 2 - log_det).mean()

        return loss

    graphs = []
    compiled = torch.compile(loss_of(reversible), backend=lambda graph, _: graphs.append(graph) or graph)
    parameters = [list(flow.parameters()) for flow in (reversible, ordinary)]
    found = torch.autograd.grad(compiled(x), parameters[0])
    assert_same_gradients(found, torch.autograd.grad(loss_of(ordinary)(x), parameters[1]))
    assert len(graphs) == 2, "one graph before the flow, one after it"


def test_two_processes_average_their_gradients(tmp_path):
    script = Path(__file__).with_name("two_processes_reversible.py")
    subprocess.run([sys.executable, script, tmp_path / "store"], check=True, timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", (False, True))
def test_cuda_dropout_and_autocast(autocast):
    pair = [flow.cuda() for flow in twins(vector_layers(6, dropout=0.3), torch.float32)]
    x, context, _ = (t.cuda() for t in batch(64, torch.float32))
    results = []
    for flow in pair:
        torch.manual_seed(3)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            z, log_det = flow(x, context)
            loss = (z.square().sum(1) / 2 - log_det).mean()
        results.append(torch.autograd.grad(loss, list(flow.parameters())))
    assert_same_gradients(*results, tolerance=1e-2 if autocast else 1e-4)
