"""Minimises a function of a vector that may be infinite where a solution runs away: L-BFGS, for ode_rnn.py.

torch.optim.LBFGS interpolates with whatever the closure returns: one infinite loss makes its parameters NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Evaluate = Callable[[Tensor], tuple[float, Tensor]]

_DECREASE, _CURVATURE = 1e-4, 0.9  # strong Wolfe: Nocedal and Wright's constants for quasi-Newton steps
_MOST_TRIALS = 25  # of a line search
_FIRST_CHANGE = 0.1  # of the element that changes most, tried before anything is known about curvature
_MOST_CHANGE = 0.5  # of the first trial along any other direction: coordinates are relative, 1 is much
_PAIRS = 20  # of steps and gradient differences


class Point(NamedTuple):
    """A step along a direction: its length, the loss there, its slope along the direction, the gradient."""

    length: float
    loss: float
    slope: float
    gradient: Tensor


def _direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """-H g with the inverse Hessian H that (step, gradient difference) pairs approximate."""
    q = gradient.clone()
    shares = []
    for s, y in reversed(pairs):
        share = s.dot(q) / y.dot(s)
        q -= share * y
        shares.append(share)
    if pairs:
        s, y = pairs[-1]
        q *= s.dot(y) / y.dot(y)
    for (s, y), share in zip(pairs, reversed(shares), strict=True):
        q += (share - y.dot(q) / y.dot(s)) * s
    return -q


def _between(low: Point, high: Point) -> float:
    """Where the cubic through both has its minimum, away from the ends; nearer to `low` if `high` is infinite."""
    width = high.length - low.length
    share = 0.2
    if math.isfinite(high.loss) and math.isfinite(high.slope):
        mean = low.slope + high.slope - 3 * (high.loss - low.loss) / width
        square = mean * mean - low.slope * high.slope
        share = 0.5
        if 0 <= square < math.inf:
            root = math.sqrt(square)
            below = high.slope - low.slope + 2 * root
            share = 1 - (high.slope + root - mean) / below if below else 0.5
    return low.length + width * min(max(share, 0.1), 0.9)


def _line_search(evaluate: Evaluate, u: Tensor, direction: Tensor, here: Point, trial: float) -> Point | None:
    """A point with enough decrease and a small enough slope; else the best that has enough decrease; else None."""
    low, high = here, None
    for _ in range(_MOST_TRIALS):
        loss, gradient = evaluate(u + trial * direction)
        slope = gradient.dot(direction).item()
        finite = math.isfinite(loss) and math.isfinite(slope)
        point = Point(trial, loss if finite else math.inf, slope, gradient)
        if not finite or loss > here.loss + _DECREASE * trial * here.slope:
            high = point
        elif abs(slope) <= -_CURVATURE * here.slope:
            return point
        elif slope > 0:
            high = point
        else:
            low = point
        trial = 4 * trial if high is None else _between(low, high)
    return low if low.length > 0 else None


def minimise(
    evaluate: Evaluate,
    u: Tensor,
    first: tuple[float, Tensor],
    *,
    iterations: int,
    tolerance: float,
    after: Callable[[float], bool],
    enough: float,
) -> str:
    """Minimise; whoever wants the best point lets `evaluate` remember it.

    Args:
        evaluate: from (n,) to the loss, infinite where there is none, and its gradient (n,).
        u: (n,), where to start.
        first: what `evaluate` gives there, finite.
        iterations: at most.
        tolerance: converged when an iteration, and the next, change the loss by less than this share of it, or when the
            gradient is below this share of the loss.
        after: called after each iteration with its loss; true to stop.
        enough: a loss that is as good as none.

    Returns:
        Why it ended: "converged", "iterations", "stopped", or "no decrease" when nothing smaller was found even along
        the gradient.
    """
    loss, gradient = first
    pairs: list[tuple[Tensor, Tensor]] = []
    quiet = 0
    for _ in range(iterations):
        if loss <= enough or gradient.abs().max().item() <= tolerance * loss:
            return "converged"
        found = None
        while found is None:
            direction = _direction(gradient, pairs)
            slope = gradient.dot(direction).item()
            most = direction.abs().max().item()
            if slope < 0 and math.isfinite(most):
                trial = min(1.0, _MOST_CHANGE / most) if pairs else _FIRST_CHANGE / most
                found = _line_search(evaluate, u, direction, Point(0.0, loss, slope, gradient), trial)
            if found is None:
                if not pairs:
                    return "no decrease"
                pairs = []
        step = found.length * direction
        difference = found.gradient - gradient
        if step.dot(difference) > torch.finfo(u.dtype).eps * difference.dot(difference):
            pairs = [*pairs[1 - _PAIRS :], (step, difference)]
        quiet = quiet + 1 if loss - found.loss <= tolerance * loss else 0
        u, loss, gradient = u + step, found.loss, found.gradient
        if after(loss):
            return "stopped"
        if quiet == 2:
            return "converged"
    return "iterations"
