"""A convolution as a linear operator at one spatial size: applied, adjoint, and its largest singular value in three
ways. conv_spectral_norm.py iterates it during training, lipschitz.py certifies it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# Elements of the matrices (of one frequency each) that are in memory together: 64 MB of complex128.
_CHUNK = 2**22


@dataclass(frozen=True)
class ConvOperator:
    """The convolution without its bias, from (B, in_channels, *input_shape) to (B, out_channels, *output_shape).

    For a convolution, input is padded by `pads` as `padding_mode` says and then by `padding` zeros on either side; for
    a transposed one `padding` and `output_padding` are the module's.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, ...]
    input_shape: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, input_shape: Sequence[int]) -> "ConvOperator":
        """The operator of a convolution module at `input_shape`, (L,), (H, W) or (D, H, W).

        Raises:
            TypeError: module is no convolution. ValueError: a size that does not fit, or leaves no output.
        """
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            raise TypeError(
                "module must be a Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d or ConvTranspose3d, "
                f"got {parametrize.type_before_parametrizations(module).__name__}"
            )
        shape = tuple(int(n) for n in input_shape)
        if len(shape) != len(module.kernel_size) or min(shape) < 1:
            raise ValueError(
                f"input_shape must be {len(module.kernel_size)} positive spatial sizes, without batch and channels, "
                f"got {tuple(input_shape)}"
            )
        if not module.in_channels or not module.out_channels:
            raise ValueError("module must have input and output channels, got a lazy one that has seen no input")
        operator = cls(
            module.in_channels,
            module.out_channels,
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(module.dilation),
            module.groups,
            *_padding(module),
            module.padding_mode,
            isinstance(module, TRANSPOSED),
            tuple(module.output_padding),
            shape,
        )
        operator._check(module)
        return operator

    def _check(self, module: nn.Module) -> None:
        for n, (left, right) in zip(self.input_shape, self.pads, strict=True):
            most = {"reflect": n - 1, "circular": n}.get(self.padding_mode, max(left, right))
            if max(left, right) > most:
                raise ValueError(f"input_shape {self.input_shape} is too small for the padding of {module}")
        if min(self.output_shape) < 1:
            raise ValueError(f"input_shape {self.input_shape} is too small: {module} has no output")

    @property
    def extent(self) -> tuple[int, ...]:
        """Sizes of the dilated kernel."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Sizes of the input with `pads`."""
        return tuple(n + left + right for n, (left, right) in zip(self.input_shape, self.pads, strict=True))

    @property
    def output_shape(self) -> tuple[int, ...]:
        sizes = zip(self.padded_shape, self.extent, self.stride, self.padding, self.output_padding, strict=True)
        if self.transposed:
            return tuple((n - 1) * s - 2 * p + e + o for n, e, s, p, o in sizes)
        return tuple((n + 2 * p - e) // s + 1 for n, e, s, p, _ in sizes)

    @property
    def is_pointwise(self) -> bool:
        """Whether pixels do not meet: the norm is that of the (grouped) matrix, at any size."""
        return set(self.kernel_size) == {1} and not any(self.padding) and not any(map(any, self.pads))

    def at_one_pixel(self) -> "ConvOperator":
        """A pointwise operator at the smallest size, where its norm is what it is at all sizes."""
        return replace(self, input_shape=(1,) * len(self.kernel_size))

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """x: (B, in_channels, *input_shape) -> (B, out_channels, *output_shape)."""
        n = len(self.kernel_size)
        if self.transposed:
            return _CONV_TRANSPOSE[n - 1](
                x, weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        for dim, (size, pads) in enumerate(zip(self.input_shape, self.pads, strict=True), start=2):
            if any(pads) and self.padding_mode == "zeros":
                x = torch.cat((x, x.new_zeros(*x.shape[:dim], pads[1], *x.shape[dim + 1 :])), dim)
            elif any(pads):
                x = x.index_select(dim, self._source(size, pads, x.device))
        return _CONV[n - 1](x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """y: (B, out_channels, *output_shape) -> (B, in_channels, *input_shape)."""
        n = len(self.kernel_size)
        if self.transposed:
            x = _CONV[n - 1](y, weight, None, self.stride, self.padding, self.dilation, self.groups)
            # An output padding of a stride or more (dilated kernels allow it) is read once too often.
            for dim, size in enumerate(self.input_shape, start=2):
                x = x.narrow(dim, 0, size)
            return x
        sizes = zip(self.padded_shape, self.extent, self.stride, self.padding, strict=True)
        unread = tuple((n + 2 * p - e) % s for n, e, s, p in sizes)
        x = _CONV_TRANSPOSE[n - 1](y, weight, None, self.stride, self.padding, unread, self.groups, self.dilation)
        for dim, (size, pads) in enumerate(zip(self.input_shape, self.pads, strict=True), start=2):
            if any(pads) and self.padding_mode == "zeros":
                x = x.narrow(dim, 0, size)
            elif any(pads):
                folded = x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :])
                x = folded.index_add(dim, self._source(size, pads, x.device), x)
        return x

    def _source(self, size: int, pads: tuple[int, int], device: torch.device) -> Tensor:
        """Which element stands at every position of a padded dimension."""
        position = torch.arange(-pads[0], size + pads[1], device=device)
        if self.padding_mode == "circular":
            return position % size
        if self.padding_mode == "replicate":
            return position.clamp(0, size - 1)
        return (size - 1) - ((size - 1) - position.abs()).abs()

    def pad_norm(self) -> float:
        """The norm of the padding alone: the root of how often its most copied pixel stands in the padded input."""
        if self.padding_mode == "zeros":
            return 1.0
        cpu = torch.device("cpu")
        copies = (
            int(self._source(size, pads, cpu).bincount().max())
            for size, pads in zip(self.input_shape, self.pads, strict=True)
        )
        return math.sqrt(math.prod(copies))

    @property
    def is_circulant(self) -> bool:
        """Whether the pixels are a torus, which the outputs cover evenly: the Fourier transform makes it diagonal."""
        if self.transposed or any(self.padding) or (self.padding_mode != "circular" and not self.is_pointwise):
            return False
        return all(m * s == n for m, s, n in zip(self.output_shape, self.stride, self.input_shape, strict=True))

    def torus(self) -> tuple[int, ...]:
        """Outputs (inputs of a transposed one) and room for the kernel: on such a torus nothing wraps around.

        The convolution without padding is a part of the matrix of the one on this torus, so its norm is no larger.
        """
        grid = self.input_shape if self.transposed else self.output_shape
        return tuple(m + -(-e // s) - 1 for m, e, s in zip(grid, self.extent, self.stride, strict=True))


def _padding(module: nn.Module) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """`padding` and `pads` of a `ConvOperator`."""
    n = len(module.kernel_size)  # type: ignore[arg-type]
    none, zeros = ((0, 0),) * n, (0,) * n
    if module.padding == "valid":
        return zeros, none
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]  # type: ignore[arg-type]
        sides = tuple((t // 2, t - t // 2) for t in total)
    else:
        sides = tuple((p, p) for p in module.padding)  # type: ignore[union-attr]
    if module.padding_mode != "zeros":
        return zeros, sides
    return tuple(left for left, _ in sides), tuple((0, right - left) for left, right in sides)


def dense_matrix(operator: ConvOperator, weight: Tensor) -> Tensor:
    """The operator as a matrix: (outputs, inputs), of weight's dtype."""
    shape = (operator.in_channels, *operator.input_shape)
    basis = torch.eye(math.prod(shape), dtype=weight.dtype, device=weight.device)
    return operator.apply(weight, basis.unflatten(1, shape)).flatten(1).T


def fourier_norm(operator: ConvOperator, weight: Tensor, torus: Sequence[int]) -> Tensor:
    r"""The exact norm of the strided convolution without boundaries on a torus of `torus` outputs: float64 scalar.

    A stride s is a convolution of stride 1 of the s * s images that each hold every s-th pixel (a space-to-depth), and
    a convolution of stride 1 is diagonal in frequencies: with :math:`W_t` the matrix of tap t over the channels,

    .. math::
        |A| = \max_{\omega} \Big| \sum_t W_t\, e^{-2 \pi i \langle \omega, t / n \rangle} \Big|

    Source: Sedghi, Gupta, Long, "The singular values of convolutional layers", ICLR 2019, for stride 1.
    """
    taps, matrices = _polyphase(operator, weight.double())  # (T, dims) and (T, groups, rows, columns)
    _, groups, rows, columns = matrices.shape
    flat = matrices.flatten(1).to(torch.complex128)
    largest = weight.new_zeros((), dtype=torch.float64)
    for frequencies in _frequencies(torus, max(1, _CHUNK // (groups * rows * columns)), weight.device):
        # Turns are reduced in integers: the angles stay exact at every size.
        turns = sum(((frequencies[:, i : i + 1] * taps[:, i]) % n).double() / n for i, n in enumerate(torus))
        phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)  # type: ignore[arg-type]
        symbol = (phases @ flat).view(-1, rows, columns)
        largest = torch.maximum(largest, torch.linalg.svdvals(symbol).amax())
    return largest


def _polyphase(operator: ConvOperator, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel after the space-to-depth of its stride: positions of the taps (T, dims), and for each its matrices,
    (T, groups, rows, columns), rows those of the weight's first dimension and columns the second's and the phases."""
    n, groups = len(operator.kernel_size), operator.groups
    device = weight.device
    position = torch.cartesian_prod(*(torch.arange(k, device=device) for k in operator.kernel_size)).view(-1, n)
    position = position * torch.tensor(operator.dilation, device=device)
    stride = torch.tensor(operator.stride, device=device)
    phase = torch.zeros(len(position), dtype=torch.int64, device=device)
    for i, s in enumerate(operator.stride):
        phase = phase * s + position[:, i] % s
    taps, tap = torch.unique(position // stride, dim=0, return_inverse=True)
    rows, columns = weight.size(0) // groups, weight.size(1)
    values = weight.flatten(2).permute(2, 0, 1).reshape(-1, groups, rows, columns)  # (kernel positions, ...)
    matrices = weight.new_zeros(len(taps), groups, rows, math.prod(operator.stride), columns)
    matrices[tap, :, :, phase] = values
    return taps, matrices.flatten(3)


def _frequencies(torus: Sequence[int], chunk: int, device: torch.device) -> Iterator[Tensor]:
    """The frequencies (F, dims) of a real signal, at most `chunk` at a time; of conjugate ones only one."""
    sizes = (*torus[:-1], torus[-1] // 2 + 1)
    for index in torch.arange(math.prod(sizes), device=device).split(chunk):
        columns = []
        for n in reversed(sizes):
            columns.append(index % n)
            index = index // n
        yield torch.stack(columns[::-1], 1)


def normalized(product: Tensor, before: Tensor, eps: float) -> Tensor:
    """product / max(|product|, eps); what was there before, where the product is zero or not finite."""
    # In float64, where no square of a float32 overflows or vanishes.
    norm = torch.linalg.vector_norm(product, dtype=torch.float64)
    usable = (norm > 0) & (norm < torch.inf)
    return torch.where(usable, product / norm.clamp_min(eps).to(product.dtype), before)


class Iterated(NamedTuple):
    """Where a power iteration came to: |A v| and v, and whether (and how far) it got."""

    sigma: float
    v: Tensor  # (in_channels, *input_shape)
    converged: bool
    iterations: int
    residual: float


@torch.no_grad()
def iterate(operator: ConvOperator, weight: Tensor, start: Tensor, n_iterations: int, tolerance: float) -> Iterated:
    r"""Power iteration of :math:`A^\top A` on several vectors, each step of which also looks along the step before.

    A step of the plain iteration takes v to :math:`A^\top A v`. The top of a convolution's spectrum is dense, as its
    frequencies are: the plain iteration creeps, or rests at a value near the largest. Here a step takes the best
    vectors in the span of all v, :math:`A^\top A v` and the last steps, and needs about the root of its steps.
    It has converged when :math:`|A^\top A v - \sigma^2 v| \le \mathrm{tolerance}\, \sigma^2` for the largest: a
    singular value is then within tolerance / 2, relatively, of sigma.

    Args:
        start: (n, in_channels, *input_shape), the vectors to start from.

    Source: Knyazev, "Toward the optimal preconditioned eigensolver", SIAM J. Sci. Comput. 23 (2001).
    """
    scale = float(weight.abs().amax())
    if not 0 < scale < math.inf:
        return Iterated(scale, start[0], scale == 0, 0, 0.0)
    weight = weight / scale  # no square of a product overflows or vanishes
    shape = start.shape[1:]
    basis = _orthonormal(start.flatten(1))
    before = basis[:0]
    iterations = 0
    while True:
        images = operator.apply(weight, basis.reshape(-1, *shape)).flatten(1)
        # The largest last.
        mix = torch.linalg.eigh((images @ images.T).double()).eigenvectors.to(basis.dtype)[:, -len(start) :].T
        v, image = mix @ basis, mix @ images
        squares = image.square().sum(1, keepdim=True)
        sigma, residual = float(squares[-1].sqrt()), 0.0
        if sigma == 0:
            break
        ahead = operator.adjoint(weight, image.view(-1, operator.out_channels, *operator.output_shape)).flatten(1)
        ahead = ahead - squares * v
        residual = float(ahead[-1].norm()) / sigma**2
        if residual <= tolerance or iterations == n_iterations:
            break
        iterations += 1
        step = v - (v @ before.T) @ before
        basis, before = _orthonormal(torch.cat((v, ahead, step))), v
    return Iterated(sigma * scale, v[-1].view(shape), residual <= tolerance, iterations, residual)


def _orthonormal(vectors: Tensor) -> Tensor:
    """(n, N) -> (min(n, N), N), whose span has that of the vectors; QR does so also where they depend on each other."""
    lengths = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    return torch.linalg.qr((vectors / lengths).T).Q.T


def random_vectors(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone and leave torch's own generator as it is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)
