"""What Glow adds to the coupling layer: its step of flow, and the learned prior of what a scale leaves behind."""

import torch
from torch import Tensor, nn

from pygen.nn.convolution import ActNormConv1x1
from pygen.nn.coupling import AdditiveCoupling, AffineCoupling
from pygen.nn.transform import Sequential, Transform

COUPLINGS = ("affine", "additive")


class GlowStep(Sequential):
    r"""One step of Glow: ActNorm and invertible 1x1 convolution, in one matrix product, then a coupling layer.

    The first half of the channels (the larger, when odd) conditions, the second is transformed. The defaults are
    openai/glow's coupling, :math:`z_2 = (x_2 + t)\, \mathrm{sigmoid}(a + 2)`.

    Args:
        channels: C.
        conditioner: from the first half (and context) to (a, t), as in `AffineCoupling`, or to t for "additive".
        coupling: "affine" or "additive".
        scale_map, shift_first: as in `AffineCoupling`; "additive" ignores them.
        decomposition: as in `InvertibleConv1x1`.

    Shape:
        x, z: (B, C, ...). log_det: (B,).

    Raises:
        ValueError: an unknown coupling, scale_map or decomposition, or a shape that does not fit.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> step = nn.GlowStep(4, nn.ConvNet(2, 4, hidden=8))
        >>> z, log_det = step(torch.randn(5, 4, 6, 6))
        >>> z.shape, log_det.shape
        (torch.Size([5, 4, 6, 6]), torch.Size([5]))

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, table 1.
    """

    def __init__(
        self,
        channels: int,
        conditioner: nn.Module,
        *,
        coupling: str = "affine",
        scale_map: str = "sigmoid",
        shift_first: bool = True,
        decomposition: str = "plu",
    ) -> None:
        if coupling not in COUPLINGS:
            raise ValueError(f"GlowStep: coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
        layer: Transform
        if coupling == "affine":
            layer = AffineCoupling(conditioner, scale_map=scale_map, shift_first=shift_first)
        else:
            layer = AdditiveCoupling(conditioner)
        super().__init__(ActNormConv1x1(channels, decomposition=decomposition), layer)


class ConvPrior(nn.Module):
    r"""The learned prior of the channels that `Multiscale` factors out: mean and log_scale from those it keeps.

    .. math::
        (\mu, \log \sigma) = \mathrm{conv}_{3 \times 3}(h) + V c, \qquad z_2 \sim N(\mu, \sigma^2)

    All weights start at zero, so the prior starts as the standard normal one.

    Args:
        in_channels: of h, the kept channels.
        channels: of the factored ones; `in_channels` by default.
        context_features: F of the context (B, F); 0 for none.

    Shape:
        h: (B, in_channels, H, W) -> (B, 2 channels, H, W), the first half mean, the second log_scale.

    Raises:
        ValueError: a context that is not (B, F).

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.ConvPrior(6)(torch.randn(2, 6, 4, 4)).shape
        torch.Size([2, 12, 4, 4])

    Source: openai/glow, `split2d_prior`.
    """

    def __init__(self, in_channels: int, channels: int | None = None, *, context_features: int = 0) -> None:
        super().__init__()
        self.context_features = context_features
        out = 2 * (in_channels if channels is None else channels)
        self.convolution = nn.Conv2d(in_channels, out, 3, padding=1)
        self.context = nn.Linear(context_features, out, bias=False) if context_features else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.convolution(x)
        if self.context is None:
            return h
        if context is None or context.dim() != 2 or context.size(1) != self.context_features:
            got = "none" if context is None else tuple(context.shape)
            raise ValueError(f"ConvPrior: context must be (B, {self.context_features}), got {got}")
        return h + self.context(context)[:, :, None, None]
