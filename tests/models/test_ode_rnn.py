"""Solutions of ODERNN against closed forms and scipy's solvers, their gradients against finite differences."""

import math

import numpy as np
import pytest
import torch
from ode_fields import F64, TRUE, competition, decay, forced, net, nn_with_time, oscillator
from scipy.integrate import solve_ivp
from torch import nn

from pygen.models import _ode_solver
from pygen.models.ode_rnn import ODERNN, Diverged

METHODS = ("euler", "midpoint", "rk4")


# ---- the steps


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_halving_the_step_divides_the_error_by_two_to_the_order(method, order):
    errors = []
    for step in (0.05, 0.025):
        x = ODERNN(oscillator, {"w": 2.0}, step=step, method=method)([1.0, 0.0], [1.0])[0]
        errors.append((x - torch.tensor([math.cos(2), -2 * math.sin(2)], dtype=F64)).norm().item())
    # the next order's share of the error is about step * w / 2 = 0.05 of it
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("f, parameters, x0", [(competition, TRUE, [100.0, 150.0]), (forced, {"mu": 1.5}, [1.0, -0.5])])
def test_small_steps_of_rk4_are_the_solution_that_scipy_finds(f, parameters, x0):
    times = [0.0, 0.37, 2.0, math.pi, 5.005]
    model = ODERNN(f, parameters, step=0.01, method="rk4")
    p = dict(model.theta.items())

    def right_hand_side(t, x):
        row = torch.from_numpy(np.array(x))[None]
        return f(row, torch.full((1, 1), t, dtype=F64), p)[0].detach().numpy()

    expected = solve_ivp(right_hand_side, (0, 5.005), x0, "DOP853", times, rtol=1e-11, atol=1e-11).y.T
    # RK4's own error: (0.01 * 3)^4 / 120 a step at the worst slope of the second system, 500 steps
    torch.testing.assert_close(model(x0, times).detach(), torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


def test_steps_of_all_methods_are_their_formulas():
    """One step, written out in numpy."""
    x, t, h, k = np.array([1.0, -0.5]), 0.3, 0.2, 1.5

    def f(x, t):
        return np.array([x[1], k * (1 - x[0] ** 2) * x[1] - x[0] + math.sin(t)])

    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    expected = {"euler": x + h * k1, "midpoint": x + h * k2, "rk4": x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6}
    for method in METHODS:
        one = ODERNN(forced, {"mu": k}, step=h, method=method)(x, [t + h], t0=t)
        np.testing.assert_allclose(one.detach().numpy()[0], expected[method], rtol=1e-15)


def test_times_off_the_grid_are_hit_exactly_by_a_shorter_last_step():
    model = ODERNN(decay, {"k": 1.0}, step=0.5)
    x = model([1.0], [0.25, 1.0, 2.6])[:, 0].tolist()
    first = 1 - 0.25
    second = first * (1 - 0.5) * (1 - 0.25)
    assert x == pytest.approx([first, second, second * 0.5**3 * (1 - 0.1)], rel=1e-14)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_times_on_the_grid_but_for_rounding_get_no_extra_step(dtype):
    times = np.arange(1, 200, dtype=dtype) * dtype(0.1)  # 3 * 0.1 is more than 0.3, and 0.1 in float32 is not 0.1
    steps = _ode_solver.grid(times[:, None].astype(float), 0.0, 0.1)
    assert steps.at[:, 0].tolist() == list(range(1, 200))
    np.testing.assert_allclose(steps.t[1:, 0, 0], times[:-1], rtol=1e-15)


def test_the_state_at_the_start_and_at_equal_times_is_the_same_state():
    x = ODERNN(decay, {"k": 1.0}, step=0.1)([2.0], [0.0, 0.0, 1.0, 1.0])[:, 0]
    assert x[0] == x[1] == 2 and x[2] == x[3] < 1
    start = torch.tensor([2.0], dtype=F64, requires_grad=True)
    ODERNN(decay, {"k": 1.0}, step=0.1)(start, [0.0]).sum().backward()
    assert start.grad.item() == 1


def test_numbers_of_parameters_are_not_rounded_to_float32():
    model = ODERNN(decay, {"k": 0.1, "list": [0.1, 0.3], "tensor": torch.tensor(0.1)}, step=0.1)
    assert model.theta["k"].item() == 0.1 and model.theta["list"].tolist() == [0.1, 0.3]
    assert model.theta["tensor"].item() == torch.tensor(0.1).item() and model.theta["tensor"].dtype == F64
    assert list(model.theta) == ["k", "list", "tensor"]


def test_a_tiny_interval_is_a_step():
    x = ODERNN(lambda x, t: torch.ones_like(x), step=1.0)([0.0], [1e-9, 2e-9])
    assert x.flatten().tolist() == [1e-9, 2e-9]


def test_trajectory_is_the_solution_after_every_step():
    model = ODERNN(oscillator, {"w": 1.0}, step=0.3, method="rk4")
    t, x = model.trajectory([1.0, 0.0], 2.0, t0=1.0)
    torch.testing.assert_close(t, torch.tensor([1.0, 1.3, 1.6, 1.9, 2.0], dtype=F64))
    torch.testing.assert_close(x, model([1.0, 0.0], t, t0=1.0), rtol=1e-14, atol=0)
    assert model.trajectory(torch.ones(3, 2), 2.0)[1].shape == (8, 3, 2)
    t, x = model.trajectory([1.0, 0.0], 0.0)
    assert t.tolist() == [0] and x.tolist() == [[1, 0]]


# ---- batches


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_trajectories_one_by_one(method):
    x0 = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    model = ODERNN(forced, {"mu": 1.0}, step=0.1, method=method)
    together = model(x0, [0.55, 1.0])
    assert together.shape == (2, 5, 2)
    torch.testing.assert_close(together, torch.stack([model(x, [0.55, 1.0]) for x in x0], 1))


@pytest.mark.parametrize("method", METHODS)
def test_each_trajectory_has_times_of_its_own(method):
    x0 = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([[0.1, 0.25, 1.0], [0.33, math.nan, 2.0], [math.nan, 0.7, math.nan]], dtype=F64)
    model = ODERNN(forced, {"mu": 1.0}, step=0.1, method=method)
    x = model(x0, times)
    torch.testing.assert_close(x[:2, 0], model(x0[0], [0.1, 0.33]))
    torch.testing.assert_close(x[[0, 2], 1], model(x0[1], [0.25, 0.7]))
    torch.testing.assert_close(x[:2, 2], model(x0[2], [1.0, 2.0]))
    assert torch.equal(x[2, 0], x[1, 0])  # nothing more is asked of it
    everything = torch.ones(3, 3, 2, dtype=F64)
    observed = ~times.isnan()
    expected = (x - everything)[observed].square().mean()
    torch.testing.assert_close(model.loss(x0, times, everything), expected)


def test_lists_and_other_dtypes_of_starts_become_those_of_the_parameters():
    model = ODERNN(decay, {"k": 1.0}, step=0.1)
    for x0 in ([1, 2], np.array([1, 2]), torch.tensor([1, 2]), torch.tensor([1.0, 2.0])):
        assert model(x0, [1]).dtype == F64
    assert model.float()([1, 2], [1]).dtype == torch.float32
    assert ODERNN(lambda x, t: -x, step=0.1)(torch.ones(1), [1]).dtype == torch.float32


# ---- gradients


def solved(f, parameters, times, **options):
    """A function of the start and the parameters."""
    model = ODERNN(f, parameters, step=0.15, **options)

    def run(x0, *values):
        tensors = {f"theta.{name}": value for name, value in zip(parameters, values, strict=True)}
        return torch.func.functional_call(model, tensors, (x0, times))

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"gradient": "unrolled"}, {"checkpoint_every": 2}], ids=str)
def test_gradients_are_those_of_finite_differences(method, options):
    times = torch.tensor([[0.1, 0.2], [0.5, 0.2], [0.7, math.nan]])
    x0 = torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mu = torch.tensor(0.7, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solved(forced, {"mu": 0.7}, times, method=method, **options), (x0, mu))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"checkpoint_every": 7}, {"gradient": "unrolled", "checkpoint_every": 7}], ids=str
)
def test_all_steps_at_once_and_in_segments_give_the_gradient_of_one_by_one(method, options):
    f = net().double()
    x0 = torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    times = [0.33, 1.0, 2.0]

    def gradients(**options):
        model, start = ODERNN(f, step=0.1, method=method, **options), x0.clone().requires_grad_()
        loss = model.loss(start, times, torch.ones(3, 3, 2))
        return torch.autograd.grad(loss, [start, *model.parameters()])

    # only the order of sums differs
    torch.testing.assert_close(gradients(**options), gradients(gradient="unrolled"), rtol=1e-10, atol=1e-13)


def saved_by_autograd(model):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model([1.0, 0.5], [20.0])
    return sum(sizes)


@pytest.mark.parametrize("gradient", ["auto", "unrolled"])
def test_checkpoints_keep_less(gradient):
    whole = saved_by_autograd(ODERNN(forced, {"mu": 1.0}, step=0.1, method="rk4", gradient="unrolled"))
    assert (
        saved_by_autograd(ODERNN(forced, {"mu": 1.0}, step=0.1, method="rk4", gradient=gradient, checkpoint_every=20))
        < 0.1 * whole
    )


def test_a_gradient_for_the_start_alone_and_for_some_parameters():
    model = ODERNN(oscillator, {"w": 1.3}, step=0.1)
    model.theta["w"].requires_grad_(False)
    x0 = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x0, [1.0]).sum(), x0)
    assert gradient.abs().min() > 0.1
    assert not model(x0.detach(), [1.0]).requires_grad
    with torch.no_grad():
        assert not model(x0, [1.0]).requires_grad


def test_a_parameter_that_f_does_not_use_has_no_gradient():
    model = ODERNN(decay, {"k": 1.0, "idle": 2.0}, step=0.1)
    model([1.0], [1.0]).sum().backward()
    assert model.theta["k"].grad is not None and not model.theta["idle"].grad


def test_rows_that_depend_on_one_another_get_the_gradient_of_one_step_after_the_other():
    def mean_field(x, t, p):
        return p["k"] * (x.mean(0) - x) - 0.1 * x**2

    x0 = torch.randn(4, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    k = torch.tensor(0.5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(solved(mean_field, {"k": 0.5}, [1.0]), (x0, k))


def test_dropout_gets_the_gradient_of_what_was_computed():
    torch.manual_seed(0)
    model = ODERNN(nn_with_time(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))), step=0.25)
    x = model([1.0, 0.5], [1.0])
    (gradient,) = torch.autograd.grad(x.sum(), [model.f.layers[2].bias])
    assert gradient.isfinite().all() and x.grad_fn.name() != "_AllStepsAtOnceBackward"
    model.eval()
    assert torch.equal(model([1.0, 0.5], [1.0]), model([1.0, 0.5], [1.0]))


def test_parameters_that_f_brings_along_unannounced_still_get_their_gradient():
    hidden = torch.tensor(0.8, dtype=F64, requires_grad=True)
    x = ODERNN(lambda x, t, p: -p["k"] * hidden * x, {"k": 1.0}, step=1e-3)([1.0], [1.0])
    (gradient,) = torch.autograd.grad(x.sum(), hidden)
    assert gradient.item() == pytest.approx(-math.exp(-0.8), rel=1e-3)  # Euler's error: step * k^2 / 2


def test_second_derivatives_are_refused_by_the_fast_gradient_and_right_without_it():
    x0 = torch.tensor([[1.0, 0.3]], dtype=F64, requires_grad=True)
    mu = torch.tensor(0.7, dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError, match="gradient='unrolled'"):
        torch.autograd.grad(solved(forced, {"mu": 0.7}, [0.5])(x0, mu).sum(), mu, create_graph=True)
    assert torch.autograd.gradgradcheck(solved(forced, {"mu": 0.7}, [0.4], gradient="unrolled"), (x0, mu))


def test_parameters_changed_before_the_backward_pass_are_noticed():
    model = ODERNN(decay, {"k": 1.0}, step=0.1)
    loss = model([1.0], [1.0]).sum()
    with torch.no_grad():
        model.theta["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- observations


def test_what_is_not_observed_changes_nothing_whether_by_nan_or_by_mask():
    x0, times = torch.ones(2, 2, dtype=F64), [0.5, 1.0]
    model = ODERNN(forced, {"mu": 1.0}, step=0.1)
    x = model(x0, times).detach()
    seen = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
    target = x + torch.tensor([[[1.0, 9], [2, 3]], [[9, 9], [9, 4]]], dtype=F64)
    expected = torch.tensor((1 + 4 + 9 + 16) / 4, dtype=F64)
    gradients = []
    for observations, mask in (
        (target.where(seen, math.nan), None),
        (target, seen),
        (target.where(seen, math.inf), seen),
        (target.where(seen, math.nan), torch.ones(2, 2, dtype=torch.bool)),
    ):
        loss = model.loss(x0, times, observations, mask)
        torch.testing.assert_close(loss, expected)
        gradients += torch.autograd.grad(loss, model.theta["mu"])
    assert gradients[0].isfinite() and all(g == gradients[0] for g in gradients)
    half = model.loss(x0, times, target, seen, scale=[2.0, 2.0])
    torch.testing.assert_close(half, expected / 4)


def test_one_observation_of_one_number_is_enough_for_one_parameter():
    model = ODERNN(decay, {"k": 0.1}, step=0.01, method="rk4")
    fit = model.fit([1.0, 1.0], [2.0], [[0.25, math.nan]])
    assert fit.converged and fit.parameters["k"].item() == pytest.approx(math.log(4) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda m: m(torch.ones(1, 2, 3), [1]), r"x0 must be \(B, D\) or \(D,\).*got \(1, 2, 3\)"),
        (lambda m: m([], [1]), "not empty"),
        (lambda m: m([math.nan], [1]), "x0 must be finite"),
        (lambda m: m([1.0], []), r"times must be \(T,\)"),
        (lambda m: m(torch.ones(3, 1), torch.ones(2, 2)), r"\(T, 3\) and T at least 1, got \(2, 2\)"),
        (lambda m: m([1.0], [1.0, 0.5]), "must not decrease nor lie before t0 = 0, got 0.5 after 1"),
        (lambda m: m([1.0], [1.0], t0=2.0), "before t0 = 2, got 1"),
        (lambda m: m([1.0], [math.nan]), "times must be finite"),
        (lambda m: m([1.0], [1.0], t0=math.inf), "t0 must be finite"),
        (lambda m: m([1.0], torch.ones(1, requires_grad=True)), "times are constants"),
        (lambda m: m.loss([1.0], [1.0], [1.0]), r"observations must be \(T, D\) = \(1, 1\), got \(1,\)"),
        (lambda m: m.loss(torch.ones(2, 1), [1.0], [[1.0]]), r"\(T, B, D\) = \(1, 2, 1\), got \(1, 1\)"),
        (lambda m: m.loss([1.0], [1.0], [[1.0]], [1]), r"mask must be bool \(1, 1\) or \(1,\), got torch.int64"),
        (lambda m: m.loss([1.0], [1.0], [[math.nan]]), "nothing is observed"),
        (lambda m: m.loss([1.0], [1.0], [[math.inf]]), "observations must be finite"),
        (lambda m: m.loss([1.0], [1.0], [[1.0]], scale=0), "scale must be positive"),
        (lambda m: m.loss([1.0], [1.0], [[1.0]], scale=[1, 2]), r"scale must broadcast to \(1, 1\), got \(2,\)"),
        (lambda m: m.fit([1.0], [1.0], [[1.0]], optimizer="sgd"), "one of lbfgs, adam, got 'sgd'"),
        (lambda m: m.fit([1.0], [1.0], [[1.0]], positive="rate"), "positive names no parameter: rate"),
        (lambda m: m.fit([1.0], [1.0], [[1.0]], positive=True), "k must start above 0 to stay positive, got -1"),
        (lambda m: m.requires_grad_(False).fit([1.0], [1.0], [[1.0]]), "nothing to learn"),
        (lambda m: m.standard_errors([1.0], [1.0], [[1.0]]), "1 observed numbers do not give the errors of 1"),
        (lambda m: ODERNN(decay, step=0), "step must be a positive number, got 0"),
        (lambda m: ODERNN(decay, step=0.1, method="heun"), "one of euler, midpoint, rk4, got 'heun'"),
        (lambda m: ODERNN(decay, step=0.1, gradient="fast"), "one of auto, unrolled, got 'fast'"),
        (lambda m: ODERNN(decay, step=0.1, checkpoint_every=0), "at least 1, got 0"),
        (lambda m: ODERNN(decay, {"k": math.nan}, step=0.1), "parameter k must be of finite real numbers"),
        (lambda m: ODERNN(decay, {"k": "1"}, step=0.1), "parameter k must be of finite real numbers, got '1'"),
        (lambda m: ODERNN(decay, {"k": torch.ones(1) > 0}, step=0.1), "parameter k must be of finite real numbers"),
        (lambda m: ODERNN(decay, {"a.b": 1.0}, step=0.1), "must be an identifier.*got 'a.b'"),
        (lambda m: ODERNN(decay, {"training": 1.0}, step=0.1), "attribute of nn.ParameterDict, got 'training'"),
        (
            lambda m: ODERNN(lambda x, t: x[:, 0], step=0.1)([1.0, 2.0], [1]),
            r"\(B, D\) = \(1, 2\), got \(1,\).*x\[..., 0\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(ODERNN(decay, {"k": -1.0}, step=0.1))


def test_types_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="f must be a function or a module, got int"):
        ODERNN(3, step=0.1)
    with pytest.raises(TypeError, match="must return a tensor, got list"):
        ODERNN(lambda x, t: [x], step=0.1)([1.0], [1])
    with pytest.raises(TypeError, match="must return torch.float32 as x is, got torch.float64"):
        ODERNN(lambda x, t: x.double(), step=0.1)(torch.ones(1), [1])


# ---- solutions that run away


def test_a_solution_that_blows_up_is_an_error_that_names_step_trajectory_and_parameters():
    """dx/dt = k x^2 from 1 is infinite at 1 / k; a stiff decay with a step that is too long grows without bound."""
    model = ODERNN(lambda x, t, p: p["k"] * x**2, {"k": 4.0}, step=0.1)
    sentence = r"not finite after step \d+ of 30, from t = [12][.\d]*, in trajectory 1 with k = 4; euler with step 0.1"
    with pytest.raises(Diverged, match=sentence):
        model([[0.01], [1.0]], [3.0])
    with pytest.raises(RuntimeError, match="may be too coarse"):
        ODERNN(decay, {"k": 1000.0}, step=0.1)([1.0], [100.0])
