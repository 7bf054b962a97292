"""Squeezing space into channels, and the multiscale architecture that factors channels out between its levels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.nn.transform import Transform, zero_log_det


class Squeeze(Transform):
    r"""Trades space for channels: every f x f block of pixels becomes f^2 channels of one pixel.

    .. math::
        z_{b,\; (c f + i) f + j,\; h,\; w} = x_{b,\; c,\; h f + i,\; w f + j}

    Channels are ordered by channel of x, then row, then column in the block, as in RealNVP, openai/glow and
    `torch.nn.PixelUnshuffle`. The log-determinant is 0.

    Args:
        factor: f.

    Shape:
        x: (B, C, H, W) -> z: (B, C f^2, H / f, W / f). log_det: (B,), zeros.

    Raises:
        ValueError: H or W is not divisible by f, or, in `inverse`, the channels by f^2.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> nn.Squeeze()(torch.arange(8.0).view(1, 1, 2, 4))[0][0, :, 0]
        tensor([[0., 2.],
                [1., 3.],
                [4., 6.],
                [5., 7.]])

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, section 3.6.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"Squeeze: factor must be at least 1, got {factor}")
        self.factor = factor

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        f = self.factor
        if len(shape) != 3 or shape[1] % f or shape[2] % f:
            raise ValueError(f"Squeeze: x must be (B, C, H, W) with H and W divisible by {f}, got (B, *{tuple(shape)})")
        return shape[0] * f * f, shape[1] // f, shape[2] // f

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        channels, height, width = self.output_shape(x.shape[1:])
        blocks = x.reshape(x.size(0), x.size(1), height, self.factor, width, self.factor)
        z = blocks.permute(0, 1, 3, 5, 2, 4).reshape(x.size(0), channels, height, width)
        return z, zero_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = self.factor
        if z.dim() != 4 or z.size(1) % (f * f):
            raise ValueError(f"Squeeze: z must be (B, C, H, W) with C divisible by {f * f}, got {tuple(z.shape)}")
        batch, channels, height, width = z.shape
        channels //= f * f
        blocks = z.reshape(batch, channels, f, f, height, width).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(batch, channels, height * f, width * f), zero_log_det(z)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Multiscale(Transform):
    r"""Levels of a flow between which the second half of the channels is factored out, as latents of that scale.

    .. math::
        (h_i, y_i) = f_i(h_{i-1}), \quad z_i = (y_i - \mu_i(h_i)) / \sigma_i(h_i), \quad
        z = (z_1, \dots, z_{L-1}, f_L(h_{L-1})), \qquad \log\det = \sum_i \log\det f_i - \sum_i \sum \log \sigma_i(h_i)

    z holds every latent of every scale, flattened and concatenated in the order in which they leave: nothing is
    dropped, and `inverse` takes back what `forward` gave. Without a prior, mu = 0 and sigma = 1.

    Args:
        shape: of one sample, channels first.
        levels: the transforms f_i, at least one. When channels are odd, the larger part is kept.
        priors: None, or one per split (len(levels) - 1), each None or a module from the kept channels (and context,
            when one is given) to mean and log_scale of the factored ones: one tensor with the mean in its first half
            along dimension 1, or a tuple. See `ConvPrior`.

    Shape:
        x: (B, *shape) -> z: (B, D), D = prod(shape). log_det: (B,).

    Raises:
        ValueError: a number of levels or priors, a shape, or a prior's output that does not fit.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> flow = nn.Multiscale((1, 4, 4), [nn.Squeeze(), nn.Squeeze()], priors=[nn.ConvPrior(2)])
        >>> x = torch.randn(3, 1, 4, 4)
        >>> z, log_det = flow(x)
        >>> z.shape, torch.equal(flow.inverse(z)[0], x)
        (torch.Size([3, 16]), True)

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017, section 3.6; the priors:
    Kingma, Dhariwal, "Glow", NeurIPS 2018.
    """

    def __init__(
        self, shape: Sequence[int], levels: Sequence[Transform], *, priors: Sequence[nn.Module | None] | None = None
    ) -> None:
        super().__init__()
        if len(levels) == 0:
            raise ValueError("Multiscale: levels must hold at least one transform, got none")
        priors = [None] * (len(levels) - 1) if priors is None else priors
        if len(priors) != len(levels) - 1:
            raise ValueError(
                f"Multiscale: priors must hold one entry per split, {len(levels) - 1} for {len(levels)} levels, "
                f"got {len(priors)}"
            )
        self.shape = tuple(shape)
        self.levels = nn.ModuleList(levels)
        self.priors = nn.ModuleList(priors)  # type: ignore[arg-type]  # None is a valid entry
        self._latent_shapes = _latent_shapes(self.shape, levels)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(shape) != self.shape:
            raise ValueError(f"Multiscale: built for samples of shape {self.shape}, got {tuple(shape)}")
        return (math.prod(shape),)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.output_shape(x.shape[1:])
        log_det, latents = zero_log_det(x), []
        for index, level in enumerate(self.levels):
            x, step = level(x, context)
            log_det = log_det + step
            if index < len(self.priors):
                factored = x.size(1) // 2
                x, y = x.split((x.size(1) - factored, factored), 1)
                y, step = self._standardise(index, x, y, context, False)
                log_det = log_det + step
                latents.append(y.flatten(1))
        return torch.cat((*latents, x.flatten(1)), 1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if z.dim() != 2 or z.size(1) != math.prod(self.shape):
            raise ValueError(f"Multiscale: z must be (B, {math.prod(self.shape)}), got {tuple(z.shape)}")
        pieces = z.split([math.prod(shape) for shape in self._latent_shapes], 1)
        latents = [piece.unflatten(1, shape) for piece, shape in zip(pieces, self._latent_shapes, strict=True)]
        x, log_det = latents[-1], zero_log_det(z)
        for index in reversed(range(len(self.levels))):
            if index < len(self.priors):
                y, step = self._standardise(index, x, latents[index], context, True)
                x, log_det = torch.cat((x, y), 1), log_det + step
            x, step = self.levels[index].inverse(x, context)  # type: ignore[operator]
            log_det = log_det + step
        return x, log_det

    def _standardise(
        self, index: int, kept: Tensor, factored: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """(y - mean) / scale, or its inverse, by the prior of split `index`."""
        prior = self.priors[index]
        if prior is None:
            return factored, zero_log_det(factored)
        out = prior(kept) if context is None else prior(kept, context)
        parts = tuple(out) if isinstance(out, tuple | list) else out.chunk(2, 1)
        if len(parts) != 2 or any(part.shape != factored.shape for part in parts):
            got = [tuple(part.shape) for part in parts] if isinstance(out, tuple | list) else tuple(out.shape)
            raise ValueError(
                f"Multiscale: prior {index} must return mean and log_scale, each {tuple(factored.shape)}, in one "
                f"tensor along dimension 1 or as a tuple, got {got}"
            )
        mean, log_scale = parts
        return ops.affine_coupling(factored, log_scale, mean, scale_map="exp", inverse=not inverse)


def _latent_shapes(shape: tuple[int, ...], levels: Sequence[Transform]) -> list[tuple[int, ...]]:
    """Shapes of the latents in the order in which they leave, for samples of `shape`."""
    latents = []
    for index, level in enumerate(levels):
        after = level.output_shape(shape)
        if math.prod(after) != math.prod(shape):
            raise ValueError(f"Multiscale: level {index} turns {shape} into {after}, another number of elements")
        shape = after
        if index + 1 < len(levels):
            if len(shape) == 0 or shape[0] < 2:
                raise ValueError(f"Multiscale: level {index} must return at least 2 channels to split, got {shape}")
            latents.append((shape[0] // 2, *shape[1:]))
            shape = (shape[0] - shape[0] // 2, *shape[1:])
    return [*latents, shape]
