"""Fewer query heads (SQA, https://arxiv.org/abs/2510.01817): those that read the same KV head are merged.

Query heads of one KV head see the same keys and values, so there is nothing to turn: the merged query is a mean of its members, weighted by the energy that each
adds to the residual stream and given back the length it lost, and its output columns are the sum of theirs, as if all had attended as it does. Attention
costs num_heads / H of what it did; the cache depends on the KV heads alone. The paper trains such models from scratch and gives no conversion.

Before training, 8 -> 4 query heads and 4 KV heads of the embedded model (16,384 tokens; source 2.833): loss 3.581 weighted, 3.704 mean, 3.793 the
largest member, 4.231 the largest with its own output columns alone; the same order at 4 query and 2 KV, 2 and 2, 4 and 1 heads.

Shapes: H query heads of the source, N KV heads, M query heads that become one, D head_dim, E hidden_size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnconvert.surgery.regroup.heads import Projections
from attnconvert.surgery.regroup.inits import second_moments_by_group


def merge_queries(source: Projections, moments: Tensor, num_heads: int) -> Projections:
    """The same layer with fewer query heads.

    Args:
        source: of H query heads, float64.
        moments: second moments of what its projections read, [E + 1, E + 1]; the identity stands for "no calibration".
        num_heads: query heads of the result, a divisor of H and a multiple of the KV heads.
    """
    H, N = source.q.shape[0], source.num_key_value_heads
    assert H % num_heads == num_heads % N == 0, "the caller checked the heads"
    bias = torch.zeros_like(source.q[..., 0]) if source.q_bias is None else source.q_bias
    rows = torch.cat([source.q, bias[..., None]], -1).unflatten(0, (num_heads, H // num_heads))
    # What a query's channel counts: the energy of the keys' channel. Rotary pairs share theirs between two channels, which evens out.
    keys = torch.einsum("nidid->nd", second_moments_by_group(source.k, source.k_bias, moments, 1, N)).repeat_interleave(num_heads // N, 0)
    inner = torch.einsum("nide,ef,njdf,nd->nij", rows, moments.to(rows), rows, keys)
    values = second_moments_by_group(source.v, source.v_bias, moments, 1, N)[:, 0, :, 0].repeat_interleave(H // N, 0)
    added = torch.einsum("hed,hdf,hef->h", source.o, values, source.o).clamp_min(torch.finfo(source.o.dtype).tiny).unflatten(0, (num_heads, -1))
    share = added / added.sum(1, keepdim=True)
    length = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    mean = torch.einsum("ni,nij,nj->n", share, inner, share).clamp_min(torch.finfo(inner.dtype).tiny).sqrt()
    merged = torch.einsum("ni,nide->nde", share, rows) * ((share * length).sum(1) / mean)[:, None, None]
    return replace(source, q=merged[..., :-1], o=source.o.unflatten(0, (num_heads, -1)).sum(1), q_bias=None if source.q_bias is None else merged[..., -1])


def sqa_name(before: int, num_heads: int, num_key_value_heads: int) -> str:
    """What the paper calls a model with so many heads, made from one with `before` query heads."""
    if 4 * num_heads == before:
        return "xSMQA" if num_key_value_heads == 1 else "xSQA"
    return "sSQA" if 2 * num_heads == before and num_key_value_heads == num_heads else "SQA"
