"""Networks: the laws that will be simulated, what follows an override of what, and what is refused."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen.ssa.breakpoints import in_steps, instants
from pygen.ssa.expression import Number, Symbol, evaluate, parse, to_text
from pygen.ssa.network import Event, Network, Reaction


def law(net, index=0, **values):
    return evaluate(net.propensity(index), values)


# ---- mass action


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 4), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_combinatorial_propensity_counts_the_sets_of_molecules(a, b, order_a, order_b):
    reactants = {name: order for name, order in (("A", order_a), ("B", order_b)) if order}
    net = Network({"A": a, "B": b}, {"c": 0.75}, [Reaction(reactants, {}, rate="c")])
    truth = 0.75 * math.comb(a, order_a) * math.comb(b, order_b)
    assert law(net, A=a, B=b, c=0.75) == pytest.approx(truth, rel=1e-15)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 4), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_falling_propensity_counts_the_ordered_choices_of_molecules(a, b, order_a, order_b):
    reactants = {name: order for name, order in (("A", order_a), ("B", order_b)) if order}
    net = Network({"A": a, "B": b}, {"c": 0.75}, [Reaction(reactants, {}, rate="c")], mass_action="falling")
    truth = 0.75 * math.perm(a, order_a) * math.perm(b, order_b)
    assert law(net, A=a, B=b, c=0.75) == pytest.approx(truth, rel=1e-15)


def test_mass_action_multiplies_in_the_order_of_the_reactants():
    species = {"A": 0, "B": 0}
    third = Reaction({"B": 2, "A": 3}, {}, rate="c")
    net = Network(species, {"c": 1.0}, [third])
    assert to_text(net.propensity(0)) == "c / 12 * B * (B - 1) * A * (A - 1) * (A - 2)"
    net = Network(species, {"c": 1.0}, [third], mass_action="falling")
    assert to_text(net.propensity(0)) == "c * B * (B - 1) * A * (A - 1) * (A - 2)"


def test_propensity_table_shows_every_law_and_the_convention():
    reactions = [
        Reaction({"A": 2}, {"B": 1}, rate="k", name="dimerisation"),
        Reaction({}, {"A": 1}, propensity="k / (1 + B^2)"),
        Reaction({"B": 1}, {}, rate=0.5),
    ]
    table = str(Network({"A": 9, "B": 0}, {"k": 2}, reactions).propensity_table())
    assert table.splitlines() == [
        "dimerisation  2 A -> B  k / 2 * A * (A - 1)",
        "r1            0 -> A    k / (1 + B^2)",
        "r2            B -> 0    0.5 * B",
        "mass action is combinatorial: c * C(n, nu), n choose nu for every reactant",
    ]
    falling = Network({"A": 9, "B": 0}, {"k": 2}, reactions, mass_action="falling").propensity_table()
    assert "k * A * (A - 1)" in str(falling) and "mass action is falling: c * n! / (n - nu)!" in str(falling)


def test_mass_action_is_of_any_order_up_to_the_largest_factorial():
    net = Network({"A": 12}, {"c": 1.0}, [Reaction({"A": 10}, {}, rate="c")])
    assert law(net, A=12, c=1.0) == pytest.approx(66, rel=1e-14)
    net = Network({"A": 12}, {"c": 1.0}, [Reaction({"A": 170}, {}, rate="c")])
    assert net.divisor(0) == float(math.factorial(170))
    with pytest.raises(ValueError, match=r"reactants: expected a positive integer up to 170 for 'A', got 171"):
        Reaction({"A": 171}, {}, rate="c")
    Reaction({"A": 171}, {"B": 10**6}, propensity="c")
    with pytest.raises(ValueError, match=r"products: expected a positive integer up to 2147483647"):
        Reaction({"A": 1}, {"B": 2**31}, rate="c")


# ---- stoichiometry


def test_stoichiometry_is_products_minus_reactants_without_boundary_species():
    net = Network(
        {"A": 1, "B": 1, "C": 1},
        {"k": 1},
        [
            Reaction({"A": 2, "B": 1}, {"A": 3}, rate="k"),
            Reaction({"C": 1}, {"A": 1, "C": 1}, rate="k"),
            Reaction({}, {"C": 1}, rate="k"),
        ],
        boundary=["C"],
    )
    np.testing.assert_array_equal(net.stoichiometry, [[1, -1, 0], [1, 0, 0], [0, 0, 0]])
    # a boundary reactant still counts in the law
    assert law(net, 1, C=7, k=2.0) == 14.0


# ---- parameters, rules, observables


def test_derived_parameters_follow_an_override():
    net = Network({"A": 1}, {"half": "k / 2", "k": 3.0, "six": "2 * 3"}, [Reaction({"A": 1}, {}, rate="half * six")])
    assert net.parameters == ("k", "six")
    np.testing.assert_array_equal(net.parameter_values, [3.0, 6.0])
    assert law(net, A=1, k=3.0, six=6.0) == 9.0
    assert law(net, A=1, k=5.0, six=1.0) == 2.5


def test_a_constant_whose_bits_the_library_decides_is_left_to_the_engine():
    net = Network({"A": 1}, {"e": "exp(1)"}, [Reaction({"A": 1}, {}, rate="e")])
    assert net.parameters == () and to_text(net.propensity(0)) == "exp(1) * A"


def test_rules_are_ordered_and_inlined():
    net = Network(
        {"A": 2, "B": 5},
        {"k": 0.5},
        [Reaction({"A": 1}, {}, propensity="fast + 1")],
        rules={"fast": "total * k", "total": "A + B"},
        observables={"seen": "10 * total + extra", "extra": "B"},
    )
    assert list(net.rules) == ["total", "fast"]
    assert list(net.observables) == ["extra", "seen"]
    assert to_text(net.propensity(0)) == "(A + B) * k + 1"


def test_rules_that_need_each_other_are_refused():
    with pytest.raises(ValueError, match=r"rules must not depend on each other in a circle, got 'x', 'y'"):
        Network({"A": 1}, rules={"x": "y + 1", "y": "2 * x", "fine": "A"})
    with pytest.raises(ValueError, match="parameters must not depend on each other in a circle"):
        Network({"A": 1}, {"p": "p + 1"})


def test_doubling_rules_do_not_grow_the_work_exponentially():
    rules = {"x0": "A + 1", **{f"x{i + 1}": f"x{i} + x{i}" for i in range(60)}}
    net = Network({"A": 1}, {}, [Reaction({"A": 1}, {}, propensity="x60")], rules=rules)
    assert evaluate(net.propensity(0), {"A": 1}) == 2.0**61
    assert net.program().header["n_instructions"] == 61


def test_initial_counts_may_be_expressions_of_parameters():
    net = Network({"A": "floor(N * exp(x))", "B": "twice"}, {"N": 10, "x": 0.5, "twice": "2 * N"})
    assert net.initial.tolist() == [math.floor(10 * math.exp(0.5)), 20]
    assert net.initial.dtype == np.int64


@pytest.mark.parametrize("count", [-1, 0.5, "N / 3", 2**54, math.inf, math.nan, "1/0"])
def test_an_initial_count_that_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match="species 'A'"):
        Network({"A": count}, {"N": 10})


# ---- names


def test_an_unknown_name_is_refused_with_where_it_stands_and_what_is_known():
    with pytest.raises(ValueError, match=r"propensity of reaction decay: unknown name 'kk' in 'kk \* A'; .*A, k"):
        Network({"A": 1}, {"k": 1}, [Reaction({"A": 1}, {}, propensity="kk*A", name="decay")])
    with pytest.raises(ValueError, match="rate of reaction r1: unknown name 'q'"):
        Network({"A": 1}, {"k": 1}, [Reaction({"A": 1}, {}, rate="k"), Reaction({"A": 1}, {}, rate="q")])
    with pytest.raises(ValueError, match="rule 'r': unknown name 'q'"):
        Network({"A": 1}, rules={"r": "q"})
    with pytest.raises(ValueError, match="rate of reaction r0: expected a species, got 'k'"):
        Network({"A": 1}, {"k": 1}, [Reaction({"k": 1}, {}, rate="k")])
    with pytest.raises(ValueError, match="trigger of event boom: unknown name 'q'"):
        Network({"A": 1}, events=[Event("q > 1", {"A": 1}, name="boom")])
    with pytest.raises(ValueError, match="event event0: expected a species or a parameter .* got 'r'"):
        Network({"A": 1}, rules={"r": "A"}, events=[Event("A > 1", {"r": 1})])
    with pytest.raises(ValueError, match="stop: unknown name 'q'"):
        Network({"A": 1}).program(stop="q == 0")
    # observables are for output only
    with pytest.raises(ValueError, match="unknown name 'seen'"):
        Network({"A": 1}, {}, [Reaction({"A": 1}, {}, rate="seen")], observables={"seen": "A"})


def test_an_unreadable_law_is_refused_with_its_reaction():
    with pytest.raises(ValueError, match=re.escape("rate of reaction r0: expression 'k +':")):
        Network({"A": 1}, {"k": 1}, [Reaction({"A": 1}, {}, rate="k +")])


@pytest.mark.parametrize("name", ["2A", "A B", "", "time", "not", "A-"])
def test_names_must_be_identifiers(name):
    with pytest.raises(ValueError, match="expected an identifier"):
        Network({name: 1})


def test_names_are_unique_over_all_kinds():
    with pytest.raises(ValueError, match="got 'A' as species and as parameter"):
        Network({"A": 1}, {"A": 1.0})
    with pytest.raises(ValueError, match="got 'k' as parameter and as rule"):
        Network({"A": 1}, {"k": 1.0}, rules={"k": "A"})


def test_reactions_check_their_own_arguments():
    with pytest.raises(ValueError, match="expected rate or propensity, got both"):
        Reaction({"A": 1}, {}, rate="k", propensity="k")
    with pytest.raises(ValueError, match="expected rate or propensity, got neither"):
        Reaction({"A": 1}, {})
    for number in (0, -1, 1.5):
        with pytest.raises(ValueError, match="expected a positive integer up to 170 for 'A'"):
            Reaction({"A": number}, {}, rate="k")
    assert type(Reaction({"A": np.int32(2)}, {}, rate=1.0).reactants["A"]) is int
    with pytest.raises(ValueError, match="boundary"):
        Network({"A": 1}, boundary=["B"])
    with pytest.raises(ValueError, match="mass_action"):
        Network({"A": 1}, mass_action="deterministic")


def test_delays_are_refused_by_name():
    with pytest.raises(ValueError, match="Event late: delays are not supported"):
        Event("A > 1", {"A": 1}, name="late", delay=2.0)
    Event("A > 1", {"A": 1}, delay=0)


def test_expressions_may_be_given_as_trees():
    tree = parse("k * A")
    net = Network({"A": 1}, {"k": 2.0}, [Reaction({"A": 1}, {}, propensity=tree)])
    assert net.propensity(0) == tree


# ---- time


STEPS = [
    ("time >= 5", "time >= 5"),
    ("time > 5", "time >= 5"),
    ("time < 5", "time < 5"),
    ("time <= 5", "time < 5"),
    ("5 < time", "time >= 5"),
    ("5 >= time", "time < 5"),
    ("2 * time > T", "time >= T / 2"),
    ("time / 4 <= T + 1", "time < (T + 1) / 0.25"),
    ("3 - time > T", "time < 3 - T"),
    ("time - 1 >= 2*T - time", "time >= (2 * T - -1) / 2"),
    ("-time < -5", "time >= 5"),
    ("A > 3 and time > T", "A > 3 and time >= T"),
    ("piecewise(2, time < T, 3) * A", "piecewise(2, time < T, 3) * A"),
]


@pytest.mark.parametrize("text", [text for text, _ in STEPS])
@given(time=st.floats(0, 20), threshold=st.floats(0, 8), count=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_steps_in_time_mean_what_was_written(text, time, threshold, count):
    names = {"T": threshold, "A": count}
    original = parse(text)
    steps = in_steps(original, ["A"], "law")
    crossings = [evaluate(b, names) for b in instants(steps)]
    assert len(crossings) == 1
    if abs(time - crossings[0]) > 1e-9:
        assert evaluate(steps, names, time) == evaluate(original, names, time)
    # at the instant itself, the value from just after it
    assert evaluate(steps, names, crossings[0]) == evaluate(original, names, crossings[0] + 1e-6)


@pytest.mark.parametrize(("text", "steps"), STEPS[:9])
def test_steps_in_time_are_right_continuous_comparisons(text, steps):
    assert to_text(in_steps(parse(text), ["A"], "law")) == steps


REFUSED_TIMES = {
    "time": "depends on time other than through comparisons",
    "k * time": "depends on time other than",
    "exp(-time) * A": "depends on time other than",
    "max(time, 3) > k": "linearly",
    "time * time > 3": "linearly",
    "time * k > 3": "with a number as its coefficient",
    "3 / time > 1": "linearly",
    "time / 0 > 1": "linearly",
    "exp(time) > 3": "linearly",
    "time > A": "got 'A'",
    "time + A > 3": "got 'A'",
    "time > switched": "got 'switched'",
    "time == 3": "<, <=, > and >= only",
    "time != 3": "<, <=, > and >= only",
    "time - time > 1": "cancels",
    "time > 3 + (time > 2)": "another comparison with time",
    "piecewise(time, A > 1, 0)": "depends on time other than",
}


@pytest.mark.parametrize("text", REFUSED_TIMES)
def test_laws_that_change_continuously_with_time_are_refused_by_name(text):
    events = [Event("A > 100", {"switched": 1})]
    with pytest.raises(ValueError, match=f"propensity of reaction r0.*{re.escape(REFUSED_TIMES[text])}"):
        reaction = Reaction({"A": 1}, {}, propensity=text)
        Network({"A": 1}, {"k": 1.0, "switched": 0.0}, [reaction], events)


def test_time_may_enter_through_a_rule_and_is_refused_through_one():
    rules = {"on": "piecewise(1, time >= t_on, 0)", "ramp": "time / 2"}
    net = Network({"A": 1}, {"t_on": 3.0}, [Reaction({}, {"A": 1}, rate="on")], rules=rules)
    assert instants(net.propensity(0)) == [Symbol("t_on")]
    with pytest.raises(ValueError, match="rate of reaction r0 depends on time"):
        Network({"A": 1}, {"t_on": 3.0}, [Reaction({}, {"A": 1}, rate="ramp")], rules=rules)


def test_new_values_of_events_may_use_time_freely():
    net = Network({"A": 1}, {"start": 0.0}, events=[Event("A > 2", {"start": "time", "A": "floor(time)"})])
    assert net.changed_parameters == {"start"}
    assert [to_text(value) for value in net.event_laws[0].values] == ["time", "floor(time)"]
    assert net.event_laws[0].targets == (1, 0)


# ---- size


def test_each_distinct_law_is_read_once(monkeypatch):
    reads = []
    original = Network.law
    monkeypatch.setattr(
        Network, "law", lambda self, formula, where: reads.append(formula) or original(self, formula, where)
    )
    reactions = [Reaction({"A": 1}, {"B": 1}, rate=f"k{i % 7}") for i in range(500)]
    reactions += [Reaction({"A": 2}, {"B": 1}, rate=f"0.5 * k{i % 7}") for i in range(500)]
    net = Network({"A": 1, "B": 1}, {f"k{i}": 1.0 for i in range(7)}, reactions)
    net.program()
    assert len(reads) == 14
    # and each distinct rate is computed once: 7 products, 7 divisions by 2
    assert net.program().header["n_instructions"] == 14


def test_programs_are_compiled_once_per_stopping_condition():
    net = Network({"A": 1})
    assert net.program() is net.program()
    assert net.program("A == 0") is net.program("A == 0")
    assert net.program("A == 0") is not net.program()


def test_number_rates_fold_with_their_divisor():
    net = Network({"A": 5}, {}, [Reaction({"A": 2}, {}, rate=3)])
    assert to_text(net.propensity(0)) == "1.5 * A * (A - 1)"
    assert net.propensity(0).args[0].args[0] == Number(1.5)
