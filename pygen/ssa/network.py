"""Reaction networks: species, parameters, reactions, rules and events, checked and brought into one canonical form.

expression.py reads the laws; program.py packs a network for the engine; reference.py simulates one in plain Python.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pygen.ssa.breakpoints import in_steps
from pygen.ssa.expression import (
    RESERVED,
    Call,
    Expr,
    Number,
    Symbol,
    evaluate,
    fold,
    parse,
    substitute,
    symbols,
    to_text,
    uses_time,
)
from pygen.ssa.reaction import Event, EventLaw, Formula, PropensityTable, Reaction

if TYPE_CHECKING:
    from pygen.ssa.program import Program

__all__ = ["LARGEST_COUNT", "Event", "EventLaw", "Formula", "Network", "PropensityTable", "Reaction"]

# Counts are stored as float64: beyond this, neighbouring integers are no longer told apart.
LARGEST_COUNT = 2**53


class Network:
    r"""A well-mixed system of reactions, the object that everything in `pygen.ssa` works on.

    Args:
        species: {name: initial count}, an int >= 0, or an expression of parameters with such a value, computed once
            here. The order is the order of the columns of results.
        parameters: {name: number}, or an expression of other parameters, which follows an override of those.
        reactions: the channels, in the order in which partial sums of propensities are formed.
        events: see `Event`.
        rules: {name: expression of species, parameters, time and other rules}, for use in all laws.
        observables: {name: expression of all of these and other observables}, for output only.
        boundary: species that reactions do not change; events may.
        mass_action: "combinatorial": a = c prod C(n, nu) (Gillespie 1977). "falling": a = c prod n!/(n - nu)!.
        name: of the network.

    A mass-action law is computed as a = c' (c' = c / prod nu!, or c), then for every reactant in the given order
    and k = 0 ... nu - 1: a = a * (n - k). The bits of a trajectory depend on this order.

    Raises:
        ValueError: a name that is not an identifier, is used twice or is unknown where it is used; rules that need each
            other; an initial count that is not an integer >= 0; a law in which time does not only enter through steps.

    Example:
        >>> from pygen.ssa.network import Network, Reaction
        >>> net = Network({"A": 100, "B": 0}, {"k": 0.5}, [Reaction({"A": 2}, {"B": 1}, rate="k")])
        >>> print(net.propensity_table())
        r0  2 A -> B  k / 2 * A * (A - 1)
        mass action is combinatorial: c * C(n, nu), n choose nu for every reactant

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81 (1977).
    """

    def __init__(
        self,
        species: Mapping[str, int | str | Expr],
        parameters: Mapping[str, Formula] | None = None,
        reactions: Iterable[Reaction] = (),
        events: Iterable[Event] = (),
        *,
        rules: Mapping[str, Formula] | None = None,
        observables: Mapping[str, Formula] | None = None,
        boundary: Collection[str] = (),
        mass_action: Literal["combinatorial", "falling"] = "combinatorial",
        name: str = "network",
    ) -> None:
        if mass_action not in ("combinatorial", "falling"):
            raise ValueError(f"Network: expected mass_action 'combinatorial' or 'falling', got {mass_action!r}")
        self.name, self.mass_action = name, mass_action
        # What a file calls the species, where that is no identifier: filled in by the readers of such files.
        self.labels: dict[str, str] = {}
        self.species = tuple(species)
        self.reactions, self.events = tuple(reactions), tuple(events)
        parameters, rules, observables = parameters or {}, rules or {}, observables or {}
        _check_names({"species": species, "parameter": parameters, "rule": rules, "observable": observables})
        if isinstance(boundary, str) or not set(boundary) <= species.keys():
            raise ValueError(f"Network: expected names of species in boundary, got {boundary!r}")
        self.boundary = tuple(one for one in self.species if one in set(boundary))

        # name -> expression of species, free parameters and time alone
        self._inlined: dict[str, Expr] = {}
        self._read_parameters(parameters)
        self.initial = np.array([self._initial(one, value) for one, value in species.items()], dtype=np.int64)
        changeable = (*self.species, *self.parameters)
        self._slots = {one: slot for slot, one in enumerate(changeable)}
        in_laws = {*self.species, *parameters, *rules}
        self.rules = self._definitions("rule", rules, in_laws)
        everything = in_laws | observables.keys()
        self.observables = self._definitions("observable", observables, everything, in_laws=False)
        self._in_laws = in_laws

        targets = {target for event in self.events for target in event.assignments}
        # What time may not be compared with: it changes during a trajectory.
        self.changed_parameters = frozenset(targets.intersection(self.parameters))
        self._varying = {*self.species, *self.changed_parameters}
        self._laws: list[Expr] = []
        self._changes: list[dict[int, int]] = []
        self._read_reactions()
        self.event_laws = tuple(self._event_law(index, event) for index, event in enumerate(self.events))
        self._programs: dict[Any, Program] = {}

    # ---- construction

    def _read(self, formula: Formula, known: Collection[str], where: str) -> Expr:
        """The tree of an expression all of whose names are known."""
        return self._read_with_names(formula, known, where)[0]

    def _read_with_names(self, formula: Formula, known: Collection[str], where: str) -> tuple[Expr, set[str]]:
        try:
            expr = parse(formula)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from None
        used = symbols(expr)
        unknown = used.difference(known)
        if unknown:
            names = sorted(known)
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(
                f"{where}: unknown name {min(unknown)!r} in {to_text(expr)!r}; known here: {shown or 'no names'}"
            )
        return expr, used

    def _inline(self, expr: Expr) -> Expr:
        return fold(substitute(expr, self._inlined) if self._inlined else expr)

    def law(self, formula: Formula, where: str) -> Expr:
        """An expression as the engine gets it: names checked, rules inlined, constants folded, time in steps.

        Raises:
            ValueError: the expression cannot be read or simulated; the message begins with `where`.
        """
        return in_steps(self._inline(self._read(formula, self._in_laws, where)), self._varying, where)

    def _read_parameters(self, parameters: Mapping[str, Formula]) -> None:
        values: dict[str, float] = {}
        derived: dict[str, Formula] = {}
        for name, value in parameters.items():
            if isinstance(value, str) or not isinstance(value, Real):
                expr = fold(self._read(value, parameters.keys(), f"parameter {name!r}"))
                if isinstance(expr, Number):
                    values[name] = expr.value
                else:
                    derived[name] = expr
            else:
                values[name] = float(value)
        self.parameters = tuple(values)
        self.parameter_values = np.array(list(values.values()), dtype=np.float64)
        self.derived = self._definitions("parameter", derived, parameters.keys())

    def _definitions(
        self, kind: str, formulas: Mapping[str, Formula], known: Collection[str], *, in_laws: bool = True
    ) -> dict[str, Expr]:
        """Named expressions, each after those that it uses; those known in laws are added to what laws inline."""
        read = {name: self._read_with_names(formula, known, f"{kind} {name!r}") for name, formula in formulas.items()}
        trees = {name: fold(tree) if in_laws else tree for name, (tree, _) in read.items()}
        needs = {name: used & read.keys() for name, (_, used) in read.items()}
        ordered: dict[str, Expr] = {}
        while len(ordered) < len(trees):
            ready = [name for name in trees if name not in ordered and needs[name] <= ordered.keys()]
            if not ready:
                cycle = ", ".join(repr(name) for name in trees if name not in ordered)
                raise ValueError(f"Network: {kind}s must not depend on each other in a circle, got {cycle}")
            for name in ready:
                ordered[name] = trees[name]
                # `time` is a tree of its own and cannot be shadowed: only names are replaced.
                if in_laws:
                    self._inlined[name] = self._inline(trees[name])
        return ordered

    def _initial(self, name: str, value: Formula) -> int:
        where = f"species {name!r}"
        if isinstance(value, str) or not isinstance(value, Real):
            expr = self._inline(self._read(value, {*self.parameters, *self.derived}, where))
            if uses_time(expr):
                raise ValueError(f"{where}: expected an initial count that does not depend on time, got {value!r}")
            count = evaluate(expr, dict(zip(self.parameters, self.parameter_values.tolist(), strict=True)))
        else:
            count = value
        if not 0 <= count <= LARGEST_COUNT or count != math.floor(count):
            raise ValueError(f"{where}: expected an integer from 0 to 2^53 as initial count, got {count!r}")
        return int(count)

    def _read_reactions(self) -> None:
        slots = {name: slot for slot, name in enumerate(self.species)}
        boundary = {slots[name] for name in self.boundary}
        # Networks have thousands of reactions and few distinct laws: each text is read once.
        known: dict[str, Expr] = {}
        for index, reaction in enumerate(self.reactions):
            change: dict[int, int] = {}
            try:
                for name, number in reaction.reactants.items():
                    change[slots[name]] = -number
                for name, number in reaction.products.items():
                    slot = slots[name]
                    change[slot] = change.get(slot, 0) + number
            except KeyError:
                raise ValueError(f"{self._where(index)}: expected a species, got {name!r}") from None
            if boundary or 0 in change.values():
                change = {slot: delta for slot, delta in change.items() if delta and slot not in boundary}
            self._changes.append(change)
            formula: Formula = reaction.rate if reaction.propensity is None else reaction.propensity  # type: ignore
            law = known.get(formula) if isinstance(formula, str) else self.law(formula, self._where(index))
            if law is None:
                law = known[formula] = self.law(formula, self._where(index))  # type: ignore[index]
            self._laws.append(law)

    def _where(self, index: int) -> str:
        kind = "rate" if self.reactions[index].propensity is None else "propensity"
        return f"{kind} of reaction {self.reactions[index].name or f'r{index}'}"

    def _event_law(self, index: int, event: Event) -> EventLaw:
        where = f"event {event.name or f'event{index}'}"
        for target in event.assignments:
            if target not in self._slots:
                raise ValueError(
                    f"{where}: expected a species or a parameter that is a number as target, got {target!r}"
                )
        # New values and priorities are computed at one instant: there time may stand anywhere.
        values = [
            self._inline(self._read(value, self._in_laws, f"{where}, new value of {target!r}"))
            for target, value in event.assignments.items()
        ]
        priority = event.priority
        return EventLaw(
            self.law(event.trigger, f"trigger of {where}"),
            tuple(self._slots[target] for target in event.assignments),
            tuple(values),
            None if priority is None else self._inline(self._read(priority, self._in_laws, f"priority of {where}")),
        )

    # ---- what one asks a network

    @cached_property
    def reaction_names(self) -> tuple[str, ...]:
        """The reactions' names; r and the index where none was given."""
        return tuple(reaction.name or f"r{index}" for index, reaction in enumerate(self.reactions))

    @cached_property
    def stoichiometry(self) -> np.ndarray:
        """Net change of every species in every reaction, int64 [R, S]; 0 for boundary species."""
        changes = np.zeros((len(self.reactions), len(self.species)), dtype=np.int64)
        for row, change in zip(changes, self._changes, strict=True):
            for slot, delta in change.items():
                row[slot] = delta
        return changes

    def divisor(self, index: int) -> float:
        """The number prod nu!, in float64, by which the rate of a mass-action reaction is divided; 1 for "falling"."""
        if self.mass_action == "falling":
            return 1.0
        divisor = math.prod(float(math.factorial(number)) for number in self.reactions[index].reactants.values())
        if math.isinf(divisor):
            raise ValueError(f"{self._where(index)}: expected a product of factorials that float64 holds, got infinity")
        return divisor

    def propensity(self, index: int) -> Expr:
        """The complete law of reaction `index`, an expression of species, parameters and time, as it is simulated."""
        law = self._laws[index]
        if self.reactions[index].propensity is not None:
            return law
        divisor = self.divisor(index)
        if divisor != 1:
            law = fold(Call("div", (law, Number(divisor))))
        for name, number in self.reactions[index].reactants.items():
            for taken in range(number):
                factor = Call("sub", (Symbol(name), Number(float(taken)))) if taken else Symbol(name)
                law = Call("mul", (law, factor))
        return law

    def propensity_table(self) -> PropensityTable:
        """A table of all reactions with their complete laws; print it."""
        rows = (
            (name, str(reaction), to_text(self.propensity(index)))
            for index, (name, reaction) in enumerate(zip(self.reaction_names, self.reactions, strict=True))
        )
        return PropensityTable(tuple(rows), self.mass_action)

    def program(self, stop: Formula | None = None) -> "Program":
        """The network packed for the engine, with a stopping condition or without; computed once per condition."""
        from pygen.ssa.program import compile_network

        if stop not in self._programs:
            self._programs[stop] = compile_network(self, stop)
        return self._programs[stop]

    def to_sbml(self, path: str | PathLike[str] | None = None) -> str:
        """The network as an SBML document; also written to `path` if one is given."""
        from pygen.ssa.sbml import write_sbml

        text = write_sbml(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __repr__(self) -> str:
        return (
            f"<Network {self.name!r}: {len(self.species)} species, {len(self.reactions)} reactions, "
            f"{len(self.parameters)} parameters, {len(self.events)} events>"
        )


def _check_names(groups: Mapping[str, Iterable[str]]) -> None:
    """Every name an identifier, and unique over all groups."""
    owner: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
                raise ValueError(
                    f"Network: expected an identifier, not {', '.join(RESERVED)}, as name of a {group}, got {name!r}"
                )
            if name in owner:
                raise ValueError(f"Network: expected unique names, got {name!r} as {owner[name]} and as {group}")
            owner[name] = group
