"""NICE on vectors and small images: additive couplings over two halves and one diagonal scaling. Layers: pygen.nn."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pygen.models.flow import Flow, arguments
from pygen.models.stacks import check_size, half_conditioner, halves
from pygen.nn import AdditiveCoupling
from pygen.nn.transform import Transform, zero_log_det


class Scaling(Transform):
    r"""Diagonal scaling, :math:`z_d = x_d\, e^{s_d}`, :math:`\log\det = \sum_d s_d`; the identity at first.

    Args:
        features: D.

    Shape:
        x, z: (B, D). log_det: (B,), the same number for all samples.

    Example:
        >>> import torch
        >>> from pygen.models.nice import Scaling
        >>> Scaling(2)(torch.ones(1, 2))[0]
        tensor([[1., 1.]], grad_fn=<MulBackward0>)

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2014, section 3.3.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), zero_log_det(x) + self.log_scale.sum()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), zero_log_det(z) - self.log_scale.sum()

    def extra_repr(self) -> str:
        return f"features={self.log_scale.numel()}"


class NICE(Flow):
    r"""NICE: `depth` additive couplings that transform the two halves in turn, then a scaling of every dimension.

    .. math::
        z_a = x_a + t(x_p), \qquad z = e^{s} \odot h, \qquad \log\det = \sum_d s_d

    The volume changes by the scaling alone, by the same factor everywhere: what is left is where NICE falls behind
    `RealNVP` with as many parameters.

    Args:
        shape: of one sample: (D,) for vectors, (H, W) or (C, H, W) for images. The halves are the even and odd
            positions of a vector, and the two colours of an image's checkerboard.
        levels: integers 0 .. levels - 1 instead of real data, as in `Flow`.
        depth: number of couplings.
        hidden: widths of each conditioner's hidden layers; the paper's are 5 x 1000.
        prior: "logistic", as in the paper for all but one data set, or "normal".
        logit: how integers become real. False is the paper's, dequantised and scaled to [0, 1]; True as in `RealNVP`.
        alpha: as in `Logit`.
        dropout, activation: of the conditioners, as in `nn.MLP`.
        context_features: F of the context (B, F) for a conditional density; 0 for none.
        reversible: train with memory that does not grow with depth (`nn.ReversibleSequential`).

    Raises:
        ValueError: fewer than two dimensions, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.NICE((1, 8, 8), levels=17).eval()
        >>> x = torch.randint(0, 17, (5, 1, 8, 8))
        >>> z, log_det = model(x)
        >>> torch.equal(model.inverse(z)[0].floor().long(), x), model.log_prob(x).shape, model.sample(3).shape
        (True, torch.Size([5]), torch.Size([3, 1, 8, 8]))

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", ICLR 2015 workshop.
    """

    name = "nice"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        depth: int = 4,
        hidden: Sequence[int] = (256, 256),
        prior: str = "logistic",
        logit: bool = False,
        alpha: float = 0.05,
        dropout: float = 0.0,
        activation: str = "relu",
        context_features: int = 0,
        reversible: bool = False,
    ) -> None:
        config = arguments(locals())
        size = check_size("NICE", shape, depth)
        network: dict[str, Any] = {"context_features": context_features, "dropout": dropout, "activation": activation}

        def coupling(swap: bool) -> Transform:
            return AdditiveCoupling(half_conditioner(size, swap, 1, hidden, **network), swap=swap)

        layers = [*(coupling(swap=i % 2 == 1) for i in range(depth)), Scaling(size)]
        super().__init__(
            halves(shape, layers, reversible=reversible),
            shape,
            levels=levels,
            logit=logit,
            alpha=alpha,
            prior=prior,
            config=config,
        )
