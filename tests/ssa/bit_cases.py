"""Models whose trajectories are compared bit for bit: between CPU levels in test_bits.py, with a GPU in test_cuda.py.

Together they take every way through the engine: its tables and its interpreter, short and long lists of reactions,
breakpoints, events, every way to end.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch

from pygen import ssa
from pygen.ssa import Event, Network, Reaction, examples

N = 100  # trajectories of an ensemble
FIELDS = ("counts", "status", "n_events", "stop_time")
UNEVEN = [0.0, 0.1, 0.1, 0.35, 1.0, 1.0, 1.0, 1.9, 2.0]


@dataclass(frozen=True)
class Case:
    """A network, its grid, further arguments of `simulate`, and the ways in which its trajectories end.

    Arrays among the arguments have N rows, one for each trajectory from index 0 on.
    """

    net: Network
    times: list[float]
    ends: set[str]
    arguments: dict = field(default_factory=dict)

    def arguments_of(self, first, n):
        """The arguments for trajectories first ... first + n - 1."""
        return {
            name: {key: rows[first : first + n] for key, rows in value.items()} if isinstance(value, dict) else value
            for name, value in self.arguments.items()
        }

    def simulate(self, n=N, first=0, times=None, **options):
        arguments = {"seed": 5, "threads": 1, "method": "direct", "progress": False}
        arguments |= {"first": first, **self.arguments_of(first, n), **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ssa.SimulationWarning)
            return ssa.simulate(self.net, self.times if times is None else times, n, **arguments)


def assert_same(a, b, where=""):
    """Two runs, or parts of them as tuples of tensors, agree in every bit."""
    for name, one, other in zip(FIELDS, values(a), values(b), strict=True):
        assert torch.equal(one.cpu(), other.cpu()), f"{name} differs {where}"


def values(run, rows=slice(None)):
    """The tensors of a run that are one row a trajectory."""
    return run if isinstance(run, tuple) else tuple(getattr(run, name)[rows] for name in FIELDS)


def joined(*runs):
    return tuple(torch.cat(parts) for parts in zip(*(values(run) for run in runs), strict=True))


# ---- the models ------------------------------------------------------------------------------------------------------


def third_order(mass_action="combinatorial"):
    reactions = [
        Reaction({"A": 3}, {"B": 1}, rate="k / 50"),
        Reaction({"A": 2, "B": 1}, {"A": 3}, rate="k / 20"),
        Reaction({"A": 1, "B": 1, "C": 1}, {"C": 2}, rate="k / 90"),
        Reaction({"B": 1}, {"A": 3}, rate="k"),
        Reaction({}, {"A": 2}, rate=7.0),
        Reaction({"C": 1}, {}, rate=0.2),
    ]
    return Network({"A": 12, "B": 3, "C": 4}, {"k": 1.7}, reactions, mass_action=mass_action)


def expressions():
    reactions = [
        Reaction({}, {"M": 1}, propensity="strength / (1 + (P / K)^n)"),
        Reaction({"M": 1}, {}, propensity="M * exp(-P / 90)"),
        Reaction({}, {"P": 1}, propensity="gain"),
        Reaction({"P": 1}, {}, propensity="piecewise(0.5 * P, P > 20, log(1 + P) * 0.1)"),
        Reaction({"P": 2}, {"Q": 1}, propensity="0.01 * P * (P - 1)"),
        Reaction({"Q": 1}, {"P": 2}, propensity="min(Q, 9) * max(0.3, abs(M - 3) / 10)"),
        Reaction({"Q": 1}, {}, rate="0.1 * floor(sqrt(M + 1)) + 0.01 * ceil(Q / 3)"),
    ]
    parameters = {"strength": 60.0, "K": 12.0, "n": 2.3}
    return Network({"M": 2, "P": 5, "Q": 0}, parameters, reactions, rules={"gain": "4 * M / (1 + Q^2 / 100)"})


def ring(length):
    """Particles that go round a ring of states, at rates that all differ."""
    species = {f"S{i}": 3 * (i % 3) for i in range(length)}
    names = list(species)
    reactions = [Reaction({names[i]: 1}, {names[i - length + 1]: 1}, rate=1 + i / 7) for i in range(length)]
    return Network(species, {}, reactions)


def pulses():
    reactions = [
        Reaction({}, {"X": 1}, propensity="piecewise(0, time < 0.2, high, time < end, 5)"),
        Reaction({"X": 1}, {}, rate="piecewise(1, time >= 1, 4)"),
    ]
    return Network({"X": 0}, {"high": 90.0, "end": 0.7}, reactions)


def with_events():
    reactions = [
        Reaction({"A": 1}, {"B": 1}, rate="k"),
        Reaction({"B": 1}, {"A": 1}, rate=0.7),
        Reaction({}, {"A": 1}, rate="feed"),
    ]
    events = [
        Event("B >= 14", {"B": "B - 9", "k": "k * 0.9"}),
        Event("A < 4 or time >= 1.5", {"A": "A + 20", "dose": "dose + 1"}, priority=2),
        Event("time > 1.5", {"feed": "30 / dose", "B": "floor(B / 2)"}, priority=1, values_from_trigger_time=False),
        Event("A > 25 and B > 2", {"A": 25}, persistent=False, initial_value=False),
    ]
    return Network({"A": 30, "B": 0}, {"k": 1.0, "feed": 4.0, "dose": 1.0}, reactions, events)


def doomed():
    """Trajectories that fail: A may turn negative, D large; the law of C -> 0 is 1 / 0 at C = 4."""
    reactions = [
        Reaction({"A": 2}, {}, propensity="A > 0"),
        Reaction({"C": 1}, {}, propensity="abs(1 / (C - 4)) * C"),
        Reaction({}, {"D": 2**30}, rate=0.4),
        Reaction({"B": 1}, {}, rate=1.0),
    ]
    return Network({"A": 5, "B": 9, "C": 7, "D": 2**53 - 2**30}, {}, reactions)


def dice(low, high, seed, dtype=np.float64):
    return np.random.default_rng(seed).uniform(low, high, N).astype(dtype)


STEPS = [Reaction({}, {"X": 1}, rate=30.0), Reaction({"X": 1}, {}, propensity="piecewise(33, X > 0, 0)")]
RANDOM_WALK = Network({"X": 20}, {}, STEPS)
OPEN = Network(
    {"A": 0, "food": 50},
    {"k": 0.4},
    [Reaction({"food": 1}, {"A": 1}, rate="k"), Reaction({"A": 2, "food": 1}, {"A": 1}, rate=0.002)],
    [Event("time >= 1", {"food": "food + A"})],
    boundary=["food"],
)
# Rates and propensities below 2.2e-308 are subnormal numbers: less precise, but as exact as any.
SLOW = Network({"A": 9}, {"k": 1e-308}, [Reaction({"A": 1}, {}, rate="k"), Reaction({"A": 3}, {"A": 2}, rate="k / 64")])

CASES = {
    "mass action": Case(examples.vilar_oscillator(), [0.0, 0.01, 0.2, 0.2, 0.5], {"completed"}),
    "third order": Case(third_order(), UNEVEN, {"completed"}),
    "third order, falling": Case(third_order("falling"), [t - 3 for t in UNEVEN], {"completed"}, {"t0": -3.5}),
    "homodimer": Case(examples.dimer_decay(S1=500), UNEVEN, {"completed"}),
    "one species": Case(examples.schlogl(), UNEVEN, {"completed"}),
    "to extinction": Case(examples.birth_death(X=3, death=2.0), [0.0, 0.5, 60.0], {"absorbed"}),
    "expressions": Case(expressions(), UNEVEN, {"completed"}),
    "20 reactions": Case(ring(20), UNEVEN, {"completed"}),
    "40 reactions": Case(ring(40), UNEVEN, {"completed"}),
    "pulses": Case(pulses(), UNEVEN, {"completed"}),
    "pulses of their own": Case(pulses(), UNEVEN, {"completed"}, {"parameters": {"end": dice(0.1, 2.4, 1)}}),
    "events": Case(with_events(), UNEVEN, {"completed"}),
    "boundary": Case(OPEN, [0.5, 1.0, 1.5], {"completed"}, {"t0": 0.25}),
    "stop": Case(RANDOM_WALK, UNEVEN, {"completed", "stopped"}, {"stop": "X == 5 or X == 50 and time > 1.2"}),
    "max_events": Case(RANDOM_WALK, UNEVEN, {"completed", "max_events"}, {"max_events": 125}),
    "parameters": Case(examples.immigration_death(), UNEVEN, {"completed"}, {"parameters": {"death": dice(0.5, 9, 2)}}),
    "rates below zero": Case(
        examples.sir(I=90),
        UNEVEN,
        {"completed", "invalid_propensity"},
        {"parameters": {"contact": dice(-0.001, 0.01, 6)}},
    ),
    "initial": Case(third_order(), UNEVEN, {"completed"}, {"initial": {"A": dice(0, 40, 3, int)}}),
    "subnormal rates": Case(SLOW, [0.0, 1e307, 5e307, 1.5e308], {"completed", "absorbed"}),
    "failures": Case(doomed(), [0.0, 0.3, 1.0, 40.0], {"invalid_count", "invalid_propensity", "overflow"}),
}  # fmt: skip


def times_of_third_jumps(**options):
    """stop_time of 20,000 trajectories, each in another state: where a last bit of a law or a logarithm shows.

    Counts hide it, and functions of two levels that differ do so for one argument in a thousand.
    """
    n, rng = 20_000, np.random.default_rng(8)
    reactions = [
        Reaction({"A": 1}, {"B": 1, "jumps": 1}, propensity="A^1.3 * exp(-A / 9e4) / (1 + log(B))"),
        Reaction({"B": 1}, {"jumps": 1}, rate=0.3),
    ]
    net = Network({"A": 1, "B": 1, "jumps": 0}, {}, reactions)
    initial = {name: rng.integers(1, 10**6, n) for name in ("A", "B")}
    options = {"threads": 1, "method": "direct", "progress": False, **options}
    return ssa.simulate(net, [1e9], n, 5, initial=initial, stop="jumps == 3", **options).stop_time.cpu()
