"""BioNetGen's .net files. The oracle for the EGFR network is a second, minimal reading of the file, with arrays."""

import math

import numpy as np
import pytest

from pygen import ssa
from pygen.ssa.expression import evaluate

SMALL = """\
# Created by BioNetGen 2.9.0
setOption("SpeciesLabel","HNauty")
begin parameters
    1 k1      0.5      # Constant
    2 k2      2*k1^2   # ConstantExpression
    3 scale   1e2
    4 c       ln(2)/scale
end parameters
begin functions
    1 hill() k1*Total^2/(scale+Total^2)
    2 switch() if(Total>10,hill(),_pi)
    3 half() log10(scale)*log2(4)/4
end functions
begin species
    1 A() scale
    2 A(b!1).B(a!1) 0
    3 $Source() 1
    4 k1() 2*scale
    5 Total() 7
end species
begin reactions
    1 1,1 2 0.5*k2 #_R1
    2 0 1 switch
    3 3 3,1 k1
    4 2 0 c #_reverse__R1
    5 5 1 half
end reactions
begin groups
    1 Total                1,2*2
    2 Bound                0.5*2,3
    3 Nothing
end groups
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.net"
    path.write_text(SMALL)
    return ssa.read_bngl_net(path)


def propensities(net, counts) -> list[float]:
    env = dict(zip(net.species, counts, strict=True))
    env.update(zip(net.parameters, net.parameter_values, strict=True))
    return [evaluate(net.propensity(j), env) for j in range(len(net.reactions))]


def blocks(path) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["begin"]:
            rows = found[words[1]] = []
        elif words and words[0] != "end":
            rows.append(words)
    return found


@pytest.fixture(scope="module")
def egfr(real_data):
    path = real_data / "egfr_net.net"
    return ssa.read_bngl_net(path), blocks(path)


def test_egfr_has_all_its_parts(egfr):
    net, file = egfr
    assert (len(net.species), len(net.reactions), len(net.parameters), len(net.observables)) == (356, 3749, 43, 13)
    assert list(net.labels.values()) == [row[1] for row in file["species"]]
    assert net.name == "egfr_net"
    parameters = {name: float(value) for _, name, value in file["parameters"]}
    assert dict(zip(net.parameters, net.parameter_values.tolist(), strict=True)) == parameters
    assert net.initial.tolist() == [parameters.get(row[2]) or float(row[2]) for row in file["species"]]


def test_egfr_writes_the_symmetry_of_equal_reactants_into_the_rate(egfr):
    """What mass_action="falling" rests on: equal reactants always come with a factor of one half."""
    _, file = egfr
    equal = [row[3] for row in file["reactions"] if len(set(row[1].split(","))) < len(row[1].split(","))]
    other = [row[3] for row in file["reactions"] if len(set(row[1].split(","))) == len(row[1].split(",")) == 2]
    assert len(equal) == 24 and set(equal) == {"0.5*kp2"}
    assert "kp2" in other and "0.5*kp2" not in other


def test_egfr_propensities_and_changes_are_those_of_a_plain_reading(egfr):
    net, file = egfr
    parameters = {name: float(value) for _, name, value in file["parameters"]}
    counts = np.random.default_rng(1).integers(0, 50, 356).astype(float)
    expected, changes = [], np.zeros((3749, 356), dtype=np.int64)
    for row, (_, left, right, rate) in zip(changes, file["reactions"], strict=True):
        law = math.prod(parameters.get(factor) or float(factor) for factor in rate.split("*"))
        taken = np.zeros(356)
        for index in (int(index) - 1 for index in left.split(",") if index != "0"):
            law *= counts[index] - taken[index]
            taken[index] += 1
            row[index] -= 1
        for index in (int(index) - 1 for index in right.split(",") if index != "0"):
            row[index] += 1
        expected.append(law)
    np.testing.assert_allclose(propensities(net, counts), expected, rtol=1e-14)
    assert (net.stoichiometry == changes).all()


def test_egfr_groups_are_their_weighted_sums(egfr):
    net, file = egfr
    counts = np.random.default_rng(2).integers(0, 50, 356).astype(float)
    env = dict(zip(net.species, counts, strict=True))
    for _, name, members in file["groups"]:
        pairs = [([1.0] + [float(part) for part in member.split("*")])[-2:] for member in members.split(",")]
        assert evaluate(net.observables[name], env) == sum(weight * counts[int(index) - 1] for weight, index in pairs)


def test_species_are_named_after_patterns_that_are_identifiers_of_nothing_else(small):
    assert small.species == ("A", "S2", "Source", "S4", "S5")
    assert small.labels["S2"] == "A(b!1).B(a!1)" and small.labels["Source"] == "$Source()"
    assert small.labels["S4"] == "k1()" and small.labels["S5"] == "Total()"


def test_parameters_may_be_expressions_and_initial_counts_too(small):
    assert small.parameters == ("k1", "scale") and tuple(small.derived) == ("k2", "c")
    assert small.initial.tolist() == [100, 0, 1, 200, 7]


def test_laws_of_functions_observables_and_the_zero_species(small):
    a, bound, source, _, other = counts = (30, 4, 2, 5, 6)
    total = a + 2 * bound
    assert propensities(small, counts) == pytest.approx(
        [0.5 * 0.5 * a * (a - 1), 0.5 * total**2 / (100 + total**2), 0.5 * source, math.log(2) / 100 * bound, other],
        rel=1e-14,
    )
    assert propensities(small, (2, 1, 0, 0, 0))[1] == math.pi
    assert small.stoichiometry.tolist()[0] == [-2, 1, 0, 0, 0]


def test_species_with_a_dollar_stay_as_they_are(small):
    assert small.boundary == ("Source",)
    assert small.stoichiometry.tolist()[2] == [1, 0, 0, 0, 0]


def test_observables_that_laws_need_are_rules_and_the_others_only_output(small):
    assert set(small.rules) == {"Total", "hill", "switch", "half"}
    assert evaluate(small.observables["Bound"], {"S2": 4.0, "Source": 3.0}) == 5.0
    assert evaluate(small.observables["Nothing"], {}) == 0.0


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("    3 3 3,1 k1", "    3 3 k1", r"LINE: expected 'index reactants products rate', got '3 3 k1'"),
        ("    3 3 3,1 k1", "    3 3 3,9 k1", r"LINE: species '9' is not in the species block"),
        ("    3 3 3,1 k1", "    3 3 3,1 Sat k1 k2", r"LINE: the rate law type Sat is not supported"),
        ("    3 3 3,1 k1", "    3 3 3,1 MM k1 k2", r"LINE: the rate law type MM is not supported"),
        ("    3 3 3,1 k1", "    3 3 3,1 Hill k1 k2 2", r"LINE: the rate law type Hill is not supported"),
        ("    3 3 3,1 k1", "    3 3 3,1 k1 TotalRate", r"LINE: .*TotalRate is not supported"),
        ("    3 3 3,1 k1", "    3 3 3,1 k9", r"unknown name 'k9'"),
        ("2*k1^2   #", "2*k1^^2 #", r"LINE: .*2\*k1\^\^2"),
        ("ln(2)/scale", "log(2)/scale", r"LINE: log\(x\) is natural in some versions"),
        ("ln(2)/scale", "ln(2/scale", r"LINE: a parenthesis is not closed"),
        ("ln(2)/scale", "sin(2)", r"LINE: .*unknown function 'sin'"),
        ("    2 A(b!1).B(a!1) 0", "    2 A(b!1).B(a!1)", r"LINE: expected 'index pattern initial'"),
        ("    2 A(b!1).B(a!1) 0", "    1 A(b!1).B(a!1) 0", r"LINE: species 1 is defined twice"),
        ("    2 A(b!1).B(a!1) 0", "    2 A(b!1).B(a!1) 0.5", r"species 'S2': expected an integer"),
        ("1,2*2", "1,2*8", r"LINE: group 'Total' names species '8'"),
        ("end groups", "", r"block 'groups' is not closed"),
        ("end groups", "end reactions", r"LINE: 'end reactions' inside block 'groups'"),
        ("begin groups", "begin sets", r"LINE: block 'sets' is not supported"),
        ("setOption(", 'substanceUnits("Concentration") #', r"LINE: substanceUnits is Concentration"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path, old, new, message):
    assert old in SMALL
    path = tmp_path / "wrong.net"
    path.write_text(SMALL.replace(old, new))
    line = SMALL[: SMALL.index(old)].count("\n") + 1
    with pytest.raises(ValueError, match=message.replace("LINE", f"wrong.net, line {line}")):
        ssa.read_bngl_net(path)


def test_a_file_without_a_network_is_refused(tmp_path):
    path = tmp_path / "model.net"
    path.write_text("begin parameters\n 1 k 2\nend parameters\n")
    with pytest.raises(ValueError, match="no species block"):
        ssa.read_bngl_net(path)
