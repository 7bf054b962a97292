"""Affine coupling against its plain-PyTorch form. Targets: specs of the coupling layers, "ratios in one run"."""

import math
from functools import partial

import torch

from pygen import ops, reference
from pygen.benchmarks.registry import Case, Floor, Inputs, Target, call, compiled, register


def _packed(function):
    """The conditioner's one output tensor holds scale and shift as halves of its channels."""

    def unpack(x, parameters):
        return function(x, *parameters.chunk(2, 1))

    return unpack


def _case(*shape: int, targets=(), packed=False, inverse=False, backward=True, dtype=torch.float32) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        def randn(*size):
            return torch.randn(size, device=device, generator=generator).to(dtype)

        batch, channels, *rest = shape
        x, grad_y = randn(*shape), randn(*shape)
        grad_log_det = torch.randn(batch, device=device, generator=generator)
        others = (randn(batch, 2 * channels, *rest),) if packed else (randn(*shape), randn(*shape))
        return Inputs((x, *others), (grad_y, grad_log_det) if backward else ())

    # RealNVP's map: exp(tanh a).
    ours = partial(ops.affine_coupling, scale_map="tanh", inverse=inverse)
    eager = partial(reference.affine_coupling, scale_map="tanh", inverse=inverse)
    if packed:
        ours, eager = _packed(ours), _packed(eager)
    words = [
        "x".join(map(str, shape)),
        "inverse" if inverse else "forward",
        "packed" if packed else "",
        "" if dtype == torch.float32 else str(dtype).removeprefix("torch."),
    ]
    words[1] += "+backward" if backward else ""
    # (x, scale, shift) -> y; and (x, scale, grad) -> gradients of x and scale: the shift's is grad itself.
    passes = 9 if backward else 4
    return Case(
        op="affine_coupling",
        name=" ".join(word for word in words if word),
        shape=shape,
        dtype=dtype,
        make=make,
        implementations={"pygen": call(ours), "eager": call(eager), "compiled": compiled(eager)},
        reference=call(eager),
        floor=Floor(bytes=passes * math.prod(shape) * dtype.itemsize),
        targets=targets,
    )


register(
    _case(64, 24, 32, 32, targets=(Target("compiled", 2),)),
    _case(64, 24, 32, 32, packed=True),
    _case(64, 24, 32, 32, dtype=torch.bfloat16),
    _case(64, 24, 32, 32, inverse=True, backward=False),
    _case(4096, 32, targets=(Target("eager", 2.5), Target("compiled", 2.5))),
    _case(4096, 32, packed=True),
)
