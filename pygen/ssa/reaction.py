"""Reactions and events as their author writes them down; network.py checks them against a whole network."""

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Union

from pygen.ssa.expression import Expr, Number, fold, parse

Formula = Union[str, float, Expr]  # noqa: UP007
# The engine keeps changes of counts in 32 bits. Mass action divides by nu!, which float64 has up to 170!.
LARGEST_CHANGE = 2**31 - 1
LARGEST_ORDER = 170


class Reaction:
    """One reaction channel: what it uses up, what it makes, and its law.

    Args:
        reactants: how many of each species go in, {name: positive int}.
        products: how many come out.
        rate: the stochastic constant c of a mass-action law, an expression (usually one parameter). The propensity is
            c * prod C(n_i, nu_i) over the reactants, or c * prod n_i! / (n_i - nu_i)! (see `Network`).
        propensity: instead of a rate, the whole law as an expression of species, parameters, rules and time.
        name: shown in messages and tables; by default r and the reaction's index.

    Raises:
        ValueError: a stoichiometric number that is not a positive integer (up to 170 for reactants of mass action, else
            2^31 - 1); both or neither of rate and propensity.

    Example:
        >>> from pygen.ssa.reaction import Reaction
        >>> print(Reaction({"A": 2}, {"B": 1}, rate="k"))
        2 A -> B
    """

    __slots__ = ("name", "products", "propensity", "rate", "reactants")

    def __init__(
        self,
        reactants: Mapping[str, int],
        products: Mapping[str, int],
        *,
        rate: Formula | None = None,
        propensity: Formula | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name
        if (rate is None) == (propensity is None):
            got = "neither" if rate is None else "both"
            raise ValueError(f"Reaction {name or self._side(reactants)!r}: expected rate or propensity, got {got}")
        self.reactants = self._checked("reactants", reactants, LARGEST_CHANGE if rate is None else LARGEST_ORDER)
        self.products = self._checked("products", products, LARGEST_CHANGE)
        self.rate = rate
        self.propensity = propensity

    def _checked(self, argument: str, side: Mapping[str, int], largest: int) -> dict[str, int]:
        for number in side.values():
            if type(number) is not int or not 0 < number <= largest:
                break
        else:
            return dict(side)
        for species, number in side.items():
            if not isinstance(number, Integral) or not 0 < number <= largest:
                where = f"Reaction {self.name or ''}, {argument}"
                raise ValueError(
                    f"{where}: expected a positive integer up to {largest} for {species!r}, got {number!r}"
                )
        return {species: int(number) for species, number in side.items()}

    @staticmethod
    def _side(side: Mapping[str, int]) -> str:
        return " + ".join(name if number == 1 else f"{number} {name}" for name, number in side.items()) or "0"

    def __str__(self) -> str:
        return f"{self._side(self.reactants)} -> {self._side(self.products)}"

    def __repr__(self) -> str:
        law = f"rate={self.rate!r}" if self.propensity is None else f"propensity={self.propensity!r}"
        return f"Reaction({self.reactants!r}, {self.products!r}, {law}, name={self.name!r})"


@dataclass(frozen=True)
class Event:
    """Assignments that happen at the instant at which a condition turns from false to true.

    Args:
        trigger: the condition, an expression of species, parameters, rules and time.
        assignments: {species or parameter: new value}, expressions; all are computed before any is assigned.
        name: shown in messages; by default event and its index.
        priority: of events at one instant the highest goes first; None is below all numbers.
        persistent: False: an event that waits behind others is dropped if its trigger is false again by its turn.
        initial_value: what the trigger counts as having been before the start; False fires an event whose trigger is
            true at the start.
        values_from_trigger_time: compute the new values when the trigger fires, not when the event's turn comes.
        delay: must be None or 0.

    Raises:
        ValueError: there is a delay.
    """

    trigger: Formula
    assignments: Mapping[str, Formula]
    name: str | None = None
    priority: Formula | None = None
    persistent: bool = True
    initial_value: bool = True
    values_from_trigger_time: bool = True
    delay: Formula | None = None

    def __post_init__(self) -> None:
        if self.delay is not None and fold(parse(self.delay)) != Number(0.0):
            raise ValueError(f"Event {self.name or ''}: delays are not supported, got delay={self.delay!r}")
        object.__setattr__(self, "assignments", dict(self.assignments))


@dataclass(frozen=True)
class EventLaw:
    """An event as simulated: rules inlined, time in steps. Targets are slots: species first, then parameters."""

    trigger: Expr
    targets: tuple[int, ...]
    values: tuple[Expr, ...]
    priority: Expr | None


@dataclass(frozen=True)
class PropensityTable:
    """What will be simulated, law by law; printing it gives a table."""

    rows: tuple[tuple[str, str, str], ...]
    """Name, equation and law of every reaction."""
    mass_action: str

    def __str__(self) -> str:
        if not self.rows:
            return "no reactions"
        widths = [max(len(row[column]) for row in self.rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {equation:<{widths[1]}}  {law}" for name, equation, law in self.rows]
        counted = "C(n, nu), n choose nu" if self.mass_action == "combinatorial" else "n! / (n - nu)!"
        return "\n".join([*lines, f"mass action is {self.mass_action}: c * {counted} for every reactant"])

    __repr__ = __str__
