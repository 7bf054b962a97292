"""The two uses that a coupling makes of its input, for pygen.nn.coupling: a part for the conditioner, and all of it."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Fork(torch.autograd.Function):
    """Slicing's own derivative writes the part's gradient into zeros of x's size, and autograd then adds all of it."""

    @staticmethod
    def forward(ctx, x, dim, start, length):
        ctx.set_materialize_grads(False)
        ctx.where, ctx.shape = (dim, start, length), x.shape
        return x.narrow(dim, start, length), x.view_as(x)

    @staticmethod
    def backward(ctx, grad_part, grad):
        if grad_part is None:
            return grad, None, None, None
        dim, start, length = ctx.where
        if grad is None:
            grad = grad_part.new_zeros(ctx.shape)
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            total = grad.narrow(dim, start, length) + grad_part
            return grad.slice_scatter(total, dim, start, start + length), None, None, None
        grad.narrow(dim, start, length).add_(grad_part)
        return grad, None, None, None


def fork(x: Tensor, dim: int, start: int, length: int) -> tuple[Tensor, Tensor]:
    """(x.narrow(dim, start, length), x), whose gradients meet in x's without a copy.

    The gradient of the second result is written to. The caller uses that result once, in an operation whose backward
    makes a new tensor.
    """
    plain = (
        not (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()  # the compiler fuses what slicing's derivative does
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    return (x.narrow(dim, start, length), x) if plain else _Fork.apply(x, dim, start, length)
