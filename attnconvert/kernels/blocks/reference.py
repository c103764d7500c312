"""Readable PyTorch form of block-sparse attention (InfLLM-V2, https://arxiv.org/abs/2509.24663): the definition, linear in T in memory.

Shapes: B batch, T query tokens, H query heads, G key-value heads, R = H / G, D head_dim, S block size, N blocks.

Which blocks the query at position n of a document sees is decided for all R query heads of a KV head together (`rule.BlockRule` has the numbers):

1. Fine keys are means of `kernel` neighbouring keys, `stride` apart; coarse keys are means of `coarser` times as many. A query sees those whose tokens all lie at
   n or before.
2. weight(h, j) = exp(scale q_h . fine_j - L_h), L_h the log-sum-exp of scale q_h . coarse_i: nearly a softmax, for a quarter of the cost of its denominator. Without
   a coarse key it is 0.
3. The score of block b is the largest of the heads' sums of weights over the fine keys that begin in it, and the one before where fine keys overlap; 0 without any.
4. The query sees the first `num_init` blocks, its own, the `num_local` before that, and those of the other past blocks that have the best scores, earlier ones first
   where scores are equal, until it sees `num_blocks`; all blocks while n + 1 < `dense_len`. Inside of its own block it sees the keys up to itself.

The switch at `dense_len` follows the query's own position, not the length of the input, so training, prefill, prefill in pieces and decode agree.
Nothing is learned, and no gradient goes through the choice of blocks.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from attnconvert.kernels.blocks.rule import BlockRule, num_windows
from attnconvert.kernels.softmax import QUERY_CHUNK, masked_attention, recomputed


def compress(k: Tensor, kernel: int, stride: int) -> Tensor:
    """Means of `kernel` neighbouring keys, `stride` apart, in k's dtype. k: [B, T, G, D] of documents that begin at 0 -> [B, n, G, D], windows that are whole.

    kernel is a multiple of stride.
    """
    count, pieces = num_windows(k.shape[1], kernel, stride), kernel // stride
    if count == 0:
        return k.new_zeros(k.shape[0], 0, *k.shape[2:])
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    # Sums of `stride` keys first, which neighbouring windows share: each key is read once.
    sums = k[:, : (count - 1) * stride + kernel].unflatten(1, (-1, stride)).sum(2, dtype=wide)
    total: Tensor = sums[:, :count]
    for piece in range(1, pieces):
        total = total + sums[:, piece : piece + count]
    return (total / kernel).to(k.dtype)


def compressed_keys(k: Tensor, rule: BlockRule) -> tuple[Tensor, Tensor]:
    """Fine and coarse keys of documents that begin at 0: [B, n, G, D] and [B, m, G, D]."""
    fine = compress(k, rule.kernel, rule.stride)
    return fine, fine if rule.coarser == 1 else compress(k, rule.kernel * rule.coarser, rule.stride * rule.coarser)


def _logits(q: Tensor, keys: Tensor, position: Tensor, kernel: int, stride: int, scale: float) -> Tensor:
    """[B, G, R, C, n] of q [B, C, H, D] and keys [B, n, G, D]; -inf for keys that reach beyond their query's position [B, C]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(wide).unflatten(2, (keys.shape[2], -1)).permute(0, 2, 3, 1, 4)
    logits = queries @ keys.to(wide).permute(0, 2, 3, 1)[:, :, None] * scale
    whole = (position + 1 - kernel) // stride + 1  # floor: 0 or less where there is none
    seen = torch.arange(keys.shape[1], device=q.device) < whole[:, None, None, :, None]
    masked: Tensor = logits.masked_fill(~seen, float("-inf"))
    return masked


def block_scores(q: Tensor, fine: Tensor, coarse: Tensor, position: Tensor, num_blocks: int, rule: BlockRule, scale: float) -> Tensor:
    """Scores of blocks, step 2 and 3 above.

    Args:
        q: [B, C, H, D].
        fine, coarse: [B, n, G, D] and [B, m, G, D] as `compressed_keys` gives them; what lies beyond a query's position may be anything finite.
        position: [B, C] int64 positions of the queries.
        num_blocks: N, at least as many as there are fine keys for.

    Returns:
        [B, G, C, N], fp32, or fp64 for fp64.
    """
    weights = _logits(q, fine, position, rule.kernel, rule.stride, scale)
    total = _logits(q, coarse, position, rule.kernel * rule.coarser, rule.stride * rule.coarser, scale).logsumexp(-1, keepdim=True)
    weights = torch.where(torch.isfinite(total), (weights - total).exp(), 0.0).sum(2)
    weights = torch.nn.functional.pad(weights, (rule.lead, num_blocks * rule.pool - weights.shape[-1]))
    return weights.unfold(-1, rule.pool + rule.lead, rule.pool).amax(-1)


def chosen_blocks(scores: Tensor, position: Tensor, rule: BlockRule) -> Tensor:
    """Which blocks queries see, step 4 above. scores: [B, G, C, N], position: [B, C] -> bool [B, G, C, N]."""
    block, own = torch.arange(scores.shape[-1], device=scores.device), (position // rule.block_size)[:, None, :, None]
    past = (block <= own).expand(scores.shape)
    forced = past & ((block < rule.num_init) | (block >= own - rule.num_local))
    free = past & ~forced
    order = scores.masked_fill(~free, -1.0).sort(dim=-1, descending=True, stable=True).indices  # stable: earlier blocks first
    rank = torch.empty_like(order).scatter_(-1, order, block.expand_as(order))
    best = free & (rank < rule.num_blocks - forced.sum(-1, keepdim=True))
    return forced | best | (past & (position + 1 < rule.dense_len)[:, None, :, None])


def select_blocks(q: Tensor, fine: Tensor, coarse: Tensor, position: Tensor, num_blocks: int, rule: BlockRule, scale: float) -> Tensor:
    """Which blocks queries see: bool [B, G, C, N]; arguments as `block_scores`."""
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return chosen_blocks(block_scores(q, fine, coarse, position, num_blocks, rule, scale), position, rule)


def attend(q: Tensor, k: Tensor, v: Tensor, fine: Tensor, coarse: Tensor, *, position: Tensor, rule: BlockRule, scale: float) -> Tensor:
    """Attention of queries at given positions to keys that lie in order of position: what a cached call of any number of tokens means.

    Args:
        q: [B, C, H, D].
        k, v: [B, L, G, D], position i in row i, those of the queries included; finite where there is no key yet.
        fine, coarse: of these keys, as `block_scores` takes them.
        position: [B, C] int64; negative for padding, whose output is finite and means nothing.

    Returns:
        [B, C, H, D] in q's dtype.
    """
    seen = select_blocks(q, fine, coarse, position, -(-k.shape[1] // rule.block_size), rule, scale)
    seen = seen.repeat_interleave(rule.block_size, -1)[..., : k.shape[1]]
    key = torch.arange(k.shape[1], device=q.device)
    seen = (seen & (key <= position[:, None, :, None])) | ((key == 0) & (position < 0)[:, None, :, None])
    with torch.autocast(q.device.type, enabled=False):
        return masked_attention(q, k, v, seen.repeat_interleave(q.shape[2] // k.shape[2], 1), scale)


def _chunk(q: Tensor, k: Tensor, v: Tensor, fine: Tensor, coarse: Tensor, first: int, rule: BlockRule, scale: float) -> Tensor:
    """Outputs of the queries q [B, C, H, D] that begin at position `first`."""
    stop = first + q.shape[1]
    position = torch.arange(first, stop, device=q.device).expand(q.shape[0], -1)
    parts = fine[:, : num_windows(stop, rule.kernel, rule.stride)], coarse[:, : num_windows(stop, rule.kernel * rule.coarser, rule.stride * rule.coarser)]
    return attend(q, k[:, :stop], v[:, :stop], *parts, position=position, rule=rule, scale=scale)


def _documents(q: Tensor, k: Tensor, v: Tensor, rule: BlockRule, scale: float) -> Tensor:
    """`block_sparse_attention` of rows that are a document each."""
    if rule.sees_all(q.shape[1]):
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2).to(q.dtype)
    with torch.no_grad():
        fine, coarse = compressed_keys(k, rule)
    chunks = [recomputed(_chunk, rows, k, v, fine, coarse, at * QUERY_CHUNK, rule, scale) for at, rows in enumerate(q.split(QUERY_CHUNK, 1))]
    return torch.cat(chunks, 1)


def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, *, rule: BlockRule, scale: float, start: Tensor | None = None) -> Tensor:
    """Attention of whole sequences, with gradients for q, k and v. Reads `start` on the host.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], H a multiple of G.
        rule: which blocks are seen.
        start: [B, T] index of the first token of each token's document; None = no padding and no packing. The output of a padding token
            (start > its own index) is finite and means nothing.

    Returns:
        [B, T, H, D] in q's dtype; sums are fp32, or fp64 for fp64.
    """
    with torch.autocast(q.device.type, enabled=False):
        if start is None:
            return _documents(q, k, v, rule, scale)
        rows = []
        for b, begins in enumerate(start.tolist()):
            edges = [0, *(i for i in range(1, len(begins)) if min(begins[i], i) != min(begins[i - 1], i - 1)), len(begins)]
            parts = [slice(first, stop) for first, stop in itertools.pairwise(edges)]
            rows.append(torch.cat([_documents(q[b : b + 1, own], k[b : b + 1, own], v[b : b + 1, own], rule, scale) for own in parts], 1))
        return torch.cat(rows)
