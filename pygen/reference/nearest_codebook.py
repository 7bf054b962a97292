"""Nearest code by float64 brute force: the definition of what every kernel returns, in plain PyTorch."""

import torch
from torch import Tensor

METRICS = ("euclidean", "cosine", "dot")

# Sums run in this many interleaved lanes, which are then added in halves: one vector register, and the same order on
# every device. The order matters where float64 itself rounds.
LANES = 8
# Elements of the largest intermediate tensor.
CHUNK = 1 << 22


def _sum(terms: Tensor) -> Tensor:
    """Over the last dimension, in float64, in the order that all kernels share."""
    terms = torch.nn.functional.pad(terms, (0, -terms.size(-1) % LANES))
    lanes = terms.new_zeros((*terms.shape[:-1], LANES))
    for part in terms.split(LANES, -1):
        lanes = lanes + part
    for half in (4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _keys(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """x (N, 1, D), codebook (1, K, D), both float64 -> (N, K): what is smallest for the nearest code."""
    if metric == "euclidean":
        return _sum((x - codebook).square())
    dot = _sum(x * codebook)
    if metric == "dot":
        return -dot
    # Of the cosine what depends on the code, squared with its sign: without a root, integers tie exactly.
    norm = _sum(codebook.square())
    return torch.where(norm > 0, -dot * dot.abs() / norm, torch.zeros_like(dot))


def _distances(x: Tensor, code: Tensor, metric: str) -> Tensor:
    """x and code (..., D) float64 -> (...): the distance that is reported."""
    if metric == "euclidean":
        return _sum((x - code).square()).sqrt()
    dot = _sum(x * code)
    if metric == "dot":
        return -dot
    norms = _sum(x.square()).sqrt() * _sum(code.square()).sqrt()
    return 1 - torch.where(norms > 0, dot / norms, torch.zeros_like(dot))


def _nearest(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """x (N, D), codebook (K, D), float64 -> (N,): indices, -1 where there is none."""
    usable = codebook.isfinite().all(-1)
    found = []
    for rows in x.split(max(1, CHUNK // max(1, codebook.numel()))):
        keys = _keys(rows[:, None], codebook[None], metric)
        # Beyond float64's range every distance is infinite, and the first code is the nearest.
        keys = torch.where(usable, keys, torch.inf)
        best = torch.where(keys.isnan(), torch.inf, keys).argmin(1)
        first = usable.to(torch.uint8).argmax()
        found.append(torch.where(usable[best], best, first))
    indices = torch.cat(found)
    return torch.where(x.isfinite().all(-1) & usable.any(), indices, -1)


def nearest_codebook(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, return_distance: bool, return_candidates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(distance, indices, candidates) of x (H, N, D) in codebook (H, K, D); see `pygen.ops.nearest_codebook`.

    Masked rows get -1 and distance 0. What was not asked for is empty. Every code is a candidate here.
    """
    heads, n, _ = x.shape
    # One row of all the sums of the other dimensions: heads are few.
    indices = (
        torch.stack([_nearest(rows.double(), codes.double(), metric) for rows, codes in zip(x, codebook, strict=True)])
        if heads
        else x.new_empty((0, n), dtype=torch.int64)
    )
    if mask is not None:
        indices = torch.where(mask, indices, -1)
    distance = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if return_distance:
        chosen = codebook.double().gather(1, indices.clamp_min(0)[..., None].expand_as(x))
        distance = _distances(x.double(), chosen, metric).to(distance.dtype)
        distance = torch.where(indices < 0, torch.nan, distance)
        if mask is not None:
            distance = torch.where(mask, distance, 0)
    candidates = x.new_empty(0, dtype=torch.int32)
    if return_candidates:
        candidates = torch.where(indices < 0, 0, codebook.size(1)).to(torch.int32)
    return distance, indices, candidates
