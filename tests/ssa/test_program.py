"""Packed programs, run by an interpreter of forty lines, against the laws evaluated as trees."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pygen.ssa.expression import evaluate, parse
from pygen.ssa.network import Event, Network, Reaction

# The contract with the engine, spelled out here a second time.
HEADER = 24
OPS = {
    0: lambda a, b, c: a,
    1: lambda a, b, c: a + b,
    2: lambda a, b, c: a - b,
    3: lambda a, b, c: a * b,
    4: lambda a, b, c: a / b,
    5: lambda a, b, c: np.power(a, b),
    6: lambda a, b, c: -a,
    7: lambda a, b, c: a < b,
    8: lambda a, b, c: a <= b,
    9: lambda a, b, c: a > b,
    10: lambda a, b, c: a >= b,
    11: lambda a, b, c: a == b,
    12: lambda a, b, c: a != b,
    13: lambda a, b, c: a != 0 and b != 0,
    14: lambda a, b, c: a != 0 or b != 0,
    15: lambda a, b, c: a == 0,
    16: lambda a, b, c: a if a < b else b,
    17: lambda a, b, c: a if a > b else b,
    18: lambda a, b, c: np.exp(a),
    19: lambda a, b, c: np.log(a),
    20: lambda a, b, c: np.sqrt(a),
    21: lambda a, b, c: abs(a),
    22: lambda a, b, c: np.floor(a),
    23: lambda a, b, c: np.ceil(a),
    24: lambda a, b, c: b if a != 0 else c,
}


class Machine:
    """Reads a packed program as the engine does, and runs its parts on one trajectory's slots."""

    def __init__(self, program):
        code = program.code.numpy().tolist()
        (self.version, self.S, self.P, n_literals, self.n_slots, self.time_slot, self.R, n_factors, n_changes) = code[
            :9
        ]
        (n_instructions, *self.bounds) = code[9:16]
        (n_breaks, self.E, self.attention, self.stop, n_checked, n_assignments, self.check_laws, reserved) = code[16:24]
        assert (self.version, reserved, n_literals) == (1, 0, len(program.literals))
        at = HEADER

        def take(size):
            nonlocal at
            at += size
            assert at <= len(code)
            return code[at - size : at]

        self.rate, self.factor_start = take(self.R), take(self.R + 1)
        self.factor_slot, self.factor_offset = take(n_factors), take(n_factors)
        self.change_start, self.change_slot, self.change_delta = take(self.R + 1), take(n_changes), take(n_changes)
        self.code = np.array(take(5 * n_instructions)).reshape(-1, 5).tolist()
        self.breaks, self.checked = take(n_breaks), take(n_checked)
        self.trigger, self.previous, self.begin, self.end = (take(self.E) for _ in range(4))
        self.priority, self.flags = take(self.E), take(self.E)
        self.assignment_start, self.target, self.source = take(self.E + 1), take(n_assignments), take(n_assignments)
        assert at == len(code)
        self.literals = program.literals.tolist()

    def start(self, initial, parameters, t0=0.0):
        self.values = [np.float64(0.0)] * self.n_slots
        self.values[: self.S + self.P] = map(np.float64, (*initial, *parameters))
        self.values[self.S + self.P : self.time_slot] = map(np.float64, self.literals)
        assert self.time_slot == self.S + self.P + len(self.literals)
        self.values[self.time_slot] = np.float64(t0)
        self.run(*self.bounds[0:2])

    def run(self, begin, end):
        with np.errstate(all="ignore"):
            for op, target, a, b, c in self.code[begin:end]:
                assert target > self.time_slot, "an instruction may write to temporaries only"
                self.values[target] = np.float64(OPS[op](self.values[a], self.values[b], self.values[c]))

    def laws(self):
        self.run(*self.bounds[2:4])
        with np.errstate(all="ignore"):
            return self.products()

    def products(self):
        laws = []
        for j in range(self.R):
            law = self.values[self.rate[j]]
            for k in range(*self.factor_start[j : j + 2]):
                law = law * (self.values[self.factor_slot[k]] - self.factor_offset[k])
            laws.append(law)
        return laws

    def check(self):
        self.run(*self.bounds[4:6])
        return self.values[self.attention] != 0

    def changes(self, j):
        return {self.change_slot[k]: self.change_delta[k] for k in range(*self.change_start[j : j + 2])}


def same_bits(a, b):
    return np.float64(a).tobytes() == np.float64(b).tobytes() or (math.isnan(a) and math.isnan(b))


def assert_laws_agree(net, state, parameters, time=0.0):
    machine = Machine(net.program())
    # Setup must not have looked at the state: it runs on another one.
    machine.start([99] * len(net.species), parameters)
    machine.values[: len(net.species)] = map(np.float64, state)
    machine.values[machine.time_slot] = np.float64(time)
    env = dict(zip((*net.species, *net.parameters), (*state, *parameters), strict=True))
    for j, law in enumerate(machine.laws()):
        assert same_bits(law, evaluate(net.propensity(j), env, time)), net.propensity_table()


@st.composite
def formulas(draw, depth=4):
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(["A", "B", "C", "k", "q", "h", "rule", "0.1", "2", "(A - 1)", "(B - 2)"]))
    forms = [
        *("({} + {})", "({} - {})", "{} * {}", "{} * {}", "{} / (1 + {})", "-{}", "min({}, {})", "max({}, {})"),
        *(
            "exp(-abs({}))",
            "log(1 + abs({}))",
            "sqrt(abs({}))",
            "floor({})",
            "ceil({})",
            "({})^2",
            "({})^-3",
            "({})^20",
        ),
        *("pow(abs({}), 0.3)", "piecewise({}, {} < {}, {})", "(not {})", "({} and {})", "({} or {})", "({} != {})"),
        *("({} >= {})", "piecewise({}, time >= 2*k, {})", "({} == {})", "({} <= {})", "({} > {})"),
    ]
    form = draw(st.sampled_from(forms))
    return form.format(*(draw(formulas(depth=depth - 1)) for _ in range(form.count("{}"))))


@given(
    st.lists(formulas(), min_size=1, max_size=5),
    st.tuples(*[st.integers(0, 50)] * 3),
    st.tuples(*[st.floats(0.01, 3)] * 2),
    st.sampled_from([0.0, 1.0, 5.0]),
)
@settings(max_examples=80, deadline=None)
def test_packed_laws_have_the_bits_of_the_trees(texts, state, parameters, time):
    reactions = [Reaction({"A": 1}, {"B": 1}, propensity=text) for text in texts]
    reactions += [Reaction({"A": 2, "C": 1}, {}, rate=text) for text in texts]
    net = Network(
        {"A": 5, "B": 5, "C": 5},
        {"k": 1.0, "h": "k / 3", "q": 2.0},
        reactions,
        [Event("A > 1000", {"q": 3})],
        rules={"rule": "A * h + 1"},
    )
    assert_laws_agree(net, state, parameters, time)


@st.composite
def products(draw, depth=3):
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["A", "B", "(A - 1)", "(B - 3)", "k", "h", "0.1", "(k - A)"]))
    pair = f"{draw(products(depth=depth - 1))} * {draw(products(depth=depth - 1))}"
    return draw(st.sampled_from([pair, f"({pair})"]))


@given(products(), st.tuples(*[st.integers(0, 10**6)] * 2), st.floats(0.01, 3))
@example("A * k * B * (A - 1)", (10_007, 30_011), 1 / 7)
@example("0.1 * h * A * (B - 3) * B", (10_007, 30_011), 0.1)
@example("k * (A * B) * (A - 1)", (10_007, 30_011), 0.1)
@settings(max_examples=80, deadline=None)
def test_products_that_become_tables_keep_their_order_of_rounding(text, state, k):
    net = Network({"A": 5, "B": 5}, {"k": 1.0, "h": "k / 3"}, [Reaction({"A": 1}, {}, propensity=text)])
    assert_laws_agree(net, state, [k])


@given(
    st.lists(st.dictionaries(st.sampled_from("ABC"), st.integers(1, 4), max_size=3), min_size=1, max_size=6),
    st.tuples(*[st.integers(0, 50)] * 3),
    st.sampled_from(["combinatorial", "falling"]),
)
@settings(max_examples=60, deadline=None)
def test_packed_mass_action_has_the_bits_of_the_trees(sides, state, mass_action):
    rates = ["k", "k / 3", 0.7, "h", "k * h"]
    reactions = [Reaction(side, {"A": 1}, rate=rates[i % 5]) for i, side in enumerate(sides)]
    net = Network({"A": 1, "B": 1, "C": 1}, {"k": 0.3, "h": "k + 1"}, reactions, mass_action=mass_action)
    assert_laws_agree(net, state, [0.9])
    machine = Machine(net.program())
    # Nothing of it depends on the state: no instruction remains to be run in every pass.
    assert machine.bounds[2] == machine.bounds[3] and machine.check_laws == 0 and machine.checked == []


@given(st.lists(st.tuples(*[st.dictionaries(st.sampled_from("ABC"), st.integers(1, 3))] * 2), max_size=8))
@settings(max_examples=60, deadline=None)
def test_packed_changes_are_the_stoichiometry(sides):
    reactions = [Reaction(reactants, products, rate=1.0) for reactants, products in sides]
    net = Network({"A": 1, "B": 1, "C": 1}, {}, reactions, boundary=["B"])
    machine = Machine(net.program())
    for j in range(len(reactions)):
        changes = machine.changes(j)
        assert 0 not in changes.values()
        assert [changes.get(slot, 0) for slot in range(3)] == net.stoichiometry[j].tolist()


def network(propensity, *, species=("A", "B"), reactants=None, products=None, events=(), parameters=None):
    law = Reaction(reactants or {"A": 1}, products or {}, propensity=propensity)
    return Network(dict.fromkeys(species, 5), parameters or {"k": 1.0, "q": 2.0}, [law], events)


def sizes(net, stop=None):
    """Number of instructions of setup, step and check."""
    bounds = Machine(net.program(stop)).bounds
    return [end - begin for begin, end in zip(bounds[::2], bounds[1::2], strict=True)]


def test_what_does_not_change_is_computed_once_per_trajectory():
    assert sizes(network("exp(k) * log(q) + A")) == [3, 1, 0]
    # an event changes q: exp(k) stays in setup, log(q), the product and the sum are computed in every pass
    assert sizes(network("exp(k) * log(q) + A", events=[Event("A > 9", {"q": 3})]))[:2] == [2, 3]


def test_common_subexpressions_are_computed_once():
    net = Network({"A": 5}, {"k": 1.0}, [Reaction({}, {"A": i + 1}, propensity="exp(A / k) + 1") for i in range(9)])
    assert sizes(net) == [0, 3, 0]


def test_integer_powers_are_chains_of_products_up_to_sixteen():
    def ops(text):
        return [op for op, *_ in Machine(network(text).program()).code]

    assert ops("1 + A^4") == [3, 3, 3, 1]
    assert ops("1 + A^-2") == [3, 4, 1]
    assert ops("1 + A^16") == [3] * 15 + [1]
    assert ops("1 + A^17") == [5, 1]
    assert ops("1 + A^0.5") == [5, 1]
    assert ops("1 + A^0") == [1]


def test_products_of_a_rate_and_counts_become_tables():
    for text in ("k * A * B", "A * k", "k * A * (A - 1) * B", "2 * A", "A", "k * q * A"):
        assert sizes(network(text))[1] == 0, text
    # ... and a longer law leaves only what is no such factor to the instructions
    assert sizes(network("k / (1 + B) * A"))[1] == 2


def test_laws_are_checked_only_where_they_can_be_negative_or_nan():
    def checks(text, **changes):
        return Machine(network(text, **changes).program()).check_laws

    assert not any(checks(text) for text in ("k * A * B", "k * A * (A - 1)", "k", "A", "k * A * A * (A - 1)"))
    # 0 * ... * (A - 1) would be negative without the factor A
    assert all(checks(text) for text in ("k * (A - 1)", "k - A", "k * A * (A - 2)", "exp(A)", "k * (A - 1) * B"))
    rate = Network({"A": 1}, {"k": 1.0}, [Reaction({"A": 1}, {}, rate="k - A")])
    switched = Network({"A": 1}, {"k": 1.0}, [Reaction({"A": 1}, {}, rate="k")], [Event("A > 9", {"k": "-1"})])
    assert Machine(rate.program()).check_laws and Machine(switched.program()).check_laws


def test_counts_are_checked_only_where_a_jump_could_make_them_negative_or_huge():
    def checked(text, **changes):
        return Machine(network(text, **changes).program()).checked

    assert checked("k * A") == []
    assert checked("k * A", reactants={"A": 2}) == [0]
    assert checked("k * A * (A - 1)", reactants={"A": 2}) == []
    assert checked("k * A * A", reactants={"A": 2}) == [0]
    assert checked("k * B") == [0]
    assert checked("k") == [0]
    assert checked("A") == []
    assert checked("k * A / (1 + B)") == [0]
    assert checked("k", reactants={"A": 1}, products={"A": 1}) == []
    assert checked("k * A", products={"B": 2**20 + 1}) == [1]


def test_time_steps_become_breakpoints_once_each():
    net = network(
        "piecewise(k, time < 2 * q, 0) * A",
        events=[Event("time >= 7", {"A": 1}), Event("time > 2*q and A > 3", {"A": 2})],
    )
    machine = Machine(net.program(stop="time > 9 or A == 0"))
    machine.start([5, 5], [1.0, 1.5])
    assert sorted(machine.values[slot] for slot in machine.breaks) == [3.0, 7.0, 9.0]


def test_check_reports_events_that_begin_and_the_stopping_condition():
    net = network(
        "k * A",
        events=[
            Event("A < 3", {"A": "A + B", "q": "time"}, priority="B"),
            Event("A < 3", {"B": 7}, initial_value=False, persistent=False),
            Event("B > k", {"B": 7}, values_from_trigger_time=False),
        ],
    )
    machine = Machine(net.program(stop="A == 0"))
    machine.start([5, 0], [1.0, 2.0])
    assert [machine.values[slot] for slot in machine.previous] == [1.0, 0.0, 1.0]
    assert machine.flags == [3, 2, 1] and machine.priority[1:] == [-1, -1]
    assert not machine.check()
    assert [machine.values[slot] for slot in machine.trigger] == [0.0, 0.0, 0.0]

    def now_is_before():
        for previous, trigger in zip(machine.previous, machine.trigger, strict=True):
            machine.values[previous] = machine.values[trigger]

    now_is_before()
    machine.values[0] = np.float64(2.0)
    assert machine.check() and machine.values[machine.stop] == 0.0
    assert [machine.values[slot] for slot in machine.trigger] == [1.0, 1.0, 0.0]
    now_is_before()
    assert not machine.check()
    machine.values[0] = np.float64(0.0)
    assert machine.check() and machine.values[machine.stop] == 1.0
    machine.values[1] = np.float64(4.0)
    machine.check()
    assert machine.values[machine.priority[0]] == 4.0


def test_new_values_of_an_event_are_held_in_slots_of_its_own():
    net = network("k * A", events=[Event("A < 3", {"A": "B", "B": "A", "q": "time", "k": "2 * 3"})])
    machine = Machine(net.program())
    machine.start([5, 8], [1.0, 2.0], t0=1.5)
    machine.run(machine.begin[0], machine.end[0])
    # the state changes before the values are used: they are those of the trigger's time
    machine.values[0], machine.values[1], machine.values[machine.time_slot] = map(np.float64, (-1, -2, -3))
    assignments = {machine.target[i]: machine.values[machine.source[i]] for i in range(*machine.assignment_start[0:2])}
    assert assignments == {0: 8.0, 1: 5.0, 3: 1.5, 2: 6.0}


def test_a_trigger_that_is_a_bare_count_is_copied_before_an_event_can_change_it():
    machine = Machine(network("k", events=[Event("B", {"B": 0})]).program(stop="A"))
    assert machine.trigger[0] > machine.time_slot and machine.stop > machine.time_slot


def test_networks_without_reactions_events_or_parameters_pack():
    machine = Machine(Network({"A": 1}).program())
    assert (machine.R, machine.E, machine.attention, machine.stop) == (0, 0, -1, -1)
    assert Machine(Network({}).program()).S == 0


def test_more_events_than_the_engine_has_bits_for_are_refused():
    events = [Event(f"A > {i}", {"A": 0}) for i in range(65)]
    assert Machine(Network({"A": 1}, events=events[:64]).program()).E == 64
    with pytest.raises(ValueError, match="at most 64 events, got 65"):
        Network({"A": 1}, events=events).program()


def test_zero_and_negative_zero_are_different_literals():
    net = network("piecewise(0, A < 3, -0.0) + q / (1 + B)")
    assert sorted(map(str, net.program().literals.tolist())) == ["-0.0", "0.0", "1.0", "3.0"]


def test_description_names_everything():
    net = network("k / (1 + B^2)", events=[Event("time >= 3", {"A": "A + 1"})])
    text = net.program(stop="A == 0").describe()
    for part in ("r0: ", "A -1", "setup:", "step:", "check:", "event 0:", "break_slot: 3", "= mul B B", "stop_slot: %"):
        assert part in text, text


def test_programs_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Network({"A": 1}).program().code = None


def test_a_large_network_of_one_rate_packs_into_tables_alone():
    n = 2000
    species = {f"S{i}": 1 for i in range(n)}
    reactions = [Reaction({f"S{i}": 2}, {f"S{(i + 1) % n}": 1}, rate="k") for i in range(n)]
    machine = Machine(Network(species, {"k": 0.5}, reactions).program())
    assert machine.code == [[4, machine.time_slot + 1, n, n + 1, 0]]
    assert machine.changes(n - 1) == {n - 1: -2, 0: 1}
    assert parse("k") is parse("k")
