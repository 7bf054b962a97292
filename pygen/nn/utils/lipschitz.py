"""An upper bound of a network's Lipschitz constant that holds: the product of the bounds of its layers, which are in
_lipschitz_layers.py."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pygen.nn.conditioners import MLP, ConvNet
from pygen.nn.convolution import ActNormConv1x1
from pygen.nn.invertible_residual import InvertibleResidual
from pygen.nn.reversible import ReversibleSequential
from pygen.nn.transform import Sequential
from pygen.nn.utils._lipschitz_layers import LAYERS, ROUNDING, NeedsShape, Shape, shape_after


def lipschitz_bound(model: nn.Module, input_shape: Sequence[int] | None = None) -> float:
    r"""A number that the Lipschitz constant of `model` in the 2-norm does not exceed:

    .. math::
        |f(x) - f(y)| \le L\, |x - y| \text{ for all } x, y, \qquad L = \prod_i L_i

    with :math:`L_i` a certified bound of each layer: singular values in float64 with a margin for their rounding, the
    largest slope of an activation. Each factor is exact or nearly so, but the product is not: it assumes that every
    layer stretches the very direction that the one before it has stretched most.

    - Linear: the largest singular value.
    - Convolutions, transposed or not, at the size that reaches them: the largest singular value of the whole operator
      where it is small or on a torus (circular padding); otherwise that of the same convolution on a torus with
      room for the kernel, of which it is a part, times the norm of the padding (1 for zeros).
    - Activations, pooling, padding, upsampling, dropout (in training mode, for each of its masks), batch norm in eval
      mode: known constants. A softmax has 1/2.
    - Sequential in any depth, pygen's `Sequential`, `MLP`, `ConvNet` without context, and `InvertibleResidual`,
      which has 1 + L of its branch. Of a flow layer it is the bound of z, the log-determinant aside.

    Weights under a parametrization or torch's older hooks are taken as evaluation mode has them, without a step of
    their iterations; nothing about the model changes. Those of other hooks are not seen. The bound is one of the
    function in exact arithmetic: on outputs of a network that computes in float32, differences of the size of their
    rounding can be larger.

    Args:
        model: a network of the layers above.
        input_shape: (C, H, W) or whatever one sample has, without the batch; needed where the bound of a layer depends
            on it, as a convolution's does.

    Returns:
        L, 0 where a layer maps everything to one point.

    Raises:
        TypeError: a layer for which no bound is known; named. ValueError: a layer that needs input_shape, or does not
        take what reaches it; batch norm that would use its batch's statistics; weights that are not finite.

    Example:
        >>> import torch
        >>> from pygen.nn.utils import lipschitz_bound
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0]))), net[2].weight.fill_(3.0)
        >>> round(lipschitz_bound(net), 6)  # 2 * 1 * |(3, 3)|
        8.485281

    Source: Szegedy et al., "Intriguing properties of neural networks", ICLR 2014, section 4.3; for convolutions Sedghi,
    Gupta, Long, "The singular values of convolutional layers", ICLR 2019.
    """
    shape = None if input_shape is None else tuple(int(n) for n in input_shape)
    with torch.inference_mode(False), torch.no_grad():
        return _bound(model, shape, "")[0]


def _bound(module: nn.Module, shape: Shape, path: str) -> tuple[float, Shape]:
    """L of the module, and the shape that leaves it."""
    if type(module).__name__ == "OptimizedModule":  # torch.compile's, from a module that is slow to import
        module = module._orig_mod  # type: ignore[assignment]
    kind = _known(module)
    if kind is None:
        raise _no_bound(path, module)
    if kind in _COMPOSITIONS:
        return _COMPOSITIONS[kind](module, shape, path)
    try:
        factor = LAYERS[kind](module, shape)
        after = None if shape is None else shape_after(module, kind, shape)
    except NeedsShape:
        raise ValueError(
            f"lipschitz_bound: input_shape, (C, H, W) without the batch, is needed for {_name(path)} ({kind.__name__})"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"lipschitz_bound: {_name(path)} ({kind.__name__}), input {shape}: {error}") from None
    return factor, after


def _name(path: str) -> str:
    return repr(path) if path else "the model"


def _no_bound(path: str, module: nn.Module) -> TypeError:
    kind = parametrize.type_before_parametrizations(module).__name__
    return TypeError(
        f"lipschitz_bound: no bound is known for {_name(path)} ({kind}); expected layers of a feed-forward network "
        "(Linear, convolutions, activations, pooling, ...) in Sequentials"
    )


def _known(module: nn.Module) -> type[nn.Module] | None:
    """The class in the tables below that says what the module's forward does; none if it has one of its own."""
    actual = parametrize.type_before_parametrizations(module)
    if "forward" in module.__dict__:
        return None
    for base in actual.__mro__:
        if base in LAYERS or base in _COMPOSITIONS:
            methods = ("forward", "_conv_forward")
            same = all(getattr(actual, m, None) is getattr(base, m, None) for m in methods)
            return base if same else None
    return None


def _in_turn(children: Iterable[tuple[str, Any]], shape: Shape) -> tuple[float, Shape]:
    product = 1.0
    for path, child in children:
        factor, shape = _bound(child, shape, path)
        # What follows a constant is a constant, also where a slope is infinite.
        product = product * factor * (1 + ROUNDING) if product and factor else 0.0
    return product, shape


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parts(*names: str) -> Callable[[Any, Shape, str], tuple[float, Shape]]:
    """The modules under these names, one after the other."""

    def bound(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
        return _in_turn([(_join(path, name), getattr(module, name)) for name in names], shape)

    return bound


def _sequential(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    return _in_turn([(_join(path, name), child) for name, child in module._modules.items()], shape)


def _transforms(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    return _sequential(module.transforms, shape, _join(path, "transforms"))


def _residual(branch: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    return (1 + _bound(branch, shape, path)[0]) * (1 + ROUNDING), shape


def _invertible_residual(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    return _residual(module.branch, shape, _join(path, "branch"))


def _mlp(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    if module.context_features:
        raise _no_bound(path, module)
    return _sequential(module.layers, shape, _join(path, "layers"))


def _conv_net(module: Any, shape: Shape, path: str) -> tuple[float, Shape]:
    if module.context is not None:
        raise _no_bound(path, module)
    first, shape = _bound(module.enter, shape, _join(path, "enter"))
    for i, block in enumerate(module.blocks):
        first *= _residual(block, shape, _join(path, f"blocks.{i}"))[0] * (1 + ROUNDING)
    last, shape = _bound(module.leave, shape, _join(path, "leave"))
    return first * last * (1 + ROUNDING), shape


_COMPOSITIONS: dict[type[nn.Module], Callable[[Any, Shape, str], tuple[float, Shape]]] = {
    nn.Sequential: _sequential,
    nn.DataParallel: _parts("module"),
    nn.parallel.DistributedDataParallel: _parts("module"),
    MLP: _mlp,
    ConvNet: _conv_net,
    Sequential: _transforms,
    ReversibleSequential: _transforms,
    ActNormConv1x1: _parts("actnorm", "convolution"),
    InvertibleResidual: _invertible_residual,
}
