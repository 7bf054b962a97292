"""The claim of pygen.ssa: trajectory i of a seed is the same 0/1 string wherever, beside whatever and on any grid.

The models are those of bit_cases.py; that they are simulated rightly is the business of test_fuzz.py.
"""

import numpy as np
import pytest
import torch
from ssa.bit_cases import CASES, UNEVEN, N, assert_same, joined, times_of_third_jumps, values

from harness import ordinary_levels
from pygen import backends, ssa
from pygen.ssa import engine, examples

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def runs():
    """The ensembles that the others are compared with, by case."""
    return {name: case.simulate() for name, case in CASES.items()}


@pytest.fixture
def base(request, runs, case):
    return next(runs[name] for name, one in CASES.items() if one is case)


@every_case
def test_the_cases_end_as_they_are_meant_to_and_in_many_ways(case, base):
    assert {name for name, number in base.status_counts.items() if number} == case.ends
    assert len({tuple(row) for row in base.counts.flatten(1).tolist()}) >= 4


@every_case
def test_bits_do_not_depend_on_level_method_and_threads(case, base):
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            for method in ("direct", "lane"):
                for threads in (1, 2, 3):
                    other = case.simulate(method=method, threads=threads)
                    assert_same(other, base, f"at level {level}, method {method}, {threads} threads")


def test_bits_of_times_do_not_depend_on_level_and_method():
    truth = times_of_third_jumps()
    assert truth.isfinite().all() and truth.unique().numel() == truth.numel()
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            for method in ("direct", "lane"):
                assert torch.equal(times_of_third_jumps(method=method), truth), f"at level {level}, method {method}"


@every_case
def test_bits_do_not_depend_on_what_is_simulated_beside_a_trajectory(case, base):
    assert_same(joined(case.simulate(37), case.simulate(63, first=37)), base)
    assert_same(joined(case.simulate(1), case.simulate(8, first=1), case.simulate(91, first=9)), base)
    for i in (0, 41, N - 1):
        assert_same(case.simulate(1, first=i), values(base, slice(i, i + 1)), f"in trajectory {i} alone")


@every_case
def test_bits_do_not_depend_on_the_grid(case, base):
    times = np.array(case.times)
    steps = np.linspace(times[0], times[-1], 23)
    fine = np.sort(np.concatenate([times, times[2:], steps]))
    finer = case.simulate(times=fine)
    # Of repeated times the last: all of them show the same state.
    for rows, grid in ((np.arange(len(times)), times), (np.array([0, 2, len(times) - 1]), times[[0, 2, -1]])):
        coarse = case.simulate(times=grid)
        at = torch.from_numpy(np.searchsorted(fine, grid, side="right") - 1)
        assert torch.equal(coarse.counts, finer.counts[:, at])
        assert torch.equal(coarse.counts, base.counts[:, torch.from_numpy(rows)])
        for name in ("status", "n_events", "stop_time"):
            assert torch.equal(getattr(coarse, name), getattr(finer, name)), name


@every_case
def test_recording_some_species_shows_what_recording_all_does(case, base):
    some = case.net.species[::-1][:2]
    columns = [case.net.species.index(name) for name in some]
    assert torch.equal(case.simulate(record=some).counts, base.counts[:, :, columns])


@every_case
def test_statistics_do_not_depend_on_blocks(case, base):
    whole = case.simulate(reduce="covariance")
    assert whole.status_counts == base.status_counts and whole.total_events == base.total_events
    for block_bytes in (1, 8 * len(case.times) * len(case.net.species) * 37):
        blocks = case.simulate(reduce="covariance", block_bytes=block_bytes)
        for statistic in ("mean", "var"):
            a, b, c = (torch.as_tensor(getattr(run, statistic)()) for run in (whole, blocks, base))
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
            assert torch.equal(a.nan_to_num(), c.nan_to_num())


@pytest.mark.parametrize("threads", [1, 2])
@every_case
def test_bits_do_not_depend_on_whether_denormals_are_flushed(case, base, threads):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        for method in ("direct", "lane"):
            assert_same(case.simulate(method=method, threads=threads), base, f"with {method}")
        assert torch.tensor([1e-310], dtype=torch.float64).mul(2).item() == 0, "the caller's setting was changed"
    finally:
        torch.set_flush_denormal(False)


# ---- one trajectory, jump by jump ------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("i", [0, 41])
def test_a_replayed_path_passes_through_the_states_of_the_ensemble(case, base, i):
    arguments = {"seed": 5, "trajectory": i, "t": case.times, "method": "direct", **case.arguments_of(i, 1)}
    path = ssa.replay(case.net, **arguments | {"first": i})
    assert path.status == engine.STATUS_NAMES[base.status[i]]
    assert (path.reaction < len(case.net.reactions)).sum() == base.n_events[i]
    # The state at t_k is the one before the first jump after t_k: jumps of the network's events at t_k are in it.
    at = torch.searchsorted(path.time, torch.tensor(case.times, dtype=torch.float64), right=True)
    reached = base.counts[i, :, 0] >= 0
    assert reached.any() and torch.equal(path.states[at][reached], base.counts[i][reached])
    if path.status == "stopped":
        assert path.time[-1] == base.stop_time[i]


def test_a_replay_shows_row_i_of_an_ensemble_with_a_row_of_arguments_each():
    case = CASES["parameters"]
    run = case.simulate(20, first=60)
    path = ssa.replay(
        case.net, seed=5, trajectory=63, first=60, t=case.times, method="direct", **case.arguments_of(60, 20)
    )
    assert path.states[-1].tolist() == run.counts[3, -1].tolist()


# ---- what does make another trajectory -------------------------------------------------------------------------------


def rows_of(**options):
    times = np.linspace(0, 2, 40)
    run = ssa.simulate(examples.immigration_death(), times, 200, progress=False, **{"seed": 1, **options})
    return [tuple(row) for row in run.counts[:, 1:].flatten(1).tolist()]


def test_seeds_streams_and_indices_all_give_different_trajectories():
    ensembles = [
        {"seed": 1}, {"seed": 2}, {"seed": 2**32 - 1}, {"stream": 1}, {"stream": 2**32 - 1}, {"seed": 2, "stream": 1},
        {"first": 200}, {"first": 2**32}, {"first": 2**61},
    ]  # fmt: skip
    rows = [row for options in ensembles for row in rows_of(**options)]
    assert len(set(rows)) == len(rows) == 200 * len(ensembles)
    assert set(rows_of(first=100)) & set(rows_of()) == set(rows_of()[100:])


def correlation(a, b):
    return np.corrcoef(a.flatten().double().numpy(), b.flatten().double().numpy())[0, 1]


def final_counts(initial, stream):
    net = examples.immigration_death(immigration=20.0)
    run = ssa.simulate(net, [0.4], 4000, 1, initial={"X": initial}, stream=stream, progress=False)
    return run.counts[:, 0, 0]


def test_a_stream_makes_a_reused_seed_independent_for_another_initial_state():
    """With the seed alone the same random numbers serve both: what a difference of two models wants, and a pool not."""
    limit = 4.5 / np.sqrt(4000)
    reused = correlation(final_counts(100, 0), final_counts(101, 0))
    assert reused > 0.2 > limit
    assert abs(correlation(final_counts(100, 0), final_counts(101, 1))) < limit
    assert abs(correlation(final_counts(100, 0)[1:], final_counts(100, 0)[:-1])) < limit


def test_a_trajectory_far_out_is_found_by_its_index_alone():
    """Both halves of the 64-bit index count, and the passes' counter goes on beyond one vector of lanes."""
    case = CASES["third order"]
    for first in (2**32 - 3, 2**40 + 1):
        together = case.simulate(6, first=first)
        assert_same(joined(*(case.simulate(1, first=first + i) for i in range(6))), together)
        assert together.n_events.unique().numel() > 1


def test_a_later_end_of_the_grid_changes_nothing_before():
    case = CASES["events"]
    longer = case.simulate(times=[*UNEVEN, 3.0, 9.0])
    assert torch.equal(longer.counts[:, : len(UNEVEN)], case.simulate().counts)
