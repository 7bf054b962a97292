"""MathML to expressions (through libsbml's trees), and expressions to MathML text, for sbml.py and sbml_write.py."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import reduce
from typing import Any

from pygen.ssa.expression import COMPARISONS, Call, Expr, Number, Symbol, Time, walk

# SBML defines the value of its csymbol avogadro, older than the one of today's SI.
AVOGADRO = 6.02214179e23
MATHML = "http://www.w3.org/1998/Math/MathML"
TIME_URL = "http://www.sbml.org/sbml/symbols/time"

_CONSTANTS = {
    "AST_CONSTANT_E": 2.718281828459045,
    "AST_CONSTANT_PI": 3.141592653589793,
    "AST_CONSTANT_TRUE": 1.0,
    "AST_CONSTANT_FALSE": 0.0,
    "AST_NAME_AVOGADRO": AVOGADRO,
}
_PLAIN = {
    "AST_DIVIDE": "div",
    "AST_POWER": "pow",
    "AST_FUNCTION_POWER": "pow",
    "AST_FUNCTION_EXP": "exp",
    "AST_FUNCTION_LN": "log",
    "AST_FUNCTION_ABS": "abs",
    "AST_FUNCTION_FLOOR": "floor",
    "AST_FUNCTION_CEILING": "ceil",
    "AST_LOGICAL_NOT": "not",
}
# The op, and its value without arguments (None: there must be some).
_N_ARY: dict[str, tuple[str, float | None]] = {
    "AST_PLUS": ("add", 0.0),
    "AST_TIMES": ("mul", 1.0),
    "AST_LOGICAL_AND": ("and", 1.0),
    "AST_LOGICAL_OR": ("or", 0.0),
    "AST_FUNCTION_MIN": ("min", None),
    "AST_FUNCTION_MAX": ("max", None),
}
_RELATIONS = {
    "AST_RELATIONAL_LT": "lt",
    "AST_RELATIONAL_LEQ": "le",
    "AST_RELATIONAL_GT": "gt",
    "AST_RELATIONAL_GEQ": "ge",
    "AST_RELATIONAL_EQ": "eq",
    "AST_RELATIONAL_NEQ": "ne",
}
Resolve = Callable[[str], Expr]


class MathReader:
    """Reads libsbml's `ASTNode`s; function definitions are inlined.

    Args:
        libsbml: the module.
        functions: the `lambda` node of every function definition, by id.
    """

    def __init__(self, libsbml: Any, functions: Mapping[str, Any]) -> None:
        self._functions = functions
        self._calls: list[str] = []
        names = [name for name in dir(libsbml) if name.startswith("AST_")]
        self._kinds = {getattr(libsbml, name): name for name in names}

    def read(self, node: Any, resolve: Resolve) -> Expr:
        """The expression of a node; `resolve` has the meaning of an identifier."""
        kind = self._kinds.get(node.getType(), "AST_UNKNOWN")
        number = self._number(node, kind)
        if number is not None:
            return Number(number)
        if kind == "AST_NAME_TIME":
            return Time()
        if kind == "AST_NAME":
            return resolve(node.getName())
        children = [node.getChild(i) for i in range(node.getNumChildren())]
        if kind == "AST_FUNCTION":
            return self._inline(node.getName(), children, resolve)
        return self._operator(kind, [self.read(child, resolve) for child in children])

    def _number(self, node: Any, kind: str) -> float | None:
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind == "AST_INTEGER":
            return float(node.getInteger())
        if kind == "AST_RATIONAL":
            return node.getNumerator() / node.getDenominator()
        if kind == "AST_REAL_E":
            # libsbml's own value is mantissa * 10^exponent, rounded twice: not the float that the text names.
            return float(f"{node.getMantissa()!r}e{node.getExponent()}")
        if kind != "AST_REAL":
            return None
        if node.isNaN():
            raise ValueError("notanumber is not supported")
        return float(node.getReal())

    def _inline(self, name: str, children: list[Any], resolve: Resolve) -> Expr:
        definition = self._functions.get(name)
        if definition is None:
            raise ValueError(f"the function {name!r} is not supported")
        if name in self._calls:
            raise ValueError(f"the function {name!r} calls itself")
        size = definition.getNumChildren() - 1
        if len(children) != size:
            raise ValueError(f"expected {size} arguments of function {name!r}, got {len(children)}")
        values = {definition.getChild(i).getName(): self.read(child, resolve) for i, child in enumerate(children)}

        def argument(symbol: str) -> Expr:
            if symbol not in values:
                raise ValueError(f"{symbol!r} in function {name!r} is none of its arguments")
            return values[symbol]

        self._calls.append(name)
        try:
            return self.read(definition.getChild(size), argument)
        finally:
            self._calls.pop()

    def _operator(self, kind: str, args: list[Expr]) -> Expr:
        if kind in _PLAIN:
            return Call(_PLAIN[kind], tuple(args))
        if kind in _N_ARY:
            op, empty = _N_ARY[kind]
            if not args and empty is not None:
                return Number(empty)
            return reduce(lambda left, right: Call(op, (left, right)), args)
        if kind in _RELATIONS:
            pairs = [Call(_RELATIONS[kind], pair) for pair in zip(args[:-1], args[1:], strict=True)]
            return reduce(lambda left, right: Call("and", (left, right)), pairs)
        if kind == "AST_MINUS":
            return Call("neg" if len(args) == 1 else "sub", tuple(args))
        if kind == "AST_FUNCTION_ROOT":
            if len(args) == 1 or args[0] == Number(2.0):
                return Call("sqrt", (args[-1],))
            return Call("pow", (args[1], Call("div", (Number(1.0), args[0]))))
        if kind == "AST_FUNCTION_LOG":
            base = args[0] if len(args) == 2 else Number(10.0)
            return Call("div", (Call("log", (args[-1],)), Call("log", (base,))))
        if kind == "AST_FUNCTION_PIECEWISE":
            if len(args) % 2 == 0:
                raise ValueError("piecewise without otherwise is not supported: it may have no value")
            branches = list(zip(args[:-1:2], args[1::2], strict=True))
            return reduce(lambda rest, branch: Call("select", (branch[1], branch[0], rest)), branches[::-1], args[-1])
        if kind == "AST_LOGICAL_XOR":
            truths = [Call("ne", (arg, Number(0.0))) for arg in args]
            return reduce(lambda left, right: Call("ne", (left, right)), truths) if truths else Number(0.0)
        if kind == "AST_LOGICAL_IMPLIES":
            return Call("or", (Call("not", (args[0],)), args[1]))
        name = kind.removeprefix("AST_").removeprefix("FUNCTION_").lower()
        raise ValueError(f"the function {name!r} is not supported")


# ---- and back

_ELEMENTS = {
    **{"add": "plus", "sub": "minus", "neg": "minus", "mul": "times", "div": "divide", "pow": "power", "log": "ln"},
    **{"exp": "exp", "sqrt": "root", "abs": "abs", "floor": "floor", "ceil": "ceiling"},
    **{
        "lt": "lt",
        "le": "leq",
        "gt": "gt",
        "ge": "geq",
        "eq": "eq",
        "ne": "neq",
        "and": "and",
        "or": "or",
        "not": "not",
    },
}
_LOGIC = ("and", "or", "not")
_TRUTHS = {*_LOGIC, *COMPARISONS.values()}


def _number_element(value: float) -> str:
    if abs(value) == float("inf"):
        return "<infinity/>" if value > 0 else "<apply><minus/><infinity/></apply>"
    if value.is_integer() and abs(value) < 2**31:
        return f'<cn type="integer"> {int(value)} </cn>'
    # Plain decimals read back to the same bits everywhere; readers differ in how they round mantissa and exponent.
    if 1e-20 < abs(value) < 1e20:
        return f"<cn> {Decimal(repr(value)):f} </cn>"
    mantissa, exponent = f"{Decimal(repr(value)):e}".split("e")
    return f'<cn type="e-notation"> {mantissa} <sep/> {int(exponent)} </cn>'


def _piecewise(then: str, condition: str, otherwise: str) -> str:
    return f"<piecewise><piece>{then}{condition}</piece><otherwise>{otherwise}</otherwise></piecewise>"


def _as_truth(text: str, is_truth: bool) -> str:
    return text if is_truth else f"<apply><neq/>{text}{_number_element(0.0)}</apply>"


def _as_number(text: str, is_truth: bool) -> str:
    return _piecewise(_number_element(1.0), text, _number_element(0.0)) if is_truth else text


def _element(node: Expr, args: list[tuple[str, bool]]) -> tuple[str, bool]:
    """Text of a node, and whether MathML counts it as a truth value: unlike here, those are not numbers there."""
    if isinstance(node, Number):
        return _number_element(node.value), False
    if isinstance(node, Time):
        return f'<csymbol encoding="text" definitionURL="{TIME_URL}"> t </csymbol>', False
    if isinstance(node, Symbol):
        return f"<ci> {node.name} </ci>", False
    if node.op == "select":
        return _piecewise(_as_number(*args[1]), _as_truth(*args[0]), _as_number(*args[2])), False
    if node.op in ("min", "max"):
        left, right = (_as_number(*arg) for arg in args)
        relation = "lt" if node.op == "min" else "gt"
        return _piecewise(left, f"<apply><{relation}/>{left}{right}</apply>", right), False
    texts = [_as_truth(*arg) if node.op in _LOGIC else _as_number(*arg) for arg in args]
    return f"<apply><{_ELEMENTS[node.op]}/>{''.join(texts)}</apply>", node.op in _TRUTHS


def to_mathml(expr: Expr, truth: bool = False) -> str:
    """A `<math>` element of SBML's subset of MathML; with `truth` one that is a condition."""
    text = (_as_truth if truth else _as_number)(*walk(expr, _element))
    return f'<math xmlns="{MATHML}">{text}</math>'
