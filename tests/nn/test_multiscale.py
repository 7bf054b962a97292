"""Squeeze and Multiscale: every latent is kept, ordered as documented, and priors are exact densities."""

import pytest
import torch
from nn.jacobian import assert_exact, normal, randomized

from pygen import nn


def level(channels, context_features=0, squeeze=True):
    conditioner = nn.ConvNet(channels // 2, channels, 4, 1, context_features=context_features)
    step = nn.GlowStep(channels, conditioner)
    return nn.Sequential(nn.Squeeze(), step) if squeeze else step


def flow(priors=True, context_features=0):
    """Three levels on (1, 8, 8): 4 x 4 x 4, 8 x 2 x 2 (2 kept of 4, squeezed), and once more without squeezing."""
    levels = [level(4, context_features), level(8, context_features), level(4, context_features, squeeze=False)]
    priors = [nn.ConvPrior(2, context_features=context_features), nn.ConvPrior(4)] if priors else None
    if context_features:
        priors[1] = None
    flow = nn.Multiscale((1, 8, 8), levels, priors=priors).eval()
    for module in flow.modules():
        if isinstance(module, nn.ConvNet | nn.ConvPrior | nn.ActNorm):
            randomized(module)
    return flow.double()


@pytest.mark.parametrize("factor", (1, 2, 3))
def test_squeeze_is_pixel_unshuffle_and_inverts(factor):
    layer, x = nn.Squeeze(factor), torch.randn(2, 3, 2 * factor, 3 * factor)
    z, log_det = layer(x)
    assert torch.equal(z, torch.nn.functional.pixel_unshuffle(x, factor)) and torch.equal(log_det, torch.zeros(2))
    assert tuple(z.shape[1:]) == layer.output_shape(x.shape[1:])
    assert torch.equal(layer.inverse(z)[0], x)


def test_squeeze_has_the_channel_order_of_openai_glow():
    """openai/glow, NHWC: reshape to (H/f, f, W/f, f, C), transpose to (H/f, W/f, C, f, f)."""
    x = torch.randn(2, 3, 4, 6)
    nhwc = x.permute(0, 2, 3, 1).reshape(2, 2, 2, 3, 2, 3).permute(0, 1, 3, 5, 2, 4).reshape(2, 2, 3, 12)
    assert torch.equal(nn.Squeeze()(x)[0], nhwc.permute(0, 3, 1, 2))


def test_squeeze_takes_any_strides_and_empty_batches():
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    assert torch.equal(nn.Squeeze()(x)[0], nn.Squeeze()(x.contiguous())[0])
    assert nn.Squeeze().inverse(nn.Squeeze()(torch.empty(0, 3, 4, 6))[0])[0].shape == (0, 3, 4, 6)


@pytest.mark.parametrize("priors", (False, True))
def test_log_det_is_that_of_the_autograd_jacobian_and_inverse_inverts(priors):
    assert_exact(flow(priors), normal(2, 1, 8, 8))


def test_context_reaches_levels_and_priors():
    model, x, context = flow(context_features=3), normal(2, 1, 8, 8), normal(2, 3, seed=5)
    assert_exact(model, x, context)
    z, log_det = model(x, context)
    context.requires_grad_()
    parts = [model(x, context)[0][:, i] for i in (0, -1)]  # a factored latent and one of the last level
    for part in parts:
        (gradient,) = torch.autograd.grad(part.sum(), context, retain_graph=True)
        assert gradient.abs().sum(1).min() > 0
    with pytest.raises(ValueError, match=r"context must be \(B, 3\), got none"):
        model(x)


def test_no_factored_latent_is_dropped_unlike_chaiyujin_9_and_rosinality_45():
    """Their inverse needs reconstruct=True, or draws the factored latents anew; here z holds them all."""
    model, x = flow(), normal(4, 1, 8, 8)
    z, _ = model(x)
    assert z.shape == (4, 64) == (4, *model.output_shape((1, 8, 8)))
    torch.testing.assert_close(model.inverse(z)[0], x, rtol=0, atol=1e-10)
    # Every latent matters for x, and x is a function of z alone.
    jacobian = torch.autograd.functional.jacobian(lambda z: model.inverse(z[None])[0][0], z[0]).reshape(64, 64)
    assert (jacobian.abs().sum(0) > 0).all()
    assert torch.equal(model.inverse(z)[0], model.inverse(z)[0])


def test_latents_are_ordered_by_the_level_at_which_they_leave():
    x = torch.randn(3, 1, 4, 4)
    z, _ = nn.Multiscale((1, 4, 4), [nn.Squeeze(), nn.Squeeze()])(x)
    first = nn.Squeeze()(x)[0]
    assert torch.equal(z[:, :8], first[:, 2:].flatten(1))
    assert torch.equal(z[:, 8:], nn.Squeeze()(first[:, :2])[0].flatten(1))


def test_of_odd_channels_the_larger_part_is_kept_and_vectors_may_be_split_too():
    x = torch.randn(2, 5, 3)
    model = nn.Multiscale((5, 3), [nn.Sequential(), nn.Sequential()])
    z, _ = model(x)
    assert torch.equal(z, torch.cat((x[:, 3:].flatten(1), x[:, :3].flatten(1)), 1))
    assert torch.equal(model.inverse(z)[0], x)
    z, _ = nn.Multiscale((3,), [nn.Sequential(), nn.Sequential()])(x[:, :3, 0])
    assert torch.equal(z, x[:, [2, 0, 1], 0])


def test_a_prior_turns_the_density_of_what_it_factors_out_into_its_normal_density():
    """With z standard normal, log N(z2'; 0, 1) + log_det is log N(z2; mean, exp(log_scale))."""
    prior = randomized(nn.ConvPrior(2, 2)).double()
    model = nn.Multiscale((4, 3, 3), [nn.Sequential(), nn.Sequential()], priors=[prior])
    x = normal(5, 4, 3, 3)
    z, log_det = model(x)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    mean, log_scale = prior(x[:, :2]).chunk(2, 1)
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(x[:, 2:]).sum((1, 2, 3))
    expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(x[:, :2]).sum((1, 2, 3))
    torch.testing.assert_close(standard, expected, rtol=0, atol=1e-11)


def test_a_new_prior_is_the_standard_normal_one_and_learns():
    x = torch.randn(2, 1, 4, 4)
    plain = nn.Multiscale((1, 4, 4), [nn.Squeeze(), nn.Squeeze()])
    learned = nn.Multiscale((1, 4, 4), [nn.Squeeze(), nn.Squeeze()], priors=[nn.ConvPrior(2)])
    z, log_det = learned(x)
    torch.testing.assert_close((z, log_det), plain(x), rtol=0, atol=0)
    (z.square().sum() - log_det.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned.parameters())


def test_a_prior_may_return_a_tuple():
    class Pair(torch.nn.Module):
        def forward(self, kept):
            return kept.sin(), kept.cos()

    x = normal(3, 2, 2, 2)
    model = nn.Multiscale((2, 2, 2), [nn.Sequential(), nn.Sequential()], priors=[Pair()])
    z, log_det = model(x)
    kept, y = x[:, :1], x[:, 1:]
    torch.testing.assert_close(z[:, :4], ((y - kept.sin()) / kept.cos().exp()).flatten(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_det, -kept.cos().sum((1, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.inverse(z)[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "log_det_dtype"), ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)))
def test_types_and_empty_batches(dtype, log_det_dtype):
    model = flow().to(dtype)
    for batch in (0, 2):
        z, log_det = model(torch.zeros(batch, 1, 8, 8, dtype=dtype))
        assert (z.shape, z.dtype) == ((batch, 64), dtype)
        assert (log_det.shape, log_det.dtype) == ((batch,), log_det_dtype)
        assert model.inverse(z)[0].shape == (batch, 1, 8, 8)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="H and W divisible by 2, got"):
        nn.Squeeze()(torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match=r"Squeeze: x must be \(B, C, H, W\)"):
        nn.Squeeze()(torch.randn(1, 4, 4))
    with pytest.raises(ValueError, match="C divisible by 4, got"):
        nn.Squeeze().inverse(torch.randn(1, 6, 4, 4))
    with pytest.raises(ValueError, match="factor must be at least 1"):
        nn.Squeeze(0)
    two = [nn.Sequential(), nn.Sequential()]
    with pytest.raises(ValueError, match="at least one transform"):
        nn.Multiscale((4, 2, 2), [])
    with pytest.raises(ValueError, match="one entry per split, 1 for 2 levels, got 2"):
        nn.Multiscale((4, 2, 2), two, priors=[None, None])
    with pytest.raises(ValueError, match=r"level 0 must return at least 2 channels to split, got \(1, 2, 2\)"):
        nn.Multiscale((1, 2, 2), two)
    with pytest.raises(ValueError, match=r"H and W divisible by 2, got \(B, \*\(1, 3, 3\)\)"):
        nn.Multiscale((1, 3, 3), [nn.Squeeze()])
    with pytest.raises(ValueError, match=r"built for samples of shape \(4, 2, 2\), got \(4, 2, 3\)"):
        nn.Multiscale((4, 2, 2), two)(torch.randn(1, 4, 2, 3))
    with pytest.raises(ValueError, match=r"z must be \(B, 16\), got \(1, 15\)"):
        nn.Multiscale((4, 2, 2), two).inverse(torch.randn(1, 15))
    with pytest.raises(ValueError, match=r"prior 0 must return mean and log_scale, each \(1, 2, 2, 2\).*got \(1, 6"):
        nn.Multiscale((4, 2, 2), two, priors=[nn.ConvPrior(2, 3)])(torch.randn(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"ConvPrior: context must be \(B, 3\), got \(1, 2\)"):
        nn.ConvPrior(2, context_features=3)(torch.randn(1, 2, 2, 2), torch.randn(1, 2))
