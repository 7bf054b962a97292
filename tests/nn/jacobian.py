"""What the tests of the flow layers share: layers that do something, and the log-determinant that autograd knows."""

import torch


def randomized(module, seed=0, gain=0.5):
    """The module with parameters of gain / sqrt(fan-in): a new layer is the identity, or close to one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        torch.nn.init.normal_(parameter, std=gain / fan_in**0.5, generator=generator)
    return module


def jacobian_log_det(function, x):
    """log |det dz/dx| of every sample, (B,), from autograd's full Jacobian: knows nothing of the layers."""
    dets = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda s: function(s[None])[0][0], sample)
        dets.append(torch.linalg.slogdet(jacobian.reshape(sample.numel(), sample.numel())).logabsdet)
    return torch.stack(dets)


def assert_exact(layer, x, context=None):
    """In float64: log_det is the Jacobian's to 1e-9, in both directions, and inverse inverts to 1e-10."""

    def forward(x):
        return layer(x) if context is None else layer(x, context[:1].expand(len(x), -1))

    def inverse(z):
        return layer.inverse(z) if context is None else layer.inverse(z, context[:1].expand(len(z), -1))

    z, log_det = forward(x)
    back, inverse_log_det = inverse(z)
    assert log_det.shape == inverse_log_det.shape == (len(x),)
    assert log_det.abs().min() > 1e-3, "the layer under test must do something"
    torch.testing.assert_close(log_det, jacobian_log_det(forward, x), rtol=0, atol=1e-9)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, jacobian_log_det(inverse, z), rtol=0, atol=1e-9)


def normal(*shape, seed=1, dtype=torch.float64):
    """Standard normal numbers that do not depend on what ran before."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
