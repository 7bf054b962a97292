"""What the tests of converters share: peers that look trained, and how two flows are compared."""

import math

import torch


def trained(module, seed=0, spread=0.2):
    """Moves every parameter of a fresh peer, so that none is zero, one or like another; in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def normal_log_prob(z, log_det):
    """log p(x) of a flow with a standard normal base."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.size(1) * math.log(2 * math.pi)) + log_det


def assert_same_flow(ours, forward, inverse, x, context=None, tolerance=1e-9):
    """z, log_det and log_prob of x, and x and log_det of z: `forward` and `inverse` are the peer's (None: it fails)."""
    same = {"atol": tolerance, "rtol": tolerance}
    with torch.no_grad():
        z, log_det = ours(x, context)
        true_z, true_log_det = forward(x)
        back, back_log_det = ours.inverse(true_z, context)
        torch.testing.assert_close(z, true_z, **same)
        torch.testing.assert_close(log_det, true_log_det, **same)
        torch.testing.assert_close(normal_log_prob(z, log_det), normal_log_prob(true_z, true_log_det), **same)
        torch.testing.assert_close(back, x, atol=100 * tolerance, rtol=100 * tolerance)
        torch.testing.assert_close(back_log_det, -log_det, atol=100 * tolerance, rtol=100 * tolerance)
        if inverse is not None:
            true_back, true_back_log_det = inverse(true_z)
            torch.testing.assert_close(back, true_back, **same)
            torch.testing.assert_close(back_log_det, true_back_log_det, **same)
    assert (z - x).abs().max() > 0.1, "the peer does nothing: the comparison is empty"
