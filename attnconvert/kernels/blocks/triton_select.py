"""Triton kernels that choose the blocks of block-sparse attention: from q and k to lists of blocks per tile of tokens.

The maths and the names are reference.py's; documents lie in rows of one length here, and windows of keys count from the row's start. That is the same as from
a document's own first token where that is a multiple of `rule.alignment`: windows of two documents are seen by nobody.

* `compress_kernel`: fine and coarse keys.
* `coarse_kernel`: the logarithm of every query head's sum over the coarse keys it sees.
* `scores_kernel`: scores of blocks. A program holds BN fine keys and lets query tiles pass, all heads of a KV head after each other, so that the heads' sum stays in
  registers. Its keys overlap those of the next program by one block, whose last fine key is pooled with the block after it.
* `choose_kernel`: which blocks the tokens of a tile see. The score of the last block that is good enough is found by bisection on the scores' bits, which are
  ordered as the numbers are because no score is negative.

A tile is `tile_tokens` neighbouring tokens of one KV head; it lies in one block and one document. Its list is ascending, of the blocks that any of its tokens
sees; bit i of a block's word says whether token i does. Tokens at T or later and padding (start > own index) see the block they lie in.

Scores take B G T N numbers, so queries run in chunks that share their memory.
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
    raise ImportError("the Triton kernels of attnconvert need the package triton (Linux, NVIDIA GPU)") from error

from attnconvert.kernels.blocks.rule import BlockRule, Scorer, num_windows
from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.registration import architecture
from attnconvert.kernels.span.triton import HIDDEN, LOG2E, _begin, _pow2, _tile

CHUNK_MULTIPLE = 128  # tokens; query tiles of all kernels divide it
SCORE_BYTES = 512 * 2**20  # of the scores of one chunk, unless CHUNK_MULTIPLE tokens have more
MAX_BLOCKS = 16384  # per row; `choose_kernel` holds a row's scores in the registers of one program
SPAN = 512  # tokens whose scores one program of `scores_kernel` computes
COMPRESS_STEP = 16  # keys that `compress_kernel` reads at once; divides every window


@triton.jit
def _length(queries):
    """How many queries there is room for, a multiple of CHUNK_MULTIPLE: tiles that reach beyond the last query need no mask."""
    return (queries + 127) // 128 * 128


@triton.jit(do_not_specialize=["COUNT"])
def compress_kernel(
    K, OUT, k_sb, k_st, k_sh, COUNT, G,
    D: tl.constexpr, DP: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Means of KERNEL keys, STRIDE apart: OUT [B, G, COUNT, D]."""
    bg = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    od, step = tl.arange(0, DP), tl.arange(0, STEP)
    tokens = (tl.minimum(j, COUNT - 1) * STRIDE)[:, None] + step[None, :]
    pointers = K + (bg // G) * k_sb + (bg % G) * k_sh + tokens.to(tl.int64)[:, :, None] * k_st + od[None, None, :]
    total = tl.zeros([BN, DP], tl.float32)
    for _ in range(KERNEL // STEP):
        total += tl.sum(tl.load(pointers, mask=(od < D)[None, None, :], other=0.0).to(tl.float32), 1)
        pointers += STEP * k_st
    out = OUT + (bg * COUNT + j[:, None]) * D + od[None, :]
    tl.store(out, (total * (1.0 / KERNEL)).to(OUT.dtype.element_ty), mask=(j < COUNT)[:, None] & (od < D)[None, :])


@triton.jit(do_not_specialize=["COUNT"])
def coarse_kernel(
    Q, COARSE, LSE, START, q_sb, q_st, q_sh, T, COUNT, G, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, HAS_START: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of exp2(logits) of BM queries of a head over the coarse keys they see: LSE [B, H, T rounded up]; infinite where there is none, which makes weights 0."""
    bh = tl.program_id(0)
    b, h = (bh // (G * R)).to(tl.int64), (bh % (G * R)).to(tl.int64)
    t0 = (tl.cdiv(T, BM) - 1 - tl.program_id(1)) * BM  # late tiles, which see more, first
    od, om, on = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN)
    n = tl.minimum(t0 + om, T - 1)
    last = tl.minimum(t0 + BM, T) - 1
    begin = _begin(START, b, n, T, HAS_START)
    begin_last = _begin(START, b, last, T, HAS_START)
    low = _begin(START, b, t0, T, HAS_START) // STRIDE // BN * BN
    high = tl.maximum(last + 1 + STRIDE - KERNEL, 0) // STRIDE  # windows that end at the last query or before
    q = _tile(Q + b * q_sb + h * q_sh, t0, om, T, q_st, od, D, DP)
    keys = COARSE + (b * G + h // R) * COUNT * D
    scale2 = scale * LOG2E
    largest, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    for step in range(tl.cdiv(tl.maximum(high - low, 0), BN)):
        at = low + step * BN
        s = tl.dot(q, tl.trans(_tile(keys, at, on, COUNT, D, od, D, DP)), input_precision=PREC)
        if (at * STRIDE < begin_last) | ((at + BN - 1) * STRIDE + KERNEL > t0 + 1):
            first = (at + on) * STRIDE
            s = tl.where((first[None, :] >= begin[:, None]) & (first[None, :] + (KERNEL - 1) <= n[:, None]), s, HIDDEN)
        new = tl.maximum(largest, tl.max(s, 1) * scale2)
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(s * scale2 - new[:, None]), 1)
        largest = new
    any_seen = (begin + STRIDE - 1) // STRIDE * STRIDE + KERNEL <= n + 1
    tl.store(LSE + bh.to(tl.int64) * _length(T) + t0 + om, tl.where(any_seen, largest + tl.log2(total), float("inf")))


@triton.jit(do_not_specialize=["COUNT", "FIRST", "STOP", "LOW", "NB"])
def scores_kernel(
    Q, FINE, LSE, SCORES, START, q_sb, q_st, q_sh, T, COUNT, FIRST, STOP, LOW, NB, ROW, G, scale,
    R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr, POOL: tl.constexpr, LEAD: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, EDGES: tl.constexpr, HAS_START: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Scores of the blocks that begin in BN fine keys for queries FIRST + SPAN i .. FIRST + SPAN (i + 1): SCORES [B, G, STOP - FIRST rounded up, ROW].

    Not written: queries before LOW, and what a query sees no fine key of; `choose_kernel` does not read these. NB: blocks before STOP. EDGES: whether blocks count
    of which a query does not see all fine keys; without, their scores are anything.
    """
    BLOCKS: tl.constexpr = BN // POOL
    bg = tl.program_id(2).to(tl.int64)
    b, g = bg // G, bg % G
    od, om, on, blocks = tl.arange(0, DP), tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BLOCKS)
    # The keys of a block lie BLOCKS columns apart: pooling them stays inside of a thread.
    block0 = tl.program_id(0) * (BLOCKS - LEAD) - LEAD
    j = (block0 + on % BLOCKS) * POOL + on // BLOCKS
    fine = tl.trans(tl.load(FINE + bg * COUNT * D + tl.minimum(tl.maximum(j, 0), COUNT - 1)[:, None] * D + od[None, :], mask=(od < D)[None, :], other=0.0))
    stop = tl.minimum(FIRST + (tl.program_id(1) + 1) * SPAN, STOP)
    lowest = tl.maximum((block0 + LEAD) * (POOL * STRIDE) + (KERNEL - 1), LOW)  # sees a block's first fine key
    at = tl.maximum(FIRST + tl.program_id(1) * SPAN, lowest // BM * BM)
    tiles = tl.cdiv(tl.maximum(stop - at, 0), BM)
    last_key = ((block0 + BLOCKS) * POOL - 1) * STRIDE
    if HAS_START:
        heads = at + tl.arange(0, SPAN // BM) * BM
        begins = tl.minimum(tl.load(START + b * T + tl.minimum(heads, T - 1)), heads)
        tiles = tl.sum(((heads < stop) & (begins <= last_key)).to(tl.int32), 0)
    Q += b * q_sb + g * R * q_sh
    LSE += bg * R * _length(T)
    SCORES += bg * _length(STOP - FIRST) * ROW
    scale2 = scale * LOG2E
    total = tl.zeros([BM, BN], tl.float32)
    for step in range(tiles * R):
        t0, r = at + step // R * BM, step % R
        lse = tl.load(LSE + (r * _length(T) + t0) + om)  # before the product, which takes longer
        q = _tile(Q + r * q_sh, t0, om, T, q_st, od, D, DP)
        s = tl.dot(q, fine, input_precision=PREC)
        total += tl.exp2(s * scale2 - lse[:, None])
        if r == R - 1:
            if EDGES:
                n = tl.minimum(t0 + om, T - 1)
                begin = _begin(START, b, n, T, HAS_START)
                first = j * STRIDE
                total = tl.where((first[None, :] >= begin[:, None]) & (first[None, :] + (KERNEL - 1) <= n[:, None]), total, 0.0)
            weights = tl.reshape(total, [BM, POOL, BLOCKS])
            score = tl.max(weights, 1)
            if LEAD:
                ends = tl.sum(tl.where((tl.arange(0, POOL) == POOL - 1)[None, :, None], weights, 0.0), 1)
                before = tl.broadcast_to(tl.maximum(blocks - 1, 0)[None, :], [BM, BLOCKS])
                score = tl.maximum(score, tl.gather(ends, before, 1))
            out = SCORES + (t0 - FIRST).to(tl.int64) * ROW + block0
            tl.store(out + (om[:, None] * ROW + blocks[None, :]), score, mask=((blocks >= LEAD) & (block0 + blocks < NB))[None, :])
            total = tl.zeros([BM, BN], tl.float32)


@triton.jit
def _tokens(START, b, n, T, DENSE_LEN, HAS_START: tl.constexpr):
    """Which of the tokens n are in a document, and which are in its first DENSE_LEN - 1."""
    begin = n * 0
    if HAS_START:
        begin = tl.load(START + b * T + tl.minimum(n, T - 1))
    return (n < T) & (begin <= n), n - begin + 1 < DENSE_LEN


@triton.jit
def _bit(token, kind: tl.constexpr):
    """1 << token, of a word's type."""
    return (token * 0 + 1).to(kind) << token.to(kind)


@triton.jit(do_not_specialize=["FIRST", "STOP", "N", "CAP", "DENSE_LEN", "NUM_INIT", "NUM_LOCAL", "NUM_BLOCKS"])
def choose_kernel(
    SCORES, COUNT, BLOCK, WORD, WORDS, START, T, FIRST, STOP, N, ROW, CAP, G, DENSE_LEN, NUM_INIT, NUM_LOCAL, NUM_BLOCKS,
    TOK: tl.constexpr, ROWS: tl.constexpr, NBP: tl.constexpr, S: tl.constexpr, HAS_START: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """The list of a tile: COUNT [B, G, tiles], BLOCK and WORD [B, G, tiles, CAP], tiles of this chunk. TRAIN: also WORDS [B, G, all tiles, N], 0 for what is not seen.

    ROWS: tokens whose scores are in registers at the same time. NBP: a power of 2, at least the blocks before STOP.
    """
    kind: tl.constexpr = WORD.dtype.element_ty
    tile, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t0 = FIRST + tile * TOK
    first, own = _begin(START, bg // G, t0, T, HAS_START) // S, t0 // S
    bits = _bit(tl.arange(0, TOK), kind)
    all_real, all_dense = _tokens(START, bg // G, t0 + tl.arange(0, TOK), T, DENSE_LEN, HAS_START)
    low = tl.minimum(first + NUM_INIT, own + 1)
    high = tl.maximum(own - NUM_LOCAL, low)  # the blocks low .. high - 1 are free
    wanted = NUM_BLOCKS - (own + 1 - first) + (high - low)
    choose = (wanted > 0) & (wanted < high - low)
    whole, known = tl.sum(bits, 0).to(kind), tl.sum(tl.where(all_real, bits, 0), 0).to(kind)
    everything = tl.sum(tl.where(all_real & (all_dense | (wanted >= high - low)), bits, 0), 0).to(kind)
    block = tl.arange(0, NBP)
    free = (block >= low) & (block < high)
    words = tl.zeros([NBP], kind)
    guess = tl.full([ROWS], 0x3F000000, tl.int32)  # of the least score that is good enough: what it is for the token before
    for step in range(tl.where(choose & (everything != known), TOK // ROWS, 0)):
        token = step * ROWS + tl.arange(0, ROWS)
        real, dense = _tokens(START, bg // G, t0 + token, T, DENSE_LEN, HAS_START)
        ranked = real & (dense == 0)
        row = SCORES + (bg * _length(STOP - FIRST) + (t0 + token - FIRST)) * ROW
        # A multiple of 16 numbers, so that loads are wide.
        scores = tl.load(row[:, None] + block[None, :], mask=(block < (own // 16 + 1) * 16)[None, :] & ranked[:, None], other=0.0)
        scores = tl.where(free[None, :] & ranked[:, None], scores, -1.0)
        # At least `wanted` scores are `least` or more, fewer are `over` or more; both are bits of numbers; they are equal as soon as it is exactly `wanted`.
        least = tl.zeros([ROWS], tl.int32)
        over = tl.where(ranked, 0x7F800001, 0)
        width = 1 << 20
        while tl.max(over - least, 0) > 1:
            half = (over - least) >> 1
            near = tl.minimum(half, width)  # bounds are looked for further and further away from the guess
            middle = tl.where(least == 0, tl.where(over == 0x7F800001, guess, over - near), tl.where(over == 0x7F800001, least + near, least + half))
            width = tl.minimum(width, 1 << 26) * 8
            below = (scores - middle.to(tl.float32, bitcast=True)[:, None]).to(tl.uint32, bitcast=True) >> 31  # its sign: cheaper than a comparison
            reach = NBP - tl.sum(below.to(tl.int32), 1)
            least = tl.where((reach >= wanted) & (over > least), middle, least)
            over = tl.where(reach > wanted, over, middle)
        guess = tl.maximum(least, 1)
        if tl.max(over - least, 0) > 0:  # equal scores: earlier blocks first
            last = least.to(tl.float32, bitcast=True)[:, None]
            equal = (scores == last) & (over > least)[:, None]
            rest = wanted - tl.sum((scores > last).to(tl.int32), 1)
            scores = tl.where(equal & (tl.cumsum(equal.to(tl.int32), 1) > rest[:, None]), -1.0, scores)
        seen = scores >= least.to(tl.float32, bitcast=True)[:, None]
        words += tl.sum(tl.where(seen, _bit(token, kind)[:, None], 0), 0).to(kind)
    words = tl.where(free, words | everything, tl.where((block >= first) & (block < own), known, 0))
    words = tl.where(block == own, whole, words)
    listed = words != 0
    place = tl.cumsum(listed.to(tl.int32), 0) - 1
    row = bg * tl.num_programs(0) + tile
    tl.store(COUNT + row, tl.sum(listed.to(tl.int32), 0))
    tl.store(BLOCK + row * CAP + place, block, mask=listed)
    tl.store(WORD + row * CAP + place, words, mask=listed)
    if TRAIN:
        WORDS += (bg * tl.cdiv(T, TOK) + t0 // TOK) * N
        tl.store(WORDS + block, words, mask=block < N)
        for after in range(NBP, N, NBP):
            tl.store(WORDS + after + block, tl.zeros([NBP], kind), mask=after + block < N)


def tile_tokens(group: int, head_dim: int, block_size: int) -> int:
    """Tokens of a tile, a power of 2. A tile has as many rows, times the next power of 2 of `group`, the query heads of a KV head; row = token * that + head.

    Larger tiles are faster per block and visit more blocks. With choices as alike as a real model's, tiles of 64 rows take 7 to 15 % less time than tiles of 128; with
    16 heads they win 2 % forward and lose 8 % with the backward pass.
    """
    heads = int(triton.next_power_of_2(group))
    return min((64 if heads <= 8 or head_dim > 128 else 128) // heads, block_size)


def word_dtype(tokens: int) -> torch.dtype:
    """Of words with one bit for each of a tile's tokens."""
    return torch.int32 if tokens <= 32 else torch.int64


def cap(group: int, head_dim: int, T: int, rule: BlockRule) -> int:
    """Entries that there is room for in a tile's list: bounds how many blocks its tokens see between them."""
    forced = rule.num_init + rule.num_local + 1
    union = forced + tile_tokens(group, head_dim, rule.block_size) * max(rule.num_blocks - forced, 0)
    return min(-(-T // rule.block_size), max(union, rule.num_blocks, rule.dense_len // rule.block_size + 1))


def chunks(B: int, T: int, G: int, rule: BlockRule) -> list[tuple[int, int]]:
    """First and one more than the last query of each chunk; all are multiples of `CHUNK_MULTIPLE` but T."""
    found, first = [], 0
    while first < T:
        stop = first + CHUNK_MULTIPLE
        while stop < T and 4 * _scores(B, G, first, stop + CHUNK_MULTIPLE, rule) <= SCORE_BYTES:
            stop += CHUNK_MULTIPLE
        found.append((first, min(stop, T)))
        first = stop
    return found


def _scores(B: int, G: int, first: int, stop: int, rule: BlockRule) -> int:
    """Numbers in the scores of a chunk."""
    return B * G * -(-(stop - first) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE * _row(stop, rule)


def _row(stop: int, rule: BlockRule) -> int:
    """Scores from one query to the next: the blocks before `stop`, rounded up for wide loads."""
    return (stop + 16 * rule.block_size - 1) // (16 * rule.block_size) * 16


def _first_ranked(rule: BlockRule) -> int:
    """The first position in a document that has more blocks than it sees."""
    return max(rule.dense_len - 1, rule.num_blocks * rule.block_size)


def _edges(rule: BlockRule) -> bool:
    """Whether a block that is not forced may have fine keys that a query does not see: the last ones of the block before its own, or one before the document."""
    return rule.lead > 0 and (rule.num_local == 0 or rule.num_init == 0)


def add_scratch(layout: Layout, *, B: int, T: int, H: int, G: int, D: int, rule: BlockRule, dtype: torch.dtype) -> None:
    """Adds what the launches below write: fine, coarse, coarse_lse, scores; count [B, G, tiles], block and word [B, G, tiles, cap] of a chunk's tiles, flat."""
    tokens = tile_tokens(H // G, D, rule.block_size)
    parts = chunks(B, T, G, rule)
    tiles = B * G * max(-(-(stop - first) // tokens) for first, stop in parts)
    room = tiles * cap(H // G, D, T, rule)
    layout.add("fine", (B, G, num_windows(T, rule.kernel, rule.stride), D), dtype)
    layout.add("coarse", (B, G, num_windows(T, rule.kernel * rule.coarser, rule.stride * rule.coarser), D), dtype)
    layout.add("coarse_lse", (B, H, -(-T // CHUNK_MULTIPLE) * CHUNK_MULTIPLE), torch.float32)
    layout.add("scores", (max((_scores(B, G, first, stop, rule) for first, stop in parts if stop > _first_ranked(rule)), default=0),), torch.float32)
    layout.add("count", (tiles,), torch.int32)
    layout.add("block", (room,), torch.int32)
    layout.add("word", (room,), word_dtype(tokens))


def _blocks(D: int, narrow: bool, arch: int = 90) -> dict[str, Any]:
    """Block sizes (queries, keys) and launch options per kernel for a head_dim D; narrow: bf16 or fp16, else fp32, in the interpreter; arch: 10 * compute capability."""
    DP = _pow2(D)
    if not narrow:
        blocks = dict.fromkeys(("coarse", "scores"), (32, 64, {"num_warps": 4, "num_stages": 1}))
    elif arch // 10 in (9, 10):
        blocks = {
            "coarse": (128, 128 if DP <= 128 else 64, {"num_warps": 8, "num_stages": 2}),
            "scores": (64, 128 if DP <= 128 else 64, {"num_warps": 4, "num_stages": 3 if DP <= 128 else 2}),
        }
    else:
        blocks = {
            "coarse": (128 if DP <= 128 else 64, 64 if DP <= 128 else 32, {"num_warps": 8 if DP > 64 else 4, "num_stages": 2}),
            "scores": (64, 128 if DP <= 128 else 64, {"num_warps": 8, "num_stages": 2}),
        }
    return {"DP": DP, "compress": (max(1, 512 // DP), {"num_warps": 4, "num_stages": 2}), **blocks}


def _choose_options(NBP: int, tokens: int) -> dict[str, int]:
    """Of `choose_kernel`: a warp, which sums without barriers, where its registers have room for the scores and words."""
    return {"num_warps": 1 if NBP * (1 + tokens // 64) <= 2048 else NBP // 1024, "num_stages": 1}


def _shared(q: Any, k: Any, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(block sizes, constexprs that the kernels with queries share) for tensors of such signatures."""
    (_, _, H, D), _, dtype, device = q
    blocks = _blocks(D, dtype != torch.float32, architecture(device))
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return blocks, {"R": H // k[0][2], "D": D, "DP": blocks["DP"], "HAS_START": start is not None, "PREC": precision}


def prepare_launches(q: Any, k: Any, start: Any, rule: BlockRule, scale: float) -> list[Launch]:
    """Launches that come before those of the chunks: "q", "k", "start" -> "fine", "coarse", "coarse_lse". q, k, start: signatures; q and k have stride 1 in D."""
    (B, T, H, D), G = q[0], k[0][2]
    if not _first_ranked(rule) < T:
        return []
    blocks, flags = _shared(q, k, start)
    keys, options = blocks["compress"]
    kernel, stride = rule.kernel * rule.coarser, rule.stride * rule.coarser
    means = [("fine", rule.kernel, rule.stride)]
    if rule.coarser > 1:
        means.append(("coarse", kernel, stride))
    launches = []
    for name, window, apart in means:
        count = num_windows(T, window, apart)
        if count:
            constants = {"D": D, "DP": blocks["DP"], "KERNEL": window, "STRIDE": apart, "STEP": COMPRESS_STEP, "BN": keys}
            launches.append(Launch(compress_kernel, (-(-count // keys), B * G), ("k", name, *k[1][:3], count, G), constants, options))
    BM, BN, options = blocks["coarse"]
    tiles = -(-T // BM) - _first_ranked(rule) // BM
    arguments = ("q", means[-1][0], "coarse_lse", "start" if start else None, *q[1][:3], T, num_windows(T, kernel, stride), G, scale)
    launches.append(Launch(coarse_kernel, (B * H, tiles), arguments, flags | {"BM": BM, "BN": BN, "KERNEL": kernel, "STRIDE": stride}, options))
    return launches


def chunk_launches(q: Any, k: Any, start: Any, rule: BlockRule, scale: float, first: int, stop: int, train: bool) -> list[Launch]:
    """Launches for the queries first .. stop of one of `chunks`, after those of `prepare_launches`: -> "scores"; "count", "block", "word".

    Args:
        q, k, start: signatures of tensors of these names.
        train: also write this chunk's part of the tensor "words" [B, G, tiles of all chunks, N], `word_dtype`.
    """
    (B, T, H, D), G = q[0], k[0][2]
    blocks, flags = _shared(q, k, start)
    S, tokens, row = rule.block_size, tile_tokens(H // G, D, rule.block_size), _row(stop, rule)
    there, given = -(-stop // S), "start" if start else None
    launches = []
    if stop > _first_ranked(rule):
        BM, BN, options = blocks["scores"]
        own = BN // rule.pool - rule.lead
        span = min(SPAN, max(CHUNK_MULTIPLE, triton.next_power_of_2(stop - first)))
        arguments = (
            "q",
            "fine",
            "coarse_lse",
            "scores",
            given,
            *q[1][:3],
            T,
            num_windows(T, rule.kernel, rule.stride),
            first,
            stop,
            _first_ranked(rule),
            there,
            row,
            G,
            scale,
        )
        constants = flags | {
            "BM": BM,
            "BN": BN,
            "SPAN": span,
            "POOL": rule.pool,
            "LEAD": rule.lead,
            "KERNEL": rule.kernel,
            "STRIDE": rule.stride,
            "EDGES": _edges(rule),
        }
        launches.append(Launch(scores_kernel, (-(-there // own), -(-(stop - first) // span), B * G), arguments, constants, options))
    NBP = max(32, triton.next_power_of_2(there))
    arguments = (
        *("scores", "count", "block", "word", "words" if train else None, given),
        *(T, first, stop, -(-T // S), row, cap(H // G, D, T, rule), G, rule.dense_len, rule.num_init, rule.num_local, rule.num_blocks),
    )
    constants = {"TOK": tokens, "ROWS": _rows(tokens, q[3]), "NBP": NBP, "S": S, "HAS_START": start is not None, "TRAIN": train}
    launches.append(Launch(choose_kernel, (-(-(stop - first) // tokens), B * G), arguments, constants, _choose_options(NBP, tokens)))
    return launches


def _rows(tokens: int, device: int) -> int:
    """Tokens that `choose_kernel` handles at once: one, whose loop ends when it is done; all, in the interpreter."""
    return 1 if device >= 0 else tokens


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], rule: BlockRule, scale: float) -> tuple[Plan, Layout]:
    """Launches of `triton_select_blocks`, and their memory. tensors: signatures of q, k and start."""
    q, k, start = tensors
    (B, T, H, D), _, dtype, device = q
    layout = Layout()
    add_scratch(layout, B=B, T=T, H=H, G=k[0][2], D=D, rule=rule, dtype=dtype)
    launches = prepare_launches(q, k, start, rule, scale)
    for first, stop in chunks(B, T, k[0][2], rule):
        launches += chunk_launches(q, k, start, rule, scale, first, stop, True)
    return Plan(device, ("q", "k", "start", "words", "scratch"), launches, {"scratch": layout}), layout


def triton_select_blocks(q: Tensor, k: Tensor, *, rule: BlockRule, scale: float, start: Tensor | None = None) -> Tensor:
    """Which blocks queries see, blocks counted from the row's start: bool [B, G, T, N].

    Args:
        q, k: [B, T, H, D] and [B, T, G, D] of one dtype.
        start: [B, T], multiples of `rule.alignment`.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    start = None if start is None else start.to(torch.int32).contiguous()
    B, T, H, D = q.shape
    G, tokens = k.shape[2], tile_tokens(H // k.shape[2], D, rule.block_size)
    words = torch.empty(B, G, -(-T // tokens), -(-T // rule.block_size), dtype=word_dtype(tokens), device=q.device)
    plan, layout = _plan(signature(q, k, start), rule, scale)
    plan(q, k, start, words, layout.allocate(q.device))
    bits = words[:, :, :, None] >> torch.arange(tokens, device=q.device).to(words.dtype)[:, None]
    return (bits & 1).bool().flatten(2, 3)[:, :, :T]


_POINTERS = {
    **dict.fromkeys(("Q", "K", "OUT", "FINE", "COARSE"), "*bf16"),
    **dict.fromkeys(("LSE", "SCORES"), "*fp32"),
    **dict.fromkeys(("COUNT", "BLOCK", "WORD", "WORDS", "START"), "*i32"),
    "scale": "fp32",
}  # fmt: skip
_SHIPPED: tuple[tuple[int, int, int, Scorer, bool], ...] = (
    (128, 16, 64, "compressed", False),
    (128, 4, 64, "compressed", True),
    (64, 1, 128, "mean", False),
    (256, 2, 32, "compressed", True),
)  # D, R, S, scorer, packed


# Bytes of stack accepted for `choose_kernel` by NBP. Rows of a million tokens: a program has the most warps, a warp half of the registers, and what does not fit is read
# once per token. 2048 blocks on compute capability 8.0: Triton 3.6 leaves out up to 24 numbers of the training form.
_STACK = {8: {2048: 96, MAX_BLOCKS: 512}, 9: {MAX_BLOCKS: 512}}


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability whose blocks to take.
    """
    configs = []
    for D, R, S, scorer, packed in _SHIPPED:
        blocks, rule = _blocks(D, True, arch), BlockRule(block_size=S, scorer=scorer)
        tokens = tile_tokens(R, D, S)
        shared = {"R": R, "D": D, "DP": blocks["DP"], "HAS_START": packed, "PREC": "tf32", "KERNEL": rule.kernel, "STRIDE": rule.stride, "S": S}
        kernels = [("compress", compress_kernel, {"BN": blocks["compress"][0], "STEP": COMPRESS_STEP}, blocks["compress"][1])]
        for label, kernel in (("coarse", coarse_kernel), ("scores", scores_kernel)):
            BM, BN, options = blocks[label]
            kernels.append((label, kernel, {"BM": BM, "BN": BN, "SPAN": SPAN, "POOL": rule.pool, "LEAD": rule.lead, "EDGES": packed}, options))
        for NBP, train in ((512, False), (2048, True), (MAX_BLOCKS, False)):
            kernels.append((f"choose{NBP}", choose_kernel, {"TOK": tokens, "ROWS": 1, "NBP": NBP, "TRAIN": train}, _choose_options(NBP, tokens)))
        for label, kernel, own, options in kernels:
            constexprs = {name: value for name, value in {**shared, **own}.items() if name in kernel.arg_names}
            types = _POINTERS | dict.fromkeys(("WORD", "WORDS"), "*i32" if tokens <= 32 else "*i64") | {"COUNT": "*i32" if kernel is choose_kernel else "i32"}
            signature_of = {
                name: "constexpr" if name in constexprs else types.get(name, "i32:16" if name.endswith(("_sb", "_st", "_sh")) or name == "ROW" else "i32")
                for name in kernel.arg_names
            }
            for name in [name for name, used in (("START", packed), ("WORDS", constexprs.get("TRAIN", True))) if name in signature_of and not used]:
                signature_of, constexprs = {**signature_of, name: "constexpr"}, {**constexprs, name: None}
            configs.append(
                (
                    f"blocks-{label}-d{D}-r{R}-s{S}" + "-packed" * packed,
                    kernel,
                    signature_of,
                    constexprs,
                    options,
                    _STACK.get(arch // 10, {}).get(constexprs.get("NBP", 0), 0),
                )
            )
    return configs
