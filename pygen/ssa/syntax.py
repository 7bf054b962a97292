"""The language of laws, triggers and rules: from text to a small tree of frozen nodes, and back to text.

expression.py has what else one does with such trees; import from there.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import NoReturn, TypeVar, Union

# Parentheses, powers and signs nest by recursion; sums and products of any length do not.
DEEPEST_NESTING = 100

ARITY = {
    **dict.fromkeys(("neg", "not", "exp", "log", "sqrt", "abs", "floor", "ceil"), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "min", "max", "and", "or"), 2),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), 2),
    "select": 3,
}
COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


@dataclass(frozen=True, slots=True)
class Number:
    """A constant, float64."""

    value: float


@dataclass(frozen=True, slots=True)
class Symbol:
    """A species, parameter, rule or observable, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Time:
    """The simulated time."""


@dataclass(frozen=True, slots=True)
class Call:
    """An operation on trees: `op` is a key of ARITY, comparisons and logic give 1.0 or 0.0."""

    op: str
    args: tuple["Expr", ...]

    def __post_init__(self) -> None:
        if ARITY.get(self.op) != len(self.args):
            expected = f"{ARITY[self.op]} arguments" if self.op in ARITY else f"an op of {', '.join(ARITY)}"
            raise ValueError(f"Call: expected {expected}, got {self.op!r} with {len(self.args)} arguments")


Expr = Union[Number, Symbol, Time, Call]  # noqa: UP007 - a forward reference inside Call needs the typing form
Value = TypeVar("Value")


def walk(expr: Expr, visit: Callable[[Expr, list[Value]], Value]) -> Value:
    """Compute visit(node, results of its arguments) from the leaves up to the root.

    A node that hangs in several places is visited once, and nothing recurses: a sum of ten thousand terms is fine.
    """
    results: dict[int, Value] = {}
    stack = [expr]
    while stack:
        node = stack[-1]
        args = node.args if type(node) is Call else ()
        missing = [arg for arg in args if id(arg) not in results]
        if missing:
            stack.extend(reversed(missing))
            continue
        stack.pop()
        if id(node) not in results:
            results[id(node)] = visit(node, [results[id(arg)] for arg in args])
    return results[id(expr)]


# ---- text to tree. A parser of its own and not Python's `ast`: `^` must bind like a power, `lambda` and `in` are fine
# names of parameters, and `ast` replaces some letters of names by others (NFKC), after which they would be unknown.

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<sign>\*\*|<=|>=|==|!=|&&|\|\||[-+*/^()<>,!]))"
)
_OR, _AND, _NOT, _COMPARE, _ADD, _MULTIPLY, _UNARY, _POWER, _ATOM = range(1, 10)
_BINARY = {
    **{sign: (_OR, "or") for sign in ("or", "||")},
    **{sign: (_AND, "and") for sign in ("and", "&&")},
    **{sign: (_COMPARE, op) for sign, op in COMPARISONS.items()},
    "+": (_ADD, "add"),
    "-": (_ADD, "sub"),
    "*": (_MULTIPLY, "mul"),
    "/": (_MULTIPLY, "div"),
    "^": (_POWER, "pow"),
    "**": (_POWER, "pow"),
}
_FUNCTIONS = {
    **{name: name for name in ("exp", "log", "sqrt", "abs", "floor", "ceil", "pow", "min", "max")},
    "ln": "log",
    "ceiling": "ceil",
    "if": "select",
    "piecewise": "select",
}
RESERVED = ("time", "and", "or", "not")


class _Parser:
    """Precedence climbing over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0
        self.tokens: list[tuple[str, str, int]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                position += len(text[position:]) - len(text[position:].lstrip())
                hint = "; equality is '=='" if text[position] == "=" else ""
                self.refuse(f"{text[position]!r} is not part of the language{hint}", position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "the end", end))

    def refuse(self, reason: str, position: int | None = None) -> NoReturn:
        position = self.tokens[self.at][2] if position is None else position
        raise ValueError(f"expression {self.text!r}: {reason} (at character {position + 1})")

    def whole(self) -> Expr:
        if self.tokens[0][0] == "end":
            self.refuse("it is empty")
        expr = self.expression(_OR)
        if self.tokens[self.at][0] != "end":
            self.refuse(f"expected an operator, got {self.tokens[self.at][1]!r}")
        return expr

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def expect(self, sign: str) -> None:
        if self.tokens[self.at][1] != sign:
            self.refuse(f"expected {sign!r}, got {self.tokens[self.at][1]!r}")
        self.at += 1

    def expression(self, loosest: int) -> Expr:
        self.depth += 1
        if self.depth > DEEPEST_NESTING:
            self.refuse(f"nested deeper than {DEEPEST_NESTING}")
        left = self.prefix(loosest)
        while True:
            level, op = _BINARY.get(self.tokens[self.at][1], (0, ""))
            if level < loosest:
                break
            self.at += 1
            # Powers group to the right, all else to the left.
            left = Call(op, (left, self.expression(level if level == _POWER else level + 1)))
            if level == _COMPARE and self.tokens[self.at][1] in COMPARISONS:
                self.refuse("comparisons do not chain; write 'a < b and b < c'")
        self.depth -= 1
        return left

    def prefix(self, loosest: int) -> Expr:
        kind, word, _ = self.tokens[self.at]
        if word == "not":
            if loosest > _NOT:
                self.refuse("put 'not' and its operand in parentheses")
            self.at += 1
            return Call("not", (self.expression(_NOT),))
        if word in ("-", "+", "!"):
            self.at += 1
            if word == "-" and self.tokens[self.at][0] == "number" and self.tokens[self.at + 1][1] not in ("^", "**"):
                return Number(-float(self.take()))
            operand = self.expression(_POWER)
            return operand if word == "+" else Call("neg" if word == "-" else "not", (operand,))
        if word == "(":
            self.at += 1
            inner = self.expression(_OR)
            self.expect(")")
            return inner
        if kind == "number":
            return Number(float(self.take()))
        if kind == "name" and word not in ("and", "or"):
            if self.tokens[self.at + 1][1] == "(":
                return self.call()
            return Time() if self.take() == "time" else Symbol(word)
        self.refuse(f"expected a number, a name or '(', got {word!r}")

    def call(self) -> Expr:
        start = self.tokens[self.at][2]
        name = self.take()
        if name not in _FUNCTIONS:
            self.refuse(f"unknown function {name!r}; there are {', '.join(sorted(_FUNCTIONS))}", start)
        self.at += 1
        args = [] if self.tokens[self.at][1] == ")" else [self.expression(_OR)]
        while self.tokens[self.at][1] == ",":
            self.at += 1
            args.append(self.expression(_OR))
        self.expect(")")
        op = _FUNCTIONS[name]
        if name == "piecewise":
            if len(args) < 3 or len(args) % 2 == 0:
                self.refuse(
                    f"piecewise needs value, condition, ..., otherwise (an odd number), got {len(args)} arguments",
                    start,
                )
            return _piecewise(args)
        if op in ("min", "max") and args:
            first = args[0]
            for arg in args[1:]:
                first = Call(op, (first, arg))
            return first
        if len(args) != ARITY[op]:
            self.refuse(f"{name} needs {ARITY[op]} argument(s), got {len(args)}", start)
        return Call(op, tuple(args))


def _piecewise(args: Sequence[Expr]) -> Expr:
    """select(c1, v1, select(c2, v2, ... otherwise)) of v1, c1, v2, c2, ..., otherwise."""
    result = args[-1]
    for value, condition in reversed(list(zip(args[:-1:2], args[1::2], strict=True))):
        result = Call("select", (condition, value, result))
    return result


@lru_cache(maxsize=1 << 16)
def _parse_text(text: str) -> Expr:
    # Most rates are one name.
    if text.isidentifier() and text not in RESERVED:
        return Symbol(text)
    return _Parser(text).whole()


def parse(text: str | float | Expr) -> Expr:
    """The tree of an expression. Nothing is ever evaluated as Python.

    Operators, loosest first: ``or ||``; ``and &&``; ``not``; ``< <= > >= == !=`` (unchained); ``+ -``; ``* /``;
    unary ``- + !``; ``^ **`` (both the power, grouping to the right). Functions: ``exp log`` (natural, also ``ln``)
    ``sqrt abs floor ceil pow``, ``min`` and ``max`` of one or more arguments, ``if(condition, then, else)`` and
    ``piecewise(value, condition, value, condition, ..., otherwise)``. ``time`` is the simulated time; any other
    identifier is a name. Comparisons and logic give 1 or 0, and every number but 0 counts as true.

    Args:
        text: the text, or a number, or a tree, which comes back as it is.

    Raises:
        ValueError: the text is not such an expression; says where.
        TypeError: neither text, number nor tree.

    Example:
        >>> from pygen.ssa.expression import parse, to_text
        >>> to_text(parse("k / (1 + B**2)"))
        'k / (1 + B^2)'
    """
    if isinstance(text, str):
        return _parse_text(text)
    if isinstance(text, (Number, Symbol, Time, Call)):
        return text
    if isinstance(text, Real):
        if math.isnan(text):
            raise ValueError("expression: expected a number, got NaN")
        return Number(float(text))
    raise TypeError(f"expression: expected a text, a number or a tree, got {type(text).__name__}")


# ---- tree to text

_SIGN = {op: (level, sign) for sign, (level, op) in _BINARY.items() if sign not in ("||", "&&", "**")}


def _number_text(value: float) -> str:
    if math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    whole = value == int(value) and abs(value) < 1e16 and math.copysign(1.0, value) == (1.0 if value >= 0 else -1.0)
    return str(int(value)) if whole else repr(value)


def _text(node: Expr, args: list[tuple[str, int]]) -> tuple[str, int]:
    """Text of a node and how tightly it binds."""
    if isinstance(node, Number):
        return _number_text(node.value), _UNARY if math.copysign(1.0, node.value) < 0 else _ATOM
    if not isinstance(node, Call):
        return (node.name if isinstance(node, Symbol) else "time"), _ATOM

    def at_least(index: int, level: int) -> str:
        text, binds = args[index]
        return text if binds >= level else f"({text})"

    if node.op in _SIGN:
        level, sign = _SIGN[node.op]
        if node.op == "pow":
            return f"{at_least(0, _ATOM)}^{at_least(1, _UNARY)}", _POWER
        left = level + 1 if level == _COMPARE else level
        return f"{at_least(0, left)} {sign} {at_least(1, level + 1)}", level
    if node.op == "not":
        return f"not {at_least(0, _ADD)}", _NOT
    if node.op == "neg":
        # -3 alone is a number, not a negation.
        literal = isinstance(node.args[0], Number) and args[0][1] == _ATOM
        return f"-({args[0][0]})" if literal else f"-{at_least(0, _UNARY)}", _UNARY
    texts = [text for text, _ in args]
    if node.op == "select":
        return f"piecewise({texts[1]}, {texts[0]}, {texts[2]})", _ATOM
    return f"{node.op}({', '.join(texts)})", _ATOM


def to_text(expr: Expr) -> str:
    """The expression as text that parses back to the same tree."""
    return walk(expr, _text)[0]
