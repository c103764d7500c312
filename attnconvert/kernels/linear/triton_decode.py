"""The decode step as one Triton launch.

A program has one state head (b, g) and, in most steps, some of its query heads and a slice of the value dimension. It reads the state once,
the window's keys once, computes phi(q) on the way and writes its piece of the output: no second launch, no atomics.

Programs of a launch cannot wait for each other, so none may write what another reads:

- New keys go to a ring slot that no query of this step looks at (the ring has a slot more than needed).
- Keys leave the window once in C steps (block) or in every step (sliding, or no window). Then kv is written, so the programs of a state head
  take other shares: each a thinner slice of the value dimension for *all* query heads, which it reads, adds to and writes alone.
- z, which all of them read, is written to its other slot.
- Each counts the tokens in its own copies of the length.

At batch 64 the maps of the query heads, which every program reads from L2, are more bytes than state and window together: where there are programs enough, one
takes two rows of the batch and reads them once. Bringing state and window into L2 beforehand was tried and is slower (46.2 us against 38.3, batch 64, 32 heads, 8 KV heads).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:  # transformers refuses a checkpoint whose code imports a missing package, except inside a try
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this file needs triton; the PyTorch form of the step does not") from error

from attnconvert.kernels.launch import MAX_PLANS, Launch, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, namespace

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(1e-12)  # constants of the reference operator
MAX_SHIFT = tl.constexpr(40.0)
GATE_LIMIT = tl.constexpr(12.0)
MAX_HEAD_DIM = 256
MAX_HALF_FEATURES = 256
MAX_GROUP = 16  # query heads per state head: the rows of one tensor-core tile
TILE_ELEMENTS = 8192  # of a tile of maps or state that a program holds in registers
TARGET_PROGRAMS = 128  # an H100 has 132 multiprocessors
MAX_BATCH_ROWS = 2  # of a program: each query map, which lies in L2, is read once for so many


@triton.jit
def _phi(y, keep, projected, power, F2: tl.constexpr, GATED: tl.constexpr, AXIS: tl.constexpr):
    """Both halves of phi from y = xW, features along AXIS."""
    top = tl.max(tl.where(keep, y, float("-inf")), AXIS, keep_dims=True)
    low = tl.min(tl.where(keep, y, float("inf")), AXIS, keep_dims=True)
    positive = tl.where(keep, tl.exp2((y - top) * LOG2E), 0.0)
    negative = tl.where(keep, tl.exp2((low - y) * LOG2E), 0.0)
    sum_positive = tl.sum(positive, AXIS, keep_dims=True)
    sum_negative = tl.sum(negative, AXIS, keep_dims=True)
    norm_positive = 1.0 / sum_positive
    norm_negative = 1.0 / sum_negative
    if GATED:
        exponent_positive = projected + power * (top + tl.log(sum_positive * (1.0 / F2)))
        exponent_negative = projected + power * (tl.log(sum_negative * (1.0 / F2)) - low)
        norm_positive *= tl.exp2(tl.minimum(tl.maximum(exponent_positive, -GATE_LIMIT), GATE_LIMIT) * LOG2E)
        norm_negative *= tl.exp2(tl.minimum(tl.maximum(exponent_negative, -GATE_LIMIT), GATE_LIMIT) * LOG2E)
    positive = tl.where(keep, tl.maximum(positive * norm_positive, FLOOR), 0.0)
    negative = tl.where(keep, tl.maximum(negative * norm_negative, FLOOR), 0.0)
    return positive, negative


@triton.jit
def _project(X, W, D: tl.constexpr, F2: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, DC: tl.constexpr):
    """One vector times one map: [F2] from X [D] and W [D, F2], on CUDA cores in fp32."""
    f = tl.arange(0, BF)
    y = tl.zeros([BF], tl.float32)
    for d0 in tl.static_range(0, BD, DC):
        d = d0 + tl.arange(0, DC)
        x = tl.load(X + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(W + d[:, None] * F2 + f[None, :], mask=(d < D)[:, None] & (f < F2)[None, :], other=0.0).to(tl.float32)
        y += tl.sum(x[:, None] * w, 0)
    return y


@triton.jit
def _fold(
    K, V, RING_K, RING_V, KV, KEY_MAP, KEY_GATE, z_positive, z_negative, lo, before, v0,
    D: tl.constexpr, F2: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, NUM_SLOTS: tl.constexpr, SINKS: tl.constexpr, GATED: tl.constexpr,
    COLUMNS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, DC: tl.constexpr, FOLD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys at positions [before, lo) to columns [v0, v0 + COLUMNS) of kv in memory, and to z, which it returns."""
    f = tl.arange(0, BF)
    d = tl.arange(0, BD)
    BW: tl.constexpr = COLUMNS if COLUMNS < 32 else 32
    FC: tl.constexpr = 16  # small tiles: it runs once in C steps and must not cost the other steps registers
    if UNIT == 1:  # a rank-one update on CUDA cores
        if WINDOW > 0:
            K = RING_K + (before % NUM_SLOTS) * D
            V = RING_V + (before % NUM_SLOTS) * D
        y = _project(K, KEY_MAP, D, F2, BD, BF, DC)
        projected = tl.zeros([1, 1], tl.float32)
        power = tl.zeros([1, 1], tl.float32)
        if GATED:
            key = tl.load(K + d, mask=d < D, other=0.0).to(tl.float32)
            direction = tl.load(KEY_GATE + d, mask=d < D, other=0.0).to(tl.float32)
            projected = tl.sum((key * direction)[None, :], 1, keep_dims=True) * (D**-0.5)
            power += tl.load(KEY_GATE + D).to(tl.float32)
        positive, negative = _phi(y[:, None], (f < F2)[:, None], projected, power, F2, GATED, 0)
        positive = tl.where(before >= SINKS, positive, 0.0)
        negative = tl.where(before >= SINKS, negative, 0.0)
        z_positive += tl.sum(positive, 1)
        z_negative += tl.sum(negative, 1)
        for w0 in range(0, COLUMNS, BW):
            column = v0 + w0 + tl.arange(0, BW)
            value = tl.load(V + column, mask=column < D, other=0.0).to(tl.float32)
            state = KV + f[:, None] * D + column[None, :]
            mask = (f < F2)[:, None] & (column < D)[None, :]
            tl.store(state, tl.load(state, mask=mask, other=0.0) + positive * value[None, :], mask=mask)
            tl.store(state + F2 * D, tl.load(state + F2 * D, mask=mask, other=0.0) + negative * value[None, :], mask=mask)
    else:
        for c0 in tl.range(0, UNIT, BC, num_stages=1):
            position = before + c0 + tl.arange(0, BC)
            here = position < lo
            old = (position % NUM_SLOTS) * D
            y = tl.zeros([BF, BC], tl.float32)
            projected = tl.zeros([1, BC], tl.float32)
            power = tl.zeros([1, 1], tl.float32)
            for d0 in tl.range(0, BD, FC, num_stages=1):
                part = d0 + tl.arange(0, FC)
                keys = tl.load(RING_K + old[:, None] + part[None, :], mask=here[:, None] & (part < D)[None, :], other=0.0).to(tl.float32)
                weights = tl.load(KEY_MAP + part[:, None] * F2 + f[None, :], mask=(part < D)[:, None] & (f < F2)[None, :], other=0.0).to(tl.float32)
                # The product is built transposed: a transposed accumulator must never enter a dot.
                y = tl.dot(tl.trans(weights), tl.trans(keys), y, input_precision=FOLD_PRECISION)
                if GATED:
                    direction = tl.load(KEY_GATE + part, mask=part < D, other=0.0).to(tl.float32)
                    projected += tl.sum(keys * direction[None, :], 1)[None, :] * (D**-0.5)
            if GATED:
                power += tl.load(KEY_GATE + D).to(tl.float32)
            positive, negative = _phi(y, (f < F2)[:, None], projected, power, F2, GATED, 0)
            counts = (here & (position >= SINKS))[None, :]
            positive = tl.where(counts, positive, 0.0)
            negative = tl.where(counts, negative, 0.0)
            z_positive += tl.sum(positive, 1)
            z_negative += tl.sum(negative, 1)
            for w0 in tl.range(0, COLUMNS, BW, num_stages=1):
                column = v0 + w0 + tl.arange(0, BW)
                values = tl.load(RING_V + old[:, None] + column[None, :], mask=here[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
                state = KV + f[:, None] * D + column[None, :]
                mask = (f < F2)[:, None] & (column < D)[None, :]
                tl.store(state, tl.load(state, mask=mask, other=0.0) + tl.dot(positive, values, input_precision=FOLD_PRECISION), mask=mask)
                tl.store(state + F2 * D, tl.load(state + F2 * D, mask=mask, other=0.0) + tl.dot(negative, values, input_precision=FOLD_PRECISION), mask=mask)
            tl.debug_barrier()
    return z_positive, z_negative


@triton.jit
def _window_start(length, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    """(lo, before): where the window of the token at position `length` starts, and where that of the token before started."""
    if WINDOW == 0:
        lo = length + 1
        before = length
    elif BLOCKS:
        lo = tl.maximum(length // WINDOW - 1, 0) * WINDOW
        before = tl.maximum((length + (WINDOW - 1)) // WINDOW - 2, 0) * WINDOW
    else:
        lo = tl.maximum(length - WINDOW + 1, 0)
        before = tl.maximum(length - WINDOW, 0)
    return lo, before


@triton.jit
def _begin(row, head, HEADS: tl.constexpr, SIZE: tl.constexpr, ROW: tl.constexpr):
    """Where a head of a row of the state begins: heads of SIZE elements, rows ROW elements apart."""
    if ROW == HEADS * SIZE:  # not only shorter: the other form costs registers that kernels lack
        return (row * HEADS + head) * SIZE
    else:
        return row * ROW + head * SIZE


@triton.jit
def _fold_row(
    K, V, RING_K, RING_V, KV, Z, KEY_MAP, KEY_GATE, START, k_row, k_head, v_row, v_head, start_row, b, row, group, split, length,
    RING_K_ROW: tl.constexpr, RING_V_ROW: tl.constexpr, KV_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    STATE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, F2: tl.constexpr, WINDOW: tl.constexpr, BLOCKS: tl.constexpr, NUM_SLOTS: tl.constexpr, SINKS: tl.constexpr,
    GATED: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, DC: tl.constexpr, FOLD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of z of batch row b, which is row `row` of the state, after moving the keys that leave the window with this step, if any, into kv and z."""
    UNIT: tl.constexpr = WINDOW if (BLOCKS and WINDOW > 0) else 1
    key_head = group // (STATE_HEADS // KEY_HEADS)
    f = tl.arange(0, BF)
    lo, before = _window_start(length, WINDOW, BLOCKS)
    fold = lo > before
    if PADDED:
        fold = fold & (tl.load(START + b * start_row) <= 0)
    z = Z + _begin(row, group, STATE_HEADS, 4 * F2, Z_ROW)
    slot = (before // UNIT) % 2
    z_positive = tl.load(z + slot * (2 * F2) + f, mask=f < F2, other=0.0)
    z_negative = tl.load(z + slot * (2 * F2) + F2 + f, mask=f < F2, other=0.0)
    if fold:
        ring_k = RING_K + _begin(row, key_head, KEY_HEADS, NUM_SLOTS * D, RING_K_ROW)
        ring_v = RING_V + _begin(row, key_head, KEY_HEADS, NUM_SLOTS * D, RING_V_ROW)
        z_positive, z_negative = _fold(
            K + b * k_row + key_head * k_head, V + b * v_row + key_head * v_head, ring_k, ring_v, KV + _begin(row, group, STATE_HEADS, 2 * F2 * D, KV_ROW),
            KEY_MAP + group * (D * F2), KEY_GATE + group * (D + 1), z_positive, z_negative, lo, before, split * (BD // SPLITS),
            D, F2, WINDOW, UNIT, NUM_SLOTS, SINKS, GATED, BD // SPLITS, BD, BF, BC, DC if DC < 32 else 32, FOLD_PRECISION,
        )  # fmt: skip
        # Scalar conditions go into bounds: the interpreter cannot combine them with a mask.
        z_limit = tl.where(split == 0, F2, 0)
        slot = (lo // UNIT) % 2
        tl.store(z + slot * (2 * F2) + f, z_positive, mask=f < z_limit)
        tl.store(z + slot * (2 * F2) + F2 + f, z_negative, mask=f < z_limit)
        tl.debug_barrier()  # other threads of this program read what was just written to kv and z
    return z_positive, z_negative


@triton.jit
def _project_heads(
    at, row_ok, QUERY_MAP, head0, i, d0,
    ROWS: tl.constexpr, HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, D: tl.constexpr, F2: tl.constexpr, BF: tl.constexpr, DC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What elements [d0, d0 + DC) of q add to y = qW in the rows of head i, 0 in the others.

    Each head has its map: all rows are multiplied by it and those of the head are kept. A row of a tile costs a tensor core nothing.
    """
    d = d0 + tl.arange(0, DC)
    f = tl.arange(0, BF)
    x = tl.load(at[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    this = tl.minimum(head0 + i, NUM_HEADS - 1)  # one too many where heads do not divide: its row is never stored
    w = tl.load(QUERY_MAP + this * (D * F2) + d[:, None] * F2 + f[None, :], mask=(d < D)[:, None] & (f < F2)[None, :], other=0.0).to(tl.float32)
    return tl.where((tl.arange(0, ROWS) % HEADS == i)[:, None], tl.dot(x, w, input_precision=PRECISION), 0.0)


@triton.jit
def _features(
    Q, QUERY_MAP, QUERY_GATE, q_row, q_head, head0,
    ROWS: tl.constexpr, BATCH_ROWS: tl.constexpr, HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, D: tl.constexpr, F2: tl.constexpr, GATED: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, DC: tl.constexpr, LOOPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of phi(q), [ROWS, BF] each; row b * HEADS + i is query head head0 + i of the program's batch row b. LOOPED: little code and few registers."""
    row = tl.arange(0, ROWS)
    f = tl.arange(0, BF)
    head = head0 + row % HEADS
    row_ok = (row // HEADS < BATCH_ROWS) & (head < NUM_HEADS)
    at = Q + row // HEADS * q_row + head * q_head
    y = tl.zeros([ROWS, BF], tl.float32)
    if LOOPED:
        for i in tl.range(0, HEADS, num_stages=1):
            for d0 in tl.range(0, BD, DC, num_stages=1):
                y += _project_heads(at, row_ok, QUERY_MAP, head0, i, d0, ROWS, HEADS, NUM_HEADS, D, F2, BF, DC, PRECISION)
    else:
        for d0 in tl.static_range(0, BD, DC):
            for i in tl.static_range(HEADS):
                y += _project_heads(at, row_ok, QUERY_MAP, head0, i, d0, ROWS, HEADS, NUM_HEADS, D, F2, BF, DC, PRECISION)
    projected = tl.zeros([ROWS, 1], tl.float32)
    power = tl.zeros([ROWS, 1], tl.float32)
    if GATED:
        d = tl.arange(0, BD)
        mask = row_ok[:, None] & (d < D)[None, :]
        q = tl.load(at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        direction = tl.load(QUERY_GATE + head[:, None] * (D + 1) + d[None, :], mask=mask, other=0.0).to(tl.float32)
        projected = tl.sum(q * direction, 1, keep_dims=True) * (D**-0.5)
        power = tl.load(QUERY_GATE + head * (D + 1) + D, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    return _phi(y, (f < F2)[None, :], projected, power, F2, GATED, 1)


@triton.jit
def _attend(
    Q, K, V, OUT, RING_K, RING_V, SINK_K, SINK_V, KV, LOG_WEIGHT, phi_positive, phi_negative, z_positive, z_negative,
    q_row, q_head, weight_row, weight_head, scale, length, lo, valid, writes_keys, writes_values, this_row, head0, v0,
    ROWS: tl.constexpr, HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, OUT_HEADS: tl.constexpr, D: tl.constexpr, F2: tl.constexpr, WINDOW: tl.constexpr,
    NUM_SLOTS: tl.constexpr, SINKS: tl.constexpr, LINEAR: tl.constexpr, ABSOLUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query heads [head0, head0 + HEADS) of a state head, columns [v0, v0 + BV) of the values, of the program's batch row this_row.

    Q, OUT and LOG_WEIGHT stand at the program's first batch row, the other pointers at this one. All rows of phi take part, those of other batch rows without a query: nothing of them is stored.
    """
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    column = v0 + tl.arange(0, BV)
    f = tl.arange(0, BF)
    column_ok = column < D
    b = row // HEADS
    head = head0 + row % HEADS
    head_ok = (b == this_row) & (head < NUM_HEADS)
    q_mask = head_ok[:, None] & (d < D)[None, :]
    q = tl.load(Q + (b * q_row + head * q_head)[:, None] + d[None, :], mask=q_mask, other=0.0)

    if LINEAR:
        state = KV + f[:, None] * D + column[None, :]
        state_mask = (f < F2)[:, None] & column_ok[None, :]
        if EARLY >= 1:  # where registers allow it, the longest loads are on their way while the softmax is computed
            kv_positive = tl.load(state, mask=state_mask, other=0.0)
        if EARLY >= 2:
            kv_negative = tl.load(state + F2 * D, mask=state_mask, other=0.0)

    # Softmax over sinks, window and the token itself, in this order.
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    parts = tl.zeros([ROWS, BN], tl.float32)  # of the sum of the weights: added up once, not once a tile
    out = tl.zeros([ROWS, BV], tl.float32)
    if WINDOW > 0 or SINKS > 0:
        if WINDOW > 0:
            num_sinks = tl.minimum(lo, SINKS)
            num_window = length - lo
            num_keys = num_sinks + num_window + 1
        else:
            num_sinks = tl.minimum(length, SINKS)
            num_window = 0
            num_keys = tl.minimum(length + 1, SINKS)
        for n0 in range(0, num_keys, BN):
            n = n0 + tl.arange(0, BN)
            seen = n < num_keys
            is_sink = n < num_sinks
            is_new = n == num_sinks + num_window
            if WINDOW > 0:
                ring_slot = ((lo + n - num_sinks) % NUM_SLOTS).to(tl.int64) * D
                key_at = tl.where(is_new, K, RING_K + ring_slot)
                value_at = tl.where(is_new, V, RING_V + ring_slot)
                if SINKS > 0:
                    key_at = tl.where(is_sink, SINK_K + n * D, key_at)
                    value_at = tl.where(is_sink, SINK_V + n * D, value_at)
            else:
                key_at = tl.where(is_new, K, SINK_K + n * D)
                value_at = tl.where(is_new, V, SINK_V + n * D)
            if ALIGNED:  # what the compiler cannot see through the choice of pointers: 16-byte loads
                key_at = tl.multiple_of(key_at, 16)
                value_at = tl.multiple_of(value_at, 16)
            keys = tl.load(key_at[:, None] + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            values = tl.load(value_at[:, None] + column[None, :], mask=seen[:, None] & column_ok[None, :], other=0.0)
            logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            logits = tl.where(seen[None, :], logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            parts = parts * shrink[:, None] + weights
            out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision=PRECISION)
            largest = new_largest
    total = tl.sum(parts, 1)

    if LINEAR:
        has_linear = lo > SINKS
        weight = tl.exp2(tl.load(LOG_WEIGHT + b * weight_row + head * weight_head, mask=head_ok, other=0.0).to(tl.float32) * LOG2E)
        if ABSOLUTE:
            # Only a common factor that cancels; bounded so that neither branch overflows or vanishes where the other is needed.
            bounded = tl.where(has_linear, tl.maximum(largest, -MAX_SHIFT * LOG2E), largest)
            shrink = tl.where(bounded > largest, tl.exp2(largest - bounded), 1.0)
            total *= shrink
            out *= shrink[:, None]
            weight *= tl.exp2(-tl.maximum(bounded, -MAX_SHIFT * LOG2E))
        weight = tl.where(has_linear, weight, 0.0)
        # The weight goes into phi: one accumulator for both branches, and what a tensor core needs of phi is not kept from one batch row to the next.
        phi_positive = phi_positive * weight[:, None]
        phi_negative = phi_negative * weight[:, None]
        if EARLY < 1:
            kv_positive = tl.load(state, mask=state_mask, other=0.0)
        out = tl.dot(phi_positive, kv_positive, out, input_precision=PRECISION)
        if EARLY < 2:
            kv_negative = tl.load(state + F2 * D, mask=state_mask, other=0.0)
        out = tl.dot(phi_negative, kv_negative, out, input_precision=PRECISION)
        total += tl.sum(phi_positive * z_positive[None, :] + phi_negative * z_negative[None, :], 1)
    total = tl.where(valid, total, 0.0)
    out = tl.where((total > 0)[:, None], out / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    tl.store(OUT + (b * OUT_HEADS + head)[:, None] * D + column[None, :], out.to(OUT.dtype.element_ty), mask=head_ok[:, None] & column_ok[None, :])

    key_limit = tl.where(writes_keys, D, 0)
    value_limit = tl.where(writes_values, D, 0)
    if WINDOW > 0:
        ring_row = (length % NUM_SLOTS).to(tl.int64) * D
        tl.store(RING_K + ring_row + d, tl.load(K + d, mask=d < D, other=0.0), mask=d < key_limit)
        tl.store(RING_V + ring_row + column, tl.load(V + column, mask=column_ok, other=0.0), mask=column < value_limit)
    if SINKS > 0:
        key_limit = tl.where(length < SINKS, key_limit, 0)
        value_limit = tl.where(length < SINKS, value_limit, 0)
        tl.store(SINK_K + length * D + d, tl.load(K + d, mask=d < D, other=0.0), mask=d < key_limit)
        tl.store(SINK_V + length * D + column, tl.load(V + column, mask=column_ok, other=0.0), mask=column < value_limit)


@triton.jit
def decode_step(
    Q, K, V, OUT, RING_K, RING_V, SINK_K, SINK_V, KV, Z, LENGTHS, QUERY_MAP, KEY_MAP, QUERY_GATE, KEY_GATE, LOG_WEIGHT, START, SLOTS,
    q_row, q_head, k_row, k_head, v_row, v_head, weight_row, weight_head, start_row, scale,
    RING_K_ROW: tl.constexpr, RING_V_ROW: tl.constexpr, SINK_K_ROW: tl.constexpr, SINK_V_ROW: tl.constexpr, KV_ROW: tl.constexpr, Z_ROW: tl.constexpr, LENGTHS_ROW: tl.constexpr,
    HAS_SLOTS: tl.constexpr, STATE_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, D: tl.constexpr, F2: tl.constexpr,
    WINDOW: tl.constexpr, BLOCKS: tl.constexpr, NUM_SLOTS: tl.constexpr, SINKS: tl.constexpr, COPIES: tl.constexpr,
    LINEAR: tl.constexpr, GATED: tl.constexpr, ABSOLUTE: tl.constexpr, PADDED: tl.constexpr, ALIGNED: tl.constexpr,
    BATCH_ROWS: tl.constexpr, HEAD_SPLITS: tl.constexpr, VALUE_SPLITS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, DC: tl.constexpr,
    EARLY: tl.constexpr, PRECISION: tl.constexpr, FOLD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B / BATCH_ROWS * STATE_HEADS, HEAD_SPLITS * VALUE_SPLITS). NUM_HEADS: query heads per state head. F2 = F/2.

    BATCH_ROWS > 1, which reads a query's map once for several rows of the batch, needs SPLITS == 1 and BATCH_ROWS * NUM_HEADS <= ROWS.
    The state's rows are *_ROW elements apart. With HAS_SLOTS, SLOTS [B] says which of them a row of the batch uses; -1: none, it is padding.
    """
    SPLITS: tl.constexpr = HEAD_SPLITS * VALUE_SPLITS
    HEADS: tl.constexpr = (NUM_HEADS + HEAD_SPLITS - 1) // HEAD_SPLITS
    UNIT: tl.constexpr = WINDOW if (BLOCKS and WINDOW > 0) else 1
    REPEAT: tl.constexpr = STATE_HEADS // KEY_HEADS
    program = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head_split = split % HEAD_SPLITS
    v0 = (split // HEAD_SPLITS) * (BD // VALUE_SPLITS)
    b0 = program // STATE_HEADS * BATCH_ROWS
    group = program % STATE_HEADS
    key_head = group // REPEAT
    first_head = group * NUM_HEADS
    first = b0
    if HAS_SLOTS:
        first = b0 * 0
    lengths = LENGTHS + _begin(first, group, STATE_HEADS, COPIES, LENGTHS_ROW) + split * (COPIES // SPLITS)
    if BATCH_ROWS > 1 and LINEAR:
        # In a part of its own, and with a zero that the compiler does not know: it would keep this part's addresses in registers in all steps.
        rows = tl.arange(0, BATCH_ROWS)
        if HAS_SLOTS:
            rows = tl.load(SLOTS + b0 + rows)
            known = tl.load(lengths + rows * LENGTHS_ROW, mask=rows >= 0, other=0).to(tl.int32)
        else:
            known = tl.load(lengths + rows * LENGTHS_ROW).to(tl.int32)
        starts, started = _window_start(known, WINDOW, BLOCKS)
        if tl.max(starts - started, 0) > 0:
            zero = tl.minimum(tl.max(starts, 0), 0)
            for r in tl.range(0, BATCH_ROWS, num_stages=1):
                row = b0 + r
                used = True
                if HAS_SLOTS:
                    row = tl.load(SLOTS + row)
                    used = row >= 0
                if used:
                    _fold_row(
                        K, V, RING_K, RING_V, KV, Z, KEY_MAP, KEY_GATE, START, k_row, k_head, v_row, v_head, start_row,
                        b0 + r, row, group + zero, split + zero, tl.load(lengths + (row - first) * LENGTHS_ROW).to(tl.int32), RING_K_ROW, RING_V_ROW, KV_ROW, Z_ROW,
                        STATE_HEADS, KEY_HEADS, D, F2, WINDOW, BLOCKS, NUM_SLOTS, SINKS, GATED, PADDED, SPLITS, BD, BF, BC, DC, FOLD_PRECISION,
                    )  # fmt: skip

    Q += b0 * q_row + first_head * q_head
    OUT += (b0 * STATE_HEADS * NUM_HEADS + first_head) * D
    LOG_WEIGHT += b0 * weight_row + first_head * weight_head
    QUERY_MAP += first_head * (D * F2)
    QUERY_GATE += first_head * (D + 1)
    f = tl.arange(0, BF)
    phi_positive = tl.zeros([ROWS, BF], tl.float32)
    phi_negative = tl.zeros([ROWS, BF], tl.float32)
    if LINEAR:
        phi_positive, phi_negative = _features(
            Q, QUERY_MAP, QUERY_GATE, q_row, q_head, head_split * HEADS, ROWS, BATCH_ROWS, HEADS, NUM_HEADS, D, F2, GATED, BD, BF, DC, BD > 128, PRECISION,
        )  # fmt: skip

    for r in tl.range(0, BATCH_ROWS, num_stages=1):
        b = b0 + r
        row = b
        used = True
        if HAS_SLOTS:
            row = tl.load(SLOTS + b)
            used = row >= 0
        if used:
            length = tl.load(lengths + (row - first) * LENGTHS_ROW).to(tl.int32)
            valid = split >= 0  # always
            if PADDED:
                valid = tl.load(START + b * start_row) <= 0
            lo, before = _window_start(length, WINDOW, BLOCKS)
            fold = (lo > before) & valid & LINEAR
            owner = valid & (group % REPEAT == 0)
            keys = K + b * k_row + key_head * k_head
            values = V + b * v_row + key_head * v_head
            ring_k = RING_K + _begin(row, key_head, KEY_HEADS, NUM_SLOTS * D, RING_K_ROW)
            ring_v = RING_V + _begin(row, key_head, KEY_HEADS, NUM_SLOTS * D, RING_V_ROW)
            sink_k = SINK_K + _begin(row, key_head, KEY_HEADS, SINKS * D, SINK_K_ROW)
            sink_v = SINK_V + _begin(row, key_head, KEY_HEADS, SINKS * D, SINK_V_ROW)
            kv = KV + _begin(row, group, STATE_HEADS, 2 * F2 * D, KV_ROW)
            z_positive = tl.zeros([BF], tl.float32)
            z_negative = tl.zeros([BF], tl.float32)
            if LINEAR:
                if BATCH_ROWS > 1:
                    z = Z + _begin(row, group, STATE_HEADS, 4 * F2, Z_ROW) + (lo // UNIT) % 2 * (2 * F2)
                    z_positive += tl.load(z + f, mask=f < F2, other=0.0)
                    z_negative += tl.load(z + F2 + f, mask=f < F2, other=0.0)
                else:
                    z_positive, z_negative = _fold_row(
                        K, V, RING_K, RING_V, KV, Z, KEY_MAP, KEY_GATE, START, k_row, k_head, v_row, v_head, start_row, b, row, group, split, length,
                        RING_K_ROW, RING_V_ROW, KV_ROW, Z_ROW,
                        STATE_HEADS, KEY_HEADS, D, F2, WINDOW, BLOCKS, NUM_SLOTS, SINKS, GATED, PADDED, SPLITS, BD, BF, BC, DC, FOLD_PRECISION,
                    )  # fmt: skip
            if HEAD_SPLITS > 1 and fold:
                all_positive, all_negative = _features(
                    Q, QUERY_MAP, QUERY_GATE, q_row, q_head, split * 0, ROWS, BATCH_ROWS, NUM_HEADS, NUM_HEADS, D, F2, GATED, BD, BF, 16, True, PRECISION,
                )  # fmt: skip
                _attend(
                    Q, keys, values, OUT, ring_k, ring_v, sink_k, sink_v, kv, LOG_WEIGHT, all_positive, all_negative, z_positive, z_negative,
                    q_row, q_head, weight_row, weight_head, scale, length, lo, valid, owner & (split == 0), owner, r, split * 0, split * (BD // SPLITS),
                    ROWS, NUM_HEADS, NUM_HEADS, STATE_HEADS * NUM_HEADS, D, F2, WINDOW, NUM_SLOTS, SINKS, LINEAR, ABSOLUTE, ALIGNED, BD, BF, BD // SPLITS, BN, 0, PRECISION,
                )  # fmt: skip
            else:
                _attend(
                    Q, keys, values, OUT, ring_k, ring_v, sink_k, sink_v, kv, LOG_WEIGHT, phi_positive, phi_negative, z_positive, z_negative,
                    q_row, q_head, weight_row, weight_head, scale, length, lo, valid, owner & (split == 0), owner & (head_split == 0), r, head_split * HEADS, v0,
                    ROWS, HEADS, NUM_HEADS, STATE_HEADS * NUM_HEADS, D, F2, WINDOW, NUM_SLOTS, SINKS, LINEAR, ABSOLUTE, ALIGNED, BD, BF, BD // VALUE_SPLITS, BN, EARLY, PRECISION,
                )  # fmt: skip
            copy = (row - first) * LENGTHS_ROW + tl.arange(0, COPIES // SPLITS)
            if PADDED:
                tl.store(lengths + copy, tl.zeros([COPIES // SPLITS], tl.int64) + length + valid.to(tl.int64))
            else:
                tl.store(lengths + copy, tl.zeros([COPIES // SPLITS], tl.int64) + length + 1)
        else:
            which = tl.arange(0, ROWS)
            head = head_split * HEADS + which % HEADS
            column = v0 + tl.arange(0, BD // VALUE_SPLITS)
            mask = ((which // HEADS == r) & (head < NUM_HEADS))[:, None] & (column < D)[None, :]
            nothing = tl.zeros([ROWS, BD // VALUE_SPLITS], OUT.dtype.element_ty)
            tl.store(OUT + (which // HEADS * (STATE_HEADS * NUM_HEADS) + head)[:, None] * D + column[None, :], nothing, mask=mask)


def step_refusal(device_type: str, dtype: torch.dtype, head_dim: int, half_features: int, group: int) -> str | None:
    """Why the kernel cannot take a step, or None. `group`: query heads per state head."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not INTERPRETED:
        return f"the tensors are on {device_type}, Triton needs CUDA"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}"
    if half_features > MAX_HALF_FEATURES:
        return f"{half_features} features in each half are more than {MAX_HALF_FEATURES}"
    if group > MAX_GROUP:
        return f"{group} query heads share a state, more than {MAX_GROUP}"
    return None


# Constants and not arguments: rows lie as far apart in all layers of a model and at all times.
_ROWS = ("RING_K_ROW", "RING_V_ROW", "SINK_K_ROW", "SINK_V_ROW", "KV_ROW", "Z_ROW", "LENGTHS_ROW")


def _constants(
    num_pairs: int, state_heads: int, key_heads: int, num_heads: int, head_dim: int, half_features: int, window_size: int, kind: str, num_slots: int, num_sinks: int, copies: int,
    *, gated: bool, absolute: bool, padded: bool, aligned: bool, exact: bool, rows: tuple[int, ...], has_slots: bool,
) -> tuple[dict[str, Any], dict[str, int]]:  # fmt: skip
    """The kernel's constexprs and its launch options. num_pairs: B times state heads; num_heads: query heads per state head; rows: elements from a row of each tensor of the state to the next."""
    BD, BF = max(32, triton.next_power_of_2(head_dim)), max(16, triton.next_power_of_2(half_features))
    value_splits, head_splits = max(1, BD * BF // TILE_ELEMENTS), 1

    def more() -> bool:  # a program of a folding step has 8 columns at least
        splits = value_splits * head_splits
        return num_pairs * splits < TARGET_PROGRAMS and 2 * splits <= min(copies, BD // 8)

    while head_splits < num_heads and more():  # heads first: they share no map
        head_splits *= 2
    while more() and BD // value_splits > 16:
        value_splits *= 2
    columns = BD // value_splits
    many = num_pairs >= TARGET_PROGRAMS
    # Where the state is only read in most steps, and while there are two programs for each multiprocessor.
    batch_rows = 1
    while (
        kind == "block" and head_splits * value_splits == 1 and 2 * batch_rows <= min(MAX_BATCH_ROWS, MAX_GROUP // num_heads)
        and num_pairs // state_heads % (2 * batch_rows) == 0 and num_pairs >= 4 * batch_rows * TARGET_PROGRAMS
    ):  # fmt: skip
        batch_rows *= 2
    constants = {
        **dict(zip(_ROWS, rows, strict=True)), "HAS_SLOTS": has_slots, "STATE_HEADS": state_heads, "KEY_HEADS": key_heads, "NUM_HEADS": num_heads, "D": head_dim, "F2": half_features, "WINDOW": window_size, "BLOCKS": kind == "block",
        "NUM_SLOTS": num_slots, "SINKS": num_sinks, "COPIES": copies, "LINEAR": half_features > 0, "GATED": gated, "ABSOLUTE": absolute, "PADDED": padded, "ALIGNED": aligned,
        "BATCH_ROWS": batch_rows, "HEAD_SPLITS": head_splits, "VALUE_SPLITS": value_splits, "ROWS": max(8, triton.next_power_of_2(batch_rows * max(-(-num_heads // head_splits), num_heads if head_splits > 1 else 1))), "BD": BD, "BF": BF, "BN": 32 if many and (BD > 128 or BF > 64) else 64, "BC": 16,
        "DC": max(16, min(BD, TILE_ELEMENTS // 2 // BF)), "EARLY": 0 if many or BD > 128 else 2,
        "PRECISION": "ieee" if exact else "tf32", "FOLD_PRECISION": "ieee" if exact else "tf32x3",
    }  # fmt: skip
    options = {"num_warps": 8 if columns * BF > TILE_ELEMENTS // 2 else 4, "num_stages": 3 if BD <= 128 else 2}
    if many and BD <= 128 and BF <= 64:  # two blocks of 8 warps on a multiprocessor hide each other's waiting
        options["maxnreg"] = 65536 // (64 * options["num_warps"])
    return constants, options


_TENSORS = (
    "q", "k", "v", "ring_k", "ring_v", "sink_k", "sink_v", "kv", "z", "lengths", "query_map", "key_map", "log_weight", "query_gate", "key_gate", "start", "slots",
)  # fmt: skip


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], aligned: bool, window_size: int, window_kind: str, scale: float, reference: str) -> Plan:
    """The launch of a step. tensors: signatures of `_TENSORS`."""
    known = {name: one for name, one in zip(_TENSORS, tensors, strict=True) if one is not None}
    shape, stride = ({name: one[at] for name, one in known.items()} for at in (0, 1))
    dtype, device = known["q"][2:]
    B, _, H, D = shape["q"]
    state_heads = shape["kv"][1]
    constants, options = _constants(
        B * state_heads, state_heads, shape["k"][2], H // state_heads, D, shape["query_map"][-1] if "query_map" in known else 0, window_size, window_kind, shape["ring_k"][2], shape["sink_k"][2],
        shape["lengths"][2], gated="query_gate" in known, absolute=reference == "absolute", padded="start" in known, aligned=aligned, exact=dtype == torch.float32,
        rows=tuple(stride[name][0] for name in _TENSORS[3:10]), has_slots="slots" in known,
    )  # fmt: skip
    # an absent tensor is a pointer the kernel never follows
    pointers = (
        "q",
        "k",
        "v",
        "out",
        *_TENSORS[3:10],
        *(name if name in known else "q" for name in ("query_map", "key_map", "query_gate", "key_gate", "log_weight", "start", "slots")),
    )
    log_weight = stride.get("log_weight", stride["q"])
    numbers = (*(stride[name][axis] for name in "qkv" for axis in (0, 2)), *log_weight[:2], stride["start"][0] if "start" in known else 0, scale)
    grid = (B // constants["BATCH_ROWS"] * state_heads, constants["HEAD_SPLITS"] * constants["VALUE_SPLITS"])
    return Plan(device, (*_TENSORS, "out"), [Launch(decode_step, grid, (*pointers, *numbers), constants, options)], {})


def _launch(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, kv: Tensor, z: Tensor, lengths: Tensor, query_map: Tensor | None, key_map: Tensor | None,
    log_weight: Tensor, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None, slots: Tensor | None, window_size: int, window_kind: str, scale: float, reference: str,
) -> Tensor:  # fmt: skip
    aligned = all(x.data_ptr() % 16 == 0 for x in (k, v, ring_k, ring_v, sink_k, sink_v))
    strides = (q.shape[-1], k.stride(2), v.stride(2), *(x.stride(0) for x in (k, v, ring_k, ring_v, sink_k, sink_v)))
    aligned &= all(stride * q.element_size() % 16 == 0 for stride in strides)
    weight = None if query_map is None else log_weight.expand(q.shape[0], q.shape[2], 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = (q, k, v, ring_k, ring_v, sink_k, sink_v, kv, z, lengths, query_map, key_map, weight, query_gate, key_gate, start, slots)
    _plan(signature(*tensors), aligned, window_size, window_kind, scale, reference)(*tensors, out)
    return out


NAMESPACE = namespace(__name__)
_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_attention_step",
    _launch,
    mutates_args=("ring_k", "ring_v", "sink_k", "sink_v", "kv", "z", "lengths"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) ring_k, Tensor(b!) ring_v, Tensor(c!) sink_k, Tensor(d!) sink_v, Tensor(e!) kv, Tensor(f!) z, Tensor(g!) lengths, "
    "Tensor? query_map, Tensor? key_map, Tensor log_weight, Tensor? query_gate, Tensor? key_gate, Tensor? start, Tensor? slots, SymInt window_size, str window_kind, float scale, str reference) -> Tensor",
)


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, sink_k: Tensor, sink_v: Tensor, kv: Tensor, z: Tensor, lengths: Tensor, query_map: Tensor | None, key_map: Tensor | None,
    log_weight: Tensor, query_gate: Tensor | None, key_gate: Tensor | None, start: Tensor | None, slots: Tensor | None, window_size: int, window_kind: str, scale: float, reference: str,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def triton_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Any, window_size: int, window_kind: str, scale: float, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor,
    query_gate: Tensor | None, key_gate: Tensor | None, reference: str, start: Tensor | None, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `linear_attention_step`; `step_refusal` must have returned None."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    maps = [None if x is None else x.detach().contiguous() for x in (query_map, key_map, query_gate, key_gate)]
    run = _op if torch.compiler.is_compiling() else _launch
    return run(
        q.detach(), k.detach(), v.detach(), state.k, state.v, state.sink_k, state.sink_v, state.kv, state.z, state.lengths, maps[0], maps[1], linear_log_weight.detach(), maps[2], maps[3],
        start, None if slots is None else slots.contiguous(), window_size, window_kind, scale, reference,
    )  # fmt: skip


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16 with fp32 maps.

    Args:
        arch: 10 * major + minor of the compute capability; blocks do not depend on it, what spills does.
    """
    pointers = dict.fromkeys(("Q", "K", "V", "OUT", "RING_K", "RING_V", "SINK_K", "SINK_V"), "*bf16")
    pointers |= dict.fromkeys(("KV", "Z", "QUERY_MAP", "KEY_MAP", "QUERY_GATE", "KEY_GATE", "LOG_WEIGHT"), "*fp32")
    pointers |= dict.fromkeys(("LENGTHS", "START", "SLOTS"), "*i64")
    numbers = dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32:16")
    signature = pointers | numbers | {"weight_row": "i32", "weight_head": "i32", "start_row": "i32", "scale": "fp32"}
    configs = []
    #    head_dim, F/2, query heads, key heads, batch, window kind, window size, sinks, default form (else LoLCATs': a state per query head), in a pool
    for D, F2, H, G, B, kind, C, A, default, pool in (
        (128, 128, 32, 8, 1, "block", 64, 4, True, False),
        (128, 128, 32, 8, 64, "block", 64, 4, True, False),
        (128, 64, 32, 8, 1, "block", 64, 4, True, False),
        (128, 64, 32, 8, 64, "block", 64, 4, True, False),
        (128, 64, 32, 8, 64, "block", 64, 0, False, False),
        (128, 64, 32, 8, 64, "sliding", 64, 4, True, False),
        (128, 0, 32, 8, 64, "block", 64, 4, True, False),
        (64, 64, 9, 3, 64, "block", 64, 4, True, False),
        (32, 32, 8, 8, 1, "block", 64, 4, True, False),
        (96, 96, 32, 32, 64, "block", 64, 4, True, False),
        (256, 256, 8, 4, 64, "block", 64, 4, True, False),
        (128, 128, 32, 8, 64, "block", 64, 4, True, True),
        (128, 64, 32, 8, 1, "block", 64, 4, True, True),
        (128, 64, 32, 8, 64, "block", 64, 4, True, True),
        (128, 64, 32, 8, 64, "block", 64, 0, False, True),
        (128, 64, 32, 8, 64, "sliding", 64, 4, True, True),
        (64, 64, 9, 3, 64, "block", 64, 4, True, True),
        (256, 256, 8, 4, 64, "block", 64, 4, True, True),
    ):
        state_heads = G if default else H
        num_slots = 0 if C == 0 else (2 * C if kind == "block" else C) + 1
        rows = (G * num_slots * D,) * 2 + (G * A * D,) * 2 + (state_heads * 2 * F2 * D, state_heads * 4 * F2, state_heads * 16)
        if pool:  # a request's tensors lie in one page
            page = sum(size * width for size, width in zip(rows, (2, 2, 2, 2, 4, 4, 8), strict=True))
            rows = tuple(page // width for width in (2, 2, 2, 2, 4, 4, 8))
        constants, options = _constants(
            B * state_heads, state_heads, G, H // state_heads, D, F2, C, kind, num_slots, A, 16,
            gated=default and F2 > 0, absolute=default, padded=not pool, aligned=True, exact=False, rows=rows, has_slots=pool,
        )  # fmt: skip
        # Some words, most of them addresses in the part that folds a block, once in `window_size` steps: where registers are limited so that two blocks fit a
        # multiprocessor, and where maps are large. On 8.x, where that part has no asynchronous tensor cores, more of them.
        if arch < 90:
            max_stack = 224 if "maxnreg" in options else 48
        else:
            max_stack = 128 if D == 256 else 80 if "maxnreg" in options or D * F2 == 128 * 128 else 0
        name = f"decode-d{D}-f{F2}-h{H}-g{G}-b{B}-{kind}{C}" + ("" if default else "-lolcats") + "-pool" * pool
        configs.append((name, decode_step, signature, constants, options, max_stack))
    return configs
