"""Saved steps of Glow, in the layouts of two packages, become `nn.GlowStep`.

Neither package can be installed, so each layout has a plain implementation here, written from the description of what
its parameters mean; the names of the parameters are the layout.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn as torch_nn

from peers.trained import assert_same_flow, trained
from pygen.nn import convert


class Given(torch_nn.Module):
    """Holds parameters (those that begin with a capital: buffers) under the names of a layout."""

    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, torch_nn.Module):
                self.add_module(name, tensor)
            else:
                self.register_parameter(name, torch_nn.Parameter(tensor))


def per_pixel(matrix, x):
    return torch.einsum("ij,bjhw->bihw", matrix, x)


def area(x):
    return x.size(2) * x.size(3)


class Step(torch_nn.Module):
    """ActNorm, 1x1 convolution and coupling of the second half by the first, from what a layout's methods say."""

    def forward(self, x):
        shift, scale = self.shift_and_scale()
        weight = self.weight()
        x = per_pixel(weight, scale * (x + shift))
        log_det = area(x) * (scale.abs().log().sum() + torch.linalg.slogdet(weight)[1])
        first, second = x.chunk(2, 1)
        scale, shift = self.coefficients(first)
        return torch.cat((first, (second + shift) * scale), 1), log_det + scale.log().flatten(1).sum(1)

    def inverse(self, z):
        first, second = z.chunk(2, 1)
        scale, shift = self.coefficients(first)
        log_det = -scale.log().flatten(1).sum(1)
        x = per_pixel(self.weight().inverse(), torch.cat((first, second / scale - shift), 1))
        shift, scale = self.shift_and_scale()
        return x / scale - shift, log_det - area(z) * (scale.abs().log().sum() + torch.linalg.slogdet(self.weight())[1])


class RosinalityStep(Step):
    """rosinality/glow-pytorch: scale, shift are halves; the last convolution pads with ones."""

    def __init__(self, channels, hidden=7, affine=True, lu=True):
        super().__init__()
        self.affine = affine
        self.actnorm = Given(loc=torch.zeros(1, channels, 1, 1), scale=torch.ones(1, channels, 1, 1))
        self.actnorm.register_buffer("initialized", torch.tensor(1, dtype=torch.uint8))
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q
        if lu:
            permutation, lower, upper = torch.linalg.lu(rotation)
            self.invconv = Given(w_l=lower, w_s=upper.diagonal().abs().log(), w_u=upper)
            self.invconv.register_buffer("w_p", permutation)
            self.invconv.register_buffer("s_sign", upper.diagonal().sign())
            self.invconv.register_buffer("l_eye", torch.eye(channels))
        else:
            self.invconv = Given(weight=rotation[:, :, None, None])
        out = channels if affine else channels // 2
        last = Given(conv=torch_nn.Conv2d(hidden, out, 3), scale=torch.zeros(1, out, 1, 1))
        net = (torch_nn.Conv2d(channels // 2, hidden, 3, padding=1), torch_nn.Conv2d(hidden, hidden, 1), last)
        self.coupling = Given(net=torch_nn.ModuleDict(dict(zip(("0", "2", "4"), net, strict=True))))

    def shift_and_scale(self):
        return self.actnorm.loc, self.actnorm.scale

    def weight(self):
        c = self.invconv
        if hasattr(c, "weight"):
            return c.weight[:, :, 0, 0]
        upper = c.w_u.triu(1) + torch.diag(c.s_sign * c.w_s.exp())
        return c.w_p @ (c.w_l.tril(-1) + c.l_eye) @ upper

    def coefficients(self, x):
        net = self.coupling.net
        h = F.pad(net["2"](net["0"](x).relu()).relu(), (1, 1, 1, 1), value=1.0)
        h = net["4"].conv(h) * (3 * net["4"].scale).exp()
        if not self.affine:
            return torch.ones_like(h), h
        log_scale, shift = h.chunk(2, 1)
        return torch.sigmoid(log_scale + 2), shift


class OpenaiStep(Step):
    """chaiyujin/glow-pytorch, as openai/glow: shift and scale alternate; inner convolutions have an ActNorm."""

    def __init__(self, channels, hidden=7, affine=True):
        super().__init__()
        self.affine = affine

        def actnorm(n):
            return Given(bias=torch.zeros(1, n, 1, 1), logs=torch.zeros(1, n, 1, 1))

        def inner(n_in, kernel):
            return Given(weight=0.3 * torch.randn(hidden, n_in, kernel, kernel), actnorm=actnorm(hidden))

        out = channels if affine else channels // 2
        zeros = Given(weight=torch.zeros(out, hidden, 3, 3), bias=torch.zeros(out), logs=torch.zeros(out, 1, 1))
        self.actnorm = actnorm(channels)
        self.invconv = Given(weight=torch.linalg.qr(torch.randn(channels, channels)).Q)
        self.f = torch_nn.ModuleDict({"0": inner(channels // 2, 3), "2": inner(hidden, 1), "4": zeros})

    def shift_and_scale(self):
        return self.actnorm.bias, self.actnorm.logs.exp()

    def weight(self):
        return self.invconv.weight

    def coefficients(self, x):
        for layer, padding in ((self.f["0"], 1), (self.f["2"], 0)):
            x = F.conv2d(x, layer.weight, padding=padding)
            x = ((x + layer.actnorm.bias) * layer.actnorm.logs.exp()).relu()
        last = self.f["4"]
        h = F.conv2d(x, last.weight, last.bias, padding=1) * (3 * last.logs).exp()
        if not self.affine:
            return torch.ones_like(h), h
        return torch.sigmoid(h[:, 1::2] + 2), h[:, 0::2]


STEPS = {
    "rosinality": lambda: RosinalityStep(6),
    "rosinality, undecomposed": lambda: RosinalityStep(6, lu=False),
    "rosinality, additive": lambda: RosinalityStep(6, affine=False),
    "openai": lambda: OpenaiStep(6),
    "openai, additive": lambda: OpenaiStep(6, affine=False),
}


@pytest.mark.parametrize("layout", STEPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_a_trained_step_gives_the_same_log_prob(layout, dtype, tolerance):
    torch.manual_seed(0)
    peer = trained(STEPS[layout](), spread=0.1).to(dtype)
    x = torch.randn(10, 6, 4, 5, dtype=torch.float64)
    step = convert.from_glow_state_dict(peer.state_dict())
    assert step[1].conditioner[0].weight.dtype == dtype
    assert_same_flow(step, peer, peer.inverse, x.to(dtype), tolerance=tolerance)


def test_a_negative_scale_of_the_actnorm_moves_into_the_matrix():
    torch.manual_seed(0)
    peer = trained(RosinalityStep(4))
    with torch.no_grad():
        peer.actnorm.scale[:, 1] = -0.7
    x = torch.randn(10, 4, 3, 3, dtype=torch.float64)
    assert_same_flow(convert.from_glow_state_dict(peer.state_dict()), peer, peer.inverse, x)


def test_a_step_is_found_by_its_prefix_and_trains_on_its_own():
    torch.manual_seed(0)
    peers = torch_nn.ModuleList(trained(RosinalityStep(4), seed, 0.1) for seed in (1, 2))
    state = {f"blocks.0.flows.{name}": tensor for name, tensor in peers.state_dict().items()}
    x = torch.randn(10, 4, 3, 3, dtype=torch.float64)
    for i, peer in enumerate(peers):
        step = convert.from_glow_state_dict(state, f"blocks.0.flows.{i}.")
        assert_same_flow(step, peer, peer.inverse, x)
        z, log_det = step.train()(x)
        (z.square().sum() - log_det.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
        with torch.no_grad():
            for parameter in step.parameters():
                parameter.zero_()
        assert not any((p == 0).all() for p in peer.parameters())


def test_a_peer_that_saw_no_data_yet_is_set_by_the_first_batch_here_as_well():
    peer = RosinalityStep(4)
    peer.actnorm.initialized.fill_(0)
    step = convert.from_glow_state_dict(peer.state_dict()).train()
    z, _ = step[0](5 + 3 * torch.randn(50, 4, 3, 3))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: {}, r"must have actnorm.loc \(rosinality\) or actnorm.logs \(chaiyujin\), got \[\]"),
        (
            lambda s: {k: t for k, t in s.items() if k != "invconv.weight"},
            "invconv.weight is missing; of a decomposed or shuffled step the permutation is not in the file",
        ),
    ],
)
def test_a_file_that_does_not_hold_a_step_is_refused_with_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert.from_glow_state_dict(change(OpenaiStep(4).state_dict()))
