"""Rational-quadratic spline coupling on pygen.ops; how x is split is coupling.py's."""

import math

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.nn.coupling import _Coupling
from pygen.reference.rational_quadratic_spline import derivative_count


class RationalQuadraticCoupling(_Coupling):
    r"""Spline coupling: every element of one part of x goes through its own monotonic rational-quadratic spline.

    .. math::
        z_p = x_p, \qquad z_a = \mathrm{RQS}(x_a; \theta), \qquad \theta = \mathrm{conditioner}(x_p, c), \qquad
        \log\det_b = \sum \log \mathrm{RQS}'(x_a; \theta)

    For every element theta holds K widths, K heights and the derivatives, P = `parameters_per_feature` numbers: 3K - 1
    for linear tails, 3K for circular ones, 3K + 1 for none. See `pygen.ops.rational_quadratic_spline`.

    Args:
        conditioner: a module from the passive part (and context, when one is given) to theta: for an active part with n
            features or channels along `dim`, n P of them, the P of each feature together (nflows' order). Read as
            views. With a mask, theta is for all of x.
        mask, dim, swap: as in `AffineCoupling`.
        num_bins: K.
        tails: "linear" (identity outside the interval, slope 1 at its ends), "circular" or None.
        tail_bound: B, the spline acts on [-B, B].
        min_bin_width, min_bin_height, min_derivative: as in the op.
        identity_init: add log(e^{1 - min_derivative} - 1) to the raw derivatives, so that theta = 0, what a new
            conditioner of `pygen.nn` returns, is the identity. False is nflows' parametrisation.

    Shape:
        x, z: (B, ...), at least two features. log_det: (B,).

    Raises:
        ValueError, TypeError: as `AffineCoupling`, and options that the op refuses.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> per_feature = nn.RationalQuadraticCoupling.parameters_per_feature_of(8, "linear")
        >>> layer = nn.RationalQuadraticCoupling(nn.MLP(2, 2 * per_feature), num_bins=8)
        >>> x = torch.randn(5, 4)
        >>> z, log_det = layer(x)
        >>> torch.allclose(z, x, atol=1e-5), log_det.shape
        (True, torch.Size([5]))

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019, section 3.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Tensor | None = None,
        dim: int = 1,
        swap: bool = False,
        num_bins: int = 8,
        tails: str | None = "linear",
        tail_bound: float = 3.0,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        identity_init: bool = True,
    ) -> None:
        super().__init__(conditioner, mask=mask, dim=dim, swap=swap)
        self.num_bins, self.tails, self.tail_bound = num_bins, tails, tail_bound
        self.min_bin_width, self.min_bin_height, self.min_derivative = min_bin_width, min_bin_height, min_derivative
        self.identity_init = identity_init
        if identity_init and not 0 < min_derivative < 1:
            raise ValueError(
                "RationalQuadraticCoupling: identity_init needs 0 < min_derivative < 1, or no derivative can be 1, "
                f"got {min_derivative}"
            )
        self._derivative_offset = math.log(math.expm1(1 - min_derivative)) if identity_init else 0.0
        # The op refuses options that do not fit: better here than in the first batch.
        self._couple(torch.zeros(0, 1), tuple(torch.zeros(0, 1, n) for n in self._counts), False)

    @staticmethod
    def parameters_per_feature_of(num_bins: int, tails: str | None = "linear") -> int:
        """P, what a conditioner has to return for every feature.

        Raises:
            ValueError: num_bins is not positive, or tails is unknown.
        """
        if num_bins < 1:
            raise ValueError(f"RationalQuadraticCoupling: num_bins must be at least 1, got {num_bins}")
        return 2 * num_bins + derivative_count(num_bins, "none" if tails is None else tails)

    @property
    def parameters_per_feature(self) -> int:
        """P of this layer."""
        return self.parameters_per_feature_of(self.num_bins, self.tails)

    @property
    def _counts(self) -> tuple[int, int, int]:
        """How many widths, heights and derivatives a feature has."""
        return self.num_bins, self.num_bins, self.parameters_per_feature - 2 * self.num_bins

    def _condition(self, passive: Tensor, context: Tensor | None, shape: torch.Size) -> tuple[Tensor, ...]:
        """Widths, heights and derivatives, (*shape, n) each: views of the conditioner's output."""
        out = self.conditioner(passive) if context is None else self.conditioner(passive, context)
        dim, per_feature = self.dim % len(shape), self.parameters_per_feature
        expected = (*shape[:dim], shape[dim] * per_feature, *shape[dim + 1 :])
        if tuple(out.shape) != expected:
            raise ValueError(
                f"RationalQuadraticCoupling: the conditioner must return {per_feature} parameters for each of "
                f"{shape[dim]} features along dimension {dim}, {expected}, got {tuple(out.shape)}"
            )
        return out.unflatten(dim, (shape[dim], per_feature)).movedim(dim + 1, -1).split(self._counts, -1)

    def _couple(self, active: Tensor, parameters: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        widths, heights, derivatives = parameters
        z, log_abs_det = ops.rational_quadratic_spline(
            active,
            widths,
            heights,
            derivatives + self._derivative_offset if self.identity_init else derivatives,
            inverse=inverse,
            tails=self.tails,
            tail_bound=self.tail_bound,
            min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height,
            min_derivative=self.min_derivative,
        )
        return z, log_abs_det.flatten(1).sum(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_bins={self.num_bins}, tails={self.tails!r}, tail_bound={self.tail_bound}"
