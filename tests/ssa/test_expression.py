"""The language of laws: against sympy, against Python's own arithmetic, and what it refuses."""

import math

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen.ssa.expression import (
    ARITY,
    Call,
    Number,
    Symbol,
    Time,
    evaluate,
    fold,
    parse,
    substitute,
    symbols,
    to_text,
    uses_time,
)

NAMES = ("a", "b", "c")
VALUES = {"a": 1.7, "b": 0.3, "c": 4.0}

# Text here, and the same thing as sympy's own constructors make it.
A, B, C = sympy.symbols(NAMES)
AGAINST_SYMPY = [
    ("a + b*c", A + B * C),
    ("a - b - c", (A - B) - C),
    ("a - (b - c)", A - (B - C)),
    ("a/b/c", (A / B) / C),
    ("a/b*c", (A / B) * C),
    ("a^b^c", A ** (B**C)),
    ("(a^b)^c", (A**B) ** C),
    ("a**2 + b^-3", A**2 + B**-3),
    ("-a^2", -(A**2)),
    ("(-a)^2 * 2", 2 * A**2),
    ("2^-b", 2**-B),
    ("c^20 + c^0.5", C**20 + sympy.sqrt(C)),
    ("pow(a, b)", A**B),
    ("exp(-a) * log(c) + ln(b)", sympy.exp(-A) * sympy.log(C) + sympy.log(B)),
    ("sqrt(a) / abs(-b)", sympy.sqrt(A) / B),
    ("floor(c * a) + ceil(b)", sympy.floor(C * A) + sympy.ceiling(B)),
    ("min(c, a, b) + max(a, b, c)", sympy.Min(A, B, C) + sympy.Max(A, B, C)),
    ("k1 / (1 + (b/a)^4)", 1 / (1 + (B / A) ** 4)),
    ("piecewise(a, a > c, b, b < c, c)", sympy.Piecewise((A, A > C), (B, B < C), (C, True))),
    ("if(a >= b, a^3, 0)", A**3),
    ("2.5e-1*c + .5 + 1.", C / 4 + sympy.Rational(3, 2)),
]


@pytest.mark.parametrize(("text", "truth"), AGAINST_SYMPY, ids=[text for text, _ in AGAINST_SYMPY])
def test_values_agree_with_sympy(text, truth):
    exact = truth.subs({A: sympy.Rational(17, 10), B: sympy.Rational(3, 10), C: 4}).evalf(30)
    assert evaluate(parse(text), {**VALUES, "k1": 1}) == pytest.approx(float(exact), rel=1e-12)


_POSITIVE = {"add": sympy.Add, "mul": sympy.Mul, "div": lambda x, y: x / y, "min": sympy.Min, "max": sympy.Max}


@st.composite
def well_conditioned(draw, depth=4):
    """A tree of positive values without cancellation, as ours and as sympy's with rational leaves."""
    if depth == 0 or draw(st.booleans()):
        name = draw(st.sampled_from(NAMES))
        return Symbol(name), sympy.Rational(str(VALUES[name]))
    kind = draw(st.sampled_from([*_POSITIVE, "sqrt", "square"]))
    left, left_truth = draw(well_conditioned(depth=depth - 1))
    if kind == "sqrt":
        return Call("sqrt", (left,)), sympy.sqrt(left_truth).evalf(60)
    if kind == "square":
        return Call("pow", (left, Number(3.0))), left_truth**3
    right, right_truth = draw(well_conditioned(depth=depth - 1))
    return Call(kind, (left, right)), _POSITIVE[kind](left_truth, right_truth)


@given(well_conditioned())
@settings(max_examples=80, deadline=None)
def test_values_of_random_trees_agree_with_sympy(pair):
    tree, truth = pair
    assert evaluate(tree, VALUES) == pytest.approx(float(truth), rel=1e-12)


@st.composite
def arithmetic_text(draw, depth=5):
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from([*NAMES, "2.5", "3", "0.1"]))
    form = draw(st.sampled_from(["{} + {}", "{} - {}", "{}*{}", "{}/{}", "({})", "-{}", "{} - -{}", "({} + {})*{}"]))
    return form.format(*(draw(arithmetic_text(depth=depth - 1)) for _ in range(form.count("{}"))))


@given(arithmetic_text())
@settings(max_examples=100, deadline=None)
def test_operators_group_and_round_as_in_python(text):
    try:
        truth = eval(text, {}, VALUES)  # noqa: S307 - a text made above, of three names, three numbers and + - * /
    except ZeroDivisionError:
        return
    assert evaluate(parse(text), VALUES) == truth


@st.composite
def logic_text(draw, depth=4):
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return f"a {draw(st.sampled_from(['<', '<=', '>', '>=', '==', '!=']))} {draw(st.sampled_from(['b', '1.7']))}"
    form = draw(st.sampled_from(["{} and {}", "{} or {}", "not {}", "({})"]))
    return form.format(*(draw(logic_text(depth=depth - 1)) for _ in range(form.count("{}"))))


@given(logic_text())
@settings(max_examples=100, deadline=None)
def test_logic_groups_as_in_python(text):
    truth = float(eval(text, {}, VALUES))  # noqa: S307 - a text made above
    assert evaluate(parse(text), VALUES) == truth
    assert evaluate(parse(text.replace("and", "&&").replace("or", "||")), VALUES) == truth


def test_exclamation_mark_binds_like_a_sign_and_not_binds_like_a_word():
    assert parse("!a == b") == Call("eq", (Call("not", (Symbol("a"),)), Symbol("b")))
    assert parse("not a == b") == Call("not", (Call("eq", (Symbol("a"), Symbol("b"))),))


numbers = st.floats(allow_nan=False, width=64).map(Number)
trees = st.recursive(
    st.one_of(numbers, st.sampled_from([Symbol("a"), Symbol("lambda"), Symbol("k_1"), Time()])),
    lambda inner: st.sampled_from(sorted(ARITY)).flatmap(
        lambda op: st.tuples(*[inner] * ARITY[op]).map(lambda args: Call(op, args))
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_text_of_a_tree_parses_back_to_the_tree(tree):
    again = parse(to_text(tree))
    assert again == tree
    # == does not tell 0.0 from -0.0, the text does
    assert to_text(again) == to_text(tree)


def test_text_of_a_negative_zero_keeps_its_sign():
    assert math.copysign(1.0, parse(to_text(Number(-0.0))).value) == -1.0


MALFORMED = {
    "": "empty",
    "   ": "empty",
    "a b": "expected an operator, got 'b'",
    "2x": "expected an operator, got 'x'",
    "a +": "got 'the end'",
    "* a": "expected a number, a name or",
    "(a": r"expected '\)'",
    "a)": "expected an operator",
    "a < b < c": "do not chain",
    "a == b == c": "do not chain",
    "a = 3": "equality is '=='",
    "a := 3": "':' is not part",
    "__import__('os')": r"\"'\" is not part",
    "__import__(os)": "unknown function '__import__'",
    "foo(a)": "unknown function 'foo'",
    "a.real": r"'\.' is not part",
    "a.b()": r"'\.' is not part",
    "[x for x in a]": r"'\[' is not part",
    "(x for x in a)": r"expected '\)'",
    "lambda: 3": "':' is not part",
    "'text'": "is not part",
    '"text"': "is not part",
    "a[0]": r"'\[' is not part",
    "{a}": r"'\{' is not part",
    "a if b else c": "expected an operator",
    "a % b": "'%' is not part",
    "a // b": "expected a number, a name",
    "a & b": "'&' is not part",
    "~a": "'~' is not part",
    "1_000": "expected an operator",
    "0x10": "expected an operator",
    "1.5.2": "expected an operator",
    "a; b": "';' is not part",
    "a\\b": "is not part",
    "a + not b": "put 'not'",
    "exp()": "exp needs 1",
    "exp(a, b)": "exp needs 1",
    "pow(a)": "pow needs 2",
    "min()": "min needs 2",
    "exp(a,)": "expected a number",
    "piecewise(a, b > 1)": "odd number",
    "piecewise(a)": "odd number",
    "and": "expected a number",
    "()": "expected a number",
    "(" * 200 + "a" + ")" * 200: "nested deeper",
    "-" * 2000 + "a": "nested deeper",
}


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:20])
def test_what_is_not_an_expression_is_refused_with_a_sentence_and_a_place(text):
    with pytest.raises(ValueError, match=MALFORMED[text]) as refusal:
        parse(text)
    assert "at character" in str(refusal.value)


def test_the_place_in_a_refusal_is_that_of_the_first_wrong_character():
    with pytest.raises(ValueError, match=r"character 7\)"):
        parse("a + b $ c")


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_parses_or_is_refused_with_a_sentence(text):
    try:
        tree = parse(text)
    except ValueError as refusal:
        assert "expression" in str(refusal)
    else:
        assert parse(to_text(tree)) == tree


def test_other_types_and_nan_are_refused():
    with pytest.raises(TypeError, match="got list"):
        parse(["a"])
    with pytest.raises(ValueError, match="NaN"):
        parse(math.nan)


def test_words_that_python_reserves_are_names_here():
    for word in ("lambda", "in", "is", "None", "class", "exp", "µ"):
        assert parse(word) == Symbol(word)
        assert symbols(parse(f"2 * {word} + 1")) == {word}


def test_sums_of_ten_thousand_terms_do_not_recurse():
    text = " + ".join(["a"] * 10_000)
    tree = parse(text)
    assert evaluate(tree, {"a": 1.0}) == 10_000
    assert to_text(tree) == text
    assert symbols(fold(substitute(tree, {"a": Symbol("b")}))) == {"b"}


def test_shared_subtrees_are_visited_once():
    tree = Symbol("a")
    for _ in range(200):
        tree = Call("add", (tree, tree))
    assert evaluate(tree, {"a": 1.0}) == 2.0**200
    assert symbols(fold(substitute(tree, {"a": Symbol("b")}))) == {"b"}


@given(trees)
@settings(max_examples=100, deadline=None)
def test_folding_keeps_every_bit(tree):
    folded = fold(tree)
    before, after = (evaluate(one, {"a": 2.5, "lambda": -3.0, "k_1": 7.0}, time=1.5) for one in (tree, folded))
    assert np.float64(before).tobytes() == np.float64(after).tobytes() or (math.isnan(before) and math.isnan(after))
    assert to_text(fold(folded)) == to_text(folded)


def test_folding_computes_what_ieee_defines_and_leaves_the_rest():
    assert fold(parse("2*3 + sqrt(16)/floor(2.5) - 2^3")) == Number(0.0)
    assert fold(parse("k * (1 + 1)")) == parse("k * 2")
    assert fold(parse("piecewise(a, 1 < 2, b)")) == Symbol("a")
    for text in ("exp(1)", "log(2)", "2^0.5", "1/0", "sqrt(-1)"):
        assert isinstance(fold(parse(text)), Call)


def test_substitution_replaces_all_names_at_once():
    assert substitute(parse("a + b * time"), {"a": Symbol("b"), "b": parse("a + 1")}) == parse("b + (a + 1) * time")


def test_symbols_and_time():
    assert symbols(parse("k * A^2 / (time + B)")) == {"k", "A", "B"}
    assert uses_time(parse("k * (A + min(time, 3))"))
    assert not uses_time(parse("k * times"))


def test_evaluation_broadcasts_arrays():
    values = evaluate(parse("piecewise(k * A, A > 1, time)"), {"k": np.array([[1.0], [2.0]]), "A": [0, 1, 2]}, time=9.0)
    np.testing.assert_array_equal(values, [[9, 9, 2], [9, 9, 4]])


def test_evaluation_follows_ieee_where_python_would_raise():
    assert evaluate(parse("1/A"), {"A": 0}) == math.inf
    assert math.isnan(evaluate(parse("log(0 - A)"), {"A": 1}))
    assert evaluate(parse("A^0"), {"A": math.nan}) == 1.0
    assert evaluate(parse("A^-2"), {"A": 0}) == math.inf


def test_powers_are_products_from_the_left():
    x = 1.1
    assert evaluate(parse("x^3"), {"x": x}) == x * x * x
    assert evaluate(parse("x^-3"), {"x": x}) == 1.0 / (x * x * x)


def test_a_name_without_a_value_is_refused_by_name():
    with pytest.raises(ValueError, match="a value for 'B'"):
        evaluate(parse("A + B"), {"A": 1})
    with pytest.raises(ValueError, match="a value for 'time'"):
        evaluate(parse("A + time"), {"A": 1})


def test_a_call_checks_its_op_and_its_number_of_arguments():
    with pytest.raises(ValueError, match="expected 2 arguments"):
        Call("add", (Number(1.0),))
    with pytest.raises(ValueError, match="expected an op of"):
        Call("sin", (Number(1.0),))
