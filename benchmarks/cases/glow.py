"""A step of Glow without its conditioner's convolutions, and a deep Glow that trains without storing activations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen import nn as pnn
from pygen.benchmarks.registry import Call, Case, Floor, Inputs, Target, register


class _Given(nn.Module):
    """A conditioner that costs nothing: what it returns was there before."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


# ---- one step --------------------------------------------------------------------------------------------------------


def _plain_step(x, out, bias, log_scale, lower, upper, log_diagonal, sign, permutation):
    """A Glow step as it is usually written: ActNorm, the weight from its factors, a convolution, the coupling."""
    pixels = x.size(2) * x.size(3)
    x = (x + bias.view(1, -1, 1, 1)) * log_scale.exp().view(1, -1, 1, 1)
    eye = torch.eye(len(bias), dtype=x.dtype, device=x.device)
    weight = permutation @ (lower.tril(-1) + eye) @ (upper.triu(1) + torch.diag(sign * log_diagonal.exp()))
    x = F.conv2d(x, weight[:, :, None, None])
    passive, active = x.chunk(2, 1)
    raw, shift = out.chunk(2, 1)
    scale = torch.sigmoid(raw + 2)
    active = (active + shift) * scale
    log_det = pixels * (log_scale.sum() + log_diagonal.sum()) + scale.log().flatten(1).sum(1)
    return torch.cat((passive, active), 1), log_det


def _our_step(inputs: Inputs) -> Call:
    """The module, with the inputs' tensors as its parameters and buffers."""
    x, out, bias, log_scale, lower, upper, log_diagonal, sign, permutation = inputs.tensors
    step = pnn.GlowStep(x.size(1), _Given(out)).to(x)
    mixing: pnn.ActNormConv1x1 = step[0]
    actnorm, convolution = mixing.actnorm, mixing.convolution
    actnorm.bias, actnorm.log_scale = nn.Parameter(bias), nn.Parameter(log_scale)
    actnorm.initialized.fill_(True)
    convolution.lower, convolution.upper = nn.Parameter(lower), nn.Parameter(upper)
    convolution.log_diagonal = nn.Parameter(log_diagonal)
    convolution.sign, convolution.permutation = sign, permutation
    parameters = (actnorm.bias, actnorm.log_scale, convolution.lower, convolution.upper, convolution.log_diagonal)

    def forward_backward():
        outputs = step(x)
        return *outputs, *torch.autograd.grad(outputs, (x, out, *parameters), inputs.grads)

    return forward_backward


def _their_step(compile: bool = False):
    def factory(inputs: Inputs) -> Call:
        function = torch.compile(_plain_step, dynamic=False) if compile else _plain_step

        def forward_backward():
            outputs = function(*inputs.tensors)
            return *outputs, *torch.autograd.grad(outputs, inputs.tensors[:7], inputs.grads)

        return forward_backward

    return factory


def _step_case(batch: int, channels: int, side: int, targets=()) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def randn(*size):
            return torch.randn(size, device=device, generator=generator)

        shape = (batch, channels, side, side)
        rotation = torch.linalg.qr(randn(channels, channels).double().cpu()).Q
        permutation, lower, upper = (m.float().to(device) for m in torch.linalg.lu(rotation))
        diagonal = upper.diagonal()
        parameters = (randn(channels), 0.1 * randn(channels), lower, upper, diagonal.abs().log())
        buffers = (diagonal.sign(), permutation)
        return Inputs((randn(*shape), randn(*shape), *parameters, *buffers), (randn(*shape), randn(batch)))

    elements = batch * channels * side * side
    return Case(
        op="glow",
        name=f"step {batch}x{channels}x{side}x{side} but for the conditioner forward+backward",
        shape=(batch, channels, side, side),
        make=make,
        implementations={
            "pygen": _our_step,
            "eager": _their_step(),
            "compiled": _their_step(compile=True),
        },
        reference=_their_step(),
        # Forward reads x and half of it again with the conditioner's output, and writes; backward twice that.
        floor=Floor(bytes=11 * elements * 4, flops=6 * elements * channels),
        targets=targets,
        tolerance=1e-4,  # a weight's gradient sums over all pixels
    )


# ---- a deep model ----------------------------------------------------------------------------------------------------

DEPTH = 32


def deep_glow(kind: type[pnn.Sequential], depth: int, channels: int, hidden: int) -> pnn.Sequential:
    """`depth` Glow steps on (B, channels, H, W), at random weights so that every gradient is there."""
    torch.manual_seed(0)
    half = channels // 2
    steps = [
        pnn.GlowStep(channels, pnn.ConvNet(channels - half, 2 * half, hidden=hidden, blocks=1)) for _ in range(depth)
    ]
    model = kind(*steps)
    with torch.no_grad():
        for step in steps:
            step[0].actnorm.initialized.fill_(True)
            for layer in step.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(0, 0.3 / (layer.weight[0].numel() ** 0.5))
    return model


def training_step(model: pnn.Sequential, x: Tensor) -> Call:
    """Loss and all gradients of the standard-normal negative log-likelihood."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        z, log_det = model(x)
        loss = (0.5 * z.flatten(1).square().sum(1) - log_det).mean()
        return loss, *torch.autograd.grad(loss, parameters)

    return step


def _deep_flops(batch: int, channels: int, side: int, hidden: int) -> int:
    """Of the convolutions (3x3, one block of 3x3 and 1x1, 3x3), forward and twice that backward."""
    half = channels // 2
    weights = 9 * (channels - half) * hidden + 10 * hidden * hidden + 9 * hidden * 2 * half
    return DEPTH * 3 * 2 * batch * side * side * weights


def _deep(kind: type[pnn.Sequential], channels: int, hidden: int):
    return lambda inputs: training_step(
        deep_glow(kind, DEPTH, channels, hidden).to(inputs.tensors[0]), inputs.tensors[0]
    )


def _deep_case(batch: int, channels: int, side: int, hidden: int) -> Case:
    return Case(
        op="glow",
        name=f"training step depth {DEPTH} {batch}x{channels}x{side}x{side} reversible",
        shape=(batch, channels, side, side),
        make=lambda device, generator: Inputs(
            (torch.randn(batch, channels, side, side, device=device, generator=generator),)
        ),
        implementations={
            "pygen": _deep(pnn.ReversibleSequential, channels, hidden),
            "storing": _deep(pnn.Sequential, channels, hidden),
        },
        reference=_deep(pnn.Sequential, channels, hidden),
        targets=(Target("storing", at_most=1.4), Target("storing", at_most=1 / 8, of="memory")),
        floor=Floor(flops=_deep_flops(batch, channels, side, hidden)),
        tolerance=2e-3,  # 32 inversions in float32
    )


register(
    _step_case(64, 12, 16, targets=(Target("eager", 3),)),
    _step_case(64, 24, 8, targets=(Target("eager", 3),)),
    _step_case(64, 48, 4, targets=(Target("eager", 3),)),
    _deep_case(32, 12, 16, 64),
)
