"""The chemical master equation, solved by finite state projection: probabilities of states instead of trajectories.

The sets of states and their matrices are in _states.py; simulate.py samples the same process.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pygen.ssa._arguments import grid, initial_rows
from pygen.ssa._states import MOST_LAYERS, Array, Chain, Collision, Projection, StateSet
from pygen.ssa.expression import Expr, evaluate, parse, substitute, uses_time
from pygen.ssa.network import Network

METHODS = ("auto", "uniformization", "expm_multiply")
SMALLEST_TOLERANCE = 1e-12  # below it rounding, not truncation, is what a bound is made of
UNIT = 2.0**-53  # half the distance from 1 to the next float64
# Jumps of the uniformised chain that one step spans on average. Long steps waste fewer products (a step of 512 takes
# 670, eight of 64 take 1,040), short ones need fewer states; exp(-512) is well within float64's range.
SHORTEST_STEP, FIRST_STEP, LONGEST_STEP = 1.0, 64.0, 512.0
TAIL_SHARE = 0.05  # of a step's allowance, for jumps beyond the last product
DROP_SHARE = 0.1  # of the budget at hand, for states dropped as negligible
DROP_AT_LEAST = 0.5  # of the set; dropping fewer is not worth a new matrix
FIRST_LAYERS = 4  # jumps ahead of the set; doubled up to MOST_LAYERS when that was not enough
Result = TypeVar("Result")


@dataclass(frozen=True)
class Distribution:
    """Probabilities of the states of a network.

    Attributes:
        net: the network.
        states: (n, S) int64, one row per state, in lexicographic order.
        probabilities: float64, (T, n) at times or (n,) for a stationary distribution.
        values: the parameters' values that were used.
    """

    net: Network
    states: Array
    probabilities: Array
    values: Mapping[str, float]

    def _column(self, species: str) -> Array:
        if species not in self.net.species:
            raise ValueError(f"species: expected one of {', '.join(self.net.species)}, got {species!r}")
        return self.states[:, self.net.species.index(species)]

    def marginal(self, species: str) -> tuple[Array, Array]:
        """The counts that one species has, (V,) int64, and their probabilities, (T, V) or (V,)."""
        counts, inverse = np.unique(self._column(species), return_inverse=True)
        rows = np.atleast_2d(self.probabilities)
        p = np.stack([np.bincount(inverse, row, minlength=len(counts)) for row in rows])
        return counts, p.reshape(*self.probabilities.shape[:-1], len(counts))

    def _normalised(self) -> Array:
        return self.probabilities / self.probabilities.sum(-1, keepdims=True)

    def mean(self) -> Array:
        """Mean counts, (T, S) or (S,), of the states kept: their probabilities are divided by their sum."""
        return self._normalised() @ self.states

    def covariance(self) -> Array:
        """Covariances, (T, S, S) or (S, S), of the states kept."""
        p = np.atleast_2d(self._normalised())
        result = np.empty((len(p), len(self.net.species), len(self.net.species)))
        for k, row in enumerate(p):
            centred = self.states - row @ self.states
            result[k] = (centred * row[:, None]).T @ centred
        return result.reshape(*self.probabilities.shape[:-1], *result.shape[1:])

    def std(self) -> Array:
        """Standard deviations, (T, S) or (S,), of the states kept."""
        return np.sqrt(np.diagonal(self.covariance(), axis1=-2, axis2=-1))

    def probability(self, condition: str) -> Array:
        """The probability of a condition such as ``"A > 5 and B == 0"``: (T,) or a number.

        The true one lies between this and this plus the bound.
        """
        counts = {name: self._column(name).astype(np.float64) for name in self.net.species}
        value = evaluate(_condition(self.net, condition, "probability"), {**self.values, **counts})
        holds = np.broadcast_to(value, len(self.states)) != 0
        return self.probabilities[..., holds].sum(-1)


@dataclass(frozen=True)
class CmeSolution(Distribution):
    """The solution of a master equation at given times: see `solve_cme`.

    Attributes:
        t: (T,) float64.
        bound: (T,) float64; the sum over all states of |true - computed probability| is at most this.
    """

    t: Array
    bound: Array


def _condition(net: Network, condition: str, where: str) -> Expr:
    """A condition on the state, with observables and rules written out."""
    expr = parse(condition)
    for name in reversed(net.observables):
        expr = substitute(expr, {name: net.observables[name]})
    expr = net.law(expr, where)
    if uses_time(expr):
        raise ValueError(f"{where}: expected a condition on the state alone, got {condition!r}")
    return expr


def need_scipy(caller: str) -> None:
    try:
        import scipy.sparse  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{caller}: needs scipy, which the extra 'ssa' brings: pip install 'pygen[ssa]'") from error


def _start(net: Network, initial: Any) -> tuple[Array, Array]:
    """The states at the start, (n, S) int64, and their probabilities, (n,) with sum 1."""
    if not isinstance(initial, tuple):
        return initial_rows(net.species, net.initial, initial, 1).astype(np.int64), np.ones(1)
    states = initial_rows(net.species, net.initial, initial[0], None).astype(np.int64)
    weights = np.asarray(initial[1], np.float64)
    if weights.shape != (len(states),) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(
            f"initial: expected ({len(states)},) probabilities >= 0 with a positive sum, got {weights} of shape "
            f"{weights.shape}"
        )
    return states, weights / weights.sum()


def with_new_keys(solve: Callable[[int], Result]) -> Result:
    """solve(seed), with the next seed where two states had the same key: one run in millions."""
    seed = 0
    while True:
        try:
            return solve(seed)
        except Collision:
            seed += 1


# ---- one step --------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """p: (n,) at the end, None where more was lost than allowed; lost: bound on the probability lost to truncation;
    rounding: bound on what rounding did; flow: (n,) how fast the states lost it, up to a factor."""

    p: Array | None
    lost: float
    rounding: float
    flow: Array


def _poisson(mean: float, allowance: float) -> tuple[Array, float]:
    """P(N = k) for k = 0..K, and a bound on P(N > K) that is at most the allowance, for a Poisson variable N."""
    length = int(mean + 12 * np.sqrt(mean) + 64)
    weights = np.exp(-mean) * np.cumprod(np.concatenate(([1.0], mean / np.arange(1.0, length))))
    # Beyond k > mean every weight is at most mean / (k + 2) times the one before it: a geometric series.
    k = np.arange(length - 1)
    rest = weights[1:] / np.maximum(1 - mean / (k + 2), 1e-300)
    enough = np.flatnonzero((k > mean) & (rest <= allowance))
    last = int(enough[0]) if len(enough) else length - 2
    return weights[: last + 1], float(rest[last])


def _by_uniformization(projection: Projection, p: Array, h: float, allowance: float) -> _Step:
    """exp(h A) p = sum_k Poisson(q h)_k P^k p with P = I + A / q and q the largest rate of leaving a state (Jensen).

    All terms are >= 0, so what is cut off is lost and nothing cancels: a product adds an error of at most
    `projection.roundings` unit roundoffs.
    """
    q, mass = projection.speed, float(p.sum())
    weights, remainder = _poisson(q * h, max(TAIL_SHARE * allowance, 1e-300))
    step = projection.uniformized()
    v = np.append(p, 0.0)  # and the sink, from which nothing returns
    total = weights[0] * v
    for k, weight in enumerate(weights[1:]):
        v = step @ v
        total += weight * v
        if k % 16 == 0 and total[-1] > allowance:
            break
    lost = float(total[-1]) + remainder * mass
    rounding = len(weights) * projection.roundings * UNIT * mass
    return _Step(total[:-1] if lost <= allowance else None, lost, rounding, total[:-1] * projection.out)


def _by_expm_multiply(projection: Projection, p: Array, h: float, allowance: float) -> _Step:
    """The same by scipy's expm_multiply, with a sink that collects what leaves.

    Its backward error is at the level of the unit roundoff (Al-Mohy, Higham 2011), which is what `rounding` says; this
    is no proof.
    """
    from scipy.sparse.linalg import expm_multiply

    n, q = len(projection), projection.speed
    end = expm_multiply(h * projection.generator(), np.append(p, 0.0), traceA=-h * float(projection.total.sum()))
    lost = max(float(end[n]), 0.0)
    end = np.maximum(end[:n], 0.0)
    rounding = (h * q * projection.roundings + n) * UNIT
    return _Step(end if lost <= allowance else None, lost, rounding, np.maximum(p, end) * projection.out)


# ---- the solver ------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    advance: Callable[[Projection, Array, float, float], _Step]
    begin: float
    end: float
    tolerance: float
    max_states: int


class _Solver:
    """p on an adaptive set of states, advanced from time to time."""

    def __init__(self, chain: Chain, states: Array, p: Array, seed: int, options: _Options) -> None:
        start = StateSet(states[:1], seed).extended(states)
        self.options, self.chain = options, chain
        self.p = np.bincount(start.locate(states), p, minlength=len(start))
        self.projection = Projection(chain, start)
        self.now, self.lost, self.rounding = options.begin, 0.0, 0.0
        self.step, self.layers = FIRST_STEP, FIRST_LAYERS

    def advance_to(self, end: float) -> None:
        """Bring p to the time `end`."""
        while self.now < end:
            speed = self.projection.speed
            if speed == 0:
                self.now = end
                break
            stop = min(self.now + self.step / speed, end)
            h = stop - self.now  # so that the steps add up to the whole time
            if h == 0:
                raise RuntimeError(
                    f"solve_cme: at time {self.now:g} a rate of {speed:g} is beyond float64's resolution"
                )
            step = self.options.advance(self.projection, self.p, h, self._budget(stop))
            if step.p is None:
                self._grow(step.flow)
                continue
            self.p, self.now = step.p, stop
            self.lost += step.lost
            self.rounding += step.rounding
            self.step = min(2 * self.step, LONGEST_STEP)
            self.layers = max(self.layers // 2, FIRST_LAYERS)
            self._drop()

    def _budget(self, time: float) -> float:
        """What may still be lost until `time`: the tolerance is spent in proportion to time."""
        options = self.options
        return options.tolerance * (time - options.begin) / (options.end - options.begin) - self.lost

    def _grow(self, flow: Array) -> None:
        """Add the states that the probability escaped to, and those behind them."""
        n = len(self.projection)
        self.projection = self.projection.grown(flow, self.layers, self.options.max_states)
        if len(self.projection) > self.options.max_states:
            raise RuntimeError(
                f"solve_cme: at time {self.now:g} of {self.options.end:g} a truncation error of "
                f"{self.options.tolerance:g} needs more than max_states = {self.options.max_states} states; "
                f"bound so far {self.lost + self.rounding:.3g}"
            )
        self.p = np.concatenate((self.p, np.zeros(len(self.projection) - n)))
        if self.layers == MOST_LAYERS:
            self.step = max(self.step / 2, SHORTEST_STEP)
        self.layers = min(2 * self.layers, MOST_LAYERS)

    def _drop(self) -> None:
        """Forget the least probable states, as many as a part of the budget pays for."""
        order = np.argsort(self.p)
        total = np.cumsum(self.p[order])
        count = int(np.searchsorted(total, DROP_SHARE * self._budget(self.now), side="right"))
        if count >= max(DROP_AT_LEAST * len(order), 1) and count < len(order):
            self.lost += float(total[count - 1])
            keep = np.sort(order[count:])
            self.projection, self.p = self.projection.restricted(keep), self.p[keep]


def _collected(records: list[tuple[StateSet, Array]]) -> tuple[Array, Array]:
    """One set of states for all times, in lexicographic order, and the probabilities (T, n)."""
    union, parts = records[0][0], []
    for states, _ in records:
        union = union if states is records[0][0] else union.extended(states.states)
    for states, p in records:
        row = np.zeros(len(union))
        row[union.locate(states.states)] = p
        parts.append(row)
    order = np.lexsort(union.states.T[::-1])
    return union.states[order], np.stack(parts)[:, order]


def solve_cme(
    net: Network,
    t: Any,
    *,
    tolerance: float = 1e-6,
    initial: Any = None,
    parameters: Any = None,
    max_states: int = 2_000_000,
    method: str = "auto",
    stop: str | None = None,
    t0: float = 0.0,
) -> CmeSolution:
    r"""Probabilities of the states of a network at given times, with a bound on their error.

    The chemical master equation for the probability p(x, t) of the counts x, with propensities a_j and changes v_j,

    .. math::
        \frac{dp(x)}{dt} = \sum_j a_j(x - v_j) \, p(x - v_j) - a_j(x) \, p(x),

    is solved on a finite set of states. What leaves the set is lost, so that no computed probability exceeds the true
    one, and the sum of all errors is what was lost: finite state projection. The set follows the distribution: it grows
    where probability leaves it faster than the tolerance allows, and the least probable states are dropped; both count
    as lost. This holds for any network that has, with probability 1, finitely many jumps in finite time.

    Args:
        net: a network without events and without time in its laws.
        t: (T,) ascending times, tensor, array or list.
        tolerance: bound on the probability lost until the last time; until an earlier one, in proportion.
        initial: counts that replace the network's, by name or as (1, S); or a distribution at the start, a pair of
            states (n, S) and probabilities (n,), for example from an earlier solution.
        parameters: values that replace the network's, by name.
        max_states: how large the set may become. The matrix of n states and R reactions takes about 30 n R bytes.
        method: how one step is taken. "uniformization": Jensen's series of products with a nonnegative matrix, whose
            truncation error is proven and part of the bound. "expm_multiply": scipy's, whose error is at roundoff
            level without proof; about five times the products. "auto": uniformization.
        stop: a condition such as ``"A == 0"``; states where it holds are not left any more, so that
            ``solution.probability(stop)`` is the distribution of the first passage time.
        t0: the time of `initial`.

    Returns:
        A `CmeSolution`: states, probabilities (T, n), bound (T,), marginal(species), mean(), std(), covariance(),
        probability(condition). The bound holds for sums of probabilities; moments are those of the states kept.

    Raises:
        ValueError: the network has events or laws that depend on time; a propensity is negative or not finite, or a
            reaction takes a count below zero, in a state that is reached; a tolerance outside 1e-12 to 1.
        RuntimeError: more than max_states are needed; the message says how far the solution came.
        ImportError: scipy is not installed.

    Example:
        >>> from pygen.ssa import examples
        >>> from pygen.ssa.cme import solve_cme
        >>> solution = solve_cme(examples.schlogl(), [1.0, 4.0])
        >>> solution.probability("X > 400").round(4)
        array([0.0492, 0.4349])
        >>> bool((solution.bound < 1.1e-6).all())
        True

    Source: Munsky, Khammash, "The finite state projection algorithm for the solution of the chemical master equation",
    J. Chem. Phys. 124, 2006; Jensen, "Markoff chains as an aid in the study of Markoff processes", Skand.
    Aktuarietidskr. 36, 1953; growing and shrinking in time: Burrage, Hegland, MacNamara, Sidje, "A Krylov-based finite
    state projection algorithm", Markov Anniversary Meeting, 2006.
    """
    need_scipy("solve_cme")
    if method not in METHODS:
        raise ValueError(f"solve_cme: method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not SMALLEST_TOLERANCE <= tolerance < 1:
        raise ValueError(f"solve_cme: tolerance: expected {SMALLEST_TOLERANCE:g} <= tolerance < 1, got {tolerance!r}")
    times = grid(t, t0).numpy()
    chain = Chain(net, parameters, None if stop is None else _condition(net, stop, "stop"), "solve_cme")
    states, p = _start(net, initial)
    advance = _by_expm_multiply if method == "expm_multiply" else _by_uniformization
    options = _Options(advance, t0, float(times[-1]), tolerance, max_states)

    def solve(seed: int) -> CmeSolution:
        solver = _Solver(chain, states, p, seed, options)
        records, bound = [], []
        for time in times.tolist():
            solver.advance_to(time)
            records.append((solver.projection.set, solver.p))
            bound.append(solver.lost + solver.rounding)
        return CmeSolution(net, *_collected(records), chain.values, times, np.array(bound))

    return with_new_keys(solve)
