"""An SBML document from a file or text, checked for what no part of it may have. sbml.py reads the model in it."""

from os import PathLike
from pathlib import Path
from typing import Any


def _libsbml() -> Any:
    try:
        import libsbml
    except ImportError as error:
        raise ImportError("reading SBML needs python-libsbml: pip install 'pygen[ssa]'") from error
    return libsbml


def items(container: Any) -> list[Any]:
    """The elements of one of libsbml's lists, which Python cannot iterate over."""
    return [container.get(i) for i in range(container.size())]


def _refuse_unsupported(document: Any) -> None:
    model = document.getModel()
    # In level 2 annotations (layout, render) appear as packages; only level 3 has any that change a model's meaning.
    for index in range(document.getNumPlugins() if document.getLevel() > 2 else 0):
        package = document.getPlugin(index).getPackageName()
        # l3v2extendedmath is libsbml's name for the functions that level 3 version 2 adds; _mathml.py judges those.
        if document.getPackageRequired(package) and package != "l3v2extendedmath":
            raise ValueError(f"the SBML package {package!r} is not supported, and this model requires it")
    if model.getNumConstraints():
        raise ValueError("constraints are not supported: a trajectory that violates one would have to stop there")
    for rule in items(model.getListOfRules()):
        if not rule.isAssignment():
            kind = "rate" if rule.isRate() else "algebraic"
            raise ValueError(
                f"{kind} rules are not supported" + (f" (of {rule.getVariable()!r})" if rule.isRate() else "")
            )
    if model.isSetConversionFactor():
        raise ValueError("the model's conversion factor is not supported")
    for species in items(model.getListOfSpecies()):
        if species.isSetConversionFactor():
            raise ValueError(f"the conversion factor of species {species.getId()!r} is not supported")


def load(source: str | PathLike[str]) -> tuple[Any, Any, str]:
    """The module libsbml, the parsed document in level 2 or 3, and what messages call it."""
    libsbml = _libsbml()
    if isinstance(source, str) and source.lstrip("\ufeff \t\r\n").startswith("<"):
        document, where = libsbml.readSBMLFromString(source.lstrip("\ufeff \t\r\n")), "SBML text"
    else:
        path = Path(source)
        document, where = libsbml.readSBMLFromString(path.read_text(encoding="utf-8-sig")), path.name
    for index in range(document.getNumErrors()):
        error = document.getError(index)
        if error.getSeverity() >= libsbml.LIBSBML_SEV_ERROR:
            raise ValueError(f"{where}, line {error.getLine()}: {' '.join(error.getMessage().split())}")
    if document.getModel() is None:
        raise ValueError(f"{where}: there is no model in it")
    if document.getLevel() == 1:
        for compartment in items(document.getModel().getListOfCompartments()):
            compartment.setVolume(compartment.getVolume())  # or the conversion drops the default of level 1
        if not document.setLevelAndVersion(2, 4, False):
            raise ValueError(f"{where}: this level 1 model cannot be converted to level 2")
    try:
        _refuse_unsupported(document)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return libsbml, document, where
