"""What converted flows are made of besides pygen.nn's layers, and what the converters share; see convert.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn.actnorm import ActNorm
from pygen.nn.convolution import InvertibleConv1x1
from pygen.nn.coupling import AdditiveCoupling, AffineCoupling, _Coupling
from pygen.nn.spline_coupling import RationalQuadraticCoupling
from pygen.nn.transform import Transform


class OfFeatures(_Coupling):
    """Splits x into any features or channels and the others, where `AffineCoupling` and its kind split in halves.

    The peers' masks are per feature: the conditioner sees the other features alone, not all of x with zeros.
    """

    active_features: Tensor
    passive_features: Tensor
    order: Tensor

    def __init__(self, conditioner: nn.Module, active: Tensor, features: int, **options: Any) -> None:
        super().__init__(conditioner, **options)
        is_active = torch.zeros(features, dtype=torch.bool)
        is_active[active] = True
        passive = (~is_active).nonzero().squeeze(1)
        self.features = features
        self.register_buffer("active_features", active)
        self.register_buffer("passive_features", passive)
        self.register_buffer("order", torch.cat((passive, active)).argsort())

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() < 2 or x.size(self.dim) != self.features:
            raise ValueError(
                f"{type(self).__name__}: x must have {self.features} features along {self.dim}, got {tuple(x.shape)}"
            )
        return x.index_select(self.dim, self.passive_features), x.index_select(self.dim, self.active_features)

    def _merge(self, passive: Tensor, active: Tensor) -> Tensor:
        return torch.cat((passive, active), self.dim).index_select(self.dim, self.order)

    def _apply_coupling(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        # AffineCoupling has a way of its own for halves.
        return _Coupling._apply_coupling(self, x, context, inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.active_features.numel()} of {self.features} features"


class AffineOfFeatures(OfFeatures, AffineCoupling):
    """`AffineCoupling` that transforms the features `active`."""


class AdditiveOfFeatures(OfFeatures, AdditiveCoupling):
    """`AdditiveCoupling` that transforms the features `active`."""


class SplineOfFeatures(OfFeatures, RationalQuadraticCoupling):
    """`RationalQuadraticCoupling` that transforms the features `active`."""


def constant_affine(log_scale: Tensor, shift: Tensor, initialized: bool = True) -> ActNorm:
    """z = x e^{log_scale} + shift, per channel."""
    layer = ActNorm(log_scale.numel()).to(log_scale)
    log_scale, shift = log_scale.detach().flatten(), shift.detach().flatten()
    layer.load_state_dict(
        {"bias": shift * (-log_scale).exp(), "log_scale": log_scale, "initialized": torch.tensor(initialized)}
    )
    return layer


def linear(weight: Tensor, bias: Tensor | None = None) -> list[Transform]:
    """z = W x + bias."""
    layers: list[Transform] = [InvertibleConv1x1.from_matrix(weight.detach())]
    if bias is not None:
        layers.append(constant_affine(torch.zeros_like(bias), bias))
    return layers


def device_of(module: nn.Module) -> torch.device:
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def unknown(converter: str, what: object, known: Mapping[str, object]) -> TypeError:
    name = f"{type(what).__module__}.{type(what).__qualname__}"
    return TypeError(f"{converter}: cannot convert a {name}; it converts {', '.join(sorted(known))}")


def is_from(package: str, what: object) -> bool:
    """The class itself, not a subclass that may compute something else; copies inside other packages count."""
    return package in type(what).__module__.split(".")
