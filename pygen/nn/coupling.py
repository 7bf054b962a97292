"""Affine and additive coupling layers on pygen.ops. Conditioners are in conditioners.py; models stack the layers."""

from typing import Any

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.nn._fork import fork
from pygen.nn.transform import Retraced, Transform, zero_log_det
from pygen.reference.affine_coupling import SCALE_MAPS


def alternating_mask(n: int, *, even: bool = False) -> Tensor:
    """bool (n,): True (transformed) at odd positions, or at even ones.

    Example:
        >>> from pygen import nn
        >>> nn.alternating_mask(4)
        tensor([False,  True, False,  True])
    """
    return torch.arange(n) % 2 == (0 if even else 1)


def checkerboard_mask(height: int, width: int, channels: int | None = None, *, even: bool = False) -> Tensor:
    """bool (height, width), or (channels, height, width): True (transformed) where row + column is odd, or even.

    Example:
        >>> from pygen import nn
        >>> nn.checkerboard_mask(2, 2)
        tensor([[False,  True],
                [ True, False]])

    Source: Dinh et al., "Density estimation using Real NVP", 2017, section 3.4.
    """
    board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == (0 if even else 1)
    return board if channels is None else board.expand(channels, height, width).clone()


class _Coupling(Transform):
    """Splits x into a passive and an active part, by halves or by mask, and puts the parts together again.

    A subclass defines `_couple(active, parameters, inverse) -> (active, log_det)`; `parameters` are what the
    conditioner made of the passive part, already cut into `_chunks` pieces of the active part's shape.
    """

    _chunks: int
    mask: Tensor | None
    _active: Tensor

    def __init__(self, conditioner: nn.Module, *, mask: Tensor | None, dim: int, swap: bool) -> None:
        super().__init__()
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"{type(self).__name__}: mask must be bool (True = transformed), got {mask.dtype}")
        if mask is not None and (mask.all() or not mask.any()):
            raise ValueError(
                f"{type(self).__name__}: mask must leave at least one element as it is and transform at least one, "
                f"got {int(mask.sum())} of {mask.numel()} transformed"
            )
        self.conditioner = conditioner
        self.dim, self.swap = dim, swap
        self.register_buffer("mask", mask if mask is None or not swap else ~mask)
        self.register_buffer("_active", None, persistent=False)
        self._index_active()
        self.register_load_state_dict_post_hook(_index_active_again)

    def _index_active(self) -> None:
        if self.mask is not None:
            self._active = self.mask.flatten().nonzero().squeeze(1)

    def _couple(self, active: Tensor, parameters: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _run_conditioner(self, passive: Tensor, context: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        return self.conditioner(passive) if context is None else self.conditioner(passive, context)

    def _condition(self, passive: Tensor, context: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
        """Run the conditioner and cut its output."""
        return self._cut(self._run_conditioner(passive, context), shape)

    def _cut(self, out: Tensor | tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
        """What the conditioner returned as `_chunks` views of the given shape."""
        parts = tuple(out) if isinstance(out, tuple | list) else out.chunk(self._chunks, self.dim)
        if len(parts) != self._chunks or any(part.shape != shape for part in parts):
            got = [tuple(part.shape) for part in parts] if isinstance(out, tuple | list) else tuple(out.shape)
            raise ValueError(
                f"{type(self).__name__}: the conditioner must return {self._chunks} x {tuple(shape)}, "
                f"in one tensor along dimension {self.dim} or as a tuple, got {got}"
            )
        return parts

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the conditioner sees and what is transformed: two views, or by mask all of x with zeros and (B, n)."""
        if self.mask is not None:
            if x.shape[1:] != self.mask.shape:
                raise ValueError(
                    f"{type(self).__name__}: x must be (B, ...) with the mask's shape {tuple(self.mask.shape)} per "
                    f"sample, got {tuple(x.shape)}"
                )
            return x.masked_fill(self.mask, 0), x.flatten(1).index_select(1, self._active)
        first, second = x.split(self._sizes(x), self.dim)
        return (second, first) if self.swap else (first, second)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Elements of the two halves; the first is passive unless `swap`."""
        size = x.size(self.dim)
        if size < 2:
            raise ValueError(
                f"{type(self).__name__}: dimension {self.dim} must have at least 2 elements to be split, "
                f"got x {tuple(x.shape)}"
            )
        return size - size // 2, size // 2

    def _merge(self, passive: Tensor, active: Tensor) -> Tensor:
        """x of its parts. By mask, what `passive` has at active positions does not matter."""
        if self.mask is None:
            return torch.cat((active, passive) if self.swap else (passive, active), self.dim)
        flat = passive.flatten(1)
        return flat.index_copy(1, self._active, active.to(flat.dtype)).view(passive.shape)

    def _parameters_of(self, passive: Tensor, active: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """What the conditioner says about every active element."""
        if self.mask is None:
            return self._condition(passive, context, active.shape)
        parameters = self._condition(passive, context, passive.shape)
        # The active elements only: half the work, and no scale map needs a neutral element for the others.
        return tuple(p.flatten(1, passive.dim() - 1).index_select(1, self._active) for p in parameters)

    def _apply_coupling(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        passive, active = self._split(x)
        active, log_det = self._couple(active, self._parameters_of(passive, active, context), inverse)
        return self._merge(passive, active), log_det

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_coupling(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_coupling(z, context, True)

    def retrace(self, z: Tensor, context: Tensor | None = None) -> Retraced:
        """As `Transform.retrace`, with one run of the conditioner: its input is the same on both sides."""
        passive, transformed = (part.detach() for part in self._split(z))
        passive.requires_grad_()
        with torch.enable_grad():
            parameters = self._parameters_of(passive, transformed, context)
        with torch.no_grad():
            active, _ = self._couple(transformed, tuple(p.detach() for p in parameters), True)
            x = self._merge(passive, active)
        active = active.detach().requires_grad_()
        with torch.enable_grad():
            transformed, log_det = self._couple(active, parameters, False)
            z = self._merge(passive, transformed)

        def join(grads: tuple[Tensor | None, ...]) -> Tensor:
            of_passive, of_active = (
                torch.zeros_like(leaf) if grad is None else grad
                for leaf, grad in zip((passive, active), grads, strict=True)
            )
            return self._merge(of_passive, of_active)

        return Retraced(x, (passive, active), z, log_det, join)

    def extra_repr(self) -> str:
        split = f"dim={self.dim}" if self.mask is None else f"mask={tuple(self.mask.shape)}"
        return f"{split}, swap={self.swap}"


def _index_active_again(coupling: _Coupling, incompatible_keys: object) -> None:
    """A function of the module, not a lambda, so that layers can be pickled."""
    coupling._index_active()


class AffineCoupling(_Coupling):
    r"""Affine coupling: one part of x scales and shifts the other.

    .. math::
        z_p = x_p, \qquad z_a = x_a\, s(a) + t, \qquad (a, t) = \mathrm{conditioner}(x_p, c), \qquad
        \log\det_b = \sum \log s(a)

    Args:
        conditioner: a module from the passive part (and context, when one is given) to a and t: one tensor whose first
            half along `dim` is a and whose second half is t, or a tuple (a, t). One tensor is read as it is.
        mask: None splits x in halves along `dim` (the first, larger one when odd, conditions). Or bool of x's shape
            without the batch, True = transformed; the conditioner then sees all of x with the transformed part zero,
            and returns a and t for all of x.
        dim: the dimension of features or channels.
        swap: exchange the roles of the two parts.
        scale_map, shift_first, clamp: as in `pygen.ops.affine_coupling`.

    Shape:
        x, z: (B, ...). context: whatever the conditioner takes. log_det: (B,).

    Raises:
        ValueError: a mask that transforms nothing or everything, x that does not fit, a conditioner's output that does
            not fit, or an unknown scale_map. TypeError: a mask that is not bool.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> layer = nn.AffineCoupling(nn.MLP(2, 4), scale_map="tanh")
        >>> x = torch.randn(5, 4)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x), log_det.shape
        (True, torch.Size([5]))

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, section 3.2.
    """

    _chunks = 2

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Tensor | None = None,
        dim: int = 1,
        swap: bool = False,
        scale_map: str = "tanh",
        shift_first: bool = False,
        clamp: float = 2.0,
    ) -> None:
        super().__init__(conditioner, mask=mask, dim=dim, swap=swap)
        if scale_map not in SCALE_MAPS:
            raise ValueError(f"AffineCoupling: scale_map must be one of {', '.join(SCALE_MAPS)}, got {scale_map!r}")
        self.scale_map, self.shift_first, self.clamp = scale_map, shift_first, clamp

    def _options(self, inverse: bool) -> dict[str, Any]:
        return {
            "scale_map": self.scale_map,
            "shift_first": self.shift_first,
            "clamp": self.clamp,
            "inverse": inverse,
        }

    def _couple(self, active: Tensor, parameters: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        scale, shift = parameters
        return ops.affine_coupling(active, scale, shift, **self._options(inverse))

    def _apply_coupling(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.mask is not None or self.dim in (0, -x.dim()):
            return super()._apply_coupling(x, context, inverse)
        first, second = self._sizes(x)
        head, tail = (0, first), (first, second)
        passive_at, active_at = (tail, head) if self.swap else (head, tail)
        passive, x = fork(x, self.dim, *passive_at)
        out = self._run_conditioner(passive, context)
        together = list(x.shape)
        together[self.dim] = 2 * active_at[1]
        if isinstance(out, Tensor) and out.shape == tuple(together):
            return ops.affine_coupling_halves(x, out, dim=self.dim, swap=self.swap, **self._options(inverse))
        active = x.narrow(self.dim, *active_at)
        active, log_det = self._couple(active, self._cut(out, active.shape), inverse)
        return self._merge(passive, active), log_det

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_map={self.scale_map!r}, shift_first={self.shift_first}"


class AdditiveCoupling(_Coupling):
    r"""Additive coupling: one part of x shifts the other, :math:`z_a = x_a + t(x_p, c)`. Its log-determinant is 0.

    Args:
        conditioner: a module from the passive part (and context, when one is given) to t.
        mask, dim, swap: as in `AffineCoupling`.

    Shape:
        x, z: (B, ...). log_det: (B,), zeros.

    Raises:
        ValueError, TypeError: as `AffineCoupling`.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> layer = nn.AdditiveCoupling(nn.MLP(2, 2))
        >>> layer(torch.ones(1, 4))
        (tensor([[1., 1., 1., 1.]], grad_fn=<CatBackward0>), tensor([0.]))

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, section 3.2.
    """

    _chunks = 1

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Tensor | None = None,
        dim: int = 1,
        swap: bool = False,
    ) -> None:
        super().__init__(conditioner, mask=mask, dim=dim, swap=swap)

    def _couple(self, active: Tensor, parameters: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.additive_coupling(active, parameters[0], inverse=inverse), zero_log_det(active)
