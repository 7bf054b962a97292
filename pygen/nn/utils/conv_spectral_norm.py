"""Spectral normalisation of a convolution as the operator that it is, which its reshaped kernel is not. The operator is
in _conv_operator.py; the norm of the kernel as a matrix is spectral_norm.py's."""

import contextlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pygen.nn.utils._conv_operator import (
    ConvOperator,
    dense_matrix,
    fourier_norm,
    iterate,
    normalized,
    random_vectors,
)
from pygen.nn.utils._evaluated_weight import evaluated_weight
from pygen.ops.power_iteration import power_iteration
from pygen.reference._dtypes import widen
from pygen.reference.power_iteration import divisor

METHODS = ("power", "fourier", "dense")

# Before the first use u and v are iterated until a singular value is within half of this, relatively, of sigma.
_INITIAL_TOLERANCE = 1e-4
_INITIAL_ITERATIONS = 200

# Vectors that are iterated together. Of 150 random 7x7 layers, one alone rested at a singular value below the largest
# in 2, by up to 0.5%; two never did.
_BLOCK, _INITIAL_BLOCK = 4, 2


@torch.no_grad()
def conv_operator_norm(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    method: str = "power",
    n_iterations: int = 1000,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Tensor:
    r"""The largest singular value of a convolution as a linear operator,

    .. math::
        \sigma = \max_{x \ne 0} \frac{|\mathrm{conv}(x) - b|}{|x|}

    from images (C_in, \*input_shape) to images (C_out, \*output_shape), with the module's stride, padding and its mode,
    dilation and groups, transposed or not. It is the Lipschitz constant of the layer. The norm of the kernel reshaped
    to a matrix is another number: it can be smaller or larger, by up to the root of the number of taps.

    Args:
        module: Conv1d, Conv2d, Conv3d or a transposed one, in any floating dtype; computed in float64. A parametrized
            weight is read as in evaluation mode; nothing about the module changes.
        input_shape: spatial sizes of the input, (L,), (H, W) or (D, H, W).
        method: "power", the power iteration (accelerated), for every convolution and size; its sigma approaches the
            truth from below. "fourier", exact, where the boundary is circular, padded to the input's size over the
            stride. "dense", exact, by the singular values of the whole matrix, for small sizes.
        n_iterations, tolerance: of "power". It ends when :math:`|A^\top A v - \sigma^2 v|` is at most
            `tolerance` times :math:`\sigma^2`, and warns when it does not get there in `n_iterations` steps.
        seed: of the vector from which "power" starts.

    Returns:
        sigma: float64 scalar on the weight's device, without a gradient.

    Raises:
        TypeError: module is no convolution. ValueError: an unknown method, an input_shape that does not fit, "fourier"
        for other boundaries, n_iterations < 1, tolerance <= 0 or a weight that is not finite.

    Example:
        >>> import torch
        >>> from pygen.nn.utils import conv_operator_norm
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = torch.nn.init.ones_(conv.weight)  # as a matrix its norm is 3
        >>> conv_operator_norm(conv, (8, 8))
        tensor(9.0000, dtype=torch.float64)

    Source: "power": Gouk, Frank, Pfahringer, Cree, "Regularisation of neural networks by enforcing Lipschitz
    continuity", Machine Learning 2021. "fourier": Sedghi, Gupta, Long, "The singular values of convolutional layers",
    ICLR 2019.
    """
    if method not in METHODS:
        raise ValueError(f"conv_operator_norm: method must be one of {', '.join(METHODS)}, got {method!r}")
    if n_iterations < 1 or not tolerance > 0:
        raise ValueError(
            "conv_operator_norm: n_iterations must be at least 1 and tolerance positive, got "
            f"{n_iterations} and {tolerance}"
        )
    operator = _operator("conv_operator_norm", module, input_shape)
    try:
        weight = evaluated_weight(module)
    except ValueError as error:
        raise ValueError(f"conv_operator_norm: {error}") from None
    if method == "dense":
        return torch.linalg.svdvals(dense_matrix(operator, weight))[0]
    if method == "fourier":
        if not operator.is_circulant:
            raise ValueError(
                "conv_operator_norm: 'fourier' needs padding_mode='circular' and an output of input_shape / stride, "
                f"got {module} at {operator.input_shape}; take 'power' or 'dense'"
            )
        return fourier_norm(operator, weight, operator.output_shape)
    start = random_vectors((_BLOCK, *_domain(operator)), weight, seed)
    found = iterate(operator, weight, start, n_iterations, tolerance)
    if not found.converged:
        warnings.warn(
            f"conv_operator_norm: no convergence in {found.iterations} iterations, the residual is "
            f"{found.residual:.1e} and should be {tolerance:.1e}; the norm may be larger than the result",
            stacklevel=2,
        )
    return weight.new_tensor(found.sigma)


def conv_spectral_norm(
    module: nn.Module,
    input_shape: Sequence[int],
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    bound: float | None = None,
) -> nn.Module:
    r"""Divide a convolution's weight by the norm of the convolution as an operator, wherever it is used:

    .. math::
        W \leftarrow \frac{W}{\sigma(W)} \qquad\text{or, with a bound } c,\qquad
        W \leftarrow \frac{W}{\max(1, \sigma(W) / c)}, \qquad
        \sigma(W) = \langle u, \mathrm{conv}(v; W) \rangle

    at the spatial size `input_shape`, with the module's stride, padding and its mode, dilation and groups. u and v are
    images. Registration iterates them until sigma is right (to 5e-5, mostly much closer); from then on each use in
    training mode makes `n_power_iterations` steps with the convolution and its adjoint, and evaluation none. The
    gradient flows through sigma and takes u and v as constants. A weight of zeros stays zeros.

    The power iteration approaches sigma from below: the norm of the result is 1 (or at most c) up to how far u and v
    lag behind a weight that changes. Where it has to be certain, `lipschitz_bound` gives a bound that is; an
    invertible residual block takes a bound c with room below 1 and several iterations. An image larger than
    `input_shape` meets a norm that is larger, slightly; the certain bound for it is again `lipschitz_bound`.

    The state is in the buffers ``parametrizations.weight.0._u``, (C_out, \*output_shape), and ``._v``,
    (C_in, \*input_shape), which exist from registration on. A convolution whose kernel has one tap and that has no
    padding is the same matrix at every pixel: its buffers are images of one pixel. ``layer.weight = w`` iterates
    again until sigma is right; after other changes from outside, as an initialisation of
    ``parametrizations.weight.original``, the steps of training catch up, or register last.

    Args:
        module: Conv1d, Conv2d, Conv3d or a transposed one.
        input_shape: spatial sizes of the input, (L,), (H, W) or (D, H, W).
        name: its parameter.
        n_power_iterations: steps per use in training mode.
        eps: smallest norm to divide by.
        bound: largest norm to allow. A weight of a smaller norm is left as it is.

    Returns:
        `module`.

    Raises:
        TypeError: module is no convolution, or its weight is not floating point. ValueError: no such weight, an
        input_shape that does not fit, n_power_iterations, eps or bound <= 0.

    Example:
        >>> import torch
        >>> from pygen.nn.utils import conv_operator_norm, conv_spectral_norm
        >>> conv = conv_spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1), (16, 16)).eval()
        >>> bool((conv_operator_norm(conv, (16, 16)) - 1).abs() < 1e-3)
        True

    Source: Gouk, Frank, Pfahringer, Cree, "Regularisation of neural networks by enforcing Lipschitz continuity",
    Machine Learning 2021, section 4.2; Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible residual networks",
    ICML 2019.
    """
    operator = _operator("conv_spectral_norm", module, input_shape)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"conv_spectral_norm: {type(module).__name__} has no parameter called {name!r}")
    norm = ConvSpectralNorm(operator, weight, n_power_iterations, eps, bound)
    parametrize.register_parametrization(module, name, norm)
    return module


class ConvSpectralNorm(nn.Module):
    """W -> W / sigma, or W / max(1, sigma / bound): see `conv_spectral_norm`, which registers it."""

    _u: Tensor
    _v: Tensor

    def __init__(
        self, operator: ConvOperator, weight: Tensor, n_power_iterations: int, eps: float, bound: float | None
    ) -> None:
        super().__init__()
        _check(operator, weight, n_power_iterations, eps, bound)
        self.operator = operator.at_one_pixel() if operator.is_pointwise else operator
        self.n_power_iterations, self.eps, self.bound = n_power_iterations, eps, bound
        self.register_buffer("_u", _unit(random_vectors(_range(self.operator), weight, seed=0)))
        self.register_buffer("_v", _unit(random_vectors(_domain(self.operator), weight, seed=0)))
        self._converge(weight)

    @torch.no_grad()
    def _converge(self, weight: Tensor) -> None:
        """u and v of a weight that may be far from the last one."""
        if weight.is_meta:
            return
        weight = widen(weight.detach())
        start = random_vectors((_INITIAL_BLOCK, *self._v.shape), weight, seed=0)
        found = iterate(self.operator, weight, start, _INITIAL_ITERATIONS, _INITIAL_TOLERANCE)
        self._v.copy_(found.v)
        self._u.copy_(normalized(self.operator.apply(weight, found.v[None])[0], self._u.to(weight.dtype), self.eps))

    def forward(self, weight: Tensor) -> Tensor:
        # Autocast would convolve in 16 bits, and sigma would be that of another weight.
        with _without_autocast(weight.device.type):
            sigma = self._sigma(widen(weight))
            by = divisor(sigma, self.eps) if self.bound is None else (sigma / self.bound).clamp_min(1)
            return (weight / by).to(weight.dtype)

    def _sigma(self, weight: Tensor) -> Tensor:
        if self.operator.is_pointwise and self.operator.groups == 1:
            return self._sigma_of_matrix(weight)
        # Copies: training may change the buffers before the backward of this forward.
        u, v = (x.to(weight.dtype, copy=True) for x in (self._u, self._v))
        if not self.training:
            return (u * self.operator.apply(weight, v[None])[0]).sum()
        with torch.no_grad():
            for k in range(self.n_power_iterations):
                if k > 0:
                    u = normalized(self.operator.apply(weight, v[None])[0], u, self.eps)
                v = normalized(self.operator.adjoint(weight, u[None])[0], v, self.eps)
        # The last product is sigma's own, with the gradient.
        image = self.operator.apply(weight, v[None])[0]
        u = normalized(image.detach(), u, self.eps)
        self._update(u, v)
        return (u * image).sum()

    def _sigma_of_matrix(self, weight: Tensor) -> Tensor:
        sigma, u, v = power_iteration(
            weight,
            self._u.flatten(),
            self._v.flatten(),
            n_iterations=self.n_power_iterations if self.training else 0,
            eps=self.eps,
            dim=1 if self.operator.transposed else 0,
        )
        if self.training:
            self._update(u.view_as(self._u), v.view_as(self._v))
        return sigma

    @torch.no_grad()
    def _update(self, u: Tensor, v: Tensor) -> None:
        # In place: DistributedDataParallel and replicas know the buffers by their memory.
        self._u.copy_(u)
        self._v.copy_(v)

    def right_inverse(self, value: Tensor) -> Tensor:
        self._converge(value)
        return value

    def extra_repr(self) -> str:
        bound = "" if self.bound is None else f", bound={self.bound}"
        shape = self.operator.input_shape
        return f"input_shape={shape}, n_power_iterations={self.n_power_iterations}, eps={self.eps}{bound}"


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _unit(x: Tensor) -> Tensor:
    return x if x.is_meta else x / x.norm()


def _domain(operator: ConvOperator) -> tuple[int, ...]:
    return (operator.in_channels, *operator.input_shape)


def _range(operator: ConvOperator) -> tuple[int, ...]:
    return (operator.out_channels, *operator.output_shape)


def _operator(function: str, module: nn.Module, input_shape: Sequence[int]) -> ConvOperator:
    try:
        return ConvOperator.of(module, input_shape)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: {error}") from None


def _check(operator: ConvOperator, weight: Tensor, n_power_iterations: int, eps: float, bound: float | None) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"conv_spectral_norm: the weight must be floating point, got {weight.dtype}")
    if weight.dim() != 2 + len(operator.kernel_size):
        raise ValueError(f"conv_spectral_norm: the weight must be the convolution's, got {tuple(weight.shape)}")
    if n_power_iterations < 1:
        raise ValueError(f"conv_spectral_norm: n_power_iterations must be positive, got {n_power_iterations}")
    if not eps > 0:
        raise ValueError(f"conv_spectral_norm: eps must be positive, got {eps}")
    if bound is not None and not bound > 0:
        raise ValueError(f"conv_spectral_norm: bound must be positive or None, got {bound}")
