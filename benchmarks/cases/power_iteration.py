"""A step of the power iteration against the two matrix-vector products that it consists of."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen import ops
from pygen.benchmarks.registry import Case, Floor, Inputs, Target, call, compiled, register

PRODUCTS = "W v and W^T u"  # by the library that torch calls; nothing but the products


def _eager(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = F.normalize(torch.mv(weight.T, u), dim=0, eps=1e-12)
    product = torch.mv(weight, v)
    u = F.normalize(product, dim=0, eps=1e-12)
    return torch.dot(u, product), u, v


def _products(weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.mv(weight, v), torch.mv(weight.T, u)


def _case(rows: int, columns: int) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        shapes = ((rows, columns), (rows,), (columns,))
        weight, u, v = (torch.randn(shape, device=device, generator=generator) for shape in shapes)
        return Inputs((weight, F.normalize(u, dim=0), F.normalize(v, dim=0)))

    return Case(
        op="power_iteration",
        name=f"{rows}x{columns} one step",
        shape=(rows, columns),
        make=make,
        implementations={"pygen": call(ops.power_iteration), "eager": call(_eager), "compiled": compiled(_eager)},
        yardsticks={PRODUCTS: call(_products)},
        reference=call(_eager),
        floor=Floor(bytes=4 * rows * columns),  # one pass serves both products
        targets=(Target(PRODUCTS, at_most=1.15),),
    )


register(_case(1024, 1024), _case(512, 4608))
