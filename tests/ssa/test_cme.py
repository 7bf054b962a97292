"""The master equation: against dense matrix exponentials, closed forms and its own bound.

The dense generators here are built state by state in plain Python, from tables that are written out again.
"""

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from pygen.ssa import _states, examples
from pygen.ssa.cme import solve_cme
from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.stationary import stationary_distribution

METHODS = ("uniformization", "expm_multiply")


def dense(start, jumps, most=10_000):
    """All states reached from `start` (a tuple) and the generator; jumps: pairs of a law of the state and a change."""
    index, todo = {start: 0}, [start]
    entries = []
    while todo:
        state = todo.pop()
        for law, change in jumps:
            rate = law(*state)
            if rate:
                target = tuple(x + d for x, d in zip(state, change, strict=True))
                if target not in index:
                    index[target] = len(index)
                    todo.append(target)
                    assert len(index) < most
                entries.append((index[state], index[target], rate))
    generator = np.zeros((len(index), len(index)))
    for source, target, rate in entries:
        generator[target, source] += rate
        generator[source, source] -= rate
    return index, generator


def truth(start, jumps, t):
    """{state: probability} at t."""
    index, generator = dense(start, jumps)
    p = linalg.expm(generator * t)[:, 0]
    return {state: p[i] for state, i in index.items()}


def errors(solution, exact, k):
    """The sum over all states of |true - computed| at time k; exact: {state: probability}."""
    computed = {tuple(row): p for row, p in zip(solution.states.tolist(), solution.probabilities[k], strict=True)}
    return sum(abs(exact.get(state, 0.0) - computed.get(state, 0.0)) for state in exact.keys() | computed.keys())


def immigration_death_pmf(n, t, a=1000.0, m=1.0, x0=1000):
    """P(X(t) = 0..n - 1): Binomial(x0, e^-mt) plus Poisson(a (1 - e^-mt) / m)."""
    k = np.arange(n)
    survive = math.exp(-m * t)
    return np.convolve(stats.binom.pmf(k, x0, survive), stats.poisson.pmf(k, a * (1 - survive) / m))[:n]


ENZYME = examples.michaelis_menten(S=8, E=3, k1=0.3, k2=0.2, k3=0.5)
ENZYME_JUMPS = [
    (lambda s, e, c, p: 0.3 * s * e, (-1, -1, 1, 0)),
    (lambda s, e, c, p: 0.2 * c, (1, 1, -1, 0)),
    (lambda s, e, c, p: 0.5 * c, (0, 1, -1, 1)),
]
# A law with a fraction; counts above 24 have a probability below 1e-13.
TOGGLE = examples.toggle_switch(strength=3.0, A=2, B=1)
TOGGLE_JUMPS = [
    (lambda a, b: 3 / (1 + b * b) if a < 24 else 0.0, (1, 0)),
    (lambda a, b: 3 / (1 + a * a) if b < 24 else 0.0, (0, 1)),
    (lambda a, b: a, (-1, 0)),
    (lambda a, b: b, (0, -1)),
]
# Three molecules at once, and a batch.
THREE = Network(
    {"A": 7, "B": 2},
    {"k": 0.05, "l": 0.7},
    [Reaction({"A": 3}, {"B": 1}, rate="k"), Reaction({"B": 1}, {"A": 3}, rate="l")],
)
THREE_JUMPS = [
    (lambda a, b: 0.05 * a * (a - 1) * (a - 2) / 6, (-3, 1)),
    (lambda a, b: 0.7 * b, (3, -1)),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("net", "start", "jumps"),
    [(ENZYME, (8, 3, 0, 0), ENZYME_JUMPS), (TOGGLE, (2, 1), TOGGLE_JUMPS), (THREE, (7, 2), THREE_JUMPS)],
    ids=["enzyme", "toggle", "three"],
)
def test_probabilities_are_those_of_the_dense_exponential(net, start, jumps, method):
    times = [0.0, 0.3, 2.0]
    solution = solve_cme(net, times, method=method, tolerance=1e-9)
    for k, t in enumerate(times):
        # 1e-11: what scipy's dense exponential and the walls at 24 are good for.
        assert errors(solution, truth(start, jumps, t), k) <= solution.bound[k] + 1e-11
    assert solution.bound[-1] < 1.1e-9


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("method", METHODS)
def test_bound_is_above_the_true_error_and_close_to_it(method, tolerance):
    times = [0.1, 0.5, 2.0]
    solution = solve_cme(examples.immigration_death(), times, method=method, tolerance=tolerance)
    for k, t in enumerate(times):
        p = immigration_death_pmf(3000, t)
        error = errors(solution, {(x,): p[x] for x in range(3000)}, k)
        assert error <= solution.bound[k] + 1e-12  # the closed form's own rounding
        assert solution.bound[k] <= 1.2 * error + 1e-9
        assert solution.bound[k] <= tolerance * t / times[-1] + 1e-9


def test_no_computed_probability_exceeds_the_true_one():
    solution = solve_cme(examples.immigration_death(), [1.0], tolerance=1e-2)
    exact = immigration_death_pmf(3000, 1.0)[solution.states[:, 0]]
    assert (solution.probabilities[0] <= exact * (1 + 1e-9) + 1e-300).all()


def test_bound_covers_rounding_where_the_truncation_error_is_negligible():
    solution = solve_cme(examples.immigration_death(), [5.0], tolerance=1e-12)
    p = immigration_death_pmf(3000, 5.0)
    error = errors(solution, {(x,): p[x] for x in range(3000)}, 0)
    assert 1e-12 < error <= solution.bound[0] < 1e-9


def test_birth_death_has_its_mean_and_variance():
    birth, death, x0 = 0.1, 0.11, 100
    times = np.array([0.0, 5.0, 20.0])
    solution = solve_cme(examples.birth_death(), times, tolerance=1e-10)
    growth = np.exp((birth - death) * times)
    variance = x0 * (birth + death) / (birth - death) * growth * (growth - 1)
    np.testing.assert_allclose(solution.mean()[:, 0], x0 * growth, rtol=1e-8)
    np.testing.assert_allclose(solution.std()[:, 0] ** 2, variance, rtol=1e-6, atol=1e-12)


def test_two_stage_expression_has_its_means_and_covariance():
    times = np.array([1.0, 3.0])
    solution = solve_cme(examples.two_stage_expression(), times, tolerance=1e-9)
    decay = np.exp(-times)
    np.testing.assert_allclose(solution.mean()[:, 0], 20 * (1 - decay), rtol=1e-6)
    np.testing.assert_allclose(solution.mean()[:, 1], 50 * (1 - (1 + times) * decay), rtol=1e-6)
    covariance = solution.covariance()
    np.testing.assert_allclose(covariance[:, 0, 0], 20 * (1 - decay), rtol=1e-6)  # m is Poisson at all times
    np.testing.assert_allclose(covariance[:, 0, 1], covariance[:, 1, 0], rtol=1e-14)
    # d cov / dt = 2.5 var m - 2 cov: cov = 50 (1/2 - e^-t + e^-2t / 2).
    np.testing.assert_allclose(covariance[:, 0, 1], 50 * (0.5 - decay + decay**2 / 2), rtol=1e-5)
    np.testing.assert_allclose(solution.std(), np.sqrt(covariance[:, [0, 1], [0, 1]]))


def test_batch_arrivals_have_their_variance():
    a, m, b, t = 1.0, 0.2, 5, 4.0
    solution = solve_cme(examples.batch_immigration(), [t], tolerance=1e-10)
    survive = math.exp(-m * t)
    variance = a * b / m * (1 - survive) + a * b * (b - 1) / (2 * m) * (1 - survive**2)
    assert solution.mean()[0, 0] == pytest.approx(a * b / m * (1 - survive), rel=1e-8)
    assert solution.covariance()[0, 0, 0] == pytest.approx(variance, rel=1e-7)


def test_set_of_states_follows_the_distribution():
    solution = solve_cme(examples.immigration_death(X=0), [0.1, 4.0], tolerance=1e-6)
    counts, p = solution.marginal("X")
    early, late = counts[p[0] > 0], counts[p[1] > 0]
    # Poisson(95.2) and Poisson(981.7): the one has left the set by the time of the other.
    assert early.max() < 200 < 400 < late.min() and late.max() < 1400
    assert errors(solution, {(x,): q for x, q in enumerate(immigration_death_pmf(3000, 4.0, x0=0))}, 1) <= 1.1e-6


def test_marginal_sums_over_the_other_species():
    solution = solve_cme(ENZYME, [0.0, 0.7])
    counts, p = solution.marginal("P")
    exact = truth((8, 3, 0, 0), ENZYME_JUMPS, 0.7)
    expected = [sum(q for state, q in exact.items() if state[3] == count) for count in counts]
    np.testing.assert_allclose(p[1], expected, atol=1e-6)
    np.testing.assert_array_equal(p[0], counts == 0)
    assert counts.dtype == np.int64 and p.shape == (2, len(counts))


def test_probability_of_a_condition_reads_species_parameters_rules_and_observables():
    net = Network(
        {"A": 3, "B": 0},
        {"k": 1.0, "limit": 2},
        [Reaction({"A": 1}, {"B": 1}, rate="k")],
        rules={"total": "A + B"},
        observables={"lead": "B - A", "twice": "2 * lead"},
    )
    solution = solve_cme(net, [0.5])
    p = 1 - math.exp(-0.5)
    binomial = [math.comb(3, n) * p**n * (1 - p) ** (3 - n) for n in range(4)]
    assert solution.probability("B >= limit")[0] == pytest.approx(binomial[2] + binomial[3], abs=1e-6)
    assert solution.probability("twice > 0 and total == 3")[0] == pytest.approx(binomial[2] + binomial[3], abs=1e-6)
    assert solution.probability("total > 3")[0] == 0
    with pytest.raises(ValueError, match="unknown name 'C'"):
        solution.probability("C > 0")
    with pytest.raises(ValueError, match="state alone"):
        solution.probability("time > 1")
    with pytest.raises(ValueError, match="expected one of A, B, got 'C'"):
        solution.marginal("C")


def test_stop_gives_the_distribution_of_the_first_passage():
    net = examples.immigration_death(immigration=2.0, death=1.0, X=3)
    times = np.array([0.2, 1.0, 6.0])
    solution = solve_cme(net, times, stop="X == 0", tolerance=1e-9)
    jumps = [(lambda x: 2.0 if 0 < x < 40 else 0.0, (1,)), (lambda x: 1.0 * x, (-1,))]
    exact = [truth((3,), jumps, t)[(0,)] for t in times]
    np.testing.assert_allclose(solution.probability("X == 0"), exact, atol=1e-8)


def test_parameters_and_initial_counts_replace_those_of_the_network():
    times = [0.4, 1.5]
    changed = solve_cme(
        examples.immigration_death(), times, parameters={"immigration": 30, "death": 2}, initial={"X": 4}
    )
    built = solve_cme(examples.immigration_death(immigration=30.0, death=2.0, X=4), times)
    np.testing.assert_array_equal(changed.states, built.states)
    np.testing.assert_array_equal(changed.probabilities, built.probabilities)


def test_solution_continues_from_a_distribution():
    whole = solve_cme(TOGGLE, [3.0], tolerance=1e-8)
    first = solve_cme(TOGGLE, [1.2], tolerance=1e-8)
    second = solve_cme(TOGGLE, [3.0], tolerance=1e-8, t0=1.2, initial=(first.states, first.probabilities[0]))
    exact = {tuple(s): p for s, p in zip(whole.states.tolist(), whole.probabilities[0], strict=True)}
    assert errors(second, exact, 0) < 4e-8  # three truncations, and a normalisation between the two


def test_equal_times_and_the_time_of_the_start_are_allowed():
    solution = solve_cme(TOGGLE, [0.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(solution.probabilities[0], (solution.states == [2, 1]).all(1))
    np.testing.assert_array_equal(solution.probabilities[2], solution.probabilities[3])
    assert solution.bound[0] == 0
    np.testing.assert_array_equal(solve_cme(TOGGLE, [0.0]).states, [[2, 1]])


def test_network_in_which_nothing_happens_stays():
    solution = solve_cme(Network({"A": 2}, {"k": 0.0}, [Reaction({"A": 1}, {}, rate="k")]), [0.0, 1e9])
    np.testing.assert_array_equal(solution.probabilities, [[1.0], [1.0]])
    np.testing.assert_array_equal(solution.bound, 0)


def test_states_are_in_lexicographic_order():
    states = solve_cme(TOGGLE, [0.5]).states.tolist()
    assert states == sorted(states) and len(set(map(tuple, states))) == len(states)


def test_states_with_equal_keys_are_told_apart(monkeypatch):
    expected = solve_cme(TOGGLE, [1.0])
    steady = stationary_distribution(TOGGLE)
    seeds = []

    def colliding(seed, n):
        seeds.append(seed)  # (1, 2) and (2, 1) have equal keys for the first two seeds
        return np.ones(n, np.uint64) if seed < 2 else original(seed, n)

    original = _states._multipliers
    monkeypatch.setattr(_states, "_multipliers", colliding)
    solution = solve_cme(TOGGLE, [1.0])
    assert set(seeds) == {0, 1, 2}
    np.testing.assert_array_equal(solution.states, expected.states)
    np.testing.assert_allclose(solution.probabilities, expected.probabilities, atol=1e-6)
    np.testing.assert_allclose(stationary_distribution(TOGGLE).mean(), steady.mean(), rtol=1e-9)


@st.composite
def closed_networks(draw):
    """Two to four species among which at most five molecules are exchanged, singly or by pairs."""
    n = draw(st.integers(2, 4))
    start = draw(st.tuples(*[st.integers(0, 3)] * n))
    reactions = []
    for _ in range(draw(st.integers(1, 5))):
        pair = draw(st.booleans())
        sources = [draw(st.integers(0, n - 1)) for _ in range(1 + pair)]
        targets = [draw(st.integers(0, n - 1)) for _ in range(1 + pair)]
        reactions.append((sources, targets, draw(st.sampled_from([0.1, 1.0, 7.0]))))
    return start, reactions


@settings(max_examples=40, deadline=None, derandomize=True)
@given(closed_networks(), st.sampled_from([0.01, 0.5, 20.0]))
def test_any_closed_network_is_solved_within_the_bound(case, t):
    start, reactions = case
    species = "ABCD"[: len(start)]

    def side(numbers):
        return {species[i]: numbers.count(i) for i in numbers}

    def jump(sources, targets, rate):
        change = [targets.count(i) - sources.count(i) for i in range(len(start))]

        def law(*state):
            return rate * math.prod(math.comb(state[i], sources.count(i)) for i in set(sources))

        return law, tuple(change)

    net = Network(
        dict(zip(species, start, strict=True)), {}, [Reaction(side(s), side(g), rate=r) for s, g, r in reactions]
    )
    solution = solve_cme(net, [t], tolerance=1e-6)
    # 1e-10: scipy's dense exponential of a matrix of norm up to 10^4.
    assert errors(solution, truth(start, [jump(*r) for r in reactions], t), 0) <= solution.bound[0] + 1e-10


# ---- what is refused


def test_too_many_states_are_refused_with_the_time_reached():
    with pytest.raises(RuntimeError, match=r"at time 0\.\d+ of 1 .* more than max_states = 500 .* bound so far"):
        solve_cme(examples.immigration_death(immigration=2000.0, X=0), [1.0], max_states=500, tolerance=1e-9)


def test_explosion_ends_with_an_error():
    net = Network({"A": 2}, {}, [Reaction({"A": 2}, {"A": 4}, rate=1.0)])
    with pytest.raises(RuntimeError, match="max_states"):
        solve_cme(net, [10.0], max_states=2000)


def test_events_and_time_are_refused_by_name():
    decay = Reaction({"A": 1}, {}, rate="k")
    event = Event("time >= 1", {"A": "5"}, name="refill")
    with pytest.raises(ValueError, match="without events, got the events 'refill'"):
        solve_cme(Network({"A": 5}, {"k": 1.0}, [decay], [event]), [2.0])
    switched = Reaction({"A": 1}, {}, propensity="A * (time > 1)", name="late")
    for solve in (lambda net: solve_cme(net, [2.0]), stationary_distribution):
        with pytest.raises(ValueError, match="do not depend on time, got reaction 'late'"):
            solve(Network({"A": 5}, {}, [switched]))


def test_laws_that_make_no_sense_are_refused_where_they_are_reached():
    negative = Network({"A": 2}, {}, [Reaction({}, {"A": 1}, propensity="5 - 2 * A", name="grow")])
    with pytest.raises(ValueError, match=r"got -1\.0 for reaction 'grow' at A = 3"):
        solve_cme(negative, [1.0])
    below = Network({"A": 2}, {}, [Reaction({"A": 1}, {}, propensity="1", name="drain")])
    with pytest.raises(ValueError, match="'drain' takes A below zero from A = 0"):
        solve_cme(below, [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "expected one of auto"),
        ({"tolerance": 0.0}, "tolerance: expected 1e-12"),
        ({"tolerance": 1.0}, "tolerance: expected 1e-12"),
        ({"initial": {"Z": 1}}, "unknown 'Z'"),
        ({"initial": {"A": -1}}, "A must be an integer"),
        ({"initial": ([[1, 1], [2, 2]], [0.5])}, r"expected \(2,\) probabilities"),
        ({"initial": ([[1, 1]], [-0.5])}, "probabilities >= 0"),
        ({"parameters": {"q": 1.0}}, "unknown 'q'"),
        ({"t": [1.0, 0.5]}, "ascending"),
        ({"t": [0.0], "t0": 1.0}, "begin before"),
        ({"stop": "time > 1"}, "state alone"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_cme(TOGGLE, **{"t": [1.0], **arguments})


def test_missing_scipy_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    for call in (lambda: solve_cme(TOGGLE, [1.0]), lambda: stationary_distribution(TOGGLE)):
        with pytest.raises(ImportError, match=r"pygen\[ssa\]"):
            call()


# ---- steady states


def schlogl_stationary(n=2000):
    """pi(x) by detailed balance: pi(x + 1) / pi(x) = birth(x) / death(x + 1)."""
    x = np.arange(n, dtype=np.float64)
    birth = 0.015 * x * (x - 1) + 200
    death = 1e-4 / 6 * x * (x - 1) * (x - 2) + 3.5 * x
    logarithm = np.concatenate(([0.0], np.cumsum(np.log(birth[:-1]) - np.log(death[1:]))))
    p = np.exp(logarithm - logarithm.max())
    return p / p.sum()


@pytest.mark.parametrize("start", [0, 250, 700])
def test_schlogl_has_its_stationary_distribution_from_any_start(start):
    steady = stationary_distribution(examples.schlogl(X=start))
    exact = schlogl_stationary()
    assert steady.mean()[0] == pytest.approx(454.861, abs=5e-4)
    assert steady.std()[0] == pytest.approx(199.879, abs=5e-4)
    assert steady.probability("X < 256") == pytest.approx(0.220260, abs=5e-7)
    counts, p = steady.marginal("X")
    assert abs(exact[counts] - p).sum() + 1 - exact[counts].sum() < 1e-7
    assert steady.leak < 1e-10 and steady.residual < 1e-10
    is_mode = (p[1:-1] > p[:-2]) & (p[1:-1] > p[2:])
    assert [int(x) for x in counts[1:-1][is_mode] if p[list(counts).index(x)] > 1e-4] == [82, 563]


def test_two_stage_expression_has_its_stationary_covariance():
    steady = stationary_distribution(examples.two_stage_expression())
    np.testing.assert_allclose(steady.mean(), [20, 50], rtol=1e-7)
    np.testing.assert_allclose(steady.covariance(), [[20, 25], [25, 112.5]], rtol=1e-6)
    counts, p = steady.marginal("m")
    np.testing.assert_allclose(p, stats.poisson.pmf(counts, 20), atol=1e-9)


def test_stationary_distribution_solves_the_dense_null_space():
    index, generator = dense((2, 1), TOGGLE_JUMPS)
    null = linalg.null_space(generator)[:, 0]
    steady = stationary_distribution(TOGGLE)
    exact = dict(zip(index, null / null.sum(), strict=True))
    computed = {tuple(s): p for s, p in zip(steady.states.tolist(), steady.probabilities, strict=True)}
    assert sum(abs(exact.get(s, 0) - computed.get(s, 0)) for s in exact.keys() | computed.keys()) < 1e-9


def test_solution_comes_to_the_stationary_distribution():
    late = solve_cme(TOGGLE, [400.0], tolerance=1e-8)
    np.testing.assert_allclose(late.mean()[0], stationary_distribution(TOGGLE).mean(), rtol=1e-5)


def test_process_that_must_die_out_is_stationary_when_dead():
    steady = stationary_distribution(examples.birth_death(birth=0.5, death=1.0, X=5))
    np.testing.assert_array_equal(steady.states[steady.probabilities > 0], [[0]])
    assert steady.mean() == [0.0] and steady.probability("X == 0") == 1.0
    steady = stationary_distribution(examples.michaelis_menten(S=4, E=2))
    np.testing.assert_array_equal(steady.states[steady.probabilities > 0], [[0, 2, 0, 4]])


def test_more_than_one_stationary_distribution_is_refused():
    with pytest.raises(ValueError, match="got 31 closed classes"):
        stationary_distribution(examples.sir(S=30, I=1, contact=0.05, recovery=0.5))


def test_process_without_a_stationary_distribution_is_refused():
    with pytest.raises(RuntimeError, match="max_states = 2000"):
        stationary_distribution(Network({"A": 0}, {}, [Reaction({}, {"A": 1}, rate=1.0)]), max_states=2000)


def test_stationary_distribution_of_conserved_exchange_is_multinomial():
    # A -> B -> C -> A at rates 1, 2, 4: each of five molecules is in A, B, C with weights 4, 2, 1 of 7.
    cycle = [Reaction({a: 1}, {b: 1}, rate=r) for a, b, r in (("A", "B", 1.0), ("B", "C", 2.0), ("C", "A", 4.0))]
    steady = stationary_distribution(Network({"A": 5, "B": 0, "C": 0}, {}, cycle))
    exact = stats.multinomial.pmf(steady.states, 5, np.array([4, 2, 1]) / 7)
    np.testing.assert_allclose(steady.probabilities, exact, rtol=1e-12)
    assert len(steady.states) == sum(1 for s in itertools.product(range(6), repeat=3) if sum(s) == 5)
    assert steady.leak == 0
