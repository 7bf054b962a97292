"""VQ-VAE: a convolutional autoencoder whose latents are codes of a codebook. The quantisers are pygen.nn's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pygen.models.model import Model, arguments
from pygen.models.scales import image_shape
from pygen.models.stacks import check_choice
from pygen.nn.residual_vq import ResidualVQ
from pygen.nn.vector_quantize import VectorQuantize

if TYPE_CHECKING:
    from pygen.data import Dataset

_FIRST_OUTPUT = 0.1  # of the decoder's standard deviation at first: nearly the mean image, which is safe
QUANTIZERS = ("ema", "gradient", "residual")
_SAMPLES_AT_ONCE = 1024  # of a data set whose variance is measured, so that no copy of it in float64 is made


class VQVAEOutput(NamedTuple):
    """What `VQVAE.forward` returns.

    Attributes:
        loss: scalar; `reconstruction_loss + quantizer_loss`.
        reconstruction: (B, *shape), real, on x's scale.
        indices: int64, (B, *code_shape).
        perplexity: scalar; exp of the entropy of the codes of this batch, the mean over the quantisers.
        reconstruction_loss: scalar; the mean squared error, divided by the data's variance.
        quantizer_loss: scalar; the commitment loss, and the codebook's where it learns by gradient; 0 in eval mode.
    """

    loss: Tensor
    reconstruction: Tensor
    indices: Tensor
    perplexity: Tensor
    reconstruction_loss: Tensor
    quantizer_loss: Tensor


class _ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.second = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x.relu()).relu())


def _keep_variance(layer: nn.Module) -> None:
    """He initialisation without biases. By torch's own, a sixth of the variance passes each layer: z then differs from
    image to image by a hundredth of its length, and before it grows all of them have found the same code."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        overlap = math.prod(layer.stride) if isinstance(layer, nn.ConvTranspose2d) else 1
        terms = layer.in_channels * math.prod(layer.kernel_size) / overlap  # in the sum that makes one output
        nn.init.normal_(layer.weight, std=math.sqrt(2 / terms))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _halvings(channels: int, width: int, times: int) -> list[nn.Module]:
    """(B, channels, H, W) -> (B, width, H / 2 ** times, W / 2 ** times); width / 2 on the way."""
    layers: list[nn.Module] = []
    for out in [width // 2] * (times - 1) + [width]:
        layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.ReLU()]
        channels = out
    return layers


def _doublings(width: int, channels: int, times: int) -> list[nn.Module]:
    """The way back of `_halvings`."""
    layers: list[nn.Module] = []
    for out in [width // 2] * (times - 1):
        layers += [nn.ConvTranspose2d(width, out, 4, stride=2, padding=1), nn.ReLU()]
        width = out
    return [*layers, nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1)]


def code_counts(indices: Tensor, quantizers: int, codebook_size: int) -> Tensor:
    """indices (..., quantizers) -> how often each code occurs, (quantizers, codebook_size) int64; -1 is no code."""
    first = torch.arange(quantizers, device=indices.device) * codebook_size
    flat = (indices.clamp_min(0) + first).flatten()
    counts = torch.zeros(quantizers * codebook_size, dtype=torch.int64, device=indices.device)
    return counts.scatter_add(0, flat, (indices >= 0).flatten().long()).view(quantizers, codebook_size)


def perplexity(counts: Tensor) -> Tensor:
    r"""counts (Q, K) -> :math:`\exp(-\sum_k p_k \ln p_k)` of each row's frequencies, (Q,); in [1, K]."""
    p = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return (-torch.xlogy(p, p).sum(-1)).exp()


class VQVAE(Model):
    r"""Images as small grids of codes: an encoder, a codebook that replaces each of its vectors, and a decoder.

    .. math::
        z = f(x), \qquad k_{ij} = \mathrm{argmin}_k |z_{ij} - e_k|, \qquad \hat x = g(e_k), \qquad
        L = \frac{|x - \hat x|^2}{n \sigma^2} + \beta \frac{|z - \mathrm{sg}(e_k)|^2}{m}

    with n pixels and m elements of z. The first term, the share of the data's variance :math:`\sigma^2` that the
    reconstruction misses, is the loss that validation compares: the second is 0 in eval mode. The gradient passes the
    codebook straight through. With Gaussian pixels of that variance, L's first term is -2 log p(x | k) per pixel but
    for a constant. There is no prior over the codes, hence no `sample`.

    Args:
        shape: of one sample: (H, W) or (C, H, W). Sides need not be divisible: an image is padded by its edge, and the
            reconstruction cropped.
        levels: None for real data; L for integers 0 .. L - 1.
        mean, std: of all elements of the data, as `arguments_for` measures them; the encoder gets (x - mean) / std.
            By default those that bring integers to [-1, 1] and leave real data as they are.
        num_hiddens: channels of encoder and decoder.
        num_residual_layers, num_residual_hiddens: residual blocks of each, and the channels within.
        downsamplings: how often the sides are halved before there are codes: a code for 4 x 4 pixels at 2.
        codebook_size, codebook_dim: K and D.
        quantizer: how the codebook learns: "ema" (moving averages of what chose each code), "gradient" (the loss
            gets the codebook's own term :math:`|\mathrm{sg}(z) - e_k|^2 / m`), or "residual" (`nn.ResidualVQ`: each
            of `num_quantizers` codebooks quantises what the ones before left; moving averages).
        num_quantizers: codes for each position; 1 but for "residual".
        commitment_weight: :math:`\beta`.
        decay: of the moving averages.
        kmeans_init: begin with the K-Means of the first batch instead of random codes.
        threshold_ema_dead_code: codes that fewer vectors of a batch than this choose, in the moving average, are
            replaced by vectors of the batch; 0, the paper's, for never. Without it few codes are ever used: on
            Omniglot a perplexity of 38 instead of 318 after 120 steps.
        rotation_trick: rotate the gradient at the codebook instead of passing it straight through.

    Attributes:
        quantizer: `nn.VectorQuantize` or `nn.ResidualVQ`.
        code_shape: of the codes of one sample: (h, w), with "residual" (h, w, num_quantizers).

    Raises:
        ValueError: not an image, or an option out of its range.

    Shape:
        x: (B, *shape), integers with levels (or real numbers of their range), real numbers without.
        indices: int64, (B, *code_shape).

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.VQVAE((1, 28, 28), levels=256, num_hiddens=16).eval()
        >>> x = torch.randint(0, 256, (2, 1, 28, 28))
        >>> codes = model.encode(x)
        >>> codes.shape, torch.equal(model.decode(codes), model.reconstruct(x))
        (torch.Size([2, 7, 7]), True)

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017; the moving
    averages are of its appendix A.1. Residual: Zeghidour et al., "SoundStream", 2021. Rotation trick: Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", ICLR 2025.
    """

    name = "vqvae"
    loss_unit = "of the data's variance"
    metric_names = ("perplexity", "active_codes")
    pictures = ("reconstructions", "codebook")

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        mean: float | None = None,
        std: float | None = None,
        num_hiddens: int = 128,
        num_residual_layers: int = 2,
        num_residual_hiddens: int = 32,
        downsamplings: int = 2,
        codebook_size: int = 512,
        codebook_dim: int = 64,
        quantizer: str = "ema",
        num_quantizers: int = 1,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        kmeans_init: bool = False,
        threshold_ema_dead_code: float = 1.0,
        rotation_trick: bool = False,
    ) -> None:
        config = arguments(locals())
        _check(config)
        super().__init__()
        self.config = config
        channels, height, width = image_shape("VQVAE", shape, 1, squeezes=0)
        self.shape, self.levels = tuple(shape), levels
        middle = 0.0 if levels is None else (levels - 1) / 2
        self.mean = middle if mean is None else mean
        self.std = (middle or 1.0) if std is None else std
        self.codebook_size, self.commitment_weight = codebook_size, commitment_weight
        cell = 2**downsamplings
        self._sides = (math.ceil(height / cell), math.ceil(width / cell))
        self._image = (channels, height, width)
        self._padding = (0, self._sides[1] * cell - width, 0, self._sides[0] * cell - height)
        self.code_shape = self._sides if quantizer != "residual" else (*self._sides, num_quantizers)
        self.num_quantizers = num_quantizers

        def residual_stack() -> list[nn.Module]:
            blocks = [_ResidualBlock(num_hiddens, num_residual_hiddens) for _ in range(num_residual_layers)]
            return [*blocks, nn.ReLU()]

        self.encoder = nn.Sequential(
            *_halvings(channels, num_hiddens, downsamplings),
            nn.Conv2d(num_hiddens, num_hiddens, 3, padding=1),
            *residual_stack(),
            nn.Conv2d(num_hiddens, codebook_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(codebook_dim, num_hiddens, 3, padding=1),
            *residual_stack(),
            *_doublings(num_hiddens, channels, downsamplings),
        )
        self.apply(_keep_variance)
        with torch.no_grad():
            for weight in self.decoder[-1].parameters():
                weight.mul_(_FIRST_OUTPUT)
        options: dict[str, Any] = {
            "dim": codebook_dim,
            "codebook_size": codebook_size,
            "commitment_weight": commitment_weight,
            "decay": decay,
            "kmeans_init": kmeans_init,
            "threshold_ema_dead_code": threshold_ema_dead_code,
            "rotation_trick": rotation_trick,
        }
        self.learns_by_gradient = quantizer == "gradient"
        if self.learns_by_gradient:
            options |= {"learnable_codebook": True, "ema_update": False}
        self.quantizer: nn.Module = (
            ResidualVQ(num_quantizers=num_quantizers, **options)
            if quantizer == "residual"
            else VectorQuantize(**options)
        )

    @classmethod
    def arguments_for(cls, data: Dataset) -> dict[str, Any]:
        mean, std = _mean_and_std(data.train)
        return super().arguments_for(data) | {"mean": mean, "std": std}

    def forward(self, x: Tensor) -> VQVAEOutput:
        """Encode, quantise, decode; in training mode the codebook learns from it."""
        scaled = self._scaled(x)
        latents = self._latents(scaled)
        quantized, indices, losses = self.quantizer(latents)
        output = self._decoded(quantized)
        reconstruction_loss = F.mse_loss(output.float(), scaled.float())
        quantizer_loss = losses.sum() + self._codebook_loss(latents, indices)
        with torch.no_grad():
            counts = code_counts(self._per_quantizer(indices), self.num_quantizers, self.codebook_size)
        return VQVAEOutput(
            reconstruction_loss + quantizer_loss,
            self._unscaled(output),
            indices.unflatten(1, self._sides),
            perplexity(counts).mean(),
            reconstruction_loss,
            quantizer_loss,
        )

    def loss(self, x: Tensor) -> Tensor:
        """L, a scalar; in eval mode its first term."""
        return self(x).loss

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, *shape) -> indices (B, *code_shape). The codebook learns nothing from it, in no mode."""
        _, indices, _ = self.quantizer(self._latents(self._scaled(x)), freeze_codebook=True)
        return indices.unflatten(1, self._sides)

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """indices (B, *code_shape) -> x (B, *shape); int64 in 0 .. levels - 1 when the model has levels.

        Raises:
            ValueError: another shape, or an index that is no code. TypeError: not int64.
        """
        if indices.dtype != torch.int64:
            raise TypeError(f"VQVAE.decode: indices must be int64, got {indices.dtype}")
        if indices.dim() == 0 or tuple(indices.shape[1:]) != self.code_shape:
            expected = ", ".join(map(str, self.code_shape))
            raise ValueError(f"VQVAE.decode: indices must be (B, {expected}), got {tuple(indices.shape)}")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.codebook_size:
            raise ValueError(
                f"VQVAE.decode: indices must be in 0 .. {self.codebook_size - 1}, "
                f"got {int(indices.min())} .. {int(indices.max())}"
            )
        x = self._unscaled(self._decoded(self._codes(indices.flatten(1, 2))))
        return x if self.levels is None else x.round().clamp(0, self.levels - 1).long()

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)): what the codes keep of x, (B, *shape)."""
        return self.decode(self.encode(x))

    def statistics(self, x: Tensor) -> Tensor:
        """How often x uses each code, (num_quantizers * codebook_size,), float64."""
        indices = self._per_quantizer(self.encode(x))
        return code_counts(indices, self.num_quantizers, self.codebook_size).double().flatten()

    def metrics(self, statistics: Tensor) -> dict[str, float]:
        """Perplexity and number of codes in use, of a codebook: the mean over them where there are several."""
        counts = statistics.view(self.num_quantizers, self.codebook_size)
        active = (counts > 0).sum(-1, dtype=torch.float64)
        return {"perplexity": perplexity(counts).mean().item(), "active_codes": active.mean().item()}

    def _latents(self, scaled: Tensor) -> Tensor:
        """z as the quantiser takes it, (B, h w, D)."""
        if any(self._padding):
            scaled = F.pad(scaled, self._padding, mode="replicate")
        return self.encoder(scaled).flatten(2).transpose(1, 2)

    def _codes(self, indices: Tensor) -> Tensor:
        """(B, h w) or (B, h w, num_quantizers) -> (B, h w, D)."""
        return self.quantizer.get_output_from_indices(indices)  # type: ignore[operator]

    def _decoded(self, codes: Tensor) -> Tensor:
        """(B, h w, D) -> (B, C, H, W)."""
        _, height, width = self._image
        output = self.decoder(codes.transpose(1, 2).unflatten(2, self._sides))
        return output[..., :height, :width]

    def _codebook_loss(self, latents: Tensor, indices: Tensor) -> Tensor | float:
        """The rest of the codebook's own term: the quantiser's loss pulls both sides with `commitment_weight`."""
        if not (self.learns_by_gradient and self.training):
            return 0.0
        codes = self._codes(indices)
        return (1 - self.commitment_weight) * F.mse_loss(codes.float(), latents.detach().float())

    def _per_quantizer(self, indices: Tensor) -> Tensor:
        return indices if self.config["quantizer"] == "residual" else indices.unsqueeze(-1)

    def _scaled(self, x: Tensor) -> Tensor:
        """x as the encoder gets it, (B, C, H, W)."""
        if x.dim() == 0 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"VQVAE: expected x (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if self.levels is None and not x.is_floating_point():
            raise TypeError(f"VQVAE: without levels, x must be floating point, got {x.dtype}")
        x = x.to(next(self.parameters()).dtype).reshape(-1, *self._image)
        return (x - self.mean) / self.std

    def _unscaled(self, output: Tensor) -> Tensor:
        return (output * self.std + self.mean).reshape(-1, *self.shape)


def _mean_and_std(x: Tensor) -> tuple[float, float]:
    """Of all elements; data that do not vary have the standard deviation 1."""
    total = torch.zeros(2, dtype=torch.float64)
    for part in x.split(_SAMPLES_AT_ONCE):
        part = part.double()
        total += torch.stack((part.sum(), part.square().sum()))
    mean, square = (total / x.numel()).tolist()
    return mean, math.sqrt(max(square - mean**2, 0.0)) or 1.0


def _check(options: dict[str, Any]) -> None:
    check_choice("VQVAE", "quantizer", options["quantizer"], QUANTIZERS)
    for name, least in (("num_hiddens", 2), ("num_residual_layers", 0), ("num_residual_hiddens", 1),
                        ("downsamplings", 1), ("codebook_size", 1), ("codebook_dim", 1),
                        ("num_quantizers", 1)):  # fmt: skip
        value = options[name]
        if not isinstance(value, int) or value < least:
            raise ValueError(f"VQVAE: {name} must be a whole number, at least {least}, got {value!r}")
    if options["num_quantizers"] > 1 and options["quantizer"] != "residual":
        raise ValueError(
            f"VQVAE: num_quantizers={options['num_quantizers']} needs quantizer='residual', "
            f"got {options['quantizer']!r}"
        )
    if options["std"] is not None and not options["std"] > 0:
        raise ValueError(f"VQVAE: std must be positive, got {options['std']}")
    levels = options["levels"]
    if levels is not None and levels < 1:
        raise ValueError(f"VQVAE: levels must be at least 1, got {levels}")
    if not 0 <= options["decay"] < 1:
        raise ValueError(f"VQVAE: decay must be in [0, 1), got {options['decay']}")
    for name in ("commitment_weight", "threshold_ema_dead_code"):
        if not options[name] >= 0:
            raise ValueError(f"VQVAE: {name} must not be negative, got {options[name]}")
