"""From nflows: each of its classes is one short function below, found by name; see convert.py."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn._converted import (
    AdditiveOfFeatures,
    AffineOfFeatures,
    SplineOfFeatures,
    constant_affine,
    device_of,
    is_from,
    linear,
    unknown,
)
from pygen.nn.multiscale import Squeeze
from pygen.nn.transform import Permutation, Sequential, Transform


class _NflowsNet(nn.Module):
    """A peer's network as a conditioner: nflows passes the context always, None where there is none."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        return self.net(x, context)


class _ShiftAndScale(_NflowsNet):
    """(shift, scale) in one tensor -> (scale, shift), both views."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale = super().forward(x, context).chunk(2, 1)
        return scale, shift


class _ScaledWidths(_NflowsNet):
    """nflows divides raw widths and heights by the root of the network's width, where it can see that."""

    divisor: Tensor

    def __init__(self, net: nn.Module, features: int, num_bins: int) -> None:
        super().__init__(net)
        hidden = getattr(net, "hidden_features", getattr(net, "hidden_channels", 1))
        like = next(net.parameters(), torch.empty(0))
        divisor = torch.ones(features, 3 * num_bins - 1, dtype=like.dtype)
        divisor[:, : 2 * num_bins] = float(hidden) ** 0.5
        self.register_buffer("divisor", divisor.flatten())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = super().forward(x, context)
        return out / self.divisor.to(out.dtype).view(-1, *(1,) * (out.dim() - 2))


class _Constant(nn.Module):
    """A conditioner that says the same to every sample."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.detach().clone())

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.theta.expand(x.size(0), *self.theta.shape)


def _nflows_affine(t: Any) -> Iterator[Transform]:
    activation = getattr(t, "scale_activation", None)  # an option of versions after 0.14
    if activation is None or activation is getattr(type(t), "DEFAULT_SCALE_ACTIVATION", None):
        scale_map = "nflows"
    elif activation is getattr(type(t), "GENERAL_SCALE_ACTIVATION", None):
        scale_map = "softplus"
    else:
        raise ValueError(
            "from_nflows: AffineCouplingTransform has a scale_activation of its own, which has no name here"
        )
    yield AffineOfFeatures(_ShiftAndScale(t.transform_net), t.transform_features, t.features, scale_map=scale_map)
    yield from _nflows_unconditional(t)


def _nflows_additive(t: Any) -> Iterator[Transform]:
    yield AdditiveOfFeatures(_NflowsNet(t.transform_net), t.transform_features, t.features)
    yield from _nflows_unconditional(t)


def _spline_options(t: Any) -> dict[str, Any]:
    if t.tails != "linear":
        raise ValueError(
            f"from_nflows: {type(t).__name__} must have tails='linear', got {t.tails!r} (whose spline acts on [0, 1])"
        )
    names = ("tails", "tail_bound", "min_bin_width", "min_bin_height", "min_derivative")
    return {"identity_init": False, **{name: getattr(t, name) for name in names}}


def _nflows_spline(t: Any) -> Iterator[Transform]:
    net = _ScaledWidths(t.transform_net, t.num_transform_features, t.num_bins)
    yield SplineOfFeatures(net, t.transform_features, t.features, num_bins=t.num_bins, **_spline_options(t))
    yield from _nflows_unconditional(t)


def _nflows_unconditional(t: Any) -> Iterator[Transform]:
    """The spline that nflows may apply to the passive features, once they have conditioned the others."""
    cdf = t.unconditional_transform
    if cdf is None:
        return
    if type(cdf).__name__ != "PiecewiseRationalQuadraticCDF":
        raise unknown("from_nflows", cdf, {"PiecewiseRationalQuadraticCDF": None})
    raw = torch.cat((cdf.unnormalized_widths, cdf.unnormalized_heights, cdf.unnormalized_derivatives), -1)
    theta = raw.movedim(-1, 1).flatten(0, 1)  # (features, ..., P) -> (features P, ...)
    num_bins = cdf.unnormalized_widths.size(-1)
    yield SplineOfFeatures(_Constant(theta), t.identity_features, t.features, num_bins=num_bins, **_spline_options(cdf))


def _nflows_actnorm(t: Any) -> Iterator[Transform]:
    yield constant_affine(t.log_scale, t.shift, bool(t.initialized))


def _nflows_batchnorm(t: Any) -> Iterator[Transform]:
    """As in eval mode; it becomes two parameters per feature."""
    log_scale = t.weight.log() - 0.5 * (t.running_var + t.eps).log()
    yield constant_affine(log_scale, t.bias - t.running_mean * log_scale.exp())


def _nflows_linear(t: Any) -> Iterator[Transform]:
    yield from linear(t.weight(), t.bias)


def _nflows_convolution(t: Any) -> Iterator[Transform]:
    weight = torch.empty_like(t.weight())
    weight[:, t.permutation._permutation] = t.weight()
    yield from linear(weight, t.bias)


def _nflows_permutation(t: Any) -> Iterator[Transform]:
    yield Permutation(t._permutation, t._dim)


def _nflows_composite(t: Any) -> Iterator[Transform]:
    for part in t._transforms:
        yield from _nflows_layers(part)


_NFLOWS: dict[str, Callable[[Any], Iterator[Transform]]] = {
    "ActNorm": _nflows_actnorm,
    "AdditiveCouplingTransform": _nflows_additive,
    "AffineCouplingTransform": _nflows_affine,
    "BatchNorm": _nflows_batchnorm,
    "CompositeTransform": _nflows_composite,
    "LULinear": _nflows_linear,
    "NaiveLinear": _nflows_linear,
    "OneByOneConvolution": _nflows_convolution,
    "Permutation": _nflows_permutation,
    "PiecewiseRationalQuadraticCouplingTransform": _nflows_spline,
    "QRLinear": _nflows_linear,
    "RandomPermutation": _nflows_permutation,
    "ReversePermutation": _nflows_permutation,
    "SVDLinear": _nflows_linear,
    "SqueezeTransform": lambda t: iter((Squeeze(t.factor),)),
}


def _nflows_layers(t: Any) -> Iterator[Transform]:
    if type(t).__name__ not in _NFLOWS or not is_from("nflows", t):
        raise unknown("from_nflows", t, _NFLOWS)
    yield from _NFLOWS[type(t).__name__](t)


@torch.no_grad()
def from_nflows(transform: nn.Module) -> Sequential:
    r"""A transform of nflows as a flow of pygen, with the same z and the same log-determinant.

    ===============================================================  ==================================================
    nflows                                                           here
    ===============================================================  ==================================================
    AffineCouplingTransform, AdditiveCouplingTransform,              the coupling of this package, of the same features,
    PiecewiseRationalQuadraticCouplingTransform (tails="linear")     with the network as it is
    ... with an unconditional transform                              and a spline coupling with a constant conditioner
    Permutation, RandomPermutation, ReversePermutation               `Permutation`
    ActNorm, BatchNorm (in eval mode)                                `ActNorm`
    LULinear, QRLinear, SVDLinear, NaiveLinear, OneByOneConvolution  `InvertibleConv1x1` and an `ActNorm` for the bias
    SqueezeTransform                                                 `Squeeze`
    CompositeTransform                                               its parts, one after the other
    ===============================================================  ==================================================

    Networks are copied as modules, not rebuilt: whatever they do (dropout, batch norm, context), they go on doing; the
    forward needs the package that defines them. All parameters can be trained further. `Flow._transform` is what to
    pass for an nflows `Flow`; with a StandardNormal base, log_prob(x) is the normal's log_prob(z) + log_det.

    Args:
        transform: an nflows transform of the classes above (not of subclasses, which may compute something else).

    Returns:
        A `Sequential`; `ReversibleSequential(*flow)` trains it in the memory of one layer.

    Raises:
        TypeError: a transform that is not in the table. ValueError: an option without a counterpart.

    Example:
        >>> from nflows import transforms  # doctest: +SKIP
        >>> flow = convert.from_nflows(transforms.ReversePermutation(4))  # doctest: +SKIP

    Source: nflows 0.14, https://github.com/bayesiains/nflows
    """
    return Sequential(*_nflows_layers(copy.deepcopy(transform).cpu())).to(device_of(transform))
