"""Dequantisation and logit transform: the Jacobian must be right, or bits per dimension mean nothing."""

import math

import pytest
import torch

from pygen import models


def test_dequantised_values_keep_their_integer_and_are_uniform_within_it():
    x = torch.randint(0, 256, (400, 300), dtype=torch.uint8)
    v = models.dequantize(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(v.floor().long(), x.long())
    u = (v - x).flatten().sort().values
    distance = (u - torch.linspace(0, 1, len(u))).abs().max()
    assert distance < 1.63 / math.sqrt(len(u)), "Kolmogorov-Smirnov at 1 %"


def test_dequantisation_never_rounds_up_to_the_next_level(monkeypatch):
    almost_one = 1 - 2**-24  # the largest float32 below 1; 16 + it rounds to 17
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, almost_one))
    x = torch.arange(17)
    assert torch.equal(models.dequantize(x).floor().long(), x)


def test_dequantize_refuses_real_numbers():
    with pytest.raises(TypeError, match="must be integer, got torch.float32"):
        models.dequantize(torch.zeros(2))


@pytest.mark.parametrize(("levels", "alpha"), ((2, 0.05), (17, 0.01), (256, 1e-6)))
def test_logit_log_det_is_that_of_autograd_and_inverse_inverts(levels, alpha):
    layer = models.Logit(levels, alpha)
    x = (torch.rand(5, 3, 2, dtype=torch.float64) * levels).requires_grad_()
    z, log_det = layer(x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(log_det, slope.log().flatten(1).sum(1), rtol=0, atol=1e-9)
    back, inverse_log_det = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9 * levels)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


def test_logit_is_finite_at_both_ends():
    z, log_det = models.Logit(256, 1e-6)(torch.tensor([[0.0, 256.0]]))
    assert z.isfinite().all() and log_det.isfinite().all()


@pytest.mark.parametrize(("levels", "alpha", "words"), ((0, 0.1, "levels"), (4, 0.0, "alpha"), (4, 0.5, "alpha")))
def test_logit_refuses_bad_options(levels, alpha, words):
    with pytest.raises(ValueError, match=words):
        models.Logit(levels, alpha)
