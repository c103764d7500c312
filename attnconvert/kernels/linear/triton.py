"""Triton kernels of `linear_attention`: forward and backward, linear in T in time and memory, features never in HBM.

The maths and the names are reference.py's; docs/kernels.md draws the passes. Geometry:

* Tokens are cut into blocks of BN keys or BM queries. `states[j]` is the sum of phi(k) v^T over the keys before token j * CS that belong to
  the document of token j * CS - 1 (`state_kernel`, serial inside a segment of the sequence, parallel over segments; `prefix_kernel`
  carries the sums over segments, and who reads a state adds its segment's start).
* `output_kernel` handles BM queries of a head: the state at x = the last multiple of CS before the first query's window, then the keys
  from x on that are already linear (none for a block window of CS), then softmax over sinks and window.
* Backward: `reverse_state_kernel` sums a phi(q) dy^T from the end, `query_grad_kernel` and `key_grad_kernel` are parallel over blocks,
  `sink_grad_kernel` adds up what far queries send to a document's first keys, `map_grad_kernel` contracts over tokens, in parts that
  `parameter_grad_kernel` adds. Every sum has one owner and a fixed order: two runs are bit-equal.

A pair (query n, key i) is handled exactly once: by the window loop of n's block if i >= its first key block, else by the sink block if i is a
sink, else by the state or the linear loop. `key_grad_kernel` draws the same lines from the key's side.

Inside, logits and log-sums are in units of log 2 (exp2 is the hardware's exponential).
"""

from __future__ import annotations

import functools
from typing import Any

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.linear.reference import FEATURE_FLOOR, GATE_LIMIT

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(FEATURE_FLOOR)
LIMIT = tl.constexpr(GATE_LIMIT)
NEG = tl.constexpr(float("-inf"))
# No row with a linear set comes near: its denominator holds at least two features' floor. Rows without one would overflow, and 0 * inf is NaN.
MAX_LOG_FACTOR = tl.constexpr(100.0)


@triton.jit
def _window_start(n, start, C: tl.constexpr, BLOCK: tl.constexpr):
    """reference.window_start, as an absolute key index; n, start: int32 tensors or scalars."""
    if C == 0:
        return n + 1
    elif BLOCK:
        return start + tl.maximum(((n - start) // C - 1) * C, 0)
    else:
        return start + tl.maximum(n - start - C + 1, 0)


@triton.jit
def _first_far(i, start, C: tl.constexpr, BLOCK: tl.constexpr):
    """The first query that has key i outside its window: `_window_start` seen from the key. i, start: int32 scalars."""
    if C == 0:
        return i
    elif BLOCK:
        return start + (tl.maximum(i - start, 0) // C + 2) * C
    else:
        return i + C


@triton.jit
def _in_softmax(i, n, start, lo, A, BETWEEN: tl.constexpr):
    """Which keys of a block at or after the first window are in the softmax branch; i, n, start, lo broadcast against each other.

    Without keys between state and windows all queries of a block share one window, which starts where the block's keys do.
    """
    if BETWEEN:
        return (i <= n) & (i >= start) & ((i >= lo) | (i < start + A))
    else:
        return i <= n


@triton.jit
def _tile(base, rows, stride, row_ok, cols, D: tl.constexpr, EVEN: tl.constexpr):
    """[rows, cols] of a row-major matrix; rows outside row_ok and columns >= D read 0."""
    if EVEN:
        return tl.load(base + rows[:, None] * stride + cols[None, :], mask=row_ok[:, None], other=0.0)
    else:
        return tl.load(base + rows[:, None] * stride + cols[None, :], mask=row_ok[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def _map(W, of, od, F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A head's map as [D, F], or transposed as [F, D]."""
    if TRANSPOSED:
        pointers = W + of[:, None] + od[None, :] * F
        ok = (of < F)[:, None] & (od < D)[None, :]
    else:
        pointers = W + od[:, None] * F + of[None, :]
        ok = (od < D)[:, None] & (of < F)[None, :]
    if F == FP and D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=ok, other=0.0)


@triton.jit
def _feature(y, projected, power, keep, AXIS: tl.constexpr, F: tl.constexpr, EVEN: tl.constexpr, GATES: tl.constexpr):
    """One half of phi: y = +-xW with features along AXIS; projected broadcasts against it; keep: features that exist."""
    if not EVEN:
        y = tl.where(keep, y, NEG)
    largest = tl.max(y, AXIS, keep_dims=True)
    e = tl.exp2(y * LOG2E - largest * LOG2E)
    total = tl.sum(e, AXIS, keep_dims=True)
    if GATES:
        gate = projected + power * (largest + (tl.log2(total) - tl.log2(tl.full([], F, tl.float32))) * LN2)
        gate = tl.minimum(tl.maximum(gate, -LIMIT), LIMIT)
        e = e * (tl.exp2(gate * LOG2E) / total)
    else:
        e = e * (1.0 / total)
    e = tl.maximum(e, FLOOR)
    if not EVEN:
        e = tl.where(keep, e, 0.0)
    return e


@triton.jit
def _feature_grad(y, grad, projected, power, keep, F: tl.constexpr, EVEN: tl.constexpr, GATES: tl.constexpr):
    """Gradient of `_feature` along axis 1 -> (d y, d log feature [rows, 1], d gate, d power [rows, 1])."""
    if not EVEN:
        y = tl.where(keep, y, NEG)
    largest = tl.max(y, 1, keep_dims=True)
    share = tl.exp2(y * LOG2E - largest * LOG2E)
    total = tl.sum(share, 1, keep_dims=True)
    share = share * (1.0 / total)
    if GATES:
        log_mean = largest + (tl.log2(total) - tl.log2(tl.full([], F, tl.float32))) * LN2
        gate = projected + power * log_mean
        inside = (gate >= -LIMIT) & (gate <= LIMIT)
        feature = share * tl.exp2(tl.minimum(tl.maximum(gate, -LIMIT), LIMIT) * LOG2E)
        grad = tl.where(feature >= FLOOR, grad, 0.0)
        if not EVEN:
            grad = tl.where(keep, grad, 0.0)
        weighted = feature * grad
        d_log = tl.sum(weighted, 1, keep_dims=True)
        d_gate = tl.where(inside, d_log, 0.0)
        return weighted + share * (power * d_gate - d_log), d_log, d_gate, d_gate * log_mean
    else:
        grad = tl.where(share >= FLOOR, grad, 0.0)
        if not EVEN:
            grad = tl.where(keep, grad, 0.0)
        weighted = share * grad
        d_log = tl.sum(weighted, 1, keep_dims=True)
        return weighted - share * d_log, d_log, d_log, d_log


@triton.jit
def _projection(x, GATE, od, D: tl.constexpr, DP: tl.constexpr):
    """x.u / sqrt(D) [rows] for a gate [D + 1] at GATE."""
    direction = tl.load(GATE + od, mask=od < D, other=0.0)
    return tl.sum(x.to(tl.float32) * direction[None, :], 1) * D**-0.5


@triton.jit
def _state_half(S, offset, used, of, ov, F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """One half [F, D] (or [D, F]) of a stored state, or of what its segment starts from; zeros where not used."""
    end = tl.where(used, F, 0)
    if TRANSPOSED:
        return tl.load(S + offset + of[None, :] * D + ov[:, None], mask=(of < end)[None, :] & (ov < D)[:, None], other=0.0)
    else:
        return tl.load(S + offset + of[:, None] * D + ov[None, :], mask=(of < end)[:, None] & (ov < D)[None, :], other=0.0)


@triton.jit
def _times_state(x, acc, S, SEG, CARRY, offset, seg_offset, carry_offset, use_seg, of, ov, F: tl.constexpr, FP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """Adds x times one half of a state to acc: what is stored, counted from its segment's start, and what the segment starts from."""
    state = _state_half(S, offset, True, of, ov, F, FP, D, DP, TRANSPOSED)
    if SPLIT and DP * FP > 128 * 64:
        # a second matrix beside a large one spills more than the sum costs
        state = (state.to(tl.float32) + _state_half(SEG, seg_offset, use_seg, of, ov, F, FP, D, DP, TRANSPOSED)).to(LT)
    acc = tl.dot(x, state, acc, input_precision=PREC)
    if SPLIT and DP * FP <= 128 * 64:
        acc = tl.dot(x, _state_half(CARRY, carry_offset, use_seg, of, ov, F, FP, D, DP, TRANSPOSED), acc, input_precision=PREC)
    return acc


@triton.jit
def _norm_half(Z, SEG, offset, seg_offset, use_seg, of, F: tl.constexpr, SPLIT: tl.constexpr):
    """One half [F] of a stored normaliser plus its segment's start, fp32."""
    norm = tl.load(Z + offset + of, mask=of < F, other=0.0)
    if SPLIT:
        norm += tl.load(SEG + seg_offset + of, mask=of < tl.where(use_seg, F, 0), other=0.0)
    return norm


@triton.jit
def state_kernel(
    K, V, WK, GK, START, FOLD, FINAL_CHUNK, S, Z, SEG, FINAL,
    k_sb, k_st, k_sh, v_sb, v_st, v_sh, T, NUM_CHUNKS, SEG_CHUNKS, NUM_SEGS, GS, A,
    D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, CS: tl.constexpr, BN: tl.constexpr,
    GATES: tl.constexpr, HAS_START: tl.constexpr, HAS_FOLD: tl.constexpr, HAS_FINAL: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sums of phi(k) v^T and phi(k) from a segment's start to each multiple of CS in it, and over the whole segment, for one half of phi."""
    # the halves of one segment are neighbours, so the second reads keys and values from L2
    half, seg, bg = tl.program_id(0) % 2, tl.program_id(0) // 2, tl.program_id(1)
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    k_step, v_step = k_st.to(tl.int64), v_st.to(tl.int64)
    od, of, on = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BN)
    ov = tl.program_id(2) * BV + tl.arange(0, BV)
    EVEN_F: tl.constexpr = F == FP
    EVEN_D: tl.constexpr = D == DP
    keep_f = (of < F)[:, None]
    sign = 1.0 - 2.0 * half
    weight = _map(WK + g * D * F, of, od, F, FP, D, DP, True)
    power = 0.0
    if GATES:
        power = tl.load(GK + g * (D + 1) + D)
    state, norm = tl.zeros([FP, BV], tl.float32), tl.zeros([FP], tl.float32)
    first_key = 0
    if HAS_FOLD:
        first_key = tl.load(FOLD + b).to(tl.int32)
    final_chunk = 0
    if HAS_FINAL:
        final_chunk = tl.load(FINAL_CHUNK + b)
    inner = of[:, None] * D + ov[None, :]
    ok = (of < F)[:, None] & (ov < D)[None, :]
    norm_end = tl.where(tl.program_id(2) == 0, F, 0)  # one program of the value columns writes the norms
    base = bg.to(tl.int64) * NUM_CHUNKS
    for chunk in range(seg * SEG_CHUNKS, tl.minimum((seg + 1) * SEG_CHUNKS, NUM_CHUNKS)):
        at = (base + chunk) * 2 * F + half * F
        tl.store(S + at * D + inner, state.to(LT), mask=ok)
        tl.store(Z + at + of, norm, mask=of < norm_end)
        if HAS_FINAL:  # the one state that leaves the call, unrounded
            if chunk == final_chunk:
                final = FINAL + bg.to(tl.int64) * (2 * F * D + 2 * F)
                tl.store(final + half * F * D + inner, state, mask=ok)
                tl.store(final + 2 * F * D + half * F + of, norm, mask=of < norm_end)
        for part in tl.static_range(CS // BN):
            t0 = chunk * CS + part * BN
            row_ok = t0 + on < T
            k = _tile(K + b * k_sb + g * k_sh + t0 * k_step, on, k_st, row_ok, od, D, EVEN_D)
            v = _tile(V + b * v_sb + g * v_sh + t0 * v_step, on, v_st, row_ok, ov, D, EVEN_D)
            low = tl.maximum(A, first_key)
            if HAS_START:
                last = tl.load(START + b * T + tl.minimum(t0 + BN, T) - 1)
                low = tl.maximum(last + A, first_key)
                same = tl.where(last < t0, 1.0, 0.0)  # a document that starts in this block starts from nothing
                state *= same
                norm *= same
            projected = 0.0
            if GATES:
                projected = _projection(k, GK + g * (D + 1), od, D, DP)[None, :]
            y = tl.dot(weight, tl.trans(k), input_precision=PREC) * sign
            phi = tl.where((row_ok & (t0 + on >= low))[None, :], _feature(y, projected, power, keep_f, 0, F, EVEN_F, GATES), 0.0)
            norm += tl.sum(phi, 1)
            state = tl.dot(phi.to(LT), v.to(LT), state, input_precision=PREC)
    total = SEG + (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D + 2 * F)
    tl.store(total + half * F * D + inner, state, mask=ok)
    tl.store(total + 2 * F * D + half * F + of, norm, mask=of < norm_end)


@triton.jit
def _segment_total(SEG, bg, step, NUM_SEGS, SIZE, index, REVERSE: tl.constexpr):
    """Total of the step-th segment in scan order, 0 behind the last."""
    seg = step
    if REVERSE:
        seg = NUM_SEGS - 1 - step
    return tl.load(SEG + (bg * NUM_SEGS + seg) * SIZE + index, mask=index < tl.where(step < NUM_SEGS, SIZE, 0), other=0.0)


@triton.jit
def _advance(SEG, CARRY, START, bg, b, step, carry, total, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, index, HAS_START: tl.constexpr, REVERSE: tl.constexpr):
    """Stores what the step-th segment starts from and returns what the next one does."""
    seg = step
    if REVERSE:
        seg = NUM_SEGS - 1 - step
    tl.store(SEG + (bg * NUM_SEGS + seg) * SIZE + index, carry, mask=index < tl.where(step < NUM_SEGS, SIZE, 0))
    tl.store(CARRY + (bg * NUM_SEGS + seg) * STATE_SIZE + index, carry.to(CARRY.dtype.element_ty), mask=index < tl.where(step < NUM_SEGS, STATE_SIZE, 0))
    if HAS_START:
        first = tl.maximum(seg, 0) * SEG_TOKENS
        after = first + SEG_TOKENS
        if REVERSE:
            # the documents at the segment's first token and at the next segment's must be one
            keep = tl.load(START + b * T + tl.minimum(after, T - 1)) == tl.load(START + b * T + tl.minimum(first, T - 1))
        else:
            keep = tl.load(START + b * T + tl.minimum(after, T) - 1) < first
        carry = tl.where(keep, carry, 0.0)
    return carry + total


@triton.jit
def prefix_kernel(SEG, CARRY, INITIAL, START, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, GS, HAS_START: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Exclusive scan of the segments' totals, in place, and of their states for products: SEG [B * GS, NUM_SEGS, SIZE], CARRY [B * GS, NUM_SEGS, STATE_SIZE], INITIAL [B * GS, SIZE]."""
    bg = tl.program_id(0).to(tl.int64)
    b = bg // GS
    index = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    ok = index < SIZE
    carry = tl.zeros([BLOCK_SIZE], tl.float32)
    if HAS_INITIAL:
        carry = tl.load(INITIAL + bg * SIZE + index, mask=ok, other=0.0)
    for group in range(tl.cdiv(NUM_SEGS, 4)):
        # four loads before the first store: one after the other they would wait for memory four times
        total_0 = _segment_total(SEG, bg, group * 4, NUM_SEGS, SIZE, index, REVERSE)
        total_1 = _segment_total(SEG, bg, group * 4 + 1, NUM_SEGS, SIZE, index, REVERSE)
        total_2 = _segment_total(SEG, bg, group * 4 + 2, NUM_SEGS, SIZE, index, REVERSE)
        total_3 = _segment_total(SEG, bg, group * 4 + 3, NUM_SEGS, SIZE, index, REVERSE)
        carry = _advance(SEG, CARRY, START, bg, b, group * 4, carry, total_0, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, index, HAS_START, REVERSE)
        carry = _advance(SEG, CARRY, START, bg, b, group * 4 + 1, carry, total_1, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, index, HAS_START, REVERSE)
        carry = _advance(SEG, CARRY, START, bg, b, group * 4 + 2, carry, total_2, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, index, HAS_START, REVERSE)
        carry = _advance(SEG, CARRY, START, bg, b, group * 4 + 3, carry, total_3, T, NUM_SEGS, SEG_TOKENS, SIZE, STATE_SIZE, index, HAS_START, REVERSE)


@triton.jit
def output_kernel(
    Q, K, V, O, LSE, ROW_MAX, ARG_MAX, WQ, WK, GQ, GK, LOG_WEIGHT, S, Z, SEG, CARRY, START, FOLD,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, T, P, NUM_TILES, NUM_CHUNKS, SEG_CHUNKS, NUM_SEGS, GS, A, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, CS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SB: tl.constexpr,
    LINEAR: tl.constexpr, BETWEEN: tl.constexpr, GATES: tl.constexpr, WINDOW_MAX: tl.constexpr, HAS_START: tl.constexpr, HAS_FOLD: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs of BM queries of one head. Keys are indexed from 0, query n is key P + n; negative key indices hold the cached sinks."""
    pid = tl.program_id(0)
    # neighbours share keys and states: heads of a group first, then blocks of a head
    bg = pid // (R * NUM_TILES)
    tile = (pid // R) % NUM_TILES
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    h = g * R + pid % R
    od, of, om, on = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BM), tl.arange(0, BN)
    ov = tl.program_id(1) * BV + tl.arange(0, BV)
    EVEN_F: tl.constexpr = F == FP
    EVEN_D: tl.constexpr = D == DP
    TK = T + P
    t0 = tile * BM
    n = P + t0 + om
    row_ok = t0 + om < T
    start, first_start = om * 0, t0 * 0
    if HAS_START:
        start = tl.load(START + b * TK + tl.minimum(n, TK - 1))
        first_start = tl.load(START + b * TK + P + t0)
    lo = _window_start(n, start, C, BLOCK)
    first_lo = _window_start(P + t0, first_start, C, BLOCK)
    k_soft = first_lo // BN * BN
    k_end = tl.minimum(P + t0 + BM, TK)
    scale2 = scale * LOG2E
    q = _tile(Q + b * q_sb + h * q_sh + t0.to(tl.int64) * q_st, om, q_st, row_ok, od, D, EVEN_D)
    K += b * k_sb + g * k_sh
    V += b * v_sb + g * v_sh
    k_step, v_step = k_st.to(tl.int64), v_st.to(tl.int64)

    # softmax over sinks and window
    largest, total = tl.full([BM], NEG, tl.float32), tl.zeros([BM], tl.float32)
    arg = tl.zeros([BM], tl.int32)
    acc = tl.zeros([BM, BV], tl.float32)
    if SB > 0:
        oa = tl.arange(0, SB)
        index = first_start + oa
        sink_ok = (oa < A) & (index < k_soft)
        token = tl.where(index >= 0, index, oa - A)
        sink_k = _tile(K, token, k_st, sink_ok, od, D, EVEN_D)
        sink_v = _tile(V, token, v_st, sink_ok, ov, D, EVEN_D)
        sink_s = tl.dot(q, tl.trans(sink_k), input_precision=PREC) * scale2
        sink_s = tl.where(sink_ok[None, :] & (start == first_start)[:, None], sink_s, NEG)
        largest = tl.max(sink_s, 1)
        if WINDOW_MAX:
            arg = first_start + tl.argmax(sink_s, 1)
        sink_s = tl.exp2(sink_s - tl.where(largest == NEG, 0.0, largest)[:, None])
        total = tl.sum(sink_s, 1)
        acc = tl.dot(sink_s.to(sink_v.dtype), sink_v, acc, input_precision=PREC)
    if BETWEEN or not BLOCK or C != BN or BM != BN or DP * FP > 128 * 64:  # more columns spill
        for block in range(k_soft // BN, tl.cdiv(k_end, BN)):
            i = block * BN + on
            key_ok = i < TK
            k = _tile(K + block * BN * k_step, on, k_st, key_ok, od, D, EVEN_D)
            v = _tile(V + block * BN * v_step, on, v_st, key_ok, ov, D, EVEN_D)
            s = tl.dot(q, tl.trans(k), input_precision=PREC)
            soft = _in_softmax(i[None, :], n[:, None], start[:, None], lo[:, None], A, BETWEEN)
            s = tl.where(soft, s, NEG)
            block_max = tl.max(s, 1) * scale2
            if WINDOW_MAX:
                arg = tl.where(block_max > largest, block * BN + tl.argmax(s, 1), arg)
            new = tl.maximum(largest, block_max)
            safe = tl.where(new == NEG, 0.0, new)
            p = tl.exp2(s * scale2 - safe[:, None])
            decay = tl.exp2(largest - safe)
            total = total * decay + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PREC)
            largest = new
    else:
        # the two blocks of the default window: one maximum and no rescaling
        own = P + t0
        own_ok = own + on < TK
        earlier = own > first_lo
        earlier_ok = on >= tl.where(earlier, 0, BN)
        k = _tile(K + (own - BN) * k_step, on, k_st, earlier_ok, od, D, EVEN_D)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        k = _tile(K + own * k_step, on, k_st, own_ok, od, D, EVEN_D)
        own_s = tl.dot(q, tl.trans(k), input_precision=PREC)
        own_s = tl.where((on[None, :] <= om[:, None]) & (own >= first_start), own_s, NEG)
        off = tl.where(earlier, 0.0, NEG)
        block_max = tl.max(s, 1) * scale2 + off
        own_max = tl.max(own_s, 1) * scale2
        if WINDOW_MAX:
            arg = tl.where(block_max > largest, own - BN + tl.argmax(s, 1), arg)
            arg = tl.where(own_max > tl.maximum(largest, block_max), own + tl.argmax(own_s, 1), arg)
        new = tl.maximum(largest, tl.maximum(block_max, own_max))
        safe = tl.where(new == NEG, 0.0, new)
        v = _tile(V + (own - BN) * v_step, on, v_st, earlier_ok, ov, D, EVEN_D)
        p = tl.exp2(s * scale2 + (off - safe)[:, None])
        own_p = tl.exp2(own_s * scale2 - safe[:, None])
        if SB > 0:
            decay = tl.exp2(largest - safe)
            total *= decay
            acc *= decay[:, None]
        total += tl.sum(p, 1) + tl.sum(own_p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PREC)
        v = _tile(V + own * v_step, on, v_st, own_ok, ov, D, EVEN_D)
        acc = tl.dot(own_p.to(v.dtype), v, acc, input_precision=PREC)
        largest = new

    if LINEAR:
        # phi(q) against the state, then against the keys between the state and the windows
        weight = _map(WQ + h * D * F, of, od, F, FP, D, DP, False)
        y = tl.dot(q, weight, input_precision=PREC)
        projected, power, key_power = 0.0, 0.0, 0.0
        if GATES:
            projected = _projection(q, GQ + h * (D + 1), od, D, DP)[:, None]
            power = tl.load(GQ + h * (D + 1) + D)
            key_power = tl.load(GK + g * (D + 1) + D)
        keep_f = (of < F)[None, :]
        x = first_lo // CS * CS
        carried = (start == first_start) & (first_start < x)
        chunk = tl.minimum(x // CS, NUM_CHUNKS - 1)
        at = (bg.to(tl.int64) * NUM_CHUNKS + chunk) * 2 * F
        seg = chunk // SEG_CHUNKS
        use_seg = first_start < seg * SEG_CHUNKS * CS
        seg_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D + 2 * F)
        carry_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D)
        here = tl.where(carried, 1.0, 0.0)
        low = start + A
        if HAS_FOLD:
            low = tl.maximum(low, tl.load(FOLD + b).to(tl.int32))
        hi = tl.minimum(tl.max(tl.where(row_ok, lo, 0), 0), k_end)
        mass = tl.zeros([BM], tl.float32)
        far = tl.zeros([BM, BV], tl.float32)
        for half in tl.static_range(2):
            phi = _feature(y * (1 - 2 * half), projected, power, keep_f, 1, F, EVEN_F, GATES)
            norm = _norm_half(Z, SEG, at + half * F, seg_at + 2 * F * D + half * F, use_seg, of, F, SPLIT)
            if BETWEEN:
                mass += here * tl.sum(phi * norm[None, :], 1)
            else:
                mass += tl.sum(phi * norm[None, :], 1)
            if BETWEEN:
                far_phi = (phi * here[:, None]).to(LT)
            else:
                far_phi = phi.to(LT)
            far = _times_state(
                far_phi, far, S, SEG, CARRY, (at + half * F) * D, seg_at + half * F * D, carry_at + half * F * D, use_seg, of, ov, F, FP, D, DP, SPLIT, False, LT, PREC
            )  # fmt: skip
            if BETWEEN:
                for block in range(x // BN, tl.cdiv(hi, BN)):
                    i = block * BN + on
                    key_ok = i < TK
                    k = _tile(K + block * BN * k_step, on, k_st, key_ok, od, D, EVEN_D)
                    v = _tile(V + block * BN * v_step, on, v_st, key_ok, ov, D, EVEN_D)
                    y_k = tl.dot(_map(WK + g * D * F, of, od, F, FP, D, DP, True), tl.trans(k), input_precision=PREC)
                    projected_k = 0.0
                    if GATES:
                        projected_k = _projection(k, GK + g * (D + 1), od, D, DP)[None, :]
                    r = tl.dot(
                        phi.to(LT), _feature(y_k * (1 - 2 * half), projected_k, key_power, (of < F)[:, None], 0, F, EVEN_F, GATES).to(LT), input_precision=PREC
                    )
                    linear = (i[None, :] <= n[:, None]) & (i[None, :] >= low[:, None]) & (i[None, :] < lo[:, None]) & key_ok[None, :]
                    r = tl.where(linear, r, 0.0)
                    mass += tl.sum(r, 1)
                    far = tl.dot(r.to(LT), v.to(LT), far, input_precision=PREC)
        # the branches meet like two softmax blocks; window_max weighs the linear one against the window's largest logit
        shift = tl.load(LOG_WEIGHT + h) * LOG2E
        safe = tl.where(largest == NEG, 0.0, largest)
        shift = shift + tl.zeros([BM], tl.float32)
        if WINDOW_MAX:
            shift += safe
        if not BETWEEN:
            mass *= here
        linear_max = tl.where(mass > 0.0, shift + tl.log2(tl.where(mass > 0.0, mass, 1.0)), NEG)
        top = tl.maximum(largest, linear_max)
        top = tl.where(top == NEG, 0.0, top)
        soft_scale, linear_scale = tl.exp2(largest - top), tl.where(mass > 0.0, tl.exp2(shift - top), 0.0)
        total = total * soft_scale + mass * linear_scale
        largest_out = safe
        largest = top
    else:
        largest = tl.where(largest == NEG, 0.0, largest)
        largest_out = largest
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    inverse = tl.where(seen, 1.0 / total, 0.0)
    if LINEAR:
        acc = acc * (soft_scale * inverse)[:, None] + far * (linear_scale * inverse)[:, None]
    else:
        acc = acc * inverse[:, None]
    # out is [B, T, H, D], contiguous
    H = GS * R
    out = O + ((b * T + t0) * H + h) * D + om[:, None] * (H * D) + ov[None, :]
    tl.store(out, acc.to(O.dtype.element_ty), mask=row_ok[:, None] & (ov < D)[None, :])
    if SAVE and tl.program_id(1) == 0:
        row = (b * H + h) * T + t0 + om
        # a row that sees nothing gets +inf, so that every weight recomputed from it is 0
        tl.store(LSE + row, tl.where(seen, largest + tl.log2(total), float("inf")), mask=row_ok)
        if WINDOW_MAX:
            tl.store(ROW_MAX + row, largest_out, mask=row_ok)
            tl.store(ARG_MAX + row, arg, mask=row_ok)


@triton.jit
def delta_kernel(O, DO, DELTA, do_sb, do_st, do_sh, T, H, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """DELTA [B, H, T] = dy.y, fp32."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    od, om = tl.arange(0, DP), tl.arange(0, BM)
    t0 = tile * BM
    row_ok = t0 + om < T
    EVEN_D: tl.constexpr = D == DP
    out = _tile(O + (b * T + t0) * (H * D) + h * D, om, H * D, row_ok, od, D, EVEN_D)
    dy = _tile(DO + b * do_sb + h * do_sh + t0.to(tl.int64) * do_st, om, do_st, row_ok, od, D, EVEN_D)
    tl.store(DELTA + (b * H + h) * T + t0 + om, tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1), mask=row_ok)


@triton.jit
def reverse_state_kernel(
    Q, DO, LSE, ROW_MAX, DELTA, WQ, GQ, LOG_WEIGHT, START, S, Z, SEG,
    q_sb, q_st, q_sh, do_sb, do_st, do_sh, T, NUM_CHUNKS, SEG_CHUNKS, NUM_SEGS, GS,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BV: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, CS: tl.constexpr, BM: tl.constexpr,
    GATES: tl.constexpr, WINDOW_MAX: tl.constexpr, HAS_START: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sums of a phi(q) dy^T and a (dy.y) phi(q) from each multiple of CS to its segment's end, over a KV head's queries, for one half of phi.

    a = e^(log weight + reference) / denominator. The sums at token y are those of the document of token y.
    """
    half, seg, bg = tl.program_id(0) % 2, tl.program_id(0) // 2, tl.program_id(1)
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    H = GS * R
    od, of, om = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BM)
    ov = tl.program_id(2) * BV + tl.arange(0, BV)
    q_step, do_step = q_st.to(tl.int64), do_st.to(tl.int64)
    EVEN_F: tl.constexpr = F == FP
    EVEN_D: tl.constexpr = D == DP
    PARTS: tl.constexpr = CS // BM
    keep_f = (of < F)[:, None]
    sign = 1.0 - 2.0 * half
    state, norm = tl.zeros([FP, BV], tl.float32), tl.zeros([FP], tl.float32)
    norm_end = tl.where(tl.program_id(2) == 0, F, 0)  # one program of the value columns writes the norms
    inner = of[:, None] * D + ov[None, :]
    ok = (of < F)[:, None] & (ov < D)[None, :]
    base = bg.to(tl.int64) * NUM_CHUNKS
    first_block = seg * SEG_CHUNKS * PARTS
    last_block = tl.minimum((seg + 1) * SEG_CHUNKS, NUM_CHUNKS) * PARTS - 1
    for step in range((last_block - first_block + 1) * R):
        block = last_block - step // R
        h = g * R + step % R
        t0 = block * BM
        n = t0 + om
        row_ok = n < T
        real = row_ok
        if HAS_START:
            start = tl.load(START + b * T + tl.minimum(n, T - 1))
            document = tl.load(START + b * T + tl.minimum(t0, T - 1))
            after = tl.load(START + b * T + tl.minimum(t0 + BM, T - 1))
            real = row_ok & (start == document) & (start <= n)
            same = tl.where((after == document) | (step % R > 0), 1.0, 0.0)  # the first head of a block forgets a later document
            state *= same
            norm *= same
        row = (b * H + h) * T + n
        q = _tile(Q + b * q_sb + h * q_sh + t0 * q_step, om, q_st, row_ok, od, D, EVEN_D)
        dy = _tile(DO + b * do_sb + h * do_sh + t0 * do_step, om, do_st, row_ok, ov, D, EVEN_D)
        delta = tl.load(DELTA + row, mask=row_ok, other=0.0)
        shift = tl.load(LOG_WEIGHT + h) * LOG2E - tl.load(LSE + row, mask=row_ok, other=float("inf"))
        if WINDOW_MAX:
            shift += tl.load(ROW_MAX + row, mask=row_ok, other=0.0)
        factor = tl.where(real, tl.exp2(tl.minimum(shift, MAX_LOG_FACTOR)), 0.0)
        projected, power = 0.0, 0.0
        if GATES:
            projected = _projection(q, GQ + h * (D + 1), od, D, DP)[None, :]
            power = tl.load(GQ + h * (D + 1) + D)
        y = tl.dot(_map(WQ + h * D * F, of, od, F, FP, D, DP, True), tl.trans(q), input_precision=PREC) * sign
        phi = _feature(y, projected, power, keep_f, 0, F, EVEN_F, GATES) * factor[None, :]
        norm += tl.sum(phi * delta[None, :], 1)
        state = tl.dot(phi.to(LT), dy.to(LT), state, input_precision=PREC)
        if (step % R == R - 1) & (block % PARTS == 0):
            at = (base + block // PARTS) * 2 * F + half * F
            tl.store(S + at * D + inner, state.to(LT), mask=ok)
            tl.store(Z + at + of, norm, mask=of < norm_end)
    total = SEG + (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D + 2 * F)
    tl.store(total + half * F * D + inner, state, mask=ok)
    tl.store(total + 2 * F * D + half * F + of, norm, mask=of < norm_end)


@triton.jit
def query_grad_kernel(
    Q, K, V, DO, LSE, ROW_MAX, ARG_MAX, DELTA, PATH, WQ, WK, GQ, GK, LOG_WEIGHT, S, Z, SEG, CARRY, START, DQ, DY, DGATE, DPOWER, DLOG, DSINK,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, do_sb, do_st, do_sh, T, NUM_TILES, NUM_CHUNKS, SEG_CHUNKS, NUM_SEGS, GS, A, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, CS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SB: tl.constexpr,
    LINEAR: tl.constexpr, BETWEEN: tl.constexpr, GATES: tl.constexpr, WINDOW_MAX: tl.constexpr, HAS_START: tl.constexpr, SPLIT: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients on the queries' side for BM queries of one head.

    Writes DQ [B, T, H, D]; DY [B, H, T, F] of xW; DGATE [B, H, T] of x.u / sqrt(D); per block DPOWER, DLOG [B, H, NUM_TILES] and DSINK
    [B, H, NUM_TILES, 2, A, D], the part of dk and dv of the sinks before the block's window; PATH [B, H, T], what the row maximum receives.
    """
    pid = tl.program_id(0)
    bg = pid // (R * NUM_TILES)
    tile = (pid // R) % NUM_TILES
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    h = g * R + pid % R
    H = GS * R
    od, of, om, on = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BM), tl.arange(0, BN)
    EVEN_F: tl.constexpr = F == FP
    EVEN_D: tl.constexpr = D == DP
    t0 = tile * BM
    n = t0 + om
    row_ok = n < T
    start, first_start = om * 0, t0 * 0
    if HAS_START:
        start = tl.load(START + b * T + tl.minimum(n, T - 1))
        first_start = tl.load(START + b * T + t0)
    lo = _window_start(n, start, C, BLOCK)
    first_lo = _window_start(t0, first_start, C, BLOCK)
    k_soft = first_lo // BN * BN
    k_end = tl.minimum(t0 + BM, T)
    scale2 = scale * LOG2E
    q = _tile(Q + b * q_sb + h * q_sh + t0.to(tl.int64) * q_st, om, q_st, row_ok, od, D, EVEN_D)
    dy = _tile(DO + b * do_sb + h * do_sh + t0.to(tl.int64) * do_st, om, do_st, row_ok, od, D, EVEN_D)
    K += b * k_sb + g * k_sh
    V += b * v_sb + g * v_sh
    k_step, v_step = k_st.to(tl.int64), v_st.to(tl.int64)
    row = (b * H + h) * T + n
    lse = tl.load(LSE + row, mask=row_ok, other=float("inf"))
    delta = tl.load(DELTA + row, mask=row_ok, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    path = tl.zeros([BM], tl.float32)

    if LINEAR:
        shift = tl.load(LOG_WEIGHT + h) * LOG2E - lse
        if WINDOW_MAX:
            shift += tl.load(ROW_MAX + row, mask=row_ok, other=0.0)
        factor = tl.exp2(tl.minimum(shift, MAX_LOG_FACTOR))
        x = first_lo // CS * CS
        carried = (start == first_start) & (first_start < x)
        chunk = tl.minimum(x // CS, NUM_CHUNKS - 1)
        at = (bg.to(tl.int64) * NUM_CHUNKS + chunk) * 2 * F
        seg = chunk // SEG_CHUNKS
        use_seg = first_start < seg * SEG_CHUNKS * CS
        seg_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D + 2 * F)
        carry_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D)
        here = tl.where(carried, factor, 0.0)
        hi = tl.minimum(tl.max(tl.where(row_ok, lo, 0), 0), k_end)
        weight = _map(WQ + h * D * F, of, od, F, FP, D, DP, False)
        y = tl.dot(q, weight, input_precision=PREC)
        projected, power, key_power = 0.0, 0.0, 0.0
        if GATES:
            projected = _projection(q, GQ + h * (D + 1), od, D, DP)[:, None]
            power = tl.load(GQ + h * (D + 1) + D)
            key_power = tl.load(GK + g * (D + 1) + D)
        keep_f = (of < F)[None, :]
        d_y = tl.zeros([BM, FP], tl.float32)
        d_gate, d_power = tl.zeros([BM, 1], tl.float32), tl.zeros([BM, 1], tl.float32)
        for half in tl.static_range(2):
            norm = _norm_half(Z, SEG, at + half * F, seg_at + 2 * F * D + half * F, use_seg, of, F, SPLIT)
            grad = _times_state(
                dy.to(LT), tl.zeros([BM, FP], tl.float32), S, SEG, CARRY, (at + half * F) * D, seg_at + half * F * D, carry_at + half * F * D, use_seg, of, od, F, FP, D, DP, SPLIT, True, LT, PREC
            )  # fmt: skip
            grad = (grad - delta[:, None] * norm[None, :]) * here[:, None]
            if BETWEEN:
                for block in range(x // BN, tl.cdiv(hi, BN)):
                    i = block * BN + on
                    key_ok = i < T
                    k = _tile(K + block * BN * k_step, on, k_st, key_ok, od, D, EVEN_D)
                    v = _tile(V + block * BN * v_step, on, v_st, key_ok, od, D, EVEN_D)
                    y_k = tl.dot(k, _map(WK + g * D * F, of, od, F, FP, D, DP, False), input_precision=PREC)
                    projected_k = 0.0
                    if GATES:
                        projected_k = _projection(k, GK + g * (D + 1), od, D, DP)[:, None]
                    linear = (i[None, :] <= n[:, None]) & (i[None, :] >= start[:, None] + A) & (i[None, :] < lo[:, None]) & key_ok[None, :]
                    t = tl.dot(dy, tl.trans(v), input_precision=PREC) - delta[:, None]
                    t = tl.where(linear, t * factor[:, None], 0.0).to(LT)
                    grad = tl.dot(t, _feature(y_k * (1 - 2 * half), projected_k, key_power, keep_f, 1, F, EVEN_F, GATES).to(LT), grad, input_precision=PREC)
            d_half, d_log, d_gate_half, d_power_half = _feature_grad(y * (1 - 2 * half), grad, projected, power, keep_f, F, EVEN_F, GATES)
            d_y += d_half * (1 - 2 * half)
            path += tl.sum(d_log, 1)  # = sum of phi * grad: what all linear weights of the row receive
            d_gate += d_gate_half
            d_power += d_power_half
        d_y = d_y.to(DY.dtype.element_ty)
        tl.store(DY + row[:, None] * F + of[None, :], d_y, mask=row_ok[:, None] & keep_f)
        dq = tl.dot(d_y.to(LT), _map(WQ + h * D * F, of, od, F, FP, D, DP, True).to(LT), dq, input_precision=PREC)
        if GATES:
            gate = tl.sum(d_gate, 1) * D**-0.5
            dq += gate[:, None] * tl.load(GQ + h * (D + 1) + od, mask=od < D, other=0.0)[None, :]
            tl.store(DGATE + row, gate, mask=row_ok)
            tl.store(DPOWER + (b * H + h) * NUM_TILES + tile, tl.sum(tl.where(row_ok, tl.sum(d_power, 1), 0.0), 0))
        tl.store(DLOG + (b * H + h) * NUM_TILES + tile, tl.sum(tl.where(row_ok, path, 0.0), 0))
    arg = om * 0 - 1
    if WINDOW_MAX:
        tl.store(PATH + row, path, mask=row_ok)
        arg = tl.load(ARG_MAX + row, mask=row_ok, other=-1)

    dq_soft = tl.zeros([BM, DP], tl.float32)
    if SB > 0:
        oa = tl.arange(0, SB)
        index = first_start + oa
        sink_ok = (oa < A) & (index < k_soft)
        sink_k = _tile(K, index, k_st, sink_ok, od, D, EVEN_D)
        sink_v = _tile(V, index, v_st, sink_ok, od, D, EVEN_D)
        sink_seen = sink_ok[None, :] & (start == first_start)[:, None] & row_ok[:, None]
        sink_p = tl.where(sink_seen, tl.exp2(tl.dot(q, tl.trans(sink_k), input_precision=PREC) * scale2 - lse[:, None]), 0.0)
        sink_ds = sink_p * (tl.dot(dy, tl.trans(sink_v), input_precision=PREC) - delta[:, None])
        if WINDOW_MAX:
            sink_ds += tl.where(sink_seen & (index[None, :] == arg[:, None]), path[:, None], 0.0)
        dq_soft = tl.dot(sink_ds.to(sink_k.dtype), sink_k, dq_soft, input_precision=PREC)
        # the same with keys as rows, for dk and dv
        turned_seen = sink_ok[:, None] & (start == first_start)[None, :] & row_ok[None, :]
        turned_p = tl.where(turned_seen, tl.exp2(tl.dot(sink_k, tl.trans(q), input_precision=PREC) * scale2 - lse[None, :]), 0.0)
        turned_ds = turned_p * (tl.dot(sink_v, tl.trans(dy), input_precision=PREC) - delta[None, :])
        if WINDOW_MAX:
            turned_ds += tl.where(turned_seen & (index[:, None] == arg[None, :]), path[None, :], 0.0)
        sink = DSINK + ((b * H + h) * NUM_TILES + tile) * 2 * A * D + oa[:, None] * D + od[None, :]
        sink_store = (oa < A)[:, None] & (od < D)[None, :]
        tl.store(sink, tl.dot(turned_ds.to(q.dtype), q, input_precision=PREC) * scale, mask=sink_store)
        tl.store(sink + A * D, tl.dot(turned_p.to(dy.dtype), dy, input_precision=PREC), mask=sink_store)
    for block in range(k_soft // BN, tl.cdiv(k_end, BN)):
        i = block * BN + on
        key_ok = i < T
        k = _tile(K + block * BN * k_step, on, k_st, key_ok, od, D, EVEN_D)
        v = _tile(V + block * BN * v_step, on, v_st, key_ok, od, D, EVEN_D)
        soft = _in_softmax(i[None, :], n[:, None], start[:, None], lo[:, None], A, BETWEEN)
        p = tl.where(soft, tl.exp2(tl.dot(q, tl.trans(k), input_precision=PREC) * scale2 - lse[:, None]), 0.0)
        ds = p * (tl.dot(dy, tl.trans(v), input_precision=PREC) - delta[:, None])
        if WINDOW_MAX:
            ds += tl.where(soft & (i[None, :] == arg[:, None]), path[:, None], 0.0)
        dq_soft = tl.dot(ds.to(k.dtype), k, dq_soft, input_precision=PREC)
    dq += dq_soft * scale
    out = DQ + (b * T + t0) * (H * D) + h * D + om[:, None] * (H * D) + od[None, :]
    tl.store(out, dq.to(DQ.dtype.element_ty), mask=row_ok[:, None] & (od < D)[None, :])


@triton.jit
def key_grad_kernel(
    Q, K, V, DO, LSE, ROW_MAX, ARG_MAX, DELTA, PATH, WQ, WK, GQ, GK, LOG_WEIGHT, S, Z, SEG, CARRY, START, DK, DV, DY, DGATE, DPOWER,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, do_sb, do_st, do_sh, T, NUM_TILES, NUM_CHUNKS, SEG_CHUNKS, NUM_SEGS, GS, A, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, CS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LINEAR: tl.constexpr, BETWEEN: tl.constexpr, GATES: tl.constexpr, WINDOW_MAX: tl.constexpr, HAS_START: tl.constexpr, SPLIT: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients on the keys' side for BN keys of one KV head: DK, DV [B, T, GS, D], DY [B, GS, T, F], DGATE [B, GS, T], DPOWER [B, GS, NUM_TILES]."""
    tile, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    H = GS * R
    od, of, om, on = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BM), tl.arange(0, BN)
    EVEN_F: tl.constexpr = F == FP
    EVEN_D: tl.constexpr = D == DP
    k0 = tile * BN
    i = k0 + on
    key_ok = i < T
    last_key = tl.minimum(k0 + BN, T) - 1
    first_start, last_start = k0 * 0, k0 * 0
    if HAS_START:
        first_start = tl.load(START + b * T + k0)
        last_start = tl.load(START + b * T + last_key)
    # from here on every query of the last key's document has all keys of that document in this block out of its window
    far_at = tl.cdiv(_first_far(last_key, last_start, C, BLOCK), CS) * CS
    k = _tile(K + b * k_sb + g * k_sh + k0.to(tl.int64) * k_st, on, k_st, key_ok, od, D, EVEN_D)
    v = _tile(V + b * v_sb + g * v_sh + k0.to(tl.int64) * v_st, on, v_st, key_ok, od, D, EVEN_D)
    q_step, do_step = q_st.to(tl.int64), do_st.to(tl.int64)
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    keep_f = (of < F)[None, :]
    projected, power = 0.0, 0.0
    if LINEAR:
        weight = _map(WK + g * D * F, of, od, F, FP, D, DP, False)
        y = tl.dot(k, weight, input_precision=PREC)
        if GATES:
            projected = _projection(k, GK + g * (D + 1), od, D, DP)[:, None]
            power = tl.load(GK + g * (D + 1) + D)
        chunk = tl.minimum(far_at // CS, NUM_CHUNKS - 1)
        document = k0 * 0
        if HAS_START:
            document = tl.load(START + b * T + tl.minimum(far_at, T - 1))
        reached = tl.where((far_at < T) & (i >= document + A) & key_ok, 1.0, 0.0)
        at = (bg.to(tl.int64) * NUM_CHUNKS + chunk) * 2 * F
        seg = chunk // SEG_CHUNKS
        seg_end = (seg + 1) * SEG_CHUNKS * CS
        use_seg = seg_end < T
        if HAS_START:
            use_seg = use_seg & (tl.load(START + b * T + tl.minimum(seg_end, T - 1)) == document)
        seg_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D + 2 * F)
        carry_at = (bg.to(tl.int64) * NUM_SEGS + seg) * (2 * F * D)
        d_y = tl.zeros([BN, FP], tl.float32)
        d_gate, d_power = tl.zeros([BN, 1], tl.float32), tl.zeros([BN, 1], tl.float32)
        # queries between the windows and the state
        first_tile = tl.minimum(_first_far(k0, first_start, C, BLOCK), far_at) // BM
        between_steps = (tl.cdiv(tl.minimum(far_at, T), BM) - first_tile) * R
        for half in tl.static_range(2):
            phi = _feature(y * (1 - 2 * half), projected, power, keep_f, 1, F, EVEN_F, GATES)
            far_phi = (phi * reached[:, None]).to(LT)
            dv = _times_state(
                far_phi, dv, S, SEG, CARRY, (at + half * F) * D, seg_at + half * F * D, carry_at + half * F * D, use_seg, of, od, F, FP, D, DP, SPLIT, False, LT, PREC
            )  # fmt: skip
            grad = _times_state(
                v.to(LT), tl.zeros([BN, FP], tl.float32), S, SEG, CARRY, (at + half * F) * D, seg_at + half * F * D, carry_at + half * F * D, use_seg, of, od, F, FP, D, DP, SPLIT, True, LT, PREC
            )  # fmt: skip
            norm = _norm_half(Z, SEG, at + half * F, seg_at + 2 * F * D + half * F, use_seg, of, F, SPLIT)
            grad = (grad - norm[None, :]) * reached[:, None]
            if BETWEEN:
                for step in range(between_steps):
                    t0 = (first_tile + step // R) * BM
                    h = g * R + step % R
                    n = t0 + om
                    row_ok = n < T
                    start = om * 0
                    if HAS_START:
                        start = tl.load(START + b * T + tl.minimum(n, T - 1))
                    lo = _window_start(n, start, C, BLOCK)
                    row = (b * H + h) * T + n
                    q = _tile(Q + b * q_sb + h * q_sh + t0 * q_step, om, q_st, row_ok, od, D, EVEN_D)
                    dy = _tile(DO + b * do_sb + h * do_sh + t0 * do_step, om, do_st, row_ok, od, D, EVEN_D)
                    shift = tl.load(LOG_WEIGHT + h) * LOG2E - tl.load(LSE + row, mask=row_ok, other=float("inf"))
                    delta = tl.load(DELTA + row, mask=row_ok, other=0.0)
                    if WINDOW_MAX:
                        shift += tl.load(ROW_MAX + row, mask=row_ok, other=0.0)
                    linear = (i[:, None] <= n[None, :]) & (i[:, None] >= start[None, :] + A) & (i[:, None] < lo[None, :]) & key_ok[:, None] & row_ok[None, :]
                    factor = tl.where(linear, tl.exp2(tl.minimum(shift, MAX_LOG_FACTOR))[None, :], 0.0)
                    query_power = 0.0
                    flat = tl.zeros([BM], tl.float32)
                    if GATES:
                        flat = _projection(q, GQ + h * (D + 1), od, D, DP)
                        query_power = tl.load(GQ + h * (D + 1) + D)
                    # the queries' features once with features as rows, for dv, and once with queries as rows: no accumulator is transposed
                    y_q = tl.dot(_map(WQ + h * D * F, of, od, F, FP, D, DP, True), tl.trans(q), input_precision=PREC)
                    r = tl.dot(
                        phi.to(LT),
                        _feature(y_q * (1 - 2 * half), flat[None, :], query_power, (of < F)[:, None], 0, F, EVEN_F, GATES).to(LT),
                        input_precision=PREC,
                    )
                    dv = tl.dot((r * factor).to(LT), dy.to(LT), dv, input_precision=PREC)
                    t = ((tl.dot(v, tl.trans(dy), input_precision=PREC) - delta[None, :]) * factor).to(LT)
                    y_rows = tl.dot(q, _map(WQ + h * D * F, of, od, F, FP, D, DP, False), input_precision=PREC)
                    grad = tl.dot(
                        t, _feature(y_rows * (1 - 2 * half), flat[:, None], query_power, keep_f, 1, F, EVEN_F, GATES).to(LT), grad, input_precision=PREC
                    )
            d_half, _, d_gate_half, d_power_half = _feature_grad(y * (1 - 2 * half), grad, projected, power, keep_f, F, EVEN_F, GATES)
            d_y += d_half * (1 - 2 * half)
            d_gate += d_gate_half
            d_power += d_power_half
        d_y = d_y.to(DY.dtype.element_ty)
        tl.store(DY + (bg.to(tl.int64) * T + i)[:, None] * F + of[None, :], d_y, mask=key_ok[:, None] & keep_f)
        dk = tl.dot(d_y.to(LT), _map(WK + g * D * F, of, od, F, FP, D, DP, True).to(LT), dk, input_precision=PREC)
        if GATES:
            gate = tl.sum(d_gate, 1) * D**-0.5
            dk += gate[:, None] * tl.load(GK + g * (D + 1) + od, mask=od < D, other=0.0)[None, :]
            tl.store(DGATE + bg.to(tl.int64) * T + i, gate, mask=key_ok)
            tl.store(DPOWER + bg.to(tl.int64) * NUM_TILES + tile, tl.sum(tl.where(key_ok, tl.sum(d_power, 1), 0.0), 0))
    dk_soft = tl.zeros([BN, DP], tl.float32)
    first_tile = k0 // BM
    for step in range((tl.cdiv(tl.minimum(far_at, T), BM) - first_tile) * R):
        t0 = (first_tile + step // R) * BM
        h = g * R + step % R
        n = t0 + om
        row_ok = n < T
        start, tile_start = om * 0, t0 * 0
        if HAS_START:
            start = tl.load(START + b * T + tl.minimum(n, T - 1))
            tile_start = tl.load(START + b * T + t0)
        lo = _window_start(n, start, C, BLOCK)
        k_soft = _window_start(t0, tile_start, C, BLOCK) // BN * BN
        row = (b * H + h) * T + n
        q = _tile(Q + b * q_sb + h * q_sh + t0 * q_step, om, q_st, row_ok, od, D, EVEN_D)
        dy = _tile(DO + b * do_sb + h * do_sh + t0 * do_step, om, do_st, row_ok, od, D, EVEN_D)
        lse = tl.load(LSE + row, mask=row_ok, other=float("inf"))
        delta = tl.load(DELTA + row, mask=row_ok, other=0.0)
        soft = _in_softmax(i[:, None], n[None, :], start[None, :], lo[None, :], A, BETWEEN)
        soft = soft & key_ok[:, None] & row_ok[None, :] & (k0 >= k_soft)
        p = tl.where(soft, tl.exp2(tl.dot(k, tl.trans(q), input_precision=PREC) * scale2 - lse[None, :]), 0.0)
        ds = p * (tl.dot(v, tl.trans(dy), input_precision=PREC) - delta[None, :])
        if WINDOW_MAX:
            arg = tl.load(ARG_MAX + row, mask=row_ok, other=-1)
            ds += tl.where(soft & (i[:, None] == arg[None, :]), tl.load(PATH + row, mask=row_ok, other=0.0)[None, :], 0.0)
        dk_soft = tl.dot(ds.to(q.dtype), q, dk_soft, input_precision=PREC)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=PREC)
    dk += dk_soft * scale
    out = (b * T + k0) * (GS * D) + g * D + on[:, None] * (GS * D) + od[None, :]
    store_ok = key_ok[:, None] & (od < D)[None, :]
    tl.store(DK + out, dk.to(DK.dtype.element_ty), mask=store_ok)
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=store_ok)


@triton.jit
def sink_grad_kernel(
    DSINK, START, DK, DV, T, NUM_TILES, GS, A, BM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_START: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Adds DSINK's parts to one sink's row of DK and DV: one program per (run of blocks with the same first document, KV head, sink)."""
    tile, bg, sink = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (bg // GS).to(tl.int64), (bg % GS).to(tl.int64)
    H = GS * R
    od, ot = tl.arange(0, DP), tl.arange(0, BT)
    document = tile * 0
    owner = tile == 0
    if HAS_START:
        document = tl.load(START + b * T + tile * BM)
        owner = owner | (tl.load(START + b * T + tl.maximum(tile - 1, 0) * BM) != document)
    token = tl.minimum(document + sink, T - 1)
    owner = owner & (document + sink < T)
    if HAS_START:
        owner = owner & (tl.load(START + b * T + token) == document)  # a shorter document's row has another owner
    if owner:
        dk, dv = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
        at = tile
        running = 1
        while running > 0:
            blocks = at + ot
            same = blocks < NUM_TILES
            if HAS_START:
                same = same & (tl.load(START + b * T + tl.minimum(blocks * BM, T - 1)) == document)
            for rep in range(R):
                part = DSINK + (((b * H + g * R + rep) * NUM_TILES + blocks) * 2 * A + sink)[:, None] * D + od[None, :]
                ok = same[:, None] & (od < D)[None, :]
                dk += tl.sum(tl.load(part, mask=ok, other=0.0), 0)
                dv += tl.sum(tl.load(part + A * D, mask=ok, other=0.0), 0)
            at += BT
            running = tl.where((at < NUM_TILES) & (tl.sum(same.to(tl.int32), 0) == BT), 1, 0)
        out = ((b * T + token) * GS + g) * D + od
        ok = od < D
        tl.store(DK + out, (tl.load(DK + out, mask=ok, other=0.0).to(tl.float32) + dk).to(DK.dtype.element_ty), mask=ok)
        tl.store(DV + out, (tl.load(DV + out, mask=ok, other=0.0).to(tl.float32) + dv).to(DV.dtype.element_ty), mask=ok)


@triton.jit
def map_grad_kernel(
    X, DY, DGATE, DW, x_sb, x_st, x_sh, B, T, HEADS, NUM_SPLITS, D: tl.constexpr, DP: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, BT: tl.constexpr, GATES: tl.constexpr, LT: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """DW [NUM_SPLITS, HEADS * D * F + HEADS * D] = sums over tokens of x^T dy, then of x dgate (with gates); split s takes every NUM_SPLITS-th block."""
    split, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    od, of, ot = tl.arange(0, DP), tl.arange(0, FP), tl.arange(0, BT)
    x_step = x_st.to(tl.int64)
    EVEN_D: tl.constexpr = D == DP
    acc = tl.zeros([DP, FP], tl.float32)
    direction = tl.zeros([DP], tl.float32)
    blocks = tl.cdiv(T, BT)
    for block in range(split, B * blocks, NUM_SPLITS):
        b = block // blocks
        t0 = (block % blocks) * BT
        row_ok = t0 + ot < T
        x = _tile(X + b * x_sb + h * x_sh + t0 * x_step, ot, x_st, row_ok, od, D, EVEN_D)
        row = (b * HEADS + h) * T + t0 + ot
        dy = tl.load(DY + row[:, None] * F + of[None, :], mask=row_ok[:, None] & (of < F)[None, :], other=0.0)
        acc = tl.dot(tl.trans(x).to(LT), dy.to(LT), acc, input_precision=PREC)
        if GATES:
            direction += tl.sum(x.to(tl.float32) * tl.load(DGATE + row, mask=row_ok, other=0.0)[:, None], 0)
    SIZE: tl.constexpr = D * F + D if GATES else D * F
    out = DW + (h * 0 + split) * HEADS * SIZE
    tl.store(out + h * D * F + od[:, None] * F + of[None, :], acc, mask=(od < D)[:, None] & (of < F)[None, :])
    if GATES:
        tl.store(out + HEADS * D * F + h * D + od, direction, mask=od < D)


@triton.jit
def round_kernel(X_Q, X_K, OUT_Q, OUT_K, SIZE_Q, SIZE_K, BLOCK_SIZE: tl.constexpr):
    """OUT = X in OUT's type, for two tensors: program_id(1) is 0 for X_Q [SIZE_Q], 1 for X_K [SIZE_K]."""
    index = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    if tl.program_id(1) == 0:
        tl.store(OUT_Q + index, tl.load(X_Q + index, mask=index < SIZE_Q, other=0.0).to(OUT_Q.dtype.element_ty), mask=index < SIZE_Q)
    else:
        tl.store(OUT_K + index, tl.load(X_K + index, mask=index < SIZE_K, other=0.0).to(OUT_K.dtype.element_ty), mask=index < SIZE_K)


@triton.jit
def _sum_over_blocks(X, h, HEADS, NUM_TILES, B, BLOCK_SIZE: tl.constexpr):
    """Sum of X[:, h, :], X [B, HEADS, NUM_TILES]."""
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, B * NUM_TILES, BLOCK_SIZE):
        at = first + tl.arange(0, BLOCK_SIZE)
        total += tl.load(X + (at // NUM_TILES * HEADS + h) * NUM_TILES + at % NUM_TILES, mask=at < B * NUM_TILES, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_parts(DW, DPOWER, DMAP, DGATE, pid, B, HEADS, NUM_TILES, NUM_SPLITS, D: tl.constexpr, F: tl.constexpr, BLOCK_SIZE: tl.constexpr, BS: tl.constexpr, GATES: tl.constexpr):  # fmt: skip
    """DMAP [HEADS, D, F] and DGATE [HEADS, D + 1] from what `map_grad_kernel` left and DPOWER [B, HEADS, NUM_TILES]; the first HEADS programs have a power each."""
    if pid < HEADS:
        if GATES:
            power = _sum_over_blocks(DPOWER, pid, HEADS, NUM_TILES, B, BLOCK_SIZE * BS)
            tl.store(DGATE + pid * (D + 1) + D, power.to(DGATE.dtype.element_ty))
    else:
        SIZE: tl.constexpr = D * F + D if GATES else D * F
        column, split = (pid - HEADS) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE), tl.arange(0, BS)
        total = tl.zeros([BLOCK_SIZE], tl.float32)
        for first in range(0, NUM_SPLITS, BS):
            ok = (first + split < NUM_SPLITS)[:, None] & (column < HEADS * SIZE)[None, :]
            total += tl.sum(tl.load(DW + (first + split)[:, None] * (HEADS * SIZE) + column[None, :], mask=ok, other=0.0), 0)
        tl.store(DMAP + column, total.to(DMAP.dtype.element_ty), mask=column < HEADS * D * F)
        if GATES:
            gate = column - HEADS * D * F
            tl.store(DGATE + gate // D * (D + 1) + gate % D, total.to(DGATE.dtype.element_ty), mask=(gate >= 0) & (column < HEADS * SIZE))


@triton.jit
def parameter_grad_kernel(
    DW_Q, DW_K, DPOWER_Q, DPOWER_K, DLOG, DMAP_Q, DMAP_K, DGATE_Q, DGATE_K, DWEIGHT, B, H, GS, TILES_Q, TILES_K, SPLITS_Q, SPLITS_K,
    D: tl.constexpr, F: tl.constexpr, BLOCK_SIZE: tl.constexpr, BS: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Adds up, in a fixed order, what the other kernels left in parts: gradients of maps, gates and log weight DWEIGHT [H]; program_id(1): queries, keys, log weight."""
    pid = tl.program_id(0)
    if tl.program_id(1) == 0:
        _sum_parts(DW_Q, DPOWER_Q, DMAP_Q, DGATE_Q, pid, B, H, TILES_Q, SPLITS_Q, D, F, BLOCK_SIZE, BS, GATES)
    elif tl.program_id(1) == 1:
        _sum_parts(DW_K, DPOWER_K, DMAP_K, DGATE_K, pid, B, GS, TILES_K, SPLITS_K, D, F, BLOCK_SIZE, BS, GATES)
    elif pid < H:
        tl.store(DWEIGHT + pid, _sum_over_blocks(DLOG, pid, H, TILES_Q, B, BLOCK_SIZE * BS))


# Host side, see triton_operator.py. Shapes and the architecture decide everything: no autotuning, and the number of segments does not depend on the device.
TARGET_PROGRAMS = 264  # two per multiprocessor of an H100
STATE_DISTANCE = 64  # tokens between stored states
MAX_HEAD_DIM = 256
MAX_VALUE_BLOCK = 128  # value columns of one program; wider heads are split
MAX_FEATURES = 128  # per half


def _pow2(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


@functools.cache
def _blocks(D: int, F: int, narrow: bool, arch: int = 90, between: bool = False) -> dict[str, Any]:
    """Block sizes, warps and stages per kernel for a head_dim D, F features per half; narrow: bf16 or fp16; arch: `_arch`."""
    DP, FP = _pow2(D), _pow2(F)
    if DP > 64 and narrow and arch // 10 in (9, 10):
        # ptxas 12.8 (Triton 3.6) gives products with 128 x 32 matrices an operand relative to the stack pointer; tools/compile_kernels.py looks for it
        FP = max(FP, 64)
    large, wide = DP * FP > 128 * 64, DP > 128
    # ptxas gives up on some kernels that must spill and compiles them for 32 or 128 registers; told the maximum it takes it, and spills a third
    all_registers = {"maxnreg": 255}
    if arch // 10 in (9, 10):
        # Fastest measured on an H100 for D <= 128. Wide heads, and the keys between windows and states, need smaller blocks or one stage to fit.
        rows, grad_rows = 64 if narrow and not (wide and between) else 32, 64 if narrow and not wide else 32
        options = {
            "state": {"num_warps": 8 if large else 4, "num_stages": 2},
            "reverse": {"num_warps": 8 if large else 4, "num_stages": 1 if wide else 2},
            "output": {"num_warps": 4, "num_stages": 2},
            "query": {"num_warps": 4, "num_stages": 2 if large else 1},
            "key": {"num_warps": 8 if large else 4, "num_stages": 2 if large and not between else 1},
            "map": {"num_warps": 4, "num_stages": 2},
        }
        if wide:
            options |= {name: {"num_warps": 8, "num_stages": 2} | all_registers for name in ("output", "query", "key", "map")}
    else:
        # Operands of tensor-core instructions sit in registers here, not in shared memory, of which most of these GPUs have 99 KiB: small blocks.
        rows = grad_rows = 32
        options = {
            "state": {"num_warps": 4 if DP * FP < 128 * 64 else 8, "num_stages": 1 if large else 2},
            "reverse": {"num_warps": 4 if DP * FP < 128 * 64 else 8, "num_stages": 1 if large else 2} | all_registers,
            "output": {"num_warps": 8 if large else 4, "num_stages": 2},
            "query": {"num_warps": 4 if DP * FP < 64 * 64 else 8, "num_stages": 1} | all_registers,
            "key": {"num_warps": 4 if DP * FP < 64 * 64 else 8, "num_stages": 1} | all_registers,
            "map": {"num_warps": 8 if large else 4, "num_stages": 2},
        }
    return {
        "DP": DP, "FP": FP, "BV": min(DP, MAX_VALUE_BLOCK), "CS": STATE_DISTANCE, "BM": rows, "BN": rows, "GBM": grad_rows, "GBN": grad_rows, **options,
    }  # fmt: skip


_POINTERS = {
    **dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV", "X", "DY", "WQ", "WK"), "io"),
    **dict.fromkeys(("START", "FOLD", "FINAL_CHUNK", "ARG_MAX"), "i32"),
    "S": "state",
    "CARRY": "state",
    **dict.fromkeys(("Z", "SEG", "INITIAL", "FINAL", "LSE", "ROW_MAX", "DELTA", "PATH", "GQ", "GK", "LOG_WEIGHT", "DGATE", "DPOWER", "DLOG", "DSINK", "DW"), "fp32"),
    **dict.fromkeys(("X_Q", "X_K", "DW_Q", "DW_K", "DPOWER_Q", "DPOWER_K", "DMAP_Q", "DMAP_K", "DGATE_Q", "DGATE_K", "DWEIGHT"), "fp32"),
    **dict.fromkeys(("OUT_Q", "OUT_K"), "io"),
}  # fmt: skip
_PASSES = (state_kernel, output_kernel, reverse_state_kernel, query_grad_kernel, key_grad_kernel)
_SHIPPED = (
    # name, head_dim, features per half, query heads per state, what differs from the default recipe in training, the kernels for which it matters
    ("", 64, 64, 3, {}, (*_PASSES, map_grad_kernel)),
    ("", 128, 128, 4, {}, (*_PASSES, map_grad_kernel, prefix_kernel, delta_kernel, sink_grad_kernel, round_kernel, parameter_grad_kernel)),
    ("", 128, 64, 1, {}, (*_PASSES, map_grad_kernel)),
    ("", 256, 128, 1, {}, (*_PASSES, map_grad_kernel)),
    ("", 32, 32, 1, {}, _PASSES),
    ("", 96, 96, 1, {}, _PASSES),
    ("", 64, 64, 1, {}, (key_grad_kernel,)),
    ("", 128, 64, 4, {}, (reverse_state_kernel, key_grad_kernel)),
    ("-reverse", 128, 128, 4, {"REVERSE": True}, (prefix_kernel,)),
    ("-sliding", 64, 64, 3, {"BLOCK": False, "BETWEEN": True}, (output_kernel, query_grad_kernel)),
    ("-sliding", 128, 128, 4, {"BLOCK": False, "BETWEEN": True}, (key_grad_kernel,)),
    ("-prefill", 128, 128, 4, {"BETWEEN": True, "HAS_FOLD": True, "HAS_FINAL": True, "SAVE": False}, (state_kernel, output_kernel)),
    ("-lolcats", 128, 64, 1, {"GATES": False, "WINDOW_MAX": True, "HAS_START": False, "SB": 0}, (output_kernel, query_grad_kernel)),
    ("-window", 128, 16, 4, {"GATES": False, "LINEAR": False, "SAVE": False}, (output_kernel,)),
)  # fmt: skip
# Bytes of stack accepted on compute capability (8.x, 9.x): what Triton 3.6 or 3.9 needs, rounded up to 64; 0 elsewhere.
# 9.x: of the blocks tried on an H100 the fastest for D <= 128, and those spill. What does not is slower: at D = F = 128, R = 4 the output takes 446 us
# with 4 warps and 604 with 8, the queries' gradient 690 and 839. 8.x and D = 256 are chosen by ptxas's figures, not by time: the gradients use tiles of
# two maps and two states, which blocks of 32 tokens do not keep in registers either; blocks of 16 spill less but read those tiles twice as often.
_STACK = {
    "key_grad_kernel-d32-f32-r1": (64, 0),
    "key_grad_kernel-d64-f64-r1": (0, 192),
    "key_grad_kernel-d64-f64-r3": (0, 192),
    "key_grad_kernel-d96-f96-r1": (832, 1152),
    "key_grad_kernel-d128-f64-r1": (256, 1024),
    "key_grad_kernel-d128-f64-r4": (256, 832),
    "key_grad_kernel-d128-f128-r4": (1152, 1536),
    "key_grad_kernel-d128-f128-r4-sliding": (832, 1984),
    "key_grad_kernel-d256-f128-r1": (3264, 3200),
    "output_kernel-d64-f64-r3": (0, 64),
    "output_kernel-d64-f64-r3-sliding": (64, 576),
    "output_kernel-d96-f96-r1": (128, 576),
    "output_kernel-d128-f64-r1": (128, 256),
    "output_kernel-d128-f64-r1-lolcats": (64, 192),
    "output_kernel-d128-f128-r4": (64, 832),
    "output_kernel-d128-f128-r4-prefill": (128, 2496),
    "output_kernel-d256-f128-r1": (128, 640),
    "query_grad_kernel-d64-f64-r3": (0, 128),
    "query_grad_kernel-d64-f64-r3-sliding": (128, 704),
    "query_grad_kernel-d96-f96-r1": (832, 1152),
    "query_grad_kernel-d128-f64-r1": (384, 960),
    "query_grad_kernel-d128-f64-r1-lolcats": (64, 320),
    "query_grad_kernel-d128-f128-r4": (960, 1728),
    "query_grad_kernel-d256-f128-r1": (3008, 3392),
    "reverse_state_kernel-d32-f32-r1": (0, 64),
    "reverse_state_kernel-d64-f64-r3": (0, 64),
    "reverse_state_kernel-d96-f96-r1": (0, 128),
    "reverse_state_kernel-d128-f64-r1": (0, 128),
    "reverse_state_kernel-d128-f64-r4": (0, 192),
    "reverse_state_kernel-d128-f128-r4": (64, 128),
    "reverse_state_kernel-d256-f128-r1": (448, 192),
    "state_kernel-d96-f96-r1": (64, 0),
    "state_kernel-d128-f64-r1": (64, 0),
    "state_kernel-d128-f128-r4": (64, 0),
    "state_kernel-d128-f128-r4-prefill": (128, 128),
    "state_kernel-d256-f128-r1": (192, 0),
}


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    configs = []
    for label, D, F, R, changes, kernels in _SHIPPED:
        blocks = _blocks(D, F, True, arch, changes.get("BETWEEN", False))
        grad = {"BM": blocks["GBM"], "BN": blocks["GBN"]}
        own = {
            state_kernel: ({}, blocks["state"]),
            prefix_kernel: ({}, {"num_warps": 4}),
            output_kernel: ({}, blocks["output"]),
            delta_kernel: ({"BM": 64}, {"num_warps": 4}),
            reverse_state_kernel: ({}, blocks["reverse"]),
            query_grad_kernel: (grad, blocks["query"]),
            key_grad_kernel: (grad, blocks["key"]),
            map_grad_kernel: ({}, blocks["map"]),
            sink_grad_kernel: (grad, {"num_warps": 8}),
            round_kernel: ({}, {"num_warps": 4}),
            parameter_grad_kernel: ({"BLOCK_SIZE": 128, "BS": 16}, {"num_warps": 4}),
        }
        recipe = {
            "R": R, "D": D, "DP": blocks["DP"], "BV": blocks["BV"], "F": F, "FP": blocks["FP"], "C": 64, "BLOCK": True, "CS": blocks["CS"], "BM": blocks["BM"], "BN": blocks["BN"],
            "SB": 16, "BT": 64, "BLOCK_SIZE": 1024, "LINEAR": True, "BETWEEN": False, "GATES": True, "WINDOW_MAX": False, "HAS_START": True, "HAS_FOLD": False, "HAS_FINAL": False,
            "HAS_INITIAL": False, "SPLIT": True, "SAVE": True, "REVERSE": False, "LT": tl.bfloat16, "PREC": "tf32",
        }  # fmt: skip
        for kernel in kernels:
            if arch == 80 and D > 128 and kernel in (reverse_state_kernel, query_grad_kernel, key_grad_kernel, map_grad_kernel):
                continue  # `refusal`: their gradients ask for more shared memory than there is
            special, options = own[kernel]
            values = recipe | special | changes
            constexprs = {name: values[name] for name in kernel.arg_names if name in values}
            signature = {}
            for name in kernel.arg_names:
                if name in constexprs:
                    signature[name] = "constexpr"
                elif name in _POINTERS:
                    signature[name] = "*" + {"io": "bf16", "state": "bf16"}.get(_POINTERS[name], _POINTERS[name])
                else:
                    signature[name] = "fp32" if name == "scale" else "i32:16" if name.endswith(("_sb", "_st", "_sh")) else "i32"
            name = f"{kernel.__name__}-d{D}-f{F}-r{R}{label}"
            configs.append((name, kernel, signature, constexprs, options, _STACK.get(name, (0, 0))[arch // 10 in (9, 10)]))
    return configs
