"""What one does with the trees of laws, triggers and rules: ask for names, substitute, fold constants, evaluate.

syntax.py makes them from text; network.py builds networks of them, program.py makes the engine's instructions.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pygen.ssa.syntax import ARITY, COMPARISONS, RESERVED, Call, Expr, Number, Symbol, Time, parse, to_text, walk

__all__ = [
    "ARITY",
    "COMPARISONS",
    "RESERVED",
    "Call",
    "Expr",
    "Number",
    "Symbol",
    "Time",
    "chain_exponent",
    "evaluate",
    "fold",
    "parse",
    "substitute",
    "symbols",
    "to_text",
    "uses_time",
    "walk",
]

# Larger exponents go to pow: a long chain of products is slower than it and no more exact.
LONGEST_CHAIN = 16


def symbols(expr: Expr) -> set[str]:
    """All names in the expression, without `time`."""
    names: set[str] = set()
    seen: set[int] = set()
    stack = [expr]
    while stack:  # a plain loop: of a long sum of observables this is most of what reading it costs
        node = stack.pop()
        if type(node) is Symbol:
            names.add(node.name)
        elif type(node) is Call and id(node) not in seen:
            seen.add(id(node))
            stack.extend(node.args)
    return names


def uses_time(expr: Expr) -> bool:
    """Whether `time` stands anywhere in the expression."""
    return walk(expr, lambda node, args: isinstance(node, Time) or any(args))


def substitute(expr: Expr, replacements: Mapping[str, Expr]) -> Expr:
    """The expression with every name that `replacements` has replaced by its tree, all at once."""

    def visit(node: Expr, args: list[Expr]) -> Expr:
        if isinstance(node, Symbol):
            return replacements.get(node.name, node)
        return _rebuilt(node, args)

    return walk(expr, visit)


def _rebuilt(node: Expr, args: list[Expr]) -> Expr:
    """The node with these arguments: itself if they are its own."""
    if not isinstance(node, Call) or all(new is old for new, old in zip(args, node.args, strict=True)):
        return node
    return Call(node.op, tuple(args))


def chain_exponent(node: Call) -> int | None:
    """The exponent of a power that is computed as a chain of products, x * x * x: a whole constant up to 16 in size."""
    exponent = node.args[1] if node.op == "pow" else None
    if isinstance(exponent, Number) and abs(exponent.value) <= LONGEST_CHAIN and exponent.value == int(exponent.value):
        return int(exponent.value)
    return None


def _power_chain(base: Any, exponent: int) -> Any:
    """x * x, * x, ... from the left; 1 over that for a negative exponent. The engine multiplies in this order."""
    if exponent == 0:
        return np.ones_like(base)
    result = base
    for _ in range(abs(exponent) - 1):
        result = np.multiply(result, base)
    return result if exponent > 0 else np.divide(1.0, result)


def _truth(value: Any) -> Any:
    return np.asarray(value, dtype=np.float64)


# What each op does to float64. The first group is exact in IEEE arithmetic: the same bits on every machine.
_EXACT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "lt": lambda a, b: _truth(np.less(a, b)),
    "le": lambda a, b: _truth(np.less_equal(a, b)),
    "gt": lambda a, b: _truth(np.greater(a, b)),
    "ge": lambda a, b: _truth(np.greater_equal(a, b)),
    "eq": lambda a, b: _truth(np.equal(a, b)),
    "ne": lambda a, b: _truth(np.not_equal(a, b)),
    "and": lambda a, b: _truth(np.logical_and(a, b)),
    "or": lambda a, b: _truth(np.logical_or(a, b)),
    "not": lambda a: _truth(np.logical_not(a)),
    "min": lambda a, b: np.where(np.less(a, b), a, b),
    "max": lambda a, b: np.where(np.greater(a, b), a, b),
    "select": lambda condition, then, otherwise: np.where(np.not_equal(condition, 0.0), then, otherwise),
}
_LIBRARY: dict[str, Callable[..., Any]] = {"exp": np.exp, "log": np.log, "pow": np.power}


def fold(expr: Expr) -> Expr:
    """The expression with its constant parts computed, as far as IEEE arithmetic defines their bits.

    exp, log and non-integer powers stay: their last bit depends on the machine's library. So does what would not be
    finite, such as 1/0.
    """

    def visit(node: Expr, args: list[Expr]) -> Expr:
        if not isinstance(node, Call):
            return node
        new = _rebuilt(node, args)
        assert isinstance(new, Call)
        if new.op == "select" and isinstance(new.args[0], Number):
            return new.args[1] if new.args[0].value != 0 else new.args[2]
        values = [arg.value for arg in new.args if isinstance(arg, Number)]
        exponent = chain_exponent(new)
        if len(values) < len(new.args) or (new.op not in _EXACT and exponent is None):
            return new
        with np.errstate(all="ignore"):
            value = float(_EXACT[new.op](*values) if exponent is None else _power_chain(values[0], exponent))
        return Number(value) if math.isfinite(value) else new

    return walk(expr, visit)


def evaluate(expr: Expr, env: Mapping[str, Any], time: Any = None) -> Any:
    """The expression's value in float64 by NumPy: IEEE rules throughout, so 1/0 is inf and log(-1) is NaN, silently.

    Args:
        expr: the tree.
        env: a value for every name: numbers or arrays that broadcast against each other.
        time: the value of `time`, where the expression has it.

    Returns:
        A float, or an array of the shape that the values broadcast to.

    Raises:
        ValueError: a name, or `time`, has no value.

    Example:
        >>> from pygen.ssa.expression import evaluate, parse
        >>> evaluate(parse("k * A * (A - 1) / 2"), {"k": 0.5, "A": 4})
        3.0
    """

    def visit(node: Expr, args: list[Any]) -> Any:
        if isinstance(node, Number):
            return np.float64(node.value)
        if isinstance(node, Call):
            exponent = chain_exponent(node)
            if exponent is not None:
                return _power_chain(args[0], exponent)
            return (_EXACT.get(node.op) or _LIBRARY[node.op])(*args)
        name = node.name if isinstance(node, Symbol) else "time"
        value = time if isinstance(node, Time) else env.get(name)
        if value is None:
            raise ValueError(f"evaluate: expected a value for {name!r}, got {', '.join(map(str, env)) or 'none'}")
        return np.asarray(value, dtype=np.float64)

    with np.errstate(all="ignore"):
        result = walk(expr, visit)
    return float(result) if np.ndim(result) == 0 else result
