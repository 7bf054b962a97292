"""What every flow model shares: the density, sampling and bits per dimension around one `nn.Transform`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pygen.models.preprocess import Logit, dequantize
from pygen.nn.transform import Transform


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """(B, ...) -> (B,): log N(z; 0, 1), summed over each sample."""
    z = z.flatten(1)
    return -0.5 * (z.square().sum(1) + z.size(1) * math.log(2 * math.pi))


class Flow(nn.Module):
    r"""A density by change of variables: :math:`\log p(x) = \log N(f(x); 0, 1) + \log |\det \partial f / \partial x|`.

    A model is a subclass that builds its layers and passes them on, together with the arguments it was built from.

    Args:
        transform: f, in the density direction, from (B, *shape) to (B, *latent_shape).
        shape: of one sample.
        levels: None for real data. For integers 0 .. levels - 1: x is dequantised (`dequantize`) and mapped to the real
            line (`Logit`) before f, and log_prob is a lower bound of the integers' log-likelihood.
        alpha: as in `Logit`.
        latent_shape: of one z; `shape` by default.
        config: the arguments that rebuild the model, of JSON types; saved with every checkpoint.

    Shape:
        x: (B, *shape). With levels: an integer tensor, or a floating one that is taken as already dequantised, with
        values in [0, levels]. context: (B, F) for conditional models.
    """

    name = "flow"
    loss_unit = "bits/dim"

    def __init__(
        self,
        transform: Transform,
        shape: Sequence[int],
        *,
        levels: int | None,
        alpha: float,
        latent_shape: Sequence[int] | None = None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.transform = transform
        self.shape = tuple(shape)
        self.levels = levels
        self.preprocess = Logit(levels, alpha) if levels is not None else None
        self.latent_shape = self.shape if latent_shape is None else tuple(latent_shape)
        self.config = config

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """z: (B, *latent_shape) and log_det: (B,). `generator` is the source of dequantisation noise."""
        x = self._real(x, generator)
        if self.preprocess is None:
            return self.transform(x, context)
        x, logit_log_det = self.preprocess(x)
        z, log_det = self.transform(x, context)
        return z, log_det + logit_log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, *shape) and log_det: (B,) of the inverse. With levels, x is real, floor(x) is the integer."""
        x, log_det = self.transform.inverse(z, context)
        if self.preprocess is None:
            return x, log_det
        x, logit_log_det = self.preprocess.inverse(x)
        return x, log_det + logit_log_det

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Nats per sample, (B,). For integers: one draw of the lower bound of log P(x); its mean is the bound."""
        z, log_det = self(x, context, generator=generator)
        return standard_normal_log_prob(z) + log_det

    def bits_per_dim(
        self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """-log2 p(x) / dimensions per sample, (B,). Integers are measured as such: noise costs log2(levels)."""
        return -self.log_prob(x, context, generator=generator) / (math.prod(self.shape) * math.log(2))

    def loss(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What training minimises: the mean bits per dimension, a scalar."""
        return self.bits_per_dim(x, context).mean()

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """n samples, (n, *shape); int64 in 0 .. levels - 1 when the model has levels.

        Args:
            n: how many.
            context: (n, F) for conditional models.
            temperature: standard deviation of z; below 1, samples are closer to the mode.
            generator: source of z, on the model's device.

        Call `eval()` before, or dropout takes part.
        """
        if n < 0:
            raise ValueError(f"sample: n must not be negative, got {n}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"sample: temperature must be a number >= 0, got {temperature}")
        like = next(self.parameters())
        z = torch.randn(n, *self.latent_shape, dtype=like.dtype, device=like.device, generator=generator)
        x, _ = self.inverse(temperature * z, context)
        return x if self.levels is None else x.floor().clamp(0, self.levels - 1).long()

    def _real(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape or x.dim() == 0:
            raise ValueError(
                f"{type(self).__name__}: expected x (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        if x.is_floating_point():
            return x
        if self.levels is None:
            raise TypeError(f"{type(self).__name__}: without levels, x must be floating point, got {x.dtype}")
        return dequantize(x, generator=generator, dtype=next(self.parameters()).dtype)
