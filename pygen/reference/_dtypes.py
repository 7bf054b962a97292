"""Which type an op computes in: 16-bit inputs are widened to float32, float32 and float64 stay."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widen(x: Tensor) -> Tensor:
    """`x` in the type that its op computes in."""
    return x.to(compute_dtype(x.dtype))
