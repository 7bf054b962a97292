"""NICE against its formula written out, and its logistic prior against the definition."""

import math

import numpy as np
import torch

from flow_models import randomized
from pygen import models
from pygen.models.base import standard_logistic_log_prob
from pygen.models.nice import Scaling


def test_log_prob_is_the_logistic_density_of_a_linear_map():
    """Without hidden layers the couplings are linear: h_a = h_p W^T + b, even positions first."""
    model = randomized(models.NICE((5,), depth=3, hidden=())).double()
    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    (w0, b0), (w1, b1), (w2, b2), log_scale = weights[0:2], weights[2:4], weights[4:6], weights[6]
    x = np.random.default_rng(0).normal(size=(7, 5))
    even, odd = x[:, [0, 2, 4]], x[:, [1, 3]]
    odd = odd + even @ w0.T + b0
    even = even + odd @ w1.T + b1
    odd = odd + even @ w2.T + b2
    z = np.concatenate((even, odd), 1) * np.exp(log_scale)
    density = (np.exp(-z) / (1 + np.exp(-z)) ** 2).prod(1) * np.exp(log_scale).prod()
    torch.testing.assert_close(model.log_prob(torch.from_numpy(x)).exp(), torch.from_numpy(density), rtol=1e-12, atol=0)


def test_volume_changes_by_the_scaling_alone():
    model = randomized(models.NICE((6,), depth=4, hidden=(8,))).double()
    _, log_det = model(torch.randn(9, 6, dtype=torch.float64))
    scaling = next(layer for layer in model.transform if isinstance(layer, Scaling))
    assert torch.equal(log_det, scaling.log_scale.sum().expand(9)) and log_det.abs().min() > 0.01


def test_logistic_prior_is_exact_far_out_and_at_its_mode():
    z = torch.tensor([[0.0], [800.0], [-800.0], [math.inf]], dtype=torch.float64, requires_grad=True)
    log_prob = standard_logistic_log_prob(z)
    expected = torch.tensor([-math.log(4), -800.0, -800.0, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(log_prob.detach(), expected, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(log_prob[:3].sum(), z)
    assert torch.equal(gradient.flatten(), torch.tensor([0.0, -1.0, 1.0, 0.0], dtype=torch.float64))


def test_samples_of_an_identity_flow_follow_the_logistic_distribution():
    """Its distribution function is the sigmoid: Kolmogorov-Smirnov at a level of 1e-4."""
    n = 20_000
    u = models.NICE((2,)).sample(n // 2, generator=torch.Generator().manual_seed(0)).sigmoid().flatten().sort().values
    assert (u - (torch.arange(n) + 0.5) / n).abs().max() < 2.2 / math.sqrt(n)
