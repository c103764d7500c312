"""Triton kernels of `routed_attention`: forward and backward, work proportional to the queries that are used.

The maths and the names are reference.py's. The tokens that use a unit are numbered in their order: the rank of a token. A tile is BM of them, gathered;
between its first and its last token there may be others, so more of its blocks have a diagonal in them than in dense attention: one or two of a long row.

* `list_kernel`: per unit the tokens that use it, and how many of them come before each GRAIN-th token.
* `forward_kernel`, `query_grad_kernel`: a tile of a query head, over the keys from its first document's first to its last token, or that one's document's last. Program i of a head also
  writes the zeros of those of the tokens BM i .. that do not use the unit.
* `key_grad_kernel`: BN keys of a KV head, over its units and their tokens from the keys' own, or the beginning of the document, to its end.

Log-sums and what else is kept per query are in the order of ranks: only rows of queries and of the output's gradient are gathered. Every sum has one owner
and a fixed order: two runs are bit-equal. Inside, logits and log-sums are in units of log 2.
"""

from __future__ import annotations

from typing import Any

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.span.triton import HIDDEN, LOG2E, _begin, _document_end, _pow2, _tile

MAX_HEAD_DIM = 256
MAX_TILE = tl.constexpr(128)  # queries of a tile of any kernel; all sizes are powers of 2
LIST_BLOCK = 1024  # tokens of a program of `list_kernel`, a multiple of every GRAIN
LIST_OPTIONS = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _padded(T):
    """What there is room for in the order of ranks: whole tiles."""
    return tl.cdiv(T, MAX_TILE) * MAX_TILE


@triton.jit
def list_kernel(ACTIVE, GATE, INDEX, GATES, BEFORE, T, U, N, GRAIN: tl.constexpr, BLOCK: tl.constexpr, HAS_GATE: tl.constexpr):
    """Lists of BLOCK tokens of one unit, in `list_programs(B U, N, GRAIN)` programs; N = T / GRAIN, rounded up.

    ACTIVE [B, T, U], 0 or 1; GATE [B, T, U]. INDEX [B, U, T], GATES [B, U, T padded]: token and gate of each rank. BEFORE [B, U, N + 1]: how many tokens
    of the list come before token i GRAIN; the last is the length of the list.
    """
    parts = N * GRAIN // BLOCK + 1
    first, line = tl.program_id(0) % parts * BLOCK, (tl.program_id(0) // parts).to(tl.int64)
    flags = ACTIVE + line // U * T * U + line % U
    offset = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for at in range(0, first, BLOCK):
        i = at + offset
        counts += tl.load(flags + i.to(tl.int64) * U, mask=i < T, other=0).to(tl.int32)
    i = first + offset
    used = tl.load(flags + i.to(tl.int64) * U, mask=i < T, other=0).to(tl.int32)
    rank = tl.sum(counts, 0) + tl.cumsum(used, 0) - used
    tl.store(INDEX + line * T + rank, i, mask=used != 0)
    if HAS_GATE:
        gate = tl.load(GATE + line // U * T * U + line % U + i.to(tl.int64) * U, mask=used != 0, other=0.0)
        tl.store(GATES + line * _padded(T) + rank, gate.to(tl.float32), mask=used != 0)
    tl.store(BEFORE + line * (N + 1) + i // GRAIN, rank, mask=(i % GRAIN == 0) & (i <= N * GRAIN))


@triton.jit
def _rows(base, n, stride, od, D: tl.constexpr, DP: tl.constexpr):
    """Rows n of a matrix whose rows are `stride` apart, as [rows, DP]: columns >= D 0."""
    pointers = base + n.to(tl.int64)[:, None] * stride + od[None, :]
    if D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(od < D)[None, :], other=0.0)


@triton.jit
def _query_program(TILES, G, R: tl.constexpr, UNITS: tl.constexpr):
    """(b int64, g int64, h int64, unit's line int64, tile) of a program of BM queries: neighbours share keys; late tiles, which see more, come first."""
    pid = tl.program_id(0)
    bg = (pid // (R * TILES)).to(tl.int64)
    r = pid % R
    return bg // G, bg % G, bg % G * R + r, bg * UNITS + r // (R // UNITS), TILES - 1 - (pid // R) % TILES


@triton.jit
def _unused(ACTIVE, b, unit, n, T, U):
    """Which tokens n do not use a unit."""
    return tl.load(ACTIVE + (b * T + n) * U + unit, mask=n < T, other=1) == 0


@triton.jit
def _key_ranges(START, b, first, last, T, BN: tl.constexpr, HAS_START: tl.constexpr, CAUSAL: tl.constexpr):
    """Of queries from token `first` to token `last` the blocks of keys: (low, whole, whole_end, end), multiples of BN; masked, seen by all queries, masked."""
    low = _begin(START, b, first, T, HAS_START) // BN * BN
    if CAUSAL:
        all_end, end = first + 1, tl.cdiv(last + 1, BN) * BN
    else:
        all_end, end = _document_end(START, b, first, T, HAS_START), tl.cdiv(_document_end(START, b, last, T, HAS_START), BN) * BN
    whole = low
    if HAS_START:
        whole = tl.minimum(tl.cdiv(_begin(START, b, last, T, HAS_START), BN) * BN, end)
    return low, whole, tl.maximum(whole, all_end // BN * BN), end


@triton.jit
def _seen(START, b, i, n, begin, T, HAS_START: tl.constexpr, CAUSAL: tl.constexpr):
    """Which keys i queries n see, [queries, keys]. begin: of the queries' documents."""
    if CAUSAL:
        seen = (i[None, :] <= n[:, None]) & (i[None, :] >= begin[:, None])
    else:
        seen = (i[None, :] >= begin[:, None]) & (i < T)[None, :]
        if HAS_START:
            seen &= _begin(START, b, tl.minimum(i, T - 1), T, HAS_START)[None, :] <= n[:, None]
    return seen


@triton.jit
def _keys(base, at, on, T, stride, od, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """Rows at .. at + len(on) of keys or values. Where no block is masked, none is behind the last row, and the pointers differ by a constant."""
    if MASKED:
        return _tile(base, at, on, T, stride, od, D, DP)
    else:
        return _rows(base + at.to(tl.int64) * stride, on, stride, od, D, DP)


@triton.jit
def _attend(
    acc, largest, total, q, n, begin, K, V, START, k_st, v_st, b, first, end, T, scale2, od, on, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    HAS_START: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` to `end` to sums of values, largest logits and sums of weights. A loop without a branch in it is pipelined better."""
    for block in range((end - first) // BN):
        at = first + block * BN
        s = tl.dot(q, tl.trans(_keys(K, at, on, T, k_st, od, D, DP, MASKED)), input_precision=PREC)
        if MASKED:
            s = tl.where(_seen(START, b, at + on, n, begin, T, HAS_START, CAUSAL), s, HIDDEN)
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
    Q, K, V, O, LSE, ACTIVE, INDEX, GATES, BEFORE, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, T, TILES, G, N, scale,
    R: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_START: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs of BM queries of one head, and the logarithms of their softmax denominators. UNITS: of a KV head.

    O [B, T, H, D]; LSE [B, H, T padded], at their ranks; behind the last one, up to the tile's end, that of the last one again.
    """
    b, g, h, line, tile = _query_program(TILES, G, R, UNITS)
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    O += b * T * (G * R * D) + h * D
    own = tile * BM + om
    unused = _unused(ACTIVE, b, line % (G * UNITS), own, T, G * UNITS)
    tl.store(O + own.to(tl.int64)[:, None] * (G * R * D) + od[None, :], tl.zeros([BM, DP], O.dtype.element_ty), mask=unused[:, None] & (od < D)[None, :])
    count = tl.load(BEFORE + line * (N + 1) + N)
    if tile * BM >= count:
        return
    INDEX += line * T
    rank = tl.minimum(own, count - 1)
    n = tl.load(INDEX + rank)
    first, last = tl.load(INDEX + tile * BM), tl.load(INDEX + tl.minimum(tile * BM + BM, count) - 1)
    low, whole, whole_end, end = _key_ranges(START, b, first, last, T, BN, HAS_START, CAUSAL)
    begin = _begin(START, b, n, T, HAS_START)
    q = _rows(Q + b * q_sb + h * q_sh, n, q_st, od, D, DP)
    K += b * k_sb + g * k_sh
    V += b * v_sb + g * v_sh
    scale2 = scale * LOG2E
    largest, total, acc = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, DP], tl.float32)
    if HAS_START:
        acc, largest, total = _attend(
            acc, largest, total, q, n, begin, K, V, START, k_st, v_st, b, low, whole, T, scale2, od, on, D, DP, BN, HAS_START, CAUSAL, PREC, True
        )
    acc, largest, total = _attend(
        acc, largest, total, q, n, begin, K, V, START, k_st, v_st, b, whole, whole_end, T, scale2, od, on, D, DP, BN, HAS_START, CAUSAL, PREC, False
    )
    acc, largest, total = _attend(
        acc, largest, total, q, n, begin, K, V, START, k_st, v_st, b, whole_end, end, T, scale2, od, on, D, DP, BN, HAS_START, CAUSAL, PREC, True
    )
    acc /= total[:, None]
    if HAS_GATE:
        acc *= tl.load(GATES + line * _padded(T) + rank)[:, None]
    row_ok = own < count
    tl.store(O + n.to(tl.int64)[:, None] * (G * R * D) + od[None, :], acc.to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])
    tl.store(LSE + (b * (G * R) + h) * _padded(T) + own, largest + tl.log2(total))


@triton.jit
def _query_grad(
    dq, dot, q, do, n, begin, lse, delta, gate, K, V, START, k_st, v_st, b, first, end, T, scale2, od, on, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_START: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `first` to `end` to the gradients of queries and to DO.O / gate."""
    for block in range((end - first) // BN):
        at = first + block * BN
        k = _keys(K, at, on, T, k_st, od, D, DP, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        dp = tl.dot(do, tl.trans(_keys(V, at, on, T, v_st, od, D, DP, MASKED)), input_precision=PREC)
        if MASKED:
            s = tl.where(_seen(START, b, at + on, n, begin, T, HAS_START, CAUSAL), s, HIDDEN)
        p = tl.exp2(s * scale2 - lse[:, None])
        if HAS_GATE:
            dot += tl.sum(p * dp, 1)
            dp *= gate[:, None]
        dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq, input_precision=PREC)
    return dq, dot


@triton.jit
def query_grad_kernel(
    Q, K, V, O, DO, LSE, DELTA, DOT, DQ, ACTIVE, INDEX, GATES, BEFORE, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, TILES, G, N, scale,
    R: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_START: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BM queries of one head; DO.O / gate, by DO and V so that the gate may be 0: DELTA, as LSE, and, with gates, DOT [B, T, H].

    o_s*: strides of DO; O and DQ are contiguous.
    """
    b, g, h, line, tile = _query_program(TILES, G, R, UNITS)
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    O += b * T * (G * R * D) + h * D
    DQ += b * T * (G * R * D) + h * D
    own = tile * BM + om
    unused = _unused(ACTIVE, b, line % (G * UNITS), own, T, G * UNITS)
    tl.store(DQ + own.to(tl.int64)[:, None] * (G * R * D) + od[None, :], tl.zeros([BM, DP], DQ.dtype.element_ty), mask=unused[:, None] & (od < D)[None, :])
    if HAS_GATE:
        DOT += b * T * (G * R) + h
        tl.store(DOT + own.to(tl.int64) * (G * R), tl.zeros([BM], tl.float32), mask=unused)
    count = tl.load(BEFORE + line * (N + 1) + N)
    if tile * BM >= count:
        return
    INDEX += line * T
    rank = tl.minimum(own, count - 1)
    row_ok = own < count
    n = tl.load(INDEX + rank)
    first, last = tl.load(INDEX + tile * BM), tl.load(INDEX + tl.minimum(tile * BM + BM, count) - 1)
    low, whole, whole_end, end = _key_ranges(START, b, first, last, T, BN, HAS_START, CAUSAL)
    begin = _begin(START, b, n, T, HAS_START)
    q = _rows(Q + b * q_sb + h * q_sh, n, q_st, od, D, DP)
    do = _rows(DO + b * o_sb + h * o_sh, n, o_st, od, D, DP)
    delta = tl.sum(do.to(tl.float32) * _rows(O, n, G * R * D, od, D, DP).to(tl.float32), 1)
    lines = (b * (G * R) + h) * _padded(T)
    if not HAS_GATE:
        tl.store(DELTA + lines + own, delta)
    lse = tl.load(LSE + lines + rank)
    gate = delta
    if HAS_GATE:
        gate = tl.load(GATES + line * _padded(T) + rank)
    K += b * k_sb + g * k_sh
    V += b * v_sb + g * v_sh
    scale2 = scale * LOG2E
    dq, dot = tl.zeros([BM, DP], tl.float32), tl.zeros([BM], tl.float32)
    if HAS_START:
        dq, dot = _query_grad(
            dq, dot, q, do, n, begin, lse, delta, gate, K, V, START, k_st, v_st, b, low, whole, T, scale2, od, on, D, DP, BN, HAS_GATE, HAS_START, CAUSAL, PREC, True
        )  # fmt: skip
    dq, dot = _query_grad(
        dq, dot, q, do, n, begin, lse, delta, gate, K, V, START, k_st, v_st, b, whole, whole_end, T, scale2, od, on, D, DP, BN, HAS_GATE, HAS_START, CAUSAL, PREC, False
    )  # fmt: skip
    dq, dot = _query_grad(
        dq, dot, q, do, n, begin, lse, delta, gate, K, V, START, k_st, v_st, b, whole_end, end, T, scale2, od, on, D, DP, BN, HAS_GATE, HAS_START, CAUSAL, PREC, True
    )  # fmt: skip
    tl.store(DQ + n.to(tl.int64)[:, None] * (G * R * D) + od[None, :], (dq * scale).to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])
    if HAS_GATE:
        tl.store(DELTA + lines + own, dot)
        tl.store(DOT + n.to(tl.int64) * (G * R), dot, mask=row_ok)


@triton.jit
def _rank(INDEX, BEFORE, n, N, GRAIN: tl.constexpr):
    """How many of the tokens of a list come before token n; scalars."""
    at, offset = n // GRAIN, tl.arange(0, GRAIN)
    begin, end = tl.load(BEFORE + at), tl.load(BEFORE + tl.minimum(at + 1, N))
    listed = begin + offset < end
    return begin + tl.sum((listed & (tl.load(INDEX + begin + offset, mask=listed, other=0) < n)).to(tl.int32), 0)


@triton.jit
def key_grad_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, INDEX, GATES, BEFORE, START,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, TILES, G, scale,
    R: tl.constexpr, UNITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_START: tl.constexpr, CAUSAL: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of one KV head and of their values. BN is the GRAIN of BEFORE."""
    pid = tl.program_id(0)
    bg, tile = (pid // TILES).to(tl.int64), pid % TILES  # early keys, which more tokens see, first
    b, g, at = bg // G, bg % G, tile * BN
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    i = at + on
    lower = i if CAUSAL else i * 0
    if HAS_START:
        key = tl.minimum(i, T - 1)
        begin = _begin(START, b, key, T, HAS_START)
        document_end = _document_end(START, b, tl.minimum(at + BN, T) - 1, T, HAS_START)
        limit = tl.min(tl.where(begin[None, :] > key[:, None], begin[None, :], document_end), 1)  # a key is seen by the queries from `lower` to this
        if not CAUSAL:
            lower = begin
    k = _tile(K + b * k_sb + g * k_sh, at, on, T, k_st, od, D, DP)
    v = _tile(V + b * v_sb + g * v_sh, at, on, T, v_st, od, D, DP)
    Q += b * q_sb + g * R * q_sh
    DO += b * o_sb + g * R * o_sh
    TP = _padded(T)
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    HEADS: tl.constexpr = R // UNITS
    for unit in range(UNITS):
        line = bg * UNITS + unit
        index, before = INDEX + line * T, BEFORE + line * (TILES + 1)
        end = tl.load(before + TILES)
        if CAUSAL:
            first, whole = tl.load(before + tile), tl.load(before + tile + 1)
        elif HAS_START:
            first, whole = _rank(index, before, tl.min(lower, 0), TILES, BN), _rank(index, before, tl.max(lower, 0), TILES, BN)
        else:
            first, whole = end * 0, end * 0
        whole_end = end
        if HAS_START:
            end, whole_end = _rank(index, before, document_end, TILES, BN), _rank(index, before, tl.min(limit, 0), TILES, BN)
        first = first // BM * BM  # what is kept per query is loaded in whole lines
        blocks = tl.where(end > first, tl.cdiv(end - first, BM), 0)
        n = tl.load(index + tl.maximum(tl.minimum(first + om, end - 1), 0))
        for step in range(HEADS * blocks):
            r = unit * HEADS + step // blocks
            j0 = first + step % blocks * BM
            q = _rows(Q + r * q_sh, n, q_st, od, D, DP)
            do = _rows(DO + r * o_sh, n, o_st, od, D, DP)
            rows = (bg * R + r) * TP + j0
            lse, delta = tl.load(LSE + rows + om), tl.load(DELTA + rows + om)
            # [BN, BM]: no accumulator is ever transposed
            s = tl.dot(k, tl.trans(q), input_precision=PREC)
            if (j0 < whole) | (j0 + BM > whole_end):
                here = tl.load(index + tl.minimum(j0 + om, end - 1))  # again: its registers are free meanwhile
                seen = (here[None, :] >= lower[:, None]) & (j0 + om < end)[None, :]
                if HAS_START:
                    seen &= here[None, :] < limit[:, None]
                s = tl.where(seen, s, HIDDEN)
            p = tl.exp2(s * scale2 - lse[None, :])
            if HAS_GATE:
                p *= tl.load(GATES + line * TP + j0 + om)[None, :]
            dv = tl.dot(p.to(q.dtype), do, dv, input_precision=PREC)
            # the sum starts from what is subtracted from it, which saves its registers
            dp = tl.dot(v, tl.trans(do), tl.broadcast_to(-delta[None, :], [BN, BM]), input_precision=PREC)
            dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PREC)
            n = tl.load(index + tl.minimum(first + (step + 1) % blocks * BM + om, end - 1))  # of the next step: its rows are loaded while this one is worked on
    ok = (i < T)[:, None] & (od < D)[None, :]
    out = (b * T * G + g) * D + i.to(tl.int64)[:, None] * (G * D) + od[None, :]
    tl.store(DK + out, (dk * scale).to(k.dtype), mask=ok)
    tl.store(DV + out, dv.to(k.dtype), mask=ok)


def list_programs(lines: int, N: int, grain: int) -> int:
    """Programs of `list_kernel`: the number BEFORE ends with is that of a token behind the last."""
    return lines * (N * grain // LIST_BLOCK + 1)


def _blocks(D: int, narrow: bool, arch: int = 90) -> dict[str, Any]:
    """Block sizes (queries, keys) and launch options per kernel for a head_dim D.

    narrow: bf16 or fp16, else fp32, in the interpreter; arch: 10 * compute capability.
    """
    DP = _pow2(D)
    if not narrow:
        blocks = dict.fromkeys(("forward", "query", "key"), (32, 32, {"num_warps": 4, "num_stages": 1}))
    elif arch // 10 in (9, 10):
        blocks = {
            "forward": (64, 64, {"num_warps": 4, "num_stages": 3})
            if DP == 128
            else (128, 128 if DP <= 64 else 32, {"num_warps": 8, "num_stages": 2 if DP <= 64 else 3}),
            "query": (128 if DP <= 128 else 64, 64 if DP <= 128 else 32, {"num_warps": 8, "num_stages": 3 if DP == 128 else 2}),
            "key": (64, 64, {"num_warps": 4, "num_stages": 2})
            if DP == 128
            else (64 if DP <= 64 else 32, 128 if DP <= 64 else 64, {"num_warps": 8, "num_stages": 2}),
        }
    else:
        blocks = {
            "forward": (128 if DP <= 128 else 64, 64 if DP <= 64 else 32, {"num_warps": 8, "num_stages": 2}),
            "query": (64, 64 if DP <= 64 else 32, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1}),
            "key": (32 if DP <= 128 else 16, 64, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1}),
        }
    return {"DP": DP, **blocks}


_POINTERS = {
    **dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), "*bf16"),
    **dict.fromkeys(("LSE", "DELTA", "DOT", "GATES", "GATE"), "*fp32"),
    **dict.fromkeys(("INDEX", "BEFORE", "START"), "*i32"),
    "ACTIVE": "*u8",
    "scale": "fp32",
}  # fmt: skip
# head_dim, query heads per KV head, units of a KV head, gates, padding or packing, causal
_SHIPPED = (
    (64, 3, 1, True, False, True),
    (128, 4, 1, True, False, True),
    (128, 1, 1, True, True, True),
    (128, 4, 4, False, False, True),
    (256, 2, 1, False, True, True),
    (64, 1, 1, True, True, False),
)
# Bytes of stack accepted, see span/triton.py. With Triton 3.6, 16 are enough for gradients of keys. Those of queries spill ten numbers with head_dim 128
# and three stages; three were measured a fifth faster than two, which spill none.
_STACK = {
    "heads-key_grad_kernel-d128-r1-u1-gates-packed": 80,
    "heads-key_grad_kernel-d128-r4-u4": 32,
    "heads-key_grad_kernel-d256-r2-u1-packed": 144,
    "heads-query_grad_kernel-d128-r4-u1-gates": 40,
    "heads-query_grad_kernel-d256-r2-u1-packed": 40,
    "heads-query_grad_kernel-d64-r1-u1-gates-packed-bidirectional": 16,
}


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    configs = []
    kernels = {"forward": forward_kernel, "query": query_grad_kernel, "key": key_grad_kernel, "list": list_kernel}
    for D, R, units, has_gate, has_start, causal in _SHIPPED:
        blocks = _blocks(D, True, arch)
        blocks["list"] = (0, 0, LIST_OPTIONS)
        for label, kernel in kernels.items():
            BM, BN, options = blocks[label]
            values = {"R": R, "UNITS": units, "D": D, "DP": blocks["DP"], "BM": BM, "BN": BN, "GRAIN": blocks["key"][1], "BLOCK": LIST_BLOCK}
            values |= {"HAS_GATE": has_gate, "HAS_START": has_start, "CAUSAL": causal, "PREC": "tf32"}
            values |= dict.fromkeys(("GATE", "GATES", "DOT") * (not has_gate) + ("START",) * (not has_start))
            constexprs = {name: values[name] for name in kernel.arg_names if name in values}
            signature = {
                name: "constexpr" if name in constexprs else _POINTERS.get(name, "i32:16" if name.endswith(("_sb", "_st", "_sh")) else "i32")
                for name in kernel.arg_names
            }
            name = f"heads-{kernel.__name__}-d{D}-r{R}-u{units}" + "-gates" * has_gate + "-packed" * has_start + "-bidirectional" * (not causal)
            configs.append((name, kernel, signature, constexprs, options, _STACK.get(name, 0)))
    return configs
