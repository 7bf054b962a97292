"""Glow on images: squeeze, steps of ActNorm, 1x1 convolution and coupling, and a split, at every scale."""

from collections.abc import Sequence
from typing import Any

from pygen.models.flow import Flow, arguments
from pygen.models.scales import image_conditioner, image_shape, multiscale
from pygen.models.stacks import check_choice
from pygen.nn import GlowStep, Squeeze
from pygen.nn.transform import Transform

OUTPUTS = {"affine": 2, "additive": 1}  # what the conditioner returns for each transformed element


class Glow(Flow):
    r"""Glow: at each of `scales` scales, a squeeze and `steps` steps; after it, half of the channels leave.

    A step is ActNorm, an invertible 1x1 convolution and a coupling of the two halves of the channels,

    .. math::
        h = W\,(x + b) \odot e^{s}, \qquad z_a = (h_a + t(h_p)) \odot \sigma(a(h_p) + 2) .

    What leaves is kept in z, so `inverse` recovers x. ActNorm takes its first values from the first training batch.

    Args:
        shape: of one image: (H, W) or (C, H, W), H and W divisible by 2 ** scales.
        levels: how many values the integers have (not Glow's L, which is `scales`), as in `Flow`.
        scales: how many scales, L in the paper. 28 x 28 images have room for 2, 32 x 32 for 3 and more.
        steps: steps at every scale, K in the paper.
        hidden: channels of each conditioner's residual blocks (`nn.ConvNet`), one number for each block, all equal.
        coupling: "affine" or "additive".
        learn_prior: the channels that leave are standardised by a mean and a scale that a convolution learns from those
            that stay.
        logit: how integers become real: True as in `RealNVP`, False scaled to [0, 1].
        alpha: as in `Logit`.
        dropout, activation: of the conditioners, as in `nn.ConvNet`.
        context_features: F of the context (B, F) for a conditional density; 0 for none.
        reversible: train with memory that does not grow with `steps` (`nn.ReversibleSequential`).

    Raises:
        ValueError: not an image, sides that cannot be halved so often, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.Glow((1, 8, 8), levels=17, steps=2, hidden=(8,)).eval()
        >>> x = torch.randint(0, 17, (5, 1, 8, 8))
        >>> z, log_det = model(x)
        >>> torch.equal(model.inverse(z)[0].floor().long(), x), model.log_prob(x).shape, model.sample(3).shape
        (True, torch.Size([5]), torch.Size([3, 1, 8, 8]))

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018.
    """

    name = "glow"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        scales: int = 2,
        steps: int = 8,
        hidden: Sequence[int] = (64,),
        coupling: str = "affine",
        learn_prior: bool = True,
        logit: bool = True,
        alpha: float = 0.05,
        dropout: float = 0.0,
        activation: str = "relu",
        context_features: int = 0,
        reversible: bool = False,
    ) -> None:
        config = arguments(locals())
        check_choice("Glow", "coupling", coupling, tuple(OUTPUTS))
        if steps < 1:
            raise ValueError(f"Glow: steps must be at least 1, got {steps}")
        image = image_shape("Glow", shape, scales, squeezes=scales)
        network: dict[str, Any] = {"context_features": context_features, "dropout": dropout, "activation": activation}

        def level(at: tuple[int, ...], last: bool) -> list[Transform]:
            channels = 4 * at[0]
            half = channels // 2
            return [
                Squeeze(),
                *(
                    GlowStep(
                        channels,
                        image_conditioner("Glow", half, OUTPUTS[coupling] * half, hidden, **network),
                        coupling=coupling,
                    )
                    for _ in range(steps)
                ),
            ]

        super().__init__(
            multiscale(
                shape,
                image,
                scales,
                level,
                reversible=reversible,
                prior=learn_prior,
                context_features=context_features,
            ),
            shape,
            levels=levels,
            logit=logit,
            alpha=alpha,
            config=config,
        )
