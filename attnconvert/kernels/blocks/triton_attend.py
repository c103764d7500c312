"""Triton kernels of `block_sparse_attention`: attention over lists of blocks, forward and backward.

A tile is TOK neighbouring tokens times the R query heads of a KV head, R padded to RP, a power of 2: row = token * RP + head. It never crosses a block of S
keys. Neighbours mostly choose the same blocks, so a tile visits the union of its tokens' blocks, each with a word whose bit i says whether token i sees it.
A tile's own block is the last of its list and the only one with a diagonal: no other has a mask of pairs. A token that does not see a block gets a log-sum
that makes its weights 0, which costs an operation per row, not per pair.

* `forward_kernel`, `query_grad_kernel`: a tile, over its list of blocks.
* `key_grad_kernel`: BN keys of a block, over the list of pieces of tiles, TK tokens each, that see it.
* `pack_kernel`: such lists, from the words of all pairs of tiles and blocks, which is what a training step keeps.

Addresses of the next block are loaded while the one before is worked on: the loads of keys and values that depend on them are asynchronous, and as far ahead
as in dense attention. Every sum has one owner and a fixed order: two runs are bit-equal. Inside, logits and log-sums are in units of log 2.
"""

from __future__ import annotations

from typing import Any

import torch

try:  # guarded: transformers refuses a checkpoint whose files import, unguarded, a package that is not there
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.blocks.triton_select import tile_tokens, word_dtype
from attnconvert.kernels.launch import Launch, Layout
from attnconvert.kernels.registration import architecture

LOG2E = tl.constexpr(1.4426950408889634)
# Finite, and a power of 2: times the scale it is exact, so that differences of two hidden logits are 0, not infinite or a rounding error. Its negative, as a
# log-sum, makes the weights of a row 0.
HIDDEN = tl.constexpr(-(2.0**100))
MAX_HEAD_DIM = 256
MAX_GROUP = 16  # query heads per KV head
LIST_BYTES = 256 * 2**20  # of the lists that exist at the same time in a backward pass, unless those of one line are more


@triton.jit
def _matrix(pointers, od, D: tl.constexpr, DP: tl.constexpr):
    """Rows of D numbers as [rows, DP], columns >= D 0."""
    if D == DP:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(od < D)[None, :], other=0.0)


@triton.jit
def _query_tile(T, FIRST, TILES, G, R: tl.constexpr, RP: tl.constexpr, TOK: tl.constexpr):
    """Of a program: (number of its list, b int64, g, its first token, token and head of each row, the latter within the KV head's, which rows are real)."""
    pid = tl.program_id(0)
    tile = TILES - 1 - pid % TILES  # late tiles have longer lists
    bg = pid // TILES
    t0 = FIRST + tile * TOK
    row = tl.arange(0, TOK * RP)
    token, head = row // RP, row % RP
    return (bg * TILES + tile).to(tl.int64), (bg // G).to(tl.int64), bg % G, t0, token, tl.minimum(head, R - 1), (t0 + token < T) & (head < R)


@triton.jit
def _entry(BLOCK, WORD, step, steps, PARTS: tl.constexpr):
    """Block and word of a step; after the last one the last one's."""
    at = tl.minimum(step, steps - 1) // PARTS
    return tl.load(BLOCK + at), tl.load(WORD + at)


@triton.jit
def _keys(base, at, on, T, stride, od, D: tl.constexpr, DP: tl.constexpr, STEPS: tl.constexpr):
    """Keys or values at .. at + len(on). Only a tile's own block may end behind the last token."""
    if STEPS != "others":
        on = tl.minimum(on, T - 1 - at)
    return _matrix((base + at.to(tl.int64) * stride) + (on[:, None] * stride + od[None, :]), od, D, DP)


@triton.jit
def _attend(
    acc, largest, total, block, word, q, n, token, K, V, BLOCK, WORD, k_st, v_st, first, end, steps, T, scale2, od, on,
    S: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Adds the steps from `first` to `end` to sums of values, largest logits and sums of weights.

    block, word: of step `first`; those of step `end` come back. STEPS: of the tile's `own` block, of `others`, or `all`.
    """
    PARTS: tl.constexpr = S // BN
    for step in range(first, end):
        at = block * S + step % PARTS * BN
        s = tl.dot(q, tl.trans(_keys(K, at, on, T, k_st, od, D, DP, STEPS)), input_precision=PREC)
        if (STEPS == "own") | ((STEPS == "all") & (step >= steps - PARTS)):
            s = tl.where((at + on)[None, :] <= n[:, None], s, HIDDEN)
        seen = (word >> token.to(word.dtype)) & 1 != 0
        new = tl.maximum(largest, tl.where(seen, tl.max(s, 1) * scale2, HIDDEN))
        p = tl.exp2(s * scale2 - tl.where(seen, new, -HIDDEN)[:, None])
        kept = tl.exp2(largest - new)
        total = total * kept + tl.sum(p, 1)
        acc *= kept[:, None]
        acc = tl.dot(p.to(q.dtype), _keys(V, at, on, T, v_st, od, D, DP, STEPS), acc, input_precision=PREC)
        largest = new
        block, word = _entry(BLOCK, WORD, step + 1, steps, PARTS)
    return acc, largest, total, block, word


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, COUNT, BLOCK, WORD,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, T, FIRST, TILES, CAP, G, scale,
    R: tl.constexpr, RP: tl.constexpr, TOK: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile, and the logarithms of their softmax denominators.

    O [B, T, H, D] and LSE [B, T, H] are contiguous. Tile i of TILES begins at token FIRST + i TOK. COUNT [B, G, TILES], BLOCK and WORD [B, G, TILES, CAP].
    """
    line, b, g, t0, token, head, row_ok = _query_tile(T, FIRST, TILES, G, R, RP, TOK)
    od, on = tl.arange(0, DP), tl.arange(0, BN)
    n = tl.minimum(t0 + token, T - 1)
    h = g * R + head
    q = _matrix((Q + b * q_sb + t0.to(tl.int64) * q_st) + ((n - t0) * q_st + h * q_sh)[:, None] + od[None, :], od, D, DP)
    K += b * k_sb + g.to(tl.int64) * k_sh
    V += b * v_sb + g.to(tl.int64) * v_sh
    BLOCK += line * CAP
    WORD += line * CAP
    PARTS: tl.constexpr = S // BN
    steps = tl.load(COUNT + line) * PARTS
    block, word = _entry(BLOCK, WORD, 0, steps, PARTS)
    scale2 = scale * LOG2E
    largest, total, acc = tl.full([TOK * RP], HIDDEN, tl.float32), tl.zeros([TOK * RP], tl.float32), tl.zeros([TOK * RP, DP], tl.float32)
    # A loop without a branch is pipelined better: measured, tiles of 64 rows take 5 % less, but those of 128, with 8 warps, a fifth more.
    SPLIT: tl.constexpr = TOK * RP < 128
    rest = 0
    if SPLIT:
        rest = steps - PARTS
        acc, largest, total, block, word = _attend(
            acc, largest, total, block, word, q, n, token, K, V, BLOCK, WORD, k_st, v_st, 0, rest, steps, T, scale2, od, on, S, BN, D, DP, PREC, "others"
        )  # fmt: skip
    acc, largest, total, block, word = _attend(
        acc, largest, total, block, word, q, n, token, K, V, BLOCK, WORD, k_st, v_st, rest, steps, steps, T, scale2, od, on, S, BN, D, DP, PREC,
        "own" if SPLIT else "all",
    )  # fmt: skip
    at_out = (b * T + t0) * (G * R)
    tl.store(O + at_out * D + (token * (G * R) + h)[:, None] * D + od[None, :], (acc / total[:, None]).to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])
    tl.store(LSE + at_out + token * (G * R) + h, largest + tl.log2(total), mask=row_ok)


@triton.jit
def _query_grad(
    dq, block, word, q, do, n, token, lse, delta, K, V, BLOCK, WORD, k_st, v_st, first, end, steps, T, scale2, od, on,
    S: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Adds the steps from `first` to `end` to the gradients of queries, as `_attend`."""
    PARTS: tl.constexpr = S // BN
    for step in range(first, end):
        at = block * S + step % PARTS * BN
        k = _keys(K, at, on, T, k_st, od, D, DP, STEPS)
        s = tl.dot(q, tl.trans(k), input_precision=PREC)
        dp = tl.dot(do, tl.trans(_keys(V, at, on, T, v_st, od, D, DP, STEPS)), input_precision=PREC)
        if STEPS == "own":
            s = tl.where((at + on)[None, :] <= n[:, None], s, HIDDEN)
        seen = (word >> token.to(word.dtype)) & 1 != 0
        p = tl.exp2(s * scale2 - tl.where(seen, lse, -HIDDEN)[:, None])
        dq = tl.dot((p * (dp - delta[:, None])).to(q.dtype), k, dq, input_precision=PREC)
        block, word = _entry(BLOCK, WORD, step + 1, steps, PARTS)
    return dq, block, word


@triton.jit
def query_grad_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ, COUNT, BLOCK, WORD,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, FIRST, TILES, CAP, G, scale,
    R: tl.constexpr, RP: tl.constexpr, TOK: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's queries, and DELTA = DO.O [B, T, H] for the keys' gradients. o_s*: strides of DO; O and DQ are contiguous."""
    line, b, g, t0, token, head, row_ok = _query_tile(T, FIRST, TILES, G, R, RP, TOK)
    od, on = tl.arange(0, DP), tl.arange(0, BN)
    n = tl.minimum(t0 + token, T - 1)
    h = g * R + head
    at_out = (b * T + t0) * (G * R)
    rows = (n - t0) * (G * R) + h
    q = _matrix((Q + b * q_sb + t0.to(tl.int64) * q_st) + ((n - t0) * q_st + h * q_sh)[:, None] + od[None, :], od, D, DP)
    do = _matrix((DO + b * o_sb + t0.to(tl.int64) * o_st) + ((n - t0) * o_st + h * o_sh)[:, None] + od[None, :], od, D, DP)
    o = _matrix((O + at_out * D) + rows[:, None] * D + od[None, :], od, D, DP)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + at_out + rows, delta, mask=row_ok)
    lse = tl.load(LSE + at_out + rows)
    K += b * k_sb + g.to(tl.int64) * k_sh
    V += b * v_sb + g.to(tl.int64) * v_sh
    BLOCK += line * CAP
    WORD += line * CAP
    PARTS: tl.constexpr = S // BN
    steps = tl.load(COUNT + line) * PARTS
    block, word = _entry(BLOCK, WORD, 0, steps, PARTS)
    scale2 = scale * LOG2E
    dq = tl.zeros([TOK * RP, DP], tl.float32)
    dq, block, word = _query_grad(
        dq, block, word, q, do, n, token, lse, delta, K, V, BLOCK, WORD, k_st, v_st, 0, steps - PARTS, steps, T, scale2, od, on, S, BN, D, DP, PREC, "others"
    )
    dq, block, word = _query_grad(
        dq, block, word, q, do, n, token, lse, delta, K, V, BLOCK, WORD, k_st, v_st, steps - PARTS, steps, steps, T, scale2, od, on, S, BN, D, DP, PREC, "own"
    )
    tl.store(DQ + at_out * D + (token * (G * R) + h)[:, None] * D + od[None, :], (dq * scale).to(q.dtype), mask=row_ok[:, None] & (od < D)[None, :])


@triton.jit
def key_grad_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, COUNT, PIECE, WORD,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh, T, FIRST, BLOCKS, CAP, G, scale,
    R: tl.constexpr, RP: tl.constexpr, TK: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys of block FIRST + i, i < BLOCKS, and of their values.

    COUNT [B, G, BLOCKS], PIECE and WORD [B, G, BLOCKS, CAP]: piece j is the tokens TK j .. TK j + TK - 1; those of the block itself are the first.
    """
    pid = tl.program_id(0)
    PARTS: tl.constexpr = S // BN
    rows = tl.num_programs(0) // (BLOCKS * PARTS)
    part, bg, block = pid % PARTS, pid // PARTS % rows, pid // (PARTS * rows)  # early blocks, which more tokens see, first
    line = bg * BLOCKS + block
    b, g, block = (bg // G).to(tl.int64), (bg % G).to(tl.int64), FIRST + block
    od, on = tl.arange(0, DP), tl.arange(0, BN)
    i = block * S + part * BN + on
    at = tl.minimum(i, T - 1).to(tl.int64)
    k = _matrix(K + b * k_sb + g * k_sh + at[:, None] * k_st + od[None, :], od, D, DP)
    v = _matrix(V + b * v_sb + g * v_sh + at[:, None] * v_st + od[None, :], od, D, DP)
    H = G * R
    Q += b * q_sb + g * R * q_sh
    DO += b * o_sb + g * R * o_sh
    LSE += b * T * H + g * R
    DELTA += b * T * H + g * R
    PIECE += line.to(tl.int64) * CAP
    WORD += line.to(tl.int64) * CAP
    count = tl.load(COUNT + line)
    piece, word = tl.load(PIECE), tl.load(WORD)
    row = tl.arange(0, TK * RP)
    head = tl.minimum(row % RP, R - 1)
    scale2 = scale * LOG2E
    dk, dv = tl.zeros([BN, DP], tl.float32), tl.zeros([BN, DP], tl.float32)
    lse = tl.load(LSE + (piece * TK).to(tl.int64) * H + (tl.minimum(row // RP, T - 1 - piece * TK) * H + head))
    for step in range(count):
        n0 = piece * TK
        token = tl.minimum(row // RP, T - 1 - n0)
        seen = ((word >> (row // RP).to(word.dtype)) & 1 != 0) & (n0 + row // RP < T)
        if R < RP:
            seen &= row % RP < R
        first = n0.to(tl.int64)
        q = _matrix((Q + first * q_st) + ((token * q_st + head * q_sh)[:, None] + od[None, :]), od, D, DP)
        do = _matrix((DO + first * o_st) + ((token * o_st + head * o_sh)[:, None] + od[None, :]), od, D, DP)
        delta = tl.load(DELTA + first * H + (token * H + head))
        # [BN, rows]: no accumulator is ever transposed. Sums start from what is subtracted from them, which saves its registers.
        s = tl.dot(k, tl.trans(q), input_precision=PREC)
        if n0 < block * S + S:
            s = tl.where((n0 + row // RP)[None, :] >= i[:, None], s, HIDDEN)
        p = tl.exp2(s * scale2 - tl.where(seen, lse, -HIDDEN)[None, :])
        dv = tl.dot(p.to(q.dtype), do, dv, input_precision=PREC)
        dp = tl.dot(v, tl.trans(do), tl.broadcast_to(-delta[None, :], [BN, TK * RP]), input_precision=PREC)
        dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PREC)
        after = tl.minimum(step + 1, count - 1)
        piece, word = tl.load(PIECE + after), tl.load(WORD + after)
        lse = tl.load(LSE + (piece * TK).to(tl.int64) * H + (tl.minimum(row // RP, T - 1 - piece * TK) * H + head))
    ok = (i < T)[:, None] & (od < D)[None, :]
    out = (b * T * G + g) * D + i.to(tl.int64)[:, None] * (G * D) + od[None, :]
    tl.store(DK + out, (dk * scale).to(k.dtype), mask=ok)
    tl.store(DV + out, dv.to(k.dtype), mask=ok)


@triton.jit
def pack_kernel(
    WORDS, COUNT, INDEX, WORD, T, FIRST, LINES, CAP, TILES, N,
    COLUMNS: tl.constexpr, TOK: tl.constexpr, TK: tl.constexpr, S: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Lists of the words that are not 0, in ascending order, for BL lines FIRST + i, i < LINES. Grid (lines / BL, B G).

    WORDS [B, G, TILES, N]: bit i says whether token i of a tile sees a block. A line is a tile and lists blocks, its own the last; or, if COLUMNS, a line is a
    block and lists the pieces of TK tokens that see it. COUNT [B, G, LINES]; INDEX and WORD [B, G, LINES, CAP].
    """
    first, bg = tl.program_id(0) * BL, tl.program_id(1).to(tl.int64)
    offset = first + tl.arange(0, BL)
    line, line_ok = FIRST + offset, offset < LINES
    PER_TILE: tl.constexpr = TOK // TK
    if COLUMNS:
        begin, end = (FIRST + first) * (S // TK), tl.cdiv(T, TK)
    else:
        begin, end = 0, tl.minimum((FIRST + first + BL - 1) * TOK // S + 1, N)
    count = tl.zeros([BL], tl.int32)
    out = (bg * LINES + offset)[:, None] * CAP
    for at in range(begin, end, BS):
        step = at + tl.arange(0, BS)
        ok = line_ok[:, None] & (step < end)[None, :]
        if COLUMNS:
            word = tl.load(WORDS + bg * TILES * N + (step // PER_TILE).to(tl.int64)[None, :] * N + line[:, None], mask=ok, other=0)
            if TK < TOK:
                word = (word >> (step % PER_TILE * TK).to(word.dtype)[None, :]) & ((1 << TK) - 1)
        else:
            word = tl.load(WORDS + (bg * TILES + line)[:, None] * N + step[None, :], mask=ok, other=0)
        there = word != 0
        upto = count[:, None] + tl.cumsum(there.to(tl.int32), 1)
        tl.store(INDEX + out + upto - 1, tl.broadcast_to(step[None, :], [BL, BS]), mask=there)
        tl.store(WORD + out + upto - 1, word, mask=there)
        count = tl.max(upto, 1)
    tl.store(COUNT + bg * LINES + offset, count, mask=line_ok)


def _pow2(n: int) -> int:
    """The least power of 2 that is at least n and 16, what a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def attend_blocks(rows: int, heads: int, D: int, S: int, narrow: bool, arch: int = 90) -> dict[str, Any]:
    """Block sizes and launch options: of `forward` and `query` (keys, options), of `key` (rows of a piece of a tile, keys, options).

    Args:
        rows: of a tile, padded ones included. heads: rows of a token.
        D: head_dim.
        S: block size.
        narrow: bf16 or fp16; else fp32, in the interpreter.
        arch: 10 * compute capability.
    """
    DP = _pow2(D)
    warps = 8 if rows >= 128 or DP > 128 else 4
    if not narrow:
        forward, query = (32, {"num_warps": 4, "num_stages": 1}), (32, {"num_warps": 4, "num_stages": 1})
        key = (32, 32, {"num_warps": 4, "num_stages": 1})
    elif arch // 10 in (9, 10):
        many = DP == 128 and heads >= 8  # a tile of few tokens; measured
        forward = (128 if DP <= 64 else 64, {"num_warps": warps, "num_stages": 2 if DP > 128 or many else 3})
        query = (64 if DP <= 128 else 32, {"num_warps": warps, "num_stages": 3 if many and rows >= 128 else 2})
        key = (64 if DP <= 128 else 32, 64, {"num_warps": 4 if DP <= 128 else 8, "num_stages": 2})
    else:
        forward = (64 if DP <= 64 and rows >= 128 else 32, {"num_warps": warps, "num_stages": 2})
        query = (32, {"num_warps": warps, "num_stages": 2 if DP <= 64 else 1})
        key = (32 if DP <= 128 else 16, 64, {"num_warps": 4 if DP <= 64 else 8, "num_stages": 2 if DP <= 128 else 1})
    return {
        "DP": DP,
        "forward": (min(forward[0], S), forward[1]),
        "query": (min(query[0], S), query[1]),
        "key": (min(key[0], rows), min(key[1], S), key[2]),
        "pack": {"rows": (4, 256), "columns": (16, 128)},
    }


_PACK_OPTIONS = {"num_warps": 4, "num_stages": 2}


def _shared(q: Any, k: Any, S: int) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(block sizes, constexprs that all kernels with queries share, tokens of a tile) for tensors of such signatures."""
    (_, _, H, D), _, dtype, device = q
    R = H // k[0][2]
    RP, tokens = triton.next_power_of_2(R), tile_tokens(R, D, S)
    blocks = attend_blocks(tokens * RP, RP, D, S, dtype != torch.float32, architecture(device))
    return blocks, {"R": R, "RP": RP, "S": S, "D": D, "DP": blocks["DP"], "PREC": "ieee" if dtype == torch.float32 else "tf32"}, tokens


def forward_launch(q: Any, k: Any, v: Any, S: int, scale: float, first: int, stop: int, room: int) -> Launch:
    """Launch for the queries first .. stop: "q", "k", "v", "count", "block", "word" -> "output", "lse".

    Args:
        q, k, v: signatures; stride 1 in D.
        S: block size.
        first: a multiple of a tile's tokens.
        room: entries that there is room for in a list.
    """
    (B, T, _, _), G = q[0], k[0][2]
    blocks, flags, tokens = _shared(q, k, S)
    BN, options = blocks["forward"]
    tiles = -(-(stop - first) // tokens)
    arguments = ("q", "k", "v", "output", "lse", "count", "block", "word", *q[1][:3], *k[1][:3], *v[1][:3], T, first, tiles, room, G, scale)
    return Launch(forward_kernel, (B * G * tiles,), arguments, flags | {"TOK": tokens, "BN": BN}, options)


def pack_launch(q: Any, k: Any, S: int, first: int, lines: int, room: int, *, columns: bool) -> Launch:
    """Launch that makes lists of "words": -> "count", "block", "word".

    Args:
        q, k: signatures.
        S: block size.
        first, lines: tiles, or, if `columns`, blocks.
        room: entries that there is room for in a list.
    """
    (B, T, _, _), G = q[0], k[0][2]
    blocks, flags, tokens = _shared(q, k, S)
    BL, BS = blocks["pack"]["columns" if columns else "rows"]
    constants = {"COLUMNS": columns, "TOK": tokens, "TK": blocks["key"][0] // flags["RP"], "S": S, "BL": BL, "BS": BS}
    arguments = ("words", "count", "block", "word", T, first, lines, room, -(-T // tokens), -(-T // S))
    return Launch(pack_kernel, (-(-lines // BL), B * G), arguments, constants, _PACK_OPTIONS)


def backward_launches(q: Any, k: Any, v: Any, grad: Any, S: int, scale: float, room: int) -> tuple[list[Launch], Layout]:
    """Launches of a backward pass and its memory: "q", "k", "v", "output", "lse", "grad", "words" -> "dq", "dk", "dv".

    Args:
        q, k, v, grad: signatures, the last of the output's gradient; stride 1 in D.
        S: block size.
        room: the most blocks that a tile sees.
    """
    (B, T, H, _), G = q[0], k[0][2]
    blocks, flags, tokens = _shared(q, k, S)
    entry = B * G * (4 + word_dtype(tokens).itemsize)
    strides = (*q[1][:3], *k[1][:3], *v[1][:3], *grad[1][:3])
    launches, lists, entries = [], 0, 0

    BN, options = blocks["query"]
    tiles = -(-T // tokens)
    step = max(1, LIST_BYTES // (entry * room))
    for first in range(0, tiles, step):
        lines = min(step, tiles - first)
        arguments = (*("q", "k", "v", "output", "grad", "lse", "delta", "dq", "count", "block", "word"), *strides, T, first * tokens, lines, room, G, scale)
        launches.append(pack_launch(q, k, S, first, lines, room, columns=False))
        launches.append(Launch(query_grad_kernel, (B * G * lines,), arguments, flags | {"TOK": tokens, "BN": BN}, options))
        lists, entries = max(lists, lines), max(entries, lines * room)

    rows, BN, options = blocks["key"]
    TK, there, first = rows // flags["RP"], -(-T // S), 0
    while first < there:
        room = -(-T // TK) - first * (S // TK)  # pieces from the first block's own
        lines = min(there - first, max(1, LIST_BYTES // (entry * room)))
        arguments = (*("q", "k", "v", "grad", "lse", "delta", "dk", "dv", "count", "block", "word"), *strides, T, first, lines, room, G, scale)
        launches.append(pack_launch(q, k, S, first, lines, room, columns=True))
        launches.append(Launch(key_grad_kernel, (B * G * lines * (S // BN),), arguments, flags | {"TK": TK, "BN": BN}, options))
        lists, entries = max(lists, lines), max(entries, lines * room)
        first += lines

    layout = Layout()
    layout.add("delta", (B, T, H), torch.float32)
    layout.add("count", (B * G * lists,), torch.int32)
    layout.add("block", (B * G * entries,), torch.int32)
    layout.add("word", (B * G * entries,), word_dtype(tokens))
    return launches, layout


_POINTERS = {
    **dict.fromkeys(("Q", "K", "V", "O", "DO", "DQ", "DK", "DV"), "*bf16"),
    **dict.fromkeys(("LSE", "DELTA"), "*fp32"),
    **dict.fromkeys(("COUNT", "BLOCK", "PIECE", "INDEX"), "*i32"),
    "scale": "fp32",
}  # fmt: skip
_SHIPPED = ((128, 16, 64), (128, 4, 64), (64, 3, 64), (128, 1, 64), (256, 2, 64), (96, 4, 128), (64, 7, 32))  # head_dim, query heads per KV head, block size

# Bytes of stack accepted on compute capability 9.0: what Triton 3.6 or 3.9 puts there beside two accumulators that fill the registers is not used inside of the loop.
_STACK = {("key_grad_kernel", 128): 64, ("key_grad_kernel", 256): 64}


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    configs = []
    for D, R, S in _SHIPPED:
        tokens, RP = tile_tokens(R, D, S), triton.next_power_of_2(R)
        blocks = attend_blocks(tokens * RP, RP, D, S, True, arch)
        shared = {"R": R, "RP": RP, "TOK": tokens, "S": S, "D": D, "DP": blocks["DP"], "PREC": "tf32"}
        rows, keys, key_options = blocks["key"]
        pack = {"TK": rows // RP, "COLUMNS": True, "BL": blocks["pack"]["columns"][0], "BS": blocks["pack"]["columns"][1]}
        for kernel, values, options in (
            (forward_kernel, {"BN": blocks["forward"][0]}, blocks["forward"][1]),
            (query_grad_kernel, {"BN": blocks["query"][0]}, blocks["query"][1]),
            (key_grad_kernel, {"BN": keys, "TK": rows // RP}, key_options),
            (pack_kernel, pack, _PACK_OPTIONS),
        ):
            constexprs = {name: value for name, value in (shared | values).items() if name in kernel.arg_names}
            pointers = _POINTERS | dict.fromkeys(("WORD", "WORDS"), "*i32" if word_dtype(tokens) == torch.int32 else "*i64")
            signature = {
                name: "constexpr" if name in constexprs else pointers.get(name, "i32:16" if name.endswith(("_sb", "_st", "_sh")) else "i32")
                for name in kernel.arg_names
            }
            stack = _STACK.get((kernel.__name__, blocks["DP"]), 0) if arch // 10 in (9, 10) else 0
            configs.append((f"blocks-{kernel.__name__}-d{D}-r{R}-s{S}", kernel, signature, constexprs, options, stack))
    return configs
