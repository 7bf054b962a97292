"""From FrEIA: each of its classes is one short function below, found by name; see convert.py."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn._converted import AffineOfFeatures, constant_affine, device_of, is_from, linear, unknown
from pygen.nn.transform import Permutation, Sequential, Transform


class _FreiaNet(nn.Module):
    """A subnetwork as a conditioner: the condition is one of its channels, and it returns (scale, shift).

    With an `activation`, scale is clamp activation(scale) already.
    """

    def __init__(
        self, net: nn.Module, conditional: bool, clamp: float, activation: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        self.net, self.conditional, self.clamp, self.activation = net, conditional, clamp, activation

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.conditional:
            if context is None:
                raise ValueError("from_freia: this flow is conditional, context must be given")
            x = torch.cat((x, context), 1)
        scale, shift = self.net(x).chunk(2, 1)
        return (scale if self.activation is None else self.clamp * self.activation(scale)), shift


def _freia_glow(block: Any) -> Iterator[Transform]:
    """Two couplings: the first part by the second, then the second by the new first."""
    probe, clamp = torch.linspace(-5, 5, 11), float(block.clamp)
    by_atan = torch.equal(block.f_clamp(probe), 0.636 * torch.atan(probe))
    options: dict[str, Any] = {"scale_map": "atan", "clamp": clamp} if by_atan else {"scale_map": "exp"}
    features, first = torch.arange(block.channels), block.split_len1
    for net, active in ((block.subnet2, features[:first]), (block.subnet1, features[first:])):
        conditioner = _FreiaNet(net, block.conditional, clamp, None if by_atan else block.f_clamp)
        yield AffineOfFeatures(conditioner, active, block.channels, **options)


def _freia_actnorm(block: Any) -> Iterator[Transform]:
    yield constant_affine(block.scale, block.bias, not block.init_on_next_batch)


def _freia_convolution(block: Any) -> Iterator[Transform]:
    yield from (layer.requires_grad_(False) for layer in linear(block.M[:, :, 0, 0]))


def _freia_linear(block: Any) -> Iterator[Transform]:
    bias = block.b[0] if isinstance(block.b, Tensor) else None
    yield from (layer.requires_grad_(False) for layer in linear(block.M.t(), bias))


def _freia_sequence(network: Any) -> Iterator[Transform]:
    used = {index for index in network.conditions if index is not None}
    if len(used) > 1:
        raise ValueError(f"from_freia: the flow must use at most one condition, got conditions {sorted(used)}")
    for block in network.module_list:
        yield from _freia_layers(block)


_FREIA: dict[str, Callable[[Any], Iterator[Transform]]] = {
    "ActNorm": _freia_actnorm,
    "Fixed1x1Conv": _freia_convolution,
    "FixedLinearTransform": _freia_linear,
    "GLOWCouplingBlock": _freia_glow,
    "PermuteRandom": lambda block: iter((Permutation(block.perm.detach()),)),
    "SequenceINN": _freia_sequence,
}


def _freia_layers(block: Any) -> Iterator[Transform]:
    if type(block).__name__ not in _FREIA or not is_from("FrEIA", block):
        raise unknown("from_freia", block, _FREIA)
    yield from _FREIA[type(block).__name__](block)


@torch.no_grad()
def from_freia(network: nn.Module) -> Sequential:
    r"""A FrEIA SequenceINN, or one of its blocks, as a flow of pygen with the same z and log-determinant.

    =================================  =================================================================================
    FrEIA                              here
    =================================  =================================================================================
    GLOWCouplingBlock                  two affine couplings, one for each part; the clamp by atan is the op's own, any
                                       other one is computed by the conditioner
    PermuteRandom                      `Permutation`
    ActNorm                            `ActNorm`
    Fixed1x1Conv                       `InvertibleConv1x1`, frozen
    FixedLinearTransform               `InvertibleConv1x1` and an `ActNorm` for the bias, frozen
    SequenceINN                        its blocks, one after the other; one condition at most, passed as context
    =================================  =================================================================================

    Args:
        network: of the classes above. Subnetworks are copied as modules.

    Returns:
        A `Sequential`: `forward(x, context)` is `network(x, c=[context])`, `inverse` is `rev=True`.

    Raises:
        TypeError: a block that is not in the table. ValueError: more than one condition.

    Example:
        >>> from FrEIA import framework, modules  # doctest: +SKIP
        >>> inn = framework.SequenceINN(4)  # doctest: +SKIP
        >>> inn.append(modules.PermuteRandom)  # doctest: +SKIP
        >>> flow = convert.from_freia(inn)  # doctest: +SKIP

    Source: FrEIA 0.2, https://github.com/vislearn/FrEIA
    """
    return Sequential(*_freia_layers(copy.deepcopy(network).cpu())).to(device_of(network))
