"""`Network`s as SBML documents, level 3 version 1; sbml.py reads them."""

import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from pygen.ssa._mathml import to_mathml
from pygen.ssa.expression import Expr, parse, symbols

if TYPE_CHECKING:
    from pygen.ssa.network import Event, Network

_NAMESPACE = "http://www.sbml.org/sbml/level3/version1/core"


def _double(value: float) -> str:
    """XML Schema's double: as Python writes it, but for the infinities."""
    return repr(float(value)).replace("inf", "INF")


def _flag(value: bool) -> str:
    return "true" if value else "false"


class _Ids:
    """SBML ids: ASCII identifiers, unique over the model."""

    def __init__(self, names: list[str]) -> None:
        self._taken = set(names)
        for name in names:
            if not name.isascii():
                raise ValueError(f"write_sbml: expected an ASCII name, which SBML needs, got {name!r}")

    def new(self, wanted: str) -> str:
        sid = re.sub(r"\W", "_", wanted, flags=re.ASCII)
        sid = sid if sid[:1].isalpha() or sid[:1] == "_" else f"_{sid}"
        while sid in self._taken:
            sid += "_"
        self._taken.add(sid)
        return sid


def _list(name: str, items: list[str]) -> list[str]:
    """SBML of this version knows no empty lists."""
    return [f"<{name}>", *items, f"</{name}>"] if items else []


def _reaction(net: "Network", index: int, sid: str) -> list[str]:
    reaction, law = net.reactions[index], net.propensity(index)
    sides = [
        _list(
            name,
            [
                f'<speciesReference species="{species}" stoichiometry="{number}" constant="true"/>'
                for species, number in side.items()
            ],
        )
        for name, side in (("listOfReactants", reaction.reactants), ("listOfProducts", reaction.products))
    ]
    modifiers = sorted((symbols(law) & set(net.species)) - reaction.reactants.keys() - reaction.products.keys())
    return [
        f'<reaction id="{sid}" name={quoteattr(net.reaction_names[index])} reversible="false" fast="false">',
        *sides[0],
        *sides[1],
        *_list("listOfModifiers", [f'<modifierSpeciesReference species="{species}"/>' for species in modifiers]),
        f"<kineticLaw>{to_mathml(law)}</kineticLaw>",
        "</reaction>",
    ]


def _event(event: "Event", sid: str) -> list[str]:
    priority = [] if event.priority is None else [f"<priority>{to_mathml(parse(event.priority))}</priority>"]
    trigger = f'<trigger initialValue="{_flag(event.initial_value)}" persistent="{_flag(event.persistent)}">'
    values_from = _flag(event.values_from_trigger_time)
    return [
        f'<event id="{sid}" name={quoteattr(event.name or sid)} useValuesFromTriggerTime="{values_from}">',
        f"{trigger}{to_mathml(parse(event.trigger), truth=True)}</trigger>",
        *priority,
        *_list(
            "listOfEventAssignments",
            [
                f'<eventAssignment variable="{target}">{to_mathml(parse(value))}</eventAssignment>'
                for target, value in event.assignments.items()
            ],
        ),
        "</event>",
    ]


def write_sbml(net: "Network") -> str:
    """The network as an SBML document, level 3 version 1.

    Kinetic laws are the complete propensities, without rules or conventions of mass action. Species are numbers of
    molecules in one compartment of size 1; derived parameters become initial assignments, rules and observables
    assignment rules. `read_sbml` gives a network with the same propensities back.

    Args:
        net: the network. Its names must be ASCII, as SBML's are.

    Returns:
        The text of the document.

    Raises:
        ValueError: a name that is not ASCII.

    Example:
        >>> from pygen.ssa.network import Network, Reaction
        >>> net = Network({"A": 10}, {"k": 0.5}, [Reaction({"A": 2}, {"A": 1}, rate="k")])
        >>> write_sbml(net).count("<reaction ")
        1
    """
    definitions: dict[str, Expr] = {**net.rules, **net.observables}
    ids = _Ids([*net.species, *net.parameters, *net.derived, *definitions])
    cell = ids.new("cell")
    species = [
        f'<species id="{name}" compartment="{cell}" initialAmount="{int(count)}" hasOnlySubstanceUnits="true" '
        f'boundaryCondition="{_flag(name in net.boundary)}" constant="false"/>'
        for name, count in zip(net.species, net.initial, strict=True)
    ]
    parameters = [
        f'<parameter id="{name}" value="{_double(value)}" constant="{_flag(name not in net.changed_parameters)}"/>'
        for name, value in zip(net.parameters, net.parameter_values, strict=True)
    ]
    parameters += [f'<parameter id="{name}" constant="true"/>' for name in net.derived]
    parameters += [f'<parameter id="{name}" constant="false"/>' for name in definitions]
    assignments = [
        f'<initialAssignment symbol="{name}">{to_mathml(expr)}</initialAssignment>'
        for name, expr in net.derived.items()
    ]
    rules = [
        f'<assignmentRule variable="{name}">{to_mathml(expr)}</assignmentRule>' for name, expr in definitions.items()
    ]
    reactions = [line for index, name in enumerate(net.reaction_names) for line in _reaction(net, index, ids.new(name))]
    events = [
        line for index, event in enumerate(net.events) for line in _event(event, ids.new(event.name or f"event{index}"))
    ]
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<sbml xmlns="{_NAMESPACE}" level="3" version="1">',
        f'<model id="{ids.new(net.name)}" name={quoteattr(net.name)} substanceUnits="item" extentUnits="item">',
        *_list("listOfCompartments", [f'<compartment id="{cell}" spatialDimensions="3" size="1" constant="true"/>']),
        *_list("listOfSpecies", species),
        *_list("listOfParameters", parameters),
        *_list("listOfInitialAssignments", assignments),
        *_list("listOfRules", rules),
        *_list("listOfReactions", reactions),
        *_list("listOfEvents", events),
        "</model>",
        "</sbml>",
    ]
    return "\n".join(lines) + "\n"
