"""The ops that the contract tests run: an op joins every test of test_contract.py by one entry in CASES.

An oracle is written from the formula, in float64, without pygen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pygen import ops


@dataclass(frozen=True)
class OpCase:
    name: str
    function: Callable[..., object]  # the public function, on tensors alone
    oracle: Callable[..., object]  # the same of float64 tensors
    operator: Callable[[], object]  # torch.ops.pygen.<op>.default, asked for late: a build may lack it
    arguments: tuple  # what follows the tensors in the operator's schema
    tensors: int
    shapes: tuple[tuple[int, ...], ...]
    empty_shapes: tuple[tuple[int, ...], ...]
    spread: float = 2.0  # standard deviation of the inputs
    # Relative error in units of the dtype's epsilon, by the norm over all elements.
    tolerance: float = 4.0
    extra: dict = field(default_factory=dict)

    def inputs(self, shape, dtype=torch.float64, device="cpu", seed=0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(self.tensors)]
        return [(x * self.spread).to(device, dtype) for x in draw]

    def outputs(self, tensors) -> tuple[Tensor, ...]:
        result = self.function(*tensors)
        return result if isinstance(result, tuple) else (result,)

    def true_outputs(self, tensors) -> tuple[Tensor, ...]:
        result = self.oracle(*(x.cpu().double() for x in tensors))
        return result if isinstance(result, tuple) else (result,)


def cumax_oracle(dim: int, complement: bool):
    def oracle(x: Tensor) -> Tensor:
        e = (x - x.amax(dim, keepdim=True)).exp() if x.numel() else x
        p = e / e.sum(dim, keepdim=True)
        if complement:
            return p.flip(dim).cumsum(dim).flip(dim) - p
        return p.cumsum(dim)

    return oracle


def true_scale(a: Tensor, scale_map: str, clamp: float = 2.0) -> Tensor:
    if scale_map == "exp":
        return torch.exp(a)
    if scale_map == "tanh":
        return torch.exp(torch.tanh(a))
    if scale_map == "sigmoid":
        return torch.sigmoid(a + 2)
    if scale_map == "nflows":
        return torch.sigmoid(a + 2) + 1e-3
    if scale_map == "softplus":
        return (torch.log1p(torch.exp(a)) + 1e-3).clamp(0, 3)
    return torch.exp(clamp * 0.636 * torch.atan(a))


def coupling_oracle(scale_map: str, shift_first: bool, inverse: bool):
    def oracle(x: Tensor, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s = true_scale(a, scale_map)
        log_det = s.log().reshape(len(x), -1).sum(1) if x.numel() else x.new_zeros(len(x))
        if inverse:
            return (x / s - t if shift_first else (x - t) / s), -log_det
        return ((x + t) * s if shift_first else x * s + t), log_det

    return oracle


def cumax_case(dim: int, complement: bool) -> OpCase:
    return OpCase(
        name=f"cumax-dim{dim}{'-complement' if complement else ''}",
        function=lambda x: ops.cumax(x, dim, complement=complement),
        oracle=cumax_oracle(dim, complement),
        operator=lambda: torch.ops.pygen.cumax.default,
        arguments=(dim, complement),
        tensors=1,
        shapes=((1, 1), (2, 3, 5), (3, 63), (63, 3), (5, 1000), (1030, 2), (17, 16, 17)),
        empty_shapes=((0, 4), (4, 0), (0, 0)),
        spread=3.0,
    )


def coupling_case(scale_map: str, shift_first: bool, inverse: bool) -> OpCase:
    return OpCase(
        name=f"affine-{scale_map}{'-shift_first' if shift_first else ''}{'-inverse' if inverse else ''}",
        function=lambda x, a, t: ops.affine_coupling(
            x, a, t, scale_map=scale_map, shift_first=shift_first, inverse=inverse
        ),
        oracle=coupling_oracle(scale_map, shift_first, inverse),
        operator=lambda: torch.ops.pygen.affine_coupling.default,
        arguments=(scale_map, shift_first, 2.0, inverse),
        tensors=3,
        shapes=((1,), (7, 1), (3, 63), (2, 5, 7, 3), (4, 700), (2, 20011)),
        empty_shapes=((0, 4), (4, 0), (0,)),
        spread=1.0,
    )


CASES = [
    cumax_case(-1, False),
    cumax_case(-1, True),
    cumax_case(0, False),
    cumax_case(0, True),
    *(
        coupling_case(scale_map, shift_first, inverse)
        for scale_map in ("exp", "tanh", "sigmoid", "nflows", "softplus", "atan")
        for shift_first, inverse in ((False, False), (True, False), (False, True), (True, True))
    ),
]

# One case for each op and direction, for the tests that cost seconds.
FEW_CASES = [case for case in CASES if case.name in ("cumax-dim-1", "cumax-dim0-complement", "affine-tanh")] + [
    case for case in CASES if case.name == "affine-sigmoid-shift_first-inverse"
]
