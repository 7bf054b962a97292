"""Layers to iterate on, and the iteration in float64 NumPy, written from the formulas. Used by the tests of the op."""

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def flat(weight: Tensor, dim: int = 0) -> Tensor:
    """(n, m): dimension `dim` in front, the others behind it in their order."""
    others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
    rows = weight.permute(dim % weight.dim(), *others)
    return rows.reshape(weight.shape[dim], int(np.prod([weight.shape[d] for d in others])))


def layer(
    *shape: int, dim: int = 0, dtype=torch.float32, vectors=None, device="cpu", seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian weight and unit vectors u, v for it, these of dtype `vectors` where it is given."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    n, m = flat(weight, dim).shape
    u, v = (torch.nn.functional.normalize(torch.randn(k, generator=g, dtype=torch.float64), dim=0) for k in (n, m))
    return weight.to(device, dtype), u.to(device, vectors or dtype), v.to(device, vectors or dtype)


def sharp_layer(*shape: int, ratio: float = 0.6, **options) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer`, with singular values 3, 3 ratio, 3 ratio^2, ...: the iteration converges by ratio^2 a step."""
    weight, u, v = layer(*shape, **options)
    left, values, right = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
    values = 3 * ratio ** torch.arange(len(values), dtype=torch.float64)
    return ((left * values) @ right).to(weight), u, v


def array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def true_iteration(
    weight: Tensor, u: Tensor, v: Tensor, *, n_iterations=1, eps=1e-12, dim=0, u_first=False
) -> tuple[float, np.ndarray, np.ndarray]:
    """(sigma, u, v)."""
    w, u, v = array(flat(weight, dim)), array(u), array(v)

    def normalized(product, before):
        norm = np.sqrt((product**2).sum())
        return product / max(norm, eps) if 0 < norm < np.inf else before

    for _ in range(n_iterations):
        if u_first:
            u = normalized(w @ v, u)
            v = normalized(w.T @ u, v)
        else:
            v = normalized(w.T @ u, v)
            u = normalized(w @ v, u)
    return float(u @ w @ v), u, v


def true_outputs(weight: Tensor, u: Tensor, v: Tensor, dim: int = 0, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    """(sigma, weight / sigma) in float64, differentiable in the weight; u and v are what they are."""
    weight, u, v = (x.cpu().double() for x in (weight, u, v))
    sigma = u @ flat(weight, dim) @ v
    return sigma, weight / (sigma if abs(sigma) >= eps else eps)
