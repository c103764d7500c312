"""Readable PyTorch form of softmax-window + sinks + Hedgehog linear attention, linear in T in time and memory.

Shapes: B batch, T query tokens, H query heads, G key-value heads, r = H / G, D head_dim, F features (two halves of F/2), C window
size = tile size, N tiles, A sinks, P prefix keys (nb * C), M = (nb + 1) * C keys a tile looks at.

One definition for training, prefill and decode. For query n of a document that starts at index s, with position p = n - s:

    softmax set  W_n = {i: s <= i <= n, and (i >= s + lo(p) or i < s + A)}
    linear set   P_n = {i: s + A <= i < s + lo(p)}
    lo(p) = max(0, p - C + 1)                sliding: the last C keys, the query's own included
          = max(0, (p // C - 1) * C)         block: own block and the one before, counted from the document's start
          = p + 1                            C = 0: no window

    y_n = (sum_W exp(s_ni - c) v_i + e^l sum_P phi_q.phi_k v_i) / (sum_W exp(s_ni - c) + e^l sum_P phi_q.phi_k)
    phi(x) = max([e^g+ softmax(xW), e^g- softmax(-xW)], 1e-12), see `feature_map`

`reference` says what c is. `absolute`: c = 0, so phi_q.phi_k stands for exp(s_ni) itself, whatever is in the window. `window_max`
(LoLCATs): c = c_n, the maximum of s_ni over W_n; it is part of the model, not only a stabiliser, and gradients flow through it.
l is the linear branch's log weight per head (LoLCATs: -log gamma). Keys outside the tile's M are held in a running state (kv, z), always fp32: a bf16
normaliser stops growing after 256 equal steps.

Queries are cut into tiles of C. A tile looks at its own keys and nb chunks before; older keys of its document are in the state.
Documents may start anywhere (left padding, packing): `start` gives each token's document start, and only one document can reach
back beyond a tile's keys, so one state and one set of sinks per tile are enough.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor

FEATURE_FLOOR = 1e-12  # LoLCATs' clamp; keeps the denominator positive
MAX_SHIFT = 40.0  # e^40 times the largest linear sum stays far below fp32's limit
GATE_LIMIT = 12.0  # e^12: a gate can single out a key among 100 000, and the fp32 state cannot overflow
PURE_TILE = 64  # tile size when there is no window
LENGTH_COPIES = 16  # programs of one decode launch that may share a state head


class LinearState(NamedTuple):
    """Everything decode needs; constant size in T, and a decode step changes it in place.

    Nothing that one program of a decode launch reads is written by another: the ring has one slot more than the window has keys, so the key of
    this step never lands on one that is leaving the window; z has two slots used in turns; and every program counts tokens for itself.

    Attributes:
        k: [B, G, R, D] ring of keys, R = `ring_size`; the key at position p of the document is in slot p % R. Slots not yet used hold junk.
        v: [B, G, R, D].
        sink_k: [B, G, A, D] keys of the document's first A tokens; junk beyond `length`.
        sink_v: [B, G, A, D].
        kv: [B, Gs, F, D] fp32, sum of phi(k) v^T over the linear set; Gs = G, or H with a key map per query head.
        z: [B, Gs, 2, F] fp32, sum of phi(k), in slot `normalizer_slot`; the other slot is junk.
        lengths: [B, Gs, LENGTH_COPIES] int64, tokens of the current document seen so far (padding not counted), the same number in a whole row.
    """

    k: Tensor
    v: Tensor
    sink_k: Tensor
    sink_v: Tensor
    kv: Tensor
    z: Tensor
    lengths: Tensor

    @property
    def length(self) -> Tensor:
        """[B] int64, tokens of the current document seen so far."""
        return self.lengths[:, 0, 0]


class LinearOutput(NamedTuple):
    """output [B, T, H, D] in q's dtype; final_state is None unless asked for."""

    output: Tensor
    final_state: LinearState | None


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 when the caller checks against fp64."""
    return x if x.dtype == torch.float64 else x.float()


def feature_map(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """Hedgehog features, softmax over each half separately, with an optional learned norm.

        phi(x) = max([e^g+ softmax(xW), e^g- softmax(-xW)], 1e-12),    g+- = x.u / sqrt(D) + a log mean_f exp(+-xW)_f

    Without a gate g = 0 (the published map): every key then weighs about the same. a = 1, u = 0 gives exp(+-xW) / (F/2), whose product
    can be as sharp as exp(q.k).

    Args:
        x: [B, heads, T, D].
        weight: W, [heads, D, F/2].
        gate: [heads, D + 1], u and then a; None = no gate. g is held within +-GATE_LIMIT.

    Returns:
        [B, heads, T, F] fp32.
    """
    x = _wide(x)
    y = x @ weight.to(x.dtype)
    halves = [y, -y]
    if gate is None:
        return torch.cat([half.softmax(-1) for half in halves], -1).clamp_min(FEATURE_FLOOR)
    gate = gate.to(x.dtype)
    direction, power = gate[:, None, :-1], gate[:, None, -1:]
    projected = (x * direction).sum(-1, keepdim=True) * x.shape[-1] ** -0.5
    features = []
    for half in halves:
        log_mean = half.logsumexp(-1, keepdim=True) - math.log(half.shape[-1])
        exponent = (projected + power * log_mean).clamp(-GATE_LIMIT, GATE_LIMIT)
        features.append(half.softmax(-1) * torch.exp(exponent))
    return torch.cat(features, -1).clamp_min(FEATURE_FLOOR)


def window_start(position: Tensor, window_size: int, kind: str) -> Tensor:
    """lo(p): first position inside the window of a query at `position`; same shape and dtype."""
    if window_size == 0:
        return position + 1
    if kind == "sliding":
        return (position - window_size + 1).clamp_min(0)
    return ((position // window_size - 1) * window_size).clamp_min(0)


def num_back_chunks(window_size: int, kind: str, aligned: bool) -> int:
    """Chunks before its own that a tile must see; `aligned`: every document starts at a multiple of C, counted from the first query."""
    if window_size == 0:
        return 0
    return 1 if kind == "sliding" or aligned else 2


def ring_size(window_size: int, kind: str) -> int:
    """R, slots of the key ring: what the window and the newest query can need, and one more."""
    return 0 if window_size == 0 else num_back_chunks(window_size, kind, aligned=False) * window_size + 1


def normalizer_slot(length: Tensor, window_size: int, kind: str) -> Tensor:
    """Slot of `LinearState.z` that is valid after `length` tokens: it changes whenever keys leave the window. Same shape and dtype."""
    left = torch.where(length > 0, window_start(length - 1, window_size, kind), 0)
    return (left // window_size if kind == "block" and window_size else left) % 2


def normalizer(state: LinearState, window_size: int, kind: str) -> Tensor:
    """z, [B, Gs, F]."""
    slot = normalizer_slot(state.length, window_size, kind)
    return torch.where((slot == 0)[:, None, None], state.z[:, :, 0], state.z[:, :, 1])


def last_keys(ring: Tensor, length: Tensor, num_keys: int) -> Tensor:
    """The last `num_keys` of a ring [B, G, R, D] in order of position, right-aligned [B, G, num_keys, D]; junk on the left of rows that have fewer."""
    slot = (length[:, None] + torch.arange(-num_keys, 0, device=ring.device)) % ring.shape[2]
    return ring.gather(2, slot[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))


def empty_state(q: Tensor, k: Tensor, *, num_sinks: int, window_size: int, kind: str, num_features: int, state_heads: int) -> LinearState:
    """The state before the first token. q, k: [B, T, H or G, D], for batch size, dtype and device only."""
    B, _, G, D = k.shape
    keys, sinks = k.new_zeros(B, G, ring_size(window_size, kind), D), k.new_zeros(B, G, num_sinks, D)
    kv = k.new_zeros(B, state_heads, num_features, D, dtype=torch.promote_types(k.dtype, torch.float32))
    lengths = torch.zeros(B, state_heads, LENGTH_COPIES, dtype=torch.int64, device=k.device)
    return LinearState(keys, keys.clone(), sinks, sinks.clone(), kv, kv.new_zeros(B, state_heads, 2, num_features), lengths)


def _segmented_scan(delta: Tensor, keep: Tensor, first: Tensor) -> Tensor:
    """Exclusive scan over tiles: S_0 = first, S_{n+1} = keep_n S_n + delta_n.

    Args:
        delta: [B, heads, N, ...]. keep: [B, N] 0 or 1 (0 where a document starts in the chunk). first: [B, heads, ...].

    Returns:
        [B, heads, N, ...], the state each tile reads.
    """
    # Doubling: after the step with shift s, `delta` and `keep` cover the last 2s tiles. log2(N) steps, no loop over tiles, and autograd
    # keeps only the small `keep` factors.
    shift, num_tiles = 1, delta.shape[2]
    extra = delta.dim() - 3
    while shift < num_tiles:
        weight = keep.view(keep.shape[0], 1, num_tiles, *[1] * extra)
        delta = delta + weight * torch.nn.functional.pad(delta[:, :, :-shift], (*[0, 0] * extra, shift, 0))
        keep = keep * torch.nn.functional.pad(keep[:, :-shift], (shift, 0), value=1.0)
        shift *= 2
    first = first[:, :, None]
    carried = delta[:, :, :-1] + keep[:, :-1].view(keep.shape[0], 1, num_tiles - 1, *[1] * extra) * first
    return torch.cat([first, carried], 2)


def _largest(logits: Tensor) -> Tensor:
    """Largest finite value of each row [..., 1], 0 without one; the gradient goes to one element.

    Not amax's own gradient, which divides by the number of ties: compiled by torch 2.11 for an H100 it gave non-finite gradients in the
    second step of a finetuning run that was finite uncompiled.
    """
    slots = torch.arange(logits.shape[-1], device=logits.device)
    first = (slots == logits.detach().argmax(-1, keepdim=True)) & (logits > float("-inf"))
    return torch.where(first, logits, 0.0).sum(-1, keepdim=True)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    window_kind: str,
    num_sinks: int,
    scale: float,
    query_map: Tensor | None,
    key_map: Tensor | None,
    linear_log_weight: Tensor,
    query_gate: Tensor | None = None,
    key_gate: Tensor | None = None,
    reference: str = "absolute",
    start: Tensor | None = None,
    aligned: bool = False,
    initial_state: LinearState | None = None,
    output_final_state: bool = False,
) -> LinearOutput:
    """Softmax over window and sinks plus Hedgehog linear attention over the rest, one normaliser.

    Args:
        q: [B, T, H, D], after RoPE and q/k norm. k, v: [B, T, G, D].
        window_size: C. window_kind: `block` or `sliding`. num_sinks: A.
        scale: factor on q.k in the softmax branch (the feature maps see q and k unscaled).
        query_map: [H, D, F/2]; None = no linear branch, keys outside window and sinks are dropped.
        key_map: [G, D, F/2] or [H, D, F/2].
        query_gate: [H, D + 1] or None. key_gate: as key_map's heads, [G or H, D + 1], or None.
        reference: `absolute` or `window_max`.
        linear_log_weight: l, broadcastable to [B, H, T] (a weight per head is [H, 1]).
        start: [B, T] int64, index of the first token of each token's document, in tokens of this call (negative: before it, only
            together with `initial_state`); must not decrease along T. A padding token before the document gets the document's
            start (greater than its own index) and attends nothing: its output is 0. None = all rows start at token 0, or
            continue `initial_state`.
        aligned: promise that every document in `start` starts at a multiple of C; a block window then needs a third less work and no
            second look at keys that left it. Ignored with `initial_state`.
        initial_state: what an earlier call returned.

    Returns:
        LinearOutput; everything is computed in fp32 and cast back.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _linear_attention(
            q,
            k,
            v,
            window_size,
            window_kind,
            num_sinks,
            scale,
            query_map,
            key_map,
            linear_log_weight,
            query_gate,
            key_gate,
            reference,
            start,
            aligned,
            initial_state,
            output_final_state,
        )


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: int, kind: str, num_sinks: int, scale: float, query_map: Tensor | None, key_map: Tensor | None,
    linear_log_weight: Tensor, query_gate: Tensor | None, key_gate: Tensor | None, reference: str, start: Tensor | None, aligned: bool, state: LinearState | None, output_final_state: bool,
) -> LinearOutput:  # fmt: skip
    B, T, H, D = q.shape
    G, A = k.shape[2], num_sinks
    device = q.device
    aligned = state is None and (start is None or aligned)
    if state is None and output_final_state:
        features = 0 if query_map is None else 2 * query_map.shape[-1]
        state_heads = G if key_map is None else key_map.shape[0]
        state = empty_state(q, k, num_sinks=A, window_size=window_size, kind=kind, num_features=features, state_heads=state_heads)
    if start is None:
        start = torch.zeros(B, T, dtype=torch.int64, device=device) if state is None else -state.length[:, None].expand(B, T)
    elif state is not None:  # tokens before a new document in this call belong to the one the state carries
        start = torch.where(start <= 0, -state.length[:, None], start)

    C = window_size or PURE_TILE
    nb = num_back_chunks(window_size, kind, aligned)
    N = -(-T // C)
    P, pad = nb * C, N * C - T

    # keys with their prefix: index i counts from the first prefix key; queries sit at P .. P+T-1
    def with_prefix(x: Tensor, prefix: Tensor | None) -> Tensor:
        x = x.transpose(1, 2)
        if state is None or prefix is None or P == 0:
            parts = [x.new_zeros(B, G, P, D), x]
        else:
            parts = [last_keys(prefix, state.length, P).to(x.dtype), x]
        return torch.cat([*parts, x.new_zeros(B, G, pad, D)], 2)

    keys, values = with_prefix(k, state.k if state else None), with_prefix(v, state.v if state else None)
    start = start + P
    length = start.new_zeros(B) if state is None else state.length
    prefix_start = (P - length)[:, None]
    starts = torch.cat([prefix_start.expand(B, P), start, start[:, -1:].expand(B, pad)], 1)  # [B, P+N*C]
    fold = prefix_start + window_start((length - 1).clamp_min(0)[:, None], window_size, kind) if window_size else prefix_start + length[:, None]
    fold = torch.where(length[:, None] > 0, fold, prefix_start)  # keys below are in the incoming state already

    if key_map is not None and key_map.shape[0] != G:  # LoLCATs' layout: a key map and a state per query head
        keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
    Gs = keys.shape[1]
    r = H // Gs
    keys, values = _wide(keys), _wide(values)

    base = torch.arange(N, device=device)[None, :, None] * C  # first key index of each tile
    start_rel = starts[:, P:].view(B, N, C) - base  # document start of each query, relative to its tile's keys
    slot = torch.arange((nb + 1) * C, device=device)
    row = torch.arange(C, device=device) + nb * C
    lo = start_rel + window_start((row - start_rel), window_size, kind)
    visible = (slot <= row[:, None]) & (slot >= start_rel[..., None])  # [B, N, C, M]
    in_softmax = visible & ((slot >= lo[..., None]) | (slot < start_rel[..., None] + A))

    def tiles(x: Tensor) -> Tensor:  # [B, heads, P+N*C, d] -> [B, heads, N, M, d]
        chunks = x.unflatten(2, (N + nb, C))
        return torch.cat([chunks[:, :, j : j + N] for j in range(nb + 1)], 3)

    def grouped(x: Tensor) -> Tensor:  # [B, H, T, d] -> [B, Gs, N, r*C, d]: the rows of a KV group share one matmul
        x = torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(1, (Gs, r)).unflatten(3, (N, C))
        return x.transpose(2, 3).flatten(3, 4)

    def per_row(mask: Tensor) -> Tensor:  # [B, N, C, m] -> broadcastable to [B, Gs, N, r*C, m]
        return mask.repeat(1, 1, r, 1).unsqueeze(1)

    q_heads = _wide(q.transpose(1, 2))
    q_rows, tile_keys, tile_values = grouped(q_heads) * scale, tiles(keys), tiles(values)
    logits = (q_rows @ tile_keys.transpose(-1, -2)).masked_fill(~per_row(in_softmax), float("-inf"))
    sink_values: Tensor | None = None
    if A:
        # sinks that lie before the tile's keys: of the one document that reaches back that far, the first query's
        first = starts[:, P : P + N * C : C]  # [B, N]
        index = first[..., None] + torch.arange(A, device=device)
        cached = index < 0
        source = torch.where(cached, torch.arange(A, device=device), (index + A).clamp(max=A + keys.shape[2] - 1)).flatten(1)

        def gather(x: Tensor, sink: Tensor | None) -> Tensor:  # -> [B, Gs, N, A, D]
            sink = x.new_zeros(B, Gs, A, D) if sink is None else _wide(sink).repeat_interleave(Gs // sink.shape[1], 1)
            found: Tensor = torch.cat([sink, x], 2).gather(2, source[:, None, :, None].expand(B, Gs, N * A, D)).unflatten(2, (N, A))
            return found

        sink_keys, sink_values = gather(keys, state.sink_k if state else None), gather(values, state.sink_v if state else None)
        reach = start_rel[..., None] + torch.arange(A, device=device) < 0  # [B, N, C, A]
        sink_logits = (q_rows @ sink_keys.transpose(-1, -2)).masked_fill(~per_row(reach), float("-inf"))
        logits = torch.cat([sink_logits, logits], -1)
    # Only a common factor that cancels in the quotient, so no gradient.
    row_max = logits.detach().amax(-1, keepdim=True)
    if reference == "absolute":
        # e^-shift times the linear sum must not overflow where all logits are very negative, nor the denominator vanish where there is
        # nothing but the softmax branch.
        has_linear = per_row((lo - start_rel > A)[..., None]) & (query_map is not None)
        row_max = torch.where(has_linear, row_max.clamp_min(-MAX_SHIFT), row_max)
    row_max = torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)  # padding rows, and pure rows without sinks
    weights = torch.exp(logits - row_max)
    denominator = weights.sum(-1, keepdim=True)
    if sink_values is None:
        numerator = weights @ tile_values
    else:
        numerator = weights[..., :A] @ sink_values + weights[..., A:] @ tile_values

    final_kv = final_z = None
    if query_map is not None:
        assert key_map is not None
        phi_q = grouped(feature_map(q_heads, query_map, query_gate) * torch.exp(linear_log_weight.to(q_heads.dtype))[..., None])
        if reference == "absolute":
            phi_q = phi_q * torch.exp(-row_max.clamp_min(-MAX_SHIFT))  # the bound acts only on rows without a linear part
        else:
            phi_q = phi_q * torch.exp(_largest(logits) - row_max)  # a factor 1 that carries the gradient of c_n
        phi_k = feature_map(keys, key_map, key_gate)
        index = torch.arange(P + N * C, device=device)
        chunk_last = starts.view(B, N + nb, C)[:, :, -1:]  # start of the document that covers each chunk's last key
        foldable = (index >= fold).view(B, N + nb, C) & (index.view(1, N + nb, C) >= chunk_last + A)
        chunk_k, chunk_v = phi_k.unflatten(2, (N + nb, C)), values.unflatten(2, (N + nb, C))
        folded_k = chunk_k[:, :, :N] * foldable[:, None, :N, :, None]
        keep = (chunk_last[:, :N, 0] < index[: N * C : C]).to(phi_k.dtype)
        delta_kv, delta_z = folded_k.transpose(-1, -2) @ chunk_v[:, :, :N], folded_k.sum(3)
        first_kv = delta_kv.new_zeros(B, Gs, phi_k.shape[-1], D) if state is None else state.kv
        first_z = delta_z.new_zeros(B, Gs, phi_k.shape[-1]) if state is None else normalizer(state, window_size, kind)
        kv, z = _segmented_scan(delta_kv, keep, first_kv), _segmented_scan(delta_z, keep, first_z)
        phi_q_state = phi_q * per_row((start_rel < 0)[..., None])
        numerator = numerator + phi_q_state @ kv
        denominator = denominator + phi_q_state @ z[..., None]
        if not (aligned and kind == "block" and window_size):  # keys inside the tile's M that have left the window
            in_linear = visible & (slot < lo[..., None]) & (slot >= start_rel[..., None] + A) & (slot + base[..., None] >= fold[:, None, None])
            scores = (phi_q @ tiles(phi_k).transpose(-1, -2)) * per_row(in_linear)
            numerator = numerator + scores @ tile_values
            denominator = denominator + scores.sum(-1, keepdim=True)
        if output_final_state:
            final_kv, final_z = _final_state(kv[:, :, -1], z[:, :, -1], phi_k, values, starts, fold, P, T, N, C, A, window_size, kind)

    out = numerator / torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    out = out.unflatten(3, (r, C)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :T]  # [B, H, T, D]
    out = out.transpose(1, 2).to(q.dtype)
    if not output_final_state:
        return LinearOutput(out, None)
    assert state is not None
    return LinearOutput(out, _next_state(state, k, v, starts[:, P + T - 1] - P, final_kv, final_z))


def _final_state(
    kv: Tensor, z: Tensor, phi_k: Tensor, values: Tensor, starts: Tensor, fold: Tensor, P: int, T: int, N: int, C: int, A: int, window_size: int, kind: str
) -> tuple[Tensor, Tensor]:
    """State after the last token: the last tile's state plus the keys that have left the last query's window.

    kv: [B, Gs, F, D], z: [B, Gs, F], phi_k: [B, Gs, P+N*C, F], values: [B, Gs, P+N*C, D], starts: [B, P+N*C], fold: [B, 1].
    """
    tail = (N - 1) * C  # first key the last tile sees
    last = P + T - 1
    doc = starts[:, last, None]  # [B, 1]
    index = torch.arange(tail, P + T, device=kv.device)[None]
    fold_end = doc + window_start(last - doc, window_size, kind)
    leaves = ((index >= doc + A) & (index >= fold) & (index < fold_end)).to(kv.dtype)
    keys = phi_k[:, :, tail : P + T] * leaves[:, None, :, None]
    carried = (doc < tail).to(kv.dtype)
    kv = kv * carried[:, :, None, None] + keys.transpose(-1, -2) @ values[:, :, tail : P + T]
    return kv, z * carried[:, :, None] + keys.sum(2)


def _next_state(state: LinearState, k: Tensor, v: Tensor, doc: Tensor, kv: Tensor | None, z: Tensor | None) -> LinearState:
    """New ring and sinks of the current document. k, v: [B, T, G, D]; doc: [B] start of the last token's document; kv, z: [B, Gs, F, D], [B, Gs, F]."""
    T = k.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    length = (T - doc).clamp_min(0)
    num_slots = state.k.shape[2]
    slot = torch.arange(num_slots, device=k.device)
    newest = length[:, None] - 1
    in_ring = newest - (newest - slot) % max(num_slots, 1)  # position each slot holds; below 0 in slots not yet used

    def refresh(old: Tensor, new: Tensor, position: Tensor) -> Tensor:
        if position.shape[-1] == 0:
            return old
        index = doc[:, None] + position  # token of this call; negative: seen before, and then it is in this slot already
        found = new.gather(2, index.clamp(0, T - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
        return torch.where((index < 0)[:, None, :, None], old, found.to(old.dtype))

    in_sinks = torch.arange(state.sink_k.shape[2], device=k.device).expand(k.shape[0], -1)
    return LinearState(
        refresh(state.k, k, in_ring),
        refresh(state.v, v, in_ring),
        refresh(state.sink_k, k, in_sinks),
        refresh(state.sink_v, v, in_sinks),
        state.kv if kv is None else kv,
        state.z if z is None else torch.stack([z, z], 2),
        length[:, None, None].expand_as(state.lengths).contiguous(),
    )


def _state_of_whole_rows(k: Tensor, v: Tensor, num_slots: int, num_sinks: int, kv: Tensor, z: Tensor) -> LinearState:
    """`_next_state` of rows that begin with this call and have no padding: every position is known without asking the device, and a fifth of the operations do.

    Args: k, v: [B, T, G, D]. num_slots: `ring_size`. kv, z: [B, Gs, F, D], [B, Gs, F].
    """
    B, T, _, _ = k.shape

    def ring_and_sinks(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(1, 2)
        ring = torch.nn.functional.pad(x, (0, 0, 0, num_slots - T)) if num_slots > T else x[:, :, T - num_slots :].roll(T % max(num_slots, 1), 2)
        sinks = torch.nn.functional.pad(x, (0, 0, 0, num_sinks - T)) if num_sinks > T else x[:, :, :num_sinks].clone()
        return ring.contiguous(), sinks.contiguous()

    (ring_k, sink_k), (ring_v, sink_v) = ring_and_sinks(k), ring_and_sinks(v)
    lengths = torch.full((B, z.shape[1], LENGTH_COPIES), T, dtype=torch.int64, device=k.device)
    return LinearState(ring_k, ring_v, sink_k, sink_v, kv, torch.stack([z, z], 2), lengths)


def attention_weight_loss(
    q: Tensor, k: Tensor, *, window_size: int, window_kind: str, num_sinks: int, scale: float, query_map: Tensor | None, key_map: Tensor | None, linear_log_weight: Tensor,
    query_gate: Tensor | None = None, key_gate: Tensor | None = None, reference: str = "absolute", start: Tensor | None = None, chunk_size: int = 128,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the operator's attention weights against softmax attention's (Hedgehog, arXiv 2402.04347), without a T x T tensor.

    Query chunks are recomputed in the backward pass, so memory is chunk_size x T; time stays quadratic, as the teacher's weights are.

    Args: as `linear_attention`.

    Returns:
        Scalar: -sum_i a_ni log p_ni, mean over batch, heads and tokens that are not padding.
    """
    if query_map is None or key_map is None:
        raise ValueError("the attention-weight loss needs the linear branch: without it the weights of keys outside the window are zero by construction")
    with torch.autocast(q.device.type, enabled=False):
        B, T, H, _ = q.shape
        start = torch.zeros(B, T, dtype=torch.int64, device=q.device) if start is None else start
        q_heads = _wide(q.transpose(1, 2))
        keys = _wide(k.transpose(1, 2))
        phi_k = feature_map(keys.repeat_interleave(key_map.shape[0] // keys.shape[1], 1), key_map, key_gate).repeat_interleave(H // key_map.shape[0], 1)
        phi_q = feature_map(q_heads, query_map, query_gate)
        keys = keys.repeat_interleave(H // keys.shape[1], 1)
        log_weight = linear_log_weight.to(q_heads.dtype).expand(B, H, T)
        total = q_heads.new_zeros(())
        for at in range(0, T, chunk_size):
            rows = slice(at, min(T, at + chunk_size))
            stop = rows.stop
            total = total + torch.utils.checkpoint.checkpoint(
                _weight_loss_chunk, q_heads[:, :, rows], keys[:, :, :stop], phi_q[:, :, rows], phi_k[:, :, :stop], log_weight[:, :, rows], start[:, rows], at, window_size, window_kind,
                num_sinks, scale, reference, use_reentrant=False,
            )  # fmt: skip
        num_valid = (start <= torch.arange(T, device=q.device)).sum()
        return total / (num_valid * H).clamp_min(1)


def branch_log_ratio(
    q: Tensor, k: Tensor, *, window_size: int, window_kind: str, num_sinks: int, scale: float, query_map: Tensor, key_map: Tensor,
    query_gate: Tensor | None = None, key_gate: Tensor | None = None, reference: str = "absolute", start: Tensor | None = None, num_queries: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log of the softmax mass on the linear set per unit of phi_q.phi_k, weighted by how much the teacher looks there.

    As linear_log_weight it lets the two branches weigh against each other as in the teacher.

        sum_n w_n [log sum_P exp(s_ni - c_n) - log sum_P phi_q.phi_k],    w_n = the teacher's weight on P_n (a query that ignores P tells nothing)

    Args: as `linear_attention`. num_queries: queries per row, evenly spread over it; memory is num_queries x T.

    Returns:
        (weighted sum, sum of w), both [H]; their quotient is the estimate, over as many batches as one likes.
    """
    B, T, H, _ = q.shape
    start = torch.zeros(B, T, dtype=torch.int64, device=q.device) if start is None else start
    n = torch.linspace(0, T - 1, min(T, num_queries), device=q.device).round().long()
    i = torch.arange(T, device=q.device)
    q_heads, keys = _wide(q[:, n].transpose(1, 2)), _wide(k.transpose(1, 2))
    phi_k = feature_map(keys.repeat_interleave(key_map.shape[0] // keys.shape[1], 1), key_map, key_gate)
    phi_k, keys = (x.repeat_interleave(H // x.shape[1], 1) for x in (phi_k, keys))
    doc = start[:, n, None]
    lo = doc + window_start(n[:, None] - doc, window_size, window_kind)
    visible = (i <= n[:, None]) & (i >= doc)
    exact = visible & ((i >= lo) | (i < doc + num_sinks))
    visible, exact, linear = visible[:, None], exact[:, None], (visible & ~exact)[:, None]
    logits = q_heads @ keys.transpose(-1, -2) * scale
    far = logits.masked_fill(~linear, float("-inf")).logsumexp(-1)  # [B, H, num_queries]
    share = torch.exp(far - logits.masked_fill(~visible, float("-inf")).logsumexp(-1))
    phi = ((feature_map(q_heads, query_map, query_gate) @ phi_k.transpose(-1, -2)) * linear).sum(-1)
    ratio = far - torch.log(phi)
    if reference == "window_max":
        ratio = ratio - logits.masked_fill(~exact, float("-inf")).amax(-1)
    # Rows without a linear set (-inf - -inf), padding, and window_max without anything exact.
    known = linear.any(-1) & torch.isfinite(ratio)
    weight = torch.where(known, share, 0.0)
    return torch.where(known, ratio * share, 0.0).sum((0, 2)), weight.sum((0, 2))


def _weight_loss_chunk(
    q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, log_weight: Tensor, start: Tensor, first_row: int, window_size: int, window_kind: str, num_sinks: int, scale: float, reference: str,
) -> Tensor:  # fmt: skip
    """Sum of the cross-entropies of one query chunk. q [B, H, C, D], k [B, H, S, D], phi_* alike with F, log_weight [B, H, C], start [B, C]."""
    n = torch.arange(first_row, first_row + q.shape[2], device=q.device)
    i = torch.arange(k.shape[2], device=q.device)
    doc = start[..., None]
    lo = doc + window_start(n[:, None] - doc, window_size, window_kind)
    visible = (i <= n[:, None]) & (i >= doc)
    exact = (visible & ((i >= lo) | (i < doc + num_sinks)))[:, None]
    visible = visible[:, None]
    logits = q @ k.transpose(-1, -2) * scale
    teacher = logits.detach().masked_fill(~visible, float("-inf")).softmax(-1)
    if reference == "window_max":
        row_max = logits.masked_fill(~exact, float("-inf")).amax(-1, keepdim=True)
        logits = logits - torch.where(row_max == float("-inf"), torch.zeros_like(row_max), row_max)
    linear = torch.log(phi_q @ phi_k.transpose(-1, -2)) + log_weight[..., None]
    log_p = torch.where(exact, logits, linear).masked_fill(~visible, float("-inf")).log_softmax(-1)
    # padding rows see nothing: both softmaxes are NaN there and must not reach the sum
    real = visible.any(-1, keepdim=True) & visible
    return -(torch.where(real, teacher, 0) * torch.where(real, log_p, 0)).sum()
