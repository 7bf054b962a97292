"""log |det(I + J)| of a residual block from products with its Jacobian J: exactly, or estimated with random probes.

invertible_residual.py has the block; here are the series, the random numbers of terms and the gradients.
"""

import math

import torch
from torch import Tensor

from pygen.reference._dtypes import compute_dtype

DISTRIBUTIONS = ("geometric", "poisson")
PROBES = ("gaussian", "rademacher")


def survival(distribution: str, parameter: float, k: int) -> float:
    r"""P(N >= k). Geometric: N = 1, 2, ..., :math:`(1 - p)^{k - 1}`. Poisson: N = 0, 1, ..., with the given rate."""
    if distribution == "geometric":
        return (1 - parameter) ** max(k - 1, 0)
    if k <= 0:
        return 1.0
    # From the tail, term by term: 1 - P(N < k) would have lost all its digits where k is large.
    term = math.exp(k * math.log(parameter) - parameter - math.lgamma(k + 1))
    total, i = term, k
    while i <= parameter or term > 1e-17 * total:
        i += 1
        term *= parameter / i
        total += term
    return total


def draw(distribution: str, parameter: float, generator: torch.Generator | None = None) -> int:
    """One N, from `generator` or torch's global one."""
    device = "cpu" if generator is None else generator.device
    if distribution == "poisson":
        rate = torch.tensor(parameter, dtype=torch.float64, device=device)
        return int(torch.poisson(rate, generator=generator).item())
    uniform = 1 - torch.rand((), dtype=torch.float64, device=device, generator=generator).item()  # in (0, 1]
    return 1 + math.floor(math.log(uniform) / math.log1p(-parameter))


def roulette_weights(n_exact: int, n: int, distribution: str, parameter: float) -> list[float]:
    """What the terms 1 .. n_exact + n are multiplied by when N = n: 1, and from there on 1 / P(N >= k - n_exact)."""
    return [1.0] * n_exact + [1 / survival(distribution, parameter, k) for k in range(1, n + 1)]


def draw_probe(like: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """Independent numbers with mean 0 and variance 1 in the shape of `like`."""
    if kind == "rademacher":
        bits = torch.randint(0, 2, like.shape, device=like.device, generator=generator)
        return (2 * bits - 1).to(like.dtype)
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def vector_jacobian(g: Tensor, x: Tensor, vector: Tensor, *, create_graph: bool = False) -> Tensor:
    """(B, ...): every sample's vector times the Jacobian of its g with respect to its x. The graph of g is kept."""
    if not g.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(
        g, x, vector.to(g.dtype), create_graph=create_graph, retain_graph=True, materialize_grads=True
    )[0]


def dots(a: Tensor, b: Tensor) -> Tensor:
    """(B,): the inner product of every pair of samples, in float32 at least."""
    dtype = compute_dtype(a.dtype)
    return (a.flatten(1).to(dtype) * b.flatten(1).to(dtype)).sum(1)


def jacobian(g: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """(B, D, D): every sample's Jacobian, in float32 at least.

    Row by row. All rows in one pass (`is_grads_batched`) are hardly faster without a graph, and their backward is
    slower: 4 times for three convolutions of 32 channels at 8x8, measured on one core. vmap gives every row a
    convolution of its own.
    """
    rows = []
    for unit in torch.eye(x.shape[1:].numel(), dtype=g.dtype, device=g.device):
        row = vector_jacobian(g, x, unit.view(1, *x.shape[1:]).expand_as(x), create_graph=create_graph)
        rows.append(row.flatten(1).to(compute_dtype(x.dtype)))
    return torch.stack(rows, 1)


def exact_log_det(g: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """(B,): log |det(I + J)| by the LU factors of the whole matrix."""
    matrix = jacobian(g, x, create_graph=create_graph)
    return torch.linalg.slogdet(matrix + torch.eye(matrix.size(-1), dtype=matrix.dtype, device=x.device)).logabsdet


class _WithGradientOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx, value, surrogate):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "InvertibleResidual: second derivatives of a log_det with the Neumann gradient are not supported, "
                "use neumann_gradient=False"
            )
        return None, grad


def series_log_det(
    g: Tensor, x: Tensor, probe: Tensor, weights: list[float], *, neumann: bool, create_graph: bool
) -> Tensor:
    r"""(B,): :math:`\sum_k w_k \frac{(-1)^{k+1}}{k} v^\top J^k v`, for one probe v per sample.

    Its gradient in expectation over v is :math:`\sum_k w_k (-1)^{k+1} \mathrm{tr}(J^{k-1} dJ)`. With `neumann` it is
    computed as :math:`s\, dJ\, v` with the constant :math:`s = \sum_k w_k (-1)^{k+1} v^\top J^{k-1}`: the graph of one
    term instead of all. A graph, so that log-determinants whose incoming gradients differ between samples are as right
    as their mean.

    Args:
        g, x: (B, ...), g with a graph that leads to x.
        probe: (B, ...). weights: w_1, w_2, ...
        neumann: how to compute the gradient. create_graph: whether there is one at all.
    """
    total = x.new_zeros(len(x), dtype=compute_dtype(x.dtype))
    s = torch.zeros_like(probe, dtype=compute_dtype(probe.dtype))
    vector = probe
    # Without any term (Poisson drew 0) there is one of weight 0, so that the result has a graph all the same.
    for k, weight in enumerate(weights or [0.0], 1):
        sign = 1 if k % 2 else -1
        if neumann and create_graph:
            s = s + sign * weight * vector
        vector = vector_jacobian(g, x, vector, create_graph=create_graph and not neumann)
        total = total + sign * weight / k * dots(vector, probe)
    if neumann and create_graph:
        total = _WithGradientOf.apply(total, dots(vector_jacobian(g, x, s, create_graph=True), probe))
    return total
