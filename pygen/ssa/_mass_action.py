"""Which laws are mass action: a rate that no count changes, times the falling factorials of some species' counts.

Files of models write every law as an expression; sbml.py asks here for the ones that the engine has a faster form of.
"""

import math
from collections.abc import Set
from fractions import Fraction
from functools import reduce

from pygen.ssa.expression import LONGEST_CHAIN, Call, Expr, Number, Symbol, symbols, uses_time


def _factors(law: Expr) -> tuple[list[Expr], list[Expr]]:
    """The factors above and below the fraction line, each side in the order of the law."""
    above: list[Expr] = []
    below: list[Expr] = []
    stack = [(law, True)]
    while stack:
        node, is_above = stack.pop()
        op = node.op if isinstance(node, Call) else ""
        args = node.args if isinstance(node, Call) else ()
        exponent = args[1] if op == "pow" else None
        if op == "mul":
            stack += [(args[1], is_above), (args[0], is_above)]
        elif op == "div":
            stack += [(args[1], not is_above), (args[0], is_above)]
        elif op == "neg":
            stack += [(args[0], is_above), (Number(-1.0), is_above)]
        elif isinstance(exponent, Number) and exponent.value in range(1, LONGEST_CHAIN + 1):
            stack += [(args[0], is_above)] * int(exponent.value)
        else:
            (above if is_above else below).append(node)
    return above, below


def _linear(node: Expr) -> tuple[str, float] | None:
    """(name, j) of `name - j`, j = 0 for the name alone."""
    if isinstance(node, Symbol):
        return node.name, 0.0
    if isinstance(node, Call) and node.op in ("add", "sub"):
        left, right = node.args
        if node.op == "add" and isinstance(left, Number):
            left, right = right, left
        if isinstance(left, Symbol) and isinstance(right, Number):
            return left.name, right.value if node.op == "sub" else -right.value
    return None


def _as_float(number: Fraction) -> float | None:
    """The number, if a float has exactly this value."""
    try:
        return float(number) if Fraction(float(number)) == number else None
    except OverflowError:
        return None


def _literal(nodes: list[Expr]) -> tuple[float | None, list[Expr]]:
    """The product of the numbers among the factors (None: not exact as a float, or 0), and the other factors."""
    numbers = [node.value for node in nodes if isinstance(node, Number)]
    if not numbers:
        return 1.0, nodes
    others: list[Expr] = [node for node in nodes if not isinstance(node, Number)]
    if not all(map(math.isfinite, numbers)):
        return None, others
    return _as_float(reduce(Fraction.__mul__, map(Fraction, numbers))) or None, others


def _product(nodes: list[Expr]) -> Expr:
    return reduce(lambda product, node: Call("mul", (product, node)), nodes) if nodes else Number(1.0)


def _rate(above: list[Expr], below: list[Expr]) -> Expr | None:
    """One expression of the factors; numbers are merged as far as that is exact, equal factors cancel."""
    top, above = _literal(above)
    bottom, below = _literal(below)
    if top is None or bottom is None:
        return None
    for node in list(below):
        if node in above:
            above.remove(node)
            below.remove(node)
    quotient = _as_float(Fraction(top) / Fraction(bottom)) if bottom != 1 else None
    if quotient is not None:
        top, bottom = quotient, 1.0
    above = above if top == 1 and above else [Number(top), *above]
    below = below if bottom == 1 else [Number(bottom), *below]
    return Call("div", (_product(above), _product(below))) if below else _product(above)


def mass_action(law: Expr, species: Set[str], varying: Set[str]) -> tuple[Expr, dict[str, int]] | None:
    r"""Write a law as :math:`r \prod_i n_i (n_i - 1) \cdots (n_i - \nu_i + 1)` where it is exactly that polynomial.

    Args:
        law: the expression of a propensity.
        species: names of the counts :math:`n_i`.
        varying: the other names that change in the course of a trajectory without an event: r has none of them.

    Returns:
        r and the :math:`\nu_i`, or None where the law has any other form (also where it is k n^2 or n / 3 + 1).
    """
    above, below = _factors(law)
    state = species | varying

    def is_constant(node: Expr) -> bool:
        if isinstance(node, (Number, Symbol)):  # nearly all factors
            return isinstance(node, Number) or node.name not in state
        return not uses_time(node) and not symbols(node) & state

    if not all(is_constant(node) for node in below):
        return None
    constants: list[Expr] = []
    offsets: dict[str, list[float]] = {}
    for node in above:
        linear = _linear(node)
        if is_constant(node):
            constants.append(node)
        elif linear is not None and linear[0] in species:
            offsets.setdefault(linear[0], []).append(linear[1])
        else:
            return None
    if any(sorted(found) != list(range(len(found))) for found in offsets.values()):
        return None
    rate = _rate(constants, below)
    return None if rate is None else (rate, {name: len(found) for name, found in offsets.items()})
