"""What holds for every flow model: exact Jacobians, exact inverses, samples, interpolation, files, both backwards."""

import json
import math

import pytest
import torch

from flow_models import VARIANTS, data_of, randomized, variant
from pygen import models

all_variants = pytest.mark.parametrize("name", VARIANTS)
FEATURES = 2  # of the context in conditional variants


def context_of(model, n):
    return torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(1), dtype=next(model.parameters()).dtype)


@all_variants
@pytest.mark.parametrize("conditional", (False, True))
@pytest.mark.parametrize("levels", (None, 5))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(name, conditional, levels):
    model = randomized(variant(name, levels=levels, context_features=FEATURES * conditional)).double()
    x = data_of(model, 2)
    context = context_of(model, 2) if conditional else None
    z, log_det = model(x, context)
    of_first = None if context is None else context[:1]
    jacobian = torch.autograd.functional.jacobian(lambda s: model(s[None], of_first)[0].flatten(), x[0])
    expected = torch.linalg.slogdet(jacobian.reshape(z[0].numel(), -1)).logabsdet
    torch.testing.assert_close(log_det[0], expected, rtol=0, atol=1e-9)
    assert abs(expected) > 1e-3, "these weights change the volume"
    back, inverse_log_det = model.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


@all_variants
def test_every_dimension_of_x_moves_z_and_depends_on_others(name):
    """No pixel is left out, and none is on its own: the Jacobian is neither singular nor diagonal."""
    model = randomized(variant(name)).double()
    x = data_of(model, 1)
    jacobian = torch.autograd.functional.jacobian(lambda s: model(s)[0].flatten(), x).reshape(x.numel(), x.numel())
    assert (jacobian.abs() > 1e-6).sum(0).min() >= 2


@pytest.mark.parametrize(
    ("kind", "arguments"),
    (
        ("nice", {"depth": 4, "prior": "logistic"}),
        ("nice", {"depth": 4, "prior": "normal"}),
        ("realnvp", {"depth": 6}),
        ("nsf", {"depth": 4}),
        ("nsf", {"depth": 2, "linear": "lu"}),
    ),
)
def test_a_two_dimensional_density_integrates_to_one(kind, arguments):
    model = randomized(models.create(kind, {"shape": (2,), "hidden": (8,), "activation": "tanh", **arguments})).double()
    line = torch.linspace(-24, 24, 601, dtype=torch.float64)
    with torch.no_grad():
        density = model.log_prob(torch.cartesian_prod(line, line)).exp()
    assert density.sum().item() * (line[1] - line[0]).item() ** 2 == pytest.approx(1, abs=1e-3)


@all_variants
def test_samples_have_shape_type_range_and_seed(name):
    model = randomized(variant(name, levels=3))
    draw = [model.sample(20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert draw[0].shape == (20, *model.shape) and draw[0].dtype == torch.int64
    assert draw[0].min() >= 0 and draw[0].max() <= 2
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    real = randomized(variant(name)).double()
    assert real.sample(4).dtype == torch.float64 and real.sample(0).shape == (0, *real.shape)


@all_variants
def test_temperature_is_the_spread_of_the_latents(name):
    model = randomized(variant(name)).double()
    assert model.sample(5, temperature=0.0).std(0).max() < 1e-12
    z = [model(model.sample(9, temperature=t, generator=torch.Generator().manual_seed(0)))[0] for t in (1.0, 0.3)]
    torch.testing.assert_close(0.3 * z[0], z[1], rtol=0, atol=1e-9)


@all_variants
def test_conditional_density_depends_on_its_context(name):
    model = randomized(variant(name, context_features=FEATURES))
    x, context = data_of(model, 4), context_of(model, 4)
    assert (model.log_prob(x, context) - model.log_prob(x, context + 1)).abs().min() > 1e-4
    assert model.sample(4, context).shape == x.shape
    with pytest.raises(ValueError, match="context must be"):
        model.log_prob(x)
    with pytest.raises(ValueError, match=r"context must have a row for each of the 3 samples, got \(4, 2\)"):
        model.sample(3, context)


@all_variants
def test_interpolation_begins_and_ends_with_its_images_and_is_straight_in_between(name):
    levels = randomized(variant(name, levels=7))
    x = torch.randint(0, 7, (6, *levels.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = levels.interpolate(x[:3], x[3:], 5)
    assert path.shape == (3, 5, *levels.shape) and path.dtype == torch.int64
    assert torch.equal(path[:, 0], x[:3].long()) and torch.equal(path[:, -1], x[3:].long())
    real = randomized(variant(name, context_features=FEATURES)).double()
    x, context = data_of(real, 4), context_of(real, 2)
    path = real.interpolate(x[:2], x[2:], 3, context)
    torch.testing.assert_close(path[:, 0], x[:2], rtol=0, atol=1e-10)
    torch.testing.assert_close(path[:, -1], x[2:], rtol=0, atol=1e-10)
    z = [real(point, context)[0] for point in (x[:2], path[:, 1], x[2:])]
    torch.testing.assert_close(z[1], (z[0] + z[2]) / 2, rtol=0, atol=1e-9)


@all_variants
def test_config_rebuilds_the_model_and_survives_json(name):
    arguments = {"levels": 5, "alpha": 0.1, "dropout": 0.1, "activation": "silu", "reversible": True}
    model = randomized(variant(name, **arguments))
    config = json.loads(json.dumps(model.config))
    twin = models.create(model.name, config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    x = data_of(model, 3)
    assert torch.equal(twin.log_prob(x), model.log_prob(x))
    stored = models.create(model.name, {**config, "reversible": False}).eval()
    stored.load_state_dict(model.state_dict())  # the memory a model trains in is no part of its weights
    torch.testing.assert_close(stored.log_prob(x), model.log_prob(x))


@all_variants
def test_a_reloaded_model_does_not_take_its_first_batch_for_the_first(name):
    """chaiyujin/glow-pytorch: ActNorm that initialises again after a reload."""
    model = variant(name, levels=5).train()
    x, other = data_of(model, 32), data_of(model, 32, seed=1) / 3
    model.loss(x).backward()  # sets the ActNorms, if there are some
    twin = variant(name, levels=5).train()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.log_prob(other), model.log_prob(other))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in twin.state_dict().items())


@all_variants
@pytest.mark.parametrize("training", (False, True))
def test_reversible_training_has_the_loss_and_gradients_of_ordinary_backpropagation(name, training):
    """Weighted log-probabilities, gradients of weights, data and context, with dropout when training."""
    options = {"levels": 5, "context_features": FEATURES, "dropout": 0.2}
    results = []
    for reversible in (False, True):
        model = randomized(variant(name, reversible=reversible, **options)).double().train(training)
        x, context = data_of(model, 6).requires_grad_(), context_of(model, 6).requires_grad_()
        torch.manual_seed(0)
        loss = (model.log_prob(x, context) * torch.linspace(-1, 2, 6, dtype=torch.float64)).sum()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append((loss.detach(), x.grad, context.grad, *gradients))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ("nice", "realnvp", "realnvp multiscale", "glow", "nsf"))
def test_reversible_training_keeps_no_more_for_a_deeper_model(name):
    def kept(depth, reversible):
        model = variant(name, reversible=reversible, **{"steps" if name == "glow" else "depth": depth}).train()
        x, stored = data_of(model, 64), []
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.loss(x)
        return sum(stored)

    assert kept(16, False) > 1.8 * kept(8, False)
    assert kept(16, True) == kept(8, True) < kept(8, False) / 3


@all_variants
@pytest.mark.parametrize("reversible", (False, True))
def test_a_training_step_in_bfloat16_autocast(name, reversible):
    """normflows#52: writing 16-bit results into 32-bit tensors fails."""
    model = randomized(variant(name, levels=5, reversible=reversible, dropout=0.1)).train()
    x = data_of(model, 16)
    torch.manual_seed(0)
    expected = model.loss(x).item()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x)
    loss.backward()
    optimizer.step()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=0.03)
    assert all(parameter.grad.isfinite().all() and parameter.isfinite().all() for parameter in model.parameters())


@all_variants
@pytest.mark.parametrize("extreme", (1e6, 1e30, math.inf, math.nan))
def test_a_sample_that_overflows_leaves_the_others_alone(name, extreme):
    """normflows#47, #73: exp of what the conditioner says overflows, and the whole batch becomes NaN."""
    exp = {"scale_map": "exp"} if name.startswith("realnvp") else {}
    model = randomized(variant(name, **exp))
    x = data_of(model, 4)
    alone = model.log_prob(x[1:])
    assert alone.isfinite().all()
    x[0] = extreme
    x.requires_grad_()
    log_prob = model.log_prob(x)
    assert not log_prob[0] > alone.max(), "what is far away is not probable"
    torch.testing.assert_close(log_prob[1:], alone, rtol=1e-5, atol=1e-5)
    log_prob[1:].sum().backward()
    assert x.grad[1:].isfinite().all() and x.grad[1:].flatten(1).abs().amax(1).min() > 0


def test_overflow_of_the_scale_is_an_infinite_density_in_its_own_sample():
    """z = x e^a overflows to infinity, and log N(z) is minus infinity, not NaN."""
    model = randomized(models.RealNVP((4,), depth=1, hidden=(), scale_map="exp"), gain=2)
    x = torch.randn(3, 4)
    x[1] = 1000.0
    z, log_det = model(x)
    assert z[1].abs().max() == math.inf and log_det[1].isfinite()
    assert model.log_prob(x)[1] == -math.inf and model.log_prob(x)[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ("nice", "realnvp", "nsf"))
def test_one_dimension_is_a_sentence_and_no_nan(name):
    """normflows#58: a coupling of one dimension has nothing to condition on and returns NaN."""
    with pytest.raises(ValueError, match=r"needs at least 2 dimensions and depth 1, got shape \(1,\)"):
        models.create(name, {"shape": (1,)})


@pytest.mark.parametrize("levels", (2, 256))
def test_both_ways_from_integers_to_real_numbers_count_their_jacobian(levels):
    """An identity flow: the density of v, one level wide, is the prior's at the image of v, times the slope there."""
    v = torch.tensor([[0.3, 1.9]], dtype=torch.float64)
    for logit in (True, False):
        flow = models.NICE((2,), levels=levels, logit=logit, alpha=0.05, prior="normal").double().eval()
        y = v / levels
        z, slope = y, torch.full_like(v, 1 / levels)
        if logit:
            y = 0.05 + 0.9 * y
            z, slope = (y / (1 - y)).log(), 0.9 / levels / (y * (1 - y))
        normal = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        torch.testing.assert_close(flow.log_prob(v), (normal * slope).log().sum(1), rtol=0, atol=1e-9)


def test_mistakes_are_sentences():
    with pytest.raises(ValueError, match=r"Glow: scales=3 needs images .* divisible by 8, got 28 x 28; choose fewer"):
        models.Glow((1, 28, 28), scales=3)
    with pytest.raises(ValueError, match=r"Glow: scales=2 needs .* divisible by 4, got 7 x 8"):
        models.Glow((3, 7, 8))
    with pytest.raises(ValueError, match=r"Glow: shape must be an image's, \(H, W\) or \(C, H, W\), got \(64,\)"):
        models.Glow((64,))
    with pytest.raises(ValueError, match="Glow: coupling must be one of affine, additive, got 'linear'"):
        models.Glow((1, 8, 8), coupling="linear")
    with pytest.raises(ValueError, match="Glow: steps must be at least 1, got 0"):
        models.Glow((1, 8, 8), steps=0)
    with pytest.raises(ValueError, match=r"Glow: hidden must be equal numbers of channels, .*, got \(8, 16\)"):
        models.Glow((1, 8, 8), hidden=(8, 16))
    with pytest.raises(ValueError, match="RealNVP: scales must be at least 1, got 0"):
        models.RealNVP((1, 8, 8), architecture="multiscale", scales=0)
    with pytest.raises(ValueError, match="RealNVP: architecture must be one of mlp, multiscale, got 'unet'"):
        models.RealNVP((1, 8, 8), architecture="unet")
    with pytest.raises(ValueError, match="NSF: linear must be one of permutation, lu, got 'qr'"):
        models.NSF((8,), linear="qr")
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        models.NSF((8,), num_bins=0)
    with pytest.raises(ValueError, match="prior must be one of normal, logistic, got 'cauchy'"):
        models.NICE((8,), prior="cauchy")
    model = models.NSF((4,))
    with pytest.raises(ValueError, match="interpolate: n must be at least 2, got 1"):
        model.interpolate(torch.zeros(1, 4), torch.zeros(1, 4), 1)
    with pytest.raises(ValueError, match=r"x0 and x1 must have one shape, got \(1, 4\) and \(2, 4\)"):
        model.interpolate(torch.zeros(1, 4), torch.zeros(2, 4), 3)
