"""Spectral normalisation of one layer or of all layers of a model. The parametrization and the model's hooks are in
_spectral_norm.py, the maths in pygen.ops.power_iteration."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pygen.nn.utils._spectral_norm import ModelHooks, SpectralNorm, register, spectral_norm_of
from pygen.nn.utils.conv_spectral_norm import ConvSpectralNorm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

Exclude = Sequence[str] | Callable[[str, nn.Module], bool]


def _rows(module: nn.Module, dim: int | None = None) -> int:
    """The dimension of a weight that counts the outputs."""
    if dim is not None:
        return dim
    return 1 if isinstance(module, TRANSPOSED) else 0


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    bound: float | None = None,
) -> nn.Module:
    r"""Divide a weight of `module` by its spectral norm, wherever it is used:

    .. math::
        W \leftarrow \frac{W}{\sigma(W)} \qquad\text{or, with a bound } c,\qquad
        W \leftarrow \frac{W}{\max(1, \sigma(W) / c)}, \qquad
        \sigma(W) = u^\top W v

    with W as a matrix: its dimension `dim` in front, the others flattened. u and v approach the singular vectors of
    :math:`\sigma` by `n_power_iterations` steps whenever the weight is used in training mode, and rest in evaluation.
    The gradient flows through sigma and takes u and v as constants. A vector is divided by its norm. A weight of zeros
    stays zeros, and u and v stay as they are.

    It stands in for ``torch.nn.utils.parametrizations.spectral_norm``: same arguments, same numbers from the same seed,
    same keys in the state_dict (``parametrizations.weight.original``, ``parametrizations.weight.0._u``, ``..._v``), so
    that checkpoints move both ways; ``torch.nn.utils.parametrize`` removes it and caches it.

    The norm is that of the matrix. A convolution's norm as a map of images is another: `conv_spectral_norm`.

    Args:
        module: the module that has the weight.
        name: its parameter (or buffer).
        n_power_iterations: steps per use in training mode. One is enough where a weight changes little between uses;
            when sigma has to be a bound, in an invertible residual block, take five or more.
        eps: smallest norm to divide by.
        dim: the dimension of the outputs; when left out 1 for transposed convolutions and 0 otherwise.
        bound: largest norm to allow. A weight of a smaller norm is left as it is.

    Returns:
        `module`.

    Raises:
        ValueError: no such tensor or one without elements, n_power_iterations, eps or bound <= 0. IndexError: dim.
        TypeError: a weight of integers or complex numbers.

    Example:
        >>> import torch
        >>> from pygen.nn.utils import spectral_norm
        >>> layer = spectral_norm(torch.nn.Linear(20, 40), n_power_iterations=50)
        >>> torch.allclose(torch.linalg.matrix_norm(layer.weight, 2), torch.tensor(1.0))
        True

    Source: Miyato, Kataoka, Koyama, Yoshida, "Spectral normalization for generative adversarial networks", ICLR 2018.
    The bound: Gouk, Frank, Pfahringer, Cree, "Regularisation of neural networks by enforcing Lipschitz continuity",
    Machine Learning 2021.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no parameter or buffer called {name!r}")
    norm = SpectralNorm(weight, n_power_iterations, _rows(module, dim), eps, bound)
    register(module, name, norm)
    return module


def spectral_norm_all(
    model: nn.Module,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    bound: float | None = None,
    name: str = "weight",
    modules: type[nn.Module] | tuple[type[nn.Module], ...] = LAYERS,
    exclude: Exclude = (),
) -> nn.Module:
    r"""`spectral_norm` on every layer of `model`, with the weights of all layers computed in one call per forward.

    The numbers and the keys of the state_dict are those of `spectral_norm` on each layer. What differs is when a weight
    is computed: for all layers, used or not, when the forward of `model` begins (and so with one step of the power
    iteration, however often a layer is used in it). They are forgotten when it ends, be it by an exception.
    Outside of it, where ``layer.weight`` is read or a part of the model is called, a layer computes its weight itself.

    A parameter that several layers share is normalised once for all of them, if their outputs are counted by the same
    dimension. Layers that have a `spectral_norm` already keep it, with its options, and are computed with the others;
    those that have torch's, or a `conv_spectral_norm`, are left alone. Copies of the model (``copy.deepcopy``,
    replicas) serve themselves. As with every parametrization, ``torch.save(model)`` is refused by torch; save
    ``model.state_dict()``.

    The gradients of all weights are computed together as well, when the last of them is known. Activation checkpointing
    inside of `model` does not go with it: what is computed again in the backward is no longer inside of its forward.

    Args:
        model: whose layers to normalise; a layer itself, if it is one.
        n_power_iterations, eps, bound: as in `spectral_norm`.
        name: the parameter of each layer.
        modules: the types of the layers. All linear, bilinear, embedding and (transposed) convolution layers when left
            out.
        exclude: names of modules, as in ``model.named_modules()``, that are left alone with all that is in them; or
            a function of the name and the module that returns True for a layer to leave alone.

    Returns:
        `model`.

    Raises:
        ValueError: no layer to normalise, an excluded name that the model does not have; and what `spectral_norm`
        raises, before anything is changed.

    Example:
        >>> import torch
        >>> from pygen.nn.utils import spectral_norm_all
        >>> critic = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> critic = spectral_norm_all(critic, exclude=["2"])
        >>> list(critic.state_dict())[:3]
        ['0.bias', '0.parametrizations.weight.original', '0.parametrizations.weight.0._u']

    Source: as `spectral_norm`.
    """
    chosen = _chosen(model, name, modules, exclude)
    if not chosen:
        raise ValueError(f"spectral_norm_all: {type(model).__name__} has no layer with a {name!r} to normalise")
    # Shared by the layers that share a parameter.
    norms: dict[tuple[int, int], SpectralNorm] = {}
    without = []
    for layer in chosen.values():
        if present := spectral_norm_of(layer, name):
            norms[id(present[1]), present[0].dim] = present[0]
        else:
            without.append(layer)
    # All are made before the first is registered, in the order in which each layer's own would be.
    planned = []
    for layer in without:
        weight, dim = getattr(layer, name), _rows(layer)
        if (shared := norms.get((id(weight), dim))) is None:
            shared = SpectralNorm(weight, n_power_iterations, dim, eps, bound)
            if name in layer._parameters:
                norms[id(weight), dim] = shared
        planned.append((layer, shared))
    for layer, norm in planned:
        register(layer, name, norm)
    hooks = ModelHooks.of(model, name)
    paths = [tuple(path.split(".")) if path else () for path in chosen]
    hooks.paths += [path for path in paths if path not in hooks.paths]
    return model


def _chosen(
    model: nn.Module, name: str, modules: type[nn.Module] | tuple[type[nn.Module], ...], exclude: Exclude
) -> dict[str, nn.Module]:
    """The layers to normalise, by their names in the model."""
    every = dict(model.named_modules())
    names = [] if callable(exclude) else [exclude] if isinstance(exclude, str) else list(exclude)
    for excluded in names:
        if excluded not in every:
            raise ValueError(f"spectral_norm_all: exclude: the model has no module called {excluded!r}")

    def is_chosen(path: str, module: nn.Module) -> bool:
        if not isinstance(module, modules) or any(f"{path}.".startswith(f"{excluded}.") for excluded in names):
            return False
        if callable(exclude) and exclude(path, module):
            return False
        if parametrize.is_parametrized(module, name):
            return spectral_norm_of(module, name) is not None or not _is_normalized(module, name)
        return isinstance(getattr(module, name, None), Tensor)

    return {path: module for path, module in every.items() if is_chosen(path, module)}


def _is_normalized(module: nn.Module, name: str) -> bool:
    """Whether some spectral normalisation, torch's or ours, is among the parametrizations of a tensor."""
    present: Any = module.parametrizations
    kinds = (SpectralNorm, ConvSpectralNorm, parametrizations._SpectralNorm)
    return any(isinstance(p, kinds) for p in present[name])
