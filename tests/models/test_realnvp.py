"""RealNVP: an honest density. Integrals, Jacobians and known answers, none of them from the code under test."""

import json
import math

import pytest
import torch

from flow_models import randomized
from pygen import models
from pygen.nn import Sequential


class Uniform(models.Flow):
    """A flow whose exact answer is known: standard-normal quantiles make uniform data a standard normal."""

    def __init__(self, levels, dimensions):
        super().__init__(Sequential(), (dimensions,), levels=levels, alpha=0.05, config={})
        self.preprocess = _Quantile(levels)
        self.weight = torch.nn.Parameter(torch.zeros(()))


class _Quantile(torch.nn.Module):
    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def forward(self, x):
        z = torch.special.ndtri((x / self.levels).clamp(1e-6, 1 - 1e-6))
        log_slope = 0.5 * z**2 + 0.5 * math.log(2 * math.pi) - math.log(self.levels)
        return z, log_slope.sum(1)


@pytest.mark.parametrize("levels", (2, 17, 256))
def test_uniform_integers_cost_log2_levels_bits_under_the_uniform_density(levels):
    x = torch.randint(0, levels, (50, 7))
    bits = Uniform(levels, 7).bits_per_dim(x)
    torch.testing.assert_close(bits, torch.full((50,), math.log2(levels)), rtol=0, atol=1e-4)


def test_discrete_probabilities_of_a_two_pixel_model_sum_to_one():
    """sum_x P(x) = sum_x E_u p(x + u) is the integral of p over the box, all mass but what the flow puts outside."""
    model = randomized(models.RealNVP((2,), levels=4, depth=4, hidden=(8,), alpha=1e-4)).double()
    steps = 200
    inside = (torch.arange(4 * steps, dtype=torch.float64) + 0.5) / steps
    points = torch.cartesian_prod(inside, inside)
    integral = model.log_prob(points).exp().sum().item() / steps**2
    outside = (model.inverse(torch.randn(20_000, 2, dtype=torch.float64))[0] - 2).abs().amax(1) > 2
    assert integral == pytest.approx(1 - outside.double().mean().item(), abs=3e-3)


def test_a_two_dimensional_density_integrates_to_one():
    model = randomized(models.RealNVP((2,), depth=6, hidden=(16,))).double()
    line = torch.linspace(-12, 12, 961, dtype=torch.float64)
    density = model.log_prob(torch.cartesian_prod(line, line)).exp()
    assert density.sum().item() * (line[1] - line[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", ((5,), (3, 4), (2, 3, 3)))
@pytest.mark.parametrize("levels", (None, 5))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(shape, levels):
    model = randomized(models.RealNVP(shape, levels=levels, depth=4, hidden=(8,))).double()
    x = torch.rand(2, *shape, dtype=torch.float64) * (levels or 1)
    z, log_det = model(x)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda s: model(s[None])[0].flatten(), x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(z[i].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det[i], expected, rtol=0, atol=1e-9)
    back, inverse_log_det = model.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 1e-4)))
def test_inverse_recovers_input_at_depth_32(dtype, tolerance):
    model = randomized(models.RealNVP((64,), depth=32, hidden=(32,)), gain=0.3).to(dtype)
    x = torch.randn(16, 64, dtype=dtype)
    torch.testing.assert_close(model.inverse(model(x)[0])[0], x, rtol=0, atol=tolerance)


def test_integers_survive_the_round_trip():
    model = randomized(models.RealNVP((1, 8, 8), levels=17))
    x = torch.randint(0, 17, (32, 1, 8, 8), dtype=torch.uint8)
    z, _ = model(x)
    assert torch.equal(model.inverse(z)[0].floor().to(torch.uint8), x)


def test_samples_are_integers_in_range_and_seeded():
    model = randomized(models.RealNVP((1, 4, 4), levels=3))
    draw = [model.sample(50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draw[0].shape == (50, 1, 4, 4) and draw[0].dtype == torch.int64
    assert draw[0].min() >= 0 and draw[0].max() <= 2
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_samples_follow_the_density():
    """Frequencies of 2 x 2 = 4 outcomes against the integral of the density over each cell."""
    model = randomized(models.RealNVP((2,), levels=2, depth=4, hidden=(8,), alpha=1e-4)).double()
    samples = model.sample(100_000, generator=torch.Generator().manual_seed(0))
    observed = torch.bincount(samples @ torch.tensor([2, 1]), minlength=4) / len(samples)
    middles = (torch.arange(400, dtype=torch.float64) + 0.5) / 200
    density = model.log_prob(torch.cartesian_prod(middles, middles)).exp().view(2, 200, 2, 200)
    torch.testing.assert_close(observed.double(), density.sum((1, 3)).flatten() / 200**2, rtol=0, atol=6e-3)


def test_temperature_zero_gives_one_image_and_lower_temperature_less_spread():
    model = randomized(models.RealNVP((6,)))
    assert model.sample(5, temperature=0.0).std(0).max() < 1e-6
    spread = [model.sample(500, temperature=t).std(0).mean() for t in (0.3, 1.0)]
    assert spread[0] < spread[1]


def test_conditional_density_depends_on_its_context():
    model = randomized(models.RealNVP((4,), context_features=2))
    x, context = torch.randn(6, 4), torch.randn(6, 2)
    assert not torch.allclose(model.log_prob(x, context), model.log_prob(x, context + 1))
    torch.testing.assert_close(model.inverse(model(x, context)[0], context)[0], x, rtol=0, atol=1e-4)
    assert model.sample(6, context).shape == (6, 4)
    with pytest.raises(ValueError, match="context must be"):
        model.log_prob(x)


def test_config_rebuilds_the_model_and_survives_json():
    model = randomized(models.RealNVP((1, 4, 4), levels=5, depth=3, hidden=(7, 9), scale_map="sigmoid", dropout=0.1))
    twin = models.create(model.name, json.loads(json.dumps(model.config))).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.rand(3, 1, 4, 4) * 5
    assert torch.equal(twin.log_prob(x), model.log_prob(x))


def test_runs_from_before_the_multiscale_architecture_load_and_resume():
    """Resuming compares configs, and loading compares names: both are what they were."""
    model = models.RealNVP((1, 4, 4), levels=5, depth=1, hidden=(7,))
    assert model.config == {
        "shape": [1, 4, 4],
        "levels": 5,
        "alpha": 0.05,
        "depth": 1,
        "hidden": [7],
        "dropout": 0.0,
        "activation": "relu",
        "scale_map": "tanh",
        "context_features": 0,
    }
    layers = [f"transform.transforms.2.conditioner.layers.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")]
    assert list(model.state_dict()) == ["transform.transforms.1.indices", *layers]


def test_loss_is_the_mean_bits_per_dimension():
    model = randomized(models.RealNVP((3,)))
    x = torch.randn(4, 3)
    assert model.loss(x).item() == pytest.approx(-model.log_prob(x).mean().item() / 3 / math.log(2), rel=1e-6)


def test_bad_input_is_a_sentence():
    model = models.RealNVP((1, 4, 4), levels=4)
    with pytest.raises(ValueError, match=r"expected x \(B, 1, 4, 4\), got \(2, 4, 4\)"):
        model.log_prob(torch.zeros(2, 4, 4).long())
    with pytest.raises(TypeError, match="without levels, x must be floating point"):
        models.RealNVP((4,)).log_prob(torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        models.RealNVP((1,))
    with pytest.raises(ValueError, match="temperature must be a number >= 0, got -1"):
        model.sample(1, temperature=-1)
    with pytest.raises(ValueError, match="n must not be negative"):
        model.sample(-1)
    with pytest.raises(ValueError, match="unknown model 'glowing'; there is: .*realnvp"):
        models.create("glowing", {})
    with pytest.raises(ValueError, match="model realnvp: .*unexpected keyword argument 'colour'"):
        models.create("realnvp", {"shape": (2,), "colour": 3})
