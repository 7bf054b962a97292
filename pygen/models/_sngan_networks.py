"""Generators and discriminators of `models.SNGAN`: the plain and the residual networks of the paper, for other sizes
as well. They know nothing of spectral normalisation, which sngan.py puts on the discriminator's weights."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

_SLOPE = 0.1  # of the leaky ReLUs
SMALLEST_SIDE = 4  # pixels of an image's side, and of that of the generator's first feature map for a larger image
_GROWTH = {"cnn": 8, "resnet": 16}  # how many times its width a network has as channels, at most
_DEEP = 4  # doublings from which a residual network's channels grow, as the paper's do for images larger than 32 x 32
ARCHITECTURES = ("cnn", "resnet")
NORMALIZED = (nn.Linear, nn.Conv2d)  # the layers of a discriminator that have weights


class Frame(NamedTuple):
    """How an image's sides come about: `bottom` doubled `doublings` times, then cropped.

    Attributes:
        image: (C, H, W).
        bottom: (h, w), the smallest feature map.
        doublings: 3 for 32 x 32 (from 4 x 4) and for 48 x 48 (from 6 x 6), as in the paper; 2 for 28 x 28 (from 7 x 7).
    """

    image: tuple[int, int, int]
    bottom: tuple[int, int]
    doublings: int

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """What `F.pad` adds to an image whose sides cannot be halved so often, on the right and below."""
        (_, height, width), (h, w) = self.image, self.bottom
        return 0, (w << self.doublings) - width, 0, (h << self.doublings) - height


def frame(image: tuple[int, int, int]) -> Frame:
    """The frame of an image (C, H, W)."""
    sides = image[1:]
    doublings = max(1, (min(sides) // SMALLEST_SIDE).bit_length() - 1)
    height, width = (math.ceil(side / 2**doublings) for side in sides)
    return Frame(image, (height, width), doublings)


def _widths(width: int, doublings: int, architecture: str) -> list[int]:
    """Channels at each size, the largest size first: they double as the sides halve."""
    return [width * min(2**i, _GROWTH[architecture]) for i in range(doublings + 1)]


def _padded(x: Tensor, at: Frame) -> Tensor:
    return F.pad(x, at.padding, mode="replicate") if any(at.padding) else x


def _cropped(x: Tensor, at: Frame) -> Tensor:
    return x[..., : at.image[1], : at.image[2]]


# ---- the plain networks ----------------------------------------------------------------------------------------------


class CNNDiscriminator(nn.Module):
    """3 x 3 convolutions, and 4 x 4 ones with stride 2 that halve the sides; then one linear score. Table 3(b)."""

    def __init__(self, at: Frame, width: int) -> None:
        super().__init__()
        self.frame = at
        channels, layers = at.image[0], list[nn.Module]()
        *halved, last = _widths(width, at.doublings, "cnn")
        for out in halved:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.LeakyReLU(_SLOPE)]
            layers += [nn.Conv2d(out, out, 4, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
            channels = out
        layers += [nn.Conv2d(channels, last, 3, padding=1), nn.LeakyReLU(_SLOPE)]
        self.features = nn.Sequential(*layers)
        self.score = nn.Linear(last * math.prod(at.bottom), 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> scores (B,)."""
        return self.score(self.features(_padded(x, self.frame)).flatten(1)).squeeze(1)


class CNNGenerator(nn.Module):
    """A linear layer, then 4 x 4 transposed convolutions with stride 2, BatchNorm and ReLU. Table 3(a)."""

    def __init__(self, at: Frame, width: int, latent_dim: int) -> None:
        super().__init__()
        self.frame = at
        *smaller, channels = _widths(width, at.doublings, "cnn")
        self.first = nn.Linear(latent_dim, channels * math.prod(at.bottom))
        layers: list[nn.Module] = []
        for out in reversed(smaller):
            # BatchNorm has a bias of its own.
            layers += [nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, at.image[0], 3, padding=1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) -> images (B, C, H, W) in (-1, 1)."""
        return _cropped(self.layers(self.first(z).unflatten(1, (-1, *self.frame.bottom))), self.frame)


# ---- the residual networks -------------------------------------------------------------------------------------------


class _DownBlock(nn.Module):
    """x' + conv(relu(conv(relu(x)))), both halved at the end where asked; the first block has no first ReLU."""

    def __init__(self, channels: int, out: int, *, halve: bool, first: bool = False) -> None:
        super().__init__()
        self.halve, self.first = halve, first
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if halve or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x if self.first else x.relu()).relu())
        if not self.halve:
            return self.shortcut(x) + y
        # A 1 x 1 convolution commutes with means of pixels: the mean first is a quarter of the work.
        return self.shortcut(F.avg_pool2d(x, 2)) + F.avg_pool2d(y, 2)


class _UpBlock(nn.Module):
    """x' + conv(relu(bn(conv(double(relu(bn(x))))))), x' = conv1x1(double(x))."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(_doubled(self.norm1(x).relu()))
        return _doubled(self.shortcut(x)) + self.conv2(self.norm2(y).relu())


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResNetDiscriminator(nn.Module):
    """Residual blocks, ReLU, the sum over all positions, one linear score. Tables 4 (to 48 x 48) and 5 (larger)."""

    def __init__(self, at: Frame, width: int) -> None:
        super().__init__()
        self.frame = at
        if at.doublings < _DEEP:
            halvings = max(1, at.doublings - 1)
            widths = [2 * width] * (halvings + 2)
        else:
            widths = _widths(width, at.doublings, "resnet")
            halvings = at.doublings
        blocks, channels = list[nn.Module](), at.image[0]
        for i, out in enumerate(widths):
            blocks.append(_DownBlock(channels, out, halve=i < halvings, first=i == 0))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> scores (B,)."""
        return self.score(self.blocks(_padded(x, self.frame)).relu().sum((2, 3))).squeeze(1)


class ResNetGenerator(nn.Module):
    """A linear layer, residual blocks that double the sides, BatchNorm, ReLU, a convolution. Tables 4 and 5."""

    def __init__(self, at: Frame, width: int, latent_dim: int) -> None:
        super().__init__()
        self.frame = at
        deep = at.doublings >= _DEEP
        widths = _widths(width, at.doublings, "resnet") if deep else [4 * width] * (at.doublings + 1)
        *smaller, channels = widths
        self.first = nn.Linear(latent_dim, channels * math.prod(at.bottom))
        blocks: list[nn.Module] = []
        for out in reversed(smaller):
            blocks.append(_UpBlock(channels, out))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, at.image[0], 3, padding=1), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) -> images (B, C, H, W) in (-1, 1)."""
        return _cropped(self.last(self.blocks(self.first(z).unflatten(1, (-1, *self.frame.bottom)))), self.frame)


# ---- either ----------------------------------------------------------------------------------------------------------


def discriminator(architecture: str, image: tuple[int, int, int], width: int) -> nn.Module:
    """(B, *image) in [-1, 1] -> scores (B,)."""
    kind = CNNDiscriminator if architecture == "cnn" else ResNetDiscriminator
    return kind(frame(image), width).apply(_glorot)


def generator(architecture: str, image: tuple[int, int, int], width: int, latent_dim: int) -> nn.Module:
    """(B, latent_dim) -> (B, *image) in (-1, 1)."""
    kind = CNNGenerator if architecture == "cnn" else ResNetGenerator
    return kind(frame(image), width, latent_dim).apply(_glorot)


def _glorot(layer: nn.Module) -> None:
    """Weights that keep the variance, biases of zero."""
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def weight_shapes(network: nn.Module) -> list[tuple[int, ...]]:
    """Of the weights that spectral normalisation divides, in the order of the layers."""
    return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, NORMALIZED)]
