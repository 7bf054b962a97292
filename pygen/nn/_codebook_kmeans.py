"""K-Means for the first codes of a codebook, over one process or several. `pygen.cluster` has K-Means for its own sake:
seeding, convergence, weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen import ops
from pygen.nn._codebook_sync import all_reduce_packed, sample_rows

# A vector shorter than this is scaled by its inverse rather than to length 1.
UNIT_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """x (..., D) scaled to length 1."""
    return F.normalize(x, dim=-1, eps=UNIT_EPS)


def statistics_of_heads(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """x (H, N, D), indices (H, N), -1 for rows left out -> counts (H, K) and sums (H, K, D), float32 at least."""
    heads = x.size(0)
    if heads > 1:
        first = torch.arange(heads, device=x.device)[:, None] * num_codes
        indices = torch.where(indices < 0, -1, indices + first)
    counts, sums = ops.codebook_statistics(x.flatten(0, 1), indices.flatten(), heads * num_codes)
    return counts.view(heads, num_codes).to(sums.dtype), sums.view(heads, num_codes, -1)


def kmeans(
    x: Tensor, valid: Tensor, num_codes: int, iterations: int, *, cosine: bool, together: bool
) -> tuple[Tensor, Tensor, int] | None:
    """Lloyd's iterations from random vectors; a code that nothing chooses stays where it is.

    Args:
        x: (H, N, D), of length 1 for `cosine`.
        valid: (H, N), which of them count.
        together: over the vectors of all processes, with the same result on each.

    Returns:
        (means (H, K, D), how many vectors chose each (H, K), and how many vectors there are); None without any.
    """

    def over_processes(*tensors: Tensor) -> list[Tensor]:
        return all_reduce_packed(tensors) if together else list(tensors)

    vectors = int(over_processes(valid.sum(-1))[0].min())
    if vectors == 0:
        return None
    means = (sample_rows if together else _rows)(x, valid, num_codes)
    counts = means.new_zeros(means.shape[:2])
    for _ in range(iterations):
        indices = ops.nearest_codebook(x, means, metric="dot" if cosine else "euclidean", mask=valid)
        counts, sums = over_processes(*statistics_of_heads(x, indices, num_codes))
        new = sums / counts.clamp_min(1)[..., None]
        means = torch.where(counts[..., None] > 0, unit(new) if cosine else new, means)
    return means, counts, vectors


def _rows(x: Tensor, valid: Tensor, count: int) -> Tensor:
    """Random rows of each head of x (H, N, D), different ones while there are enough -> (H, count, D)."""
    chosen = []
    for rows, mask in zip(x, valid, strict=True):
        rows = rows[mask]
        n = len(rows)
        order = torch.randperm(n, device=x.device) if n >= count else torch.randint(n, (count,), device=x.device)
        chosen.append(rows[order[:count]])
    return torch.stack(chosen)
