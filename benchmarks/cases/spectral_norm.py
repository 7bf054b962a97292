"""Normalised weights, of one layer and of a whole discriminator, against torch's own parametrization.

Everyone computes what a layer in training asks for: one step of the power iteration into the buffers, and the weight
divided by sigma; with the gradient of the original weight where the name says backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pygen.benchmarks.registry import COMPILED, EAGER, OURS, Call, Case, Factory, Floor, Inputs, Target, register
from pygen.nn.utils.spectral_norm import spectral_norm, spectral_norm_all

# Of the plain discriminator for 32 x 32 images of Miyato et al., table 3: 2.93 million numbers, 11.7 MB.
DISCRIMINATOR = (
    (64, 3, 3, 3),
    (64, 64, 4, 4),
    (128, 64, 3, 3),
    (128, 128, 4, 4),
    (256, 128, 3, 3),
    (256, 256, 4, 4),
    (512, 256, 3, 3),
    (1, 8192),
)

Shape = tuple[int, ...]


class _Weights(nn.Module):
    """Layers whose forward returns their weights: what normalising costs, without what the layers compute."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layer(weight) for weight in weights)

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(layer.weight for layer in self.layers)


def _layer(weight: Tensor) -> nn.Module:
    rows, columns, *side = weight.shape
    # On the meta device: the random weights that a layer begins with are not wanted.
    if side:
        layer: nn.Module = nn.Conv2d(columns, rows, tuple(side), bias=False, device="meta")
    else:
        layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def _originals(model: _Weights) -> list[Tensor]:
    return [layer.parametrizations.weight.original for layer in model.layers]


def _each(normalize: Callable[..., nn.Module]) -> Callable[[_Weights], None]:
    def apply(model: _Weights) -> None:
        for layer in model.layers:
            normalize(layer)

    return apply


def _module(normalize: Callable[[_Weights], object], *, compile: bool = False) -> Factory:
    """The model of the inputs' weights, normalised, its buffers the inputs' vectors."""

    def factory(inputs: Inputs) -> Call:
        weights, us, vs = _split(inputs)
        model = _Weights(weights)
        normalize(model)
        for layer, u, v in zip(model.layers, us, vs, strict=True):
            layer.parametrizations.weight[0]._u.copy_(u)
            layer.parametrizations.weight[0]._v.copy_(v)
        originals = _originals(model)
        forward = torch.compile(model, dynamic=False) if compile else model
        if not inputs.grads:
            return forward

        def forward_backward() -> tuple[Tensor, ...]:
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, originals, inputs.grads)

        return forward_backward

    return factory


def _split(inputs: Inputs) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Weights, us, vs."""
    tensors = [tensor.detach() for tensor in inputs.tensors]
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


def _formula(inputs: Inputs) -> Call:
    def expected() -> tuple[Tensor, ...]:
        weights, us, vs = _split(inputs)
        leaves = [weight.clone().requires_grad_() for weight in weights]
        outputs = []
        for weight, u, v in zip(leaves, us, vs, strict=True):
            matrix = weight.flatten(1)
            with torch.no_grad():
                u = F.normalize(matrix @ v, dim=0)
                v = F.normalize(matrix.T @ u, dim=0)
            outputs.append(weight / (u @ matrix @ v))
        grads = torch.autograd.grad(outputs, leaves, inputs.grads) if inputs.grads else ()
        return *outputs, *grads

    return expected


def _case(
    name: str, shapes: Sequence[Shape], ours: Callable[[_Weights], object], *targets: Target, backward: bool
) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def draw(shapes: Sequence[Shape]) -> list[Tensor]:
            return [torch.randn(shape, device=device, generator=generator) for shape in shapes]

        # As large as layers begin with: a row's norm is about one.
        weights = [weight / math.sqrt(weight[0].numel()) for weight in draw(shapes)]
        us, vs = draw([shape[:1] for shape in shapes]), draw([(math.prod(shape[1:]),) for shape in shapes])
        vectors = [F.normalize(x, dim=0) for x in (*us, *vs)]
        return Inputs((*weights, *vectors), tuple(draw(shapes)) if backward else ())

    torchs = _each(parametrizations.spectral_norm)
    return Case(
        op="spectral_norm",
        name=f"{name} {'forward+backward' if backward else 'forward'}",
        shape=shapes[0],
        make=make,
        implementations={OURS: _module(ours), EAGER: _module(torchs), COMPILED: _module(torchs, compile=True)},
        reference=_formula,
        # Read the weight, write it divided; and read it with its gradient, write the original's.
        floor=Floor(bytes=(5 if backward else 2) * 4 * sum(map(math.prod, shapes))),
        targets=targets,
    )


for _shape, _at_least in (((1024, 1024), 1.6), ((512, 4608), 1.3), ((128, 1024), 2), ((64, 27), 3)):
    for _backward in (False, True):
        register(
            _case(
                f"weight {_shape[0]}x{_shape[1]}",
                [_shape],
                _each(spectral_norm),
                Target(EAGER, 2 if _backward else _at_least),
                backward=_backward,
            )
        )
for _backward in (False, True):
    register(
        _case(
            "weights of an SN-GAN discriminator",
            DISCRIMINATOR,
            spectral_norm_all,
            Target(EAGER, 3 if _backward else 4.5),
            Target(EAGER, 8, on=("cuda",)),
            Target(COMPILED, 3, on=("cuda",)),
            backward=_backward,
        )
    )
