"""simulate and replay as a user calls them: what an ensemble may depend on, and what every mistake says."""

import math
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from pygen.ssa import engine
from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.reference import simulate_one
from pygen.ssa.simulate import SimulationWarning, choose_method, replay, simulate

T = (0.0, 0.5, 1.0, 1.0, 4.0)


@pytest.fixture(scope="module")
def net():
    """A and B turn into one another, and A is made."""
    return Network(
        {"A": 20, "B": 3},
        {"k": 0.5, "back": 0.1, "made": 2.0},
        [
            Reaction({"A": 1}, {"B": 1}, rate="k"),
            Reaction({"B": 1}, {"A": 1}, rate="back"),
            Reaction({}, {"A": 1}, rate="made"),
        ],
    )


@pytest.fixture(scope="module")
def endless():
    """300,000 reactions a trajectory: a simulation that only Ctrl-C ends."""
    return Network({"A": 1000}, {}, [Reaction({"A": 1}, {"A": 1}, rate=300.0)])


def equal(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("counts", "status", "n_events", "stop_time")
    )


# ---- what a trajectory depends on


def test_counts_are_int64_by_trajectory_time_and_species(net):
    run = simulate(net, T, 6, 1)
    assert run.counts.shape == (6, 5, 2) and run.counts.dtype == torch.int64 and run.counts.is_contiguous()
    assert run.t.tolist() == list(T) and run.species == ("A", "B")
    assert (run.counts[:, 0] == torch.tensor([20, 3])).all()


def test_an_ensemble_equals_the_plain_reference_trajectory_by_trajectory(net):
    run = simulate(net, T, 20, 5, stream=2, first=7)
    for i in range(20):
        one = simulate_one(net, T, seed=5, stream=2, trajectory=7 + i)
        assert run.counts[i].tolist() == one.counts.tolist() and int(run.n_events[i]) == one.n_events


def test_a_trajectory_does_not_depend_on_number_threads_or_grid(net):
    whole = simulate(net, T, 50, 1, threads=1)
    assert equal(whole, simulate(net, T, 50, 1, threads=3))
    assert torch.equal(simulate(net, T, 31, 1, first=19).counts, whole.counts[19:])
    assert torch.equal(simulate(net, [1.0, 4.0], 50, 1).counts, whole.counts[:, [3, 4]])
    assert torch.equal(simulate(net, torch.tensor([4.0]), 50, 1, record="B").counts[:, 0, 0], whole.counts[:, 4, 1])


def test_seed_and_stream_both_change_the_trajectories(net):
    runs = [simulate(net, T, 50, seed, stream=stream).counts for seed, stream in ((1, 0), (2, 0), (1, 1), (2, 1))]
    assert not any(torch.equal(a, b) for k, a in enumerate(runs) for b in runs[:k])


def test_parameters_and_initial_counts_per_trajectory_are_those_of_single_runs(net):
    k, made, a = [0.1, 1.0, 5.0], np.array([0, 50, 3]), torch.tensor([0, 7, 100])
    together = simulate(net, T, 3, 1, parameters={"k": k, "made": made, "back": 0.2}, initial={"A": a})
    for i in range(3):
        single = {"k": k[i], "made": int(made[i]), "back": 0.2}
        alone = simulate(net, T, 1, 1, first=i, parameters=single, initial={"A": int(a[i])})
        assert torch.equal(together.counts[i], alone.counts[0])
    matrix = np.stack([k, [0.2] * 3, made], axis=1)
    counts = np.stack([a, [3] * 3], axis=1)
    assert equal(together, simulate(net, T, 3, 1, parameters=matrix, initial=counts))


def test_threads_take_their_rows_of_parameters_in_every_block(net):
    k = torch.linspace(0.1, 3, 40)
    whole = simulate(net, T, 40, 1, parameters={"k": k})
    for block_bytes in (1, 1000, 10**6):
        blocks = simulate(net, T, 40, 1, parameters={"k": k}, reduce="moments", block_bytes=block_bytes)
        assert torch.equal(blocks.mean(), whole.mean()) and torch.equal(blocks.var(), whole.var())


@pytest.mark.parametrize("block_bytes", (1, 700, 4096, None))
@pytest.mark.parametrize("threads", (1, 2))
def test_a_reduced_run_has_the_bits_of_the_whole_one(net, block_bytes, threads):
    everything = ("moments", "covariance", "histogram", "first_passage")
    whole = simulate(net, T, 60, 1, stop="A == 5")
    run = simulate(net, T, 60, 1, stop="A == 5", reduce=everything, block_bytes=block_bytes, threads=threads)
    assert run.counts is None and run.status is None
    for name in ("mean", "var", "std", "covariance"):
        assert torch.equal(getattr(run, name)(), getattr(whole, name)()), name
    assert torch.equal(run.quantile([0.05, 0.5, 0.95]), whole.quantile([0.05, 0.5, 0.95]))
    assert all(torch.equal(a, b) for a, b in zip(run.histogram("B"), whole.histogram("B"), strict=True))
    assert torch.equal(run.stop_time, whole.stop_time)
    assert run.status_counts == whole.status_counts and run.status_counts["stopped"] > 10
    assert run.n_events == run.total_events == int(whole.n_events.sum())


def test_the_state_at_the_stopping_time_fills_the_rest_of_the_grid(net):
    run = simulate(net, T, 60, 1, stop="A == 5")
    stopped = run.status == run.status_names.index("stopped")
    assert stopped.any() and torch.equal(stopped, run.stop_time.isfinite())
    assert (run.counts[stopped, -1, 0] == 5).all()
    late = run.t[None] >= run.stop_time[:, None]
    assert (run.counts[late][:, 0] == 5).all() and late.any()


def test_auto_is_chosen_by_the_number_of_reactions_alone():
    def chain(n):
        return Network({"A": 1}, {}, [Reaction({"A": 1}, {"A": 1}, rate=1.0)] * n)

    assert [choose_method(chain(n)) for n in (0, 1, 160, 161, 500)] == ["direct"] * 3 + ["sparse"] * 2


def test_no_trajectories_are_an_ensemble_too(net):
    run = simulate(net, T, 0, 1)
    assert run.counts.shape == (0, 5, 2) and run.mean().isnan().all()
    assert simulate(net, T, 0, 1, reduce="moments").mean().isnan().all()


# ---- warnings and mistakes


def test_trajectories_that_end_early_are_counted_and_left_out(net):
    with pytest.warns(SimulationWarning, match=r"(\d+) of 60 trajectories ended early: \1 max_events \(raise max_"):
        run = simulate(net, T, 60, 1, max_events=40)
    early = run.status == run.status_names.index("max_events")
    assert run.status_counts["max_events"] == int(early.sum())
    assert 5 < int(early.sum()) < 55
    missing = run.counts[:, -1, 0] < 0
    assert torch.equal(missing, early)
    assert torch.equal(run.mean()[-1], run.counts[~early, -1].double().mean(0))
    assert run.present.tolist()[-1] == 60 - int(early.sum())
    with pytest.warns(SimulationWarning):
        reduced = simulate(net, T, 60, 1, max_events=40, reduce="moments", block_bytes=1000)
    assert torch.equal(reduced.mean(), run.mean()) and torch.equal(reduced.var(), run.var())


def test_a_run_that_ends_well_warns_of_nothing(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(net, T, 10, 1, stop="A == 5")


MISTAKES = {
    "descending": ({"t": [2, 1]}, "t must be ascending"),
    "before the start": ({"t": [-1, 1]}, r"t must not begin before the process does, at t0 = 0; got t\[0\] = -1"),
    "no times": ({"t": []}, "at least one time, got shape"),
    "two rows of times": ({"t": [[0, 1]]}, r"got shape \(1, 2\)"),
    "endless": ({"t": [0, math.inf]}, "t must be finite"),
    "t0": ({"t0": math.nan}, "t0 must be finite"),
    "negative number": ({"trajectories": -1}, "trajectories must be an integer with 0 <= trajectories"),
    "large seed": ({"seed": 1 << 32}, "seed must be an integer with 0 <= seed < 4294967296, got 4294967296"),
    "negative seed": ({"seed": -1}, "got -1"),
    "large stream": ({"stream": 1 << 32}, "stream must be an integer with 0 <= stream"),
    "first": ({"first": -1}, "first must be"),
    "threads": ({"threads": 0}, "threads must be an integer with 1 <= threads"),
    "no events": ({"max_events": 0}, "max_events must be an integer with 1 <= max_events"),
    "block": ({"block_bytes": 0}, "block_bytes must be"),
    "method": ({"method": "fast"}, "method must be one of auto, direct, lane, sparse, tau, got 'fast'"),
    "epsilon": ({"tau_epsilon": 1.0}, "tau_epsilon must be between 0 and 1"),
    "device": ({"device": "meta"}, "device must be cpu or cuda, got meta"),
    "reduction": ({"reduce": "variance"}, "reduce must be None or some of moments, covariance, histogram, first_pass"),
    "nothing": ({"reduce": ()}, "got nothing"),
    "passage of what": ({"reduce": "first_passage"}, 'needs a condition to pass: stop="A == 0"'),
    "bins without histogram": ({"bins": {"A": [0, 1]}}, 'bins belongs to reduce="histogram"'),
    "bins of nothing": ({"bins": {"Z": [0, 1]}, "reduce": "histogram"}, "bins: unknown 'Z'; there is: A, B"),
    "bins that descend": ({"bins": {"A": [1, 0]}, "reduce": "histogram"}, "strictly ascending"),
    "unknown parameter": ({"parameters": {"kk": 1}}, "parameters: unknown 'kk'; there is: k, back, made"),
    "length": ({"parameters": {"k": [1, 2]}}, r"parameters\['k'\] must be a number or an array of \(4,\), one value"),
    "shape": ({"parameters": np.zeros((4, 2))}, r"of shape \(4, 3\) in the order k, back, made; got shape \(4, 2\)"),
    "nan": ({"parameters": {"k": [1, 1, math.nan, 1]}}, "parameters: k is NaN in trajectory 2"),
    "unknown species": ({"initial": {"C": 1}}, "initial: unknown 'C'; there is: A, B"),
    "negative count": ({"initial": {"A": -1}}, r"initial: A must be an integer from 0 to 2\^53, got -1"),
    "half a molecule": ({"initial": {"B": [1, 2, 2.5, 1]}}, "initial: B must be .* got 2.5 in trajectory 2"),
    "too many": ({"initial": {"A": 2.0**54}}, "initial: A must be"),
    "not recorded": ({"record": ["A", "C"]}, "record: unknown 'C'; there is: A, B"),
    "recorded twice": ({"record": ["A", "A"]}, "record names a species twice"),
    "recorded nothing": ({"record": []}, "record must name at least one"),
    "stop": ({"stop": "C == 0"}, "unknown name 'C'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence(net, mistake):
    arguments, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=sentence):
        simulate(net, **{"t": T, "trajectories": 4, "seed": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    (
        ({"trajectories": 2.5}, "trajectories must be an integer, got 2.5"),
        ({"t": "soon"}, "t must be numbers"),
        ({"parameters": {"k": "fast"}}, r"parameters\['k'\] must be a number"),
        ({"bins": [0, 1], "reduce": "histogram"}, "bins must be a mapping"),
        ({"net": "model.xml"}, "net must be a pygen.ssa.Network, got str"),
    ),
)
def test_a_wrong_type_is_a_sentence(net, arguments, sentence):
    with pytest.raises(TypeError, match=sentence):
        simulate(**{"net": net, "t": T, "trajectories": 4, "seed": 1, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_sentence(net):
    with pytest.raises(RuntimeError, match="device cuda: torch sees no CUDA device here"):
        simulate(net, T, 4, 1, device="cuda")


def test_an_error_of_the_engine_reaches_the_caller(net, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("ssa_run: broken")

    monkeypatch.setattr(engine, "run_block", broken)
    for reduce in (None, "moments"):
        with pytest.raises(RuntimeError, match="ssa_run: broken"):
            simulate(net, T, 4, 1, reduce=reduce)


# ---- without kernels


def test_without_kernels_the_reference_gives_the_same_and_says_once_that_it_is_slow(net, monkeypatch):
    compiled = simulate(net, T, 5, 1, stop="A == 5", parameters={"k": [0.1, 0.2, 0.3, 0.4, 5.0]})
    monkeypatch.setattr(engine, "is_compiled", lambda: False)
    monkeypatch.setattr(engine, "_warned_of_the_reference", False)
    with pytest.warns(RuntimeWarning, match="plain Python, hundreds of times slower"):
        plain = simulate(net, T, 5, 1, stop="A == 5", parameters={"k": [0.1, 0.2, 0.3, 0.4, 5.0]}, record=("B", "A"))
    assert torch.equal(plain.counts, compiled.counts[:, :, [1, 0]])
    assert torch.equal(plain.status, compiled.status) and torch.equal(plain.n_events, compiled.n_events)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = replay(net, seed=1, trajectory=2, t=4.0)
    assert len(again.time) == len(again.reaction) > 10
    with pytest.raises(RuntimeError, match="method tau needs the compiled engine"):
        simulate(net, T, 5, 1, method="tau")


# ---- Ctrl-C and the progress bar


def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.parametrize("reduce", (None, "moments"))
def test_ctrl_c_returns_what_is_finished(endless, reduce):
    timer = interrupt_after(0.4)
    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(SimulationWarning, match=r"unfinished \(interrupted\)"):
        run = simulate(endless, [0.0, 1.0], 5000, 3, reduce=reduce, threads=1, block_bytes=16 * 20)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert run.interrupted and "(interrupted)" in repr(run)
    finished = run.status_counts["completed"]
    assert 0 < finished < 5000 and run.status_counts["unfinished"] == 5000 - finished
    if reduce is None:
        done = run.status == 0
        assert (run.counts[~done] == -1).all() and run.stop_time[~done].isinf().all()
        assert (run.counts[done] == 1000).all() and run.n_events[done].min() > 290_000
    assert run.present[-1] == finished


def test_a_second_ctrl_c_raises(net, monkeypatch):
    def deaf(*_, **__):
        time.sleep(2)

    monkeypatch.setattr(engine, "run_block", deaf)
    timers = interrupt_after(0.2), interrupt_after(0.5)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        simulate(net, T, 4, 1)
    assert time.monotonic() - begun < 1.5
    for timer in timers:
        timer.join()


def test_a_simulation_in_another_thread_leaves_ctrl_c_alone(net):
    runs = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: runs.append(simulate(net, T, 4, 1)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.equal(runs[0].counts, simulate(net, T, 4, 1).counts)


def test_progress_is_drawn_when_asked_for_and_not_in_a_pipe(net, endless, capsys):
    pytest.importorskip("rich")
    simulate(endless, [0.0, 0.1], 100, 1, progress=True)
    assert "of 100 trajectories" in capsys.readouterr().err
    simulate(net, T, 100, 1)
    assert capsys.readouterr().err == ""


# ---- replay


def states_on(grid, again):
    """The states of a replay at the times of a grid: after all jumps at or before each."""
    return again.states[torch.searchsorted(again.time, torch.as_tensor(grid, dtype=torch.float64), right=True)]


@pytest.mark.parametrize("method", ("auto", "direct", "lane"))
def test_a_replay_passes_through_the_ensembles_counts(net, method):
    run = simulate(net, T, 8, 3, stream=1, first=40, method=method)
    for i in (0, 5, 7):
        again = replay(net, seed=3, stream=1, trajectory=40 + i, t=T, method=method)
        assert torch.equal(states_on(T, again), run.counts[i]) and again.status == "completed"
        assert len(again.time) == len(again.reaction) == len(again.states) - 1 == int(run.n_events[i])
        assert (again.time.diff() > 0).all() and again.time[-1] <= T[-1]
    assert again.reaction_names == ("r0", "r1", "r2") and again.species == ("A", "B")


def test_a_replay_is_the_references_path(net):
    again = replay(net, seed=3, trajectory=2, t=4.0)
    path = simulate_one(net, [4.0], seed=3, trajectory=2, record_path=True).path
    assert again.reaction.tolist() == [reaction for _, reaction in path]
    # The reference takes the logarithm of libm, which may differ from the engine's in the last bit of each wait.
    np.testing.assert_allclose(again.time, [instant for instant, _ in path], rtol=1e-13)


def test_a_replay_takes_its_row_of_parameters_and_initial_counts(net):
    k, a = [0.1, 1.0, 5.0], [5, 10, 15]
    run = simulate(net, T, 3, 1, first=10, parameters={"k": k}, initial={"A": a}, stop="A == 2")
    for i in range(3):
        arguments = {"parameters": {"k": k}, "initial": {"A": a}, "first": 10, "stop": "A == 2"}
        again = replay(net, seed=1, trajectory=10 + i, t=T, **arguments)
        assert torch.equal(states_on(T, again), run.counts[i])
        assert again.status == run.status_names[run.status[i]]
    with pytest.raises(ValueError, match=r"has 3 rows; trajectory - first = 3 is none of them"):
        replay(net, seed=1, trajectory=13, t=T, first=10, parameters={"k": k})


def test_a_replay_shows_events_at_their_instants_with_the_state_after_them():
    net = Network(
        {"A": 10, "B": 0, "fed": 0},
        {"k": 1.0},
        [Reaction({"A": 1}, {"B": 1}, rate="k")],
        [
            Event("time >= 1.5", {"A": "A + 20"}, name="feed"),
            Event("A <= 3", {"A": "50", "k": "k / 2"}, name="refill"),
            Event("A >= 50", {"fed": "fed + 1"}),
            Event("true_at_start < 1", {"B": "7"}, initial_value=False),
        ],
        rules={"true_at_start": "0 * k"},
    )
    grid = [0.0, 0.7, 1.5, 3.0, 5.0]
    run = simulate(net, grid, 12, 9)
    seen = set()
    for i in range(12):
        again = replay(net, seed=9, trajectory=i, t=grid)
        assert torch.equal(states_on(grid, again), run.counts[i])
        assert int((again.reaction == 0).sum()) == int(run.n_events[i])
        assert again.reaction_names == ("r0", "feed", "refill", "event2", "event3")
        assert again.states[0].tolist() == [10, 0, 0]
        assert again.time[again.reaction == 1].tolist() == [1.5]
        assert again.reaction[0] == 4 and again.time[0] == 0 and again.states[1].tolist() == [10, 7, 0]
        after = again.states[1:]
        refills = (again.reaction == 2).nonzero().flatten()
        assert (after[refills, 0] == 50).all() and (after[refills - 1, 0] == 3).all()
        change = again.states.diff(dim=0)[again.reaction == 0]
        assert (change == torch.tensor([-1, 1, 0])).all(), "a jump shows its own state, also before an event it causes"
        seen.update(again.reaction.tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_a_replay_of_leaps_is_refused(net):
    with pytest.raises(ValueError, match="leaps over jumps"):
        replay(net, seed=1, trajectory=0, t=1.0, method="tau")
