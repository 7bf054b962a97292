"""Fits of ODERNN against known parameters and linear regression; the competition model; the minimiser; the page."""

import doctest
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ode_fields import F64, START, TABLE, TIMES, TRUE, competition, decay, net, oscillator
from torch import nn

from pygen.models import _lbfgs, ode_rnn
from pygen.models.ode_rnn import ODERNN, Diverged

ROOT = Path(__file__).parents[2]


# ---- solutions that run away


def test_a_fit_that_begins_where_there_is_no_solution_says_so_and_leaves_the_parameters():
    model = ODERNN(lambda x, t, p: p["k"] * x**2, {"k": 4.0}, step=0.1)
    with pytest.raises(Diverged, match="with k = 4"):
        model.fit([1.0], [3.0], [[2.0]])
    assert model.theta["k"].item() == 4


@pytest.mark.parametrize("options", [{"optimizer": "lbfgs"}, {"optimizer": "adam", "learning_rate": 3.0}], ids=str)
def test_trials_that_run_away_are_taken_back(options):
    """x(2) of dx/dt = k x^2 from 1 is 1 / (1 - 2 k): the data ask for k = 0.4, from 0.5 on there is no solution."""
    tried = []

    def f(x, t, p):
        tried.append(p["k"].item())
        return p["k"] * x**2

    model = ODERNN(f, {"k": 0.1}, step=0.04, method="rk4")
    fit = model.fit([1.0], [2.0], [[5.0]], iterations=60, **options)
    assert max(tried) > 0.5
    assert fit.parameters["k"].item() == pytest.approx(0.4, rel=2e-3)  # RK4's error is 3e-6 of x
    assert all(math.isfinite(loss) for loss in fit.losses)


# ---- fits


@pytest.mark.parametrize(
    "optimizer, dtype", [("lbfgs", torch.float64), ("lbfgs", torch.float32), ("adam", torch.float32)], ids=str
)
def test_both_optimizers_find_parameters_that_differ_by_a_thousand(optimizer, dtype):
    def f(x, t, p):
        return p["supply"] - p["loss"] * x

    times = np.linspace(0.5, 8, 16)
    truth = 3000 / 0.8 * (1 - np.exp(-0.8 * times))[:, None]
    model = ODERNN(f, {"supply": 1000.0, "loss": 0.3}, step=0.5, method="rk4", dtype=dtype)
    fit = model.fit([0.0], times, truth, optimizer=optimizer, learning_rate=0.3, iterations=200)
    found = {name: value.item() for name, value in fit.parameters.items()}
    assert found == pytest.approx({"supply": 3000, "loss": 0.8}, rel=5e-3)  # RK4's error: (0.8 * 0.5)^4 / 120
    assert found["supply"] == model.theta["supply"].item()
    assert fit.loss == min(fit.losses) < 1e-4 * fit.losses[0]
    assert optimizer == "adam" or (fit.converged and fit.reason == "converged")


def test_starts_are_learned_too():
    times = np.linspace(0.2, 4, 20)
    data = torch.from_numpy(np.stack((np.cos(times), -np.sin(times)), 1))[:, None] * torch.tensor([2.0, -1.0])[:, None]
    model = ODERNN(oscillator, {"w": 1.2}, step=0.1, method="rk4")
    only_positions = data.where(torch.tensor([True, False]), math.nan)
    fit = model.fit([[1.0, 0.0], [-0.5, 0.0]], times, only_positions, learn_start=True)
    # the other optimum of the frequency would be far away; RK4's error is 0.1^4 / 120 * 4
    torch.testing.assert_close(fit.x0, torch.tensor([[2.0, 0.0], [-1.0, 0.0]], dtype=F64), rtol=0, atol=1e-5)
    assert fit.parameters["w"].item() == pytest.approx(1, rel=1e-5)
    assert not fit.x0.requires_grad


def test_logarithms_keep_parameters_positive():
    """The best rate for data that grow is negative; searched by its logarithm it falls towards 0."""
    times, data = [1.0, 2.0], [[1.1], [1.2]]
    free = ODERNN(decay, {"k": 1.0}, step=0.1).fit([1.0], times, data)
    bound = ODERNN(decay, {"k": 1.0}, step=0.1).fit([1.0], times, data, positive=["k"])
    assert free.parameters["k"] < -0.05 and 0 < bound.parameters["k"] < 1e-3


def test_a_parameter_that_starts_at_zero_can_be_learned():
    fit = ODERNN(decay, {"k": 0.0}, step=0.01, method="rk4").fit([1.0], [1.0], [[0.5]])
    assert fit.parameters["k"].item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_network_learns_a_vector_field():
    """A spiral from two of its turns: the error of the fit is a hundredth of the data's size."""
    matrix = torch.tensor([[-0.1, 1.0], [-1.0, -0.1]], dtype=F64)
    times = torch.linspace(0.25, 5, 20, dtype=F64)
    data = torch.stack([torch.matrix_exp(t * matrix) @ torch.tensor([1.0, 0.0], dtype=F64) for t in times])
    f = net().double()
    model = ODERNN(f, step=0.125, method="midpoint")
    assert {name for name, _ in model.named_parameters()} == {f"f.{name}" for name, _ in f.named_parameters()}
    fit = model.fit([1.0, 0.0], times, data, iterations=60)
    assert (model([1.0, 0.0], times) - data).abs().max() < 0.05 and fit.losses[0] > 0.3
    assert torch.equal(fit.parameters["f.layers.0.weight"], f.layers[0].weight)


def test_the_callback_sees_every_iteration_and_may_stop():
    seen = []

    def callback(iteration, loss):
        seen.append((iteration, loss))
        return iteration == 2

    model = ODERNN(competition, START, step=1.0)
    fit = model.fit([100, 150], TIMES, TABLE, callback=callback)
    assert [iteration for iteration, _ in seen] == [1, 2] and fit.reason == "stopped" and not fit.converged
    assert [loss for _, loss in seen] == fit.losses[1:]


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_an_interrupted_fit_keeps_the_best_parameters(optimizer):
    def interrupt(iteration, loss):
        if iteration == 3:
            raise KeyboardInterrupt

    model = ODERNN(competition, START, step=1.0)
    fit = model.fit([100, 150], TIMES, TABLE, optimizer=optimizer, callback=interrupt)
    assert fit.reason == "interrupted" and not fit.converged and len(fit.losses) == 4
    assert model.loss([100, 150], TIMES, TABLE).item() == pytest.approx(fit.loss, rel=1e-12) == min(fit.losses)


def test_fits_end_when_the_iterations_do():
    fit = ODERNN(competition, START, step=1.0).fit([100, 150], TIMES, TABLE, iterations=4)
    assert fit.reason == "iterations" and not fit.converged and len(fit.losses) == 5


def test_fits_leave_the_gradients_of_parameters_and_the_start_as_they_were():
    model, x0 = ODERNN(decay, {"k": 0.5}, step=0.1), torch.ones(1, dtype=F64)
    model.fit(x0, [1.0], [[0.5]], learn_start=True)
    assert model.theta["k"].grad is None and x0.item() == 1


def test_a_module_may_have_named_parameters_beside_its_own_and_both_are_saved():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t, p):
            return p["speed"] * self.layer(x)

    torch.manual_seed(0)
    model, other = (ODERNN(Scaled(), {"speed": speed}, step=0.1) for speed in (1.0, 2.0))
    fit = model.fit([1.0, 0.0], [1.0], [[0.5, 0.5]], iterations=20)
    assert fit.loss < 1e-9 and set(fit.parameters) == {"speed", "f.layer.weight", "f.layer.bias"}
    other.load_state_dict(model.state_dict())
    assert torch.equal(other([1.0, 0.0], [1.0]), model([1.0, 0.0], [1.0]))


# ---- how certain


def test_standard_errors_of_a_straight_line_are_those_of_linear_regression():
    rng = np.random.default_rng(0)
    t = np.arange(1.0, 13)
    y = 3 + 0.5 * t + rng.normal(size=12)
    model = ODERNN(lambda x, t, p: p["slope"].expand_as(x), {"slope": 1.0}, step=5.0)
    fit = model.fit([1.0], t, y[:, None], learn_start=True)
    errors = model.standard_errors(fit.x0, t, y[:, None], learn_start=True)
    design = np.stack((t, np.ones(12)), 1)
    best, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    expected = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * rss / 10)
    assert fit.parameters["slope"].item() == pytest.approx(best[0], rel=1e-5)
    assert [errors["slope"].item(), errors["x0"].item()] == pytest.approx(expected, rel=1e-6)


def test_standard_errors_refuse_what_the_data_do_not_determine():
    model = ODERNN(lambda x, t, p: -p["a"] * p["b"] * x, {"a": 1.0, "b": 1.0}, step=0.1)
    with pytest.raises(ValueError, match="do not determine all parameters"):
        model.standard_errors([1.0], [1.0, 2.0, 3.0], [[0.4], [0.1], [0.05]])


# ---- the competition model


def test_euler_gives_the_table_of_the_competition_model_within_one():
    x = ODERNN(competition, TRUE, step=0.1)([100, 150], TIMES)
    assert (x - TABLE).abs().max() < 1


def test_the_competition_ends_in_its_equilibrium():
    """Near it the slower of two modes falls as exp(-0.063 t): by time 400 to 1e-11."""
    x = ODERNN(competition, TRUE, step=0.1)([100, 150], [400.0])
    torch.testing.assert_close(x.detach(), torch.tensor([[375.0, 250.0]], dtype=F64), rtol=1e-9, atol=0)


def test_the_competition_is_fitted_from_a_start_far_away():
    """From r = .1, a = i = .001; the table is rounded to whole numbers, so that no curve is nearer than about 0.4."""
    model = ODERNN(competition, START, step=0.1)
    fit = model.fit([100, 150], TIMES, TABLE)
    assert fit.converged
    assert (model([100, 150], TIMES) - TABLE).abs().max() < 0.6
    errors = model.standard_errors([100, 150], TIMES, TABLE)
    for name, true in TRUE.items():
        assert ((fit.parameters[name] - torch.tensor(true)).abs() < 3 * errors[name]).all()


# ---- the minimiser


def counted(f):
    calls = []

    def evaluate(u):
        calls.append(u)
        u = u.clone().requires_grad_()
        y = f(u)
        return y.item(), torch.autograd.grad(y, u)[0]

    return evaluate, calls


def test_lbfgs_finds_the_minimum_of_a_curved_valley():
    evaluate, calls = counted(lambda u: 100 * (u[1] - u[0] ** 2) ** 2 + (1 - u[0]) ** 2)
    u = torch.tensor([-1.2, 1.0], dtype=F64)
    reason = _lbfgs.minimise(
        evaluate, u, evaluate(u), iterations=200, tolerance=1e-9, after=lambda loss: False, enough=1e-20
    )
    assert reason == "converged" and len(calls) < 150
    torch.testing.assert_close(calls[-1], torch.ones(2, dtype=F64), rtol=1e-6, atol=0)


def test_lbfgs_comes_back_from_where_the_loss_is_infinite():
    """-log(1 - u) - u - 0.9 u has its minimum at 1 - 1 / 1.9 and no value from 1 on."""
    evaluate, calls = counted(lambda u: (-torch.log(1 - u) - 1.9 * u).sum() + 1)
    u = torch.tensor([-30.0], dtype=F64)
    _lbfgs.minimise(evaluate, u, evaluate(u), iterations=50, tolerance=1e-14, after=lambda loss: False, enough=0.0)
    assert any(u.item() >= 1 for u in calls)
    assert min(evaluate(u)[0] for u in calls[:] if u < 1) == pytest.approx(-math.log(1 / 1.9) - 1.9 * (1 - 1 / 1.9) + 1)


# ---- documentation


def test_the_example_recovers_the_pendulum_within_three_standard_errors(tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "ode_pendulum.py"
    monkeypatch.setattr(sys, "argv", [script.name, "--seed", "3", "--step", "0.2", "--out", str(tmp_path / "p.png")])
    runpy.run_path(str(script), run_name="__main__")
    away = re.findall(r"(\S+) standard errors away", capsys.readouterr().out)
    assert len(away) == 2 and all(abs(float(number)) < 3 for number in away)
    assert (tmp_path / "p.png").stat().st_size > 0


def test_examples_in_docstrings_run():
    result = doctest.testmod(ode_rnn)
    assert result.attempted > 0 and result.failed == 0


def test_code_of_the_page_runs(run_page):
    assert run_page("ode-rnn.md") > 3


def test_pictures_of_the_page_are_there_and_small():
    page = (ROOT / "docs" / "ode-rnn.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((images/[^)]+)\)", page)
    assert len(pictures) == 2 and all(0 < (ROOT / "docs" / picture).stat().st_size < 150_000 for picture in pictures)
