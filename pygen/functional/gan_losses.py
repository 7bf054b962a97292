"""Losses of a generative adversarial game, from a discriminator's scores. `models.SNGAN` and any other GAN take them.

A score is a real number without bound, high for what looks like data. Each discriminator's loss takes the scores of
data and of samples, each generator's those of samples; the two numbers of scores may differ.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "GAN_LOSSES",
    "GANLoss",
    "gan_loss",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "least_squares_discriminator_loss",
    "least_squares_generator_loss",
    "non_saturating_discriminator_loss",
    "non_saturating_generator_loss",
    "wasserstein_discriminator_loss",
    "wasserstein_generator_loss",
]


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""The hinge loss :math:`E \max(0, 1 - D(x)) + E \max(0, 1 + D(G(z)))`.

    Args:
        real: D(x), any shape and floating dtype.
        fake: D(G(z)), any shape.

    Returns:
        A scalar. 2 for a discriminator that always says 0; 0 once all scores are beyond 1 and -1 on their side.

    Example:
        >>> import torch
        >>> from pygen.functional import hinge_discriminator_loss
        >>> hinge_discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0]))
        tensor(1.2500)

    Source: Lim, Ye, "Geometric GAN", 2017; Miyato et al., "Spectral normalization for generative adversarial networks",
    ICLR 2018, equations 16 and 17.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss, :math:`-E D(G(z))`; the same as `wasserstein_generator_loss`.

    Args:
        fake: D(G(z)), any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from pygen.functional import hinge_generator_loss
        >>> hinge_generator_loss(torch.tensor([-3.0, 1.0]))
        tensor(1.)

    Source: as `hinge_discriminator_loss`.
    """
    return -fake.mean()


def non_saturating_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""The cross-entropy of D's logits, :math:`E \ln(1 + e^{-D(x)}) + E \ln(1 + e^{D(G(z))})`.

    Args:
        real: D(x), logits of any shape.
        fake: D(G(z)), any shape.

    Returns:
        A scalar. 2 ln 2 for a discriminator that cannot tell.

    Example:
        >>> import torch
        >>> from pygen.functional import non_saturating_discriminator_loss
        >>> non_saturating_discriminator_loss(torch.zeros(4), torch.zeros(4))
        tensor(1.3863)

    Source: Goodfellow et al., "Generative adversarial nets", NIPS 2014, equation 1.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator_loss(fake: Tensor) -> Tensor:
    r""":math:`E \ln(1 + e^{-D(G(z))})`, whose gradient does not vanish where the discriminator is sure.

    Args:
        fake: D(G(z)), logits of any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from pygen.functional import non_saturating_generator_loss
        >>> non_saturating_generator_loss(torch.zeros(4))
        tensor(0.6931)

    Source: Goodfellow et al., "Generative adversarial nets", NIPS 2014, section 3.
    """
    return F.softplus(-fake).mean()


def wasserstein_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""The critic's loss :math:`E D(G(z)) - E D(x)`: minus the Wasserstein-1 distance for the best 1-Lipschitz D.

    Args:
        real: D(x), any shape.
        fake: D(G(z)), any shape.

    Returns:
        A scalar, without a lower bound: D must be kept Lipschitz by other means.

    Example:
        >>> import torch
        >>> from pygen.functional import wasserstein_discriminator_loss
        >>> wasserstein_discriminator_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0]))
        tensor(-2.2500)

    Source: Arjovsky, Chintala, Bottou, "Wasserstein generative adversarial networks", ICML 2017.
    """
    return fake.mean() - real.mean()


def wasserstein_generator_loss(fake: Tensor) -> Tensor:
    """:math:`-E D(G(z))`.

    Args:
        fake: D(G(z)), any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from pygen.functional import wasserstein_generator_loss
        >>> wasserstein_generator_loss(torch.tensor([-3.0, 1.0]))
        tensor(1.)

    Source: as `wasserstein_discriminator_loss`.
    """
    return -fake.mean()


def least_squares_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r""":math:`\tfrac12 E (D(x) - 1)^2 + \tfrac12 E D(G(z))^2`: scores of 1 for data, of 0 for samples.

    Args:
        real: D(x), any shape.
        fake: D(G(z)), any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from pygen.functional import least_squares_discriminator_loss
        >>> least_squares_discriminator_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor(1.2500)

    Source: Mao et al., "Least squares generative adversarial networks", ICCV 2017, equation 9.
    """
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def least_squares_generator_loss(fake: Tensor) -> Tensor:
    r""":math:`\tfrac12 E (D(G(z)) - 1)^2`.

    Args:
        fake: D(G(z)), any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> from pygen.functional import least_squares_generator_loss
        >>> least_squares_generator_loss(torch.tensor([1.0, 0.0]))
        tensor(0.2500)

    Source: as `least_squares_discriminator_loss`.
    """
    return 0.5 * (fake - 1).square().mean()


class GANLoss(NamedTuple):
    """`discriminator` takes the scores of data and of samples, `generator` those of samples."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


GAN_LOSSES = {
    "hinge": GANLoss(hinge_discriminator_loss, hinge_generator_loss),
    "non_saturating": GANLoss(non_saturating_discriminator_loss, non_saturating_generator_loss),
    "wasserstein": GANLoss(wasserstein_discriminator_loss, wasserstein_generator_loss),
    "least_squares": GANLoss(least_squares_discriminator_loss, least_squares_generator_loss),
}


def gan_loss(name: str) -> GANLoss:
    """The two losses of this name.

    Raises:
        ValueError: there are none.

    Example:
        >>> from pygen.functional import gan_loss, hinge_generator_loss
        >>> gan_loss("hinge").generator is hinge_generator_loss
        True
    """
    if name not in GAN_LOSSES:
        raise ValueError(f"loss must be one of {', '.join(GAN_LOSSES)}, got {name!r}")
    return GAN_LOSSES[name]
