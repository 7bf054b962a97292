"""Soft top-k: k of n elements chosen softly, by a threshold or as the mean of a random subset. `smooth.py` exports it;
`_smooth_rows.py` has its checks."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from pygen.functional._smooth_rows import check_row, length
from pygen.reference._dtypes import widen

_METHODS = ("threshold", "elementary_symmetric")
# Beyond this a sigmoid is 0 or 1 in float64 and all its derivatives are 0; within it no difference overflows.
_SATURATED = 1e4
# The equation for the threshold, in logarithms, has a slope between 1 and 2: a step of 2/3 of the residual divides the
# error by 3 at least, and one of Newton's takes e to e^2 / 4 at most. A start at most log(n) away, 16 for n = 10^7,
# comes to 0.6 by the first and to 0.09, 2e-3, 1e-6, 3e-13, 2e-26 by the others.
_CHORD_STEPS, _NEWTON_STEPS = 3, 5


def soft_top_k(x: Tensor, k: int, dim: int = -1, *, method: str = "threshold", temperature: float = 1.0) -> Tensor:
    r"""Weights in [0, 1] that add up to k along a dimension: the indicator of the k largest elements, smoothed.

    `method="threshold"`, with :math:`\tau` such that the sum is k, and its derivative by the implicit function theorem:

    .. math::
        p_i = \sigma\!\left(\frac{x_i - \tau}{T}\right), \qquad \sum_i p_i = k, \qquad
        \frac{\partial \tau}{\partial x_j} = \frac{p_j (1 - p_j)}{\sum_i p_i (1 - p_i)}

    `method="elementary_symmetric"`: the chance that i is in a subset S of k elements, drawn with a probability
    proportional to :math:`\exp(\sum_{i \in S} x_i / T)`. With :math:`w_i = \exp(x_i / T)` and :math:`e_k` the
    elementary symmetric polynomial, the sum over all subsets of the product of their weights,

    .. math::
        p_i = \frac{w_i\, e_{k-1}(w \text{ without } w_i)}{e_k(w)}

    k = 1 is softmax. It takes O(n min(k, n - k)) time and memory, the threshold O(n log n) for a sort.

    Error: with :math:`g = x_{(k)} - x_{(k+1)}` the gap between the last element that is chosen and the first that is
    not, and :math:`\delta = \sqrt{k (n - k)}\, e^{-g / 2T}`, the sum of :math:`|p_i - [i \text{ among the k largest}]|`
    is at most :math:`2 \delta` by threshold and at most :math:`2 \delta^2` by elementary symmetric polynomials; that of
    a single element at most half of it.

    Args:
        x: any shape, floating point.
        k: from 0 to the n elements along `dim`.
        dim: the dimension to choose along.
        method: "threshold" or "elementary_symmetric".
        temperature: T; the hard choice as it goes to 0.

    Returns:
        A tensor of x's shape and dtype, computed in float32 for 16-bit x. An element of -inf has weight 0. Equal
        elements have equal weights. A row that has fewer than k elements above -inf, or NaN or +inf, is NaN.

    Raises:
        ValueError: k out of range, an unknown method, a temperature that is not positive and finite.
        TypeError: x is not floating point, k is not an integer. IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> x = torch.tensor([2.0, 0.0, 1.0, -1.0])
        >>> smooth.soft_top_k(x, 2, temperature=0.3)
        tensor([0.9933, 0.1589, 0.8411, 0.0067])
        >>> smooth.soft_top_k(x, 2, method="elementary_symmetric").sum()
        tensor(2.)

    Source: Amos, Koltun, Kolter, "The limited multi-label projection layer", 2019 (the threshold); Chen, Dempster, Liu,
    "Weighted finite population sampling to maximize entropy", Biometrika 1994, and Berrada, Zisserman, Kumar, "Smooth
    loss functions for deep top-k classification", ICLR 2018 (the polynomials).
    """
    check_row("soft_top_k", x, dim, temperature)
    n = length(x, dim)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"soft_top_k: k must be an integer, got {type(k).__name__}")
    if not 0 <= k <= n:
        raise ValueError(f"soft_top_k: k must be in [0, {n}] for x of shape {tuple(x.shape)}, got {k}")
    if method not in _METHODS:
        raise ValueError(f"soft_top_k: method must be one of {', '.join(_METHODS)}, got {method!r}")
    if not x.dim():
        return soft_top_k(x.reshape(1), k, 0, method=method, temperature=temperature).reshape(())
    rows = widen(x).movedim(dim, -1)
    u = _centred(rows, k, temperature)
    if k in (0, n):
        p = torch.where(u.isnan(), u, float(k == n))
    elif method == "threshold":
        p = torch.sigmoid(u - _level(u, k))
    else:
        # The level changes nothing but the scale of what is summed, hence no gradient through it.
        p = _subset_marginals(u - _level(u.detach(), k), k)
    return p.movedim(-1, dim).to(x.dtype)


def _centred(x: Tensor, k: int, temperature: float) -> Tensor:
    """(x - c) / temperature, c half-way between the last that is chosen and the first that is not; within +-1e4.

    A row that has no choice, with k elements above -inf, is at the ends. One that cannot choose is NaN.
    """
    n = x.size(-1)
    ordered = x.detach().sort(-1, descending=True).values
    last = ordered[..., max(k - 1, 0), None]
    first = ordered[..., min(k, n - 1), None]
    impossible = ~(ordered.amax(-1, keepdim=True) < math.inf)
    if k:
        impossible = impossible | (last == -math.inf)
    chosen = last / 2 + first / 2
    chosen = torch.where(chosen.isfinite(), chosen, 0.0)  # the rows that the next lines replace
    u = ((x - chosen) / temperature).clamp(-_SATURATED, _SATURATED)
    ends = torch.where(x.detach() == -math.inf, -_SATURATED, _SATURATED)
    u = torch.where((first == -math.inf) & (last > -math.inf), ends, u)
    return torch.where(impossible, math.nan, u)


# ---- threshold


def _log_slope(z: Tensor) -> Tensor:
    """Logarithm of the derivative of a sigmoid, p (1 - p)."""
    return logsigmoid(z) + logsigmoid(-z)


@torch.no_grad()
def _solve_level(u: Tensor, k: int) -> Tensor:
    """v (..., 1) with sum sigmoid(u - v) = k, for rows centred as `_centred` does, 0 < k < n.

    What the lower n - k elements have, E, is what the upper k lack, D: log E = log D. Neither side cancels or vanishes
    where every p is close to 0 or 1. v is between -log(k) and log(n - k).
    """
    ordered = u.sort(-1, descending=True).values
    upper, lower = ordered[..., :k], ordered[..., k:]
    v = torch.zeros_like(u[..., :1])
    for step in range(_CHORD_STEPS + _NEWTON_STEPS):
        has, lacks = logsigmoid(lower - v), logsigmoid(v - upper)
        log_e, log_d = has.logsumexp(-1, keepdim=True), lacks.logsumexp(-1, keepdim=True)
        slope = torch.full_like(v, 1.5)
        if step >= _CHORD_STEPS:
            # d log E / dv is the mean of 1 - p under weights p, and log D's that of p under weights 1 - p.
            part_e = (has - log_e).exp() * torch.sigmoid(v - lower)
            part_d = (lacks - log_d).exp() * torch.sigmoid(upper - v)
            slope = part_e.sum(-1, keepdim=True) + part_d.sum(-1, keepdim=True)
        v = v + (log_e - log_d) / slope
    return v


class _Level(torch.autograd.Function):
    """`_solve_level` with its derivative, that of an implicit function: dv = sum_j s_j du_j, s = w / sum w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, k: int) -> Tensor:
        return _solve_level(u, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        u, v = ctx.saved_tensors
        # A softmax of logarithms: the slopes themselves vanish together where all p are close to 0 or 1.
        return grad * _log_slope(u - v).softmax(-1), None


class _LevelWithTangent(_Level):
    """The same with a forward-mode derivative, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        u, v = ctx.saved_tensors
        return (tangent * _log_slope(u - v).softmax(-1)).sum(-1, keepdim=True)


def _level(u: Tensor, k: int) -> Tensor:
    function = _Level if torch.compiler.is_compiling() else _LevelWithTangent
    return function.apply(u, k)


# ---- elementary symmetric polynomials


def _subset_marginals(z: Tensor, k: int) -> Tensor:
    """(..., n) chances of being in the subset, from z = log w up to a constant.

    The n elements as independent coins of chance sigmoid(z), of which we know that k came up: the same distribution,
    but every sum is one of probabilities. The constant is such that k is the expected number, so that what it is
    divided by, the chance of exactly k, is at least 1 / (n + 1): nothing overflows, and what underflows does not count.
    """
    n = z.size(-1)
    if 2 * k > n:  # the n - k that are left out are fewer
        left, chosen = _with_and_without(-z, n - k)
    else:
        chosen, left = _with_and_without(z, k)
    return chosen / (chosen + left)


def _with_and_without(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every coin the chances of k successes in all, of which it is one, and of which it is none.

    Polynomials whose coefficient of degree j is the chance of j successes, multiplied up a binary tree; then down it,
    for every node that of all coins outside of it. Degrees above k are left out, hence O(n k).
    """
    n = z.size(-1)
    size = 1 << (n - 1).bit_length()
    heads, tails = torch.sigmoid(z), torch.sigmoid(-z)  # not 1 - heads, which would cancel
    level = torch.stack((pad(tails, (0, size - n), value=1.0), pad(heads, (0, size - n))), -1)
    levels = [level]
    while level.size(-2) > 2:
        level = _product(level[..., 0::2, :], level[..., 1::2, :], k)
        levels.append(level)
    # rest[a]: the chance of k - a successes outside of a node. Outside of the root there are no coins.
    rest = pad(torch.ones_like(z[..., :1]), (k, 0)).unsqueeze(-2)
    for level in reversed(levels):
        rest = _rest_of_children(rest, level)
    rest = rest[..., :n, :]
    return heads * rest[..., 1], tails * rest[..., 0]


def _product(a: Tensor, b: Tensor, k: int) -> Tensor:
    """(..., m, c) of polynomials with c coefficients each, to degree k."""
    c = a.size(-1)
    outer = a.unsqueeze(-1) * b.unsqueeze(-2)
    # Rows of c and c zeros, read as rows of 2c - 1: each begins one place further right. Then a column is a degree.
    shifted = pad(outer, (0, c)).flatten(-2)[..., :-c].unflatten(-1, (c, 2 * c - 1))
    return shifted.sum(-2)[..., : k + 1]


def _rest_of_children(rest: Tensor, children: Tensor) -> Tensor:
    """(..., m, *) of m nodes and the polynomials (..., 2m, c) of their children: (..., 2m, c) outside of each child.

    r_a = sum_b R_{a+b} s_b, with s the polynomial of the other child.
    """
    c = children.size(-1)
    width = 2 * c - 1
    rest = pad(rest, (0, max(width - rest.size(-1), 0)))[..., :width]
    # Repeated without end and read in rows of one more: each begins one place further left, at R_a.
    repeated = rest.unsqueeze(-2).expand(*rest.shape[:-1], c + 1, width).flatten(-2)
    windows = repeated[..., : c * 2 * c].unflatten(-1, (c, 2 * c))[..., :c]
    siblings = children.unflatten(-2, (-1, 2)).flip(-2)
    return (windows.unsqueeze(-3) * siblings.unsqueeze(-2)).sum(-1).flatten(-3, -2)
