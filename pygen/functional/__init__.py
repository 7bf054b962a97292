"""Losses, regularisers, penalties and smooth relatives of hard functions (`smooth`), differentiable PyTorch functions
without kernels of their own."""

from pygen.functional import smooth
from pygen.functional.gan_losses import (
    GAN_LOSSES,
    GANLoss,
    gan_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    least_squares_discriminator_loss,
    least_squares_generator_loss,
    non_saturating_discriminator_loss,
    non_saturating_generator_loss,
    wasserstein_discriminator_loss,
    wasserstein_generator_loss,
)
from pygen.functional.gradient_penalties import gradient_penalty, interpolates
from pygen.functional.regularizers import (
    SpectralPenalty,
    frobenius_bound,
    orthogonality,
    self_orthogonality,
    spectral_penalty,
)

__all__ = [
    "GANLoss",
    "GAN_LOSSES",
    "SpectralPenalty",
    "frobenius_bound",
    "gan_loss",
    "gradient_penalty",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "interpolates",
    "least_squares_discriminator_loss",
    "least_squares_generator_loss",
    "non_saturating_discriminator_loss",
    "non_saturating_generator_loss",
    "orthogonality",
    "self_orthogonality",
    "smooth",
    "spectral_penalty",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]
