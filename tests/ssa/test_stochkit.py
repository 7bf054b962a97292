"""StochKit2's XML. The oracle for the heat shock network is a second, minimal reading of the file."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from pygen import ssa
from pygen.ssa.expression import evaluate

REACTION = """<Reaction><Id>{name}</Id><Type>{kind}</Type>{law}
<Reactants>{reactants}</Reactants><Products>{products}</Products></Reaction>"""


def side(**numbers: float) -> str:
    return "".join(f'<SpeciesReference id="{name}" stoichiometry="{n}"/>' for name, n in numbers.items())


def model(*reactions: str, extra: str = "", population: str = "20", head: str = "") -> str:
    return f"""{head}<Model><Description>test</Description>
<ParametersList><Parameter><Id>k</Id><Expression>0.5</Expression></Parameter>
<Parameter><Id>k2</Id><Expression>k*4</Expression></Parameter></ParametersList>
<ReactionsList>{"".join(reactions)}</ReactionsList>
<SpeciesList><Species><Id>A</Id><InitialPopulation>{population}</InitialPopulation></Species>
<Species><Id>B</Id><InitialPopulation>2*k2</InitialPopulation></Species></SpeciesList>{extra}</Model>"""


def mass_action(reactants: str, products: str, rate: str = "k") -> str:
    return REACTION.format(
        name="r", kind="mass-action", law=f"<Rate>{rate}</Rate>", reactants=reactants, products=products
    )


def read(tmp_path, text: str):
    path = tmp_path / "model.xml"
    path.write_text(text)
    return ssa.read_stochkit(path)


def propensity(net, index: int = 0, **counts: float) -> float:
    return evaluate(net.propensity(index), {**counts, **dict(zip(net.parameters, net.parameter_values, strict=True))})


def test_heat_shock_propensities_and_changes_are_those_of_a_plain_reading(real_data):
    path = real_data / "heat_shock_stochkit.xml"
    net, root = ssa.read_stochkit(path), ElementTree.parse(path).getroot()
    assert (len(net.species), len(net.reactions), len(net.parameters)) == (28, 61, 61)
    parameters = {one.findtext("Id"): float(one.findtext("Expression")) for one in root.iter("Parameter")}
    initial = {one.findtext("Id"): float(one.findtext("InitialPopulation")) for one in root.iter("Species")}
    assert dict(zip(net.species, net.initial.tolist(), strict=True)) == initial
    counts = dict(zip(initial, np.random.default_rng(1).integers(0, 50, 28).astype(float), strict=True))
    for index, element in enumerate(root.iter("Reaction")):
        law, change = parameters[element.findtext("Rate")], dict.fromkeys(initial, 0)
        for reference in element.iterfind("Reactants/*"):
            name, order = reference.get("id"), int(float(reference.get("stoichiometry")))
            assert order in (1, 2)
            law *= counts[name] if order == 1 else counts[name] * (counts[name] - 1) / 2
            change[name] -= order
        for reference in element.iterfind("Products/*"):
            change[reference.get("id")] += int(float(reference.get("stoichiometry")))
        assert propensity(net, index, **counts) == pytest.approx(law, rel=1e-14)
        assert net.stoichiometry[index].tolist() == list(change.values())


@pytest.mark.parametrize(
    "reactants, expected",
    [
        ({}, 0.5),
        ({"A": 1}, 0.5 * 7),
        ({"A": 2}, 0.5 * 7 * 6 / 2),
        ({"A": 3}, 0.5 * 7 * 6 * 5 / 6),
        ({"A": 1, "B": 2}, 0.5 * 7 * 3 * 2 / 2),
    ],
)
def test_mass_action_counts_combinations_of_every_order(tmp_path, reactants, expected):
    net = read(tmp_path, model(mass_action(side(**reactants), "")))
    assert propensity(net, A=7.0, B=3.0) == pytest.approx(expected, rel=1e-15)


def test_a_species_on_both_sides_is_a_reactant_and_its_change_the_difference(tmp_path):
    net = read(tmp_path, model(mass_action(side(A=1.0, B=1), side(A="3.000000"))))
    assert propensity(net, A=7.0, B=3.0) == 0.5 * 7 * 3
    assert net.stoichiometry.tolist() == [[2, -1]]


def test_a_species_that_is_listed_twice_counts_twice(tmp_path):
    net = read(tmp_path, model(mass_action(side(A=1) + side(A=1), "")))
    assert propensity(net, A=7.0) == 0.5 * 7 * 6 / 2
    assert net.stoichiometry.tolist() == [[-2, 0]]


def test_customized_propensities_are_used_as_written(tmp_path):
    law = "<PropensityFunction>k2*pow(A,2)*(1/2)/(1+fabs(B-k))</PropensityFunction>"
    reaction = REACTION.format(name="r", kind="customized", law=law, reactants=side(A=1), products="")
    net = read(tmp_path, model(reaction))
    assert propensity(net, A=7.0, B=3.0) == pytest.approx(2.0 * 49 / 2 / (1 + 2.5), rel=1e-15)
    assert net.stoichiometry.tolist() == [[-1, 0]]


def test_parameters_and_populations_may_be_expressions(tmp_path):
    net = read(tmp_path, model())
    assert net.initial.tolist() == [20, 4] and net.parameters == ("k",) and tuple(net.derived) == ("k2",)


@pytest.mark.parametrize(
    "text, message",
    [
        (model(extra="<EventsList/>"), "element <EventsList> is not supported"),
        (
            model(REACTION.format(name="r", kind="michaelis-menten", law="", reactants="", products="")),
            "reaction 'r': type 'mi",
        ),
        (model(mass_action(side(C=1), "")), "reaction 'r': <Reactants> names 'C', which the SpeciesList lacks"),
        (
            model(mass_action(side(A=1.5), "")),
            "reaction 'r': expected a positive integer stoichiometry of 'A', got 1.5",
        ),
        (model(mass_action(side(A=1), "", rate="k*")), r"reaction 'r': expression 'k\*'"),
        (model(mass_action(side(A=1), "", rate="")), "reaction 'r': expected text in <Rate>, got nothing"),
        (model(population="1.5"), "species 'A': expected an integer"),
        (model(head='<!DOCTYPE Model SYSTEM "elsewhere.dtd">'), "document type declaration is not supported"),
        (model()[:-3], "not well-formed XML"),
        ("<sbml/>", "expected a StochKit <Model>, got <sbml>"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)
