"""Penalties on the weights of a network: their spectral norms, their Frobenius norms, and how far from orthogonal their
filters are. Plain PyTorch but for the power iteration, which takes all layers in one call of `pygen.ops`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.reference._dtypes import compute_dtype, widen
from pygen.reference.power_iteration import as_matrix

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Embedding)
_WARM_UP = 15  # iterations on new vectors, as many as torch's spectral norm makes


def _layer_weights(model: nn.Module) -> tuple[list[Tensor], list[int]]:
    """Weights and row dimensions of the layers that have a matrix; a weight that two layers share, once."""
    weights: list[Tensor] = []
    dims: list[int] = []
    seen: list[Tensor] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, _LAYERS):
            continue
        source = _stored(layer)
        if isinstance(source, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} has no weight yet: call the model once before its weights are penalised")
        if not any(source is other for other in seen):
            seen.append(source)
            weights.append(layer.weight)
            dims.append(1 if isinstance(layer, _TRANSPOSED) else 0)
    if not weights:
        raise ValueError("model must have a linear, convolutional or embedding layer, found none")
    return weights, dims


def _stored(layer: nn.Module) -> Any:
    """What layers that share a weight have in common. A parametrised weight is a new tensor at every access."""
    if not nn.utils.parametrize.is_parametrized(layer, "weight"):
        return layer.weight
    originals: Any = layer.parametrizations["weight"]  # type: ignore[index]
    return originals.original if hasattr(originals, "original") else originals.original0


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """(L,) of scalars that may differ in dtype and device."""
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in values))
    return torch.stack([value.to(values[0].device, dtype) for value in values])


def spectral_penalty(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    squared: bool = True,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    r"""The sum of squared spectral norms, :math:`\sum_l \sigma_l^2`, from vectors that the caller keeps.

    `SpectralPenalty` keeps them for a model. One call of `pygen.ops.power_iteration_multi` does all layers; the
    gradient is :math:`2 \sigma_l u_l v_l^\top`.

    Args:
        weights: L tensors of at least 2 dimensions, of one dtype and device.
        us, vs: L vectors each, of rows and columns.
        n_iterations, eps, dims: steps, smallest norm, and the dimension of the rows of each weight.
        squared: the sum of :math:`\sigma_l^2`; False for that of :math:`\sigma_l`.

    Returns:
        penalty: scalar, float32 for 16-bit weights and their dtype otherwise. us, vs: the vectors for the next call.

    Raises:
        ValueError, TypeError: as `pygen.ops.power_iteration_multi`.

    Example:
        >>> import torch
        >>> from pygen.functional import spectral_penalty
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> spectral_penalty([weight], [torch.ones(2)], [torch.ones(2)], n_iterations=20)[0]
        tensor(9.)

    Source: Yoshida, Miyato, "Spectral norm regularization for improving the generalizability of deep learning", 2017.
    """
    sigma, new_us, new_vs = ops.power_iteration_multi(weights, us, vs, n_iterations=n_iterations, eps=eps, dims=dims)
    return (sigma.square() if squared else sigma).sum(), new_us, new_vs


class SpectralPenalty(nn.Module):
    r"""Spectral norm regularisation of a whole model: loss + :math:`\lambda \sum_l \sigma_l^2`.

    Over the weights of linear, convolutional and embedding layers, each as a matrix (output channels in rows), a weight
    that layers share counted once. The vectors of the power iteration are buffers: they are saved with the module, and
    in training mode every call moves them by `n_power_iterations` steps, all layers in one call of the op.

    The model is an argument of the call and no part of this module, so nothing is saved or optimised twice. It may be
    the model as given, or what `torch.compile` or DistributedDataParallel made of it.

    Args:
        model: whose layers; its weights are read once, for their shapes and for 15 steps from random vectors.
        n_power_iterations: steps per call in training mode; in eval mode the vectors stay.
        eps: smallest norm to divide by.
        squared: the sum of :math:`\sigma_l^2`; False for that of :math:`\sigma_l`.

    Raises:
        ValueError: a model without such a layer, or with a lazy one that has no weight yet.

    Example:
        >>> import torch
        >>> from pygen.functional import SpectralPenalty
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> model[0].weight.data, model[2].weight.data = torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)
        >>> penalty = SpectralPenalty(model)
        >>> loss = model(torch.randn(4, 2)).square().mean() + 0.01 * penalty(model)
        >>> loss.backward()
        >>> penalty(model)
        tensor(10., grad_fn=<SumBackward0>)

    Source: Yoshida, Miyato, "Spectral norm regularization for improving the generalizability of deep learning", 2017.
    """

    def __init__(
        self, model: nn.Module, n_power_iterations: int = 1, eps: float = 1e-12, *, squared: bool = True
    ) -> None:
        super().__init__()
        if n_power_iterations < 0:
            raise ValueError(f"SpectralPenalty: n_power_iterations must not be negative, got {n_power_iterations}")
        self.n_power_iterations, self.eps, self.squared = n_power_iterations, eps, squared
        weights, dims = _layer_weights(model)
        self._count = len(weights)
        for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
            rows = weight.size(dim)
            columns = weight.numel() // rows if rows else 0
            # In float32 at least: in 16 bits a vector stops short of the last digits of its direction.
            options: Any = {"dtype": compute_dtype(weight.dtype), "device": weight.device}
            for side, size in (("u", rows), ("v", columns)):
                self.register_buffer(f"_{side}{i}", nn.functional.normalize(torch.randn(size, **options), dim=0))
        with torch.no_grad():
            self._sigmas(weights, dims, _WARM_UP)

    def forward(self, model: nn.Module) -> Tensor:
        """The penalty of the model's weights as they are now: a scalar, differentiable in them.

        Raises:
            ValueError: a model with other layers than the one this was made for, or on another device.
        """
        weights, dims = _layer_weights(model)
        sigmas = self._sigmas(weights, dims, self.n_power_iterations if self.training else 0)
        return (sigmas.square() if self.squared else sigmas).sum()

    def _sigmas(self, weights: list[Tensor], dims: list[int], n_iterations: int) -> Tensor:
        """(L,) in the order of the layers; one call of the op for every dtype and device among the weights."""
        self._check(weights, dims)
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, weight in enumerate(weights):
            groups.setdefault((weight.dtype, weight.device), []).append(i)
        found: dict[int, Tensor] = {}
        for members in groups.values():
            us, vs = ([self.get_buffer(f"_{side}{i}") for i in members] for side in "uv")
            sigma, new_us, new_vs = ops.power_iteration_multi(
                [weights[i] for i in members],
                us,
                vs,
                n_iterations=n_iterations,
                eps=self.eps,
                dims=[dims[i] for i in members],
            )
            if n_iterations:
                with torch.no_grad():
                    for before, after in zip((*us, *vs), (*new_us, *new_vs), strict=True):
                        before.copy_(after)
            found.update(zip(members, sigma, strict=True))
        return sigma if len(groups) == 1 else _stacked([found[i] for i in range(self._count)])

    def _check(self, weights: list[Tensor], dims: list[int]) -> None:
        if len(weights) != self._count:
            raise ValueError(f"SpectralPenalty: model must have {self._count} layers with weights, got {len(weights)}")
        for i, (weight, dim) in enumerate(zip(weights, dims, strict=True)):
            u, v = self.get_buffer(f"_u{i}"), self.get_buffer(f"_v{i}")
            if weight.size(dim) != len(u) or weight.numel() != len(u) * len(v):
                raise ValueError(
                    f"SpectralPenalty: layer {i} must have a weight of {len(u)} rows and {len(v)} columns, "
                    f"got {tuple(weight.shape)}"
                )
            if weight.device != u.device:
                raise ValueError(
                    f"SpectralPenalty: layer {i} is on {weight.device} and its vectors on {u.device}: move both alike"
                )

    def extra_repr(self) -> str:
        return f"layers={self._count}, n_power_iterations={self.n_power_iterations}, squared={self.squared}"


def frobenius_bound(
    weights: nn.Module | Tensor | Sequence[Tensor], *, squared: bool = True, reduction: str = "sum"
) -> Tensor:
    r"""The bound of the spectral norm that costs nothing: :math:`\sigma(W) \le \|W\|_F`, weight decay by another name.

    With the defaults :math:`\sum_l \|W_l\|_F^2`, an upper bound of `SpectralPenalty` at the same model, with equality
    for matrices of rank 1. The product of :math:`\|W_l\|_F` is a Lipschitz bound of linear layers with activations of
    slope at most 1 in between; not of convolutions, whose operator may exceed the norm of their kernel.

    Args:
        weights: a model, of which the layers are those of `SpectralPenalty`; or a tensor, or a sequence of tensors.
        squared: squares of the norms.
        reduction: "sum", "product", or "none" for one value per weight.

    Returns:
        scalar, or (L,) for "none"; float32 for 16-bit weights and their dtype otherwise. The gradient at a weight of
        zeros is zero.

    Raises:
        ValueError: an unknown reduction, no weights.

    Example:
        >>> import torch
        >>> from pygen.functional import frobenius_bound
        >>> frobenius_bound([torch.ones(2, 2), torch.ones(1, 5)])
        tensor(9.)

    Source: Yoshida, Miyato, "Spectral norm regularization for improving the generalizability of deep learning", 2017.
    """
    if reduction not in ("sum", "product", "none"):
        raise ValueError(f"frobenius_bound: reduction must be one of sum, product, none, got {reduction!r}")
    if isinstance(weights, nn.Module):
        listed: Sequence[Tensor] = _layer_weights(weights)[0]
    else:
        listed = [weights] if isinstance(weights, Tensor) else weights
    if not listed:
        raise ValueError("frobenius_bound: expected at least one weight, got none")
    wide = [widen(w) for w in listed]
    each = _stacked([w.square().sum() if squared else torch.linalg.vector_norm(w) for w in wide])
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.prod()


def self_orthogonality(
    x: Tensor, weight: Tensor | None = None, *, temperature: float = 10.0, mean_weight: float = 100.0
) -> Tensor:
    r"""The Self-Orthogonality regulariser: how far the filters of a layer are from orthogonal, as the data see them.

    With Y = X W the responses of k filters, :math:`A = \tanh(10\, Y)` with every column divided by its L2 norm along
    the batch, and :math:`T = A^\top A`:

    .. math::
        R = 100 \Bigl(\sum_{i \ne j} T_{ij}\Bigr)^2 + \sum_{i \ne j} T_{ij}^2

    tanh(10 y) stands for the sign of y, and for two filters at an angle :math:`\theta` and X gaussian
    :math:`E[\mathrm{sgn}(x w_i)\, \mathrm{sgn}(x w_j)] = 1 - 2 \theta / \pi`: T estimates angles, and R is zero where
    every pair is at :math:`\pi / 2` and 402 for two filters that are the same.

    The first term asks no more than that positive and negative cosines cancel, and with many filters it outweighs the
    second, which asks it of every pair: `mean_weight` balances them.

    Args:
        x: (b, d) the inputs of a layer; or, without `weight`, its responses Y (b, k). Those of a convolution
            (B, k, H, W) are ``y.movedim(1, -1).flatten(0, -2)``.
        weight: (d, k), a filter in every column: ``layer.weight.T`` of `nn.Linear`.
        temperature: the 10 in tanh(10 y).
        mean_weight: the 100 before the squared sum.

    Returns:
        scalar, float32 for 16-bit inputs (and under autocast) and the wider of their dtypes otherwise. A filter that
        answers zero to the whole batch has no angle: its entries of T are 0 and so is its gradient. An empty batch has
        R = 0.

    Raises:
        ValueError: shapes other than (b, d) and (d, k).

    Example:
        >>> import torch
        >>> from pygen.functional import self_orthogonality
        >>> self_orthogonality(torch.randn(64, 3).double(), torch.ones(3, 2).double()).item()
        402.0

    Source: Zhang, Ma, Wu, Wang, "Self-Orthogonality Module: a network architecture plug-in for learning orthogonal
    filters", WACV 2020.
    """
    if x.dim() != 2 or (weight is not None and (weight.dim() != 2 or len(weight) != x.size(1))):
        got = f"{tuple(x.shape)}" if weight is None else f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"self_orthogonality: x must be (b, d) and weight (d, k), got {got}")
    # Under autocast the products would be in 16 bits, of which R keeps two digits: 100 (sum)^2.
    with torch.autocast(x.device.type, enabled=False):
        if weight is None:
            y = widen(x)
        else:
            dtype = compute_dtype(torch.promote_types(x.dtype, weight.dtype))
            y = x.to(dtype) @ weight.to(dtype)
        off_diagonal = _without_diagonal(_cosines(torch.tanh(temperature * y)))
        return mean_weight * off_diagonal.sum().square() + off_diagonal.square().sum()


def _cosines(a: Tensor) -> Tensor:
    """(k, k) cosines of the columns of a (b, k); 0 with a column of zeros.

    The diagonal of the same product normalises the others, so that equal columns have a cosine of 1 to the last bit:
    sqrt(g * g) is g. Columns first have their largest element at 1: then no square vanishes or overflows. The cosine
    does not depend on that scale, hence no gradient through it.
    """
    if not len(a):
        return a.T @ a
    largest = a.detach().abs().amax(0)
    a = a / torch.where(largest > 0, largest, 1.0)
    gram = a.T @ a
    diagonal = gram.diagonal()
    there = diagonal > 0
    diagonal = torch.where(there, diagonal, 1.0)
    # Without this a column of zeros would have cosines of 0 and yet a gradient, towards whatever the others are.
    return torch.where(there[:, None] & there, gram / (diagonal[:, None] * diagonal).sqrt(), 0.0)


def _without_diagonal(square: Tensor) -> Tensor:
    return square.masked_fill(torch.eye(len(square), dtype=torch.bool, device=square.device), 0)


def orthogonality(weight: Tensor, *, between: str = "columns", dim: int = 0) -> Tensor:
    r"""How far the columns of a matrix are from orthogonal: :math:`\|(W^\top W - I) \odot (1 - I)\|_F^2`.

    The sum of :math:`\langle w_i, w_j \rangle^2` over all pairs of different columns. Lengths count in it and are not
    asked to be 1.

    Args:
        weight: (n, m), or more dimensions of which `dim` has the n rows and the others m columns together.
        between: "columns", or "rows" for W W^T: the filters of `nn.Linear` and of convolutions are rows.
        dim: the dimension of the rows; 1 for the weights of transposed convolutions.

    Returns:
        scalar, float32 for 16-bit weights (and under autocast) and their dtype otherwise.

    Raises:
        ValueError: fewer than 2 dimensions, or another `between`.

    Example:
        >>> import torch
        >>> from pygen.functional import orthogonality
        >>> orthogonality(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))  # 1 * 2 = 2, in either order
        tensor(8.)

    Source: Zhang, Ma, Wu, Wang, "Self-Orthogonality Module: a network architecture plug-in for learning orthogonal
    filters", WACV 2020, the baseline there.
    """
    if between not in ("columns", "rows"):
        raise ValueError(f"orthogonality: between must be columns or rows, got {between!r}")
    if weight.dim() < 2 or not -weight.dim() <= dim < weight.dim():
        raise ValueError(
            f"orthogonality: weight must have at least 2 dimensions, {dim} among them, got {tuple(weight.shape)}"
        )
    with torch.autocast(weight.device.type, enabled=False):
        matrix = as_matrix(widen(weight), dim)
        gram = matrix.T @ matrix if between == "columns" else matrix @ matrix.T
        return _without_diagonal(gram).square().sum()
