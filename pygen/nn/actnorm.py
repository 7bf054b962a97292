"""ActNorm: a shift and a scale per channel, set by the first batch. convolution.py folds it into the convolution."""

from typing import Any

import torch
from torch import Tensor, distributed, nn

from pygen.nn.transform import Transform, zero_log_det
from pygen.reference._dtypes import compute_dtype, widen

# A channel that varies less counts as constant: a scale of 1e6 would blow up the first sample that differs.
_SMALLEST_STD = 1e-6


class ActNorm(Transform):
    r"""A shift and a scale per channel, such that the first batch leaves with mean 0 and variance 1.

    .. math::
        z = (x + b)\, e^{s}, \qquad \log\det = \mathrm{pixels} \cdot \textstyle\sum_c s_c

    b and s are ordinary parameters. The first `forward` in training mode sets them from its batch, :math:`b = -\mu`,
    :math:`s = -\log \sigma`, and sets the buffer `initialized`, which is saved with the model: a layer that was trained
    and loaded never does it again. A channel that is constant in that batch, or a batch of one vector, is centred and
    keeps the scale 1. In several processes the batch is the whole of them, so that all start equal; every process has
    to take part in the first forward. In eval mode, and in `inverse`, the layer applies the b and s it has: before the
    first batch, the identity.

    Args:
        features: size of `dim`.
        dim: the dimension of features or channels.

    Attributes:
        bias, log_scale: b and s, (features,). initialized: bool scalar buffer.

    Shape:
        x, z: (B, ..., features, ...), floating point; z has x's dtype. log_det: (B,), float32 at least.

    Raises:
        ValueError: x does not have `features` along `dim`, or the first batch is not finite.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> z, log_det = nn.ActNorm(2)(torch.tensor([[1.0, 10.0], [3.0, 12.0]]))
        >>> z.detach()
        tensor([[-1., -1.],
                [ 1.,  1.]])

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, section 3.1.
    """

    initialized: Tensor

    def __init__(self, features: int, *, dim: int = 1) -> None:
        super().__init__()
        if features < 1 or dim == 0:
            raise ValueError(f"ActNorm: features must be at least 1 and dim not the batch's, got {features} and {dim}")
        self.features, self.dim = features, dim
        self.bias = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))
        # Mirrors the buffer: reading one on a GPU waits for the GPU. False only means that the buffer must be read.
        self._known_initialized = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.initialize_once(x)
        z = (widen(x) + self._per_channel(x, self.bias)) * self._per_channel(x, self.log_scale).exp()
        return z.to(x.dtype), self._log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z)
        x = widen(z) * (-self._per_channel(z, self.log_scale)).exp() - self._per_channel(z, self.bias)
        return x.to(z.dtype), -self._log_det(z)

    def initialize_once(self, x: Tensor) -> None:
        """Set b and s from x if this is the first batch in training mode; what `forward` does first."""
        self._check(x)
        if self.training and not self._known_initialized:
            self._initialize(x)

    @torch.compiler.disable  # reads a tensor's value and writes parameters: once, and outside of any graph
    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if not self.initialized:
            moments = _moments(x.movedim(self.dim, 0).flatten(1).double())
            if moments is None:
                return  # an empty batch says nothing; the next one will
            mean, std = moments
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise ValueError("ActNorm: the first batch sets shift and scale, so it must be finite; got NaN or inf")
            # Up to the rounding of x's own type, a constant channel of size |mean| has this spread.
            rounding = torch.finfo(x.dtype).eps * mean.abs()
            varies = (std > _SMALLEST_STD) & (std > rounding)
            self.bias.copy_(-mean)
            self.log_scale.copy_(torch.where(varies, -std.log(), 0.0))
            self.initialized.fill_(True)
        self._known_initialized = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initialized = not self.initialized.is_meta and bool(self.initialized)

    def _check(self, x: Tensor) -> None:
        if not -x.dim() <= self.dim < x.dim() or x.size(self.dim) != self.features:
            raise ValueError(f"ActNorm: x must have {self.features} features along {self.dim}, got {tuple(x.shape)}")

    def _per_channel(self, x: Tensor, parameter: Tensor) -> Tensor:
        """(features,) in the shape that broadcasts along `dim` of x, in the type that x is computed in."""
        shape = [1] * x.dim()
        shape[self.dim] = self.features
        return parameter.to(compute_dtype(x.dtype)).view(shape)

    def _log_det(self, x: Tensor) -> Tensor:
        pixels = x.shape[1:].numel() // self.features
        log_det = zero_log_det(x)
        return log_det + pixels * self.log_scale.to(log_det.dtype).sum()

    def extra_repr(self) -> str:
        return f"{self.features}, dim={self.dim}"


def _moments(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """x: (C, N) -> mean and standard deviation (C,) over the N of all processes; None when there are none."""
    count = _over_processes(torch.tensor(float(x.size(1)), dtype=x.dtype, device=x.device))
    if count == 0:
        return None
    mean = _over_processes(x.sum(1)) / count
    # In two passes: mean(x^2) - mean^2 cancels where the mean is large.
    variance = _over_processes((x - mean.unsqueeze(1)).square().sum(1)) / count
    return mean, variance.sqrt()


def _over_processes(sums: Tensor) -> Tensor:
    """The sum over all processes."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums
