"""The method "sparse": path by path against its definition in plain Python, and as an ensemble against "direct"."""

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from ssa.random_networks import random_case
from ssa.sparse_reference import FUNCTIONS, Laws, simulate_one_sparse

from harness import ordinary_levels
from pygen import backends
from pygen.ssa import engine, examples
from pygen.ssa.bngl import read_bngl_net
from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.reference import uniforms
from pygen.ssa.stochkit import read_stochkit

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")


def ensemble(
    net, times, n, *, method="sparse", seed=1, stop=None, t0=0.0, max_events=-1, threads=1, first=0, log=0, initial=None
):
    """The engine's results for trajectories first .. first + n - 1."""
    inputs = engine.Inputs(
        initial=torch.from_numpy(net.initial[None].astype("float64")) if initial is None else initial,
        parameters=torch.from_numpy(np.array(net.parameter_values[None])),
        times=torch.tensor(times, dtype=torch.float64),
        recorded=torch.arange(len(net.species), dtype=torch.int32),
        t0=t0,
        seed=seed,
        stream=0,
        method=method,
        tau_epsilon=0.03,
        max_events=max_events,
        threads=threads,
    )
    out = engine.allocate(n, len(times), len(net.species), torch.device("cpu"), log)
    engine.run_block(net, stop, inputs, first=first, out=out, control=engine.new_control())
    return out


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("counts", "status", "n_events", "stop_time")
    )


def chain(n, **options):
    """A species that is passed on along n sites and back: 2 n reactions, one group each."""
    species = {f"S{i}": 100 if i == 0 else 0 for i in range(n)}
    reactions = []
    for i in range(n):
        there, back = f"S{i}", f"S{(i + 1) % n}"
        reactions += [Reaction({there: 1}, {back: 1}, rate=1.0 + i / 7), Reaction({back: 1}, {there: 1}, rate=0.5)]
    return Network(species, {}, reactions, **options)


def mixed():
    """Homodimers, third order, both conventions' divisors, expression laws on a common rule, a boundary species."""
    return Network(
        {"A": 60, "B": 30, "C": 0, "D": 5, "E": 3},
        {"k": 0.02, "q": 1.5},
        [
            Reaction({"A": 2}, {"C": 1}, rate="k"),
            Reaction({"C": 1}, {"A": 2}, rate="q"),
            Reaction({"A": 2, "B": 1}, {"D": 1, "A": 1}, rate="k / 40"),
            Reaction({"D": 3}, {"B": 3, "A": 1}, rate=0.3),
            Reaction({"A": 1, "B": 1}, {"C": 1, "B": 1}, rate="k"),
            Reaction({}, {"B": 1}, propensity="q * A / (10 + r)"),
            Reaction({"B": 1}, {}, propensity="q * B * r / (r + 3)"),
            Reaction({"E": 1, "C": 1}, {"E": 1, "A": 1}, rate="k"),
            Reaction({}, {"A": 1}, rate=3.0),
        ],
        rules={"r": "C + D"},
        boundary=["E"],
    )


def driven():
    """A breakpoint in a law, events by time and by state, an event that changes a parameter."""
    return Network(
        {"A": 20, "B": 0},
        {"k": 1.0, "n": 8.0},
        [
            Reaction({}, {"A": 1}, propensity="piecewise(n, time < 1.5, 3 * n)"),
            Reaction({"A": 1}, {"B": 1}, rate="k"),
            Reaction({"B": 2}, {"A": 1}, rate=0.1),
            Reaction({"B": 1}, {}, rate=0.2),
        ],
        [Event("B > 15", {"B": "B - 10", "k": "k / 2"}), Event("time >= 2.25", {"A": "A + 40"})],
    )


MODELS = {
    "mixed": (mixed, 2.0),
    "driven": (driven, 4.0),
    "chain": (lambda: chain(40), 3.0),
    "schlogl": (examples.schlogl, 1.0),
    "dimer decay": (examples.dimer_decay, 0.02),
}


# ---- path by path


@pytest.mark.parametrize("name", MODELS)
def test_path_is_the_definitions(name):
    model, end = MODELS[name]
    net, times = model(), [0.0, end / 3, end / 3, end]
    for trajectory in (0, 2**32 + 5):
        truth = simulate_one_sparse(net, times, seed=4, trajectory=trajectory)
        run = ensemble(net, times, 1, seed=4, first=trajectory, log=len(truth.path))
        assert truth.n_events > 60
        assert run.counts[0].tolist() == truth.counts.tolist()
        assert run.n_events.tolist() == [truth.n_events]
        assert list(zip(run.log_time.tolist(), run.log_reaction.tolist(), strict=True)) == truth.path


def test_random_networks_follow_the_definition_to_the_bit():
    seen = Counter()
    for number in range(600):
        case = random_case(Random(number))
        truth = simulate_one_sparse(case.net, case.times, seed=3, trajectory=1, **case.options)
        run = ensemble(case.net, case.times, 2, seed=3, **case.options)
        assert engine.STATUS_NAMES[run.status[1]] == truth.status, case
        assert run.n_events[1] == truth.n_events, case
        assert run.stop_time[1] == truth.stop_time, case
        assert run.counts[1].tolist() == truth.counts.tolist(), case
        seen[truth.status] += 1
    assert len(seen) >= 6 and seen["invalid_propensity"] > 0, seen


def test_sums_do_not_drift_in_a_million_reactions():
    # Time and choice of the last reaction are those of its state alone, whose sums are computed here from nothing.
    net, n = examples.vilar_oscillator(), 1_000_000
    run = ensemble(net, [1000.0], 1, seed=2, max_events=n + 1, log=n + 1)
    assert engine.STATUS_NAMES[run.status[0]] == "max_events"
    fired = np.bincount(run.log_reaction[:n].numpy(), minlength=len(net.reactions))
    state = (net.initial + fired @ net.stoichiometry).astype(float).tolist()
    before, after = run.log_time[-2:].tolist()
    laws = Laws(net.program(), [*state, *net.parameter_values.tolist()], 0.0)
    total, chosen = laws.sums([*state, *net.parameter_values.tolist()], before)
    u1, u2 = uniforms(2, 0, 0, n)
    assert after == before + -FUNCTIONS["log"](u1) / total
    assert run.log_reaction[-1] == chosen(u2)


@pytest.mark.parametrize("name", MODELS)
def test_ensembles_have_the_moments_of_the_direct_method(name):
    model, end = MODELS[name]
    net, n = model(), 4000 if name != "dimer decay" else 600
    sample = [ensemble(net, [end], n, method=method, seed=9 + i) for i, method in enumerate(("direct", "sparse"))]
    direct, sparse = (run.counts[:, 0].double() for run in sample)
    moving = direct.var(0) > 0
    difference = (direct.mean(0) - sparse.mean(0))[moving]
    assert (difference / ((direct.var(0) + sparse.var(0)) / n).sqrt()[moving]).abs().max() < 4.5
    # Of a variance estimated from n values: (fourth central moment - variance^2) / n.
    squares = [(x - x.mean(0)) ** 2 for x in (direct, sparse)]
    spread = ((squares[0].var(0) + squares[1].var(0)) / n).sqrt()
    assert ((squares[0].mean(0) - squares[1].mean(0)) / spread)[moving].abs().max() < 4.5
    events = torch.stack([run.n_events.double() for run in sample])
    assert (events.mean(1).diff() / (events.var(1).sum() / n).sqrt()).abs() < 4.5


# ---- one trajectory, the same bits everywhere


@pytest.mark.parametrize("name", ["mixed", "driven", "chain"])
def test_bits_do_not_depend_on_level_threads_block_or_offset(name):
    model, end = MODELS[name]
    net, times = model(), [end / 2, end]
    truth = ensemble(net, times, 12, first=100)
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            assert same(ensemble(net, times, 12, first=100), truth)
    assert same(ensemble(net, times, 12, first=100, threads=3), truth)
    parts = [ensemble(net, times, n, first=100 + begin) for begin, n in ((0, 1), (1, 7), (8, 4))]
    assert torch.equal(torch.cat([part.counts for part in parts]), truth.counts)
    assert torch.equal(torch.cat([part.n_events for part in parts]), truth.n_events)


@pytest.mark.parametrize("name", ["mixed", "driven", "chain"])
def test_bits_do_not_depend_on_the_output_grid(name):
    model, end = MODELS[name]
    fine = ensemble(model(), np.linspace(0, end, 31).tolist(), 6)
    assert torch.equal(ensemble(model(), [end / 3, end], 6).counts, fine.counts[:, [10, 30]])


# ---- zeros


def test_channels_of_propensity_zero_never_fire():
    # One reaction in a hundred has molecules, at either end or within its block of the heap.
    for alive in (0, 1, 31, 32, 63, 64, 99):
        species = {f"S{i}": 1 if i == alive else 0 for i in range(100)}
        net = Network(species, {}, [Reaction({name: 1}, {name: 1}, rate=1.0, name=name) for name in species])
        run = ensemble(net, [2000.0], 1, log=1500)
        assert set(run.log_reaction.tolist()) == {alive}


def test_no_molecules_are_the_end_even_of_infinite_leaves():
    # A * B with a rate that overflows with B alone: no molecule of A, hence exactly no propensity.
    net = Network({"A": 0, "B": 100000}, {}, [Reaction({"A": 1, "B": 1}, {}, rate=1e305)])
    assert engine.STATUS_NAMES[ensemble(net, [1.0], 1).status[0]] == "absorbed"


@pytest.mark.parametrize("reactions", [[], [Reaction({"A": 1}, {}, rate=0.0)]])
def test_networks_without_propensity_are_absorbed_at_once(reactions):
    run = ensemble(Network({"A": 3}, {}, reactions), [0.0, 5.0], 2)
    assert run.counts[:, :, 0].tolist() == [[3, 3], [3, 3]]
    assert [engine.STATUS_NAMES[i] for i in run.status] == ["absorbed"] * 2


def test_a_negative_rate_is_invalid_only_once_its_law_is_negative():
    reactions = [Reaction({"A": 1}, {"B": 1}, rate=1.0), Reaction({"B": 1}, {}, rate="k")]
    net = Network({"A": 5, "B": 0}, {"k": -1.0}, reactions)
    run = ensemble(net, [0.0, 1e6], 1)
    assert engine.STATUS_NAMES[run.status[0]] == "invalid_propensity" and run.n_events[0] == 1


# ---- large networks


def test_thousands_of_reactions_conserve_molecules():
    net = chain(3000)
    run = ensemble(net, [0.5, 2.0], 3)
    assert (run.counts.sum(2) == 100).all() and (run.n_events > 100).all()


def test_egfr_follows_the_definition_to_the_bit(real_data):
    # From a state in which most of its 356 species have molecules: 3749 reactions, 355 groups of up to 262.
    net = read_bngl_net(real_data / "egfr_net.net")
    later = ensemble(net, [6.0], 1).counts[0, 0].double()
    assert (later > 0).sum() > 200
    truth = simulate_one_sparse(net, [1.0], seed=5, trajectory=0, initial=later.tolist(), max_events=150)
    run = ensemble(net, [1.0], 1, seed=5, initial=later[None], max_events=150, log=150)
    assert list(zip(run.log_time.tolist(), run.log_reaction.tolist(), strict=True)) == truth.path
    assert len({j for _, j in truth.path}) > 40


def test_heat_shock_agrees_with_the_direct_method(real_data):
    net = read_stochkit(real_data / "heat_shock_stochkit.xml")
    direct, sparse = (
        ensemble(net, [1.0], 60, method=method, seed=7 + i).counts[:, 0].double()
        for i, method in enumerate(("direct", "sparse"))
    )
    moving = (direct.var(0) + sparse.var(0)) > 0.5
    error = ((direct.var(0) + sparse.var(0)) / 60).sqrt()
    assert ((direct.mean(0) - sparse.mean(0)) / error)[moving].abs().max() < 4.5
