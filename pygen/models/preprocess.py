"""From integers to real numbers and back: what every flow model does to discrete data before its first layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pygen.nn.transform import Transform, zero_log_det


def dequantize(x: Tensor, *, generator: torch.Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    r"""Uniform dequantisation: :math:`v = x + u` with :math:`u \sim U[0, 1)` for every element.

    With a density p of v, :math:`\log P(x) = \log \int_0^1 p(x + u)\, du \ge E_u \log p(x + u)`: the mean log-density
    of dequantised data is a lower bound of the log-likelihood of the integers. It stays on the integers' scale (a level
    is 1 wide), so it is comparable between models, whatever they do to v afterwards.

    Args:
        x: integers, any shape.
        generator: source of u; torch's global one by default.
        dtype: floating type of the result; torch's default by default.

    Returns:
        v, x's shape, with floor(v) = x.

    Raises:
        TypeError: x is not an integer (or bool) tensor.

    Example:
        >>> import torch
        >>> from pygen.models import dequantize
        >>> x = torch.tensor([0, 3, 16])
        >>> torch.equal(dequantize(x).floor().long(), x)
        True

    Source: Theis, van den Oord, Bethge, "A note on the evaluation of generative models", ICLR 2016, section 3.1.
    """
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"dequantize: x must be integer, got {x.dtype}")
    dtype = dtype or torch.get_default_dtype()
    x = x.to(dtype)
    v = x + torch.rand(x.shape, dtype=dtype, device=x.device, generator=generator)
    # x + u can round up to x + 1, the next level (about once in a million for x = 16 in float32).
    return torch.where(v < x + 1, v, x)


class Logit(Transform):
    r"""Bounded data onto the real line, :math:`z = \mathrm{logit}(\alpha + (1 - 2 \alpha)\, v / L)` for v in [0, L].

    .. math::
        \log\det = \sum \log\frac{1 - 2\alpha}{L} - \log y - \log(1 - y), \qquad y = \alpha + (1 - 2\alpha)\, v / L

    Args:
        levels: L, how many values the integers have.
        alpha: how far y stays from 0 and 1, in (0, 0.5).

    Raises:
        ValueError: levels < 1, or alpha outside (0, 0.5).

    Example:
        >>> import torch
        >>> from pygen.models import Logit
        >>> Logit(256)(torch.tensor([[128.0]]))
        (tensor([[0.]]), tensor([-4.2642]))

    Source: Dinh et al., "Density estimation using Real NVP", ICLR 2017, section 4.1.
    """

    def __init__(self, levels: int, alpha: float = 0.05) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"Logit: levels must be at least 1, got {levels}")
        if not 0 < alpha < 0.5:
            raise ValueError(f"Logit: alpha must be between 0 and 0.5, got {alpha}")
        self.levels, self.alpha = levels, alpha

    @property
    def _slope(self) -> float:
        return (1 - 2 * self.alpha) / self.levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.alpha + self._slope * x
        log_y, log_rest = y.log(), torch.log1p(-y)
        log_det = (math.log(self._slope) - log_y - log_rest).flatten(1).sum(1)
        return log_y - log_rest, zero_log_det(x) + log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = (F.logsigmoid(z) + F.logsigmoid(-z) - math.log(self._slope)).flatten(1).sum(1)
        return (z.sigmoid() - self.alpha) / self._slope, zero_log_det(z) + log_det

    def extra_repr(self) -> str:
        return f"levels={self.levels}, alpha={self.alpha}"


class Scale(Transform):
    r"""Bounded data to the unit interval, :math:`z = v / L`; the log-determinant is -ln L per element.

    Its values stay bounded, so a density over the real line leaves some of its mass outside. That is never counted: a
    bound of the integers' log-likelihood remains one, and bits per dimension compare with those after a `Logit`.

    Args:
        levels: L, how many values the integers have.

    Raises:
        ValueError: levels < 1.

    Example:
        >>> import torch
        >>> from pygen.models import Scale
        >>> Scale(256)(torch.tensor([[128.0]]))
        (tensor([[0.5000]]), tensor([-5.5452]))

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, section 5.1.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"Scale: levels must be at least 1, got {levels}")
        self.levels = levels

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x / self.levels, zero_log_det(x) - math.prod(x.shape[1:]) * math.log(self.levels)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * self.levels, zero_log_det(z) + math.prod(z.shape[1:]) * math.log(self.levels)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
