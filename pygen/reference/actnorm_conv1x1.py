"""ActNorm and invertible 1x1 convolution as one matrix product, in plain PyTorch. The fused op is
`pygen.ops.actnorm_conv1x1`."""

import torch
from torch import Tensor


def _factors(lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """L and U, float64 (C, C)."""
    eye = torch.eye(len(sign), dtype=torch.float64, device=sign.device)
    diagonal = sign.double() * log_diagonal.double().exp()
    return lower.double().tril(-1) + eye, upper.double().triu(1) + diagonal.diag()


def _fold(
    bias: Tensor,
    log_scale: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
) -> tuple[Tensor, Tensor]:
    """A = P L U diag(e^log_scale): (C, C), and A bias: (C,), both float64."""
    left, right = _factors(lower, upper, log_diagonal, sign)
    weight = permutation.double() @ left @ right * log_scale.double().exp()
    return weight, weight @ bias.double()


def _mix(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    weights = weight.to(x.dtype).expand(x.size(0), -1, -1)
    pixels = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    return torch.baddbmm(offset.to(x.dtype).unsqueeze(1), weights, pixels).view(x.shape)


def _log_det(x: Tensor, log_scale: Tensor, log_diagonal: Tensor) -> Tensor:
    per_pixel = log_scale.double().sum() + log_diagonal.double().sum()
    return (x.shape[2:].numel() * per_pixel).to(x.dtype).expand(x.size(0))


def actnorm_conv1x1(
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
) -> tuple[Tensor, Tensor]:
    """x: (B, C, ...) -> z: like x, log_det: (B,)."""
    weight, offset = _fold(bias, log_scale, lower, upper, log_diagonal, sign, permutation)
    return _mix(x, weight, offset), _log_det(x, log_scale, log_diagonal)


def actnorm_conv1x1_inverse(
    z: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
) -> tuple[Tensor, Tensor]:
    """z: (B, C, ...) -> x: like z, log_det: (B,), minus the forward's."""
    left, right = _factors(lower, upper, log_diagonal, sign)
    half = torch.linalg.solve_triangular(left, permutation.double().t(), upper=False, unitriangular=True)
    weight = torch.linalg.solve_triangular(right, half, upper=True) * (-log_scale.double()).exp().unsqueeze(1)
    return _mix(z, weight, -bias), -_log_det(z, log_scale, log_diagonal)


def actnorm_conv1x1_backward(
    grad_z: Tensor | None,
    grad_log_det: Tensor | None,
    x: Tensor,
    bias: Tensor,
    log_scale: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the five parameters.

    z = A x + A b with A = W diag(s), W = P L U: the chain rule from z to A, W, L and U, matrix by matrix.
    """
    weight, _ = _fold(bias, log_scale, lower, upper, log_diagonal, sign, permutation)
    shape = (x.size(0), x.size(1), x.shape[2:].numel())
    g = torch.zeros_like(x).reshape(shape) if grad_z is None else grad_z.reshape(shape)
    grad_x = torch.bmm(weight.to(x.dtype).t().expand(x.size(0), -1, -1), g).view(x.shape)
    grad_offset = g.double().sum((0, 2))
    grad_weight = torch.bmm(g, x.reshape(shape).transpose(1, 2)).double().sum(0)
    grad_weight = grad_weight + torch.outer(grad_offset, bias.double())
    grad_bias = weight.t() @ grad_offset
    by_log = bias.new_zeros((), dtype=torch.float64)
    if grad_log_det is not None:
        by_log = shape[2] * grad_log_det.double().sum()
    grad_log_scale = (grad_weight * weight).sum(0) + by_log

    left, right = _factors(lower, upper, log_diagonal, sign)
    grad_product = permutation.double().t() @ (grad_weight * log_scale.double().exp())
    grad_lower, grad_upper = (grad_product @ right.t()).tril(-1), left.t() @ grad_product
    grad_log_diagonal = grad_upper.diagonal() * right.diagonal() + by_log
    small = (grad_bias, grad_log_scale, grad_lower, grad_upper.triu(1), grad_log_diagonal)
    grads = tuple(g.to(p.dtype) for g, p in zip(small, (bias, log_scale, lower, upper, log_diagonal), strict=True))
    return grad_x, *grads  # type: ignore[return-value]
