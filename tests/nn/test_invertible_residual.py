"""InvertibleResidual forward: its log-determinants are those of the Jacobian. Its inverse is tested next door."""

import copy
import math

import pytest
import torch
from nn.jacobian import jacobian_log_det, normal
from nn.residual_branches import BRANCHES, ESTIMATORS, Conditional, Linear, dense
from torch import nn

from pygen.nn import Sequential
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.utils.spectral_norm import spectral_norm

# ---- log_det ----


@pytest.mark.parametrize("name", BRANCHES)
def test_exact_log_det_is_that_of_the_autograd_jacobian(name):
    make, shape = BRANCHES[name]
    block, x = InvertibleResidual(make(0.9)), normal(*shape)
    z, log_det = block(x)
    torch.testing.assert_close(z, x + block.branch(x), rtol=0, atol=0)
    assert log_det.shape == (len(x),) and log_det.abs().min() > 1e-3
    torch.testing.assert_close(log_det, jacobian_log_det(block, x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", BRANCHES)
def test_gradients_of_the_exact_log_det_are_those_of_the_autograd_jacobian(name):
    make, shape = BRANCHES[name]
    block, x = InvertibleResidual(make(0.9)), normal(*shape).requires_grad_()
    incoming = normal(len(x), seed=2)
    sources = (x, *block.parameters())

    def log_det_of(sample):
        """With a graph, of which tests/nn/jacobian.py's has none."""
        jacobian = torch.autograd.functional.jacobian(lambda s: block(s[None])[0][0], sample, create_graph=True)
        return torch.linalg.slogdet(jacobian.reshape(sample.numel(), -1)).logabsdet

    expected = torch.stack([log_det_of(sample) for sample in x])
    found = torch.autograd.grad((incoming * block(x)[1]).sum(), sources, allow_unused=True)
    expected = torch.autograd.grad((incoming * expected).sum(), sources, allow_unused=True)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None) or f.abs().max() == 0
        if e is not None:
            torch.testing.assert_close(f, e, rtol=0, atol=1e-8)


def test_gradcheck_of_both_outputs_in_exact_mode():
    block = InvertibleResidual(dense(0.9, width=5))
    assert torch.autograd.gradcheck(block, normal(2, 4).requires_grad_())


@pytest.mark.parametrize(("distribution", "neumann"), (("geometric", True), ("poisson", False)))
def test_russian_roulette_is_unbiased_in_value_and_gradient(distribution, neumann):
    """2,000 calls, within 4 standard errors. tests/nn/test_log_det_series.py has the other pairs, without chance."""
    weight = torch.tensor([[0.5, 0.3], [-0.2, 0.4]], dtype=torch.float64)
    block = InvertibleResidual(
        Linear(weight), log_det="russian_roulette", distribution=distribution, neumann_gradient=neumann, n_exact=1
    )
    block.generator = torch.Generator().manual_seed(0)
    x, estimates = normal(8, 2), []
    for _ in range(2000):
        log_det = block(x)[1].mean()
        (grad,) = torch.autograd.grad(log_det, block.branch.parameters())
        estimates.append(torch.cat((log_det.detach().view(1), grad.flatten())))
    matrix = torch.eye(2, dtype=torch.float64) + weight
    truth = torch.cat((torch.linalg.slogdet(matrix).logabsdet.view(1), torch.linalg.inv(matrix).T.flatten()))
    estimates = torch.stack(estimates)
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - truth).abs() < 4 * standard_error).all()
    assert (standard_error < 0.03).all(), "or the test would see nothing"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_more_samples_are_less_noise(name):
    x = normal(1, 4).expand(500, -1)
    spread = []
    for n_samples in (1, 16):
        block = InvertibleResidual(dense(0.5), n_samples=n_samples, **ESTIMATORS[name])
        block.generator = torch.Generator().manual_seed(0)
        spread.append(block(x)[1].std().item())
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("neumann", (False, True))
def test_weights_per_sample_reach_each_samples_gradient(neumann):
    """residual-flows takes the first sample's incoming gradient for all. One sample's probe gives its own gradient."""
    block = InvertibleResidual(dense(0.5), log_det="truncated", neumann_gradient=neumann)
    x, incoming = normal(3, 4), (0.0, 1.0, -5.0)

    def gradients(weights):
        block.generator = torch.Generator().manual_seed(0)
        loss = (torch.tensor(weights, dtype=torch.float64) * block(x)[1]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (block.branch[0].weight,))])

    each = [gradients([float(i == j) for j in range(3)]) for i in range(3)]
    assert all(g.abs().max() > 1e-3 for g in each)
    expected = sum(weight * g for weight, g in zip(incoming, each, strict=True))
    torch.testing.assert_close(gradients(incoming), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_same_seed_is_the_same_log_det(name):
    block, x = InvertibleResidual(dense(0.9), **ESTIMATORS[name]), normal(5, 4)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(block(x)[1])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    runs = []
    for seed in (0, 0, 1):
        block.generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(block(x)[1])
        assert torch.equal(torch.get_rng_state(), before), "an own generator leaves the global one alone"
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_eval_mode_takes_more_exact_terms():
    """With signs as probes of a diagonal J nothing is random but N, and n_exact_eval hides it."""
    weight = torch.diag(torch.tensor([0.6, -0.6], dtype=torch.float64))
    block = InvertibleResidual(Linear(weight), log_det="russian_roulette", probe="rademacher", n_exact_eval=60)
    truth = math.log(1.6) + math.log(0.4)
    assert (block.train()(normal(3, 2))[1] - truth).abs().min() > 1e-4
    torch.testing.assert_close(block.eval()(normal(3, 2))[1].detach(), torch.full((3,), truth).double())


def test_samples_too_large_for_the_exact_mode_are_refused_and_not_waited_for():
    block = InvertibleResidual(nn.Identity(), exact_limit=100)
    with pytest.raises(ValueError, match=r"\(3, 6, 6\) have 108 elements; exact_limit is 100"):
        block(torch.zeros(2, 3, 6, 6))
    assert block.invert(torch.zeros(2, 3, 6, 6)).converged.all(), "the inverse has no such limit"


# ---- where it is called ----


@pytest.mark.parametrize("name", ("exact", *ESTIMATORS))
def test_forward_and_inverse_work_without_gradients(name):
    block, x = InvertibleResidual(dense(0.9), **ESTIMATORS.get(name, {})), normal(5, 4)
    torch.manual_seed(0)
    z, log_det = block(x)
    assert z.requires_grad and log_det.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(0)
            found = block(x.clone())
            torch.testing.assert_close(found, (z.detach(), log_det.detach()))
            assert not (found[0].requires_grad or found[1].requires_grad)
            back, log_det_back = block.inverse(found[0])
            torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
            assert not (back.requires_grad or log_det_back.requires_grad)


def test_hooks_on_x_see_the_gradient_of_the_loss_only():
    block, x, seen = InvertibleResidual(dense(0.5), log_det="truncated"), normal(5, 4).requires_grad_(), []
    x.register_hook(seen.append)
    z, log_det = block(x)
    assert not seen
    (z.sum() + log_det.sum()).backward()
    assert len(seen) == 1


@pytest.mark.parametrize("name", ("exact", "truncated"))
def test_the_context_reaches_the_branch_and_its_gradient_the_context(name):
    block = InvertibleResidual(Conditional(), **ESTIMATORS.get(name, {}))
    x, context = normal(5, 3), normal(5, 3, seed=2).requires_grad_()
    z, log_det = block(x, context)
    torch.testing.assert_close(z, x + block.branch(x, context))
    assert torch.autograd.grad(log_det.sum(), context, retain_graph=True)[0].abs().min() > 0
    # samples converge one after the other: every one must keep its own context
    found = block.invert(z.detach(), context.detach() * 1)
    assert found.converged.all() and len(found.iterations.unique()) > 1
    torch.testing.assert_close(found.x, x, rtol=0, atol=1e-5)


def test_deepcopy_and_state_dict_make_equal_blocks():
    block = InvertibleResidual(nn.Sequential(spectral_norm(nn.Linear(4, 4), bound=0.9)).double())
    block.generator = torch.Generator().manual_seed(3)
    for other in (copy.deepcopy(block), InvertibleResidual(copy.deepcopy(block.branch))):
        other.load_state_dict(block.state_dict())
        torch.testing.assert_close(other.eval()(normal(5, 4)), block.eval()(normal(5, 4)), rtol=0, atol=0)
    assert set(block.state_dict()) == {f"branch.{key}" for key in block.branch.state_dict()}


def test_an_empty_batch_has_empty_results():
    for options in ({}, *ESTIMATORS.values()):
        block = InvertibleResidual(dense(0.9), **options)
        z, log_det = block(normal(0, 4))
        assert z.shape == (0, 4) and log_det.shape == (0,)
        assert block.inverse(z)[0].shape == (0, 4)


def test_torch_compile_runs_the_block_between_two_graphs():
    torch.compiler.reset()
    block = Sequential(InvertibleResidual(dense(0.9)), InvertibleResidual(dense(0.5), **ESTIMATORS["geometric"]))
    x = normal(5, 4)
    torch.manual_seed(0)
    expected = block(x)
    torch.manual_seed(0)
    found = torch.compile(block, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found[1].sum().backward()
    assert all(p.grad is not None for p in block[0].branch[0].parameters())


def test_under_autocast_log_det_is_float32_and_the_inverse_converges():
    block, x = InvertibleResidual(dense(0.9).float(), **ESTIMATORS["truncated"]), normal(5, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = block(x)
        assert z.dtype == log_det.dtype == torch.float32
        (z.sum() + log_det.sum()).backward()
        for dtype in (torch.float32, torch.bfloat16):
            back, _ = block.inverse(z.to(dtype))
            assert back.dtype == dtype
            # forward's branch has rounded to 8 bits, and 1 / (1 - c) is 10
            torch.testing.assert_close(back.float(), x, rtol=0, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_blocks_invert_to_what_their_type_allows(dtype):
    block, x = InvertibleResidual(dense(0.5).to(dtype)), normal(50, 4).to(dtype)
    with torch.no_grad():
        z, log_det = block(x)
        assert z.dtype == dtype and log_det.dtype == torch.float32
        found = block.invert(z)
        assert found.converged.all()
        torch.testing.assert_close(block.inverse(z)[0].float(), x.float(), rtol=0, atol=64 * torch.finfo(dtype).eps)


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"log_det": "hutchinson"}, "log_det must be one of exact, truncated, russian_roulette, got 'hutchinson'"),
        ({"distribution": "uniform"}, "distribution must be one of geometric, poisson, got 'uniform'"),
        ({"probe": "unit"}, "probe must be one of gaussian, rademacher, got 'unit'"),
        ({"n_terms": 0}, "n_terms must be at least 1, got 0"),
        ({"n_exact": -1}, "n_exact must be at least 0, got -1"),
        ({"n_samples": 0}, "n_samples must be at least 1, got 0"),
        ({"p": 1.0}, "p must be between 0 and 1, got 1.0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"inverse_tolerance": math.nan}, "inverse_tolerance must be positive, got nan"),
    ),
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        InvertibleResidual(nn.Identity(), **options)


def test_bad_inputs_are_named():
    block = InvertibleResidual(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"the branch must keep the shape of x, got \(2, 4\) -> \(2, 3\)"):
        block(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"expected floating-point samples \(B, ...\), got \(4,\)"):
        block(torch.zeros(4))
    with pytest.raises(ValueError, match="int64"):
        block.inverse(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        block.invert(torch.zeros(2, 4), tolerance=0.0)
