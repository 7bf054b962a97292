"""Invertible 1x1 convolution, alone and with the ActNorm before it folded into the same matrix product."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pygen import ops
from pygen.nn.actnorm import ActNorm
from pygen.nn.transform import Transform, zero_log_det
from pygen.reference._dtypes import compute_dtype, widen

DECOMPOSITIONS = ("plu", "none")


class InvertibleConv1x1(Transform):
    r"""A learned invertible matrix over the channels of every pixel, the generalisation of a permutation.

    .. math::
        z_{b,:,p} = W x_{b,:,p}, \qquad \log\det = \mathrm{pixels} \cdot \log |\det W|, \qquad
        W = P L\, (U + \mathrm{diag}(\sigma e^{s}))

    W starts as a random rotation. Everything about the small matrix itself (its factors' product, determinant, and
    inverse, by triangular solves or LU) is computed in float64; pixels are multiplied in float32 at least, also under
    autocast and for 16-bit x, because :math:`\log\det` is that of the W that was used.

    Args:
        channels: C.
        decomposition: "plu": L unit lower triangular, U strictly upper, s free, P and the signs fixed, so W stays
            invertible and the determinant costs nothing. "none": W itself is the parameter.

    Attributes:
        weight: (C, C), for "none". lower, upper: (C, C), of which the strict triangles count, and log_diagonal: (C,),
        for "plu", with the buffers sign, sigma: (C,), and permutation, P: (C, C).

    Shape:
        x, z: (B, C, ...) with any trailing dimensions, or none, in any memory format; z has x's dtype. log_det: (B,).

    Raises:
        ValueError: an unknown decomposition, or x without C channels. RuntimeError: `inverse` of a singular W.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> layer = nn.InvertibleConv1x1(3)
        >>> x = torch.randn(5, 3, 4, 4)
        >>> z, log_det = layer(x)
        >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-5)
        True

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, section 3.2.
    """

    sign: Tensor
    permutation: Tensor

    def __init__(self, channels: int, *, decomposition: str = "plu") -> None:
        super().__init__()
        if decomposition not in DECOMPOSITIONS:
            raise ValueError(
                f"InvertibleConv1x1: decomposition must be one of {', '.join(DECOMPOSITIONS)}, got {decomposition!r}"
            )
        if channels < 1:
            raise ValueError(f"InvertibleConv1x1: channels must be at least 1, got {channels}")
        self.channels, self.decomposition = channels, decomposition
        self._register(torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q)
        self.to(torch.get_default_dtype())

    @classmethod
    def from_matrix(cls, weight: Tensor, decomposition: str = "plu") -> "InvertibleConv1x1":
        """The layer whose W is `weight`, (C, C) and invertible, of its dtype and on its device.

        Raises:
            ValueError: weight is not a square matrix, or is singular.
        """
        if weight.dim() != 2 or weight.size(0) != weight.size(1):
            raise ValueError(f"InvertibleConv1x1: weight must be (C, C), got {tuple(weight.shape)}")
        if not torch.linalg.slogdet(weight.detach().double()).logabsdet.isfinite():
            raise ValueError("InvertibleConv1x1: weight must be invertible, got a singular or non-finite matrix")
        layer = cls(weight.size(0), decomposition=decomposition)
        layer._register(weight.detach().double())
        return layer.to(device=weight.device, dtype=weight.dtype)

    def _register(self, weight: Tensor) -> None:
        """Parameters and buffers, float64, from W."""
        if self.decomposition == "none":
            self.weight = nn.Parameter(weight.clone())
            return
        permutation, lower, upper = torch.linalg.lu(weight)
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.register_buffer("sign", upper.diagonal().sign())
        self.register_buffer("permutation", permutation)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L without its unit diagonal, and U with its diagonal, float64 (C, C)."""
        diagonal = self.sign.double() * self.log_diagonal.double().exp()
        return self.lower.double().tril(-1), self.upper.double().triu(1) + diagonal.diag()

    def matrix(self) -> Tensor:
        """W: float64 (C, C), differentiable."""
        if self.decomposition == "none":
            return self.weight.double()
        lower, upper = self._factors()
        return self.permutation.double() @ torch.addmm(upper, lower, upper)

    def inverse_matrix(self) -> Tensor:
        """W^-1: float64 (C, C), differentiable."""
        if self.decomposition == "none":
            return torch.linalg.inv(self.weight.double())
        lower, upper = self._factors()
        x = torch.linalg.solve_triangular(lower, self.permutation.double().t(), upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, x, upper=True)

    def log_abs_det(self) -> Tensor:
        """log |det W|: float64 scalar, differentiable."""
        if self.decomposition == "none":
            return torch.linalg.slogdet(self.weight.double()).logabsdet
        return self.log_diagonal.double().sum()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_channels("InvertibleConv1x1", x, self.channels)
        return _mix(x, self.matrix()), _per_pixel(x, self.log_abs_det())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_channels("InvertibleConv1x1", z, self.channels)
        return _mix(z, self.inverse_matrix()), _per_pixel(z, -self.log_abs_det())

    def extra_repr(self) -> str:
        return f"{self.channels}, decomposition={self.decomposition!r}"


class ActNormConv1x1(Transform):
    r"""`ActNorm` followed by `InvertibleConv1x1`, as one matrix product instead of three passes over x.

    .. math::
        z = W \left((x + b)\, e^{s}\right) = A x + A b, \quad A = W \mathrm{diag}(e^{s}), \qquad
        \log\det = \mathrm{pixels} \cdot \left(\log |\det W| + \textstyle\sum_c s_c\right)

    Args:
        channels: C.
        decomposition: as in `InvertibleConv1x1`.

    Attributes:
        actnorm, convolution: the two layers, with their parameters; the first batch in training mode sets `actnorm`.

    Shape:
        x, z: (B, C, ...). log_det: (B,).

    Raises:
        ValueError: as the two layers.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> layer, x = nn.ActNormConv1x1(3), torch.randn(5, 3, 4, 4)
        >>> z, _ = layer(x)
        >>> apart, _ = nn.Sequential(layer.actnorm, layer.convolution)(x)
        >>> torch.allclose(z, apart, atol=1e-5)
        True

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, section 3.
    """

    def __init__(self, channels: int, *, decomposition: str = "plu") -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.convolution = InvertibleConv1x1(channels, decomposition=decomposition)

    def _is_fused(self, x: Tensor) -> bool:
        """Channels last and vectors are one large product with BLAS; a free matrix has no factors to fold."""
        fits = self.actnorm.bias.dtype == compute_dtype(x.dtype)
        return fits and x.dim() > 2 and x.stride(1) != 1 and self.convolution.decomposition == "plu"

    def _fused(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        c = self.convolution
        parameters = (self.actnorm.bias, self.actnorm.log_scale, c.lower, c.upper, c.log_diagonal, c.sign)
        z, log_det = ops.actnorm_conv1x1(widen(x), *parameters, c.permutation, inverse=inverse)
        return z.to(x.dtype), log_det

    def _log_abs_det(self) -> Tensor:
        return self.convolution.log_abs_det() + self.actnorm.log_scale.double().sum()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_channels("ActNormConv1x1", x, self.convolution.channels)
        self.actnorm.initialize_once(x)
        if self._is_fused(x):
            return self._fused(x, inverse=False)
        weight = self.convolution.matrix() * self.actnorm.log_scale.double().exp()
        return _mix(x, weight, weight @ self.actnorm.bias.double()), _per_pixel(x, self._log_abs_det())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_channels("ActNormConv1x1", z, self.convolution.channels)
        if self._is_fused(z):
            return self._fused(z, inverse=True)
        unscale = (-self.actnorm.log_scale.double()).exp()
        weight = unscale.unsqueeze(1) * self.convolution.inverse_matrix()
        return _mix(z, weight, -self.actnorm.bias), _per_pixel(z, -self._log_abs_det())


def _check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.dim() < 2 or x.size(1) != channels:
        raise ValueError(f"{name}: x must be (B, {channels}, ...), got {tuple(x.shape)}")


def _per_pixel(x: Tensor, log_abs_det: Tensor) -> Tensor:
    """(B,): `log_abs_det` for each pixel of x: (B, C, ...)."""
    log_det = zero_log_det(x)
    return log_det + (x.shape[2:].numel() * log_abs_det).to(log_det.dtype)


def _mix(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight @ x[b, :, pixel] + bias for x: (B, C, ...), in x's dtype and memory format.

    Forward and backward took, in ms on one thread (AVX-512, torch 2.13, float32):

    ================  =============  =======  ========  ======  ======
    x                 memory         baddbmm  F.linear  conv2d  matmul
    ================  =============  =======  ========  ======  ======
    (64, 24, 16, 16)  contiguous     2.4      4.0       4.7     6.0
    (64, 24, 16, 16)  channels last  3.6      1.7       2.2     2.3
    (128, 48, 4, 4)   contiguous     1.0      1.0       1.4     1.2
    (128, 48, 4, 4)   channels last  2.0      0.9       1.6     1.3
    ================  =============  =======  ========  ======  ======
    """
    wide = widen(x)
    weight = weight.to(wide.dtype)
    bias = None if bias is None else bias.to(wide.dtype)
    with _without_autocast(x.device.type):
        if x.dim() == 2 or x.stride(1) == 1:
            z = F.linear(wide.movedim(1, -1), weight, bias).movedim(-1, 1)
        else:
            flat = wide.flatten(2)
            weights = weight.expand(x.size(0), -1, -1)
            z = torch.bmm(weights, flat) if bias is None else torch.baddbmm(bias.unsqueeze(1), weights, flat)
            z = z.view(x.shape)
    return z.to(x.dtype)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Autocast would multiply in 16 bits, and the inverse would not invert."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
