"""Elementary functions for the kernels: accurate to one or two units in the last place, in float32 and float64.

Triton's own tl.exp and tl.log are the GPU's approximations in float32 (exp's relative error grows with |x|) and call
libdevice in float64, which the interpreter does not have. These are plain arithmetic: the same source is accurate in
both types, on NVIDIA, AMD and under the interpreter. With FAST they are the approximations, for 16-bit data.
Polynomials are long enough on their reduced range that what is left is below rounding; but for atan they are Taylor's.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: n * LN2_HIGH is exact for every exponent n, so that x - n ln 2 keeps all its bits.
LN2_HIGH_32 = tl.constexpr(0.693359375)
LN2_LOW_32 = tl.constexpr(-2.12194440054690583e-4)
LN2_HIGH_64 = tl.constexpr(6.93147180369123816490e-01)
LN2_LOW_64 = tl.constexpr(1.90821492927058770002e-10)
QUARTER_PI = tl.constexpr(math.pi / 4)
TAN_PI_8 = tl.constexpr(math.tan(math.pi / 8))
TAN_3_PI_8 = tl.constexpr(math.tan(3 * math.pi / 8))

# Below LOWEST exp is zero, above HIGHEST infinite.
EXP_LOWEST_32, EXP_HIGHEST_32 = tl.constexpr(-104.0), tl.constexpr(89.0)
EXP_LOWEST_64, EXP_HIGHEST_64 = tl.constexpr(-746.0), tl.constexpr(710.0)
# Above these exp is a normal number.
EXP_NORMAL_32, EXP_NORMAL_64 = tl.constexpr(-87.0), tl.constexpr(-708.0)
# 1.5 times 2^23 and 2^52: neighbours are 1 apart on both sides, and an integer added to it stands in its last bits.
NO_FRACTION_32, NO_FRACTION_64 = tl.constexpr(1.5 * 2**23), tl.constexpr(1.5 * 2**52)
# Where exp(float32) in float64 stops: 2^20 of these still round to zero in float32.
EXP_LOWEST_WIDE = tl.constexpr(-200.0)

# (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, highest power first.
EXP_DEGREE_32, EXP_DEGREE_64 = tl.constexpr(5), tl.constexpr(11)
EXP_32 = tl.constexpr(tuple(1 / math.factorial(k + 2) for k in range(5, -1, -1)))
EXP_64 = tl.constexpr(tuple(1 / math.factorial(k + 2) for k in range(11, -1, -1)))
# (atanh(s) - s) / s^3 in s^2, on |s| <= 3 - sqrt(8): log m = 2 atanh((m - 1) / (m + 1)).
LOG_DEGREE_32, LOG_DEGREE_64 = tl.constexpr(3), tl.constexpr(9)
LOG_32 = tl.constexpr(tuple(1 / (2 * k + 3) for k in range(3, -1, -1)))
LOG_64 = tl.constexpr(tuple(1 / (2 * k + 3) for k in range(9, -1, -1)))
# (atan(z) - z) / z^3 in z^2, on |z| <= tan(pi / 8): Chebyshev fits, whose errors are 3e-9 and 5e-18 of atan. Its Taylor
# series needs twice the terms, and as many registers for float64 constants.
ATAN_DEGREE_32, ATAN_DEGREE_64 = tl.constexpr(4), tl.constexpr(10)
ATAN_32 = tl.constexpr(
    (
        -0.06451928208,
        0.1074373149,
        -0.142639556,
        0.1999954048,
        -0.3333333176,
    )
)
ATAN_64 = tl.constexpr(
    (
        -0.019176887119062259,
        0.039231658295587191,
        -0.050854497379402599,
        0.058581489128022099,
        -0.06664511447381948,
        0.076921831908260866,
        -0.090909045781239019,
        0.11111111015256362,
        -0.14285714284666543,
        0.19999999999995521,
        -0.3333333333333333,
    )
)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Horner's rule, highest power first."""
    y = x * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, DEGREE + 1):
        y = y * x + COEFFICIENTS[i]
    return y


@triton.jit
def power_of_2(n, WIDE: tl.constexpr):
    """2^n for an integer n in the normal range of float64 (WIDE) or float32, put together from its bits."""
    if WIDE:
        bits = (n + 1023).to(tl.int64) << 52
        return bits.to(tl.float64, bitcast=True)
    else:
        bits = (n + 127) << 23
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _reduce_exp(x, error):
    """(n, w) with exp(x + error) = 2^n (1 + w), |w| < 0.42; x finite and in exp's range, error far below 1."""
    n = tl.floor(x * LOG2_E + 0.5)
    if x.dtype == tl.float64:
        r = (x - n * LN2_HIGH_64) - n * LN2_LOW_64 + error
        w = r + r * r * polynomial(r, EXP_64, EXP_DEGREE_64)
    else:
        r = (x - n * LN2_HIGH_32) - n * LN2_LOW_32 + error
        w = r + r * r * polynomial(r, EXP_32, EXP_DEGREE_32)
    return n.to(tl.int32), w


@triton.jit
def _clamp_exp(x):
    """x in the range where exp is neither zero nor infinite; NaN becomes a number, which the caller undoes."""
    if x.dtype == tl.float64:
        low = tl.where(x > EXP_LOWEST_64, x, EXP_LOWEST_64)
        return tl.where(low < EXP_HIGHEST_64, low, EXP_HIGHEST_64)
    else:
        low = tl.where(x > EXP_LOWEST_32, x, EXP_LOWEST_32)
        return tl.where(low < EXP_HIGHEST_32, low, EXP_HIGHEST_32)


@triton.jit
def _exp_accurate(x, error):
    """exp(x + error)."""
    WIDE: tl.constexpr = x.dtype == tl.float64
    n, w = _reduce_exp(_clamp_exp(x), error)
    # In two steps, because 2^n alone leaves the normal range at both ends.
    half = n >> 1
    y = (1.0 + w) * power_of_2(half, WIDE) * power_of_2(n - half, WIDE)
    return tl.where(x == x, y, x)


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x."""
    if FAST:
        return tl.exp(x)
    else:
        return _exp_accurate(x, 0.0)


@triton.jit
def exp_of_negative(x, FAST: tl.constexpr):
    """e^x for x <= 0, without what `exp` pays for the ends of its range: where e^x is subnormal, and of NaN, it is 0.

    x / ln 2 is rounded by adding a number that has no bits left for a fraction: the sum's last bits are the integer.
    """
    WIDE: tl.constexpr = x.dtype == tl.float64
    LOWEST: tl.constexpr = EXP_NORMAL_64 if WIDE else EXP_NORMAL_32
    inside = x > LOWEST
    d = tl.where(inside, x, LOWEST)
    if FAST:
        y = tl.exp(d)
    else:
        if WIDE:
            rounded = d * LOG2_E + NO_FRACTION_64
            n = rounded - NO_FRACTION_64
            r = (d - n * LN2_HIGH_64) - n * LN2_LOW_64
            w = r + r * r * polynomial(r, EXP_64, EXP_DEGREE_64)
            power = ((rounded.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
        else:
            rounded = d * LOG2_E + NO_FRACTION_32
            n = rounded - NO_FRACTION_32
            r = (d - n * LN2_HIGH_32) - n * LN2_LOW_32
            w = r + r * r * polynomial(r, EXP_32, EXP_DEGREE_32)
            power = ((rounded.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
        y = power + w * power
    return tl.where(inside, y, 0.0)


@triton.jit
def exp_and_expm1(x, FAST: tl.constexpr):
    """(e^x, e^x - 1) for x <= 0, both with small relative errors."""
    if FAST:
        e = tl.exp(x)
        series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))
        return e, tl.where(x > -0.125, series, e - 1.0)
    else:
        WIDE: tl.constexpr = x.dtype == tl.float64
        n, w = _reduce_exp(_clamp_exp(x), 0.0)
        half = n >> 1
        first, second = power_of_2(half, WIDE), power_of_2(n - half, WIDE)
        e = (1.0 + w) * first * second
        # 2^n (1 + w) - 1 in an order that cancels nothing for n = 0, where w is the answer.
        m = w * first * second + (first * second - 1.0)
        return tl.where(x == x, e, x), tl.where(x == x, m, x)


@triton.jit
def exp_difference(x, m, FAST: tl.constexpr):
    """e^(x - m) for x <= m: float32 when FAST, else float64 with a relative error of half a float32 ulp (x float32) or
    about two float64 ulps (x float64). NaN where x - m is NaN.

    The rounding error of x - m is recovered (Knuth's two-sum) and enters the polynomial: e^d turns d's absolute error
    into a relative one, 16 ulps at d = -20.
    """
    d = x - m
    if FAST:
        return tl.exp(d)
    else:
        t = d - x
        error = (x - (d - t)) - (m + t)
        if x.dtype == tl.float64:
            # Infinities have no rounding error, only a NaN in its place.
            return _exp_accurate(d, tl.where(d > EXP_LOWEST_64, error, 0.0))
        else:
            inside = d > EXP_LOWEST_WIDE
            n, w = _reduce_exp(tl.where(inside, d, EXP_LOWEST_WIDE), tl.where(inside, error, 0.0))
            y = (1.0 + w.to(tl.float64)) * power_of_2(n, True)
            return tl.where(inside, y, tl.where(d == d, 0.0, float("nan")))


@triton.jit
def _log_accurate(x):
    """log x for a normal x > 0; NaN stays."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        # Take the exponent so that the mantissa lies in [sqrt(1/2), sqrt(2)): 0x3FE6A09E... is sqrt(1/2).
        n = ((bits - 0x3FE6A09E667F3BCD) >> 52).to(tl.int32)
        m = (bits - (n.to(tl.int64) << 52)).to(tl.float64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
        n = (bits - 0x3F3504F3) >> 23
        m = (bits - (n << 23)).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = f / (2.0 + f)
    s2 = s * s
    n = n.to(x.dtype)
    if x.dtype == tl.float64:
        tail = s2 * polynomial(s2, LOG_64, LOG_DEGREE_64)
        y = n * LN2_HIGH_64 + (2.0 * (s + s * tail) + n * LN2_LOW_64)
    else:
        tail = s2 * polynomial(s2, LOG_32, LOG_DEGREE_32)
        y = n * LN2_HIGH_32 + (2.0 * (s + s * tail) + n * LN2_LOW_32)
    return tl.where(x == x, y, x)


@triton.jit
def log(x, FAST: tl.constexpr):
    """log x for a normal x > 0."""
    if FAST:
        return tl.log(x)
    else:
        return _log_accurate(x)


@triton.jit
def log1p(e, FAST: tl.constexpr):
    """log(1 + e) for e in [0, 1]."""
    u = 1.0 + e
    if FAST:
        return tl.where(e < 0.01, e * (1.0 - e * (0.5 - e * 0.33333334)), tl.log(u))
    else:
        # The second term is what 1 + e lost to rounding, and all there is when e is tiny.
        return _log_accurate(u) + (e - (u - 1.0)) / u


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """log(1 + e^x) without overflow."""
    return tl.where(x > 0, x, 0.0) + log1p(exp(-tl.abs(x), FAST), FAST)


@triton.jit
def sigmoid_and_log(x, FAST: tl.constexpr):
    """(sigmoid(x), sigmoid(-x), log sigmoid(x)), each with a small relative error, from one exponential."""
    e = exp(-tl.abs(x), FAST)
    near, far = 1.0 / (1.0 + e), e / (1.0 + e)
    log_sigmoid = tl.where(x < 0, x, 0.0) - log1p(e, FAST)
    return tl.where(x < 0, far, near), tl.where(x < 0, near, far), log_sigmoid


@triton.jit
def tanh_and_slope(x, FAST: tl.constexpr):
    """(tanh x, 1 - tanh^2 x): with e = exp(-2|x|), (1 - e) / (1 + e) and 4 e / (1 + e)^2, nothing cancels."""
    e, minus = exp_and_expm1(-2.0 * tl.abs(x), FAST)
    total = 2.0 + minus
    t = -minus / total
    return tl.where(x < 0, -t, t), 4.0 * e / (total * total)


@triton.jit
def atan(x):
    """atan x: reduced to |z| <= tan(pi/8) by atan(a) = k pi/4 + atan(z), k = 0, 1, 2."""
    a = tl.abs(x)
    far, middle = a > TAN_3_PI_8, a > TAN_PI_8
    numerator = tl.where(far, -1.0, tl.where(middle, a - 1.0, a))
    denominator = tl.where(far, a, tl.where(middle, a + 1.0, 1.0))
    quarters = tl.where(far, 2.0, tl.where(middle, 1.0, 0.0))
    z = numerator / denominator
    z2 = z * z
    if x.dtype == tl.float64:
        tail = z2 * polynomial(z2, ATAN_64, ATAN_DEGREE_64)
    else:
        tail = z2 * polynomial(z2, ATAN_32, ATAN_DEGREE_32)
    y = quarters.to(x.dtype) * QUARTER_PI + (z + z * tail)
    return tl.where(x < 0, -y, y)


@triton.jit
def divide(a, b, FAST: tl.constexpr):
    """a / b; Triton's float32 division is off by up to two units in the last place, div_rn's is not."""
    if FAST or a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)
