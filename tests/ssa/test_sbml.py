"""SBML in and out. Oracles: formulas worked out by hand or by Python's math; libsbml's own check of what is written."""

import math
import sys

import numpy as np
import pytest

from pygen import ssa
from pygen.ssa import examples
from pygen.ssa.expression import evaluate, parse, to_text
from pygen.ssa.reference import simulate_one

libsbml = pytest.importorskip("libsbml", reason="needs python-libsbml")


# ---- documents


def mathml(formula: str) -> str:
    node = libsbml.parseL3Formula(formula)
    assert node is not None, libsbml.getLastParseL3Error()
    return libsbml.writeMathMLToString(node).partition("?>")[2]


def listed(name: str, items: str) -> str:
    return f"<{name}>{items}</{name}>" if items else ""


def references(kind: str, **numbers: float) -> str:
    items = "".join(
        f'<speciesReference species="{name}" stoichiometry="{n}" constant="true"/>' for name, n in numbers.items()
    )
    return listed(kind, items)


def reaction(law: str, reactants=None, products=None, local="", name="r") -> str:
    sides = references("listOfReactants", **(reactants or {})) + references("listOfProducts", **(products or {}))
    kinetics = f"<kineticLaw>{mathml(law)}{listed('listOfLocalParameters', local)}</kineticLaw>"
    return f'<reaction id="{name}" reversible="false" fast="false">{sides}{kinetics}</reaction>'


def species(
    name: str, amount="10", only=True, boundary=False, constant=False, compartment="cell", initial="Amount"
) -> str:
    start = "" if amount is None else f'initial{initial}="{amount}"'
    flags = [str(flag).lower() for flag in (only, boundary, constant)]
    return (
        f'<species id="{name}" compartment="{compartment}" {start} hasOnlySubstanceUnits="{flags[0]}" '
        f'boundaryCondition="{flags[1]}" constant="{flags[2]}"/>'
    )


def parameter(name: str, value="", constant=True, tag="parameter") -> str:
    value = f'value="{value}"' if value != "" else ""
    return f'<{tag} id="{name}" {value} ' + (f'constant="{str(constant).lower()}"/>' if tag == "parameter" else "/>")


def rule(variable: str, formula: str, kind="assignmentRule") -> str:
    return f'<{kind} variable="{variable}">{mathml(formula)}</{kind}>'


def initially(symbol: str, formula: str) -> str:
    return f'<initialAssignment symbol="{symbol}">{mathml(formula)}</initialAssignment>'


def function(name: str, formula: str) -> str:
    return f'<functionDefinition id="{name}">{mathml(f"lambda({formula})")}</functionDefinition>'


def event(trigger: str, assignments: dict[str, str], inside="", flags='initialValue="false" persistent="false"') -> str:
    items = "".join(f'<eventAssignment variable="{k}">{mathml(v)}</eventAssignment>' for k, v in assignments.items())
    return (
        f'<event id="e" useValuesFromTriggerTime="false"><trigger {flags}>{mathml(trigger)}</trigger>'
        f"{inside}{listed('listOfEventAssignments', items)}</event>"
    )


CELL = '<compartment id="cell" spatialDimensions="3" size="2" constant="true"/>'
HEAD = '<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core" level="3" version="1">'


def document(
    *reactions, functions="", compartments=CELL, of_species=None, parameters="", start="", rules="", events="", more=""
) -> str:
    of_species = species("A") + species("B", "3") if of_species is None else of_species
    parts = [
        listed("listOfFunctionDefinitions", functions),
        listed("listOfCompartments", compartments),
        listed("listOfSpecies", of_species),
        listed("listOfParameters", parameter("k", 0.5) + parameter("q", 3) + parameters),
        listed("listOfInitialAssignments", start),
        listed("listOfRules", rules),
        more,
        listed("listOfReactions", "".join(reactions)),
        listed("listOfEvents", events),
    ]
    return f'{HEAD}<model id="test">{"".join(parts)}</model></sbml>'


def values(net) -> dict[str, float]:
    return dict(zip(net.parameters, net.parameter_values.tolist(), strict=True))


def propensity(net, index: int = 0, time=None, **counts: float) -> float:
    return evaluate(net.propensity(index), {**values(net), **counts}, time)


def law(formula: str, time=None, **counts: float) -> float:
    return propensity(ssa.read_sbml(document(reaction(formula))), time=time, **counts)


# ---- formulas


@pytest.mark.parametrize(
    "formula, expected",
    [
        ("A + B + 1", lambda a, b: a + b + 1),
        ("-A - B", lambda a, b: -a - b),
        ("A / B / 2", lambda a, b: a / b / 2),
        ("A^B + pow(B, 2)", lambda a, b: a**b + b**2),
        ("sqrt(A) + root(3, B)", lambda a, b: math.sqrt(a) + b ** (1 / 3)),
        (
            "exp(A) + ln(B) + log10(B) + log(2, B)",
            lambda a, b: math.exp(a) + math.log(b) + math.log10(b) + math.log2(b),
        ),
        ("abs(A - 2 * B) + floor(A / B) + ceil(A / B)", lambda a, b: abs(a - 2 * b) + a // b - (-a // b)),
        ("piecewise(1, A < B, 2, A == B, 3)", lambda a, b: 1 if a < b else 2 if a == b else 3),
        ("piecewise(1, A >= B && !(A > 4), 2)", lambda a, b: 1 if a >= b and not a > 4 else 2),
        ("piecewise(1, A <= B || B != 2, 2)", lambda a, b: 1 if a <= b or b != 2 else 2),
        ("piecewise(1, xor(A > 1, B > 1), 2)", lambda a, b: 1 if (a > 1) != (b > 1) else 2),
        ("piecewise(1, lt(1, A, B, 5), 2)", lambda a, b: 1 if 1 < a < b < 5 else 2),
        ("piecewise(pi, true, exponentiale)", lambda a, b: math.pi),
        ("avogadro * A", lambda a, b: 6.02214179e23 * a),
        ("piecewise(A, time >= 25, B)", lambda a, b: a),
    ],
)
def test_mathml_means_what_its_standard_says(formula, expected):
    for a, b in [(1.0, 2.0), (4.0, 4.0), (5.0, 3.0), (2.0, 2.0), (3.0, 4.0)]:
        assert law(formula, time=25.0, A=a, B=b) == pytest.approx(expected(a, b), rel=1e-14)


def test_numbers_with_exponents_are_rounded_once():
    text = document(reaction("k")).replace("<ci> k </ci>", '<cn type="e-notation"> 1.667 <sep/> -06 </cn>')
    assert propensity(ssa.read_sbml(text)) == 1.667e-06
    assert 1.667 * 10.0**-6 != 1.667e-06, "the naive product would do as well"


def test_function_definitions_are_inlined_and_their_arguments_shadow_globals():
    functions = function("twice", "k, 2 * k") + function("nested", "A, B, twice(A) - B")
    net = ssa.read_sbml(document(reaction("nested(B, twice(k))"), functions=functions))
    assert propensity(net, A=100.0, B=7.0) == 2 * 7 - 2 * 0.5


@pytest.mark.parametrize("only, symbol", [(True, 12.0), (False, 6.0)])
def test_a_species_in_a_law_is_its_amount_or_its_concentration(only, symbol):
    net = ssa.read_sbml(document(reaction("k * A^2"), of_species=species("A", only=only)))
    assert propensity(net, A=12.0) == 0.5 * symbol**2
    assert ("cell" in net.parameters) == (not only), "sizes that nothing depends on are no parameters"


def test_the_compartment_of_a_concentration_can_be_overridden():
    net = ssa.read_sbml(document(reaction("k * A * cell"), of_species=species("A", only=False)))
    assert evaluate(net.propensity(0), {**values(net), "A": 12.0, "cell": 4.0}) == 0.5 * 12
    net = ssa.read_sbml(document(reaction("k * A"), of_species=species("A", only=False)))
    assert evaluate(net.propensity(0), {**values(net), "A": 12.0, "cell": 4.0}) == 0.5 * 3


def test_without_dimensions_a_concentration_is_an_amount():
    point = '<compartment id="cell" spatialDimensions="0" constant="true"/>'
    net = ssa.read_sbml(document(reaction("k * A"), compartments=point, of_species=species("A", only=False)))
    assert propensity(net, A=12.0) == 6.0


def test_local_parameters_shadow_global_ones_in_their_reaction_only():
    local = parameter("k", 7, tag="localParameter")
    net = ssa.read_sbml(
        document(reaction("k * A", local=local), reaction("k * A", name="s"), parameters=parameter("r_k", 9))
    )
    assert propensity(net, 0, A=2.0) == 14.0 and propensity(net, 1, A=2.0) == 1.0
    assert values(net) == {"k": 0.5, "q": 3.0, "r_k": 9.0, "r_k_": 7.0}


def test_ids_that_expressions_reserve_get_an_underscore():
    net = ssa.read_sbml(
        document(reaction("k * A"), parameters=parameter("time_", 2))
        .replace('"k"', '"time"')
        .replace("> k <", "> time <")
    )
    assert values(net) == {"time__": 0.5, "q": 3.0, "time_": 2.0}
    assert propensity(net, A=4.0) == 2.0


# ---- mass action


MASS_ACTION = [
    # law, its reactants, the rate that remains
    ("k * A", {"A": 1}, "k"),
    ("A * k", {"A": 1}, "k"),
    ("k * A * 0.5 * 2", {"A": 1}, "k"),
    ("k * (A / 2) / 0.5", {"A": 1}, "k"),
    ("k * A / (2 / 2)", {"A": 1}, "k"),
    ("k * A / 3", {"A": 1}, "k / 3"),
    ("0.1 * A * k / 3", {"A": 1}, "0.1 * k / 3"),
    ("k * A * B / q", {"A": 1, "B": 1}, "k / q"),
    ("k * A * (A - 1)", {"A": 2}, "k"),
    ("k * A * (A - 1) / 2", {"A": 2}, "0.5 * k"),
    ("k * (A - 1) * A * (-2 + A) * B", {"A": 3, "B": 1}, "k"),
    ("cell * k * A * B / cell", {"A": 1, "B": 1}, "k"),
    ("exp(k) * A", {"A": 1}, "exp(k)"),
    ("-A * k", {"A": 1}, "-1 * k"),
]


@pytest.mark.parametrize("formula, reactants, rate", MASS_ACTION)
def test_laws_that_are_mass_action_become_it(formula, reactants, rate):
    net = ssa.read_sbml(document(reaction(formula, reactants, {"B": 2})))
    (only,) = net.reactions
    assert (only.reactants, only.products, to_text(parse(only.rate))) == (reactants, {"B": 2}, rate)


OTHER_LAWS = [
    ("k * A^2", {"A": 2}),
    ("k * A * A", {"A": 2}),
    ("k * A * (A - 2)", {"A": 2}),
    ("k * (A - 1)", {"A": 1}),
    ("k * A * (A - 0.5)", {"A": 2}),
    ("k / A", {"A": 1}),
    ("0 * k * A", {"A": 1}),
    ("k * A / 0", {"A": 1}),
    ("infinity * k * A", {"A": 1}),
    ("k * A + 1", {"A": 1}),
    ("k * A / (1 + B)", {"A": 1}),
    ("k * A", {"A": 2}),
    ("k * A", {"A": 1, "B": 1}),
    ("k", {"A": 1}),
    ("level * A", {"A": 1}),
    ("piecewise(k, time < 5, q) * A", {"A": 1}),
]


@pytest.mark.parametrize("formula, reactants", OTHER_LAWS)
def test_laws_that_are_not_the_same_polynomial_stay_expressions(formula, reactants):
    level = {"parameters": parameter("level", constant=False), "rules": rule("level", "2 * B")}
    net = ssa.read_sbml(document(reaction(formula, reactants), **level))
    (only,) = net.reactions
    assert only.rate is None and only.reactants == reactants


@pytest.mark.parametrize("formula", [formula for formula, *_ in MASS_ACTION] + [formula for formula, _ in OTHER_LAWS])
def test_the_propensity_is_the_law_as_written(formula):
    level = {"parameters": parameter("level", constant=False), "rules": rule("level", "2 * B")}
    for reactants in ({}, {"A": 1}, {"A": 3, "B": 1}):
        net = ssa.read_sbml(
            document(reaction(f"{formula} + 0 * cell", reactants), reaction(formula, reactants, name="s"), **level)
        )
        assert net.reactions[0].rate is None, "the sum is there to switch the recognition off"
        for a, b in [(0.0, 0.0), (1.0, 3.0), (2.0, 1.0), (31.0, 17.0)]:
            written, used = (propensity(net, index, time=1.0, A=a, B=b) for index in (0, 1))
            assert used == pytest.approx(written, rel=1e-15, nan_ok=True)
        assert net.stoichiometry[1].tolist() == [-reactants.get("A", 0), -reactants.get("B", 0)]


def test_a_modifier_in_the_law_becomes_a_catalyst():
    net = ssa.read_sbml(document(reaction("k * A * B", {"A": 1})))
    assert str(net.reactions[0]) == "A + B -> B" and net.stoichiometry.tolist() == [[-1, 0]]


def test_a_boundary_reactant_at_zero_does_not_stop_its_reaction():
    of_species = species("A") + species("B", "0", boundary=True)
    net = ssa.read_sbml(
        document(
            reaction("k", {"B": 1}, {"A": 1}), reaction("k * A", {"A": 1}, {"B": 1}, name="s"), of_species=of_species
        )
    )
    assert propensity(net, 0, A=0.0, B=0.0) == 0.5
    assert net.stoichiometry.tolist() == [[1, 0], [-1, 0]] and net.boundary == ("B",)
    assert simulate_one(net, [0.0, 100.0], seed=1, trajectory=0).n_events > 20


def test_a_species_in_both_lists_changes_by_the_difference_and_repeats_add_up():
    twice = references("listOfProducts", A=2).replace("</listOfProducts>", "") + references(
        "listOfProducts", A=1
    ).replace("<listOfProducts>", "")
    text = document(reaction("k * A", {"A": 1}, {"A": 9})).replace(references("listOfProducts", A=9), twice)
    assert ssa.read_sbml(text).stoichiometry.tolist() == [[2, 0]]


# ---- rules and initial values


def test_assignment_rules_reach_laws_and_output():
    of_species = species("A") + species("C", None, only=False)
    net = ssa.read_sbml(
        document(
            reaction("k * total * C"),
            of_species=of_species,
            parameters=parameter("total", constant=False),
            rules=rule("total", "A + q") + rule("C", "total / 2"),
        )
    )
    assert net.species == ("A",) and list(net.rules) == ["total", "C"]
    assert propensity(net, A=5.0) == 0.5 * 8 * 4
    amount = evaluate(net.rules["C"], {"total": 8.0, "cell": 2.0})
    assert amount == 8.0, "a species is its amount everywhere outside of SBML's formulas"


def test_initial_assignments_follow_each_other_and_overrides():
    net = ssa.read_sbml(
        document(
            reaction("rate"),
            of_species=species("A", None, only=False) + species("B"),
            parameters=parameter("rate") + parameter("half"),
            start=initially("rate", "2 * half + time") + initially("A", "half * B") + initially("half", "q / 2"),
        )
    )
    assert net.initial.tolist() == [30, 10], "1.5 * 10 in a volume of 2"
    assert values(net) == {"k": 0.5, "q": 3.0, "rate": 3.0, "cell": 2.0}
    assert to_text(net.derived["half"]) == "q / 2"
    net = ssa.read_sbml(document(reaction("rate"), parameters=parameter("rate"), start=initially("rate", "k * B")))
    assert evaluate(net.propensity(0), {"k": 10.0}) == 30.0, "B is what it was at the start, k may be overridden"


def test_a_concentration_times_a_volume_is_a_number_of_molecules():
    cell = CELL.replace('size="2"', 'size="100"')
    net = ssa.read_sbml(document(compartments=cell, of_species=species("A", 0.29, initial="Concentration")))
    assert net.initial.tolist() == [29] and 0.29 * 100 != 29, "although floats miss it by a bit"
    assert "cell" not in net.parameters, "overriding it would change nothing"


def test_compartments_may_be_sized_by_each_other():
    cells = CELL + CELL.replace('id="cell"', 'id="inner"').replace('size="2"', "")
    net = ssa.read_sbml(
        document(
            reaction("k * A"),
            compartments=cells,
            of_species=species("A", only=False, compartment="inner"),
            start=initially("inner", "cell / 4"),
        )
    )
    assert propensity(net, A=12.0) == 0.5 * 24 and values(net)["cell"] == 2.0
    assert evaluate(net.propensity(0), {**values(net), "A": 12.0, "cell": 4.0}) == 0.5 * 12


# ---- events


def test_events_keep_all_that_level_3_says_about_them():
    inside = f"<priority>{mathml('q + 1')}</priority>"
    text = document(
        events=event("A > 5 && time >= 2", {"A": "B + 1", "p": "2 * k"}, inside),
        parameters=parameter("p", 1, constant=False),
    )
    (one,) = ssa.read_sbml(text).events
    assert to_text(parse(one.trigger)) == "A > 5 and time >= 2" and to_text(parse(one.priority)) == "q + 1"
    assert {name: to_text(parse(value)) for name, value in one.assignments.items()} == {"A": "B + 1", "p": "2 * k"}
    assert (one.persistent, one.initial_value, one.values_from_trigger_time) == (False, False, False)


def test_an_event_assigns_concentrations():
    of_species = species("A", only=False) + species("B", only=False)
    net = ssa.read_sbml(document(events=event("time >= 1", {"A": "2 * B + k"}), of_species=of_species))
    (value,) = net.events[0].assignments.values()
    assert evaluate(value, {**values(net), "B": 6.0}) == (2 * 3 + 0.5) * 2


def test_a_delay_of_zero_is_none():
    net = ssa.read_sbml(document(events=event("A > 5", {"A": "0"}, f"<delay>{mathml('1 - 1')}</delay>")))
    assert len(net.events) == 1


def test_events_of_level_2_do_not_fire_at_the_start():
    text = document(events=event("A > 5", {"A": "0"}, flags="")).replace(
        HEAD, '<sbml xmlns="http://www.sbml.org/sbml/level2/version4" level="2" version="4">'
    )
    text = text.replace(' useValuesFromTriggerTime="false"', "").replace(' spatialDimensions="3"', "")
    (one,) = ssa.read_sbml(text).events
    assert (one.persistent, one.initial_value, one.values_from_trigger_time) == (True, True, True)


# ---- what is refused

FAST = reaction("k").replace('fast="false"', 'fast="true"')
PLAIN = reaction("k * A", {"A": 1})
REFUSED = {
    "rate rules are not supported (of 'p')": document(
        parameters=parameter("p", 1, constant=False), rules=rule("p", "k", "rateRule")
    ),
    "algebraic rules are not supported": document(rules=f"<algebraicRule>{mathml('k - A')}</algebraicRule>"),
    "constraints are not supported": document(
        more=f"<listOfConstraints><constraint>{mathml('A > 1')}</constraint></listOfConstraints>"
    ),
    "event 'e' has a delay": document(events=event("A > 5", {"A": "0"}, f"<delay>{mathml('k')}</delay>")),
    "reaction 'r' is fast": document(FAST),
    "the model's conversion factor": document(PLAIN).replace("<model ", '<model conversionFactor="k" '),
    "the conversion factor of species 'A'": document(PLAIN).replace('id="A"', 'id="A" conversionFactor="k"'),
    "the SBML package 'comp' is not supported": document(PLAIN).replace(
        'version="1">',
        'version="1" xmlns:comp="http://www.sbml.org/sbml/level3/version1/comp/version1" comp:required="true">',
        1,
    ),
    "Package 'new' is a required package": document(PLAIN).replace(
        'version="1">',
        'version="1" xmlns:new="http://www.sbml.org/sbml/level3/version1/new/version1" new:required="true">',
        1,
    ),
    "kinetic law of reaction 'r': the function 'sin' is not supported": document(reaction("sin(A)")),
    "kinetic law of reaction 'r': the function 'delay' is not supported": document(reaction("delay(A, 1)")),
    "the function 'factorial' is not supported": document(reaction("factorial(A)")),
    "piecewise without otherwise": document(reaction("piecewise(1, A > 2)")),
    "notanumber is not supported": document(reaction("notanumber")),
    "the function 'f' calls itself": document(reaction("f(A)"), functions=function("f", "x, f(x)")),
    "'k' in function 'f' is none of its arguments": document(reaction("f(A)"), functions=function("f", "x, x * k")),
    "expected 1 arguments of function 'f', got 2": document(reaction("f(A, B)"), functions=function("f", "x, x")),
    "the rate of reaction 's' inside another formula": document(reaction("s"), reaction("k", name="s")),
    "'nowhere' is no species, parameter or compartment": document(reaction("nowhere")),
    "parameter 'p' has no value": document(reaction("p"), parameters=parameter("p")),
    "local parameter 'p' has no value": document(reaction("p", local=parameter("p", tag="localParameter"))),
    "reaction 'r' has no kinetic law": document(PLAIN).replace(PLAIN[PLAIN.index("<kin") : -len("</reaction>")], ""),
    "expected an integer stoichiometry of 'A', got 1.5": document(reaction("k", {"A": 1.5})),
    "the stoichiometry of 'A' is not a number": document(PLAIN.replace(' stoichiometry="1"', "")),
    "reaction 'r' would change species 'A', which is constant": document(PLAIN, of_species=species("A", constant=True)),
    "reaction 'r' would change species 'A', which is set by a rule": document(PLAIN, rules=rule("A", "k")),
    "reaction 'r': 'C' is no species": document(reaction("k", {"C": 1})),
    "compartment 'cell' varies": document(rules=rule("cell", "k"), compartments=CELL.replace("true", "false")),
    "the size of compartment 'cell' is used and has no value": document(
        reaction("k * A"), compartments=CELL.replace('size="2"', ""), of_species=species("A", only=False)
    ),
    "species 'A': expected a whole number of molecules at the start, got 1.5": document(of_species=species("A", 1.5)),
    "species 'A': expected a whole number of molecules at the start, got -1.0": document(of_species=species("A", -1)),
    "species 'A' has no initial value": document(of_species=species("A", None)),
    "an event assigns to 'k', which is constant": document(events=event("A > 5", {"k": "0"})),
    "an event assigns to 'B', which is a rule": document(events=event("A > 5", {"B": "0"}), rules=rule("B", "A")),
    "assignments to 'nowhere' are not supported": document(start=initially("nowhere", "1")),
    "initial assignments depend on each other in a circle": document(
        parameters=parameter("p"), start=initially("p", "A + 1") + initially("A", "p")
    ),
    "parameters must not depend on each other in a circle": document(
        parameters=parameter("p") + parameter("r"), start=initially("p", "r + 1") + initially("r", "p")
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_refused_by_name(message):
    with pytest.raises(ValueError) as caught:
        ssa.read_sbml(REFUSED[message])
    assert message in str(caught.value)


def test_laws_that_depend_on_time_otherwise_than_in_steps_are_refused():
    with pytest.raises(ValueError, match="reaction r.*time"):
        ssa.read_sbml(document(reaction("k * time")))


def test_broken_documents_are_refused_with_their_line(tmp_path):
    path = tmp_path / "broken.xml"
    path.write_text(document(PLAIN).replace("</model>", "\n"))
    with pytest.raises(ValueError, match=r"broken\.xml, line \d"):
        ssa.read_sbml(path)
    with pytest.raises(ValueError, match="SBML text"):
        ssa.read_sbml("<html/>")
    with pytest.raises(FileNotFoundError):
        ssa.read_sbml(tmp_path / "nowhere.xml")


def test_without_libsbml_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libsbml", None)
    with pytest.raises(ImportError, match=r"pip install 'pygen\[ssa\]'"):
        ssa.read_sbml("model.xml")


def test_a_file_and_its_text_are_the_same_model(tmp_path):
    path = tmp_path / "model.xml"
    path.write_text("\ufeff" + document(PLAIN), encoding="utf-8")
    from_file, from_text = ssa.read_sbml(str(path)), ssa.read_sbml("\n " + document(PLAIN))
    assert str(from_file.propensity_table()) == str(from_text.propensity_table())


def test_level_1_is_converted():
    net = ssa.read_sbml(
        '<sbml xmlns="http://www.sbml.org/sbml/level1" level="1" version="2"><model name="old">'
        '<listOfCompartments><compartment name="cell"/></listOfCompartments>'
        '<listOfSpecies><species name="A" compartment="cell" initialAmount="10"/></listOfSpecies>'
        '<listOfParameters><parameter name="k" value="0.5"/></listOfParameters>'
        '<listOfReactions><reaction name="r" reversible="false"><listOfReactants>'
        '<speciesReference species="A" stoichiometry="4" denominator="2"/></listOfReactants>'
        '<kineticLaw formula="k*A*(A-1)"/></reaction></listOfReactions></model></sbml>'
    )
    assert net.stoichiometry.tolist() == [[-2]] and propensity(net, A=5.0) == 10.0


# ---- writing


def everything() -> "ssa.Network":
    return ssa.Network(
        {"A": 40, "B": 3, "S": 0},
        {"k": 1.667e-06, "huge": 6.02214179e23, "tiny": 2.3e-308, "third": "k / 3", "level": 2.0},
        [
            ssa.Reaction({"A": 2}, {"B": 1}, rate="k"),
            ssa.Reaction({"A": 3, "S": 1}, {}, rate="third", name="three A & S"),
            ssa.Reaction({}, {"A": 1}, propensity="level * max(B - 1, min(A, 3)) + (A > B) + 0.001"),
            ssa.Reaction({"B": 1}, {"A": 2}, propensity="if(A > 2 and not B == 1 or B, 0.1 * total, huge * tiny)"),
            ssa.Reaction({"A": 1}, {}, propensity="0.1 * abs(A)^1.5 * exp(-sqrt(B)) + log(1 + B)"),
            ssa.Reaction({"A": 1}, {}, propensity="floor(A / 3) + 1e-25 * ceil(B / 7)"),
            ssa.Reaction({}, {"B": 1}, propensity="if(time < 1.5, 3, 0.5)", name="r0"),
        ],
        [
            ssa.Event("time >= 2.5", {"A": "A + 10", "level": "level / 2"}, name="feed", priority="B"),
            ssa.Event("A > 60 or -1e30 > A", {"A": 5}, persistent=False, initial_value=False),
            ssa.Event("B > 40", {"B": "max(B - A, 0)"}, values_from_trigger_time=False),
        ],
        rules={"total": "A + 2 * B", "over": "total > 50"},
        observables={"both": "over + total"},
        boundary=["S"],
        name="every thing",
    )  # fmt: skip


def networks() -> dict[str, "ssa.Network"]:
    public = [getattr(examples, name) for name in dir(examples) if not name.startswith("_")]
    made = [build() for build in public if callable(build) and build.__module__ == examples.__name__]
    return {"everything": everything(), **{net.name: net for net in made}}


NETWORKS = networks()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_reads_back_as_the_same_network(name):
    net = NETWORKS[name]
    back = ssa.read_sbml(net.to_sbml())
    assert back.species == net.species and back.boundary == net.boundary
    assert back.initial.tolist() == net.initial.tolist()
    assert (back.stoichiometry == net.stoichiometry).all()
    assert values(back) == values(net), "to the last bit"
    rng = np.random.default_rng(3)
    for _ in range(20):
        state = dict(zip(net.species, rng.integers(0, 70, len(net.species)).astype(float), strict=True))
        time = rng.uniform(0, 4)
        for index in range(len(net.reactions)):
            written, read = (propensity(one, index, time, **state) for one in (net, back))
            assert read == pytest.approx(written, rel=4e-16), to_text(net.propensity(index))


def test_trajectories_survive_writing_and_reading():
    """Bits of laws may differ (factors change places), so that only a trajectory's counts are compared."""
    net = everything()
    back = ssa.read_sbml(net.to_sbml())
    times = [0.0, 0.5, 1.5, 2.5, 3.0, 6.0]
    for trajectory in range(5):
        ours, theirs = (simulate_one(one, times, seed=4, trajectory=trajectory) for one in (net, back))
        assert ours.n_events > 20 and theirs.n_events == ours.n_events
        assert np.array_equal(ours.counts, theirs.counts)


def test_observables_and_rules_have_the_same_values_after_reading():
    net = everything()
    back = ssa.read_sbml(net.to_sbml())
    env = {"A": 40.0, "B": 8.0}
    for name in ("total", "over", "both"):
        env[name] = evaluate(back.rules[name], env)
    assert (env["total"], env["over"], env["both"]) == (56.0, 1.0, 57.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_written_is_valid_sbml(name):
    document = libsbml.readSBMLFromString(NETWORKS[name].to_sbml())
    document.setConsistencyChecks(libsbml.LIBSBML_CAT_UNITS_CONSISTENCY, False)
    document.setConsistencyChecks(libsbml.LIBSBML_CAT_MODELING_PRACTICE, False)
    document.checkConsistency()
    found = [document.getError(i) for i in range(document.getNumErrors())]
    assert not [error.getMessage() for error in found if error.getSeverity() >= libsbml.LIBSBML_SEV_ERROR]


def test_names_that_sbml_cannot_have_are_refused():
    with pytest.raises(ValueError, match="ASCII name, which SBML needs, got 'α'"):
        ssa.Network({"A": 1}, {"α": 1.0}).to_sbml()


def test_to_sbml_writes_the_file_that_it_returns(tmp_path):
    text = everything().to_sbml(tmp_path / "model.xml")
    assert (tmp_path / "model.xml").read_text(encoding="utf-8") == text
