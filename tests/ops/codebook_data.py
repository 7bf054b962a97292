"""Vectors and codebooks that make a nearest code hard to find, and a float64 brute force that knows when it is sure.

Used by the tests of the search and of what is built on it. The brute force is plain torch, without pygen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

METRICS = ("euclidean", "cosine", "dot")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A gap between two scores that no float64 arithmetic mistakes, relative to what is summed: 4096 terms of half an
# epsilon each are 5e-13.
SURE = 1e-12


# ---- sets ------------------------------------------------------------------------------------------------------------
# Each maker gets sizes, a dtype and a seeded generator and returns x (N, D) and codebook (K, D).

Maker = Callable[[int, int, int, torch.dtype, torch.Generator], tuple[Tensor, Tensor]]


def _randn(g: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=g, dtype=torch.float64)


def _pick(g: torch.Generator, rows: Tensor, count: int) -> Tensor:
    return rows[torch.randint(len(rows), (count,), generator=g)]


def _to(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    largest = torch.finfo(dtype).max
    return tuple(t.clamp(-largest, largest).to(dtype) for t in tensors)


def stepped(x: Tensor, steps: Tensor | int) -> Tensor:
    """x moved by so many units in the last place, away from zero for positive steps; x normal and not at the end."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.contiguous().view(whole) + torch.as_tensor(steps).to(whole)).view(x.dtype)


def scaled(size: float) -> Maker:
    """Gaussian, of one size."""
    return lambda n, k, d, dtype, g: _to(dtype, size * _randn(g, n, d), size * _randn(g, k, d))


def offset(by: float) -> Maker:
    """Gaussian, far from the origin."""
    return lambda n, k, d, dtype, g: _to(dtype, by + _randn(g, n, d), by + _randn(g, k, d))


def clustered(n, k, d, dtype, g):
    centres = 10 * _randn(g, 5, d)
    return _to(dtype, _pick(g, centres, n) + 0.1 * _randn(g, n, d), _pick(g, centres, k) + 0.1 * _randn(g, k, d))


def duplicates(n, k, d, dtype, g):
    return _to(dtype, _randn(g, n, d), _pick(g, _randn(g, max(1, k // 3), d), k))


def all_equal(n, k, d, dtype, g):
    return _to(dtype, _randn(g, n, d), _randn(g, 1, d).repeat(k, 1))


def one_ulp_everywhere(n, k, d, dtype, g):
    """Codes in threes: one has all coordinates a unit in the last place below, and one above, the middle's."""
    (base,) = _to(dtype, _randn(g, (k + 2) // 3, d))
    codebook = torch.cat([stepped(base, by) for by in (1, -1, 0)])[:k]
    return (_pick(g, base, n).double() + 0.3 * _randn(g, n, d)).to(dtype), codebook


def one_ulp_in_one(n, k, d, dtype, g):
    """Codes in threes that differ in one coordinate, by a unit in the last place."""
    (base,) = _to(dtype, _randn(g, (k + 2) // 3, d))
    which = torch.zeros_like(base, dtype=torch.int64)
    which[torch.arange(len(base)), torch.randint(d, (len(base),), generator=g)] = 1
    codebook = torch.cat([stepped(base, by * which) for by in (1, -1, 0)])[:k]
    return (_pick(g, base, n).double() + 0.3 * _randn(g, n, d)).to(dtype), codebook


def mixed_norms(n, k, d, dtype, g):
    """Norms from a thousandth to a thousand."""

    def rows(count):
        return _randn(g, count, d) * 10 ** (6 * torch.rand(count, 1, generator=g, dtype=torch.float64) - 3)

    return _to(dtype, rows(n), rows(k))


def one_huge(n, k, d, dtype, g):
    """One code and one row that dwarf all others."""
    x, codebook = _randn(g, n, d), _randn(g, k, d)
    size = min(1e30, torch.finfo(dtype).max / 16)
    x[n // 2 : n // 2 + 1] *= size
    codebook[k // 2] *= size
    return _to(dtype, x, codebook)


def huge_coordinate(n, k, d, dtype, g):
    """One coordinate of all is huge and the same; the others decide."""
    x, codebook = _randn(g, n, d), _randn(g, k, d)
    x[:, 0] = codebook[:, 0] = min(1e12, torch.finfo(dtype).max / 16)
    return _to(dtype, x, codebook)


def denormal(n, k, d, dtype, g):
    size = torch.finfo(dtype).smallest_normal / 16
    if dtype == torch.float64:
        size = torch.finfo(torch.float32).smallest_normal / 16
    return _to(dtype, size * _randn(g, n, d), size * _randn(g, k, d))


def overflowing(n, k, d, dtype, g):
    """As large as the dtype holds: sums of squares are beyond float32."""
    size = float(torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max)
    uniform = [2 * torch.rand(count, d, generator=g, dtype=torch.float64) - 1 for count in (n, k)]
    return _to(dtype, *(size * u for u in uniform))


def integers(n, k, d, dtype, g):
    """Small integers: many codes are exactly as near as the nearest."""
    return _to(dtype, *(torch.randint(-2, 3, (count, d), generator=g).double() for count in (n, k)))


def midpoints(n, k, d, dtype, g):
    """Half way between two codes, exactly."""
    codebook = torch.randint(-32, 33, (k, d), generator=g).double() / 16
    return _to(dtype, (_pick(g, codebook, n) + _pick(g, codebook, n)) / 2, codebook)


def near_midpoints(n, k, d, dtype, g):
    """Half way between two codes, but for the rounding."""
    (codebook,) = _to(dtype, _randn(g, k, d))
    return ((_pick(g, codebook, n).double() + _pick(g, codebook, n).double()) / 2).to(dtype), codebook


def rows_are_codes(n, k, d, dtype, g):
    (codebook,) = _to(dtype, _randn(g, k, d))
    return _pick(g, codebook, n), codebook


def zeros(n, k, d, dtype, g):
    """Zero vectors among the rows and, twice, among the codes."""
    x, codebook = _randn(g, n, d), _randn(g, k, d)
    x[::2] = 0
    codebook[k // 3] = codebook[k // 2] = 0
    return _to(dtype, x, codebook)


def opposite(n, k, d, dtype, g):
    """Rows on one side of the origin and codes on the other: a code of zeros that padding adds would win."""
    away = _randn(g, 1, d).sign()
    return _to(dtype, 10 * away + _randn(g, n, d), -10 * away + _randn(g, k, d))


def shell(n, k, d, dtype, g):
    """Rows next to the centre of a sphere of codes: low precision leaves every code in doubt."""
    codebook = _randn(g, k, d)
    return _to(dtype, 1e-6 * _randn(g, n, d), codebook / codebook.norm(dim=1, keepdim=True))


def approaching(n, k, d, dtype, g):
    """Every code is nearer than the one before: a running best changes at every step."""
    along = torch.linspace(3, 1, k, dtype=torch.float64)[:, None]
    towards = _randn(g, 1, d)
    return _to(dtype, towards + 0.01 * _randn(g, n, d), along * towards)


def receding(n, k, d, dtype, g):
    x, codebook = approaching(n, k, d, dtype, g)
    return x, codebook.flip(0).contiguous()


def not_finite(n, k, d, dtype, g):
    x, codebook = _to(dtype, _randn(g, n, d), _randn(g, k, d))
    for tensor in (x, codebook):
        for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
            tensor[i::7, (3 * i) % d] = bad
    return x, codebook


def below_float32(n, k, d, dtype, g):
    """Float64 values that float32 cannot tell apart."""
    base = _randn(g, 1, d)
    return base + 1e-10 * _randn(g, n, d), base + 1e-10 * _randn(g, k, d)


KINDS: dict[str, Maker] = {
    "random": scaled(1.0),
    "clustered": clustered,
    "duplicates": duplicates,
    "all equal": all_equal,
    "one ulp everywhere": one_ulp_everywhere,
    "one ulp in one": one_ulp_in_one,
    "offset 1e4": offset(1e4),
    "offset 1e6": offset(1e6),
    "huge 1e18": scaled(1e18),
    "huge 1e30": scaled(1e30),
    "overflowing": overflowing,
    "tiny 1e-20": scaled(1e-20),
    "denormal": denormal,
    "mixed norms": mixed_norms,
    "one huge": one_huge,
    "huge coordinate": huge_coordinate,
    "integers": integers,
    "midpoints": midpoints,
    "near midpoints": near_midpoints,
    "rows are codes": rows_are_codes,
    "zeros": zeros,
    "opposite": opposite,
    "shell": shell,
    "approaching": approaching,
    "receding": receding,
    "not finite": not_finite,
    # float64 alone
    "below float32": below_float32,
    "squares overflow": scaled(1e160),
    "squares vanish": scaled(1e-170),
}
FLOAT64_KINDS = {"below float32", "squares overflow", "squares vanish"}
# A few of them, for where each costs seconds.
FEW_KINDS = ("random", "duplicates", "one ulp everywhere", "offset 1e4", "integers", "opposite", "not finite")


def dtypes_of(kind: str) -> tuple[torch.dtype, ...]:
    """Of every kind all dtypes; what is out of a dtype's range becomes its largest numbers or zeros: ties, mostly."""
    return (torch.float64,) if kind in FLOAT64_KINDS else FLOATS


def codebook_set(kind: str, n: int, k: int, d: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, D) and codebook (K, D) of a kind."""
    return KINDS[kind](n, k, d, dtype, torch.Generator().manual_seed(seed))


# ---- the brute force -------------------------------------------------------------------------------------------------


def _unit_and_size(x: Tensor) -> tuple[float, float]:
    """(the largest power of two that divides every element, the largest magnitude)."""
    x = x.double()[x != 0]
    if not x.numel():
        return 1.0, 0.0
    mantissa, exponent = torch.frexp(x)
    whole = (mantissa * 2**53).long()
    lowest = (whole & -whole).double().log2() + exponent - 53
    return 2.0 ** lowest.min().item(), x.abs().max().item()


def scores_are_exact(x: Tensor, codebook: Tensor, metric: str) -> bool:
    """Whether float64 adds D products of differences, or of values, without a rounding, in whatever order.

    Of cosines: whether dot^2 / |c|^2, a quotient of integers, is the same number only where it is the same quotient;
    two different ones differ by one over both denominators.
    """
    unit, size = _unit_and_size(torch.cat((x.double().flatten(), codebook.double().flatten())))
    span = 2 * size / unit
    largest = x.size(-1) * span * span
    return largest < (2**17 if metric == "cosine" else 2**52)


def _scores(x: Tensor, codebook: Tensor, metric: str, exact: bool) -> tuple[Tensor, Tensor]:
    """(N, K) scores, least for the nearest, and (N, K) the size of what their rounding is relative to."""
    if metric == "euclidean":
        score = ((x[:, None] - codebook) ** 2).sum(-1)
        return score, score
    dot, sizes = (x[:, None] * codebook).sum(-1), (x[:, None] * codebook).abs().sum(-1)
    if metric == "dot":
        return -dot, sizes
    if exact:
        squares = (codebook**2).sum(-1)
        return -dot * dot.abs() / torch.where(squares > 0, squares, 1), sizes
    norms = codebook.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return -dot / norms, sizes / norms


def brute_force(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(index of the nearest code (N,), whether that is certain (N,)) by float64 arithmetic in no particular order.

    Certain are rows whose runners-up are exact copies of the winner or farther by more than any rounding, and all rows
    of values so short that nothing is rounded. Rows that have no nearest code get -1, with certainty.
    """
    usable = codebook.isfinite().all(-1)
    values = torch.unique(codebook.double().nan_to_num(), dim=0, return_inverse=True)[1]
    exact = scores_are_exact(x[x.isfinite().all(-1)], codebook[usable], metric)
    found, certain = [], []
    for rows in x.double().split(max(1, (1 << 22) // codebook.numel())):
        scores, sizes = _scores(rows, codebook.double(), metric, exact)
        scores = torch.where(usable, scores, torch.inf)
        best = scores.amin(1, keepdim=True)
        slack = 0 if exact else SURE * torch.maximum(sizes, sizes.gather(1, scores.argmin(1, keepdim=True)))
        near = (scores - best <= slack) & usable
        index = near.to(torch.uint8).argmax(1)
        runners_up = near & (values != values[index][:, None])
        known = torch.full((len(rows),), True) if exact else ~runners_up.any(1) & best[:, 0].isfinite()
        nobody = ~rows.isfinite().all(-1) | ~usable.any()
        # Whatever a row of zeros is multiplied with is exact.
        found.append(torch.where(nobody, -1, index))
        certain.append(known | nobody | ((rows == 0).all(-1) & (metric != "euclidean")))
    return torch.cat(found), torch.cat(certain)


def distance(x: Tensor, code: Tensor, metric: str) -> Tensor:
    """(...,) float64 distances of x and code (..., D)."""
    x, code = x.double(), code.double()
    if metric == "euclidean":
        return ((x - code) ** 2).sum(-1).sqrt()
    dot = (x * code).sum(-1)
    if metric == "dot":
        return -dot
    norms = x.norm(dim=-1) * code.norm(dim=-1)
    return 1 - torch.where(norms > 0, dot / norms.clamp_min(torch.finfo(torch.float64).tiny), 0)
