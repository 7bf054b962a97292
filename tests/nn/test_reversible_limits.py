"""Where `ReversibleSequential` cannot trust its inversion: drift is measured, stored or refused, never passed over."""

import copy
import math
import warnings

import pytest
import torch

from pygen import nn


def couplings(depth, gain=0.4, dropout=0.0, seed=0):
    """Above this gain, 32 random layers blow x up by thousands, and no float32 inverse finds it again."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.AffineCoupling(nn.MLP(4, 8, (16,), dropout=dropout), swap=i % 2 == 1) for i in range(depth)]
    for layer in layers:
        for parameter in layer.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 16
            torch.nn.init.normal_(parameter, std=gain / fan_in**0.5, generator=generator)
    return layers


def inputs(n=64, dtype=torch.float32, seed=1):
    return torch.randn(n, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Diagonal(nn.Transform):
    def __init__(self, log_scale, shift):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor([*log_scale[:1] * 4, *log_scale[1:] * 4]))
        self.shift = torch.nn.Parameter(torch.tensor([*shift[:1] * 4, *shift[1:] * 4]))

    def forward(self, x, context=None):
        return x * self.log_scale.exp() + self.shift, self.log_scale.sum().expand(len(x))

    def inverse(self, z, context=None):
        return (z - self.shift) * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(z))


def exponential(sign):
    """An affine coupling with the scale exp(+-12)."""
    network = torch.nn.Linear(4, 8)
    with torch.no_grad():
        network.weight[:4] *= 1e-6  # its input may be e^12 itself
        network.bias[:4] = 12.0 * sign
    return nn.AffineCoupling(network, scale_map="exp", swap=sign < 0)


def convolution(condition):
    """A 1x1 convolution with singular values from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0] for _ in range(2))
    weight = left @ torch.diag(torch.logspace(0, -math.log10(condition), 8).double()) @ right
    return nn.InvertibleConv1x1.from_matrix(weight, "none").float()


BAD = {
    "exp(12)": lambda: [exponential(1), exponential(-1)],
    "exp(-12)": lambda: [exponential(-1), exponential(1)],
    "condition 1e6": lambda: [convolution(1e6)],
}


def gradients(flow, x):
    z, log_det = flow(x)
    return torch.autograd.grad((z.tanh().sum(1) - log_det).mean(), list(flow.parameters()))


def relative_error(found, expected):
    """The largest root mean square error of a gradient, relative to its own; NaN counts as infinite."""
    pairs = zip(found, expected, strict=True)
    errors = [((f - e).double().norm() / e.double().norm().clamp_min(1e-12)).item() for f, e in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


@pytest.mark.parametrize("name", BAD)
def test_a_badly_conditioned_layer_is_stored_and_its_gradient_right(name):
    layers = [*couplings(2, seed=1), *BAD[name](), *couplings(2, seed=2)]
    reversible, ordinary = nn.ReversibleSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    unchecked = nn.ReversibleSequential(*copy.deepcopy(layers), check=False)
    assert relative_error(gradients(unchecked, inputs()), gradients(ordinary, inputs())) > 1e-3, "or all is well"
    with pytest.warns(UserWarning, match="the tolerance is 1e-04.*from now on those of steps .* are kept"):
        found = gradients(reversible, inputs())
    assert relative_error(found, gradients(ordinary, inputs())) < 1e-5
    assert 0 < len(reversible.stored) < len(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for seed in range(1, 4):
            x = inputs(seed=seed)
            assert relative_error(gradients(reversible, x), gradients(ordinary, x)) < 1e-3


def test_errors_that_shrink_on_the_way_to_x_are_seen():
    """The small half of x is lost in the middle, where it counts; in x itself, beside the large half, nothing shows."""
    layers = [Diagonal([-14.0, 0.0], [0.0, 0.0]), Diagonal([0.0, 0.0], [0.0, 0.0]), Diagonal([0.0, 0.0], [0.0, 1.0])]
    flow, ordinary = nn.ReversibleSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    x = inputs() * Diagonal([0.0, -14.0], [0.0, 0.0]).log_scale.detach().exp()
    assert flow.drift(x)[0] < 1e-6 and flow.drift(x)[1] > 1e-2
    with pytest.warns(UserWarning, match="steps 2 are kept"):
        found = gradients(flow, x)
    assert relative_error(found, gradients(ordinary, x)) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_ordinary_flows_do_not_drift_at_depth_32(dtype):
    flow = nn.ReversibleSequential(*couplings(32)).to(dtype)
    x = inputs(256, dtype)
    drift = flow.drift(x)
    assert 0 < drift.max() < {torch.float64: 1e-10, torch.float32: 1e-4}[dtype] / 10
    with torch.no_grad():
        back = flow.inverse(flow(x)[0])[0]
    error = (back - x).double().square().mean(1).sqrt().max() / x.double().square().mean().sqrt()
    torch.testing.assert_close(drift[0], error, rtol=1e-3, atol=0)


def test_round_trip_of_bfloat16_at_depth_32():
    """In root mean square with bfloat16 throughout; in every element where only the networks are bfloat16."""
    flow, x = nn.Sequential(*couplings(32)), inputs(256)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = flow.inverse(flow(x)[0])[0]
        flow, x16 = flow.bfloat16(), x.bfloat16()
        plain = flow.inverse(flow(x16)[0])[0]
    assert (mixed - x).abs().max() <= 2e-2
    assert (plain - x16).float().square().mean().sqrt() <= 2e-2


def test_bfloat16_stores_where_it_must():
    flow = nn.ReversibleSequential(*couplings(32)).bfloat16()
    ordinary = nn.Sequential(*copy.deepcopy(list(flow))).bfloat16()
    x = inputs(256, torch.bfloat16)
    with pytest.warns(UserWarning, match="tolerance is 2e-02"):
        found = gradients(flow, x)
    assert 0 < len(flow.stored) <= 16
    assert relative_error(found, gradients(ordinary, x)) == 0, "recomputed from the stored inputs bit by bit"


def test_calibrate_stores_ahead_of_the_first_backward():
    layers = [*couplings(2, seed=1), *BAD["condition 1e6"](), *couplings(2, seed=2)]
    flow = nn.ReversibleSequential(*layers)
    assert flow.calibrate(inputs()) == flow.stored != ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(flow, inputs())
    healthy = nn.ReversibleSequential(*couplings(4))
    assert healthy.calibrate(inputs()) == ()


def test_never_storing_is_an_error_where_it_would_be_needed():
    flow = nn.ReversibleSequential(*BAD["condition 1e6"](), store="never")
    with pytest.raises(RuntimeError, match=r"relative error of .*tolerance is 1e-04.*store=\"auto\""):
        gradients(flow, inputs())
    gradients(nn.ReversibleSequential(*couplings(4), store="never"), inputs())


def test_always_storing_needs_no_inverse(monkeypatch):
    layers = [*couplings(2, seed=1), *BAD["condition 1e6"]()]
    flow = nn.ReversibleSequential(*layers, store="always")
    for step in flow.steps:
        monkeypatch.setattr(step, "inverse", lambda *_: pytest.fail("must not be inverted"))
    ordinary = nn.Sequential(*copy.deepcopy(layers))
    assert flow.stored == (0, 1, 2)
    assert relative_error(gradients(flow, inputs()), gradients(ordinary, inputs())) < 1e-6


def test_a_layer_without_an_inverse_is_stored_from_the_start():
    class Forward(nn.Transform):
        def forward(self, x, context=None):
            return x.sinh(), x.cosh().log().sum(1)

    layers = [*couplings(1), Forward(), *couplings(1, seed=1)]
    flow, ordinary = nn.ReversibleSequential(*layers), nn.Sequential(*layers)
    assert flow.stored == (1,) and flow.drift(inputs())[1] == math.inf
    assert relative_error(gradients(flow, inputs()), gradients(ordinary, inputs())) < 1e-5


def test_the_tolerance_is_the_callers():
    flow = nn.ReversibleSequential(*couplings(8), tolerance=1e-12)
    with pytest.warns(UserWarning, match="tolerance is 1e-12"):
        gradients(flow, inputs())
    assert len(flow.stored) > 0


@pytest.mark.parametrize("value", (math.inf, math.nan, 1e38))
def test_a_sample_that_is_not_finite_behaves_as_ever_and_stores_nothing(value):
    layers = couplings(4)
    reversible, ordinary = nn.ReversibleSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    x = inputs()
    x[3, 5] = value
    for flow in (reversible, ordinary):
        flow.zero_grad()
        z, log_det = flow(x)
        (z.tanh().sum(1) - log_det)[torch.arange(64) != 3].sum().backward()
    for mine, theirs in zip(reversible.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, equal_nan=True)
    assert reversible.stored == () or value == 1e38


def test_dropout_is_drawn_again_when_the_gradient_is_computed_twice():
    layers = [*couplings(2, seed=1, dropout=0.5), *BAD["condition 1e6"](), *couplings(2, seed=2, dropout=0.5)]
    reversible, ordinary = nn.ReversibleSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    results, after = [], []
    with pytest.warns(UserWarning):
        for flow in (reversible, ordinary):
            torch.manual_seed(0)
            results.append(gradients(flow, inputs()))
            after.append(torch.rand(3))
    assert relative_error(*results) < 1e-5 and torch.equal(*after)


# ---- refusals ----


@pytest.mark.parametrize("linear", (False, True))
def test_second_derivatives_are_refused_also_where_they_would_count_as_zero(linear):
    flow = nn.ReversibleSequential(*couplings(2)).double()
    x = inputs(4, torch.float64).requires_grad_()
    z, log_det = flow(x)
    loss = z.sum() + log_det.sum() if linear else z.square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported, use nn.Sequential"):
        (grad.square().sum() + x.sum()).backward()


def test_forward_mode_is_refused_by_the_layers():
    flow = nn.ReversibleSequential(*couplings(2))
    with pytest.raises(NotImplementedError):
        torch.func.jvp(flow, (inputs(),), (inputs(),))


def test_parameters_changed_since_the_forward_are_refused():
    flow = nn.ReversibleSequential(*couplings(2))
    z, _ = flow(inputs())
    with torch.no_grad():
        flow[0].conditioner.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(16, 4\) was modified between forward and backward"):
        z.sum().backward()


def test_inputs_changed_since_the_forward_are_refused():
    flow = nn.ReversibleSequential(*couplings(2))
    x = inputs()
    z, _ = flow(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("store", ("auto", "always"))
def test_a_layer_that_does_not_repeat_itself_is_refused(store):
    class Counting(nn.Transform):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, context=None):
            self.calls += 1
            return x * self.calls, self.calls.log().expand(len(x))

        def inverse(self, z, context=None):
            return z / self.calls, -self.calls.log().expand(len(z))

    flow = nn.ReversibleSequential(*couplings(1), Counting(), *couplings(1), store=store)
    z, _ = flow(inputs())
    flow(inputs())
    with pytest.raises(RuntimeError, match=r"step 1 \(Counting\) computes something else when it runs again"):
        z.sum().backward()


def test_tensors_from_elsewhere_are_refused_before_their_gradient_is_lost():
    class Borrowing(torch.nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.tensors = [tensor]

        def forward(self, x):
            return torch.cat((x * self.tensors[0], x), 1)

    for borrowed in (torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True).exp()):
        flow = nn.ReversibleSequential(nn.Permutation.reverse(8), nn.AffineCoupling(Borrowing(borrowed)))
        z, _ = flow(inputs().requires_grad_())
        with pytest.raises(RuntimeError, match=r"step 1 \(AffineCoupling\) uses a tensor of shape \(4,\)"):
            z.sum().backward()


def test_bad_options_are_a_sentence():
    with pytest.raises(ValueError, match="store must be one of auto, never, always, got 'sometimes'"):
        nn.ReversibleSequential(store="sometimes")
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        nn.ReversibleSequential(tolerance=0)
    with pytest.raises(TypeError, match="context must be a tensor or None, got list"):
        nn.ReversibleSequential(*couplings(1))(inputs(), [1])
    with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        nn.ReversibleSequential(*couplings(1))(torch.zeros(2, 8, dtype=torch.int64))
