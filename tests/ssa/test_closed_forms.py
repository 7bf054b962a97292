"""Ensembles against what is known in closed form: means, variances and whole distributions, at fixed seeds.

A mean is judged by z = sqrt(n) (m - mu) / sigma, a variance by z = sqrt(n) (s^2 / sigma^2 - 1) / sqrt(kurtosis - 1)
with the exact kurtosis: both are standard normal for a correct simulator. One in 150,000 is beyond 4.5.
"""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from pygen.ssa import examples
from pygen.ssa.cme import solve_cme
from pygen.ssa.network import Network, Reaction
from pygen.ssa.simulate import simulate

LIMIT = 4.5


def counts(net, times, n, seed, **arguments):
    """(n, T, S) int64 of trajectories that all completed."""
    run = simulate(net, times, n, seed, progress=False, **arguments)
    assert run.status_counts["completed"] + run.status_counts["absorbed"] + run.status_counts["stopped"] == n
    return run.counts.numpy()


def z_of_mean(x, mean, variance):
    return math.sqrt(len(x)) * (x.mean(0) - mean) / np.sqrt(variance)


def z_of_variance(x, variance, fourth_cumulant):
    """The sample variance of n numbers has the variance sigma^4 (2 + excess kurtosis) / n, up to 1 / n^2."""
    spread = np.sqrt(2 + fourth_cumulant / variance**2)
    return math.sqrt(len(x)) * (x.var(0, ddof=1) / variance - 1) / spread


def assert_cumulants(x, mean, variance, fourth_cumulant):
    assert (np.abs(z_of_mean(x, mean, variance)) < LIMIT).all()
    assert (np.abs(z_of_variance(x, variance, fourth_cumulant)) < LIMIT).all()


def assert_histogram(x, values, p):
    """Chi-square of the counts x against P(values[i]) = p[i]; neighbouring values share bins that expect 5 or more."""
    expected, observed = len(x) * p, np.array([(x == value).sum() for value in values], np.float64)
    bins, total = np.empty(len(p), int), 0.0
    bin_ = 0
    for i, e in enumerate(expected):
        bins[i] = bin_
        total += e
        if total >= 5:
            bin_, total = bin_ + 1, 0.0
    bins = np.minimum(bins, bin_ - 1)  # what is left over joins the last full bin
    e, o = np.bincount(bins, expected), np.bincount(bins, observed)
    e[-1] += len(x) - e.sum()  # what `values` does not contain
    o[-1] += len(x) - o.sum()
    assert len(e) >= 4 and (e >= 5).all()
    # The probability that a standard normal variable passes LIMIT on one side.
    assert stats.chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1) > stats.norm.sf(LIMIT)


def test_immigration_death_is_binomial_plus_poisson():
    a, m, x0 = 100.0, 1.0, 300
    times = np.array([0.1, 0.7, 3.0])
    x = counts(examples.immigration_death(immigration=a, death=m, X=x0), times, 40_000, seed=1)[:, :, 0]
    q = np.exp(-m * times)
    arrived = a / m * (1 - q)
    binomial = x0 * q * (1 - q)
    assert_cumulants(x, x0 * q + arrived, binomial + arrived, binomial * (1 - 6 * q * (1 - q)) + arrived)
    k = np.arange(400)
    for i in range(len(times)):
        p = np.convolve(stats.binom.pmf(k, x0, q[i]), stats.poisson.pmf(k, arrived[i]))[:400]
        assert_histogram(x[:, i], k, p)


def birth_death_pmf(birth, death, t, n=4000):
    """P(X(t) = 0..n - 1) from one ancestor (Kendall 1948)."""
    growth = math.exp((birth - death) * t)
    extinct, stay = (rate * (growth - 1) / (birth * growth - death) for rate in (death, birth))
    k = np.arange(1, n)
    return np.concatenate(([extinct], (1 - extinct) * (1 - stay) * stay ** (k - 1)))


def test_birth_death_has_its_mean_and_variance():
    birth, death, x0 = 0.1, 0.11, 100
    times = np.array([2.0, 10.0, 40.0])
    x = counts(examples.birth_death(), times, 40_000, seed=2)[:, :, 0]
    growth = np.exp((birth - death) * times)
    variance = x0 * (birth + death) / (birth - death) * growth * (growth - 1)
    fourth = []
    for t in times:  # the ancestors are independent: their cumulants add
        p, k = birth_death_pmf(birth, death, t), np.arange(4000)
        centred = k - p @ k
        fourth.append(x0 * (p @ centred**4 - 3 * (p @ centred**2) ** 2))
        assert x0 * (p @ centred**2) == pytest.approx(variance[list(times).index(t)])
    assert_cumulants(x, x0 * growth, variance, np.array(fourth))


def test_first_passage_to_extinction_has_its_distribution():
    birth, death, x0 = 0.5, 1.0, 4
    run = simulate(examples.birth_death(birth=birth, death=death, X=x0), [60.0], 20_000, 3, stop="X == 0")
    times = run.stop_time.numpy()
    edges = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 60.0])
    cdf = np.array([0.0] + [birth_death_pmf(birth, death, t, 2)[0] ** x0 for t in edges[1:]])
    observed = np.histogram(times[np.isfinite(times)], edges)[0]
    expected = len(times) * np.diff(cdf)
    assert (expected >= 5).all() and observed.sum() >= len(times) - 1
    assert stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected)) > stats.norm.sf(LIMIT)


def test_batch_arrivals_have_their_mean_and_variance():
    a, m, b = 1.0, 0.2, 5
    times = np.array([1.0, 5.0, 30.0])
    x = counts(examples.batch_immigration(), times, 60_000, seed=4)[:, :, 0]
    q = np.exp(-m * times)
    variance = a * b / m * (1 - q) + a * b * (b - 1) / (2 * m) * (1 - q**2)

    def cumulant(order, t):
        """Of a compound Poisson variable: a int E[Binomial(b, e^-ms)^order] ds."""
        k = np.arange(b + 1)
        return integrate.quad(lambda s: a * (stats.binom.pmf(k, b, math.exp(-m * s)) @ k**order), 0, t)[0]

    np.testing.assert_allclose([cumulant(2, t) for t in times], variance, rtol=1e-8)
    assert_cumulants(x, a * b / m * (1 - q), variance, np.array([cumulant(4, t) for t in times]))


def test_two_stage_expression_has_its_means():
    times = np.array([0.3, 1.0, 4.0])
    x = counts(examples.two_stage_expression(), times, 20_000, seed=5)
    decay = np.exp(-times)
    mean = np.stack((20 * (1 - decay), 50 * (1 - (1 + times) * decay)), 1)
    exact = solve_cme(examples.two_stage_expression(), times, tolerance=1e-8)
    np.testing.assert_allclose(exact.mean(), mean, rtol=1e-5)
    assert (np.abs(z_of_mean(x, mean, exact.std() ** 2)) < LIMIT).all()


def test_two_stage_expression_has_its_stationary_variances_and_covariance():
    n = 20_000
    x = counts(examples.two_stage_expression(), [16.0], n, seed=6)[:, 0]  # (1 + 16) e^-16 = 2e-6 of a mean is missing
    # A Poisson stream of clusters, each of an mRNA of lifetime l and its proteins, of which Poisson(mean(s)) are alive
    # at age s. The factorial cumulants of n are 20 int E[mean(s)^r] ds.
    life, age = np.meshgrid(*[np.linspace(0, 40, 2001)] * 2, indexing="ij")
    alive = 2.5 * (np.exp(-(age - np.minimum(age, life))) - np.exp(-age))
    factorial = [
        20 * integrate.simpson(integrate.simpson(alive**r * np.exp(-life), dx=0.02, axis=0), dx=0.02)
        for r in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose(factorial[:2], [50, 62.5], rtol=1e-4)
    fourth = factorial @ np.array([1, 7, 6, 1])
    assert_cumulants(x, np.array([20, 50]), np.array([20, 112.5]), np.array([20, fourth]))
    products = (x[:, 0] - 20) * (x[:, 1] - 50)
    assert abs(products.mean() - 25) < LIMIT * products.std() / math.sqrt(n)


def schlogl_stationary(n=2000):
    """pi(x) by detailed balance: pi(x + 1) / pi(x) = birth(x) / death(x + 1)."""
    x = np.arange(n, dtype=np.float64)
    birth = 0.015 * x * (x - 1) + 200
    death = 1e-4 / 6 * x * (x - 1) * (x - 2) + 3.5 * x
    logarithm = np.concatenate(([0.0], np.cumsum(np.log(birth[:-1]) - np.log(death[1:]))))
    p = np.exp(logarithm - logarithm.max())
    return p / p.sum()


def test_schlogl_keeps_its_stationary_distribution():
    # The passage from mode to mode takes hundreds of time units, so an ensemble that starts at one count is far from
    # stationary for as long. One that starts with the exact distribution must keep it; within a mode it forgets its
    # start in about one unit.
    p = schlogl_stationary()
    k = np.arange(len(p))
    mean = p @ k
    variance, fourth = (p @ (k - mean) ** r for r in (2, 4))
    assert (mean, math.sqrt(variance), p[:256].sum()) == pytest.approx((454.861, 199.879, 0.220260), abs=5e-4)
    n = 3000
    start = np.random.default_rng(7).choice(len(p), n, p=p)
    x = counts(examples.schlogl(), [0.0, 2.0], n, seed=7, initial={"X": start})[:, :, 0]
    np.testing.assert_array_equal(x[:, 0], start)
    assert np.corrcoef(start[start > 400], x[start > 400, 1])[0, 1] < 0.5  # it did forget
    assert_cumulants(x[:, 1], mean, variance, fourth - 3 * variance**2)
    low = p[:256].sum()
    assert abs((x[:, 1] < 256).mean() - low) < LIMIT * math.sqrt(low * (1 - low) / n)
    assert_histogram(x[:, 1], k, p)


@pytest.mark.parametrize(
    ("net", "t", "n", "species"),
    [
        (examples.schlogl(), 3.0, 3000, "X"),
        (examples.toggle_switch(), 20.0, 5000, "A"),
        (examples.michaelis_menten(), 20.0, 5000, "P"),
        (examples.sir(S=60, I=2, contact=0.01, recovery=0.2), 400.0, 5000, "R"),
        (examples.dimer_decay(S1=60, k2=0.05), 2.0, 5000, "S2"),
        (
            Network(
                {"A": 30, "B": 0},
                {"k": 0.002, "l": 0.1},
                [Reaction({"A": 3}, {"B": 1}, rate="k"), Reaction({"B": 1}, {"A": 3}, propensity="l * B / (1 + A)")],
            ),
            3.0,
            5000,
            "B",
        ),
    ],
    ids=["schlogl", "toggle", "enzyme", "sir", "dimer", "third-order"],
)
def test_ensemble_has_the_distribution_that_the_master_equation_says(net, t, n, species):
    x = counts(net, [t], n, seed=8)[:, 0, net.species.index(species)]
    values, p = solve_cme(net, [t], tolerance=1e-7).marginal(species)
    assert_histogram(x, values, p[0])


def test_chi_square_notices_a_rate_that_is_off_by_three_per_cent():
    values, p = solve_cme(examples.toggle_switch(), [20.0], tolerance=1e-7).marginal("A")
    x = counts(examples.toggle_switch(decay=1.03), [20.0], 20_000, seed=9)[:, 0, 0]
    with pytest.raises(AssertionError):
        assert_histogram(x, values, p[0])
