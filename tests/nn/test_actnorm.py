"""ActNorm: its first batch leaves standardised, once and for ever; no batch makes it NaN."""

import copy
import io
import multiprocessing
import os

import pytest
import torch
from nn.jacobian import assert_exact, normal, randomized
from torch import distributed

from pygen import nn


@pytest.mark.parametrize(("shape", "dim"), (((3, 5), 1), ((3, 4, 3, 2), 1), ((3, 2, 4), 2), ((3, 2, 4), -1)))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(shape, dim):
    layer = randomized(nn.ActNorm(shape[dim], dim=dim)).double().eval()
    assert_exact(layer, normal(*shape))


@pytest.mark.parametrize("mean", (0.0, 1e4))
def test_first_batch_leaves_with_mean_0_and_variance_1(mean):
    layer = nn.ActNorm(4).double()
    z, _ = layer(mean + normal(16, 4, 3, 3) * torch.tensor([1e-3, 0.1, 1.0, 50.0]).view(-1, 1, 1))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(4).double(), rtol=0, atol=1e-6)


def test_second_batch_does_not_initialise_again():
    layer = nn.ActNorm(3)
    layer(torch.randn(8, 3))
    before = copy.deepcopy(layer.state_dict())
    assert layer.initialized
    layer(100 * torch.randn(8, 3) + 7)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def reloaded(layer):
    new = nn.ActNorm(3)
    new.load_state_dict(layer.state_dict())
    return new


def assigned(layer):
    new = nn.ActNorm(3)
    new.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()}, assign=True)
    return new


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_into(layer):
    """As averaged weights are kept: parameters and buffers of a fresh copy are overwritten in place."""
    new = nn.ActNorm(3)
    with torch.no_grad():
        for name, tensor in new.state_dict(keep_vars=True).items():
            tensor.copy_(layer.state_dict()[name])
    return new


@pytest.mark.parametrize("make", (reloaded, assigned, pickled, copied_into, copy.deepcopy))
def test_a_reloaded_or_copied_layer_is_never_initialised_again_unlike_chaiyujins(make):
    layer = nn.ActNorm(3)
    layer(3 * torch.randn(8, 3) - 1)
    other, x = make(layer).train(), 100 * torch.randn(5, 3)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    assert other.initialized


def test_loading_a_new_layers_state_makes_the_next_batch_the_first():
    layer, new = nn.ActNorm(3), nn.ActNorm(3)
    layer(torch.randn(8, 3))
    layer.load_state_dict(new.state_dict())
    z, _ = layer(5 * torch.randn(64, 3) + 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


def test_a_copy_of_a_new_layer_initialises_on_its_own():
    layer = nn.ActNorm(3)
    other = copy.deepcopy(layer)
    layer(torch.randn(8, 3))
    assert layer.initialized and not other.initialized
    z, _ = other(9 * torch.randn(64, 3))
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)


def test_eval_mode_and_inverse_apply_what_is_there():
    layer, x = nn.ActNorm(3).eval(), torch.randn(8, 3)
    for z, log_det in (layer(x), layer.inverse(x), layer.train().inverse(x)):
        assert torch.equal(z, x) and torch.equal(log_det, torch.zeros(8)) and not layer.initialized


def test_an_empty_batch_is_not_the_first():
    layer = nn.ActNorm(3)
    z, log_det = layer(torch.empty(0, 3, 2, 2))
    assert z.shape == (0, 3, 2, 2) and log_det.shape == (0,) and not layer.initialized
    z, _ = layer(5 * torch.randn(64, 3) + 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("constant", (0.0, 0.1, -1e5))
def test_zero_variance_gives_neither_nan_nor_inf_unlike_freias_121(constant, dtype):
    layer = nn.ActNorm(3).to(dtype)
    x = torch.stack((torch.full((8, 5), constant), torch.randn(8, 5), torch.full((8, 5), 3.0)), 1).to(dtype)
    x.requires_grad_()
    z, log_det = layer(x)
    back, _ = layer.inverse(z)
    gradients = torch.autograd.grad(z.square().sum() + back.sum() + log_det.sum(), (x, layer.bias, layer.log_scale))
    for tensor in (z, back, log_det, *gradients):
        assert tensor.isfinite().all()
    assert torch.equal(z[:, 0], torch.zeros_like(z[:, 0])) and layer.log_scale[0] == 0
    assert layer(x + 1)[0].abs().max() < 100, "a constant channel must not be blown up"


def test_a_batch_of_one_vector_is_centred_and_finite():
    layer, x = nn.ActNorm(3), torch.tensor([[1e-8, 2.0, -3e7]], requires_grad=True)
    z, log_det = layer(x)
    assert torch.equal(z, torch.zeros(1, 3)) and torch.equal(log_det, torch.zeros(1)) and layer.initialized
    gradients = torch.autograd.grad(z.sum() + log_det.sum(), (x, *layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_first_batch_that_is_not_finite_is_refused_and_leaves_the_layer_new(bad):
    layer, x = nn.ActNorm(2), torch.randn(4, 2)
    x[1, 1] = bad
    with pytest.raises(ValueError, match="ActNorm: the first batch.*must be finite"):
        layer(x)
    assert not layer.initialized and torch.equal(layer.bias, torch.zeros(2))


def test_gradients_match_finite_differences():
    layer = randomized(nn.ActNorm(2)).double().eval()
    x = normal(2, 2, 3).requires_grad_()
    values = tuple(layer.parameters())

    def function(x, bias, log_scale):
        call = {"bias": bias, "log_scale": log_scale}
        return torch.func.functional_call(layer, call, (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bit_input_keeps_its_type_and_a_float32_log_det(dtype):
    x = (3 * torch.randn(64, 4, 3, 3) + 5).to(dtype)
    for layer in (nn.ActNorm(4), nn.ActNorm(4).to(dtype)):
        z, log_det = layer(x)
        assert z.dtype == dtype and log_det.dtype == torch.float32
        assert layer.inverse(z)[0].dtype == dtype and z.float().mean().abs() < 0.05


def _one_of_two_processes(rank, store):
    torch.set_num_threads(1)  # a forked process has no threads to share work with
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = 3 * normal(12, 4, 2, dtype=torch.float32) + torch.arange(12.0).view(-1, 1, 1)
    whole = x.double()
    bias, log_scale = -whole.mean((0, 2)), -whole.std((0, 2), correction=0).log()
    for share in ((x[:3], x[3:]), (x[:0], x)):  # of different sizes, one even empty
        layer = nn.ActNorm(4)
        layer(share[rank])
        assert layer.initialized
        torch.testing.assert_close(layer.bias.detach(), bias.float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.log_scale.detach(), log_scale.float(), rtol=1e-6, atol=0)
        both = [torch.empty(8), torch.empty(8)]
        distributed.all_gather(both, torch.cat((layer.bias, layer.log_scale)).detach())
        assert torch.equal(*both), "the processes must start from the same bits"
    distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_two_processes_the_first_batch_is_both_shares(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_one_of_two_processes, args=(rank, tmp_path / "store")) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()  # nothing, unless it hangs
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match=r"ActNorm: x must have 3 features along 1, got \(4, 2\)"):
        nn.ActNorm(3)(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"features along 1, got \(3,\)"):
        nn.ActNorm(3).inverse(torch.randn(3))
    with pytest.raises(ValueError, match="features must be at least 1"):
        nn.ActNorm(0)
