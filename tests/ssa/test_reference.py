"""The plain Python trajectory: against published numbers, closed forms, and semantics worked out by hand."""

import math

import numpy as np
import pytest

from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.reference import philox4x32, simulate_one, uniforms

# ---- random numbers

# Random123's known answers (kat_vectors of its distribution).
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_numbers(counter, key, answer):
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == answer


def test_uniforms_take_53_bits_of_two_words_each():
    r0, r1, r2, r3 = 0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8
    u1, u2 = uniforms(0, 0, 0, 0)
    assert u1 == ((r1 * 2**32 + r0) // 2**11 + 1) / 2**53
    assert u2 == (r3 * 2**32 + r2) // 2**11 / 2**53


def test_uniforms_count_passes_and_trajectories_with_64_bits():
    words = philox4x32((7, 1, 9, 2), (5, 3))
    u1, _ = uniforms(5, 3, 2 * 2**32 + 9, 2**32 + 7)
    assert u1 == (((words[1] << 32 | words[0]) >> 11) + 1) * 2.0**-53


def test_uniforms_of_the_extreme_words_stay_in_their_intervals(monkeypatch):
    monkeypatch.setattr("pygen.ssa.reference.philox4x32", lambda counter, key: (0, 0, 0, 0))
    assert uniforms(0, 0, 0, 0) == (2.0**-53, 0.0)
    monkeypatch.setattr("pygen.ssa.reference.philox4x32", lambda counter, key: (0xFFFFFFFF,) * 4)
    assert uniforms(0, 0, 0, 0) == (1.0, 1.0 - 2.0**-53)


@pytest.mark.parametrize("name", ["seed", "stream", "trajectory", "n"])
def test_numbers_outside_the_counter_and_the_key_are_refused(name):
    numbers = {"seed": 0, "stream": 0, "trajectory": 0, "n": 0}
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match=f"expected {name} in"):
            uniforms(**{**numbers, name: wrong})


# ---- the direct method


def decay(count=20, k=0.5, **options):
    return Network({"A": count}, {"k": k}, [Reaction({"A": 1}, {}, rate="k")], **options)


def test_a_decay_is_the_sum_of_its_waiting_times():
    run = simulate_one(decay(), [0.0, 1000.0], seed=3, stream=1, trajectory=11, record_path=True)
    t, truth = 0.0, []
    for n, count in enumerate(range(20, 0, -1)):
        t = t + (-math.log(uniforms(3, 1, 11, n)[0])) / (0.5 * count)
        truth.append((t, 0))
    assert run.path == truth
    assert (run.status, run.n_events, run.stop_time) == ("absorbed", 20, math.inf)
    assert run.counts.tolist() == [[20], [0]] and run.counts.dtype == np.int64


def dimer():
    return Network(
        {"A": 40, "B": 0, "C": 3},
        {"k": 0.01, "q": 0.4},
        [
            Reaction({"A": 2}, {"B": 1}, rate="k"),
            Reaction({"B": 1}, {"A": 2}, rate="q"),
            Reaction({}, {"C": 1}, propensity="2 / (1 + B)"),
            Reaction({"C": 3}, {"A": 1}, rate=0.05),
        ],
    )


def test_a_network_follows_thirty_lines_written_for_it_alone():
    a, b, c, t, path = 40, 0, 3, 0.0, []
    n = 0
    while True:
        laws = [0.01 / 2 * a * (a - 1), 0.4 * b, 2 / (1 + b * 1.0), 0.05 / 6 * c * (c - 1) * (c - 2)]
        total = ((laws[0] + laws[1]) + laws[2]) + laws[3]
        u1, u2 = uniforms(1, 0, 5, n)
        n += 1
        t += -math.log(u1) / total
        if t > 6:
            break
        sums = [laws[0], laws[0] + laws[1], (laws[0] + laws[1]) + laws[2], total]
        j = next(j for j in range(4) if sums[j] > u2 * total)
        change = [(-2, 1, 0), (2, -1, 0), (0, 0, 1), (1, 0, -3)][j]
        a, b, c = a + change[0], b + change[1], c + change[2]
        path.append((t, j))
    run = simulate_one(dimer(), [6.0], seed=1, trajectory=5, record_path=True)
    assert len(path) > 30 and {j for _, j in path} == {0, 1, 2, 3}
    assert run.path == path and run.counts.tolist() == [[a, b, c]]


def test_the_grid_shows_the_state_before_the_jump_that_crosses_it():
    net = dimer()
    path = simulate_one(net, [5.0], seed=2, trajectory=0, record_path=True).path
    jump = path[10][0]
    grid = [0.0, 0.1, 0.1, 1.0, np.nextafter(jump, 0), jump, 4.9]
    run = simulate_one(net, grid, seed=2, trajectory=0)
    for time, row in zip(grid, run.counts.tolist(), strict=True):
        fired = [j for t, j in path if t <= time]
        assert row == (net.initial + net.stoichiometry[fired].sum(axis=0)).tolist()


def test_a_trajectory_does_not_depend_on_its_grid():
    paths = [
        simulate_one(dimer(), grid, seed=2, trajectory=0, record_path=True).path
        for grid in ([5.0], np.linspace(0, 5, 101), [0.0, 0.0, 5.0])
    ]
    assert paths[0] == paths[1] == paths[2] != []


def test_seed_stream_and_trajectory_each_give_another_path():
    base = {"seed": 1, "stream": 1, "trajectory": 1}
    variants = [base, {**base, "seed": 2}, {**base, "stream": 2}, {**base, "trajectory": 2}]
    times = {simulate_one(decay(), [1e3], record_path=True, **one).path[0][0] for one in variants}
    assert len(times) == 4


def test_a_choice_of_zero_skips_reactions_that_cannot_fire(monkeypatch):
    monkeypatch.setattr("pygen.ssa.reference.uniforms", lambda *_: (0.5, 0.0))
    net = Network({"A": 0, "B": 1}, {}, [Reaction({"A": 1}, {}, rate=1.0), Reaction({"B": 1}, {}, rate=1.0)])
    assert simulate_one(net, [9.0], seed=0, trajectory=0, record_path=True).path == [(-math.log(0.5), 1)]


def test_rounding_that_finds_no_reaction_takes_the_last_that_can_fire(monkeypatch):
    monkeypatch.setattr("pygen.ssa.reference.uniforms", lambda *_: (0.5, 1.0))
    rates = [Reaction({"A": 1}, {}, rate=1.0), Reaction({"A": 1}, {}, rate=2.0), Reaction({"B": 1}, {}, rate=1.0)]
    run = simulate_one(Network({"A": 1, "B": 0}, {}, rates), [9.0], seed=0, trajectory=0, record_path=True)
    assert [j for _, j in run.path] == [1]


def test_the_logarithm_can_be_replaced():
    run = simulate_one(decay(1), [1e3], seed=0, trajectory=0, record_path=True, log=lambda u: -3.0)
    assert run.path == [(6.0, 0)]
    net = Network({"A": 1}, {}, [Reaction({"A": 1}, {}, propensity="log(A + 1) * exp(A)")])
    functions = {"log": lambda x: 4.0 * x, "exp": lambda x: 0.5 * x}
    run = simulate_one(net, [1e3], seed=0, trajectory=0, record_path=True, log=lambda u: -3.0, math_functions=functions)
    # 4 * (1 + 1) times 0.5 * 1; the law's own logarithm is not that of the waiting time
    assert run.path[0] == (3.0 / 4.0, 0)


def test_initial_counts_and_parameters_can_be_replaced():
    net = Network({"A": 1, "B": 2}, {"k": 1.0, "h": "k / 2"}, [Reaction({"A": 1}, {}, rate="h")])
    run = simulate_one(net, [0.0], seed=0, trajectory=0, initial={"B": 7})
    assert run.counts.tolist() == [[1, 7]]
    options = {"seed": 0, "trajectory": 0, "record_path": True, "log": lambda u: -3.0}
    assert simulate_one(net, [9.0], parameters={"k": 4.0}, initial=[2, 0], **options).path == [(0.75, 0), (2.25, 0)]
    with pytest.raises(ValueError, match="expected parameters among k, got 'h'"):
        simulate_one(net, [1.0], seed=0, trajectory=0, parameters={"h": 1.0})
    with pytest.raises(ValueError, match="expected 2 species, got 1"):
        simulate_one(net, [1.0], seed=0, trajectory=0, initial=[1])


@pytest.mark.parametrize("times", [[], [1.0, 0.5], [-1.0, 2.0], [0.0, math.nan], [0.0, math.inf]])
def test_times_that_are_no_grid_are_refused(times):
    with pytest.raises(ValueError, match="expected"):
        simulate_one(decay(), times, seed=0, trajectory=0)


def test_time_may_start_anywhere():
    late = simulate_one(decay(), [-2.0, 50.0], t0=-3.0, seed=1, trajectory=0, record_path=True)
    early = simulate_one(decay(), [1.0, 53.0], seed=1, trajectory=0, record_path=True)
    assert [t + 3.0 for t, _ in late.path] == pytest.approx([t for t, _ in early.path], abs=1e-12)
    np.testing.assert_array_equal(late.counts, early.counts)


# ---- how a trajectory ends


def status(net, times=(0.0, 5.0), **options):
    return simulate_one(net, list(times), seed=0, trajectory=0, **options)


def test_completed_and_absorbed_are_told_apart():
    assert status(decay(1000), [0.1]).status == "completed"
    assert status(decay(3), [1e6]).status == "absorbed"
    empty = status(Network({"A": 4}), [0.0, 1.0])
    assert empty.status == "absorbed" and empty.counts.tolist() == [[4], [4]]


def test_a_tiny_total_propensity_is_not_the_end():
    run = status(decay(1, k=1e-300), [1e305])
    assert run.status == "absorbed" and run.n_events == 1


def test_the_stopping_condition_ends_at_the_first_jump_after_which_it_holds():
    run = simulate_one(decay(), [0.0, 1e3, 2e3], seed=3, trajectory=1, stop="A == 7", record_path=True)
    assert (run.status, run.n_events) == ("stopped", 13)
    assert run.stop_time == run.path[-1][0]
    assert run.counts.tolist() == [[20], [7], [7]] and run.state.tolist() == [7]
    at_once = simulate_one(decay(), [0.0, 1.0], seed=3, trajectory=1, stop="A > 3")
    assert (at_once.status, at_once.stop_time, at_once.n_events) == ("stopped", 0.0, 0)


def test_a_stopping_condition_may_name_an_instant():
    run = status(decay(1000), [0.0, 1.0, 5.0], stop="time > 0.3")
    assert (run.status, run.stop_time) == ("stopped", 0.3)
    assert run.counts[0, 0] == 1000 and run.counts[1, 0] == run.counts[2, 0] == run.state[0]


def test_max_events_leaves_the_rest_of_the_grid_empty():
    run = simulate_one(decay(), [0.0, 1e3], seed=0, trajectory=0, max_events=5)
    assert (run.status, run.n_events) == ("max_events", 5)
    assert run.counts.tolist() == [[20], [-1]] and run.state.tolist() == [15]
    with pytest.raises(ValueError, match="max_events"):
        status(decay(), max_events=0)


def test_a_count_below_zero_is_invalid():
    net = Network({"A": 3}, {}, [Reaction({"A": 2}, {}, propensity=1.0)])
    run = status(net, [0.0, 1e6])
    assert (run.status, run.n_events) == ("invalid_count", 2)
    assert run.counts.tolist() == [[3], [-1]]


def test_a_count_that_float64_does_not_hold_is_an_overflow():
    net = Network({"A": 2**53 - 2**30}, {}, [Reaction({}, {"A": 2**30}, propensity=1.0)])
    run = status(net, [1e6])
    assert (run.status, run.n_events) == ("overflow", 2)


@pytest.mark.parametrize("law", ["A - 21", "log(A - 21)", "1 / (A - 20)", "exp(A^3)", "sqrt(A - 21)", "0/(A - 20)"])
def test_a_propensity_that_is_negative_infinite_or_nan_is_invalid(law):
    run = status(Network({"A": 20}, {}, [Reaction({}, {}, rate=1.0), Reaction({}, {"A": 1}, propensity=law)]))
    assert (run.status, run.n_events) == ("invalid_propensity", 0)
    assert (run.counts == -1).all()


def test_a_negative_propensity_is_found_though_the_total_is_positive():
    net = Network({"A": 1}, {"k": -1.0}, [Reaction({"A": 1}, {}, rate="k"), Reaction({}, {"A": 1}, rate=10.0)])
    assert status(net).status == "invalid_propensity"


# ---- events


def events_only(*events, species=("A", "B", "C"), **parameters):
    return Network(dict.fromkeys(species, 0), parameters, [], events)


def test_an_event_at_an_instant_shows_in_the_row_of_that_instant():
    net = Network({"A": 5}, {}, [Reaction({"A": 1}, {}, rate=0.0)], [Event("time >= 25", {"A": "50"})])
    assert status(net, [0.0, 24.9, 25.0, 25.0, 30.0]).counts[:, 0].tolist() == [5, 5, 50, 50, 50]


def test_an_instant_comes_before_a_reaction_at_the_very_same_time():
    net = Network({"A": 1, "B": 7}, {}, [Reaction({"A": 1}, {}, rate=1.0)], [Event("time >= 3", {"B": "A"})])
    run = simulate_one(net, [3.0, 9.0], seed=0, trajectory=0, log=lambda u: -3.0, record_path=True)
    # the reaction is drawn afresh at 3; in the path the event comes after all reactions in number
    assert run.counts.tolist() == [[1, 1], [0, 1]] and run.path == [(3.0, 1), (6.0, 0)]


def test_an_event_after_the_grid_does_not_happen():
    run = status(events_only(Event("time >= 25", {"A": "50"})), [0.0, 24.0])
    assert run.state.tolist() == [0, 0, 0]


def test_a_state_trigger_fires_at_the_jump_and_only_when_it_turns_true():
    refill = Event("A < 5", {"A": "A + 100", "refills": "refills + 1"})
    net = Network({"A": 20}, {"refills": 0.0}, [Reaction({"A": 1}, {}, rate=1.0)], [refill])
    run = simulate_one(net, [1e3], seed=0, trajectory=0, stop="refills == 2", record_path=True)
    # 20 -> 4 in 16 jumps, 104 -> 4 in 100
    assert (run.status, run.n_events, run.state.tolist()) == ("stopped", 116, [104])


def test_a_trigger_that_is_true_at_the_start_fires_if_its_initial_value_is_false():
    assert status(events_only(Event("A < 1", {"A": 3}))).counts[0].tolist() == [0, 0, 0]
    assert status(events_only(Event("A < 1", {"A": 3}, initial_value=False))).counts[0].tolist() == [3, 0, 0]


def test_assignments_of_one_event_happen_at_once():
    net = Network({"A": 1, "B": 2}, {}, [], [Event("time > 1", {"A": "B", "B": "A"})])
    assert status(net).state.tolist() == [2, 1]


def test_events_at_one_instant_go_by_priority_then_by_place():
    def log(number):
        return {"trace": f"10 * trace + {number}"}

    events = [
        Event("time >= 1", log(1), values_from_trigger_time=False),
        Event("time >= 1", log(2), values_from_trigger_time=False, priority=-5),
        Event("time >= 1", log(3), values_from_trigger_time=False, priority="p"),
        Event("time >= 1", log(4), values_from_trigger_time=False, priority=7),
        Event("time >= 1", log(5), values_from_trigger_time=False),
    ]
    net = events_only(*events, trace=0.0, p=7.0)
    run = status(net, stop="trace == 34215")
    assert (run.status, run.stop_time) == ("stopped", 1.0)


def test_values_are_those_of_the_trigger_time_unless_the_event_says_otherwise():
    first = Event("time >= 1", {"A": 5}, priority=1)
    assert status(events_only(first, Event("time >= 1", {"B": "A"}))).state.tolist() == [5, 0, 0]
    late = Event("time >= 1", {"B": "A"}, values_from_trigger_time=False)
    assert status(events_only(first, late)).state.tolist() == [5, 5, 0]


def test_a_waiting_event_is_dropped_when_its_trigger_turns_false_if_not_persistent():
    first = Event("time >= 1", {"A": 5}, priority=1)
    second = Event("time >= 1 and A < 3", {"B": 1}, persistent=False)
    assert status(events_only(first, second)).state.tolist() == [5, 0, 0]
    second = Event("time >= 1 and A < 3", {"B": 1}, persistent=True)
    assert status(events_only(first, second)).state.tolist() == [5, 1, 0]


def test_a_waiting_event_that_is_triggered_again_happens_once_with_the_later_values():
    order = [Event("time >= 1", {"A": number}, priority=10 - number) for number in (1, 2, 3)]
    waiting = Event("A == 1 or A == 3", {"B": "B + 10 * A"})
    assert status(events_only(*order, waiting)).state.tolist() == [3, 30, 0]


def test_an_event_may_set_off_another_at_the_same_instant():
    net = events_only(Event("time >= 1", {"A": 5}), Event("A == 5", {"B": "A + 1"}), Event("B > 5", {"C": "time + 2"}))
    assert status(net, [1.0]).counts.tolist() == [[5, 6, 3]]


def test_events_that_set_each_other_off_for_ever_end_with_a_status():
    net = events_only(Event("A < 1", {"A": 1}, initial_value=False), Event("A > 0", {"A": 0}))
    assert status(net).status == "event_loop"


@pytest.mark.parametrize(
    ("value", "expected"), [("0.5", "invalid_count"), ("-1", "invalid_count"), ("2^60", "overflow")]
)
def test_an_event_must_assign_counts_to_species(value, expected):
    run = status(events_only(Event("time >= 1", {"A": value})), [0.5, 2.0])
    assert run.status == expected and run.counts.tolist() == [[0, 0, 0], [-1, -1, -1]]


def test_an_event_changes_a_parameter_and_what_derives_from_it():
    net = Network(
        {"A": 100},
        {"k": 0.0, "rate": "3 * k"},
        [Reaction({"A": 1}, {}, rate="rate")],
        [Event("time >= 2", {"k": 1.0})],
    )
    run = simulate_one(net, [1.9, 60.0], seed=0, trajectory=0, record_path=True)
    assert run.counts.tolist() == [[100], [0]]
    assert run.path[0] == (2.0, 1) and run.path[1][0] > 2.0 and run.n_events == 100


def test_events_may_change_boundary_species():
    net = Network(
        {"A": 0, "B": 0}, {}, [Reaction({"B": 1}, {"A": 1}, rate=5.0)], [Event("time >= 1", {"B": 2})], boundary=["B"]
    )
    run = simulate_one(net, [1.0, 20.0], seed=0, trajectory=0)
    assert run.counts[0].tolist() == [0, 2] and run.counts[1, 1] == 2 and run.counts[1, 0] > 50


# ---- distributions: bounds at 4.5 standard errors, seeds fixed


def ensemble(net, times, n, **options):
    return np.array([simulate_one(net, times, seed=7, trajectory=i, **options).counts for i in range(n)])


def test_immigration_death_has_its_closed_form_mean_and_variance():
    a, m, x0, n, times = 8.0, 1.0, 10, 1000, [0.5, 2.0]
    net = Network({"A": x0}, {}, [Reaction({}, {"A": 1}, rate=a), Reaction({"A": 1}, {}, rate=m)])
    counts = ensemble(net, times, n)[:, :, 0]
    for k, t in enumerate(times):
        p = math.exp(-m * t)
        mean, variance = x0 * p + a / m * (1 - p), x0 * p * (1 - p) + a / m * (1 - p)
        # fourth central moment of binomial plus Poisson
        fourth = x0 * p * (1 - p) * (1 - 6 * p * (1 - p)) + a / m * (1 - p) + 3 * variance**2
        sample = counts[:, k]
        assert abs(sample.mean() - mean) < 4.5 * math.sqrt(variance / n)
        assert abs(sample.var() - variance) < 4.5 * math.sqrt((fourth - variance**2) / n)


def test_stopping_at_instants_does_not_change_the_distribution():
    # A rate that changes at instants: the count is Poisson with the integral of the rate as its mean.
    n = 1000
    law = "piecewise(4, time < 1, 0, time < 2.5, 10)"
    counts = ensemble(Network({"A": 0}, {}, [Reaction({}, {"A": 1}, propensity=law)]), [0.5, 1.0, 2.5, 3.0], n)
    for sample, mean in zip(counts[:, :, 0].T, [2.0, 4.0, 4.0, 9.0], strict=True):
        assert abs(sample.mean() - mean) < 4.5 * math.sqrt(mean / n)
        assert abs(sample.var() - mean) < 4.5 * math.sqrt((2 * mean**2 + mean) / n)
    assert (counts[:, 1] == counts[:, 2]).all()


def test_first_passage_of_a_pure_birth_is_gamma_distributed():
    net = Network({"A": 0}, {}, [Reaction({}, {"A": 1}, rate=2.0)])
    n = 1000
    times = [simulate_one(net, [1e3], seed=7, trajectory=i, stop="A == 6").stop_time for i in range(n)]
    # Gamma(6, rate 2): mean 3, variance 1.5
    assert abs(np.mean(times) - 3.0) < 4.5 * math.sqrt(1.5 / n)
