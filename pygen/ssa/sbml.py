"""SBML models (levels 2 and 3, through python-libsbml) as `Network`s of pygen.ssa; sbml_write.py goes the other way.

The meaning of a model is that of the Discrete Stochastic Model Test Suite: species are numbers of molecules, and a
kinetic law is a propensity as it is written.
"""

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

from pygen.ssa._mass_action import mass_action
from pygen.ssa._mathml import MathReader
from pygen.ssa._sbml_document import items, load
from pygen.ssa.expression import RESERVED, Call, Expr, Number, Symbol, evaluate, fold, substitute, symbols, uses_time
from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.sbml_write import write_sbml

__all__ = ["read_sbml", "write_sbml"]

# How far a product of decimals (a concentration times a volume) may be from the integer that it stands for.
_ROUNDING = 1e-12


class _Model:
    """The parts of an SBML model, read in the order in which they need each other.

    Raises ValueError at whatever the simulation would otherwise have to leave out; the message names it.
    """

    def __init__(self, libsbml: Any, document: Any) -> None:
        self.model = model = document.getModel()
        functions = {
            definition.getId(): definition.getMath() for definition in items(model.getListOfFunctionDefinitions())
        }
        self._math = MathReader(libsbml, functions)
        self.compartments = {element.getId(): element for element in items(model.getListOfCompartments())}
        self.species = {element.getId(): element for element in items(model.getListOfSpecies())}
        self.parameters = {element.getId(): element for element in items(model.getListOfParameters())}
        self.rules = {rule.getVariable(): rule for rule in items(model.getListOfRules())}
        self.assignments = {one.getSymbol(): one for one in items(model.getListOfInitialAssignments())}
        self.targets = {
            assignment.getVariable()
            for event in items(model.getListOfEvents())
            for assignment in items(event.getListOfEventAssignments())
        }
        self._check_targets()
        # The species that reactions change or count; those that a rule defines are no state.
        self.counted = [sid for sid in self.species if sid not in self.rules]
        # SBML has ids that expressions reserve; local parameters get ids of their own.
        self._ids = {*self.compartments, *self.species, *self.parameters}
        self.names: dict[str, str] = {}
        self.labels: dict[str, str] = {}
        for sid in (*self.compartments, *self.species, *self.parameters):
            self.names[sid] = self._new_name(sid, sid)
        self.local: dict[str, float] = {}
        self._used_compartments: set[str] = set()
        self._initial: dict[str, float] = {}
        self._pending: list[str] = []
        self.rule_laws = {self.names[sid]: self._rule(sid, rule) for sid, rule in self.rules.items()}

    # ---- names and their meaning in formulas

    def _new_name(self, wanted: str, label: str) -> str:
        name = wanted
        while name in RESERVED or name in self.labels or (name != label and name in self._ids):
            name += "_"
        self.labels[name] = label
        return name

    def _check_size(self, compartment: str) -> None:
        if not self.compartments[compartment].isSetSize() and compartment not in self.assignments:
            raise ValueError(f"the size of compartment {compartment!r} is used and has no value")

    def _compartment(self, sid: str) -> Expr:
        self._check_size(sid)
        self._used_compartments.add(sid)
        return Symbol(self.names[sid])

    def _size(self, species: str) -> Expr | None:
        """The size by which this species' symbol is its amount divided, None where the symbol is the amount."""
        element = self.species[species]
        compartment = element.getCompartment()
        if element.getHasOnlySubstanceUnits() or self.compartments[compartment].getSpatialDimensions() == 0:
            return None
        return self._compartment(compartment)

    def _resolve(self, sid: str) -> Expr:
        if sid in self.species:
            size = self._size(sid)
            amount = Symbol(self.names[sid])
            return amount if size is None else Call("div", (amount, size))
        if sid in self.compartments:
            return self._compartment(sid)
        if sid in self.parameters:
            if not (self.parameters[sid].isSetValue() or sid in self.rules or sid in self.assignments):
                raise ValueError(f"parameter {sid!r} has no value")
            return Symbol(self.names[sid])
        if self.model.getReaction(sid) is not None:
            raise ValueError(f"the rate of reaction {sid!r} inside another formula is not supported")
        raise ValueError(
            f"{sid!r} is no species, parameter or compartment (stoichiometries as variables are not supported)"
        )

    def formula(self, element: Any, what: str, resolve: Callable[[str], Expr] | None = None) -> Expr:
        """The element's math; an error in it begins with `what`."""
        if element.getMath() is None:
            raise ValueError(f"{what} has no math")
        try:
            return self._math.read(element.getMath(), resolve or self._resolve)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error

    def _amount(self, sid: str, value: Expr) -> Expr:
        """The number of molecules of a species from a value of its symbol."""
        size = self._size(sid) if sid in self.species else None
        return value if size is None else Call("mul", (value, size))

    # ---- assignment rules, initial values

    def _check_targets(self) -> None:
        for sid in (*self.rules, *self.assignments, *self.targets):
            if sid in self.compartments and (sid in self.rules or sid in self.targets):
                raise ValueError(f"compartment {sid!r} varies: only constant compartments are supported")
            if sid not in self.compartments and sid not in self.species and sid not in self.parameters:
                raise ValueError(
                    f"assignments to {sid!r} are not supported: it is no species, parameter or compartment"
                )
        for sid in sorted(self.targets):
            element = self.species[sid] if sid in self.species else self.parameters[sid]
            if sid in self.rules or element.getConstant():
                raise ValueError(
                    f"an event assigns to {sid!r}, which is {'a rule' if sid in self.rules else 'constant'}"
                )

    def _rule(self, sid: str, rule: Any) -> Expr:
        return self._amount(sid, self.formula(rule, f"rule of {sid!r}"))

    def _start(self, expr: Expr) -> float:
        """The value of an expression at the start."""
        env = {name: self.initial(self.labels[name]) for name in symbols(expr)}
        return float(evaluate(expr, env, time=0.0))

    def initial(self, sid: str) -> float:
        """The value at the start: of a species its amount."""
        if sid not in self._initial:
            if sid in self._pending:
                raise ValueError(f"initial assignments depend on each other in a circle: {', '.join(self._pending)}")
            self._pending.append(sid)
            self._initial[sid] = self._compute_initial(sid)
            self._pending.pop()
        return self._initial[sid]

    def _compute_initial(self, sid: str) -> float:
        if sid in self.rules:
            return self._start(self.rule_laws[self.names[sid]])
        if sid in self.assignments:
            return self._start(self._amount(sid, self._initial_assignment(sid)))
        if sid in self.compartments:
            self._check_size(sid)
            return float(self.compartments[sid].getSize())
        if sid in self.parameters:
            return float(self.parameters[sid].getValue())
        element = self.species[sid]
        if element.isSetInitialAmount():
            return float(element.getInitialAmount())
        if element.isSetInitialConcentration():
            compartment = element.getCompartment()
            has_size = self.compartments[compartment].getSpatialDimensions() != 0
            return element.getInitialConcentration() * (self.initial(compartment) if has_size else 1.0)
        raise ValueError(f"species {sid!r} has no initial value")

    def _initial_assignment(self, sid: str) -> Expr:
        return self.formula(self.assignments[sid], f"initial assignment of {sid!r}")

    def count(self, sid: str) -> int:
        """The initial number of molecules."""
        amount = self.initial(sid)
        number = round(amount) if math.isfinite(amount) else -1
        if number < 0 or abs(amount - number) > _ROUNDING * max(1.0, abs(amount)):
            raise ValueError(f"species {sid!r}: expected a whole number of molecules at the start, got {amount!r}")
        return number

    def parameter(self, sid: str) -> float | Expr:
        """A number, or an expression that follows its parameters when those are overridden."""
        if sid not in self.assignments or sid in self.targets:
            return self.initial(sid)
        expr = self._initial_assignment(sid)
        while rules := {name: self.rule_laws[name] for name in symbols(expr) & self.rule_laws.keys()}:
            self.initial(sid)  # refuses circles, on which this loop would not end
            expr = substitute(expr, rules)
        if uses_time(expr):
            return self.initial(sid)
        counts = {
            name: Number(self.initial(self.labels[name])) for name in symbols(expr) if self.labels[name] in self.species
        }
        return substitute(expr, counts)

    # ---- reactions, events

    def _stoichiometry(self, reference: Any, what: str) -> int:
        sid, math_element = reference.getSpecies(), reference.getStoichiometryMath()
        if reference.getId() in self.assignments or (reference.getLevel() > 2 and not reference.isSetStoichiometry()):
            raise ValueError(f"{what}: the stoichiometry of {sid!r} is not a number")
        value = reference.getStoichiometry() / reference.getDenominator()
        if math_element is not None:
            law = fold(self.formula(math_element, f"{what}: stoichiometry of {sid!r}"))
            if not isinstance(law, Number):
                raise ValueError(f"{what}: stoichiometryMath of {sid!r} is not a number")
            value = law.value
        if not value.is_integer() or value < 0:
            raise ValueError(f"{what}: expected an integer stoichiometry of {sid!r}, got {value}")
        return int(value)

    def _side(self, references: list[Any], what: str) -> dict[str, int]:
        side: dict[str, int] = {}
        for reference in references:
            sid = reference.getSpecies()
            element = self.species.get(sid)
            if element is None:
                raise ValueError(f"{what}: {sid!r} is no species")
            number = self._stoichiometry(reference, what)
            if not element.getBoundaryCondition() and (element.getConstant() or sid in self.rules):
                why = "constant" if element.getConstant() else "set by a rule"
                raise ValueError(f"{what} would change species {sid!r}, which is {why}")
            if number and sid not in self.rules:
                side[self.names[sid]] = side.get(self.names[sid], 0) + number
        return side

    def _local_parameters(self, law: Any, what: str, reaction: str) -> dict[str, Expr]:
        elements = law.getListOfLocalParameters() if law.getLevel() > 2 else law.getListOfParameters()
        local: dict[str, Expr] = {}
        for element in items(elements):
            sid = element.getId()
            if not element.isSetValue():
                raise ValueError(f"{what}: local parameter {sid!r} has no value")
            name = self._new_name(f"{reaction}_{sid}", f"{reaction}.{sid}")
            self.local[name] = element.getValue()
            local[sid] = Symbol(name)
        return local

    def reaction(self, element: Any, counted: set[str], varying: set[str]) -> Reaction:
        name = element.getId()
        what = f"reaction {name!r}"
        if element.isSetFast() and element.getFast():
            raise ValueError(f"{what} is fast: this is not supported")
        if not element.isSetKineticLaw():
            raise ValueError(f"{what} has no kinetic law")
        law_element = element.getKineticLaw()
        local = self._local_parameters(law_element, what, name)

        def resolve(sid: str) -> Expr:
            return local[sid] if sid in local else self._resolve(sid)

        law = fold(self.formula(law_element, f"kinetic law of {what}", resolve))
        reactants = self._side(items(element.getListOfReactants()), what)
        products = self._side(items(element.getListOfProducts()), what)
        found = mass_action(law, counted, varying)
        if found is None or any(found[1].get(one, 0) < number for one, number in reactants.items()) or not found[1]:
            # Also a reactant that the law does not mention, such as a boundary species that may well be at 0.
            return Reaction(reactants, products, propensity=law, name=name)
        rate, orders = found
        # A modifier in the law is a catalyst: it stands on both sides.
        for one, order in orders.items():
            if extra := order - reactants.get(one, 0):
                reactants[one] = order
                products[one] = products.get(one, 0) + extra
        # As text where it is a name: a network reads equal texts once.
        text_or_tree = rate.name if isinstance(rate, Symbol) else rate
        return Reaction({one: reactants[one] for one in orders}, products, rate=text_or_tree, name=name)

    def event(self, index: int, element: Any) -> Event:
        name = element.getId() or f"event{index}"
        what = f"event {name!r}"
        if not element.isSetTrigger():
            raise ValueError(f"{what} has no trigger")
        trigger = element.getTrigger()
        if element.isSetDelay() and fold(self.formula(element.getDelay(), f"delay of {what}")) != Number(0.0):
            raise ValueError(f"{what} has a delay: this is not supported")
        assignments = {
            self.names[one.getVariable()]: self._amount(
                one.getVariable(), self.formula(one, f"{what}, assignment to {one.getVariable()!r}")
            )
            for one in items(element.getListOfEventAssignments())
        }
        return Event(
            self.formula(trigger, f"trigger of {what}"),
            assignments,
            name=name,
            priority=self.formula(element.getPriority(), f"priority of {what}") if element.isSetPriority() else None,
            # Before level 3 an event does not fire at the start, and nothing revokes it: libsbml says the same of them.
            persistent=trigger.getPersistent(),
            initial_value=trigger.getInitialValue(),
            values_from_trigger_time=element.getUseValuesFromTriggerTime(),
        )

    # ---- all of it

    def _varying(self) -> set[str]:
        """The rules whose value changes between events."""
        needs = {name: symbols(law) for name, law in self.rule_laws.items()}
        species = {self.names[sid] for sid in self.species}
        varying = {name for name, law in self.rule_laws.items() if needs[name] & species or uses_time(law)}
        while more := {name for name in needs if name not in varying and needs[name] & varying}:
            varying |= more
        return varying

    def _parameters(self) -> dict[str, float | Expr]:
        """To be called last: the formulas have found the local parameters and the compartments that they need."""
        parameters: dict[str, float | Expr] = {}
        read: set[str] = set()
        for sid, element in self.parameters.items():
            has_value = element.isSetValue() or sid in self.assignments
            if sid in self.targets and not has_value:
                raise ValueError(f"parameter {sid!r} has no value before the event that assigns it")
            if has_value and sid not in self.rules:
                parameters[self.names[sid]] = self.parameter(sid)
        parameters.update(self.local)
        # An initial assignment of one compartment may use the next.
        while unread := [one for one in self.compartments if one in self._used_compartments - read]:
            read.add(unread[0])
            parameters[self.names[unread[0]]] = self.parameter(unread[0])
        return parameters

    def network(self) -> Network:
        varying = self._varying()
        model = self.model
        counted = {self.names[sid] for sid in self.counted}
        reactions = [self.reaction(element, counted, varying) for element in items(model.getListOfReactions())]
        events = [self.event(index, element) for index, element in enumerate(items(model.getListOfEvents()))]
        species = {self.names[sid]: self.count(sid) for sid in self.counted}
        boundary = [
            self.names[sid]
            for sid in self.counted
            if self.species[sid].getBoundaryCondition() or self.species[sid].getConstant()
        ]
        return Network(
            species,
            self._parameters(),
            reactions,
            events,
            rules=self.rule_laws,
            boundary=boundary,
            # A law is r n (n - 1)... with whatever divisor it was written with inside r.
            mass_action="falling",
            name=model.getId() or "network",
        )


def read_sbml(source: str | PathLike[str]) -> Network:
    r"""Read an SBML model of level 2 or 3 (of level 1 where libsbml can convert it) for stochastic simulation.

    Every amount is a number of molecules, whatever its unit, and every kinetic law is the propensity as written, of
    reversible reactions too (a law that becomes negative ends a trajectory as ``invalid_propensity``). In formulas the
    symbol of a species is its amount or, without ``hasOnlySubstanceUnits``, its amount / the size of the compartment.
    A law r n (n - 1)... with constant r becomes mass action, which is the same polynomial and faster; compare
    ``net.propensity_table()``.

    Local parameters are called reaction_parameter (they shadow global ones), compartments that a formula needs are
    parameters, assignment rules are rules (of a species: of its amount). Function definitions are inlined; initial
    assignments of parameters stay expressions. A parameter called ``time``, ``and``, ``or`` or ``not`` gets a ``_``.

    Not supported, and refused by name rather than left out: rate and algebraic rules, constraints, delays, fast
    reactions, varying compartments, varying or fractional stoichiometries, conversion factors, required packages, laws
    with trigonometric functions, rateOf, delay or distributions, initial amounts that are not whole numbers.

    Args:
        source: a file name, or the text of the document.

    Raises:
        ImportError: python-libsbml is missing.
        ValueError: the document cannot be read, or has something that is not supported.

    Example:
        >>> from pygen.ssa import Network, Reaction, read_sbml, write_sbml
        >>> text = write_sbml(Network({"A": 10}, {"k": 0.5}, [Reaction({"A": 2}, {"A": 1}, rate="k")]))
        >>> print(read_sbml(text).propensity_table())
        r0  2 A -> A  0.5 * k * A * (A - 1)
        mass action is falling: c * n! / (n - nu)! for every reactant

    Source: Hucka et al., The Systems Biology Markup Language (SBML): language specification for level 3 version 1 core.
    """
    libsbml, document, where = load(source)
    try:
        return _Model(libsbml, document).network()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
