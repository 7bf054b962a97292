"""The library's models against their written laws, and the code of the tutorial page, run."""

import doctest
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from pygen.ssa import cme, examples, stationary
from pygen.ssa.expression import evaluate

# Counts at which every law is positive, and the laws' values there, worked out from the specification.
LAWS = {
    "immigration_death": ({"X": 7}, [1000, 7]),
    "birth_death": ({"X": 7}, [0.7, 0.77]),
    "batch_immigration": ({"X": 7}, [1, 1.4]),
    "dimer_decay": ({"S1": 10, "S2": 6, "S3": 1}, [10, 0.002 * 45, 3, 0.24]),
    "michaelis_menten": ({"S": 10, "E": 4, "SE": 5, "P": 1}, [0.0664, 0.0005, 0.5]),
    "two_stage_expression": ({"m": 4, "n": 9}, [20, 10, 4, 9]),
    "schlogl": ({"X": 11}, [0.015 * 11 * 10, 1e-4 / 6 * 11 * 10 * 9, 200, 38.5]),
    "toggle_switch": ({"A": 2, "B": 3}, [1, 2, 2, 3]),
    "lotka_volterra": ({"prey": 5, "predators": 6}, [50, 0.3, 60]),
    "brusselator": ({"X": 10, "Y": 4}, [5000, 500, 2.5e-5 * 4 * 90, 50]),
    "sir": ({"S": 10, "I": 4, "R": 2}, [0.004, 0.04]),
    "vilar_oscillator": (
        {"Da": 1, "Dpa": 2, "Dr": 3, "Dpr": 4, "Ma": 5, "Mr": 6, "A": 7, "R": 8, "C": 9},
        [7, 100, 21, 400, 50, 1000, 0.03, 200, 250, 30, 112, 9, 50, 3, 7, 1.6],
    ),
}
CHANGES = {
    "immigration_death": [[1], [-1]],
    "birth_death": [[1], [-1]],
    "batch_immigration": [[5], [-1]],
    "dimer_decay": [[-1, 0, 0], [-2, 1, 0], [2, -1, 0], [0, -1, 1]],
    "michaelis_menten": [[-1, -1, 1, 0], [1, 1, -1, 0], [0, 1, -1, 1]],
    "two_stage_expression": [[1, 0], [0, 1], [-1, 0], [0, -1]],
    "schlogl": [[1], [-1], [1], [-1]],
    "toggle_switch": [[1, 0], [0, 1], [-1, 0], [0, -1]],
    "lotka_volterra": [[1, 0], [-1, 1], [0, -1]],
    "brusselator": [[1, 0], [-1, 1], [1, -1], [-1, 0]],
    "sir": [[-1, 1, 0], [0, -1, 1]],
}
STARTS = {
    "immigration_death": [1000],
    "dimer_decay": [10_000, 0, 0],
    "vilar_oscillator": [1, 0, 1, 0, 0, 0, 10, 10, 10],
    "schlogl": [250],
    "toggle_switch": [10, 10],
    "brusselator": [2000, 1000],
}


def laws(net, counts):
    values = dict(zip(net.parameters, net.parameter_values, strict=True)) | counts
    return [evaluate(net.propensity(j), values) for j in range(len(net.reactions))]


@pytest.mark.parametrize("name", examples.MODELS)
def test_every_model_is_built_with_its_name_and_documented(name):
    function = examples.MODELS[name]
    net = function()
    assert net.name == name == function.__name__
    described = re.findall(r"^        (\w+): ", function.__doc__.split("Args:")[1], re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)
    assert "Source:" in function.__doc__ and len(net.propensity_table().rows) == len(net.reactions)


@pytest.mark.parametrize("name", LAWS)
def test_laws_have_the_values_of_the_specification(name):
    counts, expected = LAWS[name]
    net = examples.MODELS[name]()
    assert list(counts) == list(net.species)
    np.testing.assert_allclose(laws(net, counts), expected, rtol=1e-13)


@pytest.mark.parametrize("name", CHANGES)
def test_reactions_change_the_counts_as_specified(name):
    np.testing.assert_array_equal(examples.MODELS[name]().stoichiometry, CHANGES[name])


@pytest.mark.parametrize("name", STARTS)
def test_models_start_as_specified(name):
    np.testing.assert_array_equal(examples.MODELS[name]().initial, STARTS[name])


def test_all_models_but_the_multistate_one_are_checked_law_by_law():
    assert set(LAWS) == set(examples.MODELS) - {"multistate"}


@pytest.mark.parametrize("name", examples.MODELS)
def test_every_argument_of_a_model_reaches_the_network(name):
    function = examples.MODELS[name]
    plain = function()
    for argument, parameter in inspect.signature(function).parameters.items():
        changed = function(**{argument: 2 * parameter.default + 1})
        if argument in plain.parameters:
            index = plain.parameters.index(argument)
            assert changed.parameter_values[index] == 2 * plain.parameter_values[index] + 1
        elif argument in plain.species:
            assert changed.initial[plain.species.index(argument)] == 2 * parameter.default + 1
        else:
            assert (changed.stoichiometry != plain.stoichiometry).any()  # the size of a batch


def test_vilar_oscillator_keeps_its_genes():
    net = examples.vilar_oscillator()
    for pair in (("Da", "Dpa"), ("Dr", "Dpr")):
        column = [net.species.index(name) for name in pair]
        np.testing.assert_array_equal(net.stoichiometry[:, column].sum(1), 0)
    assert len(net.reactions) == 16


def multistate_by_rules():
    """{(reactants, products, rate)} from the two binding rules and the two of phosphorylation.

    A complex is (with receptor, with ligand, adaptor: "", "A" or "P").
    """
    names = {(1, 0, ""): "R", (0, 1, ""): "L", (0, 0, "A"): "A", (0, 0, "P"): "Ap"}
    for ligand, adaptor in itertools.product((0, 1), ("", "A", "P")):
        names[1, ligand, adaptor] = "R" + "L" * ligand + {"": "", "A": "A", "P": "Ap"}[adaptor]
    found = set()
    for adaptor in ("", "A", "P"):
        free, bound = names[1, 0, adaptor], names[1, 1, adaptor]
        found |= {((free, "L"), (bound,), "kon"), ((bound,), (free, "L"), "koff")}
    for ligand, adaptor in itertools.product((0, 1), ("A", "P")):
        free, bound, alone = names[1, ligand, ""], names[1, ligand, adaptor], names[0, 0, adaptor]
        found |= {((free, alone), (bound,), "kAon"), ((bound,), (free, alone), "kAoff")}
    found.add(((names[1, 1, "A"],), (names[1, 1, "P"],), "kAp"))
    for receptor, ligand in ((0, 0), (1, 0), (1, 1)):
        found.add(((names[receptor, ligand, "P"],), (names[receptor, ligand, "A"],), "kAdp"))
    return found


def test_multistate_is_the_network_that_its_rules_generate():
    net = examples.multistate()
    written = {(tuple(r.reactants), tuple(r.products), r.rate) for r in net.reactions}
    assert written == multistate_by_rules()
    assert len(net.reactions) == len(written) == 18 and len(net.species) == 9
    assert {n for r in net.reactions for n in (*r.reactants.values(), *r.products.values())} == {1}


# ---- documentation


@pytest.mark.parametrize("module", [examples, cme, stationary])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_code_of_the_tutorial_runs(run_page):
    assert run_page("ssa.md") > 5


def test_pictures_of_the_tutorial_are_there_and_small():
    docs = Path(__file__).parents[2] / "docs"
    pictures = re.findall(r"\]\((images/[^)]+)\)", (docs / "ssa.md").read_text(encoding="utf-8"))
    assert len(pictures) >= 4
    assert all(0 < (docs / picture).stat().st_size < 150_000 for picture in pictures)
