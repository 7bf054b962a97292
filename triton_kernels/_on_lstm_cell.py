"""The fused cell of ON-LSTM and its backward pass. `on_lstm` launches them step by step, `_on_lstm_sequence` loops over
them; the formulas are those of `pygen.ops.on_lstm`.

A row of gates is [i~ (n), f~ (n) | o, c^, i, f (n x C each)]. A tile is (R, chunks, units of a chunk), so that a master
gate spreads along its last axis and the units' share of its gradient is a sum over it. A row that fits one tile stays
in registers from the gates to the new state. A longer one takes launches with loops, over master gates, over tiles and,
backward, over master gates again, and what they hand on lies in `scratch`.
"""

import triton
import triton.language as tl

from pygen.triton_kernels._math import exp, tanh_and_slope

# Master gates that a program takes at a time where a row does not fit one tile.
LONG = tl.constexpr(512)
# What a launch does: everything, where a row is one tile; otherwise the master gates, then the units, and backward
# the master gates' logits. (One kernel for all three needs more registers than there are.)
WHOLE, MASTERS, UNITS, LOGITS = (tl.constexpr(i) for i in range(4))


# ---- formulas --------------------------------------------------------------------------------------------------------


@triton.jit
def widened(x):
    """x in the type that the cell is computed in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    e = exp(-tl.abs(x), FAST)
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    t, _ = tanh_and_slope(x, FAST)
    return t


@triton.jit
def new_cell(master_in, master_forget, candidate, i, f, c):
    """(cell state, what is written, what is kept, the overlap of the master gates)."""
    overlap = master_in * master_forget
    written = i * overlap + (master_in - overlap)
    kept = f * overlap + (master_forget - overlap)
    return kept * c + written * candidate, written, kept, overlap


@triton.jit
def state_gradients(master_in, master_forget, o, candidate, i, f, c, grad_h, grad_c, FAST: tl.constexpr):
    """From the gradients of the new hidden and cell state: those of the gates o, c^, i, f before their sigmoids and
    tanh, of the cell state before, of what is written and of what is kept."""
    new_c, written, kept, overlap = new_cell(master_in, master_forget, candidate, i, f, c)
    squashed, slope = tanh_and_slope(new_c, FAST)
    grad_c += grad_h * o * slope
    d_written, d_kept = grad_c * candidate, grad_c * c
    return (
        grad_h * squashed * o * (1.0 - o),
        grad_c * written * (1.0 - candidate * candidate),
        d_written * overlap * i * (1.0 - i),
        d_kept * overlap * f * (1.0 - f),
        grad_c * kept,
        d_written,
        d_kept,
    )


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gate(gates, product, from_gates, from_product, at, mask, fill):
    """The gates `at` of each row, widened: the inputs' part and, if there is one, the hidden state's."""
    x = widened(tl.load(gates + from_gates + at, mask=mask, other=fill))
    if product is not None:
        x += widened(tl.load(product + from_product + at, mask=mask, other=0.0))
    return x


@triton.jit
def _store_distances(distances, here, rows, in_batch, of_forget, of_in, n):
    """The sums (R, 1) over master gates 1 - f~ and i~, as means."""
    tl.store(distances + here, of_forget / n, mask=in_batch)
    tl.store(distances + rows + here, of_in / n, mask=in_batch)


@triton.jit
def _masters(
    gates,
    product,
    activations,
    distances,
    from_gates,
    from_product,
    here,
    rows,
    in_batch,
    n,
    FAST: tl.constexpr,
    N: tl.constexpr,
):
    """(i~, f~), each (R, N), of rows that fit one tile."""
    k = tl.arange(0, N)[None, :]
    present, low = in_batch & (k < n), float("-inf")
    x = _gate(gates, product, from_gates, from_product, k, present, low)
    # i~_k is the sum behind k: its scan reads one ahead.
    ahead = _gate(gates, product, from_gates, from_product, k + 1, in_batch & (k + 1 < n), low)
    m = tl.max(x, 1)[:, None]
    p = exp(x - m, FAST)
    scale = 1.0 / tl.sum(p, 1)[:, None]
    master_in = tl.cumsum(exp(ahead - m, FAST) * scale, 1, reverse=True)
    y = _gate(gates, product, from_gates + n, from_product + n, k, present, low)
    q = exp(y - tl.max(y, 1)[:, None], FAST)
    q = q * (1.0 / tl.sum(q, 1)[:, None])
    master_forget = tl.cumsum(q, 1)
    if activations is not None:
        tl.store(activations + from_gates + k, p * scale, mask=present)
        tl.store(activations + from_gates + n + k, q, mask=present)
    of_forget = tl.sum(tl.where(present, 1.0 - master_forget, 0.0), 1)[:, None]
    _store_distances(distances, here, rows, in_batch, of_forget, tl.sum(master_in, 1)[:, None], n)
    return master_in, master_forget


@triton.jit
def _maximum_and_scale(gates, product, from_gates, from_product, in_batch, zero, n, FAST: tl.constexpr):
    """(maximum, 1 / sum of e^(x - maximum)), (R, 1), of n gates."""
    m, total = zero - float("inf"), zero
    for start in range(0, n, LONG):
        k = start + tl.arange(0, LONG)[None, :]
        x = _gate(gates, product, from_gates, from_product, k, in_batch & (k < n), float("-inf"))
        before = m
        m = tl.maximum(m, tl.max(x, 1)[:, None])
        # A maximum of -inf, which nothing can be subtracted from, has nothing to correct.
        center = tl.where(m == float("-inf"), 0.0, m)
        total = total * exp(before - center, FAST) + tl.sum(exp(x - center, FAST), 1)[:, None]
    return m, 1.0 / total


@triton.jit
def _long_masters(
    gates,
    product,
    activations,
    distances,
    scratch,
    from_gates,
    from_product,
    here,
    rows,
    in_batch,
    n,
    FAST: tl.constexpr,
):
    """The master gates of any rows, into each row's scratch (2, n)."""
    low = float("-inf")
    zero = tl.zeros(here.shape, distances.dtype.element_ty)
    carry, of_in, of_forget = zero, zero, zero
    m, scale = _maximum_and_scale(gates, product, from_gates, from_product, in_batch, zero, n, FAST)
    blocks = tl.cdiv(n, LONG)
    for i in range(0, blocks):
        k = (blocks - 1 - i) * LONG + tl.arange(0, LONG)[None, :]
        present = in_batch & (k < n)
        if activations is not None:
            x = _gate(gates, product, from_gates, from_product, k, present, low)
            tl.store(activations + from_gates + k, exp(x - m, FAST) * scale, mask=present)
        ahead = _gate(gates, product, from_gates, from_product, k + 1, in_batch & (k + 1 < n), low)
        p = exp(ahead - m, FAST) * scale
        master = carry + tl.cumsum(p, 1, reverse=True)
        carry += tl.sum(p, 1)[:, None]
        of_in += tl.sum(tl.where(present, master, 0.0), 1)[:, None]
        tl.store(scratch + k, master, mask=present)
    carry = zero
    m, scale = _maximum_and_scale(gates, product, from_gates + n, from_product + n, in_batch, zero, n, FAST)
    for start in range(0, n, LONG):
        k = start + tl.arange(0, LONG)[None, :]
        present = in_batch & (k < n)
        p = exp(_gate(gates, product, from_gates + n, from_product + n, k, present, low) - m, FAST) * scale
        if activations is not None:
            tl.store(activations + from_gates + n + k, p, mask=present)
        master = carry + tl.cumsum(p, 1)
        carry += tl.sum(p, 1)[:, None]
        of_forget += tl.sum(tl.where(present, 1.0 - master, 0.0), 1)[:, None]
        tl.store(scratch + n + k, master, mask=present)
    _store_distances(distances, here, rows, in_batch, of_forget, of_in, n)


@triton.jit
def _units(
    gates,
    product,
    hidden,
    cell,
    zoneout,
    output,
    cells,
    activations,
    master_in,
    master_forget,
    row,
    here,
    rows,
    in_batch,
    k,
    c,
    n,
    chunk_size,
    FAST: tl.constexpr,
):
    """The new state of the units (chunks k, c in each)."""
    size, width = n * chunk_size, n * (2 + 4 * chunk_size)
    at = (k[:, None] * chunk_size + c[None, :])[None, :, :]
    present = in_batch[:, :, None] & ((k < n)[:, None] & (c < chunk_size)[None, :])[None, :, :]
    row, here = row[:, :, None], here[:, :, None]
    from_gates, from_product = here * width + 2 * n, row * width + 2 * n
    o = sigmoid(_gate(gates, product, from_gates, from_product, at, present, 0.0), FAST)
    candidate = tanh(_gate(gates, product, from_gates, from_product, at + size, present, 0.0), FAST)
    i = sigmoid(_gate(gates, product, from_gates, from_product, at + 2 * size, present, 0.0), FAST)
    f = sigmoid(_gate(gates, product, from_gates, from_product, at + 3 * size, present, 0.0), FAST)
    if activations is not None:
        tl.store(activations + from_gates + at, o, mask=present)
        tl.store(activations + from_gates + at + size, candidate, mask=present)
        tl.store(activations + from_gates + at + 2 * size, i, mask=present)
        tl.store(activations + from_gates + at + 3 * size, f, mask=present)
    old_c = tl.load(cell + row * size + at, mask=present, other=0.0)
    new_c, _, _, _ = new_cell(master_in[:, :, None], master_forget[:, :, None], candidate, i, f, old_c)
    new_h = o * tanh(new_c, FAST)
    if zoneout is not None:
        keep_c = widened(tl.load(zoneout + here * size + at, mask=present, other=0.0))
        keep_h = widened(tl.load(zoneout + (rows + here) * size + at, mask=present, other=0.0))
        old_h = widened(tl.load(hidden + row * size + at, mask=present, other=0.0))
        new_c = keep_c * old_c + (1 - keep_c) * new_c
        new_h = keep_h * old_h + (1 - keep_h) * new_h
    # Where threads share an element, none may replace it before the last has read it.
    tl.debug_barrier()
    tl.store(cell + row * size + at, new_c, mask=present)
    tl.store(hidden + row * size + at, new_h, mask=present)
    tl.store(output + here * size + at, new_h, mask=present)
    if cells is not None:
        tl.store(cells + here * size + at, new_c, mask=present)


@triton.jit
def step(
    gates,
    product,
    hidden,
    cell,
    zoneout,
    output,
    cells,
    activations,
    distances,
    scratch,
    row,
    begin,
    count,
    rows,
    n,
    chunk_size,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """One step of the sequences `row` (R, 1), if below `count`; the step begins at row `begin` of `rows`. The states in
    `hidden` and `cell` are replaced by the new ones."""
    in_batch = row < count
    here = row + begin
    width = n * (2 + 4 * chunk_size)
    from_gates, from_product = here * width, row * width
    if PHASE == WHOLE:
        m_in, m_forget = _masters(
            gates, product, activations, distances, from_gates, from_product, here, rows, in_batch, n, FAST, N
        )
        k, c = tl.arange(0, N), tl.arange(0, C)
        _units(
            gates, product, hidden, cell, zoneout, output, cells, activations, m_in, m_forget, row, here, rows,
            in_batch, k, c, n, chunk_size, FAST,
        )  # fmt: skip
    elif PHASE == MASTERS:
        mine = scratch + row * 2 * n
        _long_masters(
            gates, product, activations, distances, mine, from_gates, from_product, here, rows, in_batch, n, FAST
        )
    else:
        mine = scratch + row * 2 * n
        for first in range(0, n, N):
            k = first + tl.arange(0, N)
            present = in_batch & (k < n)[None, :]
            m_in = tl.load(mine + k[None, :], mask=present, other=0.0)
            m_forget = tl.load(mine + n + k[None, :], mask=present, other=0.0)
            for column in range(0, chunk_size, C):
                c = column + tl.arange(0, C)
                _units(
                    gates, product, hidden, cell, zoneout, output, cells, activations, m_in, m_forget, row, here, rows,
                    in_batch, k, c, n, chunk_size, FAST,
                )  # fmt: skip


@triton.jit(do_not_specialize=["begin", "count", "rows"])
def on_lstm_cell_kernel(
    gates,
    product,
    hidden,
    cell,
    zoneout,
    output,
    cells,
    activations,
    distances,
    scratch,
    begin,
    count,
    rows,
    n,
    chunk_size,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """`step`, R rows per program."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    step(
        gates, product, hidden, cell, zoneout, output, cells, activations, distances, scratch, row, begin, count, rows,
        n, chunk_size, PHASE, FAST, N, C,
    )  # fmt: skip


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _unit_gradients(
    grad_output,
    product,
    carried_h,
    carried_c,
    zoneout,
    before,
    activations,
    of_gates,
    master_in,
    master_forget,
    row,
    here,
    begin_before,
    later,
    rows,
    in_batch,
    k,
    c,
    n,
    chunk_size,
    FAST: tl.constexpr,
):
    """(gradient of what is written times its part, of what is kept, of the overlap), each summed over `c`, and stored
    what the units' gates and the state before receive."""
    size, width = n * chunk_size, n * (2 + 4 * chunk_size)
    at = (k[:, None] * chunk_size + c[None, :])[None, :, :]
    present = in_batch[:, :, None] & ((k < n)[:, None] & (c < chunk_size)[None, :])[None, :, :]
    row, here = row[:, :, None], here[:, :, None]
    state = row * size + at
    from_gates = here * width + 2 * n
    o = tl.load(activations + from_gates + at, mask=present, other=0.0)
    candidate = tl.load(activations + from_gates + at + size, mask=present, other=0.0)
    i = tl.load(activations + from_gates + at + 2 * size, mask=present, other=0.0)
    f = tl.load(activations + from_gates + at + 3 * size, mask=present, other=0.0)
    old_c = tl.load(before + begin_before * size + state, mask=present, other=0.0)

    grad_h = tl.zeros_like(o)
    if carried_h is not None:
        # Without zoneout nothing but a sequence's end stands there.
        known = present if zoneout is not None else present & (row >= later)
        grad_h += tl.load(carried_h + state, mask=known, other=0.0)
    if product is not None:
        grad_h += widened(tl.load(product + state, mask=present & (row < later), other=0.0))
    if grad_output is not None:
        grad_h += widened(tl.load(grad_output + here * size + at, mask=present, other=0.0))
    grad_c = tl.load(carried_c + state, mask=present, other=0.0)
    # As in `_units`: from here on the carried gradients are replaced.
    tl.debug_barrier()
    past_c = tl.zeros_like(o)
    if zoneout is not None:
        keep_c = widened(tl.load(zoneout + here * size + at, mask=present, other=0.0))
        keep_h = widened(tl.load(zoneout + (rows + here) * size + at, mask=present, other=0.0))
        past_c = grad_c * keep_c
        tl.store(carried_h + state, grad_h * keep_h, mask=present)
        grad_c -= past_c
        grad_h -= grad_h * keep_h

    d_o, d_candidate, d_i, d_f, d_c, d_written, d_kept = state_gradients(
        master_in[:, :, None], master_forget[:, :, None], o, candidate, i, f, old_c, grad_h, grad_c, FAST
    )
    tl.store(of_gates + from_gates + at, d_o, mask=present)
    tl.store(of_gates + from_gates + at + size, d_candidate, mask=present)
    tl.store(of_gates + from_gates + at + 2 * size, d_i, mask=present)
    tl.store(of_gates + from_gates + at + 3 * size, d_f, mask=present)
    tl.store(carried_c + state, d_c + past_c, mask=present)
    d_overlap = tl.sum(d_written * (i - 1.0) + d_kept * (f - 1.0), 2)
    return tl.sum(d_written, 2), tl.sum(d_kept, 2), d_overlap


@triton.jit
def _of_masters(d_written, d_kept, d_overlap, master_in, master_forget, grad_distances, here, rows, in_batch, n, k):
    """Gradients of (i~, f~), zero outside the row."""
    present = in_batch & (k < n)[None, :]
    d_in = d_written + d_overlap * master_forget
    d_forget = d_kept + d_overlap * master_in
    if grad_distances is not None:
        d_forget -= widened(tl.load(grad_distances + here, mask=in_batch, other=0.0)) / n
        d_in += widened(tl.load(grad_distances + rows + here, mask=in_batch, other=0.0)) / n
    return tl.where(present, d_in, 0.0), tl.where(present, d_forget, 0.0)


@triton.jit
def _softmax_gradients(activations, of_gates, scratch, in_batch, zero, n):
    """The gradients of the master gates, which lie in each row's scratch (2, n), to those of their logits."""
    # Over i~ from the left, over f~ from the right; the first time for sum p d alone.
    mean = zero
    for writing in tl.static_range(2):
        carry = zero
        for start in range(0, n, LONG):
            k = start + tl.arange(0, LONG)[None, :]
            present = in_batch & (k < n)
            g = tl.load(scratch + k, mask=present, other=0.0)
            p = tl.load(activations + k, mask=present, other=0.0)
            d = carry + (tl.cumsum(g, 1) - g)
            carry += tl.sum(g, 1)[:, None]
            if writing:
                tl.store(of_gates + k, p * (d - mean), mask=present)
            else:
                mean += tl.sum(p * d, 1)[:, None]
    mean = zero
    blocks = tl.cdiv(n, LONG)
    for writing in tl.static_range(2):
        carry = zero
        for i in range(0, blocks):
            k = (blocks - 1 - i) * LONG + tl.arange(0, LONG)[None, :]
            present = in_batch & (k < n)
            g = tl.load(scratch + n + k, mask=present, other=0.0)
            p = tl.load(activations + n + k, mask=present, other=0.0)
            d = carry + tl.cumsum(g, 1, reverse=True)
            carry += tl.sum(g, 1)[:, None]
            if writing:
                tl.store(of_gates + n + k, p * (d - mean), mask=present)
            else:
                mean += tl.sum(p * d, 1)[:, None]


@triton.jit
def _masters_again(activations, scratch, in_batch, zero, n):
    """The master gates from the softmaxes that were kept, into each row's scratch (2, n)."""
    carry = zero
    blocks = tl.cdiv(n, LONG)
    for i in range(0, blocks):
        k = (blocks - 1 - i) * LONG + tl.arange(0, LONG)[None, :]
        p = tl.load(activations + k + 1, mask=in_batch & (k + 1 < n), other=0.0)
        tl.store(scratch + k, carry + tl.cumsum(p, 1, reverse=True), mask=in_batch & (k < n))
        carry += tl.sum(p, 1)[:, None]
    carry = zero
    for start in range(0, n, LONG):
        k = start + tl.arange(0, LONG)[None, :]
        p = tl.load(activations + n + k, mask=in_batch & (k < n), other=0.0)
        tl.store(scratch + n + k, carry + tl.cumsum(p, 1), mask=in_batch & (k < n))
        carry += tl.sum(p, 1)[:, None]


@triton.jit
def step_back(
    grad_output,
    product,
    carried_h,
    carried_c,
    grad_distances,
    zoneout,
    before,
    activations,
    of_gates,
    scratch,
    row,
    begin,
    begin_before,
    count,
    later,
    rows,
    n,
    chunk_size,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """One step of the sequences `row` (R, 1), if below `count`; the step begins at row `begin` of `rows`, the cell
    states before it at `begin_before` of `before`.

    The first `later` sequences have a step behind this one, from which `product` is the hidden state's gradient. The
    gradients in `carried_h` and `carried_c`, of the state behind this step, are replaced by those of the state before;
    the hidden state's with zoneout alone, and without what goes through the gates.
    """
    in_batch = row < count
    here = row + begin
    from_gates = here * (n * (2 + 4 * chunk_size))
    if PHASE == WHOLE:
        k, c = tl.arange(0, N), tl.arange(0, C)
        at = from_gates + k[None, :]
        present = in_batch & (k < n)[None, :]
        p_ahead = tl.load(activations + at + 1, mask=in_batch & (k + 1 < n)[None, :], other=0.0)
        q = tl.load(activations + at + n, mask=present, other=0.0)
        m_in, m_forget = tl.cumsum(p_ahead, 1, reverse=True), tl.cumsum(q, 1)
        d_written, d_kept, d_overlap = _unit_gradients(
            grad_output, product, carried_h, carried_c, zoneout, before, activations, of_gates, m_in, m_forget, row,
            here, begin_before, later, rows, in_batch, k, c, n, chunk_size, FAST,
        )  # fmt: skip
        d_in, d_forget = _of_masters(
            d_written, d_kept, d_overlap, m_in, m_forget, grad_distances, here, rows, in_batch, n, k
        )
        # p_j is in every i~ before it, and in every f~ from it on.
        p = tl.load(activations + at, mask=present, other=0.0)
        d_p, d_q = tl.cumsum(d_in, 1) - d_in, tl.cumsum(d_forget, 1, reverse=True)
        tl.store(of_gates + at, p * (d_p - tl.sum(p * d_p, 1)[:, None]), mask=present)
        tl.store(of_gates + at + n, q * (d_q - tl.sum(q * d_q, 1)[:, None]), mask=present)
    elif PHASE == MASTERS:
        zero = tl.zeros(row.shape, carried_c.dtype.element_ty)
        _masters_again(activations + from_gates, scratch + row * 4 * n, in_batch, zero, n)
    elif PHASE == UNITS:
        masters = scratch + row * 4 * n
        for first in range(0, n, N):
            k = first + tl.arange(0, N)
            present = in_batch & (k < n)[None, :]
            m_in = tl.load(masters + k[None, :], mask=present, other=0.0)
            m_forget = tl.load(masters + n + k[None, :], mask=present, other=0.0)
            d_written, d_kept, d_overlap = tl.zeros_like(m_in), tl.zeros_like(m_in), tl.zeros_like(m_in)
            for column in range(0, chunk_size, C):
                c = column + tl.arange(0, C)
                of_written, of_kept, of_overlap = _unit_gradients(
                    grad_output, product, carried_h, carried_c, zoneout, before, activations, of_gates, m_in, m_forget,
                    row, here, begin_before, later, rows, in_batch, k, c, n, chunk_size, FAST,
                )  # fmt: skip
                d_written += of_written
                d_kept += of_kept
                d_overlap += of_overlap
            d_in, d_forget = _of_masters(
                d_written, d_kept, d_overlap, m_in, m_forget, grad_distances, here, rows, in_batch, n, k
            )
            tl.store(masters + 2 * n + k[None, :], d_in, mask=present)
            tl.store(masters + 3 * n + k[None, :], d_forget, mask=present)
    else:
        zero = tl.zeros(row.shape, carried_c.dtype.element_ty)
        mine = scratch + row * 4 * n + 2 * n
        _softmax_gradients(activations + from_gates, of_gates + from_gates, mine, in_batch, zero, n)


@triton.jit(do_not_specialize=["begin", "begin_before", "count", "later", "rows"])
def on_lstm_cell_backward_kernel(
    grad_output,
    product,
    carried_h,
    carried_c,
    grad_distances,
    zoneout,
    before,
    activations,
    of_gates,
    scratch,
    begin,
    begin_before,
    count,
    later,
    rows,
    n,
    chunk_size,
    PHASE: tl.constexpr,
    FAST: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """`step_back`, R rows per program."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    step_back(
        grad_output, product, carried_h, carried_c, grad_distances, zoneout, before, activations, of_gates, scratch,
        row, begin, begin_before.to(tl.int64), count, later, rows, n, chunk_size, PHASE, FAST, N, C,
    )  # fmt: skip
