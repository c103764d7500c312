"""Readable PyTorch form of attention spans (MoA, https://arxiv.org/abs/2406.14909): the definition, linear in T in memory.

Shapes: B batch, T query tokens, H query heads, G key-value heads, R = H / G, D head_dim, S key slots, A sinks.

Every KV head has a rule (alpha, beta). Positions count from the first token of a document; the query at position n sees key i <= n if

    i < A   or   i > n - window(n),    window(n) = max(least, alpha + ((n + 1) beta >> 16))

alpha is in tokens and may be negative, beta is a fraction times `BETA_ONE`, from 0 (a fixed window) to BETA_ONE (with alpha = 0: dense
attention), `least` >= 1 is the window of the first tokens of a document, where a share of the context would be next to nothing. The window grows with the query's own position, not with the length of the input, so training, prefill in pieces and decode agree.
Its lower edge n + 1 - window(n) never moves back: a key that has left is never needed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.softmax import QUERY_CHUNK, masked_attention, recomputed
from attnconvert.kernels.span.slots import window_at

BETA_ONE = 65536  # beta = 1; integers, so that every device and every language finds the same window


def window(position: Tensor, alpha: Tensor, beta: Tensor, least: Tensor | int = 1) -> Tensor:
    """Keys that a query at `position` sees before and including itself, sinks not counted: int64, at least 1; may be more than there are.

    Args:
        position: 0-based position of the query in its document.
        alpha: tokens. beta: 0 to BETA_ONE. least: tokens, 1 or more. All four integers that broadcast against each other.
    """
    grown = alpha.long() + ((position.long() + 1) * beta.long() >> 16)
    return grown.clamp_min(least) if isinstance(least, int) else grown.maximum(least.long())


def visible(query_position: Tensor, key_position: Tensor, alpha: Tensor, beta: Tensor, num_sinks: int, least: Tensor | int = 1) -> Tensor:
    """Which queries see which keys: bool, of the shape that all arguments broadcast to. Positions are int64; a negative one is no key's."""
    recent = key_position > query_position - window(query_position, alpha, beta, least)
    return (key_position >= 0) & (key_position <= query_position) & (recent | (key_position < num_sinks))


def _chunk(q: Tensor, k: Tensor, v: Tensor, first: int, rule: tuple[int, int, int], num_sinks: int, scale: float, start: Tensor | None) -> Tensor:
    """Outputs of the queries q [B, C, H, D] that begin at index `first`, for heads with one rule (alpha, beta, least); k, v: [B, T, G, D]."""
    T, stop = k.shape[1], first + q.shape[1]
    index = torch.arange(T, device=q.device)
    # Edges never move back, and no edge of a document that starts later is lower.
    alpha, beta, least = (torch.tensor(number, device=q.device) for number in rule)
    low = max(0, first + 1 - window_at(first, *rule))
    # Keys before `low` are the sinks of the document of the chunk's first token: others begin inside of the chunk.
    num_far = min(num_sinks, low)
    keys, values = k[:, low:stop], v[:, low:stop]
    query, key = index[None, first:stop, None], index[None, low:stop]
    if start is None:
        if num_far:
            key = torch.cat([index[None, :num_far], key], 1)
            keys, values = (torch.cat([x[:, :num_far], near], 1) for x, near in ((k, keys), (v, values)))
        key = key[:, None]
    else:
        # a token before its document (padding) is a document of its own: it sees itself
        begin = torch.minimum(start[:, first:stop].long(), index[first:stop])[:, :, None]
        key = key.expand(q.shape[0], -1)
        if num_far:
            far = begin[:, 0] + index[:num_far]
            taken = far.clamp_max(T - 1)[:, :, None, None].expand(-1, -1, *k.shape[2:])
            keys, values = (torch.cat([x.gather(1, taken), near], 1) for x, near in ((k, keys), (v, values)))
            key = torch.cat([torch.where(far < low, far, -1), key], 1)  # a sink at or after `low` is there already
        query, key = query - begin, key[:, None] - begin
    mask = visible(query, key, alpha, beta, num_sinks, least)
    return masked_attention(q, keys, values, mask[:, None], scale)


def _one_rule(q: Tensor, k: Tensor, v: Tensor, rule: tuple[int, int, int], num_sinks: int, scale: float, start: Tensor | None) -> Tensor:
    """`span_attention` of heads with one rule."""
    chunks = [recomputed(_chunk, rows, k, v, at * QUERY_CHUNK, rule, num_sinks, scale, start) for at, rows in enumerate(q.split(QUERY_CHUNK, 1))]
    return torch.cat(chunks, 1)


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, *, alpha: Tensor, beta: Tensor, num_sinks: int, scale: float, least: Tensor | None = None, start: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Attention of whole sequences, with gradients for q, k and v. Reads the rules on the host.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], H a multiple of G.
        alpha, beta, least: [G] integers, one rule per KV head, see `window`; no least is 1.
        num_sinks: A, first tokens of a document that all of its queries see.
        start: [B, T] index of the first token of each token's document; None = no padding and no packing. The output of a padding token
            (start > its own index) is finite and means nothing.

    Returns:
        [B, T, H, D] in q's dtype; sums are fp32, or fp64 for fp64.
    """
    H, G = q.shape[2], k.shape[2]
    rules: dict[tuple[int, int, int], list[int]] = {}
    for head, rule in enumerate(zip(alpha.tolist(), beta.tolist(), [1] * G if least is None else least.tolist(), strict=True)):
        rules.setdefault(rule, []).append(head)
    with torch.autocast(q.device.type, enabled=False):
        if len(rules) == 1:
            return _one_rule(q, k, v, next(iter(rules)), num_sinks, scale, start)
        grouped = q.unflatten(2, (G, H // G))
        outputs, order = [], []
        for rule, heads in rules.items():
            out = _one_rule(grouped[:, :, heads].flatten(2, 3), k[:, :, heads], v[:, :, heads], rule, num_sinks, scale, start)
            outputs.append(out.unflatten(2, (len(heads), H // G)))
            order += heads
        back = sorted(range(G), key=order.__getitem__)
        return torch.cat(outputs, 2)[:, :, back].flatten(2, 3)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, query_position: Tensor, key_position: Tensor, alpha: Tensor, beta: Tensor, num_sinks: int, scale: float,
    least: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention with a position told for every query and every key: what a cached step of any number of tokens means.

    Args:
        q: [B, T, H, D].
        k, v: [B, G, S, D] slots in any order; what an empty slot holds must be finite.
        query_position: [B, T] positions in the document. key_position: [B, G, S], -1 for an empty slot; int64.
        alpha, beta, num_sinks, least: as `span_attention`.

    Returns:
        [B, T, H, D] in q's dtype. A query that sees no key (padding) gets something finite.
    """
    R = q.shape[2] // k.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    alpha, beta, least = (x[:, None, None] for x in (alpha, beta, torch.ones_like(alpha) if least is None else least))
    chunks = []
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, q.shape[1], QUERY_CHUNK):
            rows = slice(first, first + QUERY_CHUNK)
            mask = visible(query_position[:, None, rows, None], key_position[:, :, None], alpha, beta, num_sinks, least)
            mask = mask | ~mask.any(-1, keepdim=True)
            chunks.append(recomputed(masked_attention, q[:, rows], k, v, mask.repeat_interleave(R, 1), scale))
    return torch.cat(chunks, 1)
