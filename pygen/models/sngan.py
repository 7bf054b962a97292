"""SN-GAN: a generator against a spectrally normalised discriminator. Networks: _sngan_networks.py; training by turns:
pygen.training; losses: pygen.functional."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pygen.functional.gan_losses import gan_loss
from pygen.models import _sngan_networks as networks
from pygen.models.model import Model, arguments
from pygen.models.preprocess import dequantize
from pygen.models.scales import image_shape
from pygen.models.stacks import check_choice

if TYPE_CHECKING:
    from pygen.data import Dataset

_SAMPLES = 512  # that a batch of validation data is compared with
_BANDWIDTHS = (0.2, 0.3, 0.4)  # of the kernels, in units of the data's typical distance
_PAIRS = 2048  # of training samples whose distances are measured


class SNGAN(Model):
    r"""Two players: a generator G of images from noise, and a discriminator D that scores how real an image looks.

    .. math::
        L_D = E \max(0, 1 - D(x)) + E \max(0, 1 + D(G(z))), \qquad L_G = -E D(G(z)), \qquad z \sim N(0, I)

    Every weight of D is divided by its largest singular value, estimated by a step of power iteration in each training
    pass, of all layers in one call (`pygen.nn.utils.spectral_norm_all`). D sees data and samples as one batch: one pass
    with the same weights for both.

    There is no likelihood to compare by. In its place `loss`, which validation compares, is the squared maximum mean
    discrepancy between data and samples, :math:`E k(x, x') - 2 E k(x, y) + E k(y, y')`, times 1000, estimated without
    bias: zero, but for noise of either sign, when both have one distribution. k is the mean of Gaussian kernels of
    pixels, :math:`\exp(-|x - y|^2 / 2 (c s)^2)` with c = 0.2, 0.3 and 0.4.

    Args:
        shape: of one sample: (H, W) or (C, H, W), with sides of 4 at least. The paper's networks for 32 x 32 double the
            sides of 4 x 4 three times; others as often as leaves 4 to 7 (28 x 28: twice from 7 x 7). What cannot be
            halved so often, D pads by its edge, and G makes larger and crops.
        levels: None for real data in [-1, 1]; L for integers 0 .. L - 1, to which uniform noise is added in training.
        architecture: "cnn" (the paper's table 3) or "resnet" (tables 4 and 5).
        width: channels of D's first layer of the plain network, in which the others are measured; the paper's is 64.
        latent_dim: of z.
        loss: "hinge", "non_saturating", "wasserstein" or "least_squares"; see `pygen.functional.gan_losses`.
        n_critic: training steps of D for one of G; each has data of its own.
        spectral_norm: divide D's weights by their spectral norms.
        n_power_iterations: steps of power iteration in a training pass.
        gradient_penalty: factor of the gradient penalty in D's loss (`pygen.functional.gradient_penalty`); 0 for none.
        distance_scale: s, the typical distance of two samples in [-1, 1], as `arguments_for` measures it; by default
            that of pixels that are independent and uniform.

    Attributes:
        generator: (B, latent_dim) -> (B, C, H, W) in (-1, 1).
        discriminator: (B, C, H, W) -> scores (B,).

    Raises:
        ValueError: not an image, or an option out of its range.

    Shape:
        x: (B, *shape), integers with levels (or real numbers in [0, levels]), real numbers without.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.create("sngan", {"shape": (1, 28, 28), "levels": 256, "width": 8}).eval()
        >>> model.sample(2).shape
        torch.Size([2, 1, 28, 28])

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks", ICLR 2018.
    The distance: Gretton et al., "A kernel two-sample test", JMLR 2012, equation 3.
    """

    name = "sngan"
    loss_unit = "x 10^-3 squared kernel distance"
    metric_names = ("score_real", "score_fake", "largest_sigma")
    pictures = ("samples", "scores")
    players = ("discriminator", "generator")
    averaged = ("generator",)
    train_defaults = {"learning_rate": 2e-4, "betas": (0.5, 0.99), "weight_decay": 0.0, "batch_size": 64, "ema": 0.999}
    cannot = {
        "interpolate": "has no latents of its data to interpolate between; it draws samples only",
        "reconstruct": "has no encoder to reconstruct by; it draws samples only",
    }

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        architecture: str = "cnn",
        width: int = 64,
        latent_dim: int = 128,
        loss: str = "hinge",
        n_critic: int = 1,
        spectral_norm: bool = True,
        n_power_iterations: int = 1,
        gradient_penalty: float = 0.0,
        distance_scale: float | None = None,
    ) -> None:
        config = arguments(locals())
        _check(config)
        super().__init__()
        self.config = config
        channels, height, width_of_image = image_shape("SNGAN", shape, 1, squeezes=0)
        self._image = (channels, height, width_of_image)
        self.shape, self.levels = tuple(shape), levels
        self.losses = gan_loss(loss)
        self.n_critic, self.latent_dim, self.gradient_penalty = n_critic, latent_dim, gradient_penalty
        # Two uniform numbers of [-1, 1] differ by sqrt(2 / 3), as a root mean square.
        self.distance_scale = math.sqrt(math.prod(shape) * 2 / 3) if distance_scale is None else distance_scale
        self.generator = networks.generator(architecture, self._image, width, latent_dim)
        self.discriminator = networks.discriminator(architecture, self._image, width)
        if spectral_norm:
            from pygen.nn.utils.spectral_norm import spectral_norm_all

            spectral_norm_all(self.discriminator, n_power_iterations)

    @classmethod
    def arguments_for(cls, data: Dataset) -> dict[str, Any]:
        return super().arguments_for(data) | {"distance_scale": _typical_distance(data.train, data.levels)}

    # The game

    def turns(self, step: int) -> Sequence[str]:
        return self.players if (step + 1) % self.n_critic == 0 else self.players[:1]

    def player_loss(self, player: str, x: Tensor) -> Tensor:
        """:math:`L_D` or :math:`L_G` of a batch x (B, *shape) and as many samples, a scalar."""
        if player == "generator":
            return self.losses.generator(self.discriminator(self._images(len(x))))
        real = self._scaled(x)
        with torch.no_grad():
            fake = self._images(len(x))
        scores = self.discriminator(torch.cat((real, fake.to(real.dtype))))
        loss = self.losses.discriminator(*scores.chunk(2))
        if self.gradient_penalty:
            from pygen.functional.gradient_penalties import gradient_penalty

            loss = loss + self.gradient_penalty * gradient_penalty(self.discriminator, real, fake)
        return loss

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) -> images (B, *shape) in (-1, 1)."""
        return self.generator(z).reshape(-1, *self.shape)

    # Validation

    def loss(self, x: Tensor) -> Tensor:
        """The squared kernel distance of x (B, *shape) and as many samples, at least 512, times 1000."""
        real = self._middle(x).flatten(1).float()
        fake = self._middle(self.sample(max(len(x), _SAMPLES))).flatten(1).float()
        between = _kernels(real, fake, self.distance_scale).mean()
        return 1000 * (_among(real, self.distance_scale) - 2 * between + _among(fake, self.distance_scale))

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Tensor:
        """Sums of D(x) and of D(G(z)) for as many samples, and their number: (3,), float64."""
        real = self._middle(x).reshape(-1, *self._image)
        scores = self.discriminator(torch.cat((real, self._images(len(x)).to(real.dtype)))).double().chunk(2)
        return torch.stack((*(part.sum() for part in scores), scores[0].new_tensor(len(x))))

    def metrics(self, statistics: Tensor) -> dict[str, float]:
        """Mean scores, and the largest singular value of any weight of D as it is applied, by a full decomposition."""
        real, fake, count = statistics.tolist()
        return {"score_real": real / count, "score_fake": fake / count, "largest_sigma": max(self.sigmas())}

    @torch.no_grad()
    def sigmas(self) -> list[float]:
        """The spectral norm of each weight of D as it is applied, by a full decomposition; 1, or nearly, if normalised.

        In training mode each call is a step of the power iteration as well.
        """
        weights = [m.weight for m in self.discriminator.modules() if isinstance(m, networks.NORMALIZED)]
        return [torch.linalg.matrix_norm(weight.float().flatten(1), 2).item() for weight in weights]

    # Samples

    @torch.no_grad()
    def sample(self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """n samples, (n, *shape); int64 in 0 .. levels - 1 when the model has levels, else real in (-1, 1).

        Args:
            n: how many.
            temperature: factor of z; below 1, samples are closer to each other.
            generator: source of z, on the model's device.

        Raises:
            ValueError: a negative n or temperature.

        Call `eval()` before, or samples depend on each other through the batch's statistics.
        """
        if n < 0:
            raise ValueError(f"sample: n must not be negative, got {n}")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"sample: temperature must be a number >= 0, got {temperature}")
        images = self._images(n, temperature, generator).reshape(-1, *self.shape)
        if self.levels is None:
            return images
        return ((images.float() + 1) * (self.levels / 2)).floor().clamp(0, self.levels - 1).long()

    def _images(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        like = next(self.generator.parameters())
        z = torch.randn(n, self.latent_dim, dtype=like.dtype, device=like.device, generator=generator)
        return self.generator(temperature * z)

    def _scaled(self, x: Tensor) -> Tensor:
        """x as D gets it, (B, C, H, W): with the noise of training, because G's pixels are real and D could tell."""
        self._check_shape(x)
        if self.levels is not None and not x.is_floating_point():
            x = dequantize(x, dtype=next(self.parameters()).dtype)
        return self._to_unit(x).reshape(-1, *self._image)

    def _middle(self, x: Tensor) -> Tensor:
        """x (B, *shape) in [-1, 1], integers at the middle of their cell."""
        self._check_shape(x)
        like = next(self.parameters())
        return self._to_unit(x.to(like.dtype) + 0.5 if not x.is_floating_point() else x)

    def _to_unit(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        return x if self.levels is None else x * (2 / self.levels) - 1

    def _check_shape(self, x: Tensor) -> None:
        if x.dim() == 0 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"SNGAN: expected x (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if self.levels is None and not x.is_floating_point():
            raise TypeError(f"SNGAN: without levels, x must be floating point, got {x.dtype}")


def _kernels(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """k of every row of x (N, D) and y (M, D): (N, M)."""
    square = torch.cdist(x, y).square()
    return torch.stack([(square / (-2 * (factor * scale) ** 2)).exp() for factor in _BANDWIDTHS]).mean(0)


def _among(x: Tensor, scale: float) -> Tensor:
    """The mean of k over pairs of different rows of x (N, D); of a single row with itself."""
    n = len(x)
    if n < 2:
        return x.new_ones(())
    kernels = _kernels(x, x, scale)
    return (kernels.sum() - kernels.diagonal().sum()) / (n * (n - 1))


def _typical_distance(x: Tensor, levels: int | None) -> float:
    """The root mean square of the distances between samples of x (N, ...), scaled to [-1, 1]; 1 if all are equal."""
    x = x[:_PAIRS].flatten(1).double() * (2 / levels if levels else 1)
    # Of all pairs: twice the variance, summed over the elements.
    return math.sqrt(2 * x.var(0, unbiased=False).sum().item()) or 1.0


def discriminator_weights(width: int = 64) -> list[tuple[int, ...]]:
    """The shapes of all weights of the plain discriminator for 32 x 32 RGB images.

    With the paper's width 64: eight matrices, 11.7 MB in float32.

    Example:
        >>> import math
        >>> shapes = discriminator_weights()
        >>> len(shapes), 4 * sum(map(math.prod, shapes)) / 1e6
        (8, 11.737856)
    """
    with torch.device("meta"):
        return networks.weight_shapes(networks.discriminator("cnn", (3, 32, 32), width))


def _check(options: dict[str, Any]) -> None:
    check_choice("SNGAN", "architecture", options["architecture"], networks.ARCHITECTURES)
    gan_loss(options["loss"])
    for name in ("width", "latent_dim", "n_critic", "n_power_iterations"):
        value = options[name]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"SNGAN: {name} must be a whole number, at least 1, got {value!r}")
    if min(options["shape"], default=0) < 1 or min(options["shape"][-2:]) < networks.SMALLEST_SIDE:
        raise ValueError(
            f"SNGAN: shape must be an image's, (H, W) or (C, H, W), with sides of {networks.SMALLEST_SIDE} at least, "
            f"got {tuple(options['shape'])}"
        )
    levels = options["levels"]
    if levels is not None and levels < 1:
        raise ValueError(f"SNGAN: levels must be at least 1, got {levels}")
    if not options["gradient_penalty"] >= 0:
        raise ValueError(f"SNGAN: gradient_penalty must not be negative, got {options['gradient_penalty']}")
    if options["distance_scale"] is not None and not options["distance_scale"] > 0:
        raise ValueError(f"SNGAN: distance_scale must be positive, got {options['distance_scale']}")
