"""The baselines, against numbers worked out by hand or by sampling."""

import math

import pytest
import torch

from pygen.models.baselines import FullGaussian, PixelHistogram


def test_histogram_is_laplace_smoothed_counting():
    x = torch.tensor([[0, 2], [0, 1], [1, 2]])
    histogram = PixelHistogram(x, levels=3)
    expected = math.log((2 + 1) / (3 + 3)) + math.log((0 + 1) / (3 + 3))
    assert histogram.log_prob(torch.tensor([[0, 0]])).item() == pytest.approx(expected, abs=1e-12)
    assert histogram.bits_per_dim(torch.tensor([[0, 0]])).item() == pytest.approx(-expected / 2 / math.log(2))


def test_histogram_is_a_distribution():
    x = torch.randint(0, 5, (20, 2))
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    assert PixelHistogram(x, levels=5).log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_histogram_of_uniform_data_costs_log2_levels():
    x = torch.randint(0, 16, (20_000, 3), generator=torch.Generator().manual_seed(0))
    assert PixelHistogram(x, 16).bits_per_dim(x).mean().item() == pytest.approx(4, abs=1e-3)


def test_gaussian_bound_is_the_mean_over_dequantisation_noise():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(200, 2, generator=generator) @ torch.tensor([[3.0, 1.0], [0.0, 2.0]])).round().long()
    gaussian = FullGaussian(x)
    v = x.double().repeat(2000, 1)
    v = v + torch.rand(v.shape, dtype=torch.float64, generator=generator)
    sampled = torch.distributions.MultivariateNormal(v.mean(0), v.T.cov(correction=0)).log_prob(v).mean()
    assert gaussian.log_prob(x).mean().item() == pytest.approx(sampled.item(), abs=2e-4)


def test_gaussian_bound_is_below_the_exact_integral():
    x = torch.tensor([[0], [0], [1], [3]])
    gaussian = FullGaussian(x)
    normal = torch.distributions.Normal(gaussian.mean, gaussian.cholesky[0])
    points = torch.arange(-2, 6)[:, None]
    exact = (normal.cdf(points + 1.0) - normal.cdf(points.double())).log().squeeze(1)
    bound = gaussian.log_prob(points)
    assert (bound < exact).all() and (exact - bound)[2:5].max() < 0.02, "tight where the data are"


@pytest.mark.parametrize("x", (torch.zeros(3, 2), torch.zeros(0, 2).long(), torch.zeros(3).long()))
def test_baselines_refuse_what_they_cannot_fit(x):
    for fit in (lambda: PixelHistogram(x, 2), lambda: FullGaussian(x)):
        with pytest.raises(ValueError, match="must be a non-empty integer tensor"):
            fit()
