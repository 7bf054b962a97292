"""Tau-leaping: its Poisson numbers, its error against exact moments, what must hold exactly, and reproducibility."""

import numpy as np
import pytest
import torch

from harness import ordinary_levels
from pygen import backends, ssa

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("mean", [0.0, 0.5, 5.0, 9.99, 10.01, 50.0, 1e4, 1e8])
def test_poisson_numbers_have_the_poisson_distribution(mean):
    n = 200_000
    drawn = torch.ops.pygen.ssa_poisson(mean, n, 3).numpy()
    low, high = stats.poisson.ppf([1e-4, 1 - 1e-4], mean)
    edges = np.unique(np.floor(np.linspace(low, high, 40)))
    expected = n * np.diff([0.0, *stats.poisson.cdf(edges, mean), 1.0])
    seen = np.histogram(drawn, [-np.inf, *(edges + 0.5), np.inf])[0]
    enough = expected >= 5
    chi_square = ((seen - expected)[enough] ** 2 / expected[enough]).sum()
    assert stats.chi2.sf(chi_square, max(enough.sum() - 1, 1)) > 1e-5
    assert (drawn == np.floor(drawn)).all() and (drawn >= 0).all()
    assert seen[~enough].sum() <= 3 * expected[~enough].sum() + 20


def test_poisson_numbers_of_different_trajectories_are_not_correlated():
    drawn = torch.ops.pygen.ssa_poisson(50.0, 100_000, 7).numpy()
    correlation = np.corrcoef(drawn[:-1], drawn[1:])[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(len(drawn))


def immigration_death(scale: float) -> ssa.Network:
    return ssa.examples.immigration_death(immigration=scale, death=1.0, X=0)


def test_moments_are_those_of_the_process_to_a_few_percent():
    """X(t) is a Poisson variable of mean a (1 - exp(-t)); the error of the method is about epsilon = 3 %."""
    scale, n = 1e5, 4000
    times = torch.tensor([0.5, 1.0, 3.0, 10.0], dtype=torch.float64)
    run = ssa.simulate(immigration_death(scale), times, n, 1, method="tau")
    exact = scale * (1 - torch.exp(-times))
    assert ((run.mean()[:, 0] - exact).abs() / exact).max() < 0.01
    # Sampling alone: sd of a variance's estimate is sqrt(2 / n) = 2.2 %.
    assert ((run.var()[:, 0] - exact).abs() / exact).max() < 0.05 + 4.5 * (2 / n) ** 0.5


def test_a_smaller_epsilon_brings_the_mean_closer():
    """Of a decay the leap's Euler step is too fast by about half its length."""
    net = ssa.Network({"X": 10_000_000}, {"k": 1.0}, [ssa.Reaction({"X": 1}, {}, rate="k")])
    exact = 1e7 * np.exp(-1.0)
    errors = [
        abs(float(ssa.simulate(net, [1.0], 200, 1, method="tau", tau_epsilon=epsilon).mean()[0, 0]) / exact - 1)
        for epsilon in (0.2, 0.02)
    ]
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.011


def test_a_model_with_homodimers_agrees_with_the_exact_method():
    net, times, n = ssa.examples.dimer_decay(), torch.tensor([1.0, 5.0, 10.0]), 1000
    exact, leaped = (
        ssa.simulate(net, times, n, 5, method=method, stream=i) for i, method in enumerate(("direct", "tau"))
    )
    error = (leaped.mean() - exact.mean()).abs()
    sampling = 4.5 * ((leaped.var() + exact.var()) / n) ** 0.5
    assert (error <= sampling + 0.01 * exact.mean()).all()
    ratio = leaped.std() / exact.std()
    assert ((ratio - 1).abs() < 0.1 + 4.5 * n**-0.5).all()


def test_fluctuations_do_not_grow_at_an_equilibrium():
    """The published bounds alone let them grow to five times their size here."""
    run = ssa.simulate(ssa.examples.immigration_death(immigration=1e6, X=1_000_000), [20.0], 1000, 1, method="tau")
    assert abs(float(run.std()[0, 0]) / 1000 - 1) < 0.05 + 4.5 * (1 / 2000) ** 0.5


def test_leaps_are_fewer_than_reactions():
    """Two billion reactions: one by one they would take a minute, in leaps some milliseconds."""
    run = ssa.simulate(immigration_death(1e8), [5.0], 4, 1, method="tau")
    assert run.total_events > 4 * 5e8


def test_conserved_sums_are_conserved_and_counts_never_negative():
    net = ssa.examples.michaelis_menten()
    run = ssa.simulate(net, torch.linspace(0, 50, 26), 300, 2, method="tau")
    change = torch.from_numpy(net.stoichiometry).double()
    laws = torch.linalg.svd(change)[2][torch.linalg.matrix_rank(change) :]  # rows: conserved combinations
    assert len(laws) > 0
    kept = run.counts.double() @ laws.T
    torch.testing.assert_close(kept, kept[:1, :1].expand_as(kept), rtol=0, atol=1e-8)
    assert (run.counts >= 0).all()


def test_small_counts_are_left_to_exact_passes():
    """Below ten reactants every leap would be shorter than ten waiting times: the trajectories are the exact ones."""
    net = ssa.Network({"A": 8}, {"k": 0.3}, [ssa.Reaction({"A": 1}, {}, rate="k")])
    times = torch.linspace(0.1, 5, 20)
    n = 20_000
    run = ssa.simulate(net, times, n, 3, method="tau")
    p = torch.exp(-0.3 * times.double())
    z = (run.mean()[:, 0] - 8 * p) / (8 * p * (1 - p) / n).sqrt()
    assert z.abs().max() < 4.5


def test_events_breakpoints_and_stopping_work_in_leaps():
    net = ssa.Network(
        {"X": 100_000, "Y": 0},
        {"k": 1.0},
        [ssa.Reaction({"X": 1}, {"Y": 1}, propensity="k * X * (time < 1)")],
        [ssa.Event("time >= 2", {"Y": "7"})],
    )
    run = ssa.simulate(net, [1.0, 1.5, 2.0, 3.0], 50, 1, method="tau")
    x, y = run.counts.unbind(-1)
    assert (x[:, 0] == x[:, 3]).all()  # nothing fires after time 1
    assert abs(x[:, 0].double().mean() / (1e5 * np.exp(-1)) - 1) < 0.02
    assert (y[:, 1] == 100_000 - x[:, 1]).all() and (y[:, 2:] == 7).all()
    stopped = ssa.simulate(net, [1.0], 50, 1, method="tau", stop="Y >= 50000")
    assert (stopped.status == 2).all() and (stopped.counts[:, 0, 1] >= 50_000).all()
    assert ((stopped.stop_time - np.log(2)).abs() < 0.06).all()


def test_trajectories_do_not_depend_on_level_threads_or_split():
    net, times = ssa.examples.dimer_decay(), torch.linspace(0, 5, 6)

    def run(first=0, n=40, threads=1):
        return ssa.simulate(net, times, n, 9, method="tau", first=first, threads=threads).counts

    whole = run()
    assert torch.equal(whole, run(threads=2))
    assert torch.equal(whole, torch.cat([run(0, 13), run(13, 27)]))
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            assert torch.equal(whole, run())
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(whole)


def test_the_cap_on_events_ends_a_trajectory():
    run = pytest.warns(
        ssa.SimulationWarning, ssa.simulate, immigration_death(1e5), [5.0], 3, 1, method="tau", max_events=1000
    )
    assert (run.status == 3).all() and (run.n_events >= 1000).all() and (run.counts == -1).all()


def test_indices_that_would_share_random_numbers_are_refused():
    with pytest.raises(RuntimeError, match="2\\^40"):
        ssa.simulate(immigration_death(10.0), [1.0], 2, 1, method="tau", first=1 << 40)
