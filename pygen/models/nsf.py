"""Neural spline flows by coupling, on vectors and images: rational-quadratic splines between linear layers."""

from collections.abc import Sequence
from typing import Any

from pygen.models.flow import Flow, arguments
from pygen.models.scales import image_conditioner, image_shape, multiscale
from pygen.models.stacks import ARCHITECTURES, chain, check_choice, check_size, half_conditioner
from pygen.nn import (
    ActNorm,
    ActNormConv1x1,
    InvertibleConv1x1,
    Permutation,
    RationalQuadraticCoupling,
    Reshape,
    Squeeze,
)
from pygen.nn.transform import Transform

LINEAR = ("permutation", "lu")


class NSF(Flow):
    r"""Neural spline flow: `depth` couplings that put every transformed element through a spline of its own.

    .. math::
        z_a = \mathrm{RQS}(h_a; \theta(h_p)), \qquad h = P x \;\text{or}\; W x, \qquad
        \log\det = \log|\det W| + \sum \log \mathrm{RQS}'(h_a; \theta)

    The splines act on [-B, B], the identity is outside. An `ActNorm` in front, of every number of a vector or every
    channel of an image, brings the data there, with its first values from the first training batch.

    Args:
        shape: of one sample: (D,) for vectors, (H, W) or (C, H, W) for images.
        levels, alpha, logit: integers 0 .. levels - 1 instead of real data, as in `Flow`.
        architecture: "mlp" on flattened samples; "multiscale" on images, as `Glow` with spline couplings.
        depth: number of couplings; at every scale for "multiscale".
        hidden: widths of each conditioner's hidden layers; for "multiscale" channels of its residual blocks, all equal.
        num_bins: K, bins of each spline.
        tail_bound: B.
        linear: what mixes the elements in "mlp": "permutation", a random one before every second coupling that stays
            as it is, or "lu", a learned matrix before every coupling (`nn.InvertibleConv1x1`), the paper's choice for
            tables. Pixels are better left apart. "multiscale" has 1x1 convolutions.
        scales: for "multiscale": how many; height and width are divisible by 2 ** scales.
        dropout, activation: of the conditioners, as in `nn.MLP`.
        context_features: F of the context (B, F) for a conditional density; 0 for none.
        reversible: train with memory that does not grow with depth (`nn.ReversibleSequential`).

    Raises:
        ValueError: fewer than two dimensions, a shape that the architecture does not fit, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.NSF((2,), depth=2).eval()
        >>> x = torch.randn(5, 2)
        >>> z, log_det = model(x)
        >>> torch.allclose(model.inverse(z)[0], x, atol=1e-5), model.log_prob(x).shape, model.sample(3).shape
        (True, torch.Size([5]), torch.Size([3, 2]))

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", NeurIPS 2019.
    """

    name = "nsf"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        architecture: str = "mlp",
        depth: int = 6,
        hidden: Sequence[int] = (128, 128),
        num_bins: int = 8,
        tail_bound: float = 3.0,
        linear: str = "permutation",
        scales: int = 2,
        logit: bool = True,
        alpha: float = 0.05,
        dropout: float = 0.0,
        activation: str = "relu",
        context_features: int = 0,
        reversible: bool = False,
    ) -> None:
        config = arguments(locals())
        check_choice("NSF", "architecture", architecture, ARCHITECTURES)
        check_choice("NSF", "linear", linear, LINEAR)
        size = check_size("NSF", shape, depth)
        network: dict[str, Any] = {"context_features": context_features, "dropout": dropout, "activation": activation}
        spline: dict[str, Any] = {"num_bins": num_bins, "tail_bound": tail_bound}
        outputs = RationalQuadraticCoupling.parameters_per_feature_of(num_bins)

        def flat() -> list[Transform]:
            # One scale for all pixels of a channel: a pixel that hardly varies in the first batch would get a huge one.
            grid = (1, *shape) if len(shape) == 2 else tuple(shape)
            layers: list[Transform] = [Reshape(shape, grid), ActNorm(grid[0]), Reshape(grid, (size,))]
            for i in range(depth):
                swap = i % 2 == 1
                if linear == "lu":
                    layers.append(InvertibleConv1x1(size))
                elif not swap:  # two couplings for each permutation: nothing is left out by chance
                    layers.append(Permutation.random(size))
                conditioner = half_conditioner(size, swap, outputs, hidden, **network)
                layers.append(RationalQuadraticCoupling(conditioner, swap=swap, **spline))
            return layers

        def level(at: tuple[int, ...], last: bool) -> list[Transform]:
            channels = 4 * at[0]
            half = channels // 2
            layers: list[Transform] = [Squeeze()]
            for _ in range(depth):
                conditioner = image_conditioner("NSF", half, outputs * half, hidden, **network)
                layers += [ActNormConv1x1(channels), RationalQuadraticCoupling(conditioner, **spline)]
            return layers

        if architecture == "mlp":
            transform = chain(flat(), reversible=reversible)
        else:
            image = image_shape("NSF", shape, scales, squeezes=scales)
            transform = multiscale(shape, image, scales, level, reversible=reversible)
        super().__init__(transform, shape, levels=levels, logit=logit, alpha=alpha, config=config)
