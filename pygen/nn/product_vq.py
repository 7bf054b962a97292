"""Product quantisation: the vector in groups, a codebook for each. It is VectorQuantize (vector_quantize.py) with a
head and a codebook per group, so all groups share one search and one update."""

from typing import Any

import torch
from torch import Tensor

from pygen.nn.vector_quantize import VectorQuantize


class ProductVQ(VectorQuantize):
    r"""Splits a vector into groups of features and quantises each by a codebook of its own.

    .. math::
        x = (x_1, \dots, x_G), \qquad z_g = \operatorname{nearest}(x_g, C_g), \qquad
        \hat x = (c_{1, z_1}, \dots, c_{G, z_G})

    G codebooks of K codes describe K^G vectors. All groups go through one search, one pass of statistics and one
    update; the state_dict is that of `VectorQuantize(heads=groups, separate_codebook_per_head=True)`.

    Args:
        dim: of the vectors. groups: G; divides dim unless codebook_dim is given. codebook_size: K.
        codebook_dim: of a group's codes; if groups * codebook_dim is not dim, linear layers project before and after.
        vq_options: as in `VectorQuantize`: decay, kmeans_init, use_cosine_sim, threshold_ema_dead_code, mask, ...

    Shape:
        x, quantized: (..., dim), or as `VectorQuantize` has it. indices: (..., groups), int64, -1 where the mask is
        False. loss: (), the mean over the groups.

    Raises:
        ValueError: groups does not divide dim, or an option is not implemented, by its name.

    Example:
        >>> import torch
        >>> from pygen.nn.product_vq import ProductVQ
        >>> vq = ProductVQ(dim=8, groups=4, codebook_size=16).eval()
        >>> quantized, indices, loss = vq(torch.randn(2, 10, 8))
        >>> indices.shape
        torch.Size([2, 10, 4])
        >>> torch.equal(vq.get_output_from_indices(indices), quantized)
        True

    Source: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011.
    """

    def __init__(
        self, dim: int, groups: int, codebook_size: int, *, codebook_dim: int | None = None, **vq_options: Any
    ) -> None:
        if groups < 1 or (codebook_dim is None and dim % groups):
            raise ValueError(f"ProductVQ: groups must be at least 1 and divide dim={dim}, got {groups}")
        for name in ("heads", "separate_codebook_per_head"):
            if name in vq_options:
                raise ValueError(f"ProductVQ: {name} is given by groups, got {vq_options[name]!r}")
        super().__init__(
            dim=dim,
            codebook_size=codebook_size,
            codebook_dim=dim // groups if codebook_dim is None else codebook_dim,
            heads=groups,
            separate_codebook_per_head=True,
            **vq_options,
        )
        self.groups = groups

    # A quantiser of one head has no dimension of heads; one group has one of groups.

    def _join_indices(self, indices: Tensor, positions: torch.Size) -> Tensor:
        joined = super()._join_indices(indices, positions)
        return joined[..., None] if self.groups == 1 else joined

    def _codes(self, indices: Tensor) -> Tensor:
        return super()._codes(indices[..., 0] if self.groups == 1 else indices)
