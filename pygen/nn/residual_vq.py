"""Residual vector quantisation: each layer quantises what the one before left over. The layers are VectorQuantize's
(vector_quantize.py); _codebook_sync.py updates all of their codebooks at once."""

import math
import random
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn._codebook_sync import packed_codebook_updates
from pygen.nn.vector_quantize import VectorQuantize

# Of vector-quantize-pytorch's ResidualVQ, what this one does not do, with the value that asks for nothing.
_NOT_IMPLEMENTED: dict[str, Any] = {
    "diveq": False,
    "implicit_neural_codebook": False,
    "mlp_kwargs": None,
    "beam_size": None,
    "eval_beam_size": None,
    "beam_score_quantizer_weights": None,
}


class ResidualVQ(nn.Module):
    r"""Quantises a vector, then what that left over, and so on: a sum of one code from each of q codebooks.

    .. math::
        r_0 = x, \qquad z_i = \operatorname{nearest}(r_i, C_i), \qquad r_{i+1} = r_i - c_{z_i}, \qquad
        \hat x = \textstyle\sum_i c_{z_i}

    Names, return values and state_dict are those of vector-quantize-pytorch's `ResidualVQ`. In training mode the
    codebooks of all layers are updated together at the end of the forward, with one all-reduce over all processes (see
    `packed_codebook_updates`, which makes it one for a whole model).

    With `quantize_dropout` a training forward uses only the first layers, a random number of them, so that a prefix of
    the codes is a coarse quantisation. The number is drawn from a count of the training forwards, not from torch's
    generator: it is the same on all processes without asking them. `quantize_dropout_draws` is that count.

    With `shared_codebook` all layers use one codebook; it is updated once a forward, after the last layer, by the
    averages that an update after each layer would have given.

    Args:
        dim: of the vectors. num_quantizers: q. codebook_size: codes per codebook, or a tuple of one number per layer.
        codebook_dim: of the codes of one head; if heads * codebook_dim is not dim, linear layers project before and
            after. heads: of every layer; its codes are concatenated.
        shared_codebook: one for all layers; needs one codebook_size.
        quantize_dropout: see above. quantize_dropout_cutoff_index: the layer below which nothing is dropped.
            quantize_dropout_multiple_of: the number of layers used is a multiple of it, or q.
        accept_image_fmap: x is (B, dim, height, width). channel_last: False for x (B, dim, N).
        quant_grad_frac: the share of the gradient that flows into earlier layers through r.
        return_zeros_for_masked_padding: quantized is 0 where the mask is False; otherwise x.
        vq_options: what every `VectorQuantize` gets: decay, kmeans_init, use_cosine_sim, threshold_ema_dead_code, ...

    Shape:
        x, quantized: (..., dim). indices: (..., q), or (..., heads, q); int64, -1 for a dropped layer and where the
        mask is False. losses: (q,), 0 for a dropped layer; their sum is what to minimise.

    Raises:
        ValueError: an argument, or an option that is not implemented, by its name.

    Example:
        >>> import torch
        >>> from pygen.nn.residual_vq import ResidualVQ
        >>> vq = ResidualVQ(dim=8, num_quantizers=4, codebook_size=16).eval()
        >>> quantized, indices, losses = vq(torch.randn(2, 10, 8))
        >>> indices.shape, losses.shape
        (torch.Size([2, 10, 4]), torch.Size([4]))
        >>> torch.equal(vq.get_output_from_indices(indices), quantized)
        True

    Source: Zeghidour et al., "SoundStream: An End-to-End Neural Audio Codec", TASLP 2021, algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        num_quantizers: int | None = None,
        codebook_dim: int | None = None,
        heads: int = 1,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        channel_last: bool = True,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_options: Any,
    ) -> None:
        super().__init__()
        for name, nothing in _NOT_IMPLEMENTED.items():
            if (given := vq_options.pop(name, nothing)) not in (nothing, {}):
                raise ValueError(f"ResidualVQ: {name} is not implemented, got {given!r}")
        self.codebook_sizes = _sizes(codebook_size, num_quantizers)
        self.num_quantizers = len(self.codebook_sizes)
        self.uniform_codebook_size = len(set(self.codebook_sizes)) == 1
        if shared_codebook and not self.uniform_codebook_size:
            raise ValueError(f"ResidualVQ: a shared codebook has one codebook_size, got {codebook_size}")
        if not 0 <= quantize_dropout_cutoff_index < self.num_quantizers:
            raise ValueError(
                f"ResidualVQ: quantize_dropout_cutoff_index must be from 0 to {self.num_quantizers - 1}, the last "
                f"layer, got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(
                f"ResidualVQ: quantize_dropout_multiple_of must be at least 1, got {quantize_dropout_multiple_of}"
            )
        self.dim, self.heads = dim, heads
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in = nn.Linear(dim, inner) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()
        self.layers = nn.ModuleList(
            VectorQuantize(dim=inner, codebook_dim=self.codebook_dim, heads=heads, codebook_size=size, **vq_options)
            for size in self.codebook_sizes
        )
        self.shared_codebook = shared_codebook
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook
        self.quantize_dropout = quantize_dropout and self.num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quantize_dropout_draws = 0
        self.accept_image_fmap, self.channel_last = accept_image_fmap, channel_last
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

    @property
    def codebook_size(self) -> int:
        """Of the first layer."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """(q, K, codebook_dim); a tuple where the layers have different numbers of codes."""
        codebooks: list[Any] = [layer.codebook for layer in self.layers]
        return torch.stack(codebooks) if self.uniform_codebook_size else tuple(codebooks)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """(quantized, indices, losses), and with `return_all_codes` the codes (q, ..., codebook_dim) of the layers.

        Args:
            mask: (...) bool; where it is False nothing is quantised or learnt. sample_codebook_temp, freeze_codebook:
                as in `VectorQuantize`. rand_quantize_dropout_fixed_seed: draws the number of layers, in training mode
                with quantize_dropout; every process has to pass the same.
        """
        for name, given in (("indices", indices), ("beam_size", beam_size)):
            if given is not None:
                raise ValueError(f"ResidualVQ: the argument {name} is not implemented")
        original, x = x, self._channels_last(x)
        if x.dim() < 2 or x.size(-1) != self.dim:
            raise ValueError(f"ResidualVQ: x must have {self.dim} features, got {tuple(original.shape)}")
        layers_in_use = self._draw_layers(rand_quantize_dropout_fixed_seed)
        options = {"mask": mask, "sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook}
        quantized, all_indices, losses = self._quantize(self.project_in(x), layers_in_use, options)
        quantized = self.project_out(quantized)
        if mask is not None:
            elsewhere = torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[..., None], quantized, elsewhere.to(quantized.dtype))
        result = (self._channels_as_given(quantized), all_indices, losses)
        return (*result, self.get_codes_from_indices(all_indices)) if return_all_codes else result

    def _quantize(self, x: Tensor, layers_in_use: int, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """x: (..., heads * codebook_dim) -> the same, (..., q) indices, (q,) losses."""
        residual, quantized_sum = x, torch.zeros_like(x)
        all_indices: list[Tensor] = []
        losses: list[Tensor] = []
        together = packed_codebook_updates(*self.layers) if self.training else nullcontext()
        with together:
            for layer in self.layers[:layers_in_use]:
                quantized, indices, loss = layer(residual, **options)
                residual = residual - _with_part_of_gradient(quantized, self.quant_grad_frac)
                quantized_sum = quantized_sum + quantized
                all_indices.append(indices)
                losses.append(loss)
        for layer in self.layers[layers_in_use:]:
            all_indices.append(torch.full_like(all_indices[0], -1))
            losses.append(losses[0].detach() * 0 + _nothing_of(layer))
        return quantized_sum, torch.stack(all_indices, dim=-1), torch.stack(losses)

    @torch.compiler.disable  # Python's generator and a count: neither belongs into a graph
    def _draw(self, seed: int | None) -> int:
        if seed is None:
            seed = self.quantize_dropout_draws
            self.quantize_dropout_draws += 1
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(math.ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def _draw_layers(self, seed: int | None) -> int:
        """How many layers this forward uses."""
        return self._draw(seed) if self.training and self.quantize_dropout else self.num_quantizers

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices: (..., p) with p <= q -> the codes (q, ..., heads * codebook_dim), 0 where an index is -1.

        Fewer than q indices are those of the first layers; that needs a model trained with `quantize_dropout`.
        """
        given = indices.size(-1)
        if given > self.num_quantizers or (given < self.num_quantizers and not self.quantize_dropout):
            raise ValueError(
                f"ResidualVQ: indices must have {self.num_quantizers} in their last dimension (or fewer, with "
                f"quantize_dropout), got {tuple(indices.shape)}"
            )
        indices = nn.functional.pad(indices, (0, self.num_quantizers - given), value=-1)
        of_layers = zip(self.layers, indices.unbind(-1), strict=True)
        return torch.stack([layer.get_codes_from_indices(chosen) for layer, chosen in of_layers])  # type: ignore[operator]

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices: (..., p) -> what forward quantised to them, in the layout of x."""
        return self._channels_as_given(self.project_out(self.get_codes_from_indices(indices).sum(0)))

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.accept_image_fmap or not self.channel_last else x

    def _channels_as_given(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self.accept_image_fmap or not self.channel_last else x


def _sizes(codebook_size: int | tuple[int, ...], num_quantizers: int | None) -> tuple[int, ...]:
    """One codebook_size for each layer."""
    if isinstance(codebook_size, int):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"ResidualVQ: num_quantizers must be at least 1, got {num_quantizers}")
        return (codebook_size,) * num_quantizers
    if not codebook_size or num_quantizers not in (None, len(codebook_size)):
        raise ValueError(f"ResidualVQ: codebook_size must have one number per layer, got {codebook_size}")
    return tuple(codebook_size)


def _with_part_of_gradient(x: Tensor, share: float) -> Tensor:
    return x.detach() if share <= 0 else share * x + (1 - share) * x.detach()


def _nothing_of(module: nn.Module) -> Tensor | float:
    """0 as a function of every parameter: a dropped layer must not look unused to DistributedDataParallel."""
    return sum((p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad), 0.0)
