"""A finite set of states of a network, the transitions among them and what leaves them: the matrices behind cme.py.

States are rows of an int64 array. A row is found again by its key, a linear hash, so that a jump is the same addition
to every key; rows with equal keys are compared, so that a collision is noticed and never believed.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pygen.ssa._arguments import rows
from pygen.ssa.expression import Expr, evaluate, to_text, uses_time
from pygen.ssa.network import Network

Array = NDArray[Any]
MOST_LAYERS = 64  # jumps that a set grows by at once
GROWTH, GROW_AT_LEAST = 1.5, 256  # it stops before when it has 1.5 times its states, but not before 256 are added
LAW_ROUNDINGS = 16  # unit roundoffs of error allowed for in a propensity: a law of a dozen operations
SEED_SHARE = 1e-3  # of the flow out of the set: states that have less of it together do not make it grow


class Collision(Exception):
    """Two different states have the same key: start again with the keys of another seed."""


class Chain:
    """The Markov chain of a network: its reactions' laws, evaluated for many states at once, and its jumps.

    Args:
        net: a network without events and without time in its laws.
        parameters: values that replace the network's, by name.
        stop: a condition on the state; where it holds nothing happens any more.
        caller: the public function's name, for the errors.
    """

    def __init__(self, net: Network, parameters: Any, stop: Expr | None, caller: str) -> None:
        if net.events:
            names = ", ".join(repr(event.name or f"event{i}") for i, event in enumerate(net.events))
            raise ValueError(f"{caller}: expected a network without events, got the events {names}")
        self.caller, self.species, self.stop = caller, net.species, stop
        row = rows("parameters", net.parameters, net.parameter_values, parameters, 1)[0]
        self.values: dict[str, float] = dict(zip(net.parameters, row.tolist(), strict=True))
        self.names: list[str] = []
        self.laws: list[Expr] = []
        jumps = []
        for j, change in enumerate(net.stoichiometry):
            law, name = net.propensity(j), net.reaction_names[j]
            if uses_time(law):
                raise ValueError(
                    f"{caller}: expected laws that do not depend on time, got reaction {name!r}: {to_text(law)}"
                )
            if change.any():  # a reaction that changes nothing does not show in the distribution
                self.names.append(name)
                self.laws.append(law)
                jumps.append(change)
        self.jumps = np.array(jumps, dtype=np.int64).reshape(len(jumps), len(net.species))

    def environment(self, states: Array) -> dict[str, Any]:
        """What an expression may name: every species' counts as an (n,) array, every parameter's value."""
        return self.values | {name: states[:, s].astype(np.float64) for s, name in enumerate(self.species)}

    def rates(self, states: Array) -> Array:
        """(R, n) float64: every reaction's propensity in every state."""
        environment = self.environment(states)
        rates = np.empty((len(self.laws), len(states)))
        for j, law in enumerate(self.laws):
            rates[j] = evaluate(law, environment)
        if self.stop is not None:
            rates[:, np.broadcast_to(evaluate(self.stop, environment), len(states)) != 0] = 0
        self._check(states, rates)
        return rates

    def _check(self, states: Array, rates: Array) -> None:
        invalid = ~((rates >= 0) & (rates < np.inf))
        if invalid.any():
            j, i = np.argwhere(invalid)[0]
            raise ValueError(
                f"{self.caller}: expected finite propensities >= 0, got {rates[j, i]} for reaction {self.names[j]!r} "
                f"at {self.describe(states[i])}"
            )
        for j, jump in enumerate(self.jumps):
            for s in np.flatnonzero(jump < 0):
                below = (states[:, s] + jump[s] < 0) & (rates[j] > 0)
                if below.any():
                    raise ValueError(
                        f"{self.caller}: reaction {self.names[j]!r} takes {self.species[s]} below zero from "
                        f"{self.describe(states[np.argmax(below)])}; its propensity must be 0 there"
                    )

    def describe(self, state: Array) -> str:
        return ", ".join(f"{name} = {count}" for name, count in zip(self.species, state.tolist(), strict=True))


@lru_cache(maxsize=64)
def _multipliers(seed: int, n: int) -> Array:
    """(n,) odd uint64."""
    numbers = np.random.default_rng(seed).integers(2**63, size=n, dtype=np.uint64)
    return 2 * numbers + np.uint64(1)


class StateSet:
    """Distinct states with a look-up. states: (n, S) int64."""

    def __init__(self, states: Array, seed: int = 0) -> None:
        self.states, self.seed = states, seed
        self.multipliers = _multipliers(seed, states.shape[1])
        self._sort()

    def _sort(self) -> None:
        self.keys = self.key(self.states)
        self.order = np.argsort(self.keys)
        self.sorted_keys = self.keys[self.order]
        if (self.sorted_keys[1:] == self.sorted_keys[:-1]).any():
            raise Collision

    def __len__(self) -> int:
        return len(self.states)

    def key(self, states: Array) -> Array:
        """(n,) uint64: the sum of multiplier times count, modulo 2^64."""
        return states.astype(np.uint64) @ self.multipliers

    def locate(self, states: Array, keys: Array | None = None) -> Array:
        """(n,) int64: the states' positions in the set, -1 where absent."""
        keys = self.key(states) if keys is None else keys
        position = np.minimum(np.searchsorted(self.sorted_keys, keys), len(self) - 1)
        index = self.order[position]
        found = self.sorted_keys[position] == keys
        if (self.states[index[found]] != states[found]).any():
            raise Collision
        return np.where(found, index, -1)

    def distinct(self, states: Array) -> Array:
        """The rows without repetition."""
        keys, first, inverse = np.unique(self.key(states), return_index=True, return_inverse=True)
        if len(keys) < len(states) and (states[first[inverse]] != states).any():
            raise Collision
        return states[first]

    def extended(self, states: Array) -> "StateSet":
        """This set followed by those of `states` that it lacks."""
        new = self.distinct(states)
        new = new[self.locate(new) < 0]
        return StateSet(np.concatenate((self.states, new)), self.seed) if len(new) else self


class Projection:
    """The chain restricted to a set of states.

    Attributes:
        inside: (n, n) sparse CSR, the rate of every jump within the set, from column to row.
        total: (n,) the rate at which a state is left, whereto ever.
        out: (n,) the part of it that leaves the set.
        speed: the largest `total`.
        roundings: how many unit roundoffs the sum of |errors| of one product with `uniformized` is at most, relative to
            the sum of its argument.
    """

    def __init__(self, chain: Chain, states: StateSet) -> None:
        from scipy import sparse

        self.chain, self.set = chain, states
        n = len(states)
        rates = chain.rates(states.states)
        self.total, self.out = rates.sum(0), np.zeros(n)
        entries = []
        for jump, rate in zip(chain.jumps, rates, strict=True):
            source = np.flatnonzero(rate)
            target = states.locate(states.states[source] + jump)
            leaves = target < 0
            self.out[source[leaves]] += rate[source[leaves]]
            source, target = source[~leaves], target[~leaves]
            entries.append((rate[source], target.astype(np.int32), source.astype(np.int32)))
        values, targets, sources = (
            (np.concatenate(part) for part in zip(*entries, strict=True)) if entries else ([],) * 3
        )
        self.inside = sparse.csr_array((values, (targets, sources)), shape=(n, n), dtype=np.float64)
        largest_row = int(np.diff(self.inside.indptr).max(initial=0))
        # Of an entry of the matrix and of its diagonal, and of the longest scalar product with a row of it.
        self.roundings = 2 * (LAW_ROUNDINGS + len(rates)) + largest_row
        self._finish()

    def _finish(self) -> None:
        self._uniformized: Any = None
        self.speed = float(self.total.max(initial=0.0))

    def __len__(self) -> int:
        return len(self.set)

    def generator(self) -> Any:
        """(n + 1, n + 1) sparse: d/dt of the probabilities of the states and of a sink that collects what leaves."""
        from scipy import sparse

        diagonal, sink = sparse.diags_array(self.total), sparse.csr_array(self.out[None, :])
        return sparse.block_array([[self.inside - diagonal, None], [sink, sparse.csr_array((1, 1))]], format="csr")

    def uniformized(self) -> Any:
        """I + generator / speed: a stochastic matrix, the chain at the jumps of a Poisson process of rate `speed`."""
        from scipy import sparse

        if self._uniformized is None:
            identity = sparse.eye_array(len(self) + 1, format="csr")
            self._uniformized = identity + self.generator() * (1 / self.speed)
        return self._uniformized

    def restricted(self, keep: Array) -> "Projection":
        """The projection on a part of the set; keep: ascending positions."""
        part = object.__new__(Projection)
        part.chain, part.set = self.chain, StateSet(self.set.states[keep], self.set.seed)
        part.total, part.roundings = self.total[keep], self.roundings
        columns = self.inside.tocsc()[:, keep]
        dropped = np.ones(len(self), bool)
        dropped[keep] = False
        # What went to a dropped state leaves the set now. Summed, not subtracted: nothing cancels.
        part.out = self.out[keep] + dropped.astype(np.float64) @ columns
        part.inside = columns.tocsr()[keep]
        part._finish()
        return part

    def grown(self, flow: Array, layers: int, limit: int) -> "Projection":
        """The projection on this set and what lies up to `layers` jumps beyond it where most of the flow leaves it.

        flow: (n,), how fast each state loses probability to the outside. The growth ends early once there are more than
        `limit` states, or enough new ones.
        """
        flow = flow if flow.any() else self.out
        order = np.argsort(flow)
        seeds = order[np.searchsorted(np.cumsum(flow[order]) / flow.sum(), SEED_SHARE) :]
        states, frontier = self.set, self.set.states[seeds]
        goal = min(max(int(GROWTH * len(states)), len(states) + GROW_AT_LEAST), limit + 1)
        added: list[Array] = []
        size = len(states)
        recent = StateSet(frontier, states.seed)
        for _ in range(layers):
            rates = self.chain.rates(frontier)
            reached = [frontier[rate > 0] + jump for jump, rate in zip(self.chain.jumps, rates, strict=True)]
            candidates = recent.distinct(np.concatenate(reached))
            frontier = candidates[(states.locate(candidates) < 0) & (recent.locate(candidates) < 0)]
            if not len(frontier):
                break
            added.append(frontier)
            recent = recent.extended(frontier)
            size += len(frontier)
            if size >= goal:
                break
        return Projection(self.chain, states.extended(np.concatenate(added))) if added else self
