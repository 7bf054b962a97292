"""A training step of a quantiser against vector-quantize-pytorch: same rows, same codebook, default options."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen.benchmarks.cases.nearest_codebook import VQ_PYTORCH, blocks, nearest, with_codebook
from pygen.benchmarks.registry import OURS, Call, Case, Floor, Inputs, Target, register


def _step(module: torch.nn.Module, inputs: Inputs) -> Call:
    """Quantise, move the codebook, and the gradient of the rows: by the rotation trick and the commitment loss."""
    x, (grad,) = inputs.tensors[0], inputs.grads
    module.train()

    def step() -> tuple[Tensor, ...]:
        quantize, _, loss = module(x[None])
        (found,) = torch.autograd.grad((quantize, loss.sum()), x, (grad[None], torch.ones((), device=x.device)))
        return quantize[0].detach(), loss.detach().sum(), found

    return step


def _our_step(inputs: Inputs) -> Call:
    from pygen.nn.vector_quantize import VectorQuantize

    return _step(with_codebook(VectorQuantize, inputs.tensors[1], rotation_trick=True), inputs)


def _peer_step(inputs: Inputs) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    return _step(with_codebook(VectorQuantize, inputs.tensors[1], rotation_trick=True), inputs)


def _expected_step(inputs: Inputs) -> Call:
    """(rows, their codes, the loss over all rows, their gradients)."""
    x, codebook = (tensor.detach() for tensor in inputs.tensors)

    def expected() -> tuple[Tensor, ...]:
        found = nearest(Inputs((x, codebook)))()
        grad, code = inputs.grads[0][found.rows], codebook[found.indices]
        least = torch.cat([torch.cdist(rows, codebook).amin(1) for rows in blocks(x, 2 * len(codebook))])
        # Turn x's direction into the code's, and stretch: the Jacobian of that, transposed.
        from_x, to_code = F.normalize(found.x, dim=1), F.normalize(code, dim=1)
        between = F.normalize(from_x + to_code, dim=1)
        turned = grad - 2 * between * (between * grad).sum(1, keepdim=True)
        turned = turned + 2 * from_x * (to_code * grad).sum(1, keepdim=True)
        stretched = turned * code.norm(dim=1, keepdim=True) / found.x.norm(dim=1, keepdim=True)
        return found.rows, code, least.square().sum() / x.numel(), stretched + 2 * (found.x - code) / x.numel()

    return expected


def _step_error(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference of codes, loss and gradients, relative to the largest of each."""
    (quantize, loss, grad), (rows, *wanted) = outputs, expected
    errors = [
        ((found.double() - want).abs().max() / want.abs().max()).item()
        for found, want in zip((quantize[rows], loss, grad[rows]), wanted, strict=True)
    ]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _training_step(n: int, k: int, d: int, at_least: float) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        x, codebook, grad = (torch.randn(count, d, device=device, generator=generator) for count in (n, k, n))
        return Inputs((x, codebook), (grad,))

    return Case(
        op="vector_quantize",
        name=f"training step {n}x{k}x{d}",
        shape=(n, d),
        make=make,
        implementations={OURS: _our_step, VQ_PYTORCH: _peer_step},
        reference=_expected_step,
        error=_step_error,
        tolerance=1e-4,
        floor=Floor(bytes=4 * d * (4 * n + 3 * k), flops=2 * n * k * d, any_precision=True),
        targets=(Target(VQ_PYTORCH, at_least),),
        baseline=VQ_PYTORCH,
        long=n * k * d > 1 << 33,
    )


register(_training_step(8192, 1024, 64, at_least=10), _training_step(16384, 8192, 256, at_least=30))
