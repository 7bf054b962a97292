"""What every flow layer is (`Transform`), how layers are chained, and the layers that only move elements."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pygen.reference._dtypes import compute_dtype


def zero_log_det(x: Tensor) -> Tensor:
    """(B,) zeros in the type in which log-determinants of `x` are kept: the answer of a volume-preserving layer."""
    return x.new_zeros(x.size(0), dtype=compute_dtype(x.dtype))


class Retraced(NamedTuple):
    """One step of a flow found again from its output; see `Transform.retrace`.

    The graph of `z` and `log_det` begins at `leaves`; `join` puts their gradients (None where there is none) together
    to the gradient of x.
    """

    x: Tensor
    leaves: tuple[Tensor, ...]
    z: Tensor
    log_det: Tensor
    join: Callable[[tuple[Tensor | None, ...]], Tensor]


class Transform(nn.Module):
    r"""An invertible map :math:`z = f(x; c)` that knows its log-determinant; the base class of all flow layers.

    `forward` is the density direction: it returns z and :math:`\log |\det \partial z / \partial x|`, one number per
    sample. `inverse` is the sampling direction and returns x with the log-determinant of its own Jacobian, which is
    minus the one of `forward` at that x.

    Args of both methods:
        x (or z): (B, ...), floating point.
        context: (B, F) or None, what the density is conditioned on; layers without parameters ignore it.

    Returns of both methods:
        The transformed tensor, x's shape unless the layer says otherwise, and log_det: (B,).

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> class Double(nn.Transform):
        ...     def forward(self, x, context=None):
        ...         return 2 * x, torch.full((len(x),), x[0].numel() * 0.6931)
        ...     def inverse(self, z, context=None):
        ...         return z / 2, torch.full((len(z),), -z[0].numel() * 0.6931)
        >>> Double()(torch.ones(1, 2))[0]
        tensor([[2., 2.]])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define inverse")

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one z for samples x of the given shape, both without the batch."""
        return tuple(shape)

    def retrace(self, z: Tensor, context: Tensor | None = None) -> Retraced:
        """x from z, with the graph of `forward` at this x: what `ReversibleSequential` needs to go back one step.

        A layer whose `inverse` and `forward` share work (a coupling's conditioner sees the same numbers in both) does
        that work once by defining its own.
        """
        with torch.no_grad():
            x, _ = self.inverse(z, context)
        return trace(self, x, context)


def trace(transform: Transform, x: Tensor, context: Tensor | None = None) -> Retraced:
    """As `Transform.retrace`, where x is known already."""
    x = x.detach()
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        z, log_det = transform(leaf, context)

    def join(grads: tuple[Tensor | None, ...]) -> Tensor:
        return torch.zeros_like(x) if grads[0] is None else grads[0]

    return Retraced(x, (leaf,), z, log_det, join)


class Sequential(Transform):
    r"""Transforms one after the other: :math:`f = f_n \circ \dots \circ f_1`, log-determinants summed.

    Args:
        transforms: the layers in the density direction. Without any, the identity.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> flow = nn.Sequential(nn.Permutation.reverse(3), nn.Permutation.reverse(3))
        >>> flow(torch.tensor([[1.0, 2.0, 3.0]]))
        (tensor([[1., 2., 3.]]), tensor([0.]))
    """

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.transforms)

    def __getitem__(self, index: int) -> nn.Module:
        return self.transforms[index]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = zero_log_det(x)
        for transform in self.transforms:
            x, step = transform(x, context)
            log_det = log_det + step
        return x, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = zero_log_det(z)
        for transform in reversed(self.transforms):
            z, step = transform.inverse(z, context)  # type: ignore[operator]
            log_det = log_det + step
        return z, log_det

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        for transform in self.transforms:
            shape = transform.output_shape(shape)  # type: ignore[operator]
        return tuple(shape)


class Permutation(Transform):
    """Reorders one dimension: z[..., i, ...] = x[..., indices[i], ...]. Its log-determinant is 0.

    The order is a buffer: it is saved with the model, so a random one survives a reload.

    Args:
        indices: int64 (n,), a permutation of 0 .. n - 1.
        dim: the dimension to reorder, 1 (features or channels) by default.

    Raises:
        ValueError: indices is not a permutation.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.Permutation(torch.tensor([2, 0, 1]))(torch.tensor([[1.0, 2.0, 3.0]]))[0]
        tensor([[3., 1., 2.]])
    """

    indices: Tensor

    def __init__(self, indices: Tensor | Iterable[int], dim: int = 1) -> None:
        super().__init__()
        indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), dtype=torch.int64)
        if indices.dim() != 1 or not torch.equal(indices.sort().values, torch.arange(indices.numel())):
            raise ValueError(f"Permutation: indices must be a permutation of 0 .. n - 1, got {indices.tolist()}")
        self.dim = dim
        self.register_buffer("indices", indices)

    @classmethod
    def reverse(cls, n: int, dim: int = 1) -> "Permutation":
        """The last of `n` first."""
        return cls(torch.arange(n - 1, -1, -1), dim)

    @classmethod
    def random(cls, n: int, dim: int = 1, *, generator: torch.Generator | None = None) -> "Permutation":
        """A fixed order of `n`, drawn once from `generator` (torch's global one by default)."""
        return cls(torch.randperm(n, generator=generator), dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(self.dim, self.indices), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(self.dim, self.indices.argsort()), zero_log_det(z)

    def extra_repr(self) -> str:
        return f"n={self.indices.numel()}, dim={self.dim}"


class Reshape(Transform):
    """Gives every sample another shape, elements in row-major order. Its log-determinant is 0.

    Args:
        before, after: shapes of one sample with equally many elements.

    Raises:
        ValueError: the numbers of elements differ, or x does not have the shape `before`.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.Reshape((1, 8, 8), (64,))(torch.zeros(5, 1, 8, 8))[0].shape
        torch.Size([5, 64])
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        if math.prod(before) != math.prod(after):
            raise ValueError(f"Reshape: {tuple(before)} and {tuple(after)} differ in their number of elements")
        self.before, self.after = tuple(before), tuple(after)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reshape(x, self.before, self.after), zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reshape(z, self.after, self.before), zero_log_det(z)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return self.after

    def _reshape(self, x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
        if tuple(x.shape[1:]) != before:
            raise ValueError(f"Reshape: expected (B, {', '.join(map(str, before))}), got {tuple(x.shape)}")
        return x.reshape(x.size(0), *after)

    def extra_repr(self) -> str:
        return f"{self.before} -> {self.after}"
