"""The networks inside coupling layers. Their last layer starts at zero, so that a flow starts near the identity."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """Fully connected conditioner, (B, in) -> (B, out).

    Args:
        in_features, out_features: sizes; an affine coupling's `out_features` is twice the transformed part.
        hidden: widths of the hidden layers.
        context_features: F of the context (B, F) that is concatenated to the input; 0 for none.
        dropout: probability, after each hidden activation.
        activation: "relu", "gelu", "silu" or "tanh".

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.MLP(3, 2, hidden=(8,), context_features=4)(torch.randn(5, 3), torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        context_features: int = 0,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.context_features = context_features
        widths = [in_features + context_features, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), _activation(activation)]
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers, _zero(nn.Linear(widths[-1], out_features)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, in), context: (B, context_features) or None -> (B, out)."""
        if self.context_features:
            x = torch.cat((x, _checked(context, self.context_features)), 1)
        return self.layers(x)


class ConvNet(nn.Module):
    """Small residual convolutional conditioner, (B, in, H, W) -> (B, out, H, W).

    Args:
        in_channels, out_channels: an affine coupling's `out_channels` is twice the transformed part's.
        hidden: channels of the residual blocks.
        blocks: how many residual blocks (3x3, 1x1).
        context_features: F of the context (B, F), added as a bias per channel; 0 for none.
        dropout: probability, per channel, inside each block.
        activation: "relu", "gelu", "silu" or "tanh".

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.ConvNet(2, 4, hidden=8)(torch.randn(5, 2, 6, 6)).shape
        torch.Size([5, 4, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = 64,
        blocks: int = 2,
        *,
        context_features: int = 0,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.context_features = context_features
        self.enter = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.context = nn.Linear(context_features, hidden) if context_features else None
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _activation(activation),
                nn.Conv2d(hidden, hidden, 3, padding=1),
                _activation(activation),
                nn.Dropout2d(dropout),
                nn.Conv2d(hidden, hidden, 1),
            )
            for _ in range(blocks)
        )
        self.leave = nn.Sequential(_activation(activation), _zero(nn.Conv2d(hidden, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, in, H, W), context: (B, context_features) or None -> (B, out, H, W)."""
        h = self.enter(x)
        if self.context is not None:
            h = h + self.context(_checked(context, self.context_features))[:, :, None, None]
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


def _checked(context: Tensor | None, features: int) -> Tensor:
    if context is None or context.dim() != 2 or context.size(1) != features:
        got = "none" if context is None else tuple(context.shape)
        raise ValueError(f"context must be (B, {features}), got {got}")
    return context
