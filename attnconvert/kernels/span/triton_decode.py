"""The decode step of attention spans as two Triton launches: parts of each KV head's keys, then their merge.

The keys a step sees are numbered: the old sinks, then the old window in the order of positions; the step's own key is apart. A program of the first launch
has `split` of a KV head's keys and all query heads that share it, as the rows of one tensor-core tile. The grid is that of full caches, so that it can be
recorded in a CUDA graph; a program whose share holds no key yet leaves at once. Programs of a launch cannot wait for each other, and need not:

- The first program of a head starts from the step's own key, which it alone reads, and writes it into its slot. The key that was there is `ring`
  positions older, out of sight of every query of this step.
- It also says how many parts there are. The merge adds them up in a fixed order, and counts the token, since nobody reads the length any more.

Where queries use some of the units only, a KV head none of whose queries are used has no old keys to see: its first program writes, the others leave.
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

from attnconvert.kernels.launch import MAX_PLANS, Launch, Layout, Plan, signature
from attnconvert.kernels.registration import INTERPRETED, namespace

LOG2E = tl.constexpr(1.4426950408889634)
FRACTION_BITS = tl.constexpr(16)  # of beta, see `slots`
MAX_HEAD_DIM = 256
MAX_GROUP = 64  # query heads per KV head: the rows of one tile
MIN_SPLIT, MAX_SPLIT = 64, 1024  # keys of a program
TARGET_PROGRAMS = 4 * 132  # an H100 has 132 multiprocessors, each of which holds two or more programs


@triton.jit
def _of(column, every, head):
    """The entry of one head in a column of the table. A load would have to wait for the head to be known."""
    return tl.sum(tl.where(every == head, column, 0), 0)


@triton.jit
def span_decode(
    Q, K, V, CACHE_K, CACHE_V, LENGTH, TABLE, START, ACTIVE, SLOTS, PART, STATS, COUNT,
    q_row, q_head, k_row, k_head, v_row, v_head, start_row, active_row, cache_k_row, cache_v_row, length_row, split, scale,
    SINKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, UNITS: tl.constexpr, HAS_SLOTS: tl.constexpr,
    ROWS: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs of all KV heads, B). PART [B, programs, GROUP, D] and STATS [B, programs, GROUP, 2], maximum (base 2) and sum, are fp32.

    ACTIVE [B, UNITS], KV heads or query heads, says what is used; UNITS = 0: everything. With HAS_SLOTS, SLOTS [B] says which row of the state a row of the
    batch uses; -1: none, it is padding, and nothing is written.
    """
    program = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    state_row = b
    if HAS_SLOTS:
        state_row = tl.load(SLOTS + b)
        position = tl.load(LENGTH + state_row * length_row, mask=state_row >= 0, other=0)
    else:
        position = tl.load(LENGTH + b * length_row)
    every = tl.arange(0, BG)
    table = TABLE + every * 5
    begins = tl.load(table, mask=every < KV_HEADS, other=0)
    rings = tl.load(table + 1, mask=every < KV_HEADS, other=0)
    alphas = tl.load(table + 2, mask=every < KV_HEADS, other=0)
    betas = tl.load(table + 3, mask=every < KV_HEADS, other=0)
    leasts = tl.load(table + 4, mask=every < KV_HEADS, other=0)
    row = tl.arange(0, ROWS)
    uses = every * 0 + 1
    if UNITS == KV_HEADS:
        uses = tl.load(ACTIVE + b * active_row + every, mask=every < KV_HEADS, other=0).to(tl.int32)
    elif UNITS > 0:
        some = tl.load(ACTIVE + b * active_row + every[:, None] * GROUP + row[None, :], mask=(every < KV_HEADS)[:, None] & (row < GROUP)[None, :], other=0)
        uses = tl.max(some.to(tl.int32), 1)
    programs = tl.where(every < KV_HEADS, tl.maximum((SINKS + rings + split - 1) // split, 1), 0)
    head = tl.sum((tl.cumsum(programs, 0) <= program).to(tl.int32), 0)
    mine = program - tl.sum(tl.where(every < head, programs, 0), 0)
    begin = _of(begins, every, head)
    ring = _of(rings, every, head)
    alpha = _of(alphas, every, head).to(tl.int64)
    beta = _of(betas, every, head).to(tl.int64)
    least = _of(leasts, every, head).to(tl.int64)
    window = tl.maximum(alpha + (((position + 1) * beta) >> FRACTION_BITS), least)
    low = tl.maximum(position + 1 - window, SINKS)  # the first key of the window that is no sink
    num_sinks = tl.minimum(position, SINKS).to(tl.int32)
    num_keys = (num_sinks + tl.maximum(position - low, 0).to(tl.int32)) * _of(uses, every, head)
    lo = mine * split
    hi = tl.minimum(lo + split, num_keys)
    has_part = (mine == 0) | (lo < num_keys)
    if HAS_SLOTS:
        has_part = has_part & (state_row >= 0)
    if has_part:
        turn = tl.maximum(ring, 1)
        oldest = ((low - SINKS) % turn).to(tl.int32)
        d = tl.arange(0, BD)
        row_ok = row < GROUP
        d_ok = d < D
        q_mask = row_ok[:, None] & d_ok[None, :]
        q = tl.load(Q + b * q_row + (head * GROUP + row)[:, None] * q_head + d[None, :], mask=q_mask, other=0.0)
        CACHE_K += state_row * cache_k_row + begin.to(tl.int64) * D
        CACHE_V += state_row * cache_v_row + begin.to(tl.int64) * D

        new_key = tl.load(K + b * k_row + head * k_head + d, mask=d_ok, other=0.0)
        new_value = tl.load(V + b * v_row + head * v_head + d, mask=d_ok, other=0.0)
        own = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * (scale * LOG2E)
        largest = tl.where(mine == 0, own, float("-inf"))
        total = tl.where(mine == 0, tl.full([ROWS], 1.0, tl.float32), 0.0)
        out = tl.where(mine == 0, tl.zeros([ROWS, BD], tl.float32) + new_value.to(tl.float32)[None, :], 0.0)
        for n0 in range(lo, hi, BN):
            n = n0 + tl.arange(0, BN)
            seen = n < hi
            recent = oldest + n - num_sinks
            slot = tl.where(n < num_sinks, n, SINKS + tl.where(recent >= turn, recent - turn, recent))
            at = slot[:, None] * D + d[None, :]
            mask = seen[:, None] & d_ok[None, :]
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

        part = (b * tl.num_programs(0) + program) * GROUP + row
        tl.store(PART + part[:, None] * D + d[None, :], out, mask=q_mask)
        tl.store(STATS + part * 2, largest, mask=row_ok)
        tl.store(STATS + part * 2 + 1, total, mask=row_ok)
        if mine == 0:
            tl.store(COUNT + b * KV_HEADS + head, tl.maximum((num_keys + split - 1) // split, 1))
            limit = D
            if PADDED:  # a scalar condition goes into a bound: the interpreter cannot combine it with a mask
                limit = tl.where(tl.load(START + b * start_row) <= 0, D, 0)
            place = tl.where(position < SINKS, position, SINKS + (position - SINKS) % turn).to(tl.int32)
            tl.store(CACHE_K + place * D + d, new_key, mask=d < limit)
            tl.store(CACHE_V + place * D + d, new_value, mask=d < limit)


@triton.jit
def span_merge(
    PART, STATS, COUNT, OUT, LENGTH, TABLE, START, ACTIVE, SLOTS, GATE, start_row, active_row, gate_row, length_row, num_programs, split,
    SINKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, UNITS: tl.constexpr, HAS_SLOTS: tl.constexpr, GATED: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): the output of one query head of one row, OUT [B, H, D] contiguous. ACTIVE and SLOTS as in `span_decode`, GATE [B, UNITS] where GATED."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    head = h // GROUP
    every = tl.arange(0, BG)
    ring = tl.load(TABLE + every * 5 + 1, mask=every < head, other=0)
    first = tl.sum(tl.where(every < head, tl.maximum((SINKS + ring + split - 1) // split, 1), 0), 0)
    count = tl.load(COUNT + b * KV_HEADS + head)
    used = 1
    unit = 0
    if UNITS > 0:
        unit = h // (KV_HEADS * GROUP // UNITS)
        used = tl.load(ACTIVE + b * active_row + unit).to(tl.int32)
    if HAS_SLOTS:
        used = used * (tl.load(SLOTS + b) >= 0).to(tl.int32)
    if UNITS > 0 or HAS_SLOTS:
        count = count * used
    d = tl.arange(0, BD)
    largest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([BD], tl.float32)
    for n0 in range(0, count, BN):
        n = n0 + tl.arange(0, BN)
        there = n < count
        part = (b * num_programs + first + n) * GROUP + h % GROUP
        maxima = tl.load(STATS + part * 2, mask=there, other=float("-inf"))
        sums = tl.load(STATS + part * 2 + 1, mask=there, other=0.0)
        parts = tl.load(PART + part[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(maxima, 0))
        weights = tl.exp2(maxima - new_largest)
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights * sums, 0)
        out = out * shrink + tl.sum(weights[:, None] * parts, 0)
        largest = new_largest
    if UNITS > 0 or HAS_SLOTS:
        total = tl.where(used != 0, total, float("inf"))
    factor = 1.0 / total
    if GATED:
        factor = tl.where(used != 0, factor * tl.load(GATE + b * gate_row + unit).to(tl.float32), 0.0)
    step = 1
    if PADDED:
        valid = tl.load(START + b * start_row) <= 0
        factor = tl.where(valid, factor, 0.0)
        step = valid.to(tl.int64)
    tl.store(OUT + (b * (KV_HEADS * GROUP) + h) * D + d, (out * factor).to(OUT.dtype.element_ty), mask=d < D)
    if h == 0:
        state_row = b
        exists = True
        if HAS_SLOTS:
            state_row = tl.load(SLOTS + b)
            exists = state_row >= 0
        if exists:
            tl.store(LENGTH + state_row * length_row, tl.load(LENGTH + state_row * length_row) + step)


def step_refusal(device_type: str, dtype: torch.dtype, head_dim: int, group: int) -> str | None:
    """Why the kernels cannot take a step, or None. `group`: query heads per KV head."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not INTERPRETED:
        return f"the tensors are on {device_type}, Triton needs CUDA"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}"
    if group > MAX_GROUP:
        return f"{group} query heads share a KV head, more than {MAX_GROUP}"
    return None


def _split(num_rows: int, rings: tuple[int, ...], num_sinks: int) -> int:
    """Keys of a program: enough programs to fill a GPU, powers of two so that few versions are compiled."""
    keys = num_rows * sum(ring + num_sinks for ring in rings)
    return min(MAX_SPLIT, max(MIN_SPLIT, triton.next_power_of_2(-(-keys // TARGET_PROGRAMS))))


def _num_programs(rings: tuple[int, ...], num_sinks: int, split: int) -> int:
    return sum(max(1, -(-(ring + num_sinks) // split)) for ring in rings)


def _constants(
    kv_heads: int, group: int, head_dim: int, num_sinks: int, num_parts: int, *, padded: bool, exact: bool, units: int = 0, gated: bool = False,
    has_slots: bool = False,
) -> tuple[dict[str, Any], dict[str, int], dict[str, Any], dict[str, int]]:  # fmt: skip
    """Constexprs and launch options of `span_decode` and of `span_merge`. num_parts: most programs of a KV head. units: 0 = all are used."""
    BD = max(16, triton.next_power_of_2(head_dim))
    shared = {
        "SINKS": num_sinks, "KV_HEADS": kv_heads, "GROUP": group, "D": head_dim, "PADDED": padded, "UNITS": units, "HAS_SLOTS": has_slots,
        "BG": triton.next_power_of_2(kv_heads), "BD": BD,
    }  # fmt: skip
    ROWS = max(16, triton.next_power_of_2(group))
    decode = {**shared, "ROWS": ROWS, "BN": 64 if BD <= 128 else 32, "PRECISION": "ieee" if exact else "tf32"}
    merge = {**shared, "GATED": gated, "BN": max(8, min(triton.next_power_of_2(num_parts), 8192 // BD))}  # all parts at once if registers can hold them
    options = {"num_warps": 4, "num_stages": 3} if ROWS * BD <= 8192 else {"num_warps": 8, "num_stages": 2}
    return decode, options, merge, {"num_warps": 4, "num_stages": 2}


_TENSORS = ("q", "k", "v", "cache_k", "cache_v", "length", "table", "start", "active", "slots", "gate")


@functools.lru_cache(MAX_PLANS)
def _plan(tensors: tuple[Any, ...], rings: tuple[int, ...], num_sinks: int, scale: float) -> tuple[Plan, Layout]:
    """The launches of a step and their scratch memory. tensors: signatures of `_TENSORS`."""
    known = {name: one for name, one in zip(_TENSORS, tensors, strict=True) if one is not None}
    shape, stride = ({name: one[at] for name, one in known.items()} for at in (0, 1))
    dtype, device = known["q"][2:]
    (B, _, H, D), G = shape["q"], len(rings)
    split = _split(B, rings, num_sinks)
    programs = _num_programs(rings, num_sinks, split)
    scratch = Layout()
    scratch.add("part", (B, programs, H // G, D), torch.float32)
    scratch.add("stats", (B, programs, H // G, 2), torch.float32)
    scratch.add("count", (B, G), torch.int32)
    decode, decode_options, merge, merge_options = _constants(
        G, H // G, D, num_sinks, _num_programs((max(rings),), num_sinks, split), padded="start" in known, exact=dtype == torch.float32,
        units=shape["active"][2] if "active" in known else 0, gated="gate" in known, has_slots="slots" in known,
    )  # fmt: skip
    # An absent tensor is a pointer the kernel never follows.
    (start, start_row), (active, active_row), (slots, _), (gate, gate_row) = (
        (name, stride[name][0]) if name in known else ("length", 0) for name in _TENSORS[-4:]
    )
    strides = [stride[name][axis] for name in "qkv" for axis in (0, 2)]
    launches = [
        Launch(
            span_decode, (programs, B), ("q", "k", "v", "cache_k", "cache_v", "length", "table", start, active, slots, "part", "stats", "count", *strides, start_row, active_row,
            *(stride[name][0] for name in ("cache_k", "cache_v", "length")), split, scale),
            decode, decode_options,
        ),
        Launch(span_merge, (H, B), ("part", "stats", "count", "out", "length", "table", start, active, slots, gate, start_row, active_row, gate_row, stride["length"][0], programs, split), merge, merge_options),
    ]  # fmt: skip
    return Plan(device, (*_TENSORS, "out", "scratch"), launches, {"scratch": scratch}), scratch


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, length: Tensor, table: Tensor, start: Tensor | None, active: Tensor | None,
    slots: Tensor | None, gate: Tensor | None, rings: list[int], num_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = (q, k, v, cache_k, cache_v, length, table, start, active, slots, gate)
    plan, scratch = _plan(signature(*tensors), tuple(rings), num_sinks, scale)
    plan(*tensors, out, scratch.allocate(q.device))
    return out


NAMESPACE = namespace(__name__)
_op = torch.library.custom_op(
    f"{NAMESPACE}::span_attention_step",
    _launch,
    mutates_args=("cache_k", "cache_v", "length"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) length, Tensor table, Tensor? start, Tensor? active, Tensor? slots, Tensor? gate, "
    "SymInt[] rings, SymInt num_sinks, float scale) -> Tensor",
)


@_op.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, length: Tensor, table: Tensor, start: Tensor | None, active: Tensor | None,
    slots: Tensor | None, gate: Tensor | None, rings: list[int], num_sinks: int, scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def triton_span_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Any, layout: Any, scale: float, start: Tensor | None, active: Tensor | None, gate: Tensor | None,
    slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `span_attention_step`; `step_refusal` must have returned None."""
    q, k, v, active, gate, slots = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, active, gate, slots))
    run = _op if torch.compiler.is_compiling() else _launch
    tensors = (q.detach(), k.detach(), v.detach(), state.k, state.v, state.length, layout.table, start, active, slots, gate)
    return run(*tensors, layout.rings, layout.num_sinks, scale)


def aot_configs(arch: int = 90) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    """What ships, for ahead-of-time compilation: (name, kernel, signature, constexprs, options, stack accepted in bytes), in bfloat16.

    Args:
        arch: 10 * major + minor of the compute capability; blocks do not depend on it.
    """
    scratch = {"PART": "*fp32", "STATS": "*fp32", "COUNT": "*i32"}
    common = dict.fromkeys(("LENGTH", "START", "ACTIVE", "SLOTS"), "*i64") | {"TABLE": "*i32"} | dict.fromkeys(("start_row", "active_row", "length_row"), "i32")
    decode_signature = {**dict.fromkeys(("Q", "K", "V", "CACHE_K", "CACHE_V"), "*bf16"), **common, **scratch}
    decode_signature |= dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32:16")
    decode_signature |= {"cache_k_row": "i32:16", "cache_v_row": "i32:16", "split": "i32:16", "scale": "fp32"}
    merge_signature = {
        "PART": "*fp32",
        "STATS": "*fp32",
        "COUNT": "*i32",
        "OUT": "*bf16",
        "GATE": "*i64",
        **common,
        "gate_row": "i32",
        "num_programs": "i32",
        "split": "i32:16",
    }
    configs = []
    for D, H, G, sinks, parts, padded, units, gated, pool in (
        (128, 32, 8, 64, 64, True, 0, False, False),
        (128, 32, 8, 64, 64, False, 0, False, False),
        (128, 32, 32, 64, 8, True, 0, False, False),
        (64, 9, 3, 64, 64, True, 0, False, False),
        (64, 32, 8, 4, 16, True, 0, False, False),
        (32, 8, 8, 64, 64, True, 0, False, False),
        (96, 32, 32, 64, 64, True, 0, False, False),
        (256, 8, 4, 64, 32, True, 0, False, False),
        (256, 64, 1, 64, 32, True, 0, False, False),
        (128, 32, 8, 0, 64, True, 8, False, False),
        (128, 32, 8, 0, 64, True, 32, True, False),
        (128, 32, 32, 0, 64, True, 32, False, False),
        (64, 9, 3, 0, 64, True, 9, True, False),
        (128, 32, 8, 64, 64, False, 0, False, True),
        (64, 9, 3, 64, 64, False, 0, False, True),
        (256, 8, 4, 64, 32, False, 0, False, True),
        (128, 32, 8, 0, 64, False, 32, True, True),
    ):
        found = _constants(G, H // G, D, sinks, parts, padded=padded, exact=False, units=units, gated=gated, has_slots=pool)
        decode, decode_options, merge, merge_options = found
        name = f"d{D}-h{H}-g{G}-a{sinks}" + ("" if padded else "-unpadded") + (f"-u{units}" if units else "") + "-gated" * gated + "-pool" * pool
        routing = ({"ACTIVE": "*i1"} if units else {}) | ({"GATE": "*fp32"} if gated else {})
        configs.append((f"span_decode-{name}", span_decode, decode_signature | {"ACTIVE": routing.get("ACTIVE", "*i64")}, decode, decode_options, 0))
        configs.append((f"span_merge-{name}", span_merge, merge_signature | routing, merge, merge_options, 0))
    return configs
