# SPDX-License-Identifier: Apache-2.0
"""Kernels of Sinkhorn scaling: steps of the rows and of the columns over tiles of logits; see
`sinkhorn/tiles.py` for the tiles and potentials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.fold import finite, lse_init
from ..common.sweep import UNSPECIALISED, offset
from .tiles import begin_of, parts_of, scale_of, side_of, store_parts, tile_of, whole_of

# A column mass below this has lost digits: `rescue_kernel` computes its logarithm again.
LEAST = tl.constexpr(2.0**-100)
# Bits of a word of flags: the problem has an active row; a value is not finite; a row or column has
# no finite logit.
ACTIVE_BIT = tl.constexpr(1)
NOT_FINITE_BIT = tl.constexpr(2)
STUCK_BIT = tl.constexpr(4)
# Status codes, equal to `python_fallback/sinkhorn/scaling.py`; a test compares them.
FINE = tl.constexpr(0)
NOT_FINITE = tl.constexpr(2)
INFEASIBLE = tl.constexpr(3)
EMPTY = tl.constexpr(4)
# Words and partial sums of one load.
PIECE = tl.constexpr(128)
SPLITS = tl.constexpr(32)
# Rows whose logarithms `pass_kernel` computes together.
TAIL = tl.constexpr(256)


@triton.jit
def top_and_total(
    MINE, OTHER, scale, P, step, at, exists, begin, end, size,
    BY_ROWS: tl.constexpr, STARTED: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
    UNIT: tl.constexpr, SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """(top, total) of the own rows or columns: top = max_j z_j, total = sum_j exp(z_j - top) with
    z_j = logits_j + P_j, j in [begin, end) of the swept side of `size`. P is 0 unless STARTED.
    """
    mine = side_of(MINE, at, exists, D, DIM, FORM)  # [OWN, DIM] if "narrow"
    top, total = lse_init(at.shape[0])
    for w0 in tl.range(begin, end, SWEPT, num_stages=STAGES):
        w = (w0 + tl.arange(0, SWEPT)).to(tl.int64)
        valid = w < end
        x = tile_of(  # [OWN, SWEPT]
            MINE, OTHER, mine, scale, step, at, exists, w, valid, BY_ROWS, D, DIM, UNIT, FORM, PREC
        )  # fmt: skip
        if STARTED:
            high, low = parts_of(P, w, size, valid)
            masked = high == float("-inf")
            # [OWN, SWEPT]
            x = tl.where(masked[None, :], float("-inf"), (x + high[None, :]) + low[None, :])
        else:
            x = tl.where(valid[None, :], x, float("-inf"))  # [OWN, SWEPT]
        best = tl.maximum(top, tl.max(x, 1))
        safe = finite(best)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        top = best
    return top, total


@triton.jit
def word_of(bits):
    """The bitwise or of all entries."""
    some = tl.max(bits & ACTIVE_BIT, 0) | tl.max(bits & NOT_FINITE_BIT, 0)
    return some | tl.max(bits & STUCK_BIT, 0)


@triton.jit
def potential_of(top, total, log_mass, valid):
    """(log_mass - top - log(total), the flags) of rows or columns: -inf and STUCK_BIT where total
    is 0, NaN and NOT_FINITE_BIT where a number is not finite, -inf where not `valid`.
    """
    invalid = valid & ~(total < float("inf"))
    stuck = valid & (total == 0.0)
    lse = finite(top).to(tl.float64) + tl.log(tl.where(total > 0.0, total, 1.0).to(tl.float64))
    potential = tl.where(valid & ~stuck, log_mass - lse, float("-inf"))
    invalid = invalid | (valid & ~(log_mass < float("inf")))
    bits = tl.where(valid, ACTIVE_BIT, 0) | tl.where(invalid, NOT_FINITE_BIT, 0)
    bits |= tl.where(stuck, STUCK_BIT, 0)
    return tl.where(invalid, float("nan"), potential), bits


@triton.jit
def log_row(LOG_ROW, p, row, rows, here, HAS_ROW: tl.constexpr):
    """Logarithm of the masses of rows in float64, -log(N) without LOG_ROW."""
    if HAS_ROW:
        log_mass = tl.load(LOG_ROW + p * rows + row, mask=here, other=float("-inf"))
    else:
        log_mass = tl.where(here, -tl.log(tl.cast(rows, tl.float64)), float("-inf"))
    return log_mass


@triton.jit
def heaviest_of(HEAVIEST, problem, rows, HAS_ROW: tl.constexpr):
    """Logarithm of the largest mass of a row."""
    if HAS_ROW:
        heaviest = tl.load(HEAVIEST + problem)
        heaviest = tl.where(heaviest == float("-inf"), 0.0, heaviest)
    else:
        heaviest = -tl.log(tl.cast(rows, tl.float64))
    return heaviest


# ---- one side after the other --------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def rows_kernel(
    X, C, SCALE, G, LOG_ROW, F, WORD,
    rows, count, inner, blocks, step, x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    """The step of OWN rows: F_n = log_row_n - logsumexp_j(logits_nj + G_j); `count` is in UNITs."""
    pid = tl.program_id(0)
    problem = pid // blocks
    p = problem.to(tl.int64)
    at = ((pid % blocks) * OWN + tl.arange(0, OWN)).to(tl.int64)
    exists = at < rows
    k = count * UNIT
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, True, D, UNIT, FORM)
    top, total = top_and_total(
        mine, other, scale_of(SCALE, problem, HAS_SCALE), G + 2 * p * k, step, at, exists, 0, k, k,
        True, True, D, DIM, UNIT, SWEPT, FORM, PREC, STAGES,
    )  # fmt: skip
    log_mass = log_row(LOG_ROW, p, at, rows, exists, HAS_ROW)
    potential, bits = potential_of(top, total, log_mass, log_mass != float("-inf"))
    store_parts(F + 2 * p * rows, at, rows, exists, potential)
    tl.store(WORD + pid, word_of(bits))


@triton.jit(do_not_specialize=UNSPECIALISED)
def columns_kernel(
    X, C, SCALE, F, TOP, SUM,
    rows, count, inner, blocks, splits, share, step, x_o, x_i, c_o, c_i,
    D: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr,
    SWEPT: tl.constexpr, FORM: tl.constexpr, PREC: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, STARTED: tl.constexpr,
):  # fmt: skip
    """TOP_k = max_n z_nk and SUM_k = sum_n exp(z_nk - TOP_k) of OWN columns k, over one chunk of
    `share` rows n, with z = logits + F. F is 0 unless STARTED.
    """
    pid = tl.program_id(0)
    block, split, problem = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    p = problem.to(tl.int64)
    at = (block * OWN + tl.arange(0, OWN)).to(tl.int64)
    k = count * UNIT
    exists = at < k
    begin, end = split * share, tl.minimum(split * share + share, rows)
    mine, other = begin_of(X, C, problem, inner, x_o, x_i, c_o, c_i, False, D, UNIT, FORM)
    potentials = F + 2 * p * rows if STARTED else 0
    top, total = top_and_total(
        mine, other, scale_of(SCALE, problem, HAS_SCALE), potentials,
        step, at, exists, begin, end, rows,
        False, STARTED, D, DIM, UNIT, SWEPT, FORM, PREC, STAGES,
    )  # fmt: skip
    slot = (p * splits + split) * k + at
    tl.store(TOP + slot, top, mask=exists)
    tl.store(SUM + slot, total, mask=exists)


# ---- both sides in one read ----------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALISED)
def pass_kernel(
    X, SCALE, G, LOG_ROW, HEAVIEST, F, TOP, TOTAL, PART, WORD,
    rows, count, inner, splits, share, step, x_o, x_i,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    """The rows' step F_n = log_row_n - logsumexp_k(logits_nk + G_k) of a chunk, and the masses of
    its columns after it: PART_k = sum_n exp(log_row_n - HEAVIEST) p_nk, p_n = softmax_k(logits_n +
    G). Whole rows are in registers, so one read and one exponential of an entry give both. Masses
    are relative to exp(HEAVIEST), the largest mass of a row: no weight is over 1.
    """
    pid = tl.program_id(0)
    problem, part = pid // splits, pid % splits
    p = problem.to(tl.int64)
    k, kinds = tl.arange(0, COLUMNS), count * UNIT
    exists = k < kinds
    high, low = parts_of(G + 2 * p * kinds, k, kinds, exists)
    masked = high == float("-inf")
    X += offset(problem, inner, x_o, x_i) * UNIT
    TOP += p * rows
    TOTAL += p * rows
    far = tl.cast(step, tl.int64) * UNIT
    scale = scale_of(SCALE, problem, HAS_SCALE)
    heaviest = heaviest_of(HEAVIEST, problem, rows, HAS_ROW)
    mass = tl.zeros((COLUMNS,), tl.float32)
    begin = part * share
    end = tl.minimum(begin + share, rows)
    for n0 in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = (n0 + tl.arange(0, ROWS)).to(tl.int64)
        here = row < end
        where = row[:, None] * far + k[None, :]  # [ROWS, COLUMNS]
        x = tl.load(X + where, mask=here[:, None] & exists[None, :], other=0.0)  # [ROWS, COLUMNS]
        x = x.to(tl.float32) * scale  # [ROWS, COLUMNS]
        weight, valid = tl.where(here, 1.0, 0.0), here
        if HAS_ROW:
            log_mass = tl.load(LOG_ROW + p * rows + row, mask=here, other=float("-inf"))
            weight = tl.exp((log_mass - heaviest).to(tl.float32))
            valid = log_mass != float("-inf")
        out = masked[None, :] | ~valid[:, None]  # [ROWS, COLUMNS]
        x = tl.where(out, float("-inf"), (x + high[None, :]) + low[None, :])  # [ROWS, COLUMNS]
        top = tl.max(x, 1)
        x = tl.exp(x - finite(top)[:, None])  # [ROWS, COLUMNS]
        total = tl.sum(x, 1)
        weight = tl.where(total == 0.0, 0.0, weight / tl.where(total == 0.0, 1.0, total))
        mass += tl.sum(x * weight[:, None], 0)
        tl.store(TOP + row, top, mask=here)
        tl.store(TOTAL + row, total, mask=here)
    tl.store(PART + pid.to(tl.int64) * kinds + k, mass, mask=exists)
    tl.debug_barrier()
    # logarithms in float64 here, where each thread has rows of its own: above, all threads share
    # few
    bits = tl.zeros((TAIL,), tl.int32)
    for n0 in range(begin, end, TAIL):
        row = (n0 + tl.arange(0, TAIL)).to(tl.int64)
        here = row < end
        log_mass = log_row(LOG_ROW, p, row, rows, here, HAS_ROW)
        top = tl.load(TOP + row, mask=here, other=0.0)
        total = tl.load(TOTAL + row, mask=here, other=0.0)
        potential, more = potential_of(top, total, log_mass, log_mass != float("-inf"))
        bits |= more
        store_parts(F + 2 * p * rows, row, rows, here, potential)
    tl.store(WORD + pid, word_of(bits))


# ---- the columns' step --------------------------------------------------------------------------


@triton.jit
def merge_parts(TOP, SUM, at, exists, count, splits, COLUMNS: tl.constexpr, FUSED: tl.constexpr):
    """(top, total) over the chunks s in their order: top = max_s TOP_s, total = sum_s SUM_s
    exp(TOP_s - top). FUSED parts have no TOP: it is 0.
    """
    top = tl.full((COLUMNS,), float("-inf"), tl.float32)
    if not FUSED:
        for s0 in range(0, splits, SPLITS):
            s = (s0 + tl.arange(0, SPLITS)).to(tl.int64)
            inside = (s < splits)[:, None] & exists[None, :]  # [SPLITS, COLUMNS]
            # [SPLITS, COLUMNS]
            here = tl.load(TOP + s[:, None] * count + at[None, :], mask=inside, other=float("-inf"))
            top = tl.maximum(top, tl.max(here, 0))
    safe = finite(top)
    total = tl.zeros((COLUMNS,), tl.float64)
    for s0 in range(0, splits, SPLITS):
        s = (s0 + tl.arange(0, SPLITS)).to(tl.int64)
        inside = (s < splits)[:, None] & exists[None, :]  # [SPLITS, COLUMNS]
        where = s[:, None] * count + at[None, :]  # [SPLITS, COLUMNS]
        share = tl.load(SUM + where, mask=inside, other=0.0)  # [SPLITS, COLUMNS]
        if not FUSED:
            here = tl.load(TOP + where, mask=inside, other=float("-inf"))  # [SPLITS, COLUMNS]
            share = share * tl.exp(here - safe[None, :])  # [SPLITS, COLUMNS]
        total += tl.sum(share.to(tl.float64), 0)
    return safe, total


@triton.jit
def log_column(LOG_COL, G, p, at, exists, count, HAS_COL: tl.constexpr, COVERED: tl.constexpr):
    """Logarithm of the masses of columns in float64, -log(K) without LOG_COL. Columns that need not
    be COVERED have no mass to reach: 0, or -inf where G is.
    """
    if COVERED:
        if HAS_COL:
            log_b = tl.load(LOG_COL + p * count + at, mask=exists, other=float("-inf"))
        else:
            log_b = tl.where(exists, -tl.log(tl.cast(count, tl.float64)), float("-inf"))
    else:
        g, _ = parts_of(G + 2 * p * count, at, count, exists)
        log_b = tl.where(g == float("-inf"), float("-inf"), 0.0).to(tl.float64)
    return log_b


@triton.jit(do_not_specialize=UNSPECIALISED)
def merge_kernel(
    TOP, SUM, G, LOG_COL, BIAS, HEAVIEST, OUT, MASS, ERR, NEED, WORD, ROW_WORD,
    rows, count, blocks, splits, strip, first,
    COLUMNS: tl.constexpr, FUSED: tl.constexpr, USED: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr, HAS_BIAS: tl.constexpr, COVERED: tl.constexpr,
):  # fmt: skip
    """The step of COLUMNS columns from the parts of the chunks: OUT_k = log_col_k - lse_k, lse_k
    = logsumexp_n(logits_nk + F_n). USED, after a rows' step at G: MASS_k = G_k + lse_k, and ERR =
    sum_k |exp(MASS_k) - exp(log_col_k)|. FUSED: the parts are masses, and NEED marks the columns
    whose mass is too small. G has the BIAS in it already; here it is only checked. WORD takes the
    flags of the rows, `strip` words a problem, and of earlier merges unless this is the
    `first`.
    """
    pid = tl.program_id(0)
    problem, block = pid // blocks, pid % blocks
    p = problem.to(tl.int64)
    at = (block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    exists = at < count
    parts = p * splits * count
    tops = 0 if FUSED else TOP + parts
    top, total = merge_parts(tops, SUM + parts, at, exists, count, splits, COLUMNS, FUSED)
    log_b = log_column(LOG_COL, G, p, at, exists, count, HAS_COL, COVERED)
    active = log_b != float("-inf")
    some = total > 0.0
    lse = top.to(tl.float64) + tl.log(tl.where(some, total, 1.0))
    lse = tl.where(total == 0.0, float("-inf"), tl.where(some, lse, float("nan")))
    stuck = active & (lse == float("-inf"))
    invalid = active & ~((lse < float("inf")) & (log_b < float("inf")))
    if USED:
        g = whole_of(G + 2 * p * count, at, count, exists)
        mass = g + lse
        if FUSED:  # the sums are masses already; `rescue_kernel` serves those that are too small
            mass = lse + heaviest_of(HEAVIEST, problem, rows, HAS_ROW)
            lse = mass - tl.where(g == float("-inf"), 0.0, g)
            tl.store(NEED + p * count + at, (active & (total < LEAST)).to(tl.int32), mask=exists)
        mass = tl.where(active & (g != float("-inf")), mass, float("-inf"))
        tl.store(MASS + p * count + at, mass, mask=exists)
        gap = tl.where(active, tl.abs(tl.exp(mass) - tl.exp(log_b)), 0.0)
        tl.store(ERR + pid, tl.sum(gap, 0))
    if FUSED or not COVERED:
        stuck = stuck & False
    if HAS_BIAS:
        bias = tl.load(BIAS + p * count + at, mask=exists, other=0.0)
        invalid = invalid | (active & ~(bias < float("inf")))
        stuck = stuck | (active & (bias == float("-inf")))
    potential = tl.where(active & (lse != float("-inf")), log_b - lse, float("-inf"))
    store_parts(OUT + 2 * p * count, at, count, exists, potential)
    word = word_of(tl.where(invalid, NOT_FINITE_BIT, 0) | tl.where(stuck, STUCK_BIT, 0))
    if USED:
        share = tl.cdiv(strip, blocks)
        for w0 in range(block * share, tl.minimum(block * share + share, strip), PIECE):
            w = w0 + tl.arange(0, PIECE)
            inside = (w < block * share + share) & (w < strip)
            word |= word_of(tl.load(ROW_WORD + p * strip + w, mask=inside, other=0))
    later = tl.zeros((1,), tl.int32) + first == 0
    here = WORD + pid + tl.arange(0, 1)
    tl.store(here, tl.load(here, mask=later, other=0) | word)


@triton.jit(do_not_specialize=UNSPECIALISED)
def rescue_kernel(
    X, SCALE, F, G, LOG_COL, NEED, OUT, MASS, WORD,
    rows, count, inner, blocks, step, x_o, x_i,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, SWEPT: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_COL: tl.constexpr, COVERED: tl.constexpr,
):  # fmt: skip
    """The step of the columns k that NEED marks, from all logits: OUT_k = log_col_k - lse_k, MASS_k
    = G_k + lse_k, lse_k = logsumexp_n(logits_nk + F_n). Without such a column, the usual case, a
    program ends at once.
    """
    pid = tl.program_id(0)
    problem = pid // blocks
    p = problem.to(tl.int64)
    at = ((pid % blocks) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    k = count * UNIT
    need = tl.load(NEED + p * k + at, mask=at < k, other=0) > 0
    if tl.max(need.to(tl.int32), 0) > 0:
        X += offset(problem, inner, x_o, x_i) * UNIT
        top, total = top_and_total(
            X, X, scale_of(SCALE, problem, HAS_SCALE), F + 2 * p * rows,
            step, at, need, 0, rows, rows,
            False, True, 1, 16, UNIT, SWEPT, "scores", "ieee", 1,
        )  # fmt: skip
        log_b = log_column(LOG_COL, G, p, at, need, k, HAS_COL, COVERED)
        potential, bits = potential_of(top, total, log_b, need)
        store_parts(OUT + 2 * p * k, at, k, need, potential)
        g = whole_of(G + 2 * p * k, at, k, need)
        lse = tl.where(potential == float("-inf"), potential, log_b - potential)
        tl.store(MASS + p * k + at, tl.where(g == float("-inf"), g, g + lse), mask=need)
        word = word_of(bits) & NOT_FINITE_BIT
        if COVERED:
            word = word_of(bits) & (NOT_FINITE_BIT | STUCK_BIT)
        tl.store(WORD + pid, tl.load(WORD + pid) | word)


@triton.jit(do_not_specialize=UNSPECIALISED)
def finish_kernel(
    F, G, BIAS, ERR, WORD, OUT_F, OUT_G, OUT_ERR, STATUS,
    rows, count, blocks, splits, strip,
    SIZE: tl.constexpr, MASSES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Results in float32: f, g - BIAS, the sum of the errors and the status; NaN for problems that
    failed, f = -inf and g = 0 for problems without an active row. MASSES: G are the logarithms of
    masses in float64, and there is no error. `strip` words and `splits` errors a problem.
    """
    pid = tl.program_id(0)
    problem, block = pid // blocks, pid % blocks
    p = problem.to(tl.int64)
    bits = tl.zeros((PIECE,), tl.int32)
    for w0 in range(0, strip, PIECE):
        w = w0 + tl.arange(0, PIECE)
        bits |= tl.load(WORD + p * strip + w, mask=w < strip, other=0)
    word = word_of(bits)
    empty = (word & ACTIVE_BIT) == 0
    failed = ((word & (NOT_FINITE_BIT | STUCK_BIT)) != 0) & ~empty
    at = (block * SIZE + tl.arange(0, SIZE)).to(tl.int64)
    inside = at < rows
    f = whole_of(F + 2 * p * rows, at, rows, inside).to(tl.float32)
    f = tl.where(failed, float("nan"), tl.where(empty, float("-inf"), f))
    tl.store(OUT_F + p * rows + at, f, mask=inside)
    inside = at < count
    if MASSES:
        g = tl.load(G + p * count + at, mask=inside, other=0.0)
    else:
        g = whole_of(G + 2 * p * count, at, count, inside)
    if HAS_BIAS:
        g = tl.where(g == float("-inf"), g, g - tl.load(BIAS + p * count + at, mask=inside))
    g = tl.where(empty, float("-inf") if MASSES else 0.0, g.to(tl.float32))
    tl.store(OUT_G + p * count + at, tl.where(failed, float("nan"), g), mask=inside)
    if block == 0:
        if not MASSES:
            total = tl.zeros((PIECE,), tl.float64)
            for e0 in range(0, splits, PIECE):
                e = e0 + tl.arange(0, PIECE)
                total += tl.load(ERR + p * splits + e, mask=e < splits, other=0.0)
            err = tl.sum(total, 0).to(tl.float32)
            err = tl.where(failed, float("nan"), tl.where(empty, 0.0, err))
            tl.store(OUT_ERR + problem, err)
        bad = (word & NOT_FINITE_BIT) != 0
        code = tl.where(bad, NOT_FINITE, tl.where((word & STUCK_BIT) != 0, INFEASIBLE, FINE))
        tl.store(STATUS + problem, tl.where(empty, EMPTY, code).to(tl.int64))
