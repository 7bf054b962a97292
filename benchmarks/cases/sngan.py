"""A training step of SN-GAN's discriminator, whose weights all are normalised, against torch's own parametrization."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pygen.benchmarks.registry import COMPILED, EAGER, OURS, Call, Case, Factory, Floor, Inputs, Target, register
from pygen.models import _sngan_networks as networks
from pygen.models.sngan import discriminator_weights
from pygen.nn.utils.spectral_norm import spectral_norm_all

_IMAGE = (3, 32, 32)
_WIDTH = 64  # the paper's: 2.93 million weights, 11.7 MB
UNNORMALIZED = "without normalising"

Normalize = Callable[[nn.Module], object]


def _torchs(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, networks.NORMALIZED):
            parametrizations.spectral_norm(layer)


@functools.cache
def _state() -> dict[str, Tensor]:
    """Random weights, and singular vectors near theirs, in the keys that torch and pygen share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = networks.discriminator("cnn", _IMAGE, _WIDTH)
        _torchs(model)
    return model.state_dict()


def _step(normalize: Normalize | None, *, compile: bool = False) -> Factory:
    """The hinge loss of images, all of them data, and its gradient with respect to every parameter."""

    def factory(inputs: Inputs) -> Call:
        (x,) = inputs.tensors
        model = networks.discriminator("cnn", _IMAGE, _WIDTH)
        if normalize is not None:
            normalize(model)
            model.load_state_dict(_state())
        model = model.to(x).train()
        parameters = list(model.parameters())
        forward = torch.compile(model, dynamic=False) if compile else model

        def step() -> tuple[Tensor, ...]:
            loss = (1 - forward(x)).relu().mean()
            return loss.detach(), *torch.autograd.grad(loss, parameters)

        return step

    return factory


@functools.cache
def _multiplications() -> int:
    """Of one image's forward pass: those of every convolution and of the score."""
    counts: list[int] = []

    def count(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counts.append(layer.weight[0].numel() * output.numel())

    with torch.device("meta"):
        model = networks.discriminator("cnn", _IMAGE, _WIDTH)
        for layer in model.modules():
            if isinstance(layer, networks.NORMALIZED):
                layer.register_forward_hook(count)
        model(torch.zeros(1, *_IMAGE))
    return sum(counts)


def _case(batch: int, *targets: Target) -> Case:
    shape = (batch, *_IMAGE)
    weights = 4 * sum(map(math.prod, discriminator_weights(_WIDTH)))
    return Case(
        op="sngan",
        name=f"discriminator's training step {'x'.join(map(str, shape))}",
        shape=shape,
        make=lambda device, generator: Inputs((torch.randn(shape, device=device, generator=generator),)),
        implementations={OURS: _step(spectral_norm_all), EAGER: _step(_torchs), COMPILED: _step(_torchs, compile=True)},
        yardsticks={UNNORMALIZED: _step(None)},
        reference=_step(_torchs),
        # Twice the forward's products backward. Each weight is read and written divided, and so its gradient.
        floor=Floor(bytes=5 * weights, flops=3 * 2 * batch * _multiplications()),
        targets=targets,
        tolerance=1e-4,  # a weight's gradient sums over all pixels of all images
    )


register(_case(1, Target(EAGER, at_least=1.3)), _case(64, Target(EAGER, at_most=1.05)))
