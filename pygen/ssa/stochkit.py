"""StochKit2's XML models (also what GillesPy2 exports) as `Network`s of pygen.ssa."""

import xml.etree.ElementTree as ElementTree
from os import PathLike
from pathlib import Path

from pygen.ssa.bngl import rewrite_calls
from pygen.ssa.expression import Expr, parse
from pygen.ssa.network import Network, Reaction

_MODEL = {"Description", "NumberOfReactions", "NumberOfSpecies", "ParametersList", "ReactionsList", "SpeciesList"}
_REACTION = {"Id", "Description", "Type", "Rate", "PropensityFunction", "Reactants", "Products"}
# The propensity functions are C++ expressions.
_FUNCTIONS = {"fabs": lambda x: f"abs({x})"}


def _check_children(element: ElementTree.Element, known: set[str], what: str) -> None:
    for child in element:
        if child.tag not in known:
            raise ValueError(f"{what}: element <{child.tag}> is not supported (known: {', '.join(sorted(known))})")


def _text(element: ElementTree.Element, tag: str, what: str) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{what}: expected text in <{tag}>, got nothing")
    return text


def _expression(text: str, what: str) -> Expr:
    try:
        return parse(rewrite_calls(text, _FUNCTIONS))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _number_or_expression(text: str, what: str) -> float | Expr:
    try:
        return float(text)
    except ValueError:
        return _expression(text, what)


def _side(reaction: ElementTree.Element, tag: str, species: dict[str, Expr], what: str) -> dict[str, int]:
    """One side of a reaction; a species that is listed twice counts twice."""
    side: dict[str, int] = {}
    for reference in reaction.iterfind(f"{tag}/*"):
        name, number = reference.get("id", ""), reference.get("stoichiometry", "1")
        if reference.tag != "SpeciesReference" or name not in species:
            raise ValueError(f"{what}: <{tag}> names {name!r}, which the SpeciesList lacks")
        if not float(number).is_integer() or float(number) < 1:
            raise ValueError(f"{what}: expected a positive integer stoichiometry of {name!r}, got {number}")
        side[name] = side.get(name, 0) + int(float(number))
    return side


def _reaction(element: ElementTree.Element, species: dict[str, Expr], where: str) -> Reaction:
    name = _text(element, "Id", f"{where}: a reaction")
    what = f"{where}: reaction {name!r}"
    _check_children(element, _REACTION, what)
    reactants, products = (_side(element, tag, species, what) for tag in ("Reactants", "Products"))
    kind = _text(element, "Type", what)
    if kind == "mass-action":
        return Reaction(reactants, products, rate=_expression(_text(element, "Rate", what), what), name=name)
    if kind == "customized":
        law = _expression(_text(element, "PropensityFunction", what), what)
        return Reaction(reactants, products, propensity=law, name=name)
    raise ValueError(f"{what}: type {kind!r} is not supported (known: mass-action, customized)")


def read_stochkit(path: str | PathLike[str]) -> Network:
    r"""Read a StochKit2 model.

    A ``mass-action`` reaction of rate c with reactants :math:`\nu_i` has the propensity
    :math:`c \prod_i \binom{n_i}{\nu_i}`: c n (n - 1) / 2 for two equal molecules, c without reactants; a species on
    both sides is a reactant. A ``customized`` reaction has its ``PropensityFunction``, in which numbers are real: 1/2
    is a half, also where C++ would compute 0.

    Args:
        path: the XML file. Documents with a DOCTYPE are refused: they could refer to other files.

    Raises:
        ValueError: malformed XML, an element or a type of reaction that is not supported (events among them), a species
            that is not declared, an initial population that is not a whole number.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from pygen.ssa.stochkit import read_stochkit
        >>> species = "<Species><Id>A</Id><InitialPopulation>10</InitialPopulation></Species>"
        >>> reaction = "<Reaction><Id>birth</Id><Type>mass-action</Type><Rate>2</Rate>"
        >>> reaction += "<Products><SpeciesReference id='A'/></Products></Reaction>"
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "birth.xml"
        ...     lists = f"<SpeciesList>{species}</SpeciesList><ReactionsList>{reaction}</ReactionsList>"
        ...     _ = path.write_text(f"<Model>{lists}</Model>")
        ...     net = read_stochkit(path)
        >>> print(net.reactions[0], net.initial)
        0 -> A [10]

    Source: Sanft et al., StochKit2: software for discrete stochastic simulation of biochemical systems with events,
    Bioinformatics 27, 2011.
    """
    path = Path(path)
    data = path.read_bytes()
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{path.name}: a document type declaration is not supported")
    try:
        model = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path.name}: not well-formed XML: {error}") from error
    if model.tag != "Model":
        raise ValueError(f"{path.name}: expected a StochKit <Model>, got <{model.tag}>")
    _check_children(model, _MODEL, path.name)
    parameters: dict[str, float | Expr] = {}
    for element in model.iterfind("ParametersList/Parameter"):
        name = _text(element, "Id", f"{path.name}: a parameter")
        what = f"{path.name}: parameter {name!r}"
        parameters[name] = _number_or_expression(_text(element, "Expression", what), what)
    species: dict[str, Expr] = {}
    for element in model.iterfind("SpeciesList/Species"):
        name = _text(element, "Id", f"{path.name}: a species")
        what = f"{path.name}: species {name!r}"
        species[name] = _expression(_text(element, "InitialPopulation", what), what)
    reactions = [_reaction(element, species, path.name) for element in model.iterfind("ReactionsList/Reaction")]
    return Network(species, parameters, reactions, name=path.stem)
