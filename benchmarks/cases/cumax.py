"""cumax against softmax + cumsum. Targets: specs of cumax, "ratios in one run"."""

import torch
from torch import Tensor

from pygen import ops
from pygen.benchmarks.registry import Case, Floor, Inputs, Target, call, compiled, register


def _eager(x: Tensor) -> Tensor:
    return x.softmax(-1).cumsum(-1)


def _eager_16_bit(x: Tensor) -> Tensor:
    """cumsum in 16 bits would lose the sum; this is what a careful user writes."""
    return x.softmax(-1, dtype=torch.float32).cumsum(-1).to(x.dtype)


def _case(rows: int, columns: int, *targets: Target, backward=False, dtype=torch.float32) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        x, grad = (torch.randn(2, rows, columns, device=device, generator=generator)).to(dtype).unbind()
        return Inputs((x.clone(),), (grad.clone(),) if backward else ())

    eager = _eager if dtype == torch.float32 else _eager_16_bit
    passes = 5 if backward else 2  # x -> y; and (grad, x) -> grad of x
    kind = str(dtype).removeprefix("torch.")
    return Case(
        op="cumax",
        name=f"{rows}x{columns} {'forward+backward' if backward else 'forward'}"
        + (f" {kind}" if dtype != torch.float32 else ""),
        shape=(rows, columns),
        dtype=dtype,
        make=make,
        implementations={"pygen": call(ops.cumax), "eager": call(eager), "compiled": compiled(eager)},
        yardsticks={} if backward else {"clone": call(torch.clone)},
        reference=call(_eager),
        floor=Floor(bytes=passes * rows * columns * dtype.itemsize),
        targets=targets,
    )


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


register(
    _case(4096, 4096, Target("clone", at_most=1.2), Target("compiled", 1.7)),
    _case(512, 512, Target("eager", 3), Target("compiled", 3)),
    _case(512, 512, Target("eager", 3), Target("compiled", 3), backward=True),
    _case(512, 512, dtype=torch.bfloat16),
    Case(
        op="cumax",
        name="4x4 call overhead",
        shape=(4, 4),
        make=lambda device, generator: Inputs((torch.randn(4, 4, device=device, generator=generator),)),
        implementations={"pygen": call(ops.cumax), "eager": call(_eager), "compiled": compiled(_eager)},
        yardsticks={"softmax": call(_softmax)},
        reference=call(_eager),
        targets=(Target("softmax", at_most=1.5),),
        overhead=True,
    ),
)
