"""One trajectory of a network in plain Python: the truth that the engine is held to, number by number.

It works on the laws of network.py as trees, not on the instructions of program.py. Every operation below is one IEEE
operation in a fixed order; whoever reorders one changes the bits of trajectories.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pygen.ssa.breakpoints import instants
from pygen.ssa.expression import Expr, Number, Symbol, Time, chain_exponent
from pygen.ssa.network import LARGEST_COUNT, Formula, Network

# Events at one instant beyond which they are taken to set each other off for ever.
LARGEST_EVENT_CASCADE = 1000
_MASK = 0xFFFFFFFF

Function = Callable[..., float]
# A law or trigger: (counts and parameters, time) -> value.
Formulae = Callable[[Sequence[float], float], float]


@dataclass
class Trajectory:
    """What `simulate_one` returns."""

    counts: np.ndarray
    """int64 [T, S]; -1 in rows that the trajectory did not reach."""
    status: str
    """completed, absorbed, stopped, max_events, invalid_count, overflow, invalid_propensity or event_loop."""
    n_events: int
    """Reactions that fired."""
    stop_time: float
    """When the stopping condition became true; inf if it did not."""
    state: np.ndarray
    """int64 [S], at the end."""
    path: list[tuple[float, int]] = field(default_factory=list)
    """If asked for: time and index of every reaction that fired; event e counts as index R + e."""


# ---- random numbers


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit random numbers from a 128-bit counter and a 64-bit key, both as 32-bit words.

    Example:
        >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _MASK, (first >> 32) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, stream: int, trajectory: int, n: int) -> tuple[float, float]:
    """The two random numbers of pass n of a trajectory: u1 in (0, 1] for the time, u2 in [0, 1) for the choice.

    Both are multiples of 2^-53, from 53 of the 64 bits of two words each.

    Args:
        seed, stream: the key, each in [0, 2^32).
        trajectory, n: the counter, each in [0, 2^64).

    Raises:
        ValueError: one of them is out of range.
    """
    for name, value, bits in (("seed", seed, 32), ("stream", stream, 32), ("trajectory", trajectory, 64), ("n", n, 64)):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"uniforms: expected {name} in [0, 2^{bits}), got {value}")
    r0, r1, r2, r3 = philox4x32((n & _MASK, n >> 32, trajectory & _MASK, trajectory >> 32), (seed, stream))
    return (((r1 << 32 | r0) >> 11) + 1) * 2.0**-53, ((r3 << 32 | r2) >> 11) * 2.0**-53


# ---- expressions on Python floats, by IEEE rules: no exception, but inf and NaN


def _divide(a: float, b: float) -> float:
    if b != 0:
        return a / b
    return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _pow(x: float, y: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.power(x, y))


def _rounded(function: Callable[[float], int]) -> Function:
    # A whole number keeps the sign of what it came from: ceil(-0.5) is -0.
    return lambda x: math.copysign(float(function(x)), x) if math.isfinite(x) else x


_FUNCTIONS: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _divide,
    "neg": lambda a: -a,
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "gt": lambda a, b: float(a > b),
    "ge": lambda a, b: float(a >= b),
    "eq": lambda a, b: float(a == b),
    "ne": lambda a, b: float(a != b),
    "and": lambda a, b: float(a != 0 and b != 0),
    "or": lambda a, b: float(a != 0 or b != 0),
    "not": lambda a: float(a == 0),
    "min": lambda a, b: a if a < b else b,
    "max": lambda a, b: a if a > b else b,
    "sqrt": lambda a: math.sqrt(a) if a >= 0 else math.nan,
    "abs": abs,
    "floor": _rounded(math.floor),
    "ceil": _rounded(math.ceil),
    "select": lambda condition, then, otherwise: then if condition != 0 else otherwise,
    "exp": _exp,
    "log": _log,
    "pow": _pow,
}


def _formula(expr: Expr, slots: Mapping[str, int], functions: Mapping[str, Function]) -> Formulae:
    """The expression as a Python function of counts and parameters (by slot) and time."""
    if isinstance(expr, Number):
        value = expr.value
        return lambda values, time: value
    if isinstance(expr, Time):
        return lambda values, time: time
    if isinstance(expr, Symbol):
        slot = slots[expr.name]
        return lambda values, time: values[slot]
    args = [_formula(arg, slots, functions) for arg in expr.args]
    exponent = chain_exponent(expr)
    if exponent is not None:
        base = args[0]
        return lambda values, time: _power_chain(base(values, time), exponent)
    function = functions[expr.op]
    if len(args) == 1:
        (only,) = args
        return lambda values, time: function(only(values, time))
    if len(args) == 2:
        a, b = args
        return lambda values, time: function(a(values, time), b(values, time))
    return lambda values, time: function(*[arg(values, time) for arg in args])


def _power_chain(base: float, exponent: int) -> float:
    """x * x, then * x, ... from the left, and 1 over that for a negative exponent."""
    if exponent == 0:
        return 1.0
    result = base
    for _ in range(abs(exponent) - 1):
        result = result * base
    return result if exponent > 0 else _divide(1.0, result)


# ---- the simulation


class _Run:
    """A trajectory under way: its state, its laws, and the part of the grid that is written."""

    def __init__(self, net: Network, times: Sequence[float], values: list[float], functions: Mapping[str, Function]):
        self.net, self.times, self.values = net, times, values
        self.n_species = len(net.species)
        self.counts = np.full((len(times), self.n_species), -1, dtype=np.int64)
        self.row = 0
        self.t = 0.0
        self.n_events = 0
        self.path: list[tuple[float, int]] = []
        slots = {name: slot for slot, name in enumerate((*net.species, *net.parameters))}

        def formula(expr: Expr) -> Formulae:
            return _formula(expr, slots, functions)

        self.formula = formula
        laws = [net.propensity(index) for index in range(len(net.reactions))]
        self.laws = [formula(law) for law in laws]
        self.triggers = [formula(event.trigger) for event in net.event_laws]
        self.assignments = [[formula(value) for value in event.values] for event in net.event_laws]
        self.priorities = [None if event.priority is None else formula(event.priority) for event in net.event_laws]
        self.previous = [event.initial_value for event in net.events]
        # Instants do not change during a trajectory: they come from its parameters at the start.
        self.breaks = [
            formula(instant)(values, 0.0)
            for expr in [*laws, *(event.trigger for event in net.event_laws)]
            for instant in instants(expr)
        ]
        self.stop: Formulae | None = None

    def stop_when(self, condition: Expr) -> None:
        self.stop = self.formula(condition)
        self.breaks += [self.formula(instant)(self.values, 0.0) for instant in instants(condition)]

    def write_before(self, instant: float) -> None:
        """The present state at all grid times before the instant."""
        while self.row < len(self.times) and self.times[self.row] < instant:
            self.counts[self.row] = self.values[: self.n_species]
            self.row += 1

    # -- events

    def join(self, waiting: dict[int, list[float] | None]) -> None:
        """Look at all triggers: some waiting events leave, those whose trigger turned true join.

        One that waits already is not added a second time; its new values are then those of the later time.
        """
        true = [trigger(self.values, self.t) != 0 for trigger in self.triggers]
        for index, event in enumerate(self.net.events):
            if index in waiting and not event.persistent and not true[index]:
                del waiting[index]
            if true[index] and not self.previous[index]:
                waiting[index] = self.new_values(index) if event.values_from_trigger_time else None
        self.previous = true

    def new_values(self, index: int) -> list[float]:
        return [value(self.values, self.t) for value in self.assignments[index]]

    def next_waiting(self, waiting: Collection[int]) -> int:
        """The waiting event of the highest priority, of equals the first; no priority is below all."""
        best, highest = -1, -math.inf
        for index in sorted(waiting):
            law = self.priorities[index]
            priority = -math.inf if law is None else law(self.values, self.t)
            if best < 0 or priority > highest:
                best, highest = index, priority
        return best

    def assign(self, index: int, new: Sequence[float]) -> str | None:
        for slot, value in zip(self.net.event_laws[index].targets, new, strict=True):
            if slot < self.n_species:
                if not (value >= 0 and value == _FUNCTIONS["floor"](value)):
                    return "invalid_count"
                if value > LARGEST_COUNT:
                    return "overflow"
            self.values[slot] = value
        return None

    def settle(self) -> str | None:
        """Events until none is left, then the stopping condition. Returns a status if the trajectory ends."""
        waiting: dict[int, list[float] | None] = {}
        self.join(waiting)
        executed = 0
        while waiting:
            executed += 1
            if executed > LARGEST_EVENT_CASCADE:
                return "event_loop"
            index = self.next_waiting(waiting)
            new = waiting.pop(index)
            failure = self.assign(index, self.new_values(index) if new is None else new)
            if failure is not None:
                return failure
            self.path.append((self.t, len(self.laws) + index))
            self.join(waiting)
        return "stopped" if self.stop is not None and self.stop(self.values, self.t) != 0 else None

    # -- reactions

    def jump(self, reaction: int) -> str | None:
        """Fire one reaction. Returns a status if a count is then impossible."""
        for slot, delta in enumerate(self.net.stoichiometry[reaction].tolist()):
            self.values[slot] += delta
        self.n_events += 1
        self.path.append((self.t, reaction))
        for count in self.values[: self.n_species]:
            if not 0 <= count <= LARGEST_COUNT:
                return "overflow" if count > LARGEST_COUNT else "invalid_count"
        return None

    def simulate(self, draw: Callable[[int], tuple[float, float]], log: Function, max_events: int | None) -> str:
        """All passes of the direct method. Returns the status."""
        ended = self.settle()
        n = 0
        while ended is None:
            propensities = [law(self.values, self.t) for law in self.laws]
            # Partial sums from the left; the last one is the total, which no other order of summation gives.
            sums: list[float] = []
            for propensity in propensities:
                sums.append(sums[-1] + propensity if sums else propensity)
            total = sums[-1] if sums else 0.0
            if not all(propensity >= 0 for propensity in propensities) or not math.isfinite(total):
                return "invalid_propensity"
            u1, u2 = draw(n)
            n += 1
            t_new = self.t + _divide(-log(u1), total) if total != 0 else math.inf

            instant = min((b for b in self.breaks if self.t < b <= self.times[-1]), default=math.inf)
            if t_new >= instant and instant < math.inf:
                self.write_before(instant)
                self.t = instant
                ended = self.settle()
                continue
            self.write_before(t_new)
            if self.row == len(self.times):
                return "absorbed" if total == 0 else "completed"

            target = u2 * total
            chosen = next((j for j, partial in enumerate(sums) if partial > target), None)
            if chosen is None:
                # Rounding: the last reaction that can fire at all.
                chosen = max(j for j, partial in enumerate(sums) if partial > (sums[j - 1] if j else 0.0))
            self.t = t_new
            ended = self.jump(chosen) or self.settle()
            if ended is None and self.n_events == max_events:
                ended = "max_events"
        return ended


def _starting_values(
    what: str, names: Sequence[str], defaults: Sequence[float], given: Mapping[str, float] | Sequence[float] | None
) -> list[float]:
    values = dict(zip(names, map(float, defaults), strict=True))
    if given is None:
        return list(values.values())
    if not isinstance(given, Mapping):
        if len(given) != len(names):
            raise ValueError(f"simulate_one: expected {len(names)} {what}, got {len(given)}")
        given = dict(zip(names, given, strict=True))
    unknown = sorted(given.keys() - values.keys())
    if unknown:
        raise ValueError(f"simulate_one: expected {what} among {', '.join(names)}, got {unknown[0]!r}")
    values.update((name, float(value)) for name, value in given.items())
    return list(values.values())


def simulate_one(
    net: Network,
    times: Sequence[float],
    *,
    seed: int,
    trajectory: int,
    stream: int = 0,
    t0: float = 0.0,
    initial: Mapping[str, float] | Sequence[float] | None = None,
    parameters: Mapping[str, float] | Sequence[float] | None = None,
    max_events: int | None = None,
    stop: Formula | None = None,
    record_path: bool = False,
    log: Function | None = None,
    math_functions: Mapping[str, Function] | None = None,
) -> Trajectory:
    r"""Trajectory number `trajectory` of the ensemble with this seed, by the direct method.

    In a state with propensities a_j and total a_0 the next reaction fires after :math:`\tau = -\log(u_1) / a_0`; it is
    the first j with :math:`a_0 + \dots + a_j > u_2 a_0`.

    Args:
        net: the network.
        times: when to record the state, not decreasing, from t0 on. The state recorded at t_k is the one before a
            reaction that fires later than t_k, after events at t_k.
        seed, stream, trajectory: the random numbers, see `uniforms`.
        t0: the time at the start.
        initial: counts to start from, in place of the network's: all, or {species: count}.
        parameters: values in place of the network's: all, or {parameter: value}.
        max_events: give up after so many reactions, at least 1.
        stop: end when this expression is true.
        record_path: keep time and index of every reaction and event.
        log: the logarithm for the waiting time; the engine's own makes the times the engine's, to the bit.
        math_functions: functions for "exp", "log", "pow" and "sqrt" in laws; `log` also serves there by default.

    Raises:
        ValueError: times that decrease or begin before t0, unknown names, an unreadable stopping condition.

    Example:
        >>> from pygen.ssa.network import Network, Reaction
        >>> net = Network({"A": 3}, {"k": 1.0}, [Reaction({"A": 1}, {}, rate="k")])
        >>> run = simulate_one(net, [0.0, 1000.0], seed=1, trajectory=0)
        >>> run.counts.tolist(), run.status, run.n_events
        ([[3], [0]], 'absorbed', 3)

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81 (1977).
    """
    times = [float(time) for time in times]
    if not times or times[0] < t0 or any(not b >= a for a, b in zip(times, times[1:], strict=False)):
        raise ValueError(f"simulate_one: expected times that do not decrease, from t0 = {t0} on, got {times[:10]}")
    if not math.isfinite(times[-1]):
        raise ValueError(f"simulate_one: expected finite times, got {times[-1]}")
    if max_events is not None and max_events < 1:
        raise ValueError(f"simulate_one: expected max_events of at least 1, got {max_events}")
    functions = {**_FUNCTIONS, **({} if log is None else {"log": log}), **(math_functions or {})}
    values = [
        *_starting_values("species", net.species, net.initial.tolist(), initial),
        *_starting_values("parameters", net.parameters, net.parameter_values.tolist(), parameters),
    ]
    run = _Run(net, times, values, functions)
    run.t = float(t0)
    if stop is not None:
        run.stop_when(net.law(stop, "stop"))
    status = run.simulate(lambda n: uniforms(seed, stream, trajectory, n), log or _log, max_events)
    state = np.array(run.values[: run.n_species])
    if status == "stopped":
        run.write_before(math.inf)
    stop_time = run.t if status == "stopped" else math.inf
    path = run.path if record_path else []
    return Trajectory(run.counts, status, run.n_events, stop_time, state.astype(np.int64), path)
