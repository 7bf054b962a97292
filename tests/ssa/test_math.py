"""The engine's elementary functions against mpmath's 50 digits, and their bits on every CPU level."""

import math

import mpmath
import numpy as np
import pytest
import torch

from harness import ordinary_levels
from pygen import backends
from pygen.ssa import engine
from pygen.ssa.program import OPS

pytestmark = pytest.mark.skipif(not engine.is_compiled(), reason="built without the compiled engine")

INF, NAN = math.inf, math.nan
TINY, SMALLEST_NORMAL, HUGE = 5e-324, 2.0**-1022, math.nextafter(INF, 0)
MP = mpmath.mp.clone()
MP.dps = 50


def engine_op(name, *args):
    """The op of a law, elementwise, with the engine's own bits: float64 arrays."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)) for x in args]
    return torch.ops.pygen.ssa_math(OPS.index(name), tensors[0], tensors[-1]).numpy()


def errors_in_ulps(got, truth):
    """|got - truth| in units in the last place of the float64 nearest to the truth; truth: mpmath numbers."""
    errors = []
    for value, exact in zip(got.tolist(), truth, strict=True):
        nearest = float(exact)
        if math.isinf(nearest):
            errors.append(0.0 if value == nearest else INF)
        else:
            errors.append(float(abs(MP.mpf(value) - exact) / MP.mpf(math.ulp(nearest))))
    return np.array(errors)


def spread(rng, low, high, n):
    """n numbers, log-uniform in size."""
    return np.exp(rng.uniform(math.log(low), math.log(high), n))


# ---- accuracy --------------------------------------------------------------------------------------------------------


def test_log_is_within_one_ulp():
    rng = np.random.default_rng(1)
    x = [
        *(spread(rng, 1e-307, 1e308, 2000), 1 + rng.uniform(-0.3, 0.5, 2000), 1 + spread(rng, 2e-16, 0.1, 500)),
        *(1 - spread(rng, 2e-16, 0.1, 500), rng.integers(1, 1 << 53, 2000) * 2.0**-53, np.arange(1.0, 500.0)),
        *(spread(rng, 1e-3, 1e15, 300) * TINY, [TINY, SMALLEST_NORMAL, HUGE, 2.0**-53, 1 - 2.0**-53]),
        # where the exponent is split off: sqrt(1/2) and sqrt(2)
        *(math.sqrt(0.5) * (1 + np.arange(-50, 50) * 2.0**-52), math.sqrt(2) * (1 + np.arange(-50, 50) * 2.0**-52)),
    ]
    x = np.concatenate(x)
    assert errors_in_ulps(engine_op("log", x), [MP.log(MP.mpf(v)) for v in x.tolist()]).max() < 1


def test_exp_is_within_one_ulp():
    rng = np.random.default_rng(2)
    halfway = (np.arange(-700, 700) + 0.5) * math.log(2)  # where the reduced argument is largest
    x = [rng.uniform(-708, 709.7, 3000), rng.uniform(-1, 1, 2000), spread(rng, 1e-20, 1, 500), halfway]
    x = np.concatenate([*x, -spread(rng, 1e-20, 1, 500), np.arange(-700.0, 709.0)])
    assert errors_in_ulps(engine_op("exp", x), [MP.exp(MP.mpf(v)) for v in x.tolist()]).max() < 1


def test_exp_is_within_one_ulp_where_the_result_is_subnormal():
    x = np.random.default_rng(3).uniform(-745.2, -708.3, 2000)
    assert errors_in_ulps(engine_op("exp", x), [MP.exp(MP.mpf(v)) for v in x.tolist()]).max() < 1.01


def pow_arguments(rng, least, most, n):
    """Bases and exponents with least < |y log x| < most."""
    x = np.concatenate([spread(rng, 1e-300, 1e300, n // 2), 1 + rng.uniform(-0.5, 1, n - n // 2)])
    y = rng.uniform(least, most, n) * rng.choice([-1, 1], n) / np.log(x)
    return x, y


def pow_errors(x, y):
    exact = [MP.power(MP.mpf(a), MP.mpf(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    return errors_in_ulps(engine_op("pow", x, y), exact)


def test_pow_is_within_one_ulp_where_the_result_is_moderate():
    assert pow_errors(*pow_arguments(np.random.default_rng(4), 0, 8, 6000)).max() < 1
    # what stands in laws: Hill functions, powers of counts
    counts, hill = (grid.ravel() for grid in np.meshgrid(np.arange(1.0, 40.0), [0.5, 1.5, 2.5, 1 / 3, -0.7, 2.2]))
    assert pow_errors(counts, hill).max() < 1


def test_the_error_of_pow_grows_with_the_exponent_of_its_result_and_slowly():
    """The logarithm is known to about 2^-57 of its size: |y log x| / 16 units in the last place of the result."""
    x, y = pow_arguments(np.random.default_rng(5), 8, 708, 6000)
    assert (pow_errors(x, y) < 1 + np.abs(y * np.log(x)) / 16).all()


def test_pow_of_subnormal_bases_is_as_exact():
    x = spread(np.random.default_rng(6), 1, 1e15, 500) * TINY
    assert pow_errors(x, np.random.default_rng(7).uniform(-0.01, 0.01, 500)).max() < 1


# ---- special values --------------------------------------------------------------------------------------------------


def same(a, b):
    """Equal to the bit; any NaN is like any other."""
    return np.array_equal(*(np.where(np.isnan(x), NAN, x).view(np.int64) for x in (a, b)))


def assert_values(name, table):
    columns = list(zip(*table, strict=True))
    got = engine_op(name, *columns[:-1])
    wrong = [
        (row, value)
        for row, value in zip(table, got.tolist(), strict=True)
        if not (value == row[-1] or (value != value and row[-1] != row[-1]))
    ]
    assert not wrong


def test_log_and_exp_of_special_values_are_those_of_c99():
    log = [(0.0, -INF), (-0.0, -INF), (1.0, 0.0), (INF, INF), (-INF, NAN), (-1.0, NAN), (-TINY, NAN), (NAN, NAN)]
    assert_values("log", log)
    assert not np.signbit(engine_op("log", [1.0])).any()
    exp = [(0.0, 1.0), (-0.0, 1.0), (TINY, 1.0), (-TINY, 1.0), (INF, INF), (-INF, 0.0), (NAN, NAN)]
    assert_values("exp", [*exp, (710.0, INF), (HUGE, INF), (-746.0, 0.0), (-HUGE, 0.0), (-745.0, TINY)])


def c99_pow(x, y):
    """C99's pow, but that a zero base is +0 whatever its sign."""
    x = 0.0 if x == 0 else x
    if x == 0 and y < 0:
        return INF
    if x < 0 and math.isfinite(x) and math.isfinite(y) and y != int(y):
        return NAN
    try:
        return math.pow(x, y)
    except OverflowError:
        return -INF if x < 0 and y % 2 == 1 else INF


def test_pow_of_special_values_is_c99s_but_for_the_sign_of_zero_bases():
    bases = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, INF, -INF, NAN, TINY, -TINY, HUGE, -HUGE, 1 + 2**-52]
    exponents = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, -0.5, 1.5, -1.5, INF, -INF, NAN, TINY, HUGE, -HUGE]
    exponents += [2.0**53 - 1, 2.0**53, -(2.0**53 - 1), 2.0**52 + 1, 1e300]
    table = [(x, y, c99_pow(x, y)) for x in bases for y in exponents]
    exact = [row for row in table if row[-1] != row[-1] or row[-1] in (0.0, 1.0, -1.0, INF, -INF)]
    assert len(exact) > 250
    assert_values("pow", exact)
    assert_values("pow", [(1.0, NAN, 1.0), (NAN, 0.0, 1.0), (-8.0, 1 / 3, NAN), (-2.0, 3.0, -8.0), (-2.0, 4.0, 16.0)])


def test_floor_ceil_sqrt_and_abs_are_those_of_ieee():
    rng = np.random.default_rng(9)
    edges = np.array([0.0, 0.5, 1.0, 1.5, 2.5, 2.0**51 + 0.5, 2.0**52 - 0.5, 2.0**52, 2.0**53, TINY, HUGE, INF, NAN])
    near = np.arange(20)[:, None] + np.array([-(2.0**-50), 0, 2.0**-50])
    x = np.concatenate([edges, near.ravel(), spread(rng, 1e-5, 1e17, 2000)])
    x = np.concatenate([x, -x])
    for name, truth in {"floor": np.floor, "ceil": np.ceil, "abs": np.abs}.items():
        assert same(engine_op(name, x), truth(x)), name
    with np.errstate(invalid="ignore"):
        assert same(engine_op("sqrt", x), np.sqrt(x))


def test_arithmetic_comparisons_and_choices_follow_the_rules_of_the_laws():
    values = [0.0, -0.0, 1.0, -2.5, TINY, HUGE, INF, -INF, NAN]
    a, b = (grid.ravel() for grid in np.meshgrid(values, values))
    with np.errstate(all="ignore"):
        truth = {
            **{"add": a + b, "sub": a - b, "mul": a * b, "div": a / b, "neg": -a, "copy": a},
            **{"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b},
            **{"and": (a != 0) & (b != 0), "or": (a != 0) | (b != 0), "not": a == 0},
            **{"min": np.where(a < b, a, b), "max": np.where(a > b, a, b)},
        }
    for name, expected in truth.items():
        assert np.array_equal(engine_op(name, a, b), expected.astype(np.float64), equal_nan=True), name


# ---- the same bits everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log", "exp", "pow", "floor", "ceil", "sqrt", "abs"])
def test_bits_are_equal_on_every_cpu_level(name):
    rng = np.random.default_rng(10)
    special = np.array([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 3.0, -3.0, INF, -INF, NAN, TINY, -TINY, HUGE, -HUGE])
    words = rng.integers(0, 1 << 64, 4000, dtype=np.uint64).view(np.float64)
    x = np.concatenate([np.repeat(special, len(special)), words, rng.uniform(-800, 800, 4001)])
    y = np.concatenate([np.tile(special, len(special)), words[::-1], rng.uniform(-30, 30, 4001)])
    results = []
    for level in ordinary_levels():
        with backends.cpu_capability(level):
            results.append(engine_op(name, x, y))
    assert all(same(result, results[0]) for result in results[1:])
    assert np.isfinite(results[0]).sum() > 1000


def test_a_value_does_not_depend_on_its_place_in_the_array():
    x = np.random.default_rng(11).uniform(0.1, 9, 23)
    together = engine_op("pow", x, x)
    assert same(together, np.concatenate([engine_op("pow", x[i : i + 1], x[i : i + 1]) for i in range(len(x))]))
