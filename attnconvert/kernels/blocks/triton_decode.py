"""The decode step of block-sparse attention as three Triton launches with a fixed grid, that of full caches, so that it can be recorded in a CUDA graph.

1. `block_decode_append`: one program of each KV head writes the new key and value, and the mean that they make whole, if any; the others sum up parts of the
   softmax denominators over coarse keys.
2. `block_decode_score`: the weights of fine keys, summed over the query heads, and each block's largest.
3. `block_decode_attend`: programs with a few of the chosen blocks each; the last of a KV head to come to its end adds up the parts of all.

A choice is small: 2048 scores at 128k tokens. Every program of the third launch makes it again for itself rather than waiting for another launch, unless its
share is of blocks that are always seen. Rows that see everything need no scores: for them the first two launches only write.

Programs of a launch cannot wait for each other, and need not: nothing that one of them reads is written by another, but for the parts, which are handed over by
an atomic counter and then added in a fixed order. The position comes from `length` in the first launch, which copies it, and the second one counts the token.
How keys are shared out depends on the number of rows and heads and on the rule, never on the capacity: neither does any bit of the output.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this file needs triton; the PyTorch form of the step does not") from error

from attnconvert.kernels.blocks.rule import BlockRule
from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, architecture, namespace

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-(2.0**100))  # the logit of no key; finite, so that a difference of two is 0
MAX_HEAD_DIM = 256
MAX_GROUP = 16  # query heads per KV head: the rows of one tile
MAX_BLOCKS = 16384  # of a cache
COARSE_KEYS = 64  # coarse keys of a program
FINE_KEYS = 128  # fine keys of a program
LSE_PARTS = 64  # parts of a denominator that are read together
MAX_SHARE = 24  # blocks of a program
ATTENDED_BYTES = 32768  # of keys that a program looks at together: what it does with them takes as long for few as for many
TARGET_PROGRAMS = 132  # one for each multiprocessor of an H100: each chooses for itself, and several on one multiprocessor do so more slowly
MERGED_FLOATS = 49152  # that the last program of a KV head adds up, about: one multiprocessor reads 0.1 MB in a microsecond


@triton.jit
def _whole(length, kernel: tl.constexpr, stride: tl.constexpr):
    """Means of `kernel` neighbouring keys that `length` keys have."""
    return tl.where(length >= kernel, (length - kernel) // stride + 1, 0)


@triton.jit
def _chooses(position, num_blocks, dense_len, BLOCK: tl.constexpr):
    """Whether the query at `position` sees only some of the blocks."""
    return (position + 1 >= dense_len) & (position // BLOCK + 1 > num_blocks)


@triton.jit
def _queries(Q, b, g, q_row, q_head, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """The query heads of a KV head as rows of a tile; rows and columns that are too many are 0."""
    row, d = tl.arange(0, ROWS), tl.arange(0, BD)
    return tl.load(Q + b * q_row + (g * GROUP + row)[:, None] * q_head + d[None, :], mask=(row < GROUP)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _recent_mean(CACHE_K, new_key, position, KERNEL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """The mean of the new key and the KERNEL - 1 before it, fp32 [BD]."""
    d, some = tl.arange(0, BD), tl.arange(0, 32)
    total = new_key.to(tl.float32)
    for at in range(0, KERNEL, 32):
        i = position - KERNEL + 1 + at + some
        keys = tl.load(CACHE_K + i[:, None] * D + d[None, :], mask=(i < position)[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(keys.to(tl.float32), 0)
    return total * (1.0 / KERNEL)


@triton.jit
def block_decode_append(
    Q, K, V, CACHE_K, CACHE_V, FINE, COARSE, LENGTH, START, LSE, POSITION, COUNTER,
    q_row, q_head, k_row, k_head, v_row, v_head, start_row, capacity, num_blocks, dense_len, scale,
    BLOCK: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, COARSER: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (1 + parts of the coarse keys, G, B).

    LSE [B, G, programs, 2, ROWS] fp32: largest logit (base 2) and sum. POSITION [B] int32, -1 for padding. COUNTER [B, G] int32 is set to 0. COARSE is FINE where
    coarse keys are the fine ones.
    """
    program, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(LENGTH + b).to(tl.int32)
    bg = b * KV_HEADS + g
    row, d = tl.arange(0, ROWS), tl.arange(0, BD)
    CACHE_K += bg * capacity * D
    COARSE += bg * (capacity // (STRIDE * COARSER)) * D
    LSE += (bg * tl.num_programs(0) + program) * (2 * ROWS) + row
    before = _whole(position, KERNEL * COARSER, STRIDE * COARSER)  # without the one that the new key makes whole
    n0 = (program - 1) * BN
    if program == 0:
        place = position
        limit = D
        if PADDED:  # a scalar condition goes into a bound: the interpreter cannot combine it with a mask
            valid = tl.load(START + b * start_row) <= 0
            place = tl.where(valid, position, -1)
            limit = tl.where(valid, D, 0)
        if g == 0:
            tl.store(POSITION + b, place)
        tl.store(COUNTER + bg, 0)
        new_key = tl.load(K + b * k_row + g * k_head + d, mask=d < D, other=0.0)
        new_value = tl.load(V + b * v_row + g * v_head + d, mask=d < D, other=0.0)
        mine = position.to(tl.int64) * D + d
        tl.store(CACHE_K + mine, new_key, mask=d < limit)
        tl.store(CACHE_V + bg * capacity * D + mine, new_value, mask=d < limit)
        largest = tl.full([ROWS], HIDDEN, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        first = position + 1 - KERNEL
        if (first >= 0) & (first % STRIDE == 0) & (limit > 0):
            mean = _recent_mean(CACHE_K, new_key, position, KERNEL, D, BD).to(FINE.dtype.element_ty)
            tl.store(FINE + (bg * (capacity // STRIDE) + first // STRIDE) * D + d, mean, mask=d < D)
            coarse_first = position + 1 - KERNEL * COARSER
            if (coarse_first >= 0) & (coarse_first % (STRIDE * COARSER) == 0):
                if COARSER > 1:
                    mean = _recent_mean(CACHE_K, new_key, position, KERNEL * COARSER, D, BD).to(FINE.dtype.element_ty)
                    tl.store(COARSE + coarse_first // (STRIDE * COARSER) * D + d, mean, mask=d < D)
                q = _queries(Q, b, g, q_row, q_head, GROUP, D, ROWS, BD)
                largest = tl.sum(q.to(tl.float32) * mean.to(tl.float32)[None, :], 1) * (scale * LOG2E)
                total += 1.0
        tl.store(LSE, largest)
        tl.store(LSE + ROWS, total)
    elif _chooses(position, num_blocks, dense_len, BLOCK) & (n0 < before):
        n = n0 + tl.arange(0, BN)
        q = _queries(Q, b, g, q_row, q_head, GROUP, D, ROWS, BD)
        keys = tl.load(COARSE + n[:, None] * D + d[None, :], mask=(n < before)[:, None] & (d < D)[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        logits = tl.where((n < before)[None, :], logits, float("-inf"))
        largest = tl.max(logits, 1)
        tl.store(LSE, largest)
        tl.store(LSE + ROWS, tl.sum(tl.exp2(logits - largest[:, None]), 1))


@triton.jit
def block_decode_score(
    Q, FINE, LENGTH, LSE, POSITION, OWN, LAST, q_row, q_head, capacity, num_parts, num_blocks, dense_len, scale,
    BLOCK: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, COARSER: tl.constexpr, COARSE_KEYS: tl.constexpr, LEAD: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (parts of the fine keys, G, B). OWN [B, G, blocks] fp32: the largest of the summed weights of fine keys that begin in a block; LAST: that of its last."""
    program, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    POOL: tl.constexpr = BLOCK // STRIDE
    position = tl.load(POSITION + b)
    if (program == 0) & (g == 0) & (position >= 0):
        tl.store(LENGTH + b, position.to(tl.int64) + 1)
    bg = b * KV_HEADS + g
    whole = _whole(position + 1, KERNEL, STRIDE)
    n0 = program * BN
    if _chooses(position, num_blocks, dense_len, BLOCK) & (n0 < whole):
        row, d, n = tl.arange(0, ROWS), tl.arange(0, BD), n0 + tl.arange(0, BN)
        q = _queries(Q, b, g, q_row, q_head, GROUP, D, ROWS, BD)
        keys = tl.load(FINE + (bg * (capacity // STRIDE) + n)[:, None] * D + d[None, :], mask=(n < whole)[:, None] & (d < D)[None, :], other=0.0)
        largest = tl.full([ROWS], HIDDEN, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        count = 1 + tl.cdiv(_whole(position, KERNEL * COARSER, STRIDE * COARSER), COARSE_KEYS)
        for p0 in range(0, count, BP):
            p = p0 + tl.arange(0, BP)
            at = LSE + (bg * num_parts + p)[:, None] * (2 * ROWS) + row[None, :]
            maxima = tl.load(at, mask=(p < count)[:, None], other=HIDDEN)
            sums = tl.load(at + ROWS, mask=(p < count)[:, None], other=0.0)
            new_largest = tl.maximum(largest, tl.max(maxima, 0))
            total = total * tl.exp2(largest - new_largest) + tl.sum(sums * tl.exp2(maxima - new_largest[None, :]), 0)
            largest = new_largest
        denominator = tl.where((row < GROUP) & (total > 0), largest + tl.log2(total), float("inf"))
        logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.sum(tl.exp2(logits - denominator[:, None]), 0)
        weights = tl.where(n < whole, weights, 0.0)
        block = program * (BN // POOL) + tl.arange(0, BN // POOL)
        at = bg * (capacity // BLOCK) + block
        there = block < capacity // BLOCK
        if POOL == 1:
            tl.store(OWN + at, weights, mask=there)
        else:
            pooled = tl.reshape(weights, [BN // POOL, POOL])
            tl.store(OWN + at, tl.max(pooled, 1), mask=there)
            if LEAD:
                tl.store(LAST + at, tl.sum(tl.where((tl.arange(0, POOL) == POOL - 1)[None, :], pooled, 0.0), 1), mask=there)


@triton.jit
def _either_range(low, high, count, other_low, other_high, other_count):
    return tl.minimum(low, other_low), tl.maximum(high, other_high), count + other_count


@triton.jit
def _both_sums(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _best(bits, wanted):
    """Which of the non-negative numbers are the `wanted` largest, earlier ones first where they are equal; negative ones never.

    A search with four thresholds a round, since a round waits longer for its sums than it counts: two counts of 15 bits (there are at most
    MAX_BLOCKS numbers) are a word.
    """
    there = (bits >= 0).to(tl.int32)
    low, high, have = tl.reduce((tl.where(bits >= 0, bits, 0x7FFFFFFF), bits, there), 0, _either_range)
    high += 1  # of the numbers, at least `wanted` are `low` or more and fewer are `high` or more
    while (high - low > 1) & (have > wanted):
        first, top, step = low, high, (high - low + 4) // 5
        one = (bits >= tl.minimum(first + step, top)).to(tl.int32) + tl.where(bits >= tl.minimum(first + 2 * step, top), 1 << 15, 0)
        two = (bits >= tl.minimum(first + 3 * step, top)).to(tl.int32) + tl.where(bits >= tl.minimum(first + 4 * step, top), 1 << 15, 0)
        one, two = tl.reduce((one, two), 0, _both_sums)
        for way in tl.static_range(4):  # counts fall: the last threshold with enough is the new lower bound, the next one the upper
            threshold = tl.minimum(first + (way + 1) * step, top)
            count = ((one if way < 2 else two) >> (15 * (way % 2))) & 0x7FFF
            enough = count >= wanted
            low = tl.where(enough, threshold, low)
            have = tl.where(enough, count, have)
            high = tl.where(enough, high, tl.minimum(high, threshold))
    best = (bits >= low).to(tl.int32)
    if have > wanted:
        equal = (bits == low).to(tl.int32)
        spare = have - wanted
        best -= (equal > 0).to(tl.int32) * (tl.cumsum(equal, 0) > tl.sum(equal, 0) - spare).to(tl.int32)
    return best


@triton.jit
def block_decode_attend(
    Q, CACHE_K, CACHE_V, OWN, LAST, POSITION, LIST, PART, STATS, COUNTER, OUT, q_row, q_head, capacity, num_init, num_local, num_blocks, dense_len, scale,
    BLOCK: tl.constexpr, LEAD: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr, SHARE: tl.constexpr, LISTED: tl.constexpr, NB: tl.constexpr, RP: tl.constexpr,
    BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (most shares of visible blocks, G, B).

    A program has SHARE blocks (LISTED: room for them) and looks at BN of their keys together; NB: room for the blocks that may be chosen, RP: for query heads; the
    largest logits of BS parts are read together. Memory between programs: LIST [B, G, programs, SHARE] int32, PART [B, G, programs, GROUP, D] and STATS [B, G, programs, GROUP, 2], maximum (base 2) and sum,
    fp32. OUT [B, H, D] is contiguous.
    """
    program, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(POSITION + b)
    bg = b * KV_HEADS + g
    d = tl.arange(0, BD)
    r = tl.arange(0, RP)
    own = position // BLOCK
    chooses = _chooses(position, num_blocks, dense_len, BLOCK)
    low = tl.maximum(own - num_local, 0)
    init = tl.where(chooses, tl.minimum(num_init, low), own + 1)  # the visible blocks: 0 .. init - 1, the `wanted` best, low .. own
    wanted = tl.where(chooses, tl.maximum(num_blocks - (init + own - low + 1), 0), 0)
    count = tl.where(chooses, init + wanted + own - low + 1, own + 1)
    first = program * SHARE
    last = tl.minimum(first + SHARE, count)
    out_mask = (r < GROUP)[:, None] & (d < D)[None, :]
    out_at = (b * (KV_HEADS * GROUP) + g * GROUP + r)[:, None] * D + d[None, :]
    if position < 0:
        if program == 0:
            tl.store(OUT + out_at, tl.zeros([RP, BD], OUT.dtype.element_ty), mask=out_mask)
    elif first < count:
        mine = (bg * tl.num_programs(0) + program) * SHARE
        j = first + tl.arange(0, LISTED)
        tl.store(LIST + mine + tl.arange(0, LISTED), tl.where(j < init, j, low + j - init - wanted), mask=(j < last) & ((j < init) | (j >= init + wanted)))
        if (first < init + wanted) & (last > init):
            i = tl.arange(0, NB)
            free = i < low - num_init
            row_of_scores = bg * (capacity // BLOCK)
            score = tl.load(OWN + row_of_scores + num_init + i, mask=free, other=0.0)
            if LEAD:  # block 0, which none comes before, is compared with itself
                score = tl.maximum(score, tl.load(LAST + row_of_scores + tl.maximum(num_init + i - 1, 0), mask=free, other=0.0))
            best = _best(tl.where(free, score.to(tl.int32, bitcast=True), -1), wanted)
            place = tl.cumsum(best, 0) - 1 + init - first
            tl.store(LIST + mine + place, num_init + i, mask=(best > 0) & (place >= 0) & (place < last - first))
        tl.debug_barrier()  # the list is read below

        row = tl.arange(0, ROWS)
        q = _queries(Q, b, g, q_row, q_head, GROUP, D, ROWS, BD)
        CACHE_K += bg * capacity * D
        CACHE_V += bg * capacity * D
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, BD], tl.float32)
        for n0 in range(0, (last - first) * BLOCK, BN):
            at_key = n0 + tl.arange(0, BN)
            listed = at_key < (last - first) * BLOCK
            n = tl.load(LIST + mine + at_key // BLOCK, mask=listed, other=0) * BLOCK + at_key % BLOCK
            seen = listed & (n <= position)  # a program's first key always is
            at = n[:, None].to(tl.int64) * D + d[None, :]
            mask = seen[:, None] & (d < D)[None, :]
            keys = tl.load(CACHE_K + at, mask=mask, other=0.0)
            values = tl.load(CACHE_V + at, mask=mask, other=0.0)
            logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
            logits = tl.where(seen[None, :], logits, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - new_largest[:, None])
            shrink = tl.exp2(largest - new_largest)
            total = total * shrink + tl.sum(weights, 1)
            out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision=PRECISION)
            largest = new_largest
        part = (bg * tl.num_programs(0) + program) * GROUP + row
        tl.store(PART + part[:, None] * D + d[None, :], out, mask=(row < GROUP)[:, None] & (d < D)[None, :])
        tl.store(STATS + part * 2, largest, mask=row < GROUP)
        tl.store(STATS + part * 2 + 1, total, mask=row < GROUP)

        programs = tl.cdiv(count, SHARE)
        tl.debug_barrier()  # every thread's stores come before the one thread's release
        if tl.atomic_add(COUNTER + bg, 1, sem="acq_rel", scope="gpu") == programs - 1:
            largest_of_all = tl.full([RP], HIDDEN, tl.float32)
            for p0 in range(0, programs, BS):
                p = p0 + tl.arange(0, BS)
                at = (bg * tl.num_programs(0) + p)[:, None] * GROUP + r[None, :]
                maxima = tl.load(STATS + at * 2, mask=(p < programs)[:, None] & (r < GROUP)[None, :], other=HIDDEN, cache_modifier=".cg")
                largest_of_all = tl.maximum(largest_of_all, tl.max(maxima, 0))
            total_of_all = tl.zeros([RP], tl.float32)
            sum_of_all = tl.zeros([RP, BD], tl.float32)
            for p in tl.range(0, programs, num_stages=6):  # the option makes loads run ahead in a loop without dot products
                at = (bg * tl.num_programs(0) + p) * GROUP + r
                maxima = tl.load(STATS + at * 2, mask=r < GROUP, other=HIDDEN, cache_modifier=".cg")
                sums = tl.load(STATS + at * 2 + 1, mask=r < GROUP, other=1.0, cache_modifier=".cg")
                parts = tl.load(PART + at[:, None] * D + d[None, :], mask=(r < GROUP)[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg")
                weight = tl.exp2(maxima - largest_of_all)
                total_of_all += weight * sums
                sum_of_all += weight[:, None] * parts
            tl.store(OUT + out_at, (sum_of_all / total_of_all[:, None]).to(OUT.dtype.element_ty), mask=out_mask)


def step_refusal(device_type: str, dtype: torch.dtype, head_dim: int, group: int, num_blocks: int) -> str | None:
    """Why the kernels cannot take a step, or None. `group`: query heads per KV head. `num_blocks`: of the cache."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not INTERPRETED:
        return f"the tensors are on {device_type}, Triton needs CUDA"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a KV head, more than {MAX_GROUP}"
    if num_blocks > MAX_BLOCKS:
        return f"a cache of {num_blocks} blocks, more than {MAX_BLOCKS}"
    return None


def _share(num_rows: int, kv_heads: int, group: int, head_dim: int, rule: BlockRule) -> int:
    """Blocks of a program: enough programs to fill a GPU, but few enough parts to add up."""
    fill = triton.cdiv(num_rows * kv_heads * rule.num_blocks, TARGET_PROGRAMS)
    merge = triton.cdiv(rule.num_blocks * group * head_dim, MERGED_FLOATS)
    return min(MAX_SHARE, max(fill, merge))


def _most_visible(blocks: int, rule: BlockRule) -> int:
    """Blocks that a query can see at most in a cache of `blocks` blocks."""
    return min(blocks, max(rule.num_blocks, rule.num_init + rule.num_local + 1, (rule.dense_len - 1) // rule.block_size + 1))


def _constants(
    kv_heads: int, group: int, head_dim: int, blocks: int, share: int, rule: BlockRule, *, padded: bool, exact: bool, arch: int
) -> tuple[tuple[dict[str, Any], dict[str, int]], ...]:  # fmt: skip
    """Constexprs and launch options of the three kernels. blocks: of the cache; arch: 10 * compute capability."""
    BD, RP = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    shared = {
        "BLOCK": rule.block_size, "KV_HEADS": kv_heads, "GROUP": group, "D": head_dim, "ROWS": 16, "BD": BD, "PRECISION": "ieee" if exact else "tf32",
    }  # fmt: skip
    means = {"KERNEL": rule.kernel, "STRIDE": rule.stride, "COARSER": rule.coarser}
    NB = triton.next_power_of_2(max(16, blocks - 1 - rule.num_init - rule.num_local))  # blocks that may be chosen
    warps = 4 if NB <= 4096 else 8  # a program has all scores in registers
    append = {**shared, **means, "PADDED": padded, "BN": COARSE_KEYS}
    score = {**shared, **means, "LEAD": rule.lead, "COARSE_KEYS": COARSE_KEYS, "BN": FINE_KEYS, "BP": LSE_PARTS}
    programs = triton.cdiv(_most_visible(blocks, rule), share)
    stages = 3 if arch // 10 in (9, 10) else 2  # 136 KB of shared memory or 72; 8.6 and 8.9 have 99
    attend = {
        **shared, "LEAD": rule.lead, "BN": min(256, ATTENDED_BYTES // (BD * (4 if exact else 2)), triton.next_power_of_2(share * rule.block_size)), "SHARE": share,
        "LISTED": triton.next_power_of_2(share), "NB": NB, "RP": RP, "BS": min(triton.next_power_of_2(programs), 1024 // RP),
    }  # fmt: skip
    return (append, {"num_warps": 4, "num_stages": 2}), (score, {"num_warps": 4, "num_stages": 2}), (attend, {"num_warps": warps, "num_stages": stages})


_TENSORS = ("q", "k", "v", "cache_k", "cache_v", "fine", "coarse", "length", "start")


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], rule: BlockRule, scale: float) -> tuple[Plan, Layout]:
    """The launches of a step and their scratch memory. tensors: signatures of `_TENSORS`."""
    known = {name: one for name, one in zip(_TENSORS, tensors, strict=True) if one is not None}
    shape, stride = ({name: one[at] for name, one in known.items()} for at in (0, 1))
    dtype, device = known["q"][2:]
    (B, _, H, D), (_, G, C, _) = shape["q"], shape["cache_k"]
    blocks, share = C // rule.block_size, _share(B, G, H // G, D, rule)
    parts = 1 + triton.cdiv(C // (rule.stride * rule.coarser), COARSE_KEYS)
    programs = triton.cdiv(_most_visible(blocks, rule), share)
    scratch = Layout()
    scratch.add("lse", (B, G, parts, 2, 16), torch.float32)
    scratch.add("position", (B,), torch.int32)
    scratch.add("counter", (B, G), torch.int32)
    scratch.add("own", (B, G, blocks), torch.float32)
    scratch.add("last", (B, G, blocks if rule.lead else 1), torch.float32)
    scratch.add("list", (B, G, programs, share), torch.int32)
    scratch.add("part", (B, G, programs, H // G, D), torch.float32)
    scratch.add("stats", (B, G, programs, H // G, 2), torch.float32)
    append, score, attend = _constants(G, H // G, D, blocks, share, rule, padded="start" in known, exact=dtype == torch.float32, arch=architecture(device))
    start, start_row = ("start", stride["start"][0]) if "start" in known else ("length", 0)  # an absent tensor is a pointer the kernel never follows
    strides = [stride[name][axis] for name in "qkv" for axis in (0, 2)]
    coarse = "fine" if rule.coarser == 1 else "coarse"
    launches = [
        Launch(
            block_decode_append, (parts, G, B),
            ("q", "k", "v", "cache_k", "cache_v", "fine", coarse, "length", start, "lse", "position", "counter", *strides, start_row, C, rule.num_blocks, rule.dense_len, scale),
            *append,
        ),
        Launch(
            block_decode_score, (triton.cdiv(C // rule.stride, FINE_KEYS), G, B),
            ("q", "fine", "length", "lse", "position", "own", "last", *strides[:2], C, parts, rule.num_blocks, rule.dense_len, scale), *score,
        ),
        Launch(
            block_decode_attend, (programs, G, B),
            ("q", "cache_k", "cache_v", "own", "last", "position", "list", "part", "stats", "counter", "out", *strides[:2], C,
             rule.num_init, rule.num_local, rule.num_blocks, rule.dense_len, scale), *attend,
        ),
    ]  # fmt: skip
    return Plan(device, (*_TENSORS, "out", "scratch"), launches, {"scratch": scratch}), scratch


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, fine: Tensor, coarse: Tensor, length: Tensor, start: Tensor | None,
    rule: list[int], scorer: str, scale: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = (q, k, v, cache_k, cache_v, fine, coarse, length, start)
    plan, scratch = _plan(signature(*tensors), BlockRule(*rule, scorer), scale)  # type: ignore[arg-type]
    plan(*tensors, out, scratch.allocate(q.device))
    return out


NAMESPACE = namespace(__name__)
_op = torch.library.custom_op(
    f"{NAMESPACE}::block_sparse_attention_step",
    _launch,
    mutates_args=("cache_k", "cache_v", "fine", "coarse", "length"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) fine, Tensor(d!) coarse, Tensor(e!) length, Tensor? start, SymInt[] rule, str scorer, float scale) -> Tensor",
)


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, fine: Tensor, coarse: Tensor, length: Tensor, start: Tensor | None,
    rule: list[int], scorer: str, scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def triton_block_sparse_step(q: Tensor, k: Tensor, v: Tensor, state: Any, rule: BlockRule, scale: float, start: Tensor | None) -> Tensor:
    """See `block_sparse_step`; `step_refusal` must have returned None."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    run = _op if torch.compiler.is_compiling() else _launch
    return run(q.detach(), k.detach(), v.detach(), *state, start, list(rule[:-1]), rule.scorer, scale)


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    numbers = {"capacity": "i32:16", "num_blocks": "i32:16", "dense_len": "i32:16", "scale": "fp32", "q_row": "i32:16", "q_head": "i32:16"}
    scratch = {"LSE": "*fp32", "POSITION": "*i32", "OWN": "*fp32", "LAST": "*fp32"}
    append = {
        **dict.fromkeys(("Q", "K", "V", "CACHE_K", "CACHE_V", "FINE", "COARSE"), "*bf16"),
        "LENGTH": "*i64",
        "START": "*i64",
        "COUNTER": "*i32",
        **scratch,
        **numbers,
    }
    append |= {**dict.fromkeys(("k_row", "k_head", "v_row", "v_head"), "i32:16"), "start_row": "i32"}
    score = {"Q": "*bf16", "FINE": "*bf16", "LENGTH": "*i64", **scratch, **numbers, "num_parts": "i32"}
    attend = {
        **dict.fromkeys(("Q", "CACHE_K", "CACHE_V", "OUT"), "*bf16"),
        **scratch,
        **numbers,
        "COUNTER": "*i32",
        "LIST": "*i32",
        "PART": "*fp32",
        "STATS": "*fp32",
    }
    attend |= {"num_init": "i32", "num_local": "i32:16"}
    configs = []
    for D, H, G, blocks, rows, rule, padded in (
        (128, 32, 2, 2048, 1, BlockRule(), True),
        (128, 32, 2, 2048, 1, BlockRule(), False),
        (128, 32, 8, 2048, 1, BlockRule(), True),
        (128, 32, 8, 512, 8, BlockRule(), True),
        (128, 32, 8, 16384, 1, BlockRule(), True),
        (128, 32, 8, 8192, 1, BlockRule(), True),
        (64, 9, 3, 128, 1, BlockRule(), True),
        (128, 28, 4, 1024, 1, BlockRule(), True),
        (128, 32, 8, 1024, 1, BlockRule(128, 1, 16, 48), True),
        (128, 32, 8, 4096, 1, BlockRule(32, 1, 64, 192), True),
        (128, 32, 8, 1024, 1, BlockRule(128, 0, 0, 12, 0, "mean"), True),
        (64, 32, 8, 2048, 1, BlockRule(64, 0, 0, 24, 0, "mean"), True),
        (32, 8, 8, 512, 1, BlockRule(), True),
        (96, 32, 32, 512, 4, BlockRule(), True),
        (80, 32, 32, 512, 4, BlockRule(), True),
        (256, 8, 4, 512, 1, BlockRule(), True),
        (256, 16, 1, 2048, 1, BlockRule(), True),
    ):
        share = _share(rows, G, H // G, D, rule)
        kinds = _constants(G, H // G, D, blocks, share, rule, padded=padded, exact=False, arch=arch)
        name = f"d{D}-h{H}-g{G}-n{blocks}-s{rule.block_size}-{rule.scorer}-x{share}" + ("" if padded else "-unpadded")
        for kernel, sign, (constants, options) in zip(
            (block_decode_append, block_decode_score, block_decode_attend), (append, score, attend), kinds, strict=True
        ):
            stack = 0
            if kernel is block_decode_attend:  # so many scores fill the registers; on 8.0 ptxas rather leaves out two numbers than run fewer programs
                stack = 64 if blocks > 2048 else 8 if arch == 80 else 0
            configs.append((f"{kernel.__name__}-{name}", kernel, {n: t for n, t in sign.items() if n in kernel.arg_names}, constants, options, stack))
    return configs
