"""Codes drawn at random, the near ones more often: what vector_quantize.py's stochastic codes are in place of the
nearest."""

import torch
from torch import Tensor

# Elements of the largest intermediate tensor of `sample_codes`.
CHUNK = 1 << 22


def sample_codes(x: Tensor, codebook: Tensor, mask: Tensor | None, temperature: float, *, cosine: bool) -> Tensor:
    """A code for each vector, with probability proportional to exp(score / temperature).

    The score is -|x - c|, or x.c for cosine.

    x: (H, N, D), codebook: (H, K, D), mask: (H, N) -> indices (H, N), -1 where masked or not finite.
    """
    x = x.to(codebook.dtype)
    rows = max(1, CHUNK // max(1, codebook.size(0) * codebook.size(1)))
    drawn = []
    for part in x.split(rows, 1):
        scores = _scores(part, codebook, cosine)
        # The maximum of logits with Gumbel noise, -log E of an exponential E, is a sample of their softmax.
        noise = torch.empty_like(scores).exponential_()
        drawn.append((scores / temperature - noise.log()).argmax(-1))
    indices = torch.cat(drawn, 1)
    chosen = x.isfinite().all(-1)
    return torch.where(chosen if mask is None else chosen & mask, indices, -1)


def _scores(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    # Autocast would take the products in 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        products = x @ codebook.mT
        if cosine:
            return products
        squared = x.square().sum(-1, keepdim=True) - 2 * products + codebook.square().sum(-1)[:, None]
        return -squared.clamp_min(0).sqrt()
