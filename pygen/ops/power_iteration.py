"""Power iteration of one matrix or of all layers of a network, and weights divided by their spectral norms. Kernels:
csrc/power_iteration.cpp (CPU), triton_kernels/power_iteration.py (GPU)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pygen import reference
from pygen.ops._operator import Rules, contiguous_like, derivative_through_reference, operator, small_road
from pygen.reference._dtypes import compute_dtype


def _fake(weights, us, vs, dims, n_iterations, eps, u_first, return_weights):
    sigma = weights[0].new_empty(len(weights), dtype=compute_dtype(weights[0].dtype))
    normalized = [contiguous_like(w) for w in weights] if return_weights else []
    return sigma, normalized, [contiguous_like(u) for u in us], [contiguous_like(v) for v in vs]


def _fake_backward(grad_sigma, grads, weights, sigma, us, vs, dims, eps):
    return [contiguous_like(w) for w in weights]


def _save(ctx, inputs, output):
    weights, _, _, ctx.dims, _, ctx.eps, _, _ = inputs
    sigma, _, us, vs = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*us, *vs)
    ctx.count = len(weights)
    ctx.save_for_backward(sigma, *weights, *us, *vs)


def _backward(ctx, grad_sigma, grads, *_):
    """The weights that have a gradient; those of which nobody asked anything have None."""
    n = ctx.count
    sigma, *saved = ctx.saved_tensors
    weights, us, vs = saved[:n], saved[n : 2 * n], saved[2 * n :]
    none = [None] * n
    # A sparse embedding's gradient is sparse.
    grads = [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
    found: list[Tensor | None] = list(none)
    if grad_sigma is not None:
        absent = weights[0].new_empty(0)
        given = [absent if g is None else g for g in grads]
        found = list(power_iteration_backward(grad_sigma, given, weights, sigma, us, vs, ctx.dims, ctx.eps))
    elif asked := [i for i, g in enumerate(grads) if g is not None]:
        if len(asked) < n:
            sigma = sigma[asked]
            weights, us, vs = ([tensors[i] for i in asked] for tensors in (weights, us, vs))
        dims = [ctx.dims[i] for i in asked]
        parts = power_iteration_backward(None, [grads[i] for i in asked], weights, sigma, us, vs, dims, ctx.eps)
        for i, grad in zip(asked, parts, strict=True):
            found[i] = grad
    return found, none, none, None, None, None, None, None


def _listed(batch: int, tensors: Sequence[Tensor], in_dims: Sequence[int | None]) -> list[Tensor]:
    """vmap's dimension as more entries of a list: the layers of sample 0, then those of sample 1, ..."""
    per_layer = [[t] * batch if d is None else t.unbind(d) for t, d in zip(tensors, in_dims, strict=True)]
    return [parts[b] for b in range(batch) for parts in per_layer]


def _stacked(batch: int, listed: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `_listed`, the dimension in front."""
    layers = len(listed) // batch
    return [torch.stack([listed[b * layers + i] for b in range(batch)]) for i in range(layers)]


def _inner_dims(batch: int, dims: Sequence[int]) -> list[int]:
    return list(dims) * batch


def _vmap(info, in_dims, weights, us, vs, dims, *options):
    n = info.batch_size
    lists = (_listed(n, t, d) for t, d in zip((weights, us, vs), in_dims[:3], strict=True))
    sigma, *results = _power_iteration(*lists, _inner_dims(n, dims), *options)
    stacked = [_stacked(n, listed) for listed in results]
    return (sigma.unflatten(0, (n, -1)), *stacked), (0, *([0] * len(s) for s in stacked))


def _vmap_backward(info, in_dims, grad_sigma, grads, weights, sigma, us, vs, dims, eps):
    n = info.batch_size

    def flat(tensor, dim):
        if tensor is None:
            return None
        return (tensor.expand(n, -1) if dim is None else tensor.movedim(dim, 0)).flatten()

    lists = [_listed(n, t, d) for t, d in zip((grads, weights, us, vs), (*in_dims[1:3], *in_dims[4:6]), strict=True)]
    results = power_iteration_backward(
        flat(grad_sigma, in_dims[0]),
        lists[0],
        lists[1],
        flat(sigma, in_dims[3]),
        lists[2],
        lists[3],
        _inner_dims(n, dims),
        eps,
    )
    stacked = _stacked(n, results)
    return stacked, [0] * len(stacked)


_second_setup, _second_backward = derivative_through_reference(reference.power_iteration_backward)

power_iteration_backward: Callable[..., Any] = operator(
    "power_iteration_backward",
    Rules(
        "power_iteration",
        6,
        reference.power_iteration_backward,
        _fake_backward,
        _second_setup,
        _second_backward,
        _vmap_backward,
    ),
)
_power_iteration: Callable[..., Any] = operator(
    "power_iteration",
    Rules("power_iteration", 3, reference.power_iteration, _fake, _save, _backward, _vmap),
)


_small = small_road("power_iteration")
_is_compiling = torch.compiler.is_dynamo_compiling


def _computed(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], dims: list[int], *options: Any) -> Any:
    """The operator's results, by the short road where it is open: it checks what `_check` would."""
    if not _is_compiling():
        found = _small(weights, us, vs, dims, *options)
        if found is not None:
            return found
    _check(weights, us, vs, dims)
    _check_options(*options[:2])
    return _power_iteration(weights, us, vs, dims, *options)


def _check(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], dims: Sequence[int]) -> None:
    """Every kernel relies on these shapes."""
    if not (len(weights) == len(us) == len(vs) == len(dims)):
        raise ValueError(
            "power_iteration: weights, us, vs and dims must be equally many, got "
            f"{len(weights)}, {len(us)}, {len(vs)} and {len(dims)}"
        )
    if not weights:
        raise ValueError("power_iteration: expected at least one weight, got none")
    first = weights[0]
    for weight, u, v, dim in zip(weights, us, vs, dims, strict=True):
        if not (isinstance(weight, Tensor) and isinstance(u, Tensor) and isinstance(v, Tensor)):
            raise TypeError("power_iteration: weight, u and v must be torch.Tensors")
        if weight.dim() < 2 or not -weight.dim() <= dim < weight.dim():
            raise ValueError(
                f"power_iteration: weight must have at least 2 dimensions, {dim} among them, got {tuple(weight.shape)}"
            )
        rows = weight.shape[dim]
        columns = math.prod(weight.shape[:dim]) * math.prod(weight.shape[dim:][1:])
        if u.shape != (rows,) or v.shape != (columns,):
            raise ValueError(
                f"power_iteration: u must be ({rows},) and v ({columns},) for a weight {tuple(weight.shape)} with its "
                f"rows in dimension {dim}, got {tuple(u.shape)} and {tuple(v.shape)}"
            )
        if weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(
                "power_iteration: all weights must have one dtype and one device, got "
                f"{first.dtype} on {first.device} and {weight.dtype} on {weight.device}"
            )


def power_iteration_multi(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    u_first: bool = False,
    return_weights: bool = False,
) -> Any:
    r"""`power_iteration` of many matrices in one call: every layer of a network, on a GPU in one launch.

    Args:
        weights: L tensors of at least 2 dimensions, of one dtype and device; see `power_iteration`.
        us, vs: L vectors each.
        n_iterations, eps, u_first: as in `power_iteration`, for all.
        dims: for each weight the dimension of the rows; 0 for all when left out.
        return_weights: also divide every weight by its sigma.

    Returns:
        sigma: (L,), float32 for 16-bit weights and their dtype otherwise. us, vs: lists. With `return_weights` also the
        list of weights divided by sigma. Differentiable in the weights.

    Raises:
        ValueError: lists of different lengths, mixed dtypes or devices, shapes that do not fit. TypeError: what is not
        a tensor. RuntimeError: dtypes.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> weights = [torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2, 3)]
        >>> us, vs = [torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(3)]
        >>> sigma, us, vs = ops.power_iteration_multi(weights, us, vs, n_iterations=20)
        >>> sigma
        tensor([3.0000, 2.4495])

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks", ICLR 2018,
    algorithm 1.
    """
    dims = [0] * len(weights) if dims is None else list(dims)
    sigma, normalized, us, vs = _computed(
        list(weights), list(us), list(vs), dims, n_iterations, eps, u_first, return_weights
    )
    return (sigma, us, vs, normalized) if return_weights else (sigma, us, vs)


def _check_options(n_iterations: int, eps: float) -> None:
    if n_iterations < 0:
        raise ValueError(f"power_iteration: n_iterations must not be negative, got {n_iterations}")
    if not eps > 0:
        raise ValueError(f"power_iteration: eps must be positive, got {eps}")


def power_iteration(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    u_first: bool = False,
    return_weight: bool = False,
) -> Any:
    r"""Steps of the power iteration for a matrix's largest singular value; on request also the matrix divided by it.

    With W the weight as a matrix, dimension `dim` in front and the others flattened, a step is

    .. math::
        v \leftarrow \frac{W^\top u}{\max(|W^\top u|, \epsilon)}, \qquad
        u \leftarrow \frac{W v}{\max(|W v|, \epsilon)}

    and after the steps :math:`\sigma = u^\top W v`. With `u_first` u is updated before v, as
    ``torch.nn.utils.parametrizations.spectral_norm`` does; the other order is that of ``torch.nn.utils.spectral_norm``
    and of the paper. A step reads W once.

    u and v are constants of the gradient: :math:`\partial\sigma/\partial W = u v^\top`, and with G the gradient of
    :math:`W / \sigma` that of W is :math:`(G - \langle G, W / \sigma\rangle\, u v^\top) / \sigma`.

    A product that is zero or not finite leaves its vector as it was, and a weight is divided by eps in place of a sigma
    smaller than that: a matrix of zeros gives sigma 0 and zeros, never NaN.

    Args:
        weight: (n, m), or more dimensions of which `dim` has n elements and the others m together; float64, float32,
            bfloat16 or float16. Sums are in float32 at least.
        u: (n,). v: (m,); of any floating dtype.
        n_iterations: number of steps; with 0 sigma is :math:`u^\top W v` of the given vectors.
        eps: smallest norm to divide by.
        dim: the dimension of the rows; 1 for the weights of transposed convolutions.
        u_first: update u before v.
        return_weight: also return the weight divided by sigma.

    Returns:
        sigma: scalar, float32 for 16-bit weights and their dtype otherwise. u, v: new vectors of the given dtypes,
        without a gradient. With `return_weight` also the weight divided by sigma, contiguous.

    Raises:
        ValueError: shapes that do not fit, n_iterations < 0 or eps <= 0. TypeError: not a tensor. RuntimeError: dtypes.

    Example:
        >>> import torch
        >>> from pygen import ops
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> sigma, u, v = ops.power_iteration(weight, torch.ones(2), torch.ones(2), n_iterations=20)
        >>> sigma, torch.autograd.grad(sigma, weight)[0]
        (tensor(3., grad_fn=<SelectBackward0>), tensor([[1.0000e+00, 9.9574e-11],
                [2.9872e-10, 2.9745e-20]]))

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks", ICLR 2018,
    algorithm 1.
    """
    sigma, normalized, us, vs = _computed([weight], [u], [v], [dim], n_iterations, eps, u_first, return_weight)
    return (sigma[0], us[0], vs[0], normalized[0]) if return_weight else (sigma[0], us[0], vs[0])
