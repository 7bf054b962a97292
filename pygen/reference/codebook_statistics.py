"""How often each code was chosen and the sum of what chose it, in plain PyTorch."""

import torch
from torch import Tensor


def codebook_statistics(x: Tensor, indices: Tensor, num_codes: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums (K, D), counts (K,) int64) of x (N, D) by indices (N,); see `pygen.ops.codebook_statistics`."""
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    if indices.numel() and (int(indices.min()) < -1 or int(indices.max()) >= num_codes):
        raise RuntimeError(
            f"codebook_statistics: indices must be in [-1, {num_codes - 1}], got {int(indices.min())} to "
            f"{int(indices.max())}"
        )
    chosen = indices >= 0
    counts = torch.bincount(indices[chosen], minlength=num_codes)
    sums = torch.zeros((num_codes, x.size(1)), dtype=torch.float64, device=x.device)
    sums = sums.index_add(0, indices[chosen], x[chosen].double())
    return sums.to(torch.float64 if x.dtype == torch.float64 else torch.float32), counts
