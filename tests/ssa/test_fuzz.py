"""Random networks, path by path: the compiled engine against the plain Python reference.

The reference works on the networks' trees with Python's floats; it has the engine's own log, exp and pow, which
test_math.py holds to 50 digits. Hence every time, reaction, count and status must agree to the bit.
"""

from collections import Counter
from random import Random

import pytest
import torch
from ssa.bit_cases import CASES
from ssa.random_networks import Case, random_case

from harness import ordinary_levels
from pygen import backends, ssa
from pygen.ssa import Event, Network, Reaction, engine, examples
from pygen.ssa.program import OPS
from pygen.ssa.reference import simulate_one

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")

SEED = 11
OPTIONS = {"t0": 0.0, "stop": None, "max_events": 10**6}
ROWS, ROW = 9, 4  # more trajectories than lanes in a vector, so that lanes are refilled; the one to look at closely


def engine_function(name):
    number = OPS.index(name)

    def call(*args):
        a, *b = (torch.tensor([x], dtype=torch.float64) for x in args)
        return torch.ops.pygen.ssa_math(number, a, b[0] if b else a).item()

    return call


FUNCTIONS = {name: engine_function(name) for name in ("log", "exp", "pow")}


def reference(case):
    numbers = {"seed": SEED, "trajectory": ROW, "record_path": True}
    return simulate_one(case.net, case.times, log=FUNCTIONS["log"], math_functions=FUNCTIONS, **numbers, **case.options)


def ensemble(case, method):
    """All of simulate() but its checks and its watch over the keyboard, which take longer than such a small run."""
    net, options = case.net, case.options
    inputs = engine.Inputs(
        initial=torch.from_numpy(net.initial[None].astype("float64")),
        parameters=torch.from_numpy(net.parameter_values[None]),
        times=torch.tensor(case.times, dtype=torch.float64),
        recorded=torch.arange(len(net.species), dtype=torch.int32),
        t0=options["t0"],
        seed=SEED,
        stream=0,
        method=method,
        tau_epsilon=0.5,
        max_events=options["max_events"],
        threads=1,
    )
    out = engine.allocate(ROWS, len(case.times), len(net.species), torch.device("cpu"))
    engine.run_block(net, options["stop"], inputs, first=0, out=out, control=engine.new_control())
    return out


def compare(case):
    """Every method and level against the reference; returns the reference's trajectory."""
    truth = reference(case)
    runs = [ensemble(case, "lane")]
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            runs.append(ensemble(case, "direct"))
    for run in runs:
        assert engine.STATUS_NAMES[run.status[ROW]] == truth.status
        assert (run.n_events[ROW], run.stop_time[ROW]) == (truth.n_events, truth.stop_time)
        assert run.counts[ROW].tolist() == truth.counts.tolist()
        for name in ("counts", "status", "n_events", "stop_time"):
            assert torch.equal(getattr(run, name), getattr(runs[0], name)), name
    path = ssa.replay(case.net, seed=SEED, trajectory=ROW, t=case.times, **case.options)
    assert list(zip(path.time.tolist(), path.reaction.tolist(), strict=True)) == truth.path
    assert path.status == truth.status
    # Events of the instant at which max_events ends a trajectory are in the path alone.
    if truth.status in ("completed", "absorbed", "stopped", "max_events") and not ends_with_an_event(case, truth):
        assert path.states[-1].tolist() == truth.state.tolist()
    return truth


def events_of(case, truth):
    """The times at which the network's events happened."""
    return [time for time, j in truth.path if j >= len(case.net.reactions)]


def ends_with_an_event(case, truth):
    return truth.status == "max_events" and truth.path[-1][0] in events_of(case, truth)


def test_random_networks_follow_the_reference_to_the_bit():
    seen = Counter()
    for number in range(600):
        case = random_case(Random(number))
        try:
            truth = compare(case)
        except AssertionError as error:
            raise AssertionError(f"random_case(Random({number})) differs: {error}\n{case}") from error
        fired = events_of(case, truth)
        seen[truth.status] += 1
        seen["jumps"] += truth.n_events
        seen["events"] += len(fired)
        seen["several events at an instant"] += len(fired) > len(set(fired))
    # Networks that all ended at once would prove nothing.
    for status in ("completed", "absorbed", "stopped", "max_events", "invalid_count", "invalid_propensity"):
        assert seen[status] > 20, status
    assert seen["overflow"] and seen["several events at an instant"] > 20
    assert seen["jumps"] > 3000 and seen["events"] > 300


# ---- what random networks seldom have --------------------------------------------------------------------------------


def decay(*events, count=20, rate="k", options=None):
    net = Network({"A": count, "B": 0}, {"k": 0.5}, [Reaction({"A": 1}, {"B": 1}, rate=rate)], events)
    return Case(net, [0.0, 1.0, 1.0, 60.0], OPTIONS | (options or {}))


def at_one(number, **options):
    """An event at t = 1 that adds its number to the digits of B."""
    return Event("time >= 1", {"B": f"10 * B + {number}"}, values_from_trigger_time=False, **options)


RARE = {
    "events without end": (decay(Event("B > 3", {"B": 0}), Event("B < 1", {"B": 5})), "event_loop"),
    "many events at once": (
        decay(at_one(1), at_one(2, priority=-5), at_one(3, priority="A"), at_one(4, priority=99), at_one(5)),
        "absorbed",
    ),
    "events on both sides of a start": (
        decay(Event("A > 1", {"A": 7}, initial_value=False), Event("time >= 0", {"B": 9}, initial_value=True)),
        "absorbed",
    ),
    "a condition that is true for good": (decay(options={"stop": "k"}), "stopped"),
    "a condition that is a negative number": (decay(options={"stop": "-2 * (A < 9)"}), "stopped"),
    "a condition that turns NaN": (decay(options={"stop": "0 * log(A - 5)"}), "stopped"),
    "a condition beside an event": (decay(Event("B > 3", {"A": 12}), options={"stop": "7 - A"}), "stopped"),
    "no reaction": (Case(Network({"A": 3}), [0.0, 2.0], OPTIONS), "absorbed"),
    "a reaction of nothing": (
        Case(Network({"A": 3}, {}, [Reaction({}, {}, rate=3.0)]), [0.0, 2.0], OPTIONS),
        "completed",
    ),
    "a rate of zero": (decay(rate=0.0), "absorbed"),
    "a rate below zero": (decay(rate="-k"), "invalid_propensity"),
    "a rate below zero of what is not there": (decay(rate="-k", count=0), "absorbed"),
    "an infinite total": (decay(rate="k * 1e308"), "invalid_propensity"),
    "an event that assigns half a molecule": (decay(Event("A < 9", {"B": "A / 3"})), "invalid_count"),
    "an event that assigns too many": (decay(Event("A < 9", {"B": "2^54"})), "overflow"),
}


@pytest.mark.parametrize(("case", "status"), RARE.values(), ids=RARE)
def test_rare_ways_follow_the_reference_to_the_bit(case, status):
    assert compare(case).status == status


MODELS = {
    **{name: (model(), 0.3) for name, model in examples.MODELS.items()},
    **{name: (CASES[name].net, 2.0) for name in ("third order", "expressions", "40 reactions", "pulses", "events")},
}


@pytest.mark.parametrize(("net", "end"), MODELS.values(), ids=MODELS)
def test_models_follow_the_reference_to_the_bit(net, end):
    case = Case(net, [0.0, end / 3, end], OPTIONS | {"max_events": 1500})
    truth = compare(case)
    assert truth.status in ("completed", "max_events") and truth.counts[0].tolist() == net.initial.tolist()
