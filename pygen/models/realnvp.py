"""RealNVP: affine couplings over two halves, fully connected for vectors, multiscale for images. Layers: pygen.nn."""

from collections.abc import Sequence
from typing import Any

from pygen.models.flow import Flow, arguments
from pygen.models.scales import image_conditioner, image_shape, multiscale
from pygen.models.stacks import ARCHITECTURES, check_choice, check_size, half_conditioner, halves
from pygen.nn import ActNorm, AffineCoupling, Squeeze, checkerboard_mask
from pygen.nn.transform import Transform

# Arguments that came later: left out of the config where they change nothing, so that runs from before resume.
_LATER = {"architecture": "mlp", "scales": 2, "logit": True, "reversible": False}


class RealNVP(Flow):
    r"""RealNVP: affine couplings that transform the two halves of a sample in turn.

    .. math::
        z_a = x_a \odot e^{\tanh a(x_p)} + t(x_p), \qquad \log\det = \sum \tanh a(x_p)

    "mlp" flattens the sample; its halves are the even and odd positions of a vector, and the two colours of an image's
    checkerboard. "multiscale" is the paper's for images: at every scale couplings of the two colours, a squeeze,
    couplings of the two halves of the channels, and then half of the channels leave; the last scale has the first kind
    alone. Its couplings follow an `ActNorm`, in place of the paper's batch normalisation, which a single sample cannot
    have.

    Args:
        shape: of one sample: (D,) for vectors, (H, W) or (C, H, W) for images.
        levels, alpha, logit: integers 0 .. levels - 1 instead of real data, as in `Flow`.
        depth: number of couplings; of each scale for "multiscale", half of either kind (6 is the paper's).
        hidden: widths of each conditioner's hidden layers; for "multiscale" channels of its residual blocks
            (`nn.ConvNet`), one number for each block, all equal.
        dropout, activation: of the conditioners, as in `nn.MLP`.
        scale_map: as in `pygen.ops.affine_coupling`; "tanh" is the paper's, bounded and hence stable.
        context_features: F of the context (B, F) for a conditional density; 0 for none.
        architecture: "mlp" or "multiscale".
        scales: for "multiscale": how many; height and width are divisible by 2 ** (scales - 1).
        reversible: train with memory that does not grow with depth (`nn.ReversibleSequential`).

    Raises:
        ValueError: fewer than two dimensions, a shape that the architecture does not fit, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.RealNVP((1, 8, 8), levels=17).eval()
        >>> x = torch.randint(0, 17, (5, 1, 8, 8))
        >>> z, log_det = model(x)
        >>> torch.equal(model.inverse(z)[0].floor().long(), x), model.log_prob(x).shape, model.sample(3).shape
        (True, torch.Size([5]), torch.Size([3, 1, 8, 8]))

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017.
    """

    name = "realnvp"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        alpha: float = 0.05,
        depth: int = 8,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        activation: str = "relu",
        scale_map: str = "tanh",
        context_features: int = 0,
        architecture: str = "mlp",
        scales: int = 2,
        logit: bool = True,
        reversible: bool = False,
    ) -> None:
        config = arguments(locals())
        check_choice("RealNVP", "architecture", architecture, ARCHITECTURES)
        size = check_size("RealNVP", shape, depth)
        network: dict[str, Any] = {
            "context_features": context_features,
            "dropout": dropout,
            "activation": activation,
        }

        def flat(swap: bool) -> Transform:
            conditioner = half_conditioner(size, swap, 2, hidden, **network)
            return AffineCoupling(conditioner, swap=swap, scale_map=scale_map)

        def on_colours(at: Sequence[int], even: bool) -> list[Transform]:
            channels, height, width = at
            conditioner = image_conditioner("RealNVP", channels, 2 * channels, hidden, **network)
            mask = checkerboard_mask(height, width, channels, even=even)
            return [ActNorm(channels), AffineCoupling(conditioner, mask=mask, scale_map=scale_map)]

        def on_channels(channels: int, swap: bool) -> list[Transform]:
            half = channels // 2
            conditioner = image_conditioner("RealNVP", half, 2 * half, hidden, **network)
            return [ActNorm(channels), AffineCoupling(conditioner, swap=swap, scale_map=scale_map)]

        def level(at: tuple[int, ...], last: bool) -> list[Transform]:
            first, second = depth - depth // 2, depth // 2
            layers = [layer for i in range(first + last) for layer in on_colours(at, even=i % 2 == 1)]
            if not last:
                layers.append(Squeeze())
                layers += [layer for i in range(second) for layer in on_channels(4 * at[0], swap=i % 2 == 1)]
            return layers

        if architecture == "mlp":
            transform = halves(shape, (flat(swap=i % 2 == 1) for i in range(depth)), reversible=reversible)
        else:
            image = image_shape("RealNVP", shape, scales, squeezes=scales - 1)
            transform = multiscale(shape, image, scales, level, reversible=reversible)
        super().__init__(
            transform,
            shape,
            levels=levels,
            alpha=alpha,
            logit=logit,
            config={name: value for name, value in config.items() if value != _LATER.get(name, ...)},
        )
