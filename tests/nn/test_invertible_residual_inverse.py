"""The inverse of InvertibleResidual inverts or says that it does not, also after training and in a reversible flow."""

import copy
import math

import pytest
import torch
from nn.jacobian import jacobian_log_det, normal
from nn.residual_branches import (
    BRANCHES,
    ESTIMATORS,
    Conditional,
    Linear,
    dense,
    spectral_convolutional,
    spectral_dense,
)
from torch import nn

from pygen.nn import ReversibleSequential, Sequential
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.utils.spectral_norm import spectral_norm, spectral_norm_all


@pytest.mark.parametrize("c", (0.5, 0.9, 0.99))
@pytest.mark.parametrize("name", BRANCHES)
def test_inverse_recovers_x_to_the_tolerance(name, c):
    make, shape = BRANCHES[name]
    block, x = InvertibleResidual(make(c)), normal(*shape)
    with torch.no_grad():
        z, log_det = block(x)
        found = block.invert(z)
        residual = (found.x + block.branch(found.x) - z).flatten(1)
        scale = z.flatten(1).abs().amax(1).clamp_min(1)
        assert found.converged.all()
        torch.testing.assert_close(found.error, residual.abs().amax(1) / scale)
        assert (found.error <= 1e-6).all()
        assert ((found.x - x).flatten(1).norm(dim=1) <= residual.norm(dim=1) / (1 - c) + 1e-14).all()
        block.inverse_tolerance = 1e-12
        back, back_log_det = block.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-8)


@pytest.mark.parametrize("c", (0.5, 0.9, 0.99))
def test_the_slowest_contraction_takes_the_iterations_that_the_docstring_says(c):
    """g(x) = c x: the residual is |c^(k + 1) z| after k iterations. The default limit is enough for 0.99."""
    block = InvertibleResidual(Linear(c * torch.eye(1, dtype=torch.float64)))
    found = block.invert(torch.ones(1, 1, dtype=torch.float64))
    assert found.converged.all()
    assert found.iterations.item() == math.ceil(math.log(1e-6) / math.log(c)) - 1
    torch.testing.assert_close(found.x, torch.full((1, 1), 1 / (1 + c), dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_tolerance_is_relative_to_z_and_absolute_below_1_unlike_residual_flows():
    """A test of `rtol ... else atol` let samples through that met only one of the two."""
    block = InvertibleResidual(Linear(0.5 * torch.eye(1, dtype=torch.float64)))
    z = torch.tensor([[1e-9], [1.0], [1e6]], dtype=torch.float64)
    found = block.invert(z, tolerance=1e-3)
    assert found.iterations.tolist() == [0, 9, 9]
    assert ((found.x * 1.5 - z).abs() <= 1e-3 * z.abs().clamp_min(1)).all()


def test_a_sample_is_inverted_the_same_whatever_batch_it_is_in():
    block, x = InvertibleResidual(dense(0.9)), normal(20, 4) * torch.logspace(-3, 3, 20)[:, None]
    z = block(x)[0].detach()
    found = block.invert(z)
    assert len(found.iterations.unique()) > 3
    for i in range(len(z)):
        alone = block.invert(z[i : i + 1])
        assert alone.iterations.item() == found.iterations[i].item()
        # The matrix products of the two batches round differently.
        torch.testing.assert_close(alone.x[0], found.x[i], rtol=1e-13, atol=1e-13)


def test_a_branch_that_is_no_contraction_never_gives_a_silent_wrong_x():
    weight = torch.tensor([[0.0, -1.5], [1.5, 0.0]], dtype=torch.float64)
    block, x = InvertibleResidual(Linear(weight)), normal(3, 2)
    x[1] = 0
    z, _ = block(x)
    found = block.invert(z)
    assert found.converged.tolist() == [False, True, False]
    assert not found.error.isfinite()[0] or found.error[0] > 1
    with pytest.raises(RuntimeError, match="2 of 3 samples did not converge.*must be a contraction"):
        block.inverse(z)


def test_bounded_oscillation_is_no_convergence_either():
    class Steep(nn.Module):
        def forward(self, x):
            return 3 * x.tanh()

    block = InvertibleResidual(Steep(), max_inverse_iterations=50)
    found = block.invert(torch.full((1, 1), 0.5))
    assert not found.converged and found.error > 0.1 and found.iterations.item() == 50
    with pytest.raises(RuntimeError, match="after 50 iterations the largest error is .* the tolerance 1.0e-06"):
        block.inverse(torch.full((1, 1), 0.5))


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_z_that_is_not_finite_does_not_converge_and_leaves_the_others_alone(bad):
    block, z = InvertibleResidual(dense(0.9)), normal(3, 4)
    z[1, 2] = bad
    found = block.invert(z)
    assert found.converged.tolist() == [True, False, True]
    assert found.iterations[1] <= 1, "nor is it waited for"
    torch.testing.assert_close(found.x[[0, 2]], block.invert(z[[0, 2]]).x, rtol=0, atol=1e-13)


def test_dropout_does_not_keep_the_inverse_from_converging_nor_is_it_switched_off_for_good():
    branch = nn.Sequential(dense(0.9), nn.Dropout(0.5))
    block = InvertibleResidual(branch)
    assert block.inverse(normal(5, 4))[0].isfinite().all()
    assert all(module.training for module in block.modules())


@pytest.mark.parametrize("name", BRANCHES)
def test_the_inverse_is_differentiable_by_the_implicit_function_theorem(name):
    make, shape = BRANCHES[name]
    block = InvertibleResidual(make(0.9), inverse_tolerance=1e-13)
    x = normal(2, *shape[1:]).requires_grad_()
    z = block(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(block.inverse, z, eps=1e-5, atol=1e-6, fast_mode=True)
    # x is a function of the parameters too: with z fixed, dx = -(I + J)^-1 dg
    block.zero_grad()
    back, log_det = block.inverse(z)
    (back.square().sum() + log_det.sum()).backward()
    parameter, found = block.branch[0].weight, block.branch[0].weight.grad.flatten()[0].item()
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter.view(-1)[0] += step
            back, log_det = block.inverse(z)
            losses.append(back.square().sum() + log_det.sum())
            parameter.view(-1)[0] -= step
    assert found == pytest.approx(((losses[0] - losses[1]) / 2e-5).item(), rel=1e-6)


def test_gradients_of_the_inverse_reach_the_context():
    block = InvertibleResidual(Conditional(), inverse_tolerance=1e-13)
    z, context = normal(3, 2).requires_grad_(), normal(3, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(block.inverse, (z, context), eps=1e-5, atol=1e-6)


def test_a_gradient_of_the_inverse_that_does_not_converge_is_an_error():
    """x = 0 is found at once, but the branch is steep there."""
    block = InvertibleResidual(Linear(1.5 * torch.eye(1, dtype=torch.float64)), max_inverse_iterations=20)
    z = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    back, _ = block.inverse(z)
    with pytest.raises(RuntimeError, match="the gradient of the inverse did not converge in 20 iterations"):
        back.sum().backward()
    with pytest.raises(NotImplementedError, match="second derivatives of the inverse"):
        torch.autograd.grad(block.inverse(z)[0].sum(), z, create_graph=True)


# ---- branches with spectral norms ----


@pytest.mark.parametrize("make", (spectral_dense, spectral_convolutional))
@pytest.mark.parametrize("name", ("exact", "geometric"))
def test_after_training_the_inverse_is_as_good_as_before(make, name):
    """invertible-resnet #3: errors of about 1 after training; #14: too few iterations, singular values above 1."""
    torch.manual_seed(0)
    block = InvertibleResidual(make(0.9), **ESTIMATORS.get(name, {}))
    x = torch.randn(64, 2) if make is spectral_dense else torch.randn(16, 1, 4, 4)
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    for _ in range(30):
        z, log_det = block(3 * x)  # wants a wide map: pushes every layer against its bound
        optimizer.zero_grad()
        (z.square().flatten(1).sum(1) / 2 - log_det).mean().backward()
        optimizer.step()
    for training in (True, False):
        block.train(training)
        with torch.no_grad():
            z, _ = block(3 * x)
            found = block.invert(z)
            assert found.converged.all() and found.iterations.max() < 150
            torch.testing.assert_close(block.inverse(z)[0], 3 * x, rtol=0, atol=2e-5)
    norms = [
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(block.branch, s[None]).reshape(s.numel(), -1), 2)
        for s in x[:8]
    ]
    assert max(norms) < 0.9


def test_a_weight_above_its_bound_still_has_a_gradient():
    """invertible-resnet #4: with sigma > c the gradient was lost."""
    torch.manual_seed(0)
    block = InvertibleResidual(spectral_dense(0.9))
    with torch.no_grad():
        for layer in (block.branch[0], block.branch[2]):
            layer.parametrizations.weight.original *= 10
    z, log_det = block(torch.randn(5, 2))
    for output in (z.square().sum(), log_det.sum()):
        grads = torch.autograd.grad(
            output, [block.branch[i].parametrizations.weight.original for i in (0, 2)], retain_graph=True
        )
        assert all(grad.abs().max() > 1e-5 for grad in grads)


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("norm", (spectral_norm, nn.utils.parametrizations.spectral_norm))
def test_one_forward_is_one_step_of_the_power_iteration_and_the_inverse_none(norm):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight *= 0.01
    layer = norm(layer, n_power_iterations=1)
    block = InvertibleResidual(nn.Sequential(layer, nn.Tanh(), Linear(0.5 * torch.eye(4, dtype=torch.float64))))
    twin, x = copy.deepcopy(block.branch), normal(5, 4)
    z, log_det = block(x)
    twin(x)
    after = buffers(block)
    torch.testing.assert_close(buffers(block.branch), buffers(twin), rtol=0, atol=0)
    back, back_log_det = block.inverse(z)  # in training mode
    torch.testing.assert_close(buffers(block), after, rtol=0, atol=0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-5)


def test_inverting_inside_of_a_users_cache_leaves_later_gradients():
    block = InvertibleResidual(spectral_dense(0.9))
    with nn.utils.parametrize.cached():
        back, _ = block.inverse(torch.randn(5, 2))
        block(back.detach())[0].sum().backward()
    assert block.branch[0].parametrizations.weight.original.grad is not None


def test_layers_normalised_together_invert_too():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Linear(2, 32), nn.ELU(), nn.Linear(32, 2)).double()
    block = InvertibleResidual(spectral_norm_all(branch, n_power_iterations=5, bound=0.9))
    x = normal(5, 2)
    z, log_det = block(x)
    back, back_log_det = block.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(back_log_det, -log_det, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, jacobian_log_det(block.eval(), x), rtol=0, atol=1e-8)


# ---- in a ReversibleSequential ----


@pytest.mark.parametrize("name", ("exact", *ESTIMATORS))
def test_reversible_gradients_are_those_of_sequential(name):
    """Found by the fixed point, with the random numbers and the u and v of the forward."""
    torch.manual_seed(0)
    options = ESTIMATORS.get(name, {})
    layers = [InvertibleResidual(spectral_dense(0.9, 1).double(), inverse_tolerance=1e-13, **options) for _ in range(3)]
    flow, reversible = Sequential(*copy.deepcopy(layers)), ReversibleSequential(*layers)
    grads, states = [], []
    for model in (flow, reversible):
        x = normal(5, 2).requires_grad_()
        torch.manual_seed(1)
        z, log_det = model(x)
        (z.square().sum() - (normal(5) * log_det).sum()).backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
        states.append(buffers(model))
    assert not reversible.stored
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


def test_a_block_with_its_own_generator_is_refused_in_a_reversible_sequential():
    block = InvertibleResidual(dense(0.9), generator=torch.Generator(), **ESTIMATORS["geometric"])
    _, log_det = ReversibleSequential(block)(normal(5, 4))
    with pytest.raises(RuntimeError, match="own generator cannot repeat its random numbers"):
        log_det.sum().backward()
