"""What every flow model shares: density, sampling, interpolation, bits per dimension around one `nn.Transform`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pygen.models.base import base_density, standard_normal_log_prob
from pygen.models.model import Model, arguments
from pygen.models.preprocess import Logit, Scale, dequantize
from pygen.nn.transform import Transform

__all__ = ["Flow", "arguments", "standard_normal_log_prob"]


class Flow(Model):
    r"""A density by change of variables: :math:`\log p(x) = \log p_0(f(x)) + \log |\det \partial f / \partial x|`.

    A model is a subclass that builds its layers and passes them on, together with the arguments it was built from.

    Args:
        transform: f, in the density direction, from (B, *shape) to (B, *latent_shape).
        shape: of one sample.
        levels: None for real data. For integers 0 .. levels - 1: x is dequantised (`dequantize`) and mapped to the real
            line (`Logit`) or the unit interval (`Scale`) before f, and log_prob is a lower bound of the integers'
            log-likelihood. The Jacobian of either map is counted: models compare whatever they choose.
        alpha: as in `Logit`.
        logit: `Logit` (True) or `Scale` for integers.
        prior: p_0, "normal" or "logistic", with independent elements.
        latent_shape: of one z; what `transform.output_shape` says by default.
        config: the arguments that rebuild the model, of JSON types; saved with every checkpoint.

    Raises:
        ValueError: an unknown prior, or bad `levels` or `alpha`.

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
        alpha: float = 0.05,
        logit: bool = True,
        prior: str = "normal",
        latent_shape: Sequence[int] | None = None,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.transform = transform
        self.shape = tuple(shape)
        self.levels = levels
        self.preprocess: Transform | None = None
        if levels is not None:
            self.preprocess = Logit(levels, alpha) if logit else Scale(levels)
        self.prior = base_density(prior)
        self.latent_shape = transform.output_shape(self.shape) if latent_shape is None else tuple(latent_shape)
        self.config = config

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """z: (B, *latent_shape) and log_det: (B,). `generator` is the source of dequantisation noise."""
        x = self._real(x, generator)
        if self.preprocess is None:
            return self.transform(x, context)
        x, first = self.preprocess(x)
        z, log_det = self.transform(x, context)
        return z, log_det + first

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, *shape) and log_det: (B,) of the inverse. With levels, x is real, floor(x) is the integer."""
        x, log_det = self.transform.inverse(z, context)
        if self.preprocess is None:
            return x, log_det
        x, last = self.preprocess.inverse(x)
        return x, log_det + last

    def log_prob(self, x: Tensor, context: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Nats per sample, (B,). For integers: one draw of the lower bound of log P(x); its mean is the bound."""
        z, log_det = self(x, context, generator=generator)
        return self.prior.log_prob(z) + log_det

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
            temperature: factor of z, which has the prior's spread at 1; below 1, samples are closer to the mode.
            generator: source of z, on the model's device.

        Raises:
            ValueError: a negative n or temperature, or a context that does not have n rows.

        Call `eval()` before, or dropout takes part.
        """
        if n < 0:
            raise ValueError(f"sample: n must not be negative, got {n}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"sample: temperature must be a number >= 0, got {temperature}")
        if context is not None and len(context) != n:
            raise ValueError(f"sample: context must have a row for each of the {n} samples, got {tuple(context.shape)}")
        like = next(self.parameters())
        z = self.prior.sample(n, *self.latent_shape, dtype=like.dtype, device=like.device, generator=generator)
        return self._data(temperature * z, context)

    @torch.no_grad()
    def interpolate(self, x0: Tensor, x1: Tensor, n: int, context: Tensor | None = None) -> Tensor:
        r"""From x0 to x1 in n steps along the straight line between their latents, :math:`f^{-1}((1 - w) z_0 + w z_1)`.

        The first and the last step are x0 and x1 again. Integers are taken at the middle of their cell, x + 1/2,
        instead of a random place in it, so there is nothing random here.

        Args:
            x0, x1: (B, *shape), as for `log_prob`.
            n: how many steps, both ends included; at least 2.
            context: (B, F) for conditional models, the same along the way.

        Returns:
            (B, n, *shape), int64 when the model has levels.

        Raises:
            ValueError: n < 2, or x0 and x1 of different shapes.

        Example:
            >>> import torch
            >>> from pygen import models
            >>> model = models.RealNVP((3,)).eval()
            >>> model.interpolate(torch.zeros(1, 3), torch.ones(1, 3), 3)[0, 1]
            tensor([0.5000, 0.5000, 0.5000])

        Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, section 6.
        """
        if n < 2:
            raise ValueError(f"interpolate: n must be at least 2, got {n}")
        if x0.shape != x1.shape:
            raise ValueError(f"interpolate: x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
        (z0, _), (z1, _) = (self(self._middle(x), context) for x in (x0, x1))
        weights = torch.linspace(0, 1, n, dtype=z0.dtype, device=z0.device)
        z = torch.lerp(z0.unsqueeze(1), z1.unsqueeze(1), weights.view(n, *[1] * (z0.dim() - 1)))
        x = self._data(z.flatten(0, 1), None if context is None else context.repeat_interleave(n, 0))
        return x.unflatten(0, (len(x0), n))

    def _middle(self, x: Tensor) -> Tensor:
        if x.is_floating_point() or self.levels is None:
            return x
        return x.to(next(self.parameters()).dtype) + 0.5

    def _data(self, z: Tensor, context: Tensor | None) -> Tensor:
        """z as data: what `inverse` says, or the integer whose cell it lies in."""
        x, _ = self.inverse(z, context)
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
