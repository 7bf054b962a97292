"""Steady states of reaction networks, by a sparse factorisation on a finite set of states; cme.py has the way there."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pygen.ssa._arguments import initial_rows
from pygen.ssa._states import MOST_LAYERS, Array, Chain, Projection, StateSet
from pygen.ssa.cme import Distribution, need_scipy, with_new_keys
from pygen.ssa.network import Network

# Of the jumps that would leave the set, this share goes to the most probable state instead, the others do not happen.
# All of them: where two modes lie far apart, a leak of 1e-12 at one of them would move visible weight to the other.
# None of them: a corner of the set whose jumps all leave it would never be left.
RETURNING = 1e-4


@dataclass(frozen=True)
class StationaryDistribution(Distribution):
    """See `stationary_distribution`.

    Attributes:
        leak: the share of the jumps that would have left the set of states.
        residual: the sum over the states of |flow in - flow out|, relative to the sum of all flows.
    """

    leak: float
    residual: float


def _closed_classes(projection: Projection, restart: int) -> tuple[Array, Array]:
    """Which class of mutually reachable states each state is in, and the classes that nothing leaves.

    What leaves the set counts as a jump to the state `restart`.
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    leaving = np.flatnonzero(projection.out)
    back = sparse.csr_array((np.ones(len(leaving)), (np.full(len(leaving), restart), leaving)), projection.inside.shape)
    jumps = (projection.inside + back).tocoo()
    n, label = connected_components(jumps, directed=True, connection="strong")
    left = np.zeros(n, bool)
    left[label[jumps.col][label[jumps.row] != label[jumps.col]]] = True
    return label, np.flatnonzero(~left)


def _occupation(projection: Projection, states: Array, sources: Array, returning: float) -> Array:
    """(len(states),) mean times spent in `states` before leaving them, for a chain that begins according to `sources`.

    Solves rate in + source = rate out, where of what leaves the whole set only the share `returning` leaves.
    """
    from scipy import sparse
    from scipy.sparse.linalg import splu

    inside = projection.inside.tocsc()[:, states].tocsr()[states]
    leaving = projection.total[states] - (1 - returning) * projection.out[states]
    return splu((sparse.diags_array(leaving) - inside).tocsc()).solve(sources)


def _balanced(projection: Projection, members: Array, anchor: int) -> Array:
    """(n,) the stationary distribution of a closed class; jumps out of the set do not happen, or end in `anchor`."""
    weights = np.zeros(len(projection))
    others = members[members != anchor]
    weights[anchor] = 1.0
    if len(others):
        from_anchor = projection.inside.tocsc()[:, [anchor]].toarray()[others, 0]
        weights[others] = np.maximum(_occupation(projection, others, from_anchor, RETURNING), 0.0)
    return weights / weights.sum()


def stationary_distribution(
    net: Network,
    *,
    tolerance: float = 1e-10,
    initial: Any = None,
    parameters: Any = None,
    max_states: int = 200_000,
) -> StationaryDistribution:
    r"""The distribution that a network keeps for ever, on a finite set of states around the initial one.

    Solves :math:`\sum_j a_j(x - v_j) \, \pi(x - v_j) = \sum_j a_j(x) \, \pi(x)` by one sparse factorisation, in
    which jumps that leave the set do not happen. The set grows where most would leave it, until at most the tolerance
    does. That is a criterion and no bound: probability beyond a valley so deep that less than the tolerance passes it
    is not found. Start in another place, or lower the tolerance, to look for it.

    Args:
        net: a network without events and without time in its laws.
        tolerance: which share of all jumps may be among those that would leave the set.
        initial: counts that replace the network's, by name or as (1, S).
        parameters: values that replace the network's, by name.
        max_states: how large the set may become; the factorisation of 10^5 states in two dimensions takes seconds.

    Returns:
        A `StationaryDistribution`: states, probabilities (n,), leak, residual, and the methods of `CmeSolution`.

    Raises:
        ValueError: as `solve_cme`; or there is more than one stationary distribution, as in an epidemic that can end
            in many ways.
        RuntimeError: more than max_states are needed.
        ImportError: scipy is not installed.

    Example:
        >>> from pygen.ssa import examples
        >>> from pygen.ssa.stationary import stationary_distribution
        >>> steady = stationary_distribution(examples.schlogl())
        >>> steady.mean().round(3), steady.std().round(3), steady.probability("X < 256").round(6)
        (array([454.861]), array([199.879]), np.float64(0.22026))

    Source: Gibson, Seneta, "Augmented truncations of infinite stochastic matrices", J. Appl. Probab. 24, 1987.
    """
    need_scipy("stationary_distribution")
    if not 0 < tolerance < 1:
        raise ValueError(f"stationary_distribution: tolerance: expected 0 < tolerance < 1, got {tolerance!r}")
    chain = Chain(net, parameters, None, "stationary_distribution")
    start = initial_rows(net.species, net.initial, initial, 1).astype(np.int64)
    return with_new_keys(lambda seed: _stationary(net, chain, StateSet(start, seed), tolerance, max_states))


def _stationary(net: Network, chain: Chain, start: StateSet, tolerance: float, limit: int) -> StationaryDistribution:
    projection, anchor = Projection(chain, start), 0
    while True:
        label, closed = _closed_classes(projection, anchor)
        recurrent = label[anchor] in closed
        if recurrent:
            weights = _balanced(projection, np.flatnonzero(label == label[anchor]), anchor)
            anchor = int(weights.argmax())
            leak = float(weights @ projection.out / max(weights @ projection.total, 1e-300))
        else:
            # The start is left for good. How much leaves the set before it gets caught in a closed class?
            passing = np.flatnonzero(~np.isin(label, closed))
            weights = np.zeros(len(projection))
            weights[passing] = _occupation(projection, passing, (passing == anchor).astype(np.float64), 1.0)
            leak = float(weights @ projection.out)
        if leak <= tolerance:
            break
        n = len(projection)
        projection = projection.grown(weights * projection.out, MOST_LAYERS, limit)
        if len(projection) > limit:
            raise RuntimeError(
                f"stationary_distribution: {len(projection)} states are more than max_states = {limit}; with {n} of "
                f"them {leak:.3g} of the jumps leave the set"
            )
    if len(closed) > 1:
        raise ValueError(
            f"stationary_distribution: expected one stationary distribution, got {len(closed)} closed classes of states"
        )
    if not recurrent:
        members = np.flatnonzero(label == closed[0])
        weights = _balanced(projection, members, int(members[0]))
    inflow, outflow = projection.inside @ weights, projection.total * weights
    residual = float(abs(inflow - outflow).sum() / max(outflow.sum(), 1e-300))
    order = np.lexsort(projection.set.states.T[::-1])
    return StationaryDistribution(net, projection.set.states[order], weights[order], chain.values, leak, residual)
