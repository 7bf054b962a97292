"""The parametrization that divides a weight by its spectral norm, and the hooks that have a model's layers do so in one
call. On pygen.ops; registered by spectral_norm.py."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from pygen.nn.utils._bounded_weight import bounded_weight, divided
from pygen.ops._spectral_weights import copy_all, spectral_weights
from pygen.ops.power_iteration import power_iteration, power_iteration_multi

# How many steps bring random vectors near the singular ones at registration; torch's number.
INITIAL_ITERATIONS = 15

_is_compiling = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled


def _version(tensor: Tensor) -> int:
    """Changes when the tensor does; tensors of inference mode do not count, nor does a compiler."""
    return -1 if _is_compiling() or tensor.is_inference() else tensor._version


class Delivered(NamedTuple):
    """A normalised weight that a model's forward has computed for one of its layers."""

    weight: Tensor
    original: Tensor
    version: int
    model: nn.Module

    def serves(self, original: Tensor) -> bool:
        """Whether it is still the weight of `original`: with other values, or with a gradient that was not recorded,
        it is not. It should be gone then, but an interrupt from the keyboard runs no hooks."""
        if _is_compiling():
            return True
        if original is not self.original or _version(original) != self.version:
            return False
        return self.weight.requires_grad or not original.requires_grad or not _grad_enabled()


class SpectralNorm(nn.Module):
    """W -> W / sigma, or W / max(1, sigma / bound): see `pygen.nn.utils.spectral_norm`, which registers it."""

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, dim: int, eps: float, bound: float | None) -> None:
        super().__init__()
        _check(weight, n_power_iterations, dim, eps, bound)
        self.n_power_iterations = n_power_iterations
        self.dim = dim % weight.ndim
        self.eps = eps
        self.bound = bound
        # Set by the forward of a model under spectral_norm_all, for as long as it runs.
        self.delivered: Delivered | None = None
        if weight.ndim > 1:
            self._start(weight.detach())

    def _start(self, weight: Tensor) -> None:
        """u and v as torch draws them, and some steps at once."""
        rows = weight.shape[self.dim]
        u, v = (weight.new_empty(n).normal_(0, 1) for n in (rows, weight.numel() // rows))
        u, v = (F.normalize(x, dim=0, eps=self.eps) for x in (u, v))
        _, u, v = power_iteration(
            weight, u, v, n_iterations=INITIAL_ITERATIONS, eps=self.eps, dim=self.dim, u_first=True
        )
        self.register_buffer("_u", u)
        self.register_buffer("_v", v)

    def forward(self, weight: Tensor) -> Tensor:
        delivered = self.delivered
        if delivered is not None and delivered.serves(weight):
            return delivered.weight
        buffers = self._buffers  # not self._u: looking up a buffer as an attribute takes 0.5 us
        u = buffers.get("_u")
        v = buffers.get("_v")
        if u is None or v is None:
            return self._normalized_vector(weight)
        # They change in place: DistributedDataParallel and replicas know the buffers by their memory.
        n_iterations = self.n_power_iterations if self.training else 0
        if self.bound is None:
            (result,) = spectral_weights([weight], [u], [v], [self.dim], n_iterations, self.eps)
        else:
            result = bounded_weight(weight, u, v, self.dim, n_iterations, self.eps, self.bound)
        # Autocast computes in float32.
        return result if result.dtype == weight.dtype else result.to(weight.dtype)

    def deliver(self, weight: Delivered | None) -> None:
        if _is_compiling():
            self.delivered = weight
        else:
            self.__dict__["delivered"] = weight  # nn.Module's own way takes 3 us

    def _normalized_vector(self, weight: Tensor) -> Tensor:
        if self.bound is None:
            return F.normalize(weight, dim=0, eps=self.eps)
        return divided(weight, torch.linalg.vector_norm(weight) / self.bound)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Without vectors of zeros or NaN, which torch's parametrization is left with by a weight of zeros: no step of
        the power iteration would lead out of them."""
        present = {name: buffer.clone() for name, buffer in self._buffers.items() if buffer is not None}
        super()._load_from_state_dict(*args)
        for name, before in present.items():
            loaded = getattr(self, name)
            if not (loaded.is_meta or before.is_meta) and not (loaded.any() and loaded.isfinite().all()):
                loaded.copy_(before)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        bound = "" if self.bound is None else f", bound={self.bound}"
        return f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, dim={self.dim}{bound}"


def _check(weight: Tensor, n_power_iterations: int, dim: int, eps: float, bound: float | None) -> None:
    if is_lazy(weight):
        raise ValueError("spectral_norm: the weight has no shape yet; run the lazy module once, then normalise it")
    if not weight.is_floating_point():
        raise TypeError(f"spectral_norm: the weight must be of a real floating-point dtype, got {weight.dtype}")
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            f"spectral_norm: dim must be in [{-weight.ndim}, {weight.ndim - 1}] for a weight {tuple(weight.shape)}, "
            f"got {dim}"
        )
    if weight.numel() == 0:
        raise ValueError(f"spectral_norm: the weight must have elements, got the shape {tuple(weight.shape)}")
    if n_power_iterations <= 0:
        raise ValueError(f"spectral_norm: n_power_iterations must be positive, got {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"spectral_norm: eps must be positive, got {eps}")
    if bound is not None and not bound > 0:
        raise ValueError(f"spectral_norm: bound must be positive or None, got {bound}")


class _OneParametrization(parametrize.ParametrizationList):
    """torch's list without its search for a second parametrization, a fifth of the time of a small layer's weight."""

    def forward(self) -> Tensor:
        original = self._parameters.get("original")
        if original is None or len(self._modules) > 1:
            return super().forward()
        norm: Any = self._modules["0"]
        if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
            return norm(original)
        return norm.forward(original)  # past nn.Module's call, another tenth


def register(module: nn.Module, name: str, norm: SpectralNorm) -> None:
    parametrize.register_parametrization(module, name, norm)
    every: Any = module.parametrizations
    if type(every[name]) is parametrize.ParametrizationList and every[name][0] is norm:
        every[name].__class__ = _OneParametrization


def spectral_norm_of(module: nn.Module, name: str) -> tuple[SpectralNorm, Tensor] | None:
    """The parametrization of module's tensor and what it is applied to, where a SpectralNorm comes first on it."""
    lists = module._modules.get("parametrizations")
    tensors = lists._modules.get(name) if lists is not None else None
    first = tensors._modules.get("0") if tensors is not None else None
    if tensors is None or not isinstance(first, SpectralNorm):
        return None
    original = tensors._parameters.get("original")
    # A replica of DataParallel has plain tensors for parameters, and a buffer can be normalised too.
    return first, getattr(tensors, "original") if original is None else original  # noqa: B009


class ModelHooks:
    """Before a model's forward: the weights of all its layers, normalised in one call. After it: forget them.

    Layers are known by their paths only, looked up in whatever model runs: a copy or a replica of the model serves
    itself, and a layer that was replaced or is no longer parametrized is passed over.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.paths: list[tuple[str, ...]] = []

    @staticmethod
    def of(model: nn.Module, name: str) -> "ModelHooks":
        """The model's hooks for the tensors called `name`: one pair, however often it is asked for."""
        for hook in model._forward_pre_hooks.values():
            present = getattr(hook, "__self__", None)
            if isinstance(present, ModelHooks) and present.name == name:
                return present
        hooks = ModelHooks(name)
        model.register_forward_pre_hook(hooks.deliver)
        model.register_forward_hook(hooks.forget, always_call=True)
        return hooks

    def _layers(self, model: nn.Module) -> Iterator[tuple[nn.Module, SpectralNorm, Tensor]]:
        for path in self.paths:
            layer: nn.Module | None = model
            for part in path:
                layer = layer._modules.get(part) if layer is not None else None
            found = spectral_norm_of(layer, self.name) if layer is not None else None
            if layer is not None and found is not None:
                yield layer, *found

    def _cached(self, layer: nn.Module) -> bool:
        """Whether torch.nn.utils.parametrize.cached() has the layer's weight already, and will hand it out."""
        return bool(parametrize._cache_enabled) and (id(layer), self.name) in parametrize._cache

    def deliver(self, model: nn.Module, args: Any) -> None:
        groups: dict[tuple[Any, ...], list[tuple[SpectralNorm, Tensor]]] = {}
        # Tied weights share their parametrization, and are normalised once.
        seen: set[int] = set()
        for layer, norm, original in self._layers(model):
            present = norm.delivered
            if present is not None and present.model is not model and present.serves(original):
                continue  # this model is a part of another, whose forward has delivered already
            if id(norm) in seen or "_u" not in norm._buffers or self._cached(layer):
                continue
            seen.add(id(norm))
            n = norm.n_power_iterations if norm.training else 0
            key = (original.dtype, original.device, n, norm.eps, norm.bound)
            groups.setdefault(key, []).append((norm, original))
        for (_, _, n, eps, bound), members in groups.items():
            _deliver_group(model, members, n, eps, bound)

    def forget(self, model: nn.Module, args: Any, output: Any) -> None:
        for _, norm, _ in self._layers(model):
            if norm.delivered is not None and norm.delivered.model is model:
                norm.deliver(None)


def _deliver_group(
    model: nn.Module,
    members: Sequence[tuple[SpectralNorm, Tensor]],
    n_iterations: int,
    eps: float,
    bound: float | None,
) -> None:
    originals = [original for _, original in members]
    us, vs = [norm._u for norm, _ in members], [norm._v for norm, _ in members]
    dims = [norm.dim for norm, _ in members]
    if bound is None:
        weights = spectral_weights(originals, us, vs, dims, n_iterations, eps)
    else:
        weights = _bounded_weights(originals, us, vs, dims, n_iterations, eps, bound)
    for (norm, original), weight in zip(members, weights, strict=True):
        result = weight if weight.dtype == original.dtype else weight.to(original.dtype)
        norm.deliver(Delivered(result, original, _version(original), model))


def _bounded_weights(
    originals: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    dims: list[int],
    n_iterations: int,
    eps: float,
    bound: float,
) -> Sequence[Tensor]:
    by_value = originals[0].is_cpu and not (_is_compiling() or torch._C._are_functorch_transforms_active())
    sigma, new_us, new_vs, *normalized = power_iteration_multi(
        originals,
        us,
        vs,
        n_iterations=n_iterations,
        eps=eps,
        dims=dims,
        u_first=True,
        return_weights=by_value,
    )
    if n_iterations:
        copy_all(us + vs, [*new_us, *new_vs])
    if not by_value:
        scales = (sigma / bound).unbind()
        return [divided(original, scale) for original, scale in zip(originals, scales, strict=True)]
    # As in bounded_weight: the gradient of a product with a number is a third of the formula's work.
    layers = zip(originals, normalized[0], sigma.tolist(), strict=True)
    return [whole * bound if value > bound else original.clone() for original, whole, value in layers]
