"""VectorQuantize: a drop-in for the module of that name in vector-quantize-pytorch, on the exact search.

_codebook.py keeps the codes, _quantize.py has the gradients; residual_vq.py and product_vq.py stack this module.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn._codebook import Codebook
from pygen.nn._codebook_measures import LossBreakdown, codebook_metrics, orthogonality
from pygen.nn._quantize import Gradients, quantize

# What vector-quantize-pytorch 1.32 also takes, and its defaults.
_REFUSED_OPTIONS: dict[str, Any] = {
    "commitment_use_cross_entropy_loss": False,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "sync_affine_param": False,
    "vq_bridge": None,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "sync_update_v": 0.0,
}


class VectorQuantize(nn.Module):
    r"""Replaces every vector by the nearest of K learned codes; codes learn, gradients pass.

    .. math::
        z_i = \arg\min_k \lVert x_i - c_k \rVert, \qquad q_i = c_{z_i}, \qquad
        \mathcal{L} = \beta\, \mathrm{mean}\,(x - \mathrm{sg}[q])^2

    Arguments, return values and state_dict are those of `vector_quantize_pytorch.VectorQuantize` (1.32). The search is
    exact and never holds an N x K matrix; a training step is one search, one pass for statistics and one update. The
    result uses the codes as they were before the update. In several processes (torch.distributed, asked at every
    forward) the codes learn from all of them and stay equal.

    Args:
        dim: D of the input. codebook_size: K.
        codebook_dim: D of the codes, per head (default: dim). Linear projections lead there and back if
            heads * codebook_dim is not dim.
        heads: parts of a vector that are quantised each for itself.
        separate_codebook_per_head: H codebooks instead of one for all heads.
        decay, eps: of the moving averages, and of their Laplace smoothing.
        freeze_codebook: the codes do not learn; forward's argument of that name overrides it.
        kmeans_init, kmeans_iters, sync_kmeans: the first codes are K-Means centres of the first batch (of all
            processes, unless sync_kmeans is False). That first call cannot be part of a full graph of torch.compile.
        use_cosine_sim: vectors and codes have length 1.
        layernorm_after_project_in: a LayerNorm follows the projection.
        threshold_ema_dead_code: a code whose moving average of uses falls below becomes a vector of the batch.
        channel_last: x is (B, ..., D), else (B, D, ...). accept_image_fmap, accept_3d_fmap: x is (B, D, H, W) or
            (B, D, H, W, L).
        commitment_weight: beta.
        orthogonal_reg_weight: of the mean squared cosine between different codes; of those codes only that the batch
            uses (`orthogonal_reg_active_codes_only`), or of so many at random (`orthogonal_reg_max_codes`).
        stochastic_sample_codes, sample_codebook_temp: in training a code is drawn with probability
            softmax(-|x - c| / temp).
        rotation_trick: gradients turn with the rotation from x to q (Fifty et al.); default: for dim > 1. Otherwise,
            and with `straight_through`, they pass unchanged.
        sync_codebook: False: every process learns by itself.
        ema_update: codes follow moving averages; default: unless learnable_codebook. With `manual_ema_update` only when
            `_codebook.update_ema()` is called.
        learnable_codebook: codes are a parameter, which learns by the gradient of the commitment loss.
        return_zeros_for_masked_padding: masked positions of the result are 0, else x.
        route_gradients_to_input: False: the result's gradient does not go to x.
        options: what else vector-quantize-pytorch takes, at its default. Other values are refused.

    Shape:
        x: (B, ..., D) or as channel_last and accept_* say; float64, float32, bfloat16, float16. One vector a sample,
        (B, D), is always good. quantize: as x. indices: x's shape without D, and with heads > 1 a last dimension for
        them; int64. loss: scalar, float32 at least; 0 in eval mode.

    Raises:
        ValueError: shapes, impossible combinations, and options that are not implemented. TypeError: unknown options.
        RuntimeError: double backward.

    Example:
        >>> import torch
        >>> from pygen.nn.vector_quantize import VectorQuantize
        >>> quantizer = VectorQuantize(dim=16, codebook_size=64, decay=0.9)
        >>> quantized, indices, loss = quantizer(torch.randn(2, 100, 16))
        >>> quantized.shape, indices.shape, loss.shape
        (torch.Size([2, 100, 16]), torch.Size([2, 100]), torch.Size([]))
        >>> torch.equal(quantizer.eval().get_output_from_indices(indices), quantizer.codebook[indices])
        True

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017. Fifty et al.,
    "Restructuring Vector Quantization with the Rotation Trick", ICLR 2025. Yu et al., "Vector-quantized Image Modeling
    with Improved VQGAN", ICLR 2022, for cosine codes.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        _refuse("VectorQuantize", options, _REFUSED_OPTIONS)
        learnable_codebook = bool(learnable_codebook)
        ema_update = not learnable_codebook if ema_update is None else ema_update
        rotation_trick = dim > 1 and not straight_through if rotation_trick is None else rotation_trick
        for name, size in (("dim", dim), ("codebook_size", codebook_size), ("heads", heads)):
            if size < 1:
                raise ValueError(f"VectorQuantize: {name} must be at least 1, got {size}")
        if kmeans_init and kmeans_iters < 1:
            raise ValueError(f"VectorQuantize: kmeans_iters must be at least 1, got {kmeans_iters}")
        _exclusive(learnable_codebook=learnable_codebook, use_cosine_sim=use_cosine_sim)
        _exclusive(learnable_codebook=learnable_codebook, straight_through=straight_through)
        _exclusive(learnable_codebook=learnable_codebook, ema_update=ema_update)
        _exclusive(rotation_trick=rotation_trick, straight_through=straight_through)
        _exclusive(accept_image_fmap=accept_image_fmap, accept_3d_fmap=accept_3d_fmap)
        if straight_through and not route_gradients_to_input:
            raise ValueError(
                "VectorQuantize: straight_through without route_gradients_to_input would be the gradient of a softmax "
                "over all codes, which is not implemented"
            )
        if orthogonal_reg_active_codes_only and separate_codebook_per_head and heads > 1:
            raise ValueError(
                "VectorQuantize: orthogonal_reg_active_codes_only is for one codebook, not separate_codebook_per_head"
            )

        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.channel_last = channel_last
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.commitment_weight, self.orthogonal_reg_weight = commitment_weight, orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick, self.route_gradients_to_input = rotation_trick, route_gradients_to_input
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.freeze_codebook = freeze_codebook
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = nn.Linear(dim, inner)
            self.project_in = nn.Sequential(linear, nn.LayerNorm(inner)) if layernorm_after_project_in else linear
            self.project_out = nn.Linear(inner, dim)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync_codebook=sync_codebook,
            learnable_codebook=learnable_codebook or orthogonal_reg_weight > 0,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            use_cosine_sim=use_cosine_sim,
            stochastic_sample_codes=stochastic_sample_codes,
            sample_codebook_temp=sample_codebook_temp,
        )

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D), or (H, K, D) of separate codebooks. To set them starts their moving averages anew."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: None = None,
        ema_update_weight: None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        *,
        return_metrics: bool = False,
    ) -> tuple[Any, ...]:
        """Quantise x; in training mode also let the codes learn from it.

        Args:
            x: see the class.
            mask: bool, x's shape without D. Positions where it is False get index -1 and count in nothing: loss, moving
                averages, revival, K-Means, metrics. lens: (B,), instead of a mask: how many positions of (B, N) count.
            sample_codebook_temp: overrides the constructor's. freeze_codebook: likewise.
            return_loss_breakdown: append a `LossBreakdown`. return_metrics: append `CodebookMetrics`.
            ema_update: False: this batch does not change the codes.
            indices, topk, codebook_transform_fn, ema_update_weight, accum_ema_update: of vector-quantize-pytorch; not
                implemented, and refused.

        Returns:
            (quantize, indices, loss), then what was asked for.
        """
        _refuse(
            "VectorQuantize.forward",
            {
                "indices": indices,
                "topk": topk,
                "codebook_transform_fn": codebook_transform_fn,
                "ema_update_weight": ema_update_weight,
                "accum_ema_update": accum_ema_update,
            },
            {
                **dict.fromkeys(("indices", "topk", "codebook_transform_fn", "ema_update_weight")),
                "accum_ema_update": False,
            },
        )
        learns = self._learns(freeze_codebook, ema_update)
        codebook = self._codebook
        tokens = self._tokens(x)  # (B, ..., D)
        positions = tokens.shape[:-1]
        mask = self._mask(positions, mask, lens)
        projected, x_heads = self._rows(tokens, mask)
        mask_heads = None if mask is None else self._of_heads(mask)

        codebook.initialise_once(x_heads, mask_heads)
        found, distance = codebook.search(x_heads, mask_heads, sample_codebook_temp)
        quantized, commitment = quantize(
            x_heads,
            codebook.embed,
            found,
            distance,
            mask_heads,
            self._gradients(projected, freeze_codebook),
            commitment=self.training and self.commitment_weight > 0,
        )
        if learns:
            codebook.learn(x_heads, found)
        orthogonal = loss = torch.zeros_like(commitment)
        if self.training:
            loss = commitment * self.commitment_weight
            if self.orthogonal_reg_weight > 0:
                orthogonal = orthogonality(
                    # A copy: the next update must not change what this step's backward needs.
                    codebook.embed.clone(),
                    found if self.orthogonal_reg_active_codes_only else None,
                    self.orthogonal_reg_max_codes,
                )
                loss = loss + orthogonal * self.orthogonal_reg_weight

        output = self.project_out(self._join_heads(quantized).to(projected.dtype))
        if mask is not None and (self.has_projections or not self.return_zeros_for_masked_padding):
            kept = 0 if self.return_zeros_for_masked_padding else tokens.reshape(-1, self.dim).to(output.dtype)
            output = torch.where(mask[:, None], output, kept)
        output = self._channels_back(output.view(*positions, self.dim), x.dim())
        results: tuple[Any, ...] = (output, self._join_indices(found, positions), loss)
        if return_loss_breakdown:
            zero = torch.zeros_like(loss)
            results += (LossBreakdown(commitment, zero, orthogonal, zero),)
        if return_metrics:
            results += (codebook_metrics(found, self.codebook_size),)
        return results

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """indices as `forward` returns them -> the codes, heads joined, before the projection out; 0 for index -1."""
        codes = self._codes(indices)
        return self._channels_back(codes, codes.dim())

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """indices as `forward` returns them -> its quantize in eval mode, but 0 for index -1 only before projection."""
        output = self.project_out(self._codes(indices))
        return self._channels_back(output, output.dim())

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Let the codes learn as if x had chosen these indices, in the layouts of `forward`; -1 counts in nothing."""
        tokens = self._tokens(x)
        mask = self._mask(tokens.shape[:-1], mask, None)
        _, x_heads = self._rows(tokens, mask)
        indices = indices.reshape(-1, self.heads)
        if mask is not None:
            indices = torch.where(mask[:, None], indices, -1)
        self._codebook.learn(x_heads, indices.T if self.separate_codebook_per_head else indices.reshape(1, -1))

    update_ema_indices = update_indices

    # Layouts: x <-> tokens (B, ..., D) <-> rows of each codebook (H, N, D).

    @property
    def _channel_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _tokens(self, x: Tensor) -> Tensor:
        expected = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else None
        channel = 1 if self._channel_first else -1
        if x.dim() < 2 or (expected and x.dim() not in (2, expected)) or x.size(channel) != self.dim:
            layout = (
                f"(B, {self.dim}, H, W)"
                if self.accept_image_fmap
                else f"(B, {self.dim}, H, W, L)"
                if self.accept_3d_fmap
                else f"(B, {self.dim}, ...)"
                if self._channel_first
                else f"(B, ..., {self.dim})"
            )
            raise ValueError(f"VectorQuantize: x must be {layout}, got {tuple(x.shape)}")
        return x.movedim(channel, -1)

    def _channels_back(self, tokens: Tensor, dimensions: int) -> Tensor:
        return tokens.movedim(-1, 1) if self._channel_first and dimensions > 2 else tokens

    def _mask(self, positions: torch.Size, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """(M,), of all positions."""
        if lens is not None:
            if mask is not None:
                raise ValueError("VectorQuantize: mask and lens are two ways to say the same; got both")
            if len(positions) != 2 or lens.shape != positions[:1]:
                raise ValueError(
                    f"VectorQuantize: lens must be (B,) for positions (B, N), got {tuple(lens.shape)} for "
                    f"{tuple(positions)}"
                )
            mask = torch.arange(positions[1], device=lens.device) < lens[:, None]
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != positions:
            raise ValueError(
                f"VectorQuantize: mask must be bool of x's shape without its channels, {tuple(positions)}, got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )
        return mask.reshape(-1)

    def _rows(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, ..., D), mask (M,) -> what is projected, (M, heads * codebook_dim), and what is searched, (H, N, D)."""
        rows = tokens.reshape(-1, self.dim)
        if mask is not None and (self.has_projections or self.use_cosine_sim):
            # Padding may be NaN, which in the derivatives of a projection or a norm would not vanish times 0.
            rows = torch.where(mask[:, None], rows, 0)
        projected = self.project_in(rows)
        return projected, self._codebook.transform_input(self._split_heads(projected))

    def _split_heads(self, rows: Tensor) -> Tensor:
        """(M, heads * D) -> (heads, M, D) for separate codebooks, (1, M * heads, D) for one."""
        if self.separate_codebook_per_head:
            return rows.view(rows.size(0), self.heads, self._codebook.embed.size(-1)).transpose(0, 1).contiguous()
        return rows.reshape(1, rows.size(0) * self.heads, self._codebook.embed.size(-1))

    def _of_heads(self, mask: Tensor) -> Tensor:
        """(M,) -> (heads, M) or (1, M * heads)."""
        if self.separate_codebook_per_head:
            return mask.expand(self.heads, -1)
        return mask[:, None].expand(-1, self.heads).reshape(1, -1)

    def _join_heads(self, quantized: Tensor) -> Tensor:
        """The inverse of `_split_heads`."""
        if self.separate_codebook_per_head:
            quantized = quantized.transpose(0, 1)
        return quantized.reshape(-1, self.heads * quantized.size(-1))

    def _join_indices(self, indices: Tensor, positions: torch.Size) -> Tensor:
        if self.heads == 1:
            return indices.view(positions)
        indices = indices.T if self.separate_codebook_per_head else indices
        return indices.reshape(*positions, self.heads)

    def _codes(self, indices: Tensor) -> Tensor:
        """(..., heads) or (...) -> (..., heads * D)."""
        embed = self._codebook.embed
        if self.heads == 1:
            indices = indices[..., None]
        rows = indices.clamp_min(0)
        if self.separate_codebook_per_head:
            rows = rows + torch.arange(self.heads, device=rows.device) * self.codebook_size
        codes = torch.where(indices[..., None] < 0, 0, embed.flatten(0, 1)[rows])
        return codes.flatten(-2)

    # Choices and losses.

    def _learns(self, freeze_codebook: bool | None, ema_update: bool | None) -> bool:
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        if ema_update is not None and ema_update != self.ema_update:
            if ema_update or self._codebook.revives:
                raise ValueError(
                    f"VectorQuantize.forward: ema_update={ema_update} is not implemented for a module made with "
                    f"ema_update={self.ema_update}, threshold_ema_dead_code={self._codebook.threshold_ema_dead_code}; "
                    "freeze_codebook=True leaves the codes as they are"
                )
            frozen = True
        return self.training and not frozen

    def _gradients(self, x: Tensor, freeze_codebook: bool | None) -> Gradients:
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        commits = self.learnable_codebook and not frozen
        if not (self.training and self.route_gradients_to_input and x.requires_grad):
            return Gradients("codebook", commits)
        return Gradients("rotation" if self.rotation_trick else "straight", commits)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, heads={self.heads}"


def _refuse(where: str, options: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise for an option that is unknown, or known and not at its default."""
    for name, value in options.items():
        if name not in defaults:
            raise TypeError(f"{where}: got an unexpected keyword argument {name!r}")
        default = defaults[name]
        if value is not default and (isinstance(value, Tensor) or value != default):
            raise ValueError(f"{where}: {name} is not implemented and must be {default!r}, got {value!r}")


def _exclusive(**options: bool) -> None:
    if all(options.values()):
        raise ValueError(f"VectorQuantize: {' and '.join(options)} exclude each other")
