"""Time in laws and triggers: comparisons with `time` become steps at instants known before a trajectory starts.

Between two such instants the process is memoryless with constant laws, so stopping at one and drawing afresh is exact.
network.py brings every law, trigger and stopping condition into this form.
"""

from collections.abc import Collection

from pygen.ssa.expression import COMPARISONS, Call, Expr, Number, Time, fold, symbols, to_text, uses_time, walk

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
# A weighted sum: the coefficient of time, and the rest (None where there is none).
_Linear = tuple[float, Expr | None]


def in_steps(expr: Expr, varying: Collection[str], where: str) -> Expr:
    r"""Rewrite every comparison that is linear in time as ``time >= b`` or ``time < b``.

    .. math:: \alpha\, \mathrm{time} + \beta \ge 0 \quad\Longleftrightarrow\quad \mathrm{time} \ge -\beta / \alpha
        \qquad (\alpha > 0)

    ``>`` becomes ``>=`` and ``<=`` becomes ``<``: laws are right-continuous, with the new value at the
    instant itself.

    Args:
        expr: the expression, with rules inlined.
        varying: names whose values change during a trajectory; b must not depend on them.
        where: what the expression is, for the message of an error.

    Raises:
        ValueError: time stands outside a comparison, in one that is not linear in it with a number as its coefficient,
            in == or !=, or is compared with something that changes during a trajectory.

    Example:
        >>> from pygen.ssa.expression import parse, to_text
        >>> to_text(in_steps(parse("2 * time > T and A < 3"), ["A"], "trigger"))
        'time >= T / 2 and A < 3'
    """
    if not uses_time(expr):
        return expr

    def visit(node: Expr, args: list[tuple[Expr, bool]]) -> tuple[Expr, bool]:
        """The node in steps, and whether time stands in it outside all comparisons."""
        if not isinstance(node, Call):
            return node, isinstance(node, Time)
        new = Call(node.op, tuple(arg for arg, _ in args))
        bare = any(flag for _, flag in args)
        return (_step(new, varying, where), False) if bare and node.op in COMPARISONS.values() else (new, bare)

    result, bare = walk(expr, visit)
    if bare:
        raise ValueError(
            f"{where} depends on time other than through comparisons such as 'time >= 5': got {to_text(expr)!r}"
        )
    return result


def _step(node: Call, varying: Collection[str], where: str) -> Expr:
    text = to_text(node)
    if node.op not in _MIRRORED:
        raise ValueError(f"{where}: time may be compared by <, <=, > and >= only, got {text!r}")
    op, (left, right) = node.op, (_linear(arg, where, text) for arg in node.args)
    if left[0] < right[0]:
        op, left, right = _MIRRORED[op], right, left
    slope = left[0] - right[0]
    if not slope > 0:
        raise ValueError(f"{where}: time cancels out of {text!r}")
    instant = _difference(right[1], left[1]) or Number(0.0)
    if slope != 1:
        instant = Call("div", (instant, Number(slope)))
    changing = symbols(instant) & set(varying)
    if changing or uses_time(instant):
        what = repr(min(changing)) if changing else "another comparison with time"
        raise ValueError(
            f"{where}: time must be compared with what stays the same during a trajectory, got {what} in {text!r}"
        )
    return Call("ge" if op in ("gt", "ge") else "lt", (Time(), fold(instant)))


def _difference(first: Expr | None, second: Expr | None) -> Expr | None:
    if second is None:
        return first
    return Call("neg", (second,)) if first is None else Call("sub", (first, second))


def _linear(expr: Expr, where: str, text: str) -> _Linear:
    """One side of a comparison as coefficient * time + rest."""

    def visit(node: Expr, args: list[_Linear]) -> _Linear:
        if isinstance(node, Time):
            return 1.0, None
        # A comparison with time inside is a step already: it counts as a rest, which _step then refuses.
        if not isinstance(node, Call) or node.op in COMPARISONS.values() or not any(slope for slope, _ in args):
            return 0.0, node
        slope, rest = args[0]
        if node.op == "neg":
            return -slope, _difference(None, rest)
        other, other_rest = args[-1]
        if node.op == "sub":
            return slope - other, _difference(rest, other_rest)
        if node.op == "add":
            both = rest is not None and other_rest is not None
            return slope + other, Call("add", (rest, other_rest)) if both else rest or other_rest  # type: ignore[arg-type]
        if node.op == "mul" and isinstance(rest, Number) and not slope:
            slope, rest, other_rest = other, other_rest, rest
            other = 0.0
        if node.op in ("mul", "div") and isinstance(other_rest, Number) and other_rest.value and not other:
            factor = other_rest.value
            scaled = None if rest is None else Call(node.op, (rest, other_rest))
            return (slope * factor if node.op == "mul" else slope / factor), scaled
        raise ValueError(
            f"{where}: time must enter a comparison linearly, with a number as its coefficient, got {text!r}"
        )

    return walk(expr, visit)


def instants(expr: Expr) -> list[Expr]:
    """The instants b of an expression in steps, in the order of the text."""
    found: list[Expr] = []

    def visit(node: Expr, _: list[None]) -> None:
        if isinstance(node, Call) and node.op in ("ge", "lt") and isinstance(node.args[0], Time):
            found.append(node.args[1])

    walk(expr, visit)
    return found
