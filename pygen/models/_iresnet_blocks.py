"""The branches of invertible residual networks: layers whose spectral norms are bounded, and activations of slope at
most 1. iresnet.py stacks them; the bounds themselves are pygen.nn.utils'."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pygen.models.stacks import check_choice, check_widths
from pygen.nn.utils._spectral_norm import SpectralNorm
from pygen.nn.utils.conv_spectral_norm import ConvSpectralNorm, conv_spectral_norm
from pygen.nn.utils.spectral_norm import spectral_norm

# The steepest slope of swish, x sigmoid(x), is 1.09984.
_SWISH_SLOPE = 1.1
# Bounded layers of width w make numbers of |x| / sqrt(w): at steepness 1 they would all be in the linear part of the
# function. Eight blocks on the moons after 80 steps: 2.6 nats with tanh from 1, 2.0 from 4.5, 1.6 with the sine.
_FIRST_STEEPNESS = 5.0


class Steep(nn.Module):
    r"""An activation on a scale that is learned, which leaves its slopes, and so its Lipschitz constant, as they are.

    .. math::
        y = f(\beta x) / \beta, \qquad \beta = \mathrm{softplus}(b)

    With swish over 1.1, the LipSwish of Chen et al.

    Args:
        function: f, a key of `ACTIVATIONS`.

    Shape:
        x: any -> y: the same.

    Example:
        >>> import torch
        >>> from pygen.models._iresnet_blocks import Steep
        >>> Steep("lipswish")(torch.tensor([0.0, 100.0])).detach()
        tensor([ 0.0000, 90.9091])

    Source: Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative Modeling", NeurIPS 2019.
    """

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function
        self.raw_steepness = nn.Parameter(torch.tensor(_FIRST_STEEPNESS).expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        steepness = F.softplus(self.raw_steepness)
        return ACTIVATIONS[self.function](steepness * x) / steepness

    def extra_repr(self) -> str:
        return self.function


def _lipswish(x: Tensor) -> Tensor:
    return F.silu(x) / _SWISH_SLOPE


# All with slopes in [-1, 1] that are continuous: log_det is a function of slopes, and learns by their derivative.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": torch.sin,
    "lipswish": _lipswish,
    "elu": F.elu,
    "tanh": torch.tanh,
}


def _check(name: str, activation: str, hidden: Sequence[int], coefficient: float) -> None:
    check_choice(name, "activation", activation, tuple(ACTIVATIONS))
    check_widths(hidden)
    if not 0 < coefficient < 1:
        raise ValueError(f"{name}: coefficient must be between 0 and 1, or a block has no inverse, got {coefficient}")


def dense_branch(
    name: str, size: int, hidden: Sequence[int], *, activation: str, coefficient: float, n_power_iterations: int
) -> nn.Sequential:
    """(B, size) -> (B, size) with a Lipschitz constant of at most `coefficient`, in equal shares of its layers."""
    _check(name, activation, hidden, coefficient)
    widths = (size, *hidden, size)
    bound = coefficient ** (1 / (len(widths) - 1))
    layers: list[nn.Module] = []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        linear = nn.Linear(before, after)
        nn.init.orthogonal_(linear.weight)
        layers += [spectral_norm(linear, n_power_iterations=n_power_iterations, bound=bound), Steep(activation)]
    return nn.Sequential(*layers[:-1])


def conv_branch(
    name: str,
    shape: Sequence[int],
    hidden: Sequence[int],
    *,
    activation: str,
    coefficient: float,
    n_power_iterations: int,
) -> nn.Sequential:
    """(B, C, H, W) -> (B, C, H, W): convolutions of 3 x 3, 1 x 1 (between the hidden channels) and 3 x 3, padded by
    zeros, whose norms as operators at this H and W are bounded as `dense_branch`'s are."""
    _check(name, activation, hidden, coefficient)
    if len(hidden) < 1:
        raise ValueError(f"{name}: hidden must name the channels of at least one layer, got {tuple(hidden)}")
    channels, *sides = shape
    widths = (channels, *hidden, channels)
    bound = coefficient ** (1 / (len(widths) - 1))
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        size = 3 if i in (0, len(widths) - 2) else 1
        convolution = nn.Conv2d(before, after, size, padding=size // 2)
        bounded = conv_spectral_norm(convolution, sides, n_power_iterations=n_power_iterations, bound=bound)
        layers += [bounded, Steep(activation)]
    return nn.Sequential(*layers[:-1])


def bounded_weights(model: nn.Module) -> Iterator[tuple[SpectralNorm | ConvSpectralNorm, Tensor]]:
    """The normalisations in a model, each with the weight that it gets."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for tensor in module.parametrizations.values():  # type: ignore[union-attr, operator]
                for norm in tensor:
                    if isinstance(norm, SpectralNorm | ConvSpectralNorm):
                        yield norm, tensor.original


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Set u and v of every bounded weight to its singular vectors, so that the bounds hold and not only nearly.

    The power iteration of training follows weights that change, and an average of weights has u and v of another: the
    norm that it would be divided by is too small. The result is a function of the weights alone.
    """
    for norm, weight in bounded_weights(model):
        if isinstance(norm, ConvSpectralNorm):
            norm._converge(weight)
            continue
        matrix = weight.movedim(norm.dim, 0).flatten(1).double()
        if matrix.isfinite().all():  # of others the loss will say so
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            norm._u.copy_(u[:, 0])
            norm._v.copy_(vh[0])
