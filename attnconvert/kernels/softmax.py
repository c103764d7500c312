"""Softmax attention under a mask, in pieces, for the PyTorch forms of the sparse operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor

QUERY_CHUNK = 256  # queries whose keys are looked up together


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64). q: [B, C, H, D]; k, v: [B, S, G, D]; mask: bool [B or 1, H or 1, C, S] -> [B, C, H, D]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    R = q.shape[2] // k.shape[2]
    queries, keys, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    if R > 1:
        keys, values = (x.repeat_interleave(R, 1) for x in (keys, values))  # SDPA's fused kernels do not take a mask with grouped heads
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(q.dtype)


def recomputed(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    """`function` of all arguments; where gradients are wanted, its masks and logits are computed again rather than kept."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out: Tensor = torch.utils.checkpoint.checkpoint(function, q, k, v, *options, use_reentrant=False, preserve_rng_state=False)
        return out
    return function(q, k, v, *options)
