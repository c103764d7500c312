"""Triton kernels of `span_attention`: forward and backward, work proportional to the pairs that are visible, memory linear in T.

The maths and the names are reference.py's. `begin` is the first token of a query's document, `edge` the first key of its window: neither
ever moves back from one query to the next, so a tile's first and last query bound those between. Tiles whose pairs are all visible, most
of them, run without a mask.

* `forward_kernel`, `query_grad_kernel`: BM queries of a head; one loop over the far sinks of the first query's document (other documents begin
  inside of the tile) and then over the keys from the first query's edge to the diagonal.
* `key_grad_kernel`: BN keys of a KV head; one loop over its query heads and the queries whose windows may reach the keys. A document's first keys are seen by all
  later queries: those are cut into segments of the sequence. A sink's own segment belongs to its program, `sink_grad_kernel` sums what every later one sends
  to the sinks of the document that reaches into it (there is only one), and `key_grad_kernel` adds the sums in order.

Every sum has one owner and a fixed order: two runs are bit-equal. Inside, logits and log-sums are in units of log 2 (exp2 is the hardware's
exponential).
"""

from __future__ import annotations

from typing import Any

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

LOG2E = tl.constexpr(1.4426950408889634)
# Finite: a row may meet keys that it sees none of before those it sees, and what it sums there is multiplied by exp2(HIDDEN - ...) = 0 later. A power of 2: times the
# scale it is exact, so that `s * scale2 - new` is 0 for such a row when it is one fused multiply-add too, not the rounding error of 1e29, whose exp2 is infinite.
HIDDEN = tl.constexpr(-(2.0**100))
SINK_BLOCK = 64  # sinks per program of `sink_grad_kernel`
MAX_HEAD_DIM = 256


@triton.jit
def _begin(START, b, n, T, HAS_START: tl.constexpr):
    """First token of the document of query n; a token before its document (padding) is a document of its own."""
    if HAS_START:
        return tl.minimum(tl.load(START + b * T + n), n)
    else:
        return n * 0


@triton.jit
def _edge(n, begin, alpha, beta, least):
    """First key of the window of query n: int32. alpha, beta, least: int64."""
    position = (n - begin).to(tl.int64)
    size = tl.maximum(alpha + (((position + 1) * beta) >> 16), least)
    return n - tl.minimum(size - 1, position).to(tl.int32)


@triton.jit
def _reach_end(i, begin, alpha, beta, least, T):
    """One more than the last query whose window has key i, in a document that goes on to T: `_edge` solved for n."""
    position = (i - begin).to(tl.int64)
    reach = position + alpha
    # n + 1 - floor((n + 1) beta) <= position + alpha, all in units of 1 / 65536
    end = tl.maximum(reach, 0) * 65536 // tl.maximum(65536 - beta, 1)
    end = tl.where((beta == 65536) & (reach >= 0), reach * 0 + T, tl.maximum(end, position + least))
    return tl.minimum(begin + end, T).to(tl.int32)


@triton.jit
def _document_end(START, b, i, T, HAS_START: tl.constexpr):
    """One more than the last token of the document of token i; scalars."""
    end = T
    if HAS_START:
        first, span = i, T - i
        for _ in tl.static_range(3):  # each round narrows it down to a 256th
            step = tl.cdiv(span, 256)
            at = first + tl.arange(0, 256) * step
            same = (at < first + span) & (tl.minimum(tl.load(START + b * T + tl.minimum(at, T - 1)), at) <= i)
            passed = (tl.sum(same.to(tl.int32), 0) - 1) * step
            span = tl.minimum(step, span - passed)
            first += passed
        end = first + span
    return end


@triton.jit
def _head_of_rank(ALPHA, BETA, LEAST, rank, T, G, GP: tl.constexpr):
    """The KV head with the rank-th longest window at the end of the sequence: the short ones come last and fill the gaps."""
    heads = tl.arange(0, GP)
    alpha = tl.load(ALPHA + heads, mask=heads < G, other=0).to(tl.int64)
    beta = tl.load(BETA + heads, mask=heads < G, other=0).to(tl.int64)
    least = tl.load(LEAST + heads, mask=heads < G, other=0).to(tl.int64)
    size = tl.minimum(tl.maximum(alpha + ((beta * T) >> 16), least), T)
    size = tl.where(heads < G, size, 0).to(tl.int32)
    before = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (heads[None, :] < heads[:, None]))
    ranks = tl.sum(before.to(tl.int32), 1)
    return tl.sum(tl.where(ranks == rank, heads, 0), 0)


@triton.jit
def _visible(i, n, begin, edge, A):
    """Which keys i queries n see; they broadcast against each other."""
    return (i <= n) & (i >= begin) & ((i >= edge) | (i < begin + A))


@triton.jit
def _tile(base, at, on, T, stride, od, D: tl.constexpr, DP: tl.constexpr):
    """Rows at .. at + len(on) of a matrix whose rows are `stride` apart, as [rows, DP]: behind the last row the last one again, columns >= D 0."""
    pointers = base + at.to(tl.int64) * stride + tl.minimum(on, T - 1 - at)[:, None] * stride + od[None, :]
    if D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(od < D)[None, :], other=0.0)


@triton.jit
def _query_program(ALPHA, BETA, LEAST, T, TILES, B, G, R: tl.constexpr, GP: tl.constexpr):
    """(b, g, r, tile) of a program of BM queries: long windows first, neighbours share keys, late tiles, which see more, before early ones."""
    pid = tl.program_id(0)
    g = _head_of_rank(ALPHA, BETA, LEAST, pid // (R * TILES * B), T, G, GP)
    return (pid // (R * TILES)) % B, g, pid % R, TILES - 1 - (pid // R) % TILES


@triton.jit
def _key_ranges(START, b, t0, alpha, beta, least, T, A, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr):
    """What queries t0 .. t0 + BM see: (sinks, far, low, near, whole, whole_end, blocks).

    Keys from `whole` to `whole_end` are seen by all. Of the `blocks` that need a mask the first `far` are sinks of the first query's document, those before `near`
    begin at `low`, before which they have no keys, the others at `whole_end`: see `_masked_block`.
    """
    last = tl.minimum(t0 + BM, T) - 1
    begin, begin_last = _begin(START, b, t0, T, HAS_START), _begin(START, b, last, T, HAS_START)
    low = _edge(t0, begin, alpha, beta, least) // BN * BN
    end = low + tl.cdiv(last + 1 - low, BN) * BN
    whole = tl.minimum(tl.cdiv(_edge(last, begin_last, alpha, beta, least), BN) * BN, end)
    whole_end = tl.maximum((t0 + 1) // BN * BN, whole)
    far = tl.cdiv(tl.maximum(tl.minimum(begin + A, low) - begin, 0), BN)
    near = far + (whole - low) // BN
    return begin, far, low, near, whole, whole_end, near + (end - whole_end) // BN


@triton.jit
def _masked_block(block, sinks, far, low, near, whole_end, T, BN: tl.constexpr):
    """(first key, the key from which on there are none) of one of the blocks of `_key_ranges` that need a mask."""
    at = tl.where(block < far, sinks + block * BN, tl.where(block < near, low + (block - far) * BN, whole_end + (block - near) * BN))
    return at, tl.where(block < far, low, T)


@triton.jit
def _keys(base, at, on, T, stride, od, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows at .. at + len(on) of keys or values. Where no block is masked none is behind the last row, and pointers differ by a constant."""
    if MASKED:
        return _tile(base, at, on, T, stride, od, D, DP)
    else:
        pointers = base + at.to(tl.int64) * stride + on[:, None] * stride + od[None, :]
        if D == DP:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(od < D)[None, :], other=0.0)


@triton.jit
def _attend(
    acc, largest, total, q, n, begin, edge, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, blocks, T, A, scale2, od, on,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds blocks of keys, those that need a mask or the others, to sums of values, largest logits and sums of weights.

    A loop without a branch in it is pipelined better.
    """
    for block in range(blocks):
        if MASKED:
            at, limit = _masked_block(block, sinks, far, low, near, whole_end, T, BN)
        else:
            at = whole + block * BN
        s = tl.dot(q, tl.trans(_keys(K, at, on, T, k_st, od, D, DP, MASKED)), input_precision=PREC)
        if MASKED:
            i = at + on
            s = tl.where(_visible(i[None, :], n[:, None], begin[:, None], edge[:, None], A) & (i < limit)[None, :], s, HIDDEN)
        new = tl.maximum(largest, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - new[:, None])
        kept = tl.exp2(largest - new)
        total = total * kept + tl.sum(p, 1)
        acc *= kept[:, None]
        acc = tl.dot(p.to(q.dtype), _keys(V, at, on, T, v_st, od, D, DP, MASKED), acc, input_precision=PREC)
        largest = new
    return acc, largest, total


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, ALPHA, BETA, LEAST, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, T, TILES, B, G, A, scale,
    R: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs of BM queries of one head, and the logarithms of their softmax denominators."""
    b, g, r, tile = _query_program(ALPHA, BETA, LEAST, T, TILES, B, G, R, GP)
    b, h = b.to(tl.int64), (g * R + r).to(tl.int64)
    alpha, beta, least = tl.load(ALPHA + g).to(tl.int64), tl.load(BETA + g).to(tl.int64), tl.load(LEAST + g).to(tl.int64)
    t0 = tile * BM
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    sinks, far, low, near, whole, whole_end, blocks = _key_ranges(START, b, t0, alpha, beta, least, T, A, BM, BN, HAS_START)
    n = tl.minimum(t0 + om, T - 1)
    begin = _begin(START, b, n, T, HAS_START)
    edge = _edge(n, begin, alpha, beta, least)
    q = _tile(Q + b * q_sb + h * q_sh, t0, om, T, q_st, od, D, DP)
    K += b * k_sb + g.to(tl.int64) * k_sh
    V += b * v_sb + g.to(tl.int64) * v_sh
    scale2 = scale * LOG2E
    largest, total, acc = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, DP], tl.float32)
    acc, largest, total = _attend(
        acc, largest, total, q, n, begin, edge, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, (whole_end - whole) // BN, T, A, scale2, od, on,
        D, DP, BN, PREC, False,
    )  # fmt: skip
    acc, largest, total = _attend(
        acc, largest, total, q, n, begin, edge, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, blocks, T, A, scale2, od, on, D, DP, BN, PREC, True
    )
    row_ok = t0 + om < T
    at_out = (b * T + t0) * (G * R) + h
    tl.store(O + at_out * D + om[:, None] * (G * R * D) + od[None, :], (acc / total[:, None]).to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])
    tl.store(LSE + (b * (G * R) + h) * T + t0 + om, largest + tl.log2(total), mask=row_ok)


@triton.jit
def _query_grad(
    dq, q, do, n, begin, edge, lse, delta, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, blocks, T, A, scale2, od, on,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds blocks of keys to the gradients of queries, as `_attend`."""
    for block in range(blocks):
        if MASKED:
            at, limit = _masked_block(block, sinks, far, low, near, whole_end, T, BN)
        else:
            at = whole + block * BN
        k = _keys(K, at, on, T, k_st, od, D, DP, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        dp = tl.dot(do, tl.trans(_keys(V, at, on, T, v_st, od, D, DP, MASKED)), input_precision=PREC)
        if MASKED:
            i = at + on
            s = tl.where(_visible(i[None, :], n[:, None], begin[:, None], edge[:, None], A) & (i < limit)[None, :], s, HIDDEN)
        p = tl.exp2(s * scale2 - lse[:, None])
        dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq, input_precision=PREC)
    return dq


@triton.jit
def query_grad_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ, ALPHA, BETA, LEAST, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, TILES, B, G, A, scale,
    R: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BM queries of one head, and DELTA = DO.O for the keys' gradients. o_s*: strides of DO; O and DQ are contiguous."""
    b, g, r, tile = _query_program(ALPHA, BETA, LEAST, T, TILES, B, G, R, GP)
    b, h = b.to(tl.int64), (g * R + r).to(tl.int64)
    alpha, beta, least = tl.load(ALPHA + g).to(tl.int64), tl.load(BETA + g).to(tl.int64), tl.load(LEAST + g).to(tl.int64)
    t0 = tile * BM
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    sinks, far, low, near, whole, whole_end, blocks = _key_ranges(START, b, t0, alpha, beta, least, T, A, BM, BN, HAS_START)
    n = tl.minimum(t0 + om, T - 1)
    begin = _begin(START, b, n, T, HAS_START)
    edge = _edge(n, begin, alpha, beta, least)
    row_ok = t0 + om < T
    q = _tile(Q + b * q_sb + h * q_sh, t0, om, T, q_st, od, D, DP)
    do = _tile(DO + b * o_sb + h * o_sh, t0, om, T, o_st, od, D, DP)
    o = _tile(O + (b * T * (G * R) + h) * D, t0, om, T, G * R * D, od, D, DP)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    rows = (b * (G * R) + h) * T
    tl.store(DELTA + rows + t0 + om, delta, mask=row_ok)
    lse = tl.load(LSE + rows + n)
    K += b * k_sb + g.to(tl.int64) * k_sh
    V += b * v_sb + g.to(tl.int64) * v_sh
    scale2 = scale * LOG2E
    dq = tl.zeros([BM, DP], tl.float32)
    dq = _query_grad(
        dq, q, do, n, begin, edge, lse, delta, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, (whole_end - whole) // BN, T, A, scale2, od, on,
        D, DP, BN, PREC, False,
    )  # fmt: skip
    dq = _query_grad(
        dq, q, do, n, begin, edge, lse, delta, K, V, k_st, v_st, sinks, far, low, near, whole, whole_end, blocks, T, A, scale2, od, on, D, DP, BN, PREC, True
    )
    at_out = ((b * T + t0) * (G * R) + h) * D
    tl.store(DQ + at_out + om[:, None] * (G * R * D) + od[None, :], (dq * scale).to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])


@triton.jit
def _add_key_grads(s, q, do, v, lse, delta, dk, dv, scale2, PREC: tl.constexpr):
    """Adds to the gradients of BN keys and values what BM queries send them. s: logits [BN, BM] before the scale; no accumulator is ever transposed."""
    p = tl.exp2(s * scale2 - lse[None, :])
    dv = tl.dot(p.to(q.dtype), do, dv, input_precision=PREC)
    dp = tl.dot(v, tl.trans(do), input_precision=PREC)
    dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PREC)
    return dk, dv


@triton.jit
def sink_grad_kernel(
    Q, K, V, DO, LSE, DELTA, PART, ALPHA, BETA, LEAST, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, G, A, SEGMENT, NUM_SEGMENTS, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_START: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What the queries of a segment send to BN sinks before it that have left their windows: PART [B, G, NUM_SEGMENTS, 2, sinks rounded up, D] (dk, dv)."""
    segment, bg = tl.program_id(0) + 1, tl.program_id(1)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    alpha, beta, least = tl.load(ALPHA + g).to(tl.int64), tl.load(BETA + g).to(tl.int64), tl.load(LEAST + g).to(tl.int64)
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    first = segment * SEGMENT
    sinks = _begin(START, b, first, T, HAS_START)
    at = tl.minimum(sinks + tl.program_id(2) * BN, T - 1)
    i = at + on
    k = _tile(K + b * k_sb + g * k_sh, at, on, T, k_st, od, D, DP)
    v = _tile(V + b * v_sb + g * v_sh, at, on, T, v_st, od, D, DP)
    end = tl.minimum(tl.minimum(first + SEGMENT, T), _document_end(START, b, first, T, HAS_START))
    left = _reach_end(i, sinks, alpha, beta, least, T)  # the first query that has key i outside its window
    begin = tl.maximum(tl.min(left, 0), first)
    blocks = tl.cdiv(tl.maximum(end - begin, 0), BM)
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    for step in range(R * blocks):
        h = g * R + step // blocks
        n0 = begin + step % blocks * BM
        n = n0 + om
        q = _tile(Q + b * q_sb + h * q_sh, n0, om, T, q_st, od, D, DP)
        do = _tile(DO + b * o_sb + h * o_sh, n0, om, T, o_st, od, D, DP)
        rows = (b * (G * R) + h) * T + tl.minimum(n, T - 1)
        lse, delta = tl.load(LSE + rows), tl.load(DELTA + rows)
        s = tl.dot(k, tl.trans(q), input_precision=PREC)
        s = tl.where((n[None, :] >= left[:, None]) & (n[None, :] < end), s, HIDDEN)
        dk, dv = _add_key_grads(s, q, do, v, lse, delta, dk, dv, scale2, PREC)
    sinks_padded = tl.num_programs(2) * BN
    part = PART + (bg.to(tl.int64) * NUM_SEGMENTS + segment) * (2 * sinks_padded * D)
    inner = (tl.program_id(2) * BN + on)[:, None] * D + od[None, :]
    ok = (od < D)[None, :]
    tl.store(part + inner, dk, mask=ok)
    tl.store(part + sinks_padded * D + inner, dv, mask=ok)


@triton.jit
def _sum_of_parts(part, inner, ok, count, stride, total):
    """Adds `count` parts that are `stride` numbers apart, in order."""
    for _ in range(count):
        total += tl.load(part + inner, mask=ok, other=0.0)
        part += stride
    return total


@triton.jit
def key_grad_kernel(
    Q, K, V, DO, LSE, DELTA, PART, DK, DV, ALPHA, BETA, LEAST, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, TILES, B, G, A, SEGMENT, NUM_SEGMENTS, SINKS_PADDED, scale,
    R: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_START: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of one KV head and of their values."""
    pid = tl.program_id(0)
    g = _head_of_rank(ALPHA, BETA, LEAST, pid // (TILES * B), T, G, GP).to(tl.int64)
    b, at = ((pid // TILES) % B).to(tl.int64), pid % TILES * BN
    alpha, beta, least = tl.load(ALPHA + g).to(tl.int64), tl.load(BETA + g).to(tl.int64), tl.load(LEAST + g).to(tl.int64)
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    i = at + on
    last = tl.minimum(at + BN, T) - 1
    key = tl.minimum(i, T - 1)
    begin, begin_last = _begin(START, b, key, T, HAS_START), _begin(START, b, last, T, HAS_START)
    document_end = _document_end(START, b, last, T, HAS_START)
    limit = _reach_end(key, begin, alpha, beta, least, T)  # a key is seen by the queries from its own to this
    if HAS_SINKS:
        in_segment = tl.minimum((at // SEGMENT + 1) * SEGMENT, T)
        limit = tl.maximum(limit, tl.where(key < begin + A, in_segment, 0))
    if HAS_START:
        next_begin = tl.min(tl.where(begin[None, :] > key[:, None], begin[None, :], document_end), 1)
        limit = tl.minimum(limit, next_begin)
    end, whole_end = tl.max(limit, 0), tl.min(limit, 0)
    k = _tile(K + b * k_sb + g * k_sh, at, on, T, k_st, od, D, DP)
    v = _tile(V + b * v_sb + g * v_sh, at, on, T, v_st, od, D, DP)
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    if HAS_SINKS:  # first, while registers are free
        later = at // SEGMENT + 1
        count = tl.where(at < begin_last + A, tl.cdiv(document_end, SEGMENT) - later, 0)
        row = i - begin_last
        mine = ((row >= 0) & (row < A))[:, None] & (od < D)[None, :]
        inner = row[:, None] * D + od[None, :]
        part = PART + ((b * G + g) * NUM_SEGMENTS + later) * (2 * SINKS_PADDED * D)
        dk = _sum_of_parts(part, inner, mine, count, 2 * SINKS_PADDED * D, dk)
        dv = _sum_of_parts(part + SINKS_PADDED * D, inner, mine, count, 2 * SINKS_PADDED * D, dv)
    blocks = tl.cdiv(end - at, BM)
    for step in range(R * blocks):
        h = g * R + step // blocks
        n0 = at + step % blocks * BM
        n = n0 + om
        q = _tile(Q + b * q_sb + h * q_sh, n0, om, T, q_st, od, D, DP)
        do = _tile(DO + b * o_sb + h * o_sh, n0, om, T, o_st, od, D, DP)
        rows = (b * (G * R) + h) * T + tl.minimum(n, T - 1)
        lse, delta = tl.load(LSE + rows), tl.load(DELTA + rows)
        s = tl.dot(k, tl.trans(q), input_precision=PREC)
        if (n0 < at + BN - 1) | (n0 + BM > whole_end):
            s = tl.where((n[None, :] >= i[:, None]) & (n[None, :] < limit[:, None]), s, HIDDEN)
        dk, dv = _add_key_grads(s, q, do, v, lse, delta, dk, dv, scale2, PREC)
    ok = (i < T)[:, None] & (od < D)[None, :]
    out = ((b * T + at) * G + g) * D + on[:, None] * (G * D) + od[None, :]
    tl.store(DK + out, (dk * scale).to(k.dtype), mask=ok)
    tl.store(DV + out, dv.to(k.dtype), mask=ok)


def _pow2(n: int) -> int:
    """The least power of 2 that is at least n and 16, what a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def _blocks(D: int, narrow: bool, arch: int = 90) -> dict[str, Any]:
    """Block sizes (queries, keys) and launch options per kernel for a head_dim D; narrow: bf16 or fp16, else fp32, in the interpreter; arch: 10 * compute capability."""
    DP = _pow2(D)
    if not narrow:
        blocks = dict.fromkeys(("forward", "query", "key", "sink"), (32, 32, {"num_warps": 4, "num_stages": 1}))
    elif arch // 10 in (9, 10):
        blocks = {
            "forward": (64, 64, {"num_warps": 4, "num_stages": 3}) if DP == 128 else (128, 128 if DP <= 64 else 32, {"num_warps": 8, "num_stages": 3}),
            "query": (128 if DP <= 128 else 64, 64 if DP <= 128 else 32, {"num_warps": 8, "num_stages": 3 if DP == 128 else 2}),
            "key": (64, 64, {"num_warps": 4, "num_stages": 2})
            if DP == 128
            else (64 if DP <= 64 else 32, 128 if DP <= 64 else 64, {"num_warps": 8, "num_stages": 2}),
            "sink": (64 if DP <= 128 else 16, 64, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2}),
        }
    else:
        blocks = {
            "forward": (128 if DP <= 128 else 64, 64 if DP <= 64 else 32, {"num_warps": 8, "num_stages": 2}),
            "query": (64, 32, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1}),
            "key": (32 if DP <= 128 else 16, 64, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1}),
            "sink": (32 if DP <= 128 else 16, 64, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1}),
        }
    return {"DP": DP, **blocks}


_POINTERS = {
    **dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), "*bf16"),
    **dict.fromkeys(("LSE", "DELTA", "PART"), "*fp32"),
    **dict.fromkeys(("ALPHA", "BETA", "LEAST", "START"), "*i32"),
    "scale": "fp32",
}  # fmt: skip
_SHIPPED = ((64, 3, False), (128, 4, False), (128, 1, True), (256, 2, True))  # head_dim, query heads per KV head, padding or packing
# Bytes of stack accepted on compute capability 9.0: beside two accumulators that fill the registers, Triton 3.6 or 3.9 leaves out up to thirty numbers. For head_dim
# 128 the blocks that spill nothing (64 x 128, 8 warps) were measured too: a backward pass takes 8 % longer with them.
_STACK = {"span-key_grad_kernel-d128-r4": 128, "span-key_grad_kernel-d128-r1-packed": 128, "span-key_grad_kernel-d256-r2-packed": 64}


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    configs = []
    kernels = {"forward": forward_kernel, "query": query_grad_kernel, "sink": sink_grad_kernel, "key": key_grad_kernel}
    for D, R, has_start in _SHIPPED:
        blocks = _blocks(D, True, arch)
        for label, kernel in kernels.items():
            BM, BN, options = blocks[label]
            values = {"R": R, "GP": 8, "D": D, "DP": blocks["DP"], "BM": BM, "BN": BN, "HAS_SINKS": True, "HAS_START": has_start, "PREC": "tf32"}
            constexprs = {name: values[name] for name in kernel.arg_names if name in values}
            signature = {
                name: "constexpr" if name in constexprs else _POINTERS.get(name, "i32:16" if name.endswith(("_sb", "_st", "_sh")) else "i32")
                for name in kernel.arg_names
            }
            if not has_start:
                signature, constexprs = {**signature, "START": "constexpr"}, {**constexprs, "START": None}
            name = f"span-{kernel.__name__}-d{D}-r{R}" + "-packed" * has_start
            configs.append((name, kernel, signature, constexprs, options, _STACK.get(name, 0) if arch // 10 in (9, 10) else 0))
    return configs
