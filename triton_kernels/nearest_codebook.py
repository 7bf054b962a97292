"""The nearest code on the GPU, proved nearest. Called by `pygen.ops.nearest_codebook`; what "nearest" means to the last
bit stands in `pygen.reference.nearest_codebook`.

Three kernels. `prepare_kernel` rounds codes and rows to bfloat16 and measures what the rounding took away.
`screen_kernel` multiplies them on the tensor cores and keeps, of each group of codes, the two highest scores.
`decide_kernel` compares the groups and decides in float64, by the definition, what the bound leaves in doubt.

The bound. x' and w_k are the row and the code that are scored, scaled by powers of two:
    euclidean  x' = (x - m) f,  w_k = (c_k - m) f,  b_k = |w_k|^2 / 2     m: the codebook's mean, or 0
    dot        x' = x f_i,      w_k = (c_k - m) f,  b_k = 0               (x.m is the same for every code)
    cosine     x' = x f_i,      w_k = c_k / |c_k|,  b_k = 0
The nearest code has the highest score s_k = x'.w_k - b_k. Computed is t_k = fl(x^.w^_k - b_k), x^ and w^ in bfloat16.
With rho = |x' - x^| and E_k = |w_k - w^_k| measured, X >= |x'|, |x^|, W_k >= |w_k| and so W_k + E_k >= |w^_k|,
    |t_k - s_k| <= rho W_k + X E_k                   x'.w - x^.w^ = (x' - x^).w + x^.(w - w^)
                 + ACCUMULATED (D' + 16) X (W_k + E_k)   the products are exact, their D' sums are not
                 + p (X (W_k + E_k) + b_k)               b_k and t_k rounded, the last bits of t_k spent on an index.
Float64 rounds too: the definition's sums of D terms in eight lanes, and x' and w_k here, err by less than
tau = (D + 64) 2^-52, relative. That moves a squared distance |x' - w_k|^2 <= 2 (X^2 + W_k^2) and so a score by at most
tau (X^2 + W_k^2), a product by tau X |c_k| f, a cosine (times X) by 8 tau X. Products that float32 flushes are below
2^-100 together (SLACK). In sum: the computed float64 key can prefer k to j only if
    t_k + e_k >= t_j - e_j,   e_k = rho W_k + X V_k + B_k + tau X^2 + SLACK,
with V_k and B_k what multiplies X, and what stands alone, above. So with the largest W, V and B of each group as the
group's e, whatever stays below threshold = max over groups of (highest t - e) is not the nearest code. A group whose
highest score passes, but not its second, has one code to decide on, the one whose index the score carries in its last
bits; one code alone is decided without float64. Everything is rounded upward (UPWARD).

Rows that the scaling would push out of float32 (ORDINARY_SCALED), and float64 values whose squares leave float64
(LARGEST, SMALLEST), have no bound: every code is decided in float64 for them, and such a code for every row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygen.triton_kernels import _common

METRICS = ("euclidean", "cosine", "dot")

# Error of one addition inside a matrix unit, over the product of the operands' norms. NVIDIA's align the terms of a
# block, of four products or more and what was summed before, to the largest and cut them to 24 bits: at most 2^-23 of
# the norms a term, and again for the block's sum (measured by Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of
# NVIDIA tensor cores", 2021); that is 1.5 2^-23 a product. AMD's round each addition: 2^-24. 2^-21 leaves a factor of
# more than two.
ACCUMULATED = 2.0**-21
# float32's unit roundoff 2^-24: b_k, t_k, and t +- e where they are compared.
ROUNDED = 2.0**-20
UPWARD = tl.constexpr(1 + 2.0**-16)
SLACK = tl.constexpr(2.0**-100)
# Added to norms, which float32 could round to zero. As a product with any norm in range it is within SLACK.
TINY = tl.constexpr(2.0**-100)
# A bfloat16 below this is made zero: products are normal in float32, whatever a chip does with subnormals.
SMALLEST_HALF = tl.constexpr(2.0**-50)
ORDINARY_SCALED = tl.constexpr(2.0**40)
LARGEST, SMALLEST = 2.0**250, 2.0**-250
DOUBLE_LARGEST, DOUBLE_SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)
# b of what is no code: below every score. And B of a code that must be decided for every row.
NO_CODE = 2.0**120
NO_CODE_HALF = tl.constexpr(2.0**119)
ALWAYS = 2.0**110

# No code, no group.
NONE = tl.constexpr(2**31 - 1)

# What prepare_kernel says of a vector.
ORDINARY, BRUTE, NOT_FINITE, MASKED = (tl.constexpr(i) for i in range(4))

# Codes of a group that lie in one row of RUN neighbours: the kept bits of a column, which stay where the tensor cores
# leave them, in different threads; the others are a thread's own registers and are compared there.
RUN = 16
GROUPS_PER_RUN = 8
# Codes per group grow with the codebook up to this many times what one tile gives, so that groups are about 512.
CODES_PER_SPAN, LARGEST_SPAN = 4096, 32
# Bytes of what waits between screen_kernel and decide_kernel: rows are taken in chunks.
WORKSPACE = 128 * 2**20
# D of one product with the whole row kept; beyond it, D of one step.
WHOLE_DIMENSIONS, STEP_DIMENSIONS = 256, 64
# Rows, codes, stages and warps of a tile, the first that fits the chip's shared memory.
TILES = ((128, 128, 3, 8), (128, 128, 2, 8), (128, 64, 2, 8), (64, 64, 2, 4), (64, 32, 2, 4), (64, 32, 1, 4))
INTERPRETED_TILE = (16, 64, 1, 4)
PREPARED_ELEMENTS = 2048
# Groups that decide_kernel looks at together, and codes that it decides together; steps of eight elements of a vector
# that it loads ahead, for several codes and for one.
GROUPS, CODES, UNROLL, UNROLL_ONE = (32, 8, 1, 2) if _common.interpreted else (256, 16, 2, 4)


@triton.jit
def _place(row, first_tile, tiles, BLOCK_N: tl.constexpr):
    """(head, vector of that head) of a row of the workspace: a tile of rows is of one head."""
    tile = first_tile + row // BLOCK_N
    return (tile // tiles).to(tl.int64), ((tile % tiles) * BLOCK_N + row % BLOCK_N).to(tl.int64)


@triton.jit
def _load_centred(pointer, step, mean_pointer, at, present, d):
    """Elements at of vectors, (R, BLOCK), float64: (as they are, less the mean)."""
    mask = present[:, None] & (at < d)[None, :]
    raw = tl.load(pointer[:, None] + at.to(tl.int64)[None, :] * step, mask=mask, other=0.0).to(tl.float64)
    if mean_pointer is None:
        return raw, raw
    else:
        return raw, raw - tl.load(mean_pointer + at, mask=at < d, other=0.0)[None, :]


@triton.jit
def prepare_kernel(
    pointer,
    mask_pointer,
    mean_pointer,
    factor_pointer,
    half_pointer,
    square_pointer,
    residual_pointer,
    state_pointer,
    n,
    d,
    first_tile,
    tiles,
    strides,
    mask_strides,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of R vectors: the scaled vector in bfloat16 (PADDED elements, zero if it is not ordinary), its squared norm, that
    of what the rounding took, and what is to be said of it.

    SCALE: "head" by the head's factor, "own" by the power of two that brings its largest element to [1, 2), "unit" by
    its norm.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    head, vector = _place(rows, first_tile, tiles, BLOCK_N)
    present = vector < n
    start = pointer + head * strides[0] + vector * strides[1]
    # R divides BLOCK_N: the head is the same for all.
    this_head = (first_tile + tl.program_id(0) * R // BLOCK_N) // tiles
    mean = None if mean_pointer is None else mean_pointer + this_head * d
    factor = tl.zeros((R,), tl.float64) + tl.load(factor_pointer + this_head)
    columns = tl.arange(0, BLOCK)

    bad = tl.zeros((R,), tl.int32)
    largest = tl.zeros((R,), tl.float64)
    norm = tl.zeros((R,), tl.float64)
    for at in range(0, d, BLOCK):
        raw, y = _load_centred(start, strides[2], mean, at + columns, present, d)
        bad += tl.sum((tl.abs(raw) < float("inf")).to(tl.int32), 1)
        largest = tl.maximum(largest, tl.max(tl.where(tl.abs(y) < float("inf"), tl.abs(y), float("inf")), 1))
        norm += tl.sum(y * y, 1)
    finite = bad == tl.cdiv(d, BLOCK) * BLOCK
    # A head without a bound has the factor inf.
    bounded = factor < float("inf")
    if SCALE == "head":
        scale = factor
        bounded &= largest * scale <= ORDINARY_SCALED
    else:
        bounded &= (largest == 0) | ((largest >= DOUBLE_SMALLEST) & (largest <= DOUBLE_LARGEST))
        if SCALE == "own":
            exponent = largest.to(tl.int64, bitcast=True) >> 52
            exponent = tl.where((largest > 0) & bounded, exponent, 1023)
            scale = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
        else:
            scale = tl.where((norm > 0) & bounded, 1.0 / tl.sqrt(tl.where(norm > 0, norm, 1.0)), 0.0)
    state = tl.where(finite & present, tl.where(bounded, ORDINARY, BRUTE), NOT_FINITE)
    if mask_pointer is not None:
        kept = tl.load(mask_pointer + head * mask_strides[0] + vector * mask_strides[1], mask=present, other=0)
        state = tl.where(kept != 0, state, MASKED)

    square = tl.zeros((R,), tl.float64)
    residual = tl.zeros((R,), tl.float64)
    for at in range(0, PADDED, BLOCK):
        raw, y = _load_centred(start, strides[2], mean, at + columns, present, d)
        y = tl.where((state == ORDINARY)[:, None], y * scale[:, None], 0.0)
        half = y.to(tl.float32)
        half = tl.where(tl.abs(half) < SMALLEST_HALF, 0.0, half).to(tl.bfloat16)
        lost = y - half.to(tl.float32).to(tl.float64)
        square += tl.sum(y * y, 1)
        residual += tl.sum(lost * lost, 1)
        where = rows.to(tl.int64)[:, None] * PADDED + (at + columns)[None, :]
        tl.store(half_pointer + where, half, mask=(at + columns < PADDED)[None, :])
    tl.store(square_pointer + rows, square)
    tl.store(residual_pointer + rows, residual)
    tl.store(state_pointer + rows, state.to(tl.int8))


@triton.jit
def _multiply(x, w, sums, INTERPRETED: tl.constexpr):
    """sums + x w^T. The interpreter multiplies bfloat16's bits; their products are exact in float32."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), sums)
    else:
        return tl.dot(x, tl.trans(w), sums)


@triton.jit
def _halves(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(the left half, the right half) of the columns: registers of one thread, nothing moves."""
    return tl.split(tl.permute(tl.reshape(values, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _top_two(scores, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(highest, second), each (ROWS, 8): column r of all columns 16 j + 2 r + p."""
    a, b = tl.split(tl.reshape(scores, (ROWS, COLUMNS // 2, 2)))
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    # COLUMNS / 2 -> 8 by halves. A loop that is unrolled cannot change a tensor's shape, so the steps stand here.
    if COLUMNS >= 128:
        high, low = _merge_halves(high, low, ROWS, 64)
    if COLUMNS >= 64:
        high, low = _merge_halves(high, low, ROWS, 32)
    if COLUMNS >= 32:
        high, low = _merge_halves(high, low, ROWS, 16)
    return high, low


@triton.jit
def _merge(high, low, high2, low2):
    """The two highest of two pairs."""
    return tl.maximum(high, high2), tl.maximum(tl.minimum(high, high2), tl.maximum(low, low2))


@triton.jit
def _merge_halves(high, low, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    high, high2 = _halves(high, ROWS, COLUMNS)
    low, low2 = _halves(low, ROWS, COLUMNS)
    return _merge(high, low, high2, low2)


@triton.jit
def screen_kernel(
    x_pointer,
    codes_pointer,
    bias_pointer,
    high_pointer,
    low_pointer,
    first_tile,
    tiles,
    code_tiles,
    spans_per_split,
    splits,
    DIMENSIONS: tl.constexpr,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The two highest scores of each group, of BLOCK_N rows and a range of the codes. A group is what one thread sees
    of SPAN tiles of codes: of each run of 16 codes a neighbouring pair."""
    PER_TILE: tl.constexpr = BLOCK_K // 8
    KEPT_BITS: tl.constexpr = -(PER_TILE * SPAN)
    program = tl.program_id(0)
    tile, split = program // splits, program % splits
    head = ((first_tile + tile) // tiles).to(tl.int64)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    d = tl.arange(0, STEP)
    own_bits = (columns // 16) * 2 + columns % 2
    codes_pointer += head * code_tiles * BLOCK_K * DIMENSIONS
    bias_pointer += head * code_tiles * BLOCK_K
    groups = code_tiles // SPAN * 8
    x_at = x_pointer + rows[:, None] * DIMENSIONS + d[None, :]
    if STEP == DIMENSIONS:
        x = tl.load(x_at)
    high = tl.full((BLOCK_N, 8), float("-inf"), tl.float32)
    low = high
    first = split * spans_per_split * SPAN
    for t in range(first, tl.minimum(first + spans_per_split * SPAN, code_tiles)):
        codes = t * BLOCK_K + columns
        at = codes_pointer + codes.to(tl.int64)[:, None] * DIMENSIONS + d[None, :]
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if STEP == DIMENSIONS:
            sums = _multiply(x, tl.load(at), sums, INTERPRETED)
        else:
            for start in range(0, DIMENSIONS, STEP):
                sums = _multiply(tl.load(x_at + start), tl.load(at + start), sums, INTERPRETED)
        scores = sums - tl.load(bias_pointer + codes)[None, :]
        bits = (scores.to(tl.int32, bitcast=True) & KEPT_BITS) | own_bits[None, :]
        tile_high, tile_low = _top_two(bits.to(tl.float32, bitcast=True), BLOCK_N, BLOCK_K)
        if SPAN == 1:
            high, low = tile_high, tile_low
        else:
            which = (t % SPAN) * PER_TILE
            tile_high = (tile_high.to(tl.int32, bitcast=True) | which).to(tl.float32, bitcast=True)
            high, low = _merge(high, low, tile_high, tile_low)
        last = t % SPAN == SPAN - 1
        group = t // SPAN * 8 + tl.arange(0, 8)
        to = rows[:, None] * groups + group[None, :]
        tl.store(high_pointer + to, high, mask=(group >= 0)[None, :] & last)
        tl.store(low_pointer + to, low, mask=(group >= 0)[None, :] & last)
        if SPAN > 1:
            high = tl.where(last, float("-inf"), high)
            low = tl.where(last, float("-inf"), low)


@triton.jit
def _add_lanes(lanes, C: tl.constexpr):
    """(C, 8) -> (C,), in halves."""
    a, b = tl.split(tl.permute(tl.reshape(lanes, (C, 2, 4)), (0, 2, 1)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, (C, 2, 2)), (0, 2, 1)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def _sums(x_at, x_step, codes_at, code_step, present, d, METRIC: tl.constexpr, C: tl.constexpr, UNROLL: tl.constexpr):
    """(C,) float64, three times: sum (x - c)^2 or x.c; for the cosine |x|^2 and |c|^2; in the definition's order. The
    kernel that calls this must be compiled without contraction of a * b + c."""
    lane = tl.arange(0, 8)
    main = tl.zeros((C, 8), tl.float64)
    xx, cc = main, main
    for start in range(0, d, 8 * UNROLL):
        for i in tl.static_range(UNROLL):
            at = start + 8 * i + lane
            offset = at.to(tl.int64)
            x = tl.load(x_at + offset * x_step, mask=at < d, other=0.0).to(tl.float64)[None, :]
            mask = present[:, None] & (at < d)[None, :]
            c = tl.load(codes_at[:, None] + (offset * code_step)[None, :], mask=mask, other=0.0).to(tl.float64)
            if METRIC == "euclidean":
                difference = x - c
                main += difference * difference
            else:
                main += x * c
                if METRIC == "cosine":
                    xx += x * x
                    cc += c * c
    main = _add_lanes(main, C)
    if METRIC == "cosine":
        return main, _add_lanes(xx, C), _add_lanes(cc, C)
    else:
        return main, main, main


@triton.jit
def _decide(
    best,
    index,
    count,
    codes,
    bias_at,
    x_at,
    x_step,
    codebook_at,
    strides,
    d,
    METRIC: tl.constexpr,
    UNROLL: tl.constexpr,
    C: tl.constexpr,
):
    """(the lowest key so far, its code, how many were decided) after codes (C,); of equal keys the lower code."""
    usable = tl.load(bias_at + codes) < NO_CODE_HALF
    codes_at = codebook_at + codes.to(tl.int64) * strides[1]
    key, _, norm = _sums(x_at, x_step, codes_at, strides[2], usable, d, METRIC, C, UNROLL)
    if METRIC == "dot":
        key = -key
    if METRIC == "cosine":
        key = tl.where(norm > 0, -key * tl.abs(key) / tl.where(norm > 0, norm, 1.0), 0.0)
    # Beyond float64's range every distance is infinite.
    key = tl.where(usable & (key == key), key, float("inf"))
    lowest = tl.min(key, 0)
    code = tl.min(tl.where(usable & (key == lowest), codes, NONE), 0)
    better = (lowest < best) | ((lowest == best) & (code < index))
    return tl.where(better, lowest, best), tl.where(better, code, index), count + tl.sum(usable.to(tl.int32), 0)


@triton.jit
def _score_groups(g, groups, scores, vector):
    """(highest, second, e) of groups g; `scores`: pointers to those two and to W, V and B, `vector`: rho, X and the
    rest of e."""
    mask = g < groups
    high = tl.load(scores[0] + g, mask=mask, other=float("-inf"))
    low = tl.load(scores[1] + g, mask=mask, other=float("-inf"))
    width = tl.load(scores[2] + g, mask=mask, other=0.0)
    slope = tl.load(scores[3] + g, mask=mask, other=0.0)
    offset = tl.load(scores[4] + g, mask=mask, other=0.0)
    return high, low, (vector[0] * width + vector[1] * slope + offset + vector[2]) * UPWARD


@triton.jit
def _threshold(groups, scores, vector, GROUPS: tl.constexpr):
    """The nearest code's score, raised by its e, is at least this."""
    threshold = float("-inf")
    for start in range(0, groups, GROUPS):
        high, low, error = _score_groups(start + tl.arange(0, GROUPS), groups, scores, vector)
        threshold = tl.maximum(threshold, tl.max(high - error, 0))
    return threshold


@triton.jit
def _code_of(g, high, MEMBERS: tl.constexpr):
    """The code that has a group's highest score, whose last bits name it."""
    member = high.to(tl.int32, bitcast=True) & (MEMBERS - 1)
    return (g // 8) * (8 * MEMBERS) + (member // 2) * 16 + (g % 8) * 2 + member % 2


@triton.jit
def decide_kernel(
    x_pointer,
    codebook_pointer,
    high_pointer,
    low_pointer,
    square_pointer,
    residual_pointer,
    state_pointer,
    width_pointer,
    slope_pointer,
    offset_pointer,
    bias_pointer,
    distance_pointer,
    indices_pointer,
    candidates_pointer,
    n,
    d,
    groups,
    first_tile,
    tiles,
    x_strides,
    codebook_strides,
    METRIC: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    CODES: tl.constexpr,
    UNROLL: tl.constexpr,
    UNROLL_ONE: tl.constexpr,
):
    """One row: what the bound leaves is decided in float64."""
    row = tl.program_id(0)
    head, vector = _place(row, first_tile, tiles, BLOCK_N)
    if vector < n:
        state = tl.load(state_pointer + row)
        x_at = x_pointer + head * x_strides[0] + vector * x_strides[1]
        codebook_at = codebook_pointer + head * codebook_strides[0]
        bias_at = bias_pointer + head * groups * MEMBERS
        of_row, of_head = row.to(tl.int64) * groups, head * groups
        scores = (
            high_pointer + of_row,
            low_pointer + of_row,
            width_pointer + of_head,
            slope_pointer + of_head,
            offset_pointer + of_head,
        )
        square = tl.load(square_pointer + row) * UPWARD
        rho = (tl.sqrt(tl.load(residual_pointer + row)) * UPWARD + TINY).to(tl.float32)
        size = (tl.sqrt(square) * UPWARD + TINY).to(tl.float32)
        # tau = (d + 64) 2^-52
        about = (rho, size, (square * ((d + 64) * 2.220446049250313e-16) + SLACK).to(tl.float32))

        threshold = float("-inf")
        single = NONE
        doubts = 0
        if state == ORDINARY:
            threshold = _threshold(groups, scores, about, GROUPS)
            for start in range(0, groups, GROUPS):
                g = start + tl.arange(0, GROUPS)
                high, low, error = _score_groups(g, groups, scores, about)
                one = (g < groups) & (high + error >= threshold)
                doubts += tl.sum(one.to(tl.int32), 0) + tl.sum((one & (low + error >= threshold)).to(tl.int32), 0)
                single = tl.minimum(single, tl.min(tl.where(one, _code_of(g, high, MEMBERS), NONE), 0))
        index = NONE
        count = 0
        if doubts == 1:
            # What is no code is found alone if there is nothing else.
            if tl.load(bias_at + single) < NO_CODE_HALF:
                index = single
                count = 1
        elif state <= BRUTE:
            best = tl.full((), float("inf"), tl.float64)
            for start in range(0, groups, GROUPS):
                g = start + tl.arange(0, GROUPS)
                high, low, error = _score_groups(g, groups, scores, about)
                one = (g < groups) & ((high + error >= threshold) | (state == BRUTE))
                several = (low + error >= threshold) | (state == BRUTE)
                group = tl.min(tl.where(one, g, NONE), 0)
                while group < NONE:
                    if tl.max(((g == group) & several).to(tl.int32), 0) > 0:
                        for m in range(0, MEMBERS, CODES):
                            member = m + tl.arange(0, CODES)
                            codes = (group // 8) * (8 * MEMBERS) + (member // 2) * 16 + (group % 8) * 2 + member % 2
                            best, index, count = _decide(
                                best,
                                index,
                                count,
                                codes,
                                bias_at,
                                x_at,
                                x_strides[2],
                                codebook_at,
                                codebook_strides,
                                d,
                                METRIC,
                                UNROLL,
                                CODES,
                            )
                    else:
                        code = tl.max(tl.where(g == group, _code_of(g, high, MEMBERS), 0), 0)
                        best, index, count = _decide(
                            best,
                            index,
                            count,
                            code + tl.arange(0, 1),
                            bias_at,
                            x_at,
                            x_strides[2],
                            codebook_at,
                            codebook_strides,
                            d,
                            METRIC,
                            UNROLL_ONE,
                            1,
                        )
                    group = tl.min(tl.where(one & (g > group), g, NONE), 0)
        found = index < NONE
        to = head * n + vector
        tl.store(indices_pointer + to, tl.where(found, index, -1).to(tl.int64))
        if candidates_pointer is not None:
            tl.store(candidates_pointer + to, count)
        if distance_pointer is not None:
            first = tl.arange(0, 1)
            present = first >= tl.where(found, 0, 1)
            code_at = codebook_at + tl.where(found, index, 0).to(tl.int64) * codebook_strides[1] + first
            main, xx, cc = _sums(x_at, x_strides[2], code_at, codebook_strides[2], present, d, METRIC, 1, UNROLL_ONE)
            if METRIC == "euclidean":
                distance = tl.sqrt(main)
            elif METRIC == "dot":
                distance = -main
            else:
                norms = tl.sqrt(xx) * tl.sqrt(cc)
                distance = 1.0 - tl.where(norms > 0, main / tl.where(norms > 0, norms, 1.0), 0.0)
            distance = tl.where(present, distance, tl.where(state == MASKED, 0.0, float("nan")))
            tl.store(distance_pointer + to + first, distance)


# ---- launchers -------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How one shape is cut: elements of a padded vector, those of one product, and `TILES`' entries."""

    padded: int
    step: int
    rows: int
    codes: int
    stages: int
    warps: int
    span: int  # tiles of codes in one group

    @property
    def members(self) -> int:
        return self.codes // GROUPS_PER_RUN * self.span


def _shared_bytes(padded: int, step: int, rows: int, codes: int, stages: int) -> int:
    """Of one program: the rows once where they are kept, else in every stage; and the codes of every stage."""
    kept = padded == step
    return 2 * step * (rows * (1 if kept else stages) + codes * stages)


def _tiles(d: int, k: int, shared: int) -> _Tiles:
    if d > WHOLE_DIMENSIONS:
        step = STEP_DIMENSIONS
        padded = triton.cdiv(d, step) * step
    else:
        step = padded = max(RUN, triton.next_power_of_2(d))
    if _common.interpreted:
        tile = INTERPRETED_TILE
    else:
        fitting = [t for t in TILES if _shared_bytes(padded, step, *t[:3]) <= shared]
        tile = fitting[0] if fitting else TILES[-1]
    span = triton.next_power_of_2(max(1, k // CODES_PER_SPAN))
    return _Tiles(padded, step, *tile, min(span, LARGEST_SPAN))


class _Prepared(NamedTuple):
    """Codes, (H, K padded to whole groups): in bfloat16; b; W, V and B of each group, (H, groups); the scale."""

    half: Tensor
    bias: Tensor
    width: Tensor
    slope: Tensor
    offset: Tensor
    mean: Tensor | None
    factor: Tensor
    groups: int


def _prepare(
    v: Tensor, mask: Tensor | None, mean: Tensor | None, factor: Tensor, scale: str, first: int, count: int, t: _Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`prepare_kernel`'s results of `count` tiles of v (H, N, D) from tile `first` on; t.rows vectors to a tile."""
    rows = count * t.rows
    half = torch.empty((rows, t.padded), dtype=torch.bfloat16, device=v.device)
    squares = torch.empty((2, rows), dtype=torch.float64, device=v.device)
    state = torch.empty(rows, dtype=torch.int8, device=v.device)
    block = min(triton.next_power_of_2(t.padded), 256)
    together = min(t.rows, PREPARED_ELEMENTS // block)
    mask_strides = (0, 0) if mask is None else mask.stride()
    tiles = triton.cdiv(v.size(1), t.rows)
    pointers = (v, mask, mean, factor, half, squares[0], squares[1], state)
    args = (*pointers, v.size(1), v.size(2), first, tiles, v.stride(), mask_strides)
    constants = {"SCALE": scale, "BLOCK_N": t.rows, "PADDED": t.padded, "R": together, "BLOCK": block}
    _common.launch(prepare_kernel, rows // together, v, args, constants, 4)
    return half, squares[0], squares[1], state


def _power_of_two_below(x: Tensor) -> Tensor:
    """1 / 2^floor(log2 x) of a normal float64 x > 0, exactly, from its exponent."""
    return ((2046 - (x.view(torch.int64) >> 52)) << 52).view(torch.float64)


def _centre_and_scale(codebook: Tensor, metric: str, exact: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """(mean (H, D) or None, factor (H,), norms of the codes (H, K)), float64; the factor is inf for a head without a
    bound.

    The mean is subtracted where it is most of the codes: elsewhere it gains little, and one huge code would leave its
    traces in all the others. Where both sides are bfloat16 it costs their exactness, and must be nearly all.
    """
    clean = torch.where(codebook.isfinite().all(-1, keepdim=True), codebook, 0)
    norms = torch.linalg.vector_norm(clean, dim=-1, dtype=torch.float64)
    low, high = clean.amin(1).double(), clean.amax(1).double()
    largest = torch.maximum(high, -low).amax(1)
    bounded = (largest == 0) | ((largest >= SMALLEST) & (largest <= LARGEST))
    infinity = torch.full_like(largest, torch.inf)
    if metric == "cosine":
        return None, torch.where(bounded, 1.0, infinity), norms
    mean = clean.sum(1, dtype=torch.float64) / codebook.size(1)
    share = 1 - 2.0**-12 if exact else 0.5
    centred = bounded & (mean.square().sum(1) > share * norms.square().mean(1))
    mean = torch.where(centred[:, None], mean, 0.0)
    spread = torch.maximum(high - mean, mean - low).amax(1)
    spread = torch.where(bounded & (spread > 0), spread, 1.0)
    return mean, torch.where(bounded, _power_of_two_below(spread), infinity), norms


def _prepare_codes(x: Tensor, codebook: Tensor, metric: str, t: _Tiles) -> _Prepared:
    heads, k, d = codebook.shape
    exact = x.dtype == codebook.dtype == torch.bfloat16
    mean, factor, norms = _centre_and_scale(codebook, metric, exact)
    # The codes of a head fill whole groups.
    whole = t.codes * t.span
    spans = triton.cdiv(k, whole)
    as_codes = t._replace(rows=whole)
    scale = "unit" if metric == "cosine" else "head"
    half, square, residual, state = _prepare(codebook, None, mean, factor, scale, 0, heads * spans, as_codes)
    square, residual, state = (v.view(heads, spans * whole) for v in (square, residual, state))
    ordinary, usable = state == ORDINARY.value, state <= BRUTE.value
    norm, lost = (v.sqrt() * UPWARD.value + TINY.value for v in (square, residual))
    bias = square / 2 if metric == "euclidean" else torch.zeros_like(square)
    rounding = t.members * 2.0**-23 + ROUNDED
    tau = (d + 64) * 2.0**-52
    slope = lost + (ACCUMULATED * (t.padded + 16) + rounding) * (norm + lost)
    offset = rounding * bias
    if metric == "euclidean":
        offset = offset + tau * norm.square()
    elif metric == "dot":
        size = torch.nn.functional.pad(
            norms * torch.where(factor < torch.inf, factor, 0)[:, None], (0, spans * whole - k)
        )
        slope = slope + tau * (size + norm)
    else:
        slope = slope + 8 * tau
    offset = torch.where(ordinary, offset, ALWAYS)

    def of_groups(values: Tensor) -> Tensor:
        values = torch.where(usable, values, 0).view(heads, spans, whole // RUN, GROUPS_PER_RUN, 2)
        return (values.amax((2, 4)) * UPWARD.value).float().view(heads, -1)

    bias = torch.where(usable, bias, NO_CODE).float()
    groups = spans * GROUPS_PER_RUN
    return _Prepared(half, bias, of_groups(norm), of_groups(slope), of_groups(offset), mean, factor, groups)


def _screen(half: Tensor, codes: _Prepared, first: int, count: int, tiles: int, t: _Tiles) -> tuple[Tensor, Tensor]:
    """The two highest scores of every group, (rows, groups), of `count` tiles of rows."""
    scores = torch.empty((2, count * t.rows, codes.groups), dtype=torch.float32, device=half.device)
    spans = codes.groups // GROUPS_PER_RUN
    per_split = triton.cdiv(spans, min(spans, triton.cdiv(_common.ENOUGH_PROGRAMS, count)))
    splits = triton.cdiv(spans, per_split)
    args = (half, codes.half, codes.bias, scores[0], scores[1], first, tiles, spans * t.span, per_split, splits)
    constants = {
        "DIMENSIONS": t.padded,
        "STEP": t.step,
        "SPAN": t.span,
        "BLOCK_N": t.rows,
        "BLOCK_K": t.codes,
        "INTERPRETED": _common.interpreted,
    }
    _common.launch(screen_kernel, count * splits, half, args, constants, t.warps, num_stages=t.stages)
    return scores[0], scores[1]


def _search(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, results: tuple[Tensor | None, Tensor, Tensor | None]
) -> None:
    heads, n, d = x.shape
    t = _tiles(d, codebook.size(1), _common.shared_memory(x))
    codes = _prepare_codes(x, codebook, metric, t)
    tiles = triton.cdiv(n, t.rows)
    per_tile = t.rows * (8 * codes.groups + 2 * t.padded + 32)
    chunk = max(1, WORKSPACE // per_tile)
    scale, mean = ("head", codes.mean) if metric == "euclidean" else ("own", None)
    constants = {
        "METRIC": metric,
        "MEMBERS": t.members,
        "BLOCK_N": t.rows,
        "GROUPS": GROUPS,
        "CODES": min(CODES, t.members),
        "UNROLL": UNROLL,
        "UNROLL_ONE": UNROLL_ONE,
    }
    for first in range(0, heads * tiles, chunk):
        count = min(chunk, heads * tiles - first)
        half, *about = _prepare(x, mask, mean, codes.factor, scale, first, count, t)
        high, low = _screen(half, codes, first, count, tiles, t)
        given = (x, codebook, high, low, *about, codes.width, codes.slope, codes.offset, codes.bias)
        args = (*given, *results, n, d, codes.groups, first, tiles, x.stride(), codebook.stride())
        # Contracted, the sums would not be the definition's.
        _common.launch(decide_kernel, count * t.rows, x, args, constants, 1, enable_fp_fusion=False)


def nearest_codebook(
    x: Tensor, codebook: Tensor, metric: str, mask: Tensor | None, return_distance: bool, return_candidates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.pygen.nearest_codebook` on a GPU: (distance, indices, candidates) of x (H, N, D) in codebook
    (H, K, D), any strides; what was not asked for is empty."""
    if metric not in METRICS:
        raise RuntimeError(f'nearest_codebook: metric must be one of {", ".join(METRICS)}, got "{metric}"')
    if x.dim() != 3 or codebook.dim() != 3 or x.shape[::2] != codebook.shape[::2] or codebook.size(1) == 0:
        raise RuntimeError(
            "nearest_codebook: x must be (H, N, D) and codebook (H, K, D) with K > 0, got "
            f"{tuple(x.shape)} and {tuple(codebook.shape)}"
        )
    if x.size(2) == 0:
        # Vectors without elements are one element that is zero.
        x, codebook = (torch.nn.functional.pad(v, (0, 1)) for v in (x, codebook))
    rows = x.shape[:2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    distance = torch.empty(rows if return_distance else 0, dtype=dtype, device=x.device)
    indices = torch.empty(rows, dtype=torch.int64, device=x.device)
    candidates = torch.empty(rows if return_candidates else 0, dtype=torch.int32, device=x.device)
    if indices.numel():
        results = (distance if return_distance else None, indices, candidates if return_candidates else None)
        _search(x, codebook, metric, None if mask is None else mask.expand(rows), results)
    return distance, indices, candidates
