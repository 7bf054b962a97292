"""What vector_quantize.py reports of a codebook besides its indices: the parts of the loss, and how it is used."""

from typing import NamedTuple

import torch
from torch import Tensor

from pygen.nn._codebook_kmeans import unit


class LossBreakdown(NamedTuple):
    """The parts of the loss, without their weights; what is not computed is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class CodebookMetrics(NamedTuple):
    """How the codebook is used by this process's batch; the mean over separate codebooks.

    perplexity: exp of the entropy of the codes' frequencies, from 1 (one code) to K (all alike); scalar.
    usage: which part of the codes is used at all, from 0 to 1; scalar.
    """

    perplexity: Tensor
    usage: Tensor


@torch.no_grad()
def codebook_metrics(indices: Tensor, codes: int) -> CodebookMetrics:
    """indices (H, N), -1 for what does not count."""
    counts = _counts(indices, codes)
    frequency = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(frequency, frequency).sum(-1)
    return CodebookMetrics(entropy.exp().mean(), (counts > 0).float().mean())


def orthogonality(codes: Tensor, indices: Tensor | None, limit: int | None) -> Tensor:
    r"""The mean squared cosine of all pairs of n codes, less the 1/n that pairs of a code with itself make of it.

    Args:
        codes: (H, K, D).
        indices: (1, N): only codes among these count. None: all.
        limit: at most so many codes count, a random choice.

    Source: Shin et al., "Exploration into Translation-Equivariant Image Quantization", ICASSP 2023, equation 2.
    """
    codes = unit(codes)
    counted = codes.new_ones(codes.shape[:2])
    if indices is not None:
        counted = (_counts(indices, codes.size(1)) > 0).to(codes.dtype)
    if limit is not None and limit < codes.size(1):
        # One choice for all heads; codes that count come before those that do not.
        chosen = (torch.rand_like(counted[0]) + counted[0]).topk(limit).indices
        codes, counted = codes[:, chosen], counted[:, chosen]
    codes = codes * counted[..., None]
    with torch.autocast(codes.device.type, enabled=False):
        # The sum of squares over pairs of codes is also that over pairs of their dimensions.
        products = codes @ codes.mT if codes.size(1) < codes.size(2) else codes.mT @ codes
    n = counted[0].sum().clamp_min(1)
    return products.square().sum() / (codes.size(0) * n.square()) - 1 / n


def _counts(indices: Tensor, codes: int) -> Tensor:
    """indices (H, N), -1 for what does not count -> how often each code was chosen, (H, K) int64."""
    counts = indices.new_zeros(indices.size(0), codes + 1)
    return counts.scatter_add_(1, torch.where(indices < 0, codes, indices), torch.ones_like(indices))[:, :codes]
