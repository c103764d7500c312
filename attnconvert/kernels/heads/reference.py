"""Readable PyTorch form of attention with routed heads (MoH, https://arxiv.org/abs/2410.11842): the definition.

Shapes: B batch, T tokens, H query heads, G key-value heads, U routed units, D head_dim.

A unit is what a token uses or leaves out: a KV head with the H / G query heads that share it (U = G), or a single query head (U = H). The output of a query head
of unit u at token t is

    gate(t, u) softmax(scale q_t k)_i v_i    if the token uses the unit, else 0

over the keys i at t or before in the token's document, in an encoder over all of its document. All keys take part: what a token leaves out is its own queries, and later tokens may still read its
keys. So work is saved in proportion to the queries that are left out, and a cache holds all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnconvert.kernels.softmax import QUERY_CHUNK, masked_attention, recomputed


def _chunk(q: Tensor, k: Tensor, v: Tensor, first: int, scale: float, start: Tensor | None, causal: bool) -> Tensor:
    """Outputs, all heads used, of the queries q [B, C, H, D] that begin at index `first`."""
    stop = first + q.shape[1]
    last = stop if causal else k.shape[1]
    n, i = torch.arange(first, stop, device=q.device)[:, None], torch.arange(last, device=q.device)
    seen = ((i <= n) if causal else torch.ones(len(n), last, dtype=torch.bool, device=q.device))[None]
    if start is not None:  # a token before its document (padding) is a document of its own
        begin = torch.minimum(start[:, :last].long(), i)
        seen = seen & (i >= begin[:, first:stop, None]) & (begin[:, None] <= n)
    return masked_attention(q, k[:, :last], v[:, :last], seen[:, None], scale)


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, gate: Tensor | None = None, *, scale: float, start: Tensor | None = None, causal: bool = True
) -> Tensor:
    """Attention of whole sequences, with gradients for q, k, v and gate.

    Args:
        q: [B, T, H, D]. k, v: [B, T, G, D], H a multiple of G.
        active: bool [B, T, U], which units each token uses; U is G or H.
        gate: [B, T, U] factor of each unit, or None for 1. It counts, and gets a gradient, where its unit is used.
        start: [B, T] index of the first token of each token's document; None = no padding and no packing. The output of a padding token
            (start > its own index) is finite and means nothing. Padding behind a document is a document of its own.
        causal: False = a token sees the later ones of its document too, as in encoders.

    Returns:
        [B, T, H, D] in q's dtype; sums are fp32, or fp64 for fp64.
    """
    with torch.autocast(q.device.type, enabled=False):
        chunks = [recomputed(_chunk, rows, k, v, at * QUERY_CHUNK, scale, start, causal) for at, rows in enumerate(q.split(QUERY_CHUNK, 1))]
        out = torch.cat(chunks, 1).unflatten(2, (active.shape[2], -1))
        if gate is not None:
            out = out * gate.to(out.dtype)[..., None, None]
        used: Tensor = out.masked_fill(~active[..., None, None], 0)
        return used.flatten(2, 3)
